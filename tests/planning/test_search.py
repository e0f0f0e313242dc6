"""The search against every layout played by events, and its candidates against the plan."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from gigatrain import load
from gigatrain.architectures import Architecture
from gigatrain.errors import PlanError
from gigatrain.planning import expect, top
from gigatrain.planning.estimate import candidates, layouts, search
from gigatrain.planning.estimate import estimate as whole
from gigatrain.planning.estimate.closed import Prices
from gigatrain.planning.estimate.cluster import Cluster, Level
from gigatrain.planning.estimate.constants import VALUES
from gigatrain.planning.estimate.workload import Layout, Stack, Workload
from gigatrain.planning.plan import plan

DENSE = Architecture(family="llama", vocab=32000, hidden=4096, layers=6, heads=32, kv_heads=8, intermediate=14336)
EXPERTS = Architecture(
    family="mixtral", vocab=32000, hidden=2048, layers=4, heads=16, kv_heads=8, intermediate=4096, experts=4, experts_per_token=2
)


def nodes(ranks, gib=80.0):
    return Cluster("h100", ranks, 4, (Level("scale_up", 4, 450.0), Level("rail", ranks, 50.0)), int(gib * 2**30))


def workload(architecture, ranks, batch, stack: Stack = "gigatrain_native"):
    return Workload(
        expect.shape_of(architecture), Layout(replicate=ranks, zero=0), 2048, 1, batch // ranks, stack=stack, chunked_loss=True
    )  # fmt: skip


def everything(base, cluster, recomputes):
    """All of a small space: by events, the workload, and `(seconds, bytes)` by formula."""
    prices, found = Prices(base, cluster, VALUES), []
    for split in layouts.splits(base, cluster, Counter()):
        for expert in layouts.experts(base, split):
            for turn in layouts.turns(base, split, base.precision):
                for share in layouts.shards(base, split, expert):
                    shared = prices.shared(split, expert, share, split.pipeline == 1 or turn[2] == "zbv", base.precision)
                    for recompute in recomputes:
                        one = layouts.arranged(base, split, expert, share, turn, recompute, base.precision)
                        formula = prices.together(prices.turned(split, expert, turn, recompute, base.precision, share[1]), shared)
                        found.append((whole.estimate(one, cluster), one, formula))
    return found


@pytest.mark.parametrize(
    ("architecture", "stack", "gib", "recomputes"),
    [
        (DENSE, "gigatrain_native", 10.0, ("none", "full")),
        (EXPERTS, "gigatrain_native", 80.0, ("none",)),
        (DENSE, "megatron", 10.0, ("none",)),
    ],
)
def test_the_shortlist_keeps_the_best_five(architecture, stack, gib, recomputes):
    """Every layout of eight ranks by events: the best of the five best groups are the search's five, and the formula is near."""
    base, cluster = workload(architecture, 8, 8, stack), nodes(8, gib)
    played = everything(base, cluster, recomputes)
    found = search.search(base, cluster, recomputes=recomputes)
    assert found.complete
    assert found.considered == len(played)
    best = {}
    for estimate, one, _ in played:
        if estimate.fits:
            group = search.group_of(one)
            best[group] = min(best.get(group, estimate.step_s), estimate.step_s)
    wanted = sorted(best.values())[:5]
    assert [candidate.estimate.step_s for candidate in found.candidates] == pytest.approx(wanted)
    assert len({search.group_of(candidate.workload) for candidate in found.candidates}) == 5
    fast = [formula[0] / estimate.step_s - 1 for estimate, _, formula in played if estimate.fits and estimate.step_s < 1.25 * wanted[0]]
    assert max(map(abs, fast)) < search.MARGIN
    assert not [one for estimate, one, formula in played if estimate.fits and formula[1] * search.SLACK > cluster.memory_bytes]
    if stack == "gigatrain_native":  # whose gradients a pipeline holds whole until the end
        off = [formula[1] / estimate.memory_bytes for estimate, one, formula in played if one.layout.pipeline > 1 and one.layout.zero == 3]
        assert min(off) > 0.85


def test_the_formulas_bytes_of_deepspeed_are_by_stage():
    for estimate, one, formula in everything(workload(DENSE, 8, 8, "gigatrain_deepspeed"), nodes(8), ("none",)):
        assert 0.9 < formula[1] / estimate.memory_bytes < 1.02, one.layout


def test_the_same_twice_and_said_in_words():
    base, cluster = workload(DENSE, 8, 16), nodes(8)
    one, two = search.search(base, cluster), search.search(base, cluster)
    assert one == two
    lines = candidates.table(one)
    assert lines[0].split()[:3] == ["tensor", "context", "pipeline"]
    assert "% step" in one.candidates[1].why
    assert "products and attention" in one.candidates[0].why
    said = json.loads(json.dumps(candidates.tree(one)))
    assert said["candidates"][0]["overrides"][0].startswith("mesh.replicate=")
    assert said["considered"] == one.considered == layouts.size(base, cluster, precisions=1, recomputes=4)


def test_another_key_and_an_early_end():
    base, cluster = workload(DENSE, 8, 16), nodes(8)
    least = search.search(base, cluster, key=lambda _, estimate: estimate.memory_bytes, top=2)
    first = search.search(base, cluster, top=1).candidates[0]
    assert least.candidates[0].estimate.memory_bytes < first.estimate.memory_bytes
    ticks = iter(range(1000))
    ended = search.search(base, cluster, limit_s=4, clock=lambda: float(next(ticks)))
    assert not ended.complete
    assert ended.candidates


def test_what_does_not_divide_or_fit_is_refused_with_a_way_out():
    with pytest.raises(PlanError, match=r"no layout of 7 ranks can share train\.batch 12 samples .*train\.batch = 14 can be"):
        search.search(replace(workload(DENSE, 7, 7), layout=Layout(pipeline=7, zero=0), accumulation=12), nodes(7))
    with pytest.raises(PlanError, match=r"none of [\d,]+ layouts of 8 ranks fits into 2\.0 GiB; start more ranks"):
        search.search(workload(DENSE, 8, 16), nodes(8, 2.0))


def test_another_stacks_layout_is_no_recipe():
    found = search.search(workload(DENSE, 8, 16, "megatron"), nodes(8), top=1)
    with pytest.raises(PlanError, match='"megatron" cannot be written as a recipe'):
        candidates.overrides(found.candidates[0])


RECIPES = {
    "dense": ("model.architecture=llama-3.1-8b", "optim.name=adamw"),
    "muon": ("model.architecture=qwen3-8b",),
    "experts": ("model.architecture=qwen3-30b-a3b", "optim.name=adamw"),
    "deepspeed": ("model.architecture=llama-3.1-8b", "optim.name=adamw", "engine.name=deepspeed"),
    "compiled": ("model.architecture=smollm2-135m", "optim.name=adamw", "train.compile=true"),
    "offloaded": ("model.architecture=llama-3.1-8b", "optim.name=adamw", "engine.offload=true"),
}


@pytest.mark.parametrize(
    ("name", "where"),
    [("dense", "jupiter"), ("muon", "dgx-h100"), ("experts", "jupiter"), ("deepspeed", "dgx-h100"), ("compiled", "jupiter"),
     ("offloaded", "dgx-h100")],
)  # fmt: skip
def test_every_candidate_is_a_plan(name, where):
    """Text and record say the same recipe, and the plan of it is accepted, with the candidate's layout."""
    given = ("train.batch=8", "train.sequence=2048", *RECIPES[name])
    recipe, site = load.recipe("quickstart", given), load.site(where)
    found = top.top(recipe, site, 8, count=3)
    assert found.candidates
    for candidate in found.candidates:
        asked = load.recipe("quickstart", [*given, *candidates.overrides(candidate)])
        assert asked == top.arranged(recipe, candidate)
        made = plan(asked, site, 8)
        # which attention a rank calls follows from its heads, and is no matter of the layout
        assert replace(expect.workload_of(made), lean=()) == replace(candidate.workload, lean=())


def test_a_precision_that_is_allowed_is_written():
    given = ("train.batch=8", "train.sequence=2048", "model.architecture=llama-3.1-8b", "optim.name=adamw")
    recipe, site = load.recipe("quickstart", given), load.site("dgx-h100")
    found = top.top(recipe, site, 8, precisions=("fp8_rowwise",))
    assert {candidate.precision for candidate in found.candidates} == {"fp8_rowwise"}
    for candidate in found.candidates:
        asked = load.recipe("quickstart", [*given, *candidates.overrides(candidate)])
        assert asked == top.arranged(recipe, candidate)
        assert plan(asked, site, 8).precision == "fp8"


@pytest.mark.long
@pytest.mark.parametrize(("model", "batch", "sequence"), [("llama-3.1-405b", 14400, 8192), ("deepseek-v3", 28800, 4096)])
def test_a_gigafactory(model, batch, sequence):
    """288,000 ranks: a few seconds of one core (benchmarks/LOG.md has them)."""
    architecture = load.recipe("quickstart", [f"model.architecture={model}"]).model.architecture
    assert architecture is not None
    shape = expect.shape_of(architecture)
    base = Workload(
        shape, Layout(replicate=14400, pipeline=20, zero=0), sequence, 1, batch // 14400, stack="gigatrain_native", chunked_loss=True
    )
    cluster = Cluster("gb200", 288_000, 4, (Level("scale_up", 72, 900.0), Level("rail", 288_000, 50.0)), 186 * 2**30)
    found = search.search(base, cluster)
    assert len(found.candidates) == 5
    assert found.considered > 1_000_000
