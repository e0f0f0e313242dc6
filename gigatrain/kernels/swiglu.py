"""SwiGLU: silu(gate) * up, with silu(x) = x * sigmoid(x) (arXiv:2002.05202).

Legend: gate_ni, up_ni any shape, equal. The backward, with s = sigmoid(gate):
    dup = dy * gate * s        dgate = dy * up * (s + gate * s * (1 - s))
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import elementwise, launch
from gigatrain.kernels.elementwise import sigmoid, tile
from gigatrain.kernels.launch import tl, triton

# (rows, shape of a row, gate and up are the halves of one projection, dtype)
CASES = [
    (rows, shape, halves, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, shape, halves in (
        *((4, (64,), False), (3, (7, 33), False), (5, (384,), True), (31, (130,), True)),
        *((33, (1,), False), (1, (7,), True), (1, (1,), False), (0, (8,), False)),
    )
]
SIZES = [(8192, (channels,), halves, torch.bfloat16) for channels in (8192, 14336) for halves in (False, True)]


def reference(gate_ni: Tensor, up_ni: Tensor) -> Tensor:
    """silu(gate) * up in plain torch, in the inputs' dtype."""
    return F.silu(gate_ni) * up_ni


# Fused. Floor, in bytes per element of bf16: 6 forward (reads 2, writes 1), 10 backward (reads 3, writes 2). Saves gate and up, rounds once.
SPACE = {"swiglu.forward": elementwise.SPACE, "swiglu.backward": elementwise.SPACE}


@triton.jit
def _forward(GATE, UP, Y, gate_stride, up_stride, rows, columns, across, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row, column, live = tile(tl.program_id(0), rows, columns, across, HEIGHT, WIDTH)
    gate = tl.load(GATE + row * gate_stride + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + column, mask=live, other=0.0).to(tl.float32)
    s, _ = sigmoid(gate)
    tl.store(Y + row * columns + column, (gate * s * up).to(Y.dtype.element_ty), mask=live)


@triton.jit
def _backward(
    DY, GATE, UP, DGATE, DUP, dy_stride, gate_stride, up_stride, rows, columns, across, out_stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row, column, live = tile(tl.program_id(0), rows, columns, across, HEIGHT, WIDTH)
    dy = tl.load(DY + row * dy_stride + column, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * gate_stride + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + column, mask=live, other=0.0).to(tl.float32)
    s, slope = sigmoid(gate)
    at = row * out_stride + column
    tl.store(DUP + at, (dy * gate * s).to(DUP.dtype.element_ty), mask=live)
    tl.store(DGATE + at, (dy * up * (s + gate * slope)).to(DGATE.dtype.element_ty), mask=live)


_swiglu = launch.operator(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    lambda gate, up: elementwise.run(_forward, "swiglu.forward", (gate, up), 1)[0],
    lambda gate, up: gate.new_empty(gate.shape),
)
_swiglu_backward = launch.operator(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    lambda dy, gate, up: elementwise.run(_backward, "swiglu.backward", (dy, gate, up), 2, elementwise.width_of(gate)),
    lambda dy, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)
_swiglu_backward_halves = launch.operator(
    "swiglu_backward_halves(Tensor dy, Tensor gate, Tensor up) -> Tensor",
    lambda dy, gate, up: elementwise.run_halves(_backward, "swiglu.backward", dy, gate, up),
    lambda dy, gate, up: gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1])),
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dy: Tensor | None) -> Any:
    if dy is None:
        return None, None
    return elementwise.gradients(_swiglu_backward, _swiglu_backward_halves, dy, *ctx.saved_tensors)


_call = launch.differentiable(_swiglu, _save, _grads)


def supports(gate_ni: Tensor, up_ni: Tensor) -> str | None:
    """Why the fused kernels cannot take these tensors; None: they can."""
    return elementwise.supports("gate and up", gate_ni, up_ni)


def fused(gate_ni: Tensor, up_ni: Tensor) -> Tensor:
    """As `reference`, rounded once, in one Triton launch each way; keeps gate and up. Raises KernelError where `supports` says no."""
    if why := supports(gate_ni, up_ni):
        raise KernelError(f'swiglu: {why}; set kernels.swiglu = "reference"')
    return _call(gate_ni, up_ni)


def swiglu(gate_ni: Tensor, up_ni: Tensor) -> Tensor:
    """`fused` on a GPU, `reference` on a CPU."""
    return (fused if gate_ni.is_cuda else reference)(gate_ni, up_ni)


def sample(case: Any, device: str) -> launch.Sample:
    """Gate and up of a case, for any gated activation."""
    rows, shape, halves, dtype = case
    if halves:
        gate, up = (torch.randn(rows, *shape[:-1], 2 * shape[-1], dtype=dtype, device=device) * 3).chunk(2, -1)
    else:
        gate, up = (torch.randn(rows, *shape, dtype=dtype, device=device) * 3 for _ in range(2))
    return [gate, up], lambda f, gate, up: f(gate, up)


def traffic(case: Any) -> launch.Traffic:
    """The floor of any gated activation."""
    rows, shape, _, dtype = case
    tensor = math.prod((rows, *shape)) * dtype.itemsize
    return launch.Traffic(3 * tensor, 5 * tensor)


OPERATIONS = {"swiglu": launch.Operation({"reference": reference, "fused": fused}, CASES, SIZES, sample, traffic)}
