"""Slurm's commands as functions: what they say turned into values and errors, without a cluster; with one in test_slurm_commands.py."""

import pytest

from gigatrain.errors import RunError
from gigatrain.launching import slurm

TASK = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "2",
}


def test_durations_both_ways():
    assert slurm.seconds("2-03:04:05") == 183845
    assert slurm.seconds("03:04:05") == 11045
    assert slurm.seconds("04:05") == 245
    assert slurm.seconds("UNLIMITED") is None
    assert slurm.clock(183845) == "51:04:05"
    assert slurm.seconds(slurm.clock(183845)) == 183845


def test_a_machine_without_slurm_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunError, match="sbatch is not found: .*--dry-run needs no Slurm"):
        slurm.run("sbatch")


@pytest.mark.parametrize(
    ("said", "way"),
    [
        ("sbatch: error: invalid partition specified: gpu", "`sinfo` lists them"),
        ("sbatch: fatal: Could not establish a configuration source", "this machine is of no Slurm cluster: launch on a login node"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified", "--account"),
        ("sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "--time"),
    ],
)
def test_what_slurm_refuses_comes_with_a_way_out(said, way, tmp_path, monkeypatch):
    program = tmp_path / "refusing"
    program.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(RunError) as failure:
        slurm.run(str(program))
    assert said in str(failure.value)
    assert way in str(failure.value)


def test_a_command_that_does_not_answer_is_given_up():
    with pytest.raises(RunError, match="sleep did not answer within 0 s"):
        slurm.run("sleep", "20", limit_s=0.1)


def test_a_task_of_srun_as_a_rank():
    assert slurm.rank_environment(TASK) == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for broken in ({"SLURM_PROCID": "x"}, {"SLURM_STEP_NUM_NODES": "3"}):
        with pytest.raises(RunError):
            slurm.rank_environment(TASK | broken)
    with pytest.raises(RunError, match="no MASTER_PORT"):
        slurm.rank_environment({name: value for name, value in TASK.items() if name != "MASTER_PORT"})
    with pytest.raises(RunError, match="no task of srun"):
        slurm.rank_environment({})


def test_a_job_within_a_job_does_not_inherit_its_shape():
    environment = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "4",
        "SLURM_CONF": "/etc/s",
        "SBATCH_ACCOUNT": "me",
        "HOME": "/root",
        "SLURMD_NODENAME": "n1",
        "SBATCH_PARTITION": "debug",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_RESERVATION": "maintenance",
    }
    assert slurm.outside(environment) == {
        "SLURM_CONF": "/etc/s",
        "SBATCH_ACCOUNT": "me",
        "SBATCH_RESERVATION": "maintenance",
        "HOME": "/root",
    }
    assert "SBATCH_ACCOUNT" not in slurm.outside(environment, "mine")  # it would override the script's, and bill another
