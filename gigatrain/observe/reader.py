"""A run as it is seen from outside: everything from its folder, by anybody who can read it, while it runs or years later. Free of torch.

`Reader.seen()` is the one reading: watch.py draws it and prometheus.py serves it, from rank 0's process too; so a look costs what is new since the last,
and memory does not grow with the run. Files may grow meanwhile, end in half a line, or be replaced by a resume; what the folder does not say is None, never
guessed.
"""

import contextlib
import importlib
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gigatrain import load
from gigatrain.errors import GigatrainError, RunError
from gigatrain.observe import beside, failed, logs
from gigatrain.observe.goodput import Session, goodput_of, number
from gigatrain.observe.legs import legs_of
from gigatrain.observe.tail import Tail, objects
from gigatrain.observe.told import Told
from gigatrain.planning.watts import Watts
from gigatrain.power.live import Live
from gigatrain.power.spans import one_object

WINDOWS = 120  # of losses that are kept for the line
QUIET_S = 120.0  # without news a run that has not ended is called silent; longer where its reports are further apart
STARTING_S = 1800.0  # the same before a process's first step: a corpus is built, a checkpoint read
KEPT_S = 15.0  # what ranks left is read again after so long, or at once where their folders changed
TRACED = 256  # ranks whose steps are looked at
ASKED_S = 20.0  # between two questions to the scheduler
SUSPECTED = ("spikes", "transient", "persistent", "rollbacks", "diverged")  # of metrics.jsonl, from observe/numerics.py


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
        self._metrics, self._history, self._energy = (
            Tail(run / name) for name in ("metrics.jsonl", "launch/history.jsonl", "energy.jsonl")
        )
        self._told = Told(run)
        self._power = Live()
        self._drawn_rows: deque[dict[str, Any]] = deque(maxlen=2 * WINDOWS)
        self._windows: deque[dict[str, Any]] = deque(maxlen=WINDOWS + 1)
        self._validation: dict[str, Any] = {}
        self._job: list[dict[str, Any]] = []
        self._tokens_s = [0.0, 0.0]
        self._scheduler: tuple[float, dict[str, Any] | None] = (-ASKED_S, None)
        self._power_by_leg: tuple[float, list[dict[str, Any]]] = (0.0, [])
        self._left: tuple[tuple[Any, ...], float, dict[str, Any]] = ((), 0.0, {})

    def seen(self) -> dict[str, Any]:
        """The run now, as JSON values: what `gigatrain watch --json` prints."""
        record = one_object(self.run / "run.json")
        self._read(record)
        now, plan = self.now(), one_object(self.run / "plan.json")
        summary = one_object(self.run / "summary.json")
        window = self._windows[-1] if self._windows else {}
        validation, last, sessions = self._validation, self._told.last, self._told.sessions.all
        news_s = self._news_s(now)
        steps = number(plan, "steps")
        step = number(window, "step")
        state = self._state(summary, news_s)
        speed, mean = number(window, "tokens_per_s"), self._tokens_s[0] / self._tokens_s[1] if self._tokens_s[1] else None
        goodput = goodput_of(sessions, now if state == "running" else None)
        mfu, why = self._mfu(plan, speed)
        attempt = logs.newest(self.run)
        left = self._words(attempt, state)
        slow, unknown = _slowest(self.run)
        return {
            "run": str(self.run),
            "id": record.get("id"),
            "name": plan.get("name") or record.get("name"),
            "site": plan.get("site"),
            "state": state,
            "why": last.get("why") if state in ("ended", "finished") else None,
            "news_s": news_s,
            "attempt": attempt,
            "ranks": number(plan, "ranks"),
            "step": step,
            "steps": steps,
            "tokens": number(window, "tokens"),
            "loss": number(window, "loss"),
            "accuracy": number(window, "accuracy"),
            "losses": [number(row, "loss") for row in list(self._windows)[-WINDOWS:]],
            "grad_norm": number(window, "grad_norm"),
            "lr": number(window, "lr"),
            "bad_steps": number(window, "bad_steps"),
            **{what: number(window, what) for what in SUSPECTED},
            "stragglers": _stragglers(self.run),
            "step_s": number(window, "step_s"),
            "val_loss": number(validation, "val_loss"),
            "val_step": number(validation, "step"),
            "tokens_per_s": speed,
            "tokens_per_s_mean": mean,
            "mfu": mfu,
            "mfu_why": why,
            "eta_s": _eta_s(sessions, step, steps, window) if state == "running" else None,
            "goodput": goodput,
            "restarts": _restarts(sessions, self._job),
            "legs": self._moved(record, now if state == "running" else None),
            "slowest_ranks": slow,
            "slowest_why": unknown,
            "checkpoint": self._checkpoint(now),
            "saving": self._saving(),
            **self._drawn(plan, summary, state),
            "job": {key: self._job[-1].get(key) for key in ("time", "event")} if self._job else None,
            "scheduler": self._asked() if state != "finished" else None,
            "drift": self._drift(plan, summary, goodput, slow, attempt),
        } | left

    def drift(self) -> list[dict[str, Any]] | None:
        """`seen()["drift"]` alone, and nothing is asked of a scheduler."""
        self._read(one_object(self.run / "run.json"))
        goodput, slow = goodput_of(self._told.sessions.all, None), _slowest(self.run)[0]
        return self._drift(one_object(self.run / "plan.json"), one_object(self.run / "summary.json"), goodput, slow, logs.newest(self.run))

    def _drift(
        self, plan: Mapping[str, Any], summary: Mapping[str, Any], goodput: Any, slow: list[dict[str, Any]], attempt: int | None
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
            list(self._windows), self._told.reports.values(), self._drawn_rows, beside.traced(self.run), watts,
            goodput=goodput, slowest=slowest_of(self.run, slow, attempt), peak_bytes=number(summary, "peak_bytes"),
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

    def _words(self, attempt: int | None, state: str) -> dict[str, Any]:
        """What ranks of an attempt left of failures and hangs: thousands of files, so they are read again only where there is reason to."""
        changed: list[int] = []
        if attempt is not None:
            folder = logs.folder_of(self.run, attempt)
            for path in (folder, folder / "errors"):
                with contextlib.suppress(OSError):
                    changed.append(path.stat().st_mtime_ns)
        key, now = (attempt, state, *changed), time.monotonic()
        if key != self._left[0] or now - self._left[1] >= KEPT_S:  # the mark at a log's end changes no folder
            found, hang = failed.failures(self.run, attempt), failed.hangs(self.run, attempt)
            self._left = (
                key,
                now,
                {
                    "failed_ranks": len(found),
                    "failure": failed.first_failure(self.run, attempt) if state in ("ended", "silent") and found else None,
                    "hung_ranks": len(hang),
                    "hang": failed.hung(self.run, attempt) if hang else None,
                },
            )
        return self._left[2]

    def _read(self, record: Mapping[str, Any]) -> None:
        """What is new in the run's files; `record`: its run.json."""
        for rows, afresh in self._metrics.parts():
            if afresh:
                self._windows.clear()
                self._validation, self._tokens_s = {}, [0.0, 0.0]
            for row in rows:
                self._window(row)
        for rows, afresh in self._energy.parts():
            if afresh:
                self._power = Live()
                self._drawn_rows.clear()
            self._power.add(rows)
            self._drawn_rows.extend(rows)
        for rows, afresh in self._history.parts():
            self._job = ([] if afresh else self._job) + [row for row in rows if isinstance(row.get("event"), str)]
        self._told.read(record)

    def _window(self, row: dict[str, Any]) -> None:
        if number(row, "step") is None:
            return
        if "val_loss" in row:
            self._validation = row
        elif "tokens" in row:
            self._windows.append(row)
            speed, step_s = number(row, "tokens_per_s"), number(row, "step_s")
            if speed and step_s:  # windows are of one length but for the last of a process: a mean over steps
                self._tokens_s[0] += speed * step_s
                self._tokens_s[1] += step_s

    def _state(self, summary: Mapping[str, Any], news_s: float | None) -> str:
        last = self._told.last
        if summary.get("wall_s") is not None:
            return "finished"
        if not last and not self._windows:
            return "not begun"
        if last.get("event") == "end":
            return "ended"
        reports = [row["time_s"] for row in self._told.recent if row["event"] == "report"]
        apart = max((after - before for before, after in pairwise(reports)), default=0.0)
        quiet_s = QUIET_S if self._told.stepping or not last else STARTING_S
        return "running" if news_s is not None and news_s < max(quiet_s, 5 * apart) else "silent"

    def _news_s(self, now: float) -> float | None:
        """Since the run last wrote anything that it writes often."""
        times = [self._told.last["time_s"]] if self._told.last else []
        for name in ("metrics.jsonl", "logs/progress.jsonl", "trace/rank-00000.jsonl"):
            with contextlib.suppress(OSError):
                times.append((self.run / name).stat().st_mtime)
        return round(max(0.0, now - max(times)), 1) if times else None

    def _checkpoint(self, now: float) -> dict[str, Any] | None:
        """The newest whole one, what saving in the background cost last, and why the newest try was none."""
        found, saved = [], self._told.saved or {}
        cost = {key: number(saved, key) for key in ("stall_s", "stall_share", "gbyte_s")}
        for path in (self.run / "checkpoints").glob("step-*/COMMITTED"):
            with contextlib.suppress(OSError, ValueError):
                found.append((int(path.parent.name.removeprefix("step-")), path.stat().st_mtime))
        if not found and self._told.not_saved is None:
            return None
        step, saved_s = max(found, default=(None, now))
        age_s = None if step is None else round(max(0.0, now - saved_s), 1)
        return {"step": step, "age_s": age_s, **cost, "not_saved": self._told.not_saved}

    def _moved(self, record: Mapping[str, Any], now: float | None) -> list[dict[str, Any]]:
        """The run's legs; where there are several also what each drew, which is read again when that has cost a fiftieth of the time since."""
        legs = legs_of(self.run, record, self._told.sessions, now)
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
        if (said := self._told.saves) is None:
            return None
        return {"every": number(said, "every"), "near_every": number(said, "near_every"), "words": str(said.get("words"))}

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
        flops, ranks = number(plan, "flops_per_token"), number(plan, "ranks")
        if speed is None or flops is None or not ranks:
            return None, "no window yet"
        name = one_object(self.run / "launch" / "site.json").get("accelerator")
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


def _restarts(sessions: list[Session], job: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each process after the first, from which step it went on, and why the one before it ended."""
    found = []
    for before, session in pairwise(sessions):
        attempt, end = session.first.get("attempt"), before.last
        why = str(end.get("why")) if end["event"] == "end" else "left no word: killed, or its node was lost"
        judged = [row for row in job if row.get("event") == "judged" and row.get("attempt") == before.first.get("attempt")]
        if judged and isinstance(judged[-1].get("why"), str) and before.first.get("attempt") != attempt:
            why = judged[-1]["why"]  # by the job's script, which saw the ranks end
        step = session.began["step"] if session.began else None
        found.append({"time_s": session.first["time_s"], "attempt": attempt, "step": step, "why": why})
    return found


def _eta_s(sessions: list[Session], step: float | None, steps: float | None, window: Mapping[str, Any]) -> float | None:
    """Steps that are left, at what a step has taken in this process, validations and saves included."""
    if step is None or steps is None:
        return None
    per, newest = number(window, "step_s"), sessions[-1] if sessions else None
    if newest is not None and newest.began is not None and newest.stepped is not None:
        began, done = newest.began, newest.stepped
        per = (done["time_s"] - began["time_s"]) / (done["step"] - began["step"])
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
                rows = list(objects(file.read(16384)))
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


def slowest_of(run: Path, slow: list[dict[str, Any]], attempt: int | None) -> dict[str, Any] | None:
    """The slowest rank that records, with its node; None where only one does."""
    return {**slow[0], "node": failed.node_of(run, attempt, slow[0]["rank"])} if slow else None


def _stragglers(run: Path) -> list[dict[str, Any]]:
    """Ranks that observe/stragglers.py has named, as of the last report that changed them."""
    found = one_object(run / "stragglers.json").get("ranks")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
