"""Safetensors files written piece by piece, from tensors that never stand in memory whole.

A tensor on disk is a few runs of rows (dim 0), each made of rows of a tensor in memory or in a checkpoint, whatever renaming, stacking or turning lies
between: all of that leaves dim 0 alone or takes one index of it. So a piece of some 16 MiB is all that is held, of however large a model.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

PIECE = 1 << 24  # bytes that are held at a time
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


class Rows(Protocol):
    """Tensors by name, of which any rows can be had."""

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """What `rows` are in."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` along dim 0, on the CPU; all of a scalar."""
        ...


class Held:
    """Tensors that are in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor."""
        return self.tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows, from whatever device they are on."""
        tensor = self.tensors[name].detach()
        return (tensor[start:stop] if tensor.dim() else tensor).cpu()


@dataclass(frozen=True)
class Written:
    """A tensor of a file: its shape and dtype, and what gives its bytes from the first to the last, piece by piece."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def size_bytes(self) -> int:
        """What it takes on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def pieces(state: Rows, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
    """Rows of a tensor, in pieces of at most PIECE bytes or one row."""
    shape = state.shape(name)
    if not shape:
        yield state.rows(name, 0, 1)
        return
    row = max(1, torch.Size(shape[1:]).numel() * 4)  # what is rounded on the way is read in fp32
    each = max(1, PIECE // row)
    stop = shape[0] if stop is None else stop
    for first in range(start, stop, each):
        yield state.rows(name, first, min(stop, first + each))


def write(path: Path, tensors: Iterable[Written], metadata: Mapping[str, str]) -> None:
    """One file (github.com/huggingface/safetensors: u64 header length, JSON header, tensors end to end), synced. The caller renames it."""
    tensors, offset = list(tensors), 0
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    for one in tensors:
        header[one.name] = {"dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [offset, offset + one.size_bytes]}
        offset += one.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for one in tensors:
            began = file.tell()
            for piece in one.pieces():
                assert piece.dtype == one.dtype, one.name
                file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            assert file.tell() - began == one.size_bytes, f"{one.name} is not {list(one.shape)}"
        file.flush()
        os.fsync(file.fileno())
