"""Goodput in closed form: against formulas that others derived, against published runs, and that what it calls best is best."""

import math
from dataclasses import replace

import pytest
from programs import program

from gigatrain.errors import PlanError
from gigatrain.planning.estimate.failures import DAY_S, KINDS, PUBLISHED, SPREAD, Failures, Kind, counted, elsewhere
from gigatrain.planning.estimate.goodput import Case, expected, forecast, sensitivity
from gigatrain.planning.estimate.goodput_simulation import Saves, poisson, replay
from gigatrain.planning.estimate.recovery import Restart, Saving, Spares


@pytest.fixture(scope="module")
def bench():
    return program("benchmarks/goodput.py")


def plain(mtbf_s, restart_s, stall_s, **saving):
    """One kind of failure, one tier, loads that take nothing."""
    failures = Failures("a test", 1 / mtbf_s / 1000, math.inf, (Kind("crash", 1, 0),), planned_per_day=0)
    restart = Restart(allocation_s=0, start_s=0, rendezvous_s=0, first_s=restart_s, growth=0)
    return Case(1000, 8, 1.0, failures, Saving(stall_s * 1e9, 1.0, read_gbyte_s=1e12, **saving), restart)


def test_published_counts_are_whole_and_give_the_published_times_between_failures():
    assert sum(round(419 * kind.share) for kind in KINDS) == 419
    assert sum(kind.share for kind in KINDS) == pytest.approx(1)
    assert 1 / PUBLISHED["llama3"].per_s(16_384) / 3600 == pytest.approx(54 * 24 / 419)
    assert 1 / PUBLISHED["rsc-1"].per_s(16_384) / 3600 == pytest.approx(1.8, rel=0.02)  # arXiv 2410.21680: 1.8 h and 0.23 h
    assert 1 / PUBLISHED["rsc-1"].per_s(131_072) / 3600 == pytest.approx(0.23, rel=0.03)
    assert 1 / PUBLISHED["hsdp-32k"].per_s(100_000) / 60 == pytest.approx(50, rel=0.01)  # arXiv 2602.00277, were the rate the same
    assert 1 / PUBLISHED["hsdp-98k"].per_s(98_304) / 60 == pytest.approx(18)
    wear = replace(PUBLISHED["hsdp-32k"], wear=1 + math.log(6.51 / 2.3) / math.log(3), of=32_768)
    assert 1 / wear.per_s(98_304) / 60 == pytest.approx(18, rel=0.01)


def test_the_range_of_a_rate_is_a_gamma_posterior_and_as_wide_as_sites_differ():
    low, high = counted("ours", 3, 512, 20, KINDS).range()
    assert (3 * low, 3 * high) == pytest.approx((1.084, 7.034), rel=0.01)  # quantiles of a gamma distribution of shape 3.5
    low, high = counted("ours", 0, 512, 20, KINDS).range()
    assert (low / 2, high / 2) == pytest.approx((0.00197, 1.921), rel=0.03)  # of shape 0.5
    low, high = PUBLISHED["llama3"].range()
    assert low == pytest.approx(1 - 1.645 / math.sqrt(419), abs=0.01)
    assert high == pytest.approx(1 + 1.645 / math.sqrt(419), abs=0.01)
    assert elsewhere().range()[1] > math.exp(1.64 * SPREAD)
    with pytest.raises(PlanError, match="give how many were counted"):
        counted("ours", -1, 512, 20, KINDS)


@pytest.mark.parametrize(("mtbf_s", "restart_s", "stall_s", "work_s"), [(3600, 120, 5, 300), (1080, 600, 14, 170), (60, 7, 0.5, 10)])
def test_one_tier_and_one_kind_is_dalys_formula(mtbf_s, restart_s, stall_s, work_s):
    found = expected(plain(mtbf_s, restart_s, stall_s, far_interval_s=float(work_s)))
    # J. Daly, FGCS 22 (2006) 303, equation 13: wall-clock of a segment is M exp(R/M) (exp((T + stall)/M) - 1)
    daly = work_s / (mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((work_s + stall_s) / mtbf_s))
    assert found.share == pytest.approx(daly, rel=1e-9)


def test_the_best_interval_is_youngs_where_failures_are_rare_and_no_other_is_better():
    case = plain(1e6, 300, 20)
    found = expected(case)
    assert found.interval_s == pytest.approx(math.sqrt(2 * 20 * 1e6), rel=0.03)
    assert found.every_steps == round(found.interval_s)
    for factor in (0.8, 1.25):
        assert expected(plain(1e6, 300, 20, far_interval_s=factor * found.interval_s)).share < found.share
    two = replace(case, failures=elsewhere(), accelerators=65_536, saving=Saving(2e13, 8000.0, synchronous=False, near=True))
    best = expected(two)
    assert best.near_every_steps
    for near, far in ((3, 1), (1, 3), (1, 0.4)):
        saving = replace(two.saving, near_interval_s=near * best.near_every_steps * two.step_s, far_interval_s=far * best.interval_s)
        assert expected(replace(two, saving=saving)).share < best.share
    assert best.interval_s >= two.saving.far_lag_s()  # no save begins before the last is written


def test_a_pool_without_joint_losses_is_erlangs_and_the_best_number_is_best(bench):
    pool = Spares(repair_s=DAY_S).held(2 / DAY_S, 0.0, 2, 2)
    assert pool.wait == pytest.approx(4 / 19)  # Erlang B of 2 erlangs on 3 lines
    assert sum(pool.out) == pytest.approx(1)
    shrinks = Spares(repair_s=DAY_S, shrink=True).held(2 / DAY_S, 0.0, 2, 2)
    assert shrinks.out[3] == pytest.approx(math.exp(-2) * 2**3 / 6)  # Poisson: nothing waits
    assert shrinks.missing(1, 100) == pytest.approx(sum((j - 2) * math.exp(-2) * 2**j / math.factorial(j) for j in range(3, 40)) / 100)
    assert Spares(repair_s=DAY_S).held(2 / DAY_S, 0.1 / DAY_S, 4, 10**6).wait < 1e-12
    joint = Spares(repair_s=DAY_S).held(1 / DAY_S, 0.5 / DAY_S, 2, 2)
    assert joint.wait > pool.wait  # as many nodes, in pairs
    for name in ("16,384", "98,304, HSDP"):
        case = bench.grid()[name]
        best = expected(case)
        assert best.spares > 0
        for nodes in (0, best.spares // 2, best.spares - 1, best.spares + 1, 2 * best.spares):
            assert expected(replace(case, spares=replace(case.spares, nodes=nodes))).per_accelerator <= best.per_accelerator + 1e-12
        cheap = expected(replace(case, spares=Spares(idle_share=0.1)))
        assert cheap.spares >= best.spares


def test_what_is_lost_adds_up(bench):
    for name, case in bench.grid().items():
        found = expected(case)
        assert found.share + sum(found.lost.values()) == pytest.approx(1, abs=1e-9), name
        assert 0 <= found.low <= found.share <= found.high <= 1, name
    hopeless = forecast(1 << 20, 8, 10.0, 1e13)
    assert hopeless.share < 1e-3
    assert hopeless.share + sum(hopeless.lost.values()) == pytest.approx(1)
    free = forecast(8, 8, 1.0, 0.0, failures=replace(elsewhere(), per_accelerator_s=0.0, planned_per_day=0.0))
    assert (free.share, free.lost, free.mtbf_s) == (1.0, {}, math.inf)


def test_published_goodputs(bench):
    rows = bench.anchors()
    for one in rows:
        found = expected(one.case)
        if one.scored and one.at_least:
            assert one.published <= found.share, one.name
        elif one.scored:
            assert found.share == pytest.approx(one.published, abs=0.05), one.name
    assert sum(one.scored for one in rows) >= 8
    for name, published, share in bench.told():
        assert share == pytest.approx(published, abs=0.01), name


def test_against_reliabilitys_own_table(bench):
    """Its simulation was another one; A and B save in the background there, which is approximated by a stall here."""
    published = [
        (83.9, 35.1, 25.3, 4.4),
        (95.4, 77.4, 71.6, 48.3),
        (98.6, 93.3, 91.4, 82.4),
        (99.1, 96.4, 95.4, 90.6),
        (99.4, 98.2, 97.7, 95.4),
    ]
    for (name, found), row in zip(bench.policies(), published, strict=True):
        assert [100 * share for share in found] == pytest.approx(row, abs=1), name


def test_a_restart_grows_as_it_was_published():
    cold, warm = Restart(), Restart(standby=True)  # arXiv 2602.00277, figure 2
    for accelerators, published_s in ((16_384, 200), (22_528, 300), (65_536, 600), (98_304, 900)):
        assert cold.seconds(accelerators) == pytest.approx(published_s, rel=0.16)
    assert warm.seconds(98_304) == pytest.approx(600, rel=0.02)
    assert cold.seconds(64) < cold.seconds(16_384)


def test_losing_a_replica_is_cheaper_than_losing_all():
    case = Case(98_304, 8, 20.0, PUBLISHED["hsdp-98k"], Saving(2.8e13, 2000.0), replicas=12)
    whole, part = expected(case), expected(replace(case, tolerance=True))
    assert part.share > whole.share + 0.2
    assert part.lost["reduced"] > 0
    assert expected(replace(case, tolerance=True, replicas=1)).share == expected(replace(case, replicas=1)).share  # nobody is left to go on


def test_lemons_that_are_put_out_fail_no_more():
    rate = replace(PUBLISHED["llama3"], lemon_factor=30.0)
    assert rate.kept(90, 8) == 1  # nobody puts them out
    kept = replace(rate, strikes=3).kept(90, 8)
    assert 0.7 < kept < 1
    assert replace(rate, strikes=1).kept(90, 8) < kept
    good, lemon = rate.node_rates(8)
    assert 0.988 * good + 0.012 * lemon == pytest.approx(8 * rate.per_accelerator_s)


def test_what_an_input_does():
    case = Case(32_768, 8, 10.0, elsewhere(), Saving(5.7e12, 1000.0), spares=Spares(20))
    rows = {row.name: row for row in sensitivity(case)}
    for name in ("failure rate", "detection", "restart", "checkpoint bytes", "repair", "maintenance"):
        assert rows[name].halved >= 0 >= rows[name].doubled, name
    for name in ("storage bandwidth", "spares"):
        assert rows[name].halved <= 0 <= rows[name].doubled, name
    sizes = [max(abs(row.halved), abs(row.doubled)) for row in sensitivity(case)]
    assert sizes == sorted(sizes, reverse=True)


def test_a_longer_run_and_more_counts_are_surer():
    short, long = (forecast(1024, 8, 5.0, 1e12, failures=PUBLISHED["llama3"], days=days) for days in (3, 300))
    assert long.high - long.low < short.high - short.low
    assert forecast(1024, 8, 5.0, 1e12, days=300).low < long.low  # another site's rate


def test_the_interval_holds_nine_runs_of_ten():
    days, mtbf_s = 30, 2 * DAY_S
    case = replace(plain(mtbf_s, 3600, 20), days=days)
    found = expected(case)
    saves = Saves(found.interval_s, 20)
    runs = [replay(poisson(mtbf_s, days * DAY_S, [0], [3600], seed), days * DAY_S, saves).share for seed in range(400)]
    assert sum(runs) / len(runs) == pytest.approx(found.share, abs=0.002)
    assert 0.85 <= sum(found.low <= share <= found.high for share in runs) / len(runs) <= 0.95


def test_forecast_says_what_it_assumed():
    found = forecast(1024, 4, 5.0, 1e12, explain=True)
    text = " ".join(found.assumed)
    for word in ("write_gbyte_s is unknown", "failures of this site are unknown", "restart", "spare nodes", "30 days"):
        assert word in text
    assert found.table[0].startswith(f"goodput {100 * found.share:.1f} %")
    assert any("failure rate" in line for line in found.table)
    known = forecast(
        1024, 4, 5.0, 1e12, write_gbyte_s=200.0, failures=counted("ours", 9, 1024, 40, KINDS), restart=Restart(standby=True), spares=2,
        days=14, every_steps=100,
    )  # fmt: skip
    assert (known.assumed, known.spares, known.every_steps, known.interval_s) == ((), 2, 100, 500.0)
    assert "2.8 times" in " ".join(forecast(100_000, 8, 5.0, 1e12).assumed)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"accelerators": 0}, "each must be above 0"),
        ({"step_s": 0.0}, "steps of 0 s"),
        ({"write_gbyte_s": 0.0}, "write_gbyte_s above 0"),
        ({"spares": -1}, "give 0 or more"),
    ],
)
def test_refusals(change, text):
    with pytest.raises(PlanError, match=text):
        forecast(**({"accelerators": 64, "per_node": 8, "step_s": 1.0, "checkpoint_bytes": 1e10} | change))  # type: ignore[arg-type]
