"""Files of a checkpoint as they are written: whole or absent, and hashed on the way."""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gigatrain.checkpoint import writing

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
_PIECE = 1 << 26  # bytes that leave the device at a time


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """What a safetensors file of these tensors begins with, and how many bytes of tensors follow, end to end.

    The format (github.com/huggingface/safetensors): u64 header length, JSON header, tensors.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offset


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write a safetensors file piece by piece, hashing as it goes; returns {"bytes", "sha256"}.

    The library's own writer needs all bytes in memory at once and leaves the hash to a second read.
    """

    def pieces() -> Iterator[Any]:
        yield header_of(tensors, metadata)[0]
        for tensor in tensors.values():
            for part in flat(tensor).split(_PIECE):
                yield part.cpu().numpy().data

    return writing.write_file(str(path), pieces())


def flat(tensor: Tensor) -> Tensor:
    """A tensor's bytes in order; a copy where it is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a small file so that it is whole or absent: temporary name, sync, rename, sync of the folder; returns {"bytes", "sha256"}."""
    return writing.write_text(str(path), text)
