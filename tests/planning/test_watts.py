"""From a site's figures to what a run may count on: every rule of planning/watts.py against the measured ones of power.md."""

import pytest

from gigatrain import load
from gigatrain.planning import watts
from gigatrain.site import Figure, Network, Node, Power, Site


def figure(value):
    return Figure(value=value, basis="declared", source="a test")


def value(one):
    assert one.value is not None
    return one.value


def site(chip="h100", each=8, *, network=None, power=None, **more):
    return Site(
        name="here",
        summary="",
        kind="generic",
        device="cuda",
        accelerator=chip,  # type: ignore[arg-type]
        node=Node(accelerators=figure(each)),
        network=Network.model_validate(network or {"nic_gbit_s": figure(400)}),
        power=Power.model_validate(power or {}),
        **more,
    )


def test_a_node_of_h100_by_the_metered_ones():
    found = watts.of(site(), 16)
    assert (found.accelerators, found.per_node, found.chip) == (16, 8, "h100")
    assert (found.node_watts.value, found.node_watts.basis) == (6850, "measured")  # MLPerf's GPT-3 run, 856 W an accelerator
    assert found.nameplate_watts.value == 10_200
    assert found.rest_watts.value == (6850 - 5600 + 7554 - 5600) / 2  # 1,250 W is too little, 1,954 W too much
    assert found.rest_watts.basis == "assumed"
    low, high = 0.5 * value(found.rest_watts), 1.5 * value(found.rest_watts)
    assert all(low < rest < high for rest in (1250, 1954, 7280 - 5600))  # the bounds of an estimate hold both, and Dell's air-cooled nodes
    assert found.fabric_watts.value == 116
    assert found.fabric_nameplate
    it = (value(found.node_watts) / 8 + value(found.fabric_watts)) * (1 + value(found.storage_share))
    assert it == pytest.approx((856 + 116) * 1.03, rel=1e-3)
    assert not found.pue.known


def test_nodes_with_a_nameplate_only():
    found = watts.of(site("h200"), 8)
    assert found.node_watts.value == pytest.approx(0.67 * 10_200)
    assert found.node_watts.basis == "assumed"
    assert found.rest_watts.value == pytest.approx((0.67 * 10_200 - 5600 + 0.67 * 4600) / 2)
    b200 = watts.of(site("b200"), 8)
    assert b200.node_watts.value == 9580
    assert value(b200.node_watts) / 14_300 == pytest.approx(0.67, abs=0.001)


def test_a_node_of_a_rack_has_its_share():
    rack = {"nic_gbit_s": figure(400), "scale_up_accelerators": figure(72)}
    found = watts.of(site("gb200", 4, network=rack), 72)
    assert found.nameplate_watts.value == pytest.approx(132_000 / 18)
    assert found.node_watts.value == pytest.approx(0.67 * 132_000 / 18)
    assert (value(found.node_watts) / 4 + 116) * 1.03 == pytest.approx(1385, abs=1)  # power.md 4.1 has 1,368 with 100 W of fabric
    assert 0 < value(found.rest_watts) < value(found.node_watts) / 4
    assert "of a rack" in found.nameplate_watts.source
    alone = watts.of(site("gb200", 4, network={"scale_up_accelerators": figure(4)}), 72)
    assert not alone.node_watts.known
    assert not alone.rest_watts.known


def test_superchips_have_the_rest_within():
    found = watts.of(load.site("jupiter"), 4000)
    assert found.nameplate_watts.value == 2720 == 4 * 680
    assert found.node_watts.value == 2720  # not 0.67 of it: that is a rule for whole nodes, and HPL drew 2,685 W of IT
    assert (found.rest_watts.value, found.rest_watts.basis) == (0, "assumed")
    assert "modules alone" in found.rest_watts.source
    assert found.fabric_watts.value == 58  # NDR200
    assert found.facility_watts.value == pytest.approx(15.8e6 / 5884 * 1.1)
    assert found.facility_watts.basis == "assumed"  # its PUE is


def test_what_the_site_says_comes_first():
    power = {
        "device_watts": figure(500),
        "node_watts": figure(6000),
        "fabric_watts": figure(70),
        "storage_watts": figure(9),
        "pue": figure(1.3),
    }
    found = watts.of(site(power=power | {"facility_watts": figure(1e6)}, nodes=figure(100)), 8)
    assert (found.node_watts.value, found.rest_watts.value) == (6000, 2000)
    assert (found.fabric_watts.value, found.fabric_nameplate) == (70, False)
    assert (found.storage_watts.value, found.storage_share.known) == (9, False)
    assert (found.pue.value, found.facility_watts.value) == (1.3, 10_000)


def test_a_site_whose_own_figure_is_assumed_gives_way_to_metered_nodes():
    found = watts.of(load.site("dgx-h100"), 8)
    assert found.node_watts.value == 6834
    assert found.rest_watts.value == 1602


def test_packages_of_two_devices_and_machines_alone():
    lumi = watts.of(load.site("lumi"), 16)
    assert (lumi.accelerators, lumi.per_node) == (8, 4)
    assert not lumi.rest_watts.known  # no machine of MI250X is known
    laptop = watts.of(load.site("laptop"), 1)
    assert (laptop.accelerators, laptop.fabric_watts.value, laptop.storage_watts.value, laptop.pue.value) == (0, 0, 0, 1)
    assert not laptop.fabric_nameplate
    assert not laptop.node_watts.known


def test_a_node_without_accelerators_is_all_rest():
    laptop = load.site("laptop")
    found = watts.of(laptop.model_copy(update={"power": Power(node_watts=figure(45.0))}), 2)
    assert (found.rest_watts.value, found.rest_watts.basis) == (45, "assumed")
    assert not watts.of(laptop, 2).rest_watts.known


@pytest.mark.parametrize("name", load.sites())
def test_every_site_that_is_shipped(name):
    found = watts.of(load.site(name), 64)
    for one in (found.rest_watts, found.node_watts, found.fabric_watts):
        assert one.value is None or one.source
    if found.node_watts.value is not None and found.device_watts.value is not None and found.rest_watts.value is not None:
        assert found.rest_watts.value < found.node_watts.value
