"""What a job is, as data, and the history of its attempts."""

import datetime
import json

import pytest

from gigatrain.errors import RunError
from gigatrain.launching import job as jobs
from gigatrain.site import Site

SITE = Site(name="here", summary="", device="cpu")


def test_a_job_is_what_it_was_written_as(tmp_path):
    made = jobs.Job(
        name="a", run=str(tmp_path), recipe="r", workdir="w", python="p", site=SITE, nodes=3, spares=1, ranks_per_node=4, exclude=("n1",)
    )
    assert made.ranks == 12
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "job.json").write_text(made.model_dump_json())
    assert jobs.load(tmp_path) == made
    (tmp_path / "launch" / "job.json").write_text(made.model_dump_json().replace('"spares":1', '"spares":-1'))
    with pytest.raises(RunError, match="spares"):
        jobs.load(tmp_path)


def test_history_is_kept_in_order_and_survives_a_torn_line(tmp_path):
    assert jobs.history(tmp_path) == []
    jobs.record(tmp_path, "submitted", job="41", chain=None)
    jobs.record(tmp_path, "started", attempt=0)
    with (tmp_path / "launch" / "history.jsonl").open("a") as file:
        file.write('{"time": "2026-11-26", "ev')
    events = jobs.history(tmp_path)
    assert [event["event"] for event in events] == ["submitted", "started"]
    assert "chain" not in events[0]
    assert json.dumps(events)


def test_a_line_after_a_torn_one_is_not_lost(tmp_path):
    jobs.record(tmp_path, "submitted", job="41")
    with (tmp_path / "launch" / "history.jsonl").open("a") as file:
        file.write('{"time": "2026-11-26", "ev')
    jobs.record(tmp_path, "started", attempt=0)
    assert [event["event"] for event in jobs.history(tmp_path)] == ["submitted", "started"]


def test_a_run_that_is_given_no_folder_has_its_name_and_time(tmp_path):
    now = datetime.datetime(2026, 11, 27, 6, 5, 4)
    assert jobs.new_folder(tmp_path, "mine", now) == tmp_path / "mine-20261127-060504"
