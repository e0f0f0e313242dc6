"""Other systems' names of a Llama's tensors, and orders of their rows -> transformers'.

torchtitan and Meta's own files rotate neighbouring channels of a head, transformers the two halves: rows of queries and keys go from (pairs, 2) to (2, pairs)
within each head (transformers' convert_llama_weights_to_hf; torchtitan's Llama3StateDictAdapter does the same).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gigatrain.architectures import Architecture
from gigatrain.errors import CheckpointError
from gigatrain.importing.sources import Source, Whole

_PREFIXES = ("_orig_mod.", "module.", "model.", "app.", "state_dict.")
_TITAN = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}
_UNNEEDED = ("freqs_cis", "inv_freq", "_extra_state", "rope.freqs", "rope.cache")
_TURNS = {"attention.wq.weight", "attention.wk.weight"}


@dataclass(frozen=True)
class Halved:
    """A matrix of queries or keys whose pairs of channels become halves: rows are taken head by head."""

    of: Whole
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows in the new order, read with the rest of their heads."""
        each = self.shape[0] // self.heads
        first, last = start // each, -(-stop // each)
        part = self.of.rows(first * each, last * each)
        turned = part.view(last - first, each // 2, 2, *self.shape[1:]).transpose(1, 2).reshape(-1, *self.shape[1:])
        return turned[start - first * each : stop - first * each]


def for_transformers(source: Source, wanted: Iterable[str], arch: Architecture) -> dict[str, Whole]:
    """The source's weights under transformers' names on disk, which `wanted` are. Raises CheckpointError for what is missing or unknown."""
    wanted, result, unknown = set(wanted), {}, []
    for name, tensor in source.weights.items():
        if name.endswith(_UNNEEDED):
            continue
        found = _known(name, wanted)
        if found is not None:
            result[found] = tensor
        elif (titan := _titan(name)) is not None and titan[0] in wanted:
            heads = {"attention.wq.weight": arch.heads, "attention.wk.weight": arch.kv_heads}.get(titan[1])
            if heads is not None and (arch.family != "llama" or not tensor.shape or tensor.shape[0] % (2 * heads)):
                raise CheckpointError(
                    f"{name} is {list(tensor.shape)}, which {heads} heads of a {arch.family} do not share; only llama's order is known"
                )
            result[titan[0]] = tensor if heads is None else Halved(tensor, heads)
        elif not (arch.tied and name.endswith(("lm_head.weight", "output.weight"))):
            unknown.append(name)
    if missing := sorted(wanted - result.keys()):
        others = f"; it holds, unknown here, {_some(unknown)}" if unknown else ""
        raise CheckpointError(f"the {source.kind} checkpoint lacks {_some(missing)} of a {arch.family} of these numbers{others}")
    if unknown:
        raise CheckpointError(
            f"the {source.kind} checkpoint holds {_some(unknown)}, for which a {arch.family} of these numbers has no place"
        )
    return result


def _known(name: str, wanted: set[str]) -> str | None:
    """`name` without the prefixes of wrappers, if that is a name of transformers."""
    for _ in range(5):
        if name in wanted or f"model.{name}" in wanted:
            return name if name in wanted else f"model.{name}"
        prefix = next((one for one in _PREFIXES if name.startswith(one)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return None


def _titan(name: str) -> tuple[str, str] | None:
    """torchtitan's name as transformers', and what of a layer it is."""
    while (prefix := next((one for one in _PREFIXES if name.startswith(one)), None)) is not None:
        name = name.removeprefix(prefix)
    if name in _TITAN:
        return _TITAN[name], name
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return (f"model.layers.{match[1]}.{_TITAN[match[2]]}", match[2]) if match and match[2] in _TITAN else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
