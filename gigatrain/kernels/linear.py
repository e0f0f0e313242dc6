"""The product of a layer's activations and its weight: y_no = x_nd . w_od + b_o.

Legend: n tokens, in one dim or several, d input channels, o output channels. cuBLAS is at the limit of the hardware here, so that the only other versions
are those that compute something else (a narrower precision) or leave something out of the way (a weight's gradient that is summed where it is made).
"""

from collections.abc import Callable
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


class Linear(nn.Linear):
    """A layer's matrix and the product that the plan chose for it; what stays in high precision whatever the plan says (head, router) is none of these."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, product: Callable[..., Tensor]) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.product = product

    def forward(self, x_nd: Tensor) -> Tensor:
        return self.product(x_nd, self.weight, self.bias)


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
