"""A layer's product in eight or four bits, with all three of its matrix products: kernels/linear.py's low-precision versions.

    forward           y_no  = x_nd  . w_od      sum over d
    input gradient    dx_nd = dy_no . w_do      sum over o
    weight gradient   dw_od = dy_on . x_dn      sum over n

Legend: n tokens, d input channels, o output channels; the last index is summed. Each operand is quantised along its own sum (kernels/fp8.py, kernels/mx.py):
so x, w and dy are quantised twice, the second time transposed. Sums are fp32 (`fast` lets the forward's stay in the tensor cores' fewer bits), results bf16.

| scaling | x | w | dy | who |
|---|---|---|---|---|
| rowwise | e4m3, one scale a row | the same | the same | torchao's `rowwise` recipe; `high` weight gradient: its `rowwise_with_gw_hp` |
| tensorwise | e4m3, one scale | the same | e5m2 | torchao's `tensorwise`; with e5m2 gradients as arXiv:2209.05433 |
| blockwise | e4m3, 1 x 128 | 128 x 128 | 1 x 128 | DeepSeek-V3 (arXiv:2412.19437, 3.3.2) |
| mxfp8 | e4m3, 1 x 32 | the same | the same | arXiv:2506.08027 |
| nvfp4 | e2m1, 1 x 16 | the same | the same, stochastically rounded | arXiv:2509.25149, without its Hadamard rotation and 16 x 16 weights |

Kept for the backward: the transposed codes of x, half of bf16's bytes, and the weight, which is quantised again; or x itself where it is kept or made again
anyway (`keep`).
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import fp8, mx
from gigatrain.kernels.fp8 import Quantised

Scaling = Literal["rowwise", "blockwise", "tensorwise", "mxfp8", "nvfp4"]
Role = Literal["input", "weight", "gradient"]
# What each dim of a matrix must be a multiple of. Blockwise on CUDA: torch 2.11 and 2.13 lay out the scales of 128 x 128 blocks alike only where a sum is
# a multiple of 4 blocks.
MULTIPLES: dict[str, int] = {"rowwise": 16, "tensorwise": 16, "blockwise": 512, "mxfp8": 32, "nvfp4": 32}
EMULATED: dict[str, int] = {**MULTIPLES, "blockwise": 128}
VERSIONS: dict[str, str] = {
    "rowwise": "fp8_rowwise", "blockwise": "fp8_blockwise", "tensorwise": "fp8_tensorwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How a product is computed. `power`: scales are powers of two. `emulate`: operands are quantised, and multiplied in fp32; always so on a CPU."""

    scaling: Scaling
    gradient: fp8.Format = "e4m3"
    power: bool = True
    weight_gradient: Literal["low", "high"] = "low"
    fast: bool = False
    stochastic: bool = False
    emulate: bool = False
    quantise: Literal["reference", "fused"] | None = None  # None: by the device
    keep: Literal["codes", "input"] = "codes"


def form_of(scaling: Scaling, **changes: Any) -> Form:
    """A scaling with its usual rest."""
    usual: dict[str, Any] = {"power": scaling != "tensorwise", "gradient": "e5m2" if scaling == "tensorwise" else "e4m3"}
    return Form(scaling, **{**usual, "stochastic": scaling == "nvfp4", **changes})


def refused(scaling: Scaling, device: torch.device) -> str | None:
    """Why tensor cores of `device` do not multiply in this form; None: they do, or it is a CPU, which emulates."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "AMD's FP8 of gfx942 is another format (fnuz, e4m3 to 240)"
    found = torch.cuda.get_device_capability(device)
    name, has = torch.cuda.get_device_name(device), f"{found[0]}.{found[1]}"
    if scaling in ("mxfp8", "nvfp4"):
        return None if found[0] == 10 else f"{scaling} needs tensor cores with block scales (compute capability 10.0), {name} has {has}"
    if not hasattr(F, "scaled_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.scaled_mm"
    if scaling == "blockwise":
        if tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) < (12, 9):
            return f"cuBLAS multiplies 1 x 128 by 128 x 128 scales from CUDA 12.9 on, and torch was built with {torch.version.cuda}"
        return None if found[0] == 9 else f"cuBLAS multiplies 1 x 128 by 128 x 128 scales on compute capability 9.0 only, {name} has {has}"
    return None if found >= (8, 9) else f"FP8 needs compute capability 8.9, {name} has {has}"


def kind_of(scaling: Scaling, role: Role) -> fp8.Kind:
    """Which elements share a scale."""
    if scaling == "blockwise":
        return "block" if role == "weight" else "tile"
    return {"rowwise": "row", "tensorwise": "tensor"}[scaling]  # type: ignore[return-value]


def padded(tokens: int, scaling: Scaling) -> int:
    """Tokens with the rows of zeros that the weight gradient's sum needs."""
    return -(-tokens // mx.PADDED) * mx.PADDED if scaling in mx.BLOCKS else fp8.padded(tokens, kind_of(scaling, "input"))


@dataclass(frozen=True)
class Operand:
    """What a product takes: codes [r, k] and scales of fp8.py, or of mx.py, there with the scale of all of nvfp4."""

    codes: Tensor
    scales: Tensor
    all: Tensor


def operands(
    x_rc: Tensor, form: Form, role: Role, *, along: bool = True, across: bool = True, given: Tensor | None = None
) -> tuple[Operand, Operand, Tensor]:
    """x for a sum over c, x transposed for a sum over r (empty if not asked for), and the largest magnitude of a tensorwise one."""

    def nothing() -> Tensor:  # a tensor each time: torch's compiler takes no tensor twice
        return x_rc.new_empty(0, dtype=torch.float32)

    if form.scaling in mx.BLOCKS:
        first = _micro(x_rc, form, role) if along else Operand(nothing(), nothing(), nothing())
        rows = -x_rc.shape[0] % mx.PADDED
        second = _micro(F.pad(x_rc, (0, 0, 0, rows)).t(), form, role) if across else Operand(nothing(), nothing(), nothing())
        return first, second, nothing()
    version = {"reference": fp8.reference, "fused": fp8.fused, None: fp8.quantise}[form.quantise]
    kind = kind_of(form.scaling, role)
    number = form.gradient if role == "gradient" else "e4m3"
    codes, scales, turned, other, amax_1 = version(x_rc, kind, number, form.power, along, across, given)  # type: ignore[arg-type]
    return Operand(codes, scales, nothing()), Operand(turned, other, nothing()), amax_1


def _micro(x_rk: Tensor, form: Form, role: Role) -> Operand:
    if form.scaling == "mxfp8":
        codes, scales = mx.mxfp8(x_rk, form=form.gradient if role == "gradient" else "e4m3")
        return Operand(codes, scales, scales.new_empty(0, dtype=torch.float32))
    uniform = mx.drawn(x_rk) if form.stochastic and role == "gradient" else None
    return Operand(*mx.nvfp4(x_rk, uniform))


def widened(x: Operand, form: Form, kind: str) -> Tensor:
    """What an operand stands for, in fp32."""
    if form.scaling in mx.BLOCKS:
        return mx.widened(x.codes, x.scales, x.all if form.scaling == "nvfp4" else None)
    return fp8.widened(Quantised(x.codes, x.scales, kind))


def product(a_mk: Operand, b_nk: Operand, form: Form, roles: tuple[Role, Role], dtype: torch.dtype) -> Tensor:
    """a . b over k, [m, n]: in fp32 of what the operands stand for on a CPU and where the form says emulate, else by the tensor cores."""
    kinds = tuple("" if form.scaling in mx.BLOCKS else kind_of(form.scaling, role) for role in roles)
    if form.emulate or not a_mk.codes.is_cuda:
        return (widened(a_mk, form, kinds[0]) @ widened(b_nk, form, kinds[1]).t()).to(dtype)
    return multiplied(a_mk, b_nk, form, roles, dtype)


def multiplied(a_mk: Operand, b_nk: Operand, form: Form, roles: tuple[Role, Role], dtype: torch.dtype) -> Tensor:
    """`product` by torch's `F.scaled_mm`, which takes the scales of b [n] or [n / 128, k / 128] transposed, but those of 1 x 128 as they are."""
    b_kn = b_nk.codes.t()
    if form.scaling in mx.BLOCKS:
        four = form.scaling == "nvfp4"
        recipe = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise] if four else F.ScalingType.BlockWise1x32
        swizzle = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE] if four else F.SwizzleType.SWIZZLE_32_4_4
        a, b = (a_mk.codes.view(torch.float4_e2m1fn_x2), b_nk.codes.view(torch.float4_e2m1fn_x2).t()) if four else (a_mk.codes, b_kn)
        sa, sb = ([mx.swizzled(x.scales), x.all] if four else mx.swizzled(x.scales) for x in (a_mk, b_nk))
        return F.scaled_mm(a, b, sa, recipe, sb, recipe, swizzle, swizzle, output_dtype=dtype)
    names = {"tensor": "TensorWise", "row": "RowWise", "tile": "BlockWise1x128", "block": "BlockWise128x128"}
    kinds = tuple(kind_of(form.scaling, role) for role in roles)
    recipes = [getattr(F.ScalingType, names[kind]) for kind in kinds]
    # Of rows both are made anew by a view, since torch asks for the strides of their dim of 1 too.
    sa = a_mk.scales.reshape(-1)[:, None] if kinds[0] == "row" else a_mk.scales
    sb = b_nk.scales.reshape(-1)[None] if kinds[1] == "row" else b_nk.scales.t() if kinds[1] == "block" else b_nk.scales
    fast = form.fast and roles == ("input", "weight")
    return F.scaled_mm(a_mk.codes, b_kn, sa, recipes[0], sb, recipes[1], output_dtype=dtype, use_fast_accum=fast)


class _Product(torch.autograd.Function):
    """`(x_nd, weight_od, form, watch, *parts of both operands of x) -> y_no`."""

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, weight_od: Tensor, form: Form, watch: "Watch | None", *parts: Tensor) -> Tensor:
        low, codes = form.weight_gradient == "low", form.keep == "codes"
        shape = x_nd.shape
        tokens = shape[:-1].numel()
        weight, _, amax_1 = operands(weight_od, form, "weight", across=False, given=None if watch is None else watch.given("weight"))
        if watch is not None:
            watch.saw("weight", amax_1)
        kept = parts[3:] if low and codes else (x_nd,)
        ctx.save_for_backward(weight_od, *kept)
        ctx.shape, ctx.form, ctx.watch = shape, form, watch
        return product(Operand(*parts[:3]), weight, form, ("input", "weight"), x_nd.dtype)[:tokens].view(*shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        form: Form = ctx.form
        low, codes = form.weight_gradient == "low", form.keep == "codes"
        weight_od, *kept = ctx.saved_tensors
        dy_no, tokens = dy.reshape(-1, dy.shape[-1]), ctx.shape[:-1].numel()
        watch: Watch | None = ctx.watch
        wants_x, wants_w = ctx.needs_input_grad[:2]
        given = {role: None if watch is None else watch.given(role) for role in ("input", "weight", "gradient")}
        low_dy, dy_t, amax_1 = operands(dy_no, form, "gradient", along=wants_x, across=wants_w and low, given=given["gradient"])
        if watch is not None:
            watch.saw("gradient", amax_1)
        dx = dw = None
        if wants_x:
            _, weight_t, _ = operands(weight_od, form, "weight", along=False, given=given["weight"])
            dx = product(low_dy, weight_t, form, ("gradient", "weight"), dy_no.dtype)[:tokens].view(ctx.shape)
        if wants_w and not low:
            dw = dy_no.t() @ kept[0].reshape(-1, ctx.shape[-1])
        elif wants_w:
            x_t = (
                Operand(*kept)
                if codes
                else operands(kept[0].reshape(-1, ctx.shape[-1]), form, "input", along=False, given=given["input"])[1]
            )
            # Both operands are tokens' and their blocks 1 x 128: "input" twice, though of gradients the first.
            dw = product(dy_t, x_t, form, ("gradient", "input"), weight_od.dtype)
        return dx, dw, None, None, *([None] * 6)


class Product:
    """`linear.reference`'s signature, in a form. Layers that read the same input (queries, keys and values; gate and up) share its codes."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self._latest: tuple[Any, int, tuple[Tensor, ...]] | None = None

    def __call__(self, x_nd: Tensor, weight_od: Tensor, bias_o: Tensor | None = None, *, watch: "Watch | None" = None) -> Tensor:
        """y_no in x's dtype; `watch` has the scales of delayed scaling. Raises KernelError for a weight or a device that the form does not take."""
        if why := self.supports(x_nd, weight_od):
            version = VERSIONS[self.form.scaling]
            raise KernelError(f"{version}: {why}; name the matrix in fp8.high, or choose another fp8.scaling")
        if x_nd.numel() == 0:
            return F.linear(x_nd, weight_od, bias_o)
        trains = torch.is_grad_enabled() and (x_nd.requires_grad or weight_od.requires_grad)
        if watch is not None and not trains:
            watch = replace(watch, records=False)
        parts = getattr(x_nd, "parts", None)  # of fp8_fused.py's Carried: quantised where it was made
        y: Any = _Product.apply(x_nd, weight_od, self.form, watch, *(parts or self._parts(x_nd, trains, watch)))
        return y if bias_o is None else y + bias_o

    def _parts(self, x_nd: Tensor, trains: bool, watch: "Watch | None") -> tuple[Tensor, ...]:
        form = self.form
        across = trains and form.weight_gradient == "low" and form.keep == "codes"
        traced = torch.compiler.is_compiling() or x_nd.is_inference()  # which finds equal work itself; such tensors have no version
        if not traced and watch is None and self._latest is not None:
            owner, version, parts = self._latest
            if owner() is x_nd and version == x_nd._version and (not across or parts[3].numel()):
                return parts
        with torch.no_grad():
            flat = x_nd.detach().reshape(-1, x_nd.shape[-1])
            along, turned, amax_1 = operands(flat, form, "input", across=across, given=None if watch is None else watch.given("input"))
        if watch is not None:
            watch.saw("input", amax_1)
        parts = (along.codes, along.scales, along.all, turned.codes, turned.scales, turned.all)
        if not traced and watch is None:
            self._latest = weakref.ref(x_nd, self._forget), x_nd._version, parts
        return parts

    def _forget(self, gone: Any) -> None:
        if self._latest is not None and self._latest[0] is gone:
            self._latest = None

    def supports(self, x_nd: Tensor, weight_od: Tensor) -> str | None:
        """Why this product cannot be computed so; None: it can."""
        form = self.form
        emulated = form.emulate or not x_nd.is_cuda
        multiple = (EMULATED if emulated else MULTIPLES)[form.scaling]
        if odd := [n for n in weight_od.shape if n % multiple]:
            return f"a weight of {tuple(weight_od.shape)}: {odd[0]} is not a multiple of {multiple}"
        if x_nd.dtype not in (torch.bfloat16, torch.float32) or weight_od.dtype != x_nd.dtype:
            return f"it takes bf16 or fp32, alike, not {x_nd.dtype} and {weight_od.dtype}"
        return None if emulated else refused(form.scaling, x_nd.device)


_ROLES = {"input": 0, "weight": 1, "gradient": 2}


@dataclass(frozen=True)
class Watch:
    """Delayed scaling of one layer; one that does not record (validation) only gives scales."""

    of: "Delayed"
    layer: int
    records: bool = True

    def given(self, role: str) -> Tensor | None:
        """The scale for this step; None: the current tensor's own."""
        at = _ROLES[role]
        return None if self.of.fresh else self.of.scales[self.layer, at : at + 1]

    def saw(self, role: str, amax_1: Tensor) -> None:
        """Add a magnitude of this step: a maximum, so that seeing it twice (recomputation) changes nothing."""
        if self.records:
            at = _ROLES[role]
            now = self.of.now[self.layer, at : at + 1]
            torch.maximum(now, amax_1, out=now)


class Delayed:
    """Scales of a step from the largest magnitudes of the last `history` steps (arXiv:2209.05433): one pass over a tensor, whose own may then saturate.

    `past` [history, layers, 3] is all its state, for a checkpoint; the first step has none, and scales each tensor by its own. What is not finite is not
    remembered: such a step is refused, and the next one begins from the same scales.
    """

    def __init__(self, form: Form, layers: int, history: int, device: torch.device | str = "cpu") -> None:
        self.form, self.fresh = form, True
        self.past = torch.zeros(history, layers, 3, device=device)
        self.now = torch.zeros(layers, 3, device=device)
        self.scales = torch.ones(layers, 3, device=device)

    def to(self, device: torch.device) -> None:
        """Place it, before the first step."""
        self.past, self.now, self.scales = (tensor.to(device) for tensor in (self.past, self.now, self.scales))

    @torch.no_grad()
    def advance(self, largest: Callable[[Tensor], None] | None = None) -> None:
        """End a step; `largest` makes a tensor the largest over all ranks, in place."""
        if largest is not None:
            largest(self.now)
        seen = torch.where(torch.isfinite(self.now), self.now, self.past[0])
        self.past.copy_(torch.cat((seen[None], self.past[:-1])))
        self.now.zero_()
        self._scale()
        self.fresh = False

    def restored(self) -> None:
        """After `past` was filled from a checkpoint."""
        self.fresh = not bool(self.past.any())
        self._scale()

    def _scale(self) -> None:
        amax = self.past.amax(0)
        for at, number in enumerate(("e4m3", "e4m3", self.form.gradient)):
            scale = fp8.scale_of(amax[:, at], fp8.LARGEST[number], self.form.power)
            self.scales[:, at] = torch.where(amax[:, at] == 0, 1.0, scale)  # a layer that nothing has reached yet


NARROW: dict[str, Callable[..., Tensor]] = {VERSIONS[scaling]: Product(form_of(scaling)) for scaling in VERSIONS}  # type: ignore[arg-type]
