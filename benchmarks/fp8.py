"""The low-precision lane against bf16: losses over the same data, and what a GPU should gain (a model until one measures it).

    python benchmarks/fp8.py                         500 steps of a quickstart-size model under bf16, fp32 and each scaling, emulated here
    python benchmarks/fp8.py --runs rowwise,nvfp4 --steps 60
    python benchmarks/fp8.py --model                 bytes, FLOPs and seconds of a stack of 8B-shaped layers in each form, modelled

Every run has the same weights, samples and schedule. Columns: the mean loss of the last `--window` steps, its deviation from bf16's, and the worst deviation of
the running mean over `--window` steps anywhere in the run; fp32's row says what rounding to bf16 itself does to these. The model is quickstart's with widths
that are multiples of 128, so that every scaling quantises every matrix.

The model of `--model`: products at 790 TFLOP/s in bf16 and twice that in FP8, memory at 4.3 TB/s (H200; both as measured for bf16 products and copies), nothing
overlapped. Quantising reads 2 B and writes 1 B an element and copy; rowwise and tensorwise read twice; a producer that quantises saves the tensor's own 4 B.
"""

import argparse
import csv
import datetime
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gigatrain import load
from gigatrain.planning.plan import Plan, plan

RESULTS = Path(__file__).parent / "results" / "fp8.csv"
MODEL = (
    "model.architecture.hidden=256", "model.architecture.heads=8", "model.architecture.kv_heads=4", "model.architecture.intermediate=512",
    "report.trackers=[]", "fp8.least=[16, 16]",
)  # fmt: skip
LOW = ("train.precision=fp8", "fp8.emulate=true")
RUNS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "fp32": ("train.precision=fp32",),
    "rowwise": (*LOW, "fp8.scaling=rowwise"),
    "rowwise, bf16 weight gradients": (*LOW, "fp8.scaling=rowwise", "fp8.weight_gradient=bf16"),
    "tensorwise": (*LOW, "fp8.scaling=tensorwise"),
    "tensorwise, delayed": (*LOW, "fp8.scaling=tensorwise", "fp8.amax=delayed"),
    "blockwise": (*LOW, "fp8.scaling=blockwise"),
    "mxfp8": (*LOW, "fp8.scaling=mxfp8"),
    "nvfp4": (*LOW, "fp8.scaling=nvfp4"),
    "nvfp4, bf16 weight gradients": (*LOW, "fp8.scaling=nvfp4", "fp8.weight_gradient=bf16"),
}
KEYS = (
    "date",
    "commit",
    "device",
    "steps",
    "batch",
    "sequence",
    "parameters",
    "run",
    "quantised",
    "loss",
    "deviation",
    "worst_deviation",
    "at_step",
    "seconds",
)
# Tokens a step, hidden, queries, keys and values each, intermediate: a layer of Llama 3 8B.
TOKENS, SHAPE = 8192, {"q": (4096, 4096), "kv": (2048, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
PEAK, BANDWIDTH = 790e12, 4.3e12


def losses(made: Plan, corpus: Any) -> list[float]:
    """The loss per token of every step."""
    import torch

    from gigatrain import engines
    from gigatrain.data.loader import Batches
    from gigatrain.optim.schedule import rate
    from gigatrain.parallel.mesh import alone

    torch.manual_seed(made.seed)
    engine = engines.make(made, alone(), torch.device("cpu"), fresh=True)
    batches = Batches(
        corpus, sequence=made.sequence, packing=made.data.packing, batch=made.batch, microbatch=made.microbatch, seed=made.seed
    )
    found = []
    for step, batch in zip(range(made.steps), batches, strict=False):
        engine.forward_backward(batch)
        update = engine.step(rate(made.schedule, step, made.steps))
        found.append(float(update.nats / update.targets))
    return found


def smoothed(values: list[float], window: int) -> list[float]:
    """Running means over the last `window` values, from the first that has as many."""
    return [sum(values[i - window : i]) / window for i in range(window, len(values) + 1)]


def compare(values: list[float], expected: list[float], window: int) -> tuple[float, float, float, int]:
    """`(final mean, its relative deviation, the worst deviation of the running mean, the step where)`."""
    ours, theirs = smoothed(values, window), smoothed(expected, window)
    apart = [abs(a / b - 1) if math.isfinite(a) else math.inf for a, b in zip(ours, theirs, strict=True)]
    worst = max(range(len(apart)), key=apart.__getitem__)
    return ours[-1], ours[-1] / theirs[-1] - 1, apart[worst], worst + window


def train(options: argparse.Namespace) -> list[dict[Any, Any]]:
    """One row per run, the first of them bf16's."""
    from gigatrain.data import build

    sizes = (f"train.steps={options.steps}", f"train.batch={options.batch}", f"train.sequence={options.sequence}", *options.set)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    expected, found, corpus = None, [], None
    names = [name.strip() for name in options.runs.split(";")] if options.runs else list(RUNS)
    for name in dict.fromkeys(("bf16", *names)):
        made = plan(load.recipe("quickstart", [*MODEL, *sizes, *RUNS[name]]), load.site("laptop"))
        corpus = corpus or build.build(made.data, made.tokenizer)
        began = time.perf_counter()
        known = json.loads(options.curves.read_text()) if options.curves and options.curves.exists() else {}
        values = known.get(made.identity) or losses(made, corpus)
        if options.curves:
            options.curves.write_text(json.dumps({**known, made.identity: values}))
        expected = expected or values
        loss, deviation, worst, at = compare(values, expected, options.window)
        row = dict(
            zip(
                KEYS,
                (
                    datetime.datetime.now(datetime.UTC).date(), commit, platform.processor() or platform.machine(), options.steps, options.batch,
                    options.sequence, made.parameters, name, 0 if made.fp8 is None else len(made.fp8.low), loss, deviation, worst, at,
                    round(time.perf_counter() - began, 1),
                ),
                strict=True,
            )
        )  # fmt: skip
        print(
            f"{name:32} loss {loss:.4f}  {100 * deviation:+.3f} %  worst {100 * worst:.3f} % at step {at}  {row['seconds']:.0f} s",
            flush=True,
        )
        found.append(row)
    return found


def modelled(scaling: str, fused: bool) -> dict[str, float]:
    """Seconds of one layer's products and quantisation, forward and backward, at TOKENS tokens."""
    products = sum(3 * 2.0 * TOKENS * o * d for o, d in SHAPE.values())
    if scaling == "bf16":
        return {"products_s": products / PEAK, "quantise_s": 0.0, "bytes": 0.0}
    reads = {"blockwise": 2, "rowwise": 4, "tensorwise": 4, "tensorwise, delayed": 2}[scaling]
    both = reads + 2  # codes and their transposed copy
    inputs = {4096 * 2 + 14336: both, 4096: both}  # both norms' outputs and the activation; attention's output
    moved = sum(TOKENS * width * cost for width, cost in inputs.items())
    moved += sum(TOKENS * o * both for o, _ in SHAPE.values())  # gradients of outputs
    moved += sum(o * d * 2 * (reads + 1) for o, d in SHAPE.values())  # weights, once each way
    if (
        fused
    ):  # norms' outputs and the activation are neither written nor read: 2 B each, and what a second reading costs is the producer's inputs
        moved -= TOKENS * (4096 * 2 + 14336) * 4
    return {"products_s": products / (2 * PEAK), "quantise_s": moved / BANDWIDTH, "bytes": moved}


def model() -> None:
    """Print the table."""
    rest = TOKENS * (4096 * 30 + 14336 * 16) * 1.0  # bytes of norms, rotation, activation and sums, both ways, in bf16
    attention = 3.5 * 2 * 2 * TOKENS * TOKENS * 4096 / 2 / 500e12  # causal, forward and backward, at 500 TFLOP/s
    fixed = rest / BANDWIDTH + attention
    base = sum(modelled("bf16", False)[key] for key in ("products_s", "quantise_s")) + fixed
    print(f"a layer of Llama 3 8B at {TOKENS} tokens, modelled: products, quantisation, attention and the rest, in us")
    for scaling in ("bf16", "rowwise", "blockwise", "tensorwise", "tensorwise, delayed"):
        for fused in (False, True) if scaling != "bf16" else (False,):
            found = modelled(scaling, fused)
            total = found["products_s"] + found["quantise_s"] + fixed
            print(
                f"{scaling + (', fused into producers' if fused else ''):46} {found['products_s'] * 1e6:7.0f} {found['quantise_s'] * 1e6:7.0f} "
                f"{fixed * 1e6:7.0f}  {found['bytes'] / 1e9:6.2f} GB  {total * 1e6:7.0f}  {100 * (base / total - 1):+.0f} % tokens/s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", help="names of RUNS with ; between them; default: all")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--curves", type=Path, help="keep every run's losses here, and do not train again what is there")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--model", action="store_true", help="print the modelled gain and stop")
    options = parser.parse_args()
    if options.model:
        model()
        return
    found = train(options)
    new = not options.csv.exists()
    with options.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, KEYS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    sys.exit(main())
