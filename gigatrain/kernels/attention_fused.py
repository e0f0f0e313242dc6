"""Attention in Triton: what torch's kernels lack, documents, windows, soft-caps, sinks and values of another width, and never an atomic sum.

    a = scale * q . k, or softcap * tanh(scale * q . k / softcap)        p = 2 ** (a / ln 2 - lse)        out = p v
    lse = log2(sum over the visible keys of e ** a, and e ** sink), in bits

The backward reads out and lse and makes the scores again, twice: once for each block of keys, once for each block of queries. So every sum has one owner
and one order, and two runs are equal to the bit; it costs 7 products where a kernel with atomic sums has 5.
    delta = dout . out        ds = p (dout . v - delta), times 1 - tanh ** 2        dq = scale ds k        dk = scale ds' q        dv = p' dout
    dsink = - sum over queries of 2 ** (sink / ln 2 - lse) * delta

Legend: q_bthd, k_btkd, v_btke as in attention.py, of any strides with channels last; first_bt, stop_bt: attention_mask.py. M queries and N keys of a block.
Blocks of keys that a block of queries does not see are not visited; those that it sees whole are computed without a mask. Floor: 4 b h t t' d products forward,
of t' visible keys (t / 2 where causal), and 10 in the backward; here 14.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gigatrain.errors import KernelError
from gigatrain.kernels import launch
from gigatrain.kernels.attention_mask import Mask, bounds
from gigatrain.kernels.cross_entropy import _tanh
from gigatrain.kernels.launch import tl, triton

LOG2_E = math.log2(math.e)
WIDEST = 256  # channels: more do not fit into the registers of a block
# What a tuner tries; sizes in the tables are bytes of a row of channels, filled up to a power of two.
SPACE = {
    "attention.forward": [
        {"queries": queries, "keys": keys, "warps": warps, "stages": stages}
        for queries in (32, 64, 128)
        for keys in (32, 64, 128)
        for warps in (4, 8)
        for stages in (1, 2, 3, 4)
    ],
    "attention.backward_keys": [
        {"queries": queries, "keys": keys, "warps": warps, "stages": stages}
        for queries in (16, 32, 64, 128)
        for keys in (32, 64, 128)
        for warps in (4, 8)
        for stages in (1, 2, 3)
    ],
    "attention.backward_queries": [
        {"queries": queries, "keys": keys, "warps": warps, "stages": stages}
        for queries in (32, 64, 128)
        for keys in (16, 32, 64, 128)
        for warps in (4, 8)
        for stages in (1, 2, 3)
    ],
}


@triton.jit
def _tile(X, start, stride, rows, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    # ROWS rows of channels from `start` on, zeros beyond `rows` (WHOLE: there are none) and beyond the channels. The tile's place is counted in 64
    # bits, places within it in 32 (`_near` sees to it), which is what keeps their registers few.
    row = start + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    at = X + tl.cast(start, tl.int64) * stride + (tl.arange(0, ROWS)[:, None] * stride + channel[None])
    if WHOLE:
        if CHANNELS == WIDTH:
            return tl.load(at)
        return tl.load(at, mask=(channel < CHANNELS)[None], other=0.0)
    return tl.load(at, mask=(row < rows)[:, None] & (channel < CHANNELS)[None], other=0.0)


@triton.jit
def _numbers(X, i, tokens, other, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(X + i)
    return tl.load(X + i, mask=i < tokens, other=other)


@triton.jit
def _keep(X, start, stride, rows, x, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row = start + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    live = (row < rows)[:, None] & (channel < CHANNELS)[None]
    tl.store(
        X + tl.cast(start, tl.int64) * stride + (tl.arange(0, ROWS)[:, None] * stride + channel[None]), x.to(X.dtype.element_ty), mask=live
    )


@triton.jit
def _seen(i, j, first, BOUNDED: tl.constexpr):
    if BOUNDED:
        return (j <= i) & (j >= first)
    return j <= i


@triton.jit
def _ranges(FIRST, begin, tokens, M: tl.constexpr, N: tl.constexpr, BOUNDED: tl.constexpr):
    # Of a block of queries: keys low..inner are seen in part, inner..outer whole, outer..high in part; but for high all are multiples of N.
    high = tl.minimum(begin + M, tokens)
    outer = (begin + 1) // N * N
    low = 0
    inner = 0
    if BOUNDED:
        low = tl.load(FIRST + begin) // N * N
        inner = tl.minimum((tl.load(FIRST + high - 1) + N - 1) // N * N, tl.maximum(outer, low))
        outer = tl.maximum(outer, low)
    return low, inner, outer, high


@triton.jit
def _forward_part(
    acc, total, most, q, K, V, low, high, i, first, tokens, k_stride, v_stride, inner, factor, CHANNELS: tl.constexpr, D: tl.constexpr,
    VALUES: tl.constexpr, E: tl.constexpr, N: tl.constexpr, CAP: tl.constexpr, HIDE: tl.constexpr, BOUNDED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, N):
        k = _tile(K, start, k_stride, tokens, CHANNELS, D, N, EVEN or not HIDE)  # type: ignore[arg-type]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CAP:
            s = _tanh(s * inner)
        if HIDE:
            j = start + tl.arange(0, N)
            s = tl.where(_seen(i[:, None], j[None], first[:, None], BOUNDED), s, float("-inf"))
        higher = tl.maximum(most, tl.max(s, 1) * factor)
        pivot = higher
        if HIDE:
            pivot = tl.where(higher == float("-inf"), 0.0, higher)  # of a query that has seen nothing yet
        p = tl.exp2(s * factor - pivot[:, None])
        fade = tl.exp2(most - pivot)
        total = total * fade + tl.sum(p, 1)
        v = _tile(V, start, v_stride, tokens, VALUES, E, N, EVEN or not HIDE)  # type: ignore[arg-type]
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        most = higher
    return acc, total, most


@triton.jit
def _forward(
    Q, K, V, SINKS, FIRST, OUT, LSE, tokens, heads, group, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    first_batch, inner, factor, CHANNELS: tl.constexpr, D: tl.constexpr, VALUES: tl.constexpr, E: tl.constexpr, CAP: tl.constexpr,
    SINK: tl.constexpr, BOUNDED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    # The last block of queries sees most and begins first; one block of all heads runs at a time, so that their keys stay in L2.
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    Q += b * q_batch + h.to(tl.int64) * q_head
    K += b * k_batch + (h // group).to(tl.int64) * k_head
    V += b * v_batch + (h // group).to(tl.int64) * v_head
    i = begin + tl.arange(0, M)
    first = i
    if BOUNDED:
        FIRST += b * first_batch
        first = _numbers(FIRST, i, tokens, 0, EVEN)
    q = _tile(Q, begin, q_token, tokens, CHANNELS, D, M, EVEN)
    acc = tl.zeros([M, E], tl.float32)
    if SINK:  # as if it had been seen: it takes weight and gives no value
        most = tl.zeros([M], tl.float32) + tl.load(SINKS + h).to(tl.float32) * 1.4426950408889634
        total = tl.full([M], 1.0, tl.float32)
    else:
        most = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
    low, within, outer, high = _ranges(FIRST, begin, tokens, M, N, BOUNDED)
    if BOUNDED:
        acc, total, most = _forward_part(
            acc, total, most, q, K, V, low, within, i, first, tokens, k_token, v_token, inner, factor,
            CHANNELS, D, VALUES, E, N, CAP, True, BOUNDED, EVEN,  # type: ignore[arg-type]
            PRECISION,
        )  # fmt: skip
    acc, total, most = _forward_part(
        acc, total, most, q, K, V, within, outer, i, first, tokens, k_token, v_token, inner, factor,
        CHANNELS, D, VALUES, E, N, CAP, False, BOUNDED, EVEN,  # type: ignore[arg-type]
        PRECISION,
    )  # fmt: skip
    acc, total, most = _forward_part(
        acc, total, most, q, K, V, outer, high, i, first, tokens, k_token, v_token, inner, factor,
        CHANNELS, D, VALUES, E, N, CAP, True, BOUNDED, EVEN,  # type: ignore[arg-type]
        PRECISION,
    )  # fmt: skip
    OUT += (b * tokens * heads + h) * VALUES
    _keep(OUT, begin, heads * VALUES, tokens, acc / total[:, None], VALUES, E, M)
    tl.store(LSE + (b * heads + h) * tokens + i, most + tl.log2(total), mask=i < tokens)


@triton.jit
def _delta(
    OUT,
    DOUT,
    DELTA,
    rows,
    tokens,
    heads,
    batch_stride,
    token_stride,
    head_stride,
    VALUES: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # of [b, t, h]
    channel = tl.arange(0, E)
    live = (row < rows)[:, None] & (channel < VALUES)[None]
    h = row % heads
    t = row // heads % tokens
    b = row // heads // tokens
    out = tl.load(OUT + row[:, None] * VALUES + channel[None], mask=live, other=0.0).to(tl.float32)
    at = b * batch_stride + t * token_stride + h * head_stride
    dout = tl.load(DOUT + at[:, None] + channel[None], mask=live, other=0.0).to(tl.float32)
    tl.store(DELTA + (b * heads + h) * tokens + t, tl.sum(out * dout, 1), mask=row < rows)


@triton.jit
def _keys_part(
    dk, dv, k, v, Q, DOUT, LSE, DELTA, FIRST, low, high, j, tokens, q_stride, d_stride, inner, factor, CHANNELS: tl.constexpr,
    D: tl.constexpr, VALUES: tl.constexpr, E: tl.constexpr, M: tl.constexpr, CAP: tl.constexpr, HIDE: tl.constexpr, BOUNDED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, M):
        i = start + tl.arange(0, M)
        q = _tile(Q, start, q_stride, tokens, CHANNELS, D, M, EVEN)
        lse = _numbers(LSE, i, tokens, float("inf"), EVEN)  # beyond the last query p is 0
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if CAP:
            s = _tanh(s * inner)
        p = tl.exp2(s * factor - lse[None])
        if HIDE:
            first = i
            if BOUNDED:
                first = _numbers(FIRST, i, tokens, 0, EVEN)
            p = tl.where(_seen(i[None], j[:, None], first[None], BOUNDED), p, 0.0)
        dout = _tile(DOUT, start, d_stride, tokens, VALUES, E, M, EVEN)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        delta = _numbers(DELTA, i, tokens, 0.0, EVEN)
        ds = p * (dp - delta[None])
        if CAP:
            ds *= 1.0 - s * s
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _backward_keys(
    Q, K, V, DOUT, LSE, DELTA, FIRST, STOP, DK, DV, tokens, heads, key_heads, group, q_batch, q_token, q_head, k_batch, k_token, k_head,
    v_batch, v_token, v_head, d_batch, d_token, d_head, first_batch, inner, factor, scale, CHANNELS: tl.constexpr, D: tl.constexpr,
    VALUES: tl.constexpr, E: tl.constexpr, CAP: tl.constexpr, BOUNDED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    # One block of keys of one key head: all queries that see any of it, of all heads that share it. The first block is seen by most and begins first.
    begin = tl.program_id(1) * N
    b = (tl.program_id(0) // key_heads).to(tl.int64)
    own = (tl.program_id(0) % key_heads).to(tl.int64)
    j = begin + tl.arange(0, N)
    k = _tile(K + b * k_batch + own * k_head, begin, k_token, tokens, CHANNELS, D, N, EVEN)
    v = _tile(V + b * v_batch + own * v_head, begin, v_token, tokens, VALUES, E, N, EVEN)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, E], tl.float32)
    # Queries low..near see the block in part, near..high whole; with bounds they are asked one by one: a third loop and its registers spilled 136 times.
    low = begin // M * M
    near = (begin + N + M - 1) // M * M
    high = tokens
    if BOUNDED:
        FIRST += b * first_batch
        STOP += b * first_batch
        high = tl.load(STOP + tl.minimum(begin + N, tokens) - 1)
    for member in range(group):
        h = own * group + member
        Q_h = Q + b * q_batch + h * q_head
        DOUT_h = DOUT + b * d_batch + h * d_head
        LSE_h = LSE + (b * heads + h) * tokens
        DELTA_h = DELTA + (b * heads + h) * tokens
        if BOUNDED:
            dk, dv = _keys_part(
                dk, dv, k, v, Q_h, DOUT_h, LSE_h, DELTA_h, FIRST, low, high, j, tokens, q_token, d_token, inner, factor, CHANNELS, D, VALUES,
                E, M, CAP, True, BOUNDED, EVEN, PRECISION,  # type: ignore[arg-type]
            )  # fmt: skip
        else:
            dk, dv = _keys_part(
                dk, dv, k, v, Q_h, DOUT_h, LSE_h, DELTA_h, FIRST, low, tl.minimum(near, high), j, tokens, q_token, d_token, inner, factor, CHANNELS, D,
                VALUES, E, M, CAP, True, BOUNDED, EVEN, PRECISION,  # type: ignore[arg-type]
            )  # fmt: skip
            dk, dv = _keys_part(
                dk, dv, k, v, Q_h, DOUT_h, LSE_h, DELTA_h, FIRST, near, high, j, tokens, q_token, d_token, inner, factor, CHANNELS, D, VALUES,
                E, M, CAP, False, BOUNDED, EVEN, PRECISION,  # type: ignore[arg-type]
            )  # fmt: skip
    at = b * tokens * key_heads + own
    _keep(DK + at * CHANNELS, begin, key_heads * CHANNELS, tokens, dk * scale, CHANNELS, D, N)
    _keep(DV + at * VALUES, begin, key_heads * VALUES, tokens, dv, VALUES, E, N)


@triton.jit
def _queries_part(
    dq, q, dout, lse, delta, K, V, low, high, i, first, tokens, k_stride, v_stride, inner, factor, CHANNELS: tl.constexpr, D: tl.constexpr,
    VALUES: tl.constexpr, E: tl.constexpr, N: tl.constexpr, CAP: tl.constexpr, HIDE: tl.constexpr, BOUNDED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, N):
        k = _tile(K, start, k_stride, tokens, CHANNELS, D, N, EVEN or not HIDE)  # type: ignore[arg-type]
        v = _tile(V, start, v_stride, tokens, VALUES, E, N, EVEN or not HIDE)  # type: ignore[arg-type]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CAP:
            s = _tanh(s * inner)
        p = tl.exp2(s * factor - lse[:, None])
        if HIDE:
            j = start + tl.arange(0, N)
            p = tl.where(_seen(i[:, None], j[None], first[:, None], BOUNDED), p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if CAP:
            ds *= 1.0 - s * s
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _backward_queries(
    Q, K, V, DOUT, LSE, DELTA, FIRST, DQ, tokens, heads, group, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    d_batch, d_token, d_head, first_batch, inner, factor, scale, CHANNELS: tl.constexpr, D: tl.constexpr, VALUES: tl.constexpr,
    E: tl.constexpr, CAP: tl.constexpr, BOUNDED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    begin = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = tl.program_id(0) % heads
    K += b * k_batch + (h // group).to(tl.int64) * k_head
    V += b * v_batch + (h // group).to(tl.int64) * v_head
    i = begin + tl.arange(0, M)
    first = i
    if BOUNDED:
        FIRST += b * first_batch
        first = _numbers(FIRST, i, tokens, 0, EVEN)
    q = _tile(Q + b * q_batch + h.to(tl.int64) * q_head, begin, q_token, tokens, CHANNELS, D, M, EVEN)
    dout = _tile(DOUT + b * d_batch + h.to(tl.int64) * d_head, begin, d_token, tokens, VALUES, E, M, EVEN)
    lse = _numbers(LSE + (b * heads + h) * tokens, i, tokens, float("inf"), EVEN)
    delta = _numbers(DELTA + (b * heads + h) * tokens, i, tokens, 0.0, EVEN)
    dq = tl.zeros([M, D], tl.float32)
    low, within, outer, high = _ranges(FIRST, begin, tokens, M, N, BOUNDED)
    if BOUNDED:
        dq = _queries_part(
            dq, q, dout, lse, delta, K, V, low, within, i, first, tokens, k_token, v_token, inner, factor,
            CHANNELS, D, VALUES, E, N, CAP, True, BOUNDED, EVEN,  # type: ignore[arg-type]
            PRECISION,
        )  # fmt: skip
    dq = _queries_part(
        dq, q, dout, lse, delta, K, V, within, outer, i, first, tokens, k_token, v_token, inner, factor,
        CHANNELS, D, VALUES, E, N, CAP, False, BOUNDED, EVEN,  # type: ignore[arg-type]
        PRECISION,
    )  # fmt: skip
    dq = _queries_part(
        dq, q, dout, lse, delta, K, V, outer, high, i, first, tokens, k_token, v_token, inner, factor,
        CHANNELS, D, VALUES, E, N, CAP, True, BOUNDED, EVEN,  # type: ignore[arg-type]
        PRECISION,
    )  # fmt: skip
    _keep(DQ + (b * tokens * heads + h) * CHANNELS, begin, heads * CHANNELS, tokens, dq * scale, CHANNELS, D, M)


def _near(x: Tensor) -> Tensor:
    """x with unit stride along its channels, and 128 tokens within 2 ** 31 elements: a view wherever the layout allows it, else a copy."""
    return x if (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(1) < 1 << 24 else x.contiguous()


def _width(channels: int) -> int:
    return max(16, launch.block(channels))  # a tensor core's product has 16 at least


def _terms(scale: float, softcap: float | None) -> tuple[float, float]:
    """`(inner, factor)`: a score in bits is factor * s, or factor * tanh(inner * s)."""
    return (scale, scale * LOG2_E) if softcap is None else (scale / softcap, softcap * LOG2_E)


def _constants(q: Tensor, v: Tensor, softcap: float | None, first: Tensor | None, tuned: dict[str, int]) -> dict[str, Any]:
    (_, t, _, d), e = q.shape, v.shape[-1]
    exact = "ieee" if q.dtype == torch.float32 else "tf32"  # of 16-bit inputs it says nothing
    return {
        "CHANNELS": d, "D": _width(d), "VALUES": e, "E": _width(e), "CAP": softcap is not None, "BOUNDED": first is not None, "PRECISION": exact,
        "EVEN": t % max(tuned["queries"], tuned["keys"]) == 0, "M": tuned["queries"], "N": tuned["keys"],
    }  # fmt: skip


def _tuned(q: Tensor, v: Tensor, kernel: str) -> dict[str, int]:
    return launch.configuration(q, kernel, _width(max(q.shape[-1], v.shape[-1])) * q.element_size())


def _rows_apart(first: Tensor | None) -> int:
    """The batch stride of the bounds: 0 where all rows have the same."""
    return 0 if first is None or first.shape[0] == 1 else first.shape[1]


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, first: Tensor | None, stop: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    q, k, v = _near(q), _near(k), _near(v)
    b, t, h, _ = q.shape
    out = torch.empty(b, t, h, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, t, dtype=torch.float32, device=q.device)
    tuned, (inner, factor) = _tuned(q, v, "attention.forward"), _terms(scale, softcap)
    launch.launch(
        _forward, (b * h, -(-t // tuned["queries"])), q, k, v, sinks, first, out, lse, t, h, h // k.shape[2], *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], _rows_apart(first), inner, factor, **_constants(q, v, softcap, first, tuned), SINK=sinks is not None,
        warps=tuned["warps"], stages=tuned["stages"],
    )  # fmt: skip
    return out, lse


def _run_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, first: Tensor | None, stop: Tensor | None, out: Tensor, lse: Tensor,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, dout = _near(q), _near(k), _near(v), _near(dout)
    (b, t, h, _), kv = q.shape, k.shape[2]
    delta = torch.empty_like(lse)
    width = _width(v.shape[-1])
    # 4,096 elements: 16 of a thread in 8 warps, two tensors in flight.
    rows, height = b * t * h, max(1, 4096 // width)
    launch.launch(
        _delta, (-(-rows // height),), out, dout, delta, rows, t, h, *dout.stride()[:3], VALUES=v.shape[-1], E=width, ROWS=height, warps=8,
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    inner, factor = _terms(scale, softcap)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], _rows_apart(first))
    tuned = _tuned(q, v, "attention.backward_keys")
    launch.launch(
        _backward_keys, (b * kv, -(-t // tuned["keys"])), q, k, v, dout, lse, delta, first, stop, dk, dv, t, h, kv, h // kv, *strides, inner, factor, scale,
        **_constants(q, v, softcap, first, tuned), warps=tuned["warps"], stages=tuned["stages"],
    )  # fmt: skip
    tuned = _tuned(q, v, "attention.backward_queries")
    launch.launch(
        _backward_queries, (b * h, -(-t // tuned["queries"])), q, k, v, dout, lse, delta, first, dq, t, h, h // kv, *strides, inner, factor, scale,
        **_constants(q, v, softcap, first, tuned), warps=tuned["warps"], stages=tuned["stages"],
    )  # fmt: skip
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    weight = torch.exp2(sinks.float()[None, :, None] * LOG2_E - lse)
    return dq, dk, dv, -(weight * delta).sum((0, 2)).to(sinks.dtype)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    b, t, h, _d = q.shape
    return q.new_empty(b, t, h, v.shape[-1]), q.new_empty(b, h, t, dtype=torch.float32)


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


_attention_backward = launch.operator(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? first, Tensor? stop, Tensor out, Tensor lse, float scale, "
    "float? softcap) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dout: Tensor | None, _: Any) -> Any:
    if dout is None:
        return (None,) * 8
    q, k, v, sinks, first, stop, out, lse = ctx.saved_tensors
    dq, dk, dv, dsinks = _attention_backward(dout, q, k, v, sinks, first, stop, out, lse, ctx.scale, ctx.softcap)
    return dq, dk, dv, None if sinks is None else dsinks, None, None, None, None


_call = launch.differentiable(
    launch.operator(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? first, Tensor? stop, float scale, float? softcap) -> (Tensor, Tensor)",
        _run_forward,
        _fake_forward,
    ),
    _save,
    _grads,
)


def supports(q_bthd: Tensor, k_btkd: Tensor, v_btke: Tensor, scale: float = 1.0, sinks_h: Tensor | None = None) -> str | None:
    """Why the fused kernels cannot take these tensors; None: they can."""
    if why := launch.missing(q_bthd):
        return why
    (b, t, h, d), k, e = q_bthd.shape, k_btkd.shape[2], v_btke.shape[3]
    if q_bthd.dtype not in launch.FLOATS or k_btkd.dtype != q_bthd.dtype or v_btke.dtype != q_bthd.dtype:
        return f"queries, keys and values must share one of bf16, fp16, fp32, not {q_bthd.dtype}, {k_btkd.dtype} and {v_btke.dtype}"
    if k_btkd.shape != (b, t, k, d) or v_btke.shape != (b, t, k, e) or h % max(1, k) or (sinks_h is not None and sinks_h.shape != (h,)):
        return f"queries {tuple(q_bthd.shape)}, keys {tuple(k_btkd.shape)} and values {tuple(v_btke.shape)} do not fit"
    if not 0 < max(d, e) <= WIDEST:
        return f"{max(d, e)} channels of a head are not between 1 and {WIDEST}"
    return None if scale > 0.0 else f"a scale of {scale} turns the order of scores around"


def fused(
    q_bthd: Tensor, k_btkd: Tensor, v_btke: Tensor, mask: Mask, *, scale: float, softcap: float | None = None, sinks_h: Tensor | None = None
) -> Tensor:
    """As attention.py's `reference` in one Triton launch forward and three backward, the same bits every time; keeps q, k, v, out and 4 B a query and head.

    Raises KernelError where `supports` says no.
    """
    if why := supports(q_bthd, k_btkd, v_btke, scale, sinks_h):
        raise KernelError(f'attention: {why}; set kernels.attention = "sdpa"')
    first, stop = bounds(mask, q_bthd.shape[1], q_bthd.device)
    return _call(q_bthd, k_btkd, v_btke, sinks_h, first, stop, scale, softcap)[0]
