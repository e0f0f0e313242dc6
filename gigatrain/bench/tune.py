"""The fastest configuration of every kernel at every size, found on the GPU at hand and written to its table: `gigatrain bench kernels --tune`.

A size is what the kernel itself asks its table for (`launch.configuration`), heard while an operation runs at one of its SIZES. Every candidate of the
kernel file's SPACE must first give what the shipped configuration gives; it is then timed within its operation, cold, as a CUDA graph; the best few and
the shipped one are timed again in turns, and the shipped one stays unless another is faster by more than `GAIN`.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gigatrain.bench import kernels, measure, report
from gigatrain.bench.measure import Cuda
from gigatrain.errors import KernelError
from gigatrain.kernels import launch, ops
from gigatrain.kernels.launch import Operation

GAIN = 0.02  # less may be luck: within a minute the clock of a GPU moves by as much
FINALISTS = 5
ROUNDS = 15
SLICE_S = 0.002
Configuration = dict[str, int]


@dataclass(frozen=True)
class Target:
    """One kernel at one of the sizes that it asks its table for, and how to make it run: an operation's case, forward, backward or both."""

    kernel: str
    size: int
    op: str
    case: tuple[Any, ...]
    mode: str


def spaces() -> dict[str, list[Configuration]]:
    """The candidates of every kernel that has some."""
    return {kernel: candidates for module in ops.MODULES for kernel, candidates in getattr(module, "SPACE", {}).items()}


def targets(op: str, device: str) -> list[Target]:
    """What an operation asks the tables for, at its sizes; each (kernel, size) once."""
    operation, known = ops.OPERATIONS[op], spaces()
    found: dict[tuple[str, int], Target] = {}
    for case in operation.sizes:
        asked = heard(operation, case, device)
        for key in dict.fromkeys([*asked["forward"], *asked["backward"]]):
            mode = "forward" if key not in asked["backward"] else "backward" if key not in asked["forward"] else "full"
            if key[0] in known and key not in found:
                found[key] = Target(*key, op, case, mode)
    return list(found.values())


def heard(operation: Operation, case: tuple[Any, ...], device: str) -> dict[str, list[tuple[str, int]]]:
    """The (kernel, size) pairs that the fused version's forward and backward ask their configurations for."""
    tensors, call = operation.sample(case, device)
    inputs = measure.leaves(tensors, operation.differentiable)
    with torch.set_grad_enabled(operation.differentiable):
        with launch.observed() as forward:
            outputs = call(operation.versions["fused"], *inputs)
        with launch.observed() as backward:
            measure.gradients(outputs, inputs, [torch.ones_like(o) for o in measure.listed(outputs)])
    return {"forward": forward, "backward": backward}


def same(right: Sequence[Tensor], found: Sequence[Tensor]) -> str | None:
    """Why `found` is not what the shipped configuration makes; None: it is, within one rounding of the dtype."""
    for index, (a, b) in enumerate(zip(right, found, strict=True)):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"tensor {index} differs"
            continue
        size = float(a.double().norm()) or 1.0
        if not (error := float((b.double() - a.double()).norm()) / size) <= torch.finfo(a.dtype).eps:
            return f"tensor {index} is off by {error:.2g} of its size"
    return None


def select(
    screened: Mapping[str, float], timer: Callable[[str], Callable[[], float]], shipped: str, *, rounds: int = ROUNDS, gain: float = GAIN
) -> tuple[str, dict[str, float]]:
    """The fastest configuration by name, and its seconds and those of all that were in the final: the first few of the screening, and `shipped`."""
    best = sorted(screened, key=lambda name: screened[name])[:FINALISTS]
    finalists = {name: timer(name) for name in dict.fromkeys([shipped, *best])}
    seconds = {name: measure.spread(values)[0] for name, values in measure.interleaved(finalists, rounds).items()}
    first = min(seconds, key=lambda name: seconds[name])
    return first if seconds[first] < (1 - gain) * seconds[shipped] else shipped, seconds


def record(
    path: Path, kernel: str, size: int, configuration: Configuration, measured: Mapping[str, Any], served: Mapping[str, Any]
) -> None:
    """Put one configuration into a table, with the row of evidence; what else is there stays.

    A table is asked for the nearest size that it has, so a kernel that is new in it first takes over every size that `served` it until now.
    """
    held = json.loads(path.read_text()) if path.exists() else {"found": "", "configs": {}, "measured": {}}
    held["found"] = (
        "by `gigatrain bench kernels --tune` where `measured` says so; what is not there was taken over from the table that served before"
    )
    sizes = held["configs"].setdefault(kernel, dict(served))
    sizes[str(size)] = configuration
    held["configs"][kernel] = dict(sorted(sizes.items(), key=lambda item: int(item[0])))
    held.setdefault("measured", {}).setdefault(kernel, {})[str(size)] = dict(measured)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(written(held))
    fresh.replace(path)
    launch.table.cache_clear()
    launch._nearest.cache_clear()


def written(table: Mapping[str, Any]) -> str:
    """A table as JSON, one configuration per line."""

    def section(sizes: Mapping[str, Any]) -> str:
        return ",\n".join(f"      {json.dumps(size)}: {json.dumps(entry)}" for size, entry in sizes.items())

    parts = [f'  "found": {json.dumps(table["found"])}']
    for name in ("configs", "measured"):
        groups = ",\n".join(f"    {json.dumps(kernel)}: {{\n{section(sizes)}\n    }}" for kernel, sizes in table.get(name, {}).items())
        parts.append(f'  "{name}": {{\n{groups}\n  }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


class Tuner:
    """Times configurations of one operation's case on a GPU."""

    def __init__(self, on: Cuda, target: Target) -> None:
        self.on, self.target, self.operation = on, target, ops.OPERATIONS[target.op]
        with measure.seeded(0):
            self.exact = kernels.Exact(self.operation, target.case, on, fp64=False)
            count = measure.sets(measure.size(self.exact.tensors), on.cache_bytes, on.free_bytes())
            self.sets = [measure.leaves(self.exact.tensors, self.operation.differentiable) for _ in range(count)]

    def result(self, configuration: Configuration) -> list[Tensor]:
        """What the operation makes with it."""
        with launch.forced(self.target.kernel, configuration):
            return self.exact.outcome(self.operation.versions["fused"])

    def timer(self, configuration: Configuration) -> Callable[[], float]:
        """What times a slice with it, as a graph. KernelError where there is none."""
        settings = replace(kernels.FULL, slice_s=SLICE_S)
        function = self.operation.versions["fused"]
        provider = kernels.Provider("gigatrain fused", lambda: function, function=function)
        with launch.forced(self.target.kernel, configuration), torch.set_grad_enabled(self.operation.differentiable):
            runner = kernels.Runner(self.on, settings, self.target.mode, provider, self.exact.tensors, self.exact.call, self.sets, {})
        if runner.graph is None:
            raise KernelError(f"{self.target.op} cannot be tuned: {runner.why}")
        return functools.partial(runner.timed, True)

    def tune(self, candidates: Sequence[Configuration], say: Callable[[str], None]) -> tuple[Configuration, dict[str, Any]]:
        """The best of the candidates and the evidence. A candidate that does not compile, does not fit, or is wrong is said and left out."""
        target = self.target
        shipped = launch.configuration(self.exact.tensors[0], target.kernel, target.size)
        right = self.result(shipped)
        screened, refused = {}, 0
        for candidate in [shipped, *(other for other in candidates if other != shipped)]:
            try:
                if why := same(right, self.result(candidate)):
                    raise KernelError(why)
                timer = self.timer(candidate)
                screened[json.dumps(candidate)] = measure.spread([timer() for _ in range(3)])[0]
                del timer  # one at a time: forty of them would not fit (Liger-Kernel 1246)
            except Exception as failure:  # the compiler's, the launcher's for want of shared memory, the allocator's
                if not self.on.sound():
                    raise KernelError(
                        f"{target.kernel} at {target.size} with {candidate} broke the device; take it out of SPACE"
                    ) from failure
                if candidate == shipped:
                    raise
                refused += 1
                say(f"  {target.kernel} {target.size} {candidate}: {measure.reason(failure)}")
                self.on.forget()
        best, seconds = select(screened, lambda name: self.timer(json.loads(name)), json.dumps(shipped))
        before, now = seconds[json.dumps(shipped)], seconds[best]
        say(f"{target.kernel} {target.size}: {best}, {1e6 * now:.1f} us; shipped {json.dumps(shipped)} {1e6 * before:.1f} us")
        evidence = {
            "us": round(1e6 * now, 2),
            "before": shipped,
            "before_us": round(1e6 * before, 2),
            "tried": len(screened),
            "refused": refused,
        }
        return json.loads(best), evidence


def tune(names: Sequence[str], out: Path | None, say: Callable[[str], None], *, fresh: bool = False) -> Path:
    """Tune the operations' kernels and write each result as it is found; what the table has from these versions already is left (`fresh`: is not)."""
    if not torch.cuda.is_available():
        raise KernelError("tuning measures, and there is no GPU here; without one the configurations of tables/default.json are used")
    on = Cuda()
    path = out or launch.TABLES / f"{launch.slug(on.name)}.json"
    known, conditions = spaces(), {"versions": " ".join(f"{name}={version}" for name, version in report.versions().items())}
    with on.scope():
        for op in names:
            if "fused" not in ops.OPERATIONS[op].versions:
                continue
            for target in targets(op, on.kind):
                held = json.loads(path.read_text()).get("measured", {}) if path.exists() else {}
                before = held.get(target.kernel, {}).get(str(target.size), {})
                if not fresh and before.get("versions") == conditions["versions"]:
                    continue
                tuner = Tuner(on, target)
                configuration, evidence = tuner.tune(known[target.kernel], say)
                tables = (launch.table(name)["configs"].get(target.kernel) for name in (*launch.tables(tuner.exact.tensors[0]), "default"))
                measured = evidence | {"op": op, "mode": target.mode, "case": kernels.label(target.case)} | conditions
                measured |= {"date": time.strftime("%Y-%m-%d"), "commit": report.commit()} | on.state()
                record(path, target.kernel, target.size, configuration, measured, next(filter(None, tables)))
                del tuner
                on.forget()
    say(f"written: {path}")
    return path
