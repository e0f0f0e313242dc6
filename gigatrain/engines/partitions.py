"""What is where in DeepSpeed's partitions: each rank's flat fp32 stretches of the master weights, and the ranges of the parameters in them.

Its three classes are read by their attributes, so this is of the minor version that engines/deepspeed.py names; it is not imported here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gigatrain.models import hf
from gigatrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class Share:
    """`count` elements of a flattened parameter from `start` on, which lie in partition `flat` from `at` on."""

    flat: int
    at: int
    start: int
    count: int

    def of(self, flats: list[Tensor]) -> Tensor:
        """They, as a view."""
        return flats[self.flat].detach()[self.at : self.at + self.count]


@dataclass(frozen=True)
class Parts:
    """A rank's fp32 partitions, the optimizer's group of each, and the parameters' ranges in them.

    gradients: of all partitions, once the last backward of a step has been reduced. publish: rounds the partitions into the weights that compute.
    """

    flats: list[Tensor]
    groups: list[int]
    shares: dict[str, list[Share]]
    gradients: Callable[[], list[Tensor]]
    publish: Callable[[], None]


def parts_of(zero: Any, names: Mapping[int, str], mesh: Mesh) -> Parts:
    """Of whichever of DeepSpeed's three classes the stage and the precision led to; `names` by the parameters' identity."""
    kind = type(zero).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        flats = zero.fp32_partitioned_groups_flat
        shares = _padded_shares(names, zero.fp16_groups, mesh)

        def publish() -> None:
            for index in range(len(flats)):
                zero._reassign_or_swap_out_partitioned_parameters(index)

        def gradients() -> list[Tensor]:
            return (
                [flat.grad for flat in flats]
                if zero.offload_optimizer
                else [one for some in zero.averaged_gradients.values() for one in some]
            )

        return Parts(flats, [zero.sub_group_to_group_id[index] for index in range(len(flats))], shares, gradients, publish)
    if kind == "BF16_Optimizer":
        flats, members = zero.fp32_groups_flat_partition, zero.bf16_groups
        return Parts(
            flats,
            list(range(len(flats))),
            _end_to_end(names, members, flats, mesh),
            lambda: zero.fp32_groups_gradient_flat_partition,
            zero.update_lp_params,
        )
    assert kind == "DeepSpeedZeroOptimizer", kind
    flats, members = zero.single_partition_of_fp32_groups, zero.bit16_groups

    def found() -> list[Tensor]:
        return [flat.grad for flat in flats] if zero.cpu_offload else [one for some in zero.averaged_gradients.values() for one in some]

    return Parts(flats, list(range(len(flats))), _end_to_end(names, members, flats, mesh), found, zero.update_lp_params)


def _end_to_end(names: Mapping[int, str], members: list[list[Tensor]], flats: list[Tensor], mesh: Mesh) -> dict[str, list[Share]]:
    """ZeRO-1 and 2: a group's parameters lie end to end, and every rank has an equal stretch of the whole."""
    shares: dict[str, list[Share]] = {}
    for index, group in enumerate(members):
        size, began = flats[index].numel(), 0
        low = mesh.rank * size
        for parameter in group:
            count = parameter.numel()
            start, end = max(0, low - began), min(count, low + size - began)
            if start < end:
                shares.setdefault(names[id(parameter)], []).append(Share(index, began + start - low, start, end - start))
            began += count
    return shares


def _padded_shares(names: Mapping[int, str], members: list[list[Any]], mesh: Mesh) -> dict[str, list[Share]]:
    """ZeRO-3: every parameter is cut into equal stretches, the last ones padded, and a rank's stretches lie end to end."""
    shares: dict[str, list[Share]] = {}
    for index, group in enumerate(members):
        at = 0
        for parameter in group:
            each = parameter.partition_numel()
            start = min(parameter.ds_numel, mesh.rank * each)
            count = min(parameter.ds_numel - start, each)
            if count:
                shares.setdefault(names[id(parameter)], []).append(Share(index, at, start, count))
            at += each
    return shares


def touched(shape: tuple[int, ...], start: int, stop: int) -> hf.Box:
    """The box of the rows that elements `start` to `stop` of a flattened parameter touch."""
    row = math.prod(shape[1:])
    first, last = (start // row, -(-stop // row)) if start < stop else (0, 0)
    return (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
