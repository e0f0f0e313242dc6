"""Which rank failed first and which were killed, by what all of them left; whatever stands in it."""

import datetime
import json

from gigatrain.observe import failed, logs


def record(folder, rank, at, *, ranks=4, secondary=False, ours=False, node="a", message="why", offset=0.0):
    errors = logs.folder_of(folder, 0) / "errors"
    errors.mkdir(parents=True, exist_ok=True)
    row = {
        "time": "T",
        "time_s": 100.0 + at,
        "monotonic_s": at + offset,
        "rank": rank,
        "ranks": ranks,
        "node": node,
        "step": 7,
        "phase": "forward",
    }
    row |= {"type": "DataError", "message": message, "traceback": "Traceback\n  at home\n", "ours": ours, "secondary": secondary}
    (errors / f"rank-{rank:05d}.json").write_text(json.dumps(row))


def marked(folder, rank, ended, *, node="a", ranks=4, more=""):
    path = logs.folder_of(folder, 0) / f"rank-{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"[gigatrain] rank {rank} of {ranks} on {node}, pid 1, begins T\n{more}")
        if ended:
            file.write(f"[gigatrain] rank {rank} of {ranks} on {node}, pid 1, ends T: code 1\n")


def test_the_first_primary_failure_is_above_all_others(tmp_path):
    for rank in range(4):
        marked(tmp_path, rank, True)
    record(tmp_path, 0, 1.0, secondary=True)  # heard of it first, and is still no cause
    record(tmp_path, 2, 3.0, message="a shard is torn\x1b[2J")
    record(tmp_path, 3, 4.0)
    record(tmp_path, 1, 5.0, secondary=True)
    said = str(failed.first_failure(tmp_path)).splitlines()
    assert said[0] == "rank 2 of 4 on a failed first (T, at step 7): DataError"
    assert said[1] == "a shard is torn"
    assert said[2:4] == ["rank 3 failed too", "ranks 0-1 stopped because of another"]
    assert said[-1].endswith("attempt-000/rank-00002.log")
    assert failed.first_failure(tmp_path, since=200.0) is None


def test_within_a_node_time_is_its_monotonic_clock(tmp_path):
    record(tmp_path, 0, 1.0)
    record(tmp_path, 1, 2.0)
    path = logs.folder_of(tmp_path, 0) / "errors" / "rank-00001.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"time_s": row["time_s"] - 60}))  # the wall clock was set back in between
    assert [row["rank"] for row in failed.failures(tmp_path)] == [0, 1]


def test_a_rank_that_was_killed_is_told_by_what_its_log_lacks(tmp_path):
    for rank in range(4):
        marked(tmp_path, rank, rank not in (1, 2), node="bc"[rank > 1], more="words\n" * 50_000)
    record(tmp_path, 0, 1.0, secondary=True)
    record(tmp_path, 3, 1.0, secondary=True)
    said = str(failed.first_failure(tmp_path))
    assert said.startswith("ranks 1-2 left no word: killed (out of memory?), or the node was lost (b, c)")
    assert "ranks 0, 3 stopped because of another" in said


def began(folder, rank, time_s, *, ranks, ended=False, more=""):
    at = datetime.datetime.fromtimestamp(time_s, datetime.UTC).isoformat()
    path = logs.folder_of(folder, 0) / f"rank-{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for what in ("begins", "ends")[: 1 + ended]:
            file.write(f"[gigatrain] rank {rank} of {ranks} on a, pid 1, {what} {at}{': code 0' * (what == 'ends')}\n{more}")


def test_ranks_of_another_start_are_not_called_dead(tmp_path):
    for rank in range(2):
        began(tmp_path, rank, 100.0, ranks=2)  # a healthy run, and a second start that is refused at 150
    assert "ranks 0-1 left no word" in str(failed.first_failure(tmp_path))
    assert failed.first_failure(tmp_path, since=150.0) is None
    for rank in range(2):
        began(tmp_path, rank, 200.0, ranks=2, more="words\n" * 50_000)  # the same logs, and killed far behind its mark
    assert "ranks 0-1 left no word" in str(failed.first_failure(tmp_path, since=150.0))


def stuck(folder, rank, time_s, ranks=4):
    errors = logs.folder_of(folder, 0) / "errors"
    errors.mkdir(parents=True, exist_ok=True)
    at = datetime.datetime.fromtimestamp(time_s, datetime.UTC).isoformat()
    row = {"time": at, "rank": rank, "ranks": ranks, "node": "a", "step": 7, "phase": "reduce", "seconds": 300.0}
    (errors / f"rank-{rank:05d}-hang.txt").write_text(f"{json.dumps(row)}\nstacks\n")


def test_ranks_that_a_smaller_resume_has_no_more_are_not_told_of(tmp_path):
    for rank in range(4):
        began(tmp_path, rank, 100.0, ranks=4)
    record(tmp_path, 3, 0.0)  # of time 100
    stuck(tmp_path, 3, 100.0)
    for rank in range(2):
        began(tmp_path, rank, 200.0, ranks=2, ended=True)
    assert failed.first_failure(tmp_path) is None
    assert failed.hung(tmp_path) is None


def test_a_hang_comes_before_what_it_led_to(tmp_path):
    """NCCL's watchdog ends who waits too long, without a word."""
    for rank in range(4):
        began(tmp_path, rank, 100.0, ranks=4)
        if rank != 2:
            stuck(tmp_path, rank, 400.0)
    record(tmp_path, 1, 1000.0, secondary=True)
    said = str(failed.first_failure(tmp_path)).splitlines()
    assert said[0] == "ranks 0-1, 3: no progress for 300 s in reduce, after step 7"
    assert said[1].startswith("rank 2: no report of a hang")
    assert "left no word: ended by the time limit of a collective, killed, or the node" in said[3]
    assert "out of memory" not in "".join(said)
    record(tmp_path, 3, 900.0)  # a failure of its own is the reason, whatever waited for it
    assert str(failed.first_failure(tmp_path)).startswith("rank 3 of 4 on a failed first")


def test_a_disk_that_is_full_is_named_beside_a_rank_without_words(tmp_path, monkeypatch):
    began(tmp_path, 0, 100.0, ranks=1)
    monkeypatch.setattr(failed, "FULL_BYTES", 1 << 62)
    assert "rank 0 left no word: its disk, which is full, could not keep one" in str(failed.first_failure(tmp_path))


def test_torn_and_hostile_records_are_left_out(tmp_path):
    record(tmp_path, 2, 3.0)
    errors = logs.folder_of(tmp_path, 0) / "errors"
    for rank, data in enumerate((b'{"time_s": 1', b"\xff\xfe", b"[]", b'{"time_s": 1, "message": 3, "traceback": ""}'), start=3):
        (errors / f"rank-{rank:05d}.json").write_bytes(data)
    assert [row["rank"] for row in failed.failures(tmp_path)] == [2]
