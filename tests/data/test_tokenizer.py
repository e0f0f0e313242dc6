"""Tokenizers: round trips, determinism, transformers' view of the folder, and every way of naming an existing one."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import text
from hypothesis import given, settings
from hypothesis import strategies as st

from gigatrain.data import tokenizer
from gigatrain.errors import DataError

TEXTS = [text(seed, 60) for seed in range(40)] + ["def f(x):\n        return x\n\n\nclass A:\n    pass\n" * 50]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    return tokenizer.train(TEXTS, 330, tmp_path_factory.mktemp("tokenizer"))


def test_special_token_and_size(ours: tokenizer.Tokenizer) -> None:
    assert (ours.vocab, ours.bos, ours.eos, ours.start) == (330, None, 0, 0)
    assert ours.backend.id_to_token(0) == tokenizer.END
    assert ours.files == ("tokenizer.json", "tokenizer_config.json")


def test_a_document_is_its_text_and_eos(ours: tokenizer.Tokenizer) -> None:
    (ids,) = ours.documents(["def f"])
    assert ids.dtype == np.int64
    assert ids.tolist() == [*ours.encode("def f"), 0]


def test_line_end_and_indentation_are_one_token(ours: tokenizer.Tokenizer) -> None:
    assert "):\n        " in [ours.decode([i]) for i in ours.encode("f(x):\n        return")]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_round_trip(ours: tokenizer.Tokenizer, value: str) -> None:
    ids = ours.encode(value)
    assert ours.decode(ids) == value
    assert all(0 < i < ours.vocab for i in ids)


def test_text_cannot_forge_the_end(ours: tokenizer.Tokenizer) -> None:
    value = "a<|endoftext|>b"
    (ids,) = ours.documents([value])
    assert ids.tolist().count(0) == 1
    assert ours.decode(ids) == value


def test_training_is_deterministic(ours: tokenizer.Tokenizer, tmp_path: Path) -> None:
    again = tokenizer.train(reversed(TEXTS), 330, tmp_path / "again")
    assert again.sha256 == ours.sha256
    assert tokenizer.train(TEXTS[:-1], 330, tmp_path / "other").sha256 != ours.sha256


def test_auto_tokenizer_loads_it(ours: tokenizer.Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(ours.folder), local_files_only=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (0, 0, 0, 330)
    for value in TEXTS[:5]:
        ids = ours.encode(value)
        assert theirs(value)["input_ids"] == [0, *ids]
        assert theirs(value, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode(ids) == value


def test_load_from_file_folder_and_keep(ours: tokenizer.Tokenizer, tmp_path: Path) -> None:
    for source in (ours.folder, ours.folder / "tokenizer.json"):
        assert tokenizer.load(str(source)).sha256 == ours.sha256
    (tmp_path / "bare.json").write_bytes(ours.file.read_bytes())  # nothing beside it: <|endoftext|> is the only known end
    bare = tokenizer.load(str(tmp_path / "bare.json"))
    assert (bare.eos, bare.bos, bare.files) == (0, None, ("bare.json",))
    (tmp_path / "kept").mkdir()
    kept = tokenizer.keep(bare, tmp_path / "kept")
    assert kept.files == ("tokenizer.json", "tokenizer_config.json")
    assert (kept.eos, kept.sha256) == (0, ours.sha256)


def existing(folder: Path, settings: dict, *, bos_in_front: bool) -> tokenizer.Tokenizer:
    """A word-level tokenizer with <s> = 0, </s> = 1, as other families have them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "b": 9}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    if bos_in_front:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.load(str(folder))


def test_distinct_bos(tmp_path: Path) -> None:
    found = existing(tmp_path / "a", {"bos_token": "<s>", "eos_token": {"content": "</s>"}}, bos_in_front=True)
    assert (found.vocab, found.bos, found.eos, found.start) == (10, 0, 1, 0)
    assert [ids.tolist() for ids in found.documents(["a b", "b"])] == [[0, 3, 9, 1], [0, 9, 1]]
    found = existing(tmp_path / "b", {"bos_token": "<s>", "eos_token": "</s>"}, bos_in_front=False)
    assert found.bos is None
    found = existing(tmp_path / "c", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}, bos_in_front=False)
    assert found.bos == 0


def test_unusable_ones_are_refused(tmp_path: Path, ours: tokenizer.Tokenizer) -> None:
    with pytest.raises(DataError, match=r"vocab is 256, and the 256 bytes and <\|endoftext\|> need 257"):
        tokenizer.train(TEXTS, 256, tmp_path / "small")
    with pytest.raises(DataError, match=r"tokenizer\.from is '\./nowhere', and there is no such file"):
        tokenizer.load("./nowhere")
    with pytest.raises(DataError, match=r"has no tokenizer\.json; save one there"):
        tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer that `tokenizers` can read"):
        tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_bytes(ours.file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(DataError, match="eos_token '<none>', which is not in its vocabulary"):
        tokenizer.load(str(tmp_path))
    existing(tmp_path / "x", {"eos_token": "</s>"}, bos_in_front=False)
    (tmp_path / "x" / "tokenizer_config.json").unlink()
    path = tmp_path / "x" / "tokenizer.json"
    path.write_text(path.read_text().replace("</s>", "[END]"))
    with pytest.raises(DataError, match=r"says which token ends a document \(found none"):
        tokenizer.load(str(path))
