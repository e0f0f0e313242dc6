"""Every operation's versions beside their peers, right first and then fast: `gigatrain bench kernels`.

A worker process measures one operation after another; the process that started it writes the rows, so that a peer which hangs, or breaks the device for
its whole process, costs its own row and no other. How the rows of one size come about:

    random inputs; plain torch in fp64 says what is right, and every provider's error is taken before its time
    as many copies of the inputs as hold three times what the last cache does, and outputs kept as long: a call finds its data in memory, not in the cache
    forward, backward of outputs made before, and full: both in one. On a GPU a CUDA graph of calls is replayed, and the host makes the same calls without
    rounds in which every provider has its turn; a row has the median and the 20th and 80th percentile of the rounds
    the floor: bytes and FLOPs that the operation cannot do without, at this device's own copy and matrix product, measured beside it
"""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch._functorch import config as functorch

from gigatrain.bench import measure, peers, report
from gigatrain.bench.measure import Calls, Device, Errors
from gigatrain.bench.report import OK, Row
from gigatrain.errors import KernelError, RunError
from gigatrain.kernels import launch, ops
from gigatrain.kernels.launch import Operation, Traffic

MODES = ("forward", "backward", "full")
Case = tuple[Any, ...]
SEEDS = 3
MORE_SEEDS = 16  # where small tensors alone are beyond what is allowed: a few numbers say more about luck than about code
ALLOWED = 2.0  # times plain torch's error: what the tests allow ours
WRONG = 30.0  # times plain torch's error: another function, not a coarser one; it gets no time
FAR = 0.3  # relative error that is wrong where no ratio says so: of a few numbers, or of what has no fp64 to compare with
AWAITS = "awaits a GPU"
LATE = "not measured: "
REFUSES = "refuses: "
WARM = "not cold, the cache may hold a part of the inputs"
GRACE_S = 45.0  # beyond its budget, before an operation's worker is taken to hang
SILENCE_S = 120.0  # between two messages of a worker: one first call, compilation included, takes no longer


@dataclass(frozen=True)
class Settings:
    """How long to measure. `slice_s`: what is timed as one; `limit_s`: all rounds of a mode; `call_s`: plain torch forward and backward, on a CPU."""

    name: str
    rounds: int
    slice_s: float
    limit_s: float
    call_s: float
    sizes: int
    compiled: bool
    total_s: float


# Every operation has its share of the total, by its number of sizes, and is stopped there: an H200 is done in less than nine minutes whatever peers do.
FULL = Settings("full", rounds=15, slice_s=0.003, limit_s=4.0, call_s=0.1, sizes=100, compiled=True, total_s=480.0)
QUICK = Settings("quick", rounds=7, slice_s=0.002, limit_s=1.0, call_s=0.02, sizes=1, compiled=False, total_s=240.0)


@dataclass
class Provider:
    """Somebody's version of an operation: `make` imports it, `failed` is why it is out."""

    name: str
    make: Callable[[], Callable[..., Any]]
    package: str = "torch"
    note: str = ""
    gpu: bool = False
    overwrites: bool = False
    checked: bool = True
    failed: str | None = None
    function: Callable[..., Any] | None = field(default=None, repr=False)
    first_call_s: float | None = None
    error: float | None = None
    error_ratio: float | None = None


class Broken(Exception):
    """The device no longer works in this process; `provider` was at work."""

    def __init__(self, provider: str, why: str) -> None:
        super().__init__(why)
        self.provider = provider


def providers(op: str, chosen: Sequence[str], compiled: bool) -> list[Provider]:
    """Ours, then the chosen peers: plain torch, torch.compile of it, and the adapters."""
    versions = ops.OPERATIONS[op].versions
    reference = versions["reference"]

    def made(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
        return lambda: function

    found = [
        Provider(f"gigatrain {name}", made(function), "gigatrain", gpu=name in ("fused", "glued"))
        for name, function in versions.items()
        if name != "reference"
    ]
    if "torch" in chosen:
        found.append(Provider("torch", made(reference)))
    if "compile" in chosen and compiled:

        def plain(*inputs: Any, **options: Any) -> Any:  # some versions are partial applications, which the compiler does not take
            return reference(*inputs, **options)

        found.append(Provider("compile", lambda: torch.compile(plain, dynamic=False)))
    for one in peers.of(op):
        if one.peer in chosen:
            found.append(Provider(one.peer, one.make, one.package, one.note, gpu=one.gpu, overwrites=one.overwrites, checked=one.checked))
    return found


def label(case: Sequence[Any]) -> str:
    """A case in words: (8192, (4096,), "llama", bf16) is `8192 4096 llama bfloat16`."""
    return " ".join("x".join(map(str, n)) if isinstance(n, tuple) else str(n).removeprefix("torch.") for n in case)


def smaller(case: Case) -> Case | None:
    """The case with less to do: half the count, and where that is down to 64 half the largest other number; None: it is as small as it gets."""
    if case[0] > 64:
        return (case[0] // 2, *case[1:])
    numbers = [index for index, n in enumerate(case) if index and isinstance(n, int) and not isinstance(n, bool)]
    largest = max(numbers, key=lambda index: case[index], default=None)
    if largest is not None and case[largest] > 64:
        return (*case[:largest], case[largest] // 2, *case[largest + 1 :])
    return (case[0] // 2, *case[1:]) if case[0] > 1 else None


def counted(traffic: Traffic, mode: str) -> tuple[float, float]:
    """Bytes and FLOPs of a mode."""
    forward, backward = (traffic.forward_bytes, traffic.forward_flops), (traffic.backward_bytes, traffic.backward_flops)
    match mode:
        case "forward":
            return forward
        case "backward":
            return backward
    return forward[0] + backward[0], forward[1] + backward[1]


class Exact:
    """Inputs of a case, what plain torch makes of them, and what is right: plain torch in fp64; or `why` that cannot be had."""

    def __init__(self, operation: Operation, case: Case, on: Device, seed: int = 0, *, fp64: bool = True) -> None:
        reference = operation.versions["reference"]
        self.differentiable, self.why = operation.differentiable, ""
        self.grads, self.plain, self.expected = [], [], []
        with measure.seeded(seed):
            self.tensors, self.call = operation.sample(case, on.kind)
            try:
                with torch.no_grad():
                    probe = measure.listed(self.call(reference, *measure.leaves(self.tensors, False)))
                self.grads = [torch.randn(o.shape, dtype=torch.float64, device=o.device) for o in probe]
                del probe
                if fp64:
                    self.plain, self.expected = self.outcome(reference), self.outcome(reference, torch.float64)
            except (torch.OutOfMemoryError, MemoryError):
                self.why = "no memory for plain torch in fp64, so no errors"

    def outcome(self, function: Callable[..., Any], dtype: torch.dtype | None = None) -> list[Tensor]:
        """All that `function` makes of the inputs."""
        return measure.outcome(self.call, function, self.tensors, self.grads, self.differentiable, dtype)


class Runner:
    """One provider made ready for one mode: inputs in rotation, calls, and on a GPU their graph; `why` there is no graph."""

    def __init__(
        self,
        on: Device,
        settings: Settings,
        mode: str,
        provider: Provider,
        tensors: Sequence[Tensor],
        call: Callable[..., Any],
        shared: list[list[Tensor]],
        grads: dict[Any, list[Tensor]],
    ) -> None:
        function, differentiable = provider.function, any(x.requires_grad for x in shared[0])
        self.provider, self.on = provider, on
        inputs = [measure.leaves(tensors, differentiable) for _ in shared] if provider.overwrites else shared
        self.fresh = [(x, source) for xs in inputs for x, source in zip(xs, tensors, strict=True)] if provider.overwrites else []
        outputs: list[Any] = []
        moved = measure.size(tensors)
        if mode != "forward":
            held = on.peak_bytes(lambda: outputs.append(call(function, *inputs[0])))
            kinds = tuple((tuple(o.shape), o.dtype) for o in measure.listed(outputs[0]))
            if kinds not in grads:  # the same for all whose outputs are alike
                with measure.seeded(2):
                    grads[kinds] = [torch.randn(shape, device=on.kind).to(dtype) for shape, dtype in kinds]
            source = grads[kinds]
            moved += measure.size(source)
            if mode == "backward":  # finds cold what its forward saved, too; making a hundred of those takes a CPU long
                moved += held
                inputs = inputs[: max(4, int(settings.limit_s / on.seconds(lambda: call(function, *inputs[0]), 1)))]
            inputs = inputs[: measure.sets(moved, on.cache_bytes, on.free_bytes())]
            weights = [[g.clone() for g in source] for _ in inputs]
            if provider.overwrites:
                self.fresh += [(g, first) for gs in weights for g, first in zip(gs, source, strict=True)]
        match mode:
            case "forward":
                made = Calls(lambda i: call(function, *inputs[i]), len(inputs))
            case "full":
                outputs.clear()

                def both(i: int) -> Any:
                    found = call(function, *inputs[i])
                    return found, measure.gradients(found, inputs[i], weights[i])

                made = Calls(both, len(inputs))
            case _:
                outputs += [call(function, *xs) for xs in inputs[1:]]
                made = Calls(lambda i: measure.gradients(outputs[i], inputs[i], weights[i], retain_graph=True), len(inputs))
        self.calls, self.sets, self.cold = made, len(inputs), moved * len(inputs) >= measure.COLD * on.cache_bytes
        made()
        self.refresh()
        self.peak_bytes = on.peak_bytes(lambda: made.call(0))
        seconds = on.seconds(made, 1)
        self.count = measure.repeats(seconds, settings.slice_s, self.sets if on.kind == "cuda" else 1, on.most_calls)
        graph = on.graph(made, self.count)
        self.graph, self.why = (None, graph) if isinstance(graph, str) else (graph, "")
        self.slice_s = seconds * self.count * (2 if self.graph else 1)
        made.forget()

    def refresh(self) -> None:
        """Put random data back where this provider writes over it; beside autograd, which would take the saved tensors for stale."""
        for x, source in self.fresh:
            x.data.copy_(source)

    def timed(self, by_graph: bool) -> float:
        """Seconds per call of one slice; nan once the provider has failed."""
        if not self.provider.failed:
            self.refresh()
            try:
                if by_graph and self.graph:
                    return self.graph()
                seconds = self.on.seconds(self.calls, self.count)
                self.calls.forget()
                return seconds
            except Exception as failure:
                if not self.on.sound():
                    raise Broken(self.provider.name, measure.reason(failure)) from failure
                self.provider.failed = measure.reason(failure)
        return math.nan


class Bench:
    """Measures operations on one device; what it is at goes to `tell`."""

    def __init__(self, on: Device, settings: Settings, tell: Callable[..., None]) -> None:
        self.on, self.settings, self.tell = on, settings, tell
        self.ceilings = (math.nan, math.nan)

    def operation(
        self, op: str, chosen: Sequence[str], without: dict[str, str], done: Sequence[str], budget_s: float
    ) -> Iterator[list[Row]]:
        """The rows of its cases, then of one size after another; `done` is left out, and so are the providers of `without`, with their reasons."""
        began, operation = time.monotonic(), ops.OPERATIONS[op]

        def everyone(names: Sequence[str], compiled: bool, *, interpreted: bool) -> list[Provider]:
            found = providers(op, names, compiled)
            for provider in found:
                provider.failed = without.get(provider.name)
                if provider.gpu and self.on.kind == "cpu" and not interpreted:
                    provider.failed = provider.failed or AWAITS
            return found

        if "cases" not in done:
            found = everyone((), False, interpreted=launch.INTERPRETED)
            yield self.rows(op, "", "cases", found, functools.partial(self.cases, op, found, began + 0.2 * budget_s))
        if operation.sizes:
            self.ceilings = measure.ceilings(self.on)
        for size in operation.sizes[: self.settings.sizes]:
            if label(size) in done:
                continue
            found = everyone(chosen, self.settings.compiled, interpreted=False)  # an interpreter's time says nothing
            if time.monotonic() - began > budget_s:
                yield self.failures(op, label(size), "", found, f"{LATE}the {budget_s:.0f} s of {op} were over")
            else:
                yield self.rows(op, label(size), "", found, functools.partial(self.size, op, size, found))

    def rows(self, op: str, size: str, mode: str, everyone: list[Provider], measured: Callable[[], list[Row]]) -> list[Row]:
        """Those of `measured`; or, where the operation itself fails, in its sample or in plain torch, a row per provider that says so."""
        try:
            return measured()
        except Broken:
            raise
        except Exception as failure:
            if not self.on.sound():
                raise Broken("torch", measure.reason(failure)) from failure
            return self.failures(op, size, mode, everyone, measure.reason(failure))
        finally:
            torch.compiler.reset()
            self.on.forget()

    def cases(self, op: str, everyone: list[Provider], deadline: float) -> list[Row]:
        """A row per version of ours: its error over the operation's cases, as many as there is time for."""
        operation = ops.OPERATIONS[op]
        errors: dict[str, Errors] = defaultdict(Errors)
        taken, refused = defaultdict(set), {}
        order = list(range(len(operation.cases)))
        random.Random(0).shuffle(order)
        small: set[int] = set()
        whole = True  # all cases were taken as often as a verdict on a few numbers needs
        for seed in range(MORE_SEEDS):
            if seed >= SEEDS and not any(errors[p.name].ratio() > ALLOWED >= errors[p.name].ratio(pooled=False) for p in everyone):
                break
            for index in order if seed < SEEDS else small:
                if time.monotonic() > deadline or all(provider.failed for provider in everyone):
                    whole = False
                    break
                where = f"{op} case {label(operation.cases[index])}"
                self.tell("doing", "", where)
                exact = Exact(operation, operation.cases[index], self.on, seed)
                small |= {index} if any(p.numel() < 64 for p in exact.plain) else set()
                narrow = operation.cases[index][-1] != torch.float32
                for provider in everyone:
                    if launch.INTERPRETED and self.on.kind == "cpu" and provider.gpu and narrow:
                        continue  # Triton's own interpreter truncates to bf16 where a GPU rounds (tests/interpreter.py corrects it)
                    if not provider.failed:
                        with self.guarded(provider, where):
                            try:
                                result = exact.outcome(provider.make())
                            except KernelError as refusal:  # a version need not take every case
                                refused[provider.name] = f"{REFUSES}{refusal}"
                                continue
                            errors[provider.name].add(exact.expected, exact.plain, result, label(operation.cases[index]))
                            taken[provider.name].add(index)
        for provider in everyone:
            if not provider.failed and taken[provider.name]:
                _judge(provider, errors[provider.name], ALLOWED, pooled=whole)
            else:
                provider.failed = provider.failed or refused.get(provider.name) or f"{LATE}no time for a case"
        return [self.row(op, f"{len(taken[provider.name])} of {len(order)} cases", None, "cases", provider) for provider in everyone]

    def size(self, op: str, size: Case, everyone: list[Provider]) -> list[Row]:
        """All rows of one size."""
        operation = ops.OPERATIONS[op]
        with torch.set_grad_enabled(operation.differentiable):
            case = self.fitted(operation, size)
            if case is None:
                return self.failures(op, label(size), "", everyone, f"{LATE}too much for this CPU, however the size is cut")
            self.errors(op, operation, case, everyone)
            cut_from = label(size) if case != size else None
            rows = [self.row(op, label(case), cut_from, "", provider) for provider in everyone if provider.failed]
            with measure.seeded(1):
                tensors, call = operation.sample(case, self.on.kind)
            count = measure.sets(measure.size(tensors), self.on.cache_bytes, self.on.free_bytes())
            inputs = [measure.leaves(tensors, operation.differentiable) for _ in range(count)]
            grads: dict[Any, list[Tensor]] = {}
            for mode in MODES if operation.differentiable else MODES[:1]:
                alive = [replace(provider) for provider in everyone if not provider.failed]
                rows += self.mode(op, case, cut_from, mode, alive, tensors, call, inputs, grads)
        return rows

    def fitted(self, operation: Operation, size: Case) -> Case | None:
        """The size itself on a GPU; on a CPU it is cut until plain torch takes about `call_s` and fits into memory."""
        if self.on.kind != "cpu":
            return size
        case: Case | None = size
        while case is not None:
            moved, flops = counted(operation.traffic(case), "full")
            if 4 * max(moved / self.ceilings[0], flops / self.ceilings[1]) <= self.settings.call_s and 32 * moved <= self.on.free_bytes():
                with measure.seeded(0):
                    tensors, call = operation.sample(case, "cpu")
                inputs = measure.leaves(tensors, operation.differentiable)

                def plain(call: Any = call, inputs: list[Tensor] = inputs) -> None:
                    outputs = measure.listed(call(operation.versions["reference"], *inputs))
                    measure.gradients(outputs, inputs, [torch.ones_like(o) for o in outputs])

                if min(self.on.seconds(plain, 1) for _ in range(2)) <= 2 * self.settings.call_s:
                    return case
            case = smaller(case)
        return None

    def errors(self, op: str, operation: Operation, case: Case, everyone: list[Provider]) -> None:
        """Import and call every provider once and take its error; who fails, or is wrong, is out."""
        exact = Exact(operation, case, self.on)
        for provider in everyone:
            if provider.failed:
                continue
            with self.guarded(provider, f"{op} {label(case)}"):
                began = time.monotonic()
                provider.function = provider.make()
                if exact.why or not provider.checked:
                    exact.call(provider.function, *measure.leaves(exact.tensors, operation.differentiable))
                    provider.note = "; ".join(filter(None, (provider.note, exact.why)))
                    provider.first_call_s = time.monotonic() - began
                    continue
                result = exact.outcome(provider.function)
                provider.first_call_s = time.monotonic() - began
                found = Errors()
                found.add(exact.expected, exact.plain, result)
                _judge(provider, found, WRONG, pooled=False)
        del exact
        self.on.forget()

    @contextlib.contextmanager
    def guarded(self, provider: Provider, what: str) -> Iterator[None]:
        """A failure in here is the provider's reason, whatever it is, as this is other people's code; but one that breaks the device ends the process."""
        self.tell("doing", provider.name, what)
        try:
            yield
        except Exception as failure:
            if not self.on.sound():
                raise Broken(provider.name, measure.reason(failure)) from failure
            if isinstance(failure, KernelError):
                provider.failed = f"{REFUSES}{failure}"
            elif isinstance(failure, ModuleNotFoundError):
                provider.failed = f"not installed ({failure}): pip install {provider.package}"
            else:
                provider.failed = measure.reason(failure)
            failure.__traceback__ = None  # its frames hold tensors
            self.on.forget()

    def mode(
        self,
        op: str,
        case: Case,
        cut_from: str | None,
        mode: str,
        everyone: list[Provider],
        tensors: Sequence[Tensor],
        call: Callable[..., Any],
        inputs: list[list[Tensor]],
        grads: dict[Any, list[Tensor]],
    ) -> list[Row]:
        """The rows of one mode: everybody is made ready, then all are timed in turn."""
        runners: dict[str, Runner] = {}
        before = self.on.state()
        for provider in everyone:
            with self.guarded(provider, f"{op} {label(case)} {mode}"):
                runners[provider.name] = Runner(self.on, self.settings, mode, provider, tensors, call, inputs, grads)
        once = sum(runner.slice_s for runner in runners.values())
        rounds = max(3, min(self.settings.rounds, int(self.settings.limit_s / max(once, 1e-9))))
        self.tell("doing", "", f"{op} {label(case)} {mode}, {rounds} rounds")
        # Replays first, all of them, and then the host's calls: one after the other within a round, a replay would find the host's data in the cache.
        by_graph, by_host = (
            measure.interleaved(
                {name: functools.partial(runner.timed, graph) for name, runner in runners.items() if runner.graph or not graph}, rounds
            )
            for graph in (True, False)
        )
        state = {f"{name}_before": value for name, value in before.items()} | {f"{name}_after": v for name, v in self.on.state().items()}
        gpu = self.on.kind == "cuda"
        rows = []
        for provider in everyone:
            row = self.row(op, label(case), cut_from, mode, provider)
            if not provider.failed:
                runner = runners[provider.name]
                own, plain = (by_graph.get(name) or by_host.get(name) for name in (provider.name, "torch"))
                assert own is not None
                row |= state | self.figures(ops.OPERATIONS[op].traffic(case), mode, measure.spread(own)[0])
                row |= _spread_us("", own) | (_spread_us("host_", by_host[provider.name]) if gpu else {})
                row |= {
                    "timed_by": "graph" if runner.graph else "events" if gpu else "perf_counter",
                    "calls": runner.count,
                    "sets": runner.sets,
                    "rounds": rounds,
                    "peak_mib": runner.peak_bytes / 2**20,
                    "ratio_to_torch": measure.spread([a / b for a, b in zip(plain, own, strict=True)])[0] if plain else None,
                }
                notes = [provider.note, f"no graph: {runner.why}" if gpu and runner.why else "", "" if runner.cold else WARM]
                if mode == "backward" and (row["pct"] or 0) > 120 and "compare full" not in provider.note:
                    notes.append("below its floor: the gradients are made in the forward, compare full")
                row["note"] = "; ".join(filter(None, notes)) or None
            rows.append(row)
        return rows

    def figures(self, traffic: Traffic, mode: str, seconds: float) -> Row:
        """What the floor says of a time."""
        moved, flops = counted(traffic, mode)
        floor, bound = measure.floor_s(moved, flops, *self.ceilings)
        known = {"ceiling_gb_s": self.ceilings[0] / 1e9, "ceiling_tflop_s": self.ceilings[1] / 1e12}
        if not bound:
            return known
        return known | {
            "bytes": moved,
            "flops": flops,
            "floor_us": 1e6 * floor,
            "bound": bound,
            "gb_s": moved / seconds / 1e9,
            "tflop_s": flops / seconds / 1e12 if flops else None,
            "pct": 100 * floor / seconds,
        }

    def failures(self, op: str, size: str, mode: str, everyone: list[Provider], why: str) -> list[Row]:
        """A row per provider that says why nobody was measured."""
        for provider in everyone:
            provider.failed = provider.failed or why
        return [self.row(op, size, None, mode, provider) for provider in everyone]

    def row(self, op: str, size: str, cut_from: str | None, mode: str, provider: Provider) -> Row:
        """What is known of a provider before it is timed."""
        try:
            version = metadata.version(provider.package)
        except metadata.PackageNotFoundError:
            version = None
        return {
            "op": op,
            "size": size,
            "cut_from": cut_from,
            "mode": mode,
            "provider": provider.name,
            "version": version,
            "status": provider.failed or OK,
            "error": provider.error,
            "error_ratio": provider.error_ratio,
            "first_call_s": provider.first_call_s,
            "note": provider.note or None,
        }


def _judge(provider: Provider, errors: Errors, limit: float, *, pooled: bool) -> None:
    """Take a provider's errors; beyond the limit it has failed. Without pooling, what is too small for a ratio must at least be near."""
    provider.error = errors.largest
    provider.error_ratio = errors.ratio(pooled=pooled) if errors.judged else None
    if provider.error_ratio is not None and not provider.error_ratio <= limit:
        whose = errors.worst(pooled=pooled)[1]
        provider.failed = f"wrong result: relative error {provider.error:.2g}, {provider.error_ratio:.3g} times plain torch's ({whose})"
    elif not provider.error <= FAR and not (pooled and errors.judged):
        provider.failed = f"wrong result: off by {provider.error:.2g} of its size"


def _spread_us(prefix: str, seconds: Sequence[float]) -> Row:
    middle, low, high = measure.spread(seconds)
    return {f"{prefix}us": 1e6 * middle, f"{prefix}us_p20": 1e6 * low, f"{prefix}us_p80": 1e6 * high}


# ---- The worker, and the process that started it ----


def work(pipe: Connection, settings: Settings) -> None:
    """Measure what the pipe asks for until it closes."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts a CPU's memory announces itself
    os.dup2(2, 1)  # what peers print is not the command's output
    functorch.donated_buffer = False  # a backward alone is timed again and again on one graph of autograd, which donates nothing
    on = measure.device()
    pipe.send(("ready", on.name, on.kind, torch.get_num_threads()))
    bench = Bench(on, settings, lambda *message: pipe.send(message))
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt), on.scope():
        while True:
            job = pipe.recv()
            try:
                for rows in bench.operation(*job):
                    pipe.send(("rows", rows))
            except Broken as broken:
                pipe.send(("broken", broken.provider, str(broken)))
                return
            pipe.send(("done", on.whole))


class Worker:
    """A measuring process that can be lost."""

    def __init__(self, settings: Settings, start: str) -> None:
        context: Any = multiprocessing.get_context(start)
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=work, args=(far, settings))
        self.process.start()
        far.close()
        first = next(self.messages(time.monotonic() + 120))
        if first[0] != "ready":
            raise RunError(f"the measuring process did not start: {first[1]}")
        _, self.device, self.kind, self.threads = first

    def messages(self, deadline: float) -> Iterator[tuple[Any, ...]]:
        """What it says, until it is done; the last is ("lost", why) if it ends or the deadline passes."""
        while True:
            if not self.pipe.poll(max(0.0, min(SILENCE_S, deadline - time.monotonic()))):
                self.close()
                yield "lost", "it hung and was killed"
                return
            try:
                message = self.pipe.recv()
            except (EOFError, ConnectionResetError):
                self.process.join(5)
                yield "lost", f"its process ended with code {self.process.exitcode}"
                return
            yield message
            if message[0] in {"done", "broken"}:
                return

    def close(self) -> None:
        """End it, whatever it is at."""
        self.pipe.close()
        self.process.kill()
        self.process.join(10)


class Measurement:
    """Runs operations one by one in workers, each within its share of the time."""

    def __init__(self, settings: Settings, say: Callable[[str], None], start: str = "spawn", grace_s: float = GRACE_S) -> None:
        self.settings, self.say, self.start, self.grace_s = settings, say, start, grace_s
        self.worker = Worker(settings, start)

    def operation(self, op: str, chosen: Sequence[str], budget_s: float, there: Sequence[str] = ()) -> list[Row]:
        """All rows of an operation but those of the sizes that are `there`. Who takes the process down is left out at the next try, for that reason."""
        end = time.monotonic() + budget_s
        rows: list[Row] = []
        without: dict[str, str] = {}
        while True:
            done = sorted({*there, *map(_place, rows)})
            left = max(1.0, end - time.monotonic())
            self.worker.pipe.send((op, chosen, without, done, left))
            doing, lost = ("", op), None
            for message in self.worker.messages(time.monotonic() + left + self.grace_s):
                match message:
                    case ("doing", provider, what):
                        doing = (provider, what)
                    case ("rows", found):
                        rows += found
                        self.say(f"{op}: {_progress(found)}")
                    case ("done", whole):
                        if not whole:
                            self.renew()
                        return rows
                    case ("broken", provider, why):
                        lost = (provider, f"it broke the device: {why}")
                    case ("lost", why):
                        lost = (doing[0], f"{why} during {doing[1]}")
            assert lost is not None
            self.renew()
            provider, why = lost
            self.say(f"{op} {provider}: {why}")
            if not provider or provider in without:  # nobody's fault that one could name: the operation ends here
                return [*rows, {"op": op, "size": "", "mode": "", "provider": provider or "gigatrain", "status": f"lost: {why}"}]
            without[provider] = why
            end = time.monotonic() + budget_s / 2

    def renew(self) -> None:
        """Another process."""
        self.worker.close()
        self.worker = Worker(self.settings, self.start)


def _place(row: Row) -> str:
    """The size as the operation's SIZES have it, or `cases`."""
    return row["cut_from"] or row["size"] if row["mode"] != "cases" else "cases"


def _progress(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if row.get("us") is not None]
    where = timed[0]["size"] if timed else rows[0]["size"] if rows else ""
    return f"{where}, {len(timed)} timings" if timed else where


# ---- The command ----


def selected(names: Sequence[str]) -> list[str]:
    """The operations, all if none is named. RunError for one that does not exist."""
    if unknown := [name for name in names if name not in ops.OPERATIONS]:
        raise RunError(f"no operation is called {', '.join(unknown)}; there are {', '.join(ops.OPERATIONS)}")
    return list(names) or list(ops.OPERATIONS)


def chosen_peers(names: str | None) -> list[str]:
    """Those named, all if none is. RunError for one that does not exist."""
    found = names.split(",") if names else list(peers.PEERS)
    if unknown := [name for name in found if name not in peers.PEERS]:
        raise RunError(f"no peer is called {', '.join(unknown)}; there are {', '.join(peers.PEERS)}")
    return found


def timings(
    names: Sequence[str],
    chosen: Sequence[str],
    path: Path,
    *,
    settings: Settings,
    fresh: bool,
    say: Callable[[str], None],
    show: Callable[[str, list[Row]], None],
    start: str = "spawn",
    grace_s: float = GRACE_S,
) -> list[Row]:
    """Measure the operations and add their rows to the file, operation by operation; what this run's conditions already have there is taken from it."""
    began = time.monotonic()
    held = report.load(path)
    measurement = Measurement(settings, say, start, grace_s)
    everything: list[Row] = []
    try:
        worker = measurement.worker
        run = report.identity(worker.device, worker.threads, settings.name)
        say(f"{worker.device}, {worker.threads} threads, {run['versions']}, {run['commit']}; rows go to {path}")
        for place, op in enumerate(names):
            known = [] if fresh else report.of_run(held, run, op)
            known = [row for row in known if not row["status"].startswith(LATE)]  # there was no time for these; now there is
            if not {provider.name for provider in providers(op, chosen, settings.compiled)} <= {row["provider"] for row in known}:
                known = []  # who is compared is timed in the same rounds
            there = {_place(row) for row in known}
            everything += known
            operation = ops.OPERATIONS[op]
            if {*map(label, operation.sizes[: settings.sizes]), *(["cases"] if len(operation.versions) > 1 else [])} <= there:
                say(f"{op}: {len(known)} rows are there already (--fresh measures again)")
                show(op, known)
                continue
            weights = [1 + min(settings.sizes, len(ops.OPERATIONS[name].sizes)) for name in names[place:]]
            left = settings.total_s - (time.monotonic() - began)
            rows = measurement.operation(op, chosen, max(5.0, left * weights[0] / sum(weights)), sorted(there))
            rows = [report.stamped(row, run) for row in rows]
            report.append(path, rows)
            everything += rows
            show(op, known + rows)
    finally:
        measurement.worker.close()
    say(f"{len(everything)} rows in {time.monotonic() - began:.0f} s")
    return everything


def checks(names: Sequence[str], settings: Settings, show: Callable[[str, list[Row]], None]) -> list[Row]:
    """The errors of every version of ours over all cases, here and now."""
    on, everything = measure.device(), []
    bench = Bench(on, settings, lambda *_: None)
    run = report.identity(on.name, torch.get_num_threads(), "check")
    with on.scope():
        for op in names:
            everyone = providers(op, (), False)
            for provider in everyone:
                if provider.gpu and on.kind == "cpu" and not launch.INTERPRETED:
                    provider.failed = AWAITS
            rows = [report.stamped(row, run) for row in bench.cases(op, everyone, math.inf)]
            everything += rows
            show(op, rows)
    return everything


def awaiting(rows: Sequence[Row]) -> str | None:
    """What only a GPU can time, in a sentence; None: nothing."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if (row["status"] or "").startswith(AWAITS) and row["op"] not in found[row["provider"]]:
            found[row["provider"]].append(row["op"])
    if not any(found.values()):
        return None
    names = "; ".join(f"{provider} ({', '.join(names)})" for provider, names in found.items())
    return f"There is no GPU here, so fused kernels were not measured, and neither were peers that need one. What awaits one: {names}"


def verdict(rows: Sequence[Row]) -> None:
    """KernelError if a version of ours failed or was wrong, or if a fused one refused a size that is trained with."""
    bad = {
        f"{row['op']} {row['provider']}: {row['status']}"
        for row in rows
        if row["provider"].startswith("gigatrain")
        and not row["status"].startswith((OK, AWAITS, LATE))
        and (row["provider"] == "gigatrain fused" or not row["status"].startswith(REFUSES))
    }
    if bad:
        raise KernelError(f"{len(bad)} of ours failed: {'; '.join(sorted(bad))}")


def run(
    names: Sequence[str] = (),
    *,
    peers: str | None = None,
    check: bool = False,
    tune: bool = False,
    compiled: bool = False,
    path: str | None = None,
    plots: str | None = None,
    out: str | None = None,
    quick: bool = False,
    fresh: bool = False,
    as_json: bool = False,
) -> None:
    """The command: one of pictures, compiled resources, tuning, a check, or timings."""
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def show(op: str, rows: list[Row]) -> None:
        if not as_json:
            report.table(op, rows, console)

    if plots is not None:
        made = report.plots(Path(path) if path else report.default_path("kernels.csv"), Path(plots))
        console.print(*made, sep="\n")
        return
    wanted = selected(names)
    if compiled:
        from gigatrain.kernels import compiled as compiler

        where = path or (None if names else report.default_path("compiled.csv"))  # a part of the table does not go over the whole
        if where:
            Path(where).parent.mkdir(parents=True, exist_ok=True)
        compiler.main([*(["--csv", str(where)] if where else []), *(word for op in wanted for word in ("--op", op))])
        return
    if tune:
        from gigatrain.bench import tune as tuner

        tuner.tune(wanted, Path(out) if out else None, say, fresh=fresh)
        return
    settings = QUICK if quick else FULL
    if check:
        rows = checks(wanted, settings, show)
    else:
        where = Path(path) if path else report.default_path("kernels.csv")
        rows = timings(wanted, chosen_peers(peers), where, settings=settings, fresh=fresh, say=say, show=show)
    if as_json:
        print(json.dumps(rows))
    elif text := awaiting(rows):
        console.print(text, markup=False)
    verdict(rows)
