"""Where a run's wall-clock went, from the events of its logs/progress.jsonl. Free of torch.

Goodput is the time of the steps that the run kept over the wall-clock since its first process had the folder. The rest of that time, by class: `redone`,
steps that a restart did again; `data`, waited for a batch (of a GPU, which computes meanwhile, only the trace knows it); `compile`, kernels made and judged,
and what a process's first step takes beyond its others; `validation`; `checkpoint`; `restore`, a checkpoint read; `paced`, waited to keep to a power budget;
`starting`, the rest from having the folder to the first step;
`stopped`, from a process's last word to the next one's first, with what a killed one did after its last report; `other`, what is left.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Any

CLASSES = ("training", "redone", "data", "compile", "validation", "checkpoint", "restore", "paced", "starting", "stopped", "other")
TOLD = ("data", "compile", "validation", "checkpoint", "restore", "paced")  # which a run says by name
LARGEST = 1e100  # beyond it a number is damage
Event = Mapping[str, Any]


@dataclass(slots=True, eq=False)
class Session:
    """One process of a run, as its events add up: what it needs does not grow with them."""

    first: Event
    last: Event
    cut: float  # the least step that a later process went back to: what lies behind it was done again
    at: float  # the step of its newest report, before that the one that it began at
    began: Event | None = None  # its first step's event; None if it never came to one
    report: Event | None = None  # the newest that names its step
    stepped: Event | None = None  # the newest whose step lies behind where it began
    stands: Event | None = None  # the newest that says at which step it is
    reached: float = -inf  # the highest step of a report
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("training", "redone", *TOLD), 0.0))
    stepping_s: float = 0.0  # of reports: steps, and what they waited for data
    ended_s: float = 0.0  # of words after its end, what they tell of by name
    lived: Event | None = None  # the newest that is no end

    def add(self, event: Event) -> None:
        """An event of it, the newest."""
        self.last, spent = event, event.get("seconds")
        spent = spent if isinstance(spent, dict) else {}
        told = {what: number(spent, what) or 0.0 for what in TOLD}
        for what, seconds in told.items():
            self.seconds[what] += seconds
        if event["event"] == "end":
            self.ended_s += sum(told.values())
        else:
            self.lived = event
        step = number(event, "step")
        if step is None or event["event"] not in ("steps", "report"):
            return
        self.stands = event
        if event["event"] == "steps":
            if self.began is None:
                self.began = event
            return
        trained = number(spent, "training") or 0.0
        kept = min(1.0, max(0.0, (self.cut - self.at) / (step - self.at))) if step > self.at else 0.0
        self.seconds["training"] += trained * kept
        self.seconds["redone"] += trained * (1 - kept)
        self.stepping_s += trained + told["data"]
        self.report, self.at, self.reached = event, step, max(self.reached, step)
        if self.began is not None and step > self.began["step"]:
            self.stepped = event

    @property
    def starting_s(self) -> float:
        """From having the folder to its first step, without what it tells of by name."""
        spent = self.began.get("seconds") if self.began else None
        named_s = sum(number(spent, what) or 0.0 for what in spent) if isinstance(spent, dict) else 0.0
        return max(0.0, (self.began or self.last)["time_s"] - self.first["time_s"] - named_s)

    @property
    def lost_s(self) -> float:
        """What a killed one did since its own last word, by its supervisor's."""
        if self.began is None or self.lived is None or not self.last.get("killed"):
            return 0.0
        return max(0.0, self.last["time_s"] - self.lived["time_s"] - self.ended_s)


class Sessions:
    """The processes of a run in the order in which they had it, up to the one that finished it: who only looked at it later is no part of it.

    Takes events as they come and keeps none but a few of each process. What lies before a step that somebody goes back to is counted on the way there; so
    where a process begins before the end of another, or `ask` is for a step that is passed, `stale` says that the events are needed once more, by `again`.
    """

    def __init__(self, known: Sequence[Session] = (), steps: Iterable[float] = ()) -> None:
        self._found: dict[Any, Session] = {}
        self._begins = {one.first.get("process"): one.began["step"] for one in known if one.began}
        self._cuts: dict[Any, float] = {}
        cut = inf
        for one in reversed(known):
            self._cuts[one.first.get("process")] = cut
            cut = min(cut, self._begins.get(one.first.get("process"), inf))
        self._steps = sorted({0, *steps})  # at which tokens are asked for
        # Of the reports up to each of these steps, and behind the last, the one of the least and the one of the highest step, with their tokens.
        self._least: list[tuple[float, float] | None] = [(0, 0.0), *(None for _ in self._steps)]
        self._most = list(self._least)
        self._top = 0.0
        self.stale = self.finished = False

    def add(self, event: Event) -> None:
        """The next event of logs/progress.jsonl; it has its time in `time_s`."""
        if self.finished:
            return
        process, step = event.get("process"), number(event, "step")
        session = self._found.get(process)
        if session is None:
            session = Session(event, event, self._cuts.get(process, inf), self._begins.get(process, 0))
            self._found[process] = session
        if event["event"] == "steps" and step is not None and session.began is None:
            self._went_back(process, session, step)
        session.add(event)
        tokens = number(event, "tokens")
        if event["event"] == "report" and step is not None and tokens is not None:
            self._count(step, tokens)
        self.finished = event["event"] == "end" and event.get("why") == "finished"

    def _went_back(self, process: Any, session: Session, step: float) -> None:
        self.ask(step)
        if process in self._begins:  # as in the reading before
            return
        self.stale |= session.report is not None  # it tells of steps before it tells where they began
        session.at = step
        for before in self.all[: self.all.index(session)]:
            before.cut = min(before.cut, step)
            self.stale |= before.reached > step

    def _count(self, step: float, tokens: float) -> None:
        at = bisect_left(self._steps, step)
        least, most = self._least[at], self._most[at]
        if least is None or step <= least[0]:
            self._least[at] = (step, tokens)
        if most is None or step >= most[0]:
            self._most[at] = (step, tokens)
        self._top = max(self._top, step)

    def ask(self, step: float) -> None:
        """`tokens` is to know this step."""
        step = max(0, step)  # a smaller one is damage
        at = bisect_left(self._steps, step)
        if at == len(self._steps) or self._steps[at] != step:
            self._steps.insert(at, step)
            self._least.insert(at + 1, None)
            self._most.insert(at + 1, None)
            self.stale |= step < self._top

    def tokens(self, step: float) -> float:
        """Tokens at a step that was asked for: as its own report said, else in a straight line between the reports around it."""
        step = max(0, step)
        at = bisect_left(self._steps, step)
        below = next((one for one in reversed(self._most[: at + 1]) if one is not None), (0, 0.0))
        above = next((one for one in self._least[at + 1 :] if one is not None), None)
        share = 0.0 if above is None else (step - below[0]) / (above[0] - below[0])
        return below[1] + share * (above[1] - below[1] if above is not None else 0.0)

    def told(self, event: Event) -> float:
        """Tokens at a report's step, by its own word where it has one."""
        said = number(event, "tokens") if event["event"] == "report" else None
        return self.tokens(event["step"]) if said is None else said

    def again(self) -> "Sessions":
        """Where to put all events once more."""
        return Sessions(self.all, self._steps)

    @property
    def all(self) -> list[Session]:
        return list(self._found.values())

    @property
    def stands(self) -> Event | None:
        """Where the run is: the newest report, or where its newest process began."""
        return next((one.stands for one in reversed(self.all) if one.stands is not None), None)


def sessions_of(events: Sequence[Event]) -> Sessions:
    """Of events that are all there."""
    found = Sessions()
    for event in events:
        found.add(event)
    if found.stale:
        found = found.again()
        for event in events:
            found.add(event)
    return found


def goodput_of(sessions: Sequence[Session], now: float | None) -> dict[str, Any] | None:
    """Seconds by class since the first of these processes had the folder, until `now` (None: the last event), and the share that was kept."""
    if not sessions:
        return None
    seconds: dict[str, float] = dict.fromkeys(CLASSES, 0.0)
    for session in sessions:
        for what, spent in session.seconds.items():
            seconds[what] += spent
        seconds["starting"] += session.starting_s
        seconds["stopped"] += session.lost_s
    for before, session in pairwise(sessions):
        seconds["stopped"] += max(0.0, session.first["time_s"] - before.last["time_s"])
    end = sessions[-1].last["time_s"]
    wall_s = max(0.0, max(now or end, end) - sessions[0].first["time_s"])
    if (told_s := sum(seconds.values())) > wall_s:  # a clock was set back meanwhile: shares are kept
        seconds = {what: spent * wall_s / told_s for what, spent in seconds.items()}
    seconds["other"] = max(0.0, wall_s - sum(seconds.values()))
    return {
        "wall_s": round(wall_s, 3),
        "share": min(1.0, seconds["training"] / wall_s) if wall_s else None,
        "seconds": {what: round(spent, 3) for what, spent in seconds.items()},
    }


def classes(events: Sequence[Event], now: float | None = None) -> dict[str, float]:
    """Seconds by class (CLASSES) of the events of a logs/progress.jsonl; they add up to the wall-clock that they span. Nothing of no events."""
    found = goodput_of(sessions_of(events).all, now)
    return dict(found["seconds"]) if found else {}


def number(row: Mapping[str, Any], key: str) -> Any:
    """A number of a row; what is missing or something else, or not finite, or too large to be of a run, is None."""
    value = row.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST else None
