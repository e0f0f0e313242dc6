"""A tied embedding whose two ends lie on different stages of a pipeline: one weight in two copies, kept equal."""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed

from gigatrain.parallel.mesh import Mesh


class Tied:
    """The two copies of a tied embedding: model.embed_tokens.weight on the first stage, lm_head.weight on the last.

    Their gradients are added up, so that both get the same update. The first is the parameter: it alone counts in the norm and is written. Where one rank
    holds both stages (zbv), both names are here, and the copies may as well share storage and sum.
    """

    EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

    def __init__(self, mesh: Mesh, schedule: str) -> None:
        ranks = mesh.ranks("pipeline")
        self.ends = ranks[0], ranks[0] if schedule == "zbv" else ranks[-1]
        self.first, self.last = mesh.rank == self.ends[0], mesh.rank == self.ends[1]
        self._group: distributed.ProcessGroup | None = None
        if self.ends[0] != self.ends[1] and (self.first or self.last):
            made = mesh.group("pipeline") if len(ranks) == 2 else distributed.new_group(list(self.ends), use_local_synchronization=True)
            assert isinstance(made, distributed.ProcessGroup)
            self._group = made

    def counts(self, name: str) -> bool:
        """Whether a parameter's gradient counts in the norm, and its weight is written."""
        return name != self.HEAD

    @torch.no_grad()
    def sum(self, grads: Mapping[str, Tensor]) -> None:
        """Add up the two copies' gradients, in place, on the ranks that have one; once a step, after all other sums over ranks."""
        if self._group is not None:
            distributed.all_reduce(grads[self.EMBEDDING if self.first else self.HEAD], group=self._group)
        elif self.first and self.last and grads[self.HEAD] is not grads[self.EMBEDDING]:
            grads[self.HEAD].copy_(grads[self.EMBEDDING].add_(grads[self.HEAD]))

    @torch.no_grad()
    def align(self, weights: Mapping[str, Tensor]) -> None:
        """Give the first copy's weights to the second: after a load, and after an update that rounds stochastically."""
        if self._group is not None:
            distributed.broadcast(weights[self.EMBEDDING if self.first else self.HEAD], self.ends[0], group=self._group)
        elif self.first and self.last and weights[self.HEAD] is not weights[self.EMBEDDING]:
            weights[self.HEAD].copy_(weights[self.EMBEDDING])
