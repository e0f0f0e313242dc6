"""The processes of a run: how they find each other, and what the first does for all."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed

from gigatrain import config, errors, leaving
from gigatrain.errors import GigatrainError, RunError
from gigatrain.parallel import meeting
from gigatrain.parallel.agree import told
from gigatrain.parallel.mesh import Mesh
from gigatrain.recovery.meeting import COLLECTIVE_S, interface

TIMEOUT = datetime.timedelta(seconds=COLLECTIVE_S)


def world() -> tuple[int, int, int] | None:
    """`(rank, ranks, local rank)` as torchrun and our own starter say it in the environment; None: a process of its own."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    said = {name: os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    for name, text in said.items():
        if not text.isdecimal():
            raise RunError(
                f"the environment's {name} is {text!r} and no count; start with torchrun or train.nproc, which set it, or unset RANK and WORLD_SIZE"
            )
    return int(said["RANK"]), int(said["WORLD_SIZE"]), int(said["LOCAL_RANK"])


@contextlib.contextmanager
def joined(axes: config.Mesh, ranks: int, device: str, run: Path | None = None) -> Iterator[tuple[Mesh, torch.device]]:
    """This process as one of `ranks`, with its device; the process group ends with the context. `run`: the folder that may hold the job's secret.

    Raises RunError where other processes were started than the plan has ranks, where one has no GPU of its own, where they do not find each other, and
    where another rank is gone.
    """
    rank, started, local = world() or (0, 1, 0)
    if started != ranks:
        raise RunError(
            f"the plan has {ranks} ranks and {started} process{'es are' if started > 1 else ' is'} here; start it with torchrun --nproc-per-node {ranks} "
            f"-m -- gigatrain train ..., or --set train.nproc={ranks}"
        )
    if device == "cuda":
        here = torch.cuda.device_count()
        if local >= here > 0:
            alone = RunError(f"local rank {local} has no GPU of its own: this node shows {here}; start at most {here} processes a node")
            alone.transient = True  # of a node that has lost one; the next attempt's examination finds it
            raise alone
        torch.cuda.set_device(local)
    place = torch.device(device, local) if device == "cuda" else torch.device(device)
    if ranks == 1:
        yield Mesh(axes, 0, place), place
        return
    mine, asked = not distributed.is_initialized(), leaving.here()
    if mine:
        if asked is not None:
            asked.meeting = True
        bound: dict[str, Any] = {"device_id": place} if device == "cuda" else {}
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        try:
            if name := interface(os.environ["MASTER_ADDR"]):  # where gloo listens; it would take what this machine's name means
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            met = meeting.store(rank, ranks, TIMEOUT, run)
            distributed.init_process_group(backend, store=met, rank=rank, world_size=ranks, timeout=TIMEOUT, **bound)
        except (RuntimeError, ValueError, KeyError, OSError) as failure:  # torch's network errors are RuntimeErrors
            if asked is not None:
                asked.leave()  # the other has left already
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            apart = RunError(
                f"rank {rank} of {ranks} cannot meet the others at {where} (MASTER_ADDR:MASTER_PORT): {_first_line(failure)}; start all ranks "
                "with one address, and a port that is free there"
            )
            apart.transient = True
            raise apart from None
    try:
        with _leave_together(rank, ranks):
            yield Mesh(axes, rank, place, int(os.environ.get("LOCAL_WORLD_SIZE", ranks))), place
    except RuntimeError as failure:
        if not _lost(failure):
            raise
        if asked is not None:
            asked.leave()
        lost = RunError(
            f"rank {rank} of {ranks} lost another rank, whose own message says why, or the network between them ({str(failure).splitlines()[0][:200]}); "
            "committed checkpoints are whole: go on with --resume"
        )
        lost.secondary = True
        raise lost from None
    finally:
        if mine:
            distributed.destroy_process_group()


def _first_line(failure: Exception) -> str:
    said = f"{failure} is not set" if isinstance(failure, KeyError) else failure.strerror if isinstance(failure, OSError) else str(failure)
    return (said or type(failure).__name__).splitlines()[0][:300]


_met: list[int] = []


def _leave_together(rank: int, ranks: int) -> contextlib.AbstractContextManager[None]:
    """What one rank hears all hear, through the store of the process group: under keys of this attempt, and of this meeting."""
    here = leaving.here()
    if here is None:
        return contextlib.nullcontext()
    _met.append(rank)
    attempt = "-".join(os.environ.get(name, "0") for name in ("GIGATRAIN_ATTEMPT", "TORCHELASTIC_RESTART_COUNT"))
    store = distributed.PrefixStore(f"leave-{attempt}-{len(_met)}", distributed.distributed_c10d._get_default_store())
    return here.among(cast(leaving.Store, store), rank, ranks)


def _lost(failure: RuntimeError) -> bool:
    """Whether a collective failed because a rank is gone: torch's own kinds of error, and what gloo says."""
    return isinstance(failure, (distributed.DistBackendError, distributed.DistNetworkError)) or "gloo/transport" in str(failure)


def first(mesh: Mesh, act: Callable[[], Any]) -> Any:
    """What `act` gives on rank 0, a JSON value, on every rank. Its user error is every rank's, so that all leave together."""
    if mesh.count == 1:
        return act()
    said: dict[str, Any] = {}
    if mesh.rank == 0:
        try:
            said = {"value": act()}
        except GigatrainError as failure:
            said = {"error": type(failure).__name__, "text": str(failure)}
    said = told(mesh, said)
    if "error" in said:
        raise _shared(said["error"], said["text"])
    return said["value"]


def _shared(name: str, text: str) -> GigatrainError:
    failure: GigatrainError = getattr(errors, name)(text)
    failure.shared = True
    return failure
