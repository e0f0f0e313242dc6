"""Causal attention of tokens that are spread over ranks: keys and values go round a ring (arXiv:2310.01889), and log-sum-exps merge what each rank gave.

Legend: c ranks, r this one's index; T tokens of a sample, t = T / c of them here; b samples, h query heads, k key heads, d channels (e of values, where they
differ: then 2 d is d + e below), B bytes an element; i, j tokens of queries and of keys.

Order of tokens. Causal work grows with the position, so a sample is cut into 2 c chunks of n = T / 2 c tokens, and rank r has chunks r and 2 c - 1 - r
(zigzag, arXiv:2407.21783): its queries see n^2 (2 c - 1) + n (n + 1) keys, whatever r, and 2 n^2 at each step but the first.

At step s a rank attends to the keys of rank (r - s) mod c. Partial results of one query are merged in fp32 (fp64 for fp64):

    l = log(e^l1 + e^l2)        out = e^(l1 - l) out1 + e^(l2 - l) out2
    backward, block by block of keys, with l and out of all keys:
    l = log(e^l + e^sink), out = e^(l before - l) out: a head's sink, where it has one, is one more term        dsink = - sum of e^(sink - l) rowsum(dout out)
    p = e^(s - l)        dv = p' dout        ds = p (dout v' - rowsum(dout out))        dq = ds k        dk = ds' q

Keys and values travel as they are (key heads are not repeated), in one message a step, which is on its way while the step before computes. In the backward
they go round again, with the sums of dk and dv one step behind, in fp32, to where their keys live. Each rank sends, per layer and microbatch:

    forward     c - 1 messages of 2 b t k d B bytes
    backward    c - 1 messages of 2 b t k d B bytes, and c - 1 of 2 b t k d max(B, 4)

Kept for the backward: q, k, v, out and l of the rank's own tokens, (2 h + 2 k) b t d B + 4 b h t bytes, a c-th of what one rank would keep. At work, in
the forward: the output in fp32 and two blocks of keys and values, 4 b h t d + 4 b t k d B; in the backward: dq in fp32, two such blocks, and three of sums
(own, leaving, coming), 4 b h t d + 4 b t k d B + 24 b t k d. The attention of one block comes on top: a mask, at most (B + 3) b t n bytes; in plain torch some
scores of 2^24 pairs. Nothing of T x T, and no t x T, is ever there. Pairs of chunks that no query can see, by causality or the window, are
not computed; where documents end is only known on the device, so they are masked.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, distributed

from gigatrain.kernels import launch


def zigzag(tokens: int, index: int, ranks: int) -> list[slice]:
    """Which tokens of a sample rank `index` has, in its order."""
    assert tokens % (2 * ranks) == 0, f"the plan refuses {tokens} tokens in {2 * ranks} chunks"
    half = tokens // (2 * ranks)
    return [slice(number * half, (number + 1) * half) for number in (index, 2 * ranks - 1 - index)]


@dataclass(frozen=True)
class Block:
    """Queries and keys, by their place among the tokens of their ranks, and who sees whom: all, by causality, or by a mask."""

    queries: slice
    keys: slice
    sight: Literal["all", "causal", "mask"]


def blocks(index: int, source: int, ranks: int, half: int, window: int | None, packed: bool) -> list[Block]:
    """What rank `index` computes of the keys of rank `source`: every visible pair in one block, and no pair of chunks that is hidden as a whole.

    A function of sizes alone, so that the device is not asked. `half` is n, the tokens of a chunk; `packed` says that there are documents. The first
    blocks of a rank's own keys show every query at least itself.
    """
    found = []
    for i, j in ((0, 0), (1, 1), (1, 0)):  # places of the chunks in their ranks; no first chunk sees a second one
        apart = (index, 2 * ranks - 1 - index)[i] - (source, 2 * ranks - 1 - source)[j]
        nearest, furthest = (apart - 1) * half + 1, (apart + 1) * half - 1  # distances of a query and a key
        if apart < 0 or (apart and window is not None and nearest >= window):
            continue
        hidden = packed or (window is not None and furthest >= window)
        found.append((i, j, "mask" if hidden else "all" if apart else "causal"))
    sights = {sight for _, _, sight in found}
    if index == source and len(found) == 3 and "mask" not in sights:
        return [Block(slice(0, 2 * half), slice(0, 2 * half), "causal")]  # a rank's tokens are in order
    if index != source and len(sights) == 1:  # one pair of chunks, or two that are a rectangle
        (rows, columns) = ([pair[side] for pair in found] for side in (0, 1))
        found = [(slice(min(rows), max(rows) + 1), slice(min(columns), max(columns) + 1), found[0][2])]
    else:
        found = [(slice(i, i + 1), slice(j, j + 1), sight) for i, j, sight in found]
    return [Block(slice(q.start * half, q.stop * half), slice(k.start * half, k.stop * half), sight) for q, k, sight in found]


def traffic(k_btkd: Tensor, ranks: int) -> tuple[list[int], list[int]]:
    """Bytes of the messages that a rank sends in a ring's forward and in its backward, for keys as a rank has them."""
    keys = 2 * k_btkd.numel() * k_btkd.element_size()
    grads = 2 * k_btkd.numel() * _wide(k_btkd.dtype).itemsize
    return [keys] * (ranks - 1), [keys] * (ranks - 1) + [grads] * (ranks - 1)


class _Neighbours:
    """The ring as one rank sees it: it sends to the next and receives from the previous."""

    def __init__(self, name: str) -> None:
        self.group = distributed.distributed_c10d._resolve_process_group(cast(Any, name))
        self.index, self.ranks = self.group.rank(), self.group.size()
        self.next, self.previous = (distributed.get_global_rank(self.group, (self.index + step) % self.ranks) for step in (1, -1))

    def pass_on(self, sent: Tensor) -> "_Passing":
        """Start sending a tensor and receiving its like."""
        received = torch.empty_like(sent)
        calls = ((distributed.isend, sent, self.next), (distributed.irecv, received, self.previous))
        works = distributed.batch_isend_irecv([distributed.P2POp(*call, self.group) for call in calls])
        return _Passing(sent, received, works)


@dataclass(frozen=True)
class _Passing:
    """A message each way; what is sent lives and stays as it is until then."""

    sent: Tensor
    received: Tensor
    works: list[distributed.Work]

    def arrived(self) -> Tensor:
        """What came; waits, where the device has streams, on the device."""
        for work in self.works:
            work.wait()
        return self.received


@dataclass(frozen=True)
class _Sight:
    """What of the keys of each rank this rank's queries see."""

    ring: _Neighbours
    half: int  # tokens of a chunk
    documents: Tensor | None
    window: int | None
    device: torch.device

    def blocks(self, source: int) -> list[tuple[Block, Tensor | None]]:
        """The blocks, each with the pairs [b or 1, queries, keys] that are visible where sizes alone do not say it."""
        found = blocks(self.ring.index, source, self.ring.ranks, self.half, self.window, self.documents is not None)
        return [(block, self._visible(block, source) if block.sight == "mask" else None) for block in found]

    def _visible(self, block: Block, source: int) -> Tensor:
        # Made anew for every block and layer: some bytes a pair, where attention takes 4 h d operations; kept, all blocks' would be t x T.
        at_i, at_j = self._places(self.ring.index)[block.queries], self._places(source)[block.keys]
        visible = (at_i[:, None] >= at_j[None])[None]
        if self.window is not None:
            visible = visible & (at_i[:, None] - self.window < at_j[None])
        if self.documents is not None:
            visible = visible & (self.documents[:, at_i, None] == self.documents[:, None, at_j])
        return visible

    def _places(self, index: int) -> Tensor:
        """Where in the sample the tokens of a rank are."""
        pieces = zigzag(2 * self.half * self.ring.ranks, index, self.ring.ranks)
        return torch.cat([torch.arange(piece.start, piece.stop, device=self.device) for piece in pieces])


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    documents: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    group: str,
) -> Any:
    """`(out [b, t, h, e], lse [b, h, t])`."""
    ring = _Neighbours(group)
    sight = _Sight(ring, q.shape[1] // 2, documents, window, q.device)
    out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=_wide(q.dtype))
    lse = out.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"))
    kv, widths = torch.cat((k, v), 3), (k.shape[3], v.shape[3])
    for step in range(ring.ranks):
        arriving = ring.pass_on(kv) if step < ring.ranks - 1 else None
        for block, visible in sight.blocks((ring.index - step) % ring.ranks):
            k_part, v_part = kv[:, block.keys].split(widths, 3)
            part = _attend(q[:, block.queries], k_part, v_part, block.sight == "causal", visible, scale, softcap)
            _merge(out[:, block.queries], lse[:, :, block.queries], *part)
        if arriving is not None:
            kv = arriving.arrived()
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out.mul_(torch.exp(lse - total).transpose(1, 2)[..., None])
        lse = total
    return out.to(q.dtype), lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a partial result to what there is, in place. Either may have seen no key, then its lse is -inf, but not both."""
    total = torch.logaddexp(lse, part_lse)
    ours, theirs = (torch.exp(x - total).transpose(1, 2)[..., None] for x in (lse, part_lse))
    out.mul_(ours).add_(part * theirs)
    lse.copy_(total)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    window: int | None,
    scale: float,
    softcap: float | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ring = _Neighbours(group)
    sight = _Sight(ring, q.shape[1] // 2, documents, window, q.device)
    grad = grad.contiguous()
    dq = q.new_zeros(q.shape, dtype=_wide(q.dtype))
    kv, widths = torch.cat((k, v), 3), (k.shape[3], v.shape[3])
    own = torch.zeros_like(kv, dtype=dq.dtype)
    passing: _Passing | None = None  # the sums of the keys that are here next, on their way
    for step in range(ring.ranks):
        arriving = ring.pass_on(kv) if step < ring.ranks - 1 else None
        parts = []
        for block, visible in sight.blocks((ring.index - step) % ring.ranks):
            rows, (k_part, v_part) = block.queries, kv[:, block.keys].split(widths, 3)
            dq_part, *kv_parts = _attend_backward(
                grad[:, rows], q[:, rows], k_part, v_part, out[:, rows], lse[:, :, rows], block.sight == "causal", visible, scale, softcap
            )
            dq[:, rows] += dq_part
            parts.append((block.keys, kv_parts))
        # The rank's own keys begin no journey: their sums come back from the other ranks, and only then are added.
        sums = own if step == 0 else torch.zeros_like(own) if passing is None else passing.arrived()
        for keys, kv_parts in parts:
            for whole, part in zip(sums.split(widths, 3), kv_parts, strict=True):
                whole[:, keys] += part
        if step:
            passing = ring.pass_on(sums)
        if arriving is not None:
            kv = arriving.arrived()
    if passing is not None:
        own += passing.arrived()
    dk, dv = (x.contiguous() for x in own.to(k.dtype).split(widths, 3))
    if sinks is None:
        return dq.to(q.dtype), dk, dv, q.new_empty(0)
    delta = (grad.to(lse.dtype) * out).sum(-1).transpose(1, 2)
    dsinks = -(torch.exp(sinks.to(lse.dtype)[:, None] - lse) * delta).sum((0, 2))
    return dq.to(q.dtype), dk, dv, dsinks.to(sinks.dtype)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, sinks, documents, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, sinks, *output, documents)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, grad: Tensor | None, _: None) -> Any:
    if grad is None:
        return (None,) * 9
    *saved, documents = ctx.saved_tensors
    *found, dsinks = _attention_backward(grad, *saved, documents, *ctx.numbers)
    return *found, None if saved[3] is None else dsinks, None, None, None, None, None


_attention_backward = launch.operator(
    "ring_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor out, Tensor lse, "
    "Tensor? documents, int? window, float scale, float? softcap, str group) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    lambda grad, q, k, v, sinks, *_: (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    ),
)
attention = launch.differentiable(
    launch.operator(
        "ring_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? documents, int? window, float scale, float? softcap, str group) "
        "-> (Tensor, Tensor)",
        _forward,
        lambda q, k, v, *_: (
            q.new_empty((*q.shape[:3], v.shape[3])),
            q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_wide(q.dtype)),
        ),
    ),
    _save,
    _grads,
)


# One block of queries and keys: `(out, lse)`, and from the out and lse of all keys its part of the gradients.


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _kernel(q: Tensor, k: Tensor, v: Tensor, masked: bool, softcap: float | None) -> Literal["flash", "efficient", "plain"]:
    """torch's fused kernels where they serve: neither has soft-caps, fp64 or, flash, values of another width; flash has no masks, efficient wants a bias
    in rows of 32."""
    channels, half = q.shape[-1], q.dtype in (torch.bfloat16, torch.float16)
    if (
        not q.is_cuda
        or softcap is not None
        or v.shape[-1] != channels
        or channels % 8
        or channels > 256
        or not (half or q.dtype == torch.float32)
    ):
        return "plain"
    if half and not masked:
        return "flash"
    return "plain" if q.shape[1] % 32 or k.shape[1] % 32 else "efficient"


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, visible: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    match _kernel(q, k, v, visible is not None, softcap):
        case "flash":
            return _flash(q, k, v, causal, scale)
        case "efficient":
            return _efficient(q, k, v, causal, visible, scale)
    return _plain(q, k, v, causal, visible, scale, softcap)


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    visible: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    match _kernel(q, k, v, visible is not None, softcap):
        case "flash":
            return _flash_backward(grad, q, k, v, out, lse, causal, scale)
        case "efficient":
            return _efficient_backward(grad, q, k, v, out, lse, causal, visible, scale)
    return _plain_backward(grad, q, k, v, out, lse, causal, visible, scale, softcap)


# torch's kernels take [b, h, t, d], of any strides, and a log-sum-exp that need not be their own. They have run on no GPU yet: the tests hold their
# calls to the schemas and shapes of torch's meta kernels, and everything around them, with `_plain` in their place, to fp64.


def _unread(x: Tensor) -> Tensor:
    """The state of the generator, where nothing is dropped."""
    return torch.zeros(2, dtype=torch.int64, device=x.device)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    grad_, q_, k_, v_, out_ = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    state = _unread(q)
    found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad_, q_, k_, v_, out_, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal, state, state[0], scale=scale
    )
    return tuple(x.transpose(1, 2) for x in found)


def _biased(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, ...]:
    """q, k, v in the kernel's layout, key heads repeated, and the mask as a bias or None."""
    shared = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(shared, 2) for x in (k, v))
    bias = None
    if visible is not None:
        # Not -inf, so that a query that sees nothing of the block has an lse, -1e30, and not a NaN: it weighs e^-1e30 = 0 in the sum.
        bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -1e30)
        bias = bias[:, None].expand(q.shape[0], q.shape[2], -1, -1)
    return *(x.transpose(1, 2) for x in (q, k, v)), bias  # type: ignore[return-value]


def _efficient(q: Tensor, k: Tensor, v: Tensor, causal: bool, visible: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(*_biased(q, k, v, visible), True, 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse


def _efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, visible: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    inputs, state = _biased(q, k, v, visible), _unread(q)
    found = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad.transpose(1, 2), *inputs, out.transpose(1, 2), lse.contiguous(), *state, 0.0, [True, True, True, False], causal, scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2) for x in found[:3])
    return dq, *(x.unflatten(2, (k.shape[2], -1)).sum(3, dtype=lse.dtype) for x in (dk, dv))


_SCORES = 1 << 24  # of `_plain` at a time: 64 MiB in fp32


def _pieces(q: Tensor, k: Tensor, causal: bool) -> list[tuple[slice, slice]]:
    """Queries, at least 64 at a time, and the keys that any of them sees."""
    count = max(64, _SCORES // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
    ends = [(start, min(start + count, q.shape[1])) for start in range(0, q.shape[1], count)]
    return [(slice(start, end), slice(0, end if causal else k.shape[1])) for start, end in ends]


def _rows(x: Tensor, heads: int) -> Tensor:
    """[b, t, h, d] as [b * k, t * h / k, d], sorted by token, then head: all that meets one key head."""
    return x.unflatten(2, (heads, -1)).permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)


def _tokens(x: Tensor, batch: int, group: int) -> Tensor:
    """`_rows` undone."""
    return x.unflatten(1, (-1, group)).unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def _hide(scores: Tensor, rows: slice, keys: slice, batch: int, group: int, causal: bool, visible: Tensor | None) -> None:
    """-inf where a pair of these queries [b * k, rows * g, keys] is not visible, in place."""
    pairs = scores.unflatten(1, (-1, group)).unflatten(0, (batch, -1))
    if visible is not None:
        pairs.masked_fill_(~visible[:, None, rows, None, keys], float("-inf"))
    elif causal:
        hidden = torch.ones(pairs.shape[2], pairs.shape[4], dtype=torch.bool, device=scores.device).triu_(1 + rows.start)
        pairs.masked_fill_(hidden[:, None], float("-inf"))


def _plain(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, visible: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """In plain torch: products in the inputs' dtype, everything between in fp32 at least."""
    batch, heads, group, wide = q.shape[0], k.shape[2], q.shape[2] // k.shape[2], _wide(q.dtype)
    k_, v_ = _rows(k, heads), _rows(v, heads)
    outs, lses = [], []
    for rows, keys in _pieces(q, k, causal):
        s = torch.bmm(_rows(q[:, rows], heads), k_[:, keys].transpose(1, 2)).to(wide) * scale
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        _hide(s, rows, keys, batch, group, causal, visible)
        most = s.amax(-1, keepdim=True).clamp_min(torch.finfo(wide).min)  # so that a row that sees nothing has weights 0
        p = torch.exp(s - most)
        total = p.sum(-1, keepdim=True)  # at least 1 where anything is seen
        out = torch.bmm(p.to(q.dtype), v_[:, keys]).to(wide) / total.clamp_min(1.0)
        outs.append(_tokens(out, batch, group))
        lses.append(_tokens(most + total.log(), batch, group))
    return torch.cat(outs, 1), torch.cat(lses, 1)[..., 0].transpose(1, 2)


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    visible: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    batch, heads, group, wide = q.shape[0], k.shape[2], q.shape[2] // k.shape[2], _wide(q.dtype)
    k_, v_ = _rows(k, heads), _rows(v, heads)
    lse_, delta = lse.transpose(1, 2)[..., None], (grad.to(wide) * out).sum(-1, keepdim=True)
    dq, (dk, dv) = [], (torch.zeros_like(x, dtype=wide) for x in (k_, v_))
    for rows, keys in _pieces(q, k, causal):
        q_, grad_, lse_rows, delta_rows = (_rows(x[:, rows], heads) for x in (q, grad, lse_, delta))
        s = torch.bmm(q_, k_[:, keys].transpose(1, 2)).to(wide) * scale
        slope = None
        if softcap is not None:
            s = torch.tanh(s / softcap)
            slope = 1.0 - s * s
            s = softcap * s
        _hide(s, rows, keys, batch, group, causal, visible)
        p = torch.exp(s - lse_rows)
        ds = p * (torch.bmm(grad_, v_[:, keys].transpose(1, 2)).to(wide) - delta_rows)
        ds = ((ds if slope is None else ds * slope) * scale).to(q.dtype)
        dq.append(_tokens(torch.bmm(ds, k_[:, keys]), batch, group))
        dk[:, keys] += torch.bmm(ds.transpose(1, 2), q_)
        dv[:, keys] += torch.bmm(p.to(q.dtype).transpose(1, 2), grad_)
    return torch.cat(dq, 1), *(_tokens(x, batch, 1) for x in (dk, dv))
