"""xIELU, the activation of Apertus, with two trained scalars per layer (arXiv:2411.13010).

    ap = softplus(p)        an = beta + softplus(n)
    x > 0:  ap * x ** 2 + beta * x
    x <= 0: an * (expm1(min(x, eps)) - x) + beta * x

Legend: x_ni any shape; p_1, n_1 the raw scalars; beta 0.5 and eps -1e-6 are fixed in all released models.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BETA, EPS = 0.5, -1e-6
# (shape, dtype)
CASES = [(shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in ((4, 64), (3, 7, 33), (1, 1), (0, 8))]


def reference(x_ni: Tensor, p_1: Tensor, n_1: Tensor) -> Tensor:
    """xIELU in plain torch, in the inputs' dtype."""
    ap, an = F.softplus(p_1), BETA + F.softplus(n_1)
    return torch.where(x_ni > 0, ap * x_ni * x_ni, (torch.expm1(x_ni.clamp(max=EPS)) - x_ni) * an) + BETA * x_ni


xielu = reference
