"""Every fused kernel compiled for GPUs that are not here: registers, spills, shared memory and 16-byte loads of exactly the launches that training makes.

    python -m gigatrain.kernels.compiled --targets sm_90 --op rms_norm --csv compiled.csv

An operation's forward and backward run on the CPU with its launches recorded instead of made; each recorded launch is specialised as Triton's own
launcher would specialise it and compiled ahead of time. Needs no GPU and no driver, but a process that does not interpret (TRITON_INTERPRET unset).
"""

import argparse
import csv
import functools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from gigatrain.errors import KernelError
from gigatrain.kernels import launch, ops
from gigatrain.kernels.launch import Launch


@dataclass(frozen=True)
class Target:
    """An architecture: Triton's name for it, the multiprocessors of a usual GPU of it, and the bytes of shared memory that one program may take."""

    backend: str
    arch: int | str
    threads: int
    processors: int
    shared_bytes: int


# Multiprocessors: A100, H100/H200 SXM, B200, MI300X. Shared memory per block: CUDA C++ programming guide, table of compute capabilities; CDNA3 ISA, LDS.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 108, 163 << 10),
    "sm_90": Target("cuda", 90, 32, 132, 227 << 10),
    "sm_100": Target("cuda", 100, 32, 148, 227 << 10),
    "gfx942": Target("hip", "gfx942", 64, 304, 64 << 10),
}
TRITON = {"fused", "glued"}  # versions that launch kernels
CUT = 64  # of the first number of a size, which changes no compiled code


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes. `registers` per thread; `spills` counts local loads and stores; `wide_loads` those of 16 bytes per thread."""

    op: str
    kernel: str
    size: str
    options: str
    target: str
    triton: str
    registers: int
    spills: int
    shared_bytes: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    tensor_instructions: int


@dataclass(frozen=True)
class Work:
    """One recorded launch, as it crosses to a compiling process."""

    op: str
    size: str
    target: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[int, ...]
    options: dict[str, int]


_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def _specialised(made: Launch) -> tuple[dict[str, str], dict[str, Any], tuple[int, ...]]:
    """`(signature, constants, indices of arguments divisible by 16)`, as Triton's launcher sees these arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(made.constants)
    divisible = []
    for index, name in enumerate(made.kernel.arg_names):
        if name in made.constants:
            signature[name] = "constexpr"
            continue
        value = made.arguments[name]
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.append(index)
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0:
                divisible.append(index)
        else:
            signature[name] = "fp32"
    return signature, constants, tuple(divisible)


def recordings(op: str, target: str, sizes: Iterable[tuple[Any, ...]] | None = None) -> Iterator[Work]:
    """The distinct launches of an operation's forward and backward at its sizes, on the GPU of a target."""
    operation, gpu = ops.OPERATIONS[op], TARGETS[target]
    if target in operation.refuses:
        return
    seen = set()
    for size in operation.sizes if sizes is None else sizes:
        cut = (min(CUT, size[0]), *size[1:])
        with launch.recorded((target,), gpu.processors) as launches:
            tensors, call = operation.sample(cut, "cpu")
            if operation.differentiable:
                for tensor in tensors:
                    tensor.requires_grad_()
            for version in sorted(TRITON & set(operation.versions)):
                outputs = call(operation.versions[version], *tensors)
                outputs = [
                    o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, torch.Tensor) and o.requires_grad
                ]
                if operation.differentiable:
                    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
                for tensor in tensors:
                    tensor.grad = None  # or the next version's would be added to it: gigabytes, of experts
        for made in launches:
            signature, constants, divisible = _specialised(made)
            function = made.kernel.fn
            key = (function.__name__, tuple(signature.items()), tuple(constants.items()), divisible, tuple(made.options.items()))
            if key not in seen:
                seen.add(key)
                shape = "x".join(str(n) for n in size[1:-1]).replace(" ", "")
                yield Work(op, shape, target, function.__module__, function.__name__, signature, constants, divisible, made.options)


def compiled(work: Work) -> Resources:
    """Compile one recorded launch. Raises KernelError with the compiler's message, or where it takes more shared memory than the target has."""
    import importlib

    from triton import __version__ as version
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu = TARGETS[work.target]
    kernel = getattr(importlib.import_module(work.module), work.kernel)
    position = {name: index for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=work.signature,
        constexprs={(position[name],): value for name, value in work.constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in work.divisible},
    )
    options = dict(work.options)
    if gpu.threads == 64:
        options["num_warps"] = min(options["num_warps"], 16)  # as launch.launch does
    try:
        binary = compile_kernel(source, target=GPUTarget(gpu.backend, gpu.arch, gpu.threads), options=options)
    except Exception as failure:
        raise KernelError(f"{work.op} {work.size}: {work.kernel} does not compile for {work.target}: {failure}") from failure
    if binary.metadata.shared > gpu.shared_bytes:
        raise KernelError(
            f"{work.op} {work.size}: {work.kernel} takes {binary.metadata.shared} B of shared memory; {work.target} has {gpu.shared_bytes}"
        )
    facts = _cuda(binary.asm["cubin"]) if gpu.backend == "cuda" else _hip(binary.asm["amdgcn"])
    constants = {name: value for name, value in work.constants.items() if name.isupper() and value not in (None, 1)}
    shown = " ".join(
        f"{name}={value}" for name, value in {**constants, "warps": options["num_warps"], "stages": options["num_stages"]}.items()
    )
    return Resources(work.op, work.kernel, work.size, shown, work.target, version, shared_bytes=binary.metadata.shared, **facts)


@functools.cache
def _cuobjdump() -> Path:
    from triton.backends import nvidia

    return Path(next(iter(nvidia.__path__))) / "bin" / "cuobjdump"


def _cuda(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([str(_cuobjdump()), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage[-300:]
    return {"registers": int(found[1])} | _counts(
        sass,
        spills=r"\b(STL|LDL)\b",
        loads=r"\b(LDG|LDGSTS|UTMALDG)\b",
        wide_loads=r"\b(LDG|LDGSTS)\.[\w.]*128|\bUTMALDG\b",
        stores=r"\b(STG|UTMASTG)\b",
        wide_stores=r"\bSTG\.[\w.]*128|\bUTMASTG\b",
        tensor_instructions=r"\b(HMMA|HGMMA|UTC\w*MMA)\b",
    )


def _hip(assembly: str) -> dict[str, int]:
    registers, spills = (re.search(rf"\.{key}:\s*(\d+)", assembly) for key in ("vgpr_count", "vgpr_spill_count"))
    assert registers
    assert spills
    return {"registers": int(registers[1]), "spills": int(spills[1])} | _counts(
        assembly,
        loads=r"\b(global|buffer)_load_\w+",
        wide_loads=r"\b(global|buffer)_load_dwordx4\b",
        stores=r"\b(global|buffer)_store_\w+",
        wide_stores=r"\b(global|buffer)_store_dwordx4\b",
        tensor_instructions=r"\bv_mfma_\w+",
    )


def _counts(text: str, **patterns: str) -> dict[str, int]:
    return {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}


def survey(names: Sequence[str], targets: Sequence[str], workers: int = 2) -> Iterator[Resources | KernelError]:
    """Compile every launch of the operations for every target, in `workers` processes; a failure is yielded, so that the rest is seen too."""
    if launch.INTERPRETED or not launch.INSTALLED:
        raise KernelError("compiling needs triton, in a process without TRITON_INTERPRET: unset it, or pip install triton")
    work = [w for target in targets for name in names if "fused" in ops.OPERATIONS[name].versions for w in recordings(name, target)]
    if workers == 1:
        yield from map(_tried, work)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_tried, work)


def _tried(work: Work) -> Resources | KernelError:
    try:
        return compiled(work)
    except KernelError as failure:
        return failure


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, write it as CSV if asked, and leave with 1 if a kernel does not compile."""
    parser = argparse.ArgumentParser(prog="python -m gigatrain.kernels.compiled", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--op", action="append", choices=sorted(ops.OPERATIONS), help="only this operation; may be repeated")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated; default %(default)s")
    parser.add_argument("--csv", type=Path, help="write the table here too")
    parser.add_argument("--workers", type=int, default=2, help="compiling processes; default %(default)s")
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    if unknown := [target for target in targets if target not in TARGETS]:
        parser.error(f"no target is called {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    rows, failures = [], []
    print(
        f"{'operation':22} {'kernel':20} {'size':24} {'target':7} {'regs':>4} {'spills':>6} {'shared':>7} {'16 B loads':>10} {'stores':>8} {'mma':>4}  options"
    )
    for found in survey(options.op or list(ops.OPERATIONS), targets, options.workers):
        if isinstance(found, KernelError):
            failures.append(found)
            print(f"FAILED {found}", flush=True)
            continue
        rows.append(found)
        print(
            f"{found.op:22} {found.kernel:20} {found.size:24} {found.target:7} {found.registers:4} {found.spills:6} {found.shared_bytes:7} "
            f"{found.wide_loads:4} of {found.loads:3} {found.wide_stores:2} of {found.stores:2} {found.tensor_instructions:4}  {found.options}",
            flush=True,
        )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Resources)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    print(f"{len(rows)} compiled, {len(failures)} failed, {sum(row.spills > 0 for row in rows)} with spills")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
