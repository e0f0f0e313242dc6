"""What is done to keep a run to its watts: one decision a report, alike on every rank, from numbers that all ranks have; then steps wait for their time.

The decisions are power/control.py's; here is where a run tells it what happened, and where orders become waiting, limits of accelerators, or the end. Where
nothing is asked for (no megawatts, no ramp, no schedule, no limit of the site within reach) none of it costs anything.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gigatrain.errors import PowerError
from gigatrain.observe.energy import Energy
from gigatrain.observe.health import Health
from gigatrain.observe.logs import Progress
from gigatrain.observe.trace import Trace
from gigatrain.parallel import ranks
from gigatrain.planning.plan import Plan
from gigatrain.power.control import BLIND_S, CANNOT, Governor
from gigatrain.power.pace import MEET_S, NOTHING, Orders, Pace
from gigatrain.power.reading import BOUNDARIES, Seen
from gigatrain.power.schedule import Schedule

OVER = {  # what is told when a notice no longer holds
    "paused": "the pause is over: steps go on",
    "silent": "it is measured again",
    "narrow": "a wider boundary is measured now",
}
LOOP = ("now_ms", "stepping_ms", "waited_ms", "paused_ms", "mixed")  # what rank 0 says of its loop, beside the meters' sums


class Budget:
    """`wait` before a step, `meet` with the reduced numbers, `decide` at a report."""

    def __init__(self, plan: Plan, energy: Energy, health: Health, times: Trace, progress: Progress, left: Callable[[int], int]) -> None:
        """`left`: steps to the next save. Collective where there is a schedule, which rank 0 reads; raises PowerError, on all ranks, if it cannot be read."""
        self.plan, self.energy, self.health, self.times, self.progress = plan, energy, health, times, progress
        path = plan.power.schedule
        schedule = None if path is None else Schedule.of(ranks.first(health.mesh, lambda: Schedule.read(path).json()))
        self.governor = Governor(plan.power, plan.watts, began_s=time.time(), schedule=schedule)
        self.acts = self.governor.acts and bool(energy.nodes)
        self.metered = self.acts and _metered(energy, health)
        self.pace = Pace(torch.cuda.synchronize if plan.device == "cuda" else None)
        self.orders: Orders | None = None
        self.left = left
        self._met_s = time.monotonic()
        self._elsewhere_s = self._paused_s = 0.0
        self._loop = dict.fromkeys(LOOP, 0)
        self._first = True  # window of this process: kernels and graphs are made in it
        self._before, self._decided_s = (0, 0), 0.0  # steps and tokens at the last decision, and when it was

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resume need not learn again."""
        return self.governor.state() if self.acts else {}

    def load(self, state: dict[str, Any]) -> None:
        """The opposite of `state`; an empty one is of a run that kept to nothing."""
        if state and self.acts:
            self.governor.load(state)

    def begin(self, step: int, tokens: int) -> None:
        """The first step of this process is next. Raises PowerError, on all ranks, where it may not be: the budget cannot be kept, now or ever."""
        self._before = (step, tokens)
        if not self.acts:
            if self.governor.acts:  # by its site: config.Power refuses what a recipe asks for and does not measure
                self._say("power.measure is false, so the site's own ramp and limit are not kept")
            return
        self.numbers()  # the start is no step
        self._decided_s = self._loop["now_ms"] / 1e3 or time.time()
        what = self.governor.promised
        if what and self.governor.line is None and not self.metered and not self.energy.latest.watts:
            raise _shared(PowerError(f"{what} cannot be kept: nothing measures what the run draws, and its site does not say it; {CANNOT}"))
        latest = self.energy.latest  # of the start: it says which boundary there will be, and nothing of steps
        watts, boundary = (latest.watts[latest.boundary], latest.boundary) if latest.boundary is not None else (None, BOUNDARIES[-1])
        self._follow(Seen(now_s=self._decided_s, watts=watts, boundary=boundary, stops_after=self._stops_after(step)))
        if self.orders is not None and self.orders.leave:
            raise _shared(PowerError(f"nothing was begun: {self.orders.why}"))

    def numbers(self) -> list[int]:
        """What rank 0's loop did since it was last asked; zeros elsewhere."""
        if not self.acts:
            return []
        now, waited_s, paused_s = time.monotonic(), self.pace.take_waited_s(), self._paused_s
        elsewhere_s, self._elsewhere_s = self.energy.elsewhere_s - self._elsewhere_s, self.energy.elsewhere_s
        stepping_s = max(0.0, now - self._met_s - elsewhere_s - paused_s)
        self._met_s, self._paused_s = now, 0.0
        found = (int(1e3 * time.time()), int(1e3 * stepping_s), int(1e3 * waited_s), int(1e3 * paused_s), int(elsewhere_s > 0))
        return list(found) if self.energy.path is not None else [0] * len(LOOP)

    def meet(self, sums: Sequence[int]) -> Sequence[int]:
        """The numbers of all ranks; those of rank 0's loop are kept until the next decision. Returns those that are not ours."""
        if not self.acts:
            return sums
        for name, value in zip(LOOP, sums[: len(LOOP)], strict=True):
            self._loop[name] = value if name == "now_ms" else self._loop[name] + value
        return sums[len(LOOP) :]

    def decide(self, step: int, tokens: int) -> None:
        """What holds until the next report."""
        if not self.acts:
            return
        loop, (steps, before) = self._loop, self._before
        done, latest, devices = step - steps, self.energy.latest, self.energy.devices
        if not latest.seconds and self.metered and loop["now_ms"] / 1e3 - self._decided_s < BLIND_S:
            return  # a slow meter: what it says later is of these steps too
        stepping_s = loop["stepping_ms"] / 1e3
        if loop["paused_ms"]:
            self.governor.paused(loop["paused_ms"] / 1e3, (loop["now_ms"] - loop["paused_ms"]) / 1e3)
        self._follow(
            Seen(
                now_s=loop["now_ms"] / 1e3,
                watts=latest.watts[latest.boundary] if latest.boundary is not None else None,
                boundary=latest.boundary or BOUNDARIES[-1],
                watts_device=latest.watts.get("device"),
                step_s=stepping_s / done if done else None,
                busy_share=max(0.0, 1.0 - loop["waited_ms"] / 1e3 / stepping_s) if stepping_s else 1.0,
                devices=devices,
                window_s=max(0.0, latest.seconds - loop["paused_ms"] / 1e3),
                steps=done,
                tokens=tokens - before,
                stops_after=self._stops_after(step),
                bins=latest.bins,
                mixed=bool((self._first and self.plan.device == "cuda") or loop["mixed"] or loop["paused_ms"]),
                cap_min_share=self.energy.least_cap,
            )
        )
        self.energy.decided()
        self._before, self._first, self._decided_s = (step, tokens), False, loop["now_ms"] / 1e3
        self._loop = dict.fromkeys(LOOP, 0) | {"now_ms": loop["now_ms"]}

    def _follow(self, seen: Seen) -> None:
        before, self.orders = self.orders or NOTHING, self.governor.decide(seen)
        orders = self.orders
        for kind, words in orders.notices:
            if (kind, words) not in before.notices:
                self._say(words)
        for kind, _ in before.notices:
            if kind in OVER and kind not in dict(orders.notices) and not orders.leave:
                self._say(OVER[kind])
        self.pace.follow(orders)
        self.energy.obey(orders.cap_share)
        self.energy.orders = orders.json() | {"cost": self.governor.cost()}
        if orders.leave:
            self._say(f"the run leaves: {orders.why}")
            self.health.leave(orders.why)

    def _say(self, words: str) -> None:
        """On the display of rank 0; ranks decide alike, and one tells."""
        if self.energy.path is not None:
            self.energy.say(f"POWER {words}")

    def _stops_after(self, step: int) -> int:
        """Steps until the next save, validation or the end, whichever holds up the steps first."""
        left = [self.plan.steps - step, self.left(step)]
        if self.plan.validation.every:
            left.append(self.plan.validation.every - step % self.plan.validation.every)
        return min(left)

    def wait(self, report: Callable[[], bool], alive: Callable[[], None]) -> None:
        """Until the next step may begin. `report`: in a long pause all ranks report, and hear whether they are to leave."""
        if not self.acts or self.orders is None or self.orders.idle:
            return

        def alone() -> None:  # who waits for nobody leaves a pause at once
            alive()
            if self.orders is not None and self.orders.pause_until_s is not None and time.monotonic() - self._met_s > MEET_S:
                report()

        with self.times.phase("paced"), self.energy.during("paced"), self.progress.spent("paced"):
            single = self.health.mesh.count == 1
            paused_s = self.pace.wait(lambda: self.health.signal is not None, alone if single else alive, None if single else report)
            self._paused_s += paused_s

    def stopped(self) -> None:
        """Steps were held up, by a save or a validation."""
        if self.acts:
            self.pace.restart()

    def end(self) -> None:
        """Raises PowerError where the run left because its watts cannot be kept, now that it is saved."""
        if self.orders is not None and self.orders.leave:
            raise _shared(PowerError(f"saved and left: {self.orders.why}"))


def _metered(energy: Energy, health: Health) -> bool:
    """Whether any node has a meter, or what stands for one. Collective."""
    found = torch.tensor([int(energy.meter is not None and bool(energy.meter.parts.tracks))], dtype=torch.int64, device=health.mesh.device)
    return bool(health.mesh.sum(found).item())


def _shared(failure: PowerError) -> PowerError:
    """One that all ranks raise."""
    failure.shared = True
    return failure
