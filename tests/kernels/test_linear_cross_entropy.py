"""The fused loss where others have gone wrong: no labels, frozen inputs, sure predictions, offsets, many chunks, odd gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gigatrain.kernels import linear_cross_entropy as lce

BOTH = [lce.reference, lce.chunked]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lce._ELEMENTS, "cpu", 1)


def sample(n: int = 150, h: int = 17, v: int = 37, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, v, (n,))
    labels[::7] = lce.IGNORE
    return torch.randn(n, h, dtype=dtype), torch.randn(v, h, dtype=dtype) * 0.5, labels


def grads(function: Any, hidden: Tensor, weight: Tensor, labels: Tensor, factor: float = 1.0, **numbers: Any) -> tuple[Tensor, ...]:
    h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss, ce = function(h, w, labels, **numbers)
    (loss * factor).backward()
    assert h.grad is not None
    assert w.grad is not None
    return loss.detach(), ce, h.grad, w.grad


@pytest.mark.parametrize("function", BOTH)
def test_a_batch_without_labels_costs_nothing(function) -> None:
    hidden, weight, labels = sample()
    loss, ce, dh, dw = grads(function, hidden, weight, torch.full_like(labels, lce.IGNORE), z_loss=0.1)
    assert loss == 0
    assert ce == 0
    assert not dh.any()
    assert not dw.any()


@pytest.mark.parametrize("function", BOTH)
def test_an_empty_batch_costs_nothing(function) -> None:
    hidden, weight, labels = sample()
    loss, _, dh, dw = grads(function, hidden[:0], weight, labels[:0])
    assert loss == 0
    assert dh.shape == (0, 17)
    assert not dw.any()


@pytest.mark.parametrize("factor", [-2.5, 1e-3])
def test_gradients_scale_with_that_of_the_loss(factor: float) -> None:
    hidden, weight, labels = sample()
    for a, b in zip(grads(lce.reference, hidden, weight, labels, factor), grads(lce.chunked, hidden, weight, labels, factor), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_all_of_it(frozen: str) -> None:
    hidden, weight, labels = sample()
    expected = grads(lce.reference, hidden, weight, labels)
    h, w = hidden.clone().requires_grad_(frozen != "hidden"), weight.clone().requires_grad_(frozen != "weight")
    lce.chunked(h, w, labels)[0].backward()
    trained, frozen_one, want = (w, h, expected[3]) if frozen == "hidden" else (h, w, expected[2])
    assert frozen_one.grad is None
    torch.testing.assert_close(trained.grad, want, rtol=1e-10, atol=1e-12)


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight, labels = sample()
    with torch.no_grad():
        loss, ce = lce.chunked(hidden.requires_grad_(), weight, labels, z_loss=0.1)
    assert not loss.requires_grad
    expected = lce.reference(hidden, weight, labels, z_loss=0.1)
    torch.testing.assert_close((loss, ce), tuple(x.detach() for x in expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("function", BOTH)
def test_the_pure_cross_entropy_carries_no_gradient(function) -> None:
    hidden, weight, labels = sample()
    assert not function(hidden.requires_grad_(), weight, labels, z_loss=0.1)[1].requires_grad


def test_many_small_batches_equal_one_large_one() -> None:
    hidden, weight, labels = sample()
    whole = grads(lce.chunked, hidden, weight, labels)
    parts = [grads(lce.chunked, *x, labels=y) for x, y in (((hidden[:40], weight), labels[:40]), ((hidden[40:], weight), labels[40:]))]
    torch.testing.assert_close(whole[0], parts[0][0] + parts[1][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(whole[3], parts[0][3] + parts[1][3], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sure_prediction_keeps_its_gradient(dtype: torch.dtype) -> None:
    """p - 1 computed in bf16 is 0 at p = 0.999 (Liger's PR 1329)."""
    hidden, weight = torch.ones(1, 1, dtype=dtype), torch.tensor([[8.0], [0.0], [0.5]], dtype=dtype)
    labels = torch.tensor([0])
    exact = grads(lce.reference, hidden.double(), weight.double(), labels)
    ours = grads(lce.chunked, hidden, weight, labels)
    for e, o in zip(exact, ours, strict=True):
        torch.testing.assert_close(o.double(), e, rtol=2 * torch.finfo(dtype).eps, atol=16 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("offset", [1e3, 1e4, -1e4])
def test_a_common_offset_of_the_logits_does_no_harm(offset: float) -> None:
    torch.manual_seed(1)
    hidden = torch.cat((torch.randn(70, 8), torch.ones(70, 1)), 1)
    weight = torch.cat((torch.randn(11, 8), torch.full((11, 1), offset)), 1)
    labels = torch.randint(0, 11, (70,))
    exact = grads(lce.reference, hidden.double(), weight.double(), labels)
    plain = grads(lce.reference, hidden, weight, labels)
    ours = grads(lce.chunked, hidden, weight, labels)
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert (o - e).norm() <= max(2 * (p - e).norm().item(), 1e-6 * e.norm().item())


@pytest.mark.parametrize("chunks", [1, 4, 64])
def test_the_weight_gradient_does_not_degrade_with_the_number_of_chunks(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger sums it over chunks in bf16 unless told otherwise (its issue 512)."""
    hidden, weight, labels = sample(n=64 * 64, h=16, v=16, dtype=torch.bfloat16)
    monkeypatch.setitem(lce._ELEMENTS, "cpu", hidden.shape[0] // chunks * 16)
    exact, plain = (grads(lce.reference, hidden.to(d), weight.to(d), labels)[3].double() for d in (torch.float64, torch.bfloat16))
    ours = grads(lce.chunked, hidden, weight, labels)[3].double()
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()


def test_takes_transposed_inputs_and_leaves_all_inputs_alone() -> None:
    hidden, weight, labels = sample()
    inputs = (hidden.t().contiguous().t(), weight.t().contiguous().t(), labels)
    kept = [x.clone() for x in inputs]
    for a, b in zip(grads(lce.reference, hidden, weight, labels), grads(lce.chunked, *inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


def test_two_backwards_give_the_same() -> None:
    hidden, weight, labels = sample()
    h = hidden.clone().requires_grad_()
    loss, _ = lce.chunked(h, weight, labels)
    (first,) = torch.autograd.grad(loss, h, retain_graph=True)
    (second,) = torch.autograd.grad(loss, h)
    assert torch.equal(first, second)
