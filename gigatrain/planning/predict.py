"""The scoring door: rows of measurements in, with what was measured left out, and what the planner says of each out. Free of torch.

A row is what benchmarks/data holds: model, machines, layout and stack by the names of PLANNER.md. Every row is answered by one with the same keys; one that
cannot be told, or with `strict` one outside of what was calibrated, says why in `refused`, and its numbers are null. A row's own measurements are taken out
before it is read, so that an answer cannot depend on them.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gigatrain.errors import GigatrainError, PlanError
from gigatrain.planning import hardware, megawatts
from gigatrain.planning.estimate import energy, estimate, rows
from gigatrain.planning.estimate.constants import VALUES
from gigatrain.planning.estimate.work import Estimate
from gigatrain.planning.expected import Range

MEASURED = frozenset(
    {
        "step_time_s",
        "tokens_per_s",
        "tokens_per_s_per_gpu",
        "samples_per_s",
        "model_tflops_per_gpu",
        "hw_tflops_per_gpu",
        "mfu_pct",
        "hfu_pct",
        "peak_mem",
        "node_power_w_mean",
        "status",
    }
)
NUMBERS = ("step_time_s", "low_s", "high_s", "tokens_per_s_per_gpu", "memory_gib", "fits", "node_power_w", "limits")
DIGITS = 6  # significant ones of an answer
LONGEST = 1 << 20  # characters of a row; the longest published one has 2,500
SHOWN = 400  # characters of a reason
# Sizes beyond which a row is a slip of the pen, and its estimate would take minutes: some ten times what anybody has trained.
LARGEST = {
    "layers": 4_000, "hidden": 1_000_000, "heads": 100_000, "kv_heads": 100_000, "head_dim": 100_000, "ffn": 10_000_000, "vocab": 100_000_000,
    "seq_len": 100_000_000, "n_gpus": 10_000_000, "global_batch": 100_000_000, "micro_batch": 1_000_000, "grad_accum": 100_000_000, "dp": 10_000_000,
    "moe_experts": 100_000, "moe_topk": 10_000, "moe_ffn": 10_000_000, "moe_shared_ffn": 10_000_000, "moe_layers": 4_000, "ep": 100_000,
    "vp": 4_000, "pp": 4_000, "tp": 100_000, "cp": 100_000,
}  # fmt: skip
FAULT = "the planner failed on this row, which is its own mistake:"


@dataclass(slots=True)
class Summary:
    """How a file of rows was answered."""

    rows: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by reason
    faults: int = 0  # of `refused`: the planner's own errors, which somebody should mend

    @property
    def predicted(self) -> int:
        return self.rows - self.refused.total()

    def __str__(self) -> str:
        said = f"{self.predicted:,} of {self.rows:,} rows predicted"
        for reason, count in self.refused.most_common(5):
            said += f"\n  {count:,} refused: {reason}"
        if len(self.refused) > 5:
            said += f"\n  and {len(self.refused) - 5:,} more reasons: each row of the answer has its own"
        return said


def predict(row: Any, *, strict: bool = False, constants: Mapping[str, float] = VALUES) -> dict[str, Any]:
    """What the planner says of one row: `id`, NUMBERS, and `refused`, which is None or the reason why the numbers are. Never raises."""
    try:
        return _answered(row, strict, constants)
    except (rows.Refused, GigatrainError) as refusal:
        return _refused(row, " ".join(str(refusal).split()))
    except Exception as fault:  # whatever a stranger's row brings to light must not cost the rows behind it; it is said, and counted
        return _refused(row, f"{FAULT} {type(fault).__name__}: {fault}")


def predict_file(source: Path, target: Path, *, strict: bool = False, constants: Mapping[str, float] = VALUES) -> Summary:
    """Answers each line of `source` by one of `target`, in the same order, one at a time. Raises PlanError for files that cannot be read or written."""
    if source.resolve() == target.resolve():
        raise PlanError(f"{source} would be overwritten by its own answers: name another file with -o")
    summary = Summary()
    try:
        with source.open(encoding="utf-8", errors="replace") as asked, target.open("w", encoding="utf-8") as answers:
            for row in _rows(asked):
                answer = predict(row, strict=strict, constants=constants)
                summary.rows += 1
                if answer["refused"] is not None:
                    summary.refused[answer["refused"]] += 1
                    summary.faults += answer["refused"].startswith(FAULT)
                answers.write(json.dumps(answer, ensure_ascii=False) + "\n")
    except OSError as failure:
        raise PlanError(
            f"{failure.filename or source}: {failure.strerror or failure}; --predict reads a file of rows, one JSON object a line"
        ) from None
    return summary


@dataclass(frozen=True, slots=True)
class Torn:
    """A line that is no row."""

    reason: str


def _rows(lines: Iterator[str] | Any) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(line) > LONGEST:
            yield Torn(f"line {number} has {len(line):,} characters; a row has at most {LONGEST:,}")
            continue
        try:
            yield json.loads(line, parse_constant=_no_number)
        except RecursionError:
            yield Torn(f"line {number} is nested too deeply for a row")
        except ValueError as error:
            yield Torn(f"line {number} is no JSON: {error}")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _answered(row: Any, strict: bool, constants: Mapping[str, float]) -> dict[str, Any]:
    if isinstance(row, Torn):
        raise rows.Refused(row.reason)
    if not isinstance(row, dict):
        raise rows.Refused(f"a row is a JSON object, not {type(row).__name__}")
    for name, most in LARGEST.items():
        if isinstance(value := row.get(name), (int, float)) and value > most:
            raise rows.Refused(f"{name} is {value:.6g}; no row has more than {most:,}")
    case = rows.parse({key: value for key, value in row.items() if key not in MEASURED and value is not None})
    found = estimate.estimate(case.workload, case.cluster, constants)
    if strict and found.outside:
        raise rows.Refused(f"outside of what was calibrated: {'; '.join(found.outside)}")
    answer: dict[str, Any] = {
        "id": _id(row),
        "step_time_s": found.step_s,
        "low_s": found.low_s,
        "high_s": found.high_s,
        "tokens_per_s_per_gpu": found.tokens_per_s_per_rank,
        "memory_gib": found.memory_bytes / 2**30,
        "fits": found.fits,
        "node_power_w": _node_watts(row, case, found),
        "limits": found.limits,
        "refused": None,
    }
    for key, value in answer.items():
        if isinstance(value, float):
            if not (math.isfinite(value) and value > 0):
                raise rows.Refused(f"{key} came out as {value}, which no machine does")
            answer[key] = float(f"{value:.{DIGITS}g}")
    return answer


_COOLED: tuple[tuple[str, energy.Cooling], ...] = (
    (r"immers", "immersed"),
    (r"water|liquid|\bdlc\b|direct.to.chip", "water"),
    (r"\bair\b|air-cooled|fans?\b", "air"),
)


def _node_watts(row: Mapping[str, Any], case: rows.Case, found: Estimate) -> float | None:
    """Mean watts at a node's supplies; None where the accelerator's limit or what is around it is unknown. Cooling is what the row says of its server.

    A node is whole: accelerators of it that the run does not use idle, and its processors, fans and losses are there for all. Of nodes unevenly used, the mean.
    """
    cluster = case.cluster
    chip = hardware.CHIPS[cluster.chip]
    if chip.watts.value is None:
        return None
    watts = megawatts.watts_of(
        chip.id, cluster.accelerators
    )  # a superchip's rest is by the node that its maker sells, whatever a row calls one
    if chip.id not in energy.SUPERCHIPS:
        watts = watts.model_copy(update={"per_node": cluster.per_node})
    said = " ".join(str(row.get(name) or "") for name in ("server_note", "cooling", "server")).lower()
    cooling: energy.Cooling | None = next((cooling for pattern, cooling in _COOLED if re.search(pattern, said)), None)
    around = energy.server(cooling) if cooling and cluster.per_node == 8 else energy.server_of(watts, chip)
    device = energy.draw(found, case.workload, cluster, watts, around).device
    if device is None or around is None:
        return None
    used = cluster.accelerators / -(-cluster.accelerators // cluster.per_node)
    idle = energy.POWER["idle"].value * chip.watts.value
    mean = (used * device.mid + (cluster.per_node - used) * idle) / cluster.per_node
    return energy.node_watts(Range(low=mean, mid=mean, high=mean), around).mid * cluster.per_node


def _refused(row: Any, reason: str) -> dict[str, Any]:
    return {"id": _id(row)} | dict.fromkeys(NUMBERS) | {"refused": reason[:SHOWN]}


def _id(row: Any) -> str | int | None:
    """The row's own name, where it has one."""
    found = row.get("id") if isinstance(row, dict) else None
    return found if isinstance(found, (str, int)) and not isinstance(found, bool) else None
