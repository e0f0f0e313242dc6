"""MXFP8 and NVFP4 bit for bit: from the formats' definitions, torch's casts and the specification's rules."""

import math

import pytest
import torch

from gigatrain.kernels import mx

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling Formats v1.0, table 5


def test_every_code_of_e2m1() -> None:
    values = torch.tensor(E2M1)
    assert mx.e2m1(values).tolist() == list(range(8))
    assert mx.e2m1(-values).tolist() == list(range(8, 16))
    every = torch.arange(256, dtype=torch.uint8)
    signed = torch.cat((values, -values))
    assert torch.equal(mx.unpacked(every[None])[0].view(256, 2), torch.stack((signed[(every & 15).long()], signed[(every >> 4).long()]), 1))


def test_e2m1_rounds_to_nearest_even_and_saturates() -> None:
    for low in range(7):
        half = (E2M1[low] + E2M1[low + 1]) / 2
        below, above = (float(torch.nextafter(torch.tensor(half), torch.tensor(to))) for to in (0.0, 9.0))
        even = low if low % 2 == 0 else low + 1
        assert mx.e2m1(torch.tensor([below, half, above, -half])).tolist() == [low, even, low + 1, even + 8]
    assert mx.e2m1(torch.tensor([6.01, 1e30, -1e30])).tolist() == [7, 7, 15]


def test_e2m1_rounded_stochastically_is_right_on_average_and_exact_where_it_can_be() -> None:
    torch.manual_seed(0)
    values = torch.tensor(E2M1)
    assert mx.e2m1(values, torch.full((8,), 0.999)).tolist() == list(range(8))
    for x in (0.1, 0.7, 1.9, 2.6, 3.9, 5.5):
        found = values[mx.e2m1(torch.full((20000,), x), torch.rand(20000)).long()]
        neighbours = sorted(set(found.tolist()))
        assert len(neighbours) == 2
        assert neighbours[0] < x < neighbours[1]
        gap = neighbours[1] - neighbours[0]
        assert abs(found.mean().item() - x) < 5 * gap / 2 / math.sqrt(20000)


def test_draws_are_uniform_follow_from_the_numbers_and_differ_between_places() -> None:
    torch.manual_seed(2)
    x = torch.randn(512, 512).bfloat16()
    draws = mx.drawn(x)
    assert torch.equal(draws, mx.drawn(x.clone()))
    for found in (draws, mx.drawn(torch.full((512, 512), 0.3)), mx.drawn(torch.zeros(512, 512)), draws[x > 1]):
        counts = torch.histc(found, 64, 0.0, 1.0)
        expected = found.numel() / 64
        assert ((counts - expected).square().sum() / expected) < 63 + 5 * (2 * 63) ** 0.5  # chi squared, five standard deviations
    assert abs(torch.corrcoef(torch.stack((draws.flatten()[1:], draws.flatten()[:-1])))[0, 1]) < 5 / 512
    packed, scales, whole = mx.nvfp4(x, draws)
    plain = mx.widened(*mx.nvfp4(x)) - x.float()
    error = mx.widened(packed, scales, whole) - x.float()
    small = x.abs() < 0.3  # where rounding to nearest takes more from numbers than it gives
    size = x.float().sign()[small]
    assert abs((error[small] * size).mean()) < 0.3 * abs((plain[small] * size).mean())


def test_e8m0_is_torchs() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(mx.power(every)[:255], every.view(torch.float8_e8m0fnu).float()[:255])
    assert mx.power(every)[255].isnan()
    assert every.view(torch.float8_e8m0fnu).float()[255].isnan()


def test_mxfp8_rounds_its_scale_up_so_that_nothing_saturates() -> None:
    x = torch.zeros(6, 32)
    x[:, 3] = torch.tensor([448.0, 449.0, 1.0, 0.0, 1e-44, 3e38])
    x[:, 4] = -x[:, 3] / 3
    codes, scales = mx.mxfp8(x)
    exponents = [int(s) - 127 for s in scales.view(torch.uint8)[:, 0]]
    assert exponents == [0, 1, -8, -127, -127, math.ceil(math.log2(3e38 / 448))]
    assert torch.equal(
        codes[:, 3].float(), (x[:, 3].double() * 2.0 ** -torch.tensor(exponents).double()).float().to(torch.float8_e4m3fn).float()
    )
    assert (codes.float().abs() <= 448).all()


def test_mxfp8_by_the_specifications_rule() -> None:
    """Section 6.3: the scale is the largest power of two not above max|x|, over that of the largest normal number, 2^8; what is above 448 of it saturates."""
    x = torch.zeros(3, 32)
    x[:, 0] = torch.tensor([1.0, 1.99, 2.0])
    codes, scales = mx.mxfp8(x, "floor")
    assert (scales.view(torch.uint8)[:, 0].int() - 127).tolist() == [-8, -8, -7]
    assert codes[:, 0].float().tolist() == [256.0, 448.0, 256.0]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_makes_its_block_nan(poison: float) -> None:
    x = torch.randn(2, 64)
    x[1, 40] = poison
    found = mx.widened(*mx.mxfp8(x))
    assert found[1, 32:].isnan().all()
    assert torch.isfinite(found[0]).all()
    assert torch.isfinite(found[1, :32]).all()
    assert not torch.isfinite(mx.widened(*mx.nvfp4(x))[1, 32:48]).any()


def test_nvfp4_has_two_scales() -> None:
    """A block's largest is 6 of its scale; the largest block's scale is 448 of the tensor's (arXiv:2509.25149)."""
    torch.manual_seed(1)
    x = torch.randn(32, 64) * torch.logspace(-2, 2, 32)[:, None]
    packed, scales, whole = mx.nvfp4(x)
    assert packed.shape == (32, 32)
    assert scales.dtype == torch.float8_e4m3fn
    assert scales.float().max() == 448.0
    torch.testing.assert_close(whole[0], x.abs().max() / (6 * 448))
    wide = mx.widened(packed, scales, whole).unflatten(1, (-1, 16))
    blocks = x.unflatten(1, (-1, 16))
    # Half of e2m1's widest gap, 2 of 6, and half a unit of e4m3's scale, 2^-4, of each block's largest.
    assert ((wide - blocks).abs() <= blocks.abs().amax(-1, keepdim=True) * (1 / 6 + 2**-4)).all()
    zeros = mx.widened(*mx.nvfp4(torch.zeros(3, 32)))
    assert torch.equal(zeros, torch.zeros(3, 32))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 4), (129, 5), (300, 12)])
def test_swizzled_scales_lie_where_tensor_cores_read_them(rows: int, columns: int) -> None:
    """cuBLAS: scale (r, c) of tile (r / 128, c / 4) is at 512 tile + 16 (r mod 32) + 4 (r mod 128 / 32) + c mod 4."""
    scales = torch.randint(0, 255, (rows, columns), dtype=torch.uint8)
    flat = mx.swizzled(scales)
    tiles = -(-columns // 4)
    assert flat.numel() == -(-rows // 128) * tiles * 512
    for r in {0, rows // 2, rows - 1}:
        for c in {0, columns // 2, columns - 1}:
            at = 512 * (r // 128 * tiles + c // 4) + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4
            assert flat[at] == scales[r, c]
    assert torch.equal(mx.unswizzled(flat, rows, columns), scales)
    assert flat.int().sum() == scales.int().sum()  # padding is 0
