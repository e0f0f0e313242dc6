"""AMD's GPUs through the amdsmi package of their ROCm, else through the kernel's own files (hwmon of amdgpu).

A package is metered as one: of an MI250X's two dies only the first says anything, and that for both. UUIDs are torch's: of ROCm these are 16 letters of
the die's unique id, written as bytes; amdsmi calls that the serial, the kernel unique_id.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from gigatrain.errors import PowerError
from gigatrain.power.reading import Sample, Scope

TWO_DIES = re.compile(r"MI250", re.IGNORECASE)
TWO_DIES_IDS = ("0x7408", "0x740c")  # PCI device ids of MI250X and MI250
UPDATE_S = 0.1
DRM = Path("/sys/class/drm")


def sources(uuids: Sequence[str]) -> tuple[list["Package"], list[str]]:
    """A meter of each package that holds one of these dies, and what could not be had, and why."""
    try:
        import amdsmi  # type: ignore[import-not-found]  # comes with ROCm, not from an index
    except (ImportError, OSError, KeyError) as failure:  # it looks for its library, and for ROCM_PATH, at import
        found, notes = _hwmon(uuids, DRM)
        return found, [
            f"no amdsmi ({type(failure).__name__}: {failure}): {'hwmon of amdgpu instead' if found else 'no AMD GPU is read'}",
            *notes,
        ]
    try:
        amdsmi.amdsmi_init()
        dies = [_Smi(amdsmi, handle) for handle in amdsmi.amdsmi_get_processor_handles()]
    except amdsmi.AmdSmiException as failure:
        found, notes = _hwmon(uuids, DRM)
        return found, [f"amdsmi: {failure}" + ("; hwmon of amdgpu instead" if found else ""), *notes]
    return _packages(uuids, dies)


def ids(uuid: str) -> set[str]:
    """All the ways to write one die's id, in lower case: torch gives the bytes of its letters as hexadecimal digits."""
    plain = uuid.lower().removeprefix("gpu-")
    digits = plain.replace("-", "").removeprefix("0x")
    found = {plain, digits.lstrip("0")}
    if len(digits) == 32:
        letters = bytes.fromhex(digits) if re.fullmatch("[0-9a-f]{32}", digits) else b""
        if re.fullmatch(rb"[0-9a-fA-F]{16}", letters):
            found.add(letters.decode().lower().lstrip("0"))
    return found


def _packages(uuids: Sequence[str], dies: Sequence["_Smi | _Hwmon"]) -> tuple[list["Package"], list[str]]:
    """Dies in the order of the bus: of an MI250X an even one and the next are a package, of which the even one has the meter."""
    found: dict[int, Package] = {}
    notes: list[str] = []
    for uuid in uuids:
        at = next((number for number, die in enumerate(dies) if ids(uuid) & die.ids), None)
        if at is None:
            notes.append(f"{uuid}: no AMD GPU of this id; there are {', '.join(min(die.ids) for die in dies) or 'none'}")
            continue
        first = at - at % 2 if dies[at].two else at
        if first not in found:
            try:
                found[first] = Package(dies[first])
            except PowerError as failure:
                why = " (the package's meter is its first die's, which may be another job's)" if dies[at].two else ""
                notes.append(f"{uuid}: {failure}{why}")
                continue
            if dies[at].two:
                notes.append("MI250X: a meter is of a package of two dies, counted once, even where the other die is another job's")
        found[first].covers += (uuid,)
    return list(found.values()), list(dict.fromkeys(notes))


class Package:
    """One package."""

    scope: Scope = "gpu"
    wrap_mj = None
    update_s = UPDATE_S

    def __init__(self, die: "_Smi | _Hwmon") -> None:
        self._die = die
        self.place: tuple[str, ...] = (min(die.ids),)
        self.covers: tuple[str, ...] = ()
        counter, milliwatts = die.look()
        # A counter of 0, or beside 0 W, is a second die's or a broken one: a meter that stands still is not read as "draws nothing".
        if not counter:
            counter = None
        if counter is None and not milliwatts:
            raise PowerError(f"{die.chip}: neither an energy counter nor watts, or both are 0")
        self._counts = counter is not None
        self.name = f"{die.way} {'energy counter' if self._counts else die.watts}, {die.chip}"
        self.check = die.watts if self._counts and milliwatts is not None else ""

    def read(self) -> Sample:
        before = monotonic()
        counter, milliwatts = self._die.look()
        if counter is None and milliwatts is None:
            raise PowerError(f"{self.place[0]}: no answer")
        return Sample((before + monotonic()) / 2, counter if self._counts else None, milliwatts)

    def close(self) -> None:
        self._die.close()


class _Smi:
    way = "amdsmi"

    def __init__(self, amdsmi: Any, handle: Any) -> None:
        self._smi, self._handle = amdsmi, handle
        asic = amdsmi.amdsmi_get_gpu_asic_info(handle)
        self.chip = str(asic.get("market_name", "AMD GPU"))
        self.two = TWO_DIES.search(self.chip) is not None
        serial = asic.get("asic_serial", "")
        self.ids = ids(str(amdsmi.amdsmi_get_gpu_device_uuid(handle))) | ids(f"{serial:x}" if isinstance(serial, int) else str(serial))
        self.ids -= {"", "n/a"}
        self.watts = "watts"

    def look(self) -> tuple[int | None, int | None]:
        """Counter in mJ and mW; None for what it does not tell."""
        counter = milliwatts = None
        failed: Exception | None = None
        try:
            told = self._smi.amdsmi_get_energy_count(self._handle)
            ticks = told.get("energy_accumulator", told.get("power"))  # its name until ROCm 6.2
            if isinstance(ticks, int):
                # The resolution is a float of microjoules (15.259): its thousandths as an integer, so that a counter of 10^15 loses nothing to rounding.
                counter = ticks * round(float(told["counter_resolution"]) * 1000) // 10**6
        except self._smi.AmdSmiException as failure:
            failed = failure
        try:
            told = self._smi.amdsmi_get_power_info(self._handle)
            for name, how in (("current_socket_power", "watts"), ("average_socket_power", "watts, a mean"), ("socket_power", "watts")):
                if isinstance(told.get(name), int | float):  # else "N/A"
                    milliwatts, self.watts = round(told[name] * 1000), how
                    break
        except self._smi.AmdSmiException as failure:
            failed = failure
        if counter is None and milliwatts is None and failed is not None:
            raise PowerError(f"{self.chip}: {failed}")
        return counter, milliwatts

    def close(self) -> None:
        pass  # amdsmi counts no users: shutting it down would take it from others of this process


class _Hwmon:
    way = "hwmon of amdgpu,"

    def __init__(self, device: Path, sensors: Path) -> None:
        self._sensors = sensors
        self.chip = f"AMD GPU {_line(device / 'device') or ''}".strip()
        self.two = _line(device / "device") in TWO_DIES_IDS
        self.ids = ids(_line(device / "unique_id") or device.resolve().name)
        self._power = next((one for one in ("power1_input", "power1_average") if (sensors / one).exists()), None)
        self.watts = "watts, a mean" if self._power == "power1_average" else "watts"

    def look(self) -> tuple[int | None, int | None]:
        """Counter in mJ and mW; the kernel writes microjoules and microwatts."""
        energy = _line(self._sensors / "energy1_input")
        power = _line(self._sensors / self._power) if self._power is not None else None
        return int(energy) // 1000 if energy else None, int(power) // 1000 if power else None

    def close(self) -> None:
        pass


def _line(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _hwmon(uuids: Sequence[str], drm: Path) -> tuple[list[Package], list[str]]:
    devices = {device.resolve(): device for device in sorted(drm.glob("card[0-9]*/device")) if _line(device / "vendor") == "0x1002"}
    dies = [_Hwmon(device, sensors) for device in sorted(devices) if (sensors := next(device.glob("hwmon/hwmon*"), None)) is not None]
    return _packages(uuids, dies) if dies else ([], [])
