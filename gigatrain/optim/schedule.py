"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from gigatrain.config import Schedule


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """Share of the peak rate used by update `step` (0-based) of `steps`.

    All is counted from `from_step` on; before it the rate is that of its first step. Warm-up: start + (1 - start)(step + 1) / warmup, so that the first
    update moves. Then, with progress p from 0 at the end of the warm-up to 1 at the last update: cosine floor + (1 - floor)(1 + cos(pi p)) / 2
    (arXiv:1608.03983), with `cycles` n of n p's fraction; linear 1 - (1 - floor) p; wsd 1 until the last `decay` share, then linearly to floor
    (arXiv:2404.06395); constant 1; infinite level + (1 - level)(1 + cos(pi p / cooldown)) / 2 up to p = cooldown, then level, and in the last `decay` share
    linearly to floor (arXiv:2503.02844, whose last part is exponential).
    """
    step, steps = max(0, step - schedule.from_step), steps - schedule.from_step
    if step < schedule.warmup:
        return schedule.start + (1 - schedule.start) * (step + 1) / schedule.warmup
    floor = schedule.floor
    progress = min(1.0, (step - schedule.warmup) / max(1, steps - 1 - schedule.warmup))
    decaying, left = max(1, round(schedule.decay * steps)), steps - 1 - step
    match schedule.kind:
        case "cosine":
            within = progress * schedule.cycles
            return _cosine(1.0 if progress == 1.0 else within - math.floor(within), floor)
        case "linear":
            return 1 - (1 - floor) * progress
        case "wsd":
            return 1.0 if left >= decaying else floor + (1 - floor) * left / decaying
        case "infinite":
            level = schedule.level
            if schedule.decay and left < decaying:
                return floor + (level - floor) * left / decaying
            return _cosine(progress / schedule.cooldown, level) if progress < schedule.cooldown else level
        case "constant":
            return 1.0


def _cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
