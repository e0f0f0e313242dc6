"""Meshes: sizes that follow, and clashes that are named with their numbers."""

import pytest

from gigatrain import load
from gigatrain.errors import PlanError
from gigatrain.planning.plan import plan


def made(*overrides, ranks=None):
    return plan(load.recipe("quickstart", ["optim.name=adamw", "model.architecture.kv_heads=2", *overrides]), load.site("laptop"), ranks)


@pytest.mark.parametrize(
    ("overrides", "ranks", "expected"),
    [
        ((), None, (1, 1, 1)),
        ((), 8, (8, 8, 1)),
        (("mesh.tensor=2",), 8, (8, 4, 2)),
        (("mesh.replicate=2", "mesh.tensor=2"), 8, (8, 2, 2)),
        (("train.nproc=4",), None, (4, 4, 1)),
        (("mesh.shard=2", "mesh.context=2"), None, (4, 2, 1)),
    ],
)
def test_what_is_left_is_sharded(overrides, ranks, expected):
    found = made(*overrides, ranks=ranks)
    assert (found.ranks, found.mesh.shard, found.mesh.tensor) == expected
    assert found.microbatch * found.accumulation >= found.batch // (found.mesh.replicate * (found.mesh.shard or 1))


MIXTRAL = ("model.architecture.family=mixtral", "model.architecture.experts=6", "model.architecture.experts_per_token=2")


@pytest.mark.parametrize(
    ("overrides", "ranks", "said"),
    [
        (("mesh.tensor=3",), 8, "8 ranks do not divide by the mesh's .* tensor 3 .* = 3; start a multiple of 3"),
        (("mesh.shard=3",), 8, "x shard 3 is 3 ranks, and 8 are there"),
        ((), 3, "train.batch 8 does not divide by the 3 ranks .* are 6 and 9"),
        ((), 16, "train.batch 8 does not divide by the 16 ranks .* the least that does is 16"),
        (("mesh.tensor=4",), 4, "mesh.tensor 4 does not divide the model's heads 6"),
        (("mesh.tensor=2", "model.architecture.vocab=4097"), 2, "vocab 4097; set model.architecture.vocab = 4098"),
        (("mesh.tensor=6", "model.architecture.kv_heads=1", "model.architecture.intermediate=516"), 6, "vocab 4096; set .* 4098"),
        (("mesh.tensor=2", "train.sequence=255"), 2, "does not divide the 255 tokens of a sample"),
        (("mesh.context=3",), 3, "into 6 equal pieces .* train.sequence 256 .* the next one is 258"),
        (("mesh.context=4", "mesh.exchange=ulysses"), 4, "6 query with 2 key heads .* do not divide"),
        (("mesh.expert=2",), 2, "the model has none"),
        ((*MIXTRAL, "mesh.expert=4"), 4, "mesh.expert 4 does not divide the model's 6 experts"),
        ((*MIXTRAL, "mesh.expert=4"), 2, "mesh.expert 4 does not divide mesh.shard 2"),
        (("mesh.pipeline=8",), 8, "needs 8 layers, and the model has 4"),
        (("mesh.pipeline=2",), 2, "needs as many microbatches as mesh.pipeline, 2, and a data rank has 1"),
        (("mesh.pipeline=2", "mesh.schedule=zbv", "mesh.stages=3"), 2, '"zbv" has exactly 2 stages on each rank, and mesh.stages is 3'),
        (("mesh.stages=2",), 1, "mesh.stages 2 needs a pipeline"),
        (("mesh.pipeline=2", "train.microbatch=1", "optim.moments=int8", "kernels.adamw=reference"), 2, "tied embedding has a copy"),
        (("engine.offload=true",), 1, "mesh.shard 1 shards nothing"),
        (("engine.async_tensor=true",), 1, "needs train.compile = true and mesh.tensor above 1, here false and 1"),
        (("engine.zero=1",), 1, 'engine.zero 1 is for engine.name "deepspeed", and the engine is "native"; leave it out .it is 3 then.'),
        (("engine.name=deepspeed", "engine.reshard=false"), 2, 'engine.reshard false is for engine.name "native"'),
        (("engine.name=deepspeed", "engine.prefetch=2"), 2, 'engine.prefetch 2 is for engine.name "native"'),
        (("profile.steps=[1]", "profile.ranks=[0, 2]"), 2, "profile.ranks names 2, and the run has ranks 0 to 1"),
        (("engine.name=deepspeed", "mesh.tensor=2"), 2, "mesh.tensor is 2; set mesh.tensor = 1"),
        (("engine.name=deepspeed", "optim.name=muon"), 2, "the recipe has muon"),
    ],
)
def test_nonsense_is_refused_with_the_numbers_that_clash(overrides, ranks, said):
    with pytest.raises(PlanError, match=said):
        made(*overrides, ranks=ranks)


def test_a_resume_may_change_the_mesh_and_the_engine():
    first = made()
    for other in (made(ranks=4), made("mesh.tensor=2"), made("engine.name=deepspeed", ranks=2)):
        assert (other.identity == first.identity, other.sha256 == first.sha256) == (True, False)
