"""The mixture of experts beyond what every operation is tested for: its order, its tails, its roundings, and that the host never waits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import moe, ops
from gigatrain.kernels import router as routers


def drawn(tokens: int = 33, experts: int = 6, visits: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, 16), (experts, 16), (experts, 48, 16), (experts, 16, 24)
    x, router, gate_up, down = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, router, gate_up, down


def route(x: Tensor, router: Tensor, visits: int, renormalise: bool = True) -> tuple[Tensor, Tensor]:
    return routers.reference(x, router, routers.Router(visits, renormalise=renormalise))[:2]


@pytest.mark.parametrize("renormalise", [True, False])
def test_each_token_is_the_weighted_sum_of_its_experts(renormalise: bool) -> None:
    x, router, gate_up, down = drawn()
    weights, chosen = route(x, router, 3, renormalise)
    y = moe.reference(x, weights, chosen, gate_up, down)
    for n in range(33):
        scores = (router @ x[n]).softmax(0)
        best = scores.argsort(descending=True)[:3].tolist()
        total = scores[best].sum() if renormalise else 1.0
        expected = sum(scores[e] / total * (down[e] @ (F.silu(gate_up[e, :24] @ x[n]) * (gate_up[e, 24:] @ x[n]))) for e in best)
        torch.testing.assert_close(y[n], expected)


def test_the_router_chooses_in_fp32() -> None:
    x, router, *_ = drawn(dtype=torch.bfloat16)
    weights, chosen = route(x, router, 3)
    assert (weights.dtype, chosen.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(weights.sum(1), torch.ones(33))


def test_slots_are_sorted_by_expert_and_equal_ones_stay_in_order() -> None:
    order, counts = moe.sort(torch.tensor([[3, 0], [1, 3], [0, 9], [9, 3]]), 4)  # 9: no expert
    assert order.tolist() == [1, 4, 2, 0, 3, 7, 5, 6]
    assert counts.tolist() == [2, 1, 0, 3]
    assert moe.sort(torch.zeros(0, 2, dtype=torch.int64), 4)[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("chosen", [[[0, 1, 2]] * 33, [[5, 4, 3]] * 33])
def test_an_expert_without_tokens_has_no_gradient_and_no_share(chosen: list[list[int]]) -> None:
    x, _, gate_up, down = drawn()
    leaves = [t.requires_grad_() for t in (gate_up, down)]
    moe.reference(x, torch.ones(33, 3), torch.tensor(chosen), *leaves).sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert sorted(chosen[0]) == leaf.grad.flatten(1).any(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("experts", [moe.experts_reference, moe.experts_grouped, moe.experts_glued, moe.experts_fused])
def test_rows_behind_the_counts_change_nothing_else(experts: moe.Experts) -> None:
    x, _, gate_up, down = drawn(20, dtype=torch.float32)
    counts, rest = torch.tensor([4, 0, 3, 2, 0, 5]), 6
    grads = []
    for rows in (14, 14 + rest):
        leaves = [t.clone().requires_grad_() for t in (x[:rows], gate_up, down)]
        y = experts(leaves[0], counts, *leaves[1:])
        assert y.shape == (rows, 16)
        y[:14].square().sum().backward()
        grads.append([y.detach()[:14], leaves[0].grad[:14], leaves[1].grad, leaves[2].grad])  # type: ignore[index]
    for without, given in zip(*grads, strict=True):
        assert torch.equal(without, given)


def test_without_reading_counts_the_reference_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, router, gate_up, down = drawn()
    found = []
    for countable in (True, False):
        monkeypatch.setattr(moe, "_countable", lambda counts, countable=countable: countable)
        leaves = [t.clone().requires_grad_() for t in (x, router, gate_up, down)]
        y = moe.reference(leaves[0], *route(leaves[0], leaves[1], 3), *leaves[2:])
        y.square().sum().backward()
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for read, masked in zip(*found, strict=True):
        torch.testing.assert_close(masked, read)


@pytest.mark.parametrize("block", [moe.reference, moe.grouped, moe.glued, moe.fused])
def test_nothing_is_read_on_the_host(block: Callable[..., Tensor]) -> None:
    """Fake tensors have no values: whoever reads one raises."""
    with FakeTensorMode() as mode:
        x, router, gate_up, down = (mode.from_tensor(t).requires_grad_() for t in drawn(dtype=torch.bfloat16))
        y = block(x, *route(x, router, 3), gate_up, down)
        y.sum().backward()
    assert (y.shape, y.dtype) == ((33, 16), torch.bfloat16)
    assert gate_up.grad is not None


def test_the_weighted_sum_is_rounded_once() -> None:
    weights, y = torch.full((1, 4), 0.25), torch.tensor([[256.0], [1.0], [1.0], [1.0]]).bfloat16()
    assert moe.combine(y, torch.arange(4), weights).item() == torch.tensor(259.0 / 4).bfloat16().item()  # and not 64


def test_the_gradient_of_a_token_is_rounded_once() -> None:
    """Adding 1 to 256 in bf16 changes nothing, however often."""
    x = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    order = torch.tensor([4, 0, 5, 1, 6, 2, 7, 3])
    rows = moe.gather(x, order, 4)
    rows.backward(torch.tensor([0, 256.0, 0, 1, 0, 1, 0, 2]).bfloat16()[:, None])
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [260.0, 0.0]


def test_tokens_may_stand_in_several_dims() -> None:
    x, router, gate_up, down = drawn(24)
    flat = moe.reference(x, *route(x, router, 2), gate_up, down)
    deep = x.view(2, 3, 4, 16).clone().requires_grad_()
    y = moe.reference(deep, *route(deep, router, 2), gate_up, down)
    assert torch.equal(y.view(24, 16), flat)
    y.sum().backward()
    assert deep.grad is not None
    assert deep.grad.shape == deep.shape


def test_refuses_what_the_grouped_product_does_not_take() -> None:
    x, router, gate_up, down = (t.to("meta") for t in drawn())
    with pytest.raises(KernelError, match=r'moe: .* takes bf16, fp16 and fp32, not torch.float64; set kernels.moe = "fused"'):
        moe.grouped(x, *route(x, router, 3), gate_up, down)
    odd = [torch.zeros(shape, dtype=torch.bfloat16, device="meta") for shape in ((4, 12), (3, 16, 12), (3, 12, 8))]
    with pytest.raises(KernelError, match="rows of 12 and 8 elements of torch.bfloat16 are not multiples of 16 bytes"):
        moe.experts_grouped(odd[0], torch.zeros(3, dtype=torch.int64, device="meta"), *odd[1:])


def test_refuses_a_grouped_product_that_would_read_the_counts() -> None:
    assert moe.reads_counts(torch.bfloat16, (9, 0)) is None
    assert moe.reads_counts(torch.bfloat16, (10, 3)) is None
    for dtype, capability in ((torch.bfloat16, (8, 0)), (torch.float32, (9, 0)), (torch.bfloat16, (12, 0))):
        why = moe.reads_counts(dtype, capability)
        assert why is not None
        assert f"not in {dtype} on {capability[0]}.{capability[1]}" in why


@pytest.mark.parametrize("version", ["fused", "glued"])
def test_refuses_what_its_kernels_do_not_take(version: str) -> None:
    block = getattr(moe, version)
    x, router, gate_up, down = drawn()
    with pytest.raises(KernelError, match="one of bf16, fp16, fp32, not torch.float64"):
        block(x, *route(x, router, 3), gate_up, down)
    x, router, gate_up, down = drawn(dtype=torch.bfloat16)
    with pytest.raises(KernelError, match="one of bf16, fp16, fp32, not torch.bfloat16, torch.bfloat16, torch.float32"):
        block(x, *route(x, router, 3), gate_up, down.float())
    with pytest.raises(KernelError, match=r"rows of 16 and matrices \(6, 46, 16\) do not fit \(6, 16, 24\)"):
        block(x, *route(x, router, 3), gate_up[:, 2:], down)


def test_a_checked_start_judges_biases_too() -> None:
    x, router, gate_up, down = (t.requires_grad_() for t in drawn(9, dtype=torch.float32))
    biases = [torch.randn(6, width, requires_grad=True) for width in (48, 16)]
    worst: dict[str, float] = {}
    checked = ops.checked({"moe": "fused", "router": "fused", "expert_sort": "fused"}, worst)
    routed = checked.router(x, router, routers.Router(3, "sigmoid", renormalise=True), torch.zeros(6))
    y = checked.moe(x, routed.weights_nk, routed.chosen_nk, gate_up, down, gate_up_bias_ef=biases[0], down_bias_ed=biases[1])
    assert y.shape == x.shape
    assert checked.expert_sort(routed.chosen_nk, 6)[1].tolist() == routed.counts_be.tolist()
    assert worst["moe"] <= 1
    assert worst["router"] <= 1
