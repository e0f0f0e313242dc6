"""Why an attempt ended, and whether there is another: over what the ranks left, and launching/restart.py's judgement. Free of torch."""

import signal as signals
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigatrain.launching import restart


@dataclass(frozen=True)
class Ended:
    """An attempt of this node's ranks. `rank` is the first that ended, or the one that hung; `code` is -N where signal N ended it."""

    rank: int
    code: int
    step: int | None  # that the run had done, as the rank last said
    ranks: int = 0  # 0: not said
    hung: str = ""  # what was the matter with it, where it was ended for making no progress
    began_s: float = 0.0  # wall-clock, of the attempt
    failure: dict[str, Any] | None = None  # what the first rank that failed by itself left
    final: bool = False  # it left nothing, and said that it would only fail again

    @property
    def exit_code(self) -> int:
        """As a shell says it."""
        return self.code if self.code >= 0 else 128 - self.code

    def words(self) -> str:
        """`rank 1 was ended by SIGKILL at step 37`."""
        of = f" of {self.ranks}" if self.ranks else ""
        where = f" at step {self.step}" if self.step is not None else " before its first step"
        if self.hung:
            return f"rank {self.rank} made no progress{where}: {self.hung}"
        failure = self.failure
        if failure is not None and not failure.get("secondary"):
            message = str(failure.get("message") or "").splitlines() or [""]
            return f"rank {failure.get('rank', self.rank)} failed{where}: {failure.get('type')}: {message[0][:200]}"
        if self.code < 0:
            return f"rank {self.rank}{of} was ended by {signals.Signals(-self.code).name}{where}{' (out of memory?)' * (self.code == -9)}"
        return f"rank {self.rank} ended with exit code {self.code}{where}"


def judged(run: Path, ended: Ended, *, before: int, stalled: int, restarts: int, told: str | None) -> tuple[restart.Verdict, int]:
    """What to do, and the newest committed step. `before` is that of before the attempt, `told` a signal that was passed on to the ranks."""
    step = restart.committed(run)
    if ended.final and ended.failure is None:
        return restart.Verdict("stop", "it would end the same way again", ended.exit_code), step
    outcome = restart.Outcome(
        code=ended.exit_code,
        signal=told.removeprefix("SIG") if told else None,
        finished=False,
        before=before,
        step=step,
        stalled=stalled,
        failure=ended.failure,
    )
    return restart.judge(outcome, may_requeue=False, restarts=restarts), step


def further(resumed: int | None, furthest: int, before: int) -> bool:
    """Whether an attempt went on from a later step than any before it, and than the newest committed one: steps that only the near tier has are a gain too.

    `resumed` is None where it died before it was seen to train. To begin anew is no gain, however many attempts before were not even seen to.
    """
    return resumed is not None and resumed > max(furthest, before, 0)


def pause_s(ended: Ended, stalled: int) -> float:
    """Before the next attempt: none for what a process died of, some for what it said itself and may pass, as of a file system that is away."""
    return float(min(2 ** (stalled - 1), 30)) if stalled and ended.code > 0 and not ended.hung else 0.0
