"""What measuring costs: steps with the meter's thread and without, in turn, in one process; and the processor time that the thread takes.

    python benchmarks/meter.py                     what this machine has: NVML, RAPL, hwmon, a node's meter; two and a half minutes
    python benchmarks/meter.py --seconds 300 --every-s 0.05

A step here is Python and torch as a training step is: some hundred small products whose host work is what a meter's thread could hold up (it shares Python's
lock), and on a GPU the device is waited for once a step. Blocks with the thread and without alternate, ten pairs of 5 s each; 2 s before each are not counted,
in which the thread finds its sources and takes its first look. The row has the median over pairs of the ratio of their steps, which noise of the machine makes
larger or smaller than it is, and the median over blocks of the thread's processor time per second, which it cannot: a step is never held up by more.

Where nothing is metered there is no cost to tell, and no row: exit code 10.
"""

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from gigatrain import config, load
from gigatrain.bench import report
from gigatrain.bench.steady import looked
from gigatrain.errors import GigatrainError, RunError
from gigatrain.planning import watts
from gigatrain.power import meter

RESULTS = Path(__file__).parent / "results" / "meter.csv"
LEAST_S = 0.2  # of a block
COLUMNS = (
    "date", "commit", "device", "versions", "load", "every_s", "meters", "rounds", "block_s", "settle_s", "step_ms", "ratio", "ratio_low", "ratio_high",
    "thread_pct", "thread_pct_high",
)  # fmt: skip
NUMBERS = tuple(name for name in COLUMNS if name not in {"date", "commit", "device", "versions", "meters"})
Work = tuple[torch.Tensor, list[torch.Tensor]]


def step(x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        x = torch.nn.functional.silu(x @ weight)
    if x.is_cuda:
        torch.cuda.synchronize()


def block(seconds: float, work: Work) -> tuple[list[float], float]:
    """Seconds of each step, and processor seconds of all other threads per second."""
    found, begin, process, mine = [], time.perf_counter(), time.process_time(), time.thread_time()
    while (now := time.perf_counter()) - begin < seconds:
        step(*work)
        found.append(time.perf_counter() - now)
    spent = time.perf_counter() - begin
    return found, ((time.process_time() - process) - (time.thread_time() - mine)) / spent


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All blocks: the row. Raises PowerError where no meter counts, RunError for blocks that are too short."""
    each_s = options.seconds / max(1, options.rounds) / 2
    if options.rounds < 1 or each_s < LEAST_S or options.settle_s < 0:
        raise RunError(
            f"{options.seconds:g} s are {each_s:.2g} s for each of {2 * options.rounds} blocks, and --settle-s is {options.settle_s:g}; give "
            f"--rounds 1 or more, --seconds that leave {LEAST_S:g} s a block, and --settle-s 0 or more"
        )
    torch.set_num_threads(1)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    size = 2048 if place == "cuda" else 96
    work = (torch.randn(size, size, device=place), [torch.randn(size, size, device=place) / size**0.5 for _ in range(200)])
    seen = [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]
    found, power = options.devices.split(",") if options.devices else seen, config.Power(every_s=options.every_s, sysfs=options.sysfs)
    figures = watts.of(load.site("one-gpu" if found else "laptop"), max(1, len(found)))
    meters = looked(power, figures, found)[1]
    ratios, busy, steps = [], [], []
    for number in range(options.rounds):
        times: dict[bool, float] = {}
        for on in (number % 2 == 0, number % 2 == 1):
            with meter.opened(power, figures, found, whole=True) if on else nullcontext():
                block(options.settle_s, work)
                taken, other = block(each_s, work)
            times[on] = statistics.median(taken)
            if on:
                busy.append(other)
            else:
                steps.append(times[on])
        ratios.append(times[True] / times[False])
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "device": torch.cuda.get_device_name() if place == "cuda" else platform.processor() or platform.machine(),
        "versions": f"python={platform.python_version()} torch={torch.__version__}",
        "load": round(os.getloadavg()[0], 2),
        "every_s": options.every_s,
        "meters": "; ".join(f"{what}: {how}" for what, how in meters.items() if what != "notes"),
        "rounds": options.rounds,
        "block_s": round(each_s, 3),
        "settle_s": options.settle_s,
        "step_ms": round(1e3 * statistics.median(steps), 4),
        "ratio": round(statistics.median(ratios), 5),
        "ratio_low": round(min(ratios), 5),
        "ratio_high": round(max(ratios), 5),
        "thread_pct": round(100 * statistics.median(busy), 4),
        "thread_pct_high": round(100 * max(busy), 4),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=100.0, help="of all blocks together, without settling (default: 100)")
    parser.add_argument("--rounds", type=int, default=10, help="pairs (default: 10)")
    parser.add_argument("--settle-s", type=float, default=2.0, help="before each block, not counted (default: 2)")
    parser.add_argument("--every-s", type=float, default=0.1, help="between two looks (default: 0.1)")
    parser.add_argument("--sysfs", default="/sys", help="where the kernel's files are")
    parser.add_argument("--devices", metavar="UUID,UUID", help="accelerators that are read (default: those that torch sees)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows are appended (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        report.load(options.out, COLUMNS, NUMBERS)  # other columns are refused now rather than after minutes
        row = measure(options)
        report.append(options.out, [row], COLUMNS)
    except GigatrainError as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return failure.exit_code
    for name, value in row.items():
        print(f"{name:16} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
