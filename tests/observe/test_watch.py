"""A run seen from its folder: while it runs, when it is dead, and whatever state its files are in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gigatrain.errors import RunError
from gigatrain.observe import reader, watch
from gigatrain.observe.legs import span
from gigatrain.observe.prometheus import exposition
from gigatrain.observe.reader import Reader
from gigatrain.observe.watch import lines, spark


def train(tiny, folder, *overrides, more=()):
    sets = [part for one in ("export=false", *overrides) for part in ("--set", one)]
    command = [sys.executable, "-m", "gigatrain", "train", str(tiny), "--run", str(folder), *sets, *more]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched") / "run"
    train(tiny, folder, "train.nproc=2", "profile.ranks=[0,1]")
    return folder


def said(seen):
    return "\n".join(f"{title} {text}" for title, text, _ in lines(seen))


@pytest.mark.long
def test_a_finished_run_of_two_real_ranks(finished):
    seen = Reader(finished).seen()
    summary = json.loads((finished / "summary.json").read_text())
    assert (seen["state"], seen["step"], seen["steps"], seen["ranks"]) == ("finished", 12, 12, 2)
    assert seen["val_loss"] == summary["val_loss"]
    assert seen["tokens_per_s_mean"] == pytest.approx(summary["tokens_per_s"], rel=1e-3)
    assert len(seen["losses"]) == 6
    assert seen["mfu"] is None
    assert seen["eta_s"] is None
    assert seen["checkpoint"]["step"] == 12
    assert {row["rank"] for row in seen["slowest_ranks"]} == {0, 1}
    goodput = seen["goodput"]
    assert 0 < goodput["share"] < 1
    assert sum(goodput["seconds"].values()) == pytest.approx(goodput["wall_s"], rel=0.02, abs=0.05)
    assert goodput["seconds"]["redone"] == goodput["seconds"]["stopped"] == 0
    assert goodput["seconds"]["validation"] > 0
    assert goodput["seconds"]["checkpoint"] > 0
    text = said(seen)
    for words in ("12 of 12 (100.0%)", "not measured", "unknown: the accelerator's rate is unknown", "2 ranks"):
        assert words in text


def test_the_command_for_people_and_programs(finished):
    for options in ((), ("--once",)):  # a pipe is no terminal: once either way
        ended = subprocess.run(
            [sys.executable, "-m", "gigatrain", "watch", str(finished), *options], capture_output=True, text=True, check=True
        )
        assert "finished, 2 ranks" in ended.stdout
        assert "\x1b" not in ended.stdout
    code = "import sys; from gigatrain.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", code, "watch", str(finished), "--json"], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout)["step"] == 12


def test_a_long_name_does_not_run_into_its_state(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path = folder / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "ministral-3-14b-base-tiny"}))
    watch.watch(folder, once=True)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("ministral-3-14b-base-tiny finished, 2 ranks; ")
    assert str(watch.drawn(Reader(folder).seen()).renderables[0]).startswith("ministral-3-14b-base-tiny finished")
    assert all(line[10] == " " for line in printed[1:] if not line.startswith(" "))


def test_metrics_and_the_watched_folder_stay_as_they_were(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    Reader(folder).seen()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_that_has_not_begun_and_folders_that_are_none(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert Reader(empty).seen()["state"] == "not begun"
    (tmp_path / "job" / "launch").mkdir(parents=True)
    (tmp_path / "job" / "launch" / "history.jsonl").write_text('{"time": "T", "event": "submitted"}\n{"time": "T", "ev')
    text = said(Reader(tmp_path / "job").seen())
    assert "not begun" in text
    assert "submitted T" in text
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    for folder, why in (("other", "is not a run folder"), ("nowhere", "is no folder")):
        with pytest.raises(RunError, match=why):
            Reader(tmp_path / folder)


def window(step, **more):
    return (
        json.dumps(
            {"step": step, "loss": 5.0 - step / 100, "tokens": step * 64, "tokens_per_s": 640.0, "step_s": 0.1, "bad_steps": 0} | more
        )
        + "\n"
    )


def event(process, time_s, what, **more):
    return json.dumps({"time_s": time_s, "event": what, "attempt": int(process), "ranks": 2, "process": process, **more}) + "\n"


def made(folder, events, windows, plan=None):
    (folder / "logs").mkdir(parents=True)
    (folder / "run.json").write_text('{"id": "x", "name": "made"}')
    (folder / "plan.json").write_text(json.dumps({"name": "made", "steps": 100, "ranks": 2, "device": "cpu"} | (plan or {})))
    (folder / "metrics.jsonl").write_text("".join(windows))
    (folder / "logs" / "progress.jsonl").write_text("".join(events))
    for path in folder.rglob("*"):
        os.utime(path, (1000, 1000))
    return folder


KILLED = [
    event("0", 1000, "start"),
    event("0", 1010, "steps", step=0, seconds={"checkpoint": 4}),
    event("0", 1030, "report", step=20, tokens=1, seconds={"training": 20}),
    event("0", 1055, "report", step=40, tokens=1, seconds={"training": 20, "checkpoint": 5}),
    event("1", 1100, "start"),  # it was killed, and lost what it did after step 30
    event("1", 1108, "steps", step=30),
    event("1", 1128, "report", step=50, tokens=1, seconds={"training": 20, "paced": 1}),
]


def test_goodput_counts_what_was_kept_and_names_where_the_rest_went(tmp_path):
    folder = made(tmp_path / "run", KILLED, [window(20), window(50)])
    seen = Reader(folder, now=lambda: 1130.0).seen()
    assert seen["state"] == "running"
    assert seen["goodput"]["wall_s"] == 130
    assert seen["goodput"]["seconds"] == {
        "training": 50.0,  # 20, half of 20, 20
        "redone": 10.0,
        "data": 0.0,
        "compile": 0.0,
        "restore": 0.0,
        "validation": 0.0,
        "checkpoint": 9.0,
        "paced": 1.0,
        "starting": 6.0 + 8.0,
        "stopped": 45.0,
        "other": 1.0,
    }
    assert seen["goodput"]["share"] == pytest.approx(50 / 130)
    assert seen["eta_s"] == 50.0  # 50 steps at 1 s, saves included
    (restart,) = seen["restarts"]
    assert (restart["step"], restart["why"]) == (30, "left no word: killed, or its node was lost")
    assert "restart" in said(seen)


def test_a_dead_run_has_no_news_and_nothing_to_go(tmp_path):
    seen = Reader(made(tmp_path / "run", KILLED, [window(50)]), now=lambda: 1128.0 + 720).seen()
    assert seen["state"] == "silent"
    assert seen["eta_s"] is None
    assert "no news for 12 min" in said(seen)


def test_a_start_that_takes_long_is_no_silence(tmp_path):
    folder = made(tmp_path / "run", [*KILLED[:4], event("1", 1100, "start")], [window(50)])
    seen = Reader(folder, now=lambda: 1700.0).seen()
    assert seen["state"] == "running"
    assert seen["goodput"]["wall_s"] == 700
    assert Reader(folder, now=lambda: 3000.0).seen()["state"] == "silent"


def test_what_ranks_left_is_read_when_their_folders_change(tmp_path, monkeypatch):
    folder = made(tmp_path / "run", KILLED, [window(50)])
    errors = folder / "logs" / "attempt-000" / "errors"
    errors.mkdir(parents=True)
    calls = []
    monkeypatch.setattr(reader.failed, "failures", lambda *given: calls.append(given) or [])
    run = Reader(folder, now=lambda: 1130.0)
    for _ in range(3):
        run.seen()
    assert len(calls) == 1
    (errors / "rank-00001-hang.txt").write_text(
        '{"time": "T", "rank": 1, "ranks": 2, "node": "n", "step": 5, "phase": "x", "seconds": 3}\n'
    )
    assert run.seen()["hung_ranks"] == 1
    assert len(calls) == 2


def test_that_only_some_ranks_are_looked_at_is_said(tmp_path, monkeypatch):
    folder = made(tmp_path / "run", KILLED, [window(50)])
    (folder / "trace").mkdir()
    for rank in range(3):
        (folder / "trace" / f"rank-{rank:05d}.jsonl").write_text('{"phases": {"data": 0.1}}\n')
    monkeypatch.setattr(reader, "TRACED", 2)
    assert "only the first 2 of 3 ranks that record are looked at" in said(Reader(folder).seen())


def test_classes_are_no_more_than_the_time_when_a_clock_was_set_back(tmp_path):
    rows = [
        event("0", 1000, "start"),
        event("0", 1001, "steps", step=0),
        event("0", 1050, "report", step=9, seconds={"training": 95, "checkpoint": 4}),
    ]
    goodput = Reader(made(tmp_path / "run", rows, [window(9)]), now=lambda: 1050.0).seen()["goodput"]
    assert sum(goodput["seconds"].values()) == pytest.approx(goodput["wall_s"])
    assert goodput["share"] == pytest.approx(0.95)


def test_that_no_save_has_ever_come_about_is_said(tmp_path):
    """The one who reads it would lose the whole run."""
    rows = [*KILLED[:3], event("0", 1031, "not saved", why="the disk is full")]
    seen = Reader(made(tmp_path / "run", rows, [window(20)]), now=lambda: 1040.0).seen()
    assert ("NOT SAVED", "the disk is full", "bold yellow") in lines(seen)
    assert "checkpoint none yet" in said(seen)
    assert "gigatrain_checkpoint_step{" not in exposition(seen)
    damaged = [*rows, event("0", 1032, "saved", stall_share=0.1)]
    assert Reader(made(tmp_path / "damaged", damaged, [window(20)]), now=lambda: 1040.0).seen()["checkpoint"] is None


def test_a_save_that_told_half_of_its_cost_is_shown_without(tmp_path):
    folder = made(tmp_path / "run", [*KILLED[:3], event("0", 1032, "saved", stall_share=0.1)], [window(20)])
    (folder / "checkpoints" / "step-00000020").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000020" / "COMMITTED").write_text("")
    assert "checkpoint step 20, " in said(Reader(folder).seen())


def test_a_folder_without_a_name_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(made(tmp_path / "mine", KILLED, [window(50)]))
    assert Reader(Path(".")).seen()["run"] == str(tmp_path / "mine")


def test_a_run_that_nobody_launched_knows_its_accelerator_by_its_site(tmp_path):
    more = {"device": "cuda", "flops_per_token": 1e12, "site": "leonardo"}
    assert Reader(made(tmp_path / "run", KILLED, [window(50)], more)).seen()["mfu"] > 0
    assert Reader(made(tmp_path / "own", KILLED, [window(50)], more | {"site": "mine"})).seen()["mfu"] is None


def test_a_look_at_a_finished_run_is_no_restart(tmp_path):
    ended = [*KILLED, event("1", 1140, "end", why="finished"), event("2", 9000, "start"), event("2", 9001, "end", why="finished")]
    seen = Reader(made(tmp_path / "run", ended, [window(100)]), now=lambda: 9100.0).seen()
    assert seen["goodput"]["wall_s"] == 140
    assert len(seen["restarts"]) == 1


def test_a_resume_takes_the_windows_back(tmp_path):
    folder = made(tmp_path / "run", KILLED, [window(20), window(40)])
    reader = Reader(folder, now=lambda: 1130.0)
    assert reader.seen()["step"] == 40
    (folder / "new").write_text(window(20))
    (folder / "new").replace(folder / "metrics.jsonl")
    seen = reader.seen()
    assert (seen["step"], len(seen["losses"])) == (20, 1)


@pytest.mark.parametrize("bad", [b"", b"null", b"[1]", b'{"steps": "many", "ranks": []}', b"\xff\xfe", b"{"])
def test_hostile_files_are_no_facts(tmp_path, bad):
    rows = [window(20), window(30, loss="\x1b[2J", tokens_per_s=[], step_s={}), '{"step": true, "tokens": 1}\n', '{"event": 3}\n']
    folder = made(tmp_path / "run", [*KILLED, '{"event": "report", "time_s": "x"}\n', '{"event": []}\n'], rows)
    for name in ("plan.json", "run.json", "summary.json"):
        (folder / name).write_bytes(bad)
    (folder / "checkpoints" / "step-x").mkdir(parents=True)
    (folder / "checkpoints" / "step-x" / "COMMITTED").write_text("")
    seen = Reader(folder, now=lambda: 1130.0).seen()
    assert seen["loss"] is None
    assert "\x1b" not in said(seen)
    json.dumps(seen)


def test_errors_and_hangs_stand_on_top_and_obey_nobody(tmp_path):
    folder = made(tmp_path / "run", [*KILLED, event("1", 1140, "end", why="DataError")], [window(50)])
    errors = folder / "logs" / "attempt-000" / "errors"
    errors.mkdir(parents=True)
    row = {
        "time": "T",
        "time_s": 1139.0,
        "monotonic_s": 5.0,
        "rank": 1,
        "ranks": 2,
        "node": "n",
        "step": 50,
        "phase": "data",
        "type": "DataError",
    }
    row |= {"message": "a shard is torn\x1b]0;title\x07", "traceback": "", "ours": False, "secondary": False}
    (errors / "rank-00001.json").write_text(json.dumps(row))
    (errors / "rank-00000-hang.txt").write_text(
        '{"time": "T", "rank": 0, "ranks": 2, "node": "n", "step": 50, "phase": "\\u001b[2Jreduce", "seconds": 300}\nstacks\n'
    )
    text = said(Reader(folder, now=lambda: 1141.0).seen())
    assert "ended: DataError" in text
    assert "FAILED rank 1 of 2 on n failed first (T, at step 50): DataError\na shard is torn\n" in text
    assert "HANG rank 0: no progress for 300 s in reduce, after step 50" in text
    assert "\x1b" not in text


def test_mfu_where_the_rate_is_known_only(tmp_path, monkeypatch):
    import types

    folder = made(tmp_path / "run", KILLED, [window(50)], {"device": "cuda", "flops_per_token": 1e12})
    assert Reader(folder).seen()["mfu"] is None
    (folder / "launch").mkdir()
    (folder / "launch" / "site.json").write_text('{"accelerator": "h100"}')
    figure = types.SimpleNamespace(value=989.0)
    chip = types.SimpleNamespace(devices=1, tflops=lambda dtype: figure)
    monkeypatch.setitem(sys.modules, "gigatrain.planning.hardware", types.SimpleNamespace(CHIPS={"h100": chip}))
    assert Reader(folder).seen()["mfu"] == pytest.approx(1e12 * 640 / (2 * 989e12))
    (folder / "launch" / "site.json").write_text('{"accelerator": "abacus"}')
    assert Reader(folder).seen()["mfu_why"] == "the rate of abacus is unknown"


def test_the_scheduler_is_asked_seldom_and_only_for_jobs(tmp_path, monkeypatch):
    import types

    calls = []

    def ps(folder):
        calls.append(folder)
        return [types.SimpleNamespace(job="41", state="requeued", reason="the node was lost\x1b[2J")], []

    monkeypatch.setitem(sys.modules, "gigatrain.launching.follow", types.SimpleNamespace(ps=ps))
    folder = made(tmp_path / "run", KILLED, [window(50)])
    assert Reader(folder).seen()["scheduler"] is None
    (folder / "launch").mkdir()
    (folder / "launch" / "job.json").write_text("{}")
    history = [{"time": "T", "event": "judged", "attempt": 0, "verdict": "again", "why": "node n2 was lost"}]
    (folder / "launch" / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in history))
    reader = Reader(folder)
    for _ in range(3):
        text = said(reader.seen())
    assert calls == [folder]
    assert "scheduler 41 requeued: the node was lost\n" in text
    assert "before it: node n2 was lost" in text


def test_sparks_and_spans():
    assert spark([1, 2, 3, None, 8]) == "▁▂▃ █"
    assert spark([3, 3]) == "▁▁"
    assert spark([None]) == ""
    assert [span(seconds) for seconds in (None, 5, 720, 7200 * 2, 86400 * 3)] == ["unknown", "5 s", "12 min", "4.0 h", "3.0 days"]


def test_orders_are_shown_where_the_draw_is_not_known(tmp_path):
    """A budget that cannot be kept is one whose draw nobody measures: then most of all its reader is to see what was ordered."""
    folder = made(tmp_path / "run", KILLED, [window(20)])
    why = "power.megawatts allows 55 W, and what the run draws is not measured yet; 15 % of full speed"
    row = {
        "time_s": 1100.0,
        "event": "window",
        "process": "a",
        "step": 20,
        "tokens": 1,
        "taken": {"nodes": 1, "ms": 10_000, "node_unknown_ms": 10_000},
    }
    (folder / "energy.jsonl").write_text(json.dumps(row | {"orders": {"why": why}}) + "\n")
    seen = Reader(folder, now=lambda: 1130.0).seen()
    assert seen["power_watts"] is None
    assert ("orders", why) in [(title, text) for title, text, _ in lines(seen)]
