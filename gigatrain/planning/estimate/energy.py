"""Watts of a run while it trains, from what its accelerators do: at the device, the node, IT and the facility, with MWh, euros and tCO2.

A device draws, of the limit that it is sold with, a share that depends on what it does (POWER), never more than the limit that is set. Around it is a server
(SERVERS): processors, memory, network cards, switches of the board; fans, where it is cooled by air; losses of the supplies. Fabric, storage and PUE are the
site's figures (watts.py). Three figures are kept apart: the nameplate (what the maker says at most), the cap (what is set), the typical (what such nodes
drew). Of what nobody knows the boundary is unknown, with the reason. Definitions of the boundaries are POWER.md's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gigatrain.errors import PlanError
from gigatrain.planning import hardware
from gigatrain.planning.estimate import rates
from gigatrain.planning.estimate.cluster import Cluster
from gigatrain.planning.estimate.constants import VALUES
from gigatrain.planning.estimate.work import Estimate, Kind
from gigatrain.planning.estimate.workload import Workload
from gigatrain.planning.expected import Range
from gigatrain.planning.watts import Watts
from gigatrain.site import UNKNOWN, Figure

Cooling = Literal["air", "water", "immersed", "unknown"]
COMPUTE = ("gemm", "grouped", "attention", "memory", "optimizer")
BOUNDARIES = ("device", "node", "it", "facility")


@dataclass(frozen=True, slots=True)
class Share:
    """A share of something, with the ends of its 90 % interval."""

    value: float
    low: float
    high: float
    source: str

    def range(self, times: float = 1.0) -> tuple[float, float, float]:
        return self.low * times, self.value * times, self.high * times


_LOGS = "MLPerf Training power logs second by second (training_results_v4.0 smc-ac-power, v4.1 Dell, v5.0 Lenovo; own arithmetic)"
# What a device draws while it does one thing, over the limit that it is sold with. Idle is a device that holds memory and waits: no kernel runs.
POWER: dict[str, Share] = {
    "idle": Share(0.17, 0.12, 0.22, f"prior: 120 W of an H100 with its context and clocks up; nodes that wait within {_LOGS} draw 2.6 to 2.8 kW"),
    "communication": Share(0.35, 0.25, 0.50, f"prior: kernels that poll and copy, no tensor core; between idle and HBM-bound. {_LOGS} bear it out"),
    "memory": Share(0.65, 0.55, 0.75, "prior: HBM-bound kernels on A100 and H100 stay at 0.6 to 0.7 of the limit, products at all of it"),
    "optimizer": Share(0.65, 0.55, 0.75, "as memory: passes over memory"),
    "attention": Share(0.93, 0.85, 1.0, "prior: tensor cores wait for the exponentials, between HBM-bound and products"),
    "grouped": Share(0.95, 0.85, 1.0, "prior: as products, of smaller tiles and more traffic"),
    "gemm": Share(1.0, 0.95, 1.0, "large products draw the limit: clocks fall under it on every generation since A100 (MAMF, hardware.py)"),
}  # fmt: skip
MIX = 0.05  # of the devices' watts: what a wrong operation mix makes of them, 90 %; half of the spread of one job on eight Dell nodes (8.05 to 8.6 kW)

# Caps: the middle is the law of rates.clock_of (constants power.*); these are the ends of its 90 % interval, and where voltage can fall no further.
EXPONENT = Share(
    4.0, 2.0, 5.0,
    "P ~ f V^2; sweeps with STATIC taken off give 2.6 (RTX 3090, noonghunna/club-3090#104: 0.80 of the rate at 175 for 281 W), 3.7 (V100, "
    "bradrlaw/ai-server#32: 0.88 at 175 for 250 W) and about 1.2 far down (GB300, facebookexperimental/triton#2023: 0.28 to 0.39 at 500 for 1400 W)",
)  # fmt: skip
STATIC = Share(0.25, 0.35, 0.15, "draw that stays at any clock; a high share leaves less for clocks, so it is the low end")
FLOOR = 0.6  # prior: share of the clock at which the voltage is lowest; below it the draw falls with the clock alone. In the low end only


@dataclass(frozen=True, slots=True)
class Server:
    """What is around the accelerators of a node, watts for each of them: `rest` behind the supplies while it trains, `held` while all wait; `fans` of all that
    the supplies give; `efficiency` of the supplies."""

    cooling: Cooling
    rest: Share
    held: Share
    fans: Share
    efficiency: Share
    sources: tuple[str, ...] = ()


# Per accelerator of a node of eight with two processors, 32 memory modules, eight network cards and the switches of the board: what is left of each metered
# node when its devices (POWER), fans and losses are taken off. benchmarks/plan_power.py finds it again, and without each system.
REST = Share(240.0, 205.0, 280.0, f"fitted on {_LOGS}: 224 to 278 W over ten sets of runs on three makers' nodes")
HELD = Share(205.0, 165.0, 245.0, f"fitted on {_LOGS}: nodes of the same three while no kernel runs")
# Of nodes of four, with one or two processors and one network card for each: two systems' HPL (all of IT) less what their devices may draw.
REST_OF_FOUR = Share(
    80.0, 40.0, 200.0, "prior: 596 W of IT for each 500 W MI250X of LUMI, 542 W for each A100 of Leonardo, both at HPL, fabric within"
)
_FANS: dict[Cooling, Share] = {
    "air": Share(0.15, 0.10, 0.20, f"what Dell's nodes draw beyond SMC's in {_LOGS}; the ends are a prior"),
    "water": Share(0.0, 0.0, 0.03, "prior: no fans; a few where drives and memory are in air"),
    "immersed": Share(0.0, 0.0, 0.01, "no fans within the node; pumps are the facility's"),
    "unknown": Share(0.075, 0.0, 0.18, "the middle between air and water: nobody says how this node is cooled"),
}  # fmt: skip
EFFICIENCY = Share(
    0.96, 0.94, 0.98, "80 Plus Titanium at half load; 0.96 and 0.94 in Dell's and Lenovo's logs, 0.975 between SMC's two meters"
)


def server(cooling: Cooling = "unknown", efficiency: Share = EFFICIENCY, rest: Share = REST, held: Share = HELD) -> Server:
    """A node of x86 processors around its accelerators, by how it is cooled."""
    fans = _FANS[cooling]
    return Server(cooling, rest, held, fans, efficiency, (rest.source, fans.source, efficiency.source))


@dataclass(frozen=True, slots=True)
class Draw:
    """Of the whole run. Watts are means while it trains; `peak` with every device at its limit; `held` while all wait (a restart, a synchronous checkpoint)."""

    watts: dict[str, Range] = field(default_factory=dict)  # device, node, it, facility: what is known of them
    peak: dict[str, float] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)
    ramp_watts: float | None = None  # at IT, between a step's compute and its communication, were all ranks in step: a bound
    checkpoint_watts: float | None = None  # at IT, what falls away while a synchronous checkpoint is written
    device: Range | None = None  # of one accelerator
    states: dict[str, float] = field(default_factory=dict)  # of one accelerator: watts while it does each kind of work
    accelerators: int = 0
    nameplate: Figure = UNKNOWN  # of a node, by its maker
    typical: Figure = UNKNOWN  # of a node, as such nodes were metered in training, or 0.67 of the nameplate
    cap: Figure = UNKNOWN  # of one accelerator, as it is set
    total: Figure = UNKNOWN  # of a node with its share of everything, by the site's own total: to compare with
    sources: tuple[str, ...] = ()
    unknown: dict[str, str] = field(default_factory=dict)  # boundary -> what is missing


@dataclass(frozen=True, slots=True)
class Bill:
    """Energy of some wall-clock at the facility; None: unknown, and `unknown` says why."""

    mwh: Range | None
    eur: Range | None
    tco2: Range | None
    unknown: dict[str, str]


def draw(estimate: Estimate, workload: Workload, cluster: Cluster, watts: Watts, around: Server | None = None) -> Draw:
    """What the run draws while it trains. `around`: the servers, where they are known better than the site's figures say (`server_of`)."""
    count = watts.accelerators or -(-estimate.ranks // hardware.chip(cluster.chip).devices)
    return drawn(estimate.busy, estimate.step_s, cluster, watts, count, around)


def drawn(
    busy: Mapping[str, float], step_s: float, cluster: Cluster, watts: Watts, accelerators: int, around: Server | None = None
) -> Draw:
    """The same from device-seconds of a step: kinds of COMPUTE, `communication` and `idle`, overlapped or not."""
    chip, unknown = hardware.chip(cluster.chip), {}
    cap = _cap(cluster, watts)
    told = {
        "nameplate": watts.nameplate_watts,
        "typical": watts.node_watts,
        "cap": cap,
        "total": watts.facility_watts,
        "accelerators": accelerators,
    }
    sold = chip.watts.value or cap.value
    if sold is None or cap.value is None:
        unknown = dict.fromkeys(BOUNDARIES, f"how many watts a {chip.name} may draw is not published: power.device_watts of the site")
        return Draw(unknown=unknown, **told)  # type: ignore[arg-type]
    if step_s <= 0:
        raise PlanError(f"a step of {step_s:g} s draws nothing: power needs an estimate whose step takes time")
    states = {kind: min(share.value * sold, cap.value) for kind, share in POWER.items()}
    mid = device_watts(busy, step_s, sold, cap.value)
    low = device_watts(busy, step_s, sold, cap.value, "low") * (1 - MIX)
    high = min(device_watts(busy, step_s, sold, cap.value, "high") * (1 + MIX), cap.value)
    device = _range(*_around(mid, low, high))
    around = around or server_of(watts, chip)
    found: dict[str, Range] = {"device": _times(device, accelerators)}
    sources = [f"{cap.value:g} W: {cap.source}"]
    peak, held = {"device": cap.value * accelerators}, {"device": states["idle"] * accelerators}
    if around is None:
        unknown["node"] = (
            f"what is around a {chip.name} in its node is unknown: power.node_watts of the site, or `node_watts` of an alike one"
        )
    else:
        sources.extend(around.sources)
        found["node"] = _times(node_watts(device, around), accelerators)
        peak["node"] = node_watts(_range(cap.value, cap.value, cap.value), around).mid * accelerators
        held["node"] = node_watts(_range(states["idle"], states["idle"], states["idle"]), around, waits=True).mid * accelerators
    _beyond(watts, accelerators, found, peak, held, unknown, sources)
    swing = step_compute(busy, step_s, sold, cap.value) - states["communication"]
    lost = around.efficiency.value if around is not None else 1.0
    known = "it" in found or "node" in found
    return Draw(
        watts=found, peak=peak, held=held, device=device, states=states, sources=tuple(sources), unknown=unknown,
        ramp_watts=max(0.0, swing) * accelerators / lost if known else None,
        checkpoint_watts=max(0.0, mid - states["idle"]) * accelerators / lost if known else None,
        **told,  # type: ignore[arg-type]
    )  # fmt: skip


def device_watts(
    busy: Mapping[str, float], step_s: float, sold: float, cap: float, end: Literal["low", "value", "high"] = "value"
) -> float:
    """Mean watts of one device over a step.

    What is hidden beside compute adds what communication draws beyond idling to it, up to the cap; what is exposed draws as communication, the rest idles.
    """
    compute, hidden, exposed, idle = _times_of(busy, step_s)
    share = {kind: getattr(one, end) for kind, one in POWER.items()}
    extra = (share["communication"] - share["idle"]) * hidden / compute if compute else 0.0
    joules = sum(seconds * min((share[kind] + extra) * sold, cap) for kind, seconds in busy.items() if kind in COMPUTE)
    joules += exposed * min(share["communication"] * sold, cap) + idle * min(share["idle"] * sold, cap)
    return joules / (compute + exposed + idle)


def step_compute(busy: Mapping[str, float], step_s: float, sold: float, cap: float) -> float:
    """Watts of one device while it computes, nothing hidden beside it."""
    compute, *_ = _times_of(busy, step_s)
    if not compute:
        return min(POWER["idle"].value * sold, cap)
    return sum(busy.get(kind, 0.0) * min(POWER[kind].value * sold, cap) for kind in COMPUTE) / compute


def _times_of(busy: Mapping[str, float], step_s: float) -> tuple[float, float, float, float]:
    """`(compute, hidden communication, exposed communication, idle)` of a step: what neither computes nor idles is exposed communication."""
    compute = min(sum(busy.get(kind, 0.0) for kind in COMPUTE), step_s)
    told = busy.get("communication", 0.0)
    exposed = min(told, max(0.0, step_s - compute - busy.get("idle", 0.0)))
    return compute, told - exposed, exposed, max(0.0, step_s - compute - exposed)


def node_watts(device: Range, around: Server, waits: bool = False) -> Range:
    """Of one accelerator with its share of the node, at the node's supplies: (device + rest) x (1 + fans) / efficiency, ends added in squares."""
    rest = around.held if waits else around.rest
    behind = device.mid + rest.value
    mid = behind * (1 + around.fans.value) / around.efficiency.value

    def end(sign: int) -> float:
        parts = [
            ((device.low if sign < 0 else device.high) - device.mid) / behind,
            ((rest.low if sign < 0 else rest.high) - rest.value) / behind,
            ((around.fans.low if sign < 0 else around.fans.high) - around.fans.value) / (1 + around.fans.value),
            ((around.efficiency.high if sign < 0 else around.efficiency.low) - around.efficiency.value) / around.efficiency.value,
        ]
        return mid * (1 + sign * math.sqrt(sum(part * part for part in parts)))

    return _range(mid, end(-1), end(1))


def server_of(watts: Watts, chip: hardware.Chip) -> Server | None:
    """The servers that a site's figures tell of; None where nothing does.

    Superchips' modules hold processors and memory: what their nodes have beside is watts.py's rest. A node of eight accelerators is as the metered ones, one of
    four is REST_OF_FOUR; how either is cooled nobody says.
    """
    rest, each = watts.rest_watts, watts.per_node
    if chip.id in SUPERCHIPS:
        if rest.value is None or not each:
            return None
        plate, sold = watts.nameplate_watts.value, watts.device_watts.value
        most = max(1.5 * rest.value, plate - each * sold if plate is not None and sold is not None else 0.0)
        said = Share(rest.value / each, 0.5 * rest.value / each, most / each, rest.source)
        within = Share(1.0, 0.94, 1.0, "the rest is of the node's supplies, whose losses are within it")
        return Server("water", said, said, Share(0.0, 0.0, 0.03, _FANS["water"].source), within, (said.source,))
    if each == 8:
        return server()
    return server(rest=REST_OF_FOUR, held=REST_OF_FOUR) if each == 4 else None


SUPERCHIPS = frozenset({"gh200", "gh200-144", "gb200", "gb300", "rubin"})  # whose module has its processor beside it


def capped_rate(chip: str, cap_watts: float | None, kind: Kind = "gemm", constants: Mapping[str, float] = VALUES) -> Range:
    """Share of the uncapped rate that a kind of work keeps under `cap_watts`, with its 90 % interval.

    Above what stays at any clock, watts fall as a power of the clock; the middle is what rates.clock_of has. Work that draws less than the cap keeps its rate;
    HBM and links have clocks of their own. Raises PlanError for a cap below what the chip draws at any clock.
    """
    sold = hardware.chip(chip).watts.value
    if cap_watts is None or sold is None or cap_watts >= POWER[kind].value * sold:
        return _range(1.0, 1.0, 1.0)
    needed = POWER[kind].value
    mid = rates.clock_of(chip, cap_watts / needed, 1.0, constants) / rates.clock_of(chip, None, 1.0, constants)
    low = _clock(cap_watts, needed * sold, STATIC.low * sold, EXPONENT.low)
    return _range(*_around(mid, low, _clock(cap_watts, needed * sold, STATIC.high * sold, EXPONENT.high)))


def _clock(cap: float, needed: float, static: float, exponent: float) -> float:
    left, lowest = max(0.0, (cap - static) / max(needed - static, 1.0)), FLOOR**exponent
    return min(1.0, left ** (1 / exponent) if left >= lowest else FLOOR * left / lowest)


def bill(found: Draw, watts: Watts, seconds: float, trained: float = 1.0) -> Bill:
    """Of `seconds` of wall-clock at the facility, of which a share `trained` is spent in steps and the rest held (restarts, checkpoints, waits)."""
    facility, unknown = found.watts.get("facility"), dict(found.unknown)
    if facility is None:
        why = next((found.unknown[name] for name in BOUNDARIES if name in found.unknown), "the facility's watts are unknown")
        return Bill(None, None, None, {"mwh": why, "eur": why, "tco2": why})
    share = trained + (1 - trained) * found.held["facility"] / facility.mid
    mwh = _times(facility, share * seconds / 3.6e9)
    eur = tco2 = None
    if watts.price_eur_mwh.value is None:
        unknown["eur"] = "what a MWh costs is unknown: grid.price_eur_mwh of the site"
    else:
        eur = _times(mwh, watts.price_eur_mwh.value)
    if watts.carbon_g_kwh.value is None:
        unknown["tco2"] = "what a kWh emits is unknown: grid.carbon_g_kwh of the site"
    else:
        tco2 = _times(mwh, watts.carbon_g_kwh.value / 1e3)
    return Bill(mwh, eur, tco2, unknown)


def _cap(cluster: Cluster, watts: Watts) -> Figure:
    """The lowest limit that is set or sold; whoever sets one above what is sold sets nothing."""
    sold = hardware.chip(cluster.chip).watts
    told = [one for one in (sold, watts.device_watts) if one.value is not None]
    if cluster.cap_watts is not None:
        told.append(Figure(value=cluster.cap_watts, basis="declared", source="the cap that is set for this run"))
    return min(told, key=lambda one: one.value or 0.0) if told else UNKNOWN


_WIDE = {"measured": 0.05, "declared": 0.2, "assumed": 0.5}  # of a figure's watts: POWER.md, "How sure"


def _beyond(
    watts: Watts, count: int, found: dict[str, Range], peak: dict[str, float], held: dict[str, float], unknown: dict[str, str], sources: list[str],
) -> None:  # fmt: skip
    """Adds IT and the facility to what is known of the nodes, or why they are unknown."""
    fabric, storage, share = watts.fabric_watts, watts.storage_watts, watts.storage_share
    if "node" not in found:
        unknown["it"] = unknown["facility"] = unknown["node"]
        return
    missing = "network: power.fabric_watts or network.nic_gbit_s" if fabric.value is None else ""
    if storage.value is None and share.value is None:
        missing = missing or "storage: power.storage_watts"
    if missing:
        unknown["it"] = unknown["facility"] = f"what is beside the nodes is unknown, the {missing} of the site"
        return
    switches, disks, part = (fabric.value or 0.0) * count, (storage.value or 0.0) * count, share.value or 0.0
    sources.extend(one.source for one in (fabric, storage, share) if one.known)
    wide = _WIDE.get(fabric.basis, 0.5)
    low = 0.67 * switches if watts.fabric_nameplate else (1 - wide) * switches
    high = switches if watts.fabric_nameplate else (1 + wide) * switches
    node = found["node"]
    found["it"] = _range(
        *_around(
            (node.mid + switches) * (1 + part) + disks,
            (node.low + low) * (1 + 0.5 * part) + (1 - _WIDE.get(storage.basis, 0.5)) * disks,
            (node.high + high) * (1 + 1.5 * part) + (1 + _WIDE.get(storage.basis, 0.5)) * disks,
        )
    )
    for what in (peak, held):
        what["it"] = (what["node"] + switches) * (1 + part) + disks
    if watts.pue.value is None:
        unknown["facility"] = "the PUE is unknown: power.pue of the site"
        return
    over, wide = watts.pue.value - 1, _WIDE.get(watts.pue.basis, 0.5)
    sources.append(watts.pue.source)
    it = found["it"]
    found["facility"] = _range(it.mid * (1 + over), it.low * (1 + over * (1 - wide)), it.high * (1 + over * (1 + wide)))
    for what in (peak, held):
        what["facility"] = what["it"] * (1 + over)


def _range(mid: float, low: float, high: float) -> Range:
    return Range(low=low, mid=mid, high=high)


def _around(mid: float, low: float, high: float) -> tuple[float, float, float]:
    """Ends that hold the middle."""
    return mid, min(low, mid), max(high, mid)


def _times(one: Range, factor: float) -> Range:
    return Range(low=one.low * factor, mid=one.mid * factor, high=one.high * factor)
