"""AMD's GPUs: a module of amdsmi's documented names and answers (there is no ROCm here), and the kernel's own files of amdgpu."""

import subprocess
import sys
from pathlib import Path

import pytest
from replay import Clock, metered, pass_by

from gigatrain.power import amd

SERIALS = [f"{0xCF1182F2988C0A40 + number:016x}" for number in range(8)]
TORCH = [bytes(serial, "ascii").hex() for serial in SERIALS]  # as torch writes the 16 letters that HIP gives as a UUID
TORCH = [f"{one[:8]}-{one[8:12]}-{one[12:16]}-{one[16:20]}-{one[20:]}" for one in TORCH]

# What ROCm's Python package gives, as its documentation has it; of an MI250X the odd die says 0 W and a counter of 0, as its driver does.
_AMDSMI = """
class AmdSmiException(Exception): pass
class AmdSmiLibraryException(AmdSmiException): pass
NOW, CHIP, OLD, LOST = 100.0, "AMD Instinct MI300X OAM", False, set()
def amdsmi_init(flag=2): pass
def amdsmi_shut_down(): raise AssertionError("it is not ours to shut")
def amdsmi_get_processor_handles(): return list(range(8))
def amdsmi_get_gpu_asic_info(handle): return {"market_name": CHIP, "asic_serial": f"0x{0xCF1182F2988C0A40 + handle:016X}"}
def amdsmi_get_gpu_device_uuid(handle): return f"{handle:02x}ff74a1-0000-1000-80e9-b388cfe84658"
def _watts(handle):
    if handle in LOST: raise AmdSmiLibraryException("AMDSMI_STATUS_NO_DATA")
    return 0 if "MI250" in CHIP and handle % 2 else 400 + 10 * handle
def amdsmi_get_energy_count(handle):
    ticks = int((1e9 + _watts(handle) * NOW * 1e6) / 15.259) if _watts(handle) else 0
    return {"power" if OLD else "energy_accumulator": ticks, "counter_resolution": 15.259, "timestamp": int(NOW * 1e9)}
def amdsmi_get_power_info(handle):
    mean = "MI250" in CHIP
    return {"current_socket_power": "N/A" if mean else _watts(handle), "average_socket_power": _watts(handle) if mean else "N/A", "power_limit": 750000000}
"""


class Module(Clock):
    """Its time is the clock's."""

    def __init__(self, module):
        self.module = module
        super().__init__()

    @property
    def now(self):
        return self.module.NOW

    @now.setter
    def now(self, seconds):
        self.module.NOW = seconds


@pytest.fixture
def amdsmi(tmp_path, monkeypatch):
    (tmp_path / "amdsmi.py").write_text(_AMDSMI)
    monkeypatch.syspath_prepend(tmp_path)
    import amdsmi  # type: ignore[import-not-found]

    monkeypatch.setattr(amd, "monotonic", lambda: amdsmi.NOW)
    yield amdsmi
    del sys.modules["amdsmi"]


@pytest.mark.parametrize("old", [False, True])
def test_gpus_are_found_by_torchs_uuid_and_counted(amdsmi, old):
    amdsmi.OLD = old
    found, notes = amd.sources([TORCH[5], TORCH[0]])
    assert [one.covers for one in found] == [(TORCH[5],), (TORCH[0],)]
    assert notes == []
    assert (found[0].name, found[0].check) == ("amdsmi energy counter, AMD Instinct MI300X OAM", "watts")
    clock = Module(amdsmi)
    meter = metered(clock, found)  # type: ignore[arg-type]
    pass_by(meter, clock, 30)
    taken = meter.take()
    assert taken.device_measured_mj == pytest.approx((450 + 400) * 30_000, rel=1e-4)
    assert taken.integral_mj == pytest.approx(taken.counter_mj, rel=1e-4)


def test_the_dies_of_an_mi250x_are_packages_counted_once(amdsmi):
    amdsmi.CHIP = "AMD Instinct MI250X"
    found, notes = amd.sources([*TORCH[:3], TORCH[7]])
    assert [one.covers for one in found] == [(TORCH[0], TORCH[1]), (TORCH[2],), (TORCH[7],)]
    assert [one.read().milliwatts for one in found] == [400_000, 420_000, 460_000]  # the even die's, also for whoever has the odd one only
    assert (found[0].check, len(notes)) == ("watts, a mean", 1)
    assert "counted once" in notes[0]


def test_a_gpu_that_amdsmi_does_not_know_and_one_that_says_nothing_are_named(amdsmi):
    amdsmi.LOST = {1}
    found, notes = amd.sources([TORCH[1], "GPU-deadbeef", TORCH[2]])
    assert [one.covers for one in found] == [(TORCH[2],)]
    assert notes[0] == f"{TORCH[1]}: AMD Instinct MI300X OAM: AMDSMI_STATUS_NO_DATA"
    assert notes[1].startswith("GPU-deadbeef: no AMD GPU of this id; there are ")
    amdsmi.LOST = {2}
    clock = Module(amdsmi)
    meter = metered(clock, found)  # type: ignore[arg-type]
    pass_by(meter, clock, 20)
    assert meter.take().device_unknown_ms > 14_000


def card(drm: Path, number: int, device: str, **sensors: int) -> None:
    """What amdgpu shows of one die."""
    folder = drm.parent / "devices" / f"0000:{number:02x}:00.0"
    (folder / "hwmon" / "hwmon3").mkdir(parents=True)
    for name, text in (("vendor", "0x1002"), ("device", device), ("unique_id", SERIALS[number])):
        (folder / name).write_text(text + "\n")
    for name, value in sensors.items():
        (folder / "hwmon" / "hwmon3" / name).write_text(f"{value}\n")
    (drm / f"card{number}").mkdir(parents=True)
    (drm / f"card{number}" / "device").symlink_to(folder)


def test_without_amdsmi_the_kernels_files_are_read_and_that_is_said(tmp_path, monkeypatch):
    drm = tmp_path / "drm"
    card(drm, 0, "0x7408", energy1_input=12_345_678_000, power1_average=431_000_000)
    card(drm, 1, "0x7408", energy1_input=0)
    card(drm, 2, "0x74a1", power1_input=650_000_000, energy1_input=0)  # a counter of 0 is no counter
    monkeypatch.setattr(amd, "DRM", drm)
    found, notes = amd.sources([TORCH[1], TORCH[0], TORCH[2], TORCH[6]])
    assert [one.covers for one in found] == [(TORCH[1], TORCH[0]), (TORCH[2],)]
    looks = [one.read() for one in found]
    assert [(look.counter_mj, look.milliwatts) for look in looks] == [(12_345_678, 431_000), (None, 650_000)]
    assert notes[0].startswith("no amdsmi (ModuleNotFoundError")
    assert notes[0].endswith("hwmon of amdgpu instead")
    assert "MI250X" in notes[1]
    assert notes[2].startswith(f"{TORCH[6]}: no AMD GPU of this id")


def test_on_a_machine_without_amds_gpus_there_is_a_note_and_no_meter():
    code = "from gigatrain.power import amd; print(amd.sources(['x']))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("([], [\"no amdsmi (ModuleNotFoundError: No module named 'amdsmi'): no AMD GPU is read\"])")
