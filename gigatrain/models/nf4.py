"""Weights of 4 bits: NF4 (arXiv:2305.14314, appendix E), 64 neighbours of a row and one fp32 scale, in plain torch: the same on every device.

    code_e = the nearest of 16 levels to w_e / scale        scale = max |w| of its block        w~_e = level[code_e] * scale

Two codes are one byte, the first in its high half, as bitsandbytes has them. A block never crosses a row, so that a matrix is cut by rows with its scales.
0.5625 B per element; the scales are not quantised again (0.127 B would become 0.06).
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.planning.adapting import BLOCK

# Quantiles of N(0, 1), scaled to [-1, 1], with an exact 0; the paper's numbers.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.lru_cache(maxsize=8)
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two levels of every byte, [256, 2]."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device="cpu")
    byte = torch.arange(256, device="cpu")
    return torch.stack((levels[byte >> 4], levels[byte & 15]), 1).to(device, dtype)


def quantised(weight_oi: Tensor) -> tuple[Tensor, Tensor]:
    """`(codes, scales)`: uint8 [o, i / 2] and fp32 [o, i / 64]."""
    blocks = weight_oi.float().unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=weight_oi.device)
    between = (levels[1:] + levels[:-1]) / 2
    share = blocks / torch.where(scales == 0, 1.0, scales)[..., None]
    codes = torch.bucketize(share, between).to(torch.uint8).flatten(1)
    return (codes[:, ::2] << 4) | codes[:, 1::2], scales


def restored(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [o, i], in `dtype`; levels times scales are rounded once."""
    levels = F.embedding(codes.int(), _pairs(codes.device, torch.float32))  # [o, i / 2, 2]
    return (levels.view(codes.shape[0], -1, BLOCK) * scales[..., None]).to(dtype).flatten(1)
