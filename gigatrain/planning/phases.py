"""The stretches of a run: a sequence-length curriculum, or sources in other shares, one phase after the other.

Each phase of `train.phases` is planned as a run of its own: its share of the batch, what the mesh can cut, its memory, its seconds. The plan's own
`sequence`, `batch`, `microbatch` and `accumulation` are those of the longest samples: what kernels are chosen and verified for, what validation reads
throughout, so that its loss is one curve, and, of phases with equally long samples, the one that needs the most memory. `memory` is that of the phase that
needs the most, `steps` and `tokens` are all phases'. What is expected of a step or a second spans the phases; days, energy and cost add up over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gigatrain.config import Phase, Recipe, Schedule, Section
from gigatrain.errors import PlanError
from gigatrain.planning.expected import Expected, Range

if TYPE_CHECKING:
    from gigatrain.planning.plan import Plan

_SUMS = ("days", "mwh", "eur", "tco2")
_SPANS = ("step_s", "tokens_per_s", "tokens_per_s_per_rank", "tokens_per_s_mw")


class Stretch(Section):
    """One phase, every number of it concrete: steps `begin` to `begin + steps - 1`."""

    begin: int
    steps: int
    sequence: int
    batch: int
    microbatch: int
    accumulation: int
    weights: tuple[float, ...]
    memory_bytes: int
    days: float | None = None

    @property
    def tokens(self) -> int:
        """That it reads."""
        return self.steps * self.batch * self.sequence

    @property
    def identity(self) -> list[Any]:
        """What of it decides the run's numbers."""
        return [self.begin, self.steps, self.sequence, self.batch, list(self.weights)]

    def text(self) -> str:
        """For a reader."""
        shown = f"steps {self.begin:,} to {self.begin + self.steps - 1:,}: {self.batch} samples x {self.sequence:,} tokens"
        shown += f", in {self.accumulation} microbatches of {self.microbatch}" if self.accumulation > 1 else ""
        shown += f"; sources {' : '.join(f'{weight:g}' for weight in self.weights)}" if len(self.weights) > 1 else ""
        shown += f"; {self.tokens:,} tokens, about {self.memory_bytes / 2**30:.2f} GiB"
        return shown + ("" if self.days is None else f", {self.days:.3g} days")


def stretch(plan: Plan, begin: int, weights: tuple[float, ...]) -> Stretch:
    """A plan without phases as one."""
    numbers = {name: getattr(plan, name) for name in ("steps", "sequence", "batch", "microbatch", "accumulation")}
    days = None if plan.expected.days is None else plan.expected.days.mid
    return Stretch(begin=begin, weights=weights, memory_bytes=plan.memory.total, days=days, **numbers)


def joined(recipe: Recipe, alone: Callable[[Recipe], Plan]) -> Plan:
    """The plan of a recipe with phases; `alone` plans each. Raises PlanError, of a phase by its number."""
    if recipe.recovery.replicas != "none":
        raise PlanError(
            f'recovery.replicas "{recipe.recovery.replicas}" shares a batch anew when a replica is lost, and train.phases change the batch; use one of them'
        )
    if recipe.objective.pairs:
        raise PlanError(f'objective.kind "{recipe.objective.kind}" reads pairs, which no phase cuts anew; leave train.phases out')
    each: list[Plan] = []
    found: list[Stretch] = []
    for number, phase in enumerate(recipe.train.phases):
        try:
            one = alone(_recipe(recipe, phase))
        except PlanError as failure:
            raise PlanError(f"train.phases.{number}: {failure}") from None
        begin = found[-1].begin + found[-1].steps if found else 0
        own = phase.weights if phase.weights is not None else tuple(source.weight for source in recipe.data.sources)
        if len(own) != len(recipe.data.sources):
            raise PlanError(
                f"train.phases.{number}.weights has {len(own)} numbers, and data.sources {len(recipe.data.sources)} entries; give one for each, 0 to leave "
                "a source out"
            )
        each.append(one)
        found.append(stretch(one, begin, own))
    steps = sum(one.steps for one in found)
    check(recipe.schedule, steps)
    main = max(range(len(each)), key=lambda number: (each[number].sequence, each[number].memory.total))
    return each[main].model_copy(
        update={
            "schedule": recipe.schedule,
            "positions": max(one.positions for one in each),
            "memory": max((one.memory for one in each), key=lambda memory: memory.total),
            "steps": steps,
            "tokens": sum(one.tokens for one in each),
            "phases": tuple(found),
            "expected": _whole([one.expected for one in each], main),
        }
    )


def check(schedule: Schedule, steps: int) -> None:
    """Raise PlanError for a schedule that begins behind the run's end. A warm-up may be longer than the run, as in a short trial."""
    if schedule.from_step >= steps:
        raise PlanError(
            f"schedule.from_step {schedule.from_step} is where the schedule begins, and the run ends at step {steps}; raise train.steps"
        )


def _recipe(recipe: Recipe, phase: Phase) -> Recipe:
    """A phase as a recipe of its own."""
    train = recipe.train
    own: dict[str, Any] = {name: value for name in ("sequence", "batch", "microbatch") if (value := getattr(phase, name)) is not None}
    sequence, batch = own.get("sequence", train.sequence), own.get("batch", train.batch)
    if phase.microbatch is None and train.microbatch is not None:
        own["microbatch"] = min(train.microbatch, batch)
    if phase.microbatch is not None and phase.microbatch > batch:
        raise PlanError(f"microbatch {phase.microbatch} is above batch {batch}; lower it, or leave it out")
    steps = phase.steps or math.ceil((phase.tokens or 0) / (batch * sequence))
    return recipe.model_copy(
        update={
            "train": train.model_copy(update=own | {"steps": steps, "phases": ()}),
            "schedule": recipe.schedule.model_copy(update={"from_step": 0}),  # of the whole run
        }
    )


def _whole(each: Sequence[Expected], main: int) -> Expected:
    """What is expected of all phases: of the main one, but for what adds up and what spans them."""
    update: dict[str, Range | None] = {}
    for name in (*_SUMS, *_SPANS):
        ranges = [one for one in (getattr(one, name) for one in each) if one is not None]
        if len(ranges) < len(each):
            update[name] = None
        elif name in _SUMS:
            update[name] = Range(
                low=sum(one.low for one in ranges), mid=sum(one.mid for one in ranges), high=sum(one.high for one in ranges)
            )
        else:  # a window of any phase is what was expected
            update[name] = Range(low=min(one.low for one in ranges), mid=ranges[main].mid, high=max(one.high for one in ranges))
    return each[main].model_copy(update=update)
