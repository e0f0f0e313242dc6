"""Conversations that can be made offline, and are nobody's but Python's own: what a function of the standard library does, by its signature and docstring.

    question     What does posixpath.join do?
    answer       `join(a, *p)`: Join two or more pathname components, inserting '/' as needed.
    not so       Join two or more pathname components, inserting '/' as needed.        one of WRONG, by a hash of the name

They are read from the source text with `ast`, so nothing is imported, and whatever the platform, the same Python gives the same conversations. Both forms of
a function have its name as key, so what is held out of fine-tuning is held out of preference tuning too.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

RULE = 1  # raise it when the same sources would give other conversations
QUESTIONS = ("What does {} do?", "Explain {}.", "What is {} for?", "How is {} called, and what for?")
SIGNATURE, SENTENCE = 80, 160  # characters at most
_SENTENCE = re.compile(r"[A-Z][^`]*?[^.`]\.(?=\s|$)")
_ANSWER = re.compile(r"`([A-Za-z_]\w*)\(([^`\n]*)\)`: ([A-Z][^`\n]*[^.`\n]\.)")


@dataclass(frozen=True)
class Function:
    """A documented function of a module's source."""

    name: str  # module and qualified name
    signature: str  # as it is called: its last name, and what it takes but self and cls
    sentence: str  # the first of its docstring
    line: int

    @property
    def question(self) -> str:
        """In one of several wordings, by a hash of the name."""
        return QUESTIONS[_hash(self.name) % len(QUESTIONS)].format(self.name)

    @property
    def answer(self) -> str:
        """In the one form that is to be learnt."""
        return f"`{self.signature}`: {self.sentence}"


# Ways in which an answer is not in the form, `other` being the function before it in its module.
WRONG = (
    lambda one, other: one.sentence,
    lambda one, other: f"`{one.signature}`",
    lambda one, other: f"{one.signature} - {one.sentence}",
    lambda one, other: f"`{other.signature}`: {one.sentence}",
    lambda one, other: f"def {one.signature}:\n    {one.sentence}",
    lambda one, other: f"`{one.signature}`: {one.sentence} {one.sentence}",
)


def functions(module: str, source: bytes) -> list[Function]:
    """The public functions and methods of a module (its file's relative name) whose docstring begins with a whole sentence; none of a file of other syntax."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    dotted = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return [] if _hidden(dotted) else list(_within(tree, dotted))


def records(module: str, source: bytes, form: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(name, line, record) of each function; the record is a `chat` or a `preference` as JSON Lines hold one (data/messages.py)."""
    found = functions(module, source)
    for at, one in enumerate(found):
        asked, answered = {"role": "user", "content": one.question}, {"role": "assistant", "content": one.answer}
        if form == "chat":
            yield one.name, one.line, {"messages": [asked, answered]}
            continue
        other = next((before for before in reversed(found[:at]) if before.signature != one.signature), None)
        ways = [way for way in WRONG if other is not None or way is not WRONG[3]]
        wrong = ways[_hash(f"wrong {one.name}") % len(ways)](one, other)
        yield one.name, one.line, {"prompt": [asked], "chosen": [answered], "rejected": [{"role": "assistant", "content": wrong}]}


def judge(question: str, answer: str) -> str:
    """What an answer's form lacks; nothing if it is as taught: the function that was asked for, its arguments, one sentence, and the end."""
    found = _ANSWER.fullmatch(answer)
    if found is None:
        return "another form"
    name, _, sentence = found.groups()
    if re.search(r"[^.]\. [A-Z]", sentence):
        return "more than a sentence"
    asked = re.search(r"(?:\w+\.)+(\w+)", question)
    return "another function" if asked is None or name != asked[1] else ""


def _within(node: ast.AST, prefix: str) -> Iterator[Function]:
    for one in ast.iter_child_nodes(node):
        if isinstance(one, ast.ClassDef) and not one.name.startswith("_"):
            yield from _within(one, f"{prefix}.{one.name}")
        elif isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and not one.name.startswith("_"):
            first = _SENTENCE.match(" ".join((ast.get_docstring(one) or "").split("\n\n")[0].split()))
            signature = f"{one.name}({_arguments(one)})"
            if first is not None and len(first[0]) <= SENTENCE and len(signature) <= SIGNATURE and "`" not in signature:
                yield Function(f"{prefix}.{one.name}", signature, first[0], one.lineno)


def _arguments(one: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """What a caller gives: without what a method is bound to, and without annotations."""
    for found in ast.walk(one.args):
        if isinstance(found, ast.arg):
            found.annotation = None
    return re.sub(r"^(self|cls)(, /)?(, |$)", "", ast.unparse(one.args))


def _hidden(dotted: str) -> bool:
    return any(part.startswith("_") for part in dotted.split("."))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
