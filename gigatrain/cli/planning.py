"""plan, recipes, sites: what a run would do, on which machine, from which recipe; nothing is started."""

import argparse
import json
from pathlib import Path
from typing import Any

from gigatrain.cli import given
from gigatrain.cli.command import Command
from gigatrain.errors import PlanError

_shown = given.between(int, "count", 1, 100)
_pue = given.between(float, "PUE", 1, 10, ": the facility's draw over IT's")


def _megawatts(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 1000000")
    return number


def _plan_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("recipe", metavar="RECIPE", nargs="?", help="a recipe file, or the name of a shipped one (`gigatrain recipes`)")
    made.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the recipe (null leaves it out); may be repeated"
    )
    made.add_argument("--site", metavar="SITE", help="where it would run (default: this machine)")
    made.add_argument(
        "--gpus", metavar="N", type=given.ranks, help="ranks that it would run on (default: train.nproc, else what the mesh needs)"
    )
    made.add_argument(
        "--nodes", metavar="N", type=given.ranks, help="nodes of the site; with --gpus for a site that does not say what one holds"
    )
    made.add_argument(
        "--megawatts",
        metavar="M",
        type=_megawatts,
        help="as many nodes as M MW of the facility feed, cooling included, and a run that keeps to them; without --site: which accelerators, at which limit",
    )
    made.add_argument("--pue", metavar="P", type=_pue, help="of --megawatts without a site: facility over IT (default: 1.2)")
    made.add_argument("--top", metavar="K", type=_shown, help="search every layout, show the K best that differ, and plan the first")
    made.add_argument(
        "--explain", action="store_true", help="the arithmetic: phases, bytes, watts, losses, and what was assumed; of a site alone, its MW"
    )
    made.add_argument("--report", metavar="FILE", help="one HTML page: where time, bytes, watts and money go, layouts, scaling, what-if")
    made.add_argument("--pilots", metavar="DIR", help="write job scripts of short runs that decide among the best layouts")
    made.add_argument("--decide", metavar="DIR", help="which of the pilots in DIR was fastest, once they have run")
    made.add_argument("--strict", action="store_true", help="refuse what is outside of what was calibrated")
    made.add_argument(
        "--calibrate", metavar="RUN", nargs="+", help="refit compute, communication and launches to run folders, into -o FILE"
    )
    made.add_argument("--calibration", metavar="FILE", help="plan with what --calibrate wrote")
    made.add_argument("--predict", metavar="FILE", help="answer rows of measurements (JSON lines, PLANNER.md), into -o FILE")
    made.add_argument("-o", "--out", metavar="FILE", default=None, help="of --predict (predicted.jsonl) and --calibrate (calibration.json)")
    made.add_argument(
        "--dry-run", action="store_true", help="build every kind of rank and step it on fake tensors: boxes, bytes, collectives"
    )
    made.add_argument("--json", action="store_true", help="the whole plan as JSON")


# What each way of asking `gigatrain plan` reads; a flag that it would not read is refused, so that nothing is asked in vain.
_PLANS = {
    "--predict": {"predict", "out", "strict"},
    "--calibrate": {"calibrate", "out", "site"},
    "--decide": {"decide"},
    "--explain of a site alone": {"site", "explain", "json"},
    "--megawatts without a site": {"recipe", "set", "megawatts", "pue", "json"},
    "a plan": {
        "recipe", "set", "site", "gpus", "nodes", "megawatts", "top", "explain", "report", "pilots", "strict", "calibration", "dry_run", "json",
    },
}  # fmt: skip


def _plan(options: argparse.Namespace) -> None:
    if options.predict:
        way, run = "--predict", _predict
    elif options.calibrate:
        way, run = "--calibrate", _calibrate
    elif options.decide:
        way, run = "--decide", _decide
    elif options.recipe is None:
        way, run = "--explain of a site alone", _arithmetic
    elif options.megawatts is not None and options.site is None:
        way, run = "--megawatts without a site", _accelerators
    else:
        way, run = "a plan", _planned
    unsaid = argparse.ArgumentParser()
    _plan_arguments(unsaid)
    said = {name for name, default in vars(unsaid.parse_args([])).items() if getattr(options, name) != default}
    if unread := sorted(said - _PLANS[way]):
        names = ", ".join("RECIPE" if name == "recipe" else f"--{name.replace('_', '-')}" for name in unread)
        raise PlanError(
            f"{way} does not read {names}; leave it out" + (", or name a --site" if way == "--megawatts without a site" else "")
        )
    run(options)


def _decide(options: argparse.Namespace) -> None:
    from gigatrain.launching import pilots

    print("\n".join(pilots.decided(Path(options.decide))))


def _planned(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.launching.size import kept, size, size_of
    from gigatrain.planning import calibrate, choose, top, words
    from gigatrain.planning.estimate import candidates
    from gigatrain.planning.expect import prospect
    from gigatrain.planning.plan import plan

    site, why = given.site(options.site)
    recipe = given.scheduled(load.recipe(options.recipe, options.set))
    sized = size_of(site, recipe, options.nodes, options.gpus, options.megawatts)
    recipe = kept(recipe, options.megawatts)
    constants = calibrate.applied(Path(options.calibration) if options.calibration is not None else None, site)
    found = None
    if options.top or options.pilots:  # the recipe's own layout need not fit: the best one is planned
        ranks = sized.ranks if sized else recipe.train.nproc or 1
        found = top.top(recipe, site, ranks, count=options.top or 5, measure=given.measured, constants=constants)
        recipe = top.arranged(recipe, found.candidates[0])
    chosen = plan(recipe, site, sized.ranks if sized else None, measure=given.measured, constants=constants)
    words.strict(chosen.expected, options.strict)
    sized = sized or size(site, gpus=chosen.ranks)
    tried = None
    if options.dry_run:
        from gigatrain.planning.dryrun import dry_run

        tried = dry_run(chosen)
    behind = prospect(chosen, site, constants, explain=True) if options.explain or options.report else None
    if options.report and behind is not None:
        from gigatrain.observe.report import planned

        planned.write(choose.picture(chosen, site, behind, found), Path(options.report).expanduser())
    pilots = None
    if options.pilots and found is not None:
        from gigatrain.launching import pilots as short
        from gigatrain.launching.submit import Request

        asked_for = Request(options.recipe, options.site or site.name, tuple(options.set))
        pilots = short.write(Path(options.pilots), found, asked_for, nodes=sized.nodes, measure=given.measured)
    if options.json:
        tree = chosen.model_dump(mode="json", by_alias=True) | {"sha256": chosen.sha256, "size": _fields(sized)}
        tree |= {"dry_run": tried.json()} if tried else {}
        print(json.dumps(tree | ({"layouts": candidates.tree(found)} if found else {}), indent=2))
        return
    from gigatrain.observe import sites
    from gigatrain.observe.display import Display

    display = Display()
    for line in candidates.table(found) if found else ():
        display.line(line)
    if found:
        display.line("the first, planned here, is: " + " ".join(f"--set {text}" for text in candidates.overrides(found.candidates[0])))
    display.plan(chosen, why)
    for line in sites.on_site(site, sized):
        display.line(line)
    if options.calibration:
        display.line(f"  measured {options.calibration}: the estimate is as runs of one's own were")
    for line in words.expected(chosen.expected):
        display.line(line)
    for line in words.explained(behind) if behind is not None and options.explain else ():
        display.line(line)
    display.plan_details(chosen)
    for line in tried.lines() if tried else ():
        display.line(line)
    if options.report:
        display.line(f"  report   {options.report}")
    if pilots is not None:
        display.line(f"  pilots   {len(pilots.runs)} in {pilots.folder}, {pilots.takes}; start them with {pilots.start}")


def _arithmetic(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.errors import RecipeError
    from gigatrain.planning import megawatts

    if not (options.site and options.explain):
        raise RecipeError(
            "name a RECIPE (`gigatrain recipes` lists them); without one: --site S --explain, --predict FILE or --calibrate RUN"
        )
    found = megawatts.explain(load.site(options.site))
    print(json.dumps(_fields(found), indent=2, default=_tree) if options.json else "\n".join(megawatts.explained(found)))


def _accelerators(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.planning import choose, megawatts

    pue = options.pue or 1.2
    recipe = load.recipe(options.recipe, options.set)
    found = choose.accelerators(recipe, options.megawatts, pue, measure=given.measured)
    if options.json:
        print(json.dumps([_fields(one) for one in found], indent=2, default=_tree))
        return
    print("\n".join(megawatts.report(found, options.megawatts, pue)))
    print(f"the recipe's own step is of {recipe.train.batch:,} samples: a larger one is another recipe, which may learn less of each token")


def _fields(record: Any) -> dict[str, Any]:
    from dataclasses import asdict  # here: with inspect it is a tenth of the start of every command

    return asdict(record)


def _tree(value: Any) -> Any:
    """A record within a record, for JSON."""
    return value.model_dump(mode="json")


def _predict(options: argparse.Namespace) -> None:
    from gigatrain.planning.predict import predict_file

    told = predict_file(Path(options.predict), Path(options.out or "predicted.jsonl"), strict=options.strict)
    print(f"{told}\nanswers: {options.out or 'predicted.jsonl'}")


def _calibrate(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.planning import calibrate

    found = calibrate.calibrate(
        [Path(run).expanduser() for run in options.calibrate], site=load.site(options.site) if options.site else None
    )
    out = options.out or "calibration.json"
    calibrate.write(found, Path(out))
    print(f"{found}\nwritten: {out}; apply it with gigatrain plan RECIPE --calibration {out}")


PLAN = Command(
    "plan",
    "what a run will do, take and cost; starts nothing",
    """\
Resolve a recipe on a site into a plan: every number concrete, the memory it needs, the kernel of each operation; and what to expect of it: tokens/s,
watts at four boundaries, goodput, days, euros, CO2, each with its 90 % interval. Starts nothing. PLANNER.md says how, and how wrong it is.

  gigatrain plan quickstart
  gigatrain plan my.toml --site one-gpu --set train.microbatch=4
  gigatrain plan my.toml --site jupiter --nodes 64            what it assumes of the site is said, what it lacks refused
  gigatrain plan my.toml --site jupiter --megawatts 0.5
  gigatrain plan my.toml --site jupiter --set power.megawatts=0.5   a budget: sizes the run, and refuses what would draw more
  gigatrain plan my.toml --site jupiter --nodes 64 --top 5    the best layouts, why, and what limits each
  gigatrain plan my.toml --site jupiter --nodes 64 --explain --report plan.html
  gigatrain plan my.toml --megawatts 20 --pue 1.1             how many of which accelerators, at which limit, train most
  gigatrain plan --site aion --explain                        a site's promise: accelerators x watts x PUE against its MW
  gigatrain plan my.toml --site my-site.toml --gpus 64 --pilots pilots ; pilots/pilots.sh ; gigatrain plan --decide pilots
  gigatrain plan --calibrate runs/a runs/b -o mine.json ; gigatrain plan my.toml --calibration mine.json
  gigatrain plan --predict rows.jsonl -o answers.jsonl        published measurements, predicted
  gigatrain plan my.toml --json | jq .expected""",
    _plan,
    _plan_arguments,
)


def _recipes_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--json", action="store_true", help="as JSON, for programs")


def _recipes(options: argparse.Namespace) -> None:
    from gigatrain import shelf

    found = shelf.rows()
    print(json.dumps(found, indent=2) if options.json else "\n".join(shelf.table(found)))


def _recipes_list_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--json", action="store_true", help="as JSON")


def _recipes_search_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("words", metavar="WORD", nargs="+", help="of a name, a task, a maker, a country, a licence or a family")
    made.add_argument("--json", action="store_true", help="as JSON")


def _recipes_search(options: argparse.Namespace) -> None:
    from gigatrain import shelf

    found = shelf.searched(options.words)
    print(json.dumps(found, indent=2) if options.json else "\n".join(shelf.lines(found)))


def _recipes_copy_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("name", metavar="NAME", help="a shipped recipe, or with -tiny its twin")
    made.add_argument("path", metavar="PATH", nargs="?", help="the file to write (default: NAME.toml here)")


def _recipes_copy(options: argparse.Namespace) -> None:
    from gigatrain import shelf

    print(shelf.copied(options.name, Path(options.path) if options.path else None))


def _recipes_from_hub_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("source", metavar="PATH", help="a folder with config.json, or a hub name")
    made.add_argument("--task", choices=("pretrain", "continue", "sft", "lora", "dpo"), default="sft", help="default: sft")
    made.add_argument("-o", "--out", metavar="FILE", help="the file to write (default: MODEL-TASK.toml here)")


def _recipes_from_hub(options: argparse.Namespace) -> None:
    from gigatrain import shelf

    path, numbers = shelf.from_hub(options.source, options.task, Path(options.out) if options.out else None, measure=given.measured)
    print(f"{path}: {shelf.kind(numbers)}, {numbers.parameters():,} parameters")


_RECIPES_TEXT = """\
The shipped recipes: of each open model pretrain, continue, sft, lora and dpo, and a -tiny twin of each that runs on a laptop.

  gigatrain recipes                                           a line for each model
  gigatrain recipes search french sft                         those that have every word: a country, a maker, a licence, a family, a task
  gigatrain recipes copy lucie-7b/sft my.toml                 a recipe of your own, with its comments
  gigatrain recipes copy lucie-7b/sft-tiny                    its twin as a file
  gigatrain recipes from-hub ~/models/mine --task lora        of any config.json, here or on the hub
  gigatrain train lucie-7b/pretrain-tiny

A model's own page is recipes/MODEL/README.md: sources, licence, and what each task takes on four sites."""
RECIPES = Command(
    "recipes",
    "list, search and copy the shipped recipes",
    _RECIPES_TEXT,
    _recipes,
    _recipes_arguments,
    within=(
        Command("list", "a line for each model", _RECIPES_TEXT, _recipes, _recipes_list_arguments),
        Command("search", "those that have every word", _RECIPES_TEXT, _recipes_search, _recipes_search_arguments),
        Command("copy", "start a recipe of your own", _RECIPES_TEXT, _recipes_copy, _recipes_copy_arguments),
        Command("from-hub", "write one for any config.json", _RECIPES_TEXT, _recipes_from_hub, _recipes_from_hub_arguments),
    ),
)


def _sites_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("name", nargs="?", metavar="NAME", help="a site or its file: all of it; else a word that those listed have")
    made.add_argument("--json", action="store_true", help="as JSON, for programs")


def _sites(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.observe import sites

    paths = load.sites()
    if options.name in paths or (options.name and Path(options.name).is_file()):
        site, path = load.site(options.name), str(paths.get(options.name, options.name))
        print(json.dumps(sites.as_json(site, path), indent=2) if options.json else "\n".join(sites.describe(site, path)))
        return
    found = sites.chosen([load.site(path) for path in paths.values()], options.name or "")
    if not found:
        load.site(options.name)  # refuses it, with the nearest name
    print(json.dumps([site.model_dump(mode="json") for site in found], indent=2) if options.json else "\n".join(sites.table(found)))


SITES = Command(
    "sites",
    "the machines: what is known of them, and how surely",
    """\
The machines that runs are planned for and launched on. Every number is measured, declared by its operator or maker, assumed with a reason, or unknown by name.

  gigatrain sites                                             one line each
  gigatrain sites gh200                                       those that have the word: a name, a country (FR), a kind, an accelerator
  gigatrain sites jupiter                                     every figure with its unit, basis and source
  gigatrain sites my-site.toml --json

A site of your own is one TOML file: copy the nearest of them (its path is shown), and give it as --site FILE.""",
    _sites,
    _sites_arguments,
)
