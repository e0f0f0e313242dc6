"""`model.from` under engines that share the model: a rank reads and holds its share of the weights and one tensor more, never a whole copy.

GIGATRAIN_SHARE_MB=200 measures a model of that size (in bf16 files); by default it is a small one, whose tensors are large beside everything else.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from distributed import together

from gigatrain import engines, load
from gigatrain.architectures import to_hf_config
from gigatrain.models import hf
from gigatrain.models.decoder import initial
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning.plan import plan

MB = int(os.environ.get("GIGATRAIN_SHARE_MB", "16"))


def anonymous_bytes() -> int:
    """This process's memory that no file backs."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith("Anonymous:")).split()[1])


def mapped_bytes() -> int:
    """Pages of files that this process has touched: of a folder's weights, what it read."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith("RssFile:")).split()[1])


def begun(rank, recipe, overrides, ranks):
    made = plan(load.recipe(recipe, overrides), load.site("laptop"), ranks)
    mesh = Mesh(made.mesh, rank)
    if made.engine.name == "deepspeed":
        import deepspeed  # noqa: F401 (not what is measured)
    read, most, whole_read = [], [0], hf.read_weights
    files = mapped_bytes()
    before = anonymous_bytes()

    def counted(*args, **kwargs):
        for name, tensor in whole_read(*args, **kwargs):
            read.append(tensor.numel() * tensor.element_size())
            most[0] = max(most[0], anonymous_bytes() - before)
            yield name, tensor

    hf.read_weights = counted
    engine = engines.make(made, mesh, torch.device("cpu"), fresh=True)
    held = anonymous_bytes() - before
    weights = {name: (piece.place, piece.tensor.clone()) for name, piece in engine.state()["weights"].items() if piece.writes}
    return {"read": sum(read), "largest": max(read), "peak": most[0], "held": held, "files": mapped_bytes() - files, "weights": weights}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny):
    """A llama of MB megabytes in bf16, of equal layers, written tensor by tensor."""
    layers, hidden = 12, 256
    while 2 * (layers * (4 * hidden * hidden + 3 * hidden * 3 * hidden) + 2 * 2048 * hidden) < MB * 1e6:
        hidden += 64
    numbers = f'{{family="llama",vocab=2048,hidden={hidden},layers={layers},heads={hidden // 64},intermediate={3 * hidden}}}'
    arch = plan(load.recipe(tiny, (f"model.architecture={numbers}",)), load.site("laptop"), 1, fits=False).decoder
    from gigatrain.models.decoder import Decoder

    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Decoder(arch).named_parameters()}
    path = tmp_path_factory.mktemp("weights")
    state = {name: initial(name, shape, arch, 0.02, True, 0, torch.device("cpu")).bfloat16() for name, shape in shapes.items()}
    hf.save_weights(state, arch, path)
    (path / "config.json").write_text(json.dumps(to_hf_config(arch, bos=1, eos=2, pad=None, max_positions=4096, dtype="bfloat16")))
    return path, state


@pytest.mark.parametrize("how", ["native", *(pytest.param(zero, marks=pytest.mark.long) for zero in ("zero3", "zero2"))])
def test_a_rank_reads_its_share(tiny, folder, how):
    path, state = folder
    engine = ("engine.name=native",) if how == "native" else ("engine.name=deepspeed", f"engine.zero={how[-1]}")
    overrides = (f"model.from={path}", "train.batch=2", "tokenizer.train.vocab=320", *engine)
    text = tiny.read_text()
    recipe = path / "recipe.toml"
    recipe.write_text(text[: text.index("[model.architecture]")] + text[text.index("[tokenizer.train]") :])
    found = together(2, begun, recipe, overrides, 2)
    size = sum(2 * tensor.numel() for tensor in state.values())
    rows: dict = {}
    for rank, one in enumerate(found):
        print(
            how, rank, {name: round(value / 1e6, 1) for name, value in one.items() if name != "weights"}, f"of {size / 1e6:.1f} MB in bf16"
        )
        assert one["read"] < 0.5 * size + 2 * one["largest"] + 1e6
        for name, (place, piece) in one["weights"].items():
            rows.setdefault(name, torch.full(place.shape, torch.nan))
            place.of(rows[name]).copy_(piece)
    assert rows.keys() == state.keys()
    assert all(torch.equal(rows[name], state[name].float()) for name in rows)
    largest = 4 * max(tensor.numel() for tensor in state.values())  # in fp32
    # While it reads, a rank holds what it holds anyway, and one tensor; native has nothing then but its share of the fp32 masters.
    assert all(one["peak"] < one["held"] + 2 * largest + 8e6 for one in found)
    if how == "native":
        assert all(one["peak"] < 4 * size / 2 / 2 + 2 * largest + 8e6 for one in found)
