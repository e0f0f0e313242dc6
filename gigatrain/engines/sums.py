"""What an engine adds up over the microbatches of a step, or of a validation, on the device."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gigatrain import objectives
from gigatrain.config import Objective
from gigatrain.data.loader import Microbatch
from gigatrain.parallel.mesh import DATA, Mesh


def report(reported: Tensor, total: Tensor, beside: Tensor) -> None:
    """Add what an objective reports of a microbatch, 0-d or [1 + n], to `total` (0-d) and to the sums `beside` it ([n])."""
    if reported.ndim:
        total += reported[0]
        beside += reported[1:]
    else:
        total += reported


def beforehand(objective: Objective, parts: Iterable[Microbatch], ahead: Callable[[Microbatch], Tensor], mesh: Mesh) -> Tensor | None:
    """The number that an objective must know of all microbatches of all ranks before its first loss (0-d, fp32), from `ahead` of each; None: it needs none.

    The microbatches are read here, one at a time, and are gone: their losses read them again.
    """
    if not objectives.looks_ahead(objective):
        return None
    found = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for part in parts:
        found += ahead(part)
    return objectives.known(mesh.sum(found, *DATA))
