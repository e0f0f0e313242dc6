"""What a step fuses beyond its kernels: which of the options of `train` are on, and why; those that cannot be are refused, with the way out.

    fuse         layers with the same input (queries, keys, values; gate, up) are one product: their weights lie end to end in memory, unfused on disk
    main_grads   a layer's product adds its weights' gradient to the fp32 sum itself: no gradient of one microbatch is written and read again
    graph        the whole step is recorded once as a CUDA graph, and replayed by one launch
    release      each layer is updated, and its gradients freed, as soon as its backward has ended

None of them changes what a checkpoint holds, so that a resume may switch each.
"""

from collections.abc import Mapping
from typing import Literal

from gigatrain.architectures import Architecture
from gigatrain.config import Mesh, Recipe, Section
from gigatrain.errors import PlanError
from gigatrain.foreign import Foreign
from gigatrain.site import Site

Name = Literal["fuse", "main_grads", "graph", "release"]


class Fusion(Section):
    """Whether a step fuses something, and why or why not."""

    name: Name
    on: bool
    why: str


def choose(
    recipe: Recipe,
    site: Site,
    architecture: Architecture | Foreign,
    mesh: Mesh,
    microbatch: int,
    accumulation: int,
    kernels: Mapping[str, str],
) -> tuple[Fusion, ...]:
    """Each option as the recipe says, or by rule where it says nothing. Raises PlanError for one that is asked for and cannot be."""
    obstacles: dict[Name, tuple[str, str] | None] = {
        "fuse": _of_layers(recipe, architecture, mesh) or _of_products(kernels) or _of_views(recipe, architecture),
        "main_grads": _of_layers(recipe, architecture, mesh) or _of_products(kernels),
        "graph": _of_graph(recipe, site, architecture, mesh, microbatch, kernels),
        "release": _of_release(recipe, architecture, mesh, accumulation),
    }
    gpu, found = site.device == "cuda", []
    for name, obstacle in obstacles.items():
        wanted: bool | None = getattr(recipe.train, name)
        if obstacle is not None:
            if wanted:
                raise PlanError(f"train.{name}: {obstacle[0]}; {obstacle[1]}, or train.{name} = false")
            found.append(Fusion(name=name, on=False, why=obstacle[0] if wanted is None else "the recipe does not ask for it"))
        elif wanted is not None:
            found.append(Fusion(name=name, on=wanted, why="the recipe says so" if wanted else "the recipe does not ask for it"))
        else:
            found.append(Fusion(name=name, on=gpu, why=(_GPU if gpu else _CPU)[name]))
    return tuple(found)


# Models, for an H200 at 4.3 TB/s; the figures of a CPU are measured (benchmarks/LOG.md).
_GPU = {
    "fuse": "x is read once, and of its gradient nothing is added up: by bytes 0.14 ms a layer of 4,096 channels, forward and backward, at 8,192 tokens",
    "main_grads": "8 B of traffic per parameter and microbatch where a gradient and an addition are 12: by bytes 6.5 ms of 7 billion parameters",
}
_CPU = {
    "fuse": "on a CPU a copy of the outputs' gradients costs more than one product gains",
    "main_grads": "on a CPU a bf16 gradient would be an fp32 product, four times as slow",
}


def _of_layers(recipe: Recipe, architecture: Architecture | Foreign, mesh: Mesh) -> tuple[str, str] | None:
    """What keeps the engine from placing the weights and sums of layers itself: `(why, the way out)`."""
    if isinstance(architecture, Foreign):
        return f"{architecture.model_type!r} runs by transformers' code, whose layers are not ours", "choose a model of our families"
    if recipe.engine.name == "deepspeed":
        return "DeepSpeed flattens and partitions weights and gradients itself", 'set engine.name = "native"'
    if recipe.adapter is not None:
        return "weights beside an adapter are frozen: they have no gradient to sum, and products of their own", "leave [adapter] out"
    if (mesh.shard or 1) * mesh.context > 1:
        return (
            f"weights are sharded over {(mesh.shard or 1) * mesh.context} ranks, and FSDP2 gathers each parameter into storage of its own and reduces its "
            "gradient itself",
            "share the batch by mesh.replicate with mesh.shard = 1",
        )
    if recipe.train.compile:
        return "train.compile traces a layer without what lies around its weights", "set train.compile = false"
    if mesh.pipeline > 1 and mesh.schedule == "zbv":
        return 'mesh.schedule "zbv" computes weight gradients apart, by products of its own', 'set mesh.schedule = "1f1b" or "interleaved"'
    return None


def _of_views(recipe: Recipe, architecture: Architecture | Foreign) -> tuple[str, str] | None:
    if isinstance(architecture, Architecture) and architecture.hidden % 8 and recipe.train.compute == "bf16":
        return (
            f"model.architecture.hidden {architecture.hidden} is no multiple of 8, and bf16 matrices whose size is none are laid elsewhere",
            f"set model.architecture.hidden = {-(-architecture.hidden // 8) * 8}",
        )
    return None


def _of_products(kernels: Mapping[str, str]) -> tuple[str, str] | None:
    """Products of narrow numbers have codes of one matrix each, and make their weights' gradients of such codes."""
    if kernels["linear"] != "reference":
        return f"train.precision fp8 multiplies by {kernels['linear']}, matrix by matrix", 'set train.precision = "bf16"'
    return None


def _of_graph(
    recipe: Recipe, site: Site, architecture: Architecture | Foreign, mesh: Mesh, microbatch: int, kernels: Mapping[str, str]
) -> tuple[str, str] | None:
    """Whatever reads a number on the host, changes a shape, or was never seen to be recorded."""
    if site.device != "cuda":
        return f"a CUDA graph needs a GPU, and {site.name} has none", "choose a site with one"
    if isinstance(architecture, Foreign):
        return f"{architecture.model_type!r} runs by transformers' code, which may read the device", "choose a model of our families"
    if recipe.engine.name == "deepspeed":
        return "DeepSpeed reads the device within a step", 'set engine.name = "native"'
    if (mesh.shard or 1) * mesh.context > 1:
        return (
            "FSDP2 gathers weights into memory that it resizes on the host's side of every step",
            "share the batch by mesh.replicate with mesh.shard = 1",
        )
    if mesh.pipeline > 1:
        return "a pipeline's schedule sends and receives from the host", "set mesh.pipeline = 1"
    if mesh.expert > 1 and mesh.dispatch != "gather":
        return f'mesh.dispatch "{mesh.dispatch}" reads the counts of tokens on the host', 'set mesh.dispatch = "gather"'
    if architecture.experts and "reference" in (kernels["moe"], kernels["experts"]):
        return "the plain form of experts reads the counts of tokens on the host", 'set kernels.moe = kernels.experts = "grouped"'
    mine = recipe.train.batch // mesh.replicate
    if mine % microbatch:
        return (
            f"a rank's {mine} samples are no whole number of microbatches of {microbatch}, and a graph has one shape",
            f"choose a train.microbatch that divides {mine}",
        )
    return None


def _of_release(recipe: Recipe, architecture: Architecture | Foreign, mesh: Mesh, accumulation: int) -> tuple[str, str] | None:
    if isinstance(architecture, Foreign):
        return f"{architecture.model_type!r} runs by transformers' code, whose layers are not ours", "choose a model of our families"
    axes = {axis: size for axis in ("replicate", "shard", "context", "tensor", "pipeline") if (size := getattr(mesh, axis) or 1) > 1}
    if axes or recipe.engine.name == "deepspeed":
        shared = ", ".join(f"mesh.{axis} {size}" for axis, size in axes.items()) or "engine.name deepspeed"
        return (
            f"gradients are summed over ranks ({shared}) before they count, and sharding keeps less of them than releasing would",
            "run it on one process",
        )
    if accumulation > 1:
        return (
            f"a step has {accumulation} microbatches, whose gradients are kept until the last one's are added",
            f"set train.microbatch = {recipe.train.batch}",
        )
    if recipe.optim.clip is not None:
        return (
            f"optim.clip {recipe.optim.clip:g} scales gradients by the norm of all of them, which is known when the last is there",
            "set optim.clip = false",
        )
    return None
