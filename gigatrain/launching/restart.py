"""What happens to a job once its ranks have ended: a pure decision over what is known, and the history that it is kept in. Free of torch.

`begin` and `after` are what job.sh asks before and after every attempt. Nothing here talks to Slurm.
"""

import datetime
import json
import re
import signal as signals
import socket
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
# Of errors with code 7 (RunError) these may be gone the next time; the others (out of memory, a loss that is not finite) come again.
_PASSES = re.compile(r"lost another rank|cannot meet the others|in use by another process|no GPU of its own")

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
    lost: tuple[str, ...] = ()  # nodes of the allocation that did not answer


@dataclass(frozen=True)
class Verdict:
    """What to do: `done`; `again` in this allocation; `requeue`; `leave` it to a person or to the next job of a chain; `stop`, with `code`."""

    word: Word
    why: str
    code: int = 0

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


def judge(outcome: Outcome, *, may_requeue: bool = True) -> Verdict:
    """The decision, from the outcome alone."""
    elsewhere: Word = "requeue" if may_requeue else "leave"
    said, code = "", outcome.code
    if outcome.failure is not None:  # it knows better than srun, whose code is the highest: that of ranks that were killed with it
        kind = getattr(errors, str(outcome.failure.get("type")), None)
        said, code = str(outcome.failure.get("message", "")), getattr(kind, "exit_code", 1)
    if outcome.finished:
        return Verdict("done", "the run is finished")
    if outcome.cancelled:
        return Verdict("stop", f"it was cancelled, and it is {_at(outcome.step)}")
    if code in _FATAL:
        return Verdict("stop", f"{_FATAL[code]} is wrong, and would be the next time: {said or f'exit code {code}'}", code)
    if code == 7 and said and not _PASSES.search(said):
        return Verdict("stop", f"it would end the same way again: {said}", code)
    gained = outcome.step > max(outcome.before, 0)
    if not gained and outcome.stalled >= RESTARTS:
        why = f"{RESTARTS} restarts and no step gained, it is {_at(outcome.step)}; the last one ended with {_exit(outcome)}: {said}"
        return Verdict("stop", why.rstrip(": "), NO_PROGRESS)
    if outcome.signal or outcome.left:
        return Verdict(elsewhere, f"a signal ended it ({outcome.signal or 'of Slurm, to the ranks'}), and it is {_at(outcome.step)}")
    if outcome.code == TOO_FEW:
        gone = f": no answer from {', '.join(outcome.lost)}" if outcome.lost else ""
        return Verdict(elsewhere, f"too few healthy nodes are left in this allocation{gone}")
    return Verdict("again", f"the ranks ended with {_exit(outcome)}, and it is {_at(outcome.step)}; {said}".rstrip("; "))


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

    A run that is finished or was stopped is not begun again by a job that was submitted before that: the links of a chain see it and end.
    """
    if (run / "summary.json").is_file():
        return "done"
    events = jobs.history(run)
    since = _since(events, "submitted")
    if any(event["event"] == "cancelled" for event in since):
        return "stop 0"
    stopped = next((event for event in since if event["event"] == "judged" and event.get("verdict") == "stop"), None)
    if stopped:
        return f"stop {stopped.get('exit_code', 1)}"
    attempt = 1 + max((event.get("attempt", -1) for event in events if event["event"] == "started"), default=-1)
    name = environment.get("SLURM_JOB_ID", "0")
    jobs.record(
        run,
        "started",
        attempt=attempt,
        job=name,
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
        nodes=environment.get("SLURM_JOB_NODELIST"),
        step=committed(run),
    )
    return f"go {attempt:03} {port(int(name), attempt)} launch/attempt-{attempt:03}"


def after(
    run: Path, code: int, *, signal: str | None = None, held: Sequence[str] = (), chosen: Sequence[str] = (), excluded: Path | None = None
) -> Verdict:
    """Judge the attempt that has just ended, and write it down with its cause; lost nodes go on the site's list at `excluded`."""
    made, events = jobs.load(run), jobs.history(run)
    started = next((event for event in reversed(events) if event["event"] == "started"), {"attempt": 0, "step": -1})
    attempt, since = started["attempt"], _since(events, "started")
    lost = _lost(run, attempt, held)
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
        lost=lost,
    )
    verdict = judge(outcome, may_requeue=made.site.scheduler.requeue and made.chain == 1)
    if excluded and not (run / "launch" / f"attempt-{attempt:03}" / "doctor").is_dir():  # who judged the nodes has written it down
        for node in set(lost) - set(excluded_nodes(excluded)):
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
        nodes=",".join(chosen) or None,
        lost=",".join(lost) or None,
    )
    return verdict


def committed(run: Path) -> int:
    """The newest step that a committed checkpoint has; -1: none."""
    return max((int(path.parent.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*/COMMITTED")), default=-1)


def stalled(events: Sequence[dict[str, Any]]) -> int:
    """Attempts at the end of `events` that gained no step."""
    count = 0
    for event in reversed(events):
        if event["event"] == "judged":
            if event.get("gained"):
                break
            count += 1
    return count


def failure(run: Path, attempt: int) -> dict[str, Any] | None:
    """Why the first rank of the attempt failed: the earliest that is not a mere consequence of another's."""
    found = []
    for path in (run / "logs" / f"attempt-{attempt:03}" / "errors").glob("rank-*.json"):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(said, dict):
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
        except (ValueError, KeyError, TypeError):
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
