"""The checkpoints of a run: saved, committed, pruned, found again."""

import contextlib
import functools
import hashlib
import heapq
import json
import operator
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gigatrain.checkpoint import writing
from gigatrain.checkpoint.background import Writer
from gigatrain.checkpoint.files import NAMES, write_tensors, write_text
from gigatrain.checkpoint.table import Found, table_of
from gigatrain.data.shards import file_sha256
from gigatrain.errors import CheckpointError
from gigatrain.parallel.agree import agreed, gathered, told
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.parallel.places import Piece, State

FORMAT = 2  # 1: whole tensors, one file a group
_FILE = re.compile(r"[a-z_]+-\d{5,}\.safetensors|state\.json")  # a manifest names nothing outside its folder


class Checkpoints:
    """The checkpoints of one run, in `folder`/checkpoints, which all ranks of `mesh` reach (None: one process).

    `save` and `latest` are collective.
    """

    def __init__(
        self, folder: Path, *, run: str, plan_sha256: str, keep: int, keep_every: int | None = None, mesh: Mesh | None = None
    ) -> None:
        """`keep`: how many of the newest stay; `keep_every`: multiples of so many steps stay for good."""
        self.folder = folder / "checkpoints"
        self.run, self.plan_sha256, self.keep, self.keep_every = run, plan_sha256, keep, keep_every or 0
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
                    if temporary.exists():
                        writing.remove(str(temporary))
                    writing.prepare(str(self.folder), str(temporary), str(final))
            self._check_space(state)
            with self._agreed(step):
                record = self._write(temporary, step, state, extra)
            records = gathered(self.mesh, record)
            with self._agreed(step):
                if self._first:
                    writing.commit(str(self.folder), str(temporary), str(final), self.manifest(step) | writing.join(records))
        except Exception:
            if self._first:
                with contextlib.suppress(OSError):
                    writing.remove(str(temporary))
            raise
        self.committed(step)
        if self._first:
            writing.prune(str(self.folder), step, self.keep, self.keep_every)
        return final

    def _write(self, folder: Path, step: int, state: State, extra: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's files; returns what the manifest says of them."""
        tensors, table = self.share(state)
        files = {file: write_tensors(folder / file, *held) for file, held in self._headed(tensors, step).items()}
        if self._first:
            files["state.json"] = write_text(folder / "state.json", state_text(extra))
        return {"files": files, "tensors": table}

    def share(self, state: State) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """What this rank writes of a state: tensors by file, and what a manifest says of each."""
        files: dict[str, dict[str, Tensor]] = {}
        tensors: dict[str, Any] = {}
        for group, named in state.items():
            mine = {name: piece for name, piece in named.items() if _is_written(piece)}
            if not mine:
                continue
            file = f"{group}-{self.mesh.rank:05d}.safetensors"
            assert _FILE.fullmatch(file)
            files[file] = {name: piece.tensor for name, piece in mine.items()}
            tensors[group] = {
                name: {
                    "dtype": NAMES[piece.tensor.dtype],
                    "shape": piece.place.shape,
                    "pieces": [{"file": file, "start": piece.place.start, "size": piece.place.size}],
                }
                for name, piece in mine.items()
            }
        return files, tensors

    def _headed(self, files: Mapping[str, Mapping[str, Tensor]], step: int) -> dict[str, tuple[Mapping[str, Tensor], Mapping[str, str]]]:
        metadata = {"format": "pt", "run": self.run, "step": str(step), "plan_sha256": self.plan_sha256}
        return {file: (tensors, metadata) for file, tensors in files.items()}

    def begin(
        self, writer: Writer, token: str, step: int, state: State, extra: Mapping[str, Any], need_bytes: int, sync: Sequence[Path]
    ) -> None:
        """Stage this rank's share for `writer`, which goes on alone, whatever the other ranks' do. `token`: the same on all ranks, and never again.

        Not collective, and not committed: the outcome of rank 0's writer is the save's. `sync`: files that are made durable before the commit. Raises
        CheckpointError where this rank has no memory for it or no process.
        """
        files, tensors = self.share(state)
        writer.write(
            writer.stage(self._headed(files, step)),
            self.folder / f"step-{step:08d}",
            temporary=f".writing-{step:08d}-{token}",
            rank=self.mesh.rank,
            ranks=self.mesh.count,
            texts={"state.json": state_text(extra)} if self._first else {},
            tensors=tensors,
            sync=[str(path) for path in sync],
            manifest=self.manifest(step),
            need_bytes=need_bytes,
            keep=self.keep,
            keep_every=self.keep_every,
        )

    def manifest(self, step: int) -> dict[str, Any]:
        """What a manifest says beside files and tensors."""
        return {"format": FORMAT, "run": self.run, "plan_sha256": self.plan_sha256, "step": step, "ranks": self.mesh.count}

    def committed(self, step: int) -> None:
        """This run's processes made a step's checkpoint."""
        self._whole.add(step)

    def has(self, step: int) -> bool:
        """Whether this run's processes made or checked a step's checkpoint."""
        return step in self._whole

    def _agreed(self, step: int) -> contextlib.AbstractContextManager[None]:
        return agreed(self.mesh, CheckpointError, functools.partial(self.unsaved, step))

    def unsaved(self, step: int, failure: Exception | str) -> str:
        """Why a step was not saved, in words."""
        if isinstance(failure, (CheckpointError, writing.Refused)):
            return str(failure)
        if isinstance(failure, str) and failure.endswith("untouched"):
            return failure
        found = failure if isinstance(failure, str) else writing.described(failure)
        return f"step {step} could not be saved in {self.folder}: {found}; earlier ones are untouched"

    def need_bytes(self, state: State) -> int:
        """Bytes of all ranks' pieces. Collective."""
        pieces = [piece.tensor for named in state.values() for piece in named.values() if _is_written(piece)]
        count = torch.tensor(sum(tensor.numel() * tensor.element_size() for tensor in pieces), device=self.mesh.device)
        return int(self.mesh.sum(count))

    def _check_space(self, state: State) -> None:
        """Whether all ranks' pieces fit."""
        need = self.need_bytes(state)
        with agreed(self.mesh, CheckpointError, str):
            if self._first:
                try:
                    writing.check_space(str(self.folder), need)
                except writing.Refused as failure:
                    raise CheckpointError(str(failure)) from None

    def steps(self) -> list[int]:
        """Steps with a commit marker, oldest first."""
        return writing.steps(str(self.folder))

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
                self._whole.discard(step)  # whoever comes to it again saves it anew
                refused.append(str(failure))
        none = f"{self.folder} holds no committed checkpoint, so there is nothing to resume; start with --new"
        failure = CheckpointError("no checkpoint is whole:\n" + "\n".join(f"  {reason}" for reason in refused) if refused else none)
        failure.shared = True
        raise failure

    def at(self, step: int) -> Found:
        """The checkpoint of a step, if it is whole. Raises CheckpointError on every rank, naming the steps that there are."""
        known = told(self.mesh, self.steps() if self._first else None)
        if step not in known:
            said = ", ".join(f"{one:,}" for one in known[-8:]) or "none"
            failure = CheckpointError(f"{self.folder} holds no checkpoint of step {step:,}; there are {said}")
            failure.shared = True
            raise failure
        return self._open(step)

    def forget(self, step: int) -> None:
        """The run went back to `step`: what was saved of later ones is no longer its own, and is saved anew."""
        self._whole = {one for one in self._whole if one <= step}

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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as failure:
            raise CheckpointError(f"{folder}/manifest.json is not a manifest: {failure}") from None


def state_text(extra: Mapping[str, Any]) -> str:
    """state.json."""
    return json.dumps(extra, indent=1, sort_keys=True)


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
    except (ValueError, RecursionError) as failure:
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
