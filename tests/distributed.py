"""Functions run on several processes with a gloo group: forked from a server that has imported torch and gigatrain once, 0.3 s a call."""

import functools
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_PRELOAD = [
    "pytest",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.pipelining",
    "gigatrain.loop",
    "forked",
]


@functools.cache
def _server() -> Any:
    """The server, started with this folder on its path: it is given none (CPython 3.11), and passes over what it cannot import in silence."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["interpreter", *_PRELOAD])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parent), *([before] if before else [])))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def _serve(pipe: Any, function: Callable[..., Any], rank: int, ranks: int, store: str, args: tuple[Any, ...]) -> None:
    import torch
    from torch import distributed

    assert "forked" in sys.modules, "the server of forks did not find tests/forked.py"
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    try:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        found = pickle.dumps((True, function(rank, *args)))
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        found = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(found)
    pipe.close()
    os._exit(0)  # a process group's threads may not end


def together(ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
    """`function(rank, *args)` on each of `ranks` processes; their results by rank. A failure of one raises here with its traceback.

    `function` is a module's own (not nested), and what it takes and gives can be pickled. Each call has fresh processes.
    """
    context = _server()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(theirs, function, rank, ranks, f"{folder}/store", args), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results: dict[int, Any] = {}
        end = time.monotonic() + timeout_s
        try:
            while len(results) < ranks:
                ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], max(0.0, end - time.monotonic()))
                assert ready, f"ranks {sorted(set(range(ranks)) - set(results))} gave nothing in {timeout_s} s"
                for pipe in ready:
                    rank = pipes.index(pipe)  # type: ignore[arg-type]
                    try:
                        well, found = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr] # noqa: S301 - our own child's
                    except EOFError:
                        well, found = False, "it died"
                    assert well, f"rank {rank} of {ranks}: {found}"
                    results[rank] = found
        finally:
            for process in processes:
                process.kill() if len(results) < ranks else process.join(10)
        return [results[rank] for rank in range(ranks)]
