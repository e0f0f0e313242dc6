"""How large a run is on a site: nodes, GPUs or megawatts in; nodes, ranks and watts out, and whatever had to be taken for it.

A megawatt is one of the facility, cooling included: what a site pays for. A node draws its share of everything (fabric, storage, service nodes), so it is
counted from the whole system where that is known. Free of torch.
"""

import math
from dataclasses import dataclass

from gigatrain.errors import SiteError
from gigatrain.site import Site


@dataclass(frozen=True)
class Size:
    """What was asked for, in every unit.

    `nodes` is None where the site does not say what a node holds and only GPUs were given; `watts` are the facility's for those nodes, None: unknown.
    `assumes` names each figure that is assumed, and how the watts were come by; one line each.
    """

    nodes: int | None
    ranks: int
    watts: float | None
    assumes: tuple[str, ...] = ()

    @property
    def ranks_per_node(self) -> int | None:
        return None if self.nodes is None else self.ranks // self.nodes


def size(site: Site, nodes: int | None = None, gpus: int | None = None, megawatts: float | None = None) -> Size:
    """Resolve one of `nodes`, `gpus` (ranks: an MI250X has two) and `megawatts` (of the facility); `nodes` and `gpus` together say what a node holds.

    Raises SiteError where a figure is needed that the site does not have, for more than the site has, and for GPUs that fill no whole number of nodes.
    """
    if (megawatts is not None and (nodes, gpus) != (None, None)) or (nodes, gpus, megawatts) == (None, None, None):
        raise SiteError("how large: give --nodes, --gpus (or both: then a node holds their quotient), or --megawatts")
    assumes: list[str] = []
    share, notes, lacking = node_watts(site)
    if megawatts is not None:
        if not 0 < megawatts < 1e6:
            raise SiteError(f"{megawatts:g} MW is not between 0 and 1,000,000")
        cap = site.power.cap_watts.value
        if cap is not None and megawatts * 1e6 > cap:
            raise SiteError(f"{site.name} may draw {shown(cap)} at most (power.cap_watts), and {megawatts:g} MW are asked for")
        if share is None:
            raise SiteError(f"{site.name} does not say what a node draws, so {megawatts:g} MW are no number of nodes: {lacking}")
        nodes = math.floor(megawatts * 1e6 / share)
        if nodes == 0:
            raise SiteError(f"{megawatts:g} MW is less than one node of {site.name} draws, {shown(share)}")
        if (has := whole(site)) is not None and nodes > has:
            raise SiteError(
                f"{megawatts:g} MW would feed {nodes:,} nodes, and {site.name} has {has:,}, which draw {shown(has * share)}; give --nodes {has}"
            )
    per_node = site.ranks_per_node
    if nodes is not None and gpus is not None:
        if gpus % nodes:
            raise SiteError(f"{gpus:,} GPUs are no equal share of {nodes:,} nodes; give a multiple of {nodes:,}")
        if per_node is not None and gpus // nodes > per_node:
            raise SiteError(f"{gpus // nodes:,} GPUs a node are asked for, and a node of {site.name} has {per_node:,}")
        per_node = gpus // nodes
    elif nodes is not None:
        if per_node is None:
            raise SiteError(
                f"{site.name} does not say how many GPUs a node has (node.accelerators or node.ranks), so {nodes:,} nodes are no number of ranks; "
                "give --gpus as well"
            )
        gpus = nodes * per_node
        assumes += assumed(site, "node.accelerators") if site.node.ranks is None else ()
    elif gpus is not None and per_node is not None:
        nodes = math.ceil(gpus / per_node)
        if gpus > per_node and gpus % per_node:
            raise SiteError(
                f"{gpus:,} GPUs fill no whole number of nodes of {site.name}, which hold {per_node:,}; "
                f"take {gpus - gpus % per_node:,} or {nodes * per_node:,}"
            )
        assumes += assumed(site, "node.accelerators") if site.node.ranks is None else ()
    assert gpus is not None
    _fits(site, nodes, gpus)
    most = site.scheduler.max_nodes
    if most.value is not None and nodes is not None and nodes > most.value:
        assumes.append(
            f"{nodes:,} nodes in one job, where its partition or qos gives {most.value:,.0f} ({most.source}): another, or an agreement"
        )
    watts = None if share is None or nodes is None else nodes * share
    return Size(nodes, gpus, watts, tuple(dict.fromkeys([*assumes, *(notes if watts is not None else ())])))


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
    return f'{why}; give --nodes, or a copy of the site\'s file with that figure, basis = "assumed" and why'


def _fits(site: Site, nodes: int | None, ranks: int) -> None:
    has = whole(site)
    if has is not None and nodes is not None and nodes > has:
        raise SiteError(f"{site.name} has {has:,} nodes, and {nodes:,} are asked for")
    per_package = site.ranks_per_node / site.node.accelerators.value if site.ranks_per_node and site.node.accelerators.value else 1
    if site.accelerators.value is not None and ranks > site.accelerators.value * per_package:
        two = f", which are {site.accelerators.value * per_package:,.0f} ranks" if per_package != 1 else ""
        raise SiteError(f"{site.name} has {site.accelerators.value:,.0f} accelerators{two}, and {ranks:,} are asked for")
