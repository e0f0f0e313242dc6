"""Which run folder is meant, where a user names none."""

import json
import os

import pytest

from gigatrain import run
from gigatrain.errors import CheckpointError, RunError


def written(folder, created, name="mine", text=None):
    folder.mkdir(parents=True)
    record = {"id": "a", "name": name, "created": created, "identity": "b", "meaning": "c"}
    (folder / "run.json").write_text(json.dumps(record) if text is None else text)
    return folder


def test_the_newest_run_of_a_recipe_is_the_one_created_last(tmp_path):
    with pytest.raises(CheckpointError, match="holds no run of mine"):
        run.newest(tmp_path, "mine")
    later = written(tmp_path / "a", "2026-11-27T10:00:00.000+00:00")
    written(tmp_path / "b", "2026-11-27T09:00:00.000+00:00")
    written(tmp_path / "c", "2026-11-27T11:00:00.000+00:00", "other")
    assert run.newest(tmp_path, "mine") == later


def test_a_broken_run_stops_nobody_where_it_is_older_and_is_refused_by_name_where_it_may_be_the_newest(tmp_path):
    whole = written(tmp_path / "whole", "2026-11-27T10:00:00.000+00:00")
    broken = written(tmp_path / "broken", "", text='{"id"')
    os.utime(broken / "run.json", (1_000_000_000, 1_000_000_000))
    assert run.newest(tmp_path, "mine") == whole
    os.utime(broken / "run.json", (4_000_000_000, 4_000_000_000))
    with pytest.raises(RunError, match=rf"{broken}/run.json is not what a run writes.*name the one that is meant with --run"):
        run.newest(tmp_path, "mine")
