"""Gradient release: the run of a plain one, less memory, and what holds where a number is not finite."""

import gc

import pytest
import torch
from test_fuse import BF16, FUSE, LEAN, MUON, made, same, started, stepped, trained
from test_meshes import batch

from gigatrain.checkpoint import Checkpoints, fill
from gigatrain.engines.released import unit_of

WHOLE = ("train.microbatch=8", "optim.clip=false")
RELEASE = (*WHOLE, "train.release=true")
SUMS = ("train.main_grads=true",)


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ((), ()),
        (("model.architecture.tied=false",), (*FUSE, *SUMS)),
        (BF16, ()),
        ((*BF16, "kernels.adamw=reference"), (*FUSE, *SUMS)),
        ((*BF16, "optim.master=bf16+16"), FUSE),
        (MUON, ()),
        (("train.recompute=full",), SUMS),
    ],
    ids=str,
)
def test_released_gradients_give_the_run_of_kept_ones(tiny, overrides, options):
    steps = 1 if MUON[0] in overrides else 4
    expected, found = (trained(0, tiny, (*overrides, *more), 1, steps) for more in (WHOLE, (*RELEASE, *options)))
    if options or MUON[0] in overrides:  # other products, other roundings
        rel = 2e-2 if BF16[0] in overrides else 1e-6
        same([found], expected, rel, 4 * 1.2 * 1e-3 * 2**-8 if MUON[0] in overrides else 0)
        return
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-6, atol=0)  # the norm is summed in another order
    assert all(torch.equal(tensor, expected[1][name][1]) for name, (_, tensor) in found[1].items())


@pytest.mark.parametrize("overrides", [(), LEAN, (*BF16, *MUON)], ids=str)
def test_a_run_may_begin_and_end_to_release_at_a_resume(tiny, tmp_path, overrides):
    kinds = {"with": (*overrides, *RELEASE), "without": (*overrides, *WHOLE)}
    assert len({made(tiny, kind).identity for kind in kinds.values()}) == 1
    for writer, reader in (("with", "without"), ("without", "with")):
        first, second = started(tiny, kinds[writer]), started(tiny, kinds[reader])
        stepped(first, 2)
        saves = Checkpoints(tmp_path / writer, run="r", plan_sha256="p", keep=1)
        saves.save(2, first.state(), {})
        fill(saves.latest()[0], second.state())
        second.restored()
        for group, named in first.state().items():
            assert named.keys() == second.state()[group].keys()
            for name, piece in named.items():
                # Narrow moments share a scale by blocks of 128 of a group, and groups end elsewhere: they are rounded once more, to codes of 8 bits.
                rough = 0.05 * float(piece.tensor.abs().max()) if overrides == LEAN and name.startswith("exp_avg") else 0.0
                torch.testing.assert_close(piece.tensor, second.state()[group][name].tensor, rtol=0, atol=rough)
        assert second.state()["optimizer"]["updates.decayed" if "optim.name=muon" not in overrides else "updates.plain"].tensor == 2
        torch.testing.assert_close(torch.tensor(stepped(first, 1, 2)), torch.tensor(stepped(second, 1, 2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("overrides", [(), BF16, LEAN, (*BF16, *MUON), ("model.architecture.tied=false",)], ids=str)
@pytest.mark.parametrize("options", [(), SUMS], ids=str)
def test_no_more_gradients_exist_than_are_planned(tiny, overrides, options, monkeypatch):
    engine = started(tiny, (*overrides, *RELEASE, *options))
    release, most = engine._release, 0
    assert release is not None
    update = release._update

    def size(*tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def counted(unit):
        nonlocal most
        held = size(*(group.grads.buffer for group in engine.groups))
        # A unit's own gradients are freed as they arrive; a tied head's is in autograd's hands until the embedding's joins it.
        tied = engine.plan.decoder.tied
        own = engine.parameters["model.embed_tokens.weight"]
        most = max(most, held + (size(own) if tied else 0))
        update(unit)

    monkeypatch.setattr(release, "_update", counted)
    stepped(engine, 1)
    assert all(group.grads.buffer.numel() == 0 for group in engine.groups)
    assert all(parameter.grad is None for parameter in engine.parameters.values())
    assert most <= engine.plan.memory.gradients
    assert (
        engine.plan.memory.gradients < 0.75 * made(tiny, (*overrides, *WHOLE, *options)).memory.gradients
    )  # a quarter is the vocabulary's already


@pytest.mark.long
def test_an_engine_that_releases_holds_no_gradients(tiny):
    def held(*overrides):
        """Bytes of all storages that came with an engine."""
        gc.collect()
        before = {x.untyped_storage()._cdata for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)}
        engine = started(tiny, (*BF16, "kernels.adamw=reference", *overrides))
        stepped(engine, 1)
        gc.collect()
        found = {}
        for x in gc.get_objects():
            if type(x) in (torch.Tensor, torch.nn.Parameter) and (storage := x.untyped_storage())._cdata not in before:
                found[storage._cdata] = storage.nbytes()
        return sum(found.values()), engine

    (kept, plain), (without, released) = held(*WHOLE), held(*RELEASE)
    gradients = sum(group.grads.buffer.numel() * 4 for group in plain.groups)
    assert released.plan.fuses("release")
    assert 0.95 * gradients < kept - without < 1.1 * gradients


def state(engine):
    return {
        name: piece.tensor.clone() for named in engine.state().values() for name, piece in named.items() if name not in ("bad", "steps")
    }


@pytest.mark.parametrize("overrides", [(), LEAN, (*BF16, *MUON)], ids=str)
def test_a_loss_that_is_not_finite_updates_nothing(tiny, overrides):
    engine = started(tiny, (*overrides, *RELEASE))
    stepped(engine, 1)
    before, weight = state(engine), engine.parameters["model.layers.2.mlp.up_proj.weight"]
    kept = weight.data.clone()
    weight.data[0, 0] = float("nan")
    engine.forward_backward(batch(engine.plan, 1, 0, 1))
    assert not torch.isfinite(engine.step(1.0).grad_norm)
    weight.data.copy_(kept)
    after = state(engine)
    for name, tensor in before.items():
        if "layers.2.mlp.up_proj" not in name:
            assert torch.equal(tensor, after[name]), name
    assert engine.bad.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("overrides", [(), LEAN, (*BF16, *MUON)], ids=str)
def test_a_gradient_that_is_not_finite_reaches_no_weight_and_nothing_after_it_moves(tiny, overrides):
    """Born in the backward of layer 2: layer 3 has moved by then, by its own right gradient; all that comes later has not. The step counts as bad."""
    engine = started(tiny, (*overrides, *RELEASE))
    stepped(engine, 1)
    before = state(engine)
    hook = engine.model.model.layers["2"].self_attn.o_proj.register_full_backward_hook(lambda _, dx, __: (dx[0] * float("inf"),))
    engine.forward_backward(batch(engine.plan, 1, 0, 1))
    assert not torch.isfinite(engine.step(1.0).grad_norm)
    hook.remove()
    after = state(engine)
    assert all(torch.isfinite(tensor.float()).all() for tensor in after.values())
    moved = {
        unit_of(name.partition(".")[2] if name.startswith(("exp_avg", "momentum")) else name)
        for name in before
        if not torch.equal(before[name], after[name])
    }
    assert moved == {"model.layers.3", "model.norm.weight"}
    assert engine.bad.tolist() == [1, 1, 1, 1]
    assert all(after[name] == 1 for name in after if name.startswith("updates."))
    stepped(engine, 1, 2)
    assert engine.bad.tolist() == [1, 0, 1, 1]
    assert all(count == 2 for name, count in state(engine).items() if name.startswith("updates."))
    assert all(torch.isfinite(tensor.float()).all() for tensor in state(engine).values())
