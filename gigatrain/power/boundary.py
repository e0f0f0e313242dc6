"""Pure: integers that meters summed, the plan's figures and seconds in; joules at the device, the node, IT and the facility out. POWER.md defines each.

Nothing that is unknown is taken for 0: it stays unknown, with the reason.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gigatrain.planning.watts import Watts
from gigatrain.power.reading import BOUNDARIES, PROVENANCES, Provenance, Taken
from gigatrain.site import Figure

UNSEEN = 0.01  # of the time: below it joules are scaled up, above it the boundary is unknown. What hides there draws 0 to twice the mean: 1 % of the sum
WITHIN_NODE = 0.95  # of its devices' joules: a node's meter that shows less is no meter of the whole node (both are good to 5 %)
# How far the truth may lie from each kind of joules, as factors (POWER.md, "How sure"): bounds, added as if all erred the same way.
SURE: dict[Provenance, tuple[float, float]] = {
    "measured": (0.95, 1.05),
    "estimated": (0.5, 1.5),
    "nameplate": (0.67, 1.0),
    "declared": (0.8, 1.2),
}
Kinds = dict[Provenance, float]
Layers = dict[str, Kinds]
_NAMES = {
    "device": "accelerators",
    "processors": "processors",
    "node": "rest of the nodes",
    "nodes": "nodes",
    "fabric": "fabric",
    "storage": "storage",
    "cooling": "cooling",
}


@dataclass(frozen=True)
class Boundary:
    """Joules within one boundary over some seconds. `layers`: what of it (device, node, fabric, ...) and of which provenance; `low` and `high` bound it."""

    joules: float
    seconds: float
    low: float
    high: float
    layers: Layers

    @property
    def watts(self) -> float | None:
        return self.joules / self.seconds if self.seconds > 0 else None

    @property
    def parts(self) -> Kinds:
        """Joules by provenance."""
        found: Kinds = dict.fromkeys(PROVENANCES, 0.0)
        for layer in self.layers.values():
            for kind, joules in layer.items():
                found[kind] += joules
        return found

    @property
    def shares(self) -> Kinds:
        """The parts over the whole; all 0 where nothing was drawn."""
        return {kind: joules / self.joules if self.joules else 0.0 for kind, joules in self.parts.items()}

    @property
    def words(self) -> str:
        """`accelerators 71 % measured, rest of the nodes 17 % measured, fabric 10 % nameplate`, of the whole."""
        said = [
            f"{_NAMES[name]} {joules / self.joules:.0%} {kind}".replace("%", " %")
            for name, layer in self.layers.items()
            for kind, joules in layer.items()
            if self.joules and joules / self.joules >= 0.005
        ]
        return ", ".join(said) or "nothing was drawn"


def boundaries(taken: Taken, watts: Watts, seconds: float) -> dict[str, Boundary | None]:
    """Device, node, IT and facility over `seconds` of the whole run (not summed over its nodes); None: unknown, and `unknown` says why.

    `seconds` are those of the joules, `taken.ms / taken.nodes / 1000`: in the first row of a process both hold what one before it has left.
    """
    return look(taken, watts, seconds)[0]


def unknown(taken: Taken, watts: Watts, seconds: float) -> dict[str, str]:
    """Why a boundary of `boundaries` is None."""
    return look(taken, watts, seconds)[1]


def look(taken: Taken, watts: Watts, seconds: float) -> tuple[dict[str, Boundary | None], dict[str, str]]:
    """`boundaries` and `unknown` at once."""
    found: dict[str, Boundary | None] = dict.fromkeys(BOUNDARIES)
    why: dict[str, str] = {}
    off = disagreement(taken)
    error = max(1 - SURE["measured"][0], abs(off or 0.0))
    sure: dict[Provenance, tuple[float, float]] = {**SURE, "measured": (1 - error, 1 + error)}
    nodes, computing = nodes_of(watts), "device" if watts.accelerators else "processors"
    missing_ms = max(0, nodes - taken.nodes) * seconds * 1e3 if taken.nodes else 0.0  # of nodes from which nothing came
    device: Kinds = {
        "measured": taken.device_measured_mj / 1e3,
        "estimated": taken.device_estimated_mj / 1e3,
        "nameplate": taken.device_nameplate_mj / 1e3,
    }
    unseen_ms = taken.device_unknown_ms + missing_ms * watts.per_node
    if not taken.nodes:
        why["device"] = why["node"] = "no meter told anything"
    elif not taken.devices and not taken.device_ms and not unseen_ms:
        why["device"] = "the run has no accelerators, and no processor has a meter"
    elif said := _unseen(unseen_ms, taken.device_ms + unseen_ms, "nobody knows what the devices drew"):
        why["device"] = said
    else:
        device["estimated"] += _scaled(sum(device.values()), unseen_ms, taken.device_ms + unseen_ms)
        found["device"] = _boundary({computing: device}, seconds, sure)

    node: Kinds = {
        "measured": taken.node_measured_mj / 1e3,
        "estimated": taken.node_estimated_mj / 1e3,
        "nameplate": taken.node_nameplate_mj / 1e3,
    }
    unseen_ms = taken.node_unknown_ms + missing_ms
    if taken.nodes:
        text = (
            "nobody knows what the nodes drew beside their devices (a meter of the node, or power.node_watts in the site's file, would say; "
            "of a node that others use too, power.node_watts)"
        )
        inner = found["device"]
        if said := _unseen(unseen_ms, taken.ms + missing_ms, text):
            why["node"] = said
        elif inner is not None and sum(node.values()) < WITHIN_NODE * inner.joules:
            why["node"] = (
                f"the nodes' meters show {sum(node.values()):,.0f} J and their devices alone {inner.joules:,.0f} J: they are not of the whole node"
            )
        else:
            node["estimated"] += _scaled(sum(node.values()), unseen_ms, taken.ms + missing_ms)
            # A node's meter stands for all within it, also for what of its accelerators only a rule knows: then the two are not told apart.
            rest: Kinds = {kind: node[kind] - (device[kind] if inner is not None else 0.0) for kind in node}
            split = inner is not None and min(rest.values()) >= -1e-3
            layers: Layers = {"nodes": node}
            if split:
                rest = {kind: max(0.0, joules) for kind, joules in rest.items()}
                layers = {computing: device, "node": rest}
            found["node"] = _boundary(layers, seconds, sure)

    within = found["node"]
    if within is None:
        why["it"] = f"the node is unknown: {why['node']}"
    else:
        fabric, storage = _share(watts.fabric_watts, watts, seconds), _share(watts.storage_watts, watts, seconds)
        if fabric is None:
            why["it"] = _lacks("fabric_watts", watts, watts.fabric_watts)
        elif storage is None and not watts.storage_share.known:
            why["it"] = _lacks("storage_watts", watts, watts.storage_watts)
        else:
            kind: Provenance = "nameplate" if watts.fabric_nameplate else _kind(watts.fabric_watts)
            inner = _boundary({**within.layers, "fabric": {kind: fabric}}, seconds, sure)
            if storage is None:
                found["it"] = _more(inner, "storage", watts.storage_share, sure)
            else:
                found["it"] = _boundary({**inner.layers, "storage": {_kind(watts.storage_watts): storage}}, seconds, sure)

    within = found["it"]
    if within is None:
        why["facility"] = why["it"] if found["node"] is None else f"IT is unknown: {why['it']}"
    elif watts.pue.value is None:
        why["facility"] = f"the PUE of site {watts.site or '?'} is unknown (power.pue)"
    else:
        over = watts.pue.model_copy(update={"value": max(0.0, watts.pue.value - 1)})
        found["facility"] = _more(within, "cooling", over, sure)
    return found, why


def widest(found: Mapping[str, Boundary | None]) -> tuple[Boundary | None, str | None]:
    """The outermost boundary that is known, and its name."""
    return next(((found[name], name) for name in reversed(BOUNDARIES) if found[name] is not None), (None, None))


def _boundary(layers: Layers, seconds: float, sure: Mapping[Provenance, tuple[float, float]]) -> Boundary:
    """Sums the layers and their bounds; empty ones are left out."""
    kept: Layers = {name: {kind: joules for kind, joules in layer.items() if joules} for name, layer in layers.items()}
    every: list[tuple[Provenance, float]] = [(kind, joules) for layer in kept.values() for kind, joules in layer.items()]
    low, high = sum(joules * sure[kind][0] for kind, joules in every), sum(joules * sure[kind][1] for kind, joules in every)
    return Boundary(sum(joules for _, joules in every), seconds, low, high, {name: layer for name, layer in kept.items() if layer})


def _more(within: Boundary, name: str, share: Figure, sure: Mapping[Provenance, tuple[float, float]]) -> Boundary:
    """What is a share of all that is within: it errs with that, and by itself."""
    kind, value = _kind(share), share.value or 0.0
    layers: Layers = {**within.layers, name: {kind: within.joules * value}} if value else within.layers
    low, high = within.low * (1 + value * sure[kind][0]), within.high * (1 + value * sure[kind][1])
    return Boundary(within.joules * (1 + value), within.seconds, low, high, layers)


def nodes_of(watts: Watts) -> int:
    """That the run has at least, by its plan; 0: it does not say."""
    return math.ceil(watts.accelerators / watts.per_node) if watts.accelerators and watts.per_node else 0


def _unseen(unseen_ms: float, all_ms: float, text: str) -> str:
    """Why too much of the time is not known; nothing, if it is not too much."""
    if all_ms <= 0 or unseen_ms >= 0.9995 * all_ms:
        return text
    return f"for {unseen_ms / all_ms:.1%} of the time {text}".replace("%", " %") if unseen_ms > UNSEEN * all_ms else ""


def _scaled(joules: float, unseen_ms: float, all_ms: float) -> float:
    """What the little that nobody saw drew, if it drew as the rest did."""
    return joules * unseen_ms / (all_ms - unseen_ms) if unseen_ms else 0.0


def _share(figure: Figure, watts: Watts, seconds: float) -> float | None:
    """Joules of what the plan knows per accelerator; None where it does not know, or counts no accelerators."""
    if figure.value is None or (not watts.accelerators and figure.value):
        return None
    return figure.value * watts.accelerators * seconds


def _lacks(name: str, watts: Watts, figure: Figure) -> str:
    if figure.known:
        return f"power.{name} is by accelerator, and the run has none"
    return f"power.{name} of site {watts.site or '?'} is unknown" + (f": {figure.source}" if figure.source else "")


def _kind(figure: Figure) -> Provenance:
    """A figure of the site was measured some other day: to this run it is declared."""
    return "estimated" if figure.basis == "assumed" else "declared"


def disagreement(taken: Taken) -> float | None:
    """The integral of watts over the counter, less 1."""
    return taken.integral_mj / taken.counter_mj - 1 if taken.counter_mj > 0 else None
