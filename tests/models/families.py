"""Tiny random transformers models of every family, from the real config classes: the oracle of the decoder's tests."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SLIDING = ["sliding_attention", "full_attention"]
OSS = YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
MISTRAL4 = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
LONG = {"rope_type": "longrope", "rope_theta": 100.0, "factor": 2.0, "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.5, 3.0, 7.0]}

# name: (family, what differs from SIZES)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-mha": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "num_key_value_heads": 1}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-all": (
        "Llama",
        {
            "rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.2, "truncate": False},
            "hidden_size": 64,
        },
    ),
    "mistral-window": ("Mistral", {"sliding_window": 5}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 8}),
    "ministral": ("Ministral", {"sliding_window": 5, "layer_types": SLIDING, "head_dim": 12}),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 12,
            "rope_parameters": YARN
            | {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1},
        },
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-biases": ("Qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2-plain": (
        "Gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 5,
            "layer_types": SLIDING,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 5,
            "layer_types": SLIDING,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}},
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "helium": ("Helium", {"head_dim": 12, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "apertus": ("Apertus", {"rope_parameters": LLAMA3}),
    "apertus-biases": (
        "Apertus",
        {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 6.5,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.11,
            "tie_word_embeddings": True,
        },
    ),
    "granite-biases": ("Granite", {"attention_multiplier": 0.3, "attention_bias": True, "mlp_bias": True}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "arcee": ("Arcee", {"rope_parameters": YARN}),
    "arcee-biases": ("Arcee", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "mixtral-window": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 5, "tie_word_embeddings": True}),
    "qwen3-moe": (
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 16},
    ),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 2,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 4,
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "olmoe-biases": (
        "Olmoe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "attention_bias": True,
            "num_key_value_heads": 4,
            "rope_parameters": YARN,
        },
    ),
    "deepseek-v3": ("DeepseekV3", DEEPSEEK | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "deepseek-v3-plain": (  # no latent of the queries, two shared experts, one group, rotated by halves, no layer dense
        "DeepseekV3",
        DEEPSEEK
        | {"q_lora_rank": None, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "rope_interleave": False, "first_k_dense_replace": 0}
        | {"norm_topk_prob": False, "routed_scaling_factor": 1.5, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "deepseek-v3-mscale": (
        "DeepseekV3",
        DEEPSEEK | {"attention_bias": True, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}, "routed_scaling_factor": 1.0},
    ),
    "mistral4": ("Mistral4", DEEPSEEK | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "rope_parameters": MISTRAL4}),
    "mistral4-groups": (
        "Mistral4",
        DEEPSEEK
        | {"norm_topk_prob": False, "routed_scaling_factor": 2.0, "rope_parameters": MISTRAL4 | {"mscale": 0.7}, "attention_bias": True},
    ),
    "gpt-oss": ("GptOss", {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 5, "rope_parameters": OSS}),
    "gpt-oss-full": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 4,
            "attention_bias": False,
            "layer_types": ["full_attention"] * 2,
            "tie_word_embeddings": True,
        }
        | {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ),
    "phi3-window": ("Phi3", {"sliding_window": 5, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64}),
    "phi3-short": ("Phi3", {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 32, "rope_parameters": LONG}),
    "phi3-long": ("Phi3", {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 8, "rope_parameters": LONG}),
}


def build(name: str, seed: int = 0, **kwargs: Any) -> Any:
    """A transformers model whose every parameter, norms and biases included, is away from its initial constant."""
    family, extra = VARIANTS[name]
    config = getattr(transformers, f"{family}Config")(
        **(SIZES | {k: v.copy() if isinstance(v, dict) else v for k, v in extra.items()} | kwargs)
    )
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)  # the Auto classes do not know mistral4
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias") or "alpha" in key or "sinks" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model.eval()


def load(folder: Path, **options: Any) -> Any:
    """The model in a folder, by the class that its config.json names: what the Auto class does for all that it knows, which mistral4 is not."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    auto = transformers.AutoModelForCausalLM
    return (getattr(transformers, name) if name.startswith("Mistral4") else auto).from_pretrained(folder, **options)


class wide_norms:
    """Runs transformers' explicit fp32 casts in fp64: for the duration, `torch.float32` and `.float()` mean fp64 in norms, routers and softmax.

    Rotary tables are excepted: their fp32 rounding is part of the released models, ours included.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        self.kept = (torch.float32, torch.float, torch.Tensor.float)
        self.model.config._experts_implementation = "eager"  # type: ignore[union-attr,assignment] # torch's grouped product takes no fp64

        def widen(*_: Any) -> None:
            torch.float32, torch.float, torch.Tensor.float = torch.float64, torch.float64, torch.Tensor.double  # type: ignore[misc,assignment]

        def narrow(*_: Any) -> None:
            torch.float32, torch.float, torch.Tensor.float = self.kept  # type: ignore[misc,assignment]

        for name, module in self.model.named_modules():
            if name.endswith(("norm", "layernorm")) or type(module).__name__.endswith(("Attention", "Router")):
                self.hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(narrow)]
        # inner norms of attention narrow too early for its softmax: widen again after them
        for name, module in self.model.named_modules():
            if name.endswith(("q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm")):
                self.hooks.append(module.register_forward_hook(widen))

    def __exit__(self, *_: Any) -> None:
        torch.float32, torch.float, torch.Tensor.float = self.kept  # type: ignore[misc,assignment]
        for hook in self.hooks:
            hook.remove()
