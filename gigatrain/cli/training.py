"""train, watch, report: a run from its start to a page on it."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from gigatrain.cli import given
from gigatrain.cli.command import Command
from gigatrain.errors import REQUEUE


def _train_arguments(made: argparse.ArgumentParser) -> None:
    given.add_recipe(made)
    made.add_argument("--run", metavar="DIR", dest="run_folder", help="the run folder (default: runs/NAME-DATE-TIME)")
    made.add_argument("--site", metavar="SITE", help="where it runs (default: this machine; `gigatrain sites`)")
    how = made.add_mutually_exclusive_group()
    how.add_argument("--new", action="store_true", help="start at step 0; what DIR holds is moved to DIR.1")
    how.add_argument("--resume", action="store_true", help="go on from DIR's newest whole checkpoint; an error if there is none")
    made.add_argument("--other-numbers", action="store_true", help=given.OTHER_NUMBERS)
    how.add_argument("--continue", action="store_true", dest="go_on", help="go on if DIR has a checkpoint, else begin: what a job says")


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
    recipe = given.scheduled(load.recipe(options.recipe, options.set))
    site, why = given.site(options.site)
    from gigatrain.parallel import groups

    here, started = groups.place(), groups.started()  # None: of no replica; by nobody, so that it starts its ranks itself
    chosen = plan(recipe, site, started, measure=given.measured)
    resume = "other-numbers" if options.other_numbers else "resume"
    start: Any = "new" if options.new else resume if options.resume else "continue" if options.go_on else "auto"
    folder = _run_folder(options, recipe.name)
    arguments = ["train", *options.arguments[1:], "--run", str(folder)]
    if chosen.recovery.replicas != "none" and here is None and started is None:
        sys.exit(groups.run(chosen, folder, arguments))
    chosen, folder = groups.part(chosen, folder)
    if started is None and (chosen.recovery.supervised or chosen.ranks > 1):
        from gigatrain.observe import failed, logs
        from gigatrain.recovery.start import orders
        from gigatrain.recovery.supervisor import supervise

        first = orders(recipe, site, chosen, folder, arguments, start, measure=given.measured)
        sys.exit(supervise(first, lambda since: failed.first_failure(folder, logs.attempt(), since=since)))
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


def _run_folder(options: argparse.Namespace, name: str) -> Path:
    """--run; else a new folder under runs/, or with --resume the newest of this recipe there."""
    if options.run_folder:
        return Path(options.run_folder).expanduser()
    if options.resume:
        from gigatrain import run

        return run.newest(Path("runs"), name)
    from gigatrain.launching import job

    return job.new_folder(Path("runs"), name)


TRAIN = Command(
    "train",
    "train a recipe",
    """\
Train a recipe: tokenise its data (kept for the next run), train, validate, save, export.

  gigatrain train quickstart                                  three minutes on two CPU cores
  gigatrain train quickstart --set train.steps=40             any key of the recipe can be set
  gigatrain train my.toml --run runs/mine                     a recipe of your own
  gigatrain train my.toml --run runs/mine --resume            go on after a kill, a signal or a time limit
  gigatrain train my.toml --run runs/mine --resume --other-numbers --set optim.moments=bf16

SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint at the end of the step and leave.
The run folder holds plan.json, metrics.jsonl, summary.json, checkpoints/, export/ and tensorboard/.""",
    _train,
    _train_arguments,
)


def _watch_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_folder", metavar="RUN", help="a run folder")
    way = made.add_mutually_exclusive_group()
    way.add_argument("--once", action="store_true", help="show it once and leave")
    way.add_argument("--json", action="store_true", help="what is known now, as JSON")
    way.add_argument("--serve", metavar="[HOST:]PORT", help="serve it to Prometheus instead (default host: 127.0.0.1)")
    made.add_argument("--token-file", metavar="FILE", help="with --serve: holds the bearer token (else GIGATRAIN_TOKEN, else a new one)")


def _watch(options: argparse.Namespace) -> None:
    folder = Path(options.run_folder).expanduser()
    if options.serve:
        from gigatrain.observe import prometheus

        token = Path(options.token_file).expanduser() if options.token_file else None
        prometheus.serve(folder, options.serve, token, lambda text: print(text, flush=True))
        return
    from gigatrain.observe.watch import watch

    watch(folder, once=options.once, as_json=options.json)


WATCH = Command(
    "watch",
    "follow a run: loss, speed, goodput, errors",
    """\
Follow a run from its folder, wherever that can be read: live in a terminal, until it is finished or Ctrl-C. The run is not touched.
Goodput is the time of steps that were kept over wall-clock since the first start; what is not known is said to be so.

  gigatrain watch runs/mine
  gigatrain watch runs/mine --once
  gigatrain watch runs/mine --json | jq .goodput
  gigatrain watch runs/mine --serve 9400                      Prometheus metrics on this machine; the token's file is printed
  gigatrain watch runs/mine --serve 10.1.2.3:9400 --token-file ~/token

launch/grafana.json is a dashboard for these metrics. A recipe's report.prometheus = 9400 serves them from the run itself.""",
    _watch,
    _watch_arguments,
)


def _report_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_folders", metavar="RUN", nargs="+", help="a run folder; of several the first is what others are compared with")
    made.add_argument("-o", "--out", metavar="FILE", help="the page; - prints it (default: report.html, unless --json or --plots is given)")
    made.add_argument("--json", action="store_true", help="what the page is made of, as JSON, for programs")
    made.add_argument("--plots", metavar="DIR", help="its pictures as PNG files; needs matplotlib")


def _report(options: argparse.Namespace) -> None:
    from gigatrain.observe.report import report

    report([Path(folder).expanduser() for folder in options.run_folders], options.out, as_json=options.json, plots=options.plots)


REPORT = Command(
    "report",
    "one page on a run, or on several side by side",
    """\
One page on a run: loss, speed, goodput, restarts, step times, memory, watts and joules, cost and carbon, and the plan beside what came of it.
It is one HTML file that needs nothing else, for a browser, a telephone or paper; of several runs it begins with them side by side.
A run that goes on, was killed, or is older than its meters has a page too, that says what is missing. The run is not touched.

  gigatrain report runs/mine                                  report.html
  gigatrain report runs/mine runs/other -o both.html
  gigatrain report runs/mine --json | jq '.runs[0].headline.tokens_per_s_mw'
  gigatrain report runs/mine --plots pictures                 PNG files, for slides""",
    _report,
    _report_arguments,
)
