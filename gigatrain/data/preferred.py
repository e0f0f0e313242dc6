"""Records of answers that somebody judged, as the two documents of a pair (pairs.py). Free of torch.

{"prompt"?, "chosen", "rejected", "tools"?}       two answers: lists of messages, or texts behind a prompt that is one. Without a prompt, the messages
                                                  that both begin with are it.
{"prompt", "completion", "label", "tools"?}       one answer, good or not: the other side is empty
"""

import json
from typing import Any

import numpy as np

from gigatrain import config
from gigatrain.data import chat
from gigatrain.data.chat import Message
from gigatrain.data.messages import Tokens, Unparsable, messages_of, refuse_silent, tools_of, turns_read
from gigatrain.data.tokenizer import Tokenizer

EMPTY: Tokens = (np.empty(0, np.int64), np.empty(0, np.bool_))


def documents(source: config.Source, text: str, ready: Tokenizer) -> list[Tokens] | str:
    """Both documents of a record's text, or why it has none: "unparsable: …" or "unmarkable: …"."""
    del source
    try:
        return _documents(json.loads(text), ready)
    except Unparsable as error:
        return f"unparsable: {error}"
    except chat.Unmarkable as error:
        return f"unmarkable: {error}"


def _documents(record: dict[str, Any], ready: Tokenizer) -> list[Tokens]:
    if "chosen" in record or "rejected" in record:
        if lacking := [name for name in ("chosen", "rejected") if name not in record]:
            raise Unparsable(f"no {lacking[0]}")
        answers = [record["chosen"], record["rejected"]]
        if answers[0] == answers[1]:
            raise Unparsable("both answers are the same")
        return [_document(one, record, answers, ready) for one in answers]
    if lacking := [name for name in ("prompt", "completion", "label") if name not in record]:
        raise Unparsable(f"no {', '.join(lacking)}")
    label = record["label"]
    if label not in (True, False, 0, 1):
        raise Unparsable(f"its label is {str(label)[:40]!r}, and neither true nor false")
    found = _document(record["completion"], record, [record["completion"]], ready)
    return [found, EMPTY] if label else [EMPTY, found]


def _document(answer: Any, record: dict[str, Any], answers: list[Any], ready: Tokenizer) -> Tokens:
    """One answer behind its prompt."""
    prompt = record.get("prompt")
    if isinstance(answer, str) and isinstance(prompt, str):
        return _arrays(chat.continued(prompt, answer, ready))
    if isinstance(answer, str):
        if prompt is None:
            raise Unparsable("its answers are texts, and there is no prompt")
        turns: tuple[Message, ...] = ({"role": "assistant", "content": answer},)
        context: frozenset[int] = frozenset()
    else:
        turns, context = turns_read(answer)
    if prompt is None:
        both = [messages_of(one) for one in answers]
        after = next((at for at, (a, b) in enumerate(zip(*both, strict=False)) if a != b), min(map(len, both)))
        before: tuple[Message, ...] = ()
    else:
        before = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else messages_of(prompt)
        # Some data sets give the prompt, and the whole conversations behind it again.
        before, after = ((), len(before)) if turns[: len(before)] == before else (before, len(before))
    found = (*before, *turns)
    if not any(message["role"] == "assistant" for message in found[after:]):
        raise Unparsable("an answer has no turn of the assistant")
    context = frozenset(len(before) + number for number in context)
    refuse_silent(found, after, context)
    return _arrays(chat.render(found, ready, tools=tools_of(record.get("tools")), after=after, context=context))


def _arrays(found: tuple[list[int], list[bool]]) -> Tokens:
    return np.array(found[0], np.int64), np.array(found[1], np.bool_)
