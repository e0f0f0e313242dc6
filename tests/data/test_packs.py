"""Whole documents in rows: a plain best fit decreasing finds the same rows, and every token of a row is where it belongs."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gigatrain.data.pack import IGNORED as X
from gigatrain.data.packs import Packs, fit, segments
from gigatrain.data.shards import ShardWriter, Stream
from gigatrain.errors import DataError
from gigatrain.kernels import attention_mask

EOS = 0


def plainly(sizes: list[int], room: int, most: int) -> list[int]:
    """How full the rows of best fit decreasing are, one document after the other."""
    rows: list[list[int]] = []
    for size in sorted(sizes, reverse=True):
        fits = [row for row in rows if sum(row) + size <= room and len(row) < most]
        if fits:
            max(fits, key=sum).append(size)
        else:
            rows.append([size])
    return sorted(map(sum, rows))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 90), st.integers(1, 9) | st.just(1000))
def test_rows_are_those_of_best_fit_decreasing(sizes: list[int], room: int, most: int) -> None:
    rows = fit(np.array(sizes, np.int64), room, most)
    assert sorted(number for row in rows for number in row.tolist()) == list(range(len(sizes)))
    full = [sum(sizes[number] for number in row) for row in rows]
    assert max(full, default=0) <= room
    assert max(map(len, rows), default=0) <= most
    if most == 1000:  # else rows of one room differ in how many they may still take, and ties decide
        assert sorted(full) == plainly(sizes, room, most)


def test_many_documents_leave_little_room() -> None:
    """Lengths as of chats (log-normal, median 400): 200,000 documents in rows of 4,096 leave less than half a percent."""
    sizes = np.clip(np.random.default_rng(0).lognormal(6, 1, 200_000), 2, 4096).astype(np.int64)
    rows = fit(sizes, 4096, segments(4096))
    assert 1 - sizes.sum() / (len(rows) * 4096) < 0.005


def test_a_row_holds_as_many_segments_as_attention_reserves() -> None:
    import torch

    for sequence in (16, 128, 4096):
        documents = torch.arange(sequence, dtype=torch.int32).clamp(max=segments(sequence))[None]  # padding is one more
        assert attention_mask.sequences(documents)[1].isfinite().all()
        assert (
            not attention_mask.sequences(torch.arange(sequence, dtype=torch.int32).clamp(max=segments(sequence) + 1)[None])[1]
            .isfinite()
            .all()
        )


def test_a_row(stream_of: Callable[..., Stream]) -> None:
    """Documents 5 6 7 8 | 9 3 | 4 | 2 2 2 in rows of 5: 3 + 1 places and 2; one token alone is nothing to learn."""
    packs = Packs(stream_of([[5, 6, 7, 8], [9, 3], [4], [2, 2, 2]]), sequence=5, eos=EOS, too_long="truncate", name="s")
    first, second = packs[0], packs[1]
    assert first.tokens.tolist() == [5, 6, 7, 2, 2]
    assert first.labels.tolist() == [6, 7, 8, 2, 2]
    assert first.positions.tolist() == [0, 1, 2, 0, 1]
    assert first.documents.tolist() == [0, 0, 0, 1, 1]
    assert second.tokens.tolist() == [9, EOS, EOS, EOS, EOS]
    assert second.labels.tolist() == [3, X, X, X, X]
    assert second.documents.tolist() == [0, 1, 1, 1, 1]
    assert second.positions.tolist() == [0, 0, 1, 2, 3]
    assert (packs.counts.rows, packs.counts.documents, packs.counts.untrained) == (2, 3, 1)
    assert packs.counts.padding == pytest.approx(0.4)
    assert packs.counts.words("s", 5) == "source s: 3 documents in 2 rows of 5, 40.0% padding; 1 with nothing to train"


def marked(folder, documents: list[tuple[list[int], list[int]]]) -> Stream:
    writer = ShardWriter(folder / "a", 100, marked=True)
    for ids, trained in documents:
        writer.add(np.array(ids), np.array(trained, bool))
    record = writer.finish()
    assert record is not None
    return Stream(folder, [{"prefix": "a", **record}], 100, set())


@pytest.mark.parametrize(
    ("too_long", "tokens", "labels"),
    [
        ("truncate", [[1, 2, 3], [7, 8, EOS]], [[X, 3, 4], [X, 9, X]]),
        ("truncate_left", [[3, 4, 5], [7, 8, EOS]], [[4, X, 6], [X, 9, X]]),
        ("drop", [[7, 8, EOS]], [[X, 9, X]]),
    ],
)
def test_documents_that_are_too_long(tmp_path, too_long: str, tokens: list[list[int]], labels: list[list[int]]) -> None:
    """Cut on either side, left out or refused; what is left of the third has nothing that is trained when its end is cut off, and is left out."""
    documents = [([1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 1]), ([7, 8, 9], [0, 0, 1]), ([11, 12, 13, 14, 15], [0, 0, 0, 0, 1])]
    stream = marked(tmp_path, documents if too_long == "truncate" else documents[:2])
    packs = Packs(stream, sequence=3, eos=EOS, too_long=too_long, name="s")
    assert [packs[number].tokens.tolist() for number in range(len(packs))] == tokens
    assert [packs[number].labels.tolist() for number in range(len(packs))] == labels
    assert packs.counts.dropped == (too_long == "drop")
    assert packs.counts.untrained == (too_long == "truncate")
    with pytest.raises(DataError, match=r"have more than train\.sequence \+ 1 = 4 tokens, the first 6 .*set `too_long`"):
        Packs(stream, sequence=3, eos=EOS, too_long="refuse", name="s")


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=30), st.integers(3, 12))
def test_every_label_comes_once(stream_of: Callable[..., Stream], documents: list[list[int]], sequence: int) -> None:
    """Taken apart by segments, the rows give back every document's first T + 1 tokens, once."""
    packs = Packs(stream_of(documents), sequence=sequence, eos=EOS, too_long="truncate", name="s")
    found = []
    for number in range(len(packs)):
        row = packs[number]
        for segment in np.unique(row.documents):
            mine = row.documents == segment
            assert row.positions[mine].tolist() == list(range(int(mine.sum())))
            if (row.labels[mine] != X).any():
                assert (row.labels[mine] != X).all()
                found.append([*row.tokens[mine].tolist(), int(row.labels[mine][-1])])
    assert sorted(found) == sorted(document[: sequence + 1] for document in documents if len(document) > 1)
