"""Whole matrices out of boxes and back: each rank of a group holds a box of every matrix, one rank of them, its owner, needs it whole for a while.

Matrices that are cut alike travel together. In a round every owner gets its next batch: `gather` is one all-to-all of boxes to their owners, `scatter` one
of results back. What each rank sends to each is known at construction, so that no round waits for sizes. Both return at once; whoever needs the data waits.

Legend: n matrices of a batch, r x c; b elements of a box here. On the wire a rank's part for an owner is [n, b], in the order of the owners.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from gigatrain.kernels.newton_schulz import Places as Starts
from gigatrain.parallel.mesh import WEIGHTS, Mesh
from gigatrain.parallel.places import Place

AXES = (
    *WEIGHTS,
    "tensor",
)  # ranks along these together hold a matrix; along `replicate` are copies, which do the same work each for itself

Box = tuple[int, int, int, int]  # first row, first column, rows, columns


@dataclass(frozen=True)
class Stretch:
    """Neighbours on the wire: boxes of `elements` here, of matrices of one `shape`, and where each begins in the flat buffers."""

    shape: tuple[int, int]
    elements: int
    count: int
    starts: Starts
    aligned: bool


@dataclass(frozen=True)
class Way:
    """One direction of a round: what lies in this rank's flat buffers, in the order of owners, and of which ranks' boxes its own batch consists."""

    stretches: tuple[Stretch, ...]
    sizes: list[int]  # elements by owner
    boxes: tuple[Box, ...]
    box_sizes: list[int]  # elements by the rank that holds the box


@dataclass(frozen=True)
class Round:
    """This rank's batch (none: no names), and the ways of all ranks' batches to their owners and back."""

    names: tuple[str, ...]
    shape: tuple[int, int]
    there: Way
    back: Way
    unsent: tuple[Stretch, ...]  # boxes here that another rank holds too, and sends


def boxes_of_all(places: Mapping[str, Place], mesh: Mesh) -> list[list[Box]]:
    """Every rank's box of every matrix: [rank of the group][matrix]. Collective; all ranks have the same names in the same order."""
    mine = torch.tensor([[*place.start, *place.size] for place in places.values()], dtype=torch.int64, device=mesh.device)
    parts = [torch.empty_like(mine) for _ in range(mesh.size(*AXES))]
    distributed.all_gather(parts, mine, group=mesh.group(*AXES))
    return [[(row[0], row[1], row[2], row[3]) for row in part.tolist()] for part in parts]


class Exchange:
    """Rounds of batches, the same on all ranks of the group: `owners` says whose each matrix is, `most` how many of a shape a batch may hold."""

    def __init__(
        self,
        places: Mapping[str, Place],
        starts: Mapping[str, int],
        owners: Mapping[str, int],
        most: Mapping[tuple[int, int], int],
        mesh: Mesh,
        device: torch.device,
        *,
        fused: bool,
    ) -> None:
        self.group, self.rank, self.ranks = mesh.group(*AXES), mesh.index(*AXES), mesh.size(*AXES)
        self._starts, self._device, self._fused = starts, device, fused
        self._shapes = {name: (place.shape[0], place.shape[1]) for name, place in places.items()}
        table = boxes_of_all(places, mesh)
        cuts = {name: tuple(boxes[at] for boxes in table) for at, name in enumerate(places)}
        batches: list[list[tuple[str, ...]]] = [[] for _ in range(self.ranks)]
        for owner in range(self.ranks):
            alike: dict[Any, list[str]] = {}
            for name in (name for name in places if owners[name] == owner):
                alike.setdefault((self._shapes[name], cuts[name]), []).append(name)
            for (shape, _), names in alike.items():
                batches[owner] += (tuple(names[first : first + most[shape]]) for first in range(0, len(names), most[shape]))
            # The heaviest first, so that what owners do in one round takes about as long.
            batches[owner].sort(key=lambda names: -len(names) * min(self._shapes[names[0]]) ** 2 * max(self._shapes[names[0]]))
        holders = {cut: _holders(cut, shape) for cut, shape in {(cuts[name], self._shapes[name]) for name in places}}
        self.rounds = [self._round(list(batch), cuts, holders) for batch in itertools.zip_longest(*batches, fillvalue=())]

    def _round(
        self, batches: list[tuple[str, ...]], cuts: Mapping[str, tuple[Box, ...]], holders: Mapping[Any, Mapping[Box, list[int]]]
    ) -> Round:
        """`batches`: of each owner."""
        senders = [_senders(holders[cuts[names[0]]], owner) if names else set() for owner, names in enumerate(batches)]
        takers = [{rank for rank, box in enumerate(cuts[names[0]]) if _elements(box)} if names else set() for names in batches]
        names = batches[self.rank]
        ways: list[Way] = []
        for ranks in (senders, takers):
            here = [names if self.rank in ranks[owner] else () for owner, names in enumerate(batches)]
            boxes = {rank: cuts[names[0]][rank] for rank in sorted(ranks[self.rank])}
            sizes = [len(names) * _elements(boxes[rank]) if rank in boxes else 0 for rank in range(self.ranks)]
            mine = [len(names) * _elements(cuts[names[0]][self.rank]) if names else 0 for names in here]
            ways.append(Way(tuple(self._stretches(here, cuts)), mine, tuple(boxes.values()), sizes))
        idle = [names if self.rank in takers[owner] - senders[owner] else () for owner, names in enumerate(batches)]
        return Round(names, self._shapes[names[0]] if names else (0, 0), ways[0], ways[1], tuple(self._stretches(idle, cuts)))

    def _stretches(self, here: list[tuple[str, ...]], cuts: Mapping[str, tuple[Box, ...]]) -> list[Stretch]:
        found = []
        flat = [(self._shapes[name], _elements(cuts[name][self.rank]), self._starts[name]) for names in here for name in names]
        for (shape, elements), members in itertools.groupby(flat, key=lambda member: member[:2]):
            starts = tuple(start for _, _, start in members)
            at = torch.tensor(starts, dtype=torch.int64, device=self._device) if self._fused else starts
            found.append(Stretch(shape, elements, len(starts), at, all(start % 16 == 0 for start in starts)))
        return found

    def gather(self, round: Round, parts: Sequence[Tensor]) -> "Coming":
        """Send this rank's boxes, one tensor [n, ..., b] for each stretch of `there`, to their owners."""
        return self._send(_joined(parts, torch.bfloat16, self._device), round.there.sizes, round.there.box_sizes)

    def whole(self, round: Round, coming: "Coming") -> Tensor:
        """This rank's batch [n, r, c], once its boxes have come."""
        arrived = coming.wait()
        batch_nrc = arrived.new_empty(len(round.names), *round.shape)
        _copy(_of(batch_nrc, round.there.boxes), _sections(arrived, round.there, len(round.names)))
        return batch_nrc

    def scatter(self, round: Round, batch_nrc: Tensor) -> "Coming":
        """Send the boxes of this rank's batch to the ranks that hold them."""
        sent = batch_nrc.new_empty(sum(round.back.box_sizes))
        _copy(_sections(sent, round.back, len(round.names)), _of(batch_nrc, round.back.boxes))
        return self._send(sent, round.back.box_sizes, round.back.sizes)

    def _send(self, sent: Tensor, out_of: list[int], into: list[int]) -> "Coming":
        arrived = sent.new_empty(sum(into))
        work = distributed.all_to_all_single(arrived, sent, into, out_of, group=self.group, async_op=True)
        return Coming(work, sent, arrived)


@dataclass
class Coming:
    """Data on the way. What is sent stays alive until it has left."""

    _work: Any
    _sent: Tensor | None
    _arrived: Tensor

    def wait(self) -> Tensor:
        """What arrived; on a GPU the stream waits and not the host."""
        self._work.wait()
        self._sent = None
        return self._arrived


def _elements(box: Box) -> int:
    return box[2] * box[3]


def _holders(cut: tuple[Box, ...], shape: tuple[int, int]) -> dict[Box, list[int]]:
    """Which ranks hold each box: several, where a parallelism copies instead of cutting."""
    found: dict[Box, list[int]] = {}
    for rank, box in enumerate(cut):
        if _elements(box):
            found.setdefault(box, []).append(rank)
    assert sum(map(_elements, found)) == shape[0] * shape[1], f"boxes {cut} do not make up a matrix of {shape}"
    return found


def _senders(holders: Mapping[Box, list[int]], owner: int) -> set[int]:
    """Of the ranks that hold the same box one sends it: the owner itself if it can, else another one for each owner."""
    return {owner if owner in ranks else ranks[owner % len(ranks)] for ranks in holders.values()}


def _joined(parts: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    flat = [part.reshape(-1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=device)


def _of(batch_nrc: Tensor, boxes: Sequence[Box]) -> list[Tensor]:
    return [batch_nrc[:, row : row + rows, column : column + columns] for row, column, rows, columns in boxes]


def _sections(wire: Tensor, way: Way, count: int) -> list[Tensor]:
    """The parts of the wire as [n, rows, columns], in the order of `boxes`."""
    parts = wire.split([size for size in way.box_sizes if size])
    return [part.view(count, box[2], box[3]) for part, box in zip(parts, way.boxes, strict=True)] if count else []


def _copy(into: list[Tensor], out_of: list[Tensor]) -> None:
    if into:
        torch._foreach_copy_(into, out_of)
