"""Where each style of RMS norm rounds, and what went wrong in other libraries' fused ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gigatrain.errors import KernelError
from gigatrain.kernels import launch, rms_norm


def test_styles_round_where_they_say() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(64, 48).bfloat16(), torch.randn(48).bfloat16()
    n = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(rms_norm.reference(x, w, 1e-6, "llama"), w * n.bfloat16())
    assert torch.equal(rms_norm.reference(x, w, 1e-6, "olmo"), (w.float() * n).bfloat16())
    assert torch.equal(rms_norm.reference(x, w, 1e-6, "gemma"), ((1 + w.float()) * n).bfloat16())


def test_refuses_an_unknown_style() -> None:
    with pytest.raises(ValueError, match=r"'t5' is none of llama, olmo, gemma"):
        rms_norm.reference(torch.ones(2), torch.ones(2), 1e-6, "t5")  # type: ignore[arg-type]


def test_weight_gradients_do_not_degrade_with_the_number_of_rows() -> None:
    """Liger's block variant summed them in bf16 (its PR 950)."""
    torch.manual_seed(1)
    x, w, dy = torch.randn(8_000, 8).bfloat16(), torch.randn(8).bfloat16(), torch.randn(8_000, 8).bfloat16()

    def grad(dtype: torch.dtype, function: object) -> torch.Tensor:
        leaf = w.to(dtype, copy=True).requires_grad_()
        function(x.to(dtype), leaf, 1e-6, "llama").backward(dy.to(dtype))  # type: ignore[operator]
        assert leaf.grad is not None
        return leaf.grad.double()

    exact = grad(torch.float64, rms_norm.reference)
    for version in (rms_norm.lean, rms_norm.fused):
        assert (grad(torch.bfloat16, version) - exact).norm() <= torch.finfo(torch.bfloat16).eps * exact.norm()


def inputs(rows: int, channels: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x, residual = (torch.randn(rows, channels, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return x, residual, torch.randn(channels, generator=generator).to(dtype).requires_grad_()


def close(ours: Any, plain: Any, exact: Any) -> None:
    for o, p, e in zip(ours, plain, exact, strict=True):
        bound = max(2 * (p.double() - e).norm().item(), torch.finfo(p.dtype).eps / 2 * e.norm().item())
        assert (o.double() - e).norm() <= bound


def judged(function: Callable[..., Any], reference: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
    """Outputs and gradients of `function` against twice the error of `reference`."""
    results = []
    for version, dtype in ((function, None), (reference, None), (reference, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
        outputs = version(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [torch.linspace(-1, 2, o.numel()).view(o.shape).to(o.dtype) for o in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    close(*results)


def test_operators_pass_torchs_own_check() -> None:
    x, residual, w = (t.detach() for t in inputs(5, 33, torch.float32))
    torch.library.opcheck(torch.ops.gigatrain.rms_norm.default, (x.requires_grad_(), w.requires_grad_(), 1e-6, "olmo"))
    torch.library.opcheck(torch.ops.gigatrain.add_rms_norm.default, (x, residual.requires_grad_(), w, 1e-6, "gemma", 0.5))
    rstd = torch.rand(5)
    for dh, scale, weight in ((None, 1.0, True), (residual.detach(), 0.5, True), (residual.detach(), 1.0, False)):
        backward = torch.ops.gigatrain.rms_norm_backward.default
        torch.library.opcheck(backward, (x.detach(), dh, residual.detach(), w.detach(), rstd, "llama", scale, weight))


@pytest.mark.parametrize("style", rms_norm.STYLES)
def test_fused_rounds_where_the_style_says(style: rms_norm.Style) -> None:
    """More exact than transformers' llama is not bitwise transformers' llama; only the sum of squares may differ, by its order."""
    x, _, w = inputs(64, 48)
    plain, ours = rms_norm.reference(x, w, 1e-6, style), rms_norm.fused(x, w, 1e-6, style)
    assert (plain != ours).sum() <= 0.01 * plain.numel()
    torch.testing.assert_close(ours, plain, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.parametrize("rows", [1, 31, 33])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tails_of_rows(rows: int, dtype: torch.dtype) -> None:
    """Lanes beyond the last row or channel are not counted (quack 9310d47, Liger PR 1361)."""
    tensors = inputs(rows, 100, dtype)
    judged(
        lambda x, r, w: rms_norm.add_fused(x, r, w, 1e-6, "llama"), lambda x, r, w: rms_norm.add_reference(x, r, w, 1e-6, "llama"), tensors
    )


@pytest.mark.parametrize("kernel", list(rms_norm.SPACE))
def test_every_configuration_gives_the_right_result(kernel: str) -> None:
    """Triton 6691, fla 595682b8: some configurations only were wrong. Warps and pipelining mean nothing to the interpreter; a tuner checks them too."""
    tensors = inputs(35, 72)
    distinct = {(c["rows"], c.get("programs")): c for c in rms_norm.SPACE[kernel]}
    for configuration in distinct.values():
        with launch.forced(kernel, configuration):
            judged(
                lambda x, r, w: rms_norm.add_fused(x, r, w, 1e-6, "llama"),
                lambda x, r, w: rms_norm.add_reference(x, r, w, 1e-6, "llama"),
                tensors,
            )


def test_shipped_configurations_can_be_tuned_to() -> None:
    for kernel, space in rms_norm.SPACE.items():
        assert all(shipped in space for shipped in launch.table("default")["configs"][kernel].values())


def test_rows_beyond_two_billion_elements() -> None:
    """A 32-bit row * stride overflows (Liger 803, PR 804, Unsloth PR 3614). Untouched pages of the 4 GB tensor are never committed."""
    stride = (1 << 30) + 8
    far = torch.empty(2 * stride + 64, dtype=torch.bfloat16).as_strided((3, 64), (stride, 1))
    near = torch.randn(3, 64).bfloat16()
    far.copy_(near)
    w = torch.ones(64, dtype=torch.bfloat16)
    assert torch.equal(rms_norm.fused(far, w, 1e-6, "llama"), rms_norm.fused(near, w, 1e-6, "llama"))
    leaves = [x.detach().requires_grad_() for x in (far, near)]
    grads = [torch.autograd.grad(rms_norm.fused(x, w, 1e-6, "llama"), x, g)[0] for x, g in zip(leaves, (far, near), strict=True)]
    assert torch.equal(*grads)


def test_an_expanded_gradient_is_read_as_it_is() -> None:
    """loss.sum().backward() gives strides of 0 (ROCm TE PR 623)."""
    x, _, w = inputs(5, 40)
    judged(lambda x, w: rms_norm.fused(x, w, 1e-6, "llama").sum(), lambda x, w: rms_norm.reference(x, w, 1e-6, "llama").sum(), (x, w))


def test_the_gradient_of_the_sum_is_added_once_and_not_overwritten() -> None:
    """Gemma2's in-place backward corrupted the gradient shared with the residual (Liger 370, quack PR 53)."""
    x, residual, w = inputs(6, 40, torch.float32)
    h, y = rms_norm.add_fused(x, residual, w, 1e-6, "gemma", 0.5)
    dh, dy = torch.randn_like(h), torch.randn_like(y)
    before = dh.clone(), dy.clone()
    torch.autograd.backward((h, y), (dh, dy))
    assert torch.equal(dh, before[0])
    assert torch.equal(dy, before[1])
    assert x.grad is not None
    assert residual.grad is not None
    torch.testing.assert_close(x.grad, residual.grad * 0.5)


def test_only_one_of_both_outputs_may_be_used() -> None:
    for used in (0, 1):
        tensors = inputs(4, 24, torch.float32)
        ours = torch.autograd.grad(rms_norm.add_fused(*tensors, 1e-6, "llama", 0.5)[used].square().sum(), tensors[: 2 + used])
        plain = torch.autograd.grad(rms_norm.add_reference(*tensors, 1e-6, "llama", 0.5)[used].square().sum(), tensors[: 2 + used])
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b)


def test_a_graph_kept_gives_the_same_gradient_twice() -> None:
    """In-place gradients corrupt what a second backward reads (Liger 272)."""
    x, residual, w = inputs(6, 40)
    out = rms_norm.add_fused(x, residual, w, 1e-6, "llama")
    first, second = (torch.autograd.grad(out, (x, residual, w), [torch.ones_like(o) for o in out], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_recomputation_gives_the_same_gradient() -> None:
    """Saved tensors read twice break non-reentrant checkpointing (mamba PR 1020)."""
    x, _, w = inputs(6, 40)
    plain = torch.autograd.grad(rms_norm.fused(x, w, 1e-6, "llama").square().sum(), (x, w))
    again: Any = checkpoint(rms_norm.fused, x, w, 1e-6, "llama", use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(again.square().sum(), (x, w)), strict=True))


def test_a_frozen_weight_or_input_changes_nothing_else() -> None:
    x, _, w = inputs(6, 40)
    dx, dw = torch.autograd.grad(rms_norm.fused(x, w, 1e-6, "llama").square().sum(), (x, w))
    assert torch.equal(dx, torch.autograd.grad(rms_norm.fused(x, w.detach(), 1e-6, "llama").square().sum(), x)[0])
    assert torch.equal(dw, torch.autograd.grad(rms_norm.fused(x.detach(), w, 1e-6, "llama").square().sum(), w)[0])


def test_two_runs_are_bitwise_equal() -> None:
    x, _, w = inputs(333, 40)
    first, second = (torch.autograd.grad(rms_norm.fused(x, w, 1e-6, "llama").square().sum(), (x, w)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_traces_whole_under_the_compiler() -> None:
    x, residual, w = inputs(6, 40, torch.float32)

    def both(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        h, y = rms_norm.add_fused(x, residual, w, 1e-6, "llama")
        return (h * y).sum()

    plain = torch.autograd.grad(both(x, residual, w), (x, residual, w))
    traced = torch.autograd.grad(torch.compile(both, fullgraph=True, backend="aot_eager")(x, residual, w), (x, residual, w))
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("x", "w", "said"),
    [
        (
            torch.ones(2, 4, dtype=torch.float64),
            torch.ones(4, dtype=torch.float64),
            "must share one of bf16, fp16, fp32, not torch.float64",
        ),
        (torch.ones(2, 4), torch.ones(4, dtype=torch.bfloat16), "not torch.float32 and torch.bfloat16"),
        (torch.ones(2, 4), torch.ones(5), r"x \(2, 4\), its residual and weight \(5,\) do not fit"),
        (torch.ones(2, 40000), torch.ones(40000), "40000 channels are not between 1 and 32768"),
    ],
)
def test_refuses_what_it_cannot_do_and_names_the_way_out(x: Tensor, w: Tensor, said: str) -> None:
    with pytest.raises(KernelError, match=f'rms_norm: .*{said}.*; set kernels.rms_norm = "lean"'):
        rms_norm.fused(x, w, 1e-6, "llama")


def test_the_public_functions_run_on_a_cpu() -> None:
    x, residual, w = inputs(3, 8)
    assert torch.equal(rms_norm.rms_norm(x, w), rms_norm.lean(x, w, 1e-6, "llama"))
    assert torch.equal(rms_norm.add_rms_norm(x, residual, w)[1], rms_norm.add_lean(x, residual, w, 1e-6, "llama")[1])
