"""One build of a corpus: what every step of it is told."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gigatrain import config
from gigatrain.data import sources, tokenizer

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


@dataclass(frozen=True)
class Job:
    """One build: what is asked for, what there is to read, and where the corpus goes."""

    data: config.Data
    spec: config.Tokenizer
    existing: tokenizer.Tokenizer | None
    parts: list[sources.Part]
    folder: Path
    report: Progress
