"""AdamW (arXiv:1711.05101) over one flat bucket of n parameters, in one pass over memory, whatever form its state is stored in.

    g <- scale grad        m <- m + (1 - beta1) (g - m)        v <- v + (1 - beta2) (g^2 - v)
    p <- p - lr (decay p + (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps))        t = updates + 1

All in fp32 (fp64 for fp64 states). `lr`, `scale`, `skip`, `updates` and the seed are read on the device: nothing that changes per step is a host's number,
and skip = 1 changes no bit, the count of updates included.

Master weights p, and the weight w that computes:
    fp32      p in fp32; `copy` also receives bf16(p) in the same pass
    bf16+16   w = the upper 16 bits of p, rounded half away from zero; p = w and a signed 16-bit correction: exactly fp32, in 4 bytes
    bf16+8    p is first rounded to 24 bits (16 of them significand), and the correction has 8
    bf16      no correction
The bits of p as an integer b: w = (b + 2^15) >> 16, correction = b - (w << 16), which always fits, carries into the exponent included. What would round to
infinity in bf16 is the largest number that does not. Rounding to 24 or 16 bits is to nearest, or stochastic.

Moments: fp32; bf16; or int8, in blocks of 128 with the largest magnitude s of a block in fp32 and codes k:
    m = s sign(k) (|k| / 127)^4        v = s (k / 255)^8, that is sqrt(v) companded like m; v > 0 never becomes 0
Narrow moments are rounded stochastically, each without bias: to nearest, v stops where a step moves it by less than half a code, so that it never falls.
Random bits: Philox 4x32 with 7 rounds, key = seed, counter = (index // 4, t), four words per call; m takes a word's lower half, v its upper, p a hash of it.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from gigatrain.errors import KernelError
from gigatrain.kernels import launch
from gigatrain.kernels.launch import tl, triton

Master = Literal["fp32", "bf16+16", "bf16+8", "bf16"]
Moments = Literal["fp32", "bf16", "int8"]
MASTERS: tuple[Master, ...] = ("fp32", "bf16+16", "bf16+8", "bf16")
MOMENTS: tuple[Moments, ...] = ("fp32", "bf16", "int8")
BLOCK = 128  # elements that share a scale: 8 bytes of scales per 128 parameters
# (parameters, master, moments, stochastic rounding of the master, dtype of the gradient)
CASES = [
    (count, master, moments, master in ("bf16+8", "bf16"), dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for count in (1000, 1)
    for master in MASTERS
    for moments in MOMENTS
]
SIZES = [
    (1 << 26, "fp32", "fp32", False, torch.float32),
    (1 << 26, "fp32", "fp32", False, torch.bfloat16),
    (1 << 26, "bf16+16", "fp32", False, torch.bfloat16),
    (1 << 26, "bf16+16", "bf16", False, torch.bfloat16),
    (1 << 26, "bf16+16", "int8", False, torch.bfloat16),
    (1 << 26, "bf16+8", "int8", False, torch.float32),
    (1 << 26, "bf16+8", "int8", False, torch.bfloat16),
    (1 << 26, "bf16+8", "int8", True, torch.bfloat16),
]


@dataclass(frozen=True)
class State:
    """What n parameters keep between two steps, each tensor flat and contiguous; what a form lacks is None.

    weight: p in fp32, or w in bf16. correction: int8 or int16. copy: bf16(p) beside an fp32 p. exp_avg and exp_avg_sq: fp32, bf16, or int8 and uint8
    with a scale per block. updates: how many were made (0-d, fp32). seed: of the random bits (0-d, int64).
    """

    weight: Tensor
    correction: Tensor | None
    copy: Tensor | None
    exp_avg: Tensor
    exp_avg_scale: Tensor | None
    exp_avg_sq: Tensor
    exp_avg_sq_scale: Tensor | None
    updates: Tensor
    seed: Tensor


@dataclass(frozen=True)
class Rates:
    """What a group of parameters is updated with: constants of a run."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    stochastic: bool = False  # rounding of bf16+8 and bf16


def state(count: int, master: Master, moments: Moments, *, copy: bool, seed: int, device: torch.device | str) -> State:
    """A state of `count` zeros in the given form."""
    zeros = functools.partial(torch.zeros, device=device)
    wide = master == "fp32"
    exp_avg, exp_avg_sq = {
        "fp32": (torch.float32, torch.float32),
        "bf16": (torch.bfloat16, torch.bfloat16),
        "int8": (torch.int8, torch.uint8),
    }[moments]
    corrections = {"bf16+16": torch.int16, "bf16+8": torch.int8}
    scales = [zeros(-(-count // BLOCK)) if moments == "int8" else None for _ in range(2)]
    return State(
        weight=zeros(count, dtype=torch.float32 if wide else torch.bfloat16),
        correction=zeros(count, dtype=corrections[master]) if master in corrections else None,
        copy=zeros(count, dtype=torch.bfloat16) if copy else None,
        exp_avg=zeros(count, dtype=exp_avg),
        exp_avg_scale=scales[0],
        exp_avg_sq=zeros(count, dtype=exp_avg_sq),
        exp_avg_sq_scale=scales[1],
        updates=zeros((), dtype=torch.float32),
        seed=torch.tensor(seed, dtype=torch.int64, device=device),
    )


# ---- The stored forms: exact to take apart, and put together again to the same bits. ----

_LARGEST = {None: 0x7F7F0000, torch.int8: 0x7F7F7F00, torch.int16: 0x7F7F7FFF}  # bits of the largest p whose w is finite
_NAN = 0x7FC00000
# The largest fp32 not above the reciprocal: 127 and 255 times it are exactly 1, so that a block's largest magnitude is stored exactly.
_STEP = {torch.int8: 1 / 127, torch.uint8: 1 / 255}
# So that every decoded number is normal, and is encoded to the same code again: a block of m below 2^-90 is zero, and no code of v stands for less than
# 2^-120 (given by its exponent bits). Both are far below eps.
_M_LEAST, _V_LEAST = 2.0**-90, 7


def merge(weight_n: Tensor, correction_n: Tensor | None) -> Tensor:
    """The fp32 master weights that a bf16 weight and its correction stand for."""
    if correction_n is None:
        return weight_n.float()
    bits = weight_n.view(torch.int16).to(torch.int32) << 16
    return (bits + correction_n.to(torch.int32) * (256 if correction_n.dtype == torch.int8 else 1)).view(torch.float32)


def split(p_n: Tensor, correction: torch.dtype | None, random_n: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`(weight, correction)` of fp32 master weights; the dropped bits round to nearest even, or as `random_n`, 16 random bits each, decide."""
    largest = torch.full((), _LARGEST[correction], dtype=torch.int32, device=p_n.device).view(torch.float32)
    bits = torch.minimum(torch.maximum(p_n, -largest), largest).view(torch.int32)
    if correction != torch.int16:
        dropped = 8 if correction == torch.int8 else 16
        below = (1 << dropped) - 1
        bits = bits + ((below >> 1) + ((bits >> dropped) & 1) if random_n is None else random_n.to(torch.int32) & below)
        bits = bits & ~below
    bits = torch.where(p_n.isnan(), _NAN, bits)
    upper = bits if correction is None else bits + 0x8000
    weight = (upper >> 16).to(torch.int16)
    rest = bits - (weight.to(torch.int32) << 16)
    found = None if correction is None else rest.to(torch.int16) if correction == torch.int16 else (rest >> 8).to(torch.int8)
    return weight.view(torch.bfloat16), found


def _power(t: Tensor, signed: bool) -> Tensor:
    t2 = t * t
    t4 = t2 * t2
    return t4 if signed else t4 * t4


def decode(stored_n: Tensor, scale_b: Tensor | None) -> Tensor:
    """A moment in fp32."""
    if scale_b is None:
        return stored_n.to(torch.promote_types(stored_n.dtype, torch.float32))
    code = stored_n.float()
    magnitude = _power(code.abs() * _STEP[stored_n.dtype], stored_n.dtype == torch.int8)
    return magnitude.copysign(code) * scale_b.repeat_interleave(BLOCK)[: len(code)]


def encode(x_n: Tensor, dtype: torch.dtype, random_n: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`(stored, scales)` of a moment for an fp32, bf16, int8 (signed) or uint8 (not negative) store; to nearest, or by 16 random bits each, unbiased."""
    if dtype in (torch.float32, torch.float64):
        return x_n, None
    if dtype == torch.bfloat16:
        return split(x_n, None, random_n)
    signed = dtype == torch.int8
    top, step = 127.0 if signed else 255.0, _STEP[dtype]
    x_bk = torch.nn.functional.pad(x_n, (0, -len(x_n) % BLOCK)).view(-1, BLOCK)
    magnitude = x_bk.abs()
    scale = magnitude.amax(1, keepdim=True)
    above = (scale.view(torch.int32) >> 23) - _V_LEAST
    scale = torch.where(scale >= _M_LEAST if signed else above > 0, scale, 0.0)
    y = magnitude * torch.where(scale > 0, 1.0 / scale, 0.0)
    root = y.sqrt().sqrt()
    root = top * (root if signed else root.sqrt())
    if random_n is None:
        code = torch.floor(root + 0.5)
    else:
        share = torch.nn.functional.pad(random_n, (0, -len(x_n) % BLOCK)).view(-1, BLOCK).float() * 2**-16
        code = torch.floor(root)
        low, high = _power(code * step, signed), _power((code + 1) * step, signed)
        code = code + (share * (high - low) < y - low).float()
    if not signed:
        code = torch.maximum(code, torch.ceil(top * torch.exp2(above.clamp(min=0).float() * -0.125)))
    code = torch.where(magnitude >= scale, top, code.clamp(max=top))
    code = torch.where(scale > 0, code, 0.0)
    return (code.copysign(x_bk) if signed else code).to(dtype).view(-1)[: len(x_n)], scale.view(-1)


_M32 = 0xFFFFFFFF
_PHILOX = (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85)  # multipliers and key increments (Salmon et al., SC 2011)
_ROUNDS = 7  # which still pass TestU01's BigCrush (same paper, table 2)
_HASH = 0x9E3779B1


def random_words(start: int, count: int, t: Tensor, seed: Tensor) -> Tensor:
    """32 random bits, as int64, for each of the elements `start` (a multiple of 4) to `start + count` in update `t` (0-d)."""
    index = torch.arange(start // 4, -(-(start + count) // 4), device=seed.device)
    a, b, raise_a, raise_b = _PHILOX
    c0, c1, c2, c3 = index & _M32, index >> 32, t.long() & _M32, torch.zeros_like(seed)
    key_a, key_b = seed & _M32, (seed >> 32) & _M32
    for _ in range(_ROUNDS):
        x, y = c0 * a, c2 * b
        c0, c1, c2, c3 = ((y >> 32) & _M32) ^ c1 ^ key_a, y & _M32, ((x >> 32) & _M32) ^ c3 ^ key_b, x & _M32
        key_a, key_b = (key_a + raise_a) & _M32, (key_b + raise_b) & _M32
    return torch.stack((c0, c1, c2, c3), -1).view(-1)[:count]


_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}  # elements that plain torch takes at a time: temporaries that a CPU's cache holds, or 16 MB each


def _chunks(count: int, like: Tensor) -> Iterator[tuple[slice, slice]]:
    """Elements, and the blocks that they are; all at once where tensors have no values (a dry run), whose 10^10 elements would be 150,000 chunks."""
    chunk = max(count, 1) if isinstance(like, torch._subclasses.FakeTensor) else _CHUNK[like.device.type]
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        yield slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))


def taken(state: State, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """`(p, m, v)` in fp32, whatever the form: the state's own tensors where they are fp32, else new ones on `device`, made chunk by chunk."""
    count = state.weight.numel()
    stored = (state.weight, state.exp_avg, state.exp_avg_sq)
    found = [t if t.dtype == torch.float32 else torch.empty(count, device=device) for t in stored]
    for at, blocks in _chunks(count, state.weight):
        for whole, own, part in zip(found, stored, _parts(state, at, blocks), strict=True):
            if whole is not own:
                whole[at] = part
    return found[0], found[1], found[2]


def fill(state: State, p_n: Tensor, m_n: Tensor, v_n: Tensor) -> None:
    """Store fp32 master weights and moments in the state's form, to nearest. What `taken` gave comes back to the same bits."""
    fill_weights(state, 0, p_n)
    for at, blocks in _chunks(state.weight.numel(), state.weight):
        m, v = (x[at].to(state.weight.device) for x in (m_n, v_n))
        _store_moment(state.exp_avg, state.exp_avg_scale, at, blocks, m, None, None)
        _store_moment(state.exp_avg_sq, state.exp_avg_sq_scale, at, blocks, v, None, None)


def fill_weights(state: State, start: int, p_n: Tensor) -> None:
    """Store fp32 master weights from element `start` on, to nearest."""
    for at, _ in _chunks(len(p_n), state.weight):
        _store_weight(state, slice(start + at.start, start + at.stop), p_n[at].to(state.weight.device), None, None)


def _parts(state: State, at: slice, blocks: slice) -> tuple[Tensor, Tensor, Tensor]:
    wide = state.weight.dtype != torch.bfloat16
    p = state.weight[at] if wide else merge(state.weight[at], None if state.correction is None else state.correction[at])
    scales = [None if s is None else s[blocks] for s in (state.exp_avg_scale, state.exp_avg_sq_scale)]
    return p, decode(state.exp_avg[at], scales[0]), decode(state.exp_avg_sq[at], scales[1])


def _store_weight(state: State, at: slice, p: Tensor, random: Tensor | None, keep: Tensor | None) -> None:
    if state.weight.dtype != torch.bfloat16:
        _put(state.weight[at], p, keep)
        if state.copy is not None:
            _put(state.copy[at], p.to(torch.bfloat16), keep)
        return
    weight, correction = split(p, None if state.correction is None else state.correction.dtype, random)
    _put(state.weight[at], weight, keep)
    if state.correction is not None and correction is not None:
        _put(state.correction[at], correction, keep)


def _store_moment(
    stored: Tensor, scales: Tensor | None, at: slice, blocks: slice, x: Tensor, random: Tensor | None, keep: Tensor | None
) -> None:
    found, found_scales = encode(x, stored.dtype, random)
    _put(stored[at], found, keep)
    if scales is not None and found_scales is not None:
        _put(scales[blocks], found_scales, keep)


def _put(stored: Tensor, found: Tensor, keep: Tensor | None) -> None:
    stored.copy_(found if keep is None else torch.where(keep, stored, found))


def reference(state: State, grad_n: Tensor, lr: Tensor, scale: Tensor, skip: Tensor, rates: Rates) -> None:
    """One update, in place, in plain torch; `lr`, `scale` and `skip` are 0-d tensors on the state's device."""
    wide = torch.promote_types(state.weight.dtype, torch.float32)
    narrow, rounds = state.exp_avg.dtype in (torch.bfloat16, torch.int8), _rounds(state, rates)
    (beta1, beta2), t = rates.betas, state.updates.double() + 1
    first = (1 / (1 - beta1**t)).to(wide)
    second = torch.rsqrt(1 - beta2**t).to(wide)
    keep = skip > 0
    for at, blocks in _chunks(len(grad_n), grad_n):
        p, m, v = _parts(state, at, blocks)
        g = grad_n[at].to(wide) * scale
        m = m + (g - m) * (1 - beta1)
        v = v + (g * g - v) * (1 - beta2)
        p = p - lr * (rates.weight_decay * p + (m * first) / (v.sqrt() * second + rates.eps))
        word = random_words(at.start, at.stop - at.start, t, state.seed) if narrow or rounds else None
        _store_weight(state, at, p, (((word * _HASH) & _M32) >> 16) if word is not None and rounds else None, keep)
        lower, upper = (word & 0xFFFF, word >> 16) if word is not None else (None, None)
        _store_moment(state.exp_avg, state.exp_avg_scale, at, blocks, m, lower, keep)
        _store_moment(state.exp_avg_sq, state.exp_avg_sq_scale, at, blocks, v, upper, keep)
    state.updates.add_(1 - skip)


def _rounds(state: State, rates: Rates) -> bool:
    """Whether the master weights are rounded stochastically."""
    return rates.stochastic and state.weight.dtype == torch.bfloat16 and (state.correction is None or state.correction.dtype == torch.int8)


def foreach(state: State, grad_n: Tensor, lr: Tensor | float, scale: Tensor, skip: Tensor, rates: Rates) -> None:
    """torch's own fused AdamW, for fp32 states without a copy; on a CPU the fastest. It leaves the scaled gradient in `grad`.

    Raises KernelError for any other form.
    """
    if (
        state.weight.dtype != torch.float32
        or state.exp_avg.dtype != torch.float32
        or state.copy is not None
        or grad_n.dtype != torch.float32
    ):
        raise KernelError(
            f'adamw: torch\'s own takes fp32 states and gradients only, not {_form(state, grad_n)}; set kernels.adamw = "reference"'
        )
    torch_adamw(
        [state.weight],
        [grad_n],
        [state.exp_avg],
        [state.exp_avg_sq],
        [],
        [state.updates],
        fused=True,
        grad_scale=scale.reciprocal(),  # torch divides by it
        found_inf=skip,
        amsgrad=False,
        beta1=rates.betas[0],
        beta2=rates.betas[1],
        lr=lr,
        weight_decay=rates.weight_decay,
        eps=rates.eps,
        maximize=False,
    )


def _form(state: State, grad_n: Tensor) -> str:
    named = {"weight": state.weight, "correction": state.correction, "copy": state.copy, "exp_avg": state.exp_avg, "gradient": grad_n}
    return ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')}" for name, t in named.items() if t is not None)


# Fused. Floor, in bytes per parameter, read and written: fp32 with a copy and an fp32 gradient 30 (bf16 gradient 28); bf16+16 26 with fp32 moments,
# 18 with bf16, 14 with int8; bf16+8 with int8 moments and a bf16 gradient 12: w 4, correction 2, m 2, v 2, g 2. Scales add 8 B per 128 parameters,
# each way. On one H200 (4.3 TB/s) 12.1 B are 2.8 ms per 10^9 parameters; its 104 instructions per parameter (sm_90) take 3.5 ms at one a cycle and
# scheduler, so that of all forms the int8 ones are bound by instructions: what rounds two moments without bias costs 60 of them.
# What a tuner tries; sizes in the tables are parameters.
SPACE = {
    f"adamw.{moments}": [
        {"elements": elements, "warps": warps}
        for elements in (512, 1024, 2048, 4096)
        for warps in (2, 4, 8)
        if 4 <= elements // (32 * warps) <= 16
    ]
    for moments in MOMENTS
}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}


@triton.jit
def _advance(UPDATES, SKIP, STEP, log_beta1, log_beta2, eps):
    """Count the update, unless it is skipped; leave in STEP: t, or 0 to skip; the ratio of the bias corrections; eps in their scale."""
    t = tl.load(UPDATES) + 1.0
    taken = tl.load(SKIP) <= 0.0
    first = 1.0 - tl.exp(t.to(tl.float64) * log_beta1)  # in fp32, 1 - beta^t would lose its digits while t is small
    second = 1.0 - tl.exp(t.to(tl.float64) * log_beta2)
    tl.store(UPDATES, t, mask=taken)
    tl.store(STEP, tl.where(taken, t, 0.0))
    tl.store(STEP + 1, (first / tl.sqrt(second)).to(tl.float32))
    tl.store(STEP + 2, (first * eps).to(tl.float32))


@triton.jit
def _words(seed, start, t, ROWS: tl.constexpr, ROUNDS: tl.constexpr):
    """Random words [ROWS, 128] of the elements from `start` on, a multiple of the tile: four neighbours share a call."""
    group = start // 4
    at = (group & 0xFFFFFFFF).to(tl.uint32) + (tl.arange(0, ROWS)[:, None] * 32 + tl.arange(0, 32)[None]).to(tl.uint32)
    zero = at * 0
    a, b, c, d = tl.philox(seed, at, zero + (group >> 32).to(tl.uint32), zero + t.to(tl.uint32), zero, ROUNDS)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, 128))


# Companded moments are computed in units of one code, k^4 for m and for sqrt(v), and rounded as `encode` does up to an error of 1e-7 in the odds: a third
# fewer instructions than in `encode`'s own order. A block's largest magnitude keeps its exact code, and what is within 2^-18 of it gets the same.


@triton.jit
def _code(z):
    """The code k below z, and z's fourth root, with k^4."""
    code = tl.floor(tl.sqrt(tl.sqrt(z)))
    low = code * code
    return code, low * low


@triton.jit
def _update(
    WEIGHT, CORRECTION, COPY, GRAD, M, M_SCALE, V, V_SCALE, STEP, LR, SCALE, SEED, count, rest1, rest2, decay,
    DROPPED: tl.constexpr, BELOW: tl.constexpr, STOCHASTIC: tl.constexpr, LARGEST: tl.constexpr, NAN: tl.constexpr, SIGN: tl.constexpr,
    M_TOP: tl.constexpr, M_STEP: tl.constexpr, M_LEAST: tl.constexpr, V_TOP: tl.constexpr, V_STEP: tl.constexpr, V_LEAST: tl.constexpr,
    ROUNDS: tl.constexpr, HASH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    t = tl.load(STEP)
    if t > 0.0:
        ratio, eps, lr, scale = tl.load(STEP + 1), tl.load(STEP + 2), tl.load(LR), tl.load(SCALE)
        start = tl.program_id(0).to(tl.int64) * (ROWS * 128)
        at = start + (tl.arange(0, ROWS)[:, None] * 128 + tl.arange(0, 128)[None])
        block = start // 128 + tl.arange(0, ROWS)[:, None]
        live, full = at < count, block < (count + 127) // 128
        g = tl.load(GRAD + at, mask=live, other=0.0).to(tl.float32) * scale
        m = tl.load(M + at, mask=live, other=0).to(tl.float32)
        v = tl.load(V + at, mask=live, other=0).to(tl.float32)
        p = tl.load(WEIGHT + at, mask=live, other=0.0)
        if M.dtype.element_ty == tl.int8:
            m, v = m * M_STEP, v * V_STEP
            m, v = m * tl.abs(m), v * v
            m, v = m * tl.abs(m), v * v
            m *= tl.load(M_SCALE + block, mask=full, other=0.0)
            v = v * v * tl.load(V_SCALE + block, mask=full, other=0.0)
        if WEIGHT.dtype.element_ty == tl.bfloat16:
            bits = p.to(tl.int16, bitcast=True).to(tl.int32) << 16
            if DROPPED == 8:
                bits += tl.load(CORRECTION + at, mask=live, other=0).to(tl.int32) << 8
            elif DROPPED == 0:
                bits += tl.load(CORRECTION + at, mask=live, other=0).to(tl.int32)
            p = bits.to(tl.float32, bitcast=True)

        m += (g - m) * rest1
        v += (g * g - v) * rest2
        root = tl.sqrt(v)
        below = root * ratio + eps
        if M.dtype.element_ty == tl.float32:
            p -= lr * (decay * p + m / below)
        else:
            inverse = tl.rsqrt(below)  # its square is right to 2^-21, in 3 instructions where a division takes 9
            p -= lr * (decay * p + m * inverse * inverse)

        word = tl.zeros([ROWS, 128], tl.uint32)
        if STOCHASTIC or M.dtype.element_ty != tl.float32:
            word = _words(tl.load(SEED), start, t.to(tl.int32), ROWS, ROUNDS)
        if M.dtype.element_ty == tl.float32:
            tl.store(M + at, m, mask=live)
            tl.store(V + at, v, mask=live)
        elif M.dtype.element_ty == tl.bfloat16:
            m_bits = m.to(tl.int32, bitcast=True) + (word & 0xFFFF).to(tl.int32)
            v_bits = v.to(tl.int32, bitcast=True) + (word >> 16).to(tl.int32)
            tl.store(M + at, (m_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=live)
            tl.store(V + at, (v_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=live)
        else:
            size = tl.abs(m)
            m_scale = tl.cast(tl.max(size, 1, keep_dims=True), tl.float32)
            v_scale = tl.cast(tl.max(v, 1, keep_dims=True), tl.float32)
            m_scale = tl.where(m_scale >= M_LEAST, m_scale, 0.0)
            above = (v_scale.to(tl.int32, bitcast=True) >> 23) - V_LEAST
            v_scale = tl.where(above > 0, v_scale, 0.0)
            tl.store(M_SCALE + block, m_scale, mask=full)
            tl.store(V_SCALE + block, v_scale, mask=full)
            m_unit, v_unit = tl.rsqrt(m_scale), tl.rsqrt(v_scale)
            m_unit = tl.where(m_scale > 0.0, m_unit * m_unit * (M_TOP * M_TOP * M_TOP * M_TOP), 0.0)
            v_unit = tl.where(v_scale > 0.0, v_unit * (V_TOP * V_TOP * V_TOP * V_TOP), 0.0)
            m_largest = tl.where(m_scale > 0.0, m_scale * 0.999996185302734375, float("inf"))
            v_largest = tl.where(v_scale > 0.0, v_scale * 0.999996185302734375, float("inf"))
            v_least = tl.where(v_scale > 0.0, tl.ceil(V_TOP * tl.exp2(above.to(tl.float32) * -0.125)), 0.0)

            # The chance of k + 1 is (z - k^4) / ((k + 1)^4 - k^4) for m, and the same with the squares for v; both sides in units of 2^-16.
            z = size * m_unit
            code, low = _code(z)
            gap = ((code * 0.00006103515625 + 0.000091552734375) * code + 0.00006103515625) * code + 0.0000152587890625
            code = tl.where((word & 0xFFFF).to(tl.float32) * gap < z - low, code + 1.0, code)
            code = tl.where(size >= m_largest, M_TOP, code)
            code = (code.to(tl.int32, bitcast=True) | (m.to(tl.int32, bitcast=True) & SIGN)).to(tl.float32, bitcast=True)
            tl.store(M + at, code.to(tl.int8), mask=live)
            z = root * v_unit
            code, low = _code(z)
            next = (code + 1.0) * (code + 1.0)
            next = next * next
            gap = (next * next - low * low) * 0.0000152587890625
            code = tl.where((word >> 16).to(tl.float32) * gap < z * z - low * low, code + 1.0, code)
            code = tl.where(v >= v_largest, V_TOP, tl.maximum(code, v_least))
            tl.store(V + at, code.to(tl.uint8), mask=live)

        if WEIGHT.dtype.element_ty == tl.float32:
            tl.store(WEIGHT + at, p, mask=live)
            if COPY is not None:
                tl.store(COPY + at, p.to(tl.bfloat16), mask=live)
        else:
            largest = tl.full([1, 1], LARGEST, tl.int32).to(tl.float32, bitcast=True)
            bits = tl.minimum(tl.maximum(p, -largest), largest).to(tl.int32, bitcast=True)
            if DROPPED > 0:
                if STOCHASTIC:
                    bits += ((word * HASH) >> 16).to(tl.int32) & BELOW
                else:
                    bits += (BELOW >> 1) + ((bits >> DROPPED) & 1)
                bits = bits & ~BELOW
            bits = tl.where(p != p, NAN, bits)  # noqa: PLR0124
            if DROPPED == 16:
                upper = bits >> 16
            else:
                upper = (bits + 0x8000) >> 16
                rest = bits - (upper << 16)
                if DROPPED == 8:
                    rest = rest >> 8
                tl.store(CORRECTION + at, rest.to(CORRECTION.dtype.element_ty), mask=live)
            tl.store(WEIGHT + at, upper.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=live)


def _run(
    weight: Tensor, correction: Tensor | None, copy: Tensor | None, grad: Tensor, exp_avg: Tensor, exp_avg_scale: Tensor | None,
    exp_avg_sq: Tensor, exp_avg_sq_scale: Tensor | None, updates: Tensor, lr: Tensor, scale: Tensor, skip: Tensor, seed: Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, stochastic: bool,
) -> None:  # fmt: skip
    count = weight.numel()
    kind = None if correction is None else correction.dtype
    dropped = {None: 16, torch.int8: 8, torch.int16: 0}[kind]
    stochastic = stochastic and weight.dtype == torch.bfloat16 and dropped > 0
    tuned = launch.configuration(weight, f"adamw.{_NAMES[exp_avg.dtype]}", count)
    logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    step = torch.empty(3, device=weight.device)
    launch.launch(_advance, (1,), updates, skip, step, *logs, eps, warps=1)
    launch.launch(
        _update, (-(-count // tuned["elements"]),), weight, correction, copy, grad, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, step,
        lr, scale, seed, count, 1 - beta1, 1 - beta2, weight_decay, DROPPED=dropped, BELOW=(1 << dropped) - 1, STOCHASTIC=stochastic,
        LARGEST=_LARGEST[kind], NAN=_NAN, SIGN=-(1 << 31), M_TOP=127.0, M_STEP=_STEP[torch.int8], M_LEAST=_M_LEAST, V_TOP=255.0,
        V_STEP=_STEP[torch.uint8], V_LEAST=_V_LEAST, ROUNDS=_ROUNDS, HASH=_HASH, ROWS=tuned["elements"] // BLOCK, warps=tuned["warps"],
    )  # fmt: skip


_adamw = launch.operator(
    "adamw(Tensor(a!) weight, Tensor(b!)? correction, Tensor(c!)? copy, Tensor grad, Tensor(d!) exp_avg, Tensor(e!)? exp_avg_scale, "
    "Tensor(f!) exp_avg_sq, Tensor(g!)? exp_avg_sq_scale, Tensor(h!) updates, Tensor lr, Tensor scale, Tensor skip, Tensor seed, "
    "float beta1, float beta2, float eps, float weight_decay, bool stochastic) -> ()",
    _run,
    lambda *_: None,
)


def supports(state: State, grad_n: Tensor) -> str | None:
    """Why the fused kernel cannot take this state and gradient; None: it can."""
    if why := launch.missing(state.weight):
        return why
    wide = state.weight.dtype == torch.float32
    moments = (state.exp_avg.dtype, state.exp_avg_sq.dtype)
    if (
        state.weight.dtype not in (torch.float32, torch.bfloat16)
        or grad_n.dtype not in launch.FLOATS
        or moments not in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.int8, torch.uint8))
        or (wide and state.correction is not None)
        or (not wide and state.copy is not None)
    ):
        return f"no form of the state is {_form(state, grad_n)}"
    count = state.weight.numel()
    flat = [t for t in (state.weight, state.correction, state.copy, grad_n, state.exp_avg, state.exp_avg_sq) if t is not None]
    if any(t.shape != (count,) or not t.is_contiguous() for t in flat):
        return (
            f"weight, gradient and moments must be flat, contiguous and of one length, not {', '.join(str(tuple(t.shape)) for t in flat)}"
        )
    return None


def fused(state: State, grad_n: Tensor, lr: Tensor, scale: Tensor, skip: Tensor, rates: Rates) -> None:
    """As `reference` in one Triton launch. Raises KernelError where `supports` says no."""
    if why := supports(state, grad_n):
        raise KernelError(f'adamw: {why}; set kernels.adamw = "reference"')
    _adamw(
        state.weight, state.correction, state.copy, grad_n, state.exp_avg, state.exp_avg_scale, state.exp_avg_sq, state.exp_avg_sq_scale,
        state.updates, lr, scale, skip, state.seed, *rates.betas, rates.eps, rates.weight_decay, rates.stochastic,
    )  # fmt: skip


def adamw(state: State, grad_n: Tensor, lr: Tensor, scale: Tensor, skip: Tensor, rates: Rates) -> None:
    """`fused` on a GPU, `reference` on a CPU."""
    (fused if grad_n.is_cuda else reference)(state, grad_n, lr, scale, skip, rates)


def _copies(master: Master, dtype: torch.dtype) -> bool:
    """Of fp32 master weights a case with bf16 gradients has a bf16 copy; one with fp32 gradients has none, so that torch's own takes it too."""
    return master == "fp32" and dtype == torch.bfloat16


def _sample(case: Any, device: str) -> launch.Sample:
    """The tensors are gradient and state, which a call moves; in fp64 it moves a state without rounding, and gives each tensor what it should hold."""
    count, master, moments, stochastic, dtype = case
    start = state(count, master, moments, copy=_copies(master, dtype), seed=3, device=device)
    p = torch.randn(count, device=device)
    fill(start, p * 0.02, torch.randn_like(p) * 1e-3, torch.rand_like(p) * 1e-5)
    start.updates.fill_(4)
    exact = [x.double() for x in taken(start, device)]
    names = [field.name for field in fields(State) if getattr(start, field.name) is not None]
    nothing: dict[str, Any] = dict.fromkeys(field.name for field in fields(State))
    rates = Rates((0.9, 0.95), 1e-8, 0.1, stochastic)

    def call(version: Any, grad: Tensor, *tensors: Tensor) -> Tensor:
        given = nothing | dict(zip(names, tensors, strict=True))
        wide = torch.promote_types(grad.dtype, torch.float32)
        lr, scale, skip = (torch.tensor(number, dtype=wide, device=device) for number in (1e-3, 1.0, 0.0))
        if wide == torch.float32:
            now = State(**given)
            version(now, grad, lr, scale, skip, rates)
            return now.weight
        p, m, v = (x.clone() for x in exact)
        version(State(p, None, None, m, None, v, None, given["updates"], given["seed"]), grad, lr, scale, skip, rates)
        for name, moved in (("weight", p), ("copy", p), ("exp_avg", m), ("exp_avg_sq", v)):
            if given[name] is not None and given[name].is_floating_point():
                given[name].copy_(moved)
            if (scales := given.get(f"{name}_scale")) is not None:
                scales.copy_(torch.stack([part.abs().max() for part in moved.split(BLOCK)]))
        return p

    return [(torch.randn_like(p) * 3e-3).to(dtype), *(getattr(start, name) for name in names)], call


def bytes_per_parameter(master: Master, moments: Moments, gradient: torch.dtype, *, copy: bool) -> float:
    """What one update reads and writes."""
    weight = {"fp32": 8, "bf16+16": 8, "bf16+8": 6, "bf16": 4}[master] + (2 if copy else 0)
    return weight + {"fp32": 16, "bf16": 8, "int8": 4 + 16 / BLOCK}[moments] + gradient.itemsize


def _traffic(case: Any) -> launch.Traffic:
    count, master, moments, _, dtype = case
    return launch.Traffic(count * bytes_per_parameter(master, moments, dtype, copy=_copies(master, dtype)))


OPERATIONS = {
    "adamw": launch.Operation(
        {"reference": reference, "foreach": foreach, "fused": fused}, CASES, SIZES, _sample, _traffic, differentiable=False
    )
}
