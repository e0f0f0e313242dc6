"""Several processes of one command on this machine: `train.nproc` without torchrun. Free of torch."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from gigatrain.errors import REQUEUE

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SPAWNED = "GIGATRAIN_SPAWNED"  # tells the ranks that `spawn` says for all of them why they failed
COLLECTIVE_S = 600.0  # of a collective: a rank that died must not hold the others for torch's half an hour
GRACE_S = 30.0  # what the others get to leave by themselves once one has failed
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def spawn(count: int, arguments: Sequence[str], why: Callable[[], str | None] = lambda: None) -> int:
    """Run `gigatrain ARGUMENTS` as `count` ranks and wait; signals are passed on. Returns 0, or the exit code of the first process that failed.

    Once one has failed the others get SIGTERM, and SIGKILL after `GRACE_S`: a rank that waits for a dead one would wait until its time limit. A rank that a
    signal ended could say nothing itself, so it is named here. If this process is killed the ranks get SIGTERM: else they would go on unseen, and keep
    the run folder from whoever resumes it. `why`, asked once all have ended and one had failed, is the last word: what the ranks themselves left about it.
    """
    libc, parent = ctypes.CDLL(None) if sys.platform == "linux" else None, os.getpid()

    def tied() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until it can hear them (leaving.installed): before that they would kill it
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before that
                os._exit(128 + signal.SIGTERM)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    shared = {SPAWNED: "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    running: list[subprocess.Popen[bytes]] = []
    before = {number: signal.signal(number, lambda number, frame: _pass_on(running, number, frame)) for number in _PASSED_ON}
    try:
        for rank in range(count):
            environment = {"OMP_NUM_THREADS": threads} | os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "gigatrain", *arguments]
            running.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=tied))  # noqa: PLW1509 - one thread here
        code = _wait(running)
        if code:
            _end(running)
            if code != REQUEUE and (said := why()):
                print(f"gigatrain: {said}", file=sys.stderr)
        return code
    finally:
        _end(running)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(running: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()


def _pass_on(running: Sequence["subprocess.Popen[bytes]"], number: int, _: FrameType | None) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(number)


def _wait(running: Sequence["subprocess.Popen[bytes]"]) -> int:
    """Until all have ended; a signal's number N is told as 128 + N, as shells do."""
    while True:
        codes = [process.poll() for process in running]
        failed = REQUEUE if REQUEUE in codes else next((code for code in codes if code), None)  # who was asked to leave explains the others
        if failed is not None:
            break
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
    for rank, ended in enumerate(codes):
        if ended is not None and ended < 0:
            print(
                f"gigatrain: rank {rank} of {len(running)} was ended by {signal.Signals(-ended).name}{' (out of memory?)' * (ended == -signal.SIGKILL)}; "
                "the others are stopped, and --resume goes on from the newest checkpoint",
                file=sys.stderr,
            )
    end = time.monotonic() + GRACE_S
    said = [process.returncode for process in running if process.returncode and process.returncode > 0]
    for process in running:
        if process.poll() is None:
            process.terminate()
    while time.monotonic() < end and any(process.poll() is None for process in running):
        time.sleep(0.05)
    code = REQUEUE if failed == REQUEUE else said[0] if said else failed
    return code if code > 0 else 128 - code
