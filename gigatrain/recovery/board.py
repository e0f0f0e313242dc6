"""Where the ranks of a node say how far they are, and their supervisor reads it: one page of memory that they share. Free of torch.

Each rank has a row of `CELLS` 64-bit numbers. The training thread writes its step and its phase as they begin, which are assignments into memory; a thread of
the rank copies the rest of its `Pulse` ten times a second, and its own clock with it: where that clock stands still the process is stopped, or Python's lock
is held.
"""

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

BOARD = "GIGATRAIN_BOARD"  # the environment's: the descriptor of the page, of a rank that has a supervisor
SPAWNED = (
    "GIGATRAIN_SPAWNED"  # names a rank's supervisor, which says for all of them why they failed, and holds the node from start to start
)
LEAVING = "leaving"  # the phase of a rank that has no clock any more
CELLS = 16
COPY_S = 0.1
_BEAT_NS, _BEATS, _BEGUN, _STEP, _MARKS, _SLOW, _ASKED, _PID, _FINAL, _PHASE = range(10)
_PHASE_BYTES = 8 * (CELLS - _PHASE)


class Pulsing(Protocol):
    """What is copied of a rank's pulse (observe/hang.py)."""

    beats: int
    begun: int
    phase: str
    step: int | None
    board: Any

    def slow(self) -> bool: ...

    @property
    def marks(self) -> int: ...


@dataclass(frozen=True)
class Row:
    """What a rank said last. `step` is how many steps the run had done when its last step began; None: it has begun none."""

    beat_ns: int
    beats: int
    begun: int
    step: int | None
    marks: int  # since that step began
    slow: bool
    pid: int
    phase: str
    final: bool = False  # it failed, with what would only fail again


class Board:
    """The page of one attempt's ranks, made by their supervisor, whose children inherit `descriptor`."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        size = max(mmap.PAGESIZE, ranks * CELLS * 8)
        self.descriptor = os.memfd_create("gigatrain-board")
        os.ftruncate(self.descriptor, size)
        self._page = mmap.mmap(self.descriptor, size)
        self._cells = memoryview(self._page).cast("q")

    def clear(self) -> None:
        """Before an attempt: nobody has said anything."""
        self._page[:] = bytes(len(self._page))

    def row(self, rank: int) -> Row:
        at = rank * CELLS
        cells = self._cells[at : at + CELLS].tolist()
        text = self._page[(at + _PHASE) * 8 : (at + _PHASE) * 8 + _PHASE_BYTES].rstrip(b"\0").decode("utf-8", "replace")
        begun = cells[_BEGUN]
        return Row(
            beat_ns=cells[_BEAT_NS],
            beats=cells[_BEATS],
            begun=begun,
            step=cells[_STEP] if begun else None,
            marks=cells[_MARKS],
            slow=bool(cells[_SLOW]) or not cells[_BEAT_NS],
            pid=cells[_PID],
            phase=text or "start",
            final=bool(cells[_FINAL]),
        )

    def ask(self, rank: int) -> None:
        """That the rank leave its stacks."""
        self._cells[rank * CELLS + _ASKED] = 1

    def close(self) -> None:
        self._cells.release()
        self._page.close()
        os.close(self.descriptor)


class Beat:
    """This rank's side of the board: a thread that copies its pulse, and that does what the supervisor asks for."""

    def __init__(self, pulse: Pulsing, rank: int) -> None:
        self.pulse = pulse
        self.on_asked: Callable[[], object] = lambda: None
        self._over = threading.Event()
        descriptor = int(os.environ[BOARD])
        self._page = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self._row = memoryview(self._page)[rank * CELLS * 8 : (rank + 1) * CELLS * 8]
        self._cells = self._row.cast("q")
        self._cells[_PID] = os.getpid()
        self._names: dict[str, bytes] = {}
        self.phase(pulse.phase)
        pulse.board = self
        self._thread = threading.Thread(target=self._copy, name="gigatrain-beat", daemon=True)
        self._thread.start()

    def begun(self, begun: int, step: int) -> None:
        """A step begins; of the training thread, as `phase`."""
        self._cells[_BEGUN], self._cells[_STEP] = begun, step

    def phase(self, phase: str) -> None:
        """From here on it is `phase`."""
        name = self._names.get(phase)
        if name is None:
            name = self._names[phase] = phase.encode()[:_PHASE_BYTES].ljust(_PHASE_BYTES, b"\0")
        self._row[_PHASE * 8 :] = name

    def _copy(self) -> None:
        while not self._over.is_set():
            pulse, cells = self.pulse, self._cells
            cells[_BEATS], cells[_MARKS], cells[_SLOW] = pulse.beats, pulse.marks, pulse.slow()
            cells[_BEAT_NS] = time.monotonic_ns()
            if cells[_ASKED]:
                cells[_ASKED] = 0
                with contextlib.suppress(Exception):  # a report that fails costs the report
                    self.on_asked()
            self._over.wait(COPY_S)

    def failed_for_good(self) -> None:
        """The failure that this rank ends with is not of the kind that passes; before it has a log, nobody else knows."""
        self._cells[_FINAL] = 1

    def end(self) -> None:
        """The row stays as it is, of a rank that is leaving: nobody judges its pace, nor that its clock stands."""
        self.phase(LEAVING)
        self.pulse.board = None
        self._over.set()
        self._thread.join(1)
        self._cells[_SLOW] = 1
