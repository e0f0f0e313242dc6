"""The fault matrix, as CI runs it: at least twenty kills and one of each fault, within four minutes of two cores. `gigatrain bench faults` is the long form.

The driver is the product's own (gigatrain/bench/faults.py), a process apart from the runs that it disturbs. Seeds are fixed and printed, nothing is tried
twice, and the oracle is a file of hashes of a run that nothing was done to.
"""

import os

import pytest

from gigatrain.bench import faults
from gigatrain.bench.inject import FAULTS
from gigatrain.bench.subject import ENGINES, Lab

pytestmark = [pytest.mark.faults, pytest.mark.long]
SEED = int(os.environ.get("GIGATRAIN_FAULTS_SEED", "9"))
ONCE = [name for name in FAULTS if name != "kill"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("faults"), say=print)


def told(row):
    print(f"{row.fault} on {row.engine}: gigatrain bench faults --only {row.fault} --engines {row.engine} --row {row.seed}")
    print(row)
    if row.kept == faults.SKIPPED:
        pytest.skip(row.outcome)
    assert row.kept == faults.KEPT, row.outcome
    return row


@pytest.mark.parametrize(("engine", "kills", "seed"), [("native-2", 7, 1), ("native-2", 7, 2), ("zero2-2", 7, 3)])
def test_killed_again_and_again_a_run_ends_bitwise_equal(lab, engine, kills, seed):
    """P1: SIGKILL of random processes at random moments: start, load, step, save, validation. Every kill that was asked for was made."""
    row = told(faults.row(lab, FAULTS["kill"], ENGINES[engine], SEED * 1000 + seed, kills))
    assert len(row.harms) == kills


@pytest.mark.parametrize("name", ONCE)
def test_each_fault_once(lab, name):
    fault = FAULTS[name]
    told(
        faults.row(
            lab,
            fault,
            ENGINES["native-2" if fault.least > 1 or name in ("nan", "swap") else "native-1"],
            SEED * 1000 + 100 + ONCE.index(name),
        )
    )
