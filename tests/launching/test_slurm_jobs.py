"""Jobs on a real Slurm, from `gigatrain launch` to their last checkpoint, undisturbed and disturbed: the weights are the same."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from launches import Launches

from gigatrain.launching import job as jobs
from gigatrain.launching import restart
from gigatrain.launching.slurm import seconds as slurm_seconds

pytestmark = pytest.mark.slurm
TINY = ("--set", "validation.every=0", "--set", "export=false", "--set", "report.every=5", "--set", "checkpoint.every=20")
STEPS = ("--set", "train.steps=300")


def until(true, limit_s, what):
    end = time.monotonic() + limit_s
    while not (found := true()):
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(0.1)
    return found


def story(run):
    """The run's attempts as they were judged, and what the jobs printed, for a test that fails."""
    said = "\n".join(path.read_text() for path in sorted((run / "logs").glob("job-*.out")))
    return "\n".join(map(str, jobs.history(run))) + "\n" + said[-6000:]


def verdicts(run):
    return [event["verdict"] for event in jobs.history(run) if event["event"] == "judged"]


def finished(cluster, job, run, limit_s=180):
    """The summary of a run whose job has ended well."""
    try:
        state = cluster.ended(job, limit_s)
    except TimeoutError as failure:
        pytest.fail(f"{failure}\n{story(run)}")
    assert state == "COMPLETED", story(run)
    assert (run / "summary.json").is_file(), story(run)
    return json.loads((run / "summary.json").read_text())


def trained(run, step, limit_s=90):
    """Wait until a run has committed a step."""
    until(lambda: restart.committed(run) >= step, limit_s, f"step {step} committed\n{story(run)}")


@pytest.fixture(scope="module")
def undisturbed(slurm, tiny, tmp_path_factory):
    """The weights of two ranks on two nodes that nobody disturbed."""
    launches = Launches(slurm, tmp_path_factory.mktemp("undisturbed"))
    job, run = launches(tiny, "--site", launches.site(), "--nodes", 2, "--no-preflight", *TINY, *STEPS)
    summary = finished(slurm, job, run)
    assert verdicts(run) == ["done"]
    return summary["weights_sha256"]


def test_a_node_is_lost_and_a_spare_takes_its_place_in_the_same_allocation(undisturbed, launches, cluster, tiny):
    job, run = launches(tiny, "--site", launches.site(), "--nodes", 2, "--spares", 1, "--no-preflight", *TINY, *STEPS)
    trained(run, 60)
    cluster.kill_node("n2")
    summary = finished(cluster, job, run)
    assert verdicts(run) == ["again", "done"], story(run)
    assert cluster.state(job)["Restarts"] == "0"
    assert summary["weights_sha256"] == undisturbed
    last = [event for event in jobs.history(run) if event["event"] == "judged"][-1]
    assert last["nodes"] == "n1,n3"
    assert "n2" in restart.excluded_nodes(run.parent / "excluded-loopback.jsonl")


def test_the_node_of_the_script_is_lost_and_another_node_requeues_the_job(undisturbed, launches, cluster, tiny):
    """With --no-kill, which spares need, Slurm would let such a job run on without its script, until its limit."""
    job, run = launches(tiny, "--site", launches.site(), "--nodes", 2, "--spares", 1, "--no-preflight", *TINY, *STEPS)
    trained(run, 60)
    cluster.kill_node("n1")
    summary = finished(cluster, job, run)
    assert cluster.state(job)["Restarts"] == "1", story(run)
    assert [event["nodes"] for event in jobs.history(run) if event["event"] == "judged"] == ["n2,n3"]
    assert summary["weights_sha256"] == undisturbed


def test_a_node_is_lost_without_a_spare_and_the_job_goes_on_elsewhere(undisturbed, launches, cluster, tiny):
    job, run = launches(tiny, "--site", launches.site(), "--nodes", 2, "--no-preflight", *TINY, *STEPS)
    trained(run, 60)
    cluster.kill_node("n1")  # which runs the script itself
    summary = finished(cluster, job, run)
    assert cluster.state(job)["Restarts"] == "1", story(run)
    assert summary["weights_sha256"] == undisturbed
    assert "n1" not in [event for event in jobs.history(run) if event["event"] == "judged"][-1]["nodes"].split(",")


def test_the_time_limit_ends_a_job_and_not_the_run(launches, cluster, tiny):
    """Ranks of srun; of torchrun, and undisturbed, on the other nodes meanwhile. Slurm looks at limits every half minute."""
    steps = (*TINY, "--set", "train.steps=1200", "--nodes", 2, "--no-preflight")
    job, run = launches(tiny, "--site", launches.site(lead_s=100), "--time", "00:10:00", "--launcher", "srun", *steps, "--run", "limited")
    other, whole = launches(tiny, "--site", launches.site(), *steps, "--run", "whole")
    assert cluster.state(job)["TimeLimit"] == "00:10:00"
    trained(run, 60)
    # However slow this machine is: less than `lead_s` is left from now on, and enough to save.
    minutes = ((slurm_seconds(cluster.state(job)["RunTime"]) or 0) + 40) // 60 + 1
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    until(lambda: verdicts(run), 60, "the job was told of its limit")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    summary, expected = finished(cluster, job, run), finished(cluster, other, whole)
    first = next(event for event in jobs.history(run) if event["event"] == "judged")
    assert (first["signal"], first["code"]) == ("USR1", 75), story(run)
    assert 60 <= first["step"] < 1200
    assert "left" in [event["event"] for event in jobs.history(run)]  # the ranks saved, and were not killed
    assert verdicts(run) == ["requeue", "done"], story(run)
    assert verdicts(whole) == ["done"]
    assert cluster.state(job)["Restarts"] == "1"
    assert summary["weights_sha256"] == expected["weights_sha256"]


def test_a_job_that_matters_more_takes_the_nodes_and_the_run_goes_on_later(undisturbed, launches, cluster, tiny):
    job, run = launches(tiny, "--site", launches.site(), "--nodes", 2, "--no-preflight", *TINY, *STEPS)
    trained(run, 60)
    urgent = cluster.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3"
    ).strip()
    summary = finished(cluster, job, run)
    assert cluster.ended(urgent) == "COMPLETED"
    assert verdicts(run)[0] == "requeue", story(run)
    assert "left" in [event["event"] for event in jobs.history(run)], story(run)
    assert int(cluster.state(job)["Restarts"]) >= 1
    assert summary["weights_sha256"] == undisturbed


def test_a_node_that_fails_its_examination_is_replaced_by_a_spare(undisturbed, launches, cluster, tiny):
    """The scratch folder of n2 is full: a file system of 64 KiB of its own, where this user may mount one."""
    scratch = cluster.scratch("n2")
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(scratch)], capture_output=True, check=False).returncode == 0
    )
    if not mounted:
        scratch.rmdir()
        scratch.write_text("no folder")
    try:
        job, run = launches(tiny, "--site", launches.site(), "--nodes", 2, "--spares", 1, *TINY, *STEPS)
        summary = finished(cluster, job, run)
    finally:
        if mounted:
            subprocess.run(["umount", str(scratch)], check=True)
        else:
            scratch.unlink()
            scratch.mkdir()
    assert verdicts(run) == ["done"], story(run)
    assert [event["nodes"] for event in jobs.history(run) if event["event"] == "judged"] == ["n1,n3"]
    assert summary["weights_sha256"] == undisturbed
    assert {path.stem for path in (run / "launch" / "attempt-000" / "doctor").glob("n*.json")} == {"n1", "n2", "n3"}
    assert restart.excluded_nodes(run.parent / "excluded-loopback.jsonl") == ["n2"]
    script = launches.command("launch", tiny, "--site", launches.site(), "--nodes", 2, "--dry-run")
    assert "#SBATCH --exclude=n2" in script  # the next launch leaves it out


def test_a_crash_loop_is_stopped_with_its_cause_on_one_screen(launches, cluster, tiny):
    """Every rank is killed as it starts: by a sitecustomize of the job's environment."""
    (launches.folder / "crash").mkdir()
    (launches.folder / "crash" / "sitecustomize.py").write_text(
        "import os, sys\nif 'RANK' in os.environ and '--continue' in sys.orig_argv:\n    os.kill(os.getpid(), 11)\n"
    )
    site = launches.site(PYTHONPATH=f"{launches.folder / 'crash'}:{os.environ.get('PYTHONPATH', '')}")
    job, run = launches(tiny, "--site", site, "--nodes", 1, "--no-preflight", *TINY)
    assert cluster.ended(job, 120) == "FAILED", story(run)
    assert cluster.state(job)["ExitCode"] == "93:0", story(run)
    assert verdicts(run) == ["again", "again", "again", "stop"]
    assert "3 restarts and no step gained, it is before its first checkpoint; the last one ended with exit code 139 (SIGSEGV)" in story(run)


def test_an_error_of_the_data_is_not_tried_again_and_not_by_the_next_job_of_a_chain(launches, cluster, tiny):
    said = json.loads(
        launches.command(
            *("launch", tiny, "--site", launches.site(requeue=False), "--nodes", 1, "--no-preflight", "--chain", 2, "--json"),
            *("--set", "data.sources.0.path=/nowhere/at/all", *TINY),
        )
    )
    run = Path(said["run"])
    assert [cluster.ended(job, 120) for job in said["jobs"]] == ["FAILED", "FAILED"]
    assert [cluster.state(job)["ExitCode"] for job in said["jobs"]] == ["5:0", "5:0"]
    assert verdicts(run) == ["stop"]
    assert "/nowhere/at/all" in story(run)
    assert len([event for event in jobs.history(run) if event["event"] == "started"]) == 1


def test_a_sweep_is_one_array_with_a_run_a_task(launches, cluster, tiny):
    said = json.loads(
        launches.command(
            *("launch", tiny, "--site", launches.site(), "--nodes", 1, "--no-preflight", "--json", "--run", "sweep"),
            *("--sweep", "optim.lr=1e-3,2e-3,4e-3", "--set", "train.steps=4", *TINY),
        )
    )
    runs = [Path(run) for run in said["runs"]]
    assert [run.name for run in runs] == ["tiny-0", "tiny-1", "tiny-2"]
    job = said["jobs"][0]
    cluster.wait(lambda: all((run / "summary.json").is_file() for run in runs), 120, "three summaries")
    cluster.wait(
        lambda: not cluster.run("squeue", "--noheader", "--array", f"--jobs={job}", "--states=RUNNING,PENDING,COMPLETING"), 60, "the end"
    )
    rates = [json.loads((run / "plan.json").read_text())["optim"]["lr"] for run in runs]
    assert rates == [1e-3, 2e-3, 4e-3]
    assert len({json.loads((run / "summary.json").read_text())["weights_sha256"] for run in runs}) == 3
    assert [verdicts(run) for run in runs] == [["done"]] * 3


@pytest.mark.parametrize("name", ["; $(touch PWNED) 'q' \"d\" %j", "comma,#hash =é→ -- *?"])
def test_hostile_run_folders_are_harmless_to_real_slurm(launches, cluster, tiny, name):
    launcher = "srun" if "#" in name else "torchrun"
    run = launches.folder / name
    job, found = launches(
        *(tiny, "--site", launches.site(), "--nodes", 1, "--no-preflight", "--launcher", launcher),
        *(*TINY, "--set", "train.steps=2", "--run", run),
    )
    assert found == run
    finished(cluster, job, run)
    assert (run / "logs" / f"job-{job}.out").is_file()
    assert not list(launches.folder.rglob("PWNED"))
    assert {path.name for path in launches.folder.iterdir()} == {name, "loopback.toml"}


@pytest.mark.parametrize(("nodes", "launcher"), [(2, "torchrun"), (4, "srun")])
def test_the_quickstart_end_to_end(launches, cluster, tmp_path_factory, nodes, launcher):
    cache = tmp_path_factory.getbasetemp() / "quickstart"
    job, run = launches(
        *("quickstart", "--site", launches.site(), "--nodes", nodes, "--launcher", launcher),
        *("--set", "train.steps=4", "--set", "validation.every=0", "--set", "sample.tokens=4", "--set", f'data.folder="{cache}"'),
    )
    summary = finished(cluster, job, run, 300)
    assert summary["steps"] == 4
    assert json.loads((run / "plan.json").read_text())["mesh"]["shard"] == nodes
    assert (run / "export" / "model.safetensors").is_file()
    logs = run / "logs" / "attempt-000"
    assert len(list(logs.glob("rank-*.log"))) == nodes
