"""The processes of a run: how they find each other, agree, and speak with one voice. What travels between them is JSON, never a pickle."""

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed

from gigatrain import config, errors
from gigatrain.errors import GigatrainError, RunError
from gigatrain.parallel.mesh import Mesh

TIMEOUT = datetime.timedelta(minutes=10)  # of a collective: a rank that died must not hold the others for torch's half an hour


def world() -> tuple[int, int, int] | None:
    """`(rank, ranks, local rank)` as torchrun and our own starter say it in the environment; None: a process of its own."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def joined(axes: config.Mesh, ranks: int, device: str) -> Iterator[tuple[Mesh, torch.device]]:
    """This process as one of `ranks`, with its device; the process group ends with the context.

    Raises RunError where other processes were started than the plan has ranks, or where one has no GPU of its own.
    """
    rank, started, local = world() or (0, 1, 0)
    if started != ranks:
        raise RunError(
            f"the plan has {ranks} ranks and {started} process{'es are' if started > 1 else ' is'} here; start it with torchrun --nproc-per-node {ranks} "
            f"-m gigatrain train ..., or --set train.nproc={ranks}"
        )
    if device == "cuda":
        here = torch.cuda.device_count()
        if local >= here > 0:
            raise RunError(f"local rank {local} has no GPU of its own: this node shows {here}; start at most {here} processes a node")
        torch.cuda.set_device(local)
    place = torch.device(device, local) if device == "cuda" else torch.device(device)
    if ranks == 1:
        yield Mesh(axes, 0, place), place
        return
    mine = not distributed.is_initialized()
    if mine:
        bound = {"device_id": place} if device == "cuda" else {}
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT, **bound)
    try:
        yield Mesh(axes, rank, place), place
    finally:
        if mine:
            distributed.destroy_process_group()


def share(mesh: Mesh, value: Any = None) -> Any:
    """Rank 0's value, a JSON one, on every rank."""
    if mesh.count == 1:
        return value
    size = torch.zeros(1, dtype=torch.int64, device=mesh.device)
    data = torch.empty(0, dtype=torch.uint8)
    if mesh.rank == 0:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size.fill_(data.numel())
    distributed.broadcast(size, 0)
    data = data.to(mesh.device) if mesh.rank == 0 else torch.empty(int(size), dtype=torch.uint8, device=mesh.device)
    distributed.broadcast(data, 0)
    return json.loads(data.cpu().numpy().tobytes())


def gather(mesh: Mesh, value: Any) -> list[Any]:
    """Every rank's value, JSON ones, by rank, on every rank: for a handful of small ones, since each rank gets all."""
    if mesh.count == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(mesh.device)
    sizes = torch.zeros(mesh.count, dtype=torch.int64, device=mesh.device)
    sizes[mesh.rank] = data.numel()
    mesh.sum(sizes)
    longest = int(sizes.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=mesh.device)
    padded[: data.numel()] = data
    every = torch.empty(mesh.count * longest, dtype=torch.uint8, device=mesh.device)
    distributed.all_gather_into_tensor(every, padded)
    rows = every.view(mesh.count, longest).cpu().numpy()
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes.tolist(), strict=True)]


def first(mesh: Mesh, act: Callable[[], Any]) -> Any:
    """What `act` gives on rank 0, a JSON value, on every rank. Its user error is every rank's, so that all leave together."""
    if mesh.count == 1:
        return act()
    told: dict[str, Any] = {}
    if mesh.rank == 0:
        try:
            told = {"value": act()}
        except GigatrainError as failure:
            told = {"error": type(failure).__name__, "text": str(failure)}
    told = share(mesh, told)
    if "error" in told:
        raise getattr(errors, told["error"])(told["text"])
    return told["value"]


def agree(mesh: Mesh, act: Callable[[], Any]) -> Any:
    """Runs `act` on every rank; where it raises a user error on one, all raise that of the lowest such rank."""
    failed: GigatrainError | None = None
    found = None
    try:
        found = act()
    except GigatrainError as failure:
        failed = failure
    if mesh.count == 1:
        if failed is not None:
            raise failed
        return found
    bad = mesh.sum(torch.tensor([float(failed is not None)], device=mesh.device))
    if bad.item():
        told = gather(mesh, None if failed is None else [type(failed).__name__, str(failed)])
        rank, (name, text) = next((rank, what) for rank, what in enumerate(told) if what is not None)
        raise getattr(errors, name)(text if rank == mesh.rank else f"rank {rank}: {text}")
    return found
