"""GeGLU: gelu(gate) * up with the tanh approximation of gelu (arXiv:2002.05202, arXiv:1606.08415).

    gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x ** 3)))

Legend: gate_ni, up_ni any shape, equal.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# (shape, dtype)
CASES = [(shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in ((4, 64), (3, 7, 33), (1, 1), (0, 8))]


def reference(gate_ni: Tensor, up_ni: Tensor) -> Tensor:
    """gelu_tanh(gate) * up in plain torch, in the inputs' dtype."""
    return F.gelu(gate_ni, approximate="tanh") * up_ni


geglu = reference
