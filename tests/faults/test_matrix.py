"""The fault matrix, as CI runs it: twenty kills and one fault of each kind, in some three minutes of two cores.

GIGATRAIN_FAULTS=all takes each fault once, and `gigatrain bench faults` is the long form.

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
ALL = os.environ.get("GIGATRAIN_FAULTS") == "all"
# One of a kind each, on the fewest ranks; the rest is alike (a signal, a way to damage a file) or takes an engine more.
CHEAP = (
    "launcher", "term", "stop", "gil", "oom", "crashloop", "recipe", "enospc", "fullstart", "eio", "stall", "writerkill", "bitflip", "alldamaged", "nan",
    "corpus",
)  # fmt: skip
ONCE = [name for name in FAULTS if name != "kill" and (ALL or name in CHEAP)]
KILLS = [("native-2", 10, 1), ("native-2", 10, 2), *([("zero2-2", 10, 3)] if ALL else [])]


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


@pytest.mark.parametrize(("engine", "kills", "seed"), KILLS)
def test_killed_again_and_again_a_run_ends_bitwise_equal(lab, engine, kills, seed):
    """P1: SIGKILL of random processes at random moments: start, load, step, save, validation. Every kill that was asked for was made."""
    row = told(faults.row(lab, FAULTS["kill"], ENGINES[engine], SEED * 1000 + seed, kills))
    assert len(row.harms) == kills


@pytest.mark.parametrize("name", ONCE)
def test_each_fault_once(lab, name):
    fault = FAULTS[name]
    engine = "ddp-2" if name == "copies" else "native-2" if fault.least > 1 or name == "swap" else "native-1"
    told(faults.row(lab, fault, ENGINES[engine], SEED * 1000 + 100 + list(FAULTS).index(name)))


def test_every_name_is_a_faults():
    assert set(CHEAP) < set(FAULTS)
