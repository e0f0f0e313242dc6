"""benchmarks/README.md: every figure that a page claims has its row or its entry in the log, and says what that says."""

import re
from pathlib import Path

import pytest
from programs import program

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def figures():
    return program("benchmarks/figures.py")


@pytest.fixture
def pages(figures, monkeypatch):
    """Pages that are changed for one test: `pages["README.md"] = …`."""
    changed = {}
    true = figures.page_text
    monkeypatch.setattr(figures, "page_text", lambda name: changed.get(name) or true(name))
    return changed


def test_every_figure_of_the_pages_is_that_of_its_row(figures):
    assert figures.problems(figures.FIGURES) == []


def test_the_page_is_the_one_that_the_program_writes(figures):
    assert figures.PAGE.read_text(encoding="utf-8") == figures.written(figures.FIGURES)


@pytest.mark.parametrize(
    ("page", "true", "false"),
    [
        ("README.md", "**8,853**", "**8,854**"),  # of a row
        ("README.md", "cross entropy 2.4 times", "cross entropy 2.5 times"),  # of two rows
        ("docs/peers.md", "59,030", "60,000"),
        ("PLANNER.md", "| MoE | 51 | 12.1% |", "| MoE | 51 | 11.1% |"),
        ("RELIABILITY.md", "measured 76.0 %", "measured 86.0 %"),  # by hand
        ("benchmarks/LOG.md", "training again 1.6 to 2.3 s", "training again 0.6 to 1.3 s"),  # its entry
    ],
)
def test_another_number_on_a_page_is_found(figures, pages, page, true, false):
    assert true in figures.page_text(page)
    pages[page] = figures.page_text(page).replace(true, false)
    assert any(page in problem for problem in figures.problems(figures.FIGURES))


def test_a_number_that_nothing_stands_for_is_found(figures, pages):
    for said in ("gigatrain is 3.1 times as fast.", "It takes 70 % of that.", "It makes 123,456 of them."):
        pages["docs/peers.md"] = figures.page_text("docs/peers.md") + f"\n{said}\n"
        assert [problem for problem in figures.problems(figures.FIGURES) if "docs/peers.md, Figures: no row" in problem]
    pages["docs/peers.md"] = figures.page_text("docs/peers.md").replace("## Figures", "## Numbers")
    assert any("docs/peers.md, Figures" in problem for problem in figures.problems(figures.FIGURES))


def test_a_row_that_is_not_there_and_rows_that_cannot_be_told_apart_are_found(figures):
    part = next(part for part in figures.FIGURES["part"] if part["file"] == "step.csv")
    with pytest.raises(figures.Unsupported, match="no row"):
        list(figures.sentences(part | {"where": {"date": "1999*"}}))
    with pytest.raises(figures.Unsupported, match="several rows"):
        list(figures.sentences(part | {"where": {}}))
    with pytest.raises(figures.Unsupported, match="2 rows"):
        figures.value("only:x", [{"x": 1.0}, {"x": 2.0}], {})
    with pytest.raises(figures.Unsupported, match="called"):
        figures.cell("tokens_per_week", {"tokens_per_s": 1.0})


def test_arithmetic_goes_from_left_to_right_over_rows(figures):
    rows = [{"x": 2.0, "y": ""}, {"x": 8.0, "y": 1.0}]
    labelled = dict(zip(("a b", "c+d"), rows, strict=True))
    assert figures.arithmetic("c+d.x - a b.x / 2 * 100", rows, labelled) == 300
    assert figures.arithmetic("most:x / least:x", rows, labelled) == 4
    assert figures.arithmetic("only:y", rows, labelled) == 1
    assert figures.cell("x * 100:.1f", rows[0]) == "200.0"
    assert figures.cell("y * 100:.1f", rows[0]) == ""


def test_kernels_stand_beside_the_fastest_other_version_that_does_the_same(figures):
    def row(provider, us):
        return dict.fromkeys(figures.KEPT, "k") | {"provider": provider, "us": us, "pct": 50.0, "peak_mib": 1.0}

    timed = [row("gigatrain fused", 10.0), row("gigatrain lean", 1.0), row("products", 2.0), row("liger", 20.0), row("torch", 40.0)]
    (found,) = figures.beside([*timed, row("quack", "")])
    assert (found["us"], found["peer"], found["ratio"], found["torch"]) == (10.0, "liger", 2.0, 40.0)
    (lost,) = figures.beside([row("gigatrain fused", ""), row("torch", 40.0)])
    assert (lost["us"], lost["peer_us"], lost["ratio"]) == ("", 40.0, "")


def test_every_program_and_file_that_measures_again_is_there(figures):
    listed = figures.FIGURES
    for one in (*listed["part"], *listed["hand"], *listed["open"]):
        for path in re.findall(r"(?:benchmarks|tests)/[\w/]+(?:\.py)?", one["again"]):
            assert (ROOT / path).exists(), one["again"]
