"""What measuring costs: steps with the meter's thread and without, in turn, in one process; and the processor time that the thread takes.

    python benchmarks/meter.py                     what this machine has: NVML, RAPL, hwmon, a node's meter
    python benchmarks/meter.py --seconds 120 --every-s 0.05

A step here is Python and torch as a training step is: some hundred small products whose host work is what a meter's thread could hold up (it shares Python's
lock), and on a GPU the device is waited for once a step. Rounds alternate; the row has the median of the ratio of each pair of rounds, which noise of the
machine makes larger or smaller than it is, and the processor time of the thread per second, which it cannot: a step is never held up by more.
"""

import argparse
import csv
import datetime
import os
import platform
import statistics
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from gigatrain import config, load
from gigatrain.planning import watts
from gigatrain.power import meter

RESULTS = Path(__file__).parent / "results" / "meter.csv"


def step(x: torch.Tensor, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        x = torch.nn.functional.silu(x @ weight)
    if x.is_cuda:
        torch.cuda.synchronize()


def round_of(seconds: float, work: tuple[torch.Tensor, list[torch.Tensor]]) -> tuple[list[float], float]:
    """Seconds of each step, and processor seconds of all other threads per second."""
    found, begin, process, mine = [], time.perf_counter(), time.process_time(), time.thread_time()
    while (now := time.perf_counter()) - begin < seconds:
        step(*work)
        found.append(time.perf_counter() - now)
    spent = time.perf_counter() - begin
    return found, ((time.process_time() - process) - (time.thread_time() - mine)) / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of all rounds together (default: 60)")
    parser.add_argument("--rounds", type=int, default=10, help="pairs (default: 10)")
    parser.add_argument("--every-s", type=float, default=0.1, help="between two looks (default: 0.1)")
    parser.add_argument("--sysfs", default="/sys", help="where the kernel's files are")
    parser.add_argument("--devices", metavar="UUID,UUID", help="accelerators that are read (default: those that torch sees)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows are appended (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    size = 2048 if place == "cuda" else 96
    work = (torch.randn(size, size, device=place), [torch.randn(size, size, device=place) / size**0.5 for _ in range(200)])
    seen = [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]
    found, power = options.devices.split(",") if options.devices else seen, config.Power(every_s=options.every_s, sysfs=options.sysfs)
    figures = watts.of(load.site("one-gpu" if found else "laptop"), max(1, len(found)))
    seconds = options.seconds / options.rounds / 2
    step(*work)
    ratios, busy, steps, meters = [], [], [], {}
    for number in range(options.rounds):
        times: dict[bool, float] = {}
        for on in (number % 2 == 0, number % 2 == 1):
            with meter.opened(power, figures, found, whole=True) if on else nullcontext() as one:
                meters = one.meters if one is not None else meters
                taken, other = round_of(seconds, work)
            times[on] = statistics.median(taken)
            if on:
                busy.append(other)
            else:
                steps.append(times[on])
        ratios.append(times[True] / times[False])
    row: dict[str, Any] = {
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
        "step_ms": round(1e3 * statistics.median(steps), 4),
        "ratio": round(statistics.median(ratios), 5),
        "ratio_low": round(min(ratios), 5),
        "ratio_high": round(max(ratios), 5),
        "thread_pct": round(100 * statistics.median(busy), 4),
        "thread_pct_high": round(100 * max(busy), 4),
    }
    for name, value in row.items():
        print(f"{name:16} {value}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    new = not options.out.exists()
    with options.out.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
