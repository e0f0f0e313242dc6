"""The folder and the position of a run: who it is, where it stands, and what makes it start or go on."""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import math
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from gigatrain import floors
from gigatrain.checkpoint import Checkpoints, sync_folder, write_text, writing
from gigatrain.errors import CheckpointError, RunError
from gigatrain.parallel import ranks
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning import legs
from gigatrain.planning.plan import Plan

DYING_S = 3.0  # what the last process in a run folder gets to be gone
_NAMES = ("id", "name", "created", "identity", "meaning")  # without which run.json is nobody's
Start = Literal["new", "resume", "other-numbers", "auto", "continue"]


@dataclass
class Run:
    """A plan happening: its identity and how far it is. `elapsed_s` counts the wall-clock of every process that carried it."""

    id: str
    corpus: str | None = None  # name of the corpus's folder, once the run has one
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    resumes: list[int] = field(default_factory=list)
    changes: legs.Changes = field(default_factory=legs.Changes)  # that this resume makes of the plan before it

    def advance(self) -> None:
        """One optimizer update happened. Its tokens are counted on the device, and join `tokens` at a report or a save."""
        self.step += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"step": self.step, "tokens": self.tokens, "elapsed_s": self.elapsed_s, "resumes": self.resumes}

    def load(self, state: dict[str, Any]) -> None:
        """Back to where `state` was taken."""
        self.step, self.tokens, self.elapsed_s = state["step"], state["tokens"], state["elapsed_s"]
        self.resumes = [*state["resumes"], self.step]


@contextlib.contextmanager
def joined(plan: Plan, folder: Path, start: Start, mesh: Mesh) -> Iterator[tuple[Run, bool]]:
    """`opened` by rank 0, which alone holds the folder's lock; every rank gets the same run. What it raises, all raise."""
    with contextlib.ExitStack() as stack:

        def taken() -> list[Any]:
            this, resumes = stack.enter_context(opened(plan, folder, start))
            return [this.id, this.corpus, resumes, dataclasses.asdict(this.changes)]

        name, corpus, resumes, changes = ranks.first(mesh, taken)
        yield Run(id=name, corpus=corpus, changes=legs.Changes(**{kind: tuple(found) for kind, found in changes.items()})), resumes


@contextlib.contextmanager
def opened(plan: Plan, folder: Path, start: Start) -> Iterator[tuple[Run, bool]]:
    """Take the run folder for this process; yields the run and whether it resumes.

    `new` starts at step 0 (a run that the folder held is moved aside, never deleted), `resume` needs a checkpoint of a plan that means the same and computes
    in the same numbers, `other-numbers` one that means the same (planning/legs.py), `auto` starts only where the folder holds no run, and `continue`, for
    jobs that may be started again, goes on where there is a committed checkpoint and else begins, in the same folder; the plan of a job was agreed on when
    it was launched. Raises RunError when the folder is in use or taken, CheckpointError when there is nothing to resume or the plan differs.
    """
    folder = folder.absolute()
    other_numbers = start in ("other-numbers", "continue")
    start = "resume" if start == "other-numbers" else start
    if start == "resume" and not (folder / "run.json").is_file():
        raise CheckpointError(f"{folder} holds no run, so there is nothing to resume; start with --new")
    if start == "new" and (folder / "run.json").is_file():
        with _locked(folder):
            _move_aside(folder)
    try:
        floors.private(folder)
        sync_folder(folder.parent)
    except OSError as failure:
        raise RunError(f"{folder} cannot be the run folder: {failure.strerror}; name another with --run") from None
    with _locked(folder):
        if start == "continue":
            start = "resume" if writing.steps(str(folder / "checkpoints")) else "auto"
            if start == "auto":
                (folder / "run.json").unlink(missing_ok=True)  # claimed, and ended before its first save: nothing is lost
        if start == "auto" and (folder / "run.json").is_file():
            raise RunError(f"{folder} already holds a run; go on with --resume, start over with --new, or name another folder with --run")
        if start == "resume":
            yield _continued(plan, folder, other_numbers=other_numbers), True
        else:
            yield Run(id=uuid.uuid4().hex), False


def claim(plan: Plan, folder: Path, this: Run) -> None:
    """Write down whose folder this is: plan.json, its sha256 and run.json, which comes last. Until then the folder is nobody's."""
    if this.step == 0 and not (folder / "run.json").is_file():
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    before = identity(folder) if (folder / "run.json").is_file() else {}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    known: list[dict[str, Any]] = before.get("legs", [])
    if not known:
        known = [legs.leg(this.step, plan, (), now)]
    elif this.changes.all:
        if len(known) == 1:
            write_text(legs.kept(folder, 0), legs.stored(folder, before).text() + "\n")
        known = [*known, legs.leg(this.step, plan, this.changes.all, now)]
        write_text(legs.kept(folder, len(known) - 1), plan.text() + "\n")
    record = {
        "id": this.id,
        "name": plan.name,
        "created": before.get("created", now),
        "plan_sha256": plan.sha256,
        "identity": plan.identity,
        "meaning": plan.meaning,
        "corpus": this.corpus,
        "legs": known,
    }
    if before.get("identity", plan.identity) != plan.identity:  # until run.json names the new leg, plan.json is the old one's
        write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")
    write_text(folder / "plan.json", plan.text() + "\n")
    write_text(folder / "plan.sha256", plan.sha256 + "\n")
    write_text(folder / "run.json", json.dumps(record, indent=1) + "\n")


def identity(folder: Path) -> dict[str, Any]:
    """run.json of a run folder; RunError where it is no run's, or lacks what every run writes there."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in _NAMES):
            raise ValueError(f"it does not say whose folder this is, by {', '.join(_NAMES)}")
        if not isinstance(record.get("corpus"), str | None):
            raise ValueError("its corpus is no name")
        told = record.get("legs", [])
        if not isinstance(told, list) or not all(isinstance(leg, dict) for leg in told):
            raise ValueError("its legs are no list of records")
        return record
    except OSError:
        raise RunError(f"{folder} is not a run folder: it has no run.json") from None
    except (ValueError, RecursionError) as failure:
        raise RunError(f"{folder}/run.json is not what a run writes: {failure}") from None


def stored_plan(folder: Path) -> Plan:
    """plan.json of a run folder, checked against the identity that run.json records."""
    return legs.stored(folder, identity(folder))


def checkpoints(folder: Path) -> Checkpoints:
    """The checkpoints of the run in a folder, to read."""
    record = identity(folder)
    return Checkpoints(folder, run=record["id"], plan_sha256=record["meaning"], keep=1)


def newest(root: Path, name: str) -> Path:
    """The run of recipe `name` under `root` that was created last; CheckpointError if there is none.

    A run.json that cannot be read is passed over where it was written before the run that is found, which it is then not; else RunError, since it may be
    the one that is meant.
    """
    found, unread = [], []
    for path in root.glob("*/run.json"):
        try:
            record = identity(path.parent)
            created = datetime.datetime.fromisoformat(record["created"]).timestamp()
        except (RunError, ValueError) as failure:
            unread.append((path, failure))
            continue
        if record["name"] == name:
            found.append((created, str(path.parent)))
    last, folder = max(found, default=(-math.inf, ""))
    for path, failure in unread:
        if not path.is_file() or path.stat().st_mtime >= last:
            raise RunError(
                f"{failure}; whether {path.parent} is the newest run of {name} cannot be told: name the one that is meant with --run"
            )
    if not folder:
        raise CheckpointError(f"{root.absolute()} holds no run of {name}, so there is nothing to resume; name its folder with --run")
    return Path(folder)


def _continued(plan: Plan, folder: Path, *, other_numbers: bool) -> Run:
    record = identity(folder)
    changes = legs.agree(folder, stored_plan(folder), plan, other_numbers=other_numbers)
    return Run(id=record["id"], corpus=record.get("corpus"), changes=changes)


def _move_aside(folder: Path) -> None:
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    try:
        folder.rename(target)
    except OSError as failure:
        raise RunError(
            f"{folder} cannot be moved to {target}: {failure.strerror}; move it yourself, or name another folder with --run"
        ) from None


def _taken(file: IO[str]) -> bool:
    """Whether its lock is ours now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process a run folder; the lock goes with the process, however it ends."""
    try:
        file = os.fdopen(os.open(folder / ".lock", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "a")
    except OSError as failure:
        raise RunError(f"{folder} cannot be written: {failure.strerror}; name another folder with --run") from None
    with file:
        end = time.monotonic() + DYING_S
        try:
            while not _taken(file):
                if time.monotonic() > end:
                    raise BlockingIOError
                time.sleep(0.05)
        except BlockingIOError:
            taken = RunError(f"{folder} is in use by another process; wait for it, stop it, or name another folder with --run")
            taken.transient = True  # of an attempt whose last process is still dying
            raise taken from None
        except OSError as failure:
            name = errno.errorcode.get(failure.errno or 0, "error")
            raise RunError(
                f"{folder}: this file system refuses locks ({name}), and two processes in one run folder would destroy it; "
                "put the run on a file system with flock (on Lustre: mount option flock)"
            ) from None
        yield
