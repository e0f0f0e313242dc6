"""Intervals are conformal quantiles over sources, lean on wider groups where there are few, and are wider outside of what was measured."""

import math
import random
from dataclasses import replace

import pytest

from gigatrain.planning.estimate import estimate, interval, rows
from gigatrain.planning.estimate.interval import Residual

GROUP = ("Hopper", "megatron", "dense")
ROW = {
    "gpu": "H100-SXM-80GB", "n_gpus": 64, "framework": "Megatron-LM", "precision": "bf16", "model": "Llama-3-8B", "layers": 32, "hidden": 4096, "heads": 32,
    "kv_heads": 8, "ffn": 14336, "glu": True, "vocab": 128256, "seq_len": 8192, "tp": 2, "zero_stage": 1, "micro_batch": 1, "global_batch": 128,
}  # fmt: skip


def case(**change):
    found = rows.parse(ROW | change)
    return found.workload, found.cluster


def test_a_quantile_takes_the_finite_sample_into_account():
    found = [Residual(f"s{i}", GROUP, i / 100) for i in range(1, 20)]
    assert interval.quantile(found) == pytest.approx(0.18)  # 0.9 (1 + 1/19) of 19 are 18 of them; without the correction 17.1
    assert interval.quantile(found[:5]) == 0.05  # five cannot promise more than their largest
    assert interval.quantile([Residual("s", GROUP, 0.001)] * 9) == interval.NARROWEST


def test_one_large_source_does_not_decide():
    many = [Residual("big", GROUP, 0.01)] * 900
    few = [Residual(f"s{i}", GROUP, 0.5) for i in range(10)]
    assert interval.quantile(many + few) == 0.5
    assert interval.quantile(many + few[:1]) < 0.5


def test_intervals_hold_new_rows_as_often_as_they_promise():
    chance = random.Random(1)
    covered = []
    for _ in range(200):
        bias = {source: chance.gauss(0, 0.1) for source in range(12)}
        found = [
            Residual(str(source), GROUP, bias[source] + chance.gauss(0, 0.05))
            for source in range(12)
            for _ in range(chance.choice((3, 10)))
        ]
        fresh = chance.gauss(0, 0.1) + chance.gauss(0, 0.05)
        covered.append(abs(fresh) <= interval.width(GROUP, 0, {"widths": interval.learn(found)}))
    assert 0.85 <= sum(covered) / len(covered) <= 0.98


def test_a_group_with_few_sources_leans_on_the_wider_one():
    found = [Residual(f"s{i}", ("Ampere", "deepspeed", "dense"), 0.4) for i in range(8)] + [Residual("one", GROUP, 0.05)] * 10
    widths = interval.learn(found)
    assert widths["Ampere deepspeed dense"] == pytest.approx(0.4)
    assert 0.05 < widths["Hopper megatron dense"] < 0.4
    assert interval.width(("CDNA", "megatron", "MoE"), 0, {"widths": widths}) == widths["all"]


def test_what_was_measured_is_inside_and_each_thing_beyond_is_named_and_widens():
    workload, cluster = case()
    domain = interval.domain([(workload, cluster)])
    assert interval.beyond(workload, cluster, domain) == ()
    longer = replace(workload, sequence=8192 * 4)
    (said,) = interval.beyond(longer, cluster, domain)
    assert said == "sequence 32,768 (measured: up to 8,192)"
    strange, other = case(gpu="B200", precision="fp8", moe_experts=64, moe_topk=8, moe_ffn=1408, framework="nanotron", notes="lora")
    said = " | ".join(interval.beyond(strange, other, domain))
    for word in ("b200", "nor on any Blackwell", "nanotron", "experts 64", "LoRA"):
        assert word in said
    assert "8 bits on h100" in interval.beyond(replace(workload, precision="fp8_delayed"), cluster, domain)[0]
    assert "500 W" in interval.beyond(workload, replace(cluster, cap_watts=500.0), domain)[0]
    assert "MoE on Hopper" in interval.beyond(*case(moe_experts=8, moe_topk=2, moe_ffn=14336), domain)[0]
    learnt = {"widths": {"all": 0.2}}
    assert interval.width(GROUP, 2, learnt) == pytest.approx(0.2 * interval.BEYOND**2)
    assert interval.width(GROUP, 50, learnt) == interval.WIDEST


def test_the_stored_intervals_are_whole():
    learnt = interval._learnt()
    assert all(interval.NARROWEST <= width <= interval.WIDEST for width in learnt["widths"].values())
    assert {"all", "dense", "MoE"} <= learnt["widths"].keys()
    assert {"a100", "h100", "b200"} <= learnt["domain"]["chips"].keys()
    workload, cluster = case()
    assert math.log(1.03) < interval.width(interval.group(workload, cluster))


def test_memory_has_the_width_of_its_stacks_rows_and_ours_only_where_it_is_no_state():
    alike = [interval.Peak("big", "megatron", 0.01, 0.02, True)] * 90 + [
        interval.Peak(f"s{i}", "megatron", 0.3, 0.6, False) for i in range(3)
    ]
    widths = interval.learn_memory([*alike, *[interval.Peak("other", "deepspeed", 0.05, None, True)] * 9])
    assert widths["all"] == 0.3  # of five sources, three err so, however many rows the others have
    assert 0.05 < widths["deepspeed"] < widths["megatron"] == pytest.approx(0.3)
    assert widths["rest by torch"] < widths["rest"] == 0.6
    learnt = {"memory": widths}
    held = {
        "weights": 20.0,
        "gradients": 10.0,
        "optimizer": 30.0,
        "activations": 30.0,
        "workspace": 8.0,
        "buffers": 1.0,
        "slack": 0.5,
        "device": 0.5,
    }
    workload, _ = case()
    low, high = interval.memory_interval(workload, held, learnt)
    assert high / 100 == pytest.approx(100 / low) == pytest.approx(math.exp(0.3))
    wider = interval.memory_interval(replace(workload, stack="nanotron"), held, learnt)
    assert wider[1] == pytest.approx(100 * math.exp(0.3 * interval.BEYOND))
    own = interval.memory_interval(replace(workload, stack="gigatrain_native"), held, learnt)
    assert own[1] == pytest.approx(60 + 40 * math.exp(widths["rest by torch"]))
    assert 60 < own[0] < 97.1
    bare = held | dict.fromkeys(("activations", "workspace", "buffers", "slack", "device"), 0.0)
    assert interval.memory_interval(replace(workload, stack="gigatrain_native"), bare, learnt)[1] == pytest.approx(
        60 * math.exp(interval.NARROWEST)
    )


def test_an_estimate_takes_the_stored_width_of_memory():
    workload, cluster = case()
    found = estimate.estimate(workload, cluster)
    assert (found.memory_low, found.memory_high) == interval.memory_interval(workload, found.memory)
    assert found.memory_high > 1.2 * found.memory_bytes  # Megatron's rows, metered by many, err so
    assert {"all", "rest", "rest by torch", "megatron", "deepspeed"} == interval._learnt()["memory"].keys()
