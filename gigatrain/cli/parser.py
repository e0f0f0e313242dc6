"""All commands, in the order in which `gigatrain --help` lists them."""

import argparse

from gigatrain.cli import bench, data, jobs, machine, models, planning, training

COMMANDS = (
    training.TRAIN,
    jobs.LAUNCH,
    jobs.PS,
    jobs.LOGS,
    jobs.CANCEL,
    jobs.REQUEUE,
    jobs.JOB,
    planning.PLAN,
    planning.RECIPES,
    planning.SITES,
    data.DATA,
    training.WATCH,
    training.REPORT,
    models.EXPORT,
    models.IMPORT,
    models.GENERATE,
    models.EVAL,
    bench.BENCH,
    machine.DOCTOR,
    machine.SCHEMA,
    machine.VERSION,
)


def build() -> argparse.ArgumentParser:
    """The parser of `gigatrain`; what it parsed holds, as `run`, what is to be called with it."""
    parser = argparse.ArgumentParser(
        prog="gigatrain",
        description="Train large language models: from a laptop to a GigaFactory, with the same recipe.",
        epilog="First: gigatrain train quickstart    Then: gigatrain COMMAND --help, each shows what it does by example.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    return parser
