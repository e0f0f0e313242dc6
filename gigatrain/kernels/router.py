"""The router of a mixture of experts: which k of E experts a token visits, with what weights, and what the losses of balance need (arXiv:2101.03961).

    l_ne = x_nd . w_ed (+ the logits' bias_e)                 scores_ne = softmax(l_ne) or sigmoid(l_ne), in fp32
    kept groups of n: the `groups_kept` of `groups` neighbours of E / groups experts with the largest sum of their two highest scores_ne + bias_e
    chosen_nk = the k largest of scores_ne + bias_e in kept groups, the highest first, equal ones by number
    weights_nk = scale * scores_n[chosen], where wanted divided by their sum + epsilon; for "softmax_after" scale * softmax(l_n[chosen])
    p_ne = softmax(l_ne), of sigmoids scores_ne / sum_e scores_ne         lse_n = log sum_e exp(l_ne)

    counts_e = tokens that chose e        shares_e = sum_n p_ne        squares = sum_n lse_n^2        each of the tokens of one sequence

`bias_e` (arXiv:2408.15664) moves the choice and no weight. Without it and groups the choice is by the logits, which order as the scores do and are not
equal where those are rounded to 1. transformers' formulas: mixtral, qwen3_moe, olmoe, deepseek_v3, mistral4, gpt_oss.

Legend: n tokens of one sequence, b sequences (all dims before the tokens'), d hidden channels, e experts, k visits of a token, l layers.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import launch
from gigatrain.kernels.elementwise import sigmoid
from gigatrain.kernels.launch import tl, triton


@dataclass(frozen=True)
class Router:
    """The numbers of a router; formulas at the top of the file.

    `wide`: the logits are a product in fp32 (deepseek_v3); else in the tokens' dtype. `losses`: the sums that balance_loss and z_loss need are made.
    """

    visits: int
    scores: Literal["softmax", "sigmoid", "softmax_after"] = "softmax"
    renormalise: bool = False
    epsilon: float = 0.0
    groups: int = 1
    groups_kept: int = 1
    scale: float = 1.0
    wide: bool = False
    losses: bool = False

    def __str__(self) -> str:
        groups = f"-{self.groups_kept}of{self.groups}" if self.groups > 1 else ""
        return f"{self.visits}-{self.scores}{groups}{'-wide' if self.wide else ''}{'-losses' if self.losses else ''}"


class Routed(NamedTuple):
    """What a router says of its tokens: choice and counts in int64, the rest in fp32 (or fp64), with gradients; the last two None without `losses`."""

    weights_nk: Tensor
    chosen_nk: Tensor
    counts_be: Tensor
    shares_be: Tensor | None = None
    squares_b: Tensor | None = None


# (tokens, sequences, experts, numbers, what is given of "bias" and "logits", dtype)
CASES = [
    (tokens, sequences, experts, numbers, given, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for tokens, sequences, experts, numbers, given in (
        (5, (), 4, Router(2), ""),
        (33, (2,), 12, Router(3, renormalise=True, losses=True), ""),
        (31, (), 16, Router(4, "sigmoid", True, 1e-20, 4, 2, 2.5, True, True), "bias"),
        (33, (1,), 24, Router(4, "softmax", True, 1e-20, 3, 2, 1.5), ""),
        (9, (2, 2), 8, Router(3, "softmax_after", losses=True), "logits"),
        (33, (), 20, Router(16, "sigmoid", scale=0.5, losses=True), "bias logits"),
        (3, (), 1, Router(1), ""),
        (1, (2,), 5, Router(5, renormalise=True), ""),
        (0, (2,), 6, Router(2, renormalise=True, losses=True), ""),
    )
]
# Qwen3-30B-A3B, Mixtral-8x7B, DeepSeek-V3, gpt-oss-120b
SIZES = [
    (8192, (), experts, numbers, given, torch.bfloat16)
    for experts, numbers, given in (
        (128, Router(8, renormalise=True, losses=True), ""),
        (8, Router(2, renormalise=True, losses=True), ""),
        (256, Router(8, "sigmoid", True, 1e-20, 8, 4, 2.5, True), "bias"),
        (128, Router(4, "softmax_after"), "logits"),
    )
]
_HIDDEN = 64  # channels of a case's tokens


def logits(x_nd: Tensor, weight_ed: Tensor, wide: bool, logits_bias_e: Tensor | None = None) -> Tensor:
    """l_ne in fp32 (or fp64): a product in the tokens' dtype, or in fp32 where `wide`."""
    dtype = torch.promote_types(x_nd.dtype, torch.float32)
    if not wide:
        return F.linear(x_nd, weight_ed, logits_bias_e).to(dtype)
    return F.linear(x_nd.to(dtype), weight_ed.to(dtype), None if logits_bias_e is None else logits_bias_e.to(dtype))


def _possible(numbers: Router, experts: int) -> None:
    """Raise KernelError for a choice that no token can make."""
    if experts % numbers.groups or not 0 < numbers.groups_kept <= numbers.groups:
        raise KernelError(
            f"router: {numbers.groups_kept} of {numbers.groups} groups of {experts} experts; groups are equal, and 1 to all of them kept"
        )
    if not 0 < numbers.visits <= (reach := experts // numbers.groups * numbers.groups_kept):
        raise KernelError(
            f"router: {numbers.visits} visits of a token, who reaches {reach} of {experts} experts; take fewer, or keep more groups"
        )


def _kept(keys_ne: Tensor, numbers: Router) -> Tensor:
    """Whether each expert of each token is of a kept group."""
    keys_nge = keys_ne.unflatten(-1, (numbers.groups, -1))
    best_ng = keys_nge.topk(min(2, keys_nge.shape[-1]), -1).values.sum(-1)
    groups_ng = best_ng.sort(stable=True, dim=-1, descending=True).indices[..., : numbers.groups_kept]
    kept_ng = torch.zeros_like(best_ng, dtype=torch.bool).scatter_(-1, groups_ng, True)
    return kept_ng.unsqueeze(-1).expand_as(keys_nge).flatten(-2)


def reference(
    x_nd: Tensor, weight_ed: Tensor, numbers: Router, bias_e: Tensor | None = None, logits_bias_e: Tensor | None = None
) -> Routed:
    """The choice of every token and the sums of every sequence, in plain torch. Where x has dims before its tokens', so have the sums."""
    _possible(numbers, weight_ed.shape[0])
    logits_ne = logits(x_nd, weight_ed, numbers.wide, logits_bias_e)
    scores_ne = logits_ne.sigmoid() if numbers.scores == "sigmoid" else logits_ne.softmax(-1)
    keys_ne = (logits_ne if bias_e is None else scores_ne + bias_e).detach()
    if numbers.groups > 1:
        kept_ne = _kept(keys_ne if bias_e is not None else scores_ne.detach(), numbers)
        keys_ne = keys_ne.masked_fill(~kept_ne, float("-inf"))
    chosen_nk = keys_ne.sort(stable=True, dim=-1, descending=True).indices[..., : numbers.visits].contiguous()
    weights_nk = (logits_ne if numbers.scores == "softmax_after" else scores_ne).gather(-1, chosen_nk)
    if numbers.scores == "softmax_after":
        weights_nk = weights_nk.softmax(-1)
    elif numbers.renormalise:
        weights_nk = weights_nk / (weights_nk.sum(-1, keepdim=True) + numbers.epsilon)
    counts_be = torch.zeros_like(logits_ne, dtype=torch.int64).scatter_(-1, chosen_nk, 1).sum(-2)
    routed = Routed(weights_nk * numbers.scale, chosen_nk, counts_be)
    if not numbers.losses:
        return routed
    shares_ne = scores_ne / scores_ne.sum(-1, keepdim=True) if numbers.scores == "sigmoid" else scores_ne
    return routed._replace(shares_be=shares_ne.sum(-2), squares_b=logits_ne.logsumexp(-1).square().sum(-1))


# Fused. Floor, in bytes of a token, of E experts in bf16 and k visits: forward 2E read, 12k written, backward 2E and 12k read, 2E written; in fp32, where the
# logits are wide, 4E. Beyond it: counts and sums of each program, 8E written and read per TOKENS x TURNS tokens.
SPACE = {
    "router.forward": [
        {"tokens": tokens, "turns": turns, "warps": warps}
        for tokens, warps in ((1, 1), (2, 1), (2, 4), (4, 2), (4, 4), (8, 4), (16, 4), (16, 8))
        for turns in (1, 4)
    ],
    "router.backward": [
        {"tokens": tokens, "warps": warps} for tokens, warps in ((1, 1), (2, 1), (2, 4), (4, 2), (4, 4), (8, 4), (16, 4), (16, 8))
    ],
}
LIMITS = 1024, 32  # experts and visits that one program holds
_KINDS = {"softmax": 0, "sigmoid": 1, "softmax_after": 2}


@triton.jit
def _orderly(keys):
    """Keys among which a largest can be found: not a number is infinite (and makes weights that are not numbers), and all are above what is out."""
    return tl.maximum(tl.where(keys == keys, keys, float("inf")), -3.0e38)  # noqa: PLR0124 (not a number is not itself)


@triton.jit
def _forward(
    LOGITS, BIAS, WEIGHTS, CHOSEN, COUNTS, SHARES, SQUARES, tokens, blocks, experts, size, groups, kept_groups, visits, epsilon, scale,
    KIND: tl.constexpr, BIASED: tl.constexpr, RENORMALISE: tl.constexpr, LOSSES: tl.constexpr,
    TOKENS: tl.constexpr, TURNS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, VISITS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sequence, block = program // blocks, program % blocks
    # Lanes are experts, each group filled up to SIZE, a power of two, and the groups to GROUPS.
    lane, group, visit = tl.arange(0, GROUPS * SIZE), tl.arange(0, GROUPS), tl.arange(0, VISITS)
    expert = lane // SIZE * size + lane % SIZE
    real = (lane // SIZE < groups) & (lane % SIZE < size)
    counts, shares = tl.zeros([GROUPS * SIZE], tl.int32), tl.zeros([GROUPS * SIZE], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    bias = tl.zeros([GROUPS * SIZE], tl.float32)
    if BIASED:
        bias = tl.load(BIAS + expert, mask=real, other=0.0).to(tl.float32)
    for turn in range(TURNS):
        token = (block * TURNS + turn) * TOKENS + tl.arange(0, TOKENS)
        live = token < tokens
        n = sequence.to(tl.int64) * tokens + token
        logits = tl.load(LOGITS + n[:, None] * experts + expert[None], mask=live[:, None] & real[None], other=0.0).to(tl.float32)
        logits = tl.where(real[None], logits, float("-inf"))
        top = tl.max(logits, 1)
        scores = tl.exp(logits - top[:, None])  # type: ignore
        total = tl.sum(scores, 1)
        if KIND == 1:
            scores, _ = sigmoid(logits)
        else:
            scores = scores / total[:, None]  # type: ignore
        keys = logits
        if BIASED:
            keys = scores + bias[None]
        if GROUPS > 1:
            of_group = keys if BIASED else scores
            of_group = tl.reshape(tl.where(real[None], _orderly(of_group), float("-inf")), [TOKENS, GROUPS, SIZE])
            best = tl.max(of_group, 2)
            first = tl.argmax(of_group, 2)
            second = tl.max(tl.where(tl.arange(0, SIZE)[None, None] == first[:, :, None], float("-inf"), of_group), 2)
            best = tl.where((group < groups)[None], _orderly(best + tl.where(size > 1, second, 0.0)), float("-inf"))
            kept = tl.zeros([TOKENS, GROUPS], tl.int32)
            for _ in range(kept_groups):
                nearest = group[None] == tl.argmax(best, 1)[:, None]
                kept = tl.where(nearest, 1, kept)
                best = tl.where(nearest, float("-inf"), best)
            kept = tl.reshape(tl.broadcast_to(kept[:, :, None], [TOKENS, GROUPS, SIZE]), [TOKENS, GROUPS * SIZE])
            keys = tl.where(real[None] & (kept > 0), _orderly(keys), float("-inf"))
        else:
            keys = tl.where(real[None], _orderly(keys), float("-inf"))
        picked, which = tl.zeros([TOKENS, VISITS], tl.float32), tl.zeros([TOKENS, VISITS], tl.int32)
        taken = tl.zeros([TOKENS, GROUPS * SIZE], tl.int32)
        for j in range(visits):
            at = tl.argmax(keys, 1)  # of equal ones the first
            hit = lane[None] == at[:, None]
            keys = tl.where(hit, float("-inf"), keys)
            taken = tl.where(hit, 1, taken)
            found = tl.sum(tl.where(hit, logits if KIND == 2 else scores, 0.0), 1)
            picked = tl.where(visit[None] == j, found[:, None], picked)  # type: ignore
            which = tl.where(visit[None] == j, (at // SIZE * size + at % SIZE)[:, None], which)
        if KIND == 2:
            picked = tl.where((visit < visits)[None], picked, float("-inf"))
            picked = tl.exp(picked - tl.max(picked, 1)[:, None])  # type: ignore
            picked = picked / tl.sum(picked, 1)[:, None]  # type: ignore
        elif RENORMALISE:
            picked = picked / (tl.sum(picked, 1) + epsilon)[:, None]
        out = n[:, None] * visits + visit[None]
        there = live[:, None] & (visit < visits)[None]
        tl.store(WEIGHTS + out, picked * scale, mask=there)
        tl.store(CHOSEN + out, which.to(tl.int64), mask=there)
        counts += tl.sum(tl.where(live[:, None], taken, 0), 0)
        if LOSSES:
            if KIND == 1:
                scores = scores / tl.sum(scores, 1)[:, None]  # type: ignore
            lse = top + tl.log(total)
            shares += tl.sum(tl.where(live[:, None], scores, 0.0), 0)
            squares += tl.where(live, lse * lse, 0.0)
    tl.store(COUNTS + program * experts + expert, counts, mask=real)
    if LOSSES:
        tl.store(SHARES + program * experts + expert, shares, mask=real)
        tl.store(SQUARES + program, tl.sum(squares, 0))


@triton.jit
def _sums(
    COUNTS,
    SHARES,
    SQUARES,
    OUT_COUNTS,
    OUT_SHARES,
    OUT_SQUARES,
    blocks,
    experts,
    LOSSES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each sequence, over its blocks, in a fixed order."""
    sequence = tl.program_id(0)
    expert = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    counts, shares, squares = tl.zeros([ROWS, BLOCK], tl.int64), tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, blocks, ROWS):
        row = start + tl.arange(0, ROWS)
        at = (sequence * blocks + row)[:, None] * experts + expert[None]
        there = (row < blocks)[:, None] & (expert < experts)[None]
        counts += tl.load(COUNTS + at, mask=there, other=0)
        if LOSSES:
            shares += tl.load(SHARES + at, mask=there, other=0.0)
            squares += tl.load(SQUARES + sequence * blocks + row, mask=row < blocks, other=0.0)
    tl.store(OUT_COUNTS + sequence * experts + expert, tl.sum(counts, 0), mask=expert < experts)
    if LOSSES:
        tl.store(OUT_SHARES + sequence * experts + expert, tl.sum(shares, 0), mask=expert < experts)
        if tl.program_id(1) == 0:
            tl.store(OUT_SQUARES + sequence, tl.sum(squares, 0))


@triton.jit
def _backward(
    LOGITS, CHOSEN, DWEIGHTS, DSHARES, DSQUARES, DLOGITS, tokens, rows, experts, visits, epsilon, scale,
    KIND: tl.constexpr, RENORMALISE: tl.constexpr, WEIGHTED: tl.constexpr, SHARED: tl.constexpr, SQUARED: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    live, real = n < rows, expert < experts
    there = live[:, None] & real[None]
    logits = tl.load(LOGITS + n[:, None] * experts + expert[None], mask=there, other=0.0).to(tl.float32)
    logits = tl.where(real[None], logits, float("-inf"))
    top = tl.max(logits, 1)
    p = tl.exp(logits - top[:, None])  # type: ignore
    total = tl.sum(p, 1)
    p = p / total[:, None]  # type: ignore
    scores, slope = p, p
    if KIND == 1:
        scores, slope = sigmoid(logits)
    dlogits, dscores = tl.zeros([TOKENS, EXPERTS], tl.float32), tl.zeros([TOKENS, EXPERTS], tl.float32)
    if WEIGHTED:
        taken, dweights = tl.zeros([TOKENS, EXPERTS], tl.int32), tl.zeros([TOKENS, EXPERTS], tl.float32)
        for j in range(visits):
            hit = expert[None] == tl.load(CHOSEN + n * visits + j, mask=live, other=-1)[:, None]
            dweights = tl.where(hit, tl.load(DWEIGHTS + n * visits + j, mask=live, other=0.0).to(tl.float32)[:, None], dweights)
            taken = tl.where(hit, 1, taken)
        dweights *= scale
        if KIND == 2:
            chosen = tl.where(taken > 0, logits, float("-inf"))
            weights = tl.where(taken > 0, tl.exp(chosen - tl.where(live, tl.max(chosen, 1), 0.0)[:, None]), 0.0)
            weights = weights / tl.where(live, tl.sum(weights, 1), 1.0)[:, None]
            dlogits += weights * (dweights - tl.sum(weights * dweights, 1)[:, None])  # type: ignore
        elif RENORMALISE:
            chosen = tl.where(taken > 0, scores, 0.0)
            below = tl.where(live, tl.sum(chosen, 1) + epsilon, 1.0)[:, None]
            weights = chosen / below
            dscores += tl.where(taken > 0, (dweights - tl.sum(weights * dweights, 1)[:, None]) / below, 0.0)  # type: ignore
        else:
            dscores += dweights
    if SHARED:
        dshares = tl.load(DSHARES + (n // tokens)[:, None] * experts + expert[None], mask=there, other=0.0)
        if KIND == 1:
            below = tl.sum(scores, 1)[:, None]  # type: ignore
            dscores += (dshares - tl.sum(scores * dshares, 1)[:, None] / below) / below  # type: ignore
        else:
            dscores += dshares
    if KIND == 1:
        dlogits += dscores * slope
    else:
        dlogits += p * (dscores - tl.sum(p * dscores, 1)[:, None])  # type: ignore
    if SQUARED:
        dlogits += p * (2.0 * (top + tl.log(total)) * tl.load(DSQUARES + n // tokens, mask=live, other=0.0))[:, None]  # type: ignore
    tl.store(DLOGITS + n[:, None] * experts + expert[None], dlogits.to(DLOGITS.dtype.element_ty), mask=there)


def _run(
    logits: Tensor,
    bias: Tensor | None,
    visits: int,
    kind: int,
    renormalise: bool,
    epsilon: float,
    groups: int,
    groups_kept: int,
    scale: float,
    losses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape[-2:]
    out = _empty(logits, visits, losses)
    sequences = out[2].numel() // experts
    tuned = launch.configuration(logits, "router.forward", experts)
    blocks = max(1, -(-tokens // (tuned["tokens"] * tuned["turns"])))
    parts = sequences * blocks
    counts = torch.empty(parts, experts, dtype=torch.int32, device=logits.device)
    shares = torch.empty(parts if losses else 0, experts, dtype=torch.float32, device=logits.device)
    squares = torch.empty(parts if losses else 0, dtype=torch.float32, device=logits.device)
    size = experts // groups
    launch.launch(
        _forward, (parts,), logits.contiguous(), None if bias is None else bias.contiguous(), *out[:2], counts, shares, squares, tokens, blocks,
        experts, size, groups, groups_kept, visits, epsilon, scale, KIND=kind, BIASED=bias is not None, RENORMALISE=renormalise, LOSSES=losses,
        TOKENS=tuned["tokens"], TURNS=tuned["turns"], GROUPS=launch.block(groups), SIZE=launch.block(size), VISITS=launch.block(visits),
        warps=tuned["warps"],
    )  # fmt: skip
    launch.launch(
        _sums, (sequences, -(-experts // 32)), counts, shares, squares, *out[2:], blocks, experts, LOSSES=losses, ROWS=32, BLOCK=32
    )
    return out


def _empty(logits: Tensor, visits: int, losses: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *ahead, tokens, experts = logits.shape
    wide: dict[str, Any] = {"dtype": torch.float32}
    return (
        logits.new_empty(*ahead, tokens, visits, **wide),
        logits.new_empty(*ahead, tokens, visits, dtype=torch.int64),
        logits.new_empty(*ahead, experts, dtype=torch.int64),
        logits.new_empty((*ahead, experts) if losses else 0, **wide),
        logits.new_empty(ahead if losses else 0, **wide),
    )


def _run_backward(
    dweights: Tensor | None,
    dshares: Tensor | None,
    dsquares: Tensor | None,
    logits: Tensor,
    chosen: Tensor,
    kind: int,
    renormalise: bool,
    epsilon: float,
    scale: float,
) -> Tensor:
    experts, out = logits.shape[-1], torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows = logits.numel() // experts
    tuned = launch.configuration(logits, "router.backward", experts)
    given = dweights, dshares, dsquares
    launch.launch(
        _backward, (-(-rows // tuned["tokens"]),), logits.contiguous(), chosen, *(None if g is None else g.contiguous() for g in given), out,
        logits.shape[-2], rows, experts, chosen.shape[-1], epsilon, scale, KIND=kind, RENORMALISE=renormalise, WEIGHTED=dweights is not None,
        SHARED=dshares is not None, SQUARED=dsquares is not None, TOKENS=tuned["tokens"], EXPERTS=launch.block(experts), warps=tuned["warps"],
    )  # fmt: skip
    return out


_router = launch.operator(
    "router(Tensor logits, Tensor? bias, int visits, int kind, bool renormalise, float epsilon, int groups, int groups_kept, float scale, bool losses) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    lambda logits, bias, visits, *rest: _empty(logits, visits, rest[-1]),
)
_router_backward = launch.operator(
    "router_backward(Tensor? dweights, Tensor? dshares, Tensor? dsquares, Tensor logits, Tensor chosen, int kind, bool renormalise, float epsilon, "
    "float scale) -> Tensor",
    _run_backward,
    lambda dweights, dshares, dsquares, logits, *_: logits.new_empty(logits.shape),
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    logits, _, _, kind, renormalise, epsilon, _, _, scale, ctx.losses = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.numbers = kind, renormalise, epsilon, scale
    ctx.mark_non_differentiable(output[1], output[2], *(() if ctx.losses else output[3:]))
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dweights: Tensor | None, _chosen: None, _counts: None, dshares: Tensor | None, dsquares: Tensor | None) -> Any:
    given = (dweights, dshares, dsquares) if ctx.losses else (dweights, None, None)
    if all(g is None for g in given):
        return (None,) * 10
    return _router_backward(*given, *ctx.saved_tensors, *ctx.numbers), *(None,) * 9


_call = launch.differentiable(_router, _save, _grads)


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """The product of two bf16 matrices in fp32: products of two are exact, sums are fp32's, and tensor cores make it 10 times as fast as fp32's own."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _Wide(torch.autograd.Function):
    """A product in fp32 of bf16 tokens and weights. Its gradient, fp32, goes back as two bf16 numbers, 16 bits of it: the results have 8."""

    @staticmethod
    def forward(x_nd: Tensor, weight_ed: Tensor) -> Tensor:
        return _exact(x_nd, weight_ed.t())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_ne: Tensor) -> Any:
        x_nd, weight_ed = ctx.saved_tensors
        high = grad_ne.to(x_nd.dtype)
        low = (grad_ne - high).to(x_nd.dtype)
        dx = _exact(high, weight_ed) + _exact(low, weight_ed)
        dweight = _exact(high.t(), x_nd) + _exact(low.t(), x_nd)
        return dx.to(x_nd.dtype), dweight.to(weight_ed.dtype)


def supports(x_nd: Tensor, weight_ed: Tensor, numbers: Router) -> str | None:
    """Why the fused kernels cannot choose for these tokens; None: they can."""
    if why := launch.missing(x_nd):
        return why
    if x_nd.dtype not in launch.FLOATS or weight_ed.dtype != x_nd.dtype or x_nd.ndim < 2:
        return f"tokens [..., n, d] and weights must be bf16, fp16 or fp32, not {x_nd.dtype} {tuple(x_nd.shape)} and {weight_ed.dtype}"
    lanes = launch.block(numbers.groups) * launch.block(weight_ed.shape[0] // numbers.groups)
    if lanes > LIMITS[0] or numbers.visits > LIMITS[1]:
        return f"at most {LIMITS[0]} experts, groups filled up to powers of two, and {LIMITS[1]} visits, not {lanes} and {numbers.visits}"
    return None


def fused(x_nd: Tensor, weight_ed: Tensor, numbers: Router, bias_e: Tensor | None = None, logits_bias_e: Tensor | None = None) -> Routed:
    """As `reference`: torch's product, then two Triton launches, and one back; keeps logits and choice. Raises KernelError where `supports` says no."""
    _possible(numbers, weight_ed.shape[0])
    if why := supports(x_nd, weight_ed, numbers):
        raise KernelError(f'router: {why}; set kernels.router = "reference"')
    if numbers.wide and x_nd.dtype == weight_ed.dtype == torch.bfloat16:
        logits_ne: Tensor = _Wide.apply(x_nd.flatten(0, -2), weight_ed).view(*x_nd.shape[:-1], -1)  # type: ignore[attr-defined]
        logits_ne = logits_ne if logits_bias_e is None else logits_ne + logits_bias_e.float()
    elif numbers.wide:
        logits_ne = logits(x_nd, weight_ed, True, logits_bias_e)
    else:
        logits_ne = F.linear(x_nd, weight_ed, logits_bias_e)
    weights_nk, chosen_nk, counts_be, shares_be, squares_b = _call(
        logits_ne, bias_e, numbers.visits, _KINDS[numbers.scores], numbers.renormalise, numbers.epsilon, numbers.groups, numbers.groups_kept,
        numbers.scale, numbers.losses,
    )  # fmt: skip
    return Routed(weights_nk, chosen_nk, counts_be, *((shares_be, squares_b) if numbers.losses else ()))


def balance_loss(counts_le: Tensor, shares_le: Tensor, tokens: int) -> Tensor:
    """E sum_e (sum_l counts_le / R) (sum_l shares_le / R) with R = l `tokens`: the auxiliary loss of arXiv:2101.03961 as transformers counts it.

    It is k where experts are visited alike; rows of several sequences or layers are summed first, so that layers share their balance.
    """
    counts_e, shares_e = counts_le.flatten(0, -2).sum(0), shares_le.flatten(0, -2).sum(0)
    rows = max(1, tokens * counts_le.shape[0])
    return counts_le.shape[-1] * ((counts_e / rows) * (shares_e / rows)).sum()


def sequence_balance_loss(counts_be: Tensor, shares_be: Tensor, tokens: int, visits: int) -> Tensor:
    """The mean over sequences of sum_e (E counts_be / (k t)) (shares_be / t), t = `tokens` of a sequence: DeepSeek-V3's (arXiv:2412.19437, 17-20)."""
    experts = counts_be.shape[-1]
    return ((counts_be * (experts / max(1, visits * tokens))) * (shares_be / max(1, tokens))).sum(-1).mean()


def z_loss(squares: Tensor, rows: int) -> Tensor:
    """The mean over `rows` (tokens, of all layers whose sums are given) of lse_n^2, which keeps logits small (arXiv:2202.08906, 5)."""
    return squares.sum() / max(1, rows)


def bias_update(counts_e: Tensor, bias_e: Tensor, rate: float) -> Tensor:
    """bias_e + rate * sign(mean - counts_e), after a step in which `counts_e` of all ranks' tokens visited each expert (arXiv:2408.15664, 1)."""
    counts = counts_e.to(torch.float64 if bias_e.dtype == torch.float64 else torch.float32)
    return bias_e + rate * (counts.mean(-1, keepdim=True) - counts).sign().to(bias_e.dtype)


def _sample(case: Any, device: str) -> launch.Sample:
    tokens, sequences, experts, numbers, given, dtype = case
    # A token sees one channel, and a channel's weights are distinct: the logits are exact in every dtype, so that no rounding moves a choice.
    x = torch.zeros(*sequences, tokens, _HIDDEN, device=device)
    x.scatter_(-1, torch.randint(_HIDDEN, (*sequences, tokens, 1), device=device), 2.0)
    steps = torch.rand(_HIDDEN, experts, device=device).argsort(-1).to(torch.float32) - experts / 2
    weight = steps.t() * (4.0 / max(16, experts))
    bias = torch.randn(experts, device=device) * 0.1 if "bias" in given.split() else None
    logits_bias = [(torch.randint(-8, 8, (experts,), device=device) / 64).to(dtype)] if "logits" in given else []

    def call(f: Any, x: Tensor, weight: Tensor, logits_bias: Tensor | None = None) -> Any:
        return tuple(out for out in f(x, weight, numbers, bias, logits_bias) if out is not None)

    return [x.to(dtype), weight.to(dtype), *logits_bias], call


def _traffic(case: Any) -> launch.Traffic:
    """Of all but the product, whose bytes and FLOPs are the caller's: logits in, weights and choice out; gradients of the weights in, of the logits out."""
    tokens, sequences, experts, numbers, _, _ = case
    rows = tokens
    for count in sequences:
        rows *= count
    return launch.Traffic(rows * (4 * experts + 12 * numbers.visits), rows * (8 * experts + 12 * numbers.visits))


OPERATIONS = {"router": launch.Operation({"reference": reference, "fused": fused}, CASES, SIZES, _sample, _traffic)}
