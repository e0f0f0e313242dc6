"""Backends of the loop: each computes gradients and updates weights, and tells what a checkpoint keeps."""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from gigatrain.data.loader import Batch, Microbatch
from gigatrain.models.decoder import Decoder
from gigatrain.planning.plan import Plan


class Engine(Protocol):
    """What the loop needs from a backend, and nothing more. Nothing here may wait for the device but `state` and `restored`."""

    def forward_backward(self, batch: Batch) -> Tensor:
        """Gradients of one step's batch; returns the sum of its cross entropies in nats (0-d, fp32, on the device)."""
        ...

    def step(self, rate: float) -> Tensor:
        """Clip, update at `rate` times the peak learning rates, zero; returns the global gradient norm before clipping (0-d, on the device).

        A step whose loss or norm is not finite changes nothing and is counted in `bad`.
        """
        ...

    def evaluate(self, microbatches: Iterable[Microbatch]) -> Tensor:
        """Sum of cross entropies in nats and count of targets, as two fp64 numbers on the device."""
        ...

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps, by group and canonical name: the live tensors, which a load fills in place."""
        ...

    def restored(self) -> None:
        """Called once a load has filled `state`: whatever is derived from it is made anew."""
        ...

    @property
    def bad(self) -> Tensor:
        """Counts of refused updates, on the device: in all, in a row up to now, longest row, update that began the longest row (int64)."""
        ...


def make(plan: Plan, model: Decoder) -> Engine:
    """The engine that the plan names, around a model with fp32 weights on its device."""
    from gigatrain.engines.native import Native

    return Native(plan, model)
