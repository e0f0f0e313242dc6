"""What a run minimises, of one microbatch: where an engine would call a model's loss, it calls `compute`.

    loss of a step = sum over ranks and microbatches of loss_sum / sum over ranks of Batch.targets

So an objective's sum is over whatever `Batch.targets` counts: labels of `language` and `distil`, pairs (of kto: answers) of the others.
"""

from typing import Any

from torch import Tensor

from gigatrain.config import Objective
from gigatrain.data.loader import Microbatch
from gigatrain.objectives import preference

LANGUAGE = Objective()


def compute(objective: Objective, model: Any, part: Microbatch, positions: Tensor | None, **terms: Any) -> tuple[Tensor, Tensor]:
    """`(loss_sum, reported)` of a microbatch; only the first has a gradient.

    model: a `Decoder` with its last layer, or an `Auto`, in training or not; `terms` are its loss's (engines/source.py's), with `seed` and `carried` of a
    decoder, and `known`, what `ahead` found out. reported is 0-d, what a report divides by the targets and calls the loss, or a vector that begins with it
    and goes on with the sums that figures.py names.
    """
    if objective.pairs:
        return preference.compute(objective, model, part, positions, **terms)
    return model.loss(part.tokens, part.labels, positions, part.documents, **terms)


def looks_ahead(objective: Objective) -> bool:
    """Whether a loss needs a number of the whole step, all ranks and microbatches, which is made without gradients before its first forward."""
    return objective.kind == "kto"


def ahead(objective: Objective, model: Any, part: Microbatch) -> Tensor:
    """What is summed over a step for `known`, of one microbatch: fp64 [2]."""
    return preference.foreign(objective, model, part)


def known(sums: Tensor) -> Tensor:
    """The number that `compute` is given, of the sums of `ahead` over all ranks."""
    return (sums[0] / sums[1].clamp(min=1.0)).clamp(min=0.0).float()


def targets(objective: Objective, part: Microbatch) -> Tensor:
    """How many targets a microbatch has, on its device."""
    if objective.pairs:
        assert part.given is not None
        return part.given["there_bp"].sum()
    return (part.labels >= 0).sum()
