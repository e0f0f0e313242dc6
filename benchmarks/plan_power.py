r"""How well the planner predicts watts and energy: held against MLPerf's power logs, each system by what was learnt from the others.

    python benchmarks/plan_power.py

Three makers metered their nodes: SMC (H100, immersed; at the sockets, AC, and behind the supplies, DC), Dell (H100, air), Lenovo (B200, water). Data:

    measured_power.csv    86 power logs, reduced to watts of a node and kWh of a run (plan.py)
    power_phases.csv      of the same runs' logs: how much of a run trains, evaluates and waits (it starts, it reads data), and seconds of a step

A run's node watts are the means of its three stretches. A stretch of training draws by the operation mix of a step (energy.py); of waiting as nodes that hold;
of evaluation EVALUATION of the way between both. What is around the devices (energy.REST, HELD) is fitted anew without the system that is predicted.
"""

import csv
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import plan

from gigatrain.planning.estimate import energy, operations, rates, stacks
from gigatrain.planning.estimate.constants import VALUES
from gigatrain.planning.estimate.work import Block, Item, Op
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


def busy(config: Config, step_s: float) -> dict[str, float]:
    """Device-seconds of a step of rank 0 by kind, from its operations and their rates; what is left of the measured step is communication or waits for it."""
    habits = replace(stacks.habits(config.workload.stack, config.workload.version, VALUES), graphed=config.workload.graphed)
    found = dict.fromkeys((*energy.COMPUTE, "communication", "idle"), 0.0)
    work = operations.work(config.workload)
    for op in (op for stage in work.stages for block in stage for op in _ops(block)):
        found[op.kind] += rates.cost(op, config.chip, VALUES, habits).seconds * config.workload.accumulation
    for item in work.step:
        if isinstance(item, Op):
            found[item.kind] += rates.cost(item, config.chip, VALUES, habits).seconds
    return found | {"communication": max(0.0, step_s - sum(found.values()))}


def _ops(block: Block) -> Iterable[Op]:
    items: tuple[Item, ...] = (*block.forward, *block.recompute, *block.backward)
    return (item for item in items if isinstance(item, Op))


def around(config: Config, rest: float, held: float, side: str = "AC") -> energy.Server:
    one = energy.server(config.cooling)
    share = energy.Share(config.efficiency, config.efficiency - 0.01, config.efficiency + 0.01, "as the logs say")
    unity = energy.Share(1.0, 1.0, 1.0, "metered behind the supplies")
    return replace(one, rest=replace(one.rest, value=rest), held=replace(one.held, value=held), efficiency=share if side == "AC" else unity)


def devices(config: Config) -> tuple[float, float]:
    """`(training, waiting)` watts of one accelerator."""
    found = phases(config.name)
    sold = energy.hardware.chip(config.chip).watts.value or 0.0
    return energy.device_watts(busy(config, found["step_s"]), found["step_s"], sold, sold), energy.POWER["idle"].value * sold


def predicted(config: Config, rest: float, held: float, side: str = "AC") -> tuple[float, float]:
    """`(watts of a node, kWh of a run)` over the stretches that the run's log tells of."""
    trains, waits = devices(config)
    server, found = around(config, rest, held, side), phases(config.name)

    def node(device: float, wait: bool) -> float:
        return 8 * energy.node_watts(Range(low=device, mid=device, high=device), server, wait).mid

    training, waiting = node(trains, False), node(waits, True)
    evaluates = waiting + EVALUATION * (training - waiting)
    joules = training * found["train_s"] + evaluates * found["eval_s"] + waiting * found["wait_s"]
    return joules / found["run_s"], joules * config.nodes / 3.6e6


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


def table() -> list[dict[str, object]]:
    """One row a configuration: metered and predicted, with its system left out, and with its system's other configurations known."""
    rows: list[dict[str, object]] = []
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
                "known_error": None if known is None else known / measured.node_watts - 1,
                "own_rest_w": rest_of(config, energy.HELD.value),
            }
        )
    return rows


def main() -> None:
    print(
        "config            metered W  predicted W   error   metered kWh  predicted kWh   error   server metered elsewhere   rest W (without | own)"
    )
    for row in table():
        known = f"{row['known_error']:+7.1%}" if row["known_error"] is not None else "   only one"
        print(
            f"{row['config']:16}  {row['metered_w']:9,.0f}  {row['predicted_w']:11,.0f}  {row['error']:+6.1%}  {row['metered_kwh']:11.2f}  "
            f"{row['predicted_kwh']:13.2f}  {row['error_kwh']:+6.1%}   {known:>24}   {row['rest_w']:.0f} | {row['own_rest_w']:.0f}"
        )
    print(f"fitted on all: {learnt(CONFIGS):.0f} W around each accelerator")


if __name__ == "__main__":
    main()
