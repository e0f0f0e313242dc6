"""A published row's words, and its accelerators and links as a Cluster."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gigatrain.planning.estimate.cluster import Cluster, Level
from gigatrain.planning.hardware import CHIPS

# Of the memory as sold, what torch.cuda reports: 79.15 of 80 GiB on an A100, 79.1 on an H100, 139.8 of 141 on an H200, 178.4 of 180 on a B200.
VISIBLE = 0.99
# One direction, GB/s of one port, by the name of its generation.
_PORTS = {
    "xdr": 100.0,
    "ndr400": 50.0,
    "ndr200": 25.0,
    "ndr": 50.0,
    "hdr200": 25.0,
    "hdr100": 12.5,
    "hdr": 25.0,
    "edr": 12.5,
    "omnipath": 12.5,
    "slingshot": 25.0,
}
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
        elif "NVL" in name and (memory or 0) > 90:
            row.assumed.append("chip h100: the H100 NVL's rates are unknown")
        elif memory is not None and 60 < memory < 70:
            found = "h100-64"
    if found.startswith("a100") and "PCIE" in name:
        row.assumed.append("chip a100: the PCIe card has its rates, with less power and no switch between cards")
    return found, name


def _nic(row: Row, chip: str, per_node: int) -> float:
    """GB/s of one direction that one rank has between nodes."""
    text = row.text("interconnect_inter").replace("omni-path", "omnipath").replace("gbps", "gb/s_bit").replace("gbit/s", "gb/s_bit")
    raw = str(row.row.get("interconnect_inter") or "")
    if "compute:" in text:
        text = re.split(r"management:|storage:", text.split("compute:")[1])[0]
        raw = text
    elif re.search(r"infiniband|\bib\b|\broce\b", text):  # beside a network of management, which a list may name first
        text, raw = (
            ",".join(part for part in re.split(r"[,;]", said) if re.search(r"infiniband|\bib\b|\broce\b", part.lower()))
            for said in (text, raw)
        )
    if text:
        if match := re.search(r"(\d+(?:\.\d+)?)\s*(t|g)b/s_bit\s*(?:/|per)\s*(node|gpu|gcd)", text):
            total = float(match[1]) / 8 * (1000 if match[2] == "t" else 1)
            return total / (per_node if match[3] == "node" else 1)
        count = re.search(r"(\d+)\s*x\b", text)
        ports = int(count[1]) if count else None
        speed = None
        if match := re.search(r"(\d+(?:\.\d+)?)\s*GB/s", raw):
            speed = float(match[1])
        elif match := re.search(r"(\d{2,4})\s*(?:gb/s_bit|gb/s|gb/sec|g\b|gbe)", text):
            speed = float(match[1]) / 8
        if speed is None or "omnipath" in text or "slingshot" in text:
            speed = speed or next((value for word, value in _PORTS.items() if word in text.replace(" ", "")), None)
        if speed is not None and ports:
            return speed * ports / per_node
        if speed is not None:
            if speed * 8 >= 800:  # a node's, as EFA's 3,200 Gbit/s
                return speed / per_node
            return speed if speed <= 50 and not re.search(r"ethernet|tcp", text) else speed / per_node
    declared = CHIPS[chip].nic_gbit_s.value or {"h100-pcie": 200.0}.get(chip, 200.0)
    each = declared / 8 / CHIPS[chip].devices
    row.assumed.append(f"{each:g} GB/s between nodes for each rank: the row names no speed, {CHIPS[chip].name} nodes mostly have it")
    return each


def cluster_of(row: Row, chip: str, name: str, ranks: int) -> Cluster:
    """Levels count ranks, and their rates are of one rank; of an MI250X each device is one."""
    devices, found = CHIPS[chip].devices, CHIPS[chip]
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
    elif match := re.search(r"(\d+(?:\.\d+)?)\s*gb/s", intra):
        said = float(match[1]) / (1 if "unidir" in intra or "one direction" in intra else 2)
        link = min(link, said / (devices if chip == "mi250x" and said > link else 1))
    if "H800" in name or "A800" in name:
        link = min(link, 200.0)
        row.assumed.append(f"{name}: its sister's rates, with 200 GB/s of NVLink")
    domain = 72 if chip in ("gb200", "gb300") and "nvl72" in (intra + name.lower()) else per_node
    levels = [Level("scale_up", min(domain, ranks) if ranks > domain else max(1, ranks), link)]
    if ranks > domain:
        levels[0] = Level("scale_up", domain, link)
        nic = _nic(row, chip, per_node)
        rail = max(_RAIL * per_node, domain)
        if ranks > rail:
            levels.append(Level("rail", rail, nic))
        levels.append(Level("spine" if ranks > rail else "rail", ranks, nic))
    memory = row.number("gpu_mem_gb") or (found.hbm_bytes.value or 0) / devices / 2**30
    return Cluster(
        chip, max(1, ranks // devices), max(1, per_node // devices), tuple(levels), int(memory * 2**30 * VISIBLE) if memory else None,
        cap_watts=row.number("gpu_power_cap_w"), assumed=tuple(row.assumed),
    )  # fmt: skip
