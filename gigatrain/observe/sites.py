"""Sites on the terminal: one line each, or one with every figure, its unit, its basis and its source; and what a plan takes from a site. Free of torch."""

import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel

from gigatrain.launching.size import Size, node_watts, shown, whole
from gigatrain.planning import hardware
from gigatrain.planning.plan import gib
from gigatrain.site import BASES, Basis, Figure, Site

# How a number is written, by how its field is called; the first that fits.
_UNITS = (
    ("_watts", shown),
    ("memory_bytes", lambda value: gib(int(value))),
    ("bytes", lambda value: f"{value / 1e15:,g} PB" if value >= 1e15 else f"{value / 1e12:,g} TB"),
    ("_gbit_s", lambda value: f"{value:,g} Gbit/s"),
    ("_gbyte_s", lambda value: f"{value:,g} GB/s"),
    ("_tbyte_s", lambda value: f"{value:,g} TB/s"),
    ("_g_kwh", lambda value: f"{value:,g} g CO2e/kWh"),
    ("_eur_mwh", lambda value: f"{value:,g} EUR/MWh"),
    ("_time_s", lambda value: f"{value / 3600:,g} h"),
    ("", lambda value: f"{value:,.10g}"),
)


def chosen(sites: Iterable[Site], word: str) -> list[Site]:
    """Those of a country, where the word is one (`fr`); else those that have it in their name, summary, kind, accelerator, scheduler or status."""
    asked, known = word.casefold(), list(sites)
    of_country = [site for site in known if asked and site.country.casefold() == asked]
    return of_country or [site for site in known if asked in " ".join(_words(site)).casefold()]


def table(sites: Iterable[Site]) -> list[str]:
    """A line a site; the last columns count its figures by basis: measured, declared, assumed, unknown."""
    head = ["NAME", "IN", "ACCELERATORS", "H100E", "MW", "PUE", "SCHEDULER", "M", "D", "A", "U", "SUMMARY"]
    rows = [head, *(_row(site) for site in sites)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    right = {3, 4, 5, 7, 8, 9, 10}
    lines = [
        "  ".join(cell.rjust(wide) if at in right else cell.ljust(wide) for at, (cell, wide) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    wide = _columns()
    return [line.rstrip() if len(line.rstrip()) <= wide else line[: wide - 1].rstrip() + "…" for line in lines] + _legend(wide)


def describe(site: Site, path: str) -> list[str]:
    """Everything that is known of a site, each figure with unit, basis and source, the unknown ones by name."""
    lines = [f"{site.name}: {site.summary}"]
    for key, value in (
        ("kind", site.kind),
        ("country", site.country),
        ("status", site.status),
        ("source", site.source),
        ("notes", site.notes),
    ):
        lines += _entry(key, value) if value else ()
    lines += _entry("file", path)
    lines += _entry("device", site.device)
    lines += _entry("accelerator", _chip(site))
    lines += (
        [] if site.accelerator is None else _entry("nodes of it elsewhere", "; ".join(_machines(site.accelerator)) or "none in the table")
    )
    memory, why = hardware.memory_bytes(site)
    lines += _entry("a rank has", f"{gib(memory)} ({why})" if memory is not None else "unknown: a plan shows its need and checks nothing")
    lines += _entry("ranks a node", f"{site.ranks_per_node:,}" if site.ranks_per_node else "unknown: give --gpus")
    lines += _entry("a node draws", _draws(site))
    if site.h100e.value and (total := site.power.facility_watts.value or site.power.it_watts.value):
        lines += _entry(
            "power",
            f"{total / site.h100e.value:,.0f} W for each H100-equivalent, of {'the facility' if site.power.facility_watts.known else 'IT'}",
        )
    unknown = []
    for section, entries in _sections(site):
        rows = []
        for name, value in entries:
            if isinstance(value, Figure) and not value.known:
                unknown.append(f"{section}.{name}" if section else name)
            else:
                rows += _entry(name, _written(name, value))
        if rows:
            lines += ["", section or "the whole system", *rows]
    lines += ["", *_entry("unknown", ", ".join(unknown) or "nothing")]
    return lines


def on_site(site: Site, sized: Size) -> list[str]:
    """What a plan takes from the site: its size, what a rank has, and every assumption, one a line."""
    lines = []
    if site.kind != "local":
        nodes = (
            f"{sized.nodes:,} {'node' if sized.nodes == 1 else 'nodes'} x {sized.ranks_per_node:,} ranks"
            if sized.nodes
            else f"{sized.ranks:,} ranks; how many make a node is unknown"
        )
        lines.append(
            f"  size     {nodes}"
            + (f"; {shown(sized.watts)} of the facility" if sized.watts is not None else "; what they draw is unknown")
        )
    memory, why = hardware.memory_bytes(site)
    if site.kind != "local":
        lines.append(f"  room     {f'{gib(memory)} a rank: {why}' if memory is not None else 'unknown a rank: its memory is not checked'}")
    taken = list(sized.assumes)
    if (
        site.memory_bytes is None
        and site.accelerator is not None
        and (figure := hardware.chip(site.accelerator).hbm_bytes).basis == "assumed"
    ):
        taken.append(f"{gib(int(figure.value or 0))} in an accelerator ({figure.source})")
    return lines + [f"  assumes  {one}" for one in taken]


def as_json(site: Site, path: str) -> dict[str, Any]:
    """The site as its file has it, and beside it what follows from it."""
    watts, how, lacking = node_watts(site)
    memory, why = hardware.memory_bytes(site)
    return site.model_dump(mode="json") | {
        "file": path,
        "derived": {
            "ranks_per_node": site.ranks_per_node,
            "memory_bytes": memory,
            "memory_source": why,
            "node_facility_watts": watts,
            "node_facility_watts_how": list(how) or [lacking],
        },
    }


def _words(site: Site) -> tuple[str, ...]:
    return (site.name, site.summary, site.kind, site.accelerator or "", site.scheduler.kind, site.status)


def _row(site: Site) -> list[str]:
    count = Counter(figure.basis for _, figure in site.figures())
    many = f"{site.accelerators.value:,.0f}" if site.accelerators.value is not None else "?"
    total = site.power.facility_watts.value or site.power.it_watts.value
    return [
        site.name,
        site.country or "-",
        f"{many} {site.accelerator or '?'}" if site.device == "cuda" else "-",
        f"{site.h100e.value:,.0f}" if site.h100e.value is not None else "?",
        f"{total / 1e6:,.1f}" if total else "?",
        f"{site.power.pue.value:g}" if site.power.pue.value else "?",
        "?" if site.scheduler.kind == "unknown" else site.scheduler.kind,
        *(str(count[basis]) for basis in get_args(Basis)),
        site.summary,
    ]


def _legend(wide: int) -> list[str]:
    text = "; ".join(f"{basis[0].upper()}, {basis}: {what}" for basis, what in BASES.items())
    return textwrap.wrap(f"{text}. MW: the facility's, else IT's. Everything of one: gigatrain sites NAME", wide)


def _chip(site: Site) -> str:
    if site.accelerator is None:
        return "unknown: kernels are chosen that work on all of them" if site.device == "cuda" else "none"
    found = hardware.chip(site.accelerator)
    rates = [f"{dtype} {figure.value:,g}" for dtype in ("bf16", "fp8", "fp4") if (figure := found.tflops(dtype)).known]
    parts = [f"{found.name}, {found.architecture or 'architecture unknown'}", f"dense TFLOP/s: {', '.join(rates) or 'unknown'}"]
    return "; ".join([*parts, *([found.note] if found.note else [])])


def _machines(accelerator: str) -> Iterator[str]:
    for machine in hardware.MACHINES:
        if machine.chip == accelerator:
            known = ((machine.max_watts, "at most"), (machine.training_watts, "in training"), (machine.peak_watts, "at its peak"))
            yield f"{machine.name}: {', '.join(f'{shown(figure.value)} {when}' for figure, when in known if figure.value is not None)}"


def _draws(site: Site) -> str:
    watts, how, lacking = node_watts(site)
    return (
        "; ".join(how)
        if watts is not None
        else f"unknown: {lacking.split('; give')[0]}" + (f"; {whole(site):,} nodes in all" if whole(site) else "")
    )


def _sections(site: Site) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    yield "", [(name, value) for name in Site.model_fields if isinstance(value := getattr(site, name), Figure)]
    for name in Site.model_fields:
        value = getattr(site, name)
        if isinstance(value, BaseModel) and not isinstance(value, Figure):
            yield (
                name,
                [(field, getattr(value, field)) for field in type(value).model_fields if getattr(value, field) not in (None, "", ())],
            )
    if site.environment:
        yield "environment", list(site.environment.items())


def _written(name: str, value: Any) -> str:
    if isinstance(value, Figure):
        write = next(write for end, write in _UNITS if name.endswith(end))
        assert value.value is not None
        return f"{write(value.value)}  {value.basis}: {value.source}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _entry(name: str, text: str) -> list[str]:
    wide = _columns()
    return textwrap.wrap(text, wide, initial_indent=f"  {name:23} ", subsequent_indent=" " * 26, break_long_words=False) or [f"  {name}"]


def _columns() -> int:
    """Of the terminal; where there is none, long lines are cut at 200."""
    return max(60, shutil.get_terminal_size((200, 40)).columns)
