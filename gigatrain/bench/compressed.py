"""Goodput in compressed time: a real run whose ranks are killed at exponential times, and what goodput_simulation.py says of the same run. Free of torch.

The two must agree, else the simulator's years of 288,000 accelerators say nothing. Measured: steps that were kept times what a step takes from report to report
(saves left out), over wall-clock; steps that were done again are not counted. Predicted twice, from this run's own stage times (detection, restart to the
next step, step, stall and lag of a save): `replayed` with the kills where they fell, `expected` as the mean over drawn ones of the same rate, which has the
luck of the draw in it.
"""

import json
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gigatrain.bench.subject import Broken, Engine, Lab, Subject, jsonl
from gigatrain.observe.goodput import classes
from gigatrain.planning.estimate.goodput_simulation import Fault, Saves, poisson, replay

DRAWS = 200
EVERY = 50  # steps between two saves
SETS = (
    "train.steps=1000000",
    f"checkpoint.every={EVERY}",
    "checkpoint.keep=2",
    "report.every=5",
    "validation.every=0",
    "recovery.restarts=1000",
)
AGREES = 0.02


@dataclass(frozen=True)
class Compared:
    """Shares of wall-clock, and the stage times that they were predicted from."""

    engine: str
    seed: int
    mtbf_s: float
    wall_s: float
    kills: int
    steps: int
    measured: float
    replayed: float
    expected: float
    expected_deviation: float
    detect_s: float
    restart_s: float
    step_s: float
    save_stall_s: float
    save_lag_s: float
    classes: dict[str, float]

    def lines(self) -> list[str]:
        """For a screen."""
        classes = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.classes.items() if share >= 0.0005)
        return [
            f"{self.kills} kills in {self.wall_s / 60:.1f} minutes, one in {self.mtbf_s:.0f} s on average (exponential, seed {self.seed}); "
            f"{self.steps} steps kept",
            f"stage times: detection {self.detect_s:.2f} s, restart to the next step {self.restart_s:.2f} s (medians), step {1e3 * self.step_s:.1f} ms, "
            f"a save stalls {1e3 * self.save_stall_s:.0f} ms and can be loaded {self.save_lag_s:.2f} s later",
            f"goodput measured {100 * self.measured:.1f} %, simulated with the same kills {100 * self.replayed:.1f} % "
            f"({100 * (self.replayed - self.measured):+.1f} points), drawn anew {100 * self.expected:.1f} ± {100 * self.expected_deviation:.1f} %",
            f"wall-clock: {classes}",
        ]


def run(lab: Lab, engine: Engine, *, mtbf_s: float, minutes: float, seed: int, say: Callable[[str], None] = print) -> Compared:
    """Kills a random rank at exponential times for so long, and compares. Raises Broken where the run does not live through it."""
    draw = random.Random(f"gigatrain goodput {seed}")
    kills: list[float] = []
    with Subject(lab, engine, lab.folder / f"goodput-{engine.name}-{seed}", SETS) as subject:
        subject.start()
        subject.until(lambda: subject.step() > 2 * EVERY, "its first saves")
        began, end = time.time(), time.time() + 60 * minutes
        assert subject.command is not None
        following = began + draw.expovariate(1 / mtbf_s)
        while time.time() < end:
            if subject.command.poll() is not None:
                raise Broken(f"ended with {subject.command.returncode} after {len(kills)} kills: {subject.tail()}")
            if time.time() >= following:
                ranks = subject.ranks()
                if ranks:  # else it is between two starts, where there is nobody to kill: the next moment is drawn from here
                    subject.signal(ranks[draw.choice(sorted(ranks))], signal.SIGKILL)
                    kills.append(time.time())
                following = time.time() + draw.expovariate(1 / mtbf_s)
            time.sleep(0.01)
        over = time.time()
        subject.end()
        return compared(subject.folder, kills, began, over, engine=engine.name, seed=seed, mtbf_s=mtbf_s)


def compared(folder: Path, kills: list[float], began: float, over: float, *, engine: str, seed: int, mtbf_s: float) -> Compared:
    """What a killed run's files say, beside the simulator."""
    events = [event for event in jsonl(folder / "logs" / "progress.jsonl") if event["time_s"] <= over]
    noticed = [event["time_s"] for event in jsonl(folder / "logs" / "restarts.jsonl") if event["event"] == "ended"]
    trains = [event["time_s"] for event in events if event["event"] == "steps"]
    wall_s = over - began
    seconds, steps = _kept(events, began)
    faults, detects, restarts = [], [], []
    for at in kills:
        resumed = next((time_s for time_s in trains if time_s > at), over)
        seen = next((time_s for time_s in noticed if at - 0.1 <= time_s <= resumed), at)
        detect_s = max(0.0, seen - at)
        faults.append(Fault(at - began, detect_s, max(0.0, resumed - at - detect_s)))
        detects.append(faults[-1].detect_s)
        restarts.append(faults[-1].restart_s)
    saved = [event for event in events if event["event"] == "saved"]
    saves = [event.get("seconds", {}).get("checkpoint", 0.0) for event in events if event["event"] != "steps"]
    done, ran_s = _done(events)
    step_s = (ran_s - sum(saves)) / max(1, done)
    stall_s = sum(saves) / max(1, len(saved) or sum(spent > 0 for spent in saves))
    lag_s = statistics.median([event["save_s"] for event in saved if event.get("save_s") is not None] or [0.0])
    measured_saves = Saves(far_s=EVERY * step_s, far_stall_s=stall_s, far_lag_s=lag_s)
    again = replay(faults, wall_s, measured_saves)
    drawn = [
        replay(poisson(mtbf_s, wall_s, detects or [0.0], restarts or [0.0], number), wall_s, measured_saves).share
        for number in range(DRAWS)
    ]
    return Compared(
        engine, seed, mtbf_s, wall_s, len(kills), steps, steps * step_s / wall_s, again.share, statistics.mean(drawn), statistics.pstdev(drawn),
        statistics.median(detects or [0.0]), statistics.median(restarts or [0.0]), step_s, stall_s, lag_s,
        {name: spent / wall_s for name, spent in seconds.items()},
    )  # fmt: skip


def _kept(events: list[dict[str, Any]], began: float) -> tuple[dict[str, float], int]:
    """Seconds by class from `began` on, by the one reader that watch and report have, and steps that were kept."""
    whole, head = (classes(part) for part in (events, [event for event in events if event["time_s"] <= began]))
    last = next((event["step"] for event in reversed(events) if event["event"] == "report"), 0)
    first = next((event["step"] for event in reversed(events) if event["event"] == "report" and event["time_s"] <= began), 0)
    return {name: max(0.0, spent - head.get(name, 0.0)) for name, spent in whole.items()}, last - first


def _done(events: list[dict[str, Any]]) -> tuple[int, float]:
    """Steps that were done, those that were done again included, and the wall-clock that they took, from report to report."""
    at, before_s, done, ran_s = 0, 0.0, 0, 0.0
    for event in events:
        if event["event"] == "steps":
            at, before_s = event["step"], event["time_s"]
        elif event["event"] == "report":
            done, ran_s = done + event["step"] - at, ran_s + event["time_s"] - before_s
            at, before_s = event["step"], event["time_s"]
    return done, ran_s


def text(found: Compared) -> str:
    """As JSON."""
    return json.dumps(asdict(found), indent=1)
