"""Which samples come in which phase of a run: position -> phase -> place in its stream -> (samples of a source, index).

A run is one phase or several, each with its own length of samples, size of a step, and shares of the sources. Global positions count samples from the run's
first on, so that a position names its phase. Within phase i a sample's place in the stream from which nothing is left out is i * 2^40 + its number there.
Phases whose samples are alike (equally long, or whole documents) go on in a source where the one before left it: no sample comes twice in an epoch. Samples of
another length are cut from the same tokens anew, in an order of their own.

What is passed over is a set of ranges of these places (observe/numerics.py). So the order is a function of (seed, phases, ranges, position), and of phases
only those up to the position's count: what lies ahead may be changed.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from gigatrain.data.corpus import Corpus
from gigatrain.data.mixture import Mixture
from gigatrain.data.pack import Samples
from gigatrain.data.packs import Packs
from gigatrain.data.pairs import Form, Pairs, alike
from gigatrain.errors import DataError

PLACES = 40  # bits of a sample's number in its phase


@dataclass(frozen=True)
class Phase:
    """`steps` steps of `batch` samples of `sequence` tokens, `microbatch` of a rank's at a time (None: all); weights: the sources' shares, 0: left out."""

    steps: int
    sequence: int
    batch: int
    microbatch: int | None
    weights: tuple[float, ...]


Packing = Literal["stream", "document", "packed"]
AnySamples = Samples | Packs | Pairs


def samples_of(
    corpus: Corpus, split: str, sequence: int, packing: Packing, *, partial: bool = False, form: Form | None = None
) -> list[AnySamples]:
    """The samples of every source of a split; validation (`partial`) keeps its last, partial ones. With `form` they are of pairs."""
    if form is not None:
        pairs = [
            Pairs(
                corpus.stream(number, split), sequence=sequence, eos=corpus.eos, form=form, packed=packing == "packed", name=source["name"]
            )
            for number, source in enumerate(corpus.manifest["sources"])
        ]
        alike(pairs)
        return [*pairs]
    found: list[AnySamples] = []
    for number, source in enumerate(corpus.manifest["sources"]):
        eos_opens = source["ends_with_eos"] and not source["starts_with_bos"]
        stream, too_long = corpus.stream(number, split), source.get("too_long", "truncate")
        if packing == "packed":
            found.append(Packs(stream, sequence=sequence, eos=corpus.eos, too_long=too_long, name=source["name"]))
            continue
        found.append(Samples(stream, sequence=sequence, packing=packing, eos=corpus.eos, eos_opens=eos_opens, partial=partial))
    return found


class Course:
    """The order of a run's samples. The last phase goes on for as long as it is asked."""

    def __init__(self, corpus: Corpus, phases: Sequence[Phase], packing: Packing, seed: int, form: Form | None = None) -> None:
        self.corpus, self.phases, self.seed = corpus, tuple(phases), seed
        self.packing: Packing = packing
        self.form: Form | None = form
        self.begins = [0, *accumulate(one.steps * one.batch for one in self.phases[:-1])]  # positions
        self.begin_steps = [0, *accumulate(one.steps for one in self.phases[:-1])]
        self._by_sequence: dict[int, list[AnySamples]] = {}
        self.samples = [self._samples(one) for one in self.phases]
        self.passed = []

    def _samples(self, phase: Phase) -> list[AnySamples]:
        sequence = phase.sequence
        if sequence not in self._by_sequence:
            self._by_sequence[sequence] = samples_of(self.corpus, "train", sequence, self.packing, form=self.form)
        found = self._by_sequence[sequence]
        for name, samples, weight in zip(self.corpus.sources, found, phase.weights, strict=True):
            if weight and not len(samples):
                if isinstance(samples, Pairs):
                    raise DataError(
                        f"source {name} has no pair that fits: {samples.long:,} are longer than train.sequence {sequence:,}, which both answers share; raise it"
                    )
                raise DataError(
                    f"source {name} has {samples.stream.tokens:,} training tokens, fewer than one sample of {sequence:,}; "
                    "add documents, or lower `train.sequence`"
                    if self.packing != "packed"
                    else f"source {name} has no document left to train on ({samples.stream.documents:,} before `too_long`); raise train.sequence"
                )
        return found

    @property
    def passed(self) -> list[tuple[int, int]]:
        """Ranges of places that are passed over, in the order in which they were found."""
        return list(self._passed)

    @passed.setter
    def passed(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._passed, self._merged = list(ranges), _merged(ranges)
        self.mixtures: list[Mixture] = []
        came: dict[int | None, list[int]] = {}  # of samples of one kind, how many of each source
        for number, phase in enumerate(self.phases):
            kind = None if self.packing == "document" else phase.sequence
            before = came.setdefault(kind, [0] * len(phase.weights))
            known = [at for at, weight in enumerate(phase.weights) if weight]
            mixture = Mixture(
                [len(self.samples[number][at]) for at in known],
                [phase.weights[at] for at in known],
                self.seed,
                sources=known,
                came=[before[at] for at in known],
                cycles=number,
                kind=0 if kind in (None, self.phases[0].sequence) else phase.sequence,
            )
            self.mixtures.append(mixture)
            if number < len(self.phases) - 1:
                for at, count in zip(
                    known, mixture.used(self.stream(self.begins[number + 1] - 1, 1)[0] + 1 - (number << PLACES)), strict=True
                ):
                    before[at] += count

    def phase(self, position: int) -> int:
        """The number of the phase that a position lies in."""
        return bisect_right(self.begins, position) - 1

    def position(self, step: int) -> int:
        """Where a step begins."""
        number = bisect_right(self.begin_steps, step) - 1
        return self.begins[number] + (step - self.begin_steps[number]) * self.phases[number].batch

    def step(self, position: int) -> int:
        """The step that a position lies in."""
        number = self.phase(position)
        return self.begin_steps[number] + (position - self.begins[number]) // self.phases[number].batch

    def left(self, position: int) -> int | None:
        """Samples from a position to the end of its phase; None: the last one has no end."""
        number = self.phase(position)
        return None if number == len(self.phases) - 1 else self.begins[number + 1] - position

    def stream(self, position: int, count: int) -> Sequence[int]:
        """The places of `count` samples of one phase from a position on."""
        number = self.phase(position)
        base = number << PLACES
        return without([one for one in self._merged if one[0] >> PLACES == number], base + position - self.begins[number], count, base)

    def many(self, places: Sequence[int]) -> list[tuple[AnySamples, int]]:
        """The samples at places of one phase."""
        if not places:
            return []
        number = places[0] >> PLACES
        base, samples = number << PLACES, self.samples[number]
        found = range(places[0] - base, places[-1] + 1 - base) if isinstance(places, range) else [place - base for place in places]
        return [(samples[source], sample) for source, _, sample in self.mixtures[number].many(found)]

    def describe(self, place: int) -> str:
        """A sample's source, epoch and number, and the file, byte and document where its labels start."""
        number = place >> PLACES
        source, epoch, sample = self.mixtures[number].at(place - (number << PLACES))
        samples = self.samples[number][source]
        where = samples.stream.locate(samples.span(sample)[0])
        said = f"position {place - (number << PLACES):,}" + (f" of phase {number}" if len(self.phases) > 1 else "")
        return f"{said}: source {self.corpus.sources[source]}, epoch {epoch}, sample {sample:,}: {where}"

    def epochs(self, position: int) -> float:
        """How often the source that is gone through soonest has been gone through at a position, in samples of its phase's kind."""
        number = self.phase(position)
        mixture = self.mixtures[number]
        counts = mixture.used(self.stream(position, 1)[0] - (number << PLACES))
        return max((came + count) / size for came, count, size in zip(mixture.came, counts, mixture.sizes, strict=True))

    def begun(self, position: int) -> list[list[object]]:
        """What a position's samples depend on of phases behind the first: where each began that had begun before it, and its numbers."""
        rows = zip(self.begins, self.begin_steps, self.phases, strict=True)
        return [[begin, step, one.sequence, one.batch, list(one.weights)] for begin, step, one in rows if 0 < begin < position]


def without(ranges: Sequence[tuple[int, int]], first: int, count: int, base: int = 0) -> Sequence[int]:
    """Of the numbers from `base` on that are in none of some ranges, those `first - base` to `first - base + count - 1`."""
    if not ranges:
        return range(first, first + count)
    found: list[int] = []
    at = first
    for start, stop in _merged(ranges):
        if at < start:
            found += range(at, min(start, at + count - len(found)))
            if len(found) == count:
                return found
            at = stop
        else:
            at += stop - start
    return [*found, *range(at, at + count - len(found))]


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers in ranges that are apart and ascend."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found
