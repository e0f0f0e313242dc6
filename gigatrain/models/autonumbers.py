"""The numbers of a transformers model that planning needs, measured on its modules without their weights."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gigatrain.errors import PlanError
from gigatrain.foreign import Attention, Foreign
from gigatrain.models.automodel import Auto, plain, wide

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k", "top_k_experts")


def numbers(config: Mapping[str, Any]) -> Foreign:
    """What planning needs of a model, from its config.json: measured on its modules, none of whose weights are allocated."""
    model = Auto(config)
    import transformers

    inner, layers = model.model, model.layers
    if kept_beside := list(model.persistent()):
        raise PlanError(
            f"model.from: {config['model_type']!r} has values beside its trained weights ({kept_beside[0]} and the like), which checkpoints do not hold; "
            "a model without them can be trained"
        )
    described = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(plain(config))
    kept = json.loads(described.to_json_string(use_diff=False))
    for key in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        kept.pop(key, None)
    text = described.get_text_config()
    experts = next((n for key in _EXPERTS if isinstance(n := getattr(text, key, None), int)), None)
    chosen = next((n for key in _CHOSEN if isinstance(n := getattr(text, key, None), int)), experts)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    head = inner.get_output_embeddings()
    matrices = products = 0
    for name, parameter in inner.named_parameters():
        if id(parameter) not in inside or not model.decays(name):
            continue
        stack = experts and chosen and parameter.dim() == 3 and parameter.shape[0] == experts
        matrices += parameter.numel()
        products += parameter.numel() * chosen // experts if stack and experts and chosen else parameter.numel()
    if head is not None:
        products += sum(p.numel() for name, p in head.named_parameters() if p.dim() == 2)
    return Foreign(
        config=kept,
        model_type=config["model_type"],
        class_name=type(inner).__name__,
        layer_class=type(layers[0]).__name__,
        vocab=inner.get_input_embeddings().weight.shape[0],
        hidden=text.hidden_size,
        layers=len(layers),
        tied=head is not None and head.weight is inner.get_input_embeddings().weight,
        total=sum(p.numel() for p in inner.parameters()),
        matrices=matrices,
        products=products,
        largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        attention=_attention(text, layers),
        head=model.head,
        positions=n if isinstance(n := getattr(text, "max_position_embeddings", 0), int) else 0,
        saved=_saved(model),
        wide=len(wide(inner)),
    )


def _attention(text: Any, layers: list[nn.Module]) -> tuple[Attention, ...]:
    """How many layers attend, how wide, and how far they see."""
    heads = getattr(text, "num_attention_heads", None)
    kinds = getattr(text, "layer_types", None)
    found: Counter[tuple[int, int | None]] = Counter()
    for index, layer in enumerate(layers):
        attends = any(
            re.search("attention", type(m).__name__, re.IGNORECASE) and next(m.parameters(), None) is not None for m in layer.modules()
        )
        kind = kinds[index] if isinstance(kinds, list) and len(kinds) == len(layers) else "full_attention"
        if not attends or not isinstance(heads, int) or kind not in ("full_attention", "sliding_attention", "attention"):
            continue
        window = getattr(text, "sliding_window", None) if kinds is None or kind == "sliding_attention" else None
        found[heads * (getattr(text, "head_dim", None) or text.hidden_size // heads), window] += 1
    return tuple(Attention(layers=count, channels=channels, window=window) for (channels, window), count in found.items())


def _saved(model: Auto) -> tuple[float, float]:
    """fp32 elements that a layer keeps for its backward, per token: `(constant, per token of the sample)`, counted on fake tensors of two lengths.

    Where a layer depends on values, as the choice of experts does: inputs and outputs of all its linear maps.
    """
    counts = []
    for tokens in (64, 128):
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                weights = {name: torch.empty(shape, requires_grad=True) for name, shape in model.shapes.items()}
                inputs = {"input_ids": torch.zeros(1, tokens, dtype=torch.int64), "use_cache": False}
                ends = torch.func.functional_call(model.model, weights, kwargs=inputs)
                own = {weight.untyped_storage()._cdata for weight in weights.values()}
                total = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
                del ends
        except Exception:
            maps = [m for layer in model.layers for m in layer.modules() if isinstance(m, nn.Linear)]
            return 1.5 * sum(m.in_features + m.out_features for m in maps) / len(model.layers), 0.0
        counts.append(total / 4 / tokens / len(model.layers))
    slope = max(0.0, (counts[1] - counts[0]) / 64)
    return counts[0] - 64 * slope, slope
