"""A plan's picture with numbers that a test knows: a 405B model on 16,384 accelerators; nothing in it was estimated by the planner."""

import math
from typing import Any

from gigatrain.planning.estimate.work import Estimate
from gigatrain.planning.expected import Expected, Range
from gigatrain.planning.picture import COUNTS, Boundary, Candidate, Cap, PlanPicture, Point, Role, Roof, Scale, Sensitivity, WhatIf

GIB = 2**30
ROLES = 16
TOKENS = 15.6e12
PHASES = {
    "gemm": 3.1, "attention": 0.42, "memory": 0.31, "optimizer": 0.05, "launch": 0.02, "bubble": 0.36, "exposed_tensor": 0.28, "exposed_shard": 0.09,
    "exposed_pipeline": 0.03, "wait": 0.07,
}  # fmt: skip


def about(mid: float, share: float) -> Range:
    return Range(low=mid * (1 - share), mid=mid, high=mid * (1 + share))


def held(rank: int) -> dict[str, float]:
    return {
        "weights": 6.3 * GIB, "gradients": 12.6 * GIB, "optimizer": 0.6 * GIB, "activations": (38 - 1.9 * rank) * GIB, "workspace": 2.2 * GIB,
        "buffers": 3.1 * GIB, "slack": 2 * GIB,
    }  # fmt: skip


def good(count: float) -> float:
    return 1 - 0.3 * (count / 288_000) ** 0.5 - 0.01


def scales() -> tuple[Scale, ...]:
    rows = []
    for count in COUNTS:
        if count < 128:
            rows.append(
                Scale(
                    count,
                    unknown=f"{count} ranks are no multiple of 128, which one copy of this layout takes (context x tensor x pipeline)",
                )
            )
            continue
        speed = 420.0 * count * (1 - 0.025 * math.log2(count / 128))
        rows.append(
            Scale(count, f"replicate {count // 128} x tensor 8 x pipeline 16", count // 128 * 16, 4.6, speed, good(count), count * 1290.0)
        )
    return tuple(rows)


def pictured(**more: Any) -> PlanPicture:
    step_s = sum(PHASES.values())
    speed = 2048 * 8192 / step_s
    lost = {"checkpoint": 0.012, "redone": 0.021, "restart": 0.018, "detection": 0.006, "wait": 0.004, "maintenance": 0.003}
    goodput = 1 - sum(lost.values())
    days = TOKENS / speed / goodput / 86400
    expected = Expected(
        step_s=about(step_s, 0.09),
        tokens_per_s=about(speed, 0.09),
        tokens_per_s_per_rank=about(speed / 16384, 0.09),
        mfu=0.412,
        phases=PHASES,
        memory_bytes=about(64.8 * GIB, 0.04),
        watts={"device": about(9.6e6, 0.05), "node": about(14.1e6, 0.05), "it": about(16.0e6, 0.06), "facility": about(19.2e6, 0.07)},
        peak_watts={"device": 11.5e6, "node": 16.6e6, "it": 18.6e6, "facility": 22.3e6},
        tokens_per_s_mw=about(speed * goodput / 19.2, 0.11),
        goodput=Range(low=0.91, mid=goodput, high=0.95),
        lost=lost,
        checkpoint_every=310,
        days=about(days, 0.1),
        mwh=about(19.2 * days * 24, 0.12),
        eur=about(19.2 * days * 24 * 90, 0.12),
        tco2=None,
        limits="products of matrices (66 % of the step)",
        outside=("accelerators: 16,384, and 11,616 is the largest that was measured with this layout",),
        assumed=("one rail of 400 Gbit/s a GPU, as sold with it", "a spine without oversubscription"),
        unknown={"tco2": "the site's carbon of a kWh is unknown (power.carbon_g_kwh)"},
    )
    roles = tuple(
        Role(
            f"pipeline rank {rank}",
            {"gemm": 3.1 - 0.01 * rank, "attention": 0.42, "memory": 0.31, "optimizer": 0.05, "wait": step_s - 3.88 + 0.01 * rank},
            held(rank), 0.62, 585.0 - rank,
        )
        for rank in range(ROLES)
    )  # fmt: skip
    candidates = tuple(
        Candidate(
            f"replicate {copies} x tensor {tensor} x pipeline {16384 // copies // tensor}, {schedule}", step_s * slower, step_s * slower * 0.91,
            step_s * slower * 1.09, {name: seconds * (slower if "exposed" in name else 1) for name, seconds in PHASES.items()} | {"bubble": bubble},
            memory * GIB, True, speed / slower, limits, why, chosen,
        )
        for copies, tensor, schedule, slower, bubble, memory, limits, why, chosen in (
            (128, 8, "interleaved of 4", 1.0, 0.36, 64.8, "products of matrices (66 %)", "least exposed transfers of what fits", True),
            (256, 8, "1f1b", 1.021, 0.41, 71.2, "the pipeline's bubble (9 %)", "two more copies, and twice the bubble's share", False),
            (128, 4, "zbv", 1.034, 0.02, 74.9, "gradients between replicas (7 %)", "no bubble, but smaller tensor groups hold more", False),
            (64, 16, "interleaved of 2", 1.19, 0.33, 41.0, "tensor-parallel transfers (19 %)", "half the memory: room for longer samples", False),
            (512, 8, "1f1b", 1.24, 0.9, 77.5, "the pipeline's bubble (18 %)", "few micro-batches are left", False),
        )
    )  # fmt: skip
    points = tuple(
        Point(name, kind, flops * 1e12, moved * 1e12, seconds)
        for name, kind, flops, moved, seconds in (
            ("mlp_up_gate", "gemm", 1060.0, 1.25, 1.55), ("mlp_down", "gemm", 530.0, 0.72, 0.78), ("qkv", "gemm", 190.0, 0.36, 0.29),
            ("attention_out", "gemm", 165.0, 0.34, 0.26), ("head", "gemm", 120.0, 0.3, 0.22), ("attention", "attention", 210.0, 0.4, 0.42),
            ("rms_norm", "memory", 0.8, 0.42, 0.16), ("swiglu", "memory", 0.5, 0.31, 0.11), ("adamw", "optimizer", 0.02, 0.12, 0.05),
            ("embedding", "memory", 0.0, 0.05, 0.02),
        )
    )  # fmt: skip
    estimate = Estimate(
        step_s=step_s, low_s=step_s * 0.91, high_s=step_s * 1.09, phases=PHASES, busy={"gemm": 3.1}, tokens=2048 * 8192, ranks=16384, model_flops=4.2e19,
        memory=held(0), memory_low=62 * GIB, memory_high=67 * GIB, memory_by_rank=tuple(held(rank) for rank in range(ROLES)), fits=True,
        limits="products of matrices (66 % of the step)", assumed=("bf16 products reach 0.80 of the sold rate, measured",),
    )  # fmt: skip
    return PlanPicture(
        **{
            "title": "llama-405b on aion, 16,384 H100",
            "summary": "A dense model of 405 billion parameters, 15.6 T tokens of 8,192 each sample",
            "facts": (("model", "llama, 405.9 G parameters"), ("batch", "2,048 samples of 8,192 tokens"), ("precision", "bf16"), ("stack", "megatron")),
            "lines": ("layout    replicate 128 x tensor 8 x pipeline 16", "memory    64.80 GiB of 79.65 GiB on the fullest rank"),
            "expected": expected,
            "estimate": estimate,
            "memory_limit": 79.65 * GIB,
            "roles": roles,
            "candidates": candidates,
            "roof": Roof("NVIDIA H100 SXM5 80 GB", {"bf16": 989e12, "fp8": 1979e12}, 3.35e12),
            "points": points,
            "scaling": scales(),
            "boundaries": tuple(
                Boundary(name, expected.watts[name], expected.peak_watts[name], 20.9e6 if name == "node" else None, source)
                for name, source in (
                    ("device", "operation mix x 700 W"), ("node", "fitted on MLPerf power logs"), ("it", "the site's fabric"), ("facility", "PUE 1.20"),
                )
            ),
            "states": {"gemm": 700.0, "attention": 651.0, "memory": 455.0, "communication": 245.0, "idle": 119.0},
            "sensitivity": tuple(
                Sensitivity(what, changed, goodput + by, days / (1 + by), 19.2 * days * 24 * 90 / (1 + by))
                for what, changed, by in (
                    ("failures", "twice as often", -0.041), ("failures", "half as often", 0.024), ("checkpoints", "every 1,000 steps", -0.008),
                    ("restart", "in 2 minutes instead of 8", 0.013), ("spares", "none", -0.022),
                )
            ),
            "what_if": WhatIf(
                16384, TOKENS, 4.1 / 16.384, 12.0, 600.0, 16.0e6 / 16384, 1.2, 90.0, None,
                (Cap(400, 0.80, 395.0), Cap(500, 0.90, 490.0), Cap(600, 0.97, 560.0), Cap(700, 1.0, 586.0)),
            ),
        }
        | more
    )  # fmt: skip
