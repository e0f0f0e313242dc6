"""When a run saves: in the background while it trains, and at its ends in one piece; what all ranks know of it, and what is told.

A save in the background is staged on every rank at once and then goes on in processes beside the ranks (writing.py). Nobody waits for it: whether it is
committed, or failed anywhere, comes with the numbers that ranks sum at a report anyway, so that all of them know the same at the same step.

One save is in flight at a time. Where the next comes due before it has ended, training waits as long as saves have taken so far (twice the longest, 5 to 60 s):
on a disk that works no checkpoint is left out, and none costs more than a save without a background. After that the disk is taken for stalled: the due save is
left out and said to be, and until the one in flight ends, later ones are left out without waiting.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from gigatrain.checkpoint.background import Outcome, Writer
from gigatrain.checkpoint.saves import Checkpoints
from gigatrain.errors import CheckpointError
from gigatrain.parallel.agree import agreed, told
from gigatrain.parallel.places import State

WAIT_S = (5.0, 60.0)  # for the save before, when the next is due: at least, at most
LAST_S = 10.0  # for the save before, where the run must leave or goes back
AT_END_S = 300.0  # for it at the end of a run, whom nobody hurries; one that does nothing for `stuck_s` is ended sooner
NUMBERS = 4


@dataclasses.dataclass
class _Flight:
    """A save that is being written."""

    step: int
    stall_s: float
    interval_s: float  # since the save before
    began_s: float
    given_up: bool = False
    left_out: int = 0  # saves that came due meanwhile


@dataclasses.dataclass
class Totals:
    """Of the saves of this process in the background."""

    saves: int = 0
    failed: int = 0
    left_out: int = 0
    stall_s: float = 0.0
    stall_s_max: float = 0.0
    interval_s: float = 0.0
    seconds: float = 0.0
    bytes: int = 0

    @property
    def beside_s(self) -> float:
        """What a save was written for beside training, mean."""
        return self.seconds / self.saves if self.saves else 0.0

    def json(self) -> dict[str, Any]:
        """With shares and rates where there are any."""
        found = {key: round(value, 6) if isinstance(value, float) else value for key, value in dataclasses.asdict(self).items()}
        return found | {
            "stall_share": round(self.stall_s / self.interval_s, 6) if self.interval_s else None,
            "gbyte_s": round(self.bytes / self.seconds / 1e9, 4) if self.seconds else None,
        }


class Saving:
    """`save` when a step is due, `numbers` and `meet` at each report, `before_change` ahead of what changes the state."""

    def __init__(
        self,
        saves: Checkpoints,
        *,
        background: bool,
        say: Callable[[str], None] = print,
        tell: Callable[..., None] = lambda event, **more: None,
        sync: Sequence[Path] = (),
    ) -> None:
        """`say`: lines for the user, on rank 0 once. `tell(event, ...)`: what progress.jsonl keeps. `sync`: files that a checkpoint counts on."""
        self.saves, self.mesh, self.background = saves, saves.mesh, background
        self.say, self.tell, self.sync = say, tell, sync
        self.writer = Writer(self.mesh.device)
        self.totals = Totals()
        self._flight: _Flight | None = None
        self._ended: Outcome | None = None  # of this rank's part of the flight
        self._busy = False  # some rank's writer, as of the last meeting
        self._token, self._need_bytes, self._begun = "", 0, 0
        self._longest_s = 0.0
        self._since_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()

    def save(self, step: int, state: Callable[[], State], extra: Mapping[str, Any], *, must: bool = False, hurried: bool = False) -> None:
        """Save a step; all ranks call it together. A disk that refuses is said and ends nothing, but where the save `must` be: then it is durable on
        return, or CheckpointError is raised on all ranks; `hurried`, the save before it is not waited for long."""
        began = time.monotonic()
        try:
            if must:
                self.end(LAST_S if hurried else AT_END_S)
                self.saves.save(step, state(), extra)
            elif not self.background:
                self.saves.save(step, state(), extra)
            elif self._ready(step) and not self.saves.has(step):
                self._begin(step, state(), extra, began)
        except CheckpointError as failure:
            if must:
                raise
            self._not_saved(step, str(failure))
        self._since_s = time.monotonic()

    def before_change(self) -> None:
        """Ahead of what changes the state: the device waits for what is still being copied."""
        self.writer.before_change()

    # ---- In the background ----

    def _begin(self, step: int, state: State, extra: Mapping[str, Any], began: float) -> None:
        if not self._token and not self._first(state):
            self.saves.save(step, state, extra)
            return
        self._begun, self._ended = self._begun + 1, None
        try:
            self.saves.begin(self.writer, f"{self._token}-{self._begun}", step, state, extra, self._need_bytes, self.sync)
        except CheckpointError as failure:  # of this rank: the others hear of it at the next report
            self._ended = Outcome(str(failure))
        now = time.monotonic()
        self._flight = _Flight(step, now - began, began - self._since_s, now)
        if self.writer.pinned is False and self._begun == 1:
            self.say("  saves    memory for staging could not be pinned: copies off the device hold training up")

    def _first(self, state: State) -> bool:
        """Whether every rank can stage; collective, once."""
        self._need_bytes = self.saves.need_bytes(state)
        files, _ = self.saves.share(state)
        mine = sum(tensor.numel() * tensor.element_size() for held in files.values() for tensor in held.values()) + (1 << 20)
        why = self.writer.room(mine * min(self.mesh.node, self.mesh.count))  # the other ranks of this node stage theirs at once
        lacking = int(self.mesh.sum(torch.tensor(int(why is not None), device=self.mesh.device)))
        if lacking:
            self.background = False
            self.say(
                f"  saves    not in the background: {why or 'other ranks lack memory for staging'} ({lacking} of {self.mesh.count} ranks)"
            )
            return False
        self._token = told(self.mesh, f"{os.getpid()}-{os.urandom(3).hex()}")
        return True

    def numbers(self) -> list[int]:
        """What ranks sum at a report: committed and failed, both as rank 0's writer says; failed on any rank; still at work on any."""
        self._hear()
        first, ended = self.mesh.rank == 0 and self._flight is not None, self._ended
        well, ill = ended is not None and ended.why is None, ended is not None and ended.why is not None
        return [int(first and well), int(first and ill), int(self._flight is not None and ill), int(self.writer.busy)]

    def meet(self, sums: Sequence[int]) -> list[int]:
        """The sums of all ranks: now all know how the save in flight stands. Returns what follows of them. Collective where one failed."""
        committed, over, failed, busy = sums[:NUMBERS]
        flight, self._busy = self._flight, busy > 0
        if flight is not None and committed:
            self._flight = None
            self._committed(flight)
        elif flight is not None and over:
            self._flight = None
            self._failed(flight)
        elif flight is not None and failed and not flight.given_up:
            flight.given_up = True  # told once rank 0's writer has ended: it may yet have committed
            self.writer.cancel()
        return list(sums[NUMBERS:])

    def _hear(self, wait_s: float = 0.0) -> None:
        if (found := self.writer.outcome(wait_s)) is not None and self._flight is not None and self._ended is None:
            self._ended = found

    def _ready(self, step: int) -> bool:
        """Whether a save may begin: none is in flight, nor held up by one that is."""
        if self._flight is None and not self._busy:
            return True
        left_out = self._flight.left_out if self._flight else 0
        if self._settled(min(max(2 * self._longest_s, WAIT_S[0]), WAIT_S[1]) if not left_out else 0.0):
            return True
        self.totals.left_out += 1
        if flight := self._flight:
            flight.left_out += 1
            doing = f": rank 0 {self.writer.doing}" if self.mesh.rank == 0 and self.writer.doing else ""
            self._not_saved(
                step, f"step {step}: the save of step {flight.step} has not ended in {time.monotonic() - flight.began_s:.0f} s{doing}"
            )
        else:
            self._not_saved(step, f"step {step}: a rank's process is still busy with a save that failed; its disk may be stalled")
        return False

    def _settled(self, wait_s: float) -> bool:
        """Wait for the save in flight, then hear from all ranks. Collective."""
        for wait in (wait_s, 1.0, 1.0):  # again: one that failed on a rank is given up on the others first
            self._hear(wait)
            self.meet(self.mesh.sum(torch.tensor(self.numbers(), dtype=torch.int64, device=self.mesh.device)).tolist())
            if (self._flight is None and not self._busy) or (self._flight is not None and not self._flight.given_up):
                break
        return self._flight is None and not self._busy

    def end(self, wait_s: float = LAST_S) -> None:
        """Nothing is in flight any more: the save before has ended within `wait_s`, or is given up for what must be done now. Collective."""
        if (self._flight is not None or self._busy) and not self._settled(wait_s):
            self.writer.kill("it was given up for the last save")
            self._hear(1.0)
            if flight := self._flight:
                self._not_saved(
                    flight.step, f"step {flight.step}: it had not ended in {time.monotonic() - flight.began_s:.0f} s and is given up"
                )
            self._flight, self._busy, self.background = None, False, False

    def _committed(self, flight: _Flight) -> None:
        self.saves.committed(flight.step)
        found, totals = self._ended, self.totals
        totals.saves += 1
        totals.interval_s += flight.interval_s
        self._stalled(flight)
        row: dict[str, Any] = {"step": flight.step, "stall_s": round(flight.stall_s, 6), "interval_s": round(flight.interval_s, 6)}
        row["stall_share"] = round(flight.stall_s / flight.interval_s, 6) if flight.interval_s else None
        if found is not None:  # of rank 0: of all ranks' bytes
            totals.seconds += found.seconds
            totals.bytes += found.bytes
            row |= {
                "save_s": found.seconds,
                "bytes": found.bytes,
                "gbyte_s": round(found.bytes / found.seconds / 1e9, 4) if found.seconds else None,
            }
        self._longest_s = max(self._longest_s, _seconds(found, flight))
        self.tell("saved", **row)

    def _failed(self, flight: _Flight) -> None:
        self.writer.cancel()
        self.totals.failed += 1
        self._stalled(flight)
        why = self.saves.unsaved(flight.step, "it was given up")
        try:
            with agreed(self.mesh, CheckpointError, str):
                if self._ended is not None and self._ended.why is not None and not self._ended.given_up:
                    raise CheckpointError(self.saves.unsaved(flight.step, self._ended.why))
        except CheckpointError as failure:
            why = str(failure)
        self._not_saved(flight.step, why)

    def _stalled(self, flight: _Flight) -> None:
        flight.stall_s += self.writer.waited_s()
        self.totals.stall_s += flight.stall_s
        self.totals.stall_s_max = max(self.totals.stall_s_max, flight.stall_s)

    def _not_saved(self, step: int, why: str) -> None:
        self.tell("not saved", step=step, why=why)
        self.say(f"CHECKPOINT NOT SAVED: {why}; training goes on, the next try is at the next interval")


def _seconds(found: Outcome | None, flight: _Flight) -> float:
    """Seconds that a save took: by rank 0's writer, elsewhere until it was heard of, which may be longer."""
    return found.seconds if found is not None and found.seconds else time.monotonic() - flight.began_s
