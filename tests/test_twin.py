"""The -tiny twins: the same shape of everything by rule, and each family trains, saves, resumes bitwise, and is exported as transformers computes it."""

import datetime
import json
import random

import pytest
import twins

from gigatrain import architectures, catalog, load, twin
from gigatrain.architectures import Architecture

ROOT = load.shipped("recipes")
# One of each family that has recipes, the one whose shape is the oddest.
FAMILIES = {
    "llama": "teuken-7b", "qwen3": "qwen3-0.6b", "mistral": "mistral-7b-v0.3", "gemma3_text": "gemma-3-27b", "olmo2": "olmo-2-32b", "olmo3": "olmo-3-32b",
    "smollm3": "smollm3-3b", "apertus": "apertus-70b", "mixtral": "mixtral-8x7b", "qwen3_moe": "qwen3-30b-a3b", "olmoe": "olmoe-1b-7b",
    "deepseek_v3": "deepseek-v3", "mistral4": "mistral-small-4", "gpt_oss": "gpt-oss-20b",
}  # fmt: skip


def both(name):
    whole = architectures.resolve(name)
    return (Architecture.model_validate_json(json.dumps(numbers)) for numbers in (whole, twin.architecture(whole)))


def test_every_family_with_recipes_has_a_twin_that_is_trained():
    found = {architectures.resolve(model)["family"] for model in catalog.models(ROOT)}
    assert found == set(FAMILIES)


@pytest.mark.parametrize("name", architectures.named())
def test_a_twin_has_the_shape_of_the_whole(name):
    whole, small = both(name)
    assert small.parameters() < 4_000_000
    for key in ("family", "tied", "norm", "placement", "qk_norm", "activation", "qkv_bias", "output_bias", "mlp_bias", "sinks", "scoring", "groups",
                "groups_per_token", "shared_experts", "renormalise", "routed_scale", "correction_bias", "router_bias", "expert_bias", "embedding_scale",
                "residual_scale", "logit_divisor", "attention_softcap", "logit_softcap", "rope_interleaved", "rope_fp32"):  # fmt: skip
        assert getattr(small, key) == getattr(whole, key), key
    assert small.heads // small.kv_heads == whole.heads // whole.kv_heads
    assert small.rope.kind == whole.rope.kind
    assert (small.rope_local is None) == (whole.rope_local is None)
    for key in ("window", "kv_rank", "q_rank", "window_layers", "rope_layers", "moe_layers"):
        assert (getattr(small, key) is None) == (getattr(whole, key) is None), key
    for key in ("window_of", "sparse_of", "rope_of"):  # every kind of layer there is, and in the same order
        kinds = [[bool(getattr(one, key)(i)) for i in range(one.layers)] for one in (whole, small)]
        assert set(kinds[0]) == set(kinds[1]), key
    if not whole.kv_rank:  # how wide the heads are against the stream, and the feed-forward against it
        assert small.heads * small.head_dim / small.hidden == pytest.approx(whole.heads * whole.head_dim / whole.hidden, rel=0.35)
    assert small.intermediate / small.hidden == pytest.approx(whole.intermediate / whole.hidden, rel=0.2)
    if whole.experts:
        assert 1 < (small.experts_per_token or 0) <= (whole.experts_per_token or 0)
        assert (small.experts_per_token or 0) < small.experts


def test_a_twin_keeps_what_the_task_is():
    for task in catalog.TASKS:
        whole, small = load.recipe(f"lucie-7b/{task}"), load.recipe(f"lucie-7b/{task}-tiny")
        assert (small.objective, small.adapter, small.loss) == (whole.objective, whole.adapter, whole.loss)
        assert small.data.packing == whole.data.packing
        assert small.optim.name == whole.optim.name
        assert small.schedule.kind == whole.schedule.kind
        assert small.model.source is None
        assert (small.data.sources[0].format == "text") == (whole.data.sources[0].format == "text")
    assert load.recipe("deepseek-v3/pretrain-tiny").loss.router_bias_rate == 1e-3
    assert load.recipe("qwen3-0.6b/dpo-tiny").optim.lr == 5e-6  # and not 4.9999999999999996e-06


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("twins")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_lives(family, tmp_path, data):
    assert "resumed bitwise" in twins.lives(f"{FAMILIES[family]}/continue-tiny", tmp_path, data)  # whose rope is stretched


@pytest.mark.parametrize("task", ["continue", "sft", "lora", "dpo"])
def test_a_task_lives(task, tmp_path, data):
    assert "resumed bitwise" in twins.lives(f"qwen3-0.6b/{task}-tiny", tmp_path, data)


EACH_DAY = 5  # of all twins, about 3 s each; `python benchmarks/recipes.py --twins` trains every one


def of_day(day):
    """The twins of a day: all of them in an order that mixes models and tasks, five a day, so that every one has its turn within six weeks."""
    everyone = [f"{model}/{task}{catalog.TWIN}" for model in catalog.models(ROOT) for task in catalog.facts(ROOT, model).tasks]
    random.Random(0).shuffle(everyone)
    return [everyone[(EACH_DAY * day + i) % len(everyone)] for i in range(EACH_DAY)]


def test_every_twin_has_its_day():
    everyone = {name for name in load.known() if "/" in name}
    days = -(-len(everyone) // EACH_DAY)
    assert days <= 42
    for first in (0, 739_000):
        assert {name.removesuffix(catalog.TWIN) for day in range(first, first + days) for name in of_day(day)} == everyone


@pytest.mark.long
def test_the_twins_of_the_day_live(tmp_path, data):
    day = datetime.datetime.now(datetime.UTC).toordinal()
    for name in of_day(day):
        print(f"day {day}: {name}: {twins.lives(name, tmp_path / name.replace('/', '-'), data)}")
