"""Whether ranks that hold the same tensors hold the same bits: one 64-bit hash each, compared in a sum over all ranks.

Of a tensor's 32-bit words x_i (the last of an odd length is filled up with zeros), modulo 2^64,

    hash = sum over i of x_i * (2 K i + 1)          K odd, so that the factors are odd and all different

A flipped bit b of word i changes the hash by 2^b times an odd number, and that is never 0 modulo 2^64: any single flip is seen. Two words that are
exchanged change it by (x_i - x_j) 2 K (i - j), which is not 0 in any tensor of less than 2^32 words. Whatever else differs is missed about once in 2^64.
A rank's tensors are added up with odd weights of their names, so a single flip is seen in their sum too.

n ranks that hold the same tensors have the hashes h_1 … h_n. Each adds c_j h_j to a sum over all ranks of the run, with factors of sum 0: the sum is 0 if
they are equal. A rank that alone has another hash, by d, makes it c_j d, not 0 where c_j is odd. An odd count of odd numbers cannot have the sum 0; so there
are two sums, with all factors odd but that of the first rank in one and that of the second rank in the other. The numbers travel as halves of 32 bits,
which no sum over 2^31 ranks overflows: four integers in all, whatever the size of the model and the number of ranks.

What nobody else holds, as in pure sharding, is not seen; `covered` says how much that is.
"""

import hashlib
import socket
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gigatrain.parallel.agree import gathered, told
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import Replica

K = 0x9E3779B97F4A7C15  # odd; 2^64 over the golden ratio, so that factors are spread over all 64 bits
CHUNK = 1 << 22  # words hashed at a time: 64 MB beside the tensor
BUCKETS = 4096  # of names, when a difference is looked for
NAMED = 16  # tensors that are named, of those that differ
SUMS = 4  # integers that a rank adds to a reduction
ALL = (1 << 64) - 1

_factors: dict[torch.device, Tensor] = {}


def hash64(tensor: Tensor) -> Tensor:
    """The hash of a contiguous tensor's bits, int64 and 0-d on its device; nobody waits."""
    data = tensor.detach().reshape(-1).view(torch.uint8)
    if data.numel() % 4 or data.storage_offset() % 4:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 4)).clone()
    words = data.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if not words.numel():
        return total
    factors = _table(tensor.device, min(CHUNK, words.numel()))
    for start in range(0, words.numel(), CHUNK):
        part = words[start : start + CHUNK]
        total += (part * factors[: part.numel()]).sum()  # widened by the factors; a sum modulo 2^64 does not depend on its order
        if start:
            total += part.sum(dtype=torch.int64) * _signed(2 * K * start)
    return total


def _table(device: torch.device, count: int) -> Tensor:
    """The factors of the first words."""
    found = _factors.get(device)
    if found is None or len(found) < count:
        found = _factors[device] = torch.arange(count, dtype=torch.int64, device=device) * _signed(2 * K) + 1
    return found


def _signed(number: int) -> int:
    number &= ALL
    return number - (1 << 64) if number >> 63 else number


def _odd(*words: Any) -> int:
    """An odd number that follows from words."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, words)).encode()).digest()[:8], "little") | 1


class Shared:
    """This rank's tensors that others hold too. `mesh` says who."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._factors: dict[tuple[str, ...], tuple[int, int]] = {}
        self._names: dict[str, int] = {}

    def hashes(self, replicas: Iterable[Replica]) -> dict[str, tuple[tuple[str, ...], int]]:
        """Axes and hash of each of those that another rank holds, by name; waits for the device once."""
        mine = [one for one in replicas if self.mesh.size(*one.axes) > 1] if self.mesh.count > 1 else []
        if not mine:
            return {}
        values = torch.stack([hash64(one.tensor).to(self.mesh.device) for one in mine]).tolist()
        return {one.name: (one.axes, value & ALL) for one, value in zip(mine, values, strict=True)}

    def covered(self, replicas: Iterable[Replica]) -> float:
        """The share of this rank's bytes that another rank holds too."""
        sizes = [(one.tensor.numel() * one.tensor.element_size(), self.mesh.size(*one.axes) > 1) for one in replicas]
        return sum(size for size, held in sizes if held) / max(1, sum(size for size, _ in sizes))

    def sums(self, hashes: dict[str, tuple[tuple[str, ...], int]]) -> list[int]:
        """What this rank adds to a sum over all ranks: SUMS integers."""
        totals = [0, 0]
        for name, (axes, value) in hashes.items():
            weight = self._names.setdefault(name, _odd(name))
            for index, factor in enumerate(self._factor(axes)):
                totals[index] += factor * weight * value
        return [half for total in totals for half in (total >> 32 & 0xFFFFFFFF, total & 0xFFFFFFFF)]

    def _factor(self, axes: tuple[str, ...]) -> tuple[int, int]:
        if axes not in self._factors:
            count, mine, first = self.mesh.size(*axes), self.mesh.index(*axes), self.mesh.ranks(*axes)[0]
            odd = _odd("group", first, axes)
            self._factors[axes] = tuple(odd * factor(mine, count, balance) & ALL for balance in (0, 1))  # type: ignore[assignment]
        return self._factors[axes]

    def find(self, hashes: dict[str, tuple[tuple[str, ...], int]]) -> list[dict[str, Any]]:
        """What differs: its `name`, the `ranks` that have another hash than most, their `hosts`, and how many `copies` there are. Collective; the same on all.

        Of copies that are as many on one side as on the other, all are named. Two collectives more, of 128 KiB and of what differs.
        """
        table = torch.zeros(BUCKETS, SUMS, dtype=torch.int64)
        for name, one in hashes.items():
            table[_odd(name) // 2 % BUCKETS] += torch.tensor(self.sums({name: one}))
        whole = self.mesh.sum(table.to(self.mesh.device)).tolist()
        hot = {index for index, row in enumerate(whole) if differ(row)}
        mine = [
            [name, self.mesh.ranks(*axes)[0], value] for name, (axes, value) in hashes.items() if _odd(name) // 2 % BUCKETS in hot
        ]  # names that share a bucket with one that differs agree, and fall out below
        records = gathered(self.mesh, {"host": socket.gethostname(), "held": mine})
        return told(self.mesh, _minorities(records)[:NAMED])


def factor(index: int, count: int, balance: int) -> int:
    """What rank `index` of `count` multiplies its hash by: odd but for rank `balance`, and of sum 0 modulo 2^64."""
    if index != balance:
        return _odd("rank", balance, index)
    return -sum(_odd("rank", balance, other) for other in range(count) if other != balance) & ALL


def differ(sums: Sequence[int]) -> bool:
    """Whether the sums over all ranks say that not all copies are equal."""
    return any(((high << 32) + low) & ALL for high, low in zip(sums[::2], sums[1::2], strict=True))


def _minorities(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    held: dict[tuple[str, int], dict[int, list[int]]] = {}
    for rank, record in enumerate(records):
        for name, first, value in record["held"]:
            held.setdefault((name, first), {}).setdefault(value, []).append(rank)
    found = []
    for (name, _), by_value in held.items():
        if len(by_value) > 1:
            most = max(map(len, by_value.values()))
            leaders = [value for value, ranks in by_value.items() if len(ranks) == most]
            others = sorted(rank for value, ranks in by_value.items() if leaders != [value] for rank in ranks)
            hosts = sorted({records[rank]["host"] for rank in others})
            found.append({"name": name, "ranks": others, "hosts": hosts, "copies": sum(map(len, by_value.values()))})
    return found


def words(found: Sequence[dict[str, Any]]) -> str:
    """What `find` found, a line each."""
    lines = [
        f"\n    {one['name']}: rank {', '.join(map(str, one['ranks']))} of {one['copies']} copies, on {', '.join(one['hosts'])}"
        + (" (as many as the others: which is right is not known)" if 2 * len(one["ranks"]) >= one["copies"] else "")
        for one in found[:8]
    ]
    return "".join(lines) + (f"\n    and {len(found) - 8} more" if len(found) > 8 else "")
