"""Dropout and the residual sum behind it: the mask is made again from its seed in the backward, and nothing else is kept.

    y = residual + keep * x / (1 - p)        dx = keep * dy / (1 - p)        dresidual = dy

Legend: x_n and residual_n any shape, equal; seed_1 one int64 on the device, so that a step, a CUDA graph or a recomputation needs no value on the host.

The mask is defined by its bits. Of element e, counted in row-major order from `offset`, the word is number e mod 4 of the output of Philox4x32-7 for the
counter (low word of e div 4, its high word, 0, 0) and the key (low word of the seed, its high word), which is `tl.randint4x(seed, e div 4, 7)`. The element
is dropped if the word is below round(p * 2 ** 32). So it depends on the seed and e only, neither on the device nor on how the work is cut, and masks of two
seeds are independent. A seed stands for one mask: every dropout of every step takes another one.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gigatrain.errors import KernelError
from gigatrain.kernels import elementwise, launch
from gigatrain.kernels.launch import tl, triton

# (rows, shape of a row, p, offset, dtype)
CASES = [
    (rows, shape, p, offset, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for rows, shape, p, offset in (
        *((4, (64,), 0.1, 0), (3, (7, 33), 0.5, 8), (31, (130,), 0.9, (1 << 34) - 256), (33, (1,), 0.25, 0), (2, (40,), 1.0, 0)),
        *((1, (100,), 0.0, 0), (1, (1,), 0.1, 0), (0, (8,), 0.1, 0)),
    )
]
SIZES = [(8192, (channels,), 0.1, 0, torch.bfloat16) for channels in (4096, 8192)]
ROUNDS = 7  # the fewest that pass BigCrush (Salmon et al., SC 2011), as in FlashAttention; with 10 the backward would wait for the generator, not for memory
_WORD = 0xFFFFFFFF


def philox(counter: Tensor, key: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Philox4x32 of counters (low word, high word, 0, 0) in plain torch: four words, in int64, for every int64 of `counter`; `key` is one int64."""
    a, b, c, d = counter & _WORD, (counter >> 32) & _WORD, torch.zeros_like(counter), torch.zeros_like(counter)
    low, high = key & _WORD, (key >> 32) & _WORD
    for _ in range(rounds):
        # Products of words wrap around in int64, which is what their two words are cut from.
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = ((q >> 32) & _WORD) ^ b ^ low, q & _WORD, ((p >> 32) & _WORD) ^ d ^ high, p & _WORD
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    return torch.stack((a, b, c, d), -1)


def kept(shape: torch.Size, p: float, seed_1: Tensor, offset: int = 0) -> Tensor:
    """The mask, in plain torch: what dropout with these arguments does not drop."""
    count = shape.numel()
    counter = torch.arange(-(-count // 4), device=seed_1.device) + offset // 4
    return (philox(counter, seed_1.reshape(())).flatten()[:count] >= _threshold(p)).view(shape)


def _threshold(p: float) -> int:
    return round(p * 2**32)


def _scale(p: float) -> float:
    return 0.0 if p == 1.0 else 1.0 / (1.0 - p)


def _wrong(p: float, seed_1: Tensor, offset: int) -> str | None:
    if not 0.0 <= p <= 1.0:
        return f"p = {p} is not between 0 and 1"
    if seed_1.dtype != torch.int64 or seed_1.numel() != 1:
        return f"the seed must be one int64, not {seed_1.dtype} {tuple(seed_1.shape)}"
    if offset < 0 or offset % 4:
        return f"offset {offset} is not a multiple of 4, which is what one call of the generator serves"
    return None


def reference(x_n: Tensor, residual_n: Tensor, p: float, seed_1: Tensor, offset: int = 0) -> Tensor:
    """residual + dropout(x) in plain torch, with the mask of the fused kernel bit for bit. Raises ValueError for a p, seed or offset that cannot be."""
    if why := _wrong(p, seed_1, offset):
        raise ValueError(why)
    if _threshold(p) == 0:
        return residual_n + x_n
    return residual_n + torch.where(kept(x_n.shape, p, seed_1, offset), x_n * _scale(p), 0.0)


# Fused. Floor, in bytes per element of bf16: 6 forward (reads 2, writes 1), 4 backward (reads 1, writes 1). Saves the seed. One Philox call serves 4
# elements: the backward takes 21 instructions per element, where an H200 has time for 27 until it waits for them and not for memory; 10 rounds take 6 more.
SPACE = {"dropout_add.forward": elementwise.SPACE, "dropout_add.backward": elementwise.SPACE}


@triton.jit
def _keep(SEED, group, most, ROUNDS: tl.constexpr, GROUPS: tl.constexpr):
    """Which of the 4 * GROUPS elements from number 4 * `group` stay: those whose word is above `most`, at most 2 ** 32 - 1."""
    a, b, c, d = tl.randint4x(tl.load(SEED), group + tl.arange(0, GROUPS), ROUNDS)
    most = tl.cast(most, tl.uint32)
    return tl.reshape(tl.join(tl.join(a > most, c > most), tl.join(b > most, d > most)), [4 * GROUPS])


@triton.jit
def _forward(X, RESIDUAL, SEED, Y, count, group, most, scale, ROUNDS: tl.constexpr, GROUPS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * GROUPS
    at = first * 4 + tl.arange(0, 4 * GROUPS)
    x = tl.load(X + at, mask=at < count, other=0.0).to(tl.float32)
    residual = tl.load(RESIDUAL + at, mask=at < count, other=0.0).to(tl.float32)
    y = residual + tl.where(_keep(SEED, group + first, most, ROUNDS, GROUPS), x * scale, 0.0)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=at < count)


@triton.jit
def _backward(DY, SEED, DX, count, group, most, scale, ROUNDS: tl.constexpr, GROUPS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * GROUPS
    at = first * 4 + tl.arange(0, 4 * GROUPS)
    dy = tl.load(DY + at, mask=at < count, other=0.0).to(tl.float32)
    dx = tl.where(_keep(SEED, group + first, most, ROUNDS, GROUPS), dy * scale, 0.0)
    tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=at < count)


def _run(kernel: Any, name: str, inputs: tuple[Tensor, ...], p: float, seed: Tensor, offset: int) -> Tensor:
    first = inputs[0]
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    tuned = launch.configuration(first, name, elementwise.width_of(first))
    launch.launch(
        kernel, (-(-first.numel() // tuned["elements"]),), *(x.contiguous() for x in inputs), seed, out, first.numel(), offset // 4,
        _threshold(p) - 1, _scale(p), ROUNDS=ROUNDS, GROUPS=tuned["elements"] // 4, warps=tuned["warps"],
    )  # fmt: skip
    return out


_dropout_add = launch.operator(
    "dropout_add(Tensor x, Tensor residual, float p, Tensor seed, SymInt offset) -> Tensor",
    lambda x, residual, p, seed, offset: _run(_forward, "dropout_add.forward", (x, residual), p, seed, offset),
    lambda x, residual, p, seed, offset: x.new_empty(x.shape),
)
_dropout_add_backward = launch.operator(
    "dropout_add_backward(Tensor dy, float p, Tensor seed, SymInt offset) -> Tensor",
    lambda dy, p, seed, offset: _run(_backward, "dropout_add.backward", (dy,), p, seed, offset),
    lambda dy, p, seed, offset: dy.new_empty(dy.shape),
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, ctx.p, seed, ctx.offset = inputs
    ctx.save_for_backward(seed)
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dy: Tensor | None) -> Any:
    if dy is None or not ctx.needs_input_grad[0]:
        return None, dy, None, None, None
    (seed,) = ctx.saved_tensors
    return _dropout_add_backward(dy, ctx.p, seed, ctx.offset), dy, None, None, None


_call = launch.differentiable(_dropout_add, _save, _grads)


def supports(x_n: Tensor, residual_n: Tensor, p: float, seed_1: Tensor, offset: int = 0) -> str | None:
    """Why the fused kernels cannot take these arguments; None: they can."""
    if why := elementwise.supports("x and residual", x_n, residual_n) or _wrong(p, seed_1, offset):
        return why
    return None if seed_1.device == x_n.device else f"the seed is on {seed_1.device}, not on {x_n.device}"


def fused(x_n: Tensor, residual_n: Tensor, p: float, seed_1: Tensor, offset: int = 0) -> Tensor:
    """As `reference`, rounded once, in one Triton launch each way; keeps the seed. Raises KernelError where `supports` says no."""
    if why := supports(x_n, residual_n, p, seed_1, offset):
        raise KernelError(f'dropout_add: {why}; set kernels.dropout_add = "reference"')
    return residual_n + x_n if _threshold(p) == 0 else _call(x_n, residual_n, p, seed_1, offset)


def dropout_add(x_n: Tensor, residual_n: Tensor, p: float, seed_1: Tensor, offset: int = 0) -> Tensor:
    """`fused` on a GPU, `reference` on a CPU. A sharded tensor gets the mask of the whole one if `offset` is the number of its first element there."""
    return (fused if x_n.is_cuda else reference)(x_n, residual_n, p, seed_1, offset)


def _sample(case: Any, device: str) -> launch.Sample:
    rows, shape, p, offset, dtype = case
    x, residual = (torch.randn(rows, *shape, dtype=dtype, device=device) for _ in range(2))
    seed = torch.tensor(-81985529216486896, device=device)
    return [x, residual], lambda f, x, residual: f(x, residual, p, seed, offset)


def _traffic(case: Any) -> launch.Traffic:
    rows, shape, *_, dtype = case
    tensor = math.prod((rows, *shape)) * dtype.itemsize
    return launch.Traffic(3 * tensor, 2 * tensor)


OPERATIONS = {"dropout_add": launch.Operation({"reference": reference, "fused": fused}, CASES, SIZES, _sample, _traffic)}
