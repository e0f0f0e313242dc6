"""Multi-head latent attention (arXiv:2405.04434): keys and values of all heads are products of one narrow latent, and so may queries be.

    q_th = [n_th, turn(r_th)]      n_t, r_t = norm(x_t A_q) B_q, or x_t W_q where `q_rank` is None
    k_th = [m_th, turn(s_t)]       l_t, s_t = x_t A_kv         m_t, v_t = norm(l_t) B_kv         s_t is one for all heads
    y_t = attention(q, k, v) W_o

Legend of shapes: b batch, t tokens, d hidden channels, h heads, l channels of a latent, n and r channels of a head that are not and are rotated, e of values.
Parameter names are those of transformers' DeepseekV3.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gigatrain.architectures import Architecture
from gigatrain.kernels.attention import Mask
from gigatrain.kernels.linear import Linear
from gigatrain.kernels.ops import Ops
from gigatrain.models.recompute import Remade

EPS = 1e-6  # of the latents' norms, which the released code never takes from config.json

Turn = tuple[Tensor, Tensor, Tensor | None]


class Norm(nn.Module):
    """The weight of an RMS norm; the operation itself is one of `Ops`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))


class LatentAttention(nn.Module):
    """Self-attention of one layer. `gathered`: what tensor parallelism does between the latents, of a rank's own tokens, and the heads, of all tokens."""

    gathered: Callable[[Tensor], Tensor] | None = None

    def __init__(self, arch: Architecture, ops: Ops) -> None:
        super().__init__()
        assert arch.kv_rank is not None
        assert arch.rope_head_dim is not None
        self.arch, self.ops = arch, ops
        self.unrotated = arch.head_dim - arch.rope_head_dim
        linear: Any = lambda rows, columns, bias=False: Linear(rows, columns, bias=bias, product=ops.linear)  # noqa: E731
        if arch.q_rank is None:
            self.q_proj = linear(arch.hidden, arch.heads * arch.head_dim)
        else:
            self.q_a_proj = linear(arch.hidden, arch.q_rank, arch.qkv_bias)
            self.q_a_layernorm = Norm(arch.q_rank)
            self.q_b_proj = linear(arch.q_rank, arch.heads * arch.head_dim)
        self.kv_a_proj_with_mqa = linear(arch.hidden, arch.kv_rank + arch.rope_head_dim, arch.qkv_bias)
        self.kv_a_layernorm = Norm(arch.kv_rank)
        self.kv_b_proj = linear(arch.kv_rank, arch.heads * (self.unrotated + arch.value_dim))
        self.o_proj = linear(arch.heads * arch.value_dim, arch.hidden, arch.output_bias)

    def forward(self, x_btd: Tensor, turn: Turn | None, seen: Mask, again: Remade | None = None) -> Tensor:
        """`again`: the latents' norms and the keys, of which the values' storage holds all but the rotated channels, are made again in the backward."""
        arch, ops = self.arch, self.ops
        latents = self._latents(x_btd, again)
        if self.gathered is not None and arch.q_rank is not None:
            latents = self.gathered(torch.cat(latents, -1)).split([part.shape[-1] for part in latents], -1)
        *query, kv_btl, key_btr = latents
        q_bthd = (self.q_b_proj(query[0]) if query else self.q_proj(x_btd)).unflatten(-1, (-1, arch.head_dim))
        kv_bthd = self.kv_b_proj(kv_btl).unflatten(-1, (-1, self.unrotated + arch.value_dim))
        still_bthn, turned_bthr = q_bthd.split([self.unrotated, arch.rotary_dim], -1)
        key_bt1r = key_btr.unsqueeze(2)
        grow_bt = None
        if turn is not None:
            cos, sin, grow_bt = turn
            turned_bthr, key_bt1r = ops.rope(turned_bthr, key_bt1r, cos, sin, arch.rope_interleaved)
        q_bthd = torch.cat((still_bthn, turned_bthr), -1)
        if grow_bt is not None:
            q_bthd = q_bthd * grow_bt[:, :, None, None]
        k_bthd = self._keys(kv_bthd, key_bt1r)
        if again is not None:
            again.drop([k_bthd], lambda: [self._keys(kv_bthd, key_bt1r)])
        out_bthe = ops.attention(q_bthd, k_bthd, kv_bthd[..., self.unrotated :], seen, scale=arch.scale)
        return self.o_proj(out_bthe.flatten(-2))

    def _latents(self, x_btd: Tensor, again: Remade | None) -> list[Tensor]:
        """Of queries, where they have one, and of keys and values, both normed, and the keys' shared channels before they are rotated."""
        arch = self.arch
        kv_btl, key_btr = self.kv_a_proj_with_mqa(x_btd).split([self.kv_a_layernorm.weight.shape[0], arch.rotary_dim], -1)
        wide = (
            [(kv_btl, self.kv_a_layernorm)]
            if arch.q_rank is None
            else [(self.q_a_proj(x_btd), self.q_a_layernorm), (kv_btl, self.kv_a_layernorm)]
        )

        def normed() -> list[Tensor]:
            return [self.ops.rms_norm(latent, norm.weight, EPS, arch.norm) for latent, norm in wide]

        made = normed()
        if again is not None:
            again.drop(made, normed)
        return [*made, key_btr]

    def _keys(self, kv_bthd: Tensor, key_bt1r: Tensor) -> Tensor:
        return torch.cat((kv_bthd[..., : self.unrotated], key_bt1r.expand(-1, -1, kv_bthd.shape[2], -1)), -1)
