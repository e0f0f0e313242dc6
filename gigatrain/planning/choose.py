"""The best layouts of a recipe on a site, as recipes: search.py's, with what only a recipe knows to refuse. Free of torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from gigatrain import load
from gigatrain.config import Mesh, Recipe
from gigatrain.errors import PlanError, RecipeError
from gigatrain.foreign import Foreign
from gigatrain.planning import hardware, words
from gigatrain.planning import megawatts as megawatts_of
from gigatrain.planning.estimate.cluster import Cluster
from gigatrain.planning.estimate.constants import VALUES
from gigatrain.planning.estimate.estimate import estimate
from gigatrain.planning.estimate.goodput import forecast
from gigatrain.planning.estimate.search import Candidate, Found, overrides, search, table, tree
from gigatrain.planning.estimate.workload import Layout, Precision, Workload
from gigatrain.planning.depict import depict
from gigatrain.planning.expect import Prospect, cluster_of, workload_of
from gigatrain.planning.megawatts import Option
from gigatrain.planning.picture import PlanPicture
from gigatrain.planning.plan import Plan, plan
from gigatrain.site import Accelerator, Site

__all__ = ["accelerators", "first", "layouts", "table", "tree", "undivided"]

Measure = Callable[[Mapping[str, Any]], Foreign]


def undivided(recipe: Recipe, site: Site, ranks: int, measure: Measure | None = None) -> Workload:
    """The recipe's model, batch and numbers on `ranks`, with a layout that is only a place to begin a search: all ranks and no split that means anything."""
    alone = recipe.model_copy(
        update={
            "mesh": Mesh(shard=1, exchange=recipe.mesh.exchange, dispatch=recipe.mesh.dispatch),
            "train": recipe.train.model_copy(update={"nproc": None, "microbatch": 1, "release": False, "graph": False}),
            "power": recipe.power.model_copy(update={"megawatts": None}),
        }
    )
    found = workload_of(plan(alone, site, 1, measure=measure, fits=False, forecast=False))
    zero = recipe.engine.zero if recipe.engine.name == "deepspeed" else 3
    return replace(
        found,
        layout=replace(Layout(), tensor=ranks, dispatch=recipe.mesh.dispatch, zero=zero),
        accumulation=recipe.train.batch,
        microbatch=1,
    )


def layouts(
    recipe: Recipe,
    site: Site,
    ranks: int,
    *,
    top: int = 5,
    precisions: tuple[Precision, ...] | None = None,
    limit_s: float | None = None,
    clock: Callable[[], float] | None = None,
    measure: Measure | None = None,
    constants: Mapping[str, float] | None = None,
) -> Found:
    """The `top` best layouts of a recipe on `ranks` of a site, each of which `plan` takes. Raises PlanError where there is none, with what would help."""

    def refusal(workload: Workload) -> str:
        try:
            plan(load.changed(recipe, overrides(Candidate(workload, None, changed=False))), site, ranks, measure=measure, forecast=False)  # type: ignore[arg-type]
        except (PlanError, RecipeError) as failure:
            said = str(failure).split(";")[0]
            return "memory: by the engine's own count" if said.startswith("the run needs") else said[:100]
        return ""

    return search(
        undivided(recipe, site, ranks, measure),
        cluster_of(site, ranks),
        top=top,
        precisions=precisions,
        limit_s=limit_s,
        clock=clock,
        constants=VALUES if constants is None else constants,
        refusal=refusal,
    )


def first(recipe: Recipe, found: Found) -> Recipe:
    """The recipe with the best layout of a search."""
    return load.changed(recipe, overrides(found.candidates[0]))


def accelerators(
    recipe: Recipe, megawatts: float, pue: float, *, chips: Sequence[str] = tuple(hardware.CHIPS), measure: Measure | None = None
) -> tuple[Option, ...]:
    """Each of `chips` (every accelerator of hardware.py) at a grid of limits under `megawatts` of a facility, most retained tokens first.

    Each has the layout that is best on the fewest of it that hold the model with SAMPLES samples a rank, repeated: a step's batch grows with the accelerators.
    Losses by failures are taken off.
    """
    found: list[Option] = []
    for name in chips:
        try:
            workload, cluster = _block(recipe, hardware.chip(name), measure)
        except PlanError as failure:
            found.append(Option(name, unknown=str(failure)))
            continue
        guess = estimate(workload, cluster)
        whole = (guess.memory["weights"] + guess.memory["optimizer"]) * guess.ranks / workload.layout.replicate

        def kept(count: int, per_node: int = cluster.per_node, seconds: float = guess.step_s, whole: float = whole) -> float:
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


def _block(recipe: Recipe, chip: hardware.Chip, measure: Measure | None) -> tuple[Workload, Cluster]:
    """The best layout on the fewest accelerators that hold the model."""
    if chip.watts.value is None:
        raise PlanError(f"how many watts a {chip.name} may draw is not published")
    ranks, failed = 8, PlanError(f"{MOST} ranks of a {chip.name} do not hold the model")
    while ranks <= MOST:
        cluster = megawatts_of.cluster_of(chip.id, -(-ranks // chip.devices))
        site = megawatts_of.site_of(cast("Accelerator", chip.id), cluster.accelerators)
        of_block = recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch": SAMPLES * ranks, "microbatch": None})})
        try:
            return search(undivided(of_block, site, ranks, measure), cluster, top=1).candidates[0].workload, cluster
        except PlanError as failure:
            failed, ranks = failure, 2 * ranks
    raise failed
