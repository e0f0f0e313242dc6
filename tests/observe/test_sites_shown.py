"""Sites on the terminal: nothing that a file says is left out, and nothing is wider than the terminal."""

import pytest

from gigatrain import load
from gigatrain.launching.size import size
from gigatrain.observe import sites


@pytest.mark.parametrize("name", load.sites())
def test_every_figure_and_every_word_is_shown(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    site = load.site(name)
    lines = sites.describe(site, "here.toml")
    text = " ".join(" ".join(lines).split())
    assert max(len(line) for line in lines) <= 100
    for path, figure in site.figures():
        assert (path if not figure.known else path.split(".")[-1]) in text
        assert " ".join(figure.source.split()[:3]) in text
    scheduler = site.scheduler
    for word in (scheduler.partition, scheduler.qos, scheduler.constraint, *scheduler.options, *scheduler.modules, *site.environment):
        assert word is None or word in text
    assert site.paths.runs in text
    assert "here.toml" in text


def test_a_table_has_a_line_a_site_and_counts_by_basis(monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    lines = sites.table([load.site("jupiter"), load.site("laptop")])
    assert max(len(line) for line in lines) <= 90
    cells = lines[1].split()
    assert cells[:7] == ["jupiter", "DE", "23,536", "gh200", "23,536", "15.8", "1.1"]
    counts = [int(cell) for cell in cells[8:12]]
    bases = [figure.basis for _, figure in load.site("jupiter").figures()]
    assert counts == [bases.count("measured"), bases.count("declared"), bases.count("assumed"), bases.count("unknown")]
    assert lines[2].split()[:3] == ["laptop", "-", "-"]


def test_a_plan_names_what_the_accelerator_s_memory_rests_on():
    site = load.site("dgx-h100").model_copy(update={"accelerator": "a100-40"})
    lines = sites.on_site(site, size(site, nodes=1))
    assert lines[0] == "  size     1 node x 8 ranks; what they draw is unknown"
    assert lines[1].startswith("  room     40.00 GiB a rank: an NVIDIA A100 SXM4 40 GB; assumed: ")
    assert lines[2] == "  assumes  40.00 GiB in an accelerator (NVIDIA's A100 data sheet, recalled, not re-read)"
    assert sites.on_site(load.site("laptop"), size(load.site("laptop"), gpus=2)) == []
