"""gigatrain trains large language models on Europe's AI GigaFactories, and, with the same recipe, on one GPU or a laptop.

recipe = gigatrain.load.recipe("recipes/quickstart.toml", ["train.steps=40"])
plan = gigatrain.plan(recipe, gigatrain.load.site("laptop"))
summary = gigatrain.train(plan, Path("runs/first"))
"""

from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gigatrain import load
    from gigatrain.config import Recipe
    from gigatrain.loop import train
    from gigatrain.planning.plan import Plan, plan
    from gigatrain.site import Site

__all__ = ["Plan", "Recipe", "Site", "load", "plan", "train"]
__version__ = metadata.version("gigatrain")

_HOMES = {"Recipe": "config", "Site": "config", "Plan": "planning.plan", "plan": "planning.plan", "train": "loop"}


def __getattr__(name: str) -> Any:
    """Public names on first use: torch is imported by `train` and by nothing else here."""
    import importlib

    if name == "load":
        return importlib.import_module("gigatrain.load")
    if name in _HOMES:
        return getattr(importlib.import_module(f"gigatrain.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gigatrain' has no attribute {name!r}")
