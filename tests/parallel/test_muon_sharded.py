"""Muon over boxes: any cut of the matrices gives one process's weights, whoever owns which matrix and however the work is batched."""

from pathlib import Path

import pytest
import torch
from distributed import together

from gigatrain import config
from gigatrain.checkpoint import Checkpoints, fill
from gigatrain.kernels.newton_schulz import fused, momentum_fused, update_fused
from gigatrain.optim.adamw import Flat
from gigatrain.optim.muon import Muon, Versions
from gigatrain.parallel.mesh import WEIGHTS, Mesh
from gigatrain.parallel.places import Piece, Place, chunk

# Two layers of a small decoder. 6 rows over 4 ranks: 2, 2, 2, 0; 10 rows: 3, 3, 3, 1; 4 rows: 1 each, 2 rows: two ranks have none.
LAYER = {
    "q": (12, 10),
    "k": (4, 10),
    "v": (4, 10),
    "o": (10, 12),
    "gate": (18, 10),
    "up": (18, 10),
    "down": (10, 18),
    "odd": (6, 7),
    "small": (2, 5),
}
SHAPES = {f"{layer}.{name}": shape for layer in range(2) for name, shape in LAYER.items()}
COLUMN, ROW = ("q", "gate", "up"), ("o", "down")  # cut along dim 0, dim 1; k and v are copied along `tensor`, as where heads are too few
STEPS = 10


def whole_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def placed(mesh):
    """This rank's boxes, and the rows of each shard with its padding, as FSDP2 stores it."""
    places, rows = {}, {}
    for name, shape in SHAPES.items():
        place, kind = Place(shape, (0, 0), shape), name.split(".")[1]
        if mesh.size("tensor") > 1:
            if kind in COLUMN or kind in ROW:
                dim = int(kind in ROW)
                place = place.cut(dim, *chunk(shape[dim], mesh.index("tensor"), mesh.size("tensor")))
            else:
                place = Place(shape, place.start, place.size, copied=("tensor",))
        rows[name] = -(-place.size[0] // mesh.size(*WEIGHTS))
        places[name] = place.cut(0, *chunk(place.size[0], mesh.index(*WEIGHTS), mesh.size(*WEIGHTS)))
    return places, rows


def built(mesh, seed=0, **options):
    """Muon on this rank's boxes of the seed's weights, and what of each padded view is the box."""
    places, rows = placed(mesh)
    padded = {name: torch.Size((rows[name], place.size[1])) for name, place in places.items()}
    group = Flat(padded, torch.device("cpu")), Flat(padded, torch.device("cpu"))
    start = whole_tensors(seed)
    muon_boxes = [{name: flat.views[name][: place.size[0]] for name, place in places.items()} for flat in group]
    for name, box in muon_boxes[0].items():
        box.copy_(places[name].of(start[name]))
    return Muon(*group, lr=0.1, momentum=0.9, weight_decay=0.01, places=places, mesh=mesh, **options), places, *muon_boxes


def stepped(muon, places, grads, steps, bad=()):
    """As an engine drives it: gradients of boxes, a rate and a scale on the device, now and then an update to be skipped."""
    for step in steps:
        gradient = whole_tensors(1000 + step)
        for name, box in grads.items():
            box.copy_(places[name].of(gradient[name]))
        muon.step(0.2 + 0.1 * step, torch.tensor(0.5), torch.tensor(float(step in bad)))


def _run(rank, axes, options, steps, bad):
    muon, places, weights, grads = built(Mesh(config.Mesh(**axes), rank), **options)
    stepped(muon, places, grads, range(steps), bad)
    padding = muon.master.buffer.numel() - sum(box.numel() for box in weights.values())
    momentum = {name: muon.momentum_buffer.views[name][: place.size[0]] for name, place in places.items()}
    rounds = len(muon.exchange.rounds) if muon.exchange else 0
    owned = [name for round in muon.exchange.rounds for name in round.names] if muon.exchange else []
    return places, {n: t.clone() for n, t in weights.items()}, {n: t.clone() for n, t in momentum.items()}, rounds, owned, padding


def joined(found, which):
    """Whole tensors of all ranks' boxes; boxes that several ranks hold must be the same bits."""
    result = {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()}
    for rank in found:
        for name, place in rank[0].items():
            at, box = place.of(result[name]), rank[which][name]
            assert torch.equal(at[~at.isnan()], box[~at.isnan()]), name
            at.copy_(box)
    assert not any(tensor.isnan().any() for tensor in result.values())
    return result


def alone_(options=None, steps=STEPS, bad=()):
    found = [_run(0, {"shard": 1}, options or {}, steps, bad)]
    assert found[0][3:5] == (0, [])
    return joined(found, 1), joined(found, 2)


MESHES = [
    {"shard": 2},
    {"shard": 4},
    {"shard": 1, "tensor": 2},
    {"shard": 2, "tensor": 2},
    {"shard": 1, "context": 2, "tensor": 2},
    {"replicate": 2, "shard": 2},
]


@pytest.mark.parametrize("axes", MESHES, ids=lambda axes: "-".join(f"{axis}{size}" for axis, size in axes.items()))
@pytest.mark.parametrize("limit_bytes", [1, 1 << 31])
def test_any_cut_gives_one_processs_weights_and_momentum(axes, limit_bytes):
    ranks = Mesh(config.Mesh(**axes)).count
    found = together(ranks, _run, axes, {"limit_bytes": limit_bytes}, STEPS, (4,))
    weights, momentum = alone_(bad=(4,))
    for name, tensor in joined(found, 2).items():
        assert torch.equal(tensor, momentum[name]), name  # element-wise: the same bits
    for name, tensor in joined(found, 1).items():
        # Gathered updates are the same bits, and products do not depend on what else is in a batch.
        torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=1e-6)
    copies = axes.get("replicate", 1)
    assert sorted(name for rank in found for name in rank[4]) == sorted(list(SHAPES) * copies)
    assert all(rank[3] == found[0][3] for rank in found)
    assert found[0][3] >= (len(SHAPES) * copies // ranks if limit_bytes == 1 else 1)
    if axes == {"shard": 4}:
        assert any(0 in place.size for rank in found for place in rank[0].values())
        assert all(rank[5] > 0 for rank in found[3:])


def test_the_size_of_an_update_is_that_of_the_whole_matrix():
    for scaling in ("spectral", "rms"):
        found = together(2, _run, {"shard": 2}, {"scaling": scaling}, 2, ())
        weights, _ = alone_({"scaling": scaling}, steps=2)
        for name, tensor in joined(found, 1).items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=1e-6)


def test_momentum_in_bf16_is_the_same_bits_in_boxes():
    options = {"momentum_dtype": torch.bfloat16}
    found = together(2, _run, {"shard": 1, "tensor": 2}, options, 3, ())
    weights, momentum = alone_(options, steps=3)
    assert all(torch.equal(tensor.bfloat16(), momentum[name].bfloat16()) for name, tensor in joined(found, 2).items())
    for name, tensor in joined(found, 1).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=1e-6)


def _skipped(rank):
    mesh = Mesh(config.Mesh(shard=2), rank)
    muon, places, _, grads = built(mesh)
    stepped(muon, places, grads, range(1))
    before = muon.master.buffer.clone(), muon.momentum_buffer.buffer.clone()
    muon.grads.buffer.fill_(float("inf"))
    muon.step(1.0, torch.tensor(float("nan")), torch.tensor(1.0))
    return torch.equal(before[0], muon.master.buffer) and torch.equal(before[1], muon.momentum_buffer.buffer)


def test_a_skipped_update_changes_no_bit_of_any_box():
    assert together(2, _skipped) == [True, True]


FUSED = {"versions": Versions(momentum_fused, fused, update_fused)}
FEW = {name: SHAPES[name] for name in ("0.q", "0.o", "0.odd")}


def _fused(rank, axes):
    import interpreter  # noqa: F401 - corrects Triton's; a forked server does not find it before

    SHAPES.clear()
    SHAPES.update(FEW)  # the interpreter is slow
    return _run(rank, axes, FUSED, 1, ())


def test_fused_kernels_work_on_boxes(monkeypatch):
    found = together(2, _fused, {"shard": 2})
    plain, _ = alone_(steps=1)
    monkeypatch.setitem(globals(), "SHAPES", FEW)
    weights, _ = alone_(FUSED, steps=1)
    for name, tensor in joined(found, 1).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(weights["0.q"], plain["0.q"])  # the iteration in fp16


def pieces(mesh, muon, places, weights):
    """As an engine's state: of equal boxes the first rank's is written."""
    state = {"weights": {}, "optimizer": {}}
    for name, place in places.items():
        writes = mesh.index("replicate", *place.copied) == 0
        state["weights"][name] = Piece(weights[name], place, writes)
        box = muon.state()[f"momentum.{name}"][: place.size[0]]
        state["optimizer"][f"momentum.{name}"] = Piece(box, place, writes)
    return state


def _half(rank, axes, folder, load, steps):
    mesh = Mesh(config.Mesh(**axes), rank)
    muon, places, weights, grads = built(mesh, seed=7 if load else 0)
    saves = Checkpoints(Path(folder), run="r", plan_sha256="p", keep=9, mesh=mesh)
    if load:
        found, refused = saves.latest()
        assert (found.step, refused) == (min(steps), [])
        fill(found, pieces(mesh, muon, places, weights), mesh)
    stepped(muon, places, grads, steps)
    saves.save(max(steps) + 1, pieces(mesh, muon, places, weights), {})


def test_a_run_of_muon_goes_on_under_other_meshes(tmp_path):
    together(4, _half, {"shard": 2, "tensor": 2}, str(tmp_path), False, range(4))
    together(2, _half, {"shard": 2}, str(tmp_path), True, range(4, 7))
    _half(0, {"shard": 1}, str(tmp_path), True, range(7, STEPS))
    found = Checkpoints(tmp_path, run="r", plan_sha256="p", keep=9).latest()[0]
    weights, momentum = alone_()
    for name in SHAPES:
        assert torch.equal(found.tensors("optimizer")[f"momentum.{name}"], momentum[name])
        torch.testing.assert_close(found.tensors("weights")[name], weights[name], rtol=1e-6, atol=1e-6)
