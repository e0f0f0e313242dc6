"""Where each style of RMS norm rounds."""

import pytest
import torch

from gigatrain.kernels import rms_norm


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
    x, w, dy = torch.randn(20_000, 8).bfloat16(), torch.randn(8).bfloat16(), torch.randn(20_000, 8).bfloat16()

    def grad(dtype: torch.dtype, function: object) -> torch.Tensor:
        leaf = w.to(dtype).requires_grad_()
        function(x.to(dtype), leaf, 1e-6, "llama").backward(dy.to(dtype))  # type: ignore[operator]
        assert leaf.grad is not None
        return leaf.grad.double()

    exact = grad(torch.float64, rms_norm.reference)
    assert (grad(torch.bfloat16, rms_norm.lean) - exact).norm() <= torch.finfo(torch.bfloat16).eps * exact.norm()
