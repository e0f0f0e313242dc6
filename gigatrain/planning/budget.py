"""What a run may draw at the facility, and what its site's figures say that it draws; torch-free.

A megawatt is one of the facility, cooling included. A node draws its share of everything (fabric, storage, service nodes), so it is counted from the whole
system where that is known. What cannot be compared is said to be so.
"""

import math

from gigatrain.config import Power as Wanted
from gigatrain.config import Section
from gigatrain.errors import PlanError
from gigatrain.site import Site


class Draw(Section):
    """What a plan expects to draw at the facility beside what it may; None: unknown, or no budget. `note` says how, or why it cannot be checked."""

    expected_watts: float | None = None
    budget_watts: float | None = None
    note: str = ""

    def text(self) -> str:
        """For a reader: `0.19 MW of the facility, of 0.50 MW allowed (power.megawatts)`."""
        if self.expected_watts is None:
            return self.note
        budget = f", of {shown(self.budget_watts)} allowed" if self.budget_watts is not None else ""
        return f"{shown(self.expected_watts)} expected at the facility{budget}{f' ({self.note})' if self.note else ''}"


def draw(power: Wanted, site: Site, ranks: int) -> Draw:
    """What `ranks` processes on a site are expected to draw. Nodes are counted whole.

    Raises PlanError where that is more than the recipe's budget or the site's own, with the draw, the budget and how many nodes fit.
    """
    given = [(1e6 * power.megawatts, "power.megawatts of the recipe")] if power.megawatts is not None else []
    if site.power.cap_watts.value is not None:
        given.append((site.power.cap_watts.value, f"power.cap_watts of {site.name}"))
    budget, what = min(given) if given else (None, "")
    each, _, lacking = node_watts(site)
    per_node = site.ranks_per_node
    if each is None or per_node is None:
        why = lacking.removesuffix(_GIVE) if each is None else "how many ranks a node has is unknown (node.accelerators or node.ranks)"
        if budget is None:
            return Draw()
        return Draw(budget_watts=budget, note=f"{shown(budget)} of {what} cannot be checked: {why}")
    nodes = math.ceil(ranks / per_node)
    expected = nodes * each
    if budget is not None and expected > budget * (1 + 1e-9):  # a job that was sized by it is not refused for a rounding
        fits = math.floor(budget / each)
        most = f"{fits:,} {'node fits' if fits == 1 else 'nodes fit'}" if fits else "not even one node fits"
        slower = f"; --nodes {fits}" if fits else ""
        raise PlanError(
            f"{f'{nodes:,} nodes of {site.name} draw' if nodes > 1 else f'a node of {site.name} draws'} {shown(expected)} at the facility"
            f"{f', {shown(each)} each' if nodes > 1 else ''}, and {what} allows "
            f"{shown(budget)}: {most}{slower}; or raise it. A power.schedule with megawatts is no limit of the plan: it is kept by running slower"
        )
    return Draw(expected_watts=expected, budget_watts=budget, note=what)


def node_watts(site: Site) -> tuple[float | None, tuple[str, ...], str]:
    """`(watts, notes, lacking)`: the facility's watts for one node by the best that is known, how they were come by, and if unknown what is lacking.

    In this order: the facility over its nodes; the IT over its nodes, times the PUE; a node, times the PUE. The sum of a node's accelerators is a lower bound
    and not taken: a site that wants it says so in `power.node_watts`, as assumed.
    """
    power, count = site.power, whole(site)
    pue = power.pue.value
    if power.facility_watts.value is not None and count:
        watts = power.facility_watts.value / count
        how = f"a node takes its share of power.facility_watts: {shown(power.facility_watts.value)} over {count:,} nodes = {shown(watts)}"
        return watts, (how, *assumed(site, "power.facility_watts", *_counted(site))), ""
    if power.it_watts.value is not None and count and pue:
        watts = power.it_watts.value / count * pue
        how = f"a node takes its share of power.it_watts times power.pue: {shown(power.it_watts.value)} over {count:,} nodes x {pue:g} = {shown(watts)}"
        return watts, (how, *assumed(site, "power.it_watts", "power.pue", *_counted(site))), ""
    if power.node_watts.value is not None and pue:
        watts = power.node_watts.value * pue
        how = (
            f"a node takes power.node_watts times power.pue, no share of fabric and storage: {shown(power.node_watts.value)} x {pue:g} = "
            f"{shown(watts)}"
        )
        return watts, (how, *assumed(site, "power.node_watts", "power.pue")), ""
    return None, (), _lacking(site, count)


def whole(site: Site) -> int | None:
    """Nodes of the whole system: as the site says, else its accelerators over those of a node."""
    if site.nodes.value is not None:
        return int(site.nodes.value)
    if site.accelerators.value and site.node.accelerators.value:
        return int(site.accelerators.value // site.node.accelerators.value)
    return None


def assumed(site: Site, *paths: str) -> tuple[str, ...]:
    """`path = value (source)` of each of these figures that is assumed."""
    figures = dict(site.figures())
    return tuple(f"{path} = {figures[path].value:,.10g} ({figures[path].source})" for path in paths if figures[path].basis == "assumed")


def shown(watts: float) -> str:
    """Watts for a reader: `694 W`, `6.85 kW`, `15.80 MW`."""
    if watts < 9_999.5:
        return f"{watts:,.0f} W"
    return f"{watts / 1e3:,.1f} kW" if watts < 999_950 else f"{watts / 1e6:,.2f} MW"


_GIVE = '; give --nodes, or a copy of the site\'s file with that figure, basis = "assumed" and why'


def _counted(site: Site) -> tuple[str, ...]:
    return ("nodes",) if site.nodes.known else ("accelerators", "node.accelerators")


def _lacking(site: Site, count: int | None) -> str:
    power = site.power
    if (power.it_watts.known and count) or power.node_watts.known:
        why = "power.pue is unknown"
    elif power.facility_watts.known or power.it_watts.known:
        total, name = (power.facility_watts, "power.facility_watts") if power.facility_watts.known else (power.it_watts, "power.it_watts")
        why = f"{name} is {shown(total.value or 0)}, but how many nodes share it is unknown"
        if site.h100e.value:
            why += f" (it is {(total.value or 0) / site.h100e.value:,.0f} W for each of {site.h100e.value:,g} H100-equivalents)"
    else:
        why = "power.facility_watts, power.it_watts and power.node_watts are unknown"
        if power.device_watts.known and site.node.accelerators.value:
            least = (power.device_watts.value or 0) * site.node.accelerators.value
            why += f", and its accelerators alone ({shown(least)}) are a lower bound"
    return why + _GIVE
