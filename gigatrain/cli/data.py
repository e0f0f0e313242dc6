"""data build, show, teach: what a recipe trains on, ahead of its run."""

import argparse
import json
import sys

from gigatrain.cli import given
from gigatrain.cli.command import Command


def _data_teach_arguments(made: argparse.ArgumentParser) -> None:
    given.add_recipe(made)
    made.add_argument("--teacher", metavar="DIR", help="the teacher's folder (default: objective.teacher)")


def _data_teach(options: argparse.Namespace) -> None:
    from gigatrain.teaching import taught

    for line in taught(options.recipe, options.set, options.teacher):
        print(line)


_TEACH = Command(
    "teach",
    "keep what a teacher says of a recipe's samples beside its data",
    """
Compute a teacher's likeliest tokens and their log-probabilities for every training sample of a recipe, once, and keep them beside its shards, hashed. A run
with [objective] kind = "distil" reads them. A command that was ended goes on where it was.

  gigatrain data teach my.toml --teacher models/large
  gigatrain train my.toml --set objective.kind=distil --set objective.teacher=models/large
""",
    _data_teach,
    _data_teach_arguments,
)


def _data_build_arguments(made: argparse.ArgumentParser) -> None:
    given.add_recipe(made)
    made.add_argument("--site", metavar="SITE", help="where `gigatrain launch` with this --site will look: in the site's paths.cache")
    made.add_argument("--account", metavar="A", help="with --site: stands for $SBATCH_ACCOUNT in its paths")
    made.add_argument("--json", action="store_true", help="the manifest as JSON")


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


_BUILD = Command(
    "build",
    "tokenise a recipe's data ahead",
    """\
Tokenise a recipe's data into Megatron .bin/.idx shards, in parallel; a build that is killed goes on where it was.
A later `gigatrain train` of the same data and tokenizer finds them.

  gigatrain data build quickstart
  gigatrain data build my.toml --set data.workers=16 --json
  gigatrain data build my.toml --site jupiter                 into the site's cache, where its jobs look""",
    _data_build,
    _data_build_arguments,
)


def _data_show_arguments(made: argparse.ArgumentParser) -> None:
    given.add_recipe(made)
    made.add_argument("-n", "--count", type=int, default=2, metavar="N", help="documents of each source (default: 2)")


def _data_show(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.data import build, shown
    from gigatrain.observe.display import Display

    recipe = load.recipe(options.recipe, options.set)
    with Display() as display:
        corpus = build.build(recipe.data, recipe.tokenizer, progress=display.advance)
    colour = sys.stdout.isatty()
    print("\n".join(shown.lines(corpus, options.count, sequence=recipe.train.sequence, packing=recipe.data.packing, colour=colour)))


_SHOW = Command(
    "show",
    "documents as the run sees them, what is trained of them marked",
    """\
Show the first documents of each source as tokens that a run is trained on: special tokens as they are, and what is trained in green (in ⟪ ⟫ where the
output is no terminal). With data.packing = "packed", also how many rows they make and how much of them is padding. Tokenises first what is not yet.

  gigatrain data show my-sft.toml
  gigatrain data show my-sft.toml -n 10 --set data.packing='"packed"' | less -R""",
    _data_show,
    _data_show_arguments,
)


DATA = Command("data", "prepare data", "Prepare data ahead of a run.", within=(_TEACH, _BUILD, _SHOW))
