"""What a checkpoint says that it holds: of every tensor its dtype, its whole shape and the boxes that tile it; and how these are read."""

import hashlib
import json
import math
import operator
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gigatrain.checkpoint.files import DTYPES, NAMES
from gigatrain.checkpoint.writing import tile
from gigatrain.errors import CheckpointError


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
        self.stored, self._files = group_of(found, group), Files(found.folder)

    def __getitem__(self, name: str) -> Tensor:
        stored = self.stored[name]
        if len(stored.boxes) == 1:
            return self._files.read(stored, stored.boxes[0], name)
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        for box in stored.boxes:
            whole[slices(box.start, box.size)] = self._files.read(stored, box, name)
        return whole

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` along dim 0 (all of a scalar), read into memory of their own: no file stays mapped, and nothing else is read."""
        stored = self.stored[name]
        if not stored.shape:
            return self[name]
        found = torch.empty((stop - start, *stored.shape[1:]), dtype=stored.dtype)
        for box in stored.boxes:
            first, last = max(start, box.start[0]), min(stop, box.start[0] + box.size[0])
            if first < last and math.prod(box.size):
                within = slices((first - start, *box.start[1:]), (last - first, *box.size[1:]))
                found[within] = self._files.rows(stored, box, name, first - box.start[0], last - box.start[0])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


class Files:
    """The tensor files of a checkpoint, each mapped once and kept mapped: 10,000 of them take addresses, not memory or descriptors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}  # where a file's tensors begin, and what it says of them

    def read(self, stored: Stored, box: Box, name: str, within: tuple[slice, ...] | None = None) -> Tensor:
        """A box of a tensor, or the part `within` it. Raises CheckpointError where the file holds anything but what the manifest says."""
        try:
            if box.file not in self._open:
                self._open[box.file] = safe_open(self.folder / box.file, framework="pt")
            part = self._open[box.file].get_slice(name)
            if tuple(part.get_shape()) != box.size or part.get_dtype() != NAMES[stored.dtype]:
                raise CheckpointError(
                    f"{self.folder / box.file} holds {name} as {part.get_dtype()} {part.get_shape()}, "
                    f"by the manifest it is {NAMES[stored.dtype]} {list(box.size)}"
                )
            return self._open[box.file].get_tensor(name) if within is None else part[within]
        except (SafetensorError, FileNotFoundError) as failure:
            raise CheckpointError(f"{self.folder / box.file} cannot be read: {failure}") from None

    def rows(self, stored: Stored, box: Box, name: str, start: int, stop: int) -> Tensor:
        """Rows of a box along its dim 0, by one read of the file and not through its map, whose pages would count as this process's memory."""
        path = self.folder / box.file
        try:
            if box.file not in self._headers:
                with path.open("rb") as file:
                    (length,) = struct.unpack("<Q", file.read(8))
                    self._headers[box.file] = 8 + length, json.loads(file.read(length))
            began, header = self._headers[box.file]
            entry = header[name]
            if tuple(entry["shape"]) != box.size or entry["dtype"] != NAMES[stored.dtype]:
                raise CheckpointError(
                    f"{path} holds {name} as {entry['dtype']} {entry['shape']}, by the manifest it is {NAMES[stored.dtype]} {list(box.size)}"
                )
            row = math.prod(box.size[1:]) * stored.dtype.itemsize
            data = torch.empty((stop - start) * row, dtype=torch.uint8)
            with path.open("rb") as file:
                file.seek(began + entry["data_offsets"][0] + start * row)
                count = file.readinto(data.numpy().data)
            if count != len(data):
                raise CheckpointError(f"{path} ends within {name}")
            return data.view(stored.dtype).view(stop - start, *box.size[1:])
        except OSError as failure:
            raise CheckpointError(f"{path}: {failure.strerror}") from None
        except (ValueError, KeyError, TypeError, struct.error) as failure:
            raise CheckpointError(f"{path} cannot be read: {failure}") from None


def weights_sha256(found: Found) -> str:
    """SHA-256 over names and bytes of the fp32 master weights, in the order of the names: equal for equal weights, however they were cut and saved."""
    digest, weights = hashlib.sha256(), found.tensors("weights")
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def table_of(manifest: Mapping[str, Any]) -> dict[str, dict[str, Stored]]:
    """What a manifest says of the tensors. Raises ValueError, KeyError or TypeError where it is no such table or a tensor's boxes do not tile it."""
    table: dict[str, dict[str, Stored]] = {}
    for group, named in manifest["tensors"].items():
        table[group] = {}
        for name, entry in named.items():
            shape = _integers(entry["shape"])
            boxes = tuple(Box(piece["file"], _integers(piece["start"]), _integers(piece["size"])) for piece in entry["pieces"])
            if not tile(shape, [(box.start, box.size) for box in boxes]):
                raise ValueError(f"the pieces of {group} {name} leave a gap in {list(shape)}, or lie one over another or outside")
            table[group][name] = Stored(DTYPES[entry["dtype"]], shape, boxes)
    return table


def _integers(values: Any) -> tuple[int, ...]:
    return tuple(operator.index(value) for value in values)


def group_of(found: Found, group: str) -> dict[str, Stored]:
    if group not in found.table:
        raise CheckpointError(f"{found.folder} holds no {group}, only {', '.join(sorted(found.table)) or 'nothing'}")
    return found.table[group]


def slices(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))
