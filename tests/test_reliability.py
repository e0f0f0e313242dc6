"""RELIABILITY.md: every test that it names exists, and every promise has one or says that it is open."""

import re
from pathlib import Path

from gigatrain.bench.inject import FAULTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "RELIABILITY.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PAGE)
    assert len(named) >= 30
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"


def test_every_promise_is_there_with_a_test_or_called_open():
    rows = {match[1]: match[0] for match in re.finditer(r"^\| (P\d+) \|.*$", PAGE, re.MULTILINE)}
    assert list(rows) == [f"P{number}" for number in range(1, 20)]
    for promise, row in rows.items():
        assert "::test_" in row or "open" in row, promise


def test_every_fault_of_the_matrix_is_on_the_page():
    missing = [name for name in FAULTS if f"`{name}`" not in PAGE]
    assert not missing
