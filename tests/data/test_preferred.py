"""Judged answers of every form as pairs of documents: what is trained, what is refused, and that no pair is torn apart."""

import json
from itertools import pairwise

import numpy as np
import pairsrecipe
import pytest

from gigatrain import load
from gigatrain.data import build, pairs, preferred
from gigatrain.data.loader import Batches, Validation
from gigatrain.data.pack import Sample
from gigatrain.data.pairs import Pairs
from gigatrain.planning.plan import plan

GOOD, BAD = [{"role": "assistant", "content": "one two"}], [{"role": "assistant", "content": "two one"}]
ASKED = [{"role": "user", "content": "Count!"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferred")
    found = plan(load.recipe(pairsrecipe.write(folder)), load.site("laptop"))
    return found, build.build(found.data, found.tokenizer)


def documents(made, record):
    return preferred.documents(made[0].data.sources[0], json.dumps(record), made[1].tokenizer())


def both(made, record):
    """The documents of a record that is a pair."""
    found = documents(made, record)
    assert not isinstance(found, str), found
    return found


def text(made, ids):
    return made[1].tokenizer().backend.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},  # the messages that both begin with are the prompt
        {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},  # the prompt given twice
        {"prompt": "Count!", "chosen": GOOD, "rejected": BAD},
    ],
    ids=["prompt", "prefix", "twice", "text"],
)
def test_every_form_of_a_pair_is_the_same_two_documents(made, record):
    found = both(made, record)
    for (ids, trained), answer in zip(found, ("one two", "two one"), strict=True):
        assert text(made, ids[~trained]).startswith("<|im_start|>user\nCount!<|im_end|>\n<|im_start|>assistant\n")
        assert text(made, ids[trained]) == f"{answer}<|im_end|>"


def test_texts_go_without_a_template(made):
    (ids, trained), (other, _) = both(made, {"prompt": "1 2", "chosen": " 3", "rejected": " 9"})
    assert text(made, ids[trained]).startswith(" 3")
    assert trained[-1]
    assert ids[-1] == made[1].eos == other[-1]
    assert text(made, ids[~trained]) == "1 2"


def test_several_turns_after_the_prompt_are_trained_and_those_before_are_not(made):
    before = [*ASKED, {"role": "assistant", "content": "zero"}, {"role": "user", "content": "More!"}]
    ids, trained = both(made, {"prompt": before, "chosen": GOOD, "rejected": BAD})[0]
    assert "zero" in text(made, ids[~trained])
    assert text(made, ids[trained]) == "one two<|im_end|>"


@pytest.mark.parametrize("label", [True, False])
def test_an_answer_that_was_judged_alone_has_an_empty_side(made, label):
    found = both(made, {"prompt": ASKED, "completion": GOOD, "label": label})
    assert [len(ids) > 0 for ids, _ in found] == [label, not label]
    assert text(made, found[not label][0][found[not label][1]]) == "one two<|im_end|>"


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": ASKED, "chosen": GOOD}, "unparsable: no rejected"),
        ({"prompt": ASKED, "chosen": GOOD, "rejected": GOOD}, "both answers are the same"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": ASKED, "completion": GOOD}, "no label"),
        ({"prompt": ASKED, "completion": GOOD, "label": "yes"}, "neither true nor false"),
        ({"prompt": ASKED, "chosen": ASKED, "rejected": BAD}, "no turn of the assistant"),
        (
            {"prompt": ASKED, "chosen": [{"role": "assistant", "content": "<|im_end|>"}], "rejected": BAD},
            "unmarkable: a message holds the special token",
        ),
    ],
)
def test_what_is_no_pair_says_why(made, record, says):
    assert says in documents(made, record)


def test_no_pair_is_torn_apart(made):
    """Neither by validation nor by rows: every row shows one prompt twice, once with each of its answers; and the order is of seed and position alone."""
    found, corpus = made
    options = {"sequence": found.sequence, "packing": "document", "microbatch": 2, "form": "pair"}
    batches = Batches(corpus, batch=4, seed=3, prefetch=0, **options)
    held = Validation(corpus, **options)
    assert held.count > 0
    prompts = []
    for samples in (batches.samples[0], held.samples[0]):
        assert isinstance(samples, Pairs)
        for entry in range(len(samples.entries)):
            (a, mine), (b, theirs) = (samples._read(number) for number in samples._documents(entry))
            assert a[~mine][:-1].tolist() == b[~theirs][:-1].tolist()
            assert a[mine].tolist() != b[theirs].tolist()
            prompts.append((samples is held.samples[0], tuple(a), tuple(b)))
    both = [{one[1:] for one in prompts if one[0] == side} for side in (True, False)]
    assert not both[0] & both[1]
    one, other = batches.at(8), Batches(corpus, batch=4, seed=3, prefetch=0, rank=1, ranks=2, **options).at(8)
    assert one.targets == 4
    assert other.targets == 2
    assert (other.microbatches[0].tokens == one.microbatches[1].tokens).all()
    assert not (Batches(corpus, batch=4, seed=4, prefetch=0, **options).at(8).microbatches[0].tokens == one.microbatches[0].tokens).all()


def test_a_row_is_what_its_picture_says():
    sample = Sample(*(np.empty(12, kind) for kind in (np.int64, np.int64, np.int64, np.int32)))
    documents = [(np.array([5, 6, 7, 8]), np.array([False, False, True, True])), (np.array([5, 6, 9]), np.array([False, False, True]))]
    pairs.lay(documents, sample, 2)
    assert sample.tokens.tolist() == [5, 6, 7, 5, 6, *[2] * 7]
    assert sample.labels.tolist() == [-100, 7, 8, -100, 9, *[-100] * 7]
    assert sample.positions.tolist() == [0, 1, 2, *range(9)]
    assert sample.documents.tolist() == [0, 0, 0, *[1] * 9]
    answer = np.empty(12, np.bool_)
    pairs.lay(documents, sample, 2, answer=answer)
    assert sample.labels.tolist() == [6, 7, 8, 6, 9, *[-100] * 7]
    assert answer.tolist() == [False, True, True, False, True, *[False] * 7]


def test_a_foreign_answer_is_that_of_another_prompt(made):
    """Of kto: both answers of a pair are judged one by one, and neither is foreign to their prompt."""
    found, corpus = made
    (samples,) = Batches(corpus, sequence=found.sequence, packing="document", batch=4, seed=3, prefetch=0, form="single").samples
    assert isinstance(samples, Pairs)
    assert len(samples.entries) == 2 * corpus.totals("train")["documents"] // 2
    for entry in range(len(samples.entries)):
        other = samples._other(entry)
        assert samples.entries[other] // 2 != samples.entries[entry] // 2
        (ids, trained), (mine, answer), (theirs, its) = (
            samples._foreign(entry),
            samples._read(entry),
            samples._read(int(samples.entries[other])),
        )
        assert ids[: samples._begins(entry)].tolist() == mine[: samples._begins(entry)].tolist()
        assert ids[trained].tolist() == theirs[its].tolist()
        assert answer.any()


@pytest.mark.parametrize("stretch", [1, 300, 1 << 24])
def test_prompts_are_measured_without_reading_documents(made, monkeypatch, stretch):
    """Of kto: every answer's prompt is as long as its marks say, whatever is looked at together, and no token is read for it."""
    found, corpus = made
    monkeypatch.setattr(pairs, "STRETCH", stretch)
    stream = corpus.stream(0)
    read = []
    monkeypatch.setattr(stream, "read", lambda *place: read.append(place))
    samples = Pairs(stream, sequence=found.sequence, eos=corpus.eos, form="single", packed=False, name="x")
    assert not read
    bounds = np.concatenate([[0], samples.ends]).tolist()
    marks = [stream.trained(start, stop) for start, stop in pairwise(bounds)]
    assert samples.begins.tolist() == [int(np.argmax(one)) if one is not None and one.any() else 0 for one in marks]
    assert samples.begins.min() > 0
