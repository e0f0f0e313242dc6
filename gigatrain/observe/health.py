"""Why a run should leave its loop: a signal, or numbers that are not numbers."""

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Self

import torch

from gigatrain.errors import RunError
from gigatrain.leaving import SIGNALS, Leaving, installed
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.planning.plan import Plan

AHEAD = 2  # steps that the host may be ahead of the device: enough that the device never waits, few enough that ranks leave within a step or two


class Health:
    """`wants_out` turns true when a signal arrives; the loop then saves and leaves at the end of its step.

    Of many ranks each hears its signal at its own moment: they leave at the boundary that all agree on (gigatrain.leaving), which `leaves` is asked at, or at a
    report, whichever comes first.
    """

    def __init__(self, plan: Plan, mesh: Mesh | None = None) -> None:
        self.plan, self.mesh = plan, mesh or alone()
        self._stack = contextlib.ExitStack()
        self._leaving: Leaving | None = None
        self._why: str | None = None
        self._agreed = False
        self._steps: deque[torch.cuda.Event] = deque()

    @property
    def signal(self) -> str | None:
        """Why, once somebody wants out."""
        return self._why or (self._leaving.signal if self._leaving else None)

    @property
    def wants_out(self) -> bool:
        return self._agreed or (self.mesh.count == 1 and self.signal is not None)

    def leaves(self) -> bool:
        """Whether all ranks leave here, before a step or a microbatch of a validation; every rank asks as often, and none waits for its device."""
        if self.mesh.device.type == "cuda":
            self._keep_near()
        if self._leaving is not None and self._leaving.due():
            self._agreed = True
        return self.wants_out

    def _keep_near(self) -> None:
        """Wait for the step before the last two, which the device has done unless the host is that far ahead."""
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._steps.append(event)
        if len(self._steps) > AHEAD:
            self._steps.popleft().synchronize()

    def leave(self, why: str) -> None:
        """All ranks, which know the same reason, leave at the end of their step."""
        self._why, self._agreed = self.signal or why, True

    def agree(self, numbers: Sequence[int] = ()) -> list[int]:
        """All ranks want out if one does; waits for the device, so it is called where a report does. Returns `numbers`, of equal length on each rank, summed
        over the ranks in the same reduction."""
        if self.mesh.count == 1:
            return list(numbers)
        heard = [0] * (len(SIGNALS) + 1)
        heard[max((SIGNALS.index(one) + 1 for one in SIGNALS if one.name == self.signal), default=0)] = 1
        sums = self.mesh.sum(torch.tensor([*heard, *numbers], dtype=torch.int64, device=self.mesh.device)).tolist()
        named = [one.name for one, count in zip(SIGNALS, sums[1 : len(heard)], strict=True) if count]
        if named and not self._agreed:
            self._why, self._agreed = named[0], True
        return sums[len(heard) :]

    def __enter__(self) -> Self:
        self._leaving = self._stack.enter_context(installed())
        self._leaving.steps()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._leaving is not None:
            self._leaving.saved()
        self._stack.close()

    def check_bad(self, counts: list[int], samples: Callable[[int], str]) -> None:
        """Stop the run when too many updates in a row were refused; `samples` names the data of a step.

        Raises RunError, naming the first of the steps and the data it read.
        """
        total, _, longest, began = counts
        if longest >= self.plan.max_bad_steps:
            raise RunError(
                f"{longest} steps in a row, from step {began}, had a loss or gradient that is not finite or a spike (limit: train.max_bad_steps = "
                f"{self.plan.max_bad_steps}; {total} in all); none of them reached the weights. "
                "Look at the data named below; or `gigatrain export` the run's last checkpoint and start a new run `from` it with a lower "
                f"optim.lr. Data of step {began}:{samples(began)}"
            )
