"""What `gigatrain recipes` shows and writes: the shipped recipes as rows, a copy to start from, and a recipe made of any config.json."""

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gigatrain import architectures, catalog, foreign, load
from gigatrain.architectures import Architecture
from gigatrain.errors import RecipeError
from gigatrain.foreign import Foreign

# What a country is called, its people, its language: by these too a recipe is found.
_CALLED = {
    "FR": "France French Europe European", "DE": "Germany German Europe European", "IT": "Italy Italian Europe European",
    "CH": "Switzerland Swiss Europe European", "EU": "Europe European", "US": "USA America American", "CN": "China Chinese",
}  # fmt: skip
_ALIASES = {"mit": "MIT", "apache-2.0": "Apache 2.0"}


def rows() -> list[dict[str, Any]]:
    """Every shipped recipe: name, model, task, parameters, active (those a token meets), tokens, licence, maker, country, family, summary."""
    root, found = load.shipped("recipes"), []
    for name in load.recipes():
        recipe = load.recipe(name)
        shape, train = load.architecture(recipe.model), recipe.train
        tokens = train.tokens or (train.steps or 0) * train.batch * train.sequence
        found.append(_row(name, recipe.name, recipe.objective.kind, shape, tokens, "", "", "", recipe.summary))
    for model in catalog.models(root):
        known = catalog.facts(root, model)
        shape = Architecture.model_validate_json(json.dumps(architectures.resolve(model)))
        for task in known.tasks:
            train = tomllib.loads(catalog.rendered(root, known, task, recipe=""))["train"]
            tokens = train.get("tokens") or train["steps"] * train["batch"] * train["sequence"]
            found.append(_row(f"{model}/{task}", known.title, task, shape, tokens, known.licence, known.maker, known.country, ""))
    return found


def _row(name: str, model: str, task: str, shape: Any, tokens: int, licence: str, maker: str, country: str, summary: str) -> dict[str, Any]:
    return {
        "name": name, "model": model, "task": task, "parameters": shape.parameters(),
        "active": shape.active_parameters() if isinstance(shape, Architecture) else shape.parameters(), "tokens": tokens, "licence": licence,
        "maker": maker, "country": country, "family": getattr(shape, "family", "transformers"), "summary": summary,
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> list[str]:
    """A line for each model, with its tasks; models of one recipe by their name."""
    lines, by_model = [], {}
    for row in found:
        by_model.setdefault(row["name"].partition("/")[0], []).append(row)
    for name, several in by_model.items():
        first = several[0]
        tasks = " ".join(row["task"] for row in several if "/" in row["name"])
        lines.append(f"{name:18} {_count(first):>35}  {first['country']:3}{first['licence']:27} {tasks or first['summary']}")
    return lines


def lines(found: list[dict[str, Any]]) -> list[str]:
    """A line for each recipe."""
    return [
        f"{row['name']:26} {row['model']:22} {_count(row):>35}  {row['tokens']:>18,} tokens  {row['licence'] or row['summary']}"
        for row in found
    ]


def _count(row: Mapping[str, Any]) -> str:
    return f"{row['parameters']:,}" + (f" ({row['active'] / 1e9:.2f} G active)" if row["active"] != row["parameters"] else "")


def searched(words: list[str]) -> list[dict[str, Any]]:
    """The recipes that have every word somewhere: in a name, a maker, a country (FR, France, French, Europe), a licence, a family; one of two letters as a
    word of its own.

    Raises RecipeError where there is none.
    """
    found = rows()
    kept = [row for row in found if all(_has(row, word.lower()) for word in words)]
    if not kept:
        known = (
            {str(row[key]).lower() for row in found for key in ("family", "country", "maker", "task")}
            | {part for row in found for part in row["name"].split("/")}
            | {word.lower() for row in found for word in _CALLED.get(row["country"], "").split()}
        )
        lacking = [word for word in words if not any(_has(row, word.lower()) for row in found)]
        hint = load.nearest(lacking[0].lower(), known) if lacking else ": each word is somewhere, but not all in one."
        raise RecipeError(f"no shipped recipe has {' '.join(words)!r}{hint} `gigatrain recipes` lists them all.")
    return kept


def _has(row: Mapping[str, Any], word: str) -> bool:
    values = [str(row[key]).lower() for key in ("name", "model", "task", "licence", "maker", "country", "family", "summary")]
    values.append(_CALLED.get(row["country"], "").lower())
    return any(word in re.split(r"[^a-z0-9]+", value) if len(word) <= 2 else word in value for value in values)


def copied(name: str, path: Path | None) -> Path:
    """Writes a shipped recipe, or a twin, as a file of the user's own, comments kept; returns where. Never over a file that is there."""
    if name.endswith(catalog.TWIN) and name not in load.recipes():
        tree = json.loads(load.recipe(name).model_dump_json(by_alias=True, exclude_unset=True))
        written = f"# {name}, as twin.py makes it.\n" + catalog.dumps(tree)
    else:
        written = load.recipe_text(name)
    return _written(written, path or Path(name.replace("/", "-") + ".toml"))


def from_hub(
    source: str, task: str, path: Path | None, measure: Callable[[Mapping[str, Any]], Foreign] | None = None
) -> tuple[Path, Architecture | Foreign]:
    """Writes the recipe of a task for the model of a folder with config.json, or of a hub name; returns where, and the model's numbers.

    A family of ours gets its numbers as a table, or by name where we know it; another model type is built from its config.json when it starts, if it can be
    (`measure` tries). Raises RecipeError for a config.json that cannot be trained as it is meant.
    """
    config = load.config_json(source)
    name = re.sub(r"[^a-z0-9._-]+", "-", Path(source).name.lower()).strip("-.") or "model"
    numbers: Architecture | Foreign
    within = architectures.language(config)
    config = within or config
    if foreign.native(config):
        numbers = architectures.from_hf_config(config)
    elif measure is None:
        raise RecipeError(f"{source}: model_type {config.get('model_type')!r} is not of our families, and nothing here can measure it")
    else:
        foreign.refuse(config)
        numbers = measure(config)
    held = config.get("max_position_embeddings")
    known = catalog.Facts(
        name=name, title=Path(source).name, maker="", country="", licence=_licence(source), weights=source, chat="",
        positions=held if isinstance(held, int) and held > 0 else 2048, tokens="", parameters=(0, ""), sources=(), notes=(), changes={},
    )  # fmt: skip
    written = catalog.rendered(load.shipped("recipes"), known, task, recipe="my.toml")
    if known.positions < tomllib.loads(written)["train"]["sequence"]:
        written = catalog.changed(written, "train.sequence", known.positions, "max_position_embeddings of its config.json")
    written = re.sub(r"^#   gigatrain (plan|train|recipes copy) my\.toml-tiny.*\n", "", written, flags=re.MULTILINE)
    written = re.sub(r"^#   gigatrain recipes copy my\.toml.*\n", "", written, flags=re.MULTILINE)
    written = re.sub(r"; recipes/\S*/README\.md has it for four sites", "", written)
    if within is not None:
        written = (
            "# The language model alone, of one that also takes images or sound: the rest is neither trained nor exported.\n" + written
        )
    if isinstance(numbers, Foreign):
        written = re.sub(
            r"^architecture = .*\n",
            "" if task != "pretrain" else f"from = {catalog.toml(source)}\nfresh = true\n",
            written,
            flags=re.MULTILINE,
        )
    elif (same := _named(numbers)) is not None:
        written = catalog.changed(written, "model.architecture", same, f"the numbers of {source}")
    else:
        table = "".join(f"{key} = {catalog.toml(value)}\n" for key, value in least(numbers).items())
        written = re.sub(r"^architecture = .*\n", "", written, flags=re.MULTILINE)
        written = written.replace("\n[tokenizer]", f"\n[model.architecture] # config.json of {source}\n{table}\n[tokenizer]", 1)
    path = _written(written, path or Path(f"{name}-{task}.toml"))
    try:
        load.recipe(path)
    except RecipeError:
        path.unlink()
        raise
    return path, numbers


def kind(numbers: Architecture | Foreign) -> str:
    """What a model is, in a word: one of our families, or transformers' class."""
    return numbers.family if isinstance(numbers, Architecture) else f"transformers' {numbers.class_name}"


def least(numbers: Architecture) -> dict[str, Any]:
    """The fewest fields that give an architecture."""
    tree = json.loads(numbers.model_dump_json())
    for name in list(tree):
        rest = {key: value for key, value in tree.items() if key != name}
        try:
            if Architecture.model_validate_json(json.dumps(rest)) == numbers:
                tree = rest
        except ValidationError:
            continue
    for rope in ("rope", "rope_local"):
        if isinstance(tree.get(rope), dict):
            tree[rope] = {
                key: value
                for key, value in tree[rope].items()
                if value is not None and (key, value) not in (("partial", 1.0), ("kind", "default"))
            }
    return tree


def _named(numbers: Architecture) -> str | None:
    return next(
        (name for name, table in architectures.named().items() if Architecture.model_validate_json(json.dumps(table)) == numbers), None
    )


def _licence(source: str) -> str:
    """What a folder's model card says; the licence of a hub name is on its page."""
    card = Path(source).expanduser() / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) if card.is_file() else None
    return _ALIASES.get(found[1], found[1]) if found else "its licence: see its card"


def _written(text: str, path: Path) -> Path:
    path = path.expanduser()
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; give the file to write, for instance {path / 'my.toml'}")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{path} is there already, and is not written over; give another path, or move it") from None
    except OSError as failure:
        raise RecipeError(f"{path} cannot be written: {failure.strerror}") from None
    return path
