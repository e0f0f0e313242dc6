r"""The same steps under different engines, on several ranks of this machine: speed, memory, bytes between ranks, in alternating rounds.

    python benchmarks/engines.py                                                2 processes, quickstart's model with AdamW
    python benchmarks/engines.py --ranks 4 --providers native,plain,zero3 --set model.architecture.layers=8

Every provider is `--ranks` processes of its own, and works alone: a round is `--settle` steps that nobody times and `--steps` that are timed together, from
barrier to barrier; then the next provider has its round, and the order rotates. Ratios are taken round by round. Rows are random tokens, the same for all.

    native     this engine with FSDP2: what `gigatrain train` runs
    plain      the same decoder, kernels and FSDP2 calls in a plain torch loop: clip_grad_norm_, torch.optim.AdamW(fused=True), nothing else
    ddp        this engine with whole weights
    torch-ddp  torch's DistributedDataParallel in the same plain loop
    zero1..3   the deepspeed engine
    tensor, context, pipeline, ...   --axes lets the native engine share the model otherwise, for instance --axes tensor=2

Columns: tokens/s (median of rounds, 20th and 80th percentile), the ratio to `plain` round by round, peak memory of a rank (CUDA: max_memory_allocated; CPU: the
largest RSS less that after imports), bytes that one rank sends per step (ring: an all-gather or reduce-scatter sends (R-1)/R of what is whole, an
all-reduce twice that), counted in one step that nobody times, and the largest relative difference of a loss from `plain`'s.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from gigatrain import load
from gigatrain.errors import GigatrainError, RunError
from gigatrain.planning.plan import Plan, plan

DEFAULT = "native,plain,ddp,torch-ddp,zero1,zero2,zero3"
SETTINGS: dict[str, list[str]] = {
    "native": [],
    "plain": [],
    "ddp": ["mesh.shard=1", "mesh.replicate={ranks}"],
    "torch-ddp": ["mesh.shard=1", "mesh.replicate={ranks}"],
    **{f"zero{stage}": ["engine.name=deepspeed", f"engine.zero={stage}"] for stage in (1, 2, 3)},
}
FORCED = ["optim.name=adamw", "optim.lr=1e-3", "report.trackers=[]", "data.packing=stream"]
HEAD = ("date", "commit", "device", "ranks", "recipe", "set", "provider")
KEYS = ("tokens_per_s", "p20", "p80", "ratio_to_plain", "peak_bytes", "sent_bytes", "sent", "loss_difference", "failure")
RESULTS = Path(__file__).parent / "results" / "engines.csv"


# ---- A rank ----


def rows(made: Plan, step: int, reader: int, readers: int) -> Any:
    """This reader's share of a step: random tokens, every one a target."""
    import torch

    from gigatrain.data.loader import Batch, Microbatch

    each, size = made.batch // readers, made.microbatch
    generator = torch.Generator().manual_seed(step)
    whole = torch.randint(made.architecture.vocab, (made.batch, made.sequence + 1), generator=generator)
    mine = whole[reader * each : (reader + 1) * each].to(made.device)
    at = torch.arange(made.sequence, device=mine.device).expand(each, made.sequence)
    parts = tuple(
        Microbatch(mine[i : i + size, :-1].contiguous(), mine[i : i + size, 1:].contiguous(), at[i : i + size], None)
        for i in range(0, each, size)
    )
    return Batch(parts, each * made.sequence, made.tokens_per_step, range(step * made.batch, (step + 1) * made.batch))


class Plain:
    """What one would write without an engine."""

    def __init__(self, made: Plan, mesh: Any, device: Any, *, ddp: bool) -> None:
        import torch
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
        from torch.nn.parallel import DistributedDataParallel

        from gigatrain.kernels import ops
        from gigatrain.models.decoder import Decoder, decays

        self.made, self.torch, self.ddp = made, torch, ddp
        chosen = ops.choose({choice.op: choice.kernel for choice in made.kernels})
        model = Decoder(made.decoder, chosen, recompute=made.recompute)
        model.init_weights(made.init.std, made.init.scale_residual, made.seed)
        model.to(device)
        bf16 = torch.bfloat16 if made.compute == "bf16" else None
        if ddp:
            self.run: Any = DistributedDataParallel(_Loss(model))
            self.bf16 = bf16
        else:
            whole = mesh.torch(("shard",))
            policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32 if bf16 else None, cast_forward_inputs=False)
            for layer in model.layers:
                fully_shard(layer, mesh=whole, mp_policy=policy)
            fully_shard(model, mesh=whole, mp_policy=policy)
            register_fsdp_forward_method(model, "loss")
            self.run, self.bf16 = model.loss, None
        self.parameters = list(model.parameters())
        groups = [
            {"params": [p for n, p in model.named_parameters() if decays(n)], "weight_decay": made.optim.weight_decay},
            {"params": [p for n, p in model.named_parameters() if not decays(n)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=made.optim.lr, betas=made.optim.betas, eps=made.optim.eps, fused=True)

    def step(self, batch: Any) -> Any:
        torch, total = self.torch, 0.0
        for part in batch.microbatches:
            with torch.autocast(part.tokens.device.type, torch.bfloat16, enabled=self.bf16 is not None):
                loss, nats = self.run(part.tokens, part.labels)
            (loss / batch.targets).backward()  # the mean of the ranks' means: all have equally many targets
            total = total + nats.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.made.optim.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def _Loss(model: Any) -> Any:
    import torch

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            return self.model.loss(*inputs)

    return Loss()


class Engine:
    """Ours, as the loop drives it."""

    def __init__(self, made: Plan, mesh: Any, device: Any) -> None:
        from gigatrain import engines

        self.engine = engines.make(made, mesh, device, fresh=True)

    def step(self, batch: Any) -> Any:
        self.engine.forward_backward(batch)
        return self.engine.step(1.0).nats


def sent(step: Any) -> dict[str, int]:
    """Bytes that this rank sends in one step, by collective; on a ring."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace in ("c10d", "_c10d_functional"):
                name = func.__name__.split(".")[0]
                kind = next(
                    (
                        k
                        for k in ("reduce_scatter", "allgather", "all_gather", "allreduce", "all_reduce", "alltoall", "all_to_all", "send")
                        if k in name
                    ),
                    None,
                )
                if kind is not None:
                    found[kind.replace("_", "")] += _ring(kind, _bytes(args))
            return func(*args, **(kwargs or {}))

    with Count():
        step()
    return dict(found)


def _bytes(args: Any) -> int:
    """Of the largest tensor, or list of tensors, in a call: what is whole."""
    import torch

    def size(x: Any) -> int:
        if isinstance(x, torch.Tensor):
            return x.numel() * x.element_size()
        return sum(size(y) for y in x) if isinstance(x, (list, tuple)) else 0

    return max((size(x) for x in args), default=0)


def _ring(kind: str, count: int) -> int:
    from torch import distributed

    ranks = distributed.get_world_size()
    if kind == "send":
        return count
    return count * (ranks - 1) // ranks * (2 if kind in ("allreduce", "all_reduce") else 1)


def serve(job: dict[str, Any]) -> None:
    """One rank of one provider: obeys lines on stdin, answers with lines of JSON on its own pipe."""
    import torch

    from gigatrain.parallel import ranks

    made = Plan.model_validate_json(job["plan"])
    answers = os.fdopen(int(os.environ["ANSWERS"]), "w", buffering=1)
    with ranks.joined(made.mesh, made.ranks, made.device) as (mesh, device):
        imported = _rss("VmRSS")
        name = job["provider"]
        provider: Any = Plain(made, mesh, device, ddp=name == "torch-ddp") if name in ("plain", "torch-ddp") else Engine(made, mesh, device)
        reader, readers = mesh.data
        cuda, losses, step = device.type == "cuda", [], 0

        def one() -> None:
            nonlocal step
            nats = provider.step(rows(made, step, reader, readers))
            if name in ("plain", "torch-ddp"):
                nats = mesh.sum(torch.as_tensor(nats, dtype=torch.float64, device=device).clone())
            losses.append(float(nats) / made.tokens_per_step)
            step += 1

        print(json.dumps({"ready": True}), file=answers)
        for line in sys.stdin:
            order = json.loads(line)
            if "count" in order:
                print(json.dumps({"sent": sent(one)}), file=answers)
                continue
            if "end" in order:
                break
            for _ in range(order["settle"]):
                one()
            torch.distributed.barrier()
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(order["steps"]):
                one()
            if cuda:
                torch.cuda.synchronize()
            torch.distributed.barrier()
            peak = torch.cuda.max_memory_allocated() if cuda else _rss("VmHWM") - imported
            print(json.dumps({"seconds": time.perf_counter() - began, "losses": losses, "peak_bytes": peak}), file=answers)


def _rss(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    return 0


# ---- The one who measures ----


class Ranks:
    """All processes of one provider."""

    def __init__(self, name: str, made: Plan, port: int, log: Path) -> None:
        self.name, self.made = name, made
        self.processes, self.answers = [], []
        threads = str(max(1, len(os.sched_getaffinity(0)) // made.ranks))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(made.ranks), "LOCAL_WORLD_SIZE": str(made.ranks)}
        for rank in range(made.ranks):
            ours, theirs = os.pipe()
            environment = (
                {"OMP_NUM_THREADS": threads} | os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ANSWERS": str(theirs)}
            )
            job = json.dumps({"plan": made.text(), "provider": name})
            with log.with_suffix(f".{rank}").open("w") as said:
                process = subprocess.Popen(
                    [sys.executable, __file__, "--serve", job],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=said,
                    stderr=said,
                    pass_fds=[theirs],
                    text=True,
                )
            os.close(theirs)
            self.processes.append(process)
            self.answers.append(os.fdopen(ours))
        self.log = log
        self.hear()

    def hear(self) -> list[dict[str, Any]]:
        found = []
        for rank, pipe in enumerate(self.answers):
            line = pipe.readline()
            if not line:
                text = self.log.with_suffix(f".{rank}").read_text().strip().splitlines()
                raise RunError(f"{self.name}: rank {rank} ended: {text[-1] if text else 'without a word'}")
            found.append(json.loads(line))
        return found

    def say(self, **order: Any) -> list[dict[str, Any]]:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        for process in self.processes:
            process.kill()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per provider; a provider that fails is a row that says why."""
    names = options.providers.split(",")
    sets = [*options.set, *FORCED]
    found: list[dict[str, Any]] = []
    running: dict[str, Ranks] = {}
    seconds: dict[str, list[float]] = {}
    last: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, name in enumerate(names):
                axes = (
                    [f"mesh.{axis}" for axis in name.split("+")]
                    if "=" in name
                    else [one.format(ranks=options.ranks) for one in SETTINGS[name]]
                )
                try:
                    made = plan(load.recipe(options.recipe, [*sets, *axes]), load.site(options.site), options.ranks)
                    running[name] = Ranks(name, made, options.port + number, Path(folder) / name.replace("=", "-"))
                except GigatrainError as failure:
                    found.append({"provider": name, "failure": str(failure)})
            for process in range(options.rounds + 1):  # the first counts for nothing
                order = list(running)
                shift = process % len(order)
                for name in order[shift:] + order[:shift]:
                    try:
                        last[name] = running[name].say(settle=options.settle, steps=options.steps)
                    except (RunError, BrokenPipeError) as failure:
                        found.append({"provider": name, "failure": str(failure)})
                        running.pop(name).end()
                        continue
                    if process:
                        seconds.setdefault(name, []).append(max(answer["seconds"] for answer in last[name]))
            for name, group in running.items():
                counts = group.say(count=True)[0]["sent"]
                found.append(_row(name, group.made, options, seconds, last, counts))
        finally:
            for group in running.values():
                group.end()
    return sorted(found, key=lambda row: names.index(row["provider"]))


def _row(
    name: str,
    made: Plan,
    options: argparse.Namespace,
    seconds: dict[str, list[float]],
    last: dict[str, list[dict[str, Any]]],
    counts: dict[str, int],
) -> dict[str, Any]:
    tokens = made.tokens_per_step * options.steps
    speeds = sorted(tokens / second for second in seconds[name])
    base = seconds.get("plain")
    ratios = [theirs / ours for theirs, ours in zip(base, seconds[name], strict=True)] if base else []
    losses, expected = last[name][0]["losses"], last["plain"][0]["losses"] if "plain" in last else []
    return {
        "provider": name,
        "tokens_per_s": statistics.median(speeds),
        "p20": speeds[int(0.2 * (len(speeds) - 1))],
        "p80": speeds[round(0.8 * (len(speeds) - 1))],
        "ratio_to_plain": statistics.median(ratios) if ratios else None,
        "peak_bytes": max(answer["peak_bytes"] for answer in last[name]),
        "sent_bytes": sum(counts.values()),
        "sent": counts,
        "loss_difference": max((abs(a - b) / b for a, b in zip(losses, expected, strict=False)), default=None),
        "failure": "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--site", default="laptop")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--providers", default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--settle", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--port", type=int, default=29600)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    found = measure(options)
    print(f"{'provider':14} {'tokens/s':>10} {'20th':>9} {'80th':>9} {'to plain':>9} {'MiB peak':>9} {'MB sent':>9} {'max dloss':>10}")
    for row in found:
        if row["failure"]:
            print(f"{row['provider']:14} {row['failure']}")
            continue
        ratio = f"{row['ratio_to_plain']:9.3f}" if row["ratio_to_plain"] else f"{'':9}"
        difference = f"{row['loss_difference']:10.1e}" if row["loss_difference"] is not None else ""
        print(
            f"{row['provider']:14} {row['tokens_per_s']:10,.0f} {row['p20']:9,.0f} {row['p80']:9,.0f} {ratio} {row['peak_bytes'] / 2**20:9,.0f} "
            f"{row['sent_bytes'] / 1e6:9.2f} {difference}"
        )
    _keep(options, found)


def _keep(options: argparse.Namespace, found: list[dict[str, Any]]) -> None:
    from gigatrain.observe.metrics import versions

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    new = not options.csv.exists()
    with options.csv.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow([*HEAD, *KEYS, "versions"])
        for row in found:
            head = [
                datetime.datetime.now(datetime.UTC).date(),
                commit,
                platform.processor() or platform.machine(),
                options.ranks,
                options.recipe,
            ]
            values = [json.dumps(row.get(key)) if isinstance(row.get(key), dict) else row.get(key) for key in KEYS]
            writer.writerow([*head, " ".join(options.set), row["provider"], *values, json.dumps(versions())])


if __name__ == "__main__":
    try:
        main()
    except GigatrainError as failure:
        sys.exit(f"{Path(__file__).name}: {failure}")
