"""A whole site under a limit: which variant gives its megawatts the most tokens, and what that assumes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gigatrain.bench.report import Row
from gigatrain.bench.sweep import BASELINE
from gigatrain.bench.verdict import LOSSES
from gigatrain.errors import SiteError
from gigatrain.launching.size import shown
from gigatrain.planning.watts import Watts
from gigatrain.site import Site


def fleet(rows: Sequence[Row], watts: Watts, site: Site, megawatts: float, at: str) -> dict[str, Any]:
    """How fast a whole site would be with each variant under `megawatts`: {"best", "rows", "why", "assumes"}; fills in the rows' columns.

    Accelerators that the megawatts feed at boundary `at`, in whole nodes where the site says what a node holds, and no more than it has; each as fast as
    measured. Raises SiteError where they feed none.
    """
    has, each = site.accelerators.value, watts.per_node or int(site.node.accelerators.value or 0)
    found: list[dict[str, Any]] = []
    for row in rows:
        apiece, speed = row[f"watts_{at}"] / row["accelerators"], row["tokens_per_s"] / row["accelerators"]
        fed = math.floor(megawatts * 1e6 / apiece)
        count = min(fed, int(has)) if has else fed
        if each:
            count -= count % each
        row |= {"megawatts": megawatts, "site_accelerators": count, "site_tokens_per_s": count * speed}
        found.append(
            {
                "variant": row["variant"],
                "accelerators": count,
                "watts_each": apiece,
                "tokens_per_s_each": speed,
                "tokens_per_s": count * speed,
            }
            | {"watts": count * apiece, "all": bool(has) and fed >= (has or 0)}
        )
    if not any(one["accelerators"] for one in found):
        least = min(one["watts_each"] for one in found) * max(1, each)
        raise SiteError(
            f"--megawatts {megawatts:g} feeds no {'node' if each else 'accelerator'}: {shown(least)} is the least that one takes; give more"
        )
    best = max(found, key=lambda one: (one["tokens_per_s"], -one["watts"]))
    fastest = max(found, key=lambda one: one["tokens_per_s_each"])
    if best["all"]:
        why = f"{megawatts:g} MW feed all {has:,.0f} accelerators of {site.name}, so the fastest of those wins: watts are not what is short"
    elif best is fastest:
        why = "the fastest accelerator is also the one that gives most for a watt"
    else:
        why = (
            f"more, slower accelerators: {best['accelerators']:,} at {best['watts_each']:,.0f} W beat {fastest['accelerators']:,} of {fastest['variant']} at "
            f"{fastest['watts_each']:,.0f} W, {best['tokens_per_s'] / max(1.0, fastest['tokens_per_s']):.3f} times the tokens/s"
        )
    assumes = ["each accelerator is as fast among many as it was measured (perfect weak scaling): an assumption, not a measurement"]
    if at != "facility":
        assumes.append(f"{megawatts:g} MW at the boundary {at!r}: what lies beyond it (cooling, PUE) is unknown here and comes on top")
    if not each:
        assumes.append("single accelerators: the site does not say what a node holds (node.accelerators)")
    if not has:
        assumes.append("as many accelerators as the megawatts feed: how many the site has is unknown")
    if unjudged := [row["variant"] for row in rows if row["loss_neutral"] is None and row["variant"] != BASELINE]:
        assumes.append(
            f"that the loss of {', '.join(unjudged)} is the baseline's: unknown, its spread takes {LOSSES} runs or more (--rounds)"
        )
    return {"best": best, "rows": found, "why": why, "assumes": assumes, "boundary": at, "megawatts": megawatts}


def excluded(good: Sequence[Row], damaged: Mapping[str, str], best: Mapping[str, Any], at: str) -> list[str]:
    """Those that would have been chosen before the best one, were it not for their loss."""
    found = []
    for row in good:
        if why := damaged.get(row["variant"]):
            apiece = best["best"]
            faster = row["tokens_per_s"] / row["accelerators"] / apiece["tokens_per_s_each"]
            thriftier = row[f"tokens_per_joule_{at}"] / (apiece["tokens_per_s_each"] / apiece["watts_each"])
            if max(faster, thriftier) > 1:
                found.append(
                    f"{row['variant']}, {faster:.3f} times the tokens/s and {thriftier:.3f} times the tokens/J of {apiece['variant']}, is {why}"
                )
    return found
