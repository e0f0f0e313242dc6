"""Tensor parallelism: ranks share each matrix, and between the matrices they share the tokens (arXiv:1909.08053, arXiv:2205.05198).

    block:      x_btd = gather(x_bsd)      y_bsd = scatter(block's part of y_btd) + bias      part = its heads, or its channels of the feed-forward layer
    embedding:  x_bsd = scatter(rows of this rank's share of the vocabulary, 0 for other tokens)
    loss:       of gather(h_bsd), by logits that stay cut along the vocabulary: kernels/linear_cross_entropy.py's `group`

Legend: b batch, t tokens, s = t / R tokens for R ranks, d channels, n = b t. A rank holds tokens r n / R to (r + 1) n / R of the b t tokens of a microbatch,
counted in row-major order, in the shape [b, s, d]: whatever works token by token does not see the difference, no gather or scatter copies what it moves,
and the elements are a range of the whole, so that a dropout mask is the whole one's part.

`gather` is an all-gather whose backward is a reduce-scatter, `scatter` is the reverse. So a layer has two of each forward and two of each backward, R - 1
parts of R of 2 n d bytes in bf16 each, as much as two all-reduces of a layer without shared tokens. What is cut (projections, embedding, head) has its whole
gradient on its rank; what is not (norms, scalars, biases of the residual stream) meets this rank's tokens or heads alone, and its gradient is partial.

Latent attention gathers between its latents and its heads (models/latent.py): the products to the latents are whole everywhere, of a rank's own tokens, and
2,112 channels of DeepSeek-V3 travel instead of 7,168. Where queries have no latent, the hidden state travels as in any block, and the products are repeated.
Experts, shared ones too, are whole on every rank, for its own tokens.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gigatrain.architectures import Architecture
from gigatrain.errors import RunError
from gigatrain.kernels.ops import Ops
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import Places, cut_parameter

Cut = Literal["column", "row", "vocab"]


@dataclass(frozen=True)
class Along:
    """The ranks along `tensor`, as torch's traceable collectives name them."""

    name: str
    count: int
    index: int

    def gather(self, x_ms: Tensor) -> Tensor:
        """All ranks' rows, one rank after the other: [m, ...] -> [R m, ...]. Not differentiable."""
        gathered = torch.ops._c10d_functional.all_gather_into_tensor(x_ms.contiguous(), self.count, self.name)
        return torch.ops._c10d_functional.wait_tensor(gathered)

    def scatter(self, x_ms: Tensor) -> Tensor:
        """This rank's rows of the sum over the ranks: [R m, ...] -> [m, ...]. Not differentiable."""
        scattered = torch.ops._c10d_functional.reduce_scatter_tensor(x_ms.contiguous(), "sum", self.count, self.name)
        return torch.ops._c10d_functional.wait_tensor(scattered)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks. Not differentiable."""
        return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", self.name))


def along(mesh: Mesh) -> Along | None:
    """The mesh's ranks along `tensor`; None where there is one."""
    group = mesh.group("tensor")
    return None if group is None else Along(group.group_name, mesh.size("tensor"), mesh.index("tensor"))


def _whole(x_bsd: Tensor, ranks: Along) -> Tensor:
    b, s, d = x_bsd.shape
    return ranks.gather(x_bsd.reshape(b * s, d)).view(b, s * ranks.count, d)


def _share(x_btd: Tensor, ranks: Along) -> Tensor:
    b, t, d = x_btd.shape
    return ranks.scatter(x_btd.reshape(b * t, d)).view(b, t // ranks.count, d)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_bsd: Tensor, ranks: Along) -> Tensor:
        ctx.ranks = ranks
        return _whole(x_bsd, ranks)

    @staticmethod
    def backward(ctx: Any, grad_btd: Tensor) -> Any:
        return _share(grad_btd, ctx.ranks), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_btd: Tensor, ranks: Along) -> Tensor:
        ctx.ranks = ranks
        return _share(x_btd, ranks)

    @staticmethod
    def backward(ctx: Any, grad_bsd: Tensor) -> Any:
        return _whole(grad_bsd, ctx.ranks), None


class _Shown(torch.autograd.Function):
    """Every rank's rows, for a function whose gradient every rank computes whole: each takes its own rows of it."""

    @staticmethod
    def forward(ctx: Any, h_md: Tensor, ranks: Along) -> Tensor:
        ctx.first, ctx.rows = ranks.index * h_md.shape[0], h_md.shape[0]
        return ranks.gather(h_md)

    @staticmethod
    def backward(ctx: Any, grad_nd: Tensor) -> Any:
        return grad_nd[ctx.first : ctx.first + ctx.rows], None


class _Together(torch.autograd.Function):
    """The sum over the ranks, for a function whose gradient every rank computes whole."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, ranks: Along) -> Tensor:
        return ranks.sum(sums)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _SpreadNorm(torch.autograd.Function):
    """RMS norm over channels that are spread over the ranks, `kernels/rms_norm.py`'s formulas with the two means over all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float, style: str, ranks: Along) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        n = x.to(wide)
        rstd = torch.rsqrt(ranks.sum(n.square().sum(-1, keepdim=True)) / (x.shape[-1] * ranks.count) + eps)
        ctx.save_for_backward(x, w, rstd)
        ctx.style, ctx.ranks = style, ranks
        return (n * rstd * _gain(w, style, wide)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w, rstd = ctx.saved_tensors
        n, dy = x.to(rstd.dtype) * rstd, dy.to(rstd.dtype)
        g = dy * _gain(w, ctx.style, rstd.dtype)
        mean = ctx.ranks.sum((g * n).sum(-1, keepdim=True)) / (x.shape[-1] * ctx.ranks.count)
        return (rstd * (g - n * mean)).to(x.dtype), (dy * n).flatten(0, -2).sum(0).to(w.dtype), None, None, None


def _gain(w: Tensor, style: str, wide: torch.dtype) -> Tensor:
    return 1.0 + w.to(wide) if style == "gemma" else w.to(wide)


class Row(nn.Linear):
    """A linear layer of this rank's inputs: the outputs are summed over the ranks and cut into their tokens, and only then biased."""

    ranks: Along
    product: Callable[..., Tensor]

    def forward(self, x_btc: Tensor) -> Tensor:
        y_bsd = _Scatter.apply(self.product(x_btc, self.weight), self.ranks)
        return y_bsd if self.bias is None else y_bsd + self.bias  # type: ignore[return-value]


class Shared(nn.Linear):
    """A whole linear layer of which this rank computes a range of the outputs: the key head that several ranks' query heads share."""

    first: int
    count: int
    product: Callable[..., Tensor]

    def forward(self, x_btd: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.narrow(0, self.first, self.count)
        return self.product(x_btd, self.weight.narrow(0, self.first, self.count), bias)


def cut(model: nn.Module, layout: Mapping[str, Cut], arch: Architecture, mesh: Mesh, places: Places) -> None:
    """Leave this rank's share of each module that `layout` names, connect the blocks, and write into `places` what became of every parameter.

    layout: models/decoder.py's LAYOUT, by the ends of module names. Names stay, and a tied head stays tied. A block (the parent of a row-cut module) takes
    this rank's tokens and gives back this rank's; any other module, an MoE block for one, works on its tokens as they come, with whole weights.
    """
    ranks = along(mesh)
    if ranks is None:
        return
    uncut, blocks = set(places), {}
    shares: dict[nn.Parameter, nn.Parameter] = {}  # by what they were cut from, for a tied head
    for name, module in list(model.named_modules()):
        how = next((how for end, how in layout.items() if f".{name}".endswith(f".{end}")), None)
        if how is None:
            continue
        above, _, leaf = name.rpartition(".")
        parent, linear = model.get_submodule(above), cast(nn.Linear, module)  # or an embedding, whose weight is its only parameter too
        heads = {
            "q_b_proj": arch.heads,
            "kv_b_proj": arch.heads,
            "q_proj": arch.heads,
            "k_proj": arch.kv_heads,
            "v_proj": arch.kv_heads,
        }.get(leaf, ranks.count)
        if leaf in ("k_proj", "v_proj") and heads < ranks.count:
            assert ranks.count % heads == 0, "refused by the plan"
            each = linear.weight.shape[0] // heads
            setattr(
                parent, leaf, _changed(linear, Shared, product=linear.product, first=ranks.index * heads // ranks.count * each, count=each)
            )
            continue
        assert heads % ranks.count == 0, "refused by the plan"
        if how == "row":
            blocks[above] = parent
            linear = _changed(linear, Row, product=linear.product, ranks=ranks)
            setattr(parent, leaf, linear)
        dim = 1 if how == "row" else 0
        for kind, parameter in list(linear.named_parameters(recurse=False)):
            if parameter.dim() > dim:  # not the bias behind a row-cut product
                if parameter in shares:
                    setattr(linear, kind, shares[parameter])
                else:
                    shares[parameter] = _cut(linear, kind, f"{name}.{kind}", dim, ranks, places)
                uncut.discard(f"{name}.{kind}")
    for name, block in blocks.items():
        if getattr(block, "kv_a_proj_with_mqa", None) is not None and arch.q_rank is not None:
            block.gathered = _gathered(ranks)  # between its latents, of this rank's tokens, and its heads: narrower than the hidden state
        else:
            block.register_forward_pre_hook(_entering(ranks))
        if arch.sinks and hasattr(block, "sinks"):
            _cut(block, "sinks", f"{name}.sinks", 0, ranks, places)
            uncut.discard(f"{name}.sinks")
        if arch.qk_norm == "full" and hasattr(block, "q_norm"):
            for norm in ("q_norm", "k_norm"):
                _cut(getattr(block, norm), "weight", f"{name}.{norm}.weight", 0, ranks, places)
                uncut.discard(f"{name}.{norm}.weight")
            block.ops = replace(block.ops, rms_norm=_spread_norm(ranks))  # which is all that attention uses it for
    for name in uncut:
        places[name] = replace(places[name], partial=(*places[name].partial, "tensor"))


def _cut(module: nn.Module, kind: str, name: str, dim: int, ranks: Along, places: Places) -> nn.Parameter:
    length = getattr(module, kind).shape[dim]
    assert length % ranks.count == 0, "refused by the plan"
    size = length // ranks.count
    cut_parameter(module, kind, dim, ranks.index * size, size)
    places[name] = places[name].cut(dim, ranks.index * size, size)
    return getattr(module, kind)


def _changed(linear: nn.Linear, kind: type[nn.Linear], **attributes: Any) -> nn.Linear:
    """A linear layer of another class with the same parameters."""
    made = kind(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    made.weight, made.bias = linear.weight, linear.bias
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def _entering(ranks: Along) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """Before a block: all tokens. Blocks of the decoder take `models/recompute.py`'s Remade or None last, and there every token is gathered once more."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x_bsd, *others, again = inputs
        x_btd = _Gather.apply(x_bsd, ranks)
        if again is not None:
            again.drop([x_btd], lambda: [_whole(x_bsd, ranks)])
        return (x_btd, *others, again)

    return hook


def _gathered(ranks: Along) -> Callable[[Tensor], Tensor]:
    def gathered(x_bsl: Tensor) -> Tensor:
        return _Gather.apply(x_bsl, ranks)  # type: ignore[return-value]

    return gathered


def _spread_norm(ranks: Along) -> Callable[..., Tensor]:
    def rms_norm(x_btc: Tensor, w_c: Tensor, eps: float, style: str) -> Tensor:
        return _SpreadNorm.apply(x_btc, w_c, eps, style, ranks)  # type: ignore[return-value]

    return rms_norm


def ops(chosen: Ops, mesh: Mesh) -> Ops:
    """The operations for shared tokens and a cut vocabulary; `chosen` itself where there is one rank.

    embedding takes all tokens and gives this rank's; linear_cross_entropy takes this rank's hidden states and all labels, and gives the whole loss on every
    rank; dropout_add's mask is the part of the whole one that is this rank's; `together` sums over the ranks.
    """
    ranks = along(mesh)
    if ranks is None:
        return chosen
    group, count, index = mesh.group("tensor"), ranks.count, ranks.index

    def embedding(ids_bt: Tensor, weight_vh: Tensor) -> Tensor:
        assert ids_bt.shape[1] % count == 0, "refused by the plan"
        rows = weight_vh.shape[0]
        # A token of another rank takes some row, not always the first one: its gradient of zeros is added there, and all of them to one row would wait.
        x_btd = chosen.embedding(ids_bt % rows, weight_vh)
        return _Scatter.apply(x_btd.masked_fill((ids_bt // rows != index)[..., None], 0), ranks)  # type: ignore[return-value]

    def linear_cross_entropy(hidden_mh: Tensor, weight_vh: Tensor, labels_n: Tensor, **terms: Any) -> tuple[Tensor, Tensor]:
        return chosen.linear_cross_entropy(_Shown.apply(hidden_mh, ranks), weight_vh, labels_n, group=group, **terms)

    def dropout_add(x_bsd: Tensor, residual_bsd: Tensor, p: float, seed_1: Tensor, offset: int = 0) -> Tensor:
        return chosen.dropout_add(x_bsd, residual_bsd, p, seed_1, offset + index * x_bsd.numel())

    def together(sums: Tensor) -> Tensor:
        return _Together.apply(chosen.together(sums), ranks)  # type: ignore[return-value]

    return replace(chosen, embedding=embedding, linear_cross_entropy=linear_cross_entropy, dropout_add=dropout_add, together=together)


def pipeline_products(mesh: Mesh) -> None:
    """Let torch's compiler cut gathers and scatters along `tensor` into parts behind which it hides the products next to them (`engine.async_tensor`).

    To be called before the layers are compiled. torch fuses what it can (a product that is alone with its gather or scatter), through symmetric memory, which
    needs GPUs of one node with NVLink. Raises RunError where torch has it not.
    """
    ranks = along(mesh)
    if ranks is None:
        return
    from torch._inductor import config as inductor
    from torch.distributed import _symmetric_memory as symmetric

    if mesh.device.type != "cuda" or not hasattr(inductor, "_micro_pipeline_tp") or not hasattr(symmetric, "enable_symm_mem_for_group"):
        raise RunError(
            f"engine.async_tensor needs CUDA and torch's micro-pipelined tensor parallelism, which torch {torch.__version__} lacks on {mesh.device.type}; "
            "set engine.async_tensor = false"
        )
    inductor._micro_pipeline_tp = True
    with warnings.catch_warnings():  # torch 2.13 calls it needless, but its compiler still asks whether it was called
        warnings.simplefilter("ignore", FutureWarning)
        symmetric.enable_symm_mem_for_group(ranks.name)  # type: ignore[arg-type]
