"""What there is of a node, what is added to what, and how its joules are put together.

node, with a meter of its own    its joules
node, without                    devices + processors, measured, + what the site's rest_watts has beyond the processors, estimated
node that others use too         the job's devices + its share of what the node draws beside all devices, estimated (POWER.md, "What is counted")
device of a CPU-only node        its processor packages: they do the computing
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gigatrain.errors import PowerError
from gigatrain.planning.watts import Watts
from gigatrain.power.reading import Reading, Source, total
from gigatrain.power.track import MICRO, Drawn, Track


@dataclass(frozen=True)
class Parts:
    """What is there of a node, and how its joules are put together."""

    devices: list[Track]
    processors: list[Track] = field(default_factory=list)  # sockets and memory that are no device
    node: Track | None = None
    added: tuple[Track, ...] = ()  # those of `processors` that lie in no device: what counts towards the node
    unmetered: int = 0  # devices without a meter
    device_mw: int | None = None  # what such a one draws by its nameplate
    rest_mw: int | None = None  # what a node draws beside its devices
    share_ppm: int = MICRO  # the job's of the node
    own_ppm: int = (
        MICRO  # of the node's devices, those that are seen here; less than `share_ppm` where other processes see more of the job's
    )
    alone: bool = False  # no accelerators: the processors are the devices
    whole: bool = True
    elsewhere: bool = False  # another process of this machine reads the node's meter, and that holds these devices

    @property
    def tracks(self) -> list[Track]:
        return [*self.devices, *self.processors, *([self.node] if self.node is not None else [])]

    def node_of(
        self, long_us: int, device: Drawn, nameplate_nj: int, unknown_us: int, beside_nj: int, node: Drawn | None
    ) -> tuple[int, int, int, int]:
        """Measured, estimated and nameplate nJ of the node over one stretch, and for how long of it nobody knows all of them.

        `device`: all its devices together, `unknown_us` for how long nobody knows what they drew; `beside_nj`: processors that lie in no device; `node`: by
        its own meter, if that can be trusted.
        """
        if not self.whole:
            return (0, 0, 0, 0) if self.elsewhere else (device.measured_nj, device.estimated_nj, nameplate_nj, min(long_us, unknown_us))
        if node is not None and 2 * node.known_us >= long_us:
            missing_us = long_us - node.known_us
            if self.share_ppm == MICRO:
                return node.measured_nj, node.estimated_nj, 0, missing_us
            return self._of_shared(long_us, device, nameplate_nj, node.nj, missing_us)
        missing_us = min(long_us, unknown_us) if self.rest_mw is not None else long_us
        processors_nj = beside_nj + (device.nj if self.alone else 0)
        rest_nj = max(0, self.rest_mw * long_us - processors_nj) if self.rest_mw is not None else 0
        if self.share_ppm == MICRO:
            return device.measured_nj + beside_nj, device.estimated_nj + rest_nj, nameplate_nj, missing_us
        return device.measured_nj, device.estimated_nj + (beside_nj + rest_nj) * self.share_ppm // MICRO, nameplate_nj, missing_us

    def _of_shared(self, long_us: int, device: Drawn, nameplate_nj: int, node_nj: int, missing_us: int) -> tuple[int, int, int, int]:
        """Of a metered node that others use too: the job's devices, and its share of the rest.

        The others' devices cannot be seen. They are taken to draw like ours, unless that leaves less for the rest of the node than the site says it draws:
        then they draw less. Where the site says nothing, and the meter leaves no room for devices like ours, nobody knows.
        """
        nameplate_nj = min(nameplate_nj, max(0, node_nj - device.nj))
        seen_nj = device.nj + nameplate_nj
        ours_nj = max(seen_nj, seen_nj * self.share_ppm // max(1, self.own_ppm))
        rest_nj, beside_nj = node_nj - seen_nj * MICRO // max(1, self.own_ppm), max(0, node_nj - ours_nj)
        if self.rest_mw is not None:
            rest_nj = max(rest_nj, min(self.rest_mw * long_us, beside_nj))
        elif rest_nj < 0:
            rest_nj, missing_us = 0, long_us
        added_nj = ours_nj - seen_nj + min(rest_nj, beside_nj) * self.share_ppm // MICRO
        return device.measured_nj, device.estimated_nj + added_nj, nameplate_nj, missing_us


def composed(
    found: Sequence[Source], processors: Sequence[Source], meter: Source | None, watts: Watts, *, every_s: float = 0.1, unmetered: int = 0,
    share: float | None = None, whole: bool = True, elsewhere: bool = False, notes: list[str] | None = None,
) -> Parts:  # fmt: skip
    """What counts towards what. `share`: of the node that is the job's, by all its processes on this machine; None: by the devices that are here.

    Nothing that lies within another thing is added to it: `reading.total` refuses, and that is noted."""
    alone = not found and not unmetered
    if alone:
        computing = ("cpu", "module")
        found, processors = [one for one in processors if one.scope in computing], [one for one in processors if one.scope not in computing]
    devices, beside = [Track(one, every_s) for one in found], [Track(one, every_s) for one in processors]
    readings = [Reading(one.place, one.scope, 0.0, "measured", one.name) for one in found]
    modules = [] if alone else [one for one in found if one.scope == "module"]
    added: list[Track] = []
    for one in beside:
        # On a node of superchips every processor lies in one of the modules, and every GPU in one of those that the host meters.
        place = (*modules[0].place, *one.source.place) if modules else () if one.source.scope == "module" and found else one.source.place
        reading = Reading(place, one.source.scope, 0.0, "measured", one.source.name)
        try:
            total([*readings, reading])
        except PowerError as refused:
            if notes is not None:
                notes.append(str(refused))
            continue
        readings.append(reading)
        added.append(one)
    if alone and whole and not devices:
        unmetered = 1  # the processors, of which nobody says anything
    count = len(devices) + unmetered
    own = 1.0 if alone else min(1.0, count / watts.per_node) if watts.per_node else None
    if share is None:
        share = own if own is not None and whole else 1.0
    return Parts(
        devices, beside, Track(meter, every_s) if meter is not None else None, tuple(added), unmetered=unmetered,
        device_mw=_mw(watts.device_watts.value) if not alone else None, rest_mw=_mw(watts.rest_watts.value),
        share_ppm=round(share * MICRO), own_ppm=round((own if own is not None else share) * MICRO), alone=alone, whole=whole, elsewhere=elsewhere,
    )  # fmt: skip


def _mw(watts: float | None) -> int | None:
    return round(watts * 1000) if watts is not None else None


def described(parts: Parts, watts: Watts, notes: Sequence[str]) -> dict[str, str]:
    """What: how."""
    devices = _each(one.source.name for one in parts.devices)
    if parts.unmetered:
        plate = (
            f"nameplate of {watts.device_watts.value:,g} W: {watts.device_watts.source}"
            if parts.device_mw is not None
            else "unknown: no meter, no nameplate"
        )
        devices += [f"{parts.unmetered} x {plate}"]
    said = {
        "device": ("; ".join(devices) or "none of its own")
        + (" (no accelerators: the processors are the devices)" if parts.alone and parts.devices else "")
    }
    checks = _each(check for one in parts.devices if (check := getattr(one.source, "check", "")))
    if checks:
        said["check"] = "; ".join(checks)
    if parts.processors:
        within = "" if len(parts.added) == len(parts.processors) else " (within the devices: not added)"
        said["processors"] = "; ".join(_each(one.source.name for one in parts.processors)) + within
    rest = f"rest of {watts.rest_watts.value:,g} W, estimated: {watts.rest_watts.source}" if parts.rest_mw is not None else "rest unknown"
    if parts.node is not None:
        said["node"] = parts.node.source.name
    elif parts.whole:
        said["node"] = " + ".join(["devices", *(["processors"] if parts.added else []), rest])
    else:
        said["node"] = (
            "by this machine's other process" if parts.elsewhere else "devices; what is beside them by this machine's other process"
        )
    if parts.whole and parts.share_ppm != MICRO:
        said["share"] = f"{parts.share_ppm / MICRO:.4g} of the node is the job's; what is beside its devices is estimated by that"
        if parts.node is not None:
            said["share"] += ", others' devices are taken to draw like ours"
    if notes:
        said["notes"] = "; ".join(notes)
    return said


def _each(names: Iterable[str]) -> list[str]:
    counted: dict[str, int] = {}
    for name in names:
        counted[name] = counted.get(name, 0) + 1
    return [f"{number} x {name}" for name, number in counted.items()]
