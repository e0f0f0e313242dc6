"""How a process that is asked to leave does so, from its first moment to its last, and how the ranks of a run leave as one. Free of torch.

SIGTERM, SIGUSR1 and SIGINT ask; any one process of a run may be the one that hears. What it does depends on where it is:

    start   nothing is lost: it leaves at once, with the exit code `errors.REQUEUE`
    steps   all ranks leave at the same boundary (before a step, or a microbatch of a validation), are saved, and leave with that code
    after   the last checkpoint is committed: it leaves at once; a resume makes what is missing (export, sample, summary)

A handler of Python's runs only when the main thread comes back from C, where it may wait for other ranks, a compiler or a GPU; the signal's number in a pipe
(`signal.set_wakeup_fd`) wakes a thread of our own at once. Whoever hears writes the signal's name into the job's store. A thread of each rank waits there; it
promises a boundary that its main thread, which runs ahead of the device and so of others, has not reached and does not pass until all have promised; all leave
at the furthest. So nobody polls, no collective is added to a step, and no device is waited for. If any rank is still at the start then no step was done, as
ranks meet before their first, and all leave at once.

A second signal changes nothing: it cannot cut a save short. Only a second Ctrl-C, which is a person's, ends the process where it stands.
"""

import contextlib
import datetime
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Literal, Protocol

from gigatrain.errors import REQUEUE, RunError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
UNWIND_S = 5.0  # what a main thread that waits in C gets to leave by itself
PROMISES_S = 60.0  # until all ranks have promised; one that is stopped or gone is found by whoever waits for it in a collective, or here
_AGAIN_S = 0.1  # between two tries
_WAIT = datetime.timedelta(hours=1)  # of one wait for the store; then again
_NOW, _NEVER = -1, 1 << 60  # promises of a rank that is at the start, or after


class Left(SystemExit):
    """The process leaves because it was asked to; nothing is lost. Not an Exception, so that nobody takes it for a failure."""

    def __init__(self, why: str) -> None:
        super().__init__(REQUEUE)
        self.why = why


class Store(Protocol):
    """What is needed of torch's stores."""

    def get(self, key: str, /) -> bytes: ...
    def set(self, key: str, value: str, /) -> None: ...
    def add(self, key: str, count: int, /) -> int: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...
    def wait(self, keys: list[str], timeout: datetime.timedelta, /) -> None: ...
    def clone(self) -> "Store": ...


class Leaving:
    """Of this process; `installed` makes the one that there is."""

    def __init__(self) -> None:
        self.signal: str | None = None  # the first that was heard, here or by another rank
        self.where: Literal["start", "steps", "after"] = "start"
        self.at: int | None = None  # the boundary at which all ranks leave
        self._boundary = 0  # boundaries that the main thread has reached
        self._promised: int | None = None
        self.meeting = False  # connecting to the other ranks
        self._now = self._raised = False
        self._interrupts = 0  # that the main thread has heard itself: others may have heard the first one before it
        self._turn = threading.Lock()
        self._decided = threading.Event()
        self._store: Store | None = None
        self._rank, self._ranks = 0, 1
        self._main = threading.main_thread()

    # ---- What the main thread asks ----

    @property
    def asked(self) -> bool:
        """Whether anybody wants this process to leave."""
        return self.signal is not None

    def steps(self) -> None:
        """From here on there is something to lose."""
        with self._turn:
            self.where = "steps"

    def saved(self) -> None:
        """Nothing is left to lose."""
        with self._turn:
            self.where = "after"

    def leave(self) -> None:
        """Raises Left if the process was asked to leave and nothing would be lost."""
        if self.asked:
            self._raise()

    def due(self) -> bool:
        """Whether to leave here: a boundary, which every rank reaches, in the same order. Raises RunError where another rank keeps all waiting."""
        if self._store is None:
            return self.asked
        with self._turn:
            self._boundary += 1
            promised = self._promised
        if promised is not None and self._boundary >= promised and not self._decided.wait(PROMISES_S):
            lost = RunError(f"{self.signal} asked the ranks to leave, and one of them has not answered in {PROMISES_S:.0f} s")
            lost.secondary = True
            raise lost
        return self.at is not None and self._boundary >= self.at

    # ---- Who hears ----

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if number == signal.SIGINT and (self.where != "steps" or self._interrupts > 1):
            raise KeyboardInterrupt
        self.signal = self.signal or name
        lost_nothing = self._now or self.where == "after" or (self.where == "start" and self._store is None)
        if lost_nothing and not _importing(frame):
            self._raise()

    def _raise(self) -> None:
        if not self._raised and self.where != "steps":
            self._raised = True
            raise Left(self.signal or "SIGTERM")

    def _hear(self, pipe: int) -> None:
        """A thread: what the main thread may be too busy to hear."""
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number not in SIGNALS or signal.getsignal(number) != self._arrived:
                    continue  # another's, as of the starter of several ranks
                if number == signal.SIGINT and self.where != "steps":
                    continue
                self.signal = self.signal or signal.Signals(number).name
                if self.meeting:
                    os._exit(REQUEUE)  # nothing is made, and who sees our connections close sees our exit code first
                if self._store is not None and self.where != "after":
                    with contextlib.suppress(Exception):  # the store is gone: so is the run, or it is over
                        self._store.clone().compare_set("leave", "", self.signal)
                elif self.where != "steps":
                    self._leave_now()
        os.close(pipe)

    def _leave_now(self) -> None:
        """Have the main thread leave; if it does not, the process does."""
        if not self._now:
            self._now = True
            threading.Thread(target=self._end, name="gigatrain-leave", daemon=True).start()

    def _end(self) -> None:
        end = time.monotonic() + UNWIND_S
        while time.monotonic() < end:
            if not self._raised:
                signal.pthread_kill(self._main.ident or 0, signal.SIGUSR1)
            time.sleep(_AGAIN_S)
        os._exit(REQUEUE)

    # ---- What ranks agree on ----

    @contextlib.contextmanager
    def among(self, store: Store, rank: int, ranks: int) -> Iterator[None]:
        """While inside, what one of `ranks` hears all hear; `store` is this attempt's own, that all reach."""
        self._rank, self._ranks, self._store = rank, ranks, store
        self.meeting = False
        follower = threading.Thread(target=self._follow, args=(store.clone(),), name="gigatrain-leave", daemon=True)
        follower.start()
        if self.asked and self.where == "start":  # while the ranks met
            store.clone().compare_set("leave", "", self.signal or "")
        try:
            yield
        finally:
            self._store = None
            if follower.is_alive() and not self._now:
                with contextlib.suppress(Exception):
                    store.compare_set("leave", "", "over")  # a thread that still waits while Python ends may end with an abort
                follower.join(1)

    def _follow(self, store: Store) -> None:
        """A thread: wait until the ranks are asked to leave, promise, and learn where."""
        try:
            name = self._get(store, "leave")
            if name == "over":
                return
            self.signal = self.signal or name
            with self._turn:
                promise = {"start": _NOW, "steps": self._boundary + 1, "after": _NEVER}[self.where]
                self._promised = promise if promise > 0 else None
            store.set(f"promise/{self._rank}", str(promise))
            if store.add("promises", 1) == self._ranks:
                promises = [int(one) for one in store.multi_get([f"promise/{rank}" for rank in range(self._ranks)])]
                store.set("at", str(_NOW if _NOW in promises else max(promises)))
            at = int(self._get(store, "at"))
        except Exception:  # of the network: the rank that had the store is gone, which collectives find too
            return
        if at == _NOW:
            with self._turn:
                self.where = "start"
            self._leave_now()
        self.at = at
        self._decided.set()

    def _get(self, store: Store, key: str) -> str:
        """The value of a key, once it has one; who waits asks nothing of the network."""
        while True:
            begun = time.monotonic()
            try:
                store.wait([key], _WAIT)
                return store.get(key).decode()
            except Exception:
                if time.monotonic() - begun < _WAIT.total_seconds():
                    raise


def _importing(frame: FrameType | None) -> bool:
    """Whether the main thread is within an import: torch's C++ calls Python there, and an exception of ours would abort the process."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


_here: list[Leaving] = []


@contextlib.contextmanager
def installed(*, last: bool = False) -> Iterator[Leaving]:
    """Hear signals from here on; inside of another `installed`, its own. The former handlers are put back on exit.

    `last`: the process ends with this, and is not to be killed by a signal while it does.
    """
    if _here:
        yield _here[0]
        return
    leaving = Leaving()
    pipe, end = os.pipe()
    os.set_blocking(end, False)
    before = {number: signal.signal(number, leaving._arrived) for number in SIGNALS}
    wakes = signal.set_wakeup_fd(end, warn_on_full_buffer=False)
    threading.Thread(target=leaving._hear, args=(pipe,), name="gigatrain-hear", daemon=True).start()
    _here.append(leaving)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # whoever starts ranks blocks them until somebody is there to hear
        yield leaving
    finally:
        _here.clear()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last and number != signal.SIGINT else handler)
        signal.set_wakeup_fd(wakes)
        os.close(end)


def here() -> Leaving | None:
    """This process's, if it hears."""
    return _here[0] if _here else None
