"""GeGLU: gelu(gate) * up with the tanh approximation of gelu (arXiv:2002.05202, arXiv:1606.08415).

    gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x ** 3)))

Legend: gate_ni, up_ni any shape, equal.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.kernels import launch

# (rows, shape of a row, dtype)
CASES = [
    (rows, shape, dtype) for dtype in (torch.float32, torch.bfloat16) for rows, shape in ((4, (64,)), (3, (7, 33)), (1, (1,)), (0, (8,)))
]
SIZES = [(8192, (channels,), torch.bfloat16) for channels in (8192, 14336)]


def reference(gate_ni: Tensor, up_ni: Tensor) -> Tensor:
    """gelu_tanh(gate) * up in plain torch, in the inputs' dtype."""
    return F.gelu(gate_ni, approximate="tanh") * up_ni


geglu = reference


def _sample(case: Any, device: str) -> launch.Sample:
    rows, shape, dtype = case
    gate, up = (torch.randn(rows, *shape, dtype=dtype, device=device) for _ in range(2))
    return [gate * 3, up], lambda f, gate, up: f(gate, up)


def _traffic(case: Any) -> launch.Traffic:
    rows, shape, dtype = case
    tensor = math.prod((rows, *shape)) * dtype.itemsize
    return launch.Traffic(3 * tensor, 5 * tensor)


OPERATIONS = {"geglu": launch.Operation({"reference": reference}, CASES, SIZES, _sample, _traffic)}
