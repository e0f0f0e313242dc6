"""What the kernels of element-wise operations share: tensors of one shape, cut into tiles of whole 16-byte accesses without a copy.

Contiguous tensors are one row of all their elements: few programs with large tiles. If one of them is a part of a wider tensor (gate and up as the halves
of one projection, row stride 2i), all are taken as rows with their own stride, and a tile is several rows of a width that divides the row.
"""

from typing import Any

import torch
from torch import Tensor

from gigatrain.kernels import launch
from gigatrain.kernels.launch import tl, triton

NARROWEST = 128  # columns of a tile: 256 bytes of bf16, whole sectors of memory
# What a tuner tries: at least 8 elements, 16 bytes of bf16, per thread, and at most 64.
SPACE = [
    {"elements": elements, "warps": warps}
    for elements in (1024, 2048, 4096, 8192, 16384)
    for warps in (4, 8, 16)
    if 8 <= elements // (32 * warps) <= 64
]


@triton.jit
def tile(index, rows, columns, across, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [HEIGHT, 1] and columns [1, WIDTH] of tile `index`, in int64, and which of its elements exist; `across` tiles span a row."""
    at = tl.cast(index, tl.int32)  # a division in int64 is some 100 instructions per thread
    row = (at // across).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)[:, None]
    column = (at % across).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def sigmoid(x):
    """`(s, s * (1 - s))` with s = sigmoid(x), both to a few units in the last place for every x: 1 - s is never formed."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e, 1.0) * r, e * r * r


def supports(names: str, *tensors: Tensor) -> str | None:
    """Why no element-wise kernel can take these tensors, called `names`; None: one can."""
    first = tensors[0]
    if why := launch.missing(first):
        return why
    if first.dtype not in launch.FLOATS or any((t.dtype, t.shape, t.device) != (first.dtype, first.shape, first.device) for t in tensors):
        found = " and ".join(f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in tensors)
        return f"{names} must share a shape, a device and one of bf16, fp16, fp32, not {found}"
    return None


def tiling(elements: int, *tensors: Tensor, rows_kept: bool = False) -> tuple[list[Tensor], int, int, int, int]:
    """`(tensors as [rows, columns], tiles across, tiles in all, height, width)` for tiles of `elements`, a power of two; `rows_kept`: also where all
    tensors are contiguous, since an output is not."""
    if not rows_kept and all(t.is_contiguous() for t in tensors):
        flat = [t.reshape(1, -1) for t in tensors]
        return flat, (across := -(-flat[0].shape[1] // elements)), across, 1, elements
    sheets = [launch.rows(t) for t in tensors]
    rows, columns = sheets[0].shape
    even = columns & -columns  # the largest power of two that divides a row: 256 of 11,008, 2,048 of 14,336
    width = min(elements, even if even >= NARROWEST else launch.block(columns))
    height = elements // width
    across = -(-columns // width)
    return sheets, across, across * -(-rows // height), height, width


def halves(a: Tensor, b: Tensor) -> bool:
    """Whether a and b lie side by side as the two halves of one tensor's last dim: one product made both (kernels/linear.py's `several`)."""
    width = a.shape[-1] if a.ndim else 0
    alike = a.ndim > 1 and (a.shape, a.stride(), a.stride()[-2:]) == (b.shape, b.stride(), (2 * width, 1))
    return alike and b.storage_offset() == a.storage_offset() + width and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def width_of(x: Tensor) -> int:
    """What configurations of element-wise kernels are found by: the channels, for a call's other dimensions vary from step to step."""
    return x.shape[-1] if x.ndim else 1


def run(kernel: Any, name: str, inputs: tuple[Tensor, ...], outputs: int, *more: Any, into: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
    """Launch `kernel(inputs, outputs, strides of the inputs, rows, columns, across, *more, HEIGHT, WIDTH)`, one program per tile; returns the outputs.

    `into` are the outputs where they are not new contiguous tensors of the inputs' shape.
    """
    first = inputs[0]
    tuned = launch.configuration(first, name, width_of(first))
    sheets, across, tiles, height, width = tiling(tuned["elements"], *inputs, rows_kept=bool(into))
    made = into or tuple(torch.empty(first.shape, dtype=first.dtype, device=first.device) for _ in range(outputs))
    launch.launch(
        kernel, (tiles,), *sheets, *made, *(sheet.stride(0) for sheet in sheets), *sheets[0].shape, across, *more,
        HEIGHT=height, WIDTH=width, warps=tuned["warps"],
    )  # fmt: skip
    return made


def run_halves(kernel: Any, name: str, dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The gradients of gate and up as the halves of one tensor, as they themselves are: what made both needs no copy to take it up."""
    width = gate.shape[-1]
    joint = torch.empty((*gate.shape[:-1], 2 * width), dtype=gate.dtype, device=gate.device)
    run(kernel, name, (dy, gate, up), 2, 2 * width, into=(joint[..., :width], joint[..., width:]))
    return joint


def gradients(separate: Any, joint: Any, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of a gated activation, by the one of its two backward operators that leaves them in the layout of gate and up."""
    if torch.compiler.is_compiling() or not halves(gate, up):
        return separate(dy, gate, up)
    first, second = joint(dy, gate, up).chunk(2, -1)
    return first, second
