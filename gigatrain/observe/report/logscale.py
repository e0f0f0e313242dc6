"""Pictures with an axis in decades: rooflines and scaling curves, in the frame and the classes of curves.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gigatrain.observe.report.curves import DASHES, TONES, apart
from gigatrain.observe.report.curves import ticks as even
from gigatrain.observe.report.parts import Shown, svg
from gigatrain.observe.report.words import escaped, exact, number

MOST = 6.0  # decades of an axis; what lies further below is drawn at its foot, and the numbers behind the picture say what it is
CLOSE = 3.2  # decades: fewer have ticks at 2 and 5 too


@dataclass(frozen=True)
class Line:
    """Points (x, y), each above 0 where its axis is of decades; `dashed` of what is only a comparison."""

    name: str
    points: Sequence[tuple[float, float]]
    at: int = 0
    dashed: bool = False
    last: str = ""  # beside its name, at its end


@dataclass(frozen=True)
class Dot:
    """A mark of `size` pixels; a name that would cover another's is left to the table behind."""

    name: str
    x: float
    y: float
    size: float = 8.0
    at: int = 0


@dataclass(frozen=True)
class Scales:
    """Both axes: x is of decades, y too unless `percent`, which runs from 0 to 1."""

    x_label: str
    y_label: str
    percent: bool = False
    x_shown: Shown = exact
    y_shown: Shown = number


def decades(low: float, high: float) -> list[float]:
    """Round numbers that hold both, each decade's 1, and 2 and 5 where there is room."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    factors = (1.0, 2.0, 5.0) if math.log10(high / low) < CLOSE / 2 else (1.0,)
    found = [factor * 10.0**power for power in range(first, max(last, first + 1) + 1) for factor in factors]
    lower = [one for one in found if one <= low * 1.0001]
    upper = [one for one in found if one >= high * 0.9999]
    return [one for one in found if lower[-1] <= one <= upper[0]]


def chart(title: str, lines: Sequence[Line], dots: Sequence[Dot], scales: Scales, *, wide: bool = False) -> str:
    """The picture alone; a card and the numbers behind it are the caller's. `wide`: it has a page's width."""
    every = [point for line in lines for point in line.points] + [(dot.x, dot.y) for dot in dots]
    xs = [x for x, _ in every]
    across = decades(min(xs), max(xs))
    most = max(y for _, y in every)
    up = even(0.0, 1.0, 5) if scales.percent else decades(max(min(y for _, y in every), most / 10**MOST), most)
    begin, end = math.log10(min(xs) if not dots else across[0]), math.log10(max(xs) if not dots else across[-1])
    low, high = (0.0, 1.0) if scales.percent else (math.log10(up[0]), math.log10(up[-1]))

    def place(x: float, y: float) -> tuple[float, float]:
        height = y if scales.percent else math.log10(max(y, up[0]))
        return 1000 * (math.log10(x) - begin) / ((end - begin) or 1.0), 1000 - 1000 * (height - low) / ((high - low) or 1.0)

    bottom = 0.0 if scales.percent else up[0]
    grid = "".join(f"<path class={'axis' if at == 0 else 'grid'} d='M0 {place(xs[0], tick)[1]:.5g}h1000'/>" for at, tick in enumerate(up))
    drawn, labels = [], []
    for line in lines:
        tone, dash = line.at % TONES, line.at % DASHES
        path = "L".join(f"{x:.5g} {y:.5g}" for x, y in (place(*point) for point in line.points))
        kind = "plan" if line.dashed else f"cv c{tone} d{dash}"
        drawn.append(f"<path class='{kind}' d='M{path}{'h.01' * (len(line.points) == 1)}'><title>{escaped(line.name)}</title></path>")
        labels.append((place(*line.points[-1])[1] / 10, line.name, line.last, "xp" if line.dashed else f"x{tone}"))
    words = [f"<span class=ty style='top:{place(xs[0], tick)[1] / 10:.4g}%'>{escaped(scales.y_shown(tick))}</span>" for tick in up]
    shown = [tick for tick in across if begin - 1e-9 <= math.log10(tick) <= end + 1e-9]
    words += [
        f"<span class=tx style='left:{place(tick, bottom or 1.0)[0] / 10:.4g}%'>{escaped(scales.x_shown(tick))}</span>" for tick in shown
    ]
    words.append(f"<span class=xl>{escaped(scales.x_label)}</span><span class=yl>{escaped(scales.y_label)}</span>")
    places: list[tuple[Dot, float, float]] = []
    for dot in dots:
        left, top = place(dot.x, dot.y)
        places.append((dot, left / 10, top / 10))
        drawn.append(
            f"<path class='dot c{dot.at % TONES}' style='stroke-width:{dot.size:.3g}px' d='M{left:.5g} {top:.5g}h.01'>"
            f"<title>{escaped(dot.name)}</title></path>"
        )
    words += _named(places)
    for top, (_, name, last, kind) in zip(apart([top for top, *_ in labels], 13.0), labels, strict=True):
        words.append(
            f"<span class='end {kind}' style='top:{top:.4g}%'>{escaped(name, 40)}{f' <b>{escaped(last)}</b>' if last else ''}</span>"
        )
    spoken = [f"{line.name}: from {scales.y_shown(line.points[0][1])} to {scales.y_shown(line.points[-1][1])}" for line in lines]
    spoken += [f"{dot.name}: {scales.y_shown(dot.y)} at {scales.x_shown(dot.x)}" for dot in dots[:8]]
    picture = svg(f"{title}: {scales.y_label} over {scales.x_label}. {'; '.join(spoken)}", grid + "".join(drawn))
    kind = "'chart tall'" if wide else "chart"
    return f"<div class={kind}>{picture}<div aria-hidden=true>{''.join(words)}</div></div>"


# Room of a name, in per cent of a picture of a page's width and of a telephone's: a character, and what is round it.
_WIDE, _NARROW = (0.68, 2.4, 4.6), (3.3, 7.0, 7.5)
_SIDES = (
    (0.0, 0.0, "dr"),
    (-1.0, 0.0, "dl"),
    (-0.5, -1.6, "du"),
    (-0.5, 1.6, "dd"),
)  # where a name stands: its share to the left, lines down, class


def _named(places: Sequence[tuple[Dot, float, float]]) -> list[str]:
    """Names of dots, each where it covers no other name and no dot; of what a telephone has no room for the class says so."""
    found, taken = [], {room: [(left, left, top) for _, left, top in places] for room in (_WIDE, _NARROW)}

    def free(room: tuple[float, float, float], box: tuple[float, float, float]) -> bool:
        begin, end, top = box
        return (
            begin > -3
            and end < 101
            and not any(abs(top - other) < room[2] and begin < to and start < end for start, to, other in taken[room])
        )

    for dot, left, top in places:
        for share, down, kind in _SIDES:
            boxes = []
            for each, round_, tall in (_WIDE, _NARROW):
                wide = round_ + each * len(dot.name)
                begin = left + share * wide + (round_ / 4 if not share else -round_ / 4 if share == -1 else 0.0)
                boxes.append((begin, begin + wide, top + down * tall))
            if free(_WIDE, boxes[0]):
                fits = free(_NARROW, boxes[1])
                taken[_WIDE].append(boxes[0])
                if fits:
                    taken[_NARROW].append(boxes[1])
                place = f"left:{left:.4g}%;top:{top:.4g}%;--off:{dot.size / 2 + 3:.3g}px"
                found.append(f"<span class='dn {kind}{'' if fits else ' roomy'}' style='{place}'>{escaped(dot.name, 40)}</span>")
                break
    return found
