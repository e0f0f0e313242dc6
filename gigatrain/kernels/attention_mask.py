"""Who sees whom: one bound per query, and from it what each version of attention reads.

    key j is visible to query i if first_i <= j <= i        first_i = max(where i's document begins, i - window + 1)

Legend: b batch, t tokens. `first_bt` never falls along a row, since a document's tokens are neighbours (an index that comes back later in a row is another
document). So `stop_bt`, the end of the queries that see key j, is a search in it, and a block of queries or keys knows from two of its bounds which blocks
it meets and which it sees whole: nothing of t x t is needed, and nothing is read on the host.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Part = Literal["visible", "bias", "bounds", "sequences", "tiles"]
# `sequences` have room for a row's documents at this mean length, and for 8 at least: a number of sizes alone, so that shapes never change.
DOCUMENT_TOKENS = 64


@dataclass(frozen=True)
class Mask:
    """Who sees whom, built once per microbatch and window, with the parts that the chosen version reads; all None where plain causality says it all.

    A version that is given a mask without its part makes it for the call: slower, and right.
    """

    documents_bt: Tensor | None = None
    window: int | None = None
    visible_btt: Tensor | None = None  # bool [b or 1, 1, t, t]
    bias_btt: Tensor | None = None  # the same as 0 and -inf, in the dtype of the queries
    first_bt: Tensor | None = None  # int32 [b or 1, t]
    stop_bt: Tensor | None = None  # int32 [b or 1, t]
    sequences: tuple[Tensor, Tensor] | None = None  # see `sequences`
    tiles: Any = None  # FlexAttention's BlockMask

    @property
    def plain(self) -> bool:
        """Whether causality is all there is."""
        return self.documents_bt is None and self.window is None


def mask(
    documents_bt: Tensor | None,
    window: int | None,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    parts: Sequence[Part] = ("visible", "bias"),
) -> Mask:
    """The mask for samples of `tokens` tokens; `documents_bt` gives each token's document index in its row, None: one document."""
    window = None if window is None or window >= tokens else window
    if documents_bt is None and window is None:
        return Mask()
    first = firsts(documents_bt, window, tokens, device)
    made: dict[str, Any] = {}
    if "visible" in parts or "bias" in parts:
        made["visible_btt"] = _visible(first)
    if "bias" in parts:
        made["bias_btt"] = _bias(made["visible_btt"], dtype)
        if "visible" not in parts:
            del made["visible_btt"]
    if "bounds" in parts:
        made |= {"first_bt": first, "stop_bt": _stops(first)}
    if "sequences" in parts and documents_bt is not None:
        made["sequences"] = sequences(documents_bt)
    if "tiles" in parts:
        made["tiles"] = tiles(first)
    return Mask(documents_bt, window, **made)


def firsts(documents_bt: Tensor | None, window: int | None, tokens: int, device: torch.device) -> Tensor:
    """The first key that each query sees, int32 [b or 1, t]."""
    at_t = torch.arange(tokens, device=device)
    first = torch.zeros_like(at_t)[None]
    if documents_bt is not None:
        first = torch.where(_opens(documents_bt), at_t, 0).cummax(1).values
    if window is not None:
        first = torch.maximum(first, at_t - (window - 1))
    return first.int()


def _opens(documents_bt: Tensor) -> Tensor:
    """Whether each token is the first of its document in its row."""
    begun = torch.ones_like(documents_bt[:, :1], dtype=torch.bool)
    return torch.cat((begun, documents_bt[:, 1:] != documents_bt[:, :-1]), 1)


def _stops(first_bt: Tensor) -> Tensor:
    """Behind the last query that sees each key; queries before the key do not count themselves out."""
    at_bt = torch.arange(first_bt.shape[1], device=first_bt.device, dtype=first_bt.dtype).expand_as(first_bt).contiguous()
    return torch.searchsorted(first_bt.contiguous(), at_bt, right=True, out_int32=True)


def _visible(first_bt: Tensor) -> Tensor:
    at_t = torch.arange(first_bt.shape[1], device=first_bt.device)
    return ((at_t[:, None] >= at_t[None]) & (at_t[None] >= first_bt[:, :, None]))[:, None]


def _bias(visible_btt: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible_btt.shape, dtype=dtype, device=visible_btt.device).masked_fill_(~visible_btt, float("-inf"))


def sequences(documents_bt: Tensor) -> tuple[Tensor, Tensor]:
    """`(starts, fault)`: int32 offsets of the documents in the batch laid end to end, then its end as often as it takes to fill a length that only
    depends on the shape; and 0, or NaN where there are more documents than that, so that the step is refused and not wrong."""
    b, t = documents_bt.shape
    room = b * max(8, t // DOCUMENT_TOKENS)
    number_n = _opens(documents_bt).flatten().cumsum(0, dtype=torch.int32) - 1
    wanted = torch.arange(room, device=documents_bt.device, dtype=torch.int32)
    starts = torch.searchsorted(number_n, wanted, out_int32=True)
    end = torch.full_like(starts[:1], b * t)
    fault = torch.where(number_n[-1:] < room, 0.0, float("nan")) if b * t else torch.zeros(1, device=documents_bt.device)
    return torch.cat((starts, end)), fault


def tiles(first_bt: Tensor, size: int = 128) -> Any:
    """FlexAttention's mask of blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    b, t = first_bt.shape
    return create_block_mask(_sees(first_bt), b, None, t, t, device=str(first_bt.device), BLOCK_SIZE=size)


def _sees(first_bt: Tensor) -> Callable[..., Tensor]:
    rows = first_bt.shape[0]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= first_bt[b if rows > 1 else 0, i])

    return sees


def visible(seen: Mask, tokens: int, device: torch.device) -> Tensor:
    """`visible_btt`, also of plain causality."""
    if seen.visible_btt is not None:
        return seen.visible_btt
    return _visible(firsts(seen.documents_bt, seen.window, tokens, device))


def bias(seen: Mask, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """`bias_btt`; None for plain causality."""
    if seen.bias_btt is not None or seen.plain:
        return seen.bias_btt
    return _bias(visible(seen, tokens, device), dtype)


def bounds(seen: Mask, tokens: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """`(first_bt, stop_bt)`; None for plain causality."""
    if seen.first_bt is not None or seen.plain:
        return seen.first_bt, seen.stop_bt
    first = firsts(seen.documents_bt, seen.window, tokens, device)
    return first, _stops(first)
