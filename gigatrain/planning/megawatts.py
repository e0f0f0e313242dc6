"""Megawatts first: how many of which accelerators, at which cap, train most under them; and whether what a site promises fits into what it may draw.

    options(workload, megawatts, pue)   every accelerator of hardware.py at a grid of caps: how many fit, what they train, best first; unknown ones by name
    explain(site)                       a site's own arithmetic, line by line: count x (node + fabric) x storage x PUE against what it may draw

Records, each with `text`; `report` and `explained` are the lines that the CLI prints. Watts are energy.py's and watts.py's; nothing unknown is guessed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from gigatrain.errors import PlanError
from gigatrain.planning import hardware, watts
from gigatrain.planning.estimate import energy
from gigatrain.planning.estimate.cluster import Cluster, Level
from gigatrain.planning.estimate.work import Estimate
from gigatrain.planning.estimate.workload import Workload
from gigatrain.planning.expected import Range
from gigatrain.site import UNKNOWN, Accelerator, Figure, Network, Node, Power, Site

CAPS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of what a chip is sold with; further down published sweeps contradict each other (energy.EXPONENT)
PUES = (1.0, 1.1, 1.2, 1.3)  # shown where a site's own is unknown: 1.0 is IT alone, 1.1 warm water, 1.2 and 1.3 halls cooled by air
_PER_NODE = {"gh200": 4, "gh200-144": 4, "gb200": 4, "gb300": 4, "rubin": 4, "mi250x": 4, "a100-64": 4, "h100-64": 4}
FABRIC_LEAST = (
    116.0 * 0.67
)  # W: switches of twice the bits draw about the watts of those before, so that a rule by bits is an upper end beyond 400 Gbit/s

Estimator = Callable[[Workload, Cluster], Estimate]


@dataclass(frozen=True, slots=True)
class Option:
    """One accelerator at one cap under the megawatts; watts of one accelerator are its share of the facility. `unknown` says why there are no numbers."""

    chip: str
    cap_watts: float | None = None
    accelerators: int = 0
    watts: Range | None = None  # each, at the facility
    device_watts: float = 0.0
    tokens_per_s: float = 0.0  # of all, before losses
    goodput: float | None = None  # None: losses are not taken off
    kept: Range | None = None  # share of the uncapped compute rate
    limits: str = ""
    unknown: str = ""
    samples: int = 0  # of a step: the layout's, times its copies

    @property
    def goodput_tokens_per_s(self) -> float:
        return self.tokens_per_s * (1.0 if self.goodput is None else self.goodput)

    def text(self, megawatts: float) -> str:
        """`b200 700 W  152,000 x 1,316 W (1,201 to 1,440)  203 Mtok/s kept (goodput 0.84), 1.02 Mtok/s/MW, 92% (85% to 95%) of the compute rate; ...`"""
        if self.unknown or self.watts is None:
            return f"{self.chip:10}  {self.unknown}"
        kept = f"kept (goodput {self.goodput:.2f})" if self.goodput is not None else "before losses"
        share = (
            f", {self.kept.mid:.0%} ({self.kept.low:.0%} to {self.kept.high:.0%}) of the compute rate"
            if self.kept and self.kept.mid < 1
            else ""
        )
        used = self.accelerators * self.watts.mid / 1e6
        spare = "" if used > 0.9 * megawatts else f"; {used:,.1f} of the {megawatts:g} MW: more would lose more than they train"
        return (
            f"{self.chip:10} {self.cap_watts:5,.0f} W  {self.accelerators:9,} x {self.watts.mid:5,.0f} W ({self.watts.low:,.0f} to {self.watts.high:,.0f})  "
            f"{_rate(self.goodput_tokens_per_s)} {kept}, {_rate(self.goodput_tokens_per_s / megawatts)}/MW{share}; "
            f"steps of {self.samples:,} samples; {self.limits}{spare}"
        )


def options(
    workload: Workload,
    megawatts: float,
    pue: float,
    chips: Iterable[str] | None = None,
    caps: Sequence[float] = CAPS,
    goodput: Callable[[int], float] | None = None,
    estimator: Estimator | None = None,
    around: energy.Server | None = None,
) -> tuple[Option, ...]:
    """Each of `chips` (all) at each cap (shares of what it is sold with), most goodput first; then those that are unknown or do not fit, with the reason.

    The workload's layout is kept and repeated: more replicas, each with the same microbatches, so a step's batch grows with them. `goodput`: retained share of
    the wall-clock by accelerators; None: nothing is taken off. Raises PlanError for megawatts or a PUE that cannot be.
    """
    if megawatts <= 0 or pue < 1:
        raise PlanError(f"{megawatts:g} MW at a PUE of {pue:g}: megawatts are above 0, and a PUE is at least 1")
    if estimator is None:
        from gigatrain.planning.estimate.estimate import estimate as estimator  # it needs all parts of the model, and explain() none

    found: list[Option] = []
    for name in chips if chips is not None else hardware.CHIPS:
        chip = hardware.chip(name)
        sold = chip.watts.value
        if sold is None:
            found.append(Option(name, unknown=f"how many watts a {chip.name} may draw is not published"))
            continue
        for cap in caps:
            one = _option(workload, 1e6 * megawatts, pue, chip, cap * sold, goodput, estimator, around)
            found.append(one)
            if one.unknown:
                break  # the reason is the chip's, not the cap's, but for a cap that is too low, which is the last
    return tuple(sorted(found, key=lambda one: (bool(one.unknown), -one.goodput_tokens_per_s)))


def report(found: Sequence[Option], megawatts: float, pue: float, best: int = 12) -> Iterator[str]:
    """Lines for a reader: the best, the best of each other accelerator, and what is unknown."""
    yield f"{megawatts:g} MW at the facility, PUE {pue:g}: count x watts of each with its share of everything, and what they train; prices are not counted"
    shown = [one for one in found if not one.unknown]
    if shown and shown[0].cap_watts == min(one.cap_watts or 0.0 for one in shown if one.chip == shown[0].chip):
        yield "the best is at the lowest cap that was tried: more and slower ones win as long as only watts count; the price of accelerators sets the end"
    seen: set[str] = set()
    for place, one in enumerate(shown):
        if place < best or one.chip not in seen:
            yield one.text(megawatts)
        seen.add(one.chip)
    yield from (one.text(megawatts) for one in found if one.unknown and one.chip not in seen)


def _option(
    workload: Workload, facility: float, pue: float, chip: hardware.Chip, cap: float, goodput: Callable[[int], float] | None, estimator: Estimator,
    around: energy.Server | None,
) -> Option:  # fmt: skip
    packages = max(1, -(-workload.layout.ranks // chip.devices))  # of one copy of the layout

    def held(copies: int) -> tuple[Estimate, energy.Draw, Range]:
        """So many copies of the layout, with what one accelerator takes of the facility."""
        grown = replace(workload, layout=replace(workload.layout, replicate=workload.layout.replicate * copies))
        cluster = cluster_of(chip.id, packages * copies, cap)
        guess = estimator(grown, cluster)
        if guess.fits is False:
            told = f"{guess.memory_bytes / 2**30:.0f} GiB, and {(cluster.memory_bytes or 0) / 2**30:.0f} are there"
            raise PlanError(f"this layout does not fit: a rank holds {told}")
        drawn = energy.draw(guess, grown, cluster, watts_of(chip.id, cluster.accelerators, pue), around)
        if "facility" not in drawn.watts:
            raise PlanError(drawn.unknown["facility"])
        whole, count = drawn.watts["facility"], cluster.accelerators
        return guess, drawn, Range(low=whole.low / count, mid=whole.mid / count, high=whole.high / count)

    try:
        copies = 1
        guess, drawn, each = held(copies)
        for _ in range(4):  # how many fit depends on what one draws, which falls a little as more wait for each other
            fit = int(facility // each.mid) // packages
            if not fit:
                raise PlanError(f"{facility / 1e6:g} MW do not hold one copy of the layout: {packages:,} x {each.mid:,.0f} W")
            if fit == copies:
                break
            copies = fit
            guess, drawn, each = held(copies)
        if goodput is not None:
            copies = _best(copies, lambda count: held(count)[0].tokens_per_s * goodput(packages * count))
            guess, drawn, each = held(copies)
        kept = energy.capped_rate(chip.id, cap)
    except PlanError as why:
        return Option(chip.id, cap, unknown=str(why))
    count = packages * copies
    return Option(
        chip=chip.id, cap_watts=cap, accelerators=count, watts=each, device_watts=drawn.watts["device"].mid / count, tokens_per_s=guess.tokens_per_s,
        goodput=None if goodput is None else goodput(count), kept=kept, limits=guess.limits, samples=workload.batch * copies,
    )  # fmt: skip


def _best(most: int, kept: Callable[[int], float]) -> int:
    """How many copies, of at most `most`, keep most: half of them again and again, while that keeps more than all did."""
    best, most_kept = most, kept(most)
    while best > 1 and (less := kept(best // 2)) > most_kept:
        best, most_kept = best // 2, less
    return best


def site_of(chip: Accelerator, accelerators: int, pue: float | None = None) -> Site:
    """A site of nothing but these accelerators, as they are sold: what watts.py needs to tell what is around them."""
    found = hardware.chip(chip)
    each = _PER_NODE.get(chip, 8)

    def said(value: float, what: str) -> Figure:
        return Figure(value=value, basis="declared", source=what)

    return Site(
        name="accelerators", summary="accelerators as they are sold", kind="generic", device="cuda", accelerator=chip,
        accelerators=said(max(accelerators, 1), "as many as are asked for"),
        node=Node(accelerators=said(each, "as such nodes are sold"), ranks=each * found.devices),
        network=Network(nic_gbit_s=found.nic_gbit_s, scale_up_gbyte_s=found.scale_up_gbyte_s, scale_up_accelerators=found.scale_up_accelerators),
        power=Power(pue=said(pue, "as asked for") if pue is not None else UNKNOWN),
    )  # fmt: skip


def watts_of(chip: str, accelerators: int, pue: float | None = None) -> watts.Watts:
    found = hardware.chip(chip)
    return watts.of(site_of(found.id, accelerators, pue), accelerators * found.devices)  # type: ignore[arg-type]


def cluster_of(chip: str, accelerators: int, cap_watts: float | None = None) -> Cluster:
    """So many of a chip joined as its data sheet says: scale-up links, then its network; levels count ranks, of which a package of two devices is two.

    Raises PlanError where either is not published.
    """
    found = hardware.chip(chip)
    links, network, joined = found.scale_up_gbyte_s.value, found.nic_gbit_s.value, found.scale_up_accelerators.value
    for value, what in (
        (links, "its scale-up links carry"),
        (network, "its network carries"),
        (joined, "accelerators its scale-up links join"),
    ):
        if value is None:
            raise PlanError(f"of a {found.name} it is not published what {what}")
    assert links is not None, "looked at above"
    assert network is not None, "looked at above"
    assert joined is not None, "looked at above"
    devices, kind = found.devices, hardware.network_kind(found.nic_gbit_s.source)
    levels = (
        Level("scale_up", int(joined) * devices, links / devices),
        Level(f"rail{kind}", max(accelerators, int(joined)) * devices, network / 8 / devices),
    )
    memory = hardware.visible_bytes(site_of(found.id, accelerators))  # type: ignore[arg-type]
    return Cluster(
        chip, accelerators, _PER_NODE.get(chip, 8), levels, memory, cap_watts=cap_watts,
        assumed=("topology: rails without oversubscription",),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """One way to hold a site's promise: accelerators of one kind, counted in one precision, at one PUE. Watts are of one accelerator; megawatts of all.

    `basis` says where the node's watts are from: metered in training, typical (0.67 of the nameplate), nameplate, or the model at the limit.
    """

    chip: str
    basis: str
    precision: str
    ratio: float  # H100-equivalents of one, in that precision
    count: int
    node_watts: float
    fabric_watts: float
    storage_share: float
    pue: float
    low: float  # of it_watts
    high: float
    allowed_watts: float | None  # of the whole site; None: it says none
    source: str

    @property
    def it_watts(self) -> float:
        return (self.node_watts + self.fabric_watts) * (1 + self.storage_share)

    @property
    def facility_watts(self) -> float:
        return self.it_watts * self.pue

    @property
    def megawatts(self) -> float:
        return self.count * self.facility_watts / 1e6

    @property
    def interval(self) -> tuple[float, float]:
        """Megawatts of all, 90 %."""
        return self.count * self.low * self.pue / 1e6, self.count * self.high * self.pue / 1e6

    @property
    def watts_per_h100e(self) -> float:
        return self.facility_watts / self.ratio

    @property
    def highest_pue(self) -> tuple[float, float, float] | None:
        """`(low, mid, high)` of the PUE at which it draws just what is allowed; None: nothing is said to be."""
        if self.allowed_watts is None:
            return None
        each = self.allowed_watts / self.count
        return each / self.high, each / self.it_watts, each / self.low

    @property
    def margin(self) -> float | None:
        """What is left of the allowed watts, as a share; below 0: what is too much."""
        return None if self.allowed_watts is None else 1 - 1e6 * self.megawatts / self.allowed_watts

    @property
    def verdict(self) -> str:
        """holds, or fails; with `, perhaps` where the other lies within the interval."""
        if self.allowed_watts is None:
            return "no limit is said"
        low, high = self.interval
        holds = 1e6 * self.megawatts <= self.allowed_watts
        sure = 1e6 * (high if holds else low) <= self.allowed_watts if holds else 1e6 * low > self.allowed_watts
        return ("holds" if holds else "fails") + ("" if sure else ", perhaps")

    def text(self) -> str:
        """The arithmetic of it, to be done again by hand."""
        low, high = self.interval
        left = ""
        if self.allowed_watts is not None and self.margin is not None:
            rest = f"{self.margin:.1%} left" if self.margin >= 0 else f"{-self.margin:.1%} too much"
            left = f" of {self.allowed_watts / 1e6:,.0f}: {self.verdict}, {rest}"
        return (
            f"{self.count:,} {self.chip} ({self.ratio:.2f} H100e each in {self.precision}) x ({self.node_watts:,.0f} W of node + {self.fabric_watts:,.0f} W of "
            f"fabric) x {1 + self.storage_share:.2f} for storage x {self.pue:g} PUE = {self.megawatts:,.1f} MW ({low:,.1f} to {high:,.1f}){left} [{self.basis}]"
        )


@dataclass(frozen=True, slots=True)
class Cap:
    """The highest limit of an accelerator at which a site's promise holds, and what it costs; None: none is low enough."""

    chip: str
    precision: str
    pue: float
    it_watts: float  # that one may draw with its share of everything
    cap_watts: float | None
    least_watts: float  # were all that is around an accelerator at the high end of its interval
    sold_watts: float
    kept: Range | None  # of the compute rate

    def text(self) -> str:
        if self.cap_watts is None:
            return f"{self.precision}: none is low enough"
        worst = f", at worst {max(self.least_watts, 0):,.0f}" if self.least_watts < self.sold_watts else ""
        if self.cap_watts >= self.sold_watts:
            return f"{self.precision}: its full {self.sold_watts:,.0f} W{worst}"
        kept = f" ({self.kept.mid:.0%} of the compute rate, {self.kept.low:.0%} to {self.kept.high:.0%})" if self.kept else ""
        return f"{self.precision}: {self.cap_watts:,.0f} of {self.sold_watts:,.0f} W{worst}{kept}"


@dataclass(frozen=True, slots=True)
class Explained:
    """A site's arithmetic."""

    site: str
    promise: str
    watts_per_h100e: float | None
    lines: tuple[Line, ...] = ()
    caps: tuple[Cap, ...] = ()
    compared: tuple[str, ...] = ()  # with what the site says of itself
    unknown: tuple[str, ...] = field(default_factory=tuple)


_PRECISIONS = ("bf16", "fp8", "fp4")
_H100 = {"bf16": hardware.H100_BF16, "fp8": 1979.0, "fp4": 1979.0}  # TFLOP/s, dense; an H100 has no fp4, whose equivalent is its fp8


def ratio(chip: str, precision: str) -> float | None:
    """H100-equivalents of one accelerator, by dense rates as sold in a precision; in fp4 over the H100's fp8."""
    rate = hardware.chip(chip).tflops(precision).value
    return None if rate is None else rate / _H100[precision]


def bases(chip: str) -> tuple[tuple[str, float, float, float, str], ...]:
    """`(basis, watts, low, high, source)` of one accelerator with its share of a node: metered in training, typical, nameplate; where there is no machine in
    hardware.py the model, with the accelerator at its limit."""
    found: list[tuple[str, float, float, float, str]] = []
    sold = hardware.chip(chip).watts.value
    for one in hardware.MACHINES:
        if one.chip != chip:
            continue
        if one.training_watts.value is not None:
            each = one.training_watts.value / one.accelerators
            found.append((f"metered: {one.name}", each, 0.95 * each, 1.05 * each, one.training_watts.source))
        if one.max_watts.value is not None:
            each, share = one.max_watts.value / one.accelerators, hardware.OF_NAMEPLATE.value or 1.0
            modules = (
                sold is not None and one.max_watts.value <= one.accelerators * sold
            )  # their limits and nothing else, drawn as they are
            found.append((f"nameplate: {one.name}", each, (0.85 if modules else share) * each, each, one.max_watts.source))
            if not modules:
                source = f"{hardware.OF_NAMEPLATE.source}; {one.max_watts.source}"
                found.append((f"{share:g} of the nameplate: {one.name}", share * each, 0.9 * share * each, 1.1 * share * each, source))
    around = energy.server_of(watts_of(chip, 1), hardware.chip(chip))
    if not found and sold is not None and around is not None:
        most = energy.node_watts(Range(low=0.85 * sold, mid=sold, high=sold), around)
        found.append(
            (f"model: at its limit of {sold:,.0f} W, and what is around it", most.mid, most.low, most.high, "; ".join(around.sources))
        )
    return tuple(found)


def explain(site: Site, precisions: Sequence[str] = _PRECISIONS) -> Explained:
    """The arithmetic of a site: what it promises, what each accelerator that could keep it would draw, and which caps hold it.

    A site whose accelerators are known is counted in them; one that tells only H100-equivalents in every accelerator of hardware.py. What is missing is said.
    """
    power = site.power
    allowed = power.cap_watts.value or power.facility_watts.value
    told = site.h100e.value if site.accelerator is None else site.accelerators.value
    unknown = [
        path + (f" ({figure.source})" if figure.source else "")
        for path, figure in site.figures()
        if not figure.known and path.startswith(("accelerators", "h100e", "power."))
    ]
    unit = "H100-equivalents" if site.accelerator is None else hardware.chip(site.accelerator).name
    if told is None:
        return Explained(site.name, f"{site.name} does not say how many accelerators it has", None, unknown=tuple(unknown))
    each = allowed / told if allowed is not None else None
    promise = f"{told:,.0f} {unit}"
    if each is not None and allowed is not None:
        promise += f" on {allowed / 1e6:,.0f} MW are {each:,.1f} W for each, everything included ({power.cap_watts.source or power.facility_watts.source})"
    else:
        promise += "; what the site may draw is not said"
    pues = (power.pue.value,) if power.pue.value is not None else PUES
    names = [site.accelerator] if site.accelerator is not None else list(hardware.CHIPS)
    lines: list[Line] = []
    caps: list[Cap] = []
    for name in names:
        fabric = power.fabric_watts if power.fabric_watts.known else watts_of(name, 1).fabric_watts
        if fabric.value is None:
            unknown.append(f"{name}: what its network draws (network.nic_gbit_s)")
            continue
        found = bases(name)
        if not found:
            unknown.append(f"{name}: its power is not published, nor that of a node of it")
            continue
        kinds = ("bf16",) if site.accelerator is not None else precisions
        for precision in kinds:
            part = 1.0 if site.accelerator is not None else ratio(name, precision)
            if part is None:
                if precision == "bf16":
                    unknown.append(f"{name}: its rate in {precision} is not published")
                continue
            lines.extend(_lines(name, precision, part, told, allowed, pues, found, fabric.value))
            if each is not None:
                caps.extend(cap for pue in pues if (cap := _cap(name, precision, pue, each * part / pue, fabric.value)) is not None)
    return Explained(site.name, promise, each, tuple(lines), tuple(caps), tuple(_compared(site, lines)), tuple(unknown))


def _lines(
    chip: str, precision: str, part: float, told: float, allowed: float | None, pues: Sequence[float], found: Sequence[tuple[str, float, float, float, str]],
    fabric: float,
) -> Iterator[Line]:  # fmt: skip
    share = watts.STORAGE_SHARE
    for basis, node, low, high, source in found:
        for pue in pues:
            yield Line(
                chip, basis, precision, part, math.ceil(told / part), node, fabric, share, pue,
                low=(low + min(FABRIC_LEAST, fabric)) * (1 + 0.5 * share), high=(high + fabric) * (1 + 1.5 * share), allowed_watts=allowed, source=source,
            )  # fmt: skip


def _cap(chip: str, precision: str, pue: float, it_watts: float, fabric: float) -> Cap | None:
    """The cap at which (cap + rest) x (1 + fans) / efficiency + fabric, with storage, is what one may draw; None where its server or its limit is unknown."""
    found = hardware.chip(chip)
    sold, around = found.watts.value, energy.server_of(watts_of(chip, 1), found)
    if sold is None or around is None:
        return None
    node = it_watts / (1 + watts.STORAGE_SHARE) - fabric
    cap = node * around.efficiency.value / (1 + around.fans.value) - around.rest.value
    least = node * around.efficiency.low / (1 + around.fans.high) - around.rest.high
    try:
        kept = energy.capped_rate(chip, cap)
    except PlanError:
        return Cap(chip, precision, pue, it_watts, None, least, sold, None)
    return Cap(chip, precision, pue, it_watts, cap, least, sold, kept)


def _compared(site: Site, lines: Sequence[Line]) -> Iterator[str]:
    """Beside what the site says of itself as a whole."""
    count, whole = site.accelerators.value, site.power.it_watts
    if not count or whole.value is None:
        return
    yield f"the site's own IT: {whole.value / 1e6:,.2f} MW over {count:,.0f} = {whole.value / count:,.0f} W each ({whole.basis}: {whole.source})"
    for line in lines:
        yield f"{line.basis}: {line.it_watts:,.0f} W of IT each, {line.it_watts / (whole.value / count) - 1:+.0%} of that"


def explained(found: Explained) -> Iterator[str]:
    """Lines for a reader: the promise; of each accelerator and basis the arithmetic at the lowest PUE, and up to which PUE each precision's count holds; caps;
    the site's own figures; what is unknown."""
    yield found.promise
    pues = sorted({line.pue for line in found.lines})
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in found.lines:
        groups.setdefault((line.chip, line.basis), []).append(line)
    never: dict[str, list[float]] = {}
    for (chip, _), alike in groups.items():
        firsts = [line for line in alike if line.pue == pues[0]]
        if len(pues) > 1 and all(line.highest_pue is not None and line.highest_pue[2] < 1 for line in firsts):
            never.setdefault(chip, []).extend(line.it_watts / line.ratio for line in firsts)
            continue
        yield alike[0].text()
        if alike[0].allowed_watts is not None and len(pues) > 1:
            yield "    " + "; ".join(_up_to(line) for line in firsts)
    if never:
        told = (f"{chip} {min(each):,.0f}" + (f" to {max(each):,.0f}" if max(each) > min(each) + 1 else "") for chip, each in never.items())
        yield f"no PUE holds it, of which the best is 1, by W of IT per H100e: {'; '.join(told)}"
    if found.caps:
        shown = pues[min(1, len(pues) - 1)]
        yield f"limits of an accelerator that hold it at PUE {shown:g}, with its share of everything and every one at its limit:"
        for chip in dict.fromkeys(cap.chip for cap in found.caps if cap.cap_watts is not None and cap.pue == shown):
            yield f"    {chip:8} {'; '.join(cap.text() for cap in found.caps if cap.chip == chip and cap.pue == shown)}"
        none = dict.fromkeys(f"{cap.chip} in {cap.precision}" for cap in found.caps if cap.cap_watts is None and cap.pue == shown)
        if none:
            yield f"    none is low enough: {', '.join(none)}"
    yield from (f"compared: {line}" for line in found.compared)
    if found.unknown:
        yield f"unknown: {'; '.join(found.unknown)}"


def _up_to(line: Line) -> str:
    """`bf16: 595 W of IT per H100e, holds to PUE 1.17 (1.10 to 1.28)`"""
    assert line.highest_pue is not None, "a line with an allowed draw"
    low, mid, high = line.highest_pue
    each = f"{line.precision}: {line.it_watts / line.ratio:,.0f} W of IT per H100e"
    if high < 1:
        return f"{each}, no PUE holds it"
    if mid < 1:
        return f"{each}, fails, but may hold to PUE {high:.2f}"
    return f"{each}, holds to PUE {mid:.2f} ({max(low, 1.0):.2f} to {high:.2f}{'' if low >= 1 else ', or none'})"


def _rate(tokens_per_s: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens_per_s >= size:
            return f"{tokens_per_s / size:,.2f} {unit}tok/s"
    return f"{tokens_per_s:,.0f} tok/s"
