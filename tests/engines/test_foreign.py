"""Models of transformers that are none of our families, trained by the same engines: the run of one process, and transformers' own loss."""

import json

import pytest
import torch
import transformers
from distributed import together
from matrix import long_but
from test_meshes import batch, joined

from gigatrain import engines, load, loop
from gigatrain.errors import PlanError, RecipeError
from gigatrain.models.autonumbers import numbers
from gigatrain.observe.display import Display
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.planning.plan import plan

HEADS = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
TINY = {
    "gpt_neox": HEADS | {"intermediate_size": 64},
    "phi": HEADS | {"intermediate_size": 64},
    "falcon": HEADS | {"alibi": False},
    "mamba": {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4},
    "gpt2": {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": HEADS | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}
BASE = ("train.batch=8", "train.microbatch=3", "optim.clip=0.5", "optim.lr=1e-4", "data.packing=document")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny):
    """A config.json of each kind, and a recipe that trains it from fresh weights."""
    found = {}
    for kind, sizes in TINY.items():
        folder = tmp_path_factory.mktemp(kind)
        config = transformers.CONFIG_MAPPING[kind](**sizes)
        config.save_pretrained(folder)
        text = tiny.read_text()
        start, end = text.index("[model.architecture]"), text.index("[tokenizer.train]")
        recipe = folder / "recipe.toml"
        recipe.write_text(text[:start] + f'[model]\nfrom = "{folder}"\nfresh = true\n' + text[end:])
        found[kind] = recipe
    return found


def trained(rank, recipe, overrides, ranks, steps=8):
    made = plan(load.recipe(recipe, (*BASE, *overrides)), load.site("laptop"), ranks, measure=numbers)
    mesh = Mesh(made.mesh, rank) if ranks > 1 else alone()
    engine = engines.make(made, mesh, torch.device("cpu"), fresh=True)
    found = []
    for step in range(steps):
        whole = batch(made, step, *mesh.data)
        parts = tuple(type(part)(part.tokens, part.labels, torch.arange(32).expand_as(part.tokens), None) for part in whole.microbatches)
        engine.forward_backward(type(whole)(parts, whole.targets, whole.tokens, whole.positions))
        update = engine.step(1.0)
        found.append((update.nats.item() / update.targets.item(), update.grad_norm.item()))
    pieces = {name: (piece.place, piece.tensor.clone()) for name, piece in engine.state()["weights"].items() if piece.writes}
    return found, pieces


@pytest.fixture(scope="module")
def single():
    return {}


@pytest.mark.parametrize(
    ("kind", "ranks", "overrides"),
    [
        *long_but([0], [(kind, 2, ()) for kind in TINY]),
        *long_but(
            [0, 5],
            [
                ("gpt_neox", 2, ("mesh.shard=1", "mesh.replicate=2")),
                ("gpt_neox", 4, ("mesh.replicate=2", "train.recompute=full")),
                ("phi", 2, ("engine.offload=true", "train.recompute=selective")),
                ("mamba", 2, ("engine.name=deepspeed", "engine.zero=3")),
                ("gpt_neox", 2, ("engine.name=deepspeed", "engine.zero=2")),
                ("falcon", 2, ("engine.name=deepspeed", "engine.zero=3")),
                ("gpt2", 2, ("engine.name=deepspeed", "engine.zero=1")),
            ],
        ),
    ],
)
def test_any_model_gives_one_run_on_every_engine(folders, single, kind, ranks, overrides):
    if kind not in single:
        single[kind] = trained(0, folders[kind], (), 1)
    expected = single[kind]
    found = together(ranks, trained, folders[kind], overrides, ranks)
    for numbers_, _ in found:
        torch.testing.assert_close(torch.tensor(numbers_), torch.tensor(expected[0]), rtol=2e-6, atol=0)
    whole = joined([pieces for _, pieces in found])
    assert whole.keys() == expected[1].keys()
    for name, (_, tensor) in expected[1].items():
        if tensor.dim() > 1:  # the loss does not depend on a key's bias, so what AdamW makes of its gradient is noise
            assert (whole[name] - tensor).norm() / tensor.norm() < 2e-6, name


@pytest.mark.parametrize("kind", ["gpt_neox", "mamba"])
def test_a_run_ends_in_a_folder_that_transformers_loads(folders, kind, tmp_path):
    chosen = plan(load.recipe(folders[kind], [*BASE, "train.steps=6", "train.batch=4"]), load.site("laptop"), measure=numbers)
    summary = loop.train(chosen, tmp_path / "run", display=Display())
    assert summary is not None
    assert summary["parameters"] == chosen.parameters
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert type(model).__name__ == chosen.architecture.class_name  # type: ignore[union-attr]
    tokens = torch.arange(40)[None] % 320
    assert torch.isfinite(model(input_ids=tokens).logits).all()
    again = plan(
        load.recipe(folders[kind], [*BASE, f"model.from={tmp_path / 'run' / 'export'}", "model.fresh=false"]),
        load.site("laptop"),
        measure=numbers,
    )
    engine = engines.make(again, alone(), torch.device("cpu"), fresh=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(engine.state()["weights"][name].tensor, parameter.float()), name


def test_what_such_a_model_cannot_do_is_refused(folders):
    def made(kind, *overrides, ranks=None):
        return plan(load.recipe(folders[kind], [*BASE, *overrides]), load.site("laptop"), ranks, measure=numbers)

    with pytest.raises(PlanError, match="mesh.tensor 2 cuts our own decoders, and 'mamba'"):
        made("mamba", "mesh.tensor=2", ranks=2)
    with pytest.raises(PlanError, match="several documents in a row, which 'mamba' cannot keep apart"):
        made("mamba", "data.packing=stream")
    assert made("gpt_neox", "data.packing=stream").parameters == made("gpt_neox").parameters
    with pytest.raises(RecipeError, match="is not implemented"):  # without torch nobody can measure it
        plan(load.recipe(folders["falcon"], BASE), load.site("laptop"))
    folder = folders["opt"].parent
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(RecipeError, match="code of its own"):
        made("opt")
