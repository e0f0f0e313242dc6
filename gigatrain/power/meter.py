"""One reader per node: a thread looks at every meter some times a second, and `take` tells in whole millijoules what was drawn since it was last asked.

Every meter is a `Track` (track.py); what is added to what is `Parts` (parts.py). All tracks are read off at one and the same moment, the latest that each
of them has reached. Joules and seconds so belong to each other whatever a meter's own pace, ten-second bins end where wall-clock says, and what is drawn
after that moment is the next take's: the takes add up to the whole, to the millijoule.
"""

import json
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gigatrain import config
from gigatrain.errors import PowerError
from gigatrain.planning import hardware
from gigatrain.planning.watts import Watts
from gigatrain.power.parts import Parts, composed, described
from gigatrain.power.reading import BIN_S, FIELDS, Source, Taken
from gigatrain.power.track import LOST_S, MICRO, SLOWEST_S, Drawn, Track
from gigatrain.recovery import board

SETTLE_S = 1.0  # how often looks are added up, if nobody asks
SAVE_S = 8.0  # how often the carry file is written, if nobody asks
LEAST_S, LEAST_UPDATES = 10.0, 100  # a difference of counters means something over no less
COST = 0.0005  # of one core is what the thread may take, half of what would be felt; where looks are dear there are fewer of them
MOST_CARRIED = 1 << 20  # bytes; a real one has some thousands
NOTES, NOTE = 16, 300  # what happens on the way: so many lines, of so many letters
SHORT = 0.95  # a node's meter that says less than this share of its devices' joules does not see them


class Meter:
    """What this node draws. As a context it has its thread; in a test `look` is called by hand, with a clock of the test's."""

    def __init__(
        self, parts: Parts, meters: dict[str, str], *, every_s: float = 0.1, carry: Path | None = None, run: str = "",
        clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.meters = meters  # what: how; what happens on the way is added to its "notes"
        self.parts = parts
        self._found, self._notes, self._more = meters.get("notes", ""), dict[str, tuple[str, int]](), 0
        self.least_s = max([LEAST_S, *(LEAST_UPDATES * one.source.update_s for one in parts.devices)])
        self._every_s, self._clock, self._wall = every_s, clock, wall
        self._mark = secrets.token_hex(8)  # in the names of its files, so that nobody can guess them
        self._carry, self._key = carry, {"run": run, "boot": _boot(), "node": os.uname().nodename}
        self._lock, self._ready, self._stop = threading.Lock(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._exact = dict.fromkeys(FIELDS, 0)  # nJ and µs since the beginning; what is told are whole mJ and ms
        self._told = dict.fromkeys(FIELDS, 0)
        self._pending, self._unkept = Taken(), [0] * len(FIELDS)  # not told yet; told, and not yet where a killed process leaves it
        self._at_us = self._began_us = -1
        self._begun = False
        self._settled_s = self._saved_s = 0.0
        self._slower = 1.0
        self.slowest_s = max((one.source.update_s for one in parts.tracks), default=0.0)  # how often the slowest of all meters has news
        self._ahead_us = round(2 * max(SETTLE_S, self.slowest_s) * MICRO)  # what is added up is behind by no more
        self._node_trusted, self._trial = True, [0, 0, 0]  # of the node's meter since it was last judged: µs, its nJ, its devices' nJ
        self._bin = self._given = -1
        self._whole, self._of_bin, self._offset_us = False, [0, 0], 0
        self._live = (0, 0, 0, True)  # until when, node's nJ since this process began, mW, whether something is unknown
        self._highest, self._base_nj = 0.0, 0
        self._dead: set[int] = set()
        self._unsaved = False  # whether the last try to write the carry file failed, which is said once
        self._claim()

    # -- the thread

    def __enter__(self) -> "Meter":
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
        self._thread.start()
        self._ready.wait(LOST_S)  # a driver that hangs does not keep the run from starting
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(LOST_S)
            if self._thread.is_alive():
                self._note("a meter did not come back from its last look; it ends with the process")
                return
        for one in self.parts.tracks:
            one.source.close()

    def _run(self) -> None:
        try:
            spent_s, since_s = time.thread_time(), self._clock()
            while True:
                self.look()
                self._ready.set()
                now_s = self._clock()
                if now_s - since_s >= SETTLE_S:
                    share = (time.thread_time() - spent_s) / (now_s - since_s)
                    spent_s, since_s = time.thread_time(), now_s
                    with self._lock:
                        self._pace(share)
                due_s = min((one.due_s for one in self.parts.tracks), default=now_s + SETTLE_S)
                if self._stop.wait(max(0.001, due_s - now_s)):
                    self.look(every=True, last=True)
                    return
        except Exception as failure:  # a mistake of ours must not end a training run, nor pass unseen
            self._note(f"the meter stopped: {type(failure).__name__}: {failure}")
        finally:
            self._ready.set()

    def _pace(self, share: float) -> None:
        """From the share of a core that the thread took to how often it looks. The counters' truth does not depend on it, only their check by watts does."""
        self._slower = min(max(1.0, self._slower * share / COST), max(1.0, SLOWEST_S / self._every_s))
        often_s = max(self._every_s, min(self._every_s * self._slower, SLOWEST_S))
        fewer = f"{often_s:.2g}" != f"{self._every_s:.2g}"
        asked = f", not every {self._every_s:g} s: more would take over {100 * COST:g} % of a core" if fewer else ""
        self._tell("looks", f"every {often_s:.2g} s{asked}")

    def look(self, *, every: bool = False, last: bool = False) -> None:
        """Ask each meter that is due, or every one; the last time nobody is waited for."""
        for number, one in enumerate(self.parts.tracks):
            before_s = self._clock()
            if not every and before_s + 0.001 < one.due_s:
                continue
            try:
                sample, why = one.source.read(), ""
            except (OSError, PowerError) as failure:
                sample, why = None, str(failure)
            after_s = self._clock()
            one.looked(before_s, after_s, self._slower)
            with self._lock:
                if not one.points and sample is None:
                    one.begin(round(before_s * MICRO))
                if sample is not None:
                    one.saw(sample)
                    self._dead.discard(number)
                else:
                    one.silent(round(after_s * MICRO), why)
                    if one.last is None and number not in self._dead:
                        self._dead.add(number)
                        what = f"{'/'.join(one.source.place)} no longer answers"
                        self._note(f"{what}: {why}", what)
        now_s = self._clock()
        if self._at_us < 0 or every or now_s - self._settled_s >= SETTLE_S:
            with self._lock:
                self._settle()
                if last and self.parts.node is not None:  # its meter may be seconds behind; of those the node is estimated
                    self._settle([*self.parts.devices, *self.parts.processors])
                if every or now_s - self._saved_s >= SAVE_S:
                    self._save()

    # -- what is told

    def take(self) -> Taken:
        """What was drawn since it was last asked, as far as every meter has been looked at; and the bins that are over and were not given yet."""
        with self._lock:
            self._settle()
            taken, self._pending = self._pending, Taken()
            taken.nodes = int(self.parts.whole and taken.ms > 0)
            taken.devices = len(self.parts.devices) + self.parts.unmetered
            self._unkept = [before + more for before, more in zip(self._unkept, taken.ints(), strict=True)]
            self._save()
        return taken

    def kept(self) -> None:
        """What was taken is where it lasts: the next process of this run has nothing to recover of it."""
        with self._lock:
            self._unkept = [0] * len(FIELDS)
            self._save()

    def joules(self) -> float:
        """The node's joules since this process began, as far as they are known: never less than before. Since the last look by the watts of then."""
        until_us, drawn_nj, milliwatts, _ = self._live
        ahead_us = min(max(round(self._clock() * MICRO) - until_us, 0), self._ahead_us) if until_us else 0
        self._highest = max(self._highest, (drawn_nj + milliwatts * ahead_us) / 1e9)
        return self._highest

    def watts(self) -> float | None:
        """What the node draws now: mean of the last second; None where a part of it is unknown."""
        _, _, milliwatts, unknown = self._live
        return None if unknown else milliwatts / 1000

    def _note(self, text: str, what: str = "") -> None:
        """One line of what happened; of a `what` that happens again the newest, and how often. So many are kept that a row of them stays short."""
        times = self._notes.get(what or text, ("", 0))[1] + 1
        if times == 1 and len(self._notes) >= NOTES:
            self._more += 1
        else:
            self._notes[what or text] = (text[:NOTE], times)
        said = [self._found] if self._found else []
        said += [one + (f" ({times} times)" if times > 1 else "") for one, times in self._notes.values()]
        self._tell("notes", "; ".join([*said, *([f"and {self._more} more"] if self._more else [])]))

    def _tell(self, what: str, how: str) -> None:
        self.meters = self.meters | {what: how}  # a new one: somebody may be writing the old one out

    # -- sums

    def _settle(self, tracks: Sequence[Track] | None = None) -> None:
        """Add up all looks until the moment that every meter has reached, or each of these."""
        now_us = round(self._clock() * MICRO)
        tracks = self.parts.tracks if tracks is None else tracks
        if any(not one.points for one in tracks):
            return
        until_us = min((one.points[-1][0] for one in tracks), default=now_us)
        offset_us = round(self._wall() * MICRO) - now_us
        if self._at_us < 0:
            self._at_us = max((one.points[0][0] for one in tracks), default=now_us)
            self._began_us = max(self._began_us, self._at_us)
            self._rebin(offset_us)
        if abs(offset_us - self._offset_us) > MICRO // 2:  # somebody set the clock
            self._rebin(offset_us)
        self._offset_us, self._settled_s = offset_us, now_us / MICRO
        if until_us <= self._at_us or until_us < self._began_us:
            return
        if not self._begun:  # what one of them saw before the last had begun is of no stretch of the node's
            self._begun = True
            for one in self.parts.tracks:
                one.since(self._at_us)
        before, start_us = self._node_nj(), self._at_us
        unknown = self._exact["node_unknown_ms"] + self._exact["device_unknown_ms"]
        if self._at_us < self._began_us:  # between a killed process and this one
            self._until(self._began_us)
            self._add("recovered_mj", self._node_nj())
            self._base_nj = before = self._node_nj()
            start_us = self._at_us
        self._until(until_us)
        self._judge()
        if self._at_us > start_us:
            milliwatts = (self._node_nj() - before) // (self._at_us - start_us)
            missing = self._exact["node_unknown_ms"] + self._exact["device_unknown_ms"] > unknown or not self.parts.whole
            self._live = (self._at_us, self._node_nj() - self._base_nj, milliwatts, missing)

    def _until(self, until_us: int) -> None:
        while (edge_us := (self._bin + 1) * BIN_S * MICRO - self._offset_us) <= until_us:
            self._piece(max(edge_us, self._at_us))
            if self._whole and self._bin > self._given and self.parts.tracks:
                self._pending.bins.append((self._bin, 1, *self._of_bin))  # type: ignore[arg-type]
                self._given = self._bin
            self._bin, self._whole, self._of_bin = self._bin + 1, True, [0, 0]
        self._piece(until_us)

    def _rebin(self, offset_us: int) -> None:
        """The bin that runs now began without us, or by another clock: it is not given."""
        self._offset_us, self._whole, self._of_bin = offset_us, False, [0, 0]
        self._bin = (self._at_us + offset_us) // (BIN_S * MICRO)

    def _node_nj(self) -> int:
        return self._exact["node_measured_mj"] + self._exact["node_estimated_mj"] + self._exact["node_nameplate_mj"]

    def _add(self, name: str, amount: int) -> int:
        """nJ or µs; gives the whole mJ or ms that this makes."""
        self._exact[name] += amount
        told = self._exact[name] // (MICRO if name.endswith("_mj") else 1000)
        more, self._told[name] = told - self._told[name], told
        setattr(self._pending, name, getattr(self._pending, name) + more)
        return more

    def _piece(self, until_us: int) -> None:
        """One stretch that ends here, for every meter the same, put together to devices and node."""
        long_us, self._at_us = until_us - self._at_us, max(until_us, self._at_us)
        if long_us <= 0:
            return
        parts, add = self.parts, self._add
        each = [one.since(until_us) for one in parts.devices]
        device = Drawn(*map(sum, zip(*each, strict=True)))
        processors = {one: one.since(until_us).nj for one in parts.processors}
        node = parts.node.since(until_us) if parts.node is not None else None
        for one in parts.tracks:
            self._pending.gaps, one.gaps = self._pending.gaps + one.gaps, 0
        plated_us, blind_us = (parts.unmetered * long_us, 0) if parts.device_mw is not None else (0, parts.unmetered * long_us)
        nameplate_nj = plated_us * (parts.device_mw or 0)
        unknown_us = len(each) * long_us - device.known_us + blind_us
        self._of_bin[0] += add("device_measured_mj", device.measured_nj)
        self._of_bin[0] += add("device_estimated_mj", device.estimated_nj)
        self._of_bin[0] += add("device_nameplate_mj", nameplate_nj)
        add("device_ms", device.known_us + plated_us)
        add("device_unknown_ms", unknown_us)
        add("counter_mj", device.counter_nj)
        add("integral_mj", device.integral_nj)
        add("gap_ms", device.gap_us)
        add("power_capped_ms", device.capped_us)
        add("thermal_ms", device.thermal_us)
        add("brake_ms", device.brake_us)
        add("reasons_ms", device.reasons_us)
        add("cpu_mj", sum(processors.values()) + (device.nj if parts.alone else 0))
        trusted = node if self._node_trusted else None
        if trusted is not None:
            self._trial = [one + more for one, more in zip(self._trial, (trusted.known_us, trusted.nj, device.nj), strict=True)]
        beside_nj = sum(processors[one] for one in parts.added)
        measured, estimated, nameplate, missing_us = parts.node_of(long_us, device, nameplate_nj, unknown_us, beside_nj, trusted)
        self._of_bin[1] += add("node_measured_mj", measured) + add("node_estimated_mj", estimated) + add("node_nameplate_mj", nameplate)
        add("node_unknown_ms", missing_us)
        add("ms", long_us if parts.whole else 0)

    def _judge(self) -> None:
        """A node's meter that says less than its devices misses them (a DCMI that does not see the GPU tray): it is not asked again in this run."""
        known_us, node_nj, device_nj = self._trial
        if known_us < self.least_s * MICRO:
            return
        self._trial = [0, 0, 0]
        if node_nj < SHORT * device_nj:
            self._node_trusted = False
            says, ours = node_nj / known_us / 1000, device_nj / known_us / 1000
            self._note(
                f"node's meter rejected: it says {says:,.0f} W where the devices alone draw {ours:,.0f} W; the node is estimated from here on"
            )

    # -- what outlives this process

    def _save(self) -> None:
        """What was seen and not taken, and where the counters stood: replaced as one, never synced."""
        if self._carry is None or self._at_us < 0:
            return
        counters = {}
        for one in self.parts.tracks:
            counter = one.counter_at(self._at_us)
            if counter is not None:
                counters[_called(one.source)] = [counter, max(one.most_mw, 0)]
        self._saved_s = self._clock()
        record = self._key | {
            "job": _job(),
            "at_us": self._at_us,
            "pending": [before + more for before, more in zip(self._unkept, self._pending.ints(), strict=True)],
            "counters": counters,
        }
        written = self._carry.with_name(f"{self._carry.name}.{self._mark}")
        try:
            _written(written, json.dumps(record).encode())
            written.replace(self._carry)
        except OSError as failure:
            for stale in (written, self._carry):  # what it says has been told meanwhile
                with suppress(OSError):
                    stale.unlink()
            if not self._unsaved:
                self._note(f"joules would be lost with this process, its file cannot be written: {failure}")
            self._unsaved = True

    def _claim(self) -> None:
        """What a killed process of this run left on this node is ours, and no other's: renamed first, so that it is counted once."""
        if self._carry is None:
            return
        claimed = self._carry.with_name(f"{self._carry.name}.{self._mark}.claimed")
        try:
            found = self._carry.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
                self._note(f"{self._carry} is not read: it is no file of this user's (uid {found.st_uid}, {stat.filemode(found.st_mode)})")
                return
            self._carry.rename(claimed)
        except FileNotFoundError:
            return
        except OSError as failure:
            self._note(f"what a former process saw cannot be claimed: {failure}")
            return
        try:
            try:
                left = json.loads(_read(claimed))
            finally:
                claimed.unlink()
            if not self._key["boot"] or any(left[name] != value for name, value in self._key.items()):
                return
            pending, at_us, counters, job = Taken.of(left["pending"]), int(left["at_us"]), dict(left["counters"]), left["job"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as failure:
            self._note(f"what a former process saw cannot be read: {failure}")
            return
        pending.nodes = pending.devices = 0
        pending.recovered_mj = pending.node_measured_mj + pending.node_estimated_mj + pending.node_nameplate_mj
        self._pending = pending
        if job is not None and job == _job():  # the node was held all the while: from there on by the counters' difference
            self._began_us = round(self._clock() * MICRO)
            for one in self.parts.tracks:
                round_s = getattr(
                    one.source, "round_s", None
                )  # a counter takes at least so long to go round: after it nobody knows how often it did
                sure = round_s is None or (self._began_us - at_us) / MICRO < 0.9 * round_s
                one.begin(at_us, *(counters.get(_called(one.source), ()) if sure else ()))


def _written(path: Path, text: bytes) -> None:
    """A new file: in a folder that others write to as well, nothing that they put there under its name is followed or filled."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(text)


def _read(path: Path) -> bytes:
    """Of a file of this user's; no link, no pipe, no other's."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
            raise PermissionError(f"{path} is no file of this user's (uid {found.st_uid}, {stat.filemode(found.st_mode)})")
        return file.read(MOST_CARRIED)


def _job() -> str | None:
    """Who holds this node from one process to the next: an allocation (a job that was queued again keeps its number, and its nodes were others' meanwhile),
    or without one the supervisor that starts ranks again in place. None: nobody."""
    number = os.environ.get("SLURM_JOB_ID")
    return os.environ.get(board.SPAWNED) if number is None else f"{number}.{os.environ.get('SLURM_RESTART_COUNT') or 0}"


def _called(source: Source) -> str:
    return "/".join((*source.place, source.scope))


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def opened(
    power: config.Power,
    watts: Watts,
    devices: Sequence[str],
    *,
    whole: bool,
    share: float | None = None,
    carry: Path | None = None,
    run: str = "",
) -> Meter:
    """The meter of this node, for `with`.

    `devices`: UUIDs of the accelerators of this node's ranks; none on a CPU node. `whole`: this process is the one of this machine that reads processors and
    the node's meter; another one counts its own devices only. `share`: of the node that is the job's; None: by the number of devices. `carry`: a file of this
    process alone, on a disk of this node. With nothing to read it still works, and says so; raises PowerError where the recipe names a node's meter that
    does not answer.
    """
    from gigatrain.power import amd, host, node, nvml

    here, sysfs = (os.uname().nodename,), Path(power.sysfs)
    found, notes = _accelerators(devices, (nvml.sources, amd.sources))
    processors, more = host.sources(sysfs, here)
    meter, most = node.source(power.node, sysfs, here)
    notes += more + most if whole else []
    board = [one for one in processors if one.scope == "node"]  # RAPL's psys
    processors = [one for one in processors if one.scope != "node"]
    if meter is None and board and power.node == "auto":
        meter = board.pop()
    spare = board if whole else [*board, *processors, *([meter] if meter is not None else [])]
    for one in spare:
        one.close()
    elsewhere = not whole and meter is not None
    processors, meter = (processors, meter) if whole else ([], None)
    missing = len(devices) - sum(len(one.covers) for one in found)
    package = hardware.CHIPS[watts.chip].devices if watts.chip is not None else 1
    parts = composed(
        found,
        processors,
        meter,
        watts,
        every_s=power.every_s,
        unmetered=-(-missing // package),
        share=share,
        whole=whole,
        elsewhere=elsewhere,
        notes=notes,
    )
    return Meter(parts, described(parts, watts, notes), every_s=power.every_s, carry=carry, run=run)


def _accelerators(
    devices: Sequence[str], makers: Sequence[Callable[[Sequence[str]], tuple[list[Any], list[str]]]]
) -> tuple[list[Any], list[str]]:
    """The first maker's whose meters answer; if none does, what each says."""
    said: list[str] = []
    for sources in makers if devices else ():
        found, notes = sources(devices)
        if found:
            return found, notes
        said += notes
    return [], said
