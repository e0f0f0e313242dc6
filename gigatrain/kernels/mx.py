"""Tensors in microscaling formats: MXFP8 and NVFP4, bit for bit as tensor cores of sm_100 take them.

    mxfp8   codes e4m3, one scale 2^(s - 127) for 32 neighbours along the sum, s in eight bits (E8M0; OCP Microscaling Formats v1.0, section 5.3, 5.4.1);
            up:    the least power of two that is not below max|x| / 448, so that nothing saturates (arXiv:2506.08027);
            floor: 2^(floor(log2 max|x|) - 8), the specification's, which saturates what is above 448 of it
    nvfp4   codes e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6), one e4m3 scale for 16 neighbours and one fp32 scale for all (arXiv:2509.25149):
            all = max|x| / (6 * 448), scale = e4m3((max of 16 / 6) / all), codes = e2m1(x / (scale * all))

Legend: r rows, k elements along the sum, packed in nvfp4 as k / 2 bytes, the even element in the low half. Rounding is to nearest even, of nvfp4 also
stochastic: up with the probability of the distance from below. Codes of e2m1 have no NaN: what is not finite makes its block's scale NaN, in both formats.

These are plain torch on every device: a fused form would need a GPU of sm_100 to be judged on, and there is none. The product is torch's.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from gigatrain.kernels.fp8 import DTYPES, encode, scale_of

BLOCKS = {"mxfp8": 32, "nvfp4": 16}
PADDED = 32  # both products need sums of a multiple of 32: 16 bytes of e2m1
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1's magnitudes, by code
_TILE = (128, 4)  # of scales, as tensor cores read them


def _amax(blocks: Tensor, *dims: int) -> Tensor:
    if 0 in blocks.shape:
        return blocks.new_zeros([1 if i in {d % blocks.dim() for d in dims} else n for i, n in enumerate(blocks.shape)])
    return blocks.abs().amax(dims, keepdim=True)


def power(bits: Tensor) -> Tensor:
    """2^(s - 127) in fp32 of s in 0..254, NaN of 255."""
    whole = bits.int()
    value = torch.where(whole == 0, torch.full_like(whole, 0x00400000), whole << 23).view(torch.float32)
    return torch.where(whole == 255, math.nan, value)


def mxfp8(x_rk: Tensor, rounding: Literal["up", "floor"] = "up", form: Literal["e4m3", "e5m2"] = "e4m3") -> tuple[Tensor, Tensor]:
    """`(codes_rk, scales [r, k / 32])`, scales in float8_e8m0fnu; k must be a multiple of 32."""
    blocks = x_rk.float().unflatten(-1, (-1, BLOCKS["mxfp8"]))
    amax = _amax(blocks, -1)
    if rounding == "floor":
        emax = {"e4m3": 8, "e5m2": 15}[form]
        scale = ((amax.view(torch.int32) >> 23) - emax).clamp(0, 254)
    else:
        ratio = amax / {"e4m3": 448.0, "e5m2": 57344.0}[form]
        scale = torch.where(ratio <= 2.0**-127, 0, (ratio.view(torch.int32) + 0x7FFFFF) >> 23).clamp(max=254)
    scale = torch.where(amax < math.inf, scale, 255)
    # 2^(127 - s) is exact, also of 254, where it is subnormal; s = 255 is NaN and makes every code NaN.
    codes = encode(blocks, power(scale), form)
    return codes.flatten(-2), scale.squeeze(-1).to(torch.uint8).view(torch.float8_e8m0fnu)


def e2m1(x: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Codes 0 to 15 in uint8, saturating; rounded to nearest even, or, with `uniform` in [0, 1), stochastically."""
    size = x.abs().clamp_(max=6.0)
    # Two codes between a power of two and the next, from 1 on; below 1 as from 1 to 2: counted in halves of that power.
    exponent = (size.view(torch.int32) >> 23).sub_(127).clamp_(min=0)
    steps = size.mul_((128 - exponent).bitwise_left_shift_(23).view(torch.float32))
    steps = steps.round_() if uniform is None else steps.add_(uniform).floor_()
    return steps.to(torch.uint8).add_(exponent.to(torch.uint8), alpha=2).bitwise_or_(torch.signbit(x).view(torch.uint8) << 3)


def drawn(x_rk: Tensor) -> Tensor:
    """Numbers in [0, 1) for rounding stochastically: a hash of each element's bits and place. No state, so that a resumed run rounds as the unbroken one.

    Multiplications and shifts in 32 bits, wrapping.
    """
    place = torch.arange(x_rk.numel(), dtype=torch.int32, device=x_rk.device).view(x_rk.shape)
    bits = x_rk.float().contiguous().view(torch.int32) * -1640531527 + place * -2048144777
    for _ in range(2):
        bits = bits.bitwise_xor_((bits >> 16) & 0xFFFF).mul_(0x45D9F3B)
    return (bits >> 8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)


def nvfp4(x_rk: Tensor, uniform_rk: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`(packed [r, k / 2] uint8, scales [r, k / 16] in e4m3, all [1] fp32)`; k must be a multiple of 16."""
    wide = x_rk.float()
    whole = _amax(wide, -2, -1).view(1)
    # As every scale of ours at least 2^-100 / 448, so that a tensor of zeros has one; never a power of two.
    all_ = scale_of(whole, 448.0 * 6.0, False)
    blocks = wide.unflatten(-1, (-1, BLOCKS["nvfp4"]))
    amax = _amax(blocks, -1)
    scale = torch.where(amax < math.inf, (amax / 6.0 / all_).clamp(max=448.0), math.nan).to(DTYPES["e4m3"])
    unit = scale.float() * all_
    # A block whose scale rounds to 0 (2^-10 of the largest, or below) is 0; of one that is not finite the scale says so.
    value = torch.where(unit > 0, blocks / unit, 0.0)
    codes = e2m1(value.flatten(-2), uniform_rk)
    return codes[..., ::2] | codes[..., 1::2] << 4, scale.squeeze(-1), all_


def unpacked(packed: Tensor) -> Tensor:
    """fp32 values of e2m1 codes: [r, k / 2] -> [r, k]."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(torch.int16)
    # Half precision's bits hold e2m1's shifted by 9, and 2^14 too small.
    return ((codes & 7) << 9 | (codes & 8) << 12).view(torch.float16).float().mul_(2.0**14)


def widened(codes: Tensor, scales: Tensor, all_: Tensor | None = None) -> Tensor:
    """What codes stand for, in fp32; of nvfp4 with `all_`."""
    if all_ is None:
        return (codes.float().unflatten(-1, (-1, BLOCKS["mxfp8"])) * power(scales.view(torch.uint8))[..., None]).flatten(-2)
    return (unpacked(codes).unflatten(-1, (-1, BLOCKS["nvfp4"])) * (scales.float() * all_)[..., None]).flatten(-2)


def swizzled(scales_rk: Tensor) -> Tensor:
    """Scales as tensor cores read them, flat: tiles of 128 rows by 4 scales, in each the 32 rows r, r + 32, r + 64, r + 96 beside each other
    (cuBLAS, "1D block scaling factors layout"); padded with zeros to whole tiles."""
    bits = scales_rk.view(torch.uint8)
    rows, columns = bits.shape
    bits = torch.nn.functional.pad(bits, (0, -columns % _TILE[1], 0, -rows % _TILE[0]))
    tiles = bits.view(bits.shape[0] // _TILE[0], 4, 32, bits.shape[1] // _TILE[1], 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scales_rk.dtype)


def unswizzled(flat: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `swizzled`."""
    high, wide = -(-rows // _TILE[0]), -(-columns // _TILE[1])
    tiles = flat.view(torch.uint8).view(high, wide, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(high * _TILE[0], wide * _TILE[1])[:rows, :columns].contiguous().view(flat.dtype)
