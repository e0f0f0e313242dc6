"""A tiny real run that faults are done to, seen from a process of its own: how it is started, watched, ended, and compared with an undisturbed one.

Nothing here asks the run's own code whether it is right. Checkpoints are read byte by byte after safetensors' published layout, sample numbers are those
that each rank was given (within.py), and what `Undisturbed` holds is all that the two runs must share: every tensor of the last checkpoint (weights,
optimizer, generators), every line of metrics.jsonl but its timings, and every step's samples. Free of torch.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gigatrain.bench import within
from gigatrain.errors import RunError
from gigatrain.observe.tail import Tail

POLL_S = 0.002
FILES = 40  # of the standard library: some 160 kB of text
LIMIT_S = 240.0  # nothing that is waited for takes longer
TIMED = ("tokens_per_s", "step_s", "joules", "watts", "stragglers")  # what two equal runs may differ in
RECIPE = """\
name = "faults"
[model.architecture]
family = "llama"
vocab = 320
hidden = 32
layers = 2
heads = 4
kv_heads = 2
head_dim = 8
intermediate = 48
tied = true
[tokenizer.train]
vocab = 320
[data]
sources = [{{ kind = "text", path = {corpus}, pattern = "*.py" }}]
folder = {cache}
validation = 0.1
[train]
sequence = 32
batch = 8
steps = 120
precision = "fp32"
[optim]
lr = 3e-3
[schedule]
warmup = 2
[validation]
every = 60
max_samples = 8
[checkpoint]
every = 5
keep = 3
[recovery]
hang_floor_s = 5
hang_slow_s = 60
restarts = 20
[report]
every = 1
trackers = []
"""
STEPS, EVERY = 120, 5


_BEGINS = re.compile(r"^\[gigatrain\] rank \d+ of \d+ on \S+, pid (\d+), begins ", re.MULTILINE)


class Broken(Exception):
    """A promise that was not kept; its text is the row's outcome."""


@dataclass(frozen=True)
class Engine:
    """Who trains: a name of the table, the ranks, and what is set for it."""

    name: str
    ranks: int
    sets: tuple[str, ...] = ()


ENGINES = {
    one.name: one
    for one in (
        Engine("native-1", 1),
        Engine("native-2", 2, ("train.nproc=2",)),
        Engine("native-4", 4, ("train.nproc=4",)),
        Engine("ddp-2", 2, ("train.nproc=2", "mesh.replicate=2", "mesh.shard=1")),
        Engine("zero1-2", 2, ("train.nproc=2", "engine.name=deepspeed", "engine.zero=1")),
        Engine("zero2-2", 2, ("train.nproc=2", "engine.name=deepspeed", "engine.zero=2")),
        Engine("zero3-2", 2, ("train.nproc=2", "engine.name=deepspeed", "engine.zero=3")),
    )
}


def jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may still be written, or end in half a line; none where there is no file."""
    try:
        data = path.read_bytes()
    except OSError:
        return []
    found = []
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def tensors_sha256(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor's bytes in a checkpoint's folder, by file and name: a header's length, the header, and the bytes (safetensors)."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                found[f"{path.name}:{name}"] = hashlib.sha256(data[begin:end]).hexdigest()
    return found


def committed(folder: Path) -> list[Path]:
    """Folders of a run's checkpoints that have their marker, oldest first."""
    return sorted(path.parent for path in (folder / "checkpoints").glob("step-*/COMMITTED"))


@dataclass(frozen=True)
class Undisturbed:
    """The oracle: what a run left that nothing was done to. `json`, a file of hashes, is all that later rows need of it."""

    tensors: dict[str, str]
    metrics: list[dict[str, Any]]
    samples: dict[str, list[Any]]  # "rank:position" -> what that rank was given there
    weights_sha256: str
    launch_s: float  # from the command to its first step
    step_s: float
    wall_s: float

    @classmethod
    def read(cls, folder: Path, orders: Path, launch_s: float = 0.0, step_s: float = 0.0, wall_s: float = 0.0) -> "Undisturbed":
        """Of a finished run; Broken where it says of itself that it is not."""
        try:
            summary = json.loads((folder / "summary.json").read_bytes())
        except OSError:
            raise Broken("the run left no summary.json, so it is not finished") from None
        metrics = [
            {key: value for key, value in row.items() if not any(word in key for word in TIMED)} for row in jsonl(folder / "metrics.jsonl")
        ]
        samples: dict[str, list[Any]] = {}
        for path in orders.glob("consumed-*.jsonl"):
            for row in jsonl(path):
                key = f"{int(path.stem.split('-')[1])}:{row['position']}"
                if samples.setdefault(key, row["samples"]) != row["samples"]:
                    raise Broken(f"rank:position {key} was given other samples the second time")
        return cls(tensors_sha256(committed(folder)[-1]), metrics, samples, summary["weights_sha256"], launch_s, step_s, wall_s)

    def differs(self, other: "Undisturbed", counted: tuple[str, ...] = ()) -> str | None:
        """How the other run differs from this one, in a word; None: in nothing. counted: metrics that count what was done to it, and may differ."""
        if self.tensors != other.tensors:
            names = sorted(name for name in self.tensors.keys() | other.tensors.keys() if self.tensors.get(name) != other.tensors.get(name))
            return f"{len(names)} of {len(self.tensors)} tensors differ, first {names[0]}"
        if self.weights_sha256 != other.weights_sha256:
            return "the summary's weights_sha256 differs"
        ours, theirs = ([{key: value for key, value in row.items() if key not in counted} for row in one.metrics] for one in (self, other))
        if ours != theirs:
            first, wrong = next(((a, b) for a, b in zip(ours, theirs, strict=False) if a != b), ({"step": "the last"}, {}))
            names = sorted(key for key in first.keys() | wrong.keys() if first.get(key) != wrong.get(key))
            return f"metrics.jsonl differs from step {first['step']} on ({len(ours)} and {len(theirs)} lines): {', '.join(names)}"
        if lost := sorted(self.samples.keys() - other.samples.keys()):
            return f"{len(lost)} batches were never consumed, first rank:position {lost[0]}"
        if other.samples != self.samples:
            return "samples were consumed in another order"
        return None


@dataclass
class Lab:
    """A folder in which runs are disturbed: corpus, recipe, and the undisturbed run of every engine, made on first use."""

    folder: Path
    say: Callable[[str], None] = lambda text: None
    sets: tuple[str, ...] = ()
    oracles: dict[Any, Undisturbed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.folder.absolute()
        corpus, hook = self.folder / "corpus", self.folder / "hook"
        for made in (corpus, hook):
            made.mkdir(parents=True, exist_ok=True)
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(path for path in library.glob("*.py") if 1_000 < path.stat().st_size < 8_000)[:FILES]
        if len(files) < FILES:
            raise RunError(
                f"{library} has {len(files)} source files of 1 to 8 kB and the fault matrix trains on {FILES}; use a whole Python"
            )
        for path in files:
            (corpus / path.name).write_bytes(path.read_bytes())
        self.recipe = self.folder / "faults.toml"
        self.recipe.write_text(RECIPE.format(corpus=json.dumps(str(corpus)), cache=json.dumps(str(self.folder / "cache"))))
        (hook / "sitecustomize.py").write_text("import gigatrain.bench.within\n\ngigatrain.bench.within.begin()\n")

    def undisturbed(self, engine: Engine, *sets: str) -> Undisturbed:
        """What a run leaves that nothing is done to; trained once, and kept as a file of hashes."""
        if (engine, sets) not in self.oracles:
            self.say(f"oracle: {engine.name} {' '.join(sets)}undisturbed")
            subject = Subject(self, engine, self.folder / f"oracle-{engine.name}-{len(self.oracles)}", sets)
            with subject:
                began = time.monotonic()
                subject.start()
                code = subject.ended(LIMIT_S)
                wall_s = time.monotonic() - began
                if code:
                    raise Broken(f"the undisturbed run ended with {code}: {subject.tail()}")
                events = subject.events()
                first = next(event for event in events if event["event"] == "report")
                last = [event for event in events if event["event"] == "report"][-1]
                launch_s = first["time_s"] - subject.began_s
                step_s = (last["time_s"] - first["time_s"]) / max(1, last["step"] - first["step"])
                found = Undisturbed.read(subject.folder, subject.orders, launch_s, step_s, wall_s)
            self.oracles[engine, sets] = found
            (self.folder / f"oracle-{engine.name}-{len(self.oracles) - 1}.json").write_text(json.dumps(found.__dict__, indent=1))
        return self.oracles[engine, sets]


class Subject:
    """One run under test: `start` its command as often as needed; leaving the `with` ends every process of it, and only those."""

    def __init__(self, lab: Lab, engine: Engine, folder: Path, sets: tuple[str, ...] = ()) -> None:
        self.lab, self.engine, self.folder, self.sets = lab, engine, folder, sets
        self.orders = folder.with_name(f"{folder.name}-orders")
        self.orders.mkdir(parents=True, exist_ok=True)
        self.mark = f"GIGATRAIN_FAULTS_ROW={uuid.uuid4().hex}"
        self.command: subprocess.Popen[bytes] | None = None
        self.lines: list[tuple[float, str]] = []  # what the command printed, and when, by the monotonic clock
        self.began_s = 0.0
        self.starts = self._orders = 0
        self._progress, self._events = Tail(folder / "logs" / "progress.jsonl"), []
        self._reader: threading.Thread | None = None

    def __enter__(self) -> "Subject":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def environment(self) -> dict[str, str]:
        """Of the command: our hook first on the path, one thread a rank, and this row's mark, by which its processes are known."""
        name, value = self.mark.split("=")
        path = os.pathsep.join((str(self.lab.folder / "hook"), str(Path(within.__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
        dropped = ("RANK", "WORLD_SIZE", "GIGATRAIN_ATTEMPT")
        environment = {key: text for key, text in os.environ.items() if key not in dropped}
        return environment | {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            within.FOLDER: str(self.orders),
            name: value,
        }

    def start(self, how: str = "--continue", *sets: str) -> None:
        """The command, as a user types it; it goes on if there is something to go on from, else it begins."""
        settings = ("export=false", *self.lab.sets, *self.engine.sets, *self.sets, *sets)
        command = [sys.executable, "-m", "gigatrain", "train", str(self.lab.recipe), "--run", str(self.folder), how]
        command += [part for one in settings for part in ("--set", one)]
        self.began_s = time.time()
        self.starts += 1
        self.command = subprocess.Popen(
            command,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self.command,), daemon=True)
        self._reader.start()

    def _read(self, command: "subprocess.Popen[bytes]") -> None:
        assert command.stdout is not None
        for line in command.stdout:
            self.lines.append((time.monotonic(), line.decode("utf-8", "replace").rstrip()))

    # ---- what it looks like from outside ----

    def events(self) -> list[dict[str, Any]]:
        """logs/progress.jsonl, of which each call reads only what is new."""
        rows, afresh = self._progress.rows()
        self._events = rows if afresh else self._events + rows
        return self._events

    def step(self) -> int:
        """The newest step that was reported, of whatever process; -1: none."""
        return next((event["step"] for event in reversed(self.events()) if event["event"] == "report"), -1)

    def process(self) -> str | None:
        """The name that the newest process of rank 0 gave itself."""
        events = self.events()
        return events[-1]["process"] if events else None

    def processes(self) -> frozenset[str]:
        """The names of all processes that were rank 0 so far."""
        return frozenset(event["process"] for event in self.events())

    def finished(self) -> bool:
        """Whether the run says that it is done."""
        return (self.folder / "summary.json").is_file()

    def pids(self) -> list[int]:
        """Every living process of this row: those with its mark in their environment."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError):
                words = (path / "environ").read_bytes().split(b"\0")
                if self.mark.encode() in words and (path / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                    found.append(int(path.name))
        return found

    def ranks(self) -> dict[int, int]:
        """Rank -> process id, by the mark with which each begins its log; those alone that live, so none while they start."""
        living, found = self.pids(), {}
        for path in (self.folder / "logs").glob("attempt-*/rank-*.log"):
            with contextlib.suppress(OSError):
                marks = _BEGINS.findall(path.read_text(encoding="utf-8", errors="replace"))
                if marks and int(marks[-1]) in living:
                    found[int(path.stem.removeprefix("rank-"))] = int(marks[-1])
        return found

    def tail(self, count: int = 3) -> str:
        """The last words of the command."""
        if self._reader is not None and self.command is not None and self.command.poll() is not None:
            self._reader.join(2)
        return " | ".join(line for _, line in self.lines[-count:])

    def said(self, *words: str) -> str | None:
        """The first line, of the command or of any rank's log, that has all of the words."""
        logged = (
            line
            for path in sorted((self.folder / "logs").glob("attempt-*/rank-*.log"))
            for line in path.read_text(errors="replace").splitlines()
        )
        return next((line for line in (*(line for _, line in self.lines), *logged) if all(word in line for word in words)), None)

    # ---- waiting, each time with a limit ----

    def until(self, what: Callable[[], Any], why: str, limit_s: float = LIMIT_S, *, alive: bool = True) -> Any:
        """Waits until `what` is true, and gives it. Broken where it takes too long, or where the command ends first (`alive`)."""
        assert self.command is not None
        end = time.monotonic() + limit_s
        while not (found := what()):
            if alive and self.command.poll() is not None:
                if found := what():
                    return found
                raise Broken(f"ended with {self.command.returncode} before {why}: {self.tail()}")
            if time.monotonic() > end:
                raise Broken(f"{why}: not within {limit_s:.0f} s: {self.tail()}")
            time.sleep(POLL_S)
        return found

    def ended(self, limit_s: float = LIMIT_S) -> int:
        """Waits for the command; its exit code, 128 + N of a signal."""
        assert self.command is not None
        try:
            code = self.command.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise Broken(f"it had not ended after {limit_s:.0f} s: {self.tail()}") from None
        return code if code >= 0 else 128 - code

    def alone(self, limit_s: float = 60.0) -> None:
        """Waits until no process of the run is left, as a scheduler does before it starts the next."""
        end = time.monotonic() + limit_s
        while self.pids():
            if time.monotonic() > end:
                raise Broken(f"{len(self.pids())} processes of it still live {limit_s:.0f} s after the command ended")
            time.sleep(0.02)

    # ---- doing ----

    def order(self, rank: int, **order: Any) -> None:
        """An order for the hook within a rank (within.py)."""
        self._orders += 1
        whole = self.orders / f"order-{rank:05d}-{self._orders}.json"
        part = whole.with_suffix(".part")
        part.write_text(json.dumps(order))
        part.rename(whole)

    def signal(self, pid: int, number: int) -> None:
        """A signal to one process; one that is gone already has met its fault."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def end(self) -> None:
        """Every process of this row, and nobody else's."""
        for _ in range(50):
            found = self.pids()
            for pid in found:
                self.signal(pid, signal.SIGCONT)
                self.signal(pid, signal.SIGKILL)
            if self.command is not None and self.command.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.command.wait(0.2)
            if not found:
                break
            time.sleep(0.02)
        if self._reader is not None:
            self._reader.join(2)
