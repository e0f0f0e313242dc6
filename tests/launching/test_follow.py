"""`gigatrain ps | logs | cancel | requeue` on the folders of real runs: without a scheduler, and under a real Slurm that keeps no accounts."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gigatrain import cli
from gigatrain.errors import RunError
from gigatrain.launching import follow, hosts, job, restart, submit

SMALL = ("--set", "validation.every=0", "--set", "export=false", "--set", "report.every=1", "--set", "checkpoint.every=20")
LONG = ("--set", "train.steps=4000")


def gigatrain(*arguments, cwd, code=0, environment=None) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "gigatrain", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, env=environment
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout if code == 0 else ended.stderr


def until(true, limit_s=90):
    end = time.monotonic() + limit_s
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def trains(run) -> None:
    """Wait until the run has reported a step."""
    until(lambda: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").stat().st_size > 0)


def state(run) -> str:
    return follow.ps(run)[0][0].state


def test_the_whole_way_on_this_machine(tiny, tmp_path):
    """launch, ps, logs -f, cancel, requeue, cancel --now: as a user walks it, each with its JSON."""
    said = json.loads(gigatrain("launch", tiny, "--site", "laptop", "--run", "runs/mine", *SMALL, *LONG, "--json", cwd=tmp_path))
    run = Path(said["run"])
    trains(run)
    (found,) = json.loads(gigatrain("ps", "--json", cwd=tmp_path))["runs"]
    assert (found["state"], found["job"], found["site"], found["steps"]) == ("running", said["jobs"][0], "laptop", 4000)
    assert found["loss"] > 0
    with subprocess.Popen(
        [sys.executable, "-m", "gigatrain", "logs", "runs/mine", "-f"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as logs:
        assert json.loads(gigatrain("cancel", "runs/mine", "--json", cwd=tmp_path))["jobs"] == said["jobs"]
        printed, _ = logs.communicate(timeout=60)
    assert "step     4 samples x 32 tokens" in printed
    assert "saved at step" in printed
    assert printed.splitlines()[-1].startswith("[cancelled: at step ")
    saved = follow.ps(run)[0][0]
    assert saved.state == "cancelled"
    assert "has no job to cancel: it is cancelled" in gigatrain("cancel", "runs/mine", cwd=tmp_path, code=7)

    again = json.loads(gigatrain("requeue", "runs/mine", "--json", cwd=tmp_path))
    assert again["jobs"] != said["jobs"]
    until(lambda: (follow.ps(run)[0][0].step or 0) > (saved.step or 0))
    assert "runs; end it first" in gigatrain("requeue", "runs/mine", cwd=tmp_path, code=7)
    gigatrain("cancel", "runs/mine", "--now", cwd=tmp_path)
    until(lambda: hosts.alive(run) is None, 20)
    assert state(run) == "cancelled"
    assert json.loads(gigatrain("logs", "runs/mine", "--json", cwd=tmp_path))["attempt"] == 1
    assert [event["event"] for event in job.history(run)].count("cancelled") == 2


def test_a_run_that_fails_says_why_above_all(tiny, tmp_path):
    gigatrain("launch", tiny, "--site", "laptop", "--run", "runs/bad", "--set", "data.sources.0.path=/nowhere", cwd=tmp_path)
    run = tmp_path / "runs" / "bad"
    until(lambda: hosts.alive(run) is None, 60)
    found = follow.ps(run)[0][0]
    assert (found.state, "text path '/nowhere' does not exist" in found.reason) == ("failed", True)
    assert gigatrain("logs", "runs/bad", cwd=tmp_path).startswith("rank 0 of 1 on ")
    assert "DataError" in gigatrain("logs", "runs/bad", "--errors", cwd=tmp_path).splitlines()[0]
    assert "has no logs of attempt 7; it has 0" in gigatrain("logs", "runs/bad", "--attempt", "7", cwd=tmp_path, code=7)
    assert "no log of rank 5; its last rank is 0" in gigatrain("logs", "runs/bad", "--rank", "5", cwd=tmp_path, code=7)


def test_runs_that_were_not_launched(tiny, tmp_path):
    """Finished, held by a process, and left: told apart without asking for the lock."""
    folder = tmp_path / "runs"
    gigatrain("train", tiny, "--run", folder / "a", "--set", "train.steps=2", cwd=tmp_path)
    (found,), notes = follow.ps(folder)
    assert (found.state, found.step, found.steps, found.job, notes) == ("finished", 2, 2, None, [])
    (folder / "a" / "summary.json").unlink()
    assert state(folder / "a") == "left"
    with (folder / "a" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert state(folder / "a") == "running"
    assert "was not launched" in gigatrain("cancel", folder / "a", cwd=tmp_path, code=7)
    assert "no runs in" in gigatrain("ps", _empty(tmp_path), cwd=tmp_path)
    assert "is no folder" in gigatrain("ps", "nowhere", cwd=tmp_path, code=7)


def _empty(folder) -> Path:
    (folder / "none").mkdir()
    return folder / "none"


def test_a_process_number_that_is_used_again_is_not_the_run(tiny, tmp_path):
    """A job is its process and when that began; another process with the number, or another machine, is never signalled."""
    gigatrain("launch", tiny, "--site", "laptop", "--run", "runs/a", "--set", "train.steps=2", cwd=tmp_path)
    run = tmp_path / "runs" / "a"
    until(lambda: hosts.alive(run) is None, 60)
    (run / "summary.json").unlink()
    record = run / "launch" / "process.json"
    said = json.loads(record.read_text())
    record.write_text(json.dumps(said | {"pid": os.getpid()}))
    assert hosts.alive(run) is None
    with pytest.raises(RunError, match="has no job to cancel"):
        follow.cancel(run)
    record.write_text(json.dumps(said | {"host": "elsewhere"}))
    assert "can be seen only there" in gigatrain("cancel", run, cwd=tmp_path, code=7)


QUEUE = """#!/bin/bash
echo "${0##*/} $*" >>FOLDER/asked
case "${0##*/}" in
    squeue) [ -f FOLDER/queue ] && cat FOLDER/queue ;;
    scontrol) printf 'JobId=41 ArrayTaskId=0\\n   StdOut=%s\\n' "$(cat FOLDER/output)" ;;
    sbatch) grep -h '^excluded=' "${@: -1}" >>FOLDER/asked; echo 52 ;;
esac
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Slurm's commands as a script: squeue says what the test puts in it, and all that is asked is written down."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("squeue", "scontrol", "scancel", "sbatch", "sacct"):
        (folder / name).write_text(QUEUE.replace("FOLDER", str(folder)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def holds(output, reason="None", **states):
        rows = [
            "\x1f".join((identity.strip("j"), state, "u", "p", "1", "1:00", "1:00:00", "N/A", "n1", "x", reason))
            for identity, state in states.items()
        ]
        (folder / "queue").write_text("".join(f"{row}\n" for row in rows))
        (folder / "output").write_text(str(output))
        return lambda: (folder / "asked").read_text().splitlines()

    return holds


@pytest.fixture
def sweep(tiny, tmp_path, queue):
    """A sweep of two runs, as `launch` leaves it: job 52."""
    site = tmp_path / "here.toml"
    site.write_text(
        f'name = "here"\nsummary = "s"\ndevice = "cpu"\n[node]\nranks = 1\n[paths]\nruns = "{tmp_path}/runs"\n[scheduler]\nkind = "slurm"\n'
    )
    queue("")
    folder = tmp_path / "runs" / "lr"
    made = submit.prepare(submit.Request(str(tiny), str(site), nodes=1, sweep=("optim.lr=1e-3,2e-3",), folder=str(folder)))
    assert submit.launch(made).jobs == ["52"]
    return folder


def test_a_sweep_is_listed_followed_and_cancelled_as_a_whole(sweep, queue, capsys):
    asked = queue(sweep / "logs" / "job-52_0.out", j52_0="RUNNING", j52_1="PENDING")
    for folder in (sweep, sweep.parent):
        assert {(Path(one.run).name, one.state) for one in follow.ps(folder)[0]} == {("tiny-0", "running"), ("tiny-1", "queued")}
    queue(sweep / "logs" / "job-52_0.out", "ReqNodeNotAvail, UnavailableNodes:n1", j52_0="RUNNING", j52_1="PENDING")
    assert "down, reserved or excluded (excluded-SITE.jsonl" in next(one.reason for one in follow.ps(sweep)[0] if one.state == "queued")
    assert follow.first(sweep)[0] == sweep / "tiny-0"
    cli.main(["logs", str(sweep)])
    said = capsys.readouterr()
    assert (said.out, "is a sweep of 2 runs, this is tiny-0" in said.err) == ("no rank has printed anything yet\n", True)
    assert follow.cancel(sweep)["jobs"] == ["52_1", "52_0"]
    assert [line for line in asked() if line.startswith("scancel")] == ["scancel 52_1", "scancel --signal=USR1 --batch 52_0"]
    assert {job.history(sweep / f"tiny-{index}")[-1]["event"] for index in (0, 1)} == {"cancelled"}
    queue("")
    with pytest.raises(RunError, match="has no job to cancel: of its runs are 2 cancelled"):
        follow.cancel(sweep)


def test_a_run_of_a_sweep_is_queued_again_by_itself(sweep, queue):
    """The sweep's script is an array's; the run gets one of its own, and the site's list of bad nodes stays beside the sweep."""
    asked = queue("")
    restart.exclude(sweep.parent / "excluded-here.jsonl", "bad1", "test", sweep)
    assert follow.requeue(sweep / "tiny-0")["jobs"] == ["52"]
    script = (sweep / "tiny-0" / "launch" / "job.sh").read_text()
    assert "--array" not in script
    assert "#SBATCH --exclude=bad1" in script
    assert asked()[-1] == f"excluded={sweep.parent}/excluded-here.jsonl # where those that are found to be bad are written down"
    assert job.history(sweep / "tiny-0")[-1]["job"] == "52"


def test_a_run_is_the_same_by_whatever_path(sweep, queue, tmp_path):
    queue(sweep / "logs" / "job-52_0.out", j52_0="RUNNING")
    (tmp_path / "link").symlink_to(sweep / "tiny-0")
    assert follow.cancel(tmp_path / "link")["jobs"] == ["52_0"]
    assert follow.cancel(sweep / "tiny-1" / ".." / "tiny-0", now=True)["jobs"] == ["52_0"]
    queue("/elsewhere/logs/job-52_0.out", j52_0="RUNNING")
    with pytest.raises(RunError, match="job 52 is not of"):
        follow.cancel(sweep / "tiny-0")


@pytest.mark.slurm
def test_a_sweep_of_slurm_is_cancelled_and_one_of_its_runs_is_queued_again(launches, cluster, tiny):
    number, sweep = launches(
        *(tiny, "--site", launches.site(), "--nodes", 1, "--no-preflight", *SMALL, *LONG),
        *("--sweep", "optim.lr=1e-3,2e-3", "--run", launches.folder / "runs" / "lr"),
    )
    trains(sweep / "tiny-0")
    trains(sweep / "tiny-1")
    found = json.loads(launches.command("ps", sweep, "--json"))["runs"]
    assert {(row["state"], row["job"]) for row in found} == {("running", f"{number}_0"), ("running", f"{number}_1")}
    launches.command("cancel", sweep)
    until(lambda: {one["state"] for one in json.loads(launches.command("ps", sweep, "--json"))["runs"]} == {"cancelled"})
    again = json.loads(launches.command("requeue", sweep / "tiny-0", "--json"))["jobs"]
    until(lambda: json.loads(launches.command("ps", sweep / "tiny-0", "--json"))["runs"][0]["state"] == "running")
    launches.command("cancel", sweep, "--now")
    assert cluster.ended(again[0]) == "CANCELLED"


@pytest.mark.slurm
def test_jobs_of_slurm_are_followed_cancelled_and_queued_again(launches, cluster, tiny):
    """One that waits with its reason, one that runs; cancel saves and is not queued again; requeue does and ends; sacct keeps nothing and that is said."""
    site = launches.site()
    number, run = launches(tiny, "--site", site, "--nodes", 3, "--no-preflight", *SMALL, *LONG, "--set", "train.batch=6")
    trains(run)
    waits, other = launches(tiny, "--site", site, "--nodes", 2, "--no-preflight", *SMALL, *LONG, "--run", run.with_name("waits"))

    def rows():
        return {Path(row["run"]).name: row for row in json.loads(launches.command("ps", run.parent, "--json"))["runs"]}

    until(lambda: rows()["waits"]["reason"] in ("Resources", "Priority"))
    found = rows()
    assert (found[run.name]["state"], found[run.name]["job"], found["waits"]["state"]) == ("running", number, "queued")
    assert "is queued already" in launches.command("requeue", other, code=7)

    launches.command("cancel", other)
    assert cluster.ended(waits) == "CANCELLED"
    assert rows()["waits"]["state"] == "cancelled"

    launches.command("requeue", run)
    until(lambda: any(event.get("verdict") == "requeue" for event in job.history(run)))
    until(lambda: rows()[run.name]["state"] == "running" and rows()[run.name]["attempts"] == 2)
    saved = restart.committed(run)
    until(lambda: rows()[run.name]["step"] > saved)
    launches.command("cancel", run)
    assert cluster.ended(number) in ("COMPLETED", "FAILED")
    last = job.history(run)[-1]
    assert (last["verdict"], last["gained"]) == ("stop", True)
    assert cluster.state(number)["Restarts"] == "1", "it was queued again after it was cancelled"
    assert rows()[run.name]["state"] == "cancelled"

    again = json.loads(launches.command("requeue", run, "--json"))
    assert again["jobs"] != [number]
    launches.command("cancel", run, "--now")
    assert cluster.ended(again["jobs"][0]) == "CANCELLED"
    assert launches.command("logs", run).count("==> ") == 2


@pytest.mark.slurm
def test_a_job_that_is_not_of_the_run_is_left_alone(launches, cluster, tiny):
    """The history names a job of the same user that is another's: it is neither cancelled nor queued again."""
    foreign = cluster.run("sbatch", "--parsable", f"--chdir={launches.folder}", "--wrap", "sleep 300").strip()
    number, run = launches(tiny, "--site", launches.site(), "--nodes", 1, "--no-preflight", *SMALL, "--set", "train.steps=2")
    cluster.ended(number)
    (run / "summary.json").unlink()
    job.record(run, "submitted", job=foreign)
    for command in ("cancel", "requeue"):
        assert f"job {foreign} is not of {run}" in launches.command(command, run, code=7)
    assert cluster.state(foreign)["JobState"] in ("RUNNING", "PENDING")
    job.record(run, "submitted", job=number)
    said = json.loads(launches.command("ps", run, "--json"))
    assert said["runs"][0]["state"] == "dead"
    assert any("no accounts" in note for note in said["notes"])
