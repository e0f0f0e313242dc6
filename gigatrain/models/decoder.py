"""One decoder for every llama-like family, dense or with experts: what it computes follows from the numbers of `Architecture` alone.

Legend of shapes: b batch, t tokens, d hidden channels, h query heads, k key heads, r rotary channel pairs, v vocabulary. Parameter names are those of
transformers' Llama; where a family calls them otherwise on disk, models/hf.py translates.
"""

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gigatrain.architectures import Architecture, Rope
from gigatrain.kernels import distillation, linear_cross_entropy
from gigatrain.kernels.attention import Mask
from gigatrain.kernels.linear import Linear, several
from gigatrain.kernels.ops import REFERENCE, Ops, checked
from gigatrain.models.latent import LatentAttention, Norm, Turn
from gigatrain.models.moe import CORRECTION, Balance, Gate, MoE, balance
from gigatrain.models.recompute import Remade, keep_products

Recompute = Literal["none", "lean", "selective", "full"]
Drop = tuple[float, Tensor]  # probability, and the int64 seed of one mask on the device
Kind = Literal["embed", "head", "matrix", "expert", "router", "norm", "bias", "scalar", "sink", "state"]

# How tensor parallelism cuts each module: column = outputs, row = inputs, vocab = rows of the vocabulary. What is not listed is whole everywhere.
LAYOUT: dict[str, Literal["column", "row", "vocab"]] = {
    "model.embed_tokens": "vocab",
    "self_attn.q_proj": "column",
    "self_attn.k_proj": "column",
    "self_attn.v_proj": "column",
    "self_attn.q_b_proj": "column",
    "self_attn.kv_b_proj": "column",
    "self_attn.o_proj": "row",
    "mlp.gate_proj": "column",
    "mlp.up_proj": "column",
    "mlp.down_proj": "row",
    "lm_head": "vocab",
}


def kind_of(name: str) -> Kind:
    """What a parameter is, by its name: the optimizer groups by it. `matrix` are the layers' matrices (Muon's share), `expert` holds one per expert.

    `state` is no parameter: a buffer that a step moves by rules of its own, the routers' correction biases.
    """
    if name.startswith("model.embed_tokens"):
        return "embed"
    if name.startswith("lm_head"):
        return "head"
    if "norm." in name:
        return "norm"
    if ".mlp.experts." in name:
        return "expert"
    if name.endswith(".mlp.gate.weight"):
        return "router"
    if name.endswith(CORRECTION):
        return "state"
    if name.endswith(".sinks"):
        return "sink"
    if name.endswith(".bias"):
        return "bias"
    if name.endswith(".lora_growth"):
        return "scalar"
    return "scalar" if "act_fn" in name else "matrix"


def decays(name: str, embeddings: bool = False) -> bool:
    """Whether weight decay applies: to matrices, also of experts and routers, and if `embeddings` to embedding and head; never to norms, biases and scalars."""
    if name.endswith("_bias"):  # of experts
        return False
    return kind_of(name) in ("matrix", "expert", "router") or (embeddings and kind_of(name) in ("embed", "head"))


def frequencies(rope: Rope, head_dim: int, long: bool = False) -> tuple[Tensor, float]:
    """`(f_r, factor)`: angular frequency of each channel pair, fp32 on the CPU, and what multiplies cos and sin.

    Computed in fp32 in the order of operations of the released checkpoints' code: an ulp here is 1e-7 of an angle that grows with the position.
    Formulas: see `Rope`. `long` selects longrope's factors for samples above `original_positions`.
    """
    d = int(head_dim * rope.partial)
    period_r = rope.theta ** (torch.arange(0, d, 2, dtype=torch.int64, device="cpu").to(torch.float32) / d)
    f_r = 1.0 / period_r
    stretch, original = rope.factor or 1.0, rope.original_positions or 1
    match rope.kind:
        case "linear":
            return f_r / stretch, 1.0
        case "llama3":
            low, high = cast(float, rope.low_freq_factor), cast(float, rope.high_freq_factor)
            wave_r = 2 * math.pi / f_r
            smooth_r = (original / wave_r - low) / (high - low)
            between_r = (1 - smooth_r) * f_r / stretch + smooth_r * f_r
            slow_r = torch.where(wave_r > original / low, f_r / stretch, between_r)
            return torch.where(wave_r < original / high, f_r, slow_r), 1.0
        case "yarn":

            def channel(rotations: float) -> float:
                return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

            first, last = channel(rope.beta_fast or 32.0), channel(rope.beta_slow or 1.0)
            if rope.truncate is not False:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, d - 1)
            last += 0.001 if first == last else 0
            keep_r = 1 - ((torch.arange(d // 2, dtype=torch.float32, device="cpu") - first) / (last - first)).clamp(0, 1)
            return 1.0 / (stretch * period_r) * (1 - keep_r) + f_r * keep_r, _yarn_factor(rope, stretch)
        case "longrope":
            factors = cast(Sequence[float], rope.long_factor if long else rope.short_factor)
            default = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
            return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * period_r), rope.attention_factor or default
    return f_r, 1.0


def _yarn_factor(rope: Rope, stretch: float) -> float:
    def grown(by: float) -> float:
        return 0.1 * by * math.log(stretch) + 1.0 if stretch > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    return grown(rope.mscale) / grown(rope.mscale_all_dim) if rope.mscale and rope.mscale_all_dim else grown(1.0)


class Tables:
    """cos and sin of one microbatch for one `Rope`; frequencies are computed on first use and kept per device.

    Not a buffer: `to(bfloat16)` would round frequencies, and `to_empty` would lose them.
    """

    def __init__(self, rope: Rope, arch: Architecture) -> None:
        self.rope, self.head_dim, self.fp32 = rope, arch.rotary_dim, arch.rope_fp32
        self.factor = frequencies(rope, arch.rotary_dim)[1]
        self.cache: dict[torch.device, tuple[Tensor, ...]] = {}

    def __call__(self, positions_bt: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(cos_btr, sin_btr, grow_bt)`; `grow_bt` multiplies the queries, None: nothing does."""
        device, rope = positions_bt.device, self.rope
        if device not in self.cache:
            variants = (False, True) if rope.kind == "longrope" else (False,)
            self.cache[device] = tuple(frequencies(rope, self.head_dim, long)[0].to(device) for long in variants)
        f_r, *longer = self.cache[device]
        if longer:  # on the device, so that host and device need not meet
            f_r = torch.where(positions_bt.max() + 1 > cast(int, rope.original_positions), longer[0], f_r)
        angle_btr = positions_bt[..., None].float() * f_r
        factor = self.factor
        cos, sin = angle_btr.cos(), angle_btr.sin()
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        if not (self.fp32 and dtype.itemsize < 4):
            cos, sin = cos.to(dtype), sin.to(dtype)
        grow = None
        if rope.query_beta is not None:
            grow = (1 + rope.query_beta * torch.log(1 + torch.floor(positions_bt / cast(int, rope.original_positions)))).to(dtype)
        return cos, sin, grow


@functools.lru_cache(maxsize=64)
def _rounded(value: float, dtype: torch.dtype) -> float:
    """`value` as the dtype holds it: released models multiply by a rounded constant (Gemma's root of 3072 is 55.5 in bf16)."""
    return torch.tensor(value, dtype=torch.float32, device="cpu").to(dtype).item()


class Attention(nn.Module):
    """Self-attention of one layer."""

    def __init__(self, arch: Architecture, ops: Ops) -> None:
        super().__init__()
        self.arch, self.ops = arch, ops
        q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        self.q_proj = Linear(arch.hidden, q, bias=arch.qkv_bias, product=ops.linear)
        self.k_proj = Linear(arch.hidden, kv, bias=arch.qkv_bias, product=ops.linear)
        self.v_proj = Linear(arch.hidden, kv, bias=arch.qkv_bias, product=ops.linear)
        self.o_proj = Linear(q, arch.hidden, bias=arch.output_bias, product=ops.linear)
        if arch.qk_norm != "none":
            full = arch.qk_norm == "full"
            self.q_norm = Norm(q if full else arch.head_dim)
            self.k_norm = Norm(kv if full else arch.head_dim)
        if arch.sinks:
            self.sinks = nn.Parameter(torch.empty(arch.heads))

    def forward(self, x_btd: Tensor, turn: Turn | None, seen: Mask, again: Remade | None = None) -> Tensor:
        arch, ops = self.arch, self.ops
        q, k, v = several(x_btd, self.q_proj, self.k_proj, self.v_proj)
        turned = self._turned(q, k, turn)
        if again is not None and arch.qk_norm != "none":  # the norm keeps its inputs, and attention would keep what became of them
            again.drop(turned, lambda: self._turned(q, k, turn))
        rest = {"sinks_h": self.sinks} if arch.sinks else {}
        out = ops.attention(*turned, v.unflatten(-1, (-1, arch.head_dim)), seen, scale=arch.scale, softcap=arch.attention_softcap, **rest)
        return self.o_proj(out.flatten(-2))

    def _turned(self, q: Tensor, k: Tensor, turn: Turn | None) -> tuple[Tensor, Tensor]:
        """Queries and keys [b, t, h, d] as attention takes them: normed, rotated and scaled."""
        arch, ops = self.arch, self.ops
        if arch.qk_norm == "full":
            q = ops.rms_norm(q, self.q_norm.weight, arch.norm_eps, arch.norm)
            k = ops.rms_norm(k, self.k_norm.weight, arch.norm_eps, arch.norm)
        q, k = (x.unflatten(-1, (-1, arch.head_dim)) for x in (q, k))
        cos, sin, grow = turn or (None, None, None)
        if arch.qk_norm == "head":
            q, k = ops.qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, cos, sin, arch.norm_eps, arch.norm, arch.rope_interleaved)
        elif turn is not None:
            q, k = ops.rope(q, k, cos, sin, arch.rope_interleaved)
        return q if grow is None else q * grow[:, :, None, None], k


class XIELU(nn.Module):
    """The two trained scalars of xIELU."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.empty(1))
        self.alpha_n = nn.Parameter(torch.empty(1))


class MLP(nn.Module):
    """The feed-forward block of one layer, or that of a layer's shared experts, of `width` channels (default: the architecture's)."""

    def __init__(self, arch: Architecture, ops: Ops, width: int | None = None) -> None:
        super().__init__()
        self.activation, width = getattr(ops, arch.activation), width or arch.intermediate
        if arch.gated:
            self.gate_proj = Linear(arch.hidden, width, bias=arch.mlp_bias, product=ops.linear)
        if arch.activation == "xielu":
            self.act_fn = XIELU()
        self.up_proj = Linear(arch.hidden, width, bias=arch.mlp_bias, product=ops.linear)
        self.down_proj = Linear(width, arch.hidden, bias=arch.mlp_bias, product=ops.linear)

    def forward(self, x_btd: Tensor, again: Remade | None = None) -> Tensor:
        gated = hasattr(self, "gate_proj")
        *gate, up = several(x_btd, *((self.gate_proj,) if gated else ()), self.up_proj)
        if gated:
            inputs = (*gate, up)
        elif hasattr(self, "act_fn"):
            inputs = (up, self.act_fn.alpha_p, self.act_fn.alpha_n)
        else:
            inputs = (up,)
        activated = self.activation(*inputs)
        if again is not None:
            again.drop([activated], lambda: [self.activation(*inputs)])
        return self.down_proj(activated)


class Layer(nn.Module):
    """Attention and feed-forward, each added to the residual stream.

    The sum that ends a block is left to the norm that begins the next one, also across layers: `forward` takes and returns `(delta, residual)`, whose
    scaled sum is the stream. So every sum that has a norm behind it is one `add_rms_norm`. A layer of experts that is `watched` also returns what its router
    saw (`Balance`): as an output, so that recomputation and sharding treat it as they do the others.
    """

    def __init__(self, arch: Architecture, ops: Ops, *, sparse: bool = False, watched: bool = False) -> None:
        super().__init__()
        self.arch, self.ops, self.watched = arch, ops, sparse and watched
        self.self_attn = Attention(arch, ops) if arch.kv_rank is None else LatentAttention(arch, ops)
        shared = MLP(arch, ops, arch.shared_width) if sparse and arch.shared_experts else None
        self.mlp = MoE(arch, ops, shared, watched=watched) if sparse else MLP(arch, ops)
        if arch.placement != "post":
            self.input_layernorm = Norm(arch.hidden)
            self.post_attention_layernorm = Norm(arch.hidden)
        if arch.placement != "pre":
            self.attention_output_norm = Norm(arch.hidden)
            self.mlp_output_norm = Norm(arch.hidden)

    def forward(
        self,
        delta_btd: Tensor | None,
        residual_btd: Tensor,
        turn: Turn | None,
        seen: Mask,
        drops: tuple[Drop | None, Drop | None] = (None, None),
        again: Remade | None = None,
    ) -> tuple[Any, ...]:
        """`drops` are the dropouts of the two sums; with `again`, norm outputs and the activation are dropped and made again in the backward."""
        arch, ops, pre, post = self.arch, self.ops, self.arch.placement != "post", self.arch.placement != "pre"
        stream, x = begin(arch, ops, delta_btd, residual_btd, self.input_layernorm if pre else None, drops[0], again)
        x = self.self_attn(x, turn, seen, again)
        if post:
            x = ops.rms_norm(x, self.attention_output_norm.weight, arch.norm_eps, arch.norm)
        stream, x = begin(arch, ops, x, stream, self.post_attention_layernorm if pre else None, drops[1], again)
        x, *balance = self.mlp(x, again) if self.watched else (self.mlp(x, again),)
        if post:
            x = ops.rms_norm(x, self.mlp_output_norm.weight, arch.norm_eps, arch.norm)
        return x, stream, *balance


def added(arch: Architecture, ops: Ops, delta_btd: Tensor, residual_btd: Tensor, drop: Drop | None) -> Tensor:
    """The stream after a block: residual + scale * dropout(delta)."""
    if drop is None:
        return torch.add(residual_btd, delta_btd, alpha=arch.residual_scale)
    return ops.dropout_add(delta_btd if arch.residual_scale == 1.0 else delta_btd * arch.residual_scale, residual_btd, *drop)


def begin(
    arch: Architecture,
    ops: Ops,
    delta_btd: Tensor | None,
    residual_btd: Tensor,
    norm: Norm | None,
    drop: Drop | None = None,
    again: Remade | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds what the last block left, and norms the sum: `(stream, normed stream)`; without a norm the stream twice."""
    if norm is not None and delta_btd is not None and drop is None:
        stream, x = ops.add_rms_norm(delta_btd, residual_btd, norm.weight, arch.norm_eps, arch.norm, arch.residual_scale)
    else:
        stream = residual_btd if delta_btd is None else added(arch, ops, delta_btd, residual_btd, drop)
        x = stream if norm is None else ops.rms_norm(stream, norm.weight, arch.norm_eps, arch.norm)
    if again is not None and norm is not None:
        again.drop([x], lambda: [ops.rms_norm(stream, norm.weight, arch.norm_eps, arch.norm)])
    return stream, x


@dataclass(frozen=True)
class Part:
    """Which layers of the decoder a module holds; `first` has the embedding, `last` the final norm and the head."""

    layers: range
    first: bool = True
    last: bool = True


def initial(
    name: str, shape: Sequence[int], arch: Architecture, std: float, scale_residual: bool, seed: int, device: torch.device | str
) -> Tensor:
    """A whole parameter's first value in fp32: matrices from N(0, std), each expert's by its own seed, norms the identity, biases 0, xIELU as in its paper.

    `scale_residual` divides the std of the matrices that write to the residual stream by sqrt(2 * layers) (GPT-2). The numbers depend on `seed`, the name
    and the device type only: not on rank, order or the other tensors.
    """
    found = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    match kind_of(name):
        case "norm":
            return found.fill_(0.0 if arch.norm == "gemma" else 1.0)
        case "bias" | "sink" | "state":
            return found.zero_()
        case "expert" if name.endswith("_bias"):
            return found.zero_()
        case "scalar":  # softplus of it is 0.8, and 0.8 - beta for the negative side
            return found.fill_(math.log(math.expm1(0.8 if name.endswith("alpha_p") else 0.3)))
    writes = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
    spread = std / math.sqrt(2 * arch.layers) if scale_residual and writes else std
    expert = kind_of(name) == "expert"
    for part, key in [(one, f"{seed}/{name}/{e}") for e, one in enumerate(found)] if expert else [(found, f"{seed}/{name}")]:
        digest = hashlib.sha256(key.encode()).digest()
        part.normal_(0.0, spread, generator=torch.Generator(found.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1))
    return found


class Stack(nn.Module):
    """Embedding, layers and last norm, as far as `part` has them. Layers keep their number in the whole model, in names too."""

    def __init__(self, arch: Architecture, ops: Ops, part: Part, watched: bool) -> None:
        super().__init__()
        if part.first:
            # Unfilled: weights come later, and on meta torch's own start of an embedding, unlike a linear layer's, imports Dynamo in 2 s.
            self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(arch.vocab, arch.hidden), freeze=False)
        self.layers = nn.ModuleDict({str(i): Layer(arch, ops, sparse=arch.sparse_of(i), watched=watched) for i in part.layers})
        if part.last:
            self.norm = Norm(arch.hidden)


def noise(like_btd: Tensor, alpha: float, seed: Tensor) -> Tensor:
    """NEFTune's noise (arXiv:2310.05914): even in ±alpha / sqrt(t d), of t tokens of a row, padding and other documents included as in transformers.

    A function of `seed` (int64, 0-d, on the device) and the place alone: splitmix64's mixing of a counter, of which the upper 24 bits are taken.
    """
    at = torch.arange(like_btd.numel(), device=like_btd.device).view_as(like_btd)
    x = seed * -7046029254386353131 + at  # its odd step, as a signed number: neighbouring seeds are far apart
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):  # splitmix64's two odd factors, as signed numbers
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    even = ((x >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-23 - 1.0
    return (even * (alpha / math.sqrt(like_btd.shape[1] * like_btd.shape[2]))).to(like_btd.dtype)


class Decoder(nn.Module):
    """The whole model, or the part of it that one stage of a pipeline holds.

    Built on any device, `meta` included; weights are undefined until `init_weights` or models/hf.py fills them. Where embedding and head are tied and
    both here, they are one parameter, called model.embed_tokens.weight; a last part without the embedding has it as lm_head.weight.

    `watched`: routers also say what the losses of balance need, and how often each expert was visited is summed in `visits`.
    """

    adapter_seeds: Any = None  # models/adapters.py's `Seeds`, of a decoder that has adapters

    def __init__(
        self,
        arch: Architecture,
        ops: Ops = REFERENCE,
        *,
        recompute: Recompute = "none",
        dropout: float = 0.0,
        neftune: float = 0.0,
        part: Part | None = None,
        watched: bool = False,
    ) -> None:
        super().__init__()
        self.arch, self.ops, self.recompute, self.dropout, self.neftune = arch, ops, recompute, dropout, neftune
        self.part = part or Part(range(arch.layers))
        self.watched = watched and any(arch.sparse_of(i) for i in self.part.layers)
        self.model = Stack(arch, ops, self.part, self.watched)
        if self.part.last:
            self.lm_head = nn.Linear(arch.hidden, arch.vocab, bias=False)
        self._tie()
        self.tables = {rope: Tables(rope, arch) for i in range(arch.layers) if (rope := arch.rope_of(i)) is not None}

    def _tie(self) -> None:
        if self.arch.tied and self.part.first and self.part.last:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`to`, `to_empty` and the like make new parameters one module at a time, which would untie the head."""
        super()._apply(fn, recurse)
        self._tie()
        return self

    def corrections(self) -> dict[str, Tensor]:
        """The routers' correction biases by name: what a checkpoint keeps beside the parameters."""
        return {name: buffer for name, buffer in self.named_buffers() if kind_of(name) == "state"}

    def place(self, device: torch.device) -> None:
        """Give the buffers storage on `device`, zeros, wherever the parameters are."""
        for gate in self.modules():
            if isinstance(gate, Gate):
                gate.place(device)

    def visits(self) -> dict[str, Tensor]:
        """How often each expert was visited in training since it was last zeroed, int64, under the name of the layer's correction bias; if `watched`."""
        return {
            f"{name}.{CORRECTION}": gate.visits for name, gate in self.named_modules() if isinstance(gate, Gate) and gate.visits is not None
        }

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, in order; each may be compiled in place."""
        return list(self.model.layers.values())

    @torch.no_grad()
    def init_weights(self, std: float, scale_residual: bool, seed: int) -> None:
        """Draws every weight in place, as `initial` says."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial(name, parameter.shape, self.arch, std, scale_residual, seed, parameter.device))
        for correction in self.corrections().values():
            correction.zero_()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """`hidden`."""
        return self.hidden(*inputs, **named)

    def hidden(
        self,
        tokens_bt: Tensor,
        positions_bt: Tensor | None = None,
        documents_bt: Tensor | None = None,
        seed: Tensor | None = None,
        carried: tuple[Tensor | None, Tensor] | None = None,
        watch: list[Balance] | None = None,
    ) -> Any:
        """hidden_btd after the last norm; without the last layer, `(delta_btd, stream_btd)`, which the next part is given as `carried`.

        `positions_bt` counts within each document ([1, t] is broadcast; None: 0, 1, ...); `documents_bt` int, each token's document in its row (None:
        each row is one document); `seed` int64 on the device, of this call's dropout masks and noise; `watch` receives what each router saw.
        """
        if self.adapter_seeds is not None and self.training:
            self.adapter_seeds.take(seed)
        delta, stream = (None, self.embedded(tokens_bt)) if carried is None else carried
        if self.training and self.neftune and carried is None:
            assert seed is not None
            stream = stream + noise(stream, self.neftune, seed)
        arch, tokens, dtype, device = self.arch, tokens_bt.shape[1], stream.dtype, stream.device
        if positions_bt is None:
            positions_bt = torch.arange(tokens, device=device)[None]
        turns = {rope: table(positions_bt, dtype) for rope, table in self.tables.items()}
        windows = {arch.window_of(i) for i in self.part.layers}
        seen = {w: self.ops.mask(documents_bt, w, tokens, dtype, device) for w in windows}
        drops: list[Drop | None] = [None] * (2 * arch.layers + 1)
        if self.training and self.dropout:
            assert seed is not None
            seeds = seed * (1 << 16) + torch.arange(len(drops), device=device)  # one mask per sum: 2 a layer, 1 at the end
            drops = [(self.dropout, one) for one in seeds.unbind()]
        for i, layer in zip(self.part.layers, self.layers, strict=True):
            rope = arch.rope_of(i)
            turn = None if rope is None else turns[rope]
            delta, stream, *balance = self._layer(layer, delta, stream, turn, seen[arch.window_of(i)], (drops[2 * i], drops[2 * i + 1]))
            for one in balance:
                if self.training:  # here, where a layer that is computed again is not counted again
                    cast(MoE, layer.mlp).gate.count(one)
                if watch is not None:
                    watch.append(one)
        if not self.part.last:
            return delta, stream
        return begin(arch, self.ops, delta, stream, self.model.norm, drops[-1])[1]

    def embedded(self, tokens_bt: Tensor) -> Tensor:
        """The residual stream before the first layer."""
        x_btd = self.ops.embedding(tokens_bt, self.model.embed_tokens.weight)
        factor = self.arch.embedding_factor
        return x_btd if factor == 1.0 else x_btd * _rounded(factor, x_btd.dtype)

    def _layer(
        self, layer: nn.Module, delta: Tensor | None, stream: Tensor, turn: Any, seen: Mask, drops: tuple[Drop | None, Drop | None]
    ) -> tuple[Any, ...]:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return layer(delta, stream, turn, seen, drops)
        if self.recompute == "lean":
            with Remade() as again:
                return layer(delta, stream, turn, seen, drops, again)
        if self.recompute == "selective":
            return checkpoint(
                layer, delta, stream, turn, seen, drops, use_reentrant=False, preserve_rng_state=False, context_fn=keep_products
            )  # type: ignore[return-value]
        # One tensor per layer is kept, so the sum is made outside.
        if delta is not None:
            stream = added(self.arch, self.ops, delta, stream, drops[0])
        return checkpoint(layer, None, stream, turn, seen, drops, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]

    def logits(self, tokens_bt: Tensor, positions_bt: Tensor | None = None, documents_bt: Tensor | None = None) -> Tensor:
        """logits_btv in the weights' dtype, scaled and soft-capped."""
        logits_btv = self.lm_head(self(tokens_bt, positions_bt, documents_bt))
        if self.arch.logit_divisor != 1.0:
            logits_btv = logits_btv / self.arch.logit_divisor
        cap = self.arch.logit_softcap
        return logits_btv if cap is None else cap * torch.tanh(logits_btv / cap)

    def loss(
        self,
        tokens_bt: Tensor,
        labels_bt: Tensor,
        positions_bt: Tensor | None = None,
        documents_bt: Tensor | None = None,
        *,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        router_aux: float = 0.0,
        router_z: float = 0.0,
        seed: Tensor | None = None,
        carried: tuple[Tensor | None, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`(loss_sum, ce_sum)` over the labels that are not -100, which are already shifted; see kernels/linear_cross_entropy.py.

        The losses of the routers (`router_aux`, `router_z`; only if `watched`) are means over the tokens of this call and count once per label, so that
        the sum over a step's calls, divided by its labels, is their mean.
        """
        seen: list[Balance] = []
        hidden_btd = self.hidden(tokens_bt, positions_bt, documents_bt, seed, carried, seen)
        loss, cross_entropy = self.loss_of(hidden_btd, labels_bt, z_loss=z_loss, label_smoothing=label_smoothing)
        if router_aux or router_z:
            assert self.watched
            loss = loss + (labels_bt >= 0).sum() * balance(self.ops, self.arch, seen, router_aux, router_z)
        return loss, cross_entropy

    def logprobs(
        self,
        tokens_bt: Tensor,
        labels_bt: Tensor,
        positions_bt: Tensor | None = None,
        documents_bt: Tensor | None = None,
        *,
        seed: Tensor | None = None,
        carried: tuple[Tensor | None, Tensor] | None = None,
    ) -> Tensor:
        """Log-probabilities [b, t] of the labels, which are already shifted, in fp32 with their gradient; 0 where a label is -100."""
        hidden_btd = self.hidden(tokens_bt, positions_bt, documents_bt, seed, carried)
        found_n = linear_cross_entropy.logprobs(
            hidden_btd.flatten(0, 1),
            self.lm_head.weight,
            labels_bt.flatten(),
            softcap=self.arch.logit_softcap,
            scale=1.0 / self.arch.logit_divisor,
            version=self.ops.linear_cross_entropy,
        )
        return found_n.view(labels_bt.shape)

    def distilled(
        self,
        tokens_bt: Tensor,
        labels_bt: Tensor,
        positions_bt: Tensor | None,
        documents_bt: Tensor | None,
        teacher: tuple[Tensor, Tensor],
        *,
        weight: float,
        temperature: float,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(loss, ce, kl)` sums over the labels that are not -100, against a teacher's ids [b, t, k] and logprobs [b, t, k + 1]: kernels/distillation.py."""
        hidden_btd = self.hidden(tokens_bt, positions_bt, documents_bt, seed)
        ids, logprobs = (one.flatten(0, 1) for one in teacher)
        return distillation.chunked(
            hidden_btd.flatten(0, 1),
            self.lm_head.weight,
            labels_bt.flatten(),
            ids.long(),
            logprobs,
            weight=weight,
            temperature=temperature,
            softcap=self.arch.logit_softcap,
            scale=1.0 / self.arch.logit_divisor,
        )

    @torch.no_grad()
    def top(
        self, tokens_bt: Tensor, positions_bt: Tensor | None, documents_bt: Tensor | None, k: int, *, temperature: float, vocab: int | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As a teacher: ids [b, t, k] int32 of the likeliest tokens below `vocab`, and log-probabilities [b, t, k + 1], the last of all others together."""
        hidden_btd = self.hidden(tokens_bt, positions_bt, documents_bt)
        found = distillation.top(
            hidden_btd.flatten(0, 1),
            self.lm_head.weight,
            k,
            temperature=temperature,
            softcap=self.arch.logit_softcap,
            scale=1.0 / self.arch.logit_divisor,
            vocab=vocab,
        )
        ids, logprobs = (one.unflatten(0, tuple(tokens_bt.shape)) for one in found)
        return ids, logprobs

    def loss_of(self, hidden_btd: Tensor, labels_bt: Tensor, *, z_loss: float = 0.0, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """The head and the loss, of hidden states after the last norm; as `loss`."""
        return self.ops.linear_cross_entropy(
            hidden_btd.flatten(0, 1),
            self.lm_head.weight,
            labels_bt.flatten(),
            softcap=self.arch.logit_softcap,
            scale=1.0 / self.arch.logit_divisor,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
        )


def verify(
    arch: Architecture,
    kernels: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    tokens: Sequence[int] = (33, 256),
    *,
    sequence: int | None = None,
    packed: bool = False,
    ranks: int = 1,
) -> dict[str, float]:
    """Run two layers of the architecture's real widths on `device` with every fused kernel judged against fp64: what a run does before it starts.

    Compiles the kernels too, and returns each operation's error as a multiple of what is allowed. Raises `KernelError`: see kernels/ops.py's `checked`.
    The vocabulary is cut to 16,384, the weights are random, and the loss goes by its smallest chunks, so that 256 tokens are several on any device. An
    odd number of tokens and a multiple of 16 compile to different code. With `sequence`, attention is judged on the run's own samples too: see
    `verify_attention`, for `packed` and `ranks`.
    """
    worst: dict[str, float] = {}
    if sequence is not None:
        verify_attention(arch, kernels, device, dtype, sequence, packed=packed, ranks=ranks, worst=worst)
    sparse = {"moe_layers": (True, False)} if arch.moe_layers else {}
    cut = sparse | {"layers": 2, "vocab": min(arch.vocab, 1 << 14), "window_layers": None, "rope_local": None, "window": None}
    if arch.experts:  # as many as 4 GiB of fp64 hold, and as the router's groups and choice need
        room = (1 << 32) // (24 * arch.hidden * arch.expert_width)
        fewest = max(16, 2 * arch.groups, arch.experts_per_token or 0)
        cut["experts"] = min(arch.experts, -(-max(fewest, room) // arch.groups) * arch.groups)
    small = arch.model_copy(update=cut | {"rope_layers": (True, False) if arch.rope_layers else None})
    # Versions that take less than any number of tokens are judged on the run's own alone.
    plain = {} if kernels.get("attention") in EVERY_LENGTH else {"attention": "reference"}
    with torch.device(device), linear_cross_entropy.chunked_finely():
        model = Decoder(small, checked({**kernels, **plain}, worst), dropout=0.1)
        model.init_weights(0.02, False, 0)
        model.to(dtype)
        generator = torch.Generator(device).manual_seed(0)
        for count in tokens:
            tokens_bt = torch.randint(0, small.vocab, (1, count), generator=generator)
            for training in (True, False):
                model.train(training).loss(tokens_bt, tokens_bt.roll(-1, 1), seed=torch.zeros((), dtype=torch.int64))
    return worst


EVERY_LENGTH = ("reference", "sdpa", "blocked", "fused")  # of attention: whatever the number of tokens, on any device that they run on
SCORES = 1 << 26  # of attention that is checked: 0.5 GiB in fp64, of which plain torch holds six or so


def verify_attention(
    arch: Architecture,
    kernels: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    sequence: int,
    *,
    packed: bool,
    ranks: int = 1,
    worst: dict[str, float] | None = None,
    scores: int = SCORES,
) -> dict[str, float]:
    """Judge the chosen attention against plain torch in fp64 on the run's own samples, values and gradients, and with every window of its layers.

    Head size, heads of one of the `ranks` that share them, soft-cap, sinks and dtype are the run's; `packed` gives documents of uneven lengths. Samples are
    halved until `scores` scores hold them, windows with them. Adds to `worst` and returns it; raises `KernelError`: see kernels/ops.py's `checked`.
    """
    worst = {} if worst is None else worst
    name = kernels.get("attention", "reference")
    if name == "reference":
        return worst
    chosen = checked({"attention": name}, worst)
    heads, keys = max(1, arch.heads // ranks), max(1, arch.kv_heads // ranks)
    count, halved = sequence, 1
    while heads * count * count > scores and count % 2 == 0 and count > 128:
        count, halved = count // 2, halved * 2
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype).requires_grad_()

    widths = (arch.head_dim, arch.head_dim, getattr(arch, "value_dim", None) or arch.head_dim)
    q, k, v = (drawn(1, count, number, width) for number, width in zip((heads, keys, keys), widths, strict=True))
    options: dict[str, Any] = {"scale": arch.scale, "softcap": arch.attention_softcap}
    if getattr(arch, "sinks", False):
        options["sinks_h"] = drawn(heads)
    documents = None
    if packed:  # a third, a token, and the rest
        documents = (torch.arange(count, device=device) >= count // 3).int() + (torch.arange(count, device=device) > count // 3).int()
    for window in {arch.window_of(i) for i in range(arch.layers)}:
        cut = None if window is None else max(1, window // halved)
        seen = chosen.mask(None if documents is None else documents[None], cut, count, dtype, device)
        chosen.attention(q, k, v, seen, **options)
    return worst
