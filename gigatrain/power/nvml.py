"""NVIDIA's GPUs through NVML, by UUID and never by an index: CUDA_VISIBLE_DEVICES and cgroups renumber, a UUID stays.

The energy counter is the truth, watts are its cross-check. Three things that NVML's names do not say:
    scope   of a Grace superchip (GH200, GB200, GB300) the counter may be the whole module's, processor and memory included: asked for by scope, and told
    mean    "power usage" is instantaneous on GA100 (A100, A30) and older chips, and a mean over 1 s on all later ones: the source's name says which
    MIG     an instance has no meter: all of them stand for their GPU, whose whole draw is read once
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from gigatrain.errors import PowerError
from gigatrain.power.reading import Sample, Scope

GRACE = re.compile(r"\bG[BH][23]00\b")
UPDATE_S = 0.1  # the counter has news every 20 to 100 ms, by chip
SCOPES: tuple[tuple[Scope, int], ...] = (("gpu", 0), ("module", 1))  # NVML_POWER_SCOPE_*; memory (2) lies within the GPU and is never read
COUNTER, ENERGY, AVERAGE, INSTANT = (
    83,
    191,
    185,
    186,
)  # NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, _ENERGY (has a scope), _POWER_AVERAGE, _POWER_INSTANT
KINDS = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}  # NVML_VALUE_TYPE_*
SW_POWER_CAP, HW_SLOWDOWN, SYNC_BOOST, SW_THERMAL, HW_THERMAL, HW_POWER_BRAKE = 0x4, 0x8, 0x10, 0x20, 0x40, 0x80  # clock event reasons
AMPERE = 7  # NVML_DEVICE_ARCH_AMPERE: GA100, but also GA102 and others whose power usage is a mean


def sources(uuids: Sequence[str]) -> tuple[list["Gpu"], list[str]]:
    """A meter of each GPU that holds one of these (as CUDA or torch call them: with or without "GPU-" or "MIG-"), and what could not be had, and why."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as failure:
        return [], [f"no NVML: {failure}"]
    found: dict[str, Gpu] = {}
    notes: list[str] = []
    instances: dict[str, int] = {}
    for uuid in uuids:
        try:
            handle = _handle(uuid)
            mig = pynvml.nvmlDeviceIsMigDeviceHandle(handle)
            mig = bool(getattr(mig, "value", mig))  # of the binding's numbers the one that it gives as ctypes'
            if mig:
                handle = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
            whole = _text(pynvml.nvmlDeviceGetUUID(handle))
            instances[whole] = instances.get(whole, 0) + mig
            if whole not in found:
                found[whole] = Gpu(handle, whole)
                notes += found[whole].notes
            found[whole].covers += (uuid,)
        except (pynvml.NVMLError, PowerError) as failure:
            notes.append(f"{uuid}: {failure}" + (" (another user's, or hidden by the container)" if _denied(failure) else ""))
    shared = {whole: number for whole, number in instances.items() if number}
    if shared:
        notes.append(
            f"{sum(shared.values())} MIG instances on {len(shared)} GPUs: an instance has no meter, each stands for its whole GPU, counted once"
        )
    pynvml.nvmlShutdown()  # each source holds NVML open by itself
    return list(found.values()), list(dict.fromkeys(notes))


def _handle(uuid: str) -> Any:
    import pynvml

    names = [uuid] if uuid.startswith(("GPU-", "MIG-")) else [f"GPU-{uuid}", f"MIG-{uuid}"]
    for name in names[:-1]:
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(name)
        except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):  # type: ignore[attr-defined]
            continue
    return pynvml.nvmlDeviceGetHandleByUUID(names[-1])


def _denied(failure: Exception) -> bool:
    import pynvml

    return getattr(failure, "value", None) == pynvml.NVML_ERROR_NO_PERMISSION


def _text(found: str | bytes) -> str:
    return found.decode() if isinstance(found, bytes) else found


class Gpu:
    """One GPU, or one module where only that is metered. What it can say is found out once; a look is then one or two calls into the driver."""

    wrap_mj = None  # 64 bits of mJ; one that goes back was reset, with its driver
    update_s = UPDATE_S

    def __init__(self, handle: Any, uuid: str) -> None:
        import pynvml

        self._nvml, self._handle, self.uuid = pynvml, handle, uuid
        self.place: tuple[str, ...] = (uuid,)
        self.covers: tuple[str, ...] = ()  # the UUIDs that were asked for and are within it
        self.notes: list[str] = []
        chip = _text(pynvml.nvmlDeviceGetName(handle)).removeprefix("NVIDIA ")
        self.scope, counter = self._counter(chip)
        watts, how = self._watts()
        fields = [one for one in (counter, watts) if isinstance(one, tuple)]
        self._fields, self._kinds = [one[:2] for one in fields], [one[2] for one in fields]  # one call for both
        self._counter_at = 0 if isinstance(counter, tuple) else None
        self._watts_at = len(self._fields) - 1 if isinstance(watts, tuple) else None
        self._total = pynvml.nvmlDeviceGetTotalEnergyConsumption if counter == "total" else None
        self._usage = pynvml.nvmlDeviceGetPowerUsage if watts == "usage" else None
        self._reasons = self._clocks(chip)
        if counter is None and watts is None:
            raise PowerError(f"{chip} {uuid}: its driver gives neither an energy counter nor watts of the {self.scope}")
        part = " of the module, Grace and its memory included" if self.scope == "module" else ""
        self.name = f"NVML energy counter{part}, {chip}" if counter is not None else f"NVML {how}{part}, {chip}"
        self.check = how if counter is not None else ""  # what the counter is compared with
        pynvml.nvmlInit()

    def _ask(self, field: int, scope: int) -> tuple[int, str] | None:
        """Value and name of its type of one field; None where this GPU or driver does not know it."""
        try:
            (found,) = self._nvml.nvmlDeviceGetFieldValues(self._handle, [(field, scope)])
        except self._nvml.NVMLError as failure:
            if getattr(failure, "value", None) == self._nvml.NVML_ERROR_GPU_IS_LOST:
                raise
            return None
        kind = KINDS.get(found.valueType)
        return (int(getattr(found.value, kind)), kind) if found.nvmlReturn == self._nvml.NVML_SUCCESS and kind is not None else None

    def _counter(self, chip: str) -> tuple[Scope, tuple[int, int, str] | str | None]:
        """Scope and field of the counter. Of a Grace superchip the GPU's own if the driver tells it apart from the module's, else the module's."""
        if GRACE.search(chip):
            gpu, module = (self._ask(ENERGY, number) for _, number in SCOPES)
            total = self._ask(COUNTER, 0)
            # A driver that gives the same for both, or for the GPU what it gives for "total", knows no scope: that number has always been the module's.
            beside = [one[0] for one in (module, total) if one is not None]
            if gpu is not None and module is not None and not any(_alike(gpu[0], other) for other in beside):
                return "gpu", (ENERGY, 0, gpu[1])
            if module is not None:
                return "module", (ENERGY, 1, module[1])
            if total is not None:
                return "module", (COUNTER, 0, total[1])
            return "module", self._by_function("nvmlDeviceGetTotalEnergyConsumption", "total")
        found = self._ask(COUNTER, 0)
        return "gpu", (COUNTER, 0, found[1]) if found is not None else self._by_function("nvmlDeviceGetTotalEnergyConsumption", "total")

    def _watts(self) -> tuple[tuple[int, int, str] | str | None, str]:
        """Field of the watts of the counter's scope, and what they are."""
        scope = next(number for name, number in SCOPES if name == self.scope)
        for field, how in ((INSTANT, "instantaneous watts"), (AVERAGE, "watts, mean of 1 s")):
            found = self._ask(field, scope)
            if found is not None:
                return (field, scope, found[1]), how
        if self.scope == "module":  # the old call is the GPU's or the module's, by driver: nothing to compare with
            self.notes.append("the module's watts are not told, only its counter: no cross-check")
            return None, ""
        return self._by_function("nvmlDeviceGetPowerUsage", "usage"), f"power usage, {self._mean()}"

    def _mean(self) -> str:
        try:
            kind = self._nvml.nvmlDeviceGetArchitecture(self._handle)
        except self._nvml.NVMLError:
            return "instantaneous or a mean of 1 s, by chip"
        # NVML's header: "Ampere (except GA100) or newer: power averaged over 1 second".
        named = re.search(r"\bA(100|30|800)\b", _text(self._nvml.nvmlDeviceGetName(self._handle))) is not None
        ga100 = named if kind == AMPERE else kind < AMPERE
        return "instantaneous" if ga100 else "mean of 1 s"

    def _by_function(self, name: str, mark: str) -> str | None:
        try:
            getattr(self._nvml, name)(self._handle)
        except self._nvml.NVMLError:
            return None
        return mark

    def _clocks(self, chip: str) -> Any:
        """The function that says why the clocks are held down, with its driver's bits in a buffer of our own."""
        for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
            function = getattr(self._nvml, name)
            try:
                function(self._handle)
            except self._nvml.NVMLError:
                continue
            if name.endswith("ThrottleReasons"):
                self.notes.append(f"clock event reasons of {chip} by their old name, ThrottleReasons")
            return function
        self.notes.append(f"{chip} does not say why its clocks are held down: capped and thermal time are unknown")
        return None

    def read(self) -> Sample:
        before = monotonic()
        counter = milliwatts = None
        try:
            if self._fields:
                values = self._nvml.nvmlDeviceGetFieldValues(self._handle, self._fields)
                found = [
                    int(getattr(one.value, kind)) if one.nvmlReturn == 0 else None for one, kind in zip(values, self._kinds, strict=True)
                ]
                counter = found[self._counter_at] if self._counter_at is not None else None
                milliwatts = found[self._watts_at] if self._watts_at is not None else None
            if self._total is not None:
                counter = self._total(self._handle)
            if self._usage is not None:
                milliwatts = self._usage(self._handle)
            reasons = self._reasons(self._handle) if self._reasons is not None else None
        except self._nvml.NVMLError as failure:
            raise PowerError(f"{self.uuid}: {failure}") from failure
        if counter is None and milliwatts is None:
            raise PowerError(f"{self.uuid}: neither counter nor watts this time")
        return Sample((before + monotonic()) / 2, counter, milliwatts, reasons)

    def close(self) -> None:
        with suppress(self._nvml.NVMLError):  # the driver is gone, and with it what there was to close
            self._nvml.nvmlShutdown()


def _alike(one: int, other: int) -> bool:
    return abs(one - other) * 1000 <= max(one, other)
