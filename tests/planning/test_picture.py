"""Data of a plan's picture, of real estimates: roles and the roof agree with the estimate, and a curve says why a row has no figures."""

from dataclasses import replace

import pytest

from gigatrain.errors import PlanError
from gigatrain.planning.estimate.cluster import Cluster, Level
from gigatrain.planning.estimate.estimate import estimate
from gigatrain.planning.estimate.workload import Layout, Shape, Workload
from gigatrain.planning.picture import caps, grown, layout_words, roles, roofline, scaling

SHAPE = Shape(
    layers=16, hidden=2048, heads=16, kv_heads=8, head_dim=128, value_dim=128, intermediate=8192, gated=True, vocab=32768, tied=False
)
WORKLOAD = Workload(
    SHAPE, Layout(replicate=2, tensor=2, pipeline=4, zero=1), sequence=4096, microbatch=1, accumulation=16, recompute="selective", stack="megatron"
)  # fmt: skip
STATES = {"gemm": 700.0, "attention": 650.0, "memory": 450.0, "optimizer": 450.0, "communication": 240.0, "idle": 120.0}


def cluster(count):
    levels = (Level("node", 8, 450.0), Level("rail", max(count, 16), 50.0))
    return Cluster("h100", count, 8, levels, memory_bytes=80 * 2**30)


@pytest.fixture(scope="module")
def found():
    return estimate(WORKLOAD, cluster(16))


def test_roles_are_the_pipelines_ranks(found):
    every = roles(WORKLOAD, cluster(16), found, STATES)
    assert [role.name for role in every] == [f"pipeline rank {rank}" for rank in range(4)]
    for role, held in zip(every, found.memory_by_rank, strict=True):
        assert role.memory == held
        assert sum(role.seconds.values()) == pytest.approx(found.step_s, rel=1e-6)
        assert role.watts is not None
        assert STATES["idle"] < role.watts < STATES["gemm"]
    assert every[3].seconds["gemm"] > every[1].seconds["gemm"]  # the head
    assert all(role.watts is None for role in roles(WORKLOAD, cluster(16), found))


def test_no_operation_is_above_the_roof():
    roof, points = roofline(WORKLOAD, cluster(16))
    assert roof.peaks == {"bf16": 989e12}
    assert points[0].kind == "gemm"
    for point in points:
        if point.flops:
            assert point.intensity is not None
            assert point.flops / point.seconds <= min(roof.peaks["bf16"], point.intensity * roof.bytes_s) * 1.001, point.name
        assert point.bytes / point.seconds <= roof.bytes_s * 1.001, point.name
    narrow, _ = roofline(replace(WORKLOAD, precision="fp8_delayed"), cluster(16))
    assert list(narrow.peaks) == ["bf16", "fp8"]


def test_copies_are_added_and_what_cannot_be_says_why(found):
    bigger = grown(WORKLOAD, 64)
    assert (bigger.layout.replicate * bigger.layout.shard, bigger.batch) == (8, 4 * WORKLOAD.batch)
    assert layout_words(bigger.layout) == "replicate 8 x tensor 2 x pipeline 4, 1f1b, ZeRO-1"
    alone = replace(WORKLOAD, layout=Layout(shard=16, zero=3))
    assert (grown(alone, 64).layout.shard, grown(alone, 2048).layout.replicate) == (64, 4)
    with pytest.raises(PlanError, match="no multiple of 8"):
        grown(WORKLOAD, 12)
    rows = scaling(
        WORKLOAD, cluster, (4, 16, 64), goodput_of=lambda count, estimate: 1 - count / 1000, watts_of=lambda count, estimate: count * 1300.0
    )
    assert "no multiple of 8" in rows[0].unknown
    assert rows[1].step_s == pytest.approx(found.step_s)
    assert (rows[1].goodput, rows[2].facility_watts) == (0.984, 64 * 1300.0)
    assert rows[2].tokens_per_s == pytest.approx(4 * (rows[1].tokens_per_s or 0), rel=0.2)
    huge = replace(WORKLOAD, microbatch=64, recompute="none")
    (row,) = scaling(huge, cluster, (16,))
    assert "does not fit" in row.unknown
    given = scaling(WORKLOAD, cluster, (32,), workload_of=lambda ranks: grown(WORKLOAD, 16))
    assert given[0].batch == WORKLOAD.batch


def test_a_lower_limit_is_slower_and_one_that_cannot_be_is_left_out():
    found = caps(WORKLOAD, cluster(16), (700, 400, 1, 550), lambda capped, estimate: capped.cap_watts)
    assert [one.watts for one in found] == [400, 550, 700]
    assert found[0].speed < found[1].speed < found[2].speed == 1.0


def test_our_own_experts_are_shared_by_shard_ranks_alone():
    experts = replace(SHAPE, experts=8, experts_per_token=2, expert_width=2048, sparse_layers=16)
    made = Workload(experts, Layout(shard=8, tensor=4, expert=8), 4096, 1, 1, stack="gigatrain_native")
    assert grown(made, 64).layout.shard == 16
    with pytest.raises(PlanError, match="expert 8 does not divide the 4 ranks"):
        grown(made, 16)
    assert grown(replace(made, stack="megatron"), 16).layout.shard == 4
