"""Plain data as YAML that people read: block style, strings quoted where a reader could take them for something else.

Only what a manifest or a model card holds: dicts with string keys, lists, strings, numbers, booleans and None. Every YAML 1.1 and 1.2 reader gets back what
went in (the tests read it with PyYAML), so PyYAML need not be there where jobs are launched.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

# Begins with a letter or a slash, and holds nothing that YAML reads as a sign: no ": ", no " #", no trailing colon or space.
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9._/-]*(:[A-Za-z0-9._/-]+)*\Z")
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"}  # of YAML 1.1, whatever their case
_BLOCK = re.compile(r"[!-~][ -~]*(\n[ -~]*)*\n\Z")  # printable ASCII that begins with no space
_UNPRINTABLE = re.compile(
    "[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]"
)  # what JSON leaves as it is and YAML refuses or takes for a line's end


def text(*documents: Any) -> str:
    """The documents one after another, each begun by `---`."""
    return "".join("---\n" + "\n".join(_lines(document)) + "\n" for document in documents)


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _entry(f"{_string(key)}:", inner)
    elif isinstance(value, list | tuple) and value:
        for inner in value:
            if _nested(inner):  # begins behind the dash
                first, *rest = _lines(inner)
                yield f"- {first}"
                yield from (_indented(line) for line in rest)
            else:
                yield from _entry("-", inner)
    else:
        yield _scalar(value)


def _entry(head: str, value: Any) -> Iterator[str]:
    if _nested(value):
        yield head
        yield from (_indented(line) for line in _lines(value))
    elif isinstance(value, str) and value.count("\n") > 1 and _BLOCK.match(value) and not value.endswith("\n\n"):
        yield f"{head} |"
        yield from (_indented(line) for line in value[:-1].split("\n"))
    else:
        yield f"{head} {_scalar(value)}"


def _indented(line: str) -> str:
    return f"  {line}" if line else ""


def _nested(value: Any) -> bool:
    return isinstance(value, dict | list | tuple) and bool(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list | tuple):
        return "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, float):
        assert math.isfinite(value), f"{value} has no place in YAML that all read alike"
        digits, sign, power = repr(value).partition("e")  # YAML 1.1 takes 1e-05 for a text, and 1.0e-05 for a number
        return digits + (".0" if sign and "." not in digits else "") + sign + power
    assert isinstance(value, int), f"{value!r} has no place in a manifest"
    return str(value)


def _string(value: str) -> str:
    if _PLAIN.match(value) and value.lower() not in _WORDS:
        return value
    quoted = json.dumps(value, ensure_ascii=False)  # a JSON string is a double-quoted YAML string, but for these:
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
