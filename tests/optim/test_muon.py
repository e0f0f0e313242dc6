"""Muon: the iteration orthogonalises, the update has the stated size, a skip changes nothing, and the work can be cut and shared."""

import pytest
import torch

from gigatrain.kernels import newton_schulz as kernel
from gigatrain.optim import muon as module
from gigatrain.optim.adamw import Flat
from gigatrain.optim.muon import Muon, Versions, newton_schulz, share

SHAPES = {"a": torch.Size([8, 4]), "b": torch.Size([8, 4]), "c": torch.Size([4, 12]), "d": torch.Size([5, 5]), "e": torch.Size([8, 4])}


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 48, 16), (1, 17, 65)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    torch.manual_seed(1)
    values = torch.linalg.svdvals(newton_schulz(torch.randn(shape)).float())
    assert values.min() > 0.3  # square random matrices have singular values near 0, which five steps lift only so far
    assert values.max() < 1.3


def test_newton_schulz_keeps_the_singular_vectors():
    torch.manual_seed(2)
    matrix = torch.randn(24, 40, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = newton_schulz(matrix[None])[0].double()
    overlap = torch.diagonal(u.T @ found @ vh.T)
    assert overlap.min() > 0.5
    assert (u.T @ found @ vh.T - torch.diag(overlap)).abs().max() < 0.05  # bf16


def muon(shapes=SHAPES, **options):
    torch.manual_seed(0)
    master, grads = Flat(shapes, torch.device("cpu")), Flat(shapes, torch.device("cpu"))
    master.buffer.normal_()
    grads.buffer.normal_()
    return Muon(master, grads, lr=0.1, momentum=0.9, weight_decay=0.01, **options)


@pytest.mark.parametrize("scaling", ["spectral", "rms"])
def test_one_update_is_the_formula(scaling):
    group = muon(scaling=scaling)
    before = {name: view.clone() for name, view in group.master.views.items()}
    group.step(0.5, torch.tensor(2.0), torch.tensor(0.0))
    for name, view in group.master.views.items():
        gradient = 2.0 * group.grads.views[name]
        rows, columns = view.shape
        size = max(1.0, rows / columns) ** 0.5 if scaling == "spectral" else 0.2 * max(rows, columns) ** 0.5
        update = newton_schulz((gradient + 0.9 * gradient)[None])[0].float() * size
        torch.testing.assert_close(view, before[name] * (1 - 0.05 * 0.01) - 0.05 * update, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(group.momentum_buffer.views[name], gradient)


def test_an_update_scaled_by_rms_moves_an_entry_as_far_as_adamw():
    """Moonlight (arXiv:2502.16982): AdamW's updates have a root mean square of 0.2 to 0.4."""
    for shape in ((64, 64), (32, 256), (256, 32)):
        group = muon({"w": torch.Size(shape)}, scaling="rms")
        before = group.master.buffer.clone()
        group.weight_decay = 0.0
        group.step(1.0, torch.tensor(1.0), torch.tensor(0.0))
        assert 0.15 < (group.master.buffer - before).square().mean().sqrt() / 0.1 < 0.25


def reference_trajectory(group, gradients, rates):
    """As Muon was first written here: every matrix by itself, in plain fp32 with the iteration in bf16."""
    weights = {name: view.clone() for name, view in group.master.views.items()}
    momentum = {name: torch.zeros_like(view) for name, view in weights.items()}
    for gradient, rate in zip(gradients, rates, strict=True):
        for name, weight in weights.items():
            momentum[name] = momentum[name] * 0.9 + gradient[name] * 0.5
            update = newton_schulz((gradient[name] * 0.5 + 0.9 * momentum[name])[None])[0].float()
            update *= max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
            weights[name] = weight * (1 - 0.1 * rate * 0.01) - 0.1 * rate * update
    return weights


def run(group, gradients, rates):
    for gradient, rate in zip(gradients, rates, strict=True):
        for name, view in group.grads.views.items():
            view.copy_(gradient[name])
        group.step(rate, torch.tensor(0.5), torch.tensor(0.0))
    return group.master.views


def drawn(steps):
    torch.manual_seed(3)
    return [{name: torch.randn(shape) for name, shape in SHAPES.items()} for _ in range(steps)]


@pytest.mark.parametrize("limit_bytes", [1, 500, 1 << 31])
def test_trajectories_do_not_depend_on_how_the_work_is_batched(limit_bytes):
    group = muon(limit_bytes=limit_bytes)
    assert sorted(name for batch in group.batches for name in batch.names) == sorted(SHAPES)
    for batch in group.batches:
        assert len(batch.names) == 1 or len(batch.names) * module.workspace_bytes(batch.rows, batch.columns) <= limit_bytes
    assert [len(batch.names) for batch in group.batches] == {1: [1] * 5, 500: [1] * 5, 1 << 31: [3, 1, 1]}[limit_bytes]
    rates = [0.2, 1.0, 0.7]
    expected = reference_trajectory(group, drawn(3), rates)
    for name, view in run(group, drawn(3), rates).items():
        torch.testing.assert_close(view, expected[name], rtol=1e-6, atol=1e-6)


FUSED = Versions(kernel.momentum_fused, kernel.fused, kernel.update_fused)


@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
def test_fused_updates_are_those_of_plain_torch(momentum_dtype):
    rates = [0.2, 1.0]
    expected = {name: view.clone() for name, view in run(muon(momentum_dtype=momentum_dtype), drawn(2), rates).items()}
    found = run(muon(momentum_dtype=momentum_dtype, versions=FUSED), drawn(2), rates)
    for name, view in found.items():
        # Both round the iteration in 16 bits: an update's entries differ by a few roundings to bf16 of the largest, which the rate makes 0.12.
        assert (view - expected[name]).abs().max() < 2 * 0.12 * 1.5 * 2**-5
        assert not torch.equal(view, expected[name])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_update_changes_no_bit(momentum_dtype, fused):
    group = muon(momentum_dtype=momentum_dtype, versions=FUSED if fused else Versions())
    group.step(1.0, torch.tensor(1.0), torch.tensor(0.0))
    before = group.master.buffer.clone(), group.momentum_buffer.buffer.clone()
    group.grads.buffer.fill_(float("inf"))
    group.step(1.0, torch.tensor(float("nan")), torch.tensor(1.0))
    assert torch.equal(before[0], group.master.buffer)
    assert torch.equal(before[1], group.momentum_buffer.buffer)


@pytest.mark.parametrize("fused", [False, True])
def test_weights_without_a_gradient_decay_and_stay_finite(fused):
    """dion 76: an update of zeros became NaN. A frozen layer's gradients stay the zeros of their buffer."""
    group = muon(versions=FUSED if fused else Versions())
    group.grads.buffer.zero_()
    before = group.master.buffer.clone()
    group.step(1.0, torch.tensor(1.0), torch.tensor(0.0))
    torch.testing.assert_close(group.master.buffer, before * (1 - 0.1 * 0.01))


def test_a_rate_on_the_device_is_the_rate():
    """A CUDA graph would replay a number for ever (dion: schedule and decay frozen)."""
    one, other = muon(), muon()
    one.step(0.3, torch.tensor(1.0), torch.tensor(0.0))
    other.step(torch.tensor(0.3), torch.tensor(1.0), torch.tensor(0.0))
    torch.testing.assert_close(one.master.buffer, other.master.buffer)


def test_momentum_in_bf16_stays_near_that_in_fp32():
    rates = [1.0] * 5
    one, other = muon(), muon(momentum_dtype=torch.bfloat16)
    run(one, drawn(5), rates)
    run(other, drawn(5), rates)
    assert {tensor.dtype for tensor in other.state().values()} == {torch.bfloat16}
    difference = (other.momentum_buffer.buffer.float() - one.momentum_buffer.buffer).norm() / one.momentum_buffer.buffer.norm()
    assert difference < 2**-8  # five roundings of 2^-9 at most, each forgotten by a tenth per step, and random


def test_state_is_named_and_live():
    group = muon()
    assert set(group.state()) == {f"momentum.{name}" for name in SHAPES}
    group.state()["momentum.c"].fill_(3.0)
    assert group.momentum_buffer.buffer.eq(3.0).sum() == 48


def test_an_empty_group_is_no_error():
    muon({}).step(1.0, torch.tensor(1.0), torch.tensor(0.0))


LLAMA = {
    f"{layer}.{name}": shape
    for layer in range(32)
    for name, shape in {
        "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096),
        "gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336),
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 7, 8, 64, 300])
def test_ranks_share_the_orthogonalisation_evenly(ranks):
    shares = [share(LLAMA, rank, ranks) for rank in range(ranks)]
    assert sorted(name for mine in shares for name in mine) == sorted(LLAMA)
    assert shares == [share(dict(LLAMA), rank, ranks) for rank in range(ranks)]
    cost = {name: kernel.flops(*shape, kernel.plan(*shape)) for name, shape in LLAMA.items()}
    loads = [sum(cost[name] for name in mine) for mine in shares]
    assert max(loads) <= sum(loads) / ranks + max(cost.values())
    if ranks <= 8:
        assert max(loads) < 1.01 * sum(loads) / ranks


def test_shares_add_up_to_the_whole_update():
    whole = muon()
    start = whole.master.buffer.clone()
    gradient = {name: view.clone() for name, view in whole.grads.views.items()}
    offsets = dict(whole.starts)
    whole.step(1.0, torch.tensor(1.0), torch.tensor(0.0))
    for rank in range(2):
        names = share(whole.shapes, rank, 2)
        mine = {name: SHAPES[name] for name in names}
        part = muon(mine)
        for name in names:
            part.master.views[name].copy_(start[offsets[name] : offsets[name] + mine[name].numel()].view(mine[name]))
            part.grads.views[name].copy_(gradient[name])
        part.step(1.0, torch.tensor(1.0), torch.tensor(0.0))
        for name in names:
            torch.testing.assert_close(part.master.views[name], whole.master.views[name], rtol=1e-6, atol=1e-6)
