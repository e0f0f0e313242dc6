"""Documents of a corpus as people look at them: what is trained of them marked, and prompts of held-out conversations."""

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gigatrain.data.corpus import Corpus
from gigatrain.data.packs import Packs
from gigatrain.errors import DataError

Piece = tuple[str, bool]  # text, whether it is trained
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey


@dataclass(frozen=True)
class Asked:
    """A held-out conversation up to the assistant's last turn, and that turn."""

    prompt: list[int]
    answer: list[int]


def pieces(corpus: Corpus, source: int, split: str, number: int) -> list[Piece]:
    """The text of a document in runs that are trained or not, special tokens included.

    Bytes of a character that a run's edge parts (none does where a template marked it) are shown as U+FFFD. DataError if there is no such document.
    """
    ids, trained = document(corpus, source, split, number)
    backend = corpus.tokenizer().backend
    edges = [0, *(np.flatnonzero(np.diff(trained.astype(np.int8))) + 1).tolist(), len(ids)]
    found = []
    for start, stop in pairwise(edges):
        if stop > start:
            # With what stands before it: some tokenizers drop a text's first blank.
            before = backend.decode(ids[:start].tolist(), skip_special_tokens=False)
            text = backend.decode(ids[:stop].tolist(), skip_special_tokens=False)
            own = (
                text.removeprefix(before)
                if text.startswith(before)
                else backend.decode(ids[start:stop].tolist(), skip_special_tokens=False)
            )
            found.append((CONTROL.sub("\ufffd", own), bool(trained[start])))
    return found


def document(corpus: Corpus, source: int, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n] and whether each is trained [n]; DataError if there is no such document."""
    if not 0 <= source < len(corpus.sources):
        raise DataError(f"there is no source {source}; there are {len(corpus.sources)}, counted from 0")
    stream = corpus.stream(source, split)
    if not 0 <= number < stream.documents:
        raise DataError(f"source {corpus.sources[source]} has no {split} document {number}; it has {stream.documents:,}, counted from 0")
    start, stop = stream.document(number)
    trained = stream.trained(start, stop)
    return stream.read(start, stop), np.ones(stop - start, bool) if trained is None else trained


def asked(corpus: Corpus, count: int) -> list[Asked]:
    """At most `count` held-out conversations, spread evenly over them all; [] where none has anything to be asked."""
    places = []
    for source in range(len(corpus.sources)):
        records = corpus.manifest["sources"][source]["splits"]["validation"]["shards"]
        if any("mask" in record for record in records):
            places += [(source, number) for number in range(corpus.stream(source, "validation").documents)]
    found = []
    for index in range(min(count, len(places))):
        source, number = places[index * len(places) // min(count, len(places))]
        ids, trained = document(corpus, source, "validation", number)
        opens = np.flatnonzero(trained & ~np.concatenate([[True], trained[:-1]]))
        if opens.size:
            begin = int(opens[-1])
            after = np.flatnonzero(~trained[begin:])
            found.append(Asked(ids[:begin].tolist(), ids[begin : begin + int(after[0]) if after.size else None].tolist()))
    return found


def lines(corpus: Corpus, count: int, *, sequence: int | None = None, packing: str = "stream", colour: bool = True) -> list[str]:
    """The corpus, how its documents are packed, and the first `count` training documents of each source, what is trained of them marked."""
    found = corpus.describe()
    if packing == "packed" and sequence is not None:
        for number, source in enumerate(corpus.manifest["sources"]):
            packs = Packs(
                corpus.stream(number), sequence=sequence, eos=corpus.eos, too_long=source.get("too_long", "truncate"), name=source["name"]
            )
            found.append(packs.counts.words(source["name"], sequence))
    for source, name in enumerate(corpus.sources):
        for number in range(min(count, corpus.stream(source).documents)):
            ids, trained = document(corpus, source, "train", number)
            found.append(
                f"\nsource {name}, document {number}: {len(ids):,} tokens, {int(trained.sum()):,} trained, which are {_marked('marked so', colour)}"
            )
            found.append("".join(_marked(text, colour) if one else text for text, one in pieces(corpus, source, "train", number)))
    return found


def _marked(text: str, colour: bool) -> str:
    """Green on a terminal, and in double guillemets else; line by line, so that a pager keeps it."""
    return "\n".join(f"\x1b[32m{line}\x1b[0m" for line in text.split("\n")) if colour else f"⟪{text}⟫"
