"""The reference, made of the code: recipe and site keys, commands, exit codes, metrics, machines, models and kernels, as pages in Markdown.

`python docs/generate.py DIR` writes them there; `mkdocs build` takes the same from docs/hooks.py; nothing of it is kept in the repository, so that it cannot
drift. No network, no GPU; kernels need torch to be imported.
"""

import argparse
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from gigatrain import architectures, errors, load, shelf  # noqa: E402
from gigatrain.architectures import Architecture  # noqa: E402
from gigatrain.cli import parser  # noqa: E402
from gigatrain.launching import restart  # noqa: E402
from gigatrain.observe import prometheus  # noqa: E402
from gigatrain.planning import hardware  # noqa: E402
from gigatrain.site import BASES, Accelerator, Basis  # noqa: E402

MADE = "*This page is made of the code when the site is built: {}.*"
Schema = Mapping[str, Any]


def reference() -> dict[str, str]:
    """Path within docs/ -> Markdown of every page of the reference."""
    return {
        "reference/recipe.md": _keys("recipe", "Every key of a recipe", _RECIPE),
        "reference/site.md": _keys("site", "Every key of a site", _SITE),
        "reference/commands.md": commands(),
        "reference/exit-codes.md": exit_codes(),
        "reference/metrics.md": metrics(),
        "reference/sites.md": sites(),
        "reference/models.md": models(),
        "reference/kernels.md": kernels(),
    }


_RECIPE = (
    "A recipe is a TOML file. Any key can be set for one run by `--set section.key=value`; an unknown one is refused, with the nearest that exists. "
    "`gigatrain schema > recipe.schema.json` gives the same to an editor: name it in a recipe's first line, `#:schema recipe.schema.json`."
)
_SITE = (
    "A site is a TOML file in `launch/sites/`, or your own, given by `--site FILE`. A figure is a table of `value`, `basis` and `source`, or the word "
    '`"unknown"`; `gigatrain schema site` gives the same to an editor.'
)


# Keys of recipes and sites, from the JSON Schema that `gigatrain schema` prints.


class Section:
    """One table of a TOML file: its dotted path, what it is for, and its keys as `(name, schema, required)`."""

    def __init__(self, path: str, listed: bool, text: str, keys: list[tuple[str, Schema, bool]]) -> None:
        self.path, self.listed, self.text, self.keys = path, listed, text, keys


def sections(of: str) -> list[Section]:
    """The tables of a `recipe` or `site`, in the order of the file; the first is the top level."""
    whole = load.schema(of)
    return list(_sections(whole, whole, "", False))


def keys(of: str) -> dict[str, Schema]:
    """Dotted key -> its schema; an entry of a list is named without its index (`data.sources.kind`). Sections are keys too."""
    found: dict[str, Schema] = {}
    for section in sections(of):
        if section.path:
            found[section.path] = {}
        found |= {f"{section.path}.{name}".lstrip("."): schema for name, schema, _ in section.keys}
    return found


def _sections(whole: Schema, schema: Schema, path: str, listed: bool) -> Iterator[Section]:
    own, inner = [], []
    for name, one in schema.get("properties", {}).items():
        at = f"{path}.{name}".lstrip(".")
        tables = list(_tables(whole, one))
        if not tables or any("enum" in form or "type" in form for form in one.get("anyOf", ()) if form.get("type") != "null"):
            own.append((name, one, name in schema.get("required", ())))
        inner += [(at, table, many) for table, many in tables]
    yield Section(path, listed, schema.get("description", ""), own)
    for at, table, many in inner:
        yield from _sections(whole, table, at, many)


def _tables(whole: Schema, schema: Schema) -> Iterator[tuple[Schema, bool]]:
    """The tables that a key's value may be, and whether it is a list of them; a figure of a site is a value."""
    for form in (schema, *schema.get("anyOf", ()), *schema.get("allOf", ())):
        many = form.get("type") == "array"
        named = (form.get("items", {}) if many else form).get("$ref")
        if named and named.split("/")[-1] != "Figure":
            found = whole["$defs"][named.split("/")[-1]]
            if "properties" in found:
                yield found, many


def kind(schema: Schema) -> str:
    """A key's type in words: `integer, at least 1`, or its words, quoted."""
    if "anyOf" in schema:
        forms = [kind(form) for form in schema["anyOf"] if form.get("type") != "null"]
        return " or ".join(dict.fromkeys(form for form in forms if form))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        if set(schema["enum"]) == set(architectures.named()):
            return "a name of the [table](models.md#named-architectures)"
        return ", ".join(f"`{json.dumps(word)}`" for word in schema["enum"])
    if "$ref" in schema:
        return "figure" if schema["$ref"].endswith("/Figure") else "table"
    what = schema.get("type", "")
    if what == "array":
        inner = schema.get("prefixItems")
        if inner:
            return f"list of {len(inner)}: {'; '.join(kind(one) for one in inner)}"
        return f"list of {kind(schema.get('items', {})) or 'values'}"
    if what == "object":
        return f"table of {kind(schema['additionalProperties'])}" if isinstance(schema.get("additionalProperties"), dict) else "table"
    limits = [
        f"{word} {_number(schema[key])}"
        for key, word in (("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"), ("exclusiveMaximum", "below"))
        if key in schema and abs(schema[key]) < 1 << 40  # beyond it is a slip of the finger, not a limit that anyone meets
    ]
    return ", ".join(["true or false" if what == "boolean" else str(what), *limits])


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _default(schema: Schema, required: bool) -> str:
    if required:
        return "required"
    value = schema.get("default")
    if isinstance(value, dict) and value.get("basis") == "unknown":
        return "unknown"
    if value is None or value in ("", {}):
        return ""
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _keys(of: str, title: str, text: str) -> str:
    lines = [f"# {title}", "", text, "", MADE.format(f"`gigatrain schema {of}`"), ""]
    found = sections(of)
    tables = {section.path for section in found}
    for section in found:
        if not section.keys and section.path:
            continue
        name = f"[[{section.path}]]" if section.listed else f"[{section.path}]"
        lines += [f"## `{name}` {{ #{section.path} }}" if section.path else "## Before any table { #top }", ""]
        lines += [cell(section.text.split("\n\nRaises")[0]), "", "| key | type | default | what it does |", "|---|---|---|---|"]
        for key, schema, required in section.keys:
            at = f"{section.path}.{key}".lstrip(".")
            row = (
                f"`{key}`" if at in tables else f'<span id="{at}">`{key}`</span>',
                kind(schema),
                _default(schema, required),
                schema.get("description", ""),
            )
            lines.append("| " + " | ".join(cell(part) for part in row) + " |")
        lines.append("")
    return "\n".join(lines)


def cell(text: str) -> str:
    """A text within a table: on one line, with its bars escaped, and no tag of HTML but our own anchors."""
    found = " ".join(text.split()).replace("|", "\\|")
    return re.sub(r"<(?!/?span\b)", "&lt;", found)


# Commands, from argparse.


def parsers() -> dict[str, argparse.ArgumentParser]:
    """`gigatrain plan` -> its parser, the groups (`gigatrain bench`) left out."""
    return dict(_parsers(parser.build()))


def _parsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not any(group.required for group in groups):
        yield parser.prog, parser
    for group in groups:
        for inner in group.choices.values():
            yield from _parsers(inner)


def commands() -> str:
    """Every command: usage, what it does with examples, and its options."""
    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ |= {"COLUMNS": "110", "NO_COLOR": "1"}  # argparse reads them
    lines = ["# Commands", "", "Each shows the same by `--help`.", "", MADE.format("the parser of `gigatrain`"), ""]
    try:
        for name, parser in parsers().items():
            lines += [f"## {name}", "", "```text", parser.format_usage().strip(), "```", ""]
            lines += ["```text", (parser.description or "").strip(), "```", "", "| argument | what it does |", "|---|---|"]
            for action in parser._actions:
                if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
                    continue
                takes = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
                takes = "|".join(map(str, action.choices)) if action.choices and action.metavar is None else takes
                takes = f"{takes} …" if action.nargs == "+" else takes
                names = ", ".join(action.option_strings) or f"{takes}"
                written = f"{names} {takes}" if action.option_strings and action.nargs != 0 else names
                needed = "" if not action.required or not action.option_strings else " (required)"
                said = (action.help or "").replace("%%", "%")
                lines.append(f"| `{cell(written)}` | {cell(said + needed)} |")
            lines.append("")
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    return "\n".join(lines)


# What a command leaves with.


def codes() -> dict[str, tuple[str, str]]:
    """Code -> (name in `gigatrain.errors` or elsewhere, what it says), in the order of the codes."""
    found = {
        "0": ("", "It is done."),
        "1": ("", "Something else: no memory on this machine, a file system that fails, or a mistake of ours."),
    }
    kinds = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, errors.GigatrainError)]
    for one in sorted(kinds, key=lambda one: one.exit_code):
        if one is not errors.GigatrainError:
            found[str(one.exit_code)] = (one.__name__, inspect.getdoc(one) or "")
    found[str(errors.REQUEUE)] = (
        "REQUEUE",
        "It was asked to leave and is saved: start the same command again, with --resume or --continue.",
    )
    found[str(restart.NO_PROGRESS)] = (
        "NO_PROGRESS",
        "Restarts in place gained no step: do not start it again as it is; the log says what to mend.",
    )
    found["130"] = ("", "Ctrl-C, where there was nothing to save.")
    found["128 + N"] = ("", "Signal N ended it: 137 is SIGKILL, mostly the kernel's for want of memory.")
    return found


def exit_codes() -> str:
    """The table of codes."""
    lines = ["# Exit codes", "", "A user's error is one message without a traceback, and the code of its kind.", ""]
    lines += [MADE.format("`gigatrain/errors.py`"), "", "| code | kind | it says |", "|---|---|---|"]
    lines += [f"| {code} | {f'`{name}`' if name else ''} | {cell(text)} |" for code, (name, text) in codes().items()]
    return "\n".join([*lines, "", "What a job's script does with each is in RELIABILITY.md.", ""])


def metrics() -> str:
    """Prometheus' names."""
    lines = [
        "# Metrics for Prometheus",
        "",
        "`gigatrain watch RUN --serve 9400` serves them from a run's folder, `report.prometheus = 9400` from the run itself; a scraper brings the bearer "
        "token whose place is printed. All are gauges, since a resume takes steps and tokens back, and each has the label `run`. What is unknown has no "
        "sample. `launch/grafana.json` is a dashboard of them.",
        "",
        MADE.format("`gigatrain/observe/prometheus.py`"),
        "",
        "| name | what |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| `gigatrain_{name}` | {cell(text)} |" for name, text, _ in prometheus.METRICS), ""])


# What is shipped.


def sites() -> str:
    """The table of `gigatrain sites`, and each site's own source."""
    lines = ["# Shipped sites", "", "`gigatrain sites NAME` shows every figure of one with its unit, basis and source.", ""]
    lines += [f"- **{basis}**: {what}" for basis, what in BASES.items()]
    lines += ["", MADE.format("`launch/sites/*.toml`"), ""]
    head = ("name", "in", "accelerators", "H100-equivalents", "MW", "PUE", "scheduler", *get_args(Basis), "what it is")
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for path in load.sites().values():
        site = load.site(path)
        figures = [figure.basis for _, figure in site.figures()]
        total = site.power.facility_watts.value or site.power.it_watts.value
        row = (
            f"`{site.name}`",
            site.country,
            f"{_count(site.accelerators.value)} {f'`{site.accelerator}`' if site.accelerator else '?'}"
            if site.device == "cuda"
            else "none",
            _count(site.h100e.value),
            f"{total / 1e6:,.1f}" if total else "?",
            f"{site.power.pue.value:g}" if site.power.pue.value else "?",
            "?" if site.scheduler.kind == "unknown" else site.scheduler.kind,
            *(str(figures.count(basis)) for basis in get_args(Basis)),
            site.summary,
        )
        lines.append("| " + " | ".join(cell(part) for part in row) + " |")
    lines += ["", "MW is the facility's, else IT's. The four columns before the last count a site's figures by their basis.", ""]
    lines += ["## Accelerators", "", "What a site's `accelerator` may be.", ""]
    lines += ["| id | what | memory, GiB | dense bf16, TFLOP/s | watts |", "|---|---|---|---|---|"]
    for name in get_args(Accelerator):
        chip = hardware.chip(name)
        row = (f"`{name}`", chip.name, *(_count(value) for value in _facts(chip)))
        lines.append("| " + " | ".join(cell(part) for part in row) + " |")
    return "\n".join([*lines, ""])


def _facts(chip: Any) -> tuple[float | None, ...]:
    return (chip.hbm_bytes.value and chip.hbm_bytes.value / 2**30, chip.tflops("bf16").value, chip.watts.value)


def _count(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def models() -> str:
    """Shipped recipes by model, named architectures with their counts, and families."""
    lines = ["# Models and recipes", "", "## Shipped recipes", ""]
    lines += [
        "`MODEL/TASK` is a recipe: `gigatrain train llama-3.1-8b/sft`; with `-tiny` behind it, its twin of the same shape, small enough for a laptop.",
        "",
    ]
    lines += [
        MADE.format("`gigatrain recipes`"),
        "",
        "| model | by | licence | parameters | active for a token | tasks |",
        "|---|---|---|---|---|---|",
    ]
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in shelf.rows():
        by_model.setdefault(row["name"].partition("/")[0], []).append(row)
    for name, several in by_model.items():
        first = several[0]
        page = f"recipes/{name}/README.md"
        named = f"[`{name}`](../recipes/{name}.md)" if (ROOT / page).is_file() else f"`{name}`"
        tasks = ", ".join(f"`{row['task']}`" for row in several) if "/" in first["name"] else first["summary"]
        row = (named, f"{first['maker']} {first['country']}", first["licence"], f"{first['parameters']:,}", f"{first['active']:,}", tasks)
        lines.append("| " + " | ".join(cell(part.strip()) for part in row) + " |")
    lines += ["", "## Named architectures", "", "A recipe takes one by `model.architecture`, and changes a number of it beside `base`.", ""]
    lines += ["| name | family | parameters | active for a token | layers | hidden | vocabulary |", "|---|---|---|---|---|---|---|"]
    for name in sorted(architectures.named()):
        shape = Architecture.model_validate_json(json.dumps(architectures.resolve(name)))
        numbers = (shape.parameters(), shape.active_parameters(), shape.layers, shape.hidden, shape.vocab)
        lines.append(f"| `{name}` | {shape.family} | " + " | ".join(f"{number:,}" for number in numbers) + " |")
    families = load.schema("recipe")["$defs"]["Architecture"]["properties"]["family"]["enum"]
    lines += [
        "",
        "## Families",
        "",
        "Checked against transformers in float64: " + ", ".join(f"`{family}`" for family in families) + ".",
        "",
    ]
    return "\n".join([*lines, "Any other causal model of transformers trains by its own code, by `model.from`.", ""])


def kernels() -> str:
    """Every operation: its file, its versions, what it says of itself."""
    from gigatrain.kernels import ops  # torch, 2 s

    chosen = set(ops.available())
    lines = ["# Kernels and their versions", "", "The plan chooses one version per operation and prints why. A recipe overrules it by", ""]
    lines += ["```toml", 'kernels = { attention = "sdpa" }   # or "reference" for all', "```", ""]
    lines += [
        "*Judged* versions compute the same numbers as `reference`, to rounding; *narrow* ones compute in low precision and are only taken where a recipe asks."
    ]
    lines += [
        "",
        MADE.format("`gigatrain/kernels`"),
        "",
        "| operation | file | judged versions | narrow | not on |",
        "|---|---|---|---|---|",
    ]
    for module in ops.MODULES:
        file = Path(inspect.getfile(module)).name
        for name, operation in module.OPERATIONS.items():
            mark = "" if name in chosen else " \\*"
            refused = "; ".join(f"{target}: {why}" for target, why in operation.refuses.items())
            row = (", ".join(f"`{one}`" for one in operation.versions), ", ".join(f"`{one}`" for one in operation.narrow), cell(refused))
            lines.append(f"| `{name}`{mark} | `{file}` | " + " | ".join(row) + " |")
    lines += ["", "\\* not of the model: the optimizer's, or a part of another operation.", "", "## What each file says", ""]
    for module in ops.MODULES:
        lines += [f"### {Path(inspect.getfile(module)).name}", "", "```text", (inspect.getdoc(module) or "").strip(), "```", ""]
    return "\n".join(lines)


def write(folder: Path) -> list[Path]:
    """All pages of the reference as files below `folder`."""
    written = []
    for name, text in reference().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description="Write the generated reference as Markdown.")
    asked.add_argument("folder", metavar="DIR", type=Path)
    for one in write(asked.parse_args().folder):
        print(one)
