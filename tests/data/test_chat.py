"""Which tokens of a conversation are trained: template by template, against transformers' own mask, and with texts of all kinds."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chatshapes
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gigatrain.data import chat
from gigatrain.data.chat import Changed, Unmarkable
from gigatrain.data.tokenizer import Tokenizer
from gigatrain.errors import DataError

SHAPES = list(chatshapes.TEMPLATES)
Both = Callable[..., tuple[Tokenizer, Tokenizer]]


def turns(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """user, assistant, user, …"""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts, strict=False)]


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """The tokenizer of a shape, with a template that marks what is trained and with one that does not."""
    made: dict[Any, tuple[Tokenizer, Tokenizer]] = {}

    def of(shape: str, swallows: bool = False) -> tuple[Tokenizer, Tokenizer]:
        if (shape, swallows) not in made:
            folder = tmp_path_factory.mktemp(shape)
            made[shape, swallows] = tuple(
                chatshapes.made(folder / str(marks), shape, marks=marks, swallows=swallows) for marks in (True, False)
            )  # type: ignore[assignment]
        return made[shape, swallows]

    return of


def theirs(tokenizer: Tokenizer, messages: list[dict[str, Any]], **more: Any) -> tuple[list[int], list[bool]]:
    """What transformers makes of it."""
    import transformers

    own = transformers.AutoTokenizer.from_pretrained(tokenizer.folder)
    found: Any = own.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True, **more)
    return list(found["input_ids"]), [bool(one) for one in found["assistant_masks"]]


def said(tokenizer: Tokenizer, rendered: tuple[list[int], list[bool]]) -> list[str]:
    """The runs of trained tokens as text, special tokens included."""
    runs = [list(run) for trained, run in itertools.groupby(zip(*rendered, strict=True), key=lambda pair: pair[1]) if trained]
    return [tokenizer.backend.decode([token for token, _ in run], skip_special_tokens=False) for run in runs]


CONVERSATIONS = [
    turns("What is 2+2?", "It is 4."),
    turns("Hello, world!", "für 日本語 🙂", "And\n\n 3?", "def add(a, b):\n    return a + b", system="Be short."),
    turns("a", "b", "c", "d", "e", "f"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_marks_are_those_of_transformers(both: Both, shape: str, messages: list[dict[str, Any]]) -> None:
    """With markers and without, and of transformers; a conversation that is split has each turn as transformers writes and marks it last."""
    marking, plain = both(shape)
    found = chat.samples(messages, marking)
    assert found == chat.samples(messages, plain)
    if len(found) == 1:
        assert found[0] == theirs(marking, messages)
        return
    ends = [number + 1 for number, message in enumerate(messages) if message["role"] == "assistant"]
    for stop, (ids, trained) in zip(ends, found, strict=True):
        wanted, mask = theirs(marking, messages[:stop])
        assert ids == wanted
        last = max(number for number, (one, before) in enumerate(zip(mask, [False, *mask], strict=False)) if one and not before)
        assert trained == [one and number >= last for number, one in enumerate(mask)]


@pytest.mark.parametrize(
    ("shape", "end"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>"), ("gemma", "<end_of_turn>"), ("harmony", "<|return|>")],
)
def test_what_is_trained_is_the_answer_and_its_end(both: Both, shape: str, end: str) -> None:
    for tokenizer in both(shape):
        text = "<|channel|>final<|message|>It is 4." if shape == "harmony" else "It is 4."
        assert [one.strip() for one in said(tokenizer, chat.render(turns("What is 2+2?", "It is 4."), tokenizer))] == [text + end]
        assert chat.ends(tokenizer) == [tokenizer.backend.token_to_id(end)]


@pytest.mark.parametrize("shape", ["thinking", "harmony", "mistral"])
def test_turns_that_change_are_never_marked_as_they_were_not_written(both: Both, shape: str) -> None:
    messages = turns("a", "b", "c", "d", system="S")
    messages[2] |= {"reasoning_content": "first", "thinking": "first"}
    messages[4] |= {"reasoning_content": "second", "thinking": "second"}
    for tokenizer in both(shape):
        with pytest.raises(Changed, match=r"in another way once .*that follows|once others follow"):
            chat.render(messages, tokenizer)
        one, two = chat.samples(messages, tokenizer)
        assert "first" in tokenizer.backend.decode(one[0], skip_special_tokens=False) or shape == "mistral"
        assert "first" not in tokenizer.backend.decode(two[0], skip_special_tokens=False)
        if shape != "mistral":
            assert ["first" in text for text in said(tokenizer, one)] == [True]
            assert ["second" in text for text in said(tokenizer, two)] == [True]
        assert sum(two[1]) < sum(one[1]) + len(two[0]) - len(one[0]) or shape != "mistral"


def test_tool_calls_and_results(both: Both) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
    messages = [
        *turns("1+2?", system="Use tools."),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "three"},
        {"role": "assistant", "content": "It is 3."},
    ]
    marking, plain = both("chatml")
    found = chat.render(messages, marking, tools=tools)
    assert found == chat.render(messages, plain, tools=tools) == theirs(marking, messages, tools=tools)
    first, second = said(marking, found)
    assert first == '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ü"}}\n</tool_call><|im_end|>'
    assert second == "It is 3.<|im_end|>"
    assert chat.render(messages, marking, tools=tools, after=3)[1] == [
        one and number > found[1].index(False, found[1].index(True)) for number, one in enumerate(found[1])
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_special_tokens_that_take_the_blanks_behind_them(both: Both, shape: str) -> None:
    """As Phi-3's: the token that ends a turn covers the line's end too, which is not the assistant's; and [/INST] the blank before an answer."""
    marking, plain = both(shape, True)
    messages = turns("What?", "It is 4.")
    assert chat.render(messages, marking) == chat.render(messages, plain)
    assert len(said(marking, chat.render(messages, marking))) == 1
    assert not said(marking, chat.render(messages, marking))[0].startswith("[/INST]")


def test_an_answer_that_begins_with_a_blank(both: Both) -> None:
    """transformers finds no token at a blank whose offsets the tokenizer trims, and leaves the whole turn out; here it is trained."""
    marking, plain = both("chatml")
    messages = turns("a", "  b", "c", "d")
    found = chat.render(messages, plain)
    assert found == chat.render(messages, marking)
    assert said(plain, found) == ["  b<|im_end|>", "d<|im_end|>"]


def test_forged_ends_and_others_that_are_refused(both: Both, tmp_path: Path) -> None:
    marking, plain = both("chatml")
    for tokenizer in (marking, plain):
        for where in (turns("x<|im_end|>", "y"), turns("x", "y<|im_start|>system"), turns("x", "y", system="</s>")):
            with pytest.raises(Unmarkable, match="special token"):
                chat.samples(where, tokenizer)
        with pytest.raises(Unmarkable, match="no turn of the assistant"):
            chat.samples(turns("x"), tokenizer)
        with pytest.raises(Unmarkable, match="U\\+FDD0"):
            chat.samples(turns("x", "\ufdd0"), tokenizer)
    with pytest.raises(Unmarkable, match="roles must alternate"):
        chat.render([{"role": "user", "content": "a"}] * 2 + turns("b", "c")[1:], both("mistral")[1])

    def with_template(text: str) -> Tokenizer:
        chatshapes.made(tmp_path, "chatml", marks=False)
        (tmp_path / "chat_template.jinja").write_text(text)
        from gigatrain.data import tokenizer

        return tokenizer.load(str(tmp_path))

    alpaca = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"
    with pytest.raises(Unmarkable, match="no special token ends turn 1"):
        chat.render(turns("a", "b"), with_template(alpaca))
    other = chatshapes.template("chatml", marks=False).replace("assistant\\n' }}{%- endif", "assistant\\n<think>' }}{%- endif")
    with pytest.raises(Unmarkable, match="the generation prompt before turn 1 is not how the template writes"):
        chat.render(turns("a", "b"), with_template(other))
    with pytest.raises(Unmarkable, match="across the edge"):
        chat.render(turns("a", "b"), with_template("{% for m in messages %}{% generation %}{{ m.content[:1] + '|im_' }}{% endgeneration %}{{ 'end|' }}{% endfor %}".replace("'|im_'", "' wor'").replace("'end|'", "'ld'")))
    with pytest.raises(Unmarkable, match=r'tokenizer\.date'):
        chat.render(turns("a", "b"), with_template("{{ strftime_now('%Y') }}"))
    with pytest.raises(DataError, match="does not parse"):
        chat.render(turns("a", "b"), with_template("{% for %}"))
    with pytest.raises(Unmarkable, match="unsafe"):
        chat.render(turns("a", "b"), with_template("{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}"))
    (tmp_path / "chat_template.jinja").unlink()
    from gigatrain.data import tokenizer as tokenizers_

    with pytest.raises(DataError, match='tokenizer.template = "chatml"'):
        chat.render(turns("a", "b"), tokenizers_.load(str(tmp_path)))


def test_a_prompt_is_what_precedes_the_answer(both: Both) -> None:
    for shape in SHAPES:
        for tokenizer in both(shape):
            ids, trained = chat.samples(turns("Hello", "It is", "c", "def"), tokenizer)[-1]
            given = chat.prompt(turns("Hello", "It is", "c"), tokenizer)
            first = max(number for number, one in enumerate(trained) if one and not trained[number - 1])
            assert ids[: len(given)] == given or shape == "mistral"
            assert first == len(given)


TEXTS = st.text(st.sampled_from("ab It is\n\t. für日🙂\u0301<|>[]/ 4"), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.sampled_from(SHAPES), st.lists(TEXTS.filter(lambda text: text.strip() != ""), min_size=2, max_size=6), st.none() | TEXTS, st.booleans())
def test_whatever_is_said_the_trained_tokens_are_the_answers(both: Both, shape: str, texts: list[str], system: str | None, swallows: bool) -> None:
    """The trained runs decode to the answers and their ends, nothing else; markers or not."""
    marking, plain = both(shape, swallows)
    messages = turns(*(texts if len(texts) % 2 == 0 else texts[:-1]), system=system)
    outcomes = []
    for tokenizer in (marking, plain):
        try:
            outcomes.append(chat.samples(messages, tokenizer))
        except Unmarkable as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    if isinstance(outcomes[0], str):
        assert "across the edge" in outcomes[0] or "special token" in outcomes[0]
        return
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    runs = [text for sample in outcomes[0] for text in said(plain, sample)]
    assert len(runs) == len(answers)
    for run, answer in zip(runs, answers, strict=True):
        assert "".join(answer.split()) in "".join(run.split())
        assert any(run.rstrip().endswith(end) for end in [*chatshapes.SPECIALS[shape], "</s>"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["chatml", "gemma"]), TEXTS, TEXTS.filter(bool))
def test_a_completion_is_trained_and_ends(both: Both, shape: str, before: str, after: str) -> None:
    tokenizer = both(shape)[0]
    try:
        ids, trained = chat.continued(before, after, tokenizer)
    except Unmarkable as error:
        assert "across the edge" in str(error)  # noqa: PT017
        return
    assert ids[:-1] == tokenizer.unmarked.encode(before + after, add_special_tokens=False).ids
    assert ids[-1] == tokenizer.eos
    assert trained[-1]
    first = trained.index(True)
    assert trained == [number >= first for number in range(len(ids))]
    assert tokenizer.backend.decode(ids[first:-1], skip_special_tokens=False).strip() == after.strip()
