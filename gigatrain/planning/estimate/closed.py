"""A step's seconds and a rank's bytes by formula, a thousand times cheaper than the events: what the search sorts a whole space by.

Operations and transfers of one layer are those of layers.py, timed as estimate.py times them, so that it errs only in how they are put together:

    a microbatch   its rank's layers, as if they were alike, with the embedding and the head as so many layers more; whole layers to a stage
    a pipeline     of p ranks and m microbatches that take T = F + D + W (forward, inputs' and weights' gradients): (m + p - 1) T of 1F1B; interleaved
                   m T + (p - 1) T / v, or where that is longer p T + (m - 1) T / v; of ZBV m T + (p - 1) D / 2, or (m + p - 1) (F + D) + W. With stages alike
                   these are what pipeline_order.py's events come to, exactly
    transfers      beside the work that may hide them as far as the stack overlaps that axis, and its slowing taken off; the rest in full
    memory         states as residency.py shares them, the activations of every microbatch in flight, logits, gathered weights

How far it is from the events is in tests/planning/test_search.py; the search allows for it (search.MARGIN).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from gigatrain.planning import cost
from gigatrain.planning import layout as pipelines
from gigatrain.planning.estimate import collectives, estimate, layers, pieces, residency
from gigatrain.planning.estimate.cluster import Cluster
from gigatrain.planning.estimate.habits import Cost
from gigatrain.planning.estimate.layouts import OWN, Split, arranged, states_of
from gigatrain.planning.estimate.work import Axis, Block, Collective, Item, Op, Transfer
from gigatrain.planning.estimate.workload import Layout, Precision, Recompute, Schedule, States, Workload

AXES = ("tensor", "context", "expert")  # whose transfers are within a layer


@dataclass(slots=True)
class Pass:
    """Seconds of a stretch of items: on the device, of the host's launches, and of transfers by axis."""

    device_s: float = 0.0
    launch_s: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    def add(self, other: "Pass", times: float) -> None:
        self.device_s += times * other.device_s
        self.launch_s += times * other.launch_s
        self.tensor += times * other.tensor
        self.context += times * other.context
        self.expert += times * other.expert


@dataclass(slots=True)
class Layer:
    """The mean layer of a rank, or its embedding and head together."""

    forward_s: float  # what is exposed of its transfers included
    backward_s: float
    weights_s: float  # of the backward: products of weight gradients
    again_s: float
    saved_bytes: float
    transient_bytes: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters of one rank before any is sharded: of the mean layer and of embedding with head, dense and experts."""

    dense: float
    experts: float
    ends: float


@dataclass(frozen=True, slots=True)
class Turned:
    """What microbatches, schedule and policy come to: seconds of the step without what `Shared` adds, those of one microbatch, and bytes in flight."""

    step_s: float
    forward_s: float
    backward_s: float
    count: int
    bytes: float


@dataclass(frozen=True, slots=True)
class Shared:
    """What sharing weights comes to: transfers in a forward and in a backward (`often`: of every microbatch), the update, and bytes."""

    forward_s: float
    backward_s: float
    between_s: float
    often: bool
    update_s: float
    bytes: float


Turn = tuple[int, int, Schedule, int]  # microbatch, accumulation, schedule, stages
Share = tuple[int, int, bool]  # shard, zero, reshard


class Prices:
    """Of one workload on one cluster: what the layouts of a search have in common is timed once."""

    def __init__(self, workload: Workload, cluster: Cluster, constants: Mapping[str, float]) -> None:
        self.workload, self.cluster, self.constants = workload, cluster, constants
        # of any ZeRO stage: what a stage changes of them is in `shared`
        self.habits = estimate.habits_of(replace(workload, layout=replace(workload.layout, zero=3)), cluster, constants)
        self.waits = 1.0 + estimate.wait_share(workload, cluster, constants)
        self.timers: dict[Precision, Callable[[Item], Cost]] = {}
        self.kinds: dict[tuple[bool, int | None], int] = {}
        shape = workload.shape
        for index in range(shape.layers):
            kind = (shape.sparse_of(index), shape.window_of(index))
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
        self.timed: dict[tuple[Precision, Op], tuple[float, float]] = {}
        self.sent: dict[tuple[Transfer, int, int], float] = {}
        self.layers: dict[tuple[object, ...], tuple[Layer, Layer]] = {}
        self.fullest: dict[tuple[int, int, bool, float], float] = {}
        self.shares: dict[tuple[int, int, int, int], tuple[int, int]] = {}
        self.counted: dict[tuple[int, int], Sizes] = {}

    def transfer_s(self, transfer: Transfer, ranks: int, stride: int) -> float:
        """Seconds of one collective of `ranks` that are `stride` apart."""
        if ranks <= 1:
            return 0.0
        key = (transfer, ranks, stride)
        found = self.sent.get(key)
        if found is None:
            found = self.sent[key] = collectives.seconds(transfer, self.cluster, ranks, stride, self.constants)
        return found

    def op_s(self, op: Op, precision: Precision) -> tuple[float, float]:
        """`(device, launch)` seconds of one operation."""
        found = self.timed.get((precision, op))
        if found is None:
            if precision not in self.timers:
                plain = replace(self.workload, precision=precision)
                self.timers[precision] = estimate.timer(plain, self.cluster, self.habits, self.constants)
            cost = self.timers[precision](op)
            found = cost.seconds, cost.launch_s
            self.timed[precision, op] = found
        return found

    def passed(self, items: tuple[Item, ...], layout: Layout, precision: Precision) -> tuple[Pass, float]:
        """A stretch of items, and of it the seconds of weight gradients."""
        found, weights = Pass(), 0.0
        for item in items:
            if isinstance(item, Op):
                seconds, launch = self.op_s(item, precision)
                found.device_s += seconds
                found.launch_s += launch
                weights += seconds if item.passes == "wgrad" else 0.0
            elif item.axis in AXES:
                seconds = self.transfer_s(item, *collectives.group(layout, item.axis, stack=self.workload.stack))
                setattr(found, item.axis, getattr(found, item.axis) + seconds)
        return found, weights

    def exposed(self, seconds: float, beside_s: float, axis: str) -> float:
        """What `seconds` of transfers add to `beside_s` of work that may hide them."""
        hidden = min(seconds * self.habits.overlaps.get(axis, 0.0), beside_s)
        return seconds - hidden + hidden * self.habits.slowdown.get(axis, 0.0)

    def seconds(self, found: Pass) -> float:
        """Of a stretch: the device or the host that launches, whichever is slower, and what is not hidden of its transfers."""
        work = max(found.device_s, found.launch_s)
        return work + sum(self.exposed(getattr(found, axis), work, axis) for axis in AXES)

    def layer(
        self, split: Split, expert: int, microbatch: int, recompute: Recompute, precision: Precision, zero: int
    ) -> tuple[Layer, Layer]:
        """`(the mean layer, embedding and head)` of a microbatch."""
        key = (split.tensor, split.context, split.exchange, expert, microbatch, recompute, precision, zero == 3)
        found = self.layers.get(key)
        if found is None:
            # Nothing of a layer but its sums of gradients depends on who else shares it. No transfer of shards is in these blocks: zero 3 as in a pipeline,
            # where they are the step's.
            data = max(1, self.workload.layout.ranks // (split.tensor * split.context) // expert) * expert
            alone, share = replace(split, pipeline=2, data=data), (data, 3 if zero == 3 else 1, False)
            turn: Turn = (microbatch, 1, "1f1b", 1)
            local = pieces.Local(arranged(self.workload, alone, expert, share, turn, recompute, precision))
            layout = replace(local.workload.layout, pipeline=1, reshard=False)
            count = self.workload.shape.layers
            body = [(layers.layer(local, sparse, window), times / count) for (sparse, window), times in self.kinds.items()]
            ends = [(layers.embedding(local), 1.0), (layers.head(local, tied_here=False), 1.0)]
            ends += [(layers.predicted(local), float(self.workload.shape.predicted))] if self.workload.shape.predicted else []
            found = self.layers[key] = self._mean(body, layout, precision), self._mean(ends, layout, precision)
        return found

    def _mean(self, blocks: list[tuple[Block, float]], layout: Layout, precision: Precision) -> Layer:
        forward, backward, again, weights = Pass(), Pass(), Pass(), 0.0
        for block, times in blocks:
            forward.add(self.passed(block.forward, layout, precision)[0], times)
            back, wgrad = self.passed(block.backward, layout, precision)
            backward.add(back, times)
            weights += times * wgrad
            again.add(self.passed(block.recompute, layout, precision)[0], times)
        return Layer(
            self.seconds(forward),
            self.seconds(backward),
            weights,
            self.seconds(again),
            sum(block.saved_bytes * times for block, times in blocks),
            max(block.transient_bytes for block, _ in blocks),
        )

    def sizes(self, tensor: int, expert: int) -> Sizes:
        """Parameters of a rank's mean layer and ends."""
        found = self.counted.get((tensor, expert))
        if found is None:
            mine = Layout(tensor=tensor, shard=max(1, expert), expert=expert, zero=1)
            local, count = pieces.Local(replace(self.workload, layout=mine, microbatch=1)), self.workload.shape.layers
            each = [(layers.parameters(local, sparse), times) for (sparse, _), times in self.kinds.items()]
            dense, experts = (sum(one[index] * times for one, times in each) / count for index in (0, 1))
            shape = self.workload.shape
            ends = -(-shape.vocab // tensor) * shape.hidden
            found = self.counted[tensor, expert] = Sizes(dense, experts, float(ends))
        return found

    def state_bytes(self, split: Split, expert: int, share: Share, precision: Precision) -> float:
        """Bytes of weights, gradients and optimizer states of the mean rank of a pipeline, which the fullest has at least."""
        (shard, zero, _), shape, sizes = share, self.workload.shape, self.sizes(split.tensor, expert)
        states = states_of(self.workload, precision, zero)
        dense = (shape.layers * sizes.dense + sizes.ends * (1 if shape.tied else 2)) / split.pipeline
        experts = shape.layers * sizes.experts / split.pipeline
        layout = Layout(shard=shard, context=split.context, tensor=split.tensor, expert=expert)
        return self._kept(states, zero, dense + experts, self._owned(layout, zero, dense, experts))

    def _kept(self, states: States, zero: int, whole: float, owned: float) -> float:
        """Bytes of so many parameters, of which a rank has `owned` of what is shared."""
        weights, gradients = states.weights * (owned if zero == 3 else whole), states.gradients * (owned if zero >= 2 else whole)
        if not self.workload.offload:
            return weights + gradients + (states.master + states.moments) * owned
        deepspeed = self.workload.stack == "gigatrain_deepspeed"
        return (0.0 if deepspeed and zero == 3 else weights) + (0.0 if zero == 3 or (deepspeed and zero == 2) else gradients)

    def _owned(self, layout: Layout, zero: int, dense: float, experts: float) -> float:
        dense_ranks, experts_ranks = self._sharing(layout)
        return dense / dense_ranks + experts / experts_ranks if zero else dense + experts

    def _sharing(self, layout: Layout) -> tuple[int, int]:
        """Ranks that share a dense parameter, and an expert's."""
        key = (layout.shard, layout.context, layout.tensor, layout.expert)
        found = self.shares.get(key)
        if found is None:
            local = pieces.Local(replace(self.workload, layout=layout, microbatch=1))
            found = self.shares[key] = (local.shards, local.expert_shards)
        return found

    def _pieces(self, axis: Axis, collective: Collective, size: float, chunks: int | None, group: tuple[int, int]) -> float:
        """Seconds of `size` bytes in `chunks`, or in the stack's buckets."""
        bucket = self.habits.bucket_bytes
        count = chunks or (max(1, math.ceil(size / bucket)) if bucket > 0 else 1)
        return count * self.transfer_s(Transfer("shared", axis, collective, size / count, "update"), *group)

    def held(self, ranks: int, each: int, schedule: Schedule, more: float) -> float:
        """Layers of the fullest of `ranks`, embedding and head counting as `more`, as operations.py cuts them: alike where they divide and the stack is not
        ours, else so that the costliest stage costs least."""
        key = (ranks, each, schedule == "zbv", round(more, 2))
        found = self.fullest.get(key)
        if found is None:
            found = self.fullest[key] = self._held(*key)
        return found

    def _held(self, ranks: int, each: int, folded: bool, more: float) -> float:
        layers, stages = self.workload.shape.layers, ranks * each
        if self.workload.stack not in OWN and layers % stages == 0:
            return each * (layers // stages) + more
        if self.workload.stack not in OWN and (layers + 2) % stages == 0:
            even = (layers + 2) // stages
            return max(each * even, each * even - 1 + more)
        fewest = max(1, (layers - 1) // stages)
        last = 1
        for most in sorted({float(k) for k in range(fewest, layers + 1)} | {k + more for k in range(1, layers + 1)}):
            last = min(int(most - more), layers - stages + 1)
            if last >= 1 and int(most) * (stages - 1) + last >= layers:
                break
        few, extra = divmod(layers - last, stages - 1)  # of the other stages, the fuller ones side by side
        return max(each * few + (-(-extra // ranks) if not folded else 1 + (extra > ranks) if extra else 0), (each - 1) * few + last + more)

    def turned(self, split: Split, expert: int, turn: Turn, recompute: Recompute, precision: Precision, zero: int) -> Turned:
        """All of a step but what shards and replicas send and what the optimizer does: the least that a step can take however weights are shared."""
        microbatch, count, schedule, each = turn
        body, ends = self.layer(split, expert, microbatch, recompute, precision, zero)
        shape, ranks = self.workload.shape, split.pipeline
        stages = ranks * each
        one = body.forward_s + body.backward_s + body.again_s
        more = (ends.forward_s + ends.backward_s) / one
        held = self.held(ranks, each, schedule, more) if ranks > 1 else shape.layers + more
        mean = (shape.layers + more) / ranks
        forward, backward, weights = held * body.forward_s, held * (body.backward_s + body.again_s), held * body.weights_s
        if ranks == 1:
            forward, backward = (
                shape.layers * body.forward_s + ends.forward_s,
                shape.layers * (body.backward_s + body.again_s) + ends.backward_s,
            )
        total = forward + backward
        step = count * total
        if ranks > 1:
            filled, inputs = mean * one, total - forward - weights  # of the mean rank, as a pipeline fills and drains through all of them
            match schedule:
                case "1f1b":
                    step = (count - 1) * total + ranks * filled
                case "interleaved":
                    step = max(count * total + (ranks - 1) * filled / each, ranks * filled + (count - 1) * total / each)
                case "zbv":
                    alike = mean / held
                    drained = ranks * alike * (forward + inputs) + (count - 1) * (forward + inputs) + weights
                    step = max(count * total + (ranks - 1) * alike * inputs / 2, drained)
            rows = microbatch * self.workload.sequence // split.context
            send = Transfer("boundary", "pipeline", "send", 2.0 * rows * shape.hidden / split.tensor, "forward")
            stride = self.workload.layout.ranks // ranks
            sent = self.transfer_s(send, ranks, stride)
            step += 2 * (ranks - 1) * sent + self.exposed(2 * each * count * sent, count * total, "pipeline")
            most = max(pipelines.live(schedule, rank, ranks, each, count) for rank in {0, ranks - 1})
            live = most * -(-shape.layers // stages) * body.saved_bytes
        else:
            live = shape.layers * body.saved_bytes + ends.saved_bytes
        moving = live + max(body.transient_bytes, ends.transient_bytes)
        return Turned(step, forward, backward, count, moving * (1 + residency.UNUSED))

    def shared(self, split: Split, expert: int, share: Share, both: bool, precision: Precision) -> Shared:
        """What does not depend on microbatches: transfers of weights and gradients, the optimizer, and the bytes of states. `both`: one rank has embedding and
        head."""
        (shard, zero, reshard), shape, sizes = share, self.workload.shape, self.sizes(split.tensor, expert)
        states, ranks = states_of(self.workload, precision, zero), split.pipeline
        layout = Layout(
            replicate=split.data // shard, shard=shard, context=split.context, tensor=split.tensor, pipeline=ranks, expert=expert
        )
        dense = shape.layers / ranks * sizes.dense + sizes.ends * (2 if both and not shape.tied else 1)
        experts = shape.layers / ranks * sizes.experts
        replicate, often = collectives.group(layout, "replicate"), zero == 3 and (ranks == 1 or reshard)
        gather = scatter = between = 0.0
        dense_ranks, experts_ranks = self._sharing(layout)
        for number, of_experts in ((dense, False), (experts, True)):
            if not number:
                continue
            group = collectives.group(layout, "shard", experts=of_experts, stack=self.workload.stack)
            if group[0] > 1 and zero == 0:
                scatter += self._pieces("shard", "all_reduce", number * states.reduced, None, group)
            elif group[0] > 1:
                chunks = max(1, shape.layers // ranks) if often else None  # layer by layer, or in buckets
                gather += self._pieces("shard", "all_gather", number * states.gathered, chunks, group)
                whole = zero < 3 and self.workload.stack in pieces.SUMS_WHOLE
                scatter += self._pieces("shard", "all_reduce" if whole else "reduce_scatter", number * states.reduced, chunks, group)
            if layout.replicate > 1:
                own = number * states.reduced / ((experts_ranks if of_experts else dense_ranks) if zero else 1)
                between += self._pieces("replicate", "all_reduce", own, max(1, shape.layers // ranks) if often else None, replicate)
        whole, owned = dense + experts, (dense / dense_ranks + experts / experts_ranks) if zero else dense + experts
        moved = states.weights + states.gradients + 2 * (states.master + states.moments)
        update = self.op_s(Op("adamw", "optimizer", "update", 0.0, owned * moved), precision)[0]
        if zero == 1 and self.workload.stack == "gigatrain_deepspeed":  # nothing hides them (estimate.habits_of)
            update, gather, scatter = update + gather + scatter, 0.0, 0.0
        if experts and self.workload.stack in OWN:
            held = experts / (experts_ranks if zero >= 2 else 1)
            update += self.transfer_s(
                Transfer("experts_sum", "tensor", "all_reduce", 4.0 * held, "update"), *collectives.group(layout, "tensor")
            )
        kept = self._kept(states, zero, whole, owned)
        layer = sizes.dense + sizes.experts
        if zero == 3:
            kept += states.gathered * (whole if not reshard else 2 * layer + 2 * sizes.ends)
            largest = max(layer, sizes.ends)
            held_back = residency.held_back(self.workload.stack, zero, ranks)
            kept += states.gathered * largest + states.reduced * (whole if held_back else largest)
        if self.workload.stack == "gigatrain_deepspeed":  # buckets, what stage 1 holds of a backward, and what stage 3 keeps gathered
            kept += (1 if zero == 1 else 2) * states.reduced * min(cost.BUCKET_ELEMENTS, whole)
            kept += states.gathered * whole if zero == 1 and states.gathered == 2 else 0.0
            if zero == 3:
                kept += residency.ZERO3_BYTES + states.gathered * max(0.0, min(cost.LIVE_ELEMENTS, whole) - 2 * layer - 2 * sizes.ends)
        if (
            self.workload.stack == "gigatrain_native"
        ):  # a microbatch's gradients beside their sum, but for those that are summed where they are made
            kept += states.weights * (owned if zero == 3 else sizes.ends)
        kept += residency.CONTEXT_BYTES + residency.WORKSPACE_BYTES + 3 * residency.COMMUNICATOR_BYTES
        return Shared(gather, scatter + (gather if often and reshard else 0.0), between, often, update + self.habits.step_s, kept)

    def together(self, turned: Turned, shared: Shared) -> tuple[float, float]:
        """`(seconds of a step, bytes of the fullest rank)`."""
        sent = self.exposed(shared.forward_s, turned.forward_s, "shard") + self.exposed(shared.backward_s, turned.backward_s, "shard")
        sent += self.exposed(shared.between_s, turned.backward_s, "replicate")
        step = turned.step_s + (turned.count if shared.often else 1) * sent + shared.update_s
        return step * self.waits, turned.bytes + shared.bytes
