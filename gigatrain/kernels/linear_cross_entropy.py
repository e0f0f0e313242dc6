"""The head's product and the cross entropy of its logits in one, without ever holding all of them.

    x = h w^T        l = scale * x        l = c * tanh(l / c) if softcap        lse = log sum exp l        ce = lse - l[label]
    loss = sum of weight * (ce - smoothing * mean(l - l[label]) + z_loss * lse ** 2) over the tokens that have a label

Legend: hidden_nh tokens by channels; weight_vh vocabulary by channels; labels_n int64, `ignore` = no label; weights_n, `reduction` and what a row's state
is: cross_entropy.py. Losses are fp32 (fp64 for fp64 inputs); the products run in the inputs' dtype. With dx as there:
    dh = dx w        dw = dx^T h
`group`, of torch.distributed: weight_vh is this process's shard of the vocabulary, all of equal size and in the order of ranks; hidden, labels (which
count over the whole vocabulary) and weights are the same on all. Every process gets the whole loss and the whole dh, and dw of its shard.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import cross_entropy, launch
from gigatrain.kernels.cross_entropy import IGNORE, TERMS, Shard, Terms
from gigatrain.kernels.launch import tl, triton

# (tokens, channels, vocabulary, softcap, scale, z_loss, smoothing, reduction, dtype); tokens are weighted where labels are smoothed
CASES = [
    (*shape, *terms, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in ((64, 32, 96), (33, 17, 31), (1, 8, 3))
    for terms in (
        (None, 1.0, 0.0, 0.0, "sum"),
        (5.0, 1.0, 0.0, 0.0, "sum"),
        (None, 0.125, 1e-2, 0.0, "mean"),
        (3.0, 0.5, 1e-3, 0.1, "mean"),
        (None, 1.0, 1e-3, 0.2, "none"),
    )
] + [(150, 24, 40, None, 0.5, 1e-3, 0.1, "mean", torch.bfloat16)]  # several chunks
SIZES = [
    (8192, hidden, vocabulary, softcap, 1.0, 0.0, 0.0, "sum", torch.bfloat16)
    for hidden, vocabulary, softcap in (
        (4096, 128256, None),
        (2048, 128256, None),
        (768, 50257, None),
        (1024, 151936, None),
        (1152, 262144, 30.0),
    )
]


class _Whole(torch.autograd.Function):
    """Logits of all shards side by side; the gradient is this shard's columns."""

    @staticmethod
    def forward(ctx: Any, x_nv: Tensor, group: Any) -> Tensor:
        parts = [torch.empty_like(x_nv) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(parts, x_nv.contiguous(), group=group)
        ctx.first, ctx.columns = distributed.get_rank(group) * x_nv.shape[1], x_nv.shape[1]
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[:, ctx.first : ctx.first + ctx.columns], None


class _Summed(torch.autograd.Function):
    """The identity, whose gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = grad.clone()
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


def reference(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    ignore: int = IGNORE,
    label_smoothing: float = 0.0,
    weights_n: Tensor | None = None,
    reduction: str = "sum",
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """`(loss, ce)` in plain torch, every logit in memory; ce carries no gradient. No labels at all: 0 and zero gradients."""
    x = F.linear(hidden_nh if group is None else _Summed.apply(hidden_nh, group), weight_vh)  # type: ignore[arg-type]
    return cross_entropy.reference(
        x if group is None else _Whole.apply(x, group),  # type: ignore[arg-type]
        labels_n,
        softcap=softcap,
        scale=scale,
        z_loss=z_loss,
        ignore=ignore,
        label_smoothing=label_smoothing,
        weights_n=weights_n,
        reduction=reduction,
    )


# Logits of one chunk: 8 MB in fp32 stay in a CPU's cache, and a GPU wants products of some thousand tokens: 1.07 GB in bf16, 4,096 tokens of a vocabulary
# of 128,256. Forward and backward of 2048 x 192 x 4096 in bf16 on one EPYC core, CPU time: 2**18 138 ms, 2**20 90, 2**21 83, 2**22 101, 2**23 (all at
# once) 130, reference 204; in fp32 151, reference 274. Never fewer tokens than a step, or the products starve.
_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 29}
_STEPS = {"cpu": 64, "cuda": 128}
_WIDE_PRODUCTS = ("cuda",) if torch.version.cuda else ()  # where a product of 16-bit matrices is added to an fp32 one by the library


@contextlib.contextmanager
def chunked_finely() -> Iterator[None]:
    """Within it chunks are as small as they may be, so that a check of a few tokens sums several."""
    before = dict(_ELEMENTS)
    _ELEMENTS.update(dict.fromkeys(_ELEMENTS, 1))
    try:
        yield
    finally:
        _ELEMENTS.update(before)


def tokens_per_chunk(device: str, n: int, v: int) -> int:
    """Tokens of a chunk, for equal chunks."""
    step = _STEPS.get(device, 128)
    most = max(step, _ELEMENTS.get(device, 1 << 29) // v // step * step)
    return max(1, n) if n <= most else -(-n // -(-n // most) // step) * step


class _Gradients(NamedTuple):
    """Which gradients to make, and of what: per token, or None for ones."""

    hidden: bool
    weight: bool
    upstream_n: Tensor | None = None


def _walk(
    h: Tensor, w: Tensor, labels: Tensor, weights: Tensor | None, terms: Terms, group: Any, known: Tensor | None, want: _Gradients, *, kernels: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """`(losses, plain cross entropies, states, dh, dw)` chunk by chunk; the gradients lack `scale`, dw is fp32 where several chunks are summed.

    dh is summed over the group while the product for dw and the next chunk run.
    """
    n, v = h.shape[0], w.shape[0]
    h, w = _multipliable(h), _multipliable(w)
    labels = labels.contiguous()
    weights, upstream = (None if x is None else x.contiguous() for x in (weights, want.upstream_n))
    wide = torch.promote_types(h.dtype, torch.float32)
    chunk = tokens_per_chunk(h.device.type, n, v)
    width = -(-v // 16) * 16 if kernels else v
    narrow = h.new_empty(min(chunk, n), width)  # logits, then their gradient
    broad = narrow if kernels or wide == h.dtype else torch.empty(narrow.shape, dtype=wide, device=h.device)
    losses, ces, states = (h.new_empty(shape, dtype=wide) for shape in ((n,), (n,), (n, 4)))
    shard = _shard(group, v)
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device) if want.hidden else None
    dw: Tensor | None = w.new_zeros(w.shape) if want.weight and not n else None
    sums = []
    for at in range(0, n, chunk):
        c = slice(at, at + chunk)
        h_c = h[c]
        x = narrow[: h_c.shape[0], :v]
        _product(h_c, w.t(), out=x)
        rows = (
            labels[c],
            None if weights is None else weights[c],
            None if upstream is None else upstream[c],
            None if known is None else known[None, c],
            terms,
            shard,
            (losses[c], ces[c], states[c]) if known is None else None,
        )
        g = x if want.hidden or want.weight else None
        if kernels:
            if width > v:
                narrow[:, v:].fill_(-torch.inf)
            cross_entropy.fused_rows(x, g, *rows, width=width)
        else:
            p = x if broad is narrow else broad[: h_c.shape[0]].copy_(x)
            cross_entropy.lean_rows(p, g, *rows)
        # The kernel silences tokens without a label; else it is done where rows are short: in h and dh rather than in the gradient of the logits.
        mask = None if kernels or g is None else (labels[c] != terms.ignore)[:, None]
        if dh is not None:
            _product(x, w, out=dh[c])
            if mask is not None:
                dh[c].mul_(mask)
            if group is not None:
                sums.append(distributed.all_reduce(dh[c], group=group, async_op=True))
        if want.weight:
            dw = _added(dw, x, h_c if mask is None else h_c * mask, wide, alone=chunk >= n)
    for handle in sums:
        handle.wait()
    return losses, ces, states, dh, dw


def _multipliable(x: Tensor) -> Tensor:
    """A copy where a product would make one for every chunk."""
    strides = x.stride()
    return x if 1 in strides and 0 not in strides else x.contiguous()


def _product(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    """a b; undefined where launches are only recorded, since a head's takes seconds on a CPU."""
    if launch.recording():
        return options.get("out", a.new_empty(a.shape[0], b.shape[1]))
    return torch.mm(a, b, **options)


def _added(dw: Tensor | None, g: Tensor, h: Tensor, wide: torch.dtype, *, alone: bool) -> Tensor:
    """dw + g^T h, summed in fp32 whatever the products are in; None: the first, which needs no zeros."""
    if alone:
        return _product(g.t(), h)
    narrow: dict[str, Any] = {"out_dtype": wide} if wide != h.dtype and h.device.type in _WIDE_PRODUCTS else {}
    if dw is None:
        dw = torch.empty(g.shape[1], h.shape[1], dtype=wide, device=h.device)
        if wide == h.dtype or narrow:
            return torch.mm(g.t(), h, out=dw, **narrow)
        return dw.copy_(torch.mm(g.t(), h))
    if wide == h.dtype or narrow:
        return torch.addmm(dw, g.t(), h, out=dw, **narrow)
    return dw.add_(torch.mm(g.t(), h))


def _shard(group: Any, v: int) -> Shard:
    if group is None:
        return Shard(0, v, None)
    ranks = distributed.get_world_size(group)

    def gather(states_n4: Tensor) -> Tensor:
        every = states_n4.new_empty(ranks * states_n4.shape[0], 4)
        distributed.all_gather_into_tensor(every, states_n4, group=group)
        return every.view(ranks, -1, 4)

    return Shard(distributed.get_rank(group) * v, ranks * v, gather)


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype, *, kernels: bool) -> Tensor:
    """x times a scalar on the device, in fp32, then rounded once. x stays, since another backward may want it."""
    return _scale(x, factor, dtype) if kernels else x.to(factor.dtype).mul(factor).to(dtype)


class _Reduced(torch.autograd.Function):
    """Loss and plain cross entropy, and in the same pass the gradients for a unit gradient of the loss."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, w: Tensor, labels: Tensor, weights: Tensor | None, terms: Terms, mean: bool, group: Any, grad: bool, kernels: bool
    ) -> Any:  # fmt: skip
        want = _Gradients(grad and ctx.needs_input_grad[0], grad and ctx.needs_input_grad[1])
        losses, ces, _, dh, dw = _walk(h, w, labels, weights, terms, group, None, want, kernels=kernels)
        factor = cross_entropy.denominator(labels, weights, terms.ignore, losses.dtype) if mean else None
        ctx.save_for_backward(dh, dw, factor)
        ctx.scale, ctx.dtypes, ctx.kernels = terms.scale, (h.dtype, w.dtype), kernels
        loss, ce = (x.sum() if factor is None else x.sum() * factor for x in (losses, ces))
        ctx.mark_non_differentiable(ce)
        ctx.set_materialize_grads(False)
        return loss, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
        if grad is None:
            return (None,) * 9
        *made, factor = ctx.saved_tensors
        unit: Tensor = grad * ctx.scale if factor is None else grad * factor * ctx.scale
        grads = (None if x is None else _scaled(x, unit, dtype, kernels=ctx.kernels) for x, dtype in zip(made, ctx.dtypes, strict=True))
        return *grads, *(None,) * 7


class _PerToken(torch.autograd.Function):
    """Losses and plain cross entropies of each token; the backward makes the logits again."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, labels: Tensor, weights: Tensor | None, terms: Terms, group: Any, kernels: bool) -> Any:
        losses, ces, states, *_ = _walk(h, w, labels, weights, terms, group, None, _Gradients(False, False), kernels=kernels)
        ctx.save_for_backward(h, w, labels, weights, states)
        ctx.terms, ctx.group, ctx.kernels = terms, group, kernels
        ctx.mark_non_differentiable(ces)
        ctx.set_materialize_grads(False)
        return losses, ces

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: Tensor | None, _: Any) -> Any:
        if grad_n is None:
            return (None,) * 7
        h, w, labels, weights, states = ctx.saved_tensors
        want = _Gradients(ctx.needs_input_grad[0], ctx.needs_input_grad[1], grad_n * ctx.terms.scale)
        *_, dh, dw = _walk(h, w, labels, weights, ctx.terms, ctx.group, states, want, kernels=ctx.kernels)
        return dh, None if dw is None else dw.to(w.dtype), *(None,) * 5


def _called(
    h: Tensor, w: Tensor, labels: Tensor, weights: Tensor | None, terms: Terms, reduction: str, group: Any, *, kernels: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if h.dtype != w.dtype:
        raise KernelError(f"linear_cross_entropy: hidden and weight must share a dtype, not {h.dtype} and {w.dtype}; cast one of them")
    if reduction == "none":
        return _PerToken.apply(h, w, labels, weights, terms, group, kernels)  # type: ignore[return-value]
    return _Reduced.apply(h, w, labels, weights, terms, reduction == "mean", group, torch.is_grad_enabled(), kernels)  # type: ignore[return-value]


def chunked(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    ignore: int = IGNORE,
    label_smoothing: float = 0.0,
    weights_n: Tensor | None = None,
    reduction: str = "sum",
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """As `reference`, with the logits of one chunk in memory instead of all; the weight's gradient is summed in fp32 over the chunks.

    Gradients are made in the forward pass, so a backward costs one multiplication ("none": in the backward, from logits made again); there is no second
    derivative.
    """
    cross_entropy.checked(reduction, weights_n)
    terms = Terms(softcap, scale, z_loss, label_smoothing, ignore)
    return _called(hidden_nh, weight_vh, labels_n, weights_n, terms, reduction, group, kernels=False)


# Fused. Floor: three products, 6 n H V FLOP (8 where per-token losses make the logits again): of 8192 x 4096 x 128,256 32.7 ms at 790 TFLOP/s. Over it, at
# 4.3 TB/s: the kernel over the logits 4 B each, 0.98 ms (6 B if the second read misses L2, 1.47); with two chunks of 4,096 the fp32 sum of dw, 1.05 GB
# more for the first and 4.2 GB for the second, 1.2 ms at most, as the product hides some of it; the backward's rounding 3.15 GB, 0.73 ms. 35.6 to 36.1 ms,
# 1.10 times the floor. Memory beside inputs: dw in fp32 2.10 GB, one chunk of logits 1.05 GB, dh 67 MB. (As one chunk 1.06 times, with dw in bf16 1.05 GB
# and logits 2.10 GB: the same peak, but it would grow with the tokens.) All logits in fp32 with their gradient: 8.4 GB.
SPACE: dict[str, list[dict[str, int]]] = {
    "linear_cross_entropy.scaled": [{"block": block, "warps": warps} for block in (1024, 2048, 4096, 8192) for warps in (4, 8)]
}


@triton.jit
def _scaling(X, FACTOR, OUT, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < count, other=0.0, eviction_policy="evict_first").to(tl.float32) * tl.load(FACTOR)
    tl.store(OUT + at, x.to(OUT.dtype.element_ty), mask=at < count)


def _run_scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    tuned = launch.configuration(x, "linear_cross_entropy.scaled", x.numel())
    launch.launch(_scaling, (-(-x.numel() // tuned["block"]),), x, factor, out, x.numel(), BLOCK=tuned["block"], warps=tuned["warps"])
    return out


def _run_reduced(
    h: Tensor, w: Tensor, labels: Tensor, weights: Tensor | None, softcap: float | None, scale: float, z_loss: float, smoothing: float,
    ignore: int, mean: bool, grad_h: bool, grad_w: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    terms = Terms(softcap, scale, z_loss, smoothing, ignore)
    losses, ces, _, dh, dw = _walk(h, w, labels, weights, terms, None, None, _Gradients(grad_h, grad_w), kernels=True)
    loss, ce = losses.sum(), ces.sum()
    factor = cross_entropy.denominator(labels, weights, ignore, losses.dtype) if mean else loss.new_ones(())
    dh, dw = (x.new_empty(0) if y is None else y for x, y in ((h, dh), (w, dw)))
    return (loss * factor, ce * factor, dh, dw, factor) if mean else (loss, ce, dh, dw, factor)


def _like_reduced(h: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    grad_h, grad_w = rest[-2:]
    n, v = h.shape[0], w.shape[0]
    several = 0 < tokens_per_chunk(h.device.type, n, v) < n
    scalars = (h.new_empty((), dtype=torch.float32) for _ in range(3))
    return (
        next(scalars),
        next(scalars),
        h.new_empty(h.shape if grad_h else 0),
        h.new_empty(w.shape, dtype=torch.float32 if several else w.dtype) if grad_w else w.new_empty(0),
        next(scalars),
    )


def _run_tokens(h: Tensor, w: Tensor, labels: Tensor, weights: Tensor | None, *terms: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _walk(h, w, labels, weights, Terms(*terms), None, None, _Gradients(False, False), kernels=True)[:3]


def _like_tokens(h: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(h.new_empty(shape, dtype=torch.float32) for shape in ((h.shape[0],), (h.shape[0],), (h.shape[0], 4)))


def _run_tokens_backward(
    grad: Tensor, h: Tensor, w: Tensor, labels: Tensor, weights: Tensor | None, states: Tensor, softcap: float | None, scale: float,
    z_loss: float, smoothing: float, ignore: int, grad_h: bool, grad_w: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    terms = Terms(softcap, scale, z_loss, smoothing, ignore)
    *_, dh, dw = _walk(h, w, labels, weights, terms, None, states, _Gradients(grad_h, grad_w, grad * scale), kernels=True)
    return h.new_empty(0) if dh is None else dh, w.new_empty(0) if dw is None else dw.to(w.dtype)


def _like_tokens_backward(grad: Tensor, h: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    grad_h, grad_w = rest[-2:]
    return h.new_empty(h.shape if grad_h else 0), w.new_empty(w.shape if grad_w else 0)


_scale = launch.operator(
    "linear_cross_entropy_scaled(Tensor x, Tensor factor, ScalarType dtype) -> Tensor",
    _run_scaled,
    lambda x, factor, dtype: x.new_empty(x.shape, dtype=dtype),
)
_reduced = launch.operator(
    f"linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor? weights, {TERMS}, bool mean, bool grad_hidden, bool grad_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_reduced,
    _like_reduced,
)
_tokens = launch.operator(
    f"linear_cross_entropy_tokens(Tensor hidden, Tensor weight, Tensor labels, Tensor? weights, {TERMS}) -> (Tensor, Tensor, Tensor)",
    _run_tokens,
    _like_tokens,
)
_tokens_backward = launch.operator(
    "linear_cross_entropy_tokens_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor labels, Tensor? weights, Tensor states, "
    f"{TERMS}, bool grad_hidden, bool grad_weight) -> (Tensor, Tensor)",
    _run_tokens_backward,
    _like_tokens_backward,
)


def _save_reduced(ctx: Any, inputs: Any, output: Any) -> None:
    h, w = inputs[:2]
    _, ce, dh, dw, factor = output
    ctx.save_for_backward(dh, dw, factor)
    ctx.scale, (ctx.mean, *ctx.made), ctx.dtypes = inputs[5], inputs[9:], (h.dtype, w.dtype)
    ctx.mark_non_differentiable(ce, dh, dw, factor)
    ctx.set_materialize_grads(False)


def _reduced_grads(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
    if grad is None:
        return (None,) * 12
    *made, factor = ctx.saved_tensors
    grad = grad * factor * ctx.scale if ctx.mean else grad * ctx.scale
    grads = (_scale(x, grad, dtype) if wanted else None for x, dtype, wanted in zip(made, ctx.dtypes, ctx.made, strict=True))
    return *grads, *(None,) * 10


def _save_tokens(ctx: Any, inputs: Any, output: Any) -> None:
    h, w, labels, weights, *ctx.terms = inputs
    _, ces, states = output
    ctx.save_for_backward(h, w, labels, weights, states)
    ctx.mark_non_differentiable(ces, states)
    ctx.set_materialize_grads(False)


def _tokens_grads(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
    if grad is None:
        return (None,) * 9
    h, w, labels, weights, states = ctx.saved_tensors
    want = ctx.needs_input_grad[:2]
    grads = _tokens_backward(grad, h, w, labels, weights, states, *ctx.terms, *want)
    return *(x if wanted else None for x, wanted in zip(grads, want, strict=True)), *(None,) * 7


_reduced_call = launch.differentiable(_reduced, _save_reduced, _reduced_grads)
_tokens_call = launch.differentiable(_tokens, _save_tokens, _tokens_grads)


def supports(hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, weights_n: Tensor | None = None) -> str | None:
    """Why the fused kernels cannot take these tensors; None: they can."""
    if why := launch.missing(hidden_nh):
        return why
    if hidden_nh.dtype not in launch.FLOATS or weight_vh.dtype != hidden_nh.dtype:
        return f"hidden and weight must share one of bf16, fp16, fp32, not {hidden_nh.dtype} and {weight_vh.dtype}"
    if labels_n.dtype not in (torch.int64, torch.int32) or (weights_n is not None and weights_n.dtype != torch.float32):
        return f"labels must be integers and weights_n fp32, not {labels_n.dtype} and {None if weights_n is None else weights_n.dtype}"
    fit = hidden_nh.ndim == weight_vh.ndim == 2 and hidden_nh.shape[1] == weight_vh.shape[1] and weight_vh.shape[0] > 0
    fit = fit and labels_n.shape == hidden_nh.shape[:1] and (weights_n is None or weights_n.shape == labels_n.shape)
    shapes = f"hidden {tuple(hidden_nh.shape)}, weight {tuple(weight_vh.shape)}, labels {tuple(labels_n.shape)} and weights"
    return None if fit else f"{shapes} do not fit"


def fused(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    ignore: int = IGNORE,
    label_smoothing: float = 0.0,
    weights_n: Tensor | None = None,
    reduction: str = "sum",
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """As `chunked`, with one Triton launch over each chunk's logits, in place. Raises KernelError where `supports` says no.

    Over a group: two launches a chunk and one collective of 16 bytes per token between them; it is no operator then, so torch.compile breaks its graph.
    """
    cross_entropy.checked(reduction, weights_n)
    if why := supports(hidden_nh, weight_vh, labels_n, weights_n):
        raise KernelError(f'linear_cross_entropy: {why}; set kernels.linear_cross_entropy = "chunked"')
    terms = Terms(softcap, scale, z_loss, label_smoothing, ignore)
    if group is not None:
        return _called(hidden_nh, weight_vh, labels_n, weights_n, terms, reduction, group, kernels=True)
    if reduction == "none":
        return _tokens_call(hidden_nh, weight_vh, labels_n, weights_n, *terms)[:2]
    grad = torch.is_grad_enabled()
    grads = grad and hidden_nh.requires_grad, grad and weight_vh.requires_grad
    return _reduced_call(hidden_nh, weight_vh, labels_n, weights_n, *terms, reduction == "mean", *grads)[:2]


def linear_cross_entropy(hidden_nh: Tensor, weight_vh: Tensor, labels_n: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`fused` on a GPU, `chunked` on a CPU; options as theirs."""
    return (fused if hidden_nh.is_cuda else chunked)(hidden_nh, weight_vh, labels_n, **options)


def logprobs(
    hidden_nh: Tensor,
    weight_vh: Tensor,
    labels_n: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore: int = IGNORE,
    group: Any = None,
    version: Any = linear_cross_entropy,
) -> Tensor:
    """Log-probabilities of the labels with their gradient, fp32, 0 where there is no label: what preference and policy losses are made of."""
    options: dict[str, Any] = {"softcap": softcap, "scale": scale, "ignore": ignore}
    if group is not None:  # a version of tensor parallelism's (parallel/tensor.py) knows its own
        options["group"] = group
    return -version(hidden_nh, weight_vh, labels_n, reduction="none", **options)[0]


def _drawn(n: int, h: int, v: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    std = min(0.5, 2.0 / h**0.5)  # of the weight: logits of about 2
    return [cross_entropy.normal(count, h, std=s, dtype=dtype, device=device) for count, s in ((n, 1.0), (v, std))]


def _sample(case: Any, device: str) -> launch.Sample:
    n, h, v, softcap, scale, z_loss, smoothing, reduction, dtype = case
    labels = cross_entropy.drawn(n, v, device)
    weights = torch.rand(n, device=device) + 0.5 if smoothing else None

    def call(f: Any, x: Tensor, w: Tensor) -> Any:
        return f(
            x, w, labels, softcap=softcap, scale=scale, z_loss=z_loss, label_smoothing=smoothing, weights_n=weights, reduction=reduction
        )  # fmt: skip

    return _drawn(n, h, v, dtype, device), call


def _sample_logprobs(case: Any, device: str) -> launch.Sample:
    n, h, v, softcap, scale, dtype = case
    labels = cross_entropy.drawn(n, v, device)

    def call(f: Any, x: Tensor, w: Tensor) -> Tensor:
        return f(x, w, labels, softcap=softcap, scale=scale)

    return _drawn(n, h, v, dtype, device), call


def _traffic(case: Any, products: float) -> launch.Traffic:
    n, h, v, *_, dtype = case
    inputs, product = (n * h + v * h) * dtype.itemsize, 2.0 * n * h * v
    return launch.Traffic(inputs, inputs, product, products * product)


OPERATIONS = {
    "linear_cross_entropy": launch.Operation(
        {"reference": reference, "chunked": chunked, "fused": fused}, CASES, SIZES, _sample, functools.partial(_traffic, products=2)
    ),
    "logprobs": launch.Operation(
        {name: functools.partial(logprobs, version=f) for name, f in (("reference", reference), ("chunked", chunked), ("fused", fused))},
        [(*case[:5], case[-1]) for case in CASES if case[5] == 0.0 and case[0] != 64],
        [(*case[:5], case[-1]) for case in SIZES[:1]],
        _sample_logprobs,
        functools.partial(_traffic, products=3),
    ),
}
