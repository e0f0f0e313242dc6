"""A small corpus of real prose-like files, built once, and the tools to make others."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gigatrain import config
from gigatrain.data import shards
from gigatrain.data.build import build
from gigatrain.data.corpus import Corpus

TRAINED = config.Tokenizer(train=config.TokenizerTraining(vocab=300))
WORDS = [
    "def",
    "return",
    "self",
    "index",
    "value",
    "while",
    "token",
    "of",
    "the",
    "für",
    "'naïve'",
    "==",
    "(",
    "):\n   ",
    "\n\n",
    "0",
    "345",
]


def text(seed: int, words: int) -> str:
    """A reproducible document."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def write_files(folder: Path, count: int = 40) -> Path:
    """`count` documents of 1 to 80 words in files, some below a subfolder."""
    for number in range(count):
        path = folder / ("deep" if number % 3 == 0 else "") / f"{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(number, 1 + number * 2), encoding="utf-8")
    return folder


def data_of(folder: Path, *sources: config.Source, **settings: Any) -> config.Data:
    """A Data section whose cache is below `folder`."""
    return config.Data(sources=sources, folder=str(folder / "cache"), **{"validation": 0.25, "workers": 1} | settings)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """40 files in several shards, a quarter held out."""
    folder = tmp_path_factory.mktemp("corpus")
    write_files(folder / "texts")
    return build(data_of(folder, config.Source(kind="text", path=str(folder / "texts")), shard_bytes=1000), TRAINED)


@pytest.fixture
def stream_of(tmp_path: Path) -> Callable[..., shards.Stream]:
    """Make a stream of given documents (lists of ids), spread over shards of `each` documents."""

    def make(documents: list[list[int]], vocab: int = 1000, each: int = 3) -> shards.Stream:
        records = []
        for start in range(0, len(documents), each):
            writer = shards.ShardWriter(tmp_path / f"s{start}", vocab)
            for ids in documents[start : start + each]:
                writer.add(shards.np.array(ids, shards.np.int64))
            record = writer.finish()
            assert record is not None
            records.append({"prefix": f"s{start}", **record})
        return shards.Stream(tmp_path, records, vocab)

    return make
