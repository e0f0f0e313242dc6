"""The best layouts of a recipe on a site, as recipes: search.py's, with what only a recipe knows to refuse. Free of torch."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gigatrain import load
from gigatrain.config import Mesh, Recipe
from gigatrain.errors import PlanError, RecipeError
from gigatrain.foreign import Foreign
from gigatrain.planning.estimate.constants import VALUES
from gigatrain.planning.estimate.search import Candidate, Found, overrides, search
from gigatrain.planning.estimate.workload import Layout, Precision, Workload
from gigatrain.planning.expect import cluster_of, workload_of
from gigatrain.planning.plan import plan
from gigatrain.site import Site

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
    found = workload_of(plan(alone, site, 1, measure=measure, fits=False))
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
            plan(load.changed(recipe, overrides(Candidate(workload, None, changed=False))), site, ranks, measure=measure)  # type: ignore[arg-type]
        except (PlanError, RecipeError) as failure:
            return str(failure).split(";")[0][:100]
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
