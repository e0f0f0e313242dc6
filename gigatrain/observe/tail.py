"""A JSONL file that grows, read on where the last read ended. Free of torch."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PART_BYTES = 1 << 20  # of a long file that are in memory at once, as objects some ten times as much
KNOWN_BYTES = 1 << 12  # of the line before, by which a file that was cut and has grown again is known


class Tail:
    """The whole lines of a JSONL file, read on where the last read ended; from its start if the file was replaced or cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place: tuple[int, int] | None = None  # device and inode
        self._offset = 0
        self._before = b""  # what stands before the offset

    def rows(self, most: int = -1) -> tuple[list[dict[str, Any]], bool]:
        """New objects, and whether those given before are void. A line that is no JSON object is left out, and half a line waits.

        `most`: bytes after which the next line is left for another call; -1: all that there is.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                place = (status.st_dev, status.st_ino)
                file.seek(self._offset - len(self._before))
                afresh = place != self._place or file.read(len(self._before)) != self._before
                if afresh:
                    self._place, self._offset, self._before = place, 0, b""
                    file.seek(0)
                data = file.read(most)
                if most >= 0 and not data.endswith(b"\n"):
                    data += file.readline()
        except OSError:
            afresh, self._place, self._offset, self._before = self._place is not None, None, 0, b""
            return [], afresh
        whole = data.rfind(b"\n") + 1
        if whole:
            self._offset += whole
            self._before = data[data.rfind(b"\n", 0, whole - 1) + 1 : whole][-KNOWN_BYTES:]
        return list(objects(data[:whole])), afresh

    def parts(self) -> Iterator[tuple[list[dict[str, Any]], bool]]:
        """`rows` of all that there is, PART_BYTES at a time: a long file is never in memory as a whole."""
        while True:
            before = self._offset
            rows, afresh = self.rows(PART_BYTES)
            if not afresh and self._offset == before:
                return
            yield rows, afresh

    def again(self) -> None:
        """The next read gives everything once more."""
        self._offset, self._before = 0, b""


def objects(data: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects among lines."""
    for line in data.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(row := json.loads(line), dict):
                yield row


def ending(path: Path, most: int) -> Iterator[dict[str, Any]]:
    """The objects among the whole lines of a JSONL file's last `most` bytes; a line that is no JSON object is left out, a file that is not there has none."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - most))
        if size > most:
            file.readline()  # the rest of a line
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(row := json.loads(line), dict):
                    yield row
