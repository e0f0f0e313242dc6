"""A disk that stops at any moment: what a save did to it, call by call, and every state that a power cut may leave of that.

POSIX promises little: what was written to a file is on the disk once that file was synced, a name once its folder was. All else, up to the cut, may be there
or not, each by itself, in any order; written bytes also half, or as zeros. (After "All File Systems Are Not Created Equal", OSDI 2014: ALICE.)
"""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOST = 20_000  # states of one cut: more would mean that a save leaves much unsynced


class Recorder:
    """`os`, with every change below `root` written down. Stands in for the `os` of gigatrain.checkpoint.writing."""

    def __init__(self, root: Path) -> None:
        self.root, self.operations = root, list[tuple[Any, ...]]()
        self.nodes: dict[str, int] = {}  # path -> number
        self.descriptors: dict[int, int] = {}
        self.before: dict[int, dict[str, int] | bytes] = {}  # what was there, durable
        self._take(str(root))

    def _take(self, path: str) -> int:
        number = self.nodes[path] = len(self.nodes)
        if os.path.isdir(path):
            self.before[number] = {}
            for name in sorted(os.listdir(path)):
                self.before[number][name] = self._take(f"{path}/{name}")  # type: ignore[index]
        else:
            self.before[number] = Path(path).read_bytes()
        return number

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _split(self, path: str) -> tuple[int, str]:
        folder, name = os.path.split(path)
        return self.nodes[folder], name

    def _new(self, path: str, what: str) -> int:
        number = self.nodes[path] = 1 + max(
            [*self.nodes.values(), *self.before, *(op[3] for op in self.operations if op[0] in ("file", "folder"))]
        )
        self.operations.append((what, *self._split(path), number))
        return number

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        descriptor = os.open(path, flags, mode)
        if str(path) not in self.nodes:
            assert flags & os.O_CREAT, f"{path} is not known"
            self._new(str(path), "file")
        self.descriptors[descriptor] = self.nodes[str(path)]
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        count = os.write(descriptor, data)
        self.operations.append(("data", self.descriptors[descriptor], bytes(data[:count])))
        return count

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        self.operations.append(("sync", self.descriptors[descriptor]))

    def close(self, descriptor: int) -> None:
        os.close(descriptor)
        self.descriptors.pop(descriptor)

    def mkdir(self, path: str) -> None:
        os.mkdir(path)
        self._new(path, "folder")

    def makedirs(self, path: str, *, exist_ok: bool) -> None:
        if not os.path.isdir(path):
            self.mkdir(path)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)
        self.operations.append(("rename", *self._split(old), *self._split(new), self.nodes[old]))
        for path in [path for path in self.nodes if path == old or path.startswith(f"{old}/")]:
            self.nodes[new + path[len(old) :]] = self.nodes.pop(path)

    def unlink(self, path: str) -> None:
        os.unlink(path)
        self.operations.append(("remove", *self._split(path), self.nodes.pop(path)))

    def rmdir(self, path: str) -> None:
        os.rmdir(path)
        self.operations.append(("remove", *self._split(path), self.nodes.pop(path)))

    # ---- What may be left ----

    def _touches(self, operation: tuple[Any, ...]) -> set[int]:
        """The nodes whose syncs make it durable: one of them is enough, as file systems log a rename in one piece."""
        return {operation[1], operation[3]} if operation[0] == "rename" else {operation[1]}

    def tree(self, chosen: Iterator[tuple[tuple[Any, ...], str]] | list[tuple[tuple[Any, ...], str]]) -> dict[str, bytes | None]:
        """Path -> content (None: a folder) of what can be reached after these operations, each with how it came out."""
        nodes: dict[int, Any] = {number: dict(held) if isinstance(held, dict) else held for number, held in self.before.items()}
        nodes |= {operation[3]: {} for operation in self.operations if operation[0] == "folder"}
        for operation, how in chosen:
            kind, node, *rest = operation
            if kind in ("file", "folder"):
                nodes.setdefault(rest[1], b"")
                nodes[node][rest[0]] = rest[1]
            elif kind == "data":
                held, data = nodes.setdefault(node, b""), rest[0]
                nodes[node] = held + {"whole": data, "half": data[: len(data) // 2], "zeros": bytes(len(data))}[how]
            elif kind == "remove":
                nodes[node].pop(rest[0], None)
            elif kind == "rename":
                name, into, new, moved = rest
                nodes[node].pop(name, None)
                nodes[into][new] = moved
        found: dict[str, bytes | None] = {}

        def walk(node: int, path: str) -> None:
            held = nodes.get(node, b"")
            if isinstance(held, dict):
                found[path] = None
                for name, inner in held.items():
                    walk(inner, f"{path}/{name}" if path else name)
            else:
                found[path] = held

        walk(0, "")
        return found

    def cuts(self) -> Iterator[tuple[int, dict[str, bytes | None]]]:
        """Every state, once, that a cut after some number of operations may leave."""
        seen: set[Any] = set()
        folders = {number for number, held in self.before.items() if isinstance(held, dict)}
        folders |= {op[3] for op in self.operations if op[0] == "folder"}
        for count in range(len(self.operations) + 1):
            done = self.operations[:count]
            synced = {node: at for at, (kind, node, *_) in enumerate(done) if kind == "sync"}
            ways: list[list[tuple[tuple[Any, ...], str] | None]] = []
            for at, operation in enumerate(done):
                if operation[0] == "sync":
                    continue
                if any(synced.get(node, -1) > at for node in self._touches(operation)):
                    ways.append([(operation, "whole")])
                elif operation[0] == "data":
                    ways.append([None, (operation, "half"), (operation, "zeros"), (operation, "whole")])
                else:
                    ways.append([None, (operation, "whole")])
            total = 1
            for way in ways:
                total *= len(way)
            assert total <= MOST, f"{total} states after {count} operations"
            for chosen in itertools.product(*ways):
                tree = self.tree([one for one in chosen if one is not None])
                key = frozenset(tree.items())
                if key not in seen:
                    seen.add(key)
                    yield count, tree


def recorded(writing: Any, root: Path, call: Callable[[], Any]) -> Recorder:
    """What `call` did below `root`, through the module `writing`."""
    recorder = Recorder(root)
    writing.os = recorder
    try:
        call()
    finally:
        writing.os = os
    return recorder


def made(tree: dict[str, bytes | None], root: Path) -> None:
    """Put a tree onto the disk, below `root`."""
    for path, content in tree.items():
        if content is None:
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            (root / path).write_bytes(content)


def held(root: Path) -> dict[str, bytes | None]:
    """What is on the disk."""
    found: dict[str, bytes | None] = {"": None}
    for path in root.rglob("*"):
        found[str(path.relative_to(root))] = None if path.is_dir() else path.read_bytes()
    return found
