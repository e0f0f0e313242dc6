"""Tensors in eight bits, with scales: what a product in FP8 takes, made in one pass over the tensor together with its transposed copy.

    scale = max|x| / M over what shares a scale, M = 448 (e4m3) or 57,344 (e5m2); a power of two if so asked, rounded up
    codes = round(clamp(x * (1 / scale), -M, M)), to nearest even; what they stand for is codes * scale

| kind | shares a scale | scales of codes [r, c] | of the transposed codes [c, r] |
|---|---|---|---|
| tensor | everything | [1] | [1], the same |
| row | a row of what is multiplied | [r, 1] | [c, 1] |
| tile | 128 neighbours along the sum (DeepSeek-V3's 1 x 128, arXiv:2412.19437) | [r, c / 128] | [c, r / 128] |
| block | 128 x 128 (its weights) | [r / 128, c / 128] | [c / 128, r / 128], the same |

Legend: r rows, c columns. Products on tensor cores sum along the last dim of both operands, so that every operand has it contiguous: the forward's is the
channels, the weight gradient's the tokens, and that is what the transposed copy is for. Rows are padded with zeros to 16 (tile: 128), for the transposed
copy's rows are the length of a sum. The largest magnitude below 2^-100 counts as 2^-100, so that no scale is 0.

What is not finite stays visible: a NaN has a code, and a NaN or an infinity makes its scale, and so the product, NaN or infinite; with a scale that is given
(delayed scaling) an infinity becomes NaN before it is clamped. Largest magnitudes are found on the bits of |x| as integers, where NaN is largest.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gigatrain.errors import KernelError
from gigatrain.kernels import launch
from gigatrain.kernels.elementwise import sigmoid
from gigatrain.kernels.launch import tl, triton

Kind = Literal["tensor", "row", "tile", "block"]
Format = Literal["e4m3", "e5m2"]
DTYPES: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST: dict[str, float] = {"e4m3": 448.0, "e5m2": 57344.0}
LEAST = 2.0**-100
BLOCK = 128
PADDED: dict[str, int] = {"tensor": 16, "row": 16, "tile": BLOCK, "block": BLOCK}

# (rows, columns, kind, format, scales are powers of two, dtype)
CASES = [
    (rows, columns, kind, form, power, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, columns, kind, form, power in (
        *((33, 48, "tensor", "e5m2", False), (5, 16, "tensor", "e4m3", True), (0, 16, "tensor", "e4m3", False)),
        *((129, 144, "row", "e4m3", True), (1, 16, "row", "e4m3", False), (0, 32, "row", "e4m3", False)),
        *((130, 128, "tile", "e4m3", False), (3, 256, "tile", "e5m2", True), (0, 128, "tile", "e4m3", True)),
        *((128, 256, "block", "e4m3", False), (256, 128, "block", "e4m3", True)),
    )
]
SIZES = [
    (8192, columns, kind, "e4m3", kind != "tensor", torch.bfloat16)
    for columns in (4096, 14336)
    for kind in ("tensor", "row", "tile", "block")
]
REFUSES = {"sm_80": "no FP8 before compute capability 8.9", "gfx942": "its FP8 is another format (fnuz, e4m3 to 240)"}
SPACE = {
    "quantise": [{"height": height, "width": width, "warps": warps} for height in (64, 128) for width in (64, 128) for warps in (4, 8)],
    "quantise.squares": [{"warps": warps} for warps in (4, 8, 16)],  # of 128 x 128, by the format
}


class Quantised(NamedTuple):
    """One operand of a product: `codes` [r, c] with the sum along c, and what they are multiplied by."""

    codes: Tensor
    scales: Tensor
    kind: str


def padded(rows: int, kind: str) -> int:
    """Rows with those that are added."""
    return -(-rows // PADDED[kind]) * PADDED[kind]


def scale_of(amax: Tensor, largest: float, power: bool) -> Tensor:
    """The fp32 scale for a largest magnitude: amax / largest, or the power of two that is not below it."""
    amax = amax.float().clamp(min=LEAST)
    scale = amax / torch.full_like(amax, largest)  # not by the number: on a GPU torch multiplies by 1 / largest, rounded
    if power:
        bits = (scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000
        scale = torch.where(scale < math.inf, bits.view(torch.float32), scale)
    return scale


def encode(x: Tensor, scale: Tensor, form: str, *, given: bool = False) -> Tensor:
    """Codes of x, whose scale broadcasts. Only a scale that is `given` can be too small, or finite where x is not."""
    value = x.float() * (1.0 / scale)
    if given:
        value = value.clamp_(-LARGEST[form], LARGEST[form]).masked_fill_(x.abs() == math.inf, math.nan)  # clamp keeps NaN
    return value.to(DTYPES[form])


def _amax(x: Tensor, *dims: int) -> Tensor:
    """The largest magnitude over dims, kept; NaN where there is one, 0 of nothing."""
    if 0 in x.shape:
        return x.new_zeros([1 if i in dims else n for i, n in enumerate(x.shape)], dtype=torch.float32)
    return x.abs().amax(dims, keepdim=True).float()


def _along(x_rc: Tensor, kind: str, form: str, power: bool) -> tuple[Tensor, Tensor]:
    """`(codes_rc, scales)` of a padded tensor, kinds that share along the columns."""
    if kind == "row":
        scale_r1 = scale_of(_amax(x_rc, 1), LARGEST[form], power)
        return encode(x_rc, scale_r1, form), scale_r1
    blocks = x_rc.unflatten(1, (-1, BLOCK))
    scale = scale_of(_amax(blocks, 2), LARGEST[form], power)
    # In memory the rows' index runs fastest, as cuBLAS reads them.
    return encode(blocks, scale, form).flatten(1), scale.squeeze(2).t().contiguous().t()


def _across(x_rc: Tensor, kind: str, form: str, power: bool) -> tuple[Tensor, Tensor]:
    """`_along` of the transposed tensor; bytes are transposed, not numbers."""
    if kind == "row":
        scale_1c = scale_of(_amax(x_rc, 0), LARGEST[form], power)
        return encode(x_rc, scale_1c, form).t().contiguous(), scale_1c.t()
    blocks = x_rc.unflatten(0, (-1, BLOCK))
    scale = scale_of(_amax(blocks, 1), LARGEST[form], power)
    return encode(blocks, scale, form).flatten(0, 1).t().contiguous(), scale.squeeze(1).t()


def reference(
    x_rc: Tensor, kind: Kind, form: Format, power: bool, along: bool = True, across: bool = True, given: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(codes_rc, scales, codes_cr, scales, amax_1)` in plain torch, bit for bit the fused kernels' (whatever is not asked for is empty).

    `given` is the scale of a `tensor` (delayed scaling); `amax_1` is that kind's largest magnitude, for the next one.
    """
    rows = x_rc.shape[0]
    if more := padded(rows, kind) - rows:
        x_rc = torch.nn.functional.pad(x_rc, (0, 0, 0, more))
    empty, none = x_rc.new_empty(0, dtype=DTYPES[form]), x_rc.new_empty(0, dtype=torch.float32)
    if kind in ("row", "tile"):
        first = _along(x_rc, kind, form, power) if along else (empty, none)
        second = _across(x_rc, kind, form, power) if across else (empty, none)
        return (*first, *second, none)
    if kind == "tensor":
        amax_1 = _amax(x_rc, 0, 1).view(1)
        scale = scale_of(amax_1, LARGEST[form], power) if given is None else given
        codes, other = encode(x_rc, scale, form, given=given is not None), scale
    else:
        blocks, amax_1 = x_rc.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)), none
        scale = scale_of(_amax(blocks, 1, 3), LARGEST[form], power)
        codes, scale = encode(blocks, scale, form).flatten(2).flatten(0, 1), scale[:, 0, :, 0]
        other = scale.t().contiguous()
    return (
        codes if along else empty,
        scale if along else none,
        codes.t().contiguous() if across else empty,
        other if across else none,
        amax_1,
    )


def widened(x: Quantised) -> Tensor:
    """What an operand stands for, in fp32."""
    codes, scales = x.codes, x.scales
    quick = codes.dtype == torch.float8_e4m3fn and codes.device.type == "cpu" and not torch.compiler.is_compiling()
    wide = _from_e4m3(codes) if quick else codes.float()
    if x.kind in ("tile", "block"):
        wide = wide.unflatten(1, (-1, BLOCK))
        scales = scales.repeat_interleave(BLOCK, 0) if x.kind == "block" else scales
        return wide.mul_(scales[..., None]).flatten(1)
    return wide.mul_(scales)


def _from_e4m3(codes: Tensor) -> Tensor:
    """As `.float()`, through half precision, whose bits hold e4m3's shifted by 7 and 2^8 too small: five times as fast as torch's own on a CPU."""
    bits = codes.view(torch.int8)
    wide = (bits.to(torch.int16).bitwise_left_shift_(7)).bitwise_and_(-0x4080).view(torch.float16).float().mul_(256.0)
    return wide.masked_fill_((bits & 0x7F) == 0x7F, math.nan)


# Fused. Floor, in bytes per element of bf16: 3 for codes alone, 4 with the transposed copy. Tensors and rows are read twice, once for the magnitude, since
# what shares a scale is wider than a program: 5 and 6. With a producer within it the producer's output is neither written nor read.


@triton.jit
def _value(X, Y, RSTD, W, row, column, live, rows, columns, x_stride, y_stride, PRODUCER: tl.constexpr):
    """Elements of the tensor to quantise, in fp32: as they lie there, or made and rounded as their producer would have (rms_norm.py, swiglu.py)."""
    x = tl.load(X + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    if PRODUCER == "swiglu":
        y = tl.load(Y + row * y_stride + column, mask=live, other=0.0).to(tl.float32)
        s, _ = sigmoid(x)
        x = (x * s * y).to(X.dtype.element_ty).to(tl.float32)
    elif PRODUCER != "plain":
        x = x * tl.load(RSTD + row, mask=row < rows, other=0.0)
        w = tl.load(W + column, mask=column < columns, other=0.0).to(tl.float32)
        if PRODUCER == "llama":
            x = x.to(X.dtype.element_ty).to(tl.float32)
        if PRODUCER == "gemma":
            w += 1.0
        x = (x * w).to(X.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(bits, LARGEST_: tl.constexpr, POWER: tl.constexpr):
    """The scale for a largest magnitude, which comes as its bits.

    A division as IEEE has it costs a tile more than all else that it does, since every thread makes those of all its rows. A power of two needs none: the
    largest numbers are 1.75 * 2^8 and 1.75 * 2^15, so that the quotient's exponent is a's less 8 or 15, and one more where a's mantissa is beyond 1.75 (the
    next number after it is still beyond a power of two once its quotient is rounded).
    """
    bits = tl.maximum(bits, 0x0D800000)  # 2^-100; integers, so that NaN stays
    amax = bits.to(tl.float32, bitcast=True)
    if POWER:
        less: tl.constexpr = 8 if LARGEST_ == 448.0 else 15  # pyright: ignore[reportAssignmentType]
        up = (bits + 0x1FFFFF) & 0x7F800000
        scale = tl.where(amax < float("inf"), (up - (less << 23)).to(tl.float32, bitcast=True), amax)
    else:
        scale = tl.math.div_rn(amax, tl.full(amax.shape, LARGEST_, tl.float32))
    return scale


@triton.jit
def _code(x, scale, LARGEST_: tl.constexpr, FORM: tl.constexpr, POWER: tl.constexpr):
    """The bits of x's codes."""
    if POWER:  # 1 / 2^k by its exponent; 1 / inf is 0, and NaN stays
        turned = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        value = x * tl.where(scale < float("inf"), turned, tl.where(scale == float("inf"), 0.0, scale))
    else:
        value = x * tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    value = tl.where(value > LARGEST_, LARGEST_, tl.where(value < -LARGEST_, -LARGEST_, value))
    value = tl.where(tl.abs(x) == float("inf"), float("nan"), value)
    if FORM == "e4m3":
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return value.to(tl.float8e5).to(tl.uint8, bitcast=True)


@triton.jit
def _largest(
    X, Y, RSTD, W, ROW, COLUMN, rows, columns, x_stride, y_stride,
    PRODUCER: tl.constexpr, WHOLE: tl.constexpr, ALONG: tl.constexpr, ACROSS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Bits of the largest magnitudes, joined by atomic maxima of integers, whose order does not matter."""
    row = (tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT))[:, None]
    column = (tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH))[None]
    live = (row < rows) & (column < columns)
    bits = _bits(_value(X, Y, RSTD, W, row, column, live, rows, columns, x_stride, y_stride, PRODUCER))
    bits = tl.where(live, bits, 0)
    if WHOLE:
        tl.atomic_max(ROW, tl.max(tl.max(bits, 1), 0), sem="relaxed")
    else:
        if ALONG:
            tl.atomic_max(ROW + row, tl.max(bits, 1, keep_dims=True), mask=row < rows, sem="relaxed")
        if ACROSS:
            tl.atomic_max(COLUMN + column, tl.max(bits, 0, keep_dims=True), mask=column < columns, sem="relaxed")


@triton.jit
def _codes(
    X, Y, RSTD, W, ROW, COLUMN, GIVEN, CODES, SCALES, TURNED, OTHER, rows, columns, height, x_stride, y_stride,
    PRODUCER: tl.constexpr, KIND: tl.constexpr, FORM: tl.constexpr, LARGEST_: tl.constexpr, POWER: tl.constexpr, HAS: tl.constexpr,
    ALONG: tl.constexpr, ACROSS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of codes, and of the transposed copy; `height` counts padded rows."""
    # Scales are powers of two; one that is given need not be.
    BINARY: tl.constexpr = POWER and not HAS  # pyright: ignore[reportAssignmentType]
    row = (tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT))[:, None]
    column = (tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH))[None]
    live, kept = (row < rows) & (column < columns), (row < height) & (column < columns)
    x = _value(X, Y, RSTD, W, row, column, live, rows, columns, x_stride, y_stride, PRODUCER)
    x = tl.where(live, x, 0.0)
    bits = _bits(x)
    if KIND == "tensor":
        one = tl.zeros([1, 1], tl.int32)
        scale = tl.load(GIVEN + one)
        if not HAS:
            scale = _scale(tl.load(ROW + one), LARGEST_, POWER)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(SCALES + one, scale)
        other = scale
    elif KIND == "row":
        scale = _scale(tl.load(ROW + row, mask=row < rows, other=0), LARGEST_, POWER)
        other = _scale(tl.load(COLUMN + column, mask=column < columns, other=0), LARGEST_, POWER)
        if tl.program_id(1) == 0:  # noqa: SIM102 (the inner condition is a constant, the outer is not)
            if ALONG:
                tl.store(SCALES + row, scale, mask=row < height)
        if tl.program_id(0) == 0:  # noqa: SIM102
            if ACROSS:
                tl.store(OTHER + column, other, mask=column < columns)
    elif KIND == "tile":
        scale = _scale(tl.max(bits, 1, keep_dims=True), LARGEST_, POWER)
        other = _scale(tl.max(bits, 0, keep_dims=True), LARGEST_, POWER)
        if ALONG:
            tl.store(SCALES + tl.program_id(1).to(tl.int64) * height + row, scale, mask=row < height)
        if ACROSS:
            tl.store(OTHER + tl.program_id(0).to(tl.int64) * columns + column, other, mask=column < columns)
    else:
        scale = _scale(tl.max(tl.max(bits, 1, keep_dims=True), 0, keep_dims=True), LARGEST_, POWER)
        other = scale
        one = tl.zeros([1, 1], tl.int32)
        if ALONG:
            tl.store(SCALES + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1) + one, scale)
        if ACROSS:
            tl.store(OTHER + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0) + one, scale)
    if ALONG:
        codes = _code(x, scale, LARGEST_, FORM, BINARY)
        tl.store(CODES + row * columns + column, codes, mask=kept)
        if ACROSS:
            if (KIND != "tensor") & (KIND != "block"):
                codes = _code(x, other, LARGEST_, FORM, BINARY)
            tl.store(TURNED + tl.trans(column) * height + tl.trans(row), tl.trans(codes), mask=tl.trans(kept))
    else:
        codes = _code(x, other, LARGEST_, FORM, BINARY)
        tl.store(TURNED + tl.trans(column) * height + tl.trans(row), tl.trans(codes), mask=tl.trans(kept))


def run(
    x: Tensor, y: Tensor | None, rstd: Tensor | None, w: Tensor | None, producer: str, kind: str, form: str, power: bool, along: bool, across: bool,
    given: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernels on [r, c] matrices; `producer` is plain, swiglu (of x and y), or the style of an RMS norm (of x, with rstd and w)."""
    x2, y2 = launch.rows(x), x if y is None else launch.rows(y)
    rows, columns = x2.shape
    height = padded(rows, kind)
    empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device=x.device)  # noqa: E731
    codes = empty(height if along else 0, columns, dtype=torch.uint8)
    turned = empty(columns if across else 0, height, dtype=torch.uint8)
    squares = kind in ("tile", "block")
    tuned = launch.configuration(x, "quantise.squares" if squares else "quantise", columns)
    h, w_ = (BLOCK, BLOCK) if squares else (tuned["height"], tuned["width"])
    grid, share = (-(-height // h), -(-columns // w_)), {"tensor": (1, 1), "row": (height, columns)}.get(kind, (0, 0))
    # Magnitudes of rows and of columns in one buffer of zeros; the padded rows' stay 0.
    bits = torch.zeros(share[0] + (share[1] if kind == "row" else 0), dtype=torch.int32, device=x.device)
    row_bits, column_bits = bits[: share[0]], bits[share[0] :] if kind == "row" else bits
    producers = (x2, y2, x if rstd is None else rstd, x if w is None else w)
    strides = (x2.stride(0), y2.stride(0) if y is not None else 0)
    if kind in ("tensor", "row") and rows:
        launch.launch(
            _largest, (-(-rows // h), grid[1]), *producers, row_bits, column_bits, rows, columns, *strides, PRODUCER=producer,
            WHOLE=kind == "tensor", ALONG=along, ACROSS=across, HEIGHT=h, WIDTH=w_, warps=tuned["warps"],
        )  # fmt: skip
    shapes = {
        "tensor": ((1,), (1,)),
        "row": ((height, 1), (columns, 1)),
        "tile": (
            (-(-columns // BLOCK), height),
            (height // BLOCK, columns),
        ),  # transposed: the rows' index runs fastest, as cuBLAS reads them
        "block": ((height // BLOCK, -(-columns // BLOCK)), (-(-columns // BLOCK), height // BLOCK)),
    }[kind]
    scales, other = (empty(*shape, dtype=torch.float32) for shape in shapes)
    launch.launch(
        _codes, grid if squares else (max(1, grid[0]), grid[1]), *producers, row_bits, column_bits, scales if given is None else given, codes,
        scales, turned, other, rows, columns, height, *strides, PRODUCER=producer, KIND=kind, FORM=form, LARGEST_=LARGEST[form], POWER=power,
        HAS=given is not None, ALONG=along, ACROSS=across, HEIGHT=h, WIDTH=w_, warps=tuned["warps"],
    )  # fmt: skip
    if kind == "tile":
        scales, other = scales.t(), other.t()
    elif kind == "tensor":
        other = scales.clone()
    amax = row_bits.view(torch.float32) if kind == "tensor" else empty(0, dtype=torch.float32)
    first, second = (made if asked else empty(0, dtype=torch.float32) for made, asked in ((scales, along), (other, across)))
    dtype = DTYPES[form]
    return (
        codes.view(-1).view(dtype).view(codes.shape if along else 0),
        first,
        turned.view(-1).view(dtype).view(turned.shape if across else 0),
        second,
        amax,
    )


def like(x: Tensor, kind: str, form: str, along: bool, across: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes of `run`'s outputs, for traces."""
    columns, rows = x.shape[-1], math.prod(x.shape[:-1])
    height, dtype = padded(rows, kind), DTYPES[form]
    fp32 = lambda *shape: x.new_empty(shape, dtype=torch.float32)  # noqa: E731
    scales, other = {
        "tensor": (fp32(1), fp32(1)),
        "row": (fp32(height, 1), fp32(columns, 1)),
        "tile": (fp32(columns // BLOCK, height).t(), fp32(height // BLOCK, columns).t()),
        "block": (fp32(height // BLOCK, columns // BLOCK), fp32(columns // BLOCK, height // BLOCK)),
    }[kind]
    return (
        x.new_empty(height, columns, dtype=dtype) if along else x.new_empty(0, dtype=dtype),
        scales if along else fp32(0),
        x.new_empty(columns, height, dtype=dtype) if across else x.new_empty(0, dtype=dtype),
        other if across else fp32(0),
        fp32(1 if kind == "tensor" else 0),
    )


_quantise = launch.operator(
    "fp8_quantise(Tensor x, str kind, str form, bool power, bool along, bool across, Tensor? given) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, kind, form, power, along, across, given: run(x, None, None, None, "plain", kind, form, power, along, across, given),
    lambda x, kind, form, power, along, across, given: like(x, kind, form, along, across),
)


def supports(x_rc: Tensor, kind: str) -> str | None:
    """Why the fused kernels cannot take this tensor; None: they can."""
    if why := launch.missing(x_rc):
        return why
    if x_rc.is_cuda and (why := _hardware(x_rc.get_device())):
        return why
    if x_rc.dtype not in launch.FLOATS:
        return f"they take bf16, fp16 and fp32, not {x_rc.dtype}"
    return _shape(x_rc, kind)


def _shape(x_rc: Tensor, kind: str) -> str | None:
    if x_rc.dim() != 2:
        return f"they take matrices, not {tuple(x_rc.shape)}"
    if x_rc.shape[1] % PADDED[kind] or (kind == "block" and x_rc.shape[0] % BLOCK):
        return f"{tuple(x_rc.shape)}: scales of kind {kind} need multiples of {PADDED[kind]}"
    return None


def _hardware(index: int) -> str | None:
    if torch.version.hip is not None:
        return "this GPU's FP8 formats are others (AMD's fnuz of gfx942 has e4m3 to 240)"
    found = torch.cuda.get_device_capability(index)
    return None if found >= (8, 9) else f"FP8 needs compute capability 8.9, this GPU has {found[0]}.{found[1]}"


def fused(
    x_rc: Tensor, kind: Kind, form: Format, power: bool, along: bool = True, across: bool = True, given: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference`, in one Triton launch, or two where a scale is shared by more than 128 x 128. Raises KernelError where `supports` says no."""
    if why := supports(x_rc, kind):
        raise KernelError(f'quantise: {why}; set kernels.quantise = "reference"')
    return _quantise(x_rc, kind, form, power, along, across, given)


def quantise(
    x_rc: Tensor, kind: Kind, form: Format, power: bool, along: bool = True, across: bool = True, given: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`fused` on a GPU, `reference` on a CPU."""
    return (fused if x_rc.is_cuda else reference)(x_rc, kind, form, power, along, across, given)


def _sample(case: Any, device: str) -> launch.Sample:
    rows, columns, kind, form, power, dtype = case
    rows = padded(rows, kind) if kind == "block" else rows
    return [torch.randn(rows, columns, dtype=dtype, device=device) * 3], lambda f, x: f(x, kind, form, power)


def _traffic(case: Any) -> launch.Traffic:
    rows, columns, kind, *_, dtype = case
    return launch.Traffic(rows * columns * (dtype.itemsize * (2 if kind in ("tensor", "row") else 1) + 2))


OPERATIONS = {
    "quantise": launch.Operation(
        {"reference": reference, "fused": fused}, CASES, SIZES, _sample, _traffic, differentiable=False, refuses=REFUSES
    ),
}
