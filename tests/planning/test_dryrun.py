"""The real engine on pretended ranks: what each holds and sends, and what the plan says of it."""

import pytest

from gigatrain import load
from gigatrain.errors import PlanError
from gigatrain.planning.dryrun import dry_run
from gigatrain.planning.plan import plan

BASE = ("optim.name=adamw", "model.architecture.kv_heads=2", "train.microbatch=1")


def made(*overrides, ranks=None, site="laptop"):
    return plan(load.recipe("quickstart", [*BASE, *overrides]), load.site(site), ranks)


def test_every_parameter_is_held_once_and_bytes_are_the_plans():
    found = dry_run(made("mesh.tensor=2", "train.batch=64", ranks=128))
    shards = 64
    assert [role.ranks for role in found.roles] == [126, 2]
    assert sum(role.ranks for role in found.roles) == 128
    first, last = found.roles
    assert first.whole == found.plan.parameters
    assert first.parameters >= last.parameters
    assert first.parameters < 1.6 * found.plan.parameters / shards / 2  # 192 rows over 64 ranks, and norms whole on both
    estimate = found.plan.memory
    for key in ("weights", "gradients", "optimizer"):
        assert getattr(first, key) == pytest.approx(getattr(estimate, key), rel=0.25), (
            key
        )  # of a model of two million; the rounding of rows
    layers = 4
    # Forward: every layer is gathered, and again in the backward; the root once. Along tensor: two gathers and two scatters a layer, and back.
    assert first.calls["allgather over 64"] == 2 * layers + 1
    assert first.calls["reducescatter over 64"] == layers + 1
    assert first.calls["reducescatter over 2"] == 4 * layers + 1
    assert first.calls["allreduce over 128"] == 1  # the step's only one over all ranks


def test_released_gradients_are_counted_as_if_kept():
    found = dry_run(made("optim.clip=false", "train.release=true", "train.microbatch=8"))
    assert [role.whole for role in found.roles] == [found.plan.parameters]


@pytest.mark.long
def test_ranks_share_experts_that_are_fewer_than_they_are():
    """2 experts of each rank of `expert` over 4 ranks: cut whole, two of those would have one each and two none."""
    moe = ("family=mixtral", "experts=4", "experts_per_token=2", "tied=false")
    found = dry_run(made(*(f"model.architecture.{one}" for one in moe), "mesh.expert=2", ranks=8))
    first, last = found.roles
    assert first.parameters == pytest.approx(last.parameters, rel=0.02)
    assert first.weights == pytest.approx(found.plan.memory.weights, rel=0.02)


@pytest.mark.long
def test_layers_that_are_alike_are_built_thrice_and_multiplied():
    shallow, deep = (made(f"model.architecture.layers={n}", "train.batch=64", "train.microbatch=1", ranks=64) for n in (3, 9))
    small, large = dry_run(shallow), dry_run(deep)
    per_layer = (deep.parameters - shallow.parameters) // 6
    assert large.roles[0].whole - small.roles[0].whole == 6 * per_layer
    assert large.roles[0].calls["allgather over 64"] - small.roles[0].calls["allgather over 64"] == 12
    assert large.roles[0].layers == 9


@pytest.mark.long
def test_stages_of_a_pipeline_are_roles_of_their_own():
    found = dry_run(made("mesh.pipeline=2", "train.batch=64", "train.microbatch=1", "mesh.shard=16", ranks=32))
    assert {role.name for role in found.roles} >= {"pipeline 0, shards 0 to 14", "pipeline 1, last shard"}
    assert sum(role.ranks for role in found.roles) == 32
    assert any(kind.startswith("send") for kind in found.roles[0].calls)


@pytest.mark.long
def test_a_gigafactory_in_a_minute():
    wide = ("model.architecture=llama-3.1-405b", "train.sequence=8192", "train.recompute=full", "mesh.tensor=8", "mesh.replicate=32")
    recipe = load.recipe("quickstart", ["optim.name=adamw", *wide, "train.batch=16384", "train.microbatch=1", "tokenizer.train.vocab=4096"])
    found = dry_run(plan(recipe, load.site("one-gpu"), 131_072))
    assert found.roles[0].whole == 405_853_388_800
    assert sum(role.ranks for role in found.roles) == 131_072
    assert found.peak_bytes < 4 << 30
    assert found.roles[0].weights == pytest.approx(found.plan.memory.weights, rel=0.05)
    assert "131,072 ranks" in found.lines()[0]


def test_what_it_cannot_try_is_refused():
    with pytest.raises(PlanError, match="a dry run is of the native engine"):
        dry_run(made("engine.name=deepspeed", ranks=2))
