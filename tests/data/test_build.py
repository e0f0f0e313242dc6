"""Building: policies, kills, concurrent builds, full disks, damage; and that a corpus says what it holds."""

import errno
import gzip
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TRAINED, data_of, text, write_files

from gigatrain import config
from gigatrain.config import BadDocuments, Source
from gigatrain.data import build as building
from gigatrain.data import manifest, shards, sources, tokenise, tokenizer, workers
from gigatrain.data.build import build
from gigatrain.data.corpus import Corpus
from gigatrain.data.documents import held_out
from gigatrain.data.job import Job
from gigatrain.errors import DataError

ROOT = Path(building.__file__).parents[2]


def existing(folder: Path) -> config.Tokenizer:
    """The recipe's words for a tokenizer that exists."""
    return config.Tokenizer.model_validate({"from": str(folder)})


def decoded(corpus: Corpus, split: str, source: int = 0) -> list[str]:
    """Every document of a split as text, read back from the shards."""
    stream, ready = corpus.stream(source, split), corpus.tokenizer()
    found = []
    for number in range(stream.documents):
        ids = stream.read(*stream.document(number))
        assert ids[-1] == corpus.eos
        assert not (ids[:-1] == corpus.eos).any()
        found.append(ready.decode(ids[:-1]))
    return found


def test_corpus_holds_every_document_once(corpus: Corpus) -> None:
    folder = corpus.folder.parents[1] / "texts"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt"))
    for split, mine in (("validation", True), ("train", False)):
        expected = [(folder / name).read_text() for name in names if held_out(name, 0.25) is mine]
        assert decoded(corpus, split) == expected
        totals = corpus.totals(split)
        assert totals["documents"] == len(expected) > 5
        assert totals["text_bytes"] == sum(len(value.encode()) for value in expected)
        assert totals["tokens"] == sum(len(corpus.tokenizer().encode(value)) + 1 for value in expected)
    assert len(corpus.manifest["sources"][0]["splits"]["train"]["shards"]) >= 3
    assert corpus.totals("validation")["xz_bytes"] == len(lzma.compress("".join(decoded(corpus, "validation")).encode(), preset=9))
    assert corpus.manifest["starts_with_bos"] is False
    assert not list(corpus.folder.glob("**/*.tmp")) + list(corpus.folder.glob("**/*.heldout"))
    corpus.verify()


def test_held_out_share_is_what_was_asked() -> None:
    """Of 20,000 names 5 % are held out, within four standard deviations (0.15 %)."""
    share = sum(held_out(f"name {i}", 0.05) for i in range(20_000)) / 20_000
    assert abs(share - 0.05) < 0.0062
    assert not held_out("anything", 0.0)


def test_a_job_is_told_of_paths_that_are_not_there(tmp_path: Path) -> None:
    """A path that is mistyped is nothing on the hub: the job would find out in its queue's own time."""
    (tmp_path / "a.txt").write_text("some text")
    data = config.Data(sources=(Source(kind="text", path=str(tmp_path), pattern="*.txt"),), folder=str(tmp_path / "data"))
    assert "the hub" in str(building.missing(data, config.Tokenizer.model_validate({"from": "someone/something"})))
    assert f"tokenizer.from is '{tmp_path}/tok', and there is no such file" in str(building.missing(data, existing(tmp_path / "tok")))


def test_nothing_held_out_is_refused(tmp_path: Path) -> None:
    """Also where an older version left a manifest, and for a Megatron source whose tail rounds to nothing."""
    source = Source(kind="text", path=str(write_files(tmp_path / "texts", 8)))
    share = next(n / 1e6 for n in range(1, 1000) if not any(held_out(sources.pieces(source, 1)[i].name, n / 1e6) for i in range(8)))
    message = rf"none of 8 documents is held out: `data\.validation` is {share}, .*; raise data\.validation, or set it to 0"
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            build(data_of(tmp_path, source, validation=share), TRAINED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "refuse_unvalidated", lambda *_: None)
        build(data_of(tmp_path, source, validation=share), TRAINED)
    with pytest.raises(DataError, match=message):
        build(data_of(tmp_path, source, validation=share), TRAINED)
    spec = existing(tokenizer.train([text(1, 50)], 300, tmp_path / "tokenizer").folder)
    theirs = megatron(tmp_path / "theirs", [[1, 2, 0]] * 20)
    with pytest.raises(DataError, match="none of 20 documents is held out"):
        build(data_of(tmp_path, theirs, validation=0.02), spec)
    assert build(data_of(tmp_path, theirs, validation=0.05), spec).totals("validation")["documents"] == 1


def test_a_deleted_manifest_comes_back_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(tmp_path, Source(kind="text", path=str(write_files(tmp_path / "texts"))), shard_bytes=500)
    first = build(data, TRAINED)
    read: list[str] = []
    original = workers.tokenise
    monkeypatch.setattr(workers, "tokenise", lambda *given: (read.append(given[2].name), original(*given))[1])
    (first.folder / "manifest.json").unlink()
    again = build(data, TRAINED)
    assert again.manifest == first.manifest
    assert again.totals("validation")["xz_bytes"] > 60
    again.verify()
    with_text = {Path(s["prefix"]).name for s in first.manifest["sources"][0]["splits"]["validation"]["shards"]}
    assert {f"{name}.validation" for name in read} == with_text  # the others are finished
    # Where there is too much held-out text to compress, nothing is read again.
    monkeypatch.setattr(tokenise, "XZ_BYTES", 10)
    (first.folder / "manifest.json").unlink()
    read.clear()
    last = build(data, TRAINED)
    assert (read, last.sha256, last.totals("validation")["xz_bytes"]) == ([], first.sha256, None)


def test_a_weight_without_a_slot_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "texts", 4)
    both = (Source(kind="text", path=str(folder)), Source(kind="text", path=str(folder), weight=1e-300))
    with pytest.raises(DataError, match="source 1 has weight 1e-300"):
        build(data_of(tmp_path, *both), TRAINED)
    assert not (tmp_path / "cache").exists()


def test_a_build_that_waits_says_so(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    waits = threading.Event()

    def report(*row: Any) -> None:
        seen.append(row)
        waits.set()

    def second() -> None:
        with building._locked(tmp_path / "lock", report):
            pass

    thread = threading.Thread(target=second)
    with building._locked(tmp_path / "lock", lambda *_: pytest.fail("nobody holds it")):
        thread.start()
        assert waits.wait(10)
        assert seen == [("wait for another build of this corpus", 0, 1)]
    thread.join(10)
    assert seen[1:] == [("wait for another build of this corpus", 1, 1)]


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(building.fcntl, "flock", refuse)
    with pytest.raises(DataError, match=r"cannot lock .*lock: (ENOTSUP|EOPNOTSUPP), .*Lustre: -o flock\), or set `data\.folder`"):
        build(data_of(tmp_path, Source(kind="text", path=str(write_files(tmp_path / "texts", 4)))), TRAINED)


def test_the_key_follows_what_decides_the_tokens(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "texts", 8)
    source = Source(kind="text", path=str(folder))
    first = build(data_of(tmp_path, source, validation=0.0), TRAINED)
    same = source.model_copy(update={"weight": 3.0})
    assert build(data_of(tmp_path, same, validation=0.0, packing="document", workers=2), TRAINED).folder == first.folder
    assert build(data_of(tmp_path, same, validation=0.0), TRAINED).weights == (3.0,)
    others = [
        build(data_of(tmp_path, source, validation=0.5), TRAINED),
        build(data_of(tmp_path, source, validation=0.0, bad=BadDocuments(min_tokens=3)), TRAINED),
        build(data_of(tmp_path, source, validation=0.0), config.Tokenizer(train=config.TokenizerTraining(vocab=301))),
    ]
    (folder / "001.txt").write_text("changed")
    others.append(build(data_of(tmp_path, source, validation=0.0), TRAINED))
    assert len({corpus.folder for corpus in (first, *others)}) == 5
    assert decoded(others[-1], "train")[0] == "changed"  # "001.txt" comes before "deep/…"
    # The tokens' own hash does not depend on where they lie.
    shutil.copytree(first.folder, tmp_path / "elsewhere")
    assert Corpus.open(tmp_path / "elsewhere").sha256 == first.sha256
    Corpus.open(tmp_path / "elsewhere").verify()


def hostile(folder: Path) -> Path:
    folder.mkdir()
    for name, content in {
        "a-good.txt": b"a good document",
        "b-empty.txt": b"",
        "c-blank.txt": b" \n\t ",
        "d-latin.txt": "na\u00efve".encode("latin-1"),
        "e-short.txt": b"x",
        "f-long.txt": b"12 " * 300,
        "g-good.txt": b"another good document",
    }.items():
        (folder / name).write_bytes(content)
    return folder


def test_bad_documents_are_skipped_counted_and_named(tmp_path: Path) -> None:
    bad = BadDocuments(short="skip", long="skip", min_tokens=2, max_tokens=100)
    corpus = build(data_of(tmp_path, Source(kind="text", path=str(hostile(tmp_path / "texts"))), validation=0.0, bad=bad), TRAINED)
    assert decoded(corpus, "train") == ["a good document", "another good document"]
    assert corpus.manifest["skipped"] == {"empty": 2, "long": 1, "short": 1, "undecodable": 1}
    named = [json.loads(line) for line in (corpus.folder / "skipped.jsonl").read_text().splitlines()]
    assert {row["document"]: row["reason"].split(":")[0] for row in named} == {
        "b-empty.txt:0": "empty",
        "c-blank.txt:0": "empty",
        "d-latin.txt:0": "undecodable",
        "e-short.txt:0": "short",
        "f-long.txt:0": "long",
    }
    assert any("{'empty': 2" in line for line in corpus.describe())
    assert corpus.left_out()[0] == "3 documents are left out (long 1, short 1, undecodable 1), such as d-latin.txt:0: " + next(
        row["reason"] for row in named if row["document"] == "d-latin.txt:0"
    )


def test_bad_documents_are_mended_where_that_is_asked(tmp_path: Path) -> None:
    bad = BadDocuments(undecodable="replace", long="truncate", max_tokens=100)
    corpus = build(data_of(tmp_path, Source(kind="text", path=str(hostile(tmp_path / "texts"))), validation=0.0, bad=bad), TRAINED)
    found = decoded(corpus, "train")
    assert found[:3] == ["a good document", "na\ufffdve", "x"]
    assert corpus.manifest["mended"] == {"replaced": 1, "truncated": 1}
    stream = corpus.stream(0)
    assert stream.document(3)[1] - stream.document(3)[0] == 101
    assert ("12 " * 300).startswith(found[3])
    assert corpus.totals("train")["text_bytes"] == sum(len(value.encode()) for value in found)


@pytest.mark.parametrize(
    ("policy", "name", "reason"),
    [
        ({"undecodable": "refuse"}, "d-latin", "undecodable: invalid continuation byte at 2"),
        ({"empty": "refuse"}, "b-empty", "empty"),
        ({"short": "refuse"}, "e-short", "short: 1 tokens, and the least is 2"),
        ({"long": "refuse", "max_tokens": 100}, "f-long", "long: .* the most is 100"),
    ],
)
def test_bad_documents_are_refused_by_name(tmp_path: Path, policy: dict, name: str, reason: str) -> None:
    source = Source(kind="text", path=str(hostile(tmp_path / "texts")))
    with pytest.raises(DataError, match=rf"document {name}\.txt:0 is {reason}; mend it, or set `data\.bad\."):
        build(data_of(tmp_path, source, validation=0.0, bad=BadDocuments(**policy)), TRAINED)


def test_bad_records(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good one"}',
        b'{"text": "cut o',
        b'{"text": "l\xef"}',
        b'{"text": "half \\ud800 pair"}',
        b'{"text": ""}',
        b'{"text": "good two"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source = Source(kind="jsonl", path=str(tmp_path / "a.jsonl"))
    corpus = build(data_of(tmp_path, source, validation=0.0), TRAINED)
    assert decoded(corpus, "train") == ["good one", "good two"]
    assert corpus.manifest["skipped"] == {"empty": 1, "undecodable": 2, "unparsable": 1}
    corpus = build(data_of(tmp_path, source, validation=0.0, bad=BadDocuments(undecodable="replace")), TRAINED)
    assert decoded(corpus, "train")[:2] == ["good one", "l\ufffd"]
    assert decoded(corpus, "train")[2].startswith("half \ufffd")
    with pytest.raises(DataError, match=r"document a\.jsonl:21 is unparsable"):
        build(data_of(tmp_path, source, bad=BadDocuments(unparsable="refuse")), TRAINED)


def test_corrupt_archive_is_refused_or_its_readable_part_kept(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text(number, 30)}) + "\n" for number in range(300)).encode()
    whole = gzip.compress(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    source = Source(kind="jsonl", path=str(tmp_path / "a.jsonl.gz"))
    corpus = build(data_of(tmp_path, source, validation=0.0), TRAINED)
    assert corpus.manifest["skipped"] == {"corrupt": 1}
    assert decoded(corpus, "train") == [text(number, 30) for number in range(corpus.totals("train")["documents"])]
    with pytest.raises(DataError, match=r"document a\.jsonl\.gz:\d+ is corrupt: .*set `data\.bad\.unparsable` to 'skip'"):
        build(data_of(tmp_path, source, bad=BadDocuments(unparsable="refuse")), TRAINED)


def test_nothing_left_is_an_error_with_numbers(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "empty.txt").touch()
    with pytest.raises(DataError, match="no training document to train a tokenizer on"):
        build(data_of(tmp_path, Source(kind="text", path=str(tmp_path / "texts"))), TRAINED)
    spec = existing(tokenizer.train(["some text"], 260, tmp_path / "tokenizer").folder)
    with pytest.raises(DataError, match=r"has no training token: 0 documents are held out and 1 were skipped \{'empty': 1\}"):
        build(data_of(tmp_path, Source(kind="text", path=str(tmp_path / "texts"))), spec)


def test_one_document_of_ten_million_tokens(tmp_path: Path) -> None:
    """Bytes that never merge make a token each, so 10 MB are enough; it stays one document in one shard."""
    ready = tokenizer.train(["a"], 257, tmp_path / "tokenizer")
    size = 10_000_000
    (tmp_path / "big.txt").write_bytes(b"abcdefg \n" * (size // 9) + b"z")
    folder = tmp_path / "corpus"
    (folder / "parts").mkdir(parents=True)
    (folder / "shards").mkdir()
    corpus = build(data_of(tmp_path, Source(kind="text", path=str(tmp_path / "big.txt")), validation=0.0), existing(ready.folder))
    assert corpus.totals("train")["documents"] == 1
    assert corpus.totals("train")["tokens"] == size // 9 * 9 + 2
    stream = corpus.stream(0)
    assert ready.decode(stream.read(9 * 1_000_000, 9 * 1_000_000 + 9)) == "abcdefg \n"
    assert stream.boundaries(1, stream.tokens).size == 0


def test_distinct_bos_is_stored(tmp_path: Path) -> None:
    ready = tokenizer.train([text(1, 50)], 300, tmp_path / "tokenizer")
    content = json.loads(ready.file.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 300, "content": "<s>"})
    content["model"]["vocab"]["<s>"] = 300
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [300], "tokens": ["<s>"]}},
    }
    ready.file.write_text(json.dumps(content))
    write_files(tmp_path / "texts", 5)
    corpus = build(
        data_of(tmp_path, Source(kind="text", path=str(tmp_path / "texts")), validation=0.0),
        existing(tmp_path / "tokenizer"),
    )
    stream = corpus.stream(0)
    firsts = [int(stream.read(*stream.document(number))[0]) for number in range(5)]
    assert firsts == [300] * 5
    assert (corpus.manifest["starts_with_bos"], corpus.vocab, corpus.eos) == (True, 301, 0)


def megatron(prefix: Path, documents: list[list[int]], vocab: int = 300) -> Source:
    writer = shards.ShardWriter(prefix, vocab)
    for ids in documents:
        writer.add(np.array(ids))
    writer.finish()
    return Source(kind="megatron", path=str(prefix))


def test_megatron_corpus_is_used_where_it_is(tmp_path: Path) -> None:
    spec = existing(tokenizer.train([text(1, 50)], 300, tmp_path / "tokenizer").folder)
    documents = [[number + 1, number + 2, 0] for number in range(20)]
    corpus = build(data_of(tmp_path, megatron(tmp_path / "theirs", documents), validation=0.1), spec)
    assert corpus.stream(0).read(0, 54).tolist() == [token for ids in documents[:18] for token in ids]
    held = corpus.stream(0, "validation")
    assert held.read(0, 6).tolist() == [19, 20, 0, 20, 21, 0]
    assert held.boundaries(0, 6).tolist() == [0, 3]
    assert held.document(1) == (3, 6)
    assert corpus.manifest["sources"][0]["ends_with_eos"] is True
    assert corpus.totals("validation")["text_bytes"] is None
    assert corpus.totals("validation")["xz_bytes"] is None
    assert not list((corpus.folder / "shards").iterdir())
    corpus.verify()
    without = build(data_of(tmp_path, megatron(tmp_path / "bare", [[5, 6], [7, 8]]), validation=0.0), spec)
    assert without.manifest["sources"][0]["ends_with_eos"] is False
    # Replaced behind our back: the size is seen on opening, an id outside the vocabulary when the corpus is built.
    megatron(tmp_path / "theirs", documents[:-1])
    with pytest.raises(DataError, match=r"theirs\.bin is 114 bytes long, and the manifest says 120"):
        Corpus.open(corpus.folder)
    with pytest.raises(DataError, match=r"wild\.bin: token id 300 at byte 4 \(token 2\), and the vocabulary is 300"):
        build(data_of(tmp_path, megatron(tmp_path / "wild", [[1, 2, 300]], 400)), spec)


def test_parallel_equals_inline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "INLINE_BYTES", 0)
    folder = write_files(tmp_path / "texts")
    (folder / "torn.txt").write_bytes(b"\xff")
    source = Source(kind="text", path=str(folder))
    found = [build(data_of(tmp_path / str(workers), source, workers=workers, shard_bytes=2000), TRAINED) for workers in (1, 2)]
    assert found[0].manifest == found[1].manifest
    found[1].verify()
    with pytest.raises(DataError, match=r"document torn\.txt:0 is undecodable"):
        build(
            data_of(tmp_path / "refused", source, workers=2, shard_bytes=2000, bad=BadDocuments(undecodable="refuse")),
            existing(found[0].folder / "tokenizer"),
        )


CHILD = """
import sys
from gigatrain import config
from gigatrain.data.build import build
data = config.Data.model_validate_json(sys.argv[1])
print(build(data, config.Tokenizer.model_validate_json(sys.argv[2])).sha256)
assert "torch" not in sys.modules, "building must not import torch"
"""
# Dies by SIGKILL just before its n-th fsync or rename, then builds again from what is left; for every n, in folders of their own.
CRASHES = """
import os, signal, sys
from gigatrain import config
from gigatrain.data.build import build
data = config.Data.model_validate_json(sys.argv[1])
spec = config.Tokenizer.model_validate_json(sys.argv[2])

def attempt(folder, deadline):
    pid = os.fork()
    if pid == 0:
        calls = 0
        def counted(original):
            def call(*given, **named):
                nonlocal calls
                calls += 1
                if calls == deadline:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*given, **named)
            return call
        os.fsync, os.replace, os.rename = map(counted, (os.fsync, os.replace, os.rename))
        try:
            corpus = build(data.model_copy(update={"folder": folder}), spec)
            corpus.verify()
            left = [str(path) for path in corpus.folder.glob("**/*") if path.name.endswith(".tmp")]
            print(deadline or "again", corpus.sha256, corpus.manifest["totals"]["validation"]["xz_bytes"], left, flush=True)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

deadline = 0
while True:
    deadline += 1
    folder = os.path.join(data.folder, str(deadline))
    first = attempt(folder, deadline)
    assert first in (-signal.SIGKILL, 0), first
    assert attempt(folder, 0) == 0
    if first == 0:
        break
"""


def child(script: str, data: config.Data) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, data.model_dump_json(), TRAINED.model_dump_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))


def test_a_build_killed_at_any_fsync_or_rename_resumes_to_the_same_corpus(tmp_path: Path) -> None:
    source = Source(kind="text", path=str(write_files(tmp_path / "texts", 12)))
    undisturbed = build(data_of(tmp_path / "a", source, shard_bytes=300), TRAINED)
    process = child(CRASHES, data_of(tmp_path / "b", source, shard_bytes=300))
    lines = process.communicate()[0].splitlines()
    assert process.returncode == 0
    answers = [line.split(" ", 1) for line in lines]
    assert len(answers) > 30  # crash points
    assert {answer for _, answer in answers} == {f"{undisturbed.sha256} {undisturbed.totals('validation')['xz_bytes']} []"}


def test_a_build_killed_at_any_time_keeps_finished_parts(tmp_path: Path) -> None:
    """SIGKILL from outside, three times, whenever there is one more part than before."""
    source = Source(kind="text", path=str(write_files(tmp_path / "texts", 80)))
    data = data_of(tmp_path, source, shard_bytes=100)
    kept: dict[Path, int] = {}
    for _ in range(3):
        process = child(CHILD, data)
        while len(kept) == len(done := {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/parts/*.json")}):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not list(tmp_path.glob("cache/*/manifest.json"))
        kept = done
    corpus = build(data, TRAINED)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert corpus.totals("train")["documents"] + corpus.totals("validation")["documents"] == 80
    corpus.verify()


def test_two_builds_at_once(tmp_path: Path) -> None:
    data = data_of(tmp_path, Source(kind="text", path=str(write_files(tmp_path / "texts"))), shard_bytes=2000)
    processes = [child(CHILD, data) for _ in range(2)]
    answers = {process.communicate()[0].strip() for process in processes}
    assert answers == {build(data, TRAINED).sha256}
    assert [process.returncode for process in processes] == [0, 0]
    build(data, TRAINED).verify()


def test_inputs_that_change_meanwhile_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path / "texts", 5)
    original = workers.tokenise

    def meddling(*given: object) -> object:
        (folder / "001.txt").write_text(str(time.time()))
        return original(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(workers, "tokenise", meddling)
    with pytest.raises(DataError, match="inputs changed while they were read"):
        build(data_of(tmp_path, Source(kind="text", path=str(folder))), TRAINED)


def test_damage_is_refused_by_name(corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(corpus.folder, folder)
    path = folder / (corpus.manifest["sources"][0]["splits"]["train"]["shards"][0]["prefix"] + ".bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    opened = Corpus.open(folder)  # sizes are right
    with pytest.raises(DataError, match=rf"{path.name} has SHA-256"):
        opened.verify()
    with pytest.raises(DataError, match=rf"{path.name} has SHA-256"):
        Corpus.open(folder, check=True).stream(0).read(0, 10)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"{path.name} is {len(content) - 1:,} bytes long"):
        Corpus.open(folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name} is missing"):
        Corpus.open(folder)
    manifest = folder / "manifest.json"
    original = manifest.read_text()
    for damaged, message in (
        (original.replace('"eos": 0', '"eos": 1'), "was changed after it was written"),
        (original[:-50], "is damaged"),
        ("[]", "is damaged"),
        (original.replace('"format": 1', '"format": 9'), "has format 9, and this version reads 1"),
    ):
        manifest.write_text(damaged)
        with pytest.raises(DataError, match=message):
            Corpus.open(folder)
    manifest.unlink()
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        Corpus.open(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False).returncode
    ):
        pytest.skip("cannot mount a tmpfs (needs root)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(text(number, 3000) * 20)
    source = Source(kind="text", path=str(tmp_path / "texts"))
    data = data_of(small_disk, source, validation=0.0, shard_bytes=1)
    with pytest.raises(DataError, match=r"bytes free, and the shards may need [\d,]+; free some, or set `data\.folder`"):
        build(data, TRAINED)
    # The estimate was fooled (another process filled the disk meanwhile): the write itself fails.
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="no space left while writing .*finished parts are kept"):
        build(data, TRAINED)
    finished = list(small_disk.glob("cache/*/parts/*.json"))
    assert 0 < len(finished) < 12
    assert not list(small_disk.glob("cache/*/*.tmp")) + list(small_disk.glob("cache/*/shards/*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    resumed = build(data, TRAINED)
    assert resumed.totals("train")["documents"] == 12
    resumed.verify()


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = write_files(tmp_path / "texts", 10)
    build(data_of(tmp_path, Source(kind="text", path=str(folder)), shard_bytes=500), TRAINED, progress=lambda *row: seen.append(row))
    size = sum(path.stat().st_size for path in folder.rglob("*.txt"))
    for stage in ("read", "tokenise"):
        done = [row[1] for row in seen if row[0] == stage]
        assert done == sorted(done)
        assert done[-1] == size


def test_sample_for_the_tokenizer_is_bounded_and_even(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "texts", 40)
    data = data_of(tmp_path, Source(kind="text", path=str(folder)), validation=0.0)
    parts = sources.parts(0, data.sources[0], data.shard_bytes)
    job = Job(data, TRAINED, None, parts, tmp_path, lambda *_: None)
    everything = building._sample(job, 1 << 20)
    assert len(everything) == 40
    some = building._sample(job, 2000)
    assert sum(len(value.encode()) for value in some) <= 2000
    assert set(some) < set(everything)
    late = [number for number in range(20, 40) if text(number, 1 + 2 * number) in some]
    assert late


def test_a_dead_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "INLINE_BYTES", 0)
    data = data_of(tmp_path, Source(kind="text", path=str(write_files(tmp_path / "texts"))), workers=2, shard_bytes=200)
    original = subprocess.Popen

    class Doomed(subprocess.Popen):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            threading.Timer(0.05, self.kill).start()

    monkeypatch.setattr(workers.subprocess, "Popen", Doomed)
    with pytest.raises(DataError, match=r"a tokenising process ended with code -9 at part 0-\d+ .*build again \(finished parts are kept\)"):
        build(data, TRAINED)
    monkeypatch.setattr(workers.subprocess, "Popen", original)
    build(data, TRAINED).verify()


def test_workers_import_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "INLINE_BYTES", 0)
    data = data_of(tmp_path, Source(kind="text", path=str(write_files(tmp_path / "texts"))), workers=2, shard_bytes=2000)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "lzma.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path / "here")
    build(data, TRAINED).verify()


def test_workers_outlive_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for the parent to end them, without a traceback of each."""
    monkeypatch.setattr(workers, "INLINE_BYTES", 0)
    data = data_of(tmp_path, Source(kind="text", path=str(write_files(tmp_path / "texts"))), workers=2, shard_bytes=500)

    class Disturbed(subprocess.Popen):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            for delay in (0.02, 0.3, 0.6):
                threading.Timer(delay, self.send_signal, [signal.SIGINT]).start()

    monkeypatch.setattr(workers.subprocess, "Popen", Disturbed)
    build(data, TRAINED).verify()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_error_in_a_worker_is_told_by_the_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "INLINE_BYTES", 0)
    data = data_of(tmp_path, Source(kind="text", path=str(write_files(tmp_path / "texts"))), workers=2, shard_bytes=2000)
    code = "import gigatrain.data.workers as b\ndef tokenise(*_): raise RuntimeError('no such luck')\nb.tokenise = tokenise; b._worker()"

    class Broken(subprocess.Popen):
        def __init__(self, _: list[str], **named: Any) -> None:
            super().__init__([sys.executable, "-c", code], **named)

    monkeypatch.setattr(workers.subprocess, "Popen", Broken)
    with pytest.raises(DataError, match=r"failed at part 0-\d+ .* with RuntimeError: no such luck \(.*:2\); .*finished parts are kept"):
        build(data, TRAINED)
    assert "Traceback" not in capfd.readouterr().err
