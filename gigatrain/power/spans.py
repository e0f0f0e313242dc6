"""A run's wall-clock from what its processes wrote: who had it, from which step to which, what their meters saw, and what a rule says of the time between.

Rows of energy.jsonl by process, steps and tokens of logs/progress.jsonl, and launch/history.jsonl for whether nodes were held between two processes.
"""

import contextlib
import datetime
import itertools
import json
import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gigatrain.planning.watts import Watts
from gigatrain.power.boundary import Boundary, boundaries, widest
from gigatrain.power.reading import FIELDS, Taken

LAG_S = 10.0  # by which a meter of a node may be late
LOST_S = 5.0  # of no row: half of the shortest window, and more than most meters are late by
NEAR_S = 0.5  # as far as meters' clock and wall-clock agree on when a process ended and the next began
MOST = 1 << 62  # a larger number is a damaged one
LATEST_S = 1e11  # the year 5138


@dataclass
class Row:
    """A row of energy.jsonl as it is needed."""

    time_s: float
    event: str
    step: int | None
    tokens: int | None
    taken: Taken
    seconds: float = 0.0
    lost_s: float = 0.0  # of these, of rows before it that were not written
    short_s: float = 0.0  # that nodes which did not answer lack of them, by all nodes


@dataclass
class Session:
    """One process that had the run."""

    process: str
    attempt: int | None = None
    began: int | None = None  # the step from which it trained
    began_tokens: int | None = None
    ended: bool = False  # it said so
    rows: list[Row] = field(default_factory=list)
    left: Taken = field(default_factory=Taken)  # what the process before it drew after its last row, as this one's meters found it,
    left_s: float = 0.0  # over so long
    begun_s: float | None = None  # `begin_s`, as its rows were read,
    heard_s: float | None = None  # when meters last answered,
    silent_s: float = 0.0  # and what was since then told of
    reports: list[tuple[int, int | None]] = field(default_factory=list)  # step, tokens
    start_s: float | None = None  # its first word in progress.jsonl,
    said_s: float | None = None  # its last,
    words_s: list[float] = field(default_factory=list)  # and all

    @property
    def begin_s(self) -> float:
        """When meters were there for it; if they were not, its first word."""
        return self.rows[0].time_s if self.rows and self.rows[0].event == "begin" else min(self._times(0))

    @property
    def last_s(self) -> float:
        """Its end; of one that was killed its last word, by whichever file has it."""
        return self.rows[-1].time_s if self.rows and self.rows[-1].event == "end" else max(self._times(-1))

    @property
    def told_s(self) -> float:
        """Its last row: what came after that the next process may recover."""
        return self.rows[-1].time_s if self.rows else self.begin_s

    @property
    def recovered(self) -> bool:
        """Whether it found joules of the process before."""
        return bool(_node_mj(self.left) or _device_mj(self.left))

    def _times(self, at: int) -> list[float]:
        said = (self.start_s, self.said_s)[at]
        return [time_s for time_s in (said, self.rows[at].time_s if self.rows else None) if time_s is not None]


def sessions_of(events: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]) -> list[Session]:
    """By process, in the order in which they had the run; who came after the one that finished it is no part of it (observe/goodput.py cuts the same)."""
    found: dict[str, Session] = {}
    finished, late = False, set[str]()
    for event in events:
        process = event["process"]
        if finished and process not in found:
            late.add(process)
            continue
        session = found.setdefault(process, Session(process))
        time_s, step, tokens = event["time_s"], count_of(event, "step"), count_of(event, "tokens")
        session.attempt = count_of(event, "attempt") if session.attempt is None else session.attempt
        session.start_s, session.said_s = time_s if session.start_s is None else session.start_s, time_s
        session.words_s.append(time_s)
        kind = event.get("event")
        if kind == "steps" and session.began is None:
            session.began = step
        elif kind == "report" and step is not None:
            session.reports.append((step, tokens))
        elif kind == "end":
            session.ended, finished = True, finished or event.get("why") == "finished"
    order, before = list(found), None
    for row in rows:
        process = row["process"]
        if process in late:
            continue
        if process not in found:  # its progress is lost
            found[process] = Session(process)
            order.insert(order.index(before) + 1 if before in order else len(order), process)
        _add(found[process], row)
        before = process
    sessions = [found[process] for process in order]
    for number in range(len(sessions) - 2, 0, -1):
        _hand_on(sessions[number], sessions[number + 1])
    return sessions


def _hand_on(session: Session, after: Session) -> None:
    """What the next process found is also of the one before this, if this was killed before it told what it had itself found."""
    if not after.recovered or any(row.taken.nodes for row in session.rows):
        return
    lived_s, until_next_s = max(0.0, session.last_s - session.begin_s), max(0.0, after.begin_s - session.begin_s)
    spare_s = after.left_s - (until_next_s if after.left_s > until_next_s else lived_s)
    if spare_s <= 0:
        return
    before, own = Taken(nodes=after.left.nodes, devices=after.left.devices), Taken(nodes=after.left.nodes, devices=after.left.devices)
    for name in FIELDS:
        if name not in ("nodes", "devices"):
            number = getattr(after.left, name)
            part = round(number * spare_s / after.left_s)
            setattr(before, name, part)
            setattr(own, name, number - part)
    after.left, after.left_s = own, after.left_s - spare_s
    plus(session.left, before)
    session.left_s += spare_s


def taken_of(said: Mapping[str, Any]) -> Taken:
    """`taken` of a row; what is missing or no count is 0."""
    taken = Taken()
    for name in FIELDS:
        number = said.get(name)
        if type(number) is int and 0 < number < MOST:  # not True, and no fraction: meters count
            setattr(taken, name, number)
    if "reasons_ms" not in said:  # a row of before there was that
        taken.reasons_ms = taken.device_ms + taken.device_unknown_ms
    return taken


def _add(session: Session, row: Mapping[str, Any]) -> None:
    """One row of energy.jsonl to its process; what of it a process before has drawn goes apart."""
    said, time_s = row.get("taken"), row["time_s"]
    taken = taken_of(said) if isinstance(said, dict) else Taken()
    if session.begun_s is None:
        first = row.get("event") == "begin" or session.start_s is None
        session.begun_s = time_s if first else min(time_s, session.start_s or time_s)
    before_s = session.begun_s if session.heard_s is None else session.heard_s
    # Meters count by a clock that nobody sets. Until they first answer their time comes with what they say then; if they fall silent later it is nobody's.
    if taken.nodes:
        seconds, session.heard_s, session.silent_s = taken.ms / taken.nodes / 1e3, time_s, 0.0
    else:
        late = session.heard_s is None or time_s - session.heard_s <= LAG_S
        seconds = 0.0 if late else max(0.0, time_s - before_s - session.silent_s)
        session.silent_s += seconds
    if taken.recovered_mj:
        left_s = max(0.0, seconds - max(0.0, time_s - before_s))
        left, taken = _parted(taken, left_s / seconds if seconds else 0.0)
        plus(session.left, left)
        session.left_s, seconds = session.left_s + left_s, seconds - left_s
    event, step, tokens = str(row.get("event")), count_of(row, "step"), count_of(row, "tokens")
    session.rows.append(Row(time_s, event, step, tokens, taken, seconds))
    session.attempt = count_of(row, "attempt") if session.attempt is None else session.attempt
    session.ended |= event == "end"
    if event == "steps":
        session.began = step if session.began is None else session.began
        session.began_tokens = tokens


def _parted(taken: Taken, share: float) -> tuple[Taken, Taken]:
    """What is of the process before, and the rest: joules by the node's that were recovered, times by `share`; the two make up the whole."""
    joules = min(1.0, taken.recovered_mj / whole) if (whole := _node_mj(taken)) else 0.0
    left, own = Taken(nodes=taken.nodes, devices=taken.devices), Taken(nodes=taken.nodes, devices=taken.devices)
    for name in FIELDS:
        if name not in ("nodes", "devices", "recovered_mj"):
            number = getattr(taken, name)
            part = round(number * (joules if name.endswith("_mj") else share))
            setattr(left, name, part)
            setattr(own, name, number - part)
    return left, own


def complete(row: Row, nodes: int, devices: int, *, alike: bool = False, found_s: float = 0.0) -> None:
    """What nodes that did not answer drew nobody knows; if `alike`, they drew what the others did, but for what was found of them (`found_s`, by all nodes)."""
    missing = nodes - row.taken.nodes
    if missing <= 0:
        return
    row.short_s = (row.seconds - row.lost_s) * missing / nodes
    if alike and row.taken.nodes:
        if found_s >= row.short_s > 0:
            return
        plus(row.taken, _like(row.taken, (1 - found_s / row.short_s if row.short_s else 1.0) * missing / row.taken.nodes))
    else:
        ms = round(row.seconds * 1e3 * missing)
        row.taken.ms += ms
        row.taken.node_unknown_ms += ms
        row.taken.device_unknown_ms += round(ms * devices / nodes)
    row.taken.nodes = nodes


def retained(sessions: list[Session], run: Path) -> int | None:
    """Tokens at the step that the run stands at: at the last report of the last process that came to a step, or where that one began."""
    known: dict[int, int] = {0: 0}
    for session in sessions:
        known |= {step: tokens for step, tokens in session.reports if tokens is not None}
        known |= {row.step: row.tokens for row in session.rows if row.step is not None and row.tokens is not None and row.event != "begin"}
    for session in reversed(sessions):
        steps = [step for step, _ in session.reports] + [
            row.step for row in session.rows if row.step is not None and row.event in ("window", "end")
        ]
        if session.began is None and not session.reports:
            continue
        at = max([session.began or 0, *steps])
        if at in known:
            return known[at]
        below = max(
            step for step in known if step <= at
        )  # a process that was killed before its first report: its checkpoint lay between two reports
        above = min((step for step in known if step > at), default=None)
        return known[below] if above is None else known[below] + round((known[above] - known[below]) * (at - below) / (above - below))
    told = [tokens for row in objects(run / "metrics.jsonl") if (tokens := count_of(row, "tokens")) is not None]
    return told[-1] if told else None


# ---- Spans of time: metered, at the edges, held, queued ----


@dataclass
class Stretch:
    """Between two processes: what was drawn while nodes were held, and by the first after its last row."""

    before: Session
    begin_s: float
    seconds: float
    taken: Taken


class Spans:
    """Adds up every stretch of the run's wall-clock: what meters saw and what a rule says of the rest."""

    def __init__(self, nodes: int, devices: int, history: list[dict[str, Any]]) -> None:
        self.nodes, self.devices, self.history = nodes, devices, history
        self.sum, self.seconds, self.queued_s = Taken(), 0.0, 0.0
        self.held, self.held_s, self.whys = Taken(), 0.0, dict[str, float]()
        self.stretches: list[Stretch] = []
        self.notes: list[str] = []

    def take(self, session: Session, after: Session | None) -> None:
        """A process's own time: its rows, and what lies at its edges and between two looks."""
        self._lost(session)
        answered = [row for row in session.rows if row.taken.nodes]
        # What the next process recovered begins where this one's last row ends: from there on no rule is needed.
        known = after is not None and after.recovered
        for row in session.rows:
            if row.seconds:
                # The last row is of rank 0's node alone; what the others drew then is alike, unless the next process has found it.
                found_s = after.left_s if after is not None and known and row.event == "end" else 0.0
                complete(row, self.nodes, self.devices, alike=row.event == "end", found_s=found_s)
            self.seconds += row.seconds
            plus(self.sum, row.taken)
        last_s = session.told_s if known else session.last_s
        unseen_s = last_s - session.begin_s - sum(row.seconds for row in session.rows)
        if answered:
            head_s = max(0.0, answered[0].time_s - answered[0].seconds - session.begin_s)
            tail_s = 0.0 if known else max(0.0, last_s - session.rows[-1].time_s) + LAG_S
            unseen_s = min(unseen_s, head_s + tail_s)  # else a clock was set
        if unseen_s > 0:
            self._by_rule(session.rows, unseen_s)

    def _lost(self, session: Session) -> None:
        """Time between two rows that the later one's meters do not cover: rows that could not be written. Nobody knows what was drawn, and it is not
        dropped: it is in the later row, whose tokens are of it too."""
        rows = session.rows
        first = next((number for number, row in enumerate(rows) if row.taken.nodes), len(rows))
        behind_s = [0.0]
        for before, row in itertools.pairwise(rows[first:]):
            behind_s.append(behind_s[-1] + max(row.time_s - before.time_s, -LAG_S) - row.seconds)  # a clock that is set back hides nothing
        # A meter that is late catches up; what no later row catches up with is lost.
        for number in range(len(behind_s) - 2, -1, -1):
            behind_s[number] = min(behind_s[number], behind_s[number + 1])
        holes = [
            (number, late_s - early_s)
            for number, (early_s, late_s) in enumerate(itertools.pairwise(behind_s), first + 1)
            if late_s - early_s > (LOST_S if number < len(rows) - 1 else LOST_S + 2 * LAG_S)
        ]
        if not holes:
            return
        paces = [_pace(before, row) for before, row in itertools.pairwise(rows)]
        usual = statistics.median([pace for pace in paces if pace] or [0.0])
        told_s = 0.0
        for number, lost_s in holes:
            row, before = rows[number], rows[number - 1]
            words_s = session.words_s[bisect_right(session.words_s, before.time_s) : bisect_left(session.words_s, row.time_s)]
            silent_s = max(after_s - before_s for before_s, after_s in itertools.pairwise([before.time_s, *words_s, row.time_s]))
            if usual and paces[number - 1] < 1.5 * usual and silent_s > lost_s - LOST_S:
                continue  # as many steps as in any row of its seconds, and not a word in between: a clock was set
            devices = self.devices * row.taken.nodes // self.nodes
            row.taken.ms += round(lost_s * 1e3 * row.taken.nodes)
            row.taken.node_unknown_ms += round(lost_s * 1e3 * row.taken.nodes)
            row.taken.device_unknown_ms += round(lost_s * 1e3 * devices)
            row.seconds, row.lost_s, told_s = row.seconds + lost_s, lost_s, told_s + lost_s
        if told_s:
            self.notes.append(f"energy.jsonl lacks rows for {told_s:,.0f} s of process {session.process}: nobody knows what was drawn then")

    def _by_rule(self, rows: list[Row], seconds: float) -> Taken:
        """`seconds` that no meter saw, at the mean watts of the process's last window (its rows; whichever of them lasted)."""
        self.seconds += seconds
        model = _last(rows)
        if model is None:  # nobody knows
            row = Row(0.0, "", None, None, Taken(), seconds)
            complete(row, self.nodes, self.devices)
            made = row.taken
        else:
            made = _like(model.taken, seconds / model.seconds)
        plus(self.sum, made)
        return made

    def between(self, before: Session, after: Session) -> None:
        """From a process's last word to the next one's first: held, as far as the job's history says so or meters went on, or queued."""
        met, since_s, model = after.recovered, before.told_s if after.recovered else before.last_s, _last(before.rows)
        gap_s = max(0.0, after.begin_s - since_s)
        held_s, why = _held_s(before, after, since_s, self.history)
        held_s, met_s, found = min(gap_s, held_s), 0.0, Taken()
        if met:
            # Whatever joules are counted, their time is: a meter that counts on is one of an allocation that goes on.
            met_s = max(0.0, after.left_s - self._short_s(before))
            self.seconds += met_s
            plus(self.sum, after.left)
            plus(found, after.left)
            if met_s:
                self._say("the next process found what its node's meter had counted", met_s)
            lived_s = min(gap_s, before.last_s - since_s)
            if lived_s > held_s:
                held_s, why = lived_s, "a process lived on after what was found of it; at its last window's watts"
        elif not before.ended and not held_s and model is not None:
            held_s = min(gap_s, model.seconds / 2)
            why = "a process left no end: it is taken to have lived for half a window more, at its last window's watts"
        if held_s - met_s > (NEAR_S if met else 0.0):
            plus(found, self._by_rule(before.rows, held_s - met_s))
            self._say(why, held_s - met_s)
        else:
            held_s = met_s
        spent_s = max(held_s, met_s)
        if spent_s or _node_mj(found):
            self.stretches.append(Stretch(before, since_s, spent_s, found))
        if spent_s:
            plus(self.held, found)
            self.held_s += spent_s
        self.queued_s += max(0.0, gap_s - spent_s)

    def _short_s(self, before: Session) -> float:
        """What is found of nodes other than rank 0's begins with the seconds of its last row, which are counted."""
        last = before.rows[-1] if before.rows else None
        return last.short_s if last is not None and last.event == "end" else 0.0

    def _say(self, why: str, seconds: float) -> None:
        self.whys[why] = self.whys.get(why, 0.0) + seconds

    def told(self, watts: Watts, found: Mapping[str, Boundary | None]) -> dict[str, Any]:
        """Of the time in which nodes were held and no process trained."""
        _, name = widest(found)
        one = boundaries(self.held, watts, self.held_s)[name] if name is not None and self.held_s else None
        none = None if self.held_s else 0.0
        words = "; ".join(f"{spent:,.1f} s: {why}" for why, spent in self.whys.items())
        return {
            "seconds": round(self.held_s, 3),
            "joules": one.joules if one else none,
            "why": words or "no time between processes was held",
        }


def _held_s(before: Session, after: Session, since_s: float, history: list[dict[str, Any]]) -> tuple[float, str]:
    """For how long nodes were held from then until the next process, by the job's history: a new attempt of the same allocation holds them all the time; one
    that was queued again until the old job's end and from the new one's start."""
    if before.attempt is None or after.attempt is None or before.attempt == after.attempt:
        return 0.0, ""
    judged = next((event for event in history if event["event"] == "judged" and event.get("attempt") == before.attempt), None)
    started = next((event for event in history if event["event"] == "started" and event.get("attempt") == after.attempt), None)
    if judged is not None and judged.get("verdict") == "again":
        return math.inf, "nodes were held for a new attempt in the same job; at the last window's watts"
    old_s, new_s = _when(judged), _when(started)
    held_s = max(0.0, min(old_s, after.begin_s) - since_s) if old_s is not None else 0.0
    held_s += max(0.0, after.begin_s - max(new_s, since_s)) if new_s is not None else 0.0
    return held_s, "nodes were held until a job ended and from when the next one started; at the last window's watts"


def _when(event: Mapping[str, Any] | None) -> float | None:
    if event is None:
        return None
    with contextlib.suppress(TypeError, ValueError):
        return datetime.datetime.fromisoformat(str(event.get("time"))).timestamp()
    return None


def _last(rows: list[Row]) -> Row | None:
    """The last window of a process: the last row of at least a second, else the longest; None where no meter ever told it anything."""
    seen = [row for row in rows if row.seconds > 0 and (_node_mj(row.taken) > 0 or _device_mj(row.taken) > 0)]
    seen = [row for row in seen if not row.lost_s] or seen
    return next((row for row in reversed(seen) if row.seconds >= 1), max(seen, key=lambda row: row.seconds, default=None))


def _pace(before: Row, row: Row) -> float:
    """Steps a second of its meters."""
    return max(0, row.step - before.step) / row.seconds if row.step is not None and before.step is not None and row.seconds else 0.0


def _device_mj(taken: Taken) -> int:
    return taken.device_measured_mj + taken.device_estimated_mj + taken.device_nameplate_mj


def _node_mj(taken: Taken) -> int:
    return taken.node_measured_mj + taken.node_estimated_mj + taken.node_nameplate_mj


def _like(taken: Taken, factor: float) -> Taken:
    """As much of everything for a stretch that is `factor` times as long, all of it estimated."""
    made = Taken(nodes=taken.nodes, devices=taken.devices)
    for name in ("ms", "device_ms", "node_unknown_ms", "device_unknown_ms"):
        setattr(made, name, round(getattr(taken, name) * factor))
    made.device_estimated_mj, made.node_estimated_mj = round(_device_mj(taken) * factor), round(_node_mj(taken) * factor)
    return made


def plus(into: Taken, more: Taken) -> None:
    """Sums, but for the counts of things, which are the most that were there at once."""
    nodes, devices = max(into.nodes, more.nodes), max(into.devices, more.devices)
    for name in FIELDS:
        if number := getattr(more, name):
            setattr(into, name, getattr(into, name) + number)
    into.nodes, into.devices = nodes, devices


# ---- Files ----


def objects(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that are objects; half a line, or one that is none, is left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(row := json.loads(line), dict):
                    found.append(row)
    return found


def until_of(path: Path, until: float | None) -> list[dict[str, Any]]:
    """Those with a time and a process."""
    said = [row for row in objects(path) if 0 <= (number_of(row, "time_s") or -1.0) < LATEST_S and isinstance(row.get("process"), str)]
    return [row for row in said if until is None or row["time_s"] <= until]


def one_object(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if isinstance(found := json.loads(path.read_bytes()), dict):
            return found
    return {}


def number_of(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST else None


def count_of(row: Mapping[str, Any], key: str) -> int | None:
    value = number_of(row, key)
    return int(value) if value is not None and value >= 0 else None


def times(value: float | None, factor: float | None) -> float | None:
    return None if value is None or factor is None else value * factor
