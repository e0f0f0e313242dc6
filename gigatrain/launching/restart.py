"""What happens to a job once its ranks have ended: a pure decision over what is known, and the history that it is kept in. Free of torch.

`begin` and `after` are what job.sh asks before and after every attempt. Nothing here talks to Slurm.
"""

import datetime
import json
import signal as signals
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gigatrain import errors
from gigatrain.errors import RunError
from gigatrain.launching import job as jobs

RESTARTS = 3  # without a step gained; then the cause is not going away
NO_PROGRESS = 93  # exit code: do not start this again as it is
TOO_FEW = 9  # `gigatrain doctor --judge`: fewer healthy nodes than the run needs
EXCLUDED_DAYS = 14  # how long a bad node stays out; by then somebody has looked at it
_FATAL = {2: "the recipe", 3: "the site", 4: "the plan", 5: "the data", 6: "a checkpoint"}
_NEVER = frozenset({"PermissionError", "MemoryError", "ImportError", "ModuleNotFoundError"})  # what no restart mends
SILENT = 10  # lives in a row that Slurm itself ended and queued again, without a word and without a step gained
_SUBMITTED_S = 10.0  # what whoever submitted a job has to write that down

Word = Literal["done", "again", "requeue", "leave", "stop"]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `before` and `step` are the newest committed steps before and after it, -1: none."""

    code: int
    signal: str | None = None  # what the script was told: USR1 or TERM
    left: bool = False  # the ranks saved and left because of a signal
    finished: bool = False
    cancelled: bool = False  # by `gigatrain cancel`, which is written down before the signal is sent
    before: int = -1
    step: int = -1
    stalled: int = 0  # attempts before this one, in a row, that gained no step
    failure: dict[str, Any] | None = None  # what the first rank that failed left: type, message, rank
    started: bool = True  # nodes were chosen, and ranks started on them
    lost: tuple[str, ...] = ()  # nodes of the allocation that did not answer


@dataclass(frozen=True)
class Verdict:
    """What to do: `done`; `again` in this allocation; `requeue`; `leave` it to a person or to the next job of a chain; `stop`, with `code`."""

    word: Word
    why: str
    code: int = 0
    pause_s: int = (
        0  # before `again`: longer each time that nothing was gained, as a controller or a file system that is away takes minutes
    )

    def screen(self, run: str) -> list[str]:
        """What the job's output says of it: one screen at most, and for who must act, how."""
        said = [f"gigatrain: {self.word}: {line}" if not index else f"  {line}" for index, line in enumerate(self.why.splitlines()[:12])]
        if self.word == "stop":
            said += [
                f"  each rank's own words are in {run}/logs, every attempt in {run}/launch/history.jsonl",
                "  when it is mended: gigatrain launch --resume",
            ]
        if self.word == "leave":
            said.append(f"  this job may not requeue itself; the next one goes on by itself, or: gigatrain requeue {run}")
        return said


def judge(outcome: Outcome, *, may_requeue: bool = True, restarts: int = RESTARTS) -> Verdict:
    """The decision, from the outcome alone; `restarts` in a row that gain no step are the last."""
    elsewhere: Word = "requeue" if may_requeue else "leave"
    said, code, passes = "", outcome.code, False
    if outcome.failure is not None:  # it knows better than srun, whose code is the highest: that of ranks that were killed with it
        kind = getattr(errors, str(outcome.failure.get("type")), None)
        said, code = str(outcome.failure.get("message", "")), getattr(kind, "exit_code", 1)
        passes = bool(outcome.failure.get("transient") or outcome.failure.get("secondary"))
        if outcome.failure.get("secondary"):  # the earliest that is there is another's consequence: whoever failed first left no word
            said = (
                "no rank left word of a failure of its own: one was killed, or a node or the network was lost "
                f"(gigatrain logs RUN --errors tells more); what came of it: {said}"
            )
    if outcome.finished:
        return Verdict("done", "the run is finished")
    if outcome.cancelled:
        return Verdict("stop", f"it was cancelled, and it is {_at(outcome.step)}")
    if code in _FATAL and not passes:
        return Verdict("stop", f"{_FATAL[code]} is wrong, and would be the next time: {said or f'exit code {code}'}", code)
    if code == 7 and said and not passes:  # out of memory, a loss that is not finite
        return Verdict("stop", f"it would end the same way again: {said}", code)
    if outcome.failure is not None and outcome.failure.get("type") in _NEVER and not passes:
        return Verdict("stop", f"it would end the same way again: {outcome.failure['type']}: {said}", code)
    gained = outcome.step > max(outcome.before, 0)
    if not gained and outcome.stalled >= restarts and not _interrupted(outcome.signal, outcome.started):
        often = f"{restarts} restart{'s' * (restarts != 1)} and no step gained"
        why = f"{often}, it is {_at(outcome.step)}; the last one ended with {_exit(outcome)}: {said}".rstrip(": ")
        if outcome.signal:
            why += "\nits time was over each time before a step was gained: ask for more with --time"
        return Verdict("stop", why.rstrip(": "), NO_PROGRESS)
    if outcome.signal or outcome.left or (outcome.code == errors.REQUEUE and outcome.failure is None):
        return Verdict(elsewhere, f"a signal ended it ({outcome.signal or 'of Slurm, to the ranks'}), and it is {_at(outcome.step)}")
    if outcome.code == TOO_FEW:
        more = f" and {len(outcome.lost) - 8} more" if len(outcome.lost) > 8 else ""
        gone = f": no answer from {', '.join(outcome.lost[:8])}{more}" if outcome.lost else ""
        return Verdict(elsewhere, f"too few healthy nodes are left in this allocation{gone}")
    pause_s = 0 if gained else 5 * 2 ** min(outcome.stalled, 3)
    return Verdict("again", f"the ranks ended with {_exit(outcome)}, and it is {_at(outcome.step)}; {said}".rstrip("; "), pause_s=pause_s)


def _interrupted(signal: str | None, started: bool) -> bool:
    """Whether others ended it, so that it says nothing of the run: TERM, before nodes are taken away, or any signal before ranks had begun."""
    return signal == "TERM" or (signal is not None and not started)


def _exit(outcome: Outcome) -> str:
    """`exit code 139 (SIGSEGV)`, `too few healthy nodes`."""
    if outcome.code == TOO_FEW:
        return "too few healthy nodes"
    try:
        name = f" ({signals.Signals(outcome.code - 128).name})" if outcome.code > 128 else ""
    except ValueError:
        name = ""
    return f"exit code {outcome.code}{name}"


def _at(step: int) -> str:
    return "before its first checkpoint" if step < 0 else f"at step {step}"


def begin(run: Path, environment: dict[str, str]) -> str:
    """What an attempt needs to know, in one line: `go ATTEMPT PORT FOLDER`, or `done`, or `stop CODE`.

    A run that is finished or was stopped is not begun again by a job that was submitted before that: the links of a chain see it and end. A job whose
    submission nobody writes down within 10 s was handed in by hand, which is leave to go on as well.
    """
    if (run / "summary.json").is_file():
        return "done"
    name = environment.get("SLURM_JOB_ID", "0")
    events = _submitted(run, name, environment)
    since = _since(events, "submitted")
    if any(event["event"] == "cancelled" for event in since):
        return "stop 0"
    stopped = next((event for event in since if event["event"] == "judged" and event.get("verdict") == "stop"), None)
    if stopped:
        return f"stop {stopped.get('exit_code', 1)}"
    step = committed(run)
    silent = _ended_silently(run, events, step)
    if silent > SILENT:
        why = (
            f"it ended {silent} times in a row without a word and without a step gained, it is {_at(step)}, and Slurm queued it again each time: "
            "its first node or its script dies; `sacct --duplicates --jobs` and the system's log of that node say more"
        )
        last = _last_attempt(events)
        jobs.record(run, "judged", attempt=last, job=name, code=1, verdict="stop", why=why, exit_code=NO_PROGRESS, step=step, gained=False)
        return f"stop {NO_PROGRESS}"
    attempt = 1 + _last_attempt(events)
    jobs.record(
        run,
        "started",
        attempt=attempt,
        job=name,
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
        nodes=environment.get("SLURM_JOB_NODELIST"),
        step=step,
    )
    return f"go {attempt:03} {port(int(name), attempt)} launch/attempt-{attempt:03}"


def _last_attempt(events: Sequence[dict[str, Any]]) -> int:
    return max((event.get("attempt", -1) for event in events if event["event"] == "started"), default=-1)


def _submitted(run: Path, name: str, environment: dict[str, str]) -> list[dict[str, Any]]:
    """The history once it names this job: sbatch returns, and the job may begin, before whoever called it can write down its number."""
    names = {name, f"{environment.get('SLURM_ARRAY_JOB_ID')}_{environment.get('SLURM_ARRAY_TASK_ID')}"}
    end = time.monotonic() + _SUBMITTED_S
    while True:
        events = jobs.history(run)
        known = (str(job) for event in events if event["event"] == "submitted" for job in (event.get("job"), *(event.get("chain") or ())))
        if not names.isdisjoint(known):
            return events
        if time.monotonic() > end:
            jobs.record(run, "submitted", job=name, by="hand")
            return jobs.history(run)
        time.sleep(0.1)


def _ended_silently(run: Path, events: Sequence[dict[str, Any]], step: int) -> int:
    """If the attempt before this one was never judged, write down its end; how many such there are now in a row that gained no step."""
    last = next((event for event in reversed(events) if event["event"] in ("started", "judged", "ended")), None)
    if last is None or last["event"] != "started":
        return 0
    gained = step > max(last.get("step", -1), 0)
    why = "it ended without a word: its first node or its script died, and it was queued again"
    jobs.record(run, "ended", attempt=last.get("attempt"), job=last.get("job"), why=why, step=step, gained=gained)
    count = 0 if gained else 1
    for event in reversed(_since(events, "submitted")):
        if event["event"] == "judged" or event.get("gained"):
            break
        count += event["event"] == "ended" and not gained
    return count


def after(
    run: Path,
    code: int,
    *,
    signal: str | None = None,
    held: Sequence[str] = (),
    chosen: Sequence[str] = (),
    excluded: Path | None = None,
    down: Sequence[str] | None = None,
    cut_short: bool = False,
) -> Verdict:
    """Judge the attempt that has just ended, and write it down with its cause; lost nodes go on the site's list at `excluded`.

    With `down`, the nodes that the scheduler calls down, other nodes must be silent twice in a row; `cut_short`: not all had the time to answer.
    """
    made, events = jobs.load(run), jobs.history(run)
    started = next((event for event in reversed(events) if event["event"] == "started"), {"attempt": 0, "step": -1})
    attempt, since = started["attempt"], _since(events, "started")
    lost = () if cut_short else _lost(run, attempt, held)
    outcome = Outcome(
        code=code,
        signal=signal,
        left=any(event["event"] == "left" for event in since),
        finished=(run / "summary.json").is_file(),
        cancelled=any(event["event"] == "cancelled" for event in _since(events, "submitted")),
        before=started.get("step", -1),
        step=committed(run),
        stalled=stalled(_since(events, "submitted")),
        failure=failure(run, attempt),
        started=bool(chosen),
        lost=lost,
    )
    verdict = judge(outcome, may_requeue=made.site.scheduler.requeue and made.chain == 1)
    if excluded and len(lost) * 2 <= len(held):  # where most are silent it is not the nodes
        before = next((event.get("lost", "").split(",") for event in reversed(events) if event["event"] == "judged"), [])
        sure = set(lost) if down is None else set(lost) & {*down, *before}
        for node in sorted(sure - set(excluded_nodes(excluded))):
            exclude(excluded, node, "did not answer", run)
    jobs.record(
        run,
        "judged",
        attempt=attempt,
        job=started.get("job"),
        code=code,
        signal=signal,
        verdict=verdict.word,
        why=verdict.why,
        exit_code=verdict.code or None,
        step=outcome.step,
        gained=outcome.step > max(outcome.before, 0),
        nodes=_few(chosen, f"launch/attempt-{attempt:03}/chosen"),
        lost=_few(lost, f"launch/attempt-{attempt:03}"),
    )
    return verdict


def committed(run: Path) -> int:
    """The newest step that a committed checkpoint has; -1: none."""
    return max((int(path.parent.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*/COMMITTED")), default=-1)


def stalled(events: Sequence[dict[str, Any]]) -> int:
    """Attempts at the end of `events` that gained no step, but for those that others ended."""
    count = 0
    for event in reversed(events):
        if event["event"] in ("judged", "ended") and event.get("gained"):
            break
        count += event["event"] == "judged" and not _interrupted(event.get("signal"), bool(event.get("nodes")))
    return count


def _few(nodes: Sequence[str], where: str) -> str | None:
    """The names as they stand in the history, which is read at every start: of a large job only how many, and the file that has them."""
    return (",".join(nodes) if len(nodes) <= 64 else f"{len(nodes)} nodes: {where}") or None


def failure(run: Path, attempt: int, *, since: float = 0.0) -> dict[str, Any] | None:
    """Why the first rank of the attempt failed, after `since` (seconds since 1970): the earliest that is not a mere consequence of another's."""
    found = []
    for path in (run / "logs" / f"attempt-{attempt:03}" / "errors").glob("rank-*.json"):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(said, dict) and float(said.get("time_s", 0)) >= since:
            found.append(said)
    return min(found, key=lambda said: (bool(said.get("secondary")), float(said.get("time_s", 0)), str(said.get("rank"))), default=None)


def exclude(path: Path, node: str, why: str, run: Path) -> None:
    """Write a bad node on the site's list."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with path.open("ab") as file:
        file.write(json.dumps({"node": node, "reason": why, "time": now, "run": str(run)}).encode() + b"\n")


def excluded_nodes(path: Path, *, now: datetime.datetime | None = None) -> list[str]:
    """Nodes on the site's list that are younger than `EXCLUDED_DAYS`, each once."""
    now = now or datetime.datetime.now(datetime.UTC)
    found: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            said = json.loads(line)
            when = datetime.datetime.fromisoformat(said["time"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        when = when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
        if now - when < datetime.timedelta(days=EXCLUDED_DAYS):
            found.append(str(said["node"]))
    return list(dict.fromkeys(found))


def port(job: int, attempt: int) -> int:
    """A port for the ranks to meet at: each job and attempt its own, and one that nobody listens on here."""
    for more in range(200):
        number = 20_000 + (job * 17 + attempt * 211 + more) % 12_000  # below Linux's ports of outgoing connections, 32768 and up
        with socket.socket() as free:
            try:
                free.bind(("", number))
            except OSError:
                continue
            return number
    raise RunError("no free port between 20000 and 32000 on this node; `ss -lnt` shows who listens")


def _since(events: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Events after the last one of that name."""
    last = max((index for index, event in enumerate(events) if event["event"] == name), default=-1)
    return list(events[last + 1 :])


def _lost(run: Path, attempt: int, held: Sequence[str]) -> tuple[str, ...]:
    """Nodes of the allocation that gave no answer: neither to the doctor nor to the roll call."""
    here = run / "launch" / f"attempt-{attempt:03}"
    if (here / "doctor").is_dir():
        answered = {path.stem for path in (here / "doctor").glob("*.json")}
    elif (here / "present").is_file():
        answered = set((here / "present").read_text(encoding="utf-8", errors="replace").split())
    else:
        return ()
    return tuple(node for node in held if node not in answered) if answered else ()
