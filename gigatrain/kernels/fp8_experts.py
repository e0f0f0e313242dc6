"""The grouped products of experts in FP8, rowwise: kernels/moe.py's low-precision version.

As moe.py's `experts`, with x_md and the weights in e4m3, one scale a row, powers of two, each along its own sum; the input gradient so too. The weight
gradient stays bf16, as in torchao's `rowwise_with_gw_hp`: its sums are over an expert's tokens, whose number is no multiple of the 16 that tensor cores take.

Legend: m rows of tokens, sorted by expert, e experts, n outputs and k inputs of a product, weights w_enk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import fp8
from gigatrain.kernels.fp8 import Quantised
from gigatrain.kernels.fp8_linear import refused
from gigatrain.kernels.grouped import zero_unvisited


def _grouped(a_mk: tuple[Tensor, Tensor], b_enk: tuple[Tensor, Tensor], ends_e: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a times their expert's b, [m, n]; both are codes and scales."""
    if not a_mk[0].is_cuda:
        wide = fp8.widened(Quantised(b_enk[0].flatten(0, 1), b_enk[1].reshape(-1, 1), "row")).view(b_enk[0].shape)
        return F.grouped_mm(fp8.widened(Quantised(*a_mk, "row")), wide.transpose(1, 2), offs=ends_e).to(dtype)
    rowwise = F.ScalingType.RowWise
    return F.scaled_grouped_mm(  # type: ignore[attr-defined]
        a_mk[0], b_enk[0].transpose(1, 2), a_mk[1].squeeze(1), rowwise, b_enk[1], rowwise, offs=ends_e, output_dtype=dtype
    )


def _rows(x_mk: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales, *_ = fp8.quantise(x_mk, "row", "e4m3", True, True, False)
    return codes[: x_mk.shape[0]], scales[: x_mk.shape[0]]


def _weights(w_enk: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = _rows(w_enk.reshape(-1, w_enk.shape[2]))
    return codes.view(w_enk.shape), scales.view(w_enk.shape[:2])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_mk: Tensor, w_enk: Tensor, ends_e: Tensor) -> Tensor:
        ctx.save_for_backward(x_mk, w_enk, ends_e)
        return _grouped(_rows(x_mk), _weights(w_enk), ends_e, x_mk.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_mn: Tensor) -> Any:
        x_mk, w_enk, ends_e = ctx.saved_tensors
        dy_mn = dy_mn.contiguous()
        dx = _grouped(_rows(dy_mn), _weights(w_enk.transpose(1, 2).contiguous()), ends_e, dy_mn.dtype) if ctx.needs_input_grad[0] else None
        dw = F.grouped_mm(dy_mn.t(), x_mk, offs=ends_e) if ctx.needs_input_grad[1] else None
        if dw is not None and dw.is_cuda:
            zero_unvisited(dw, ends_e)  # which torch leaves undefined on sm_100 (pytorch 172439)
        return dx, dw, None


def supports(x_md: Tensor, down_edi: Tensor) -> str | None:
    """Why the experts cannot be multiplied so; None: they can."""
    if odd := [n for n in down_edi.shape[1:] if n % 16]:
        return f"{odd[0]} channels are not a multiple of 16"
    return refused("rowwise", x_md.device) or lacking(x_md.device)


def lacking(device: torch.device) -> str | None:
    """Why the device has no grouped products of FP8; None: it has, or emulates them."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_capability(device)
    if found[0] in (9, 10):
        return None
    return (
        f"torch's grouped FP8 products need compute capability 9.0 or 10.0, {torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}"
    )


def experts(x_md: Tensor, counts_e: Tensor, gate_up_efd: Tensor, down_edi: Tensor) -> Tensor:
    """As moe.py's `experts_reference`, in FP8; on a CPU emulated. Raises KernelError where `supports` says no."""
    if why := supports(x_md, down_edi):
        raise KernelError(f"experts fp8_rowwise: {why}; name mlp.experts in fp8.high")
    ends_e = counts_e.cumsum(0).to(torch.int32)
    gate, up = _Product.apply(x_md.contiguous(), gate_up_efd, ends_e).chunk(2, -1)  # type: ignore[union-attr]
    return _Product.apply(F.silu(gate) * up, down_edi, ends_e)  # type: ignore[return-value]
