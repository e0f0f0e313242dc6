"""Checkpoints that are loadable or invisible, of pieces that any mesh takes up.

A save writes everything under a temporary name, syncs it, renames the folder, and writes the commit marker last:

    checkpoints/step-00000040/
        weights-00000.safetensors     fp32 master weights, canonical names: the pieces that rank 0 writes
        optimizer-00000.safetensors   moments, counts
        random-00000.safetensors      generator states
        weights-00001.safetensors     the pieces that rank 1 writes, if it writes any; and so on
        state.json                    step, data position, loss statistics, wall-clock so far
        manifest.json                 run, plan, step; bytes and SHA-256 of every file, hashed while it was written;
                                      of every tensor dtype, whole shape, and the boxes it lies in: file, start, size
        COMMITTED                     SHA-256 of manifest.json

Saving and loading are collective. Every rank writes its own pieces; rank 0 makes the folder, joins the records into the manifest, renames and commits. What
fails on one rank fails on all, with one message. A load checks marker, manifest, run, every size and every hash (each file by one rank) before a tensor is
used; what fails is named and the one before it is taken. A piece is then put together from every stored box that meets it, so that ranks, mesh and engine of
the save need not be those of the load. Tensors are safetensors, the rest is JSON: opening a checkpoint executes nothing.
"""

import contextlib
import errno
import functools
import hashlib
import heapq
import json
import math
import operator
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gigatrain.errors import CheckpointError
from gigatrain.parallel.agree import agreed, gathered, told
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.parallel.places import Piece, Place, State

FORMAT = 2  # 1: whole tensors, one file a group
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_STEP = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"[a-z_]+-\d{5,}\.safetensors|state\.json")  # a manifest names nothing outside its folder
_PIECE = 1 << 26  # bytes that leave the device at a time


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write a safetensors file piece by piece, hashing as it goes; returns {"bytes", "sha256"}.

    The format (github.com/huggingface/safetensors): u64 header length, JSON header, tensors end to end. The library's own writer needs all
    bytes in memory at once and leaves the hash to a second read.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for piece in (struct.pack("<Q", len(text)), text):
            file.write(piece)
            digest.update(piece)
        for tensor in tensors.values():
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            for part in flat.split(_PIECE):
                piece = part.cpu().numpy().data
                file.write(piece)
                digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + offset, "sha256": digest.hexdigest()}


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a small file so that it is whole or absent: temporary name, sync, rename, sync of the folder."""
    data = text.encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Box:
    """Where a part of a tensor lies: all of what `file` holds under the tensor's name, which is `size` elements from `start` on along each dim."""

    file: str
    start: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: boxes that meet nowhere and leave no gap."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Found:
    """A committed checkpoint whose every byte was checked, or written, by this run."""

    folder: Path
    step: int
    manifest: dict[str, Any]
    state: dict[str, Any]
    table: dict[str, dict[str, Stored]]  # group -> name -> tensor

    def tensors(self, group: str) -> "Tensors":
        """The tensors of a group by name; each is put together on the CPU when it is asked for, and kept by nobody."""
        return Tensors(self, group)


class Tensors(Mapping[str, Tensor]):
    """A group of a checkpoint, one whole tensor at a time."""

    def __init__(self, found: Found, group: str) -> None:
        self.stored, self._files = _group(found, group), Files(found.folder)

    def __getitem__(self, name: str) -> Tensor:
        stored = self.stored[name]
        if len(stored.boxes) == 1:
            return self._files.read(stored, stored.boxes[0], name)
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        for box in stored.boxes:
            whole[_slices(box.start, box.size)] = self._files.read(stored, box, name)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


class Files:
    """The tensor files of a checkpoint, each mapped once and kept mapped: 10,000 of them take addresses, not memory or descriptors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}

    def read(self, stored: Stored, box: Box, name: str, within: tuple[slice, ...] | None = None) -> Tensor:
        """A box of a tensor, or the part `within` it. Raises CheckpointError where the file holds anything but what the manifest says."""
        try:
            if box.file not in self._open:
                self._open[box.file] = safe_open(self.folder / box.file, framework="pt")
            part = self._open[box.file].get_slice(name)
            if tuple(part.get_shape()) != box.size or part.get_dtype() != _NAMES[stored.dtype]:
                raise CheckpointError(
                    f"{self.folder / box.file} holds {name} as {part.get_dtype()} {part.get_shape()}, "
                    f"by the manifest it is {_NAMES[stored.dtype]} {list(box.size)}"
                )
            return self._open[box.file].get_tensor(name) if within is None else part[within]
        except (SafetensorError, FileNotFoundError) as failure:
            raise CheckpointError(f"{self.folder / box.file} cannot be read: {failure}") from None


def weights_sha256(found: Found) -> str:
    """SHA-256 over names and bytes of the fp32 master weights, in the order of the names: equal for equal weights, however they were cut and saved."""
    digest, weights = hashlib.sha256(), found.tensors("weights")
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one run, in `folder`/checkpoints, which all ranks of `mesh` reach (None: one process).

    `save` and `latest` are collective.
    """

    def __init__(self, folder: Path, *, run: str, plan_sha256: str, keep: int, mesh: Mesh | None = None) -> None:
        self.folder = folder / "checkpoints"
        self.run, self.plan_sha256, self.keep = run, plan_sha256, keep
        self.mesh = mesh or alone()
        self._first = self.mesh.rank == 0
        self._whole: set[int] = set()  # steps that this run's processes wrote or checked

    def save(self, step: int, state: State, extra: Mapping[str, Any]) -> Path:
        """Write and commit one checkpoint, then drop all but the newest `keep`. `extra` is what rank 0 keeps beside the tensors.

        Raises CheckpointError on every rank when the disk is full or refuses on any; the ones before stay as they were.
        """
        final = self.folder / f"step-{step:08d}"
        if step in self._whole:
            return final
        temporary = self.folder / f".writing-{step:08d}-{told(self.mesh, os.getpid())}"
        try:
            with self._agreed(step):
                if self._first:
                    self._clear(temporary, final)
                    temporary.mkdir()
            self._check_space(state)
            with self._agreed(step):
                record = self._write(temporary, step, state, extra)
            records = gathered(self.mesh, record)
            with self._agreed(step):
                if self._first:
                    self._commit(temporary, final, step, records)
        except Exception:
            if self._first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._whole.add(step)
        if self._first:
            self._prune(step)
        return final

    def _agreed(self, step: int) -> contextlib.AbstractContextManager[None]:
        return agreed(self.mesh, CheckpointError, functools.partial(self._unsaved, step))

    def _unsaved(self, step: int, failure: Exception) -> str:
        if isinstance(failure, CheckpointError):
            return str(failure)
        found = f"{type(failure).__name__}, {failure}"
        if isinstance(failure, OSError):
            found = f"{errno.errorcode.get(failure.errno or 0, 'error')}, {failure.strerror}"
        return f"step {step} could not be saved in {self.folder}: {found}; earlier ones are untouched"

    def _clear(self, *folders: Path) -> None:
        """Make room under names that a killed save, or a checkpoint that was refused, left behind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        for folder in folders:
            (folder / "COMMITTED").unlink(missing_ok=True)
            if folder.exists():
                shutil.rmtree(folder)

    def _write(self, folder: Path, step: int, state: State, extra: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's files; returns what the manifest says of them."""
        metadata = {"format": "pt", "run": self.run, "step": str(step), "plan_sha256": self.plan_sha256}
        files, tensors = {}, {}
        for group, named in state.items():
            mine = {name: piece for name, piece in named.items() if _is_written(piece)}
            if not mine:
                continue
            file = f"{group}-{self.mesh.rank:05d}.safetensors"
            assert _FILE.fullmatch(file)
            files[file] = write_tensors(folder / file, {name: piece.tensor for name, piece in mine.items()}, metadata)
            tensors[group] = {
                name: {
                    "dtype": _NAMES[piece.tensor.dtype],
                    "shape": piece.place.shape,
                    "pieces": [{"file": file, "start": piece.place.start, "size": piece.place.size}],
                }
                for name, piece in mine.items()
            }
        if self._first:
            files["state.json"] = write_text(folder / "state.json", json.dumps(extra, indent=1, sort_keys=True))
        return {"files": files, "tensors": tensors}

    def _commit(self, temporary: Path, final: Path, step: int, records: list[dict[str, Any]]) -> None:
        """Join the ranks' records, and make the folder a checkpoint."""
        files: dict[str, Any] = {}
        tensors: dict[str, dict[str, Any]] = {}
        for record in records:
            files |= record["files"]
            for group, named in record["tensors"].items():
                for name, entry in named.items():
                    known = tensors.setdefault(group, {}).setdefault(name, entry | {"pieces": []})
                    assert (known["dtype"], known["shape"]) == (entry["dtype"], entry["shape"]), f"ranks differ on {name}"
                    known["pieces"] += entry["pieces"]
        manifest = {"format": FORMAT, "run": self.run, "plan_sha256": self.plan_sha256, "step": step, "ranks": self.mesh.count}
        manifest |= {"files": files, "tensors": tensors}
        _table(manifest)  # a gap, or a box that two ranks wrote, would make it useless
        written = write_text(temporary / "manifest.json", json.dumps(manifest, sort_keys=True))
        temporary.rename(final)
        sync_folder(self.folder)
        write_text(final / "COMMITTED", written["sha256"])

    def _check_space(self, state: State) -> None:
        """Whether all ranks' pieces fit."""
        pieces = [piece.tensor for named in state.values() for piece in named.values() if _is_written(piece)]
        count = torch.tensor(sum(tensor.numel() * tensor.element_size() for tensor in pieces), device=self.mesh.device)
        need = int(self.mesh.sum(count)) + (1 << 20)
        with agreed(self.mesh, CheckpointError, str):
            free = shutil.disk_usage(self.folder).free if self._first else need
            if free < need:
                raise CheckpointError(
                    f"a checkpoint needs {need / 2**20:.0f} MiB and {self.folder} has {free / 2**20:.0f} MiB free; "
                    "free some, or lower checkpoint.keep; earlier ones are untouched"
                )

    def _prune(self, newest: int) -> None:
        """Drop old checkpoints and what kills left behind; a folder that will not go (an export reads it) is for the next time."""
        committed = [step for step in self.steps() if step <= newest]
        for step in committed[: -self.keep]:
            with contextlib.suppress(OSError):
                (self.folder / f"step-{step:08d}" / "COMMITTED").unlink()  # invisible first, so that a kill leaves no half of one
        for folder in self.folder.iterdir():
            match = _STEP.fullmatch(folder.name)
            half = match and int(match[1]) <= newest and not (folder / "COMMITTED").exists()
            if half or folder.name.startswith(".writing-"):
                shutil.rmtree(folder, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps with a commit marker, oldest first."""
        found = (_STEP.fullmatch(marker.parent.name) for marker in self.folder.glob("step-*/COMMITTED"))
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> tuple[Found, list[str]]:
        """The newest checkpoint that is whole, and what was wrong with each newer one: the same on every rank.

        Raises CheckpointError when there is none; a damaged one is never used and never taken for a missing one.
        """
        refused: list[str] = []
        for step in reversed(told(self.mesh, self.steps() if self._first else None)):
            try:
                found = self._open(step)
                self._whole.add(step)
                return found, refused
            except CheckpointError as failure:
                refused.append(str(failure))
        none = f"{self.folder} holds no committed checkpoint, so there is nothing to resume; start with --new"
        failure = CheckpointError("no checkpoint is whole:\n" + "\n".join(f"  {reason}" for reason in refused) if refused else none)
        failure.shared = True
        raise failure

    def found(self, step: int) -> Found:
        """A checkpoint that this run saved or checked, without checking it again. Not collective: what one rank reads of it is its own affair."""
        assert step in self._whole
        folder = self.folder / f"step-{step:08d}"
        manifest = self._manifest(folder, step)
        return Found(folder, step, manifest, _state(folder), _table(manifest))

    def _open(self, step: int) -> Found:
        """A checkpoint whose every file was read, each by one rank."""
        folder = self.folder / f"step-{step:08d}"
        manifest = state = None
        with agreed(self.mesh, CheckpointError, str):
            if self._first:
                manifest = self._manifest(folder, step)
        manifest = told(self.mesh, manifest)
        with agreed(self.mesh, CheckpointError, str):
            for name in _dealt({name: file["bytes"] for name, file in manifest["files"].items()}, self.mesh):
                _check(folder / name, manifest["files"][name])
        with agreed(self.mesh, CheckpointError, str):
            if self._first:
                state = _state(folder)
        return Found(folder, step, manifest, told(self.mesh, state), _table(manifest))

    def _manifest(self, folder: Path, step: int) -> dict[str, Any]:
        """The committed manifest, of this run, plan and step, and with every key that a load reads."""
        try:
            text = (folder / "manifest.json").read_bytes()
            if hashlib.sha256(text).hexdigest() != (folder / "COMMITTED").read_text().strip():
                raise CheckpointError(f"{folder}/manifest.json is not the one that was committed")
            manifest = json.loads(text)
            if manifest["run"] != self.run or manifest["step"] != step:
                raise CheckpointError(
                    f"{folder} belongs to run {manifest['run']}, step {manifest['step']}; this is run {self.run}, step {step}"
                )
            if manifest["plan_sha256"] != self.plan_sha256:
                raise CheckpointError(f"{folder} was made under another plan ({manifest['plan_sha256'][:12]}, not {self.plan_sha256[:12]})")
            if manifest["format"] != FORMAT:
                raise CheckpointError(f"{folder} has format {manifest['format']}, this version reads {FORMAT}")
            for name, file in manifest["files"].items():
                if not _FILE.fullmatch(name) or operator.index(file["bytes"]) < 0 or not isinstance(file["sha256"], str):
                    raise ValueError(f"{name} is no file of a checkpoint")
            files = {box.file for named in _table(manifest).values() for stored in named.values() for box in stored.boxes} | {"state.json"}
            if lost := sorted(files - manifest["files"].keys()):
                raise ValueError(f"{lost[0]} has no hash")
            return manifest
        except OSError as failure:
            raise CheckpointError(f"{failure.filename}: {failure.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as failure:
            raise CheckpointError(f"{folder}/manifest.json is not a manifest: {failure}") from None


def _check(path: Path, record: Mapping[str, Any]) -> None:
    """Size and hash of a file, against the manifest."""
    try:
        size = path.stat().st_size
        if size != record["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, {record['bytes']} were committed")
        digest = file_sha256(path)
    except OSError as failure:
        raise CheckpointError(f"{path}: {failure.strerror}") from None
    if digest != record["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is {digest[:12]}..., {record['sha256'][:12]}... was committed")


def _state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "state.json").read_text())
    except OSError as failure:
        raise CheckpointError(f"{failure.filename}: {failure.strerror}") from None
    except ValueError as failure:
        raise CheckpointError(f"{folder}/state.json is not JSON: {failure}") from None


def _dealt(sizes: Mapping[str, int], mesh: Mesh) -> list[str]:
    """This rank's share of the files: the largest first, each to the rank with the fewest bytes so far."""
    loads, mine = [(0, rank) for rank in range(mesh.count)], []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, rank = heapq.heappop(loads)
        heapq.heappush(loads, (load + sizes[name], rank))
        if rank == mesh.rank:
            mine.append(name)
    return sorted(mine)


def _is_written(piece: Piece) -> bool:
    """An empty box is nobody's to write, an empty tensor is."""
    return piece.writes and (piece.tensor.numel() > 0 or 0 in piece.place.shape)


def _table(manifest: Mapping[str, Any]) -> dict[str, dict[str, Stored]]:
    """What a manifest says of the tensors. Raises ValueError, KeyError or TypeError where it is no such table or a tensor's boxes do not tile it."""
    table: dict[str, dict[str, Stored]] = {}
    for group, named in manifest["tensors"].items():
        table[group] = {}
        for name, entry in named.items():
            shape = _integers(entry["shape"])
            boxes = tuple(Box(piece["file"], _integers(piece["start"]), _integers(piece["size"])) for piece in entry["pieces"])
            if not _tile(shape, boxes):
                raise ValueError(f"the pieces of {group} {name} leave a gap in {list(shape)}, or lie one over another or outside")
            table[group][name] = Stored(_DTYPES[entry["dtype"]], shape, boxes)
    return table


def _integers(values: Any) -> tuple[int, ...]:
    return tuple(operator.index(value) for value in values)


def _tile(shape: tuple[int, ...], boxes: tuple[Box, ...]) -> bool:
    """Whether every element of a tensor lies in exactly one box."""
    for box in boxes:
        if not len(box.start) == len(box.size) == len(shape):
            return False
        if any(start < 0 or size < 0 or start + size > length for start, size, length in zip(box.start, box.size, shape, strict=True)):
            return False
    if not boxes or sum(math.prod(box.size) for box in boxes) != math.prod(shape):
        return False
    if len(boxes) == 1 or 0 in shape:
        return True
    # Cells between the cuts of all boxes: what is a box in elements is a box in cells.
    cuts = [sorted({edge for box in boxes for edge in (box.start[dim], box.start[dim] + box.size[dim])}) for dim in range(len(shape))]
    at = [{cut: index for index, cut in enumerate(edges)} for edges in cuts]
    covered = torch.zeros([len(edges) - 1 for edges in cuts], dtype=torch.int32)
    for box in boxes:
        covered[
            tuple(slice(at[dim][start], at[dim][start + size]) for dim, (start, size) in enumerate(zip(box.start, box.size, strict=True)))
        ] += 1
    return bool((covered == 1).all())


def _group(found: Found, group: str) -> dict[str, Stored]:
    if group not in found.table:
        raise CheckpointError(f"{found.folder} holds no {group}, only {', '.join(sorted(found.table)) or 'nothing'}")
    return found.table[group]


def _slices(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))


def _meet(place: Place, box: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a live box and a stored one meet, as a part of the live and of the stored one; None: nowhere."""
    low = [max(pair) for pair in zip(place.start, box.start, strict=True)]
    ends = zip(place.start, place.size, box.start, box.size, strict=True)
    size = [min(a + b, c + d) - first for first, (a, b, c, d) in zip(low, ends, strict=True)]
    if any(count <= 0 for count in size):
        return None
    live, stored = ([first - begin for first, begin in zip(low, of.start, strict=True)] for of in (place, box))
    return _slices(live, size), _slices(stored, size)


@torch.no_grad()
def fill(found: Found, live: State, mesh: Mesh | None = None) -> None:
    """Copy a checkpoint's tensors into this rank's pieces, in place, from whatever boxes they were saved in. Collective.

    Raises CheckpointError on every rank where names, shapes or dtypes differ on any; then nothing has been copied.
    """
    mesh = mesh or alone()
    # No rank holds every name, but each name must be some rank's.
    stored = [(group, name) for group, named in sorted(found.table.items()) for name in sorted(named)]
    held = torch.tensor([name in live.get(group, ()) for group, name in stored], dtype=torch.int32, device=mesh.device)
    unheld = {at for at, count in zip(stored, mesh.sum(held).tolist(), strict=True) if not count}
    reads: dict[str, list[tuple[Piece, str, Stored, Box, Any]]] = {}
    with agreed(mesh, CheckpointError, str):
        for group, pieces in live.items():
            odd = sorted((pieces.keys() - _group(found, group).keys()) | {name for other, name in unheld if other == group})
            if odd:
                raise CheckpointError(f"{found.folder}: {group} has other tensors than this run: {', '.join(odd[:5])} ({len(odd)} in all)")
            for name, piece in pieces.items():
                _check_fit(found, group, name, piece)
                entry = found.table[group][name]
                for box in entry.boxes:
                    if parts := _meet(piece.place, box):
                        reads.setdefault(box.file, []).append((piece, name, entry, box, parts))
    files = Files(found.folder)
    with agreed(mesh, CheckpointError, str):
        for _, wanted in sorted(reads.items()):
            for piece, name, entry, box, (into, within) in wanted:
                piece.tensor[into].copy_(files.read(entry, box, name, None if _is_all(within, box) else within))


def _check_fit(found: Found, group: str, name: str, piece: Piece) -> None:
    stored, tensor = found.table[group][name], piece.tensor
    assert tuple(tensor.shape) == piece.place.size, f"{group} {name} is {tuple(tensor.shape)} and not its place"
    if stored.shape != piece.place.shape or stored.dtype != tensor.dtype:
        raise CheckpointError(
            f"{found.folder}: {group} {name} is {stored.dtype} {stored.shape}, this run needs {tensor.dtype} {piece.place.shape}"
        )


def _is_all(within: tuple[slice, ...], box: Box) -> bool:
    return all(part.stop - part.start == size for part, size in zip(within, box.size, strict=True))
