"""What a plan knows of power before any meter says anything: the figures of its site that turn device energy into a node's, IT's and the facility's.

Every one is a Figure with its basis and source. What is unknown stays unknown, and the boundary that needs it is then unknown too. POWER.md has the
definitions.
"""

from gigatrain.config import Section
from gigatrain.planning import hardware
from gigatrain.site import UNKNOWN, Basis, Figure, Site

STORAGE_SHARE = 0.03  # storage, management and service nodes over nodes and fabric: an allowance, no measurement
FABRIC_GBIT_S = 400.0  # of the network that hardware.FABRIC_WATTS_H100 was declared for


class Watts(Section):
    """Per accelerator (a package: an MI250X is one) where nothing else is said."""

    site: str = ""
    chip: str | None = None
    accelerators: int = 0  # of the whole run
    per_node: int = 0  # of a node; 0: unknown
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
    machine = _machine(site.accelerator, each) if found is not None else None
    power, alone = site.power, site.kind == "local"
    device = power.device_watts if power.device_watts.known else found.watts if found is not None else UNKNOWN
    node = power.node_watts
    nameplate = machine.max_watts if machine is not None else UNKNOWN
    if not node.known and machine is not None:
        node = machine.training_watts if machine.training_watts.known else _times(nameplate, hardware.OF_NAMEPLATE, "assumed")
    return Watts(
        site=site.name,
        chip=site.accelerator if found is not None else None,
        accelerators=packages,
        per_node=each,
        device_watts=device,
        rest_watts=_rest(node, device, each),
        node_watts=node,
        nameplate_watts=nameplate,
        fabric_watts=_zero("no network beside this machine") if alone and not power.fabric_watts.known else _fabric(site),
        storage_watts=_zero("no storage beside this machine") if alone and not power.storage_watts.known else power.storage_watts,
        storage_share=UNKNOWN
        if alone or power.storage_watts.known
        else _said(STORAGE_SHARE, "assumed", "an allowance for storage, management and service nodes, not measured"),
        pue=_said(1.0, "declared", "this machine stands alone: its fans are within it") if alone and not power.pue.known else power.pue,
        cap_watts=power.cap_watts,
        ramp_watts_min=power.ramp_watts_min,
        carbon_g_kwh=site.grid.carbon_g_kwh,
        price_eur_mwh=site.grid.price_eur_mwh,
    )


def _said(value: float, basis: Basis, source: str) -> Figure:
    return Figure(value=value, basis=basis, source=source)


def _zero(why: str) -> Figure:
    return _said(0.0, "declared", why)


def _times(figure: Figure, share: Figure, basis: Basis) -> Figure:
    if figure.value is None or share.value is None:
        return UNKNOWN
    return _said(figure.value * share.value, basis, f"{share.value:g} x {figure.value:,g} W ({share.source}; {figure.source})")


def _rest(node: Figure, device: Figure, each: int) -> Figure:
    """A node under training load without its accelerators at their limit: too little where they draw less than their limit, and never below 0."""
    if node.value is None or device.value is None or not each:
        return UNKNOWN
    rest = max(0.0, node.value - each * device.value)
    return _said(rest, "assumed", f"{node.value:,g} W of a node less {each} x {device.value:,g} W: {node.source}; {device.source}")


def _fabric(site: Site) -> Figure:
    if site.power.fabric_watts.known:
        return site.power.fabric_watts
    rate = site.network.nic_gbit_s
    base = hardware.FABRIC_WATTS_H100
    if rate.value is None or base.value is None:
        return UNKNOWN
    return _said(base.value * rate.value / FABRIC_GBIT_S, "assumed", f"{base.value:g} W at 400 Gbit/s, for {rate.value:g}: {base.source}")


def _machine(chip: str | None, each: int) -> hardware.Machine | None:
    """The maker's machine of so many of these accelerators, of those with a nameplate the first; its training draw by another of the same kind."""
    alike = [one for one in hardware.MACHINES if one.chip == chip and one.accelerators == each]
    plate = next((one for one in alike if one.max_watts.known), None)
    metered = next((one for one in alike if one.training_watts.known), None)
    first = plate or metered
    if first is None:
        return None
    return first.model_copy(update={"training_watts": metered.training_watts if metered is not None else UNKNOWN})
