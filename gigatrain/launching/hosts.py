"""Machines without a scheduler: this one, or hosts through ssh. `python -m gigatrain.launching.hosts RUN` is the job, detached from who began it.

It asks restart.py what job.sh asks under Slurm, so that attempts, history and verdicts are the same; torchrun never restarts ranks itself
(`--max-restarts=0`): with gloo, ranks that come back within a job hang, and a new attempt begins from the newest checkpoint anyway.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from gigatrain.errors import RunError, SiteError
from gigatrain.launching import job as jobs
from gigatrain.launching import restart, tether
from gigatrain.launching.job import Job

_HOST = re.compile(
    r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*@)?(?:[A-Za-z0-9_][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])"
)  # never begins with -: ssh would take an option
_BEGIN_S = 10.0  # what the job gets to write down that it is there


class Host(NamedTuple):
    """One line of a hosts file: where ssh goes, and how many ranks it takes if the line says so."""

    name: str
    slots: int | None


def parse(text: str, where: str) -> list[Host]:
    """Hosts, one a line: `HOST`, `USER@HOST`, `HOST slots=8` or `HOST:8`; `#` begins a comment.

    Raises SiteError with the number of the line for anything else, for a host that comes twice, and where slots differ.
    """
    found: dict[str, tuple[int, Host]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        begun = re.fullmatch(rf"({_HOST.pattern})(?::(\d+))?", words[0])
        slots = [begun[2]] if begun and begun[2] else []
        slots += [word.removeprefix("slots=") for word in words[1:] if re.fullmatch(r"slots=\d+", word)]
        if (
            begun is None
            or len(words) - 1 + bool(begun[2]) != len(slots)
            or len(slots) > 1
            or any(not 1 <= int(one) <= 1024 for one in slots)
        ):
            raise SiteError(
                f"{where}, line {number}: {line.strip()[:80]!r} is no host; write HOST, HOST slots=8 or HOST:8, with 1 to 1024 slots"
            )
        if begun[1] in found:
            raise SiteError(f"{where}, line {number}: {begun[1]} stands on line {found[begun[1]][0]} too; one line a host")
        found[begun[1]] = (number, Host(begun[1], int(slots[0]) if slots else None))
    hosts = [host for _, host in found.values()]
    if not hosts:
        raise SiteError(f"{where} names no host; write one a line")
    if len({host.slots for host in hosts}) > 1:
        raise SiteError(
            f"{where}: hosts have {', '.join(sorted({str(host.slots) for host in hosts}))} slots; every host of a run takes as many ranks"
        )
    return hosts


def read(path: str | Path) -> list[Host]:
    """`parse` of a file."""
    try:
        return parse(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as failure:
        raise SiteError(f"{path} cannot be read: {getattr(failure, 'strerror', None) or 'it is not UTF-8 text'}") from None


def submit(job: Job) -> list[str]:
    """Begin the job on this machine, in a session of its own: it goes on when the terminal closes. Its id is its process."""
    run = Path(job.run)
    (run / "launch" / "process.json").unlink(missing_ok=True)
    with (run / "logs" / "job.out").open("ab") as log:
        process = subprocess.Popen(
            [job.python, "-m", "gigatrain.launching.hosts", job.run],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=job.workdir,
        )
    end = time.monotonic() + _BEGIN_S
    while process_of(run) is None:
        if process.poll() is not None or time.monotonic() > end:
            last = (run / "logs" / "job.out").read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            raise RunError(f"the job did not begin: {' '.join(last) or f'exit code {process.returncode}'}")
        time.sleep(0.02)
    return [str(process.pid)]


def process_of(run: Path) -> dict[str, Any] | None:
    """What RUN/launch/process.json says of the job's process: pid, start (the kernel's own, so that a number used again is told apart) and host."""
    try:
        found = json.loads((run / "launch" / "process.json").read_text(encoding="utf-8"))
        return found if {"pid", "start", "host"} <= set(found) else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def alive(run: Path) -> int | None:
    """The pid of the run's job if it is alive here. Raises RunError where it was begun on another machine, which alone knows."""
    found = process_of(run)
    if found is None:
        return None
    if found["host"] != socket.gethostname():
        raise RunError(f"{run} was launched on {found['host']}, and its process can be seen only there; this is {socket.gethostname()}")
    return found["pid"] if _start(found["pid"]) == found["start"] else None


def tell(run: Path, number: signal.Signals) -> bool:
    """Send the run's job a signal, which it passes on to every rank; False: it is not there."""
    pid = alive(run)
    if pid is None:
        return False
    os.kill(pid, number)
    return True


def _start(pid: int) -> str | None:
    """When the kernel began this process (clock ticks since boot, and which boot); None where it is gone or a zombie."""
    try:
        said = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if said[0] in "ZX" else f"{said[19]}@{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except OSError:
        return None


def doctors(job: Job, attempt: str) -> list[list[str]]:
    """What examines each node: it leaves with 9 where the node is bad."""
    doctor = [job.python, "-m", "gigatrain", "doctor", "--site", str(Path(job.run) / "launch" / "site.json"), "--run", job.run]
    return [_held(job, attempt, node, doctor) for node in range(job.nodes)]


def commands(job: Job, attempt: str, port: int) -> list[list[str]]:
    """What starts each node's torchrun."""
    first = (job.hosts or ("127.0.0.1",))[0].rpartition("@")[2].strip("[]")
    train = ["train", job.recipe, "--site", str(Path(job.run) / "launch" / "site.json"), "--run", job.run, "--continue"]
    found = []
    for node in range(job.nodes):
        agent = [
            *(job.python, "-m", "gigatrain.launching.agent"),
            *(f"--nnodes={job.nodes}", f"--nproc-per-node={job.ranks_per_node}", f"--node-rank={node}"),
            *(f"--master-addr={first}", f"--master-port={port}", "--max-restarts=0", f"--shutdown-timeout={int(tether.GRACE_S) - 5}"),
            *("-m", "--", "gigatrain", *train),
        ]
        found.append(_held(job, attempt, node, agent))
    return found


def _held(job: Job, attempt: str, node: int, command: Sequence[str]) -> list[str]:
    """A node's command at the end of a tether: on this machine directly, else through ssh, whose remote shell sees every argument quoted."""
    environment = {**job.site.environment, **job.environment, "GIGATRAIN_ATTEMPT": attempt}
    given = [f"{name}={value}" for name, value in environment.items()]
    held = [job.python, "-m", "gigatrain.launching.tether", job.workdir, *given, "--", *command]
    if not job.hosts:
        return held
    # No questions: there is nobody to answer. A host that is silent for 45 s is gone.
    ssh = ["ssh", "-T", "-oBatchMode=yes", "-oServerAliveInterval=15"]
    return [*ssh, *job.site.scheduler.options, job.hosts[node], shlex.join(held)]


class Nodes:
    """A command on every node of an attempt, each a tether's pipe."""

    def __init__(self, job: Job, attempt: str, commands: Sequence[Sequence[str]]) -> None:
        self.names = list(job.hosts) or [socket.gethostname()]
        folder = Path(job.run) / "logs" / f"attempt-{attempt}"
        folder.mkdir(parents=True, exist_ok=True)
        self.running: list[subprocess.Popen[bytes]] = []
        for node, command in enumerate(commands):
            with (folder / f"node-{node:05}.log").open("ab") as log:
                self.running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True))

    def say(self, word: str) -> None:
        """To every node that still runs."""
        for process in self.running:
            if process.poll() is None and process.stdin is not None:
                try:
                    process.stdin.write(word.encode() + b"\n")
                    process.stdin.flush()
                except OSError:
                    continue  # its ssh has just ended

    def wait(self) -> int:
        """Until all have ended; the code of the first that failed. Once one has, the others are stopped: they would wait for it."""
        failed, end = 0, None
        while any(process.poll() is None for process in self.running):
            for name, process in zip(self.names, self.running, strict=True):
                if not failed and process.poll():
                    failed, end = process.returncode, time.monotonic() + tether.GRACE_S + 10
                    what = (
                        "ssh itself failed: no connection, or it was lost"
                        if process.returncode == 255
                        else f"exit code {process.returncode}"
                    )
                    print(f"gigatrain: {name} was the first to fail ({what}); the others are stopped", flush=True)
                    self.say("TERM")
            if end is not None and time.monotonic() > end:
                self.say("KILL")
                for process in self.running:
                    process.kill()
            time.sleep(0.05)
        return failed or next((process.returncode for process in self.running if process.returncode), 0)


def main(run: Path) -> int:
    """The job: attempts until the run is finished, stopped or told to leave."""
    job = jobs.load(run)
    told: list[str] = []
    nodes: list[Nodes] = []

    def heard(number: int, _: FrameType | None) -> None:
        told.append(signal.Signals(number).name.removeprefix("SIG"))
        for one in nodes[-1:]:
            one.say({signal.SIGUSR1: "USR1", signal.SIGINT: "KILL"}.get(signal.Signals(number), "TERM"))

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, heard)
    path = run / "launch" / "process.json"
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"pid": os.getpid(), "start": _start(os.getpid()), "host": socket.gethostname()}))
    fresh.replace(path)
    end = time.monotonic() + _BEGIN_S
    while not any(event["event"] == "submitted" and event.get("job") == str(os.getpid()) for event in jobs.history(run)):
        if time.monotonic() > end:
            print("gigatrain: whoever began this job ended before it wrote that down; nothing is started", flush=True)
            return 1
        time.sleep(0.02)  # else a stop of the submission before this one would hold for this one too
    while True:
        verdict, *facts = restart.begin(
            run, {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": ",".join(job.hosts) or socket.gethostname()}
        ).split()
        if verdict != "go":
            return int(facts[0]) if facts else 0
        attempt, port, folder = facts
        (run / folder).mkdir(parents=True, exist_ok=True)
        code = 0
        # Hosts are examined first; on this machine `gigatrain doctor` says the same to whoever asks.
        steps = [doctors(job, attempt)] if job.preflight and job.hosts else []
        for step in [*steps, commands(job, attempt, int(port))]:
            if told or code:
                break
            nodes.append(Nodes(job, attempt, step))
            if told:  # it came just before
                nodes[-1].say("KILL" if told[-1] == "INT" else told[-1])
            code = nodes[-1].wait()
        judged = restart.after(run, code, signal=told[-1] if told else None, chosen=nodes[-1].names if nodes else ())
        # There is no queue to go back to: what is to begin again does so here, unless somebody told the job to leave.
        leaves = bool(told) and judged.word in ("again", "requeue", "leave")
        said = (
            [f"gigatrain: told to leave by {told[-1]}: {judged.why}; go on with: gigatrain requeue {run}"]
            if leaves
            else judged.screen(str(run))
        )
        print("\n".join(said), flush=True)
        if leaves or judged.word in ("done", "stop", "leave"):
            return judged.code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
