"""What a run minimises, of one microbatch: where an engine would call a model's loss, it calls `compute`.

    loss of a step = sum over ranks and microbatches of loss_sum / sum over ranks of Batch.targets

So an objective's sum is over whatever `Batch.targets` counts: labels of `language` and `distil`, pairs (of kto: answers) of the others.
"""

from typing import Any

from torch import Tensor

from gigatrain.config import Objective
from gigatrain.data.loader import Microbatch

LANGUAGE = Objective()


def compute(objective: Objective, model: Any, part: Microbatch, positions: Tensor | None, **terms: Any) -> tuple[Tensor, Tensor]:
    """`(loss_sum, reported_sum)` of a microbatch; only the first has a gradient.

    model: a `Decoder` with its last layer, or an `Auto`, in training or not; `terms` are its loss's (engines/source.py's), with `seed` and `carried` of a
    decoder. reported_sum is 0-d, what a report divides by the targets and calls the loss.
    """
    return model.loss(part.tokens, part.labels, positions, part.documents, **terms)
