"""The shard format byte by byte, and every way in which a shard can be damaged."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gigatrain.data.shards import Shard, ShardWriter, Stream, dtype_for, verify
from gigatrain.errors import DataError

DOCUMENTS = [[1, 2, 3, 0], [0], [7, 8, 9, 10, 11, 0]]
# What Megatron-LM's IndexedDatasetBuilder writes for these three documents in uint16, laid out by hand after its source.
INDEX = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<QBQQ", 1, 8, 3, 4)
    + struct.pack("<3i", 4, 1, 6)
    + struct.pack("<3q", 0, 8, 10)
    + struct.pack("<4q", 0, 1, 2, 3)
)
TOKENS = struct.pack("<11H", 1, 2, 3, 0, 0, 7, 8, 9, 10, 11, 0)


def write(prefix: Path, documents: list[list[int]], vocab: int = 100) -> dict:
    writer = ShardWriter(prefix, vocab)
    for ids in documents:
        writer.add(np.array(ids, np.int64))
    record = writer.finish()
    assert record is not None
    return record


def test_writer_is_megatron_byte_for_byte(tmp_path: Path) -> None:
    record = write(tmp_path / "a", DOCUMENTS)
    assert (tmp_path / "a.idx").read_bytes() == INDEX
    assert (tmp_path / "a.bin").read_bytes() == TOKENS
    assert record["documents"] == 3
    assert record["tokens"] == 11
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.bin", "a.idx"]


def test_reader_of_a_hand_built_shard(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(INDEX)
    (tmp_path / "a.bin").write_bytes(TOKENS)
    shard = Shard(tmp_path / "a")
    assert shard.tokens.tolist() == [1, 2, 3, 0, 0, 7, 8, 9, 10, 11, 0]
    assert shard.starts(0, 4).tolist() == [0, 4, 5, 11]
    assert shard.check(12) == {"opens": -1, "closes": 0}


def test_documents_of_several_sequences_and_modes(tmp_path: Path) -> None:
    """Megatron also stores sentences as sequences, and one byte a sequence for multimodal data."""
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3) + struct.pack("<3i", 2, 1, 2) + struct.pack("<3q", 0, 8, 12)
    (tmp_path / "a.idx").write_bytes(index + struct.pack("<3q", 0, 2, 3) + b"\0\0\0")
    (tmp_path / "a.bin").write_bytes(struct.pack("<5i", 5, 6, 7, 5, 70_000))
    shard = Shard(tmp_path / "a")
    assert shard.documents == 2
    assert shard.starts(0, 3).tolist() == [0, 3, 5]
    assert [shard.document_at(token) for token in range(5)] == [0, 0, 0, 1, 1]
    assert shard.boundaries(1, 5).tolist() == [3]
    assert shard.check(70_001)["opens"] == 5


def test_type_follows_megatron() -> None:
    assert [dtype_for(vocab) for vocab in (65_499, 65_500, 128_256)] == [np.uint16, np.int32, np.int32]


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("keep", [0, 7, 20, 21])
def test_truncated_file_is_refused_by_name_and_offset(tmp_path: Path, suffix: str, keep: int) -> None:
    write(tmp_path / "a", DOCUMENTS)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"a\.{suffix}.*byte {keep}\b"):
        Shard(tmp_path / "a")


def test_longer_bin_missing_idx_and_foreign_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    with open(tmp_path / "a.bin", "ab") as file:
        file.write(b"xx")
    with pytest.raises(DataError, match="goes on after byte 22"):
        Shard(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes(b"PK\x03\x04" + INDEX[4:])
    with pytest.raises(DataError, match="Megatron index starts with"):
        Shard(tmp_path / "a")
    (tmp_path / "a.idx").unlink()
    with pytest.raises(DataError, match=r"a\.idx is missing"):
        Shard(tmp_path / "a")


def test_index_with_a_gap_is_refused(tmp_path: Path) -> None:
    record = write(tmp_path / "a", DOCUMENTS)
    damaged = bytearray(INDEX)
    damaged[34 + 12 + 8] = 6  # the second pointer: 8 -> 6
    (tmp_path / "a.idx").write_bytes(damaged)
    with pytest.raises(DataError, match="sequence 1 starts at byte 6, and the lengths before it say 8"):
        Shard(tmp_path / "a").check(100)
    with pytest.raises(DataError, match=r"a\.idx has SHA-256"):
        verify(tmp_path / "a", record)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    record = write(tmp_path / "a", DOCUMENTS)
    for suffix, content in (("bin", TOKENS), ("idx", INDEX)):
        path = tmp_path / f"a.{suffix}"
        for bit in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(DataError, match=rf"a\.{suffix} has SHA-256"):
                verify(tmp_path / "a", record)
        path.write_bytes(content)
    verify(tmp_path / "a", record)


def test_id_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="token id 100 .* the vocabulary is 100"):
        write(tmp_path / "w", [[1, 100]])
    record = write(tmp_path / "a", DOCUMENTS)
    stream = Stream(tmp_path, [{"prefix": "a", **record}], vocab=11)
    assert stream.read(0, 9).tolist() == [1, 2, 3, 0, 0, 7, 8, 9, 10]
    with pytest.raises(DataError, match=r"a\.bin: token id 11 at byte 18 \(token 9\).* vocabulary is 11"):
        stream.read(5, 11)
    with pytest.raises(DataError, match="token id 11 at byte 18"):
        Shard(tmp_path / "a").check(11)


def test_aborted_writer_leaves_nothing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a", 10)
    writer.add(np.array([1]))
    writer.abort()
    assert list(tmp_path.iterdir()) == []
    assert ShardWriter(tmp_path / "b", 10).finish() is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=12), each=st.integers(1, 4), data=st.data())
def test_stream_equals_the_concatenation(stream_of: Callable[..., Stream], lengths: list[int], each: int, data: st.DataObject) -> None:
    """Any range of any documents over any shards, empty documents included."""
    documents = [[100 * i + j for j in range(length)] for i, length in enumerate(lengths)]
    flat = [token for ids in documents for token in ids]
    stream = stream_of(documents, vocab=2000, each=each)
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    assert stream.read(start, stop).tolist() == flat[start:stop]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    full = {first for first, length in zip(starts, lengths, strict=True) if length}
    assert [b for b in stream.boundaries(start, stop).tolist() if b in full] == sorted(b for b in full if start <= b < stop)
    for number, ids in enumerate(documents):
        first, last = stream.document(number)
        assert stream.read(first, last).tolist() == ids


def test_stream_names_where_a_token_lies(stream_of: Callable[..., Stream]) -> None:
    stream = stream_of([[1, 2], [3], [4, 5, 6], [7, 8]], each=2)
    assert stream.locate(4).endswith("s2.bin at byte 2 (token 1, document 0)")
    assert stream.locate(7).endswith("s2.bin at byte 8 (token 4, document 1)")
