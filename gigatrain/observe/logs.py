"""What each rank prints, in a file of its own, and its failure as a record: failed.py reads both. Free of torch.

    RUN/logs/attempt-000/rank-00003.log            all that rank 3 printed, also from C libraries; a new start of the same attempt is appended
    RUN/logs/attempt-000/errors/rank-00003.json    why it failed, as `record` writes it
    RUN/logs/attempt-000/errors/rank-00003-hang.txt   where it hung (observe/hang.py)
    RUN/logs/progress.jsonl                        by rank 0: when which step was done (`Progress`)

Rank 0 is on the screen too. A log begins and ends with a mark; one without its end is of a rank that was killed, or still runs. Before the run folder is
known to be this run's, nothing is written into it, except by a job's attempt (GIGATRAIN_ATTEMPT), whose folder of logs nobody else has.
"""

import contextlib
import datetime
import errno
import faulthandler
import json
import os
import platform
import re
import select
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from gigatrain.errors import REQUEUE, GigatrainError, RunError
from gigatrain.observe import hang
from gigatrain.observe.tee import UNREAD
from gigatrain.recovery import board

TRANSIENT = frozenset(  # of a parallel file system or a network that recovers
    getattr(errno, name)
    for name in (
        *(
            "EIO",
            "ESTALE",
            "ETIMEDOUT",
            "EAGAIN",
            "EBUSY",
            "EREMOTEIO",
            "ESHUTDOWN",
            "ENOTCONN",
            "ECONNRESET",
            "ECONNREFUSED",
            "ECONNABORTED",
        ),
        *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "EPIPE", "EPROTO"),
    )
    if hasattr(errno, name)  # Linux has all of them
)
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b.|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def attempt() -> int:
    """The number that a job gives to each of its starts (GIGATRAIN_ATTEMPT); 0 outside of jobs."""
    said = os.environ.get("GIGATRAIN_ATTEMPT", "0")
    if not (said.isascii() and said.isdecimal() and len(said) < 7):
        raise RunError(f"the environment's GIGATRAIN_ATTEMPT is {said[:40]!r} and no count; a job's script sets it, or unset it")
    return int(said)


def folder_of(run: Path, number: int) -> Path:
    """Where an attempt's logs are."""
    return run / "logs" / f"attempt-{number:03d}"


def newest(run: Path) -> int | None:
    """The last attempt that left logs; None: none did."""
    found = [path.name.removeprefix("attempt-") for path in (run / "logs").glob("attempt-*")]
    return max((int(name) for name in found if name.isdecimal()), default=None)


class Log:
    """This rank's log, as a `with` statement round all that it does; `own` says that the run folder is this run's, from where on it is written."""

    def __init__(self, run: Path, *, new: bool = False) -> None:
        """`new`: the run that the folder holds will be moved aside, so even a job's log waits until it is."""
        said = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
        self.rank, self.ranks = (int(text) if text.isdecimal() else 0 for text in said)  # what is no count is refused where ranks meet
        self.run, self.attempt = run.absolute(), attempt()
        self.folder = folder_of(self.run, self.attempt)
        self.path = self.folder / f"rank-{self.rank:05d}.log"
        self.node = platform.node() or "unknown"
        self.pulse = hang.Pulse()
        self.beat: board.Beat | None = None  # where a supervisor watches this rank
        self.owned = self._entered = self._faults = self._recorded = False
        self._waiting: list[str] = []  # lines that were shown before there was a file
        self.screen: TextIO | None = None  # a terminal, for what must be seen live
        self._early = "GIGATRAIN_ATTEMPT" in os.environ and not new
        self._before: tuple[int, int] | None = None
        self._tee: threading.Thread | None = None  # waits for the process that copies, and stands in for one that was killed
        self._alone = self._orphaned = self._leaving = False
        self._control = self._answer = -1
        self._file = -1
        self._turn = threading.Lock()
        self._environment: dict[str, str | None] = {}

    def __enter__(self) -> Self:
        self._entered = True
        self.beat = board.Beat(self.pulse, self.rank) if board.BOARD in os.environ else None
        for name, value in hang.environment(str(self.folder)).items():
            self._environment[name] = os.environ.get(name)
            os.environ.setdefault(name, value)
        if self.rank == 0:
            self._split()
        if self._early:
            self.own()
        return self

    def own(self) -> None:
        """From here on this rank's words go to its file, those that rank 0 said before included."""
        if self.owned or not self._entered:
            return
        try:
            (self.folder / "errors").mkdir(parents=True, exist_ok=True)
            for stale in (self.error, self.stuck):  # of an earlier process of this attempt, which the log still has
                stale.unlink(missing_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as failure:
            self._lost(failure)
            return
        self.owned = True
        self.mark("begins")
        self.write("".join(self._waiting))
        self._waiting.clear()
        if not faulthandler.is_enabled():  # a segmentation fault leaves its stacks too
            faulthandler.enable(self._file)
            self._faults = True
        if self.rank:
            self._redirect(self._file, self._file)
        else:
            self._tell(os.fsencode(self.path))
            if self._alone:
                self._point(self._file, self._file)

    @property
    def error(self) -> Path:
        return self.folder / "errors" / f"rank-{self.rank:05d}.json"

    @property
    def stuck(self) -> Path:
        return self.folder / "errors" / f"rank-{self.rank:05d}-hang.txt"

    @property
    def descriptor(self) -> int:
        """Of the file, for who writes past Python; -1 if there is none."""
        return self._file

    def write(self, text: str) -> None:
        """Into the file only, once there is one; a disk that refuses costs the line and not the run."""
        if self._entered and not self.owned:
            self._waiting.append(text)
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.write(self._file, text.encode("utf-8", "replace"))

    def mark(self, what: str, code: int | None = None) -> None:
        end, begin = "" if code is None else f": code {code}", ""
        with contextlib.suppress(OSError):  # a mark is a line of its own, whatever came before
            if self._file >= 0 and (size := os.fstat(self._file).st_size) and os.pread(self._file, 1, size - 1) != b"\n":
                begin = "\n"
        self.write(f"{begin}[gigatrain] rank {self.rank} of {self.ranks} on {self.node}, pid {os.getpid()}, {what} {_now()}{end}\n")

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None) -> None:
        code = _code(failure)
        left = (
            failure if isinstance(failure, SystemExit) and code not in (0, REQUEUE) else None
        )  # a library's, as rich's of a screen that is gone
        told = failure if isinstance(failure, Exception) else left
        record = self._failed(told) if told is not None else None
        self._restore()
        if self.owned:
            self.mark("ends", code)
        if self._faults:
            faulthandler.disable()
        if self.beat is not None:
            self.beat.end()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        for name, value in self._environment.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        if record is not None and left is None and self._said_elsewhere(record):
            sys.exit(code)

    def _said_elsewhere(self, record: Mapping[str, Any]) -> bool:
        """Whether the screen hears of this failure from another: our starter, the job's end, or the rank that this one lost."""
        if not self._recorded:  # a full disk: nobody else could tell
            return False
        return board.SPAWNED in os.environ or (self.rank > 0 and ("GIGATRAIN_ATTEMPT" in os.environ or record["secondary"]))

    def _failed(self, failure: BaseException) -> dict[str, Any]:
        """Into the log, and as a record for failed.py."""
        secondary = bool(getattr(failure, "secondary", False) or (getattr(failure, "shared", False) and self.rank > 0))
        lines = "".join(traceback.format_exception(failure))
        record = {
            "time": _now(),
            "time_s": time.time(),
            "monotonic_s": time.monotonic(),
            "rank": self.rank,
            "ranks": self.ranks,
            "node": self.node,
            "step": self.pulse.step,
            "phase": self.pulse.phase,
            "type": type(failure).__name__,
            "message": str(failure)[-20_000:],
            "traceback": lines[-100_000:],
            "ours": _ours(failure),
            "secondary": secondary,
            "transient": _transient(failure),
        }
        if self.beat is not None and isinstance(failure, GigatrainError) and not (secondary or record["transient"]):
            self.beat.failed_for_good()
        self.write(lines if record["ours"] else f"gigatrain: {failure}\n")
        if self.owned:
            with contextlib.suppress(OSError):  # a full disk; the log, or the screen, has it then
                whole = self.error.with_suffix(f".{os.getpid()}")
                try:
                    whole.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                    whole.replace(self.error)
                    self._recorded = True
                finally:
                    whole.unlink(missing_ok=True)
        return record

    def _split(self) -> None:
        """Rank 0: standard output and error go through a process that copies them to where they went and to the log."""
        out, errors, (control, self._control), (self._answer, answers) = os.pipe(), os.pipe(), os.pipe(), os.pipe()
        given = [out[0], errors[0], control, answers]
        begun = False
        try:
            command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("tee.py")), *map(str, given)]
            process = subprocess.Popen(command, pass_fds=given, stdin=subprocess.DEVNULL, start_new_session=True)
            begun = True
            if os.isatty(1):
                self.screen = os.fdopen(os.dup(1), "w", encoding=getattr(sys.stdout, "encoding", None) or "utf-8", errors="replace")
            self._redirect(out[1], errors[1])
            self._tee = threading.Thread(target=self._stand_in, args=(process, out[0], errors[0]), name="gigatrain-tee", daemon=True)
            self._tee.start()
        except OSError as failure:  # no processes, no memory
            self._close_pipes()
            self._lost(failure)
        finally:
            # Here too the pipes can be read from (`_stand_in`), so that a write meanwhile waits and does not fail.
            for descriptor in (control, answers, out[1], errors[1], *(() if begun else (out[0], errors[0]))):
                os.close(descriptor)

    def _stand_in(self, process: subprocess.Popen[bytes], out: int, errors: int) -> None:
        """Until the process that copies ends: if it was killed, words go into the log alone; if nobody reads the screen, as if it had never been."""
        code = process.wait()
        with self._turn:
            if not self._leaving and self._before is not None:
                unread = code == UNREAD
                if not unread:
                    said = f"gigatrain: the process that copies rank 0's words to the screen has ended ({code}); training goes on, and they are in {self.path}"
                    with contextlib.suppress(OSError):
                        os.write(self._before[1], f"{said}\n".encode())
                    self.write(f"{said}\n")
                    self._alone = True
                self._point(*((self._file, self._file) if self._alone and self._file >= 0 else self._before))
                self._orphaned = True
        if self._orphaned:  # what lies in the pipes, and what children print
            waiting = [out, errors]
            while waiting:
                for one in select.select(waiting, [], [])[0]:
                    if data := os.read(one, 1 << 16):
                        with contextlib.suppress(OSError):
                            os.write(1 if one == out else 2, data)
                    else:
                        waiting.remove(one)
        os.close(out)
        os.close(errors)

    def _point(self, out: int, errors: int) -> None:
        os.dup2(out, 1)
        os.dup2(errors, 2)

    def _tell(self, word: bytes) -> None:
        """To the process that copies (tee.py)."""
        if self._control >= 0:
            with contextlib.suppress(OSError):
                os.write(self._control, word + b"\0")

    def _redirect(self, out: int, errors: int) -> None:
        _flush()
        self._before = (os.dup(1), os.dup(2))
        self._point(out, errors)

    def _restore(self) -> None:
        _flush()
        with self._turn:
            self._leaving = True
            if self._before is not None:
                for number, saved in zip((1, 2), self._before, strict=True):
                    os.dup2(saved, number)
                    os.close(saved)
                self._before = None
        self._tell(b"")
        if self._tee is not None:
            if select.select([self._answer], [], [], 5)[0] and not os.read(self._answer, 1):
                self._tee.join(5)  # it has ended; else children that outlive us still print through it
            self._tee = None
        self._close_pipes()
        if self.screen is not None:
            self.screen.close()
            self.screen = None

    def _close_pipes(self) -> None:
        for descriptor in (self._control, self._answer):
            if descriptor >= 0:
                os.close(descriptor)
        self._control = self._answer = -1

    def _lost(self, failure: OSError) -> None:
        print(f"gigatrain: LOG NOT WRITTEN {self.path}: {failure.strerror}; training goes on", file=sys.stderr)


class Progress:
    """RUN/logs/progress.jsonl: what rank 0 knows of the run's time, one object an event, for `gigatrain watch`; metrics.jsonl has no clock in it.

    {"time_s": ..., "event": "start" | "steps" | "report" | "end", "attempt": 0, "ranks": 8, "process": "3f2a...", ...}: a process has the run; it begins to
    train at `step`; it did `step` steps and has seen `tokens`, and since the last event so much time went into each of `seconds`; it ended, and `why`.
    Written outside of steps; a disk that refuses costs lines and not the run.
    """

    def __init__(self, log: Log, run: Path | None) -> None:
        """`run` None: a rank that writes nothing."""
        self.log, self.why = log, "finished"
        self.path = None if run is None else run / "logs" / "progress.jsonl"
        self.process = os.urandom(6).hex()
        self.seconds: dict[str, float] = {}
        self.waiting: str | None = None  # of a run that is finished nothing is told, unless it trains again

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            if self.path is not None and json.loads((self.path.parent.parent / "summary.json").read_bytes()).get("wall_s") is not None:
                self.waiting = ""
        self.add("start", node=self.log.node)
        return self

    def __exit__(self, kind: type[BaseException] | None, failure: BaseException | None, _: TracebackType | None) -> None:
        self.add("end", why=self.why if kind is None else kind.__name__)

    @contextlib.contextmanager
    def spent(self, what: str) -> Iterator[None]:
        """The time inside went into `what`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.monotonic() - begin

    def report(self, step: int, tokens: int, training_s: float, compile_s: float = 0.0) -> None:
        """A window ended; its steps took `training_s`. What they waited for power or for data is not training, nor `compile_s` of a process's first step."""
        if compile_s:
            self.seconds["compile"] = self.seconds.get("compile", 0.0) + compile_s
        within_s = compile_s + sum(self.seconds.get(what, 0.0) for what in ("paced", "data"))
        self.seconds["training"] = self.seconds.get("training", 0.0) + max(0.0, training_s - within_s)
        self.add("report", step=step, tokens=tokens)

    def add(self, event: str, **more: Any) -> None:
        """An event, with the seconds spent since the last."""
        if self.path is None:
            return
        seconds, self.seconds = {what: round(spent, 4) for what, spent in self.seconds.items()}, {}
        row = {
            "time_s": round(time.time(), 3),
            "event": event,
            "attempt": self.log.attempt,
            "ranks": self.log.ranks,
            "process": self.process,
        }
        line = json.dumps(row | more | ({"seconds": seconds} if seconds else {})) + "\n"
        if self.waiting is not None:
            if event != "steps":
                self.waiting += line
                return
            line, self.waiting = self.waiting + line, None
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                if file.seek(0, os.SEEK_END):  # a line that a kill cut short is not glued to this one
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else f"\n{line}"
                file.write(line.encode())


def printable(text: str) -> str:
    """Without what would move the cursor or colour a terminal: words of a rank, a model or a file name are shown, not obeyed."""
    return _CONTROL.sub("", text)


def _ours(failure: BaseException) -> bool:
    """Whether it is a mistake of ours, whose traceback is needed; what a user can mend is said in a message."""
    named = isinstance(failure, OSError) and failure.strerror is not None
    return not (isinstance(failure, (GigatrainError, MemoryError, KeyboardInterrupt)) or named)


def _transient(failure: BaseException) -> bool:
    """Whether its cause may be gone the next time: it says so itself, or a network or a shared file system failed somewhere below it."""
    seen: set[int] = set()
    ahead: list[BaseException | None] = [failure]
    while ahead:
        one = ahead.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if getattr(one, "transient", False) or (isinstance(one, OSError) and one.errno in TRANSIENT):
            return True
        ahead += [one.__cause__, one.__context__]
    return False


def _code(failure: BaseException | None) -> int:
    if failure is None:
        return 0
    if isinstance(failure, SystemExit):
        return failure.code if isinstance(failure.code, int) else int(failure.code is not None)
    return 130 if isinstance(failure, KeyboardInterrupt) else getattr(failure, "exit_code", 1)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
