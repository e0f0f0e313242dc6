"""How often runs are interrupted and by what: published counts with their exposure, as a rate of each kind and the range that counts leave open.

A rate is per accelerator and second of wall-clock. Sources:
LLAMA3   The Llama 3 Herd of Models, arXiv 2407.21783, table 5: 419 unexpected and 47 planned interruptions of 54 days on 16,384 H100. The small rows are
         recalled; the large ones were read in articles, and all add up to 419
HSDP     Training LLMs with Fault Tolerant HSDP on 100,000 GPUs, arXiv 2602.00277, as quoted by public summaries: 678 interruptions on 32K H100, 2.3 for each
         1,000 servers and day; one every 18 minutes at 98K, 50 if the rate of 32K held; detection, restart and stall times
RSC      Revisiting Reliability in Large-Scale ML Research Clusters, arXiv 2410.21680: 6.50 for each 1,000 node-days on RSC-1, 2.34 on RSC-2 (recalled); 3 % and
         5 % of hardware failures together with others; lemons: 1.2 % of nodes (recalled)
ROBUST   Robust LLM Training Infrastructure at ByteDance, arXiv 2509.16293, table 3: seconds to detect, with inspection of every node
OPT      metaseq projects/OPT/chronicles: about 110 failures in two months on 992 A100 (as Gemini, SOSP'23, counts them)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gigatrain.errors import PlanError

DAY_S = 86_400.0
_Z = 1.6448536  # of a 90 % interval


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of interruption. `share` of all; `node_share` of these need another node; `everywhere`: no replica goes on without the others."""

    name: str
    share: float
    detect_s: float  # from the fault until the run is being stopped
    node_share: float = 0.0
    everywhere: bool = False
    corrupts: bool = False  # nothing stops; it is found `detect_s` later, and what was saved since is wrong as well


@dataclass(frozen=True, slots=True)
class Failures:
    """What interrupts a run. `per_accelerator_s` is the rate of all kinds; `count` events gave it; `spread` is the deviation of its logarithm beyond that."""

    source: str
    per_accelerator_s: float  # 1/s
    count: float  # of events behind the rate; inf: taken as exact
    kinds: tuple[Kind, ...]
    spread: float = 0.0  # between sites, where the rate is another site's
    correlated_share: float = 0.03  # of those that need another node; RSC: 3 % on RSC-1, 5 % on RSC-2 (of hardware failures)
    correlated_nodes: int = 2  # nodes that go together; RSC: two servers a rack
    lemon_share: float = 0.012  # of nodes; RSC (recalled)
    lemon_factor: float = 1.0  # their rate over that of the other nodes; 1: no node is worse
    strikes: int = 0  # failures after which a node is kept out for good; 0: never
    planned_per_day: float = 47 / 54  # of the run, whatever its size; LLAMA3
    planned_s: float = 0.0  # beyond a restart: maintenance that hands over other nodes; prior
    wear: float = 1.0  # exponent: the rate of n accelerators goes as n^wear from `of` accelerators on
    of: int = 0

    def per_s(self, accelerators: int, days: float = 0.0, per_node: int = 8) -> float:
        """Unplanned interruptions of a run a second. 1/s, a mean over the run where lemons are put out during it."""
        beyond = (accelerators / self.of) ** (self.wear - 1) if self.of and accelerators > self.of else 1.0
        return self.per_accelerator_s * accelerators * beyond * self.kept(days, per_node)

    def kept(self, days: float, per_node: int) -> float:
        """Share of the interruptions that remains if every node is put out after `strikes` of its own, over a run of `days`.

        A published rate has its lemons in it: one node in 1/lemon_share fails `lemon_factor` times as often as the others.
        """
        if self.strikes < 1 or self.lemon_factor <= 1 or days <= 0:
            return 1.0
        good, lemon = self.node_rates(per_node)
        mean = lemon * days * DAY_S
        until = sum(i * math.exp(-mean + i * math.log(mean) - math.lgamma(i + 1)) for i in range(self.strikes))
        until += self.strikes * (1 - sum(math.exp(-mean + i * math.log(mean) - math.lgamma(i + 1)) for i in range(self.strikes)))
        span = days * DAY_S
        after = max(0.0, span - until / lemon)  # what took its place is a node like the others
        events = (1 - self.lemon_share) * good * span + self.lemon_share * (until + good * after)
        return events / (((1 - self.lemon_share) * good + self.lemon_share * lemon) * span)

    def node_rates(self, per_node: int) -> tuple[float, float]:
        """Of a good node and of a lemon. 1/s."""
        good = self.per_accelerator_s * per_node / (1 - self.lemon_share + self.lemon_share * self.lemon_factor)
        return good, good * self.lemon_factor

    def range(self) -> tuple[float, float]:
        """The 90 % interval of the rate over its middle: a gamma posterior of the count (Jeffreys' prior), widened by `spread` in the logarithm."""
        if math.isinf(self.count):
            low = high = 1.0
        else:
            shape, scale = self.count + 0.5, max(self.count, 0.5)
            low, high = (_gamma(shape, z) / scale for z in (-_Z, _Z))
        return (
            math.exp(-math.hypot(math.log(low), _Z * self.spread)),
            math.exp(math.hypot(math.log(high), _Z * self.spread)),
        )


def _gamma(shape: float, z: float) -> float:
    """Quantile of a gamma distribution of scale 1 at a normal deviate: Wilson and Hilferty (1931), and its lower tail where the shape is small."""
    tail = math.exp((math.log(math.erfc(-z / math.sqrt(2)) / 2) + math.lgamma(shape + 1)) / shape) if z < 0 else 0.0
    return max(tail, shape * max(0.0, 1 - 1 / (9 * shape) + z / (3 * math.sqrt(shape))) ** 3)


def counted(source: str, count: float, accelerators: float, days: float, kinds: tuple[Kind, ...], **more: float) -> Failures:
    """Failures of a site or a paper that counted `count` interruptions of `accelerators` in `days`: `counted("our runs", 3, 512, 20, KINDS)`."""
    if count < 0 or accelerators <= 0 or days <= 0:
        raise PlanError(
            f"a failure rate of {count:g} interruptions on {accelerators:g} accelerators in {days:g} days cannot be; give how many were "
            "counted (0 or more), on how many accelerators, over how many days"
        )
    return Failures(source, max(count, 0.5) / (accelerators * days * DAY_S), count, kinds, **more)  # type: ignore[arg-type]


def _kinds(counts: Mapping[str, float], rules: Mapping[str, Kind]) -> tuple[Kind, ...]:
    total = sum(counts.values())
    return tuple(replace(rules[name], share=count / total) for name, count in counts.items())


# Seconds to detect: ROBUST's table 3 (GPU lost 10 s, kernel fault 2 s, NIC 30 s, switch 60 s); a hang is found by the collectives' timeout, which is 10 minutes
# in NCCL and in our ranks (gigatrain/recovery); a silent corruption by what it does to the loss, within hours (prior). Of what needs another node, GPU, memory
# and host do; a flapping link mostly does not (prior).
RULES = {
    "gpu": Kind("gpu", 0, 10, 1),
    "hbm": Kind("hbm", 0, 10, 1),
    "host": Kind("host", 0, 10, 1),
    "fabric": Kind("fabric", 0, 60, 0.3),
    "hang": Kind("hang", 0, 600, 0),
    "software": Kind("software", 0, 10, 0, everywhere=True),
    "corruption": Kind("corruption", 0, 3600, 1, everywhere=True, corrupts=True),
}
_LLAMA3 = {  # table 5's rows, grouped
    "gpu": 148 + 19 + 17 + 6,  # faulty GPU, SRAM, system processor, thermal interface and sensor
    "hbm": 72,
    "host": 32 + 3 + 3 + 2 + 2 + 2 + 2,  # unplanned host maintenance, SSD, power supply, chassis, I/O board, CPU, memory
    "fabric": 35 + 7,  # switch and cable, NIC
    "hang": 7,  # NCCL watchdog timeouts
    "software": 54 + 2,  # software, dependencies
    "corruption": 6,
}
_HSDP = {  # per cent of the 678
    "gpu": 18.0 + 7.4 + 7.2,  # PCIe, faulty GPU, other
    "hbm": 22.9,
    "host": 6.2 + 5.8 + 5.6,  # host maintenance, kernel, reboot
    "fabric": 5.3,
    "hang": 9.0,
    "software": 7.1,
    "corruption": 5.5,
}
KINDS = _kinds(_LLAMA3, RULES)
PUBLISHED = {
    "llama3": counted("Llama 3 405B, 54 days on 16,384 H100 (arXiv 2407.21783)", 419, 16_384, 54, KINDS),
    "hsdp-32k": counted("Meta, 32K H100, 2.3 per 1,000 servers and day (arXiv 2602.00277)", 678, 8000, 678 / 2.3, _kinds(_HSDP, RULES)),
    "hsdp-98k": Failures("Meta, 98K GPUs, one every 18 minutes (arXiv 2602.00277)", 1 / (18 * 60 * 98_304), math.inf, _kinds(_HSDP, RULES)),
    "rsc-1": Failures("Meta RSC-1, A100, 6.50 per 1,000 node-days (arXiv 2410.21680)", 6.50e-3 / 8 / DAY_S, math.inf, KINDS),
    "rsc-2": Failures("Meta RSC-2, A100, 2.34 per 1,000 node-days (arXiv 2410.21680, recalled)", 2.34e-3 / 8 / DAY_S, math.inf, KINDS),
    "opt": counted("OPT-175B, two months on 992 A100 (metaseq chronicles)", 110, 992, 60, KINDS),
}
# Deviation of the logarithm of these sites' rates: what another site's is known to (six of them; benchmarks/goodput.py prints it).
SPREAD = 0.72


def elsewhere(name: str = "llama3") -> Failures:
    """Published failures as a guess for a site that has counted none: the same middle, a range as wide as published sites differ."""
    found = PUBLISHED[name]
    return Failures(f"{found.source}, taken for this site", found.per_accelerator_s, found.count, found.kinds, spread=SPREAD)
