"""Ids that a corpus can hold are known before it is built; those that none can hold need no row of the embedding."""

import dataclasses

import chatshapes
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from gigatrain.config import Data, Source, Tokenizer
from gigatrain.data import build, reach, templates, tokenizer
from gigatrain.errors import DataError

TEXT = (Source.model_validate({"kind": "text", "path": "x"}),)
CHAT = (Source.model_validate({"kind": "jsonl", "path": "x", "format": "chat"}),)


@pytest.fixture
def own(tmp_path):
    """A tokenizer with a template; its folder and how many ids it has."""
    chatshapes.made(tmp_path, "llama3", marks=False)
    return tmp_path, tokenizer.load(str(tmp_path)).vocab


def added(folder, name, *, special):
    file = folder / "tokenizer.json"
    backend = Backend.from_str(file.read_text())
    (backend.add_special_tokens if special else backend.add_tokens)([AddedToken(name, special=special, normalized=False)])
    file.write_text(backend.to_str())


def spec(folder, **more):
    return Tokenizer.model_validate({"from": str(folder), **more})


def test_a_token_that_nothing_writes_is_no_obstacle(own):
    """Gemma 3's image token: 262,145 ids, 262,144 rows."""
    folder, count = own
    added(folder, "<image_soft_token>", special=True)
    for sources in (TEXT, CHAT):
        assert reach.outside(spec(folder), sources, count) is None
    added(folder, "plainword", special=False)
    said = reach.outside(spec(folder), TEXT, count) or ""
    assert f"the tokenizer has {count + 2} ids and the model embeds {count}; 'plainword' ({count + 1})" in said
    assert f"--set model.architecture.vocab={count + 2}" in said


def test_what_a_template_writes_occurs_in_conversations_alone(own):
    folder, count = own
    assert reach.outside(spec(folder, template="chatml"), TEXT, count) is None
    said = reach.outside(spec(folder, template="chatml"), CHAT, count) or ""
    assert f"{count + 2} ids" in said
    assert "'<|im_start|>'" in said or "'<|im_end|>'" in said
    assert reach.outside(spec(folder, template="chatml"), CHAT, count + 2) is None
    templates.install(folder, spec(folder, template="chatml"))  # the same, once the tokenizer has them
    assert f"{count + 2} ids" in (reach.outside(spec(folder), CHAT, count) or "")
    assert reach.outside(spec(folder), TEXT, count) is None


def test_ends_of_documents_occur(own):
    folder, _ = own
    ready = tokenizer.load(str(folder))
    last = max(number for number in (ready.bos, ready.eos) if number is not None)
    assert reach.outside(spec(folder), TEXT, last) is not None
    assert reach.outside(Tokenizer.model_validate({"train": {"vocab": 300}}), TEXT, 1) is None


def test_an_id_without_a_row_is_refused_where_it_is_read(tmp_path):
    """What no look at the tokenizer can tell: a token that a template puts together, or ids that were made elsewhere."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some words of a text " * 50)
    data = Data.model_validate(
        {"sources": ({"kind": "text", "path": str(tmp_path / "texts")},), "folder": str(tmp_path / "cache"), "validation": 0.0}
    )
    corpus = build.build(data, Tokenizer.model_validate({"train": {"vocab": 270}}))
    stream = corpus.stream(0)
    highest = int(stream.read(0, corpus.totals("train")["tokens"]).max())
    assert (
        len(dataclasses.replace(corpus, embedded=highest + 1).stream(0).read(0, corpus.totals("train")["tokens"]))
        == corpus.totals("train")["tokens"]
    )
    with pytest.raises(DataError, match=f"{highest}"):
        dataclasses.replace(corpus, embedded=highest).stream(0).read(0, corpus.totals("train")["tokens"])
