"""Residuals of peaks of memory: what the planner's intervals of memory are learnt from (interval.learn_memory), and how often those hold."""

import math
from collections.abc import Iterable, Sequence

from plan_data import Row, gibibytes_of

from gigatrain.errors import GigatrainError
from gigatrain.planning import predict
from gigatrain.planning.estimate import interval, operations, residency, rows
from gigatrain.planning.estimate.constants import VALUES
from gigatrain.planning.estimate.interval import Peak


def peaks(found: Iterable[Row]) -> list[Peak]:
    """Of every row that tells a peak and can be expressed, by what its own meter shows."""
    told = []
    for row in found:
        measured = gibibytes_of(row)
        if measured is None:
            continue
        try:
            case = rows.parse({key: value for key, value in row.items() if key not in predict.MEASURED})
            works = operations.works(case.workload)
        except (rows.Refused, GigatrainError):
            continue
        fullest = max(residency.memory(case.workload, works, VALUES), key=lambda held: sum(held.values()))
        kind, states = str(row.get("peak_mem_kind", "")), sum(fullest[name] for name in interval.STATES)
        shown, rest = residency.seen(fullest, kind), measured * 2**30 - states
        told.append(
            Peak(
                source=case.set,
                stack=case.workload.stack,
                log_ratio=math.log(measured * 2**30 / shown),
                rest=math.log(rest / (shown - states)) if rest > 0 else None,
                torch="max_memory" in kind,
            )
        )
    return told


def learnt(found: Sequence[Peak]) -> dict[str, float]:
    """As interval.json keeps it."""
    return {key: float(f"{value:.4g}") for key, value in interval.learn_memory(found).items()}


def held(found: Sequence[Peak]) -> dict[str, float]:
    """By set: the share of its rows within intervals that were learnt without it."""
    shares = {}
    for source in sorted({one.source for one in found}):
        widths = interval.learn_memory([one for one in found if one.source != source])
        mine = [one for one in found if one.source == source]
        shares[source] = sum(abs(one.log_ratio) <= interval.memory_width(one.stack, widths) for one in mine) / len(mine)
    return shares


def sentence(found: Sequence[Peak]) -> str:
    shares = held(found)
    widths = interval.learn_memory(found)
    told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return (
        f"Intervals of memory, learnt without the set, hold {sum(shares.values()) / len(shares):.0%} of rows with {len(shares)} sets alike\n({told}).\n"
        f"They are a factor of {math.exp(interval.memory_width('megatron', widths)):.2f} for Megatron, "
        f"{math.exp(interval.memory_width('deepspeed', widths)):.2f} for DeepSpeed, {math.exp(interval.memory_width('generic', widths)):.2f} for stacks "
        f"of which nobody measured it, and for our own {math.exp(widths['rest by torch']):.2f} of what is not weights, gradients or states."
    )
