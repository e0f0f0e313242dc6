"""How ranks meet: a store of their own, under a prefix that no earlier attempt has used.

torchrun's agent keeps one store over all its restarts, and gloo writes the addresses of its listeners into it under names that do not change: a rank that is
started again reads its dead peer's, and waits for it (pytorch/pytorch#135712; four of four trials here). So the ranks themselves agree on a round that is new.
"""

import datetime
import errno
import os
import random
import time
from pathlib import Path

from torch import distributed

from gigatrain.errors import RunError
from gigatrain.recovery import meeting


def store(rank: int, ranks: int, timeout: datetime.timedelta, run: Path | None = None) -> distributed.Store:
    """The store of this round of the ranks at MASTER_ADDR:MASTER_PORT, which rank 0 serves unless torchrun's agent does; collective.

    It listens on the address alone where that is one of this machine's. torch's store asks nobody who they are: who reaches the port can read it; the
    job's secret keeps strays out, such as another job's rank at a port that is ours now, and no more. Raises RuntimeError, ValueError and OSError as torch
    does, and RunError where another job answers.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not 0 < port < 1 << 16:
        raise ValueError(f"MASTER_PORT is {port}, and no port")
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    taken = _listener(address, port) if serves else None
    tcp = distributed.TCPStore(address, port, is_master=serves, timeout=timeout, wait_for_workers=False, master_listen_fd=taken)
    secret = meeting.token(run)
    attempt = f"gigatrain/attempt-{os.environ.get('GIGATRAIN_ATTEMPT', '0')}/start-{os.environ.get(meeting.ROUND, '0')}"
    base = distributed.PrefixStore(attempt, tcp)
    number = _round(base, rank, ranks, timeout.total_seconds(), secret)
    return distributed.PrefixStore(f"round-{number}", base)


def _listener(address: str, port: int) -> int | None:
    """The socket to serve at: the supervisor's, or one that is bound here; none where the address is not this machine's own, and torch listens on all."""
    if said := os.environ.pop(meeting.LISTEN, None):
        return int(said)
    try:
        return meeting.listening(address, port).detach()
    except OSError as failure:
        if failure.errno != errno.EADDRNOTAVAIL:
            raise
        return None


def _round(store: distributed.Store, rank: int, ranks: int, limit_s: float, secret: str | None) -> int:
    """A number that all ranks of this start agree on, and no start before it had.

    Rank 0 opens a round; who reads of it signs in; once all have, it goes. A round that has gone is an earlier start's, and one in which a rank
    signs in twice has a dead one's name in it: rank 0 opens another.
    """
    end, pause_s, entered, number = time.monotonic() + limit_s, 0.005, 0, 0
    while time.monotonic() < end:
        if rank == 0 and (not number or store.check([f"{number}/spoiled"])):
            number = store.add("round", 1)
            store.set("current", f"{number} {meeting.proof(secret, 'round', number)}")
        elif rank and store.check(["current"]):
            said, _, signed = store.get("current").decode().partition(" ")
            if signed != meeting.proof(secret, "round", said):
                raise RunError(
                    f"another job's ranks answer at MASTER_ADDR:MASTER_PORT: they do not know this job's secret; start rank {rank} with the "
                    "port and the run folder of its own job"
                )
            number = int(said)
        if number and number != entered:
            gone = store.check([f"{number}/go"])
            if not gone and store.add(f"{number}/rank-{rank}", 1) > 1:
                store.set(f"{number}/spoiled", "1")
            elif not gone:
                store.add(f"{number}/here", 1)
            entered = number if not gone else 0
            if gone:
                number = 0
        if rank == 0 and entered and store.add(f"{number}/here", 0) >= ranks:
            store.set(f"{number}/go", "1")
            return number
        if rank and entered and store.check([f"{number}/go"]):
            return number
        time.sleep(pause_s * random.uniform(0.5, 1))
        pause_s = min(2 * pause_s, 1.0)
    raise RuntimeError(f"not all of {ranks} ranks came within {limit_s:.0f} s")
