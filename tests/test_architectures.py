"""The numbers of every architecture: counted exactly, refused with a way out, and the same through config.json and back."""

import json
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from gigatrain.architectures import FAMILIES, Architecture, Rope, from_hf_config, named, resolve, to_hf_config
from gigatrain.errors import RecipeError

TINY: dict[str, Any] = {"vocab": 64, "hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 48}
LLAMA3 = {"kind": "llama3", "theta": 5e5, "factor": 8.0, "original_positions": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"kind": "yarn", "factor": 4.0, "original_positions": 4096}
LATENT: dict[str, Any] = {
    "experts": 8, "experts_per_token": 3, "head_dim": 20, "kv_heads": 4, "kv_rank": 16, "rope_head_dim": 8, "value_head_dim": 10,
}  # fmt: skip
NEEDS: dict[str, dict[str, Any]] = {
    "ministral3": {"rope": YARN | {"query_beta": 0.1}},
    "mixtral": {"experts": 4, "experts_per_token": 2},
    "qwen3_moe": {"experts": 8, "experts_per_token": 3},
    "olmoe": {"experts": 8, "experts_per_token": 3},
    "gpt_oss": {"experts": 8, "experts_per_token": 3},
    "deepseek_v3": LATENT,
    "mistral4": LATENT | {"rope": YARN | {"query_beta": 0.1}},
}
LONG = {"kind": "longrope", "factor": 2.0, "original_positions": 32, "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0], "partial": 0.5}

VARIANTS: list[dict[str, Any]] = [
    *({"family": family} for family in FAMILIES),
    {"family": "llama", "qkv_bias": True, "output_bias": True, "mlp_bias": True, "tied": True, "rope": LLAMA3, "head_dim": 16},
    {"family": "llama", "rope": YARN | {"beta_fast": 16.0, "truncate": False, "attention_factor": 1.5}},
    {"family": "mistral", "window": 7, "rope": {"kind": "linear", "factor": 2.0}},
    {"family": "ministral", "window": 7, "window_layers": [True, False]},
    {"family": "qwen2", "window": 7, "window_layers": [False, False, True, True]},
    {"family": "qwen3", "qkv_bias": True, "output_bias": True},
    {"family": "gemma2", "window": 7, "attention_softcap": 50.0, "logit_softcap": 30.0, "attention_scale": 224**-0.5, "tied": False},
    {"family": "gemma3_text", "window": 7, "window_layers": [True, False], "rope": {"theta": 1e6}, "rope_local": {"theta": 1e4}},
    {"family": "olmo3", "window": 7, "rope": YARN, "rope_local": {}},
    {"family": "smollm3", "rope_layers": [True, False]},
    {"family": "helium", "qkv_bias": True, "mlp_bias": True},
    {"family": "granite", "attention_scale": 0.01, "embedding_scale": 12.0, "residual_scale": 0.22, "logit_divisor": 8.0},
    {"family": "phi3", "window": 7, "rope": {"partial": 0.5}},
    {"family": "phi3", "rope": LONG},
    {"family": "arcee", "mlp_bias": True},
    {"family": "mixtral", "window": 7},
    {"family": "olmoe", "renormalise": True, "qkv_bias": True, "output_bias": True},
    {
        "family": "deepseek_v3",
        "q_rank": 12,
        "groups": 4,
        "groups_per_token": 2,
        "moe_layers": [False, False, True, True],
        "expert_intermediate": 12,
    },
    {
        "family": "deepseek_v3",
        "shared_experts": 2,
        "routed_scale": 2.5,
        "renormalise": False,
        "rope_interleaved": False,
        "qkv_bias": True,
        "output_bias": True,
    },
    {"family": "deepseek_v3", "rope": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    {"family": "mistral4", "q_rank": 12, "groups": 2, "groups_per_token": 1, "moe_layers": [False, True, True, True]},
    {"family": "gpt_oss", "window": 7, "window_layers": [True, False], "rope": YARN | {"truncate": False}},
    {"family": "gpt_oss", "qkv_bias": False, "output_bias": False, "expert_bias": True, "tied": True},
    {
        "family": "qwen3_moe",
        "expert_intermediate": 12,
        "renormalise": True,
        "moe_layers": [False, True],
        "window": 7,
        "qkv_bias": True,
        "output_bias": True,
    },
]


def make(**numbers: Any) -> Architecture:
    """Through JSON, as recipes do."""
    table = TINY | NEEDS.get(numbers.get("family", ""), {}) | numbers
    return Architecture.model_validate_json(json.dumps(table))


@pytest.mark.parametrize("numbers", VARIANTS, ids=lambda n: "-".join(n.values() if len(n) == 1 else [n["family"], *list(n)[1:]]))
def test_config_json_there_and_back(numbers: dict[str, Any]) -> None:
    arch = make(**numbers)
    config = json.loads(json.dumps(to_hf_config(arch, bos=1, eos=[2, 3], pad=None, max_positions=64)))
    assert from_hf_config(config) == arch
    assert Architecture.model_validate_json(arch.model_dump_json()) == arch


@pytest.mark.parametrize("name", named())
def test_named_models_count_as_transformers_does(name: str) -> None:
    import transformers

    arch = Architecture.model_validate_json(json.dumps(resolve(name)))
    config = to_hf_config(arch, bos=1, eos=2, pad=None, max_positions=131072)
    assert from_hf_config(config) == arch
    count = 1 + (arch.moe_layers.index(True) if arch.moe_layers else 1)  # the last layer is as all that are left out
    few = arch.model_copy(
        update={"layers": count}
        | {name: pattern and pattern[:count] for name in ("window_layers", "moe_layers") if (pattern := getattr(arch, name)) or True}
    )
    small: dict[str, Any] = config | {"num_hidden_layers": count}
    small |= {"layer_types": config["layer_types"][:count]} if "layer_types" in config else {}
    with torch.device("meta"):  # by the class itself: the Auto classes do not know mistral4
        model = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**small))
    assert few.parameters() == sum(p.numel() for p in model.parameters())
    per_layer = sum(p.numel() for p in model.model.layers[-1].parameters())
    assert arch.parameters() == few.parameters() + (arch.layers - count) * per_layer


PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-2b": 2_614_341_888,
    "smollm2-135m": 134_515_008,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmoe-1b-7b": 6_919_161_856,
    "deepseek-v3": 671_026_404_352,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "apertus-8b": 8_053_338_176,
    "phi-3-mini": 3_821_079_552,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_models_have_the_published_size(name: str) -> None:
    assert Architecture.model_validate_json(json.dumps(resolve(name))).parameters() == PUBLISHED[name]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        RecipeError, match=r"no architecture is called 'llama3-8b'; did you mean .*llama-3\.1-8b.* as a table \[model\.architecture\]"
    ):
        resolve("llama3-8b")
    with pytest.raises(RecipeError, match=r"no architecture is called 'zzz'; there are apertus-70b, apertus-8b, deepseek-v3, eurollm-22b"):
        resolve("zzz")


def test_a_named_table_may_be_changed_without_changing_the_name() -> None:
    resolve("llama-3.1-8b")["rope"]["factor"] = 99.0
    assert resolve("llama-3.1-8b")["rope"]["factor"] == 8.0


def test_defaults_follow_the_family() -> None:
    llama, gemma, qwen = make(family="llama"), make(family="gemma3_text", window=8), make(family="qwen3")
    assert (llama.norm, llama.placement, llama.tied, llama.head_dim) == ("llama", "pre", False, 8)
    assert (gemma.norm, gemma.placement, gemma.tied, gemma.embedding_factor) == ("gemma", "sandwich", True, 32**0.5)
    assert [gemma.window_of(i) for i in range(4)] == [8, 8, 8, 8]  # five of six
    assert qwen.qk_norm == "head"
    assert make(family="mistral", window=8).window_layers == (True,) * 4
    alone = Architecture.model_validate({"family": "llama", "vocab": 8, "hidden": 12, "layers": 1, "heads": 3, "intermediate": 4})
    assert (alone.kv_heads, alone.head_dim) == (3, 4)


def test_patterns_repeat_over_the_layers() -> None:
    arch = make(family="smollm3", layers=5, rope_layers=[True, False])
    assert [arch.rope_of(i) is not None for i in range(5)] == [True, False, True, False, True]
    arch = make(family="gemma3_text", layers=5, window=3, window_layers=[True, False], rope_local={"theta": 5.0})
    assert [arch.window_of(i) for i in range(5)] == [3, None, 3, None, 3]
    assert [arch.rope_of(i).theta for i in range(5)] == [5.0, 1e4, 5.0, 1e4, 5.0]  # type: ignore[union-attr]


def test_flops_of_llama_by_hand() -> None:
    arch = make(family="llama")
    matrices = 4 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    assert arch.matrix_parameters() == matrices
    assert arch.flops_per_token(10) == 6 * (matrices + 64 * 32) + 12 * 32 * 4 * 5.5


def test_of_the_experts_those_that_a_token_visits_are_computed() -> None:
    arch = make(family="qwen3_moe", moe_layers=[True, False], expert_intermediate=20)
    attention, dense, router, expert = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48, 8 * 32, 3 * 32 * 20
    assert arch.matrix_parameters() == 4 * attention + 2 * dense + 2 * (router + 8 * expert)
    assert arch.matrix_parameters(routed=False) == 4 * attention + 2 * dense
    assert (arch.router_parameters(), arch.expert_parameters()) == (2 * router, 2 * 8 * expert)
    assert arch.active_parameters() == arch.parameters() - 2 * 5 * expert
    assert arch.flops_per_token(1) == 6 * (4 * attention + 2 * dense + 2 * (router + 3 * expert) + 64 * 32) + 12 * 4 * 32
    assert make(family="llama").active_parameters() == make(family="llama").parameters()


def test_latent_attention_by_hand() -> None:
    arch = make(
        family="deepseek_v3",
        q_rank=12,
        shared_experts=2,
        expert_intermediate=20,
        groups=4,
        groups_per_token=2,
        moe_layers=[False] + [True] * 3,
    )
    latents, heads = 32 * (12 + 16 + 8), 4 * (12 * 20 + 16 * (12 + 10) + 10 * 32)
    attention, dense, router, expert = latents + heads, 3 * 32 * 48, 8 * 32, 3 * 32 * 20
    assert (arch.latent_parameters(), arch.attention_parameters()) == (latents, attention)
    assert arch.matrix_parameters() == 4 * attention + dense + 3 * (router + (8 + 2) * expert)
    assert arch.flops_per_token(1) == 6 * (4 * attention + dense + 3 * (router + (3 + 2) * expert) + 64 * 32) + 6 * 4 * (20 + 10) * 4
    assert arch.active_parameters() == arch.parameters() - 3 * 5 * expert


def test_a_stretched_context_sharpens_latent_attention_alone() -> None:
    stretched = YARN | {"mscale": 1.0, "mscale_all_dim": 1.3}
    arch = make(family="deepseek_v3", rope=stretched)
    assert arch.scale == pytest.approx(20**-0.5 * (0.1 * 1.3 * math.log(YARN["factor"]) + 1) ** 2, rel=1e-15)
    assert make(family="llama", rope=stretched).scale == 8**-0.5


def test_a_window_costs_what_it_sees() -> None:
    whole, windowed = make(family="mistral"), make(family="mistral", window=4)
    seen = sum(min(i, 4) for i in range(1, 11)) / 10
    assert windowed.flops_per_token(10) == pytest.approx(whole.flops_per_token(10) - 12 * 32 * 4 * (5.5 - seen))
    assert windowed.flops_per_token(3) == whole.flops_per_token(3)
    with pytest.raises(ValueError, match="sequence 0 must be at least 1"):
        whole.flops_per_token(0)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3; choose a kv_heads that divides it"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"hidden": 33}, "hidden 33 is not a multiple of heads 4, as llama requires"),
        ({"layers": 0}, "greater than or equal to 1"),
        ({"width": 3}, "Extra inputs are not permitted"),
        ({"vocab": "64"}, "valid integer"),
        ({"qk_norm": "head"}, "qk_norm 'head': llama has 'none'; drop it, or choose family apertus or gemma3_text or qwen3"),
        ({"window": 8}, "window 8: llama has None; drop it, or choose family gemma2"),
        ({"attention_softcap": 5.0}, "attention_softcap 5.0: llama has None; drop it, or choose family gemma2"),
        ({"qkv_bias": True}, "qkv_bias True and output_bias False: llama has both or neither; set them alike"),
        ({"rope": {"partial": 0.5}}, "rope.partial 0.5: llama rotates whole heads; drop it, or choose family phi3"),
        ({"rope": {"kind": "ntk"}}, "'default', 'linear', 'llama3', 'yarn' or 'longrope'"),
        ({"rope": {"kind": "llama3", "factor": 8.0}}, "kind 'llama3' needs high_freq_factor, low_freq_factor, original_positions"),
        (
            {"rope": {"factor": 8.0}},
            "kind 'default' does not read factor; remove them, or choose kind linear or llama3 or longrope or yarn",
        ),
        ({"rope": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor 1.0 must be above low_freq_factor 1.0"),
        ({"family": "helium", "head_dim": 16}, "heads * head_dim 64 is not hidden 32, as helium requires"),
        ({"family": "phi3", "rope": LLAMA3}, "rope.kind 'llama3': phi3 has default and longrope only"),
        ({"family": "phi3", "rope": {"partial": 0.4}}, "rope.partial 0.4 of head_dim 8 rotates 3 channels"),
        ({"family": "phi3", "rope": LONG | {"partial": 1.0}}, "rope.short_factor has 2 numbers, one for each of 4 channel pairs"),
        ({"family": "ministral3", "rope": {}}, "rope.query_beta is missing: ministral3 always scales queries"),
        ({"family": "qwen2", "window_layers": [True]}, "`window` and `window_layers` go together"),
        ({"family": "qwen2", "window": 3, "window_layers": [True] * 5}, "has 5 entries for 4 layers; give between 1 and 4"),
        ({"family": "gemma3_text", "rope_local": {}}, "`rope_local` is for the layers with a window, and there is none"),
        ({"family": "gemma2", "attention_scale": 0.3}, "attention_scale 0.3 is not n ** -0.5 for a whole n, as gemma2 requires"),
        ({"family": "smollm3", "rope_layers": [False]}, "`rope_layers` leaves no layer with positions"),
        (
            {"experts": 4, "experts_per_token": 2},
            "experts 4: llama has 0; drop it, or choose family deepseek_v3 or gpt_oss or mistral4 or mixtral or olmoe or qwen3_moe",
        ),
        ({"family": "mixtral", "experts": 0}, "experts is missing: mixtral always has them; give `experts` and `experts_per_token`"),
        ({"family": "mixtral", "experts_per_token": 5}, "experts_per_token 5 of 4 experts; give a number between 1 and 4"),
        ({"family": "mixtral", "renormalise": False}, "renormalise False: mixtral has True"),
        ({"family": "qwen3_moe", "moe_layers": [False]}, "`moe_layers` leaves no layer with experts"),
        ({"family": "olmoe", "head_dim": 4}, "heads * head_dim 16 is not hidden 32, as olmoe requires"),
        (
            {"family": "olmoe", "expert_intermediate": 4},
            "expert_intermediate 4: olmoe has None; drop it, or choose family deepseek_v3 or mistral4 or qwen3_moe",
        ),
        ({"family": "deepseek_v3", "kv_rank": None}, "kv_rank is missing: deepseek_v3 always has latent attention; give it"),
        ({"family": "deepseek_v3", "kv_heads": 2}, "kv_heads 2: latent attention has keys and values for each of 4 heads; leave it out"),
        ({"family": "deepseek_v3", "rope_head_dim": 20}, "rope_head_dim 20 of head_dim 20: choose an even number below it"),
        (
            {"family": "deepseek_v3", "groups": 3},
            "groups 3 of 8 experts: a group is scored by its best two; choose a divisor up to half of them",
        ),
        (
            {"family": "deepseek_v3", "groups": 4},
            "groups_per_token 1 of 4 groups reaches 2 experts, and a token visits 3; choose between 2 and 4",
        ),
        ({"family": "deepseek_v3", "shared_experts": 0}, "shared_experts 0: deepseek_v3 always has some; give 1 or more"),
        ({"family": "deepseek_v3", "moe_layers": [True, False]}, "`moe_layers` of deepseek_v3 can only leave out the first layers"),
        ({"family": "deepseek_v3", "correction_bias": False}, "correction_bias False: deepseek_v3 has True"),
        (
            {"family": "mistral4", "correction_bias": True},
            "correction_bias True: mistral4 has False; drop it, or choose family deepseek_v3",
        ),
        ({"family": "mistral4", "rope": {}}, "rope.query_beta is missing: mistral4 always scales queries"),
        ({"family": "gpt_oss", "sinks": False}, "sinks False: gpt_oss has True"),
        ({"sinks": True}, "sinks True: llama has False; drop it, or choose family gpt_oss"),
    ],
)
def test_refuses(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make(**({"family": "llama"} | numbers))
    assert message in str(caught.value)


def test_is_frozen() -> None:
    with pytest.raises(ValidationError):
        make(family="llama").layers = 3  # type: ignore[misc]


def test_has_a_json_schema() -> None:
    schema = Architecture.model_json_schema()
    assert {"family", "vocab", "hidden", "layers", "heads", "intermediate"} <= set(schema["required"])
    assert all("description" in schema["properties"][key] for key in ("tied", "window", "rope", "qk_norm"))


# ---- config.json as it is found ----

LLAMA_JSON = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip


def test_reads_version_4_files() -> None:
    assert from_hf_config(LLAMA_JSON) == Architecture.model_validate_json(json.dumps(resolve("llama-3.1-8b")))


def test_reads_a_version_4_gemma_3() -> None:
    config = {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "head_dim": 256,
        "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "attn_logit_softcapping": None, "final_logit_softcapping": None, "max_position_embeddings": 32768,
    }  # fmt: skip
    assert from_hf_config(config) == Architecture.model_validate_json(json.dumps(resolve("gemma-3-1b")))


def test_reads_early_phi_3_files() -> None:
    config = {
        "model_type": "phi3", "vocab_size": 32064, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, "rope_theta": 1e4, "sliding_window": 2047,
        "embd_pdrop": 0.0, "resid_pdrop": 0.0, "auto_map": {"AutoConfig": "x"},
    }  # fmt: skip
    arch = from_hf_config(config)
    assert (arch.rope.kind, arch.rope.factor, arch.rope.original_positions, arch.window) == ("longrope", 32.0, 4096, 2047)


def test_old_files_get_the_defaults_of_their_class() -> None:
    bare = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    arch = from_hf_config(bare)
    assert (arch.kv_heads, arch.norm_eps, arch.rope, arch.tied) == (4, 1e-6, Rope(), False)
    arch = from_hf_config(bare | {"model_type": "gemma2", "num_key_value_heads": 2})
    assert (arch.window, arch.logit_softcap, arch.attention_softcap, arch.head_dim, arch.tied) == (4096, 30.0, 50.0, 256, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "grok"}, "model_type 'grok' is not implemented; there are llama, mistral"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not implemented for llama"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not implemented for llama; it must be silu or swish"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not implemented"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "rope parameter mrope_section is not implemented for llama"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}}, "rope parameter llama_4_scaling_beta is not implemented for llama"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not implemented"),
        ({"num_local_experts": 8}, "num_local_experts = 8 is not implemented"),
        ({"clip_qkv": 8.0}, "clip_qkv = 8.0 is not implemented"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2 is not implemented"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"num_key_value_heads": 5}, "describes no llama that can be built: model: Value error, heads 32 is not a multiple of kv_heads 5"),
    ],
)  # fmt: skip
def test_refuses_what_is_not_implemented(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        from_hf_config(LLAMA_JSON | change)
    assert message in str(caught.value)


def test_reads_what_authors_write_beside_transformers_keys() -> None:
    """DeepSeek's file has keys of its first code, gpt-oss's those of its own; each with one value that is implemented."""
    deepseek = to_hf_config(
        Architecture.model_validate_json(json.dumps(resolve("deepseek-v3"))), bos=0, eos=1, pad=None, max_positions=163840
    )
    theirs = {
        "ep_size": 1,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
        "aux_loss_alpha": None,
    }
    rope = deepseek.pop("rope_parameters")
    old = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {**rope, "type": rope.pop("rope_type")}}
    assert from_hf_config(deepseek | theirs | old) == Architecture.model_validate_json(json.dumps(resolve("deepseek-v3")))
    for key, value in (("moe_layer_freq", 2), ("scoring_func", "softmax"), ("topk_method", "greedy")):
        with pytest.raises(RecipeError, match=f"{key} = {value!r} is not implemented for deepseek_v3; it must be"):
            from_hf_config(deepseek | theirs | old | {key: value})
    oss = to_hf_config(Architecture.model_validate_json(json.dumps(resolve("gpt-oss-20b"))), bos=0, eos=1, pad=None, max_positions=131072)
    assert from_hf_config(oss | {"experts_per_token": 4, "initial_context_length": 4096}).experts == 32
    with pytest.raises(RecipeError, match=r"swiglu_limit = 9\.0 is not implemented for gpt_oss; it must be 7\.0"):
        from_hf_config(oss | {"swiglu_limit": 9.0})
    with pytest.raises(RecipeError, match="quantization_config"):
        from_hf_config(oss | {"quantization_config": {"quant_method": "mxfp4"}})
    mistral = to_hf_config(make(family="mistral4"), bos=1, eos=2, pad=None, max_positions=64)
    with pytest.raises(RecipeError, match=r"partial_rotary_factor 0\.5 of a head of 20 is not qk_rope_head_dim 8; make it 0\.4"):
        from_hf_config(mistral | {"rope_parameters": mistral["rope_parameters"] | {"partial_rotary_factor": 0.5}})


def test_bare_files_of_new_families_get_the_defaults_of_their_class() -> None:
    import transformers

    for family in ("OlmoeConfig", "DeepseekV3Config", "Mistral4Config", "GptOssConfig"):
        config = getattr(transformers, family)()
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "model_type",
        )
        bare = {key: getattr(config, key) for key in sizes}
        assert from_hf_config(bare) == from_hf_config(config.to_dict()), family


def test_refuses_what_is_not_implemented_in_other_families() -> None:
    gemma = to_hf_config(make(family="gemma2", window=4), bos=1, eos=2, pad=0, max_positions=64)
    with pytest.raises(RecipeError, match="use_bidirectional_attention = True is not implemented for gemma2"):
        from_hf_config(gemma | {"use_bidirectional_attention": True})
    with pytest.raises(RecipeError, match="layer_types chunked_attention is not implemented"):
        from_hf_config(gemma | {"layer_types": ["chunked_attention"] * 4})
    gemma3 = to_hf_config(make(family="gemma3_text"), bos=1, eos=2, pad=0, max_positions=64)
    with pytest.raises(RecipeError, match=r"attn_logit_softcapping = 50\.0 is not implemented for gemma3_text"):
        from_hf_config(gemma3 | {"attn_logit_softcapping": 50.0})
