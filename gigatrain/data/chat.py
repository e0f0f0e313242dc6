"""Conversations to token ids, and which of them the model is to learn: the assistant's, proved token by token. Free of torch.

    text of messages[:i] with the generation prompt     what the model is given
    text of messages[:i + 1]                            what it is given, and then what it must write: this, to the end of its turn, is trained

The tokenizer's own template writes both texts. Three things are held for every turn that is trained, or `Unmarkable` says which does not hold:
the first text begins the second, the second begins the text of the whole conversation (so nothing that follows changed what stood there, as
templates do that drop earlier turns' thinking), and no token lies across the edge of a trained range. A template with `{% generation %}` marks
the ranges itself; both ways give the same marks where both apply (tests/data/test_chat.py, against transformers' own mask).
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gigatrain.data.tokenizer import Tokenizer
from gigatrain.errors import DataError

Message = dict[str, Any]
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # stand around a trained range in the template's output: code points that no text may hold (Unicode 23.7)
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing, in transformers' order


class Unmarkable(DataError):
    """A conversation whose trained tokens cannot be proved with this template; the message says at which turn, and why."""


class Changed(Unmarkable):
    """The template writes an earlier turn in another way once others follow; each turn alone can still be marked."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`, around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own attribute)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_within"), [], [], body).set_lineno(line)

    def _within(self, caller: Any) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    # jinja's own escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compiled(template: str, date: str | None) -> jinja2.Template:
    """A template with what transformers offers to one, in a sandbox. `strftime_now` is there only where the recipe fixes the date: else the same
    data would give other tokens tomorrow."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _json
    environment.globals["raise_exception"] = _raise
    if date is not None:
        from datetime import date as Day

        environment.globals["strftime_now"] = Day.fromisoformat(date).strftime
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template does not parse: {error}; mend it, or name another by `tokenizer.template`") from error


def marks_itself(template: str) -> bool:
    """Whether a template has `{% generation %}`."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def write(
    messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[Any] | None = None, prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The template's text, and the ranges of characters that it marks itself; `prompt` adds what precedes the assistant's next turn.

    DataError if the tokenizer has no template, Unmarkable with the template's own words if it refuses the messages.
    """
    template = tokenizer.template_for(tools is not None)
    if template is None:
        raise DataError(
            f'the tokenizer in {tokenizer.folder} has no chat template; name one: `tokenizer.template = "chatml"`, or a file of your own'
        )
    try:
        text = _compiled(template, tokenizer.date).render(
            messages=[_aliased(message) for message in messages],
            tools=list(tools) if tools is not None else None,
            documents=None,
            add_generation_prompt=prompt,
            **tokenizer.names,
            **tokenizer.variables,
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        why = str(error) or type(error).__name__
        if "strftime_now" in why:
            why += '; this template writes the day: fix one by `tokenizer.date = "2025-01-31"`'
        raise Unmarkable(f"the chat template refuses the conversation: {why}") from error
    plain: list[str] = []
    ranges: list[tuple[int, int]] = []
    at = begin = depth = 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", text):
        if piece == OPEN:
            begin, depth = (at, 1) if depth == 0 else (begin, depth + 1)
        elif piece == CLOSE:
            depth -= 1
            if depth == 0 and at > begin:
                ranges.append((begin, at))
        else:
            plain.append(piece)
            at += len(piece)
    return "".join(plain), ranges


def _aliased(message: Message) -> Message:
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[Any] | None = None, after: int = 0, context: Collection[int] = ()
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them are the assistant's and so trained; `messages[:after]` and those whose numbers are in `context` are not.

    messages: {"role", "content", …} as transformers takes them (messages.py reads other forms). Raises Changed if the template writes a trained
    turn in another way because of what follows it (then `samples` gives one sample a turn), Unmarkable if the marks cannot be proved.
    """
    text, ranges = spans(messages, tokenizer, tools=tools, after=after, context=context)
    return encode(text, ranges, tokenizer)


def samples(
    messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[Any] | None = None, context: Collection[int] = ()
) -> list[tuple[list[int], list[bool]]]:
    """The conversation as one sample; or, where the template changes earlier turns, one for each turn of the assistant, as it is written when it is
    the last: what the model sees when it writes it."""
    try:
        return [render(messages, tokenizer, tools=tools, context=context)]
    except Changed:
        turns = [number for number, message in enumerate(messages) if message.get("role") == "assistant" and number not in context]
        return [render(messages[: turn + 1], tokenizer, tools=tools, after=turn) for turn in turns]


def prompt(messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[Any] | None = None) -> list[int]:
    """Ids of what the model is given before it writes the assistant's next turn."""
    refuse_forged((messages, tools), tokenizer)
    return tokenizer.marked.encode(write(messages, tokenizer, tools=tools, prompt=True)[0], add_special_tokens=False).ids


def spans(
    messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[Any] | None = None, after: int = 0, context: Collection[int] = ()
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the ranges of characters in it that are trained, ascending; raises as `render`."""
    mine = [number for number, message in enumerate(messages) if message.get("role") == "assistant" and number >= after]
    turns = [number for number in mine if number not in context]
    if not turns:
        raise Unmarkable(f"it has no turn of the assistant{' that is not marked as context' if mine else ''}, so nothing in it is trained")
    refuse_forged((messages, tools), tokenizer)
    text, marked = write(messages, tokenizer, tools=tools)
    template = tokenizer.template_for(tools is not None)
    assert template is not None, "write refuses"
    itself = marks_itself(template)
    found: list[tuple[int, int]] = []
    for turn in turns:
        last = turn == len(messages) - 1
        upto, its = (text, marked) if last else write(messages[: turn + 1], tokenizer, tools=tools)
        if not text.startswith(upto):
            raise Changed(f"the template writes turn {turn} in another way once others follow it ({_differs(upto, text)})")
        ranges = (
            _marked(messages[:turn], upto, its, turn, tokenizer, tools)
            if itself
            else [_turn(messages[:turn], upto, turn, tokenizer, tools)]
        )
        _refuse_lost(messages[turn], "".join(upto[start:stop] for start, stop in ranges), turn)
        found += ranges
    if itself and after == 0 and turns == mine and found != marked:
        raise Unmarkable("the template marks other ranges of the conversation than of its turns one by one")
    return text, found


def _marked(
    before: Sequence[Message], upto: str, its: list[tuple[int, int]], turn: int, tokenizer: Tokenizer, tools: Sequence[Any] | None
) -> list[tuple[int, int]]:
    """The ranges that the template marks in the turn at the end of `upto`."""
    begins, texts = "", [""]
    if before:
        texts = [
            write(before, tokenizer, tools=tools, prompt=prompt)[0] for prompt in (False, True)
        ]  # some end a text that no prompt follows
        fitting = [text for text in texts if upto.startswith(text)]
        if not fitting:
            raise Changed(f"the template writes what precedes turn {turn} in another way once that follows ({_differs(texts[0], upto)})")
        begins = fitting[0]
    mine = [one for one in its if one[1] > len(begins)]
    if not mine:
        raise Unmarkable(f"the template marks nothing of turn {turn}, which is the assistant's")
    if mine[0][0] < len(begins) and begins == texts[0]:
        raise Unmarkable(f"the template marks characters before turn {turn} as the assistant's")
    return mine


def _refuse_lost(message: Message, written: str, turn: int) -> None:
    """Unmarkable if what the assistant said, or the name of a tool that it called, is not in what is trained."""
    said = [str(message.get("content") or "")]
    said += [str((call.get("function") or call).get("name", "")) for call in message.get("tool_calls") or ()]
    there = "".join(written.split())
    for one in said:
        if "".join(one.split()) not in there:
            raise Unmarkable(
                f"the template leaves out something of turn {turn}: {one[:60]!r} is not in {written[:60]!r}; use another template"
            )


def _turn(before: Sequence[Message], upto: str, turn: int, tokenizer: Tokenizer, tools: Sequence[Any] | None) -> tuple[int, int]:
    """What the assistant writes at the end of `upto`: all that follows the generation prompt, to the special token that ends its turn."""
    given = write(before, tokenizer, tools=tools, prompt=True)[0]
    if not upto.startswith(given):
        raise Unmarkable(
            f"the generation prompt before turn {turn} is not how the template writes that turn ({_differs(given, upto)}), so the model would be asked in "
            "another way than it is trained; set what the template asks for (such as `tokenizer.variables.enable_thinking = false`), or mark the turn with "
            "{% generation %} in a template of your own (`tokenizer.template`)"
        )
    ends = [match.end() for match in tokenizer.special.finditer(upto, len(given))]
    if not ends:
        raise Unmarkable(f"no special token ends turn {turn}, so nothing would teach the model to stop; use a template that writes one")
    if upto[ends[-1] :].strip():
        raise Unmarkable(
            f"text follows the special token that ends turn {turn}: {upto[ends[-1] :][:40]!r}; mark the turn with {{% generation %}}"
        )
    return len(given), ends[-1]


def _differs(one: str, other: str) -> str:
    """Where two texts part, for a message."""
    at = next((number for number, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"after {other[max(0, at - 24) : at]!r} {one[at : at + 24]!r} became {other[at : at + 24]!r}"


def refuse_forged(value: Any, tokenizer: Tokenizer) -> None:
    """Unmarkable if a text within messages or tools holds a special token's name, which the encoder would take for the token itself."""
    for text in _texts(value):
        if (found := tokenizer.special.search(text)) is not None:
            raise Unmarkable(f"a message holds the special token {found[0]!r} as text, which would forge the end of a turn or another's")
        if OPEN in text or CLOSE in text:
            raise Unmarkable("a message holds U+FDD0 or U+FDD1, which are no characters")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield str(key)
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def continued(before: str, after: str, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Ids of a text and its continuation as one document, without a template: the continuation and the end of the document are trained."""
    if not after:
        raise Unmarkable("its completion is empty")
    head = [] if tokenizer.bos is None else [tokenizer.bos]
    ids, trained = encode(before + after, [(len(before), len(before) + len(after))], tokenizer, forged=True)
    return [*head, *ids, tokenizer.eos], [*(False for _ in head), *trained, True]


def ends(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens with which the assistant ends a turn, in the tokenizer's template; [] without one."""
    if tokenizer.template_for(False) is None:
        return []
    ids, trained = render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenizer)
    last = max((number for number, one in enumerate(trained) if one and ids[number] in tokenizer.specials), default=None)
    return [] if last is None else [ids[last]]


def encode(text: str, ranges: Iterable[tuple[int, int]], tokenizer: Tokenizer, *, forged: bool = False) -> tuple[list[int], list[bool]]:
    """Ids of a text, special tokens being what they say (`forged`: being text), and whether each lies within a range; Unmarkable if one lies
    across an edge."""
    inside = bytearray(len(text))
    for start, stop in ranges:
        inside[start:stop] = b"\1" * (stop - start)
    sums = [0, *accumulate(inside)]
    encoding = (tokenizer.unmarked if forged else tokenizer.marked).encode(text, add_special_tokens=False)
    trained = []
    for token, offsets in zip(encoding.ids, encoding.offsets, strict=True):
        start, stop = _within(text, *offsets, tokenizer.specials.get(token))
        count = sums[stop] - sums[start]
        if count not in (0, stop - start):
            raise Unmarkable(
                f"token {tokenizer.marked.id_to_token(token)!r} of {text[max(0, start - 24) : stop + 8]!r} lies across the edge of what the assistant writes"
            )
        trained.append(count > 0)
    return encoding.ids, trained


def _within(text: str, start: int, stop: int, special: str | None) -> tuple[int, int]:
    """The characters that decide whether a token is trained. A special token may swallow the blanks around it, which are not the token; and one of no
    character, such as a blank that a tokenizer puts before a text, is what both its neighbours are."""
    if special is not None and stop - start > len(special):
        start += text[start:stop].index(special)
        stop = start + len(special)
    return (start, stop) if start < stop else (max(0, start - 1), min(len(text), stop + 1))
