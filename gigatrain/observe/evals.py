"""Evaluations of a run: RUN/evals/*.json, one file an evaluation, as `gigatrain eval` writes and report and model card read them. Free of torch.

    {"format": 1, "kind": "tasks", "made": UTC, "step": 1000, "plan_sha256": ..., "model": folder, "tasks": {name: row}, "settings": {...}, "versions": {...}}

A row: {"metrics": {"acc,none": {"value", "stderr", "higher_is_better"}}, "samples", "few_shot", "limit", "version"}. Nothing of an evaluation is ever
written over, and a file that is none of these is passed over.
"""

import contextlib
import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "evals"
LARGEST_BYTES = 16 << 20  # of one file that is read


def keep(run: Path, found: Mapping[str, Any]) -> Path:
    """Write an evaluation into the run's folder under a name of its own, whole or not at all; returns the file."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    head = f"{datetime.datetime.now(datetime.UTC):%Y%m%d-%H%M%S}-step-{found['step']}"
    beside = folder / f".{head}.{os.getpid()}"
    beside.write_text(json.dumps(found, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    for number in range(1000):
        path = folder / (f"{head}.json" if not number else f"{head}-{number}.json")
        with contextlib.suppress(FileExistsError):
            os.link(beside, path)  # fails where the name is taken, unlike a rename
            beside.unlink()
            return path
    raise FileExistsError(f"{folder}/{head}.json is taken a thousand times")


def read(run: Path) -> list[dict[str, Any]]:
    """Every evaluation of a run, in the order in which they were made."""
    found = []
    for path in sorted((run / FOLDER).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if path.stat().st_size <= LARGEST_BYTES:
                value = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(value, dict) and value.get("format") == 1 and isinstance(value.get("step"), int):
                    found.append(value)
    return found


def latest(run: Path) -> dict[str, dict[str, Any]]:
    """The newest row of each task, with the step that it is of; damaged rows are left out."""
    found: dict[str, dict[str, Any]] = {}
    for one in read(run):
        tasks = one.get("tasks")
        for name, row in tasks.items() if isinstance(tasks, dict) else ():
            metrics = row.get("metrics") if isinstance(row, dict) else None
            if isinstance(metrics, dict) and all(isinstance(said, dict) and "value" in said for said in metrics.values()):
                defaults = {"few_shot": 0, "samples": 0, "limit": None}
                found[str(name)] = defaults | row | {"step": one["step"]}
    return found


def texts(run: Path) -> list[dict[str, Any]]:
    """The newest bits per byte of each text that was measured, with the step that it is of."""
    found: dict[str, dict[str, Any]] = {}
    for one in read(run):
        rows = one.get("texts")
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and isinstance(row.get("text"), str):
                found[row["text"]] = row | {"step": one["step"]}
    return list(found.values())
