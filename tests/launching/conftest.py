"""One real Slurm for all tests that need it."""

import cluster as loopback
import pytest
from launches import Launches


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """The cluster: started by the first test that asks, ended with the session."""
    with loopback.running(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def cluster(slurm):
    """The cluster with every node idle, before and after."""
    slurm.revive()
    yield slurm
    slurm.run("scancel", "--signal=KILL", "--user=" + slurm.user)
    slurm.run("scancel", "--user=" + slurm.user)


@pytest.fixture
def launches(cluster, tmp_path) -> Launches:
    return Launches(cluster, tmp_path)
