"""Processors' meters on trees of files as kernels make them (formats: the sources named in host.py)."""

import errno
import json
import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from gigatrain.errors import PowerError
from gigatrain.power import host
from gigatrain.power.reading import Reading, total

RANGE = 262_143_328_850  # max_energy_range_uj of most Intel packages
PLACE = ("node17",)


def zone(sysfs: Path, folder: str, name: str, energy_uj: int = 5_000_000, range_uj: int = RANGE) -> Path:
    """One zone of /sys/class/powercap, which is flat: zones within zones are told by their names."""
    at = sysfs / "class" / "powercap" / folder
    at.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", energy_uj), ("max_energy_range_uj", range_uj), ("enabled", 0)):
        (at / file).write_text(f"{text}\n")
    return at


def server(sysfs: Path) -> dict[str, Path]:
    """Two sockets of a server, with all zones there are."""
    (sysfs / "class" / "powercap" / "intel-rapl").mkdir(parents=True)  # the control type itself lies beside its zones
    return {
        "p0": zone(sysfs, "intel-rapl:0", "package-0", 1_000_000_000),
        "core0": zone(sysfs, "intel-rapl:0:0", "core"),
        "dram0": zone(sysfs, "intel-rapl:0:1", "dram", 65_000_000, 65_712_999_613),
        "p1": zone(sysfs, "intel-rapl:1", "package-1", 2_000_000_000),
        "uncore1": zone(sysfs, "intel-rapl:1:0", "uncore"),
        "dram1": zone(sysfs, "intel-rapl:1:1", "dram", 66_000_000, 65_712_999_613),
        "psys": zone(sysfs, "intel-rapl:2", "psys", 9_000_000_000),
        "again0": zone(sysfs, "intel-rapl-mmio:0", "package-0", 3_000_000_000),  # another number, by which it can be told which was read
        "again1": zone(sysfs, "intel-rapl-mmio:1", "package-1", 2_000_000_000),
    }


def meter(sysfs: Path, number: int, label: str | None, microwatts: int, *, on_device: bool = True, interval_ms: int = 50) -> Path:
    """An ACPI power meter; its files are on the ACPI device or, by a kernel that makes hwmon devices with attributes, on the hwmon one."""
    hwmon = sysfs / "class" / "hwmon" / f"hwmon{number}"
    at = hwmon / "device" if on_device else hwmon
    at.mkdir(parents=True)
    (at / "name").write_text("power_meter\n")
    (at / "power1_average").write_text(f"{microwatts}\n")
    (at / "power1_average_interval").write_text(f"{interval_ms}\n")
    if label is not None:
        (at / "power1_oem_info").write_text(f"{label}\n")
    return at / "power1_average"


def readings(sources) -> list[Reading]:
    return [Reading(one.place, one.scope, 1.0, "measured", one.name) for one in sources]


def test_packages_and_their_memory_are_given_once_and_nothing_within_them(tmp_path):
    server(tmp_path)
    sources, notes = host.sources(tmp_path, PLACE)
    assert [(one.place[1:], one.scope, one.read().counter_mj) for one in sources] == [
        (("package-0",), "cpu", 1_000_000),
        (("package-0", "dram"), "dram", 65_000),
        (("package-1",), "cpu", 2_000_000),
        (("package-1", "dram"), "dram", 66_000),
        ((), "node", 9_000_000),
    ]
    assert total(readings(sources[:-1])) == 4  # beside each other
    with pytest.raises(PowerError, match="cpu node17/package-0 .*lies within node node17 .*psys"):
        total(readings(sources))
    assert any("psys" in note for note in notes)
    assert all(one.place[:1] == PLACE and one.wrap_mj is None and one.update_s <= 0.01 for one in sources)


def test_amd_has_the_same_names_and_dies_of_one_package_are_two(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0-die-0")
    zone(tmp_path, "intel-rapl:0:0", "core")
    zone(tmp_path, "intel-rapl:1", "package-0-die-1")
    sources, notes = host.sources(tmp_path, PLACE)
    assert [one.place[1] for one in sources] == ["package-0-die-0", "package-0-die-1"]
    assert total(readings(sources)) == 2
    assert notes == []


def test_a_package_that_only_mmio_shows_is_read_there(tmp_path):
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 7_000_000)
    sources, _ = host.sources(tmp_path, PLACE)
    assert [one.read().counter_mj for one in sources] == [7_000]


def test_ten_sockets_stand_in_the_order_of_their_numbers(tmp_path):
    for number in range(11):
        zone(tmp_path, f"intel-rapl:{number}", f"package-{number}")
    assert [one.place[1] for one in host.sources(tmp_path, PLACE)[0]] == [f"package-{number}" for number in range(11)]


def test_several_platform_zones_are_named_and_not_read(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0")
    zone(tmp_path, "intel-rapl:1", "psys")
    zone(tmp_path, "intel-rapl:3", "psys-1")
    sources, notes = host.sources(tmp_path, PLACE)
    assert [one.scope for one in sources] == ["cpu"]
    assert any("psys and psys-1 are not read" in note for note in notes)


def test_no_joule_is_lost_over_a_wrap_of_the_file(tmp_path):
    drew = RANGE - 2_000_000_000
    at = zone(tmp_path, "intel-rapl:0", "package-0", drew)
    (source,) = host.sources(tmp_path, PLACE)[0]
    chance = random.Random(7)
    for _ in range(100):
        drew += chance.randrange(90_000_001)  # up to 90 J between two looks: under what a package may draw in 0.1 s
        (at / "energy_uj").write_text(f"{drew % RANGE}\n")
        assert source.read().counter_mj == drew // 1000
    assert drew > RANGE


def test_no_joule_is_lost_over_many_wraps(tmp_path):
    for range_uj in (RANGE, 65_532_610_987):
        counter = host.Counter(tmp_path / "energy_uj", PLACE, "cpu", "package-0", range_uj, host.PACKAGE_WATTS)
        drew, now, chance = 0, 0.0, random.Random(range_uj)
        for _ in range(30_000):
            passed_s = chance.choice((0.02, 0.1, 0.1, 3.0, 20.0))
            drew += int(passed_s * chance.uniform(0, 950) * 1e6)
            now += passed_s
            assert counter.went_on(drew % range_uj, now) == drew
        assert drew > 100 * range_uj


def test_wraps_are_told_from_resets_and_from_what_nobody_saw(tmp_path):
    at = zone(tmp_path, "intel-rapl:0", "package-0")
    counter = host.Counter(at / "energy_uj", PLACE, "cpu", "package-0", RANGE, host.PACKAGE_WATTS)
    assert counter.went_on(RANGE - 1_000, 10.0) == RANGE - 1_000
    assert counter.went_on(9_000, 10.1) == RANGE + 9_000  # went round
    assert counter.went_on(50_000_000, 10.2) == RANGE + 50_000_000
    assert counter.went_on(1_000, 10.3) == 0  # back, and no package draws 262 kJ in 0.1 s: reset
    assert counter.went_on(31_000, 10.4) == 30_000
    assert counter.went_on(100_031_000, 400.0) == 0  # in 390 s it may have gone round once more than it shows
    assert counter.went_on(100_031_000 + 30_000_000, 400.1) == 30_000_000
    assert counter.went_on(100_031_000 + 300_000_000_000, 400.2) == 0  # 300 kJ in 0.1 s


def test_what_is_roots_alone_is_named_with_the_way_out():
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    try:
        folder.chmod(0o755)
        zones = server(folder)
        for one in zones.values():
            (one / "energy_uj").chmod(0)
        (zones["p1"] / "energy_uj").chmod(0o444)
        (folder / "class" / "powercap" / "intel-rapl-mmio:1" / "energy_uj").chmod(0o444)
        seen, notes = as_nobody(lambda: _names(host.sources(folder, PLACE)))
    finally:
        shutil.rmtree(folder)
    assert seen == ["RAPL package-1"]
    (note,) = notes
    for word in (
        "package-0,",
        "package-0 dram",
        "psys",
        "intel-rapl:0/energy_uj",
        "EACCES",
        "CVE-2020-8694",
        "udev",
        "CAP_DAC_READ_SEARCH",
    ):
        assert word in note


def _names(answer):
    return [one.name for one in answer[0]], answer[1]


def as_nobody(what):
    """What it gives in a process that may not read everything."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os.write(into, json.dumps(what()).encode())
        finally:
            os._exit(0)
    os.close(into)
    with open(out, "rb") as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text)


def test_a_zone_that_is_taken_away_is_an_error_and_comes_back(tmp_path):
    child = subprocess.Popen(["sleep", "60"])
    try:
        at = zone(tmp_path, "intel-rapl:0", "package-0")
        (at / "energy_uj").unlink()
        (at / "energy_uj").symlink_to(f"/proc/{child.pid}/oom_score")  # a kernel's file with a number in it that can be taken away
        (source,) = host.sources(tmp_path, PLACE)[0]
        source.read()
    finally:
        child.kill()
        child.wait()
    with pytest.raises(OSError, match="energy_uj") as gone:
        source.read()
    assert gone.value.errno in (errno.ESRCH, errno.ENODEV, errno.ENOENT)
    with pytest.raises(FileNotFoundError, match="energy_uj"):
        source.read()
    (at / "energy_uj").unlink()
    (at / "energy_uj").write_text("5000\n")
    assert source.read().counter_mj is not None
    source.close()


@pytest.mark.parametrize("text", ["", "\n", "off\n"])
def test_what_is_no_number_is_refused_by_name(tmp_path, text):
    at = zone(tmp_path, "intel-rapl:0", "package-0")
    (source,) = host.sources(tmp_path, PLACE)[0]
    (at / "energy_uj").write_text(text)
    with pytest.raises(PowerError, match="energy_uj holds .* where a whole number belongs"):
        source.read()
    sources, notes = host.sources(tmp_path, PLACE)
    assert sources == []
    assert any("RAPL package-0 is not read" in note for note in notes)


def test_a_hidden_powercap_says_how_a_container_gets_it(tmp_path):
    folder = tmp_path / "class" / "powercap"
    folder.mkdir(parents=True)
    for number in range(2):  # Docker masks what /sys/class/powercap points to
        (folder / f"intel-rapl:{number}").symlink_to(f"../../devices/virtual/powercap/intel-rapl/intel-rapl:{number}")
    sources, notes = host.sources(tmp_path, PLACE)
    assert sources == []
    assert len(notes) == 1
    for word in ("intel-rapl:0", "intel-rapl:1", "ENOENT", "power.sysfs"):
        assert word in notes[0]


def test_nothing_there_says_what_was_looked_for(tmp_path):
    sources, (note,) = host.sources(tmp_path, PLACE)
    assert sources == []
    for word in ("intel-rapl", "Grace", "amd_energy", "power.sysfs", str(tmp_path)):
        assert word in note


@pytest.mark.parametrize("on_device", [True, False])
def test_of_a_grace_socket_exactly_one_meter_is_taken(tmp_path, on_device):
    number = 0
    for socket in range(2):
        for kind, microwatts in (("Module", 655_000_000), ("Grace", 109_000_001), ("CPU", 56_000_000), ("SysIO", 20_000_000)):
            meter(tmp_path, number, f"{kind} Power Socket {socket}", microwatts, on_device=on_device)
            number += 1
    sources, notes = host.sources(tmp_path, PLACE)
    assert [(one.place, one.scope, one.name) for one in sources] == [
        (("node17", f"socket{socket}"), "cpu", f'ACPI power meter, "Grace Power Socket {socket}"') for socket in range(2)
    ]
    sample = sources[0].read()
    assert (sample.counter_mj, sample.milliwatts) == (None, 109_000)
    assert sources[0].update_s == 0.05
    assert notes == []
    assert total(readings(sources)) == 2


def test_a_module_is_of_scope_module_and_rails_alone_are_refused(tmp_path):
    meter(tmp_path, 3, "Module Power Socket 0", 655_000_000, interval_ms=1000)
    meter(tmp_path, 4, "CPU Power Socket 1", 56_000_000)
    meter(tmp_path, 5, "SysIO Power Socket 1", 20_000_000)
    meter(tmp_path, 6, None, 900_000_000)
    sources, notes = host.sources(tmp_path, PLACE)
    assert [(one.place[1], one.scope, one.update_s) for one in sources] == [("socket0", "module", 1.0)]
    assert any("socket 1" in note and "CPU and SysIO" in note for note in notes)
    assert any("hwmon6" in note and "does not say of what" in note for note in notes)


def test_a_later_processors_total_is_its_socket(tmp_path):
    meter(tmp_path, 0, "Total Input Power Socket 0", 300_000_000)
    meter(tmp_path, 1, "CPU Power Socket 0", 200_000_000)
    (source,) = host.sources(tmp_path, PLACE)[0]
    assert source.read().milliwatts == 300_000


@pytest.mark.parametrize("microwatts", [0, 4_294_967_295_000])
def test_a_socket_that_draws_nothing_or_does_not_know_is_refused(tmp_path, microwatts):
    average = meter(tmp_path, 0, "Grace Power Socket 0", 109_000_000)
    (source,) = host.sources(tmp_path, PLACE)[0]
    average.write_text(f"{microwatts}\n")
    with pytest.raises(PowerError, match=f"{microwatts} uW"):
        source.read()
    assert host.sources(tmp_path, PLACE)[0] == []


def energy(sysfs: Path, packages=(0, 1)) -> Path:
    """amd_energy on a machine whose NUMA nodes lie in these packages."""
    for number, package in enumerate(packages):
        for at, text in (
            (f"node/node{number}/cpulist", f"{8 * number}-{8 * number + 7}"),
            (f"cpu/cpu{8 * number}/topology/physical_package_id", package),
        ):
            path = sysfs / "devices" / "system" / at
            path.parent.mkdir(parents=True)
            path.write_text(f"{text}\n")
    hwmon = sysfs / "class" / "hwmon" / "hwmon2"
    hwmon.mkdir(parents=True)
    (hwmon / "name").write_text("amd_energy\n")
    for number, label in enumerate(["Ecore000", "Ecore001", *(f"Esocket{one}" for one in range(len(packages)))], start=1):
        (hwmon / f"energy{number}_label").write_text(f"{label}\n")
        (hwmon / f"energy{number}_input").write_text(f"{number}000000\n")
    return hwmon


def test_amd_energy_gives_sockets_where_rapl_does_not(tmp_path):
    energy(tmp_path)
    sources, notes = host.sources(tmp_path, PLACE)
    assert [(one.place[1], one.scope, one.read().counter_mj) for one in sources] == [("package-0", "cpu", 3000), ("package-1", "cpu", 4000)]
    assert notes == []


def test_amd_energy_counts_a_package_of_four_numa_nodes_once(tmp_path):
    energy(tmp_path, (0, 0, 0, 0, 1, 1, 1, 1))
    sources, _ = host.sources(tmp_path, PLACE)
    assert [(one.place[1], one.read().counter_mj) for one in sources] == [("package-0", 3000), ("package-1", 7000)]
    shutil.rmtree(tmp_path / "devices" / "system" / "node" / "node4")
    sources, notes = host.sources(tmp_path, PLACE)
    assert [one.name for one in sources] == ["amd_energy Esocket0, package-0", "amd_energy Esocket5, package-1"]
    assert any("Esocket4 is not read" in note for note in notes)


def test_amd_energy_is_not_read_beside_rapl_of_the_same_packages(tmp_path):
    energy(tmp_path)
    zone(tmp_path, "intel-rapl:0", "package-0")
    zone(tmp_path, "intel-rapl:1", "package-1")
    sources, _ = host.sources(tmp_path, PLACE)
    assert [one.name for one in sources] == ["RAPL package-0", "RAPL package-1"]
    assert total(readings(sources)) == 2
