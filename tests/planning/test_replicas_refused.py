"""What replicas that may die are not combined with, and how a start that is none of theirs is answered."""

import pytest

from gigatrain import load
from gigatrain.errors import PlanError, RunError
from gigatrain.parallel import groups
from gigatrain.planning.plan import plan

TWO = ("mesh.replicate=2", "train.nproc=2", "recovery.replicas=own", "numerics.replay=false")


def planned(tiny, *sets):
    return plan(load.recipe(str(tiny), [*TWO, *sets]), load.site("laptop"))


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (("mesh.replicate=1",), "mesh.replicate is 1: there is nobody to go on"),
        (("engine.name=deepspeed",), 'mesh.replicate is 2; set mesh.replicate = 1, or engine.name = "native"'),
        (("mesh.pipeline=2", "train.nproc=4", "train.microbatch=1"), "mesh.pipeline is 2"),
        (("power.megawatts=1",), "a power budget"),
        (("numerics.replay=true",), "numerics.replay makes refused steps again"),
        (("numerics.action=rollback",), "numerics may roll back"),
        (("checkpoint.near=/dev/shm",), "checkpoint.near is set"),
    ],
)
def test_refused_with_the_plan(tiny, sets, said):
    with pytest.raises(PlanError, match=said):
        planned(tiny, *sets)


def test_a_replica_is_a_world_without_replicate_of_the_same_run(tiny, tmp_path, monkeypatch):
    whole = planned(tiny, "train.nproc=4", "mesh.shard=2")
    token = tmp_path / "token"
    for name, value in ((groups.REPLICA, "1/2"), (groups.QUORUM, "127.0.0.1:9"), (groups.TOKEN, str(token))):
        monkeypatch.setenv(name, value)
    cut, folder = groups.part(whole, tmp_path)
    assert (cut.mesh.replicate, cut.mesh.shard, cut.ranks, cut.batch) == (1, 2, 2, whole.batch)
    assert cut.identity == whole.identity  # its checkpoints are those of any run of this recipe
    assert folder == tmp_path / "replicas" / "001"
    monkeypatch.setenv(groups.REPLICA, "0/3")
    with pytest.raises(RunError, match="of 3 replicas, and mesh.replicate is 2"):
        groups.part(whole, tmp_path)
    monkeypatch.setenv(groups.REPLICA, "0/2")
    with pytest.raises(RunError, match='recovery.replicas is "none"'):
        groups.part(planned(tiny, "recovery.replicas=none"), tmp_path)


def test_one_world_of_all_ranks_is_told_how_to_start(tiny, tmp_path):
    with pytest.raises(RunError, match="start each replica as a world of its own with GIGATRAIN_REPLICA=0/2"):
        groups.part(planned(tiny), tmp_path)


@pytest.mark.parametrize("said", ["2", "2/2", "-1/2", "a/b", "0/2 "])
def test_a_place_that_is_none(said):
    with pytest.raises(RunError, match="write NUMBER/COUNT"):
        groups.place({groups.REPLICA: said, groups.QUORUM: "127.0.0.1:1", groups.TOKEN: "t"})


def test_a_place_without_a_quorum():
    with pytest.raises(RunError, match="no GIGATRAIN_QUORUM and no GIGATRAIN_REPLICA_TOKEN"):
        groups.place({groups.REPLICA: "0/2"})
