"""Conversations of Python's own docstrings: what is asked and answered, what is refused, and that both forms hold out the same functions."""

import json
from pathlib import Path

import numpy as np

from gigatrain import config
from gigatrain.data import build, messages, sources, stdlib, tokenizer

MODULE = b'''
def join(a: str, *p, sep="/"):
    """Join two or more pathname components, inserting '/' as needed.  More is said.

    And more.
    """

class Path:
    def open(self, mode="r"):
        "Opens the file."
    def _hidden(self):
        "Nobody asks."

def lower():
    "begins small."

def bare(): pass
'''


def test_functions_are_read_from_source_and_nothing_is_run():
    first, second = stdlib.functions("os/path.py", MODULE)
    assert (first.name, first.signature, first.line) == ("os.path.join", "join(a, *p, sep='/')", 2)
    assert first.sentence == "Join two or more pathname components, inserting '/' as needed."
    assert (second.name, second.signature, second.sentence) == ("os.path.Path.open", "open(mode='r')", "Opens the file.")
    assert stdlib.functions("m.py", b"raise SystemExit(1)") == stdlib.functions("m.py", b"def (") == []
    assert stdlib.functions("_private/m.py", MODULE) == []


def test_right_answers_are_in_form_and_wrong_ones_never():
    count = 0
    for piece in sources.pieces(config.Source(kind="stdlib"), 1 << 30)[::7]:
        for _, _, record in stdlib.records(piece.name, Path(piece.path).read_bytes(), "preference"):
            question = record["prompt"][0]["content"]
            assert stdlib.judge(question, record["chosen"][0]["content"]) == "", record
            assert stdlib.judge(question, record["rejected"][0]["content"]), record
            count += 1
    assert count > 100
    assert stdlib.judge("What does os.path.join do?", "`split(a)`: Splits it.") == "another function"
    assert stdlib.judge("What does os.path.join do?", "`join(a)`: Joins it. Then more.") == "more than a sentence"
    assert stdlib.judge("What does os.path.join do?", "Joins it.") == "another form"


def test_a_corpus_of_them_trains_the_answer_alone_and_both_forms_hold_out_the_same(tmp_path, monkeypatch):
    few = [piece for piece in sources._stdlib() if piece.name in ("textwrap.py", "shlex.py", "posixpath.py", "heapq.py")]
    monkeypatch.setattr(sources, "_stdlib", lambda: few)
    spec = config.Tokenizer(train=config.TokenizerTraining(vocab=400), template="chatml")
    given = {
        "sources": [{"kind": "stdlib", "format": "chat"}],
        "folder": str(tmp_path),
        "packing": "packed",
        "validation": 0.3,
        "workers": 1,
    }
    corpus = build.build(config.Data.model_validate_json(json.dumps(given)), spec)
    assert corpus.totals("validation")["documents"] > 0
    ready = corpus.tokenizer()
    source = config.Source(kind="stdlib", format="chat")
    name, _, record = next(stdlib.records("textwrap.py", Path(few[-1].path).read_bytes(), "chat"))
    ((ids, trained),) = messages.samples(source, messages.text_of(source, record), ready)
    answer = ready.backend.decode(np.asarray(ids)[np.asarray(trained, bool)].tolist(), skip_special_tokens=False)
    assert answer == record["messages"][1]["content"] + "<|im_end|>"
    assert name.startswith("textwrap.")

    def held(form):
        found = config.Source(kind="stdlib", format=form)
        return [raw.key for part in sources.parts(0, found, 1 << 30) for raw in sources.read(found, part)]

    assert held("chat") == held("preference")
    assert isinstance(ready, tokenizer.Tokenizer)
