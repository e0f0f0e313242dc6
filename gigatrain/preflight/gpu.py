"""What the driver knows of the GPUs: NVIDIA's through NVML, AMD's through the kernel's files, and what both wrote into the kernel's log.

Sources: NVIDIA's Xid catalog (docs.nvidia.com/deploy/xid-errors), NVML's header, the kernel's amdgpu documentation.
"""

import errno
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pynvml

from gigatrain.errors import PowerError
from gigatrain.power import guard
from gigatrain.preflight.findings import Check, Finding, State, worst
from gigatrain.preflight.host import text

IDLE_CELSIUS = 70  # OLMo refuses 55; sites cooled with warm water idle above that
RECENT_S = 24 * 3600.0  # a fault older than this may have been mended by a reset: it warns
# By the immediate action of NVIDIA's catalog: these want a reset, a reboot or a look at the machine.
XID_BAD = {
    46: "GPU stopped processing",
    48: "double-bit ECC error",
    54: "auxiliary power is not connected",
    62: "internal micro-controller halt",
    64: "memory remapping failed",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    95: "uncontained memory error",
    109: "context switch timeout",
    110: "security fault",
    119: "GSP timeout",
    120: "GSP error",
    136: "link training failed",
    140: "unrecovered ECC error",
    143: "GPU initialization error",
    156: "resource retirement waits for a reset",
    158: "GPU fatal timeout",
    167: "PCIe fatal timeout",
    171: "uncorrectable DRAM error",
    172: "uncorrectable SRAM error",
}
XID_WARN = {
    32: "corrupted push buffer, mostly by PCIe",
    63: "a memory row was remapped",
    92: "many corrected ECC errors",
    94: "contained memory error",
    121: "corrected errors of the link to the CPU",
    155: "NVLink went down",
    157: "resource retirement failed",
    168: "errors in protected memory",
}
XID_NVLINK5 = range(144, 151)  # bad if the line says Fatal, else a warning
XID_ACTION = 154  # tells in words what the driver wants: "... changed from 0x0 (None) to 0x1 (GPU Reset Required)"
# Restart the program or ignore, says the catalog: mostly a program's own faults.
XID_PROGRAM = {
    8,
    13,
    31,
    *range(37, 46),
    60,
    *range(66, 73),
    75,
    76,
    77,
    80,
    *range(82, 87),
    88,
    89,
    *range(96, 109),
    *range(126, 136),
    137,
    139,
    141,
    142,
}
REASONS: tuple[tuple[int, str, State], ...] = (
    (
        0x08,
        "hardware slowdown",
        "warn",
    ),  # alone also a power protection that trips, or a change of clocks: bad with one of the next two, or if it lasts
    (0x40, "hardware thermal slowdown", "bad"),
    (0x80, "power brake", "bad"),
    (0x20, "software thermal slowdown", "warn"),
)
RECOVERY = {
    1: "reset the GPU",
    2: "reboot the node",
    3: "drain peer-to-peer traffic",
    4: "drain and reset",
    5: "recover the IMEX domain",
    6: "reset the bus",
    7: "reboot the system",
}
UNTOLD = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_DEPRECATED,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
)
CHIP_TO_CHIP = re.compile(
    r"\bG[HB][23]00\b"
)  # joined to their CPU by NVLink-C2C: NVML may tell a placeholder (generation 1, x1) of their PCIe link
_WAY = "exclude the node and reset the GPU (nvidia-smi --gpu-reset); replace it if it comes again"


@dataclass(frozen=True)
class Gpu:
    """One GPU as NVML sees it; `call(name, ...)` is a pynvml function on it, None where this GPU or driver does not support it."""

    index: int
    handle: Any
    refused: pynvml.NVMLError | None = None  # why there is no handle: lost, or another job's

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            try:
                if self.refused is not None:
                    raise self.refused
                return getattr(pynvml, f"nvmlDeviceGet{name}")(self.handle, *given)
            except pynvml.NVMLError as failure:
                if getattr(failure, "value", None) in UNTOLD:
                    return None
                raise

        return call

    def field(self, number: int) -> int | None:
        """A field value of NVML as an integer."""
        found = self.FieldValues([number])
        if not found or found[0].nvmlReturn != pynvml.NVML_SUCCESS:
            return None
        kinds = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal"}
        return int(getattr(found[0].value, kinds.get(found[0].valueType, "uiVal")))

    def says(self, what: str, state: State, said: str, value: Any = None, limit: Any = None, way_out: str = _WAY) -> Finding:
        return Finding(what, state, f"GPU {self.index}: {said}", value, limit, "" if state == "ok" else way_out)


@contextmanager
def nvml() -> Iterator[list[Gpu]]:
    """Every GPU of the driver, whatever CUDA_VISIBLE_DEVICES says, those it refuses too; raises pynvml.NVMLError without a driver."""
    pynvml.nvmlInit()
    try:
        yield [_opened(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _opened(index: int) -> Gpu:
    try:
        return Gpu(index, pynvml.nvmlDeviceGetHandleByIndex(index))
    except pynvml.NVMLError as failure:
        return Gpu(index, None, failure)


def checks(wanted: bool | None, accelerators: int | None, root: Path = Path("/")) -> list[Check]:
    """Of all GPUs: `wanted` says whether the site has any (None: unknown), `accelerators` how many a node has there."""
    return [
        Check("gpus", lambda: counted(wanted, accelerators, root), 10),
        *(Check(name, lambda name=name, one=one: _each(name, one), 10) for name, one in EACH.items()),
        Check("kernel log", lambda: kernel_log(root), 5),
        Check("amd gpus", lambda: amd(root, accelerators), 10),
    ]


def counted(wanted: bool | None, accelerators: int | None, root: Path = Path("/")) -> Finding:
    """The driver, and as many GPUs as the site says."""
    try:
        with nvml() as gpus:
            driver = pynvml.nvmlSystemGetDriverVersion()
            cuda = pynvml.nvmlSystemGetCudaDriverVersion()
            names, parts = set(), []
            for gpu in gpus:
                try:
                    name = gpu.Name()
                    if name is not None:
                        names.add(str(name))
                    elif gpu.refused is not None:
                        parts.append(gpu.says("gpus", "untested", str(gpu.refused)))
                except pynvml.NVMLError as failure:
                    parts.append(gpu.says("gpus", "bad", str(failure)))
    except pynvml.NVMLError as failure:
        kind = "bad" if wanted and not _amd_cards(root) else "untested"
        said = f"no NVIDIA GPU: {failure}" + ("; the site says that a node has GPUs" if kind == "bad" else "")
        return Finding("gpus", kind, said, 0, accelerators, "nvidia-smi; is the driver loaded?" if kind == "bad" else "")
    count = len(gpus) - len(parts)
    names = sorted(names)
    refused = "".join(f"; {part.said}" for part in parts)
    shown = f"{count} x {', '.join(names) or 'nothing'}, driver {driver}, which runs CUDA {cuda // 1000}.{cuda % 1000 // 10}{refused}"
    if any(part.state == "bad" for part in parts):
        return Finding("gpus", "bad", shown, count, accelerators or len(gpus), _WAY)
    if count != (accelerators or count) or not count:
        few = count < (accelerators or 1)
        gone = "a GPU fell off the bus, or the job did not ask for all" if few else "is it the right site?"
        return Finding("gpus", "bad" if few else "warn", f"{shown}; the site says {accelerators}", count, accelerators, gone)
    if len(names) > 1:
        return Finding("gpus", "warn", shown, ", ".join(names), "one kind", "the slowest sets the pace")
    return Finding("gpus", "ok", shown, count, accelerators)


def _each(name: str, one: Callable[[Gpu], Sequence[Finding]]) -> Finding:
    """One check on every GPU."""
    try:
        with nvml() as gpus:
            parts = []
            for gpu in gpus:
                try:
                    parts += one(gpu)
                except pynvml.NVMLError as failure:  # GPU_IS_LOST and the like: this GPU's fault
                    parts.append(gpu.says(name, "bad", str(failure)))
    except pynvml.NVMLError as failure:
        return Finding(name, "untested", f"no NVIDIA GPU: {failure}")
    if name == "nvlink":
        parts = _beside(parts)
    if not parts:
        return Finding(name, "untested", "these GPUs or this driver do not tell" if gpus else "no NVIDIA GPU")
    return worst(name, parts, "; ".join(dict.fromkeys(re.sub(r"^GPU \d+: ", "", part.said) for part in parts)))


def ecc(gpu: Gpu) -> list[Finding]:
    """Uncorrected errors since the driver was loaded and ever, rows that were remapped, and whether ECC is on."""
    parts = []
    mode = gpu.EccMode()
    if mode is not None and mode[0] == 0:
        parts.append(
            gpu.says("ecc", "warn", "ECC is off: a flipped bit would not be seen", "off", "on", "nvidia-smi --ecc-config=1, and a reset")
        )
    now = gpu.TotalEccErrors(pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
    ever = gpu.TotalEccErrors(pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_AGGREGATE_ECC)
    if now:
        parts.append(gpu.says("ecc", "bad", f"{now} uncorrected ECC errors since the driver was loaded", now, 0))
    elif ever:
        parts.append(gpu.says("ecc", "ok", f"{ever} uncorrected ECC errors ever, none since the driver was loaded", ever))
    rows = gpu.RemappedRows()
    if rows is not None:
        corrected, uncorrected, pending, failed = rows
        if failed:
            parts.append(
                gpu.says("ecc", "bad", "a row could not be remapped: its spare rows are used up", "failed", "none", "replace the GPU")
            )
        elif pending:
            parts.append(gpu.says("ecc", "bad", "a row waits for a reset to be remapped", "pending", "none"))
        elif uncorrected + corrected:
            parts.append(gpu.says("ecc", "ok", f"{uncorrected + corrected} rows remapped, which is mended"))
    if not parts and (now is not None or rows is not None):
        parts.append(gpu.says("ecc", "ok", "no uncorrected errors, no rows remapped", 0, 0))
    return parts


def recovery(gpu: Gpu) -> list[Finding]:
    """What the driver itself says must be done with the GPU (drivers of 2025 on)."""
    action = gpu.field(pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION)
    if action is None:
        return []
    if action:
        what = RECOVERY.get(action, f"action {action}")
        return [gpu.says("recovery", "bad", f"the driver wants: {what}", what, "none")]
    return [gpu.says("recovery", "ok", "the driver wants no recovery", "none", "none")]


def throttle(gpu: Gpu) -> list[Finding]:
    """Why its clocks are held down now."""
    reasons = gpu.CurrentClocksEventReasons()
    if reasons is None:
        reasons = gpu.CurrentClocksThrottleReasons()
    if reasons is None:
        return []
    hard = reasons & (0x40 | 0x80)
    parts = [
        gpu.says(
            "throttle",
            "bad" if hard and bit == 0x08 else state,
            f"slowed down: {what}",
            what,
            "none",
            "cooling or power supply: exclude the node",
        )
        for bit, what, state in REASONS
        if reasons & bit
    ]
    return parts or [gpu.says("throttle", "ok", "not slowed down" + (", at its power limit" if reasons & 0x04 else ""))]


def clocks(gpu: Gpu) -> list[Finding]:
    """The clock it may reach against the fastest it can: an administrator's limit is a warning, not a fault."""
    most = gpu.MaxClockInfo(pynvml.NVML_CLOCK_SM)
    if most is None:
        return []
    asked = gpu.ApplicationsClock(pynvml.NVML_CLOCK_SM)
    if asked and asked < 0.8 * most:
        return [gpu.says("clocks", "warn", f"limited to {asked} of {most} MHz", asked, most, "nvidia-smi --reset-applications-clocks")]
    return [gpu.says("clocks", "ok", f"up to {most} MHz", most)]


def temperature(gpu: Gpu) -> list[Finding]:
    found = gpu.Temperature(pynvml.NVML_TEMPERATURE_GPU)
    if found is None:
        return []
    slow = gpu.TemperatureThreshold(pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
    if slow and found >= slow - 3:
        return [gpu.says("temperature", "bad", f"{found} °C, it slows down at {slow}", found, slow, "cooling: exclude the node")]
    if found >= IDLE_CELSIUS:
        return [gpu.says("temperature", "warn", f"{found} °C before any work", found, IDLE_CELSIUS, "cooling, or another job's process")]
    return [gpu.says("temperature", "ok", f"below {IDLE_CELSIUS} °C", found, IDLE_CELSIUS)]


def power(gpu: Gpu) -> list[Finding]:
    """The limit it is held to against the one it was made with."""
    limit, usual = gpu.PowerManagementLimit(), gpu.PowerManagementDefaultLimit()
    if limit is None or usual is None:
        return []
    said = f"power limit {limit // 1000} W, by default {usual // 1000} W"
    # A site may cap all its GPUs; one that is capped alone is found where GPUs are compared.
    return [gpu.says("power", "warn" if limit < 0.6 * usual else "ok", said, limit / 1000, usual / 1000, "nvidia-smi --power-limit")]


def pcie(gpu: Gpu) -> list[Finding]:
    """Lanes and generation of its link; both may be low while idle, so only a burn (under load) judges them."""
    if CHIP_TO_CHIP.search(name := str(gpu.Name())):
        return [gpu.says("pcie", "untested", f"{name} is joined to its CPU by C2C, not by PCIe")]
    width, most = gpu.CurrPcieLinkWidth(), gpu.MaxPcieLinkWidth()
    if width is None or most is None:
        return []
    if width < most:
        return [
            gpu.says("pcie", "warn", f"PCIe x{width} of x{most} while idle", width, most, "a riser, a slot or a cable; the burn judges it")
        ]
    generation, best = gpu.CurrPcieLinkGeneration(), gpu.MaxPcieLinkGeneration()
    return [gpu.says("pcie", "ok", f"PCIe x{width}, up to generation {best} ({generation} now, idle)", width, most)]


def pcie_loaded(gpu: Gpu) -> list[Finding]:
    """Lanes and generation while it works: nothing saves power now."""
    if CHIP_TO_CHIP.search(str(gpu.Name())):
        return []
    parts = []
    width, most = gpu.CurrPcieLinkWidth(), gpu.MaxPcieLinkWidth()
    if width and most and width < most:
        parts.append(
            gpu.says("pcie", "bad", f"PCIe x{width} of x{most} under load", width, most, "a riser, a slot or a cable: exclude the node")
        )
    now, best = gpu.CurrPcieLinkGeneration(), gpu.MaxPcieLinkGeneration()
    if now and best and now < best:
        parts.append(gpu.says("pcie", "warn", f"PCIe generation {now} of {best} under load", now, best, "a riser or a slot"))
    return parts


def loaded(samples: int, wait: Callable[[], bool]) -> list[Finding]:
    """Throttling and PCIe links of all GPUs, looked at up to `samples` times: after each `wait()`, while that is True.

    A hardware slowdown without heat or power brake is bad only where every one of at least three looks saw it.
    """
    parts: dict[str, Finding] = {}
    seen: Counter[str] = Counter()
    taken = 0
    try:
        with nvml() as gpus:
            while taken < samples and wait():
                taken += 1
                for gpu in gpus:
                    try:
                        found = [*throttle(gpu), *pcie_loaded(gpu)]
                    except pynvml.NVMLError as failure:
                        found = [gpu.says("under load", "bad", f"{failure} under load")]
                    parts |= {part.said: part for part in found}
                    seen.update({part.said for part in found})
    except pynvml.NVMLError:
        return []
    lasting = [part for part in parts.values() if part.value == REASONS[0][1] and seen[part.said] == taken >= 3]
    return [replace(part, state="bad") if part in lasting else part for part in parts.values()]


def switched() -> tuple[bool | None, int]:
    """`(whether NVLink switches join this node's GPUs, how many GPUs it has)`; None where the driver does not tell."""
    kinds = set()
    try:
        with nvml() as gpus:
            for gpu in gpus[:1]:
                for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
                    if gpu.NvLinkState(link):
                        kinds.add(gpu.NvLinkRemoteDeviceType(link))
    except pynvml.NVMLError as failure:
        if getattr(failure, "value", None) != pynvml.NVML_ERROR_INVALID_ARGUMENT:  # beyond its last link
            return None, 0
    kinds &= {pynvml.NVML_NVLINK_DEVICE_TYPE_GPU, pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH}
    return (pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH in kinds if kinds else None), len(gpus)


def _beside(parts: Sequence[Finding]) -> list[Finding]:
    """NVLinks that are down, judged by the node's other GPUs: cards that a bridge joins by a part of their links, or in pairs, have as few on most."""
    active = {place: part.value for place, part in enumerate(parts) if part.state != "warn" and isinstance(part.value, int)}
    counts = Counter(active.values()).most_common(2)
    if len(active) < 2 or not any(active.values()):
        return list(parts)
    tied = len(counts) > 1 and counts[0][1] == counts[1][1]
    usual = counts[0][0]

    def judged(place: int, part: Finding) -> Finding:
        if place not in active or part.state == "ok":
            return part
        if active[place] < usual and not tied:
            return replace(part, state="bad", way_out=_WAY)
        return replace(
            part, state="warn", said=f"{part.said}, as on others of this node", way_out="bridges that join a part only, or a fault"
        )

    return [judged(place, part) for place, part in enumerate(parts)]


def nvlink(gpu: Gpu) -> list[Finding]:
    """Every link of a GPU that has links is up, and none has counted recoveries or replays."""
    states = {}
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            state = gpu.NvLinkState(link)
        except pynvml.NVMLError as failure:
            if getattr(failure, "value", None) == pynvml.NVML_ERROR_INVALID_ARGUMENT:  # beyond its last link
                break
            raise
        if state is not None:
            states[link] = state
    if not states:
        return []
    down = [link for link, state in states.items() if not state]
    if len(down) == len(states):
        return [
            gpu.says("nvlink", "untested", f"none of its {len(states)} NVLinks is active: no bridge, or no fabric manager", 0, len(states))
        ]
    if down:
        said = f"NVLink {', '.join(map(str, down))} of {len(states)} down"
        return [gpu.says("nvlink", "bad", said, len(states) - len(down), len(states))]
    parts = []
    for kind, name, most in (
        (pynvml.NVML_NVLINK_ERROR_DL_RECOVERY, "recoveries", 0),
        (pynvml.NVML_NVLINK_ERROR_DL_REPLAY, "replays", 1000),
        (pynvml.NVML_NVLINK_ERROR_DL_CRC_FLIT, "CRC errors", 1000),
    ):
        counts = [gpu.NvLinkErrorCounter(link, kind) or 0 for link in states]
        if max(counts) > most:
            link = counts.index(max(counts))
            parts.append(gpu.says("nvlink", "warn", f"NVLink {link} counted {max(counts):,} {name}", max(counts), most))
    return parts or [gpu.says("nvlink", "ok", f"{len(states)} NVLinks active", len(states), len(states))]


def mode(gpu: Gpu) -> list[Finding]:
    """MIG and persistence."""
    parts = []
    mig = gpu.MigMode()
    if mig is not None and (mig[0] or mig[1]):
        parts.append(gpu.says("mode", "warn", "MIG is on: the GPU is cut into instances", "on", "off", "nvidia-smi --multi-instance-gpu=0"))
    persistent = gpu.PersistenceMode()
    if persistent is not None:
        note = "persistent" if persistent else "not persistent: the driver unloads between jobs and forgets its error counts"
        parts.append(gpu.says("mode", "ok", f"no MIG, {note}"))
    return parts


def others(gpu: Gpu) -> list[Finding]:
    """Processes that are not ours: an earlier job's that would not die."""
    found = gpu.ComputeRunningProcesses()
    if found is None:
        return []
    strangers = [process.pid for process in found if process.pid != os.getpid()]
    if strangers:
        said = f"in use by process {', '.join(map(str, strangers[:4]))}"
        return [gpu.says("others", "warn", said, len(strangers), 0, "a process of an earlier job: kill it, or exclude the node")]
    return [gpu.says("others", "ok", "no other process")]


EACH: dict[str, Callable[[Gpu], list[Finding]]] = {
    "ecc": ecc,
    "recovery": recovery,
    "throttle": throttle,
    "clocks": clocks,
    "temperature": temperature,
    "power": power,
    "pcie": pcie,
    "nvlink": nvlink,
    "mode": mode,
    "others": others,
}

# As dmesg prints it, `[ 1234.567890] text`, and as /dev/kmsg does, `6,339,1234567890,-;text`.
_LINE = re.compile(r"^(?:\[\s*(?P<seconds>\d+\.\d+)\]|\d+,\d+,(?P<micros>\d+),[^;]*;)\s*(?P<text>.*)$")
_XID = re.compile(r"NVRM: Xid \(PCI:(?P<bus>[0-9A-Fa-f:.]+)\): (?P<number>\d+)")
_OTHER: tuple[tuple[re.Pattern[str], str, State], ...] = (
    (re.compile(r"SXid \(PCI:[^)]*\): (\d+), Fatal", re.I), "an NVSwitch reported a fatal error", "bad"),
    (re.compile(r"SXid \(PCI:[^)]*\): (\d+), Non-fatal", re.I), "an NVSwitch reported an error", "warn"),
    (
        re.compile(r"mce: .*(Uncorrected|Fatal|Machine check events? logged.*UC)", re.I),
        "the processor reported an uncorrected error",
        "bad",
    ),
    (re.compile(r"EDAC .*\bUE\b"), "memory had an uncorrected error", "bad"),
    (re.compile(r"amdgpu.*(uncorrectable|GPU reset begin|ring .* timeout)", re.I), "an AMD GPU failed", "bad"),
    (re.compile(r"AER: .*Non-?Fatal", re.I), "a PCIe device reported an error that is not fatal", "warn"),
    (re.compile(r"AER: .*Fatal", re.I), "a PCIe device reported a fatal error", "warn"),
    (re.compile(r"EXT4-fs error|XFS .*(Corruption|shutdown)|I/O error, dev (nvme|sd)", re.I), "a local disk failed", "warn"),
    (re.compile(r"mlx5_core.*(device's health compromised|Health issue)", re.I), "a network card reported a failure", "bad"),
)


def kernel_log(root: Path = Path("/"), now_s: float | None = None) -> Finding:
    """Xids and other hardware errors in the kernel's log since the machine was started."""
    path = root / "dev/kmsg"
    try:
        lines = _kmsg(path)
    except OSError as failure:
        why = "reading it is for root here (kernel.dmesg_restrict)" if failure.errno in (errno.EPERM, errno.EACCES) else failure.strerror
        way = "let jobs read it: sysctl kernel.dmesg_restrict=0"
        return Finding("kernel log", "untested", f"Xids were not looked for in {path}: {why}", None, None, way)
    return judged_log(lines, time.clock_gettime(time.CLOCK_BOOTTIME) if now_s is None else now_s)


def judged_log(lines: Sequence[str], now_s: float) -> Finding:
    """Lines of dmesg or /dev/kmsg; `now_s` is the time since the machine was started, against which they are old or recent."""
    parts: list[Finding] = []
    programs = 0
    for line in lines:
        found = _LINE.match(line)
        words = found["text"] if found else line
        begun = float(found["seconds"]) if found and found["seconds"] else int(found["micros"]) / 1e6 if found else None
        age_s = None if begun is None else max(now_s - begun, 0.0)
        xid = _XID.search(words)
        if xid:
            number = int(xid["number"])
            if number in XID_PROGRAM:
                programs += 1
                continue
            state, what = _meant(number, words)
            parts.append(_aged(f"Xid {number} on {xid['bus']}, {what}", state, age_s, number))
            continue
        for pattern, what, state in _OTHER:
            if pattern.search(words):
                parts.append(_aged(f"{what}: {words[:120]}", state, age_s, None))
                break
    parts = list({part.said: part for part in parts}.values())
    note = f"; {programs} Xids of programs' own faults" if programs else ""
    return worst("kernel log", parts, f"no hardware error in {len(lines):,} lines{note}")


def _meant(number: int, words: str) -> tuple[State, str]:
    """How bad an Xid is, and what it says."""
    if number in XID_NVLINK5:
        return ("bad" if re.search(r"\bFatal\b", words) else "warn"), "NVLink error: " + words.partition(f"): {number},")[2].strip()[:80]
    if number == XID_ACTION:
        wanted = re.search(r"to 0x\w+ \(([^)]*)\)", words)
        action = wanted[1] if wanted else "?"
        return ("ok" if action == "None" else "warn" if action == "Drain P2P" else "bad"), f"the driver wants: {action}"
    if number in XID_BAD:
        return "bad", XID_BAD[number]
    return "warn", XID_WARN.get(number, "not in our table; see NVIDIA's Xid catalog")


def _aged(said: str, state: State, age_s: float | None, value: int | None) -> Finding:
    if age_s is not None and age_s > RECENT_S and state != "ok":
        return Finding("kernel log", "warn", f"{said}, {age_s / 86400:.0f} days ago", value, None, "if the GPU was reset since, nothing")
    return Finding("kernel log", state, said, value, None, _WAY)


def _kmsg(path: Path) -> list[str]:
    """All records at once: a read of /dev/kmsg gives one record, EAGAIN after the last, EPIPE for one that was overwritten."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    records: list[bytes] = []
    try:
        while True:
            try:
                record = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue
            if not record:
                break
            records.append(record)
    finally:
        os.close(descriptor)
    return b"".join(records).decode(errors="replace").splitlines()


def left_limits(folder: Path | None = None) -> Finding:
    """Power limits that a run left here when it was killed together with the process that guards them (power/guard.py)."""
    try:
        found, notes = guard.left(folder)
    except (PowerError, OSError) as failure:
        return Finding("left limits", "untested", str(failure))
    if not found and not notes:
        return Finding("left limits", "ok", "no run that was killed has left a power limit")
    left = f"{', '.join(found)}: a run that was killed left its power limit" if found else "no run that is believed has left a power limit"
    said = "; ".join([left, *notes[:4], *(["and more"] if len(notes) > 4 else [])])
    return Finding("left limits", "warn", said, len(found), 0, "python -m gigatrain.power.guard --restore")


def _amd_cards(root: Path) -> list[Path]:
    cards = (path / "device" for path in sorted((root / "sys/class/drm").glob("card[0-9]*")) if re.fullmatch(r"card\d+", path.name))
    return [card for card in cards if text(card / "vendor") == "0x1002" and (card / "mem_info_vram_total").exists()]


def amd(root: Path = Path("/"), accelerators: int | None = None) -> Finding:
    """AMD's GPUs by the files of the kernel's amdgpu driver: count, uncorrectable RAS errors, PCIe width."""
    cards = _amd_cards(root)
    if not cards:
        return Finding("amd gpus", "untested", "no AMD GPU (amdgpu in /sys/class/drm)")
    parts = []
    if accelerators and len(cards) < accelerators:
        parts.append(
            Finding("amd gpus", "bad", f"{len(cards)} GPUs, the site says {accelerators}", len(cards), accelerators, "rocm-smi; dmesg")
        )
    for card in cards:
        name = card.parent.name
        for block in sorted((card / "ras").glob("*_err_count")):
            found = re.search(r"ue:\s*(\d+)", text(block) or "")
            if found and int(found[1]):
                said = f"{name}: {found[1]} uncorrectable errors in {block.name.removesuffix('_err_count')}"
                parts.append(Finding("amd gpus", "bad", said, int(found[1]), 0, "exclude the node; reset or replace the GPU"))
        width, most = text(card / "current_link_width"), text(card / "max_link_width")
        if width and most and width.isdecimal() and most.isdecimal() and int(width) < int(most):
            parts.append(Finding("amd gpus", "bad", f"{name}: PCIe x{width} of x{most}", int(width), int(most), "exclude the node"))
    note = "; clocks, temperature and links between GPUs are not tested without amdsmi"
    return worst("amd gpus", parts, f"{len(cards)} AMD GPUs, no uncorrectable errors, PCIe at full width{note}")
