"""Where documents come from: files, records of files, Hugging Face datasets.

A source is listed once (`pieces`), in a fixed order, and the pieces are grouped into parts of about `data.shard_bytes`. A part is read by
one process, so parts are what is done in parallel and what a resumed build need not do again. Nothing here executes or unpickles anything of a file's.
"""

import codecs
import glob
import gzip
import hashlib
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

from gigatrain.config import Source
from gigatrain.data import messages, stdlib
from gigatrain.errors import DataError

# Of the standard library: tests and vendored or installed packages, then text that a program wrote: help topics and tables of character
# sets. What is left is some 11 MB of Python that people wrote. _sysconfigdata also depends on the machine.
STDLIB_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "ensurepip",
    "pydoc_data",
    "msilib",
}
STDLIB_FILES = ("_sysconfigdata_*.py", "stringprep.py", "re/_casefix.py", "html/entities.py", "config-*/*", "encodings/cp*.py",
"encodings/iso8859_*.py",
                "encodings/mac_*.py", "encodings/koi8_*.py", "encodings/kz1048.py", "encodings/ptcp154.py", "encodings/palmos.py",
                "encodings/tis_620.py", "encodings/hp_roman8.py")  # fmt: skip
SUFFIXES = {"jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"), "parquet": (".parquet",)}
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class Piece:
    """A range of one input: bytes of a file, row groups of a parquet file, rows of a dataset."""

    name: str  # relative, so that the same files elsewhere are the same corpus
    path: str
    start: int
    stop: int
    bytes: int  # of input, for balance and progress
    stamp: str  # what tells that the input changed


@dataclass(frozen=True)
class Part:
    """Pieces that are read together and become one shard a split."""

    source: int
    number: int
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """Stem of its files."""
        return f"{self.source}-{self.number:06d}"

    @property
    def bytes(self) -> int:
        """Input bytes."""
        return sum(piece.bytes for piece in self.pieces)


@dataclass(frozen=True)
class Raw:
    """A document as it was read: `data` is its text, its bytes, or None if `bad` says why there is none. `key` decides what is held out."""

    where: str
    data: str | bytes | None
    key: str | None = None  # None: the text itself
    bad: str = ""
    keys: tuple[str, ...] = ()  # of a record that lacks a column: those that it has


def parts(number: int, source: Source, shard_bytes: int) -> list[Part]:
    """List a source and group its pieces, in order, into parts of at least `shard_bytes`; DataError if there is nothing."""
    groups: list[list[Piece]] = []
    size = shard_bytes
    for piece in pieces(source, shard_bytes):
        if size >= shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.bytes
    return [Part(number, index, tuple(group)) for index, group in enumerate(groups)]


def pieces(source: Source, shard_bytes: int) -> list[Piece]:
    """Everything a source consists of, in its fixed order."""
    if source.kind == "stdlib":
        made = source.format != "text"
        return [replace(piece, stamp=f"{piece.stamp}:{stdlib.RULE}") for piece in _stdlib()] if made else _stdlib()
    assert source.path is not None  # config.Source.has_path
    if source.kind == "hub":
        return _rows(source, shard_bytes)
    if source.kind == "megatron":
        return _megatron(source.path)
    found: list[Piece] = []
    for path, name in _files(source):
        stat = path.stat()
        stamp = f"{stat.st_size}:{stat.st_mtime_ns}"
        if source.kind == "parquet":
            found += _row_groups(source, path, name, stamp, shard_bytes)
        elif source.kind == "jsonl" and not name.endswith(COMPRESSED):
            # Lines that start within the range belong to it. The cuts depend on the size alone.
            cuts = [*range(0, stat.st_size, shard_bytes), stat.st_size] if stat.st_size else [0, 0]
            found += [Piece(name, str(path), start, stop, stop - start, stamp) for start, stop in pairwise(cuts)]
        else:
            # Text shrinks some four times when compressed; a compressed file cannot be read from its middle, so it stays whole.
            size = stat.st_size * (4 if source.kind == "jsonl" else 1)
            found.append(Piece(name, str(path), 0, stat.st_size, size, stamp))
    return found


def read(source: Source, part: Part) -> Iterator[Raw]:
    """The documents of a part, in order; DataError if a file cannot be opened or lacks the field altogether."""
    for piece in part.pieces:
        try:
            if source.kind == "stdlib" and source.format != "text":
                for name, line, record in stdlib.records(piece.name, Path(piece.path).read_bytes(), source.format):
                    yield Raw(f"{piece.name}:line {line}", messages.text_of(source, record), name)
            elif source.kind in ("stdlib", "text"):
                yield Raw(f"{piece.name}:0", Path(piece.path).read_bytes(), piece.name)
            elif source.kind == "jsonl":
                yield from _lines(source, piece)
            elif source.kind == "parquet":
                yield from _parquet(source, piece)
            else:
                yield from _hub(source, piece)
        except OSError as error:
            raise DataError(f"cannot read {piece.path}: {error.strerror or error}; mend it, or take it out of the source") from error


def _stdlib() -> list[Piece]:
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    found = []
    for name in names:
        if STDLIB_FOLDERS.isdisjoint(name.split("/")) and not any(fnmatch(name, pattern) for pattern in STDLIB_FILES):
            content = (root / name).read_bytes()
            found.append(Piece(name, str(root / name), 0, len(content), len(content), hashlib.sha256(content).hexdigest()))
    if not found:
        raise DataError(
            f"the standard library at {root} has no .py files (a frozen or zipped Python?); use another source, such as kind = 'text'"
        )
    return found


def _files(source: Source) -> list[tuple[Path, str]]:
    """(path, relative name) of a file, a folder or a glob, sorted by name; hidden files and folders are left out."""
    assert source.path is not None
    path = Path(source.path).expanduser()
    suffixes = SUFFIXES.get(source.kind, ("",))
    if path.is_file():
        return [(path, path.name)]
    if path.is_dir():
        base, wanted = path, source.pattern if source.kind == "text" else "**/*"
        try:
            candidates = list(base.glob(wanted))
        except (ValueError, NotImplementedError) as error:  # pathlib's: empty, absolute, or `**` within a name
            raise DataError(
                f"data.sources: `pattern` is {wanted!r}, which is no pattern of files below `path` ({error}); "
                "write one relative to `path`, such as '**/*.txt', or put the whole pattern into `path`"
            ) from error
        what = f"files that match {wanted!r}" if source.kind == "text" else f"files named *{', *'.join(suffixes)}"
    elif glob.has_magic(str(path)):
        fixed = next(i for i, piece in enumerate(path.parts) if glob.has_magic(piece))
        base, suffixes = Path(*path.parts[:fixed]), ("",)
        candidates = [Path(found) for found in glob.glob(str(path), recursive=True)]
        what = "files that match the pattern"
    else:
        raise DataError(
            f"data.sources: {source.kind} path {source.path!r} does not exist (looked at {path.absolute()}); "
            "correct `path`, or put the files there"
        )
    named = [(found, found.relative_to(base).as_posix()) for found in candidates]
    named = [
        (found, name) for found, name in named if name.endswith(suffixes) and not any(piece.startswith(".") for piece in name.split("/"))
    ]
    named = sorted(((found, name) for found, name in named if found.is_file()), key=lambda pair: pair[1])
    if not named:
        raise DataError(
            f"data.sources: {source.kind} path {source.path!r} has no {what}; "
            f"correct `path`{' or `pattern`' if source.kind == 'text' else ''}"
        )
    return named


def _megatron(prefix: str) -> list[Piece]:
    path = Path(prefix).expanduser().absolute()
    path = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    stamps, size = [], 0
    for suffix in (".bin", ".idx"):
        file = path.with_name(path.name + suffix)
        if not file.is_file():
            raise DataError(
                f"data.sources: megatron path {prefix!r} needs {file}, which does not exist; `path` is the prefix of a .bin and its .idx"
            )
        stamps.append(f"{file.stat().st_size}:{file.stat().st_mtime_ns}")
        size += file.stat().st_size
    return [Piece(path.name, str(path), 0, size, size, " ".join(stamps))]


def _lines(source: Source, piece: Piece) -> Iterator[Raw]:
    """Records of a .jsonl, plain (those that start in the piece's bytes) or compressed (all)."""
    offset, stop = piece.start, piece.stop
    with open(piece.path, "rb") as raw:
        file = _content(raw, piece.name)
        if piece.name.endswith(COMPRESSED):
            stop = 1 << 62
        elif offset:
            raw.seek(offset - 1)
            offset += len(raw.readline()) - 1
        while offset < stop:
            where = f"{piece.name}:{offset}"
            try:
                line = file.readline()
            except (EOFError, zlib.error, gzip.BadGzipFile, _Torn) as error:
                yield Raw(where, None, bad=f"corrupt: {error}")
                return
            if not line:
                return
            begins = offset == 0  # where some write a byte order mark
            offset += len(line)
            if line.strip():
                yield _record(source, where, line.removeprefix(codecs.BOM_UTF8) if begins else line)


def _content(raw: io.BufferedReader, name: str) -> Any:
    """A file's text, of a compressed one what it holds."""
    if name.endswith(".zst"):
        return io.BufferedReader(_Zst(raw), 1 << 20)
    return gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw


def place(source: Source, part: Part, where: str) -> str:
    """A Raw's `where` for people: the file's path, and of JSON lines the number of the line, from 1. Reads the file up to there."""
    name, _, at = where.rpartition(":")
    piece = next((piece for piece in part.pieces if piece.name == name), None)
    if piece is None or not piece.path:
        return where
    if source.kind != "jsonl" or not at.isdecimal():
        return f"{piece.path}:{at}"
    line, left = 1, int(at)
    with suppress(OSError, EOFError, zlib.error, _Torn), open(piece.path, "rb") as raw:
        file = _content(raw, name)
        while left > 0 and (read := file.read(min(left, 1 << 20))):
            line, left = line + read.count(b"\n"), left - len(read)
    return f"line {line:,} of {piece.path}"


def _record(source: Source, where: str, line: bytes) -> Raw:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        value = _replaced(line)
        if value is None:
            return Raw(where, None, bad="unparsable: neither UTF-8 nor JSON")
        if source.format != "text":
            return _conversation(source, where, value)
        text = value.get(source.field) if isinstance(value, dict) else None
        # Found bad, but kept as bytes so that `undecodable = "replace"` can have the text.
        if not isinstance(text, str):
            return _textless(source, where, value)
        return Raw(where, b"".join(c.encode("utf-8", "surrogateescape" if "\udc80" <= c <= "\udcff" else "surrogatepass") for c in text))
    except json.JSONDecodeError as error:  # whose own text counts lines within this one
        return Raw(where, None, bad=f"unparsable: no JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:
        return Raw(where, None, bad=f"unparsable: {error}")
    if source.format != "text":
        return _conversation(source, where, value)
    text = value.get(source.field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        return _textless(source, where, value)
    return Raw(where, text)


def _textless(source: Source, where: str, value: Any) -> Raw:
    keys = tuple(value) if isinstance(value, dict) and source.field not in value else ()
    return Raw(where, None, bad=f"unparsable: no text in field {source.field!r}", keys=keys)


def _conversation(source: Source, where: str, value: Any) -> Raw:
    """A record that is no plain text, as the text of its columns."""
    try:
        text = messages.text_of(source, value)
        return Raw(where, text, messages.key_of(text))
    except messages.Unparsable as error:
        return Raw(where, None, bad=f"unparsable: {error}", keys=error.keys)


def _replaced(line: bytes) -> Any:
    """JSON of a line that is not UTF-8, its wrong bytes kept as surrogates; None if it is no JSON either."""
    try:
        return json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None


class _Torn(Exception):
    """A .zst that is damaged or ends within a frame."""


class _Zst(io.RawIOBase):
    """A .zst file as a stream of bytes, any number of frames. The library's own reader takes a cut-off file for a complete one."""

    def __init__(self, raw: io.BufferedReader) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"reading {raw.name} needs: pip install zstandard") from error
        self.raw, self.new, self.error = raw, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self.frame: Any = None
        self.waiting, self.ready = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            data = self.waiting or self.raw.read(1 << 18)
            self.waiting = b""
            if not data:
                if self.frame is not None:
                    raise _Torn("the file ends within a zstd frame")
                return 0
            self.frame = self.frame or self.new()
            try:
                self.ready = self.frame.decompress(data)
            except self.error as error:
                raise _Torn(str(error)) from error
            if self.frame.eof:
                self.frame, self.waiting = None, self.frame.unused_data
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


def _arrow(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs: pip install pyarrow") from error
    return pyarrow


def _row_groups(source: Source, path: Path, name: str, stamp: str, shard_bytes: int) -> list[Piece]:
    """Row groups of one parquet file, joined up to `shard_bytes` of the text column.

    One piece if the file is no parquet, so that read() names it.
    """
    arrow = _arrow(str(path))
    try:
        metadata = arrow.parquet.ParquetFile(path).metadata
    except (arrow.ArrowException, OSError):
        return [Piece(name, str(path), 0, 1, path.stat().st_size, stamp)]
    names = metadata.schema.to_arrow_schema().names
    _columns(source, names, str(path))
    column = names.index(source.field) if source.format == "text" else len(names)
    found, start, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        nested = source.format != "text" or column >= row_group.num_columns
        size += row_group.total_byte_size if nested else row_group.column(column).total_uncompressed_size
        if size >= shard_bytes or group == metadata.num_row_groups - 1:
            found.append(Piece(name, str(path), start, group + 1, size, stamp))
            start, size = group + 1, 0
    return found


def _columns(source: Source, names: list[str], place: str) -> list[str]:
    """The columns of `names` that a source reads; DataError if one that it needs is missing."""
    needed, optional = ((source.field,), ()) if source.format == "text" else messages.columns(source)
    for name in needed:
        if name not in names:
            way = messages.way(source, names)
            how = "set `field` of the source, or another `format`" if way is None else f"set {way} of the source"
            raise DataError(f"{place} has no column {name!r}; its columns are {names}: {how}")
    return [name for name in (*needed, *optional) if name in names]


def _parquet(source: Source, piece: Piece) -> Iterator[Raw]:
    arrow = _arrow(piece.path)
    row = 0
    try:
        file = arrow.parquet.ParquetFile(piece.path)
        row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        columns = _columns(source, file.schema_arrow.names, piece.path)
        for batch in file.iter_batches(1024, row_groups=range(piece.start, piece.stop), columns=columns):
            if source.format != "text":
                for record in _rows_of(batch):
                    where = f"{piece.name}:row {row}"
                    yield _conversation(source, where, record) if record is not None else Raw(where, None, bad="undecodable: not UTF-8")
                    row += 1
                continue
            for value in _texts(arrow, batch.column(0), source, piece):
                where = f"{piece.name}:row {row}"
                yield Raw(where, value, bad="" if value is not None else f"unparsable: null in column {source.field!r}")
                row += 1
    except (arrow.ArrowException, OSError) as error:
        yield Raw(f"{piece.name}:row {row}", None, bad=f"corrupt: {str(error).splitlines()[0]}")


def _rows_of(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The records of an Arrow batch, None for one whose texts are not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # raised before the first is yielded
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _texts(arrow: Any, column: Any, source: Source, piece: Piece) -> list[bytes | None]:
    """A column of strings as bytes, as Arrow does not check that they are UTF-8 and its own conversion would fail for all of them."""
    kind = column.type.value_type if arrow.types.is_dictionary(column.type) else column.type
    tests = (arrow.types.is_string, arrow.types.is_large_string, arrow.types.is_binary, arrow.types.is_large_binary)
    if not any(test(kind) for test in tests):
        raise DataError(f"{piece.path}: column {source.field!r} holds {kind}, and documents are strings; set `field` of the source")
    return column.cast(kind).cast(arrow.large_binary()).to_pylist()


def _dataset(source: Source) -> Any:
    """A Hugging Face dataset: a folder of save_to_disk, or anything load_dataset takes. Never runs a dataset's own script."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"source hub {source.path!r} needs: pip install datasets") from error
    assert source.path is not None
    path = Path(source.path).expanduser()
    try:
        if (path / "dataset_dict.json").is_file():
            found: Any = datasets.load_from_disk(str(path))
            if source.split not in found:
                raise DataError(f"{path} has the splits {list(found)}, and `split` is {source.split!r}; set one of them")
            found = found[source.split]
        elif (path / "state.json").is_file():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(
                str(path) if path.exists() else source.path, source.subset, split=source.split, revision=source.revision
            )
    except DataError:
        raise
    except Exception as error:  # offline, unknown, gated, damaged: the library has a type for each, and its first line says which
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise DataError(f"source hub {source.path!r} did not load: {reason[0]}; check `path`, `subset`, `split` and the network") from error
    _columns(source, found.column_names, f"source hub {source.path!r}")
    return found


def _rows(source: Source, shard_bytes: int) -> list[Piece]:
    dataset = _dataset(source)
    rows = len(dataset)
    if not rows:
        raise DataError(f"source hub {source.path!r} has no rows in split {source.split!r}; choose another `split` or `subset`")
    size = max(1, int(dataset.data.nbytes))
    step = max(1, min(rows, rows * shard_bytes // size))
    stamp = f"{rows}:{dataset._fingerprint}:{source.revision}"
    name = f"{source.path}/{source.split}"
    return [
        Piece(name, "", start, min(rows, start + step), max(1, size * min(step, rows - start) // rows), stamp)
        for start in range(0, rows, step)
    ]


def _hub(source: Source, piece: Piece) -> Iterator[Raw]:
    dataset = _dataset(source)
    dataset = dataset.select_columns(_columns(source, dataset.column_names, piece.name))
    if source.format != "text":
        for row in range(piece.start, piece.stop):
            yield _conversation(source, f"{piece.name}:row {row}", dataset[row])
        return
    for start in range(piece.start, piece.stop, 1000):
        texts = dataset[start : min(piece.stop, start + 1000)][source.field]
        for row, text in enumerate(texts, start):
            is_text = isinstance(text, str)
            yield Raw(
                f"{piece.name}:row {row}",
                text if is_text else None,
                bad="" if is_text else f"unparsable: no text in field {source.field!r}",
            )
