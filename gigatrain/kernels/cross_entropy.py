"""Cross entropy of given logits, with soft-cap, label smoothing, z-loss and weights.

    l = scale * x        l = c * tanh(l / c) if softcap        lse = log sum exp l        ce = lse - l[label]
    loss = weight * (ce - smoothing * mean(l - l[label]) + z_loss * lse ** 2)        of a row without a label (`ignore`): 0

Legend: logits_nv rows by vocabulary; labels_n int64; weights_n fp32, without gradient. Losses are fp32 (fp64 for fp64 inputs), whatever the logits are.
Every version returns the loss and, for the records, the plain ce, weighted and reduced alike, without gradient.
`reduction`: "none" gives them per row, "sum" their sum, "mean" that over the number of labels, or over the sum of their weights; 0 where there is none.
A label outside the vocabulary that is not `ignore` makes its loss NaN. The backward, with p = softmax(l), t = onehot(label) and weight as above:
    dl = p * (1 + 2 * z_loss * lse) - (1 - smoothing) * t - smoothing / V        dx = dl * weight * scale, times (1 - (l / c) ** 2) if softcap

A row's state is four numbers, which also add up over shards of the vocabulary: its largest logit m, the sum of exp(l - m) (`lean_rows`: its reciprocal,
the largest probability), l[label], the sum of l - m.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigatrain.errors import KernelError
from gigatrain.kernels import launch
from gigatrain.kernels.launch import tl, triton

Reduction = Literal["sum", "mean", "none"]
REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean", "none")
IGNORE = -100
# (rows, vocabulary, softcap, scale, z_loss, smoothing, reduction, dtype); rows are weighted where labels are smoothed
CASES = [
    (*shape, *terms, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for shape, terms in (
        ((33, 128), (None, 1.0, 0.0, 0.0, "sum")),
        ((33, 128), (5.0, 1.0, 1e-2, 0.0, "mean")),
        ((33, 128), (None, 0.125, 1e-3, 0.1, "mean")),
        ((33, 128), (3.0, 0.5, 0.0, 0.2, "none")),
        ((31, 77), (None, 1.0, 0.0, 0.0, "none")),
        ((31, 77), (3.0, 0.5, 1e-3, 0.1, "mean")),
        ((5, 1003), (None, 0.125, 1e-3, 0.1, "none")),
        ((1, 3), (None, 0.125, 1e-2, 0.0, "mean")),
    )
]
SIZES = [
    (8192, vocabulary, softcap, 1.0, 0.0, 0.0, "sum", torch.bfloat16)
    for vocabulary, softcap in ((32000, None), (50257, None), (128256, None), (151936, None), (256000, 30.0), (262144, None))
]


class Terms(NamedTuple):
    """What a loss is made of; the order is that of the operators' schemas."""

    softcap: float | None
    scale: float
    z_loss: float
    smoothing: float
    ignore: int


class Shard(NamedTuple):
    """Where these columns lie in the vocabulary, and how the rows' states [n, 4] of all shards come together as [ranks, n, 4]; None: they are all."""

    first: int
    vocabulary: int
    gather: Callable[[Tensor], Tensor] | None


def checked(reduction: str, weights_n: Tensor | None) -> None:
    """Raise ValueError for an unknown reduction, and KernelError for weights that want a gradient, which no version gives."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is none of {', '.join(REDUCTIONS)}")
    if weights_n is not None and weights_n.requires_grad:
        raise KernelError("cross_entropy: weights_n gets no gradient; detach it")


def denominator(labels_n: Tensor, weights_n: Tensor | None, ignore: int, wide: torch.dtype) -> Tensor:
    """One over the number of labels, or over the sum of their weights, as a scalar on the device; 0 where that is 0."""
    live = labels_n != ignore
    count = (live if weights_n is None else torch.where(live, weights_n, 0.0)).sum(dtype=wide)
    return torch.where(count != 0, count.reciprocal(), 0.0)


def reduced(loss_n: Tensor, ce_n: Tensor, labels_n: Tensor, weights_n: Tensor | None, ignore: int, reduction: str) -> tuple[Tensor, Tensor]:
    """Losses per row, as the caller wants them."""
    if reduction == "none":
        return loss_n, ce_n
    loss, ce = loss_n.sum(), ce_n.sum()
    if reduction == "sum":
        return loss, ce
    factor = denominator(labels_n, weights_n, ignore, loss.dtype)
    return loss * factor, ce * factor


def reference(
    logits_nv: Tensor,
    labels_n: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    ignore: int = IGNORE,
    label_smoothing: float = 0.0,
    weights_n: Tensor | None = None,
    reduction: str = "sum",
) -> tuple[Tensor, Tensor]:
    """`(loss, ce)` in plain torch; ce carries no gradient. Raises ValueError for an unknown reduction."""
    checked(reduction, weights_n)
    logits = logits_nv.to(torch.promote_types(logits_nv.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    live = labels_n != ignore
    wrong = live & ((labels_n < 0) | (labels_n >= logits.shape[-1]))
    log_p = torch.log_softmax(logits, -1)
    ce = -log_p.gather(1, torch.where(live & ~wrong, labels_n, 0)[:, None])[:, 0]
    ce = ce * torch.where(wrong, torch.nan, 1.0).to(ce.dtype)
    loss = (1.0 - label_smoothing) * ce - label_smoothing * log_p.mean(-1) if label_smoothing else ce
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(logits, -1).square()
    loss, ce = (torch.where(live, x if weights_n is None else x * weights_n, 0.0) for x in (loss, ce))
    return reduced(loss, ce.detach(), labels_n, weights_n, ignore, reduction)


def lean_rows(
    p_nv: Tensor, dx_nv: Tensor | None, labels_n: Tensor, weights_n: Tensor | None, upstream_n: Tensor | None, known_rn4: Tensor | None,
    terms: Terms, shard: Shard, out: tuple[Tensor, Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Losses, plain cross entropies and states into `out`, the gradient of the logits in `p_nv`, which are destroyed, into `dx_nv` (which may be it).

    Takes the rows' states from `known_rn4` if given. The gradient lacks `scale`, and is not silenced where there is no label.
    """
    cap, scale, z_loss, smoothing, ignore = terms
    p, slope = p_nv, None
    if cap is not None:
        p.mul_(scale / cap).tanh_()
        slope = None if dx_nv is None else p.clone()
        p.mul_(cap)
    elif scale != 1.0:
        p.mul_(scale)
    live = labels_n != ignore
    wrong = live & ((labels_n < 0) | (labels_n >= shard.vocabulary))
    local = labels_n - shard.first
    mine = live & (local >= 0) & (local < p.shape[1])
    at = torch.where(mine, local, 0)[:, None]
    if known_rn4 is None:
        top = p.amax(-1)
        own = torch.where(mine, p.gather(1, at)[:, 0], -torch.inf)
        lifted = (p - top[:, None]).sum(-1) if smoothing else torch.zeros_like(top)
        torch.softmax(p, -1, out=p)
        peak = p.amax(-1)  # at least 1 / v, where the probability of the label may underflow
        if shard.gather is not None:
            local_top, local_peak = top, peak
            top, peak, own, lifted = _combined(shard.gather(torch.stack((top, peak, own, lifted), -1)), p.shape[1])
            p.mul_((torch.exp(local_top - top) * peak / local_peak)[:, None])
    else:
        top, peak, own, lifted = _combined(known_rn4, p.shape[1])
        p.sub_(top[:, None]).exp_().mul_(peak[:, None])
    log_total = -peak.log()
    lse = top + log_total
    if out is not None:
        ce = torch.where(wrong, torch.nan, log_total - (own - top))
        loss = ce - smoothing * (lifted / shard.vocabulary - (own - top)) if smoothing else ce
        if z_loss:
            loss = loss + z_loss * lse.square()
        for into, value in zip(out, (loss, ce), strict=False):
            into.copy_(torch.where(live, value if weights_n is None else value * weights_n, 0.0))
        torch.stack((top, peak, own, lifted), -1, out=out[2])
    if dx_nv is None:
        return
    # The label's own element in fp32, before anything is added to p: in bf16, p - 1 of a sure prediction would be 0.
    own_p = p.gather(1, at)[:, 0]
    growth = 2.0 * z_loss * lse if z_loss else None
    hot = torch.where(wrong, torch.nan, mine.to(p.dtype))
    own_p = own_p - hot + (smoothing * hot - smoothing / shard.vocabulary) + (0.0 if growth is None else growth * own_p)
    factor = weights_n if upstream_n is None else upstream_n if weights_n is None else weights_n * upstream_n
    factor = None if factor is None else factor.to(p.dtype)
    steep = factor if growth is None else 1.0 + growth if factor is None else (1.0 + growth) * factor
    if steep is not None:
        p.mul_(steep[:, None])
    if smoothing:
        p.sub_(smoothing / shard.vocabulary if factor is None else (factor * (smoothing / shard.vocabulary))[:, None])
    if factor is not None:
        own_p *= factor
    if slope is not None:
        own_p *= 1.0 - slope.gather(1, at)[:, 0].square_()
        p.addcmul_(p * slope, slope, value=-1.0)
    if dx_nv is not p:
        dx_nv.copy_(p)
    dx_nv.scatter_(1, at, own_p.to(dx_nv.dtype)[:, None])


def _combined(known_rn4: Tensor, columns: int) -> tuple[Tensor, ...]:
    """The states of whole rows from those of equal shards."""
    if known_rn4.shape[0] == 1:
        return known_rn4[0].unbind(-1)
    tops, peaks, owns, lifts = known_rn4.unbind(-1)
    top = tops.amax(0)
    return top, (torch.exp(tops - top) / peaks).sum(0).reciprocal(), owns.amax(0), (lifts + columns * (tops - top)).sum(0)


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, weights: Tensor | None, terms: Terms) -> Any:
        p = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        loss, ce, states = p.new_empty(x.shape[0]), p.new_empty(x.shape[0]), p.new_empty(x.shape[0], 4)
        lean_rows(p, None, labels, weights, None, None, terms, Shard(0, x.shape[1], None), (loss, ce, states))
        ctx.save_for_backward(x, labels, weights, states)
        ctx.terms = terms
        ctx.mark_non_differentiable(ce)
        return loss, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Any) -> Any:
        x, labels, weights, states = ctx.saved_tensors
        p = x.to(states.dtype, copy=True)
        lean_rows(p, p, labels, weights, dloss * ctx.terms.scale, states[None], ctx.terms, Shard(0, x.shape[1], None), None)
        return p.masked_fill_((labels == ctx.terms.ignore)[:, None], 0.0).to(x.dtype), None, None, None


def lean(
    logits_nv: Tensor,
    labels_n: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    ignore: int = IGNORE,
    label_smoothing: float = 0.0,
    weights_n: Tensor | None = None,
    reduction: str = "sum",
) -> tuple[Tensor, Tensor]:
    """As `reference` with the backward written out: keeps the logits and four numbers per row."""
    checked(reduction, weights_n)
    loss, ce = _Lean.apply(logits_nv, labels_n, weights_n, Terms(softcap, scale, z_loss, label_smoothing, ignore))  # type: ignore[misc]
    return reduced(loss, ce, labels_n, weights_n, ignore, reduction)


# Fused. Floor in bytes per bf16 logit: 2 forward, 4 backward; 4 where both are one launch over a chunk that may be overwritten, as the loss of a model
# is (8192 x 128,256: 4.2 GB, 0.98 ms at 4.3 TB/s). That launch reads each row twice, and is laid out so that the second read comes from L2: with 32 warps
# two programs share a multiprocessor, 264 rows of 257 KB are under way on an H200, of which at any time half is still needed (34 of L2's 60 MB); what is
# read first is marked to stay and what is read or written last to go, and the second pass runs backwards, what was read last being the surest to be
# there. 16,384 columns a step are 32 KB in flight per program. Each thread keeps a maximum and a sum of its own, over groups of 16 bytes of logits, so the
# loop has no barrier, and 9 exponentials per 8 logits; a logit takes 8.6 instructions in the first pass and 8.2 in the second (with a cap 30 and 29), of
# which a multiprocessor issues 128 a cycle: 0.30 ms for 4096 x 128,256 beside 0.49 ms of traffic (with a cap 1.05 ms).
SPACE: dict[str, list[dict[str, int]]] = {
    "cross_entropy.fused": [
        {"rows": rows, "block": block, "warps": warps}
        for rows, block, warps in (
            (32, 64, 4), (16, 128, 4), (4, 512, 4), (4, 1024, 4), (2, 2048, 4), (1, 1024, 2), (1, 1024, 4), (1, 2048, 4), (1, 2048, 8), (1, 4096, 4),
            (1, 4096, 8), (1, 4096, 16), (1, 8192, 8), (1, 8192, 16), (1, 16384, 16), (1, 8192, 32), (1, 16384, 32), (1, 32768, 32),
        )
    ]
}  # fmt: skip
SPACE["cross_entropy.scan"] = SPACE["cross_entropy.grad"] = SPACE["cross_entropy.fused"]


LOG2_E = math.log2(math.e)


@triton.jit
def _tanh(u):
    # Below 1 the continued fraction's 7th convergent (relative error 3e-11), above it exponentials, where 1 - exp(-2 u) cancels nothing: the difference
    # alone would err by 3e-8 near 0, and times the cap that is more than a logit's own rounding. The root of the square is a division in 3 instructions.
    a = tl.abs(u)
    s = u * u
    e = tl.exp2(-2.8853900817779268 * a)
    low = a < 1.0
    over = tl.where(low, a * (135135.0 + s * (17325.0 + s * (378.0 + s))), 1.0 - e)
    under = tl.where(low, 135135.0 + s * (62370.0 + s * (3150.0 + s * 28.0)), 1.0 + e)
    t = over * tl.rsqrt(under * under)
    return tl.where(u < 0.0, -t, t)


@triton.jit
def _rows(
    X, DX, LABELS, WEIGHTS, UPSTREAM, KNOWN, LOSS, CE, STATES, rows, columns, width, x_stride, dx_stride, first, vocabulary, ranks, ignore,
    softcap, inner, unit, steep, smoothing, z_loss, SCAN: tl.constexpr, VALUE: tl.constexpr, GRAD: tl.constexpr, PLAIN: tl.constexpr,
    CAP: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr, FIRST: tl.constexpr,
    RANKS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # y is x where scale is positive and there is no cap (PLAIN: two multiplications fewer), else l; l = unit * y, exp(l) = 2 ** (steep * y). Differences
    # are taken before they are multiplied, so that a common offset cancels exactly.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    label = tl.load(LABELS + row, mask=there, other=ignore).to(tl.int64)
    live = there & (label != ignore)
    wrong = live & ((label < 0) | (label >= vocabulary))
    local = label - first
    mine = live & (local >= 0) & (local < columns)
    begin = X + row.to(tl.int64) * x_stride
    lane = tl.arange(0, LANES)[None, :, None] * WIDE + tl.arange(0, WIDE)[None, None, :]
    blocks = tl.cdiv(columns, LANES * WIDE)
    if SCAN:
        own = tl.load(begin + local, mask=mine, other=0.0).to(tl.float32)
        pivot = tl.load(begin, mask=live, other=0.0).to(tl.float32)
        if CAP:
            own = softcap * _tanh(own * inner)
            pivot = softcap * _tanh(pivot * inner)
        elif not PLAIN:
            own *= inner
            pivot *= inner
        own = tl.where(mine, own, float("-inf"))
        pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
        tops = tl.full([ROWS, LANES], -3.0e38, tl.float32)  # finite: a masked logit, minus infinity, less it is not NaN
        totals = tl.zeros([ROWS, LANES], tl.float32)
        lifts = tl.zeros([ROWS, LANES], tl.float32)
        for block in range(blocks * tl.max(live.to(tl.int32), 0)):  # rows without a label are not read
            column = block * (LANES * WIDE) + lane
            inside = live[:, None, None] & (column < width)
            x = tl.load(begin[:, None, None] + column, mask=inside, other=float("-inf"), eviction_policy=FIRST)  # type: ignore[arg-type]
            y = x.to(tl.float32)
            if not PLAIN:
                y *= inner
                if CAP:
                    y = softcap * _tanh(y)
                y = tl.where(column < columns, y, float("-inf"))
            if SMOOTH:
                lifts += tl.sum(tl.where(column < columns, y - pivot[:, None, None], 0.0), 2)
            high = tl.maximum(tops, tl.max(y, 2))
            totals = totals * tl.exp2((tops - high) * steep) + tl.sum(tl.exp2((y - high[:, :, None]) * steep), 2)
            tops = high
        top = tl.where(live, tl.max(tops, 1), 0.0)
        total = tl.sum(totals * tl.exp2((tops - top[:, None]) * steep), 1)
        lifted = tl.sum(lifts, 1) + columns * (pivot - top)
    else:
        rank = tl.arange(0, RANKS)[None, :]
        state = KNOWN + (rank.to(tl.int64) * rows + row[:, None]) * 4
        known = live[:, None] & (rank < ranks)
        tops = tl.load(state, mask=known, other=-3.0e38)
        top = tl.where(live, tl.max(tops, 1), 0.0)
        total = tl.sum(tl.load(state + 1, mask=known, other=0.0) * tl.exp2((tops - top[:, None]) * steep), 1)
        own = tl.max(tl.load(state + 2, mask=known, other=float("-inf")), 1)
        lifted = tl.sum(tl.load(state + 3, mask=known, other=0.0) + columns * tl.where(known, tops - top[:, None], 0.0), 1)
    total = tl.where(live, total, 1.0)
    log_total = tl.log(total)
    lse = top * unit + log_total
    factor = tl.full([ROWS], 1.0, tl.float32)
    if WEIGHTED:
        factor = tl.load(WEIGHTS + row, mask=there, other=0.0)
    if SCAN or VALUE:
        state = STATES + row.to(tl.int64) * 4
        tl.store(state, top, mask=there)
        tl.store(state + 1, total, mask=there)
        tl.store(state + 2, own, mask=there)
        tl.store(state + 3, lifted, mask=there)
    if VALUE:
        ce = tl.where(wrong, float("nan"), log_total - (own - top) * unit)
        loss = ce
        if SMOOTH:
            loss -= smoothing * (lifted / vocabulary - (own - top)) * unit
        if Z:
            loss += z_loss * lse * lse
        tl.store(LOSS + row, tl.where(live, factor * loss, 0.0), mask=there)
        tl.store(CE + row, tl.where(live, factor * ce, 0.0), mask=there)
    if GRAD:
        if SCALED:
            factor *= tl.load(UPSTREAM + row, mask=there, other=0.0)
        factor = tl.where(wrong, float("nan"), tl.where(live, factor, 0.0))
        growth = factor / total
        if Z:
            growth *= 1.0 + 2.0 * z_loss * lse
        even = factor * (smoothing / vocabulary)
        into = DX + row.to(tl.int64) * dx_stride
        for back in range(blocks):
            column = (blocks - 1 - back) * (LANES * WIDE) + lane
            inside = column < width
            x = tl.load(begin[:, None, None] + column, mask=live[:, None, None] & inside, other=0.0, eviction_policy="evict_first")
            y = x.to(tl.float32)
            if not PLAIN:
                y *= inner
            t = y
            if CAP:
                t = _tanh(y)
                y = softcap * t
            g = tl.exp2((y - top[:, None, None]) * steep) * growth[:, None, None]
            if SMOOTH:
                g -= even[:, None, None]
            if CAP:
                g *= 1.0 - t * t
            g = g.to(DX.dtype.element_ty)
            tl.store(into[:, None, None] + column, g, mask=there[:, None, None] & inside, eviction_policy="evict_first")
        # The label's own element again, p - 1 in fp32 before the one rounding (in bf16 it would be 0 for a sure prediction), when all threads have
        # stored: one store a row, where a comparison would be three instructions an element of about eight.
        p = tl.exp2((own - top) * steep) / total
        g = p - 1.0
        if SMOOTH:
            g += smoothing - smoothing / vocabulary
        if Z:
            g += 2.0 * z_loss * lse * p
        g *= factor
        if CAP:
            t = own / softcap
            g *= 1.0 - t * t
        tl.debug_barrier()
        tl.store(into + local, g.to(DX.dtype.element_ty), mask=mine)


def fused_rows(
    x_nv: Tensor, dx_nv: Tensor | None, labels_n: Tensor, weights_n: Tensor | None, upstream_n: Tensor | None, known_rn4: Tensor | None,
    terms: Terms, shard: Shard, out: tuple[Tensor, Tensor, Tensor] | None, width: int | None = None,
) -> None:  # fmt: skip
    """As `lean_rows`, in one launch, or around `shard.gather` in two; the logits stay unless `dx_nv` is their tensor. Rows without a label get 0.

    Columns up to `width` are read and written, as minus infinities: rows padded to 16 elements move 16 bytes at a time whatever the vocabulary.
    """
    run = functools.partial(_run, x_nv, labels_n, weights_n, upstream_n, terms, shard, width or x_nv.shape[1])
    if known_rn4 is not None or shard.gather is None:
        run(dx_nv, known_rn4, out, scan=known_rn4 is None, value=known_rn4 is None)
        return
    assert out is not None
    run(None, None, out, scan=True, value=False)
    run(dx_nv, shard.gather(out[2]), out, scan=False, value=True)


def _run(
    x: Tensor, labels: Tensor, weights: Tensor | None, upstream: Tensor | None, terms: Terms, shard: Shard, width: int, dx: Tensor | None,
    known: Tensor | None, out: tuple[Tensor, Tensor, Tensor] | None, *, scan: bool, value: bool,
) -> None:  # fmt: skip
    n, v = x.shape
    tuned = launch.configuration(x, "cross_entropy." + ("scan" if dx is None else "fused" if scan else "grad"), v)
    wide = 16 // x.itemsize
    loss, ce, states = out or (labels, labels, labels)
    ranks = 1 if known is None else known.shape[0]
    plain = terms.softcap is None and terms.scale > 0
    cap, unit = terms.softcap or 1.0, terms.scale if plain else 1.0
    launch.launch(
        _rows, (-(-n // tuned["rows"]),), x, x if dx is None else dx, labels, labels if weights is None else weights,
        labels if upstream is None else upstream, labels if known is None else known, loss, ce, states, n, v, width, x.stride(0),
        0 if dx is None else dx.stride(0), shard.first, shard.vocabulary, ranks, terms.ignore, cap, terms.scale / cap, unit, unit * LOG2_E,
        terms.smoothing, terms.z_loss, SCAN=scan, VALUE=value, GRAD=dx is not None, PLAIN=plain, CAP=terms.softcap is not None,
        SMOOTH=terms.smoothing != 0, Z=terms.z_loss != 0, WEIGHTED=weights is not None, SCALED=upstream is not None,
        FIRST="evict_last" if scan and dx is not None else "evict_first", RANKS=launch.block(ranks), ROWS=tuned["rows"],
        LANES=max(1, min(tuned["block"], launch.block(v)) // wide), WIDE=wide, warps=tuned["warps"],
    )  # fmt: skip


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _run_forward(x: Tensor, labels: Tensor, weights: Tensor | None, *terms: Any) -> tuple[Tensor, Tensor, Tensor]:
    x2 = launch.rows(x)
    out = _like_forward(x)
    fused_rows(x2, None, labels.contiguous(), _contiguous(weights), None, None, Terms(*terms), Shard(0, x2.shape[1], None), out)
    return out


def _like_forward(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[0]
    return x.new_empty(n, dtype=torch.float32), x.new_empty(n, dtype=torch.float32), x.new_empty(n, 4, dtype=torch.float32)


def _run_backward(dloss: Tensor, x: Tensor, labels: Tensor, weights: Tensor | None, states: Tensor, *terms: Any) -> Tensor:
    x2 = launch.rows(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    known = Terms(*terms)
    upstream = dloss * known.scale
    fused_rows(
        x2, dx, labels.contiguous(), _contiguous(weights), upstream.contiguous(), states[None], known, Shard(0, x2.shape[1], None), None
    )
    return dx


TERMS = "float? softcap, float scale, float z_loss, float smoothing, int ignore"
_forward = launch.operator(
    f"cross_entropy(Tensor x, Tensor labels, Tensor? weights, {TERMS}) -> (Tensor, Tensor, Tensor)", _run_forward, _like_forward
)
_backward = launch.operator(
    f"cross_entropy_backward(Tensor dloss, Tensor x, Tensor labels, Tensor? weights, Tensor states, {TERMS}) -> Tensor",
    _run_backward,
    lambda dloss, x, *_: x.new_empty(x.shape),
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, labels, weights, *ctx.terms = inputs
    _, ce, states = output
    ctx.save_for_backward(x, labels, weights, states)
    ctx.mark_non_differentiable(ce, states)
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dloss: Tensor | None, *_: Any) -> Any:
    dx = None
    if dloss is not None:
        x, labels, weights, states = ctx.saved_tensors
        dx = _backward(dloss, x, labels, weights, states, *ctx.terms)
    return dx, *(None,) * 7


_call = launch.differentiable(_forward, _save, _grads)


def supports(logits_nv: Tensor, labels_n: Tensor, weights_n: Tensor | None = None) -> str | None:
    """Why the fused kernels cannot take these tensors; None: they can."""
    if why := launch.missing(logits_nv):
        return why
    if logits_nv.dtype not in launch.FLOATS or labels_n.dtype not in (torch.int64, torch.int32):
        return f"logits must be bf16, fp16 or fp32 and labels integers, not {logits_nv.dtype} and {labels_n.dtype}"
    if weights_n is not None and weights_n.dtype != torch.float32:
        return f"weights_n must be fp32, not {weights_n.dtype}"
    fit = logits_nv.ndim == 2 and labels_n.shape == logits_nv.shape[:1] and (weights_n is None or weights_n.shape == labels_n.shape)
    return None if fit and logits_nv.shape[1] else f"logits {tuple(logits_nv.shape)}, labels {tuple(labels_n.shape)} and weights do not fit"


def fused(
    logits_nv: Tensor,
    labels_n: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    ignore: int = IGNORE,
    label_smoothing: float = 0.0,
    weights_n: Tensor | None = None,
    reduction: str = "sum",
) -> tuple[Tensor, Tensor]:
    """As `reference` in one Triton launch each way; keeps the logits and four numbers per row. Raises KernelError where `supports` says no."""
    checked(reduction, weights_n)
    if why := supports(logits_nv, labels_n, weights_n):
        raise KernelError(f"cross_entropy: {why}; call cross_entropy.lean")
    loss, ce, _ = _call(logits_nv, labels_n, weights_n, softcap, scale, z_loss, label_smoothing, ignore)
    return reduced(loss, ce, labels_n, weights_n, ignore, reduction)


def cross_entropy(logits_nv: Tensor, labels_n: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`fused` on a GPU, `lean` on a CPU; options as theirs."""
    return (fused if logits_nv.is_cuda else lean)(logits_nv, labels_n, **options)


def normal(*shape: int, std: float, dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers; where launches are only recorded, undefined ones, so that gigabytes of them cost nothing."""
    if launch._recording is not None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=device).mul_(std)


def drawn(n: int, v: int, device: str) -> Tensor:
    """Labels for `n` rows, a fifth of them without."""
    labels = torch.randint(0, v, (n,), device=device)
    if n > 1:
        labels[:: max(2, n // 5)] = IGNORE
    return labels


def _sample(case: Any, device: str) -> launch.Sample:
    n, v, softcap, scale, z_loss, smoothing, reduction, dtype = case
    labels = drawn(n, v, device)
    weights = torch.rand(n, device=device) + 0.5 if smoothing else None

    def call(f: Any, x: Tensor) -> Any:
        return f(
            x, labels, softcap=softcap, scale=scale, z_loss=z_loss, label_smoothing=smoothing, weights_n=weights, reduction=reduction
        )  # fmt: skip

    return [normal(n, v, std=3.0, dtype=dtype, device=device)], call


def _traffic(case: Any) -> launch.Traffic:
    n, v, *_, dtype = case
    return launch.Traffic(float(n * v * dtype.itemsize), 2.0 * n * v * dtype.itemsize)


OPERATIONS = {"cross_entropy": launch.Operation({"reference": reference, "lean": lean, "fused": fused}, CASES, SIZES, _sample, _traffic)}
