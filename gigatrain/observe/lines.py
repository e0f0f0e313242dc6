"""A file of lines that a run goes on without: what a disk refuses waits in memory, and is written once the disk takes it again."""

import contextlib
import os
from pathlib import Path


class Lines:
    """Appends lines to a file. Nothing here raises OSError once it is open: a full disk, or one with errors, costs no line while the process lives.

    `waiting` has the lines that the file lacks; whoever keeps them elsewhere (a checkpoint does) gives them to `again` after a restart.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []
        self.refused: str | None = None  # why the last try failed
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self._whole = self._end = self._file.seek(0, os.SEEK_END)  # what a sync made durable, and what was written

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
        """Makes what was written durable. What a disk took and could not keep is written once more: a second fsync would say that all is well."""
        self._write()
        try:
            if self.refused and self._end > self._whole:
                self._file.seek(self._whole)
                data = self._file.read(self._end - self._whole)
                self._file.seek(self._whole)
                self._file.write(data)
            os.fsync(self._file.fileno())
        except OSError as failure:
            self.refused = failure.strerror
            return
        self._whole, self.refused = self._end, None

    def close(self) -> None:
        """The last try to write what waits."""
        self._write()
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self) -> None:
        """What waits, at the end; a line that did not fit leaves no part of itself."""
        data = left = "".join(f"{line}\n" for line in self.waiting).encode()
        try:
            self._file.seek(self._end)
            while left:
                left = left[self._file.write(left) :]
        except OSError as failure:
            self.refused = failure.strerror
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            return
        self._end += len(data)
        self.waiting = []
