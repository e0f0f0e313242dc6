"""What a plan knows of power before any meter says anything: the figures of its site that turn device energy into a node's, IT's and the facility's.

Every one is a Figure with its basis and source. What is unknown stays unknown, and the boundary that needs it is then unknown too. POWER.md has the
definitions.
"""

from pydantic import Field

from gigatrain.config import Section
from gigatrain.planning import hardware
from gigatrain.site import UNKNOWN, Basis, Figure, Site

STORAGE_SHARE = 0.03  # storage, management and service nodes over nodes and fabric: an allowance, no measurement
FABRIC_GBIT_S = 400.0  # of the network that hardware.FABRIC_WATTS_H100 was declared for


MOST = 10**9  # accelerators: a larger count is damage in a plan that was read back


class Watts(Section):
    """Per accelerator (a package: an MI250X is one) where nothing else is said."""

    site: str = ""
    chip: str | None = None
    accelerators: int = Field(default=0, le=MOST)  # of the whole run
    per_node: int = Field(default=0, le=MOST)  # of a node; 0: unknown
    device_watts: Figure = UNKNOWN  # the most that one may draw here
    rest_watts: Figure = UNKNOWN  # of a node without its accelerators, under training load
    node_watts: Figure = UNKNOWN  # of a whole node under training load
    nameplate_watts: Figure = UNKNOWN  # of a whole node, at most
    fabric_watts: Figure = UNKNOWN
    fabric_nameplate: bool = False  # it is what switches draw at most, not what they do
    storage_watts: Figure = UNKNOWN  # where it is a share of what it serves, it is not here but in `storage_share`
    storage_share: Figure = UNKNOWN
    pue: Figure = UNKNOWN
    facility_watts: Figure = UNKNOWN  # of one node with its share of everything, by the site's own total
    cap_watts: Figure = UNKNOWN  # of the site
    ramp_watts_min: Figure = UNKNOWN
    carbon_g_kwh: Figure = UNKNOWN
    price_eur_mwh: Figure = UNKNOWN


def of(site: Site, ranks: int) -> Watts:
    """The figures of a site for a run of `ranks` processes.

    A machine that stands alone (kind `local`) has no fabric, no storage and no cooling of its own: 0 W, 0 W and PUE 1, by definition.
    """
    found = hardware.CHIPS[site.accelerator] if site.accelerator is not None and site.device == "cuda" else None
    each = int(site.node.accelerators.value or 0)
    packages = -(-ranks // found.devices) if found is not None else 0
    machine = _machine(site, each) if found is not None else None
    power, alone = site.power, site.kind == "local"
    device = power.device_watts if power.device_watts.known else found.watts if found is not None else UNKNOWN
    node = power.node_watts if power.node_watts.known else _node(machine, device)
    return Watts(
        site=site.name,
        chip=site.accelerator if found is not None else None,
        accelerators=packages,
        per_node=each,
        device_watts=device,
        rest_watts=_rest(power.node_watts, device, each, machine) if found is not None else _all_rest(power.node_watts),
        node_watts=node,
        nameplate_watts=machine.max_watts if machine is not None else UNKNOWN,
        fabric_watts=_zero("no network beside this machine") if alone and not power.fabric_watts.known else _fabric(site),
        fabric_nameplate=not alone and not power.fabric_watts.known,
        storage_watts=_zero("no storage beside this machine") if alone and not power.storage_watts.known else power.storage_watts,
        storage_share=UNKNOWN
        if alone or power.storage_watts.known
        else _said(STORAGE_SHARE, "assumed", "an allowance for storage, management and service nodes, not measured"),
        pue=_said(1.0, "declared", "this machine stands alone: its fans are within it") if alone and not power.pue.known else power.pue,
        facility_watts=_total(site, each),
        cap_watts=power.cap_watts,
        ramp_watts_min=power.ramp_watts_min,
        carbon_g_kwh=site.grid.carbon_g_kwh,
        price_eur_mwh=site.grid.price_eur_mwh,
    )


def _said(value: float, basis: Basis, source: str) -> Figure:
    return Figure(value=value, basis=basis, source=source)


def _zero(why: str) -> Figure:
    return _said(0.0, "declared", why)


def _modules_alone(machine: hardware.Machine, device: Figure) -> bool:
    """Whether a nameplate is the sum of its accelerators' limits and nothing else: superchips, whose processors and memory are within."""
    plate, limit = machine.max_watts.value, device.value
    return plate is not None and limit is not None and plate <= machine.accelerators * limit


def _node(machine: hardware.Machine | None, device: Figure) -> Figure:
    """A node under training load: of a metered machine of that kind, else by its nameplate."""
    if machine is None:
        return UNKNOWN
    plate, share = machine.max_watts, hardware.OF_NAMEPLATE
    if machine.training_watts.known or plate.value is None or share.value is None:
        return machine.training_watts
    if _modules_alone(machine, device):
        return _said(plate.value, "assumed", f"modules at their limit and nothing else, which train at it or below: {plate.source}")
    return _said(plate.value * share.value, "assumed", f"{share.value:g} x {plate.value:,g} W ({share.source}; {plate.source})")


def _rest(node: Figure, device: Figure, each: int, machine: hardware.Machine | None) -> Figure:
    """A node under training load without its accelerators, which nobody meters apart: by what the site says of its nodes, else the middle of what must be too
    little and what must be too much. POWER.md has the rule and what it gives.
    """
    limit = device.value
    if limit is None or not each:
        return UNKNOWN
    devices = each * limit
    if node.value is not None and node.basis != "assumed":
        said = f"{node.value:,g} W of a node less {each} x {limit:,g} W, too little where they draw less: {node.source}; {device.source}"
        return _said(max(0.0, node.value - devices), "assumed", said)
    if machine is not None and machine.training_watts.value is not None and machine.peak_watts.value is not None:
        little, much = (max(0.0, watts - devices) for watts in (machine.training_watts.value, machine.peak_watts.value))
        said = f"between {little:,g} W, {machine.name} in the mean, and {much:,g} W, its highest reading, each less {each} x {limit:,g} W"
        return _said((little + much) / 2, "assumed", f"{said}: {machine.training_watts.source}")
    plate, share = (machine.max_watts.value if machine is not None else None), hardware.OF_NAMEPLATE.value
    if machine is not None and plate is not None and share is not None:
        if _modules_alone(machine, device):
            said = "the nameplate is of the modules alone, and processors and memory are within them: nothing is added for network cards, drives and losses"
            return _said(0.0, "assumed", f"{said}; right only where the meter is the module's: {machine.max_watts.source}")
        little, much = max(0.0, share * plate - devices), share * (plate - devices)
        said = f"between {share:g} x {plate:,g} W less {each} x {limit:,g} W, and {share:g} x the difference of both"
        return _said((little + much) / 2, "assumed", f"{said}: {hardware.OF_NAMEPLATE.source}; {machine.max_watts.source}")
    if node.value is not None:
        said = f"{node.value:,g} W of a node less {each} x {limit:,g} W, too little where they draw less: {node.source}; {device.source}"
        return _said(max(0.0, node.value - devices), "assumed", said)
    return UNKNOWN


def _all_rest(node: Figure) -> Figure:
    """A node without accelerators is rest, processors included."""
    return _said(node.value, "assumed", f"the whole node, which has no accelerators: {node.source}") if node.value is not None else UNKNOWN


def _total(site: Site, each: int) -> Figure:
    """One node with its share of everything, by the site's own total: to compare with, never to add."""
    power, count = site.power, site.nodes.value
    if count is None and site.accelerators.value and each:
        count = site.accelerators.value / each
    if not count:
        return UNKNOWN
    if power.facility_watts.value is not None:
        return _said(
            power.facility_watts.value / count, power.facility_watts.basis, f"over {count:,.0f} nodes: {power.facility_watts.source}"
        )
    if power.it_watts.value is None or power.pue.value is None:
        return UNKNOWN
    basis: Basis = "assumed" if "assumed" in (power.it_watts.basis, power.pue.basis) else power.it_watts.basis
    said = (
        f"{power.it_watts.value:,g} W of IT over {count:,.0f} nodes x PUE {power.pue.value:g}: {power.it_watts.source}; {power.pue.source}"
    )
    return _said(power.it_watts.value / count * power.pue.value, basis, said)


def _fabric(site: Site) -> Figure:
    if site.power.fabric_watts.known:
        return site.power.fabric_watts
    rate = site.network.nic_gbit_s
    base = hardware.FABRIC_WATTS_H100
    if rate.value is None or base.value is None:
        return UNKNOWN
    return _said(base.value * rate.value / FABRIC_GBIT_S, "assumed", f"{base.value:g} W at 400 Gbit/s, for {rate.value:g}: {base.source}")


def _machine(site: Site, each: int) -> hardware.Machine | None:
    """The maker's machine of so many of the site's accelerators, with the draw in training of a metered one of the same kind; of a rack that scale-up links
    join, a node's share."""
    kind = [one for one in hardware.MACHINES if one.chip == site.accelerator]
    alike = [one for one in kind if one.accelerators == each]
    plate = next((one for one in alike if one.max_watts.known), None)
    metered = next((one for one in alike if one.training_watts.known), None)
    if metered is not None:
        return metered.model_copy(update={"max_watts": plate.max_watts if plate is not None else UNKNOWN})
    rack = next(
        (one for one in kind if one.accelerators == site.network.scale_up_accelerators.value and each and one.accelerators % each == 0),
        None,
    )
    if plate is not None or rack is None or rack.max_watts.value is None:
        return plate
    part = _said(
        rack.max_watts.value * each / rack.accelerators,
        rack.max_watts.basis,
        f"{each} of the {rack.accelerators} of a rack: {rack.max_watts.source}",
    )
    return rack.model_copy(update={"accelerators": each, "max_watts": part})
