"""Embedding: rows of a table by token, with a gradient that is deterministic and summed in fp32.

    y_th = weight_vh[ids_t]        dweight_vh = sum over the t with ids_t = v of dy_th

Legend: ids any shape t, int64 or int32; weight_vh; y has the shape of ids and h. The gradient has the dtype of the weight and is rounded once.

The gradient is a sum over runs: the ids are sorted (stably), and a program takes a block of sorted positions and some columns. A run of equal ids within
the block is written to its row of the gradient. A run that crosses an edge of the block leaves its fp32 sum in one of the block's two slots, the first for
a run that comes from the block before, the second for one that goes on; the slots, with the ids of their runs, are a sorted sequence again, 2 for every
block, which the same kernel sums until one block holds it all. So no program walks more than a block however often a token occurs, nothing is added in an
order that depends on timing, and the number of launches depends on t alone: nothing waits for the GPU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import launch
from gigatrain.kernels.launch import tl, triton

# (tokens, vocabulary, hidden, distribution of the ids, dtype)
CASES = [
    (tokens, vocabulary, hidden, ids, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for tokens, vocabulary, hidden, ids in (
        *((40, 50, 24, "uniform"), (33, 7, 9, "uniform"), (70, 11, 8, "equal"), (33, 33, 16, "distinct"), (48, 40, 33, "padded")),
        *((31, 1, 5, "uniform"), (1, 3, 64, "uniform"), (0, 4, 8, "uniform")),
    )
]
SIZES = [(8192, vocabulary, hidden, "padded", torch.bfloat16) for vocabulary, hidden in ((32000, 4096), (151936, 1024), (49152, 576))]


def reference(ids_t: Tensor, weight_vh: Tensor) -> Tensor:
    """The rows of the weight in plain torch."""
    return F.embedding(ids_t, weight_vh)


# Fused. Floor, for T tokens of H channels, in bf16: forward 2TH read, 2TH written; backward 2TH read, 2VH zeros written, and 2H for every token that
# occurs. Beyond it: the sort, and the slots, with 32 positions a block at most 0.25TH written and read.
SPACE = {
    "embedding.backward": [
        {"positions": positions, "rows": rows, "columns": columns, "warps": warps}
        for positions in (32, 64)
        for rows in (4, 8, 16)
        # 8 columns, 16 bytes of bf16, per thread: a warp of 64 has 512. Fewer columns would spread the rows over threads, which then exchange them.
        for columns, warps in ((512, 2), (1024, 2), (1024, 4), (2048, 8))
    ]
}


@triton.jit
def _run(KEYS, at, count, vocabulary, FIRST: tl.constexpr):
    """The run at a sorted position, which is called by its id; `vocabulary` for the position behind the last.

    The keys of the first level are the ids. The key of a slot is its run, or ~run if it has no sum but lies within the run, or `vocabulary`.
    """
    key = tl.load(KEYS + at, mask=at < count, other=vocabulary)
    if not FIRST:
        key = tl.where(key < 0, ~key, key)
    return key


@triton.jit
def _sum_runs(
    X, KEYS, ORDER, OUT, SLOTS, SLOT_KEYS, count, columns, vocabulary, x_stride,
    FIRST: tl.constexpr, LAST: tl.constexpr, POSITIONS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    begin = block * POSITIONS
    end = tl.minimum(begin + POSITIONS, count)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < columns
    slot = SLOTS + block.to(tl.int64) * 2 * columns + column
    first = _run(KEYS, begin, count, vocabulary, FIRST)
    comes = begin > 0
    if comes:
        comes = _run(KEYS, begin - 1, count, vocabulary, FIRST) == first  # the first run here is the last one of the block before
    run = first
    total = tl.zeros([BLOCK], tl.float32)  # of the run so far
    for start in range(begin, end, ROWS):
        # All rows are on their way before the first is added.
        at = start + tl.arange(0, ROWS)
        if FIRST:
            row = tl.load(ORDER + at, mask=at < count, other=0)
            summed = at < count
        else:
            key = tl.load(KEYS + at, mask=at < count, other=vocabulary)
            row = at.to(tl.int64)
            summed = (key >= 0) & (key < vocabulary)
        x = tl.load(X + row[:, None] * x_stride + column[None], mask=summed[:, None] & exists[None], other=0.0)
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        for i in tl.static_range(ROWS):  # type: ignore
            # Row i: each thread holds all rows of its columns, so that this compiles to naming registers, for sums of integers with zeros fold.
            total += tl.sum(tl.where((tl.arange(0, ROWS) == i)[:, None], bits, 0), 0).to(tl.float32, bitcast=True)
            right = _run(KEYS, start + i + 1, count, vocabulary, FIRST)
            if right != run:
                if comes & (run == first):
                    tl.store(slot, total, mask=exists)
                elif (run >= 0) & (run < vocabulary):
                    tl.store(OUT + run.to(tl.int64) * columns + column, total.to(OUT.dtype.element_ty), mask=exists)
                total = tl.zeros([BLOCK], tl.float32)
            run = right
    if not LAST:
        last = _run(KEYS, end - 1, count, vocabulary, FIRST)
        goes, one = (end < count) & (run == last), first == last
        if goes:
            tl.store(slot + tl.where(one, 0, columns), total, mask=exists)
        if tl.program_id(1) == 0:
            first = tl.where((first >= 0) & (first < vocabulary), first, vocabulary)
            last = tl.where((last >= 0) & (last < vocabulary), last, vocabulary)
            within = one & (comes | goes)
            tl.store(SLOT_KEYS + block * 2, tl.where(comes | within, first, vocabulary))
            tl.store(SLOT_KEYS + block * 2 + 1, tl.where(within, ~first, tl.where(goes, last, vocabulary)))


def _run_backward(dy: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    x = launch.rows(dy)
    columns = x.shape[1]
    tuned = launch.configuration(x, "embedding.backward", columns)
    out = torch.zeros(vocabulary, columns, dtype=dy.dtype, device=dy.device)
    keys, order = torch.sort(ids.reshape(-1), stable=True)
    first = True
    while count := keys.shape[0]:
        blocks = -(-count // tuned["positions"])
        slots = 2 * blocks if blocks > 1 else 0
        sums = torch.empty(slots, columns, dtype=torch.float32, device=x.device)
        slot_keys = torch.empty(slots, dtype=torch.int64, device=x.device)
        launch.launch(
            _sum_runs, (blocks, -(-columns // tuned["columns"])), x, keys, order, out, sums, slot_keys, count, columns, vocabulary, x.stride(0),
            FIRST=first, LAST=blocks == 1, POSITIONS=tuned["positions"], ROWS=tuned["rows"], BLOCK=tuned["columns"], warps=tuned["warps"],
        )  # fmt: skip
        x, keys, first = sums, slot_keys, False
    return out


_embedding = launch.operator(
    "embedding(Tensor ids, Tensor weight) -> Tensor",
    F.embedding,
    lambda ids, weight: weight.new_empty(*ids.shape, weight.shape[1]),
)
_embedding_backward = launch.operator(
    "embedding_backward(Tensor dy, Tensor ids, SymInt vocabulary) -> Tensor",
    _run_backward,
    lambda dy, ids, vocabulary: dy.new_empty(vocabulary, dy.shape[-1]),
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ids, weight = inputs
    ctx.save_for_backward(ids)
    ctx.vocabulary = weight.shape[0]
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dy: Tensor | None) -> Any:
    if dy is None or not ctx.needs_input_grad[1]:
        return None, None
    (ids,) = ctx.saved_tensors
    return None, _embedding_backward(dy, ids, ctx.vocabulary)


_call = launch.differentiable(_embedding, _save, _grads)


def supports(ids_t: Tensor, weight_vh: Tensor) -> str | None:
    """Why the fused kernel cannot take these tensors; None: it can."""
    if why := launch.missing(weight_vh):
        return why
    if ids_t.dtype not in (torch.int64, torch.int32) or weight_vh.dtype not in launch.FLOATS:
        return f"ids must be int64 or int32 and the weight bf16, fp16 or fp32, not {ids_t.dtype} and {weight_vh.dtype}"
    if weight_vh.ndim != 2 or ids_t.device != weight_vh.device:
        return f"ids on {ids_t.device} do not fit a weight {tuple(weight_vh.shape)} on {weight_vh.device}"
    return None


def fused(ids_t: Tensor, weight_vh: Tensor) -> Tensor:
    """As `reference`, with the gradient by a stable sort and 1 to 5 Triton launches; keeps the ids. Raises KernelError where `supports` says no."""
    if why := supports(ids_t, weight_vh):
        raise KernelError(f'embedding: {why}; set kernels.embedding = "reference"')
    return _call(ids_t, weight_vh)


def embedding(ids_t: Tensor, weight_vh: Tensor) -> Tensor:
    """`fused` on a GPU, `reference` on a CPU."""
    return (fused if weight_vh.is_cuda else reference)(ids_t, weight_vh)


def _sample(case: Any, device: str) -> launch.Sample:
    tokens, vocabulary, hidden, kind, dtype = case
    ids = torch.randint(0, vocabulary, (tokens,), device=device)
    match kind:
        case "equal":
            ids.fill_(vocabulary // 2)
        case "distinct":
            ids = torch.randperm(vocabulary, device=device)[:tokens]
        case "padded":  # a fifth is one token
            ids = ids.where(torch.rand(tokens, device=device) > 0.2, 0)
    # 1,024 rows again and again: drawing 150,000 takes a CPU seconds, and which numbers are moved does not matter.
    weight = torch.randn(min(vocabulary, 1024), hidden, dtype=dtype, device=device)[torch.arange(vocabulary, device=device) % 1024]
    return [weight], lambda f, weight: f(ids, weight)


def _traffic(case: Any) -> launch.Traffic:
    tokens, vocabulary, hidden, kind, dtype = case
    row = hidden * dtype.itemsize
    occurring = {"equal": 1, "distinct": tokens}.get(kind, vocabulary * (1 - (1 - 1 / vocabulary) ** tokens))
    return launch.Traffic((occurring + tokens) * row, (tokens + vocabulary + occurring) * row)


OPERATIONS = {"embedding": launch.Operation({"reference": reference, "fused": fused}, CASES, SIZES, _sample, _traffic)}
