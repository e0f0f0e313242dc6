"""Seconds of a collective: alpha-beta by level (scale-up link, then network), with a bandwidth that depends on the size of what one rank passes on.

Rank order is Megatron's: tensor innermost, then context, then shard, then replicate, pipeline outermost. Expert groups are cut out of shard x context (and of
tensor where `expert_tensor` is 1), innermost first; on our own engines out of `shard` alone, outside context and tensor (parallel/mesh.py). So a tensor group
sits on neighbours of one node, and the ranks of a node that hold the same place in different groups of an outer axis each run their own group over their own
NIC: a group with `c` ranks in a node has `c` NICs there.

A ring of n ranks passes S (n-1)/n bytes (an all-reduce twice that) through every rank; between units of c ranks, c links carry it. A link of rate B reaches
`share x B / (1 + sqrt(half_bytes / chunk))` with chunk = S/n, what one rank passes on at once: nccl-tests' busbw over size, on 8 ranks and on 1,024, falls off
with the root of the chunk and not as 1/(1 + h/S), which would be a second latency. A tree of two levels, and reduction in the switch, are taken where they are
the quicker of an all-reduce, as NCCL does. Free of torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gigatrain.planning.estimate.cluster import Cluster, Level
from gigatrain.planning.estimate.pieces import WHOLE_EXPERTS
from gigatrain.planning.estimate.work import Axis, Transfer
from gigatrain.planning.estimate.workload import Layout, Stack

Published = tuple[float, float, str, str]  # value, spread of its prior in log, unit, source
_AZURE = "fitted on nccl-tests' tables by size of Azure/AI-benchmarking-guide (A100, H100) and stas00/ml-engineering network/ (H200, B200)"
_NODES = "fitted on busbw over nodes: NVIDIA/nccl#1229 (reduce-scatter, H100, 4 to 128 nodes) and #1218 (all-gather of 2 GB, 32 nodes)"
_EFA = (
    "fitted on aws-samples/awsome-distributed-training nccl-tests (2 x p5) and stas00/ml-engineering network/ (4 x p6); step_s by the playbook's gather of "
    "185 GB/s on 2 nodes and 11 on 64, whose size is not said: 30 to 80 us a node at 32 to 64 MB"
)


def _link(
    kind: str, share: float, half: float, latency: float, step: float, source: str, *, reduced: float = 0.0, alltoall: float, send: float
) -> dict[str, Published]:
    name = f"link.{kind}"
    return {
        f"{name}.share": (share, 0.05, "share", source),
        f"{name}.half_bytes": (half, 0.5, "bytes", source),
        f"{name}.latency_s": (latency, 0.3, "s", source),
        f"{name}.step_s": (step, 0.3, "s", source),
        # the rate at which a rank's bytes are reduced in the switch, of the sold rate: one pass, whatever the number of ranks; 0: the link has none
        f"{name}.reduced_share": (reduced, 0.05, "share", source),
        f"{name}.alltoall_share": (alltoall, 0.15, "share", source),
        f"{name}.send_share": (send, 0.1, "share", source),
    }


def _net(
    kind: str, share: float, half: float, latency: float, step: float, source: str, *, alltoall: float, send: float, tree: float
) -> dict[str, Published]:
    name = f"net.{kind}"
    return {
        f"{name}.share": (share, 0.08, "share", source),
        f"{name}.half_bytes": (half, 0.5, "bytes", source),
        f"{name}.latency_s": (latency, 0.4, "s", source),
        f"{name}.step_s": (step, 0.4, "s", source),
        f"{name}.tree_s": (tree, 0.4, "s", source),  # one level of the tree, there and back
        f"{name}.alltoall_share": (alltoall, 0.2, "share", source),
        f"{name}.send_share": (send, 0.15, "share", source),
    }


COLLECTIVES: dict[str, Published] = {
    # the host's, whatever a stack's kernels cost it: launch-bound vTrain rows of tensor 1, 2 and 4 take the same time, six transfers a layer or none
    "collective.launch_s": (
        30e-6,
        0.3,
        "s",
        "prior: torch.distributed's and NCCL's enqueue of one collective from Python, with the events of two streams",
    ),
    **_link("nvlink3", 0.82, 1.35e6, 16e-6, 1.2e-6, _AZURE, alltoall=0.75, send=0.80),
    **_link("nvlink4", 0.826, 1.15e6, 13.5e-6, 1.2e-6, _AZURE, reduced=0.628, alltoall=0.75, send=0.835),
    **_link("nvlink5", 0.78, 1.85e6, 38e-6, 2.0e-6, _AZURE, reduced=0.54, alltoall=0.80, send=0.83),
    **_link("nvl72", 0.78, 1.85e6, 38e-6, 2.0e-6, "prior: as nvlink5, whose links it has", reduced=0.54, alltoall=0.75, send=0.83),
    **_link(
        "xgmi", 0.72, 1.0e6, 20e-6, 2.0e-6, "prior: RCCL's all-reduce of 8 MI300X reaches 304 to 330 GB/s of 448", alltoall=0.70, send=0.13
    ),
    **_link(
        "xgmi2",
        0.35,
        1.0e6,
        25e-6,
        3.0e-6,
        "prior: RCCL on 8 devices of MI250X reaches about a third of the package's links",
        alltoall=0.30,
        send=0.14,
    ),
    **_link("pcie", 0.60, 0.5e6, 25e-6, 4.0e-6, "prior: through the host bridge", alltoall=0.40, send=0.75),
    **_net("infiniband", 0.94, 1.6e6, 25e-6, 3.0e-6, _NODES, alltoall=0.80, send=0.80, tree=15e-6),
    **_net(
        "roce",
        0.90,
        2.0e6,
        30e-6,
        4.0e-6,
        "prior: as infiniband with the latency of DeepSeek-V3's table 5",
        alltoall=0.70,
        send=0.75,
        tree=20e-6,
    ),
    **_net("efa", 0.96, 1.1e6, 46e-6, 35e-6, _EFA, alltoall=0.60, send=0.73, tree=75e-6),
    **_net(
        "omnipath",
        0.75,
        2.5e6,
        40e-6,
        8.0e-6,
        "prior: its host moves the data; PSM2 below NCCL reaches 9 to 10 of 12.5 GB/s",
        alltoall=0.55,
        send=0.70,
        tree=30e-6,
    ),
    **_net("slingshot", 0.85, 2.5e6, 35e-6, 10e-6, "prior: between infiniband and efa", alltoall=0.60, send=0.75, tree=25e-6),
}
DEFAULTS: dict[str, float] = {name: value for name, (value, *_) in COLLECTIVES.items()}
_LINKS = {
    "a100": "nvlink3", "a100-40": "nvlink3", "a100-64": "nvlink3", "h100": "nvlink4", "h100-64": "nvlink4", "gh200": "nvlink4",
    "gh200-144": "nvlink4", "h200": "nvlink4", "b200": "nvlink5", "b300": "nvlink5", "gb200": "nvl72", "gb300": "nvl72", "rubin": "nvl72",
    "mi250x": "xgmi2", "mi300x": "xgmi", "mi325x": "xgmi", "mi350x": "xgmi", "mi355x": "xgmi", "mi430x": "xgmi", "mi455x": "nvl72",
}  # fmt: skip
_UNSWITCHED = ("gh200",)  # four joined by pairs: nothing reduces between them
_SLINGSHOT = ("mi250x",)
_PCIE_GBYTE_S = 64.0  # of sixteen lanes of its fifth generation; no scale-up link is as slow
_MESHED = ("link.xgmi", "link.xgmi2")  # every pair has a link of its own: fewer ranks have fewer links


def group(layout: Layout, axis: Axis, *, experts: bool = False, stack: Stack = "generic") -> tuple[int, int]:
    """`(ranks, stride)` of a group along `axis`: how many ranks, and how far apart neighbours are in the order above, Megatron's or our own by `stack`.

    What `shard` ranks share is shared by context ranks as well (they hold the same weights); of routed experts (`experts`), only by those with the same ones.
    Those of our own are neighbours along context and then far apart: the stride is the mean one, which is right wherever a unit holds whole expert groups.
    """
    if stack in WHOLE_EXPERTS and (axis == "expert" or (axis == "shard" and experts)):
        return _own_experts(layout, axis)
    tensor, context, shard = layout.tensor, layout.context, layout.shard
    if axis == "tensor":
        return (layout.expert_tensor, 1) if experts else (tensor, 1)
    if axis == "context":
        return context, tensor
    if axis == "expert":
        return layout.expert, layout.expert_tensor
    if axis == "shard":
        if experts:
            held = layout.expert * layout.expert_tensor
            return max(1, tensor * context * shard // held), held
        return shard * context, tensor
    if axis == "replicate":
        return layout.replicate, tensor * context * shard
    return layout.pipeline, tensor * context * shard * layout.replicate


def _own_experts(layout: Layout, axis: Axis) -> tuple[int, int]:
    """As parallel/mesh.py orders ranks: tensor, context, expert, and the rest of `shard` outermost; `expert` divides `shard`."""
    if axis == "expert":
        return layout.expert, layout.tensor * layout.context
    outer = max(1, layout.shard // layout.expert)
    return outer * layout.context, layout.tensor * (layout.expert if outer > 1 else 1)


def expert_span(layout: Layout, stack: Stack) -> int:
    """Ranks from the first to behind the last of an expert group: what a scale-up domain must have to hold it."""
    ranks, stride = group(layout, "expert", stack=stack)
    return ranks * stride


def link_kind(cluster: Cluster, level: Level) -> str:
    """Name of the constants of a level: `link.nvlink4`, `net.infiniband`. A level called `rail.efa` says its network itself; links of ranks that a faster
    scale-up domain is inside of are PCIe's."""
    name, _, said = level.name.partition(".")
    if name not in ("scale_up", "node"):
        return f"net.{said or ('slingshot' if cluster.chip in _SLINGSHOT else 'infiniband')}"
    if said:
        return f"link.{said}"
    slow = (name == "node" and level is not cluster.levels[0]) or level.gbyte_s <= _PCIE_GBYTE_S
    return f"link.{'pcie' if slow else _LINKS.get(cluster.chip, 'pcie')}"


def seconds(transfer: Transfer, cluster: Cluster, ranks: int, stride: int, constants: Mapping[str, float] = DEFAULTS) -> float:
    """Seconds of `transfer` among `ranks` that are `stride` apart, nothing else running; 0 for a group of one. What `constants` lacks is a default."""
    if ranks <= 1 or transfer.bytes <= 0:
        return 0.0
    if transfer.collective == "send":
        return _send(transfer, cluster, ranks, stride, constants)
    crossed = _crossed(cluster, ranks, stride)
    if transfer.collective == "all_to_all":
        return _all_to_all(transfer.bytes, ranks, crossed, constants)
    ring = _ring(transfer.bytes, ranks, crossed, constants, 2 if transfer.collective == "all_reduce" else 1)
    if transfer.collective == "all_reduce":
        return min(ring, _tree(transfer.bytes, ranks, crossed, cluster.chip not in _UNSWITCHED, constants))
    return ring


@dataclass(frozen=True, slots=True)
class _Crossing:
    """A level that a group crosses: `below` of its ranks are in one unit of what is inside, `within` in one unit of this level."""

    kind: str
    rate: float  # bytes a second of one rank, one direction, as sold: of traffic that leaves a unit by as many links as it has ranks in it
    all_rate: float  # of traffic that every rank sends out at once: behind an oversubscribed spine less
    below: int
    within: int


def _crossed(cluster: Cluster, ranks: int, stride: int) -> list[_Crossing]:
    """The levels that the group crosses, inner to outer; a spine behind the same NICs as the rail is one level with it.

    A ring leaves a unit of the rail once by each of a node's links, so that an oversubscription of less than the nodes of a unit does not slow it.
    """
    found: list[_Crossing] = []
    below, inner = 1, 1  # ranks of the group, and of the machine, in a unit of the level inside
    for index, level in enumerate(cluster.levels):
        within = ranks if index == len(cluster.levels) - 1 else min(ranks, max(1, level.accelerators // stride))
        if within <= below:
            inner = max(inner, level.accelerators)
            continue
        sold = level.gbyte_s * 1e9
        kind = link_kind(cluster, level)
        before = found[-1] if found and found[-1].kind == kind else None
        links = max(1, (before.below if before else below) * stride)
        rate = sold * min(1.0, inner / links / level.oversubscription)
        all_rate = sold / level.oversubscription
        if before:
            found[-1] = _Crossing(kind, min(before.rate, rate), min(before.all_rate, all_rate), before.below, within)
        else:
            found.append(_Crossing(kind, rate if kind.startswith("net.") else sold, all_rate, below, within))
        below, inner = within, max(inner, level.accelerators)
        if within == ranks:
            break
    return found


def _of(constants: Mapping[str, float], name: str) -> float:
    value = constants.get(name)
    return DEFAULTS[name] if value is None else value


def _reached(kind: str, rate: float, what: str, chunk: float, peers: int, constants: Mapping[str, float]) -> float:
    """Bytes a second of one rank on a link for pieces of `chunk` bytes."""
    if kind in _MESHED and what != "send_share":
        rate *= min(1.0, (peers - 1) / 7)
    return rate * _of(constants, f"{kind}.{what}") / (1 + math.sqrt(_of(constants, f"{kind}.half_bytes") / chunk))


def _ring(size: float, ranks: int, crossed: list[_Crossing], constants: Mapping[str, float], passes: int) -> float:
    """One ring through all ranks that enters and leaves each unit once; `passes` 2 of an all-reduce."""
    moved, chunk = passes * size * (ranks - 1) / ranks, size / ranks
    longest = latency = 0.0
    for level in crossed:
        reached = _reached(level.kind, level.rate, "share", chunk, level.within, constants)
        longest = max(longest, moved / (level.below * reached))
        units, outer = (
            -(-ranks // level.below),
            -(-ranks // level.within),
        )  # the ring's links that leave a unit; those that leave this level
        steps = units - outer if outer > 1 else units - 1
        latency += _of(constants, f"{level.kind}.latency_s") + passes * steps * _of(constants, f"{level.kind}.step_s")
    return latency + longest


def _tree(size: float, ranks: int, crossed: list[_Crossing], switched: bool, constants: Mapping[str, float]) -> float:
    """All-reduce in the switch within a unit (a ring where it has none), then a double binary tree between units: latency grows with their logarithm."""
    longest = latency = 0.0
    for level in crossed:
        chunk = size / ranks
        if level.kind.startswith("link."):
            moved = 2 * size * (level.within - 1) / level.within
            took = moved / (level.below * _reached(level.kind, level.rate, "share", chunk, level.within, constants))
            steps = 2 * (level.within - 1)
            if switched and level.within > 2 and _of(constants, f"{level.kind}.reduced_share") > 0:
                took = min(took, size / (level.below * _reached(level.kind, level.rate, "reduced_share", chunk, level.within, constants)))
                steps = 2
            longest = max(longest, took)
            latency += _of(constants, f"{level.kind}.latency_s") + steps * _of(constants, f"{level.kind}.step_s")
            continue
        units = -(-ranks // level.below)
        # of two units each sends its half once; in a larger tree an inner unit sends up and down
        moved = size * (1.0 if units == 2 else 2.0)
        reached = _reached(level.kind, level.rate, "share", size / (level.below * min(units, 4)), level.within, constants)
        longest = max(longest, moved / (level.below * reached))
        latency += _of(constants, f"{level.kind}.latency_s") + 2 * math.ceil(math.log2(units)) * _of(constants, f"{level.kind}.tree_s")
    return latency + longest


def _all_to_all(size: float, ranks: int, crossed: list[_Crossing], constants: Mapping[str, float]) -> float:
    """Every rank sends size/ranks to each: what leaves a unit goes over the rank's own link of that level; levels run at once."""
    longest = latency = 0.0
    for level in crossed:
        leaving = size * ((ranks if level.kind.startswith("net.") else level.within) - level.below) / ranks
        reached = _reached(level.kind, level.all_rate, "alltoall_share", size / ranks, level.within, constants)
        longest = max(longest, leaving / reached)
        latency += _of(constants, f"{level.kind}.latency_s") + math.log2(level.within / level.below) * _of(
            constants, f"{level.kind}.step_s"
        )
    return latency + longest


def _send(transfer: Transfer, cluster: Cluster, ranks: int, stride: int, constants: Mapping[str, float]) -> float:
    """To the next rank of the group. A context ring's sends, ranks - 1 of them in `bytes`, all wait for the one that goes farthest."""
    whole = transfer.axis == "context"
    span = ranks * stride if whole else stride + 1
    level = next((level for level in cluster.levels if span <= level.accelerators), cluster.levels[-1])
    count = ranks - 1 if whole else 1
    size, kind = max(transfer.bytes / count, 1.0), link_kind(cluster, level)
    return count * (_of(constants, f"{kind}.latency_s") + size / _reached(kind, level.gbyte_s * 1e9, "send_share", size, 2, constants))
