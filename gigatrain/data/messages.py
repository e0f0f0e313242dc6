"""Conversations as people store them, read into transformers' messages; and records into samples of tokens. Free of torch.

chat         {"messages": [{"role", "content", "tool_calls"?, …}], "tools"?}      OpenAI's
sharegpt     {"conversations": [{"from", "value"}], "system"?, "tools"?}
alpaca       {"instruction", "input"?, "output", "system"?, "history"?}
completion   {"prompt", "completion"}: two texts, or two lists of messages
preference   {"prompt"?, "chosen", "rejected"}, or {"prompt", "completion", "label"}: lists of messages, or texts (preferred.py)

What a template is given is what the record holds, in its order: schemas of tools and arguments of calls too. Only of Parquet and Arrow, whose structs have
every key in every row, are keys left out that hold nothing. A turn with `"weight": 0` or `"train": false` is context: written, and not trained.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gigatrain import config
from gigatrain.data import chat
from gigatrain.data.chat import Message
from gigatrain.data.tokenizer import Tokenizer

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "function_call": "call",
    "tool_call": "call",
}
# What a record must have, and what it may have, besides the column that `field` can rename.
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "chat": ((), ("tools",)),
    "sharegpt": ((), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "completion": (("prompt", "completion"), ("tools",)),
    "preference": ((), ("prompt", "chosen", "rejected", "completion", "label", "tools")),
}
TURNS = {"chat": "messages", "sharegpt": "conversations"}


# Columns by which a record can be read in another way than it was asked to be: those of turns, then those of forms.
_TURNS = ("messages", "conversations", "conversation", "turns", "dialogue", "dialog", "chat")
_FORMS = (
    ("preference", {"chosen", "rejected"}),
    ("preference", {"prompt", "completion", "label"}),
    ("completion", {"prompt", "completion"}),
    ("alpaca", {"instruction", "output"}),
)


class Unparsable(ValueError):
    """A record that is no conversation; the message says what it lacks. `keys`: what it has, where that is a column."""

    def __init__(self, why: str, keys: Iterable[Any] = ()) -> None:
        super().__init__(why)
        self.keys = tuple(map(str, keys))


@dataclass(frozen=True)
class Conversation:
    """Messages as transformers takes them, or two plain texts, of which the second is trained."""

    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] | None = None
    texts: tuple[str, str] | None = None
    after: int = 0  # messages before it are context: nothing of them is trained
    context: frozenset[int] = frozenset()  # and so are these


def turns_of(source: config.Source) -> str | None:
    """The column that holds the turns of a chat or sharegpt source."""
    name = TURNS.get(source.format)
    return source.field if name is not None and source.field != type(source).model_fields["field"].default else name


def columns(source: config.Source) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(needed, also read) of a record that is no plain text."""
    needed, optional = COLUMNS[source.format]
    turns = turns_of(source)
    return (*needed, *((turns,) if turns else ())), optional


def way(source: config.Source, keys: Collection[str]) -> str | None:
    """Which key of a source would have records with these columns read, as KEY=VALUE; None where their names do not tell."""
    turns, given = next((name for name in _TURNS if name in keys), None), source.field != type(source).model_fields["field"].default
    if turns is not None:
        if source.format in TURNS and (given or turns not in TURNS.values()):
            return f"field={turns}"
        return next((f"format={form}" for form, name in TURNS.items() if name == turns), None)
    return next((f"format={form}" for form, names in _FORMS if form != source.format and names <= set(keys)), None)


def text_of(source: config.Source, record: Any) -> str:
    """A record's columns as one text, in the record's own order of keys. Unparsable if one is missing."""
    if not isinstance(record, dict):
        raise Unparsable("not a record")
    needed, optional = columns(source)
    if lacking := [name for name in needed if record.get(name) is None]:
        raise Unparsable(f"no {', '.join(lacking)}", record)
    if source.format == "preference" and all(record.get(name) is None for name in ("chosen", "rejected", "completion")):
        raise Unparsable("no chosen and rejected", record)
    structs = source.kind in ("parquet", "hub")
    return json.dumps(
        {name: _plain(record[name], nulls=not structs) for name in (*needed, *optional) if record.get(name) is not None}, ensure_ascii=False
    )


def key_of(text: str) -> str:
    """What decides whether a record of this text is held out: the same for the same conversation, whatever kind of file it is stored in."""
    return json.dumps(_plain(json.loads(text), nulls=False), ensure_ascii=False, sort_keys=True)


def _plain(value: Any, *, nulls: bool) -> Any:
    """Nested data as JSON has it; without `nulls`, without the keys that hold nothing."""
    if isinstance(value, dict):
        return {str(key): _plain(each, nulls=nulls) for key, each in value.items() if nulls or each is not None}
    if isinstance(value, list | tuple):
        return [_plain(each, nulls=nulls) for each in value]
    if isinstance(value, np.ndarray):
        return [_plain(each, nulls=nulls) for each in value.tolist()]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise Unparsable(f"a value of type {type(value).__name__}")


def words(text: str) -> str:
    """What a record's text says: its strings without keys and brackets, for a tokenizer to be trained on."""

    def strings(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        return [
            found
            for each in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
            for found in strings(each)
        ]

    return "\n".join(strings(json.loads(text)))


def parse(source: config.Source, text: str) -> Conversation:
    """The conversation of a record's text; Unparsable says what is wrong with it."""
    record = json.loads(text)
    tools = tools_of(record.get("tools"))
    if source.format == "alpaca":
        return Conversation(_alpaca(record))
    if source.format == "completion":
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Conversation(texts=(prompt, completion))
        before, (answer, context) = messages_of(prompt), turns_read(completion)
        found = (*before, *answer)
        context = frozenset(len(before) + number for number in context)
        refuse_silent(found, len(before), context)
        return Conversation(found, tools, after=len(before), context=context)
    found, context = turns_read(record[turns_of(source) or "messages"])
    if isinstance(system := record.get("system"), str) and system and found[0]["role"] != "system":
        found, context = ({"role": "system", "content": system}, *found), frozenset(number + 1 for number in context)
    refuse_silent(found, context=context)
    return Conversation(found, tools, context=context)


def messages_of(turns: Any) -> tuple[Message, ...]:
    """Turns of either naming (role and content, from and value) as messages; Unparsable names the turn that is none."""
    return turns_read(turns)[0]


def turns_read(turns: Any) -> tuple[tuple[Message, ...], frozenset[int]]:
    """As `messages_of`, and the numbers of the assistant's turns that say of themselves that they are not trained."""
    if isinstance(turns, str):  # some datasets hold JSON within a text column
        try:
            turns = json.loads(turns)
        except ValueError:
            raise Unparsable("its turns are a text, and not a list") from None
    if not isinstance(turns, list) or not turns:
        raise Unparsable("its turns are no list, or an empty one")
    found = tuple(_message(number, turn) for number, turn in enumerate(turns))
    return found, frozenset(number for number, message in enumerate(found) if _is_context(number, turns[number], message["role"]))


def _is_context(number: int, turn: dict[str, Any], role: str) -> bool:
    """Whether a turn's `weight` (OpenAI's, 0 or 1) or `train` keeps it from being trained."""
    said = {name: turn[name] for name in ("weight", "train") if turn.get(name) is not None}
    for name, value in said.items():
        if isinstance(value, bool) != (name == "train") or value not in (0, 1):
            raise Unparsable(
                f"turn {number} has {name} {json.dumps(value)[:40]}; {'true and false' if name == 'train' else '0 and 1'} are known"
            )
    if len({bool(value) for value in said.values()}) > 1:
        raise Unparsable(f"turn {number} has weight {said['weight']} and train {json.dumps(said['train'])}, which contradict each other")
    if role != "assistant" and any(said.values()):
        raise Unparsable(
            f"turn {number} of the {role} is to be trained ({', '.join(said)}), and only what the assistant writes can be; leave it out"
        )
    return bool(said) and not any(said.values())


def refuse_silent(messages: Sequence[Message], after: int = 0, context: frozenset[int] = frozenset()) -> None:
    """Unparsable if a turn that is to be trained says nothing: its end alone would be learnt."""
    for number, message in enumerate(messages):
        if number < after or number in context or message["role"] != "assistant" or message["content"].strip():
            continue
        if not any(message.get(name) for name in ("tool_calls", *chat.REASONING)):
            raise Unparsable(f'turn {number} of the assistant is empty; mend it, or give it "weight": 0')


def _message(number: int, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Unparsable(f"turn {number} is no object")
    role = turn.get("role", turn.get("from"))
    if role not in ROLES:
        raise Unparsable(f"turn {number} has role {str(role)[:40]!r}; known are {', '.join(ROLES)}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "".join(_part(number, part) for part in content)
    if not isinstance(content, str | None):
        raise Unparsable(f"turn {number} holds a {type(content).__name__} and no text")
    named = ("role", "from", "content", "value", "weight", "train")
    others = {key: value for key, value in turn.items() if key not in named and value is not None}
    if ROLES[role] == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(number, content)}
    found: Message = {"role": ROLES[role], "content": content or "", **others}
    if "tool_calls" in found:
        found["tool_calls"] = [_call(number, call) for call in found["tool_calls"] or ()]
        if not found["tool_calls"]:
            del found["tool_calls"]
    if content is None and "tool_calls" not in found:
        raise Unparsable(f"turn {number} has neither content nor tool_calls")
    return found


def _part(number: int, part: Any) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise Unparsable(f"turn {number} holds {kind!r}, and only text is trained")


def _call(number: int, call: Any) -> Message:
    """A tool call as it is stored, but with its arguments as an object: templates write them as JSON, and a text of JSON would be quoted twice."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unparsable(f"turn {number} calls a tool without a name")
    given = function.get("arguments")
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else {}
        except ValueError:
            raise Unparsable(f"turn {number} calls {function['name']} with arguments that are no JSON: {given[:40]!r}") from None
    told = {"arguments": {} if given is None else given}
    if call is function:
        return {"type": "function", "function": {key: value for key, value in call.items() if key in ("name", "arguments")} | told}
    return {**({} if "type" in call else {"type": "function"}), **call, "function": function | told}


def _calls(number: int, text: str | None) -> list[Message]:
    try:
        found = json.loads(text or "")
    except ValueError:
        raise Unparsable(f"turn {number} is a function_call and no JSON") from None
    return [_call(number, one) for one in (found if isinstance(found, list) else [found])]


def tools_of(value: Any) -> tuple[Any, ...] | None:
    """Tools as a record holds them: a list, or JSON in a text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            raise Unparsable("its tools are a text that is no JSON") from None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise Unparsable("its tools are no list")
    return tuple(json.loads(one) if isinstance(one, str) else one for one in value)


def _alpaca(record: dict[str, Any]) -> tuple[Message, ...]:
    if not all(isinstance(record.get(name, ""), str) for name in ("instruction", "input", "output", "system")):
        raise Unparsable("instruction, input, output or system is no text")
    if not record["output"].strip():
        raise Unparsable("its output is empty")
    found: list[Message] = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for pair in record.get("history") or ():
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)):
            raise Unparsable("its history is no list of pairs")
        found += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    given = record.get("input") or ""
    question = record["instruction"] + (f"\n\n{given}" if given.strip() else "")
    return (*found, {"role": "user", "content": question}, {"role": "assistant", "content": record["output"]})


Tokens = tuple[np.ndarray, np.ndarray]


def samples(source: config.Source, text: str, ready: Tokenizer) -> list[Tokens] | str:
    """A record's samples as (ids [n] int64, trained [n] bool), or why it has none: "unparsable: …", "unmarkable: …" or "history: …"."""
    try:
        one = parse(source, text)
        found = _encoded(one, source, ready)
    except Unparsable as error:
        return f"unparsable: {error}"
    except chat.Changed as error:
        return f"history: {error}"
    except chat.Unmarkable as error:
        return f"unmarkable: {error}"
    return [(np.array(ids, np.int64), np.array(trained, bool)) for ids, trained in found]


def _encoded(one: Conversation, source: config.Source, ready: Tokenizer) -> Sequence[tuple[list[int], list[bool]]]:
    if one.texts is not None:
        return [chat.continued(*one.texts, ready)]
    if one.after or source.history != "split":
        return [chat.render(one.messages, ready, tools=one.tools, after=one.after, context=one.context)]
    return chat.samples(one.messages, ready, tools=one.tools, context=one.context)
