"""Run folders in the agreed record formats, with clocks, traces and joules that a test knows; nothing in them is measured."""

import json
import math
import os
from pathlib import Path
from typing import Any

from gigatrain.planning.watts import Watts
from gigatrain.power.reading import FIELDS, Taken
from gigatrain.site import Figure

BEGAN_S = 1_790_000_000.0
NODES, EACH, STEP_S, STEP_TOKENS = 4, 8, 2.0, 524_288


def figure(value: float, basis: Any = "declared", source: str = "of this test") -> Figure:
    return Figure(value=value, basis=basis, source=source)


WATTS = Watts(
    site="test",
    chip="h100",
    accelerators=NODES * EACH,
    per_node=EACH,
    device_watts=figure(700),
    rest_watts=figure(1400, "assumed"),
    node_watts=figure(6850, "measured", "MLPerf Training 4.0, 64 nodes"),
    nameplate_watts=figure(10200),
    fabric_watts=figure(116, "assumed"),
    storage_share=figure(0.03, "assumed"),
    pue=figure(1.2),
    carbon_g_kwh=figure(230, "measured", "national mean of 2024"),
    price_eur_mwh=figure(90),
)


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def plan(steps: int, watts: Watts = WATTS, **more: Any) -> dict[str, Any]:
    return {
        "name": "made",
        "summary": "a run that nobody trained",
        "site": "test",
        "device": "cuda",
        "ranks": NODES * EACH,
        "steps": steps,
        "tokens": steps * STEP_TOKENS,
        "parameters": 8_030_000_000,
        "flops_per_token": 5.1e10,
        "sequence": 8192,
        "batch": 128,
        "precision": "bf16",
        "optim": {"name": "adamw", "lr": 3e-4},
        "memory": {"weights": 9 << 30, "gradients": 4 << 30, "optimizer": 12 << 30, "activations": 21 << 30, "workspace": 3 << 30},
        "watts": watts.model_dump(mode="json"),
        "power": {"megawatts": 0.05, "every_s": 0.1},
    } | more


def made(
    folder: Path,
    *,
    windows: int = 120,
    killed: int | None = 70,
    energy: bool = True,
    finished: bool = True,
    name: str = "made",
    slower: float = 1.0,
) -> Path:
    """A run of `windows` windows of ten steps; the process that did window `killed` was killed after it, and the next went on two windows before."""
    (folder / "logs").mkdir(parents=True)
    (folder / "trace").mkdir()
    (folder / "launch").mkdir()
    (folder / "launch" / "site.json").write_text('{"accelerator": "h100"}')
    steps = windows * 10
    (folder / "run.json").write_text(
        json.dumps({"id": "1f", "name": name, "created": "2026-09-21T13:33:20+00:00", "plan_sha256": "ab" * 32})
    )
    (folder / "plan.json").write_text(json.dumps(plan(steps, name=name)))
    events, rows, metrics, traced = [], [], {}, {}
    now = BEGAN_S
    step_s = STEP_S * slower

    def row(process: str, event: str, seconds: float, step: int, watts: float = 470.0, **more: Any) -> None:
        device = round(watts * NODES * EACH * seconds * 1e3)
        rest = round(1650 * NODES * seconds * 1e3)
        taken = Taken(
            nodes=NODES, ms=round(seconds * 1e3) * NODES, devices=NODES * EACH, device_ms=round(seconds * 1e3) * NODES * EACH,
            device_measured_mj=device, node_measured_mj=device + rest, counter_mj=device, integral_mj=round(device * 1.004),
            power_capped_ms=round(0.34 * seconds * 1e3) * NODES * EACH, reasons_ms=round(seconds * 1e3) * NODES * EACH,
        )  # fmt: skip
        said = dict(zip(FIELDS, taken.ints(), strict=True))
        bins = [[number, NODES, device // 12, (device + rest) // 12] for number in range(int((now - seconds) // 10) + 1, int(now // 10))][
            :12
        ]
        base = {"time_s": now, "event": event, "attempt": 0, "process": process, "step": step, "tokens": step * STEP_TOKENS}
        rows.append(base | {"taken": said, "bins": bins} | more)

    sessions = [("a", 0, killed, True)] if killed else [("a", 0, windows, False)]
    if killed:
        sessions.append(("b", killed - 2, windows, False))
    for process, first, last, dies in sessions:
        base = {"attempt": 0, "ranks": NODES * EACH, "process": process}
        events.append({"time_s": now, "event": "start", "node": "n0", **base})
        meters = {"device": f"{NODES * EACH} x NVML energy counter (H100)", "node": "Redfish, every 10 s"}
        row(process, "begin", 0.0, first * 10, meters=meters)
        now += 45
        events.append({"time_s": now, "event": "steps", "step": first * 10, **base})
        row(process, "steps", 45.0, first * 10, 110.0, phases={"starting": 45 * 2500.0})
        for window in range(first, last):
            step, wave = window * 10 + 10, math.sin(window * 2.4) + 0.4 * math.sin(window * 7.1)
            each = step_s * (1 + 0.012 * wave + (0.5 if window == 33 else 0.0))
            spent = {"training": 10 * each}
            if step % 200 == 0:
                spent["validation"] = 14.0
            if step % 250 == 0:
                spent["checkpoint"] = 5.0
            start = now
            now += sum(spent.values()) + 0.2
            events.append({"time_s": now, "event": "report", "step": step, "tokens": step * STEP_TOKENS, "seconds": spent, **base})
            used = 505.0 + 9 * wave - (190 if window == 33 else 0) - (60 if "validation" in spent else 0)
            row(process, "window", now - start, step, used, phases={phase: seconds * 5700.0 for phase, seconds in spent.items()})
            loss = 1.9 + 7.5 * math.exp(-step / 150) + 0.05 * wave
            metrics[step] = {
                "step": step, "loss": loss, "grad_norm": 1.0, "lr": 3e-4, "tokens": step * STEP_TOKENS, "tokens_per_s": STEP_TOKENS / each,
                "step_s": each, "bad_steps": 0,
            }  # fmt: skip
            if step % 200 == 0:
                metrics[step + 0.5] = {"step": step, "val_loss": loss + 0.06}
            for at in range(step - 10, step):
                took = each * (1 + 0.02 * math.sin(at * 1.7)) * (1.35 if at % 97 == 5 else 1.0)
                parts = {"data": 0.002, "forward": 0.3, "backward": 0.56, "reduce": 0.06, "optimizer": 0.07, "rest": 0.008}
                traced[at] = {"step": at, "start": start, "phases": {phase: round(share * took, 6) for phase, share in parts.items()}}
        if dies:
            now += 170
    if finished:
        now += 3
        row("b" if killed else "a", "end", 3.0, steps, 120.0)
        end = {"attempt": 0, "ranks": NODES * EACH, "process": "b" if killed else "a"}
        events.append({"time_s": now, "event": "end", "why": "finished", "seconds": {"checkpoint": 2.5}, **end})
        versions = {"python": "3.12.3", "gigatrain": "0.1.0", "torch": "2.13.0+cu130"}
        (folder / "summary.json").write_text(json.dumps({"name": name, "steps": steps, "wall_s": now - BEGAN_S, "versions": versions}))
    (folder / "metrics.jsonl").write_text(lines([metrics[step] for step in sorted(metrics)]))
    (folder / "logs" / "progress.jsonl").write_text(lines(events))
    (folder / "trace" / "rank-00000.jsonl").write_text(lines([traced[at] for at in sorted(traced)]))
    if energy:
        (folder / "energy.jsonl").write_text(lines(rows))
    for path in folder.rglob("*"):
        os.utime(path, (now, now))
    return folder
