"""What is submitted: everything that a script, a pod or a host needs, so that nothing is looked up once it waits in a queue.

`RUN/launch/` holds it: job.json, the recipe and the site as they were (recipe.json, site.json), the script, history.jsonl, and per attempt what the
doctor said of each node. Logs of ranks are in `RUN/logs/attempt-NNN/`.
"""

import datetime
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from gigatrain.config import Count, Section
from gigatrain.errors import RunError
from gigatrain.site import Site

Launcher = Literal["torchrun", "srun"]


class Job(Section):
    """One run as a job of a site. `run`, `recipe`, `workdir` and `python` are absolute paths as its nodes see them."""

    format: Literal[1] = 1
    name: str = Field(description="The recipe's name; the scheduler shows it.")
    run: str
    recipe: str = Field(description="The recipe with every override in it, as JSON.")
    workdir: str = Field(description="Where relative paths of the recipe begin.")
    python: str = Field(description="The interpreter that has gigatrain.")
    site: Site
    nodes: Count = Field(description="Nodes that train.")
    spares: Annotated[int, Field(ge=0)] = Field(default=0, description="Nodes asked for beside them, that take the place of bad ones.")
    ranks_per_node: Count
    launcher: Launcher = Field(
        default="torchrun", description="torchrun: one task a node, its agents start the ranks; srun: one task a rank."
    )
    time_s: Count | None = Field(default=None, description="The job's time limit; none: the partition's own.")
    account: str | None = None
    exclude: tuple[str, ...] = Field(default=(), description="Nodes that are known to be bad.")
    preflight: bool = Field(default=True, description="Whether every node is examined before each attempt (`gigatrain doctor`).")
    chain: Count = Field(
        default=1, description="Jobs submitted at once, each after the one before: for sites where none may requeue itself."
    )
    sweep: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Runs of a sweep, one array task each: task I runs `run`/NAME-I, and nothing else is at `run`."
    )
    excluded_in: str | None = Field(
        default=None,
        description="The folder of the site's list of bad nodes, where that is not the one above `run`: a sweep's run has its sweep's.",
    )
    hosts: tuple[str, ...] = Field(
        default=(), description="Where ssh starts the nodes, the first one being where the ranks meet; none: this machine."
    )
    form: Literal["jobset", "trainjob"] = Field(default="jobset", description="What Kubernetes is handed.")
    shards: str | None = Field(default=None, description="The recipe's data.folder, for a container to see.")
    sources: tuple[str, ...] = Field(default=(), description="Folders that the recipe reads its text from, for a container to see.")
    environment: dict[str, str] = Field(default={}, description="Beside the site's, of every rank.")

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def excluded(self) -> Path:
        """The site's list of bad nodes."""
        return (Path(self.excluded_in) if self.excluded_in else Path(self.run).parent) / f"excluded-{self.site.name}.jsonl"


def new_folder(root: Path, name: str, now: datetime.datetime | None = None) -> Path:
    """The folder of a run that begins now and was given none: `root`/NAME-DATE-TIME, by the local clock."""
    return root / f"{name}-{now or datetime.datetime.now():%Y%m%d-%H%M%S}"


def load(run: Path) -> Job:
    """The job of a run folder; RunError if it was never launched."""
    from gigatrain.load import read_json

    path = run / "launch" / "job.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as failure:
        why = getattr(failure, "strerror", None) or "it is not UTF-8 text"
        raise RunError(f"{run} was not launched: {path} cannot be read ({why}); `gigatrain launch` makes it") from None
    found = read_json(Job, text, str(path), RunError)
    assert isinstance(found, Job)
    return found


def record(run: Path, event: str, **facts: Any) -> None:
    """Append one event to the run's history: a line of JSON with its time. One write, so that writers do not mix."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "event": event} | {name: value for name, value in facts.items() if value is not None})
    path = run / "launch" / "history.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        torn = file.read(1) not in (b"", b"\n")  # a line that a crash cut short is not glued to this one
        file.write(b"\n" * torn + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def history(run: Path) -> list[dict[str, Any]]:
    """Every event of the run, oldest first; a line that a crash cut short is left out."""
    try:
        lines = (run / "launch" / "history.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and "event" in event:
            found.append(event)
    return found
