"""A published row's words, and its accelerators and links as a Cluster."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gigatrain.planning.estimate.cluster import Cluster, Level
from gigatrain.planning.hardware import CHIPS, VISIBLE

_RAIL = 32  # nodes that one rail of leaf switches joins (64 ports, half of them up)


class Refused(Exception):
    """A row that cannot be expressed; the message is the reason."""


@dataclass(slots=True)
class Row:
    """A row with its words in lower case, and what was taken for want of a word."""

    row: Mapping[str, Any]
    assumed: list[str] = field(default_factory=list)

    def number(self, name: str) -> float | None:
        value = self.row.get(name)
        if value is None or value == "" or isinstance(value, bool):
            return None
        try:
            found = float(value)
        except (TypeError, ValueError):
            raise Refused(f"{name} is {value!r}, which is no number") from None
        return found if math.isfinite(found) else None

    def whole(self, name: str, default: int | None = None, why: str = "") -> int:
        found = self.number(name)
        if found is None:
            if default is None:
                raise Refused(f"the row has no {name}, and nothing implies it")
            if why:
                self.assumed.append(f"{name} {default}: {why}")
            return default
        if found < 0 or found != int(found):
            raise Refused(f"{name} is {found:g}, and must be a whole number of 0 or more")
        return int(found)

    def text(self, *names: str) -> str:
        return " | ".join(str(self.row[name]) for name in names if self.row.get(name) is not None).lower()

    def flag(self, name: str) -> bool | None:
        value = self.row.get(name)
        if isinstance(value, bool) or value is None:
            return value
        return str(value).lower() in ("true", "yes", "on", "1")


_CHIPS: tuple[tuple[str, str], ...] = (
    (r"GB300", "gb300"), (r"GB200", "gb200"), (r"B300", "b300"), (r"B200", "b200"), (r"GH200", "gh200"), (r"H200", "h200"), (r"H800", "h100"),
    (r"H100", "h100"), (r"A800", "a100"), (r"A100", "a100"), (r"MI250", "mi250x"), (r"MI300X", "mi300x"), (r"MI325", "mi325x"), (r"MI355", "mi355x"),
    (r"MI350", "mi350x"),
)  # fmt: skip


def chip_of(row: Row) -> tuple[str, str]:
    """`(id in hardware.py, the row's own name)`."""
    name = str(row.row.get("gpu") or "").upper()
    memory = row.number("gpu_mem_gb")
    if not name:
        raise Refused("the row names no gpu")
    found = next((chip for pattern, chip in _CHIPS if re.search(pattern, name.replace(" ", ""))), None)
    if found is None:
        raise Refused(f"gpu {row.row['gpu']!r} is not in planning/hardware.py, and none there is nearly the same")
    if found == "a100" and memory is not None and memory < 70:
        found = "a100-40" if memory < 50 else "a100-64"
    if found == "a100" and memory is None and "40" in name:
        found = "a100-40"
    if found == "gh200" and (memory or 0) > 100:
        found = "gh200-144"
    if found == "h100":
        if "PCIE" in name:
            found = "h100-pcie"
        elif re.search(r"NVL(?!INK)", name):
            raise Refused(f"gpu {row.row['gpu']!r}: the rates of the {CHIPS['h100-nvl'].name} are unknown (planning/hardware.py)")
        elif memory is not None and 60 < memory < 70:
            found = "h100-64"
    if found.startswith("a100") and "PCIE" in name:
        row.assumed.append("chip a100: the PCIe card has its rates, with less power and no switch between cards")
    return found, name


# A rate: GB/s are bytes and everything else bits, so that the case of its letters counts.
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:(GB/s|GBps|GByte/s)|(T?)G?b(?:it)?(?:ps|/s|/[Ss]ec|E)\b|G\b)")
_PORTS = {
    "xdr": 100.0,
    "ndr200": 25.0,
    "ndr": 50.0,
    "hdr100": 12.5,
    "hdr": 25.0,
    "edr": 12.5,
    "omnipath": 12.5,
    "slingshot": 25.0,
}  # GB/s of one, by name


def _nic(row: Row, chip: str, per_node: int) -> float:
    """GB/s of one direction that one rank has between nodes: of the fastest fabric that the row names."""
    parts = re.split(r"[,;|]", str(row.row.get("interconnect_inter") or ""))
    found = [speed for part in parts if (speed := fabric(part, per_node)) is not None and not re.search(r"(?i)storage|management", part)]
    if found:
        declared = CHIPS[chip].nic_gbit_s.value
        return min(max(found), declared / 8 / CHIPS[chip].devices) if CHIPS[chip].devices > 1 and declared else max(found)
    each = (CHIPS[chip].nic_gbit_s.value or 200.0) / 8 / CHIPS[chip].devices
    row.assumed.append(f"{each:g} GB/s between nodes for each rank: the row names no speed, {CHIPS[chip].name} nodes mostly have it")
    return each


def fabric(text: str, per_node: int) -> float | None:
    """GB/s of a rank: `8x50 GB/s`, `8x HDR200`, `RoCE 1600 Gbps/node`, `EFA 3200 Gbps`, `4x Omni-Path 100`, `2x100 GbE`; None where nothing says."""
    rate, words = _RATE.search(text), re.sub(r"[\s-]", "", text.lower())
    count = re.search(r"(\d+)\s*[x×]", text)
    if rate:
        port = float(rate[1]) if rate[2] else float(rate[1]) / 8 * (1000 if rate[3] else 1)
    else:
        port = next((speed for word, speed in _PORTS.items() if word in words), None)
    if port is None:
        return None
    of_node = re.search(r"/node|pernode", words)
    adjacent = not rate or (count and re.fullmatch(r"\s*", text[count.end() : rate.start()]))
    if count and count.start() < (rate.start() if rate else len(text)) and (adjacent or not of_node):
        return port * int(count[1]) / per_node
    if re.search(r"(?:/|per)(?:gpu|gcd|rank|accelerator)", words):
        return port
    # Without a count: a node's where the row says so, where no port is so fast, or where it is Ethernet; else each rank has a port of its own.
    return port / per_node if port > 100 or of_node or re.search(r"ethernet|tcp|gbe", words) else port


_SCALE_UP = re.compile(r"(?:(\d+)\s*[x×]\s*)?(\d+(?:\.\d+)?)\s*gb/s")
_ONE_WAY = re.compile(r"unidir|one[ -](?:direction|way)|(?:per|each)[ -](?:direction|way)|/direction")
_RACKED = ("gb200", "gb300")

_NETWORKS = (
    (r"infiniband|\b[hnx]dr|\bib\b", ""), (r"\befa\b|\baws\b|elastic fabric", ".efa"), (r"omni-?\s?path|\bopa\b", ".omnipath"), (r"slingshot", ".slingshot"),
    (r"roce|ethernet|spectrum|gbe\b|tcp", ".roce"),
)  # fmt: skip


def _network(text: str) -> str:
    """How collectives.py calls a network, behind a level's name; empty for InfiniBand and for what is not said."""
    return next((kind for pattern, kind in _NETWORKS if re.search(pattern, text.lower())), "")


def _link(row: Row, intra: str, sold: float, devices: int) -> float:
    """GB/s of one direction that a rank has within a node, of `sold`: half of what the row says, or all where it says that of one direction."""
    rates = list(_SCALE_UP.finditer(intra))
    if not rates:
        return sold
    told = intra[: rates[1].start()] if len(rates) > 1 else intra  # the first rate, with the words around it
    total = float(rates[0][2]) * int(rates[0][1] or 1)
    # Links are counted by the rate of one direction as often as by both: 12 x 25 GB/s are the A100's 300.
    one_way = bool(_ONE_WAY.search(told)) or (rates[0][1] is not None and math.isclose(total, sold, rel_tol=0.05))
    said = total if one_way else total / 2
    said /= devices if devices > 1 and said > sold else 1
    if said < sold / 4 and "pcie" not in intra:
        row.assumed.append(
            f"{sold:g} GB/s between the ranks of a node, as sold: {intra!r} is less than a quarter of it, a link's and not a rank's"
        )
        return sold
    return min(sold, said)


def _domain(row: Row, chip: str, words: str, per_node: int) -> int:
    """Ranks of one scale-up domain: a node's, but of chips that are sold by the rack a rack's, unless the row says that another one is."""
    if chip not in _RACKED:
        return per_node
    if said := re.search(r"nvl[\s-]?(\d+)(?:\s*x\s*(\d+))?", words):
        return max(1, int(said[1]) * int(said[2] or 1))
    rack = int(CHIPS[chip].scale_up_accelerators.value or per_node)
    row.assumed.append(f"{rack} accelerators in one NVLink domain: the row does not say otherwise")
    return max(rack, per_node)


def cluster_of(row: Row, chip: str, name: str, ranks: int) -> Cluster:
    """Levels count ranks, and their rates are of one rank; of an MI250X each device is one."""
    devices, found, before = CHIPS[chip].devices, CHIPS[chip], len(row.assumed)
    usual = 4 if chip in ("gb200", "gb300", "gh200", "a100-64", "h100-64") else 4 * devices if chip == "mi250x" else 8
    per_node = row.whole("gpus_per_node", usual)
    if not 1 <= per_node <= 1024:
        raise Refused(f"gpus_per_node is {per_node}")
    intra = row.text("interconnect_intra")
    link = (found.scale_up_gbyte_s.value or (300.0 if chip.startswith("a100") else 450.0)) / devices
    pcie = "PCIE" in name or ("pcie" in intra and "nvlink" not in intra)
    if pcie:
        link = 25.0
        row.assumed.append("25 GB/s between the cards of a node: PCIe 4.0 as reached")
    else:
        link = _link(row, intra, link, devices)
    if "H800" in name or "A800" in name:
        link = min(link, 200.0)
        row.assumed.append(f"{name}: its sister's rates, with 200 GB/s of NVLink")
    domain = _domain(row, chip, intra + " " + name.lower(), per_node)
    levels = [Level("scale_up", min(domain, ranks) if ranks > domain else max(1, ranks), link)]
    if ranks > domain:
        levels[0] = Level("scale_up", domain, link)
        nic = _nic(row, chip, per_node)
        rail, kind = max(_RAIL * per_node, domain), _network(str(row.row.get("interconnect_inter") or ""))
        if ranks > rail:
            levels.append(Level("rail" + kind, rail, nic))
        levels.append(Level(("spine" if ranks > rail else "rail") + kind, ranks, nic))
    cap, stated = row.number("gpu_power_cap_w"), row.number("gpu_mem_gb") or 0
    if chip == "h100" and cap is None and 90 < stated < 100:
        cap = 500.0
        row.assumed.append("500 W: what pages of H100s of 96 GB say of theirs (pytorch/torchtitan benchmarks/llama3_h100_*.md)")
    if chip == "b200" and cap is None and not re.match(r"nvidia|mlcommons", row.text("source_repo")):
        cap = 700.0
        row.assumed.append(
            "700 W, as a DGX B200 is delivered (docs.nvidia.com/dgx/dgxb200-user-guide/power-capping.html), where others than NVIDIA name no cap"
        )
    whole = (found.hbm_bytes.value or 0) / 2**30  # of the package as sold
    memory = stated or whole / devices
    if devices > 1 and whole and stated >= 0.95 * whole:
        memory = stated / devices
        row.assumed.append(f"{memory:g} GB of each of a package's {devices} devices: the row says {stated:g}, which is the package's")
    return Cluster(
        chip, max(1, ranks // devices), max(1, per_node // devices), tuple(levels), int(memory * 2**30 * VISIBLE) if memory else None,
        cap_watts=cap, assumed=tuple(row.assumed[before:]),
    )  # fmt: skip
