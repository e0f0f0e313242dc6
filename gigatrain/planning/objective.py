"""Which objectives a plan can keep to, what refuses them, and what they compute beside a forward and a backward."""

from typing import Any

from gigatrain import load
from gigatrain.architectures import Architecture, from_hf_config
from gigatrain.config import Mesh, Objective, Recipe
from gigatrain.errors import PlanError
from gigatrain.foreign import Foreign
from gigatrain.planning import cost

READY = ("language", "dpo", "ipo", "orpo", "simpo", "kto", "distil")  # kinds of objective that are computed


def check(recipe: Recipe, mesh: Mesh, architecture: Architecture | Foreign) -> None:
    """Raises PlanError for an objective that cannot be kept to with this data or model, or on this mesh."""
    objective, data = recipe.objective, recipe.data
    kind = objective.kind
    if kind not in READY:
        raise PlanError(f'objective.kind "{kind}" is not computed yet; choose one of {", ".join(READY)}')
    if kind == "distil":
        _check_distil(recipe, mesh, architecture)
    if not objective.pairs:
        for source in (*data.sources, *recipe.validation.sets):
            if source.format == "preference":
                raise PlanError(
                    f'{source.path or source.kind} holds pairs (format "preference") and objective.kind "{kind}" reads text; '
                    'set objective.kind = "dpo" or its kin'
                )
        return
    for source in (*data.sources, *recipe.validation.sets):
        if source.format != "preference" and source.kind != "megatron":
            raise PlanError(
                f'objective.kind "{kind}" reads answers that somebody judged, and {source.path or source.kind} is {source.format!r}; '
                'set its format = "preference"'
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
    for name in ("dropout", "neftune"):
        if value := getattr(recipe.train, name):
            raise PlanError(
                f'train.{name} {value} would make the policy differ from its reference by chance, and objective.kind "{kind}" compares them; '
                f"set train.{name} = 0.0"
            )
    if recipe.recovery.replicas != "none":
        raise PlanError(
            f'recovery.replicas "{recipe.recovery.replicas}" hands over what a step reports as two numbers, and objective.kind "{kind}" reports more; '
            'set recovery.replicas = "none"'
        )
    if objective.reference == "adapter":
        if recipe.adapter is None:
            raise PlanError('objective.reference "adapter" needs an adapter, and the recipe has none; set objective.reference = "start"')
        for name in ("train_embeddings", "train_head"):
            if getattr(recipe.adapter, name):
                raise PlanError(
                    f'objective.reference "adapter" is the model without its adapters, and adapter.{name} trains a part of it; set adapter.{name} = false, '
                    'or objective.reference = "start"'
                )


def describe(objective: Objective) -> str:
    """An objective of pairs in one line, for people."""
    whose = {
        "start": "the starting weights' log-probabilities are computed before the first step and kept",
        "adapter": "its reference is the model without its adapters, in every step",
    }
    reference = whose[objective.reference or "start"] if objective.refers else "no reference"
    strength = f"beta {objective.strength:g}" + (f", nll {objective.nll:g}" if objective.nll else "")
    return f"{objective.kind}, {strength}; {reference}; {'an answer' if objective.kind == 'kto' else 'a pair'} is one target"


def passes(objective: Objective) -> int:
    """Forwards without a backward in every step, each as long as the step's own: kto's over foreign answers, and those of a reference made anew."""
    foreign = int(objective.kind == "kto")
    return foreign + (1 + foreign if objective.reference == "adapter" else 0)


def passes_before(objective: Objective) -> int:
    """Forwards over every row before the first step: of a reference that is kept, of kto also over foreign answers."""
    if not objective.refers or objective.reference == "adapter":
        return 0
    return 2 if objective.kind == "kto" else 1


def flops_per_token(objective: Objective, architecture: Architecture | Foreign, sequence: int) -> float:
    """What a step computes for a token beside forward and backward: `passes`, and the logits that a loss of log-probabilities makes again."""
    if not objective.pairs:
        return 0.0
    forward = architecture.flops_per_token(sequence) / 3
    return passes(objective) * forward + 2.0 * architecture.hidden * architecture.vocab


def flops_before(objective: Objective, architecture: Architecture | Foreign, sequence: int, tokens: int) -> float:
    """Of the reference before the first step, over at most as many tokens as the run reads: a corpus that is read several times needs less."""
    return passes_before(objective) * architecture.flops_per_token(sequence) / 3 * tokens


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


def _check_distil(recipe: Recipe, mesh: Mesh, architecture: Architecture | Foreign) -> None:
    objective = recipe.objective
    if isinstance(architecture, Foreign):
        raise PlanError(
            f'objective.kind "distil" compares a teacher with hidden states and a head of ours, and {architecture.class_name} is transformers\' own code; '
            'choose a student of one of our families, or objective.kind = "language"'
        )
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
