"""Context parallelism: the ranks of a `context` group hold different tokens of the same samples, and meet in attention only.

    ring (arXiv:2310.01889, parallel/ring.py)    c steps; at each a rank attends to one rank's keys, while those of the next step are on their way
    ulysses (arXiv:2309.14509, here)             one all-to-all gives every rank all tokens of h / c heads, attention is as on one rank, and another
                                                 all-to-all gives the tokens back

Legend: c ranks of the group; T tokens of a sample, t = T / c of them here; b samples, h query heads, k key heads, d channels, all as they are on this
rank (tensor parallelism has cut h and k already); B bytes an element.

All else in a layer is per token. So the ranks' losses add up to the loss, and their gradients of the weights to the gradients. For the ring, `cut` takes
a sample's tokens so that all ranks work alike, else in order. It leaves a microbatch's documents whole, since every rank of the group has read them: masks
need no communication.

Ulysses. Each rank sends, per layer and sample, forward and again backward: (c - 1) / c of t (h + 2 k') d B bytes, and of t h d B, where k' = lcm(k, c):
key heads are repeated until they divide. Where values have e channels, t ((h + k') d + k' e) B and t h e B. A rank uses the sinks of its heads.
What is kept for the backward is that of attention over T tokens with h / c and k' / c heads.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from gigatrain.data.loader import Microbatch
from gigatrain.kernels.attention import Mask
from gigatrain.kernels.ops import Ops
from gigatrain.parallel import ring
from gigatrain.parallel.mesh import Mesh

Exchange = Literal["ring", "ulysses"]


def cut(microbatch: Microbatch, mesh: Mesh, exchange: Exchange) -> Microbatch:
    """This rank's tokens of every sample, with their labels and their positions, which the decoder must be given; documents stay whole."""
    if mesh.size("context") == 1:
        return microbatch
    pieces = chunks(microbatch.tokens.shape[1], mesh.index("context"), mesh.size("context"), exchange)

    def cut_one(whole: Tensor) -> Tensor:
        return torch.cat([whole[:, piece] for piece in pieces], 1)

    mine: dict[str, Any] = {name: cut_one(getattr(microbatch, name)) for name in ("tokens", "labels", "positions")}
    if microbatch.given is not None:
        mine["given"] = {name: cut_one(one) if "_bt" in name else one for name, one in microbatch.given.items()}
    return replace(microbatch, **mine)


def chunks(tokens: int, index: int, ranks: int, exchange: Exchange) -> list[slice]:
    """Which tokens of a sample rank `index` of a group has, in its order."""
    if exchange == "ring":
        return ring.zigzag(tokens, index, ranks)
    assert tokens % ranks == 0, f"the plan refuses {tokens} tokens on {ranks} ranks"
    return [slice(index * (tokens // ranks), (index + 1) * (tokens // ranks))]


def ops(chosen: Ops, mesh: Mesh, exchange: Exchange) -> Ops:
    """`chosen` for tokens as `cut` leaves them: attention and its mask see the whole sample, and ranks drop out different elements.

    The mask is called with the rank's count of tokens and the whole sample's documents. The ring has its own attention; Ulysses calls the chosen one.
    """
    group = mesh.group("context")
    if group is None:
        return chosen
    found = _ring(group) if exchange == "ring" else _ulysses(chosen, group)
    # Odd, so that no two ranks' seeds are equal; large, so that none is another microbatch's, which are neighbours.
    apart = (mesh.index("context") * 0x9E3779B97F4A7C15 + (1 << 63)) % (1 << 64) - (1 << 63)

    def dropout_add(x: Tensor, residual: Tensor, p: float, seed: Tensor, offset: int = 0) -> Tensor:
        return chosen.dropout_add(x, residual, p, seed + apart, offset)

    def together(sums: Tensor) -> Tensor:
        return _Together.apply(chosen.together(sums), group.group_name)  # type: ignore[return-value]

    return replace(chosen, **found, dropout_add=dropout_add, together=together)


def _checked(documents: Tensor | None, window: int | None, tokens: int) -> int | None:
    """The window, if it hides anything of samples of `tokens` tokens."""
    assert documents is None or documents.shape[1] == tokens, "documents are those of the whole sample"
    return None if window is None or window >= tokens else window


class _Together(torch.autograd.Function):
    """The sum over the ranks, of which each has its own labels' part of the loss: gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _all_reduce(sums, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all_reduce(grad, ctx.group), None


def _all_reduce(x: Tensor, group: str) -> Tensor:
    calls = torch.ops._c10d_functional
    return calls.wait_tensor(calls.all_reduce(x.contiguous(), "sum", group))


class _Exchange(torch.autograd.Function):
    """All-to-all of equal parts along dim 0, whose gradient is another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(x: Tensor, group: str) -> Tensor:
    calls, parts = torch.ops._c10d_functional, [1] * x.shape[0]
    return calls.wait_tensor(calls.all_to_all_single(x.contiguous(), parts, parts, group))


def _ulysses(chosen: Ops, group: distributed.ProcessGroup) -> dict[str, Callable[..., Any]]:
    ranks, name = group.size(), group.group_name

    def mask(documents: Tensor | None, window: int | None, tokens: int, dtype: torch.dtype, device: torch.device) -> Any:
        return chosen.mask(documents, _checked(documents, window, tokens * ranks), tokens * ranks, dtype, device)

    def attention(
        q_bthd: Tensor,
        k_btkd: Tensor,
        v_btke: Tensor,
        mask: Any,
        *,
        scale: float,
        softcap: float | None = None,
        sinks_h: Tensor | None = None,
    ) -> Tensor:
        keys = k_btkd.shape[2]
        if copies := math.lcm(keys, ranks) // keys - 1:
            k_btkd, v_btke = (x.repeat_interleave(copies + 1, 2) for x in (k_btkd, v_btke))
        parts = [x.unflatten(2, (ranks, -1)) for x in (q_bthd, k_btkd, v_btke)]
        sent = torch.cat(
            [part.flatten(3) for part in parts], 3
        )  # [b, t, c, queries, keys and values of consecutive heads, which belong together]
        got = _Exchange.apply(sent.permute(2, 0, 1, 3), name)
        assert isinstance(got, Tensor)
        pieces = got.transpose(0, 1).flatten(1, 2).split([part[0, 0, 0].numel() for part in parts], 2)
        q, k, v = (piece.unflatten(2, part.shape[3:]) for piece, part in zip(pieces, parts, strict=True))
        sinks = {} if sinks_h is None else {"sinks_h": sinks_h.unflatten(0, (ranks, -1))[group.rank()]}
        out = chosen.attention(q, k, v, mask, scale=scale, softcap=softcap, **sinks)
        back = _Exchange.apply(out.unflatten(1, (ranks, -1)).transpose(0, 1), name)  # [c, b, t, h / c, e]
        assert isinstance(back, Tensor)
        return back.permute(1, 2, 0, 3, 4).flatten(2, 3)

    return {"mask": mask, "attention": attention}


def _ring(group: distributed.ProcessGroup) -> dict[str, Callable[..., Any]]:
    ranks, name = group.size(), group.group_name

    def mask(documents: Tensor | None, window: int | None, tokens: int, dtype: torch.dtype, device: torch.device) -> Mask:
        return Mask(documents, _checked(documents, window, tokens * ranks))

    def attention(
        q_bthd: Tensor,
        k_btkd: Tensor,
        v_btke: Tensor,
        mask: Mask,
        *,
        scale: float,
        softcap: float | None = None,
        sinks_h: Tensor | None = None,
    ) -> Tensor:
        return ring.attention(q_bthd, k_btkd, v_btke, sinks_h, mask.documents_bt, mask.window, scale, softcap, name)[0]

    return {"mask": mask, "attention": attention}
