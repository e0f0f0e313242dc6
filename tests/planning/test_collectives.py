"""Collectives against published nccl-tests tables, and the shapes that no formula may lose: order of ranks, NIC sharing, growth with nodes and bytes."""

from statistics import median

import pytest

from gigatrain import config
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning.estimate import collectives
from gigatrain.planning.estimate.cluster import Cluster, Level
from gigatrain.planning.estimate.pieces import Local
from gigatrain.planning.estimate.work import Transfer
from gigatrain.planning.estimate.workload import Layout, Shape, Workload

KiB, MiB, GiB = 2**10, 2**20, 2**30
_FACTOR = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}


def cluster(
    chip: str, nodes: int = 1, *, link: float = 450.0, nic: float = 50.0, net: str = "rail", oversubscription: float = 1.0
) -> Cluster:
    levels = (Level("scale_up", 8, link), Level(net, 8 * nodes, nic, oversubscription))
    return Cluster(chip, 8 * nodes, 8, levels if nodes > 1 else levels[:1])


SHAPE = Shape(2, 512, 4, 4, 128, 128, 1024, True, 1024, False, experts=8, experts_per_token=2, expert_width=512, sparse_layers=2)
H100, H200, A100, B200 = cluster("h100"), cluster("h200"), cluster("a100", link=300.0), cluster("b200", link=900.0)
# (cluster, ranks, collective, {bytes: busbw in GB/s}); a busbw is bytes x (ranks - 1)/ranks over seconds, of an all-reduce twice that
AZURE = "Azure/AI-benchmarking-guide, Azure_Results"
BEKMAN = "stas00/ml-engineering network/README.md and network/benchmarks/README.md"
TABLES = {
    f"{AZURE}: 8 x H100": (H100, 8, "all_reduce", {MiB: 43.7, 16 * MiB: 234, 64 * MiB: 362, 256 * MiB: 423, GiB: 466, 8 * GiB: 479}),
    f"{AZURE}: 8 x A100": (A100, 8, "all_reduce", {MiB: 36, 16 * MiB: 109, 64 * MiB: 167, 256 * MiB: 214, GiB: 228, 8 * GiB: 232}),
    f"{BEKMAN}: 8 x H200": (H200, 8, "all_reduce", {32 * KiB: 3.2, MiB: 72.45, 16 * MiB: 242.45, 256 * MiB: 442.27, 16 * GiB: 480.7}),
    f"{BEKMAN}: 8 x H200, gather": (H200, 8, "all_gather", {16 * GiB: 361}),
    f"{BEKMAN}: 8 x H200, scatter": (H200, 8, "reduce_scatter", {16 * GiB: 363}),
    f"{BEKMAN}: 8 x B200": (B200, 8, "all_reduce", {32 * KiB: 1.2, 16 * MiB: 255, 128 * MiB: 568, GiB: 723, 16 * GiB: 846}),
    f"{BEKMAN}: 4 nodes of 8 x B200": (
        cluster("b200", 4, link=900.0, net="rail.efa"), 32, "all_reduce", {16 * MiB: 64, 128 * MiB: 198, GiB: 362, 16 * GiB: 382},
    ),
    "aws-samples/awsome-distributed-training nccl-tests: 2 x p5": (
        cluster("h100", 2, net="rail.efa"), 16, "all_reduce",
        {size: 1.875 * size / time / 1e3 for size, time in {MiB: 123.2, 16 * MiB: 298.1, 128 * MiB: 870.3, GiB: 4607.6, 16 * GiB: 66132}.items()},
    ),
    **{
        f"NVIDIA/nccl#1229: {nodes} nodes of 8 x H100": (cluster("h100", nodes), 8 * nodes, "reduce_scatter", {8 * GiB: rate})
        for nodes, rate in {4: 360, 8: 345, 16: 320, 32: 300, 64: 280, 128: 260}.items()
    },
    "NVIDIA/nccl#1218: 32 nodes of 8 x H100, gather": (cluster("h100", 32), 256, "all_gather", {2 * GiB: 200}),
    "NVIDIA/nccl#1218: 32 nodes of 8 x H100": (cluster("h100", 32), 256, "all_reduce", {2 * GiB: 340}),
}  # fmt: skip


def busbw(machines: Cluster, ranks: int, collective: str, size: float) -> float:
    moved = Transfer("measured", "shard", collective, size, "forward")  # type: ignore[arg-type]
    return _FACTOR[collective] * size * (ranks - 1) / ranks / collectives.seconds(moved, machines, ranks, 1) / 1e9


def errors() -> list[tuple[float, str]]:
    return [
        (busbw(machines, ranks, collective, size) / rate - 1, f"{name}, {size / MiB:g} MiB")
        for name, (machines, ranks, collective, table) in TABLES.items()
        for size, rate in table.items()
    ]


def test_busbw_is_near_the_published_tables() -> None:
    found = errors()
    large = [abs(error) for error, name in found if float(name.split()[-2]) >= 128]
    assert median(abs(error) for error, _ in found) < 0.04
    assert max(large) < 0.3
    assert sorted(large)[int(0.9 * len(large))] < 0.1
    assert max(abs(error) for error, _ in found) < 0.5, max(found, key=lambda one: abs(one[0]))


def seconds(collective: str, size: float, machines: Cluster, ranks: int, stride: int = 1, axis: str = "shard") -> float:
    return collectives.seconds(Transfer("moved", axis, collective, size, "forward"), machines, ranks, stride)  # type: ignore[arg-type]


def test_groups_are_megatrons() -> None:
    layout = Layout(replicate=2, shard=8, context=2, tensor=4, pipeline=3, expert=8, expert_tensor=1)
    assert collectives.group(layout, "tensor") == (4, 1)
    assert collectives.group(layout, "context") == (2, 4)
    assert collectives.group(layout, "shard") == (16, 4)
    assert collectives.group(layout, "replicate") == (2, 64)
    assert collectives.group(layout, "pipeline") == (3, 128)
    assert collectives.group(layout, "expert") == (8, 1)
    assert collectives.group(layout, "shard", experts=True) == (8, 8)
    assert collectives.group(Layout(shard=8, tensor=4, expert=4, expert_tensor=4), "expert") == (4, 4)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(replicate=2, shard=8, tensor=4, expert=4),
        Layout(shard=4, context=2, tensor=2, expert=4),
        Layout(shard=8, context=2, expert=2),
        Layout(shard=2),
    ],
)
def test_expert_groups_of_our_own_are_the_meshs(layout: Layout) -> None:
    mesh = Mesh(
        config.Mesh(replicate=layout.replicate, shard=layout.shard, context=layout.context, tensor=layout.tensor, expert=layout.expert)
    )
    ranks, stride = collectives.group(layout, "expert", stack="gigatrain_native")
    assert mesh.ranks("expert") == [place * stride for place in range(ranks)]
    assert collectives.expert_span(layout, "gigatrain_native") == ranks * stride
    shared = mesh.ranks("outer", "context")
    ranks, stride = collectives.group(layout, "shard", experts=True, stack="gigatrain_native")
    assert ranks == len(shared) == Local(Workload(SHAPE, layout, 4096, 1, 1, stack="gigatrain_native")).expert_shards
    if ranks > 1:
        assert ranks * stride >= shared[-1]
        if mesh.size("outer") == 1 or layout.context == 1:
            assert shared == [place * stride for place in range(ranks)]


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"])
def test_more_bytes_slower_links_and_more_nodes_take_longer(collective: str) -> None:
    fast, slow = cluster("h100", 16), cluster("h100", 16, nic=25.0)
    times = [seconds(collective, size, fast, 128) for size in (KiB, MiB, 64 * MiB, GiB)]
    assert times == sorted(times)
    assert seconds(collective, GiB, slow, 128, 8) > 1.5 * seconds(collective, GiB, fast, 128, 8)
    if collective != "send":
        over_nodes = [seconds(collective, 64 * MiB, cluster("h100", nodes), 8 * nodes) for nodes in (1, 2, 4, 16, 64)]
        assert over_nodes == sorted(over_nodes)
    assert seconds(collective, GiB, fast, 1) == 0.0


def test_a_ring_of_a_whole_node_has_all_its_nics_and_a_strided_one_its_own() -> None:
    machines = cluster("h100", 4)
    whole, own = seconds("all_gather", GiB, machines, 32, 1), seconds("all_gather", GiB, machines, 4, 8)
    assert 5.0 < own / whole < 6.2  # (3/4) over (31/32)/8, and the larger pieces of the smaller group are the quicker


def test_gathers_on_efa_fall_off_with_nodes_as_they_were_seen_to() -> None:
    """The ultra-scale playbook: 185, 119, 69, 55, 28 and 11 GB/s on 2 to 64 nodes, of a size that it does not say."""
    found = [busbw(cluster("h100", nodes, net="rail.efa"), 8 * nodes, "all_gather", 48 * MiB) for nodes in (2, 4, 8, 16, 32, 64)]
    assert found == sorted(found, reverse=True)
    assert all(0.6 < rate / seen < 1.7 for rate, seen in zip(found, (185, 119, 69, 55, 28, 11), strict=True)), found


def test_reduction_in_the_switch_helps_all_reduces_alone() -> None:
    assert busbw(H200, 8, "all_reduce", 16 * GiB) > 1.2 * busbw(H200, 8, "all_gather", 16 * GiB)
    unswitched = Cluster("gh200", 4, 4, (Level("scale_up", 4, 450.0),))
    assert busbw(unswitched, 4, "all_reduce", 16 * GiB) == pytest.approx(busbw(unswitched, 4, "all_gather", 16 * GiB), rel=0.01)


def test_all_to_all_leaves_the_node_by_a_ranks_own_nic() -> None:
    inside, across = seconds("all_to_all", GiB, H100, 8), seconds("all_to_all", GiB, cluster("h100", 8), 64)
    assert across > 7 * inside
    rate = GiB * 56 / 64 / across / 1e9  # over the network
    assert 30 < rate < 46  # DeepEP: 46 of a NIC's 50 GB/s; plain all-to-alls reach less


def test_an_oversubscribed_spine_slows_all_to_alls_and_not_rings() -> None:
    def spine(oversubscription: float) -> Cluster:
        return Cluster("h100", 512, 8, (Level("scale_up", 8, 450.0), Level("rail", 256, 50.0), Level("spine", 512, 50.0, oversubscription)))

    assert seconds("all_gather", GiB, spine(4.0), 512) == seconds("all_gather", GiB, spine(1.0), 512)
    assert seconds("all_to_all", GiB, spine(4.0), 512) > 3 * seconds("all_to_all", GiB, spine(1.0), 512)


def test_constants_are_named_and_may_be_set() -> None:
    for value, spread, unit, source in collectives.COLLECTIVES.values():
        assert value >= 0
        assert spread > 0
        assert unit in ("share", "s", "bytes")
        assert source
    moved = Transfer("moved", "shard", "all_gather", GiB, "forward")
    assert collectives.seconds(moved, H100, 8, 1, {"link.nvlink4.share": 0.4}) > 1.9 * collectives.seconds(moved, H100, 8, 1)
