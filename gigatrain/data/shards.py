"""Token shards in Megatron's indexed format (.bin and .idx), read through memory maps, and the streams that shards form end to end.

Layout of `.idx`, little endian: `MMIDIDX\\0\\0`, version u64 = 1, type code u8, S = sequences u64, D = document marks u64 (documents + 1),
then S int32 lengths in tokens, S int64 byte offsets into `.bin`, D int64 sequence numbers, the first 0 and the last S. `.bin` is the tokens
alone. Source: NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py. Our writer makes a document one sequence; the reader takes any
number. `.mask`, which only we have, is one byte a token of `.bin`: 1 where the token is trained, 0 where it is context. Without it all are trained.
"""

import errno
import hashlib
import os
import struct
from bisect import bisect_right
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gigatrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}  # Megatron's codes; 6 and 7 are floats, never token ids
OPEN_SHARDS = 1024  # two maps each; Linux allows a process 65,530 (vm.max_map_count)
CHUNK = 1 << 22  # elements that a full pass looks at together: 32 MiB of int64


def dtype_for(vocab: int) -> type[np.uint16] | type[np.int32]:
    """The type that stores ids of `vocab`: uint16 below 65,500 and int32 from there, which is Megatron's own limit."""
    return np.uint16 if vocab < 65_500 else np.int32


def full_disk(error: OSError, path: Path) -> Exception:
    """The error to raise for a failed write: DataError when the disk or the quota is full, else `error` itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"no space left while writing {path}; free some, or set `data.folder` to another disk: finished parts are kept")
    return error


def write_atomically(path: Path, content: bytes) -> None:
    """Make `path` hold `content`, or leave it as it was: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise full_disk(error, path) from error


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardWriter:
    """Writes one shard under temporary names; nobody sees it before `finish`, and nothing stays of it after `abort`."""

    def __init__(self, prefix: Path, vocab: int, *, marked: bool = False) -> None:
        self.prefix, self.vocab, self.dtype = prefix, vocab, np.dtype(dtype_for(vocab))
        self.marks: list[bytes] | None = [] if marked else None
        self.sizes: list[int] = []
        self.hash = hashlib.sha256()  # of what was meant to be written, so that a disk's error is seen too
        self.temporary = prefix.with_name(f"{prefix.name}.bin.{os.getpid()}.tmp")
        self.file: Any = None

    def add(self, ids: np.ndarray, trained: np.ndarray | None = None) -> None:
        """Append one document, ids [n], and of a marked shard which of them are trained; DataError if one is not below the vocabulary's size."""
        assert (trained is None) == (self.marks is None), "all documents of a shard have marks, or none"
        if ids.size and (int(ids.max()) >= self.vocab or int(ids.min()) < 0):
            raise DataError(
                f"a document for {self.prefix} has token id {ids.max()} (lowest {ids.min()}), and the vocabulary is {self.vocab}"
            )
        if ids.size >= 1 << 31:
            raise DataError(
                f"a document for {self.prefix} has {ids.size:,} tokens, and the format allows 2,147,483,647; set `data.bad.long`"
            )
        data = ids.astype(self.dtype).tobytes()
        try:
            self.file = self.file or self.temporary.open("wb", buffering=1 << 20)
            self.file.write(data)
        except OSError as error:
            raise full_disk(error, self.prefix) from error
        self.hash.update(data)
        self.sizes.append(ids.size)
        if self.marks is not None:
            assert trained is not None
            assert trained.shape == ids.shape
            self.marks.append(trained.astype(np.uint8).tobytes())

    def finish(self) -> dict[str, Any] | None:
        """Publish the shard and return its record, or None if it has no document.

        The .idx comes last, so a shard without it does not exist.
        """
        if not self.sizes:
            return None
        sizes = np.array(self.sizes, np.int64)
        ends = np.cumsum(sizes)
        index = HEADER.pack(MAGIC, 1, next(code for code, dtype in DTYPES.items() if dtype == self.dtype), len(sizes), len(sizes) + 1)
        index += sizes.astype("<i4").tobytes() + ((ends - sizes) * self.dtype.itemsize).astype("<i8").tobytes()
        index += np.arange(len(sizes) + 1, dtype="<i8").tobytes()
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.temporary, self.prefix.with_name(self.prefix.name + ".bin"))
        except OSError as error:
            raise full_disk(error, self.prefix) from error
        marks = {}
        if self.marks is not None:
            content = b"".join(self.marks)
            write_atomically(self.prefix.with_name(self.prefix.name + ".mask"), content)
            marks = {"trained": content.count(1), "mask": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
        write_atomically(self.prefix.with_name(self.prefix.name + ".idx"), index)
        return {
            "documents": len(sizes),
            "tokens": int(ends[-1]),
            **marks,
            "bin": {"bytes": int(ends[-1]) * self.dtype.itemsize, "sha256": self.hash.hexdigest()},
            "idx": {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
        }

    def abort(self) -> None:
        """Remove what was written; harmless after `finish`."""
        if self.file is not None:
            with suppress(OSError):  # a full disk refuses the last buffer; the file goes anyway
                self.file.close()
            self.temporary.unlink(missing_ok=True)


class Shard:
    """One .bin and .idx, mapped. Header and lengths are checked on opening: O(1), so that a thousand shards open in milliseconds."""

    def __init__(self, prefix: Path) -> None:
        self.bin, self.idx = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
        for path in (self.bin, self.idx):
            if not path.is_file():
                raise DataError(f"{path} is missing; a shard is a .bin and its .idx, so copy it again, or build the corpus again")
        idx_bytes, bin_bytes = self.idx.stat().st_size, self.bin.stat().st_size
        with open(self.idx, "rb") as file:
            header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            raise DataError(f"{self.idx} is cut off at byte {idx_bytes}, within its header of {HEADER.size}; copy it again, or build again")
        magic, version, code, self.sequences, marks = HEADER.unpack(header)
        if magic != MAGIC or version != 1:
            raise DataError(f"{self.idx} starts with {magic!r}, version {version}; a Megatron index starts with {MAGIC!r}, version 1")
        if code not in DTYPES:
            raise DataError(f"{self.idx} has type code {code} at byte 17; token ids are one of {sorted(DTYPES)}")
        self.dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        self.documents = marks - 1
        need = HEADER.size + 12 * self.sequences + 8 * marks
        if marks < 1 or idx_bytes < need or idx_bytes > need + self.sequences:  # one more byte a sequence: the mode of multimodal corpora
            raise DataError(
                f"{self.idx} is {idx_bytes:,} bytes long, and {self.sequences:,} sequences in {self.documents:,} documents need {need:,}: "
                f"it is cut off at byte {idx_bytes:,} or its header is damaged; copy it again, or build the corpus again"
            )
        index = np.asarray(np.memmap(self.idx, np.uint8, "r"))  # a plain array: indexing a memmap object costs ten times as much
        self.sizes, self.pointers, self.marks = (
            index[start : start + count * np.dtype(kind).itemsize].view(kind)
            for start, count, kind in (
                (HEADER.size, self.sequences, "<i4"),
                (HEADER.size + 4 * self.sequences, self.sequences, "<i8"),
                (HEADER.size + 12 * self.sequences, marks, "<i8"),
            )
        )
        end = int(self.pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize if self.sequences else 0
        if end != bin_bytes:
            raise DataError(
                f"{self.bin} is {bin_bytes:,} bytes long, and its index needs {end:,}: "
                f"it {'is cut off at' if bin_bytes < end else 'goes on after'} byte {min(bin_bytes, end):,}; copy it again, or build again"
            )
        if int(self.marks[0]) != 0 or int(self.marks[-1]) != self.sequences:
            raise DataError(f"{self.idx} has documents from sequence {self.marks[0]} to {self.marks[-1]}, and there are {self.sequences}")
        self.tokens = np.asarray(np.memmap(self.bin, self.dtype, "r")) if bin_bytes else np.empty(0, self.dtype)
        self.marks: np.ndarray | None = None
        if (mask := prefix.with_name(prefix.name + ".mask")).is_file():
            check_size(mask, len(self.tokens))
            self.marks = np.asarray(np.memmap(mask, np.uint8, "r")) if bin_bytes else np.empty(0, np.uint8)
        # A document of one sequence each is what we and most others write; else the marks say which sequences open a document.
        self.plain = self.documents == self.sequences

    def starts(self, first: int, stop: int) -> np.ndarray:
        """Token offsets, int64, at which documents first .. stop - 1 start; document number `documents` is the shard's end."""
        rows = slice(first, stop) if self.plain else self.marks[first:stop].astype(np.int64)
        if isinstance(rows, np.ndarray):
            rows = rows[rows < self.sequences]
        inside = self.pointers[rows] // self.dtype.itemsize
        return np.concatenate([inside, np.full(stop - first - len(inside), len(self.tokens), np.int64)])

    def document_at(self, token: int) -> int:
        """How many documents start at or before a token offset, minus one; O(log sequences)."""
        # bisect, as numpy's searchsorted copies the whole array first: the format puts these 8-byte numbers at odd addresses.
        sequence = bisect_right(self.pointers, token * self.dtype.itemsize) - 1  # pyright: ignore[reportArgumentType]
        return sequence if self.plain else bisect_right(self.marks, sequence, hi=self.documents) - 1  # pyright: ignore[reportArgumentType]

    def boundaries(self, start: int, stop: int) -> np.ndarray:
        """Token offsets in [start, stop) at which a document starts, ascending, int64."""
        if stop <= start or not self.documents:
            return np.empty(0, np.int64)
        found = self.starts(self.document_at(start), self.document_at(stop - 1) + 1)
        # document_at finds the last that starts there: an empty document shares its successor's start, and a boundary counts once.
        found = found[int(found[0] < start) :]
        return found[np.diff(found, prepend=-1) > 0] if len(found) > 1 else found

    def check(self, vocab: int) -> dict[str, int | bool]:
        """Read everything once: offsets without gaps, marks that rise, every id below `vocab`; DataError names file and byte.

        Returns the first and last tokens that all documents share, or -1: `opens` and `closes`, which say where documents meet.
        """
        expected = 0
        for start in range(0, self.sequences, CHUNK):
            sizes = self.sizes[start : start + CHUNK].astype(np.int64)
            pointers = expected + (np.cumsum(sizes) - sizes) * self.dtype.itemsize
            wrong = np.flatnonzero((self.pointers[start : start + CHUNK] != pointers) | (sizes < 0))
            if wrong.size:
                row = start + int(wrong[0])
                raise DataError(
                    f"{self.idx}: at byte {HEADER.size + 4 * self.sequences + 8 * row:,}, sequence {row:,} starts at byte "
                    f"{self.pointers[row]:,}, and the lengths before it say {pointers[wrong[0]]:,}; build the index again"
                )
            expected += int(sizes.sum()) * self.dtype.itemsize
        for start in range(0, len(self.marks) - 1, CHUNK):
            if (np.diff(self.marks[start : start + CHUNK + 1]) < (1 if self.plain else 0)).any():
                raise DataError(
                    f"{self.idx}: its document marks do not rise after number {start:,}; the index is damaged, so build it again"
                )
        for start in range(0, len(self.tokens), CHUNK):
            refuse_ids(self.tokens[start : start + CHUNK], vocab, self.bin, start)
        shared: dict[str, int | bool] = {"opens": -1, "closes": -1}
        for name, offset in (("opens", 0), ("closes", -1)):
            seen: set[int] = set()
            for start in range(0, self.documents, CHUNK):
                bounds = self.starts(start, min(start + CHUNK, self.documents) + 1)
                firsts, stops = bounds[:-1], bounds[1:]
                full = stops > firsts
                seen.update(np.unique(self.tokens[(firsts if offset == 0 else stops - 1)[full]]).tolist()[:2])
                if len(seen) > 1:
                    break
            if len(seen) == 1:
                shared[name] = seen.pop()
        return shared


def refuse_ids(tokens: np.ndarray, vocab: int, path: Path, start: int) -> None:
    """DataError, naming file and byte, if an id is outside [0, vocab); `start` is the token offset of tokens[0] in the file."""
    if tokens.size and (int(tokens.max()) >= vocab or int(tokens.min()) < 0):
        row = int(np.flatnonzero((tokens >= vocab) | (tokens < 0))[0])
        raise DataError(
            f"{path}: token id {tokens[row]} at byte {(start + row) * tokens.dtype.itemsize:,} (token {start + row:,}), "
            f"and the vocabulary is {vocab}; the file is damaged or was made with another tokenizer"
        )


class Stream:
    """The documents of one source and split end to end, over all its shards; every method takes and gives global token offsets.

    A record of the manifest is {"prefix", "documents", "tokens", "bin", "idx"} and, for a share of somebody else's shard, "first": its
    first document. verified: prefixes of shards whose SHA-256 was compared, which the streams of a corpus share; a shard that is not among
    them is compared when it is opened. None: no shard is compared.
    """

    def __init__(self, folder: Path, records: list[dict[str, Any]], vocab: int, verified: set[str] | None = None) -> None:
        self.folder, self.records, self.vocab, self.verified = folder, records, vocab, verified
        self.token_starts = [0]
        self.document_starts = [0]
        for record in records:
            self.token_starts.append(self.token_starts[-1] + record["tokens"])
            self.document_starts.append(self.document_starts[-1] + record["documents"])
        self.tokens, self.documents = self.token_starts[-1], self.document_starts[-1]
        self.opened: dict[int, tuple[Shard, int]] = {}

    def path(self, number: int) -> Path:
        """Prefix of a shard: below the corpus folder, or where a Megatron source keeps it."""
        return self.folder / self.records[number]["prefix"]

    def shard(self, number: int) -> tuple[Shard, int]:
        """A shard and the token offset in it at which this stream's share starts; opened on first use, 1,024 stay open."""
        if (found := self.opened.get(number)) is not None:
            return found
        record = self.records[number]
        if self.verified is not None and record["prefix"] not in self.verified:
            verify(self.path(number), record)
            self.verified.add(record["prefix"])
        shard = Shard(self.path(number))
        first = record.get("first", 0)
        base = int(shard.starts(first, first + 1)[0])
        if base + record["tokens"] > len(shard.tokens) or shard.documents < first + record["documents"]:
            raise DataError(
                f"{shard.bin} holds {len(shard.tokens):,} tokens, and the manifest needs {base + record['tokens']:,}; "
                "it was replaced, so build again"
            )
        self.opened[number] = shard, base
        if len(self.opened) > OPEN_SHARDS:
            self.opened.pop(next(iter(self.opened)), None)  # the one opened first; a reader that has it keeps its map
        return shard, base

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard number, first, stop), offsets within the stream's share of that shard, that cover [start, stop)."""
        pieces = []
        number = bisect_right(self.token_starts, start) - 1
        while start < stop:
            upto = min(stop, self.token_starts[number + 1])
            if upto > start:
                pieces.append((number, start - self.token_starts[number], upto - self.token_starts[number]))
            start, number = upto, number + 1
        return pieces

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [stop - start] int64; DataError names file and byte of an id that is outside the vocabulary."""
        rows = []
        for number, first, last in self._pieces(start, stop):
            shard, base = self.shard(number)
            tokens = shard.tokens[base + first : base + last]
            refuse_ids(tokens, self.vocab, shard.bin, base + first)
            rows.append(tokens)
        return (np.concatenate(rows) if len(rows) != 1 else rows[0]).astype(np.int64) if rows else np.empty(0, np.int64)

    def trained(self, start: int, stop: int) -> np.ndarray | None:
        """Which tokens of [start, stop) are trained, bool; None: all."""
        rows, some = [], False
        for number, first, last in self._pieces(start, stop):
            shard, base = self.shard(number)
            marks = shard.marks if "mask" in self.records[number] else None  # one that came beside a shard later is not the corpus's
            some |= marks is not None
            rows.append(np.ones(last - first, bool) if marks is None else marks[base + first : base + last] != 0)
        return (np.concatenate(rows) if len(rows) != 1 else rows[0]) if some else None

    def lengths(self) -> np.ndarray:
        """Tokens of every document, int64, in order; reads the index of every shard."""
        rows = [np.empty(0, np.int64)]
        for number, record in enumerate(self.records):
            shard, _ = self.shard(number)
            first = record.get("first", 0)
            rows.append(np.diff(shard.starts(first, first + record["documents"] + 1)))
        return np.concatenate(rows)

    def boundaries(self, start: int, stop: int) -> np.ndarray:
        """Offsets in [start, stop) at which a document starts, ascending int64; O(log documents) and the documents found."""
        rows = []
        for number, first, last in self._pieces(start, stop):
            shard, base = self.shard(number)
            rows.append(shard.boundaries(base + first, base + last) - base + self.token_starts[number])
        return np.concatenate(rows) if rows else np.empty(0, np.int64)

    def document(self, number: int) -> tuple[int, int]:
        """Start and stop of one document."""
        row = bisect_right(self.document_starts, number) - 1
        shard, base = self.shard(row)
        first = self.records[row].get("first", 0) + number - self.document_starts[row]
        start, stop = shard.starts(first, first + 2).tolist()
        return start - base + self.token_starts[row], stop - base + self.token_starts[row]

    def locate(self, token: int) -> str:
        """File, byte offset and document of a token, to name it in an error."""
        number = min(bisect_right(self.token_starts, token), len(self.records)) - 1
        shard, base = self.shard(number)
        offset = base + token - self.token_starts[number]
        return f"{shard.bin} at byte {offset * shard.dtype.itemsize:,} (token {offset:,}, document {shard.document_at(offset):,})"


def files(record: dict[str, Any]) -> list[str]:
    """Suffixes of a shard's files."""
    return [suffix for suffix in ("bin", "idx", "mask") if suffix in record]


def verify(prefix: Path, record: dict[str, Any]) -> None:
    """Compare a shard's sizes and SHA-256 with its record; DataError names the file."""
    for suffix in files(record):
        path = prefix.with_name(f"{prefix.name}.{suffix}")
        check_size(path, record[suffix]["bytes"])
        found = file_sha256(path)
        if found != record[suffix]["sha256"]:
            raise DataError(
                f"{path} has SHA-256 {found[:16]}…, and the manifest says {record[suffix]['sha256'][:16]}…: "
                "its bytes changed since it was built; copy it again, or delete the corpus folder and build again"
            )


def check_size(path: Path, expected: int) -> None:
    """DataError if a file is missing or of another length than the manifest says."""
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        raise DataError(f"{path} is missing; copy it again, or delete the corpus folder and build again")
    if found != expected:
        raise DataError(
            f"{path} is {found:,} bytes long, and the manifest says {expected:,}: cut off or replaced at byte {min(found, expected):,}; "
            "copy it again, or delete the corpus folder and build again"
        )
