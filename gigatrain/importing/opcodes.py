"""The instructions of a pickle, interpreted so that nothing it names is imported or called.

`pickletools.genops` takes the bytes apart; this machine knows the instructions that build containers, numbers and strings, and of those that import and call
(GLOBAL, REDUCE, NEWOBJ, BUILD) only what they would do for the names below, each by a function of ours. Any other name or instruction is refused by name,
before anything after it is read. Sizes are bounded: a pickle may not be larger than LIMIT_BYTES, nor have more than LIMIT_STEPS instructions, and what it
shares by its memo is shared here too, so that nesting doubles nothing.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gigatrain.errors import CheckpointError

LIMIT_BYTES = 1 << 30  # Megatron's .metadata of 10^5 tensors has tens of megabytes
LIMIT_STEPS = 200_000_000
LIMIT_DEPTH = 100_000  # marks and values that stand on the stack at once beside those of containers


@dataclass(frozen=True)
class Name:
    """What a pickle would have imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class Record:
    """What a pickle would have made an object: its class's name, what it was to be made of, and its attributes. It has no methods."""

    kind: str
    made_of: tuple[Any, ...] = ()
    state: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """What stands for the names that a pickle may hold. `reduce`: by name, of the arguments; `records`: kept as a Record, made or called; `values`: the name
    itself stands for one. `persistent`: of a persistent id."""

    reduce: Mapping[Name, Callable[..., Any]] = field(default_factory=dict)
    records: frozenset[Name] = frozenset()
    values: Mapping[Name, Any] = field(default_factory=dict)
    persistent: Callable[[Any], Any] | None = None


class _Mark:
    pass


_MARK = _Mark()
_PLAIN = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERAL = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}


def read(data: bytes, known: Known, where: str) -> Any:
    """What a pickle stands for: dicts, lists, tuples, numbers, strings, and what `known` gives. Raises CheckpointError, naming what is refused."""
    if len(data) > LIMIT_BYTES:
        raise CheckpointError(f"{where} is a pickle of {len(data)} bytes; {LIMIT_BYTES} are read at most")
    try:
        return _Machine(known, where).run(data)
    except CheckpointError:
        raise
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as failure:
        raise CheckpointError(f"{where} is no pickle that can be read: {type(failure).__name__}: {str(failure)[:200]}") from None


class _Machine:
    def __init__(self, known: Known, where: str) -> None:
        self.known, self.where = known, where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for count, (operation, argument, where) in enumerate(pickletools.genops(data)):
            at = where or 0
            if count > LIMIT_STEPS or len(self.stack) > LIMIT_DEPTH + LIMIT_STEPS // 10:
                raise self._refused(f"more than {LIMIT_STEPS} instructions", at)
            if operation.name == "STOP":
                if len(self.stack) != 1 or at + 1 != len(data):
                    raise ValueError("it does not end where it says")
                return self.stack[0]
            self._step(operation.name, argument, at)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any, at: int) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _LITERAL:
            stack.append(argument)
        elif name in _PLAIN:
            stack.append(_PLAIN[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in _PUT:
            self.memo[int(argument)] = stack[-1]
        elif name in _GET:
            stack.append(self.memo[int(argument)])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("EMPTY_LIST", "EMPTY_SET"):
            stack.append([])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in _TUPLES:
            count = _TUPLES[name]
            found = tuple(stack[-count:])
            if len(found) != count or _MARK in found:
                raise ValueError("a tuple of too few values")
            stack[-count:] = [found]
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            found = [stack.pop()] if name == "APPEND" else self._marked()
            self._expect(stack[-1], list).extend(found)
        elif name in ("SETITEM", "SETITEMS"):
            found = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._marked()
            target = self._expect(stack[-1], dict)
            for key, value in zip(found[::2], found[1::2], strict=True):
                target[_key(key)] = value
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            stack.append(self._named(module, attribute, at))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._named(self._expect(module, str), self._expect(attribute, str), at))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = self._expect(stack.pop(), tuple), stack.pop()
            stack.append(self._made(called, arguments, at))
        elif name == "BUILD":
            self._built(stack.pop(), stack[-1])
        elif name == "BINPERSID":
            if self.known.persistent is None:
                raise self._refused("a persistent id", at)
            stack.append(self.known.persistent(stack.pop()))
        else:
            raise self._refused(f"the instruction {name}", at)

    def _marked(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("a mark is missing")
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def _named(self, module: str, attribute: str, at: int) -> Any:
        name = Name(module, attribute)
        if name in self.known.values:
            return self.known.values[name]
        if name in self.known.reduce or name in self.known.records:
            return name
        raise self._refused(f"{name}", at)

    def _made(self, called: Any, arguments: tuple[Any, ...], at: int) -> Any:
        if not isinstance(called, Name):
            raise self._refused(f"a call of a {type(called).__name__}", at)
        if called in self.known.reduce:
            return self.known.reduce[called](*arguments)
        return Record(str(called), arguments)

    def _built(self, state: Any, target: Any) -> None:
        if isinstance(target, Record):
            if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict | type(None)) and isinstance(state[1], dict):
                state = {**(state[0] or {}), **state[1]}
            target.state = state if isinstance(state, dict) else {"": state}
        elif not isinstance(target, dict):  # an OrderedDict's attributes: the versions of modules
            raise ValueError(f"attributes of {type(target).__name__}")

    @staticmethod
    def _expect(value: Any, kind: type) -> Any:
        if not isinstance(value, kind) or value is _MARK:
            raise ValueError(f"{type(value).__name__} where {kind.__name__} should be")
        return value

    def _refused(self, what: str, at: int) -> CheckpointError:
        return CheckpointError(
            f"{self.where} holds {what} (byte {at}), which a checkpoint does not need and which is never run here; "
            "if you trust the file, save it again from its own system as a plain state dict of tensors"
        )


def _key(key: Any) -> Any:
    """A dict's key: of a Record its attributes, since it is compared by them (all but `index`, which DCP's own comparison leaves out as a hint)."""
    if isinstance(key, Record):
        return (key.kind, *(value for name, value in sorted(key.state.items()) if name != "index"))
    if isinstance(key, tuple) and any(isinstance(one, tuple) for one in key):
        raise ValueError("a key of tuples in tuples, whose hash may take for ever")
    return key
