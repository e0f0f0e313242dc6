"""The meter of a whole node: HPE Cray's pm_counters, else the BMC by Redfish, else by IPMI DCMI.

A BMC answers in tenths of a second to seconds, and is not to be asked ten times a second: `Polled` asks it from a thread of its own, and its `read` gives what
was last heard with the time that it is of. Formats: Cray-HPE/docs-csm User_Access_to_Compute_Node_Power_Data.md; redfish.py; ipmitool's lib/ipmi_dcmi.c.
"""

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from gigatrain.errors import PowerError
from gigatrain.power import redfish
from gigatrain.power.host import File, once
from gigatrain.power.reading import Sample, Scope, Source

Kind = Literal["auto", "pm_counters", "redfish", "dcmi", "none"]
UPDATE_S = 1.0  # MLPerf's rules want a sample a second; no BMC is asked more often
PARTLY = "IPMI DCMI reads what the maker put behind it: on some machines the mainboard alone, without a tray of accelerators that has supplies of its own"
STUCK_S = 5.0  # pm_counters have news ten times a second


def source(kind: Kind, sysfs: Path, place: tuple[str, ...]) -> tuple[Source | None, list[str]]:
    """The meter of this node, and what could not be had and why.

    `auto` takes the first that answers. One that is asked for by name and does not answer raises PowerError. `sysfs` is where the kernel's files are, `place`
    the node.
    """
    openers: dict[str, Callable[[], Source]] = {
        "pm_counters": lambda: PmCounters(sysfs / "cray" / "pm_counters", place),
        "redfish": lambda: redfish_node({"GIGATRAIN_REDFISH_URL": redfish.host_interface(sysfs), **os.environ}, place),
        "dcmi": lambda: dcmi(place),
    }
    if kind == "none":
        return None, []
    if kind != "auto":
        try:
            return openers[kind](), [PARTLY] if kind == "dcmi" else []
        except PowerError as error:
            raise PowerError(
                f'power.node = "{kind}": {error}; or set power.node to "auto", which takes the first meter that answers'
            ) from None
    notes = []
    for name, opener in openers.items():
        try:
            return opener(), [*notes, PARTLY] if name == "dcmi" else notes
        except PowerError as error:
            notes.append(f"no node meter by {error}")
    return None, notes


class PmCounters:
    """HPE Cray's counters of a node, ten times a second: joules since the blade's controller began, and watts, of node and accelerators together.

    `freshness` counts the controller's rounds: what was read between two equal values of it is of one round. `startup` changes when the controller begins anew,
    and the joules with it: then this counter begins at 0, which its reader takes for a reset. `generation` only counts changes of a power limit.
    """

    wrap_mj: int | None = None
    scope: Scope = "node"

    def __init__(self, folder: Path, place: tuple[str, ...]) -> None:
        self.place = place
        self.name = "HPE Cray pm_counters"
        if not (folder / "energy").exists():
            raise PowerError(
                f"pm_counters: there is no {folder}/energy; HPE Cray EX nodes have it (in a container mount the host's /sys and set power.sysfs)"
            )
        self._files = {name: File(folder / name) for name in ("energy", "power", "freshness", "startup")}
        self._startup: int | None = None
        self._base_j = 0
        self._round: tuple[int, float] | None = None  # freshness, and since when it is that
        self._has = {name for name in self._files if (folder / name).exists()}
        try:
            hertz = once(folder / "raw_scan_hz")
        except (OSError, PowerError):
            hertz = 10
        self.update_s = 1 / hertz if hertz > 0 else 0.1
        try:
            self.read()
        except (OSError, PowerError) as error:
            self.close()
            raise PowerError(f"pm_counters: {error}") from None

    def read(self) -> Sample:
        for _ in range(5):
            before = time.monotonic()
            fresh = self._number("freshness")
            joules = self._files["energy"].number()
            watts = self._number("power")
            startup = self._number("startup")
            if fresh == self._number("freshness"):
                break
        else:
            raise PowerError(f"{self._files['freshness'].path} changes faster than two files are read")
        now = (before + time.monotonic()) / 2
        self._alive(fresh, now)
        if self._startup is not None and startup != self._startup:
            self._base_j = joules
        self._startup = startup
        return Sample(now, counter_mj=(joules - self._base_j) * 1000, milliwatts=None if watts is None else watts * 1000)

    def _number(self, name: str) -> int | None:
        return self._files[name].number() if name in self._has else None

    def _alive(self, fresh: int | None, now: float) -> None:
        """A controller that hangs leaves its last joules standing, which is not a node that draws nothing."""
        if fresh is None:
            return
        if self._round is None or self._round[0] != fresh:
            self._round = (fresh, now)
        elif now - self._round[1] > STUCK_S:
            raise PowerError(
                f"{self._files['freshness'].path} has stood at {fresh} for {now - self._round[1]:.0f} s: the blade's controller hangs"
            )

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class Polled:
    """A meter that takes its time, asked by a thread of its own every `update_s`; `read` gives the newest answer, and raises where that is too old.

    `look` asks once, and raises OSError or PowerError; `leave` is called from the same thread at the end, so that both may use one connection.
    """

    wrap_mj: int | None = None
    scope: Scope = "node"

    def __init__(
        self, name: str, place: tuple[str, ...], look: Callable[[], Sample], leave: Callable[[], None] = lambda: None, *, times: int = 1
    ) -> None:
        self.place = place
        self.name = name
        self._look = look
        self._leave = leave
        self._why = ""
        self._stop = threading.Event()
        try:
            began = time.monotonic()
            self._newest = look()
        except BaseException:
            leave()
            raise
        self.update_s = max(times * UPDATE_S, 2 * (time.monotonic() - began))  # a BMC that is slow is asked less
        self._thread = threading.Thread(target=self._poll, name=f"gigatrain {name}", daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        due = time.monotonic() + self.update_s
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            due = time.monotonic() + self.update_s
            try:
                self._newest = self._look()
                self._why = ""
            except (OSError, PowerError) as error:
                self._why = str(error)
        self._leave()

    def read(self) -> Sample:
        newest = self._newest
        age_s = time.monotonic() - newest.time_s
        if age_s > 5 * self.update_s:
            raise PowerError(f"{self.name}: last heard {age_s:.1f} s ago, {self._why or 'and has not answered since'}")
        return newest

    def close(self) -> None:
        """Ends its thread, for which it waits as long as an answer and a farewell may take."""
        self._stop.set()
        self._thread.join(2 * redfish.ANSWER_S)


def redfish_node(environ: Mapping[str, str], place: tuple[str, ...]) -> Source:
    """The node's chassis by its BMC, with the account of `environ` (redfish.py); raises PowerError."""
    service = redfish.Service(environ)
    try:
        service.begin()
        chassis = redfish.whole(service, environ.get("GIGATRAIN_REDFISH_CHASSIS"))
        address, field = redfish.metrics(service, chassis)
    except (OSError, PowerError) as error:
        service.close()
        raise PowerError(f"Redfish: {service.where} {error}") from None
    first = str(field[0])
    counts = first.startswith("Energy")

    def look() -> Sample:
        before = time.monotonic()
        answer = service.get(address)
        now = (before + time.monotonic()) / 2
        value = redfish.number(answer, field)
        if value is None or value <= 0:
            says = "nothing" if value is None else f"{value:g}"
            raise PowerError(f"{address} says {says} for {'.'.join(map(str, field))}: no running node draws that")
        return Sample(now, counter_mj=redfish.millijoules(answer, first)) if counts else Sample(now, milliwatts=round(value * 1000))

    name = f"Redfish, {chassis['@odata.id']} {'.'.join(map(str, field))}"
    try:
        return Polled(name, place, look, service.close, times=10 if counts else 1)
    except (OSError, PowerError) as error:
        raise PowerError(f"Redfish: {service.where} {error}") from None


def dcmi(place: tuple[str, ...]) -> Source:
    """The node by `ipmitool dcmi power reading`, through /dev/ipmi0; raises PowerError."""
    program = shutil.which("ipmitool", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")))
    if program is None:
        raise PowerError("IPMI DCMI: there is no ipmitool here; install it, and let the job read and write /dev/ipmi0")
    program = os.path.abspath(program)

    def look() -> Sample:
        before = time.monotonic()
        watts = _reading(program)
        return Sample((before + time.monotonic()) / 2, milliwatts=watts * 1000)

    try:
        return Polled("IPMI DCMI power reading", place, look)
    except (OSError, PowerError) as error:
        raise PowerError(f"IPMI DCMI: {error}") from None


def _reading(program: str) -> int:
    """Watts by ipmitool's text; its "Sampling period" is that of the minimum and maximum beside it, and no reason to ask less often."""
    import subprocess

    command = [program, "dcmi", "power", "reading"]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}  # not the whole: it may hold a password
    try:
        ran = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=redfish.ANSWER_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PowerError(f"`ipmitool dcmi power reading` did not end within {redfish.ANSWER_S:g} s") from None
    if ran.returncode != 0:
        said = " ".join(ran.stderr.split())[:200] or "nothing"
        raise PowerError(
            f"`ipmitool dcmi power reading` left with {ran.returncode} and said: {said}. /dev/ipmi0 is root's: give the job's group read and write by a udev "
            "rule; if it is not there, load ipmi_si and ipmi_devintf; not every BMC has DCMI"
        )
    reading = re.search(r"Instantaneous power reading:\s*(\d+) Watts", ran.stdout)
    state = re.search(r"Power reading state is:\s*(\w+)", ran.stdout)
    if reading is None or state is None:
        raise PowerError(
            f"`ipmitool dcmi power reading` said {' '.join(ran.stdout.split())[:100]!r}, in which there is no reading with its state"
        )
    if state[1] != "activated":
        raise PowerError(
            f"`ipmitool dcmi power reading`: the BMC's power measurement is {state[1]}, so its {reading[1]} W may be of any time"
        )
    if int(reading[1]) == 0:
        raise PowerError("`ipmitool dcmi power reading`: 0 W, which no running node draws: this BMC has no sensor behind it")
    return int(reading[1])
