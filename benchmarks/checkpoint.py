r"""Saving and loading the same bytes on the same disk: ours in one piece and in the background, torch.save, plain DCP, DeepSpeed; in alternating rounds.

    python benchmarks/checkpoint.py                              1 and 2 ranks, 256 and 1024 MiB in all: some minutes, rows in benchmarks/results/checkpoint.csv
    python benchmarks/checkpoint.py --ranks 2 --mib 2048 --rounds 5 --folder /scratch --providers ours,background,dcp

    ours         Checkpoints.save: SHA-256 of every byte, every file and folder synced, committed last; load: every hash checked, then filled in place
    background   Saving: `stall` is what training stands still, `save` ends when the checkpoint is committed; the same bytes and checks
    torch        torch.save of a file a rank: no hash, no sync; torch.load(weights_only=True)
    torch-sync   the same with a sync of each file and its folder
    dcp          torch.distributed.checkpoint.save, as it comes: files are synced (sync_files=True), no hash; load in place
    dcp-async    async_save with a thread, as it comes; dcp-process: with a process
    deepspeed    save_checkpoint of a ZeRO-1 engine whose model and Adam states together have the bytes: torch.save, no hash, no sync

A state is fp32 tensors of 16 MiB, each rank its own, as after FSDP. Before a load the files' pages are dropped from the cache (posix_fadvise), where the file
system does that. `interval_s` is the shortest interval of saves at which the stall is 1 % of it. Ratios are to `dcp`, round by round.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gigatrain.bench import report
from gigatrain.errors import GigatrainError, RunError

RESULTS = Path(__file__).parent / "results" / "checkpoint.csv"
PROVIDERS = ("ours", "background", "torch", "torch-sync", "dcp", "dcp-async", "dcp-process", "deepspeed")
COLUMNS = (
    "date", "commit", "device", "versions", "load", "disk", "ranks", "mib", "provider", "rounds", "hash", "sync", "save_gb_s", "save_gb_s_low",
    "save_gb_s_high", "ratio_to_dcp", "stall_s", "stall_s_low", "stall_s_high", "interval_s", "load_gb_s", "load_gb_s_low", "load_gb_s_high", "failure",
)  # fmt: skip
NUMBERS = tuple(
    name for name in COLUMNS if name not in {"date", "commit", "device", "versions", "disk", "provider", "hash", "sync", "failure"}
)
HASHED = {"ours", "background"}
SYNCED = {"ours", "background", "torch-sync", "dcp", "dcp-async", "dcp-process"}
TENSOR = 4 << 20  # numbers


# ---- A rank ----


class Rank:
    """One rank's state and every way to save it. Each way returns (seconds that training stands still, a call that waits for the rest)."""

    def __init__(self, folder: Path, mib: int) -> None:
        import torch
        from torch import distributed

        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=self.rank, world_size=self.ranks)
        self.folder, self.torch, self.distributed = folder, torch, distributed
        count = max(1, (mib << 20) // (4 * TENSOR * self.ranks))
        generator = torch.Generator().manual_seed(self.rank)
        self.state = {f"layers.{self.rank}.{number}": torch.randn(TENSOR, generator=generator) for number in range(count)}
        self.bytes = 4 * TENSOR * count * self.ranks
        self.number, self.saving, self.engine = 0, None, None

    def barrier(self) -> None:
        self.distributed.barrier()

    def pieces(self) -> Any:
        from gigatrain.parallel.places import Piece

        return {"weights": {name: Piece.whole(tensor) for name, tensor in self.state.items()}}

    def checkpoints(self, folder: Path) -> Any:
        from gigatrain import config
        from gigatrain.checkpoint import Checkpoints
        from gigatrain.parallel.mesh import Mesh

        return Checkpoints(folder, run="benchmark", plan_sha256="p", keep=1, mesh=Mesh(config.Mesh(shard=self.ranks), self.rank))

    def save(self, provider: str, folder: Path) -> Callable[[], Any]:
        """Begins a save, and returns what waits until it is whole."""
        torch = self.torch
        if provider == "ours":
            self.checkpoints(folder).save(self.number, self.pieces(), {})
        elif provider == "background":
            from gigatrain.checkpoint import Saving

            if self.saving is None:
                self.saving = Saving(self.checkpoints(folder), background=True)
            self.saving.saves.folder = folder / "checkpoints"
            saving = self.saving
            saving.save(self.number, self.pieces, {})

            def ended() -> None:
                if not saving._settled(600):
                    raise RunError("the save in the background did not end")

            return ended
        elif provider in ("torch", "torch-sync"):
            path = folder / f"rank-{self.rank}.pt"
            with path.open("wb") as file:
                torch.save(self.state, file)
                if provider == "torch-sync":
                    file.flush()
                    os.fsync(file.fileno())
        elif provider == "dcp":
            from torch.distributed import checkpoint as dcp

            dcp.save(self.state, checkpoint_id=folder / "dcp")
        elif provider in ("dcp-async", "dcp-process"):
            from torch.distributed import checkpoint as dcp
            from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

            kind = AsyncCheckpointerType.PROCESS if provider == "dcp-process" else AsyncCheckpointerType.THREAD
            future: Any = dcp.async_save(self.state, checkpoint_id=folder / "dcp", async_checkpointer_type=kind)
            return future.result
        else:
            assert self.engine is not None
            self.engine.save_checkpoint(str(folder / "deepspeed"), tag="step")
        return lambda: None

    def load(self, provider: str, folder: Path) -> None:
        if provider in ("ours", "background"):
            from gigatrain.checkpoint import fill

            saves = self.checkpoints(folder)
            fill(saves.latest()[0], self.pieces(), saves.mesh)
        elif provider in ("torch", "torch-sync"):
            found = self.torch.load(folder / f"rank-{self.rank}.pt", weights_only=True)
            for name, tensor in found.items():
                self.state[name].copy_(tensor)
        elif provider == "deepspeed":
            assert self.engine is not None
            self.engine.load_checkpoint(str(folder / "deepspeed"), tag="step")
        else:
            from torch.distributed import checkpoint as dcp

            dcp.load(self.state, checkpoint_id=folder / "dcp")  # the peer's own way, which runs what it reads

    def prepare(self, provider: str) -> None:
        """DeepSpeed's engine: fp32 weights, and ZeRO-1's master weights and two moments: 16 bytes a parameter on 1 rank, 4 + 12 / ranks else."""
        if provider != "deepspeed" or self.engine is not None:
            return
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        torch = self.torch
        layers = max(1, self.bytes // 16 // (4 * TENSOR) * 4)
        model = torch.nn.Module()
        for number in range(layers):
            model.register_parameter(f"w{number}", torch.nn.Parameter(torch.randn(TENSOR)))
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
            "bf16": {"enabled": False},
        }
        self.engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]

    def round(self, provider: str) -> dict[str, float]:
        self.prepare(provider)
        self.number += 1
        folder = self.folder / f"{provider}-{self.number}"
        if self.rank == 0:
            folder.mkdir()
        self.barrier()
        began = time.perf_counter()
        wait = self.save(provider, folder)
        stall_s = time.perf_counter() - began
        wait()
        self.barrier()
        save_s = time.perf_counter() - began
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if self.rank == 0:
            for path in folder.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())  # what this one left behind is not the next one's to write
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.barrier()
        began = time.perf_counter()
        self.load(provider, folder)
        self.barrier()
        load_s = time.perf_counter() - began
        if self.rank == 0:
            shutil.rmtree(folder)
        self.barrier()
        return {"save": size / save_s / 1e9, "stall_s": stall_s, "load": size / load_s / 1e9, "bytes": size}


def worker(folder: Path, mib: int, providers: Sequence[str], rounds: int) -> None:
    """One rank of all rounds; rank 0 prints what each took."""
    rank = Rank(folder, mib)
    found: dict[str, list[dict[str, float]]] = {provider: [] for provider in providers}
    failures: dict[str, str] = {}
    for number in range(rounds + 1):
        order = [*providers[number % len(providers) :], *providers[: number % len(providers)]]
        for provider in order:
            if provider in failures:
                continue
            try:
                taken = rank.round(provider)
            except Exception as failure:  # a peer that does not work here is a row that says so
                failures[provider] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:200] if str(failure) else ''}"
                continue
            if number:  # the first round warms up: memory is taken, processes begin
                found[provider].append(taken)
    if rank.saving is not None:
        rank.saving.writer.close()
    if rank.rank == 0:
        (folder / "found.json").write_text(json.dumps({"rounds": found, "failures": failures}))
    os._exit(0)  # threads and processes of the peers may not end


# ---- The command ----


def measured(ranks: int, mib: int, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one size on so many processes."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        command = [
            sys.executable,
            __file__,
            "--worker",
            folder,
            "--mib",
            str(mib),
            "--rounds",
            str(options.rounds),
            "--providers",
            options.providers,
        ]
        shared = os.environ | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
        running = [
            subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.DEVNULL)
            for rank in range(ranks)
        ]
        try:
            codes = [process.wait(options.limit_s) for process in running]
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
        path = Path(folder) / "found.json"
        if any(codes) or not path.is_file():
            raise RunError(f"the ranks ended with {codes} and left no result; their words are above")
        return json.loads(path.read_text())


def rows(found: dict[str, Any], ranks: int, mib: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a provider."""
    theirs = [taken["save"] for taken in found["rounds"].get("dcp", [])]
    made = []
    for provider, taken in found["rounds"].items():
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": report.commit("checkpoint"),
            "device": f"{len(os.sched_getaffinity(0))} cores of {platform.processor() or platform.machine()}",
            "versions": f"python={platform.python_version()} "
            + " ".join(f"{name}={version}" for name, version in report.versions().items()),
            "load": round(os.getloadavg()[0], 2),
            "disk": _disk(options.folder),
            "ranks": ranks,
            "mib": round(taken[0]["bytes"] / 2**20, 1) if taken else mib,
            "provider": provider,
            "rounds": len(taken),
            "hash": "sha256" if provider in HASHED else "none",
            "sync": "yes" if provider in SYNCED else "no",
            "failure": found["failures"].get(provider, ""),
        }
        for name, key, digits in (("save_gb_s", "save", 4), ("stall_s", "stall_s", 5), ("load_gb_s", "load", 4)):
            if values := [one[key] for one in taken]:
                row |= {
                    name: round(statistics.median(values), digits),
                    f"{name}_low": round(min(values), digits),
                    f"{name}_high": round(max(values), digits),
                }
        if taken:
            row["interval_s"] = round(100 * row["stall_s"], 2)
            if len(theirs) == len(taken):
                row["ratio_to_dcp"] = round(statistics.median(one["save"] / other for one, other in zip(taken, theirs, strict=True)), 3)
        made.append(row)
    return made


def _disk(folder: Path) -> str:
    """The file system that is written."""
    found = subprocess.run(["findmnt", "-no", "FSTYPE,SOURCE", "-T", str(folder)], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "?"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ranks", default="1,2", help="processes (default: 1,2)")
    parser.add_argument("--mib", default="256,1024", help="MiB of all ranks together (default: 256,1024)")
    parser.add_argument("--rounds", type=int, default=5, help="behind one that warms up (default: 5)")
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="which (default: all)")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured (default: %(default)s)"
    )
    parser.add_argument("--limit-s", type=float, default=1800, help="of one size (default: 1800)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows are appended (default: %(default)s)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        chosen = options.providers.split(",")
        if unknown := set(chosen) - set(PROVIDERS):
            raise RunError(f"--providers knows {', '.join(PROVIDERS)}, not {', '.join(sorted(unknown))}")
        if options.worker:
            worker(options.worker, int(options.mib), chosen, options.rounds)
        with contextlib.suppress(FileNotFoundError):
            report.load(options.out, COLUMNS, NUMBERS)  # other columns are refused now rather than after minutes
        for mib in map(int, options.mib.split(",")):
            for ranks in map(int, options.ranks.split(",")):
                made = rows(measured(ranks, mib, options), ranks, mib, options)
                report.append(options.out, made, COLUMNS)
                for row in made:
                    print(
                        "  ".join(
                            f"{name} {row[name]}"
                            for name in ("ranks", "mib", "provider", "save_gb_s", "ratio_to_dcp", "stall_s", "load_gb_s", "failure")
                        )
                    )
    except GigatrainError as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
