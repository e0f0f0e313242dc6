"""The mesh of a plan: every axis's size, and what cannot be cut refused with the numbers that clash."""

import math

from gigatrain.architectures import Architecture
from gigatrain.config import Engine, Init, Mesh, Recipe
from gigatrain.errors import PlanError
from gigatrain.foreign import Foreign
from gigatrain.planning import layout


def resolve(recipe: Recipe, ranks: int | None) -> Mesh:
    """The recipe's mesh with every size, on `ranks` ranks (default: `train.nproc`, else what the mesh needs).

    Raises PlanError where the axes do not multiply to the ranks.
    """
    asked = recipe.mesh
    ranks = ranks or recipe.train.nproc
    others = asked.replicate * asked.context * asked.tensor * asked.pipeline
    if ranks is None:
        ranks = others * (asked.shard or asked.expert)
    sizes = f"replicate {asked.replicate} x context {asked.context} x tensor {asked.tensor} x pipeline {asked.pipeline}"
    if asked.shard is None and ranks % others:
        raise PlanError(f"{ranks} ranks do not divide by the mesh's {sizes} = {others}; start a multiple of {others}, or change an axis")
    shard = asked.shard or ranks // others
    if others * shard != ranks:
        raise PlanError(
            f"the mesh's {sizes} x shard {shard} is {others * shard} ranks, and {ranks} are there; start {others * shard}, or leave mesh.shard out"
        )
    if shard % asked.expert:
        raise PlanError(f"mesh.expert {asked.expert} does not divide mesh.shard {shard}, whose ranks share the experts; choose a divisor")
    stages = asked.stages or (1 if asked.schedule == "1f1b" or asked.pipeline == 1 else 2)
    return asked.model_copy(update={"shard": shard, "stages": stages})


def count(mesh: Mesh) -> int:
    """Ranks of a mesh."""
    return mesh.replicate * (mesh.shard or 1) * mesh.context * mesh.tensor * mesh.pipeline


def share(recipe: Recipe, mesh: Mesh) -> tuple[int, int]:
    """`(microbatch, accumulation)`: samples that a rank computes at a time, and how often a step. Raises PlanError where the batch does not divide."""
    train, readers = recipe.train, mesh.replicate * (mesh.shard or 1)
    if train.batch % readers:
        below = train.batch // readers * readers
        near = f"the next that do are {below} and {below + readers}" if below else f"the least that does is {readers}"
        raise PlanError(
            f"train.batch {train.batch} does not divide by the {readers} ranks that read samples (mesh.replicate {mesh.replicate} x mesh.shard "
            f"{mesh.shard}); {near}"
        )
    microbatch = min(train.microbatch or train.batch // readers, train.batch // readers)
    return microbatch, math.ceil(train.batch // readers / microbatch)


def check(recipe: Recipe, architecture: Architecture | Foreign, mesh: Mesh, accumulation: int) -> None:
    """Raise PlanError for a mesh that the model, its samples or the engine cannot be cut by, and for ranks to profile that are not there."""
    _check_engine(recipe, mesh)
    _check_routers(recipe, architecture, mesh)
    if isinstance(architecture, Foreign):
        _check_foreign(recipe, architecture, mesh)
        if recipe.engine.name == "deepspeed":
            _check_deepspeed(recipe, mesh)
        return
    if recipe.engine.name == "deepspeed":
        _check_deepspeed(recipe, mesh)
    _check_tensor(recipe, architecture, mesh)
    _check_context(recipe, architecture, mesh)
    _check_expert(architecture, mesh)
    layout.check(architecture.layers, mesh.schedule, mesh.pipeline, mesh.stages or 1, accumulation, compiled=recipe.train.compile)
    optim = recipe.optim
    if mesh.pipeline > 1 and architecture.tied and (optim.master, optim.moments) != ("fp32", "fp32"):
        raise PlanError(
            f"a tied embedding has a copy on the last stage (mesh.pipeline {mesh.pipeline}), and optim.master {optim.master!r} with optim.moments "
            f'{optim.moments!r} round each copy at random, so that they would drift apart; set both to "fp32", or mesh.pipeline = 1'
        )


def _check_engine(recipe: Recipe, mesh: Mesh) -> None:
    """Keys that would otherwise do nothing without a word."""
    engine, absent = recipe.engine, [rank for rank in recipe.profile.ranks if rank >= count(mesh)]
    if recipe.profile.steps and absent:
        raise PlanError(f"profile.ranks names {absent[0]}, and the run has ranks 0 to {count(mesh) - 1}; name ranks that it has")
    ours = {"native": "deepspeed", "deepspeed": "native"}[engine.name]
    for key in {"deepspeed": ("zero",), "native": ("reshard", "prefetch", "async_tensor")}[ours]:
        if (value := getattr(engine, key)) != (default := Engine.model_fields[key].default):
            shown, usual = (str(one).lower() for one in (value, default))
            raise PlanError(
                f'engine.{key} {shown} is for engine.name "{ours}", and the engine is "{engine.name}"; leave it out (it is {usual} then), or change the engine'
            )
    if engine.offload and engine.name == "native" and mesh.context * (mesh.shard or 1) == 1:
        raise PlanError(
            "engine.offload moves shards to the host, and mesh.shard 1 shards nothing; raise mesh.shard, or set engine.offload = false"
        )
    if engine.async_tensor and not (recipe.train.compile and mesh.tensor > 1):
        raise PlanError(
            f"engine.async_tensor is the compiler's work on gathers along `tensor`: it needs train.compile = true and mesh.tensor above 1, here "
            f"{str(recipe.train.compile).lower()} and {mesh.tensor}"
        )


def _check_tensor(recipe: Recipe, architecture: Architecture, mesh: Mesh) -> None:
    ranks = mesh.tensor
    if ranks == 1:
        return
    widths = {"heads": architecture.heads, "intermediate": architecture.intermediate, "vocab": architecture.vocab}
    for name, size in widths.items():
        if size % ranks and not (name == "intermediate" and architecture.sparse_layers == architecture.layers):
            way_out = f"set model.architecture.vocab = {-(-size // ranks) * ranks}" if name == "vocab" else f"choose a divisor of {size}"
            raise PlanError(f"mesh.tensor {ranks} does not divide the model's {name} {size}; {way_out}")
    if architecture.kv_heads % ranks and ranks % architecture.kv_heads:
        raise PlanError(
            f"mesh.tensor {ranks} neither divides the model's kv_heads {architecture.kv_heads} nor is a multiple of them; choose one that does"
        )
    tokens = recipe.train.sequence // mesh.context
    if tokens % ranks:
        raise PlanError(
            f"mesh.tensor {ranks} does not divide the {tokens} tokens of a sample that its ranks share (train.sequence {recipe.train.sequence} / "
            f"mesh.context {mesh.context}); choose a train.sequence that is a multiple of {ranks * mesh.context}"
        )


def _check_context(recipe: Recipe, architecture: Architecture, mesh: Mesh) -> None:
    ranks, sequence = mesh.context, recipe.train.sequence
    if ranks == 1:
        return
    pieces = 2 * ranks if mesh.exchange == "ring" else ranks
    if sequence % pieces:
        raise PlanError(
            f"mesh.context {ranks} cuts a sample into {pieces} equal pieces (mesh.exchange {mesh.exchange!r}), and train.sequence {sequence} is no multiple of "
            f"{pieces}; the next one is {-(-sequence // pieces) * pieces}"
        )
    heads, keys = architecture.heads // mesh.tensor, max(1, architecture.kv_heads // mesh.tensor)
    if mesh.exchange == "ulysses" and heads % math.lcm(keys, ranks):
        raise PlanError(
            f'mesh.exchange "ulysses" gives each of {ranks} ranks (mesh.context) its own heads, and {heads} query with {keys} key heads (of a rank of '
            f'`tensor`) do not divide; choose a mesh.context that divides {heads}, or mesh.exchange = "ring"'
        )
    if any(rope.kind == "longrope" for rope in (architecture.rope, architecture.rope_local) if rope is not None):
        raise PlanError(
            f"a model with longrope chooses its frequencies by the longest position of a microbatch, which no rank of mesh.context {ranks} sees; "
            "set mesh.context = 1"
        )


def _check_expert(architecture: Architecture, mesh: Mesh) -> None:
    ranks = mesh.expert
    if ranks == 1:
        return
    if not architecture.experts:
        raise PlanError(f"mesh.expert {ranks} shares experts, and the model has none; set mesh.expert = 1")
    if architecture.experts % ranks:
        raise PlanError(f"mesh.expert {ranks} does not divide the model's {architecture.experts} experts; choose a divisor")


def _check_routers(recipe: Recipe, architecture: Architecture | Foreign, mesh: Mesh) -> None:
    loss = recipe.loss
    if not loss.watches:
        return
    asked = {name: getattr(loss, name) for name in ("router_aux", "router_z", "router_bias_rate") if getattr(loss, name)}
    name, value = next(iter(asked.items()))
    if isinstance(architecture, Foreign) or not architecture.experts:
        kind = architecture.model_type if isinstance(architecture, Foreign) else architecture.family
        raise PlanError(f"loss.{name} {value} is for routers of our own decoders, and {kind!r} has none; set loss.{name} = 0.0")
    if loss.router_bias_rate and not architecture.correction_bias:
        raise PlanError(
            f"loss.router_bias_rate {loss.router_bias_rate} moves the bias that corrects a router's choice, and {architecture.family} has none; set it to "
            "0.0, and loss.router_aux = 1e-2 if the experts are to be balanced"
        )
    if loss.router_bias_rate and recipe.engine.name == "deepspeed":
        raise PlanError(
            f'loss.router_bias_rate {loss.router_bias_rate} is an update of the native engine\'s, and engine.name is "deepspeed"; set it to 0.0, or '
            'engine.name = "native"'
        )
    if recipe.data.packing != "stream":
        raise PlanError(
            f'loss.{name} {value} balances what routers see, and data.packing "{recipe.data.packing}" shows them padding too, all of which visits the same experts; '
            f'set data.packing = "stream", or loss.{name} = 0.0'
        )
    if mesh.pipeline > 1 and (loss.router_aux or loss.router_z):
        name = "router_aux" if loss.router_aux else "router_z"
        raise PlanError(
            f"loss.{name} {getattr(loss, name)} is a loss over all layers at once, and mesh.pipeline {mesh.pipeline} parts them; set mesh.pipeline = 1, or "
            f"loss.{name} = 0.0"
        )


def _check_foreign(recipe: Recipe, model: Foreign, mesh: Mesh) -> None:
    kind, train = model.model_type, recipe.train
    for axis in ("tensor", "context", "pipeline", "expert"):
        if getattr(mesh, axis) > 1:
            raise PlanError(
                f"mesh.{axis} {getattr(mesh, axis)} cuts our own decoders, and {kind!r} runs by transformers' code; set mesh.{axis} = 1, and share it by "
                "mesh.shard and mesh.replicate"
            )
    if recipe.data.packing != "document" and not model.isolates:
        raise PlanError(
            f'data.packing "{recipe.data.packing}" puts several documents in a row, which {kind!r} cannot keep apart; set data.packing = "document" (one a row)'
        )
    if train.recompute == "lean":
        raise PlanError(f'train.recompute "lean" is for our own decoders, and {kind!r} is transformers\'; set "full" or "selective"')
    if recipe.model.init != Init():
        raise PlanError(
            f"model.init is for our own decoders, and fresh weights of {kind!r} are drawn as transformers draws them; leave model.init out"
        )
    if train.dropout:
        raise PlanError(f"train.dropout {train.dropout} is for our own decoders, and {kind!r} is transformers'; set train.dropout = 0.0")
    if train.compile:
        raise PlanError(f"train.compile is for our own decoders, and {kind!r} is transformers'; set train.compile = false")
    if train.compute == "bf16" and model.wide:
        raise PlanError(f'{kind!r} keeps {model.wide:,} parameters in fp32 whatever the rest is; set train.precision = "fp32"')


def _check_deepspeed(recipe: Recipe, mesh: Mesh) -> None:
    engine, optim = recipe.engine, recipe.optim
    for axis in ("tensor", "pipeline", "expert", "replicate"):
        if getattr(mesh, axis) > 1:
            raise PlanError(
                f'engine.name "deepspeed" shares weights and samples by ZeRO alone, and mesh.{axis} is {getattr(mesh, axis)}; set mesh.{axis} = 1, or '
                'engine.name = "native"'
            )
    if optim.name != "adamw" or (optim.master, optim.moments) != ("fp32", "fp32"):
        raise PlanError(
            f'engine.name "deepspeed" keeps fp32 master weights and moments of AdamW, and the recipe has {optim.name} with master {optim.master} and '
            f'moments {optim.moments}; set optim.name = "adamw" and both to "fp32", or engine.name = "native"'
        )
    if recipe.train.compile:
        raise PlanError('engine.name "deepspeed" is not run with train.compile; set train.compile = false, or engine.name = "native"')
    assert engine.name == "deepspeed"
