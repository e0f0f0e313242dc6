"""The product of a layer's activations and its weight: y_no = x_nd . w_od + b_o.

Legend: n tokens, in one dim or several, d input channels, o output channels. cuBLAS is at the limit of the hardware here, so that the only other versions
are those that compute something else (a narrower precision) or leave something out of the way (a weight's gradient that is summed where it is made).

Two things spare passes over memory around the product, whichever version computes it:

    several   layers that read the same x, their weights end to end in memory: one product, so that x is read once, and of its gradient nothing is added up
    summed    dW is added to its fp32 sum by the product itself: S <- S + dy^T x, 8 B per element of W where a bf16 dW and an addition are 12
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigatrain.kernels import fp8_linear, launch

# (tokens, inputs, outputs, bias, dtype)
CASES = [
    (tokens, inputs, outputs, bias, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for tokens, inputs, outputs, bias in ((5, 16, 24, False), (33, 24, 16, True), (1, 8, 3, True), (0, 16, 16, False))
]
SIZES = [(8192, 4096, outputs, False, torch.bfloat16) for outputs in (4096, 14336)]


def reference(x_nd: Tensor, weight_od: Tensor, bias_o: Tensor | None = None) -> Tensor:
    """y_no in x's dtype, by torch."""
    return F.linear(x_nd, weight_od, bias_o)


# ---- Gradients summed in the product ----

_WIDE_PRODUCTS = ("cuda",) if torch.version.cuda else ()  # where a product of 16-bit matrices is added to an fp32 one by the library


@dataclass
class Sum:
    """Where a weight's gradient is summed over a step's microbatches, by the product that makes it; autograd then has none for that weight.

    room: gives it when a product is made, [o, d], in fp32 or the gradient's own dtype. begun: whether this step has written it; whoever begins a step sets
    it to False, and the first product then replaces what was there. done: called after every product, when the work is on the device's way.
    """

    room: Callable[[], Tensor]
    begun: bool = False
    done: Callable[[], None] | None = None

    @torch.no_grad()
    def add(self, dy_no: Tensor, x_nd: Tensor) -> None:
        """Add dy^T x, rounded once where the sum is fp32: in the product's own epilogue, or, without one of that kind (CPUs), by an fp32 product."""
        dy, x, into = dy_no.reshape(-1, dy_no.shape[-1]).t(), x_nd.reshape(-1, x_nd.shape[-1]), self.room()
        options: dict[str, Any] = {}
        if into.dtype != x.dtype:
            if x.device.type in _WIDE_PRODUCTS and into.dtype == torch.float32:
                options = {"out_dtype": torch.float32}
            else:
                dy, x = dy.to(into.dtype), x.to(into.dtype)
        if self.begun:
            torch.addmm(into, dy, x, out=into, **options)
        else:
            torch.mm(dy, x, out=into, **options)
        self.begun = True
        if self.done is not None:
            self.done()


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, weight_od: Tensor, bias_o: Tensor | None, into: Sum) -> Tensor:
        ctx.save_for_backward(x_nd, weight_od)
        ctx.into = into
        return F.linear(x_nd, weight_od, bias_o)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_no: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        dx = dy_no @ weight if wants_x else None
        if wants_weight:
            ctx.into.add(dy_no, x)
        return dx, None, dy_no.flatten(0, -2).sum(0) if wants_bias else None, None


def summed(x_nd: Tensor, weight_od: Tensor, bias_o: Tensor | None = None, *, into: Sum) -> Tensor:
    """As `reference`; the weight's gradient goes into `into` and not to autograd."""
    return _Summed.apply(x_nd, weight_od, bias_o, into)  # type: ignore[return-value]


# ---- One product for several layers ----


@dataclass(frozen=True)
class Joined:
    """Weights of several layers as one matrix.

    whole_od: their storage, end to end; it has no gradient of its own. product: computes with it. apart: outputs that get storage of their own, so that
    they do not keep the others alive for the backward (4 B per element; values, which attention keeps, where queries and keys are only passed through).
    """

    whole_od: Tensor
    product: Callable[..., Tensor]
    apart: tuple[int, ...] = ()


class _Join(torch.autograd.Function):
    """`whole`, whose gradient is that of its parts: each gets its rows of one tensor, without a copy."""

    @staticmethod
    def forward(ctx: Any, whole_od: Tensor, *parts: Tensor) -> Tensor:
        ctx.rows = [part.shape[0] for part in parts]
        ctx.set_materialize_grads(False)
        return whole_od.detach()

    @staticmethod
    def backward(ctx: Any, grad_od: Tensor | None) -> Any:  # type: ignore[override]
        return None, *([None] * len(ctx.rows) if grad_od is None else grad_od.split(ctx.rows))


class _Split(torch.autograd.Function):
    """Parts of y along its channels; gradients that lie side by side in one buffer are the gradient of y as they are."""

    @staticmethod
    def forward(ctx: Any, y_no: Tensor, widths: Sequence[int], apart: Sequence[int]) -> Any:
        return tuple(part.contiguous() if i in apart else part for i, part in enumerate(y_no.split(list(widths), -1)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return beside(grads), None, None


def beside(parts: Sequence[Tensor]) -> Tensor:
    """The tensors one beside the other along the last dim: a view where they lie so in memory, else a copy."""
    first, width = parts[0], sum(part.shape[-1] for part in parts)
    at = first.storage_offset()
    for part in parts:
        within = part.stride() == first.stride() and part.stride(-1) == 1 and part.ndim > 1 and part.stride(-2) == width
        if not within or part.storage_offset() != at or part.untyped_storage()._cdata != first.untyped_storage()._cdata:
            return torch.cat(list(parts), -1)
        at += part.shape[-1]
    return first.as_strided((*first.shape[:-1], width), first.stride())


class Linear(nn.Linear):
    """A layer's matrix and the product that the plan chose for it; what stays in high precision whatever the plan says (head, router) is none of these."""

    joined: Joined | None = None  # of the first of several layers with the same input

    def __init__(self, inputs: int, outputs: int, *, bias: bool, product: Callable[..., Tensor]) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.product = product

    def forward(self, x_nd: Tensor) -> Tensor:
        return self.product(x_nd, self.weight, self.bias)


def several(x_nd: Tensor, *layers: nn.Module) -> Sequence[Tensor]:
    """What each layer makes of the same x: by one product where the first one's `joined` says that their weights are one matrix."""
    joined: Joined | None = getattr(layers[0], "joined", None)
    if joined is None:
        return [layer(x_nd) for layer in layers]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.cat(biases)  # type: ignore[arg-type]
    y = joined.product(x_nd, _Join.apply(joined.whole_od, *weights), bias)
    return _Split.apply(y, [weight.shape[0] for weight in weights], joined.apart)  # type: ignore[return-value]


def _sample(case: Any, device: str) -> launch.Sample:
    tokens, inputs, outputs, bias, dtype = case
    shapes = [(tokens, inputs), (outputs, inputs), *([(outputs,)] if bias else [])]
    return [torch.randn(*shape, dtype=dtype, device=device) for shape in shapes], lambda f, *inputs: f(*inputs)


def _traffic(case: Any) -> launch.Traffic:
    tokens, inputs, outputs, _, dtype = case
    read, written, weight = (count * dtype.itemsize for count in (tokens * inputs, tokens * outputs, inputs * outputs))
    flops = 2.0 * tokens * inputs * outputs
    return launch.Traffic(read + weight + written, 2 * (read + weight) + written, flops, 2 * flops)


OPERATIONS = {"linear": launch.Operation({"reference": reference}, CASES, SIZES, _sample, _traffic, narrow=fp8_linear.NARROW)}
