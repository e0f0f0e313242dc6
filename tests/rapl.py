"""A powercap tree that draws known watts: files as the kernel has them, advanced by a thread, and the truth beside them."""

import threading
import time
from pathlib import Path
from typing import Self


class Rapl:
    """Package counters of a tree in `folder` that grow by `watts` each while inside the `with`; `joules()` is what they have grown by."""

    def __init__(self, folder: Path, watts: float = 40.0, *, packages: int = 1, most_uj: int = 262143328850) -> None:
        self.root, self.watts, self.most_uj = folder, watts, most_uj
        self.zones = []
        for number in range(packages):
            zone = folder / "class" / "powercap" / f"intel-rapl:{number}"
            zone.mkdir(parents=True)
            (zone / "name").write_text(f"package-{number}\n")
            (zone / "max_energy_range_uj").write_text(f"{most_uj}\n")
            (zone / "energy_uj").write_text("123456\n")
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
        began = time.monotonic()
        while not self._stop.wait(0.01):
            drawn = int((time.monotonic() - began) * self.watts * 1e6)
            for zone in self.zones:  # whole at every moment, as a file of sysfs is
                whole = zone / ".energy_uj"
                whole.write_text(f"{(123456 + drawn) % (self.most_uj + 1)}\n")
                whole.replace(zone / "energy_uj")
            self._drawn_uj = drawn
