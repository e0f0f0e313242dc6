"""Every kind of source: order, parts, damage; and that the parts together are the whole."""

import gzip
import json
from pathlib import Path

import pytest

from gigatrain.config import Source
from gigatrain.data import sources
from gigatrain.errors import DataError

RECORDS = [{"text": f"record {number} " + "ü" * number, "id": number} for number in range(50)]
TEXTS = [record["text"] for record in RECORDS]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def read(source: Source, shard_bytes: int = 300) -> list[sources.Raw]:
    return [raw for part in sources.parts(0, source, shard_bytes) for raw in sources.read(source, part)]


def texts(source: Source, shard_bytes: int = 300) -> list[str | None]:
    return [raw.data.decode() if isinstance(raw.data, bytes) else raw.data for raw in read(source, shard_bytes)]


def test_stdlib_is_people_s_python_in_a_fixed_order() -> None:
    found = sources.pieces(Source(kind="stdlib"), 1)
    names = [piece.name for piece in found]
    assert names == sorted(names)
    assert {"ast.py", "json/decoder.py", "asyncio/base_events.py", "encodings/utf_8.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "ensurepip", "pydoc_data"}
    assert not {"encodings/cp1252.py", "encodings/iso8859_1.py", "encodings/mac_roman.py", "html/entities.py"} & set(names)
    assert 5e6 < sum(piece.bytes for piece in found) < 3e7
    assert not any(name.startswith("/") for name in names)


def test_text_folder_file_glob_and_pattern(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/d.md", ".hidden/e.txt", ".f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(Source(kind="text", path=str(tmp_path))) == ["a.txt", "b.txt", "deep/c.txt", "deep/d.md"]
    assert texts(Source(kind="text", path=str(tmp_path), pattern="**/*.txt")) == ["a.txt", "b.txt", "deep/c.txt"]
    assert texts(Source(kind="text", path=str(tmp_path / "b.txt"))) == ["b.txt"]
    assert texts(Source(kind="text", path=str(tmp_path / "*.txt"))) == ["a.txt", "b.txt"]
    assert [raw.key for raw in read(Source(kind="text", path=str(tmp_path / "deep")))] == ["c.txt", "d.md"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(kind="text", path="nowhere"), r"text path 'nowhere' does not exist \(looked at /.*nowhere\); correct `path`"),
        (Source(kind="text", path=".", pattern="*.nothing"), r"has no files that match '\*\.nothing'; correct `path` or `pattern`"),
        (Source(kind="jsonl", path="*.nothing"), r"has no files that match the pattern; correct `path`"),
        (Source(kind="parquet", path="."), r"has no files named \*\.parquet"),
        (Source(kind="megatron", path="nowhere"), r"needs .*nowhere\.bin, which does not exist"),
    ],
)
def test_missing_or_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Source, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        sources.parts(0, source, 100)


@pytest.mark.parametrize("pattern", ["/abs/*", "", "**.txt"])
def test_a_pattern_that_is_none(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"`pattern` is .*, which is no pattern of files below `path` .*; write one relative to `path`"):
        sources.parts(0, Source(kind="text", path=str(tmp_path), pattern=pattern), 100)


@pytest.mark.parametrize("shard_bytes", [1, 7, 100, 1000, 1 << 20])
def test_jsonl_cut_anywhere_gives_every_line_once(tmp_path: Path, shard_bytes: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    source = Source(kind="jsonl", path=str(tmp_path))
    assert texts(source, shard_bytes) == TEXTS
    # The name of a record is where its line starts.
    for raw, line in zip(read(source, shard_bytes), LINES.splitlines(), strict=True):
        assert LINES[int(raw.where.split(":")[1]) :].startswith(line)


def test_jsonl_compressed(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    half = len(LINES) // 2
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:]))
    (tmp_path / "c.jsonl").write_bytes(LINES)
    assert texts(Source(kind="jsonl", path=str(tmp_path))) == 3 * TEXTS
    assert len(sources.parts(0, Source(kind="jsonl", path=str(tmp_path / "b.jsonl.zst")), 1)) == 1


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_damaged_compression_is_named_after_what_could_be_read(tmp_path: Path, suffix: str) -> None:
    zstandard = pytest.importorskip("zstandard")
    big = LINES * 40
    whole = gzip.compress(big) if suffix == "gz" else zstandard.ZstdCompressor().compress(big)
    for damaged in (whole[: len(whole) // 2], b"\0" * len(whole)):
        path = tmp_path / f"a.jsonl.{suffix}"
        path.write_bytes(damaged)
        found = read(Source(kind="jsonl", path=str(path)))
        assert found[-1].bad.startswith("corrupt: ")
        assert found[-1].where.startswith(f"a.jsonl.{suffix}:")
        assert [raw.data for raw in found[:50]] == (TEXTS if len(found) > 1 else [None])


def test_bad_lines_are_named(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut o',
        b"",
        b'{"other": 1}',
        b'{"text": 5}',
        b"[1]",
        b'{"text": "\xff"}',
        b"\xff",
        b"[" * 100_000,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b'\n{"text": "last without a newline"}')
    found = read(Source(kind="jsonl", path=str(tmp_path / "a.jsonl")), 1 << 20)
    assert [raw.data for raw in found] == ["good", None, None, None, None, b"\xff", None, None, "last without a newline"]
    assert [raw.bad.split(":")[0] for raw in found] == ["", *["unparsable"] * 4, "", "unparsable", "unparsable", ""]
    assert found[1].where == "a.jsonl:17"
    assert found[2].bad == "unparsable: no text in field 'text'"


def test_parquet_row_groups(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.table({"text": [*TEXTS, None], "id": list(range(51))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    parquet.write_table(arrow.table({"text": arrow.array(["x", "y", "x"]).dictionary_encode()}), tmp_path / "b.parquet")
    source = Source(kind="parquet", path=str(tmp_path))
    assert texts(source) == [*TEXTS, None, "x", "y", "x"]
    assert len(sources.parts(0, source, 300)) > 2
    raw = read(source)[50]
    assert (raw.where, raw.bad) == ("a.parquet:row 50", "unparsable: null in column 'text'")
    with pytest.raises(DataError, match=r"a\.parquet has no column 'body'; its columns are \['text', 'id'\]"):
        read(Source(kind="parquet", path=str(tmp_path), field="body"))
    with pytest.raises(DataError, match="column 'id' holds int64"):
        read(Source(kind="parquet", path=str(tmp_path / "a.parquet"), field="id"))


def test_parquet_that_is_not_utf8_or_is_damaged(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    wrong = arrow.array([b"good", b"\xff\xfe", b"also good"], arrow.binary()).view(arrow.string())
    parquet.write_table(arrow.table({"text": wrong}), tmp_path / "a.parquet")
    source = Source(kind="parquet", path=str(tmp_path))
    assert [raw.data for raw in read(source)] == [b"good", b"\xff\xfe", b"also good"]
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    (found,) = read(source)
    assert found.where == "a.parquet:row 0"
    assert found.bad.startswith("corrupt: ")


def test_hub_dataset_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    one = datasets.Dataset.from_list(RECORDS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select(range(3))}).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_bytes(LINES)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("one", "dict", "files"):
        assert texts(Source(kind="hub", path=str(tmp_path / name))) == TEXTS
    assert texts(Source(kind="hub", path=str(tmp_path / "dict"), split="test")) == TEXTS[:3]
    assert len(sources.parts(0, Source(kind="hub", path=str(tmp_path / "one")), 300)) > 3
    with pytest.raises(DataError, match=r"has the splits \['train', 'test'\], and `split` is 'dev'"):
        read(Source(kind="hub", path=str(tmp_path / "dict"), split="dev"))
    with pytest.raises(DataError, match=r"no column 'body'; its columns are \['text', 'id'\]"):
        read(Source(kind="hub", path=str(tmp_path / "one"), field="body"))
    with pytest.raises(DataError, match="source hub 'no/such-dataset' did not load"):
        read(Source(kind="hub", path="no/such-dataset"))


def test_missing_package_names_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    (tmp_path / "a.parquet").write_bytes(b"")
    for package, source in (
        ("datasets", Source(kind="hub", path="x")),
        ("pyarrow", Source(kind="parquet", path=str(tmp_path))),
        ("zstandard", Source(kind="jsonl", path=str(tmp_path))),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(DataError, match=f"pip install {package}"):
            read(source)
