"""benchmarks/soak.py: a leak that is there is found, and noise is none. Its whole form is a command (minutes), not a test."""

import random

import pytest
from programs import program

from gigatrain import load


@pytest.fixture(scope="module")
def soak():
    return program("benchmarks/soak.py")


def looks(count, value, begin=0.0):
    return [(begin + number / 2, value(number)) for number in range(count)]


def test_a_leak_within_a_process_is_found_and_noise_is_none(soak):
    draw = random.Random(3)
    flat = looks(600, lambda _: 200 + draw.gauss(0, 1))
    warm = looks(600, lambda number: 200 - 80 * 0.9**number)  # what a process takes as it warms up is none
    leaky = looks(600, lambda number: 200 + 0.02 * number + draw.gauss(0, 1))
    assert soak.gained({("supervisor", 1): flat})["supervisor"] == pytest.approx(0, abs=0.5)
    assert soak.gained({("rank 0", 1): flat, ("rank 1", 2): warm})["rank"] < 0.5
    found = soak.gained({("rank 0", 1): flat, ("rank 1", 2): leaky})["rank"]
    assert found == pytest.approx(0.02 * 519, abs=0.5)
    assert found > soak.MOST_MIB
    assert soak.gained({("supervisor", 1): looks(90, lambda number: 10.0 * number)}) == {}  # what is warming up tells nothing


def test_a_leak_from_start_to_start_is_found_in_processes_that_are_each_flat(soak):
    starts = {("rank 1", 100 + start): looks(20, lambda _, start=start: 30.0 + start, 100.0 * start) for start in range(24)}
    assert soak.gained(starts) == {"later ranks": pytest.approx(23)}
    same = {("rank 1", 100 + start): looks(20, lambda _: 30.0, 100.0 * start) for start in range(24)}
    assert soak.gained(same) == {"later ranks": 0}


def test_the_corpus_of_a_leg_has_its_bad_documents(soak, tmp_path):
    lab = soak.prepared(tmp_path, "moe")
    recipe = load.recipe(lab.recipe, list(lab.sets))
    assert [(one.kind, one.weight) for one in recipe.data.sources] == [("text", 0.2), ("jsonl", 0.8)]
    lines = (tmp_path / "records.jsonl").read_bytes().split(b"\n")
    assert [lines.count(line) for line in soak.BAD_LINES] == [1] * len(soak.BAD_LINES)
    assert set(soak.BAD_FILES) < {path.name for path in (tmp_path / "corpus").iterdir()}
