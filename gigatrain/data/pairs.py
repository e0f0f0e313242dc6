"""Rows of answers that somebody preferred: two documents end to end, the preferred answer behind its prompt and the refused one behind it again.

    tokens     p p p a a | p p p b b b | eos eos       documents  0 0 0 0 | 1 1 1 1 1 ...       (inputs: all but a document's last token)
    labels     - - a a   | - - b b b   | -   -         positions  0 1 2 3 | 0 1 2 3 4 ...

So both answers of a pair are always in one row, and so in one microbatch, and share its `sequence`. A single answer (kto) is a row of one document.
"""

from collections.abc import Sequence

import numpy as np

from gigatrain.data.pack import IGNORED, Sample

Document = tuple[np.ndarray, np.ndarray]  # ids [n], and which of them are the answer's [n]


def room(lengths: Sequence[int]) -> int:
    """Input positions that documents of so many tokens need in a row."""
    return sum(max(0, length - 1) for length in lengths)


def lay(documents: Sequence[Document], sample: Sample, eos: int, *, answer: np.ndarray | None = None) -> None:
    """Write documents into a row's arrays [T]; they fit (`room`). Labels are those of the answer; with `answer` [T] of every token, and it says which are
    the answer's."""
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
