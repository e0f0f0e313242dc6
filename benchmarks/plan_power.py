r"""How well the planner predicts watts and energy: held against MLPerf's power logs, each system by what was learnt from the others.

    python benchmarks/plan_power.py                 the table
    python benchmarks/plan_power.py --markdown      its rows as POWER.md has them

Three makers metered their nodes: SMC (H100, immersed; at the sockets, AC, and behind the supplies, DC), Dell (H100, air), Lenovo (B200, water). Data:

    measured_power.csv    86 power logs, reduced to watts of a node and kWh of a run (plan.py)
    power_phases.csv      of the same runs' logs: how much of a run trains, evaluates and waits (it starts, it reads data), and seconds of a step

A run's node watts are the means of its three stretches. A stretch of training draws by the operation mix of a step (energy.py); of waiting as nodes that hold;
of evaluation EVALUATION of the way between both. What is around the devices (energy.REST, HELD) is fitted anew without the system that is predicted.
"""

import csv
import functools
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plan

from gigatrain.planning import hardware, megawatts
from gigatrain.planning.estimate import energy
from gigatrain.planning.estimate.estimate import estimate
from gigatrain.planning.estimate.work import Estimate
from gigatrain.planning.estimate.workload import Layout, Shape, Workload
from gigatrain.planning.expected import Range

DATA = Path(__file__).parent / "data"
# Both set after a look at these logs. Evaluation is forwards alone, with a start and an end that wait: 0.91 of SMC's GPT-3, 0.98 of Lenovo, 0.8 of 8 nodes.
# A step that is longer than estimated by what releases of one stack differ by (the median of 54 of NeMo's) has slower kernels; beyond that its ranks wait.
EVALUATION = 0.85  # of the way from waiting to training
RELEASES = 0.059  # of a step

LLAMA2_70B = Shape(
    layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, value_dim=128, intermediate=28672, gated=True, vocab=32000, tied=False
)
GPT3_175B = Shape(
    layers=96, hidden=12288, heads=96, kv_heads=96, head_dim=128, value_dim=128, intermediate=49152, gated=False, vocab=51200, tied=True,
    learned_positions=True, biases=True, layer_norm=True,
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One set of metered runs. `efficiency`: of its supplies, as its logs say it."""

    name: str
    system: str
    chip: str
    cooling: energy.Cooling
    efficiency: float
    nodes: int
    workload: Workload
    alike: tuple[str, str, int]  # what names its rows: words of server_note and workload, and nodes
    side: str = "AC"  # DC: behind the supplies, whose losses are not in it

    @property
    def log(self) -> str:
        """Its name in power_phases.csv."""
        return self.name.removesuffix("_dc")


def _lora(tensor: int, context: int, data: int, accumulation: int, version: str, graphed: bool = False) -> Workload:
    """MLPerf's Llama-2 70B LoRA: rank 16 on attention alone, packed 8192 tokens, FP8; layouts by the logs' own configuration."""
    layout = Layout(shard=data, tensor=tensor, context=context, zero=1, sequence_parallel=tensor > 1)
    return Workload(
        LLAMA2_70B, layout, 8192, 1, accumulation, precision="fp8_delayed", stack="megatron", version=version, frozen=True, adapter_rank=16,
        graphed=graphed,
    )  # fmt: skip


def _gpt3() -> Workload:
    """MLPerf's GPT-3 175B: TP 4, PP 8, 12 virtual stages, micro-batches of 2, 64 of them (config_SMCH100_64x8x128x4x8.sh)."""
    layout = Layout(shard=16, tensor=4, pipeline=8, schedule="interleaved", stages=12, zero=1)
    return Workload(GPT3_175B, layout, 2048, 2, 64, precision="fp8_delayed", stack="megatron", version="NeMo 24.04")


# SMC's AC over its DC meters: 1.016 to 1.029 by configuration, 0.98 in the mean; Dell's and Lenovo's logs name theirs (conversion_eff).
_AC = (
    Config("smc_gpt3_64", "SMC", "h100", "immersed", 0.98, 64, _gpt3(), ("Sustainable", "GPT-3", 64)),
    Config("smc_lora_1", "SMC", "h100", "immersed", 0.98, 1, _lora(4, 1, 2, 4, "NeMo 24.04"), ("Sustainable", "Llama-2", 1)),
    Config("smc_lora_8", "SMC", "h100", "immersed", 0.98, 8, _lora(4, 2, 8, 1, "NeMo 24.04"), ("Sustainable", "Llama-2", 8)),
    Config("smc_lora_64", "SMC", "h100", "immersed", 0.98, 64, _lora(4, 2, 64, 1, "NeMo 24.04"), ("Sustainable", "Llama-2", 64)),
    Config("dell_lora_8", "Dell", "h100", "air", 0.96, 8, _lora(4, 2, 8, 1, "NeMo 24.09", True), ("Dell", "Llama-2", 8)),
    Config("lenovo_lora_1", "Lenovo", "b200", "water", 0.94, 1, _lora(1, 1, 8, 1, "NeMo 25.02"), ("Lenovo", "Llama-2", 1)),
)
CONFIGS = (*_AC, *(replace(one, name=f"{one.name}_dc", efficiency=1.0, side="DC") for one in _AC if one.system == "SMC"))


@dataclass(frozen=True)
class Meter:
    """What the meters gave: means over a configuration's runs."""

    runs: int
    node_watts: float
    kwh: float


@functools.cache
def meter(config: Config) -> Meter:
    who, what, nodes = config.alike
    alike = (row for row in plan.measured_power() if who in row["server_note"] and what in row["workload"] and row["n_nodes"] == nodes)
    rows = [row for row in alike if row["side"].startswith(config.side)]
    return Meter(len(rows), statistics.mean(row["node_w_mean"] for row in rows), statistics.mean(row["energy_kwh_run"] for row in rows))


def phases(name: str) -> dict[str, float]:
    with (DATA / "power_phases.csv").open(encoding="utf-8", newline="") as lines:
        found = next(row for row in csv.DictReader(lines) if row["config"] == name)
    return {key: float(text) for key, text in found.items() if key not in ("config", "source")}


@functools.cache
def estimated(config: Config) -> Estimate:
    return estimate(config.workload, megawatts.cluster_of(config.chip, 8 * config.nodes))


def busy(config: Config, step_s: float | None) -> tuple[dict[str, float], float]:
    """`(device-seconds by kind, seconds)` of a step as estimated. Where it took longer than that and RELEASES (`step_s`), ranks waited in communication for the
    rest; else the estimate's own shares hold."""
    found = estimated(config)
    longer = max(0.0, (step_s or 0.0) - found.step_s * (1 + RELEASES))
    return found.busy | {"communication": found.busy["communication"] + longer}, found.step_s + longer


def around(config: Config, rest: float, held: float) -> energy.Server:
    one = energy.server(config.cooling)
    share = energy.Share(config.efficiency, config.efficiency - 0.01, min(1.0, config.efficiency + 0.01), "as the logs say")
    return replace(one, rest=replace(one.rest, value=rest), held=replace(one.held, value=held), efficiency=share)


def unknown_server(rest: float) -> energy.Server:
    """A node of eight of which nobody says how it is cooled and what its supplies lose."""
    one = energy.server()
    return replace(one, rest=replace(one.rest, value=rest))


def devices(config: Config, known: bool = True) -> tuple[float, float]:
    """`(training, waiting)` watts of one accelerator; `known`: the step's seconds are the log's."""
    sold = hardware.chip(config.chip).watts.value or 0.0
    mix, step_s = busy(config, phases(config.log)["step_s"] if known else None)
    return energy.device_watts(mix, step_s, sold, sold), energy.POWER["idle"].value * sold


def predicted(config: Config, rest: float, held: float, known: bool = True, server: energy.Server | None = None) -> tuple[float, float]:
    """`(watts of a node, kWh of a run)` over the stretches that the run's log tells of; not `known`: training takes what the estimate says of a step."""
    trains, waits = devices(config, known)
    found = phases(config.log)
    server = server or around(config, rest, held)

    def node(device: float, wait: bool) -> float:
        return 8 * energy.node_watts(Range(low=device, mid=device, high=device), server, wait).mid

    training, waiting = node(trains, False), node(waits, True)
    evaluates = waiting + EVALUATION * (training - waiting)
    train_s = found["train_s"] if known else found["train_s"] * estimated(config).step_s / found["step_s"]
    run_s = train_s + found["eval_s"] + found["wait_s"]
    joules = training * train_s + evaluates * found["eval_s"] + waiting * found["wait_s"]
    return joules / run_s, joules * config.nodes / 3.6e6


def rest_of(config: Config, held: float) -> float:
    """Watts around each accelerator that make the prediction what the meter says: it is linear in them."""
    at = [predicted(config, rest, held)[0] for rest in (0.0, 100.0)]
    return 100.0 * (meter(config).node_watts - at[0]) / (at[1] - at[0])


def learnt(configs: Iterable[Config], held: float = energy.HELD.value) -> float:
    """Watts around each accelerator: the mean over systems of each one's mean."""
    by_system: dict[str, list[float]] = {}
    for config in configs:
        by_system.setdefault(config.system, []).append(rest_of(config, held))
    return statistics.mean(statistics.mean(found) for found in by_system.values())


def within(config: Config, watts: float, rest: float) -> bool:
    """Whether the meter's mean lies within 90 % of the prediction `watts`, by the width of a training node's range."""
    mix, step_s = busy(config, phases(config.log)["step_s"])
    cluster = megawatts.cluster_of(config.chip, 8 * config.nodes)
    found = energy.drawn(
        mix, step_s, cluster, megawatts.watts_of(config.chip, 8 * config.nodes), 8 * config.nodes, around(config, rest, energy.HELD.value)
    )
    node = found.watts["node"]
    return node.low / node.mid <= meter(config).node_watts / watts <= node.high / node.mid


def table() -> list[dict[str, Any]]:
    """One row a configuration: metered and predicted, with its system left out, and with its system's other configurations known."""
    rows: list[dict[str, Any]] = []
    held = energy.HELD.value
    for config in CONFIGS:
        measured = meter(config)
        without = learnt(one for one in CONFIGS if one.system != config.system)
        others = [one for one in CONFIGS if one.system == config.system and one.log != config.log]
        watts, kwh = predicted(config, without, held)
        stepped = predicted(config, without, held, known=False)
        known = predicted(config, learnt(others), held)[0] if others else None
        nobody = predicted(config, without, held, server=unknown_server(without))[0] if config.side == "AC" else None
        rows.append(
            {
                "config": config.name,
                "runs": measured.runs,
                "metered_w": measured.node_watts,
                "error": watts / measured.node_watts - 1,
                "within": within(config, watts, without),
                "metered_kwh": measured.kwh,
                "error_kwh": kwh / measured.kwh - 1,
                "step_error": estimated(config).step_s / phases(config.log)["step_s"] - 1,
                "stepped_error": stepped[0] / measured.node_watts - 1,
                "stepped_error_kwh": stepped[1] / measured.kwh - 1,
                "unknown_server": None if nobody is None else nobody / measured.node_watts - 1,
                "known_error": None if known is None else known / measured.node_watts - 1,
                "rest_w": without,
                "own_rest_w": rest_of(config, held),
            }
        )
    return rows


def main() -> None:
    """The table: what each column knows is in its head."""
    print(
        "Errors of node watts and kWh of a run, predicted over metered. Constants are fitted without the system that is predicted; A to D know of it:"
    )
    print("  A  its cooling and supplies' losses, and its log's seconds of a step   B  the same, seconds of a step as estimated")
    print("  C  as A, not how it is cooled nor what its supplies lose               D  as A, and the meter of its other configurations")
    print()
    print("configuration     runs  node W |  A: W  in 90 %     kWh |  B: W     kWh  (step) |  C: W |  D: W | rest W: learnt, its own")
    for row in table():
        nobody, known = ("     -" if value is None else f"{value:+6.1%}" for value in (row["unknown_server"], row["known_error"]))
        here = f"{row['error']:+6.1%}  {'yes' if row['within'] else 'no':3}  {row['error_kwh']:+6.1%} of {row['metered_kwh']:6.2f}"
        stepped = f"{row['stepped_error']:+6.1%}  {row['stepped_error_kwh']:+6.1%} ({row['step_error']:+.0%})"
        print(
            f"{row['config']:16} {row['runs']:5} {row['metered_w']:7,.0f} | {here} | {stepped} | {nobody}"
            f" | {known} | {row['rest_w']:.0f}, {row['own_rest_w']:.0f}"
        )
    print(f"fitted on all: {learnt(CONFIGS):.0f} W around each accelerator (energy.REST: {energy.REST.value:.0f})")


_LABELS = {
    "smc_gpt3_64": "SMC H100 immersed, GPT-3 175B, 64 nodes",
    "smc_lora_1": "SMC, Llama 2 70B LoRA, 1 node",
    "smc_lora_8": "SMC, LoRA, 8 nodes",
    "smc_lora_64": "SMC, LoRA, 64 nodes",
    "dell_lora_8": "Dell H100 air, LoRA, 8 nodes",
    "lenovo_lora_1": "Lenovo B200 water, LoRA, 1 node",
}


def markdown() -> None:
    """Rows of POWER.md's table, by its columns."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:+.1f} %"

    for row in table():
        name = _LABELS[row["config"].removesuffix("_dc")] + (", DC" if row["config"].endswith("_dc") else "")
        cells = [
            name,
            row["runs"],
            f"{row['metered_w']:,.0f}",
            percent(row["error"]),
            percent(row["known_error"]),
            percent(row["unknown_server"]),
        ]
        cells += [f"{row['metered_kwh']:.2f}", percent(row["error_kwh"]), percent(row["stepped_error"]), percent(row["stepped_error_kwh"])]
        print(f"| {' | '.join(str(cell) for cell in cells)} |")


if __name__ == "__main__":
    markdown() if "--markdown" in sys.argv[1:] else main()
