"""A step as a function of buffers that stay where they are: recorded once as a CUDA graph, and replayed by one launch.

What a batch changes (tokens, labels, positions, documents, the count of targets) and what a schedule changes (the rate) is copied into buffers; what a step
changes (weights, moments, counts of updates and of refused ones) is changed in place. So nothing that differs from step to step is a number of the host, and
a recording is right for every step. Dropout's seeds follow from the count of updates, on the device.

On a GPU the first steps run as they are, on a side stream, where libraries set themselves up and caches fill; then one is recorded, which computes nothing,
and played at once. Samples with documents are another step than samples without, and recorded apart; both share one pool of memory, since they are never
played together. On a CPU the step runs from the same buffers as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gigatrain.data.loader import Batch, Microbatch
from gigatrain.observe.metrics import Update

WARMUP = 3  # steps before the recording, as torch's own graphed callables make

Step = Callable[[Sequence[Microbatch], Tensor], Update]
Play = Callable[[], Update]


@dataclass
class _One:
    """A step of one kind: its buffers, how often it ran, and how it is played once it is recorded."""

    parts: tuple[Microbatch, ...]
    turns: int = 0
    play: Play | None = None


class Recorded:
    """`step(microbatches, rate)`, played for one batch after the other. Its update's numbers live until the next step.

    targets: where the step reads the count of its batch's targets from. capture: what records a step and returns how it is played, after WARMUP steps;
    None: nothing does, and each step runs.
    """

    def __init__(self, step: Step, targets: Tensor, device: torch.device, capture: Callable[[Play], Play] | None = None) -> None:
        self.step, self.targets, self.device = step, targets, device
        self.rate = torch.zeros((), dtype=torch.float64, device=device)
        self.capture = capture or (self._record if device.type == "cuda" else None)
        self._kinds: dict[bool, _One] = {}
        self._pool: Any = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch, rate: float) -> Update:
        one = self._filled(batch)
        self.rate.fill_(rate)
        self.targets.fill_(batch.targets)
        if one.play is None and self.capture is not None and one.turns >= WARMUP:
            one.play = self.capture(lambda: self.step(one.parts, self.rate))
        one.turns += 1
        return self._warm(one) if one.play is None else one.play()

    def _filled(self, batch: Batch) -> _One:
        """The step of the batch's kind, with the batch in its buffers."""
        documents = any(part.documents is not None for part in batch.microbatches)
        given = [_with_documents(part) if documents else part for part in batch.microbatches]
        one = self._kinds.get(documents)
        if one is None:
            one = self._kinds[documents] = _One(tuple(map(_copied, given)))
            return one
        assert len(given) == len(one.parts), "the plan refuses steps of several shapes"
        for buffers, part in zip(one.parts, given, strict=True):
            for buffer, tensor in zip(_tensors(buffers), _tensors(part), strict=True):
                if buffer is not None:
                    assert tensor is not None, "both say whether there are documents"
                    assert buffer.shape == tensor.shape, "the plan refuses steps of several shapes"
                    buffer.copy_(tensor)
        return one

    def _warm(self, one: _One) -> Update:
        if self._side is None:
            return self.step(one.parts, self.rate)
        here = torch.cuda.current_stream(self.device)
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            found = self.step(one.parts, self.rate)
        here.wait_stream(self._side)
        return found

    def _record(self, run: Play) -> Play:
        """As a CUDA graph. Other threads may call CUDA meanwhile: the loader pins memory."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
            update = run()

        def play() -> Update:
            graph.replay()
            return update

        return play


def _tensors(part: Microbatch) -> tuple[Tensor | None, ...]:
    given = part.given or {}
    return part.tokens, part.labels, part.positions, part.documents, *(given[name] for name in sorted(given))


def _copied(part: Microbatch) -> Microbatch:
    documents = None if part.documents is None else part.documents.clone()
    given = None if part.given is None else {name: one.clone() for name, one in part.given.items()}
    return Microbatch(part.tokens.clone(), part.labels.clone(), part.positions.clone(), documents, given)


def _with_documents(part: Microbatch) -> Microbatch:
    """Rows of one document each say so, where others of the step have several."""
    if part.documents is not None:
        return part
    return replace(part, documents=torch.zeros_like(part.tokens, dtype=torch.int32))
