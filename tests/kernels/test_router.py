"""The router beyond what every operation is tested for: transformers' choices, losses of balance, ties, and what is not a number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import launch, router
from gigatrain.kernels.router import Router

transformers = pytest.importorskip("transformers")


def theirs(family: str, x: Tensor, weight: Tensor, bias: Tensor | None, **numbers: Any) -> tuple[Tensor, Tensor]:
    """`(weights, chosen)` of transformers' router."""
    from transformers.models.deepseek_v3 import DeepseekV3Config, modeling_deepseek_v3
    from transformers.models.gpt_oss import GptOssConfig, modeling_gpt_oss
    from transformers.models.mixtral import MixtralConfig, modeling_mixtral
    from transformers.models.olmoe import OlmoeConfig, modeling_olmoe
    from transformers.models.qwen3_moe import Qwen3MoeConfig, modeling_qwen3_moe

    kinds = {
        "mixtral": (MixtralConfig, modeling_mixtral.MixtralTopKRouter),
        "qwen3_moe": (Qwen3MoeConfig, modeling_qwen3_moe.Qwen3MoeTopKRouter),
        "olmoe": (OlmoeConfig, modeling_olmoe.OlmoeTopKRouter),
        "deepseek_v3": (DeepseekV3Config, modeling_deepseek_v3.DeepseekV3TopkRouter),
        "gpt_oss": (GptOssConfig, modeling_gpt_oss.GptOssTopKRouter),
    }
    config, made = kinds[family]
    module = made(config(hidden_size=x.shape[-1], num_local_experts=weight.shape[0], num_experts=weight.shape[0], **numbers)).to(x.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
        if bias is not None:
            (module.bias if family == "gpt_oss" else module.e_score_correction_bias).copy_(bias)
        return module(x)[1:]


FAMILIES = {
    "mixtral": (Router(2, renormalise=True), {"num_experts_per_tok": 2}),
    "qwen3_moe": (Router(3, renormalise=True), {"num_experts_per_tok": 3, "norm_topk_prob": True}),
    "olmoe": (Router(3), {"num_experts_per_tok": 3, "norm_topk_prob": False}),
    "deepseek_v3": (
        Router(4, "sigmoid", True, 1e-20, 4, 2, 2.5, True),
        {"num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    ),
    "gpt_oss": (Router(4, "softmax_after"), {"num_experts_per_tok": 4}),
}


@pytest.mark.parametrize("version", ["reference", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chooses_and_weighs_as_transformers_does(family: str, version: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(29, 24), torch.randn(16, 24)
    bias = torch.randn(16) * 0.2 if family in ("deepseek_v3", "gpt_oss") else None
    numbers, config = FAMILIES[family]
    weights, chosen = theirs(family, x, weight, bias, **config)
    biases = {"bias_e": bias} if family == "deepseek_v3" else {"logits_bias_e": bias}
    found = getattr(router, version)(x, weight, numbers, **biases)
    order, expected = found.chosen_nk.argsort(-1), chosen.argsort(-1)  # deepseek's are in no order
    assert torch.equal(found.chosen_nk.gather(1, order), chosen.gather(1, expected))
    torch.testing.assert_close(found.weights_nk.gather(1, order), weights.gather(1, expected), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.counts_be, torch.bincount(chosen.flatten(), minlength=16))


def test_the_loss_of_balance_is_transformers_over_all_layers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    torch.manual_seed(1)
    x, weights = torch.randn(3, 31, 8), torch.randn(2, 6, 8)
    logits = tuple(F.linear(x, w).flatten(0, 1) for w in weights)
    routed = [router.reference(x, w, Router(2, renormalise=True, losses=True)) for w in weights]
    counts, shares = torch.stack([r.counts_be for r in routed]), torch.stack([r.shares_be for r in routed if r.shares_be is not None])
    assert counts.shape == (2, 3, 6)
    expected = load_balancing_loss_func(logits, 6, 2)  # type: ignore
    torch.testing.assert_close(router.balance_loss(counts, shares, 93), expected)
    squares = torch.stack([r.squares_b for r in routed if r.squares_b is not None])
    torch.testing.assert_close(router.z_loss(squares, 186), torch.cat(logits).logsumexp(-1).square().mean())


def test_the_loss_of_balance_of_each_sequence() -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(3, 7, 8), torch.randn(6, 8)
    routed = router.reference(x, weight, Router(2, "sigmoid", losses=True))
    assert routed.shares_be is not None
    scores = F.linear(x, weight).sigmoid()
    shares = (scores / scores.sum(-1, keepdim=True)).mean(1)
    visited = torch.zeros(3, 6).scatter_add_(1, routed.chosen_nk.flatten(1), torch.ones(3, 14))
    expected = (visited * 6 / (2 * 7) * shares).sum(1).mean()
    torch.testing.assert_close(router.sequence_balance_loss(routed.counts_be, routed.shares_be, 7, 2), expected)


def test_no_tokens_have_no_loss() -> None:
    routed = router.reference(torch.zeros(0, 8), torch.randn(6, 8), Router(2, losses=True))
    assert routed.shares_be is not None
    assert routed.squares_b is not None
    assert router.balance_loss(routed.counts_be[None], routed.shares_be[None], 0) == 0
    assert router.z_loss(routed.squares_b, 0) == 0


def test_the_bias_moves_towards_balance_by_its_rate() -> None:
    bias = torch.tensor([0.1, 0.0, -0.1, 0.0])
    moved = router.bias_update(torch.tensor([9, 1, 4, 2]), bias, 0.001)  # 4 each would be even
    torch.testing.assert_close(moved - bias, torch.tensor([-0.001, 0.001, 0.0, 0.001]), atol=1e-7, rtol=0)


@pytest.mark.parametrize("version", ["reference", "fused"])
def test_equal_logits_are_chosen_by_number_and_saturated_ones_by_size(version: str) -> None:
    choose = getattr(router, version)
    x, weight = torch.ones(3, 1), torch.zeros(9, 1)
    assert choose(x, weight, Router(4)).chosen_nk.tolist() == [[0, 1, 2, 3]] * 3
    large = torch.tensor([20.0, 22.0, 21.0, 23.0])[:, None]  # all of whose sigmoids are 1 in fp32
    assert choose(x, large, Router(2, "sigmoid")).chosen_nk.tolist() == [[3, 1]] * 3
    groups = Router(3, "sigmoid", groups=3, groups_kept=1)
    assert choose(x, weight, groups).chosen_nk.tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("numbers", [Router(3), Router(4, "sigmoid", groups=3, groups_kept=2), Router(2, "softmax_after")], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_still_names_different_experts(numbers: Router, bad: float) -> None:
    """Their numbers are addresses. The weights are not numbers, so that the step is refused."""
    x = torch.ones(2, 1)
    weight = torch.tensor([0.5, bad, 0.25, bad, bad, 1.0])[:, None]
    found = router.fused(torch.stack((x, 0 * x + bad)), weight, numbers)
    assert found.chosen_nk.min() >= 0
    assert found.chosen_nk.max() < 6
    assert all(len(set(chosen)) == numbers.visits for chosen in found.chosen_nk.flatten(0, 1).tolist())
    assert not bad > 0 or not found.weights_nk.isfinite().all() or numbers.scores == "sigmoid"


@pytest.mark.parametrize("kernel", list(router.SPACE))
def test_every_configuration_gives_the_right_result(kernel: str) -> None:
    """Warps mean nothing to the interpreter; a tuner checks them too."""
    torch.manual_seed(3)
    numbers = Router(3, "sigmoid", True, 1e-20, 3, 2, 2.0, losses=True)
    x, weight = torch.randn(2, 9, 8), torch.randn(12, 8)
    space = {tuple(v for k, v in c.items() if k != "warps"): c for c in router.SPACE[kernel]}

    def results(version: Callable[..., Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = [t.clone().to(dtype).requires_grad_() for t in (x, weight)]
        found = version(*leaves, numbers)
        sum((t * (i + 1)).square().sum() for i, t in enumerate(found) if t.requires_grad).backward()  # type: ignore[union-attr]
        return [*(t.detach().double() for t in found), *(leaf.grad.double() for leaf in leaves if leaf.grad is not None)]

    exact, plain = results(router.reference, torch.float64), results(router.reference)
    for configuration in space.values():
        with launch.forced(kernel, configuration):
            ours = results(router.fused)
        for e, p, o in zip(exact, plain, ours, strict=True):
            assert (o - e).norm() <= 2 * (p - e).norm() + torch.finfo(torch.float32).eps * e.norm()
    assert all(shipped in router.SPACE[kernel] for shipped in launch.table("default")["configs"][kernel].values())


def test_operators_pass_torchs_own_check() -> None:
    logits, bias = torch.randn(2, 5, 6, requires_grad=True), torch.randn(6)
    torch.library.opcheck(torch.ops.gigatrain.router.default, (logits, bias, 2, 1, True, 1e-20, 3, 2, 2.0, True))
    torch.library.opcheck(torch.ops.gigatrain.router.default, (logits, None, 2, 0, False, 0.0, 1, 1, 1.0, False))
    chosen = torch.tensor([[0, 3]] * 5).expand(2, 5, 2).contiguous()
    given = torch.randn(2, 5, 2), None, torch.randn(2), logits.detach(), chosen, 0, True, 0.0, 1.0
    torch.library.opcheck(torch.ops.gigatrain.router_backward.default, given)


def test_twice_is_bitwise_the_same_and_a_second_backward_is_too() -> None:
    torch.manual_seed(4)
    x, weight = torch.randn(2, 33, 8, dtype=torch.bfloat16), torch.randn(12, 8, dtype=torch.bfloat16)
    grads = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        found = router.fused(*leaves, Router(3, losses=True))  # type: ignore
        total = found.weights_nk.square().sum() + found.shares_be.square().sum() + found.squares_b.sum()  # type: ignore[union-attr]
        for _ in range(2):
            grads.append(torch.autograd.grad(total, leaves, retain_graph=True))
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("wanted", ["weights_nk", "shares_be", "squares_b"])
def test_each_gradient_alone(wanted: str) -> None:
    """The others are None, and an expanded one has no strides."""
    torch.manual_seed(5)
    x, weight = torch.randn(9, 8), torch.randn(6, 8)
    numbers = Router(2, "sigmoid", True, losses=True)
    found = []
    for version in (router.reference, router.fused):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        (getattr(version(*leaves, numbers), wanted) * 1.0).sum().backward()  # type: ignore
        found.append([leaf.grad for leaf in leaves])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_wide_products_of_bf16_are_exact_and_their_gradients_rounded_once() -> None:
    torch.manual_seed(6)
    x, weight = torch.randn(40, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    results = []
    for dtype, product in ((torch.float64, F.linear), (torch.bfloat16, router._Wide.apply)):
        leaves = [t.clone().to(dtype).requires_grad_() for t in (x, weight)]
        y = product(*leaves)
        y.backward(torch.linspace(-3, 1, y.numel()).view(y.shape).to(y.dtype))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for (exact, found), eps in zip(zip(*results, strict=True), (2**-22, 2**-8, 2**-8), strict=True):
        assert (found.double() - exact).norm() <= eps / 2 * exact.norm()


def test_only_counts_where_no_loss_wants_more() -> None:
    for version in (router.reference, router.fused):
        found = version(torch.randn(5, 8), torch.randn(6, 8), Router(2))
        assert found.shares_be is None
        assert found.squares_b is None


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (Router(2, groups=5), "router: 1 of 5 groups of 12 experts; groups are equal, and 1 to all of them kept"),
        (Router(2, groups=3, groups_kept=4), "router: 4 of 3 groups of 12 experts"),
        (Router(5, groups=3), "router: 5 visits of a token, who reaches 4 of 12 experts; take fewer, or keep more groups"),
        (Router(13), "router: 13 visits of a token, who reaches 12 of 12 experts"),
    ],
)
def test_refuses_a_choice_that_no_token_can_make(numbers: Router, said: str) -> None:
    for version in (router.reference, router.fused):
        with pytest.raises(KernelError, match=said):
            version(torch.randn(3, 8), torch.randn(12, 8), numbers)


def test_refuses_what_its_kernels_do_not_take() -> None:
    with pytest.raises(KernelError, match='must be bf16, fp16 or fp32, not torch.float64 .*; set kernels.router = "reference"'):
        router.fused(torch.zeros(3, 8, dtype=torch.float64), torch.zeros(6, 8, dtype=torch.float64), Router(2))
    with pytest.raises(KernelError, match="and 32 visits, not 64 and 33"):
        router.fused(torch.zeros(3, 8), torch.zeros(40, 8), Router(33))
