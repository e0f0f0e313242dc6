r"""How well the planner predicts watts and energy: held against MLPerf's power logs, each system by what was learnt from the others.

    python benchmarks/plan_power.py

Three makers metered their nodes: SMC (H100, immersed; at the sockets, AC, and behind the supplies, DC), Dell (H100, air), Lenovo (B200, water). Data:

    measured_power.csv    86 power logs, reduced to watts of a node and kWh of a run (plan.py)
    power_phases.csv      of the same runs' logs: how much of a run trains, evaluates and waits (it starts, it reads data), and seconds of a step

A run's node watts are the means of its three stretches. A stretch of training draws by the operation mix of a step (energy.py); of waiting as nodes that hold;
of evaluation EVALUATION of the way between both. What is around the devices (energy.REST, HELD) is fitted anew without the system that is predicted.
"""

import csv
import functools
import statistics
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
EVALUATION = 0.85  # prior: forwards alone, with a start and an end that wait; 0.91 of SMC's GPT-3 (6.3 of 6.9 kW), 0.98 of Lenovo, 0.8 of SMC's 8 nodes

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


# SMC's AC over its DC meters: 1.029, 1.016, 1.019, 1.02 by configuration, 0.98 in the mean; Dell's and Lenovo's logs name theirs (conversion_eff).
CONFIGS = (
    Config("smc_gpt3_64", "SMC", "h100", "immersed", 0.98, 64, _gpt3(), ("Sustainable", "GPT-3", 64)),
    Config("smc_lora_1", "SMC", "h100", "immersed", 0.98, 1, _lora(4, 1, 2, 4, "NeMo 24.04"), ("Sustainable", "Llama-2", 1)),
    Config("smc_lora_8", "SMC", "h100", "immersed", 0.98, 8, _lora(4, 2, 8, 1, "NeMo 24.04"), ("Sustainable", "Llama-2", 8)),
    Config("smc_lora_64", "SMC", "h100", "immersed", 0.98, 64, _lora(4, 2, 64, 1, "NeMo 24.04"), ("Sustainable", "Llama-2", 64)),
    Config("dell_lora_8", "Dell", "h100", "air", 0.96, 8, _lora(4, 2, 8, 1, "NeMo 24.09", True), ("Dell", "Llama-2", 8)),
    Config("lenovo_lora_1", "Lenovo", "b200", "water", 0.94, 1, _lora(1, 1, 8, 1, "NeMo 25.02"), ("Lenovo", "Llama-2", 1)),
)


@dataclass(frozen=True)
class Meter:
    """What the meters gave: means over a configuration's runs."""

    node_watts: float
    kwh: float


def meter(config: Config, side: str = "AC") -> Meter:
    who, what, nodes = config.alike
    rows = [
        row
        for row in plan.measured_power()
        if who in row["server_note"] and what in row["workload"] and row["n_nodes"] == nodes and row["side"].startswith(side)
    ]
    return Meter(statistics.mean(row["node_w_mean"] for row in rows), statistics.mean(row["energy_kwh_run"] for row in rows))


def phases(name: str) -> dict[str, float]:
    with (DATA / "power_phases.csv").open(encoding="utf-8", newline="") as lines:
        found = next(row for row in csv.DictReader(lines) if row["config"] == name)
    return {key: float(text) for key, text in found.items() if key not in ("config", "source")}


@functools.cache
def estimated(config: Config) -> Estimate:
    return estimate(config.workload, megawatts.cluster_of(config.chip, 8 * config.nodes))


def busy(config: Config, step_s: float | None) -> tuple[dict[str, float], float]:
    """`(device-seconds by kind, seconds)` of a step as estimated. Where it took longer than that (`step_s`), ranks waited in communication for the rest; where
    it took less, the estimate's own shares hold."""
    found = estimated(config)
    longer = max(0.0, (step_s or 0.0) - found.step_s)
    return found.busy | {"communication": found.busy["communication"] + longer}, found.step_s + longer


def around(config: Config, rest: float, held: float) -> energy.Server:
    one = energy.server(config.cooling)
    share = energy.Share(config.efficiency, config.efficiency - 0.01, config.efficiency + 0.01, "as the logs say")
    return replace(one, rest=replace(one.rest, value=rest), held=replace(one.held, value=held), efficiency=share)


def unknown_server(rest: float) -> energy.Server:
    """A node of eight of which nobody says how it is cooled and what its supplies lose."""
    one = energy.server()
    return replace(one, rest=replace(one.rest, value=rest))


def devices(config: Config, known: bool = True) -> tuple[float, float]:
    """`(training, waiting)` watts of one accelerator; `known`: the step's seconds are the log's."""
    sold = hardware.chip(config.chip).watts.value or 0.0
    mix, step_s = busy(config, phases(config.name)["step_s"] if known else None)
    return energy.device_watts(mix, step_s, sold, sold), energy.POWER["idle"].value * sold


def predicted(config: Config, rest: float, held: float, known: bool = True, server: energy.Server | None = None) -> tuple[float, float]:
    """`(watts of a node, kWh of a run)` over the stretches that the run's log tells of; not `known`: training takes what the estimate says of a step."""
    trains, waits = devices(config, known)
    found = phases(config.name)
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


def table() -> list[dict[str, Any]]:
    """One row a configuration: metered and predicted, with its system left out, and with its system's other configurations known."""
    rows: list[dict[str, Any]] = []
    for config in CONFIGS:
        measured = meter(config)
        without = learnt(one for one in CONFIGS if one.system != config.system)
        others = [one for one in CONFIGS if one.system == config.system and one.name != config.name]
        watts, kwh = predicted(config, without, energy.HELD.value)
        known = predicted(config, learnt(others), energy.HELD.value)[0] if others else None
        rows.append(
            {
                "config": config.name,
                "metered_w": measured.node_watts,
                "rest_w": without,
                "predicted_w": watts,
                "error": watts / measured.node_watts - 1,
                "metered_kwh": measured.kwh,
                "predicted_kwh": kwh,
                "error_kwh": kwh / measured.kwh - 1,
                "predicted_step_w": predicted(config, without, energy.HELD.value, known=False)[0] / measured.node_watts - 1,
                "predicted_step_kwh": predicted(config, without, energy.HELD.value, known=False)[1] / measured.kwh - 1,
                "step_error": estimated(config).step_s / phases(config.name)["step_s"] - 1,
                "unknown_server": predicted(config, without, energy.HELD.value, server=unknown_server(without))[0] / measured.node_watts
                - 1,
                "known_error": None if known is None else known / measured.node_watts - 1,
                "own_rest_w": rest_of(config, energy.HELD.value),
            }
        )
    return rows


def main() -> None:
    print(
        "Node watts and kWh of a run, error of the prediction; constants without the system that is predicted. Step: the estimate's against the log's."
    )
    print(
        "config             metered W   error |  metered kWh   error | with the estimate's step: W     kWh  (step) | server unknown | server's other runs"
    )
    for row in table():
        known = f"{row['known_error']:+.1%}" if row["known_error"] is not None else "only one"
        stepped = f"{row['predicted_step_w']:+15.1%}  {row['predicted_step_kwh']:+6.1%} ({row['step_error']:+.1%})"
        print(
            f"{row['config']:16}  {row['metered_w']:10,.0f}  {row['error']:+6.1%} |  {row['metered_kwh']:11.2f}  {row['error_kwh']:+6.1%} |           {stepped}"
            f" | {row['unknown_server']:+14.1%} | {known:>12}   rest {row['rest_w']:.0f}, its own {row['own_rest_w']:.0f} W"
        )
    print(f"fitted on all: {learnt(CONFIGS):.0f} W around each accelerator")


if __name__ == "__main__":
    main()
