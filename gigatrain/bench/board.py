"""The accelerators of this machine that a run uses, as NVML shows them: UUIDs, power limits, clocks, heat, memory. It only reads."""

import contextlib
import os
import platform
import statistics
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

SAMPLE_S = 0.5
WATTS = ("limit_watts", "limit_default_watts", "limit_least_watts", "limit_most_watts")


class Board:
    """NVIDIA's accelerators that are visible, or none: `why` says why. What one does not tell is left out, never guessed. `most`: not more than so many."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.handles: list[Any] = []
        self.uuids: list[str] = []
        self.name, self.why = "", ""
        self._shut: Callable[[], Any] = lambda: None

    def __enter__(self) -> Self:
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as failure:
            self.why = f"no NVIDIA driver: {failure}"
            return self
        self._shut = pynvml.nvmlShutdown
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None and visible.strip() in ("", "-1"):
            self.why = f"CUDA_VISIBLE_DEVICES={visible!r} hides every accelerator"
            return self
        try:
            names = visible.split(",") if visible else [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
            for name in (one.strip() for one in names[: self.most]):
                by_index = name.isdecimal()
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(name)
                self.handles.append(handle)
                self.uuids.append(pynvml.nvmlDeviceGetUUID(handle))
                self.name = self.name or pynvml.nvmlDeviceGetName(handle)
        except pynvml.NVMLError as failure:
            self.why = f"the NVIDIA driver does not answer for CUDA_VISIBLE_DEVICES={visible!r}: {failure}"
        return self

    def __exit__(self, *_: object) -> None:
        self._shut()

    def limits(self) -> dict[str, float]:
        """Watts: the limit as it is found now, the default, the least and the most that may be set; of several accelerators the lowest of each."""
        import pynvml

        found: dict[str, list[float]] = {}
        for handle in self.handles:
            with contextlib.suppress(pynvml.NVMLError):
                found.setdefault("limit_watts", []).append(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3)
            with contextlib.suppress(pynvml.NVMLError):
                found.setdefault("limit_default_watts", []).append(pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle) / 1e3)
            with contextlib.suppress(pynvml.NVMLError):
                least, most = map(float, pynvml.nvmlDeviceGetPowerManagementLimitConstraints(handle))
                found.setdefault("limit_least_watts", []).append(least / 1e3)
                found.setdefault("limit_most_watts", []).append(most / 1e3)
        return {name: min(watts) for name, watts in found.items()}

    def state(self, count: int | None = None) -> dict[str, float]:
        """Of the first `count` of them (default: all) now: slowest SM clock (MHz), memory clock, hottest (degrees), MiB in use by everybody on the fullest."""
        import pynvml

        readings: dict[str, tuple[Callable[[Any], float], Callable[[list[float]], float]]] = {
            "sm_mhz": (lambda handle: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM), min),
            "mem_mhz": (lambda handle: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM), min),
            "celsius": (lambda handle: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU), max),
            "used_mib": (lambda handle: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) / 2**20, max),
        }
        found: dict[str, list[float]] = {}
        for handle in self.handles[:count]:
            for name, (reading, _) in readings.items():
                with contextlib.suppress(pynvml.NVMLError):
                    found.setdefault(name, []).append(float(reading(handle)))
        return {name: readings[name][1](values) for name, values in found.items()}

    @contextlib.contextmanager
    def watched(self, count: int | None = None) -> Iterator[dict[str, float]]:
        """Fills the yielded dict when it ends: the median clocks, and the highest temperature and memory, of twice a second meanwhile."""
        found: dict[str, float] = {}
        seen: dict[str, list[float]] = {}
        end = threading.Event()

        def look() -> None:
            while not end.wait(SAMPLE_S):
                for name, value in self.state(count).items():
                    seen.setdefault(name, []).append(value)

        thread = threading.Thread(target=look, daemon=True, name="board")
        if self.handles:
            thread.start()
        try:
            yield found
        finally:
            end.set()
            if self.handles:
                thread.join()
            found |= {name: (max if name in ("celsius", "used_mib") else statistics.median)(values) for name, values in seen.items()}


def processor() -> str:
    """Its name as the system has it."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
