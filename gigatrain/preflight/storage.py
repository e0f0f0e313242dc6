"""What runs are written on: a write that lasts, room, inodes, locks, on the run's file system and on node-local scratch."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gigatrain.preflight.findings import Check, Finding

PROBE_BYTES = 16 << 20
INODES = 10_000  # a run of 10,000 ranks makes as many logs
RUN_GIB, LOCAL_GIB = 4.0, 1.0
_WHY = {
    errno.ENOSPC: ("no space left (ENOSPC)", "delete old checkpoints, or choose another --run"),
    errno.EDQUOT: ("the quota is used up (EDQUOT)", "delete old checkpoints, or ask for more quota"),
    errno.EROFS: (
        "mounted read-only (EROFS)",
        "a node that remounted its disk read-only has a failing one: remount it or exclude the node",
    ),
    errno.EACCES: ("no permission (EACCES)", "the folder must be writable by the job's user from every node"),
    errno.EPERM: ("not permitted (EPERM)", "the folder must be writable by the job's user from every node"),
    errno.ENOENT: ("the folder does not exist (ENOENT)", "is its file system mounted on this node?"),
    errno.EIO: ("input/output error (EIO)", "a failing disk or file server: exclude the node"),
    errno.ESTALE: ("stale file handle (ESTALE)", "the file server was restarted: mount it again, or exclude the node"),
}


def resolved(text: str) -> Path:
    """A site's path with its environment variables; raises KeyError by the name of one that is unset."""

    def value(found: re.Match[str]) -> str:
        return os.environ[found[1] or found[2]]

    return Path(re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, text)).expanduser()


def checks(run: Path, local: str | None, free_gib: float | None, size: int = PROBE_BYTES) -> list[Check]:
    """The checks of the run's folder and of node-local scratch (a site's `paths.local`)."""
    made = _of("run", run, RUN_GIB if free_gib is None else free_gib, size)
    if local is None:
        said = "the site names no node-local scratch (paths.local)"
        return [*made, Check("scratch", lambda: Finding("scratch", "untested", said))]
    try:
        folder = resolved(local)
    except KeyError as missing:
        name = str(missing).strip("'")
        finding = Finding(
            "scratch",
            "bad",
            f"paths.local is {local}, and ${name} is not set here",
            name,
            None,
            f"export {name}, or change the site's paths.local",
        )
        return [*made, Check("scratch", lambda: finding)]
    return [*made, *_of("scratch", folder, LOCAL_GIB if free_gib is None else min(free_gib, LOCAL_GIB), size)]


def _of(what: str, folder: Path, free_gib: float, size: int) -> list[Check]:
    return [
        Check(f"{what} space", lambda: space(f"{what} space", folder, free_gib), 10),
        Check(f"{what} write", lambda: write(f"{what} write", folder, size), 15),
        Check(f"{what} lock", lambda: lock(f"{what} lock", folder), 10),
    ]


def space(name: str, folder: Path, free_gib: float, inodes: int = INODES) -> Finding:
    """Free bytes and inodes, as a user may have them, against the least that is wanted."""
    try:
        found = os.statvfs(folder)
    except OSError as failure:
        return _refused(name, folder, failure)
    free = found.f_bavail * found.f_frsize / (1 << 30)
    if found.f_flag & os.ST_RDONLY:
        return Finding(name, "bad", f"{folder}: {_WHY[errno.EROFS][0]}", "ro", "rw", _WHY[errno.EROFS][1])
    if free < free_gib:
        way = f"make room, or ask for less with --free-gib {max(free, 0):.2g}"
        return Finding(name, "bad", f"{folder}: {_gib(free)} free, {free_gib:g} GiB are wanted", round(free, 3), free_gib, way)
    if found.f_files > 0 and found.f_favail < inodes:  # file systems without a fixed number say 0
        return Finding(
            name, "bad", f"{folder}: {found.f_favail:,} inodes free, {inodes:,} are wanted", found.f_favail, inodes, "delete old files"
        )
    more = f", {found.f_favail:,} inodes" if found.f_files else ""
    return Finding(name, "ok", f"{folder}: {_gib(free)} free{more}; quotas are not seen here", round(free, 3), free_gib)


def write(name: str, folder: Path, size: int = PROBE_BYTES) -> Finding:
    """Write, fsync, rename, fsync of the folder, read back and compare: what a checkpoint does. `value` is MB/s of the write and fsync.

    The read back may come from the node's own cache; that others see it is network.py's to say.
    """
    data = secrets.token_bytes(min(size, 1 << 20)) * max(size >> 20, 1)
    path = folder / f".doctor-{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}"
    new = path.with_suffix(".new")
    try:
        begin = time.perf_counter()
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - begin
        new.replace(path)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        same = path.read_bytes() == data
    except OSError as failure:
        return _refused(name, folder, failure)
    finally:
        _gone(new)
        _gone(path)
    rate = len(data) / 1e6 / seconds
    if not same:
        said = f"{folder}: what was read back is not what was written"
        return Finding(name, "bad", said, "differs", "equal", "a failing disk or file server: exclude the node")
    return Finding(
        name, "ok", f"{folder}: {len(data) >> 20} MiB written and synced at {rate:,.0f} MB/s, renamed, read back equal", round(rate, 1)
    )


def lock(name: str, folder: Path, flock: Callable[[Any, int], None] = fcntl.flock) -> Finding:
    """That flock takes, and keeps a second one out: a run's folder and a corpus are guarded by it."""
    path = folder / f".doctor-lock-{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}"
    way = "mount with locks (Lustre: -o flock), or put the run on another file system"
    try:
        with path.open("wb") as first, path.open("wb") as second:
            flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Finding(name, "ok", f"{folder}: flock locks")
            return Finding(name, "bad", f"{folder}: a second flock was given while the first was held", "two", "one", way)
    except OSError as failure:
        if failure.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            return Finding(name, "bad", f"{folder}: no flock ({failure.strerror})", errno.errorcode.get(failure.errno), "flock", way)
        return _refused(name, folder, failure)
    finally:
        _gone(path)


def _gone(path: Path) -> None:
    """Remove what a check left; a file system that refused to write it may refuse this too, which is not what is told."""
    with contextlib.suppress(OSError):
        path.unlink()


def _refused(name: str, folder: Path, failure: OSError) -> Finding:
    why, way = _WHY.get(failure.errno or 0, (f"{failure.strerror} ({errno.errorcode.get(failure.errno or 0, failure.errno)})", ""))
    return Finding(name, "bad", f"{folder}: {why}", errno.errorcode.get(failure.errno or 0), None, way)


def _gib(gib: float) -> str:
    return f"{gib:,.1f} GiB" if gib >= 1 else f"{gib * 1024:,.1f} MiB" if gib * 1024 >= 1 else f"{gib * (1 << 20):,.0f} KiB"
