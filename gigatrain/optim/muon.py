"""Muon: momentum, orthogonalised by a Newton-Schulz iteration, for the layers' matrices (Jordan et al., 2024, kellerjordan.github.io/posts/muon)."""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gigatrain.kernels.newton_schulz import Places, flops, momentum_fused, muon_momentum, muon_update, newton_schulz, plan
from gigatrain.optim.adamw import Flat

Scaling = Literal["spectral", "rms"]
WORKSPACE_BYTES = 1 << 31  # four matrices of 4096 x 14336 at once: enough tiles of 256 x 128 to fill 132 multiprocessors eight times


def update_size(rows: int, columns: int, scaling: Scaling) -> float:
    """What an orthogonal update is multiplied by: `spectral` keeps the rate per unit of activation, `rms` AdamW's usual update (arXiv:2502.16982)."""
    return max(1.0, rows / columns) ** 0.5 if scaling == "spectral" else 0.2 * max(rows, columns) ** 0.5


def workspace_bytes(rows: int, columns: int) -> int:
    """What one matrix takes while it is orthogonalised: its update and the iterate before and after a product, and five matrices of its smaller side."""
    return 2 * (3 * rows * columns + 5 * min(rows, columns) ** 2)


def share(shapes: Mapping[str, tuple[int, int]], rank: int, ranks: int) -> list[str]:
    """The matrices that are `rank`'s if `ranks` split the orthogonalisation, in the order of `shapes`: the same split on whichever rank it is asked for.

    Heaviest first, each to the rank with the fewest FLOPs so far: no rank has more than the mean and one matrix. A rank that keeps weights, gradients and
    momentum of its share only runs `Muon` on it as it is.
    """
    cost = {name: flops(*shape, plan(*shape)) for name, shape in shapes.items()}
    loads, owner = [(0.0, index) for index in range(ranks)], dict.fromkeys(shapes, 0)
    for name in sorted(cost, key=lambda name: (-cost[name], name)):
        load, owner[name] = heapq.heappop(loads)
        heapq.heappush(loads, (load + cost[name], owner[name]))
    return [name for name in shapes if owner[name] == rank]


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
    starts: Places
    aligned: bool


class Muon:
    """w <- w (1 - lr decay) - lr size orthogonal(s g + momentum m),  m <- momentum m + s g.

    `master` holds the weights, `grads` is where the caller sums the gradients: same names, same places. Size is sqrt(max(1, rows / columns)), or with
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
    ) -> None:
        self.master, self.grads = master, grads
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.scaling: Scaling = scaling
        self.versions = versions
        self.shapes = {name: (view.shape[0], view.shape[1]) for name, view in master.views.items()}
        self.starts = {name: view.storage_offset() - master.buffer.storage_offset() for name, view in master.views.items()}
        self.momentum_buffer = Flat({name: view.shape for name, view in master.views.items()}, master.buffer.device, momentum_dtype)
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
                fused = self.master.buffer.is_cuda or self.versions.momentum is momentum_fused
                at = torch.tensor(starts, dtype=torch.int64, device=self.master.buffer.device) if fused else tuple(starts)
                batches.append(Batch(tuple(chosen), rows, columns, at, all(start % 16 == 0 for start in starts)))
        return batches

    @torch.no_grad()
    def step(self, rate: float | Tensor, scale: Tensor, skip: Tensor) -> None:
        """One update at `rate` times the peak rate; gradients are multiplied by `scale`, and `skip` = 1 changes nothing at all (0-d, fp32).

        Under a CUDA graph `rate` must be a 0-d tensor on the device: a number would be frozen into the graph.
        """
        lr = torch.mul(rate, self.lr, out=self._rate) if isinstance(rate, Tensor) else self._rate.fill_(self.lr * rate)
        for batch in self.batches:
            shape = (batch.rows, batch.columns)
            # Phase 1: momentum and Nesterov's look ahead, into one batch in bf16.
            updates = muon_momentum(
                self.momentum_buffer.buffer, self.grads.buffer, batch.starts, shape, scale, skip, self.momentum, batch.aligned
            )
            # Phase 2: orthogonalise all of it.
            updates = self.versions.orthogonal(updates)
            # Phase 3: decay and move the weights.
            size = update_size(*shape, self.scaling)
            self.versions.update(self.master.buffer, batch.starts, updates, lr, skip, self.weight_decay, size, batch.aligned)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the master weights."""
        return {f"momentum.{name}": view for name, view in self.momentum_buffer.views.items()}
