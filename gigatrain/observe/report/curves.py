"""Curves and areas: SVG that is stretched to its place, and over it, as HTML, axes and names in type that keeps its size. No numbers but those given."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gigatrain.observe.report.parts import Shown, cell, figure, head, lacking, svg, table
from gigatrain.observe.report.words import escaped, exact, number

TONES = 6  # colours
DASHES = 5  # patterns: 30 curves before two look alike
MARKS = 40  # restarts that are drawn
FEW = 7  # names with their last numbers that there is room for beside a picture
MANY = 16  # names alone
ROWS = 12  # of the table behind a picture

Points = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Curve:
    """Points (x, y); one without y parts it. `label` stands at its end, before its last number."""

    name: str
    points: Points
    at: int = 0  # its colour and pattern
    label: str | None = None
    dots: bool = False

    @property
    def heights(self) -> list[float]:
        return [y for x, y in self.points if x is not None and y is not None]

    def spoken(self, shown: Shown) -> str:
        ys = self.heights
        return f"{self.name}: from {shown(ys[0])} to {shown(ys[-1])}, lowest {shown(min(ys))}, highest {shown(max(ys))}"


@dataclass(frozen=True)
class Axes:
    """What curves share."""

    x_label: str
    shown: Shown = number
    tick: Shown = exact
    x_shown: Shown = exact
    zero: bool = False  # the y axis begins at 0
    marks: Sequence[float] = ()  # where the run was restarted
    gaps: Sequence[tuple[float, float]] = ()  # where nothing was read
    planned: float | None = None
    planned_text: str = ""
    limit: Points = ()  # what was allowed, by x
    limit_text: str = "limit"

    @property
    def allowed(self) -> list[float]:
        return [y for _, y in self.limit if y is not None]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that hold both between the first and the last."""
    if not high - low > 1e-9 * max(abs(low), abs(high), 1e-290):  # nothing lies between two neighbouring numbers
        low, high = low - (abs(low) * 0.05 or 0.5), low + (abs(low) * 0.05 or 0.5)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [at * step for at in range(first, max(last, first + 1) + 1)]


def apart(heights: Sequence[float], least: float = 9.0) -> list[float]:
    """Places of labels, in per cent from above, moved as little as keeps them from covering each other."""
    order = sorted(range(len(heights)), key=lambda at: heights[at])
    placed = list(heights)
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + least)
    limit = 100.0
    for at in reversed(order):
        placed[at] = min(placed[at], limit)
        limit = placed[at] - least
    return placed


def lines(tag: str, title: str, text: str, curves: Sequence[Curve], axes: Axes, empty: str) -> str:
    """A card with curves, each with its name and last number at its end; `empty` says why there is none."""
    curves = [curve for curve in curves if curve.heights]
    if not curves:
        return lacking(tag, title, empty)
    xs = [x for curve in curves for x, y in curve.points if x is not None and y is not None]
    ys = [y for curve in curves for y in curve.heights] + ([axes.planned] if axes.planned is not None else [])
    steps = ticks(min(0.0, *ys) if axes.zero else min(ys), max(ys))
    begin, end = (0.0 if 0 < min(xs) < 0.2 * max(xs) else min(xs)), max(xs)
    place = placing(begin, end, steps)
    drawn, labels = [], []
    for curve in curves:
        tone, dash = curve.at % TONES, curve.at % DASHES
        drawn.append(f"<path class='cv c{tone} d{dash}' d='{_path(curve.points, place)}'><title>{escaped(curve.name)}</title></path>")
        if curve.dots and len(curve.points) <= 60:
            places = [place(x, y) for x, y in curve.points if x is not None and y is not None]
            drawn.append(f"<path class='dot c{tone}' d='{''.join(f'M{left:.5g} {top:.5g}h.01' for left, top in places)}'/>")
        said = curve.name if curve.label is None else curve.label
        labels.append((place(end, curve.heights[-1])[1] / 10, said, axes.shown(curve.heights[-1]), f"x{tone}"))
    return figure(tag, title, text, framed(title, curves, axes, (begin, end), steps, drawn, labels), _numbers(title, curves, axes))


def layers(
    tag: str, title: str, text: str, times: Sequence[float | None], heights: Sequence[tuple[str, str, Sequence[float | None]]], axes: Axes
) -> str:
    """A card of areas upon each other: `heights` of (the layer's name, what the sum up to it is called, that sum), innermost first."""
    end = max(one for one in times if one is not None)
    outer = [one for one in heights[-1][2] if one is not None]
    steps = ticks(0.0, max([*outer, *([axes.planned] if axes.planned is not None else []), *axes.allowed]))
    place = placing(0.0, end, steps)
    drawn, labels, below = [], [], [0.0 if one is not None else None for one in times]
    for tone, (name, _, sums) in enumerate(heights):
        path, top, bottom = [], [], []
        for time, low, high in zip([*times, None], [*below, None], [*sums, None], strict=True):
            if time is not None and high is not None:
                top.append(place(time, max(high, low or 0.0)))
                bottom.append(place(time, low or 0.0))
                continue
            if len(top) > 1:
                path.append("M" + "L".join(f"{x:.5g} {y:.5g}" for x, y in (*top, *reversed(bottom))) + "Z")
            top, bottom = [], []
        drawn.append(f"<path class='area f{tone}' d='{''.join(path)}'><title>{escaped(name)}</title></path>")
        low, high = next((low or 0.0, high) for low, high in zip(reversed(below), reversed(sums), strict=True) if high is not None)
        labels.append((place(0.0, (low + high) / 2)[1] / 10, name, axes.shown(max(0.0, high - low)), f"x{tone}"))
        below = [high if high is not None else low for low, high in zip(below, sums, strict=True)]
    curves = [Curve(called, list(zip(times, sums, strict=True))) for _, called, sums in heights]
    labels.reverse()  # as they lie: of labels of one height the outermost stands above
    return figure(tag, title, text, framed(title, curves, axes, (0.0, end), steps, drawn, labels), _numbers(title, curves, axes))


def placing(begin: float, end: float, steps: Sequence[float]) -> Callable[[float, float], tuple[float, float]]:
    """From a point to its place in 1,000 by 1,000, y from above."""
    wide, low, high = end - begin or 1.0, steps[0], steps[-1]
    return lambda x, y: (1000 * (x - begin) / wide, 1000 - 1000 * (y - low) / (high - low))


def framed(
    title: str,
    curves: Sequence[Curve],
    axes: Axes,
    x: tuple[float, float],
    steps: Sequence[float],
    drawn: Sequence[str],
    labels: Sequence[tuple[float, str, str, str]],
) -> str:
    """Axes, names and marks about what is drawn; `labels`: per cent from above, name, number, class."""
    begin, end = x
    place = placing(begin, end, steps)
    grid = "".join(
        f"<path class={'axis' if at == 0 else 'grid'} d='M0 {place(begin, tick)[1]:.5g}h1000'/>" for at, tick in enumerate(steps)
    )
    words = [f"<span class=ty style='top:{place(begin, tick)[1] / 10:.4g}%'>{escaped(axes.tick(tick))}</span>" for tick in steps]

    def left(at: float) -> str:
        return f"left:{place(at, steps[0])[0] / 10:.4g}%"

    slack = 1e-6 * (end - begin)
    across = [tick for tick in ticks(begin, end) if begin - slack <= tick <= end + slack]
    words += [f"<span class=tx style='{left(tick)}'>{escaped(axes.x_shown(tick))}</span>" for tick in across]
    words.append(f"<span class=xl>{escaped(axes.x_label)}</span>")
    for gap, over in axes.gaps:
        share = 100 * (over - gap) / (end - begin or 1.0)
        words.append(f"<span class=gap style='{left(gap)};width:{share:.4g}%'>{'no reading' if share > 18 else ''}</span>")
    words += [f"<span class=mark-restart style='{left(at)}'><i>↻</i></span>" for at in axes.marks[:MARKS] if begin <= at <= end]
    inside = [*drawn]
    named = [*labels]
    if axes.planned is not None:
        top = place(begin, axes.planned)[1]
        inside.append(f"<path class=plan d='M0 {top:.5g}h1000'/>")
        named.append((top / 10, axes.planned_text, axes.shown(axes.planned), "xp"))
    if axes.allowed:
        shown = [(min(max(x, begin), end), y) for x, y in axes.limit if x is not None]
        inside.append(
            f"<path class=halo d='{_path(shown, place)}'/><path class=limit d='{_path(shown, place)}'><title>{escaped(axes.limit_text)}</title></path>"
        )
        named.append((place(begin, axes.allowed[-1])[1] / 10, axes.limit_text, axes.shown(axes.allowed[-1]), "xl5"))
    few = len(named) <= FEW
    for top, (_, name, last, kind) in zip(apart([top for top, *_ in named], 13.0 if few else 6.0), named, strict=True):
        if len(named) <= MANY:  # more have no room: the key above and the table behind have them
            words.append(
                f"<span class='end {kind}' style='top:{top:.4g}%'>{escaped(name, 40)}{f' <b>{escaped(last)}</b>' if few else ''}</span>"
            )
    said = "; ".join(curve.spoken(axes.shown) for curve in curves)
    extra = f"; {axes.planned_text} {axes.shown(axes.planned)}" if axes.planned is not None else ""
    if axes.allowed:
        levels = sorted({axes.shown(one) for one in (min(axes.allowed), max(axes.allowed))})
        extra += f"; {axes.limit_text} {' to '.join(levels)}"
    extra += f"; {len(axes.gaps)} gaps without a reading" if axes.gaps else ""
    picture = svg(f"{title} over {axes.x_label}. {said}{extra}", grid + "".join(inside))
    return f"<div class=chart>{picture}<div aria-hidden=true>{''.join(words)}</div></div>"


def histogram(label: str, low: float, high: float, counts: Sequence[int], marks: Sequence[tuple[str, float]], x_label: str) -> str:
    """Bars over a range, and named places in it."""
    steps = ticks(0.0, float(max(counts)))
    place, width = placing(low, high, steps), 1000 / len(counts)
    bars = [(at * width, 1000 * count / steps[-1]) for at, count in enumerate(counts) if count]
    drawn = [f"<rect class=f0 x='{x + 0.8:.5g}' y='{1000 - tall:.5g}' width='{width - 1.6:.5g}' height='{tall:.5g}'/>" for x, tall in bars]
    drawn += [f"<path class=plan d='M{place(at, 0.0)[0]:.5g} 0v1000'/>" for _, at in marks]
    grid = "".join(f"<path class={'axis' if at == 0 else 'grid'} d='M0 {place(low, tick)[1]:.5g}h1000'/>" for at, tick in enumerate(steps))
    words = [f"<span class=ty style='top:{place(low, tick)[1] / 10:.4g}%'>{escaped(exact(tick))}</span>" for tick in steps]
    across = [tick for tick in ticks(low, high) if low <= tick <= high]
    words += [f"<span class=tx style='left:{place(tick, 0.0)[0] / 10:.4g}%'>{escaped(exact(tick))}</span>" for tick in across]
    words.append(f"<span class=xl>{escaped(x_label)}</span>")
    lefts = [place(at, 0.0)[0] / 10 for _, at in marks]
    for at in range(1, len(lefts)):
        lefts[at] = max(lefts[at], lefts[at - 1] + 9.0)
    words += [
        f"<span class=named style='left:{min(at, 97.0):.4g}%'>{escaped(name)}</span>" for (name, _), at in zip(marks, lefts, strict=True)
    ]
    return f"<div class='chart bare'>{svg(label, grid + ''.join(drawn))}<div aria-hidden=true>{''.join(words)}</div></div>"


def gaps(times: Sequence[float | None]) -> list[tuple[float, float]]:
    """Where a None parts the times: from when until when."""
    found = []
    for before, here, after in zip(times, times[1:], times[2:], strict=False):
        if here is None and before is not None and after is not None:
            found.append((before, after))
    return found


def _path(points: Points, place: Callable[[float, float], tuple[float, float]]) -> str:
    """A point that stands alone is a dot."""
    found, pen = [], False
    for at, (x, y) in enumerate(points):
        if x is None or y is None:
            pen = False
            continue
        left, top = place(x, y)
        found.append(f"{'L' if pen else 'M'}{left:.5g} {top:.5g}")
        if not pen and (at + 1 == len(points) or points[at + 1][1] is None):
            found.append("h.01")
        pen = True
    return "".join(found)


def _numbers(title: str, curves: Sequence[Curve], axes: Axes) -> str:
    """A dozen points of each curve as a table: what the picture says, for who does not see it."""
    rows = []
    for curve in curves:
        points = [(x, y) for x, y in curve.points if x is not None and y is not None]
        some = points if len(points) <= ROWS else [points[round(at * (len(points) - 1) / (ROWS - 1))] for at in range(ROWS)]
        rows += [f"{head(curve.label or curve.name)}{cell(axes.x_shown(x))}{cell(axes.shown(y))}" for x, y in some]
    return f"<details><summary>Numbers of this picture</summary>{table(('curve', axes.x_label, title), rows, right=(1, 2))}</details>"
