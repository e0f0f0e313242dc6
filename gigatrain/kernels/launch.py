"""What every fused kernel stands on: Triton where it is installed, launches that can be recorded, configuration tables, torch operators.

Triton is an optional import: without it the references and the lean versions work, and `missing` says why the fused ones do not.
`TRITON_INTERPRET=1`, set before the first import of triton, runs every kernel on CPU tensors in Triton's interpreter.
"""

import contextlib
import functools
import json
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gigatrain.errors import KernelError


class _Absent:
    """Stands where Triton's names stand in a kernel file, so that the file can be imported without it."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self


# Multiply-add fusion is named, since triton 3.10 changes its default: unfused, a kernel would round twice where it now rounds once.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
try:
    import triton
    import triton.language as tl

    INSTALLED = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:
    triton: Any = _Absent()
    tl: Any = triton
    INSTALLED = INTERPRETED = False

WIDE_WARPS = torch.version.hip is not None  # 64 threads, where a program may have 1,024
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
TABLES = Path(__file__).parent / "tables"


Sample = tuple[list[Tensor], Callable[..., Any]]


@dataclass(frozen=True)
class Traffic:
    """The least that an operation must move and compute: bytes of HBM and floating-point operations, forward and backward."""

    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    forward_flops: float = 0.0
    backward_flops: float = 0.0


@dataclass(frozen=True)
class Operation:
    """What a kernel file offers to `Ops`, to the tests, to the benchmarks and to the compiler: nothing else knows an operation by name.

    `versions` holds every implementation by name, `reference` first. `cases` are small and odd, `sizes` are what is trained with; both are tuples that
    end with the dtype and begin with a count (tokens, mostly) that may be cut without changing what is compiled. `sample(case, device)` draws the
    tensors that get gradients, and returns with them `call(version, *tensors) -> outputs`; a call casts its constant tensors to fp64 where the first
    of the given tensors is fp64. `traffic(case)` counts the floor. `narrow` holds implementations that compute in low precision: chosen like the
    others, and never judged or timed as if their numbers were the same. `refuses` names targets (kernels/compiled.py) that cannot run the fused version,
    and why.
    """

    versions: Mapping[str, Callable[..., Any]]
    cases: Sequence[tuple[Any, ...]]
    sizes: Sequence[tuple[Any, ...]]
    sample: Callable[..., Sample]
    traffic: Callable[..., Traffic]
    differentiable: bool = True
    narrow: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)

    def version(self, name: str) -> Callable[..., Any]:
        """The implementation of that name, of either kind."""
        return (self.narrow if name in self.narrow else self.versions)[name]


@dataclass(frozen=True)
class Launch:
    """One launch as it would be made: the kernel, its arguments by name, and its options."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Recording:
    """Launches are appended instead of made; tables and processor count are those of a device."""

    launches: list[Launch]
    tables: tuple[str, ...]
    processors: int


_recording: Recording | None = None


@contextmanager
def recorded(tables: tuple[str, ...], processors: int) -> Iterator[list[Launch]]:
    """Within it no kernel runs: the list receives each launch, so that it can be compiled for a GPU that is not here. Outputs stay undefined."""
    global _recording  # noqa: PLW0603
    before, _recording = _recording, Recording([], tables, processors)
    try:
        yield _recording.launches
    finally:
        _recording = before


def recording() -> bool:
    """Whether launches are recorded and not made: what surrounds them may then skip its own work too."""
    return _recording is not None


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, warps: int = 4, stages: int = 1, **constants: Any) -> None:
    """Run `kernel` on `grid` programs (none: nothing), on the device of its first argument. `constants` are its constexpr parameters."""
    if _recording is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        _recording.launches.append(Launch(kernel, named, constants, {"num_warps": warps, "num_stages": stages}))
        return
    if 0 in grid:
        return
    if WIDE_WARPS:
        warps = min(warps, 16)
    first = arguments[0]
    elsewhere = first.is_cuda and first.get_device() != torch.cuda.current_device()
    try:
        with torch.cuda.device(first.device) if elsewhere else contextlib.nullcontext():
            kernel[tuple(grid)](*arguments, num_warps=warps, num_stages=stages, **constants)
    except triton.runtime.errors.OutOfResources as failure:
        raise KernelError(
            f"{kernel.fn.__name__}: {failure}; this device needs smaller tiles: gigatrain bench kernels --tune finds them, "
            'or set kernels = "reference"'
        ) from failure


def missing(tensor: Tensor) -> str | None:
    """Why no Triton kernel can run on this tensor's device; None: one can."""
    if not INSTALLED:
        return 'triton is not installed: pip install "triton>=3.6"'
    if tensor.is_cuda or _recording is not None or (INTERPRETED and tensor.device.type == "cpu"):
        return None
    return f"Triton kernels need a GPU, not {tensor.device.type} (TRITON_INTERPRET=1 interprets them on a CPU, for tests)"


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(tensor: Tensor) -> int:
    """Streaming multiprocessors or compute units of the tensor's GPU; 3 in the interpreter, so that persistent programs take several turns."""
    if _recording is not None:
        return _recording.processors
    return _processors(tensor.get_device()) if tensor.is_cuda else 3


def slug(device: str) -> str:
    """The name of a device's table: `NVIDIA H200` is nvidia-h200."""
    return "-".join(device.lower().replace("/", " ").split())


@functools.cache
def _tables(index: int) -> tuple[str, ...]:
    properties = torch.cuda.get_device_properties(index)
    architecture = properties.gcnArchName.split(":")[0] if WIDE_WARPS else f"sm_{properties.major}{properties.minor}"
    return slug(properties.name), architecture


def tables(tensor: Tensor) -> tuple[str, ...]:
    """The tables that serve the tensor's device, the nearest first: its own name's, its architecture's; default.json serves what they leave out."""
    if _recording is not None:
        return _recording.tables
    return _tables(tensor.get_device()) if tensor.is_cuda else ()


@functools.cache
def table(name: str) -> dict[str, Any]:
    """One file of tables/: {"found": how, "configs": {kernel: {size: configuration}}}; empty where there is none."""
    path = TABLES / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"found": "", "configs": {}}


_forced: dict[str, dict[str, int]] = {}


@contextmanager
def forced(kernel: str, configuration: dict[str, int]) -> Iterator[None]:
    """Within it `kernel` runs with this configuration whatever the tables say: tuning and tests try every one."""
    before = dict(_forced)
    _forced[kernel] = configuration
    _nearest.cache_clear()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        _nearest.cache_clear()


@functools.cache
def _nearest(names: tuple[str, ...], kernel: str, size: int) -> dict[str, int]:
    if kernel in _forced:
        return _forced[kernel]
    sizes = next(found for name in (*names, "default") if (found := table(name)["configs"].get(kernel)))
    return sizes[min(sizes, key=lambda known: abs(math.log(int(known) / max(1, size))))]


_observed: list[tuple[str, int]] | None = None


@contextmanager
def observed() -> Iterator[list[tuple[str, int]]]:
    """Within it the list receives every (kernel, size) whose configuration is asked for: what there is to tune, and the keys of its table."""
    global _observed  # noqa: PLW0603
    before, _observed = _observed, []
    try:
        yield _observed
    finally:
        _observed = before


def configuration(tensor: Tensor, kernel: str, size: int) -> dict[str, int]:
    """The configuration of `kernel` for problems of about `size` (the kernel file says of what), nearest in log space, on the tensor's device."""
    if _observed is not None:
        _observed.append((kernel, size))
    return _nearest(tables(tensor), kernel, size)


def cache_on_this_node() -> Path:
    """Keep what Triton compiles on this node's own disk, unless TRITON_CACHE_DIR says where, and return the folder.

    A home on a shared file system, Triton's default, tears under thousands of ranks (triton 2688, 4295, 11512). Raises KernelError where the folder is
    not ours alone: what lies in it is executed.
    """
    if given := os.environ.get("TRITON_CACHE_DIR"):
        return Path(given)
    folder = Path(tempfile.gettempdir()) / f"gigatrain-triton-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    owned = folder.lstat()
    if owned.st_uid != os.getuid() or owned.st_mode & 0o022 or not stat.S_ISDIR(owned.st_mode):
        raise KernelError(
            f"{folder} can be written by others, and compiled kernels in it would be executed; remove it, or set TRITON_CACHE_DIR"
        )
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    return folder


def block(count: int) -> int:
    """The power of two that holds `count` elements."""
    return 1 << max(0, count - 1).bit_length()


def rows(x_nd: Tensor) -> Tensor:
    """x as [n, d] with unit stride along d: a view wherever the layout allows it, else a copy."""
    x = x_nd.reshape(-1, x_nd.shape[-1]) if x_nd.shape[-1] else x_nd.new_empty(x_nd.shape[:-1].numel(), 0)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


_LIBRARY = torch.library.Library("gigatrain", "FRAGMENT")


class Operator:
    """A torch operator, and the shorter way to its implementation for eager calls on plain tensors, where nothing looks at operators.

    On one EPYC core the dispatcher's way through Python costs 40 us and more a call, the implementation itself 15; a layer makes a dozen such calls each way.
    """

    __slots__ = ("op", "run")

    def __init__(self, op: Any, run: Callable[..., Any]) -> None:
        self.op, self.run = op, run

    def __call__(self, *inputs: Any) -> Any:
        return self.op(*inputs) if torch.compiler.is_compiling() or _watched(inputs) else self.run(*inputs)


def _watched(inputs: Sequence[Any]) -> bool:
    """Whether somebody must see an operator and not what it does: a mode (fake tensors, tracing, selective recomputation), a transform, a tensor subclass."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return True
    return any(isinstance(x, Tensor) and type(x) is not Tensor and type(x) is not torch.nn.Parameter for x in inputs)


def operator(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Operator:
    """Define `gigatrain::name` by its schema, with `run` on CPUs and GPUs and `fake` for shapes only."""
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"gigatrain::{name}", fake, lib=_LIBRARY)
    return Operator(getattr(torch.ops.gigatrain, name).default, run)


def differentiable(operator: Operator, setup: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """`operator` with a gradient: `setup(ctx, inputs, output)` saves, `backward(ctx, *grads)` returns one gradient per input (grads may be None).

    The operator carries its autograd for whoever calls or traces it; eager calls take the shorter way through one autograd.Function. That has no
    setup_context, for which torch asks Python for forward's signature at every call: a third of the call.
    """
    op = operator.op
    torch.library.register_autograd(op.name(), backward, setup_context=setup, lib=_LIBRARY)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = operator(*inputs)
        setup(ctx, inputs, output)
        return output

    def function(**methods: Callable[..., Any]) -> Any:
        methods |= {"backward": torch.autograd.function.once_differentiable(backward)}
        return type(f"_{op.name().split('::')[1]}", (torch.autograd.Function,), {name: staticmethod(it) for name, it in methods.items()})

    direct, transformed = function(forward=forward), function(forward=op, setup_context=setup)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)
        return (transformed if torch._C._are_functorch_transforms_active() else direct).apply(*inputs)

    return call


@triton.jit
def _column_sum(X, OUT, rows, columns, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[valid-type]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        total += tl.load(X + row[:, None].to(tl.int64) * columns + at[None], mask=(row < rows)[:, None] & (at < columns)[None], other=0.0)
    tl.store(OUT + at, tl.sum(total, 0).to(OUT.dtype.element_ty), mask=at < columns)


def column_sum(parts_pd: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of contiguous fp32 partial sums [p, d] over p, in a fixed order, rounded once to `dtype`."""
    out = torch.empty(parts_pd.shape[1], dtype=dtype, device=parts_pd.device)
    # 32 columns are 128 B of a row, and 128 rows a turn: a thousand partial sums of a head's 128 channels take 9 turns of 4 programs.
    launch(_column_sum, (-(-parts_pd.shape[1] // 32),), parts_pd, out, *parts_pd.shape, BLOCK=32, ROWS=128)
    return out
