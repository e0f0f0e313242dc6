"""The ranks of a run as a grid of named axes, and the process groups along them.

    rank = ((((pipeline * replicate + r) * outer + o) * expert + e) * context + c) * tensor + t        (each axis's size, then the coordinate in the next)

Neighbouring ranks share a node, so the axis that talks most is the innermost. `shard` is `outer` x `expert`: experts are spread over `expert`, and the ranks
of all data axes see different samples. A group is made when it is first asked for, by its members alone: no rank walks over the world.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from gigatrain import config

AXES = ("pipeline", "replicate", "outer", "expert", "context", "tensor")  # outermost first
DATA = ("replicate", "outer", "expert")  # ranks along these read different samples
WEIGHTS = ("outer", "expert", "context")  # ranks along these may share one copy of the weights


class Mesh:
    """One rank's place in the grid. Methods that take axes accept `shard` for `outer` and `expert`."""

    def __init__(self, axes: config.Mesh, rank: int = 0, device: torch.device | str = "cpu", node: int | None = None) -> None:
        """`node`: ranks of a node (default: all are of one)."""
        assert axes.shard is not None, "a plan's mesh has every size"
        self.axes, self.rank, self.device = axes, rank, torch.device(device)
        self.sizes = {axis: getattr(axes, axis, 0) for axis in AXES} | {"outer": axes.shard // axes.expert}
        self.strides = {axis: math.prod(self.sizes[inner] for inner in AXES[i + 1 :]) for i, axis in enumerate(AXES)}
        self.at = {axis: rank // self.strides[axis] % self.sizes[axis] for axis in AXES}
        self.count = math.prod(self.sizes.values())
        assert 0 <= rank < self.count
        self.node = node or self.count
        self._groups: dict[tuple[str, ...], distributed.ProcessGroup | None] = {}

    def size(self, *axes: str) -> int:
        """Ranks along these axes together."""
        return math.prod(self.sizes[axis] for axis in _plain(axes))

    def index(self, *axes: str) -> int:
        """This rank's number among those along these axes."""
        number = 0
        for axis in _plain(axes):
            number = number * self.sizes[axis] + self.at[axis]
        return number

    def ranks(self, *axes: str) -> list[int]:
        """The global ranks that differ from this one along these axes only, by `index`."""
        chosen = _plain(axes)
        found = [self.rank - sum(self.at[axis] * self.strides[axis] for axis in chosen)]
        for axis in chosen:
            found = [start + step * self.strides[axis] for start in found for step in range(self.sizes[axis])]
        return found

    def group(self, *axes: str) -> distributed.ProcessGroup | None:
        """The process group along these axes; None where this rank is alone. All its members must ask for it, in the same order among their groups."""
        chosen = tuple(axis for axis in _plain(axes) if self.sizes[axis] > 1)
        if chosen not in self._groups:
            if not chosen:
                self._groups[chosen] = None
            elif self.size(*chosen) == self.count:
                self._groups[chosen] = distributed.group.WORLD
            else:
                made = distributed.new_group(self.ranks(*chosen), use_local_synchronization=True)
                assert isinstance(made, distributed.ProcessGroup)
                self._groups[chosen] = made
        return self._groups[chosen]

    def torch(self, shared: Sequence[str], copied: Sequence[str] = ()) -> DeviceMesh:
        """A DeviceMesh of one dim along `shared`, or of two, `copied` then `shared`: what `fully_shard` takes for FSDP and HSDP."""
        inner = self.group(*shared) or _alone(self.rank)
        if self.size(*copied) == 1:
            return DeviceMesh.from_group(inner, self.device.type, mesh_dim_names=("shard",))
        outer = self.group(*copied)
        assert outer is not None
        rows = [[rank + across - self.rank for across in self.ranks(*shared)] for rank in self.ranks(*copied)]
        return DeviceMesh.from_group([outer, inner], self.device.type, mesh=torch.tensor(rows), mesh_dim_names=("copy", "shard"))

    def sum(self, tensor: Tensor, *axes: str) -> Tensor:
        """Sums a tensor over these axes (none: all ranks), in place; returns it."""
        group = self.group(*(axes or AXES))
        if group is not None:
            distributed.all_reduce(tensor, group=group)
        return tensor

    @property
    def data(self) -> tuple[int, int]:
        """`(rank, ranks)` of the data: which share of every batch is this rank's. Ranks along the other axes read the same samples."""
        return self.index(*DATA), self.size(*DATA)


def alone(device: torch.device | str = "cpu") -> Mesh:
    """The mesh of one process."""
    return Mesh(config.Mesh(shard=1), 0, device)


def _plain(axes: Sequence[str]) -> list[str]:
    wanted = {inner for axis in axes for inner in (("outer", "expert") if axis == "shard" else (axis,))}
    return [axis for axis in AXES if axis in wanted]


def _alone(rank: int) -> distributed.ProcessGroup:
    made = distributed.new_group([rank], use_local_synchronization=True)
    assert isinstance(made, distributed.ProcessGroup)
    return made
