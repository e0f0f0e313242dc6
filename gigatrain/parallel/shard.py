"""Sharded weights: FSDP2 and HSDP by torch's `fully_shard`, with sums instead of means and storage of our own.

Each layer is one unit, its experts another (over fewer ranks, since ranks of `expert` hold different ones), and what is left (embedding, last norm, head,
with the loss) the root's. A rank keeps rows chunk by chunk of every parameter, or, where a layer's experts are too few to share out, some of each one's
outputs (`cut_along`); a layer's weights are gathered before its forward and again before its
backward, and its gradient is reduce-scattered behind the backward of the layer before it. HSDP then sums the shards over the copies.

FSDP2 is imported where weights are sharded: it takes a second, which one process alone need not wait for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gigatrain import config
from gigatrain.parallel.mesh import WEIGHTS, Mesh
from gigatrain.parallel.places import Places, chunk

EXPERT_WEIGHTS = ("outer", "context")  # ranks along these hold the same experts


def shards(mesh: Mesh) -> bool:
    """Whether weights are sharded at all; else copies are summed by parallel/replicate.py."""
    return mesh.size(*WEIGHTS) > 1


def apply(model: nn.Module, mesh: Mesh, places: Places, engine: config.Engine, *, compute: torch.dtype, stored: torch.dtype) -> None:
    """Shard a model's parameters over the mesh, and say so in `places`; `stored` is what the shards are kept in, `compute` what is gathered.

    model: on meta, with `layers` and a method `loss`, already cut by the other parallelisms. Gradients are summed over the ranks, never averaged.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )
    from torch.distributed.tensor import Shard

    policy = MixedPrecisionPolicy(
        param_dtype=compute if compute != stored else None,
        reduce_dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[engine.reduce] if compute != torch.float32 else None,
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda") if engine.offload else OffloadPolicy()
    options: dict[str, Any] = {"mp_policy": policy, "offload_policy": offload, "reshard_after_forward": engine.reshard}
    together = mesh.torch(WEIGHTS, ("replicate",))
    layers: list[Any] = list(model.layers)  # type: ignore[arg-type]
    ranks = mesh.size(*(EXPERT_WEIGHTS if mesh.size("expert") > 1 else WEIGHTS))
    for layer in layers:
        experts = getattr(getattr(layer, "mlp", None), "experts", None)
        if isinstance(experts, nn.Module):
            each = {parameter: cut_along(parameter.shape, ranks) for parameter in experts.parameters()}
            options["shard_placement_fn"] = lambda parameter, each=each: Shard(each.get(parameter, 0))
            if mesh.size("expert") > 1:
                fully_shard(experts, mesh=mesh.torch(EXPERT_WEIGHTS, ("replicate",)), **options)
        fully_shard(layer, mesh=together, **options)
        options.pop("shard_placement_fn", None)
    options["reshard_after_forward"] = False
    fully_shard(model, mesh=together, **options)  # the head's backward follows its forward at once
    for method in (name for name in ("loss", "logprobs", "distilled") if hasattr(model, name)):
        register_fsdp_forward_method(model, method)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if engine.prefetch != 1:
        for at, layer in enumerate(layers):
            layer.set_modules_to_forward_prefetch(layers[at + 1 : at + 1 + engine.prefetch])
            layer.set_modules_to_backward_prefetch(layers[max(0, at - engine.prefetch) : at][::-1])
    for unit in units(model):
        place = places[unit.name]
        start, size = chunk(place.size[unit.dim], unit.index, unit.count)
        places[unit.name] = place.cut(unit.dim, start, size)
        assert unit.size == size, (unit.name, unit.size, size)


def cut_along(shape: Sequence[int], ranks: int) -> int:
    """The dim along which `ranks` share experts [E, outputs, ...]: whole experts where each gets as many, else the outputs of each, if those divide.

    Of 4 experts on 8 ranks, for one, torch would leave none to 4 of them, and to the others twice their share.
    """
    return 1 if shape[0] % ranks and shape[1] % ranks == 0 else 0


@dataclass(frozen=True)
class Unit:
    """One sharded parameter: rank `index` of `count` has `size` of it along `dim`; its shard has `rows` rows, padded to `padded` elements."""

    name: str
    index: int
    count: int
    dim: int
    size: int
    rows: int
    padded: torch.Size
    _torch: Any

    def keep(self, storage: Tensor) -> Tensor:
        """Let the shard live in `storage` (as many elements as `padded` has); returns it without the padding."""
        assert storage.numel() == self.padded.numel()
        held = storage.view(self.padded)[: self.rows]
        self._torch._sharded_param_data = storage.view(-1)
        self._torch.sharded_param._local_tensor = held
        return held


def units(model: nn.Module) -> Iterator[Unit]:
    """Every sharded parameter of a model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        if not hasattr(module, "_get_fsdp_state"):
            continue
        state: Any = module._get_fsdp_state()  # type: ignore[operator]
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [state._fsdp_param_group] if groups is None else groups:
            for one in [] if group is None else group.fsdp_params:
                assert group is not None
                mesh = group.mesh_info.shard_process_group
                local = one.sharded_param._local_tensor
                yield Unit(
                    names[id(one.sharded_param)],
                    mesh.rank(),
                    mesh.size(),
                    dim := one.fsdp_placement.dim,
                    local.shape[dim] if local.numel() else 0,
                    local.shape[0] if local.numel() else 0,
                    one.padded_sharded_param_size,
                    one,
                )


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter or of its gradient."""
    return parameter._local_tensor if hasattr(parameter, "_local_tensor") else parameter  # type: ignore[attr-defined]
