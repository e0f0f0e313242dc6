"""Replicas as processes: each is a world of its own, started again alone when it fails, while the others go on. Free of torch.

    GIGATRAIN_REPLICA=1/4            this process is of replica 1 of 4; its RANK and WORLD_SIZE count within the replica
    GIGATRAIN_QUORUM=HOST:PORT       where the quorum listens (own: parallel/quorum.py; torchft: its lighthouse)
    GIGATRAIN_REPLICA_TOKEN=FILE     the run's token, mode 0600

`gigatrain train` on one machine sets all three by itself (`run`). Across nodes whatever starts a replica sets them: an array job, a torchrun per replica.
"""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from gigatrain.config import Sample
from gigatrain.errors import RunError
from gigatrain.parallel import quorum
from gigatrain.planning.plan import Plan

REPLICA, QUORUM, TOKEN = "GIGATRAIN_REPLICA", "GIGATRAIN_QUORUM", "GIGATRAIN_REPLICA_TOKEN"
NEVER_AGAIN = range(2, 7)  # exit codes of errors that another start meets again: recipe, site, plan, data, checkpoint
STEADY_S = 60.0  # a replica that lived so long has begun a new count of restarts
PAUSE_S = 0.5  # before a replica that failed is started again, doubled with each time
GRACE_S = 60.0
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass(frozen=True)
class Place:
    """Which replica this process is of, and where its quorum is."""

    replica: int
    replicas: int
    quorum: str
    token: Path


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place among replicas; None: it is of none. RunError where the environment is not as the head of this file says."""
    said = environment.get(REPLICA)
    if said is None:
        return None
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", said, re.ASCII)
    if found is None or not int(found[1]) < int(found[2]):
        raise RunError(
            f"the environment's {REPLICA} is {said[:40]!r}; write NUMBER/COUNT with a number from 0, for instance 0/2, or unset it"
        )
    if missing := [name for name in (QUORUM, TOKEN) if not environment.get(name)]:
        raise RunError(
            f"the environment has {REPLICA} and no {' and no '.join(missing)}; give each replica the quorum's HOST:PORT and the file of its token"
        )
    quorum.address(environment[QUORUM])
    return Place(int(found[1]), int(found[2]), environment[QUORUM], Path(environment[TOKEN]))


def started(environment: Mapping[str, str] = os.environ) -> int | None:
    """Ranks of the whole run, all replicas together, as whoever started this process says (torchrun, srun, our own starter); None: nobody did.

    RunError where WORLD_SIZE is no count.
    """
    said = environment.get("WORLD_SIZE")
    if not said:
        return None
    if not (said.isascii() and said.isdecimal() and int(said) > 0):
        raise RunError(f"the environment's WORLD_SIZE is {said[:40]!r} and no count of ranks; torchrun and train.nproc set it, or unset it")
    here = place(environment)
    return int(said) * (here.replicas if here else 1)


def part(plan: Plan, folder: Path) -> tuple[Plan, Path]:
    """The plan and the run folder of this process's replica: a world without `replicate`. RunError where plan and environment disagree."""
    here, wanted = place(), plan.recovery.replicas != "none"
    if here is None and not wanted:
        return plan, folder
    if here is None:
        raise RunError(
            f'recovery.replicas is "{plan.recovery.replicas}", and this start makes one world of all ranks; start each replica as a world of its own with '
            f"{REPLICA}=0/{plan.mesh.replicate}, {QUORUM} and {TOKEN} in its environment, or on one machine by `gigatrain train` alone"
        )
    if not wanted:
        raise RunError(f'the environment has {REPLICA}, and recovery.replicas is "none"; set it to "own" or "torchft", or unset {REPLICA}')
    if here.replicas != plan.mesh.replicate:
        raise RunError(
            f"the environment's {REPLICA} is of {here.replicas} replicas, and mesh.replicate is {plan.mesh.replicate}; make them equal"
        )
    alone = plan.mesh.model_copy(update={"replicate": 1})
    cut = plan.model_copy(update={"mesh": alone, "ranks": plan.ranks // plan.mesh.replicate})
    if here.replica:  # what is shown, served and exported is the first's
        quiet = plan.report.model_copy(update={"trackers": (), "prometheus": None})
        cut = cut.model_copy(update={"report": quiet, "sample": Sample(), "export": False})
    return cut, folder if here.replica == 0 else folder / "replicas" / f"{here.replica:03d}"


def near(at: str) -> str:
    """This node's address on the way to the quorum."""
    host, port = quorum.address(at)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.connect((host, port))  # sends nothing
        return link.getsockname()[0]


@dataclass
class _Replica:
    """A replica's processes: one, which starts the ranks beyond the first itself."""

    number: int
    process: "subprocess.Popen[bytes] | None" = None
    code: int | None = None
    began: float = 0.0
    failures: int = 0  # in a row
    due: float = 0.0  # when it is started (again)


def run(plan: Plan, folder: Path, arguments: Sequence[str]) -> int:
    """All replicas of a run on this machine, until they have ended; returns 0 where one finished, else the exit code of the last that failed.

    A replica that fails is started again, `recovery.restarts` times in a row, but not after an error that another start meets again.
    """
    with ExitStack() as stack:
        place_of = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gigatrain-replicas-"))) / "token"  # mode 0700
        quorum.write_token(place_of)
        at = _serve(plan, place_of, stack)
        shared = {QUORUM: at, TOKEN: str(place_of)}
        threads = max(1, len(os.sched_getaffinity(0)) // plan.ranks)
        return _Replicas(plan, folder, arguments, {"OMP_NUM_THREADS": str(threads)} | os.environ | shared).run()


def _serve(plan: Plan, key: Path, stack: ExitStack) -> str:
    """A quorum of this command; its address."""
    recovery = plan.recovery
    if recovery.replicas == "own":
        served = quorum.Quorum("127.0.0.1", 0, quorum.token(key), lease_s=recovery.replicas_lease_s, say=_say)
        return stack.enter_context(served).address
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "gigatrain.parallel.lighthouse", at, str(recovery.replicas_lease_s), str(recovery.replicas_patience_s)]
    quiet = {"RUST_LOG": "error"} | os.environ
    process = subprocess.Popen(command, env=quiet, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, preexec_fn=_tied(os.getpid()))  # noqa: PLW1509 - one thread here
    stack.callback(_end, process)
    assert process.stdout is not None
    if not process.stdout.readline():  # it says its address once it listens
        raise RunError("torchft's lighthouse did not start; its own message is above")
    return at


class _Replicas:
    def __init__(self, plan: Plan, folder: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.plan, self.folder, self.environment = plan, folder, environment
        how = ("--new", "--resume", "--continue")
        self.rest = [one for one in arguments if one not in how]
        self.new = "--new" in arguments
        self.first = next((one for one in how if one in arguments), None)
        self.replicas = [_Replica(number) for number in range(plan.mesh.replicate)]
        self.stopping = False

    def run(self) -> int:
        hangs_up = signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        before = {number: signal.signal(number, self._pass_on) for number in (*_PASSED_ON, *((signal.SIGHUP,) if hangs_up else ()))}
        try:
            while any(one.code is None for one in self.replicas):
                for one in self.replicas:
                    self._tend(one)
                time.sleep(0.02)
            failed = [one.code for one in self.replicas if one.code]
            return 0 if any(one.code == 0 for one in self.replicas) else failed[-1]
        finally:
            for one in self.replicas:
                if one.process is not None:
                    _end(one.process)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _tend(self, one: _Replica) -> None:
        if one.code is not None:
            return
        if one.process is None:
            if time.monotonic() >= one.due:
                self._start(one)
            return
        code = one.process.poll()
        if code is None:
            return
        one.process = None
        code = code if code >= 0 else 128 - code
        if code == 0 or self.stopping:
            one.code = code
            return
        one.failures = 1 if time.monotonic() - one.began > STEADY_S else one.failures + 1
        if one.failures > self.plan.recovery.restarts or code in NEVER_AGAIN:
            one.code = code
            _say(f"replica {one.number} ended with {code}, {one.failures} times in a row, and stays out")
            return
        one.due = time.monotonic() + PAUSE_S * 2 ** (one.failures - 1)
        _say(f"replica {one.number} ended with {code} and is started again")

    def _start(self, one: _Replica) -> None:
        again = one.began > 0
        how = "--continue" if again or (one.number and not self.new) else self.first
        command = [sys.executable, "-m", "gigatrain", *self.rest, *([how] if how else [])]
        environment = dict(self.environment) | {REPLICA: f"{one.number}/{len(self.replicas)}"}
        shown = None if one.number == 0 else subprocess.DEVNULL  # it has its log
        one.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=shown, start_new_session=True, preexec_fn=_tied(os.getpid())  # noqa: PLW1509 - prctl is all that it calls
        )  # fmt: skip
        one.began = time.monotonic()

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number  # a terminal that is closed
        self.stopping = True
        for one in self.replicas:
            if one.process is not None and one.process.poll() is None:
                one.process.send_signal(number)
            elif one.process is None and one.code is None:
                one.code = 128 + number  # was about to be started again


def _tied(parent: int) -> Callable[[], None]:
    """Ends a child with its parent, which alone would start it again."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def tie() -> None:
        if libc is not None:
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: one that is stopped hears nothing else
            if os.getppid() != parent:
                os._exit(128 + signal.SIGKILL)

    return tie


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _say(text: str) -> None:
    print(f"gigatrain: {text}", file=sys.stderr, flush=True)
