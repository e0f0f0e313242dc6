"""torchrun in a job: `python -m gigatrain.launching.agent [torchrun's options] -m -- gigatrain train ...`, one a node. Free of torch until it starts.

torchrun's own agent answers a signal by raising an error wherever it stands: a second one, as Slurm's come, cuts short its wait for ranks that are saving,
and it always ends as a failure. So here SIGUSR1 and SIGTERM are passed on to the ranks as SIGUSR1 and the agent goes on waiting; the ranks save and leave, and
the code is theirs: `errors.REQUEUE`, 0, or that of the first rank that failed.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from gigatrain.errors import REQUEUE

PASSED_ON = (signal.SIGUSR1, signal.SIGTERM)
_told: list[int] = []


def main(arguments: Sequence[str]) -> int:
    """Run this node's ranks and wait; the exit code of the first that failed, 128 + N for a signal N, or 0.

    Where Slurm says which node of the step this is, that is its rank: torch's own meeting would sort nodes by name, and have ranks meet at what the first one
    calls itself, which may be an address of a slow network.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    where = os.environ.get("SLURM_NODEID")
    host = [f"--node-rank={where}"] if where is not None else []
    options = run.parse_args([*host, "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments])
    for number in PASSED_ON:
        signal.signal(number, _pass_on)
    try:
        run.run(options)
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        code = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
        if REQUEUE in (code, *(one.exitcode for one in failure.failures.values())) or (_told and -first.exitcode in PASSED_ON):
            return REQUEUE  # asked to leave, some before they could hear it; the others were ended with them
        print(
            f"gigatrain: rank {rank} was the first of this node to fail, with exit code {code}; its own message says why", file=sys.stderr
        )
        return code
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    _told.append(number)
    for rank in children(os.getpid()):
        if not _is_rank(rank):
            continue
        try:
            os.kill(rank, signal.SIGUSR1)
        except ProcessLookupError:
            continue


def _is_rank(pid: int) -> bool:
    """Whether torch started it as a rank: it has other children too, as multiprocessing's resource tracker, which a signal would kill."""
    try:
        return b"\0LOCAL_RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False  # it has just ended


def children(parent: int) -> list[int]:
    """Processes that `parent` has started, from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                said = (entry / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue  # it has just ended
            if int(said.rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
