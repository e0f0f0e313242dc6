"""Gradient release: each layer's weights are updated when its backward has ended, and its gradients freed; no more than one layer's are ever there.

What is known when, in a step of one microbatch on one process:

    loss                                   before the backward: where it is not finite, nothing at all is updated
    gradients of a layer                   when its backward ends: it is updated then, unless one of them, or of a layer before it in this order, is not finite
    norm of all gradients                  at the end, for the report: too late to clip by, which the plan refuses

A loss above the limit of engines/judge.py is as one that is not finite, and so is a norm: it only grows from layer to layer, and from the layer on whose
gradient lifts it above the limit nothing is updated.

So a number that cannot be right reaches no weight and no moment, as in any step. But where the loss was right and a gradient is not, the layers whose
backward came before it have moved by then (by gradients that are right, as far as they go), and all others have not: the step is half made. It is counted as
refused (`bad`), no update's count advances, and the loop stops the run after `train.max_bad_steps` of them in a row, as ever. Such a step is rare: an
infinity born in the backward, from a loss that is finite.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gigatrain.optim.adamw import AdamW
from gigatrain.optim.muon import Muon


def unit_of(name: str) -> str:
    """What a parameter is released with: its layer, or for those of no layer the parameter alone."""
    words = name.split(".")
    return ".".join(words[:3]) if words[:2] == ["model", "layers"] else name


@dataclass
class Unit:
    """Parameters that are updated together, by as many groups as they have kinds of updates; gradients exist from the first's arrival on."""

    groups: list[AdamW | Muon] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    rounded: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)
    views: dict[str, Tensor] = field(default_factory=dict)


class Released:
    """The updates of one step's backward. `groups`: each of one unit; `rounded`: bf16 weights, and the fp32 ones that they are rounded from."""

    def __init__(
        self,
        groups: Sequence[AdamW | Muon],
        rounded: Sequence[tuple[Tensor, Tensor]],
        norm: Callable[..., tuple[Tensor, Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        self._norm = norm
        self.units: dict[str, Unit] = {}
        # Of the updates of each kind of AdamW's groups: what they all begin a step with, and what a checkpoint keeps, whether there are any or not.
        self.counts = {f"updates.{kind}": torch.zeros((), device=device) for kind in ("decayed", "plain")}
        for group in groups:
            group.grads.drop()
            for name in group.grads.shapes:
                unit = self.units.setdefault(unit_of(name), Unit())
                unit.names.add(name)
                if group not in unit.groups:
                    unit.groups.append(group)
        for weight, master in rounded:
            self._holder(master).rounded.append((weight, master))
        self._scale = torch.ones((), device=device)
        self._rate: float | Tensor = 0.0

    def _holder(self, master: Tensor) -> Unit:
        storage = master.untyped_storage().data_ptr()
        held = (unit for unit in self.units.values() for group in unit.groups if _master(group).untyped_storage().data_ptr() == storage)
        return next(held)

    def begin(self, rate: float | Tensor, loss: Tensor, closed: Tensor, limit: Tensor) -> None:
        """Before the backward of a step whose loss is known: `closed` where it forbids any update; the norm may not exceed `limit` (NaN: it may)."""
        self._rate, self._first, self._limit = rate, loss, limit
        self._loss = torch.where(closed.to(loss.device), torch.inf, loss)
        self._squares = torch.zeros((), dtype=torch.float64, device=loss.device)
        for unit in self.units.values():
            unit.waiting = set(unit.names)
            for group in unit.groups:
                if isinstance(group, AdamW):
                    group.bucket.updates.copy_(self.counts[f"updates.{group.name}"])

    @torch.no_grad()
    def arrived(self, name: str, parameter: nn.Parameter) -> None:
        """Autograd has a parameter's gradient."""
        assert parameter.grad is not None
        self.room(name).copy_(parameter.grad)
        parameter.grad = None
        self.ready(name)

    def room(self, name: str) -> Tensor:
        """Where a parameter's gradient goes; its unit's storage is taken when the first is asked for."""
        unit = self.units[unit_of(name)]
        if not unit.views:
            for group in unit.groups:
                group.grads.take()
                unit.views |= group.grads.views
        return unit.views[name]

    @torch.no_grad()
    def ready(self, name: str) -> None:
        """A gradient is where it belongs; with the last one its unit is updated."""
        unit = self.units[unit_of(name)]
        unit.waiting.discard(name)
        if not unit.waiting:
            self._update(unit)

    def _update(self, unit: Unit) -> None:
        norm, _, skip = self._norm([group.grads.buffer for group in unit.groups], None, self._loss)
        self._squares += norm.double().square()
        above = self._total() > self._limit
        self._loss = torch.where(above, torch.inf, self._loss + norm)  # not finite once one norm is not: so are all that follow
        skip = torch.maximum(skip, above.to(skip.dtype))
        for group in unit.groups:
            group.step(self._rate, self._scale, skip)
            group.grads.drop()
        unit.views = {}
        if unit.rounded:
            torch._foreach_copy_([weight for weight, _ in unit.rounded], [master for _, master in unit.rounded])

    def _total(self) -> Tensor:
        """The norm of the gradients so far."""
        return self._squares.sqrt().float()

    @torch.no_grad()
    def finish(self, verdict: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """After the backward: `(norm, skip)` of the whole step, by its `verdict(norm, whether something is not finite)`; parameters that the backward did
        not reach have gradients of zero."""
        for unit in self.units.values():
            for name in list(unit.waiting):
                self.room(name).zero_()
                self.ready(name)
        norm = self._total()
        skip = verdict(norm, (~torch.isfinite(self._first + self._squares)).float())
        for count in self.counts.values():
            count.add_(1 - skip)
        return norm, skip


def _master(group: AdamW | Muon) -> Tensor:
    return group.bucket.weight if isinstance(group, AdamW) else group.master.buffer
