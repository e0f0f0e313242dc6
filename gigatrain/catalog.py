"""The recipes of open models, made of what is known of each: `recipes/MODEL/model.toml`, and a text for each task, `recipes/tasks/TASK.toml`.

A model says only what differs, each value with its source; the result is the text of a whole recipe with its comments, which `load.recipe` reads and
`gigatrain recipes copy` writes. A file `recipes/MODEL/TASK.toml` stands above what would be made. No torch.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigatrain.errors import RecipeError

TASKS = ("pretrain", "continue", "sft", "lora", "dpo")
TWIN = "-tiny"
_KEYS = {
    "title",
    "maker",
    "country",
    "licence",
    "weights",
    "chat",
    "positions",
    "tokens",
    "parameters",
    "sources",
    "notes",
    "sequence",
    *TASKS,
}
_LINE = re.compile(r"^(\s*)(\"[^\"]+\"|[A-Za-z0-9_-]+)\s*=")


@dataclass(frozen=True)
class Facts:
    """One open model. `weights` and `chat` are hub names ("": not published); `tokens`, `parameters` and `sources` are for readers."""

    name: str
    title: str
    maker: str
    country: str
    licence: str
    weights: str
    chat: str
    positions: int
    tokens: str
    parameters: tuple[int, str]
    sources: tuple[str, ...]
    notes: tuple[str, ...]
    changes: Mapping[str, Mapping[str, tuple[Any, str]]]  # task -> dotted key -> value and where it was read

    @property
    def tasks(self) -> tuple[str, ...]:
        """What can be done with it: without published weights it can only be trained from nothing."""
        return TASKS if self.weights else TASKS[:1]


def models(root: Path) -> dict[str, Path]:
    """Name -> folder of every open model under `recipes`."""
    return {path.parent.name: path.parent for path in sorted(root.glob("*/model.toml"))}


def names(root: Path) -> list[str]:
    """Of every recipe that can be made, `MODEL/TASK`; those of twins are left out."""
    return [f"{model}/{task}" for model in models(root) for task in facts(root, model).tasks]


def facts(root: Path, model: str) -> Facts:
    """What is known of one model. Raises RecipeError naming the key that is wrong."""
    path = root / model / "model.toml"
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as failure:
        raise RecipeError(f"{path} cannot be read: {failure}") from None
    if unknown := sorted(set(tree) - _KEYS):
        raise RecipeError(f"{path}: {unknown[0]} is no key of a model; there are {', '.join(sorted(_KEYS))}")
    try:
        changes = {task: {key: (value, str(source)) for key, (value, source) in tree.get(task, {}).items()} for task in TASKS}
        count, source = tree["parameters"]
        return Facts(
            name=model,
            title=tree["title"],
            maker=tree["maker"],
            country=tree["country"],
            licence=tree["licence"],
            weights=tree.get("weights", ""),
            chat=tree.get("chat", ""),
            positions=tree["positions"],
            tokens=tree["tokens"],
            parameters=(int(count), str(source)),
            sources=tuple(tree["sources"]),
            notes=tuple(tree.get("notes", ())),
            changes=changes,
        )
    except (KeyError, TypeError, ValueError) as failure:
        raise RecipeError(
            f"{path}: {failure!r}; a model needs {', '.join(sorted(_KEYS - set(TASKS)))}, a task pairs of a value and its source"
        ) from None


def text(root: Path, name: str) -> str | None:
    """The recipe `MODEL/TASK` as TOML with its comments; None if there is no such model, or nothing to start that task from."""
    model, slash, task = name.partition("/")
    if not slash or not (root / model / "model.toml").is_file() or task not in (known := facts(root, model)).tasks:
        return None
    return rendered(root, known, task, recipe=name)


def rendered(root: Path, known: Facts, task: str, *, recipe: str) -> str:
    """The text of a task with a model's words in it, and what the model changes; `recipe` is what the comments call it."""
    written = (root / "tasks" / f"{task}.toml").read_text(encoding="utf-8")
    tuned = known.chat or known.weights
    by = f"{known.maker}; {known.licence}" if known.maker else known.licence
    words = {
        "name": f"{known.name}-{task}", "recipe": recipe, "model": known.name, "title": known.title, "by": by, "weights": known.weights,
        "start": tuned, "tokenizer": tuned if task in ("sft", "lora", "dpo") else known.weights or known.chat, "positions": str(known.positions),
    }  # fmt: skip
    for word, value in words.items():
        written = written.replace(f"@{word}@", value)
    sources = known.changes.get(task, {}).get("data.sources", ([{}], ""))[0]
    if sources[0].get("field"):  # whoever puts a file of their own in its place has another
        written = written.replace("data.sources.0.kind=jsonl\n", "data.sources.0.kind=jsonl --set data.sources.0.field=messages\n")
    for key, (value, source) in known.changes.get(task, {}).items():
        written = changed(written, key, value, source)
    return written


def changed(written: str, key: str, value: Any, why: str = "") -> str:
    """A recipe's text with one dotted key set: its line is replaced where there is one, else one is added to its table; all other lines stay."""
    table, _, last = key.rpartition(".")
    line = f"{last} = {toml(value)}" + (f"  # {why}" if why else "")
    lines, current, end = written.splitlines(), "", None
    for index, one in enumerate(lines):
        if one.startswith("["):
            current = one.strip().strip("[]").strip()
        elif current == table and (found := _LINE.match(one)) and found[2].strip('"') == last:
            lines[index] = line
            return "\n".join(lines) + "\n"
        if current == table and one.strip() and not one.lstrip().startswith("#"):
            end = index
    if end is None:
        return written.rstrip("\n") + f"\n\n[{table}]\n{line}\n"
    return "\n".join([*lines[: end + 1], line, *lines[end + 1 :]]) + "\n"


def toml(value: Any) -> str:
    """A value as TOML writes it on one line. Raises RecipeError for one that TOML has no word for."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 1_000_000 else str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} = {toml(one)}" for key, one in value.items() if one is not None)
        return f"{{ {inner} }}" if inner else "{}"
    raise RecipeError(f"TOML has no word for {value!r}")


def dumps(tree: Mapping[str, Any]) -> str:
    """A tree as TOML: plain values first, then its tables; lists of tables stand on one line."""
    out: list[str] = []
    _table(tree, "", out)
    return "\n".join(out).strip() + "\n"


def _table(tree: Mapping[str, Any], path: str, out: list[str]) -> None:
    plain = {key: value for key, value in tree.items() if not isinstance(value, Mapping) and value is not None}
    if path and plain:
        out += ["", f"[{path}]"]
    out += [f"{key} = {toml(value)}" for key, value in plain.items()]
    for key, value in tree.items():
        if isinstance(value, Mapping):
            _table(value, f"{path}.{key}" if path else key, out)
