"""A block's forward or backward on its streams, and a rank's run of blocks: compute, transfers inside a block, gathers and reductions of weights across blocks.

Within a block a transfer may run beside the compute on either side of it, as far as the stack lets it (`Habits.overlaps`) and as there is compute; each
axis has a stream of its own. Compute beside a transfer is slowed by `Habits.slowdown`, which counts as exposed time of that axis. Across blocks a gather of
weights is issued when the compute of the block before begins, and a reduction of gradients when its block's backward ends, on one stream, in that order.

The host launches ahead of the device. A run of items is three numbers: `d` seconds of the device, `h` seconds of the host, and `w` from the host's first
launch to the device's last end were the device idle; runs compose exactly: (d1 + d2, h1 + h2, max(w1 + d2, h1 + w2)). Free of torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gigatrain.planning.estimate.habits import Cost, Habits
from gigatrain.planning.estimate.work import Block, Item, Op, Transfer

TimeOf = Callable[[Item], Cost]
_ACROSS = ("shard", "replicate")  # axes whose transfers are of weights and gradients, and so run across blocks


@dataclass(slots=True)
class Run:
    """Of a run of items: the three numbers, what they are made of, and the transfers that run across blocks."""

    device_s: float = 0.0
    host_s: float = 0.0
    floor_s: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)  # phase -> seconds; they add up to device_s
    moved_s: float = 0.0  # of transfers, hidden or not
    gather_s: float = 0.0
    reduce: dict[str, float] = field(default_factory=dict)  # axis -> seconds

    def then(self, other: "Run", times: int = 1) -> "Run":
        """This run and then `times` of the other."""
        first, last = other.floor_s + (times - 1) * other.device_s, (times - 1) * other.host_s + other.floor_s
        parts = dict(self.parts)
        for name, seconds in other.parts.items():
            parts[name] = parts.get(name, 0.0) + times * seconds
        return Run(
            self.device_s + times * other.device_s,
            self.host_s + times * other.host_s,
            max(self.floor_s + times * other.device_s, self.host_s + max(first, last)),
            parts,
            self.moved_s + times * other.moved_s,
        )


def share(habits: Habits, transfer: Transfer) -> float:
    """Of `transfer`, what may run beside compute: by `axis.collective` where the stack tells them apart, else by axis."""
    return habits.overlaps.get(f"{transfer.axis}.{transfer.collective}", habits.overlaps.get(transfer.axis, 0.0))


def run(items: Sequence[Item], time_of: TimeOf, habits: Habits) -> Run:
    """`items` in their order on one device."""
    made = Run()
    costs = [time_of(item) for item in items]
    exposed = _exposed(items, costs, habits)
    parts, device, host, floor = made.parts, 0.0, 0.0, 0.0
    graphed = habits.graphed
    for index, item in enumerate(items):
        cost = costs[index]
        launch = 0.0 if graphed else cost.launch_s
        if isinstance(item, Op):
            seconds, name = cost.seconds, item.kind
        else:
            made.moved_s += cost.seconds
            if item.axis in _ACROSS:
                if item.collective == "all_gather":
                    made.gather_s += cost.seconds
                else:
                    made.reduce[item.axis] = made.reduce.get(item.axis, 0.0) + cost.seconds
                host += launch
                continue
            seconds, name = exposed[index], f"exposed_{item.axis}"
        host += launch
        device += seconds
        floor = max(floor, host) + seconds
        if seconds:
            parts[name] = parts.get(name, 0.0) + seconds
    made.device_s, made.host_s, made.floor_s = device, host, max(floor, host)
    return made


def _exposed(items: Sequence[Item], costs: Sequence[Cost], habits: Habits) -> dict[int, float]:
    """Index of a transfer -> seconds by which it lengthens the block: what did not hide, and by how much it slowed what it hid behind.

    A transfer takes compute between its predecessor on its stream and itself first (whatever the predecessor left there), then that up to its successor.
    """
    found: dict[int, float] = {}
    axes = {item.axis for item in items if isinstance(item, Transfer) and item.axis not in _ACROSS}
    for axis in axes:
        slow = min(0.9, habits.slowdown.get(axis, 0.0))
        gaps, own = [0.0], []
        for index, item in enumerate(items):
            if isinstance(item, Op):
                gaps[-1] += costs[index].seconds / (1 - slow)
            elif item.axis == axis:
                own.append(index)
                gaps.append(0.0)
        for place, index in enumerate(own):
            item = items[index]
            assert isinstance(item, Transfer)
            left = hideable = costs[index].seconds * share(habits, item)
            if hideable:
                for gap in (place, place + 1):
                    took = min(left, gaps[gap])
                    gaps[gap] -= took
                    left -= took
            found[index] = costs[index].seconds - hideable + left + (hideable - left) * slow
    return found


class Passes:
    """Runs of a step's blocks, each block and each row of blocks simulated once."""

    def __init__(self, time_of: TimeOf, habits: Habits, split: bool) -> None:
        self.time_of, self.habits, self.split = time_of, habits, split
        self._blocks: dict[tuple[int, str], Run] = {}
        self._rows: dict[tuple[tuple[int, ...], str], Run] = {}

    def block(self, block: Block, which: str) -> Run:
        """`which`: forward | backward | weights; a backward makes its activations again first, and in a split one the weights' gradients are apart."""
        key = (id(block), which)
        found = self._blocks.get(key)
        if found is None:
            if which == "forward":
                items: tuple[Item, ...] = block.forward
            elif not self.split:
                items = block.recompute + block.backward if which == "backward" else ()
            elif which == "backward":
                items = block.recompute + tuple(item for item in block.backward if item.passes != "wgrad")
            else:
                items = tuple(item for item in block.backward if item.passes == "wgrad")
            found = self._blocks[key] = run(items, self.time_of, self.habits)
            if which == "backward" and block.recompute and not self.habits.graphed:
                found.host_s += self.habits.checkpoint_s  # before its first kernel
                found.floor_s += self.habits.checkpoint_s
        return found

    def row(self, blocks: Sequence[Block], which: str) -> Run:
        """A stage's `blocks` in the order of the pass, gathers and reductions included."""
        key = (tuple(map(id, blocks)), which)
        found = self._rows.get(key)
        if found is None:
            runs = [self.block(block, which) for block in (blocks if which == "forward" else blocks[::-1])]
            if any(one.gather_s or one.reduce for one in runs):
                found = across(runs, self.habits)
            else:
                found, index = Run(), 0
                while index < len(runs):
                    alike = index
                    while alike < len(runs) and runs[alike] is runs[index]:
                        alike += 1
                    found = found.then(runs[index], alike - index)
                    index = alike
            self._rows[key] = found
        return found


def across(runs: Sequence[Run], habits: Habits) -> Run:
    """Runs of blocks one after the other, with the gathers of weights ahead of each and the reductions of gradients behind: two streams.

    The first gather has nothing before it; the end waits for the last reduction.
    """
    made = Run()
    hidden_gather = habits.overlaps.get("shard.all_gather", habits.overlaps.get("shard", 0.0))
    slow = min(0.9, habits.slowdown.get("shard", 0.0))
    now = stream = ready = host = 0.0  # ends of the compute's and the transfers' work, and of the gather that the next block needs
    idle = 0.0  # the host's floor: end of the device's work were it idle at the start
    parts: dict[str, float] = {}
    waited = {"shard": 0.0}
    if runs and runs[0].gather_s:
        stream = ready = hidden_gather * runs[0].gather_s
    for index, one in enumerate(runs):
        lost = (1 - hidden_gather) * one.gather_s
        if ready > now:
            lost += ready - now
        now += lost
        waited["shard"] += lost
        if index + 1 < len(runs) and runs[index + 1].gather_s:
            stream = max(stream, now) + hidden_gather * runs[index + 1].gather_s
            ready = stream
        slowed = 0.0
        if slow and stream > now:
            slowed = slow * min(stream - now, one.device_s / (1 - slow))
            waited["shard"] += slowed
        now += one.device_s + slowed
        idle = max(idle + lost + one.device_s + slowed, host + one.floor_s)
        host += one.host_s
        for axis, seconds in one.reduce.items():
            kept = habits.overlaps.get(f"{axis}.reduce_scatter", habits.overlaps.get(axis, 0.0)) * seconds
            stream = max(stream, now) + kept
            now += seconds - kept
            idle += seconds - kept
            waited[axis] = waited.get(axis, 0.0) + seconds - kept
        for name, seconds in one.parts.items():
            parts[name] = parts.get(name, 0.0) + seconds
        made.moved_s += one.moved_s
    if stream > now:  # only reductions are left on it
        last = next((axis for one in reversed(runs) for axis in one.reduce), "shard")
        waited[last] = waited.get(last, 0.0) + stream - now
        idle += stream - now
        now = stream
    for axis, seconds in waited.items():
        if seconds:
            parts[f"exposed_{axis}"] = parts.get(f"exposed_{axis}", 0.0) + seconds
    made.device_s, made.host_s, made.floor_s, made.parts = now, host, max(idle, host), parts
    return made
