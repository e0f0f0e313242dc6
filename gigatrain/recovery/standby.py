"""A process that has imported everything and waits, from which ranks are forked: `python -m gigatrain.recovery.standby SOCKET MODULE...`.

Importing torch takes seconds, for each rank anew; a fork of this process has it at once, and shares its memory. It opens no device: a child of a process that
had could not use it. Each rank is forked twice, so that its parent is the supervisor, which hears of its end as of any child's.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gigatrain.recovery import tied

MESSAGE_BYTES = 1 << 17


def main(arguments: Sequence[str]) -> None:
    """Import, say so, and fork a rank for each request until the supervisor is gone; in a rank, run its command."""
    channel = socket.socket(fileno=int(arguments[0]))
    supervisor = os.getppid()
    tied.to_parent(signal.SIGKILL)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else a question for devices would open them
    for name in arguments[1:]:
        with contextlib.suppress(ImportError):  # the rank that needs it says so itself
            importlib.import_module(name)
    if opened := _devices():
        sys.exit(f"gigatrain: the standby has opened {opened[0]} by its imports alone, and no rank can be forked from it")
    gc.collect()
    gc.freeze()  # else the first collection of each rank would copy all of this memory
    channel.send(json.dumps({"ready": _resident_bytes()}).encode())
    while True:
        text, descriptors, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 4)
        if not text:
            os._exit(0)
        if (asked := _forked(json.loads(text), descriptors, channel, supervisor)) is not None:
            break
    sys.argv = ["gigatrain", *asked]
    importlib.import_module("gigatrain.cli").main()  # as `python -m gigatrain` does


def _forked(asked: Mapping[str, Any], descriptors: Sequence[int], channel: socket.socket, supervisor: int) -> list[str] | None:
    """In the rank, its arguments; in the standby None."""
    if between := os.fork():
        os.waitpid(between, 0)
        for descriptor in descriptors:
            os.close(descriptor)
        return None
    between = os.getpid()
    if os.fork():
        os._exit(0)
    os.setsid()
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))  # until it can hear them (gigatrain.leaving)
    while os.getppid() == between:
        os.sched_yield()  # until the process between has ended, and we are the supervisor's
    tied.to_parent(signal.SIGKILL, supervisor)
    atexit.register(gc.unfreeze)  # else libraries complain of what the interpreter leaves
    for name, value in asked["environment"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if descriptors:
        os.environ[asked["descriptor"]] = str(descriptors[0])
    tied.name(f"gigatrain:{asked['rank']}")
    channel.send(json.dumps({"rank": asked["rank"], "pid": os.getpid()}).encode())
    channel.close()
    return asked["arguments"]


def _devices() -> list[str]:
    """Accelerators that this process has opened."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            where = str(entry.readlink())
            if where.startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri")):
                found.append(where)
    return found


def _resident_bytes() -> int:
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
