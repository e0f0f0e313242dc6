"""Batches for the loop: position -> samples -> tensors, read ahead by one thread.

Global position p = step * batch + slot, counted over the phases of a run that has several (course.py). A rank owns consecutive slots, so the ranks'
rows one after the other are the batch of a single rank. What comes next depends on the seed and the position alone; reading ahead changes when a batch is
made, never which.

A run may pass over samples (observe/numerics.py). Then the positions of the stream are counted without the ranges that are passed over, and these are part
of the state: the stream stays a function of (seed, ranges, position), on any number of ranks and after any resume.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil
from queue import Empty, Full, Queue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigatrain.data.corpus import Corpus
from gigatrain.data.course import AnySamples, Course, Packing, Phase, samples_of, without
from gigatrain.data.mixture import Mixture
from gigatrain.data.pack import IGNORED, Sample
from gigatrain.data.packs import Packs
from gigatrain.data.pairs import Form, Pairs
from gigatrain.data.taught import Taught
from gigatrain.errors import DataError

COUNTED = 1 << 28  # labels whose bytes are added up when a run begins, on every rank: some seconds


@dataclass(frozen=True)
class Microbatch:
    """Rows [B, T]: tokens, labels (-100: none) and positions int64, documents int32.

    documents: the segment's number within the row, ascending; None if every row is one segment that starts at position 0, so plain causal
    attention is right. given: further tensors of the rows, [B, ...], that an objective asks for; those with a dim of tokens, [B, T, ...], have `_bt` in
    their name.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor | None
    given: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Batch:
    """One step's share of one rank.

    targets: labels of this share's microbatches that are not ignored: neither padding nor a label that would cross documents; or pairs. The sum over
    the ranks divides the step's loss. tokens: input positions of the whole step over all ranks, samples times their length, padding
    included. positions: the global positions of the whole step's samples, ascending.
    """

    microbatches: tuple[Microbatch, ...]
    targets: int
    tokens: int
    positions: Sequence[int]


def stack(
    rows: list[tuple[Any, int] | None], sequence: int, eos: int, device: torch.device, blank: Mapping[str, np.ndarray] | None = None
) -> Microbatch:
    """(samples, index) pairs as one microbatch on the CPU, in pinned memory if it will go to a GPU; None is a row without labels. blank: what such a row
    gives beside its tokens, where rows give something."""
    pinned = device.type == "cuda"
    tensors = [
        torch.empty((len(rows), sequence), dtype=kind, pin_memory=pinned) for kind in (torch.int64, torch.int64, torch.int64, torch.int32)
    ]
    arrays = [tensor.numpy() for tensor in tensors]
    given = None
    if blank is not None:
        given = {name: torch.from_numpy(np.stack([one] * len(rows))) for name, one in blank.items()}
        given = {name: one.pin_memory() if pinned else one for name, one in given.items()}
    beside = {} if given is None else {name: one.numpy() for name, one in given.items()}
    for number, row in enumerate(rows):
        sample = Sample(*(array[number] for array in arrays))
        if row is not None and blank is not None:
            row[0].fill(row[1], sample, {name: array[number] for name, array in beside.items()})
        elif row is not None:
            row[0].fill(row[1], sample)
        else:
            sample.tokens[:], sample.labels[:], sample.positions[:], sample.documents[:] = eos, IGNORED, np.arange(sequence), 0
    # Numbers ascend from 0, so the last column has the most segments.
    return Microbatch(tensors[0], tensors[1], tensors[2], tensors[3] if arrays[3][:, -1].any() else None, given)


def moved(microbatch: Microbatch, device: torch.device) -> Microbatch:
    """The microbatch on `device`; from pinned memory the copy does not wait."""
    if device.type == "cpu":
        return microbatch

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    documents = None if microbatch.documents is None else there(microbatch.documents)
    given = None if microbatch.given is None else {name: there(tensor) for name, tensor in microbatch.given.items()}
    return Microbatch(there(microbatch.tokens), there(microbatch.labels), there(microbatch.positions), documents, given)


def blank_of(samples: Sequence[AnySamples]) -> dict[str, np.ndarray] | None:
    """What a row gives beside its tokens, filled with nothing; None where rows are text."""
    return samples[0].blank() if isinstance(samples[0], Pairs) else None


def targets_of(part: Microbatch) -> int:
    """What a loss is a mean over: a microbatch's labels, or its pairs."""
    pairs = None if part.given is None else part.given.get("there_bp")
    return int(np.count_nonzero(part.labels.numpy() != IGNORED)) if pairs is None else int(pairs.sum())


class Batches:
    """An endless iterator of steps. `state()` is O(1), and `load` continues exactly after the last batch that was handed out.

    batch: samples of one step over all `ranks`, and a multiple of them. microbatch: rows a rank computes at a time; its last may be
    smaller. prefetch: batches read ahead by a thread; 0 reads in the caller. position: samples consumed so far, over all ranks. phases: in the place of
    sequence, batch and microbatch, each with its own.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence: int,
        packing: Packing,
        batch: int,
        microbatch: int | None = None,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        device: str | torch.device = "cpu",
        prefetch: int = 2,
        position: int = 0,
        phases: Sequence[Phase] = (),
        form: Form | None = None,
    ) -> None:
        phases = phases or (Phase(0, sequence, batch, microbatch, tuple(corpus.weights)),)
        for phase in phases:
            if phase.batch % ranks:
                raise DataError(f"a batch of {phase.batch} samples does not divide by {ranks} ranks; make it a multiple")
        sequence, batch, microbatch = phases[0].sequence, phases[0].batch, phases[0].microbatch
        self.corpus, self.sequence, self.packing, self.seed = corpus, sequence, packing, seed
        self.rank, self.ranks = rank, ranks
        self.share = range(rank * (batch // ranks), (rank + 1) * (batch // ranks))
        self.rows = len(self.share)  # of a step; those beyond the share have no labels
        self.microbatch = min(microbatch or len(self.share), len(self.share))
        self.device, self.prefetch = torch.device(device), prefetch
        self.course = Course(corpus, phases, packing, seed, form)
        self.form = form
        self.reference: str | None = None  # SHA-256 of what a reference says of the rows, where one is asked
        self.teacher: Callable[[Microbatch], Mapping[str, Tensor]] | None = (
            None  # what it says of a microbatch on the device is given with it
        )
        self.taught: Mapping[int, Taught] = {}  # or what it said ahead, by the length of samples
        self.position = position
        self.thread: threading.Thread | None = None

    @property
    def batch(self) -> int:
        """Samples of the next step."""
        return self.course.phases[self.course.phase(self.position)].batch

    @property
    def samples(self) -> list[AnySamples]:
        """Those of every source, in the phase of the next step."""
        return self.course.samples[self.course.phase(self.position)]

    @property
    def mixture(self) -> Mixture:
        """The order of samples in the phase of the next step."""
        return self.course.mixtures[self.course.phase(self.position)]

    @property
    def passed(self) -> list[tuple[int, int]]:
        """Ranges of the stream that are passed over, in the order in which they were found."""
        return self.course.passed

    @passed.setter
    def passed(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.course.passed = list(ranges)

    @property
    def dropped(self) -> int:
        """Tokens at the ends of the streams that make no full sample, and are not trained on in this phase."""
        return sum(samples.dropped for samples in self.samples)

    def packed(self) -> list[str]:
        """What packing whole documents came to, one line a source; [] where they are not packed."""
        return [
            samples.words() if isinstance(samples, Pairs) else samples.counts.words(name, self.sequence)
            for name, samples in zip(self.corpus.sources, self.samples, strict=True)
            if isinstance(samples, Packs | Pairs)
        ]

    @property
    def epochs(self) -> float:
        """How often the smallest-lasting source has been gone through at this position."""
        return self.course.epochs(self.position)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if self.prefetch:
            if self.thread is None:
                self._start()
            found = self.queue.get()
            if isinstance(found, BaseException):
                self.close()
                raise found
        else:
            found = self.make(self.position)
        self.position += len(found.positions)
        return self._moved(found)

    def _moved(self, found: Batch) -> Batch:
        parts = tuple(moved(part, self.device) for part in found.microbatches)
        if self.teacher is not None:
            parts = tuple(replace(part, given={**(part.given or {}), **self.teacher(part)}) for part in parts)
        return replace(found, microbatches=parts)

    def cut(self, slots: range, rank: int, ranks: int) -> None:
        """From the next batch that is made on, this rank's share is the `rank`-th of `ranks` equal parts of `slots`; rows without labels fill the last."""
        assert len(self.course.phases) == 1, "the plan refuses replicas of their own where the batch changes"
        each = max(1, -(-len(slots) // ranks))
        start = min(slots.start + rank * each, slots.stop)
        share = range(start, min(start + each, slots.stop))
        if (share, each) != (self.share, self.rows):
            self.close()
            self.share, self.rows = share, each

    def again(self, position: int) -> Batch:
        """The step that starts at `position` once more, as it is shared now; what comes next is not changed."""
        return self._moved(self.make(position))

    def at(self, position: int, shift: int = 0) -> Batch:
        """The batch of the step that starts at a position, on the device; with `shift` the share of the reader that comes so many later."""
        return self._moved(self.make(position, shift))

    def back(self, steps: int) -> None:
        """The last `steps` batches come once more."""
        self.close()
        self.position = self.course.position(self.course.step(self.position) - steps)

    def pass_over(self, first: int, count: int) -> tuple[int, int]:
        """From now on, leave out what lies from position `first` on in the next `count` samples of its phase; returns this range of the stream."""
        self.close()
        left = self.course.left(first)
        found = self.stream(first, count if left is None else min(count, left))
        self.passed = [*self.passed, (found[0], found[-1] + 1)]
        return self.passed[-1]

    def stream(self, position: int, count: int) -> Sequence[int]:
        """Where `count` samples from a position on lie in the stream from which nothing is left out."""
        return self.course.stream(position, count)

    @staticmethod
    def stream_of(state: Mapping[str, Any]) -> int:
        """Where the stream of a run of one phase goes on, of which `state` was kept: what lies before it was read or passed over."""
        return without([(start, stop) for start, stop in state.get("passed", ())], int(state["position"]), 1)[0]

    def begins(self, step: int) -> int:
        """The position at which a step begins."""
        return self.course.position(step)

    def step(self, step: int) -> Sequence[int]:
        """Where the samples of a step lie in the stream."""
        position = self.begins(step)
        return self.stream(position, self.course.phases[self.course.phase(position)].batch)

    def make(self, position: int, shift: int = 0) -> Batch:
        """This rank's share of the step that starts at a global position, on the CPU; or that of the reader `shift` later."""
        phase = self.course.phases[self.course.phase(position)]
        share, count, microbatch = self._mine(phase)
        positions, begin = self.stream(position, phase.batch), (share.start + shift * len(share)) % phase.batch
        rows: list[tuple[AnySamples, int] | None] = [*self.course.many(positions[begin : begin + len(share)])]
        rows += [None] * (count - len(rows))
        blank = blank_of(self.course.samples[self.course.phase(position)])
        parts = tuple(
            stack(rows[start : start + microbatch], phase.sequence, self.corpus.eos, self.device, blank)
            for start in range(0, len(rows), microbatch)
        )
        if self.taught:
            number = {id(one): source for source, one in enumerate(self.course.samples[self.course.phase(position)])}
            known = [None if row is None else (number[id(row[0])], row[1]) for row in rows]
            words = self.taught[phase.sequence]
            cuts = (known[start : start + microbatch] for start in range(0, len(rows), microbatch))
            parts = tuple(
                replace(part, given=words.given(cut, pinned=self.device.type == "cuda")) for part, cut in zip(parts, cuts, strict=True)
            )
        targets = sum(targets_of(part) for part in parts)
        return Batch(parts, targets, phase.batch * phase.sequence, positions)

    def _mine(self, phase: Phase) -> tuple[range, int, int]:
        """Of a step of a phase: this rank's slots, how many rows it has, and of a microbatch."""
        if len(self.course.phases) == 1:
            return self.share, self.rows, self.microbatch
        each = phase.batch // self.ranks
        return range(self.rank * each, (self.rank + 1) * each), each, min(phase.microbatch or each, each)

    def _referred(self, position: int) -> str | None:
        """`reference`, or the SHA-256 of what a teacher said ahead, of the lengths of samples that came before a position."""
        if not self.taught:
            return self.reference
        lengths = {self.course.phases[0].sequence, *(one.sequence for one in self.course.phases[1 : 1 + len(self.course.begun(position))])}
        return " ".join(self.taught[length].sha256 for length in sorted(lengths))

    def state(self) -> dict[str, Any]:
        """All that a resume needs: what decides the order, and how far it went."""
        reference = self._referred(self.position)
        return {
            "seed": self.seed,
            "corpus": self.corpus.sha256,
            "weights": list(self.course.phases[0].weights),
            "sequence": self.sequence,
            "packing": self.packing,
            **{name: one for name, one in (("form", self.form), ("reference", reference)) if one is not None},
            "position": self.position,
            "passed": [list(one) for one in self.passed],
        } | ({"phases": begun} if (begun := self.course.begun(self.position)) else {})

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; DataError names what differs.

        The batch and the number of ranks may differ, and phases that begin at the position or later: positions count samples.
        """
        mine = self.state() | {"reference": self._referred(int(state["position"]))}
        for name in ("seed", "corpus", "weights", "sequence", "packing", "form", "reference"):
            if state.get(name) != mine.get(name):
                raise DataError(
                    f"the saved data position is for {name} {state.get(name)!r}, and this run has {mine.get(name)!r}: "
                    "other samples would follow; resume with the same data and seed, or start a new run"
                )
        begun = self.course.begun(int(state["position"]))
        if state.get("phases", []) != begun:
            raise DataError(
                f"the saved data position {state['position']:,} lies behind other phases than this run's: phases that begin at [sample, step], with sequence, "
                f"batch and weights: {state.get('phases', [])}, and here {begun}. Phases behind a checkpoint are the run's past: give them as they were, and "
                "change those ahead"
            )
        self.close()
        self.position = int(state["position"])
        self.passed = [(int(start), int(stop)) for start, stop in state.get("passed", ())]

    def describe(self, positions: Sequence[int]) -> list[str]:
        """For each global position: its source, epoch and sample, and the file, byte and document where its labels start."""
        return [self.course.describe(position) for position in positions]

    def _start(self) -> None:
        # The thread holds its own queue, stop flag and position, so one that is late to stop cannot disturb its successor.
        self.queue: Queue[Batch | BaseException] = Queue(self.prefetch)
        self.stopped = threading.Event()
        self.thread = threading.Thread(
            target=self._read, args=(self.queue, self.stopped, self.position), name="gigatrain data", daemon=True
        )
        self.thread.start()

    def _read(self, queue: "Queue[Batch | BaseException]", stopped: threading.Event, position: int) -> None:
        while not stopped.is_set():
            try:
                found: Batch | BaseException = self.make(position)
            except BaseException as error:  # raised again, as it is, in __next__
                found = error
            while not stopped.is_set():
                try:
                    queue.put(found, timeout=0.1)
                    break
                except Full:
                    continue
            if isinstance(found, BaseException):
                return
            position += len(found.positions)

    def close(self) -> None:
        """Stop reading ahead; the next batch, if one is asked for, starts again at the same position."""
        if self.thread is None:
            return
        self.stopped.set()
        with suppress(Empty):
            self.queue.get_nowait()  # wakes a thread that waits for room
        self.thread.join()
        self.thread = None


class Validation:
    """The held-out samples in a fixed order, as often as it is iterated.

    split: the corpus's, "train" for a set of its own. source: only that source's share of the samples. text_bytes: bytes of text that the labels
    cover; of a subset or of documents that are cut it is the sum of `token_bytes` [vocabulary], the bytes of each id, over the labels. None where
    neither is known, or where nothing is held out; then there is no microbatch either. Rank r has samples r, r + ranks, …; the last rounds are
    filled with rows without labels, so that all ranks run equally many microbatches.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence: int,
        packing: Packing,
        microbatch: int,
        max_samples: int | None = None,
        rank: int = 0,
        ranks: int = 1,
        device: str | torch.device = "cpu",
        form: Form | None = None,
        split: str = "validation",
        source: int | None = None,
        token_bytes: Callable[[], np.ndarray | None] = lambda: None,
    ) -> None:
        self.samples = samples_of(corpus, split, sequence, packing, partial=True, form=form)
        self.sequence, self.eos, self.microbatch, self.device = sequence, corpus.eos, microbatch, torch.device(device)
        ends = np.cumsum([len(samples) for samples in self.samples])
        total = int(ends[-1])
        count = min(total, max_samples or total)
        # A subset is spread evenly over all documents.
        chosen = [index * total // count for index in range(count)]
        whole = 0 < count == total
        if source is not None:
            end = int(ends[source])
            chosen = [index for index in chosen if end - len(self.samples[source]) <= index < end]
            count = len(chosen)
        self.mine: list[tuple[AnySamples, int] | None] = []
        for index in chosen[rank::ranks]:
            self.mine.append(self._place(index, ends))
        self.mine += [None] * (-(-count // ranks) - len(self.mine))
        self.count = count
        of = self.samples if source is None else [self.samples[source]]
        self.text_bytes: int | None = None
        if form is not None:
            return
        if count and whole and packing != "packed" and (packing == "stream" or not any(samples.cut() for samples in of)):
            said = corpus.totals(split) if source is None else corpus.manifest["sources"][source]["splits"][split]
            self.text_bytes = said["text_bytes"]
        if self.text_bytes is None and 0 < count * sequence <= COUNTED and (sizes := token_bytes()) is not None:
            self.text_bytes = sum(self._bytes(index, ends, sizes) for index in chosen)

    def _place(self, index: int, ends: np.ndarray) -> tuple[AnySamples, int]:
        """Which source's sample the `index`-th of all is, and the how manyth there."""
        source = int(np.searchsorted(ends, index, "right"))
        return self.samples[source], index - int(ends[source]) + len(self.samples[source])

    def _bytes(self, index: int, ends: np.ndarray, sizes: np.ndarray) -> int:
        samples, number = self._place(index, ends)
        assert not isinstance(samples, Pairs)
        labels = samples[number].labels
        return int(sizes[labels[labels != IGNORED]].sum())

    def __len__(self) -> int:
        """Microbatches, the same on every rank."""
        return ceil(len(self.mine) / self.microbatch)

    def __iter__(self) -> Iterator[Microbatch]:
        for start in range(0, len(self.mine), self.microbatch):
            rows = self.mine[start : start + self.microbatch]
            yield moved(stack(rows, self.sequence, self.eos, self.device, blank_of(self.samples)), self.device)
