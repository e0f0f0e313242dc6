"""A file of lines that a run goes on without: what a disk refuses waits in memory, and is written once the disk takes it again."""

import contextlib
import os
from pathlib import Path
from typing import BinaryIO


class Lines:
    """Appends lines to a file. Nothing here raises OSError: a full disk, or one with errors, costs durability for as long as it refuses, and no line.

    `waiting` has the lines that are not known to be on disk; whoever keeps them elsewhere (a checkpoint does) gives them to `again` after a restart.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []
        self.refused: str | None = None  # why the last try failed
        self._file: BinaryIO = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self._whole = self._file.seek(0, os.SEEK_END)  # up to here a sync has succeeded, or another process wrote
        self._written = 0  # of `waiting`, the lines that the file has behind `_whole`

    def add(self, line: str) -> None:
        """One line more, without its end."""
        self.waiting.append(line)
        self._write()

    def again(self, lines: list[str]) -> None:
        """Lines that were waiting when a checkpoint was made: those that the file lacks."""
        if lines:
            known = set(self.path.read_text(encoding="utf-8", errors="replace").splitlines())
            for line in lines:
                if line not in known:
                    self.add(line)

    def sync(self) -> None:
        """Makes what was written durable. What a disk took and then could not keep is written anew, since the kernel has forgotten it."""
        self._write()
        if self._written < len(self.waiting):
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as failure:
            self.refused, self._written = failure.strerror, 0
            return
        self._whole = self._file.seek(0, os.SEEK_END)
        self.waiting, self._written, self.refused = [], 0, None

    def close(self) -> None:
        """The last try."""
        self.sync()
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self) -> None:
        """What waits, at its place; a line that did not fit leaves no part of itself."""
        place = self._whole + sum(len(line.encode()) + 1 for line in self.waiting[: self._written])
        data = "".join(f"{line}\n" for line in self.waiting[self._written :]).encode()
        try:
            self._file.seek(place)
            self._file.truncate(place)
            while data:
                data = data[self._file.write(data) :]
        except OSError as failure:
            self.refused = failure.strerror
            with contextlib.suppress(OSError):
                self._file.truncate(place)
            return
        self._written, self.refused = len(self.waiting), None
