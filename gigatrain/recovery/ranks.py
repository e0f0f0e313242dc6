"""The processes of a node's ranks: started, watched and ended. Free of torch."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gigatrain.recovery import standby, tied

PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
READY_S = 60.0  # what a standby gets to import
FORK_S = 5.0  # and a fork of it, to say that it is there
_TICKS = os.sysconf("SC_CLK_TCK")


class Rank:
    """One process, a child of this one and the first of its session. `code` is None while it lives, and -N of one that signal N ended."""

    def __init__(self, rank: int, pid: int, process: "subprocess.Popen[bytes] | None" = None) -> None:
        self.rank, self.pid, self._process = rank, pid, process
        self.code: int | None = None
        self.ended_s = 0.0  # by the monotonic clock
        self.descriptor = -1
        with contextlib.suppress(OSError, AttributeError):
            self.descriptor = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Its code, once it has ended."""
        if self.code is not None:
            return self.code
        if self._process is not None:
            self.code = self._process.poll()
        else:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # another's child: a standby that could not fork twice
                pid, status = self.pid, 1 << 8
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        if self.code is not None:
            self.ended_s = time.monotonic()
            if self.descriptor >= 0:
                os.close(self.descriptor)
                self.descriptor = -1
        return self.code

    def send(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """With all of its session: what it has started reads files that the next start reads too."""
        if self.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        end = time.monotonic() + 10
        while self.poll() is None and time.monotonic() < end:  # one in state D ends when its file system lets it
            time.sleep(0.005)

    def state(self) -> tuple[str, float]:
        """Its state as in /proc, and the seconds of cores that it used."""
        try:
            said = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return "Z", 0.0
        states = [said[0]]
        for task in Path(f"/proc/{self.pid}/task").glob("*/stat") if said[0] == "S" else ():
            with contextlib.suppress(OSError):
                states.append(task.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0])
        return "D" if "D" in states else said[0], (int(said[11]) + int(said[12])) / _TICKS

    def moved_bytes(self) -> int:
        """Bytes that it has read and written, of files and of sockets; 0 where the kernel does not say."""
        try:
            rows = dict(line.split(": ") for line in Path(f"/proc/{self.pid}/io").read_text(encoding="ascii").splitlines())
            return int(rows["rchar"]) + int(rows["wchar"])
        except (OSError, ValueError, KeyError):
            return 0

    def waits_in(self) -> str:
        """The kernel's function that its first thread waits in; empty where the kernel does not say."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/wchan").read_text().strip("0\n ")
        return ""


def begins(parent: int) -> None:
    """In a rank's process, before it can hear a signal (gigatrain.leaving), which would end it: it waits until then."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    tied.to_parent(signal.SIGKILL, parent)  # one that is stopped, or hangs, hears nothing else, and would hold the folder against --resume


def started(rank: int, arguments: Sequence[str], environment: Mapping[str, str], keep: Sequence[int]) -> Rank:
    """A rank of its own interpreter."""
    parent = os.getpid()
    command = [sys.executable, "-m", "gigatrain", *arguments]
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=tuple(keep),
        preexec_fn=lambda: begins(parent),  # noqa: PLW1509 - one thread here
    )
    return Rank(rank, process.pid, process)


class Standby:
    """The process that ranks are forked from, from when it has imported everything."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str], keep: Sequence[int]) -> None:
        self._environment = dict(environment)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "gigatrain.recovery.standby", str(theirs.fileno()), *modules]
        self._process = subprocess.Popen(
            command, env=self._environment, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=(theirs.fileno(), *keep)
        )
        theirs.close()
        self.pid = self._process.pid
        self.resident_bytes = 0  # once it is ready

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ready(self, limit_s: float = 0.0) -> bool:
        """Whether ranks can be forked; waits so long for it."""
        if self._process.poll() is not None:
            return False
        if not self.resident_bytes and (said := self._said(limit_s)):
            self.resident_bytes = max(1, int(said.get("ready", 0)))
        return self.resident_bytes > 0

    def fork(
        self, rank: int, arguments: Sequence[str], environment: Mapping[str, str], listener: socket.socket | None, name: str
    ) -> Rank | None:
        """A rank with this environment, and `listener` as the descriptor that its variable `name` gives; None where the standby fails."""
        changed: dict[str, str | None] = {key: value for key, value in environment.items() if self._environment.get(key) != value}
        changed |= {key: None for key in self._environment if key not in environment}
        asked = {"rank": rank, "arguments": list(arguments), "environment": changed, "descriptor": name}
        try:
            socket.send_fds(self._channel, [json.dumps(asked).encode()], [listener.fileno()] if listener else [])
            said = self._said(FORK_S)
        except OSError:
            return None
        return Rank(rank, int(said["pid"])) if said and said.get("rank") == rank else None

    def _said(self, limit_s: float) -> dict[str, int] | None:
        if not select.select([self._channel], [], [], limit_s)[0]:
            return None
        text = self._channel.recv(standby.MESSAGE_BYTES)
        return json.loads(text) if text else None

    def close(self) -> None:
        self._channel.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
