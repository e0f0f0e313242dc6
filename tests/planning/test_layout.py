"""Stages by cost, against every possible cut; who holds which stage; what is refused."""

import itertools
import random

import pytest

from gigatrain.architectures import Architecture, resolve
from gigatrain.errors import PlanError
from gigatrain.planning import layout


def named(name):
    return Architecture(**resolve(name))


def test_costs_add_up_to_the_architecture_and_its_look_up():
    for name in ("llama-3.1-8b", "gemma-3-1b", "gemma-2-2b", "mixtral-8x7b", "qwen3-30b-a3b"):
        architecture = named(name)
        for sequence in (1, 512, 4096):
            expected = architecture.flops_per_token(sequence) + 2 * architecture.hidden
            assert sum(layout.costs(architecture, sequence)) == pytest.approx(expected, rel=1e-12)


def test_layers_with_a_window_cost_less():
    gemma = named("gemma-3-1b")
    found = layout.costs(gemma, 8192)
    assert gemma.window_of(1)
    assert not gemma.window_of(5)
    assert found[5] - found[1] == pytest.approx(12 * gemma.heads * gemma.head_dim * (4096.5 - (512 * 513 / 2 + 7680 * 512) / 8192))


def _every(costs, count):
    for inner in itertools.combinations(range(1, len(costs)), count - 1):
        bounds = [0, *inner, len(costs)]
        yield [range(a, b) for a, b in itertools.pairwise(bounds)]


def test_no_cut_is_better():
    draw = random.Random(0)
    for _ in range(150):
        size = draw.randint(1, 9)
        count = draw.randint(1, size)
        costs = tuple(float(draw.choice((1, 1, 1, 2, 3, 7, 20))) for _ in range(size))
        runs = layout.cut(costs, count)
        assert [i for run in runs for i in run] == list(range(size))
        assert all(len(run) for run in runs)

        def value(cut, costs=costs):
            sums = [sum(costs[i] for i in run) for run in cut]
            return max(sums), sum(s * s for s in sums)

        assert value(runs) == min(value(cut) for cut in _every(costs, count))


def test_the_head_takes_the_place_of_layers():
    llama = named("llama-3.1-8b")
    found = layout.stages(llama, 8192, 4)
    assert [len(run) for run in found] == [8, 9, 9, 6]  # the head is 2 layers' work at 8,192 tokens
    assert [len(run) for run in layout.stages(llama, 8192, 32)] == [1] * 32


def test_the_largest_is_cut_in_time():
    big = named("llama-3.1-8b").model_copy(update={"layers": 126})
    for count in (16, 63, 126):
        runs = layout.stages(big, 8192, count)
        assert len(runs) == count
        assert [i for run in runs for i in run] == list(range(126))


def test_fewer_layers_than_stages_are_refused():
    with pytest.raises(PlanError, match="33 stages needs as many layers, and the model has 32; lower mesh.pipeline"):
        layout.stages(named("llama-3.1-8b"), 8192, 33)


@pytest.mark.parametrize(("schedule", "each"), [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2)])
def test_every_stage_has_one_rank(schedule, each):
    for ranks in (2, 3, 4):
        found = [layout.held(schedule, rank, ranks, each) for rank in range(ranks)]
        assert sorted(itertools.chain(*found)) == list(range(ranks * each))
        assert all(list(stages) == sorted(stages) and len(stages) == each for stages in found)
    if schedule == "zbv":
        assert [layout.held("zbv", rank, 2, 2) for rank in range(2)] == [(0, 3), (1, 2)]


@pytest.mark.parametrize(
    ("layers", "schedule", "ranks", "each", "microbatches", "compiled", "text"),
    [
        (8, "1f1b", 1, 2, 4, False, "mesh.stages 2 needs a pipeline"),
        (8, "1f1b", 2, 2, 4, False, '"1f1b" has exactly 1 stage on each rank, and mesh.stages is 2'),
        (8, "interleaved", 2, 1, 4, False, '"interleaved" has 2 stages or more on each rank, and mesh.stages is 1'),
        (12, "zbv", 2, 3, 4, False, '"zbv" has exactly 2 stages on each rank, and mesh.stages is 3'),
        (3, "zbv", 2, 2, 4, False, "mesh.pipeline 2 with 2 stages each needs 4 layers, and the model has 3"),
        (
            8,
            "1f1b",
            4,
            1,
            3,
            False,
            '"1f1b" needs as many microbatches as mesh.pipeline, 4, and a data rank has 3 a step; lower train.microbatch',
        ),
        (8, "interleaved", 4, 2, 9, False, "in 2 equal turns of 4 or more .* has 9 a step; make them 8 or 10"),
        (8, "zbv", 2, 2, 4, True, '"zbv" computes weight gradients apart'),
    ],
)
def test_what_cannot_run_is_refused(layers, schedule, ranks, each, microbatches, compiled, text):
    with pytest.raises(PlanError, match=text):
        layout.check(layers, schedule, ranks, each, microbatches, compiled=compiled)


def test_what_can_run_is_not():
    layout.check(8, "1f1b", 1, 1, 1, compiled=True)
    layout.check(8, "1f1b", 4, 1, 4, compiled=True)
    layout.check(8, "interleaved", 4, 2, 10, compiled=True)
    layout.check(8, "interleaved", 4, 2, 3, compiled=True)
    layout.check(8, "zbv", 4, 2, 1, compiled=False)
