"""How a part travels between nodes: who is whose peer, the gloo groups that they share, and files in messages, hashed as they come.

What arrives is JSON and bytes of files.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from gigatrain.checkpoint.folder import opened
from gigatrain.errors import CheckpointError
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.ranks import TIMEOUT

_PIECE = 1 << 26  # bytes of a message


def destinations(rank: int, ranks: int, node: int, copies: int) -> list[int]:
    """Who keeps copies of a rank's part: one rank on each of the next `copies` nodes, in the order of the mesh, never of its own."""
    nodes = -(-ranks // node)
    at, local = divmod(rank, node)
    found = []
    for far in range(1, min(copies, nodes - 1) + 1):
        first = (at + far) % nodes * node
        found.append(first + local % min(node, ranks - first))
    return found


def sources(rank: int, ranks: int, node: int, copies: int) -> list[int]:
    """Whose parts a rank keeps copies of."""
    nodes, at = -(-ranks // node), rank // node
    before = sorted({(at - far) % nodes for far in range(1, min(copies, nodes - 1) + 1)})
    near = (other for one in before for other in range(one * node, min(ranks, one * node + node)))
    return [other for other in near if rank in destinations(other, ranks, node, copies)]


def pairs(mesh: Mesh, copies: int) -> dict[int, distributed.ProcessGroup]:
    """A gloo group with each peer, apart from those of the step, so that a thread may use it and NCCL has no part in it.

    All ranks make theirs in one order of all pairs, so that nobody waits for who waits for him; even nodes' first, so that the chain of waiting is short.
    """
    rank, ranks, node = mesh.rank, mesh.count, mesh.node
    mine = {(rank, peer) for peer in destinations(rank, ranks, node, copies)} | {
        (peer, rank) for peer in sources(rank, ranks, node, copies)
    }
    pairs = sorted({(min(pair), max(pair)) for pair in mine}, key=lambda pair: (pair[0] // node % 2, pair))
    made = {}
    for low, high in pairs:
        group = distributed.new_group([low, high], timeout=TIMEOUT, backend="gloo", use_local_synchronization=True)
        assert isinstance(group, distributed.ProcessGroup)
        made[high if low == rank else low] = group
    return made


def message(folder: Path, text: bytes | None) -> Iterator[Tensor]:
    """A part as it travels: length of its manifest (-1: there is none), manifest, files by name."""
    yield torch.tensor([-1 if text is None else len(text)], dtype=torch.int64)
    if text is None:
        return
    yield torch.frombuffer(bytearray(text), dtype=torch.uint8)
    for name in sorted(json.loads(text)["files"]):
        yield from file_bytes(folder / name)


def file_bytes(path: Path) -> Iterator[Tensor]:
    """A file's bytes, mapped, in messages; of an empty one nothing."""
    with opened(path) as file:
        if size := os.fstat(file.fileno()).st_size:
            data = torch.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), dtype=torch.uint8)
            yield from data.split(_PIECE)


def received(group: distributed.ProcessGroup | None, peer: int, size: int) -> Iterator[Tensor]:
    """What a peer sends of a file of `size` bytes."""
    buffer = torch.empty(min(size, _PIECE), dtype=torch.uint8)
    while size:
        part = buffer[: min(size, _PIECE)]
        distributed.recv(part, peer, group=group)
        size -= part.numel()
        yield part


def keep_file(path: Path, record: Mapping[str, Any], chunks: Iterator[Tensor]) -> None:
    """Write what comes, which ends whole or not at all; all of it is received, even where it cannot be kept."""
    digest, failure = hashlib.sha256(), None
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = None
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    except OSError as found:
        failure = found
    for part in chunks:
        data = part.numpy().data
        digest.update(data)
        while descriptor is not None and failure is None and data:
            try:
                data = data[os.write(descriptor, data) :]
            except OSError as found:
                failure = found
    if descriptor is not None:
        os.close(descriptor)
    if failure is None and digest.hexdigest() != record["sha256"]:
        failure = CheckpointError(f"{path.name} was damaged on its way to this node")
    if failure is not None:
        temporary.unlink(missing_ok=True)
        raise failure
    temporary.replace(path)
