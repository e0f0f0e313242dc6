"""Nodes, GPUs and megawatts become one another, with every assumption named and every unknown refused by name."""

from typing import Any

import pytest

from gigatrain.errors import SiteError
from gigatrain.launching.size import shown, size, spared
from gigatrain.site import Basis, Figure, Node, Power, Scheduler, Site


def said(value, basis: Basis = "declared", source="a test"):
    return Figure(value=value, basis=basis, source=source)


def made(**given):
    return Site(name="made", summary="", device="cuda", **given)


BOOSTER = made(
    nodes=said(100),
    node=Node(accelerators=said(4)),
    power=Power(it_watts=said(270_000, "measured", "HPL"), pue=said(1.1, "assumed", "recalled")),
)


def test_nodes_gpus_and_megawatts_are_one_size():
    """100 nodes of 270 kW: 2.7 kW of IT each, 2.97 kW of the facility at a PUE of 1.1; 0.03 MW feed 10.1 of them."""
    asked: dict[str, Any]
    for asked in ({"nodes": 10}, {"gpus": 40}, {"megawatts": 0.03}, {"nodes": 10, "gpus": 40}):
        found = size(BOOSTER, **asked)
        assert (found.nodes, found.ranks, found.ranks_per_node) == (10, 40, 4), asked
        assert found.watts == pytest.approx(29_700)
        assert found.assumes == (
            "a node takes its share of power.it_watts times power.pue: 270.0 kW over 100 nodes x 1.1 = 2,970 W",
            "power.pue = 1.1 (recalled)",
        )


def test_the_best_known_watts_are_taken():
    """Facility before IT before node; with all of them the facility's, and no PUE is needed for it."""
    power = {"facility_watts": said(400_000), "it_watts": said(270_000), "node_watts": said(2_000), "pue": said(1.2)}
    each = []
    while power:
        each.append(size(BOOSTER.model_copy(update={"power": Power(**power)}), nodes=1).watts)
        del power[next(iter(power))]
    assert each[:3] == pytest.approx([4_000, 3_240, 2_400])
    assert each[3] is None


@pytest.mark.parametrize(
    ("site", "asked", "message"),
    [
        (BOOSTER, {}, "give --nodes, --gpus"),
        (BOOSTER, {"nodes": 1, "megawatts": 1}, "--nodes 1 and --megawatts 1 both say how large; give one of them"),
        (BOOSTER, {"nodes": 101}, "made has 100 nodes, and 101 are asked for"),
        (BOOSTER, {"gpus": 404}, "made has 100 nodes, and 101 are asked for"),
        (BOOSTER, {"gpus": 42}, "which hold 4; take 40 or 44"),
        (BOOSTER, {"nodes": 2, "gpus": 9}, "give a multiple of 2"),
        (BOOSTER, {"nodes": 2, "gpus": 16}, "8 GPUs a node are asked for, and a node of made has 4"),
        (BOOSTER, {"megawatts": 0.0001}, "less than one node of made draws, 2,970 W"),
        (BOOSTER, {"megawatts": float("nan")}, "is not between"),
        (BOOSTER, {"megawatts": 1.0}, "1 MW would feed 336 nodes, and made has 100, which draw 297.0 kW; give --nodes 100"),
        (made(), {"nodes": 2}, "does not say how many GPUs a node has .* give --gpus as well"),
        (made(), {"megawatts": 1.0}, "power.node_watts are unknown; give --nodes"),
        (made(accelerators=said(8)), {"gpus": 9}, "has 8 accelerators, and 9 are asked for"),
        (made(node=Node(accelerators=said(4)), power=Power(device_watts=said(700))), {"megawatts": 1.0}, "2,800 W. are a lower bound"),
        (made(nodes=said(2), power=Power(it_watts=said(9000))), {"megawatts": 1.0}, "power.pue is unknown"),
        (made(power=Power(cap_watts=said(2e6))), {"megawatts": 3}, "may draw 2.00 MW at most .power.cap_watts., and 3 MW"),
        (made(h100e=said(288_000), power=Power(facility_watts=said(2e8))), {"megawatts": 100}, "694 W for each of 288,000 H100-equivalents"),
    ],
)  # fmt: skip
def test_what_cannot_be_known_or_had_is_refused_by_name(site, asked, message):
    with pytest.raises(SiteError, match=message):
        size(site, **asked)


def test_gpus_always_work_and_with_nodes_say_what_a_node_holds():
    """A site of which nothing is known: the number of ranks is, and its nodes are not invented."""
    assert (size(made(), gpus=12).nodes, size(made(), gpus=12).ranks, size(made(), gpus=12).ranks_per_node) == (None, 12, None)
    both = size(made(), nodes=3, gpus=12)
    assert (both.nodes, both.ranks, both.ranks_per_node, both.watts) == (3, 12, 4, None)
    assert size(BOOSTER, gpus=2).nodes == 1  # a part of a node


def test_two_devices_of_a_package_are_two_ranks():
    lumi = made(accelerators=said(8), node=Node(accelerators=said(4), ranks=8))
    assert (size(lumi, nodes=2).ranks, size(lumi, gpus=16).nodes) == (16, 2)
    with pytest.raises(SiteError, match="has 2 nodes, and 3 are asked for"):
        size(lumi, gpus=24)


def test_an_assumed_count_is_named():
    site = made(node=Node(accelerators=said(4, "assumed", "as its sister has")))
    assert size(site, nodes=2).assumes == ("node.accelerators = 4 (as its sister has)",)


def test_more_nodes_than_a_job_may_have_are_said():
    site = made(node=Node(accelerators=said(4)), scheduler=Scheduler(max_nodes=said(2, source="the user guide")))
    assert size(site, nodes=2).assumes == ()
    (line,) = size(site, nodes=3).assumes
    assert line == "3 nodes in one job, where its partition or qos gives 2 (the user guide): another, or an agreement"


def test_spares_count_as_nodes_of_the_job():
    site = made(nodes=said(5), node=Node(accelerators=said(4)), scheduler=Scheduler(max_nodes=said(2, source="the user guide")))
    (line,) = spared(size(site, nodes=2), site, 1).assumes
    assert line == "2 nodes and 1 spare in one job, where its partition or qos gives 2 (the user guide): another, or an agreement"
    assert len(spared(size(site, nodes=3), site, 1).assumes) == 1
    with pytest.raises(SiteError, match="has 5 nodes, and 4 with 2 spares are asked for; give fewer of either"):
        spared(size(site, nodes=4), site, 2)


@pytest.mark.parametrize(
    ("watts", "text"), [(694.4, "694 W"), (9_999, "9,999 W"), (9_999.7, "10.0 kW"), (270_000, "270.0 kW"), (15.8e6, "15.80 MW")]
)
def test_watts_are_shown_for_a_reader(watts, text):
    assert shown(watts) == text
