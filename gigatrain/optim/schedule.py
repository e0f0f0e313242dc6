"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from gigatrain.config import Schedule


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """Share of the peak rate used by update `step` (0-based) of `steps`.

    Warm-up: (step + 1) / warmup, so that the first update moves. Then, with progress p from 0 at the end of the warm-up to 1 at the last
    update: cosine floor + (1 - floor)(1 + cos(pi p)) / 2 (arXiv:1608.03983); linear 1 - (1 - floor) p; wsd 1 until the last `decay` share
    of the run, then linearly to floor (arXiv:2404.06395); constant 1.
    """
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    floor = schedule.floor
    progress = min(1.0, (step - schedule.warmup) / max(1, steps - 1 - schedule.warmup))
    match schedule.kind:
        case "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - (1 - floor) * progress
        case "wsd":
            decaying = max(1, round(schedule.decay * steps))
            left = steps - 1 - step
            return 1.0 if left >= decaying else floor + (1 - floor) * left / decaying
        case "constant":
            return 1.0
