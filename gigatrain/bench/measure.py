"""How long a call takes, cold and honestly: rotated inputs, rounds in turn, CUDA graphs, the ceilings of the same device, and errors against fp64."""

import contextlib
import functools
import gc
import math
import os
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

COLD = 3  # inputs in rotation hold so many times what the last cache holds, so that none is found there again
MOST_SETS = 256
MOST_CALLS = 512  # of one CUDA graph


class Calls:
    """Calls one after another over a number of input sets; each result is kept until its set comes round, so that outputs rotate through memory too."""

    def __init__(self, call: Callable[[int], Any], sets: int) -> None:
        self.call, self.sets, self.next = call, sets, 0
        self.kept: list[Any] = [None] * sets

    def __call__(self) -> None:
        index = self.next
        self.next = (index + 1) % self.sets
        self.kept[index] = self.call(index)

    def forget(self) -> None:
        """Give the results' memory back."""
        self.kept = [None] * self.sets


class Cpu:
    """This machine's processor: wall time, and memory as torch's allocator counts it."""

    kind = "cpu"
    most_calls = 1 << 20
    whole = True

    def __init__(self) -> None:
        self.name = processor()
        self.cache_bytes = _last_cache_bytes()

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Everything measured happens within it."""
        return contextlib.nullcontext()

    def free_bytes(self) -> int:
        """Memory that may be taken."""
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def seconds(self, calls: Callable[[], Any], count: int) -> float:
        """Seconds per call of `count` calls, the host's part included."""
        began = time.perf_counter()
        for _ in range(count):
            calls()
        return (time.perf_counter() - began) / count

    def graph(self, calls: Callable[[], Any], count: int) -> Callable[[], float] | str:
        """What times a replay of `count` calls without the host, in seconds per call; or why there is none."""
        return "a CPU has no graphs"

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """The most memory that torch's allocator held during the call beyond what it held before."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            result = call()
        del result
        found = profiled.profiler
        assert found is not None
        assert found.kineto_results is not None
        events: list[Any] = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
        return int(max(np.cumsum([0, *(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))])))

    def state(self) -> dict[str, float]:
        """Clocks, power and temperature: none that a process without rights could read."""
        return {}

    def forget(self) -> None:
        """Give cached memory back."""
        gc.collect()

    def sound(self) -> bool:
        """The device still works."""
        return True


class Cuda:
    """The current GPU: time between events, on one stream, since a graph can only hold what ran on the stream that it captures."""

    kind = "cuda"
    most_calls = MOST_CALLS

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name, self.cache_bytes, self.uuid = properties.name, properties.L2_cache_size, getattr(properties, "uuid", None)
        self.stream = torch.cuda.Stream()
        self.whole = True  # False after a capture that broke off, which may leave the allocator between two states
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Everything measured happens within it."""
        return torch.cuda.stream(self.stream)

    def free_bytes(self) -> int:
        """Memory that may be taken."""
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def seconds(self, calls: Callable[[], Any], count: int) -> float:
        """Seconds per call of `count` calls between two events, launches by the host included."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            calls()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    def graph(self, calls: Callable[[], Any], count: int) -> Callable[[], float] | str:
        """What times a replay of `count` calls without the host, in seconds per call; or why there is none.

        Graphs share a pool of memory: they are replayed in turn, and nobody reads what they compute.
        """
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # found here a wait is an exception; found by the capture it would break that
        try:
            calls()
        except RuntimeError as failure:
            if "synchronizing" not in str(failure):
                raise
            return "it waits for the device within a call"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if (
            not self.graphs
        ):  # a pool whose last graph is gone, but not yet its memory, is refused by torch's allocator: an assertion of its own
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        graph.capture_begin(pool=self.pool)
        try:
            for _ in range(count):
                calls()
            graph.capture_end()
        except Exception as failure:
            self.whole = False
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            return f"no capture: {reason(failure)}"
        self.graphs.add(graph)
        graph.replay()
        return lambda: self.seconds(graph.replay, 1) / count

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """The most memory that torch's allocator held during the call beyond what it held before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    @functools.cached_property
    def _handle(self) -> Any:
        """NVML's handle of this GPU; None where NVML or its device cannot be had."""
        try:
            import pynvml

            pynvml.nvmlInit()
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{self.uuid}")
        except Exception:  # no package, no library, no rights, a MIG slice: a column stays empty
            return None

    def state(self) -> dict[str, float]:
        """Clocks in MHz, watts and degrees; what cannot be read is left out."""
        if self._handle is None:
            return {}
        import pynvml

        readings: dict[str, Callable[[], float]] = {
            "sm_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM),
            "mem_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_MEM),
            "watts": lambda: pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3,
            "celsius": lambda: pynvml.nvmlDeviceGetTemperature(self._handle, pynvml.NVML_TEMPERATURE_GPU),
        }
        found = {}
        for name, reading in readings.items():
            with contextlib.suppress(pynvml.NVMLError):
                found[name] = reading()
        return found

    def forget(self) -> None:
        """Give cached memory back, that of graphs which are gone too."""
        gc.collect()
        torch.cuda.synchronize()
        self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()

    def sound(self) -> bool:
        """The device still works: an illegal access, once made, fails every later call of the process."""
        try:
            torch.ones(8, device="cuda").sum()
            torch.cuda.synchronize()
        except Exception:
            return False
        return True


Device = Cpu | Cuda


def device() -> Device:
    """The GPU where there is one, else the CPU."""
    return Cuda() if torch.cuda.is_available() else Cpu()


def processor() -> str:
    """Its name as the system has it."""
    path = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
        if path.is_file()
        else []
    )
    return names[0] if names else "CPU"


def _last_cache_bytes() -> int:
    """Size of the largest cache that the system tells of; 32 MiB where it does not."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([int(text[:-1]) * units[text[-1]] for text in found if text[-1:] in units], default=32 << 20)


def reason(failure: BaseException) -> str:
    """An exception on one line, as a row has it."""
    if isinstance(failure, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0][:200]}" if lines else type(failure).__name__


def size(tensors: Iterable[Tensor]) -> int:
    """Their bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


def sets(bytes_per_set: float, cache_bytes: int, free_bytes: int) -> int:
    """How many input sets to rotate over: more than the cache holds `COLD` times, within a sixteenth of the free memory."""
    wanted = math.ceil(COLD * cache_bytes / max(1.0, bytes_per_set))
    return max(1, min(wanted, MOST_SETS, int(free_bytes / 16 / max(1.0, bytes_per_set))))


def repeats(seconds: float, target_s: float, least: int, most: int) -> int:
    """Calls that are timed together: as many as last about `target_s`, so that the clock's grain and one launch do not count."""
    return max(1, least, min(most, math.ceil(target_s / max(seconds, 1e-9))))


def rotated(names: Sequence[Any], turn: int) -> list[Any]:
    """The order of round `turn`: each in turn goes first."""
    turn %= max(1, len(names))
    return [*names[turn:], *names[:turn]]


def interleaved(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every timer in every round, one after another within a round: whatever drifts hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds):
        for name in rotated(list(timers), turn):
            found[name].append(timers[name]())
    return found


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    low, middle, high = np.percentile(values, [20, 50, 80]).tolist()
    return middle, low, high


def ceilings(on: Device) -> tuple[float, float]:
    """Bytes per second of a large copy, read and written, and FLOP/s of a large product, both of random data: the best that torch does here.

    The product is one of bf16; on a CPU the faster of bf16 and fp32, as many have no instructions for bf16.
    """
    largest, side = (1 << 31, 8192) if on.kind == "cuda" else (1 << 28, 1024)
    source = torch.empty(min(largest, on.free_bytes() // 8) // 2, device=on.kind, dtype=torch.bfloat16).normal_()
    copy = torch.empty_like(source)
    copied = _settled(on, functools.partial(copy.copy_, source))
    multiplied = math.inf
    for dtype in (torch.bfloat16,) if on.kind == "cuda" else (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=on.kind, dtype=dtype) for _ in range(2))
        multiplied = min(multiplied, _settled(on, functools.partial(torch.mm, a, b)))
    return 2 * source.numel() * source.element_size() / copied, 2 * side**3 / multiplied


def _settled(on: Device, call: Callable[[], Any]) -> float:
    """Median seconds of a call, after as many that nobody counts."""
    first = on.seconds(call, 2)
    count = repeats(first, 0.02, 1, 50)
    return spread([on.seconds(call, count) for _ in range(7)][2:])[0]


def floor_s(moved_bytes: float, flops: float, bytes_per_s: float, flops_per_s: float) -> tuple[float, str]:
    """The least time that moving and computing can take at the ceilings, and which of the two decides it; nan and nothing where neither is counted."""
    moving, computing = moved_bytes / bytes_per_s, flops / flops_per_s
    if max(moving, computing) == 0:
        return math.nan, ""
    return (computing, "flops") if computing > moving else (moving, "bytes")


# ---- Errors ----


def listed(outputs: Any) -> list[Tensor]:
    """The tensors of an operation's result."""
    return [o for o in (outputs if isinstance(outputs, tuple | list) else (outputs,)) if isinstance(o, Tensor)]


def leaves(tensors: Sequence[Tensor], differentiable: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies for one call to work on; floating ones take `dtype`, and a gradient where there is one to be had."""
    copies = [x.detach().clone().to(dtype if dtype and x.is_floating_point() else x.dtype) for x in tensors]
    return [x.requires_grad_(differentiable and x.is_floating_point()) for x in copies]


def gradients(outputs: Any, inputs: Sequence[Tensor], grads: Sequence[Tensor], **options: bool) -> tuple[Tensor | None, ...]:
    """Those of the inputs, with `grads` for the outputs that carry one."""
    carrying = [(o, g) for o, g in zip(listed(outputs), grads, strict=False) if o.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not carrying or not wanted:
        return ()
    return torch.autograd.grad(
        [o for o, _ in carrying], wanted, [g if g.dtype == o.dtype else g.to(o.dtype) for o, g in carrying], allow_unused=True, **options
    )


def outcome(
    call: Callable[..., Any],
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor],
    differentiable: bool,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """All that an operation makes of these tensors: outputs, then gradients; or, where there are none, the tensors afterwards, which it may have moved."""
    inputs = leaves(tensors, differentiable, dtype)
    with torch.set_grad_enabled(differentiable):
        outputs = call(function, *inputs)
    found = [o.detach() for o in listed(outputs)]
    if not differentiable:
        return [*found, *inputs]
    got = iter(gradients(outputs, inputs, grads))
    return found + [torch.zeros_like(x) if (g := next(got, None)) is None else g for x in inputs if x.requires_grad]


class Errors:
    """Squared relative errors of one implementation and of plain torch against fp64, tensor by tensor, over any number of cases.

    Tensors of fewer than 64 numbers, whose error says more about luck than about code, are pooled over the cases.
    """

    def __init__(self) -> None:
        self.ours, self.plain, self.rounding = (defaultdict(float) for _ in range(3))
        self.unjudged: list[float] = []  # of what is rounded by contract, so that fp64 is not exact either

    def add(self, expected: Sequence[Tensor], plain: Sequence[Tensor], ours: Sequence[Tensor], case: Any = None) -> None:
        """One case; raises ValueError if what came out has another shape than plain torch's."""
        sizes = [float(e.double().square().sum()) for e in expected]
        for index, (e, p, o) in enumerate(zip(expected, plain, ours, strict=True)):
            if o.shape != p.shape:
                raise ValueError(f"tensor {index} of the result has shape {tuple(o.shape)}, not {tuple(p.shape)}")
            if not o.is_floating_point():
                continue
            key = (index, p.dtype, case if o.numel() >= 64 else "small")
            size = sizes[index] or max(sizes) or 1.0  # what is exactly 0 is judged by its neighbours
            if e.dtype != torch.float64:
                self.unjudged.append(float((o.double() - e.double()).square().sum()) / size)
                continue
            self.ours[key] += float((o.double() - e).square().sum()) / size
            self.plain[key] += float((p.double() - e).square().sum()) / size
            self.rounding[key] += (torch.finfo(p.dtype).eps / 2) ** 2

    @property
    def judged(self) -> bool:
        """There was something exact to compare with."""
        return bool(self.ours)

    @property
    def largest(self) -> float:
        """The largest root mean square error of a tensor, relative to that tensor; nan if a number is."""
        found = [*self.ours.values(), *self.unjudged]
        return math.nan if any(map(math.isnan, found)) else math.sqrt(max(found, default=0.0))

    def ratio(self, *, pooled: bool = True) -> float:
        """How many times plain torch's error, the worst tensor's; an error below half a rounding counts as that much. 2 is what the tests allow."""
        return self.worst(pooled=pooled)[0]

    def worst(self, *, pooled: bool = True) -> tuple[float, str]:
        """`ratio`, and whose it is."""
        found = (0.0, "")
        for key, error in self.ours.items():
            if pooled or key[2] != "small":
                least = max(self.plain[key], self.rounding[key] / 4)
                ratio = math.inf if math.isnan(error) else math.sqrt(error / least)
                found = max(found, (ratio, f"tensor {key[0]}, {key[1]}, {'all small cases' if key[2] == 'small' else f'case {key[2]}'}"))
        return found


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The same random numbers for all, without moving the caller's."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield
