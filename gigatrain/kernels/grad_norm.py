"""The global gradient norm, and what an update does with it, on the device.

    norm = sqrt(sum of g^2 over every buffer)        scale = min(1, clip / norm)        skip = 1 where norm or loss is not finite, else 0

Deterministic: the buffers are cut into chunks whose sums do not depend on how many programs run, and the chunks are summed in a fixed order in fp64. A
square that overflows fp32 (|g| > 1.8e19) is summed again in units of 2^180: gradients up to 1e38 have a finite norm, where torch's own is infinite.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gigatrain.errors import KernelError
from gigatrain.kernels import launch
from gigatrain.kernels.launch import tl, triton

CHUNK = 1024  # gradients that the reference sums in their own dtype's wide form
# (elements, buffers, dtype)
CASES = [
    (count, buffers, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for count, buffers in ((4096, 1), (1, 1), (33, 3), (100_003, 2), (0, 1))
]
SIZES = [(1 << 26, 1, torch.bfloat16), (1 << 26, 1, torch.float32)]


def reference(grads: Sequence[Tensor], clip: float | None = None, loss: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`(norm, scale, skip)` as 0-d fp32 tensors (fp64 for fp64 gradients), without waiting for the device."""
    norms = [_norm(g.reshape(-1)) for g in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms)).to(torch.promote_types(grads[0].dtype, torch.float32))
    finite = torch.isfinite(norm) if loss is None else torch.isfinite(norm) & torch.isfinite(loss)
    scale = torch.ones_like(norm) if clip is None else clip / torch.clamp(norm, min=clip)
    return norm, scale, (~finite).to(norm.dtype)


def _norm(g: Tensor) -> Tensor:
    """In fp64, of chunks' norms: one sum over all, as torch's on a CPU, errs by 2e-4 at five million fp32 gradients, and differs as they are cut over ranks."""
    wide = torch.promote_types(g.dtype, torch.float32)
    whole = g.numel() // CHUNK * CHUNK
    parts = torch.linalg.vector_norm(g[:whole].view(-1, CHUNK), dim=1, dtype=wide)
    rest = torch.linalg.vector_norm(g[whole:], dtype=wide)
    return torch.linalg.vector_norm(torch.cat([parts, rest[None]]).double())


# Fused. Floor: every gradient is read once, 2 bytes in bf16, 4 in fp32: at 4.3 TB/s 0.47 ms and 0.93 ms per 10^9. Beside it 8 bytes per chunk.
# What a tuner tries; sizes in the tables are gradients.
SPACE = {
    "grad_norm.squares": [
        {"elements": elements, "turns": 32, "warps": warps, "programs": programs, "pipeline": pipeline}
        for elements, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8))
        for programs in (4, 8)
        for pipeline in (1, 3)
    ]
}


@triton.jit
def _squares(
    X, PARTS, count, chunks, SMALL: tl.constexpr, LARGE: tl.constexpr, TURNS: tl.constexpr, PIPELINE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        start = tl.cast(chunk, tl.int64) * (TURNS * BLOCK)
        plain = tl.zeros([BLOCK], tl.float32)
        small = tl.zeros([BLOCK], tl.float32)  # the same sum in units of LARGE, which only huge gradients need
        for turn in tl.range(TURNS, num_stages=PIPELINE):  # type: ignore[misc]
            at = start + turn * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(X + at, mask=at < count, other=0.0).to(tl.float32)
            plain += x * x
            x *= SMALL
            small += x * x
        total = tl.cast(tl.sum(plain, 0), tl.float64)
        total = tl.where(total < float("inf"), total, tl.cast(tl.sum(small, 0), tl.float64) * LARGE)
        tl.store(PARTS + chunk, total)


@triton.jit
def _finish(PARTS, LOSS, OUT, count, clip, CLIPS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(PARTS + at, mask=at < count, other=0.0)
    norm = tl.sqrt(tl.sum(total, 0)).to(tl.float32)
    finite = tl.abs(norm) < float("inf")
    if LOSS is not None:
        finite &= tl.abs(tl.load(LOSS)) < float("inf")
    tl.store(OUT, norm)
    tl.store(OUT + 1, clip / tl.maximum(norm, clip) if CLIPS else 1.0)
    tl.store(OUT + 2, tl.where(finite, 0.0, 1.0))


def _run(grads: Sequence[Tensor], loss: Tensor | None, clip: float | None) -> Tensor:
    first = grads[0]
    flat = [g.reshape(-1) for g in grads]
    tuned = launch.configuration(first, "grad_norm.squares", sum(map(len, flat)))
    chunk = tuned["elements"] * tuned["turns"]
    counts = [-(-len(g) // chunk) for g in flat]
    parts = torch.empty(sum(counts), dtype=torch.float64, device=first.device)
    for g, part in zip(flat, parts.split(counts), strict=True):
        programs = min(len(part), launch.processors(first) * tuned["programs"])
        launch.launch(
            _squares, (programs,), g, part, len(g), len(part), SMALL=2.0**-90, LARGE=2.0**180, TURNS=tuned["turns"],
            PIPELINE=tuned["pipeline"], BLOCK=tuned["elements"], warps=tuned["warps"],
        )  # fmt: skip
    out = torch.empty(3, device=first.device)
    launch.launch(_finish, (1,), parts, loss, out, len(parts), clip or 0.0, CLIPS=clip is not None, BLOCK=4096, warps=8)
    return out


_grad_norm = launch.operator(
    "grad_norm(Tensor[] grads, Tensor? loss, float? clip) -> Tensor",
    _run,
    lambda grads, loss, clip: grads[0].new_empty(3, dtype=torch.float32),
)


def supports(grads: Sequence[Tensor], loss: Tensor | None = None) -> str | None:
    """Why the fused kernels cannot take these gradients; None: they can."""
    if why := launch.missing(grads[0]):
        return why
    if any(g.dtype not in launch.FLOATS or g.device != grads[0].device for g in grads):
        found = ", ".join(f"{g.dtype} on {g.device}" for g in grads)
        return f"gradients must be bf16, fp16 or fp32 on one device, not {found}"
    if loss is not None and (loss.numel() != 1 or loss.dtype != torch.float32):
        return f"the loss must be one number in fp32, not {tuple(loss.shape)} in {loss.dtype}"
    return None


def fused(grads: Sequence[Tensor], clip: float | None = None, loss: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`, in one Triton launch per buffer and one more. Raises KernelError where `supports` says no."""
    if why := supports(grads, loss):
        raise KernelError(f'grad_norm: {why}; set kernels.grad_norm = "reference"')
    norm, scale, skip = _grad_norm(list(grads), loss, clip).unbind()
    return norm, scale, skip


def grad_norm(grads: Sequence[Tensor], clip: float | None = None, loss: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`fused` on a GPU, `reference` on a CPU."""
    return (fused if grads[0].is_cuda else reference)(grads, clip, loss)


def _sample(case: Any, device: str) -> launch.Sample:
    count, buffers, dtype = case
    grads = [torch.randn(count + index, dtype=dtype, device=device) for index in range(buffers)]
    return grads, lambda version, *grads: version(grads, 1.0, torch.ones((), device=device))


def _traffic(case: Any) -> launch.Traffic:
    count, buffers, dtype = case
    return launch.Traffic(count * buffers * dtype.itemsize)


OPERATIONS = {
    "grad_norm": launch.Operation({"reference": reference, "fused": fused}, CASES, SIZES, _sample, _traffic, differentiable=False)
}
