"""How large a run is on a site: nodes, GPUs or megawatts in; nodes, ranks and watts out, and whatever had to be taken for it.

A megawatt is one of the facility, cooling included: what a site pays for. A node draws its share of everything (fabric, storage, service nodes), so it is
counted from the whole system where that is known. Free of torch.
"""

import math
from dataclasses import dataclass, replace

from gigatrain.config import Recipe
from gigatrain.errors import PlanError, SiteError
from gigatrain.planning.budget import assumed, node_watts, shown, whole
from gigatrain.site import Site

__all__ = ["Size", "by_budget", "kept", "node_watts", "shown", "size", "size_of", "whole"]


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
    if (nodes, gpus, megawatts) == (None, None, None):
        raise SiteError("how large: give --nodes, --gpus (or both: then a node holds their quotient), or --megawatts")
    if megawatts is not None and (nodes, gpus) != (None, None):
        other = f"--gpus {gpus}" if nodes is None else f"--nodes {nodes}"
        raise SiteError(
            f"{other} and --megawatts {megawatts:g} both say how large; give one of them, or {other} and --set power.megawatts={megawatts:g} as a limit"
        )
    assumes: list[str] = []
    share, notes, lacking = node_watts(site)
    if megawatts is not None:
        if not 0 < megawatts < 1e6:
            raise SiteError(f"{megawatts:g} MW is not between 0 and 1,000,000")
        cap = site.power.cap_watts.value
        if cap is not None and megawatts * 1e6 > cap:
            raise SiteError(
                f"{site.name} may draw {shown(cap)} at most (power.cap_watts), and {megawatts:g} MW are asked for; give --megawatts {cap / 1e6:g} or less"
            )
        if share is None:
            raise SiteError(f"{site.name} does not say what a node draws, so {megawatts:g} MW are no number of nodes: {lacking}")
        nodes = math.floor(megawatts * 1e6 / share)
        if nodes == 0:
            raise SiteError(f"{megawatts:g} MW is less than one node of {site.name} draws, {shown(share)}; give more, or --nodes 1")
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
    assumes += beyond(site, nodes or 0)
    watts = None if share is None or nodes is None else nodes * share
    return Size(nodes, gpus, watts, tuple(dict.fromkeys([*assumes, *(notes if watts is not None else ())])))


def spared(size: Size, site: Site, spares: int) -> Size:
    """The size with what `spares` beside its nodes assume. Raises SiteError where the site has not so many nodes."""
    if not spares or size.nodes is None:
        return size
    has = whole(site)
    if has is not None and size.nodes + spares > has:
        raise SiteError(f"{site.name} has {has:,} nodes, and {size.nodes:,} with {spares:,} spares are asked for; give fewer of either")
    alone = beyond(site, size.nodes)
    return replace(size, assumes=(*beyond(site, size.nodes, spares), *(note for note in size.assumes if note not in alone)))


def beyond(site: Site, nodes: int, spares: int = 0) -> list[str]:
    """What is taken for a job of so many nodes where its partition or qos gives fewer; empty where it does not."""
    most = site.scheduler.max_nodes
    if most.value is None or nodes + spares <= most.value:
        return []
    asked = f"{nodes:,} nodes" + (f" and {spares:,} spare" if spares else "")
    return [f"{asked} in one job, where its partition or qos gives {most.value:,.0f} ({most.source}): another, or an agreement"]


def by_budget(site: Site, recipe: Recipe) -> int | None:
    """Nodes of a job whose size nobody gives: the most that the recipe's `power.megawatts` feeds and its batch divides by.

    None where there is no budget, the recipe fixes its ranks, or a node's draw is unknown.
    """
    share, (train, mesh), per_node = node_watts(site)[0], (recipe.train, recipe.mesh), site.ranks_per_node
    if recipe.power.megawatts is None or share is None or per_node is None or train.nproc is not None or mesh.shard is not None:
        return None
    most = min(math.floor(recipe.power.megawatts * 1e6 / share), whole(site) or 1 << 20)
    together = mesh.context * mesh.tensor * mesh.pipeline  # ranks that read the same samples
    fitting = (
        n for n in range(most, 0, -1) if n * per_node % (together * mesh.replicate) == 0 and train.batch % (n * per_node // together) == 0
    )
    return next(fitting, most or None)


def size_of(site: Site, recipe: Recipe, nodes: int | None = None, gpus: int | None = None, megawatts: float | None = None) -> Size | None:
    """The size of a run of the recipe: what was asked for, else what its own budget feeds (`by_budget`); None where neither says any.

    Raises SiteError as `size` does. Of a size in megawatts: no more nodes than they feed, and as many as the recipe's batch divides by.
    """
    if (nodes, gpus, megawatts) == (None, None, None):
        nodes = by_budget(site, recipe)
        return None if nodes is None else size(site, nodes)
    sized = size(site, nodes, gpus, megawatts)
    if megawatts is None or sized.nodes is None:
        return sized
    nodes = by_budget(site, kept(recipe, megawatts))
    if nodes is None or nodes >= sized.nodes:
        return sized
    found = size(site, nodes=nodes)
    note = f"{megawatts:g} MW feed {sized.nodes:,} nodes; {nodes:,} of them, by whose {found.ranks:,} ranks train.batch {recipe.train.batch:,} divides"
    return replace(found, assumes=(note, *found.assumes))


def kept(recipe: Recipe, megawatts: float | None) -> Recipe:
    """The recipe of a run that was sized by megawatts and so keeps to them: `power.megawatts` is no more than that. Raises PlanError if it measures nothing."""
    power = recipe.power
    if megawatts is None or (power.megawatts is not None and power.megawatts <= megawatts):
        return recipe
    if not power.measure:
        raise PlanError(
            f"--megawatts {megawatts:g} is also what the run keeps to, and power.measure is false: leave that out, or give --nodes instead"
        )
    return recipe.model_copy(update={"power": power.model_copy(update={"megawatts": megawatts})})


def _fits(site: Site, nodes: int | None, ranks: int) -> None:
    has = whole(site)
    if has is not None and nodes is not None and nodes > has:
        raise SiteError(f"{site.name} has {has:,} nodes, and {nodes:,} are asked for")
    per_package = site.ranks_per_node / site.node.accelerators.value if site.ranks_per_node and site.node.accelerators.value else 1
    if site.accelerators.value is not None and ranks > site.accelerators.value * per_package:
        two = f", which are {site.accelerators.value * per_package:,.0f} ranks" if per_package != 1 else ""
        raise SiteError(f"{site.name} has {site.accelerators.value:,.0f} accelerators{two}, and {ranks:,} are asked for")
