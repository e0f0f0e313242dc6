"""What a run validates on, when, and what it says of it."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gigatrain import objectives
from gigatrain.data.corpus import Corpus
from gigatrain.data.held import Held, build_sets
from gigatrain.data.held import figures as held_figures
from gigatrain.data.held import held as held_of
from gigatrain.data.loader import Microbatch
from gigatrain.engines import Engine
from gigatrain.errors import DataError
from gigatrain.objectives import figures as objective_figures
from gigatrain.observe.health import Health
from gigatrain.observe.trace import Trace
from gigatrain.parallel import ranks
from gigatrain.parallel.agree import agreed
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning.plan import Plan


def held_out(plan: Plan, corpus: Corpus, mesh: Mesh, device: torch.device) -> Held | None:
    """What is validated on; rank 0 tokenises the recipe's further sets, and the others open them."""

    def built() -> list[str]:
        return [str(own.folder) for own in build_sets(corpus, plan.data, plan.validation.sets).values()]

    names = [one.name for one in plan.validation.sets]
    folders = ranks.first(mesh, built) if names else []
    with agreed(mesh, DataError, str):
        further = {
            name: dataclasses.replace(Corpus.open(Path(folder)), embedded=plan.architecture.vocab)
            for name, folder in zip(names, folders, strict=True)
        }
    reader, readers = mesh.data
    return held_of(
        corpus,
        further,
        held_out=plan.data.validation > 0,
        sequence=plan.sequence,
        packing=plan.data.packing,
        microbatch=plan.microbatch,
        max_samples=plan.validation.max_samples,
        rank=reader,
        ranks=readers,
        device=device,
        form=objectives.form(plan.objective),
    )


def due(plan: Plan, step: int) -> bool:
    """Whether the weights behind a step are validated."""
    return step == plan.steps or (plan.validation.every > 0 and step > 0 and step % plan.validation.every == 0)


@dataclass(frozen=True)
class _UntilSignal:
    """Microbatches as often as they are asked for, each time up to the boundary at which all ranks leave."""

    parts: Iterable[Microbatch]
    health: Health
    times: Trace

    def __iter__(self) -> Iterator[Microbatch]:
        for part in self.parts:
            if self.health.leaves():
                return
            self.times.alive()
            yield part


def figures(plan: Plan, engine: Engine, held: Held, health: Health, times: Trace) -> dict[str, Any] | None:
    """The figures of each set on the weights as they are (data/held.py, objectives/figures.py); None when a signal cut it short."""

    sums, whole, beside = [], [one for one in held if one.held_out] or [*held][:1], [0.0] * (1 + objective_figures.count(plan.objective))
    for one in held:
        nats, *rest = engine.evaluate(_UntilSignal(one.validation, health, times)).tolist()
        if health.wants_out:
            return None
        sums.append((one, nats, rest[0]))
        if one in whole:
            beside = [a + b for a, b in zip(beside, rest, strict=True)]
    found = held_figures(sums)
    if plan.objective.pairs:
        del found["val_perplexity"]
    return found | {f"val_{name}": number for name, number in objective_figures.said(plan.objective, beside[1:], beside[0]).items()}
