"""Whether ranks get on, and which of them is to blame: pure decisions over what is seen of them. Free of torch.

A run hangs where a rank makes no progress for longer than it ever needed, whatever its process does. All others soon wait for it in a collective, so the first
that is overdue is seldom the culprit. That is, in this order: a process that is stopped; one that waits for a disk; one whose Python does nothing at all;
the one that has come least far; the one that computes while the others wait.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = 1000  # whose times are kept
LEAST = 5  # steps until a usual time is known
UNKNOWN_TIMES = 4  # of the floor is what ranks get until then
SILENT_S = 1.5  # of a rank's own clock, which goes on ten times a second
BUSY = 0.5  # of a core


class Pace:
    """What a step of this run takes, as its ranks' beats show it."""

    def __init__(self, *, times: float, floor_s: float, slow_s: float, every: int) -> None:
        """`every`: the steps of a report's window, at whose end host and device meet: until one was seen nothing is usual, and its wait counts as usual."""
        self.times, self.floor_s, self.slow_s = times, floor_s, slow_s
        self.least = min(max(LEAST, every + 2), STEPS)
        self._share = max(0.99, 1 - 0.5 / every)
        self._steps: deque[float] = deque(maxlen=STEPS)

    def stepped(self, steps: int, took_s: float) -> None:
        """`steps` began in `took_s` seconds, with nothing slow between."""
        self._steps.extend([took_s / steps] * min(steps, 64))

    @property
    def p99_s(self) -> float | None:
        """Of a step; None until enough were seen."""
        if len(self._steps) < self.least:
            return None
        ordered = sorted(self._steps)
        return ordered[min(len(ordered) - 1, int(self._share * len(ordered)))]

    def limit_s(self, *, slow: bool) -> float:
        """How long a rank may be without a sign of progress; `slow`: where a rank is in what has no usual length."""
        p99_s = self.p99_s
        if slow:
            return self.slow_s
        return min(self.slow_s, UNKNOWN_TIMES * self.floor_s) if p99_s is None else max(self.floor_s, self.times * p99_s)


@dataclass(frozen=True)
class View:
    """A rank as its supervisor sees it."""

    rank: int
    state: str  # of /proc: R runs, S sleeps, D waits for a disk, T is stopped, Z has ended
    silent_s: float  # since its own clock went on
    begun: int  # steps
    marks: int  # since the last one began
    phase: str
    step: int | None
    cores: float  # that it used, in the last second
    waits_in: str = ""  # the kernel's function, where it waits in one


def culprit(views: Sequence[View]) -> tuple[View | None, str]:
    """The rank to blame, and what is the matter with it; None where all wait alike."""
    stopped = [view for view in views if view.state in "Tt"]
    if stopped:
        return stopped[0], "its process is stopped (SIGSTOP, or a debugger)"
    waits = [view for view in views if view.state == "D"]
    if waits:
        return waits[0], f"it waits for a disk or file system ({waits[0].waits_in or 'state D'})"
    held = [view for view in views if view.silent_s > SILENT_S]
    if held and (len(held) < len(views) or len(views) == 1):
        return max(held, key=lambda view: view.silent_s), "one of its threads holds Python's lock"
    first, last = (choose(views, key=lambda view: (view.begun, view.marks)) for choose in (max, min))
    behind = [view for view in views if (view.begun, view.marks) == (last.begun, last.marks)]
    if (first.begun, first.marks) != (last.begun, last.marks) and len(behind) < len(views):
        blamed = max(behind, key=lambda view: view.cores)
        what = "it computes" if blamed.cores > BUSY or blamed.state == "R" else "it waits"
        return blamed, f"the others are further, and wait for it; {what}"
    busy = sorted(views, key=lambda view: -view.cores)
    if busy and busy[0].cores > BUSY and (len(busy) == 1 or busy[1].cores < BUSY / 2):
        return busy[0], "it computes, and the others wait for it"
    return None, "all wait alike: for the network, or for each other"
