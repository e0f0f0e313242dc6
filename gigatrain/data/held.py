"""All that a run validates on: the held-out documents, whole and by source, and the recipe's further sets, each with figures of its own."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gigatrain import config
from gigatrain.data import build
from gigatrain.data.corpus import Corpus
from gigatrain.data.job import Progress
from gigatrain.data.loader import Packing, Validation
from gigatrain.data.pairs import Form
from gigatrain.errors import DataError

NATS_PER_BIT = 0.6931471805599453


@dataclass(frozen=True)
class Set:
    """One named set, and whether it is a part of the held-out documents."""

    name: str
    validation: Validation
    held_out: bool


@dataclass(frozen=True)
class Held:
    """The sets in the order in which they are read; none of them is empty."""

    sets: tuple[Set, ...]

    def __iter__(self) -> Iterator[Set]:
        return iter(self.sets)


def build_sets(
    corpus: Corpus, data: config.Data, sets: tuple[config.ValidationSet, ...], *, progress: Progress | None = None
) -> dict[str, Corpus]:
    """A corpus for each set, tokenised as `corpus` is, beside it; nothing of it is held out. Raises DataError."""
    found = {}
    for number, one in enumerate(sets):
        source = config.Source(**{key: value for key, value in one if key != "name"})
        alone = data.model_copy(update={"sources": (source,), "validation": 0.0})
        try:
            found[one.name] = build.build(
                alone, config.Tokenizer.model_validate({"from": str(corpus.folder / "tokenizer")}), progress=progress
            )
        except DataError as failure:
            if (key := "data.sources.0.") not in str(failure):
                raise
            raise DataError(str(failure).replace(key, f"validation.sets.{number}.")) from None
    return found


def held(
    corpus: Corpus,
    further: dict[str, Corpus],
    *,
    held_out: bool,
    sequence: int,
    packing: Packing,
    microbatch: int,
    max_samples: int | None,
    rank: int,
    ranks: int,
    device: torch.device,
    form: Form | None = None,
) -> Held | None:
    """Everything there is to validate on, for one reader; None where that is nothing. A mixture's held-out documents are read by source."""
    one = functools.partial(
        Validation,
        sequence=sequence,
        packing=packing,
        microbatch=microbatch,
        max_samples=max_samples,
        rank=rank,
        ranks=ranks,
        device=device,
        form=form,
        token_bytes=functools.cache(lambda: corpus.tokenizer().token_bytes()),
    )
    found = []
    if held_out and len(corpus.sources) == 1:
        found.append(Set("held-out", one(corpus), held_out=True))
    elif held_out:
        found += [Set(name, one(corpus, source=number), held_out=True) for number, name in enumerate(corpus.sources)]
    found += [Set(name, one(own, split="train"), held_out=False) for name, own in further.items()]
    found = [each for each in found if each.validation.count]
    return Held(tuple(found)) if found else None


def figures(sums: list[tuple[Set, float, float]]) -> dict[str, Any]:
    """What metrics.jsonl says of a validation, from the nats and targets of each set.

    The unnamed numbers are those of all held-out documents, or of the first set where none are held out; `val_sets` has each set's, where there are
    several.
    """
    whole = [one for one in sums if one[0].held_out] or sums[:1]
    sizes = [one.validation.text_bytes for one, _, _ in whole]
    text_bytes = None if None in sizes else sum(size for size in sizes if size is not None)
    found = {f"val_{name}": value for name, value in _of(sum(one[1] for one in whole), sum(one[2] for one in whole), text_bytes).items()}
    if len(sums) > 1:
        found["val_sets"] = {one.name: _of(nats, targets, one.validation.text_bytes) for one, nats, targets in sums}
    return found


def _of(nats: float, targets: float, text_bytes: int | None) -> dict[str, Any]:
    """Loss and perplexity per target, and bits per byte of text where the bytes are known; None for what is not finite."""
    loss = nats / targets if targets and math.isfinite(nats) else None
    return {
        "loss": loss,
        "targets": int(targets),
        "bits_per_byte": nats / (NATS_PER_BIT * text_bytes) if text_bytes and loss is not None else None,
        "perplexity": math.exp(loss) if loss is not None and loss < 700 else None,
    }
