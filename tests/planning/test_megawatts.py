"""Megawatts first, and a site's promise line by line: AION's 694 W to the watt."""

import math

import pytest

from gigatrain import load
from gigatrain.errors import PlanError
from gigatrain.planning import hardware, megawatts
from gigatrain.planning.estimate.cluster import Cluster
from gigatrain.planning.estimate.work import Estimate
from gigatrain.planning.estimate.workload import Layout, Shape, Workload

SHAPE = Shape(
    layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, value_dim=128, intermediate=14336, gated=True, vocab=128256, tied=False
)
WORKLOAD = Workload(SHAPE, Layout(shard=8), 8192, 1, 4, stack="torchtitan", recompute="full")


def test_aion_to_the_watt() -> None:
    found = megawatts.explain(load.site("aion"))
    assert found.watts_per_h100e == pytest.approx(694.4, abs=0.05)
    assert "288,000 H100-equivalents on 200 MW are 694.4 W for each, everything included" in found.promise
    metered = next(
        line for line in found.lines if line.chip == "b200" and "Lenovo" in line.basis and line.precision == "bf16" and line.pue == 1.1
    )
    assert metered.count == math.ceil(288_000 / (2250 / 989)) == 126_592
    assert metered.node_watts == 9_580 / 8
    assert metered.it_watts == pytest.approx((1197.5 + 116) * 1.03)
    assert metered.megawatts == pytest.approx(126_592 * 1352.905 * 1.1 / 1e6)
    assert metered.watts_per_h100e == pytest.approx(654.1, abs=0.1)
    assert metered.verdict == "holds"
    assert metered.margin == pytest.approx(1 - metered.megawatts / 200)
    assert metered.highest_pue is not None
    assert metered.highest_pue[1] == pytest.approx(200e6 / 126_592 / 1352.905)
    for part in (
        "126,592 b200",
        "1,198 W of node",
        "116 W of fabric",
        "1.03 for storage",
        "1.1 PUE",
        "188.4 MW",
        "of 200: holds, 5.8% left",
    ):
        assert part in metered.text()


def test_aion_by_precision_basis_and_pue() -> None:
    """What shared notes on the 694 W found by hand: no H100 holds it, Blackwell at what training draws and not at its nameplate, Rubin in fp8."""
    lines = megawatts.explain(load.site("aion")).lines

    def verdict(chip: str, basis: str, precision: str = "bf16", pue: float = 1.0) -> str:
        return next(
            one.verdict
            for one in lines
            if one.chip == chip and one.basis.startswith(basis) and one.precision == precision and one.pue == pue
        )

    assert all(
        one.verdict == "fails" for one in lines if one.chip in ("h100", "h200", "a100", "mi300x") and one.precision in ("bf16", "fp8")
    )
    assert verdict("b200", "metered", pue=1.3) == "fails"
    assert verdict("b200", "nameplate").startswith("fails")
    assert verdict("gb200", "0.67", pue=1.1) == "holds"
    assert verdict("gb200", "0.67", pue=1.2).startswith("holds")
    assert verdict("rubin", "nameplate", "fp8", 1.3) == "holds"
    assert verdict("rubin", "nameplate").startswith("fails")
    for one in lines:
        low, high = one.interval
        assert low <= one.megawatts <= high
        assert one.source


def test_a_cap_that_holds_the_promise_gives_the_allowed_watts_back() -> None:
    cap = next(one for one in megawatts.explain(load.site("aion")).caps if (one.chip, one.precision, one.pue) == ("b300", "bf16", 1.1))
    assert cap.cap_watts is not None
    around = megawatts.energy.server()
    node = (cap.cap_watts + around.rest.value) * (1 + around.fans.value) / around.efficiency.value
    assert (node + 232) * 1.03 * 1.1 / (2250 / 989) == pytest.approx(200e6 / 288_000)
    assert cap.least_watts < cap.cap_watts < cap.sold_watts
    assert cap.kept is not None
    assert 0.5 < cap.kept.mid < 1


def test_every_site_is_explained_and_says_what_is_unknown() -> None:
    for name in load.sites():
        site = load.site(name)
        found = megawatts.explain(site)
        text = list(megawatts.explained(found))
        assert text[0] == found.promise
        missing = [path for path, figure in site.figures() if path.startswith("power.") and not figure.known]
        assert all(any(line.startswith(path) for line in found.unknown) for path in missing)
        if site.h100e.known and site.accelerator is None:
            assert {line.chip for line in found.lines} >= {"h100", "b200", "gb200", "mi355x", "rubin"}
        if not site.accelerators.known and not site.h100e.known:
            assert not found.lines
            assert "does not say how many" in found.promise
    text = list(megawatts.explained(megawatts.explain(load.site("aion"))))
    assert any(line.startswith("no PUE holds it") and "h100 999 to 1,433" in line for line in text)
    assert any(line.startswith("    none is low enough: a100 in bf16") for line in text)
    assert any("mi430x" in line for line in megawatts.explain(load.site("aion")).unknown)


def test_a_sites_own_measurement_stands_beside_the_arithmetic() -> None:
    found = megawatts.explain(load.site("jupiter"))
    assert found.compared[0].startswith("the site's own IT: 15.80 MW over 23,536 = 671 W each (measured")
    assert {line.chip for line in found.lines} == {"gh200"}
    assert all(line.count == 23_536 for line in found.lines)


def test_ratios_are_of_dense_rates_and_fp4_is_over_the_h100s_fp8() -> None:
    assert megawatts.ratio("h100", "bf16") == 1.0
    assert megawatts.ratio("h100", "fp4") is None
    assert megawatts.ratio("gb300", "fp4") == pytest.approx(15000 / 1979)
    assert megawatts.ratio("mi430x", "bf16") is None


def test_options_fill_the_megawatts_and_no_more_best_first() -> None:
    found = megawatts.options(WORKLOAD, 10.0, 1.2, chips=("h100", "b200", "mi430x", "gh200-144"), caps=(1.0, 0.7))
    known = [one for one in found if not one.unknown]
    assert [(one.chip, one.cap_watts) for one in known] != []
    assert {one.chip for one in known} == {"h100", "b200"}
    assert [one.goodput_tokens_per_s for one in known] == sorted((one.goodput_tokens_per_s for one in known), reverse=True)
    for one in known:
        assert one.watts is not None
        assert one.accelerators % 8 == 0  # whole copies of the layout
        assert one.accelerators * one.watts.mid <= 10e6 * 1.001
        assert (one.accelerators + 8) * one.watts.mid > 10e6 * 0.999
        assert one.cap_watts is not None
        assert one.device_watts <= one.cap_watts
    unknown = {one.chip: one.unknown for one in found if one.unknown}
    assert "not published" in unknown["mi430x"]
    assert "scale-up" in unknown["gh200-144"]


def test_a_lower_cap_holds_more_and_slower_accelerators() -> None:
    full, low = (megawatts.options(WORKLOAD, 10.0, 1.2, chips=("h100",), caps=(cap,))[0] for cap in (1.0, 0.7))
    assert low.accelerators > full.accelerators
    assert low.tokens_per_s / low.accelerators < full.tokens_per_s / full.accelerators
    assert low.kept is not None
    assert full.kept is not None
    assert low.kept.mid < full.kept.mid == 1.0


def test_losses_of_many_accelerators_are_taken_off() -> None:
    found = megawatts.options(WORKLOAD, 10.0, 1.2, chips=("h100",), caps=(1.0,), goodput=lambda count: 1 - count / 1e5)[0]
    assert found.goodput is not None
    assert found.goodput == 1 - found.accelerators / 1e5
    assert found.goodput_tokens_per_s == pytest.approx(found.tokens_per_s * found.goodput)
    assert "goodput" in found.text(10.0)


def test_what_does_not_fit_is_said() -> None:
    def full(workload: Workload, cluster: Cluster) -> Estimate:
        return Estimate(
            step_s=1.0, low_s=0.8, high_s=1.2, phases={}, busy={"gemm": 1.0}, tokens=1, ranks=8, model_flops=1.0, memory={"weights": 2.0**40}, memory_low=0,
            memory_high=0, memory_by_rank=(), fits=False, limits="",
        )  # fmt: skip

    found = megawatts.options(WORKLOAD, 10.0, 1.2, chips=("h100",), estimator=full)
    assert [one.unknown for one in found] == ["this layout does not fit: a rank holds 1024 GiB, and 79 are there"]
    small = megawatts.options(WORKLOAD, 1e-3, 1.2, chips=("h100",))
    assert "do not hold one copy of the layout" in small[0].unknown
    with pytest.raises(PlanError, match="PUE"):
        megawatts.options(WORKLOAD, 10.0, 0.9)


def test_the_report_names_the_unknown_and_warns_at_the_edge() -> None:
    found = megawatts.options(WORKLOAD, 10.0, 1.2, chips=("h100", "rubin"), caps=(1.0, 0.6))
    lines = list(megawatts.report(found, 10.0, 1.2))
    assert lines[0].startswith("10 MW at the facility, PUE 1.2")
    assert any(line.startswith("rubin") and "not published" in line for line in lines)
    assert hardware.CHIPS["rubin"].watts.value is None


def test_levels_count_ranks_of_which_a_package_has_two() -> None:
    found = megawatts.cluster_of("mi250x", 1024)
    assert [(level.name, level.accelerators, level.gbyte_s) for level in found.levels] == [
        ("scale_up", 8, 175.0),
        ("rail.slingshot", 2048, 12.5),
    ]
    assert found.memory_bytes == int(hardware.VISIBLE * 2**36)  # of one device
    other = megawatts.cluster_of("h100", 1024)
    assert [(level.name, level.accelerators) for level in other.levels] == [("scale_up", 8), ("rail", 1024)]
    assert hardware.network_kind("the default of a data sheet") == ""  # which has no EFA in it
