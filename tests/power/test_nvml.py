"""NVIDIA's GPUs: the real nvidia-ml-py on a stub whose joules are known by a formula."""

import json
import os
import subprocess
import sys

import pytest

NOUGHT = "0000-0000-0000-000000000000"
GPU = [f"GPU-0000000{gpu}-{NOUGHT}" for gpu in range(8)]


def mig(gpu, instance):
    return f"MIG-0000000{gpu}-0000-0000-0000-00000000000{instance}"


def test_gpus_are_found_by_uuid_with_and_without_its_prefix_and_each_once(stub):
    said = stub([GPU[3], GPU[1].removeprefix("GPU-"), GPU[3].removeprefix("GPU-")])
    assert [one[0] for one in said["sources"]] == [GPU[3], GPU[1]]
    assert said["sources"][0][4] == [GPU[3], GPU[3].removeprefix("GPU-")]
    assert said["notes"] == []
    assert [one[1] for one in said["looks"]] == [
        int(1000 * said["watts"][gpu]) for gpu in (3, 1)
    ]  # instantaneous, and of the one that was asked for
    assert said["sources"][0][2:4] == ["NVML energy counter, H100 80GB HBM3", "instantaneous watts"]


def test_instances_of_a_mig_gpu_are_their_gpu_once(stub):
    said = stub([mig(0, 1), mig(0, 2), mig(2, 1).removeprefix("MIG-"), GPU[5]], seconds=20)
    assert [(one[0], len(one[4])) for one in said["sources"]] == [(GPU[0], 2), (GPU[2], 1), (GPU[5], 1)]
    assert said["notes"] == ["3 MIG instances on 2 GPUs: an instance has no meter, each stands for its whole GPU, counted once"]
    assert said["taken"]["devices"] == 3
    assert said["taken"]["device_measured_mj"] == pytest.approx(1000 * sum(said["truth_j"][gpu] for gpu in (0, 2, 5)), rel=5e-3)


@pytest.mark.parametrize(
    ("faults", "scope", "counter", "check"),
    [
        ({"CHIP": "a100"}, "gpu", "NVML energy counter, A100-SXM4-64GB", "instantaneous watts"),
        ({"CHIP": "a100", "OLD": 1}, "gpu", "NVML energy counter, A100-SXM4-64GB", "power usage, instantaneous"),
        ({"OLD": 1}, "gpu", "NVML energy counter, H100 80GB HBM3", "power usage, mean of 1 s"),
        ({"CHIP": "gh200"}, "gpu", "NVML energy counter, GH200 120GB", "instantaneous watts"),
        (
            {"CHIP": "gh200-flat"},
            "module",
            "NVML energy counter of the module, Grace and its memory included, GH200 120GB",
            "instantaneous watts",
        ),
        ({"CHIP": "gh200-mute"}, "module", "NVML energy counter of the module, Grace and its memory included, GH200 120GB", ""),
    ],
)
def test_what_a_counter_and_its_watts_are_of_is_found_out_and_named(stub, faults, scope, counter, check):
    said = stub(GPU[:2], seconds=60, **faults)
    assert [one[1:4] for one in said["sources"]] == [[scope, counter, check]] * 2
    grace_j = 2 * 90 * 60 if scope == "module" else 0
    truth_mj = 1000 * (sum(said["truth_j"][:2]) + grace_j)
    assert said["taken"]["device_measured_mj"] == pytest.approx(truth_mj, rel=2e-3)
    if check:  # both of the same scope, so that they agree
        assert said["taken"]["integral_mj"] == pytest.approx(said["taken"]["counter_mj"], rel=5e-3)
    else:
        assert said["taken"]["integral_mj"] == said["taken"]["counter_mj"] == 0
        assert "no cross-check" in said["notes"][0]
    assert any("by their old name" in note for note in said["notes"]) == bool(faults.get("OLD"))


def test_a_gpu_that_is_not_there_or_not_ours_is_told_by_name(stub):
    said = stub([GPU[0], GPU[1], f"GPU-00000009-{NOUGHT}"], FORBIDDEN=1)
    assert [one[0] for one in said["sources"]] == [GPU[1]]
    assert said["notes"] == [
        f"{GPU[0]}: Insufficient Permissions (another user's, or hidden by the container)",
        f"GPU-00000009-{NOUGHT}: Not Found",
    ]


def test_without_a_driver_there_is_a_note_and_no_meter():
    code = "from gigatrain.power import nvml; print(nvml.sources(['GPU-1']))"
    said = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"LD_LIBRARY_PATH": "/nonexistent"}, capture_output=True, text=True, check=True
    )
    assert said.stdout == "([], ['no NVML: NVML Shared Library Not Found'])\n"


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"jitter": 0.9, "miss": 0.3},
        {"UPDATE_S": 0.02, "every_s": 0.2, "jitter": 0.5},
        {"UPDATE_S": 0.1, "every_s": 1.0, "jitter": 0.5},
        {"RESET_S": 1033.33, "jitter": 0.5, "miss": 0.1},
        {"LOST_S": 1020, "FOUND_S": 1023, "jitter": 0.5},
    ],
)
def test_joules_are_the_stubs_within_half_a_per_cent(stub, how):
    said = stub(GPU, seconds=120, **how)
    taken = said["taken"]
    truth_mj = 1000 * sum(said["truth_j"])
    assert taken["device_measured_mj"] + taken["device_estimated_mj"] == pytest.approx(truth_mj, rel=5e-3)
    assert taken["integral_mj"] == pytest.approx(taken["counter_mj"], rel=5e-3)
    assert taken["gaps"] == bool(how.get("RESET_S") or how.get("LOST_S"))
    assert (taken["device_estimated_mj"] > 0) == bool(how.get("RESET_S"))
    assert taken["device_ms"] == 8 * 120_000


def test_a_gpu_that_falls_off_the_bus_is_a_gap_of_known_length_and_no_zero(stub):
    said = stub(GPU[:4], seconds=60, LOST_S=1020)
    taken = said["taken"]
    assert taken["gap_ms"] == taken["device_unknown_ms"] == pytest.approx(40_000, abs=200)
    assert taken["device_ms"] + taken["device_unknown_ms"] == 4 * taken["ms"]
    assert taken["gaps"] == 1
    assert taken["node_unknown_ms"] == 60_000
    assert f"{GPU[0]} no longer answers: {GPU[0]}: GPU is lost" in said["meters"]["notes"]


@pytest.mark.parametrize(
    ("reasons", "held"), [(0x4, (1, 0, 0)), (0x20, (0, 1, 0)), (0x48, (0, 1, 0)), (0x88, (0, 0, 1)), (0x8, (0, 0, 1)), (0x11, (0, 0, 0))]
)
def test_why_clocks_were_held_down_is_counted_in_device_time(stub, reasons, held):
    taken = stub(GPU[:2], seconds=10, REASONS=reasons)["taken"]
    assert (taken["power_capped_ms"], taken["thermal_ms"], taken["brake_ms"]) == tuple(20_000 * one for one in held)
    assert taken["reasons_ms"] == 20_000


_OPENED = """
import ctypes, json, sys, time
from gigatrain.config import Power
from gigatrain.planning.watts import Watts
from gigatrain.power.meter import opened
stub = ctypes.CDLL("libnvidia-ml.so.1")
stub.fake_joules.restype, stub.fake_joules.argtypes = ctypes.c_double, [ctypes.c_int] + [ctypes.c_double] * 2
with opened(Power(sysfs=sys.argv[1], node="none", every_s=0.02), Watts(), sys.argv[2:], whole=True) as meter:
    began = time.monotonic()
    meter.take()
    time.sleep(0.6)
taken, until = meter.take(), time.monotonic()
watts = sum(stub.fake_joules(gpu, began, until) for gpu in range(8)) / (until - began)
print(json.dumps([meter.meters, taken.devices, taken.device_measured_mj / taken.ms, watts]))
"""


def test_a_meter_is_opened_on_a_driver_and_its_thread_counts_what_was_drawn(nvml_library, tmp_path):
    environment = os.environ | {"LD_LIBRARY_PATH": str(nvml_library), "FAKE_UPDATE_S": "0.001"}
    command = [sys.executable, "-c", _OPENED, str(tmp_path), *GPU]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    meters, devices, watts, true = json.loads(said)
    assert meters["device"] == "8 x NVML energy counter, H100 80GB HBM3"
    assert meters["check"] == "8 x instantaneous watts"
    assert devices == 8
    assert watts == pytest.approx(true, rel=0.2)  # its time is a look more or less than the truth's
