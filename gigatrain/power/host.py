"""Meters of processors and their memory that the kernel shows as files: RAPL of Intel and AMD, NVIDIA Grace's ACPI meters, amd_energy.

RAPL's zones nest (psys holds packages, a package holds core and uncore; dram lies beside its package): packages and dram are given, never what is within a
package. psys, where there is one, comes last, with scope "node": it holds all the others, `reading.total` refuses it beside them, and the two are never added.
Of a Grace socket there are up to four meters; one is given (`_acpi`).

Formats: the kernel's Documentation/power/powercap/powercap.rst, drivers/powercap/intel_rapl_common.c (names of zones), Documentation/hwmon/sysfs-interface.rst,
drivers/hwmon/acpi_power_meter.c, drivers/hwmon/amd_energy.c.
"""

import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from gigatrain.errors import PowerError
from gigatrain.power.reading import Sample, Scope, Source

# The most that one thing may draw: what a counter that went back must have drawn for it to have gone round, else it was reset. Of a package and of its memory
# twice what any takes today (500 W, 300 W), of a whole node more than any takes.
PACKAGE_WATTS = 1_000
MEMORY_WATTS = 600
NODE_WATTS = 20_000
_ZONE = re.compile(r"(intel-rapl|intel-rapl-tpmi|intel-rapl-mmio):(\d+)(?::(\d+))?")  # AMD's zones have the same names
_WAYS = ("intel-rapl", "intel-rapl-tpmi", "intel-rapl-mmio")  # ways to the same registers: of a package that two show the first is read
_PACKAGE = re.compile(r"package-\d+(-die-\d+)?")
_METER = re.compile(r"(Grace|Total|Total Input|Module|CPU|SysIO) Power Socket (\d+)")
_UNKNOWN_UW = 0xFFFFFFFF * 1_000  # ACPI's _PMM answers 0xFFFFFFFF milliwatts where it does not know


class File:
    """A small file of the kernel that is read again and again through one descriptor (a third of the cost of opening it), and opened anew after an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def read(self) -> bytes:
        """Its text now; raises OSError."""
        try:
            if self._descriptor < 0:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._descriptor, 256, 0)  # at 0 the kernel makes the text anew
        except OSError as error:
            self.close()
            raise OSError(error.errno, error.strerror, str(self.path)) from None  # `pread` does not say of which file

    def number(self) -> int:
        """Its first word as an integer; raises OSError, or PowerError where that is none."""
        text = self.read()
        try:
            return int(text.split(None, 1)[0])
        except (IndexError, ValueError):
            raise PowerError(f"{self.path} holds {text[:40]!r} where a whole number belongs; this meter cannot be read") from None

    def close(self) -> None:
        """Gives the descriptor back; a later read opens it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def once(path: Path) -> int:
    """The number in a file that is read one time; raises as `File.number` does."""
    file = File(path)
    try:
        return file.number()
    finally:
        file.close()


class Counter:
    """An energy counter in microjoules that goes round at `range_uj` (None: it does not), given as one that does not: `wrap_mj` is None.

    The whole count is kept in microjoules and divided only when it is given, so nothing is lost at a wrap or to rounding, but for the one unit (61 uJ on most
    processors) by which the kernel's range is less than the register's. Where it may have gone round unseen (nobody looked for as long as that takes), or was
    reset (suspend, a reloaded driver), it begins again at 0, which its reader takes for what it is.
    """

    wrap_mj: int | None = None

    def __init__(
        self, path: Path, place: tuple[str, ...], scope: Scope, name: str, range_uj: int | None, most_watts: int, update_s: float = 0.001
    ) -> None:
        self.place = place
        self.scope: Scope = scope
        self.name = name
        self.update_s = update_s
        self._file = File(path)
        self._range_uj = range_uj
        self._most_watts = most_watts
        self.round_s = range_uj / 1e6 / most_watts if range_uj is not None else None  # within which it goes round at the soonest
        self._last: tuple[float, int] | None = None  # when, and what the file said
        self._total_uj = 0

    def read(self) -> Sample:
        before = time.monotonic()
        raw = self._file.number()
        now = (before + time.monotonic()) / 2
        return Sample(now, counter_mj=self.went_on(raw, now) // 1000)

    def went_on(self, raw: int, now: float) -> int:
        """Microjoules since it began, after the file said `raw` at `now`."""
        last, self._last = self._last, (now, raw)
        if last is None or self._range_uj is None:
            self._total_uj = raw
            return raw
        then, was = last
        passed_s = now - then
        went = raw - was if raw >= was else raw - was + self._range_uj
        most_uj = (passed_s + 0.1) * self._most_watts * 1e6  # 0.1: the file's own news may be late
        if most_uj >= self._range_uj or went > most_uj:
            self._total_uj = 0
        else:
            self._total_uj += went
        return self._total_uj

    def close(self) -> None:
        self._file.close()


class Acpi:
    """An ACPI power meter: watts, the mean over its own interval."""

    wrap_mj: int | None = None

    def __init__(self, path: Path, place: tuple[str, ...], scope: Scope, name: str, update_s: float) -> None:
        self.place = place
        self.scope: Scope = scope
        self.name = name
        self.update_s = update_s
        self._file = File(path)

    def read(self) -> Sample:
        before = time.monotonic()
        microwatts = self._file.number()
        now = (before + time.monotonic()) / 2
        if not 0 < microwatts < _UNKNOWN_UW:
            raise PowerError(f"{self._file.path} says {microwatts} uW, which no running processor draws: its firmware does not know")
        return Sample(now, milliwatts=microwatts // 1000)

    def close(self) -> None:
        self._file.close()


def sources(sysfs: Path, place: tuple[str, ...]) -> tuple[list[Source], list[str]]:
    """Meters of the processors and memory of this machine, and what could not be had and why.

    `sysfs` is where the kernel's files are, `place` the node. Scopes are cpu and dram; module where of a Grace socket only the whole module is metered; and
    node for RAPL's psys, which comes last.
    """
    found, notes = _acpi(sysfs / "class" / "hwmon", place)
    packages, platform, more = _rapl(sysfs / "class" / "powercap", place)
    found += packages
    notes += more
    if not packages:
        sockets, more = _amd(sysfs, place)
        found += sockets
        notes += more
    found += platform
    if not found and not notes:
        notes.append(
            f"no meter of processors: {sysfs}/class/powercap has no RAPL zone that answers (intel-rapl:*), {sysfs}/class/hwmon no meter of NVIDIA Grace "
            "(power_meter) and no amd_energy. Load intel_rapl_msr; in a container mount the host's /sys, as /host/sys for example, and set power.sysfs to it"
        )
    return found, notes


def _rapl(folder: Path, place: tuple[str, ...]) -> tuple[list[Source], list[Source], list[str]]:
    """Packages and their memory; psys; notes."""
    zones: list[tuple[int, int, int, Path]] = []
    for entry in _entries(folder):
        if (zone := _ZONE.fullmatch(entry.name)) is not None:
            zones.append((_WAYS.index(zone[1]), int(zone[2]), -1 if zone[3] is None else int(zone[3]), entry))
    names = {(way, number): _text(path / "name") for way, number, inner, path in zones if inner < 0}
    found: dict[tuple[str, ...], Source] = {}
    platforms: dict[str, Source] = {}
    refused: dict[str, tuple[Path, OSError]] = {}
    notes: list[str] = []
    for way, number, inner, path in sorted(zones):
        outer = names.get((way, number)) or path.name
        kind = _text(path / "name")
        whole = inner < 0 and kind is not None and _PACKAGE.fullmatch(kind) is not None
        platform = kind is not None and re.fullmatch(r"psys(-\d+)?", kind) is not None
        if kind is None and inner < 0:
            refused.setdefault(f"RAPL {path.name}", (path / "name", OSError(errno.ENOENT, os.strerror(errno.ENOENT))))
        if kind is None or not (whole or platform or kind == "dram"):
            continue  # core, uncore: within their package; and what the kernel may name next, of which nobody knows what it is within
        where = (outer,) if whole else () if platform else (outer, "dram")
        if where in found or (platform and kind in platforms):
            continue
        scope: Scope = "cpu" if whole else "node" if platform else "dram"
        label = f"RAPL {outer if whole else kind if platform else f'{outer} dram'}"
        most_watts = PACKAGE_WATTS if whole else NODE_WATTS if platform else MEMORY_WATTS
        try:
            range_uj = once(path / "max_energy_range_uj")
            if range_uj <= 0:
                raise PowerError(f"{path}/max_energy_range_uj says {range_uj}: {label} cannot be told when it goes round")
            counter = Counter(path / "energy_uj", (*place, *where), scope, label, range_uj, most_watts)
            counter.read()
        except OSError as error:
            refused.setdefault(label, (path / "energy_uj", error))
            continue
        except PowerError as error:
            notes.append(f"{label} is not read: {error}")
            continue
        refused.pop(label, None)
        if platform:
            platforms[kind] = counter
        else:
            found[where] = counter
    notes += _refusals(refused)
    if len(platforms) > 1:
        notes.append(
            f"RAPL {' and '.join(sorted(platforms))} are not read: of several platform zones nobody says whether they lie beside each other"
        )
        for counter in platforms.values():
            counter.close()
        platforms = {}
    elif platforms:
        notes.append(
            "RAPL psys is what the maker of this machine wired to it: it holds the packages, and may leave out accelerators with supplies of their own"
        )
    return list(found.values()), list(platforms.values()), notes


def _refusals(refused: dict[str, tuple[Path, OSError]]) -> list[str]:
    """One note for all zones that failed alike."""
    notes = []
    for code in dict.fromkeys(error.errno for _, error in refused.values()):
        alike = [(label, path, error) for label, (path, error) in refused.items() if error.errno == code]
        _, path, error = alike[0]
        note = f"{', '.join(label for label, _, _ in alike)}: not read, {path}: {errno.errorcode.get(code or 0, code)} ({error.strerror})"
        if code in (errno.EACCES, errno.EPERM):
            note += (
                ". Since CVE-2020-8694 only root reads it: let the job's group do so (a udev rule with chgrp and chmod g+r, or at boot), or run with "
                "CAP_DAC_READ_SEARCH; until then processors are not metered"
            )
        elif code == errno.ENOENT:
            note += ". Container runtimes hide it: mount the host's /sys, as /host/sys for example, and set power.sysfs to it"
        notes.append(note)
    return notes


def _acpi(folder: Path, place: tuple[str, ...]) -> tuple[list[Source], list[str]]:
    """One meter of each Grace socket.

    "Grace Power Socket" is processor, SysIO and memory together, and what counts beside a GPU's own counter; "CPU Power Socket" and "SysIO Power Socket" are
    rails within it, and make up about half (power.md: 51-56 W of 98-109 W; by DCGM's field 1130, which is that rail, a tray came to 791 W instead of 1,448 W).
    "Module Power Socket" holds the GPU too, and is taken where the firmware shows no other. Of later processors the first is called "Total Power Socket".
    """
    meters: dict[int, dict[str, Path]] = {}
    other: list[str] = []
    for hwmon in _entries(folder):
        if (_text(hwmon / "name") or _text(hwmon / "device" / "name")) != "power_meter":
            continue
        labelled = False
        for at in (hwmon / "device", hwmon):  # the driver has its files on the ACPI device, not on the hwmon one that the core makes
            for info in sorted(at.glob("power*_oem_info")) + sorted(at.glob("power*_label")):
                label = _METER.fullmatch(_text(info) or "")
                if label is None:
                    continue
                labelled = True
                word = "Grace" if label[1].startswith("Total") else label[1]
                average = at / f"{info.name.partition('_')[0]}_average"
                meters.setdefault(int(label[2]), {}).setdefault(word, average)
        if not labelled:
            other.append(str(hwmon))
    found: list[Source] = []
    notes: list[str] = []
    refused: dict[str, tuple[Path, OSError]] = {}
    for socket, kinds in sorted(meters.items()):
        kind = "Grace" if "Grace" in kinds else "Module"
        if kind not in kinds:
            notes.append(
                f"socket {socket}: of NVIDIA's meters there are only {' and '.join(sorted(kinds))}, rails that leave out memory and more: not read"
            )
            continue
        path = kinds[kind]
        interval = _text(path.with_name(f"{path.name}_interval")) or ""
        label = f'ACPI power meter, "{kind} Power Socket {socket}"'
        scope: Scope = "cpu" if kind == "Grace" else "module"
        meter = Acpi(
            path, (*place, f"socket{socket}"), scope, label, int(interval) / 1000 if interval.isdecimal() and int(interval) else 1.0
        )
        try:
            meter.read()
        except OSError as error:
            refused[label] = (path, error)
        except PowerError as error:
            notes.append(f"{label} is not read: {error}")
        else:
            found.append(meter)
    if other:
        notes.append(f"{', '.join(other)}: an ACPI power meter whose firmware does not say of what: not read")
    return found, notes + _refusals(refused)


def _amd(sysfs: Path, place: tuple[str, ...]) -> tuple[list[Source], list[str]]:
    """Sockets by amd_energy, for where RAPL's zones are not: a driver (out of the kernel's tree since 5.13) that reads the same registers and unwraps them.

    What it calls a socket is a NUMA node (`sockets = num_possible_nodes()`): of a package that the BIOS shows as four nodes it has four, each the whole of it.
    """
    found: list[Source] = []
    taken: set[str] = set()
    notes: list[str] = []
    refused: dict[str, tuple[Path, OSError]] = {}
    for hwmon in _entries(sysfs / "class" / "hwmon"):
        if _text(hwmon / "name") != "amd_energy":
            continue
        for info in _entries(hwmon):
            socket = re.fullmatch(r"Esocket(\d+)", _text(info) or "") if re.fullmatch(r"energy\d+_label", info.name) else None
            if socket is None:
                continue  # Ecore: within its socket
            path = hwmon / f"{info.name.partition('_')[0]}_input"
            first = re.match(r"\d+", _text(sysfs / "devices" / "system" / "node" / f"node{socket[1]}" / "cpulist") or "")
            package = _text(sysfs / "devices" / "system" / "cpu" / f"cpu{first[0]}" / "topology" / "physical_package_id") if first else None
            label = f"amd_energy {socket[0]}"
            if package is None:
                notes.append(f"{label} is not read: {sysfs}/devices/system does not say in which package NUMA node {socket[1]} is")
                continue
            if package in taken:
                continue
            counter = Counter(path, (*place, f"package-{package}"), "cpu", f"{label}, package-{package}", None, PACKAGE_WATTS)
            try:
                counter.read()
            except OSError as error:
                refused[label] = (path, error)
            except PowerError as error:
                notes.append(f"{label} is not read: {error}")
            else:
                found.append(counter)
                taken.add(package)
    return found, notes + _refusals(refused)


def _entries(folder: Path) -> Iterator[Path]:
    """What is in a folder, in the order of the numbers in the names; nothing where it is not there."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in sorted(names, key=lambda one: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", one)]):
        yield folder / name


def _text(path: Path) -> str | None:
    """One line of a file; None where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
