"""How often to save, from what saves cost as measured: goodput.py's best interval, beside the two formulas that everybody knows, within bounds.

    Young   T = sqrt(2 C M)                                                   J. W. Young, CACM 17 (1974) 530; first order
    Daly    T = sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C         J. T. Daly, FGCS 22 (2006) 303, eq. 37, for C < 2M; else T = M

C: cost of a save, M: mean time between failures, T: work between two saves. What is taken is the optimum of the exact law of both tiers (goodput.py), which is
Daly's own where there is one tier and every failure costs the same.
"""

import math
from dataclasses import dataclass

from gigatrain.planning.estimate.failures import KINDS, Failures, elsewhere
from gigatrain.planning.estimate.goodput import Case, expected
from gigatrain.planning.estimate.recovery import Saving

LONGEST_S = 3600.0  # of wall-clock between two saves on the shared file system, however rare failures are


def young_s(cost_s: float, mtbf_s: float) -> float:
    """Work between two saves, to first order."""
    return math.sqrt(2 * cost_s * mtbf_s)


def daly_s(cost_s: float, mtbf_s: float) -> float:
    """The same to higher order."""
    half = cost_s / (2 * mtbf_s)
    return young_s(cost_s, mtbf_s) * (1 + math.sqrt(half) / 3 + half / 9) - cost_s if half < 1 else mtbf_s


@dataclass(frozen=True, slots=True)
class Measured(Saving):
    """Saves by the clock: what each stalls, and what passes until it counts, during which training loses a little of its rate."""

    far_stalled_s: float = 0.0
    far_beside_s: float = 0.0  # of writing beside training; 0: none
    near_stalled_s: float = 0.0
    near_beside_s: float = 0.0

    def far_stall_s(self, accelerators: int) -> float:
        return self.far_stalled_s + self.beside_share * self.far_beside_s

    def far_lag_s(self) -> float:
        return self.far_beside_s

    def near_stall_s(self, accelerators: int) -> float:
        return self.near_stalled_s + self.beside_share * self.near_beside_s

    def near_lag_s(self, accelerators: int) -> float:
        return self.near_beside_s

    def load_s(self, accelerators: int, near: bool) -> float:
        return self.near_beside_s if near else self.far_stalled_s + self.far_beside_s


@dataclass(frozen=True, slots=True)
class Chosen:
    """Steps between saves on each tier (`near` None: no such tier), and what that goes by."""

    far: int
    near: int | None
    far_cost_s: float  # of a save
    near_cost_s: float
    mtbf_s: float
    young_s: float  # of the far tier alone
    daly_s: float
    bound: str  # what kept `far` from the optimum; empty: nothing
    source: str  # of the failures


def chosen(
    accelerators: int, per_node: int, step_s: float, saving: Measured, *, most_share: float, days: float, failures: Failures | None = None
) -> Chosen:
    """The best intervals of both tiers in whole steps; one that `saving` gives is kept. Bounds: one far save an hour, and saves take `most_share` at most."""
    failures = failures or elsewhere()
    case = Case(accelerators, max(1, min(per_node, accelerators)), step_s, failures, saving, days=max(days, 1e-3))
    found = expected(case)
    far_cost_s, near_cost_s = saving.far_stall_s(accelerators), saving.near_stall_s(accelerators)
    far, near, bound = found.every_steps, found.near_every_steps, ""
    if not saving.far_interval_s:
        if (longest := max(1, int(LONGEST_S / step_s))) < far:
            far, bound = longest, "at least one an hour"
        if (least := _least(far_cost_s, most_share, step_s)) > far:
            far, bound = least, f"saving takes {100 * most_share:g} % at most"
    if near is not None and not saving.near_interval_s:
        near = min(max(near, _least(near_cost_s, most_share, step_s)), far)
    young = young_s(far_cost_s, found.mtbf_s) if math.isfinite(found.mtbf_s) else math.inf
    daly = daly_s(far_cost_s, found.mtbf_s) if math.isfinite(found.mtbf_s) else math.inf
    return Chosen(far, near, far_cost_s, near_cost_s, found.mtbf_s, young, daly, bound, failures.source)


def counted_hours(hours: float | None, source: str) -> Failures | None:
    """Failures of a site that counts one in so many accelerator-hours, of published kinds; None: nobody has counted."""
    return None if not hours else Failures(source, 1 / (3600 * hours), math.inf, KINDS)


def _least(cost_s: float, share: float, step_s: float) -> int:
    """Steps over which a save's cost is `share` of the time."""
    return max(1, math.ceil(cost_s * (1 - share) / share / step_s)) if share > 0 else 1
