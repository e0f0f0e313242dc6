"""Why a run should leave its loop: a signal, or numbers that are not numbers."""

import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Self

import torch

from gigatrain.errors import RunError
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.planning.plan import Plan

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Health:
    """`wants_out` turns true when a signal arrives; the loop then saves and leaves at the end of its step.

    Of many ranks each hears its signal at its own moment, so `wants_out` turns true where all `agree`: at a report. A second Ctrl-C leaves at once. The
    former signal handlers are put back on exit.
    """

    def __init__(self, plan: Plan, mesh: Mesh | None = None) -> None:
        self.plan, self.mesh = plan, mesh or alone()
        self.signal: str | None = None
        self._agreed = False
        self._before: dict[signal.Signals, object] = {}

    @property
    def wants_out(self) -> bool:
        return self._agreed or (self.mesh.count == 1 and self.signal is not None)

    def leave(self, why: str) -> None:
        """All ranks, which know the same reason, leave at the end of their step."""
        self.signal, self._agreed = self.signal or why, True

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
            self.signal, self._agreed = named[0], True
        return sums[len(heard) :]

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _arrived(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name

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
