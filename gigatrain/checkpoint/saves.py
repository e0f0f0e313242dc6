"""The checkpoints of a run: saved, committed, pruned, found again."""

import contextlib
import errno
import functools
import hashlib
import heapq
import json
import operator
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gigatrain.checkpoint.files import NAMES, write_tensors, write_text
from gigatrain.checkpoint.table import Found, table_of
from gigatrain.data.shards import file_sha256, sync_folder
from gigatrain.errors import CheckpointError
from gigatrain.parallel.agree import agreed, gathered, told
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.parallel.places import Piece, State

FORMAT = 2  # 1: whole tensors, one file a group
_STEP = re.compile(r"step-(\d{8,})")
_FILE = re.compile(r"[a-z_]+-\d{5,}\.safetensors|state\.json")  # a manifest names nothing outside its folder


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
                    "dtype": NAMES[piece.tensor.dtype],
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
        table_of(manifest)  # a gap, or a box that two ranks wrote, would make it useless
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
        return Found(folder, step, manifest, _state(folder), table_of(manifest))

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
        return Found(folder, step, manifest, told(self.mesh, state), table_of(manifest))

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
            files = {box.file for named in table_of(manifest).values() for stored in named.values() for box in stored.boxes} | {
                "state.json"
            }
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
