"""A plan at its real size without its machines: the real engine, on the real mesh, of every distinct role, over a process group that only pretends.

A role is a pipeline rank with the first or the last of the shards: ranks between them have as much as the first, ranks along `tensor`, `replicate` and
`expert` hold boxes of equal shapes. Each role is a process of its own (the pretended group is torch's "fake" backend, one per process; all are forked from
one that has imported torch), in which the native engine is built, makes one step on fake tensors (shapes without values), and is looked at: boxes, bytes,
and every collective with its size and group.

Layers are alike, so a stage is built with two layers and with three, and what the third adds is what every further one adds. Where layers differ (windows,
experts in some, positions in some) all of them are built. Fused kernels are replaced by plain ones, which ranks exchange the same data around.
"""

import json
import math
import os
import resource
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from typing import Any

from gigatrain.architectures import Architecture
from gigatrain.errors import PlanError
from gigatrain.planning import layout
from gigatrain.planning.kernels import IMPLEMENTATIONS, TRITON, Choice
from gigatrain.planning.plan import Plan, gib

ALIKE = 3  # layers of a stage that are built where all are alike
RING = {"allgather": 1.0, "reducescatter": 1.0, "allreduce": 2.0, "alltoall": 1.0, "send": 1.0, "broadcast": 1.0}


@dataclass(frozen=True)
class Role:
    """What one kind of rank holds and exchanges in a step; bytes of one rank."""

    name: str
    ranks: int  # how many ranks have it
    layers: int
    parameters: int  # elements of this rank
    whole: int  # elements of the whole parameters that its stage is made of
    weights: int
    gradients: int
    optimizer: int
    calls: dict[str, int]  # collectives of a step, by kind and size of the group
    sent: dict[str, int]  # bytes that this rank sends in them, on a ring


@dataclass(frozen=True)
class DryRun:
    """Every role of a plan, how long it took to try them, and the most memory that one took."""

    plan: Plan
    roles: tuple[Role, ...]
    seconds: float
    peak_bytes: int

    def lines(self) -> list[str]:
        """A table for a reader: roles, then the collectives of the one that sends most."""
        estimate = self.plan.memory
        found = [
            f"dry run of {self.plan.ranks:,} ranks: {len(self.roles)} role(s), {self.plan.parameters:,} parameters found, "
            f"{self.seconds:.0f} s, {self.peak_bytes / 2**30:.2f} GiB",
            f"  {'role':28} {'ranks':>8} {'layers':>6} {'parameters':>14} {'weights':>10} {'gradients':>10} {'optimizer':>10} {'sends':>11}",
        ]
        for role in self.roles:
            sizes = " ".join(f"{gib(size):>10}" for size in (role.weights, role.gradients, role.optimizer))
            found.append(
                f"  {role.name:28} {role.ranks:>8,} {role.layers:>6} {role.parameters:>14,} {sizes} {gib(sum(role.sent.values())):>11}"
            )
        sizes = " ".join(f"{gib(size):>10}" for size in (estimate.weights, estimate.gradients, estimate.optimizer))
        found.append(f"  {'the plan, of the fullest':28} {'':>8} {'':>6} {'':>14} {sizes}")
        most = max(self.roles, key=lambda role: sum(role.sent.values()))
        counted = "a step" if self.plan.mesh.pipeline > 1 else "a step of one microbatch"
        found.append(f"  in {counted}, {most.name} (the loss in chunks as on a CPU; on a GPU fewer, of the same bytes):")
        for kind, count in most.calls.items():
            found.append(f"    {kind:32} {count:>10,} calls {gib(most.sent[kind]):>14} sent")
        return found

    def json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {
            "ranks": self.plan.ranks,
            "parameters": self.plan.parameters,
            "seconds": round(self.seconds, 1),
            "peak_bytes": self.peak_bytes,
            "roles": [vars(role) for role in self.roles],
        }


def dry_run(plan: Plan) -> DryRun:
    """Build and step every distinct role of a plan.

    Raises PlanError where one cannot be built or the roles together do not make the plan's parameters; for the deepspeed engine, and for models that run
    by transformers' code.
    """
    if plan.engine.name != "native" or not isinstance(plan.architecture, Architecture):
        raise PlanError('a dry run is of the native engine and our own decoders; set engine.name = "native", or plan without --dry-run')
    began, found, peak = time.monotonic(), [], 0
    arch, axes = plan.architecture, plan.mesh
    each = axes.stages or 1
    count = axes.pipeline * each
    cuts = layout.stages(arch, plan.sequence, count) if count > 1 else (range(arch.layers),)
    shards = (axes.shard or 1) * axes.context
    alike: dict[tuple[Any, ...], list[int]] = {}
    for rank in range(axes.pipeline):
        stages = layout.held(axes.schedule, rank, axes.pipeline, each) if count > 1 else (0,)
        shape = tuple((len(cuts[stage]), stage == 0, stage == count - 1) for stage in stages)
        alike.setdefault(shape if _uniform(arch) else (*shape, rank), []).append(rank)
    ends = (False, True) if shards > 1 else (False,)
    trials = [_Trial.of(plan, cuts, members, last=last, shards=shards) for members in alike.values() for last in ends]
    answers = iter(_answers(plan, [(trial.rank, size) for trial in trials for size in trial.sizes]))
    whole = 0
    for trial in trials:
        answered = [next(answers) for _ in trial.sizes]
        found.append(trial.role(plan, answered, shards))
        peak = max(peak, *(answer["peak_bytes"] for answer in answered))
        if trial.last == ends[-1]:
            whole += found[-1].whole * len(trial.members)
    whole -= arch.vocab * arch.hidden * (arch.tied and count > 1)  # the copy on the last stage
    if whole != plan.parameters:
        raise PlanError(
            f"the roles of the mesh hold {whole:,} parameters together, and the plan has {plan.parameters:,}; this is a mistake of ours: report it"
        )
    return DryRun(plan, tuple(found), time.monotonic() - began, peak)


def _uniform(arch: Architecture) -> bool:
    return not (arch.window_layers or arch.rope_layers or arch.moe_layers)


@dataclass(frozen=True)
class _Trial:
    """One role: the rank that stands for it, and the sizes in which it is built: two where layers are alike, of which all others follow."""

    members: list[int]  # ranks of the pipeline
    last: bool  # of the shards
    rank: int
    stages: tuple[int, ...]
    layers: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, cuts: tuple[range, ...], members: list[int], *, last: bool, shards: int) -> "_Trial":
        arch, axes = plan.architecture, plan.mesh
        assert isinstance(arch, Architecture)
        each, pipeline = axes.stages or 1, members[0]
        stages = layout.held(axes.schedule, pipeline, axes.pipeline, each) if axes.pipeline * each > 1 else (0,)
        sizes = (ALIKE - 1, ALIKE) if _uniform(arch) and min(len(cuts[stage]) for stage in stages) > ALIKE else (0,)
        rank = pipeline * (plan.ranks // axes.pipeline) + (shards - 1) * axes.tensor * last  # the last of `outer`, `expert` and `context`
        return cls(members, last, rank, stages, sum(len(cuts[stage]) for stage in stages), sizes)

    def role(self, plan: Plan, answers: list[dict[str, Any]], shards: int) -> Role:
        axes, stages = plan.mesh, len(self.stages)
        more = self.layers - self.sizes[-1] * stages if len(self.sizes) == 2 else 0

        def full(one: dict[str, Any], key: str, kind: str | None = None) -> int:
            values = [answer[key] if kind is None else answer[key].get(kind, 0) for answer in answers]
            step = values[-1] - values[0]
            assert step % stages == 0, (key, kind, values)
            return values[-1] + more * step // stages

        one = answers[-1]
        name = f"pipeline {_span(self.members)}, " if axes.pipeline > 1 else ""
        where = "" if shards == 1 else "last shard" if self.last else f"shards 0 to {shards - 2}" if shards > 2 else "shard 0"
        numbers = {key: full(one, key) for key in ("parameters", "whole", "weights", "gradients", "optimizer")}
        return Role(
            name=(name + where).rstrip(", ") or "every rank",
            ranks=len(self.members) * axes.replicate * axes.tensor * (1 if self.last or shards == 1 else shards - 1),
            layers=self.layers,
            calls={kind: full(one, "calls", kind) for kind in one["calls"]},
            sent={kind: full(one, "sent", kind) for kind in one["sent"]},
            **numbers,
        )


def _answers(plan: Plan, tries: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """What `_played` says of each (rank, size). Raises PlanError for one that cannot be built."""
    job = json.dumps({"plan": plan.text(), "tries": tries})
    done = subprocess.run([sys.executable, "-m", "gigatrain.planning.dryrun"], input=job, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        said = done.stderr.strip().splitlines()
        rank = tries[len(found)][0]
        raise PlanError(f"rank {rank} of {plan.ranks} cannot be built: {said[-1] if said else f'exit code {done.returncode}'}")
    assert len(found) == len(tries), done.stdout
    return found


def _span(members: list[int]) -> str:
    return (
        str(members[0])
        if len(members) == 1
        else f"{members[0]} to {members[-1]}"
        if members == list(range(members[0], members[-1] + 1))
        else ",".join(map(str, members))
    )


# ---- Within a role's process ----


def _play(job: dict[str, Any]) -> int:
    """A line of JSON for each of the job's tries, each in a process of its own; the exit code of the first that fails."""
    import gigatrain.engines.native  # noqa: F401 - once for all

    for rank, size in job["tries"]:
        child = os.fork()
        if not child:
            try:
                print(json.dumps(_played(job["plan"], rank, size)), flush=True)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            return code if code > 0 else 128 - code
    return 0


def _played(text: str, rank: int, size: int) -> dict[str, Any]:
    """Build the engine of one rank, make a step on fake tensors, and tell what there was."""
    import torch
    from torch import distributed
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from gigatrain.data.loader import Batch, Microbatch
    from gigatrain.engines.native import Native
    from gigatrain.optim.adamw import AdamW
    from gigatrain.parallel import shard
    from gigatrain.parallel.mesh import Mesh

    plan = Plan.model_validate_json(text)
    arch = plan.architecture
    count = plan.mesh.pipeline * (plan.mesh.stages or 1)
    cuts = None
    if size:
        arch = arch.model_copy(update={"layers": size * count})
        cuts = tuple(range(size * stage, size * (stage + 1)) for stage in range(count))
    kernels = tuple(Choice(op=choice.op, kernel=_plain(choice), why="dry run") for choice in plan.kernels)
    # A dry run's optimizer is AdamW's: Muon's rounds are planned from all ranks' boxes, which nobody sends here.
    optim = plan.optim.model_copy(update={"name": "adamw"})
    plan = plan.model_copy(update={"architecture": arch, "kernels": kernels, "device": "cpu", "compile": False, "optim": optim})
    # Released gradients are gone when they are counted, and are those of one process, where nothing is sent.
    fusions = tuple(fusion.model_copy(update={"on": fusion.on and fusion.name != "release"}) for fusion in plan.fusions)
    plan = plan.model_copy(update={"fusions": fusions})
    plan = plan.model_copy(update={"engine": plan.engine.model_copy(update={"async_tensor": False, "offload": False})})
    distributed.init_process_group("fake", rank=rank, world_size=plan.ranks, store=FakeStore())
    _unasked()
    mesh = Mesh(plan.mesh, rank)
    record = _recorder()
    engine = Native(plan, mesh, torch.device("cpu"), fresh=False, cuts=cuts, around=FakeTensorMode(allow_non_fake_inputs=True))
    with engine.around:
        tokens = torch.zeros(plan.microbatch, plan.sequence, dtype=torch.int64)
        at = torch.arange(plan.sequence).expand(plan.microbatch, plan.sequence)
        part = Microbatch(tokens, tokens, at, None)
        parts = (part,) * (1 if plan.mesh.pipeline == 1 else plan.accumulation)
        batch = Batch(parts, plan.microbatch * plan.sequence, plan.tokens_per_step, range(plan.batch))
        with record:
            engine.forward_backward(batch)
            engine.step(1.0)

    def size_of(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    held = [engine._box(name, group.grads.views[name]) for group in engine.groups for name in group.grads.views]
    buckets = [group.bucket for group in engine.groups if isinstance(group, AdamW)]
    states = [
        tensor
        for bucket in buckets
        for key, tensor in vars(bucket).items()
        if tensor is not None and key not in ("weight", "copy", "updates", "seed")
    ]
    masters = (
        size_of(bucket.weight for bucket in buckets) if plan.compute == "bf16" and plan.optim.master == "fp32" and not engine.sharded else 0
    )
    weights = size_of(bucket.weight for bucket in buckets)
    whole = sum(math.prod(engine.places[name].shape) for name in engine.grads)
    if plan.adapter is not None:  # of the base, each of whose weights counts once in whatever form
        from gigatrain.models.adapters import base_shapes

        whole = sum(math.prod(shape) for shape in base_shapes(engine.model).values())
    frozen = size_of(shard.local(one) for one in engine.frozen.values())
    return {
        "parameters": sum(tensor.numel() for tensor in held),
        "whole": whole,
        "weights": (weights // 2 if masters else weights) + frozen,
        # The sums, and a microbatch's own beside them, but of what its product adds to the sum.
        "gradients": size_of(group.grads.buffer for group in engine.groups)
        + size_of(shard.local(one) for name, one in engine.parameters.items() if name not in engine._sums),
        "optimizer": size_of(states) + masters,
        "calls": dict(record.calls),
        "sent": dict(record.sent),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }


def _unasked() -> None:
    """Ranks of a pipeline greet each other before the first step (torch 2.13), and read the answer, which here nobody gives."""
    from types import SimpleNamespace

    from torch.distributed.pipelining import PipelineStage

    setattr(PipelineStage, "_warmup_forward_vote", lambda stage, backward, received_acc=None: None)  # noqa: B010 - not in torch 2.11
    setattr(PipelineStage, "_warmup_backward_result", lambda stage, received_result=None: SimpleNamespace(item=lambda: 1))  # noqa: B010


def _plain(choice: Choice) -> str:
    """An implementation that runs without a GPU and exchanges what the chosen one does."""
    kept = {"attention": "sdpa", "linear_cross_entropy": "chunked", "adamw": "reference"}.get(choice.op)
    return kept or next(name for name in IMPLEMENTATIONS[choice.op] if name not in TRITON)


def _recorder() -> Any:
    """Counts collectives by kind and size of the group, and what a rank sends in each."""
    import torch
    from torch import distributed
    from torch.utils._python_dispatch import TorchDispatchMode

    def group_of(args: Any, name: str) -> int:
        for arg in args:
            if isinstance(arg, distributed.ProcessGroup):
                return arg.size()
            if isinstance(arg, torch.ScriptObject):
                return distributed.ProcessGroup.unbox(arg).size()
        if isinstance(args[-1], str):
            return distributed.distributed_c10d._resolve_process_group(args[-1]).size()
        raise AssertionError(name)

    def largest(arg: Any) -> int:
        if isinstance(arg, torch.Tensor):
            return arg.numel() * arg.element_size()
        return sum(largest(one) for one in arg) if isinstance(arg, (list, tuple)) else 0

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: Counter[str] = Counter()
            self.sent: Counter[str] = Counter()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace in ("c10d", "_c10d_functional"):
                name = func.__name__.split(".")[0].replace("_", "")
                kind = next((kind for kind in RING if kind in name), None)
                if kind is not None:
                    ranks = group_of(args, name)
                    key = f"{kind} over {ranks}"
                    count = max(largest(arg) for arg in args)
                    if kind == "allgather" and func.namespace == "_c10d_functional":
                        count *= ranks
                    self.calls[key] += 1
                    self.sent[key] += count if kind in ("send", "broadcast") else int(RING[kind] * count * (ranks - 1) // ranks)
            return func(*args, **(kwargs or {}))

    return Recorder()


if __name__ == "__main__":
    sys.exit(_play(json.load(sys.stdin)))
