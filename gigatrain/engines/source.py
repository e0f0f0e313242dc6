"""Where an engine's model and its first weights come from: our decoder, or any other model of transformers behind the same methods."""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gigatrain.engines import low
from gigatrain.errors import CheckpointError
from gigatrain.foreign import Foreign
from gigatrain.kernels.ops import Ops
from gigatrain.models import adapters, autoweights, hf, merged
from gigatrain.models.automodel import Auto
from gigatrain.models.decoder import Decoder, Part, decays, initial, kind_of
from gigatrain.parallel import ranks
from gigatrain.parallel.agree import agreed, gathered, told
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.planning.plan import Plan

Model = Decoder | Auto


def blank(plan: Plan, ops: Ops, *, part: Part | None = None, dtype: torch.dtype = torch.float32) -> Model:
    """The plan's model, or a part of it, on meta."""
    if isinstance(plan.architecture, Foreign):
        assert part is None or (part.first and part.last), "the plan refuses a pipeline"
        return Auto(plan.architecture.config, ops, recompute=plan.recompute, dtype=dtype)
    with torch.device("meta"):
        model = Decoder(
            plan.architecture,
            ops,
            recompute=plan.recompute,
            dropout=plan.dropout,
            neftune=plan.neftune,
            part=part,
            watched=plan.loss.watches,
        )
    if plan.fp8 is not None:
        low.lower(model, plan.fp8, plan.recompute, {choice.op: choice.kernel for choice in plan.kernels}["quantise"])
    if plan.adapter is not None:
        adapters.adapt(model, plan.adapter, torch.bfloat16 if plan.compute == "bf16" else torch.float32)
    return model


def terms(plan: Plan) -> dict[str, float]:
    """The weights of the losses beside the cross entropy; those of routers only where there are some. None where the loss is of pairs."""
    if plan.objective.pairs:
        return {}
    routers = {"router_aux": plan.loss.router_aux, "router_z": plan.loss.router_z}
    return {"z_loss": plan.loss.z_loss, "label_smoothing": plan.loss.label_smoothing} | {
        name: weight for name, weight in routers.items() if weight
    }


def values(
    plan: Plan,
    model: Model,
    shapes: Mapping[str, tuple[int, ...]],
    device: torch.device,
    *,
    boxes: Mapping[str, hf.Box],
    part: bool = False,
    trained: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Of every parameter of `shapes` its box, if it has one, else all: drawn from the seed, or read from `model.from`; with `part`, the model has others too.
    With an adapter all of the model's, as they are kept, without `trained` only the frozen ones; what is kept in 4 bits is read by whole rows.

    One at a time. Of what is read nothing but the boxes is; what is drawn is drawn whole, and cut.
    """
    arch = plan.architecture
    if plan.adapter is not None:
        assert isinstance(model, Decoder)
        of_base = adapters.base_shapes(model) | {name: tuple(tensor.shape) for name, tensor in model.corrections().items()}
        read = adapters.base_boxes(model, boxes, plan.adapter, trained=trained)
        yield from adapters.first(model, base(plan, of_base, read), plan.adapter, plan.seed, boxes, trained=trained)
        return
    if plan.source is None:
        for name, tensor in _drawn(plan, shapes, device):
            yield name, tensor[hf.cut_of(*boxes[name])] if name in boxes else tensor
        return
    folder = hf.locate(plan.source)
    if isinstance(arch, Foreign):
        assert isinstance(model, Auto)
        yield from autoweights.tensors(model, folder, boxes)
    else:
        yield from hf.read_weights(arch, shapes, folder, part=part, boxes=boxes, grow=True)


def _drawn(plan: Plan, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    arch = plan.architecture
    if isinstance(arch, Foreign):
        yield from autoweights.fresh(arch.config, plan.seed)
        return
    for name, shape in shapes.items():
        yield name, initial(name, shape, arch, plan.init.std, plan.init.scale_residual, plan.seed, device)


def base_of(plan: Plan, mesh: Mesh | None = None) -> dict[str, str]:
    """What an adapter's checkpoints say of its base: where it is, and the SHA-256 of its weights. Raises CheckpointError.

    Reads them all. Collective: every rank a share of the files, so that none waits for another by more than they differ; a collective ends after minutes,
    in which one rank alone does not read a terabyte.
    """
    mesh, source = mesh or alone(), plan.source
    shapes = merged.shapes(plan) if source is None else {}
    names = ranks.first(mesh, lambda: list(shapes) if source is None else adapters.files(hf.locate(source)))
    mine = names[mesh.rank :: mesh.count]
    with agreed(mesh, CheckpointError, str):
        if source is None:
            drawn = base(plan, {name: shapes[name] for name in mine})
            each = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in drawn}
        else:
            each = adapters.files_sha256(hf.locate(source), mine)
    every = {name: digest for some in gathered(mesh, each) for name, digest in some.items()}
    return {"from": source or f"seed {plan.seed}", "sha256": told(mesh, adapters.whole_sha256(every))}


def check_base(kept: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises CheckpointError where the base is not the one that a checkpoint, which says `kept`, was made beside."""
    if kept.get("sha256") != now["sha256"]:
        raise CheckpointError(
            f"the adapter was trained beside the weights of {kept.get('from')} with SHA-256 {str(kept.get('sha256'))[:12]}, and those of {now['from']} "
            f"have {now['sha256'][:12]} now; put the base back as it was"
        )


def base(plan: Plan, shapes: Mapping[str, tuple[int, ...]], boxes: Mapping[str, hf.Box] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The frozen weights that an adapter stands beside, one at a time, of one in `boxes` its box: of `model.from`, or drawn, on the CPU whatever the run is
    on. Nothing of a box that is empty."""
    arch, boxes = plan.decoder, boxes or {}
    if plan.source is not None:
        yield from hf.read_weights(arch, shapes, hf.locate(plan.source), boxes=boxes, grow=True)
        return
    for name, shape in shapes.items():
        if name not in boxes or 0 not in boxes[name][1]:
            tensor = initial(name, shape, arch, plan.init.std, plan.init.scale_residual, plan.seed, "cpu")
            yield name, tensor[hf.cut_of(*boxes[name])] if name in boxes else tensor


def group_of(plan: Plan, model: Model, name: str) -> str:
    """By which update a parameter moves: Muon for the layers' matrices if the recipe says so, AdamW with or without decay for the rest."""
    kind, falls = (model.kind_of, model.decays) if isinstance(model, Auto) else (kind_of, decays)
    if plan.optim.name == "muon" and kind(name) == "matrix":
        return "muon"
    return "decayed" if falls(name, plan.optim.decay_embeddings) else "plain"
