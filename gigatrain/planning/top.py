"""`gigatrain plan --top N`: the best layouts of a recipe on a site, each of which `plan()` accepts."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from gigatrain import load
from gigatrain.config import FP8, Recipe
from gigatrain.errors import PlanError
from gigatrain.foreign import Foreign
from gigatrain.planning import axes, expect
from gigatrain.planning.estimate import layouts
from gigatrain.planning.estimate.candidates import LANES, Candidate, Found
from gigatrain.planning.estimate.constants import VALUES
from gigatrain.planning.estimate.search import indivisible, search, step_time
from gigatrain.planning.estimate.work import Estimate
from gigatrain.planning.estimate.workload import PRODUCTS_BITS, Layout, Precision, Stack, Workload
from gigatrain.planning.plan import plan
from gigatrain.site import Site


def top(
    recipe: Recipe,
    site: Site,
    ranks: int,
    *,
    count: int = 5,
    precisions: tuple[Precision, ...] | None = None,
    limit_s: float | None = None,
    clock: Callable[[], float] | None = None,
    constants: Mapping[str, float] = VALUES,
    key: Callable[[Workload, Estimate], float] = step_time,
    measure: Callable[[Mapping[str, Any]], Foreign] | None = None,
) -> Found:
    """The `count` best layouts of `ranks`; the recipe's own mesh, microbatch and recomputation are not asked. Other `precisions` than its own only as given.

    Raises PlanError where the model's operations are unknown, where no layout divides or fits, and SiteError as `expect.cluster_of` does.
    """
    base = workload(recipe, site, ranks, measure=measure)

    def refusal(tried: Workload) -> str:
        try:
            plan(arranged(recipe, tried, changed=tried.precision != base.precision), site, ranks, measure=measure, forecast=False)
        except PlanError as failure:
            said = str(failure).split(";")[0]
            return "the plan's own count of memory" if said.startswith("the run needs") else re.sub(r"\d[\d.,]*", "N", said)[:120]
        return ""

    return search(
        base,
        expect.cluster_of(site, ranks),
        precisions=precisions,
        top=count,
        limit_s=limit_s,
        clock=clock,
        constants=constants,
        key=key,
        refusal=refusal,
    )


def workload(recipe: Recipe, site: Site, ranks: int, *, measure: Callable[[Mapping[str, Any]], Foreign] | None = None) -> Workload:
    """The recipe in the terms of an estimate, in some layout of `ranks` that is legal, whether it fits or not."""
    first: PlanError | None = None
    for tried in _legal(recipe, site, ranks, measure):
        try:
            made = plan(tried, site, ranks, measure=measure, fits=False, forecast=False)
        except PlanError as failure:
            first = first or failure
            continue
        found = expect.workload_of(made)
        if found.batch != recipe.train.batch:
            continue
        return found
    assert first is not None
    raise first


def _legal(recipe: Recipe, site: Site, ranks: int, measure: Callable[[Mapping[str, Any]], Foreign] | None) -> list[Recipe]:
    """The recipe as it is, if its mesh has so many ranks and its microbatch divides; then the first layout of each split that divides."""
    found = [recipe] if _whole(recipe, ranks) else []
    shape = expect.shape_of(load.architecture(recipe.model, measure))
    stack: Stack = "gigatrain_deepspeed" if recipe.engine.name == "deepspeed" else "gigatrain_native"
    train = recipe.train
    plain = Workload(
        shape, Layout(replicate=ranks, zero=0), train.sequence, 1, 1, stack=stack, compiled=train.compile, offload=recipe.engine.offload,
        precision="fp32" if train.precision == "fp32" else "bf16", recompute=train.recompute,
    )  # fmt: skip
    pruned: Counter[str] = Counter()
    for split in layouts.splits(plain, expect.cluster_of(site, ranks), pruned, batch=train.batch):
        turn = next(iter(layouts.turns(plain, split, plain.precision)), None)
        share = next(iter(layouts.shards(plain, split, 1)), None)
        if turn is not None and share is not None:
            found.append(arranged(recipe, layouts.arranged(plain, split, 1, share, turn, train.recompute, plain.precision), changed=False))
        if len(found) >= 40:
            break
    if not found:
        raise PlanError(indivisible(plain, expect.cluster_of(site, ranks), pruned, train.batch))
    return found


def _whole(recipe: Recipe, ranks: int) -> bool:
    try:
        microbatch, accumulation = axes.share(recipe, mesh := axes.resolve(recipe, ranks))
    except PlanError:
        return False
    return microbatch * accumulation * mesh.replicate * (mesh.shard or 1) == recipe.train.batch


def arranged(recipe: Recipe, candidate: Workload | Candidate, *, changed: bool | None = None) -> Recipe:
    """The recipe in a candidate's layout: what `search.overrides` say in text."""
    if isinstance(candidate, Candidate):
        candidate, changed = candidate.workload, candidate.changed
    mine, train, engine, low = candidate.layout, recipe.train, recipe.engine, recipe.fp8
    mesh = recipe.mesh.model_copy(
        update={
            "replicate": mine.replicate, "shard": mine.shard, "context": mine.context, "tensor": mine.tensor, "pipeline": mine.pipeline,
            "expert": mine.expert, "schedule": mine.schedule, "stages": mine.stages, "exchange": mine.exchange, "dispatch": mine.dispatch,
        }
    )  # fmt: skip
    if candidate.stack == "gigatrain_deepspeed":
        engine = engine.model_copy(update={"zero": mine.zero})
    elif mine.zero == 3 and mine.pipeline == 1:
        engine = engine.model_copy(update={"reshard": mine.reshard})
    update: dict[str, Any] = {"microbatch": candidate.microbatch, "recompute": candidate.recompute}
    if changed:
        lane = LANES.get(candidate.precision)
        update["precision"] = "fp8" if lane else candidate.precision
        if lane:
            low = low.model_copy(update=dict(zip(("scaling", "amax"), lane, strict=False)))
        elif PRODUCTS_BITS[candidate.precision] >= 16:
            low = FP8()
    return recipe.model_copy(update={"mesh": mesh, "engine": engine, "train": train.model_copy(update=update), "fp8": low})
