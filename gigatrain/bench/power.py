"""What a joule buys: a recipe's variants trained for real in alternating rounds; tokens per joule, loss and memory of each, and the best site for a megawatt.

A variant (bench/sweep.py) is a `gigatrain train` of its own; rounds are A B C, B C A. What is counted is a run's steady stretch: its windows after `settle_s`
of steps, until its last report. Start, settling, validation and saves are left out of the figures, and recorded. A stretch shorter than the meters allow
gives no figure. tokens per joule at a boundary = tokens of the stretch over joules at that boundary (POWER.md), and is Mtok/s/MW.

The yardstick of a loss is the baseline's own: it runs in every round, and beside it a `control`, the baseline under other seeds. `loss_tolerance` is the spread
of the losses of both, LOSSES of them at least; a variant whose losses differ from the baseline's by no more is loss-neutral. One whose losses differ by
more is shown, but no site is planned with it. The control's tokens per joule are an A/A test: what
they differ by from the baseline's is noise.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gigatrain import load
from gigatrain.bench import report, sweep
from gigatrain.bench.board import Board, processor
from gigatrain.bench.chart import draw, pictures, show
from gigatrain.bench.fleet import excluded, fleet
from gigatrain.bench.report import OK
from gigatrain.bench.steady import LEAST_S, LEAST_UPDATES, looked, pairs
from gigatrain.bench.sweep import CONTROL
from gigatrain.bench.trials import SETTLE_S, Entry, Measurement, Settings, no_caps, room
from gigatrain.bench.verdict import COLUMNS, NUMBERS, boundary, damaging, judge, pareto, spread, summarised
from gigatrain.errors import RunError, SiteError
from gigatrain.launching import job
from gigatrain.planning.watts import Watts
from gigatrain.site import Site


def run(
    source: str,
    *,
    site: str | None = None,
    sets: Sequence[str] = (),
    megawatts: float | None = None,
    words: str | None = None,
    allow_caps: bool = False,
    steps: int | None = None,
    seconds: float | None = None,
    rounds: int | None = None,
    path: str | None = None,
    plots: str | None = None,
    quick: bool = False,
    as_json: bool = False,
    measure: Callable[[Mapping[str, Any]], Any] | None = None,
) -> None:
    """The command: measure, write, show. Raises RunError, PowerError, SiteError and what a plan raises."""
    groups = sweep.words(words)
    if "WORLD_SIZE" in os.environ:
        raise RunError(
            "bench power starts its runs itself, and this is a rank of another job (WORLD_SIZE is set); start it once, without torchrun"
        )
    where, on = Path(path) if path else report.default_path("power-variants.csv"), load.site(site) if site else load.local_site()[0]
    writable(where)
    if plots is not None:
        pictures()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with Board() as board:
        first = sweep.baseline(source, sets, on, measure)
        least_s, meters = looked(first.plan.power, first.plan.watts, board.uuids)
        limits = board.limits()
        chosen, refused = sweep.variants(
            source,
            sets,
            on,
            groups,
            first,
            visible=len(board.uuids) or 1,
            default_watts=limits.get("limit_default_watts"),
            least_watts=limits.get("limit_least_watts"),
            no_caps=no_caps(allow_caps, board) if any("cap" in group for group in groups) else None,
            measure=measure,
        )
        settings = Settings(rounds or (1 if quick else Settings.rounds), steps, seconds, min(SETTLE_S, 2.0) if quick else SETTLE_S)
        folder = job.new_folder(Path("runs"), f"bench-power-{first.recipe.name}")
        folder.mkdir(parents=True)
        room(first.plan, folder)
        device = board.name or processor()
        identity = report.identity(device, len(os.sched_getaffinity(0)), settings.name) | {"commit": report.commit("")}
        say(f"meters    {pairs(meters)}")
        if least_s > LEAST_S:
            say(
                f"a window is {least_s:,.0f} s or more, {LEAST_UPDATES} updates of the slowest meter; --set power.node=none goes without the node's"
            )
        if limits:
            say("limits    " + ", ".join(f"{name.removeprefix('limit_').replace('_', ' ')} {watts:,.0f}" for name, watts in limits.items()))
        work = Measurement(source, site, settings, board, folder, where, identity, least_s, say)
        entries = work.measure([first, *chosen])
    found = outcome(entries, refused, first.plan.watts, on, megawatts)
    report.append(where, found["rows"], COLUMNS)
    found |= {"csv": str(where), "runs": str(folder), "plots": []}
    if plots is not None and found["boundary"]:
        found["plots"] = [str(one) for one in draw(found, Path(plots))]
    if as_json:
        print(json.dumps(found))
    else:
        show(found, Console(width=None if sys.stdout.isatty() else 200, highlight=False))
    if found["boundary"] is None and not any(row["status"] == OK for row in found["rows"]):
        raise RunError(f"no variant has a figure; the baseline: {found['rows'][0]['status']}")


def writable(path: Path) -> None:
    """RunError for a file that takes no rows of ours: now, rather than after an hour of measuring."""
    if path.exists() and not path.is_file():
        raise RunError(f"{path} is no file; name another --csv")
    above = next((folder for folder in path.absolute().parents if folder.exists()), Path("/"))
    if not os.access(path if path.exists() else above, os.W_OK) or not above.is_dir():
        raise RunError(f"{path} cannot be written; name another --csv")
    report.load(path, COLUMNS, NUMBERS)


def outcome(entries: Sequence[Entry], refused: Mapping[str, str], watts: Watts, site: Site, megawatts: float | None) -> dict[str, Any]:
    """From runs to what is shown: a row for every variant, the boundary they are compared at, who is beaten by none, and the best site."""
    rows = [summarised(entry.runs) for entry in entries if entry.runs]
    good = [row for row in rows if row["status"] == OK]
    at = boundary(good)
    runs = {entry.variant.name: [row for row in entry.runs if row["loss"] is not None] for entry in entries}
    judge(rows, runs)
    for entry, row in zip((entry for entry in entries if entry.runs), rows, strict=True):
        row["boundary"] = at
        if at is not None and row["status"] == OK:
            row["spread_pct"] = spread([one[f"tokens_per_joule_{at}"] for one in entry.runs if one["status"] == OK])
    cap = megawatts if megawatts is not None else site.power.cap_watts.value / 1e6 if site.power.cap_watts.value else None
    best, no_site = None, None
    damaged = damaging(good)
    fit = [row for row in good if row["variant"] != CONTROL and row["variant"] not in damaged]
    if at is None:
        no_site = "no boundary's watts are known for every variant" if good else "nothing was measured"
    elif cap is None:
        no_site = "no limit is given: --megawatts M, or the site's power.cap_watts"
    else:
        try:
            best = fleet(fit, watts, site, cap, at)
            best["excluded"] = excluded(good, damaged, best, at)
        except SiteError as failure:  # what was measured is worth more than this
            no_site = str(failure)
    return {
        "rows": rows,
        "refused": dict(refused),
        "boundary": at,
        "pareto": sorted(pareto(fit, at)) if at else [],
        "damaged": damaged,
        "site": best,
        "no_site": no_site,
    }
