"""RMS norm of each query and key head, then rotary embedding: `rms_norm` over head channels followed by `rope`.

    y = rotate(norm(x))        norm and its styles as in rms_norm.py, rotate as in rope.py

Legend: q_bthd, k_btkd, qw_d, kw_d, cos_btr, sin_btr as in rms_norm.py and rope.py; cos and sin None: no rotation (layers without positions). The
backward, with n = x * rstd, u = dy turned back, g = u * w (or 1 + w) and m(.) the mean over d:
    dx = rstd * (g - n * m(g * n))        dw = sum over b, t and heads of u * n
"""

from typing import Any

import torch
from torch import Tensor

from gigatrain.errors import KernelError
from gigatrain.kernels import launch, rms_norm, rope
from gigatrain.kernels.launch import tl, triton
from gigatrain.kernels.rms_norm import Style
from gigatrain.kernels.rope import load_angles, load_pairs, places, store_pairs

# (tokens, batch, heads, kv_heads, head_dim, rotary channels (0: no rotation), interleaved, style, dtype)
CASES = [
    (t, b, h, k, d, r, interleaved, style, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for t, b, h, k, d, r, interleaved, style in (
        (8, 2, 4, 2, 16, 16, False, "llama"),
        (8, 2, 4, 2, 16, 0, False, "llama"),
        (7, 1, 3, 1, 6, 6, True, "gemma"),
        (7, 1, 3, 1, 6, 0, False, "olmo"),
        (5, 3, 2, 2, 20, 12, True, "llama"),
        (31, 1, 5, 1, 96, 96, False, "olmo"),
        (33, 1, 1, 1, 80, 20, False, "gemma"),
        (1, 2, 2, 2, 2, 2, False, "llama"),
        (1, 2, 2, 2, 2, 0, False, "llama"),
        (0, 1, 2, 1, 8, 8, False, "llama"),
    )
]
# Qwen3-8B, Gemma-3-4B, Qwen3-Next-80B-A3B (partial), and Qwen3-8B's shape without positions
SIZES = [
    (8192, 1, 32, 8, 128, 128, False, "llama", torch.bfloat16),
    (8192, 1, 8, 4, 256, 256, False, "gemma", torch.bfloat16),
    (8192, 1, 16, 2, 256, 64, False, "gemma", torch.bfloat16),
    (8192, 1, 32, 8, 128, 0, False, "llama", torch.bfloat16),
]


def reference(
    q_bthd: Tensor,
    k_btkd: Tensor,
    qw_d: Tensor,
    kw_d: Tensor,
    cos_btr: Tensor | None,
    sin_btr: Tensor | None,
    eps: float,
    style: Style,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normed and rotated `(q, k)` in plain torch, same shapes and dtypes."""
    q, k = rms_norm.reference(q_bthd, qw_d, eps, style), rms_norm.reference(k_btkd, kw_d, eps, style)
    return (q, k) if cos_btr is None or sin_btr is None else rope.reference(q, k, cos_btr, sin_btr, interleaved)


def lean(
    q_bthd: Tensor,
    k_btkd: Tensor,
    qw_d: Tensor,
    kw_d: Tensor,
    cos_btr: Tensor | None,
    sin_btr: Tensor | None,
    eps: float,
    style: Style,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `reference`, from the lean versions of its two parts."""
    q, k = rms_norm.lean(q_bthd, qw_d, eps, style), rms_norm.lean(k_btkd, kw_d, eps, style)
    return (q, k) if cos_btr is None or sin_btr is None else rope.lean(q, k, cos_btr, sin_btr, interleaved)


# Fused. Floor, in bytes per element of bf16: 4 forward, 6 backward; per head also 4 of rstd each way, and cos and sin once. Saves q, k and rstd. All
# between a load and a store is fp32: only llama's norm rounds once more, before the weight.
WIDEST = 512  # channels of a head
# What a tuner tries; sizes in the tables are channels of a head. The backward also holds fp32 sums of a tile, so that its tiles are smaller.
SPACE = {
    "qk_norm_rope.forward": rope.SPACE["rope.turn"],
    "qk_norm_rope.backward": [
        {"elements": elements, "warps": warps, "programs": programs, "pipeline": pipeline}
        for elements, warps in ((1024, 2), (2048, 4), (4096, 8))
        for programs in (2, 4, 8)
        for pipeline in (1, 2, 3)
    ],
}


@triton.jit
def _gains(
    W, STYLE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """What n is multiplied by, of pairs and of the rest: [1, 1, BLOCK] twice and [1, 1, REST] (never read where there is none)."""
    w = W + tl.zeros([1, 1, 1], tl.int32)
    a, b = load_pairs(w, tl.full([1, 1, 1], 1, tl.int1), R, BLOCK, INTERLEAVED)
    rest = b
    if REST:
        channel = 2 * R + tl.arange(0, REST)[None, None]
        rest = tl.load(w + channel, mask=channel < D, other=0.0).to(tl.float32)
    if STYLE == "gemma":
        return a + 1.0, b + 1.0, rest + 1.0
    return a, b, rest


@triton.jit
def _narrowed(n, OUT, STYLE: tl.constexpr):
    """n as its style has it before the weight: llama's is rounded to the dtype behind OUT."""
    return n.to(OUT.dtype.element_ty).to(tl.float32) if STYLE == "llama" else n


@triton.jit
def _summed(x):
    """[T, H, N] summed to [1, 1, N]."""
    return tl.sum(tl.sum(x, 0, keep_dims=True), 1, keep_dims=True)


@triton.jit
def _forward_tile(
    X, W, OUT, RSTD, COS, SIN, first, group, tokens, count, x_batch, x_token, x_head, angle_batch, angle_token, eps,
    OF: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, UNIT: tl.constexpr, TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr, STYLE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row, head, batch, position, live = places(first, group, tokens, count, OF, TOKENS, HEADS)
    x = X + (batch * x_batch + position * x_token + head * x_head) * UNIT
    out = OUT + (row * OF + head) * D
    # All is loaded before the first store, behind which no load may be moved.
    a, b = load_pairs(x, live, R, BLOCK, INTERLEAVED)
    gain_a, gain_b, gain_rest = _gains(W, STYLE, D, R, BLOCK, REST, INTERLEAVED)
    if TURNED:
        cos, sin = load_angles(COS, SIN, batch * angle_batch + position * angle_token, row < count, 1.0, R, BLOCK)
    square = tl.sum(a * a + b * b, 2, keep_dims=True)
    if REST:
        channel = 2 * R + tl.arange(0, REST)[None, None]
        rest = tl.load(x + channel, mask=live & (channel < D), other=0.0).to(tl.float32)
        square += tl.sum(rest * rest, 2, keep_dims=True)
    rstd = tl.rsqrt(square / D + eps)
    tl.store(RSTD + row * OF + head, rstd, mask=live)
    if REST:
        rest = _narrowed(rest * rstd, OUT, STYLE) * gain_rest
        tl.store(out + channel, rest.to(OUT.dtype.element_ty), mask=live & (channel < D))
    a = _narrowed(a * rstd, OUT, STYLE) * gain_a
    b = _narrowed(b * rstd, OUT, STYLE) * gain_b
    if TURNED:
        store_pairs(out, live, a * cos - b * sin, b * cos + a * sin, R, BLOCK, INTERLEAVED)
    else:
        store_pairs(out, live, a, b, R, BLOCK, INTERLEAVED)


@triton.jit
def _forward(
    Q, K, QW, KW, COS, SIN, Q_OUT, K_OUT, Q_RSTD, K_RSTD, tokens, count, q_batch, q_token, q_head, k_batch, k_token, k_head,
    angle_batch, angle_token, eps,
    H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, UNIT: tl.constexpr,
    TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, STYLE: tl.constexpr, Q_TOKENS: tl.constexpr, Q_HEADS: tl.constexpr,
    K_TOKENS: tl.constexpr, K_HEADS: tl.constexpr, SPAN: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) // (Q_TILES + K_TILES) * SPAN  # in the order of rope's programs
    tile = tl.program_id(0) % (Q_TILES + K_TILES)
    if tile < Q_TILES:
        _forward_tile(
            Q, QW, Q_OUT, Q_RSTD, COS, SIN, first + tile % (SPAN // Q_TOKENS) * Q_TOKENS, tile // (SPAN // Q_TOKENS), tokens, count,
            q_batch, q_token, q_head, angle_batch, angle_token, eps, H, D, R, BLOCK, REST, UNIT, TURNED, INTERLEAVED, STYLE,
            Q_TOKENS, Q_HEADS,
        )  # fmt: skip
    else:
        tile -= Q_TILES
        _forward_tile(
            K, KW, K_OUT, K_RSTD, COS, SIN, first + tile % (SPAN // K_TOKENS) * K_TOKENS, tile // (SPAN // K_TOKENS), tokens, count,
            k_batch, k_token, k_head, angle_batch, angle_token, eps, KH, D, R, BLOCK, REST, UNIT, TURNED, INTERLEAVED, STYLE,
            K_TOKENS, K_HEADS,
        )  # fmt: skip


@triton.jit
def _backward_tiles(
    program, DY, X, W, COS, SIN, RSTD, DX, PARTS, tokens, count, dy_batch, dy_token, dy_head, x_batch, x_token, x_head,
    angle_batch, angle_token,
    OF: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, UNIT: tl.constexpr, TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr, STYLE: tl.constexpr, WEIGHT: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    PIPELINE: tl.constexpr,
):  # fmt: skip
    """The share of one program of the tiles of queries or of keys, and its part of their weight's gradient."""
    gain_a, gain_b, gain_rest = _gains(W, STYLE, D, R, BLOCK, REST, INTERLEAVED)
    dw_a = tl.zeros([TOKENS, HEADS, BLOCK], tl.float32)
    dw_b = tl.zeros([TOKENS, HEADS, BLOCK], tl.float32)
    if REST:
        channel = 2 * R + tl.arange(0, REST)[None, None]
        dw_rest = tl.zeros([TOKENS, HEADS, REST], tl.float32)
    groups: tl.constexpr = (OF + HEADS - 1) // HEADS
    tiles = (count + TOKENS - 1) // TOKENS * groups
    for tile in tl.range(program, tiles, tl.num_programs(0), num_stages=PIPELINE):  # type: ignore[misc]
        row, head, batch, position, live = places(tile // groups * TOKENS, tile % groups, tokens, count, OF, TOKENS, HEADS)
        dy = DY + (batch * dy_batch + position * dy_token + head * dy_head) * UNIT
        x = X + (batch * x_batch + position * x_token + head * x_head) * UNIT
        dx = DX + (row * OF + head) * D
        u_a, u_b = load_pairs(dy, live, R, BLOCK, INTERLEAVED)
        n_a, n_b = load_pairs(x, live, R, BLOCK, INTERLEAVED)
        rstd = tl.load(RSTD + row * OF + head, mask=live, other=0.0)
        if TURNED:
            cos, sin = load_angles(COS, SIN, batch * angle_batch + position * angle_token, row < count, -1.0, R, BLOCK)
            u_a, u_b = u_a * cos - u_b * sin, u_b * cos + u_a * sin
        n_a *= rstd
        n_b *= rstd
        if WEIGHT:
            dw_a += u_a * n_a
            dw_b += u_b * n_b
        u_a *= gain_a
        u_b *= gain_b
        mean = tl.sum(u_a * n_a + u_b * n_b, 2, keep_dims=True)
        if REST:
            u = tl.load(dy + channel, mask=live & (channel < D), other=0.0).to(tl.float32)
            n = tl.load(x + channel, mask=live & (channel < D), other=0.0).to(tl.float32) * rstd
            if WEIGHT:
                dw_rest += u * n
            u *= gain_rest
            mean += tl.sum(u * n, 2, keep_dims=True)
        mean /= D
        store_pairs(dx, live, rstd * (u_a - n_a * mean), rstd * (u_b - n_b * mean), R, BLOCK, INTERLEAVED)
        if REST:
            tl.store(dx + channel, (rstd * (u - n * mean)).to(DX.dtype.element_ty), mask=live & (channel < D))
    if WEIGHT:
        part = PARTS + program.to(tl.int64) * (2 * D) + tl.zeros([1, 1, 1], tl.int32)
        store_pairs(part, tl.full([1, 1, 1], 1, tl.int1), _summed(dw_a), _summed(dw_b), R, BLOCK, INTERLEAVED)
        if REST:
            tl.store(part + channel, _summed(dw_rest), mask=channel < D)


@triton.jit
def _backward(
    DQ_OUT, DK_OUT, Q, K, QW, KW, COS, SIN, Q_RSTD, K_RSTD, DQ, DK, PARTS, tokens, count,
    dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head, q_batch, q_token, q_head, k_batch, k_token, k_head, angle_batch, angle_token,
    H: tl.constexpr, KH: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, UNIT: tl.constexpr,
    TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, STYLE: tl.constexpr, WEIGHT: tl.constexpr, Q_TOKENS: tl.constexpr,
    Q_HEADS: tl.constexpr, K_TOKENS: tl.constexpr, K_HEADS: tl.constexpr, PIPELINE: tl.constexpr,
):  # fmt: skip
    # One after the other, so that the sums of one weight only are held; in opposite orders, so that the last query and key tiles fall to others.
    _backward_tiles(
        tl.program_id(0), DQ_OUT, Q, QW, COS, SIN, Q_RSTD, DQ, PARTS, tokens, count, dq_batch, dq_token, dq_head, q_batch, q_token, q_head,
        angle_batch, angle_token, H, D, R, BLOCK, REST, UNIT, TURNED, INTERLEAVED, STYLE, WEIGHT, Q_TOKENS, Q_HEADS, PIPELINE,
    )  # fmt: skip
    _backward_tiles(
        tl.num_programs(0) - 1 - tl.program_id(0), DK_OUT, K, KW, COS, SIN, K_RSTD, DK, PARTS + D, tokens, count,
        dk_batch, dk_token, dk_head, k_batch, k_token, k_head, angle_batch, angle_token, KH, D, R, BLOCK, REST, UNIT, TURNED,
        INTERLEAVED, STYLE, WEIGHT, K_TOKENS, K_HEADS, PIPELINE,
    )  # fmt: skip


def _shared(q: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[tuple[Any, Any, int, int], int, dict[str, Any]]:
    """`(tables with their strides, padded width of a head, constants)` that both directions are launched with; without tables nothing is turned."""
    d = q.shape[-1]
    pairs = d // 2 if cos is None else cos.shape[-1]
    block, rest, width = rope.widths(d, pairs)
    constants = {"D": d, "R": pairs, "BLOCK": block, "REST": rest, "TURNED": cos is not None}
    return (None, None, 0, 0) if cos is None or sin is None else rope.tables(cos, sin), width, constants


def _run_forward(
    q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float, style: str, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_rstd, k_rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for x in (q, k))
    q, k = rope.unit_stride(q), rope.unit_stride(k)
    b, t, h, d = q.shape
    kh = k.shape[2]
    (cos, sin, angle_batch, angle_token), width, constants = _shared(q, cos, sin)
    unit, strides = rope.steps(q, k)
    tuned = launch.configuration(q, "qk_norm_rope.forward", d)
    programs, shapes = rope.grid(b * t, (h, kh), tuned["elements"], width)
    launch.launch(
        _forward, (programs,), q, k, qw.contiguous(), kw.contiguous(), cos, sin, q_out, k_out, q_rstd, k_rstd, t, b * t, *strides,
        angle_batch, angle_token, eps, H=h, KH=kh, UNIT=unit, INTERLEAVED=interleaved, STYLE=style, warps=tuned["warps"], **constants, **shapes,
    )  # fmt: skip
    return q_out, k_out, q_rstd, k_rstd


def _run_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    qw: Tensor,
    kw: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_rstd: Tensor,
    k_rstd: Tensor,
    style: str,
    interleaved: bool,
    weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    dq_out, dk_out, q, k = (rope.unit_stride(x) for x in (dq_out, dk_out, q, k))
    b, t, h, d = q.shape
    kh = k.shape[2]
    (cos, sin, angle_batch, angle_token), width, constants = _shared(q, cos, sin)
    unit, strides = rope.steps(dq_out, dk_out, q, k)
    tuned = launch.configuration(q, "qk_norm_rope.backward", d)
    (q_tokens, q_heads), (k_tokens, k_heads) = (rope.tiles(tuned["elements"], of, width) for of in (h, kh))
    most = max(-(-b * t // q_tokens) * -(-h // q_heads), -(-b * t // k_tokens) * -(-kh // k_heads))
    programs = min(most, launch.processors(q) * tuned["programs"])
    parts = torch.empty(programs if weight else 0, 2 * d, dtype=torch.float32, device=q.device)  # of both weights
    launch.launch(
        _backward, (programs,), dq_out, dk_out, q, k, qw.contiguous(), kw.contiguous(), cos, sin, q_rstd, k_rstd, dq, dk, parts, t, b * t,
        *strides, angle_batch, angle_token, H=h, KH=kh, UNIT=unit, INTERLEAVED=interleaved, STYLE=style, WEIGHT=weight, Q_TOKENS=q_tokens,
        Q_HEADS=q_heads, K_TOKENS=k_tokens, K_HEADS=k_heads, PIPELINE=tuned["pipeline"], warps=tuned["warps"], **constants,
    )  # fmt: skip
    if not weight:
        return dq, dk, qw.new_empty(0)
    return dq, dk, launch.column_sum(parts, qw.dtype).view(2, d)


def _like_forward(q: Tensor, k: Tensor, *_: Any) -> Any:
    return *(x.new_empty(x.shape) for x in (q, k)), *(x.new_empty(x.shape[:-1], dtype=torch.float32) for x in (q, k))


def _like_backward(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, qw: Tensor, *rest: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), qw.new_empty((2, *qw.shape) if rest[-1] else 0)


_op = launch.operator(
    "qk_norm_rope(Tensor q, Tensor k, Tensor qw, Tensor kw, Tensor? cos, Tensor? sin, float eps, str style, bool interleaved)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_forward,
    _like_forward,
)
_backward_op = launch.operator(
    "qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor qw, Tensor kw, Tensor? cos, Tensor? sin, Tensor q_rstd, Tensor k_rstd,"
    " str style, bool interleaved, bool weight) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _like_backward,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, qw, kw, cos, sin, _, ctx.style, ctx.interleaved = inputs
    ctx.save_for_backward(q, k, qw, kw, cos, sin, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dq: Tensor | None, dk: Tensor | None, *_: Any) -> Any:
    none = (None,) * 5
    if dq is None and dk is None:
        return None, None, None, None, *none
    q, k, qw, kw, cos, sin, q_rstd, k_rstd = ctx.saved_tensors
    if dq is None:  # no heads: nothing is read, nothing is written
        dq, q, q_rstd = (x[:, :, :0] for x in (q, q, q_rstd))
    if dk is None:
        dk, k, k_rstd = (x[:, :, :0] for x in (k, k, k_rstd))
    needed = ctx.needs_input_grad[:4]
    dq, dk, dw = _backward_op(dq, dk, q, k, qw, kw, cos, sin, q_rstd, k_rstd, ctx.style, ctx.interleaved, needed[2] or needed[3])
    has = (q.shape[2] > 0, k.shape[2] > 0) * 2
    found = (dq, dk, *(dw if needed[2] or needed[3] else (None, None)))
    return *(x if need and used else None for x, need, used in zip(found, needed, has, strict=True)), *none


_call = launch.differentiable(_op, _save, _grads)


def supports(
    q_bthd: Tensor, k_btkd: Tensor, qw_d: Tensor, kw_d: Tensor, cos_btr: Tensor | None, sin_btr: Tensor | None, style: str
) -> str | None:
    """Why the fused kernels cannot take these; None: they can."""
    if why := launch.missing(q_bthd):
        return why
    if style not in rms_norm.STYLES:
        return f"style {style!r} is none of {', '.join(rms_norm.STYLES)}"
    if (cos_btr is None) != (sin_btr is None):
        return "one of cos and sin is given without the other"
    if cos_btr is not None and sin_btr is not None and (why := rope.supports(q_bthd, k_btkd, cos_btr, sin_btr)):
        return why
    tensors = (q_bthd, k_btkd, qw_d, kw_d)
    if q_bthd.dtype not in launch.FLOATS or len({(x.dtype, x.device) for x in tensors}) > 1:
        found = ", ".join(f"{x.dtype} on {x.device}" for x in tensors)
        return f"q, k and their weights must share a device and one of bf16, fp16, fp32; they are {found}"
    d = q_bthd.shape[-1]
    fit = q_bthd.ndim == k_btkd.ndim == 4 and k_btkd.shape == (*q_bthd.shape[:2], k_btkd.shape[2], d)
    if not fit or qw_d.shape != (d,) or kw_d.shape != (d,):
        return f"q {tuple(q_bthd.shape)}, k {tuple(k_btkd.shape)} and weights {tuple(qw_d.shape)} and {tuple(kw_d.shape)} do not fit"
    return None if 2 <= d <= WIDEST else f"{d} channels of a head are not between 2 and {WIDEST}"


def fused(
    q_bthd: Tensor,
    k_btkd: Tensor,
    qw_d: Tensor,
    kw_d: Tensor,
    cos_btr: Tensor | None,
    sin_btr: Tensor | None,
    eps: float,
    style: Style,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `reference` in one Triton launch forward, three backward; keeps q, k and rstd. Raises KernelError where `supports` says no."""
    if why := supports(q_bthd, k_btkd, qw_d, kw_d, cos_btr, sin_btr, style):
        raise KernelError(f'qk_norm_rope: {why}; set kernels.qk_norm_rope = "lean"')
    return _call(q_bthd, k_btkd, qw_d, kw_d, cos_btr, sin_btr, eps, style, interleaved)[:2]


def qk_norm_rope(
    q_bthd: Tensor,
    k_btkd: Tensor,
    qw_d: Tensor,
    kw_d: Tensor,
    cos_btr: Tensor | None,
    sin_btr: Tensor | None,
    eps: float = 1e-6,
    style: Style = "llama",
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """`fused` on a GPU, `lean` on a CPU."""
    return (fused if q_bthd.is_cuda else lean)(q_bthd, k_btkd, qw_d, kw_d, cos_btr, sin_btr, eps, style, interleaved)


def _sample(case: Any, device: str) -> launch.Sample:
    t, b, h, k, d, r, interleaved, style, dtype = case
    cos, sin = rope.angles(b, t, r // 2, dtype, device) if r else (None, None)

    def call(f: Any, *xs: Tensor) -> Any:
        exact = xs[0].dtype == torch.float64 and cos is not None
        return f(*xs, cos.double() if exact else cos, sin.double() if exact else sin, 1e-6, style, interleaved)  # type: ignore[union-attr]

    tensors = [torch.randn(b, t, heads, d, dtype=dtype, device=device) for heads in (h, k)]
    return [*tensors, *(torch.randn(d, dtype=dtype, device=device) for _ in range(2))], call


def _traffic(case: Any) -> launch.Traffic:
    t, b, h, k, d, r, *_, dtype = case
    tensor, more = b * t * (h + k) * d * dtype.itemsize, b * t * ((h + k) * 4 + r * dtype.itemsize)  # rstd, cos and sin
    return launch.Traffic(2 * tensor + more, 3 * tensor + more)


OPERATIONS = {
    "qk_norm_rope": launch.Operation({"reference": reference, "lean": lean, "fused": fused}, CASES, SIZES, _sample, _traffic),
}
