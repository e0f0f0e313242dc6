"""What became of runs, and `gigatrain ps | logs | cancel | requeue`: from their folders, and from whoever runs them. Free of torch.

A job is touched only if it is this run's: its id stands in the run's history, and the scheduler itself says that its output goes into the run folder.
"""

import json
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gigatrain.errors import GigatrainError, RunError
from gigatrain.launching import hosts, kubernetes, restart, slurm, submit
from gigatrain.launching import job as jobs
from gigatrain.launching.job import Job

LIVE = ("queued", "requeued", "running", "saving")
_TAIL_BYTES = 1 << 20  # of a log that is shown, not followed
_POLL_S = 0.3


@dataclass
class State:
    """A run in one line. `state` is queued, requeued, running, saving, finished, failed, cancelled, left, dead or unknown; `reason` says why."""

    run: str
    name: str
    site: str | None = None
    job: str | None = None
    state: str = "unknown"
    reason: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    age_s: float | None = None  # since the newest news: a window, a checkpoint, an event of the job
    attempts: int = 0

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Seen:
    """One run folder as it lies there, before anybody is asked."""

    folder: Path
    job: Job | None
    events: list[dict[str, Any]]
    state: State
    ids: list[str] = field(default_factory=list)


def ps(folder: Path) -> tuple[list[State], list[str]]:
    """Every run in a folder (or the one run that it is), newest news first, and notes on what could not be asked. One squeue for all of them."""
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder; name the one that holds the run folders, or start a run: gigatrain train quickstart")
    folders = [folder] if _is_run(folder) else sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path))
    seen = [_seen(run) for path in folders for run in runs(path)]
    notes: list[str] = []
    _ask_slurm([one for one in seen if one.state.state == "unknown" and _kind(one) == "slurm"], notes)
    for one in seen:
        if one.state.state == "unknown" and _kind(one) != "slurm":
            _ask(one, notes)
    return sorted((one.state for one in seen), key=lambda state: state.age_s if state.age_s is not None else float("inf")), list(
        dict.fromkeys(notes)
    )


def runs(folder: Path) -> list[Path]:
    """The runs of a run folder: itself, or those of the sweep that it is."""
    try:
        made = jobs.load(folder) if (folder / "launch" / "job.json").is_file() else None
    except GigatrainError:  # it is shown, with what is wrong with it
        made = None
    return [folder / f"{made.name}-{index}" for index in range(made.sweep)] if made and made.sweep else [folder]


def first(folder: Path) -> tuple[Path, str]:
    """The run to show where one can be shown, and a hint: of a sweep the first that has printed something."""
    found = runs(folder)
    if found == [folder]:
        return folder, ""
    chosen = next((run for run in found if any((run / "logs").glob("attempt-*/*.log"))), found[0])
    return chosen, f"{folder} is a sweep of {len(found)} runs, this is {chosen.name}; the others: gigatrain ps {folder}"


def lines(states: Sequence[State]) -> list[str]:
    """A table for people."""
    rows = [("RUN", "SITE", "JOB", "STATE", "STEP", "LOSS", "NEWS", "")]
    for one in states:
        step = "-" if one.step is None else f"{one.step:,}" + (f"/{one.steps:,}" if one.steps else "")
        loss = "-" if one.loss is None else f"{one.loss:.3f}"
        rows.append((one.run, one.site or "-", one.job or "-", one.state, step, loss, _age(one.age_s), one.reason.split("\n")[0][:100]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]


def cancel(run: Path, *, now: bool = False) -> dict[str, Any]:
    """End a run's job: it saves and leaves, or with `now` it is ended as it stands. Returns what was done.

    Raises RunError where there is no job of this run to end, and where a job with its id is another's.
    """
    run = Path(os.path.realpath(run))
    if runs(run) != [run]:
        return _cancel_sweep(run, now)
    made, state = _launched(run), _one(run)
    if state.state not in LIVE:
        raise RunError(f"{run} has no job to cancel: it is {state.state}{f' ({state.reason})' * bool(state.reason)}")
    kind = made.site.scheduler.kind
    done: dict[str, Any] = {"run": str(run), "jobs": [], "how": "at once" if now else "saves and leaves"}
    if kind == "slurm":
        queued = _ours([run], slurm.queued(*_ids(jobs.history(run))))
        jobs.record(run, "cancelled", now=now or None)  # first: the job's script asks for it once its ranks have ended
        done["jobs"] = _end(queued, now)
    elif kind == "kubernetes":
        jobs.record(run, "cancelled", now=now or None)
        kubernetes.delete(made, now=now)
        done["jobs"].append(kubernetes.name(made))
    else:
        jobs.record(run, "cancelled", now=now or None)
        hosts.tell(run, signal.SIGINT if now else signal.SIGUSR1)
        done["jobs"].append(state.job)
    return done


def _cancel_sweep(sweep: Path, now: bool) -> dict[str, Any]:
    """End the jobs of every run of a sweep that has one; each is checked before any is touched."""
    states, notes = ps(sweep)
    live = [Path(state.run) for state in states if state.state in LIVE]
    if unknown := [state for state in states if state.state == "unknown"]:
        raise RunError(f"what became of {unknown[0].run} is unknown: {'; '.join(notes) or unknown[0].reason}")
    if not live:
        counts = Counter(state.state for state in states)
        said = ", ".join(f"{count} {state}" for state, count in counts.items())
        raise RunError(f"{sweep} has no job to cancel: of its runs are {said}")
    ids = [number for run in live for number in _ids(jobs.history(run))]
    queued = _ours(live, slurm.queued(*ids))
    for run in live:
        jobs.record(run, "cancelled", now=now or None)
    return {"run": str(sweep), "jobs": _end(queued, now), "how": "at once" if now else "saves and leaves"}


def _end(queued: Sequence[slurm.Queued], now: bool) -> list[str]:
    for one in reversed(queued):  # the links of a chain from its end, so that none begins
        if one.state in slurm.WAITS or now:
            slurm.cancel(one.id)
        else:
            slurm.cancel(one.id, signal="USR1", batch=True)
    return [one.id for one in reversed(queued)]


def requeue(run: Path) -> dict[str, Any]:
    """Start a run's job again, from its newest checkpoint: through the queue if its job is there (it saves first), else as a new job.

    Raises RunError where the run is finished, or its job waits already.
    """
    run = Path(os.path.realpath(run))
    made, state = _launched(run), _one(run)
    kind = made.site.scheduler.kind
    if state.state == "finished":
        raise RunError(f"{run} is finished: nothing is left to do")
    if state.state in ("queued", "requeued", "saving"):
        raise RunError(f"job {state.job} of {run} is {state.state} already{f' ({state.reason})' * bool(state.reason)}")
    if state.state == "running":
        if kind == "slurm" and made.site.scheduler.requeue and made.chain == 1:
            (one,) = _ours([run], [one for one in slurm.queued(*_ids(jobs.history(run))) if one.state in slurm.RUNS])[:1] or (None,)
            if one is not None:
                slurm.cancel(one.id, signal="USR1", batch=True)  # its script saves, and queues itself again
                return {"run": str(run), "jobs": [one.id], "how": "saves, and is queued again"}
        raise RunError(f"job {state.job} of {run} runs; end it first: gigatrain cancel {run}")
    if kind == "kubernetes":
        kubernetes.delete(made, wait=True)
    submit.complete(made)
    numbers = submit.hand_in(made)
    if not numbers:
        raise RunError(f"nothing was submitted: {kubernetes.unreachable()}")
    return {"run": str(run), "jobs": numbers, "how": "a new job"}


def log(run: Path, *, rank: int = 0, attempt: int | None = None) -> tuple[Path | None, int | None]:
    """The file of what a rank printed, and its attempt: the newest unless one is named. None where nothing was printed yet."""
    if not _is_run(run):
        raise RunError(f"{run} is not a run folder; `gigatrain ps DIR` lists those in DIR")
    found = sorted(int(path.name[8:]) for path in (run / "logs").glob("attempt-*") if path.name[8:].isdecimal())
    if attempt is not None and attempt not in found:
        raise RunError(f"{run} has no logs of attempt {attempt}; it has {', '.join(map(str, found)) or 'none'}")
    for number in [attempt] if attempt is not None else reversed(found):
        folder = run / "logs" / f"attempt-{number:03}"
        path = folder / f"rank-{rank:05}.log"
        if not path.is_file() and rank == 0 and (folder / "node-00000.log").is_file():
            path = folder / "node-00000.log"  # of hosts: what the first one said before its rank began
        if path.is_file():
            return path, number
        if rank and any(folder.glob("rank-*.log")):
            last = max(folder.glob("rank-*.log")).stem[5:]
            raise RunError(f"attempt {number} of {run} has no log of rank {rank}; its last rank is {int(last)}")
    return None, attempt if attempt is not None else (found[-1] if found else None)


def ended(run: Path) -> bool:
    """Whether the last attempt has been judged: a rank that still runs has not failed, and its log has no end either."""
    last = next((event["event"] for event in reversed(jobs.history(run)) if event["event"] in ("started", "judged")), None)
    return last != "started" and not _locked(run)


def outputs(run: Path) -> list[Path]:
    """What the jobs' own scripts printed, oldest first; of an array's task, in the folder of the sweep."""
    found = [path for pattern in ("job-*.out", "job.out") for path in (run / "logs").glob(pattern)]
    for number in _ids(jobs.history(run)):
        found += [path for path in (run.parent / "logs").glob("job-*.out") if "_" in number and path.stem == f"job-{number}"]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def tail(path: Path) -> str:
    """The end of a file, whole lines, and how much was left out."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        data = file.read()
    if size > _TAIL_BYTES:
        data = f"[{size - _TAIL_BYTES:,} bytes before this are in {path}]\n".encode() + data.partition(b"\n")[2]
    return data.decode("utf-8", "replace")


def follow(run: Path, *, rank: int = 0) -> Iterator[str]:
    """What a rank prints, as it does, over attempts; ends when the run's job is gone. Between attempts the job's own words."""
    path: Path | None = None
    at, said, asked = 0, 0, time.monotonic()
    while True:
        newest, number = log(run, rank=rank)
        if newest != path:
            yield from () if path is None else (f"[attempt {number}]\n",)
            path, at = newest, 0
        more = ""
        if path is not None:
            with path.open("rb") as file:
                file.seek(at)
                data = file.read()
            at += len(data)
            more = data.decode("utf-8", "replace")
        if more:
            yield more
        elif time.monotonic() > asked:
            state = _one(run)
            if state.state not in LIVE:
                yield f"[{state.state}{f': {state.reason}' * bool(state.reason)}]\n"
                return
            if path is None and said != hash((state.state, state.reason)):
                said = hash((state.state, state.reason))
                yield f"[job {state.job} is {state.state}{f': {state.reason}' * bool(state.reason)}]\n"
            asked = time.monotonic() + 5
        time.sleep(_POLL_S)


def _launched(run: Path) -> Job:
    made = jobs.load(run)
    if made.sweep:
        raise RunError(f"{run} is a sweep of {made.sweep} runs; name one of them: {run}/{made.name}-0 to -{made.sweep - 1}")
    return made


def _one(run: Path) -> State:
    states, notes = ps(run)
    if not states:
        raise RunError(f"{run} is not a run folder; `gigatrain ps DIR` lists those in DIR")
    if states[0].state == "unknown":
        raise RunError(f"what became of {run} is unknown: {'; '.join(notes) or states[0].reason}")
    return states[0]


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file() or (folder / "launch" / "job.json").is_file()


def _kind(one: _Seen) -> str:
    return one.job.site.scheduler.kind if one.job else "train"


def _seen(folder: Path) -> _Seen:
    """What the files alone say; a run that is finished needs nobody's word."""
    try:
        made = jobs.load(folder) if (folder / "launch" / "job.json").is_file() else None
        why = ""
    except GigatrainError as failure:
        made, why = None, str(failure)
    plan, summary = _json(folder / "plan.json"), _json(folder / "summary.json")
    events = jobs.history(folder)
    ids = _ids(events)
    state = State(
        run=str(folder),
        name=str(plan.get("name") or (made.name if made else folder.name)),
        site=made.site.name if made else plan.get("site"),
        job=_current(events) or (ids[0] if ids else None),
        step=restart.committed(folder) if restart.committed(folder) >= 0 else None,
        steps=plan.get("steps") or _json(folder / "launch" / "recipe.json").get("train", {}).get("steps"),
        age_s=_news(folder),
        attempts=sum(event["event"] == "started" for event in events),
        reason=why,
    )
    for window in _windows(folder):
        state.step = window["step"] if state.step is None or window["step"] > state.step else state.step
        state.loss = window["loss"] if isinstance(window.get("loss"), float) else state.loss
    if summary:
        state.state, state.step = "finished", summary.get("steps", state.step)
    return _Seen(folder, made, events, state, ids)


def _ids(events: Iterable[dict[str, Any]]) -> list[str]:
    """The jobs of the last submission, in order; every other one has ended."""
    last = next((event for event in reversed(list(events)) if event["event"] == "submitted"), None)
    return [str(last["job"]), *map(str, last.get("chain") or [])] if last else []


def _current(events: Sequence[dict[str, Any]]) -> str | None:
    """The job that began the last attempt, if it is one of the last submission's."""
    started = next((str(event.get("job")) for event in reversed(events) if event["event"] == "started"), None)
    return started if started in _ids(events) else None


def _ask_slurm(seen: Sequence[_Seen], notes: list[str]) -> None:
    ids = [number for one in seen for number in one.ids]
    if not ids:
        for one in seen:
            _dead(one)
        return
    try:
        queued = {row.id: row for row in slurm.queued(*ids)}
    except RunError as failure:
        notes.append(str(failure))
        for one in seen:
            one.state.reason = "squeue does not answer here"
        return
    gone = [one for one in seen if not any(queued[number].state in slurm.ALIVE for number in one.ids if number in queued)]
    accounts: dict[str, slurm.Accounted] = {}
    if gone:
        try:
            accounts = {row.id: row for row in slurm.accounted(*(number for one in gone for number in one.ids))}
        except RunError as failure:
            notes.append(f"no accounts of jobs that have ended: {failure}")
    for one in seen:
        live = [queued[number] for number in one.ids if number in queued and queued[number].state in slurm.ALIVE]
        live.sort(key=lambda row: row.state in slurm.WAITS)  # what runs first
        if not live:
            ended = [queued[number].state for number in one.ids if number in queued] or [
                accounts[number].state for number in one.ids if number in accounts
            ]
            _dead(one, f"Slurm says {ended[-1]}" if ended else "")
            continue
        row, state = live[0], one.state
        state.job = row.id
        if row.state in slurm.WAITS:
            state.state, state.reason = (
                "requeued" if one.state.attempts and _current(one.events) == row.id else "queued",
                row.reason + slurm.way_out(row.reason),
            )
        else:
            limit = one.job.site.scheduler.lead_s if one.job else 0
            late = row.limit_s is not None and row.elapsed_s is not None and row.elapsed_s > row.limit_s - limit
            state.state = "saving" if _cancelled(one) or late else "running"
            state.reason = f"on {row.node_list}"


def _ask(one: _Seen, notes: list[str]) -> None:
    kind, state = _kind(one), one.state
    if kind in ("none", "ssh"):
        try:
            alive = hosts.alive(one.folder)
        except RunError as failure:
            return _untold(state, notes, str(failure))
        if alive is None:
            _dead(one)
        else:
            state.state, state.job = "saving" if _cancelled(one) else "running", str(alive)
    elif kind == "kubernetes" and one.job is not None:
        if why := kubernetes.unreachable():
            return _untold(state, notes, why)
        try:
            found = kubernetes.found(one.job)
        except RunError as failure:
            return _untold(state, notes, str(failure))
        if found is None:
            _dead(one)
        else:
            state.state, state.reason = kubernetes.state(found)
            state.job = kubernetes.name(one.job)
    elif kind == "train":
        if _locked(one.folder):
            state.state, state.reason = "running", f"on {socket.gethostname()}, not as a job"
        else:
            state.state, state.reason = (
                "left",
                "not launched as a job, and no process of this machine has it; go on with gigatrain train --resume",
            )


def _untold(state: State, notes: list[str], why: str) -> None:
    """Nobody says what its job does: the reason stands beside the run and below the table."""
    state.reason = why
    notes.append(why)


def _dead(one: _Seen, said: str = "") -> None:
    """No job of it is left: why, by its own history."""
    state, events = one.state, one.events
    judged = next((event for event in reversed(events) if event["event"] in ("judged", "submitted")), {"event": "none"})
    if _cancelled(one):
        state.state, state.reason = "cancelled", f"at step {state.step}" if state.step is not None else "before its first step"
    elif judged["event"] == "judged" and judged.get("verdict") == "stop":
        state.state, state.reason = "failed", str(judged.get("why", "")).partition(": ")[2] or str(judged.get("why", ""))
    elif judged["event"] == "judged" and judged.get("verdict") in ("leave", "requeue"):
        state.state, state.reason = "left", f"{judged.get('why', '')}; go on with gigatrain requeue"
    elif not events or not one.ids:
        state.state, state.reason = "dead", "it was never submitted"
    else:
        state.state, state.reason = "dead", "; ".join(filter(None, ["no job of it is left, and no summary", said]))


def _cancelled(one: _Seen) -> bool:
    last = next((event["event"] for event in reversed(one.events) if event["event"] in ("cancelled", "submitted")), None)
    return last == "cancelled"


def _ours(own: Sequence[Path], queued: Sequence[slurm.Queued]) -> list[slurm.Queued]:
    """Those that still are, each checked: the scheduler itself must say that its output goes into one of these runs (or the folder of their sweep).

    An array is asked for once, whatever it has of tasks. Paths are compared as the file system sees them: a user's may go through a link.
    """
    found = [one for one in queued if one.state in slurm.ALIVE]
    for number in dict.fromkeys(one.id.partition("_")[0] for one in found):
        array = any(one.id.startswith(f"{number}_") for one in found)
        folders = {os.path.realpath(each / "logs") for run in own for each in ((run, run.parent) if array else (run,))}
        said = [line.strip() for line in slurm.run("scontrol", "show", "job", number).splitlines()]
        outputs = {line.partition("=")[2] for line in said if line.startswith("StdOut=")} or {""}
        for output in outputs:
            if os.path.realpath(os.path.dirname(output)) not in folders:
                raise RunError(f"job {number} is not of {own[0]}: Slurm says that its output goes to {output!r}; it is left alone")
    return found


def _locked(folder: Path) -> bool:
    """Whether a process of this machine has the run's lock, from the kernel's list: asking for the lock could keep a run from it."""
    try:
        inode = (folder / ".lock").stat().st_ino
        return any(re.search(rf"FLOCK .*:{inode} ", line) for line in Path("/proc/locks").read_text().splitlines())
    except OSError:
        return False


def _news(folder: Path) -> float | None:
    times = []
    for path in (
        folder / "metrics.jsonl",
        folder / "launch" / "history.jsonl",
        folder / "run.json",
        folder / "summary.json",
        folder / "checkpoints",
    ):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(0.0, round(time.time() - max(times), 1)) if times else None


def _windows(folder: Path) -> Iterator[dict[str, Any]]:
    """The last lines of metrics.jsonl; a run of months has a long one."""
    try:
        text = tail(folder / "metrics.jsonl")
    except OSError:
        return
    for line in text.splitlines()[-20:]:
        try:
            window = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(window, dict) and isinstance(window.get("step"), int):
            yield window


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _age(age_s: float | None) -> str:
    if age_s is None:
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if age_s >= length:
            return f"{age_s / length:.0f} {unit}"
    return f"{age_s:.0f} s"
