"""An embedding of more rows than the weights have: what the rows are that the new tokens get."""

from typing import Any

import torch
from torch import Tensor

NAMES = ("model.embed_tokens.weight", "lm_head.weight")  # on disk and in memory
_AT_ONCE = 1 << 14  # rows


def fits(name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a stored tensor may be one of fewer tokens than are wanted."""
    return name in NAMES and len(stored) == len(wanted) == 2 and stored[0] < wanted[0] and stored[1] == wanted[1]


def rows(stored: Any, wanted: tuple[int, ...], box: tuple[tuple[int, ...], tuple[int, ...]] | None = None) -> Tensor:
    """A box of the tensor of `wanted` rows (all of it without one), of which `stored` (a slice of safetensors, or a tensor) holds the first.

    Every new row is the mean of the stored ones: a new token then begins as an average one, which takes no probability from those that are known
    (Hewitt, nlp.stanford.edu/~johnhew/vocab-expansion.html). The mean is summed in fp32 by pieces of rows in their order, so every rank has the same.
    """
    (first, column), (count, width) = box or ((0, 0), wanted)
    have, _ = stored.get_shape() if hasattr(stored, "get_shape") else stored.shape
    columns = slice(column, column + width)
    known = stored[min(first, have) : min(first + count, have), columns]
    if (new := count - known.shape[0]) == 0:
        return known
    total = torch.zeros(wanted[1])  # of all columns: a sum's rounding depends on how many there are
    for at in range(0, have, _AT_ONCE):
        total += stored[at : min(at + _AT_ONCE, have), :].float().sum(0)
    return torch.cat([known, (total / have).to(known.dtype)[columns].expand(new, -1)])
