"""Batches for the loop: position -> samples -> tensors, read ahead by one thread.

Global position p = step * batch + slot. A rank owns consecutive slots, so the ranks' rows one after the other are the batch of a single
rank. What comes next depends on the seed and the position alone; reading ahead changes when a batch is made, never which.

A run may pass over samples (observe/numerics.py). Then the positions of the stream are counted without the ranges that are passed over, and these are part
of the state: the stream stays a function of (seed, ranges, position), on any number of ranks and after any resume.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil
from queue import Empty, Full, Queue
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gigatrain.data.build import Corpus
from gigatrain.data.mixture import Mixture
from gigatrain.data.pack import IGNORED, Sample, Samples
from gigatrain.data.packs import Packs
from gigatrain.errors import DataError

Packing = Literal["stream", "document", "packed"]


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

    targets: labels of this share's microbatches that are not ignored: neither padding nor a label that would cross documents. The sum over
    the ranks divides the step's loss. tokens: input positions of the whole step over all ranks, samples times their length, padding
    included. positions: the global positions of the whole step's samples, ascending.
    """

    microbatches: tuple[Microbatch, ...]
    targets: int
    tokens: int
    positions: Sequence[int]


def samples_of(corpus: Corpus, split: str, sequence: int, packing: Packing) -> list[Samples | Packs]:
    """The samples of every source of a split; validation keeps its last, partial ones."""
    found: list[Samples | Packs] = []
    for number, source in enumerate(corpus.manifest["sources"]):
        eos_opens = source["ends_with_eos"] and not source["starts_with_bos"]
        stream, too_long = corpus.stream(number, split), source.get("too_long", "truncate")
        if packing == "packed":
            found.append(Packs(stream, sequence=sequence, eos=corpus.eos, too_long=too_long, name=source["name"]))
            continue
        found.append(
            Samples(stream, sequence=sequence, packing=packing, eos=corpus.eos, eos_opens=eos_opens, partial=split == "validation")
        )
    return found


def stack(rows: list[tuple[Samples | Packs, int] | None], sequence: int, eos: int, device: torch.device) -> Microbatch:
    """(samples, index) pairs as one microbatch on the CPU, in pinned memory if it will go to a GPU; None is a row without labels."""
    pinned = device.type == "cuda"
    tensors = [
        torch.empty((len(rows), sequence), dtype=kind, pin_memory=pinned) for kind in (torch.int64, torch.int64, torch.int64, torch.int32)
    ]
    arrays = [tensor.numpy() for tensor in tensors]
    for number, row in enumerate(rows):
        sample = Sample(*(array[number] for array in arrays))
        if row is not None:
            row[0].fill(row[1], sample)
        else:
            sample.tokens[:], sample.labels[:], sample.positions[:], sample.documents[:] = eos, IGNORED, np.arange(sequence), 0
    # Numbers ascend from 0, so the last column has the most segments.
    return Microbatch(tensors[0], tensors[1], tensors[2], tensors[3] if arrays[3][:, -1].any() else None)


def moved(microbatch: Microbatch, device: torch.device) -> Microbatch:
    """The microbatch on `device`; from pinned memory the copy does not wait."""
    if device.type == "cpu":
        return microbatch

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    documents = None if microbatch.documents is None else there(microbatch.documents)
    given = None if microbatch.given is None else {name: there(tensor) for name, tensor in microbatch.given.items()}
    return Microbatch(there(microbatch.tokens), there(microbatch.labels), there(microbatch.positions), documents, given)


class Batches:
    """An endless iterator of steps. `state()` is O(1), and `load` continues exactly after the last batch that was handed out.

    batch: samples of one step over all `ranks`, and a multiple of them. microbatch: rows a rank computes at a time; its last may be
    smaller. prefetch: batches read ahead by a thread; 0 reads in the caller. position: samples consumed so far, over all ranks.
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
    ) -> None:
        if batch % ranks:
            raise DataError(f"a batch of {batch} samples does not divide by {ranks} ranks; make it a multiple")
        self.corpus, self.sequence, self.packing, self.batch, self.seed = corpus, sequence, packing, batch, seed
        self.share = range(rank * (batch // ranks), (rank + 1) * (batch // ranks))
        self.rows = len(self.share)  # of a step; those beyond the share have no labels
        self.microbatch = min(microbatch or len(self.share), len(self.share))
        self.device, self.prefetch = torch.device(device), prefetch
        self.samples = samples_of(corpus, "train", sequence, packing)
        for name, samples in zip(corpus.sources, self.samples, strict=True):
            if not len(samples):
                raise DataError(
                    f"source {name} has {samples.stream.tokens:,} training tokens, fewer than one sample of {sequence:,}; "
                    "add documents, or lower `train.sequence`"
                    if packing != "packed"
                    else f"source {name} has no document left to train on ({samples.stream.documents:,} before `too_long`); raise train.sequence"
                )
        self.mixture = Mixture([len(samples) for samples in self.samples], corpus.weights, seed)
        self.position = position
        self.passed: list[tuple[int, int]] = []  # ranges of the stream that are passed over, in the order in which they were found
        self.thread: threading.Thread | None = None

    @property
    def dropped(self) -> int:
        """Tokens at the ends of the streams that make no full sample, and are never trained on."""
        return sum(samples.dropped for samples in self.samples)

    def packed(self) -> list[str]:
        """What packing whole documents came to, one line a source; [] where they are not packed."""
        return [
            samples.counts.words(name, self.sequence)
            for name, samples in zip(self.corpus.sources, self.samples, strict=True)
            if isinstance(samples, Packs)
        ]

    @property
    def epochs(self) -> float:
        """How often the smallest-lasting source has been gone through at this position."""
        turns = [
            self.stream(self.position, 1)[0] / self.mixture.cycle * count / size
            for count, size in zip(self.mixture.counts, self.mixture.sizes, strict=True)
        ]
        return max(turns)

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
        self.position += self.batch
        return self._moved(found)

    def _moved(self, found: Batch) -> Batch:
        return replace(found, microbatches=tuple(moved(part, self.device) for part in found.microbatches))

    def cut(self, slots: range, rank: int, ranks: int) -> None:
        """From the next batch that is made on, this rank's share is the `rank`-th of `ranks` equal parts of `slots`; rows without labels fill the last."""
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
        found = self.make(position, shift)
        return Batch(tuple(moved(part, self.device) for part in found.microbatches), found.targets, found.tokens, found.positions)

    def back(self, steps: int) -> None:
        """The last `steps` batches come once more."""
        self.close()
        self.position -= steps * self.batch

    def pass_over(self, first: int, count: int) -> tuple[int, int]:
        """From now on, leave out what lies from position `first` on in the next `count` samples; returns this range of the stream."""
        self.close()
        found = self.stream(first, count)
        self.passed.append((found[0], found[-1] + 1))
        return self.passed[-1]

    def stream(self, position: int, count: int) -> Sequence[int]:
        """Where `count` samples from a position on lie in the stream from which nothing is left out."""
        if not self.passed:
            return range(position, position + count)
        found: list[int] = []
        at = position
        for start, stop in _merged(self.passed):
            if at < start:
                found += range(at, min(start, at + count - len(found)))
                if len(found) == count:
                    return found
                at = stop
            else:
                at += stop - start
        return [*found, *range(at, at + count - len(found))]

    def make(self, position: int, shift: int = 0) -> Batch:
        """This rank's share of the step that starts at a global position, on the CPU; or that of the reader `shift` later."""
        positions, begin = self.stream(position, self.batch), (self.share.start + shift * len(self.share)) % self.batch
        places = self.mixture.many(positions[begin : begin + len(self.share)])
        rows: list[tuple[Samples | Packs, int] | None] = [(self.samples[source], sample) for source, _, sample in places]
        rows += [None] * (self.rows - len(rows))
        parts = tuple(
            stack(rows[start : start + self.microbatch], self.sequence, self.corpus.eos, self.device)
            for start in range(0, len(rows), self.microbatch)
        )
        targets = sum(int(np.count_nonzero(part.labels.numpy() != IGNORED)) for part in parts)
        return Batch(parts, targets, self.batch * self.sequence, positions)

    def state(self) -> dict[str, Any]:
        """All that a resume needs: what decides the order, and how far it went."""
        return {
            "seed": self.seed,
            "corpus": self.corpus.sha256,
            "weights": list(self.corpus.weights),
            "sequence": self.sequence,
            "packing": self.packing,
            "position": self.position,
            "passed": [list(one) for one in self.passed],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; DataError names what differs.

        The batch and the number of ranks may differ: positions count samples.
        """
        mine = self.state()
        for name in ("seed", "corpus", "weights", "sequence", "packing"):
            if state.get(name) != mine[name]:
                raise DataError(
                    f"the saved data position is for {name} {state.get(name)!r}, and this run has {mine[name]!r}: "
                    "other samples would follow; resume with the same data and seed, or start a new run"
                )
        self.close()
        self.position = int(state["position"])
        self.passed = [(int(start), int(stop)) for start, stop in state.get("passed", ())]

    def describe(self, positions: Sequence[int]) -> list[str]:
        """For each global position: its source, epoch and sample, and the file, byte and document where its labels start."""
        found = []
        for position in positions:
            source, epoch, sample = self.mixture.at(position)
            start, _ = self.samples[source].span(sample)
            place = self.samples[source].stream.locate(start)
            found.append(f"position {position:,}: source {self.corpus.sources[source]}, epoch {epoch}, sample {sample:,}: {place}")
        return found

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
            position += self.batch

    def close(self) -> None:
        """Stop reading ahead; the next batch, if one is asked for, starts again at the same position."""
        if self.thread is None:
            return
        self.stopped.set()
        with suppress(Empty):
            self.queue.get_nowait()  # wakes a thread that waits for room
        self.thread.join()
        self.thread = None


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers in ranges that are apart and ascend."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


class Validation:
    """The held-out samples in a fixed order, as often as it is iterated.

    text_bytes: bytes of text that the labels cover, when that is all of them: None for a subset, for documents that are cut, where nobody
    counted, or where nothing is held out; then there is no microbatch either. Rank r has samples r, r + ranks, …; the last rounds are filled
    with rows without labels, so that all ranks run equally many microbatches.
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
    ) -> None:
        self.samples = samples_of(corpus, "validation", sequence, packing)
        self.sequence, self.eos, self.microbatch, self.device = sequence, corpus.eos, microbatch, torch.device(device)
        ends = np.cumsum([len(samples) for samples in self.samples])
        total = int(ends[-1])
        count = min(total, max_samples or total)
        # A subset is spread evenly over all documents.
        chosen = [index * total // count for index in range(count)]
        self.mine: list[tuple[Samples | Packs, int] | None] = []
        for index in chosen[rank::ranks]:
            source = int(np.searchsorted(ends, index, "right"))
            self.mine.append((self.samples[source], index - int(ends[source]) + len(self.samples[source])))
        self.mine += [None] * (-(-count // ranks) - len(self.mine))
        self.count = count
        whole = 0 < count == total and (packing == "stream" or not any(samples.cut() for samples in self.samples))
        self.text_bytes: int | None = corpus.totals("validation")["text_bytes"] if whole else None

    def __len__(self) -> int:
        """Microbatches, the same on every rank."""
        return ceil(len(self.mine) / self.microbatch)

    def __iter__(self) -> Iterator[Microbatch]:
        for start in range(0, len(self.mine), self.microbatch):
            rows = self.mine[start : start + self.microbatch]
            yield moved(stack(rows, self.sequence, self.eos, self.device), self.device)
