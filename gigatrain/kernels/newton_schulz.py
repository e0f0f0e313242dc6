"""Muon's arithmetic: the Newton-Schulz iteration that orthogonalises a batch of matrices, and the two passes over memory around it.

    X_0 = U / |U|_F        X <- a X + (b A + c A^2) X,  A = X X^T        five times, on the side with fewer rows (kellerjordan.github.io/posts/muon)
    momentum: m <- beta m + s g,  u = s g + beta m        update: w <- w (1 - lr decay) - lr size o

Legend: update_nrc n matrices r x c; below r <= c (tall matrices are taken as their transposes, without a copy). Every step multiplies the singular values
by q(R) = a + b R + c R^2 of the Gram matrix R = X X^T, and R itself moves by R <- q(R) R q(R): so several steps can be taken on r x r matrices alone, all of
them symmetric and commuting, before one product applies them to X (Gram form, dao-lab.ai/blog/2026/gram-newton-schulz). A segment is such a run of steps:

    R = X X^T        Z = b R + c R^2        Q <- a Q + k Z + Q Z,  k <- a k        W = a R + R Z,  R <- a W + W Z        at its end X <- k X + Q X

Segments of one step are the usual iteration. The multiple k of the identity is left out of Q where it is large: fp16 would round the whole diagonal alike.
In segments of up to two steps it is at most 12 and put back into Q, which spares the sum with k X, 6 B per element.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gigatrain.errors import KernelError
from gigatrain.kernels import launch
from gigatrain.kernels.launch import tl, triton

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the post's quintic: singular values from (0, 1] to about [0.7, 1.2] in five steps
# (matrices, rows, columns, dtype)
CASES = [
    (count, rows, columns, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for count, rows, columns in ((3, 32, 32), (2, 17, 65), (1, 70, 40), (1, 1, 9), (5, 9, 1), (0, 4, 4))
]
SIZES = [(4, rows, columns, torch.bfloat16) for rows, columns in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (768, 3072))]


def reference(update_nrc: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, of each of n matrices, whatever their scale; computed and returned in bf16."""
    a, b, c = COEFFICIENTS
    x = update_nrc.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(_TINY)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


_TINY = 1e-30  # keeps 0 / 0 away and nothing else: an epsilon as large as an update's norm leaves it unorthogonalised


Places = Tensor | tuple[int, ...]  # on the device for the fused kernels; the references also take numbers, which no step waits for


def _numbers(starts_n: Places) -> Sequence[int]:
    return starts_n.tolist() if isinstance(starts_n, Tensor) else starts_n


def momentum_reference(
    momentum_x: Tensor,
    grads_x: Tensor,
    starts_n: Places,
    shape: Sequence[int],
    scale: Tensor,
    skip: Tensor,
    beta: float,
    aligned: bool = False,
) -> Tensor:
    """Moves the momentum of the n matrices of `shape` at `starts` of the flat buffers, unless `skip` > 0; returns their Nesterov updates [n, r, c] in bf16.

    `aligned`: every start is a multiple of 16 (the fused kernel then loads 16 bytes at a time).
    """
    update_nrc = torch.empty(len(starts_n), *shape, dtype=torch.bfloat16, device=grads_x.device)
    for update, start in zip(update_nrc, _numbers(starts_n), strict=True):
        at = slice(start, start + update.numel())
        grad = grads_x[at] * scale
        moved = momentum_x[at].to(grad.dtype) * beta + grad
        update.copy_(torch.add(grad, moved, alpha=beta).view(shape))
        momentum_x[at].copy_(torch.where(skip > 0, momentum_x[at].to(grad.dtype), moved))
    return update_nrc


def update_reference(
    weights_x: Tensor, starts_n: Places, update_nrc: Tensor, lr: Tensor, skip: Tensor, decay: float, size: float, aligned: bool = False
) -> None:
    """Moves the n matrices at `starts` of the flat weights by `size` times their orthogonal updates, at the rate `lr` (0-d), unless `skip` > 0."""
    for update, start in zip(update_nrc, _numbers(starts_n), strict=True):
        weight = weights_x[start : start + update.numel()].view(update.shape)
        moved = weight * (1 - lr * decay) - lr * (update.to(weight.dtype) * size)
        weight.copy_(torch.where(skip > 0, weight, moved))


# Fused. Floor in FLOPs: the least of `flops`. Per segment X moves through HBM in 6 B per element (read for R, read and written for Q X; where k X is summed
# 6 B more: cuBLAS sums in place, so torch copies X first) against 3 r FLOPs, and each r x r product reads and writes 2 B per entry and matrix against r.
#
# fp16, and not the reference's bf16: eight times finer, at the same speed, which is what lets Q take three steps at once. Its narrow range is met by powers
# of two: a matrix is held as 2^k times its value, k below. Singular values stay under 1.21, so |X| 2^6 <= 77, |R| and |W| 2^12 <= 6,000, |Z| 2^8 <= 720,
# and |Q| 2^4 <= 660 where Q is [-41, 0]; Q X 2^10 <= 51,000 < 65,504, so that even a product that is summed in fp16 parts (split-K) is finite. Entries near
# 2e-6, as R has off its diagonal at r = 4096, are normal numbers of 8e-3.
_X, _R, _Z, _Q = 2.0**6, 2.0**12, 2.0**8, 2.0**4
# From how many rows on the Gram form is taken. Q spans 41 (null directions) to 0.7 (the largest singular value), and its roundings are as large as 41 / 2^12;
# random ones average out over the rows. Over spectra that are flat, steep, stepped and rank-deficient its error against fp64 was at most 1.8 times that of the
# bf16 reference for r >= 256 (mostly a third), but up to 3.5 times for r <= 128. Where every rounding is alike, as for constant matrices, both err by 1.5 %.
GRAM_ROWS = 256


def flops(rows: int, columns: int, segments: Sequence[int]) -> float:
    """Floating-point operations of one matrix's iteration in these segments; a symmetric product counts half."""
    r, c = sorted((rows, columns))
    return sum(3.0 * r * r * c + (1.0 + 4.0 * (length - 1)) * r**3 for length in segments)


def forms(rows: int, columns: int, steps: int = 5) -> dict[str, tuple[float, tuple[int, ...]]]:
    """FLOPs and segments of each form of the iteration: plain (no symmetry used, no segments), symmetric (segments of one step), gram (of three, then two)."""
    r, c = sorted((rows, columns))
    gram = (min(3, steps), *([2] * ((steps - 3) // 2)), *([1] * (max(0, steps - 3) % 2)))
    return {"plain": (steps * (4.0 * r * r * c + 2.0 * r**3), ())} | {
        name: (flops(rows, columns, segments), segments) for name, segments in (("symmetric", (1,) * steps), ("gram", gram))
    }


def plan(rows: int, columns: int, steps: int = 5) -> tuple[int, ...]:
    """The segments with the fewest FLOPs: symmetric for square or small matrices, gram for the others."""
    found = forms(rows, columns, steps)
    return found["gram" if min(rows, columns) >= GRAM_ROWS and found["gram"][0] < found["symmetric"][0] else "symmetric"][1]


@triton.jit
def _triangle(index):
    """Row and column of the index-th tile of a lower triangle, row by row."""
    row = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    row -= (row * (row + 1) // 2 > index).to(tl.int32)
    row += ((row + 1) * (row + 2) // 2 <= index).to(tl.int32)
    return row, index - row * (row + 1) // 2


@triton.jit
def _stored(
    total, A, B, OUT, tile_row, tile_column, rows, a_row, a_inner, b_row, b_inner, alpha, beta, gamma, identity,
    BETA: tl.constexpr, GAMMA: tl.constexpr, IDENTITY: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Stores a square tile on or below the diagonal, and its mirror image. Whole tiles are masked, so that 16 bytes are stored at a time."""
    row, column = tile_row * SIDE + tl.arange(0, SIDE), tile_column * SIDE + tl.arange(0, SIDE)
    wide_row, wide_column = row.to(tl.int64), column.to(tl.int64)
    last = tl.where(tile_row >= tile_column, rows, 0)
    live = (row < last)[:, None] & (column < last)[None]
    total *= alpha
    if BETA:
        total += beta * tl.load(A + wide_row[:, None] * a_row + wide_column[None] * a_inner, mask=live, other=0.0).to(tl.float32)
    if GAMMA:
        total += gamma * tl.load(B + wide_row[:, None] * b_row + wide_column[None] * b_inner, mask=live, other=0.0).to(tl.float32)
    if IDENTITY and tile_row == tile_column:
        total += tl.where(row[:, None] == column[None], identity, 0.0)
    found = total.to(OUT.dtype.element_ty)
    if tile_row == tile_column:
        found = tl.where(row[:, None] >= column[None], found, tl.trans(found))
    tl.store(OUT + wide_row[:, None] * rows + column[None], found, mask=live)
    live = (column < last)[:, None] & (row < last)[None]
    tl.store(OUT + wide_column[:, None] * rows + row[None], tl.trans(found), mask=live)


@triton.jit
def _product(
    A, B, OUT, rows, inner, a_batch, a_row, a_inner, b_batch, b_row, b_inner, alpha, beta, gamma, identity,
    BETA: tl.constexpr, GAMMA: tl.constexpr, IDENTITY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # The tile: a band of GROUP rows of tiles is walked column by column, so that its rows of A stay in L2; then the triangle at the band's end.
    turn = tl.program_id(0) // (ROWS // COLUMNS)
    first, _ = _triangle(turn)
    first = first // GROUP * GROUP
    turn -= first * (first + 1) // 2
    height = tl.minimum(GROUP, tl.cdiv(rows, ROWS) - first)
    tile_row, tile_column = _triangle(tl.maximum(turn - first * height, 0))
    tile_row = first + tl.where(turn < first * height, turn % height, tile_row)
    tile_column = tl.where(turn < first * height, turn // height, first + tile_column)
    row = tile_row * ROWS + tl.arange(0, ROWS)
    column = tile_column * ROWS + tl.program_id(0) % (ROWS // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    batch = tl.program_id(1).to(tl.int64)
    A += batch * a_batch
    B += batch * b_batch
    OUT += batch * rows * rows
    row_a, column_b = A + row[:, None].to(tl.int64) * a_row, B + column[None].to(tl.int64) * b_row
    step = tl.arange(0, INNER)
    a_at, b_at = row_a + step[None].to(tl.int64) * a_inner, column_b + step[:, None].to(tl.int64) * b_inner
    # A step of a tall matrix is INNER of its rows: in 32 bits their product overflows from a stride of 2^31 / INNER on.
    a_next, b_next = tl.cast(a_inner, tl.int64) * INNER, tl.cast(b_inner, tl.int64) * INNER
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, inner, INNER):
        a = tl.load(a_at, mask=(row < rows)[:, None] & (step < inner - start)[None], other=0.0)
        b = tl.load(b_at, mask=(column < rows)[None] & (step < inner - start)[:, None], other=0.0)
        total = tl.dot(a, b, total)
        a_at += a_next
        b_at += b_next
    if ROWS == COLUMNS:
        _stored(
            total, A, B, OUT, tile_row, tile_column, rows, a_row, a_inner, b_row, b_inner, alpha, beta, gamma, identity,
            BETA, GAMMA, IDENTITY, ROWS,
        )  # fmt: skip
    else:  # a tile of two squares, one above the other; the upper may lie above the diagonal
        upper, under = tl.split(tl.permute(tl.reshape(total, [2, COLUMNS, COLUMNS]), (1, 2, 0)))
        at, tile_column = tile_row * 2, tile_column * 2 + tl.program_id(0) % 2
        _stored(
            upper, A, B, OUT, at, tile_column, rows, a_row, a_inner, b_row, b_inner, alpha, beta, gamma, identity,
            BETA, GAMMA, IDENTITY, COLUMNS,
        )  # fmt: skip
        _stored(
            under, A, B, OUT, at + 1, tile_column, rows, a_row, a_inner, b_row, b_inner, alpha, beta, gamma, identity,
            BETA, GAMMA, IDENTITY, COLUMNS,
        )  # fmt: skip


@triton.jit
def _momentum(M, G, U, STARTS, SCALE, SKIP, count, beta, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.load(STARTS + tl.program_id(1))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    grad = tl.load(G + start + at, mask=live, other=0.0).to(tl.float32) * tl.load(SCALE)
    moved = tl.load(M + start + at, mask=live, other=0.0).to(tl.float32) * beta + grad
    tl.store(U + tl.program_id(1).to(tl.int64) * count + at, (grad + beta * moved).to(U.dtype.element_ty), mask=live)
    tl.store(M + start + at, moved.to(M.dtype.element_ty), mask=at < tl.where(tl.load(SKIP) > 0, 0, count))


@triton.jit
def _update(W, U, STARTS, LR, SKIP, count, decay, size, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.load(STARTS + tl.program_id(1))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    lr = tl.load(LR)
    update = tl.load(U + tl.program_id(1).to(tl.int64) * count + at, mask=live, other=0.0).to(tl.float32) * size
    weight = tl.load(W + start + at, mask=live, other=0.0).to(tl.float32)
    moved = weight * (1.0 - lr * decay) - lr * update
    tl.store(W + start + at, moved.to(W.dtype.element_ty), mask=at < tl.where(tl.load(SKIP) > 0, 0, count))


def _run_product(a: Tensor, b: Tensor, alpha: float, beta: float = 0.0, gamma: float = 0.0, identity: float = 0.0) -> Tensor:
    count, rows, inner = a.shape
    out = torch.empty(count, rows, rows, dtype=a.dtype, device=a.device)
    tuned = launch.configuration(a, "newton_schulz.product", rows)
    tiles = -(-rows // tuned["rows"])
    launch.launch(
        _product, (tiles * (tiles + 1) // 2 * (tuned["rows"] // tuned["columns"]), count), a, b, out, rows, inner, *a.stride(), *b.stride(),
        alpha, beta, gamma, identity, BETA=beta != 0.0, GAMMA=gamma != 0.0, IDENTITY=identity != 0.0, ROWS=tuned["rows"],
        COLUMNS=tuned["columns"], INNER=tuned["inner"], GROUP=tuned["group"], warps=tuned["warps"], stages=tuned["stages"],
    )  # fmt: skip
    return out


def _applied(x: Tensor, q: Tensor, tall: bool, beta: float, alpha: float) -> Tensor:
    """beta x + alpha q x (tall: x q), rounded once. cuBLAS: a dense Triton product on Hopper is 3 to 15 % behind it."""
    out = torch.empty_like(x)
    if not launch.recording():  # else outputs stay undefined
        torch.baddbmm(x, *((x, q) if tall else (q, x)), beta=beta, alpha=alpha, out=out)
    return out


def _multiplier(r: Tensor, length: int) -> tuple[Tensor, float]:
    """What a segment's steps multiply X by, given X's Gram matrix: Q, and k where the identity is not in Q."""
    a, b, c = COEFFICIENTS
    k = a**length
    whole = k * _Q if length <= 2 else 0.0
    if length == 1:
        return _run_product(r, r, c * _Q / _R**2, b * _Q / _R, identity=whole), 0.0
    q = z = _run_product(r, r, c * _Z / _R**2, b * _Z / _R)
    held = _Z
    for step in range(1, length):
        w = _run_product(r, z, 1.0 / _Z, a)
        r = _run_product(w, z, 1.0 / _Z, a)
        z = _run_product(r, r, c * _Z / _R**2, b * _Z / _R)
        q = _run_product(q, z, _Q / held / _Z, a * _Q / held, a**step * _Q / _Z, whole if step == length - 1 else 0.0)
        held = _Q
    return q, 0.0 if whole else k


def _run(update: Tensor, steps: int) -> Tensor:
    x = torch.empty(update.shape, dtype=torch.float16, device=update.device)
    if 0 in update.shape:
        return x
    norm = torch.linalg.vector_norm(update, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    torch.mul(update, _X / norm.clamp_min(_TINY), out=x)
    _, rows, columns = update.shape
    tall, segments = rows > columns, plan(rows, columns, steps)
    for segment, length in enumerate(segments):
        wide = x.mT if tall else x
        q, k = _multiplier(_run_product(wide, wide, _R / _X**2), length)
        held = _X if segment == len(segments) - 1 else 1.0
        x = _applied(x, q, tall, k / held, 1.0 / _Q / held)
    return x


def _run_momentum(
    momentum: Tensor, grads: Tensor, starts: Tensor, shape: Sequence[int], scale: Tensor, skip: Tensor, beta: float, aligned: bool
) -> Tensor:
    update = torch.empty(starts.shape[0], *shape, dtype=torch.bfloat16, device=grads.device)
    count = math.prod(shape)
    tuned = launch.configuration(grads, "newton_schulz.momentum", count)
    launch.launch(
        _momentum, (-(-count // tuned["block"]), starts.shape[0]), momentum, grads, update, starts, scale, skip, count, beta,
        ALIGNED=aligned, BLOCK=tuned["block"], warps=tuned["warps"],
    )  # fmt: skip
    return update


def _run_update(
    weights: Tensor, starts: Tensor, update: Tensor, lr: Tensor, skip: Tensor, decay: float, size: float, aligned: bool
) -> None:
    count = update[0].numel() if update.shape[0] else 0
    tuned = launch.configuration(weights, "newton_schulz.update", count)
    launch.launch(
        _update, (-(-count // tuned["block"]), starts.shape[0]), weights, update.contiguous(), starts, lr, skip, count, decay, size,
        ALIGNED=aligned, BLOCK=tuned["block"], warps=tuned["warps"],
    )  # fmt: skip


_newton_schulz = launch.operator(
    "newton_schulz(Tensor update, int steps) -> Tensor",
    _run,
    lambda update, steps: torch.empty(update.shape, dtype=torch.float16, device=update.device),
)
_symmetric = launch.operator(
    "symmetric_product(Tensor a, Tensor b, float alpha, float beta, float gamma, float identity) -> Tensor",
    _run_product,
    lambda a, b, *_: a.new_empty(a.shape[0], a.shape[1], a.shape[1]),
)
_moved = launch.operator(
    "muon_momentum(Tensor(a!) momentum, Tensor grads, Tensor starts, int[] shape, Tensor scale, Tensor skip, float beta, bool aligned) -> Tensor",
    _run_momentum,
    lambda momentum, grads, starts, shape, *_: torch.empty(starts.shape[0], *shape, dtype=torch.bfloat16, device=grads.device),
)
_updated = launch.operator(
    "muon_update(Tensor(a!) weights, Tensor starts, Tensor update, Tensor lr, Tensor skip, float decay, float size, bool aligned) -> ()",
    _run_update,
    lambda *_: None,
)


def supports(update_nrc: Tensor, steps: int = 5) -> str | None:
    """Why the fused iteration cannot take this batch; None: it can."""
    if why := launch.missing(update_nrc):
        return why
    if update_nrc.dtype not in launch.FLOATS or update_nrc.ndim != 3:
        return f"a batch of matrices [n, r, c] in bf16, fp16 or fp32 is needed, not {update_nrc.dtype} {tuple(update_nrc.shape)}"
    return None if steps > 0 else f"{steps} steps are none"


def fused(update_nrc: Tensor, steps: int = 5) -> Tensor:
    """As `reference` in fp16 (see above) by the form with the fewest FLOPs; returned in fp16. Raises KernelError where `supports` says no."""
    if why := supports(update_nrc, steps):
        raise KernelError(f"newton_schulz: {why}; newton_schulz.reference takes it")
    return _newton_schulz(update_nrc, steps)


def symmetric(a_nrk: Tensor, b_nrk: Tensor, alpha: float = 1.0, beta: float = 0.0, gamma: float = 0.0, identity: float = 0.0) -> Tensor:
    """alpha a b^T + beta a + gamma b + identity I for results known to be symmetric (a is b, or symmetric matrices that commute), and exactly so.

    Only tiles on or below the diagonal are computed; the others mirror them. Halves (bf16, fp16) with sums in fp32. Raises KernelError if it cannot.
    """
    why = launch.missing(a_nrk)
    if why is None and (a_nrk.dtype not in (torch.bfloat16, torch.float16) or b_nrk.dtype != a_nrk.dtype):
        why = f"both factors must be bf16 or both fp16, not {a_nrk.dtype} and {b_nrk.dtype}"
    if why is None and (a_nrk.ndim != 3 or a_nrk.shape != b_nrk.shape or ((beta or gamma) and a_nrk.shape[1] != a_nrk.shape[2])):
        why = f"factors {tuple(a_nrk.shape)} and {tuple(b_nrk.shape)} do not fit"
    if why:
        raise KernelError(f"symmetric product: {why}; torch.bmm takes it")
    return _symmetric(a_nrk, b_nrk, alpha, beta, gamma, identity)


def _checked(flat: Tensor, starts: Tensor) -> None:
    if why := launch.missing(flat):
        raise KernelError(f"muon: {why}; momentum_reference and update_reference take it")
    if not flat.is_contiguous() or starts.dtype != torch.int64:
        raise KernelError("muon: a contiguous buffer and starts in int64 are needed; momentum_reference and update_reference take others")


def momentum_fused(
    momentum_x: Tensor,
    grads_x: Tensor,
    starts_n: Tensor,
    shape: Sequence[int],
    scale: Tensor,
    skip: Tensor,
    beta: float,
    aligned: bool = False,
) -> Tensor:
    """As `momentum_reference` in one launch: 14 B per element with fp32 momentum, 10 with bf16. Raises KernelError if it cannot run."""
    _checked(momentum_x, starts_n)
    return _moved(momentum_x, grads_x, starts_n, list(shape), scale, skip, beta, aligned)


def update_fused(
    weights_x: Tensor, starts_n: Tensor, update_nrc: Tensor, lr: Tensor, skip: Tensor, decay: float, size: float, aligned: bool = False
) -> None:
    """As `update_reference` in one launch: 10 B per element of fp32 weights. Raises KernelError if it cannot run."""
    _checked(weights_x, starts_n)
    _updated(weights_x, starts_n, update_nrc, lr, skip, decay, size, aligned)


def newton_schulz(update_nrc: Tensor, steps: int = 5) -> Tensor:
    """`fused` on a GPU, `reference` on a CPU."""
    return (fused if update_nrc.is_cuda else reference)(update_nrc, steps)


def muon_momentum(
    momentum_x: Tensor,
    grads_x: Tensor,
    starts_n: Any,
    shape: Sequence[int],
    scale: Tensor,
    skip: Tensor,
    beta: float,
    aligned: bool = False,
) -> Tensor:
    """`momentum_fused` on a GPU, `momentum_reference` on a CPU."""
    return (momentum_fused if grads_x.is_cuda else momentum_reference)(momentum_x, grads_x, starts_n, shape, scale, skip, beta, aligned)


def muon_update(
    weights_x: Tensor, starts_n: Any, update_nrc: Tensor, lr: Tensor, skip: Tensor, decay: float, size: float, aligned: bool = False
) -> None:
    """`update_fused` on a GPU, `update_reference` on a CPU."""
    (update_fused if weights_x.is_cuda else update_reference)(weights_x, starts_n, update_nrc, lr, skip, decay, size, aligned)


_WIDE = ((128, 128, 64, 8, 8, 3), (128, 128, 64, 8, 8, 4), (128, 128, 64, 4, 8, 3), (128, 128, 64, 8, 4, 3), (128, 128, 32, 8, 8, 4))
_TALLER = ((256, 128, 64, 4, 8, 3), (256, 128, 64, 8, 8, 3), (256, 128, 32, 8, 8, 4), (256, 128, 64, 4, 8, 4))
_SMALL = (
    (64, 64, 64, 8, 4, 3),
    (64, 64, 32, 8, 4, 4),
    (128, 64, 64, 8, 4, 3),
    (64, 32, 64, 8, 4, 3),
    (32, 32, 32, 8, 4, 2),
    (128, 64, 32, 8, 4, 3),
)
_DEFAULT = ((128, 128, 32, 8, 8, 2), (128, 128, 32, 8, 8, 3), (64, 64, 64, 8, 4, 2))
SPACE: dict[str, list[dict[str, int]]] = {
    "newton_schulz.product": [
        dict(zip(("rows", "columns", "inner", "group", "warps", "stages"), numbers, strict=True))
        for numbers in (*_WIDE, *_TALLER, *_SMALL, *_DEFAULT)
    ],
    **{
        f"newton_schulz.{name}": [
            {"block": block, "warps": warps} for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8))
        ]
        for name in ("momentum", "update")
    },
}


def _sample(case: Any, device: str) -> launch.Sample:
    count, rows, columns, dtype = case
    return [torch.randn(count, rows, columns, dtype=dtype, device=device)], lambda f, update: f(update)


def _buffers(case: Any, device: str) -> tuple[Tensor, Tensor, Sequence[int], Tensor, Tensor]:
    """`(flat, starts, shape, one, nothing)`: n matrices laid end to end, and two 0-d numbers."""
    count, rows, columns, _ = case
    starts = torch.arange(count, device=device) * rows * columns
    return (
        torch.randn(count * rows * columns, device=device),
        starts,
        (rows, columns),
        torch.ones((), device=device),
        torch.zeros((), device=device),
    )


def _sample_momentum(case: Any, device: str) -> launch.Sample:
    grads, starts, shape, one, none = _buffers(case, device)
    aligned = math.prod(shape) % 16 == 0
    return [torch.randn_like(grads).to(case[-1]), grads], lambda f, m, g: f(m, g, starts, shape, one, none, 0.95, aligned)


def _sample_update(case: Any, device: str) -> launch.Sample:
    weights, starts, shape, one, none = _buffers(case, device)
    aligned = math.prod(shape) % 16 == 0
    update = torch.randn(starts.shape[0], *shape, device=device).to(case[-1])
    return [weights, update], lambda f, w, u: f(w, starts, u, one, none, 0.1, 2.0, aligned)


def _traffic(case: Any) -> launch.Traffic:
    count, rows, columns, dtype = case
    segments = plan(rows, columns)
    elements = count * rows * columns
    moved = elements * (2 * dtype.itemsize + 2 + 6 * len(segments))  # norm and cast; X read for R, read and written for Q X
    return launch.Traffic(forward_bytes=float(moved), forward_flops=count * flops(rows, columns, segments))


def _pass_traffic(case: Any, *, wide: int, narrow: int) -> launch.Traffic:
    """`wide` bytes of fp32 per element, and `narrow` passes over what has the case's dtype."""
    count, rows, columns, dtype = case
    return launch.Traffic(forward_bytes=float(count * rows * columns * (wide + narrow * dtype.itemsize)))


_PASSES = [(2, 4096, 4096), (1, 4096, 14336)]
OPERATIONS = {
    "newton_schulz": launch.Operation({"reference": reference, "fused": fused}, CASES, SIZES, _sample, _traffic, differentiable=False),
    "muon_momentum": launch.Operation(
        {"reference": momentum_reference, "fused": momentum_fused},
        CASES,
        [(*size, dtype) for size in _PASSES for dtype in (torch.float32, torch.bfloat16)],
        _sample_momentum,
        functools.partial(_pass_traffic, wide=6, narrow=2),
        differentiable=False,
    ),
    "muon_update": launch.Operation(
        {"reference": update_reference, "fused": update_fused},
        CASES,
        [(*size, torch.float16) for size in _PASSES],
        _sample_update,
        functools.partial(_pass_traffic, wide=8, narrow=1),
        differentiable=False,
    ),
}
