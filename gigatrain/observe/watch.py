"""A run as it is seen from outside: everything from its folder, by anybody who can read it, while it runs or years later. Free of torch.

`Reader.seen()` is the one reading: `gigatrain watch` draws it and observe/prometheus.py serves it. Files may grow meanwhile, end in half a line, or be
replaced by a resume; what the folder does not say is None, never guessed.
"""

import contextlib
import datetime
import importlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gigatrain import load
from gigatrain.errors import GigatrainError, RunError
from gigatrain.observe import beside, logs
from gigatrain.observe.goodput import CLASSES, classes
from gigatrain.observe.goodput import began_of as _began
from gigatrain.observe.goodput import goodput_of as _goodput
from gigatrain.observe.goodput import number as _number
from gigatrain.observe.goodput import sessions_of as _sessions
from gigatrain.observe.legs import NAMED, leg_words, legs_of, si, span
from gigatrain.planning.watts import Watts
from gigatrain.power.live import Live
from gigatrain.power.reading import BOUNDARIES

__all__ = ["CLASSES", "Reader", "Tail", "classes", "lines", "si", "span", "watch"]

if TYPE_CHECKING:
    from rich.console import Group

WINDOWS = 120  # of losses that are kept for the line
QUIET_S = 120.0  # without news a run that has not ended is called silent; longer where its reports are further apart
STARTING_S = 1800.0  # the same before a process's first step: a corpus is built, a checkpoint read
KEPT_S = 15.0  # what ranks left is read again after so long, or at once where their folders changed
TRACED = 256  # ranks whose steps are looked at
SPARKS = "▁▂▃▄▅▆▇█"
SHOWN = 12  # lines of a failure
ASKED_S = 20.0  # between two questions to the scheduler


SUSPICIONS = {  # of metrics.jsonl, from observe/numerics.py
    "spikes": "refused updates of a finite loss and norm",
    "transient": "steps that gave other numbers when they were made again: faults that passed",
    "persistent": "steps of which ranks compute different numbers: a fault that stays",
    "rollbacks": "times back to a checkpoint, and past the samples that followed",
    "diverged": "times copies of the state were not equal",
}


class Tail:
    """The whole lines of a JSONL file, read on where the last read ended; from its start if the file was replaced or cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place: tuple[int, int] | None = None  # device and inode
        self._offset = 0

    def rows(self) -> tuple[list[dict[str, Any]], bool]:
        """New objects, and whether those given before are void. A line that is no JSON object is left out, and half a line waits."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                place = (status.st_dev, status.st_ino)
                afresh = place != self._place or status.st_size < self._offset
                if afresh:
                    self._place, self._offset = place, 0
                file.seek(self._offset)
                data = file.read()
        except OSError:
            afresh, self._place, self._offset = self._place is not None, None, 0
            return [], afresh
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        return list(_objects(data[:whole])), afresh


def _objects(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(row := json.loads(line), dict):
                yield row


class Reader:
    """Reads a run's folder again and again, each time only what is new."""

    def __init__(self, run: Path, now: Callable[[], float] = time.time) -> None:
        """Raises RunError where there is no folder, or one that is not a run's."""
        if not run.is_dir():
            raise RunError(f"{run} is no folder; a run's is what `gigatrain train` prints last, or --run names")
        known = ("run.json", "logs", "launch", "metrics.jsonl", ".lock")
        if any(run.iterdir()) and not any((run / name).exists() for name in known):
            raise RunError(f"{run} is not a run folder: it has none of {', '.join(known[:-1])}")
        run = Path(os.path.abspath(run))  # `watch .` is of a run with a name, and a link keeps its own
        self.run, self.now = run, now
        self._metrics, self._progress, self._history, self._energy = (
            Tail(run / name) for name in ("metrics.jsonl", "logs/progress.jsonl", "launch/history.jsonl", "energy.jsonl")
        )
        self._power = Live()
        self._drawn_rows: deque[dict[str, Any]] = deque(maxlen=2 * WINDOWS)
        self._windows: list[dict[str, Any]] = []
        self._validations: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []
        self._job: list[dict[str, Any]] = []
        self._tokens_s = [0.0, 0.0]
        self._scheduler: tuple[float, dict[str, Any] | None] = (-ASKED_S, None)
        self._power_by_leg: tuple[float, list[dict[str, Any]]] = (0.0, [])
        self._left: tuple[tuple[Any, ...], float, dict[str, Any]] = ((), 0.0, {})

    def seen(self) -> dict[str, Any]:
        """The run now, as JSON values: what `gigatrain watch --json` prints."""
        self._read()
        now, plan, record = self.now(), _json(self.run / "plan.json"), _json(self.run / "run.json")
        summary = _json(self.run / "summary.json")
        window = self._windows[-1] if self._windows else {}
        validation = self._validations[-1] if self._validations else {}
        events = _sessions(self._events)
        last = self._events[-1] if self._events else {}
        news_s = self._news_s(now)
        steps = _number(plan, "steps")
        step = _number(window, "step")
        state = self._state(summary, last, news_s)
        speed, mean = _number(window, "tokens_per_s"), self._tokens_s[0] / self._tokens_s[1] if self._tokens_s[1] else None
        goodput = _goodput(events, now if state == "running" else None)
        mfu, why = self._mfu(plan, speed)
        number = logs.newest(self.run)
        left = self._words(number, state)
        slow, unknown = _slowest(self.run)
        return {
            "run": str(self.run),
            "id": record.get("id"),
            "name": plan.get("name") or record.get("name"),
            "site": plan.get("site"),
            "state": state,
            "why": last.get("why") if state in ("ended", "finished") else None,
            "news_s": news_s,
            "attempt": number,
            "ranks": _number(plan, "ranks"),
            "step": step,
            "steps": steps,
            "tokens": _number(window, "tokens"),
            "loss": _number(window, "loss"),
            "accuracy": _number(window, "accuracy"),
            "losses": [_number(row, "loss") for row in self._windows[-WINDOWS:]],
            "grad_norm": _number(window, "grad_norm"),
            "lr": _number(window, "lr"),
            "bad_steps": _number(window, "bad_steps"),
            **{what: _number(window, what) for what in SUSPICIONS},
            "stragglers": _stragglers(self.run),
            "step_s": _number(window, "step_s"),
            "val_loss": _number(validation, "val_loss"),
            "val_step": _number(validation, "step"),
            "tokens_per_s": speed,
            "tokens_per_s_mean": mean,
            "mfu": mfu,
            "mfu_why": why,
            "eta_s": _eta_s(events, step, steps, window) if state == "running" else None,
            "goodput": goodput,
            "restarts": _restarts(events, self._job),
            "legs": self._moved(record, events, now if state == "running" else None),
            "slowest_ranks": slow,
            "slowest_why": unknown,
            "checkpoint": self._checkpoint(now),
            "saving": self._saving(),
            **self._drawn(plan, summary, state),
            "job": {key: self._job[-1].get(key) for key in ("time", "event")} if self._job else None,
            "scheduler": self._asked() if state != "finished" else None,
            "drift": self._drift(plan, summary, goodput, slow, number),
        } | left

    def drift(self) -> list[dict[str, Any]] | None:
        """`seen()["drift"]` alone, and nothing is asked of a scheduler."""
        self._read()
        goodput, slow = _goodput(_sessions(self._events), None), _slowest(self.run)[0]
        return self._drift(_json(self.run / "plan.json"), _json(self.run / "summary.json"), goodput, slow, logs.newest(self.run))

    def _drift(
        self, plan: Mapping[str, Any], summary: Mapping[str, Any], goodput: Any, slow: list[dict[str, Any]], number: int | None
    ) -> list[dict[str, Any]] | None:
        """What lies beyond what the plan expected, in the newest windows; None of a plan that expects nothing."""
        expected = beside.expected_of(plan)
        if not beside.judges(expected):
            return None
        try:
            watts = Watts.model_validate(plan.get("watts") or {})
        except ValidationError:
            watts = None
        found = beside.windows(
            self._windows, self._events, self._drawn_rows, beside.traced(self.run), watts,
            goodput=goodput, slowest=slowest_of(self.run, slow, number), peak_bytes=_number(summary, "peak_bytes"),
        )  # fmt: skip
        return [beside.said(one) for one in beside.drifts(expected, found)]

    def _drawn(self, plan: Mapping[str, Any], summary: Mapping[str, Any], state: str) -> dict[str, Any]:
        """Watts and what is got for them. A run that is over draws nothing; what it took to get there is in summary.json."""
        told = self._power.seen(plan.get("watts") if isinstance(plan.get("watts"), dict) else None)
        watts, why = told["watts"], told["why"]
        asked = plan.get("power")
        if not self._power.rows:
            why = "not measured: power.measure is false" if isinstance(asked, dict) and asked.get("measure") is False else "not measured"
        elif watts is None:
            why = f"not measured: {why}"
        elif state in ("finished", "ended"):
            watts, why = None, "it has ended"
        energy = summary.get("energy")
        headline = energy.get("headline") if isinstance(energy, dict) else None
        return {
            "power_watts": watts,
            "power_why": why,
            "power_boundary": told["boundary"],
            "power_provenance": told["provenance"],
            "power_measured_share": told["measured_share"],
            "power_capped_share": told["capped_share"],
            "power_thermal_share": told["thermal_share"],
            "power_ramp_watts": told["ramp_watts"],
            "power_orders": told["orders"],
            "tokens_per_s_mw": told["tokens_per_s_mw"],
            "joules_per_token": told["joules_per_token"],
            "energy_joules": told["joules"],
            "energy": headline if isinstance(headline, dict) else None,
        }

    def _words(self, number: int | None, state: str) -> dict[str, Any]:
        """What ranks of an attempt left of failures and hangs: thousands of files, so they are read again only where there is reason to."""
        changed: list[int] = []
        if number is not None:
            folder = logs.folder_of(self.run, number)
            for path in (folder, folder / "errors"):
                with contextlib.suppress(OSError):
                    changed.append(path.stat().st_mtime_ns)
        key, now = (number, state, *changed), time.monotonic()
        if key != self._left[0] or now - self._left[1] >= KEPT_S:  # the mark at a log's end changes no folder
            found, hang = logs.failures(self.run, number), logs.hangs(self.run, number)
            self._left = (
                key,
                now,
                {
                    "failed_ranks": len(found),
                    "failure": logs.first_failure(self.run, number) if state in ("ended", "silent") and found else None,
                    "hung_ranks": len(hang),
                    "hang": logs.hung(self.run, number) if hang else None,
                },
            )
        return self._left[2]

    def _read(self) -> None:
        rows, afresh = self._metrics.rows()
        if afresh:
            self._windows, self._validations, self._tokens_s = [], [], [0.0, 0.0]
        for row in rows:
            if _number(row, "step") is None:
                continue
            if "val_loss" in row:
                self._validations = [row]
            elif "tokens" in row:
                self._windows = [*self._windows[-WINDOWS:], row]
                speed, step_s = _number(row, "tokens_per_s"), _number(row, "step_s")
                if speed and step_s:  # windows are of one length but for the last of a process: a mean over steps
                    self._tokens_s[0] += speed * step_s
                    self._tokens_s[1] += step_s
        rows, afresh = self._energy.rows()
        if afresh:
            self._power = Live()
            self._drawn_rows.clear()
        self._power.add(rows)
        self._drawn_rows.extend(rows)
        for tail, name in ((self._progress, "_events"), (self._history, "_job")):
            rows, afresh = tail.rows()
            kept = [row for row in rows if isinstance(row.get("event"), str) and (name == "_job" or _timed(row))]
            setattr(self, name, kept if afresh else getattr(self, name) + kept)

    def _state(self, summary: Mapping[str, Any], last: Mapping[str, Any], news_s: float | None) -> str:
        if summary.get("wall_s") is not None:
            return "finished"
        if not self._events and not self._windows:
            return "not begun"
        if last.get("event") == "end":
            return "ended"
        reports = [row["time_s"] for row in self._events[-20:] if row["event"] == "report"]
        apart = max((after - before for before, after in pairwise(reports)), default=0.0)
        session = [row for row in self._events if row.get("process") == last.get("process")]
        quiet_s = QUIET_S if _began(session) or not session else STARTING_S
        return "running" if news_s is not None and news_s < max(quiet_s, 5 * apart) else "silent"

    def _news_s(self, now: float) -> float | None:
        """Since the run last wrote anything that it writes often."""
        times = [self._events[-1]["time_s"]] if self._events else []
        for name in ("metrics.jsonl", "logs/progress.jsonl", "trace/rank-00000.jsonl"):
            with contextlib.suppress(OSError):
                times.append((self.run / name).stat().st_mtime)
        return round(max(0.0, now - max(times)), 1) if times else None

    def _checkpoint(self, now: float) -> dict[str, Any] | None:
        """The newest whole one, what saving in the background cost last, and why the newest try was none."""
        found, tries = [], [row for row in self._events if row["event"] in ("saved", "not saved")]
        costs = [row for row in tries if row["event"] == "saved"]
        cost = {key: _number(costs[-1], key) if costs else None for key in ("stall_s", "stall_share", "gbyte_s")}
        why = str(tries[-1].get("why")) if tries and tries[-1]["event"] == "not saved" else None
        for path in (self.run / "checkpoints").glob("step-*/COMMITTED"):
            with contextlib.suppress(OSError, ValueError):
                found.append((int(path.parent.name.removeprefix("step-")), path.stat().st_mtime))
        return {"step": max(found)[0], "age_s": round(max(0.0, now - max(found)[1]), 1), **cost, "not_saved": why} if found else None

    def _moved(self, record: Mapping[str, Any], events: list[list[dict[str, Any]]], now: float | None) -> list[dict[str, Any]]:
        """The run's legs; where there are several also what each drew, which is read again when that has cost a fiftieth of the time since."""
        legs = legs_of(self.run, record, events, now)
        if len(legs) < 2:
            return legs
        begin = time.monotonic()
        if begin >= self._power_by_leg[0]:
            told: list[dict[str, Any]] = []
            with contextlib.suppress(GigatrainError):
                told = importlib.import_module("gigatrain.power.account").account(self.run)["legs"]
            spent_s = time.monotonic() - begin
            self._power_by_leg = (begin + max(KEPT_S, 50 * spent_s), told)
        return [leg | {"power": drew} for leg, drew in zip(legs, [*self._power_by_leg[1], *[None] * len(legs)], strict=False)]

    def _saving(self) -> dict[str, Any] | None:
        """How often the newest process saves and why, where that was decided by what a save costs; None where a recipe says it."""
        said = next(
            (row for row in reversed(self._events) if row["event"] == "saves" and row.get("process") == self._events[-1].get("process")),
            None,
        )
        if said is None:
            return None
        return {"every": _number(said, "every"), "near_every": _number(said, "near_every"), "words": str(said.get("words"))}

    def _asked(self) -> dict[str, Any] | None:
        """What the scheduler says of the run's job, asked seldom; None of a run that is no job."""
        asked_s, said = self._scheduler
        if not (self.run / "launch" / "job.json").is_file() or time.monotonic() - asked_s < ASKED_S:
            return said
        try:
            states, notes = importlib.import_module("gigatrain.launching.follow").ps(self.run)
            said = {"job": states[0].job, "state": states[0].state, "reason": states[0].reason or "; ".join(notes)} if states else None
        except (ImportError, AttributeError, OSError, GigatrainError) as failure:
            said = {"job": None, "state": "unknown", "reason": str(failure)}
        self._scheduler = (time.monotonic(), said)
        return said

    def _mfu(self, plan: Mapping[str, Any], speed: float | None) -> tuple[float | None, str]:
        """Model FLOP/s over the ranks' dense bf16 rate, whatever precision they compute in."""
        flops, ranks = _number(plan, "flops_per_token"), _number(plan, "ranks")
        if speed is None or flops is None or not ranks:
            return None, "no window yet"
        name = _json(self.run / "launch" / "site.json").get("accelerator")
        if (
            name is None and plan.get("site") in load.sites()
        ):  # a run that nobody launched knows its site by name; one of a file is not known here
            with contextlib.suppress(GigatrainError):
                name = load.site(str(plan["site"])).accelerator
        if plan.get("device") != "cuda" or not isinstance(name, str):
            return None, "the accelerator's rate is unknown"
        try:
            chip = importlib.import_module("gigatrain.planning.hardware").CHIPS[name]
            rate = chip.tflops("bf16").value
        except (ImportError, AttributeError, KeyError):
            rate = None
        if not rate:
            return None, f"the rate of {name} is unknown"
        return flops * speed / (ranks * rate * 1e12 / getattr(chip, "devices", 1)), ""


def _restarts(sessions: list[list[dict[str, Any]]], job: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each process after the first, from which step it went on, and why the one before it ended."""
    found = []
    for before, session in pairwise(sessions):
        began, end = _began(session), before[-1]
        why = str(end.get("why")) if end["event"] == "end" else "left no word: killed, or its node was lost"
        judged = [row for row in job if row.get("event") == "judged" and row.get("attempt") == before[0].get("attempt")]
        if judged and isinstance(judged[-1].get("why"), str) and before[0].get("attempt") != session[0].get("attempt"):
            why = judged[-1]["why"]  # by the job's script, which saw the ranks end
        found.append(
            {"time_s": session[0]["time_s"], "attempt": session[0].get("attempt"), "step": began["step"] if began else None, "why": why}
        )
    return found


def _eta_s(sessions: list[list[dict[str, Any]]], step: float | None, steps: float | None, window: Mapping[str, Any]) -> float | None:
    """Steps that are left, at what a step has taken in this process, validations and saves included."""
    if step is None or steps is None:
        return None
    per = _number(window, "step_s")
    began = _began(sessions[-1]) if sessions else None
    if began is not None:
        done = [event for event in sessions[-1] if event["event"] == "report" and (_number(event, "step") or 0) > began["step"]]
        if done:
            per = (done[-1]["time_s"] - began["time_s"]) / (done[-1]["step"] - began["step"])
    return None if per is None else round((steps - step) * per, 1)


def _slowest(run: Path) -> tuple[list[dict[str, Any]], str]:
    """Ranks by their own seconds of a step (data and forward, where they do not wait for others), slowest first, over the last steps they recorded."""
    paths = sorted((run / "trace").glob("rank-*.jsonl"))
    if len(paths) < 2:
        return [], "not known: only rank 0 records its steps (profile.ranks names more)" if paths else "not known: no trace"
    found = []
    for path in paths[:TRACED]:
        with contextlib.suppress(OSError, ValueError):
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - 16384))
                rows = list(_objects(file.read(16384)))
            own = sorted(
                sum(row["phases"].get(phase, 0.0) for phase in ("data", "forward")) for row in rows if isinstance(row.get("phases"), dict)
            )
            if own:
                found.append({"rank": int(path.stem.removeprefix("rank-")), "own_s": own[len(own) // 2]})
    usual = sorted(row["own_s"] for row in found)
    for row in found:
        row["median_s"] = usual[(len(usual) - 1) // 2]  # of two the faster: the other is the slow one
    some = f"only the first {TRACED} of {len(paths):,} ranks that record are looked at" if len(paths) > TRACED else ""
    return sorted(found, key=lambda row: -row["own_s"])[:5], some


def slowest_of(run: Path, slow: list[dict[str, Any]], number: int | None) -> dict[str, Any] | None:
    """The slowest rank that records, with its node; None where only one does."""
    return {**slow[0], "node": logs.node_of(run, number, slow[0]["rank"])} if slow else None


def _stragglers(run: Path) -> list[dict[str, Any]]:
    """Ranks that observe/stragglers.py has named, as of the last report that changed them."""
    found = _json(run / "stragglers.json").get("ranks")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _timed(row: Mapping[str, Any]) -> bool:
    """Whether an event says when, and of which process."""
    return _number(row, "time_s") is not None and isinstance(row.get("process"), (str, int, type(None)))


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if isinstance(found := json.loads(path.read_text(encoding="utf-8")), dict):
            return found
    return {}


def _utc(time_s: float) -> str:
    with contextlib.suppress(OverflowError, ValueError, OSError):  # a damaged one
        return datetime.datetime.fromtimestamp(time_s, datetime.UTC).isoformat(timespec="seconds")
    return "at an unknown time"


def spark(values: list[Any], width: int = 48) -> str:
    """The last `width` numbers as blocks; what is no number is a blank."""
    shown = values[-width:]
    numbers = [value for value in shown if isinstance(value, (int, float))]
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] if isinstance(value, (int, float)) else " " for value in shown)


def lines(seen: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What there is to say, each as a title, a text and a style."""
    state = {"silent": f"no news for {span(seen['news_s'])}", "ended": f"ended: {seen['why']}", "finished": "finished"}.get(
        seen["state"], seen["state"]
    )
    style = {"running": "green", "finished": "green", "silent": "bold red", "ended": "bold yellow"}.get(seen["state"], "yellow")
    ranks = f", {seen['ranks']:,} rank{'s' * (seen['ranks'] > 1)}" if seen["ranks"] else ""
    found = [(seen["name"] or "run", f"{state}{ranks}; {seen['run']}", style)]

    def add(title: str, text: str, style: str = "") -> None:
        found.append((title, text, style))

    if seen["hang"]:
        add("HANG", seen["hang"], "bold red")
    if seen["failure"]:
        told = seen["failure"].splitlines()  # a long traceback is in the log, whose name is its last line
        add("FAILED", "\n".join(told if len(told) <= SHOWN else [told[0], "  ...", *told[2 - SHOWN :]]), "bold red")
    if seen["job"]:
        add("job", f"{seen['job']['event']} {seen['job']['time']}")
    if seen["scheduler"]:
        asked = seen["scheduler"]
        add("scheduler", f"{asked['job'] or 'job'} {asked['state']}" + (f": {asked['reason']}" if asked["reason"] else ""))
    if seen["step"] is not None:
        share = f" ({seen['step'] / seen['steps']:.1%})" if seen["steps"] else ""
        eta = f", {span(seen['eta_s'])} to go" if seen["eta_s"] is not None else ""
        add("step", f"{seen['step']:,} of {seen['steps'] or 0:,}{share}, {seen['tokens'] or 0:,} tokens{eta}")
        loss = "not finite" if seen["loss"] is None else f"{seen['loss']:.4f}"
        right = "" if seen["accuracy"] is None else f", {seen['accuracy']:.1%} of pairs in the right order"
        add("loss", f"{loss}  {spark(seen['losses'])}{right}")
    if seen["val_loss"] is not None:
        add("validation", f"{seen['val_loss']:.4f} at step {seen['val_step']:,}")
    if seen["bad_steps"]:
        spikes = f", {seen['spikes']:,} of them spikes" if seen["spikes"] else ""
        add("refused", f"{seen['bad_steps']:,} updates whose numbers cannot be right{spikes}", "yellow")
    for what, words in SUSPICIONS.items():
        if seen[what] and what != "spikes":
            add(what, f"{seen[what]:,} {words}", "yellow")
    for one in seen["stragglers"]:
        rank, host, times, section = (logs.printable(str(one.get(key, "?"))) for key in ("rank", "host", "times", "section"))
        add("SLOW", f"rank {rank} on {host}: {times} times the median for {section}", "yellow")
    if seen["tokens_per_s"] is not None:
        mean = f", {seen['tokens_per_s_mean']:,.0f} in the mean" if seen["tokens_per_s_mean"] else ""
        add("tokens/s", f"{seen['tokens_per_s']:,.0f} now{mean}")
        add("MFU", f"{seen['mfu']:.1%} of dense bf16" if seen["mfu"] is not None else f"unknown: {seen['mfu_why']}")
    for one in seen["drift"] or ():
        add("DRIFT", one["words"], "bold yellow")
    if seen["drift"] == []:
        add("plan", "no judged window lies beyond what it expects")
    if seen["goodput"]:
        parts = ", ".join(
            f"{what} {span(spent)}" for what, spent in seen["goodput"]["seconds"].items() if spent >= 0.5 or what == "training"
        )
        share = seen["goodput"]["share"]
        add("goodput", f"{'unknown' if share is None else f'{share:.1%}'} of {span(seen['goodput']['wall_s'])}: {parts}")
        for one in seen["restarts"][-4:]:
            when = _utc(one["time_s"])
            begun = "before its first step" if one["step"] is None else f"at step {one['step']:,}"
            add("restart", f"{when} attempt {one['attempt']}, {begun}; before it: {one['why']}")
        if len(seen["restarts"]) > 4:
            add("restarts", f"{len(seen['restarts'])} in all")
        some = f"; {seen['slowest_why']}" if seen["slowest_why"] else ""
        shown = ", ".join(f"rank {row['rank']} {row['own_s'] * 1e3:.1f} ms" for row in seen["slowest_ranks"])
        if (seen["ranks"] or 2) > 1:
            add("slowest", f"{shown} of data and forward{some}" if shown else seen["slowest_why"])
    for one in seen["legs"][-4:] if len(seen["legs"]) > 1 else ():
        add(f"leg {one['number']}", leg_words(one))
    if seen["checkpoint"]:
        newest = seen["checkpoint"]
        cost = (
            f"; training stood {newest['stall_s']:.3g} s for the last, {newest['stall_share']:.2%}"
            if newest["stall_share"] is not None
            else ""
        )
        add("checkpoint", f"step {newest['step']:,}, {span(newest['age_s'])} ago{cost}")
        if newest["not_saved"]:
            add("NOT SAVED", newest["not_saved"], "bold yellow")
    if seen["saving"]:
        add("saves", seen["saving"]["words"])
    for title, text in _power_lines(seen):
        add(title, text)
    if seen["failed_ranks"] and not seen["failure"]:
        add("errors", f"{seen['failed_ranks']} ranks left one in {seen['run']}/logs", "yellow")
    return [(logs.printable(title), logs.printable(text), style) for title, text, style in found]


def _power_lines(seen: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Watts at each boundary that is known, what is got for them at the widest, and why it is not more."""
    watts, name = seen["power_watts"], seen["power_boundary"]
    if watts is None:
        yield "power", seen["power_why"]
    else:
        known = ", ".join(f"{NAMED.get(one, one)} {si(watts[one])}W" for one in BOUNDARIES if watts[one] is not None)
        capped = (
            f"; accelerators at their limit {seen['power_capped_share']:.0%} of the time".replace("%", " %")
            if seen["power_capped_share"]
            else ""
        )
        yield "power", known + capped + (f"; wider: {seen['power_why']}" if seen["power_why"] else "")
        yield "provenance", seen["power_provenance"]
        if seen["power_ramp_watts"] is not None:
            yield "ramp", f"{si(seen['power_ramp_watts'])}W in ten seconds, the most in the last hour"
    if name is not None and seen["tokens_per_s_mw"][name] is not None:
        cost = seen["joules_per_token"][name]
        each = f", {si(cost)}J a token" if cost is not None else ""
        yield "efficiency", f"{seen['tokens_per_s_mw'][name]:,.0f} tokens/s/MW at the {NAMED.get(name, name)}{each}, over the last window"
    if seen["power_orders"]:  # most of all where the draw is not known: then a budget cannot be kept
        yield "orders", seen["power_orders"]
    one = seen["energy"]
    if one and _number(one, "tokens_per_s_mw") is not None:
        name, joules = str(one.get("boundary")), _number(one, "joules") or 0.0
        yield "energy", f"{one['tokens_per_s_mw']:,.0f} tokens/s/MW at the {NAMED.get(name, name)} over the whole run, {si(joules)}J"


def drawn(seen: Mapping[str, Any]) -> "Group":
    """`lines` for a terminal."""
    from rich.console import Group
    from rich.text import Text

    return Group(*(Text.assemble((led(title), "bold"), (text, style)) for title, text, style in lines(seen)))


def led(title: str) -> str:
    """What stands before a line's text: the title, and at least one space, since a run's name may be of any length."""
    return f"{title:<10} "


def watch(run: Path, *, once: bool = False, as_json: bool = False, every_s: float = 1.0) -> None:
    """Shows the run in the terminal until Ctrl-C or its end; `once`, and where there is no terminal, shows it once."""
    from rich.console import Console
    from rich.live import Live

    reader, console = Reader(run), Console(highlight=False)
    seen = reader.seen()
    if as_json:
        print(json.dumps(seen, indent=1))
        return
    if once or not console.is_terminal:
        for title, text, _ in lines(seen):
            print(led(title) + text)
        return
    with Live(drawn(seen), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while seen["state"] not in ("finished",):
            time.sleep(every_s)
            seen = reader.seen()
            live.update(drawn(seen), refresh=True)
