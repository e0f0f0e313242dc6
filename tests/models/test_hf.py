"""Weights to transformers and back: bitwise, sharded, refused by name."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from families import SIZES, VARIANTS, build, load
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gigatrain.architectures import from_hf_config, language, to_hf_config
from gigatrain.errors import CheckpointError
from gigatrain.models import hf
from gigatrain.models.decoder import Decoder

STACKED = ["deepseek-v3", "mistral4", "gpt-oss"]


def export(decoder: Decoder, folder: Path, **kwargs) -> None:
    config = to_hf_config(decoder.arch, bos=1, eos=2, pad=None, max_positions=64, dtype="float32")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    hf.save_weights(decoder, decoder.arch, folder, **kwargs)


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Decoder, Path]:
    model = build("llama")
    decoder = Decoder(from_hf_config(model.config.to_dict()))
    decoder.load_state_dict(hf.from_hf(model.state_dict(), decoder.arch))
    export(decoder, tmp_path / "export")
    return decoder, tmp_path / "export"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / hf.SINGLE)
    change(tensors)
    save_file(tensors, folder / hf.SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize("name", VARIANTS)
def test_reads_and_writes_what_transformers_does(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "theirs")
    arch = from_hf_config(hf.read_config(tmp_path / "theirs"))
    with torch.device("meta"):
        decoder = Decoder(arch)
    decoder.to_empty(device="cpu")
    hf.load_weights(decoder, tmp_path / "theirs")
    export(decoder, tmp_path / "ours")

    theirs, ours = load_file(tmp_path / "theirs" / hf.SINGLE), load_file(tmp_path / "ours" / hf.SINGLE)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert from_hf_config(hf.read_config(tmp_path / "ours")) == arch

    again, notes = load(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(0, arch.vocab, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "apertus", "phi3", "olmo2", "mixtral", "qwen3-moe-mixed", *STACKED])
def test_names_there_and_back(name: str) -> None:
    decoder = Decoder(from_hf_config(build(name).config.to_dict()))
    decoder.init_weights(0.02, False, 0)
    state = decoder.state_dict()
    back = hf.from_hf(hf.to_hf(state, decoder.arch), decoder.arch)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["llama-tied-mha", "phi3", "apertus", "mixtral", "gpt-oss"])
def test_shards_hold_the_same(name: str, tmp_path: Path) -> None:
    decoder = Decoder(from_hf_config(build(name).config.to_dict()))
    decoder.init_weights(0.02, False, 0)
    export(decoder, tmp_path / "one")
    export(decoder, tmp_path / "many", max_shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (tmp_path / "many" / hf.SINGLE).exists()
    other = Decoder(decoder.arch)
    hf.load_weights(other, tmp_path / "many")
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), decoder.parameters(), strict=True))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_later_export_replaces_an_earlier_one(llama, tmp_path: Path) -> None:
    decoder, folder = llama
    export(decoder, folder, max_shard_bytes=20_000)
    assert not (folder / hf.SINGLE).exists()
    decoder.init_weights(0.02, False, 9)
    export(decoder, folder)
    assert not (folder / hf.INDEX).exists()
    other = Decoder(decoder.arch)
    hf.load_weights(other, folder)
    assert torch.equal(other.lm_head.weight, decoder.lm_head.weight)
    assert not list(folder.glob("*.tmp"))


def test_metadata_is_kept(llama) -> None:
    decoder, folder = llama
    hf.save_weights(decoder, decoder.arch, folder, metadata={"run": "abc"})
    with safe_open(folder / hf.SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "run": "abc"}


def test_weights_are_cast_to_the_model(llama) -> None:
    decoder, folder = llama
    other = Decoder(decoder.arch).bfloat16()
    hf.load_weights(other, folder)
    assert torch.equal(other.lm_head.weight, decoder.lm_head.weight.bfloat16())


def test_a_tied_head_in_the_file_is_accepted(tmp_path: Path) -> None:
    decoder = Decoder(from_hf_config(build("llama-tied-mha").config.to_dict()))
    decoder.init_weights(0.02, False, 0)
    export(decoder, tmp_path / "x")
    rewrite(tmp_path / "x", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    other = Decoder(decoder.arch)
    hf.load_weights(other, tmp_path / "x")
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_refuses_a_missing_tensor(llama) -> None:
    decoder, folder = llama
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        hf.load_weights(decoder, folder)


def test_refuses_a_missing_and_an_unexpected_expert(tmp_path: Path) -> None:
    decoder = Decoder(from_hf_config(build("qwen3-moe").config.to_dict()))
    decoder.init_weights(0.02, False, 0)
    export(decoder, tmp_path)
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.mlp.experts.8.up_proj.weight": torch.zeros(24, 48)}))
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.0\.mlp\.experts\.8\.up_proj\.weight, for which a qwen3_moe"):
        hf.load_weights(decoder, tmp_path)
    gone = "model.layers.1.mlp.experts.3.gate_proj.weight"
    rewrite(tmp_path, lambda t: (t.pop("model.layers.0.mlp.experts.8.up_proj.weight"), t.pop(gone)))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight"):
        hf.load_weights(decoder, tmp_path)
    state = hf.to_hf(decoder.state_dict(), decoder.arch)
    del state[gone]
    with pytest.raises(CheckpointError, match=r"the state lacks experts of model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        hf.from_hf(state, decoder.arch)


def test_experts_of_gpt_oss_are_turned_and_paired_on_disk() -> None:
    """Row by row, so that the two transposes are not each other's mistake."""
    decoder = Decoder(from_hf_config(build("gpt-oss").config.to_dict()))
    decoder.init_weights(0.02, False, 0)
    memory = decoder.state_dict()
    disk, layer = hf.to_hf(memory, decoder.arch), "model.layers.1.mlp"
    ours, theirs = memory[f"{layer}.experts.gate_up_proj"], disk[f"{layer}.experts.gate_up_proj"]
    width = decoder.arch.expert_width
    assert torch.equal(theirs[2, :, 2 * 7], ours[2, 7])  # the gate of channel 7
    assert torch.equal(theirs[2, :, 2 * 7 + 1], ours[2, width + 7])  # and its up
    assert torch.equal(disk[f"{layer}.experts.gate_up_proj_bias"][2, 2 * 7 + 1], memory[f"{layer}.experts.gate_up_proj_bias"][2, width + 7])
    assert torch.equal(disk[f"{layer}.experts.down_proj"][2], memory[f"{layer}.experts.down_proj"][2].t())
    assert torch.equal(disk[f"{layer}.router.bias"], memory[f"{layer}.gate.bias"])


def test_layers_of_multi_token_prediction_are_passed_over(tmp_path: Path) -> None:
    decoder = Decoder(from_hf_config(build("deepseek-v3").config.to_dict()))
    decoder.init_weights(0.02, False, 0)
    export(decoder, tmp_path)
    rewrite(
        tmp_path, lambda t: t.update({"model.layers.2.eh_proj.weight": torch.zeros(48, 96), "model.layers.2.enorm.weight": torch.ones(48)})
    )
    other = Decoder(decoder.arch)
    hf.load_weights(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), decoder.parameters(), strict=True))
    gone = "model.layers.1.mlp.gate.e_score_correction_bias"
    rewrite(tmp_path, lambda t: t.pop(gone))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.gate\.e_score_correction_bias"):
        hf.load_weights(other, tmp_path)


def test_refuses_an_unexpected_tensor(llama) -> None:
    decoder, folder = llama
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}))
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.0\.self_attn\.q_proj\.bias, for which a llama"):
        hf.load_weights(decoder, folder)


def test_refuses_another_shape_and_writes_nothing(llama) -> None:
    decoder, folder = llama
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.zeros(3)}))
    before = [p.clone() for p in decoder.parameters()]
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[3\] in .*, but \[48\] by the architecture's numbers"):
        hf.load_weights(decoder, folder)
    assert all(torch.equal(a, b) for a, b in zip(before, decoder.parameters(), strict=True))


def test_refuses_pickles(llama) -> None:
    decoder, folder = llama
    (folder / hf.SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"only as pickle \(pytorch_model\.bin\).*convert it to safetensors first"):
        hf.load_weights(decoder, folder)


def test_refuses_a_folder_without_weights(llama) -> None:
    decoder, folder = llama
    (folder / hf.SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        hf.load_weights(decoder, folder)


def test_refuses_a_torn_file(llama) -> None:
    decoder, folder = llama
    whole = (folder / hf.SINGLE).read_bytes()
    (folder / hf.SINGLE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        hf.load_weights(decoder, folder)


def test_refuses_a_shard_that_is_gone(llama) -> None:
    decoder, folder = llama
    export(decoder, folder, max_shard_bytes=20_000)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-.* is missing, though the index names it"):
        hf.load_weights(decoder, folder)


def test_refuses_another_xielu() -> None:
    arch = from_hf_config(build("apertus").config.to_dict())
    with pytest.raises(CheckpointError, match=r"act_fn\.beta is \[0\.75\], but only 0\.5 is implemented"):
        hf.from_hf({"model.layers.0.mlp.act_fn.beta": torch.tensor(0.75)}, arch)


def test_read_config_refuses_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"holds list instead of a table"):
        hf.read_config(tmp_path)


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hf.locate(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match=r"there is no folder .*/nowhere/at/all, and it is no hub name"):
        hf.locate(tmp_path / "nowhere" / "at" / "all")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"there is no folder owner/model; to fetch it from the hub: pip install huggingface_hub"):
        hf.locate("owner/model")


def both_of_sight(kind):
    """A tiny model that also sees, of transformers' real classes: (whole, its language model's config.json)."""
    if kind == "gemma3":
        text = {**SIZES, "head_dim": 16, "sliding_window": 5, "num_hidden_layers": 6, "query_pre_attn_scalar": 16}
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        return transformers.Gemma3ForConditionalGeneration(config)
    text = {**SIZES, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [3, 3, 2], "mrope_interleaved": True}}
    vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 48, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_vl"])
def test_the_language_model_of_one_that_also_sees_is_read_alone(kind, tmp_path):
    whole = both_of_sight(kind).eval()
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    config = language(hf.read_config(tmp_path))
    assert config is not None
    arch = from_hf_config(config)
    ours = Decoder(arch)
    hf.load_weights(ours, tmp_path)
    tokens = torch.arange(3, 41).view(2, 19)
    torch.testing.assert_close(ours.logits(tokens), whole(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
    assert language(json.loads(whole.config.to_json_string()) | {"text_config": {"model_type": "mamba"}}) is None
