"""Weights under other numbers than their own are refused by name, and an embedding grows where the recipe asks for more rows."""

import json

import pytest
import tokenizers
import torch
from families import build
from safetensors.torch import load_file

from gigatrain import architectures, load
from gigatrain.architectures import Architecture, from_hf_config, to_hf_config
from gigatrain.errors import CheckpointError
from gigatrain.models import grown, hf, starting
from gigatrain.models.decoder import Decoder
from gigatrain.planning.plan import plan


@pytest.fixture
def weights(tmp_path):
    build("llama").save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def planned(folder, tmp_path, numbers, *more):
    """A recipe whose table says `numbers` of the weights in the folder."""
    table = json.loads(from_hf_config(hf.read_config(folder)).model_dump_json()) | numbers
    tree = {
        "name": "x", "model": {"architecture": table, "from": str(folder)}, "tokenizer": {"from": "not-read"},
        "data": {"sources": [{"kind": "text", "path": str(tmp_path)}]}, "train": {"steps": 2, "sequence": 16, "batch": 2, "precision": "fp32"},
        "optim": {"lr": 1e-3},
    }  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(tree))
    return plan(load.recipe(tmp_path / "x.json", more), load.site("laptop"))


def vocab(folder):
    return hf.read_config(folder)["vocab_size"]


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"norm_eps": 3e-4}, r"norm_eps: \S+ in its config.json, 0.0003 in the recipe"),
        ({"rope": {"theta": 123.0}}, r"rope.theta: .* in its config.json, 123.0 in the recipe[\s\S]*model.rope"),
        (
            {
                "rope": {
                    "kind": "llama3",
                    "theta": 1e4,
                    "factor": 8.0,
                    "original_positions": 8,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                }
            },
            "rope.factor",
        ),
    ],
)
def test_a_number_that_no_shape_shows_is_refused(weights, tmp_path, numbers, said):
    with pytest.raises(CheckpointError, match=said):
        starting.check(planned(weights, tmp_path, numbers))


def test_equal_numbers_pass_and_model_rope_is_said(weights, tmp_path):
    same = {"vocab": vocab(weights)}
    assert starting.check(planned(weights, tmp_path, same)) == []
    (line,) = starting.check(planned(weights, tmp_path, same, "model.rope={ theta = 777.0 }"))
    assert "rope.theta 777.0, by model.rope" in line


def test_another_family_a_window_that_cuts_and_keys_that_are_not_read(weights, tmp_path):
    config = hf.read_config(weights)
    (weights / "config.json").write_text(json.dumps(config | {"something_new": 3}))
    (line,) = starting.check(planned_with(weights, tmp_path, config))
    assert "something_new = 3, which is not compared" in line
    (weights / "config.json").write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": 4}))
    with pytest.raises(CheckpointError, match=r"family: mistral in its config.json, llama in the recipe\n  window: 4 in its"):
        starting.check(planned_with(weights, tmp_path, config))
    (weights / "config.json").unlink()
    (line,) = starting.check(planned_with(weights, tmp_path, config))
    assert "has no config.json" in line


def planned_with(folder, tmp_path, config):
    """As `planned`, by numbers that the folder's config.json had before."""
    kept = tmp_path / "before"
    kept.mkdir(exist_ok=True)
    (kept / "config.json").write_text(json.dumps(config))
    found = planned(kept, tmp_path, {})
    return found.model_copy(update={"source": str(folder)})


def test_more_rows_are_said_and_an_adapter_must_train_them(weights, tmp_path):
    more = {"vocab": vocab(weights) + 3}
    (line,) = starting.check(planned(weights, tmp_path, more))
    assert "3 new rows" in line
    adapter = ["adapter.rank=2"]
    with pytest.raises(CheckpointError, match="the 3 new rows as they begin"):
        starting.check(planned(weights, tmp_path, more, *adapter))
    starting.check(planned(weights, tmp_path, more, *adapter, "adapter.train_embeddings=true", "adapter.train_head=true"))


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_whatever_the_box(weights, tied):
    arch = from_hf_config(hf.read_config(weights))
    stored = load_file(weights / "model.safetensors")
    arch = Architecture.model_validate_json(json.dumps(json.loads(arch.model_dump_json()) | {"vocab": arch.vocab + 5, "tied": tied}))
    with torch.device("meta"):
        shapes = {name: tuple(one.shape) for name, one in Decoder(arch).named_parameters()}
    whole = dict(hf.read_weights(arch, shapes, weights, grow=True))
    for name in grown.NAMES[: 1 if tied else 2]:
        old = stored[name]
        assert torch.equal(whole[name][:-5], old)
        torch.testing.assert_close(whole[name][-5:], old.float().mean(0).expand(5, -1).to(old.dtype))
        rows, width = whole[name].shape
        for box in (((rows - 7, 3), (6, 9)), ((rows - 2, 0), (2, width)), ((2, 1), (4, 4)), ((0, 0), (0, width))):
            found = dict(hf.read_weights(arch, shapes, weights, boxes={name: box}, grow=True))
            assert (name in found) == (0 not in box[1])
            assert name not in found or torch.equal(found[name], whole[name][hf.cut_of(*box)])
    reader = hf.reader(arch, shapes, weights)
    assert torch.equal(reader(grown.NAMES[0]), whole[grown.NAMES[0]])
    with pytest.raises(CheckpointError, match="by the architecture's numbers"):
        next(hf.read_weights(arch, shapes, weights))


def test_fewer_rows_than_the_weights_have_are_refused_with_the_number(weights):
    arch = from_hf_config(hf.read_config(weights))
    count = arch.vocab
    arch = arch.model_copy(update={"vocab": count - 2})
    with torch.device("meta"):
        shapes = {name: tuple(one.shape) for name, one in Decoder(arch).named_parameters()}
    with pytest.raises(CheckpointError, match=rf"--set model.architecture.vocab={count}"):
        next(hf.read_weights(arch, shapes, weights, grow=True))


@pytest.mark.parametrize("name", architectures.named())
def test_a_default_that_is_written_and_one_that_is_not_are_equal(name):
    """Every named architecture against its own config.json, whole and with the defaults of its rope left out."""
    ours = Architecture.model_validate_json(json.dumps(architectures.resolve(name)))
    config = to_hf_config(ours, bos=1, eos=2, pad=None, max_positions=4096)
    assert list(starting.differences(ours, from_hf_config(config))) == []
    for key in ("rope_parameters", "rope_scaling"):
        for rope in (config.get(key) or {}, (config.get(key) or {}).get("full_attention", {})):
            if rope.get("beta_fast") == 32.0 and "mscale" not in rope:
                for default in ("beta_fast", "beta_slow", "attention_factor"):
                    rope.pop(default, None)
    assert list(starting.differences(ours, from_hf_config(config))) == []
    other = ours.model_copy(update={"norm_eps": ours.norm_eps * 10})
    assert [key for key, *_ in starting.differences(ours, other)] == ["norm_eps"]


def test_the_language_model_of_a_config_that_leaves_its_class_s_defaults_out():
    """As google/gemma-3-4b-pt's, whose text_config has six keys."""
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }  # fmt: skip
    theirs = from_hf_config(architectures.language({"model_type": "gemma3", "text_config": text}) or {})
    ours = Architecture.model_validate_json(json.dumps(architectures.resolve("gemma-3-4b")))
    assert list(starting.differences(ours, theirs)) == []


def test_a_tokenizer_of_other_ids_than_the_weights_own_is_said(tmp_path):
    def kept(name, *words):
        (tmp_path / name).mkdir()
        ids = {word: number for number, word in enumerate(words)}
        path = tmp_path / name / "tokenizer.json"
        tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=words[0])).save(str(path))
        return tmp_path / name

    own, same, more, other = (
        kept("own", "u", "a", "b"),
        kept("same", "u", "a", "b"),
        kept("more", "u", "a", "b", "c"),
        kept("other", "u", "b", "c"),
    )
    assert starting.other_tokens(None, own) == starting.other_tokens(str(tmp_path / "bare"), own) == []
    assert starting.other_tokens(str(own), same) == starting.other_tokens(str(own), more) == []
    (said,) = starting.other_tokens(str(own), other)
    assert "2 of the 3 tokens" in said
    assert f'set tokenizer.from = "{own}"' in said
    (own / "tokenizer.json").write_text("{")
    (said,) = starting.other_tokens(str(own), other)
    assert f"{own / 'tokenizer.json'} cannot be read" in said
