"""Batches: the same whatever reads ahead, resumes or shares the work; and what the loop is told about them."""

import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TRAINED, data_of, text, write_files

from gigatrain.config import Source
from gigatrain.data import shards
from gigatrain.data.build import build
from gigatrain.data.corpus import Corpus
from gigatrain.data.course import without
from gigatrain.data.loader import Batch, Batches, Microbatch, Validation
from gigatrain.data.pack import IGNORED
from gigatrain.errors import DataError

SETTINGS: dict[str, Any] = {"sequence": 16, "packing": "stream", "batch": 4, "seed": 5}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two sources, 1 : 3."""
    folder = tmp_path_factory.mktemp("two")
    write_files(folder / "a", 20)
    (folder / "b.txt").write_text(text(99, 600))
    data = data_of(
        folder, Source(kind="text", path=str(folder / "a")), Source(kind="text", path=str(folder / "b.txt"), weight=3.0), validation=0.0
    )
    return build(data, TRAINED)


def flat(batch: Batch) -> list[torch.Tensor]:
    """tokens, labels, positions, documents of all rows."""
    found = []
    for name in ("tokens", "labels", "positions"):
        found.append(torch.cat([getattr(part, name) for part in batch.microbatches]))
    zero = [torch.zeros_like(part.tokens, dtype=torch.int32) if part.documents is None else part.documents for part in batch.microbatches]
    return [*found, torch.cat(zero)]


def equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.targets == b.targets
        and a.positions == b.positions
        and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))
        for a, b in zip(first, second, strict=True)
    )


def take(corpus: Corpus, count: int, **settings: Any) -> list[Batch]:
    batches = Batches(corpus, **{**SETTINGS, **settings})
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def test_shapes_types_and_counts(corpus: Corpus) -> None:
    (batch,) = take(corpus, 1, microbatch=3)
    assert [part.tokens.shape[0] for part in batch.microbatches] == [3, 1]
    assert (batch.targets, batch.tokens, batch.positions) == (64, 64, range(4))
    for part in batch.microbatches:
        assert part.tokens.dtype == part.labels.dtype == part.positions.dtype == torch.int64
        assert part.documents is None or part.documents.dtype == torch.int32


def test_one_epoch_has_every_token_as_a_label_once(corpus: Corpus) -> None:
    stream = corpus.stream(0)
    batches = Batches(corpus, **{**SETTINGS, "batch": 1})
    samples = stream.tokens // 16
    assert batches.dropped == stream.tokens - 16 * samples
    rows = sorted(tuple(next(batches).microbatches[0].labels[0].tolist()) for _ in range(samples))
    batches.close()
    expected = stream.read(0, 16 * samples).reshape(-1, 16)
    assert rows == sorted(tuple(row) for row in expected.tolist())
    assert batches.epochs == pytest.approx(1.0)


def test_labels_are_the_next_inputs_and_segments_start_at_zero(corpus: Corpus) -> None:
    for batch in take(corpus, 30):
        tokens, labels, positions, documents = (part.numpy() for part in flat(batch))
        assert (labels[:, :-1] == tokens[:, 1:]).all()
        starts = np.diff(documents, axis=1) == 1
        assert (np.diff(documents, axis=1) >= 0).all()
        assert (positions[:, 0] == 0).all()
        assert (positions[:, 1:] == np.where(starts, 0, positions[:, :-1] + 1)).all()
        assert (tokens[:, 1:][starts] == corpus.eos).all()
        assert ((tokens[:, 1:] == corpus.eos) == starts).all()


def test_documents_is_none_only_where_every_row_is_one_segment(corpus: Corpus) -> None:
    seen = set()
    for batch in take(corpus, 60, microbatch=1):
        for part in batch.microbatches:
            single = not (part.tokens[:, 1:] == corpus.eos).any()
            assert (part.documents is None) == single
            if single:
                assert torch.equal(part.positions[0], torch.arange(16))
            seen.add(single)
    assert seen == {True, False}


@pytest.mark.parametrize("packing", ["stream", "document"])
def test_prefetch_microbatches_and_ranks_do_not_change_batches(two: Corpus, packing: str) -> None:
    plain = take(two, 12, packing=packing, prefetch=0)
    for settings in ({"prefetch": 1}, {"prefetch": 5}, {"microbatch": 1}, {"microbatch": 3}):
        assert equal(take(two, 12, packing=packing, **settings), plain)
    for ranks in (2, 4):
        shares = [take(two, 12, packing=packing, rank=rank, ranks=ranks, microbatch=1) for rank in range(ranks)]
        for step, whole in enumerate(plain):
            mine = [share[step] for share in shares]
            assert sum(batch.targets for batch in mine) == whole.targets
            assert all(batch.tokens == whole.tokens and batch.positions == whole.positions for batch in mine)
            for together, one in zip(zip(*map(flat, mine), strict=True), flat(whole), strict=True):
                assert torch.equal(torch.cat(together), one)


def test_resume_from_every_position(two: Corpus) -> None:
    """Over the end of an epoch of the smaller source, with and without reading ahead."""
    steps = 40
    whole = take(two, steps)
    assert Batches(two, **SETTINGS, position=4 * steps).epochs > 1.5
    batches = Batches(two, **SETTINGS)
    states = []
    for _ in range(steps):
        states.append(batches.state())
        next(batches)
    batches.close()
    for step, state in enumerate(states):
        assert state["position"] == 4 * step
        resumed = Batches(two, **SETTINGS, prefetch=step % 3)
        resumed.load(state)
        assert equal([next(resumed) for _ in range(min(3, steps - step))], whole[step : step + 3])
        resumed.close()


def test_three_resumes_in_a_row_and_into_a_running_iterator(two: Corpus) -> None:
    whole = take(two, 12)
    state = Batches(two, **SETTINGS).state()
    seen: list[Batch] = []
    for count in (1, 5, 2, 4):
        batches = Batches(two, **SETTINGS, prefetch=3)
        batches.load(state)
        seen += [next(batches) for _ in range(count)]
        state = batches.state()
        batches.close()
    assert equal(seen, whole)
    batches = Batches(two, **SETTINGS)
    first = batches.state()
    for _ in range(3):
        next(batches)
    batches.load(first)  # back to the start while the thread has read ahead
    assert equal([next(batches) for _ in range(12)], whole)
    batches.close()
    assert equal([next(batches)], take(two, 1, position=48))  # and on after close
    batches.close()


def test_resume_with_another_batch_and_ranks_goes_on_at_the_sample(two: Corpus) -> None:
    rows = torch.cat([flat(batch)[0] for batch in take(two, 9)])
    batches = Batches(two, **SETTINGS)
    for _ in range(3):
        next(batches)
    state = batches.state()
    batches.close()
    wider = Batches(two, **{**SETTINGS, "batch": 6})
    wider.load(state)
    assert torch.equal(torch.cat([flat(next(wider))[0] for _ in range(4)]), rows[12:36])
    wider.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, r"for seed 6, and this run has 5"),
        ({"corpus": "0" * 64}, r"for corpus '0000"),
        ({"weights": [1.0, 1.0]}, r"for weights \[1\.0, 1\.0\], and this run has \[1\.0, 3\.0\]"),
        ({"sequence": 32}, r"for sequence 32, and this run has 16"),
        ({"packing": "document"}, r"for packing 'document', and this run has 'stream'"),
    ],
)
def test_a_state_of_another_run_is_refused(two: Corpus, change: dict, message: str) -> None:
    batches = Batches(two, **SETTINGS)
    with pytest.raises(DataError, match=message):
        batches.load(batches.state() | change)


def test_weights_are_the_shares(two: Corpus) -> None:
    batches = Batches(two, **{**SETTINGS, "prefetch": 0})
    names = [line.split("source ")[1][0] for line in batches.describe(range(64))]
    assert (names.count("0"), names.count("1")) == (16, 48)


def test_describe_names_file_and_byte(corpus: Corpus) -> None:
    batches = Batches(corpus, **SETTINGS)
    batch = next(batches)
    batches.close()
    for line, labels in zip(batches.describe(batch.positions), batch.microbatches[0].labels, strict=True):
        path, rest = line.split(": ")[-1].split(" at byte ")
        offset = int(rest.split(" ")[0].replace(",", ""))
        found = np.fromfile(path, np.uint16, offset=offset, count=16)
        assert labels[: len(found)].tolist() == found.tolist()


def test_errors_of_the_thread_come_back_as_they_are(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(corpus, **SETTINGS, prefetch=2)
    next(batches)
    make = batches.make

    def broken(position: int) -> Batch:
        if position >= 24:
            raise DataError(f"shard broke at {position}")
        return make(position)

    batches.load(batches.state())
    monkeypatch.setattr(batches, "make", broken)
    for _ in range(5):
        next(batches)
    for _ in range(2):  # also when asked again
        with pytest.raises(DataError, match="shard broke at 24"):
            next(batches)
    assert batches.position == 24
    batches.close()


def test_threads_end(corpus: Corpus) -> None:
    before = threading.active_count()
    for _ in range(5):
        take(corpus, 2, prefetch=1)
    assert threading.active_count() == before


def test_too_small_and_indivisible(corpus: Corpus) -> None:
    tokens = corpus.totals("train")["tokens"]
    with pytest.raises(DataError, match=rf"has {tokens:,} training tokens, fewer than one sample of {tokens + 1:,}"):
        Batches(corpus, **{**SETTINGS, "sequence": tokens + 1})
    Batches(corpus, **{**SETTINGS, "sequence": tokens})
    with pytest.raises(DataError, match="batch of 4 samples does not divide by 3 ranks"):
        Batches(corpus, **SETTINGS, ranks=3)


def labels_of(microbatches: Any) -> list[int]:
    found: list[int] = []
    for part in microbatches:
        assert isinstance(part, Microbatch)
        found += part.labels[part.labels != IGNORED].tolist()
    return found


def test_validation_reads_every_held_out_token_once(corpus: Corpus) -> None:
    stream = corpus.stream(0, "validation")
    held = Validation(corpus, sequence=16, packing="stream", microbatch=3)
    assert labels_of(held) == stream.read(0, stream.tokens).tolist()
    assert labels_of(held) == labels_of(held)
    assert len(list(held)) == len(held)
    assert held.text_bytes == corpus.totals("validation")["text_bytes"]


def test_validation_over_ranks_runs_equally_long(corpus: Corpus) -> None:
    whole = labels_of(Validation(corpus, sequence=16, packing="stream", microbatch=2))
    shares = [Validation(corpus, sequence=16, packing="stream", microbatch=2, rank=rank, ranks=4) for rank in range(4)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(label for share in shares for label in labels_of(share)) == sorted(whole)


def test_validation_of_a_subset_or_of_cut_documents_knows_no_bytes(corpus: Corpus) -> None:
    some = Validation(corpus, sequence=16, packing="stream", microbatch=2, max_samples=3)
    assert some.text_bytes is None
    assert some.count == 3
    assert sum(part.tokens.shape[0] for part in some) == 3
    assert Validation(corpus, sequence=16, packing="document", microbatch=2).text_bytes is None
    long = Validation(corpus, sequence=4096, packing="document", microbatch=2)
    assert long.text_bytes == corpus.totals("validation")["text_bytes"]
    stream = corpus.stream(0, "validation")
    assert labels_of(long) == stream.read(0, stream.tokens).tolist()


def test_no_held_out_documents(two: Corpus) -> None:
    held = Validation(two, sequence=16, packing="stream", microbatch=2)
    assert (len(held), list(held), held.count, held.text_bytes) == (0, [], 0, None)
    assert len(Validation(two, sequence=16, packing="document", microbatch=2, max_samples=3, rank=1, ranks=2)) == 0


def test_flipped_bit_reaches_no_batch(tmp_path: Path) -> None:
    data = data_of(tmp_path, Source(kind="text", path=str(write_files(tmp_path / "texts"))), validation=0.0)
    corpus = build(data, TRAINED)
    path = next((corpus.folder / "shards").glob("*.bin"))
    content = bytearray(path.read_bytes())
    content[1] |= 0x80  # the first token: its id becomes 32,768 more
    path.write_bytes(content)
    for opened in (corpus, build(data, TRAINED), Corpus.open(corpus.folder)):
        with pytest.raises(DataError, match=rf"{path.name} has SHA-256"):
            take(opened, 1)
    with pytest.raises(DataError, match=rf"{path.name}: token id \d+ at byte 0 \(token 0\), and the vocabulary is 300"):
        take(build(data, TRAINED, check=False), corpus.totals("train")["tokens"] // 64 + 1)


def test_held_out_shards_are_verified_and_each_shard_once(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    verify = shards.verify

    def counted(prefix: Path, record: dict[str, Any]) -> None:
        seen.append(prefix.name)
        verify(prefix, record)

    monkeypatch.setattr(shards, "verify", counted)
    opened = Corpus.open(corpus.folder)
    assert not seen  # lazily
    for _ in range(2):
        take(opened, 40)
        list(Validation(opened, sequence=16, packing="stream", microbatch=2))
    assert sorted(seen) == sorted(prefix.name for prefix, _ in corpus.shards())
    shutil.copytree(corpus.folder, tmp_path / "copy")
    path = next((tmp_path / "copy" / "shards").glob("*.validation.bin"))
    content = bytearray(path.read_bytes())
    content[0] ^= 1  # another id of the vocabulary
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name} has SHA-256"):
        list(Validation(Corpus.open(tmp_path / "copy"), sequence=16, packing="stream", microbatch=2))


def test_ranges_that_are_passed_over_are_left_out_once_and_nothing_else():
    """Any ranges, also such that overlap or begin at 0: the positions of all batches are the stream without them, in order."""
    drawn = random.Random(3)
    for _ in range(200):
        passed = [(start, start + drawn.randrange(1, 9)) for start in (drawn.randrange(30) for _ in range(drawn.randrange(5)))]
        size = drawn.randrange(1, 7)
        left_out = {position for start, stop in passed for position in range(start, stop)}
        found = [position for step in range(20) for position in without(passed, step * size, size)]
        assert found == [position for position in range(500) if position not in left_out][: 20 * size]
