"""doctor, schema, version: this machine and what is installed on it."""

import argparse
import json
import os
import sys
from pathlib import Path

from gigatrain import __version__
from gigatrain.cli import given
from gigatrain.cli.command import Command

_gib = given.between(float, "GiB", 0, 10**9)


def _doctor_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--site", metavar="SITE", help="what the machine should be (default: this machine as it is)")
    made.add_argument(
        "--run", metavar="DIR", dest="run_folder", help="where runs are written (default: DIR of --out, else the site's paths.runs)"
    )
    made.add_argument("--out", metavar="DIR", help="write the verdict to DIR/NODE.json, and leave with 0 whatever it is")
    made.add_argument("--quick", action="store_true", help="work the hardware for half a second, not three")
    made.add_argument("--free-gib", metavar="GIB", type=_gib, help="room that a run needs (default: 4; 1 on node-local scratch)")
    made.add_argument("--limit-s", metavar="S", type=given.ranks, default=54, help="seconds for everything (default: 54)")
    made.add_argument("--json", action="store_true", help="the verdict as JSON")
    made.add_argument("--judge", metavar="DIR", help="judge the verdicts of DIR; prints the nodes that train, as one comma list")
    made.add_argument("--nodes", metavar="N", type=given.ranks, default=1, help="with --judge: nodes that train (default: 1)")
    made.add_argument("--expect", metavar="A,B", help="with --judge: nodes that should have a verdict, in order; @FILE: those of a file")
    made.add_argument("--down", metavar="A,B", help="with --judge: nodes that the scheduler calls down; else silence puts none on the list")
    made.add_argument("--excluded", metavar="FILE", help="with --judge: bad nodes are appended here, a JSON object a line")


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
    verdict = examine(given.site(options.site)[0], out, run, options.quick, options.free_gib, options.limit_s)
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


DOCTOR = Command(
    "doctor",
    "say whether this machine, or a job's, can train",
    """\
Say whether this machine can train: driver, GPUs, ECC, Xids, clocks, links, equal products on all GPUs, disks, network; under a minute.
What could not be tested is named, with the reason. Leaves with 9 if the machine is bad.

  gigatrain doctor                                            this machine, on one screen
  gigatrain doctor --site jupiter --json                      against what the site says a node has
  srun --ntasks-per-node=1 gigatrain doctor --site S --out D  on every node of a job, and the network between them
  gigatrain doctor --judge D --nodes 16 --excluded bad.jsonl  which 16 of them train; the bad ones are put on the list

A job's tasks find each other by MASTER_ADDR and MASTER_PORT.""",
    _doctor,
    _doctor_arguments,
)


def _schema_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("of", nargs="?", choices=("recipe", "site"), default="recipe", help="of what (default: recipe)")


def _schema(options: argparse.Namespace) -> None:
    from gigatrain import load

    print(json.dumps(load.schema(options.of), indent=2))


SCHEMA = Command(
    "schema",
    "print the JSON Schema of recipes",
    """\
Print the JSON Schema of a recipe (or site), so that editors complete and check TOML files.

  gigatrain schema > recipe.schema.json      then, in the first line of a recipe:   #:schema recipe.schema.json""",
    _schema,
    _schema_arguments,
)


def _version_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--json", action="store_true", help="as JSON")


def _version(options: argparse.Namespace) -> None:
    from gigatrain import installed

    names = ("torch", "triton", "transformers", "accelerate", "deepspeed")
    there = installed.versions(*names)
    found: dict[str, str | None] = {"gigatrain": __version__} | {name: there.get(name) for name in ("python", *names)}
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, version in found.items():
        print(f"{name:14} {version or 'not installed'}")


VERSION = Command(
    "version",
    "show versions",
    "Versions of gigatrain and of what it stands on.",
    _version,
    _version_arguments,
)
