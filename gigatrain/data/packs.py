"""Whole documents in rows of T tokens: which go together, and the rows. Free of torch.

Best fit decreasing: of a window of documents the longest comes first, and each goes into the row in which it leaves the least room. Documents of one
length are alike, and so are rows of one room, so both are moved in heaps and not one by one: a million documents take about a second. The rows are
a function of the lengths alone; which comes when is the mixture's business (mixture.py), of seed and position.

A document d1 .. dn is n - 1 places: d1 .. d(n-1) are inputs and d2 .. dn labels, so none is predicted from another document.
"""

from dataclasses import dataclass

import numpy as np

from gigatrain.data.pack import IGNORED, Sample
from gigatrain.data.shards import Stream
from gigatrain.errors import DataError

WINDOW = 1 << 20  # documents that are sorted together: some 24 MB, and rows of neighbours where a corpus is larger
DOCUMENT_TOKENS = 64  # a row has at most max(8, T / this) segments, padding included: what attention reserves (kernels/attention_mask.py)


def segments(sequence: int) -> int:
    """How many documents a row may hold."""
    return max(8, sequence // DOCUMENT_TOKENS) - 1


def fit(sizes: np.ndarray, room: int, most: int) -> list[np.ndarray]:
    """Rows of document numbers for sizes [n], each at least 1 and at most `room`; no row has more than `most` documents."""
    order = np.argsort(-sizes, kind="stable")
    rows: list[list[int]] = []
    open_: dict[int, list[int]] = {}  # by what room is left
    left: list[int] = []  # keys of open_, ascending
    starts = np.flatnonzero(np.diff(sizes[order], prepend=-1))
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
        size, waiting = int(sizes[order[start]]), order[start:stop].tolist()
        while waiting:
            at = int(np.searchsorted(left, size)) if left else 0
            if at == len(left):
                chosen = list(range(len(rows), len(rows) + len(waiting)))
                rows += [[] for _ in chosen]
                rest = room - size
            else:
                held = open_[left[at]]
                rest = left[at] - size
                chosen = held[: len(waiting)]
                del held[: len(waiting)]
                if not held:
                    del open_[left.pop(at)]
            for row, document in zip(chosen, waiting, strict=False):
                rows[row].append(document)
            del waiting[: len(chosen)]
            chosen = [row for row in chosen if len(rows[row]) < most]
            if chosen and rest:
                if rest in open_:
                    open_[rest] += chosen
                else:
                    open_[rest] = chosen
                    left.insert(int(np.searchsorted(left, rest)), rest)
    return [np.array(row, np.int64) for row in rows]


@dataclass(frozen=True)
class Counts:
    """What packing did to a source's documents."""

    rows: int
    documents: int  # that are in a row
    padding: float  # share of the places that hold none
    cut: int  # labels that were cut off
    shortened: int  # documents of which some were
    dropped: int  # documents that are too long, by `too_long`
    untrained: int  # documents with no label that is trained

    def words(self, name: str, sequence: int) -> str:
        """In one line, for people."""
        other = [
            f"{count:,} {what}"
            for count, what in (
                (self.shortened, f"cut to {sequence:,} ({self.cut:,} targets lost)"),
                (self.dropped, "left out as too long"),
                (self.untrained, "with nothing to train"),
            )
            if count
        ]
        return f"source {name}: {self.documents:,} documents in {self.rows:,} rows of {sequence:,}, {self.padding:.1%} padding" + (
            f"; {', '.join(other)}" if other else ""
        )


class Packs:
    """All rows of one stream, as pack.Samples: row i is a pure function of i.

    too_long: what happens to a document of more than T labels (config.Source). Padding repeats eos as input, has no label and is a segment of its own.
    DataError if a document is too long and is to be refused.
    """

    def __init__(self, stream: Stream, *, sequence: int, eos: int, too_long: str, name: str) -> None:
        self.stream, self.sequence, self.eos, self.dropped = stream, sequence, eos, 0
        lengths = stream.lengths()
        self.ends = np.cumsum(lengths)
        self.left = too_long == "truncate_left"
        usable = lengths > 1
        long = np.flatnonzero(lengths > sequence + 1)
        if long.size and too_long == "refuse":
            worst = int(long[0])
            raise DataError(
                f"source {name}: {long.size:,} documents have more than train.sequence + 1 = {sequence + 1:,} tokens, the first {int(lengths[worst]):,} "
                f"({stream.locate(int(self.ends[worst] - lengths[worst]))}); raise train.sequence, or set `too_long` of the source to truncate or drop"
            )
        dropped = 0
        if too_long == "drop":
            usable[long] = False
            dropped = int(long.size)
        else:
            for number in long.tolist():  # what is left of a document that is cut may have nothing that is trained
                start, stop = self._kept(number)
                trained = stream.trained(start + 1, stop)
                usable[number] = trained is None or bool(trained.any())
        numbers = np.flatnonzero(usable)
        sizes = np.minimum(lengths[numbers] - 1, sequence)
        self.rows: list[np.ndarray] = []
        for first in range(0, len(numbers), WINDOW):
            part = slice(first, first + WINDOW)
            self.rows += [numbers[part][row] for row in fit(sizes[part], sequence, segments(sequence))]
        kept = int(sizes.sum())
        cut = lengths[numbers] - 1 - sizes
        self.counts = Counts(
            rows=len(self.rows),
            documents=len(numbers),
            padding=1 - kept / (len(self.rows) * sequence) if self.rows else 0.0,
            cut=int(cut.sum()),
            shortened=int(np.count_nonzero(cut)),
            dropped=dropped,
            untrained=len(lengths) - len(numbers) - dropped,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def _kept(self, number: int) -> tuple[int, int]:
        """Offsets [start, stop) of what is kept of a document: at most T + 1 tokens."""
        stop = int(self.ends[number])
        start = int(self.ends[number - 1]) if number else 0
        return (max(start, stop - self.sequence - 1), stop) if self.left else (start, min(stop, start + self.sequence + 1))

    def span(self, index: int) -> tuple[int, int]:
        """The stream's offsets [start, stop) of the first document's labels."""
        start, stop = self._kept(int(self.rows[index][0]))
        return start + 1, stop

    def cut(self) -> int:
        """Labels that are left out, as their document is longer than T or dropped for it."""
        return self.counts.cut + self.counts.dropped

    def __getitem__(self, index: int) -> Sample:
        sample = Sample(*(np.empty(self.sequence, kind) for kind in (np.int64, np.int64, np.int64, np.int32)))
        self.fill(index, sample)
        return sample

    def fill(self, index: int, sample: Sample) -> None:
        """Write row `index` into arrays that exist."""
        at = number = 0
        for number, document in enumerate(self.rows[index].tolist()):
            start, stop = self._kept(document)
            read, trained = self.stream.read(start, stop), self.stream.trained(start + 1, stop)
            upto = at + len(read) - 1
            sample.tokens[at:upto] = read[:-1]
            sample.labels[at:upto] = read[1:] if trained is None else np.where(trained, read[1:], IGNORED)
            sample.positions[at:upto] = np.arange(upto - at)
            sample.documents[at:upto] = number
            at = upto
        sample.tokens[at:], sample.labels[at:] = self.eos, IGNORED
        sample.positions[at:], sample.documents[at:] = np.arange(self.sequence - at), number + 1
