"""A run without a run: steps that take time and draw watts, a meter with lag and noise, windows, saves; on a clock of its own, driven by Governor and Pace."""

import random
from dataclasses import dataclass, field

from gigatrain.config import Power
from gigatrain.planning.watts import Watts
from gigatrain.power.control import Governor
from gigatrain.power.pace import Orders, Pace
from gigatrain.power.reading import Seen


@dataclass
class Plant:
    """`rest` and `full`: watts at the facility without and with a step running; `lag_s`: of the draw and its meter together; `noise`: relative, of a second."""

    rest: float = 400e3
    full: float = 1e6
    busy_s: float = 0.5
    every: int = 20  # steps of a window
    lag_s: float = 0.5
    noise: float = 0.01
    jitter: float = 0.02  # of a step's time
    save_every: int = 0
    save_s: float = 20.0
    drift: float = 0.0  # of the swing, per hour
    fails_at: tuple[float, ...] = ()  # seconds at which the run stands still for 60 s
    seed: int = 0
    began_s: float = 1_790_000_000.0
    device_share: float = 0.6  # of the facility's swing is the devices'
    min_cap: float | None = None
    deaf: bool = False  # limits are ordered, and the driver takes none
    boundary: str = "facility"
    series: tuple[float, ...] = ()  # of a recorded run: the draw of each second over its mean, while steps run
    now: float = field(default=0.0, init=False)
    tokens: int = field(default=0, init=False)

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.draw, self.target, self.joules, self.busy_total = self.rest, self.rest, 0.0, 0.0
        self.seconds: list[float] = []  # joules of every whole second
        self.cap = 1.0
        self.orders: list[tuple[float, Orders]] = []
        self.settled_at = 0.0
        self._wobble = 1.0

    def run(self, power: Power, watts: Watts, seconds: float, *, schedule=None, knows=True, total_steps=None) -> Governor:
        self.governor = governor = Governor(power, watts, began_s=self.began_s, schedule=schedule)
        pace = Pace(clock=lambda: self.now, sleep=lambda s: self._pass(s, False), wall=lambda: self.began_s + self.now)
        self._order(pace, governor.decide(Seen(self.began_s, None, None, None, stops_after=self._stops(0, total_steps))))
        step, window = 0, (0.0, 0.0, 0, 0.0)
        fails = list(self.fails_at)
        held, mixed = 0.0, False
        while self.now < seconds and (total_steps is None or step < total_steps):
            before = self.now
            paused = pace.wait(lambda: False, lambda: None)
            if paused:
                governor.paused(paused, self.began_s + before)
                window = (self.now, self.joules, step, 0.0)
                held, mixed = 0.0, True
            took = self.busy_s * (1 + self.jitter * self.random.uniform(-1, 1)) / (self.cap**0.5)
            self._pass(took, True)
            self.busy_total += took
            step += 1
            self.tokens += 1000
            if step % self.every == 0:
                began, joules, first, _ = window
                span = self.now - began
                stepping = span - held
                waited = pace.take_waited_s()
                seen = Seen(
                    now_s=self.began_s + self.now,
                    watts=(self.joules - joules) / span if knows else None,
                    watts_device=self.device_share * (self.joules - joules) / span,
                    step_s=stepping / (step - first),
                    busy_share=1 - waited / stepping,
                    devices=1000,
                    window_s=span,
                    steps=step - first,
                    tokens=1000 * (step - first),
                    stops_after=self._stops(step, total_steps),
                    bins=self._bins(began) if knows else (),
                    mixed=mixed,
                    cap_min_share=self.min_cap,
                    boundary=self.boundary,
                )
                self._order(pace, governor.decide(seen))
                if self.orders[-1][1].leave:
                    break
                window, held, mixed = (self.now, self.joules, step, 0.0), 0.0, False
            if self.save_every and step % self.save_every == 0:
                self._pass(self.save_s, False)
                held += self.save_s
                pace.restart()
            if fails and self.now > fails[0]:
                fails.pop(0)
                self._pass(60.0, False)
                held, mixed = held + 60.0, True
                pace.restart()
        return governor

    def _stops(self, step, total):
        ends = [self.save_every - step % self.save_every] if self.save_every else []
        return min([*ends, *([total - step] if total is not None else [])], default=None)

    def _order(self, pace, orders):
        pace.follow(orders)
        self.orders.append((self.now, orders))
        self.cap = orders.cap_share if orders.cap_share is not None and not self.deaf else 1.0

    def _pass(self, seconds, busy):
        """Time goes by, at most a second at once; the draw follows its target with a lag."""
        while seconds > 1e-12:
            second = int(self.now + 1e-9)
            part = min(seconds, second + 1 - self.now)
            if part <= 1e-9:
                part = min(seconds, 1e-6)
            full = self.rest + (self.full - self.rest) * self.cap * (1 + self.drift * self.now / 3600)
            target = (full if busy else self.rest) * self._wobble
            keep = 2.718281828 ** (-part / self.lag_s)
            joules = target * part + (self.draw - target) * self.lag_s * (1 - keep)
            self.draw = target + (self.draw - target) * keep
            self.joules += joules
            while len(self.seconds) <= second:
                self.seconds.append(0.0)
                trace = self.series[second % len(self.series)] if self.series else 1.0
                self._wobble = trace * (1 + self.random.gauss(0, self.noise))
            self.seconds[second] += joules
            self.now += part
            seconds -= part

    def _bins(self, began):
        """The ten-second bins that closed since, as Latest.bins has them."""
        first = int(began // 10)
        return tuple((self.began_s + 10 * n, sum(self.seconds[10 * n : 10 * n + 10]) / 10) for n in range(first, int(self.now // 10)))

    def means(self, after=0.0, span=10):
        """`(second, mean)` of every `span` seconds that slide by one."""
        whole = self.seconds[: int(self.now)]
        total, found = sum(whole[:span]), []
        for index in range(span, len(whole)):
            if index - span >= after:
                found.append((index - span, total / span))
            total += whole[index] - whole[index - span]
        return found
