"""ReLU squared, the activation of Primer and of modded-nanogpt (arXiv:2109.08668).

    y = max(x, 0) ** 2        dx = 2 * dy * max(x, 0)

Legend: x_ni any shape.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import elementwise, launch
from gigatrain.kernels.elementwise import tile
from gigatrain.kernels.launch import tl, triton

# (rows, shape of a row, dtype)
CASES = [
    (rows, shape, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, shape in ((4, (64,)), (3, (7, 33)), (31, (130,)), (33, (1,)), (1, (7,)), (1, (1,)), (0, (8,)))
]
SIZES = [(8192, (channels,), torch.bfloat16) for channels in (8192, 16384)]


def reference(x_ni: Tensor) -> Tensor:
    """relu(x) ** 2 in plain torch."""
    return F.relu(x_ni).square()


# Fused. Floor, in bytes per element of bf16: 4 forward (reads 1, writes 1), 6 backward (reads 2, writes 1). Saves x only.
SPACE = {"relu2.forward": elementwise.SPACE, "relu2.backward": elementwise.SPACE}


@triton.jit
def _forward(X, Y, x_stride, rows, columns, across, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row, column, live = tile(tl.program_id(0), rows, columns, across, HEIGHT, WIDTH)
    x = tl.load(X + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    x = tl.where(x < 0.0, 0.0, x)  # not tl.maximum, which makes 0 of NaN
    tl.store(Y + row * columns + column, (x * x).to(Y.dtype.element_ty), mask=live)


@triton.jit
def _backward(DY, X, DX, dy_stride, x_stride, rows, columns, across, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row, column, live = tile(tl.program_id(0), rows, columns, across, HEIGHT, WIDTH)
    dy = tl.load(DY + row * dy_stride + column, mask=live, other=0.0).to(tl.float32)
    x = tl.load(X + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    x = tl.where(x < 0.0, 0.0, x)
    tl.store(DX + row * columns + column, (2.0 * x * dy).to(DX.dtype.element_ty), mask=live)


_relu2 = launch.operator(
    "relu2(Tensor x) -> Tensor",
    lambda x: elementwise.run(_forward, "relu2.forward", (x,), 1)[0],
    lambda x: x.new_empty(x.shape),
)
_relu2_backward = launch.operator(
    "relu2_backward(Tensor dy, Tensor x) -> Tensor",
    lambda dy, x: elementwise.run(_backward, "relu2.backward", (dy, x), 1)[0],
    lambda dy, x: x.new_empty(x.shape),
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dy: Tensor | None) -> Any:
    return None if dy is None else _relu2_backward(dy, *ctx.saved_tensors)


_call = launch.differentiable(_relu2, _save, _grads)


def supports(x_ni: Tensor) -> str | None:
    """Why the fused kernels cannot take this tensor; None: they can."""
    return elementwise.supports("x", x_ni)


def fused(x_ni: Tensor) -> Tensor:
    """As `reference` in one Triton launch each way; keeps x. Raises KernelError where `supports` says no."""
    if why := supports(x_ni):
        raise KernelError(f'relu2: {why}; set kernels.relu2 = "reference"')
    return _call(x_ni)


def relu2(x_ni: Tensor) -> Tensor:
    """`fused` on a GPU, `reference` on a CPU."""
    return (fused if x_ni.is_cuda else reference)(x_ni)


def _sample(case: Any, device: str) -> launch.Sample:
    rows, shape, dtype = case
    return [torch.randn(rows, *shape, dtype=dtype, device=device) * 3], lambda f, x: f(x)


def _traffic(case: Any) -> launch.Traffic:
    rows, shape, dtype = case
    tensor = math.prod((rows, *shape)) * dtype.itemsize
    return launch.Traffic(2 * tensor, 3 * tensor)


OPERATIONS = {"relu2": launch.Operation({"reference": reference, "fused": fused}, CASES, SIZES, _sample, _traffic)}
