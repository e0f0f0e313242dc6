"""What happens after an attempt: the decision over everything that is known, and the history that it rests on."""

import datetime
import json
import socket

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


def test_a_port_that_is_taken_is_passed_over():
    number = restart.port(41, 0)
    with socket.socket() as taken:
        taken.bind(("", number))
        assert restart.port(41, 0) == number + 1
    assert 20_000 <= restart.port(2**40, 999) < 32_000


def test_a_folder_that_was_not_launched_is_refused(tmp_path):
    with pytest.raises(RunError, match="was not launched"):
        restart.after(tmp_path, 0)
