"""Files of a checkpoint as they are written: whole or absent, and hashed on the way."""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gigatrain.data.shards import sync_folder  # data can be lifted out alone, so what both need is there

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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write a safetensors file piece by piece, hashing as it goes; returns {"bytes", "sha256"}.

    The format (github.com/huggingface/safetensors): u64 header length, JSON header, tensors end to end. The library's own writer needs all
    bytes in memory at once and leaves the hash to a second read.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
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
