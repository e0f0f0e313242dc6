"""Products of rows, sorted by expert, with their own experts' matrices, and what surrounds them in a mixture of experts: Triton kernels of moe.py.

A tile is up to `rows` rows of one expert. Which rows those are is found on the device from the counts: `tiles` writes each tile's expert and first row, for
as many tiles as there can be at most, ceil(m / rows) + E; those that are not there are -1, and their programs end at once. So nothing is read on the host,
an expert without rows has no tile, and no tile reaches into the rows behind the counts, which may hold anything.

Floor of the forward, in bf16 and bytes, of n tokens with k visits each (m = n k rows), d channels, E experts of i channels: x 2nd read, weights 6Edi read,
y 2nd written. Beyond it: g and u 4mi written (kept for the backward), h 2mi written and read, the rows 2md written and read by the weighted sum. What torch
does beyond that: x gathered 2md written, g and u read once more, and for every other operation in between one more pass over m rows.

Legend: m rows, n tokens, k visits, d hidden channels, e experts, i channels of an expert, f = 2 i, gate above up; t tiles. ORDER is the slot of each row,
PLACE the row of each slot; a row's token is slot // k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gigatrain.kernels import launch
from gigatrain.kernels.elementwise import sigmoid
from gigatrain.kernels.launch import tl, triton

_PRODUCTS = [
    {"columns": columns, "inner": inner, "group": 8, "warps": warps, "stages": stages}
    for columns, inner, warps, stages in (
        *((64, 64, 4, 3), (64, 64, 8, 3), (64, 64, 8, 4), (128, 32, 4, 3), (128, 32, 8, 3), (128, 64, 4, 3)),
        *((128, 64, 8, 3), (128, 64, 8, 4), (256, 32, 8, 3), (256, 64, 8, 3), (32, 32, 4, 2)),
    )
]
# All but `tiles` and `weight_gradient` have tiles of as many rows as `tiles` says. Sizes are hidden channels: what a table knows of a model.
SPACE = {
    "moe.tiles": [{"rows": rows} for rows in (16, 64, 128, 256)],
    "moe.gate_up": [c for c in _PRODUCTS if c["columns"] <= 128],  # of gate and of up each
    "moe.product": _PRODUCTS,
    "moe.gated_backward": [c for c in _PRODUCTS if c["columns"] <= 128],
    "moe.weight_gradient": [
        {"rows": rows, "columns": columns, "inner": inner, "group": 8, "warps": warps, "stages": stages}
        for rows, columns, inner, warps, stages in (
            *((64, 64, 64, 4, 3), (128, 64, 64, 4, 3), (128, 128, 32, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4)),
            *((128, 256, 32, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (32, 32, 32, 4, 2)),
        )
    ],
    "moe.glue": [{"rows": rows, "columns": columns, "warps": 4} for rows, columns in ((16, 128), (32, 64), (32, 128), (64, 64), (16, 32))],
    "moe.tokens": [
        {"rows": rows, "columns": columns, "warps": warps}
        for rows, columns, warps in ((1, 512, 2), (1, 1024, 4), (1, 2048, 4), (1, 2048, 8), (2, 512, 4), (4, 256, 4), (8, 32, 1))
    ],
}


@triton.jit
def _tiles(ENDS, EXPERT, FIRST, experts, tiles, ROWS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    bins = tl.arange(0, BINS)
    ends = tl.load(ENDS + bins, mask=bins < experts, other=0)
    before = tl.load(ENDS + bins - 1, mask=(bins > 0) & (bins < experts), other=0)
    counts = tl.where(bins < experts, (ends - before + ROWS - 1) // ROWS, 0)
    last = tl.cumsum(counts, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = (tile[:, None] >= (last - counts)[None]) & (tile[:, None] < last[None])  # of at most one expert
    first = tl.sum(tl.where(mine, before[None] + (tile[:, None] - (last - counts)[None]) * ROWS, 0), 1)
    expert = tl.max(tl.where(mine, bins[None], -1), 1)
    tl.store(EXPERT + tile, expert, mask=tile < tiles)
    tl.store(FIRST + tile, first, mask=tile < tiles)


@triton.jit
def _turn(tiles, across, GROUP: tl.constexpr):
    """Tile and block of columns of this program: GROUP tiles are walked column by column, so that an expert's matrix is read from L2 by its next tile."""
    turn = tl.program_id(0)
    group = turn // (GROUP * across)
    height = tl.minimum(GROUP, tiles - group * GROUP)
    turn -= group * GROUP * across
    return group * GROUP + turn % height, turn // height


@triton.jit
def _source(ORDER, row, visits, GATHER: tl.constexpr):
    """Where a row's numbers are: at its token, or at itself."""
    if GATHER:
        return tl.load(ORDER + row) // visits
    return row.to(tl.int64)


@triton.jit
def _activated(gate, up, CLAMPED: tl.constexpr):
    """h, and its slopes to gate and to up."""
    if CLAMPED:
        g, u = tl.minimum(gate, 7.0), tl.minimum(tl.maximum(up, -7.0), 7.0)
        s, slope = sigmoid(1.702 * g)
        dgate = tl.where(gate <= 7.0, (u + 1.0) * (s + 1.702 * g * slope), 0.0)
        return (u + 1.0) * (g * s), dgate, tl.where((up >= -7.0) & (up <= 7.0), g * s, 0.0)
    else:
        s, slope = sigmoid(gate)
        return gate * s * up, up * (s + gate * slope), gate * s


@triton.jit
def _gate_up(
    X, ORDER, ENDS, EXPERT, FIRST, W, BIAS, GU, H, visits, hidden, width, tiles, across, limit,
    GATHER: tl.constexpr, BIASED: tl.constexpr, CLAMPED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, turn = _turn(tiles, across, GROUP)
    expert = tl.load(EXPERT + tile)
    if expert >= 0:
        first, end = tl.load(FIRST + tile), tl.load(ENDS + expert)
        row = first + tl.arange(0, ROWS)
        live = row < end
        # Rows and columns beyond the last are the last again, and not stored: only the steps have to be masked.
        x_at = X + _source(ORDER, tl.minimum(row, end - 1), visits, GATHER)[:, None] * hidden
        column = turn * COLUMNS + tl.arange(0, COLUMNS)
        step = tl.arange(0, INNER)
        x_at += step[None]
        at = tl.minimum(column, width - 1).to(tl.int64)
        gate_at = W + expert.to(tl.int64) * limit + at[None] * hidden + step[:, None]
        up_at = W + expert.to(tl.int64) * limit + (at + width)[None] * hidden + step[:, None]
        gate, up = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, hidden, INNER):
            x = tl.load(x_at, mask=(step < hidden - start)[None], other=0.0)
            g = tl.load(gate_at, mask=(step < hidden - start)[:, None], other=0.0)
            u = tl.load(up_at, mask=(step < hidden - start)[:, None], other=0.0)
            gate = tl.dot(x, g, gate, input_precision=PRECISION)
            up = tl.dot(x, u, up, input_precision=PRECISION)
            x_at += INNER
            gate_at += INNER
            up_at += INNER
        if BIASED:
            bias = BIAS + expert.to(tl.int64) * 2 * width + at
            gate += tl.load(bias).to(tl.float32)[None]
            up += tl.load(bias + width).to(tl.float32)[None]
        # As they are kept, so that the backward differentiates what the forward computed.
        gate, up = gate.to(GU.dtype.element_ty), up.to(GU.dtype.element_ty)
        there = live[:, None] & (column < width)[None]
        kept = GU + row.to(tl.int64)[:, None] * 2 * width + column[None]
        tl.store(kept, gate, mask=there)
        tl.store(kept + width, up, mask=there)
        h, _, _ = _activated(gate.to(tl.float32), up.to(tl.float32), CLAMPED)
        tl.store(H + row.to(tl.int64)[:, None] * width + column[None], h.to(H.dtype.element_ty), mask=there)


@triton.jit
def _product(
    A, ENDS, EXPERT, FIRST, W, BIAS, OUT, inner, columns, tiles, across, limit, w_inner, w_column,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, turn = _turn(tiles, across, GROUP)
    expert = tl.load(EXPERT + tile)
    if expert >= 0:
        first, end = tl.load(FIRST + tile), tl.load(ENDS + expert)
        row = first + tl.arange(0, ROWS)
        column = turn * COLUMNS + tl.arange(0, COLUMNS)
        step = tl.arange(0, INNER)
        a_at = A + tl.minimum(row, end - 1).to(tl.int64)[:, None] * inner + step[None]
        # A mask, and not the last column again: columns may be neighbours in memory, and what is known of neighbours is loaded 16 bytes at a time.
        there = (column < columns)[None]
        w_at = W + expert.to(tl.int64) * limit + column[None].to(tl.int64) * w_column + step[:, None].to(tl.int64) * w_inner
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, inner, INNER):
            a = tl.load(a_at, mask=(step < inner - start)[None], other=0.0)
            w = tl.load(w_at, mask=(step < inner - start)[:, None] & there, other=0.0)
            total = tl.dot(a, w, total, input_precision=PRECISION)
            a_at += INNER
            w_at += tl.cast(w_inner, tl.int64) * INNER
        if BIASED:
            total += tl.load(BIAS + expert.to(tl.int64) * columns + column, mask=column < columns, other=0.0).to(tl.float32)[None]
        there &= (row < end)[:, None]
        tl.store(OUT + row.to(tl.int64)[:, None] * columns + column[None], total.to(OUT.dtype.element_ty), mask=there)


@triton.jit
def _gated_part(dh, GU, DGU, H, row, live, first, width, weight, CLAMPED: tl.constexpr, COLUMNS: tl.constexpr):
    """The end of `_gated_backward` for some columns from `first` on: stores dgu and h, and returns each row's <dh, h>."""
    column = first + tl.arange(0, COLUMNS)
    there = live[:, None] & (column < width)[None]
    gate_at = row.to(tl.int64)[:, None] * 2 * width + column[None]
    gate = tl.load(GU + gate_at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(GU + gate_at + width, mask=there, other=0.0).to(tl.float32)
    h, dgate, dup = _activated(gate, up, CLAMPED)
    part = tl.sum(tl.where(there, dh * h, 0.0), 1)
    dh *= weight[:, None]
    tl.store(DGU + gate_at, (dh * dgate).to(DGU.dtype.element_ty), mask=there)
    tl.store(DGU + gate_at + width, (dh * dup).to(DGU.dtype.element_ty), mask=there)
    tl.store(H + row.to(tl.int64)[:, None] * width + column[None], (h * weight[:, None]).to(H.dtype.element_ty), mask=there)
    return part


@triton.jit
def _gated_backward(
    DY, ORDER, ENDS, EXPERT, FIRST, W, GU, WEIGHTS, DGU, H, PARTS, visits, hidden, width, rows, tiles, across, limit,
    GATHER: tl.constexpr, CLAMPED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, turn = _turn(tiles, across, GROUP)
    expert = tl.load(EXPERT + tile)
    if expert >= 0:
        first, end = tl.load(FIRST + tile), tl.load(ENDS + expert)
        row = first + tl.arange(0, ROWS)
        safe = tl.minimum(row, end - 1)
        column = turn * COLUMNS + tl.arange(0, COLUMNS)
        step = tl.arange(0, INNER)
        dy_at = DY + _source(ORDER, safe, visits, GATHER)[:, None] * hidden + step[None]
        there = (column < width)[None]
        w_at = W + expert.to(tl.int64) * limit + step[:, None].to(tl.int64) * width + column[None]
        dh = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, hidden, INNER):
            dy = tl.load(dy_at, mask=(step < hidden - start)[None], other=0.0)
            w = tl.load(w_at, mask=(step < hidden - start)[:, None] & there, other=0.0)
            dh = tl.dot(dy, w, dh, input_precision=PRECISION)
            dy_at += INNER
            w_at += tl.cast(width, tl.int64) * INNER
        live = row < end
        weight = tl.zeros([ROWS], tl.float32) + 1.0
        if GATHER:
            weight = tl.load(WEIGHTS + tl.load(ORDER + safe)).to(tl.float32)
        # In parts of 32 columns: all 128 at once would be held five times over.
        if COLUMNS == 128:
            halves = tl.split(tl.permute(tl.reshape(dh, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))
            part = tl.zeros([ROWS], tl.float32)
            for half in tl.static_range(2):  # type: ignore
                first_half, second_half = tl.split(tl.permute(tl.reshape(halves[half], [ROWS, 2, COLUMNS // 4]), (0, 2, 1)))
                at = turn * COLUMNS + half * (COLUMNS // 2)
                part += _gated_part(first_half, GU, DGU, H, row, live, at, width, weight, CLAMPED, COLUMNS // 4)
                part += _gated_part(second_half, GU, DGU, H, row, live, at + COLUMNS // 4, width, weight, CLAMPED, COLUMNS // 4)
        else:
            part = _gated_part(dh, GU, DGU, H, row, live, turn * COLUMNS, width, weight, CLAMPED, COLUMNS)
        if GATHER:  # a visit has a weight, and its gradient is <dy, y> = <dh, h> (+ <dy, bias>): no y is kept
            tl.store(PARTS + turn.to(tl.int64) * rows + row, part, mask=live)


@triton.jit
def _weight_gradient(
    A, B, ORDER, ENDS, OUT, visits, rows, columns, across, down,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile, turn = _turn(down, across, GROUP)
    expert = tl.program_id(1)
    end = tl.load(ENDS + expert)
    first = tl.load(ENDS + expert - 1, mask=expert > 0, other=0)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = turn * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)  # what an expert without rows gets
    for start in range(first, end, INNER):
        step = start + tl.arange(0, INNER)
        live = step < end
        safe = tl.minimum(step, end - 1)
        a_row, b_row = _source(ORDER, safe, visits, GATHER_A), _source(ORDER, safe, visits, GATHER_B)
        a = tl.load(A + a_row[:, None] * rows + row[None], mask=live[:, None] & (row < rows)[None], other=0.0)
        b = tl.load(B + b_row[:, None] * columns + column[None], mask=live[:, None] & (column < columns)[None], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    there = (row < rows)[:, None] & (column < columns)[None]
    out = OUT + (expert.to(tl.int64) * rows + row.to(tl.int64)[:, None]) * columns + column[None]
    tl.store(out, total.to(OUT.dtype.element_ty), mask=there)


@triton.jit
def _bias_gradient(X, WEIGHTS, ORDER, ENDS, OUT, visits, columns, GATHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    expert = tl.program_id(1)
    end = tl.load(ENDS + expert)
    first = tl.load(ENDS + expert - 1, mask=expert > 0, other=0)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < end
        source = _source(ORDER, tl.minimum(row, end - 1), visits, GATHER)
        x = tl.load(X + source[:, None] * columns + column[None], mask=live[:, None] & (column < columns)[None], other=0.0).to(tl.float32)
        if GATHER:
            x *= tl.load(WEIGHTS + tl.load(ORDER + tl.minimum(row, end - 1))).to(tl.float32)[:, None]
        total += x
    tl.store(OUT + expert.to(tl.int64) * columns + column, tl.sum(total, 0).to(OUT.dtype.element_ty), mask=column < columns)


@triton.jit
def _activate(
    GU,
    ENDS,
    EXPERT,
    FIRST,
    BIAS,
    H,
    width,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """h of products that another has made; where there is a bias it is added to them first, in place."""
    tile = tl.program_id(0) // (TILE // ROWS)
    expert = tl.load(EXPERT + tile)
    if expert >= 0:
        end = tl.load(ENDS + expert)
        row = (tl.load(FIRST + tile) + tl.program_id(0) % (TILE // ROWS) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        there = (row < end)[:, None] & (column < width)[None]
        gate_at = GU + row[:, None] * 2 * width + column[None]
        gate = tl.load(gate_at, mask=there, other=0.0)
        up = tl.load(gate_at + width, mask=there, other=0.0)
        if BIASED:
            bias = BIAS + expert.to(tl.int64) * 2 * width + column
            gate = (gate.to(tl.float32) + tl.load(bias, mask=column < width, other=0.0).to(tl.float32)[None]).to(GU.dtype.element_ty)
            up = (up.to(tl.float32) + tl.load(bias + width, mask=column < width, other=0.0).to(tl.float32)[None]).to(GU.dtype.element_ty)
            tl.store(gate_at, gate, mask=there)
            tl.store(gate_at + width, up, mask=there)
        h, _, _ = _activated(gate.to(tl.float32), up.to(tl.float32), CLAMPED)
        tl.store(H + row[:, None] * width + column[None], h.to(H.dtype.element_ty), mask=there)


@triton.jit
def _add_bias(Y, ENDS, EXPERT, FIRST, BIAS, columns, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tile = tl.program_id(0) // (TILE // ROWS)
    expert = tl.load(EXPERT + tile)
    if expert >= 0:
        end = tl.load(ENDS + expert)
        row = (tl.load(FIRST + tile) + tl.program_id(0) % (TILE // ROWS) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        there = (row < end)[:, None] & (column < columns)[None]
        at = Y + row[:, None] * columns + column[None]
        bias = tl.load(BIAS + expert.to(tl.int64) * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        tl.store(at, (tl.load(at, mask=there, other=0.0).to(tl.float32) + bias[None]).to(Y.dtype.element_ty), mask=there)


@triton.jit
def _activate_backward(
    DH, GU, ORDER, ENDS, EXPERT, FIRST, WEIGHTS, DGU, H, PARTS, width,
    WEIGHTED: tl.constexpr, CLAMPED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // (TILE // ROWS)
    expert = tl.load(EXPERT + tile)
    if expert >= 0:
        end = tl.load(ENDS + expert)
        row = (tl.load(FIRST + tile) + tl.program_id(0) % (TILE // ROWS) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        live = row < end
        part = tl.zeros([ROWS], tl.float32)
        if WEIGHTED:
            weight = tl.load(WEIGHTS + tl.load(ORDER + row, mask=live, other=0), mask=live, other=0.0).to(tl.float32)[:, None]
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            there = live[:, None] & (column < width)[None]
            gate_at = row[:, None] * 2 * width + column[None]
            dh = tl.load(DH + row[:, None] * width + column[None], mask=there, other=0.0).to(tl.float32)
            gate = tl.load(GU + gate_at, mask=there, other=0.0).to(tl.float32)
            up = tl.load(GU + gate_at + width, mask=there, other=0.0).to(tl.float32)
            h, dgate, dup = _activated(gate, up, CLAMPED)
            if WEIGHTED:
                part += tl.sum(dh * h, 1)
                dh *= weight
                h *= weight
            tl.store(DGU + gate_at, (dh * dgate).to(DGU.dtype.element_ty), mask=there)
            tl.store(DGU + gate_at + width, (dh * dup).to(DGU.dtype.element_ty), mask=there)
            tl.store(H + row[:, None] * width + column[None], h.to(H.dtype.element_ty), mask=there)
        if WEIGHTED:
            tl.store(PARTS + row, part, mask=live)


@triton.jit
def _rows_of(X, ORDER, OUT, visits, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(ORDER + row, mask=live, other=0) // visits
    there = live[:, None] & (column < columns)[None]
    x = tl.load(X + source[:, None] * columns + column[None], mask=there, other=0.0)
    tl.store(OUT + row.to(tl.int64)[:, None] * columns + column[None], x, mask=there)


@triton.jit
def _combine(
    Y, PLACE, WEIGHTS, OUT, visits, tokens, columns, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = token < tokens
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = live[:, None] & (column < columns)[None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for visit in range(visits):
        place = tl.load(PLACE + token * visits + visit, mask=live, other=0)
        y = tl.load(Y + place[:, None] * columns + column[None], mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(WEIGHTS + token * visits + visit, mask=live, other=0.0).to(tl.float32)[:, None]
        total += y
    tl.store(OUT + token[:, None] * columns + column[None], total.to(OUT.dtype.element_ty), mask=there)


@triton.jit
def _visit_gradient(
    PARTS, PLACE, CHOSEN, DY, BIAS, OUT, visits, blocks, rows, columns, BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """dweights_nk: what the blocks of columns found of <dh, h>, and <dy, bias>."""
    slot = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = slot < rows
    place = tl.load(PLACE + slot, mask=live, other=0)
    total = tl.zeros([ROWS], tl.float32)
    for block in range(blocks):
        total += tl.load(PARTS + tl.cast(block, tl.int64) * rows + place, mask=live, other=0.0)
    if BIASED:
        expert = tl.load(CHOSEN + slot, mask=live, other=0)
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            there = live[:, None] & (column < columns)[None]
            dy = tl.load(DY + (slot // visits)[:, None] * columns + column[None], mask=there, other=0.0).to(tl.float32)
            sums += dy * tl.load(BIAS + expert[:, None] * columns + column[None], mask=there, other=0.0).to(tl.float32)
        total += tl.sum(sums, 1)
    tl.store(OUT + slot, total, mask=live)


@triton.jit
def _zero_unvisited(OUT, ENDS, elements, BLOCK: tl.constexpr):
    """The gradient of an expert without rows: torch's grouped product has left it undefined (pytorch 172439)."""
    expert = tl.program_id(1)
    if tl.load(ENDS + expert) == tl.load(ENDS + expert - 1, mask=expert > 0, other=0):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(OUT + expert.to(tl.int64) * elements + at, tl.zeros([BLOCK], OUT.dtype.element_ty), mask=at < elements)


@dataclass(frozen=True)
class Tiles:
    """The tiles of m rows: each one's expert (-1: it is not there) and first row; `rows`: the most that a tile has."""

    expert_t: Tensor
    first_t: Tensor
    ends_e: Tensor
    rows: int

    @property
    def count(self) -> int:
        """Tiles, those that are not there included."""
        return self.expert_t.shape[0]


def tiles(ends_e: Tensor, rows: int, hidden: int) -> Tiles:
    """The tiles of `rows` rows whose experts end at `ends_e` (int32)."""
    most, experts = launch.configuration(ends_e, "moe.tiles", hidden)["rows"], ends_e.shape[0]
    count = -(-rows // most) + experts
    expert, first = (torch.empty(count, dtype=torch.int32, device=ends_e.device) for _ in range(2))
    launch.launch(_tiles, (-(-count // 16),), ends_e, expert, first, experts, count, ROWS=most, BINS=launch.block(experts), BLOCK=16)
    return Tiles(expert, first, ends_e, most)


def _tuned(kernel: str, x: Tensor, hidden: int) -> dict[str, int]:
    """Options of a product: the sizes that constants are called by, warps and stages. Steps are as many bytes in every dtype."""
    found = launch.configuration(x, kernel, hidden)
    sizes = {name.upper(): value for name, value in found.items() if name not in ("warps", "stages")}
    sizes["INNER"] = max(16, sizes["INNER"] * 2 // x.itemsize)
    if x.dtype == torch.float32:  # whose products are sums by thread, and spill in wider tiles
        sizes["COLUMNS"] = min(128, sizes["COLUMNS"])
    return sizes | {"warps": found["warps"], "stages": found["stages"], "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32"}


def gate_up(
    x: Tensor, order: Tensor | None, visits: int, at: Tiles, weight: Tensor, bias: Tensor | None, rows: int, clamped: bool
) -> tuple[Tensor, Tensor]:
    """`(gu_mf, h_mi)` of x_nd's rows in their experts' order (`order` None: x_md is in it)."""
    wide, hidden = weight.shape[1:]
    width = wide // 2
    gu, h = x.new_empty(rows, wide), x.new_empty(rows, width)
    tuned = _tuned("moe.gate_up", x, hidden)
    across = -(-width // tuned["COLUMNS"])
    launch.launch(
        _gate_up, (at.count * across,), x, order, at.ends_e, at.expert_t, at.first_t, weight, bias, gu, h, visits, hidden, width, at.count,
        across, wide * hidden, GATHER=order is not None, BIASED=bias is not None, CLAMPED=clamped, ROWS=at.rows, **tuned,
    )  # fmt: skip
    return gu, h


def product(a: Tensor, at: Tiles, weight: Tensor, transposed: bool, bias: Tensor | None, hidden: int) -> Tensor:
    """a_mp times each row's own weight [e, p, q], or [e, q, p] where `transposed`, plus its bias."""
    inner, columns = weight.shape[2 if transposed else 1], weight.shape[1 if transposed else 2]
    out = a.new_empty(a.shape[0], columns)
    tuned = _tuned("moe.product", a, hidden)
    across = -(-columns // tuned["COLUMNS"])
    strides = (1, inner) if transposed else (columns, 1)
    launch.launch(
        _product, (at.count * across,), a, at.ends_e, at.expert_t, at.first_t, weight, bias, out, inner, columns, at.count, across,
        inner * columns, *strides, BIASED=bias is not None, ROWS=at.rows, **tuned,
    )  # fmt: skip
    return out


def gated_backward(
    dy: Tensor, order: Tensor | None, visits: int, at: Tiles, down: Tensor, gu: Tensor, weights: Tensor | None, clamped: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dgu_mf, h_mi, parts_pm)`: h times its visit's weight, and what each block of columns finds of the weight's gradient."""
    rows, (_, hidden, width) = gu.shape[0], down.shape
    dgu, h = torch.empty_like(gu), gu.new_empty(rows, width)
    tuned = _tuned("moe.gated_backward", dy, hidden)
    across = -(-width // tuned["COLUMNS"])
    parts = torch.empty(across if order is not None else 0, rows, dtype=torch.float32, device=dy.device)
    launch.launch(
        _gated_backward, (at.count * across,), dy, order, at.ends_e, at.expert_t, at.first_t, down, gu, weights, dgu, h, parts, visits, hidden,
        width, rows, at.count, across, hidden * width, GATHER=order is not None, CLAMPED=clamped, ROWS=at.rows, **tuned,
    )  # fmt: skip
    return dgu, h, parts


def weight_gradient(a: Tensor, b: Tensor, order: Tensor | None, visits: int, ends_e: Tensor, gathered: str, hidden: int) -> Tensor:
    """dw_epq, the sum over each expert's rows of a_mp b_mq; `gathered`: which of the two, "a" or "b", has the tokens' rows where there is an order."""
    rows, columns = a.shape[1], b.shape[1]
    out = a.new_empty(ends_e.shape[0], rows, columns)
    tuned = _tuned("moe.weight_gradient", a, hidden)
    down, across = -(-rows // tuned["ROWS"]), -(-columns // tuned["COLUMNS"])
    given = order is not None
    launch.launch(
        _weight_gradient, (down * across, ends_e.shape[0]), a, b, order, ends_e, out, visits, rows, columns, across, down,
        GATHER_A=given and gathered == "a", GATHER_B=given and gathered == "b", **tuned,
    )  # fmt: skip
    return out


def bias_gradient(x: Tensor, weights: Tensor | None, order: Tensor | None, visits: int, ends_e: Tensor) -> Tensor:
    """dbias_ep: the sum over each expert's rows of x_mp, or of x_np times each visit's weight."""
    columns = x.shape[1]
    out = x.new_empty(ends_e.shape[0], columns)
    launch.launch(
        _bias_gradient, (-(-columns // 64), ends_e.shape[0]), x, weights, order, ends_e, out, visits, columns, GATHER=order is not None,
        ROWS=64, COLUMNS=64,
    )  # fmt: skip
    return out


def _glue(x: Tensor, at: Tiles, hidden: int) -> tuple[dict[str, int], int]:
    tuned = launch.configuration(x, "moe.glue", hidden)
    rows = min(tuned["rows"], at.rows)
    return {"TILE": at.rows, "ROWS": rows, "COLUMNS": tuned["columns"], "warps": tuned["warps"]}, at.count * (at.rows // rows)


def activate(gu: Tensor, at: Tiles, bias: Tensor | None, hidden: int, clamped: bool) -> Tensor:
    """h_mi of gu_mf, to which the bias is added first, in place."""
    width = gu.shape[1] // 2
    h = gu.new_empty(gu.shape[0], width)
    tuned, turns = _glue(gu, at, hidden)
    launch.launch(
        _activate, (turns, -(-width // tuned["COLUMNS"])), gu, at.ends_e, at.expert_t, at.first_t, bias, h, width, BIASED=bias is not None,
        CLAMPED=clamped, **tuned,
    )  # fmt: skip
    return h


def add_bias(y: Tensor, at: Tiles, bias: Tensor, hidden: int) -> None:
    """Adds each row's own bias, in place."""
    tuned, turns = _glue(y, at, hidden)
    launch.launch(_add_bias, (turns, -(-y.shape[1] // tuned["COLUMNS"])), y, at.ends_e, at.expert_t, at.first_t, bias, y.shape[1], **tuned)


def activate_backward(
    dh: Tensor, gu: Tensor, order: Tensor | None, at: Tiles, weights: Tensor | None, hidden: int, clamped: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `gated_backward`, of a dh_mi that another has made."""
    dgu, h = torch.empty_like(gu), torch.empty_like(dh)
    parts = torch.empty(0 if order is None else 1, dh.shape[0], dtype=torch.float32, device=dh.device)
    tuned, turns = _glue(dh, at, hidden)
    launch.launch(
        _activate_backward, (turns,), dh, gu, order, at.ends_e, at.expert_t, at.first_t, weights, dgu, h, parts, dh.shape[1],
        WEIGHTED=order is not None, CLAMPED=clamped, **tuned,
    )  # fmt: skip
    return dgu, h, parts


def _tokens(x: Tensor, rows: int) -> tuple[dict[str, int], tuple[int, int]]:
    tuned = launch.configuration(x, "moe.tokens", x.shape[1])
    sizes = {"ROWS": tuned["rows"], "COLUMNS": tuned["columns"], "warps": tuned["warps"]}
    return sizes, (-(-rows // tuned["rows"]), -(-x.shape[1] // tuned["columns"]))


def rows_of(x: Tensor, order: Tensor, visits: int) -> Tensor:
    """x_md: the row of each slot's token."""
    rows, columns = order.shape[0], x.shape[1]
    out = x.new_empty(rows, columns)
    tuned, grid = _tokens(x, rows)
    launch.launch(_rows_of, grid, x, order, out, visits, rows, columns, **tuned)
    return out


def combine(y: Tensor, place: Tensor, weights: Tensor | None, visits: int) -> Tensor:
    """Each token's sum over its rows, times the visits' weights if given, in fp32 and rounded once."""
    tokens, columns = place.shape[0] // visits, y.shape[1]
    out = y.new_empty(tokens, columns)
    tuned, grid = _tokens(y, tokens)
    launch.launch(_combine, grid, y, place, weights, out, visits, tokens, columns, WEIGHTED=weights is not None, **tuned)
    return out


def visit_gradient(parts: Tensor, place: Tensor, chosen: Tensor, dy: Tensor, bias: Tensor | None, visits: int) -> Tensor:
    """dweights of each slot in fp32."""
    rows = place.shape[0]
    out = torch.empty(rows, dtype=torch.float32, device=dy.device)
    most = 128 if bias is None else 16
    launch.launch(
        _visit_gradient, (-(-rows // most),), parts, place, chosen, dy, bias, out, visits, *parts.shape, dy.shape[1], BIASED=bias is not None,
        ROWS=most, COLUMNS=128,
    )  # fmt: skip
    return out


def zero_unvisited(out: Tensor, ends_e: Tensor) -> Tensor:
    """`out`, with zeros for experts without rows."""
    elements = out[0].numel()
    launch.launch(_zero_unvisited, (-(-elements // 4096), ends_e.shape[0]), out, ends_e, elements, BLOCK=4096)
    return out
