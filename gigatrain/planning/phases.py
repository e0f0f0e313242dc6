"""The stretches of a run: a sequence-length curriculum, or sources in other shares, one phase after the other.

Each phase of `train.phases` is planned as a run of its own: its share of the batch, what the mesh can cut, its memory, its seconds. The plan's own `sequence`,
`batch` and `microbatch` are those of the longest samples: what kernels are chosen and verified for, what validation reads throughout, so that its loss is one
curve, and, of phases with equally long samples, the one that needs the most memory. `accumulation` is the largest of any phase, `memory` that of the phase
that needs the most, `steps` and `tokens` are all phases'. What is expected of a step or a second spans the phases; days, energy and cost add up over them.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from gigatrain.config import Phase, Recipe, Section
from gigatrain.errors import PlanError
from gigatrain.planning.expected import Expected, Range

T = TypeVar("T")
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

    def text(self, number: int) -> str:
        """For a reader."""
        shown = f"steps {self.begin:,} to {self.begin + self.steps - 1:,}: {self.batch} samples x {self.sequence:,} tokens"
        shown += f", in {self.accumulation} microbatches of {self.microbatch}" if self.accumulation > 1 else ""
        shares = " : ".join(f"{weight:g}" for weight in self.weights) if len(self.weights) > 1 else ""
        shown += f"; sources {shares}" if shares else ""
        shown += f"; {self.tokens:,} tokens, about {self.memory_bytes / 2**30:.2f} GiB"
        return f"  phase {number}  {shown}" + ("" if self.days is None else f", {self.days:.3g} days")


def recipes(recipe: Recipe) -> list[Recipe]:
    """Each phase as a recipe of its own, its steps concrete; of a recipe without phases that recipe. Raises PlanError for shares of sources that are not there."""
    train = recipe.train
    if not train.phases:
        return [recipe]
    found = []
    for number, phase in enumerate(train.phases):
        sources = recipe.data.sources
        if phase.weights is not None and len(phase.weights) != len(sources):
            raise PlanError(
                f"train.phases.{number}.weights has {len(phase.weights)} numbers, and data.sources {len(sources)} entries; give one for each, 0 to leave "
                "a source out"
            )
        own = {name: value for name in ("sequence", "batch", "microbatch") if (value := getattr(phase, name)) is not None}
        if phase.batch is not None and phase.microbatch is None:
            own["microbatch"] = None if train.microbatch is None else min(train.microbatch, phase.batch)
        changed = train.model_copy(update=own | {"steps": _steps(phase, recipe, own), "tokens": None, "phases": ()})
        if changed.microbatch is not None and changed.microbatch > changed.batch:
            raise PlanError(f"train.phases.{number}: microbatch {changed.microbatch} is above batch {changed.batch}; lower it, or leave it out")
        found.append(recipe.model_copy(update={"train": changed}))
    return found


def _steps(phase: Phase, recipe: Recipe, own: dict[str, int]) -> int:
    if phase.steps is not None:
        return phase.steps
    tokens = own.get("batch", recipe.train.batch) * own.get("sequence", recipe.train.sequence)
    return math.ceil((phase.tokens or 0) / tokens)


def named(recipe: Recipe, number: int, make: Callable[[], T]) -> T:
    """What `make` finds of phase `number`; a refusal says of which phase it is."""
    try:
        return make()
    except PlanError as failure:
        if not recipe.train.phases:
            raise
        raise PlanError(f"train.phases.{number}: {failure}") from None


def weights(recipe: Recipe, number: int) -> tuple[float, ...]:
    """Of the sources in a phase."""
    own = recipe.train.phases[number].weights if recipe.train.phases else None
    return own if own is not None else tuple(source.weight for source in recipe.data.sources)


def whole(each: Sequence[Expected], main: int) -> Expected:
    """What is expected of all phases: of the main one, but for what adds up and what spans them."""
    update: dict[str, Range | None] = {}
    for name in (*_SUMS, *_SPANS):
        ranges = [getattr(one, name) for one in each]
        if any(one is None for one in ranges):
            update[name] = None
        elif name in _SUMS:
            update[name] = Range(
                low=sum(one.low for one in ranges), mid=sum(one.mid for one in ranges), high=sum(one.high for one in ranges)
            )
        else:  # a window of any phase is what was expected
            update[name] = Range(low=min(one.low for one in ranges), mid=ranges[main].mid, high=max(one.high for one in ranges))
    return each[main].model_copy(update=update)


