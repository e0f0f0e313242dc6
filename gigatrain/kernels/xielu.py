"""xIELU, the activation of Apertus, with two trained scalars per layer (arXiv:2411.13010).

    ap = softplus(p)        an = beta + softplus(n)
    x > 0:  ap * x ** 2 + beta * x
    x <= 0: an * (expm1(min(x, eps)) - x) + beta * x

Legend: x_ni any shape; p_1, n_1 the raw scalars; beta 0.5 and eps -1e-6 are fixed in all released models.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.kernels import launch

BETA, EPS = 0.5, -1e-6
# (rows, shape of a row, dtype)
CASES = [
    (rows, shape, dtype) for dtype in (torch.float32, torch.bfloat16) for rows, shape in ((4, (64,)), (3, (7, 33)), (1, (1,)), (0, (8,)))
]
SIZES = [(8192, (21504,), torch.bfloat16)]


def reference(x_ni: Tensor, p_1: Tensor, n_1: Tensor) -> Tensor:
    """xIELU in plain torch, in the inputs' dtype."""
    ap, an = F.softplus(p_1), BETA + F.softplus(n_1)
    return torch.where(x_ni > 0, ap * x_ni * x_ni, (torch.expm1(x_ni.clamp(max=EPS)) - x_ni) * an) + BETA * x_ni


xielu = reference


def _sample(case: Any, device: str) -> launch.Sample:
    rows, shape, dtype = case
    scalars = [torch.tensor([value], dtype=dtype, device=device) for value in (0.3, -0.7)]
    return [torch.randn(rows, *shape, dtype=dtype, device=device) * 3, *scalars], lambda f, x, p, n: f(x, p, n)


def _traffic(case: Any) -> launch.Traffic:
    rows, shape, dtype = case
    tensor = math.prod((rows, *shape)) * dtype.itemsize
    return launch.Traffic(2 * tensor, 3 * tensor)


OPERATIONS = {"xielu": launch.Operation({"reference": reference}, CASES, SIZES, _sample, _traffic)}
