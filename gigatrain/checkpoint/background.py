"""Files that a process of its own writes while training goes on: the state is copied into memory that both share, and the trainer is free again.

The memory has no name (memfd), so that it goes with its processes however these end. On a GPU it is pinned, and copies run on a stream of their own: the host
waits for none of them, and the next update waits on the device (`before_change`). A thread, which waits for the copies, sends the job; what the job says is
in writing.py. One job at a time: the memory is written again only when nobody reads it.
"""

import contextlib
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gigatrain.checkpoint import writing
from gigatrain.checkpoint.files import flat, header_of
from gigatrain.errors import CheckpointError

STUCK_S = 600.0  # a process that does nothing for so long is ended
_GROUPS = Path("/sys/fs/cgroup")
_SPARE_BYTES = 256 << 20  # of memory, that staging leaves free


@dataclass(frozen=True)
class Staged:
    """Whole files in the shared memory, each a name, where it begins, and its bytes."""

    files: tuple[tuple[str, int, int], ...]
    end: int  # of what is used

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(size for _, _, size in self.files)


@dataclass(frozen=True)
class Outcome:
    """How a job ended: `why` is None where all is written. `files`: bytes and SHA-256 of each (64 at most)."""

    why: str | None
    bytes: int = 0
    seconds: float = 0.0
    files: Mapping[str, Any] = field(default_factory=dict)
    given_up: bool = False  # it was told to


class Writer:
    """The process that writes beside this rank, and the memory that they share.

    `stage` tensors, `write` them into a folder, hear the `outcome`. The process begins with the first job and again after it was killed; `close` ends it.
    """

    def __init__(self, device: torch.device | str = "cpu", *, stuck_s: float = STUCK_S) -> None:
        self.device, self.stuck_s = torch.device(device), stuck_s
        self.doing = ""  # by its own words
        self.pinned: bool | None = None  # None: no accelerator, or nothing staged yet
        self._file, self._size = -1, 0
        self._map: mmap.mmap | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._process: subprocess.Popen[bytes] | None = None
        self._control = self._answer = -1
        self._words = b""
        self._jobs, self._job = 0, 0  # given so far; the one that runs, or 0
        self._beats, self._beat_s = 0, 0.0
        self._why: str | None = None  # what ended the process from here
        self._stream: Any = None
        self._copied: Any = None
        self._waits: Any = None  # events before and behind the device's waiting for the copies
        self._sending: threading.Thread | None = None

    # ---- Staging ----

    def room(self, size_bytes: int) -> str | None:
        """Why there is no memory for so many bytes; None if there is."""
        more = size_bytes - self._size
        free = _free_bytes()
        if free is None or more <= 0 or more + _SPARE_BYTES <= free:
            return None
        return f"staging needs {size_bytes / 2**20:,.0f} MiB of this node's memory, and {free / 2**20:,.0f} MiB are free"

    def stage(self, files: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]]) -> Staged:
        """Copy tensors, as the safetensors files that they will be, with their metadata. Their values are those of this moment; on a GPU, once
        `before_change` has been called ahead of the next write to them. Raises CheckpointError where there is no memory."""
        assert not self.busy, "one job at a time"
        headers = {name: header_of(tensors, metadata) for name, (tensors, metadata) in files.items()}
        placed, at = [], writing.HEAD_BYTES
        for name, (text, size) in headers.items():
            placed.append((name, at, len(text) + size))
            at += -(-(len(text) + size) // 4096) * 4096
        self._reserve(at + (1 << 20) + 1024 * sum(len(tensors) for tensors, _ in files.values()))  # and of the job's own text
        sources: list[tuple[Tensor, int]] = []
        for name, begin, _ in placed:
            text, _ = headers[name]
            self._put(text, begin)
            into = begin + len(text)
            for tensor in files[name][0].values():
                sources.append((flat(tensor), into))
                into += sources[-1][0].numel()
        self._copy(sources)
        return Staged(tuple(placed), at)

    def _copy(self, sources: list[tuple[Tensor, int]]) -> None:
        self._copied = self._waits = None
        if self.device.type != "cuda":
            for source, at in sources:
                self._bytes[at : at + source.numel()].copy_(source)
            return
        self._stream = self._stream or torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for source, at in sources:
                self._bytes[at : at + source.numel()].copy_(source, non_blocking=True)
                if source.is_cuda:
                    source.record_stream(self._stream)  # a copy that was made to have its bytes in order is not given away before
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)

    def before_change(self) -> None:
        """What follows on the device waits until all is copied; the host does not."""
        if self._copied is None or self._waits is not None:
            return
        stream = torch.cuda.current_stream(self.device)
        self._waits = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._waits[0].record(stream)
        stream.wait_event(self._copied)
        self._waits[1].record(stream)

    def waited_s(self) -> float:
        """Seconds that the device stood in `before_change` for the last staging, once it is known without waiting; else 0."""
        return self._waits[0].elapsed_time(self._waits[1]) / 1e3 if self._waits is not None and self._waits[1].query() else 0.0

    def _put(self, data: bytes, at: int) -> None:
        assert self._map is not None
        self._map[at : at + len(data)] = data

    def _reserve(self, size: int) -> None:
        """Make the memory that large. Its pages are taken here, the first time, and kept."""
        if size <= self._size:
            return
        if why := self.room(size):
            raise CheckpointError(f"{why}; set checkpoint.background = false")
        try:
            if self._file < 0:
                self._file = os.memfd_create("gigatrain-checkpoint")
            os.posix_fallocate(self._file, 0, size)
            self._unpin()
            self._bytes = torch.empty(0, dtype=torch.uint8)
            self._map = mmap.mmap(self._file, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        except OSError as failure:
            raise CheckpointError(
                f"{size / 2**20:,.0f} MiB of this node's memory for staging: {failure.strerror}; set checkpoint.background = false"
            ) from None
        self._size = size
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        if self.device.type == "cuda":
            self.pinned = int(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), size, 0)) == 0  # type: ignore[union-attr]

    def _unpin(self) -> None:
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())  # type: ignore[union-attr]
            self.pinned = None

    # ---- Writing ----

    def write(self, staged: Staged, folder: Path, **more: Any) -> None:
        """Begin to write what is staged as `folder`, alone or, with what saves.py adds, as one of many ranks.

        Raises CheckpointError where no process starts.
        """
        assert not self.busy, "one job at a time"
        self._start()
        self._jobs += 1
        job = {
            "id": self._jobs, "parent": str(folder.parent), "final": folder.name, "temporary": f".writing-{folder.name}-{os.getpid()}-{self._jobs}",
            "rank": 0, "ranks": 1, "files": staged.files, "texts": {}, "tensors": {}, "sync": [], "manifest": {}, "need_bytes": staged.bytes,
            "keep": 1, "keep_every": 0,
        }  # fmt: skip
        text = json.dumps(job | more).encode()
        if self._copied is not None and staged.end + len(text) > self._size:
            self._copied.synchronize()  # memory that is copied into is not moved
        self._reserve(staged.end + len(text))
        self._put(text, staged.end)
        self._job, self._beats, self._beat_s, self.doing = self._jobs, self._counted(), time.monotonic(), ""
        word = b"job %d %d\n" % (staged.end, len(text))
        if self._copied is None:
            self._tell(word)
            return
        self._sending = threading.Thread(target=self._sent, args=(self._copied, word), name="gigatrain-staged", daemon=True)
        self._sending.start()

    def _sent(self, copied: Any, word: bytes) -> None:
        torch.cuda.set_device(self.device)
        copied.synchronize()
        self._tell(word)

    @property
    def busy(self) -> bool:
        """A job runs, as far as was heard."""
        return self._job > 0

    def outcome(self, wait_s: float = 0.0) -> Outcome | None:
        """How the job ended; None while it runs. Waits for at most `wait_s`."""
        end = time.monotonic() + wait_s
        while self.busy:
            if found := self._heard(max(0.0, end - time.monotonic())):
                self._job = 0
                return found
            if time.monotonic() >= end:
                self._watch()
                return None
        return None

    def _heard(self, wait_s: float) -> Outcome | None:
        """The next that the process says, if it is the end of its job."""
        if b"\n" not in self._words:
            if not select.select([self._answer], [], [], wait_s)[0]:
                return None
            data = os.read(self._answer, 1 << 16)
            if not data:
                return self._gone()
            self._words += data
        while b"\n" in self._words:
            line, self._words = self._words.split(b"\n", 1)
            said = json.loads(line)
            if said["id"] != self._job:
                continue
            if "doing" in said:
                self.doing = said["doing"]
            elif said["ended"] == "written":
                return Outcome(None, said["bytes"], said["seconds"], said["files"])
            else:
                return Outcome(said.get("why") or "it was given up", seconds=said["seconds"], given_up=said["ended"] == "cancelled")
        return None

    def _gone(self) -> Outcome:
        """The process has ended by itself."""
        assert self._process is not None
        code = self._process.wait()
        why = self._why or (signal.Signals(-code).name if code < 0 else f"exit code {code}")
        pid = self._process.pid
        self._forget()
        return Outcome(f"the process that writes checkpoints ({pid}) was ended: {why}; the next save starts another")

    def _watch(self) -> None:
        """End a process that is stuck. One that waits for a disk dies when the disk answers."""
        now, beats = time.monotonic(), self._counted()
        if beats != self._beats:
            self._beats, self._beat_s = beats, now
        elif self._why is None and now - self._beat_s > self.stuck_s and (self._copied is None or self._copied.query()):
            self.kill(f"it did nothing for {now - self._beat_s:.0f} s ({self.doing or 'nothing said'})")

    @property
    def still_s(self) -> float:
        """Seconds since the process was last seen to do anything."""
        self._watch()
        return time.monotonic() - self._beat_s if self.busy else 0.0

    def _counted(self) -> int:
        return int.from_bytes(self._map[:8], sys.byteorder) if self._map is not None else 0

    def cancel(self) -> None:
        """Give the job up; its outcome still comes."""
        if self.busy:
            self._tell(b"cancel %d\n" % self._job)

    def kill(self, why: str = "SIGKILL") -> None:
        """End the process; the outcome of its job says why."""
        if self._process is not None:
            self._why = why
            self._process.kill()

    def _start(self) -> None:
        if self._process is not None and self._why is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            if self._process.poll() is None:
                raise CheckpointError(f"the process that writes checkpoints was ended ({self._why}) and still hangs in a call to the disk")
        if self._process is not None and self._process.poll() is None:
            return
        self._forget()
        self._reserve(writing.HEAD_BYTES)
        theirs, self._control = os.pipe()
        self._answer, ours = os.pipe()
        given = (theirs, ours, self._file)
        try:
            command = [sys.executable, "-I", "-S", str(Path(writing.__file__)), *map(str, given), str(os.getpid())]
            self._process = subprocess.Popen(command, pass_fds=given, stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as failure:
            raise CheckpointError(f"no process to write checkpoints can be started: {failure.strerror}") from None
        finally:
            os.close(theirs)
            os.close(ours)

    def _tell(self, word: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, which its outcome tells
            os.write(self._control, word)

    def _forget(self) -> None:
        for descriptor in (self._control, self._answer):
            if descriptor >= 0:
                os.close(descriptor)
        self._control = self._answer = -1
        self._process, self._words, self._why = None, b"", None

    def close(self) -> None:
        """End the process, whatever it does, and give the memory back. Waits a second at most: one that hangs in the disk ends with its call."""
        if self._sending is not None:
            self._sending.join(1)
        process, self._job = self._process, 0
        if process is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        self._forget()
        if self._map is not None:
            self._unpin()
            self._bytes, self._map = torch.empty(0, dtype=torch.uint8), None
        if self._file >= 0:
            os.close(self._file)
        self._file, self._size = -1, 0


def _free_bytes() -> int | None:
    """Memory of this node, or of this process's control group, that can be taken; None: not said."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo", encoding="ascii") as file:
        found.append(1024 * int(next(line for line in file if line.startswith("MemAvailable:")).split()[1]))
    for most, now in _group_files():
        with contextlib.suppress(OSError, ValueError):  # no limit is "max", or no file
            found.append(int(most.read_text()) - int(now.read_text()) + _dropped_bytes(most.with_name("memory.stat")))
    return min(found, default=None)


def _dropped_bytes(stat: Path) -> int:
    """Of a control group's memory, what holds files that nobody uses: it is given up for others."""
    rows = dict(line.split() for line in stat.read_text(encoding="ascii").splitlines())
    return int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))


def _group_files() -> list[tuple[Path, Path]]:
    """The limit and the use of every control group that this process is in, from its own up to the root: a job's, of Slurm, lies in between."""
    found: list[tuple[Path, Path]] = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, kinds, inner = line.split(":", 2)
            if kinds not in ("", "memory"):
                continue
            top, names = (_GROUPS, ("memory.max", "memory.current"))
            if kinds:  # version 1
                top, names = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            at = top / inner.lstrip("/")
            for folder in (at, *at.parents):
                if folder.is_relative_to(top):
                    found.append((folder / names[0], folder / names[1]))
    return found
