"""The order of samples, as a pure function of the seed and a global position: nothing is shuffled, stored or replayed.

Position p of the run names one sample of one source. So prefetching, workers, ranks and resumes cannot disagree about what comes next.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from math import isfinite, lcm

import numpy as np

from gigatrain.errors import DataError

ROUNDS = 6  # four balanced rounds are pseudorandom if the round function is (Luby and Rackoff, 1988); small halves need some more
MASK = (1 << 64) - 1
LONGEST_CYCLE = 1 << 16
FEW = 24  # below this many, plain integers (8 us each) beat arrays (200 us in all)
SHORTEST_CYCLE = 64  # slots: permuting a cycle costs some 0.15 ms, so 1:1 is not a cycle of 2
# splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014): every input bit flips each output bit with probability close to one half.
MIX1, MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@lru_cache(1024)
def round_keys(*key: int | str) -> tuple[int, ...]:
    """ROUNDS keys of 64 bits from the parts of a name, such as (seed, "epoch", source, epoch)."""
    digest = blake2b("/".join(map(str, key)).encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def permute(index: int, length: int, key: tuple[int, ...]) -> int:
    """Where `index` goes in the keyed permutation of range(length); O(1), and a bijection for every key.

    A balanced Feistel network permutes the smallest range of 4^h numbers that holds `length`, at most 4 times as many; an image outside is
    permuted again until it falls inside (cycle walking; at most 4 times on average).
    """
    if not 0 <= index < length:
        raise IndexError(f"{index} is outside range({length})")
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for k in key:
            z = right + k & MASK
            z = (z ^ z >> 30) * MIX1 & MASK
            z = (z ^ z >> 27) * MIX2 & MASK
            left, right = right, left ^ (z ^ z >> 31) & mask
        index = left << half | right
        if index < length:
            return index


def permute_many(indices: np.ndarray, length: int, key: tuple[int, ...]) -> np.ndarray:
    """`permute` of every element: int64 [n] -> int64 [n]."""
    if indices.size and not (indices.min() >= 0 and indices.max() < length):
        raise IndexError(f"an index of {indices.min()} .. {indices.max()} is outside range({length})")
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    result = indices.astype(np.uint64)
    todo = np.arange(len(result))
    while todo.size:
        x = result[todo]
        left, right = x >> half, x & mask
        for k in key:
            z = right + np.uint64(k)  # uint64 arrays wrap, which is what is wanted
            z = (z ^ z >> np.uint64(30)) * np.uint64(MIX1)
            z = (z ^ z >> np.uint64(27)) * np.uint64(MIX2)
            left, right = right, left ^ (z ^ z >> np.uint64(31)) & mask
        x = left << half | right
        result[todo] = x
        todo = todo[x >= np.uint64(length)]
    return result.astype(np.int64)


def slot_counts(weights: Sequence[float]) -> list[int]:
    """How many slots of a cycle each source has, at least one.

    The cycle is the shortest that holds the weights exactly, up to 65,536 slots; above, the nearest by largest remainder. Weights are taken
    as they are written: 0.1 is one tenth, not the nearest binary fraction. DataError if a source would get no slot, or a weight is no
    positive number.
    """
    for i, weight in enumerate(weights):
        if not (isfinite(weight) and weight > 0):
            raise DataError(f"source {i} has weight {weight}, and a weight is a positive, finite number; correct it, or drop the source")
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    length = lcm(*(share.denominator for share in shares))
    if length <= LONGEST_CYCLE:
        return [int(share * length) for share in shares]
    wanted = [share * LONGEST_CYCLE for share in shares]
    counts = [int(want) for want in wanted]
    for i in sorted(range(len(counts)), key=lambda i: (counts[i] - wanted[i], i))[: LONGEST_CYCLE - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        i = counts.index(0)
        raise DataError(
            f"source {i} has weight {weights[i]}, a share of {float(shares[i]):.2e}, and the least is 1 / {LONGEST_CYCLE:,}; "
            "raise it, or drop the source"
        )
    return counts


class Mixture:
    """Which sample comes at a position.

    Sources are in exact proportion within each cycle of slots, and every sample of a source comes once per epoch of it. The cycle's slots
    are permuted anew in each cycle, a source's samples in each of its epochs. sizes: samples of each source. weights: their shares.

    Of a phase (course.py): sources, the numbers of those that it reads; came, how many samples of each came before; cycles and kind tell the orders of cycles
    and of samples apart from those of other phases.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        *,
        sources: Sequence[int] | None = None,
        came: Sequence[int] | None = None,
        cycles: int = 0,
        kind: int = 0,
    ) -> None:
        if len(sizes) != len(weights) or not sizes:
            raise DataError(f"{len(sizes)} sources and {len(weights)} weights")
        if min(sizes) < 1:
            raise DataError(f"source {list(sizes).index(min(sizes))} has {min(sizes)} samples; a mixture needs at least one of each")
        self.sizes, self.seed = tuple(sizes), seed
        self.sources, self.came = tuple(sources or range(len(sizes))), tuple(came or [0] * len(sizes))
        self._cycles, self._kind = (cycles,) if cycles else (), (kind,) if kind else ()
        counts = slot_counts(weights)
        self.counts = [count * -(-SHORTEST_CYCLE // sum(counts)) for count in counts]
        self.cycle = sum(self.counts)
        self.ends = np.cumsum(self.counts)
        self.last: tuple[int, np.ndarray, np.ndarray] | None = None

    def _slots(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Of one cycle: each slot's source, and how many earlier slots of the cycle have the same source.

        At most 65,536 slots, kept until another cycle is asked for.
        """
        last = self.last  # once, as another thread may replace it meanwhile
        if last is None or last[0] != cycle:
            places = permute_many(np.arange(self.cycle), self.cycle, round_keys(self.seed, "slots", cycle, *self._cycles))
            owner = np.searchsorted(self.ends, places, "right")
            earlier = np.empty_like(owner)
            for source in range(len(self.counts)):
                mine = owner == source
                earlier[mine] = np.arange(int(mine.sum()))
            self.last = last = cycle, owner, earlier
        return last[1], last[2]

    def at(self, position: int) -> tuple[int, int, int]:
        """(source, epoch of that source, sample of that source) at a global position."""
        source, ordinal = self._turn(position)
        epoch, index = divmod(ordinal, self.sizes[source])
        return self.sources[source], epoch, permute(index, self.sizes[source], self._keys(source, epoch))

    def _keys(self, source: int, epoch: int) -> tuple[int, ...]:
        return round_keys(self.seed, "epoch", self.sources[source], epoch, *self._kind)

    def used(self, position: int) -> list[int]:
        """Samples of each source before a position."""
        if len(self.counts) == 1:
            return [position]
        cycle, slot = divmod(position, self.cycle)
        owner, _ = self._slots(cycle)
        return [cycle * count + int((owner[:slot] == source).sum()) for source, count in enumerate(self.counts)]

    def _turn(self, position: int) -> tuple[int, int]:
        """(source, how many samples of it came before)."""
        if len(self.counts) == 1:
            return 0, self.came[0] + position
        cycle, slot = divmod(position, self.cycle)
        owner, earlier = self._slots(cycle)
        source = int(owner[slot])
        return source, self.came[source] + cycle * self.counts[source] + int(earlier[slot])

    def many(self, positions: Sequence[int]) -> list[tuple[int, int, int]]:
        """`at` of many positions, vectorised over each source and epoch."""
        turns = [self._turn(position) for position in positions]
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (source, ordinal) in enumerate(turns):
            groups.setdefault((source, ordinal // self.sizes[source]), []).append(row)
        found: list[tuple[int, int, int]] = [(0, 0, 0)] * len(turns)
        for (source, epoch), rows in groups.items():
            indices = [turns[row][1] % self.sizes[source] for row in rows]
            key, size = self._keys(source, epoch), self.sizes[source]
            few = len(rows) < FEW
            samples = [permute(index, size, key) for index in indices] if few else permute_many(np.array(indices), size, key).tolist()
            for row, sample in zip(rows, samples, strict=True):
                found[row] = self.sources[source], epoch, sample
        return found
