"""Every number of a decoder, dense or with experts, without torch: sizes, switches, parameter and FLOP counts, and transformers' config.json both ways.

A family fixes the switches that its transformers class fixes (`FAMILIES`), so that whatever validates here can be written as a config.json that
`AutoModelForCausalLM` loads. The decoder reads the fields alone and never the family's name.
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gigatrain.errors import RecipeError
from gigatrain.published import NAMED

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]
RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
FamilyName = Literal[
    "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "olmo3",
    "smollm3", "helium", "apertus", "granite", "phi3", "arcee", "mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "mistral4", "gpt_oss",
]  # fmt: skip


class _Numbers(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# What each kind of frequency scaling must and may be given; anything else would be read by nobody and is refused.
_KINDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (frozenset({"factor", "original_positions", "low_freq_factor", "high_freq_factor"}), frozenset()),
    "yarn": (
        frozenset({"factor", "original_positions"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "query_beta"}),
    ),
    "longrope": (frozenset({"factor", "original_positions", "short_factor", "long_factor"}), frozenset({"attention_factor"})),
}


class Rope(_Numbers):
    """Rotary position embedding (arXiv:2104.09864) and the scaling of its frequencies.

    Kinds: `linear` divides all frequencies by `factor`; `llama3` the slow ones (arXiv:2407.21783); `yarn` ramps between the two (arXiv:2309.00071);
    `longrope` divides each by its own factor (arXiv:2402.13753).
    """

    theta: Positive = Field(default=10_000.0, description="Base of the wavelengths.")
    kind: RopeKind = Field(default="default", description="How frequencies are scaled for contexts longer than those first trained on.")
    partial: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="Share of each head's channels that is rotated (Phi)."
    )
    factor: Annotated[float, Field(ge=1.0)] | None = Field(default=None, description="By how much the context is stretched.")
    original_positions: Count | None = Field(default=None, description="Context length before stretching, in tokens.")
    low_freq_factor: Positive | None = Field(
        default=None, description="`llama3`: wavelengths above original_positions / this are stretched fully."
    )
    high_freq_factor: Positive | None = Field(default=None, description="`llama3`: wavelengths below original_positions / this are kept.")
    beta_fast: Positive | None = Field(default=None, description="`yarn`: rotations above which a channel is kept; default 32.")
    beta_slow: Positive | None = Field(default=None, description="`yarn`: rotations below which a channel is stretched fully; default 1.")
    attention_factor: Positive | None = Field(
        default=None, description="`yarn`, `longrope`: multiplies cos and sin; default: from `factor`."
    )
    mscale: Positive | None = Field(default=None, description="`yarn`: numerator of the default attention factor.")
    mscale_all_dim: Positive | None = Field(default=None, description="`yarn`: denominator of the default attention factor.")
    truncate: bool | None = Field(default=None, description="`yarn`: round the ramp's ends to whole channels; default yes.")
    short_factor: tuple[Positive, ...] | None = Field(
        default=None, description="`longrope`: per channel pair, up to original_positions tokens."
    )
    long_factor: tuple[Positive, ...] | None = Field(default=None, description="`longrope`: per channel pair, for longer samples.")
    query_beta: Positive | None = Field(
        default=None, description="Queries grow by 1 + this * log(1 + position // original_positions) (Llama 4, Ministral 3)."
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        required, optional = _KINDS[self.kind]
        given = {name for name in self.model_fields_set if getattr(self, name) is not None} - {"theta", "kind", "partial"}
        if missing := sorted(required - given):
            raise ValueError(f"kind {self.kind!r} needs {', '.join(missing)}; give them, or leave out `kind`")
        if extra := sorted(given - required - optional):
            readers = sorted(k for k, (r, o) in _KINDS.items() if set(extra) <= r | o)
            way_out = f"remove them, or choose kind {' or '.join(readers)}" if readers else "remove them"
            raise ValueError(f"kind {self.kind!r} does not read {', '.join(extra)}; {way_out}")
        if self.kind == "llama3" and (self.high_freq_factor or 0) <= (self.low_freq_factor or 0):
            raise ValueError(f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}; raise it")
        return self


@dataclass(frozen=True)
class _Family:
    """What a transformers model class fixes (`fixed`), what we take when nothing is said (`default`), and which further switches it has (`open`)."""

    fixed: dict[str, Any] = field(default_factory=dict)
    default: dict[str, Any] = field(default_factory=dict)
    open: frozenset[str] = frozenset()
    hf: dict[str, Any] = field(default_factory=dict)  # the class's own default of a config.json key that old files leave out


_LAYER_WINDOWS = frozenset({"window", "window_layers"})
_BIASES = frozenset({"qkv_bias", "output_bias"})  # one key, attention_bias, sets both
_EXPERTS = frozenset({"experts", "experts_per_token"})
_LATENT = frozenset({"q_rank", "kv_rank", "rope_head_dim", "value_head_dim", "rope_interleaved"})
_DEEPSEEK = (
    _EXPERTS
    | _BIASES
    | _LATENT
    | {"expert_intermediate", "renormalise", "moe_layers", "shared_experts", "groups", "groups_per_token", "routed_scale"}
)
_GEMMA = {"norm": "gemma", "placement": "sandwich", "activation": "geglu", "embedding_scale": "sqrt_hidden"}
_OLMO = {"norm": "olmo", "placement": "post", "qk_norm": "full", "rope_fp32": True}

FAMILIES: dict[str, _Family] = {
    "llama": _Family(open=_BIASES | {"mlp_bias"}, default={"norm_eps": 1e-5}, hf={"rms_norm_eps": 1e-6}),
    "mistral": _Family(open=frozenset({"window"}), default={"norm_eps": 1e-5}, hf={"rms_norm_eps": 1e-6, "sliding_window": 4096}),
    "ministral": _Family(open=_LAYER_WINDOWS, default={"norm_eps": 1e-5}, hf={"rms_norm_eps": 1e-6, "sliding_window": 4096}),
    "ministral3": _Family(open=frozenset({"window", "query_beta"}), default={"norm_eps": 1e-5}, hf={"head_dim": 128}),
    "qwen2": _Family(fixed={"qkv_bias": True}, open=_LAYER_WINDOWS, default={"norm_eps": 1e-6}),
    "qwen3": _Family(fixed={"qk_norm": "head"}, open=_LAYER_WINDOWS | _BIASES, default={"norm_eps": 1e-6}, hf={"head_dim": 128}),
    "gemma2": _Family(
        fixed=_GEMMA,
        open=_LAYER_WINDOWS | _BIASES | {"attention_scale", "attention_softcap", "logit_softcap"},
        default={"tied": True, "window_layers": (True, False)},
        hf={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256, "sliding_window": 4096, "head_dim": 256},
    ),
    "gemma3_text": _Family(
        fixed={**_GEMMA, "qk_norm": "head"},
        open=_LAYER_WINDOWS | _BIASES | {"attention_scale", "rope_local", "logit_softcap"},
        default={"tied": True, "window_layers": (True, True, True, True, True, False)},
        hf={
            "query_pre_attn_scalar": 256, "sliding_window": 4096, "head_dim": 256, "vocab_size": 262_208, "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
    ),
    "olmo2": _Family(fixed=_OLMO, open=_BIASES, default={"norm_eps": 1e-6}, hf={"rms_norm_eps": 1e-5}),
    "olmo3": _Family(
        fixed=_OLMO,
        open=_LAYER_WINDOWS | _BIASES | {"rope_local"},
        default={"norm_eps": 1e-6, "window_layers": (True, True, True, False)},
        hf={"rms_norm_eps": 1e-5, "sliding_window": 4096},
    ),
    "smollm3": _Family(
        open=_LAYER_WINDOWS | _BIASES | {"mlp_bias", "rope_layers"}, default={"tied": True, "rope_layers": (True, True, True, False)}
    ),
    "helium": _Family(fixed={"norm": "olmo", "rope_interleaved": True}, open=frozenset({"qkv_bias", "mlp_bias"}), default={"norm_eps": 1e-8}),
    "apertus": _Family(
        fixed={"qk_norm": "head", "activation": "xielu"}, open=_BIASES, default={"norm_eps": 1e-5}, hf={"rms_norm_eps": 1e-5}
    ),
    "granite": _Family(
        open=_BIASES | {"mlp_bias", "attention_scale", "embedding_scale", "residual_scale", "logit_divisor"}, default={"norm_eps": 1e-5}
    ),
    "phi3": _Family(open=frozenset({"window", "partial"}), default={"norm_eps": 1e-5}, hf={"rms_norm_eps": 1e-5}),
    "arcee": _Family(fixed={"activation": "relu2"}, open=_BIASES | {"mlp_bias"}, default={"norm_eps": 1e-5}, hf={"rms_norm_eps": 1e-5}),
    "mixtral": _Family(
        fixed={"renormalise": True},
        open=_EXPERTS | {"window"},
        default={"norm_eps": 1e-5},
        hf={"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": _Family(
        fixed={"qk_norm": "head"},
        open=_EXPERTS | _BIASES | {"window", "expert_intermediate", "renormalise", "moe_layers"},
        default={"norm_eps": 1e-6},
        hf={"sliding_window": 4096, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
    "olmoe": _Family(
        fixed={"qk_norm": "full"},
        open=_EXPERTS | _BIASES | {"renormalise"},
        default={"norm_eps": 1e-5},
        hf={"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
    ),
    "deepseek_v3": _Family(
        fixed={"scoring": "sigmoid", "correction_bias": True},
        open=_DEEPSEEK,
        default={"norm_eps": 1e-6, "renormalise": True, "shared_experts": 1, "rope_interleaved": True},
        hf={
            "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
            "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_group": 8, "topk_group": 4,
            "first_k_dense_replace": 3, "norm_topk_prob": True, "rope_interleave": True,
        },
    ),
    "mistral4": _Family(
        open=_DEEPSEEK | {"query_beta"},
        default={"norm_eps": 1e-6, "renormalise": True, "shared_experts": 1, "rope_interleaved": True},
        hf={
            "n_routed_experts": 128, "num_experts_per_tok": 4, "moe_intermediate_size": 2048, "n_shared_experts": 1, "routed_scaling_factor": 1.0,
            "kv_lora_rank": 256, "q_lora_rank": 1024, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 128, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 0, "norm_topk_prob": True, "rope_interleave": True,
        },
    ),
    "gpt_oss": _Family(
        fixed={
            "norm": "olmo", "activation": "clamped_swiglu", "sinks": True, "scoring": "chosen", "router_bias": True, "expert_bias": True,
        },
        open=_EXPERTS | _LAYER_WINDOWS | _BIASES,
        default={"norm_eps": 1e-5, "window_layers": (True, False), "qkv_bias": True, "output_bias": True},
        hf={
            "rms_norm_eps": 1e-5, "sliding_window": 128, "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4, "attention_bias": True,
        },
    ),
}  # fmt: skip

_LATENT_FAMILIES = frozenset(name for name, family in FAMILIES.items() if family.open >= _LATENT)

# The switches, and the value each has where a family neither fixes nor opens it.
_NEUTRAL: dict[str, Any] = {
    "norm": "llama", "placement": "pre", "qk_norm": "none", "activation": "swiglu", "qkv_bias": False, "output_bias": False, "mlp_bias": False,
    "window": None, "window_layers": None, "rope_layers": None, "rope_local": None, "rope_interleaved": False, "rope_fp32": False,
    "attention_scale": None, "attention_softcap": None, "logit_softcap": None, "embedding_scale": 1.0, "residual_scale": 1.0, "logit_divisor": 1.0,
    "experts": 0, "experts_per_token": None, "expert_intermediate": None, "renormalise": False, "moe_layers": None, "shared_experts": 0,
    "scoring": "softmax", "groups": 1, "groups_per_token": 1, "routed_scale": 1.0, "router_bias": False, "correction_bias": False, "expert_bias": False,
    "q_rank": None, "kv_rank": None, "rope_head_dim": None, "value_head_dim": None, "sinks": False,
}  # fmt: skip


def _switch(name: str, description: str) -> Any:
    """A field whose default is what the family fixes or prefers, else neutral."""

    def default(seen: dict[str, Any]) -> Any:
        family = FAMILIES.get(seen.get("family", ""), _Family())
        value = family.fixed.get(name, family.default.get(name, {"tied": False, "norm_eps": 1e-6, **_NEUTRAL}[name]))
        if name == "expert_intermediate" and name in family.open:
            return seen.get("intermediate")
        if name == "window_layers" and seen.get("window") is not None:
            value = value or (True,)
        elif name == "window_layers":
            return None
        return _spread(value, seen.get("layers", 0)) if name in ("window_layers", "rope_layers", "moe_layers") else value

    return Field(default_factory=default, description=description)


def _spread(pattern: tuple[bool, ...] | None, layers: int) -> tuple[bool, ...] | None:
    return pattern and tuple(pattern[i % len(pattern)] for i in range(layers))


class Architecture(_Numbers):
    """The numbers of one decoder; lengths in tokens, sizes in elements.

    Raises `pydantic.ValidationError` for a number out of range, numbers that do not fit each other, and a switch that the family's transformers
    class does not have.
    """

    family: FamilyName = Field(
        description="The transformers class whose config and weight names this is written as; fixes the switches it fixes."
    )
    vocab: Count = Field(description="Rows of the embedding and of the head.")
    hidden: Count = Field(description="Width of the residual stream.")
    layers: Count = Field(description="Blocks of attention and feed-forward.")
    heads: Count = Field(description="Query heads.")
    kv_heads: Count = Field(
        default_factory=lambda seen: seen.get("heads", 1), description="Key and value heads; divides `heads`. Default: `heads`."
    )
    head_dim: Count = Field(
        default_factory=lambda seen: max(1, seen.get("hidden", 1) // seen.get("heads", 1)),
        description="Channels of a head of queries and keys. Default: hidden / heads.",
    )
    kv_rank: Count | None = _switch(
        "kv_rank",
        "Keys and values of all heads are products of one latent of so many channels (multi-head latent attention, arXiv:2405.04434).",
    )
    q_rank: Count | None = _switch("q_rank", "Queries too are products of a latent, of so many channels; default: of the hidden state.")
    rope_head_dim: Count | None = _switch(
        "rope_head_dim",
        "Of head_dim, the channels that are rotated; those of the keys are one for all heads and come from the hidden state.",
    )
    value_head_dim: Count | None = _switch("value_head_dim", "Channels of a head of values, where they are not head_dim.")
    sinks: bool = _switch("sinks", "A trained logit per head that takes weight in the softmax and gives no value (gpt-oss).")
    intermediate: Count = Field(description="Width of the feed-forward layer.")
    experts: Annotated[int, Field(ge=0)] = _switch(
        "experts", "Feed-forward blocks of a layer, of which a router picks some for each token; 0: one, dense."
    )
    experts_per_token: Count | None = _switch("experts_per_token", "How many experts a token visits.")
    expert_intermediate: Count | None = _switch(
        "expert_intermediate", "Width of an expert, where it may differ from `intermediate`, its default."
    )
    renormalise: bool = _switch("renormalise", "The router's weights of a token's experts are divided by their sum.")
    shared_experts: Annotated[int, Field(ge=0)] = _switch(
        "shared_experts", "Experts that every token visits beside its own, as one block of so many times their width."
    )
    scoring: Literal["softmax", "sigmoid", "chosen"] = _switch(
        "scoring", "The router's scores: softmax over all experts, sigmoid of each, or softmax over a token's chosen ones."
    )
    groups: Count = _switch("groups", "Groups of neighbouring experts, of which a token may visit some: those with the best two scores.")
    groups_per_token: Count = _switch("groups_per_token", "How many groups a token may visit.")
    routed_scale: Positive = _switch("routed_scale", "Multiplies the router's weights.")
    router_bias: bool = _switch("router_bias", "Bias of the router's logits.")
    correction_bias: bool = _switch(
        "correction_bias", "A number per expert that is added to its score for the choice alone; not trained (arXiv:2408.15664)."
    )
    expert_bias: bool = _switch("expert_bias", "Biases of the experts' products.")
    moe_layers: tuple[bool, ...] | None = _switch("moe_layers", "Which layers have experts; a shorter pattern repeats. Default: all.")
    tied: bool = _switch("tied", "The head is the embedding's transpose.")
    norm_eps: Positive = _switch("norm_eps", "Added to the mean square in each RMS norm.")
    norm: Literal["llama", "gemma", "olmo"] = _switch(
        "norm", "Where bf16 rounds. llama: x * rstd is rounded, then times w; olmo: rounded after w; gemma: like olmo with 1 + w."
    )
    placement: Literal["pre", "post", "sandwich"] = _switch(
        "placement", "Norms before each block, after it (before the residual sum), or both."
    )
    qk_norm: Literal["none", "head", "full"] = _switch(
        "qk_norm", "RMS norm of queries and keys: per head, or over all heads at once (OLMo 2)."
    )
    activation: Literal["swiglu", "geglu", "xielu", "relu2", "clamped_swiglu"] = _switch(
        "activation",
        "silu(gate) * up, gelu_tanh(gate) * up, xIELU(up) (arXiv:2411.13010), relu(up) ** 2 (arXiv:2109.08668), or, of experts, "
        "gate * sigmoid(1.702 gate) * (up + 1) of gate and up clamped at 7 (gpt-oss).",
    )
    qkv_bias: bool = _switch("qkv_bias", "Bias of the query, key and value projections; with `kv_rank`, of those to the latents.")
    output_bias: bool = _switch("output_bias", "Bias of attention's output projection.")
    mlp_bias: bool = _switch("mlp_bias", "Bias of the feed-forward projections.")
    rope: Rope = Field(default=Rope(), description="Position embedding; with `rope_local`, that of the layers without a window.")
    rope_local: Rope | None = _switch("rope_local", "Position embedding of the layers with a window, where it differs.")
    rope_layers: tuple[bool, ...] | None = _switch(
        "rope_layers", "Which layers have position embeddings; a shorter pattern repeats. Default: all."
    )
    rope_interleaved: bool = _switch("rope_interleaved", "Rotates channels 2i and 2i + 1 (Helium) rather than i and i + head_dim / 2.")
    rope_fp32: bool = _switch("rope_fp32", "cos and sin stay fp32 and the rotation is rounded once (OLMo 2) rather than in every product.")
    window: Count | None = _switch("window", "Sliding attention: a token sees itself and window - 1 before it.")
    window_layers: tuple[bool, ...] | None = _switch(
        "window_layers", "Which layers have the window; a shorter pattern repeats. Default: all."
    )
    attention_scale: Positive | None = _switch("attention_scale", "Multiplies query . key. Default: head_dim ** -0.5.")
    attention_softcap: Positive | None = _switch("attention_softcap", "Scores s become c * tanh(s / c).")
    logit_softcap: Positive | None = _switch("logit_softcap", "Logits l become c * tanh(l / c).")
    embedding_scale: Positive | Literal["sqrt_hidden"] = _switch(
        "embedding_scale", "Multiplies the embeddings; Gemma: the root of `hidden`."
    )
    residual_scale: Positive = _switch("residual_scale", "Multiplies what each block adds to the residual stream (Granite).")
    logit_divisor: Positive = _switch("logit_divisor", "Divides the logits (Granite).")

    @field_validator("window_layers", "rope_layers", "moe_layers")
    @classmethod
    def _repeat(cls, pattern: tuple[bool, ...] | None, info: Any) -> tuple[bool, ...] | None:
        layers = info.data.get("layers", 0)
        if pattern is not None and not 1 <= len(pattern) <= max(layers, 1):
            raise ValueError(f"has {len(pattern)} entries for {layers} layers; give between 1 and {layers}")
        spread = _spread(pattern, layers)
        return None if info.field_name == "moe_layers" and all(spread or ()) else spread

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}; choose a kv_heads that divides it")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and rotary embedding turns pairs of channels; choose an even one")
        if self.family in ("llama", "gemma2", "gemma3_text") and self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}, as {self.family} requires; change one of them")
        if self.family in ("helium", "olmoe") and self.heads * self.head_dim != self.hidden:
            raise ValueError(
                f"heads * head_dim {self.heads * self.head_dim} is not hidden {self.hidden}, as {self.family} requires; leave out `head_dim`"
            )
        if self.window_layers is not None and (self.window is None or not any(self.window_layers)):
            raise ValueError("`window` and `window_layers` go together: give both with at least one layer true, or neither")
        if self.rope_local is not None and self.window is None:
            raise ValueError("`rope_local` is for the layers with a window, and there is none; give `window`, or leave `rope_local` out")
        if self.experts and not 1 <= (self.experts_per_token or 0) <= self.experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} of {self.experts} experts; give a number between 1 and {self.experts}"
            )
        if self.moe_layers is not None and not any(self.moe_layers):
            raise ValueError("`moe_layers` leaves no layer with experts; make at least one true, or choose a dense family")
        self._grouped()
        self._latent()
        if self.rope_layers is not None and not any(self.rope_layers):
            raise ValueError("`rope_layers` leaves no layer with positions; make at least one true")
        for rope in filter(None, (self.rope, self.rope_local)):
            rotary = int(self.rotary_dim * rope.partial)
            if rotary % 2 or not rotary:
                raise ValueError(
                    f"rope.partial {rope.partial} of head_dim {self.head_dim} rotates {rotary} channels; choose an even number of them"
                )
            for name in ("short_factor", "long_factor"):
                if (factors := getattr(rope, name)) is not None and len(factors) != rotary // 2:
                    raise ValueError(f"rope.{name} has {len(factors)} numbers, one for each of {rotary // 2} channel pairs is needed")
        self._expressible()
        return self

    def _grouped(self) -> None:
        """Refuses groups of experts that do not divide, or that leave a token too few experts."""
        if not self.experts or (self.groups, self.groups_per_token) == (1, 1):
            return
        if self.experts % self.groups or self.experts // self.groups < 2:
            raise ValueError(
                f"groups {self.groups} of {self.experts} experts: a group is scored by its best two; choose a divisor up to half of them"
            )
        reach = self.experts // self.groups * self.groups_per_token
        if not self.groups_per_token <= self.groups or reach < (self.experts_per_token or 0):
            raise ValueError(
                f"groups_per_token {self.groups_per_token} of {self.groups} groups reaches {reach} experts, and a token visits {self.experts_per_token}; "
                f"choose between {-(-(self.experts_per_token or 0) * self.groups // self.experts)} and {self.groups}"
            )

    def _latent(self) -> None:
        """Refuses numbers of latent attention that are not all there, or do not fit."""
        needed = {"kv_rank": self.kv_rank, "rope_head_dim": self.rope_head_dim, "value_head_dim": self.value_head_dim}
        if self.family in _LATENT_FAMILIES and None in needed.values():
            missing = ", ".join(name for name, value in needed.items() if value is None)
            raise ValueError(f"{missing} is missing: {self.family} always has latent attention; give it")
        if self.rope_head_dim is None:
            return
        if self.rope_head_dim % 2 or self.rope_head_dim >= self.head_dim:
            raise ValueError(f"rope_head_dim {self.rope_head_dim} of head_dim {self.head_dim}: choose an even number below it")
        if self.family == "mistral4" and int(self.head_dim * (self.rope_head_dim / self.head_dim)) != self.rope_head_dim:
            raise ValueError(
                f"rope_head_dim {self.rope_head_dim} of head_dim {self.head_dim}: mistral4 writes it as a share, which rounds; change either"
            )
        if self.kv_heads != self.heads:
            raise ValueError(f"kv_heads {self.kv_heads}: latent attention has keys and values for each of {self.heads} heads; leave it out")

    def _expressible(self) -> None:
        """Refuses a switch that the family's transformers class does not have: such weights could not be exported."""
        family = FAMILIES[self.family]
        if family.open >= _EXPERTS and not self.experts:
            raise ValueError(f"experts is missing: {self.family} always has them; give `experts` and `experts_per_token`")
        for name, neutral in _NEUTRAL.items():
            value, fixed = getattr(self, name), family.fixed.get(name, neutral)
            open_here = name in family.open or (name == "window_layers" and "window" in family.open and all(value or ()))
            if value != fixed and not open_here:
                others = sorted(f for f, t in FAMILIES.items() if t.fixed.get(name) == value or name in t.open)
                raise ValueError(
                    f"{name} {value!r}: {self.family} has {fixed!r}; drop it, or choose family {' or '.join(others) or 'none: no one has it'}"
                )
        if family.open >= _BIASES and self.qkv_bias != self.output_bias:
            raise ValueError(
                f"qkv_bias {self.qkv_bias} and output_bias {self.output_bias}: {self.family} has both or neither; set them alike"
            )
        for rope in filter(None, (self.rope, self.rope_local)):
            if rope.partial != 1.0 and "partial" not in family.open:
                raise ValueError(f"rope.partial {rope.partial}: {self.family} rotates whole heads; drop it, or choose family phi3")
            if rope.query_beta is not None and "query_beta" not in family.open:
                raise ValueError(f"rope.query_beta {rope.query_beta}: {self.family} has none; drop it, or choose family ministral3")
        if self.family in _LATENT_FAMILIES:
            if not self.shared_experts:
                raise ValueError(f"shared_experts 0: {self.family} always has some; give 1 or more")
            if self.moe_layers is not None and sorted(self.moe_layers) != list(self.moe_layers):
                raise ValueError(
                    f"`moe_layers` of {self.family} can only leave out the first layers; make all behind the first true one true"
                )
        if self.family == "phi3" and self.rope.kind not in ("default", "longrope"):
            raise ValueError(f"rope.kind {self.rope.kind!r}: phi3 has default and longrope only; choose one of them")
        if self.family in ("ministral3", "mistral4") and self.rope.query_beta is None:
            raise ValueError(
                f"rope.query_beta is missing: {self.family} always scales queries; give it (0.1 in the released models), or choose mistral"
            )
        if (
            self.family.startswith("gemma")
            and self.attention_scale
            and (n := round(self.attention_scale**-2)) ** -0.5 != self.attention_scale
        ):
            raise ValueError(
                f"attention_scale {self.attention_scale} is not n ** -0.5 for a whole n, as {self.family} requires; {n**-0.5!r} is"
            )

    @property
    def gated(self) -> bool:
        """Whether the activation has a gate beside the up projection."""
        return self.activation in ("swiglu", "geglu", "clamped_swiglu")

    @property
    def scale(self) -> float:
        """What multiplies query . key; latent attention sharpens it for stretched positions, as cos and sin cannot where they turn few channels."""
        if self.attention_scale is not None:
            return self.attention_scale
        sharper = 1.0
        if self.kv_rank is not None and self.rope.mscale_all_dim and (self.rope.factor or 1.0) > 1.0:
            sharper = 0.1 * self.rope.mscale_all_dim * math.log(self.rope.factor or 1.0) + 1.0
        return self.head_dim**-0.5 * sharper * sharper

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that position embeddings see; `Rope.partial` is a share of them."""
        return self.rope_head_dim or self.head_dim

    @property
    def value_dim(self) -> int:
        """Channels of a head of values."""
        return self.value_head_dim or self.head_dim

    @property
    def shared_width(self) -> int:
        """Channels of the block of shared experts."""
        return self.shared_experts * self.expert_width

    @property
    def embedding_factor(self) -> float:
        """What multiplies the embeddings."""
        return self.hidden**0.5 if self.embedding_scale == "sqrt_hidden" else float(self.embedding_scale)

    def window_of(self, layer: int) -> int | None:
        """The layer's window in tokens; None: it sees everything before it."""
        return self.window if self.window_layers and self.window_layers[layer] else None

    def rope_of(self, layer: int) -> Rope | None:
        """The layer's position embedding; None: it has none."""
        if self.rope_layers and not self.rope_layers[layer]:
            return None
        return self.rope_local if self.rope_local and self.window_of(layer) else self.rope

    def sparse_of(self, layer: int) -> bool:
        """Whether the layer's feed-forward block is a mixture of experts."""
        return self.experts > 0 and (self.moe_layers is None or self.moe_layers[layer])

    @property
    def sparse_layers(self) -> int:
        """How many layers have experts."""
        return sum(self.sparse_of(i) for i in range(self.layers))

    @property
    def expert_width(self) -> int:
        """Channels between an expert's two products."""
        return self.expert_intermediate or self.intermediate

    def expert_matrices(self) -> int:
        """Weights of all experts' products in all layers."""
        return self.sparse_layers * self.experts * 3 * self.hidden * self.expert_width

    def expert_parameters(self) -> int:
        """Trainable numbers of all experts of all layers, biases included."""
        biases = self.sparse_layers * self.experts * (2 * self.expert_width + self.hidden) if self.expert_bias else 0
        return self.expert_matrices() + biases

    def router_parameters(self) -> int:
        """Weights of all routers."""
        return self.sparse_layers * self.experts * self.hidden

    def idle_parameters(self) -> int:
        """Trainable numbers of the experts that a token does not visit."""
        return self._idle(self.expert_parameters())

    def _idle(self, of_experts: int) -> int:
        return of_experts // self.experts * (self.experts - (self.experts_per_token or 0)) if self.experts else 0

    def latent_parameters(self) -> int:
        """Weights of a layer's products to the latents, which are the same for all heads."""
        return self.hidden * ((self.q_rank or 0) + self.kv_rank + (self.rope_head_dim or 0)) if self.kv_rank else 0

    def attention_parameters(self) -> int:
        """Weights of a layer's attention."""
        if not self.kv_rank:
            return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        unrotated = self.head_dim - (self.rope_head_dim or 0)
        heads = (self.q_rank or self.hidden) * self.head_dim + self.kv_rank * (unrotated + self.value_dim) + self.hidden * self.value_dim
        return self.latent_parameters() + self.heads * heads

    def feed_forward_parameters(self, layer: int, *, routed: bool = True) -> int:
        """Weights of a layer's feed-forward block, without biases; `routed` with router and all experts."""
        if not self.sparse_of(layer):
            return self.hidden * self.intermediate * (3 if self.gated else 2)
        return 3 * self.hidden * self.shared_width + (self.experts * self.hidden * (1 + 3 * self.expert_width) if routed else 0)

    def matrix_parameters(self, *, routed: bool = True) -> int:
        """Weights of the matrix products of all layers, without embedding, head, biases and norms; `routed` with routers and all experts."""
        return self.layers * self.attention_parameters() + sum(self.feed_forward_parameters(i, routed=routed) for i in range(self.layers))

    def active_parameters(self) -> int:
        """Trainable numbers that one token meets."""
        return self.parameters() - self.idle_parameters()

    def parameters(self) -> int:
        """Trainable numbers, exactly: the sum of `numel` over the parameters of the transformers model, a tied head counted once."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        widening = 2 if self.gated else 1
        entering = (self.q_rank or 0) + self.kv_rank + self.rotary_dim if self.kv_rank else q + 2 * kv
        biases = self.qkv_bias * entering + self.output_bias * self.hidden + self.mlp_bias * (widening * self.intermediate + self.hidden)
        norms = (4 if self.placement == "sandwich" else 2) * self.hidden
        norms += {"none": 0, "head": 2 * self.head_dim, "full": q + kv}[self.qk_norm]
        norms += (self.q_rank or 0) + self.kv_rank if self.kv_rank else 0
        scalars = (2 if self.activation == "xielu" else 0) + (self.heads if self.sinks else 0)
        of_experts = self.expert_parameters() - self.expert_matrices() + self.router_bias * self.sparse_layers * self.experts
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return embeddings + self.matrix_parameters() + of_experts + self.layers * (biases + norms + scalars) + self.hidden

    def flops_per_token(self, sequence: int) -> float:
        """Forward and backward FLOPs of the matrix products, per token of a sample of `sequence` tokens that is one document.

        6 per weight (2 forward, 4 backward; layers, of their experts those that a token visits, and head, not the embedding's look-up) plus, per layer,
        6 * heads * (head_dim + value_dim) * keys for query . key and weights . value, where `keys` is the mean number of visible tokens:
        (sequence + 1) / 2, or less with a window. Recomputation is not counted (PaLM, arXiv:2204.02311, appendix B, with the causal half that it leaves out).
        """
        if sequence < 1:
            raise ValueError(f"sequence {sequence} must be at least 1")

        def keys(window: int | None) -> float:
            w = min(window or sequence, sequence)
            return (w * (w + 1) / 2 + (sequence - w) * w) / sequence

        attention = 6 * self.heads * (self.head_dim + self.value_dim) * sum(keys(self.window_of(i)) for i in range(self.layers))
        return 6.0 * (self.matrix_parameters() - self._idle(self.expert_matrices()) + self.vocab * self.hidden) + attention


# ---- Named models: their numbers are in published.py. ----


def causes(error: ValidationError) -> list[Any]:
    """Its problems, without those that only say that a default could not be had because of another one."""
    found = error.errors(include_url=False)
    return [one for one in found if one["type"] != "default_factory_not_called"] or found


def named() -> dict[str, dict[str, Any]]:
    """The known models by name, each as the table a recipe could hold; a fresh copy."""
    return json.loads(json.dumps(NAMED))


def resolve(name: str) -> dict[str, Any]:
    """The table of one known model. Raises `RecipeError` naming the nearest names for an unknown one."""
    if name in NAMED:
        return named()[name]
    near = difflib.get_close_matches(name.lower(), NAMED, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(NAMED))}"
    raise RecipeError(f"no architecture is called {name!r}; {hint} Or give its numbers as a table [model.architecture].")


# ---- transformers' config.json, both ways. ----

# Keys that say nothing about the mathematics of training: names, tokens, generation, initialisation, bookkeeping.
_SILENT = frozenset([
    "_attn_implementation", "_name_or_path", "architectures", "attn_implementation", "auto_map", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "is_llama_config", "label2id", "length_penalty", "max_length", "max_position_embeddings", "min_length", "model_type",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "pad_token_id", "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict", "sep_token_id",
    "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype", "transformers_version", "typical_p",
    "unsloth_fixed", "unsloth_version", "use_cache",
])  # fmt: skip
# Keys that are read elsewhere than by `get` in `from_hf_config`.
_ELSEWHERE = frozenset([
    "_sliding_window_pattern", "head_dim", "hidden_act", "hidden_activation", "layer_types", "max_window_layers",
    "no_rope_layer_interval", "original_max_position_embeddings", "partial_rotary_factor", "rope_local_base_freq", "rope_parameters",
    "rope_scaling", "rope_theta", "sliding_window", "sliding_window_pattern", "use_sliding_window",
])  # fmt: skip
_DIRECT = {  # our field: transformers' key
    "vocab": "vocab_size", "hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "intermediate": "intermediate_size", "tied": "tie_word_embeddings", "norm_eps": "rms_norm_eps",
}  # fmt: skip
_GRANITE = {"embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier", "logit_divisor": "logits_scaling"}
_ROPE_KEYS = {
    "theta": "rope_theta", "kind": "rope_type", "partial": "partial_rotary_factor", "original_positions": "original_max_position_embeddings",
    "query_beta": "llama_4_scaling_beta",
    **{k: k for k in (
        "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
        "short_factor", "long_factor")},
}  # fmt: skip
_HAS_LAYER_TYPES = frozenset(name for name, family in FAMILIES.items() if family.open >= _LAYER_WINDOWS)
_MAY_SLIDE = ("qwen2", "qwen3", "smollm3", "qwen3_moe")  # have a window only where use_sliding_window says so
_HAS_HEAD_DIM = frozenset({"llama", "mistral", "ministral", "ministral3", "qwen3", "gemma2", "gemma3_text", "helium", "arcee", "gpt_oss"})
_LATENT_KEYS = {"q_rank": "q_lora_rank", "kv_rank": "kv_lora_rank", "rope_head_dim": "qk_rope_head_dim", "value_head_dim": "v_head_dim"}
_DEEPSEEK_KEYS = {
    "shared_experts": "n_shared_experts", "groups": "n_group", "groups_per_token": "topk_group", "routed_scale": "routed_scaling_factor",
    "renormalise": "norm_topk_prob", "expert_intermediate": "moe_intermediate_size", "experts": "n_routed_experts",
}  # fmt: skip
# Keys with one value that is implemented: gpt-oss's, and what files of DeepSeek's first code say beside transformers' keys.
_ONLY: dict[str, dict[str, Any]] = {
    "gpt_oss": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    "deepseek_v3": {"moe_layer_freq": 1, "ep_size": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
}
_THETA = {
    "gemma3_text": 1_000_000.0,
    "olmo3": 500_000.0,
    "smollm3": 2_000_000.0,
    "helium": 100_000.0,
    "apertus": 12_000_000.0,
    "mixtral": 1_000_000.0,
    "gpt_oss": 150_000.0,
}  # of the classes
_ROPES: dict[str, dict[str, Any]] = {  # of the classes, where a file has none
    "apertus": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "gpt_oss": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "mistral4": {
        "rope_type": "yarn",
        "factor": 128.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
}
_ACTIVATIONS = {
    "swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",), "xielu": ("xielu",), "relu2": ("relu2",), "clamped_swiglu": ("silu",),
}  # fmt: skip
_CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "ministral": "Ministral", "ministral3": "Ministral3", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "gemma2": "Gemma2", "gemma3_text": "Gemma3", "olmo2": "Olmo2", "olmo3": "Olmo3", "smollm3": "SmolLM3", "helium": "Helium", "apertus": "Apertus",
    "granite": "Granite", "phi3": "Phi3", "arcee": "Arcee", "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe",
    "olmoe": "Olmoe", "deepseek_v3": "DeepseekV3", "mistral4": "Mistral4", "gpt_oss": "GptOss",
}  # fmt: skip


def class_of(family: str) -> str | None:
    """transformers' class of a family's language model; None for a model type that is no family of ours."""
    return f"{_CLASSES[family]}ForCausalLM" if family in _CLASSES else None


_WITHIN = {"qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe", "qwen2_5_vl_text": "qwen2", "qwen2_vl_text": "qwen2"}


def language(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config.json that the language model of one that also sees would have alone; None if it has none of our families.

    Qwen's rotations by time, height and width are one for text, whose three positions are equal (arXiv:2409.12191): plain ones.
    """
    inner = config.get("text_config")
    if config.get("model_type") in FAMILIES or not isinstance(inner, dict):
        return None
    family = _WITHIN.get(str(inner.get("model_type")), inner.get("model_type"))
    if family not in FAMILIES:
        return None
    found = {**inner, "model_type": family}
    if "tie_word_embeddings" in config:
        found.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(rope := found.get(key), dict) and "mrope_section" in rope:
            rope = {name: value for name, value in rope.items() if name not in ("mrope_section", "mrope_interleaved")}
            found[key] = rope | {name: "default" for name in ("type", "rope_type") if rope.get(name) in ("mrope", "default")}
    return found


def from_hf_config(config: Mapping[str, Any], unread: list[str] | None = None) -> Architecture:
    """The numbers of a transformers config.json, of version 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Raises `RecipeError` naming the key for an unknown model type or rope type and for any key that is set and that we do not implement; where there is a
    list, those of the last kind are put into it instead.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise RecipeError(f"model_type {family!r} is not implemented; there are {', '.join(FAMILIES)}")
    traits, read = FAMILIES[family], set(_SILENT | _ELSEWHERE)
    defaults = {"tie_word_embeddings": traits.default.get("tied", False), "rms_norm_eps": traits.default.get("norm_eps", 1e-6), **traits.hf}

    def get(key: str, default: Any = None) -> Any:
        read.add(key)
        return config.get(key, defaults.get(key, default))

    numbers: dict[str, Any] = {"family": family} | {ours: value for ours, key in _DIRECT.items() if (value := get(key)) is not None}
    if missing := [key for ours, key in _DIRECT.items() if ours not in numbers and ours != "kv_heads"]:
        raise RecipeError(f"config.json lacks {', '.join(missing)}, without which a {family} cannot be built")
    numbers["head_dim"] = get("head_dim") or numbers["hidden"] // numbers["heads"]
    if family in _LATENT_FAMILIES:
        numbers |= {ours: get(key) for ours, key in _LATENT_KEYS.items()} | {"rope_interleaved": bool(get("rope_interleave"))}
        numbers["head_dim"] = get("qk_nope_head_dim") + numbers["rope_head_dim"]
        read |= {"qk_head_dim", "num_nextn_predict_layers", "num_mtp_layers"}  # the last two: of modules that are not trained here

    activation = traits.fixed.get("activation", "swiglu")
    key = "hidden_activation" if family.startswith("gemma") else "hidden_act"
    if (given := get(key) or _ACTIVATIONS[activation][0]) not in _ACTIVATIONS[activation]:
        raise RecipeError(
            f"config.json: {key} {given!r} is not implemented for {family}; it must be {' or '.join(_ACTIVATIONS[activation])}"
        )
    if "output_bias" in traits.open:
        numbers["qkv_bias"] = numbers["output_bias"] = bool(get("attention_bias"))
    elif "qkv_bias" in traits.open:
        numbers["qkv_bias"] = bool(get("attention_bias"))
    if "mlp_bias" in traits.open:
        numbers["mlp_bias"] = bool(get("mlp_bias"))
    if family == "granite":
        numbers |= {ours: float(get(key, 1.0)) for ours, key in _GRANITE.items()}
        scale = float(get("attention_multiplier", 1.0))
        numbers["attention_scale"] = None if scale == numbers["head_dim"] ** -0.5 else scale
    if family.startswith("gemma"):
        n = get("query_pre_attn_scalar")
        numbers["attention_scale"] = None if n == numbers["head_dim"] else n**-0.5
        numbers["logit_softcap"] = get("final_logit_softcapping")
        if family == "gemma2":  # transformers' Gemma 3 reads the key and never applies it, so there it must be empty
            numbers["attention_softcap"] = get("attn_logit_softcapping")
    if traits.open >= _EXPERTS:
        numbers |= _experts_from(family, get, numbers["layers"])
    numbers |= _windows_from(family, config, numbers["layers"])
    if family == "smollm3":
        every = config.get("no_rope_layer_interval", 4)
        turned = get("no_rope_layers") or [(i + 1) % every != 0 for i in range(numbers["layers"])]
        numbers["rope_layers"] = [bool(x) for x in turned[: numbers["layers"]]]
    numbers |= _ropes_from(family, config, numbers.get("window") is not None)
    for key, value in sorted(config.items()):
        if key not in read and value not in (None, False, 0, "", [], {}):
            if unread is not None:
                unread.append(f"{key} = {json.dumps(value, default=str)[:60]}")
                continue
            raise RecipeError(f"config.json: {key} = {value!r} is not implemented for {family}; unset it if the model does not need it")
    if (tp := config.get("pretraining_tp", 1)) not in (0, 1, None):
        raise RecipeError(f"config.json: pretraining_tp = {tp} is not implemented; 1 gives the same model without emulated rounding")
    try:
        return Architecture.model_validate_json(json.dumps(numbers))
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'model'}: {e['msg']}" for e in causes(error))
        raise RecipeError(f"config.json describes no {family} that can be built: {details}") from error


def _experts_from(family: str, get: Callable[..., Any], layers: int) -> dict[str, Any]:
    for key in ("router_aux_loss_coef", "output_router_logits"):  # of a loss that is chosen in the recipe, not by the model
        get(key)
    for key, only in _ONLY.get(family, {}).items():
        if (given := get(key, only)) != only:
            raise RecipeError(f"config.json: {key} = {given!r} is not implemented for {family}; it must be {only!r}")
    numbers: dict[str, Any] = {"experts_per_token": get("num_experts_per_tok")}
    if family == "mixtral":
        return numbers | {"experts": get("num_local_experts")}
    if family == "gpt_oss":
        for key in (
            "experts_per_token",
            "initial_context_length",
        ):  # what its own code calls numbers that are there under transformers' names
            get(key)
        return numbers | {"experts": get("num_local_experts")}
    if family == "olmoe":
        return numbers | {"experts": get("num_local_experts") or get("num_experts"), "renormalise": bool(get("norm_topk_prob"))}
    if family in _LATENT_FAMILIES:
        numbers |= {ours: get(key) for ours, key in _DEEPSEEK_KEYS.items()}
        numbers |= {"renormalise": bool(numbers["renormalise"]), "routed_scale": float(numbers["routed_scale"])}
        dense = min(get("first_k_dense_replace"), layers)
        return numbers | {"moe_layers": [i >= dense for i in range(layers)] if dense else None}
    every, dense = get("decoder_sparse_step", 1), get("mlp_only_layers") or []
    sparse = [(i + 1) % every == 0 and i not in dense for i in range(layers)]
    return numbers | {
        "experts": get("num_local_experts") or get("num_experts"),  # what transformers 5 and 4 write
        "expert_intermediate": get("moe_intermediate_size"),
        "renormalise": bool(get("norm_topk_prob")),
        "moe_layers": None if all(sparse) else sparse,
    }


def _windows_from(family: str, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    traits = FAMILIES[family]
    window = config.get("sliding_window", traits.hf.get("sliding_window"))
    if "window" not in traits.open or window is None or (family in _MAY_SLIDE and not config.get("use_sliding_window")):
        return {"window": None, "window_layers": None}
    kinds = config.get("layer_types") if family in _HAS_LAYER_TYPES else None
    if kinds is None:
        every = config.get("sliding_window_pattern", 6)
        pattern = {
            "gemma2": lambda i: i % 2 == 0,
            "gemma3_text": lambda i: (i + 1) % every != 0,
            "olmo3": lambda i: (i + 1) % 4 != 0,
            "gpt_oss": lambda i: i % 2 == 0,
            "qwen2": lambda i: i >= config.get("max_window_layers", 28),
            "qwen3": lambda i: i >= config.get("max_window_layers", 28),
            "smollm3": lambda i: not (config.get("no_rope_layers") or [(j + 1) % 4 != 0 for j in range(layers)])[i],
        }.get(family, lambda i: True)
        windowed = [pattern(i) for i in range(layers)]
    else:
        if unknown := sorted(set(kinds) - {"sliding_attention", "full_attention"}):
            raise RecipeError(f"config.json: layer_types {', '.join(unknown)} is not implemented; sliding_attention and full_attention are")
        windowed = [kind == "sliding_attention" for kind in kinds[:layers]]
    return {"window": window, "window_layers": windowed} if any(windowed) else {"window": None, "window_layers": None}


def _ropes_from(family: str, config: Mapping[str, Any], windowed: bool) -> dict[str, Any]:
    theta = config.get("rope_theta") or _THETA.get(family, 10_000.0)
    given = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    if not given and not scaling:
        scaling = _ROPES.get(family, {})
    if family not in ("gemma3_text", "olmo3"):
        return {"rope": _rope_from(family, config, {"rope_theta": theta, **(given or scaling)})}
    wide = _rope_from(family, config, {"rope_theta": theta, **(given.get("full_attention") or {}), **scaling})
    base = theta if family == "olmo3" else config.get("rope_local_base_freq") or 10_000.0
    local = _rope_from(family, config, {"rope_theta": base, **(given.get("sliding_attention") or {})})
    return {"rope": wide, "rope_local": local if windowed and local != wide else None}


def _rope_from(family: str, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """One `Rope` as a table, from transformers' keys."""
    kind = given.get("rope_type") or given.get("type") or "default"
    if family == "phi3" and kind in ("su", "yarn"):  # what early Phi-3 files call longrope
        kind = "longrope"
    if kind not in _KINDS:
        raise RecipeError(f"config.json: rope type {kind!r} is not implemented; there are {', '.join(_KINDS)}")
    positions = config.get("max_position_embeddings", 4096 if family == "phi3" else None)
    if "factor" not in given or given["factor"] is None:
        original = given.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        given = {**given, "factor": positions / original if kind in ("yarn", "longrope") and positions and original else None}
    if kind in ("llama3", "yarn", "longrope"):  # a key beside the table wins, as in transformers
        inner = given.get("original_max_position_embeddings") or positions
        given = {**given, "original_max_position_embeddings": config.get("original_max_position_embeddings") or inner}
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if family == "mistral4":  # says it as a share of the whole head, and rotates what qk_rope_head_dim says
        turned, others = (config.get(key, FAMILIES[family].hf[key]) for key in ("qk_rope_head_dim", "qk_nope_head_dim"))
        if partial is not None and int((turned + others) * partial) != turned:
            raise RecipeError(
                f"config.json: partial_rotary_factor {partial} of a head of {turned + others} is not qk_rope_head_dim {turned}; make it "
                f"{turned / (turned + others)}"
            )
        partial = None
    required, optional = _KINDS[kind]
    allowed = required | optional | {"theta", "partial"}
    unread = {"type", "rope_type", "max_position_embeddings", "factor", "original_max_position_embeddings"} | set(_ROPE_KEYS.values()) - {
        "llama_4_scaling_beta"
    }
    if family in ("ministral3", "mistral4"):
        unread |= {"llama_4_scaling_beta"}
    if strange := sorted(key for key, value in given.items() if key not in unread and value is not None):
        raise RecipeError(f"config.json: rope parameter {', '.join(strange)} is not implemented for {family} with rope type {kind!r}")
    table = {ours: given[key] for ours, key in _ROPE_KEYS.items() if ours in allowed and given.get(key) is not None}
    return {**table, "kind": kind, "partial": partial or 1.0}


def to_hf_config(
    arch: Architecture, *, bos: int | None, eos: int | list[int] | None, pad: int | None, max_positions: int, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """A config.json (transformers 5) from which `AutoModelForCausalLM.from_pretrained` builds this architecture.

    `bos`, `eos`, `pad` are token ids; `max_positions` the longest context in tokens; `dtype` as torch names it, such as "bfloat16".
    """
    traits = FAMILIES[arch.family]
    config: dict[str, Any] = {
        "architectures": [class_of(arch.family)],
        "model_type": arch.family,
        **{key: getattr(arch, ours) for ours, key in _DIRECT.items()},
        "hidden_activation" if arch.family.startswith("gemma") else "hidden_act": _ACTIVATIONS[arch.activation][0],
        "max_position_embeddings": max_positions,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "dtype": dtype,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if arch.family in _HAS_HEAD_DIM or (arch.head_dim != arch.hidden // arch.heads and arch.family not in _LATENT_FAMILIES):
        config["head_dim"] = arch.head_dim
    if "qkv_bias" in traits.open:
        config["attention_bias"] = arch.qkv_bias
    if "mlp_bias" in traits.open:
        config["mlp_bias"] = arch.mlp_bias
    if arch.family == "granite":
        config |= {key: getattr(arch, ours) for ours, key in _GRANITE.items()} | {"attention_multiplier": arch.scale}
    if arch.family.startswith("gemma"):
        config |= {"query_pre_attn_scalar": round(arch.scale**-2), "final_logit_softcapping": arch.logit_softcap}
        config["attn_logit_softcapping"] = arch.attention_softcap
    if "window" in traits.open:
        config["sliding_window"] = arch.window
    if arch.family in _MAY_SLIDE:
        config["use_sliding_window"] = arch.window is not None
    if arch.family in _HAS_LAYER_TYPES:
        config["layer_types"] = ["sliding_attention" if arch.window_of(i) else "full_attention" for i in range(arch.layers)]
    if arch.family == "smollm3":
        config["no_rope_layers"] = [int(arch.rope_of(i) is not None) for i in range(arch.layers)]
    if traits.open >= _EXPERTS:
        config["num_experts_per_tok"] = arch.experts_per_token
    if arch.family == "mixtral":
        config["num_local_experts"] = arch.experts
    elif arch.family == "gpt_oss":
        config |= {"num_local_experts": arch.experts, **_ONLY["gpt_oss"]}
        config["sliding_window"] = arch.window or 128  # which the class needs even where no layer has it
    elif arch.family == "olmoe":
        config |= {"num_experts": arch.experts, "norm_topk_prob": arch.renormalise}
    elif arch.family in _LATENT_FAMILIES:
        config |= {key: getattr(arch, ours) for ours, key in (_LATENT_KEYS | _DEEPSEEK_KEYS).items()}
        config |= {"qk_nope_head_dim": arch.head_dim - arch.rotary_dim, "rope_interleave": arch.rope_interleaved}
        config["first_k_dense_replace"] = arch.layers - arch.sparse_layers
        config |= {"num_nextn_predict_layers": 0} if arch.family == "deepseek_v3" else {}
    elif arch.family == "qwen3_moe":
        config |= {"num_experts": arch.experts, "moe_intermediate_size": arch.expert_width, "norm_topk_prob": arch.renormalise}
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": [i for i in range(arch.layers) if not arch.sparse_of(i)]}
    wide = _rope_to(arch.rope)
    if arch.family in ("gemma3_text", "olmo3"):
        config["rope_parameters"] = {"full_attention": wide, "sliding_attention": _rope_to(arch.rope_local or arch.rope)}
    else:
        config["rope_parameters"] = wide
    if (
        arch.rope.kind == "llama3"
    ):  # transformers reads it within the table, llama.cpp's converter beside it, and takes 8,192 where it is not
        config["original_max_position_embeddings"] = arch.rope.original_positions
    if arch.family == "mistral4":
        wide["partial_rotary_factor"] = arch.rotary_dim / arch.head_dim
    if arch.family == "phi3":
        config["original_max_position_embeddings"] = arch.rope.original_positions or max_positions
    return config


def _rope_to(rope: Rope) -> dict[str, Any]:
    values = {key: getattr(rope, ours) for ours, key in _ROPE_KEYS.items()}
    if rope.partial == 1.0:
        del values["partial_rotary_factor"]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if value is not None}
