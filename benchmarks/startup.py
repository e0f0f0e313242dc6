r"""How long ranks take to find each other and to build their groups, and how that grows with their number.

    python benchmarks/startup.py                 2 to 64 processes and 1,024 to 294,912 pretended ranks: prints tables and laws, adds rows to
                                                 benchmarks/results/startup.csv
    python benchmarks/startup.py --quick         2 to 8 processes once, no rows
    python benchmarks/startup.py --lazy          with TORCH_GLOO_LAZY_INIT=1: ranks connect when they first talk
    unshare -m sh -c 'mount --bind HOSTS /etc/hosts && python benchmarks/startup.py'     where HOSTS has the line "::ffff:127.0.0.1 localhost":
                                                 without the nameserver, which loses questions that come all at once, at 5 s each

Real processes, on this machine, over loopback with gloo; each has only torch.distributed and our Mesh, forked from a server that imported them once. The
phases, each begun by all at once:

    lookup        the name of 127.0.0.1 as a v4-mapped address: what torch asks the nameserver whenever a rank connects to a store
    rendezvous    a TCPStore that rank 0 serves, until every rank is connected: with a lookup of its own
    init          init_process_group("gloo") over it, which in gloo connects every rank with every other
    tensor, shard, replicate, weights     Mesh.group along the axis (2, n/4, 2 and n/2 ranks: made by its members alone) and a first all_reduce in it
    world         a first all_reduce over all ranks
    again         a second one, which is what the network and the scheduler cost

Wall time is from the first rank's begin to the last rank's end. n processes share a few cores here, so wall time has the work of n / cores processes in
it, which no cluster has. CPU time of one rank (the median) and of rank 0, who also serves the store, is what a machine of its own would spend; waiting
for the network is not in it. The laws, of the least of the repeats, are t = a + b log2(n) + c n + d n^2 with coefficients that are not negative, by
least squares of relative errors; of the terms only those that a law needs to get within a tenth of the best fit are kept. They hold for the range they
were measured in.

Pretended ranks ("fake" backend, one process is the last rank of n): what every rank does by itself before any message, and what it keeps in memory. It is
the part that no parallel machine shortens: anything proportional to n there is a loop over the world on every rank.
"""

import argparse
import csv
import datetime
import itertools
import math
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "startup.csv"
COLUMNS = (
    "commit", "date", "cpu", "cores", "load", "versions", "kind", "names", "what", "ranks", "repeats", "wall_ms", "wall_ms_least", "wall_ms_most", "cpu_ms",
    "cpu_ms_rank0", "rss_mib", "law", "worst_error_pct",
)  # fmt: skip
GROUPS = {"tensor": ("tensor",), "shard": ("shard",), "replicate": ("replicate",), "weights": ("replicate", "shard")}
LAZY, KIND = "TORCH_GLOO_LAZY_INIT", ("gloo", "gloo lazy")
TERMS: dict[str, Callable[[float], float]] = {"": lambda n: 1.0, " log2(n)": math.log2, " n": float, " n^2": lambda n: n * n}


def axes_of(ranks: int) -> Any:
    """Tensor 2, replicate 2 from 8 ranks on, and all the rest shard."""
    from gigatrain import config

    tensor, replicate = min(2, ranks), 2 if ranks >= 8 else 1
    return config.Mesh(tensor=tensor, replicate=replicate, shard=ranks // tensor // replicate)


def serve(rank: int, ranks: int, port: int, pipe: Any) -> None:
    """One rank: every phase's begin, end and CPU seconds go into the pipe."""
    import torch
    from torch import distributed

    from gigatrain.parallel.mesh import AXES, Mesh

    torch.set_num_threads(1)
    patience = datetime.timedelta(minutes=5)
    times: dict[str, tuple[float, float, float]] = {}
    store: Any = None

    def phase(name: str, act: Callable[[], Any]) -> Any:
        if store is not None:  # all begin at once
            if store.add(f"at/{name}", 1) == ranks:
                store.set(f"go/{name}", "1")
            store.wait([f"go/{name}"], patience)
        begin, cpu = time.monotonic(), time.process_time()
        found = act()
        times[name] = (begin, time.monotonic(), time.process_time() - cpu)
        return found

    pipe.send("here")
    pipe.recv()
    phase("lookup", lambda: socket.getnameinfo(("::ffff:127.0.0.1", port), socket.NI_NUMERICSERV))
    store = phase("rendezvous", lambda: distributed.TCPStore("127.0.0.1", port, ranks, rank == 0, patience))
    phase("init", lambda: distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=patience))
    mesh = Mesh(axes_of(ranks), rank)
    for name, along in GROUPS.items():
        if 1 < mesh.size(*along) < ranks:
            phase(name, lambda along=along: mesh.sum(torch.ones(1), *along))
    phase("world", lambda: mesh.sum(torch.ones(1), *AXES))
    phase("again", lambda: mesh.sum(torch.ones(1), *AXES))
    pipe.send((times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    pipe.recv()  # until all are done: rank 0 serves the store
    os._exit(0)


def together(ranks: int) -> tuple[list[dict[str, tuple[float, float, float]]], float]:
    """The phases of every rank, and the largest RSS in MiB."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.device_mesh", "gigatrain.parallel.mesh", "numpy"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(rank, ranks, port, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        for pipe in pipes:
            assert pipe.recv() == "here"
        for pipe in pipes:
            pipe.send("go")
        found = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send("leave")
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
    return [times for times, _ in found], max(rss for _, rss in found)


def measured(ranks: int, repeats: int) -> list[dict[str, Any]]:
    """One row a phase."""
    names = "hosts" if "::ffff:127.0.0.1" in Path("/etc/hosts").read_text() else "nameserver"
    walls: dict[str, list[float]] = {}
    costs: dict[str, list[tuple[float, float]]] = {}
    rss = 0.0
    for _ in range(repeats):
        found, most = together(ranks)
        rss = max(rss, most)
        for name in found[0]:
            spans = [times[name] for times in found]
            walls.setdefault(name, []).append(1e3 * (max(end for _, end, _ in spans) - min(begin for begin, _, _ in spans)))
            costs.setdefault(name, []).append((1e3 * statistics.median(cpu for _, _, cpu in spans), 1e3 * spans[0][2]))
    rows = []
    for name, wall in walls.items():
        one, zero = (statistics.median(values) for values in zip(*costs[name], strict=True))
        row = {
            "kind": KIND[LAZY in os.environ],
            "names": names,
            "what": name,
            "ranks": ranks,
            "repeats": repeats,
            "cpu_ms": one,
            "cpu_ms_rank0": zero,
            "rss_mib": rss,
        }
        rows.append(row | {"wall_ms": statistics.median(wall), "wall_ms_least": min(wall), "wall_ms_most": max(wall)})
    return rows


def pretend(ranks: int, pipe: Any) -> None:
    """The last of `ranks` with the "fake" backend, HSDP x TP8: milliseconds and MiB of each thing it builds."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from gigatrain import config
    from gigatrain.parallel.mesh import AXES, WEIGHTS, Mesh

    shard = 64
    axes = config.Mesh(tensor=8, shard=shard, replicate=ranks // 8 // shard)
    rows: list[tuple[str, float, float]] = []

    def phase(name: str, act: Callable[[], Any]) -> Any:
        before, begin = _rss(), time.perf_counter()
        found = act()
        rows.append((name, 1e3 * (time.perf_counter() - begin), _rss() - before))
        return found

    phase("init", lambda: distributed.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks))
    mesh = phase("Mesh", lambda: Mesh(axes, ranks - 1))
    for axis in ("tensor", "shard", "replicate"):
        phase(f"group({axis})", lambda axis=axis: mesh.group(axis))
    phase("group(replicate, shard)", lambda: mesh.group("replicate", "shard"))
    phase("group(all)", lambda: mesh.group(*AXES))
    phase("torch(WEIGHTS, replicate)", lambda: mesh.torch(WEIGHTS, ("replicate",)))
    pipe.send((rows, _rss()))
    pipe.recv()
    os._exit(0)


def pretended(ranks: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each thing built."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.device_mesh", "gigatrain.parallel.mesh", "numpy"])
    runs = []
    for _ in range(repeats):
        ours, theirs = context.Pipe()
        process = context.Process(target=pretend, args=(ranks, theirs), daemon=True)
        process.start()
        runs.append(ours.recv()[0])
        ours.send("leave")
        process.join(60)
    rows = []
    for same in zip(*runs, strict=True):
        wall = [ms for _, ms, _ in same]
        row = {
            "kind": "fake",
            "what": same[0][0],
            "ranks": ranks,
            "repeats": repeats,
            "rss_mib": statistics.median(mib for _, _, mib in same),
        }
        rows.append(row | {"wall_ms": statistics.median(wall), "wall_ms_least": min(wall), "wall_ms_most": max(wall)})
    return rows


def _rss() -> float:
    """MiB of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def law(points: list[tuple[int, float]]) -> tuple[str, float]:
    """`(formula in ms, largest relative error)` of the simplest law that is within a tenth of the best one's error."""
    counts, values = [n for n, _ in points], np.array([value for _, value in points])
    found: list[tuple[int, float, str]] = []
    for size in range(1, min(len(TERMS), len(points) - 1) + 1):
        for terms in itertools.combinations(TERMS, size):
            matrix = np.array([[TERMS[term](n) for term in terms] for n in counts]) / values[:, None]
            factors = np.linalg.lstsq(matrix, np.ones(len(values)), rcond=None)[0]
            if (factors >= 0).all():
                error = float(np.sqrt(np.mean((matrix @ factors - 1) ** 2)))
                text = " + ".join(f"{factor:.3g}{term}" for factor, term in zip(factors, terms, strict=True))
                found.append((size, error, f"{text}|{np.abs(matrix @ factors - 1).max()}"))
    best = min(error for _, error, _ in found)
    _, _, text = min(entry for entry in found if entry[1] <= 1.1 * best + 1e-9)
    formula, worst = text.split("|")
    return formula, float(worst)


def laws(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How each phase grows: wall and CPU time of processes, wall time and memory of a pretended rank."""
    found = []
    real = KIND[LAZY in os.environ]
    for kind, column in ((real, "wall_ms_least"), (real, "cpu_ms"), (real, "cpu_ms_rank0"), ("fake", "wall_ms_least")):
        mine = [row for row in rows if row["kind"] == kind]
        for what in dict.fromkeys(row["what"] for row in mine):
            points = [(row["ranks"], max(row[column], 1e-3)) for row in mine if row["what"] == what]
            if len(points) < 3:
                continue
            formula, worst = law(points)
            print(
                f"{kind:5} {what:26} {column:13} {formula:44} worst error {100 * worst:4.0f} %, {points[0][0]:,} to {points[-1][0]:,} ranks"
            )
            spans = f"{points[0][0]} to {points[-1][0]}"
            found.append(
                {"kind": kind, "what": f"{what}: {column}", "ranks": spans, "law": formula, "worst_error_pct": round(100 * worst, 1)}
            )
    return found


def machine() -> dict[str, Any]:
    """Commit, processor and versions of a row."""
    folder = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=False)
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":")[1].strip() for line in names if line.startswith("model name")), platform.processor())
    return {
        "commit": commit.stdout.strip() or "none",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "versions": f"python {platform.python_version()} torch {metadata.version('torch')}",
    }


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        cpu = f"   CPU {row['cpu_ms']:8.1f} ms, rank 0 {row['cpu_ms_rank0']:8.1f} ms" if "cpu_ms" in row else ""
        spread = f"({row['wall_ms_least']:,.2f} .. {row['wall_ms_most']:,.2f})"
        print(f"{row['ranks']:>9,} {row['what']:26} {row['wall_ms']:10,.2f} ms {spread:24}{cpu}   {row['rss_mib']:6.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 to 8 processes once, and no rows in results/")
    parser.add_argument("--lazy", action="store_true", help="gloo connects ranks when they first talk; no pretended ranks")
    parser.add_argument("--most", type=int, default=64, help="processes at most (about 20 MiB each)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    most, repeats = (8, 1) if options.quick else (options.most, options.repeats)
    if options.lazy:
        os.environ[LAZY] = "1"  # before the server of the processes starts
    rows: list[dict[str, Any]] = []
    for ranks in (2**power for power in range(1, most.bit_length())):
        found = [row | {"load": round(os.getloadavg()[0], 2)} for row in measured(ranks, repeats)]
        show(found)
        rows += found
    for ranks in () if options.lazy else (1024, 8192, 32768, 131072, 294912):
        found = [row | {"load": round(os.getloadavg()[0], 2)} for row in pretended(ranks, repeats)]
        show(found)
        rows += found
    rows += laws(rows)
    if not options.quick:
        new = not RESULTS.is_file()
        with RESULTS.open("a", newline="", encoding="utf-8") as file:
            writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            facts = machine()
            writer.writerows(
                facts | {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()} for row in rows
            )
        print(f"{len(rows)} rows added to {RESULTS}")


if __name__ == "__main__":
    main()
