r"""One training step against its peers: same architecture, initial weights, rows, batch and mathematics, in alternating rounds.

    python benchmarks/step.py                                    quickstart's model on this machine
    python benchmarks/step.py --quick --providers gigatrain,trainer
    python benchmarks/step.py --providers fusions                what a step fuses, on and off, one by one
    python benchmarks/step.py --data random --steps 10 --set model.architecture=llama-3.2-1b --set train.sequence=2048 --set train.batch=2 \
        --set optim.lr=1e-4 --providers gigatrain,trainer,trainer-bf16,trainer+compile

Every provider (providers.py) is a process of its own with torch's default number of threads. One works at a time: a round is `--settle` steps that nobody times
and `--steps` that are timed together, from synchronised device to synchronised device; then the next provider has its round, and the order rotates.
So whatever drifts (clocks, heat, neighbours) hits all alike, and ratios are taken round by round. Before the first round each makes `--warmup` steps,
compilation included, that count for nothing but the loss curves. All stay on the device meanwhile, with weights and moments: what does not fit together
is a line that says so, and --providers chooses fewer.

The recipe's optimizer becomes AdamW with decaying embeddings, which is what the peers can do, with the recipe's schedule and clip, and its rate unless
it is a recipe for Muon: that rate is for embeddings, and for matrices so high that rounding errors grow a hundredfold in ten steps, so it becomes 1e-3
(--set optim.lr= overrides). Rows are those of our loader in its order, but each row is one document for everybody: no mask at documents' borders.
Everybody reports its loss once a round.

Columns: tokens/s is the median of the rounds, with the 20th and 80th percentile; MFU is plan.flops_per_token x tokens/s over the fastest square matrix
product of the same dtype, measured in the same rounds; peak memory is CUDA's max_memory_allocated, or on a CPU the process's largest RSS less its RSS
after imports, set-up and compilation included; `max dloss` is the largest difference from gigatrain's loss at any step; `loop %` is the share of
gigatrain's step outside forward_backward and step: host time on a CPU, the device's timeline (CUDA events) on a GPU.
"""

import argparse
import datetime
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from providers import PROVIDERS, VARIANTS, handicap, precision, products, unavailable
from rounds import Peer, append, noted, ratio, revision, start, work

from gigatrain import load
from gigatrain.bench.trials import rotated
from gigatrain.errors import GigatrainError, RunError
from gigatrain.planning.plan import Plan, plan

DEFAULT = (
    "gigatrain", "gigatrain+compile", "gigatrain+reference", "gigatrain+leanstate", "trainer", "trainer-bf16", "trainer+compile", "trainer-bf16+compile",
    "trainer+liger", "trainer-bf16+liger", "litgpt", "torchtitan",
)  # fmt: skip

# Each of them, and the row that it is compared with: release cannot clip.
AGAINST = {"fuse": "unfused", "maingrad": "unfused", "graph": "unfused", "release": "unclipped"}
MUON_LR = 1e-3
# Heading of the printed table: column of the CSV file, and format.
SHOWN = {
    "provider": ("provider", ""),
    "precision": ("precision", ""),
    "tokens/s": ("tokens_per_s", ",.0f"),
    "p20": ("tokens_per_s_p20", ",.0f"),
    "p80": ("tokens_per_s_p80", ",.0f"),
    "step ms": ("step_ms", ",.1f"),
    "TFLOP/s": ("tflops", ".3g"),
    "MFU %": ("mfu_pct", ".1f"),
    "peak MiB": ("peak_mib", ",.0f"),
    "first loss": ("loss_first", ".3f"),
    "last loss": ("loss_last", ".3f"),
    "max dloss": ("max_loss_difference", ".1e"),
    "x trainer": ("ratio_to_trainer", ".2f"),
    "x best trainer": ("ratio_to_best_trainer", ".2f"),
    "loop %": ("loop_pct", ".2f"),
}


def prepare(options: argparse.Namespace, folder: Path, steps: int) -> tuple[Plan, dict[str, Any]]:
    """Plan the run, and write initial weights and rows: the plan, and the job that every worker gets.

    Raises a GigatrainError for a recipe that the peers cannot share.
    """
    forced = ["optim.name=adamw", "optim.decay_embeddings=true", "report.trackers=[]", f"report.every={options.settle + options.steps}"]
    if options.precision:
        forced.append(f"train.precision={options.precision}")
    muon = load.recipe(options.recipe, options.set).optim.name == "muon"
    sets = [*([f"optim.lr={MUON_LR}"] if muon else []), *options.set, *forced]  # the last one counts
    planned = plan(load.recipe(options.recipe, [*sets, "train.compile=false"]), options.site)
    asked = {
        name.partition("+")[2] for name in options.providers.split(",") if name.startswith("gigatrain+") and not unavailable(name, planned)
    }
    plans = {"": planned} | {
        variant: plan(load.recipe(options.recipe, [*sets, "train.compile=false", *VARIANTS[variant]]), options.site) for variant in asked
    }
    if planned.loss.z_loss:
        raise RunError(f"loss.z_loss {planned.loss.z_loss} has no counterpart in the peers; --set loss.z_loss=0.0")
    if planned.batch % planned.microbatch:
        raise RunError(
            f"train.batch {planned.batch} is no multiple of train.microbatch {planned.microbatch}, as the peers need; change one"
        )
    if steps > planned.steps:
        raise RunError(
            f"{steps} steps of measuring exceed the recipe's {planned.steps}; fewer --rounds or --steps, or --set train.steps={steps}"
        )

    import torch
    from safetensors.torch import save_file

    from gigatrain import architectures
    from gigatrain.data.build import build
    from gigatrain.data.corpus import Corpus
    from gigatrain.data.loader import Batches
    from gigatrain.models import hf
    from gigatrain.models.decoder import Decoder

    count = steps + 1  # a peer's loop asks for one batch more before it learns that the run is over
    if options.data == "random":
        corpus: Corpus = _random_corpus(folder / "random", planned, count)
    else:
        corpus = build(planned.data, planned.tokenizer)
        if corpus.vocab > planned.decoder.vocab:
            raise RunError(
                f"the tokenizer has {corpus.vocab} ids and the model embeds {planned.decoder.vocab}; enlarge it, or use --data random"
            )
    batches = Batches(corpus, sequence=planned.sequence, packing=planned.data.packing, batch=planned.batch, seed=planned.seed, prefetch=0)
    parts = [batches.make(step * planned.batch).microbatches[0] for step in range(count)]
    rows = {"tokens": torch.cat([part.tokens for part in parts]), "labels": torch.cat([part.labels for part in parts])}
    save_file(rows, folder / "rows.safetensors")
    initial = folder / "initial"
    model = Decoder(planned.decoder)
    model.init_weights(planned.init.std, planned.init.scale_residual, planned.seed)
    hf.save_weights(model, planned.decoder, initial)
    config = architectures.to_hf_config(planned.decoder, max_positions=planned.positions, dtype="float32", bos=None, eos=None, pad=None)
    (initial / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plans = {variant: found.model_copy(update={"source": str(initial)}) for variant, found in plans.items()}
    job = {
        "plans": {variant: found.text() for variant, found in plans.items()},
        "corpus": str(corpus.folder),
        "manifest": corpus.manifest,
        "weights": corpus.weights,
        "initial": str(initial),
        "rows": str(folder / "rows.safetensors"),
        "window": options.settle + options.steps,
    }
    return plans[""], job


def _random_corpus(folder: Path, plan: Plan, steps: int) -> Any:
    """One document of uniformly random tokens, as our shards hold it."""
    from gigatrain.data.corpus import Corpus
    from gigatrain.data.shards import ShardWriter

    folder.mkdir()
    writer = ShardWriter(folder / "random", plan.decoder.vocab)
    writer.add(np.random.default_rng(plan.seed).integers(0, plan.decoder.vocab, steps * plan.tokens_per_step + 1))
    splits = {"train": {"shards": [{**(writer.finish() or {}), "prefix": "random"}]}}
    source = {"name": "random", "ends_with_eos": True, "starts_with_bos": False, "splits": splits}
    return Corpus(folder, {"vocab": plan.decoder.vocab, "eos": 0, "sha256": "random", "sources": [source]}, (1.0,))


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Run every provider; returns {"rows", "failed": why by name, "losses": those of every step by name}."""
    names: list[str] = list(dict.fromkeys(options.providers.split(",")))
    for name in names:
        base, *extra = name.split("+")
        if base not in {*PROVIDERS, "torchtitan"} - {"matmul"} or not set(extra) <= {"compile", "liger", *VARIANTS}:
            raise RunError(f"there is no provider {name!r}{load.nearest(name, DEFAULT)} Known: {', '.join(DEFAULT)}.")
    steps = options.warmup + options.rounds * (options.settle + options.steps)
    peers: list[Peer] = []
    with tempfile.TemporaryDirectory(prefix="gigatrain-step-") as temporary:
        folder = Path(temporary)
        planned, job = prepare(options, folder, steps)
        shape = f"{planned.decoder.family}, {planned.parameters:,} parameters"
        say(f"{shape}; {options.why}; {steps} steps of {planned.tokens_per_step:,} tokens")
        if slow := handicap(planned):
            say(slow)
        failed = {name: reason for name in names if (reason := unavailable(name, planned))}
        try:
            for name in ("matmul", *(name for name in names if name not in failed)):
                peers.append(start(__file__, name, planned.device, job, folder / name))
            for peer in peers:  # they set themselves up side by side; from here on one works at a time
                with noted(peer, say):
                    peer.ready = peer.answer(options.timeout)
            for peer in peers:
                if peer.error is None:
                    with noted(peer, say):
                        peer.warmup_s = peer.ask(0, 1 if peer is peers[0] else options.warmup, options.timeout)["seconds"]
                        say(f"{peer.name}: warm-up took {peer.warmup_s:.1f} s")
            for turn in range(options.rounds):
                for peer in rotated(peers, turn):
                    if peer.error is None:
                        with noted(peer, say):
                            size = (1, 3) if peer is peers[0] else (options.settle, options.steps)
                            answer = peer.ask(*size, options.timeout)
                            peer.answers.append(answer)
                            peer.seconds.append(answer["seconds"] / options.steps)
                speeds = (f"{peer.name} {planned.tokens_per_step / peer.seconds[-1]:,.0f}" for peer in peers[1:] if peer.error is None)
                say(f"round {turn + 1} of {options.rounds}, tokens/s: {', '.join(speeds)}")
        finally:
            for peer in peers:
                peer.close()
    ceiling, *peers = peers
    if ceiling.error:
        raise RunError(f"the matrix product failed: {ceiling.error}")
    failed |= {peer.name: peer.error for peer in peers if peer.error}
    whole = [peer for peer in peers if not peer.error]
    rows = _table(planned, whole, _ceiling(ceiling, planned.device), options)
    order = [name for name in names if name in failed]
    by_name = {peer.name: peer for peer in whole}
    sizes = {peer.name: [answer["peak_bytes"] / 2**20 for answer in peer.answers] for peer in whole}
    gains = [
        {
            "provider": f"gigatrain+{name}",
            "against": f"gigatrain+{other}",
            "gain": ratio(by_name[f"gigatrain+{other}"], by_name[f"gigatrain+{name}"]),
            "peak_mib": round(max(sizes[f"gigatrain+{name}"]) - max(sizes[f"gigatrain+{other}"]), 1),
        }
        for name, other in AGAINST.items()
        if {f"gigatrain+{name}", f"gigatrain+{other}"} <= set(by_name)
    ]
    return {
        "gains": gains,
        "rows": rows,
        "failed": {name: failed[name] for name in order},
        "losses": {peer.name: peer.losses for peer in whole},
    }


def _ceiling(peer: Peer, device: str) -> float:
    """FLOP/s of the fastest product: the best size's median over all rounds."""
    sizes = products(device)
    by_size = [
        np.median([2 * size**3 * repeats / seconds for answer in peer.answers for seconds in answer["intervals"][index :: len(sizes)]])
        for index, (size, repeats) in enumerate(sizes)
    ]
    return float(max(by_size))


def _table(plan: Plan, peers: list[Peer], ceiling: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per provider, as the CSV file and the table show it."""
    by_name = {peer.name: peer for peer in peers}
    trainers = [peer for peer in peers if peer.name.startswith("trainer")]
    best = min(trainers, key=lambda peer: float(np.median(peer.seconds)), default=None)
    ours, plain = by_name.get("gigatrain"), by_name.get("trainer")
    arch, commit, now = plan.decoder, revision(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    rows = []
    for peer in peers:
        low, middle, high = np.percentile([plan.tokens_per_step / seconds for seconds in peer.seconds], [20, 50, 80]).tolist()
        differences = [abs(a - b) for a, b in zip(peer.losses, ours.losses, strict=True)] if ours else []
        flops = plan.flops_per_token * middle
        clocks = [answer["clock_mhz"] for answer in peer.answers if answer["clock_mhz"]]
        row = {
            "commit": commit,
            "date": now,
            "device": peer.ready["device"],
            "threads": peer.ready["versions"].pop("threads", None),
            "clock_mhz": float(np.median(clocks)) if clocks else None,
            "load": round(os.getloadavg()[0], 2),
            "versions": " ".join(f"{name}={version}" for name, version in peer.ready["versions"].items()),
            "provider": peer.name,
            "precision": precision(peer.name, plan),
            "architecture": f"{arch.family} {arch.layers}x{arch.hidden} vocab {arch.vocab}",
            "parameters": plan.parameters,
            "batch": plan.batch,
            "microbatch": plan.microbatch,
            "sequence": plan.sequence,
            "data": options.data,
            "lr": plan.optim.lr,
            "steps": len(peer.losses),
            "rounds": f"{options.rounds}x({options.settle}+{options.steps})",
            "tokens_per_s": round(middle, 1),
            "tokens_per_s_p20": round(low, 1),
            "tokens_per_s_p80": round(high, 1),
            "step_ms": round(1e3 * float(np.median(peer.seconds)), 3),
            "tflops": round(flops / 1e12, 4),
            "ceiling_tflops": round(ceiling / 1e12, 4),
            "mfu_pct": round(100 * flops / ceiling, 2),
            "peak_mib": round(max(answer["peak_bytes"] for answer in peer.answers) / 2**20, 1),
            "loss_first": peer.losses[0],
            "loss_last": peer.losses[-1],
            "max_loss_difference": max(differences) if ours and not any(map(math.isnan, differences)) else None,
            "last_loss_difference": differences[-1] if ours else None,
            "ratio_to_trainer": ratio(plain, peer),
            "ratio_to_best_trainer": ratio(best, peer),
            "loop_pct": _loop_share(peer) if peer.name.startswith("gigatrain") else None,
            "warmup_s": round(peer.warmup_s, 2),
        }
        rows.append(row)
    return rows


def _loop_share(peer: Peer) -> float:
    """Percent of the step before and after the engine's two calls, over all rounds; marks: batch, engine, metrics."""
    intervals = [np.array(answer["intervals"]).reshape(-1, 3) for answer in peer.answers]
    batch, engine, metrics = np.concatenate(intervals).sum(0).tolist()
    return round(100 * (batch + metrics) / (batch + engine + metrics), 2)


def show(found: dict[str, Any]) -> None:
    """The table, and below it who did not run and why."""
    from rich.console import Console
    from rich.table import Table

    console, rows = Console(width=180, highlight=False), found["rows"]  # a narrower terminal wraps; figures are never cut
    if rows:
        one = rows[0]
        console.print(
            f"{one['device']}, {one['threads']} threads, load {one['load']}; {one['architecture']}, {one['parameters']:,} parameters; "
            f"batch {one['batch']} x {one['sequence']}, microbatch {one['microbatch']}; rounds {one['rounds']}; lr {one['lr']:g}; data {one['data']}; "
            f"matrix product {one['ceiling_tflops']:.3g} TFLOP/s"
        )
    table = Table(box=None)
    for heading, (_, form) in SHOWN.items():
        table.add_column(heading, justify="right" if form else "left", no_wrap=True)
    for row in sorted(rows, key=lambda row: -row["tokens_per_s"]):
        table.add_row(*("-" if row[column] is None else format(row[column], form) for column, form in SHOWN.values()))
    console.print(table)
    for gain in found["gains"]:
        console.print(f"{gain['provider']} against {gain['against']}: {gain['gain']:.3f} x tokens/s, {gain['peak_mib']:+,.1f} MiB peak")
    for name, reason in found["failed"].items():
        console.print(f"{name}: {reason}", markup=False)


def provide(job: dict[str, Any], pipe: Any) -> None:
    """In a worker: the provider and the plan that the job names."""
    variant = "+".join(job["options"]) if job["provider"] == "gigatrain" else ""
    found = load.read_json(Plan, job["plans"][variant], "the job's plan", RunError)
    assert isinstance(found, Plan)
    PROVIDERS[job["provider"]](job, found, pipe)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], epilog="Read the head of this file for what is measured."
    )
    parser.add_argument("--recipe", default="quickstart", help="name or file (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the recipe; may be repeated")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: the recipe's")
    parser.add_argument(
        "--data", choices=("corpus", "random"), default="corpus", help="the recipe's corpus, or random tokens (default: %(default)s)"
    )
    parser.add_argument("--providers", help=f"comma-separated, or fusions: what a step fuses; default: {','.join(DEFAULT)}")
    parser.add_argument("--quick", action="store_true", help="3 rounds of half as many steps, and nothing that compiles")
    parser.add_argument("--rounds", type=int, help="default: 8")
    parser.add_argument("--steps", type=int, help="timed steps of a round; default: 10, on a GPU 50")
    parser.add_argument("--settle", type=int, help="steps before them that are not timed; default: 1, on a GPU 5")
    parser.add_argument("--warmup", type=int, help="steps before the first round; default: 5")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a worker may take for an answer (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "step.csv", help="rows are appended (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every step's loss, in place of the table")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(provide)
        return 0
    options.site, options.why = load.local_site()
    gpu = options.site.device == "cuda"
    sizes = {
        "rounds": 3 if options.quick else 8,
        "steps": (50 if gpu else 10) // (2 if options.quick else 1),
        "settle": 5 if gpu else 1,
        "warmup": 5,
    }
    for name, size in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, size)
    quick = [name for name in DEFAULT if "compile" not in name and name != "litgpt"]  # litgpt compiles always
    if options.providers == "fusions":
        options.providers = ",".join(f"gigatrain+{name}" for name in ("unfused", "fuse", "maingrad", "graph", "unclipped", "release"))
    options.providers = options.providers or ",".join(quick if options.quick else DEFAULT)
    try:
        if min(options.rounds, options.steps, options.warmup, options.settle + 1) < 1:
            raise RunError("--rounds, --steps and --warmup must be at least 1, and --settle at least 0")
        found = measure(options, lambda text: print(text, file=sys.stderr, flush=True))
        if options.json:
            print(json.dumps(found))
        else:
            show(found)
        append(found["rows"], options.out)  # last: what was measured is seen even if the file refuses it
    except GigatrainError as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and files go too
    sys.exit(main())
