"""What a run of a family with experts leaves: a folder that transformers loads, with the logits of our decoder."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from distributed import together
from rich.console import Console
from safetensors.torch import load_file

from gigatrain import config, load, loop
from gigatrain.architectures import class_of
from gigatrain.checkpoint import Checkpoints
from gigatrain.export import export
from gigatrain.generate import generate
from gigatrain.models import hf
from gigatrain.models.decoder import Decoder
from gigatrain.observe.display import Display
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import Piece, Place, chunk
from gigatrain.planning.plan import plan

LATENT = "kv_heads=4 head_dim=12 q_rank=16 kv_rank=16 rope_head_dim=4 value_head_dim=8 expert_intermediate=16"
ROPE = '{kind="yarn",factor=4.0,original_positions=16,mscale=1.0,mscale_all_dim=1.0,query_beta=0.1}'
FAMILIES = {
    "olmoe": ("kv_heads=4", ("loss.router_aux=0.01", "loss.router_z=0.001")),
    "deepseek_v3": (
        f"{LATENT} groups=4 groups_per_token=2 moe_layers=[false,true]",
        ("loss.router_bias_rate=0.01", "train.precision=bf16"),
    ),
    "mistral4": (f"{LATENT} rope={ROPE}", ("loss.router_aux=0.01",)),
    "gpt_oss": ("window=16", ("train.recompute=lean", "train.precision=bf16")),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_exported_and_generates(tiny, tmp_path, family):
    numbers, others = FAMILIES[family]
    sizes = f"family={family} experts=8 experts_per_token=2 tied=false {numbers}".split()
    recipe = load.recipe(
        tiny, [*(f"model.architecture.{one}" for one in sizes), *others, "train.steps=3", "export=false", "validation.every=0"]
    )
    made = plan(recipe, load.site("laptop"))
    loop.train(made, tmp_path / "run", display=Display(Console(file=io.StringIO(), force_terminal=False)))
    assert export(tmp_path / "run", tmp_path / "model") == 3
    theirs = getattr(transformers, class_of(family) or "").from_pretrained(tmp_path / "model", dtype=torch.float32)
    ours = Decoder(made.decoder)
    hf.load_weights(ours, tmp_path / "model")
    tokens = torch.arange(2, 40).view(2, 19)
    torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    for name, correction in ours.corrections().items():
        assert correction.abs().max() >= 0.01 - 1e-6, name
        assert torch.equal(correction, theirs.get_buffer(name))
    if family == "mistral4":  # which no Auto class of transformers loads
        assert generate(tmp_path / "model", "def", tokens=3, temperature=0.0).startswith("def")


@pytest.mark.long
def test_files_straight_from_boxes_are_the_same_however_they_are_cut_and_by_however_many_written(tiny, tmp_path):
    """Of experts and of a tied model whose checkpoint two ranks saved; and no piece of a file is larger than it may be."""
    sizes = ["family=mixtral", "experts=4", "experts_per_token=2", "tied=false"]
    overrides = [*(f"model.architecture.{one}" for one in sizes), "train.steps=2", "export=false", "validation.every=0"]
    made = plan(load.recipe(tiny, overrides), load.site("laptop"))
    loop.train(made, tmp_path / "run", display=Display(Console(file=io.StringIO(), force_terminal=False)))
    export(tmp_path / "run", tmp_path / "one")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    for processes in (1, 2):
        target = tmp_path / f"many-{processes}"
        assert export(tmp_path / "run", target, shard_bytes=3e4, processes=processes) == 2
        files = sorted(target.glob("model-*.safetensors"))
        assert len(files) > 4
        parts = {name: tensor for path in files for name, tensor in load_file(path).items()}
        assert parts.keys() == whole.keys()
        assert all(torch.equal(parts[name], tensor) and parts[name].dtype == tensor.dtype for name, tensor in whole.items())
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
        assert {target / file for file in index["weight_map"].values()} == set(files)
    theirs = transformers.MixtralForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert theirs.num_parameters() == made.parameters


def _saved(rank, folder, shapes):
    box = {
        name: Piece(torch.arange(math.prod(shape)).float().view(shape), Place(shape, (0,) * len(shape), shape))
        for name, shape in shapes.items()
    }
    for name, piece in box.items():
        dim = 0 if name != "columns" else 1
        place = piece.place.cut(dim, *chunk(piece.place.shape[dim], rank, 3))
        box[name] = Piece(place.of(piece.tensor).clone(), place, place.size[dim] > 0)
    Checkpoints(Path(folder), run="r", plan_sha256="p", keep=1, mesh=Mesh(config.Mesh(shard=3), rank)).save(1, {"weights": box}, {})


def test_any_rows_are_read_from_whatever_boxes(tmp_path):
    shapes = {"rows": (7, 3), "columns": (5, 8), "experts": (4, 3, 2), "vector": (2,)}
    together(3, _saved, str(tmp_path), shapes)
    tensors = Checkpoints(tmp_path, run="r", plan_sha256="p", keep=1).latest()[0].tensors("weights")
    for name, shape in shapes.items():
        for start in range(shape[0]):
            for stop in range(start + 1, shape[0] + 1):
                assert torch.equal(tensors.rows(name, start, stop), torch.arange(math.prod(shape)).float().view(shape)[start:stop])
