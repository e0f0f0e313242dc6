"""Seconds of one operation on one device: the greater of its arithmetic and its bytes, each at what that shape reaches there, and a kernel's own latency.

A product: the sold rate x the share that a large one holds (constants.py; capped by what hardware.py has as reached) x what its shape keeps of it: tiles that
are cut off at its edges, a last wave of tiles that leaves multiprocessors idle, and a depth too short to hide a tile's beginning and end. Rates of hardware.py
are a package's; a rank of an MI250X is half of one.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2

from gigatrain.errors import PlanError
from gigatrain.planning import hardware
from gigatrain.planning.estimate.habits import Cost, Habits
from gigatrain.planning.estimate.work import Op

# Multiprocessors of a device: NVIDIA's data sheets and `cudaDeviceProp` (108, 132, 148; 152 on GB200, 160 on B300), AMD's compute units.
UNITS: dict[str, int] = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_103": 160, "gfx90a": 110, "gfx942": 304, "gfx950": 256}
# Architectures that share constants: Blackwell and its Ultra have the same tensor cores, but for fp4.
FAMILIES: dict[str, str] = {"sm_80": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"} | {
    a: a for a in ("gfx90a", "gfx942", "gfx950")
}
# Tiles of a product and what each keeps of the largest one's rate (cuBLAS and CUTLASS profiles: smaller ones read more per FLOP).
_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.93), (128, 64, 0.80), (64, 64, 0.62))
_STREAMS = 4  # that products of experts are spread over, where they are launched one by one (Transformer Engine)
_SHARPNESS = 4.0  # of the corner of the roofline: arithmetic and memory hide each other, but not wholly where they are alike


# Of a family: the accelerator whose rates its constants are shares of. Its kin differ by their watts more than by what they are sold as: B200, B300 and GB200
# reach 1745, 1769 and 1822 TFLOP/s at 1000, 1000 and 1200 W, sold as 2250, 2250 and 2500; an H200 is an H100, a GH200 4 % faster by 100 W.
REFERENCES: dict[str, str] = {
    "sm_80": "a100",
    "sm_90": "h100",
    "sm_100": "b200",
    "gfx90a": "mi250x",
    "gfx942": "mi300x",
    "gfx950": "mi355x",
}
_MODULES: dict[str, float] = {
    "gh200": 100.0,
    "gh200-144": 100.0,
}  # watts of the host's processor within those of the accelerator (POWER.md: 98 to 109 W)


@dataclass(frozen=True, slots=True)
class Device:
    """One rank's device, in FLOP/s and bytes/s; `reached` is the most of the sold rate that a benchmark of products alone has had."""

    family: str
    ultra: bool  # Blackwell Ultra, whose exponentials are twice as fast
    units: int
    peak: Mapping[int, float]  # by bits of the operands, as sold
    reached: Mapping[int, float]  # shares
    level: float  # of what is sold, what is the reference's at the same watts
    watts: tuple[float, float] | None  # as sold, and the reference's
    bandwidth: float
    assumed: tuple[str, ...]


@functools.cache
def device(chip: str) -> Device:
    """What rates need of the accelerator of that id; raises PlanError where its architecture or its bf16 rate is unknown."""
    if chip not in hardware.CHIPS:
        raise PlanError(f"no accelerator is called {chip!r}, so that nothing is known of its speed. Known: {', '.join(hardware.CHIPS)}.")
    found = hardware.CHIPS[chip]
    if found.architecture not in FAMILIES or found.bf16.value is None:
        what = "architecture" if found.architecture not in FAMILIES else "bf16 rate"
        known = ", ".join(c.id for c in hardware.CHIPS.values() if c.architecture in FAMILIES and c.bf16.value is not None)
        raise PlanError(f"the {found.name}'s {what} is not known, so that no time can be told for it. Estimates exist for: {known}.")
    assumed: list[str] = []
    family = FAMILIES[found.architecture]
    reference = hardware.CHIPS[REFERENCES[family]]
    peak = {16: found.bf16.value, 32: found.bf16.value / 2}
    reached = {16: _reached(found, "reached_bf16", "bf16", assumed), 32: 1.0}
    if found.fp8.value is not None:
        peak[8], reached[8] = found.fp8.value, _reached(found, "reached_fp8", "fp8", assumed)
    if found.fp4.value is not None:
        peak[4], reached[4] = found.fp4.value, 1.0
    bandwidth = found.hbm_tbyte_s.value
    if bandwidth is None:
        alike = min((c for c in _kin(found) if c.hbm_tbyte_s.value is not None), key=lambda c: float(c.hbm_tbyte_s.value or 0.0))
        bandwidth = float(alike.hbm_tbyte_s.value or 0.0)
        assumed.append(f"memory bandwidth of the {found.name}: the {alike.name}'s {bandwidth} TB/s, the lowest of its architecture")
    watts = None
    if found.watts.value is not None and reference.watts.value is not None:
        watts = (found.watts.value - _MODULES.get(chip, 0.0), reference.watts.value)
    return Device(
        family=family,
        ultra=found.architecture == "sm_103",
        units=UNITS[found.architecture],
        peak={bits: rate * 1e12 / found.devices for bits, rate in peak.items()},
        reached=reached,
        level=float(reference.bf16.value or 0.0) / found.bf16.value if watts is not None else 1.0,
        watts=watts,
        bandwidth=bandwidth * 1e12 / found.devices,
        assumed=tuple(assumed),
    )


def _kin(chip: hardware.Chip) -> list[hardware.Chip]:
    """Chips of the same family of architectures."""
    family = FAMILIES[str(chip.architecture)]
    return [found for found in hardware.CHIPS.values() if FAMILIES.get(str(found.architecture)) == family]


def _reached(chip: hardware.Chip, reached: str, sold: str, assumed: list[str]) -> float:
    """Share of the sold rate that large products reach on `chip`: its own, else the best of its family's, which is said, else 1."""
    own, peak = getattr(chip, reached).value, getattr(chip, sold).value
    if own is not None and peak:
        return own / peak
    shares = [
        getattr(c, reached).value / getattr(c, sold).value
        for c in _kin(chip)
        if getattr(c, reached).value is not None and getattr(c, sold).value
    ]
    if shares:
        assumed.append(f"{sold} products on the {chip.name} reach {max(shares):.2f} of the sold rate, as others of its architecture")
    return max(shares, default=1.0)


def bits_of(found: Device, bits: int) -> int:
    """The narrowest operands, of at least `bits`, that the device multiplies at a rate of their own."""
    return min((known for known in found.peak if known >= bits), default=32)


_NAMES = {16: "bf16", 8: "fp8", 4: "fp4"}


def product_rate(chip: str, bits: int, constants: Mapping[str, float], clock: float | None = None) -> float:
    """FLOP/s of a large product of operands of `bits` on one rank of `chip`; `clock` as `clock_of` gives it, None: as sold."""
    found = device(chip)
    bits = bits_of(found, bits)
    pace = clock_of(chip, None, 1.0, constants) if clock is None else clock
    share = constants["gemm.fp32.peak_share"] if bits == 32 else constants[f"gemm.{found.family}.{_NAMES[bits]}.peak_share"]
    return found.peak[bits] * min(share * found.level * pace, found.reached[bits] * min(pace, 1.0))


def shape_share(op: Op, found: Device, constants: Mapping[str, float]) -> float:
    """What a product's shape keeps of a large one's rate, 0 to 1."""
    depth = op.k * op.bits / 8
    keeps = depth / (depth + constants[f"gemm.{found.family}.depth"])
    loss = constants["gemm.wave_loss"]
    best = 0.0
    for rows, columns, share in _TILES:
        # Rows of one expert are never a multiple of a tile: half of one is lost in the mean, and a whole one at least.
        down = max(1.0, op.m / rows + 0.5) if op.kind == "grouped" else ceil(op.m / rows)
        across = ceil(op.n / columns)
        tiles = op.groups * down * across
        used = min(1.0, op.groups * op.m * op.n / (tiles * rows * columns))
        waves = tiles / found.units
        if waves < 1.0:  # idle multiprocessors share a deep product's k, at the price of one more sum
            split = min(1.0 / waves, max(1.0, op.k / 2048))
            full = min(1.0, waves * split) * (0.9 if split > 1.0 else 1.0)
        else:
            full = 1.0 - (1.0 - waves / ceil(waves)) * loss
        best = max(best, used * full * share)
    return keeps * best


# Implementations that differ from what the family has by default.
_OTHERS: dict[str, tuple[str, ...]] = {"sm_80": ("flash1",), "sm_90": ("flash2",), "sm_100": ("flash4",)}


def attention_share(op: Op, found: Device, habits: Habits, constants: Mapping[str, float]) -> float:
    """Share of the sold bf16 rate that fused attention reaches: by architecture and implementation, direction, head_dim, keys and tiles of queries."""
    kind = (
        habits.attention
        if found.family in _OTHERS and habits.attention in _OTHERS[found.family]
        else "flash2"
        if found.family == "sm_80"
        else "fused"
    )
    share = constants[f"attention.{found.family}.{kind}"] * found.level
    if found.ultra:
        share *= constants["attention.ultra_gain"]
    if op.passes == "backward":
        share *= constants["attention.backward_share"]
    if op.k < 128:
        share *= constants["attention.narrow_share"] ** min(log2(128 / max(op.k, 16)), 3.0)
    elif op.k > 128:  # more registers than one tile has: 192 of latent attention, 256 of Gemma
        share *= 0.92
    ramp = constants["attention.ramp"] * (found.peak[16] / 312e12) ** 0.5  # what does not shrink as the tensor cores quicken
    share *= op.n / (op.n + ramp)
    waves = op.groups * ceil(max(op.m, 1) / 128) / found.units
    return share * min(1.0, waves / ceil(waves) + 0.3 if waves > 1.0 else waves + 0.1)


def cost(
    op: Op, chip: str | hardware.Chip, constants: Mapping[str, float], habits: Habits, *, clock: float | None = None, products: float = 1.0
) -> Cost:
    """Seconds of `op` on one rank of `chip`, and of the host to launch it. `clock`: as `clock_of` gives it, None as sold; `products`: share of the rate that
    the recipe of a low precision keeps. Raises PlanError for a chip whose rates nobody knows."""
    name = chip if isinstance(chip, str) else chip.id
    found = device(name)
    share, kernels = remains(op, habits)
    latency = constants["kernel.latency_s"] * kernels
    launch = 0.0 if habits.graphed else habits.launch_s * kernels
    if op.kind == "grouped" and habits.looped:
        latency += constants["kernel.latency_s"] * (op.groups - 1) / _STREAMS
        launch += 0.0 if habits.graphed else constants["grouped.launch_s"] * (op.groups - 1)
    if op.kind == "memory":
        return Cost(op.bytes * share / (found.bandwidth * memory_share(op, found, constants)) + latency, launch)
    if op.kind == "optimizer":
        return Cost(op.bytes / (found.bandwidth * constants["optimizer.share"]) + latency, launch)
    moved = op.bytes / (found.bandwidth * constants[f"memory.{found.family}.share"])
    if op.kind == "attention":
        pace = clock_of(name, None, 1.0, constants) if clock is None else clock
        rate = found.peak[16] * min(attention_share(op, found, habits, constants) * pace, found.reached[16])
    else:
        rate = product_rate(name, op.bits, constants, clock) * shape_share(op, found, constants)
        if op.bits < 16 and bits_of(found, op.bits) < 16:
            rate *= products
        if op.kind == "grouped":
            rate *= constants[f"grouped.{found.family}.of_gemm"]
    computed = op.flops / rate if op.flops else 0.0
    # Releases of a stack make its kernels faster, and none of the machine: what remains is no less than the bytes.
    seconds = (computed**_SHARPNESS + moved**_SHARPNESS) ** (1 / _SHARPNESS)
    return Cost(
        max(seconds * habits.pace, op.flops / (found.peak[min(op.bits, 16) if op.kind == "attention" else bits_of(found, op.bits)]))
        + latency,
        launch,
    )


def memory_share(op: Op, found: Device, constants: Mapping[str, float]) -> float:
    """Share of the sold bandwidth that a pass over memory reaches; rows in another order (experts' tokens, embeddings) reach less of it."""
    share = constants[f"memory.{found.family}.share"]
    if op.name == "quantise":
        return share * constants["memory.quantise_share"]
    return share * constants["memory.permute_share"] if _scattered(op) else share


def _scattered(op: Op) -> bool:
    return "permute" in op.name or op.name == "embedding"


# Bytes, and kernels, that remain of operations.py's where one kernel does the pass: rotary 9 -> 2 accesses of an element, a gated activation 5 -> 3 forward and
# 8 -> 5 backward, the sum of a residual 3 -> 1 more than the norm's, a bias's gradient with its neighbour's pass, a loss 14 -> 6 and 10 -> 4 bytes.
_FUSED: dict[tuple[str, bool], tuple[float, float]] = {
    ("rope", True): (2 / 9, 1 / 8), ("rope", False): (2 / 9, 1 / 8), ("activation", True): (3 / 5, 1 / 2), ("activation", False): (5 / 8, 1 / 2),
    ("residual", True): (1 / 3, 1.0), ("residual", False): (2 / 3, 1.0), ("bias", False): (0.1, 1.0), ("cross_entropy", True): (6 / 14, 2 / 5),
    ("cross_entropy", False): (4 / 10, 1 / 2),
}  # fmt: skip


def remains(op: Op, habits: Habits) -> tuple[float, float]:
    """`(share of a memory pass's bytes, kernels)` that a stack leaves of what operations.py counts."""
    if op.kind != "memory" or op.name == "quantise" or _scattered(op):
        return 1.0, op.kernels
    share, kernels = _FUSED.get((op.name, op.passes != "backward"), (1.0, 1.0)) if op.name in habits.fused else (1.0, 1.0)
    return share * habits.passes_share, op.kernels * kernels


def clock_of(chip: str, cap_watts: float | None, clock_share: float, constants: Mapping[str, float]) -> float:
    """Clock that compute-bound kernels hold under a limit of watts and a set clock, over the clock of the family's reference accelerator at its own limit.

    Products of matrices draw all that is allowed, and what is above idle goes as the `power.exponent`-th power of the clock: clock = ((watts - idle) /
    (reference - idle)) ** (1 / exponent). Memory and links keep their own clocks. A cap at or below what idles is refused with PlanError.
    """
    found = device(chip)
    if found.watts is None:
        return min(clock_share, 1.0)
    sold, reference = found.watts
    idle = constants["power.idle_share"] * reference
    watts = sold if cap_watts is None else min(sold, cap_watts - _MODULES.get(chip, 0.0))
    if watts <= idle * 1.05:
        raise PlanError(
            f"a cap of {cap_watts:.0f} W is no more than what a {hardware.CHIPS[chip].name} draws at any clock ({idle + _MODULES.get(chip, 0.0):.0f} W)"
        )
    free = ((sold - idle) / (reference - idle)) ** (1 / constants["power.exponent"])
    held = ((watts - idle) / (reference - idle)) ** (1 / constants["power.exponent"])
    return min(held, free * min(clock_share, 1.0))
