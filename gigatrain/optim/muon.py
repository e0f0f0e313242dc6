"""Muon: momentum, orthogonalised by a Newton-Schulz iteration, for the layers' matrices (Jordan et al., 2024, kellerjordan.github.io/posts/muon).

Momentum and the move of the weights are element-wise, the iteration needs whole matrices. Where a rank holds boxes of them only, each matrix has an owner
among the ranks that together hold it, chosen so that all have the same FLOPs: boxes of bf16 updates travel to the owner, it orthogonalises, and results
travel back. A matrix costs 4 B per element on the wire, and no rank does another's work. Weights are those of one process: what is gathered is the same bits.
"""

import heapq
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gigatrain.kernels.newton_schulz import Places as Starts
from gigatrain.kernels.newton_schulz import flops, momentum_fused, muon_momentum, muon_update, newton_schulz, plan
from gigatrain.optim.adamw import Flat
from gigatrain.optim.exchange import AXES, Coming, Exchange, Round, Stretch
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import Place

Scaling = Literal["spectral", "rms"]
WORKSPACE_BYTES = 1 << 31  # four matrices of 4096 x 14336 at once: enough tiles of 256 x 128 to fill 132 multiprocessors eight times


def update_size(rows: int, columns: int, scaling: Scaling) -> float:
    """What an orthogonal update is multiplied by: `spectral` keeps the rate per unit of activation, `rms` AdamW's usual update (arXiv:2502.16982)."""
    return max(1.0, rows / columns) ** 0.5 if scaling == "spectral" else 0.2 * max(rows, columns) ** 0.5


def workspace_bytes(rows: int, columns: int) -> int:
    """What one matrix takes while it is orthogonalised: its update and the iterate before and after a product, and five matrices of its smaller side."""
    return 2 * (3 * rows * columns + 5 * min(rows, columns) ** 2)


def share(shapes: Mapping[str, tuple[int, int]], rank: int, ranks: int) -> list[str]:
    """The matrices that are `rank`'s if `ranks` split the orthogonalisation, in the order of `shapes`."""
    owner = owners(shapes, ranks)
    return [name for name in shapes if owner[name] == rank]


def owners(shapes: Mapping[str, tuple[int, int]], ranks: int) -> dict[str, int]:
    """Whose each matrix is if `ranks` split the orthogonalisation: the same split on whichever rank it is asked for.

    Heaviest first, each to the rank with the fewest FLOPs so far: no rank has more than the mean and one matrix.
    """
    cost = {name: flops(*shape, plan(*shape)) for name, shape in shapes.items()}
    loads, owner = [(0.0, index) for index in range(ranks)], dict.fromkeys(shapes, 0)
    for name in sorted(cost, key=lambda name: (-cost[name], name)):
        load, owner[name] = heapq.heappop(loads)
        heapq.heappush(loads, (load + cost[name], owner[name]))
    return owner


@dataclass(frozen=True)
class Versions:
    """The kernels of the three phases; each picks by device unless a plan says otherwise."""

    momentum: Callable[..., Tensor] = muon_momentum
    orthogonal: Callable[[Tensor], Tensor] = newton_schulz
    update: Callable[..., None] = muon_update


@dataclass(frozen=True)
class Batch:
    """Matrices of one shape that are orthogonalised together: where each begins in the flat buffers."""

    names: tuple[str, ...]
    rows: int
    columns: int
    starts: Starts
    aligned: bool


class Muon:
    """w <- w (1 - lr decay) - lr size orthogonal(s g + momentum m),  m <- momentum m + s g.

    `master` holds the weights, `grads` is where the caller sums the gradients: same names, same places. With `places` and a `mesh` they are this rank's boxes
    of the matrices, row by row, with or without padding behind them; every rank along `exchange.AXES` has the same names in the same order, and
    construction and `step` are collective. Size is sqrt(max(1, rows / columns)), or with
    `scaling="rms"` 0.2 sqrt(max(rows, columns)), which moves an entry as far as AdamW would, so that AdamW's rate and decay can be kept.
    """

    def __init__(
        self,
        master: Flat,
        grads: Flat,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        scaling: Scaling = "spectral",
        momentum_dtype: torch.dtype = torch.float32,
        limit_bytes: int = WORKSPACE_BYTES,
        versions: Versions = Versions(),
        places: Mapping[str, Place] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self.master, self.grads = master, grads
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.scaling: Scaling = scaling
        self.versions = versions
        self._fused = master.buffer.is_cuda or versions.momentum is momentum_fused
        self.starts = {name: view.storage_offset() - master.buffer.storage_offset() for name, view in master.views.items()}
        self.momentum_buffer = Flat({name: view.shape for name, view in master.views.items()}, master.buffer.device, momentum_dtype)
        self.shapes = {name: (view.shape[0], view.shape[1]) for name, view in master.views.items()}
        self.batches: list[Batch] = []
        self.exchange: Exchange | None = None
        if places and mesh and mesh.size(*AXES) > 1:
            boxes = {name: places[name] for name in master.views}
            self.shapes = {name: (place.shape[0], place.shape[1]) for name, place in boxes.items()}
            self.exchange = self._exchange(boxes, mesh, limit_bytes)
        else:
            self.batches = self._batches(limit_bytes)
        self._rate = torch.zeros((), dtype=torch.float32, device=master.buffer.device)

    def _batches(self, limit_bytes: int) -> list[Batch]:
        """Equal shapes together, as many as the workspace holds (one at least)."""
        alike: dict[tuple[int, int], list[str]] = {}
        for name, shape in self.shapes.items():
            alike.setdefault(shape, []).append(name)
        batches = []
        for (rows, columns), members in alike.items():
            most = max(1, limit_bytes // max(1, workspace_bytes(rows, columns)))
            for first in range(0, len(members), most):
                chosen = members[first : first + most]
                starts = [int(self.starts[name]) for name in chosen]
                at = torch.tensor(starts, dtype=torch.int64, device=self.master.buffer.device) if self._fused else tuple(starts)
                batches.append(Batch(tuple(chosen), rows, columns, at, all(start % 16 == 0 for start in starts)))
        return batches

    def _exchange(self, boxes: Mapping[str, Place], mesh: Mesh, limit_bytes: int) -> Exchange:
        """Batches of such a size that one being orthogonalised, the next one's coming and the last one's leaving fit the workspace."""
        ranks = mesh.size(*AXES)
        most = {(r, c): max(1, limit_bytes // max(1, workspace_bytes(r, c) + 8 * r * c)) for r, c in self.shapes.values()}
        starts = {name: int(start) for name, start in self.starts.items()}
        return Exchange(boxes, starts, owners(self.shapes, ranks), most, mesh, self.master.buffer.device, fused=self._fused)

    @torch.no_grad()
    def step(self, rate: float | Tensor, scale: Tensor, skip: Tensor) -> None:
        """One update at `rate` times the peak rate; gradients are multiplied by `scale`, and `skip` = 1 changes nothing at all (0-d, fp32).

        Under a CUDA graph `rate` must be a 0-d tensor on the device: a number would be frozen into the graph.
        """
        lr = torch.mul(rate, self.lr, out=self._rate) if isinstance(rate, Tensor) else self._rate.fill_(self.lr * rate)
        if self.exchange is not None:
            self._step_boxes(self.exchange, lr, scale, skip)
        for batch in self.batches:
            shape = (batch.rows, batch.columns)
            # Phase 1: momentum and Nesterov's look ahead, into one batch in bf16.
            updates = self.versions.momentum(
                self.momentum_buffer.buffer, self.grads.buffer, batch.starts, shape, scale, skip, self.momentum, batch.aligned
            )
            # Phase 2: orthogonalise all of it.
            updates = self.versions.orthogonal(updates)
            # Phase 3: decay and move the weights.
            size = update_size(*shape, self.scaling)
            self.versions.update(self.master.buffer, batch.starts, updates, lr, skip, self.weight_decay, size, batch.aligned)

    def _step_boxes(self, exchange: Exchange, lr: Tensor, scale: Tensor, skip: Tensor) -> None:
        """The three phases in rounds: while one batch is orthogonalised, the next one comes and the last one leaves."""
        rounds, coming, leaving = exchange.rounds, deque[Coming](), deque[Coming]()
        for turn in range(len(rounds) + 2):
            # Phase 1: momentum and look ahead of this rank's boxes, which leave for the owners in bf16.
            if turn < len(rounds):
                coming.append(self._send(exchange, rounds[turn], scale, skip))
            # Phase 2, a turn later: orthogonalise this rank's batch, whole by now, and send the results' boxes back.
            if 1 <= turn <= len(rounds):
                round = rounds[turn - 1]
                leaving.append(exchange.scatter(round, self.versions.orthogonal(exchange.whole(round, coming.popleft()))))
            # Phase 3, another turn later: decay and move the weights.
            if turn >= 2:
                self._move(rounds[turn - 2], leaving.popleft().wait(), lr, skip)

    def _send(self, exchange: Exchange, round: Round, scale: Tensor, skip: Tensor) -> Coming:
        def looked(some: Stretch) -> Tensor:
            at, shape = some.starts, (1, some.elements)
            return self.versions.momentum(
                self.momentum_buffer.buffer, self.grads.buffer, at, shape, scale, skip, self.momentum, some.aligned
            )

        for some in round.unsent:
            looked(some)
        return exchange.gather(round, [looked(some) for some in round.there.stretches])

    def _move(self, round: Round, results: Tensor, lr: Tensor, skip: Tensor) -> None:
        for some, part in zip(
            round.back.stretches, results.split([some.count * some.elements for some in round.back.stretches]), strict=True
        ):
            size, update_n1b = update_size(*some.shape, self.scaling), part.view(some.count, 1, some.elements)
            self.versions.update(self.master.buffer, some.starts, update_n1b, lr, skip, self.weight_decay, size, some.aligned)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the master weights."""
        return {f"momentum.{name}": view for name, view in self.momentum_buffer.views.items()}
