"""The same curves as PNG files, for slides and papers; matplotlib is loaded here and nowhere else."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gigatrain.errors import RunError
from gigatrain.observe.report.collect import letters
from gigatrain.observe.report.drawn_cards import LAYERS
from gigatrain.observe.report.palette import PALETTE
from gigatrain.observe.report.words import WITHIN, clock
from gigatrain.power.reading import BOUNDARIES

_PATTERNS: tuple[Any, ...] = ("-", (0, (5, 3)), (0, (1, 2)), (0, (6, 2, 1, 2)), (0, (10, 3)))
_TONES = [PALETTE["light"][f"t{at}"] for at in range(6)]


def plots(values: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """PNG files of what the runs have: loss, tokens/s and tokens/s/MW of all in one each, and of each run its draw, step times and goodput.

    Raises RunError where matplotlib is not installed, or there is nothing to draw.
    """
    try:
        import matplotlib as mpl
    except ImportError as missing:
        raise RunError("pictures need matplotlib: pip install 'gigatrain[bench]'") from missing
    mpl.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    several = len(values) > 1
    called = [
        _plain(f"{letter}  {value['run']['name']}" if several else "") for letter, value in zip(letters(len(values)), values, strict=True)
    ]
    scale, unit = clock(max((one for value in values for one in value["watts"]["t_s"] if one is not None), default=0.0))

    def keep(figure: Any, name: str) -> None:
        if figure is not None:
            made.append(folder / f"{name}.png")
            figure.savefig(made[-1], dpi=150)
            pyplot.close(figure)

    keep(_windows(values, called, "loss", "Loss"), "loss")
    keep(_windows(values, called, "tokens_per_s", "Tokens/s"), "tokens_per_s")
    keep(_efficiency(values, called, scale, unit), "tokens_per_s_mw")
    for letter, value in zip(letters(len(values)), values, strict=True):
        own = f"-{letter}-{re.sub('[^a-z0-9]+', '-', str(value['run']['name']).lower()).strip('-')[:40]}" if several else ""
        keep(_draw(value["watts"], scale, unit), f"watts{own}")
        keep(_steps(value["step_s"]), f"step_s{own}")
        keep(_waterfall(value["goodput"]), f"goodput{own}")
    if not made:
        raise RunError("there is nothing to draw: no window, no trace and no clock was recorded in any of these runs yet")
    return made


def _axes(title: str, x_label: str) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.0, 3.6), layout="constrained")
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=14)
    axis.set_xlabel(x_label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e2e3df")
    axis.set_axisbelow(True)
    return figure, axis


def _from_zero(axis: Any, unit: str = "") -> None:
    """Heights from 0, by thousands."""
    from matplotlib.ticker import EngFormatter

    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(EngFormatter(unit))


def _windows(values: Sequence[Mapping[str, Any]], called: Sequence[str], key: str, title: str) -> Any:
    """A curve of each run over its steps; None where none has any. The loss of a lone run has its validations beside it."""
    if not any(y is not None for value in values for _, y in value["curves"][key]):
        return None
    figure, axis = _axes(title, "step")
    several, loss = len(values) > 1, key == "loss"
    for at, value in enumerate(values):
        name = called[at] or ("training" if loss else "")
        axis.plot(*_columns(value["curves"][key]), color=_TONES[at % 6], linestyle=_PATTERNS[at % 5], label=name)
        if loss and not several and value["curves"]["val_loss"]:
            axis.plot(*_columns(value["curves"]["val_loss"]), color=_TONES[1], linestyle=_PATTERNS[1], marker="o", label="validation")
    if not loss:
        _from_zero(axis)
    if several or loss:
        axis.legend(frameon=False)
    return figure


def _efficiency(values: Sequence[Mapping[str, Any]], called: Sequence[str], scale: float, unit: str) -> Any:
    """Tokens/s/MW over time, each run's at its headline's boundary, and what a lone one would have at its plan's watts."""
    powered = [(at, value) for at, value in enumerate(values) if value["headline"]["tokens_per_s_mw"].get("boundary")]
    if not powered:
        return None
    figure, axis = _axes("Tokens/s per MW", unit)
    for at, value in powered:
        boundary = value["headline"]["tokens_per_s_mw"]["boundary"]
        points = list(zip(value["watts"]["t_s"], value["watts"]["tokens_per_s_mw"][boundary], strict=True))
        name = f"{called[at]} ({WITHIN[boundary]})".strip()
        axis.plot(*_columns(points, scale), color=_TONES[at % 6], linestyle=_PATTERNS[at % 5], label=name)
        planned = value["watts"]["planned_tokens_per_s_mw"].get(boundary)
        if planned and len(values) == 1:
            axis.axhline(planned, color="#1a1d21", linestyle="--", linewidth=1, label="mean speed at the plan's watts")
    _from_zero(axis)
    axis.legend(frameon=False)
    return figure


def _draw(watts: Mapping[str, Any], scale: float, unit: str) -> Any:
    """Watts of the boundaries upon each other; None where none is known."""
    there = [name for name in BOUNDARIES if any(one is not None for one in watts["watts"][name])]
    if not there:
        return None
    figure, axis = _axes("Draw", unit)
    x, below = [_nan(one, scale) for one in watts["t_s"]], [0.0] * len(watts["t_s"])
    for tone, name in enumerate(there):
        above = [_nan(one) for one in watts["watts"][name]]
        axis.fill_between(x, below, above, color=_TONES[tone], label=LAYERS[name], linewidth=0.6, edgecolor="white")
        below = [low if math.isnan(high) else high for low, high in zip(below, above, strict=True)]
    _from_zero(axis, "W")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    return figure


def _steps(found: Mapping[str, Any]) -> Any:
    """The histogram of a run's step times, with percentiles as lines; None of a run without a trace."""
    if "histogram" not in found:
        return None
    bins = found["histogram"]
    wide = (bins["high"] - bins["low"]) / len(bins["counts"])
    figure, axis = _axes("Step times", "seconds")
    places = [bins["low"] + at * wide for at in range(len(bins["counts"]))]
    axis.bar(places, bins["counts"], width=wide * 0.92, align="edge", color=_TONES[0])
    for name in ("p50", "p90", "p99"):
        axis.axvline(found[name], color="#1a1d21", linestyle="--", linewidth=1)
        axis.annotate(name, (found[name], 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    return figure


def _waterfall(found: Mapping[str, Any]) -> Any:
    """From all of wall-clock down to what was kept; None where no clock is known."""
    if "seconds" not in found:
        return None
    figure, axis = _axes("Goodput: every second of wall-clock", "share of wall-clock, %")
    wall, left = found["wall_s"] or 1.0, 100.0
    names = sorted((name for name in found["seconds"] if name != "training"), key=lambda name: -found["seconds"][name])
    for at, name in enumerate((*names, "training")):
        share = 100 * found["seconds"][name] / wall
        left -= share
        axis.barh(at, share, left=max(0.0, left) if name != "training" else 0.0, color=_TONES[2 if name == "training" else 1])
        axis.annotate(f"{share:.1f} %", (101, at), va="center", fontsize=8, annotation_clip=False)
    axis.set_yticks(range(len(names) + 1), [*names, "training"])
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    return figure


def _columns(points: Sequence[Sequence[float | None]], scale: float = 1.0) -> tuple[list[float], list[float]]:
    return [_nan(x, scale) for x, _ in points], [_nan(y) for _, y in points]


def _nan(value: float | None, scale: float = 1.0) -> float:
    """matplotlib parts a curve where there is no number."""
    return float("nan") if value is None else value / scale


def _plain(text: str) -> str:
    """Of a name what a font has; a dollar would begin a formula."""
    return "".join(one for one in text if one.isprintable()).replace("$", r"\$")[:48]
