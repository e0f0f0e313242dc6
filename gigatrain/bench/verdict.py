"""Rows of `gigatrain bench power`, and what is judged by them: medians and spreads of rounds, whose loss is the baseline's, who is beaten by none."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from gigatrain.bench.board import WATTS
from gigatrain.bench.report import OK, Row
from gigatrain.bench.sweep import BASELINE, CONTROL
from gigatrain.power.reading import BOUNDARIES

LOSSES = 3  # of the baseline and its control that a spread is of: two numbers say nothing of how far a third one lies
PER = tuple(f"tokens_per_joule_{name}" for name in BOUNDARIES)
COLUMNS = (
    "commit", "date", "device", "threads", "versions", "settings", "load",
    "recipe", "site", "variant", "sets", "round", "rounds", "status",
    "parameters", "tokens_per_step", "steps", "microbatch", "accumulation", "precision", "kernels", "mesh", "ranks", "accelerators",
    "window_s", "settle_s", "startup_s", "steps_s", "tokens_per_s", *(f"watts_{name}" for name in BOUNDARIES), *PER,
    *(f"joules_per_token_{name}" for name in BOUNDARIES), "boundary", "spread_pct",
    "loss", "val_loss", "loss_difference", "val_loss_difference", "loss_tolerance", "val_loss_tolerance", "loss_neutral",
    "peak_mib", "peak_by", *WATTS, "cap_watts", "sm_mhz", "mem_mhz", "celsius",
    "capped_share", "thermal_share", "disagreement", "gaps", "provenance", "unknown",
    "megawatts", "site_accelerators", "site_tokens_per_s", "note",
)  # fmt: skip
NUMBERS = (
    "load", "parameters", "tokens_per_step", "steps", "microbatch", "accumulation", "ranks", "accelerators", "window_s", "settle_s", "startup_s",
    "steps_s", "tokens_per_s", *(name for name in COLUMNS if name.startswith(("watts_", "tokens_per_joule_", "joules_per_token_", "limit_"))), "spread_pct",
    "loss", "val_loss", "loss_difference", "val_loss_difference", "loss_tolerance", "val_loss_tolerance", "peak_mib", "cap_watts", "sm_mhz",
    "mem_mhz", "celsius", "capped_share", "thermal_share", "disagreement", "gaps", "megawatts", "site_accelerators", "site_tokens_per_s",
)  # fmt: skip
# What a row of several rounds has the median of.
MIDDLE = (
    "load", "window_s", "settle_s", "startup_s", "steps_s", "tokens_per_s", *(f"watts_{name}" for name in BOUNDARIES), *PER,
    *(f"joules_per_token_{name}" for name in BOUNDARIES), "loss", "val_loss", "sm_mhz", "mem_mhz", "celsius", "capped_share", "thermal_share",
    "disagreement",
)  # fmt: skip


def summarised(runs: Sequence[Row]) -> Row:
    """One row of a variant's rounds: medians, and the spread of its tokens per joule, (most - least) / median, where there are two rounds or more."""
    good = [row for row in runs if row["status"] == OK]
    if not good:
        return runs[-1] | {"round": "all", "rounds": 0}
    row = good[-1] | {"round": "all", "rounds": len(good)}
    for name in MIDDLE:
        values = [one[name] for one in good if one[name] is not None]
        row[name] = statistics.median(values) if values else None
    row["peak_mib"] = max((one["peak_mib"] for one in good if one["peak_mib"] is not None), default=None)
    row["gaps"] = sum(one["gaps"] or 0 for one in good)
    return row


def boundary(rows: Iterable[Row]) -> str | None:
    """The widest boundary whose watts are known for every one of these: what they are compared at."""
    there = list(rows)
    return next((name for name in reversed(BOUNDARIES) if there and all(row[f"watts_{name}"] for row in there)), None)


def spread(values: Sequence[float]) -> float | None:
    """Most less least over the median, in per cent; None of fewer than two."""
    return 100 * (max(values) - min(values)) / statistics.median(values) if len(values) > 1 else None


def judge(rows: Sequence[Row], runs: Mapping[str, Sequence[Row]]) -> None:
    """Fill in the differences of losses from the baseline's and whether they are within its own spread: null where that spread is of fewer than LOSSES runs."""
    tolerances: dict[str, float | None] = {}
    for name in ("loss", "val_loss"):
        yard = [row[name] for who in (BASELINE, CONTROL) for row in runs.get(who, ()) if row.get(name) is not None]
        tolerances[name] = max(yard) - min(yard) if len(yard) >= LOSSES else None
    first = next((row for row in rows if row["variant"] == BASELINE), None)
    judged = [
        name for name in tolerances if first is not None and first[name] is not None
    ]  # without held-out documents there is no val_loss
    for row in rows:
        verdicts: list[bool | None] = []
        for name in judged:
            assert first is not None
            tolerance = row[f"{name}_tolerance"] = tolerances[name]
            if row[name] is not None:
                row[f"{name}_difference"] = row[name] - first[name]
            verdicts.append(None if row[name] is None or tolerance is None else abs(row[name] - first[name]) <= tolerance)
        row["loss_neutral"] = False if False in verdicts else None if None in verdicts or not verdicts else True


def pareto(rows: Sequence[Row], at: str) -> set[str]:
    """The variants that nobody beats in both tokens/s for each accelerator and tokens per joule at this boundary."""
    points = {row["variant"]: (row["tokens_per_s"] / row["accelerators"], row[f"tokens_per_joule_{at}"]) for row in rows}
    return {
        name
        for name, mine in points.items()
        if not any(other != mine and other[0] >= mine[0] and other[1] >= mine[1] for other in points.values())
    }


def damaging(rows: Iterable[Row]) -> dict[str, str]:
    """The variants whose loss is known to be another than the baseline's, and by how much: no site is planned with these."""
    found = {}
    for row in rows:
        if row["loss_neutral"] is False:
            over = [
                f"{what} {row[f'{name}_difference']:+.2g}, and {row[f'{name}_tolerance']:.2g} is the baseline's own spread"
                for name, what in (("loss", "loss"), ("val_loss", "validation loss"))
                if None not in (row[f"{name}_difference"], row[f"{name}_tolerance"])
                and not abs(row[f"{name}_difference"]) <= row[f"{name}_tolerance"]
            ]
            found[row["variant"]] = "not loss-neutral: " + "; ".join(over)
    return found
