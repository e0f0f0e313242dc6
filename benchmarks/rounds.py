"""Alternating rounds of programs that train: a `Gate` in each worker, which holds its loop between rounds, and a `Peer` for it in the parent.

Providers are processes of their own, and one works at a time. A round is steps that nobody times and steps that are timed together, from synchronised
device to synchronised device; then the next provider has its round. step.py, tune.py and power.py measure with it.
"""

import contextlib
import csv
import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gigatrain.bench.board import processor
from gigatrain.errors import RunError

# ---- In a worker ----


class Over(Exception):
    """The parent has no further round; it is raised where a step would begin, so that every peer's loop ends there."""


class Gate:
    """Lets a training loop run as many steps as the parent says, and holds it between rounds.

    The loop calls `begin` where a step begins, when all the work of the step before is issued, and `add` with every loss. Make one when all is
    imported: memory is counted from here.
    """

    def __init__(self, pipe: Any, device: str) -> None:
        import torch

        from gigatrain.observe.metrics import Clock

        self.pipe, self.device, self.torch = pipe, torch.device(device), torch
        self.made, self.imported_bytes = time.perf_counter(), _status("VmRSS")
        self.skip = self.steps = self.begun = 0
        self.clock, self.began, self.mhz = Clock(self.device), 0.0, None
        self.losses: list[list[tuple[Any, float]]] = []

    def begin(self) -> None:
        """A step begins: at the end of a round, answer and wait for the next order."""
        if self.begun == self.skip + self.steps:
            self._answer()
            line = sys.stdin.readline()
            if not line:
                raise Over
            order = json.loads(line)
            self.skip, self.steps, self.begun, self.losses = order["skip"], order["steps"], 0, []
        if self.begun == self.skip:
            self.mhz = self._clock_mhz() if self.skip else None  # before waiting: while the device works
            self._synchronise()
            self.clock.take_s()  # of steps that nobody times
            self.began = time.perf_counter()
        self.begun += 1
        self.losses.append([])

    @property
    def last(self) -> bool:
        """The step in progress is the last of its round: the one to report in."""
        return self.begun == self.skip + self.steps

    def add(self, loss: Any, share: float = 1.0) -> None:
        """`share` times a tensor, which stays where it is, is part of this step's mean loss."""
        self.losses[-1].append((loss.detach(), share))

    def mark(self) -> None:
        """A part of the step ends here; the parent gets the seconds between marks."""
        self.clock.mark()

    def _clock_mhz(self) -> int | None:
        import pynvml

        if self.device.type != "cuda":
            return None
        try:
            return self.torch.cuda.clock_rate()
        except pynvml.NVMLError:  # a MIG slice does not tell
            return None

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def _answer(self) -> None:
        self._synchronise()
        now, cuda = time.perf_counter(), self.device.type == "cuda"
        answer: dict[str, Any] = {
            "seconds": now - (self.began or self.made),
            "losses": [sum(float(loss) * share for loss, share in step) for step in self.losses],
            "intervals": self.clock.take_s(),
            "clock_mhz": self.mhz,
            "peak_bytes": self.torch.cuda.max_memory_allocated() if cuda else _status("VmHWM") - self.imported_bytes,
        }
        if not self.began:
            device = self.torch.cuda.get_device_name() if cuda else f"{len(os.sched_getaffinity(0))} cores of {processor()}"
            answer |= {"device": device, "versions": _versions()}
        if cuda:
            self.torch.cuda.empty_cache()  # all workers share the device; the settling steps take the blocks back
        _say(self.pipe, answer)


def _status(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes; ru_maxrss would not do, as a child inherits its parent's."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))


def _versions() -> dict[str, str]:
    from gigatrain import installed
    from gigatrain.observe.metrics import versions

    return versions() | installed.versions("liger-kernel", "litgpt", "lightning")


def _say(pipe: Any, answer: dict[str, Any]) -> None:
    pipe.write(json.dumps(answer) + "\n")
    pipe.flush()


def work(provider: Callable[[dict[str, Any], Any], None]) -> None:
    """A worker's life: one JSON line in with the job, then `provider(job, pipe)` answers every order, until the parent closes the pipe."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    job = json.loads(sys.stdin.readline())
    try:
        provider(job, pipe)
    except Over:
        return
    except BaseException as failure:  # whatever it is, it becomes this provider's line in the table
        traceback.print_exc()
        _say(pipe, {"error": f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"})


# ---- In the parent ----


class Failed(Exception):
    """A provider that failed: the message is its line in the table."""


@dataclass
class Peer:
    """One provider: its worker, and what it answered."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    ready: dict[str, Any] = field(default_factory=dict)
    warmup_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    def ask(self, skip: int, steps: int, timeout_s: float) -> dict[str, Any]:
        """Let it make `skip` steps and `steps` that are timed; raises Failed."""
        with contextlib.suppress(BrokenPipeError):
            self.tell({"skip": skip, "steps": steps})
        answer = self.answer(timeout_s)
        self.losses += answer["losses"]
        return answer

    def tell(self, order: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self, timeout_s: float) -> dict[str, Any]:
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], timeout_s)[0]:
            self.close()
            raise Failed(f"no answer within {timeout_s:.0f} s; give it more with --timeout")
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the worker ended with status {self.process.wait()}: {_last_line(self.log)}"}
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        """End the worker: it leaves at the closed pipe, or is killed."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


@contextlib.contextmanager
def noted(peer: Peer, say: Callable[[str], None]) -> Iterator[None]:
    """A failure in here is kept as the provider's, and said."""
    try:
        yield
    except Failed as failure:
        peer.error = str(failure)
        say(f"{peer.name} FAILED: {failure}")


def start(program: str, name: str, device: str, job: dict[str, Any], folder: Path) -> Peer:
    """Start a provider's worker, `program --worker`, and hand it its job; its log lies in `folder`."""
    base, *options = name.split("+")
    folder.mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if device == "cuda":  # Trainer would spread over every GPU that it sees
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, program, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
        )
    peer = Peer(name, process, log)
    with contextlib.suppress(BrokenPipeError):
        peer.tell({**job, "provider": base, "options": options, "folder": str(folder)})
    return peer


def ratio(slow: Peer | None, fast: Peer) -> float | None:
    """How many times as fast: the median of the rounds' own ratios."""
    return None if slow is None else round(float(np.median([a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)])), 3)


def revision() -> str:
    """The checkout's commit, `+changes` where files differ from it; `unknown` without git."""

    def git(*words: str) -> str:
        ended = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return ended.stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if git("status", "--porcelain") else "")


def append(rows: list[dict[str, Any]], path: Path) -> None:
    """Add rows to a CSV file; RunError if it has other columns."""
    if not rows:
        return
    columns = list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            if (header := next(csv.reader(file))) != columns:
                raise RunError(
                    f"{path} has other columns ({', '.join(sorted(set(header) ^ set(columns))) or 'in another order'}); name another --out"
                )
    with path.open("a", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)
