"""Published measurements that the planner is held against, and a pair of one with its answer: what plan.py, plan_memory.py and plan_power.py share."""

import csv
import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
Row = dict[str, Any]


def measured() -> list[Row]:
    """Ten sets of published measurements: a row holds what its source says, and no nulls."""
    with gzip.open(DATA / "measured.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def further() -> list[Row]:
    """Five sets more: FlagPerf's three, NVIDIA's NeMo launcher, TinyLlama."""
    return read(DATA / "further.jsonl")


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def measured_power() -> list[Row]:
    """Power logs of MLPerf runs as watts of a node and kWh of a run; lists are lists again, and numbers numbers."""
    with (DATA / "measured_power.csv").open(encoding="utf-8", newline="") as lines:
        return [{key: _value(text) for key, text in row.items() if text} for row in csv.DictReader(lines)]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def seconds_of(row: Row) -> float | None:
    """Seconds of a step as measured: as printed, else from tokens or samples per second; None: the row tells no time."""
    batch, tokens = row.get("global_batch"), (row.get("global_batch") or 0) * (row.get("seq_len") or 0)
    if row.get("step_time_s"):
        return float(row["step_time_s"])
    if row.get("tokens_per_s") and tokens:
        return tokens / row["tokens_per_s"]
    if row.get("tokens_per_s_per_gpu") and tokens and row.get("n_gpus"):
        return tokens / row["tokens_per_s_per_gpu"] / row["n_gpus"]
    return batch / row["samples_per_s"] if row.get("samples_per_s") and batch else None


def gibibytes_of(row: Row) -> float | None:
    """Peak memory as measured, in GiB."""
    unit = {"gib": 1.0, "gb": 1e9 / 2**30, "mib": 2**-10, "mb": 1e6 / 2**30}.get(str(row.get("peak_mem_unit", "gib")).lower(), 1.0)
    return row["peak_mem"] * unit if row.get("peak_mem") else None


@dataclass(frozen=True, slots=True)
class Pair:
    """A measurement and the planner's answer to it."""

    row: Row
    answer: Mapping[str, Any]

    @property
    def error(self) -> float | None:
        """Predicted over measured - 1, of the seconds of a step."""
        found, predicted = seconds_of(self.row), self.answer["step_time_s"]
        return None if found is None or predicted is None else predicted / found - 1

    @property
    def memory_error(self) -> float | None:
        found, predicted = gibibytes_of(self.row), self.answer["memory_gib"]
        return None if found is None or predicted is None else predicted / found - 1

    @property
    def covered(self) -> bool:
        return self.answer["low_s"] <= (seconds_of(self.row) or 0.0) <= self.answer["high_s"]
