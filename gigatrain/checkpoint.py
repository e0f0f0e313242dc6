"""Checkpoints that are loadable or invisible.

A save writes everything under a temporary name, syncs it, renames the folder, and writes the commit marker last:

    checkpoints/step-00000040/
        weights-00000.safetensors     fp32 master weights, canonical names
        optimizer-00000.safetensors   moments, counts
        random-00000.safetensors      generator states
        state.json                    step, data position, loss statistics, wall-clock so far
        manifest.json                 run, plan, step; bytes and SHA-256 of every file, hashed while it was written
        COMMITTED                     SHA-256 of manifest.json

A load checks marker, manifest, run, every size and every hash before a tensor is used; what fails is named and the one before it is taken.
Tensors are safetensors, the rest is JSON: opening a checkpoint executes nothing. Each file carries the number of the rank that wrote it,
so that a sharded, asynchronous writer fills the same folder under the same marker.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gigatrain.errors import CheckpointError

State = dict[str, dict[str, Tensor]]
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
_STEP = re.compile(r"step-(\d{8,})")
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
class Found:
    """A committed checkpoint whose every byte was checked."""

    folder: Path
    step: int
    manifest: dict[str, Any]
    state: dict[str, Any]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, on the CPU."""
        with safe_open(self.folder / f"{group}-00000.safetensors", framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


class Checkpoints:
    """The checkpoints of one run, in `folder`/checkpoints."""

    def __init__(self, folder: Path, *, run: str, plan_sha256: str, keep: int) -> None:
        self.folder = folder / "checkpoints"
        self.run, self.plan_sha256, self.keep = run, plan_sha256, keep
        self._whole: set[int] = set()  # steps that this process wrote or checked

    def save(self, step: int, tensors: State, state: Mapping[str, Any]) -> Path:
        """Write and commit one checkpoint, then drop all but the newest `keep`.

        Raises CheckpointError when the disk is full or refuses; the ones before stay as they were.
        """
        final = self.folder / f"step-{step:08d}"
        if step in self._whole:
            return final
        temporary = self.folder / f".writing-{step:08d}-{os.getpid()}"
        try:
            self._clear(temporary, final)
            self._check_space(tensors)
            files = self._write(temporary, step, tensors, state)
            manifest = {"format": 1, "run": self.run, "plan_sha256": self.plan_sha256, "step": step, "ranks": 1, "files": files}
            written = write_text(temporary / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True))
            temporary.rename(final)
            sync_folder(self.folder)
            write_text(final / "COMMITTED", written["sha256"])
            self._whole.add(step)
        except OSError as failure:
            shutil.rmtree(temporary, ignore_errors=True)
            name = errno.errorcode.get(failure.errno or 0, "error")
            raise CheckpointError(
                f"step {step} could not be saved in {self.folder}: {name}, {failure.strerror}; earlier ones are untouched"
            ) from None
        self._prune(step)
        return final

    def _clear(self, *folders: Path) -> None:
        """Make room under names that a killed save, or a checkpoint that was refused, left behind."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        for folder in folders:
            (folder / "COMMITTED").unlink(missing_ok=True)
            if folder.exists():
                shutil.rmtree(folder)

    def _write(self, folder: Path, step: int, tensors: State, state: Mapping[str, Any]) -> dict[str, Any]:
        folder.mkdir()
        metadata = {"format": "pt", "run": self.run, "step": str(step), "plan_sha256": self.plan_sha256}
        files = {}
        for group, named in tensors.items():
            files[f"{group}-00000.safetensors"] = write_tensors(folder / f"{group}-00000.safetensors", named, metadata)
        files["state.json"] = write_text(folder / "state.json", json.dumps(state, indent=1, sort_keys=True))
        return files

    def _check_space(self, tensors: State) -> None:
        need = sum(tensor.numel() * tensor.element_size() for named in tensors.values() for tensor in named.values()) + (1 << 20)
        free = shutil.disk_usage(self.folder).free
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
        """The newest checkpoint that is whole, and what was wrong with each newer one.

        Raises CheckpointError when there is none; a damaged one is never used and never taken for a missing one.
        """
        refused: list[str] = []
        for step in reversed(self.steps()):
            folder = self.folder / f"step-{step:08d}"
            try:
                found = self._open(folder, step)
                self._whole.add(step)
                return found, refused
            except CheckpointError as failure:
                refused.append(str(failure))
        if refused:
            raise CheckpointError("no checkpoint is whole:\n" + "\n".join(f"  {reason}" for reason in refused))
        raise CheckpointError(f"{self.folder} holds no committed checkpoint, so there is nothing to resume; start with --new")

    def _open(self, folder: Path, step: int) -> Found:
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
            for name, record in manifest["files"].items():
                _check(folder / name, record)
            return Found(folder, step, manifest, json.loads((folder / "state.json").read_text()))
        except OSError as failure:
            raise CheckpointError(f"{failure.filename}: {failure.strerror}") from None
        except (ValueError, KeyError, TypeError) as failure:
            raise CheckpointError(f"{folder}/manifest.json is not a manifest: {failure}") from None


def _check(path: Path, record: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != record["bytes"]:
        raise CheckpointError(f"{path} has {size} bytes, {record['bytes']} were committed")
    digest = file_sha256(path)
    if digest != record["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is {digest[:12]}..., {record['sha256'][:12]}... was committed")


def fill(found: Found, live: State) -> None:
    """Copy a checkpoint's tensors into the live ones, in place.

    Raises CheckpointError where names, shapes or dtypes differ.
    """
    for group, tensors in live.items():
        try:
            stored = found.tensors(group)
        except SafetensorError as failure:
            raise CheckpointError(f"{found.folder}/{group}-00000.safetensors cannot be read: {failure}") from None
        if stored.keys() != tensors.keys():
            odd = sorted(stored.keys() ^ tensors.keys())
            raise CheckpointError(f"{found.folder}: {group} has other tensors than this run: {', '.join(odd[:5])} ({len(odd)} in all)")
        for name, tensor in tensors.items():
            if stored[name].shape != tensor.shape or stored[name].dtype != tensor.dtype:
                raise CheckpointError(
                    f"{found.folder}: {group} {name} is {stored[name].dtype} {tuple(stored[name].shape)}, "
                    f"this run needs {tensor.dtype} {tuple(tensor.shape)}"
                )
            with torch.no_grad():
                tensor.copy_(stored[name])
