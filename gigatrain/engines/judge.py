"""Whether a step may change the weights, decided on the device by numbers that are global and so equal on every rank.

    refused     its loss or gradient norm is not finite, or above the limit that the last `window` applied steps set
    held        it is good, but follows a refused one that the host has not looked at yet
    applied     all others

    limit of the loss = mean + sigma * max(deviation, FLOOR * mean)        of the losses
    limit of the norm = exp(mean + sigma * max(deviation, FLOOR, tail))    of the norms' logarithms
    tail              = (largest - mean) / 2, but not so much that the limit is above FAR * the largest norm

The rule is OLMo-core's SkipStep (allenai/OLMo-core, optim/skip_step_optimizer.py: mean + 6 deviations of 128 steps). Ours differs in four points. Norms are
compared by their logarithms, and by a deviation that knows their tail: they are heavy-tailed, the more so the smaller the batch. Of six healthy runs with 64
to 512 tokens a step, 672 judged steps each, the plain rule refused 7 or 8 norms in three, logarithms alone 1 to 6, and this rule none; a norm of ten times
the usual one is above the limit, but where the window holds one of more than three times. Of 128 normal numbers the largest is 2.5 deviations above the mean,
so where norms vary by a few percent the limit is that of 6 to 8 deviations. A refused number does not enter the window, or a row of spikes would make
the next one look normal. Nothing is judged before the window is full. And FLOOR keeps a run whose losses are alike to many digits from calling the last
digit a spike. Only numbers above the mean are spikes.

A refused step leaves the weights as they were, so until the host has looked the steps that follow are held: computed, and not applied, not counted. The host
can then make the refused step again from the very state that it had (observe/numerics.py), and makes the held steps once more. So what a run computes does
not depend on when its host looks, and a run that refuses nothing never waits.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gigatrain.parallel.mesh import AXES
from gigatrain.parallel.places import Piece, Replica, State

FLOOR = 1e-3  # a step less than sigma * 0.1 % above the mean is no spike, however alike the others are
FAR = 3.0  # a norm of more than so many times the largest of the window is beyond any tail
KEPT = 64  # refused steps between two looks of the host that are remembered one by one

APPLIED, REFUSED, HELD = 0, 1, 2  # a step's fate
NOT_FINITE, LOSS, NORM = 1, 2, 4  # why it was refused, added up


class Refused(NamedTuple):
    """A step that changed nothing; `mine` is this rank's own sum of cross entropies, the others are of all ranks."""

    step: int
    why: int
    loss: float
    norm: float
    loss_limit: float
    norm_limit: float
    mine: float


class Judge:
    """The counts of one run's updates and of those refused, on `device`; everything changes in place, so that a CUDA graph may hold it.

    sigma 0: only what is not finite is refused. repeats: whether a step that changes nothing can be made again to the same numbers; `hold` then lets the
    steps after a refused one wait for the host.
    """

    def __init__(self, window: int, sigma: float, device: torch.device, *, repeats: bool = True) -> None:
        self.sigma, self.device, self.repeats = sigma, device, repeats
        self.holds = False
        self.bad = torch.tensor([0, 0, 0, -1], dtype=torch.int64, device=device)  # in all, in a row, longest row, where it began
        self._rest = self.bad[2:].clone()  # the longest row and its begin before the present row
        self.updates = torch.zeros((), dtype=torch.int64, device=device)  # steps decided: applied or refused
        self.spikes = torch.zeros((), dtype=torch.int64, device=device)  # refused ones that were finite
        self.past = torch.zeros(2, window if sigma else 0, dtype=torch.float64, device=device)  # losses, norms, oldest first; 0: not yet
        self._limits = torch.full((2,), torch.nan, dtype=torch.float64, device=device)  # nothing is above NaN
        self.waits = torch.zeros(2, dtype=torch.int64, device=device)  # refused steps not looked at, steps held
        self.numbers = torch.zeros(3, dtype=torch.float64, device=device)  # loss, norm and `mine` of the step that was judged last
        self._good, self._finite = (torch.ones((), dtype=torch.bool, device=device) for _ in range(2))
        self.fate = torch.zeros((), dtype=torch.int64, device=device)
        self._table = torch.full((KEPT, len(Refused._fields)), torch.nan, dtype=torch.float64, device=device)  # newest last

    def limits(self) -> tuple[Tensor, Tensor]:
        """What loss and norm may not exceed (0-d, fp64; NaN: anything is allowed)."""
        loss, norm = self._limits.unbind()
        return loss, norm

    def closed(self) -> Tensor:
        """Whether no step is applied now, whatever its numbers (0-d)."""
        return (self.waits > 0).any()

    @torch.no_grad()
    def verdict(self, loss: Tensor, norm: Tensor, skip: Tensor, mine: Tensor) -> Tensor:
        """1 where the step changes nothing, else 0 (0-d, `skip`'s dtype). `skip`: 1 where a number is not finite. `count` writes it down."""
        self.numbers.copy_(torch.stack([one.to(self.device, torch.float64) for one in (loss, norm, mine)]))
        good = skip.to(self.device) == 0
        self._finite.copy_(good)  # by every rank's own numbers, which a mean of all need not show
        if self.sigma:
            good = good & ~(self.numbers[:2] > self._limits).any()
        self._good.copy_(good)
        return (~(good & ~self.closed() if self.holds else good)).to(skip.dtype)

    @torch.no_grad()
    def count(self) -> None:
        """The step that was judged is over."""
        good = self._good
        if self.holds:
            unseen, held = self.waits.unbind()
            refused = ~good & (held == 0)
            applied = good & ~self.closed()
            wait = ~(refused | applied)
            self.waits.copy_(torch.stack([unseen + refused, held + wait]))
            self.fate.copy_(refused * REFUSED + wait * HELD)
            decided = ~wait
        else:
            applied, refused, decided = good, ~good, torch.ones_like(good)
            self.fate.copy_(refused * REFUSED)
        self._remember(refused)
        total, row, longest, began = self.bad.unbind()
        row = torch.where(applied, torch.zeros_like(row), row + refused)
        began = torch.where(row > longest, self.updates - row + 1, began)
        self.bad.copy_(torch.stack([total + refused, row, torch.maximum(longest, row), began]))
        self._rest.copy_(torch.where(applied, self.bad[2:], self._rest))
        self.updates += decided
        if self.sigma:
            self.past.copy_(torch.where(applied, torch.cat([self.past[:, 1:], self.numbers[:2, None]], 1), self.past))
            self._limit()

    def _remember(self, refused: Tensor) -> None:
        above = self.numbers[:2] > self._limits
        finite = self._finite & torch.isfinite(self.numbers[:2]).all()
        why = torch.where(finite, above[0] * LOSS + above[1] * NORM, NOT_FINITE)
        row = torch.cat([torch.stack([self.updates.double(), why.double()]), self.numbers[:2], self._limits, self.numbers[2:]])
        self._table.copy_(torch.where(refused, torch.cat([self._table[1:], row[None]]), self._table))
        self.spikes += refused & finite

    def _limit(self) -> None:
        """From the window; NaN while it is not full (or holds a step of a loss or norm of 0, which has nothing to learn from)."""
        variance, mean = torch.var_mean(torch.stack([self.past[0], self.past[1].log()]), 1)
        least = torch.stack([FLOOR * mean[0], torch.full_like(mean[1], FLOOR)])
        loss, norm = (mean + self.sigma * torch.maximum(variance.sqrt(), least)).unbind()
        largest = self.past[1].max().log()
        tail = torch.minimum(mean[1] + self.sigma * (largest - mean[1]) / 2, largest + math.log(FAR))
        limits = torch.stack([loss, torch.maximum(norm, tail).exp()])
        self._limits.copy_(torch.where((self.past > 0).all(), limits, torch.nan))

    # ---- The host's part: each but `hold` waits for the device ----

    def hold(self) -> None:
        """From the next step on; before the first, since a CUDA graph keeps to what it was."""
        self.holds = self.repeats

    def refused(self, count: int) -> list[Refused]:
        """The last `count` refused steps that are remembered, oldest first."""
        rows = self._table[max(0, KEPT - count) :].tolist()
        return [Refused(int(row[0]), int(row[1]), *row[2:]) for row in rows if not math.isnan(row[0])]

    def open(self) -> None:
        """The host has looked: what was held is made again."""
        self.waits.zero_()

    @torch.no_grad()
    def take_back(self, refused: int, row: int, finite: int) -> None:
        """The last `refused` steps, all of the present row of `row`, of which `finite` were spikes, are to be judged anew: they never happened."""
        total, _, _, began = self.bad.tolist()
        longest, before = self._rest.tolist()
        left = row - refused
        self.bad.copy_(torch.tensor([total - refused, left, *((left, began) if left > longest else (longest, before))]))
        self.updates -= refused
        self.spikes -= finite
        self._table.copy_(torch.cat([torch.full_like(self._table[:refused], torch.nan), self._table[:-refused]]))

    @contextlib.contextmanager
    def again(self, step: int) -> Iterator[None]:
        """Inside, step `step` can be made once more, and nothing that is kept moves; `numbers` then say what it gave."""
        kept = [one.clone() for one in (self.waits, self.updates, self.numbers)]
        self.waits.fill_(1)
        self.updates.fill_(step)
        try:
            yield
        finally:
            for one, before in zip((self.waits, self.updates, self.numbers), kept, strict=True):
                one.copy_(before)

    # ---- What a checkpoint keeps ----

    def replicas(self) -> Iterator[Replica]:
        """What every rank holds alike."""
        for name, tensor in (
            ("refused steps", self.bad),
            ("steps", self.updates),
            ("spikes", self.spikes),
            ("past losses and norms", self.past),
        ):
            yield Replica(name, tensor, AXES)

    def counts(self, *, writes: bool) -> dict[str, Piece]:
        """Those of refused steps, and of all."""
        return {name: Piece.whole(tensor, writes=writes) for name, tensor in (("bad", self.bad), ("steps", self.updates))}

    def window(self, *, writes: bool) -> State:
        """The group of what spikes are measured against, if they are."""
        found = {"spikes": self.spikes, "past": self.past} if self.sigma else {}
        return {"numerics": {name: Piece.whole(tensor, writes=writes) for name, tensor in found.items()}} if found else {}

    @torch.no_grad()
    def restored(self) -> None:
        """After a load into `state`."""
        self.waits.zero_()
        self._rest.copy_(self.bad[2:])
        self._table.fill_(torch.nan)
        if self.sigma:
            self._limit()
