"""Tensors in eight bits: the formats from their definition, the fused quantiser bit for bit, and what must stay visible."""

import math

import pytest
import torch
from torch import Tensor

from gigatrain.errors import KernelError
from gigatrain.kernels import fp8, fp8_fused, launch


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, but for which NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.float(), b.float()
    return bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())


def values_of(form: str) -> list[float]:
    """Every finite non-negative value of a format from its definition: exponent and mantissa bits, bias, and what the last codes are (OCP OFP8)."""
    exponents, mantissas, bias = {"e4m3": (16, 8, 7), "e5m2": (32, 4, 15)}[form]
    found = []
    for e in range(exponents):
        for m in range(mantissas):
            last = (e, m) == (15, 7) if form == "e4m3" else e == 31  # NaN; infinity and NaN
            if not last:
                found.append((m / mantissas if e == 0 else 1 + m / mantissas) * 2.0 ** ((e or 1) - bias))
    return found


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_every_code_is_the_value_of_its_definition(form: str) -> None:
    values = torch.tensor(values_of(form))
    codes = torch.arange(len(values), dtype=torch.uint8)
    for sign, bits in ((1.0, codes), (-1.0, codes + 128)):
        of = bits.view(fp8.DTYPES[form])
        assert torch.equal(fp8.widened(fp8.Quantised(of[None], torch.ones(1), "tensor"))[0], sign * values)
        assert torch.equal(fp8.encode(sign * values, torch.ones(1), form).view(torch.uint8), bits)
    assert values[-1] == fp8.LARGEST[form]


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_rounding_is_to_nearest_even_everywhere(form: str) -> None:
    """Halfway between every two neighbours, and one fp32 number to either side; subnormals too."""
    values = torch.tensor(values_of(form), dtype=torch.float64)
    half = ((values[1:] + values[:-1]) / 2).float()
    low, high = torch.arange(len(half)), torch.arange(1, len(half) + 1)
    even = torch.where(low % 2 == 0, low, high)
    for x, expected in (
        (half, even),
        (torch.nextafter(half, torch.tensor(0.0)), low),
        (torch.nextafter(half, torch.tensor(math.inf)), high),
    ):
        for version in (fp8.reference, fp8.fused):
            given = torch.ones(1)
            padded = torch.nn.functional.pad(x, (0, -len(x) % 16))[None]
            codes = version(padded, "tensor", form, False, True, False, given)[0][0, : len(x)]  # type: ignore[arg-type]
            assert torch.equal(codes.view(torch.uint8), expected.to(torch.uint8))


def test_the_quick_way_back_on_a_cpu_is_torchs() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert same(fp8._from_e4m3(every), every.float())


@pytest.mark.parametrize("case", fp8.CASES, ids=str)
def test_fused_codes_and_scales_are_those_of_plain_torch(case: tuple) -> None:
    torch.manual_seed(0)
    (x,), _ = fp8._sample(case, "cpu")
    _, _, kind, form, power, _ = case
    poisons = (None, math.nan, math.inf, -math.inf, 0.0, 1e-44, 3e38) if x.numel() else (None,)
    for turn, poison in enumerate(poisons):
        along, across = ((True, True), (True, False), (False, True))[turn % 3]
        y = x.clone()
        if poison is not None:
            y.view(-1)[3 :: 7 if abs(poison) < 1 else y.numel()] = poison
            y = torch.zeros_like(y) + poison if abs(poison) < 1 else y
        found = [version(y, kind, form, power, along, across) for version in (fp8.reference, fp8.fused)]
        assert all(same(a, b) for a, b in zip(*found, strict=True)), poison
        wide = torch.nn.functional.pad(y, (1, 2))[:, 1:-2]  # a part of wider rows
        assert all(same(a, b) for a, b in zip(found[0], fp8.fused(wide, kind, form, power, along, across), strict=True))


@pytest.mark.parametrize("kind", ["tensor", "row", "tile", "block"])
def test_what_is_quantised_is_near_what_was_given(kind: fp8.Kind) -> None:
    """Half a unit in the last place, 2^-4 of a value, or 2^-10 of the scale's unit below the least normal number."""
    torch.manual_seed(1)
    x = torch.randn(256, 384) * torch.logspace(-4, 4, 384)
    for power in (False, True):
        codes, scales, turned, other, _ = fp8.reference(x, kind, "e4m3", power)
        for wide, exact, s in (
            (fp8.widened(fp8.Quantised(codes, scales, kind)), x, scales),
            (fp8.widened(fp8.Quantised(turned, other, kind)), x.t(), other),
        ):
            unit = torch.nn.functional.interpolate(s[None, None], exact.shape)[0, 0] if kind != "tensor" else s
            assert ((wide - exact).abs() <= (exact.abs() * 2.0**-4 * 1.0001).maximum(unit * 2.0**-10 * 1.0001)).all()
        assert not power or torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))


def test_a_power_of_two_is_rounded_up_and_an_exact_one_stays() -> None:
    amax = torch.tensor([448.0, 448.0001, 447.9999, 896.0, 1.0, 0.0, math.inf, math.nan])
    found = fp8.scale_of(amax, 448.0, True)
    assert found[:5].tolist() == [1.0, 2.0, 1.0, 2.0, 2.0**-8]
    assert found[5] == 2.0 ** math.ceil(math.log2(2.0**-100 / 448))
    assert found[6] == math.inf
    assert found[7].isnan()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["tensor", "row", "tile", "block"])
def test_what_is_not_finite_is_not_finite_in_either_copy(kind: fp8.Kind, poison: float) -> None:
    x = torch.ones(128, 128)
    x[5, 7] = poison
    for version in (fp8.reference, fp8.fused):
        codes, scales, turned, other, _ = version(x, kind, "e4m3", True)
        assert not torch.isfinite(fp8.widened(fp8.Quantised(codes, scales, kind))[5, 7])
        assert not torch.isfinite(fp8.widened(fp8.Quantised(turned, other, kind))[7, 5])
        codes, scales, *_ = version(x, "tensor", "e4m3", True, True, False, torch.ones(1))  # a scale from before, which is finite
        assert fp8.widened(fp8.Quantised(codes, scales, "tensor"))[5, 7].isnan()


def test_a_given_scale_saturates_and_the_magnitude_is_returned_for_the_next() -> None:
    x = torch.full((16, 16), 3.0)
    x[2, 3] = -1000.0
    for version in (fp8.reference, fp8.fused):
        codes, _, turned, _, amax = version(x, "tensor", "e4m3", False, True, True, torch.ones(1))
        assert codes.float()[2, 3] == turned.float()[3, 2] == -448.0
        assert amax.tolist() == [1000.0]


def test_operators_are_sound() -> None:
    x = torch.randn(33, 144)
    for kind in ("tensor", "row"):
        torch.library.opcheck(torch.ops.gigatrain.fp8_quantise.default, (x, kind, "e4m3", True, True, True, None))
    torch.library.opcheck(torch.ops.gigatrain.fp8_quantise.default, (torch.randn(40, 128), "tile", "e5m2", False, True, False, None))
    torch.library.opcheck(torch.ops.gigatrain.fp8_norm.default, (x, x, torch.ones(144), 1e-5, "llama", 0.5, "row", True, True))
    torch.library.opcheck(torch.ops.gigatrain.fp8_swiglu.default, (x, x, "row", True, True))


def test_shapes_and_dtypes_are_refused_with_the_way_out() -> None:
    with pytest.raises(KernelError, match=r'\(4, 24\): scales of kind row need multiples of 16; set kernels.quantise = "reference"'):
        fp8.fused(torch.ones(4, 24), "row", "e4m3", True)
    with pytest.raises(KernelError, match=r"\(64, 128\): scales of kind block need multiples of 128"):
        fp8.fused(torch.ones(64, 128), "block", "e4m3", True)
    with pytest.raises(KernelError, match=r"they take bf16, fp16 and fp32, not torch.float64"):
        fp8.fused(torch.ones(4, 16, dtype=torch.float64), "row", "e4m3", True)


@pytest.mark.parametrize("configuration", fp8.SPACE["quantise"], ids=str)
def test_every_configuration_gives_the_same_codes(configuration: dict[str, int]) -> None:
    x = torch.randn(150, 208)
    with launch.forced("quantise", configuration):
        assert all(same(a, b) for a, b in zip(fp8.fused(x, "row", "e4m3", True), fp8.reference(x, "row", "e4m3", True), strict=True))


@pytest.mark.parametrize("case", fp8_fused.CASES, ids=str)
def test_a_producer_that_quantises_gives_the_codes_of_both_one_after_the_other(case: tuple) -> None:
    torch.manual_seed(2)
    tensors, call = fp8_fused._sample(case, "cpu")
    assert all(same(a, b) for a, b in zip(call(fp8_fused.reference, *tensors), call(fp8_fused.fused, *tensors), strict=True))
