"""What this process must not be: built on versions that run a file's code, or with a run folder that others may write. Free of torch."""

import contextlib
import os
import re
import stat
from importlib import metadata
from pathlib import Path

from gigatrain.errors import RunError

# Distribution -> the oldest release without it, and what it is. Both are below what gigatrain itself needs (pyproject.toml), which pip can be told to ignore.
FLOORS = {
    "torch": ("2.10", "CVE-2026-24747: memory corruption by a file that torch.load(weights_only=True) reads"),
    "transformers": ("5.3", "CVE-2026-4372: code of a model's folder runs even with trust_remote_code=False"),
}


def versions() -> None:
    """Raises RunError where an installed version is known to run what it reads."""
    for name, (floor, why) in FLOORS.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # who needs it says so
        if _numbers(found) < _numbers(floor):
            raise RunError(f"{name} {found} is installed, and below {floor} is open to {why}; pip install -U '{name}>={floor}'")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version + " ")[0].split(".")) if version[:1].isdigit() else (0,)  # type: ignore[index]


def private(folder: Path) -> None:
    """Make a run's folder, for its owner alone (0700), or see that nobody else may change the one that is there.

    One that exists keeps the mode that its owner gave it, but for others' leave to write: who may write a run folder may change what is trained. Raises
    RunError for a folder of somebody else's and for one that stays open, OSError for what cannot be made.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() and os.getuid() != 0:
        raise RunError(
            f"{folder} belongs to user {found.st_uid}, and you are {os.getuid()}: who owns it could change the run; name another with --run"
        )
    if found.st_mode & 0o022:
        with contextlib.suppress(OSError):
            folder.chmod(stat.S_IMODE(found.st_mode) & ~0o022)
        if (mode := folder.stat().st_mode) & 0o022:
            raise RunError(
                f"{folder} may be written by others ({stat.filemode(mode)}) and its file system keeps it so: they could change the run; "
                "name another with --run"
            )
