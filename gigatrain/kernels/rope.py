"""Rotary position embedding of queries and keys (arXiv:2104.09864).

    (a, b) -> (a cos - b sin, b cos + a sin)        for each pair of channels
    halves: a, b are channels i and i + r of the first 2r; interleaved: channels 2i and 2i + 1. Channels beyond 2r pass through (partial rotation).

Legend: q_bthd, k_btkd: batch, tokens, query or key heads, channels; cos_btr, sin_btr: r channel pairs, b may be 1. If cos and sin are wider than q (fp32
for bf16) the rotation is computed in their dtype and rounded once. The backward turns by the opposite angle.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigatrain.errors import KernelError
from gigatrain.kernels import launch
from gigatrain.kernels.launch import tl, triton

# (tokens, batch, heads, kv_heads, head_dim, rotary channels, interleaved, rows of cos and sin: 1 or batch, cos and sin in fp32, dtype)
CASES = [
    (t, b, h, k, d, r, interleaved, rows, wide, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for interleaved in (False, True)
    for (t, b, h, k, d, r), tables in (
        ((8, 2, 4, 2, 16, 16), ((1, False), (2, False), (2, True))),
        ((7, 1, 3, 1, 6, 6), ((1, False), (1, True))),
        ((5, 3, 2, 2, 12, 8), ((3, False), (1, True))),
        ((1, 2, 1, 1, 2, 2), ((2, False),)),
        ((0, 1, 2, 1, 8, 8), ((1, False),)),
    )
    for rows, wide in tables
]
# Llama-3-8B, Llama-3.2-1B and the 8B of four packed documents; Gemma-3-4B; OLMo-2-13B (fp32 tables); Helium-2B (interleaved); Phi-4-mini (partial)
SIZES = [
    (8192, 1, 32, 8, 128, 128, False, 1, False, torch.bfloat16),
    (8192, 1, 32, 8, 64, 64, False, 1, False, torch.bfloat16),
    (2048, 4, 32, 8, 128, 128, False, 4, False, torch.bfloat16),
    (8192, 1, 8, 4, 256, 256, False, 1, False, torch.bfloat16),
    (8192, 1, 40, 40, 128, 128, False, 1, True, torch.bfloat16),
    (8192, 1, 20, 20, 128, 128, True, 1, False, torch.bfloat16),
    (8192, 1, 24, 8, 128, 96, False, 1, False, torch.bfloat16),
]


def turn(x_bthd: Tensor, cos_btr: Tensor, sin_btr: Tensor, interleaved: bool) -> Tensor:
    """Rotates one of the two."""
    r = cos_btr.shape[-1]
    cos, sin = cos_btr.unsqueeze(2), sin_btr.unsqueeze(2)
    if interleaved:
        a, b = x_bthd[..., 0 : 2 * r : 2], x_bthd[..., 1 : 2 * r : 2]
    else:
        a, b = x_bthd[..., :r], x_bthd[..., r : 2 * r]
    turned = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    out = out.to(x_bthd.dtype)
    return out if 2 * r == x_bthd.shape[-1] else torch.cat((out, x_bthd[..., 2 * r :]), -1)


def reference(q_bthd: Tensor, k_btkd: Tensor, cos_btr: Tensor, sin_btr: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotated `(q, k)` in plain torch, same shapes and dtypes."""
    return turn(q_bthd, cos_btr, sin_btr, interleaved), turn(k_btkd, cos_btr, sin_btr, interleaved)


def _turned(x_bthd: Tensor, cos_btr: Tensor, sin_btr: Tensor, interleaved: bool, sign: float) -> Tensor:
    """`turn` by the angle, or by its opposite for `sign` -1, written where it belongs instead of being put together."""
    wide = torch.promote_types(x_bthd.dtype, cos_btr.dtype)
    r = cos_btr.shape[-1]
    first, second = (slice(0, 2 * r, 2), slice(1, 2 * r, 2)) if interleaved else (slice(0, r), slice(r, 2 * r))
    x = x_bthd.to(wide)
    out = torch.empty_like(x)
    a, b = x[..., first], x[..., second]
    cos, sin = cos_btr.unsqueeze(2), sin_btr.unsqueeze(2)
    torch.mul(a, cos, out=out[..., first]).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out[..., second]).addcmul_(a, sin, value=sign)
    if 2 * r < x.shape[-1]:
        out[..., 2 * r :] = x[..., 2 * r :]
    return out.to(x_bthd.dtype)


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turned(q, cos, sin, interleaved, 1.0), _turned(k, cos, sin, interleaved, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(dq, cos, sin, ctx.interleaved, -1.0), _turned(dk, cos, sin, ctx.interleaved, -1.0), None, None, None


def lean(q_bthd: Tensor, k_btkd: Tensor, cos_btr: Tensor, sin_btr: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """As `reference` with the backward written out: keeps cos and sin only."""
    return _Lean.apply(q_bthd, k_btkd, cos_btr, sin_btr, interleaved)  # type: ignore[return-value]


# Fused. Floor: 4 bytes per element of bf16 each way, and cos and sin once. Saves cos and sin only; the backward is the forward with the other sign.
WIDEST = 512  # channels of a head
# What a tuner tries, with 8 to 64 elements per thread: less makes loads narrower than 16 bytes. Sizes in the tables are channels of a head.
SPACE = {
    "rope.turn": [
        {"elements": elements, "warps": warps}
        for elements in (1024, 2048, 4096, 8192, 16384)
        for warps in (2, 4, 8)
        if 8 <= elements // (32 * warps) <= 64
    ]
}


@triton.jit
def places(first, group, tokens, count, OF: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Of a tile: tokens [T, 1, 1], heads [1, H, 1], batch and position of each token [T, 1, 1], all in int64, and which of [T, H, 1] exist."""
    token = first + tl.arange(0, TOKENS)[:, None, None]
    head = group * HEADS + tl.arange(0, HEADS)[None, :, None]
    live = (token < count) & (head < OF)
    return token.to(tl.int64), head.to(tl.int64), (token // tokens).to(tl.int64), (token % tokens).to(tl.int64), live


@triton.jit
def load_pairs(X, live, R: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both channels of each pair, [T, H, BLOCK] in fp32, of heads that begin at X [T, H, 1]."""
    if INTERLEAVED:  # loaded as it lies, and parted in registers
        channel = tl.arange(0, 2 * BLOCK)[None, None]
        x = tl.load(X + channel, mask=live & (channel < 2 * R), other=0.0)
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], BLOCK, 2)))
    else:
        channel = tl.arange(0, BLOCK)[None, None]
        a = tl.load(X + channel, mask=live & (channel < R), other=0.0)
        b = tl.load(X + R + channel, mask=live & (channel < R), other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_pairs(X, live, a, b, R: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The inverse of load_pairs; rounds."""
    a, b = a.to(X.dtype.element_ty), b.to(X.dtype.element_ty)
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK)[None, None]
        tl.store(X + channel, tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1], 2 * BLOCK)), mask=live & (channel < 2 * R))
    else:
        channel = tl.arange(0, BLOCK)[None, None]
        tl.store(X + channel, a, mask=live & (channel < R))
        tl.store(X + R + channel, b, mask=live & (channel < R))


@triton.jit
def load_angles(COS, SIN, at, live, sign, R: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin * sign [T, 1, BLOCK] in fp32, of tokens whose angles begin at `at` [T, 1, 1]. Every layer reads them again: they stay in L2."""
    pair = tl.arange(0, BLOCK)[None, None]
    cos = tl.load(COS + at + pair, mask=live & (pair < R), other=0.0, eviction_policy="evict_last").to(tl.float32)
    sin = tl.load(SIN + at + pair, mask=live & (pair < R), other=0.0, eviction_policy="evict_last").to(tl.float32)
    return cos, sin * sign


@triton.jit
def _tile(
    X, OUT, COS, SIN, first, group, tokens, count, x_batch, x_token, x_head, angle_batch, angle_token, sign,
    OF: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, UNIT: tl.constexpr,
    INTERLEAVED: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row, head, batch, position, live = places(first, group, tokens, count, OF, TOKENS, HEADS)
    x = X + (batch * x_batch + position * x_token + head * x_head) * UNIT
    out = OUT + (row * OF + head) * D
    cos, sin = load_angles(COS, SIN, batch * angle_batch + position * angle_token, row < count, sign, R, BLOCK)
    a, b = load_pairs(x, live, R, BLOCK, INTERLEAVED)
    if REST:
        channel = 2 * R + tl.arange(0, REST)[None, None]
        rest = tl.load(x + channel, mask=live & (channel < D))
        tl.store(out + channel, rest, mask=live & (channel < D))
    store_pairs(out, live, a * cos - b * sin, b * cos + a * sin, R, BLOCK, INTERLEAVED)


@triton.jit
def _turn(
    Q, K, COS, SIN, Q_OUT, K_OUT, tokens, count, q_batch, q_token, q_head, k_batch, k_token, k_head, angle_batch, angle_token, sign,
    H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, UNIT: tl.constexpr,
    INTERLEAVED: tl.constexpr, Q_TOKENS: tl.constexpr, Q_HEADS: tl.constexpr, K_TOKENS: tl.constexpr, K_HEADS: tl.constexpr,
    SPAN: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr,
):  # fmt: skip
    # The tiles of SPAN tokens, queries and keys, follow each other: cos and sin are read from memory once, and from L2 then.
    first = tl.program_id(0) // (Q_TILES + K_TILES) * SPAN
    tile = tl.program_id(0) % (Q_TILES + K_TILES)
    if tile < Q_TILES:
        _tile(
            Q, Q_OUT, COS, SIN, first + tile % (SPAN // Q_TOKENS) * Q_TOKENS, tile // (SPAN // Q_TOKENS), tokens, count,
            q_batch, q_token, q_head, angle_batch, angle_token, sign, H, D, R, BLOCK, REST, UNIT, INTERLEAVED, Q_TOKENS, Q_HEADS,
        )  # fmt: skip
    else:
        tile -= Q_TILES
        _tile(
            K, K_OUT, COS, SIN, first + tile % (SPAN // K_TOKENS) * K_TOKENS, tile // (SPAN // K_TOKENS), tokens, count,
            k_batch, k_token, k_head, angle_batch, angle_token, sign, KH, D, R, BLOCK, REST, UNIT, INTERLEAVED, K_TOKENS, K_HEADS,
        )  # fmt: skip


def unit_stride(x: Tensor) -> Tensor:
    """x with unit stride along its channels: itself wherever it has that, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def steps(*xs: Tensor) -> tuple[int, list[int]]:
    """`(unit, strides of batch, token and head of each)` in units of 8 elements where all are multiples: then the compiler knows that loads are aligned."""
    strides = [stride if size > 1 else 0 for x in xs for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return unit, [stride // unit for stride in strides]


def tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """`(cos, sin, batch stride, token stride)` of two tables of one layout; one row serves every batch."""
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)


def widths(channels: int, pairs: int) -> tuple[int, int, int]:
    """Powers of two that hold the pairs, the channels beyond them (none: 0), and all of a head."""
    rest = channels - 2 * pairs
    block, beyond = launch.block(pairs), launch.block(rest) if rest else 0
    return block, beyond, launch.block(2 * block + beyond)


def tiles(elements: int, heads: int, width: int) -> tuple[int, int]:
    """`(tokens, heads)` of a tile of `elements`: all heads of some tokens, or some heads of one. All are powers of two."""
    together = min(launch.block(heads), max(1, elements // width))
    return max(1, elements // (together * width)), together


def grid(count: int, heads: tuple[int, int], elements: int, width: int) -> tuple[int, dict[str, int]]:
    """`(programs, constants)` of a launch over all tiles of queries and keys."""
    shapes = [tiles(elements, of, width) for of in heads]
    span = max(tokens for tokens, _ in shapes)
    q_tiles, k_tiles = (span // tokens * -(-of // together) for of, (tokens, together) in zip(heads, shapes, strict=True))
    (q_tokens, q_heads), (k_tokens, k_heads) = shapes
    constants = {"Q_TOKENS": q_tokens, "Q_HEADS": q_heads, "K_TOKENS": k_tokens, "K_HEADS": k_heads}
    return -(-count // span) * (q_tiles + k_tiles), constants | {"SPAN": span, "Q_TILES": q_tiles, "K_TILES": k_tiles}


def _run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: float) -> tuple[Tensor, Tensor]:
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q, k = unit_stride(q), unit_stride(k)
    b, t, h, d = q.shape
    kh, r = k.shape[2], cos.shape[-1]
    cos, sin, angle_batch, angle_token = tables(cos, sin)
    unit, strides = steps(q, k)
    tuned = launch.configuration(q, "rope.turn", d)
    block, rest, width = widths(d, r)
    programs, constants = grid(b * t, (h, kh), tuned["elements"], width)
    launch.launch(
        _turn, (programs,), q, k, cos, sin, q_out, k_out, t, b * t, *strides, angle_batch, angle_token, sign, H=h, KH=kh, D=d, R=r,
        BLOCK=block, REST=rest, UNIT=unit, INTERLEAVED=interleaved, warps=tuned["warps"], **constants,
    )  # fmt: skip
    return q_out, k_out


_op = launch.operator(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, float sign) -> (Tensor, Tensor)",
    _run,
    lambda q, k, cos, sin, interleaved, sign: (q.new_empty(q.shape), k.new_empty(k.shape)),
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, cos, sin, ctx.interleaved, ctx.sign = inputs
    ctx.save_for_backward(cos, sin)
    ctx.shapes = q.shape, k.shape
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> Any:
    cos, sin = ctx.saved_tensors
    given = [dx if needed else None for dx, needed in zip((dq, dk), ctx.needs_input_grad, strict=False)]
    found = next((dx for dx in given if dx is not None), None)
    if found is None:
        return None, None, None, None, None, None
    none = found.new_empty(*found.shape[:2], 0, found.shape[3])  # no heads: nothing is read, nothing is written
    turned = _op(*(none if dx is None else dx for dx in given), cos, sin, ctx.interleaved, -ctx.sign)
    return *(None if dx is None else back for dx, back in zip(given, turned, strict=True)), None, None, None, None


_call = launch.differentiable(_op, _save, _grads)


def supports(q_bthd: Tensor, k_btkd: Tensor, cos_btr: Tensor, sin_btr: Tensor) -> str | None:
    """Why the fused kernel cannot take these tensors; None: it can."""
    if why := launch.missing(q_bthd):
        return why
    tensors = (q_bthd, k_btkd, cos_btr, sin_btr)
    if k_btkd.dtype != q_bthd.dtype or sin_btr.dtype != cos_btr.dtype or any(x.dtype not in launch.FLOATS for x in tensors):
        found = ", ".join(str(x.dtype) for x in tensors)
        return f"q and k, and cos and sin, must share one of bf16, fp16, fp32; they are {found}"
    if len({x.device for x in tensors}) > 1:
        return f"the tensors are on {', '.join(str(x.device) for x in tensors)}"
    shapes = f"q {tuple(q_bthd.shape)}, k {tuple(k_btkd.shape)}, cos {tuple(cos_btr.shape)} and sin {tuple(sin_btr.shape)}"
    fit = q_bthd.ndim == k_btkd.ndim == 4 and cos_btr.ndim == 3 and q_bthd.shape[:2] == k_btkd.shape[:2] and sin_btr.shape == cos_btr.shape
    if not fit or q_bthd.shape[3] != k_btkd.shape[3] or cos_btr.shape[0] not in (1, q_bthd.shape[0]) or cos_btr.shape[1] != q_bthd.shape[1]:
        return f"{shapes} do not fit"
    if not 2 <= 2 * cos_btr.shape[2] <= q_bthd.shape[3] <= WIDEST:
        return f"{2 * cos_btr.shape[2]} rotary channels of {q_bthd.shape[3]} are not between 2 and all of at most {WIDEST}"
    return None


def fused(q_bthd: Tensor, k_btkd: Tensor, cos_btr: Tensor, sin_btr: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """As `reference` in one Triton launch each way, rounded once; keeps cos and sin. Raises KernelError where `supports` says no."""
    if why := supports(q_bthd, k_btkd, cos_btr, sin_btr):
        raise KernelError(f'rope: {why}; set kernels.rope = "lean"')
    return _call(q_bthd, k_btkd, cos_btr, sin_btr, interleaved, 1.0)


def rope(q_bthd: Tensor, k_btkd: Tensor, cos_btr: Tensor, sin_btr: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """`fused` on a GPU, `lean` on a CPU."""
    return (fused if q_bthd.is_cuda else lean)(q_bthd, k_btkd, cos_btr, sin_btr, interleaved)


def angles(rows: int, tokens: int, pairs: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Random cos_btr and sin_btr, for samples."""
    angle = torch.randn(rows, tokens, pairs, dtype=torch.float64, device=device) * 3
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _sample(case: Any, device: str) -> launch.Sample:
    t, b, h, k, d, r, interleaved, rows, wide, dtype = case
    cos, sin = angles(rows, t, r // 2, torch.promote_types(dtype, torch.float32) if wide else dtype, device)

    def call(f: Any, q: Tensor, key: Tensor) -> Any:
        exact = q.dtype == torch.float64
        return f(q, key, cos.double() if exact else cos, sin.double() if exact else sin, interleaved)

    return [torch.randn(b, t, heads, d, dtype=dtype, device=device) for heads in (h, k)], call


def _traffic(case: Any) -> launch.Traffic:
    t, b, h, k, d, r, _, rows, wide, dtype = case
    moved = 2 * b * t * (h + k) * d * dtype.itemsize + rows * t * r * (4 if wide else dtype.itemsize)
    return launch.Traffic(moved, moved)


OPERATIONS = {"rope": launch.Operation({"reference": reference, "lean": lean, "fused": fused}, CASES, SIZES, _sample, _traffic)}
