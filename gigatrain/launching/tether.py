"""A command at the end of a pipe: `python -m gigatrain.launching.tether FOLDER NAME=VALUE... -- COMMAND...`: a host held through ssh. Torch-free.

ssh passes no signals on, and what it started goes on when it dies. So this end reads lines from its standard input, `USR1`, `TERM` or `KILL`, and does that to
the command; the end of the input is TERM. What is left `GRACE_S` after TERM is killed, with everything that it started.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from gigatrain.launching.agent import children

GRACE_S = 30.0  # what ranks get to leave by themselves: a save, or the news that another rank is gone
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: if this end is killed the command still hears of it
_PR_SET_CHILD_SUBREAPER = 36  # what a dead agent leaves behind becomes ours, and is found


def main(arguments: Sequence[str]) -> int:
    """Run the command in its folder, with these variables, until it has ended; its exit code, 128 + N for a signal N."""
    folder, *rest = arguments
    given, command = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    os.chdir(folder)
    for pair in given:
        name, _, value = pair.partition("=")
        os.environ[name] = value
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def tied() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=tied)  # noqa: PLW1509 - one thread here
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: _do("USR1" if number == signal.SIGUSR1 else "TERM", process))
    threading.Thread(target=_listen, args=(process,), daemon=True).start()
    code = process.wait()
    _kill(os.getpid())  # ranks of an agent that was killed
    return code if code >= 0 else 128 - code


def _listen(process: "subprocess.Popen[bytes]") -> None:
    while line := os.read(0, 64):
        for word in line.decode("ascii", "replace").split():
            _do(word, process)
    _do("TERM", process)


def _do(word: str, process: "subprocess.Popen[bytes]") -> None:
    if word == "KILL":
        _kill(os.getpid())
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGUSR1 if word == "USR1" else signal.SIGTERM)
    if word == "TERM":
        end = threading.Timer(GRACE_S, _kill, (os.getpid(),))
        end.daemon = True
        end.start()


def _kill(parent: int) -> None:
    """Everything that `parent` has started, to the last grandchild."""
    for child in children(parent):
        _kill(child)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
