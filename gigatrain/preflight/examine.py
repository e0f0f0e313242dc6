"""One node examined, in order: what is quick, what works the hardware, what is written, and in a job the other nodes. Read this first.

The verdict is on disk before each part that may hang, so that a node which never comes back has said where it was.
"""

import contextlib
import faulthandler
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gigatrain.errors import RunError
from gigatrain.planning import hardware
from gigatrain.preflight import burn, findings, gpu, host, network, storage
from gigatrain.preflight.findings import Check, Clock
from gigatrain.preflight.verdict import Verdict, node_name
from gigatrain.site import Figure, Site

LIMIT_S = 54.0
# Kept back for the network of a job. With GPUs: a partner that hangs in a transfer (14 s), while rank 0 waits for what it will not tell (15 s after its own
# pairs), and then the all-reduce of those that are left.
NETWORK_S, NETWORK_CUDA_S = 22.0, 28.0


@dataclass(frozen=True)
class Task:
    """This process as one of a job's tasks, one a node."""

    rank: int = 0
    ranks: int = 1


def task() -> Task:
    """RANK and WORLD_SIZE, else what srun says of its step; alone where neither does. Raises RunError for several tasks a node."""
    environment = os.environ
    rank, ranks = environment.get("RANK"), environment.get("WORLD_SIZE")
    local = environment.get("LOCAL_RANK")
    # A batch script has SLURM_PROCID=0 and SLURM_NTASKS too: only a step of srun has the count of its own tasks.
    if rank is None or ranks is None:
        rank, ranks, local = (environment.get(name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
    if rank is None or ranks is None:
        return Task()
    if not rank.isdecimal() or not ranks.isdecimal() or int(rank) >= int(ranks):
        raise RunError(f"rank {rank!r} of {ranks!r} tasks makes no sense; set RANK and WORLD_SIZE, or unset them")
    if local not in (None, "0"):
        raise RunError(f"this is task {local} of its node; the doctor needs one task a node: srun --ntasks-per-node=1 gigatrain doctor ...")
    return Task(int(rank), int(ranks))


def examine(
    site: Site,
    out: Path | None = None,
    run: Path | None = None,
    quick: bool = False,
    free_gib: float | None = None,
    limit_s: float = LIMIT_S,
    root: Path = Path("/"),
    doing: Callable[[str], None] = lambda name: None,
) -> Verdict:
    """The verdict of this node on `site`; in a job (`task`) with the network between its nodes. `out` keeps it as NODE.json.

    `run` is where runs are written (default: `out`, else the site's paths.runs); `quick` burns for half a second; `root` stands for the machine's files.
    """
    mine, clock = task(), Clock(limit_s)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its store warns of every wait that ends in time; read when torch is imported
    verdict = Verdict(node_name(), rank=mine.rank, ranks=mine.ranks)
    # A call into a driver that keeps Python's lock stops every thread; this one is C's and ends the process, which then has said where it was.
    faulthandler.dump_traceback_later(limit_s + 5, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        if out is not None:
            with contextlib.suppress(OSError):  # _keep tells it
                out.mkdir(parents=True, exist_ok=True)
        _keep(verdict, out, "start", clock)
        verdict.versions = host.versions(root)
        errors = host.counters(root)
        for part, checks in _local(site, verdict, run or out, quick, free_gib, root):
            _keep(verdict, out, part, clock)
            kept_s = 0.0 if mine.ranks == 1 else NETWORK_CUDA_S if site.device == "cuda" else NETWORK_S
            found, hung = findings.run(checks, Clock(clock.left_s - kept_s), doing)
            verdict.findings += found
            verdict.facts.setdefault("hung", []).extend(hung)
        if mine.ranks > 1:
            _keep(verdict, out, "network", clock)
            joined = _network(site, verdict, run or out, out)
            found, hung = findings.run(joined.checks(), clock, doing)
            verdict.findings += found
            verdict.facts |= {"links": joined.measured, "hung": verdict.facts.get("hung", []) + hung + joined.left}
        found, _ = findings.run([Check("network errors", lambda: host.grown(errors, root), 3)], Clock(3), doing)
        verdict.findings += found
        verdict.running = None
        verdict.took_s = round(clock.spent_s, 2)
        _keep(verdict, out, None, clock)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return verdict


def _keep(verdict: Verdict, out: Path | None, part: str | None, clock: Clock) -> None:
    verdict.running, verdict.took_s = part, round(clock.spent_s, 2)
    if out is None:
        return
    try:
        verdict.write(out)
    except OSError as failure:  # a full disk, mostly: what was found is still worth telling
        if not any(one.name == "verdict" for one in verdict.findings):
            said = f"it cannot be written to {out}: {failure.strerror}"
            verdict.findings.append(findings.Finding("verdict", "bad", said, None, None, "make room, or give another --out"))


def _local(
    site: Site, verdict: Verdict, run: Path | None, quick: bool, free_gib: float | None, root: Path
) -> list[tuple[str, list[Check]]]:
    """What is checked on this node alone, by part."""
    cuda = site.device == "cuda"
    local = site.kind == "local"  # such a site says what a run may use, not what the machine has
    accelerators = site.ranks_per_node if cuda and not local else None
    nic = site.network.nic_gbit_s.value
    packages = None if accelerators is None else accelerators // _devices(site)
    return [
        ("host", host.checks(site.device, root, nic, packages, verdict.ranks)),
        ("gpus", [*gpu.checks(cuda, accelerators, root), Check("left limits", gpu.left_limits, 5)]),
        ("storage", _storage(site, run, free_gib)),
        ("work", [Check("torch", host.imported, 40), *burn.checks(site.device, quick, usual(site), verdict.facts, root)]),
    ]


def _devices(site: Site) -> int:
    """How many devices of torch's one accelerator is, which has a network card of its own."""
    return hardware.chip(site.accelerator).devices if site.accelerator else 1


def usual(site: Site) -> burn.Usual:
    """What one device of the site's accelerator gives; unknown where the site does not say what it is, or nobody measured it."""
    if site.accelerator is None:
        return burn.Usual()
    chip = hardware.chip(site.accelerator)

    def each(figure: Figure, scale: float = 1.0) -> float | None:
        return None if figure.value is None else figure.value * scale / chip.devices

    links = site.network.scale_up_gbyte_s if site.network.scale_up_gbyte_s.known else chip.scale_up_gbyte_s
    return burn.Usual(each(chip.reached_bf16), each(chip.hbm_tbyte_s, 1000), each(links))


def _network(site: Site, verdict: Verdict, folder: Path | None, out: Path | None) -> network.Network:
    """The meeting of a job's nodes, over as many GPUs as torch sees here; what the driver is belongs to what must be equal."""
    links = 0
    if site.device == "cuda":
        import torch

        links = torch.cuda.device_count() if torch.distributed.is_nccl_available() else 0
    return network.Network(
        verdict.rank,
        verdict.ranks,
        verdict.node,
        verdict.versions,
        folder,
        links=links,
        nic_gbit_s=site.network.nic_gbit_s.value,
        devices=_devices(site),
        out=out,
        fit=_fit(verdict),
    )


def _fit(verdict: Verdict) -> bool:
    """Whether the others may be asked to work with this node; a full disk does not forbid it, a GPU that hangs does."""
    faults = {one.name for one in verdict.findings if one.state == "bad"} | set(verdict.facts.get("hung", []))
    return not any(not name.startswith(("run", "scratch")) for name in faults)


def _storage(site: Site, run: Path | None, free_gib: float | None) -> list[Check]:
    if run is None:
        try:
            run = storage.resolved(site.paths.runs)
        except KeyError as missing:
            name = str(missing).strip("'")
            way = f"export {name}, give --run, or change the site's paths.runs"
            said = f"paths.runs is {site.paths.runs}, and ${name} is not set here"
            finding = findings.Finding("run", "bad", said, name, None, way)
            return [Check("run", lambda: finding)]
        while not run.is_dir() and run != run.parent:  # what a first run will make
            run = run.parent
    return storage.checks(run, site.paths.local, free_gib)
