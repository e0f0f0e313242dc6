"""The numbers of published models by name, as a recipe's [model.architecture] would hold them. Numbers only: no code, no torch.

The comment of each says where it was read, and how many parameters it must give; tests hold that against transformers' own classes and against what the
model's card or safetensors index says.
"""

from typing import Any

_LLAMA3_ROPE = {"kind": "llama3", "theta": 500_000.0, "original_positions": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

_GPT_OSS_ROPE = {
    "kind": "yarn", "theta": 150_000.0, "factor": 32.0, "original_positions": 4096, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
}  # fmt: skip

_OLMO3_ROPE = {
    "kind": "yarn", "theta": 500_000.0, "factor": 8.0, "original_positions": 8192, "beta_fast": 32.0, "beta_slow": 1.0,
    "attention_factor": 1.2079441541679836,
}  # fmt: skip

NAMED: dict[str, dict[str, Any]] = {
    # huggingface.co/meta-llama/Llama-3.1-8B config.json; 8,030,261,248 parameters
    "llama-3.1-8b": {
        "family": "llama", "vocab": 128256, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "intermediate": 14336, "norm_eps": 1e-5,
        "rope": {**_LLAMA3_ROPE, "factor": 8.0},
    },
    # huggingface.co/meta-llama/Llama-3.1-70B config.json; 70,553,706,496
    "llama-3.1-70b": {
        "family": "llama", "vocab": 128256, "hidden": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "intermediate": 28672, "norm_eps": 1e-5,
        "rope": {**_LLAMA3_ROPE, "factor": 8.0},
    },
    # huggingface.co/meta-llama/Llama-3.1-405B config.json; 405,853,388,800
    "llama-3.1-405b": {
        "family": "llama", "vocab": 128256, "hidden": 16384, "layers": 126, "heads": 128, "kv_heads": 8, "intermediate": 53248, "norm_eps": 1e-5,
        "rope": {**_LLAMA3_ROPE, "factor": 8.0},
    },
    # huggingface.co/meta-llama/Llama-3.2-1B config.json; 1,235,814,400
    "llama-3.2-1b": {
        "family": "llama", "vocab": 128256, "hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "head_dim": 64, "intermediate": 8192,
        "tied": True, "norm_eps": 1e-5, "rope": {**_LLAMA3_ROPE, "factor": 32.0},
    },
    # huggingface.co/meta-llama/Llama-3.2-3B config.json; 3,212,749,824
    "llama-3.2-3b": {
        "family": "llama", "vocab": 128256, "hidden": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "head_dim": 128, "intermediate": 8192,
        "tied": True, "norm_eps": 1e-5, "rope": {**_LLAMA3_ROPE, "factor": 32.0},
    },
    # huggingface.co/mistralai/Mistral-7B-v0.1 config.json (the defaults of transformers' MistralConfig, but norm_eps); 7,241,732,096
    "mistral-7b-v0.1": {
        "family": "mistral", "vocab": 32000, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 14336,
        "norm_eps": 1e-5, "window": 4096,
    },
    # huggingface.co/Qwen/Qwen3-0.6B config.json; 596,049,920
    "qwen3-0.6b": {
        "family": "qwen3", "vocab": 151936, "hidden": 1024, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128, "intermediate": 3072,
        "tied": True, "norm_eps": 1e-6, "rope": {"theta": 1_000_000.0},
    },
    # huggingface.co/Qwen/Qwen3-8B config.json; 8,190,735,360
    "qwen3-8b": {
        "family": "qwen3", "vocab": 151936, "hidden": 4096, "layers": 36, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 12288,
        "norm_eps": 1e-6, "rope": {"theta": 1_000_000.0},
    },
    # huggingface.co/Qwen/Qwen2.5-0.5B config.json; 494,032,768
    "qwen2.5-0.5b": {
        "family": "qwen2", "vocab": 151936, "hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "head_dim": 64, "intermediate": 4864,
        "tied": True, "norm_eps": 1e-6, "rope": {"theta": 1_000_000.0},
    },
    # the defaults of transformers' Gemma2Config; 2,614,341,888
    "gemma-2-2b": {
        "family": "gemma2", "vocab": 256000, "hidden": 2304, "layers": 26, "heads": 8, "kv_heads": 4, "head_dim": 256, "intermediate": 9216,
        "norm_eps": 1e-6, "window": 4096, "attention_softcap": 50.0, "logit_softcap": 30.0,
    },
    # huggingface.co/google/gemma-3-1b-pt config.json; 999,885,952
    "gemma-3-1b": {
        "family": "gemma3_text", "vocab": 262144, "hidden": 1152, "layers": 26, "heads": 4, "kv_heads": 1, "head_dim": 256, "intermediate": 6912,
        "norm_eps": 1e-6, "window": 512, "rope": {"theta": 1_000_000.0}, "rope_local": {"theta": 10_000.0},
    },
    # huggingface.co/allenai/OLMo-2-1124-7B config.json; 7,298,617,344
    "olmo-2-7b": {
        "family": "olmo2", "vocab": 100352, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "intermediate": 11008, "norm_eps": 1e-6,
        "rope": {"theta": 500_000.0},
    },
    # the defaults of transformers' SmolLM3Config, theta from huggingface.co/HuggingFaceTB/SmolLM3-3B; 3,075,098,624
    "smollm3-3b": {
        "family": "smollm3", "vocab": 128256, "hidden": 2048, "layers": 36, "heads": 16, "kv_heads": 4, "intermediate": 11008, "norm_eps": 1e-6,
        "rope": {"theta": 5_000_000.0},
    },
    # huggingface.co/HuggingFaceTB/SmolLM2-135M config.json; 134,515,008
    "smollm2-135m": {
        "family": "llama", "vocab": 49152, "hidden": 576, "layers": 30, "heads": 9, "kv_heads": 3, "intermediate": 1536, "tied": True,
        "norm_eps": 1e-5, "rope": {"theta": 100_000.0},
    },
    # the defaults of transformers' HeliumConfig = huggingface.co/kyutai/helium-1-preview-2b config.json; 2,172,643,840
    "helium-1-preview-2b": {
        "family": "helium", "vocab": 48000, "hidden": 2560, "layers": 24, "heads": 20, "kv_heads": 20, "head_dim": 128, "intermediate": 7040,
        "norm_eps": 1e-8, "rope": {"theta": 100_000.0},
    },
    # huggingface.co/swiss-ai/Apertus-8B-2509 config.json; 8,053,338,176
    "apertus-8b": {
        "family": "apertus", "vocab": 131072, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "intermediate": 21504, "norm_eps": 1e-5,
        "rope": {**_LLAMA3_ROPE, "theta": 12_000_000.0, "factor": 8.0},
    },
    # huggingface.co/ibm-granite/granite-3.3-8b-instruct config.json; 8,170,864,640
    "granite-3.3-8b": {
        "family": "granite", "vocab": 49159, "hidden": 4096, "layers": 40, "heads": 32, "kv_heads": 8, "intermediate": 12800, "tied": True,
        "norm_eps": 1e-5, "rope": {"theta": 10_000_000.0}, "attention_scale": 0.0078125, "embedding_scale": 12.0, "residual_scale": 0.22,
        "logit_divisor": 16.0,
    },
    # the defaults of transformers' Phi3Config, window from huggingface.co/microsoft/Phi-3-mini-4k-instruct; 3,821,079,552
    "phi-3-mini": {
        "family": "phi3", "vocab": 32064, "hidden": 3072, "layers": 32, "heads": 32, "kv_heads": 32, "intermediate": 8192, "norm_eps": 1e-5,
        "window": 2047,
    },
    # huggingface.co/mistralai/Mixtral-8x7B-v0.1 config.json; 46,702,792,704, of which a token meets 12,879,925,248
    "mixtral-8x7b": {
        "family": "mixtral", "vocab": 32000, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "intermediate": 14336, "norm_eps": 1e-5,
        "experts": 8, "experts_per_token": 2, "rope": {"theta": 1_000_000.0},
    },
    # huggingface.co/Qwen/Qwen3-30B-A3B-Base config.json; 30,532,122,624, of which a token meets 3,353,032,704
    "qwen3-30b-a3b": {
        "family": "qwen3_moe", "vocab": 151936, "hidden": 2048, "layers": 48, "heads": 32, "kv_heads": 4, "head_dim": 128, "intermediate": 6144,
        "norm_eps": 1e-6, "experts": 128, "experts_per_token": 8, "expert_intermediate": 768, "renormalise": True, "rope": {"theta": 1_000_000.0},
    },
    # huggingface.co/allenai/OLMoE-1B-7B-0924 config.json; 6,919,161,856, of which a token meets 1,282,017,280
    "olmoe-1b-7b": {
        "family": "olmoe", "vocab": 50304, "hidden": 2048, "layers": 16, "heads": 16, "kv_heads": 16, "intermediate": 1024, "norm_eps": 1e-5,
        "experts": 64, "experts_per_token": 8,
    },
    # huggingface.co/deepseek-ai/DeepSeek-V3-Base config.json, without its module of multi-token prediction; 671,026,404,352, of which a token meets
    # 37,552,282,624
    "deepseek-v3": {
        "family": "deepseek_v3", "vocab": 129280, "hidden": 7168, "layers": 61, "heads": 128, "head_dim": 192, "intermediate": 18432, "norm_eps": 1e-6,
        "q_rank": 1536, "kv_rank": 512, "rope_head_dim": 64, "value_head_dim": 128, "experts": 256, "experts_per_token": 8,
        "expert_intermediate": 2048, "groups": 8, "groups_per_token": 4, "routed_scale": 2.5, "moe_layers": [False] * 3 + [True] * 58,
        "rope": {
            "kind": "yarn", "theta": 10_000.0, "factor": 40.0, "original_positions": 4096, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    # the defaults of transformers' Mistral4Config = the language model of huggingface.co/mistralai/Mistral-Small-4-119B-2603; 118,972,826,624, of
    # which a token meets 6,632,588,288
    "mistral-small-4": {
        "family": "mistral4", "vocab": 131072, "hidden": 4096, "layers": 36, "heads": 32, "head_dim": 128, "intermediate": 12288, "norm_eps": 1e-6,
        "q_rank": 1024, "kv_rank": 256, "rope_head_dim": 64, "value_head_dim": 128, "experts": 128, "experts_per_token": 4, "expert_intermediate": 2048,
        "rope": {
            "kind": "yarn", "theta": 10_000.0, "factor": 128.0, "original_positions": 8192, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "query_beta": 0.1,
        },
    },
    # huggingface.co/openai/gpt-oss-20b config.json, as if its experts were not in mxfp4; 20,914,757,184, of which a token meets 4,187,440,704 (3.61 G
    # without the embedding, as its authors count)
    "gpt-oss-20b": {
        "family": "gpt_oss", "vocab": 201088, "hidden": 2880, "layers": 24, "heads": 64, "kv_heads": 8, "head_dim": 64, "intermediate": 2880,
        "window": 128, "experts": 32, "experts_per_token": 4, "rope": _GPT_OSS_ROPE,
    },
    # huggingface.co/openai/gpt-oss-120b config.json, likewise; 116,829,156,672, of which a token meets 5,711,982,912
    "gpt-oss-120b": {
        "family": "gpt_oss", "vocab": 201088, "hidden": 2880, "layers": 36, "heads": 64, "kv_heads": 8, "head_dim": 64, "intermediate": 2880,
        "window": 128, "experts": 128, "experts_per_token": 4, "rope": _GPT_OSS_ROPE,
    },
    # huggingface.co/Qwen/Qwen3-1.7B config.json (as keras/qwen3_1.7b_en repeats it); 1,720,574,976
    "qwen3-1.7b": {
        "family": "qwen3", "vocab": 151936, "hidden": 2048, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128, "intermediate": 6144,
        "tied": True, "norm_eps": 1e-6, "rope": {"theta": 1_000_000.0},
    },
    # huggingface.co/Qwen/Qwen3-4B config.json (as MultiRL/qwen3_4b_instruct_sft repeats it); 4,022,468,096
    "qwen3-4b": {
        "family": "qwen3", "vocab": 151936, "hidden": 2560, "layers": 36, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 9728,
        "tied": True, "norm_eps": 1e-6, "rope": {"theta": 1_000_000.0},
    },
    # huggingface.co/Qwen/Qwen3-14B config.json (as AI-Hypercomputer/maxtext qwen3-14b.yml repeats it); 14,768,307,200
    "qwen3-14b": {
        "family": "qwen3", "vocab": 151936, "hidden": 5120, "layers": 40, "heads": 40, "kv_heads": 8, "head_dim": 128, "intermediate": 17408,
        "norm_eps": 1e-6, "rope": {"theta": 1_000_000.0},
    },
    # huggingface.co/Qwen/Qwen3-32B config.json (as AI-Hypercomputer/maxtext qwen3-32b.yml repeats it); 32,762,123,264
    "qwen3-32b": {
        "family": "qwen3", "vocab": 151936, "hidden": 5120, "layers": 64, "heads": 64, "kv_heads": 8, "head_dim": 128, "intermediate": 25600,
        "norm_eps": 1e-6, "rope": {"theta": 1_000_000.0},
    },
    # huggingface.co/Qwen/Qwen3-235B-A22B config.json (as Ascend/MindSpeed-RL qwen3_235b_a22b.yaml and maxtext repeat it); 235,093,634,560, of which
    # a token meets 22,190,763,520
    "qwen3-235b-a22b": {
        "family": "qwen3_moe", "vocab": 151936, "hidden": 4096, "layers": 94, "heads": 64, "kv_heads": 4, "head_dim": 128, "intermediate": 12288,
        "norm_eps": 1e-6, "experts": 128, "experts_per_token": 8, "expert_intermediate": 1536, "renormalise": True, "rope": {"theta": 1_000_000.0},
    },
    # huggingface.co/mistralai/Mistral-7B-Instruct-v0.3 config.json at c170c708; 7,248,023,552
    "mistral-7b-v0.3": {
        "family": "mistral", "vocab": 32768, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 14336,
        "norm_eps": 1e-5, "rope": {"theta": 1_000_000.0},
    },
    # The language models of Gemma 3: transformers' convert_gemma3_weights.py, and the 64 rows that it adds to the embedding for images; 3,880,263,168
    "gemma-3-4b": {
        "family": "gemma3_text", "vocab": 262208, "hidden": 2560, "layers": 34, "heads": 8, "kv_heads": 4, "head_dim": 256, "intermediate": 10240,
        "norm_eps": 1e-6, "window": 1024, "rope": {"kind": "linear", "theta": 1_000_000.0, "factor": 8.0}, "rope_local": {"theta": 10_000.0},
    },
    # as gemma-3-4b; 11,766,034,176
    "gemma-3-12b": {
        "family": "gemma3_text", "vocab": 262208, "hidden": 3840, "layers": 48, "heads": 16, "kv_heads": 8, "head_dim": 256, "intermediate": 15360,
        "norm_eps": 1e-6, "window": 1024, "rope": {"kind": "linear", "theta": 1_000_000.0, "factor": 8.0}, "rope_local": {"theta": 10_000.0},
    },
    # as gemma-3-4b; 27,009,346,304
    "gemma-3-27b": {
        "family": "gemma3_text", "vocab": 262208, "hidden": 5376, "layers": 62, "heads": 32, "kv_heads": 16, "head_dim": 128, "intermediate": 21504,
        "norm_eps": 1e-6, "window": 1024, "attention_scale": 168**-0.5,
        "rope": {"kind": "linear", "theta": 1_000_000.0, "factor": 8.0}, "rope_local": {"theta": 10_000.0},
    },
    # allenai/OLMo-core's olmo2_13B with the released vocabulary of olmo-2-7b; 13,716,198,400
    "olmo-2-13b": {
        "family": "olmo2", "vocab": 100352, "hidden": 5120, "layers": 40, "heads": 40, "kv_heads": 40, "intermediate": 13824, "norm_eps": 1e-6,
        "rope": {"theta": 500_000.0},
    },
    # allenai/OLMo-core's olmo2_32B, likewise; 32,234,279,936
    "olmo-2-32b": {
        "family": "olmo2", "vocab": 100352, "hidden": 5120, "layers": 64, "heads": 40, "kv_heads": 8, "intermediate": 27648, "norm_eps": 1e-6,
        "rope": {"theta": 500_000.0},
    },
    # huggingface.co/allenai/Olmo-3-1025-7B config.json (as mlx-community/Olmo-3-7B-RLZero-Code-4bit and tiny-random/olmo-3 repeat it); 7,298,011,136
    "olmo-3-7b": {
        "family": "olmo3", "vocab": 100278, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "intermediate": 11008, "norm_eps": 1e-6,
        "window": 4096, "rope": _OLMO3_ROPE, "rope_local": {"theta": 500_000.0},
    },
    # huggingface.co/allenai/Olmo-3.1-32B-Instruct config.json (as AI-Hypercomputer/maxtext olmo3_32b.yml repeats it); 32,233,522,176
    "olmo-3-32b": {
        "family": "olmo3", "vocab": 100278, "hidden": 5120, "layers": 64, "heads": 40, "kv_heads": 8, "intermediate": 27648, "norm_eps": 1e-6,
        "window": 4096, "rope": _OLMO3_ROPE, "rope_local": {"theta": 500_000.0},
    },
    # huggingface.co/utter-project/EuroLLM-9B-Instruct config.json (as stelterlab's AWQ repeats it); 9,152,319,488
    "eurollm-9b": {
        "family": "llama", "vocab": 128000, "hidden": 4096, "layers": 42, "heads": 32, "kv_heads": 8, "intermediate": 12288, "norm_eps": 1e-5,
        "rope": {"theta": 10_000.0},
    },
    # huggingface.co/utter-project/EuroLLM-22B-2512's card; its 56 layers are 54 by arXiv:2602.05879 (two reviews of it: 54, 22.639 G); 22,637,328,384
    "eurollm-22b": {
        "family": "llama", "vocab": 128000, "hidden": 6144, "layers": 54, "heads": 48, "kv_heads": 8, "intermediate": 16384, "norm_eps": 1e-5,
        "rope": {"theta": 1_000_000.0},
    },
    # arXiv:2509.14233 table 1 (80 layers of 8192 and 43008, 64 heads, 8 of keys), the rest as apertus-8b; 70,599,864,480
    "apertus-70b": {
        "family": "apertus", "vocab": 131072, "hidden": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "intermediate": 43008, "norm_eps": 1e-5,
        "rope": {**_LLAMA3_ROPE, "theta": 12_000_000.0, "factor": 8.0},
    },
    # huggingface.co/OpenLLM-France/Lucie-7B config.json (as huihui-ai/Lucie-7B-Instruct-abliterated repeats it); 6,706,958,336
    "lucie-7b": {
        "family": "llama", "vocab": 65024, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 12288,
        "norm_eps": 1e-5, "rope": {"theta": 20_000_000.0},
    },
    # huggingface.co/kyutai/helium-1-2b, a Llama by its config.json (as the port for NeuronX Distributed Inference repeats it); 2,023,868,416
    "helium-1-2b": {
        "family": "llama", "vocab": 64000, "hidden": 2048, "layers": 28, "heads": 16, "kv_heads": 8, "head_dim": 128, "intermediate": 8192,
        "norm_eps": 1e-8, "rope": {"theta": 20_000.0},
    },
    # huggingface.co/sapienzanlp/Minerva-7B-base-v1.0 config.json at 2f96047b; 7,399,018,496
    "minerva-7b": {
        "family": "mistral", "vocab": 51200, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 14336,
        "norm_eps": 1e-5, "rope": {"theta": 10_000.0},
    },
    # huggingface.co/openGPT-X/Teuken-7B-instruct-research-v0.4 config.json (as PrunaAI's 8 bit repeats it); 7,452,725,248
    "teuken-7b": {
        "family": "llama", "vocab": 250680, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 2, "head_dim": 128, "intermediate": 13440,
        "tied": True, "norm_eps": 1e-5, "rope": {"theta": 10_000.0},
    },
    # The language model of huggingface.co/Hcompany/Holo2-4B, that of Qwen3-VL-4B (AI-Hypercomputer/maxtext qwen3-vl-4b.yml); 4,022,468,096
    "holo-2-4b": {
        "family": "qwen3", "vocab": 151936, "hidden": 2560, "layers": 36, "heads": 32, "kv_heads": 8, "head_dim": 128, "intermediate": 9728,
        "tied": True, "norm_eps": 1e-6, "rope": {"theta": 5_000_000.0},
    },
}  # fmt: skip
