"""The machine around the GPUs: versions, limits, memory, ports, network cards. Files are read below `root`, so that a tree can stand for a machine."""

import functools
import hashlib
import importlib
import ipaddress
import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gigatrain import __version__, installed
from gigatrain.preflight.findings import Check, Finding, worst

OPEN_FILES = 4096
SHM_BYTES = 1 << 30  # NCCL and data workers share memory through it; containers are born with 64 MiB
MODULES = ("nvidia", "nvidia_peermem", "gdrdrv", "mlx5_core", "ib_core", "amdgpu", "lustre", "cxi_ss1", "efa")
# Counters of an InfiniBand port (names of the kernel's sysfs), and how many since the machine was started are too many: a switch that was restarted counts as a
# link that went down, so what is counted while the doctor works says more (`grown`).
MANY = {
    "link_downed": 10,
    "link_error_recovery": 10,
    "local_link_integrity_errors": 10,
    "excessive_buffer_overrun_errors": 10,
    "symbol_error": 1000,
    "port_rcv_errors": 1000,
    "port_rcv_remote_physical_errors": 1000,
}
MANY_ETHERNET = {"rx_errors": 1000, "tx_errors": 1000, "rx_crc_errors": 1000}


def checks(
    device: str, root: Path = Path("/"), nic_gbit_s: float | None = None, accelerators: int | None = None, ranks: int = 1
) -> list[Check]:
    """Of a node whose `accelerators` have `nic_gbit_s` each, one of `ranks`."""
    return [
        Check("versions", lambda: versions_found(root), 10),
        Check("limits", lambda: limits(root), 5),
        Check("memory", lambda: memory(root), 5),
        Check("ports", lambda: ports(ranks), 5),
        Check("network cards", lambda: cards(root, nic_gbit_s if device == "cuda" else None, accelerators), 10),
    ]


def text(path: Path) -> str | None:
    """A small file's text; None where there is none or it cannot be read (kernel attributes may answer with any error)."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


@functools.cache
def source_sha256() -> str:
    """Of every file of our package: two nodes of one version may have two copies."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def versions(root: Path = Path("/")) -> dict[str, str]:
    """What must be equal on all nodes of a run, by name; free of torch's import, which a broken driver may hang."""
    there = installed.versions("torch", "triton", "nvidia-nccl-cu13", "nvidia-nccl-cu12", "deepspeed")
    found = {"python": there["python"], "gigatrain": f"{__version__} {source_sha256()}", "kernel": platform.release()} | there
    for module in MODULES:
        folder = root / "sys/module" / module
        if folder.is_dir():
            found[f"module {module}"] = text(folder / "version") or "loaded"
    return found


def versions_found(root: Path) -> Finding:
    found = versions(root)
    shown = ", ".join(f"{name} {value}" for name, value in found.items())
    if "torch" not in found:
        return Finding("versions", "bad", f"torch is not installed for {sys.executable}", None, "torch", "pip install gigatrain")
    return Finding("versions", "ok", shown)


def limits(root: Path = Path("/")) -> Finding:
    """Open files, memory that may be locked (InfiniBand pins it), /dev/shm."""
    parts = []
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        parts.append(
            Finding("limits", "warn", f"open files: {files}", files, OPEN_FILES, f"ulimit -n {OPEN_FILES} (the hard limit is {hard})")
        )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if (root / "sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        said = f"locked memory is limited to {locked >> 10:,} KiB; InfiniBand cannot register its buffers"
        parts.append(
            Finding("limits", "bad", said, locked, "unlimited", "ulimit -l unlimited; for Slurm PropagateResourceLimitsExcept=MEMLOCK")
        )
    shm = root / "dev/shm"
    room = os.statvfs(shm) if shm.is_dir() else None
    if room is not None and room.f_bavail * room.f_frsize < SHM_BYTES:
        said = f"/dev/shm has {room.f_bavail * room.f_frsize >> 20:,} MiB free"
        parts.append(Finding("limits", "warn", said, room.f_bavail * room.f_frsize, SHM_BYTES, "a container: --shm-size or a larger tmpfs"))
    return worst("limits", parts, f"open files {files:,}, /dev/shm {room.f_bavail * room.f_frsize >> 30 if room else 0:,} GiB free")


def memory(root: Path = Path("/")) -> Finding:
    """Host memory that is free, and what its error detection (EDAC) counted."""
    stats = dict(line.split(":", 1) for line in (text(root / "proc/meminfo") or "").splitlines() if ":" in line)
    free, total = (int(stats[name].split()[0]) << 10 if name in stats else None for name in ("MemAvailable", "MemTotal"))
    parts = []
    if free is not None and total is not None and free < total / 4:
        said = f"only {free >> 30} of {total >> 30} GiB are available"
        parts.append(Finding("memory", "warn", said, free, total // 4, "processes of an earlier job? `ps aux --sort -rss | head`"))
    controllers = sorted((root / "sys/devices/system/edac/mc").glob("mc[0-9]*"))
    for controller in controllers:
        count = text(controller / "ue_count")
        if count and count.isdecimal() and int(count):
            said = f"{controller.name}: {count} uncorrected memory errors"
            parts.append(Finding("memory", "bad", said, int(count), 0, "a failing DIMM: exclude the node"))
    known = "no uncorrected errors" if controllers else "its errors are not counted here (no EDAC)"
    return worst("memory", parts, f"{(free or 0) >> 30:,} of {(total or 0) >> 30:,} GiB available, {known}")


def ports(ranks: int = 1) -> Finding:
    """A port of this host's own name can be bound, and reached by that name: what a rendezvous does; of several `ranks` not on the loopback."""
    name = socket.gethostname()
    way = f"{name} must resolve to an address of this node (/etc/hosts or DNS)"
    try:
        address = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
    except OSError as failure:
        return Finding("ports", "warn", f"{name} does not resolve: {failure}", name, None, way)
    begin = time.perf_counter()
    try:
        with socket.create_server((address[4][0], 0), family=address[0]) as server:
            with socket.create_connection(server.getsockname()[:2], timeout=2), server.accept()[0]:
                pass
            port = server.getsockname()[1]
    except OSError as failure:
        return Finding("ports", "bad", f"no port of {name} ({address[4][0]}) can be bound and reached: {failure}", None, None, way)
    if ranks > 1 and loopback(str(address[4][0])) and not os.environ.get("GLOO_SOCKET_IFNAME"):
        said = f"{name} is {address[4][0]}, the loopback: gloo would tell it to other nodes, which cannot reach it"
        return Finding("ports", "warn", said, str(address[4][0]), None, f"{way}, or export GLOO_SOCKET_IFNAME")
    return Finding(
        "ports", "ok", f"{name} is {address[4][0]}, port {port} bound and reached in {1e3 * (time.perf_counter() - begin):.1f} ms"
    )


def loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def bindable(port: int) -> Finding:
    """The one port that a rendezvous was promised."""
    try:
        with socket.create_server(("", port)):
            return Finding("port", "ok", f"port {port} can be bound", port)
    except OSError as failure:
        return Finding(
            "port", "bad", f"port {port} cannot be bound: {failure.strerror}", port, None, "another job's? choose another MASTER_PORT"
        )


def cards(root: Path = Path("/"), nic_gbit_s: float | None = None, accelerators: int | None = None) -> Finding:
    """State, rate and error counters of InfiniBand and RoCE ports; without any, of Ethernet cards.

    A port slower than the site's is a fault only where the others do not give `accelerators` their `nic_gbit_s` each: else it is another card, for storage.
    """
    folder = root / "sys/class/infiniband"
    found = sorted(folder.glob("*/ports/*")) if folder.is_dir() else []
    if found:
        rates = [_rate(port) for port in found]
        usual = max(rates, default=0.0)
        fast = [
            rate
            for port, rate in zip(found, rates, strict=True)
            if "ACTIVE" in (text(port / "state") or "") and rate >= 0.99 * _wanted(usual, nic_gbit_s)
        ]
        enough = sum(fast) >= 0.99 * nic_gbit_s * accelerators if nic_gbit_s and accelerators else None
        parts = [part for port, rate in zip(found, rates, strict=True) for part in _port(port, rate, usual, nic_gbit_s, enough)]
        more = "; " + "; ".join(part.said for part in parts) if parts else ""
        return worst(
            "network cards",
            parts,
            f"{len(fast) if enough else len(found)} InfiniBand or RoCE ports active at {usual:g} Gbit/s, no errors{more}",
        )
    parts = list(_ethernet(root))
    well = "; ".join(part.said for part in parts) or "no network card but the loopback"
    finding = worst("network cards", parts, well)
    if finding.state == "ok":
        return Finding("network cards", "ok", f"no InfiniBand (/sys/class/infiniband); {well}")
    return finding


def _rate(port: Path) -> float:
    rate = (text(port / "rate") or "0").split()[0]
    return float(rate) if rate.replace(".", "", 1).isdecimal() else 0.0


def _wanted(usual: float, nic_gbit_s: float | None) -> float:
    """The rate of a port: the site's, or that of the fastest where the site does not say or none has it."""
    return nic_gbit_s if nic_gbit_s and nic_gbit_s <= usual * 1.01 else usual


def _port(port: Path, rate: float, usual: float, nic_gbit_s: float | None, enough: bool | None) -> Iterator[Finding]:
    name = f"{port.parent.parent.name}:{port.name}"
    state, physical = text(port / "state") or "unknown", text(port / "phys_state") or "unknown"
    way = "a cable, a transceiver or a switch port: exclude the node"
    if "ACTIVE" not in state:
        # A port that nobody cabled stays down by design on many nodes; where a site says how fast its ports are, only a rail of that speed is missed.
        kind = "warn" if "Disabled" in physical or "Polling" in physical else "bad"
        yield Finding("network cards", kind, f"{name} is {state} ({physical})", state, "4: ACTIVE", way)
        return
    wanted = _wanted(usual, nic_gbit_s)
    if rate < 0.99 * wanted and enough:
        yield Finding("network cards", "ok", f"{name} runs at {rate:g} Gbit/s, beside those that the GPUs need", rate, wanted)
    elif rate < 0.99 * wanted and (text(port / "link_layer") == "InfiniBand" or rate < 0.5 * wanted):
        # Where nobody says how many of which speed there should be, or no port has the site's, it may be a slower card.
        kind = "bad" if enough is False and wanted == nic_gbit_s else "warn"
        yield Finding("network cards", kind, f"{name} runs at {rate:g} Gbit/s, {wanted:g} are wanted", rate, wanted, way)
    elif nic_gbit_s and rate < 0.99 * nic_gbit_s:
        said = f"{name} runs at {rate:g} Gbit/s, the site says {nic_gbit_s:g}"
        yield Finding("network cards", "warn", said, rate, nic_gbit_s, "network.nic_gbit_s of the site, or the link")
    for counter, many in MANY.items():
        count = _count(port / "counters" / counter)
        if count > many:
            yield Finding("network cards", "warn", f"{name} counted {count:,} {counter} since it came up", count, many, way)


def _ethernet(root: Path) -> Iterator[Finding]:
    for card in sorted((root / "sys/class/net").glob("*")):
        if not (card / "device").exists():  # bridges, loopbacks, tunnels
            continue
        state, carrier = text(card / "operstate") or "unknown", text(card / "carrier")
        if state != "up" or carrier == "0":
            yield Finding("network cards", "ok", f"{card.name} is {state}")
            continue
        speed = text(card / "speed")
        shown = f" at {int(speed) / 1000:g} Gbit/s" if speed and speed.isdecimal() else ", its speed is not told"
        counts = {name: _count(card / "statistics" / name) for name in MANY_ETHERNET}
        bad = {name: count for name, count in counts.items() if count > MANY_ETHERNET[name]}
        for name, count in bad.items():
            yield Finding("network cards", "warn", f"{card.name} counted {count:,} {name}", count, 1000, "a cable or a transceiver")
        if not bad:
            yield Finding("network cards", "ok", f"{card.name} is up{shown}")


def _count(path: Path) -> int:
    found = text(path) or ""
    return int(found) if found.isdecimal() else 0


def counters(root: Path = Path("/")) -> dict[str, int]:
    """Every error counter of every network port now."""
    infiniband = ((port, port / "counters", MANY) for port in (root / "sys/class/infiniband").glob("*/ports/*"))
    ethernet = ((card, card / "statistics", MANY_ETHERNET) for card in (root / "sys/class/net").glob("*") if (card / "device").exists())
    return {
        f"{(port.parent.parent.name + ':' if port.parent.name == 'ports' else '') + port.name} {name}": _count(folder / name)
        for port, folder, names in (*infiniband, *ethernet)
        for name in names
    }


def grown(before: dict[str, int], root: Path = Path("/")) -> Finding:
    """What was counted since `before`, while the doctor worked: a healthy link counts nothing in a minute."""
    after = counters(root)
    more = {name: after[name] - count for name, count in before.items() if after.get(name, count) > count}
    if not before:
        return Finding("network errors", "untested", "no network card with counters")
    if not more:
        return Finding("network errors", "ok", f"none of {len(before)} error counters grew")
    shown = ", ".join(f"{name} +{count:,}" for name, count in sorted(more.items())[:8])
    return Finding("network errors", "warn", shown, sum(more.values()), 0, "a cable, a transceiver or a switch port: exclude the node")


def imported() -> Finding:
    """That torch can be imported, and how long it took: on a struggling file system a minute."""
    begin = time.perf_counter()
    torch = importlib.import_module("torch")
    seconds = time.perf_counter() - begin
    backends = [name for name, there in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)) if there]
    shown = f"torch {torch.__version__} ({', '.join(backends) or 'CPU only'}) imported in {seconds:.1f} s"
    if seconds > 20:
        way = "the interpreter's file system is slow: put the environment into a container image or on node-local storage"
        return Finding("torch", "warn", shown, round(seconds, 2), 20, way)
    return Finding("torch", "ok", shown)
