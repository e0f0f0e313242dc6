"""A verdict on one screen, and a judgement over many nodes."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gigatrain.preflight.findings import State
from gigatrain.preflight.judge import Judgement
from gigatrain.preflight.verdict import Verdict

_COLOURS: dict[State, str] = {"ok": "green", "warn": "yellow", "bad": "bold red", "untested": "dim"}
_HEALTH = {"healthy": "green", "suspect": "yellow", "bad": "bold red"}


def verdict(found: Verdict, console: Console | None = None) -> None:
    """What is bad with its way out, what warns, what was not tested and why, and what is well."""
    console = console or Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(max_width=24)
    table.add_column(overflow="fold")
    order: tuple[State, ...] = ("bad", "warn", "untested", "ok")
    for state in order:
        alike: dict[str, list[str]] = {}  # what has one reason (no GPU) is one line
        for one in found.findings:
            if one.state == state:
                alike.setdefault(one.said + (f"\n→ {one.way_out}" if one.way_out and state in ("bad", "warn") else ""), []).append(one.name)
        for said, names in alike.items():
            table.add_row(Text(state, style=_COLOURS[state]), Text(", ".join(names)), Text(said))
    console.print(table)
    counts = {state: sum(one.state == state for one in found.findings) for state in order}
    shown = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    console.print(Text(f"{found.node} is {found.health}", style=_HEALTH[found.health]), Text(f"({shown}; {found.took_s:.1f} s)"))


def line(found: Verdict, console: Console | None = None) -> None:
    """A verdict in a job's log: one line, and the reasons."""
    console = console or Console(highlight=False, soft_wrap=True)
    untested = sum(one.state == "untested" for one in found.findings)
    why = "".join(f"\n  {reason}" for reason in found.reasons)
    console.print(
        Text(f"{found.node} is {found.health} ({untested} checks untested; {found.took_s:.1f} s){why}", style=_HEALTH[found.health])
    )


def judgement(found: Judgement, console: Console | None = None) -> None:
    """One line a node that is not healthy or not chosen, and how many are well."""
    console = console or Console(stderr=True, highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("node", "health", "trains", "why"):
        table.add_column(name, overflow="fold", no_wrap=name != "why")
    plain = [row for row in found.rows if row.health == "healthy"]
    shown = found.rows if len(found.rows) <= 32 else [row for row in found.rows if row.health != "healthy"]
    for row in shown[:200]:
        why = "; ".join(row.reasons[:4]) + (" …" if len(row.reasons) > 4 else "") + (" [put on the exclusion list]" if row.excluded else "")
        table.add_row(Text(row.node), Text(row.health, style=_HEALTH[row.health]), "yes" if row.chosen else "no", Text(why))
    console.print(table)
    more = f", {len(shown) - 200} more are not shown" if len(shown) > 200 else ""
    console.print(Text(f"{len(plain)} of {len(found.rows)} nodes are healthy, {len(found.chosen)} of {found.wanted} wanted train{more}"))
    for note in found.notes:
        console.print(Text(note))
