"""`gigatrain recipes`: what it lists, finds, copies and writes, through the command itself."""

import json
import tomllib

import pytest

from gigatrain import architectures, catalog, load, shelf
from gigatrain.architectures import Architecture, to_hf_config
from gigatrain.cli import main
from gigatrain.errors import RecipeError


def said(capsys, *words):
    main(["recipes", *words])
    return capsys.readouterr().out


def refused(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main(["recipes", *words])
    assert left.value.code == 2
    return capsys.readouterr().err


def test_the_list_has_a_line_for_each_model_and_json_a_row_for_each_recipe(capsys):
    lines = said(capsys).splitlines()
    assert len(lines) == len(load.recipes()) + len(catalog.models(load.shipped("recipes")))
    (lucie,) = [line for line in lines if line.startswith("lucie-7b ")]
    assert lucie.split() == ["lucie-7b", "6,706,958,336", "FR", "Apache", "2.0", *catalog.TASKS]
    rows = {row["name"]: row for row in json.loads(said(capsys, "--json"))}
    assert set(rows) == set(load.known())
    assert rows["deepseek-v3/pretrain"]["active"] == 37_552_282_624
    assert rows["olmo-2-7b/pretrain"]["tokens"] == 3_900_000_000_000
    assert rows["quickstart"]["tokens"] == 600 * 8 * 256
    assert said(capsys, "list") == "\n".join(lines) + "\n"


def test_search_takes_every_word(capsys):
    found = [line.split()[0] for line in said(capsys, "search", "FR", "pretrain", "apache").splitlines()]
    assert {"lucie-7b/pretrain", "mistral-7b-v0.3/pretrain"} <= set(found)
    assert "helium-1-2b/pretrain" not in found  # CC BY-SA
    assert "teuken-7b/pretrain" not in found  # of a Fraunhofer institute
    assert {row["family"] for row in json.loads(said(capsys, "search", "qwen3_moe", "--json"))} == {"qwen3_moe"}
    for words in (("french", "sft"), ("Europe", "lora", "lucie"), ("german", "dpo"), ("swiss", "70b"), ("italian", "pretrain")):
        assert said(capsys, "search", *words)
    assert "lucie-7b/sft" in said(capsys, "search", "french", "sft")
    assert "qwen" not in said(capsys, "search", "europe")
    assert 'did you mean "mixtral' in refused(capsys, "search", "mixtrl")
    assert "not all in one" in refused(capsys, "search", "lucie", "OLMo")


def test_a_copy_is_the_text_with_its_comments_and_stands_for_itself(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(capsys, "copy", "lucie-7b/sft").strip() == "lucie-7b-sft.toml"
    text = (tmp_path / "lucie-7b-sft.toml").read_text()
    assert text == load.recipe_text("lucie-7b/sft")
    assert "# arXiv:2411.15124" in text
    assert load.recipe("lucie-7b-sft.toml") == load.recipe("lucie-7b/sft")
    said(capsys, "copy", "quickstart", "mine.toml")
    assert load.recipe("mine.toml") == load.recipe("quickstart")
    for task in catalog.TASKS:
        said(capsys, "copy", f"gpt-oss-20b/{task}-tiny", f"{task}.toml")
        assert load.recipe(f"{task}.toml") == load.recipe(f"gpt-oss-20b/{task}-tiny")
    assert "is there already" in refused(capsys, "copy", "quickstart", "mine.toml")
    assert "is a folder; give the file" in refused(capsys, "copy", "quickstart", str(tmp_path))
    assert "cannot be written: No such file" in refused(capsys, "copy", "quickstart", "no/such/folder.toml")
    assert 'did you mean "lucie-7b/sft"' in refused(capsys, "copy", "lucie-7b/stf")


def folder(path, config, card=""):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if card:
        (path / "README.md").write_text(card)
    return path


@pytest.mark.parametrize("name", ["qwen3-0.6b", "gpt-oss-20b", "olmo-3-7b", "deepseek-v3"])
def test_a_config_of_ours_becomes_a_recipe_of_the_same_numbers(capsys, tmp_path, name):
    numbers = Architecture.model_validate_json(json.dumps(architectures.resolve(name)))
    odd = numbers.model_copy(update={"vocab": 1000})
    for given, out in ((numbers, "named.toml"), (odd, "odd.toml")):
        source = folder(
            tmp_path / f"My Model {out}", to_hf_config(given, bos=1, eos=2, pad=None, max_positions=777), "---\nlicense: apache-2.0\n---\n"
        )
        line = said(capsys, "from-hub", str(source), "--task", "lora", "-o", str(tmp_path / out))
        assert f"{given.parameters():,} parameters" in line
        recipe = load.recipe(tmp_path / out)
        assert load.architecture(recipe.model) == given
        assert recipe.model.source == str(source)
        assert recipe.model.positions == 777
        assert recipe.adapter is not None
        assert "(Apache 2.0)" in (tmp_path / out).read_text()
    assert tomllib.loads((tmp_path / "named.toml").read_text())["model"]["architecture"] == name


def test_a_short_base_gets_short_samples_and_a_wrong_type_one_reason(capsys, tmp_path):
    numbers = Architecture.model_validate_json(json.dumps(architectures.resolve("lucie-7b") | {"layers": 3}))
    config = to_hf_config(numbers, bos=1, eos=2, pad=None, max_positions=64)
    source = folder(tmp_path / "short", config)
    for task in catalog.TASKS:
        path, _ = shelf.from_hub(str(source), task, tmp_path / f"{task}.toml")
        assert load.recipe(path).train.sequence == 64
    wrong = folder(tmp_path / "wrong", config | {"num_hidden_layers": "three"})
    said_of_it = refused(capsys, "from-hub", str(wrong), "-o", str(tmp_path / "c.toml"))
    assert "layers" in said_of_it
    assert "default factory" not in said_of_it
    assert len(said_of_it) < 400
    bare = tmp_path / "bare.toml"
    bare.write_text((tmp_path / "sft.toml").read_text().partition("[model.architecture]")[0] + "[tokenizer]\nfrom = 'x'\n[data]\n"
                    "sources = [{ kind = 'stdlib' }]\n[train]\nsteps = 1\nsequence = 8\nbatch = 1\n[optim]\nlr = 1e-3\n")  # fmt: skip
    assert load.recipe(bare).model.architecture is None
    with pytest.raises(RecipeError, match=r"has vocab and neither `family` nor `base`.*from-hub .*short. writes them out"):
        load.recipe(bare, ["model.architecture.vocab=514"])


@pytest.mark.parametrize("task", catalog.TASKS)
def test_every_task_can_be_written_for_it(tmp_path, task):
    numbers = Architecture.model_validate_json(json.dumps(architectures.resolve("lucie-7b") | {"layers": 3}))
    source = folder(tmp_path / "three", to_hf_config(numbers, bos=1, eos=2, pad=None, max_positions=64))
    path, found = shelf.from_hub(str(source), task, tmp_path / "a.toml")
    assert found == numbers
    recipe = load.recipe(path)
    assert load.architecture(recipe.model) == numbers
    assert recipe.name == f"three-{task}"
    assert "my.toml-tiny" not in path.read_text()
    assert "README" not in path.read_text()


def test_another_model_type_is_built_from_its_own_file_if_it_can_be(capsys, tmp_path):
    gpt2 = {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "vocab_size": 128,
        "architectures": ["GPT2LMHeadModel"],
    }
    source = folder(tmp_path / "gpt2", gpt2)
    line = said(capsys, "from-hub", str(source), "--task", "pretrain", "-o", str(tmp_path / "a.toml"))
    assert "transformers' GPT2LMHeadModel" in line
    recipe = load.recipe(tmp_path / "a.toml")
    assert recipe.model.architecture is None
    assert recipe.model.fresh
    assert said(capsys, "from-hub", str(source), "-o", str(tmp_path / "b.toml"))
    assert not load.recipe(tmp_path / "b.toml").model.fresh
    for config, why in (
        (gpt2 | {"auto_map": {"AutoConfig": "x.Y"}}, "code of its own"),
        ({"model_type": "llama", "hidden_size": 8}, "config.json lacks"),
        (gpt2 | {"quantization_config": {"bits": 4}}, "quantized"),
    ):
        bad = folder(tmp_path / f"bad-{len(why)}", config)
        assert why in refused(capsys, "from-hub", str(bad), "-o", str(tmp_path / "c.toml"))
        assert not (tmp_path / "c.toml").exists()
    assert "there is no folder" in refused(capsys, "from-hub", str(tmp_path / "absent"))
    with pytest.raises(RecipeError, match="not of our families"):
        shelf.from_hub(str(source), "sft", tmp_path / "d.toml")


def test_of_a_model_that_also_sees_it_takes_the_language_model(capsys, tmp_path):
    text = to_hf_config(
        Architecture.model_validate_json(json.dumps(architectures.resolve("gemma-3-4b"))), bos=2, eos=1, pad=0, max_positions=131072
    )
    source = folder(tmp_path / "sees", {"model_type": "gemma3", "text_config": text, "vision_config": {}, "tie_word_embeddings": True})
    assert "gemma3_text, 3,880,263,168 parameters" in said(capsys, "from-hub", str(source), "-o", str(tmp_path / "a.toml"))
    assert "The language model alone" in (tmp_path / "a.toml").read_text()
    assert tomllib.loads((tmp_path / "a.toml").read_text())["model"]["architecture"] == "gemma-3-4b"
