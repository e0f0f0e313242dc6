"""What several commands are given, and how it is read: numbers within bounds, a recipe, a site."""

import argparse
from collections.abc import Callable
from typing import Any

OTHER_NUMBERS = "with --resume: the precision or the states' forms may differ from those before; the run's record says from which step on"


def between(kind: Callable[[str], Any], name: str, low: int, high: int, why: str = "") -> Callable[[str], Any]:
    """A number of the command line within bounds, both of which it may be; `name` is what argparse calls one that is no number."""

    def parsed(text: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number; give one from {low} to {high}") from None
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}{why}")
        return number

    parsed.__name__ = name
    return parsed


count = between(int, "count", 0, (1 << 31) - 1)
ranks = between(int, "ranks", 1, 1 << 20)


def add_recipe(made: argparse.ArgumentParser) -> None:
    """RECIPE and --set."""
    made.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a shipped one (`gigatrain recipes`)")
    made.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the recipe (null leaves it out); may be repeated"
    )


def site(name: str | None) -> tuple[Any, str]:
    """--site, else this machine; and why it is that one."""
    from gigatrain import load

    return (load.site(name), "--site") if name else load.local_site()


def scheduled(recipe: Any) -> Any:
    """The recipe, once its schedule of prices and megawatts could be read: a job is not to wait in a queue to learn that it cannot."""
    if recipe.power.schedule is not None:
        from gigatrain.power.schedule import Schedule

        Schedule.read(recipe.power.schedule)
    return recipe


def measured(config: Any) -> Any:
    """The numbers of a model that is not of our families; torch and transformers, 4 s."""
    from gigatrain.models.autonumbers import numbers

    return numbers(config)
