"""Rows of answers that somebody preferred: two documents end to end, the preferred answer behind its prompt and the refused one behind it again.

    tokens     p p p a a | p p p b b b | eos eos       documents  0 0 0 0 | 1 1 1 1 1 ...       (inputs: all but a document's last token)
    labels     - - a a   | - - b b b   | -   -         positions  0 1 2 3 | 0 1 2 3 4 ...

So both answers of a pair are always in one row, and so in one microbatch, and share its `sequence`; a pair that does not fit is left out and counted. With
packing "document" a row is one pair, with "packed" as many as fit best, in whichever order best fit puts them. A single answer (kto) is a row of one document.

A shard holds pairs as documents 2 i and 2 i + 1. An answer that was not compared but judged alone is a pair whose other side is empty: good answers are on
the first side. For kto every answer is one of its own, good or not by its side.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gigatrain.data.pack import IGNORED, Sample
from gigatrain.data.packs import fit, segments
from gigatrain.data.shards import Stream
from gigatrain.errors import DataError

Document = tuple[np.ndarray, np.ndarray]  # ids [n], and which of them are the answer's [n]
STRETCH = 1 << 24  # tokens whose marks are looked at together
Form = Literal["pair", "whole", "single"]  # two answers; the same with every token a label (orpo); one answer (kto)


def room(lengths: Sequence[int]) -> int:
    """Input positions that documents of so many tokens need in a row."""
    return sum(max(0, length - 1) for length in lengths)


def lay(documents: Sequence[Document], sample: Sample, eos: int, *, answer: np.ndarray | None = None) -> None:
    """Write documents into a row's arrays [T]; they fit (`room`). Labels are those of the answer; with `answer` [T] of every token, and it says which are
    the answer's. What is left of the row belongs to the last document, without labels."""
    at = 0
    sample.tokens[:], sample.labels[:], sample.documents[:] = eos, IGNORED, 0
    sample.positions[:] = np.arange(len(sample.tokens))
    if answer is not None:
        answer[:] = 0
    for number, (ids, trained) in enumerate(documents):
        row = slice(at, at + max(0, len(ids) - 1))
        sample.tokens[row] = ids[:-1]
        sample.labels[row] = ids[1:] if answer is not None else np.where(trained[1:], ids[1:], IGNORED)
        if answer is not None:
            answer[row] = trained[1:]
        sample.positions[at:] = np.arange(len(sample.tokens) - at)
        sample.documents[at:] = number
        at = row.stop


class Pairs:
    """All rows of one stream of pairs, as pack.Samples: row i is a pure function of i.

    most: pairs of the fullest row, which is what a microbatch has room for; the sources of a run share the largest (`alike`). reference: what a reference
    says of both answers of each entry (a pair, or kto's answer and its foreign one), fp32 [entries, 2]; None until it is known, or where none is asked.
    """

    def __init__(self, stream: Stream, *, sequence: int, eos: int, form: Form, packed: bool, name: str) -> None:
        self.stream, self.sequence, self.eos, self.form, self.name = stream, sequence, eos, form, name
        self.dropped = 0
        if stream.documents % 2:
            raise DataError(
                f'source {name} holds {stream.documents:,} documents and no pairs; set `format` = "preference" where it has prompts and answers'
            )
        lengths = stream.lengths()
        self.ends = np.cumsum(lengths)
        sides = lengths.reshape(-1, 2)
        if form == "single":
            self.entries = np.flatnonzero(lengths)  # numbers of documents
            self.begins = self._measured(lengths)
            sizes = lengths[self.entries] - 1
            if len(self.entries):
                others = self.entries[self._others(np.arange(len(self.entries)))]
                sizes = np.maximum(sizes, self.begins[self.entries] + lengths[others] - self.begins[others] - 1)
        else:
            alone = int((sides == 0).any(1).sum())
            if alone:
                raise DataError(
                    f'source {name} has {alone:,} answers that were judged alone and have no counterpart; set objective.kind = "kto", or leave them out'
                )
            self.entries = np.arange(len(sides))
            sizes = np.maximum(sides - 1, 0).sum(1)
        fits = np.flatnonzero(sizes <= sequence)
        self.long = len(sizes) - len(fits)
        self.rows: list[np.ndarray] = [np.array([entry]) for entry in fits.tolist()]
        if packed:
            self.rows = [fits[row] for row in fit(np.maximum(sizes[fits], 1), sequence, segments(sequence) // 2)] if len(fits) else []
        self.most = max((len(row) for row in self.rows), default=1)
        self.padding = 1 - float(sizes[fits].sum()) / (len(self.rows) * sequence) if self.rows else 0.0
        self.reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def words(self) -> str:
        """What became of the source's pairs, in one line for people."""
        what = "answers" if self.form == "single" else "pairs"
        left = f"; {self.long:,} longer than train.sequence are left out" if self.long else ""
        kept = len(self.entries) - self.long
        return f"source {self.name}: {kept:,} {what} in {len(self.rows):,} rows of {self.sequence:,}, {self.padding:.1%} padding{left}"

    def cut(self) -> int:
        """Pairs that are left out as too long."""
        return self.long

    def span(self, index: int) -> tuple[int, int]:
        """The stream's offsets [start, stop) of the first document's labels."""
        number = self._documents(int(self.rows[index][0]))[0]
        return self._offsets(number)[0] + 1, self._offsets(number)[1]

    def _offsets(self, document: int) -> tuple[int, int]:
        return (int(self.ends[document - 1]) if document else 0), int(self.ends[document])

    def _documents(self, entry: int) -> tuple[int, ...]:
        """The numbers of an entry's documents in the stream."""
        return (int(self.entries[entry]),) if self.form == "single" else (2 * entry, 2 * entry + 1)

    def _read(self, document: int) -> Document:
        start, stop = self._offsets(document)
        trained = self.stream.trained(start, stop)
        return self.stream.read(start, stop), np.ones(stop - start, np.bool_) if trained is None else trained

    def _measured(self, lengths: np.ndarray) -> np.ndarray:
        """How many tokens of every document precede its answer, int64 [documents]; reads the marks once, a stretch of whole documents at a time."""
        found, starts, first = lengths.copy(), self.ends - lengths, 0
        while first < len(lengths):
            stop = max(first + 1, int(np.searchsorted(self.ends, starts[first] + STRETCH, "right")))
            begin, rows = int(starts[first]), slice(first, stop)
            trained = self.stream.trained(begin, int(self.ends[stop - 1]))
            if trained is None:
                found[rows] = 0
            elif len(marks := begin + np.flatnonzero(trained)):
                nearest = np.append(marks, self.ends[-1])[np.searchsorted(marks, starts[rows])]
                found[rows] = np.minimum(nearest - starts[rows], lengths[rows])
            first = stop
        return found

    def _begins(self, document: int) -> int:
        """How many tokens of a document precede its answer."""
        return int(self.begins[document])

    def _other(self, entry: int) -> int:
        """The nearest entry before it (of the first, the last) that answers another prompt: whose answer is foreign to this one."""
        return int(self._others(np.array([entry]))[0])

    def _others(self, places: np.ndarray) -> np.ndarray:
        """`_other` of several."""
        before = (places - 1) % len(self.entries)
        alike = self.entries[before] // 2 == self.entries[places] // 2
        return np.where(alike, (places - 2) % len(self.entries), before)

    def _foreign(self, entry: int) -> Document:
        """An entry's prompt with another's answer."""
        mine, other = (int(self.entries[one]) for one in (entry, self._other(entry)))
        (ids, trained), (theirs, answer) = self._read(mine), self._read(other)
        to, since = self._begins(mine), self._begins(other)
        return np.concatenate([ids[:to], theirs[since:]]), np.concatenate([trained[:to], answer[since:]])

    def fill(self, index: int, sample: Sample, given: Mapping[str, np.ndarray] | None = None) -> None:
        """Write row `index` into arrays that exist, and into those of `blank`."""
        entries = self.rows[index].tolist()
        documents = [self._read(number) for entry in entries for number in self._documents(entry)]
        lay(documents, sample, self.eos, answer=None if given is None else given.get("answer_bt"))
        if given is None:
            return
        count = len(entries)
        given["there_bp"][:count] = 1
        if self.reference is not None:
            given["reference_bps"][:count] = self.reference[entries]
        if self.form == "single":
            given["good_bp"][:count] = [1 - int(self.entries[entry]) % 2 for entry in entries]
            foreign = Sample(given["foreign_tokens_bt"], given["foreign_labels_bt"], *(np.empty_like(sample.positions) for _ in range(2)))
            lay([self._foreign(entries[0])], foreign, self.eos)

    def blank(self) -> dict[str, np.ndarray]:
        """What a row without pairs gives beside its tokens: the form of `Microbatch.given` without its rows (objectives/preference.py)."""
        found: dict[str, Any] = {"there_bp": np.zeros(self.most, np.float32)}
        if self.reference is not None:
            found["reference_bps"] = np.zeros((self.most, 2), np.float32)
        if self.form == "whole":
            found["answer_bt"] = np.zeros(self.sequence, np.bool_)
        if self.form == "single":
            found["good_bp"] = np.zeros(self.most, np.float32)
            found["foreign_tokens_bt"] = np.full(self.sequence, self.eos, np.int64)
            found["foreign_labels_bt"] = np.full(self.sequence, IGNORED, np.int64)
        return found


def alike(found: Sequence[Pairs]) -> None:
    """Give all sources' rows room for as many pairs."""
    most = max(one.most for one in found)
    for one in found:
        one.most = most
