"""The gradient norm: exact to a rounding, the same on every run, and nothing that a flipped bit could do to it unseen."""

import math
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from gigatrain.errors import KernelError
from gigatrain.kernels import grad_norm, launch


def drawn(*counts: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(counts))
    return [(torch.randn(count, generator=generator) * size).to(dtype) for count in counts]


def test_the_reference_is_torchs_norm_of_everything() -> None:
    grads = drawn(100, 7)
    norm, scale, skip = grad_norm.reference(grads, 1.5)
    torch.testing.assert_close(norm, torch.cat(grads).norm())
    torch.testing.assert_close(scale, 1.5 / norm)
    assert skip == 0
    assert grad_norm.reference(grads, 1e9)[1] == 1
    assert grad_norm.reference(grads)[1] == 1


@pytest.mark.parametrize("case", grad_norm.CASES)
def test_errs_at_most_twice_as_much_as_plain_torch(case: Any) -> None:
    torch.manual_seed(0)
    grads, call = grad_norm._sample(case, "cpu")
    exact = call(grad_norm.reference, *(g.double() for g in grads))
    plain, ours = call(grad_norm.reference, *grads), call(grad_norm.fused, *grads)
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert (o.dtype, o.shape) == (torch.float32, ())
        assert abs(o - e) <= max(2 * abs(p - e), torch.finfo(torch.float32).eps * abs(e))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e15, 3e18, 1e25, 1e30, 1e37])
def test_squares_that_overflow_have_a_norm_nevertheless(dtype: torch.dtype, size: float) -> None:
    """torch's own is infinite above 1.8e19 / sqrt(n), and a step would be refused that clipping could have saved."""
    grads = drawn(500, 70, dtype=dtype, size=size / 10) + drawn(300, dtype=dtype)  # one buffer of another order of magnitude
    exact = torch.cat(grads).double().norm()
    norm, scale, skip = grad_norm.fused(grads, 1.0, torch.tensor(2.0))
    torch.testing.assert_close(norm.double(), exact, rtol=2e-7, atol=0)
    torch.testing.assert_close(scale.double(), 1 / exact, rtol=3e-7, atol=0)
    assert skip == 0
    if size > 1e20:
        assert grad_norm.reference(grads)[0] == math.inf


@pytest.mark.parametrize("version", [grad_norm.reference, grad_norm.fused])
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_one_number_that_is_not_finite_skips_the_update(version: Any, poison: float) -> None:
    for where in (0, 1):
        grads = drawn(300, 40_000, dtype=torch.bfloat16)
        grads[where][-1] = poison
        norm, _, skip = version(grads, 1.0, torch.tensor(1.0))
        assert not torch.isfinite(norm)
        assert skip == 1
    assert version(drawn(30), 1.0, torch.tensor(poison))[2] == 1
    assert version(drawn(30), 1.0, torch.tensor(1.0))[2] == 0
    assert version(drawn(30), 1.0)[2] == 0


def test_a_norm_beyond_fp32_skips_the_update() -> None:
    norm, _, skip = grad_norm.fused([torch.full((9,), 3e38)], 1.0)
    assert norm == math.inf
    assert skip == 1


@pytest.mark.parametrize("kernel", list(grad_norm.SPACE))
def test_every_configuration_gives_the_right_result(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same bits however many programs there are: a norm must not depend on the GPU's size."""
    grads = drawn(70_001, 5, dtype=torch.bfloat16)
    exact = torch.cat(grads).double().norm()
    for configuration in grad_norm.SPACE[kernel]:
        found = set()
        with launch.forced(kernel, configuration):
            for processors in (1, 3):
                monkeypatch.setattr(launch, "processors", lambda _, count=processors: count)
                found.add(grad_norm.fused(grads, 1.0)[0].item())
        assert len(found) == 1
        assert found.pop() == pytest.approx(exact.item(), rel=1e-7)


def test_shipped_configurations_can_be_tuned_to() -> None:
    for kernel, space in grad_norm.SPACE.items():
        assert all(shipped in space for shipped in launch.table("default")["configs"][kernel].values())


@pytest.mark.parametrize("count", [1, 31, 33, 65_535, 65_537])
def test_tails_of_a_buffer(count: int) -> None:
    room = torch.full((count + 64,), 1e9)
    room[:count] = 2.0
    assert grad_norm.fused([room[:count]])[0].item() == pytest.approx(2 * count**0.5, rel=1e-7)


def test_buffers_of_nothing_and_strided_ones() -> None:
    assert [t.item() for t in grad_norm.fused([torch.empty(0), torch.empty(0)], 1.0)] == [0, 1, 0]
    wide = drawn(90)[0].view(9, 10)
    assert torch.equal(grad_norm.fused([wide.t()[::2]])[0], grad_norm.fused([wide.t()[::2].clone()])[0])


def test_two_runs_are_bitwise_equal() -> None:
    grads = drawn(100_003, dtype=torch.bfloat16)
    assert torch.equal(torch.stack(grad_norm.fused(grads, 0.5)), torch.stack(grad_norm.fused(grads, 0.5)))


def test_elements_beyond_two_billion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger 803, TE PR 3136. Untouched pages of the 4 GB buffer are never committed; one program runs, on the last chunk."""
    count = (1 << 31) + 1000
    grads = torch.empty(count, dtype=torch.bfloat16)
    chunk = 2048 * 32
    chunks = -(-count // chunk)
    grads[(chunks - 1) * chunk :] = 3.0
    parts = torch.zeros(chunks, dtype=torch.float64)
    builder = interpreter.interpreter_builder
    size_of, index_of = builder.set_grid_dim, builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_dim", lambda x, y, z: size_of(chunks, y, z))
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: index_of(chunks - 1, y, z))
    launch.launch(grad_norm._squares, (1,), grads, parts, count, chunks, SMALL=2.0**-90, LARGE=2.0**180, TURNS=32, PIPELINE=1, BLOCK=2048)
    assert parts[-1] == 9.0 * (count - (chunks - 1) * chunk)
    assert parts[:-1].eq(0).all()


def test_the_operator_passes_torchs_own_check() -> None:
    operator = torch.ops.gigatrain.grad_norm.default
    torch.library.opcheck(operator, (drawn(300, 5), torch.tensor(1.0), 1.0))
    torch.library.opcheck(operator, (drawn(33, dtype=torch.bfloat16), None, None))


def test_refuses_what_it_cannot_do_and_names_the_way_out() -> None:
    with pytest.raises(
        KernelError, match="grad_norm: gradients must be bf16, fp16 or fp32 on one device, not torch.float64 on cpu; set kernels.grad_norm"
    ):
        grad_norm.fused([torch.ones(3, dtype=torch.float64)])
    with pytest.raises(KernelError, match=r"the loss must be one number in fp32, not \(2,\) in torch.float32"):
        grad_norm.fused([torch.ones(3)], 1.0, torch.ones(2))


def test_the_reference_counts_millions_of_gradients():
    """One fp32 sum over all of them, as torch's own on a CPU, errs by 1e-4, and a clip that acts by as much."""
    g = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.vector_norm(g.double())
    assert abs(grad_norm.reference([g])[0].double() / exact - 1) < 1e-7
    halves = grad_norm.reference(list(g.split(1_234_567)))[0]
    assert abs(halves.double() / exact - 1) < 1e-7
