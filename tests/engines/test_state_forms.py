"""A checkpoint's states are fp32 whatever form they were kept in: into another form they are rounded once, or not at all where nothing is lost."""

import pytest
import torch
from test_meshes import batch

from gigatrain import load
from gigatrain.checkpoint import PASSING, Checkpoints, fill
from gigatrain.engines.native import Native
from gigatrain.errors import CheckpointError
from gigatrain.parallel.mesh import alone
from gigatrain.planning.plan import plan

BF16 = ("train.precision=bf16", "kernels=reference")


def states(made, found=None, passing=()):
    """An engine of the plan, as a checkpoint left it, and what the load said."""
    engine = Native(made, alone(), torch.device("cpu"), fresh=found is None)
    said = []
    if found is not None:
        said = fill(found, engine.state(), passing=passing)
        engine.restored()
    return engine, said


def stepped(engine, made, step):
    engine.forward_backward(batch(made, step, 0, 1))
    return engine.step(1.0)


def through(tiny, folder, forms, steps=3):
    """Steps in fp32 states, then saved and taken up in each form in turn without a step between; the tensors of each save."""
    found, kept = None, []
    for number, form in enumerate(forms):
        made = plan(load.recipe(tiny, [*BF16, *form]), load.site("laptop"))
        engine, _ = states(made, found)
        for step in range(steps if number == 0 else 0):
            stepped(engine, made, step)
        saves = Checkpoints(folder, run="r", plan_sha256=made.meaning, keep=9)
        saves.save(number, engine.state(), {})
        found = saves.latest()[0]
        kept.append({(group, name): tensor for group in ("weights", "optimizer") for name, tensor in found.tensors(group).items()})
    return kept


def test_what_is_lossless_is_bitwise(tiny, tmp_path):
    """fp32 -> bf16+16 -> fp32, and each narrow form onto itself."""
    forms = [(), ("optim.master=bf16+16",), (), ("train.precision=fp32",), ()]
    first, *others = through(tiny, tmp_path, forms)
    for form, other in zip(forms[1:], others, strict=True):
        assert all(torch.equal(first[key], other[key]) for key in first), form


@pytest.mark.parametrize("form", [("optim.moments=bf16",), ("optim.moments=int8",), ("optim.master=bf16+8", "optim.moments=int8")], ids=str)
def test_what_rounds_rounds_once_and_to_nearest(tiny, tmp_path, form):
    first, narrow, again, wide, back = through(tiny, tmp_path, [(), form, form, (), form])
    for other in (again, wide, back):
        assert all(torch.equal(narrow[key], other[key]) for key in narrow)
    second = through(tiny, tmp_path / "second", [(), form])[1]
    assert all(torch.equal(narrow[key], second[key]) for key in narrow)  # deterministic
    for (group, name), exact in first.items():
        error = (narrow[group, name].double() - exact.double()).abs()
        if group == "weights":  # 24 bits of which 16 are significand, rounded to nearest
            limit = exact.abs().double() * 2**-16 if "optim.master=bf16+8" in form else torch.zeros_like(error)
        elif not name.startswith("exp_avg"):
            limit = torch.zeros_like(error)
        elif "optim.moments=bf16" in form:
            limit = exact.abs().double() * 2**-8
        else:  # half a code of 127 at x^4, or of 255 at x^8, of the largest of a block, which neighbours share: d(c^4) = 4 c^3 / 254 of it
            kind = name.split(".")[0]
            largest = max(tensor.abs().max().item() for (_, other), tensor in first.items() if other.startswith(f"{kind}."))
            limit = torch.full_like(error, largest * (4 / 254 if kind == "exp_avg" else 8 / 510))
        assert bool((error <= limit + 1e-38).all()), (group, name)
    assert any(not torch.equal(narrow[key], first[key]) for key in first)


def test_scales_of_fp8_begin_anew_where_they_were_not_kept(tiny, tmp_path):
    low = ("train.precision=fp8", "fp8.scaling=tensorwise", "fp8.amax=delayed", "fp8.least=[16,16]", "fp8.emulate=true")
    made = {form: plan(load.recipe(tiny, form), load.site("laptop")) for form in (BF16, low, (*low, "fp8.history=4"))}
    assert len({one.meaning for one in made.values()}) == 1
    wide, narrow, short = made.values()
    engine, _ = states(wide)
    stepped(engine, wide, 0)
    saves = Checkpoints(tmp_path, run="r", plan_sha256=wide.meaning, keep=9)
    saves.save(1, engine.state(), {})
    with pytest.raises(CheckpointError, match="optimizer has other tensors than this run: amax"):
        states(narrow, saves.latest()[0])
    engine, said = states(narrow, saves.latest()[0], PASSING)
    assert said == [f"optimizer.amax begins anew: {PASSING['optimizer', 'amax']}"]
    assert torch.isfinite(stepped(engine, narrow, 1).nats)
    saves.save(2, engine.state(), {})
    assert states(short, saves.latest()[0], PASSING)[1] == said
    engine, said = states(wide, saves.latest()[0], PASSING)
    assert said == ["optimizer.amax of the checkpoint is left out"]
    assert all(torch.equal(piece.tensor, saves.latest()[0].tensors("weights")[name]) for name, piece in engine.state()["weights"].items())
