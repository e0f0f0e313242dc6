"""When a run saves, on both tiers: every so many steps as the recipe says, or ("auto") as often as is best by what saves cost in this run.

The decision is planning/estimate/saving.py's, taken at a report from rank 0's clock, which all ranks are told, so that all save at the same steps.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

from gigatrain.parallel.agree import told
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning.estimate.saving import Chosen, Measured, chosen, counted_hours
from gigatrain.planning.plan import Plan

FIRST = 500  # steps between far saves until one was timed, where the plan expects nothing; config.Checkpoint's former default
_LAST = 3  # saves whose mean cost counts: the first pays for folders and caches, and file systems change
_MOVED = 0.1  # by which share of itself an interval changes before it is told again


class Intervals:
    """`far(step)` and `near(step)` say what is saved after a step; all else feeds the decision."""

    def __init__(self, plan: Plan, mesh: Mesh, say: Callable[[str], None], *, shift: int = 0, near: bool = False) -> None:
        """`shift`: steps by which saves at a fixed interval are earlier; `near`: there is a near tier. `say` tells the user, on rank 0."""
        self.plan, self.mesh, self.say, self.shift = plan, mesh, say, shift
        asked = plan.checkpoint
        self.automatic = {"far": asked.every == "auto", "near": near and asked.near_every == "auto"}
        self.every = {
            "far": (plan.expected.checkpoint_every or FIRST) if asked.every == "auto" else asked.every,
            "near": 0 if not near else plan.report.every if asked.near_every == "auto" else asked.near_every,
        }
        self.last = {"far": 0, "near": 0}
        self.found: Chosen | None = None
        self.said = ""
        self._stalled: dict[str, list[float]] = {"far": [], "near": []}
        self._beside: dict[str, list[float]] = {"far": [], "near": []}
        self._window = (0, 0.0)  # steps and seconds of the windows of this process
        self._new = self._must = False
        self._told: tuple[int, int] | None = None

    def begin(self, step: int) -> None:
        """The next step is the first after `step`."""
        self.last = {"far": step, "near": step}

    def far(self, step: int) -> bool:
        """Whether this step is saved on the shared file system."""
        return self._next(step, "far") == 0

    def near(self, step: int) -> bool:
        """Whether it is kept in the near tier."""
        return self.every["near"] > 0 and self._next(step, "near") == 0

    def due(self, step: int) -> list[Literal["near", "far"]]:
        """The tiers that a step is saved in."""
        tiers: tuple[Literal["near", "far"], ...] = ("near", "far")
        return [tier for tier in tiers if getattr(self, tier)(step)]

    def left(self, step: int) -> int:
        """Steps until the next far save."""
        return self._next(step, "far") or self.every["far"]

    def _next(self, step: int, tier: str) -> int:
        if self.automatic[tier]:
            return max(0, self.last[tier] + self.every[tier] - step)
        return -(step + (self.shift if tier == "far" else 0)) % self.every[tier]

    def saved(self, tier: str, step: int, stall_s: float, beside_s: float = 0.0, *, must: bool = False) -> None:
        """A save was taken: what it held up the steps for, and for how long those before it were written beside them. One that `must` be, which has no
        background, tells what a save costs until another does."""
        self.last[tier], self._new = step, True
        if not must and self._must:
            self._stalled["far"].clear()
            self._beside["far"].clear()
        self._must = must
        self._stalled[tier].append(stall_s)
        self._beside[tier].append(beside_s)

    def report(self, steps_s: float, steps: int) -> bool:
        """A window of so many steps took so long; returns whether an interval was decided. Collective where one is automatic and a save was timed since."""
        self._window = (self._window[0] + steps, self._window[1] + steps_s)
        if not any(self.automatic.values()) or not self._new or not self._window[0]:
            return False
        self._new = False
        mine = {tier: [_mean(self._stalled[tier]), _mean(self._beside[tier])] for tier in ("far", "near")}
        said = told(self.mesh, mine | {"step_s": self._window[1] / max(1, self._window[0])})
        step_s = max(said["step_s"], 1e-6)
        near = self.every["near"] > 0 and said["near"][0] is not None
        if said["far"][0] is None and self.automatic["far"]:
            return False
        saving = Measured(
            0.0,
            1.0,
            near=near,
            far_interval_s=0.0 if self.automatic["far"] else self.every["far"] * step_s,
            near_interval_s=0.0 if self.automatic["near"] or not near else self.every["near"] * step_s,
            far_stalled_s=max(said["far"][0] or 0.0, 1e-6),
            far_beside_s=said["far"][1] or 0.0,
            near_stalled_s=max(said["near"][0] or 0.0, 1e-6),
            near_beside_s=said["near"][1] or 0.0,
        )
        days = self.plan.steps * step_s / 86_400
        counted = counted_hours(self.plan.expected.failure_hours, self.plan.expected.failure_source)
        share = self.plan.checkpoint.most_share
        found = chosen(self.plan.ranks, self.mesh.node, step_s, saving, most_share=share, days=days, failures=counted)
        self.found = found
        if self.automatic["far"]:
            self.every["far"] = found.far
        if self.automatic["near"] and found.near is not None:
            self.every["near"] = found.near
        self.said = self._words(step_s)
        now = (self.every["far"], self.every["near"])
        if self._told is None or any(abs(new - old) > _MOVED * old for new, old in zip(now, self._told, strict=True)):
            self._told = now
            self.say(f"  saves    {self.said}")
        return True

    def _words(self, step_s: float) -> str:
        """`every 180 steps (6.3 min): a save costs 2.1 s, a failure comes every 5.2 h (...)`."""
        found = self.found
        assert found is not None
        far = self.every["far"]
        bound = f", {found.bound}" if found.bound and self.automatic["far"] else ""
        near = ""
        if self.every["near"]:
            near = f"; near folders every {_steps(self.every['near'])}: one costs {_span(found.near_cost_s)}"
        return (
            f"every {_steps(far)} ({_span(far * step_s)}{bound}): a save costs {_span(found.far_cost_s)}, a failure comes every {_span(found.mtbf_s)} "
            f"({found.source}); Young's {_span(found.young_s)}, Daly's {_span(found.daly_s)}{near}"
        )

    def summary(self) -> dict[str, Any]:
        """What summary.json and progress.jsonl keep."""
        kept: dict[str, Any] = {"every": self.every["far"], "near_every": self.every["near"] or None, "words": self.said}
        return kept | (
            {} if self.found is None else {"chosen": {key: _finite(value) for key, value in dataclasses.asdict(self.found).items()}}
        )


class Timed:
    """The seconds of a `with`."""

    def __enter__(self) -> "Timed":
        self._began, self.seconds = time.monotonic(), 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began


def _mean(values: list[float]) -> float | None:
    return sum(values[-_LAST:]) / len(values[-_LAST:]) if values else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and value in (float("inf"), float("-inf")) else value


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count:,} steps"


def _span(seconds: float) -> str:
    if seconds == float("inf"):
        return "never"
    for size, unit in ((86_400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds >= 1 else f"{1e3 * seconds:.2g} ms"
