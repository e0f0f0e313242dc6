"""Processes that end with the one that started them. Free of torch."""

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def to_parent(number: int, parent: int | None = None) -> None:
    """This process hears signal `number` when its parent dies; if `parent` is no longer that, it ends at once."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(128 + int(number))


def name(text: str) -> None:
    """What `ps` and `top` call this process, 15 bytes of it."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_NAME, text.encode()[:15], 0, 0, 0)


def adopt(*, orphans: bool = True) -> None:
    """What this process's children leave behind becomes its own."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, int(orphans), 0, 0, 0)
