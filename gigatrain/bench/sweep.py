"""The variants of a recipe that are worth a watt: other microbatches, precisions, kernels, meshes, power limits. Free of torch.

Every variant is a whole recipe with its plan; what `plan` refuses is kept with the reason. Each word of a sweep varies by itself from the recipe as it
is (the baseline); words joined by `+` vary together: `microbatch+cap` is every microbatch under every limit.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gigatrain import load
from gigatrain.config import Power, Recipe
from gigatrain.errors import PlanError, RecipeError, RunError
from gigatrain.planning.plan import Plan, plan
from gigatrain.site import Site

WORDS = ("microbatch", "precision", "kernels", "mesh", "cap")
BASELINE, CONTROL = "baseline", "control"
CAPS = (0.85, 0.7, 0.55)  # of the default limit; deployed sites run near 0.7 (JUPITER 680 of 900 W and more)
HELD_BATCHES = 8  # validation at the end reads at most so many batches: the same documents for all
NEVER = 1 << 50


@dataclass(frozen=True)
class Variant:
    """One thing to measure: its name, the keys that differ from the baseline's, and what they make of the recipe."""

    name: str
    sets: tuple[str, ...]
    recipe: Recipe
    plan: Plan
    cap_watts: float | None = None  # None: the limit as it is found


@dataclass(frozen=True)
class Point:
    """One value of a word."""

    name: str
    sets: tuple[str, ...] = ()
    cap_watts: float | None = None


def words(text: str | None) -> list[tuple[str, ...]]:
    """`microbatch,precision+cap` to groups of words. RunError for a word that is none of a sweep's."""
    groups = []
    for group in (text or "microbatch,precision,kernels,mesh").split(","):
        asked = tuple(word.strip() for word in group.split("+"))
        for word in asked:
            if word not in WORDS:
                raise RunError(f"--sweep {word!r}{load.nearest(word, WORDS)} Known: {', '.join(WORDS)}; joined by + they vary together.")
        if len(set(asked)) < len(asked):
            raise RunError(f"--sweep {group!r} has a word twice; once is enough")
        groups.append(asked)
    return list(dict.fromkeys(groups))


def baseline(source: str, sets: Sequence[str], site: Site, measure: Callable[[Mapping[str, Any]], Any] | None = None) -> Variant:
    """The recipe as it is, without what does not belong to a measurement. Raises RecipeError and PlanError."""
    recipe = bare(load.recipe(source, sets))
    return Variant(BASELINE, (), recipe, plan(recipe, site, measure=measure))


def variants(
    source: str,
    sets: Sequence[str],
    site: Site,
    groups: Sequence[tuple[str, ...]],
    first: Variant,
    *,
    visible: int,
    default_watts: float | None = None,
    least_watts: float | None = None,
    no_caps: str | None = None,
    measure: Callable[[Mapping[str, Any]], Any] | None = None,
) -> tuple[list[Variant], dict[str, str]]:
    """The variants beside the baseline `first`, and those that cannot be, by name, with the reason.

    `visible` accelerators (1 where there are none) may share a layout; limits are shares of `default_watts`, not below `least_watts`; `no_caps` says why
    none may be set.
    """
    found: dict[str, Variant] = {}
    refused: dict[str, str] = {}

    def points(word: str) -> list[Point]:
        made = list(_points(word, first, visible, default_watts, least_watts))
        if not made:
            refused[word] = _nothing(word, no_caps)
        return made

    for group in groups:
        if "cap" in group and (no_caps or default_watts is None):
            refused["+".join(group)] = no_caps or "the accelerators do not tell their default limit"
            continue
        for chosen in itertools.product(*map(points, group)):
            name = " ".join(point.name for point in chosen)
            changed = tuple(key for point in chosen for key in point.sets)
            cap = next((point.cap_watts for point in chosen if point.cap_watts is not None), None)
            if name in found or name in refused:
                continue
            try:
                recipe = bare(load.recipe(source, [*sets, *changed]))
                planned = plan(recipe, site, measure=measure)
            except (PlanError, RecipeError) as failure:
                refused[name] = " ".join(str(failure).split())
                continue
            twin = next((one.name for one in (first, *found.values()) if one.plan == planned and one.cap_watts == cap), None)
            if twin is not None:
                refused[name] = f"the same plan as {twin}"
                continue
            found[name] = Variant(name, changed, recipe, planned, cap)
    return list(found.values()), refused


def bare(recipe: Recipe) -> Recipe:
    """A recipe to measure: it trains, validates once at its end on a fixed sample, and does nothing else; no budget paces it."""
    most = min(recipe.validation.max_samples or NEVER, HELD_BATCHES * recipe.train.batch)
    power = Power(measure=True, every_s=recipe.power.every_s, sysfs=recipe.power.sysfs, node=recipe.power.node)
    changes = {
        "export": False,
        "sample": {},
        "profile": {},
        "power": power.model_dump(mode="json"),
        "validation": {"every": 0, "max_samples": most},
        "checkpoint": {"every": NEVER, "keep": 1},
        "report": recipe.report.model_dump(mode="json") | {"trackers": [], "prometheus": None},
    }
    return _again(recipe, changes)


def sized(recipe: Recipe, steps: int, every: int, seed: int | None = None) -> Recipe:
    """The recipe with so many steps, a report every `every` of them, and perhaps another seed."""
    train = recipe.train.model_dump(mode="json") | {"steps": steps, "tokens": None}
    report = recipe.report.model_dump(mode="json") | {"every": every}
    return _again(recipe, {"train": train | ({} if seed is None else {"seed": seed}), "report": report})


def text(recipe: Recipe) -> str:
    """As `gigatrain train` reads it."""
    return recipe.model_dump_json(by_alias=True, indent=1)


def _again(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """A copy that is validated like any recipe."""
    tree = recipe.model_dump(mode="json", by_alias=True) | changes
    return load.read_json(Recipe, json.dumps(tree), recipe.name, RecipeError)


# ---- The points of a word ----


def _points(word: str, first: Variant, visible: int, default_watts: float | None, least_watts: float | None) -> Iterator[Point]:
    recipe, made = first.recipe, first.plan
    if word == "microbatch":
        share = recipe.train.batch // (made.mesh.replicate * (made.mesh.shard or 1))
        sizes = (1 << bit for bit in range(share.bit_length()))
        yield from (Point(f"microbatch={size}", (f"train.microbatch={size}",)) for size in sizes if share % size == 0)
    if word == "precision":
        yield from (Point(f"precision={name}", (f"train.precision={name}",)) for name in ("fp32", "bf16"))
        # The lane's own arithmetic or none: emulated, it costs more and says nothing of a machine that has it.
        yield Point("precision=fp8", ("train.precision=fp8", "fp8.emulate=false"))
    if word == "kernels":
        yield from (Point(f"kernels={name}", (f"kernels={name}",)) for name in ("auto", "reference"))
    if word == "mesh" and (ranks := max(made.ranks, visible)) > 1:
        yield from _layouts(ranks)
    if word == "cap" and default_watts:
        watts = dict.fromkeys(float(round(max(share * default_watts, least_watts or 0.0))) for share in CAPS)
        yield from (Point(f"cap={one:.0f}W", (), one) for one in watts if one < default_watts)


def _layouts(ranks: int) -> Iterator[Point]:
    """Every mesh of so many ranks in which one axis beside `shard` is above 1."""
    for axis in ("shard", "replicate", "tensor", "context", "pipeline", "expert"):
        for size in (one for one in range(2, ranks + 1) if ranks % one == 0):
            if axis == "shard" and size != ranks:
                continue
            sizes = {"replicate": 1, "expert": 1, "context": 1, "tensor": 1, "pipeline": 1}
            if axis == "shard":
                sizes["shard"] = ranks
            elif axis == "expert":
                sizes |= {"shard": ranks, axis: size}
            else:
                sizes |= {"shard": ranks // size, axis: size}
            shown = " ".join(f"{name}{count}" for name, count in sizes.items() if count > 1)
            sets = (*(f"mesh.{name}={count}" for name, count in sizes.items()), f"train.nproc={ranks}")
            yield Point(f"mesh={shown.replace(' ', 'x')}", sets)


def _nothing(word: str, no_caps: str | None) -> str:
    return {
        "mesh": "one rank has one layout; where there are more accelerators, --set train.nproc=N",
        "cap": no_caps or "no limit below the default is allowed by the accelerator",
    }.get(word, "it has no value to take here")
