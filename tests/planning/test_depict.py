"""A picture of a plan of real parts: what it is given is on it, what it is not given is not, and its figures are theirs."""

from dataclasses import replace

import pytest

from gigatrain import load
from gigatrain.planning import expect, watts
from gigatrain.planning.depict import depict
from gigatrain.planning.estimate import energy, failures, goodput, recovery, search
from gigatrain.planning.estimate.estimate import estimate
from gigatrain.planning.estimate.workload import Layout, Shape, Workload
from gigatrain.planning.expected import Expected, Range

SHAPE = Shape(
    layers=16, hidden=2048, heads=16, kv_heads=8, head_dim=128, value_dim=128, intermediate=8192, gated=True, vocab=32768, tied=False
)
WORKLOAD = Workload(SHAPE, Layout(shard=16), sequence=4096, microbatch=1, accumulation=4, recompute="selective", stack="megatron")
SITE = load.site("jupiter")


@pytest.fixture(scope="module")
def depicted():
    cluster, drawn_of = expect.cluster_of(SITE, 16), watts.of(SITE, 16)
    found = search.search(WORKLOAD, cluster, top=2).candidates
    best = found[0]
    draw = energy.draw(best.estimate, best.workload, cluster, drawn_of)
    case = goodput.Case(16, 4, best.estimate.step_s, failures.elsewhere(), recovery.Saving(1e10, 10.0))
    expected = Expected(
        tokens_per_s=Range(low=1.0, mid=best.estimate.tokens_per_s, high=1e9), watts=draw.watts, goodput=Range(low=0.9, mid=0.95, high=0.99)
    )
    return best, draw, depict(
        "small", expected, best.workload, cluster, best.estimate, watts=drawn_of, draw=draw, case=case, tokens=1e12, found=found,
        cluster_of=lambda count: expect.cluster_of(SITE, count), counts=(8, 64, 4096),
    )  # fmt: skip


def test_its_figures_are_those_of_its_parts(depicted):
    best, draw, picture = depicted
    assert [one.chosen for one in picture.candidates] == [True, False]
    assert picture.candidates[0].step_s == best.estimate.step_s
    assert [one.name for one in picture.boundaries] == [name for name in energy.BOUNDARIES if name in draw.watts]
    assert picture.boundaries[0].mean == draw.watts["device"]
    assert len(picture.roles) == best.layout.pipeline
    assert [row.accelerators for row in picture.scaling] == [8, 16, 64, 4096]
    own = next(row for row in picture.scaling if row.accelerators == 16)
    assert own.step_s == pytest.approx(best.estimate.step_s)
    assert own.facility_watts == pytest.approx(draw.watts["facility"].mid)
    assert picture.scaling[-1].goodput is not None
    assert picture.what_if is not None
    assert picture.what_if.it_watts == pytest.approx(draw.watts["it"].mid / 16)
    assert picture.what_if.caps[-1].speed == 1.0
    assert picture.what_if.caps[0].speed < 1.0
    assert {row.changed for row in picture.sensitivity} == {"half of it", "twice as much"}


def test_what_is_not_given_is_not_on_it():
    alone = replace(WORKLOAD, layout=Layout(shard=8))
    cluster = expect.cluster_of(SITE, 8)
    picture = depict("bare", Expected(), alone, cluster, estimate(alone, cluster))
    for part in ("scaling", "candidates", "boundaries", "sensitivity", "what_if"):
        assert not getattr(picture, part), part
    assert picture.roof is not None
    assert picture.roles[0].name == "every rank"
