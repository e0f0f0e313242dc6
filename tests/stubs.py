"""Libraries that stand in for a driver, compiled for a test."""

import subprocess
from pathlib import Path


def nvml(source: Path, folder: Path) -> Path:
    """`source` as the libnvidia-ml.so.1 of `folder`, which is given back for LD_LIBRARY_PATH."""
    command = [
        "gcc",
        "-O1",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Werror",
        "-Wl,-soname,libnvidia-ml.so.1",
        "-o",
        str(folder / "libnvidia-ml.so.1"),
        str(source),
        "-lm",
    ]
    subprocess.run(command, check=True)
    return folder
