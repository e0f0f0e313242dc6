"""The mask of dropout: its bits, its statistics, and that nothing but the seed decides it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from gigatrain.errors import KernelError
from gigatrain.kernels import dropout_add, launch

SEEDS = (0, 1, -1, 20261123, (7 << 32) + 5, -(1 << 63), (1 << 63) - 1)


def seed(value: int = 20261123) -> Tensor:
    return torch.tensor(value)


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x, residual = (torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return x, residual


def mask(count: int, p: float, seed_1: Tensor, offset: int = 0) -> Tensor:
    """What the fused kernel keeps."""
    return dropout_add.fused(torch.ones(count), torch.zeros(count), p, seed_1, offset) != 0


def test_operators_pass_torchs_own_check() -> None:
    x, residual = inputs(5, 33, dtype=torch.float32)
    torch.library.opcheck(torch.ops.gigatrain.dropout_add.default, (x, residual, 0.3, seed(), 8))
    torch.library.opcheck(torch.ops.gigatrain.dropout_add_backward.default, (torch.randn(5, 33), 0.3, seed(), 0))


def test_the_generator_is_philox() -> None:
    """The known answers of its authors' library (Random123, kat_vectors, philox4x32 with 7 and 10 rounds)."""
    for rounds, words in ((7, "5f6fb709 0d893f64 4f121f81 4f730a48"), (10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8")):
        found = dropout_add.philox(torch.tensor([0]), torch.tensor(0), rounds)
        assert [f"{word:08x}" for word in found[0].tolist()] == words.split()


@triton.jit
def _words(OUT, SEED, first, ROUNDS: tl.constexpr):
    at = tl.arange(0, 16)
    a, b, c, d = tl.randint4x(tl.load(SEED), first + at.to(tl.int64), ROUNDS)
    tl.store(OUT + at * 4, a.to(tl.int64))
    tl.store(OUT + at * 4 + 1, b.to(tl.int64))
    tl.store(OUT + at * 4 + 2, c.to(tl.int64))
    tl.store(OUT + at * 4 + 3, d.to(tl.int64))


@pytest.mark.parametrize("first", [0, 5, (1 << 31) - 8, (1 << 32) - 8, (1 << 40) + 3])
def test_the_generator_is_tritons_bit_for_bit(first: int) -> None:
    for value in SEEDS:
        words = torch.empty(16, 4, dtype=torch.int64)
        _words[(1,)](words, seed(value), first, ROUNDS=dropout_add.ROUNDS)  # type: ignore
        assert torch.equal(words, dropout_add.philox(torch.arange(16) + first, seed(value)))


@pytest.mark.parametrize("value", SEEDS)
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.75, 1 - 1e-9, 1.0])
def test_the_reference_makes_the_same_mask_bit_for_bit(value: int, p: float) -> None:
    kept = dropout_add.kept(torch.Size((1100,)), p, seed(value), 4)
    assert torch.equal(mask(1100, p, seed(value), 4), kept)
    assert kept.sum() == (1100 if p < 0.01 else 0 if p > 0.99 else kept.sum())


@pytest.mark.parametrize("configuration", dropout_add.SPACE["dropout_add.forward"])
def test_every_configuration_makes_the_same_mask(configuration: dict[str, int]) -> None:
    """The mask must not depend on how the work is cut (Triton 6691, fla 595682b8: some configurations only were wrong)."""
    x, residual = inputs(3, 1501)
    expected = dropout_add.kept(x.shape, 0.3, seed())
    with launch.forced("dropout_add.forward", configuration), launch.forced("dropout_add.backward", configuration):
        y = dropout_add.fused(x, residual, 0.3, seed())
        dx, _ = torch.autograd.grad(y, (x, residual), torch.ones_like(y))
    assert torch.equal(y != residual, expected & (y != residual))
    assert torch.equal(dx != 0, expected)
    torch.testing.assert_close(y, dropout_add.reference(x, residual, 0.3, seed()), rtol=0.01, atol=0.01)


def test_shipped_configurations_can_be_tuned_to() -> None:
    for kernel, space in dropout_add.SPACE.items():
        assert all(shipped in space for shipped in launch.table("default")["configs"][kernel].values())


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_that_is_kept(p: float) -> None:
    count = 1 << 20
    kept = dropout_add.kept(torch.Size((count,)), p, seed())
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)
    for lane in kept.view(-1, 4).unbind(-1):  # each of the four words of a call
        assert abs(lane.double().mean().item() - (1 - p)) < 5 * math.sqrt(4 * p * (1 - p) / count)


def test_masks_of_seeds_and_of_places_are_independent() -> None:
    """Neighbouring seeds are what layers and steps use; neighbouring elements share a call of the generator."""
    count, p = 1 << 18, 0.3
    spread = [dropout_add.kept(torch.Size((count,)), p, seed(value)).double() - (1 - p) for value in (100, 101, 102, 100 + (1 << 32))]
    bound = 5 * p * (1 - p) / math.sqrt(count)
    for i, a in enumerate(spread):
        assert all(abs((a * b).mean().item()) < bound for b in spread[i + 1 :])
        assert all(abs((a[lag:] * a[:-lag]).mean().item()) < bound for lag in (1, 2, 3, 4, 64, 4096))


def test_a_part_has_the_mask_that_it_has_in_the_whole() -> None:
    whole = mask(500, 0.4, seed())
    parts = [mask(end - begin, 0.4, seed(), begin) for begin, end in ((0, 4), (4, 128), (128, 500))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(mask(100, 0.4, seed()), mask(100, 0.4, seed(), 1 << 34))


@pytest.mark.parametrize("offset", [(1 << 32) - 40, (1 << 34) - 40, (1 << 34) + (1 << 33), (1 << 60) - 40])
def test_elements_beyond_32_bits_have_their_own_masks(offset: int) -> None:
    """The counter's high word takes over where element div 4 leaves 32 bits; a 32-bit counter would repeat the first mask."""
    assert torch.equal(mask(300, 0.5, seed(), offset), dropout_add.kept(torch.Size((300,)), 0.5, seed(), offset))
    assert not torch.equal(mask(300, 0.5, seed(), offset)[40:], mask(260, 0.5, seed()))


def test_tensors_beyond_two_billion_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 32-bit program * block overflows (Liger 803, Unsloth PR 3614); only the last program runs here, and untouched pages are never committed."""
    x = torch.empty((1 << 31) + 100, dtype=torch.bfloat16)
    x[-100:] = 1
    plain = launch.launch

    def last_only(kernel: Any, grid: tuple[int], *arguments: Any, **options: Any) -> None:
        index = TensorHandle(np.array([grid[0] - 1], dtype=np.int32), tl.int32)
        with monkeypatch.context() as patch:
            patch.setattr(InterpreterBuilder, "create_get_program_id", lambda *_: index)
            plain(kernel, (1,), *arguments, **options)

    monkeypatch.setattr(launch, "launch", last_only)
    y = dropout_add.fused(x, x, 0.5, seed())[-100:]
    dx = torch.ops.gigatrain.dropout_add_backward(x, 0.5, seed(), 0)[-100:]
    expected = dropout_add.kept(torch.Size((100,)), 0.5, seed(), 1 << 31)
    assert torch.equal(y == 3, expected)
    assert torch.equal(dx == 2, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (31,), (33, 3), (5, 7, 11)])
def test_forward_and_backward_use_the_same_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = inputs(*shape, dtype=dtype)
    kept = dropout_add.kept(x.shape, 0.25, seed())
    y = dropout_add.fused(x, residual, 0.25, seed())
    dy = torch.randn(shape).to(dtype)
    dx, dresidual = torch.autograd.grad(y, (x, residual), dy)
    assert torch.equal(dx, torch.where(kept, dy.float() * (4 / 3), 0.0).to(dtype))
    assert torch.equal(dresidual, dy)
    assert torch.equal(y, (residual.float() + torch.where(kept, x.float() * (4 / 3), 0.0)).to(dtype))


def test_none_and_all_are_dropped() -> None:
    x, residual = inputs(4, 40)
    assert torch.equal(dropout_add.fused(x, residual, 0.0, seed()), residual + x)
    assert torch.equal(dropout_add.fused(x, residual, 1e-12, seed()), residual + x)
    for version in (dropout_add.fused, dropout_add.reference):
        y = version(x, residual, 1.0, seed())
        assert torch.equal(y, residual)
        dx, dresidual = torch.autograd.grad(y.sum(), (x, residual))
        assert not dx.any()
        assert (dresidual == 1).all()


def test_what_is_dropped_may_be_anything() -> None:
    """0 * NaN and 0 * infinity are NaN; what is dropped is not multiplied."""
    kept = dropout_add.kept(torch.Size((64,)), 0.5, seed())
    x = torch.ones(64).masked_fill(~kept, float("nan"))
    assert torch.equal(dropout_add.fused(x, torch.zeros(64), 0.5, seed()), 2.0 * kept)


def test_recomputed_in_a_checkpoint_the_mask_is_the_same() -> None:
    x, residual = inputs(5, 40)
    plain = torch.autograd.grad(dropout_add.fused(x, residual, 0.5, seed()).sum(), (x, residual))
    again = checkpoint(dropout_add.fused, x, residual, 0.5, seed(), use_reentrant=False)
    assert isinstance(again, Tensor)
    assert all(torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(again.sum(), (x, residual)), strict=True))


def test_a_seed_that_changes_before_the_backward_is_noticed() -> None:
    """A seed that steps in place, as under CUDA graphs, must wait for the backward: else forward and backward would have two masks."""
    x, residual = inputs(5, 40)
    step = seed()
    y = dropout_add.fused(x, residual, 0.5, step)
    step += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_new_seed_in_place_is_a_new_mask() -> None:
    """No value of the seed is read on the host, where it would be frozen into a graph."""
    step = seed(5)
    first = mask(200, 0.5, step)
    step += 1
    assert torch.equal(mask(200, 0.5, step), dropout_add.kept(torch.Size((200,)), 0.5, seed(6)))
    assert not torch.equal(mask(200, 0.5, step), first)


def test_it_keeps_the_seed_only() -> None:
    x, residual = inputs(8, 40)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout_add.fused(x, residual, 0.5, seed())
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.int64, 1)]


def test_the_backward_can_run_twice_and_overwrites_nothing() -> None:
    """The gradient of the residual is the incoming gradient itself, which others hold too (Liger 370)."""
    x, residual = inputs(6, 40)
    y = dropout_add.fused(x, residual, 0.5, seed())
    dy = torch.randn(6, 40).bfloat16()
    before = dy.clone()
    first, second = (torch.autograd.grad(y, (x, residual), dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(dy, before)


def test_a_frozen_branch_launches_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual = inputs(4, 24)
    y = dropout_add.fused(x.detach(), residual, 0.5, seed())
    monkeypatch.setattr(launch, "launch", lambda *_, **__: pytest.fail("launched"))
    assert torch.equal(torch.autograd.grad(y.sum(), residual)[0], torch.ones_like(residual))


def test_layouts_are_read_as_they_are() -> None:
    """loss.sum().backward() gives strides of 0 (ROCm TE PR 623); the mask belongs to the element, not to its place in memory."""
    x, residual = inputs(24, 10)
    y = dropout_add.fused(x.T, residual.T, 0.5, seed())
    assert torch.equal(y, dropout_add.fused(x.T.contiguous(), residual.T.contiguous(), 0.5, seed()))
    dx = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(dx.T, 2.0 * dropout_add.kept(torch.Size((10, 24)), 0.5, seed()))


def test_under_compile_it_is_one_graph() -> None:
    x, residual = inputs(4, 16)
    compiled = torch.compile(dropout_add.fused, fullgraph=True, backend="aot_eager")
    got, expected = (version(x, residual, 0.5, seed(3)) for version in (compiled, dropout_add.fused))
    assert torch.equal(got, expected)
    assert torch.equal(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])


def test_refusals_say_why() -> None:
    x, residual = inputs(4, 24)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((x, residual, 1.5, seed()), "p = 1.5 is not between 0 and 1"),
        ((x, residual, float("nan"), seed()), "p = nan is not between 0 and 1"),
        ((x, residual, 0.5, seed().int()), r"the seed must be one int64, not torch.int32 \(\)"),
        ((x, residual, 0.5, torch.arange(2)), r"the seed must be one int64, not torch.int64 \(2,\)"),
        ((x, residual, 0.5, seed(), 6), "offset 6 is not a multiple of 4"),
        ((x, residual, 0.5, seed(), -4), "offset -4 is not a multiple of 4"),
    ]
    for arguments, why in wrong:
        with pytest.raises(KernelError, match=rf'dropout_add: {why}.*; set kernels.dropout_add = "reference"'):
            dropout_add.fused(*arguments)
        with pytest.raises(ValueError, match=why):
            dropout_add.reference(*arguments)
    with pytest.raises(KernelError, match=r"x and residual must share a shape.*\(4, 24\) on cpu and torch.bfloat16 \(3, 24\)"):
        dropout_add.fused(x, residual[:3], 0.5, seed())
    with pytest.raises(KernelError, match="the seed is on meta, not on cpu"):
        dropout_add.fused(x, residual, 0.5, seed().to("meta"))
    assert torch.equal(dropout_add.dropout_add(x, residual, 0.5, seed()), dropout_add.reference(x, residual, 0.5, seed()))
