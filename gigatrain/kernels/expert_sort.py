"""The slots of tokens' visits in the order of their experts: a stable sort by key, and how many slots each key has.

    order_m: the slots, sorted by min(key, E), equal ones by slot        counts_e: slots of each key below E        place_m: order's inverse

Keys from E on are of no expert: they come last and are not counted. There are so few keys that counting sorts: blocks of slots are counted (integers, in
any order), a block's first place of a key is the sum of what comes before it, and within a block a slot's place is the number of equal keys before it. Three
launches, the same whatever the keys are, and nothing is read on the host; torch's sort is a radix sort of 64-bit keys, 8 passes.

Legend: m slots, e experts, p blocks of slots.
"""

from typing import Any

import torch
from torch import Tensor

from gigatrain.errors import KernelError
from gigatrain.kernels import launch
from gigatrain.kernels.launch import tl, triton

# (tokens, visits, experts, share of keys that are of no expert, dtype of the rows that will be sorted so)
CASES = [
    (tokens, visits, experts, nowhere, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for tokens, visits, experts, nowhere in ((33, 3, 8, 0.0), (150, 2, 5, 0.3), (31, 1, 1, 0.0), (1, 4, 70, 0.0), (0, 2, 6, 0.0))
]
SIZES = [(8192, 8, 128, 0.0, torch.bfloat16), (8192, 2, 8, 0.0, torch.bfloat16), (8192, 8, 256, 0.0, torch.bfloat16)]
LIMIT = 1023  # experts, so that a program holds a count of each
SLOTS = 1 << 28  # whose counts, of 1,024 bins per 128 slots, are still numbered in 32 bits


def reference(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`(order_m, counts_e)` in int64, by torch's stable sort."""
    ordered, order_m = keys.flatten().clamp(max=count).sort(stable=True)
    ends_e = torch.searchsorted(ordered, torch.arange(count, dtype=ordered.dtype, device=ordered.device), right=True)
    return order_m, ends_e.diff(prepend=ends_e.new_zeros(1))


# Fused. Floor: keys read, order written, 16 B a slot; beyond it the keys once more, place, 4 B written and 4 read per block and expert, twice.
SPACE = {"expert_sort": [{"block": block, "warps": warps} for block in (128, 256, 512, 1024) for warps in (4, 8)]}


@triton.jit
def _count(KEYS, PARTS, slots, experts, BLOCK: tl.constexpr, BINS: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # What is behind the last slot is counted as of no expert, behind all that is.
    key = tl.minimum(tl.load(KEYS + at, mask=at < slots, other=experts), experts).to(tl.int32)
    tl.store(PARTS + tl.program_id(0) * BINS + tl.arange(0, BINS), tl.histogram(key, BINS))


@triton.jit
def _prefix(PARTS, TOTALS, blocks, BINS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, blocks, ROWS):
        row = start + tl.arange(0, ROWS)
        at = PARTS + row[:, None] * BINS + column[None]
        live = (row < blocks)[:, None] & (column < BINS)[None]
        part = tl.load(at, mask=live, other=0)
        tl.store(at, tl.cumsum(part, 0) - part + total[None], mask=live)
        total += tl.sum(part, 0)
    tl.store(TOTALS + column, total, mask=column < BINS)


@triton.jit
def _scatter(KEYS, PARTS, TOTALS, ORDER, PLACE, COUNTS, ENDS, slots, experts, BLOCK: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    totals = tl.load(TOTALS + bins)
    ends = tl.cumsum(totals, 0)
    if block == 0:
        tl.store(COUNTS + bins, totals.to(tl.int64), mask=bins < experts)
        tl.store(ENDS + bins, ends, mask=bins < experts)
    lane = tl.arange(0, BLOCK)
    slot = block * BLOCK + lane
    live = slot < slots
    key = tl.minimum(tl.load(KEYS + slot, mask=live, other=experts), experts).to(tl.int32)
    place = tl.gather(ends - totals + tl.load(PARTS + block * BINS + bins), key, 0)
    for start in range(0, BLOCK, CHUNK):
        other = start + tl.arange(0, CHUNK)
        at = block * BLOCK + other
        theirs = tl.minimum(tl.load(KEYS + at, mask=at < slots, other=experts), experts).to(tl.int32)
        place += tl.sum(((key[:, None] == theirs[None]) & (other[None] < lane[:, None])).to(tl.int32), 1)
    tl.store(ORDER + place, slot.to(tl.int64), mask=live)
    tl.store(PLACE + slot, place.to(tl.int64), mask=live)


def run(keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(order_m, place_m, counts_e, ends_e)`: in int64, but the ends, the counts' running sum, in int32."""
    keys_m = keys.contiguous()
    slots = keys_m.numel()
    order, place = (torch.empty(slots, dtype=torch.int64, device=keys.device) for _ in range(2))
    counts, ends = torch.empty(count, dtype=torch.int64, device=keys.device), torch.empty(count, dtype=torch.int32, device=keys.device)
    if not slots:
        return order, place, counts.zero_(), ends.zero_()
    tuned = launch.configuration(keys, "expert_sort", count)
    blocks, bins = -(-slots // tuned["block"]), max(32, launch.block(count + 1))
    parts = torch.empty(blocks, bins, dtype=torch.int32, device=keys.device)
    totals = torch.empty(bins, dtype=torch.int32, device=keys.device)
    sizes = {"BLOCK": tuned["block"], "BINS": bins, "warps": tuned["warps"]}
    launch.launch(_count, (blocks,), keys_m, parts, slots, count, **sizes)
    launch.launch(_prefix, (bins // 32,), parts, totals, blocks, BINS=bins, COLUMNS=32, ROWS=128)
    launch.launch(_scatter, (blocks,), keys_m, parts, totals, order, place, counts, ends, slots, count, CHUNK=32, **sizes)
    return order, place, counts, ends


_expert_sort = launch.operator(
    "expert_sort(Tensor keys, int count) -> (Tensor, Tensor)",
    lambda keys, count: run(keys, count)[::2],
    lambda keys, count: (keys.new_empty(keys.numel(), dtype=torch.int64), keys.new_empty(count, dtype=torch.int64)),
)


def supports(keys: Tensor, count: int) -> str | None:
    """Why the fused kernels cannot sort these keys; None: they can."""
    if why := launch.missing(keys):
        return why
    if keys.dtype not in (torch.int64, torch.int32) or not 0 < count <= LIMIT or keys.numel() >= SLOTS:
        return f"1 to {LIMIT} experts and fewer than 2^28 keys in int64 or int32, not {count}, and {keys.numel()} in {keys.dtype}"
    return None


def fused(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `reference`, by counting in three Triton launches. Raises KernelError where `supports` says no."""
    if why := supports(keys, count):
        raise KernelError(f'expert_sort: {why}; set kernels.expert_sort = "reference"')
    return _expert_sort(keys, count)


def _sample(case: Any, device: str) -> launch.Sample:
    tokens, visits, experts, nowhere, _ = case
    keys = torch.randint(0, experts, (tokens, visits), device=device)
    keys = keys.where(torch.rand(keys.shape, device=device) >= nowhere, experts)
    return [keys], lambda f, keys: f(keys, experts)


def _traffic(case: Any) -> launch.Traffic:
    return launch.Traffic(16.0 * case[0] * case[1])


OPERATIONS = {
    "expert_sort": launch.Operation({"reference": reference, "fused": fused}, CASES, SIZES, _sample, _traffic, differentiable=False)
}
