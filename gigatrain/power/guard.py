"""Power limits of this node's accelerators: set where the recipe says `power.caps`, and put back as they were found, whatever dies.

    leaves the `with`, an exception, Ctrl-C      this process puts them back
    this process killed, or its whole group      restore.py, a process in a session of its own, sees its pipe end and puts them back
    that process killed                          this one starts another
    both killed (a job's cgroup, SIGKILL)        a record on this node stays: the next run here, or `python -m gigatrain.power.guard --restore` puts them back
    the node restarts                            the driver forgets limits; the record is void by its boot id

Root (or CAP_SYS_ADMIN) is needed to set limits. A limit is never set above what was found.

A node's epilog, as root, runs `--restore` for runs that are root's. What a run of another user (with CAP_SYS_ADMIN) left it names; with `--others` it sets such
a limit to the driver's default. Never to a number of that user's record: who may not set limits could forge one, and gets no more by it than the default, and
that only if his record names the limit that is set. A site whose own limits are below the driver's default does not use `--others`, but sets its limits in the
epilog: `nvidia-smi -pl WATTS`. That is also the way out of a container: its /dev/shm is its own, so the record goes with it, while the limit stays.
"""

import argparse
import contextlib
import errno
import fcntl
import os
import re
import select
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gigatrain.errors import PowerError
from gigatrain.power import restore
from gigatrain.power.restore import NO_PERMISSION, Limits, Refused

_UUID = re.compile(r"GPU-[0-9A-Za-z-]{1,80}")
MOST_RECORDS = 64  # that are read of a folder of somebody else's
READY_S = 30.0  # for the process that guards to begin
_INSTEAD = "set power.caps = false: then steps are spaced out instead, which needs no right"


def place() -> Path:
    """Where this node keeps records and locks: in memory where that is, so that a restart clears it; of this user alone."""
    shared = Path("/dev/shm")
    return (shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())) / f"gigatrain-power-{os.getuid()}"


class Caps:
    """Limits of these accelerators (CUDA's UUIDs, "GPU-..."); a context manager for one process of the node.

    `least_watts` and `most_watts` are what all of them can be set to: the driver's least, and the driver's most or what was found, whichever is less.
    Entering raises PowerError that names the device: no right, held by another run, no such device, a MIG part. `say` gets what is worth a line.
    """

    def __init__(
        self, uuids: Sequence[str], *, run: str = "", folder: Path | None = None, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.uuids, self.run, self.folder, self._say = list(dict.fromkeys(uuids)), run, folder or place(), say
        self.least_watts = self.most_watts = 0.0
        self._limits: Limits | None = None
        self._locks: dict[str, int] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._handles: dict[str, Any] = {}
        self._guard: subprocess.Popen[bytes] | None = None
        self._pipe = -1
        self._turn = threading.Lock()
        self._leaving = False

    def __enter__(self) -> Self:
        for uuid in self.uuids:
            if not _UUID.fullmatch(uuid):
                part = "a part of a GPU, which has no limit of its own" if uuid.startswith("MIG-") else "no GPU of NVIDIA's"
                raise PowerError(f"{uuid[:90]}: power limits are set of whole NVIDIA GPUs, and this is {part}; {_INSTEAD}")
        if not self.uuids:
            return self
        try:
            _owned(self.folder)
            self._limits = Limits()
            for uuid in self.uuids:
                self._take(uuid)
            self._start()
            for uuid in self.uuids:  # the right is tried with the value that is there already
                self._set(uuid, self._records[uuid]["found_mw"])
        except (Refused, OSError, ValueError, KeyError) as failure:
            self.close()
            raise PowerError(f"power limits cannot be set here: {failure}; {_INSTEAD}") from None
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def apply(self, watts: float | None) -> None:
        """Give each accelerator this limit, or at most what it was found with; None: what it was found with.

        Raises PowerError for a limit that a driver does not take; all are then as they were found.
        """
        try:
            for uuid in self.uuids:
                record = self._records[uuid]
                wanted = record["found_mw"] if watts is None else min(record["found_mw"], round(1000 * watts))
                least, most = record["range_mw"]
                if watts is not None and not least <= wanted <= most:
                    raise PowerError(
                        f"{uuid}: {wanted / 1000:g} W is asked for, and its driver takes {least / 1000:g} to {most / 1000:g} W; {_INSTEAD}"
                    )
                if record["set_mw"][-1:] != [wanted]:
                    self._set(uuid, wanted)
        except BaseException:
            for uuid in self.uuids:
                with contextlib.suppress(PowerError):
                    self._set(uuid, self._records[uuid]["found_mw"])
            raise

    def close(self) -> None:
        """Put everything back and end the process that guards. Raises PowerError where a limit cannot be put back; its record stays."""
        self._leaving = True
        failures = []
        with self._turn:
            for uuid, record in self._records.items():
                assert self._limits is not None
                try:
                    said = restore.put_back(self._limits, str(self.folder), uuid, record)
                except (Refused, OSError, ValueError, KeyError) as failure:
                    said = None
                    failures.append(f"{uuid}: {failure}")
                if said and "somebody else" in said:
                    self._say(said)
            if self._pipe >= 0:
                os.close(self._pipe)
                self._pipe = -1
        if self._guard is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(10)
            self._guard = None
        for lock in self._locks.values():
            os.close(lock)
        if self._limits is not None:
            self._limits.close()
            self._limits = None
        self._locks, self._records = {}, {}
        if failures:
            raise PowerError(f"a power limit is not put back: {'; '.join(failures)}; try: python -m gigatrain.power.guard --restore")

    def _take(self, uuid: str) -> None:
        """Lock one accelerator, put back what a dead run left, and write down what is found."""
        assert self._limits is not None
        lock = _locked(self.folder, uuid)
        if lock is None:
            record: dict[str, Any] = {}
            with contextlib.suppress(OSError, ValueError):
                record = restore.read(str(self.folder), uuid) or {}
            whose = f"{record.get('run') or 'another run'} (process {record.get('pid', '?')})"
            raise PowerError(f"{uuid}: its power limit is {whose}'s, and two runs cannot set it; wait for that one, or {_INSTEAD}")
        self._locks[uuid] = lock
        try:
            left = restore.put_back(self._limits, str(self.folder), uuid)
        except (Refused, OSError, ValueError, KeyError) as failure:
            raise PowerError(
                f"{uuid}: a run that was killed left its power limit, and it cannot be put back by {restore.path_of(str(self.folder), uuid)}: {failure}; "
                f"set it with nvidia-smi -pl and remove that file, or {_INSTEAD}"
            ) from None
        if left:
            self._say(f"left by a run that was killed: {left}")
        try:
            handle = self._limits.handle(uuid)
            scope = self._limits.scope(handle)
            found, default = self._limits.limit(handle, scope), self._limits.default(handle, scope)
            least, most = self._limits.range(handle, scope)
        except Refused as failure:
            raise PowerError(f"{uuid}: its power limit cannot be read: {failure.text}; {_INSTEAD}") from None
        record = {
            "uuid": uuid,
            "boot": restore.boot(),
            "scope": scope,
            "found_mw": found,
            "default_mw": default,
            "range_mw": [least, most],
            "set_mw": [],
            "pid": os.getpid(),
            "run": self.run,
        }
        self._write(record)
        self._handles[uuid], self._records[uuid] = handle, record
        self.least_watts = max(self.least_watts, least / 1000)
        self.most_watts = min(self.most_watts or float("inf"), most / 1000, found / 1000)

    def _write(self, record: dict[str, Any]) -> None:
        try:
            restore.write(str(self.folder), record)
        except OSError as failure:
            raise PowerError(
                f"{record['uuid']}: its power limit is not changed, since what it was cannot be written down in {self.folder}: {failure.strerror}; "
                f"make room there, or {_INSTEAD}"
            ) from None

    def _set(self, uuid: str, milliwatts: int) -> None:
        """Write down what comes, then set it; what was found is set even if nothing can be written, since that is in the record already."""
        assert self._limits is not None
        record = self._records[uuid]
        with self._turn:
            coming = record | {"set_mw": [*record["set_mw"][-1:], milliwatts]}
            try:
                self._write(coming)
            except PowerError:
                if milliwatts != record["found_mw"] or not record["set_mw"]:
                    raise
            record["set_mw"] = coming["set_mw"]
            try:
                self._limits.set(self._handles[uuid], record["scope"], milliwatts)
            except Refused as failure:
                if failure.code == NO_PERMISSION:
                    raise PowerError(
                        f"{uuid}: its power limit may be set by root only (or with CAP_SYS_ADMIN), and this is uid {os.getuid()}; ask the site, or {_INSTEAD}"
                    ) from None
                raise PowerError(f"{uuid}: {milliwatts / 1000:g} W cannot be set: {failure.text}; {_INSTEAD}") from None

    def _start(self) -> None:
        """The process that guards; a thread waits for its end and starts another."""
        try:
            (theirs, ours), (ready, answer) = os.pipe(), os.pipe()
        except OSError as failure:
            raise PowerError(f"no process can be started that guards power limits: {failure.strerror}; {_INSTEAD}") from None
        try:
            command = [
                sys.executable,
                "-I",
                "-S",
                restore.__file__,
                str(theirs),
                str(answer),
                str(os.getpid()),
                str(self.folder),
                *self.uuids,
            ]
            given = (theirs, answer, *self._locks.values())
            guard = subprocess.Popen(command, pass_fds=given, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        except OSError as failure:
            os.close(ours)
            os.close(ready)
            raise PowerError(f"no process can be started that guards power limits: {failure.strerror}; {_INSTEAD}") from None
        finally:
            os.close(theirs)
            os.close(answer)
        begun = bool(select.select([ready], [], [], READY_S)[0]) and os.read(ready, 1) == b"1"
        os.close(ready)
        before, self._pipe, self._guard = self._pipe, ours, guard
        if before >= 0:
            os.close(before)
        if not begun:
            raise PowerError(f"the process that guards power limits did not begin; {_INSTEAD}")
        threading.Thread(target=self._watch, args=(guard,), name="gigatrain-caps", daemon=True).start()

    def _watch(self, guard: "subprocess.Popen[bytes]") -> None:
        guard.wait()
        with self._turn:
            if self._leaving:
                return
            self._say(f"the process that guards power limits has ended ({guard.returncode}); another is started")
            try:
                self._start()
            except (PowerError, OSError) as failure:
                self._say(f"POWER LIMITS ARE NOT GUARDED: {failure}; they are put back when this process ends, or by the next run")


def left(folder: Path | None = None) -> tuple[list[str], list[str]]:
    """UUIDs of accelerators whose limits a dead run left on this node: there is a record and nobody holds its lock; and a line for each folder or record that
    is not believed. Root sees every user's."""
    found: list[str] = []
    notes: list[str] = []
    with _places(folder or place(), notes) as places:
        for one in places:
            for uuid in one.records():
                try:
                    lock = one.locked(uuid)
                    if lock is not None:
                        os.close(lock)
                        restore.read(one.path, uuid, one.owner)
                        found.append(uuid)
                except (PowerError, OSError, ValueError) as failure:
                    notes.append(f"{one.folder}: {uuid}: not believed: {failure}")
    return list(dict.fromkeys(found)), notes


def put_back(folder: Path | None = None, *, others: bool = False) -> tuple[list[str], list[str]]:
    """Put back what dead runs left on this node: `(said, failures)`, a line each. As root with `others` also what runs of other users left: to the driver's
    default. What others wrote is never a failure: an epilog that fails drains its node, and that is not for a user to do."""
    said: list[str] = []
    failures: list[str] = []
    limits = None
    with contextlib.ExitStack() as stack:
        free: list[tuple[_Place, str]] = []
        held: set[str] = set()
        for one in stack.enter_context(_places(folder or place(), said)):
            for uuid in one.records():
                try:
                    lock = one.locked(uuid)
                except PowerError as failure:
                    (said if one.foreign else failures).append(f"{uuid}: not put back by {one.folder}: {failure}")
                    continue
                if lock is None:
                    held.add(uuid)
                    said.append(f"{uuid}: a run that lives holds it; left alone")
                else:
                    stack.callback(os.close, lock)
                    free.append((one, uuid))
        for one, uuid in free:
            try:
                if one.foreign and uuid in held:
                    continue
                if one.foreign and not others:
                    restore.read(one.path, uuid, one.owner)
                    said.append(
                        f"{uuid}: a run of uid {one.owner} that was killed left its power limit; --others sets the driver's default"
                    )
                    continue
                if limits is None:
                    limits = Limits()
                    stack.callback(limits.close)
                path = one.path
                done = restore.to_default(limits, path, uuid, one.owner) if one.foreign else restore.put_back(limits, path, uuid)
                said.append(done or f"{uuid}: already as it was found")
            except (Refused, OSError, ValueError, KeyError) as failure:
                root = "; only root may set it" if isinstance(failure, Refused) and failure.code == NO_PERMISSION else ""
                (said if one.foreign else failures).append(f"{uuid}: not put back by {one.folder}: {failure}{root}")
    return said, failures


@dataclass(frozen=True)
class _Place:
    """A folder of records that was looked at and is held open, so that nobody can put another in its place."""

    folder: Path
    path: str
    owner: int

    @property
    def foreign(self) -> bool:
        return self.owner != os.getuid()

    def records(self) -> list[str]:
        """UUIDs."""
        names = sorted(name[:-5] for name in os.listdir(self.path) if name.endswith(".json") and _UUID.fullmatch(name[:-5]))
        return names[:MOST_RECORDS] if self.foreign else names

    def locked(self, uuid: str) -> int | None:
        return _locked(Path(self.path), uuid, self.owner)


@contextlib.contextmanager
def _places(folder: Path, notes: list[str]) -> Iterator[list[_Place]]:
    """This user's folder, and as root those of others beside it; what cannot be trusted gets a note."""
    with contextlib.ExitStack() as stack:
        places = []
        beside = sorted(folder.parent.glob("gigatrain-power-*")) if os.getuid() == 0 else []
        for one in dict.fromkeys([folder, *beside]):
            try:
                descriptor = os.open(one, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except OSError as failure:
                notes.append(f"{_plain(one)}: not looked into: {failure.strerror}")
                continue
            stack.callback(os.close, descriptor)
            found = os.fstat(descriptor)
            ours = found.st_uid == os.getuid() and one == folder
            if found.st_mode & 0o022 or not (ours or (os.getuid() == 0 and one.name == f"gigatrain-power-{found.st_uid}")):
                notes.append(f"{_plain(one)}: not believed: it is uid {found.st_uid}'s, {stat.filemode(found.st_mode)}; remove it")
                continue
            places.append(_Place(one, str(one) if ours else f"/proc/self/fd/{descriptor}", found.st_uid))
        yield sorted(places, key=lambda one: one.foreign)


def _plain(path: Path) -> str:
    """A name that anybody may have made, for a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(path))[:200]


def _owned(folder: Path) -> None:
    """A folder that nobody else can put anything into; made, if it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=False, exist_ok=True)
        found = folder.lstat()
    except OSError as failure:
        raise PowerError(f"{folder}: no records of power limits can be kept there: {failure.strerror}; {_INSTEAD}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PowerError(
            f"{folder} is no folder of this user's alone, so records of power limits there cannot be trusted; remove it, or {_INSTEAD}"
        )


def _locked(folder: Path, uuid: str, owner: int | None = None) -> int | None:
    """The lock of one accelerator, as a descriptor; None where another process has it. It ends with the last process that has it open.

    Of another owner's folder it is opened and never made: who writes a record has its lock.
    """
    ours = owner is None or owner == os.getuid()
    where = folder / f"{uuid}.lock"
    named = where if ours else where.name
    try:
        lock = os.open(where, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if ours else 0), 0o600)
    except OSError as failure:
        raise PowerError(f"{named}: {'it is a link' if failure.errno == errno.ELOOP else failure.strerror}; {_INSTEAD}") from None
    try:
        found = os.fstat(lock)
        if not restore.owned(found, os.getuid() if owner is None else owner):
            raise PowerError(f"{named} is no file of its folder's owner alone (uid {found.st_uid}); remove it, or {_INSTEAD}")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as failure:
        os.close(lock)
        if failure.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise PowerError(f"{named} cannot be locked: {failure.strerror}; {_INSTEAD}") from None
    except PowerError:
        os.close(lock)
        raise
    return lock


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m gigatrain.power.guard --restore`: for a node's epilog, or by hand."""
    parser = argparse.ArgumentParser(prog="python -m gigatrain.power.guard", description="Power limits that dead runs left on this node.")
    parser.add_argument("--restore", action="store_true", help="put them back; else they are only named")
    parser.add_argument(
        "--others",
        action="store_true",
        help="as root, with --restore: limits that runs of other users left are set to the driver's default",
    )
    parser.add_argument("--folder", type=Path, default=None, help=f"where records lie (default: {place()})")
    options = parser.parse_args(arguments)
    if options.others and (not options.restore or os.getuid() != 0):
        parser.error("--others goes with --restore, and is root's")
    if not options.restore:
        found, notes = left(options.folder)
        for uuid in found:
            print(f"{uuid}: its power limit was left by a run that was killed; put it back with --restore")
        for text in notes:
            print(text)
        return 0
    done, failures = put_back(options.folder, others=options.others)
    for text in [*done, *failures] or ["no run has left a power limit on this node"]:
        print(text)
    return PowerError.exit_code if failures else 0


if __name__ == "__main__":
    sys.exit(main())
