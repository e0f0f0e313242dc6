"""Every figure that the pages claim, on one page: benchmarks/README.md, made of the rows in results/ and of the list in figures.toml.

    python benchmarks/figures.py --check    what a page says and no row or entry of the log supports; 1 if there is any
    python benchmarks/figures.py --write    benchmarks/README.md

figures.toml has three kinds. A `part` is rows of one file: `where` chooses them (a pattern for each column), `columns` shows them, and `says` are the
sentences that pages make of them, without the numbers: these are filled in from the rows, and the whole must then stand on the page. `let` names a number of a
sentence: `a.x / b.x` (of the rows labelled a and b), `most:x`, `least:x`, `only:x` (of all rows, or of those that the sentence's own `where` chooses). A `hand`
has no row: its sentences must stand on its page, and `entry` in the log under the heading `log`. An `open` is not measured; its command measures it.
In the sections named by `covered` every number outside of code has to be one of these, or `given`: a setting.
"""

import argparse
import csv
import fnmatch
import functools
import operator
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT, HERE = Path(__file__).parents[1], Path(__file__).parent
PAGE = HERE / "README.md"
FIGURES: dict[str, Any] = tomllib.loads((HERE / "figures.toml").read_text(encoding="utf-8"))
KEPT = ("commit", "op", "size", "mode", "date", "device", "versions", "load")
NO_PEERS = (
    "gigatrain lean",
    "gigatrain blocked",
    "gigatrain chunked",
    "products",
)  # our own for CPUs, and products alone, which are not the same work
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*\.\d+|\d[\d,]*(?= ?(?:%|tokens/s|times|[GMk]B\b|[GM]iB\b|ms\b|us\b|s\b|W\b))|\d{1,3}(?:,\d{3})+")
OPERATORS = {"*": operator.mul, "/": operator.truediv, "-": operator.sub}
FLOAT = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?", re.IGNORECASE)
Row = dict[str, Any]


class Unsupported(Exception):
    """A figure that no row supports; the text says which and why."""


@functools.cache
def rows_of(file: str) -> tuple[Row, ...]:
    """The rows of a file in results/, in its order."""
    with (HERE / "results" / file).open(newline="") as lines:
        return tuple({key: float(cell) if FLOAT.fullmatch(cell) else cell for key, cell in row.items()} for row in csv.DictReader(lines))


def plain(cell: Any) -> str:
    """A cell as the file has it."""
    return f"{cell:.0f}" if isinstance(cell, float) and cell.is_integer() else str(cell)


def chosen(rows: Iterable[Row], where: Mapping[str, str]) -> list[Row]:
    """The rows whose columns match all patterns; a pattern may have alternatives with `|` between them."""
    wanted = {key: re.compile("|".join(map(fnmatch.translate, pattern.split("|")))) for key, pattern in where.items()}
    found = [row for row in rows if all(pattern.match(plain(row[key])) for key, pattern in wanted.items())]
    if not found:
        raise Unsupported(f"no row has {dict(where)}")
    return found


def beside(rows: Iterable[Row]) -> list[Row]:
    """Rows of kernels.csv by operation, size and mode: microseconds of each provider, of ours and of the fastest other; `ratio` above 1: ours is faster."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if isinstance(row["us"], float):  # else refused, not installed, or out of time
            groups.setdefault(tuple(row[key] for key in KEPT[:4]), {})[row["provider"]] = row
    found = []
    for timed in groups.values():
        ours = timed.pop("gigatrain fused", None)
        peers = [row for name, row in timed.items() if name not in NO_PEERS]
        peer = min(peers, key=lambda row: row["us"])
        made = {"us": "", "pct": "", "mib": "", "ratio": ""} | {key: peer[key] for key in KEPT}
        made |= {name: row["us"] for name, row in timed.items()}
        made |= {"peer": peer["provider"], "peer_us": peer["us"], "peer_mib": peer["peak_mib"]}
        if ours:
            made |= {"us": ours["us"], "pct": ours["pct"], "mib": ours["peak_mib"], "ratio": peer["us"] / ours["us"]}
        found.append(made)
    return found


def part_rows(part: Mapping[str, Any]) -> list[Row]:
    """The rows of a part."""
    rows = chosen(rows_of(part["file"]), part.get("where", {}))
    return beside(rows) if part.get("beside") else rows


def value(term: str, rows: list[Row], labelled: Mapping[str, Row]) -> Any:
    """What a term of `let` or `columns` stands for: a number, `least:x`, `most:x` or `only:x` of the rows, `label.x`, or a column of the first row."""
    if FLOAT.fullmatch(term):
        return float(term)
    how, _, column = term.partition(":")
    if how in ("least", "most", "only") and column:
        cells = [row[column] for row in rows if row.get(column, "") != ""]
        if not cells or (how == "only" and len(cells) > 1):
            raise Unsupported(f"{term}: {len(cells)} rows")
        return min(cells) if how == "least" else max(cells)
    label, _, column = term.rpartition(".")
    row = labelled.get(label, {}) if label else rows[0]
    if column not in row:
        raise Unsupported(f"no row or column is called {term}")
    return row[column]


def arithmetic(text: str, rows: list[Row], labelled: Mapping[str, Row]) -> Any:
    """`a.x / b.x * 100`, from left to right."""
    words = re.split(r" ([-*/]) ", text)
    found = value(words[0], rows, labelled)
    for sign, term in zip(words[1::2], words[2::2], strict=True):
        found = OPERATORS[sign](found, value(term, rows, labelled))
    return found


def flat(text: str) -> str:
    """Without the breaks of lines."""
    return re.sub(r"\s+", " ", text).strip()


def sentences(part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(page, sentence with the rows' numbers) of all that pages say of a part."""
    rows = part_rows(part)
    labelled = {row[part["label"]]: row for row in rows} if "label" in part else {}
    if labelled and len(labelled) < len(rows):
        raise Unsupported(f"several rows have the same {part['label']}: a narrower `where`")
    for said in part.get("says", ()):
        narrowed = chosen(rows, said["where"]) if "where" in said else rows
        names = {name: arithmetic(text, narrowed, labelled) for name, text in said.get("let", {}).items()}
        try:
            yield said["page"], flat(said["text"].format_map(labelled | names))
        except (KeyError, ValueError, TypeError) as error:
            raise Unsupported(f"{said['text']}: {error!r}") from None


@functools.cache
def page_text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(name: str, heading: str) -> str:
    """The text below `## heading`, up to the next one of its level."""
    return "".join(re.findall(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", page_text(name), re.MULTILINE | re.DOTALL))


def problems(figures: Mapping[str, Any]) -> list[str]:
    """Whatever a page says that its row does not, and numbers of covered sections that nothing here stands for."""
    found: list[str] = []
    claims: list[tuple[str, str, str]] = []  # page, sentence, what has it
    for part in figures["part"]:
        try:
            claims += [(page, text, f"results/{part['file']}") for page, text in sentences(part)]
        except Unsupported as error:
            found.append(f"{part['title']}: {error}")
    for hand in figures["hand"]:
        claims += [(hand["page"], flat(text), "figures.toml") for text in hand["text"]]
        if "log" in hand and flat(hand["entry"]) not in flat(section("benchmarks/LOG.md", hand["log"])):
            found.append(f"benchmarks/LOG.md has no entry {hand['log']} with: {hand['entry']}")
    pages = {page: flat(page_text(page)) for page in {page for page, _, _ in claims}}
    found += [f"{page} does not say, as {source} has it: {text}" for page, text, source in claims if text not in pages[page]]
    for page, heading in ((page, heading) for page, headings in figures["covered"].items() for heading in headings):
        left = flat(section(page, heading)) or "0.0 (there is no such section)"
        for text in sorted((*figures["given"], *(text for where, text, _ in claims if where == page)), key=len, reverse=True):
            left = left.replace(text, " … ")
        left = re.sub(r"```.*?```|`[^`]*`", " ", left)
        near = [left[max(0, match.start() - 40) : match.end() + 20] for match in NUMBER.finditer(left)]
        found += [f"{page}, {heading}: no row and no entry for … {text} …" for text in near]
    return found


def conditions(rows: list[Row]) -> str:
    """What rows say of when, where and with what they were taken."""
    words = []
    for key in ("date", "device", "cpu", "threads", "load", "commit", "versions"):
        cells = [plain(row[key])[: 10 if key == "date" else None] for row in rows if row.get(key, "") != ""]
        if key == "versions":  # "a=1 b=2", "a 1 b 2" or JSON; of all rows, each once
            pairs = [pair for cell in cells for pair in re.findall(r'([\w.-]+)"?[= :]+"?(\d[\w.+-]*)', cell)]
            cells = [" ".join(pair) for pair in pairs if pair[0] not in ("cores", "threads", "gigatrain")]
        if key == "load" and cells:
            cells = [" to ".join(dict.fromkeys((min(cells, key=float), max(cells, key=float))))]
        words += [f"{key} {', '.join(dict.fromkeys(cells))}"] if cells else []
    return re.sub(r"(?:date|device|cpu|versions) ", "", "; ".join(words))


def quoted(text: str) -> str:
    """A sentence of a page, without its marks."""
    return f'"{re.sub(r"[*`]", "", flat(text)).strip("| ")}"'


def table(headings: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = (headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows))
    return [f"| {' | '.join(line)} |" for line in lines]


def cell(text: str, row: Row) -> str:
    """A cell of the page: `column:format`, empty where the row has nothing."""
    term, _, form = text.partition(":")
    if row.get(re.split(r" [-*/] ", term)[0], term) == "":
        return ""
    found = arithmetic(term, [row], {})
    return format(found, form) if form else plain(found)


def shown(part: Mapping[str, Any]) -> Iterator[str]:
    """A part as Markdown."""
    rows = part_rows(part)
    yield from (f"## {part['title']}", "", f"**Measured on {part['measured']}.** {flat(part['text'])}", "")
    yield from (f"{conditions(rows)}.", "")
    where = ", ".join(f"{key} = {pattern}" for key, pattern in part.get("where", {}).items())
    yield f"Rows: [results/{part['file']}](results/{part['file']}){f', {where}' if where else ''}. Again: `{part['again']}`"
    yield from ("", *table([*part["columns"]], ([cell(text, row) for text in part["columns"].values()] for row in rows)), "")
    said = list(sentences(part))
    yield f"Said in: {', '.join(dict.fromkeys(page for page, _ in said)) or 'no page yet'}."
    yield from ("", *(f"* {page}: {quoted(text)}" for page, text in said if not text.startswith("|")), "")


def written(figures: Mapping[str, Any]) -> str:
    """benchmarks/README.md."""
    lines = ["# Numbers", "", figures["intro"].strip(), "", *(line for part in figures["part"] for line in shown(part))]
    lines += ["## By hand", "", figures["by_hand"].strip(), ""]
    hands = [
        ("; ".join(quoted(text) for text in one["text"]), one["page"], one.get("log", "none"), one["measured"], f"`{one['again']}`")
        for one in figures["hand"]
    ]
    lines += [*table(("figure", "said in", "entry of the log", "measured on", "again"), hands), ""]
    lines += ["## Not yet measured", "", figures["not_measured"].strip(), ""]
    lines += table(("what", "why not yet", "measures it"), ((one["what"], one["why"], f"`{one['again']}`") for one in figures["open"]))
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check, or write the page; 1 if a page says what no row does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0], epilog="Read the head of this file.")
    parser.add_argument("--check", action="store_true", help="what it does anyway")
    parser.add_argument("--write", action="store_true", help="benchmarks/README.md, whatever is wrong elsewhere")
    if parser.parse_args().write:
        PAGE.write_text(written(FIGURES), encoding="utf-8")
    found = problems(FIGURES)
    if PAGE.read_text(encoding="utf-8") != written(FIGURES):
        found.append("benchmarks/README.md is not what python benchmarks/figures.py --write makes")
    print("\n".join(found) or "every figure has its row or its entry")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
