"""SwiGLU: silu(gate) * up, with silu(x) = x * sigmoid(x) (arXiv:2002.05202).

Legend: gate_ni, up_ni any shape, equal. The backward, with s = sigmoid(gate):
    dup = dy * gate * s        dgate = dy * up * s * (1 + gate * (1 - s))
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# (shape, dtype)
CASES = [(shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in ((4, 64), (3, 7, 33), (1, 1), (0, 8))]


def reference(gate_ni: Tensor, up_ni: Tensor) -> Tensor:
    """silu(gate) * up in plain torch, in the inputs' dtype."""
    return F.silu(gate_ni) * up_ni


swiglu = reference
