"""What a supervisor is told of a run: its ranks, and how it would be planned on fewer. Free of torch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gigatrain.config import Recipe
from gigatrain.errors import PlanError
from gigatrain.planning.plan import Plan, plan
from gigatrain.recovery.supervisor import MODULES, Orders
from gigatrain.site import Site


def orders(
    recipe: Recipe, site: Site, planned: Plan, run: Path, arguments: Sequence[str], start: str, *, measure: Callable[[Any], Any]
) -> Orders:
    """Of a run that was planned. `measure`: the numbers of a model that is not of our families, for a plan on fewer ranks."""
    # DeepSpeed asks for devices as it is imported, and a rank that was forked after that has none.
    more = ("gigatrain.engines.deepspeed",) if planned.engine.name == "deepspeed" and planned.device == "cpu" else ()
    return Orders(
        run=run,
        arguments=arguments,
        ranks=planned.ranks,
        start=start,
        recovery=planned.recovery,
        every=planned.report.every,
        modules=(*MODULES, *more),
        fits=lambda ranks: refitted(recipe, site, planned, ranks, measure),
    )


def refitted(recipe: Recipe, site: Site, planned: Plan, ranks: int, measure: Callable[[Any], Any]) -> tuple[str, ...] | None:
    """With which arguments more the same run is planned on so many ranks: the axes that share the batch shrink, the others stay; None: it cannot be."""
    mesh = recipe.mesh
    whole, others = divmod(ranks, mesh.context * mesh.tensor * mesh.pipeline)
    if others:
        return None
    for replicate in range(min(mesh.replicate, whole), 0, -1):
        if whole % replicate:
            continue
        shard = whole // replicate
        smaller = recipe.model_copy(update={"mesh": mesh.model_copy(update={"replicate": replicate, "shard": shard})})
        try:
            found = plan(smaller, site, ranks, measure=measure)
        except PlanError:
            continue
        if found.identity == planned.identity:
            return ("--set", f"mesh.replicate={replicate}", "--set", f"mesh.shard={shard}")
    return None
