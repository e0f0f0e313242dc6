"""How the files of a checkpoint come to be, made durable and committed; also a process of its own, so it needs nothing but Python's standard library.

`perform` writes one rank's share of a checkpoint out of shared memory, and waits for nobody in the trainer: ranks meet in the folder. Each leaves the record
of its files beside them; the first rank of every `span` ranks joins their records into one, and rank 0 joins those, checks that the boxes of every tensor tile
it, writes the manifest, renames the folder and puts the commit marker into it last. So no rank reads more than `span` small files, 537 of 288,000 ranks.

Run by path (`python -I -S writing.py CONTROL ANSWER MEMORY PARENT`: four numbers) it is the process that writes beside a rank: `job OFFSET LENGTH` on the
control pipe names a job in the memory, `cancel ID` gives it up, and one line of JSON on the answer pipe says how it ended. It dies with the rank: by the
kernel's word, and at the end of the control pipe. Signals that end a run pass it by. The first 8 bytes of the memory count what it does, so that a rank can
tell one that works from one that is stuck.

All that touches the disk goes through `os`, one call after another: tests record the calls and cut them off at each.
"""

import contextlib
import errno
import hashlib
import json
import math
import mmap
import operator
import os
import queue
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

PIECE = 1 << 24  # bytes that are written and hashed at a time
POLL_S = (0.005, 0.5)  # between two looks for other ranks' records: at first, at most
MARGIN_BYTES = 1 << 20  # of manifest and folders
HEAD_BYTES = 4096  # of the memory: the counter
IGNORED = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXFSZ", "SIGTSTP", "SIGPIPE")
STEP = re.compile(r"step-(\d{8,})")
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
Record = dict[str, Any]


class Refused(Exception):
    """A save that cannot be: its words are for the user."""


class Cancelled(Exception):
    """A save that nobody waits for any more."""


class _Hash:
    """SHA-256 of pieces, in a thread beside the writing of them: both leave Python's lock alone."""

    def __init__(self) -> None:
        self.digest, self.bytes = hashlib.sha256(), 0
        self._pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._room = threading.Semaphore(3)  # pieces that are held at most
        self._thread: threading.Thread | None = None

    def add(self, piece: Any) -> None:
        self.bytes += (size := memoryview(piece).nbytes)
        if self._thread is None and size < PIECE // 16:
            self.digest.update(piece)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gigatrain-hash", daemon=True)
            self._thread.start()
        self._room.acquire()
        self._pieces.put(piece)

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self.digest.update(piece)
            del piece
            self._room.release()

    def end(self) -> str:
        if self._thread is not None:
            self._pieces.put(None)
            self._thread.join()
        return self.digest.hexdigest()


def write_file(path: str, pieces: Iterable[Any], beat: Callable[[], None] = lambda: None) -> Record:
    """Write a new file out of buffers and make it durable, hashing as it goes; returns {"bytes", "sha256"}."""
    hashed, written, begun = _Hash(), 0, 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            if not memoryview(piece).nbytes:
                continue
            left = memoryview(piece).cast("B")
            hashed.add(piece)
            while left:
                count = os.write(descriptor, left)
                written, left = written + count, left[count:]
            if written - begun >= PIECE:  # the disk begins while the next pieces come; what is not clean yet stays cached
                os.posix_fadvise(descriptor, begun, written - begun, os.POSIX_FADV_DONTNEED)
                begun = written
            beat()
        os.fsync(descriptor)
        beat()
    finally:
        os.close(descriptor)
        sha256 = hashed.end()
    return {"bytes": written, "sha256": sha256}


def write_text(path: str, text: str) -> Record:
    """Write a small file so that it is whole or absent: temporary name, sync, rename, sync of the folder."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):  # of a process with this one's number, long ago
        os.unlink(temporary)
    record = write_file(temporary, [text.encode()] if text else [])
    os.rename(temporary, path)
    sync_folder(folder)
    return record


def sync_folder(folder: str) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder or ".", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: str) -> None:
    """A folder and what is in it, without following links. Raises OSError."""
    with os.scandir(folder) as found:
        entries = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in found]
    for path, inner in entries:
        with contextlib.suppress(FileNotFoundError):
            remove(path) if inner else os.unlink(path)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(folder)


def prepare(parent: str, temporary: str, final: str) -> None:
    """A folder to write into, and room under names that a killed save, or a checkpoint that was refused, left behind; what killed saves left goes first,
    since the space for this one is counted after that."""
    _sweep(parent, max(steps(parent), default=-1), os.path.basename(temporary))
    if not os.path.isdir(parent):
        os.makedirs(parent, exist_ok=True)
        sync_folder(os.path.dirname(parent))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(final, "COMMITTED"))
    if os.path.lexists(final):
        remove(final)
    with contextlib.suppress(FileExistsError):  # another rank's process was faster
        os.mkdir(temporary)


def check_space(parent: str, need_bytes: int) -> None:
    """Raises Refused where the file system has no room for a checkpoint. A quota shows only when it is met."""
    found = os.statvfs(parent)
    free, need = found.f_bavail * found.f_frsize, need_bytes + MARGIN_BYTES
    if free < need:
        raise Refused(
            f"a checkpoint needs {need / 2**20:.0f} MiB and {parent} has {free / 2**20:.0f} MiB free; "
            "free some, or lower checkpoint.keep; earlier ones are untouched"
        )


def join(records: Iterable[Record]) -> Record:
    """What several ranks wrote, as one record."""
    files: dict[str, Any] = {}
    tensors: dict[str, dict[str, Any]] = {}
    for record in records:
        files |= record["files"]
        for group, named in record["tensors"].items():
            into = tensors.setdefault(group, {})
            for name, entry in named.items():
                known = into.setdefault(name, entry | {"pieces": []})
                assert [known["dtype"], *known["shape"]] == [entry["dtype"], *entry["shape"]], f"ranks differ on {name}"
                known["pieces"] = [*known["pieces"], *entry["pieces"]]
    return {"files": files, "tensors": tensors}


def commit(parent: str, temporary: str, final: str, manifest: Record) -> None:
    """Make a folder whose files are durable a checkpoint."""
    check(manifest)  # a gap, or a box that two ranks wrote, would make it useless
    written = write_text(os.path.join(temporary, "manifest.json"), json.dumps(manifest, sort_keys=True))
    os.rename(temporary, final)
    sync_folder(parent)
    write_text(os.path.join(final, "COMMITTED"), written["sha256"])


def check(manifest: Mapping[str, Any]) -> None:
    """Whether the boxes of every tensor tile it; raises ValueError, KeyError or TypeError where they do not."""
    for group, named in manifest["tensors"].items():
        for name, entry in named.items():
            if not tile(entry["shape"], [(piece["start"], piece["size"]) for piece in entry["pieces"]]):
                raise ValueError(f"the pieces of {group} {name} leave a gap in {list(entry['shape'])}, or lie one over another or outside")


def tile(shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether every element of a tensor lies in exactly one of the boxes, each a start and a size."""
    if any(operator.index(length) < 0 for length in shape):
        return False
    for start, size in boxes:
        if len(start) != len(shape) or len(size) != len(shape):
            return False
        if any(
            operator.index(first) < 0 or operator.index(count) < 0 or first + count > length
            for first, count, length in zip(start, size, shape, strict=True)
        ):
            return False
    if not boxes or sum(math.prod(size) for _, size in boxes) != math.prod(shape):
        return False
    if len(boxes) == 1 or 0 in shape:
        return True
    # Cells between the cuts of all boxes: what is a box in elements is a box in cells. As many elements as the tensor has, and no cell twice: all of it.
    at = []
    for dim in range(len(shape)):
        edges = sorted({edge for start, size in boxes for edge in (start[dim], start[dim] + size[dim])})
        at.append({edge: index for index, edge in enumerate(edges)})
    seen: set[int] = set()
    for start, size in boxes:
        cells = [0]
        for dim, (first, count) in enumerate(zip(start, size, strict=True)):
            along = range(at[dim][first], at[dim][first + count])
            cells = [cell * len(at[dim]) + index for cell in cells for index in along]
        before = len(seen)
        seen.update(cells)
        if len(seen) != before + len(cells):
            return False
    return True


def steps(parent: str) -> list[int]:
    """Steps with a commit marker, oldest first."""
    try:
        names = os.listdir(parent)
    except FileNotFoundError:
        return []
    found = (STEP.fullmatch(name) for name in names)
    return sorted(int(match[1]) for match in found if match and _there(os.path.join(parent, match[0], "COMMITTED")))


def _there(path: str) -> bool:
    """Whether a file is there, or may be: only a file system that says so has none."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def prune(parent: str, newest: int, keep: int, keep_every: int = 0) -> None:
    """Drop all but the newest `keep` and the multiples of `keep_every`, and what kills left; a folder that will not go (an export reads it) is for the
    next time."""
    committed = [step for step in steps(parent) if step <= newest]
    for step in committed[:-keep]:
        if not keep_every or step % keep_every or step == 0:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(parent, f"step-{step:08d}", "COMMITTED"))  # invisible first, so that a kill leaves no half of one
    _sweep(parent, newest)


def _sweep(parent: str, newest: int, but: str = "") -> None:
    """What killed saves left: folders that are being written but one, and steps up to `newest` without a marker."""
    with contextlib.suppress(OSError):
        for name in os.listdir(parent):
            match, folder = STEP.fullmatch(name), os.path.join(parent, name)
            half = match and int(match[1]) <= newest and not _there(os.path.join(folder, "COMMITTED"))
            if half or (name.startswith(".writing-") and name != but):
                with contextlib.suppress(OSError):
                    remove(folder)


def described(failure: BaseException) -> str:
    """A failure in words; of the system's, its name."""
    if isinstance(failure, OSError):
        return f"{errno.errorcode.get(failure.errno or 0, 'error')}, {failure.strerror}"
    return str(failure) if isinstance(failure, Refused) else f"{type(failure).__name__}, {failure}"


def span(ranks: int) -> int:
    """How many ranks' records are joined into one."""
    return ranks if ranks <= 64 else math.isqrt(ranks - 1) + 1


# ---- One rank's share of a save in the background ----


def perform(job: Record, memory: Any, beat: Callable[[str], None]) -> Record:
    """One rank's share of a checkpoint, and of rank 0 its commit; returns the record of the files, of rank 0 of all ranks'.

    `beat` hears what is being done, often, and may raise Cancelled. Raises OSError, Refused, Cancelled; then rank 0 removes the folder.
    """
    parent, rank = job["parent"], job["rank"]
    temporary, final = os.path.join(parent, job["temporary"]), os.path.join(parent, job["final"])
    try:
        record = _written(job, temporary, final, memory, beat)
    except (OSError, Refused) as failure:
        if rank:
            with contextlib.suppress(OSError):  # so that rank 0 need not wait; else its rank tells
                write_text(_record(temporary, rank), json.dumps({"failed": described(failure)}))
        else:
            _forget(temporary)
        raise
    except Cancelled:
        if not rank:
            _forget(temporary)
        raise
    if rank:
        return record
    try:
        for path in job.get("sync", ()):  # what the checkpoint counts on
            beat("syncs what was written before")
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        beat("commits")
        commit(parent, temporary, final, job["manifest"] | record)
    except BaseException:
        _forget(temporary)
        raise
    prune(parent, job["manifest"]["step"], job["keep"], job["keep_every"])
    return record


def _written(job: Record, temporary: str, final: str, memory: Any, beat: Callable[[str], None]) -> Record:
    rank, ranks = job["rank"], job["ranks"]
    if rank == 0:
        prepare(job["parent"], temporary, final)
        check_space(job["parent"], job["need_bytes"])
    else:
        os.makedirs(temporary, exist_ok=True)
    files = {}
    for name, begin, size in job["files"]:
        pieces = (memory[at : min(at + PIECE, begin + size)] for at in range(begin, begin + size, PIECE))
        files[name] = write_file(os.path.join(temporary, name), pieces, lambda: beat("writes"))
    for name, text in job["texts"].items():
        files[name] = write_text(os.path.join(temporary, name), text)
    sync_folder(temporary)
    record, each = {"files": files, "tensors": job["tensors"]}, span(ranks)
    if rank % each:
        write_text(_record(temporary, rank), json.dumps(record))
        return record
    record = join([record, *_awaited(temporary, range(rank + 1, min(rank + each, ranks)), beat)])
    if rank:
        write_text(_record(temporary, rank), json.dumps(record))
        return record
    return join([record, *_awaited(temporary, range(each, ranks, each), beat)])


def _awaited(folder: str, ranks: Iterable[int], beat: Callable[[str], None]) -> Iterable[Record]:
    """The records of other ranks as they come; each is removed once it is read."""
    for rank in ranks:
        path, pause = _record(folder, rank), POLL_S[0]
        while True:
            beat(f"waits for rank {rank}")
            try:
                with open(path, encoding="utf-8") as file:
                    found = json.load(file)
                break
            except FileNotFoundError:
                time.sleep(pause)
                pause = min(2 * pause, POLL_S[1])
        if "failed" in found:
            raise Refused(f"rank {rank}: {found['failed']}")
        os.unlink(path)
        yield found


def _record(folder: str, rank: int) -> str:
    return os.path.join(folder, f"record-{rank:05d}.json")


def _forget(folder: str) -> None:
    with contextlib.suppress(OSError):
        remove(folder)


# ---- The process ----


class _Process:
    def __init__(self, control: int, answer: int, memory: int) -> None:
        self.control, self.answer, self.memory = control, answer, memory
        self.jobs: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.cancelled = -1  # the highest job that is given up
        os.set_blocking(answer, False)

    def run(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            offset, size = self.jobs.get()
            memory = mmap.mmap(self.memory, 0)  # anew: it may have grown
            with memoryview(memory) as view:
                self._do(json.loads(bytes(view[offset : offset + size])), view)
            with contextlib.suppress(BufferError):  # a failure's frames still hold a piece; the mapping goes with them
                memory.close()

    def _listen(self) -> None:
        """Words come while a job runs; the end of the pipe is the end of the rank."""
        words = b""
        while data := os.read(self.control, 4096):
            *whole, words = (words + data).split(b"\n")
            for word in whole:
                what, *numbers = word.split()
                if what == b"job":
                    self.jobs.put((int(numbers[0]), int(numbers[1])))
                else:
                    self.cancelled = max(self.cancelled, int(numbers[0]))
        os._exit(0)

    def _do(self, job: Record, view: memoryview) -> None:
        began, counter, doing = time.monotonic(), view[:8].cast("Q"), [""]

        def beat(what: str) -> None:
            counter[0] += 1
            if job["id"] <= self.cancelled:
                raise Cancelled
            if what != doing[0]:
                doing[0] = what
                self._say({"id": job["id"], "doing": what})

        try:
            record = perform(job, view, beat)
            files = record["files"].values()
            found = {"ended": "written", "bytes": sum(file["bytes"] for file in files), "files": dict(list(record["files"].items())[:64])}
        except Cancelled:
            found = {"ended": "cancelled"}
        except BaseException as failure:  # all kinds: the rank is to hear of it
            found = {"ended": "failed", "why": described(failure)[:2000]}
        finally:
            counter.release()
        self._say({"id": job["id"], "seconds": round(time.monotonic() - began, 6)} | found, must=True)

    def _say(self, what: Record, *, must: bool = False) -> None:
        """A line for the rank, who reads at its reports; what it is doing now is told only where there is room."""
        data = json.dumps(what).encode() + b"\n"
        while data:
            try:
                data = data[os.write(self.answer, data) :]
            except BlockingIOError:
                if not must:
                    return
                select.select([], [self.answer], [], 1)


def main() -> None:
    """The process beside a rank."""
    control, answer, memory, parent = map(int, sys.argv[1:5])
    for name in IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that
            return
    os.nice(5)  # training comes first where cores are few
    _Process(control, answer, memory).run()


if __name__ == "__main__":
    main()
