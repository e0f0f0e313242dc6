"""What one operation takes: never faster than the machine, slower where a shape is worse, refused where a chip is unknown."""

import random

import pytest

from gigatrain.errors import PlanError
from gigatrain.planning import hardware
from gigatrain.planning.estimate import rates, stacks
from gigatrain.planning.estimate.constants import TABLE, VALUES
from gigatrain.planning.estimate.work import Op

HABITS = stacks.habits("megatron", "", VALUES)
KNOWN = [chip for chip in hardware.CHIPS.values() if chip.architecture in rates.FAMILIES and chip.bf16.value is not None]


def product(m: int, n: int, k: int, bits: int = 16, groups: int = 1) -> Op:
    kind = "gemm" if groups == 1 else "grouped"
    return Op("x", kind, "forward", 2.0 * m * n * k * groups, groups * (m * k + n * k + m * n) * bits / 8, m, n, k, groups, bits)


def attention(tokens: int, head_dim: int = 128, heads: int = 32, passes: str = "forward") -> Op:
    flops = 2.0 * tokens * tokens * head_dim * heads * (2.5 if passes == "backward" else 1.0)
    return Op("attention", "attention", passes, flops, 8.0 * tokens * head_dim * heads, tokens, tokens, head_dim, heads)


def seconds(op: Op, chip: str = "h100") -> float:
    return rates.cost(op, chip, VALUES, HABITS).seconds


def test_nothing_is_faster_than_the_machine() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        chip = draw.choice(KNOWN)
        found = rates.device(chip.id)
        m, n, k = (int(2 ** draw.uniform(3, 15)) for _ in range(3))
        op = product(m, n, k, draw.choice((4, 8, 16, 32)), draw.choice((1, 1, 8, 64)))
        if draw.random() < 0.3:
            op = attention(m, draw.choice((64, 96, 128, 192, 256)), draw.choice((1, 8, 64)), draw.choice(("forward", "backward")))
        took = seconds(op, chip.id)
        bits = rates.bits_of(found, op.bits) if op.kind != "attention" else 16
        assert op.flops / took < found.peak[bits] * found.reached[bits]
        assert op.bytes / took < found.bandwidth


def test_a_larger_operation_takes_longer() -> None:
    for chip in ("a100", "h100", "b200", "mi300x"):
        for make in (lambda s: product(s, s, s), lambda s: product(s, s, s, 8), lambda s: product(s, 2048, 1024, groups=16), attention):
            times = [seconds(make(2**p), chip) for p in range(5, 15)]
            assert times == sorted(times)


def test_shapes_cost_what_published_tables_say() -> None:
    """Azure/AI-benchmarking-guide, TFLOP/s of square products, A100 in FP16 and H100 in FP8; within 25 %: a run holds less than a benchmark."""
    for chip, bits, size, measured in (
        ("a100", 16, 1024, 119), ("a100", 16, 2048, 222), ("a100", 16, 4096, 228), ("a100", 16, 8192, 254),
        ("h100", 8, 2048, 1011), ("h100", 8, 4096, 1217), ("h100", 8, 8192, 1290),
    ):  # fmt: skip
        got = 2 * size**3 / seconds(product(size, size, size, bits), chip) / 1e12
        assert 0.75 < got / measured < 1.1, (chip, size, got)


def test_lower_precision_is_faster_where_the_chip_has_it() -> None:
    large = (8192, 8192, 8192)
    assert seconds(product(*large, 8), "h100") < 0.7 * seconds(product(*large), "h100")
    assert seconds(product(*large, 8), "a100") == pytest.approx(seconds(product(*large), "a100"), rel=0.05)
    assert seconds(product(*large, 4), "b200") < seconds(product(*large, 8), "b200")
    assert seconds(product(*large, 32), "h100") > seconds(product(*large), "h100")


def test_a_package_of_two_devices_is_two_ranks() -> None:
    assert rates.device("mi250x").peak[16] == pytest.approx(191.5e12)


def test_few_rows_an_expert_are_bound_by_weights() -> None:
    few, many = product(16, 4096, 4096, groups=64), product(1024, 4096, 4096, groups=64)
    assert few.flops / seconds(few) < 0.25 * many.flops / seconds(many)


def test_unknown_chips_are_refused() -> None:
    with pytest.raises(PlanError, match="h100"):
        rates.device("h1000")
    with pytest.raises(PlanError, match="bf16 rate is not known"):
        rates.device("h100-nvl")
    with pytest.raises(PlanError, match="architecture is not known"):
        rates.device("rubin")


def test_a_chip_nobody_timed_says_what_was_assumed() -> None:
    assert "as others of its architecture" in rates.device("gb300").assumed[0]
    assert any("memory bandwidth" in said for said in rates.device("a100-64").assumed)
    assert rates.device("h100").assumed == ()


def test_caps_slow_compute_and_not_memory() -> None:
    assert rates.clock_of("h100", None, 1.0, VALUES) == 1.0
    assert rates.clock_of("h100", 700.0, 1.0, VALUES) == 1.0
    clocks = [rates.clock_of("h100", watts, 1.0, VALUES) for watts in (200.0, 350.0, 500.0, 600.0)]
    assert clocks == sorted(clocks)
    assert 0.75 < clocks[2] < 0.95
    assert rates.clock_of("h100", 650.0, 0.7, VALUES) == 0.7
    with pytest.raises(PlanError, match="draws at any clock"):
        rates.clock_of("h100", 100.0, 1.0, VALUES)
    copy = Op("norm", "memory", "forward", bytes=1e9)
    assert rates.cost(copy, "h100", VALUES, HABITS, clock=0.5) == rates.cost(copy, "h100", VALUES, HABITS)
    assert rates.cost(product(8192, 8192, 8192), "h100", VALUES, HABITS, clock=0.5).seconds > 1.9 * seconds(product(8192, 8192, 8192))


def test_every_constant_has_a_unit_a_source_and_a_value_within_reason() -> None:
    for name, constant in TABLE.items():
        assert constant.unit, name
        assert len(constant.source) > 12, name
        assert constant.value > 0 or name.endswith(".reduced_share"), name  # a link whose switch reduces nothing has none
        if constant.unit == "share":
            assert constant.value <= 1.0, name
        if constant.spread:  # a fit that had to go further than this found a wrong model, not a constant
            assert 1 / 12 < constant.value / constant.prior < 12, name


def test_stacks_are_described_and_unknown_ones_refused() -> None:
    assert stacks.habits("megatron", "Megatron-DeepSpeed", VALUES).overlaps["shard"] < HABITS.overlaps["shard"]
    with pytest.raises(PlanError, match="generic"):
        stacks.habits("pax", "", VALUES)
