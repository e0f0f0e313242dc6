"""Backends of the loop: each computes gradients and updates weights over all ranks, and tells what a checkpoint keeps."""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from gigatrain.data.loader import Batch, Microbatch
from gigatrain.engines.judge import Judge
from gigatrain.kernels import widened
from gigatrain.observe.metrics import Update
from gigatrain.observe.trace import Trace
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import Replica, State
from gigatrain.planning.plan import Plan


class Engine(Protocol):
    """What the loop needs from a backend, and nothing more. Nothing here may wait for the device but `state` and `restored`."""

    trace: Trace  # told the phases of a step
    judge: Judge  # decides whether a step changes anything
    early: bool  # whether what a checkpoint keeps may change before `step`, within a backward

    def forward_backward(self, batch: Batch) -> None:
        """Gradients of one step's batch: of the mean loss per target over all ranks, however the step is cut."""
        ...

    def step(self, rate: float) -> Update:
        """Clip, update at `rate` times the peak learning rates, zero.

        A step whose loss or norm is not finite on any rank, or a spike, changes nothing on every rank and is counted in `bad`, and those that follow are held
        until the host has looked (engines/judge.py); with `train.release`, where only the norm is not, layers may have moved by then (engines/released.py).
        """
        ...

    def evaluate(self, microbatches: Iterable[Microbatch]) -> Tensor:
        """What the objective reports (the sum of its losses, of language cross entropies in nats), summed over all ranks, fp64 on the device: that sum, the
        count of targets, and the sums that objectives/figures.py names. Read once, or by an objective that looks ahead twice, each time from the first on and
        one at a time: all of them need not fit on the device."""
        ...

    def logprobs(self, part: Microbatch) -> Tensor:
        """Log-probabilities [b, t] of a microbatch's labels by the weights as they are, fp32, 0 without a label; ranks call it together, each with its own."""
        ...

    def state(self) -> State:
        """What a checkpoint keeps, by group and canonical name: the live pieces of this rank, which a load fills in place."""
        ...

    def restored(self) -> None:
        """Called once a load has filled `state`: whatever is derived from it is made anew."""
        ...

    def replicas(self) -> Iterable[Replica]:
        """What this rank holds that others should hold bit for bit, in the same order on each of them."""
        ...

    @property
    def bad(self) -> Tensor:
        """Counts of refused updates, on the device: in all, in a row up to now, longest row, update that began the longest row (int64)."""
        ...


def make(plan: Plan, mesh: Mesh, device: torch.device, *, fresh: bool) -> Engine:
    """The engine that the plan names, with its model; `fresh` weights come from the seed or `model.from`, else a checkpoint will fill them.

    On a processor without products in bf16, those of the whole process are widened from here on (kernels/widened.py).
    """
    if device.type == "cpu" and (plan.compute == "bf16" or plan.optim.name == "muon") and widened.needed():  # Muon orthogonalises in bf16
        widened.register()
    if plan.engine.name == "deepspeed":
        from gigatrain.engines.deepspeed import DeepSpeed

        return DeepSpeed(plan, mesh, device, fresh=fresh)
    from gigatrain.engines.native import Native

    return Native(plan, mesh, device, fresh=fresh)
