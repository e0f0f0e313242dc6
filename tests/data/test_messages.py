"""Conversations of every form and kind of file become the same shards; what is no conversation is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import chatshapes
import pytest

from gigatrain import config
from gigatrain.data import messages, shown, workers
from gigatrain.data.build import build
from gigatrain.data.corpus import Corpus
from gigatrain.data.loader import Batches
from gigatrain.data.messages import Unparsable
from gigatrain.errors import DataError

CHATS = [
    [{"role": "system", "content": "Add."}, {"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": f"It is {n + 1}."}]
    + ([{"role": "user", "content": "für 日本?"}, {"role": "assistant", "content": "Ja 🙂"}] if n % 2 else [])
    for n in range(40)
]


def source(path: Path, form: str = "chat", kind: Any = "jsonl", **more: Any) -> config.Source:
    return config.Source(kind=kind, path=str(path), format=form, **more)  # type: ignore[arg-type]


def data(folder: Path, *sources: config.Source, **more: Any) -> config.Data:
    return config.Data(sources=sources, folder=str(folder / "cache"), **{"validation": 0.0, "workers": 1, "packing": "packed"} | more)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> config.Tokenizer:
    """A tokenizer that exists, with ChatML's tokens."""
    folder = tmp_path_factory.mktemp("own")
    chatshapes.made(folder, "chatml", marks=True)
    return config.Tokenizer(source=str(folder))  # type: ignore[call-arg]


def documents(corpus: Corpus, split: str = "train") -> list[list[tuple[str, bool]]]:
    return [shown.pieces(corpus, 0, split, number) for number in range(corpus.stream(0, split).documents)]


def parsed(form: str, record: Any) -> Any:
    one = source(Path("x"), form)
    return messages.parse(one, messages.text_of(one, record))


def test_forms_that_people_store() -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert parsed("chat", {"messages": [user, assistant], "id": 3}).messages == (user, assistant)
    assert parsed(
        "chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, assistant | {"name": None}]}
    ).messages == (
        user,
        assistant,
    )
    sharegpt = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "S"}
    assert parsed("sharegpt", sharegpt).messages == ({"role": "system", "content": "S"}, user, assistant)
    alpaca = {"instruction": "i", "input": "j", "output": "b", "history": [["a", "b"]]}
    assert parsed("alpaca", alpaca).messages == (user, assistant, {"role": "user", "content": "i\n\nj"}, assistant)
    assert parsed("alpaca", {"instruction": "a", "input": "", "output": "b"}).messages == (user, assistant)
    assert parsed("completion", {"prompt": "a", "completion": "b"}).texts == ("a", "b")
    both = parsed("completion", {"prompt": [user, assistant, user], "completion": [assistant]})
    assert (len(both.messages), both.after) == (4, 3)


def test_tool_calls_and_tools() -> None:
    """Arguments as OpenAI stores them, a text of JSON, become an object; tools may be a text of JSON; ShareGPT's calls are the assistant's."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    found = parsed("chat", {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}], "tools": json.dumps([tool])})
    assert found.messages[0] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": 1}}}],
    }
    assert found.tools == (tool,)
    turns = [{"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}, {"from": "observation", "value": "3"}]
    one, two = parsed("sharegpt", {"conversations": turns}).messages
    assert one["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert two == {"role": "tool", "content": "3"}


@pytest.mark.parametrize(
    ("form", "record", "why"),
    [
        ("chat", {"text": "x"}, "no messages"),
        ("chat", {"messages": []}, "empty"),
        ("chat", {"messages": "hello"}, "a text, and not a list"),
        ("chat", {"messages": [{"role": "narrator", "content": "x"}]}, "turn 0 has role 'narrator'; known are human, user"),
        ("chat", {"messages": [{"role": "user", "content": 3}]}, "turn 0 holds a int"),
        ("chat", {"messages": [{"role": "user"}]}, "neither content nor tool_calls"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "holds 'image_url', and only text"),
        ("chat", {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "no JSON"),
        ("sharegpt", {"messages": []}, "no conversations"),
        ("alpaca", {"instruction": "a", "output": " "}, "output is empty"),
        ("completion", {"prompt": "a"}, "no completion"),
        ("chat", ["x"], "not a record"),
    ],
)
def test_what_is_no_conversation(form: str, record: Any, why: str) -> None:
    with pytest.raises(Unparsable, match=why):
        parsed(form, record)


def test_every_kind_of_file_gives_the_same_tokens(tmp_path: Path, own: config.Tokenizer) -> None:
    """JSON lines, Parquet (whose structs have every key), a dataset's folder, and ShareGPT's names."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": chat, "n": number} for number, chat in enumerate(CHATS)]
    jsonl(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([*rows, {"messages": [{"role": "user", "content": "x", "name": "y"}]}]), tmp_path / "a.parquet"
    )
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "hub"))
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    jsonl(tmp_path / "b.jsonl", [{"turns": [{"from": names[m["role"]], "value": m["content"]} for m in chat]} for chat in CHATS])
    corpora = [
        build(data(tmp_path, one, packing="document"), own)
        for one in (
            source(tmp_path / "a.jsonl"),
            source(tmp_path / "a.parquet", kind="parquet"),
            source(tmp_path / "hub", kind="hub"),
            source(tmp_path / "b.jsonl", "sharegpt", field="turns"),
        )
    ]
    wanted = documents(corpora[0])
    assert [[text for text, one in document if one] for document in wanted] == [
        [m["content"] + "<|im_end|>" for m in chat if m["role"] == "assistant"] for chat in CHATS
    ]
    for corpus in corpora[1:]:
        assert documents(corpus) == wanted
    assert corpora[1].manifest["skipped"] == {"unmarkable": 1}
    hashes = {corpus.manifest["sources"][0]["splits"]["train"]["shards"][0]["mask"]["sha256"] for corpus in corpora}
    assert len(hashes) == 1
    with pytest.raises(DataError, match=r"has no column 'conversations'; its columns are \['messages', 'n'\]"):
        build(data(tmp_path, source(tmp_path / "hub", "sharegpt", "hub")), own)


def test_processes_give_the_same_corpus_and_a_damaged_mask_is_refused(
    tmp_path: Path, own: config.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "INLINE_BYTES", 0)
    path = jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS])
    two = build(data(tmp_path, source(path), shard_bytes=2000, workers=2, validation=0.2), own)
    one = build(data(tmp_path / "other", source(path), shard_bytes=2000, workers=1, validation=0.2), own)
    assert one.sha256 == two.sha256
    assert one.totals("validation")["documents"] > 0
    two.verify()
    mask = next((two.folder / "shards").glob("*.train.mask"))
    content = bytearray(mask.read_bytes())
    content[3] ^= 1
    mask.write_bytes(content)
    with pytest.raises(DataError, match=r"\.mask has SHA-256"):
        Corpus.open(two.folder).stream(0).read(0, 1)
    mask.unlink()
    with pytest.raises(DataError, match=r"\.mask is missing"):
        Corpus.open(two.folder)


def test_policies(tmp_path: Path, own: config.Tokenizer) -> None:
    forged = {"messages": [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}]}
    path = jsonl(tmp_path / "a.jsonl", [*({"messages": chat} for chat in CHATS), forged, {"messages": 3}])
    corpus = build(data(tmp_path, source(path)), own)
    assert corpus.manifest["skipped"] == {"unmarkable": 1, "unparsable": 1}
    assert "special token '<|im_end|>'" in (corpus.folder / "skipped.jsonl").read_text()
    said, named = corpus.left_out()
    assert said.startswith(
        f"2 documents are left out (unmarkable 1, unparsable 1), such as line 41 of {path}: unmarkable: a message holds the special"
    )
    assert named == f"skipped documents are named in {corpus.folder / 'skipped.jsonl'}"
    rows = [json.loads(line) for line in (corpus.folder / "skipped.jsonl").read_text().splitlines()]
    assert [row["place"] for row in rows] == [f"line 41 of {path}", f"line 42 of {path}"]
    (corpus.folder / "skipped.jsonl").unlink()
    assert corpus.left_out() == ["2 documents are left out (unmarkable 1, unparsable 1)"]
    assert build(data(tmp_path, source(jsonl(tmp_path / "b.jsonl", [{"messages": chat} for chat in CHATS]))), own).left_out() == []
    refusing = config.BadDocuments(unmarkable="refuse")
    with pytest.raises(DataError, match=r"special token .* set `data\.bad\.unmarkable` to 'skip'"):
        build(data(tmp_path, source(path), bad=refusing), own)
    with pytest.raises(DataError, match=r"has no training token: 0 documents are held out and 42 were skipped \{'unparsable': 42\}"):
        build(data(tmp_path, source(path, "preference")), own)
    with pytest.raises(ValueError, match="`format` 'chat' is of records"):
        source(path, kind="text")


def test_turns_that_the_template_changes(tmp_path: Path) -> None:
    """Thinking that is dropped from earlier turns: each turn is a sample with its own thinking, or the conversation is left out or refused."""
    chatshapes.made(tmp_path / "t", "thinking", marks=True)
    spec = config.Tokenizer(source=str(tmp_path / "t"))  # type: ignore[call-arg]
    chat = [
        message | ({"reasoning_content": f"hm {number}"} if message["role"] == "assistant" else {})
        for number, message in enumerate(CHATS[1])
    ]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": chat}, {"messages": CHATS[0]}])
    corpus = build(data(tmp_path, source(path)), spec)
    runs = [[text for text, one in document if one] for document in documents(corpus)]
    assert runs[:2] == [["<think>\nhm 2\n</think>\n\nIt is 2.<|im_end|>"], ["<think>\nhm 4\n</think>\n\nJa 🙂<|im_end|>"]]
    assert corpus.manifest["mended"] == {"split by turn": 1}
    assert build(data(tmp_path, source(path, history="skip")), spec).manifest["skipped"] == {"history": 1}
    with pytest.raises(DataError, match="writes turn 2 in another way once others follow it.*set `history`"):
        build(data(tmp_path, source(path, history="refuse")), spec)


def test_a_template_for_a_tokenizer_that_has_none(tmp_path: Path, own: config.Tokenizer) -> None:
    """Built in or a file; its special tokens are added behind the others, transformers reads the folder, and other templates are other corpora."""
    import transformers

    assert own.source is not None
    bare = tmp_path / "bare"
    chatshapes.made(bare, "llama3", marks=False)
    (bare / "chat_template.jinja").unlink()
    path = jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS])
    with pytest.raises(DataError, match=r"holds conversations \(chat\).* has no chat template; name one: tokenizer\.template"):
        build(data(tmp_path, source(path)), config.Tokenizer(source=str(bare)))  # type: ignore[call-arg]
    corpus = build(data(tmp_path, source(path)), config.Tokenizer(source=str(bare), template="chatml"))  # type: ignore[call-arg]
    theirs: Any = transformers.AutoTokenizer.from_pretrained(corpus.folder / "tokenizer")
    before = chatshapes.made(tmp_path / "again", "llama3", marks=False).vocab
    assert corpus.vocab == before + 2 == len(theirs)
    for number, chat in enumerate(CHATS):
        found = theirs.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
        ids, trained = shown.document(corpus, 0, "train", number)
        assert ids.tolist() == list(found["input_ids"])
        assert trained.tolist() == [bool(one) for one in found["assistant_masks"]]
    file = tmp_path / "mine.jinja"
    file.write_text(chatshapes.template("chatml", marks=False).replace("im_", "my_"))
    mine = config.Tokenizer(source=str(bare), template=str(file), special=("<|my_start|>", "<|my_end|>"))  # type: ignore[call-arg]
    other = build(data(tmp_path, source(path)), mine)
    assert other.folder != corpus.folder
    assert documents(other)[0][-2][0] == "It is 1.<|my_end|>"
    with pytest.raises(DataError, match="neither built in \\(chatml\\) nor a file"):
        build(data(tmp_path, source(path)), config.Tokenizer(source=str(bare), template="chatmall"))  # type: ignore[call-arg]


def test_a_corpus_of_text_keeps_its_name(tmp_path: Path) -> None:
    """Keys that came with conversations change no corpus that has none: its identity has only the keys that there were."""
    (tmp_path / "a.txt").write_text("some text " * 50)
    text = config.Data(sources=(config.Source(kind="text", path=str(tmp_path / "a.txt")),), folder=str(tmp_path / "c"), validation=0.0)
    corpus = build(text, config.Tokenizer(train=config.TokenizerTraining(vocab=300)))
    said = json.loads((corpus.folder / "spec.json").read_text())
    assert set(said) == {"format", "sources", "tokenizer", "bad", "validation", "shard_bytes", "inputs"}
    assert set(said["sources"][0]) == {"kind", "path", "pattern", "field", "subset", "split", "revision"}
    assert set(said["tokenizer"]) == {"source", "train", "pieces"}
    assert "unmarkable" not in said["bad"]


def test_packed_batches_go_on_where_they_were(tmp_path: Path, own: config.Tokenizer) -> None:
    """From any position, on any number of ranks, the same rows follow; the state is a few numbers."""
    path = jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS])
    corpus = build(data(tmp_path, source(path)), own)

    def batches(rank: int = 0, ranks: int = 1, seed: int = 3) -> Batches:
        return Batches(corpus, sequence=96, packing="packed", batch=4, seed=seed, rank=rank, ranks=ranks, prefetch=0)

    whole = batches()
    steps = [next(whole) for _ in range(12)]  # more than one epoch
    assert len(whole.samples[0]) < 44
    half = batches()
    for _ in range(5):
        next(half)
    state = json.loads(json.dumps(half.state()))
    assert len(json.dumps(state)) < 400
    for ranks in (1, 2):
        readers = [batches(rank, ranks) for rank in range(ranks)]
        for reader in readers:
            reader.load(state)
        for step in steps[5:]:
            parts = [next(reader) for reader in readers]
            rows = [row for part in parts for row in part.microbatches[0].labels.tolist()]
            assert rows == step.microbatches[0].labels.tolist()
            assert sum(part.targets for part in parts) == step.targets
    assert [step.microbatches[0].tokens.tolist() for step in steps] != [
        next(one).microbatches[0].tokens.tolist() for one in [batches(seed=4)] for _ in range(12)
    ]


def test_adopted_megatron_shards_bring_their_marks(tmp_path: Path, own: config.Tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS])
    corpus = build(data(tmp_path, source(path)), own)
    prefix = next((corpus.folder / "shards").glob("*.bin")).with_suffix("")
    for suffix in (".bin", ".idx", ".mask"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"moved{suffix}")
    again = config.Source(kind="megatron", path=str(tmp_path / "moved"))
    adopted = build(data(tmp_path, again), config.Tokenizer(source=str(corpus.folder / "tokenizer")))  # type: ignore[call-arg]
    assert documents(adopted) == documents(corpus)
    (tmp_path / "moved.mask").unlink()
    bare = build(data(tmp_path / "new", again), config.Tokenizer(source=str(corpus.folder / "tokenizer")))  # type: ignore[call-arg]
    assert all(one for document in documents(bare) for _, one in document)


def test_showing(tmp_path: Path, own: config.Tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS])
    corpus = build(data(tmp_path, source(path), validation=0.3), own)
    lines = "\n".join(shown.lines(corpus, 1, sequence=96, packing="packed", colour=False))
    assert "rows of 96" in lines
    assert "% padding" in lines
    first = documents(corpus)[0]
    assert "".join(f"⟪{text}⟫" if one else text for text, one in first) in lines
    held = shown.asked(corpus, 3)
    assert len(held) == 3
    backend = corpus.tokenizer().backend
    for one in held:
        assert backend.decode(one.prompt, skip_special_tokens=False).endswith("<|im_start|>assistant\n")
        assert backend.decode(one.answer, skip_special_tokens=False).endswith("<|im_end|>")
    assert shown.asked(corpus, 1000)[0] == shown.asked(corpus, 1)[0]
    with pytest.raises(DataError, match="no train document 99"):
        shown.document(corpus, 0, "train", 99)


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Now.",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"type": "string", "default": None, "enum": ["C", None]}, "city": {"type": "string"}},
            "required": ["unit", "city"],
        },
    },
}


def test_tools_are_written_as_transformers_writes_the_record(tmp_path: Path, own: config.Tokenizer) -> None:
    """Keys in the record's order, and those that hold null: of schemas and of arguments, which are an object or a text of JSON."""
    import transformers

    arguments = {"unit": None, "city": "Bern", "at": {"z": 1, "a": [None, {"y": None, "b": 0}]}}
    records = []
    for given in (arguments, json.dumps(arguments)):
        call = {"id": "1", "type": "function", "function": {"arguments": given, "name": "weather"}}
        turns: list[Any] = [
            {"role": "user", "content": "Cold?"},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
            {"content": "3", "role": "tool"},
            {"role": "assistant", "content": "Yes."},
        ]
        records.append({"messages": turns, "tools": [TOOL]})
    corpus = build(data(tmp_path, source(jsonl(tmp_path / "a.jsonl", records)), packing="document"), own)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(corpus.folder / "tokenizer")
    asked: list[Any] = [turn | {"content": turn["content"] or ""} for turn in records[0]["messages"]]
    wanted = theirs.apply_chat_template(asked, tools=[TOOL], tokenize=False)
    assert (
        '"parameters": {"type": "object", "properties": {"unit": {"type": "string", "default": null, "enum": ["C", null]}, "city"' in wanted
    )
    assert '{"arguments": {"unit": null, "city": "Bern", "at": {"z": 1, "a": [null, {"y": null, "b": 0}]}}, "name": "weather"}' in wanted
    assert ["".join(text for text, _ in document) for document in documents(corpus)] == [wanted] * 2
    turn = [
        {"from": "human", "value": "Cold?"},
        {"from": "function_call", "value": json.dumps({"arguments": arguments, "name": "weather"})},
    ]
    (called,) = parsed("sharegpt", {"conversations": turn}).messages[1]["tool_calls"]
    assert json.dumps(called["function"]) == json.dumps({"arguments": arguments, "name": "weather"})


def test_order_and_nulls_do_not_decide_what_is_held_out(tmp_path: Path, own: config.Tokenizer) -> None:
    """The same conversations of Parquet, whose structs have every key, and of JSON lines with their keys in another order, are held out alike."""
    import pyarrow
    import pyarrow.parquet

    named = [*CHATS, [turn | {"name": "x"} for turn in CHATS[0]]]
    jsonl(tmp_path / "a.jsonl", [{"messages": [dict(reversed(turn.items())) for turn in chat]} for chat in named])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat} for chat in named]), tmp_path / "a.parquet")
    held = [
        sorted(str(one) for one in documents(build(data(tmp_path, one, validation=0.3), own), "validation"))
        for one in (source(tmp_path / "a.jsonl"), source(tmp_path / "a.parquet", kind="parquet"))
    ]
    assert held[0] == held[1]
    assert 0 < len(held[0]) < len(CHATS)


@pytest.mark.parametrize("marks", [True, False])
def test_turns_that_say_they_are_not_trained_are_context(tmp_path: Path, marks: bool) -> None:
    """OpenAI's `weight` and `train`: written as ever, and the marks are off; in every format of turns, also behind a system's text and where turns split."""
    chatshapes.made(tmp_path / "t", "chatml", marks=marks)
    spec = config.Tokenizer(source=str(tmp_path / "t"))  # type: ignore[call-arg]
    user, no, yes = {"role": "user", "content": "a"}, {"role": "assistant", "content": "no"}, {"role": "assistant", "content": "yes"}
    for said in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 0, "train": False}):
        path = jsonl(tmp_path / "a.jsonl", [{"messages": [user, no | said, user, yes | {"weight": 1, "train": None}]}])
        found = documents(build(data(tmp_path, source(path), packing="document"), spec))[0]
        assert [text for text, one in found if one] == ["yes<|im_end|>"]
        assert "no<|im_end|>" in "".join(text for text, _ in found)
    turns = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "no", "train": False},
        {"from": "human", "value": "b"},
        {"from": "gpt", "value": "yes"},
    ]
    path = jsonl(tmp_path / "b.jsonl", [{"conversations": turns, "system": "S"}])
    found = documents(build(data(tmp_path, source(path, "sharegpt"), packing="document"), spec))[0]
    assert [text for text, one in found if one] == ["yes<|im_end|>"]
    path = jsonl(tmp_path / "c.jsonl", [{"prompt": [user], "completion": [no | {"weight": 0}, user, yes]}])
    found = documents(build(data(tmp_path, source(path, "completion"), packing="document"), spec))[0]
    assert [text for text, one in found if one] == ["yes<|im_end|>"]
    path = jsonl(
        tmp_path / "d.jsonl", [{"chosen": [user, no | {"weight": 0}, user, yes], "rejected": [user, no, user, yes | {"content": "mm"}]}]
    )
    pair = documents(build(data(tmp_path, source(path, "preference"), packing="document"), spec))
    assert [[text for text, one in document if one] for document in pair] == [["yes<|im_end|>"], ["mm<|im_end|>"]]
    chatshapes.made(tmp_path / "thinks", "thinking", marks=marks)
    path = jsonl(tmp_path / "e.jsonl", [{"messages": [user, no | {"thinking": "hm", "weight": 0}, user, yes]}])
    thinks = config.Tokenizer(source=str(tmp_path / "thinks"))  # type: ignore[call-arg]
    split = documents(build(data(tmp_path, source(path), packing="document"), thinks))
    assert [[text[-14:] for text, one in document if one] for document in split] == [["\nyes<|im_end|>"]]


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        ({"weight": 0.5}, r"turn 1 has weight 0\.5; 0 and 1 are known"),
        ({"weight": True}, "turn 1 has weight true; 0 and 1"),
        ({"weight": "0"}, 'turn 1 has weight "0"; 0 and 1'),
        ({"train": 0}, "turn 1 has train 0; true and false are known"),
        ({"train": "no"}, 'turn 1 has train "no"'),
        ({"train": False, "weight": 1}, "turn 1 has weight 1 and train false, which contradict each other"),
        ({"role": "user", "train": True}, r"turn 1 of the user is to be trained \(train\), and only what the assistant writes can be"),
        ({"content": " \n"}, 'turn 1 of the assistant is empty; mend it, or give it "weight": 0'),
        ({"content": ""}, "turn 1 of the assistant is empty"),
        ({"content": "", "tool_calls": []}, "turn 1 of the assistant is empty"),
    ],
)
def test_marks_and_answers_that_mean_nothing(turn: dict[str, Any], why: str) -> None:
    with pytest.raises(Unparsable, match=why):
        parsed("chat", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | turn]})


def test_what_says_nothing_and_is_not_trained_may_stay() -> None:
    user, empty = {"role": "user", "content": "", "weight": 0, "train": False}, {"role": "assistant", "content": ""}
    call = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert len(parsed("chat", {"messages": [user, empty | call, empty | {"reasoning_content": "hm"}, empty | {"weight": 0}]}).messages) == 4
    assert parsed("completion", {"prompt": [user, empty], "completion": [{"role": "assistant", "content": "b"}]}).after == 2
    with pytest.raises(Unparsable, match="turn 2 of the assistant is empty"):
        parsed("completion", {"prompt": [user, empty], "completion": [empty]})


@pytest.mark.parametrize("form", ["chat", "text"])
def test_a_byte_order_mark_loses_no_record(tmp_path: Path, own: config.Tokenizer, form: str) -> None:
    import gzip

    rows = "".join(json.dumps({"messages": chat, "text": str(chat)}) + "\n" for chat in CHATS[:3]).encode()
    for name, content in (("a.jsonl", b"\xef\xbb\xbf" + rows), ("b.jsonl", rows), ("c.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + rows))):
        (tmp_path / name).write_bytes(content)
        corpus = build(data(tmp_path, source(tmp_path / name, form), packing="document", shard_bytes=100), own)
        assert corpus.manifest["skipped"] == {}
        assert corpus.totals("train")["documents"] == 3


TEXTS = {"prompt": "a", "completion": "b"}
TURN = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("form", "field", "record", "lacks", "way"),
    [
        ("chat", "text", {"conversations": TURN, "id": 1}, "no messages; it has conversations, id", "format=sharegpt"),
        ("sharegpt", "text", {"messages": TURN}, "no conversations; it has messages", "format=chat"),
        ("sharegpt", "conversations", {"id": 1, "messages": TURN}, "no conversations; it has id, messages", "field=messages"),
        ("chat", "messages", {"conversations": TURN}, "no messages; it has conversations", "field=conversations"),
        ("chat", "text", {"dialogue": TURN}, "no messages; it has dialogue", "field=dialogue"),
        ("chat", "text", TEXTS, "no messages; it has prompt, completion", "format=completion"),
        ("alpaca", "text", TEXTS, "no instruction, output; it has prompt, completion", "format=completion"),
        ("completion", "text", {"instruction": "a", "output": "b"}, "no prompt, completion; it has instruction, output", "format=alpaca"),
        ("preference", "text", {"messages": TURN}, "no chosen and rejected; it has messages", "format=chat"),
        ("text", "text", {"messages": TURN}, "no text in field 'text'; it has messages", "format=chat"),
    ],
)
def test_a_file_of_which_nothing_can_be_read_says_why_and_how_it_could_be(
    tmp_path: Path, own: config.Tokenizer, form: str, field: str, record: Any, lacks: str, way: str
) -> None:
    """The first record by file and line, what it lacks and has, and the key of the source that reads it: which then does."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n" + (json.dumps(record) + "\n") * 30)
    sources = (source(jsonl(tmp_path / "b.jsonl", [{"messages": CHATS[0]}])), source(path, form, field=field))
    said = rf"30 were skipped \{{'unparsable': 30\}}; the first, line 3 of {path}, is unparsable: {lacks}: --set data\.sources\.1\.{way}$"
    with pytest.raises(DataError, match=said):
        build(data(tmp_path, *sources), own)
    fresh = config.Tokenizer(train=config.TokenizerTraining(vocab=300), template="chatml")
    said = rf"no training document to train a tokenizer on, in 1 sources; the first, line 3 of {path}, is .*--set data\.sources\.0\.{way}$"
    with pytest.raises(DataError, match=said):
        build(data(tmp_path, sources[1]), fresh)
    key, _, value = way.partition("=")
    corpus = build(data(tmp_path, sources[1].model_copy(update={key: value})), own)
    assert corpus.totals("train")["documents"] == 30


def test_reasons_where_no_column_is_missing(tmp_path: Path, own: config.Tokenizer) -> None:
    import gzip

    import pyarrow
    import pyarrow.parquet

    rows = (json.dumps({"messages": [{"role": "narrator", "content": "x"}]}) + "\n") * 3
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(('{"messages": [\n' + rows).encode()))
    with pytest.raises(
        DataError, match=rf"4 were skipped .*; the first, line 1 of {path}, is unparsable: no JSON: Expecting value at character 1"
    ):
        build(data(tmp_path, source(path)), own)
    path.write_bytes(gzip.compress(("\n" + rows).encode()))
    with pytest.raises(
        DataError, match=rf"the first, line 2 of {path}, is unparsable: turn 0 has role 'narrator'; known are .*function_call, tool_call$"
    ):
        build(data(tmp_path, source(path)), own)
    short = config.BadDocuments(short="skip", min_tokens=1000)
    path = jsonl(tmp_path / "b.jsonl", [{"messages": chat} for chat in CHATS])
    with pytest.raises(DataError, match=rf"the first, line 1 of {path}, is short: .*; add documents, loosen `data\.bad`"):
        build(data(tmp_path, source(path), bad=short), own)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": CHATS[0]}]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'conversations'; its columns are \['messages'\]: set format=chat of the source"):
        build(data(tmp_path, source(tmp_path / "a.parquet", "sharegpt", kind="parquet")), own)


def test_a_validation_set_names_its_own_key(tmp_path: Path, own: config.Tokenizer) -> None:
    from gigatrain.data.held import build_sets

    made = data(tmp_path, source(jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS])))
    corpus = build(made, own)
    path = jsonl(tmp_path / "b.jsonl", [{"conversations": TURN}])
    sets = config.ValidationSet(name="held", kind="jsonl", path=str(path), format="chat")
    with pytest.raises(DataError, match=r"--set validation\.sets\.0\.format=sharegpt$"):
        build_sets(corpus, made, (sets,))
