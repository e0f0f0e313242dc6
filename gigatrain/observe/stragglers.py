"""Which ranks are slow: the seconds that each rank takes for a section of its steps, against the median of all ranks.

Ranks that train together finish together, so the step's own time says nothing: only sections in which a rank waits for nobody are compared (SECTIONS of the
plan's mesh). Each rank counts itself into a histogram of its seconds per step, whose sum over all ranks travels in the report's own reduction: the median
follows from it on every rank, to the width of a bin, 9 %, whatever the number of ranks.

    score = median / own, at most 1        1: as fast as most; 0.5: takes twice as long (as ByteRobust and NVRx count)

A rank with own > numerics.straggler * median in STREAK reports in a row raises a flag in the next reduction. Only while one is raised do ranks say more:
rank, host, section and how many times slower, into the log, RUN/stragglers.json and what reads it. On a GPU the seconds are those of CUDA events
(observe/trace.py), so a host that runs ahead hides nothing; but a section of few kernels, launched late by a slow host, is long too, and rightly so.

RUN/stragglers.json, replaced by rank 0 when it changes:

    {"step": 420, "ranks": [{"rank": 5, "host": "n17", "section": "forward", "times": 2.1, "score": 0.476, "since": 380}], "exclude": ["n17"]}

`exclude` suggests; nobody is excluded by it.
"""

import json
import math
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gigatrain.checkpoint import write_text
from gigatrain.parallel.agree import gathered, told
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning.plan import Plan

PER_OCTAVE = 8  # bins: 9 % each
LEAST_S, BINS = 2.0**-14, 20 * PER_OCTAVE  # from 61 us to 64 s
STREAK = 3  # reports in a row
LEAST_SHARE = 0.02  # of the median step: a section that is shorter is noise


def sections(plan: Plan, mesh: Mesh) -> tuple[str, ...]:
    """The phases of a step in which no rank waits for another, on this plan's mesh and engine."""
    if mesh.count == 1 or not plan.numerics.straggler:
        return ()
    cut = mesh.size("outer", "expert", "context", "tensor", "pipeline") > 1
    if plan.fuses("graph"):
        return ("data",)  # the rest is one phase, with its collectives
    if plan.engine.name == "deepspeed":
        return ("data",) if plan.engine.zero == 3 or mesh.size("context") > 1 else ("data", "forward")
    if not cut:
        return ("data", "forward", "backward", "optimizer")
    return ("data",) if plan.optim.name == "muon" else ("data", "optimizer")


class Stragglers:
    """One rank's part in it; `numbers` and `meet` around the report's reduction, then `name` by all ranks together."""

    def __init__(
        self, plan: Plan, mesh: Mesh, taken: Callable[[], tuple[int, Mapping[str, float]]], folder: Path | None, say: Callable[[str], None]
    ) -> None:
        """`taken`: steps, and seconds by phase, since it was last called. `folder` None: a rank that writes nothing."""
        self.limit, self.mesh, self.taken, self.folder, self.say = plan.numerics.straggler, mesh, taken, folder, say
        self.sections = sections(plan, mesh)
        self._mine: dict[str, float] = {}
        self._step_s = 0.0
        self._streak: dict[str, int] = {}
        self._times: dict[str, float] = {}
        self._since = 0
        self._raised = 0
        self.named: list[dict[str, Any]] = []

    @property
    def _slow(self) -> bool:
        return any(count >= STREAK for count in self._streak.values())

    def numbers(self) -> list[int]:
        """This rank in the histogram of each section, and its flag."""
        if not self.sections:
            return []
        steps, seconds = self.taken()
        self._mine = {section: seconds.get(section, 0.0) / steps for section in self.sections} if steps else {}
        self._step_s = sum(seconds.values()) / steps if steps else 0.0
        found = [0] * (BINS * len(self.sections))
        for index, section in enumerate(self.sections):
            if section in self._mine:
                found[index * BINS + _bin(self._mine[section])] = 1
        return [*found, int(self._slow)]

    def meet(self, sums: Sequence[int]) -> Sequence[int]:
        """The sums over all ranks; returns those that are not ours."""
        if not self.sections:
            return sums
        for index, section in enumerate(self.sections):
            median_s = median(sums[index * BINS : (index + 1) * BINS])
            if median_s is None or section not in self._mine:
                continue
            times = self._mine[section] / median_s
            slow = times > self.limit and self._mine[section] > LEAST_SHARE * self._step_s
            self._times[section], self._streak[section] = times, self._streak.get(section, 0) + 1 if slow else 0
        self._raised = sums[BINS * len(self.sections)]
        return sums[BINS * len(self.sections) + 1 :]

    def name(self, step: int) -> None:
        """Where ranks raised their flags, or have lowered them, all say who they are. Collective."""
        if not self._raised and not self.named:
            return
        mine = None
        if self._slow:
            section = max((one for one, count in self._streak.items() if count >= STREAK), key=lambda one: self._times[one])
            times = self._times[section]
            self._since = self._since or step
            mine = {"rank": self.mesh.rank, "host": socket.gethostname(), "section": section, "times": round(times, 2)}
            mine |= {"score": round(min(1.0, 1 / times), 3), "since": self._since}
        else:
            self._since = 0
        found = told(self.mesh, [one for one in gathered(self.mesh, mine) if one])
        before, self.named = {one["rank"] for one in self.named}, found
        for one in found:
            if one["rank"] not in before and self.folder is not None:
                self.say(
                    f"SLOW rank {one['rank']} on {one['host']}: {one['times']:.1f} times the median for {one['section']} in {STREAK} reports in a row; "
                    f'to start without it, add the host to the site\'s excluded hosts ("{self.folder.name}/stragglers.json" has the list)'
                )
        for rank in sorted(before - {one["rank"] for one in found}):
            if self.folder is not None:
                self.say(f"rank {rank} is as fast as the others again")
        if self.folder is not None:
            hosts = sorted({one["host"] for one in found})
            try:
                write_text(self.folder / "stragglers.json", json.dumps({"step": step, "ranks": found, "exclude": hosts}) + "\n")
            except OSError as failure:
                self.say(f"{self.folder}/stragglers.json could not be written: {failure.strerror}")


def _bin(seconds: float) -> int:
    return min(BINS - 1, max(0, int(PER_OCTAVE * math.log2(max(seconds, LEAST_S) / LEAST_S))))


def median(counts: Sequence[int]) -> float | None:
    """The middle, in seconds, of the bin that holds the lower median; None of nothing."""
    total, seen = sum(counts), 0
    for index, count in enumerate(counts):
        seen += count
        if count and 2 * seen >= total:
            return LEAST_S * 2 ** ((index + 0.5) / PER_OCTAVE)
    return None
