"""Which objectives a plan can keep to, and what refuses them."""

from typing import Any

from gigatrain import load
from gigatrain.architectures import from_hf_config
from gigatrain.config import Mesh, Recipe
from gigatrain.errors import PlanError
from gigatrain.planning import cost

READY = ("language", "dpo", "ipo", "orpo", "simpo", "kto", "distil")  # kinds of objective that are computed


def check(recipe: Recipe, mesh: Mesh) -> None:
    """Raises PlanError for an objective that cannot be kept to with this data or on this mesh."""
    objective, data = recipe.objective, recipe.data
    kind = objective.kind
    if kind not in READY:
        raise PlanError(f'objective.kind "{kind}" is not computed yet; choose one of {", ".join(READY)}')
    if kind == "distil":
        _check_distil(recipe, mesh)
    if not objective.pairs:
        for source in data.sources:
            if source.format == "preference":
                raise PlanError(
                    f'{source.path} holds pairs (format "preference") and objective.kind "{kind}" reads text; set objective.kind = "dpo" or its kin'
                )
        return
    for source in data.sources:
        if source.format != "preference" and source.kind != "megatron":
            raise PlanError(
                f'objective.kind "{kind}" reads answers that somebody judged, and {source.path} is {source.format!r}; set its format = "preference"'
            )
    if data.packing == "stream" or (data.packing == "packed" and kind == "kto"):
        several = "" if kind == "kto" else ', or "packed" (as many as fit)'
        raise PlanError(
            f'objective.kind "{kind}" keeps pairs whole, and data.packing is "{data.packing}"; set data.packing = "document" (one a row){several}'
        )
    for axis, why in (
        ("context", "both answers of a pair would lie on several ranks"),
        ("pipeline", "a reference and what is reported beside the loss would have to pass through its stages"),
    ):
        if getattr(mesh, axis) > 1:
            raise PlanError(
                f'mesh.{axis} {getattr(mesh, axis)} cannot be used with objective.kind "{kind}": {why}; set mesh.{axis} = 1, and share by mesh.shard'
            )
    loss: dict[str, Any] = {
        name: getattr(recipe.loss, name) for name in ("z_loss", "label_smoothing", "router_aux", "router_z", "router_bias_rate")
    }
    for name, value in loss.items():
        if value:
            raise PlanError(f'loss.{name} {value} is of the next token, and objective.kind "{kind}" is of pairs; set loss.{name} = 0.0')
    if recipe.train.dropout:
        raise PlanError(
            f'train.dropout {recipe.train.dropout} would make the policy differ from its reference by chance, and objective.kind "{kind}" compares them; '
            "set train.dropout = 0.0"
        )
    if recipe.recovery.replicas != "none":
        raise PlanError(
            f'recovery.replicas "{recipe.recovery.replicas}" hands over what a step reports as two numbers, and objective.kind "{kind}" reports more; '
            'set recovery.replicas = "none"'
        )
    if objective.reference == "adapter":
        raise PlanError('objective.reference "adapter" needs an adapter, and the recipe has none; set objective.reference = "start"')


def with_teacher(recipe: Recipe, memory: cost.Memory, samples: int) -> cost.Memory:
    """Memory of a rank whose step also holds a teacher, whole, and its words for the `samples` of a step. Exact for weights."""
    objective, train = recipe.objective, recipe.train
    if objective.kind != "distil":
        return memory
    words = samples * train.sequence * 4 * (2 * objective.top_k + 1)
    weights = 0
    if objective.online:
        assert objective.teacher is not None
        weights = from_hf_config(load.config_json(objective.teacher)).parameters() * (2 if train.compute == "bf16" else 4)
    return memory.model_copy(update={"weights": memory.weights + weights, "workspace": memory.workspace + words})


def unknown(recipe: Recipe) -> str | None:
    """Why nothing is expected of a step's seconds."""
    if recipe.objective.kind == "distil" and recipe.objective.online:
        return "a teacher's forward within a step is in no table; with objective.online = false it is no part of the step"
    return None


def _check_distil(recipe: Recipe, mesh: Mesh) -> None:
    objective = recipe.objective
    for axis, why in (
        ("tensor", "each rank would have some of the tokens that a teacher chose from all"),
        ("pipeline", "a teacher's words and what is reported beside the loss would have to pass through its stages"),
    ):
        if getattr(mesh, axis) > 1:
            raise PlanError(f'mesh.{axis} {getattr(mesh, axis)} cannot be used with objective.kind "distil": {why}; set mesh.{axis} = 1')
    if mesh.context > 1 and objective.online:
        raise PlanError(
            f"objective.online: a teacher reads whole samples, and mesh.context {mesh.context} cuts them because they are long; let `gigatrain data teach` "
            "keep its words, and set objective.online = false"
        )
    loss: dict[str, Any] = {
        name: getattr(recipe.loss, name) for name in ("z_loss", "label_smoothing", "router_aux", "router_z", "router_bias_rate")
    }
    for name, value in loss.items():
        if value:
            raise PlanError(f'loss.{name} {value} is not added to objective.kind "distil"; set loss.{name} = 0.0')
    if recipe.recovery.replicas != "none":
        raise PlanError(
            f'recovery.replicas "{recipe.recovery.replicas}" hands over what a step reports as two numbers, and objective.kind "distil" reports more; set it '
            'to "none"'
        )
