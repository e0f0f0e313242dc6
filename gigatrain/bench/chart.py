"""What `gigatrain bench power` shows: the table in the terminal, losers and refusals included, and the picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gigatrain.bench.report import OK, Row
from gigatrain.bench.verdict import LOSSES
from gigatrain.errors import RunError
from gigatrain.power.reading import BOUNDARIES


def show(found: Mapping[str, Any], console: Console) -> None:
    """The table, losers and refusals included, then the site."""
    rows, at = found["rows"], found["boundary"]
    good = sorted(
        (row for row in rows if row["status"] == OK), key=lambda row: -(row[f"tokens_per_joule_{at}"] if at else row["tokens_per_s"])
    )
    if good:
        console.print(_table(good, found))
        one = good[0]
        console.print(f"  provenance  {one['provenance']}", markup=False)
        if one["unknown"]:
            console.print(f"  unknown     {one['unknown']}", markup=False)
        console.print(f"  limits      {_limits(one)}", markup=False)
        tolerance = one["val_loss_tolerance"]
        runs = "validation has no held-out documents" if one["val_loss"] is None and one["loss_tolerance"] is not None else ""
        said = (
            runs or f"unknown: the baseline and its control ran fewer than {LOSSES} times"
            if tolerance is None
            else f"{tolerance:.2g} nats of validation loss"
        )
        console.print(f"  neutral     within the spread of the baseline and its control under other seeds, {said}", markup=False)
        console.print("  *           nobody whose loss is not worse is better in both tokens/s and tokens/J", markup=False)
        console.print(
            "  counted     steady steps: a run's own figure (goodput) also has its start, saves, validation and restarts", markup=False
        )
    for row in rows:
        if row["status"] != OK:
            console.print(f"  {row['variant']}: {row['status']}", markup=False)
    for name, reason in found["refused"].items():
        console.print(f"  {name}: {reason}", markup=False)
    if found["site"] is None:
        console.print(f"  site        {found['no_site']}", markup=False)
        return
    site = found["site"]
    best = site["best"]
    many = f"{best['accelerators']:,} accelerators of {best['watts_each']:,.0f} W, {best['tokens_per_s']:,.0f} tokens/s"
    console.print(f"  site        {site['megawatts']:g} MW at {site['boundary']}: {best['variant']}, {many}; {site['why']}", markup=False)
    for text in site.get("excluded", ()):
        console.print(f"  excluded    {text}", markup=False)
    for text in site["assumes"]:
        console.print(f"  assumes     {text}", markup=False)


def _limits(row: Row) -> str:
    if row["limit_watts"] is None:
        return "none known: no accelerator tells one"
    return f"found {row['limit_watts']:,.0f} W, default {_number(row['limit_default_watts'], ',.0f')} W"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(rows: Sequence[Row], found: Mapping[str, Any]) -> Table:
    at, one = found["boundary"], rows[0]
    known = [name for name in BOUNDARIES if any(row[f"watts_{name}"] for row in rows)]
    table = Table(
        title=f"{one['recipe']} on {one['accelerators']} x {one['device']}: {one['steps']:,} steps a run, {one['rounds']} rounds, compared at {at}",
        box=None,
        title_justify="left",
    )
    for heading in ("", "variant"):
        table.add_column(heading, no_wrap=True)
    headings = [
        "tokens/s",
        *(f"W\n{name}" for name in known),
        *(f"tokens/J\n{name}" for name in known),
        "J/token" if at is None else f"J/token\n{at}",
        "± %",
        "d loss",
        "d val\nloss",
        "neutral",
        "peak\nMiB",
    ]
    for heading in [*headings, "capped\n%", "MHz"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        neutral = {True: "yes", False: "NO", None: "-"}[row["loss_neutral"]]
        capped_pct = None if row["capped_share"] is None else 100 * row["capped_share"]
        table.add_row(
            "*" if row["variant"] in found["pareto"] else "",
            row["variant"],
            _number(row["tokens_per_s"], ",.0f"),
            *(_number(row[f"watts_{name}"], ",.1f") for name in known),
            *(_number(row[f"tokens_per_joule_{name}"], ",.4g") for name in known),
            _number(row[f"joules_per_token_{at}"] if at else None, ".4g"),
            _number(row["spread_pct"], ".1f"),
            _number(row["loss_difference"], "+.1e"),
            _number(row["val_loss_difference"], "+.1e"),
            neutral,
            _number(row["peak_mib"], ",.0f"),
            _number(capped_pct, ".0f"),
            _number(row["sm_mhz"], ",.0f"),
        )
    return table


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """power.png: each variant's tokens/s against watts of an accelerator, with lines of equal tokens per joule; and the site under its megawatts."""
    pyplot = pictures()
    at = found["boundary"]
    rows = [row for row in found["rows"] if row["status"] == OK]
    if at is None or not rows:
        raise RunError("there is nothing to draw: no boundary's watts are known for every variant")
    folder.mkdir(parents=True, exist_ok=True)
    site = found["site"]
    figure, axes = pyplot.subplots(1, 2 if site else 1, figsize=(13 if site else 7.5, 5.6), squeeze=False)
    axis = axes[0, 0]
    xs = [row[f"watts_{at}"] / row["accelerators"] for row in rows]
    ys = [row["tokens_per_s"] / row["accelerators"] for row in rows]
    right, top = 1.18 * max(xs), 1.18 * max(ys)
    best = max(y / x for x, y in zip(xs, ys, strict=True))
    for share in (0.25, 0.5, 0.75, 1.0):
        slope = share * best
        end = min(right, top / slope)
        axis.plot([0, end], [0, slope * end], color="#b8b8b8", linewidth=0.8, zorder=1)
        axis.annotate(f"{slope:.3g} tokens/J", (end, slope * end), fontsize=7, color="#6a6a6a", ha="right", va="bottom")
    for x, y, row in zip(xs, ys, rows, strict=True):
        better = row["variant"] in found["pareto"]
        axis.scatter(
            [x], [y], s=46, color="#1b7f4d" if better else "#8a8a8a", marker="x" if row["loss_neutral"] is False else "o", zorder=3
        )
        axis.annotate(row["variant"], (x, y), fontsize=7, xytext=(5, -3), textcoords="offset points")
    axis.set(xlim=(0, right), ylim=(0, top), xlabel=f"watts of an accelerator at {at}", ylabel="tokens/s of an accelerator")
    axis.set_title("green: nobody is better in both; cross: not loss-neutral", fontsize=9)
    if site:
        axis = axes[0, 1]
        order = sorted(site["rows"], key=lambda one: one["tokens_per_s"])
        colours = ["#1b7f4d" if one["variant"] == site["best"]["variant"] else "#9ab8d0" for one in order]
        axis.barh([one["variant"] for one in order], [one["tokens_per_s"] for one in order], color=colours)
        for place, one in enumerate(order):
            axis.annotate(f" {one['accelerators']:,} x {one['watts_each']:,.0f} W", (0, place), fontsize=7, va="center")
        axis.set_xlabel(f"tokens/s of a site with {site['megawatts']:g} MW at {site['boundary']} (perfect weak scaling assumed)")
        axis.tick_params(axis="y", labelsize=7)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    one = rows[0]
    figure.suptitle(f"{one['recipe']} on {one['accelerators']} x {one['device']}", fontsize=11)
    figure.text(0.01, 0.01, f"{one['commit']}, {one['date']}, {one['settings']}; {one['provenance']}"[:230], fontsize=6)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    made = folder / "power.png"
    figure.savefig(made, dpi=150)
    pyplot.close(figure)
    return [made]


def pictures() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as missing:
        raise RunError("pictures need matplotlib: pip install 'gigatrain[bench]'") from missing
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot
