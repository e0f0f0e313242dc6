"""The recipes of open models: what is known of each is whole and true, texts keep their comments, and every recipe plans where its page says."""

import json
import math
import time
import tomllib

import pytest
from programs import program

from gigatrain import architectures, catalog, load
from gigatrain.architectures import Architecture, Rope
from gigatrain.errors import PlanError, RecipeError
from gigatrain.planning.plan import plan

ROOT = load.shipped("recipes")
MODELS = list(catalog.models(ROOT))
# What does not fit on a site, and is shown so on the model's page: an MI250X's half has 64 GiB.
TOO_LARGE = {("deepseek-v3/pretrain", "lumi"), ("deepseek-v3/lora", "lumi")}


@pytest.fixture(scope="module")
def pages():
    return program("benchmarks/recipes.py")


def test_the_models_that_were_asked_for_are_there():
    asked = (
        "llama-3.1-8b llama-3.1-70b llama-3.1-405b qwen3-0.6b qwen3-1.7b qwen3-4b qwen3-8b qwen3-14b qwen3-32b mistral-7b-v0.3 mistral-small-4 gemma-3-27b "
        "olmo-2-7b olmo-3-7b smollm3-3b eurollm-9b eurollm-22b apertus-8b apertus-70b lucie-7b helium-1-2b minerva-7b teuken-7b holo-2-4b mixtral-8x7b "
        "qwen3-30b-a3b qwen3-235b-a22b olmoe-1b-7b deepseek-v3 gpt-oss-20b gpt-oss-120b"
    )
    assert set(asked.split()) <= set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_the_size_that_it_says_and_each_of_its_recipes_is_one(model):
    known = catalog.facts(ROOT, model)
    shape = Architecture.model_validate_json(json.dumps(architectures.resolve(model)))
    assert shape.parameters() == known.parameters[0]
    assert known.licence
    assert known.sources
    for task in known.tasks:
        recipe = load.recipe(f"{model}/{task}")
        numbers = known.changes[task].get("model.architecture", ({"base": model}, ""))[0]
        assert numbers["base"] == model
        assert set(numbers) <= {"base", "vocab", "rope"}
        assert load.architecture(recipe.model) == shape.model_copy(
            update={"vocab": numbers.get("vocab", shape.vocab), "rope": Rope.model_validate(numbers.get("rope", shape.rope))}
        )
        assert task == "pretrain" or "rope" not in numbers, "weights have the rope that they were released with"
        assert recipe.name == f"{model}-{task}"
        if task != "pretrain":
            assert recipe.model.source in (known.weights, known.chat)
            assert load.positions(recipe.model) == known.positions
        tree = tomllib.loads(text := load.recipe_text(f"{model}/{task}"))
        assert all(text.count(f"[{table}]") == 1 for table in tree if isinstance(tree[table], dict))
        for key, (value, source) in known.changes[task].items():
            assert source, f"{model}/{task}: {key} has no source"
            found = tree
            for part in key.split("."):
                found = found[part]
            assert found == value


@pytest.mark.parametrize("model", MODELS)
def test_what_is_counted_in_steps_fits_the_run_and_rates_the_size(model):
    known, recipes = catalog.facts(ROOT, model), {task: load.recipe(f"{model}/{task}") for task in catalog.facts(ROOT, model).tasks}
    for task, recipe in recipes.items():
        steps = recipe.train.steps or math.ceil((recipe.train.tokens or 0) / (recipe.train.batch * recipe.train.sequence))
        assert recipe.schedule.warmup <= 0.15 * steps, task
        assert recipe.checkpoint.every == "auto" or recipe.checkpoint.every < steps, task
        assert recipe.validation.every < steps, task
    peak, floor = recipes["pretrain"].optim.lr, recipes["pretrain"].schedule.floor
    assert recipes["continue"].optim.lr <= peak * max(floor, 0.1) * 1.001
    size = known.parameters[0]
    for task, most in (
        ("lora", 1e-4 if size >= 30e9 else 2e-4),
        ("dpo", 2e-7 if size >= 65e9 else 5e-7),
        ("sft", 2e-6 if size >= 65e9 else 1e-5),
    ):
        assert recipes[task].optim.lr <= most, task
    assert size < 100e9 or recipes["lora"].optim.lr <= 5e-5
    assert load.recipe(f"{model}/dpo", ["objective.kind=simpo"]).objective.strength == 2.0
    assert recipes["dpo"].objective.strength == 0.1


@pytest.mark.parametrize("model", MODELS)
def test_the_commands_of_a_recipes_head_are_recipes(model):
    for task in catalog.facts(ROOT, model).tasks:
        for line in load.recipe_text(f"{model}/{task}").splitlines():
            if line.startswith("#   gigatrain train ") and "--set" in line:
                given = [one.split()[0] for one in line.split("--set ")[1:]]
                recipe = load.recipe(f"{model}/{task}", given)
                if "data.sources.0.kind=jsonl" in given:  # conversations are in `messages`, whatever the dataset of the recipe calls them
                    assert recipe.data.sources[0].field in ("text", "messages")


# Rows of the weights that a task starts from, and the highest id that its tokenizer writes: the template's tokens and ends included. Of config.json and
# tokenizer files at the hub, where a review or an issue repeats them.
PAIRS = {
    "minerva-7b": (51_200, 51_202),  # Minerva-7B-instruct-v1.0: vocab_size 51,264, eos 51,202
    "gemma-3-1b": (262_144, 262_143),  # the image token, 262,144, is written by nothing: transformers issue 37011
    "helium-1-2b": (64_000, 64_001),  # 64,000 and chatml's two
}


@pytest.mark.parametrize("model", PAIRS)
def test_a_chat_tokenizer_has_rows_for_all_that_it_writes(model):
    rows, highest = PAIRS[model]
    assert architectures.resolve(model)["vocab"] == rows
    for task in ("sft", "lora", "dpo"):
        recipe = load.recipe(f"{model}/{task}")
        shape = load.architecture(recipe.model)
        assert shape.vocab > highest
        grows = shape.vocab > rows
        assert not grows or recipe.adapter is None or (recipe.adapter.train_embeddings and recipe.adapter.train_head)


@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_plans_on_its_sites(pages, model):
    """Without a network, without torch, and fast: memory and mesh are judged, what comes of it is on the pages."""
    for task in catalog.facts(ROOT, model).tasks:
        recipe = load.recipe(f"{model}/{task}")
        for name in (*pages.SITES, "aion"):
            site = load.site(name)
            if (f"{model}/{task}", name) in TOO_LARGE:
                with pytest.raises(PlanError, match="the run needs"):
                    plan(recipe, site, pages.ranks(recipe, site, task), forecast=False)
            else:
                plan(recipe, site, pages.ranks(recipe, site, task), forecast=False)


@pytest.mark.parametrize("model", ["lucie-7b", pytest.param("all", marks=pytest.mark.long)])
def test_pages_are_what_the_command_writes(pages, model):
    began = time.process_time()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == pages.index()
    for name in MODELS if model == "all" else [model]:
        assert (ROOT / name / "README.md").read_text(encoding="utf-8") == pages.page(name), "python benchmarks/recipes.py --write"
    assert time.process_time() - began < 60


def test_one_line_changes_and_the_others_stay():
    text = 'name = "a" # first\n\n[train]\nsteps = 3 # why\n# of the batch\nbatch = 4\n\n[optim]\nlr = 1e-3\n'
    assert catalog.changed(text, "train.steps", 5, "a paper") == text.replace("steps = 3 # why", "steps = 5  # a paper")
    assert tomllib.loads(catalog.changed(text, "train.seed", 7))["train"] == {"steps": 3, "batch": 4, "seed": 7}
    assert tomllib.loads(catalog.changed(text, "mesh.tensor", 2))["mesh"] == {"tensor": 2}
    assert tomllib.loads(catalog.changed(text, "name", "b"))["name"] == "b"
    assert tomllib.loads(catalog.changed(text, "summary", "b"))["summary"] == "b"


def test_a_tree_survives_toml():
    tree = {"a": 1, "b": [True, 2.5, 'x"y\n'], "t": {"u": {"v": -3}, "w": [{"k": "é"}]}, "e": 10**13}
    assert tomllib.loads(catalog.dumps(tree)) == tree
    with pytest.raises(RecipeError, match="TOML has no word for None"):
        catalog.toml([None])


def test_a_slip_in_what_is_known_of_a_model_is_named(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    text = (ROOT / "lucie-7b" / "model.toml").read_text()
    for broken, said in (
        (text.replace("licence =", "license ="), "license is no key of a model"),
        (text.replace('title = "Lucie 7B"\n', ""), "KeyError.*title.*a model needs"),
        (text + '\n[sft]\n"optim.lr" = 1e-5\n', "a task pairs of a value and its source"),
        ("a = [", "cannot be read"),
    ):
        (folder / "model.toml").write_text(broken)
        with pytest.raises(RecipeError, match=said):
            catalog.facts(tmp_path, "mine")


def test_a_file_stands_above_what_would_be_made(tmp_path, monkeypatch):
    import shutil

    shutil.copytree(ROOT, tmp_path / "recipes")
    (tmp_path / "recipes" / "lucie-7b" / "sft.toml").write_text(load.recipe_text("lucie-7b/sft").replace("lucie-7b-sft", "by-hand"))
    monkeypatch.setattr(load, "shipped", lambda kind: tmp_path / kind)
    assert load.recipe("lucie-7b/sft").name == "by-hand"
    assert load.known().count("lucie-7b/sft") == 1


def test_a_name_that_is_none_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match=r'did you mean "lucie-7b/sft"\? `gigatrain recipes` lists'):
        load.recipe("lucie-7/sft")
    with pytest.raises(RecipeError, match=r"called .lucie-7b/rl."):
        load.recipe("lucie-7b/rl")
