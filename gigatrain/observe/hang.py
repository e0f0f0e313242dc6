"""A rank that no longer gets on is told of: where it stands, by the stacks of its threads and torch's record of collectives. Free of torch.

The loop and the engines mark their phases anyway (observe/trace.py); each mark also counts a `Pulse` on, which costs two assignments and waits for nothing. A
thread looks at the count ten times a limit. On a GPU the host runs ahead, so the phase is where the host waits. It only reports: `Watch` ends nothing.
A rank that is stopped, or whose thread holds Python's lock, cannot report by this thread: of the second Python's own watchdog writes the stacks into the
log; the first is found by the others, which wait for it and report (failed.hung).
"""

import contextlib
import datetime
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from gigatrain.recovery.meeting import COLLECTIVE_S

if TYPE_CHECKING:
    from gigatrain.observe.logs import Log

SLOW = frozenset({"start", "corpus", "build", "checkpoint", "export"})  # phases without a usual length
SLOW_TIMES = 6  # of the limit is what they get, and a process's first steps, in which kernels and graphs are made
FIRST_STEPS = 4
SHARE = 0.9  # of a collective's time, within which a hang is told
SHORTEST_S = 0.01  # between two looks, however short the limit
TOUCH_S = 5.0  # between two signs of life
COLLECTIVES = "2000"  # that torch's flight recorder keeps, a few MB of host memory


class Written(Protocol):
    """Where a supervisor reads what the training thread writes (recovery/board.py)."""

    def begun(self, begun: int, step: int) -> None: ...
    def phase(self, phase: str) -> None: ...


class Pulse:
    """How far this rank is: `beats` grows with every sign of life."""

    __slots__ = ("_at_begin", "_known", "beats", "begun", "board", "new", "phase", "step")

    def __init__(self) -> None:
        self.beats, self.begun, self.phase, self._at_begin = 0, 0, "start", 0
        self.board: Written | None = None  # the supervisor's, which hears of a step and a phase at once: the next may hold Python's lock
        self.new = False  # whether this step has a phase that no step had before: kernels and graphs are made for it
        self._known: set[str] = set()
        self.step: int | None = None  # steps that the run has done; None before the first of this process

    def mark(self, phase: str) -> None:
        """From here on it is `phase`."""
        self.phase = phase
        self.beats += 1
        if phase not in self._known:
            self._known.add(phase)
            self.new = True
        if self.board is not None:
            self.board.phase(phase)

    def begin(self, step: int) -> None:
        """Step `step`, counted from 0, begins."""
        self.step = step
        self.begun += 1
        self.beats += 1
        self._at_begin = self.beats
        self.new = False
        if self.board is not None:
            self.board.begun(self.begun, step)

    @property
    def marks(self) -> int:
        """Signs of life since the last step began."""
        return self.beats - self._at_begin

    def slow(self) -> bool:
        """Whether it may take long here."""
        return self.phase in SLOW or self.begun <= FIRST_STEPS or self.new


def environment(folder: str) -> dict[str, str]:
    """What torch must find before it joins the ranks, so that its flight recorder keeps collectives and NCCL's dumps them when one times out."""
    return {
        "TORCH_FR_BUFFER_SIZE": COLLECTIVES,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": f"{folder}/errors/collectives-",
    }


class Watch:
    """A thread that reports, once, when the pulse of a log's rank stands still for `limit_s`; 0: never. When it goes on, that is said too.

    Of several ranks none waits longer than a collective may: its end would end the process, and nobody had told where it stood.
    """

    def __init__(self, log: "Log", limit_s: float, alive: Path | None = None) -> None:
        """`alive`: a file that is touched, where it is, while the rank gets on or is where it may take long: news for who watches the run."""
        most_s = SHARE * COLLECTIVE_S if log.ranks > 1 else float("inf")
        self.log, self.pulse, self.limit_s, self.slow_s = log, log.pulse, min(limit_s, most_s), min(SLOW_TIMES * limit_s, most_s)
        self.interval_s = max(SHORTEST_S, min(10.0, self.limit_s / 10))
        self.alive, self._touched_s = alive, -TOUCH_S
        self.reported_s = 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        beat = self.log.beat
        if beat is not None and self.log.owned:  # a supervisor asks for the stacks, of this thread's or, past Python's lock, by a signal
            beat.on_asked = lambda: self._report(0.0)
            faulthandler.register(signal.SIGUSR2, file=self.log.descriptor, all_threads=True)
        if self.limit_s > 0 and self.log.owned:
            self._thread = threading.Thread(target=self._look, name="gigatrain-hang", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.log.beat is not None:
            self.log.beat.on_asked = lambda: None
            faulthandler.unregister(signal.SIGUSR2)
        if self._thread is not None:
            self._thread.join(5)
            faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        beats, idle_s, last = self.pulse.beats, 0.0, time.monotonic()
        self._arm()
        while not self._over.wait(self.interval_s):
            now = time.monotonic()
            idle_s += min(now - last, 2 * self.interval_s)  # a process that was stopped did not hang meanwhile
            last = now
            self._arm()
            if self.pulse.beats != beats or (self.pulse.slow() and not self.reported_s):
                self._touch(now)
            if self.pulse.beats != beats:
                if self.reported_s:
                    self._went_on(idle_s)
                beats, idle_s = self.pulse.beats, 0.0
            elif not self.reported_s and idle_s >= (self.slow_s if self.pulse.slow() else self.limit_s):
                self.reported_s = idle_s
                with contextlib.suppress(Exception):  # whatever goes wrong in a report costs the report
                    self._report(idle_s)

    def _touch(self, now: float) -> None:
        if self.alive is not None and now - self._touched_s >= TOUCH_S:
            self._touched_s = now
            with contextlib.suppress(OSError):
                os.utime(self.alive)

    def _arm(self) -> None:
        """Python's watchdog writes the stacks if this thread gets no turn for the limit."""
        with contextlib.suppress(ValueError, RuntimeError, OSError):
            faulthandler.dump_traceback_later(max(self.limit_s, 3 * self.interval_s), file=self.log.descriptor)

    def _report(self, idle_s: float) -> None:
        pulse, log = self.pulse, self.log
        record: dict[str, Any] = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "rank": log.rank,
            "ranks": log.ranks,
            "node": log.node,
            "pid": os.getpid(),
            "step": pulse.step,
            "phase": pulse.phase,
            "seconds": round(idle_s, 1),
        }
        said = (
            f"HANG: rank {log.rank} of {log.ranks} has made no progress for {idle_s:.0f} s in {pulse.phase}, after step {pulse.step or 0}"
        )
        log.write(f"[gigatrain] {said}; stacks follow, and are in {log.stuck}\n")
        with contextlib.suppress(ValueError, OSError):
            faulthandler.dump_traceback(log.descriptor, all_threads=True)
        with contextlib.suppress(Exception):  # torch's own, and of any kind: the stacks matter more
            if collectives := _collectives():
                log.stuck.with_name(f"rank-{log.rank:05d}-collectives.json").write_bytes(collectives)
        whole = log.stuck.with_suffix(f".{os.getpid()}")
        with whole.open("w", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n{said}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        whole.replace(log.stuck)  # who sees it finds all the rest

    def _went_on(self, idle_s: float) -> None:
        self.reported_s = 0.0
        self.log.write(f"[gigatrain] rank {self.log.rank} goes on after {idle_s:.0f} s, in {self.pulse.phase}\n")
        with contextlib.suppress(OSError):
            self.log.stuck.replace(self.log.stuck.with_name(f"rank-{self.log.rank:05d}-hang-over.txt"))


def _collectives() -> bytes:
    """Torch's flight recorder as JSON: the last collectives of this rank, what each was, and whether it began and ended; empty where torch keeps none."""
    distributed = sys.modules.get("torch._C._distributed_c10d")
    dump = getattr(distributed, "_dump_fr_trace_json", None) or getattr(distributed, "_dump_nccl_trace_json", None)
    return bytes(dump()) if dump is not None else b""
