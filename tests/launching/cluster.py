"""A real Slurm on loopback: munge, one slurmctld and several slurmd as processes of this machine, in a folder and on ports of their own.

Debian's packages suffice: nothing outside the folder is touched, no service is started, and what was started is killed at the end. What was learned about
the configuration stands beside its lines.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = "apt-get install -y --no-install-recommends slurm-wlm munge"
_CONFIGURATION = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until credentials of its former life have expired: two minutes by default, and 5 s is the least that is taken.
AuthInfo=socket={root}/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
SlurmctldTimeout=30
SlurmdTimeout=6
InactiveLimit=0
MinJobAge=600
KillWait=5
Waittime=0
BatchStartTimeout=10
MessageTimeout=5
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# A cluster's nodes differ in their files; these share one machine's, so each gets a folder of its name.
TaskProlog={root}/task_prolog
{nodes}
PartitionName=debug Nodes=n[1-{count}] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n[1-{count}] MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """`count` nodes n1, n2, ... of 16 pretended cores. `environment` is what Slurm's commands need to find it."""

    def __init__(self, root: Path, count: int = 4) -> None:
        self.root, self.count = root, count
        self.environment = {"SLURM_CONF": str(root / "slurm.conf")}
        self.nodes = [f"n{number}" for number in range(1, count + 1)]
        self.user = pwd.getpwuid(os.getuid()).pw_name

    def start(self) -> None:
        """Write the configuration and start everything; returns once every node is idle."""
        missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not _found(name)]
        if missing:
            raise RuntimeError(f"{', '.join(missing)} missing: these tests need a real Slurm; {PACKAGES}")
        for folder in ("munge", "state", "run", "log", "scratch", *(f"spool/{node}" for node in self.nodes)):
            (self.root / folder).mkdir(parents=True)
        (self.root / "munge").chmod(0o700)
        for node in self.nodes:
            self.scratch(node).mkdir()
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        prolog = self.root / "task_prolog"
        prolog.write_text(f'#!/bin/sh\necho "export GIGATRAIN_TEST_SCRATCH={self.root}/scratch/$SLURMD_NODENAME"\n')
        prolog.chmod(0o755)
        host = socket.gethostname().split(".")[0]
        ports = _ports(self.count + 1)
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=20000 State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        text = _CONFIGURATION.format(host=host, port=ports[0], user=self.user, root=self.root, nodes="\n".join(lines), count=self.count)
        (self.root / "slurm.conf").write_text(text)
        self._run(
            "munged",
            "--force",
            *(f"--{name}={self.root}/munge/{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "log-file", "seed-file")),
        )
        self._run("slurmctld", "-c", "-f", str(self.root / "slurm.conf"))
        for node in self.nodes:
            self.boot(node)
        self.wait(lambda: self.idle() == self.nodes, 30, "every node idle")

    def boot(self, node: str) -> None:
        """Start a node's daemon."""
        self._run("slurmd", "-c", "-N", node, "-f", str(self.root / "slurm.conf"))

    def revive(self) -> None:
        """Every node back to idle: daemons that were killed start again."""
        for node in self.nodes:
            if not _alive(self._pid(f"slurmd.{node}")):
                self.boot(node)
        self.wait(self._resumed, 40, "every node idle again")

    def _resumed(self) -> bool:
        idle = self.idle()
        for node in set(self.nodes) - set(idle):
            subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], env=self.env(), capture_output=True, check=False)
        return idle == self.nodes

    def kill_node(self, node: str) -> None:
        """What a power loss leaves of a node: nothing. Its daemon, the daemons of its steps and all their processes get SIGKILL at once."""
        mark = f"SLURMD_NODENAME={node}".encode()
        processes = [pid for pid in _pids() if mark in _environment(pid)]
        daemons = [parent for parent in map(_parent, processes) if _name(parent) == "slurmstepd"]
        doomed = {pid for pid in (self._pid(f"slurmd.{node}"), *daemons, *processes) if pid not in (0, os.getpid())}
        # All stand still before the first one dies: who outlives another by a moment would report it, or clean up. And children die before their parents: to
        # a process group that loses its last parent while a member is stopped, Linux sends SIGHUP and SIGCONT, and an srun that wakes so cancels its step.
        children_first = sorted(doomed, key=_depth, reverse=True)
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in children_first:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def scratch(self, node: str) -> Path:
        """The node's own folder, whose name tasks have in GIGATRAIN_TEST_SCRATCH."""
        return self.root / "scratch" / node

    def env(self) -> dict[str, str]:
        return os.environ | self.environment

    def idle(self) -> list[str]:
        """Nodes that wait for work."""
        said = self.run("sinfo", "--noheader", "--Node", "--partition=debug", "--format=%N %T")
        return sorted((line.split()[0] for line in said.splitlines() if line.split()[1] == "idle"), key=self.nodes.index)

    def state(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a dict."""
        said = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(part.split("=", 1) for part in said.split() if "=" in part)

    def run(self, *command: str) -> str:
        """Output of one of Slurm's commands."""
        ended = subprocess.run(command, env=self.env(), capture_output=True, text=True, check=False, timeout=60)
        if ended.returncode:
            raise RuntimeError(f"{' '.join(command)}: {ended.stderr}")
        return ended.stdout

    def wait(self, true, limit_s: float, what: str) -> None:
        """Until `true()`; TimeoutError names `what` did not come, with the end of the controller's log."""
        end = time.monotonic() + limit_s
        while not true():
            if time.monotonic() > end:
                log = self.root / "log" / "slurmctld.log"
                tail = "\n".join(log.read_text().splitlines()[-15:]) if log.exists() else "no log"
                raise TimeoutError(f"not within {limit_s:.0f} s: {what}\n{tail}")
            time.sleep(0.1)

    def ended(self, job: str, limit_s: float = 120) -> str:
        """The state in which the job ends: COMPLETED, FAILED, ..."""
        last = ["PENDING"]

        def over() -> bool:
            last[0] = self.state(job)["JobState"]
            return last[0] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "RESIZING", "SUSPENDED", "PREEMPTED")

        self.wait(over, limit_s, f"the end of job {job}")
        return last[0]

    def stop(self) -> None:
        """Kill everything that was started, jobs and their processes included."""
        marks = (f"SLURM_CONF={self.root}/".encode(), str(self.root / "scratch").encode())
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scancel", "--user", self.user, "--signal=KILL"], env=self.env(), capture_output=True, check=False, timeout=10)
        for name in ("slurmctld", *(f"slurmd.{node}" for node in self.nodes)):
            with contextlib.suppress(ProcessLookupError):
                if pid := self._pid(name):
                    os.kill(pid, signal.SIGKILL)
        for pid in _pids():
            ours = _holds(pid, str(self.root / "spool")) or any(mark in _environment(pid) for mark in marks)
            if ours and pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError, ValueError, ProcessLookupError):
            os.kill(int((self.root / "munge" / "pid").read_text()), signal.SIGTERM)

    def _pid(self, name: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int((self.root / "run" / f"{name}.pid").read_text())
        return 0

    def _run(self, *command: str) -> None:
        command = (_found(command[0]) or command[0], *command[1:])
        ended = subprocess.run(command, env=self.env(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=30)
        if ended.returncode:
            raise RuntimeError(f"{' '.join(command)}: {ended.stdout}{ended.stderr}")


@contextlib.contextmanager
def running(root: Path, count: int = 4) -> Iterator[Cluster]:
    """A cluster that is up within the context, and gone after it whatever happens in it."""
    made = Cluster(root, count)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # pytest cleans up after Ctrl-C, and after nothing else
    try:
        made.start()
        yield made
    finally:
        made.stop()
        signal.signal(signal.SIGTERM, before)


def _found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _ports(count: int) -> list[int]:
    """Ports that were free just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _alive(pid: int) -> bool:
    return pid > 0 and _name(pid) == "slurmd" and _stat(pid)[0] != "Z"


def _stat(pid: int) -> list[str]:
    """State, parent, ... of a process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return ["Z", "0"]


def _parent(pid: int) -> int:
    return int(_stat(pid)[1])


def _depth(pid: int) -> int:
    """How many ancestors a process has."""
    depth = 0
    while (pid := _parent(pid)) > 0:
        depth += 1
    return depth


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _environment(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def _holds(pid: int, folder: str) -> bool:
    """Whether a process has its working directory or an open file in `folder`."""
    with contextlib.suppress(OSError):
        for link in [f"/proc/{pid}/cwd", *(entry.path for entry in os.scandir(f"/proc/{pid}/fd"))]:
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith(folder):
                    return True
    return False
