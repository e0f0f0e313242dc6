"""What a check says, and how checks are run so that none of them can hang or fall over the rest."""

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "warn", "bad", "untested"]
Health = Literal["healthy", "suspect", "bad"]
RAISED, HUNG = (
    "the check itself failed",
    "does it hang again? then something of this node does",
)  # ways out that tell these from what was found
WORST: tuple[State, ...] = ("ok", "untested", "warn", "bad")  # the later one wins where several parts make one finding


@dataclass(frozen=True)
class Finding:
    """One check's answer: `said` is the sentence, `value` and `limit` what was measured and what is wanted (of the worst part), `way_out` what to do.

    A `value` that is a number is compared over the nodes of a job (judge.py) where its name is listed there.
    """

    name: str
    state: State
    said: str
    value: float | str | None = None
    limit: float | str | None = None
    way_out: str = ""

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """A function that gives one finding, or several, and how long it may take; not `alone`: other nodes may be why it does not end."""

    name: str
    run: Callable[[], Finding | Sequence[Finding]]
    limit_s: float = 10.0
    alone: bool = True


def worst(name: str, parts: Sequence[Finding], well: str) -> Finding:
    """The parts of one check (each GPU, each port) as one finding of the worst state; `well` is said where all are ok."""
    if not parts:
        return Finding(name, "ok", well)
    state: State = max((part.state for part in parts), key=_rank)
    chosen = [part for part in parts if part.state == state]
    if state == "ok":
        return Finding(name, "ok", well, chosen[0].value, chosen[0].limit)
    shown = "; ".join(dict.fromkeys(part.said for part in chosen[:8])) + (f"; and {len(chosen) - 8} more" if len(chosen) > 8 else "")
    return Finding(name, state, shown, chosen[0].value, chosen[0].limit, next((part.way_out for part in chosen if part.way_out), ""))


def _rank(state: State) -> int:
    return WORST.index(state)


def health(findings: Sequence[Finding]) -> Health:
    """bad by one bad finding, suspect by one warning; what was not tested changes nothing."""
    states = {finding.state for finding in findings}
    return "bad" if "bad" in states else "suspect" if "warn" in states else "healthy"


class Clock:
    """Seconds that are left of the whole; what a check may take is the smaller of its own limit and these."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self.began = limit_s, time.monotonic()

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self.began

    @property
    def left_s(self) -> float:
        return self.limit_s - self.spent_s


def run(checks: Sequence[Check], clock: Clock, doing: Callable[[str], None] = lambda name: None) -> tuple[list[Finding], list[str]]:
    """The findings of every check in order, and the names of those that were given up because they hung.

    A check that raises is bad with its error, one that takes longer than its limit is bad and left behind in its thread. Where the whole had less time left
    than its limit, it is bad after half of that or more, else it warns (untested where others may be the reason); one that no time was left for is untested.
    `doing` hears the name of each as it begins.
    """
    found: list[Finding] = []
    hung: list[str] = []
    for check in checks:
        limit_s = min(check.limit_s, clock.left_s)
        if limit_s <= 0.05:
            found.append(
                Finding(check.name, "untested", f"the whole limit of {clock.limit_s:g} s was spent before it", way_out="--limit-s")
            )
            continue
        doing(check.name)
        answer = _in_thread(check, limit_s)
        if answer is None:
            hung.append(check.name)
            cut = limit_s < check.limit_s
            said = f"gave no answer in {limit_s:.1f} s" + (f", all that was left of {clock.limit_s:g} s" if cut else "")
            state: State = "bad" if not cut else "untested" if not check.alone else "bad" if limit_s >= check.limit_s / 2 else "warn"
            found.append(Finding(check.name, state, said, round(limit_s, 1), check.limit_s, HUNG))
        else:
            found.extend(answer)
    return found, hung


def _in_thread(check: Check, limit_s: float) -> list[Finding] | None:
    """What the check answers, its error as a finding, or None after `limit_s`: a call that never returns cannot be ended, but need not be waited for."""
    answer: list[Finding] = []
    done = threading.Event()

    def work() -> None:
        try:
            found = check.run()
            answer.extend([found] if isinstance(found, Finding) else found)
        except BaseException as failure:
            place = traceback.extract_tb(failure.__traceback__)[-1]
            where = f" ({place.filename.rsplit('/', 1)[-1]}:{place.lineno})"
            answer[:] = [Finding(check.name, "bad", f"{type(failure).__name__}: {failure}"[:300] + where, way_out=RAISED)]
        done.set()

    threading.Thread(target=work, name=f"doctor {check.name}", daemon=True).start()
    return list(answer) if done.wait(limit_s) else None
