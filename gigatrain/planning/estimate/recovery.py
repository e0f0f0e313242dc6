"""What a save stalls, what a restart takes, and what a pool of spare nodes holds: the durations that goodput.py and its simulation share.

Sources are named as in failures.py.
"""

import math
from dataclasses import dataclass

from gigatrain.planning.estimate.failures import DAY_S

# LLAMA3: Tectonic gave 2 TB/s sustained to 16,384 accelerators. What is assumed where a site's write bandwidth is unknown.
WRITE_GBYTE_S = 2000 / 16_384  # of an accelerator


@dataclass(frozen=True, slots=True)
class Saving:
    """Checkpoints at two tiers: `near`, in node memory with a copy at a peer, and `far`, on the shared file system. Intervals of 0 are chosen best.

    A far save of `synchronous` stalls while it is written; else while it is copied to host memory, and a little by its writing; it counts once it is written.
    """

    checkpoint_bytes: float
    write_gbyte_s: float  # of the shared file system, for all
    read_gbyte_s: float = 0.0  # 0: as it is written
    synchronous: bool = True
    near: bool = False
    copy_gbyte_s: float = 20.0  # of an accelerator to host memory; PCIe 4 x16 gives about 25 of its 32 (prior)
    peer_gbyte_s: float = 10.0  # of an accelerator to a peer's memory, beside training; a fifth of its NIC of 400 Gbit/s (prior)
    beside_share: float = (
        0.01  # of training's rate, taken while something is written beside it; ROBUST: saving every step costs less than 0.9 % (prior)
    )
    commit_s: float = 0.0  # added to every far save: gathering the manifest, a barrier, metadata; measure it
    near_interval_s: float = 0.0
    far_interval_s: float = 0.0

    def far_s(self) -> float:
        """Of a far save's writing."""
        return self.checkpoint_bytes / (self.write_gbyte_s * 1e9) + self.commit_s

    def copy_s(self, accelerators: int) -> float:
        """To host memory: training stands still."""
        return self.checkpoint_bytes / accelerators / (self.copy_gbyte_s * 1e9)

    def near_stall_s(self, accelerators: int) -> float:
        return self.copy_s(accelerators) + self.beside_share * self.near_lag_s(accelerators)

    def near_lag_s(self, accelerators: int) -> float:
        """From a near save's stall until its peer has it."""
        return self.checkpoint_bytes / accelerators / (self.peer_gbyte_s * 1e9)

    def far_stall_s(self, accelerators: int) -> float:
        return self.far_s() if self.synchronous else self.copy_s(accelerators) + self.beside_share * self.far_s()

    def far_lag_s(self) -> float:
        return 0.0 if self.synchronous else self.far_s()

    def load_s(self, accelerators: int, near: bool) -> float:
        """Of reading a checkpoint back: from the shared file system, or from memory of one's own node or a peer's."""
        if near:
            return self.near_lag_s(accelerators)
        return self.checkpoint_bytes / ((self.read_gbyte_s or self.write_gbyte_s) * 1e9)


@dataclass(frozen=True, slots=True)
class Restart:
    """From the moment a run is being stopped to its next step, without loading a checkpoint.

    The defaults give HSDP's figure 2: of 200, 300, 600 and 900 s at 16K, 22K, 64K and 98K (cold) they say 200, 255, 635 and 905, of which forming the
    communicators is 17, 26, 115 and 200 (published 17, 30, 100, 200). Warm, with nodes at hand, 98K took about 600.
    """

    allocation_s: float = 78.0  # another node from the scheduler; what cold is more than warm
    start_s: float = 45.0  # interpreters, imports, contexts
    rendezvous_s: float = 17.0  # communicators of `of` accelerators
    first_s: float = 60.0  # compiling, warming up, the first step
    of: int = 16_384
    growth: float = 0.75  # exponent of all but the rendezvous beyond `of`; fitted on HSDP's figure 2
    rendezvous_growth: float = 1.38  # exponent of the rendezvous; fitted on the same
    standby: bool = False  # spare nodes wait with everything loaded: no allocation
    stall_s: float = 180.0  # all replicas, when one is lost and the others go on; HSDP: 3 minutes
    rejoin_s: float = 0.0  # all replicas, when it is back; HSDP has a stall of about 100 s, not in its own 80 %

    def seconds(self, accelerators: int) -> float:
        times = max(1.0, accelerators / self.of) ** self.growth
        fixed = (0.0 if self.standby else self.allocation_s) + self.start_s + self.first_s
        return fixed * times + self.rendezvous_s * (accelerators / self.of) ** self.rendezvous_growth


@dataclass(frozen=True, slots=True)
class Spares:
    """Nodes beyond those that a run needs. `nodes` None: as many as are best. Where none is left the run waits for a repair, or `shrinks` by replicas."""

    nodes: int | None = None
    repair_s: float = DAY_S  # a node, mean; prior
    shrink: bool = False
    idle_share: float = 1.0  # of an accelerator's cost that a spare has: 1 where accelerators count, about 0.3 where watts do

    def held(self, single_s: float, together_s: float, together: int, nodes: int) -> "Pool":
        """What `nodes` spares do against losing single nodes at `single_s` and `together` nodes at `together_s` (1/s, while the run runs)."""
        if single_s + together_s <= 0 or self.repair_s <= 0:
            return Pool(nodes, 0.0, (1.0,))
        load = (single_s + together_s * together) * self.repair_s
        needed = math.ceil(load + 12 * math.sqrt(load * together) + 12 * together)  # beyond it none is ever short
        return Pool(nodes, *_out(single_s * self.repair_s, together_s * self.repair_s, together, min(nodes, needed), self.shrink))


@dataclass(frozen=True, slots=True)
class Pool:
    """`wait`: share of the wall-clock in which the run waits for a repair. `out[j]`: share with j nodes in repair."""

    nodes: int
    wait: float
    out: tuple[float, ...]

    def missing(self, nodes_per_replica: float, replicas: int) -> float:
        """Mean share of the replicas that cannot run for want of nodes; what is left of a broken replica mends the next."""
        lost = 0.0
        for count, share in enumerate(self.out[self.nodes + 1 :], 1):
            lost += share * min(replicas, -(-count // max(nodes_per_replica, 1)))
        return lost / replicas


def _out(single: float, together: float, size: int, spares: int, shrink: bool) -> tuple[float, tuple[float, ...]]:
    """Stationary law of the nodes in repair, by the flow across each cut: losses up, each node's own repair down (rates in repairs).

    Losses stop while the run waits, so a pool without correlated losses is Erlang's loss system of spares + 1 lines, whatever the law of a repair.
    """
    load = single + together * size
    last = int(load + 10 * (load * size) ** 0.5 + 10 * size + spares) if shrink else spares + size
    most = last if shrink else spares  # beyond it nothing is lost: the run waits
    law, total = [1.0], 1.0
    batch = 1.0 if most >= 0 else 0.0  # sum of law over the states from which a joint loss crosses the cut
    for count in range(last):
        up = (single * law[count] if count <= most else 0.0) + together * batch
        law.append(up / (count + 1))
        total += law[-1]
        batch += (law[count + 1] if count + 1 <= most else 0.0) - (law[count + 1 - size] if 0 <= count + 1 - size <= most else 0.0)
        if total > 1e200:
            law, total, batch = [one / total for one in law], 1.0, batch / total
    law = [max(0.0, one) / total for one in law]
    return (0.0 if shrink else sum(law[spares + 1 :])), tuple(law)
