"""Plan versus run: what of a run lies beyond the 90 % interval that its plan expected, since when, and what most likely holds it there. Pure.

A window is a mapping; observe/beside.py makes them from a run's folder, and what it does not know is absent:

    step, step_s, tokens_per_s     the row of metrics.jsonl
    process                        of the run, as in logs/progress.jsonl: each one's first windows are not judged
    spent                          seconds of the window by class: training, validation, checkpoint, paced
    phases                         seconds of a step by rank 0's trace: data, forward, backward, reduce, optimizer, rest
    watts                          mean of the window by boundary, of the whole run, where meters counted most of it
    capped_share, thermal_share    of the accelerators' time, at their power limit and held down by heat
    cap_share                      limit that the run's own power budget ordered, over the most
    peak_bytes, reserved_bytes     of rank 0, allocated and taken from the device
    goodput                        {"wall_s", "share", "seconds": {class: s}} of the run until then
    slowest                        {"rank", "node", "own_s", "median_s"}: the rank that waits least for others

A cause is a rule's finding on the same windows, never more: where nothing else moved, that is what is said.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from gigatrain.planning.expected import Expected, Range

FIRST = 2  # windows of a process that are not judged: compilers, allocators and caches warm up, and clocks settle
ROW = 3  # windows beyond the interval, one after the other, before it is a drift
USUAL = 50  # windows within the interval, the last before it was left, that say what is usual
GOODPUT_S = 1800.0  # of wall-clock, before a share of it says anything: a start is most of a young run
CAPPED = 0.10  # more of the time at the power limit than in the windows before
CAPPED_ALONE = 0.50  # of the time, where no windows before say what is usual
HOT = 0.05  # of the time held down by heat
SLOW_RANK = 1.15  # of the ranks' median
PART = 0.35  # of what a step takes too long, that one phase must have taken to be named
TRAINED = 0.90  # of a window's time: with saves and validations in it, its watts are not those of training
FRAGMENTED = 1.20  # bytes taken from the device over bytes allocated
LOST = {  # a plan's words for lost time, of observe/goodput.py
    "checkpoint": ("checkpoint",),
    "redone": ("redone", "rework", "lost_work"),
    "starting": ("restart", "start", "starting"),
    "restore": ("load", "restore"),
    "stopped": ("detection", "wait", "repair", "stopped"),
    "validation": ("validation",),
    "paced": ("paced", "budget"),
}
COMPUTE = ("gemm", "grouped", "attention", "memory", "launch", "bubble")  # of Expected.phases: what a trace has as forward and backward
REDUCED = ("shard", "replicate")  # exposed transfers that the phase reduce holds, where the engine waits for them itself
BOUNDARIES = ("device", "node", "it", "facility")
CALIBRATE = "gigatrain plan --calibrate RUN refits the plan's constants on what this run measured"

Window = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Drift:
    """One figure beyond its interval. `ratio` of the middle; `since` the first step of the windows beyond it; `lasts`: the newest window is one of them."""

    what: str  # step | tokens/s | memory | watts, device | ... | goodput
    unit: str  # s | tokens/s | bytes | W | share
    expected: Range
    seen: float
    ratio: float
    cause: str
    advice: str
    since: int | None = None
    until: int | None = None
    windows: int = 1
    lasts: bool = True

    @property
    def words(self) -> str:
        """One sentence: `step 1.42 s, planned 0.98 to 1.10 s (+37 %), since step 400: data ...; do this`."""
        low, seen, high = (amount(one, self.unit) for one in (self.expected.low, self.seen, self.expected.high))
        when = "" if self.since is None else f", since step {self.since:,}" if self.lasts else f", steps {self.since:,} to {self.until:,}"
        return f"{self.what} {seen}, planned {low} to {high} ({self.ratio - 1:+.0%}){when}: {self.cause}; {self.advice}".replace(
            "%)", " %)"
        )


def amount(value: float, unit: str) -> str:
    """A figure for a reader, with its unit."""
    if unit == "s":
        return f"{value * 1e3:,.3g} ms" if value < 1 else f"{value:,.2f} s"
    if unit == "bytes":
        return f"{value / 2**30:,.2f} GiB"
    if unit == "share":
        return f"{value * 100:.1f} %"
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:,.3g} {letter}{unit}" if unit == "W" else f"{value:,.0f}"
    return f"{value:,.3g} {unit}" if unit == "W" else f"{value:,.3g}"


def drift(expected: Expected, windows: Sequence[Window], *, past: bool = False) -> tuple[Drift, ...]:
    """What lies beyond `expected`, in the newest windows; with `past` also what did and no longer does. Windows in their order."""
    judged = list(_judged(windows))
    found = [*_steps(expected, judged), *_memory(expected, windows), *_watts(expected, judged), *_goodput(expected, windows)]
    return tuple(one for one in found if one.lasts or past)


def _judged(windows: Sequence[Window]) -> Iterable[Window]:
    """Without the first ones of each process."""
    count, process = 0, object()
    for window in windows:
        if window.get("process") != process:
            count, process = 0, window.get("process")
        count += 1
        if count > FIRST:
            yield window


@dataclass(frozen=True, slots=True)
class _Streak:
    """Windows beyond one end of an interval, one after the other, and those within it before."""

    windows: list[Window]
    before: list[Window]
    seen: float
    above: bool
    lasts: bool

    def mean(self, key: str) -> float | None:
        return _mean(self.windows, lambda window: window.get(key))

    def usual(self, key: str) -> float | None:
        return _mean(self.before, lambda window: window.get(key))

    def of(self, what: str, unit: str, expected: Range, cause: str, advice: str) -> Drift:
        first, last = self.windows[0].get("step"), self.windows[-1].get("step")
        ratio = self.seen / expected.mid if expected.mid else float("inf")
        return Drift(what, unit, expected, self.seen, ratio, cause, advice, first, last, len(self.windows), self.lasts)


def _streaks(windows: Sequence[Window], expected: Range, pick: Callable[[Window], Any], least: int = ROW) -> list[_Streak]:
    known = [(window, value) for window in windows if (value := _number(pick(window))) is not None]
    found: list[_Streak] = []
    within: list[Window] = []
    run: list[tuple[Window, float]] = []
    side = 0

    def close(lasts: bool) -> None:
        if side and len(run) >= least:
            found.append(_Streak([one for one, _ in run], within[-USUAL:], median(value for _, value in run), side > 0, lasts))

    for window, value in known:
        now = 1 if value > expected.high else -1 if value < expected.low else 0
        if now != side:
            close(False)
            run, side = [], now
        (run.append((window, value)) if now else within.append(window))
    close(True)
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100 else None


def _mean(windows: Sequence[Window], pick: Callable[[Window], Any]) -> float | None:
    values = [number for window in windows if (number := _number(pick(window))) is not None]
    return fmean(values) if values else None


# ---- Seconds of a step ----


def _steps(expected: Expected, windows: Sequence[Window]) -> list[Drift]:
    if expected.step_s is not None:
        streaks = _streaks(windows, expected.step_s, lambda window: window.get("step_s"))
        return [one.of("step", "s", expected.step_s, *_slow_or_fast(expected, one, one.above)) for one in streaks]
    if expected.tokens_per_s is not None:  # the same figure the other way round
        streaks = _streaks(windows, expected.tokens_per_s, lambda window: window.get("tokens_per_s"))
        return [one.of("tokens/s", "tokens/s", expected.tokens_per_s, *_slow_or_fast(expected, one, not one.above)) for one in streaks]
    return []


def _slow_or_fast(expected: Expected, streak: _Streak, slow: bool) -> tuple[str, str]:
    if not slow:
        return "faster than the plan holds possible for this layout", CALIBRATE
    return _slow(expected, streak)


def _slow(expected: Expected, streak: _Streak) -> tuple[str, str]:
    """Cause and advice of steps that take too long: waits for a power budget, else which phase grew, then what explains that phase."""
    if found := _paced(expected, streak):
        return found
    now, usual, own = _phases(streak.windows), _phases(streak.before), bool(_phases(streak.before))
    usual = usual or planned_phases(expected)
    beside = "before" if own else "planned"
    grew = {name: seconds - usual.get(name, 0.0) for name, seconds in now.items()} if now and usual else {}
    excess = sum(now.values()) - sum(usual.values()) if grew else 0.0
    most = max(grew, key=lambda name: grew[name]) if grew else None
    if most is not None and (excess <= 0 or grew[most] < PART * excess):
        most = None

    def said(name: str) -> str:
        return f"{amount(now[name], 's')} of a step, {beside} {amount(usual.get(name, 0.0), 's')}"

    if most == "data":
        return (
            f"the loader: the device waits for data {said('data')}",
            "look at the disk that data.folder is on, and at what else uses the host's processors",
        )
    if found := _held_down(streak) if most in (None, "compute") else None:
        return found
    if found := _straggler(streak):
        return found
    if most == "reduce":
        return (
            f"the fabric: the reduction between ranks is waited for {said('reduce')}",
            "look for links that are down or shared (gigatrain doctor within a job measures them), and for neighbours' traffic",
        )
    if most == "optimizer":
        return (
            f"the optimizer: {said('optimizer')}",
            "where its states are in host memory, look at the host; else profile one step (profile.steps)",
        )
    if most == "rest":
        return f"the host: between the phases lie {said('rest')}", "look for other processes on the node, or logs on a slow disk"
    if not streak.before:
        return "it has been so from the first judged windows, so the estimate may not hold for this case", CALIBRATE
    if most == "compute":
        return (
            f"forward and backward: {said('compute')}, with no power limit, heat or slow rank seen; transfers that layers wait for are within them",
            "profile one step (profile.steps) and look which products or transfers; gigatrain doctor measures both on these nodes",
        )
    if not now:
        return "unknown: there is no trace of these windows' phases", "profile.ranks and RUN/trace say which phase it is"
    return "unknown: no phase took most of it, and nothing else that is recorded moved", "profile one step (profile.steps)"


def _paced(expected: Expected, streak: _Streak) -> tuple[str, str] | None:
    """Waits before steps, which a window's step_s holds, where they are a good part of what is too long."""
    share = _mean(streak.windows, _waited)
    if expected.step_s is not None:
        behind = 1 - expected.step_s.mid / streak.seen if streak.seen else 0.0
    else:
        behind = 1 - streak.seen / expected.tokens_per_s.mid if expected.tokens_per_s is not None and expected.tokens_per_s.mid else 0.0
    if not share or share < PART * behind:
        return None
    return (
        f"power: the run waits {share:.0%} of its time before steps, to keep to its budget".replace("%", " %"),
        "as asked by power.megawatts, the schedule or what power.follow says; the plan was made without it",
    )


def _waited(window: Window) -> float | None:
    spent = window.get("spent")
    if not isinstance(spent, Mapping):
        return None
    paced, training = _number(spent.get("paced")) or 0.0, _number(spent.get("training")) or 0.0
    return paced / (paced + training) if paced + training else None


def _held_down(streak: _Streak) -> tuple[str, str] | None:
    """Clocks: by the run's own orders, by a power limit, by heat."""
    ordered = streak.mean("cap_share")
    if ordered is not None and ordered < 0.995:
        return (
            f"power: the run's own budget holds the accelerators at {ordered:.0%} of their limit".replace("%", " %"),
            "as asked: power.megawatts, the schedule, or what power.follow says; the plan was made without it",
        )
    hot, usual = streak.mean("thermal_share"), streak.usual("thermal_share")
    if hot is not None and hot >= HOT and hot >= (usual or 0.0) + HOT / 2:
        return f"heat: it holds the clocks down {hot:.0%} of the time".replace("%", " %"), "look at inlet temperature, coolant and fans"
    capped, usual = streak.mean("capped_share"), streak.usual("capped_share")
    if capped is not None and (capped >= usual + CAPPED if usual is not None else capped >= CAPPED_ALONE):
        than = f", {usual:.0%} before" if usual is not None else ""
        return (
            f"power limit: accelerators are at it {capped:.0%} of the time{than}".replace("%", " %"),
            "see whether somebody set a lower one (nvidia-smi -q -d POWER), or plan with the site's real cap",
        )
    return None


def _straggler(streak: _Streak) -> tuple[str, str] | None:
    slowest = next((one for window in reversed(streak.windows) if isinstance(one := window.get("slowest"), Mapping)), None)
    if slowest is None:
        return None
    own, usual = _number(slowest.get("own_s")), _number(slowest.get("median_s"))
    if not own or not usual or own < SLOW_RANK * usual:
        return None
    node = slowest.get("node")
    where = f"rank {slowest.get('rank')} on {node}" if node else f"rank {slowest.get('rank')}"
    return (
        f"a straggler: {where} takes {own / usual:.1f} times the ranks' median for its own part ({amount(own, 's')})",
        f"gigatrain doctor on {node or 'its node'} and exclude it if it is slow there too",
    )


def _phases(windows: Sequence[Window]) -> dict[str, float]:
    """Seconds of a step in their mean, forward and backward together as compute; empty where no window has any."""
    found: dict[str, list[float]] = {}
    count = 0
    for window in windows:
        if isinstance(phases := window.get("phases"), Mapping) and phases:
            count += 1
            for name, seconds in phases.items():
                if (number := _number(seconds)) is not None:
                    found.setdefault("compute" if name in ("forward", "backward") else str(name), []).append(number)
    return {name: sum(values) / count for name, values in found.items()}


def planned_phases(expected: Expected) -> dict[str, float]:
    """A plan's phases by a trace's names: data, compute, reduce, optimizer. Transfers that layers wait for are compute to a trace; empty: it has none."""
    if not expected.phases:
        return {}
    found = {"data": 0.0, "compute": 0.0, "reduce": 0.0, "optimizer": 0.0}
    for name, seconds in expected.phases.items():
        kind = bare(name)
        found["optimizer" if kind == "optimizer" else "reduce" if kind in REDUCED else "compute"] += seconds
    return found


def bare(phase: str) -> str:
    """The axis of an exposed transfer's phase (`exposed_tensor`), and any other phase as it is."""
    return phase.removeprefix("exposed").lstrip("_ ")


# ---- Bytes, watts and wall-clock ----


def _memory(expected: Expected, windows: Sequence[Window]) -> list[Drift]:
    """Above only: rank 0 need not be the fullest, so less says nothing."""
    if expected.memory_bytes is None:
        return []
    found = [one for one in _streaks(windows, expected.memory_bytes, lambda window: window.get("peak_bytes"), 1) if one.above][-1:]
    said = []
    for one in found:
        reserved, peak = one.mean("reserved_bytes"), one.mean("peak_bytes")
        if reserved and peak and reserved > FRAGMENTED * peak:
            cause = f"fragmentation comes on top: {amount(reserved, 'bytes')} are taken from the device"
            advice = "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or lower train.microbatch"
        else:
            cause = "activations or workspace are larger than planned"
            advice = "a lower train.microbatch or another train.recompute makes room; memory snapshots (profile.memory) say what holds it"
        said.append(one.of("memory of a rank", "bytes", expected.memory_bytes, cause, advice))
    return said


def _watts(expected: Expected, windows: Sequence[Window]) -> list[Drift]:
    """The innermost boundary that is beyond its interval, and none of those round it, which hold it."""
    trained = [window for window in windows if _trained(window) >= TRAINED]
    for name in BOUNDARIES:
        range_ = expected.watts.get(name)
        if range_ is None:
            continue
        found = _streaks(trained, range_, lambda window, name=name: (window.get("watts") or {}).get(name))
        if found:
            said = "IT" if name == "it" else name
            return [one.of(f"watts, {said}", "W", range_, *_drawn(expected, one, name)) for one in found]
    return []


def _trained(window: Window) -> float:
    spent = window.get("spent")
    seconds = [number for one in spent.values() if (number := _number(one)) is not None] if isinstance(spent, Mapping) else []
    return (_number(spent.get("training")) or 0.0) / sum(seconds) if isinstance(spent, Mapping) and sum(seconds) else 1.0


def _drawn(expected: Expected, streak: _Streak, name: str) -> tuple[str, str]:
    step_s, range_ = streak.mean("step_s"), expected.step_s
    slow = step_s is not None and range_ is not None and step_s > range_.high
    fast = step_s is not None and range_ is not None and step_s < range_.low
    if streak.above:
        if name == "device":
            if fast:
                return "steps are faster than planned, and work costs watts", CALIBRATE
            return (
                "accelerators draw more than planned at the planned speed: a limit that the plan has is not set, or their mix of work is another",
                "compare nvidia-smi -q -d POWER with the plan's cap",
            )
        if name == "node":
            return "the accelerators draw as planned: processors, fans and drives draw more", "look at fan speeds and inlet temperature"
        if name == "it":
            return "nodes draw as planned: fabric or storage draws more", "correct power.fabric_watts and power.storage_watts of the site"
        return "IT draws as planned: cooling and losses are larger", "correct power.pue of the site"
    if slow:
        return "steps are slower than planned, and who waits draws less", "see the step's own cause"
    if name == "device" and (held := _held_down(streak)):
        return held
    if name == "device":
        return "accelerators draw less than planned at the planned speed", f"there is room under the cap; {CALIBRATE}"
    return (
        f"what lies between the accelerators and the {'IT' if name == 'it' else name} draws less than planned",
        "correct the site's figures of power",
    )


def _goodput(expected: Expected, windows: Sequence[Window]) -> list[Drift]:
    """Below only, and of the run until now: one without failures yet is above as it should be."""
    said = next((one for window in reversed(windows) if isinstance(one := window.get("goodput"), Mapping)), None)
    if expected.goodput is None or said is None:
        return []
    wall_s, share = _number(said.get("wall_s")), _number(said.get("share"))
    if wall_s is None or share is None or wall_s < GOODPUT_S or share >= expected.goodput.low:
        return []
    seconds = said.get("seconds")
    known = {str(name): number / wall_s for name, one in (seconds or {}).items() if name != "training" and (number := _number(one))}
    beyond = {name: lost - sum(expected.lost.get(one, 0.0) for one in LOST.get(name, ())) for name, lost in known.items()}
    cause, advice = "unknown: its classes of time are not recorded", "look at RUN/logs/progress.jsonl"
    if beyond and (most := max(beyond, key=lambda name: beyond[name])):
        planned = known[most] - beyond[most]
        cause = f"{most} takes {amount(known[most], 'share')} of wall-clock, planned {amount(planned, 'share')}"
        every = f": the plan's best is every {expected.checkpoint_every:,} steps" if expected.checkpoint_every else ""
        advice = {
            "checkpoint": f"save less often{every}, or to a nearer tier",
            "redone": f"restarts throw steps away: save more often{every}, and find what fails",
            "starting": "a process takes long to come to its first step: corpus, compiler cache, reading of checkpoints",
            "stopped": "nobody had the run: requeueing and spare nodes decide that",
            "data": "the corpus's disk or the reader is slower than the steps",
            "compile": "kernels are made anew by each process: keep their cache on the node (launch/sites)",
            "restore": "checkpoints take long to be read: a nearer tier, or a faster disk",
            "paced": "a power budget makes it wait: as asked by power.megawatts or its schedule",
            "validation": "validate less often (validation.every), or fewer samples",
        }.get(most, "look at RUN/logs/progress.jsonl")
    last = windows[-1].get("step") if windows else None
    ratio = share / expected.goodput.mid if expected.goodput.mid else 0.0
    return [Drift("goodput", "share", expected.goodput, share, ratio, cause, advice, None, last, len(windows))]
