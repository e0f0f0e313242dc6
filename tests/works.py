"""The table "What works today" of README.md, made of tests that passed: tests/works.toml says which tests a row stands on.

    python tests/works.py --write                 the table into README.md, as it is if the named tests pass
    python tests/works.py --results DIR           what the JUnit files in DIR say of each row; exit code 1 where one is not kept (.ci/run ends with this)

A row's answer is never typed. `tests` give "tested" (all must have passed, and not all have been skipped), `measured` names a row of benchmarks/results and its
device, and what has neither is "not yet".
"""

import argparse
import ast
import csv
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
OTHER_DAY = "in the share of another day"  # why a long test was left out (tests/conftest.py)
BEGIN, END = "<!-- works: made by tests/works.py -->\n", "<!-- /works -->\n"


@dataclass(frozen=True)
class Row:
    """What a user may count on, how far, and the evidence."""

    what: str
    where: str  # on what it was seen: "1 and 2 processes on CPUs"
    tests: tuple[str, ...]  # tests/file.py::name, or a file: all in it
    measured: tuple[str, ...]  # results/file.csv, column, text that a value of it holds

    def answer(self) -> str:
        said = ["tested"] if self.tests else []
        said += [f"run on one {self.measured[2]}"] if self.measured else []
        return f"{' and '.join(said)}: {self.where}" if said else f"not yet{': ' + self.where if self.where else ''}"

    def missing(self) -> list[str]:
        """Evidence that is not there: tests that no file holds, rows that no benchmark wrote."""
        found = [name for name in self.tests if not _exists(name)]
        if self.measured:
            file, column, text = self.measured
            with (ROOT / "benchmarks" / "results" / file).open(newline="", encoding="utf-8") as lines:
                if not any(text in (line.get(column) or "") for line in csv.DictReader(lines)):
                    found.append(f"{file}: no {column} with {text!r}")
        return found


def rows() -> list[Row]:
    text = tomllib.loads((ROOT / "tests" / "works.toml").read_text(encoding="utf-8"))
    return [Row(one["what"], one.get("where", ""), tuple(one.get("tests", ())), tuple(one.get("measured", ()))) for one in text["row"]]


def table(of: Iterable[Row]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {row.what} | {row.answer()} |\n" for row in of)


def shown() -> str:
    """The table that README.md shows."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition(BEGIN)[2].partition(END)[0]


def _exists(name: str) -> bool:
    path, _, function = name.partition("::")
    if not (ROOT / path).is_file():
        return False
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return function in names if function else any(one.startswith("test_") for one in names)


def outcomes(folder: Path) -> dict[str, set[str]]:
    """Of each test function, as tests/file.py::name, what became of its cases, from all JUnit files of a folder."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.xml")):
        for case in ET.parse(path).getroot().iter("testcase"):
            module = case.get("classname", "").replace(".", "/")
            name = f"{module}.py::{case.get('name', '').partition('[')[0]}"
            ends = {child.tag for child in case} & {"failure", "error", "skipped"}
            if any(child.get("message") == OTHER_DAY for child in case):
                ends = {OTHER_DAY}
            found.setdefault(name, set()).update(ends or {"passed"})
    return found


def unkept(row: Row, seen: Mapping[str, set[str]]) -> list[str]:
    """What a row says and these results do not: a case failed, or none passed, unless all are left for another day."""
    found = []
    for test in row.tests:
        ends = [end for name, end in seen.items() if name == test or name.startswith(f"{test}::")]
        together: set[str] = set().union(*ends)
        if together == {OTHER_DAY}:
            continue
        if not ends or together & {"failure", "error"} or "passed" not in together:
            found.append(f"{test}: {', '.join(sorted(together)) or 'did not run'}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--results", type=Path, metavar="DIR")
    asked = parser.parse_args()
    there = rows()
    if asked.write:
        path = ROOT / "README.md"
        text = path.read_text(encoding="utf-8")
        assert BEGIN in text, "README.md has no place for the table"
        path.write_text(text.partition(BEGIN)[0] + BEGIN + table(there) + END + text.partition(END)[2], encoding="utf-8")
    wrong = [f"{row.what}: {said}" for row in there for said in row.missing()]
    if asked.results is not None:
        seen = outcomes(asked.results)
        wrong += [f"{row.what}: {said}" for row in there for said in unkept(row, seen)]
    print("\n".join(wrong) if wrong else f"{len(there)} rows, {sum(len(row.tests) for row in there)} tests: all kept")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
