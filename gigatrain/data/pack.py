"""Samples of T tokens, cut from a stream of documents: which tokens are inputs, which are labels, and where attention may look.

A label is the token after its input. Two ways in which documents meet, per source:

- `eos` opens (documents are d1 .. dn eos; our own tokenizer): the eos that ends document A is A's last label and then, as an input, the
  first token of document B's segment. Nothing is masked: every token of the stream is a label exactly once an epoch, and none is predicted
  across documents.
- else (documents start with a bos of their own, or have neither): the segment opens at the document's first token as an input, and the
  label that would cross from A to B is ignored (-100).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from gigatrain.data.shards import Stream

IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """Arrays [T]: tokens, labels (-100: none), positions within the segment, all int64; the segment's number in the sample, int32."""

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    documents: np.ndarray


class Samples:
    """All samples of one stream: sample i is a pure function of i, and costs O(T + log documents).

    packing "stream": documents end to end, sample i predicts tokens i T .. (i + 1) T - 1. What is left at the end, less than T tokens, is
    not trained on (`dropped` counts it); for validation (`partial`) it is kept and padded. packing "document": document i, cut to T labels
    (`dropped` is not known without reading every length: `cut` reads them) or padded. Padding repeats eos as input, has no label and
    belongs to the last segment.
    """

    def __init__(
        self, stream: Stream, *, sequence: int, packing: Literal["stream", "document"], eos: int, eos_opens: bool, partial: bool = False
    ) -> None:
        self.stream, self.sequence, self.packing, self.eos, self.eos_opens = stream, sequence, packing, eos, eos_opens
        if packing == "document":
            self.count, self.dropped = stream.documents, 0
        else:
            self.count = -(-stream.tokens // sequence) if partial else stream.tokens // sequence
            self.dropped = 0 if partial else stream.tokens % sequence

    def __len__(self) -> int:
        return self.count

    def span(self, index: int) -> tuple[int, int]:
        """The stream's offsets [start, stop) whose tokens sample `index` predicts."""
        if not 0 <= index < self.count:
            raise IndexError(f"sample {index} is outside range({self.count})")
        if self.packing == "stream":
            return index * self.sequence, min((index + 1) * self.sequence, self.stream.tokens)
        start, stop = self.stream.document(index)
        start = start if self.eos_opens else min(start + 1, stop)  # the first token has nothing before it
        return start, min(stop, start + self.sequence)

    def cut(self) -> int:
        """Labels that packing "document" leaves out, as their document is longer than T; reads every document's length."""
        total = 0
        for index in range(self.count if self.packing == "document" else 0):
            start, stop = self.span(index)
            total += self.stream.document(index)[1] - stop if stop > start else 0
        return total

    def __getitem__(self, index: int) -> Sample:
        sample = Sample(*(np.empty(self.sequence, kind) for kind in (np.int64, np.int64, np.int64, np.int32)))
        self.fill(index, sample)
        return sample

    def fill(self, index: int, sample: Sample) -> None:
        """Write sample `index` into arrays that exist, such as the rows of a batch: a copy less than stacking rows."""
        start, stop = self.span(index)
        count = stop - start
        # Token j of the inputs is the one before label j: read once, from one before the first.
        before = 1 if start and (self.packing == "stream" or not self.eos_opens) else 0
        read = self.stream.read(start - before, stop)
        sample.tokens[: 1 - before] = self.eos
        sample.tokens[1 - before : count] = read[: count - 1 + before]
        sample.tokens[max(count, 1 - before) :] = self.eos
        sample.labels[:count] = read[before:]
        sample.labels[count:] = IGNORED
        if (trained := self.stream.trained(start, stop)) is not None:
            sample.labels[:count][~trained] = IGNORED
        sample.positions[:] = np.arange(self.sequence)
        sample.documents[:] = 0
        if self.packing == "document":
            return
        # Offsets of documents' first tokens. As labels they are at bounds, and as inputs one later.
        bounds = self.stream.boundaries(start if self.eos_opens else max(0, start - 1), stop) - start
        if not self.eos_opens:
            sample.labels[bounds[bounds >= 0]] = IGNORED
            bounds += 1
        opens = bounds[(bounds > 0) & (bounds < count)]
        for number, (first, last) in enumerate(pairwise([*opens.tolist(), self.sequence]), 1):
            sample.documents[first:last] = number
            sample.positions[first:last] -= first
