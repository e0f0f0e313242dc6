"""What `gigatrain bench faults` does inside the processes that it disturbs: what no signal and no mount can. Free of torch.

The driver puts a `sitecustomize.py` of one line before everything else on PYTHONPATH, so each process of the run calls `begin` before its own first line.
`begin` does three things, and nothing at all where the driver's variable is not set: writes down which samples each step consumed, by this program's own count;
carries out orders that the driver leaves as files; and, where the driver says so, fails each time that a step is reached (a crash loop).

    FOLDER/consumed-00001.jsonl      rank 1: {"pid": 4711, "position": 40, "samples": [[0, 1, 17], ...]} for every batch that it was given
    FOLDER/order-00001-3.json        the driver's third order to rank 1, {"do": "gil"}; it is renamed to done-... once it was carried out
    FOLDER/always.json               {"do": "abort", "step": 12}: every process, each time
"""

import contextlib
import ctypes
import errno
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

FOLDER = "GIGATRAIN_FAULTS"  # the variable that names it
LOOK_S = 0.01
CRASHES = {"abort": signal.SIGABRT, "segv": signal.SIGSEGV, "kill": signal.SIGKILL}


_ahead: list[dict[str, Any]] = []  # orders for the main thread, at its next batch
_patched: set[str] = set()  # what this process, or the one that it was forked from, has been given
_said: dict[int, Any] = {}  # this process's number -> where it writes what it consumed


def begin() -> None:
    """A thread that waits for orders; in processes of runs under test alone, and in those that are forked from them."""
    if os.environ.get(FOLDER):
        _start()
        os.register_at_fork(after_in_child=_start)


def _start() -> None:
    _ahead.clear()
    threading.Thread(target=_serve, args=(Path(os.environ[FOLDER]),), name="gigatrain-fault", daemon=True).start()


def _serve(folder: Path) -> None:
    while True:
        loader = sys.modules.get("gigatrain.data.loader")
        if "batches" not in _patched and hasattr(loader, "Validation"):  # the last that it defines
            _patched.add("batches")
            _watch(loader, folder)
        syncs = folder / "syncs.json"
        if "syncs" not in _patched and syncs.exists():
            _patched.add("syncs")
            _refuse_syncs(syncs)
        if os.getpid() in _said:  # it trains: what started the ranks has no rank either, and must not take the orders of rank 0
            _take(folder)
        time.sleep(LOOK_S)


def _take(folder: Path) -> None:
    """The orders to this rank that nobody has taken."""
    for path in sorted(folder.glob(f"order-{_rank():05d}-*.json")):
        with contextlib.suppress(OSError, ValueError):
            order = json.loads(path.read_bytes())
            path.rename(path.with_name(path.name.replace("order", "done")))  # one of two threads can
            _obey(order)


def _rank() -> int:
    """Of this process, now: a standby learns it late."""
    said = os.environ.get("RANK", "0")
    return int(said) if said.isdecimal() else 0


def _obey(order: dict[str, Any]) -> None:
    match order["do"]:
        case "gil":
            ctypes.PyDLL(None).sleep(1 << 20)  # PyDLL keeps the interpreter's lock while C sleeps
        case "clock":
            _jump(float(order["seconds"]))
        case "eat":
            held = bytearray(int(order["bytes"]))
            held[:: os.sysconf("SC_PAGE_SIZE")] = b"\1" * len(held[:: os.sysconf("SC_PAGE_SIZE")])
        case _:
            _ahead.append(order)


def _jump(seconds: float) -> None:
    """This process's wall-clock, as Python tells it, is set; the monotonic clock is not, as on a real machine."""
    told = time.time

    def time_() -> float:
        return told() + seconds

    time.time = time_


def _refuse_syncs(path: Path) -> None:
    """os.fsync fails while the driver's file is there: what a disk with bad blocks says of data that it took before."""
    told = os.fsync

    def fsync(descriptor: Any) -> None:
        if path.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        told(descriptor)

    os.fsync = fsync


def _watch(loader: Any, folder: Path) -> None:
    """Round `next(batches)`, which the main thread calls once a step: note what it gives, and do there what must not fall into the middle of a step."""
    told = loader.Batches.__next__

    def following(batches: Any) -> Any:
        at, file = batches.position, _said.get(os.getpid())
        if file is None:  # the first of this process
            file = _said[os.getpid()] = (folder / f"consumed-{_rank():05d}.jsonl").open("ab", buffering=0)
            with contextlib.suppress(OSError):
                _ahead.append(json.loads((folder / "always.json").read_bytes()))
            _take(folder)  # what was ordered before the start may be for the first step
        for order in list(_ahead):
            if at >= order.get("step", 0) * batches.batch:
                _ahead.remove(order)
                _at_step(order)
        found = told(batches)
        share = range(at + batches.share.start, at + batches.share.stop)
        samples = [list(batches.mixture.at(position)) for position in share]
        file.write(json.dumps({"pid": os.getpid(), "position": at, "samples": samples}).encode() + b"\n")
        return found

    loader.Batches.__next__ = following


def _at_step(order: dict[str, Any]) -> None:
    """Between two steps, in the main thread."""
    do = order["do"]
    if do in CRASHES:
        os.kill(os.getpid(), CRASHES[do])
    elif do == "raise":
        raise MemoryError("std::bad_alloc") if order.get("kind") == "memory" else RuntimeError("a planted failure")
    elif do == "flip":
        _flip(int(order["element"]), int(order["bit"]))
    elif do == "nan":
        _poison()


def _engine() -> Any:
    """The engine of this process: the one object that has a step to take."""
    import gc

    return next(one for one in gc.get_objects() if hasattr(type(one), "forward_backward") and hasattr(one, "state"))


def _flip(element: int, bit: int) -> None:
    """One bit of one number of a weight that this rank holds."""
    import torch

    held = [one.tensor for one in _engine().replicas() if one.name.startswith("weight of ")]
    flat = held[element % len(held)].view(-1).view(torch.int32)  # of what updates write: no copy
    flat[element % flat.numel()] ^= 1 << bit


def _poison() -> None:
    """One gradient of the step that begins is not a number."""
    kind = type(_engine())
    told = kind.step

    def step(engine: Any, rate: float) -> Any:
        kind.step = told
        own = (grad.to_local() if hasattr(grad, "to_local") else grad for grad in engine.grads.values())
        max(own, key=lambda grad: grad.numel()).view(-1)[:1].fill_(float("nan"))  # of a small tensor this rank may hold nothing
        return told(engine, rate)

    kind.step = step
