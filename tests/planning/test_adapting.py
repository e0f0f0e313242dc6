"""What the plan knows of an adapter: exact counts and bytes, fewer FLOPs, and refusals that name the way out."""

import json

import pytest
import torch

from gigatrain import architectures, engines, load
from gigatrain.config import Adapter
from gigatrain.engines.native import Native
from gigatrain.errors import PlanError
from gigatrain.kernels.linear import Linear
from gigatrain.models.decoder import Decoder
from gigatrain.optim.adamw import AdamW
from gigatrain.parallel.mesh import alone
from gigatrain.planning import adapting
from gigatrain.planning.plan import plan

RANK = ("adapter.rank=4", "adapter.alpha=8.0")
WIDE = ("model.architecture.hidden=64", "model.architecture.intermediate=64", "model.architecture.head_dim=16")


def made(tiny, *overrides, ranks=1):
    return plan(load.recipe(tiny, overrides), load.site("laptop"), ranks)


def test_counts_of_known_models():
    """41,943,040 of Llama 3.1 8B at rank 16 on every linear layer is what peft prints for it."""
    llama = architectures.Architecture.model_validate_json(json.dumps(architectures.resolve("llama-3.1-8b")))
    assert adapting.trained(llama, Adapter(rank=16)) == 41_943_040
    assert adapting.low_rank(llama, Adapter(rank=16, targets=("q_proj", "v_proj"))) == 6_815_744
    forward_and_backward = llama.flops_per_token(4096)
    less = adapting.flops_per_token(llama, Adapter(rank=16), 4096)
    assert less == forward_and_backward - 2 * (llama.matrix_parameters() + llama.vocab * llama.hidden) + 6 * 41_943_040


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.precision=bf16",),
        (
            "adapter.kind=dora",
            "adapter.train_head=true",
            "optim.master=bf16+8",
            "optim.moments=int8",
            "train.precision=bf16",
            "kernels.adamw=reference",
        ),
        ("adapter.quantise=nf4", *WIDE, "adapter.targets=['q_proj','down_proj']", "model.architecture.tied=false"),
    ],
)
def test_the_plans_bytes_are_the_engines(tiny, overrides):
    chosen = made(tiny, *RANK, *overrides)
    engine = engines.make(chosen, alone(), torch.device("cpu"), fresh=True)
    assert isinstance(engine, Native)
    assert chosen.adapter is not None
    count = sum(p.numel() for p in engine.parameters.values())
    assert count == adapting.trained(chosen.decoder, chosen.adapter)
    frozen = sum(p.numel() * p.element_size() for p in engine.frozen.values())
    size = 2 if chosen.compute == "bf16" else 4
    assert chosen.memory.weights == frozen + size * count
    states = 0
    for group in engine.groups:
        assert isinstance(group, AdamW)
        kept = {key: value for key, value in vars(group.bucket).items() if isinstance(value, torch.Tensor) and value.dim()}
        states += sum(tensor.numel() * tensor.element_size() for key, tensor in kept.items() if key not in ("weight", "copy"))
        states += group.bucket.weight.numel() * 4 if chosen.compute == "bf16" and chosen.optim.master == "fp32" else 0
    assert chosen.memory.optimizer == states
    full = made(tiny, *(one for one in overrides if not one.startswith("adapter.")))
    assert chosen.memory.gradients < full.memory.gradients
    assert chosen.memory.optimizer < full.memory.optimizer
    assert chosen.flops_per_token < full.flops_per_token


@pytest.mark.parametrize(
    ("overrides", "said", "ranks"),
    [
        (("adapter.targets=['k_prj']",), 'did you mean "k_proj"', 1),
        (("adapter.targets=['wq']",), "self_attn.q_proj, self_attn.k_proj", 1),
        (("mesh.tensor=2",), "mesh.tensor 2", 2),
        (("mesh.pipeline=2", "train.microbatch=1"), "mesh.pipeline 2", 2),
        (("optim.name=muon",), "muon", 1),
        (("train.dropout=0.1",), "adapter.dropout", 1),
        (("adapter.quantise=nf4",), "rows of 32", 1),
        (("adapter.quantise=nf4", *WIDE, "engine.name=deepspeed"), "native", 1),
        (("adapter.restore=bitsandbytes",), "leave adapter.restore out", 1),
        (("train.fuse=true",), "frozen", 1),
        (("adapter.dropout=0.1", "train.compile=true"), "adapter.dropout = 0.0", 1),
    ],
)
def test_what_cannot_be_is_refused(tiny, overrides, said, ranks):
    with pytest.raises(PlanError) as failure:
        made(tiny, *RANK, *overrides, ranks=ranks)
    assert said in str(failure.value)


def test_an_adapter_is_part_of_what_a_run_means_but_not_where_its_base_lies(tiny, tmp_path):
    plain, adapted, other = made(tiny), made(tiny, *RANK), made(tiny, *RANK, "adapter.dropout=0.1")
    assert len({plain.meaning, adapted.meaning, other.meaning}) == 3
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        config = architectures.to_hf_config(plain.decoder, max_positions=64, dtype="float32", bos=None, eos=None, pad=None)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    here, there = (made(tiny, *RANK, f"model.from={tmp_path / name}") for name in ("here", "there"))
    assert (here.meaning, here.identity) == (there.meaning, there.identity)
    assert here.sha256 != there.sha256


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b"])
def test_every_matrix_that_is_planned_is_one_that_the_decoder_has(name):
    architecture = architectures.Architecture.model_validate_json(json.dumps(architectures.resolve(name)))
    with torch.device("meta"):
        model = Decoder(architecture)
    found: dict[str, list[tuple[int, int]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            found.setdefault(path.split(".", 3)[3], []).append((module.out_features, module.in_features))
    assert found == {end: [(outputs, inputs)] * layers for end, (outputs, inputs, layers) in adapting.matrices(architecture).items()}
