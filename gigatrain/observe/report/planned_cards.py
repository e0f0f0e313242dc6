"""Cards of a plan's page: where time, bytes and watts go, the layouts beside each other, the roof, the scaling curve and what is lost."""

from collections.abc import Mapping, Sequence

from gigatrain.observe.report import words
from gigatrain.observe.report.logscale import Dot, Line, Scales, chart
from gigatrain.observe.report.parts import bars, card, cell, figure, head, lacking, pairs, scrolled, sentence, table, unknown
from gigatrain.observe.report.words import escaped, number, per_cent, quoted, span
from gigatrain.planning.drift import bare
from gigatrain.planning.expected import Expected
from gigatrain.planning.picture import Boundary, Candidate, PlanPicture, Role

# Groups of phases, of kinds of work and of bytes, each with its colour: six are told apart, and more are not.
TIME: dict[str, tuple[int, tuple[str, ...]]] = {
    "products": (0, ("gemm", "grouped")),
    "attention": (3, ("attention",)),
    "memory passes": (2, ("memory", "optimizer")),
    "transfers": (1, ("tensor", "context", "expert", "shard", "replicate", "pipeline", "communication")),
    "bubble": (5, ("bubble",)),
    "launches, waits": (4, ("launch", "host", "wait", "idle")),
}
BYTES: dict[str, tuple[int, tuple[str, ...]]] = {
    "weights": (0, ("weights",)),
    "gradients": (1, ("gradients",)),
    "optimizer": (2, ("optimizer",)),
    "activations": (3, ("activations",)),
    "workspace": (5, ("workspace", "buffers")),
    "slack": (4, ("slack",)),
}
LAYERS = {"device": "accelerators", "node": "rest of the nodes", "it": "fabric and storage", "facility": "cooling and losses"}
CALLED = {"device": "accelerators", "node": "nodes", "it": "IT", "facility": "facility"}
PHASES = {
    "gemm": "products of matrices", "grouped": "products of experts", "attention": "attention", "memory": "passes over memory",
    "optimizer": "the optimizer", "launch": "launches by the host", "bubble": "the pipeline's bubble", "tensor": "tensor-parallel transfers",
    "context": "context-parallel transfers", "expert": "transfers of tokens to experts", "shard": "weights and gradients between shards",
    "replicate": "gradients between replicas", "pipeline": "transfers between stages", "wait": "waits for the slowest node", "host": "the host's work",
}  # fmt: skip
LOST = {
    "checkpoint": "saving", "redone": "steps done again after a failure", "restart": "until the first step after one",
    "detection": "until a failure is noticed",
    "wait": "for a node in repair", "corruption": "trained on in vain", "maintenance": "planned", "reduced": "with fewer replicas",
    "paced": "for a power budget",
}  # fmt: skip
ROLES = 12  # pipeline ranks that are drawn
ROOFED = 12  # operations of the roofline
SEEN = 0.003  # of all work: an operation of less has no mark there


def step(picture: PlanPicture) -> str:
    """Phases that add up to a step, each where the one before it ends."""
    phases = picture.expected.phases or (picture.estimate.phases if picture.estimate else {})
    whole = sum(phases.values())
    if not whole:
        return lacking("h2", "A step", picture.expected.unknown.get("step_s", "no speed is estimated"), wide=True)
    rows, begin = [], 0.0
    for name, seconds in sorted(phases.items(), key=lambda one: -one[1]):
        if seconds > 0:
            kind = bare(name)
            tone = next((tone for tone, kinds in TIME.values() if kind in kinds), 4)
            rows.append(
                (
                    name.replace("_", " "),
                    PHASES.get(kind, ""),
                    begin,
                    seconds / whole,
                    tone,
                    words.seconds(seconds),
                    per_cent(seconds / whole),
                )
            )
            begin += seconds / whole
    rows.append(("step", "all of these", 0.0, 1.0, 4, words.seconds(whole), per_cent(1.0)))
    text = "Of the slowest rank. A transfer counts for what of it no work hides."
    return card("h2", "A step", text, bars(("phase", "of a step", "time", "share"), rows), wide=True)


def _grouped(parts: Mapping[str, float], groups: Mapping[str, tuple[int, tuple[str, ...]]]) -> list[tuple[str, int, float]]:
    """Name, colour and sum of each group that has anything; what no group names is in the last."""
    found = dict.fromkeys(groups, 0.0)
    of = {kind: name for name, (_, kinds) in groups.items() for kind in kinds}
    for part, value in parts.items():
        found[of.get(bare(part), list(groups)[-1])] += value
    return [(name, groups[name][0], value) for name, value in found.items() if value > 0]


def _stack(label: str, parts: Sequence[tuple[str, int, float]], whole: float) -> str:
    """One bar of several parts; `whole` is what its full width stands for."""
    spans = "".join(
        f"<span class=s{tone} style='width:{100 * value / whole:.4g}%' title={quoted(name)}>{escaped(name) * (value > 0.0155 * len(name) * whole)}</span>"
        for name, tone, value in parts
        if value > 0
    )
    said = ", ".join(f"{name} {per_cent(value / whole)}" for name, _, value in parts)
    return f"<div class=stack role=img aria-label={quoted(f'{label}: {said}')}>{spans}</div>"


def _legend(groups: Mapping[str, tuple[int, tuple[str, ...]]], used: Sequence[Sequence[tuple[str, int, float]]]) -> str:
    there = {name for parts in used for name, _, _ in parts}
    return (
        "<ul class=legend>"
        + "".join(f"<li><i class=s{groups[name][0]}></i>{escaped(name)}</li>" for name in groups if name in there)
        + "</ul>"
    )


def _some(roles: Sequence[Role]) -> tuple[list[Role], str]:
    if len(roles) <= ROLES:
        return list(roles), ""
    chosen = sorted({round(at * (len(roles) - 1) / (ROLES - 1)) for at in range(ROLES)})
    return [roles[at] for at in chosen], f" {len(chosen)} of {len(roles)} are shown."


def roles(picture: PlanPicture) -> str:
    if not picture.roles:
        return lacking("h2", "Time by role", "the work of the ranks was not given", wide=True)
    roles, some = _some(picture.roles)
    stacks = [_grouped(role.seconds, TIME) for role in roles]
    whole = max(sum(value for _, _, value in parts) for parts in stacks) or 1.0
    rows = []
    for role, parts in zip(roles, stacks, strict=True):
        wait = role.seconds.get("wait", 0.0)
        drawn = cell(f"{role.watts:,.0f} W") if role.watts is not None else unknown("unknown")
        rows.append(
            f"{head(role.name)}<td class=b>{_stack(role.name, parts, whole)}</td>{cell(words.seconds(whole - wait))}"
            f"{cell(words.seconds(wait))}{cell(words.seconds(role.communication_s))}{drawn}"
        )
    text = "Seconds of a step by kind of work. Waits are for transfers that no work hides, the pipeline and the host; transfers counts all, hidden or not."
    names = ("role", "a step", "works", "waits", "transfers", "device draws")
    whole_table = table(names, rows, kind="stacked", right=(2, 3, 4, 5))
    return card("h2", "Time by role", text + some, _legend(TIME, stacks) + scrolled("Time by role", whole_table), wide=True)


def held(picture: PlanPicture) -> str:
    roles, some = _some([role for role in picture.roles if role.memory])
    if not roles and picture.estimate is not None:
        roles = [Role("fullest rank", {}, picture.estimate.memory)]
    if not roles:
        return lacking("h2", "Memory by role", picture.expected.unknown.get("memory_bytes", "no memory is estimated"), wide=True)
    stacks = [_grouped(role.memory, BYTES) for role in roles]
    limit = picture.memory_limit
    most = max(sum(value for _, _, value in parts) for parts in stacks)
    whole = max(most, limit or 0.0) or 1.0
    rows = []
    for role, parts in zip(roles, stacks, strict=True):
        held = sum(value for _, _, value in parts)
        cells = cell(words.size(held)) + (cell(words.size(limit - held)) if limit else unknown("the limit is unknown"))
        biggest = max(parts, key=lambda one: one[2])
        rows.append(
            f"{head(role.name)}<td class=b>{_stack(role.name, parts, whole)}</td>{cells}{sentence(f'{biggest[0]} {words.size(biggest[2])}')}"
        )
    full = f" A full bar is the device's {words.size(limit)}." if limit and whole == limit else ""
    over = f" The fullest needs more than the device's {words.size(limit)}." if limit and most > limit else ""
    text = f"Peak bytes of a rank.{full}{over}{some}"
    whole_table = table(("role", "bytes", "peak", "left", "most of it"), rows, kind="stacked", right=(2, 3))
    return card("h2", "Memory by role", text, _legend(BYTES, stacks) + scrolled("Memory by role", whole_table), wide=True)


def drawn(boundaries: Sequence[Boundary], expected: Expected) -> str:
    if not boundaries:
        return lacking("h2", "Watts", "; ".join(expected.unknown.get(key, "") for key in ("watts",)).strip("; ") or "no draw is estimated")
    whole = max(max(one.mean.high, one.peak or 0.0) for one in boundaries) or 1.0
    rows, before = [], 0.0
    for at, one in enumerate(boundaries):
        note = f"within {words.watts(one.mean.low)} to {words.watts(one.mean.high)}"
        more, most = max(0.0, one.mean.mid - before), f"peak {words.watts(one.peak)}" if one.peak else "peak unknown"
        tone = (0, 2, 3, 1)[at % 4]
        if at:
            rows.append((f"+ {LAYERS.get(one.name, one.name)}", "", before / whole, more / whole, tone, words.watts(more), ""))
        called = CALLED.get(one.name, one.name)
        rows.append((f"= {called}" if at else called, note, 0.0, one.mean.mid / whole, 4 if at else tone, words.watts(one.mean.mid), most))
        before = one.mean.mid
    inside = bars(("boundary", "mean while it trains", "watts", "at most"), rows)
    if any(one.nameplate for one in boundaries):
        inside += pairs(
            [(f"nameplate, {CALLED.get(one.name, one.name)}", words.watts(one.nameplate)) for one in boundaries if one.nameplate], "kv2"
        )
    sources = "".join(f"<li>{escaped(one.source)}</li>" for one in boundaries if one.source)
    return card(
        "h2",
        "Watts",
        "Of the whole run; each boundary holds the one above it.",
        inside + (f"<ul class=plainlist>{sources}</ul>" if sources else ""),
    )


def states(states: Mapping[str, float]) -> str:
    if not states:
        return lacking("h2", "One accelerator, by what it does", "its watts by kind of work are not known")
    top = max(states.values()) or 1.0
    ordered = sorted(states.items(), key=lambda one: -one[1])
    rows = [(PHASES.get(kind, kind), "", 0.0, watts / top, 0, f"{watts:,.0f} W", per_cent(watts / top)) for kind, watts in ordered]
    return card("h2", "One accelerator, by what it does", "Watts of the device.", bars(("work", "of the most", "watts", "share"), rows))


def layouts(picture: PlanPicture) -> str:
    found = picture.candidates
    if not found:
        return lacking("h2", "Layouts", "none were compared: gigatrain plan --top 5 searches", wide=True)
    stacks = [_grouped(one.phases, TIME) for one in found]
    whole = max(one.step_s for one in found) or 1.0
    first = min(one.step_s for one in found)
    rows = [_layout(one, parts, whole, first, picture.memory_limit) for one, parts in zip(found, stacks, strict=True)]
    cells = "".join(
        f"<th scope=col{' class=r' * (at in (2, 3, 4))}>{name}</th>"
        for at, name in enumerate(("layout", "a step", "step", "tokens/s", "memory", "what limits it, and why it is here"))
    )
    body = "".join(f"<tr{' class=chosen' * one.chosen}>{row}</tr>" for one, row in zip(found, rows, strict=True))
    inside = f"<table class='stacked layouts'><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
    text = "The best of each kind that the search found, by their bars' common scale. Where intervals overlap, a pilot of 20 steps decides (--pilots)."
    text += " Tinted: this plan's." * any(one.chosen for one in found)
    return card("h2", "Layouts", text, _legend(TIME, stacks) + scrolled("Layouts", inside), wide=True)


def _layout(one: Candidate, parts: Sequence[tuple[str, int, float]], whole: float, first: float, limit: float | None) -> str:
    between = f"{words.seconds(one.low_s)} to {words.seconds(one.high_s)}"
    behind = "" if one.step_s == first else f"+{(one.step_s / first - 1) * 100:.1f} %; "
    fits = {True: "fits", False: "does not fit", None: "limit unknown"}[one.fits]
    share = f"{per_cent(one.memory_bytes / limit)}, {fits}" if limit else fits
    said = "; ".join(text for text in (one.limits, one.why) if text) or "nothing said"
    return (
        f"{head(one.name)}<td class=b>{_stack(one.name, parts, whole)}</td>{cell(words.seconds(one.step_s), behind + between)}"
        f"{cell(number(one.tokens_per_s))}{cell(words.size(one.memory_bytes), share)}{sentence(said)}"
    )


def roof(picture: PlanPicture) -> str:
    roof = picture.roof
    points = [one for one in picture.points if one.flops > 0 and one.bytes > 0 and one.seconds > 0]
    if roof is None or not points:
        return lacking("h2", "Roofline", "the chip's rates or the operations' are not known")
    whole = sum(one.seconds for one in picture.points) or 1.0
    shown = [one for one in points if one.seconds >= SEEN * whole][:ROOFED] or points[:1]
    intensities = [one.intensity or 0.0 for one in shown]
    low = min(*intensities, *(peak / roof.bytes_s for peak in roof.peaks.values())) / 3
    high = max(*intensities, *(peak / roof.bytes_s for peak in roof.peaks.values())) * 3
    lines = [
        Line(f"{name} roof", [(low, low * roof.bytes_s), (peak / roof.bytes_s, peak), (high, peak)], at, last=number(peak, 3))
        for at, (name, peak) in enumerate(roof.peaks.items())
    ]
    tones = {kind: tone for tone, kinds in TIME.values() for kind in kinds}
    dots = [
        Dot(one.name, one.intensity or low, one.flops / one.seconds, 6 + 20 * (one.seconds / whole) ** 0.5, tones.get(one.kind, 4))
        for one in shown
    ]
    picture_ = chart(
        "Roofline",
        lines,
        dots,
        Scales("FLOPs per byte of memory", "FLOP/s of one rank", x_shown=_count, y_shown=lambda it: number(it, 3)),
        wide=True,
    )
    rows = []
    for one in picture.points[: 2 * ROOFED]:
        rate = cell(number(one.flops / one.seconds, 3)) if one.flops and one.seconds else sentence("no products")
        moved = cell(f"{one.bytes / one.seconds / 1e12:,.2f} TB/s") if one.bytes and one.seconds else unknown("unknown")
        at = cell(number(one.intensity, 3)) if one.intensity else cell("0")
        rows.append(f"{head(one.name, one.kind)}{at}{rate}{moved}{cell(words.seconds(one.seconds))}{cell(per_cent(one.seconds / whole))}")
    names = ("operation", "FLOPs per byte", "FLOP/s", "bytes/s", "of a step", "of all work")
    behind = (
        f"<details><summary>Numbers of this picture</summary>{scrolled('Operations', table(names, rows, right=(1, 2, 3, 4, 5)))}</details>"
    )
    least = len(picture.points) - len(shown)
    text = f"{roof.chip}: what its memory ({roof.bytes_s / 1e12:,.2f} TB/s) and its tensor cores allow as sold, and what the estimate has this "
    text += (
        "plan's operations reach. A mark is as large as its share of the time."
        + f" {least} that have no FLOPs, or hardly any time, are in its numbers only." * bool(least)
    )
    return figure("h2", "Roofline", text, picture_, behind, wide=True)


def scaling(picture: PlanPicture) -> list[str]:
    known = [row for row in picture.scaling if row.tokens_per_s]
    if not known:
        return [lacking("h2", "Scaling", "no curve was asked for", wide=True)]
    first = known[0]
    each = (first.tokens_per_s or 0.0) / first.accelerators
    trained = [(float(row.accelerators), row.tokens_per_s or 0.0) for row in known]
    kept = [(float(row.accelerators), (row.tokens_per_s or 0.0) * row.goodput) for row in known if row.goodput is not None]
    ideal = [(float(row.accelerators), each * row.accelerators) for row in (first, known[-1])]
    lines = [
        Line("as many times", ideal, dashed=True, last=number(ideal[-1][1], 3)),
        Line("trained", trained, 0, last=number(trained[-1][1], 3)),
    ]
    if kept:
        lines.append(Line("kept", kept, 1, last=number(kept[-1][1], 3)))
    rows = []
    for row in picture.scaling:
        if row.tokens_per_s is None or row.step_s is None:
            rows.append(head(f"{row.accelerators:,}") + unknown(row.unknown or "no figure", 6))
            continue
        share = row.tokens_per_s / row.accelerators / each
        rows.append(
            f"{head(f'{row.accelerators:,}', row.layout)}{cell(number(row.batch, 9))}{cell(words.seconds(row.step_s))}{cell(number(row.tokens_per_s, 3))}"
            f"{cell(per_cent(share))}{unknown('unknown') if row.goodput is None else cell(per_cent(row.goodput))}"
            f"{unknown('unknown') if row.facility_watts is None else cell(words.watts(row.facility_watts))}"
        )
    names = ("accelerators", "samples a step", "step", "tokens/s", "of the first's, each", "goodput", "facility")
    behind = f"<details><summary>Numbers of this picture</summary>{scrolled('Scaling', table(names, rows, right=range(1, 7)))}</details>"
    lacked = [row for row in picture.scaling if row.tokens_per_s is None]
    text = (
        picture.scaled or "The layout as it is; copies are added, and samples of a step with them."
    ) + " Dashed: as many times the first."
    text += f" {len(lacked)} numbers of accelerators have no figure; the numbers say why." * bool(lacked)
    title = f"Scaling, {first.accelerators:,} to {known[-1].accelerators:,}"
    found = [figure("h2", title, text, chart(title, lines, [], Scales("accelerators", "tokens/s", x_shown=_count)), behind)]
    shares = [(float(row.accelerators), min(1.0, (row.tokens_per_s or 0.0) / row.accelerators / each)) for row in known]
    curves = [Line("speed of each", shares, 0, last=per_cent(shares[-1][1]))]
    good = [(float(row.accelerators), row.goodput) for row in known if row.goodput is not None]
    if good:
        both = [(x, y * next(share for at, share in shares if at == x)) for x, y in good]
        curves += [Line("goodput", good, 1, last=per_cent(good[-1][1])), Line("both", both, 2, last=per_cent(both[-1][1]))]
    text = "Speed of each accelerator over the first row's, the share of wall-clock that is kept, and the two together: what one accelerator yields."
    picture_ = chart(
        "What one accelerator yields",
        curves,
        [],
        Scales("accelerators", "share", percent=True, x_shown=_count, y_shown=lambda it: f"{it * 100:.0f} %"),
    )
    found.append(figure("h2", "What one accelerator yields", text, picture_, ""))
    return found


def _count(value: float) -> str:
    return f"{value / 1000:,.6g}k" if value >= 1000 else f"{value:,.6g}"


def losses(picture: PlanPicture) -> str:
    expected = picture.expected
    lost = {name: share for name, share in expected.lost.items() if share > 0}
    if expected.goodput is None:
        return lacking("h2", "Goodput", expected.unknown.get("goodput", "no goodput is estimated"))
    rows = [("wall-clock", "", 0.0, 1.0, 4, "", per_cent(1.0))]
    left = 1.0
    for name, share in sorted(lost.items(), key=lambda one: -one[1]):
        left -= share
        rows.append((f"−\u00a0{name}", LOST.get(name, ""), max(0.0, left), share, 1, _days(share, expected), per_cent(share)))
    rows.append(
        (
            "=\u00a0training",
            "steps that are kept",
            0.0,
            expected.goodput.mid,
            2,
            _days(expected.goodput.mid, expected),
            per_cent(expected.goodput.mid),
        )
    )
    text = f"90 % of such runs keep {per_cent(expected.goodput.low)} to {per_cent(expected.goodput.high)}."
    if expected.checkpoint_every:
        text += f" Saving every {expected.checkpoint_every:,} steps would be best."
    return card("h2", "Goodput", text, bars(("class", "of wall-clock", "time", "share"), rows))


def _days(share: float, expected: Expected) -> str:
    return span(share * expected.days.mid * 86400) if expected.days is not None else ""


def sensitivity(picture: PlanPicture) -> str:
    if not picture.sensitivity:
        return lacking("h2", "Sensitivity", "no change of an assumption was tried")
    rows = []
    for one in picture.sensitivity:
        good = unknown("unknown") if one.goodput is None else cell(per_cent(one.goodput))
        days = unknown("unknown") if one.days is None else cell(number(one.days, 4))
        money = unknown("unknown") if one.eur is None else cell(number(one.eur, 3))
        rows.append(f"{head(one.what, one.changed)}{good}{days}{money}")
    return card(
        "h2",
        "Sensitivity",
        "One assumption changed at a time.",
        table(("what", "goodput", "days", "€"), rows, kind="plain", right=(1, 2, 3)),
    )
