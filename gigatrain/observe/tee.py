"""A process beside rank 0 that copies what it prints to the screen and to its log; run as a file of its own, so it imports nothing of ours.

It lives until all who print are gone, so that the last words of a rank that crashes reach both. Signals that end a run pass it by. What comes before the
log has a path is kept (1 MiB) and written then. A log that cannot be written is said once and never stops anybody; nor does a screen that cannot, once
there is a log. A screen that nobody reads any more, as of `| head`, before there is one: it leaves with `UNREAD`, and whoever prints is to learn of it.

Through the control pipe come words that end in a zero byte: the log's path, and an empty one when the rank has said its last. The answer to that is that all
it said is copied; children of it that live on, as torch's compile workers do, are still listened to.
"""

import contextlib
import errno
import os
import select
import signal
import sys

KEPT_BYTES = 1 << 20
UNREAD = 141  # what a shell tells of SIGPIPE
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


class _Tee:
    def __init__(self, sources: dict[int, int], control: int, answer: int) -> None:
        """`sources`: what is read from -> what it is copied to."""
        self.sources, self.control, self.answer = sources, control, answer
        self.keep, self.words = _Keep(), b""
        self.waiting = [*sources, control]
        self.ended = False
        self.lost: set[int] = set()  # screens that are not written any more

    def run(self) -> None:
        while set(self.waiting) & set(self.sources):
            ready = select.select(self.waiting, [], [], 0 if self.ended else None)[0]
            if self.ended and not ready:
                self.ended = False
                with contextlib.suppress(OSError):
                    os.write(self.answer, b"1")
            for one in ready:
                if one == self.control:
                    self.told()
                else:
                    self.copy(one)
        self.listen()  # a path may have been the last thing that the rank did

    def listen(self) -> None:
        while self.control in self.waiting and select.select([self.control], [], [], 0)[0]:
            self.told()

    def told(self) -> None:
        data = os.read(self.control, 1 << 16)
        if not data:
            self.waiting.remove(self.control)
        *whole, self.words = (self.words + data).split(b"\0")
        for word in whole:
            if word:
                self.keep.opened(word)
            self.ended |= not word

    def copy(self, source: int) -> None:
        data = os.read(source, 1 << 16)
        if not data:
            self.waiting.remove(source)
            os.close(source)
            return
        self.keep.add(data)
        screen = self.sources[source]
        try:
            while data and screen not in self.lost:
                data = data[os.write(screen, data) :]
        except OSError as failure:
            if failure.errno == errno.EPIPE:
                self.listen()
                if self.keep.file < 0:
                    sys.exit(UNREAD)
            self.lost.add(screen)
            said = b"gigatrain: standard %s cannot be written: %s; training goes on, and its words are in the log only\n" % (
                b"output" if screen == 1 else b"error",
                (failure.strerror or "?").encode(),
            )
            self.keep.add(said)
            with contextlib.suppress(OSError):
                os.write(3 - screen, said)


if __name__ == "__main__":
    for name in IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    out, error, given, answers = map(int, sys.argv[1:5])
    _Tee({out: 1, error: 2}, given, answers).run()
