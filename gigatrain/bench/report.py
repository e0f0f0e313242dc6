"""Rows of measured kernels: a CSV file that a killed run leaves whole, tables in the terminal, pictures from the file alone."""

import csv
import hashlib
import io
import math
import os
import re
import subprocess
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gigatrain import installed
from gigatrain.errors import RunError

PACKAGE = Path(__file__).parent.parent
COLUMNS = (
    "commit", "date", "device", "threads", "versions", "settings", "load",
    "op", "size", "cut_from", "mode", "provider", "version", "status",
    "timed_by", "us", "us_p20", "us_p80", "host_us", "host_us_p20", "host_us_p80", "calls", "sets", "rounds",
    "bytes", "flops", "floor_us", "bound", "gb_s", "tflop_s", "pct", "ceiling_gb_s", "ceiling_tflop_s", "ratio_to_torch",
    "peak_mib", "error", "error_ratio", "first_call_s",
    "sm_mhz_before", "sm_mhz_after", "mem_mhz_before", "mem_mhz_after", "watts_before", "watts_after", "celsius_before", "celsius_after", "note",
)  # fmt: skip
NUMBERS = COLUMNS[COLUMNS.index("us") : COLUMNS.index("note")]
# A row belongs to a run that has all of these; with it an operation that is done need not be done again.
IDENTITY = ("commit", "device", "threads", "versions", "settings")
MEASURED = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "flashoptim", "quack-kernels", "transformers")
OK = "ok"

Row = dict[str, Any]


def checkout() -> Path | None:
    """The folder that this package lies in, if that is a checkout."""
    folder = PACKAGE.parent
    return folder if (folder / "pyproject.toml").is_file() and (folder / "benchmarks").is_dir() else None


def default_path(name: str) -> Path:
    """benchmarks/results/NAME in a checkout, else NAME here."""
    folder = checkout()
    return folder / "benchmarks" / "results" / name if folder else Path(name)


def commit(*folders: str) -> str:
    """The commit; with a hash of these folders of the package (default: kernels and benchmark) where they are not as committed, or where there is none."""
    folders, folder, head, changed = folders or ("kernels", "bench"), checkout(), "", ""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()

    if folder and (folder / ".git").exists():
        head, changed = (
            git("rev-parse", "--short=12", "HEAD"),
            git("status", "--porcelain", "--", *(f"gigatrain/{name}" for name in folders)),
        )
    if head and not changed:
        return head
    files = sorted(path for name in folders for path in (PACKAGE / name).rglob("*") if path.suffix in {".py", ".json"})
    digest = hashlib.sha256(b"".join(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes() for path in files))
    return f"{head or 'none'}+{digest.hexdigest()[:8]}"


def versions() -> dict[str, str]:
    """Of Python and of what is measured, where it is installed."""
    return installed.versions(*MEASURED)


def identity(device: str, threads: int, settings: str) -> Row:
    """What the rows of one run share, as the file holds it."""
    known = " ".join(f"{name}={version}" for name, version in versions().items())
    return {"commit": commit(), "device": device, "threads": str(threads), "versions": known, "settings": settings}


def stamped(row: Row, run: Row) -> Row:
    """A row with every column: the run's identity, the date and the load of the machine."""
    now = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "load": round(os.getloadavg()[0], 2)}
    return dict.fromkeys(COLUMNS) | run | now | row


# ---- The file ----


def load(path: Path, columns: Sequence[str] = COLUMNS, numbers: Sequence[str] = NUMBERS) -> list[Row]:
    """Its rows, numbers as numbers, empty cells None; a last line that a kill tore off is left out. RunError if it has other columns."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    if lines and tuple(lines[0]) != tuple(columns):
        other = ", ".join(sorted(set(lines[0]) ^ set(columns))) or "in another order"
        raise RunError(f"{path} has other columns ({other}); move it away, or name another --csv")
    return [{name: _cell(name, cell, numbers) for name, cell in zip(columns, line, strict=True)} for line in lines[1:]]


def _cell(name: str, cell: str, numbers: Sequence[str]) -> Any:
    if not cell:
        return None
    return float(cell) if name in numbers and name != "bound" else cell


def append(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Add the rows of one operation in one write, after what is whole of the file."""
    if not rows:
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        held = file.read()
        whole = held.rfind(b"\n") + 1
        if whole != len(held):
            file.truncate(whole)
        if not whole:
            writer.writeheader()
        writer.writerows({name: _text(row[name]) for name in columns} for row in rows)
        file.write(text.getvalue().encode())
        file.flush()
        os.fsync(file.fileno())


def _text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def of_run(rows: Iterable[Row], run: Row, op: str) -> list[Row]:
    """The rows of an operation in a run."""
    return [row for row in rows if row["op"] == op and all(row[name] == run[name] for name in IDENTITY)]


# ---- The terminal ----


def table(op: str, rows: Sequence[Row], console: Console) -> None:
    """One operation: what was measured, fastest first, and below it who was not and why."""
    timed = [row for row in rows if row["us"] is not None]
    if timed:
        console.print(_timings(op, timed))
    for cut, size in dict.fromkeys((row["cut_from"], row["size"]) for row in timed if row["cut_from"]):
        console.print(f"  {op} {size} was cut from {cut}", markup=False)
    notes: dict[str, dict[str, None]] = defaultdict(dict)
    for row in timed:
        for note in (row["note"] or "").split("; "):
            notes[note][row["provider"]] = None
    for note, names in notes.items():
        if note:
            console.print(f"  {op} {', '.join(names)}: {note}", markup=False)
    for row in rows:
        if row["mode"] == "cases" and row["status"] == OK:
            ratio = (
                "no fp64 to compare with" if row["error_ratio"] is None else f"at most {row['error_ratio']:.2f} times plain torch's error"
            )
            console.print(f"  {op} {row['provider']}: {row['size']}, {ratio}", markup=False)
    for reason, names in reasons(rows).items():
        console.print(f"  {op} {', '.join(names)}: {reason}", markup=False)


def reasons(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Who was not measured, by reason; the names carry where, if that is not everywhere."""
    places = {(row["size"], row["mode"]) for row in rows if row["mode"] != "cases"}
    found: dict[str, dict[str, set[tuple[str, str]]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        if row["status"] != OK:
            found[row["status"]][row["provider"]].add((row["size"], row["mode"] or ""))
    sizes = {size for size, _ in places}

    def name(provider: str, where: set[tuple[str, str]]) -> str:
        if {size for size, mode in where if not mode} >= sizes or not sizes:
            return provider
        shown = sorted({" ".join(filter(None, place)) for place in where})
        return f"{provider} ({shown[0]}{f' and {len(shown) - 1} more' if len(shown) > 1 else ''})"

    return {reason: [name(provider, where) for provider, where in names.items()] for reason, names in found.items()}


def _timings(op: str, timed: Sequence[Row]) -> Table:
    one = timed[0]
    shown = Table(
        title=f"{op} on {one['device']}: copy {one['ceiling_gb_s']:,.4g} GB/s, product {one['ceiling_tflop_s']:,.3g} TFLOP/s",
        box=None,
        title_justify="left",
    )
    for heading in ("size", "mode", "provider"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("us", "p20..p80", "with host", "GB/s", "TFLOP/s", "% of ceiling", "x torch", "peak MiB", "error", "ratio"):
        shown.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in timed:
        groups[row["size"], row["mode"]].append(row)
    last = None
    for (size, mode), group in groups.items():
        for index, row in enumerate(sorted(group, key=lambda row: row["us"])):
            shown.add_row(size if size != last else "", "" if index else mode, *_figures(row))
            last = size
    return shown


def _figures(row: Row) -> list[str]:
    def form(name: str, shape: str) -> str:
        return "-" if row[name] is None or math.isnan(row[name]) else format(row[name], shape)

    return [
        row["provider"],
        form("us", ",.1f") + (" by host" if row["timed_by"] == "events" else ""),
        f"{form('us_p20', ',.0f')}..{form('us_p80', ',.0f')}",
        form("host_us", ",.1f"),
        form("gb_s", ",.4g"),
        form("tflop_s", ",.3g"),
        form("pct", ".1f"),
        form("ratio_to_torch", ".2f"),
        form("peak_mib", ",.0f"),
        form("error", ".1e"),
        form("error_ratio", ".2f"),
    ]


# ---- Pictures ----

_COLOURS = {"torch": "#8a8a8a", "compile": "#c49a2b", "native": "#5b8db8", "liger": "#b8585b", "quack": "#7a5ba8"}
_OURS = ("#1b7f4d", "#63b58a", "#a5d6bd")
_OTHERS = ("#a87f5b", "#5ba8a0", "#d08bb0", "#4c4c4c")


def plots(path: Path, folder: Path) -> list[Path]:
    """One PNG per device and operation of a CSV file, of the newest run that has it; needs no GPU. RunError where there is nothing to draw, or nothing to
    draw with."""
    try:
        import matplotlib as mpl
    except ImportError as missing:
        raise RunError("pictures need matplotlib: pip install 'gigatrain[bench]'") from missing
    mpl.use("Agg")
    newest: dict[tuple[str, str], tuple[str, ...]] = {}
    held = load(path)
    timed = [row for row in held if row["us"] is not None]
    if not timed:
        raise RunError(f"{path} has no timings to draw; make some: gigatrain bench kernels --csv {path}")
    for row in timed:
        newest[row["device"], row["op"]] = tuple(row[name] for name in IDENTITY)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for (device, op), run in newest.items():
        rows = [row for row in held if row["op"] == op and tuple(row[name] for name in IDENTITY) == run]
        made.append(folder / f"{op}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.png")
        _draw(op, rows, made[-1])
    return made


def _draw(op: str, rows: Sequence[Row], path: Path) -> None:
    """A panel per mode, a group of bars per size: per cent of the measured ceiling, or times as fast as plain torch where no floor is counted."""
    from matplotlib import pyplot

    everybody, rows = rows, [row for row in rows if row["us"] is not None]
    modes, sizes, providers = (list(dict.fromkeys(row[name] for row in rows)) for name in ("mode", "size", "provider"))
    pct = all(row["pct"] is not None for row in rows)
    by_place = {(row["mode"], row["size"], row["provider"]): row for row in rows}
    figure, axes = pyplot.subplots(
        len(modes),
        1,
        figsize=(max(7.0, 1.6 + 0.34 * len(sizes) * (len(providers) + 1)), 1.2 + 2.6 * len(modes)),
        squeeze=False,
        sharex=True,
    )
    width = 0.84 / len(providers)
    for axis, mode in zip(axes[:, 0], modes, strict=True):
        for number, provider in enumerate(providers):
            found = [(at, row) for at, size in enumerate(sizes) if (row := by_place.get((mode, size, provider)))]
            heights = [row["pct"] if pct else row["ratio_to_torch"] or math.nan for _, row in found]
            places = [at - 0.42 + width * (number + 0.5) for at, _ in found]
            bars = axis.bar(places, heights, width, color=_colour(provider, providers), label=provider)
            for bar, (_, row) in zip(bars, found, strict=True):
                if row["timed_by"] == "events":
                    bar.set_hatch("///")
                microseconds = f"{row['us']:,.0f}" if row["us"] >= 100 else f"{row['us']:.1f}"
                axis.annotate(
                    microseconds,
                    (bar.get_x() + width / 2, bar.get_height()),
                    rotation=90,
                    fontsize=6,
                    ha="center",
                    va="bottom",
                    xytext=(0, 2),
                    textcoords="offset points",
                )
        axis.axhline(100 if pct else 1, color="black", linewidth=0.8, linestyle="--")
        axis.set_ylabel(f"{mode}\n{'% of the measured ceiling' if pct else 'times as fast as torch'}", fontsize=8)
        axis.margins(y=0.22)
        axis.spines[["top", "right"]].set_visible(False)
    slant: dict[str, Any] = {"rotation": 12, "ha": "right"} if len(sizes) > 2 else {}
    axes[-1, 0].set_xticks(range(len(sizes)), sizes, fontsize=7, **slant)
    one = rows[0]
    figure.suptitle(f"{op} on {one['device']}", fontsize=11)
    absent = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons(everybody).items())
    lines = [
        f"Bars: median of {one['rounds']:.0f} rounds in turn, cold inputs; numbers are us; hatched: launches by the host included. "
        f"Copy {one['ceiling_gb_s']:,.4g} GB/s, product {one['ceiling_tflop_s']:.3g} TFLOP/s.",
        f"{one['commit']}, {one['date']}, {one['versions']}",
        *textwrap.wrap(f"Not measured: {absent}" if absent else "", 200, max_lines=3),
    ]
    figure.text(0.01, 0.005, "\n".join(lines), fontsize=5.5)
    axes[0, 0].legend(fontsize=7, ncols=min(6, len(providers)), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False)
    figure.tight_layout(rect=(0, 0.1 / figure.get_figheight() * len(lines), 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _colour(provider: str, providers: Sequence[str]) -> str:
    """Ours are green; peers keep their colour from picture to picture."""
    ours = [name for name in reversed(providers) if name.startswith("gigatrain")]
    if provider in ours:
        return _OURS[ours.index(provider) % len(_OURS)]
    others = [name for name in providers if name not in ours and name not in _COLOURS]
    return _COLOURS.get(provider) or _OTHERS[others.index(provider) % len(_OTHERS)]
