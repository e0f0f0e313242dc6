"""What is an input, what a label, and where a segment starts; by hand, and against a plain slow reference."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gigatrain.data.pack import IGNORED, Samples
from gigatrain.data.shards import Stream

EOS, BOS = 0, 1
X = IGNORED


def rows(samples: Samples, index: int) -> tuple[list[int], ...]:
    sample = samples[index]
    return sample.tokens.tolist(), sample.labels.tolist(), sample.positions.tolist(), sample.documents.tolist()


def test_stream_where_eos_opens(stream_of: Callable[..., Stream]) -> None:
    """Documents 5 6 7 eos | 8 eos | 9 eos: eos is the label that ends one and the input that opens the next."""
    stream = stream_of([[5, 6, 7, EOS], [8, EOS], [9, EOS]])
    samples = Samples(stream, sequence=5, packing="stream", eos=EOS, eos_opens=True)
    assert rows(samples, 0) == ([EOS, 5, 6, 7, EOS], [5, 6, 7, EOS, 8], [0, 1, 2, 3, 0], [0, 0, 0, 0, 1])
    assert len(samples) == 1
    assert samples.dropped == 3
    held = Samples(stream, sequence=5, packing="stream", eos=EOS, eos_opens=True, partial=True)
    assert rows(held, 1) == ([8, EOS, 9, EOS, EOS], [EOS, 9, EOS, X, X], [0, 0, 1, 2, 3], [0, 1, 1, 1, 1])
    assert len(held) == 2


def test_stream_where_bos_opens(stream_of: Callable[..., Stream]) -> None:
    """bos 5 eos | bos 6 7 eos: nothing predicts bos, and the segment starts where bos is the input."""
    stream = stream_of([[BOS, 5, EOS], [BOS, 6, 7, EOS]])
    samples = Samples(stream, sequence=7, packing="stream", eos=EOS, eos_opens=False)
    tokens, labels, positions, documents = rows(samples, 0)
    assert tokens == [EOS, BOS, 5, EOS, BOS, 6, 7]
    assert labels == [X, 5, EOS, X, 6, 7, EOS]
    assert positions == [0, 0, 1, 2, 0, 1, 2]
    assert documents == [0, 1, 1, 1, 2, 2, 2]
    # Cut so that the second sample's first input is the document's last token, or its bos.
    samples = Samples(stream, sequence=3, packing="stream", eos=EOS, eos_opens=False)
    assert rows(samples, 1) == ([EOS, BOS, 6], [X, 6, 7], [0, 0, 1], [0, 1, 1])
    samples = Samples(stream, sequence=4, packing="stream", eos=EOS, eos_opens=False, partial=True)
    assert rows(samples, 1) == ([BOS, 6, 7, EOS], [6, 7, EOS, X], [0, 1, 2, 3], [0, 0, 0, 0])


def test_one_document_a_sample(stream_of: Callable[..., Stream]) -> None:
    stream = stream_of([[5, 6, 7, 8, EOS], [9, EOS], [EOS]])
    samples = Samples(stream, sequence=3, packing="document", eos=EOS, eos_opens=True)
    assert rows(samples, 0) == ([EOS, 5, 6], [5, 6, 7], [0, 1, 2], [0, 0, 0])
    assert rows(samples, 1) == ([EOS, 9, EOS], [9, EOS, X], [0, 1, 2], [0, 0, 0])
    assert rows(samples, 2) == ([EOS, EOS, EOS], [EOS, X, X], [0, 1, 2], [0, 0, 0])
    assert len(samples) == 3
    assert samples.cut() == 2
    bos = stream_of([[BOS, 5, 6, 7, EOS], [BOS, 9, EOS], [BOS], []])
    samples = Samples(bos, sequence=3, packing="document", eos=EOS, eos_opens=False)
    assert rows(samples, 0) == ([BOS, 5, 6], [5, 6, 7], [0, 1, 2], [0, 0, 0])
    assert rows(samples, 1) == ([BOS, 9, EOS], [9, EOS, X], [0, 1, 2], [0, 0, 0])
    assert rows(samples, 2)[1] == [X, X, X]
    assert rows(samples, 3)[1] == [X, X, X]
    assert samples.cut() == 1


def reference(documents: list[list[int]], size: int, *, eos_opens: bool) -> list[list[tuple[int, int, int, int]]]:
    """Token by token, as pack.py's first lines say it: [sample][j] = (input, label, position, segment)."""
    flat = [(token, i, j) for i, ids in enumerate(documents) for j, token in enumerate(ids)]
    found = []
    for start in range(0, len(flat), size):
        sample: list[tuple[int, int, int, int]] = []
        for j in range(start, min(start + size, len(flat))):
            token = flat[j - 1][0] if j else EOS
            crosses = flat[j][2] == 0
            opens = crosses if eos_opens else (j > 0 and flat[j - 1][2] == 0)
            position = 0 if opens or not sample else sample[-1][2] + 1
            segment = 0 if not sample else sample[-1][3] + (1 if opens else 0)
            sample.append((token, X if crosses and not eos_opens else flat[j][0], position, segment))
        while len(sample) < size:
            sample.append((EOS, X, sample[-1][2] + 1, sample[-1][3]))
        found.append(sample)
    return found


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    size=st.integers(2, 8),
    each=st.integers(1, 5),
    eos_opens=st.booleans(),
)
def test_stream_against_the_reference(stream_of: Callable[..., Stream], lengths: list[int], size: int, each: int, eos_opens: bool) -> None:
    documents = [[10 * i + j + 2 for j in range(length - 1)] + [EOS] for i, length in enumerate(lengths)]
    samples = Samples(stream_of(documents, each=each), sequence=size, packing="stream", eos=EOS, eos_opens=eos_opens, partial=True)
    expected = reference(documents, size, eos_opens=eos_opens)
    assert len(samples) == len(expected)
    for index, sample in enumerate(expected):
        assert list(zip(*rows(samples, index), strict=True)) == sample
    if eos_opens:  # every token is a label exactly once
        labels = np.concatenate([samples[index].labels for index in range(len(samples))])
        assert labels[labels != X].tolist() == [token for ids in documents for token in ids]


def test_index_outside(stream_of: Callable[..., Stream]) -> None:
    samples = Samples(stream_of([[5, EOS]]), sequence=2, packing="stream", eos=EOS, eos_opens=True)
    with pytest.raises(IndexError, match=r"sample 1 is outside range\(1\)"):
        samples[1]
