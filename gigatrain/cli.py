"""The commands: they read arguments, call the library and print; no logic."""

import argparse
import dataclasses
import datetime
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gigatrain import __version__
from gigatrain.errors import REQUEUE, GigatrainError, PlanError, RecipeError, RunError, SiteError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's error is one message and the exit code of its kind, never a traceback."""
    options = _parser().parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    options.process = arguments is None
    try:
        options.run(options)
    except GigatrainError as failure:
        # What all ranks raise is said once; what they read alike before they met, once on each node, since another node may have other files.
        alike = "RANK" if failure.shared else "LOCAL_RANK" if isinstance(failure, (RecipeError, SiteError, PlanError)) else ""
        if os.environ.get(alike, "0") == "0":
            print(f"gigatrain: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
    except MemoryError:
        print("gigatrain: out of memory; lower train.microbatch or train.sequence", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `gigatrain recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as failure:  # a full disk, a folder without permission, a file system that went away
        if failure.strerror is None:
            raise
        print(f"gigatrain: {failure.strerror}{f': {failure.filename}' if failure.filename else ''}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _train(options: argparse.Namespace) -> None:
    from gigatrain import leaving

    with leaving.installed(last=options.process):  # first of all: a signal is heard whatever the process is at
        _run_of(options)


def _run_of(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.planning.plan import plan

    if os.environ.get("GIGATRAIN_LAUNCHER") == "srun":
        from gigatrain.launching import slurm

        os.environ.update(slurm.rank_environment(os.environ))
    recipe = _scheduled(load.recipe(options.recipe, options.set))
    site, why = _site(options.site)
    started = os.environ.get("WORLD_SIZE")  # torchrun's, or our own
    if started and not started.isdecimal():
        raise RunError(f"the environment's WORLD_SIZE is {started!r} and no count of ranks; torchrun and train.nproc set it, or unset it")
    from gigatrain.parallel import groups

    here = groups.place()  # None: of no replica
    chosen = plan(recipe, site, int(started) * (here.replicas if here else 1) if started else None, measure=_measured)
    resume = "other-numbers" if options.other_numbers else "resume"
    start: Any = "new" if options.new else resume if options.resume else "continue" if options.go_on else "auto"
    folder = _run_folder(options, recipe.name)
    arguments = ["train", *options.arguments[1:], "--run", str(folder)]
    if chosen.recovery.replicas != "none" and here is None and started is None:
        sys.exit(groups.run(chosen, folder, arguments))
    chosen, folder = groups.part(chosen, folder)
    if started is None and (chosen.recovery.supervised or chosen.ranks > 1):
        from gigatrain.observe import logs
        from gigatrain.recovery.start import orders
        from gigatrain.recovery.supervisor import supervise

        given = orders(recipe, site, chosen, folder, arguments, start, measure=_measured)
        sys.exit(supervise(given, lambda since: logs.first_failure(folder, logs.attempt(), since=since)))
    start = os.environ.get("GIGATRAIN_START", start)  # a supervisor's word, which starts ranks more than once
    from gigatrain.observe.display import Display
    from gigatrain.observe.logs import Log

    with Log(folder, new=start == "new") as log:  # from here on what is printed, torch's own words included, is in the rank's log
        display = Display(log=log)
        if os.environ.get("RANK", "0") == "0":
            display.plan(chosen, why)
        from gigatrain.loop import train  # torch, 2 s: everything that can be refused without it has been

        summary = train(chosen, folder, start=start, display=display, log=log)
        if summary is None:
            if "GIGATRAIN_ATTEMPT" in os.environ and os.environ.get("RANK", "0") == "0":
                from gigatrain.launching import job

                job.record(folder, "left")  # saved because of a signal: the job's script is to know
            sys.exit(REQUEUE)


def _watch(options: argparse.Namespace) -> None:
    folder = Path(options.run_folder).expanduser()
    if options.serve:
        from gigatrain.observe import prometheus

        given = Path(options.token_file).expanduser() if options.token_file else None
        prometheus.serve(folder, options.serve, given, lambda text: print(text, flush=True))
        return
    from gigatrain.observe.watch import watch

    watch(folder, once=options.once, as_json=options.json)


def _report(options: argparse.Namespace) -> None:
    from gigatrain.observe.report import report

    report([Path(folder).expanduser() for folder in options.run_folders], options.out, as_json=options.json, plots=options.plots)


def _scheduled(recipe: Any) -> Any:
    """The recipe, once its schedule of prices and megawatts could be read: a job is not to wait in a queue to learn that it cannot."""
    if recipe.power.schedule is not None:
        from gigatrain.power.schedule import Schedule

        Schedule.read(recipe.power.schedule)
    return recipe


def _measured(config: Any) -> Any:
    """The numbers of a model that is not of our families; torch and transformers, 4 s."""
    from gigatrain.models.autonumbers import numbers

    return numbers(config)


def _run_folder(options: argparse.Namespace, name: str) -> Path:
    """--run; else a new folder under runs/, or with --resume the newest of this recipe there."""
    if options.run_folder:
        return Path(options.run_folder).expanduser()
    if options.resume:
        from gigatrain import run

        return run.newest(Path("runs"), name)
    return Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _between(kind: Callable[[str], Any], name: str, low: int, high: int, why: str = "") -> Callable[[str], Any]:
    """A number of the command line within bounds, both of which it may be; `name` is what argparse calls one that is no number."""

    def parsed(text: str) -> Any:
        number = kind(text)
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}{why}")
        return number

    parsed.__name__ = name
    return parsed


_count = _between(int, "count", 0, (1 << 31) - 1)
_ranks = _between(int, "ranks", 1, 1 << 20)
_shown = _between(int, "count", 1, 100)
_positive_count = _between(int, "count", 1, (1 << 31) - 1)
_pue = _between(float, "PUE", 1, 10, ": the facility's draw over IT's")
_gib = _between(float, "GiB", 0, 10**9)
_processes = _between(int, "count", 1, 1024)
_temperature = _between(float, "temperature", 0, 10**6)


def _bytes(text: str) -> float:
    """`5GB`, `500MB`, `1GiB` or a number of bytes, of 1 MB at least."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", text)
    number = float(match[1]) * ((1024 if "i" in match[2] else 1000) ** (" KMGT".index(match[2][0])) if match[2] else 1) if match else 0
    if not 1e6 <= number <= 1e15:
        raise argparse.ArgumentTypeError(f"{text} is no size between 1MB and 1000TB, such as 5GB")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1000000000")
    return number


def _megawatts(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 1000000")
    return number


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
_PLAN_FLAGS = {
    "recipe": None, "set": [], "site": None, "gpus": None, "nodes": None, "megawatts": None, "pue": None, "top": None, "explain": False, "report": None,
    "pilots": None, "decide": None, "strict": False, "calibrate": None, "calibration": None, "predict": None, "out": None, "dry_run": False, "json": False,
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
    given = {name for name, default in _PLAN_FLAGS.items() if getattr(options, name) != default}
    if unread := sorted(given - _PLANS[way]):
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
    from gigatrain.launching.size import by_budget, fed, kept, size
    from gigatrain.planning import choose, top, words
    from gigatrain.planning.estimate import candidates
    from gigatrain.planning.expect import prospect
    from gigatrain.planning.plan import plan

    site, why = _site(options.site)
    recipe, asked = _scheduled(load.recipe(options.recipe, options.set)), (options.nodes, options.gpus, options.megawatts)
    asked = (by_budget(site, recipe), None, None) if asked == (None, None, None) else asked
    sized = None if asked == (None, None, None) else size(site, *asked)
    sized = fed(site, recipe, sized, options.megawatts)
    recipe, constants = kept(recipe, options.megawatts), _constants(options.calibration, site)
    found = None
    if options.top or options.pilots:  # the recipe's own layout need not fit: the best one is planned
        ranks = sized.ranks if sized else recipe.train.nproc or 1
        found = top.top(recipe, site, ranks, count=options.top or 5, measure=_measured, constants=constants)
        recipe = top.arranged(recipe, found.candidates[0])
    chosen = plan(recipe, site, sized.ranks if sized else None, measure=_measured, constants=constants)
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
        pilots = short.write(Path(options.pilots), found, asked_for, nodes=sized.nodes, measure=_measured)
    if options.json:
        tree = chosen.model_dump(mode="json", by_alias=True) | {"sha256": chosen.sha256, "size": dataclasses.asdict(sized)}
        tree |= {"dry_run": tried.json()} if tried else {}
        print(json.dumps(tree | ({"layouts": candidates.tree(found)} if found else {}), indent=2))
        return
    from gigatrain.observe import sites
    from gigatrain.observe.display import Display

    display = Display()
    for line in candidates.table(found) if found else ():
        display.line(line)
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
    print(json.dumps(dataclasses.asdict(found), indent=2, default=_tree) if options.json else "\n".join(megawatts.explained(found)))


def _accelerators(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.planning import choose, megawatts

    pue = options.pue or 1.2
    recipe = load.recipe(options.recipe, options.set)
    found = choose.accelerators(recipe, options.megawatts, pue, measure=_measured)
    if options.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=2, default=_tree))
        return
    print("\n".join(megawatts.report(found, options.megawatts, pue)))
    print(f"the recipe's own step is of {recipe.train.batch:,} samples: a larger one is another recipe, which may learn less of each token")


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


def _constants(path: str | None, site: Any) -> Any:
    """Of the estimate: as they ship, or on this site's accelerators as `--calibrate` found them."""
    from gigatrain.planning.estimate.constants import VALUES

    if path is None:
        return VALUES
    from gigatrain.planning import calibrate

    return calibrate.constants_of(calibrate.read(Path(path)), site.accelerator or "cpu")


def _launch(options: argparse.Namespace) -> None:
    from gigatrain.launching import submit

    prepared = submit.prepare(
        submit.Request(
            recipe=options.recipe,
            site=options.site,
            overrides=tuple(options.set),
            nodes=options.nodes,
            gpus=options.gpus,
            megawatts=options.megawatts,
            spares=options.spares,
            time_s=options.time,
            account=options.account,
            launcher=options.launcher,
            preflight=options.preflight,
            folder=options.run_folder,
            resume=options.resume,
            other_numbers=options.other_numbers,
            sweep=tuple(options.sweep),
            chain=options.chain,
            hosts=options.hosts,
            form=options.form,
        ),
        measure=_measured,
    )
    made, large = prepared.job, prepared.size
    for recipe in prepared.recipes if made.site.scheduler.kind != "kubernetes" else ():
        _scheduled(recipe)
    if options.dry_run and not options.json:
        print("\n".join([*submit.summary(prepared), *_unbuilt(prepared)]), file=sys.stderr)
        print(submit.preview(prepared), end="")
        return
    numbers = [] if options.dry_run else submit.launch(prepared).jobs
    if options.json:
        found = {"run": made.run, "jobs": numbers, "runs": [str(run) for run in prepared.runs], "job": made.model_dump(mode="json")}
        print(
            json.dumps(
                found | {"watts": large.watts, "assumes": large.assumes} | ({"files": prepared.files} if options.dry_run else {}), indent=2
            )
        )
        return
    if not numbers:
        from gigatrain.launching import kubernetes

        print(f"nothing was submitted: {kubernetes.unreachable()}; {made.run}/launch/job.yaml is written. To submit it:")
        print(f"  {shlex.join(kubernetes.command(made))}")
        return
    print(f"job {' then '.join(numbers)}: " + "\n".join([*submit.summary(prepared), *_unbuilt(prepared)]))
    print(f"  script   {made.run}/launch/job.sh" if "job.sh" in prepared.files else f"  files    {made.run}/launch")
    where = shlex.quote(made.run if made.sweep else str(Path(made.run).parent))
    one = shlex.quote(str(prepared.runs[0]))
    print(f"  follow   gigatrain ps {where}    gigatrain logs {one} -f    gigatrain watch {one}")
    print(f"  end      gigatrain cancel {shlex.quote(made.run)}")


def _unbuilt(prepared: Any) -> list[str]:
    """Lines on data that a job must tokenise first; pods see other folders than this machine."""
    from gigatrain.data import build

    if prepared.job.site.scheduler.kind == "kubernetes":
        return []
    found = [build.missing(recipe.data, recipe.tokenizer) for recipe in prepared.recipes[:1]]
    return [f"  data     {text}" for text in found if text]


def _ps(options: argparse.Namespace) -> None:
    from gigatrain.launching import follow

    states, notes = follow.ps(Path(options.folder))
    if options.json:
        print(json.dumps({"runs": [state.json() for state in states], "notes": notes}, indent=2))
        return
    for line in follow.lines(states) if states else [f"no runs in {options.folder}"]:
        print(line)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _logs(options: argparse.Namespace) -> None:
    from gigatrain.launching import follow

    run, hint = follow.first(Path(options.run_folder))
    if hint:
        print(f"gigatrain: {hint}", file=sys.stderr)
    path, number = follow.log(run, rank=options.rank, attempt=options.attempt)
    failure = follow.ended(run) and _failure(run, number)
    outputs = follow.outputs(run)
    if options.json:
        found = {"attempt": number, "log": path and str(path), "outputs": [str(output) for output in outputs], "failure": failure or None}
        print(json.dumps(found, indent=2))
        return
    if failure:
        print(failure, end="\n\n")
    if options.errors:
        print(
            "" if failure else f"no rank of {'any attempt' if number is None else f'attempt {number}'} has said why it failed",
            end="\n" * (not failure),
        )
        return
    if options.follow:
        for text in follow.follow(run, rank=options.rank):
            print(text, end="", flush=True)
        return
    for output in outputs[-1:]:
        print(f"==> {output}\n{follow.tail(output)}")
    print(f"==> {path}\n{follow.tail(path)}" if path else "no rank has printed anything yet", end="" if path else "\n")


def _failure(run: Path, number: int | None) -> str | None:
    from gigatrain.observe import logs

    return logs.first_failure(run, number)


def _cancel(options: argparse.Namespace) -> None:
    from gigatrain.launching import follow

    _told(options, follow.cancel(Path(options.run_folder).absolute(), now=options.now))


def _requeue(options: argparse.Namespace) -> None:
    from gigatrain.launching import follow

    _told(options, follow.requeue(Path(options.run_folder).absolute()))


def _told(options: argparse.Namespace, done: dict[str, Any]) -> None:
    print(json.dumps(done, indent=2) if options.json else f"job {' '.join(done['jobs'])}: {done['how']}    gigatrain ps {done['run']}")


def _job_begin(options: argparse.Namespace) -> None:
    from gigatrain.launching import restart

    print(restart.begin(Path(options.run_folder), dict(os.environ)))


def _job_after(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.launching import restart
    from gigatrain.observe import logs

    verdict = restart.after(
        Path(options.run_folder),
        options.code,
        signal=None if options.signal == "none" else options.signal,
        held=load.names(options.held),
        chosen=load.names(options.chosen),
        excluded=Path(options.excluded) if options.excluded else None,
        down=None if options.down is None else load.names(options.down),
        cut_short=options.cut_short,
    )
    for text in verdict.screen(options.run_folder):
        print(text, file=sys.stderr)
    if verdict.word in ("again", "stop") and (why := logs.first_failure(Path(options.run_folder), logs.attempt())):
        print(why, file=sys.stderr)
    bad = restart.excluded_nodes(Path(options.excluded)) if options.excluded else []
    print(verdict.word, verdict.pause_s if verdict.word == "again" else verdict.code, ",".join(bad))


def _duration(text: str) -> int:
    from gigatrain.launching.slurm import seconds

    found = seconds(text)
    if text.count(":") != 2 or not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not HH:MM:SS or D-HH:MM:SS")
    return found


def _site(name: str | None) -> tuple[Any, str]:
    from gigatrain import load

    return (load.site(name), "--site") if name else load.local_site()


def _recipes(options: argparse.Namespace) -> None:
    from gigatrain import shelf

    found = shelf.rows()
    print(json.dumps(found, indent=2) if options.json else "\n".join(shelf.table(found)))


def _recipes_search(options: argparse.Namespace) -> None:
    from gigatrain import shelf

    found = shelf.searched(options.words)
    print(json.dumps(found, indent=2) if options.json else "\n".join(shelf.lines(found)))


def _recipes_copy(options: argparse.Namespace) -> None:
    from gigatrain import shelf

    print(shelf.copied(options.name, Path(options.path) if options.path else None))


def _recipes_from_hub(options: argparse.Namespace) -> None:
    from gigatrain import shelf

    path, numbers = shelf.from_hub(options.source, options.task, Path(options.out) if options.out else None, measure=_measured)
    print(f"{path}: {shelf.kind(numbers)}, {numbers.parameters():,} parameters")


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


def _data_build(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.data import build
    from gigatrain.data.held import build_sets
    from gigatrain.observe.display import Display

    recipe = load.recipe(options.recipe, options.set)
    if options.site:
        from gigatrain.launching import submit

        recipe = submit.cached(recipe, submit.resolved(load.site(options.site), runs=False, account=options.account))
    if options.json:
        corpus = build.build(recipe.data, recipe.tokenizer)
        build_sets(corpus, recipe.data, recipe.validation.sets)
        print(json.dumps(corpus.manifest, indent=2))
        return
    with Display() as display:
        corpus = build.build(recipe.data, recipe.tokenizer, progress=display.advance)
        further = build_sets(corpus, recipe.data, recipe.validation.sets, progress=display.advance)
        for line in [*corpus.describe(), *(f"validation set {name}: {line}" for name, own in further.items() for line in own.describe())]:
            display.line(line)


def _data_show(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.data import build, shown
    from gigatrain.observe.display import Display

    recipe = load.recipe(options.recipe, options.set)
    with Display() as display:
        corpus = build.build(recipe.data, recipe.tokenizer, progress=display.advance)
    colour = sys.stdout.isatty()
    print("\n".join(shown.lines(corpus, options.count, sequence=recipe.train.sequence, packing=recipe.data.packing, colour=colour)))


def _data_teach(options: argparse.Namespace) -> None:
    from gigatrain.teaching import taught

    for line in taught(options.recipe, options.set, options.teacher):
        print(line)


def _export(options: argparse.Namespace) -> None:
    from gigatrain.export import export
    from gigatrain.observe.display import Display

    if options.folder is not None:
        step = export(
            Path(options.run_folder),
            Path(options.folder),
            shard_bytes=options.shard_size,
            processes=options.processes,
            adapter=options.adapter,
            display=Display(),
        )
        print(f"step {step} of {options.run_folder} exported to {options.folder}")
    elif not options.check:
        raise RunError("name the folder that the model goes to; or --check looks at one that is exported already")
    if options.check:
        from gigatrain.exporting import readers

        folder = Path(options.folder or options.run_folder)
        found = readers.check(folder)
        print("\n".join(one.line() for one in found))
        if wrong := sum(one.health == "bad" for one in found):
            raise RunError(f"{folder}: {wrong} of {len(found)} findings are bad; export it again, to another folder")


def _import(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.importing.convert import convert

    if options.set and options.recipe is None:
        raise RunError("--set changes a key of a recipe; name one with --recipe")
    recipe = load.recipe(options.recipe, options.set) if options.recipe is not None else None
    made = convert(
        Path(options.source),
        Path(options.folder),
        recipe=recipe,
        config=Path(options.config) if options.config else None,
        dtype=options.dtype,
        shard_bytes=options.shard_size,
    )
    print("\n".join([*made.lines(), f"{options.source} imported to {options.folder}; a recipe starts from it by model.from"]))


def _generate(options: argparse.Namespace) -> None:
    from gigatrain.generate import conversation, generate

    if options.messages and options.prompt is not None:
        raise RunError("--messages is the whole conversation; put the --prompt into it as its last turn")
    if options.messages is None and options.prompt is None:
        raise RunError("nothing to go on from: give a --prompt, or --messages FILE for a conversation")
    messages = [{"role": "user", "content": options.prompt}] if options.chat and not options.messages else None
    if options.messages:
        messages = conversation(sys.stdin.read() if options.messages == "-" else Path(options.messages).read_text(encoding="utf-8"))
    stream = sys.stdout.isatty() and not options.json
    text = generate(
        Path(options.folder),
        options.prompt,
        tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        messages=messages,
        stream=stream,
    )
    asked = {"prompt": options.prompt} if messages is None else {"messages": messages}
    if not stream:
        print(json.dumps(asked | {"text": text}) if options.json else text)


def _eval(options: argparse.Namespace) -> None:
    from gigatrain import evaluate
    from gigatrain.observe.display import Display

    found = evaluate.evaluate(
        Path(options.folder).expanduser(),
        tasks=[name for name in (options.tasks or "").split(",") if name],
        texts=[Path(path).expanduser() for path in options.bits_per_byte],
        limit=options.limit,
        few_shot=options.few_shot,
        batch=options.batch,
        context=options.context,
        include=[Path(path).expanduser() for path in options.include],
        chat=options.chat,
        seed=options.seed,
        out=Path(options.out).expanduser() if options.out else None,
        display=None if options.json else Display(),
    )
    print(json.dumps(found, indent=2, sort_keys=True) if options.json else "\n".join(evaluate.lines(found)))


def _bench_kernels(options: argparse.Namespace) -> None:
    from gigatrain.bench import kernels

    kernels.run(
        options.op,
        peers=options.peers,
        check=options.check,
        tune=options.tune,
        compiled=options.compile,
        path=options.csv,
        plots=options.plots,
        out=options.out,
        quick=options.quick,
        fresh=options.fresh,
        as_json=options.json,
    )


def _bench_power(options: argparse.Namespace) -> None:
    from gigatrain.bench import power

    power.run(
        options.recipe,
        site=options.site,
        sets=options.set,
        megawatts=options.megawatts,
        words=options.sweep,
        allow_caps=options.allow_power_caps,
        steps=options.steps,
        seconds=options.seconds,
        rounds=options.rounds,
        path=options.csv,
        plots=options.plots,
        quick=options.quick,
        as_json=options.json,
        measure=_measured,
    )


def _bench_faults(options: argparse.Namespace) -> None:
    from gigatrain.bench import faults

    if options.goodput:
        faults.goodput(
            minutes=options.minutes,
            mtbf_s=options.mtbf,
            seed=options.seed,
            engines=options.engines,
            work=options.work,
            as_json=options.json,
        )
        return
    faults.run(
        hours=options.hours,
        seed=options.seed,
        only=options.only,
        engines=options.engines,
        kills=options.kills,
        one=options.row,
        path=options.csv,
        page=options.markdown,
        work=options.work,
        as_json=options.json,
    )


def _doctor(options: argparse.Namespace) -> None:
    from gigatrain.errors import HealthError
    from gigatrain.preflight import show

    if options.judge:
        from gigatrain import load
        from gigatrain.preflight.judge import judge

        judgement = judge(
            Path(options.judge),
            options.nodes,
            load.names(options.expect or ""),
            Path(options.excluded) if options.excluded else None,
            options.run_folder or "",
            () if options.down is None else load.names(options.down),
        )
        show.judgement(judgement)
        if judgement.short:
            raise HealthError(judgement.short)
        print(",".join(judgement.chosen))
        return
    from gigatrain.preflight.examine import examine

    out, run = (Path(text).expanduser() if text else None for text in (options.out, options.run_folder))
    verdict = examine(_site(options.site)[0], out, run, options.quick, options.free_gib, options.limit_s)
    if options.json:
        print(json.dumps(verdict.json(), indent=2), flush=True)
    else:
        show.line(verdict) if out else show.verdict(verdict)
    sys.stdout.flush()
    # In a job the verdict is in its file, and who judges it is not this task. Threads that hang in a driver would hold a plain exit.
    code = HealthError.exit_code if verdict.health == "bad" and out is None else 0
    if verdict.facts.get("hung"):
        os._exit(code)
    if code:
        sys.exit(code)


def _schema(options: argparse.Namespace) -> None:
    from gigatrain import load

    print(json.dumps(load.schema(options.of), indent=2))


def _version(options: argparse.Namespace) -> None:
    from importlib import metadata

    found: dict[str, str | None] = {"gigatrain": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "triton", "transformers", "accelerate", "deepspeed"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, version in found.items():
        print(f"{name:14} {version or 'not installed'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gigatrain",
        description="Train large language models: from a laptop to a GigaFactory, with the same recipe.",
        epilog="First: gigatrain train quickstart    Then: gigatrain COMMAND --help, each shows what it does by example.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], help: str, text: str, into: Any = commands
    ) -> argparse.ArgumentParser:
        made = into.add_parser(name, help=help, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        made.set_defaults(run=run)
        return made

    def recipe_arguments(made: argparse.ArgumentParser) -> None:
        made.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one (`gigatrain recipes`)")
        made.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the recipe; may be repeated")

    train = command("train", _train, "train a recipe", _TRAIN)
    recipe_arguments(train)
    train.add_argument("--run", metavar="DIR", dest="run_folder", help="the run folder (default: runs/NAME-DATE-TIME)")
    train.add_argument("--site", metavar="SITE", help="where it runs (default: this machine; `gigatrain sites`)")
    how = train.add_mutually_exclusive_group()
    how.add_argument("--new", action="store_true", help="start at step 0; what DIR holds is moved to DIR.1")
    how.add_argument("--resume", action="store_true", help="go on from DIR's newest whole checkpoint; an error if there is none")
    train.add_argument("--other-numbers", action="store_true", help=_OTHER_NUMBERS)
    how.add_argument("--continue", action="store_true", dest="go_on", help="go on if DIR has a checkpoint, else begin: what a job says")

    launched = command("launch", _launch, "train as a job of a site", _LAUNCH)
    recipe_arguments(launched)
    launched.add_argument(
        "--site", metavar="SITE", required=True, help="where: a site file, or the name of a shipped one (`gigatrain sites`)"
    )
    launched.add_argument("--nodes", metavar="N", type=_ranks, help="nodes that train")
    launched.add_argument("--gpus", metavar="G", type=_ranks, help="or ranks that train")
    launched.add_argument(
        "--megawatts",
        metavar="M",
        type=float,
        help="or what the run may draw at the facility, cooling included: as many nodes as that feeds, and the run keeps to it (power.megawatts)",
    )
    launched.add_argument(
        "--spares", metavar="K", type=_count, default=0, help="nodes beside them, that take the place of bad ones (default: 0)"
    )
    launched.add_argument(
        "--time", metavar="HH:MM:SS", type=_duration, help="limit of one job; the run goes on in the next (default: the site's longest)"
    )
    launched.add_argument("--account", metavar="A", help="what is billed (default: the site's, else SBATCH_ACCOUNT)")
    launched.add_argument(
        "--launcher",
        choices=("torchrun", "srun"),
        default="torchrun",
        help="who starts the ranks: torchrun, one a node (default), or srun itself",
    )
    launched.add_argument("--no-preflight", dest="preflight", action="store_false", help="do not examine the nodes before each attempt")
    launched.add_argument("--run", metavar="DIR", dest="run_folder", help="the run folder (default: the site's paths.runs/NAME-DATE-TIME)")
    launched.add_argument("--resume", action="store_true", help="go on with the run in DIR in a new job")
    launched.add_argument("--other-numbers", action="store_true", help=_OTHER_NUMBERS)
    launched.add_argument(
        "--sweep", metavar="KEY=V1,V2", action="append", default=[], help="a run for each value, as one array; several: each with each"
    )
    launched.add_argument(
        "--chain", metavar="K", type=_ranks, default=1, help="K jobs, each after the one before, where none may requeue itself"
    )
    launched.add_argument(
        "--hosts", metavar="FILE", help="without a scheduler: hosts that ssh reaches, one a line; the first is where ranks meet"
    )
    launched.add_argument(
        "--as",
        dest="form",
        choices=("jobset", "trainjob"),
        help="as a manifest of Kubernetes (default there: jobset), whatever the site's scheduler",
    )
    launched.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    launched.add_argument("--json", action="store_true", help="what was submitted, as JSON")

    shown = command("ps", _ps, "every run, and what its job does", _PS)
    shown.add_argument(
        "folder", metavar="DIR", nargs="?", default="runs", help="the folder of the run folders, or one of them (default: runs)"
    )
    shown.add_argument("--json", action="store_true", help="as JSON, for programs")

    logged = command("logs", _logs, "what the ranks of a run print", _LOGS)
    logged.add_argument("run_folder", metavar="RUN", help="the run folder")
    logged.add_argument("-f", "--follow", action="store_true", help="go on as they print, over attempts, until the job is gone")
    logged.add_argument("--rank", metavar="R", type=_count, default=0, help="another rank than 0")
    logged.add_argument("--attempt", metavar="A", type=_count, help="another attempt than the last")
    logged.add_argument("--errors", action="store_true", help="only why it failed, by the rank that failed first")
    logged.add_argument("--json", action="store_true", help="where the logs are and why it failed, as JSON")

    cancelled = command("cancel", _cancel, "end the job of a run, saved", _CANCEL)
    cancelled.add_argument("run_folder", metavar="RUN", help="the run folder")
    cancelled.add_argument("--now", action="store_true", help="do not save first: steps since the last checkpoint are lost")
    cancelled.add_argument("--json", action="store_true", help="what was done, as JSON")

    again = command("requeue", _requeue, "start the job of a run again", _REQUEUE)
    again.add_argument("run_folder", metavar="RUN", help="the run folder")
    again.add_argument("--json", action="store_true", help="what was done, as JSON")

    in_job = commands.add_parser(
        "job", help="what a job's script asks", description="What a job's script asks; not meant for people."
    ).add_subparsers(metavar="COMMAND", required=True)
    begun = command("begin", _job_begin, "before an attempt", _JOB, in_job)
    begun.add_argument("run_folder", metavar="RUN", help="the run folder")
    ended = command("after", _job_after, "after an attempt", _JOB, in_job)
    ended.add_argument("run_folder", metavar="RUN", help="the run folder")
    ended.add_argument("--code", type=int, required=True, help="what the ranks ended with")
    ended.add_argument("--signal", default="none", help="what the script was told: USR1, TERM or none")
    ended.add_argument("--held", default="", help="nodes of the allocation, by commas, or @FILE")
    ended.add_argument("--chosen", default="", help="those that trained, or @FILE")
    ended.add_argument("--excluded", help="the site's list of bad nodes")
    ended.add_argument("--down", help="nodes that the scheduler calls down, or @FILE: silence of others counts only twice in a row")
    ended.add_argument("--cut-short", action="store_true", help="not every node had the time to answer, so nobody's silence counts")

    planned = command("plan", _plan, "what a run will do, take and cost; starts nothing", _PLAN)
    planned.add_argument("recipe", metavar="RECIPE", nargs="?", help="a recipe file, or the name of a shipped one (`gigatrain recipes`)")
    planned.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the recipe; may be repeated")
    planned.add_argument("--site", metavar="SITE", help="where it would run (default: this machine)")
    planned.add_argument(
        "--gpus", metavar="N", type=_ranks, help="ranks that it would run on (default: train.nproc, else what the mesh needs)"
    )
    planned.add_argument(
        "--nodes", metavar="N", type=_ranks, help="nodes of the site; with --gpus for a site that does not say what one holds"
    )
    planned.add_argument(
        "--megawatts",
        metavar="M",
        type=_megawatts,
        help="as many nodes as M MW of the facility feed, cooling included, and a run that keeps to them; without --site: which accelerators, at which limit",
    )
    planned.add_argument("--pue", metavar="P", type=_pue, help="of --megawatts without a site: facility over IT (default: 1.2)")
    planned.add_argument("--top", metavar="K", type=_shown, help="search every layout, show the K best that differ, and plan the first")
    planned.add_argument(
        "--explain", action="store_true", help="the arithmetic: phases, bytes, watts, losses, and what was assumed; of a site alone, its MW"
    )
    planned.add_argument("--report", metavar="FILE", help="one HTML page: where time, bytes, watts and money go, layouts, scaling, what-if")
    planned.add_argument("--pilots", metavar="DIR", help="write job scripts of short runs that decide among the best layouts")
    planned.add_argument("--decide", metavar="DIR", help="which of the pilots in DIR was fastest, once they have run")
    planned.add_argument("--strict", action="store_true", help="refuse what is outside of what was calibrated")
    planned.add_argument(
        "--calibrate", metavar="RUN", nargs="+", help="refit compute, communication and launches to run folders, into -o FILE"
    )
    planned.add_argument("--calibration", metavar="FILE", help="plan with what --calibrate wrote")
    planned.add_argument("--predict", metavar="FILE", help="answer rows of measurements (JSON lines, PLANNER.md), into -o FILE")
    planned.add_argument(
        "-o", "--out", metavar="FILE", default=None, help="of --predict (predicted.jsonl) and --calibrate (calibration.json)"
    )
    planned.add_argument(
        "--dry-run", action="store_true", help="build every kind of rank and step it on fake tensors: boxes, bytes, collectives"
    )
    planned.add_argument("--json", action="store_true", help="the whole plan as JSON")

    recipes = command("recipes", _recipes, "list, search and copy the shipped recipes", _RECIPES)
    recipes.add_argument("--json", action="store_true", help="as JSON, for programs")
    of_recipes = recipes.add_subparsers(metavar="COMMAND")
    command("list", _recipes, "a line for each model", _RECIPES, of_recipes).add_argument("--json", action="store_true", help="as JSON")
    search = command("search", _recipes_search, "those that have every word", _RECIPES, of_recipes)
    search.add_argument("words", metavar="WORD", nargs="+", help="of a name, a task, a maker, a country, a licence or a family")
    search.add_argument("--json", action="store_true", help="as JSON")
    copy = command("copy", _recipes_copy, "start a recipe of your own", _RECIPES, of_recipes)
    copy.add_argument("name", metavar="NAME", help="a shipped recipe, or with -tiny its twin")
    copy.add_argument("path", metavar="PATH", nargs="?", help="the file to write (default: NAME.toml here)")
    from_hub = command("from-hub", _recipes_from_hub, "write one for any config.json", _RECIPES, of_recipes)
    from_hub.add_argument("source", metavar="PATH", help="a folder with config.json, or a hub name")
    from_hub.add_argument("--task", choices=("pretrain", "continue", "sft", "lora", "dpo"), default="sft", help="default: sft")
    from_hub.add_argument("-o", "--out", metavar="FILE", help="the file to write (default: MODEL-TASK.toml here)")

    sites = command("sites", _sites, "the machines: what is known of them, and how surely", _SITES)
    sites.add_argument("name", nargs="?", metavar="NAME", help="a site or its file: all of it; else a word that those listed have")
    sites.add_argument("--json", action="store_true", help="as JSON, for programs")

    data = commands.add_parser("data", help="prepare data", description="Prepare data ahead of a run.")
    prepare = data.add_subparsers(metavar="COMMAND", required=True)
    teach = command("teach", _data_teach, "keep what a teacher says of a recipe's samples beside its data", _TEACH, prepare)
    recipe_arguments(teach)
    teach.add_argument("--teacher", metavar="DIR", help="the teacher's folder (default: objective.teacher)")
    build = command("build", _data_build, "tokenise a recipe's data ahead", _DATA, prepare)
    recipe_arguments(build)
    build.add_argument("--site", metavar="SITE", help="where `gigatrain launch` with this --site will look: in the site's paths.cache")
    build.add_argument("--account", metavar="A", help="with --site: stands for $SBATCH_ACCOUNT in its paths")
    build.add_argument("--json", action="store_true", help="the manifest as JSON")

    showed = command("show", _data_show, "documents as the run sees them, what is trained of them marked", _DATA_SHOW, prepare)
    recipe_arguments(showed)
    showed.add_argument("-n", "--count", type=int, default=2, metavar="N", help="documents of each source (default: 2)")

    watched = command("watch", _watch, "follow a run: loss, speed, goodput, errors", _WATCH)
    watched.add_argument("run_folder", metavar="RUN", help="a run folder")
    way = watched.add_mutually_exclusive_group()
    way.add_argument("--once", action="store_true", help="show it once and leave")
    way.add_argument("--json", action="store_true", help="what is known now, as JSON")
    way.add_argument("--serve", metavar="[HOST:]PORT", help="serve it to Prometheus instead (default host: 127.0.0.1)")
    watched.add_argument("--token-file", metavar="FILE", help="with --serve: holds the bearer token (else GIGATRAIN_TOKEN, else a new one)")

    reported = command("report", _report, "one page on a run, or on several side by side", _REPORT)
    reported.add_argument(
        "run_folders", metavar="RUN", nargs="+", help="a run folder; of several the first is what others are compared with"
    )
    reported.add_argument(
        "-o", "--out", metavar="FILE", help="the page; - prints it (default: report.html, unless --json or --plots is given)"
    )
    reported.add_argument("--json", action="store_true", help="what the page is made of, as JSON, for programs")
    reported.add_argument("--plots", metavar="DIR", help="its pictures as PNG files; needs matplotlib")

    exported = command("export", _export, "write a run's model for transformers", _EXPORT)
    exported.add_argument("run_folder", metavar="RUN", help="a run folder; with --check alone an exported one")
    exported.add_argument("folder", metavar="DIR", nargs="?", help="where the model goes")
    exported.add_argument(
        "--check", action="store_true", help="say who can read it: transformers, vLLM, llama.cpp; without DIR: of an export"
    )
    exported.add_argument(
        "--max-shard-size", dest="shard_size", metavar="BYTES", type=_bytes, default=5e9, help="of one file, as 5GB or 500MB (default: 5GB)"
    )
    exported.add_argument("--processes", metavar="N", type=_processes, default=1, help="that write files side by side (default: 1)")
    whole = exported.add_mutually_exclusive_group()
    whole.add_argument("--adapter", action="store_true", help="the run's adapter alone, as peft loads it")
    whole.add_argument("--merge", action="store_true", help="the adapter merged into its base (the default)")

    imported = command("import", _import, "take up a checkpoint of DeepSpeed, torch DCP or torch.save", _IMPORT)
    imported.add_argument("source", metavar="SOURCE", help="its folder or file")
    imported.add_argument("folder", metavar="DIR", help="where the model goes")
    numbers = imported.add_mutually_exclusive_group()
    numbers.add_argument("--recipe", metavar="RECIPE", help="whose model's numbers these are")
    numbers.add_argument("--config", metavar="FILE", help="or the model's config.json (default: the one beside SOURCE)")
    imported.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the recipe; may be repeated")
    imported.add_argument("--dtype", choices=("bf16", "fp32"), help="round to it (default: as they are stored)")
    imported.add_argument(
        "--max-shard-size", dest="shard_size", metavar="BYTES", type=_bytes, default=5e9, help="of one file, as 5GB or 500MB (default: 5GB)"
    )

    generated = command("generate", _generate, "continue a text with a trained model", _GENERATE)
    generated.add_argument("folder", metavar="RUN|DIR", help="a run folder or an exported model")
    generated.add_argument("--prompt", help="the text to continue; with --chat what the user says")
    generated.add_argument("--chat", action="store_true", help="answer in the model's chat template")
    generated.add_argument(
        "--messages", metavar="FILE", help="or answer a conversation: JSON of roles and contents; - reads it from standard input"
    )
    generated.add_argument("--tokens", type=_count, default=100, help="at most so many new tokens (default: 100)")
    generated.add_argument("--temperature", type=_temperature, help="0 takes the likeliest token each time (default: the model's own)")
    generated.add_argument("--top-k", type=_count, help="draw among so many likeliest tokens; 0: all (default: the model's own)")
    generated.add_argument("--seed", type=_count, default=0, help="of the drawing (default: 0)")
    generated.add_argument("--json", action="store_true", help="prompt and text as JSON")

    evaluated = command("eval", _eval, "evaluate a trained model: tasks, and bits per byte of texts", _EVAL)
    evaluated.add_argument("folder", metavar="RUN|DIR", help="a run folder (its newest checkpoint) or a model for transformers")
    evaluated.add_argument("--tasks", metavar="A,B", help="tasks and groups of lm-evaluation-harness (pip install 'gigatrain[eval]')")
    evaluated.add_argument("--limit", metavar="N", type=_positive_count, help="only the first N documents of each task")
    evaluated.add_argument("--few-shot", metavar="K", type=_count, help="examples before each question (default: the task's own)")
    evaluated.add_argument(
        "--batch", metavar="B", type=_positive_count, default=1, help="sequences that are computed together (default: 1)"
    )
    evaluated.add_argument("--include", metavar="DIR", action="append", default=[], help="a folder with tasks of your own; may be repeated")
    evaluated.add_argument("--chat", action="store_true", help="ask in the model's chat template")
    evaluated.add_argument(
        "--bits-per-byte", metavar="FILE", nargs="+", default=[], help="texts (or .jsonl with `text`) to compare models of any tokenizer on"
    )
    evaluated.add_argument(
        "--context", metavar="N", type=_positive_count, help="of --bits-per-byte: tokens of a window (default: the model's)"
    )
    evaluated.add_argument("--seed", type=_count, default=0, help="of few-shot examples and sampling (default: 0)")
    evaluated.add_argument("-o", "--out", metavar="FILE", help="write the results there too, as JSON")
    evaluated.add_argument("--json", action="store_true", help="the results as JSON")

    bench = commands.add_parser("bench", help="measure", description="Measure what a run is made of, beside its peers.")
    measured = bench.add_subparsers(metavar="COMMAND", required=True)
    kernels = command("kernels", _bench_kernels, "every kernel beside its peers", _KERNELS, measured)
    kernels.add_argument("--op", action="append", default=[], help="only this operation; may be repeated (default: all)")
    kernels.add_argument("--peers", metavar="A,B", help="only these beside ours (default: all that are installed)")
    act = kernels.add_mutually_exclusive_group()
    act.add_argument("--check", action="store_true", help="errors over every case, no timings")
    act.add_argument("--tune", action="store_true", help="find the fastest configurations on this GPU and write its table")
    act.add_argument(
        "--compile", action="store_true", help="compile every kernel for GPUs that are not here: registers, spills, shared memory"
    )
    act.add_argument("--plots", metavar="DIR", help="a PNG per operation from the CSV; measures nothing and needs no GPU")
    kernels.add_argument(
        "--csv", metavar="PATH", help="rows are added here (default: benchmarks/results/kernels.csv in a checkout, else ./kernels.csv)"
    )
    kernels.add_argument("--out", metavar="PATH", help="with --tune: the table (default: that of this GPU in gigatrain/kernels/tables)")
    kernels.add_argument("--quick", action="store_true", help="the first size of each operation, fewer rounds, nothing that compiles")
    kernels.add_argument("--fresh", action="store_true", help="measure again what the CSV has from this commit, device and versions")
    kernels.add_argument("--json", action="store_true", help="the rows as JSON, for programs")

    joules = command("power", _bench_power, "what a joule buys: tokens/s/MW of a recipe's variants", _POWER, measured)
    recipe_arguments(joules)
    joules.add_argument("--site", metavar="SITE", help="where it runs (default: this machine; `gigatrain sites`)")
    joules.add_argument("--megawatts", metavar="M", type=_positive, help="find the fastest site under M MW (default: the site's limit)")
    joules.add_argument(
        "--sweep", metavar="A,B", help="of microbatch, precision, kernels, mesh, cap; A+B together (default: all but cap, one by one)"
    )
    joules.add_argument(
        "--allow-power-caps", action="store_true", help="limits of accelerators may be set; they are put back, whatever dies"
    )
    long = joules.add_mutually_exclusive_group()
    long.add_argument("--steps", metavar="N", type=_ranks, help="of every run (default: as many as its steady window needs)")
    long.add_argument(
        "--seconds", metavar="S", type=_positive, help="of the steady window (default: 10, or 100 updates of the slowest meter)"
    )
    joules.add_argument("--rounds", metavar="R", type=_ranks, help="every variant trains once in each (default: 3; with --quick 1)")
    joules.add_argument(
        "--csv", metavar="PATH", help="rows are added here (default: benchmarks/results/power-variants.csv in a checkout, else here)"
    )
    joules.add_argument("--plots", metavar="DIR", help="write DIR/power.png")
    joules.add_argument(
        "--quick",
        action="store_true",
        help="one round and a shorter settling: a look, without a spread of joules, or a word on whether losses are the baseline's",
    )
    joules.add_argument("--json", action="store_true", help="the rows as JSON, for programs")

    faults = command("faults", _bench_faults, "faults done to real runs, and which promises were kept", _FAULTS, measured)
    faults.add_argument(
        "--hours", metavar="H", type=_positive, help="go on drawing rows for so long (default: each fault once on each engine)"
    )
    faults.add_argument("--seed", metavar="N", type=_count, help="of all that is drawn (default: a new one, which is printed)")
    faults.add_argument("--only", metavar="A,B", help="only these faults")
    faults.add_argument(
        "--engines", metavar="A,B", help="on these (default: native-1,native-2,zero2-2; also native-4, ddp-2, zero1-2, zero3-2)"
    )
    faults.add_argument(
        "--kills", metavar="K", type=_ranks, default=1, help="kills of a kill, segv or abort row, one after the other (default: 1)"
    )
    faults.add_argument("--row", metavar="SEED", type=_count, help="one row again, of the --only fault on the --engines engine")
    faults.add_argument(
        "--goodput", action="store_true", help="instead: kill a rank at exponential times, and hold goodput against the simulator"
    )
    faults.add_argument(
        "--mtbf", metavar="S", type=_positive, default=30.0, help="of --goodput: seconds between two kills on average (default: 30)"
    )
    faults.add_argument("--minutes", metavar="M", type=_positive, default=30.0, help="of --goodput: how long (default: 30)")
    faults.add_argument("--csv", metavar="PATH", help="a line for each injection is added here")
    faults.add_argument("--markdown", metavar="PATH", help="write the table for a page")
    faults.add_argument(
        "--work", metavar="DIR", help="where the runs are (default: a temporary folder, which stays if a row broke its promise)"
    )
    faults.add_argument("--json", action="store_true", help="the rows as JSON")

    doctor = command("doctor", _doctor, "say whether this machine, or a job's, can train", _DOCTOR)
    doctor.add_argument("--site", metavar="SITE", help="what the machine should be (default: this machine as it is)")
    doctor.add_argument(
        "--run", metavar="DIR", dest="run_folder", help="where runs are written (default: DIR of --out, else the site's paths.runs)"
    )
    doctor.add_argument("--out", metavar="DIR", help="write the verdict to DIR/NODE.json, and leave with 0 whatever it is")
    doctor.add_argument("--quick", action="store_true", help="work the hardware for half a second, not three")
    doctor.add_argument("--free-gib", metavar="GIB", type=_gib, help="room that a run needs (default: 4; 1 on node-local scratch)")
    doctor.add_argument("--limit-s", metavar="S", type=_ranks, default=54, help="seconds for everything (default: 54)")
    doctor.add_argument("--json", action="store_true", help="the verdict as JSON")
    doctor.add_argument("--judge", metavar="DIR", help="judge the verdicts of DIR; prints the nodes that train, as one comma list")
    doctor.add_argument("--nodes", metavar="N", type=_ranks, default=1, help="with --judge: nodes that train (default: 1)")
    doctor.add_argument("--expect", metavar="A,B", help="with --judge: nodes that should have a verdict, in order; @FILE: those of a file")
    doctor.add_argument(
        "--down", metavar="A,B", help="with --judge: nodes that the scheduler calls down; else silence puts none on the list"
    )
    doctor.add_argument("--excluded", metavar="FILE", help="with --judge: bad nodes are appended here, a JSON object a line")

    schema = command("schema", _schema, "print the JSON Schema of recipes", _SCHEMA)
    schema.add_argument("of", nargs="?", choices=("recipe", "site"), default="recipe", help="of what (default: recipe)")

    version = command("version", _version, "show versions", "Versions of gigatrain and of what it stands on.")
    version.add_argument("--json", action="store_true", help="as JSON")
    return parser


_TRAIN = """\
Train a recipe: tokenise its data (kept for the next run), train, validate, save, export.

  gigatrain train quickstart                                  three minutes on two CPU cores
  gigatrain train quickstart --set train.steps=40             any key of the recipe can be set
  gigatrain train my.toml --run runs/mine                     a recipe of your own
  gigatrain train my.toml --run runs/mine --resume            go on after a kill, a signal or a time limit
  gigatrain train my.toml --run runs/mine --resume --other-numbers --set optim.moments=bf16

SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint at the end of the step and leave.
The run folder holds plan.json, metrics.jsonl, summary.json, checkpoints/, export/ and tensorboard/."""
_LAUNCH = """\
From a recipe and a site to a job in its queue: planned, checked, submitted; it saves before its time limit, requeues itself and replaces bad nodes.

  gigatrain launch my.toml --site jupiter --nodes 16 --time 06:00:00
  gigatrain launch my.toml --site jupiter --nodes 16 --spares 2 --dry-run      print the script, submit nothing
  gigatrain launch my.toml --site jupiter --megawatts 0.5                       as many nodes as that feeds, and the run keeps to it
  gigatrain launch my.toml --site leonardo --nodes 4 --run $WORK/mine --resume  go on in a new job
  gigatrain launch my.toml --site lumi --nodes 1 --sweep optim.lr=1e-3,2e-3,4e-3
  gigatrain launch quickstart --site laptop                                    in the background of this machine
  gigatrain launch my.toml --site my-site.toml --hosts hosts.txt               on each host through ssh, without a scheduler
  gigatrain launch my.toml --site my-cluster.toml --nodes 4 --as trainjob      a Kubeflow TrainJob in RUN/launch/job.yaml

RUN/launch holds what was submitted: job.sh, recipe and site as they were, and history.jsonl with every attempt and why it ended."""
_PS = """\
Every run of a folder: what its job does (queued, running, saving, requeued), or how it ended and why; the newest news first.
Asked are the run folders, and Slurm (squeue, sacct), kubectl or this machine's processes, whoever runs them.

  gigatrain ps                        all of runs/
  gigatrain ps $SCRATCH/runs
  gigatrain ps runs/my-sweep          the runs of one sweep
  gigatrain ps --json | jq '.runs[] | select(.state == "failed")'"""
_LOGS = """\
What a run's first rank printed in its last attempt; why it failed, by the rank that failed first, stands above all.

  gigatrain logs runs/mine            the end of rank 0's log, and of the job's own output
  gigatrain logs runs/mine -f         go on as it prints, until the job is gone
  gigatrain logs runs/mine --rank 7 --attempt 2
  gigatrain logs runs/mine --errors   only the reason"""
_CANCEL = """\
End the job of a run: it saves a checkpoint and leaves, and is not queued again. A job that still waits is taken out of the queue.

  gigatrain cancel runs/mine
  gigatrain cancel runs/mine --now    at once, without saving
  gigatrain cancel runs/my-sweep      every run of a sweep
  gigatrain requeue runs/mine         goes on where it was"""
_REQUEUE = """\
Start the job of a run again, from its newest checkpoint: one that runs saves and goes back into its queue, one that is gone is submitted anew.

  gigatrain requeue runs/mine
  gigatrain ps runs/mine"""
_JOB = """\
job.sh asks `begin` whether anything is left to do (go ATTEMPT PORT FOLDER | done | stop CODE), and `after` what comes next:
done, again, requeue, leave or stop; the exit code, or for again the seconds to wait first; and the nodes to exclude.
The reasons are in RUN/launch/history.jsonl.

  gigatrain job begin runs/mine
  gigatrain job after runs/mine --code 1 --held n1,n2"""
_PLAN = """\
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
  gigatrain plan my.toml --json | jq .expected"""
_RECIPES = """\
The shipped recipes: of each open model pretrain, continue, sft, lora and dpo, and a -tiny twin of each that runs on a laptop.

  gigatrain recipes                                           a line for each model
  gigatrain recipes search french sft                         those that have every word: a country, a maker, a licence, a family, a task
  gigatrain recipes copy lucie-7b/sft my.toml                 a recipe of your own, with its comments
  gigatrain recipes copy lucie-7b/sft-tiny                    its twin as a file
  gigatrain recipes from-hub ~/models/mine --task lora        of any config.json, here or on the hub
  gigatrain train lucie-7b/pretrain-tiny

A model's own page is recipes/MODEL/README.md: sources, licence, and what each task takes on four sites."""
_SITES = """\
The machines that runs are planned for and launched on. Every number is measured, declared by its operator or maker, assumed with a reason, or unknown by name.

  gigatrain sites                                             one line each
  gigatrain sites gh200                                       those that have the word: a name, a country (FR), a kind, an accelerator
  gigatrain sites jupiter                                     every figure with its unit, basis and source
  gigatrain sites my-site.toml --json

A site of your own is one TOML file: copy the nearest of them (its path is shown), and give it as --site FILE."""
_TEACH = """
Compute a teacher's likeliest tokens and their log-probabilities for every training sample of a recipe, once, and keep them beside its shards, hashed. A run
with [objective] kind = "distil" reads them. A command that was ended goes on where it was.

  gigatrain data teach my.toml --teacher models/large
  gigatrain train my.toml --set objective.kind=distil --set objective.teacher=models/large
"""
_DATA = """\
Tokenise a recipe's data into Megatron .bin/.idx shards, in parallel; a build that is killed goes on where it was.
A later `gigatrain train` of the same data and tokenizer finds them.

  gigatrain data build quickstart
  gigatrain data build my.toml --set data.workers=16 --json
  gigatrain data build my.toml --site jupiter                 into the site's cache, where its jobs look"""
_DATA_SHOW = """\
Show the first documents of each source as tokens that a run is trained on: special tokens as they are, and what is trained in green (in ⟪ ⟫ where the
output is no terminal). With data.packing = "packed", also how many rows they make and how much of them is padding. Tokenises first what is not yet.

  gigatrain data show my-sft.toml
  gigatrain data show my-sft.toml -n 10 --set data.packing='"packed"' | less -R"""
_WATCH = """\
Follow a run from its folder, wherever that can be read: live in a terminal, until it is finished or Ctrl-C. The run is not touched.
Goodput is the time of steps that were kept over wall-clock since the first start; what is not known is said to be so.

  gigatrain watch runs/mine
  gigatrain watch runs/mine --once
  gigatrain watch runs/mine --json | jq .goodput
  gigatrain watch runs/mine --serve 9400                      Prometheus metrics on this machine; the token's file is printed
  gigatrain watch runs/mine --serve 10.1.2.3:9400 --token-file ~/token

launch/grafana.json is a dashboard for these metrics. A recipe's report.prometheus = 9400 serves them from the run itself."""
_REPORT = """\
One page on a run: loss, speed, goodput, restarts, step times, memory, watts and joules, cost and carbon, and the plan beside what came of it.
It is one HTML file that needs nothing else, for a browser, a telephone or paper; of several runs it begins with them side by side.
A run that goes on, was killed, or is older than its meters has a page too, that says what is missing. The run is not touched.

  gigatrain report runs/mine                                  report.html
  gigatrain report runs/mine runs/other -o both.html
  gigatrain report runs/mine --json | jq '.runs[0].headline.tokens_per_s_mw'
  gigatrain report runs/mine --plots pictures                 PNG files, for slides"""
_OTHER_NUMBERS = "with --resume: the precision or the states' forms may differ from those before; the run's record says from which step on"
_EXPORT = """\
Write the newest checkpoint of a run as a folder for transformers: safetensors, config.json, generation_config.json, tokenizer and chat template, and a
model card (README.md) made of the run's own records.

  gigatrain export runs/mine my-model
  gigatrain export runs/mine my-model --check                 and say who can read it
  gigatrain export my-model --check
  gigatrain export runs/mine my-model --max-shard-size 2GB --processes 8
  gigatrain export runs/mine my-adapter --adapter           a run with [adapter]: as peft has it; else merged
  python -c 'import transformers; transformers.AutoModelForCausalLM.from_pretrained("my-model")'"""
_IMPORT = """\
Write a foreign checkpoint's weights as a folder for transformers, from which a recipe starts by model.from.
SOURCE is a folder of torch DCP (torchtitan's names are known too), of DeepSpeed (universal or plain ZeRO), or a state dict of torch.save.
Its pickles are never run: an interpreter of ours builds tensors, containers, numbers and strings from them, and refuses the rest by name.

  gigatrain import /scratch/ds/global_step100 my-model --recipe my.toml
  gigatrain import outputs/checkpoint/step-1000 my-model --config config.json --dtype bf16
  gigatrain import pytorch_model.bin my-model                 config.json lies beside it"""
_GENERATE = """\
Continue a text with a run's model or an exported one, or answer in its chat template.

  gigatrain generate runs/mine --prompt 'def main('
  gigatrain generate my-model --prompt 'import os' --temperature 0 --tokens 40
  gigatrain generate my-model --chat --prompt 'Who are you?'
  gigatrain generate my-model --messages talk.json            [{"role": "system", "content": "…"}, {"role": "user", "content": "…"}]"""
_EVAL = """\
Evaluate the newest checkpoint of a run, or any model for transformers, on this machine's device. Results of a run are kept in RUN/evals/, and are in its
report and in the model card of the next export.

  gigatrain eval runs/mine --tasks hellaswag,arc_easy --batch 16
  gigatrain eval runs/mine --tasks hellaswag --limit 200 --few-shot 5
  gigatrain eval my-model --tasks my_task --include my-tasks     a task of your own: a YAML file beside its data
  gigatrain eval my-model --tasks ifeval --chat                  asked in the chat template
  gigatrain eval my-model --bits-per-byte book.txt held-out.jsonl -o found.json

Bits per byte compare models whose tokenizers differ, which losses per token do not. Tasks are lm-evaluation-harness's, and most of them fetch their data
from the hub once."""
_KERNELS = """\
Every fused kernel of ours beside plain torch, torch.compile and the peers that are installed (pip install 'gigatrain[bench]'): right first, then fast.
Forward, backward and both; cold inputs, graphs and host, rounds in turn; the floor at this device's own measured ceilings. Losers are shown.

  gigatrain bench kernels                                     all, in less than nine minutes on an H200; run again, it goes on where it was
  gigatrain bench kernels --op rms_norm --peers torch,liger
  gigatrain bench kernels --quick                             a few minutes on a CPU: what has no GPU to run on is named
  gigatrain bench kernels --check                             errors of every version over every case
  gigatrain bench kernels --plots pictures                    from the CSV, anywhere"""
_POWER = """\
Train a recipe's variants in alternating rounds, and say what a joule buys: tokens/s per MW at device, node, IT and facility, loss and memory beside it.
Every variant is a `gigatrain train` of its own. Losses are judged by the baseline's own spread; losers and what the plan refuses are shown.

  gigatrain bench power my.toml                               microbatch, precision, kernels, mesh, one by one; limits and clocks as found
  gigatrain bench power my.toml --megawatts 200               and the fastest site under 200 MW: more, slower GPUs or fewer, faster ones
  sudo -E gigatrain bench power my.toml --allow-power-caps --sweep cap,microbatch+cap
  gigatrain bench power my.toml --sweep kernels --plots pictures --csv power.csv
  gigatrain bench power my.toml --quick --sweep microbatch --set power.node=redfish

A window is at least 10 s and 100 updates of the slowest meter; of less there is no figure. POWER.md says what is counted."""
_FAULTS = """\
Do faults to real runs of a tiny recipe, each from a process outside: kills at every moment, hangs, full and failing disks, damaged checkpoints, wrong recipes.
A row is kept only if the run ends bitwise as one that nothing was done to (weights, optimizer, generators, metrics, samples), or refuses by name
what it must refuse. Everything comes from the seed and nothing is tried twice. RELIABILITY.md has the promises. Leaves with 9 if one was broken.

  gigatrain bench faults                                      each fault once on each engine, about half an hour on two cores
  gigatrain bench faults --hours 1 --csv faults.csv --markdown faults.md
  gigatrain bench faults --only kill --kills 5 --engines native-2,native-4,zero2-2 --hours 1
  gigatrain bench faults --only bitflip --engines native-2 --row 70012    one row again
  sudo -E gigatrain bench faults --only enospc,erofs,stall,oom            what needs mounts and control groups
  gigatrain bench faults --goodput --mtbf 30 --minutes 30     goodput under a failure every 30 s, measured and simulated

Rows that cannot be made here (no root, no DeepSpeed) are shown as such, with the reason."""
_DOCTOR = """\
Say whether this machine can train: driver, GPUs, ECC, Xids, clocks, links, equal products on all GPUs, disks, network; under a minute.
What could not be tested is named, with the reason. Leaves with 9 if the machine is bad.

  gigatrain doctor                                            this machine, on one screen
  gigatrain doctor --site jupiter --json                      against what the site says a node has
  srun --ntasks-per-node=1 gigatrain doctor --site S --out D  on every node of a job, and the network between them
  gigatrain doctor --judge D --nodes 16 --excluded bad.jsonl  which 16 of them train; the bad ones are put on the list

A job's tasks find each other by MASTER_ADDR and MASTER_PORT."""
_SCHEMA = """\
Print the JSON Schema of a recipe (or site), so that editors complete and check TOML files.

  gigatrain schema > recipe.schema.json      then, in the first line of a recipe:   #:schema recipe.schema.json"""
