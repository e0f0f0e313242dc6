"""Energy of a run while it runs: who reads which meter, one sum over all nodes a window, and what is told of it.

One rank a host leads: the lowest. It reads the accelerators of all ranks there, each once and by UUID, and the lowest rank of a machine (of a boot: hosts may
be containers of one machine) reads its processors and its own meter. What they saw since they were last asked travels as integers in the reduction that the
health of the run takes anyway; nothing here waits for the device. Rank 0 writes RUN/energy.jsonl (power/__init__.py has its rows), and what it says of
phases is of its own node, by the time in which its loop did them.
"""

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from gigatrain.errors import PowerError
from gigatrain.observe.logs import Progress
from gigatrain.observe.trace import Trace
from gigatrain.parallel import ranks
from gigatrain.parallel.agree import agreed
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning.plan import Plan
from gigatrain.power import account, guard, meter
from gigatrain.power.reading import BIN_S, BOUNDARIES, FIELDS, Taken
from gigatrain.power.spans import plus

LEAST_S = 10.0  # no figure is of less
LATE_S = 3 * BIN_S  # a bin that a meter has not closed by then is closed without it
COMPUTE = ("forward", "backward", "optimizer")
APART = ("paced", "checkpoint", "validation", "profile")  # have joules of their own, by the clock
SPARE_BINS = 8
JUMP = 10_000  # bins, more than a day: so long is no window
MACHINE = 1 << 32  # in a bin's count of who has closed it: ranks that read below, machines above


class Latest(NamedTuple):
    """What was drawn since the last report but one, on every rank alike; by boundary, what is known."""

    seconds: float = 0.0
    watts: dict[str, float] = {}  # noqa: RUF012 (never changed)
    bins: tuple[
        tuple[float, float], ...
    ] = ()  # ten seconds that all nodes have closed: begin, seconds since 1970, and mean at the widest boundary

    @property
    def boundary(self) -> str | None:
        """The widest that is known."""
        return next((name for name in reversed(BOUNDARIES) if name in self.watts), None)

    @property
    def peak_watts(self) -> float | None:
        """The highest ten-second mean, at the widest known boundary."""
        return max((watts for _, watts in self.bins), default=None)


class Energy:
    """Meters of this rank, if it leads; the run's sums, on every rank alike; rows and figures, on rank 0. `with` it for as long as the run has its nodes."""

    def __init__(self, plan: Plan, mesh: Mesh, folder: Path, run: str, *, progress: Progress, say: Callable[[str], None]) -> None:
        """Collective. Raises PowerError, on all ranks, where the recipe names a meter that does not answer."""
        self.plan, self.mesh, self.say = plan, mesh, say
        self.path = folder / "energy.jsonl" if mesh.rank == 0 else None
        self.row = {"attempt": progress.log.attempt, "process": progress.process}
        self._finished = progress.waiting is not None  # nothing is written for who only looks at a finished run
        self.meter: meter.Meter | None = None
        self._leads = self._whole = False
        self.nodes = self.devices = self._leaders = 0  # machines, their metered accelerators, and ranks that read; 0: nothing is measured
        self.latest, self.orders, self.elsewhere_s = Latest(), {}, 0.0
        self.least_cap: float | None = None  # the least limit of the accelerators, over their most; None: it cannot be set
        self._caps: guard.Caps | None = None
        self._cap_share: float | None = None
        self._carry: Path | None = None
        self.complete = False  # nothing will follow: no process will have anything to recover
        self._sum, self._figured, self._since = Taken(), Taken(), Taken()  # since the last row, the last figures, the last decision
        self._words: dict[str, str] = {}
        self._waiting: dict[int, tuple[int, int, int]] = {}  # closed bins that not all have heard of: whether a node's, device and node mJ
        self._tokens = 0  # of the run where the open window began
        self._told: dict[str, float | None] = {}
        self._last_bin: list[tuple[int, int, int, int]] = []
        self._phase, self._joules, self._phases = "starting", 0.0, {}
        self._ready, self._closed, self._at = False, False, (0, 0)
        if not plan.power.measure:
            return
        uuids, share, self._whole, self._leads, self._leaders, self.nodes = _share(mesh, _accelerator(mesh.device), plan.watts.per_node)
        try:
            with agreed(mesh, PowerError, str):
                if self._leads:
                    self._open(uuids, share, run, folder)
        except BaseException:
            self._let_go()
            raise
        least_s = self.meter.least_s if self.meter is not None else 0.0
        self._next, self.least_s = ranks.first(mesh, lambda: [int(time.time()) // BIN_S, max(LEAST_S, least_s)])
        self._room = SPARE_BINS

    def _open(self, uuids: Sequence[str], share: float | None, run: str, folder: Path) -> None:
        """The meters and limits of this host. A meter that the recipe names must answer; any other failure costs the figures and not the run."""
        power, watts = self.plan.power, self.plan.watts
        self._carry = Path(tempfile.gettempdir()) / f"gigatrain-energy-{run}-{os.getuid()}-{platform.node()}.json"
        try:
            self.meter = meter.opened(power, watts, uuids, whole=self._whole, share=share, carry=self._carry, run=run)
        except PowerError:
            raise
        except Exception as failure:  # of a driver's binding: whatever it is
            self.say(f"POWER NOT MEASURED on {platform.node()}: {type(failure).__name__}: {str(failure)[:300]}; training goes on")
        if power.caps and uuids and watts.device_watts.value:
            self._caps = guard.Caps([f"GPU-{one}" for one in uuids], run=str(folder), say=self.say)

    def __enter__(self) -> Self:
        """Collective where limits may be set; raises PowerError, on all ranks, where one of them has not the right to."""
        if self.plan.power.caps and self.nodes:
            try:
                with agreed(self.mesh, PowerError, str):
                    if self._caps is not None:
                        self._caps.__enter__()
                self.least_cap = self._least_cap()
            except BaseException:
                self._let_go()
                raise
        if self.meter is not None:
            self.meter.__enter__()
        if self.path is not None and self.nodes and not self._finished:
            self._write("begin", Taken(), [])
        return self

    def _let_go(self) -> None:
        """Of meters and limits that were opened in vain: another rank has failed."""
        if self._caps is not None:
            with contextlib.suppress(PowerError):
                self._caps.close()
        if self.meter is not None:
            self.meter.__exit__(None, None, None)

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        finally:
            if self._caps is not None:
                self._caps.__exit__()

    def _least_cap(self) -> float | None:
        """The highest of the nodes' least limits, over the most that an accelerator may draw here; None where no node has any to set."""
        most = self.plan.watts.device_watts.value
        table = torch.zeros(self.mesh.count, dtype=torch.int64)
        if self._caps is not None and most:
            table[self.mesh.rank] = round(1e6 * self._caps.least_watts / most)
        least = int(self.mesh.sum(table.to(self.mesh.device)).max())
        return least / 1e6 if least else None

    def close(self) -> None:
        """The last row, after a last look: what is left of rank 0's node (of the others, if they were killed, their next process recovers it). Not
        collective; once."""
        if not self.nodes or self._closed:
            return
        self._closed = True
        if self.meter is not None:
            self.meter.__exit__(None, None, None)
            plus(self._sum, self.meter.take())
            self.meter.kept()
        if self.path is not None and not self._finished:
            self._write("end", self._sum, self._sum.bins)
        if self.complete and self._carry is not None:
            with contextlib.suppress(OSError):  # a file that stays is of a run that is over, and nobody's
                self._carry.unlink()

    # ---- The window's reduction ----

    def numbers(self) -> list[int]:
        """What this rank's meter saw since it was last asked; of a rank that leads no node zeros."""
        if not self.nodes:
            return []
        bins = [[0, 0, 0] for _ in range(self._room)]
        taken = self.meter.take() if self.meter is not None else Taken()
        if self._leads:
            self._keep(taken)
            for number, (known, device, node) in self._waiting.items():
                if 0 <= number - self._next < self._room:
                    bins[number - self._next] = [1 + known * MACHINE, device, node]
        now = int(time.time()) // BIN_S if self.mesh.rank == 0 else 0
        return [*taken.ints(), *(value for one in bins for value in one), now]

    def _keep(self, taken: Taken) -> None:
        """Bins that this host's meter has closed; what no meter has closed is closed without it, as known by nobody, so that the others' do not wait."""
        for number, _, device, node in taken.bins:
            self._waiting[number] = (int(self._whole), device, node)
        for number in range(self._next, min(int((time.time() - LATE_S) // BIN_S), self._next + self._room)):
            self._waiting.setdefault(number, (0, 0, 0))

    def meet(self, sums: Sequence[int]) -> Sequence[int]:
        """The numbers of all ranks together, the same on every rank; returns those that are not ours."""
        if not self.nodes:
            return sums
        size = len(FIELDS) + 3 * self._room
        flat, now, taken = sums[len(FIELDS) : size], sums[size], Taken.of(sums[: len(FIELDS)])
        closed = []
        for at in range(self._room):
            who, device, node = flat[3 * at : 3 * at + 3]
            if who % MACHINE < self._leaders:
                break
            closed.append((self._next + at, who // MACHINE, device, node))
        self._next, full = self._next + len(closed), len(closed) == self._room
        if now - self._next > JUMP:  # somebody set the clock of rank 0's node
            self._next = now
        closed = [one for one in closed if one[1]]
        self._waiting = {number: value for number, value in self._waiting.items() if number >= self._next}
        for into in (self._sum, self._figured, self._since):
            plus(into, taken)
            into.bins += closed
        seconds = _seconds(self._sum)
        self._room = SPARE_BINS + int(2 * seconds) // BIN_S + (self._room if full else 0)
        self._ready = seconds >= self.least_s
        self._look()
        return sums[size + 1 :]

    def _look(self) -> None:
        """What was drawn since the last decision; a node that is silent is no 0 W."""
        taken, seconds = self._since, _seconds(self._since)
        found = account.boundaries(taken, self.plan.watts, seconds) if taken.nodes == self.nodes else {}
        known = {name: one for name, one in found.items() if one is not None}
        latest = Latest(seconds, {name: one.watts for name, one in known.items() if one.watts is not None})
        wide, bins = latest.boundary, tuple[tuple[float, float], ...]()
        if wide is not None:  # a bin has devices and nodes; what lies beyond is in it as in the window
            inner = "device" if wide == "device" else "node"
            times = known[wide].joules / known[inner].joules if inner in known and known[inner].joules else None
            whole = [one for one in taken.bins if one[1] == self.nodes] if times is not None else []
            bins = tuple(
                (float(number * BIN_S), (device if inner == "device" else node) / 1e3 / BIN_S * (times or 0.0))
                for number, _, device, node in whole
            )
        self.latest = latest._replace(bins=bins)
        self.devices = taken.devices or self.devices

    def decided(self) -> None:
        """What is drawn from here on is for the next decision."""
        self._since = Taken()

    # ---- Rows and figures ----

    def figures(self, tokens: int) -> dict[str, float | None]:
        """What a line of metrics.jsonl says of power: of the window that ends here, or where that is still too short of the last; what is unknown is not
        there."""
        if self.nodes and _seconds(self._figured) >= self.least_s:
            taken, self._figured = self._figured, Taken()
            found = account.boundaries(taken, self.plan.watts, _seconds(taken)) if taken.nodes == self.nodes else {}
            known = {name: one for name, one in found.items() if one is not None}
            gained, self._tokens = tokens - self._tokens, tokens
            self._told = {f"{name}_watts": round(one.watts, 1) for name, one in known.items() if one.watts is not None}
            joules = list(known.values())[-1].joules if known else 0.0
            if gained > 0 and joules > 0:
                self._told |= {"joules_per_token": joules / gained, "tokens_per_s_mw": 1e6 * gained / joules}
            if "node" in known and known["node"].joules > 0:
                change = _steepest([*self._last_bin, *taken.bins], self.nodes)
                self._told["watts_change_10s"] = None if change is None else change * joules / known["node"].joules
            self._last_bin = taken.bins[-1:] or self._last_bin
        return self._told

    def report(self, step: int, tokens: int, trace: Trace, *, must: bool = False) -> None:
        """The open window ends here, if it is long enough or `must`: its row is written."""
        if not self.nodes or not (self._ready or must):
            return
        taken, self._sum, self._ready, self._at = self._sum, Taken(), False, (step, tokens)
        if self.meter is not None:
            self.meter.kept()  # before the row: what a kill of rank 0 between the two loses is estimated, and counted once
        if self.path is not None:
            self._write("window", taken, taken.bins, trace)

    def begin(self, step: int, tokens: int) -> None:
        """The first step of this process begins: what was drawn until now was for the start."""
        self._tokens, self._at, self._finished = tokens, (step, tokens), False
        if self.nodes:
            self._turn("training")
            taken, self._sum, self._ready, self._figured, self._since = self._sum, Taken(), False, Taken(), Taken()
            if self.meter is not None:
                self.meter.kept()
            if self.path is not None:
                self._write("steps", taken, taken.bins)

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """What rank 0's node draws inside is for `what`."""
        before, began = self._phase, time.monotonic()
        self._turn(what)
        try:
            yield
        finally:
            self._turn(before)
            if what != "paced":
                self.elsewhere_s += time.monotonic() - began

    def obey(self, cap_share: float | None) -> None:
        """Set the limits of this node's accelerators to that share of the most that one may draw here; None: as they were found."""
        most = self.plan.watts.device_watts.value
        if self._caps is None or most is None or cap_share == self._cap_share:
            return
        self._cap_share = cap_share
        try:
            self._caps.apply(None if cap_share is None else max(self._caps.least_watts, cap_share * most))
        except (PowerError, OSError) as failure:
            self.say(f"POWER LIMIT NOT SET: {failure}; training goes on, and the budget is kept by spacing steps where it is exceeded")

    def _changed(self) -> dict[str, Any]:
        """What is read and how, in the first row of a process and where that has changed."""
        if self.meter is None or self.meter.meters == self._words:
            return {}
        self._words = dict(self.meter.meters)
        return {"meters": self._words}

    def _turn(self, phase: str) -> None:
        if self.path is None or self.meter is None:
            return
        now = self.meter.joules()
        self._phases[self._phase] = self._phases.get(self._phase, 0.0) + now - self._joules
        self._joules, self._phase = now, phase

    def _write(self, event: str, taken: Taken, bins: Sequence[Sequence[int]], trace: Trace | None = None) -> None:
        assert self.path is not None
        self._turn(self._phase)
        phases, self._phases = self._phases, {}
        shares = trace.take() if trace is not None else {}
        row = {
            "time_s": round(time.time(), 3),
            "event": event,
            **self.row,
            "step": self._at[0],
            "tokens": self._at[1],
            "taken": dict(zip(FIELDS, taken.ints(), strict=True)),
            "bins": [list(one) for one in bins],
            "phases": {name: round(joules, 3) for name, joules in _split(phases, shares).items()},
            **self._changed(),
            **({"orders": self.orders} if self.orders else {}),
        }
        try:
            with self.path.open("a+b") as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a line that a kill cut short is not glued to this one
                        file.write(b"\n")
                file.write(json.dumps(row).encode() + b"\n")
        except OSError as failure:
            self.say(f"ENERGY NOT WRITTEN {self.path}: {failure.strerror}; it is in the next row, and training goes on")
            if taken is not self._sum:
                plus(self._sum, taken)
                self._sum.bins = [*bins, *self._sum.bins]  # type: ignore[list-item]
            self._words = {}
            for name, joules in phases.items():
                self._phases[name] = self._phases.get(name, 0.0) + joules


def _seconds(taken: Taken) -> float:
    """How long its meters saw, each of them."""
    return taken.ms / 1e3 / max(1, taken.nodes)


def _steepest(bins: Sequence[Sequence[int]], nodes: int) -> float | None:
    """The largest change of the nodes' watts from ten seconds to the next, of those that all have closed; None where no two follow each other."""
    whole = [(number, node) for number, count, _, node in bins if count == nodes]
    changes = [after - before for (first, before), (second, after) in pairwise(whole) if second == first + 1]
    return max(changes, key=abs) / 1e3 / BIN_S if changes else None


def _split(phases: dict[str, float], seconds: dict[str, float]) -> dict[str, float]:
    """Joules of training by what the step did meanwhile: computing, waiting for other ranks (`communication`), for data, or none of these."""
    seconds = {phase: spent for phase, spent in seconds.items() if phase not in APART}
    total = sum(seconds.values())
    if "training" not in phases or not total:
        return phases
    found = {name: joules for name, joules in phases.items() if name != "training"}
    for phase, spent in seconds.items():
        name = "compute" if phase in COMPUTE else "communication" if phase == "reduce" else phase
        found[name] = found.get(name, 0.0) + phases["training"] * spent / total
    return found


def _accelerator(device: torch.device) -> int:
    """The 128 bits of its UUID, which no environment variable renumbers; 0 for a CPU."""
    return uuid.UUID(str(torch.cuda.get_device_properties(device).uuid)).int if device.type == "cuda" else 0


def _share(mesh: Mesh, mine: int, per_node: int) -> tuple[list[str], float | None, bool, bool, int, int]:
    """UUIDs of the accelerators that this rank reads; where several hosts (containers) are on its machine, the share of the machine's that are the run's;
    whether it reads the machine, whether it leads its host, and how many hosts and machines there are. Collective."""
    row = [_hashed(_boot(), platform.node()), _hashed(_boot()), mine >> 64, mine & ((1 << 64) - 1)]
    table = torch.zeros(mesh.count, len(row), dtype=torch.int64)
    table[mesh.rank] = torch.tensor([value - (1 << 64) if value >> 63 else value for value in row])
    rows = mesh.sum(table.to(mesh.device)).tolist()
    host, machine = rows[mesh.rank][0], rows[mesh.rank][1]
    of_host = [number for number, one in enumerate(rows) if one[0] == host]
    leads = of_host[0] == mesh.rank
    whole = leads and next(number for number, one in enumerate(rows) if one[1] == machine) == mesh.rank

    def words(numbers: Sequence[int]) -> list[int]:
        found = ((rows[number][2] % (1 << 64)) << 64 | rows[number][3] % (1 << 64) for number in numbers)
        return [word for word in dict.fromkeys(found) if word]

    uuids = [str(uuid.UUID(int=word)) for word in words(of_host)]
    of_machine = [number for number, one in enumerate(rows) if one[1] == machine]
    several = len({rows[number][0] for number in of_machine}) > 1
    share = min(1.0, len(words(of_machine)) / per_node) if several and per_node else None
    return uuids if leads else [], share, whole, leads, len({one[0] for one in rows}), len({one[1] for one in rows})


def _boot() -> str:
    """Of this machine since it was started; containers of it have the same."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return platform.node()


def _hashed(*words: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(words).encode()).digest()[:8])
