"""Jobs on a real Slurm, from `gigatrain launch` to their last checkpoint, undisturbed and disturbed: the weights are the same."""

import json
import time

import pytest

from gigatrain.launching import job as jobs
from gigatrain.launching import restart
from gigatrain.launching.slurm import seconds as slurm_seconds

pytestmark = pytest.mark.slurm
TINY = ("--set", "validation.every=0", "--set", "export=false", "--set", "report.every=5", "--set", "checkpoint.every=20")
STEPS = ("--set", "train.steps=600")


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
    from conftest import Launches

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
    assert "n2" in restart.excluded(run.parent / "excluded-loopback.jsonl")


@pytest.mark.parametrize("lost", ["n1", "n2"])  # n1 runs the script itself
def test_a_node_is_lost_without_a_spare_and_the_job_goes_on_elsewhere(undisturbed, launches, cluster, tiny, lost):
    job, run = launches(tiny, "--site", launches.site(), "--nodes", 2, "--no-preflight", *TINY, *STEPS)
    trained(run, 60)
    cluster.kill_node(lost)
    summary = finished(cluster, job, run)
    assert cluster.state(job)["Restarts"] == "1", story(run)
    assert summary["weights_sha256"] == undisturbed
    assert lost not in [event for event in jobs.history(run) if event["event"] == "judged"][-1]["nodes"].split(",")


def test_the_time_limit_ends_a_job_and_not_the_run(launches, cluster, tiny):
    """The same run, undisturbed, is on the other nodes meanwhile. Slurm looks at limits every half minute."""
    steps = (*TINY, "--set", "train.steps=1600", "--nodes", 2, "--no-preflight")
    job, run = launches(tiny, "--site", launches.site(lead_s=100), "--time", "00:10:00", *steps, "--run", "limited")
    other, whole = launches(tiny, "--site", launches.site(), *steps, "--run", "whole")
    assert cluster.state(job)["TimeLimit"] == "00:10:00"
    trained(run, 60)
    # However slow this machine is: less than `lead_s` is left from now on, and enough to save.
    minutes = (slurm_seconds(cluster.state(job)["RunTime"]) + 40) // 60 + 1
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    until(lambda: verdicts(run), 60, "the job was told of its limit")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=UNLIMITED")
    summary, expected = finished(cluster, job, run), finished(cluster, other, whole)
    first = next(event for event in jobs.history(run) if event["event"] == "judged")
    assert (first["signal"], first["code"]) == ("USR1", 0), story(run)
    assert 60 <= first["step"] < 1600
    assert "left" in [event["event"] for event in jobs.history(run)]  # the ranks saved, and were not killed
    assert verdicts(run) == ["requeue", "done"], story(run)
    assert verdicts(whole) == ["done"]
    assert cluster.state(job)["Restarts"] == "1"
    assert summary["weights_sha256"] == expected["weights_sha256"]


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_job_that_matters_more_takes_the_nodes_and_the_run_goes_on_later(undisturbed, launches, cluster, tiny, launcher):
    job, run = launches(tiny, "--site", launches.site(), "--nodes", 2, "--no-preflight", "--launcher", launcher, *TINY, *STEPS)
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
