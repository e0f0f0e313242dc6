"""What a number of watts or joules is of, and how sure it is.

Scopes nest: memory is within a GPU, a GPU within its module where it has one (GH200: module = GPU + Grace + memory), that within the node, the node
within IT, IT within the facility. What is nested is never added to what holds it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol

from gigatrain.errors import PowerError

Scope = Literal["memory", "gpu", "cpu", "dram", "module", "node", "fabric", "storage", "it", "facility"]
Provenance = Literal["measured", "estimated", "nameplate", "declared"]
PROVENANCES: dict[Provenance, str] = {
    "measured": "a meter counted it while the run ran",
    "estimated": "by a rule from what was measured, or from figures of alike machines; the rule is named",
    "nameplate": "the most that the maker says it draws",
    "declared": "the operator or the maker says so",
}
WITHIN: dict[Scope, tuple[Scope, ...]] = {  # what may hold it
    "memory": ("gpu", "module", "node", "it", "facility"),
    "gpu": ("module", "node", "it", "facility"),
    "cpu": ("module", "node", "it", "facility"),
    "dram": ("module", "node", "it", "facility"),
    "module": ("node", "it", "facility"),
    "node": ("it", "facility"),
    "fabric": ("it", "facility"),
    "storage": ("it", "facility"),
    "it": ("facility",),
    "facility": (),
}
BOUNDARIES = ("device", "node", "it", "facility")  # device: the GPU, or the module where the meter is the module's


@dataclass(frozen=True)
class Reading:
    """Joules of one thing over some time. `place` is a path, outermost first: ("node17", "GPU-3f..."); what lies within begins with the same words."""

    place: tuple[str, ...]
    scope: Scope
    joules: float
    provenance: Provenance
    source: str = ""


def total(readings: Iterable[Reading]) -> float:
    """Joules of all of them together, of one stretch of time; raises PowerError where one is within another, or is there twice."""
    known = list(readings)
    for number, one in enumerate(known):
        for other in known[number + 1 :]:
            for inner, outer in ((one, other), (other, one)):
                if inner.place[: len(outer.place)] == outer.place and (outer.scope == inner.scope or outer.scope in WITHIN[inner.scope]):
                    raise PowerError(
                        f"{inner.scope} {'/'.join(inner.place)} ({inner.source}) lies within {outer.scope} {'/'.join(outer.place)} ({outer.source}): "
                        "their joules are not added; take one of the two"
                    )
    return sum(one.joules for one in known)


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at a meter. A source gives a counter, or watts, or both."""

    time_s: float  # time.monotonic() half-way between before and after the look
    counter_mj: int | None = None  # millijoules since some moment in the past
    milliwatts: int | None = None  # now, or over the meter's own short mean
    reasons: int | None = None  # NVML's clock event reasons; of other makers translated to its bits; None: this meter gives none


class Source(Protocol):
    """A meter of one thing. `read` is called from the meter's thread only; it takes microseconds to milliseconds, and raises OSError or PowerError when
    the thing does not answer, which the meter takes for a gap."""

    place: tuple[str, ...]
    scope: Scope
    name: str  # how it is called in a report: "NVML energy counter, H100"
    wrap_mj: int | None  # a counter that reaches this begins again at 0 (RAPL); None: one that goes back was reset
    update_s: float  # how often the meter itself has news

    def read(self) -> Sample: ...

    def close(self) -> None: ...


# What is summed over the nodes of a run once a window, as integers: order and names are the record's.
@dataclass
class Taken:
    """What the meters of a node (or, summed, of all nodes) saw since they were last asked. mJ: millijoules; ms: milliseconds times things."""

    nodes: int = 0  # whose meter answered this time
    ms: int = 0  # node-milliseconds of the interval
    devices: int = 0  # packages or modules that are metered, or known to be there
    device_ms: int = 0  # of these, the time for which there are joules
    device_measured_mj: int = 0
    device_estimated_mj: int = 0
    device_nameplate_mj: int = 0
    node_measured_mj: int = 0  # the whole node, devices included: what of it meters counted,
    node_estimated_mj: int = 0  # what a rule added,
    node_nameplate_mj: int = 0  # what a nameplate stands for
    node_unknown_ms: int = 0  # node-milliseconds for which nobody knows what the node drew beside its devices
    device_unknown_ms: int = 0  # device-milliseconds for which nobody knows
    cpu_mj: int = 0  # processors and memory by RAPL or hwmon: part of the node's measured
    counter_mj: int = 0  # of devices that have counter and watts: by the counter,
    integral_mj: int = 0  # and by the integral of watts over the same stretches
    gaps: int = 0  # counters that went back, meters that did not answer
    gap_ms: int = 0  # device-milliseconds of them
    power_capped_ms: int = 0  # device-milliseconds for which the clocks were held down by the power limit,
    thermal_ms: int = 0  # by heat,
    brake_ms: int = 0  # by the power brake or another hardware slowdown
    recovered_mj: int = 0  # node joules of a process that was killed, counted by the next one on the same node: part of the node's measured
    reasons_ms: int = 0  # device-milliseconds for which a meter said whether and why clocks were held down
    bins: list[tuple[int, int, int, int]] = field(default_factory=list)  # number, nodes that have closed it, device mJ, node mJ

    def ints(self) -> list[int]:
        """Without the bins, in the order of FIELDS."""
        return [getattr(self, name) for name in FIELDS]

    def held_down(self, ms: int) -> float | None:
        """`power_capped_ms`, `thermal_ms` or `brake_ms` as a share of the time for which reasons were read; None where that is not half of the devices'."""
        return ms / self.reasons_ms if self.reasons_ms and 2 * self.reasons_ms >= self.device_ms else None

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Taken":
        """The opposite of `ints`."""
        made = cls()
        for name, number in zip(FIELDS, numbers, strict=True):
            setattr(made, name, number)
        return made


FIELDS = tuple(one.name for one in fields(Taken) if one.name != "bins")
BIN_S = 10  # the grid looks at changes over so long


@dataclass(frozen=True, slots=True)
class Seen:
    """What all ranks know of the time since the governor's last decision: reduced, so the same everywhere. Before the first step: `steps` 0."""

    now_s: float  # one wall-clock for all, seconds since 1970
    watts: float | None  # mean over `window_s` at `boundary`; None: unknown
    watts_device: float | None = None
    step_s: float | None = None  # mean seconds between the starts of two steps, without saves and validations
    busy_share: float = 1.0  # of `step_s`, what was not waited in Pace
    devices: int = 0
    window_s: float = 0.0
    steps: int = 0
    tokens: int = 0
    # Steps to the next save that holds them up, or the run's end; one that follows this decision at once is not meant.
    stops_after: int | None = None
    boundary: str = "facility"  # the widest that is known
    bins: tuple[tuple[float, float], ...] = ()  # that have closed: when each began, seconds since 1970, and its 10-s mean at `boundary`
    mixed: bool = False  # a validation, a restart or a compilation is within it: nothing is learnt
    cap_min_share: float | None = None  # the least limit of its accelerators, over `watts.device_watts`; None: limits cannot be set
