"""What one stage of a pipeline computes of one microbatch."""

from typing import Any

from torch import Tensor, nn

from gigatrain import objectives
from gigatrain.config import Objective
from gigatrain.data.loader import Microbatch
from gigatrain.models.decoder import Decoder, added


def compute(
    module: nn.Module,
    part: Microbatch,
    carried: Tensor | None,
    seed: Tensor | None,
    *,
    objective: Objective = objectives.LANGUAGE,
    positions: bool = True,
    **terms: Any,
) -> Any:
    """The residual stream x_btd for the next stage, or the objective's `(loss_sum, reported_sum)` of the last; `terms` are the loss's, `positions` whether
    to give them.

    The sum behind the last layer is made here, with the mask that the next stage's first layer would give it.
    """
    at = part.positions if positions else None
    if not isinstance(module, Decoder):
        return objectives.compute(objective, module, part, at, **terms)
    before = None if carried is None else (None, carried)
    if module.part.last:
        return objectives.compute(objective, module, part, at, seed=seed, carried=before, **terms)
    delta, stream = module(part.tokens, at, part.documents, seed, before)
    drop = None
    if module.training and module.dropout:
        assert seed is not None
        drop = module.dropout, seed * (1 << 16) + 2 * module.part.layers.stop
    return added(module.arch, module.ops, delta, stream, drop)
