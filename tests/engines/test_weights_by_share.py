"""`model.from` under engines that share the model: a rank reads and holds its share of the weights and one tensor more, never a whole copy.

GIGATRAIN_SHARE_MB=200 measures a model of that size (in bf16 files); by default it is a small one, whose tensors are large beside everything else.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import together

from gigatrain import engines, load
from gigatrain.architectures import from_hf_config, to_hf_config
from gigatrain.engines import source
from gigatrain.engines.deepspeed import DeepSpeed
from gigatrain.engines.native import Native
from gigatrain.models import adapters, hf, nf4
from gigatrain.models.decoder import initial
from gigatrain.parallel import shard
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


def of_folder(tiny, path):
    """The recipe without numbers of its own: those of `model.from` hold."""
    text = tiny.read_text()
    recipe = path / "recipe.toml"
    recipe.write_text(text[: text.index("[model.architecture]")] + text[text.index("[tokenizer.train]") :])
    return recipe


@pytest.mark.parametrize("how", ["native", *(pytest.param(zero, marks=pytest.mark.long) for zero in ("zero3", "zero2"))])
def test_a_rank_reads_its_share(tiny, folder, how):
    path, state = folder
    engine = ("engine.name=native",) if how == "native" else ("engine.name=deepspeed", f"engine.zero={how[-1]}")
    overrides = (f"model.from={path}", "train.batch=2", "tokenizer.train.vocab=320", *engine)
    recipe = of_folder(tiny, path)
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


def adapted(rank, recipe, overrides, ranks):
    """How many bytes a rank read of the base, and what it holds of it."""
    made = plan(load.recipe(recipe, overrides), load.site("laptop"), ranks)
    mesh, read, whole_read = Mesh(made.mesh, rank), [], hf.read_weights

    def counted(*args, **kwargs):
        for name, tensor in whole_read(*args, **kwargs):
            read.append(tensor.numel() * tensor.element_size())
            yield name, tensor

    hf.read_weights = counted
    rows: list[int] = []
    quantised = nf4.quantised
    nf4.quantised = lambda weight: rows.append(weight.numel()) or quantised(weight)
    engine = engines.make(made, mesh, torch.device("cpu"), fresh=rank == 0)  # a resume reads what is frozen too
    if isinstance(engine, Native):
        held = {name: (engine.places[name], shard.local(one.detach()).clone()) for name, one in engine.frozen.items()}
    else:
        assert isinstance(engine, DeepSpeed)
        frozen: dict[str, Any] = {name: one for name, one in engine.model.named_parameters() if not one.requires_grad}
        held = {name: one.ds_tensor.detach().clone() for name, one in frozen.items()}
    return {"read": sum(read), "largest": max(read), "held": held, "quantised": sum(rows)}


@pytest.mark.parametrize("how", ["lora", "qlora", pytest.param("zero3", marks=pytest.mark.long)])
def test_a_rank_reads_and_quantises_its_share_of_a_frozen_base(tiny, folder, how):
    path, state = folder
    more = {"lora": (), "qlora": ("adapter.quantise=nf4",), "zero3": ("engine.name=deepspeed", "engine.zero=3")}[how]
    recipe = of_folder(tiny, path)
    overrides = (f"model.from={path}", "train.batch=2", "tokenizer.train.vocab=320", "adapter.rank=4", *more)
    found = together(2, adapted, recipe, overrides, 2)
    size = sum(2 * tensor.numel() for tensor in state.values())
    matrices = sum(tensor.numel() for name, tensor in state.items() if name.endswith("_proj.weight"))
    for one in found:
        print(how, one["read"] / 1e6, "MB read of", size / 1e6, "quantised", one["quantised"] / 1e6, "of", matrices / 1e6, "M elements")
        assert one["read"] < 0.5 * size + one["largest"] + 1e5
        assert one["quantised"] == (matrices / 2 if how == "qlora" else 0)
    kept: dict = {}
    for name, tensor in state.items():
        if how == "qlora" and name.endswith("_proj.weight"):
            owner = name.removesuffix(".weight")
            kept[f"{owner}.codes"], scales = nf4.quantised(tensor)
            kept[f"{owner}.scales"] = scales.view(torch.int32)
        else:
            kept[name] = tensor
    assert {name for one in found for name in one["held"]} == kept.keys()
    for name, tensor in kept.items():
        if how == "zero3":
            flat = torch.cat([one["held"][name] for one in found])[: tensor.numel()]
            assert torch.equal(flat, tensor.float().flatten()), name
            continue
        whole = torch.full(tensor.shape, -1.0).to(found[0]["held"][name][1].dtype)
        for one in found:
            place, piece = one["held"][name]
            place.of(whole).copy_(piece.view(place.size))
        assert torch.equal(whole, tensor.to(whole.dtype)), name


def hashed(rank, recipe, overrides, ranks):
    """What is said of the base, and the files that this rank read for it."""
    mine, file_sha256 = [], adapters._file_sha256
    adapters._file_sha256 = lambda path: mine.append(path.name) or file_sha256(path)
    made = plan(load.recipe(recipe, overrides), load.site("laptop"), ranks)
    return source.base_of(made, Mesh(made.mesh, rank) if ranks > 1 else None), mine


def test_ranks_share_the_hashing_of_a_base(tiny, folder, tmp_path):
    """None waits in a collective while another reads the whole; and a file that only one cannot read is every rank's error."""
    path, state = folder
    recipe, base = of_folder(tiny, tmp_path), tmp_path / "base"
    files = hf.save_weights(state, from_hf_config(hf.read_config(path)), base, max_shard_bytes=3e6)[:-1]
    (base / "config.json").write_bytes((path / "config.json").read_bytes())
    overrides = (f"model.from={base}", "train.batch=2", "tokenizer.train.vocab=320", "adapter.rank=4")
    found = together(2, hashed, recipe, overrides, 2)
    names = sorted(one.name for one in files)
    assert [mine for _, mine in found] == [names[::2], names[1::2]]
    assert len(names) > 3
    whole, mine = hashed(0, recipe, overrides, 1)
    assert mine == names
    assert [said for said, _ in found] == [whole, whole]
    drawn = ("train.batch=2", "adapter.rank=4")
    assert together(2, hashed, tiny, drawn, 2)[1][0] == hashed(0, tiny, drawn, 1)[0]
    (base / names[1]).unlink()
    (base / names[1]).symlink_to("/proc/self/mem")  # it is a file, and cannot be read
    with pytest.raises(AssertionError, match="CheckpointError: rank 1 of 2"):
        together(2, hashed, recipe, overrides, 2)
