"""A plan's picture from what the planner's parts say of it: estimate, draw, goodput and search in, picture.py's record out. Free of torch."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from gigatrain.errors import PlanError
from gigatrain.planning import hardware, picture
from gigatrain.planning.estimate import energy, goodput, search
from gigatrain.planning.estimate.cluster import Cluster
from gigatrain.planning.estimate.energy import Draw
from gigatrain.planning.estimate.estimate import estimate as estimated
from gigatrain.planning.estimate.work import Estimate
from gigatrain.planning.estimate.workload import Workload
from gigatrain.planning.expected import Expected
from gigatrain.planning.picture import Boundary, Candidate, PlanPicture, Sensitivity, WhatIf
from gigatrain.planning.watts import Watts

LIMITS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the power limit that the plan has, for the slider
DAY_S = 86400.0


def depict(
    title: str,
    expected: Expected,
    workload: Workload,
    cluster: Cluster,
    estimate: Estimate,
    *,
    summary: str = "",
    facts: tuple[tuple[str, str], ...] = (),
    lines: tuple[str, ...] = (),
    watts: Watts | None = None,
    draw: Draw | None = None,
    case: goodput.Case | None = None,
    tokens: float | None = None,
    found: Sequence[search.Candidate] = (),
    cluster_of: Callable[[int], Cluster] | None = None,
    counts: Sequence[int] = picture.COUNTS,
) -> PlanPicture:
    """Whatever is not given is not on the page. `case` is of this run's failures, `tokens` are the whole run's, `cluster_of` is by accelerators."""
    kept = None if case is None else goodput.expected(case)
    roof, points = picture.roofline(workload, cluster)

    def good(count: int, of: Estimate) -> float | None:
        if case is None:
            return None
        share = count / case.accelerators
        best = replace(case.saving, far_interval_s=0.0)  # each size saves as often as is best for it
        grown = replace(case, accelerators=count, step_s=of.step_s, replicas=max(1, round(case.replicas * share)), saving=best)
        return goodput.expected(grown).share

    def drawn(count: int, of: Estimate) -> float | None:
        if watts is None or cluster_of is None:
            return None
        facility = energy.draw(of, workload, cluster_of(count), watts.model_copy(update={"accelerators": count})).watts.get("facility")
        return None if facility is None else facility.mid

    curve = ()
    if cluster_of is not None:
        own = cluster.accelerators
        curve = picture.scaling(workload, cluster_of, tuple(sorted({*counts, own})), goodput_of=good, watts_of=drawn)
    chosen = picture.layout_words(workload.layout)
    return PlanPicture(
        title=title,
        summary=summary,
        facts=facts,
        lines=lines,
        expected=expected,
        estimate=estimate,
        memory_limit=cluster.memory_bytes,
        roles=picture.roles(workload, cluster, estimate, draw.states if draw else None),
        candidates=tuple(_candidate(one, chosen) for one in found),
        roof=roof,
        points=points,
        scaling=curve,
        scaled="This plan's layout: copies are added, and with them samples of a step. Each size saves as often as is best for it."
        if curve
        else "",
        boundaries=_boundaries(draw) if draw else (),
        states=draw.states if draw else {},
        sensitivity=_sensitivity(expected, case, kept) if case and kept else (),
        sources=draw.sources if draw else (),
        what_if=None if tokens is None else _what_if(workload, cluster, watts, draw, case, kept, tokens),
    )


def _candidate(one: search.Candidate, chosen: str) -> Candidate:
    of = one.estimate
    name = picture.layout_words(one.layout)
    more = f"{name}; microbatch {one.microbatch} x {one.accumulation}, recompute {one.recompute}"
    return Candidate(
        more,
        of.step_s,
        of.low_s,
        of.high_s,
        of.phases,
        of.memory_bytes,
        of.fits,
        of.tokens_per_s,
        "" if one.why else of.limits,
        one.why,
        name == chosen,
    )


def _boundaries(draw: Draw) -> tuple[Boundary, ...]:
    nodes = draw.nameplate.value is not None and draw.typical.value is not None
    found = []
    for name in energy.BOUNDARIES:
        if name in draw.watts:
            said = (
                f"a node as it was metered or taken to be: {draw.typical.value:,.0f} W, {draw.typical.source}"
                if nodes and name == "node"
                else ""
            )
            found.append(Boundary(name, draw.watts[name], draw.peak.get(name), None, said))
    return tuple(found)


def _sensitivity(expected: Expected, case: goodput.Case, kept: goodput.Goodput) -> tuple[Sensitivity, ...]:
    """Half and double of what matters most; days and euros go as goodput does."""
    rows = []
    for effect in goodput.sensitivity(case)[:5]:
        for changed, points in (("half of it", effect.halved), ("twice as much", effect.doubled)):
            share = kept.share + points / 100
            if share > 0:
                longer = kept.share / share
                days = None if expected.days is None else expected.days.mid * longer
                rows.append(Sensitivity(effect.name, changed, share, days, None if expected.eur is None else expected.eur.mid * longer))
    return tuple(rows)


def _what_if(
    workload: Workload,
    cluster: Cluster,
    watts: Watts | None,
    draw: Draw | None,
    case: goodput.Case | None,
    kept: goodput.Goodput | None,
    tokens: float,
) -> WhatIf:
    count = cluster.accelerators
    rate = save_s = recovery_s = None
    if case is not None and kept is not None:
        rate = case.failures.per_s(case.accelerators, case.days, case.per_node) * DAY_S / case.accelerators * 1000
        save_s, recovery_s = case.saving.far_stall_s(case.accelerators), kept.recovery_s
    limits, most = (), cluster.cap_watts or hardware.chip(cluster.chip).watts.value
    if most is not None and watts is not None:

        def device(capped: Cluster, of: Estimate) -> float | None:
            try:
                each = energy.draw(of, workload, capped, watts).device
            except PlanError:  # below what idles
                return None
            return None if each is None else each.mid

        limits = picture.caps(workload, cluster, [share * most for share in LIMITS], device, estimated)
    it = draw.watts.get("it") if draw else None
    return WhatIf(
        count,
        tokens,
        rate,
        save_s,
        recovery_s,
        None if it is None else it.mid / count,
        None if watts is None else watts.pue.value,
        None if watts is None else watts.price_eur_mwh.value,
        None if watts is None else watts.carbon_g_kwh.value,
        limits,
    )
