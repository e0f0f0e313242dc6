"""Numbers of a run: kept on the device within a window, met by the host once a window, written as one JSON object a window."""

import json
import math
import os
import time
from array import array
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, distributed

from gigatrain import installed
from gigatrain.checkpoint import write_text
from gigatrain.errors import RunError
from gigatrain.objectives import figures
from gigatrain.observe.lines import Lines
from gigatrain.planning.plan import Plan


class Update(NamedTuple):
    """What a step did, summed over all ranks and equal on each: 0-d tensors on the device."""

    nats: Tensor  # sum of the cross entropies, fp64
    targets: Tensor  # how many they are, fp64
    grad_norm: Tensor  # global, before clipping
    fate: Tensor | None = None  # 0: applied, 1: refused, 2: held, to be made again (engines/judge.py)
    beside: Tensor | None = None  # sums that the objective reports behind its loss (objectives/figures.py), fp64; the first is of tokens


class Clock:
    """Durations of steps: host time on a CPU, CUDA events, which nobody waits for within a window, on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.stretches: list[list[Any]] = [[]]
        self.restart()

    def restart(self) -> None:
        """Begin a new stretch, so that what happened between two steps (validation, a save) is not part of one."""
        self.stretches.append([])
        self.mark()

    def mark(self) -> None:
        """A step ended here."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.stretches[-1].append(event)
        else:
            self.stretches[-1].append(time.perf_counter())

    def take_s(self) -> list[float]:
        """Seconds of each step since the last take; on a GPU the caller has synchronised."""
        pairs = [pair for marks in self.stretches for pair in pairwise(marks)]
        self.stretches = []
        self.restart()
        return [begin.elapsed_time(end) / 1e3 if self.cuda else end - begin for begin, end in pairs]


class Metrics:
    """Sums of a window on the device; `report` brings them to the host in one copy and writes them down."""

    def __init__(self, plan: Plan, folder: Path | None, device: torch.device, *, step: int, show: Callable[[dict[str, Any]], None]) -> None:
        """`folder` None: a rank that writes and shows nothing; what it counts is what every rank counts."""
        self.plan, self.folder, self.show = plan, folder, show
        self.sums = torch.zeros(
            6, dtype=torch.float64, device=device
        )  # nats, targets, norms, updates, largest norm; targets of the run, refused too
        self.beside = torch.zeros(
            figures.count(plan.objective), dtype=torch.float64, device=device
        )  # what the objective reports behind its loss
        self.unseen = torch.zeros((), dtype=torch.float64, device=device)  # targets of refused steps that the host has not looked at
        self.clock = Clock(device)
        self.step_s = array("d")
        self.timed = (0, 0.0)  # targets and seconds of steps, over every process of the run
        self.window_s, self.window_steps = 0.0, 0  # seconds of the steps of the last window, and how many were timed
        self.compile_s = 0.0  # of these, what the process's first step took beyond the others of its window
        self.tokens = 0  # of the whole run, as of the last report or `state`
        self.untimed = 0  # of `tokens`, those that another process timed
        self.validated = 0  # the last step whose validation was written
        self.last: dict[str, Any] = {}
        self.path, self.file, self.trackers = None, None, []
        if folder is not None:
            self.path = folder / "metrics.jsonl"
            self._drop_after(self.path, step)
            self.file = Lines(self.path)
            self.trackers = _trackers(plan, folder, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        for tracker in self.trackers:
            tracker.finish()

    def rewind(self, step: int, state: Mapping[str, Any]) -> None:
        """Back to `step`, where `state` was taken."""
        if self.file is not None and self.path is not None:
            self.file.close()
            self._drop_after(self.path, step)
            self.file = Lines(self.path)
        self.load(state)

    @staticmethod
    def _drop_after(path: Path, step: int) -> None:
        """Forget windows that a resumed run will live through again, and a line that a kill cut short."""
        if not path.exists():
            return
        data, kept = path.read_bytes(), []
        for line in data.decode("utf-8", "replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        text = "".join(f"{line}\n" for line in kept)
        if not data.startswith(text.encode()):
            write_text(path, text)
        elif len(data) > len(text.encode()):
            os.truncate(path, len(text.encode()))  # needs no room: a disk that filled up may be why the run begins again

    def add(self, update: Update) -> None:
        """One step's numbers; they stay where they are, and a step that was refused is left out of the sums, but not out of the tokens read; one that is
        held, of both."""
        nats, targets, norm = (number.double() for number in update[:3])
        numbers = torch.stack([nats, targets, norm, torch.ones_like(norm), norm])
        applied = torch.isfinite(numbers).all()
        beside, targets = (None, targets) if update.beside is None else (update.beside, update.beside[0])  # tokens, where targets are pairs
        if update.fate is not None:
            fate = update.fate.to(targets.device, non_blocking=True)
            applied, targets = applied & (fate == 0), torch.where(fate == 2, 0.0, targets)
            self.unseen += torch.where(fate == 1, targets, 0.0)
        numbers = torch.where(applied, numbers, 0.0)
        self.sums[:4] += numbers[:4]
        self.sums[4] = torch.maximum(self.sums[4], numbers[4])
        self.sums[5] += targets
        if beside is not None:
            self.beside += torch.where(applied, beside, 0.0)
        self.clock.mark()

    def looked(self, taken_back: bool) -> None:
        """The host has looked at the refused steps since its last look: they stay refused, or are made again and counted then."""
        if taken_back:
            self.sums[5] -= self.unseen
        self.unseen.zero_()

    def report(self, step: int, rate: float, bad: Tensor, beside: Callable[[int], Mapping[str, float | None]] | None = None) -> list[int]:
        """The one synchronisation of a window: writes and shows its numbers, and what `beside` says of its tokens; returns the engine's counts of refused
        updates."""
        nats, targets, norms, updates, largest, tokens, *rest = torch.cat([self.sums, self.beside, bad.double()]).tolist()
        beside_them, counts = rest[: len(self.beside)], rest[len(self.beside) :]
        durations = self.clock.take_s()
        seconds = self.window_s = sum(durations)
        self.window_steps = len(durations)
        usual_s = percentile(array("d", durations[1:]), 0.5)
        self.compile_s = max(0.0, durations[0] - usual_s) if usual_s is not None and not self.step_s else 0.0
        self.step_s.extend(durations)
        self.tokens = int(tokens)
        timed = self.tokens - self.untimed
        self.untimed = self.tokens
        self.timed = (self.timed[0] + timed, self.timed[1] + seconds)
        window = (
            {
                "step": step,
                "loss": nats / targets if targets else None,
                "grad_norm": norms / updates if updates else None,
                "grad_norm_max": largest if updates else None,
                "lr": self.plan.optim.lr * rate,
                "tokens": self.tokens,
                "tokens_per_s": timed / seconds if seconds else None,
                "step_s": seconds / len(durations) if durations else None,
                "bad_steps": int(counts[0]),
            }
            | figures.said(self.plan.objective, beside_them, targets)
            | dict(beside(self.tokens) if beside else {})
        )
        if self.clock.cuda:  # of this rank, since it began; the host has these numbers, so nobody waits
            window |= {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
        self.write(window)
        self.sums[:5].zero_()
        self.beside.zero_()
        return [int(count) for count in counts]

    def tokens_per_s(self) -> float | None:
        """Target tokens over the seconds of steps, over every process of the run."""
        return round(self.timed[0] / self.timed[1], 1) if self.timed[1] else None

    @property
    def written(self) -> tuple[Path, ...]:
        """Files that a checkpoint counts on."""
        return () if self.path is None else (self.path,)

    def sync(self) -> None:
        """Make what was written durable, before a checkpoint relies on it; what a disk refuses goes into the checkpoint."""
        if self.file is not None:
            self.file.sync()

    def state(self) -> dict[str, Any]:
        """The open window, so that a resumed run reports the numbers of an undisturbed one; waits for the device."""
        sums = self.sums.tolist()
        self.tokens = int(sums[5])
        kept = {"sums": sums, "last": self.last, "timed": list(self.timed), "validated": self.validated}
        kept |= {"beside": self.beside.tolist()} if len(self.beside) else {}
        return kept | ({"waiting": self.file.waiting} if self.file is not None and self.file.waiting else {})

    def load(self, state: Mapping[str, Any]) -> None:
        """Back into the window in which `state` was taken; an empty state is a new run's."""
        if state:
            self.sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
            self.beside.copy_(torch.tensor(state.get("beside", []), dtype=torch.float64))
            self.unseen.zero_()  # nothing is saved before it was looked at
            self.last, self.timed = dict(state["last"]), (state["timed"][0], state["timed"][1])
            self.validated = state["validated"]
            self.tokens = self.untimed = int(state["sums"][5])
            if self.file is not None:
                self.file.again(state.get("waiting", []))

    def write(self, window: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, the display and the trackers; a number that is not finite is written as null."""
        clean: dict[str, Any] = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in window.items()
        }
        self.last |= clean
        if self.file is None:
            return
        self.file.add(json.dumps(clean))
        self.show(dict(window))
        numbers = {key: value for key, value in clean.items() if key not in ("step", "val_sets") and value is not None}
        for name, said in clean.get("val_sets", {}).items():  # trackers take numbers, not tables
            numbers |= {f"val_sets/{name}/{key}": value for key, value in said.items() if value is not None}
        for tracker in self.trackers:
            tracker.log(numbers, step=int(window["step"]))


def _trackers(plan: Plan, folder: Path, step: int) -> list[Any]:
    """The trackers that the plan names, through accelerate's tracker interface."""
    if not plan.report.trackers:
        return []
    from accelerate import PartialState, tracking  # 0.3 s

    if not distributed.is_initialized():  # else it would meet others by a lone rank's environment, whose port its supervisor holds
        hidden = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
        try:
            PartialState(cpu=True)
        finally:
            os.environ.update(hidden)
    flat = {"plan_sha256": plan.sha256, "name": plan.name, "site": plan.site, "parameters": plan.parameters, "steps": plan.steps}
    found = []
    for name in plan.report.trackers:
        extra: dict[str, Any] = {"logging_dir": str(folder)} if name in ("tensorboard", "mlflow") else {}
        if name == "tensorboard" and step:
            extra["purge_step"] = step + 1  # what a resumed run lives through again
        if name == "wandb":
            extra = {"dir": str(folder), "name": folder.name}
        run_name = "tensorboard" if name == "tensorboard" else plan.report.project
        try:
            tracker = tracking.LOGGER_TYPE_TO_CLASS[name](run_name, **extra)
            tracker.start()
            tracker.store_init_configuration(flat)
        except ImportError as failure:
            raise RunError(
                f"report.trackers names {name!r}, which is not installed ({failure.name or failure}): pip install {name}, or --set report.trackers=[]"
            ) from None
        except Exception as failure:  # a tracker's own errors are of many types: a missing login, a server that is down
            raise RunError(
                f"report.trackers: {name!r} does not start: {type(failure).__name__}: {str(failure)[:300]}; mend it, or --set report.trackers=[]"
            ) from None
        found.append(tracker)
    return found


def percentile(values: array, share: float) -> float | None:
    """The value that `share` of the values do not exceed (nearest rank); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))]


def versions() -> dict[str, str]:
    """What decides a run's numbers and its speed: versions of Python and of the packages, threads and cores."""
    found = installed.versions("gigatrain", "torch", "triton", "transformers", "accelerate", "tokenizers", "safetensors")
    return {"python": found["python"], "threads": str(torch.get_num_threads()), "cores": str(os.cpu_count())} | found
