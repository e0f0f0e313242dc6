"""What a command is made of."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A command, or a group of them: `run` is None where one of `within` has to follow; beside a `run` they may."""

    name: str
    line: str  # in the list that it stands in
    text: str  # of its own --help: what it does, and how, by example
    run: Callable[[argparse.Namespace], None] | None = None
    arguments: Callable[[argparse.ArgumentParser], None] | None = None
    within: tuple["Command", ...] = ()

    def add_to(self, commands: Any) -> None:
        """Into argparse's list of commands."""
        form = argparse.RawDescriptionHelpFormatter if self.run else argparse.HelpFormatter  # examples keep their lines
        made = commands.add_parser(self.name, help=self.line, description=self.text, formatter_class=form)
        if self.run:
            made.set_defaults(run=self.run)
        if self.arguments:
            self.arguments(made)
        if self.within:
            inner = made.add_subparsers(metavar="COMMAND", required=self.run is None)
            for command in self.within:
                command.add_to(inner)
