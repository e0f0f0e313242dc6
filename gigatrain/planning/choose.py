"""What of a recipe is chosen or drawn with everything that the planner knows: accelerators under so many megawatts; the page of a plan. Free of torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from gigatrain import load
from gigatrain.config import Recipe
from gigatrain.errors import PlanError
from gigatrain.foreign import Foreign
from gigatrain.planning import cost, hardware, top, words
from gigatrain.planning import megawatts as megawatts_of
from gigatrain.planning.depict import depict
from gigatrain.planning.estimate.candidates import Found
from gigatrain.planning.estimate.cluster import Cluster
from gigatrain.planning.estimate.estimate import estimate
from gigatrain.planning.estimate.goodput import forecast
from gigatrain.planning.estimate.search import search
from gigatrain.planning.estimate.workload import Workload
from gigatrain.planning.expect import Prospect, cluster_of
from gigatrain.planning.megawatts import Option
from gigatrain.planning.picture import PlanPicture
from gigatrain.planning.plan import Plan
from gigatrain.site import Accelerator, Site

Measure = Callable[[Mapping[str, Any]], Foreign]


def accelerators(
    recipe: Recipe, megawatts: float, pue: float, *, chips: Sequence[str] = tuple(hardware.CHIPS), measure: Measure | None = None
) -> tuple[Option, ...]:
    """Each of `chips` (every accelerator of hardware.py) at a grid of limits under `megawatts` of a facility, most retained tokens first.

    Each has the layout that is best on the fewest of it that hold the model with SAMPLES samples a rank, repeated: a step's batch grows with the accelerators.
    Losses by failures are taken off.
    """
    found: list[Option] = []
    architecture = load.architecture(recipe.model, measure)
    states = [
        float(cost.checkpoint_bytes(architecture, recipe.train.compute, recipe.optim, masters=own, adapter=recipe.adapter))
        for own in (False, True)
    ]
    blocks: dict[tuple[int | None, ...], tuple[Workload, Cluster]] = {}  # accelerators that hold and join as many take the same layout
    for name in chips:
        try:
            if hardware.chip(name).watts.value is None:
                raise PlanError(f"how many watts a {hardware.chip(name).name} may draw is not published")
            alike = megawatts_of.cluster_of(name, 8)
            key = (alike.memory_bytes, alike.per_node, *(level.accelerators for level in alike.levels))
            if key not in blocks:
                blocks[key] = _block(recipe, hardware.chip(name), min(states), measure)
            workload = blocks[key][0]
            cluster = megawatts_of.cluster_of(name, -(-workload.layout.ranks // hardware.chip(name).devices))
        except PlanError as failure:
            found.append(Option(name, unknown=str(failure)))
            continue
        seconds, whole = estimate(workload, cluster).step_s, states[not workload.states.master]

        def kept(count: int, per_node: int = cluster.per_node, seconds: float = seconds, whole: float = whole) -> float:
            return forecast(count, per_node, seconds, whole).share

        found += megawatts_of.options(workload, megawatts, pue, [name], goodput=kept)
    return tuple(sorted(found, key=lambda one: (bool(one.unknown), -one.goodput_tokens_per_s)))


def picture(chosen: Plan, site: Site, behind: Prospect, found: Found | None) -> PlanPicture:
    """What the page of a plan shows. Raises PlanError where nothing is expected of it, with the reason."""
    if behind.estimate is None or behind.workload is None or behind.cluster is None:
        raise PlanError(f"there is nothing to draw: {behind.expected.unknown['step_s']}")

    def cluster(count: int) -> Cluster:
        return cluster_of(site, count * hardware.chip(behind.cluster.chip).devices)  # type: ignore[union-attr]

    return depict(
        f"{chosen.name} on {chosen.site}",
        behind.expected,
        behind.workload,
        behind.cluster,
        behind.estimate,
        summary=chosen.summary,
        lines=tuple(words.expected(behind.expected)),
        watts=chosen.watts,
        draw=behind.draw,
        case=behind.case,
        tokens=float(chosen.tokens),
        found=found.candidates if found is not None else (),
        cluster_of=cluster,
    )


SAMPLES = 8  # of a rank and step
MOST = 1024  # ranks of one copy


def _block(recipe: Recipe, chip: hardware.Chip, states: float, measure: Measure | None) -> tuple[Workload, Cluster]:
    """The best layout on the fewest accelerators that hold the model, of which weights and optimizer are `states` bytes."""
    each = megawatts_of.cluster_of(chip.id, 8).memory_bytes
    ranks, failed = 8, PlanError(f"{MOST} ranks of a {chip.name} do not hold the model")
    while each is not None and ranks <= MOST and states > 0.6 * each * ranks:  # gradients, activations and what is gathered need the rest
        ranks *= 2
    while ranks <= MOST:
        cluster = megawatts_of.cluster_of(chip.id, -(-ranks // chip.devices))
        site = megawatts_of.site_of(cast("Accelerator", chip.id), cluster.accelerators)
        of_block = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch": SAMPLES * ranks, "microbatch": None})})
        try:
            base = top.workload(of_block, site, ranks, measure=measure)
            return search(base, cluster, top=1).candidates[0].workload, cluster
        except PlanError as failure:
            failed, ranks = failure, 2 * ranks
    raise failed
