"""Accelerators, nodes and racks: rates, memory, power and links, each with how sure it is and where it was read. Frozen, free of torch.

The one home of what an accelerator is: attention (by architecture), memory (by bytes of a device), sites (by name). A number nobody published is unknown and
never guessed. Rates are dense, in TFLOP/s; links are one direction; a package of two devices (MI250X) is one accelerator and two ranks.
"""

import re
from typing import get_args

from gigatrain import load
from gigatrain.config import Section
from gigatrain.errors import SiteError
from gigatrain.site import UNKNOWN, Accelerator, Basis, Figure, Site

H100_BF16 = 989.0  # TFLOP/s; what one H100-equivalent is


class Chip(Section):
    """One accelerator as it is bought: a package, of one device or two."""

    id: str
    name: str
    architecture: str | None  # NVIDIA's compute capability, AMD's name in its compiler
    devices: int = 1  # that torch sees
    bf16: Figure = UNKNOWN
    fp8: Figure = UNKNOWN
    fp4: Figure = UNKNOWN
    reached_bf16: Figure = UNKNOWN  # by large products, of bf16
    reached_fp8: Figure = UNKNOWN
    hbm_bytes: Figure = UNKNOWN
    hbm_tbyte_s: Figure = UNKNOWN
    watts: Figure = UNKNOWN  # the most that it may draw as sold
    scale_up_gbyte_s: Figure = UNKNOWN
    scale_up_accelerators: Figure = UNKNOWN
    nic_gbit_s: Figure = UNKNOWN
    note: str = ""

    def tflops(self, dtype: str) -> Figure:
        """The dense rate of `bf16`, `fp8` or `fp4`."""
        return {"bf16": self.bf16, "fp8": self.fp8, "fp4": self.fp4}[dtype]

    @property
    def h100e(self) -> float | None:
        """H100-equivalents: the dense bf16 rate over 989 TFLOP/s."""
        return None if self.bf16.value is None else self.bf16.value / H100_BF16


class Machine(Section):
    """A node or a rack as it is bought or was measured: `max_watts` by its maker, `training_watts` of a metered training run."""

    name: str
    chip: Accelerator
    accelerators: int
    max_watts: Figure = UNKNOWN
    training_watts: Figure = UNKNOWN
    peak_watts: Figure = UNKNOWN  # the highest single reading


_MLE = "stas00/ml-engineering compute/accelerator/README.md at 744d01e1 (2026-08-22)"
_UNITS = {"hbm_bytes": 2.0**30}  # memory is sold in GB of 2^30 bytes: nvidia-smi shows 97,871 MiB of a GH200's 96 GB, 99.6 %


def _chip(
    id: str, name: str, architecture: str | None, source: str, *, assumed: dict[str, tuple[float, str]] | None = None,
    sources: dict[str, str] | None = None, measured: dict[str, float] | None = None, devices: int = 1, note: str = "", **declared: float,
) -> Chip:  # fmt: skip
    """A chip from plain numbers: `declared` ones share `source` but for `sources`; of `assumed` ones each says why; what is not named is unknown."""
    found = {key: _figure(key, value, "declared", (sources or {}).get(key, source)) for key, value in declared.items()}
    found |= {key: _figure(key, value, "assumed", why) for key, (value, why) in (assumed or {}).items()}
    found |= {key: _figure(key, value, "measured", f"MAMF, large products: {_MLE}") for key, value in (measured or {}).items()}
    return Chip(id=id, name=name, architecture=architecture, devices=devices, note=note, **found)  # type: ignore[arg-type]


def _figure(key: str, value: float, basis: Basis, source: str) -> Figure:
    return Figure(value=value * _UNITS.get(key, 1), basis=basis, source=source)


_RECALLED = "recalled, not re-read"
_CHIPS = (
    _chip(
        "a100", "NVIDIA A100 SXM4 80 GB", "sm_80", f"{_MLE}, citing nvidia.com a100",
        bf16=312, hbm_bytes=80, hbm_tbyte_s=2.0, watts=400, scale_up_gbyte_s=300, scale_up_accelerators=8,
        measured={"reached_bf16": 271.2}, assumed={"nic_gbit_s": (200, f"DGX A100 has 8 x HDR; {_RECALLED}")},
        note="NVML's power reading is instantaneous on it, and a mean of 1 s on what came later",
    ),
    _chip(
        "a100-40", "NVIDIA A100 SXM4 40 GB", "sm_80", f"as the A100 80 GB: {_MLE}",
        bf16=312, watts=400, scale_up_gbyte_s=300, scale_up_accelerators=8,
        assumed={
            "hbm_bytes": (40, f"NVIDIA's A100 data sheet, {_RECALLED}"), "hbm_tbyte_s": (1.555, f"NVIDIA's A100 data sheet, {_RECALLED}"),
            "nic_gbit_s": (200, f"DGX A100 has 8 x HDR; {_RECALLED}"),
        },
    ),
    _chip(
        "a100-64", "NVIDIA A100 custom 64 GB (Leonardo)", "sm_80", "leonardo-supercomputer.cineca.eu/hpc-system",
        hbm_bytes=64, scale_up_accelerators=4, nic_gbit_s=100,
        assumed={"bf16": (312, "the A100's, a floor: this one has more multiprocessors (arXiv 2307.16885, recalled)")},
    ),
    _chip(
        "mi250x", "AMD Instinct MI250X", "gfx90a", f"{_MLE}, citing amd.com mi250x", devices=2,
        bf16=383, hbm_bytes=128, hbm_tbyte_s=3.28, watts=500, scale_up_gbyte_s=350, scale_up_accelerators=4, nic_gbit_s=200,
        sources={
            "scale_up_accelerators": "LUMI user guide, hardware/lumig.md: 4 packages (8 devices) a node",
            "nic_gbit_s": "LUMI user guide, hardware/network.md: one Slingshot-11 endpoint of 200 Gbit/s for each package",
            "scale_up_gbyte_s": "stas00/ml-engineering network/README.md at 744d01e1",
        },
        note="500 W is its TDP, 560 W its peak; power is reported on the even device only",
    ),
    _chip(
        "h100", "NVIDIA H100 SXM5 80 GB", "sm_90", f"{_MLE}, citing nvidia.com h100",
        bf16=989, fp8=1979, hbm_bytes=80, hbm_tbyte_s=3.35, watts=700, scale_up_gbyte_s=450, scale_up_accelerators=8, nic_gbit_s=400,
        measured={"reached_bf16": 794.5, "reached_fp8": 1402.6},
    ),
    _chip(
        "h100-64", "NVIDIA H100 SXM5 64 GB (MareNostrum 5)", "sm_90", "top500.org/system/180238 and bsc.es, quoted in a public repository",
        hbm_bytes=64, scale_up_accelerators=4,
        assumed={
            "bf16": (989, "the H100 SXM's"), "fp8": (1979, "the H100 SXM's"), "nic_gbit_s": (200, f"4 x NDR200 a node, {_RECALLED}"),
        },
    ),
    _chip(
        "h100-pcie", "NVIDIA H100 PCIe 80 GB", "sm_90", _MLE, bf16=756, fp8=1513, hbm_bytes=80, hbm_tbyte_s=2.0,
        assumed={"watts": (350, f"NVIDIA's data sheet, {_RECALLED}"), "scale_up_accelerators": (2, f"a bridge between pairs, {_RECALLED}")},
    ),
    _chip(
        "h100-nvl", "NVIDIA H100 NVL 94 GB", "sm_90", _MLE, hbm_bytes=94, hbm_tbyte_s=3.9, watts=400, scale_up_accelerators=2,
        note="rates unknown: the source says the H100's, NVIDIA's own sheet 835 in bf16 (recalled)",
    ),
    _chip(
        "gh200", "NVIDIA GH200 96 GB", "sm_90", _MLE,
        bf16=989, fp8=1979, hbm_bytes=96, hbm_tbyte_s=4.0, watts=1000, scale_up_gbyte_s=450, scale_up_accelerators=4, nic_gbit_s=200,
        note="watts are the module's, settable from 450 W (recalled): JUPITER runs it at 680 W, Alps at 660 W; JUPITER's nodes have no NVLink switch",
    ),
    _chip(
        "gh200-144", "NVIDIA GH200 144 GB", "sm_90", _MLE,
        bf16=989, fp8=1979, hbm_bytes=141, hbm_tbyte_s=4.8, watts=900, scale_up_gbyte_s=450, nic_gbit_s=400,
        measured={"reached_bf16": 828.6, "reached_fp8": 1535.0}, note="141 of its 144 GB are usable; watts are the module's",
    ),
    _chip(
        "h200", "NVIDIA H200 SXM 141 GB", "sm_90", f"{_MLE}, citing nvidia.com h200",
        bf16=989, fp8=1979, hbm_bytes=141, hbm_tbyte_s=4.8, watts=700, scale_up_gbyte_s=450, scale_up_accelerators=8, nic_gbit_s=400,
        measured={"reached_bf16": 794.5, "reached_fp8": 1453.4},
    ),
    _chip(
        "b200", "NVIDIA B200 SXM 180 GB", "sm_100", f"{_MLE}, citing NVIDIA's DGX B200 data sheet",
        bf16=2250, fp8=4500, fp4=9000, hbm_bytes=180, hbm_tbyte_s=8.0, watts=1000, scale_up_gbyte_s=900, scale_up_accelerators=8, nic_gbit_s=400,
        sources={"watts": "docs.nvidia.com/dgx/dgxb200-user-guide/power-capping.html: at most 1000 W, 700 W as delivered in a DGX"},
        measured={"reached_bf16": 1745.0, "reached_fp8": 3432.5},
    ),
    _chip(
        "gb200", "NVIDIA GB200 (one GPU of an NVL72)", "sm_100", f"{_MLE}, citing NVIDIA's GB200 NVL72 page and Mission Control FAQ",
        bf16=2500, fp8=5000, fp4=10000, hbm_bytes=186, hbm_tbyte_s=8.0, watts=1200, scale_up_gbyte_s=900, scale_up_accelerators=72,
        measured={"reached_bf16": 1822.0, "reached_fp8": 3615.6}, assumed={"nic_gbit_s": (400, f"ConnectX-7, {_RECALLED}")},
    ),
    _chip(
        "b300", "NVIDIA B300 SXM 288 GB", "sm_103", f"{_MLE}, citing NVIDIA's DGX B300 data sheet",
        bf16=2250, fp8=4500, fp4=12600, hbm_bytes=288, hbm_tbyte_s=8.0, watts=1000, scale_up_gbyte_s=900, scale_up_accelerators=8, nic_gbit_s=800,
        sources={"watts": "docs.nvidia.com/dgx/dgxb300-user-guide/power-capping.html; HGX boards up to 1100 to 1400 W by their makers"},
        measured={"reached_bf16": 1769.0, "reached_fp8": 3353.3}, note="270 GB are usable, as MLPerf v5.1 submissions name it",
    ),
    _chip(
        "gb300", "NVIDIA GB300 (one GPU of an NVL72)", "sm_103", f"{_MLE}, citing NVIDIA's GB300 NVL72 page and Mission Control FAQ",
        bf16=2500, fp8=5000, fp4=15000, hbm_bytes=288, hbm_tbyte_s=8.0, watts=1400, scale_up_gbyte_s=900, scale_up_accelerators=72, nic_gbit_s=800,
        note="the superchip's module is limited to 2900 W (NVIDIA/k8s-test-infra#676)",
    ),
    _chip(
        "mi300x", "AMD Instinct MI300X", "gfx942", f"{_MLE}, citing amd.com mi300x",
        bf16=1307, fp8=2615, hbm_bytes=192, hbm_tbyte_s=5.3, watts=750, scale_up_gbyte_s=448, scale_up_accelerators=8, nic_gbit_s=400,
        measured={"reached_bf16": 668.4},
    ),
    _chip(
        "mi325x", "AMD Instinct MI325X", "gfx942", f"{_MLE}, citing amd.com mi325x",
        bf16=1307, fp8=2615, hbm_bytes=256, hbm_tbyte_s=6.0, watts=1000, scale_up_gbyte_s=448, scale_up_accelerators=8, nic_gbit_s=400,
        measured={"reached_bf16": 784.9},
    ),
    _chip(
        "mi350x", "AMD Instinct MI350X", "gfx950", _MLE,
        hbm_bytes=288, hbm_tbyte_s=8.0, watts=1000, scale_up_gbyte_s=535.5, scale_up_accelerators=8, nic_gbit_s=400,
        assumed={
            "bf16": (2300, "a quarter of its fp4 rate"), "fp8": (4600, "half of its fp4 rate"),
            "fp4": (9200, "half of 18.45 PFLOP/s, which Tom's Hardware gives with sparsity"),
        },
    ),
    _chip(
        "mi355x", "AMD Instinct MI355X", "gfx950", f"{_MLE}, citing amd.com mi355x",
        bf16=2500, fp8=5000, fp4=10100, hbm_bytes=288, hbm_tbyte_s=8.0, watts=1400, scale_up_gbyte_s=535.5, scale_up_accelerators=8, nic_gbit_s=400,
        measured={"reached_bf16": 1565.0},
    ),
    _chip(
        "mi430x", "AMD Instinct MI430X", None, "press of November 2025 on Alice Recoque (AMD, Eviden, GENCI); etn.fi, pcmasters.de",
        hbm_bytes=432, hbm_tbyte_s=19.6,
        note="rates and power are not published; AMD's 20 PFLOP/s of fp8 are another chip's (MI455X)",
    ),
    _chip(
        "mi455x", "AMD Instinct MI455X", None, f"{_MLE}, citing amd.com mi455x",
        hbm_bytes=432, hbm_tbyte_s=23.3, scale_up_gbyte_s=1800, scale_up_accelerators=72, nic_gbit_s=2400,
        assumed={
            "bf16": (5000, f"half of fp8: {_MLE}"), "fp8": (10000, f"AMD's number halved, which does not say whether it is sparse: {_MLE}"),
            "fp4": (20000, f"AMD's number halved, which does not say whether it is sparse: {_MLE}"),
        },
    ),
    _chip(
        "rubin", "NVIDIA Rubin (one GPU of a VR NVL72)", None, f"{_MLE}, citing nvidia.com vera-rubin-nvl72, before its release",
        bf16=4000, fp8=17500, fp4=35000, hbm_bytes=288, hbm_tbyte_s=22.0, scale_up_gbyte_s=1800, scale_up_accelerators=72, nic_gbit_s=1600,
        note="power is not published; 1800 to 2300 W unofficially",
    ),
)  # fmt: skip
CHIPS: dict[str, Chip] = {chip.id: chip for chip in _CHIPS}
ARCHITECTURES: dict[str, str | None] = {chip.id: chip.architecture for chip in _CHIPS}


def _said(value: float, basis: Basis, source: str) -> Figure:
    return Figure(value=value, basis=basis, source=source)


_SMC = "mlcommons/training_results_v4.0, SMC's power logs (own arithmetic)"
MACHINES = (
    Machine(name="DGX H100", chip="h100", accelerators=8, max_watts=_said(10_200, "declared", "NVIDIA DGX H100/H200 user guide, by a secondary page")),
    Machine(name="DGX H200", chip="h200", accelerators=8, max_watts=_said(10_200, "declared", "NVIDIA DGX H100/H200 user guide, by a secondary page")),
    Machine(
        name="SMC 8 x H100, immersed, GPT-3 175B on 64 nodes", chip="h100", accelerators=8,
        training_watts=_said(6_850, "measured", f"{_SMC}: AC; DC 6,740"), peak_watts=_said(7_554, "measured", _SMC),
    ),
    Machine(
        name="SMC 8 x H100, immersed, Llama 2 70B LoRA on one node", chip="h100", accelerators=8,
        training_watts=_said(7_158, "measured", f"{_SMC}: AC; DC 6,955; on 8 nodes DC 5,720, on 64 DC 5,009"),
    ),
    Machine(
        name="Dell XE9680 8 x H100, air, Llama 2 70B LoRA", chip="h100", accelerators=8,
        training_watts=_said(7_280, "measured", "mlcommons/training_results_v4.1, Dell's power logs (own arithmetic): means of 6,965 to 7,280"),
        peak_watts=_said(9_944, "measured", "mlcommons/training_results_v4.1, Dell's power logs"),
    ),
    Machine(name="DGX B200", chip="b200", accelerators=8, max_watts=_said(14_300, "declared", "docs.nvidia.com/dgx/dgxb200-user-guide")),
    Machine(
        name="Lenovo SR780a V3 8 x B200, Llama 2 70B LoRA", chip="b200", accelerators=8,
        training_watts=_said(9_580, "measured", "mlcommons/training_results_v5.0, Lenovo's power logs (own arithmetic)"),
        peak_watts=_said(10_096, "measured", "mlcommons/training_results_v5.0, Lenovo's power logs"),
    ),
    Machine(name="GB200 NVL72", chip="gb200", accelerators=72, max_watts=_said(132_000, "declared", "vendors' and trade pages: 120 kW typical, 132 at most")),
    Machine(
        name="GB300 NVL72", chip="gb300", accelerators=72,
        max_watts=_said(135_000, "declared", f"18 x (4 x 1.4 + 1.0 + 0.9) kW: NVIDIA Mission Control 2.3.0 FAQ by {_MLE}"),
    ),
    Machine(name="Vera Rubin NVL72", chip="rubin", accelerators=72, max_watts=_said(230_000, "declared", "regantih.github.io: 190 kW in Max-Q; secondary")),
    Machine(name="HGX Rubin NVL8", chip="rubin", accelerators=8, max_watts=_said(24_000, "declared", "Compal by ngtimes; secondary")),
    Machine(
        name="JUPITER, BullSequana XH3000 node of 4 x GH200", chip="gh200", accelerators=4,
        max_watts=_said(2_720, "declared", "apps.fz-juelich.de/jsc/hps/jupiter/configuration.html: 4 modules of 680 W, and nothing else"),
    ),
)  # fmt: skip
# What 8-GPU nodes drew in training over their nameplate: 6.85 of 10.2 kW (H100), 9.58 of 14.3 kW (B200).
OF_NAMEPLATE = _said(0.67, "measured", "MLPerf Training power logs over NVIDIA's nameplates, H100 and B200 alike")
FABRIC_WATTS_H100 = _said(116, "declared", f"{_SMC}: 59,570 W of switches at their most for 512 GPUs of 400 Gbit/s")


def chip(name: str) -> Chip:
    """The accelerator of that id; raises SiteError, with the nearest one, for an id that the table does not have."""
    if name not in CHIPS:
        raise SiteError(f"no accelerator is called {name!r}{load.nearest(name, CHIPS)} Known: {', '.join(get_args(Accelerator))}.")
    return CHIPS[name]


_NETWORKS = ("slingshot", "omni-path", "roce", "efa")  # what is none of them is taken for InfiniBand


def network_kind(words: str) -> str:
    """`.slingshot` of a network's name, as collectives.py calls its constants; empty where the name says none that has constants of its own."""
    return next((f".{name.replace('-', '')}" for name in _NETWORKS if re.search(rf"\b{name}", words.lower())), "")


# Of the memory as sold, what torch.cuda reports: 79.15 of 80 GiB on an A100, 79.1 on an H100, 139.8 of 141 on an H200, 178.4 of 180 on a B200.
VISIBLE = 0.99


def visible_bytes(site: Site) -> int | None:
    """Bytes of a rank that torch sees: what the site says, else VISIBLE of the accelerator's; None where neither says."""
    found, _ = memory_bytes(site)
    return found if found is None or site.memory_bytes is not None else int(VISIBLE * found)


def memory_bytes(site: Site) -> tuple[int | None, str]:
    """`(bytes that one rank may fill, where they are from)`: the site's own, else the accelerator's by device; `(None, "")` where neither says.

    It is an upper bound, by which plan() refuses: what the driver, NCCL and fragments take of it is not taken off, so that nothing is refused that would
    fit. Forecasts and searches fill `visible_bytes`.
    """
    if site.memory_bytes is not None:
        return site.memory_bytes, "the site says so"
    if site.accelerator is None or site.device != "cuda":
        return None, ""
    found = chip(site.accelerator)
    if found.hbm_bytes.value is None:
        return None, ""
    part = f", one of the {found.devices} devices of a package" if found.devices > 1 else ""
    return int(found.hbm_bytes.value / found.devices), f"an {found.name}{part}; {found.hbm_bytes.basis}: {found.hbm_bytes.source}"
