"""The folder and the position of a run: who it is, where it stands, and what makes it start or go on."""

import contextlib
import datetime
import fcntl
import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gigatrain import load
from gigatrain.checkpoint import Checkpoints, write_text
from gigatrain.errors import CheckpointError, RunError
from gigatrain.planning.plan import Plan

Start = Literal["new", "resume", "auto"]


@dataclass
class Run:
    """A plan happening: its identity and how far it is. `elapsed_s` counts the wall-clock of every process that carried it."""

    id: str
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    resumes: list[int] = field(default_factory=list)

    def advance(self, tokens: int) -> None:
        """One optimizer update happened."""
        self.step += 1
        self.tokens += tokens

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"step": self.step, "tokens": self.tokens, "elapsed_s": self.elapsed_s, "resumes": self.resumes}

    def load(self, state: dict[str, Any]) -> None:
        """Back to where `state` was taken."""
        self.step, self.tokens, self.elapsed_s = state["step"], state["tokens"], state["elapsed_s"]
        self.resumes = [*state["resumes"], self.step]


@contextlib.contextmanager
def opened(plan: Plan, folder: Path, start: Start) -> Iterator[tuple[Run, bool]]:
    """Take the run folder for this process; yields the run and whether it resumes.

    `new` starts at step 0 (what the folder held is moved aside, never deleted), `resume` needs the same plan and a checkpoint, `auto`
    starts only where the folder holds no run. Raises RunError when the folder is in use or taken, CheckpointError when there is nothing
    to resume or the plan differs.
    """
    if start == "resume" and not (folder / "run.json").is_file():
        raise CheckpointError(f"{folder} holds no run, so there is nothing to resume; start with --new")
    if start == "new" and folder.exists() and any(folder.iterdir()):
        with _locked(folder):
            _move_aside(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise RunError(f"{folder} cannot be the run folder: {failure.strerror}; name another with --run") from None
    with _locked(folder):
        if start == "auto" and (folder / "run.json").is_file():
            raise RunError(f"{folder} already holds a run; go on with --resume, start over with --new, or name another folder with --run")
        if start == "resume":
            yield _identify(plan, folder), True
        else:
            run = Run(id=uuid.uuid4().hex)
            created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            write_text(folder / "plan.json", plan.text() + "\n")
            write_text(folder / "plan.sha256", plan.sha256 + "\n")
            write_text(folder / "run.json", json.dumps({"id": run.id, "created": created, "plan_sha256": plan.sha256}) + "\n")
            yield run, False


def identity(folder: Path) -> dict[str, Any]:
    """run.json of a run folder."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except OSError:
        raise RunError(f"{folder} is not a run folder: it has no run.json") from None
    except ValueError as failure:
        raise RunError(f"{folder}/run.json is not JSON: {failure}") from None


def stored_plan(folder: Path) -> Plan:
    """plan.json of a run folder, checked against its sha256."""
    record = identity(folder)
    try:
        text = (folder / "plan.json").read_text(encoding="utf-8")
    except OSError as failure:
        raise RunError(f"{folder}/plan.json cannot be read: {failure.strerror}") from None
    plan = load.read_json(Plan, text, f"{folder}/plan.json", RunError)
    if plan.sha256 != record["plan_sha256"]:
        raise RunError(
            f"{folder}/plan.json was changed after the run began: its sha256 is {plan.sha256[:12]}, not {record['plan_sha256'][:12]}"
        )
    return plan


def checkpoints(folder: Path) -> Checkpoints:
    """The checkpoints of the run in a folder, to read."""
    record = identity(folder)
    return Checkpoints(folder, run=record["id"], plan_sha256=record["plan_sha256"], keep=1)


def _identify(plan: Plan, folder: Path) -> Run:
    before = stored_plan(folder)
    if before.sha256 != plan.sha256:
        changes = before.differences(plan)
        raise CheckpointError(
            f"{folder} was started under another plan; {len(changes)} value(s) differ:\n"
            + "\n".join(f"  {change}" for change in changes[:12])
            + "\nResume with the recipe and --set it began with, or start with --new."
        )
    return Run(id=identity(folder)["id"])


def _move_aside(folder: Path) -> None:
    for number in range(1, 10_000):
        target = folder.with_name(f"{folder.name}.{number}")
        if not target.exists():
            shutil.move(folder, target)
            return


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process a run folder; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{folder} is in use by another process; wait for it, stop it, or name another folder with --run") from None
        yield
