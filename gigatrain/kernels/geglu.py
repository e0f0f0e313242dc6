"""GeGLU: gelu(gate) * up with the tanh approximation of gelu (arXiv:2002.05202, arXiv:1606.08415).

    gelu(x) = x / 2 * (1 + tanh(u)) = x * sigmoid(2u)        u = sqrt(2 / pi) * (x + 0.044715 x ** 3)

Legend: gate_ni, up_ni any shape, equal. The backward, with s = sigmoid(2u):
    dup = dy * gate * s        dgate = dy * up * (s + gate * s * (1 - s) * 2 du/dgate)
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import elementwise, launch, swiglu
from gigatrain.kernels.elementwise import sigmoid, tile
from gigatrain.kernels.launch import tl, triton

CASES, SIZES = swiglu.CASES, swiglu.SIZES


def reference(gate_ni: Tensor, up_ni: Tensor) -> Tensor:
    """gelu_tanh(gate) * up in plain torch, in the inputs' dtype."""
    return F.gelu(gate_ni, approximate="tanh") * up_ni


# Fused. Floor, in bytes per element of bf16: 6 forward (reads 2, writes 1), 10 backward (reads 3, writes 2). Saves gate and up, rounds once.
SPACE = {"geglu.forward": elementwise.SPACE, "geglu.backward": elementwise.SPACE}


@triton.jit
def _curve(x):
    """`(s, s * (1 - s), 2 du/dx)` with s = sigmoid(2u).

    Beyond 16, where s is 0 or 1 in fp32, x is cut off, so that x ** 3 cannot make an infinity that 0 is multiplied with; NaN stays NaN.
    """
    x = tl.where(x > 16.0, 16.0, tl.where(x < -16.0, -16.0, x))
    square = x * x
    twice = 1.5957691216057308 * x * (1.0 + 0.044715 * square)  # 2 sqrt(2 / pi)
    s, rise = sigmoid(twice)
    return s, rise, 1.5957691216057308 * (1.0 + 0.134145 * square)


@triton.jit
def _forward(GATE, UP, Y, gate_stride, up_stride, rows, columns, across, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    row, column, live = tile(tl.program_id(0), rows, columns, across, HEIGHT, WIDTH)
    gate = tl.load(GATE + row * gate_stride + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + column, mask=live, other=0.0).to(tl.float32)
    s, _, _ = _curve(gate)
    tl.store(Y + row * columns + column, (gate * s * up).to(Y.dtype.element_ty), mask=live)


@triton.jit
def _backward(
    DY, GATE, UP, DGATE, DUP, dy_stride, gate_stride, up_stride, rows, columns, across, out_stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row, column, live = tile(tl.program_id(0), rows, columns, across, HEIGHT, WIDTH)
    dy = tl.load(DY + row * dy_stride + column, mask=live, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * gate_stride + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + column, mask=live, other=0.0).to(tl.float32)
    s, rise, slope = _curve(gate)
    at = row * out_stride + column
    tl.store(DUP + at, (dy * gate * s).to(DUP.dtype.element_ty), mask=live)
    tl.store(DGATE + at, (dy * up * (s + gate * rise * slope)).to(DGATE.dtype.element_ty), mask=live)


_geglu = launch.operator(
    "geglu(Tensor gate, Tensor up) -> Tensor",
    lambda gate, up: elementwise.run(_forward, "geglu.forward", (gate, up), 1)[0],
    lambda gate, up: gate.new_empty(gate.shape),
)
_geglu_backward = launch.operator(
    "geglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    lambda dy, gate, up: elementwise.run(_backward, "geglu.backward", (dy, gate, up), 2, elementwise.width_of(gate)),
    lambda dy, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)
_geglu_backward_halves = launch.operator(
    "geglu_backward_halves(Tensor dy, Tensor gate, Tensor up) -> Tensor",
    lambda dy, gate, up: elementwise.run_halves(_backward, "geglu.backward", dy, gate, up),
    lambda dy, gate, up: gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1])),
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dy: Tensor | None) -> Any:
    if dy is None:
        return None, None
    return elementwise.gradients(_geglu_backward, _geglu_backward_halves, dy, *ctx.saved_tensors)


_call = launch.differentiable(_geglu, _save, _grads)


def supports(gate_ni: Tensor, up_ni: Tensor) -> str | None:
    """Why the fused kernels cannot take these tensors; None: they can."""
    return elementwise.supports("gate and up", gate_ni, up_ni)


def fused(gate_ni: Tensor, up_ni: Tensor) -> Tensor:
    """As `reference`, rounded once, in one Triton launch each way; keeps gate and up. Raises KernelError where `supports` says no."""
    if why := supports(gate_ni, up_ni):
        raise KernelError(f'geglu: {why}; set kernels.geglu = "reference"')
    return _call(gate_ni, up_ni)


def geglu(gate_ni: Tensor, up_ni: Tensor) -> Tensor:
    """`fused` on a GPU, `reference` on a CPU."""
    return (fused if gate_ni.is_cuda else reference)(gate_ni, up_ni)


OPERATIONS = {"geglu": launch.Operation({"reference": reference, "fused": fused}, CASES, SIZES, swiglu.sample, swiglu.traffic)}
