r"""What each recipe of an open model takes on four sites, by the planner, and the pages that say so.

    python benchmarks/recipes.py                          every recipe on every site: memory, tokens/s, MW, days
    python benchmarks/recipes.py --only lucie-7b,eurollm-9b
    python benchmarks/recipes.py --write                  recipes/MODEL/README.md of all, rewritten; a test holds that they are up to date
    python benchmarks/recipes.py --twins                  trains every twin: train, save, resume, export, load in transformers; about 3 s each

Ranks are chosen by one rule (`ranks`), so that rows can be compared: enough for the states of training with room for activations, and for pretraining 64
times as many, as far as the batch divides and the site goes. Whoever has other numbers asks `gigatrain plan RECIPE --site S --gpus N`.
"""

import argparse
import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gigatrain import catalog, load
from gigatrain.architectures import Architecture
from gigatrain.config import Recipe
from gigatrain.errors import GigatrainError
from gigatrain.planning import hardware
from gigatrain.planning.plan import Plan, plan
from gigatrain.site import Site

SITES = ("jupiter", "jean-zay-h100", "lumi", "scaleway-nabu")
STATES = {
    "lora": 2.2
}  # bytes of a parameter that stay: bf16 weights and a little; else bf16 weights, fp32 masters, two moments and gradients
FULL = 18.0
FILL = 0.45  # share of the memory that states may take
MORE = {"pretrain": 64, "continue": 8}
BOUNDARIES = ("facility", "it", "node", "device")


@dataclasses.dataclass(frozen=True)
class Row:
    """A recipe on a site: what was planned, or why it cannot be."""

    task: str
    site: Site
    ranks: int
    plan: Plan | None
    refused: str = ""


def ranks(recipe: Recipe, site: Site, task: str) -> int:
    """How many, by the rule above: whole nodes, and a number that the batch divides by."""
    room, per_node, mesh = hardware.memory_bytes(site)[0] or 64 << 30, site.ranks_per_node or 8, recipe.mesh
    shape = load.architecture(recipe.model)
    states = STATES.get(task, FULL) * shape.parameters()
    least = 1 << max(0, math.ceil(math.log2(states / (FILL * room))))
    together = mesh.tensor * mesh.context * mesh.pipeline
    there = (
        site.accelerators.value * (per_node / site.node.accelerators.value if site.node.accelerators.value else 1)
        if site.accelerators.value
        else 1 << 20
    )
    most = min(8192, int(there), max(least, per_node) * MORE.get(task, 1))
    fitting = (
        n for n in range(most, 0, -1)
        if n % together == 0 and recipe.train.batch % (n // together) == 0 and (n % per_node == 0 or n < per_node) and n // together % mesh.expert == 0
    )  # fmt: skip
    return next(fitting, together)


def rows(model: str, sites: tuple[str, ...] = SITES) -> Iterator[Row]:
    """Every task of a model on every site."""
    for task in catalog.facts(load.shipped("recipes"), model).tasks:
        recipe = load.recipe(f"{model}/{task}")
        for name in sites:
            site = load.site(name)
            count = ranks(recipe, site, task)
            try:
                yield Row(task, site, count, plan(recipe, site, count))
            except GigatrainError as failure:
                yield Row(task, site, count, None, str(failure))


def cells(row: Row) -> list[str]:
    """A row of the table: task, site, ranks, memory, tokens/s, MW and where, days, MWh."""
    head = [row.task, row.site.name, f"{row.ranks:,} {row.site.accelerator or 'ranks'}"]
    if row.plan is None:
        return [*head, row.refused.split(";")[0], "", "", "", ""]
    expected, room = row.plan.expected, hardware.memory_bytes(row.site)[0]
    memory = f"{row.plan.memory.total / 2**30:.0f}" + (f" of {room / 2**30:.0f}" if room else "")
    if expected.step_s is None or expected.tokens_per_s is None:
        return [*head, memory, "unknown", "unknown", "unknown", "unknown"]
    widest = next((name for name in BOUNDARIES if name in expected.watts), None)
    drawn = f"{expected.watts[widest].mid / 1e6:.3g} ({widest})" if widest else "unknown"
    days = f"{expected.days.mid:,.3g}" if expected.days else "unknown"
    mwh = f"{expected.mwh.mid:,.3g}" if expected.mwh else "unknown"
    return [*head, memory, f"{expected.tokens_per_s.mid:,.0f}", drawn, days, mwh]


COLUMNS = ("task", "site", "ranks", "GiB a rank", "tokens/s", "MW", "days", "MWh")


def table(found: list[Row]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * 2 + " ---: |" * 6]
    return lines + ["| " + " | ".join(cells(row)) + " |" for row in found]


def page(model: str) -> str:
    """A model's README.md."""
    root = load.shipped("recipes")
    known = catalog.facts(root, model)
    count, source = known.parameters
    shape = load.architecture(load.recipe(f"{model}/pretrain").model)
    active = shape.active_parameters() if isinstance(shape, Architecture) else count
    lines = [
        f"# {known.title}", "",
        f"{known.maker} ({known.country}), {known.licence}. {count:,} parameters"
        + (f", of which a token meets {active:,}" if active != count else "") + f" ({source}). Trained on: {known.tokens} tokens.", "",
        *(f"* {note}" for note in known.notes), *([""] if known.notes else []),
        "Written by `python benchmarks/recipes.py --write` from model.toml, recipes/tasks and the planner; change those.", "",
        "## Recipes", "",
        "| recipe | starts from | |", "| --- | --- | --- |",
        *(f"| `{model}/{task}` | {_start(model, task)} | {_what(task)} |" for task in known.tasks), "",
        "```", f"gigatrain plan {model}/{known.tasks[-1]} --site jupiter --gpus {_gpus(model, known.tasks[-1])}", f"gigatrain train {model}/pretrain-tiny",
        f"gigatrain recipes copy {model}/{known.tasks[-1]} my.toml", "```", "",
        "## Numbers and their sources", "",
        f"The architecture's numbers: `{model}` in gigatrain/published.py, with its source; a task's own are in the table. {'; '.join(known.sources)}.", "",
    ]  # fmt: skip
    changes = [
        (task, key, value, why) for task in known.tasks for key, (value, why) in known.changes[task].items() if key != "data.sources"
    ]
    if changes:
        lines += ["| task | key | value | source |", "| --- | --- | --- | --- |"]
        lines += [f"| {task} | {key} | {catalog.toml(value)} | {why} |" for task, key, value, why in changes]
        lines += [""]
    lines += [
        "All other values are of recipes/tasks: with a source there, or ours.", "",
        "## Expected", "",
        "By the planner (PLANNER.md says how wrong it is): middles of 90 % intervals, nothing measured. Ranks by benchmarks/recipes.py's rule; MW at the "
        "widest boundary that is known of the site; days with losses to failures and saves; all of the recipe's tokens.", "",
        *table(list(rows(model))), "",
    ]  # fmt: skip
    return "\n".join(lines)


def index() -> str:
    """recipes/README.md: every model, with its page."""
    root = load.shipped("recipes")
    lines = [
        "# Recipes", "",
        "Of each open model `pretrain`, `continue`, `sft`, `lora` and `dpo`, named `MODEL/TASK`; and of each a twin, `MODEL/TASK-tiny`, for a laptop.", "",
        "A model's folder holds what is known of it (`model.toml`) and a page with its sources and what each task takes on four sites. The recipe itself is "
        "made of that and of `tasks/TASK.toml`; `gigatrain recipes copy MODEL/TASK my.toml` writes it out, with a comment for each value that has a source. A "
        "file `MODEL/TASK.toml`, where somebody adds one, stands above what would be made.", "",
        "Written by `python benchmarks/recipes.py --write`.", "",
        "| model | maker | licence | parameters | trained on |", "| --- | --- | --- | ---: | --- |",
    ]  # fmt: skip
    for model in catalog.models(root):
        known = catalog.facts(root, model)
        lines.append(
            f"| [{model}]({model}/README.md) | {known.maker} ({known.country}) | {known.licence} | {known.parameters[0]:,} | {known.tokens} |"
        )
    return "\n".join(lines) + "\n"


def _gpus(model: str, task: str) -> int:
    return ranks(load.recipe(f"{model}/{task}"), load.site("jupiter"), task)


def _start(model: str, task: str) -> str:
    return load.recipe(f"{model}/{task}").model.source or "nothing"


def _what(task: str) -> str:
    return {
        "pretrain": "what is published of its training",
        "continue": "trained further on more text",
        "sft": "taught to answer, all weights",
        "lora": "taught to answer, by an adapter",
        "dpo": "taught which of two answers is better",
    }[task]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="A,B", help="these models")
    parser.add_argument("--write", action="store_true", help="rewrite the pages")
    parser.add_argument("--twins", action="store_true", help="train every twin")
    options = parser.parse_args()
    root = load.shipped("recipes")
    models = options.only.split(",") if options.only else list(catalog.models(root))
    began, failed = time.monotonic(), 0
    if options.write:
        (root / "README.md").write_text(index(), encoding="utf-8")
    for model in models:
        if options.write:
            (root / model / "README.md").write_text(page(model), encoding="utf-8")
        elif options.twins:
            failed += twins(model)
        else:
            for row in rows(model):
                failed += row.plan is None
                print(f"{model:18} " + "  ".join(cells(row)), flush=True)
    print(f"{len(models)} models in {time.monotonic() - began:.1f} s" + (f", {failed} refused" if failed else ""), file=sys.stderr)
    sys.exit(1 if failed else 0)


def twins(model: str) -> int:
    """Trains every twin of a model as a test does; how many failed."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import twins as tests  # pyright: ignore[reportMissingImports]

    failed, data = 0, Path(tempfile.gettempdir()) / "gigatrain-twins"
    for task in catalog.facts(load.shipped("recipes"), model).tasks:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            try:
                print(
                    f"{model}/{task}: {tests.lives(f'{model}/{task}-tiny', Path(folder), data)} {time.monotonic() - began:.1f} s",
                    flush=True,
                )
            except Exception as failure:
                failed += 1
                print(f"{model}/{task}: {type(failure).__name__}: {failure}", flush=True)
    return failed


if __name__ == "__main__":
    main()
