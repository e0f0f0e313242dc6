"""What ranks tell each other outside a step: small JSON values and failures, through the process group of all ranks, and never unpickled.

Everything here is collective: all ranks of the mesh call it, in the same order. Values travel as compressed bytes, padded to the longest. What one rank
gathers is O(ranks) bytes, fine to some thousand ranks; beyond, records belong into files of their own.
"""

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed

from gigatrain.errors import GigatrainError
from gigatrain.parallel.mesh import AXES, Mesh


def told(mesh: Mesh, value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    group = mesh.group(*AXES)
    if group is None:
        return value
    data = _bytes(value if mesh.rank == 0 else None).to(mesh.device)
    length = torch.tensor(data.numel(), device=mesh.device)
    distributed.broadcast(length, 0, group)
    data = data if mesh.rank == 0 else data.new_empty(int(length))
    distributed.broadcast(data, 0, group)
    return _value(data)


def gathered(mesh: Mesh, value: Any) -> list[Any]:
    """The values of all ranks by rank, on rank 0; elsewhere nothing."""
    group = mesh.group(*AXES)
    if group is None:
        return [value]
    data = _padded(mesh, group, value)
    parts = [torch.empty_like(data) for _ in range(mesh.count)] if mesh.rank == 0 else None
    distributed.gather(data, parts, 0, group)
    return [_value(part) for part in parts or []]


@contextlib.contextmanager
def agreed(mesh: Mesh, kind: type[GigatrainError], described: Callable[[Exception], str]) -> Iterator[None]:
    """What stands inside fails on every rank or on none: with a `kind` that says what the first rank that failed `described`.

    A failure that is no GigatrainError and no OSError is a mistake of ours, and keeps its traceback on the rank that made it. Nothing inside may be
    collective where only one rank can fail: the others would wait in it.
    """
    failure = None
    try:
        yield
    except Exception as found:  # all kinds: whoever fails alone leaves the others waiting
        failure = found
    group = mesh.group(*AXES)
    reason = described(failure) if failure else None
    if group is not None:
        flag = torch.tensor(int(failure is not None), device=mesh.device)
        distributed.all_reduce(flag, group=group)
        if flag.item():
            reason = _first(mesh, group, reason)
    if failure and (not isinstance(failure, (GigatrainError, OSError)) or (group is None and isinstance(failure, GigatrainError))):
        raise failure
    if reason is not None:
        error = kind(reason)
        error.shared = True
        raise error from None


def _first(mesh: Mesh, group: distributed.ProcessGroup, reason: str | None) -> str:
    """The failure of the lowest rank that has one, and whose it is."""
    data = _padded(mesh, group, reason)
    parts = [torch.empty_like(data) for _ in range(mesh.count)]
    distributed.all_gather(parts, data, group)
    return next(f"rank {rank} of {mesh.count}: {text}" for rank, text in enumerate(map(_value, parts)) if text is not None)


def _padded(mesh: Mesh, group: distributed.ProcessGroup, value: Any) -> Tensor:
    data = _bytes(value).to(mesh.device)
    longest = torch.tensor(data.numel(), device=mesh.device)
    distributed.all_reduce(longest, distributed.ReduceOp.MAX, group)
    return torch.nn.functional.pad(data, (0, int(longest) - data.numel()))


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(value).encode(), 1)), dtype=torch.uint8)


def _value(data: Tensor) -> Any:
    return json.loads(zlib.decompressobj().decompress(data.cpu().numpy().tobytes()))  # what follows the stream's end is padding
