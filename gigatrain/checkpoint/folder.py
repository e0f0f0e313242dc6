"""A node's folder of the near tier: what its ranks, and its peers' ranks, kept of the newest steps, in node memory or NVMe.

    NEAR/gigatrain-RUN-00001/               0700; of one run and one node, which is the 2nd of the mesh
        OWNER                               run, user and run folder; whoever lives holds its lock
        step-00000040-3f2a9c0d1e5b/         of one attempt, whose word is in the name
            weights-00003.safetensors       the pieces that rank 3 writes: of this node, or of one whose peer this is
            optimizer-00003.safetensors
            manifest-00003.json             what manifest.json of a checkpoint says, for the pieces of rank 3 alone; run, plan, step, attempt, ranks
            COMMITTED-00003                 SHA-256 of manifest-00003.json; written last
            state.json                      with rank 0's pieces

A rank's part is there or not; nobody waits for others to write it. A step is whole where some node has each rank's part (near.py). Nothing here is collective.
The folder may lie where every user may write (/dev/shm), so nothing is followed or trusted that is not ours: symbolic links, other owners and wider modes are
refused by name.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import operator
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

from gigatrain.checkpoint.files import write_text
from gigatrain.checkpoint.table import table_of
from gigatrain.errors import CheckpointError

FORMAT = 1
STALE_S = 3600.0  # a run that is started again comes back to its folder within it
STEP = re.compile(r"step-(\d{8,})-([0-9a-f]{12})")
_FOLDER = re.compile(r"gigatrain-([0-9a-zA-Z]{1,64})-(\d{5,})")
_FILE = re.compile(r"[a-z_]+-(\d{5,})\.safetensors|state\.json")
_MANIFEST = re.compile(r"manifest-(\d{5,})\.json")
_MOST = 1 << 28  # bytes of a manifest; a longer one is none


@dataclass(frozen=True)
class Part:
    """What one rank kept of a step: a committed manifest whose files, where `whole`, have the sizes and hashes that it says."""

    step: int
    attempt: str
    rank: int
    folder: Path
    manifest: dict[str, Any]


class Folder:
    """The folder of a run on one node, below `near`, in which `{node}` stands for the node's number."""

    def __init__(self, near: str, *, run: str, node: int, plan_sha256: str, run_folder: Path) -> None:
        self.root = Path(near.replace("{node}", str(node))).expanduser().absolute()
        self.run, self.plan_sha256, self.run_folder = run, plan_sha256, run_folder
        self.path = self.root / f"gigatrain-{run}-{node:05d}"
        self._owner: BufferedRandom | None = None

    def take(self, patience_s: float = 10.0) -> list[str]:
        """Make the folder ours and lock it, for one process of the node; returns what stale folders of other runs were removed.

        Raises CheckpointError where it cannot be trusted or is in use, OSError where it cannot be made.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        self.check()
        end = time.monotonic() + patience_s
        while (file := _locked(self.path / "OWNER", create=True)) is None:
            if time.monotonic() > end:
                raise CheckpointError(f"{self.path} is in use by another process; wait until it is gone")
            time.sleep(0.1)
        self._owner = file
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"format": FORMAT, "run": self.run, "folder": str(self.run_folder)}).encode())
        file.flush()
        return self.sweep()

    def check(self) -> None:
        """Raise CheckpointError unless what lies here is only ours to change."""
        above = self.root.stat()
        if above.st_uid not in (os.geteuid(), 0):
            raise CheckpointError(
                f"{self.root} belongs to user {above.st_uid}; name a folder of your own, or of the system, by checkpoint.near"
            )
        if above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX:
            raise CheckpointError(
                f"{self.root} can be written by others and is not sticky (mode {above.st_mode & 0o7777:o}); chmod go-w it"
            )
        if reason := _foreign(self.path):
            raise CheckpointError(f"{self.path} {reason}; remove it, or name another folder by checkpoint.near")

    def sweep(self, *, older_s: float = STALE_S) -> list[str]:
        """Remove folders of other runs that are ours, whose processes are gone and that nobody came back to for `older_s`; returns their paths."""
        removed = []
        for path in sorted(self.root.glob("gigatrain-*")):
            match = _FOLDER.fullmatch(path.name)
            if not match or match[1] == self.run:
                continue
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, CheckpointError):
                if _foreign(path) or (file := _locked(path / "OWNER")) is None:
                    continue
                with file:
                    owner = json.loads(file.read(1 << 16))
                    newest = max(entry.stat(follow_symlinks=False).st_mtime for entry in os.scandir(path))
                    if owner["run"] == match[1] and owner["format"] == FORMAT and time.time() - newest > older_s:
                        shutil.rmtree(path)  # which follows no link
                        removed.append(str(path))
        return removed

    def release(self, *, remove: bool) -> None:
        """Let go of the folder; `remove` it where it is needed no more, with those that this node had under other numbers."""
        if remove and self._owner is not None:
            for path in (*self._former(), self.path):
                shutil.rmtree(path, ignore_errors=True)
        if self._owner is not None:
            self._owner.close()
            self._owner = None

    def _former(self) -> list[Path]:
        """Folders of this run that nobody holds: this node had another number."""
        found = []
        for path in sorted(self.root.glob(f"gigatrain-{self.run}-*")):
            with contextlib.suppress(OSError):
                if path != self.path and _FOLDER.fullmatch(path.name) and not _foreign(path) and (file := _locked(path / "OWNER")):
                    file.close()
                    found.append(path)
        return found

    def step(self, step: int, attempt: str) -> Path:
        """The folder of a step of an attempt."""
        return self.path / f"step-{step:08d}-{attempt}"

    def prune(self, *kept: tuple[int, str]) -> None:
        """Remove all steps but these (step, attempt), and what this node kept under other numbers."""
        for path in self._former():
            shutil.rmtree(path, ignore_errors=True)
        names = {self.step(*one).name for one in kept}
        for entry in os.scandir(self.path):
            if STEP.fullmatch(entry.name) and entry.name not in names:
                shutil.rmtree(entry.path, ignore_errors=True)

    def freed_bytes(self, *kept: tuple[int, str]) -> int:
        """What `prune` would give back."""
        names = {self.step(*one).name for one in kept}
        steps = [entry.path for entry in os.scandir(self.path) if STEP.fullmatch(entry.name) and entry.name not in names]
        return sum(file.stat(follow_symlinks=False).st_size for step in steps for file in os.scandir(step))

    def free_bytes(self) -> int:
        """Of the file system."""
        return shutil.disk_usage(self.root).free

    def found(self) -> tuple[list[tuple[Path, int]], list[str]]:
        """(step's folder, rank) of every part that has a marker, of this run and under any number that this node had; and folders that are refused."""
        parts, refused = [], []
        for path in sorted(self.root.glob(f"gigatrain-{self.run}-*")):
            if not _FOLDER.fullmatch(path.name):
                continue
            if reason := _foreign(path):
                refused.append(f"{path} {reason}")
                continue
            for step in sorted(entry.path for entry in os.scandir(path) if STEP.fullmatch(entry.name)):
                if reason := _foreign(Path(step)):
                    refused.append(f"{step} {reason}")
                    continue
                ranks = (match for name in sorted(os.listdir(step)) if (match := _MANIFEST.fullmatch(name)))
                parts += [(Path(step), int(match[1])) for match in ranks if os.path.lexists(f"{step}/COMMITTED-{match[1]}")]
        return parts, refused

    def part(self, folder: Path, rank: int, *, accepts: Mapping[str, int | None]) -> Part | None:
        """A part whose every byte was read and is as committed, brought into this node's own folder; None where its attempt and step are not wanted.

        `accepts`: attempt -> the only step of it, None: any. Raises CheckpointError that names what is damaged or foreign.
        """
        match = STEP.fullmatch(folder.name)
        assert match
        step, attempt = int(match[1]), match[2]
        if attempt not in accepts or accepts[attempt] not in (None, step):
            return None
        manifest = self._manifest(folder, step, attempt, rank)
        for name, record in manifest["files"].items():
            with opened(folder / name) as file:
                size = os.fstat(file.fileno()).st_size
                if size != record["bytes"]:
                    raise CheckpointError(f"{folder / name} has {size} bytes, {record['bytes']} were committed")
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != record["sha256"]:
                raise CheckpointError(
                    f"{folder / name} is damaged: its SHA-256 is {digest[:12]}..., {record['sha256'][:12]}... was committed"
                )
        own = self.step(step, attempt)
        if own != folder:  # this node had another number
            own.mkdir(mode=0o700, exist_ok=True)
            for name in (*manifest["files"], f"manifest-{rank:05d}.json", f"COMMITTED-{rank:05d}"):
                temporary = own / f".{name}.{os.getpid()}"
                temporary.unlink(missing_ok=True)
                os.link(folder / name, temporary, follow_symlinks=False)
                temporary.replace(own / name)
        return Part(step, attempt, rank, own, manifest)

    def _manifest(self, folder: Path, step: int, attempt: str, rank: int) -> dict[str, Any]:
        path = folder / f"manifest-{rank:05d}.json"
        with opened(path) as file, opened(folder / f"COMMITTED-{rank:05d}") as marker:
            text = file.read(_MOST)
            if hashlib.sha256(text).hexdigest().encode() != marker.read(128).strip():
                raise CheckpointError(f"{path} is not the one that was committed")
        return self.checked(text, step, attempt, rank, str(path))

    def checked(self, text: bytes, step: int, attempt: str, rank: int, where: str) -> dict[str, Any]:
        """The manifest of a rank's part: of this run, plan, step and attempt, with every key that a load reads. Raises CheckpointError."""
        try:
            manifest = json.loads(text)
            found = {key: manifest[key] for key in ("format", "run", "plan_sha256", "step", "attempt", "rank")}
            wanted = {"format": FORMAT, "run": self.run, "plan_sha256": self.plan_sha256, "step": step, "attempt": attempt, "rank": rank}
            for key, value in wanted.items():
                if found[key] != value:
                    raise CheckpointError(f"{where} has {key} {found[key]!r}; here it is {value!r}")
            if not rank < operator.index(manifest["ranks"]):
                raise ValueError(f"rank {rank} of {manifest['ranks']}")
            for name, file in manifest["files"].items():
                match = _FILE.fullmatch(name)
                owner = 0 if name == "state.json" else int(match[1]) if match else None
                if owner != rank or operator.index(file["bytes"]) < 0 or not isinstance(file["sha256"], str):
                    raise ValueError(f"{name} is no file of rank {rank}")
            boxes = {piece["file"] for named in manifest["tensors"].values() for one in named.values() for piece in one["pieces"]}
            if lost := sorted(boxes - manifest["files"].keys()):
                raise ValueError(f"{lost[0]} has no hash")
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as failure:
            raise CheckpointError(f"{where} is not a manifest: {failure}") from None

    def commit(self, folder: Path, manifest: Mapping[str, Any]) -> bytes:
        """Make a rank's files a part; returns the manifest's text."""
        text = json.dumps(manifest, sort_keys=True)
        self.commit_text(folder, manifest["rank"], text)
        return text.encode()

    def commit_text(self, folder: Path, rank: int, text: str) -> None:
        """The same of a manifest that a peer sent."""
        written = write_text(folder / f"manifest-{rank:05d}.json", text)
        write_text(folder / f"COMMITTED-{rank:05d}", written["sha256"])


def joined(manifests: Mapping[int, Mapping[str, Any]], step: int) -> dict[str, Any]:
    """The manifest of a step, of those of all its ranks. Raises CheckpointError where their boxes do not tile every tensor."""
    files: dict[str, Any] = {}
    tensors: dict[str, dict[str, Any]] = {}
    try:
        for _, manifest in sorted(manifests.items()):
            files |= manifest["files"]
            for group, named in manifest["tensors"].items():
                for name, entry in named.items():
                    known = tensors.setdefault(group, {}).setdefault(name, {**entry, "pieces": []})
                    if (known["dtype"], known["shape"]) != (entry["dtype"], entry["shape"]):
                        raise ValueError(f"ranks differ on {name}")
                    known["pieces"] = [*known["pieces"], *entry["pieces"]]
        whole = {"step": step, "files": files, "tensors": tensors}
        table_of(whole)
    except (ValueError, KeyError, TypeError, AttributeError) as failure:
        raise CheckpointError(f"the parts of step {step} do not make a checkpoint: {failure}") from None
    return whole


@functools.cache
def _me() -> int:
    return os.geteuid()


def _foreign(path: Path) -> str:
    """Why a folder is not ours alone; empty: it is."""
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        return "is a symbolic link" if stat.S_ISLNK(found.st_mode) else "is no folder"
    if found.st_uid != _me():
        return f"belongs to user {found.st_uid}"
    return f"is open to others (mode {found.st_mode & 0o777:o})" if found.st_mode & 0o077 else ""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A regular file of ours, to read; no link is followed. Raises CheckpointError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as failure:
        said = "is a symbolic link" if failure.errno == errno.ELOOP else f"cannot be read: {failure.strerror}"
        raise CheckpointError(f"{path} {said}") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != _me():
        os.close(descriptor)
        raise CheckpointError(f"{path} is no file of ours")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _locked(path: Path, *, create: bool = False) -> BufferedRandom | None:
    """The file, with its lock, which goes with the process; None where another has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0), 0o600)
    file = os.fdopen(descriptor, "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        file.close()
        raise
    return file
