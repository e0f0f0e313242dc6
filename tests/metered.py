"""A /sys with meters in it, for tests that measure: files that a thread advances as a kernel would."""

import os
import threading
import time


class Tree:
    """A /sys with a processor's RAPL and a node's counter, which a thread advances: 150 W and 400 W, from when it begins."""

    def __init__(self, root):
        self.root, self.zone, self.node = root, root / "class" / "powercap" / "intel-rapl:0", root / "cray" / "pm_counters"
        for folder in (self.zone, self.node):
            folder.mkdir(parents=True)
        (self.zone / "name").write_text("package-0\n")
        (self.zone / "max_energy_range_uj").write_text("262143328850\n")
        self.began, self.rounds, self.end = time.monotonic(), 0, threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self):
        self.write()
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.end.set()
        self.thread.join()

    def run(self):
        while not self.end.wait(0.05):
            self.write()

    def write(self):
        gone, self.rounds = time.monotonic() - self.began, self.rounds + 1
        for path, text in (
            (self.zone / "energy_uj", f"{gone * 150e6:014.0f}"), (self.node / "energy", f"{gone * 400:08.0f} J"),
            (self.node / "power", "400 W"), (self.node / "freshness", f"{self.rounds:08d}"),
        ):  # fmt: skip
            file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)  # in place, as the kernel's: readers keep them open
            os.pwrite(file, f"{text}\n".encode(), 0)
            os.close(file)
