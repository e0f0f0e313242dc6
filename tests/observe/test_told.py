"""A run's events as they add up: what a look costs and what is kept do not grow with the run, and nothing is lost by it."""

import json
import random
import sys
import tracemalloc

import pytest
from test_watch import event, made, window

from gigatrain.observe import told as telling
from gigatrain.observe.goodput import goodput_of, sessions_of
from gigatrain.observe.legs import legs_of
from gigatrain.observe.reader import Reader
from gigatrain.observe.told import Told

LEGS = {"legs": [{"step": 0, "began": "2026-01-01T00:00:00+00:00", "site": "here"}]}


def report(process, step):
    return event(process, 1000 + step, "report", step=step, tokens=step * 64, seconds={"training": 0.9, "data": 0.05})


def trained(folder, windows):
    """A run of so many windows, of one process."""
    begins = [event("0", 1000, "start"), event("0", 1000.5, "steps", step=0)]
    made(folder, [*begins, *(report("0", step) for step in range(1, windows + 1))], [window(step) for step in range(1, windows + 1)])
    (folder / "run.json").write_text(json.dumps(LEGS))
    return folder


def cost(folder, windows):
    """Calls that a look at a run with one new window takes, and bytes that its reader holds."""
    tracemalloc.start()
    reader = Reader(folder, now=lambda: 1001.0 + windows)
    reader.seen()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    for name, line in (("logs/progress.jsonl", report("0", windows + 1)), ("metrics.jsonl", window(windows + 1))):
        with (folder / name).open("a") as file:
            file.write(line)
    calls = 0

    def count(_frame, kind, _value):
        nonlocal calls
        calls += kind in ("call", "c_call")

    sys.setprofile(count)
    seen = reader.seen()
    sys.setprofile(None)
    assert seen["step"] == windows + 1
    assert seen["goodput"]["seconds"]["training"] == pytest.approx(0.9 * (windows + 1))
    assert seen["legs"][0]["tokens"] == 64 * (windows + 1)
    return calls, held


def test_a_look_costs_what_is_new_and_memory_does_not_grow_with_the_run(tmp_path):
    """It is made in rank 0's process at every scrape."""
    few, many = (cost(trained(tmp_path / str(windows), windows), windows) for windows in (1_500, 6_000))
    assert many[0] < 1.1 * few[0]
    assert many[1] < few[1] + (256 << 10)


def story(random):
    """Processes that go on from where the one before ended, before it or never, with what a kill or a disk leaves out."""
    time_s, step, rows, legs = 1000.0, 0, [], [{"step": 0, "began": "1970-01-01T00:00:00+00:00"}]
    for process in map(str, range(random.randint(1, 5))):
        time_s += random.random() * 50
        rows.append(event(process, time_s, "start"))
        step = random.choice([step, max(0, step - random.randint(0, 30)), random.randint(0, step + 1)])
        if random.random() < 0.9:
            rows.append(event(process, time_s + 1, "steps", step=step, seconds={"compile": random.random()}))
        if random.random() < 0.3:
            legs.append({"step": step, "began": "1970-01-01T00:20:00+00:00"})
        for _ in range(random.randint(0, 8)):
            time_s, step = time_s + 1 + random.random() * 9, step + random.randint(1, 10)
            tokens = {"tokens": step * 64 + random.randint(0, 3)} if random.random() < 0.95 else {}
            rows.append(event(process, time_s, "report", step=step, seconds={"training": random.random() * 9, "data": 0.1}, **tokens))
        if random.random() < 0.5:
            why = {"why": random.choice(["lost", "finished"]), "killed": random.random() < 0.5}
            rows.append(event(process, time_s + 1, "end", **why))
    return rows, {"legs": legs}


@pytest.mark.parametrize("seed", range(40))
def test_read_as_it_grows_or_all_at_once_it_is_one_story(tmp_path, seed):
    """A process that goes back takes back what was counted; how much, only the events before it know."""
    draw = random.Random(seed)
    rows, record = story(draw)
    path = tmp_path / "logs" / "progress.jsonl"
    path.parent.mkdir()
    (tmp_path / "run.json").write_text(json.dumps(record))
    told, at = Told(tmp_path), 0
    while at < len(rows):
        more = draw.randint(1, len(rows))
        with path.open("a") as file:
            file.write("".join(rows[at : at + more]))
        told.read(record)
        at += more
    afresh = Told(tmp_path)
    afresh.read(record)
    grown, whole = told.sessions, afresh.sessions
    assert legs_of(tmp_path, record, grown, None) == legs_of(tmp_path, record, whole, None)
    assert (
        goodput_of(grown.all, None) == goodput_of(whole.all, None) == goodput_of(sessions_of([json.loads(row) for row in rows]).all, None)
    )


def test_what_a_resume_took_back_is_taken_from_what_was_seen(tmp_path):
    folder = trained(tmp_path / "run", 40)
    reader = Reader(folder, now=lambda: 1061.0)
    assert reader.seen()["goodput"]["seconds"]["training"] == pytest.approx(36)
    with (folder / "logs" / "progress.jsonl").open("a") as file:
        file.write(
            event("1", 1050, "start")
            + event("1", 1051, "steps", step=30)
            + event("1", 1060, "report", step=39, tokens=9, seconds={"training": 9})
        )
    found = reader.seen()
    assert found["goodput"]["seconds"]["training"] == pytest.approx(27 + 9)
    assert found["goodput"]["seconds"]["redone"] == pytest.approx(9)
    assert [one["step"] for one in found["restarts"]] == [30]
    (folder / "logs" / "progress.jsonl").unlink()
    assert reader.seen()["goodput"] is None


def test_reports_that_are_kept_are_the_newest_word_of_each_step(tmp_path, monkeypatch):
    monkeypatch.setattr(telling, "REPORTS", 5)
    folder = trained(tmp_path / "run", 9)
    with (folder / "logs" / "progress.jsonl").open("a") as file:
        file.write(report("1", 6))
    told = Told(folder)
    told.read(LEGS)
    assert [(one["step"], one["process"]) for one in told.reports.values()] == [(5, "0"), (7, "0"), (8, "0"), (9, "0"), (6, "1")]
