"""The search's rules of what can be cut, against the engines' own: planning/axes.py and planning/layout.py."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from gigatrain import load
from gigatrain.architectures import Architecture
from gigatrain.config import Mesh
from gigatrain.errors import PlanError
from gigatrain.planning import axes
from gigatrain.planning.estimate import layouts
from gigatrain.planning.estimate.cluster import Cluster, Level
from gigatrain.planning.estimate.workload import Layout, Schedule, Shape, States, Workload

NODES = Cluster(chip="h100", accelerators=64, per_node=8, levels=(Level("scale_up", 8, 450.0), Level("rail", 64, 50.0)))


def shape_of(a):
    return Shape(
        layers=a.layers, hidden=a.hidden, heads=a.heads, kv_heads=a.kv_heads, head_dim=a.head_dim, value_dim=a.value_dim, intermediate=a.intermediate,
        gated=a.gated, vocab=a.vocab, tied=a.tied, experts=a.experts, experts_per_token=a.experts_per_token or 0,
        expert_width=a.expert_width if a.experts else 0, shared_width=a.shared_width, sparse_layers=a.sparse_layers, q_rank=a.q_rank, kv_rank=a.kv_rank,
        rotary_dim=a.rotary_dim,
    )  # fmt: skip


MODELS = {
    "dense": Architecture(family="llama", vocab=96, hidden=96, layers=5, heads=12, kv_heads=4, intermediate=240),
    "tied": Architecture(family="llama", vocab=100, hidden=64, layers=4, heads=8, kv_heads=2, intermediate=96, tied=True),
    "experts": Architecture(
        family="mixtral", vocab=64, hidden=64, layers=6, heads=4, kv_heads=4, intermediate=90, experts=6, experts_per_token=2
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_native_legality_is_the_engines(name):
    """Every mesh of a grid, legal or not: axes.check, axes.share and axes.resolve refuse exactly what the search does."""
    architecture, recipe = MODELS[name], load.recipe("quickstart")
    optim = recipe.optim.model_copy(update={"name": "adamw", "moments": "bf16" if name == "tied" else "fp32"})
    sequence, batch, seen = 48, 24, Counter()
    grid = itertools.product(
        (1, 2, 3, 4, 5), (1, 2, 3, 8), (1, 2, 3), (1, 2, 4), (1, 2, 3), (1, 2, 3), ("1f1b", "interleaved", "zbv"), ("ring", "ulysses"),
        (1, 3, 8), (False, True),
    )  # fmt: skip
    for index, (tensor, context, pipeline, shard, replicate, expert, schedule, exchange, microbatch, compiled) in enumerate(grid):
        if index % 29:  # 29 is prime to every axis' length, so that all of their pairs are met
            continue
        stages = {"1f1b": 1, "interleaved": 2 + index % 2, "zbv": 2}[schedule] if pipeline > 1 else 1
        mesh = Mesh(
            replicate=replicate, shard=shard, context=context, tensor=tensor, pipeline=pipeline, expert=expert, schedule=schedule, stages=stages,
            exchange=exchange,
        )  # fmt: skip
        train = recipe.train.model_copy(update={"sequence": sequence, "batch": batch, "microbatch": microbatch, "compile": compiled})
        asked = recipe.model_copy(update={"mesh": mesh, "train": train, "optim": optim})
        readers = replicate * shard
        if batch % readers or (batch // readers) % microbatch:
            continue  # the search takes microbatches that divide
        try:
            resolved = axes.resolve(asked, None)
            _, accumulation = axes.share(asked, resolved)
            axes.check(asked, architecture, resolved, accumulation)
            legal = True
        except PlanError:
            legal = False
        mine = Layout(
            replicate=replicate, shard=shard, context=context, tensor=tensor, pipeline=pipeline, expert=expert, schedule=schedule, stages=stages,
            exchange=exchange, zero=3 if shard * context > 1 else 0, reshard=pipeline == 1,
        )  # fmt: skip
        workload = Workload(
            shape_of(architecture), mine, sequence, microbatch, batch // readers // microbatch, stack="gigatrain_native", compiled=compiled,
            states=States(moments=4.0 if name == "tied" else 8.0),
        )  # fmt: skip
        assert (layouts.refused(workload) == "") == legal, (mesh, microbatch, compiled, layouts.refused(workload))
        seen[legal] += 1
    assert min(seen[True], seen[False]) > 15, seen


def _all(workload, cluster):
    """Every arranged workload of a small space."""
    for split in layouts.splits(workload, cluster, Counter()):
        for expert in layouts.experts(workload, split):
            for turn in layouts.turns(workload, split, workload.precision):
                for share in layouts.shards(workload, split, expert):
                    yield layouts.arranged(workload, split, expert, share, turn, "none", workload.precision)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stack", ["gigatrain_native", "gigatrain_deepspeed", "megatron", "torchtitan", "deepspeed"])
def test_what_is_listed_is_legal_and_once(name, stack):
    """No listed layout is refused, none is listed twice, and ranks and samples stay as asked."""
    cluster = replace(NODES, accelerators=24)
    shape = shape_of(MODELS[name])
    workload = Workload(shape, Layout(replicate=24, zero=0), 48, 1, 3, stack=stack)
    if stack == "gigatrain_deepspeed":
        workload = replace(workload, layout=Layout(shard=24))
    found = list(_all(workload, cluster))
    assert found
    for one in found:
        assert layouts.refused(one, cluster) == "", one
        assert (one.layout.ranks, one.batch) == (24, 72)
    keys = [(one.layout, one.microbatch, one.accumulation) for one in found]
    assert len(set(keys)) == len(keys)
    assert len(keys) == layouts.size(workload, cluster, precisions=1, recomputes=1)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_legal_is_left_out(name):
    """Each axis tried at every size, by brute force: what is not refused is listed."""
    shape, cluster = shape_of(MODELS[name]), replace(NODES, accelerators=12)
    base = Workload(shape, Layout(replicate=12, zero=0), 48, 1, 2, stack="gigatrain_native")
    listed = {(one.layout, one.microbatch) for one in _all(base, cluster)}
    ways = range(1, 13)
    for tensor, context, pipeline in itertools.product(ways, ways, ways):
        if 12 % (tensor * context * pipeline):
            continue
        data = 12 // (tensor * context * pipeline)
        orders: tuple[tuple[Schedule, int], ...] = (("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2))
        for shard, expert, microbatch, exchange, (schedule, stages) in itertools.product(
            layouts.divisors(data), (1, 2, 3, 6), (1, 2, 4, 8, 24), ("ring", "ulysses"), orders
        ):
            if 24 % data or (24 // data) % microbatch or (context == 1 and exchange == "ulysses") or (pipeline == 1 and schedule != "1f1b"):
                continue
            shares = shard * context > 1
            for reshard in (True, False):
                if not shares and reshard != (pipeline == 1):
                    continue
                mine = Layout(
                    replicate=data // shard, shard=shard, context=context, tensor=tensor, pipeline=pipeline, expert=expert, schedule=schedule, stages=stages,
                    exchange=exchange, zero=3 if shares else 0, reshard=reshard,
                )  # fmt: skip
                one = replace(base, layout=mine, microbatch=microbatch, accumulation=24 // data // microbatch)
                if layouts.refused(one, cluster) == "":
                    assert (mine, microbatch) in listed, mine
