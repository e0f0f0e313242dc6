"""The second wall around foreign files: a locked process reaches no network, starts no program, and writes below one folder alone.

(And below one for temporary files, which goes with it.) What the kernel gives is used without a library: seccomp (system calls that a reader does not need
return EPERM), Landlock (files: what is read and where anything is written), limits of resources, an environment of five variables, Python's -I. `lock` says
what of this holds here; nothing else is claimed. Not walled: CPU time, memory below the limit, and reading what lies below the source, Python and the
system's libraries.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gigatrain.errors import CheckpointError

_DENIED = {  # socket and its calls, execve, execveat, (v)fork, ptrace, other processes' memory, kill, mounts, namespaces, modules, bpf, keys, io_uring, ...
    "x86_64": (
        0xC000003E, 317,
        (41, 42, 43, 49, 50, 53, 288, 59, 322, 57, 58, 101, 310, 311, 62, 165, 166, 272, 308, 175, 313, 246, 321, 298, 248, 249, 250, 425, 434, 438, 304, 323),
    ),
    "aarch64": (
        0xC00000B7, 277,
        (198, 203, 202, 200, 201, 199, 242, 221, 281, 117, 270, 271, 129, 40, 39, 97, 268, 105, 273, 104, 280, 241, 217, 218, 219, 425, 434, 438, 265, 282),
    ),
}  # fmt: skip
_READ, _EXECUTE = 1 << 2 | 1 << 3, 1
_ACCESS = {
    1: (1 << 13) - 1,
    2: (1 << 14) - 1,
    3: (1 << 15) - 1,
    4: (1 << 15) - 1,
    5: (1 << 16) - 1,
}  # all rights over files, by Landlock's version
MEMORY_BYTES = 64 << 30  # addresses, of which torch's libraries take some without using them


def run(request: dict[str, Any], source: Path, folder: Path) -> dict[str, Any]:
    """gigatrain.importing.convert's `inside` on `request`, in a locked process that reads `source` and writes into `folder`; what it returned.

    Raises CheckpointError with what the process said.
    """
    package = str(Path(__file__).resolve().parents[2])
    code = f"import sys; sys.path.insert(0, {package!r}); from gigatrain.importing.sandbox import main; main()"
    with tempfile.TemporaryDirectory(prefix="gigatrain-import-") as home:
        environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": home, "TMPDIR": home, "OMP_NUM_THREADS": "1"}
        text = json.dumps(request | {"reads": [str(source), package], "writes": [str(folder), home]})
        ended = subprocess.run([sys.executable, "-I", "-c", code], input=text, capture_output=True, text=True, env=environment, check=False)
    last = ended.stdout.strip().splitlines()[-1:] or ["{}"]
    with contextlib.suppress(ValueError):
        answer = json.loads(last[0])
        if "refused" in answer:
            raise CheckpointError(answer["refused"])
        if ended.returncode == 0 and "done" in answer:
            return answer["done"]
    said = ended.stderr.strip().splitlines()[-1:] or ["nothing"]
    raise CheckpointError(f"the process that reads {source} ended with {ended.returncode}; it said: {said[0][:300]}")


def main() -> None:
    """The locked process: one request on its standard input, one line of JSON on its standard output."""
    request = json.loads(sys.stdin.read())
    walls = lock([Path(path) for path in request.pop("reads")], [Path(path) for path in request.pop("writes")])
    from gigatrain.importing.convert import inside

    try:
        answer: dict[str, Any] = {"done": inside(request) | {"walls": walls}}
    except CheckpointError as failure:
        answer = {"refused": str(failure)}
    except MemoryError:
        answer = {"refused": f"the checkpoint needs more than {MEMORY_BYTES >> 30} GiB of addresses to be read"}
    print(json.dumps(answer), flush=True)


def lock(reads: list[Path], writes: list[Path]) -> dict[str, bool]:
    """Lock this process, before it has threads; by what is walled, whether it is."""
    for limit, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, MEMORY_BYTES)):
        _, hard = resource.getrlimit(limit)
        limited = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (limited, limited))
    kernel = ctypes.CDLL(None, use_errno=True)
    if kernel.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS, which both walls need
        return {"files (landlock)": False, "network and programs (seccomp)": False}
    system = [
        Path(path)
        for path in ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/proc/self", "/proc/meminfo", "/proc/cpuinfo", "/sys/devices/system")
    ]
    python = [Path(path) for path in {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))}]
    files = _landlock(kernel, [*reads, *system, *python], writes)
    return {"files (landlock)": files, "network and programs (seccomp)": _seccomp(kernel)}


def _landlock(kernel: Any, reads: list[Path], writes: list[Path]) -> bool:
    version = kernel.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    access = _ACCESS[min(version, max(_ACCESS))]
    attributes = ctypes.create_string_buffer(struct.pack("<Q", access), 8)
    ruleset = kernel.syscall(444, attributes, ctypes.c_size_t(8), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    device = access & (1 << 1 | _READ)
    rules = [
        *((path, _READ) for path in reads),
        *((path, access & ~_EXECUTE) for path in writes),
        (Path("/dev/null"), device),
        (Path("/dev/urandom"), _READ),
    ]
    for path, allowed in rules:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        fits = access if path.is_dir() else access & (1 << 1 | 1 << 2 | 1 << 14)  # what a file can have: to be written, read, cut
        rule = ctypes.create_string_buffer(struct.pack("<Qi", allowed & fits, descriptor), 12)
        failed = kernel.syscall(445, ruleset, ctypes.c_int(1), rule, ctypes.c_uint32(0))
        os.close(descriptor)
        if failed:
            return False
    done = kernel.syscall(446, ruleset, ctypes.c_uint32(0)) == 0
    os.close(ruleset)
    return done


def _seccomp(kernel: Any) -> bool:
    if platform.machine() not in _DENIED or sys.maxsize < 1 << 32:
        return False
    architecture, call, denied = _DENIED[platform.machine()]
    refuse, allow, kill = 0x00050000 | 1, 0x7FFF0000, 0x80000000  # EPERM; or the process ends, where it calls as another architecture
    # A filter of Berkeley packet instructions over seccomp_data: load its architecture (byte 4), then the number of the call (byte 0), and compare.
    program = [
        (0x20, 0, 0, 4),
        (0x15, 1, 0, architecture),
        (0x06, 0, 0, kill),
        (0x20, 0, 0, 0),
        (0x35, 0, 1, 0x40000000),
        (0x06, 0, 0, kill),
    ]
    for number in denied:
        program += [(0x15, 0, 1, number), (0x06, 0, 0, refuse)]
    program.append((0x06, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    return kernel.syscall(call, ctypes.c_uint(1), ctypes.c_uint(1), header) == 0  # SET_MODE_FILTER on all threads
