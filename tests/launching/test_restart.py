"""What happens after an attempt: the decision over everything that is known, and the history that it rests on."""

import datetime
import json
import socket
import threading

import pytest

from gigatrain.errors import RunError
from gigatrain.launching import job as jobs
from gigatrain.launching import restart
from gigatrain.launching.restart import Outcome, judge
from gigatrain.site import Site

LOST = {"type": "RunError", "message": "rank 1 of 4 lost another rank, whose own message says why", "secondary": True}


@pytest.mark.parametrize(
    ("outcome", "word", "code"),
    [
        (Outcome(0, finished=True, step=12), "done", 0),
        (Outcome(137, finished=True, step=12), "done", 0),  # srun was killed after the last save: the run is finished all the same
        (Outcome(0, left=True, before=3, step=6), "requeue", 0),  # Slurm told the ranks, and not the script
        (Outcome(0, signal="USR1", left=True, before=3, step=6), "requeue", 0),
        (Outcome(138, signal="TERM", before=3, step=3), "requeue", 0),  # killed before it could save
        (Outcome(1, before=3, step=6), "again", 0),
        (Outcome(7, before=3, step=3, failure=LOST), "again", 0),
        (Outcome(137, failure=LOST | {"message": "rank 0 of 4 cannot meet the others at n1:20000"}), "again", 0),
        (Outcome(9, before=6, step=6), "requeue", 0),
        # A file system or a network that was away, whatever our error of it was:
        (Outcome(6, before=3, step=3, failure={"type": "CheckpointError", "message": "cannot be read", "transient": True}), "again", 0),
        (Outcome(7, before=3, step=3, failure={"type": "RunError", "message": "no GPU of its own", "transient": True}), "again", 0),
        (Outcome(5, stalled=3, failure={"type": "DataError", "message": "cannot be read", "transient": True}), "stop", 93),
        # Others ended it, which says nothing of the run:
        (Outcome(0, signal="TERM", stalled=3), "requeue", 0),
        (Outcome(124, signal="USR1", stalled=3, started=False), "requeue", 0),
        (
            Outcome(1, failure={"type": "ValueError", "message": "?"}),
            "again",
            0,
        ),  # a mistake of ours may be a bad node's: three times at most
        # Never again, whatever srun made of the code:
        (Outcome(2), "stop", 2),
        (Outcome(137, failure={"type": "DataError", "message": "the corpus is torn"}), "stop", 5),
        (Outcome(137, failure={"type": "CheckpointError", "message": "another plan"}), "stop", 6),
        (Outcome(4, signal="USR1"), "stop", 4),
        (Outcome(7, failure={"type": "RunError", "message": "out of memory: tried to allocate 2 GiB"}), "stop", 7),
        (Outcome(137, failure={"type": "RunError", "message": "3 steps in a row had a loss that is not finite"}), "stop", 7),
        # Three restarts without a step gained:
        (Outcome(1, before=6, step=6, stalled=2), "again", 0),
        (Outcome(1, before=6, step=6, stalled=3), "stop", 93),
        (Outcome(1, before=6, step=7, stalled=3), "again", 0),
        (Outcome(0, signal="USR1", before=6, step=6, stalled=3), "stop", 93),  # a time limit too short to get anywhere
        (Outcome(9, before=-1, step=-1, stalled=3), "stop", 93),
        (Outcome(1, before=-1, step=0, stalled=3), "stop", 93),  # the save of step 0 is no progress
    ],
)
def test_the_decision(outcome, word, code):
    verdict = judge(outcome)
    assert (verdict.word, verdict.code) == (word, code), verdict
    assert verdict.why
    assert len(verdict.screen("runs/x")) < 20


def test_where_jobs_may_not_requeue_it_is_left_to_the_next_one():
    for outcome in (Outcome(0, signal="USR1", step=6), Outcome(9)):
        verdict = judge(outcome, may_requeue=False)
        assert verdict.word == "leave"
        assert "gigatrain requeue runs/x" in verdict.screen("runs/x")[-1]
    assert judge(Outcome(1), may_requeue=False).word == "again"


def made(run, *, requeue=True, chain=1):
    site = Site.model_validate({"name": "here", "summary": "", "device": "cpu", "scheduler": {"kind": "slurm", "requeue": requeue}})
    job = jobs.Job(name="tiny", run=str(run), recipe="r", workdir="/", python="python", site=site, nodes=2, ranks_per_node=1, chain=chain)
    (run / "launch").mkdir(parents=True)
    (run / "launch" / "job.json").write_text(job.model_dump_json())
    jobs.record(run, "submitted", job="41")
    return run


def commit(run, step):
    folder = run / "checkpoints" / f"step-{step:08}"
    folder.mkdir(parents=True)
    (folder / "COMMITTED").touch()


JOB = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[1-3]"}


def test_attempts_are_counted_over_requeues_and_each_has_its_port(tmp_path):
    run = made(tmp_path / "run")
    first = restart.begin(run, JOB).split()
    assert (first[0], first[1], first[3]) == ("go", "000", "launch/attempt-000")
    assert restart.after(run, 1).word == "again"
    second = restart.begin(run, JOB | {"SLURM_RESTART_COUNT": "1"}).split()
    assert second[1] == "001"
    assert first[2] != second[2]
    assert jobs.history(run)[-1]["restarts"] == 1


def test_no_progress_stops_the_run_and_every_job_of_its_chain_until_a_person_submits_it_again(tmp_path):
    run = made(tmp_path / "run")
    commit(run, 6)
    words = []
    for _ in range(4):
        assert restart.begin(run, JOB).startswith("go ")
        words.append(restart.after(run, 134, chosen=["n1", "n2"]).word)
    assert words == ["again", "again", "again", "stop"]
    assert restart.begin(run, JOB) == "stop 93"
    jobs.record(run, "submitted", job="42")
    assert restart.begin(run, JOB).startswith("go 004")
    assert restart.after(run, 134).word == "again"  # the count begins again
    commit(run, 9)
    assert restart.begin(run, JOB).startswith("go 005")


def test_what_others_ended_does_not_count_as_a_restart(tmp_path):
    run = made(tmp_path / "run")
    for signal, chosen in (("TERM", ["n1"]), ("USR1", []), ("TERM", ["n1"]), ("TERM", ["n1"]), ("USR1", ["n1"])):
        assert restart.begin(run, JOB).startswith("go ")
        assert restart.after(run, 0, signal=signal, chosen=chosen).word == "requeue"
    assert restart.stalled(jobs.history(run)) == 1  # the limit of a job that had begun
    assert "--time" in judge(Outcome(0, signal="USR1", before=6, step=6, stalled=3)).why


def test_attempts_that_gain_nothing_begin_ever_later():
    assert [judge(Outcome(1, before=6, step=6, stalled=count)).pause_s for count in range(3)] == [5, 10, 20]
    assert judge(Outcome(1, before=6, step=7, stalled=2)).pause_s == 0


def test_a_job_that_begins_before_its_submission_is_written_down_waits_for_that(tmp_path):
    run = made(tmp_path / "run")
    restart.begin(run, JOB)
    assert restart.after(run, 5).word == "stop"
    writer = threading.Timer(0.5, jobs.record, (run, "submitted"), {"job": "42"})
    writer.start()
    assert restart.begin(run, JOB | {"SLURM_JOB_ID": "42"}).startswith("go 001")
    writer.join()
    assert [event["job"] for event in jobs.history(run) if event["event"] == "submitted"] == ["41", "42"]


def test_a_script_handed_in_by_hand_goes_on_after_a_stop_and_the_link_of_a_chain_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(restart, "_SUBMITTED_S", 0.2)
    run = made(tmp_path / "run")
    jobs.record(run, "submitted", job="42", chain=["43"])
    restart.begin(run, JOB | {"SLURM_JOB_ID": "42"})
    assert restart.after(run, 5).word == "stop"
    assert restart.begin(run, JOB | {"SLURM_JOB_ID": "43"}) == "stop 5"
    assert restart.begin(run, JOB | {"SLURM_JOB_ID": "50"}).startswith("go 001")
    assert jobs.history(run)[-2]["by"] == "hand"
    jobs.record(run, "submitted", job="60_0")  # a task of an array has a number of its own
    assert restart.begin(run, {"SLURM_JOB_ID": "61", "SLURM_ARRAY_JOB_ID": "60", "SLURM_ARRAY_TASK_ID": "0"}).startswith("go 002")
    assert jobs.history(run)[-2].get("by") != "hand"


def test_a_job_that_slurm_queues_again_and_again_without_a_word_is_stopped(tmp_path):
    run = made(tmp_path / "run")
    for attempt in range(8):
        assert restart.begin(run, JOB).startswith(f"go {attempt:03}")
    commit(run, 3)  # a step gained: the count begins again
    for attempt in range(8, 19):
        assert restart.begin(run, JOB).startswith(f"go {attempt:03}")
    assert restart.begin(run, JOB) == "stop 93"
    last = jobs.history(run)[-1]
    assert (last["event"], last["verdict"]) == ("judged", "stop")
    assert "11 times in a row without a word" in last["why"]
    assert restart.begin(run, JOB) == "stop 93"


def test_a_finished_run_is_not_begun_again(tmp_path):
    run = made(tmp_path / "run")
    (run / "summary.json").write_text("{}")
    assert restart.begin(run, JOB) == "done"
    assert [event["event"] for event in jobs.history(run)] == ["submitted"]


def test_nodes_that_did_not_answer_are_named_and_excluded(tmp_path):
    run, excluded = made(tmp_path / "run"), tmp_path / "excluded-here.jsonl"
    restart.begin(run, JOB)
    here = run / "launch" / "attempt-000"
    here.mkdir()
    (here / "present").write_text("n3\nn1\n")
    verdict = restart.after(run, 9, held=["n1", "n2", "n3"], excluded=excluded)
    assert "no answer from n2" in verdict.why
    assert restart.excluded_nodes(excluded) == ["n2"]
    assert json.loads(excluded.read_text())["run"] == str(run)
    late = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=15)
    assert restart.excluded_nodes(excluded, now=late) == []


def silent(run, **more):
    """An attempt in whose roll call n1 and n3 answered, of n1 to n4."""
    attempt = restart.begin(run, JOB).split()[1]
    (run / "launch" / f"attempt-{attempt}").mkdir()
    (run / "launch" / f"attempt-{attempt}" / "present").write_text("n3\nn1\nn4\n")
    restart.after(run, 1, chosen=["n1"], held=["n1", "n2", "n3", "n4"], excluded=run.parent / "list", **more)
    return restart.excluded_nodes(run.parent / "list")


def test_silence_alone_counts_twice_in_a_row_or_where_slurm_too_calls_the_node_down(tmp_path):
    run = made(tmp_path / "run")
    assert silent(run, cut_short=True, down=["n2"]) == []  # the job was being ended
    assert silent(run, down=[]) == []
    assert silent(run, down=["n7"]) == ["n2"]
    other = made(tmp_path / "more" / "run")
    assert silent(other, down=["n2"]) == ["n2"]


def test_the_history_of_a_large_job_names_a_file(tmp_path):
    run = made(tmp_path / "run")
    restart.begin(run, JOB)
    restart.after(run, 1, chosen=[f"n{number}" for number in range(36_000)])
    assert jobs.history(run)[-1]["nodes"] == "36000 nodes: launch/attempt-000/chosen"


def test_if_nobody_answered_it_is_not_the_nodes(tmp_path):
    run = made(tmp_path / "run")
    restart.begin(run, JOB)
    (run / "launch" / "attempt-000").mkdir()
    (run / "launch" / "attempt-000" / "present").write_text("")
    restart.after(run, 9, held=["n1", "n2"], excluded=tmp_path / "list")
    assert restart.excluded_nodes(tmp_path / "list") == []


def test_the_list_of_bad_nodes_survives_torn_and_foreign_lines(tmp_path):
    path = tmp_path / "list"
    now = datetime.datetime.now(datetime.UTC).isoformat()
    path.write_text(f'{{"node": "n7", "time": "{now}"}}\n[]\n{{"node": "n8"}}\n{{"node": "n9", "time": "{now[:19]}"}}\n{{"node": "n1')
    assert restart.excluded_nodes(path) == ["n7", "n9"]
    assert restart.excluded_nodes(tmp_path / "none") == []


def test_the_first_failure_is_the_earliest_that_is_no_consequence(tmp_path):
    folder = tmp_path / "logs" / "attempt-002" / "errors"
    folder.mkdir(parents=True)
    for rank, time_s, message in ((0, 10.0, "lost"), (3, 12.0, "the cause"), (1, 13.0, "its neighbour")):
        record = {"time_s": time_s, "rank": rank, "type": "RunError", "message": message, "secondary": rank == 0}
        (folder / f"rank-{rank:05}.json").write_text(json.dumps(record))
    (folder / "rank-00009.json").write_text('{"torn')
    assert (restart.failure(tmp_path, 2) or {})["message"] == "the cause"
    assert restart.failure(tmp_path, 1) is None


def test_a_consequence_is_not_told_as_the_cause():
    """Who was killed left no word, and what is there is another rank's that lost it."""
    verdict = judge(Outcome(137, failure=LOST, before=0, step=60))
    assert "(SIGKILL), and it is at step 60; no rank left word of a failure of its own: one was killed" in verdict.why
    assert f"what came of it: {LOST['message']}" in verdict.why


def test_a_port_that_is_taken_is_passed_over():
    number = restart.port(41, 0)
    with socket.socket() as taken:
        taken.bind(("", number))
        assert restart.port(41, 0) == number + 1
    assert 20_000 <= restart.port(2**40, 999) < 32_000


def test_a_folder_that_was_not_launched_is_refused(tmp_path):
    with pytest.raises(RunError, match="was not launched"):
        restart.after(tmp_path, 0)
