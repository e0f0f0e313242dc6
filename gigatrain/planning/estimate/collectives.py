"""Seconds of a collective: alpha-beta by level (scale-up link, then network), with a bandwidth that depends on the size of what one rank passes on.

Rank order is Megatron's: tensor innermost, then context, then shard, then replicate, pipeline outermost. Expert groups are cut out of shard x context (and of
tensor where `expert_tensor` is 1), innermost first. So a tensor group sits on neighbours of one node, and the ranks of a node that hold the same place in
different groups of an outer axis each run their own group over their own NIC: a group with `c` ranks in a node has `c` NICs there.

A ring of n ranks passes S (n-1)/n bytes (an all-reduce twice that) through every rank; between units of c ranks, c links carry it. A link of rate B reaches
`share x B / (1 + sqrt(half_bytes / chunk))` with chunk = S/n, what one rank passes on at once: nccl-tests' busbw over size, on 8 ranks and on 1,024, falls off
with the root of the chunk and not as 1/(1 + h/S), which would be a second latency. A tree of two levels, and reduction in the switch, are taken where they are
the quicker of an all-reduce, as NCCL does. Free of torch.
"""

import math
from collections.abc import Mapping

from gigatrain.planning.estimate.cluster import Cluster, Level
from gigatrain.planning.estimate.work import Axis, Transfer
from gigatrain.planning.estimate.workload import Layout
from gigatrain.planning.hardware import CHIPS

Published = tuple[float, float, str, str]  # value, spread of its prior in log, unit, source
_AZURE = "fitted on nccl-tests' tables by size of Azure/AI-benchmarking-guide (A100, H100) and stas00/ml-engineering network/ (H200, B200)"
_NODES = "fitted on busbw over nodes: NVIDIA/nccl#1229 (reduce-scatter, H100, 4 to 128 nodes) and #1218 (all-gather of 2 GB, 32 nodes)"
_EFA = "fitted on aws-samples/awsome-distributed-training nccl-tests (2 x p5), stas00 (4 x p6) and the nanotron playbook (1 to 64 nodes)"


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
    **_link("nvlink3", 0.80, 1.3e6, 20e-6, 1.5e-6, _AZURE, alltoall=0.75, send=0.80),
    **_link("nvlink4", 0.83, 0.4e6, 12e-6, 1.5e-6, _AZURE, reduced=0.615, alltoall=0.75, send=0.835),
    **_link("nvlink5", 0.78, 0.6e6, 15e-6, 1.5e-6, _AZURE, reduced=0.55, alltoall=0.80, send=0.83),
    **_link("nvl72", 0.78, 0.6e6, 15e-6, 1.5e-6, "prior: as nvlink5, whose links it has", reduced=0.55, alltoall=0.75, send=0.83),
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
    **_net("infiniband", 0.94, 1.5e6, 25e-6, 3.0e-6, _NODES, alltoall=0.80, send=0.80, tree=15e-6),
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
    **_net("efa", 0.94, 4.0e6, 60e-6, 20e-6, _EFA, alltoall=0.60, send=0.73, tree=40e-6),
    **_net("slingshot", 0.85, 2.5e6, 35e-6, 6.0e-6, "prior: between infiniband and efa", alltoall=0.60, send=0.75, tree=25e-6),
}
DEFAULTS: dict[str, float] = {name: value for name, (value, *_) in COLLECTIVES.items()}
_LINKS = {
    "a100": "nvlink3", "a100-40": "nvlink3", "a100-64": "nvlink3", "h100": "nvlink4", "h100-64": "nvlink4", "gh200": "nvlink4",
    "gh200-144": "nvlink4", "h200": "nvlink4", "b200": "nvlink5", "b300": "nvlink5", "gb200": "nvl72", "gb300": "nvl72", "rubin": "nvl72",
    "mi250x": "xgmi2", "mi300x": "xgmi", "mi325x": "xgmi", "mi350x": "xgmi", "mi355x": "xgmi", "mi430x": "xgmi", "mi455x": "nvl72",
}  # fmt: skip
_UNSWITCHED = ("gh200",)  # four joined by pairs: nothing reduces between them
_SLINGSHOT = ("mi250x",)
_MESHED = ("xgmi", "xgmi2")  # every pair has a link of its own: fewer ranks have fewer links


def group(layout: Layout, axis: Axis, *, experts: bool = False) -> tuple[int, int]:
    """`(ranks, stride)` of a group along `axis`: how many ranks, and how far apart neighbours are in the order above.

    What `shard` ranks share is shared by context ranks as well (they hold the same weights); of routed experts (`experts`), only by those with the same ones.
    """
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


def link_kind(cluster: Cluster, level: Level) -> str:
    """Name of the constants of a level: `link.nvlink4`, `net.infiniband`. A level called `rail.efa` says its network itself."""
    name, _, said = level.name.partition(".")
    if name in ("scale_up", "node"):
        return f"link.{said or ('pcie' if name == 'node' and len(cluster.levels) > 1 and level is not cluster.levels[0] else _LINKS.get(cluster.chip, 'pcie'))}"
    return f"net.{said or ('slingshot' if cluster.chip in _SLINGSHOT else 'infiniband')}"


def seconds(transfer: Transfer, cluster: Cluster, ranks: int, stride: int, constants: Mapping[str, float] = DEFAULTS) -> float:
    """Seconds of `transfer` among `ranks` that are `stride` apart, nothing else running; 0 for a group of one. What `constants` lacks is a default."""
    if transfer.collective == "send":
        return _send(transfer.bytes, cluster, stride, constants) if ranks > 1 else 0.0
    if ranks <= 1 or transfer.bytes <= 0:
        return 0.0
    crossed = _crossed(cluster, ranks, stride)
    if transfer.collective == "all_to_all":
        return _all_to_all(transfer.bytes, cluster, ranks, crossed, constants)
    ring = _ring(transfer.bytes, cluster, ranks, crossed, constants, 2 if transfer.collective == "all_reduce" else 1)
    if transfer.collective == "all_reduce":
        return min(ring, _tree(transfer.bytes, cluster, ranks, crossed, constants))
    return ring


# (kind, bytes a second of one rank as sold, ranks of the group below this level, ranks of the group within it)
_Crossed = tuple[str, float, int, int]


def _crossed(cluster: Cluster, ranks: int, stride: int) -> list[_Crossed]:
    """The levels that the group crosses, inner to outer."""
    devices = CHIPS[cluster.chip].devices if cluster.chip in CHIPS else 1
    found: list[_Crossed] = []
    below, narrowest = 1, math.inf
    for index, level in enumerate(cluster.levels):
        last = index == len(cluster.levels) - 1
        within = ranks if last else min(ranks, max(1, level.accelerators * devices // stride))
        rate = level.gbyte_s / level.oversubscription * 1e9 / devices
        kind = link_kind(cluster, level)
        if kind.startswith("net."):  # a spine is behind the same NIC as the rail
            narrowest = rate = min(narrowest, rate)
        if within > below:
            found.append((kind, rate, below, within))
            below = within
        if within == ranks:
            break
    return found


def _of(constants: Mapping[str, float], name: str) -> float:
    value = constants.get(name)
    return DEFAULTS[name] if value is None else value


def _reached(kind: str, rate: float, what: str, chunk: float, peers: int, constants: Mapping[str, float]) -> float:
    """Bytes a second of one rank on a link for pieces of `chunk` bytes."""
    if kind in ("link.xgmi", "link.xgmi2") and what != "send_share":
        rate *= min(1.0, (peers - 1) / 7)
    return rate * _of(constants, f"{kind}.{what}") / (1 + math.sqrt(_of(constants, f"{kind}.half_bytes") / chunk))


def _ring(size: float, cluster: Cluster, ranks: int, crossed: list[_Crossed], constants: Mapping[str, float], passes: int) -> float:
    """One ring through all ranks that enters and leaves each unit once; `passes` 2 of an all-reduce."""
    moved, chunk = passes * size * (ranks - 1) / ranks, size / ranks
    longest = latency = 0.0
    done = 1  # of the ring's steps, those that cross nothing
    for kind, rate, below, within in crossed:
        longest = max(longest, moved / (below * _reached(kind, rate, "share", chunk, within, constants)))
        units = -(-ranks // below)  # links of the ring that leave a unit of `below` ranks
        outer = -(-ranks // within)
        steps = (units - outer) if outer > 1 else (units - 1)
        latency += _of(constants, f"{kind}.latency_s") + passes * steps * _of(constants, f"{kind}.step_s")
        done += steps
    return latency + longest


def _tree(size: float, cluster: Cluster, ranks: int, crossed: list[_Crossed], constants: Mapping[str, float]) -> float:
    """All-reduce in the switch within a unit (a chain where it has none), then a double binary tree between the units: latency grows with their logarithm."""
    longest = latency = 0.0
    for kind, rate, below, within in crossed:
        if kind.startswith("link."):
            chunk = size / ranks
            ring = _reached(kind, rate, "share", chunk, within, constants)
            moved = 2 * size * (within - 1) / within
            took = moved / (below * ring)
            reduced = _of(constants, f"{kind}.reduced_share")
            if reduced > 0 and cluster.chip not in _UNSWITCHED and within > 2:
                took = min(took, size / (below * _reached(kind, rate, "reduced_share", chunk, within, constants)))
            longest = max(longest, took)
            latency += _of(constants, f"{kind}.latency_s") + 2 * (within - 1) * _of(constants, f"{kind}.step_s")
            continue
        units = -(-ranks // below)
        # of two units each sends its half once; in a larger tree an inner unit sends up and down
        moved = size * (1.0 if units == 2 else 2.0)
        longest = max(longest, moved / (below * _reached(kind, rate, "share", size / (below * min(units, 4)), within, constants)))
        latency += _of(constants, f"{kind}.latency_s") + math.ceil(math.log2(units)) * 2 * _of(constants, f"{kind}.tree_s")
    return latency + longest


def _all_to_all(size: float, cluster: Cluster, ranks: int, crossed: list[_Crossed], constants: Mapping[str, float]) -> float:
    """Every rank sends size/ranks to each: what leaves a unit goes over the rank's own link of that level; levels run at once."""
    longest = latency = 0.0
    for kind, rate, below, within in crossed:
        leaving = size * (ranks - below) / ranks if kind.startswith("net.") else size * (within - below) / ranks
        longest = max(longest, leaving / _reached(kind, rate, "alltoall_share", size / ranks, within, constants))
        latency += _of(constants, f"{kind}.latency_s") + math.log2(within / below) * _of(constants, f"{kind}.step_s")
    return latency + longest


def _send(size: float, cluster: Cluster, stride: int, constants: Mapping[str, float]) -> float:
    """To the rank `stride` away."""
    devices = CHIPS[cluster.chip].devices if cluster.chip in CHIPS else 1
    chosen = next((level for level in cluster.levels if stride < level.accelerators * devices), cluster.levels[-1])
    kind = link_kind(cluster, chosen)
    rate = chosen.gbyte_s / chosen.oversubscription * 1e9 / devices
    return _of(constants, f"{kind}.latency_s") + max(size, 1.0) / _reached(kind, rate, "send_share", max(size, 1.0), 2, constants)
