"""The plan's model cut for one rank by every parallelism, on meta and without storage: what the native engine then allocates and trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gigatrain.architectures import Architecture
from gigatrain.engines import source
from gigatrain.kernels import ops
from gigatrain.models import adapters
from gigatrain.models.decoder import LAYOUT, Part, kind_of
from gigatrain.parallel import context, expert, shard, tensor
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import Places, whole
from gigatrain.planning import layout
from gigatrain.planning.plan import Plan


@dataclass(frozen=True)
class Built:
    """A model cut for one rank, on meta: its stages by number (one, without a pipeline), and which box of each whole parameter it holds."""

    stages: dict[int, Any]
    count: int  # stages of all ranks
    places: Places


def build(plan: Plan, mesh: Mesh, cuts: Sequence[range] | None = None) -> Built:
    """The plan's model for this rank, without storage: its stages, cut by tensor and expert parallelism, then compiled, then sharded.

    `cuts` are the layers of all stages, if not those of planning/layout.py.
    """
    axes, arch = plan.mesh, plan.architecture
    chosen = ops.choose({choice.op: choice.kernel for choice in plan.kernels})
    chosen = tensor.ops(context.ops(chosen, mesh, axes.exchange), mesh)
    chosen = expert.dispatched(chosen, mesh, axes.dispatch, mesh.node)
    if plan.engine.async_tensor:
        tensor.pipeline_products(mesh)
    each = axes.stages or 1
    count = axes.pipeline * each
    if cuts is None:
        cuts = layout.stages(arch, plan.sequence, count) if count > 1 and isinstance(arch, Architecture) else (range(arch.layers),)
    numbers = layout.held(axes.schedule, mesh.at["pipeline"], axes.pipeline, each) if count > 1 else (0,)
    found = Built({}, count, {})
    for number in numbers:
        part = Part(cuts[number], number == 0, number == count - 1)
        model = source.blank(plan, chosen, part=part, dtype=torch.bfloat16 if plan.compute == "bf16" else torch.float32)
        places = whole(model)
        if isinstance(arch, Architecture):
            tensor.cut(model, LAYOUT, arch, mesh, places)
        expert.cut(model, [name for name in places if kind_of(name) == "expert"], mesh, places)
        _finish(plan, mesh, model, places)
        found.stages[number] = model
        found.places.update(places)
    return found


def _finish(plan: Plan, mesh: Mesh, model: source.Model, places: Places) -> None:
    """Compile and shard one stage."""
    if plan.compile:
        # A layer is called with and without a sum before it, documents and gradients, and with a last microbatch of another size.
        torch._dynamo.config.recompile_limit = 32
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run uncompiled without a word
        for layer in model.layers:
            layer.compile(fullgraph=True)
    if shard.shards(mesh):
        bf16, stored = plan.compute == "bf16", _stored(plan, mesh)
        model.to(stored)
        if plan.adapter is not None:
            adapters.settle(model, torch.bfloat16 if bf16 else torch.float32)  # type: ignore[arg-type]
        engine = plan.engine.model_copy(update={"reshard": False}) if mesh.size("pipeline") > 1 else plan.engine
        shard.apply(model, mesh, places, engine, compute=torch.bfloat16 if bf16 else torch.float32, stored=stored)


def _stored(plan: Plan, mesh: Mesh) -> torch.dtype:
    """What parameters are kept in. Shards are the fp32 master weights themselves, gathered in bf16; narrow masters keep bf16 weights beside corrections."""
    narrow = plan.compute == "bf16" and (plan.optim.master != "fp32" or not shard.shards(mesh))
    return torch.bfloat16 if narrow else torch.float32
