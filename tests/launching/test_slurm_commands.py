"""Slurm's commands as functions, on a real Slurm; and every shipped site's script as it judges it."""

import re

import pytest

from gigatrain import load
from gigatrain.errors import RunError
from gigatrain.launching import script, slurm
from gigatrain.launching.job import Job

pytestmark = pytest.mark.slurm
SITES = sorted(name for name, path in load.sites().items() if load.site(path).scheduler.kind == "slurm")


@pytest.fixture
def here(cluster, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return cluster


def test_a_job_from_its_queue_to_its_end(here, tmp_path):
    path = tmp_path / "-job $(touch x).sh"
    path.write_text(
        f"#!/bin/bash\n#SBATCH --job-name='a|b c'\n#SBATCH --output={tmp_path}/out\n#SBATCH --nodes=2\n#SBATCH --time=10\nsleep 60\n"
    )
    assert "to start at" in slurm.tested(path) or slurm.tested(path) == ""
    job = slurm.submit(path, "--requeue")
    here.wait(lambda: slurm.queued(job)[0].state == "RUNNING", 20, "it runs")
    (found,) = slurm.queued(job)
    assert (found.id, found.name, found.user, found.partition, found.nodes) == (job, "a|b c", here.user, "debug", 2)
    assert slurm.hostnames(found.node_list) == ["n1", "n2"]
    assert found.limit_s == 600
    assert found in slurm.queued(user=here.user)
    assert slurm.shown(job)["Requeue"] == "1"
    slurm.requeue(job)
    here.wait(lambda: slurm.shown(job)["Restarts"] == "1", 20, "it waits again")
    slurm.cancel(job)
    here.wait(lambda: slurm.queued(job)[0].state == "CANCELLED", 30, "its end")
    assert slurm.queued("99999") == []
    assert [one.id for one in slurm.queued(job, "99999")] == [job]
    assert [path.name for path in tmp_path.iterdir() if path.name == "x"] == []


def test_refusals_are_slurms_own_words_with_a_way_out(here, tmp_path):
    path = tmp_path / "job.sh"
    path.write_text("#!/bin/bash\ntrue\n")
    with pytest.raises(RunError, match=r"invalid partition specified: nowhere.*`sinfo` lists them"):
        slurm.submit(path, "--partition=nowhere")
    with pytest.raises(RunError, match=r"Invalid feature specification.*sinfo"):
        slurm.tested(path, "--constraint=nowhere")
    with pytest.raises(RunError, match=r"Invalid job id.*gigatrain ps"):
        slurm.requeue("99999")
    with pytest.raises(RunError, match="accounting storage is disabled"):
        slurm.accounted("1")


LACKING = re.compile(  # what this cluster does not have; sbatch has read every option's syntax before it says so
    r"invalid (partition|qos|account|feature|generic resource|gres|trackable)|node configuration is not available|GRES option|unrecognized option '--segment",
    re.IGNORECASE,
)


@pytest.mark.parametrize("name", SITES)
def test_every_shipped_sites_script_is_one_that_sbatch_takes(here, tmp_path, name):
    """As it is, where only what this cluster lacks may be refused; and without that, where nothing may be."""
    site = load.site(name)
    lacks = {"partition": None, "account": None, "qos": None, "constraint": None, "segment": None, "gpus": "none", "cpus_per_task": False}
    local = site.model_copy(update={"scheduler": site.scheduler.model_copy(update=lacks)})
    for one in (site, local):
        job = Job(name="tiny", run=str(tmp_path), recipe="r", workdir="/", python="/p", site=one, nodes=2, ranks_per_node=4, time_s=3600)
        path = tmp_path / "job.sh"
        path.write_text(script.render(job))
        refused = ""
        try:
            slurm.tested(path)
        except RunError as failure:
            refused = str(failure)
        assert not refused or (one is site and LACKING.search(refused)), refused
