"""A process beside rank 0 that copies what it prints to the screen and to its log; run as a file of its own, so it imports nothing of ours.

It lives until all who print are gone, so that the last words of a rank that crashes reach both. Signals that end a run pass it by. What comes before the
log has a path is kept (1 MiB) and written then. A log that cannot be written is said once and never stops anybody.
"""

import contextlib
import os
import select
import signal
import sys

KEPT_BYTES = 1 << 20
IGNORED = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXFSZ", "SIGTSTP")


class _Keep:
    def __init__(self) -> None:
        self.file = -1
        self.early = bytearray()
        self.given_up = False

    def opened(self, path: bytes) -> None:
        try:
            self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as failure:
            self.lost(path, failure)
            return
        early, self.early = bytes(self.early), bytearray()
        self.add(early)

    def add(self, data: bytes) -> None:
        if self.file < 0:
            self.early += data[: 0 if self.given_up else KEPT_BYTES - len(self.early)]
            return
        try:
            while data:
                data = data[os.write(self.file, data) :]
        except OSError as failure:
            self.lost(b"of this rank", failure)

    def lost(self, path: bytes, failure: OSError) -> None:
        if not self.given_up:
            with contextlib.suppress(OSError):
                os.write(2, b"gigatrain: LOG NOT WRITTEN %s: %s; training goes on\n" % (path, (failure.strerror or "?").encode()))
        self.given_up = True


def _tee(sources: dict[int, int], control: int) -> None:
    """`sources`: what is read from -> what it is copied to; through `control` comes the log's path."""
    keep, path = _Keep(), b""
    waiting = [*sources, control]
    while set(waiting) & set(sources):
        for ready in select.select(waiting, [], [])[0]:
            data = os.read(ready, 1 << 16)
            if ready == control:
                path += data
                if not data:
                    waiting.remove(control)
                    if path:
                        keep.opened(path)
                continue
            keep.add(data)
            try:
                at = 0
                while at < len(data):
                    at += os.write(sources[ready], data[at:])
            except OSError:  # nobody reads the screen any more: whoever prints is to learn of it
                data = b""
            if not data:
                waiting.remove(ready)
                os.close(ready)
    if control in waiting:  # its words may have been the last thing that the rank did
        while data := os.read(control, 1 << 16):
            path += data
        if path:
            keep.opened(path)


if __name__ == "__main__":
    for name in IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    out, error, given = map(int, sys.argv[1:4])
    _tee({out: 1, error: 2}, given)
