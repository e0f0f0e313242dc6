"""What a plan expects, in lines for a terminal; each number with its interval. Free of torch."""

from collections.abc import Callable, Iterator

from gigatrain.errors import PlanError
from gigatrain.planning import budget
from gigatrain.planning.expect import Prospect
from gigatrain.planning.expected import Expected, Range

LEAST = 0.3  # goodput below which a plan says that it hardly goes on


def expected(found: Expected) -> list[str]:
    """A few lines: speed, memory, power, goodput, and what the run takes in days, MWh, euros and tCO2; what is unknown, and why."""
    return [f"  {name:8} {text}" for name, text in _expected(found)]


def _expected(found: Expected) -> Iterator[tuple[str, str]]:
    if found.step_s is not None and found.tokens_per_s is not None and found.tokens_per_s_per_rank is not None:
        mfu = f"; MFU {100 * found.mfu:.0f} % of the dense bf16 rate" if found.mfu is not None else ""
        yield (
            "speed",
            f"{ranged(found.step_s, seconds)} a step, {ranged(found.tokens_per_s, count)} tokens/s, {ranged(found.tokens_per_s_per_rank, count)} a rank{mfu}",
        )
        yield "", f"limited by {found.limits}"
    if found.memory_bytes is not None:
        yield "peak", f"{ranged(found.memory_bytes, gib)} of a rank's memory"
    if found.watts:
        drawn = ", ".join(f"{name} {ranged(one, budget.shown)}" for name, one in found.watts.items())
        ramp = f"; ramps of {budget.shown(found.ramp_watts)} at IT within a step" if found.ramp_watts else ""
        peak = f"; at most {budget.shown(list(found.peak_watts.values())[-1])} ({list(found.peak_watts)[-1]})" if found.peak_watts else ""
        yield "draws", f"{drawn}{peak}{ramp}"
    if found.goodput is not None:
        lost = ", ".join(
            f"{name} {100 * share:.1f}" for name, share in sorted(found.lost.items(), key=lambda one: -one[1]) if share >= 5e-4
        )
        best = f"; best saved every {found.checkpoint_every:,} steps" if found.checkpoint_every else ""
        near = f", near folders every {found.near_every:,}" if found.near_every else ""
        yield "goodput", f"{ranged(found.goodput, percent)} %; lost: {lost or 'nothing'}{best}{near}"
        if found.goodput.mid < LEAST:
            yield (
                "",
                "it hardly goes on: failures are nearly as close as restarts are long; fewer ranks, or replicas that go on when one is lost",
            )
    if found.days is not None:
        costs = [f"{ranged(found.days, count)} days"]
        costs += [
            f"{ranged(one, count)} {unit}"
            for one, unit in ((found.mwh, "MWh"), (found.eur, "EUR of energy"), (found.tco2, "tCO2"))
            if one is not None
        ]
        yield "takes", ", ".join(costs)
    if found.tokens_per_s_mw is not None:
        yield "per MW", f"{ranged(found.tokens_per_s_mw, count)} retained tokens/s at the facility"
    for text in found.outside:
        yield "outside", f"what was calibrated: {text}"
    if "step_s" in found.unknown:
        yield "speed", f"unknown: {found.unknown['step_s']}"
    reasons: dict[str, list[str]] = {}
    for name, why in found.unknown.items():
        if name != "step_s":
            reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        yield "unknown", f"{', '.join(names)}: {why}"


def strict(found: Expected, asked: bool) -> None:
    """Raise PlanError where `--strict` was asked for and the case is outside of what was calibrated."""
    if asked and "step_s" in found.unknown:
        raise PlanError(f"nothing is known of its speed: {found.unknown['step_s']}")
    if asked and found.outside:
        raise PlanError(
            f"outside of what was calibrated: {'; '.join(found.outside)}; without --strict the intervals are wider and the plan says so"
        )


def explained(found: Prospect) -> list[str]:
    """The arithmetic behind them: seconds by phase, bytes by part and pipeline rank, watts by what a device does, goodput's sensitivities, assumptions."""
    return [f"  {name:8} {text}" for name, text in _explained(found)]


def _explained(found: Prospect) -> Iterator[tuple[str, str]]:
    estimate, drawn, kept = found.estimate, found.draw, found.goodput
    if estimate is None or drawn is None or kept is None:
        return
    for name, spent in sorted(estimate.phases.items(), key=lambda one: -one[1]):
        if spent > 0:
            yield "phase", f"{name.replace('_', ' '):18} {seconds(spent):>9}  {100 * spent / estimate.step_s:5.1f} %"
    for rank, held in enumerate(estimate.memory_by_rank):
        if len(estimate.memory_by_rank) <= 8 or rank in (0, len(estimate.memory_by_rank) - 1):
            whose = "every rank" if len(estimate.memory_by_rank) == 1 else f"stage {rank}"
            yield (
                "held",
                f"{whose:10} {gib(sum(held.values()))}: {', '.join(f'{name} {gib(size)}' for name, size in held.items() if size > 2**20)}",
            )
    for name, watts in drawn.states.items():
        yield "device", f"{watts:5,.0f} W while it does {name}"
    for name, figure in (("nameplate", drawn.nameplate), ("typical", drawn.typical), ("cap", drawn.cap), ("total", drawn.total)):
        if figure.value is not None:
            yield "power", f"{name} {budget.shown(figure.value)}; {figure.basis}: {figure.source}"
    for source in drawn.sources:
        yield "power", source
    for line in kept.table:
        yield "goodput", line.removeprefix("goodput ")
    for text in found.expected.assumed:
        yield "assumes", text


def ranged(one: Range, shown: Callable[[float], str]) -> str:
    """`12.3 (10.1 to 15.0)`."""
    return f"{shown(one.mid)} ({shown(one.low)} to {shown(one.high)})"


def seconds(value: float) -> str:
    """`84.1 s` or `93.2 ms`."""
    return f"{value:,.1f} s" if value >= 10 else f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def count(value: float) -> str:
    """Three digits: `199,600`, `779.7`, `4.16e+18`."""
    if value >= 1e15:
        return f"{value:.2e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def gib(value: float) -> str:
    return f"{value / 2**30:,.2f} GiB"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"
