"""A powercap tree that draws known watts: files as the kernel has them, advanced by a thread, and the truth beside them."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self


class Rapl:
    """Counters of a tree in `folder` that grow by `watts` each (a number, or what a function says now) while inside the `with`; `joules()` is what they have
    grown by. `platform`: a psys domain that says as much: the whole machine."""

    def __init__(
        self,
        folder: Path,
        watts: float | Callable[[], float] = 40.0,
        *,
        packages: int = 1,
        platform: bool = False,
        most_uj: int = 262143328850,
    ) -> None:
        self.root, self.most_uj = folder, most_uj
        self.watts = watts if callable(watts) else lambda: watts
        self.zones = []
        for number in range(packages + platform):
            zone = folder / "class" / "powercap" / f"intel-rapl:{number}"
            zone.mkdir(parents=True)
            (zone / "name").write_text("psys\n" if number == packages else f"package-{number}\n")
            (zone / "max_energy_range_uj").write_text(f"{most_uj}\n")
            (zone / "energy_uj").write_text(f"{123456:015d}\n")
            self.zones.append(zone)
        self._drawn_uj, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def joules(self) -> float:
        """Of one package since the thread began, as of its last write."""
        return self._drawn_uj / 1e6

    def _run(self) -> None:
        last, files = time.monotonic(), [os.open(zone / "energy_uj", os.O_WRONLY) for zone in self.zones]
        while not self._stop.wait(0.01):
            now = time.monotonic()
            drawn, last = self._drawn_uj + int((now - last) * self.watts() * 1e6), now
            for file in files:  # in place and of one width: whole at every moment, also for who keeps it open, as a file of sysfs is
                os.pwrite(file, b"%015d\n" % ((123456 + drawn) % (self.most_uj + 1)), 0)
            self._drawn_uj = drawn
        for file in files:
            os.close(file)
