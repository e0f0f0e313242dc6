"""Conversations of every form and kind of file become the same shards; what is no conversation is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import chatshapes
import pytest

from gigatrain import config
from gigatrain.data import messages, shown
from gigatrain.data.build import Corpus, build
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
    from gigatrain.data import build as module

    monkeypatch.setattr(module, "INLINE_BYTES", 0)
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
