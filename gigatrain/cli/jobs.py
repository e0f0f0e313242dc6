"""launch, ps, logs, cancel, requeue and what a job's script asks: a run as a job of a site."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from gigatrain.cli import given
from gigatrain.cli.command import Command
from gigatrain.errors import RunError


def _duration(text: str) -> int:
    from gigatrain.launching.slurm import seconds

    found = seconds(text)
    if text.count(":") != 2 or not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not HH:MM:SS or D-HH:MM:SS")
    return found


def _launch_arguments(made: argparse.ArgumentParser) -> None:
    given.add_recipe(made)
    made.add_argument("--site", metavar="SITE", required=True, help="where: a site file, or the name of a shipped one (`gigatrain sites`)")
    made.add_argument("--nodes", metavar="N", type=given.ranks, help="nodes that train")
    made.add_argument("--gpus", metavar="G", type=given.ranks, help="or ranks that train")
    made.add_argument(
        "--megawatts",
        metavar="M",
        type=float,
        help="or what the run may draw at the facility, cooling included: as many nodes as that feeds, and the run keeps to it (power.megawatts)",
    )
    made.add_argument(
        "--spares", metavar="K", type=given.count, default=0, help="nodes beside them, that take the place of bad ones (default: 0)"
    )
    made.add_argument(
        "--time", metavar="HH:MM:SS", type=_duration, help="limit of one job; the run goes on in the next (default: the site's longest)"
    )
    made.add_argument("--account", metavar="A", help="what is billed (default: the site's, else SBATCH_ACCOUNT)")
    made.add_argument(
        "--launcher",
        choices=("torchrun", "srun"),
        default="torchrun",
        help="who starts the ranks: torchrun, one a node (default), or srun itself",
    )
    made.add_argument("--no-preflight", dest="preflight", action="store_false", help="do not examine the nodes before each attempt")
    made.add_argument("--run", metavar="DIR", dest="run_folder", help="the run folder (default: the site's paths.runs/NAME-DATE-TIME)")
    made.add_argument("--resume", action="store_true", help="go on with the run in DIR in a new job")
    made.add_argument("--other-numbers", action="store_true", help=given.OTHER_NUMBERS)
    made.add_argument(
        "--sweep", metavar="KEY=V1,V2", action="append", default=[], help="a run for each value, as one array; several: each with each"
    )
    made.add_argument(
        "--chain", metavar="K", type=given.ranks, default=1, help="K jobs, each after the one before, where none may requeue itself"
    )
    made.add_argument(
        "--hosts", metavar="FILE", help="without a scheduler: hosts that ssh reaches, one a line; the first is where ranks meet"
    )
    made.add_argument(
        "--as",
        dest="form",
        choices=("jobset", "trainjob"),
        help="as a manifest of Kubernetes (default there: jobset), whatever the site's scheduler",
    )
    made.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    made.add_argument("--json", action="store_true", help="what was submitted, as JSON")


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
        measure=given.measured,
    )
    made, large = prepared.job, prepared.size
    for recipe in prepared.recipes if made.site.scheduler.kind != "kubernetes" else ():
        given.scheduled(recipe)
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


LAUNCH = Command(
    "launch",
    "train as a job of a site",
    """\
From a recipe and a site to a job in its queue: planned, checked, submitted; it saves before its time limit, requeues itself and replaces bad nodes.

  gigatrain launch my.toml --site jupiter --nodes 16 --time 06:00:00
  gigatrain launch my.toml --site jupiter --nodes 16 --spares 2 --dry-run      print the script, submit nothing
  gigatrain launch my.toml --site jupiter --megawatts 0.5                       as many nodes as that feeds, and the run keeps to it
  gigatrain launch my.toml --site leonardo --nodes 4 --run $WORK/mine --resume  go on in a new job
  gigatrain launch my.toml --site lumi --nodes 1 --sweep optim.lr=1e-3,2e-3,4e-3
  gigatrain launch quickstart --site laptop                                    in the background of this machine
  gigatrain launch my.toml --site my-site.toml --hosts hosts.txt               on each host through ssh, without a scheduler
  gigatrain launch my.toml --site my-cluster.toml --nodes 4 --as trainjob      a Kubeflow TrainJob in RUN/launch/job.yaml

RUN/launch holds what was submitted: job.sh, recipe and site as they were, and history.jsonl with every attempt and why it ended.""",
    _launch,
    _launch_arguments,
)


def _ps_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "folder", metavar="DIR", nargs="?", default="runs", help="the folder of the run folders, or one of them (default: runs)"
    )
    made.add_argument("--json", action="store_true", help="as JSON, for programs")


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


PS = Command(
    "ps",
    "every run, and what its job does",
    """\
Every run of a folder: what its job does (queued, running, saving, requeued), or how it ended and why; the newest news first.
Asked are the run folders, and Slurm (squeue, sacct), kubectl or this machine's processes, whoever runs them.

  gigatrain ps                        all of runs/
  gigatrain ps $SCRATCH/runs
  gigatrain ps runs/my-sweep          the runs of one sweep
  gigatrain ps --json | jq '.runs[] | select(.state == "failed")'""",
    _ps,
    _ps_arguments,
)


def _logs_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_folder", metavar="RUN", help="the run folder")
    made.add_argument("-f", "--follow", action="store_true", help="go on as they print, over attempts, until the job is gone")
    made.add_argument("--rank", metavar="R", type=given.count, default=0, help="another rank than 0")
    made.add_argument("--attempt", metavar="A", type=given.count, help="another attempt than the last")
    made.add_argument("--errors", action="store_true", help="only why it failed, by the rank that failed first")
    made.add_argument("--json", action="store_true", help="where the logs are and why it failed, as JSON")


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
    from gigatrain.observe import failed

    return failed.first_failure(run, number)


LOGS = Command(
    "logs",
    "what the ranks of a run print",
    """\
What a run's first rank printed in its last attempt; why it failed, by the rank that failed first, stands above all.

  gigatrain logs runs/mine            the end of rank 0's log, and of the job's own output
  gigatrain logs runs/mine -f         go on as it prints, until the job is gone
  gigatrain logs runs/mine --rank 7 --attempt 2
  gigatrain logs runs/mine --errors   only the reason""",
    _logs,
    _logs_arguments,
)


def _cancel_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_folder", metavar="RUN", help="the run folder")
    made.add_argument("--now", action="store_true", help="do not save first: steps since the last checkpoint are lost")
    made.add_argument("--json", action="store_true", help="what was done, as JSON")


def _cancel(options: argparse.Namespace) -> None:
    from gigatrain.launching import follow

    _told(options, follow.cancel(Path(options.run_folder).absolute(), now=options.now))


def _told(options: argparse.Namespace, done: dict[str, Any]) -> None:
    print(json.dumps(done, indent=2) if options.json else f"job {' '.join(done['jobs'])}: {done['how']}    gigatrain ps {done['run']}")


CANCEL = Command(
    "cancel",
    "end the job of a run, saved",
    """\
End the job of a run: it saves a checkpoint and leaves, and is not queued again. A job that still waits is taken out of the queue.

  gigatrain cancel runs/mine
  gigatrain cancel runs/mine --now    at once, without saving
  gigatrain cancel runs/my-sweep      every run of a sweep
  gigatrain requeue runs/mine         goes on where it was""",
    _cancel,
    _cancel_arguments,
)


def _requeue_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_folder", metavar="RUN", help="the run folder")
    made.add_argument("--json", action="store_true", help="what was done, as JSON")


def _requeue(options: argparse.Namespace) -> None:
    from gigatrain.launching import follow

    _told(options, follow.requeue(Path(options.run_folder).absolute()))


REQUEUE = Command(
    "requeue",
    "start the job of a run again",
    """\
Start the job of a run again, from its newest checkpoint: one that runs saves and goes back into its queue, one that is gone is submitted anew.

  gigatrain requeue runs/mine
  gigatrain ps runs/mine""",
    _requeue,
    _requeue_arguments,
)


def _launched(text: str) -> Path:
    """The run folder of a job, untouched; RunError if none was launched there: a history begun by a wrong path would look like a run."""
    run = Path(text)
    if not (run / "launch").is_dir():
        raise RunError(f"{text} is the run folder of no job: it has no folder launch; `gigatrain launch` makes it")
    return run


def _job_begin_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_folder", metavar="RUN", help="the run folder")


def _job_begin(options: argparse.Namespace) -> None:
    from gigatrain.launching import restart

    print(restart.begin(_launched(options.run_folder), dict(os.environ)))


def _job_after_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_folder", metavar="RUN", help="the run folder")
    made.add_argument("--code", type=int, required=True, help="what the ranks ended with")
    made.add_argument("--signal", default="none", help="what the script was told: USR1, TERM or none")
    made.add_argument("--held", default="", help="nodes of the allocation, by commas, or @FILE")
    made.add_argument("--chosen", default="", help="those that trained, or @FILE")
    made.add_argument("--excluded", help="the site's list of bad nodes")
    made.add_argument("--down", help="nodes that the scheduler calls down, or @FILE: silence of others counts only twice in a row")
    made.add_argument("--cut-short", action="store_true", help="not every node had the time to answer, so nobody's silence counts")


def _job_after(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.launching import restart
    from gigatrain.observe import failed, logs

    verdict = restart.after(
        _launched(options.run_folder),
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
    if verdict.word in ("again", "stop") and (why := failed.first_failure(Path(options.run_folder), logs.attempt())):
        print(why, file=sys.stderr)
    bad = restart.excluded_nodes(Path(options.excluded)) if options.excluded else []
    print(verdict.word, verdict.pause_s if verdict.word == "again" else verdict.code, ",".join(bad))


_JOB_TEXT = """\
job.sh asks `begin` whether anything is left to do (go ATTEMPT PORT FOLDER | done | stop CODE), and `after` what comes next:
done, again, requeue, leave or stop; the exit code, or for again the seconds to wait first; and the nodes to exclude.
The reasons are in RUN/launch/history.jsonl.

  gigatrain job begin runs/mine
  gigatrain job after runs/mine --code 1 --held n1,n2"""
JOB = Command(
    "job",
    "what a job's script asks",
    "What a job's script asks; not meant for people.",
    within=(
        Command("begin", "before an attempt", _JOB_TEXT, _job_begin, _job_begin_arguments),
        Command("after", "after an attempt", _JOB_TEXT, _job_after, _job_after_arguments),
    ),
)
