"""The simulated step: pipelines against closed forms and torch's own orders, transfers between all hidden and none, a long accumulation against all of it."""

from dataclasses import replace

import pytest
from torch.distributed.pipelining import schedules

from gigatrain.planning.estimate import pipeline_order
from gigatrain.planning.estimate.habits import Cost, Habits, Timeline
from gigatrain.planning.estimate.passes import Run, run
from gigatrain.planning.estimate.step import simulate
from gigatrain.planning.estimate.work import Block, Item, Op, Transfer, Work
from gigatrain.planning.estimate.workload import Layout, Schedule, Shape, Workload

SHAPE = Shape(
    layers=4, hidden=64, heads=4, kv_heads=4, head_dim=16, value_dim=16, intermediate=256, gated=False, vocab=128, tied=False,
)  # fmt: skip
SPLIT = {"forward": 1.0, "dgrad": 1.0, "wgrad": 1.0, "recompute": 1.0}


def op(name: str, seconds: float, passes: str = "forward") -> Op:
    return Op(name, "gemm", passes, flops=seconds)


def cost(item: Item) -> Cost:
    """An operation's FLOPs and a transfer's bytes are its seconds here."""
    return Cost(item.flops if isinstance(item, Op) else item.bytes)


def block(*around: Transfer, seconds: float = 1.0, gather: float = 0.0, reduce: float = 0.0) -> Block:
    gathers = (Transfer("weights", "shard", "all_gather", gather, "forward"),) if gather else ()
    reduces = (Transfer("gradients", "shard", "reduce_scatter", reduce, "backward"),) if reduce else ()
    back = (*gathers, op("dgrad", seconds, "dgrad"), op("wgrad", seconds, "wgrad"), *reduces)
    return Block("layer", (*gathers, *around, op("product", seconds)), back, (), 0.0, 0.0, 0.0)


def workload(ranks: int, stages: int, microbatches: int, schedule: Schedule = "1f1b") -> Workload:
    return Workload(SHAPE, Layout(pipeline=ranks, stages=stages, schedule=schedule), 128, 1, microbatches)


def works(
    ranks: int, stages: int, schedule: Schedule = "1f1b", *, boundary: float = 0.0, ends: float = 0.0, step: tuple[Item, ...] = ()
) -> tuple[Work, ...]:
    """Even stages; `ends` more seconds on the first and on the last one."""
    layer, end = block(), block(seconds=1.0 + ends)
    made = []
    for rank in range(ranks):
        numbers = tuple(pipeline_order.number_of(schedule, ranks, rank, stage) for stage in range(stages))
        rows = tuple((end,) if ends and number in (0, ranks * stages - 1) else (layer,) for number in numbers)
        made.append(Work(rows, numbers, step, boundary))
    return tuple(made)


def stepped(ranks: int, stages: int, microbatches: int, schedule: Schedule = "1f1b", **of: float) -> Timeline:
    return simulate(works(ranks, stages, schedule, **of), workload(ranks, stages, microbatches, schedule), cost, Habits("generic"))  # type: ignore[arg-type]


def adds_up(line: Timeline) -> None:
    assert sum(line.phases.values()) == pytest.approx(line.step_s, rel=1e-12)
    assert min(line.phases.values()) >= 0


@pytest.mark.parametrize(("ranks", "stages", "microbatches"), [(4, 1, 4), (4, 1, 16), (8, 1, 100), (4, 2, 8), (4, 3, 16), (8, 4, 64)])
def test_the_bubble_is_the_closed_form_of_its_schedule(ranks: int, stages: int, microbatches: int) -> None:
    line = stepped(ranks, stages, microbatches, "interleaved" if stages > 1 else "1f1b")
    adds_up(line)
    assert line.phases["bubble"] / line.step_s == pytest.approx((ranks - 1) / (stages * microbatches + ranks - 1))
    assert line.phases["gemm"] == 3.0 * stages * microbatches


def test_a_v_with_split_backwards_has_nearly_no_bubble() -> None:
    line = stepped(4, 2, 32, "zbv")
    adds_up(line)
    assert line.phases["bubble"] / line.step_s < 0.02
    assert line.step_s < stepped(4, 2, 32, "interleaved").step_s < stepped(4, 1, 32).step_s * 2


def of_torch(actions: list[schedules._Action | None], ranks: int, rank: int, schedule: Schedule) -> list[tuple[int, int, int]]:
    """Torch's actions in our words, its idle slots left out."""
    kinds = {schedules.F: 0, schedules.I: 1, schedules.B: 1, schedules.W: 2}
    return [
        (
            kinds[action.computation_type],
            action.stage_index // ranks if schedule != "zbv" else int(action.stage_index != rank),
            action.microbatch_index,
        )
        for action in actions
        if action is not None and action.microbatch_index is not None
    ]


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 5), (4, 11)])
def test_a_v_runs_in_torchs_order(ranks: int, microbatches: int) -> None:
    made = schedules.ScheduleZBVZeroBubble.__new__(schedules.ScheduleZBVZeroBubble)
    made.pp_group_size, made.num_stages, made._n_microbatches = ranks, 2 * ranks, microbatches
    for rank in range(ranks):
        assert pipeline_order.order("zbv", ranks, 2, microbatches, rank) == of_torch(
            made._calculate_single_rank_operations(rank), ranks, rank, "zbv"
        )


@pytest.mark.parametrize(("ranks", "stages", "microbatches"), [(2, 2, 4), (4, 2, 8), (4, 3, 16)])
def test_interleaved_runs_in_torchs_order(ranks: int, stages: int, microbatches: int) -> None:
    made = schedules.ScheduleInterleaved1F1B.__new__(schedules.ScheduleInterleaved1F1B)
    made.pp_group_size, made.n_local_stages, made._n_microbatches = ranks, stages, microbatches
    made.number_of_rounds, made.microbatches_per_round = microbatches // ranks, ranks
    made._num_stages = ranks * stages
    for rank in range(ranks):
        theirs = of_torch(made._calculate_single_rank_operations(rank), ranks, rank, "interleaved")
        assert pipeline_order.order("interleaved", ranks, stages, microbatches, rank) == theirs


@pytest.mark.parametrize(("ranks", "stages", "schedule"), [(4, 1, "1f1b"), (4, 2, "interleaved"), (3, 2, "zbv")])
@pytest.mark.parametrize("boundary", [0.0, 0.05, 0.4])
def test_a_long_accumulation_takes_what_all_of_it_takes(ranks: int, stages: int, schedule: Schedule, boundary: float) -> None:
    count = 12 * ranks + (0 if schedule == "interleaved" else 1)
    made = works(ranks, stages, schedule, boundary=boundary, ends=0.3)
    line = simulate(made, workload(ranks, stages, count, schedule), cost, Habits("generic", overlaps={"pipeline": 0.5}))
    adds_up(line)
    events = pipeline_order.events(schedule, ranks, stages, count)
    rows = [[1.0 if stage[0].forward[0] is made[1].stages[0][0].forward[0] else 1.3 for stage in work.stages] for work in made]
    seconds = [span for row in rows for one in row for span in ((one, one, one) if schedule == "zbv" else (one, 2 * one, 0.0))]
    last = ranks * stages - 1
    held = []
    for work in made:
        for number in work.numbers:
            turn = schedule == "zbv" and number in (ranks - 1, ranks)  # the V's point: both stages are on one rank
            forward = number < last and not (turn and number == ranks - 1)
            backward = number > 0 and not (turn and number == ranks)
            held += [0.5 * boundary * forward, 0.5 * boundary * backward, 0.0]
    exact = pipeline_order.run(events, ranks, seconds, held, boundary)
    assert line.step_s == pytest.approx(max(exact.ends), rel=1e-9)


def test_uneven_ends_lengthen_every_round() -> None:
    assert stepped(4, 1, 40, ends=0.5).step_s - stepped(4, 1, 40).step_s == pytest.approx(0.5 * 3 * 40, rel=0.05)


def whole(habits: Habits, of: Block, layers: int = 4, microbatches: int = 2, step: tuple[Item, ...] = ()) -> Timeline:
    return simulate((Work(((of,) * layers,), (0,), step, 0.0),), workload(1, 1, microbatches), cost, habits)


@pytest.mark.parametrize("axis", ["tensor", "context", "expert"])
def test_a_transfer_in_a_block_is_between_all_hidden_and_none(axis: str) -> None:
    moved = Transfer("tokens", axis, "all_gather", 0.4, "forward")  # type: ignore[arg-type]
    lines = [whole(Habits("generic", overlaps={axis: share}), block(moved)) for share in (0.0, 0.5, 1.0)]
    for line, shown in zip(lines, (0.4, 0.2, 0.0), strict=True):
        adds_up(line)
        assert line.step_s == pytest.approx(4 * 2 * (3.0 + shown))
        assert line.busy["communication"] == pytest.approx(4 * 2 * 0.4)
    slowed = whole(Habits("generic", overlaps={axis: 1.0}, slowdown={axis: 0.1}), block(moved))
    assert slowed.step_s == pytest.approx(4 * 2 * (3.0 + 0.04))


def test_a_transfer_longer_than_the_compute_beside_it_shows() -> None:
    line = whole(Habits("generic", overlaps={"tensor": 1.0}), block(Transfer("tokens", "tensor", "all_gather", 2.5, "forward")))
    assert line.step_s == pytest.approx(4 * 2 * (3.0 + 1.5))


def test_weights_are_gathered_behind_the_block_before() -> None:
    sharded, microbatches, layers = block(gather=0.5, reduce=0.6), 2, 4
    none = whole(Habits("generic"), sharded)
    assert none.step_s == pytest.approx(microbatches * layers * (3.0 + 0.5 + 0.5 + 0.6))
    full = whole(Habits("generic", overlaps={"shard": 1.0}), sharded)
    adds_up(full)
    # nothing is before the first gather of a pass nor behind the last reduction
    assert full.step_s == pytest.approx(microbatches * (layers * 3.0 + 0.5 + 0.5 + 0.6))
    bound = whole(Habits("generic", overlaps={"shard": 1.0}), block(gather=2.0, reduce=2.0))
    assert bound.step_s >= microbatches * layers * 6.0
    assert bound.step_s < whole(Habits("generic"), block(gather=2.0, reduce=2.0)).step_s


def test_slower_links_never_make_a_step_shorter() -> None:
    for habits in (Habits("generic"), Habits("generic", overlaps={"shard": 1.0, "tensor": 0.7}, slowdown={"shard": 0.1, "tensor": 0.2})):
        before = 0.0
        for slower in (0.1, 0.3, 0.9, 2.0, 5.0):
            moved = Transfer("tokens", "tensor", "all_gather", slower / 2, "forward")
            after = whole(habits, block(moved, gather=slower, reduce=slower)).step_s
            assert after > before
            before = after


def test_a_hosts_launches_are_the_floor_and_graphs_take_them_away() -> None:
    def launched(item: Item) -> Cost:
        return Cost(cost(item).seconds, 2.0)

    line = simulate((Work(((block(),) * 4,), (0,), (), 0.0),), workload(1, 1, 2), launched, Habits("generic"))
    adds_up(line)
    assert line.step_s == pytest.approx(2 * 4 * 3 * 2.0 + 1.0)  # the device ends one operation after the last launch
    assert line.phases["launch"] == pytest.approx(line.step_s - 24.0)
    assert simulate((Work(((block(),) * 4,), (0,), (), 0.0),), workload(1, 1, 2), launched, Habits("generic", graphed=True)).step_s == 24.0
    piped = simulate(works(2, 1), workload(2, 1, 40), launched, Habits("generic"))
    adds_up(piped)
    assert piped.step_s >= 40 * 3 * 2.0


def test_making_activations_again_costs_the_host_once_a_layer_and_only_an_eager_one() -> None:
    def launched(item: Item) -> Cost:
        return Cost(cost(item).seconds, 2.0)

    def step_s(of: Block, habits: Habits) -> float:
        return simulate((Work(((of,) * 4,), (0,), (), 0.0),), workload(1, 1, 2), launched, habits).step_s

    again = replace(block(), recompute=(op("product", 1.0, "recompute"),))
    eager, costly = Habits("generic"), Habits("generic", checkpoint_s=0.5)
    assert step_s(again, costly) == pytest.approx(step_s(again, eager) + 2 * 4 * 0.5)
    assert step_s(block(), costly) == step_s(block(), eager)
    assert step_s(again, replace(costly, graphed=True)) == step_s(again, replace(eager, graphed=True))


def test_runs_compose_as_if_they_were_one() -> None:
    items = [op(str(index), seconds) for index, seconds in enumerate((0.1, 3.0, 0.2, 0.1, 0.1, 2.0, 0.3))]

    def launched(item: Item) -> Cost:
        return Cost(cost(item).seconds, 0.7)

    at_once = run(items, launched, Habits("generic"))
    parts = Run().then(run(items[:3], launched, Habits("generic"))).then(run(items[3:], launched, Habits("generic")))
    assert (parts.device_s, parts.host_s, parts.floor_s) == pytest.approx((at_once.device_s, at_once.host_s, at_once.floor_s))
    thrice = Run().then(at_once, 3)
    assert thrice.floor_s == pytest.approx(Run().then(at_once).then(at_once).then(at_once).floor_s)


def test_gradients_hide_behind_the_last_backward_bucket_by_bucket() -> None:
    step: tuple[Item, ...] = (Transfer("gradients", "replicate", "all_reduce", 4.0, "backward"), replace(op("adam", 1.0), kind="optimizer"))
    bare = whole(Habits("generic"), block(), step=step)
    adds_up(bare)
    assert bare.step_s == 24.0 + 4.0 + 1.0
    hidden = whole(Habits("generic", overlaps={"replicate": 1.0}, bucket_bytes=1.0), block(), step=step)
    adds_up(hidden)
    assert hidden.step_s == pytest.approx(24.0 + 1.0 + 1.0)  # the last of four buckets is full when the backward ends
    assert hidden.phases["exposed_replicate"] == pytest.approx(1.0)
    gathered: tuple[Item, ...] = (Transfer("weights", "shard", "all_gather", 4.0, "forward"),)
    ahead = whole(Habits("generic", overlaps={"shard": 1.0}, bucket_bytes=1.0), block(), step=gathered)
    assert ahead.step_s == pytest.approx(24.0 + 1.0)  # and the first of four is there before the next forward begins


def test_gradients_of_a_rank_that_ends_early_hide_in_its_bubble() -> None:
    step: tuple[Item, ...] = (Transfer("gradients", "replicate", "all_reduce", 0.5, "backward"),)
    assert stepped(4, 1, 8).step_s + 0.5 == simulate(works(4, 1, step=step), workload(4, 1, 8), cost, Habits("generic")).step_s
    late = list(works(4, 1))
    late[3] = replace(late[3], step=step)  # only the last rank has any
    assert simulate(late, workload(4, 1, 8), cost, Habits("generic")).step_s == stepped(4, 1, 8).step_s


def test_spans_show_each_pass_where_it_ran() -> None:
    line = simulate(works(2, 1), workload(2, 1, 3), cost, Habits("generic"), spans=True)
    assert {span[0] for span in line.spans} == {0, 1}
    assert max(span[4] for span in line.spans) == pytest.approx(line.step_s)
    by_rank = sorted(span for span in line.spans if span[0] == 0 and span[2] != "update")
    assert len(by_rank) == 6


def test_gradients_of_an_interleaved_rank_hide_behind_the_stages_that_are_still_to_come() -> None:
    step: tuple[Item, ...] = (Transfer("gradients", "replicate", "all_reduce", 24.0, "backward"),)
    habits = Habits("generic", overlaps={"replicate": 1.0}, bucket_bytes=4.0)
    cases: tuple[tuple[int, Schedule], ...] = ((1, "1f1b"), (3, "interleaved"))  # of one microbatch 2 seconds of backward, and 6
    made = [
        simulate(works(4, stages, schedule, step=step), workload(4, stages, 16, schedule), cost, habits).phases["exposed_replicate"]
        for stages, schedule in cases
    ]
    # one stage: 24 seconds start to be there 2 seconds before the end, a third of a bucket's backward after that the first of six buckets
    assert made[0] == pytest.approx(24.0 - 2.0 + 2.0 / 6)
    # three stages: a third of them is whole 16 seconds of backwards before the end, another one 8 before it
    assert made[1] == pytest.approx(24.0 - 17.0)


def test_a_send_that_synchronises_keeps_the_host_from_running_ahead() -> None:
    def launched(item: Item) -> Cost:
        return Cost(cost(item).seconds, 0.5)

    ahead = simulate(works(4, 1), workload(4, 1, 16), launched, Habits("generic"))
    synced = simulate(works(4, 1), workload(4, 1, 16), launched, Habits("generic", synced_sends=True))
    adds_up(synced)
    # half a second of launches before the device has work: of each pass, and of the rank's first pass alone
    assert synced.step_s == pytest.approx(stepped(4, 1, 16).step_s + 0.5 * 2 * (16 + 3))
    assert ahead.step_s == pytest.approx(stepped(4, 1, 16).step_s + 0.5)


def test_tensor_ranks_of_megatron_send_a_part_of_the_boundary_each() -> None:
    def timed(item: Item) -> Cost:
        return Cost(0.0) if isinstance(item, Transfer) and item.axis == "tensor" else cost(item)

    def stack(name: str, parallel: bool) -> float:
        layout = Layout(pipeline=4, tensor=4, sequence_parallel=parallel)
        made = replace(workload(4, 1, 8), layout=layout, stack=name)  # type: ignore[arg-type]
        return simulate(works(4, 1, boundary=0.4), made, timed, Habits("generic")).step_s

    assert stack("megatron", False) < stack("generic", False)
    assert stack("megatron", True) == stack("generic", True)
