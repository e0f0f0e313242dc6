"""Norms and SwiGLU that quantise what they make: the product behind them reads codes, and the bf16 tensor is neither written nor read.

    h = residual + scale * x        y = norm(h)       rms_norm.py        (codes, transposed codes) = quantise(y)        fp8.py
                                    y = silu(gate) * up   swiglu.py

An RMS norm's quantiser reads h again after a first pass that leaves one rstd a row: tiles of 128 x 128 make both copies, and no program that has all of a
row in registers could make the transposed one. y is rounded to its own dtype before it is quantised, so that codes are bit for bit those of the norm and the
quantiser one after the other.

What goes from here to the product is a `Carried`: to autograd a tensor of y's shape and dtype, with codes and no elements. Its gradient is an ordinary
tensor, and the backward is the norm's or SwiGLU's own. Whoever else would read it gets an error and not a rounded tensor in silence.
"""

from typing import Any

import torch
from torch import Tensor

from gigatrain.errors import KernelError
from gigatrain.kernels import fp8, launch, rms_norm, swiglu
from gigatrain.kernels.fp8 import REFUSES
from gigatrain.kernels.fp8_linear import Form, kind_of
from gigatrain.kernels.launch import tl, triton
from gigatrain.kernels.rms_norm import Style

# (rows, channels, style or swiglu, added, kind, dtype)
CASES = [
    (rows, channels, style, add, kind, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, channels, style, add, kind in (
        *((33, 48, "llama", True, "row"), (130, 128, "gemma", False, "tile"), (5, 144, "olmo", True, "tensor")),
        *((33, 48, "swiglu", False, "row"), (130, 256, "swiglu", False, "tile"), (5, 144, "swiglu", False, "tensor")),
    )
]
SIZES = [
    (8192, channels, style, add, kind, torch.bfloat16)
    for channels, style, add in ((4096, "llama", True), (14336, "swiglu", False))
    for kind in ("row", "tile")
]


def reference(x: Tensor, other: Tensor, style: str, kind: fp8.Kind, scale: float = 1.0, w: Tensor | None = None) -> tuple[Tensor, ...]:
    """`(h or nothing, codes, scales, transposed codes, scales)`: the operation, then the plain quantiser. `other` is the residual or up.

    The operation is the fused one where it runs, since its roundings are part of the codes.
    """
    fused_runs = launch.missing(x) is None and x.dtype in launch.FLOATS
    h = x.new_empty(0)
    if style == "swiglu":
        y = (swiglu.fused if fused_runs else swiglu.reference)(x, other)
    elif other.numel():
        h, y = (rms_norm.add_fused if fused_runs else rms_norm.add_reference)(x, other, w, 1e-5, style, scale)  # type: ignore[arg-type]
    else:
        y = (rms_norm.fused if fused_runs else rms_norm.reference)(x, w, 1e-5, style)  # type: ignore[arg-type]
    return h, *fp8.reference(y.flatten(0, -2), kind, "e4m3", kind != "tensor")[:4]


# Fused. Floor, in bytes per element of bf16: with both copies, of an add and norm 10 (of 14 apart), of SwiGLU 6 (of 10).


@triton.jit
def _squares(
    X, RESIDUAL, H, RSTD, rows, columns, x_stride, residual_stride, eps, scale, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds, and leaves each row's rstd."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None]
    live = (row < rows) & (column < columns)
    x = tl.load(X + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(RESIDUAL + row * residual_stride + column, mask=live, other=0.0).to(tl.float32)
        h = (residual + scale * x).to(H.dtype.element_ty)
        tl.store(H + row * columns + column, h, mask=live)
        x = h.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / columns + eps)
    tl.store(RSTD + row, rstd, mask=row < rows)


def _run_norm(
    x: Tensor, residual: Tensor | None, w: Tensor, eps: float, style: str, scale: float, kind: str, power: bool, across: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x2, r2 = launch.rows(x), None if residual is None else launch.rows(residual)
    rows, columns = x2.shape
    h = torch.empty(x.shape if r2 is not None else (0,), dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    tuned = launch.configuration(x, "rms_norm.forward", columns)
    launch.launch(
        _squares, (-(-rows // tuned["rows"]),), x2, x2 if r2 is None else r2, h, rstd, rows, columns, x2.stride(0),
        0 if r2 is None else r2.stride(0), eps, scale, ADD=r2 is not None, ROWS=tuned["rows"], BLOCK=launch.block(columns), warps=tuned["warps"],
    )  # fmt: skip
    source = x if r2 is None else h
    return h, rstd, *fp8.run(source, None, rstd.view(-1), w.contiguous(), style, kind, "e4m3", power, True, across, None)[:4]


def _like_norm(
    x: Tensor, residual: Tensor | None, w: Tensor, eps: float, style: str, scale: float, kind: str, power: bool, across: bool
) -> Any:
    h = x.new_empty(x.shape if residual is not None else (0,))
    return h, x.new_empty(x.shape[:-1], dtype=torch.float32), *fp8.like(x, kind, "e4m3", True, across)[:4]


_norm = launch.operator(
    "fp8_norm(Tensor x, Tensor? residual, Tensor w, float eps, str style, float scale, str kind, bool power, bool across) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_norm,
    _like_norm,
)
_swiglu = launch.operator(
    "fp8_swiglu(Tensor gate, Tensor up, str kind, bool power, bool across) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda gate, up, kind, power, across: fp8.run(gate, up, None, None, "swiglu", kind, "e4m3", power, True, across, None)[:4],
    lambda gate, up, kind, power, across: fp8.like(gate, kind, "e4m3", True, across)[:4],
)


def fused(x: Tensor, other: Tensor, style: str, kind: fp8.Kind, scale: float = 1.0, w: Tensor | None = None) -> tuple[Tensor, ...]:
    """As `reference`, in one launch less and without y; no gradient (`Producers` has it)."""
    if style == "swiglu":
        return x.new_empty(0), *_swiglu(x, other, kind, kind != "tensor", True)
    assert w is not None
    h, _, *parts = _norm(x, other if other.numel() else None, w, 1e-5, style, scale, kind, kind != "tensor", True)
    return h, *parts


class Carried(Tensor):
    """A tensor that exists as codes alone: of a shape and dtype, and differentiable."""

    parts: tuple[Tensor, ...]

    @staticmethod
    def __new__(cls, shape: torch.Size, like: Tensor, parts: tuple[Tensor, ...]) -> "Carried":
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        made.parts = parts
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Carried({tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Carried(args[0].shape, args[0], args[0].parts)
        raise KernelError(
            f'{func} would read a tensor that was written as FP8 codes alone; set kernels.quantise = "reference", and report it'
        )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, w: Tensor, eps: float, style: str, scale: float, kind: str, power: bool, across: bool
    ) -> Any:
        h, rstd, *parts = _norm(x, residual, w, eps, style, scale, kind, power, across)
        ctx.save_for_backward(x if residual is None else h, w, rstd)
        ctx.style, ctx.scale, ctx.added = style, scale, residual is not None
        ctx.set_materialize_grads(False)
        empty = parts[1].new_empty(0)
        y = Carried(x.shape, x, (parts[0], parts[1], empty, parts[2], parts[3], empty))
        return (h, y) if residual is not None else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        dh, dy = grads if ctx.added else (None, grads[0])
        rest = (None,) * 6
        if dy is None:
            return None if dh is None else dh * ctx.scale, dh, None, *rest
        h, w, rstd = ctx.saved_tensors
        total, scaled, dw = torch.ops.gigatrain.rms_norm_backward(dy, dh, h, w, rstd, ctx.style, ctx.scale, ctx.needs_input_grad[2])
        dw = dw if ctx.needs_input_grad[2] else None
        return total if ctx.scale == 1.0 else scaled, total if ctx.added else None, dw, *rest


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str, power: bool, across: bool) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.set_materialize_grads(False)
        codes, scales, turned, other = _swiglu(gate, up, kind, power, across)
        empty = scales.new_empty(0)
        return Carried(gate.shape, gate, (codes, scales, empty, turned, other, empty))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 5
        return *torch.ops.gigatrain.swiglu_backward(dy, *ctx.saved_tensors), None, None, None


class Producers:
    """`rms_norm`, `add_rms_norm` and `swiglu` with their usual signatures, whose results are `Carried`, for products of one form."""

    def __init__(self, form: Form) -> None:
        assert form.weight_gradient == "low", "a weight gradient in bf16 reads the input"
        assert form.keep == "codes", "the input would be read again"
        self.kind, self.power = kind_of(form.scaling, "input"), form.power

    def rms_norm(self, x_nd: Tensor, w_d: Tensor, eps: float = 1e-6, style: Style = "llama") -> Tensor:
        self._check(x_nd, rms_norm.supports(x_nd, w_d))
        return _Norm.apply(x_nd, None, w_d, eps, style, 1.0, self.kind, self.power, torch.is_grad_enabled())  # type: ignore[return-value]

    def add_rms_norm(
        self, x_nd: Tensor, residual_nd: Tensor, w_d: Tensor, eps: float = 1e-6, style: Style = "llama", scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        self._check(x_nd, rms_norm.supports(x_nd, w_d, residual_nd))
        return _Norm.apply(x_nd, residual_nd, w_d, eps, style, scale, self.kind, self.power, torch.is_grad_enabled())  # type: ignore[return-value]

    def swiglu(self, gate_ni: Tensor, up_ni: Tensor) -> Tensor:
        self._check(gate_ni, swiglu.supports(gate_ni, up_ni))
        return _SwiGLU.apply(gate_ni, up_ni, self.kind, self.power, torch.is_grad_enabled())  # type: ignore[return-value]

    def _check(self, x: Tensor, why: str | None) -> None:
        if why := why or fp8.supports(x.flatten(0, -2), self.kind):
            raise KernelError(f'quantise: {why}; set kernels.quantise = "reference"')


def _sample(case: Any, device: str) -> launch.Sample:
    rows, channels, style, add, kind, dtype = case
    x, w = (torch.randn(*shape, dtype=dtype, device=device) for shape in ((rows, channels), (channels,)))
    other = torch.randn_like(x) if add or style == "swiglu" else x.new_empty(0)
    return [x, other], lambda f, x, other: f(x, other, style, kind, 0.5 if add else 1.0, w)


def _traffic(case: Any) -> launch.Traffic:
    rows, channels, style, add, kind, dtype = case
    again = 2 if kind in ("tensor", "row") else 1
    reads = 2 * again if style == "swiglu" else (2 + add) + again
    return launch.Traffic(rows * channels * (dtype.itemsize * (reads + add) + 2))


OPERATIONS = {
    "fused_quantise": launch.Operation(
        {"reference": reference, "fused": fused}, CASES, SIZES, _sample, _traffic, differentiable=False, refuses=REFUSES
    )
}
