"""torch's attention kernels, each called by name: cuDNN, FlashAttention 2 to 4, its form for documents end to end, FlexAttention.

`F.scaled_dot_product_attention` chooses anew at every call, and falls back to plain torch without a word; here what was chosen runs, or refuses. What each can
take is `LIMITS` and `supports`; which combinations are known to be wrong, planning/attention.py. All take q_bthd, k_btkd, v_btke and a mask as attention.py's
`reference` does; the kernels' own layout is [b, h, t, d] of any strides, so that nothing is copied.

None has run on a GPU yet: tests hold the calls to the schemas and shapes of torch's meta kernels, and the arithmetic around them to the reference.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gigatrain.errors import KernelError
from gigatrain.kernels.attention_mask import Mask, firsts, sequences, tiles


@dataclass(frozen=True)
class Limits:
    """What a kernel takes; planning/attention.py has the same numbers, without torch."""

    widest: int  # channels of a head
    multiple: int  # of which they are one
    values: bool = False  # of another width than the keys
    single: bool = False  # fp32 too
    documents: bool = False
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    least: int = 1  # channels of a head


LIMITS = {
    "cudnn": Limits(128, 8),
    "flash": Limits(256, 8),
    "fa3": Limits(256, 8, documents=True, window=True),
    "fa4": Limits(128, 8, documents=True, window=True),
    "varlen": Limits(256, 8, documents=True, window=True),
    "flex": Limits(256, 1, values=True, single=True, documents=True, window=True, softcap=True, sinks=True, least=16),
}
# What torch's activate_flash_attention_impl is asked for, the module that must be there, and what installs it.
_IMPLEMENTATIONS = {
    "fa3": ("FA3", "flash_attn_interface", "build flash-attention's hopper folder"),
    "fa4": ("FA4", "flash_attn.cute.interface", "pip install --pre flash-attn-4"),
}
_active: str | None = None  # once in a process: the backward must meet the kernels of its forward


def supports(
    version: str, q_bthd: Tensor, k_btkd: Tensor, v_btke: Tensor, mask: Mask, *, softcap: float | None = None, sinks_h: Tensor | None = None
) -> str | None:
    """Why a kernel cannot take these tensors; None: it can."""
    return _missing(version, q_bthd) or _beyond(version, q_bthd, k_btkd, v_btke, mask, softcap, sinks_h)


def _missing(version: str, q: Tensor) -> str | None:
    if not q.is_cuda:
        return f"{version} needs a GPU, not {q.device.type}"
    if torch.version.hip and version != "flex":
        return f"{version} is NVIDIA's, and this torch is built for AMD"
    major = _capability(q.get_device())
    if version == "fa3" and major != 9:
        return f"fa3 is for compute capability 9, and this device has {major}"
    if version == "fa4" and major not in (9, 10):
        return f"fa4 is for compute capability 9 and 10, and this device has {major}"
    if _active is not None and version in ("flash", "fa3", "fa4") and version != _active:
        return f"{_active} has taken the place of {version} in this process"
    return None


@functools.cache
def _capability(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def _beyond(version: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, softcap: float | None, sinks: Tensor | None) -> str | None:
    limits, d, e = LIMITS[version], q.shape[-1], v.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float16) and not (limits.single and q.dtype == torch.float32):
        return f"{version} takes bf16 and fp16{' and fp32' if limits.single else ''}, not {q.dtype}"
    if d > limits.widest or e > limits.widest or d % limits.multiple or e % limits.multiple:
        return f"{version} takes heads of up to {limits.widest} channels, a multiple of {limits.multiple}, not {d} and {e}"
    if min(d, e) < limits.least:
        return f"{version} takes heads of at least {limits.least} channels, not {d} and {e}"
    if d != e and not limits.values:
        return f"{version} takes values as wide as keys, not {e} and {d}"
    if mask.documents_bt is not None and not limits.documents:
        return f"{version} has no documents"
    if mask.window is not None and not limits.window:
        return f"{version} has no windows"
    if softcap is not None and not limits.softcap:
        return f"{version} has no soft-cap"
    if sinks is not None and not limits.sinks:
        return f"{version} has no sinks"
    return None


def _checked(version: str, *given: Any) -> None:
    if why := _missing(version, given[0]) or _beyond(version, *given):
        raise KernelError(f'attention: {why}; set kernels.attention = "fused"')


def _swapped(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def cudnn(
    q_bthd: Tensor, k_btkd: Tensor, v_btke: Tensor, mask: Mask, *, scale: float, softcap: float | None = None, sinks_h: Tensor | None = None
) -> Tensor:
    """cuDNN's, of plain causality. Raises KernelError where `supports` says no."""
    _checked("cudnn", q_bthd, k_btkd, v_btke, mask, softcap, sinks_h)
    return _cudnn(q_bthd, k_btkd, v_btke, scale)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    log_sums = torch.is_grad_enabled()  # what the backward reads
    out, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*_swapped(q, k, v), None, log_sums, 0.0, True, False, scale=scale)
    return out.transpose(1, 2)


def flash(
    q_bthd: Tensor, k_btkd: Tensor, v_btke: Tensor, mask: Mask, *, scale: float, softcap: float | None = None, sinks_h: Tensor | None = None
) -> Tensor:
    """FlashAttention 2, of plain causality. Raises KernelError where `supports` says no."""
    _checked("flash", q_bthd, k_btkd, v_btke, mask, softcap, sinks_h)
    return _flash(q_bthd, k_btkd, v_btke, scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*_swapped(q, k, v), 0.0, True, scale=scale)
    return out.transpose(1, 2)


def activate(version: str) -> None:
    """Put FlashAttention 3 or 4 in the place of 2, for this process. Raises KernelError where it is not installed, or another one is there."""
    global _active  # noqa: PLW0603
    if _active == version:
        return
    name, module, install = _IMPLEMENTATIONS[version]
    start = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if start is None:
        raise KernelError(
            f'attention: torch {torch.__version__} activates no {name}; install torch>=2.11, or set kernels.attention = "fused"'
        )
    if _active is not None:
        raise KernelError(f"attention: {_active} is active in this process, and its backward would meet {version}; start another")
    try:
        importlib.import_module(module)
    except ImportError as failure:
        raise KernelError(f'attention: {version} needs {module} ({failure}): {install}, or set kernels.attention = "fused"') from failure
    start(name)
    _active = version


def _third_or_fourth(version: str) -> Callable[..., Tensor]:
    def call(
        q_bthd: Tensor,
        k_btkd: Tensor,
        v_btke: Tensor,
        mask: Mask,
        *,
        scale: float,
        softcap: float | None = None,
        sinks_h: Tensor | None = None,
    ) -> Tensor:
        _checked(version, q_bthd, k_btkd, v_btke, mask, softcap, sinks_h)
        if _active != version:
            activate(version)
        return _flash(q_bthd, k_btkd, v_btke, scale) if mask.plain else _end_to_end(_varlen(), q_bthd, k_btkd, v_btke, mask, scale)

    call.__name__ = version
    call.__doc__ = (
        f"{_IMPLEMENTATIONS[version][0]} by torch's own hook, documents and windows included. Raises KernelError where `supports` says no."
    )
    return call


fa3, fa4 = (_third_or_fourth(version) for version in ("fa3", "fa4"))


def varlen(
    q_bthd: Tensor, k_btkd: Tensor, v_btke: Tensor, mask: Mask, *, scale: float, softcap: float | None = None, sinks_h: Tensor | None = None
) -> Tensor:
    """FlashAttention over documents laid end to end, with windows. Raises KernelError where `supports` says no; a microbatch of more documents than
    attention_mask.py's `sequences` has room for gets a NaN, which refuses the step."""
    _checked("varlen", q_bthd, k_btkd, v_btke, mask, softcap, sinks_h)
    return _end_to_end(_varlen(), q_bthd, k_btkd, v_btke, mask, scale)


@functools.cache
def _varlen() -> Callable[..., Any]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as failure:
        raise KernelError(f'attention: torch {torch.__version__} has no varlen_attn; set kernels.attention = "fused"') from failure
    known = inspect.signature(varlen_attn).parameters
    if "window_size" not in known:
        raise KernelError(f'attention: varlen_attn of torch {torch.__version__} has no window_size; set kernels.attention = "fused"')
    return functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in known else varlen_attn


class _Refusing(torch.autograd.Function):
    """Adds 0 or NaN to one element: what came out of too many documents must not pass for a result."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, fault: Tensor) -> Tensor:
        out.data.view(-1)[:1].add_(fault.to(out.dtype))  # beside autograd: the backward reads this tensor, and may read the NaN
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def _end_to_end(kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    b, t = q.shape[:2]
    fault = None
    if mask.documents_bt is not None:
        starts, fault = mask.sequences or sequences(mask.documents_bt)
    else:
        starts = torch.arange(0, (b + 1) * t, t, dtype=torch.int32, device=q.device)
    window = (-1 if mask.window is None else mask.window - 1, 0)
    out = kernel(*(x.flatten(0, 1) for x in (q, k, v)), starts, starts, t, t, scale=scale, window_size=window)
    if fault is not None:
        out = _Refusing.apply(out, fault)
        assert isinstance(out, Tensor)
    return out.unflatten(0, (b, t))


def flex(
    q_bthd: Tensor, k_btkd: Tensor, v_btke: Tensor, mask: Mask, *, scale: float, softcap: float | None = None, sinks_h: Tensor | None = None
) -> Tensor:
    """FlexAttention, compiled at its first call. Raises KernelError where `supports` says no."""
    _checked("flex", q_bthd, k_btkd, v_btke, mask, softcap, sinks_h)
    return _flex(_compiled(), q_bthd, k_btkd, v_btke, mask, scale, softcap, sinks_h)


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=8)
def _causal(tokens: int, device: torch.device) -> Any:
    return tiles(firsts(None, None, tokens, device))


@functools.cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """One function per cap, so that the compiler knows it again."""

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _flex(
    kernel: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest

    blocks = mask.tiles
    if blocks is None:
        t = q.shape[1]
        blocks = _causal(t, q.device) if mask.plain else tiles(firsts(mask.documents_bt, mask.window, t, q.device))
    options: dict[str, Any] = {} if sinks is None else {"return_aux": AuxRequest(lse=True)}
    found = kernel(
        *_swapped(q, k, v),
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=blocks,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        **options,
    )
    if sinks is None:
        return found.transpose(1, 2)
    out, kept = found
    # The sink takes e^sink of e^lse + e^sink; what is left is the keys'.
    return (out * torch.sigmoid(kept.lse - sinks.to(kept.lse.dtype)[:, None])[..., None].to(out.dtype)).transpose(1, 2)
