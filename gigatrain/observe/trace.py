"""Where a step's time goes: seconds of each phase, step by step, and torch's profiler for the steps that the recipe names.

A mark says what begins here; it lasts until the next mark. So the phases of a step add up to the step, none twice, and a phase that comes again (one
forward per microbatch) is summed. On a CPU a mark is host time. On a GPU it is a CUDA event on the compute stream, whose time is asked for a window later,
so nobody waits: a phase is then what the compute stream spent or waited between two marks. What runs on other streams meanwhile is not counted: of a reduction
hidden behind the backward only the part that the compute stream waits for is seen, as `backward` where FSDP itself waits, as `reduce` where the engine
does. `data` is the time for which the device had nothing to do while the host made the batch. `paced` is what a run waits
to keep to its power budget, and `rest` what lies between the named phases.

RUN/trace/rank-RRRRR.jsonl, of rank 0 and of `profile.ranks`, one object a step; steps are counted from 0, as in `profile.steps`:

    {"step": 12, "start": 1790000000.123456, "phases": {"data": 0.000081, "forward": 0.0312, ...}}        start: seconds since 1970; phases: seconds

A step that was profiled says `"profiled": true`: the profiler slows it, and `summary` leaves it out. Beside it are, of those steps and ranks,

    step-SSSSSSSS-rank-RRRRR.json.gz      a Chrome trace: open it in ui.perfetto.dev; the phases are ranges in it
    memory-SSSSSSSS-rank-RRRRR.json.gz    with profile.memory on a GPU: the allocator's blocks and their history, as JSON and not pickled;
                                          torch.cuda._memory_viz.trace_plot(json.load(...)) draws it. A CPU has no such allocator, and its Chrome trace
                                          then has each allocation as an event.

A full disk or a profiler that fails is said once and never stops the training.
"""

import contextlib
import gzip
import json
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from gigatrain import config
from gigatrain.checkpoint import write_text
from gigatrain.observe.hang import Pulse
from gigatrain.observe.metrics import percentile

PHASES = ("data", "forward", "backward", "reduce", "optimizer", "validation", "checkpoint", "paced", "profile", "rest")
MEMORY_EVENTS = 200_000  # allocations and frees that a snapshot's history goes back, about 100 MB of JSON at most


class Trace:
    """What the loop and the engines tell their phases to; this one keeps nothing, and OFF is for engines without a loop."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, step: int) -> None:
        """Step `step`, counted from 0, begins here, and the one before it ends."""

    def mark(self, phase: str) -> None:
        """From here on it is `phase`, one of PHASES."""

    def phase(self, phase: str) -> "Phase":
        """`with` this, it is `phase`, and afterwards again what it was before."""
        return Phase(self, phase)

    @property
    def current(self) -> str:
        """The phase that it is now."""
        return "rest"

    def alive(self) -> None:
        """The phase goes on, and part of it is done."""

    def window(self) -> None:
        """Write the steps that have ended and whose times are known; waits for nothing."""

    def take(self) -> dict[str, float]:
        """Seconds by phase of the steps that were written since the last call, profiled ones left out."""
        return {}

    def spent(self) -> tuple[int, dict[str, float]]:
        """Steps whose times became known since the last call, and their seconds by phase, profiled ones left out."""
        return 0, {}

    def close(self) -> None:
        """The last step ends here, and all are written."""


OFF = Trace()


class Phase:
    """A phase as a `with` statement."""

    __slots__ = ("_after", "_name", "_trace")

    def __init__(self, trace: Trace, name: str) -> None:
        self._trace, self._name = trace, name

    def __enter__(self) -> None:
        self._after = self._trace.current
        self._trace.mark(self._name)

    def __exit__(self, *_: object) -> None:
        self._trace.mark(self._after)


class Pulsed(Trace):
    """The trace of a rank that does not record: it only counts its `Pulse` on."""

    def __init__(self, pulse: Pulse) -> None:
        self.pulse = pulse

    def begin(self, step: int) -> None:
        self.pulse.begin(step)
        self.pulse.phase = "rest"

    def mark(self, phase: str) -> None:
        self.pulse.mark(phase)

    @property
    def current(self) -> str:
        return self.pulse.phase

    def alive(self) -> None:
        self.pulse.beats += 1


class _Step(NamedTuple):
    first: int  # its first mark's place in the list
    step: int
    start_s: float
    profiled: bool


class Recorder(Pulsed):
    """The trace of a rank that records: marks in two lists within a window, resolved and written at its end."""

    def __init__(
        self,
        profile: config.Profile,
        folder: Path,
        device: torch.device,
        *,
        rank: int = 0,
        step: int = 0,
        say: Callable[[str], None] = print,
        pulse: Pulse | None = None,
        writes: bool = True,
    ) -> None:
        """`writes` false: the times are told to the run alone (`spent`)."""
        super().__init__(pulse or Pulse())
        self.folder, self.rank, self.say, self.device = folder / "trace", rank, say, device
        self.cuda = device.type == "cuda"
        self._due = frozenset(profile.steps) if rank in profile.ranks else frozenset()
        self._memory = profile.memory
        self._phases: list[str] = []  # what each mark began, and when: seconds, or a CUDA event
        self._times: list[Any] = []
        self._steps: list[_Step] = []
        self._ended = 0  # how many of them have an end, which is a mark too
        self._spare: list[torch.cuda.Event] = []
        self._now = self._event if self.cuda else time.perf_counter
        self._profiler: torch.profiler.profile | None = None
        self._range: torch.profiler.record_function | None = None
        self._failures: set[str] = set()
        self._taken: dict[str, float] = {}
        self._spent: tuple[int, dict[str, float]] = (0, {})
        self._file: Any = None
        if not writes:
            return
        with self._spared("trace"):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = _path(folder, rank)
            _drop_from(path, step)
            self._file = path.open("a", encoding="utf-8")

    def mark(self, phase: str) -> None:
        self.pulse.mark(phase)
        self._phases.append(phase)
        self._times.append(self._now())
        if self._profiler is not None:
            self._annotate(phase)

    def _event(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def current(self) -> str:
        return self._phases[-1] if self._phases else "rest"

    def begin(self, step: int) -> None:
        self._end()
        self.pulse.begin(step)
        profiled = step in self._due and self._profile()
        self._steps.append(_Step(len(self._phases), step, time.time(), profiled))
        self.mark("rest")

    def _end(self) -> None:
        """Of the step in progress, if there is one."""
        if self._ended == len(self._steps):
            return
        if self._profiler is not None:
            self.mark("profile")
            self._keep_profile(self._steps[-1].step)
        self.mark("rest")  # where nothing follows, the end of all
        self._ended += 1

    def window(self) -> None:
        lines: list[str] = []
        done = 0
        for at in range(self._ended):
            last = self._steps[at + 1].first - 1 if at + 1 < len(self._steps) else len(self._phases) - 1
            if self.cuda and not self._times[last].query():
                break  # still under way: the next window's
            lines.append(self._row(self._steps[at], last))
            done += 1
        if not done:
            return
        gone = self._steps[done].first if done < len(self._steps) else len(self._phases)
        if self.cuda:
            self._spare += self._times[:gone]
        del self._phases[:gone], self._times[:gone], self._steps[:done]
        self._steps = [step._replace(first=step.first - gone) for step in self._steps]
        self._ended -= done
        if self._file is not None:
            with self._spared("trace"):
                self._file.write("".join(lines))
                self._file.flush()

    def _row(self, step: _Step, last: int) -> str:
        seconds: dict[str, float] = {}
        marks = zip(self._phases[step.first : last], pairwise(self._times[step.first : last + 1]), strict=True)
        for phase, (begin, end) in marks:
            seconds[phase] = seconds.get(phase, 0.0) + (begin.elapsed_time(end) / 1e3 if self.cuda else end - begin)
        if not step.profiled:
            for into in (self._taken, self._spent[1]):
                for phase, value in seconds.items():
                    into[phase] = into.get(phase, 0.0) + value
            self._spent = (self._spent[0] + 1, self._spent[1])
        row: dict[str, Any] = {"step": step.step, "start": round(step.start_s, 6)}
        row["phases"] = {phase: round(value, 7) for phase, value in seconds.items()}
        return json.dumps(row | ({"profiled": True} if step.profiled else {})) + "\n"

    def take(self) -> dict[str, float]:
        taken, self._taken = self._taken, {}
        return taken

    def spent(self) -> tuple[int, dict[str, float]]:
        spent, self._spent = self._spent, (0, {})
        return spent

    def close(self) -> None:
        self._end()
        if self.cuda and self._times:
            self._times[-1].synchronize()
        self.window()
        if self._file is not None:
            with self._spared("trace"):
                self._file.close()

    def _profile(self) -> bool:
        """Starts torch's profiler; whether it did."""
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * self.cuda
        with self._spared("profile"):
            profiler = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=self._memory and not self.cuda)
            profiler.start()
            self._profiler = profiler
            if self._memory and self.cuda:
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")
        return self._profiler is not None

    def _annotate(self, phase: str) -> None:
        """The phases as ranges of the profiler's trace."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = torch.profiler.record_function(phase)
        self._range.__enter__()

    def _keep_profile(self, step: int) -> None:
        """Stops the profiler and writes what it saw; on a GPU this waits for the device, as a profiled step may."""
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        assert self._range is not None
        name = f"{step:08d}-rank-{self.rank:05d}.json"
        with self._spared("profile"):
            self._range.__exit__(None, None, None)
            profiler.stop()
        self._range = None
        with self._spared("profile"), tempfile.TemporaryDirectory(prefix=".profile-", dir=self.folder) as within:
            plain = Path(within) / f"step-{name}"
            profiler.export_chrome_trace(str(plain))
            _compress(plain, self.folder)
            if self._memory and self.cuda:
                plain = Path(within) / f"memory-{name}"
                snapshot = torch.cuda.memory._snapshot()
                torch.cuda.memory._record_memory_history(enabled=None)
                plain.write_text(json.dumps(snapshot, default=str), encoding="utf-8")
                _compress(plain, self.folder)

    def _spared(self, what: str) -> "_Spared":
        return _Spared(self, what)

    def failed(self, what: str, failure: BaseException) -> None:
        """Says, the first time, that there will be no trace, or no profile."""
        if what == "trace" and self._file is not None:
            with contextlib.suppress(OSError):  # it flushes once more, and fails once more
                self._file.close()
            self._file = None
        if what not in self._failures:
            self._failures.add(what)
            more = "times of phases are no longer kept" if what == "trace" else "that step has no profile"
            self.say(
                f"{what.upper()} NOT WRITTEN in {self.folder}: {type(failure).__name__}: {str(failure)[:200]}; {more}, training goes on"
            )


class _Spared:
    """Whatever goes wrong in it costs the trace and not the run."""

    def __init__(self, trace: Recorder, what: str) -> None:
        self.trace, self.what = trace, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, _: TracebackType | None) -> bool:
        if failure is None or not isinstance(failure, Exception):
            return False
        self.trace.failed(self.what, failure)
        return True


def opened(
    profile: config.Profile,
    folder: Path,
    device: torch.device,
    *,
    rank: int,
    ranks: int,
    step: int,
    say: Callable[[str], None],
    pulse: Pulse | None = None,
    times: bool = False,
) -> Trace:
    """This rank's trace: a Recorder for rank 0 and those of `profile.ranks`, and, if `times` are asked for, one that writes nothing for the others; else
    one that is only alive. `step`: how many the run has done already."""
    writers = {0, *profile.ranks}
    if rank == 0:  # what a resumed run lives through again, of ranks that no longer record; the others see to theirs
        for path in (folder / "trace").glob("rank-*.jsonl"):
            number = int(path.stem.removeprefix("rank-"))
            if number >= ranks or number not in writers:
                with contextlib.suppress(OSError):
                    _drop_from(path, step)
    if rank in writers or times:
        return Recorder(profile, folder, device, rank=rank, step=step, say=say, pulse=pulse, writes=rank in writers)
    return OFF if pulse is None else Pulsed(pulse)


class Share(NamedTuple):
    """One phase over many steps."""

    steps: int  # that had it
    median_s: float
    p99_s: float
    share: float  # of the time of all steps


def read(folder: Path) -> list[dict[str, Any]]:
    """Every step that any rank of the run in `folder` recorded, by step and rank, with its `rank`; a line that a kill cut short is left out."""
    rows = []
    for path in sorted((folder / "trace").glob("rank-*.jsonl")):
        rank = int(path.stem.removeprefix("rank-"))
        rows += [{"rank": rank, **row} for row, _ in _rows(path)]
    return sorted(rows, key=lambda row: (row["step"], row["rank"]))


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Share]:
    """Median, 99th percentile and share of the time, by phase and for the whole `step`; profiled steps are left out."""
    found: dict[str, array] = {}
    for row in rows:
        if not row.get("profiled"):
            for phase, seconds in (*row["phases"].items(), ("step", sum(row["phases"].values()))):
                found.setdefault(phase, array("d")).append(seconds)
    total = sum(found.get("step", ()))
    order = [phase for phase in (*PHASES, "step") if phase in found] + sorted(found.keys() - {*PHASES, "step"})
    return {
        phase: Share(
            len(found[phase]), percentile(found[phase], 0.5) or 0.0, percentile(found[phase], 0.99) or 0.0, sum(found[phase]) / total
        )
        for phase in order
    }


def _path(folder: Path, rank: int) -> Path:
    return folder / "trace" / f"rank-{rank:05d}.jsonl"


def _rows(path: Path) -> Iterable[tuple[dict[str, Any], str]]:
    """Whole lines of a file, read and as they are."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            if isinstance(row["step"], int) and row["phases"]:
                yield row, line
        except (ValueError, KeyError, TypeError):
            continue


def _drop_from(path: Path, step: int) -> None:
    """Forget steps that a resumed run will live through again, and a line that a kill cut short."""
    if path.exists():
        write_text(path, "".join(f"{line}\n" for row, line in _rows(path) if row["step"] < step))


def _compress(plain: Path, folder: Path) -> None:
    """A JSON file's compressed copy in `folder`, whole or absent; a profiler that ran out of disk leaves half a file, or none, without a word."""
    if not plain.is_file():
        raise OSError(f"the profiler left no {plain.name}: no space left?")
    packed = plain.with_name(f"{plain.name}.gz")
    with plain.open("rb") as file:
        file.seek(max(0, plain.stat().st_size - 16))
        if not file.read().rstrip().endswith(b"}"):
            raise OSError(f"the profiler left half of {plain.name}: no space left?")
    with plain.open("rb") as file, gzip.open(packed, "wb", compresslevel=3) as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
    packed.replace(folder / packed.name)
