r"""How well the planner predicts: its steps, memory, intervals and ranking of layouts, held against published measurements.

    python benchmarks/plan.py IN.jsonl                        predicts a file of measurements and scores that
    python benchmarks/plan.py IN.jsonl --predictions OUT.jsonl     scores what `gigatrain plan --predict IN.jsonl -o OUT.jsonl` wrote

Errors are of seconds of a step, predicted over measured - 1; a row that tells no time counts for memory alone. Published TFLOP/s and MFU are never scored:
sources count FLOPs each in their own way. Data (benchmarks/data/), each row with the repository, path and commit that it was read from:

    measured.jsonl.gz     1,772 rows of 10 sets: what constants are fitted on
    unseen.jsonl          68 rows of sources that nothing is fitted on: does what was learnt from the ten hold elsewhere?
    measured_power.csv    86 power logs of MLPerf, reduced to watts of a node and kWh of a run
"""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE / "data"
Row = dict[str, Any]


def measured() -> list[Row]:
    """The published measurements that constants are fitted on: a row holds what its source says, and no nulls."""
    with gzip.open(DATA / "measured.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def unseen() -> list[Row]:
    """Published measurements of sources that no constant and no interval is fitted on."""
    return [json.loads(line) for line in (DATA / "unseen.jsonl").read_text(encoding="utf-8").splitlines()]


def measured_power() -> list[Row]:
    """Power logs of MLPerf runs as watts of a node and kWh of a run; lists are lists again, and numbers numbers."""
    with (DATA / "measured_power.csv").open(encoding="utf-8", newline="") as lines:
        return [{key: _value(text) for key, text in row.items() if text} for row in csv.DictReader(lines)]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
