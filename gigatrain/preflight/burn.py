"""Work with a known answer: products that must be bitwise equal on every GPU or core and every time, memory bandwidths, a kernel compiled and run.

A unit that computes a wrong number now and then passes every counter; equal work on equal units is what shows it (imbue-ai/cluster-health does so over
minutes and GPUs of a node; here over seconds, cores too, and by a digest over all nodes of a job, in judge.py).
"""

import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gigatrain.preflight import gpu
from gigatrain.preflight.findings import Check, Finding, worst
from gigatrain.preflight.host import text

SEED = 6
SIZE_CUDA, SIZE_CPU = 8192, 512  # of the square products, bf16 and fp32
SLOWER = 0.9  # a GPU below this share of the median of its node is a warning
CORES = 512
Touch = Callable[[int, int, Any], None]  # (unit, repetition, result): a test flips bits here


@dataclass(frozen=True)
class Usual:
    """What one device of the site's kind gives, where that is known: reached bf16 TFLOP/s, declared GB/s of its memory and of its links to others."""

    tflops: float | None = None
    memory_gbyte_s: float | None = None
    links_gbyte_s: float | None = None


def checks(device: str, quick: bool, usual: Usual, facts: dict[str, Any], root: Path = Path("/")) -> list[Check]:
    """What nodes are compared by goes into `facts`."""
    seconds = 0.5 if quick else 3.0
    made = [Check("torch gpus", lambda: seen(device), 15)]
    if device == "cuda":
        looks: list[Finding] = []
        made += [
            Check("burn", lambda: burn_cuda(seconds, usual.tflops, facts, looks=looks), 20 + seconds),
            Check("under load", lambda: under_load(looks), 1),
            Check("device memory", lambda: device_memory(usual.memory_gbyte_s), 10),
            Check("gpu links", lambda: gpu_links(usual.links_gbyte_s), 10),
            Check("host to device", host_to_device, 10),
            Check("kernel", kernel, 20),
        ]
    else:
        made += [
            Check("burn", lambda: burn_cpu(seconds, facts, root), 10 + seconds),
            Check("kernel", lambda: Finding("kernel", "untested", "no Triton kernel was compiled: Triton has no target for CPUs"), 1),
        ]
    return [*made, Check("host memory", host_memory, 10)]


def seen(device: str) -> Finding:
    """That torch sees the GPUs that the driver has, with a build that this driver runs."""
    import pynvml
    import torch
    from torch.cuda import nccl as library

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    build = torch.version.cuda or torch.version.hip
    try:
        with gpu.nvml() as gpus:
            there, runs = len(gpus), pynvml.nvmlSystemGetCudaDriverVersion()
    except pynvml.NVMLError:
        there, runs = None, None
    if device != "cuda":
        hidden = f"; {there} NVIDIA GPUs stay idle" if there else ""
        return Finding("torch gpus", "untested", f"the site's device is {device}; torch {torch.__version__} sees {count} GPUs{hidden}")
    if build is None:
        way = "install torch's build for this driver (pytorch.org), or choose a CPU site"
        return Finding("torch gpus", "bad", f"torch {torch.__version__} has no GPU support, the site's device is cuda", None, "CUDA", way)
    if torch.version.cuda and runs and int(torch.version.cuda.split(".")[0]) > runs // 1000:
        said = f"torch is built for CUDA {torch.version.cuda}, the driver runs {runs // 1000}.{runs % 1000 // 10}"
        return Finding("torch gpus", "bad", said, runs // 1000, torch.version.cuda, "a newer driver, or torch's build for this one")
    if not count:
        return Finding(
            "torch gpus", "bad", f"torch sees no GPU (CUDA_VISIBLE_DEVICES={visible!r})", 0, there, "nvidia-smi; did the job ask for GPUs?"
        )
    expected = len(visible.split(",")) if visible else there
    nccl = ".".join(map(str, library.version())) if torch.distributed.is_nccl_available() else "none"
    shown = f"torch sees {count} GPUs, CUDA {build}, NCCL {nccl}"
    if expected is not None and count < expected:
        said = f"{shown}; the driver has {there}" + (f", CUDA_VISIBLE_DEVICES={visible}" if visible else "")
        return Finding("torch gpus", "bad", said, count, expected, "dmesg; nvidia-smi; is a GPU in MIG mode?")
    return Finding("torch gpus", "ok", shown, count, expected)


def burn_cpu(seconds: float, facts: dict[str, Any], root: Path = Path("/"), touch: Touch | None = None, size: int = SIZE_CPU) -> Finding:
    """The same fp32 product on every core this process may use, each pinned; `value` is GFLOP/s of all, by the time the cores worked."""
    import torch

    model = next(
        (line.split(":", 1)[1].strip() for line in (text(root / "proc/cpuinfo") or "").splitlines() if line.startswith("model name")), ""
    )
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    draw = torch.Generator().manual_seed(SEED)
    a, b = (torch.randn(size, size, generator=draw) for _ in range(2))
    begin = threading.Barrier(len(cores))
    answers: list[tuple[str, int, int, float]] = [("", 0, 0, 0.0)] * len(cores)

    def work(place: int) -> None:
        os.sched_setaffinity(0, {cores[place]})  # of this thread alone
        torch.set_num_threads(1)
        begin.wait(10)
        started, worked, repetitions, unequal, first = time.perf_counter(), time.thread_time(), 0, 0, None
        while repetitions < 2 or time.perf_counter() - started < seconds:
            result = a @ b
            if touch:
                touch(place, repetitions, result)
            if first is None:
                first = result
            unequal += not torch.equal(result.view(torch.int32), first.view(torch.int32))
            repetitions += 1
        assert first is not None
        took = time.thread_time() - worked  # of this core's own time: what others take of it is not its speed
        answers[place] = (hashlib.sha256(first.numpy().tobytes()).hexdigest()[:16], repetitions, unequal, took)

    threads = torch.get_num_threads()
    try:
        _together(work, len(cores))
    finally:
        torch.set_num_threads(threads)
    rate = sum(2 * size**3 * repetitions / took / 1e9 for _, repetitions, _, took in answers if took)
    facts |= {"hardware": model or os.uname().machine, "digest": _judge_digest(answers), "device": "cpu"}
    shown = f"{sum(answer[1] for answer in answers):,} products equal on {len(cores)} cores, {rate:,.0f} GFLOP/s in fp32"
    return worst("burn", _unequal("core", cores, answers) or [Finding("burn", "ok", "", round(rate, 1))], shown)


def burn_cuda(
    seconds: float,
    tflops: float | None,
    facts: dict[str, Any],
    touch: Touch | None = None,
    size: int = SIZE_CUDA,
    looks: list[Finding] | None = None,
) -> Finding:
    """The same bf16 product on all GPUs at once; `value` is TFLOP/s of the slowest, against `tflops` and against each other.

    What the driver says of the GPUs meanwhile is appended to `looks`: for `under_load`.
    """
    import torch

    count = torch.cuda.device_count()
    if not count:
        return Finding("burn", "untested", "torch sees no GPU")
    draw = torch.Generator().manual_seed(SEED)
    tile = min(size, 1024)  # drawing all of it on a CPU would take seconds
    shapes = ((size, 2 * size), (2 * size, size))  # long sums, so that comparing each result costs 4 % and not 8
    host = [torch.randn(tile, tile, generator=draw).bfloat16().repeat(rows // tile, columns // tile) for rows, columns in shapes]
    working = threading.Event()
    begin = threading.Barrier(count, working.set)
    answers: list[tuple[str, int, int, float]] = [("", 0, 0, 0.0)] * count

    def work(place: int) -> None:
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
        a, b = (one.to(device) for one in host)
        first = a @ b
        unequal = torch.zeros((), dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)
        begin.wait(15)
        started, repetitions = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            for _ in range(10):
                result = a @ b
                if touch:
                    touch(place, repetitions, result)
                unequal += (result.view(torch.int16) != first.view(torch.int16)).any()
                repetitions += 1
            torch.cuda.synchronize(device)
        took = time.perf_counter() - started
        digest = hashlib.sha256(first.view(torch.int16).cpu().numpy().tobytes()).hexdigest()[:16]
        answers[place] = (digest, repetitions, int(unequal), took)

    seen = watched(seconds, working, lambda: _together(work, count))
    if looks is not None:
        looks += seen
    rates = [4 * size**3 * repetitions / took / 1e12 for _, repetitions, _, took in answers]
    names = sorted({torch.cuda.get_device_name(place) for place in range(count)})
    facts |= {"hardware": ", ".join(names), "digest": _judge_digest(answers), "device": "cuda"}
    parts = _unequal("GPU", range(count), answers)
    middle = sorted(rates)[count // 2]
    for place, rate in enumerate(rates):
        if rate < SLOWER * middle:
            said = f"GPU {place}: {rate:,.0f} TFLOP/s, its neighbours {middle:,.0f}"
            parts.append(Finding("burn", "warn", said, round(rate, 1), round(middle, 1), "cooling, power limit or clocks of this GPU"))
        if tflops and rate < 0.75 * tflops:
            said = f"GPU {place}: {rate:,.0f} TFLOP/s, {tflops:,.0f} are usual for its kind"
            parts.append(Finding("burn", "warn", said, round(rate, 1), tflops, "clocks, power limit or cooling"))
    against = f"; {tflops:,.0f} are usual" if tflops else "; what is usual for these GPUs is unknown"
    shown = f"{sum(answer[1] for answer in answers):,} products equal on {count} GPUs, {min(rates):,.0f} to {max(rates):,.0f} TFLOP/s in bf16{against}"
    if parts:
        return worst("burn", parts, shown)
    return Finding("burn", "ok", shown, round(min(rates), 1), tflops)


def watched(
    seconds: float,
    working: threading.Event,
    work: Callable[[], None],
    look: Callable[[int, Callable[[], bool]], list[Finding]] = gpu.loaded,
) -> list[Finding]:
    """What three looks find, spread over the `seconds` of `work` from when it sets `working`: before that the GPUs idle and CUDA starts."""
    over = threading.Event()
    seen: list[Finding] = []

    def while_working() -> bool:
        working.wait()
        return not over.wait(seconds * 0.28)

    sampler = threading.Thread(target=lambda: seen.extend(look(3, while_working)), name="doctor sampler", daemon=True)
    sampler.start()
    try:
        work()
    finally:
        over.set()
        working.set()
    sampler.join(2)
    return seen


def under_load(looks: Sequence[Finding]) -> Finding:
    """Throttling and PCIe links while the burn ran."""
    if not looks:
        return Finding("under load", "untested", "the driver was not asked while the GPUs worked, or did not tell")
    return worst("under load", looks, "not slowed down, PCIe links at full width and generation")


def _together(work: Callable[[int], None], count: int) -> None:
    """`work(place)` in a thread each; the first failure is raised here."""
    failures: list[BaseException] = []

    def guarded(place: int) -> None:
        try:
            work(place)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(place,), daemon=True) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _judge_digest(answers: Sequence[tuple[str, int, int, float]]) -> str | None:
    """The result that most units had: what other nodes of the same hardware must have too."""
    return Counter(answer[0] for answer in answers).most_common(1)[0][0] or None


def _unequal(unit: str, names: Sequence[int], answers: Sequence[tuple[str, int, int, float]]) -> list[Finding]:
    way = f"this {unit} computes wrong numbers: exclude the node and replace it"
    parts = [
        Finding("burn", "bad", f"{unit} {name}: {wrong} of {repetitions} equal products differ from its first", wrong, 0, way)
        for name, (_, repetitions, wrong, _) in zip(names, answers, strict=True)
        if wrong
    ]
    counts = Counter(answer[0] for answer in answers)
    if len(counts) > 1:
        usual, most = counts.most_common(1)[0]
        tied = most * 2 <= len(answers)
        for name, answer in zip(names, answers, strict=True):
            if answer[0] != usual or tied:
                other = "units here have several results" if tied else f"{most} others agree on another"
                parts.append(Finding("burn", "bad", f"{unit} {name}: its product is {answer[0]}, {other}", answer[0], usual, way))
    return parts


def device_memory(usual: float | None = None) -> Finding:
    """Copies within each GPU's memory, in turn; `value` is GB/s (read and write) of the slowest."""
    import torch

    def rate(place: int) -> float:
        free, _ = torch.cuda.mem_get_info(place)
        source = torch.zeros(int(min(1 << 30, free // 4)), dtype=torch.uint8, device=f"cuda:{place}")
        target = torch.empty_like(source)
        return 2 * _best(lambda: target.copy_(source), source.numel(), place)

    return _rates("device memory", [rate(place) for place in range(torch.cuda.device_count())], usual)


def gpu_links(usual: float | None = None) -> Finding:
    """Copies from each GPU to the next one of the node, in turn; `value` is GB/s in one direction of the slowest.

    `usual` is of one GPU over all its links: to one peer it all goes through a switch, without one a part, and where nobody knows there is no limit.
    """
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return Finding("gpu links", "untested", f"torch sees {count} GPU{'s' if count != 1 else ''}: there is no other to copy to")

    def rate(place: int) -> float:
        source = torch.zeros(256 << 20, dtype=torch.uint8, device=f"cuda:{place}")
        target = torch.empty(source.numel(), dtype=torch.uint8, device=f"cuda:{(place + 1) % count}")
        return _best(lambda: target.copy_(source), source.numel(), place, (place + 1) % count)

    return _rates("gpu links", [rate(place) for place in range(count)], to_one_peer(usual, *gpu.switched()))


def to_one_peer(usual: float | None, switch: bool | None, gpus: int) -> float | None:
    """GB/s that one of `gpus` has to another where it has `usual` over all its links."""
    if usual is None or switch is None or gpus < 2:
        return None
    return usual if switch else usual / (gpus - 1)


def host_to_device() -> Finding:
    """Copies from pinned host memory to each GPU, in turn; `value` is GB/s of the slowest. Its link's lanes and generation show here.

    The buffer is on one NUMA node, so GPUs of the other are slower by design: their difference is said, and only nodes are compared.
    """
    import torch

    if not torch.cuda.device_count():
        return _rates("host to device", [])
    source = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)

    def rate(place: int) -> float:
        target = torch.empty(source.numel(), dtype=torch.uint8, device=f"cuda:{place}")
        return _best(lambda: target.copy_(source, non_blocking=True), source.numel(), place)

    return noted("host to device", [rate(place) for place in range(torch.cuda.device_count())])


def noted(name: str, rates: list[float]) -> Finding:
    """The GPUs' rates, none of them judged."""
    found = _rates(name, rates)
    return replace(found, state="ok", value=round(min(rates), 1), limit=None, way_out="") if rates else found


def _best(copy: Callable[[], Any], size: int, *places: int) -> float:
    """GB/s of the fastest of five, from when all `places` are idle to when they are again."""
    import torch

    def idle() -> None:
        for place in places:
            torch.cuda.synchronize(place)

    seconds = []
    for _ in range(6):
        idle()
        begin = time.perf_counter()
        copy()
        idle()
        seconds.append(time.perf_counter() - begin)
    return size / min(seconds[1:]) / 1e9


def _rates(name: str, rates: list[float], usual: float | None = None) -> Finding:
    """The slowest of the GPUs, against their neighbours and against 70 % of what is declared (a copy reaches 85 to 95 % of it)."""
    if not rates:
        return Finding(name, "untested", "torch sees no GPU")
    middle = sorted(rates)[len(rates) // 2]
    parts = [
        Finding(
            name, "warn", f"GPU {place}: {rate:,.0f} GB/s, its neighbours {middle:,.0f}", round(rate, 1), round(middle, 1), "see pcie, ecc"
        )
        for place, rate in enumerate(rates)
        if rate < SLOWER * middle
    ]
    if usual and min(rates) < 0.7 * usual:
        said = f"GPU {rates.index(min(rates))}: {min(rates):,.0f} GB/s, {usual:,.0f} are declared for its kind"
        parts.append(Finding(name, "warn", said, round(min(rates), 1), usual, "clocks, power limit, or links that are down"))
    shown = f"{min(rates):,.0f} to {max(rates):,.0f} GB/s over {len(rates)} GPUs" + (f"; {usual:,.0f} are declared" if usual else "")
    return worst(name, parts, shown) if parts else Finding(name, "ok", shown, round(min(rates), 1), usual)


def host_memory() -> Finding:
    """A copy in host memory by all of torch's threads; `value` is GB/s, read and write."""
    import torch

    source = torch.ones(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin)
    rate = 2 * source.numel() / min(seconds[1:]) / 1e9
    return Finding("host memory", "ok", f"{rate:,.1f} GB/s copied by {torch.get_num_threads()} threads", round(rate, 1))


def kernel() -> Finding:
    """One of our Triton kernels, compiled for the GPU that is here and compared with plain torch."""
    import torch

    from gigatrain.kernels import launch, rms_norm

    if not launch.INSTALLED:
        return Finding("kernel", "bad", "Triton is not installed", None, None, "pip install triton; torch's GPU builds bring it")
    if not torch.cuda.device_count():
        return Finding("kernel", "untested", "torch sees no GPU")
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    w = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    begin = time.perf_counter()
    found = rms_norm.fused(x, w, 1e-6, "llama")
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    error = (found.float() - rms_norm.reference(x.float(), w.float(), 1e-6, "llama")).abs().max().item()
    if not error < 0.05:
        return Finding("kernel", "bad", f"rms_norm is off by {error:g}", error, 0.05, "gigatrain bench kernels --check --op rms_norm")
    return Finding("kernel", "ok", f"rms_norm compiled and run in {seconds:.1f} s, right", round(seconds, 2))
