"""What an adapter changes of a plan: which matrices get one, what is trained at all, and what the frozen rest needs. Free of torch."""

import difflib
import math
from collections.abc import Iterable, Sequence

from gigatrain.architectures import Architecture
from gigatrain.config import Adapter, Mesh, Recipe
from gigatrain.errors import PlanError
from gigatrain.foreign import Foreign
from gigatrain.planning import products

BLOCK = 64  # neighbours that share a scale in nf4
NF4_BYTES = 0.5 + 4 / BLOCK  # per element


def targeted(name: str, targets: Sequence[str] | str) -> bool:
    """Whether the matrix `name` (self_attn.q_proj, or with what stands before it) gets an adapter."""
    return targets == "all-linear" or any(f".{name}".endswith(f".{end}") for end in targets)


def matrices(architecture: Architecture) -> dict[str, tuple[int, int, int]]:
    """`(outputs, inputs, how many layers have it)` of each matrix of a layer that is a product of its own, by the end of its name."""
    sparse, found = architecture.sparse_layers, {}
    for name, shape in products.matrices(architecture, Mesh()).items():
        if name != products.EXPERTS:
            shared, dense = name.startswith("mlp.shared_experts."), name.startswith("mlp.")
            found[name] = (*shape, sparse if shared else architecture.layers - sparse if dense else architecture.layers)
    return found


def trained(architecture: Architecture, adapter: Adapter) -> int:
    """Parameters that a run with an adapter trains."""
    return low_rank(architecture, adapter) + _whole(architecture, adapter)


def describe(architecture: Architecture, adapter: Adapter) -> str:
    """One line for a reader: the form, where it stands, and what is trained."""
    kind = adapter.kind.replace("lora", "rsLoRA" if adapter.rslora else "LoRA").replace("dora", "DoRA")
    names = [name.rpartition(".")[2] for name in matrices(architecture) if targeted(name, adapter.targets)]
    count, whole = trained(architecture, adapter), architecture.parameters()
    more = [name for name, on in (("embedding", adapter.train_embeddings), ("head", adapter.train_head)) if on]
    base = "4 bits (nf4)" if adapter.quantise == "nf4" else "as they compute"
    return (
        f"{kind} of rank {adapter.rank}, alpha {adapter.alpha:g}, on {', '.join(dict.fromkeys(names))}{' and all of ' + ', '.join(more) if more else ''}; "
        f"trains {count:,} parameters, {100 * count / whole:.3g} % of {whole:,}; frozen weights {base}"
    )


def low_rank(architecture: Architecture, adapter: Adapter) -> int:
    """Parameters of the adapters: A and B, and of DoRA a length per row."""
    each = [
        (outputs * (adapter.rank + (adapter.kind == "dora")) + inputs * adapter.rank) * layers
        for name, (outputs, inputs, layers) in matrices(architecture).items()
        if targeted(name, adapter.targets)
    ]
    return sum(each)


def _whole(architecture: Architecture, adapter: Adapter) -> int:
    """Parameters of embedding and head, as far as they are trained."""
    ends = architecture.vocab * architecture.hidden
    if architecture.tied:
        return ends if adapter.train_embeddings or adapter.train_head else 0
    return ends * (adapter.train_embeddings + adapter.train_head)


def frozen_bytes(architecture: Architecture, adapter: Adapter, size: int) -> int:
    """Bytes of the frozen weights, `size` an element where they are not quantised."""
    narrow = (
        sum(outputs * inputs * layers for outputs, inputs, layers in matrices(architecture).values()) if adapter.quantise == "nf4" else 0
    )
    return round(NF4_BYTES * narrow) + size * (architecture.parameters() - narrow - _whole(architecture, adapter))


def groups(architecture: Architecture, adapter: Adapter, *, decay_embeddings: bool) -> tuple[int, int]:
    """Trained parameters with weight decay, and without: A and B have it, DoRA's lengths do not."""
    lengths = 0
    if adapter.kind == "dora":
        lengths = sum(outputs * layers for name, (outputs, _, layers) in matrices(architecture).items() if targeted(name, adapter.targets))
    decayed = low_rank(architecture, adapter) - lengths + (_whole(architecture, adapter) if decay_embeddings else 0)
    return decayed, trained(architecture, adapter) - decayed


def learns_head(architecture: Architecture, adapter: Adapter) -> bool:
    """Whether the head has a gradient."""
    return adapter.train_head or (architecture.tied and adapter.train_embeddings)


def layer_bytes(architecture: Architecture, adapter: Adapter, size: int) -> int:
    """Bytes of a layer's frozen weights and adapters, as they are gathered: the mean of layers, the last norm included."""
    ends = architecture.vocab * architecture.hidden * (1 if architecture.tied else 2)
    narrow = (
        sum(outputs * inputs * layers for outputs, inputs, layers in matrices(architecture).values()) if adapter.quantise == "nf4" else 0
    )
    wide = architecture.parameters() - ends - narrow + low_rank(architecture, adapter)
    return math.ceil((NF4_BYTES * narrow + size * wide) / architecture.layers)


def kept_bytes(architecture: Architecture, adapter: Adapter, size: int) -> int:
    """Bytes that adapters keep for the backward, per token and mean layer, beside what the layer does: u, of DoRA the product, with dropout its inputs."""
    found = 0
    for name, (outputs, inputs, layers) in matrices(architecture).items():
        if targeted(name, adapter.targets):
            each = adapter.rank + (outputs if adapter.kind == "dora" else 0) + (2 * inputs if adapter.dropout else 0)
            found += each * layers
    return math.ceil(size * found / architecture.layers)


def restoring_bytes(architecture: Architecture, adapter: Adapter, size: int) -> int:
    """Bytes of the largest matrix while it is made of its codes: levels and their products in fp32, then the weight."""
    largest = max(outputs * inputs for outputs, inputs, _ in matrices(architecture).values())
    return (8 + size) * largest if adapter.quantise == "nf4" else 0


def flops_per_token(architecture: Architecture, adapter: Adapter, sequence: int) -> float:
    """`Architecture.flops_per_token` without the products that would make gradients of frozen weights (2 of each 6), and with the adapters' 6 per weight."""
    learns = architecture.vocab * architecture.hidden if learns_head(architecture, adapter) else 0
    weights = (architecture.flops_per_token(sequence) - _attention_flops(architecture, sequence)) / 6
    return architecture.flops_per_token(sequence) - 2 * (weights - learns) + 6 * low_rank(architecture, adapter)


def _attention_flops(architecture: Architecture, sequence: int) -> float:
    """Of the scores and what they weigh, which no weight takes part in: what is the same per token and layer without layers' weights."""
    widths = 6 * architecture.heads * (architecture.head_dim + architecture.value_dim)
    seen = 0.0
    for i in range(architecture.layers):
        w = min(architecture.window_of(i) or sequence, sequence)
        seen += (w * (w + 1) / 2 + (sequence - w) * w) / sequence
    return widths * seen


def check(recipe: Recipe, architecture: Architecture | Foreign, mesh: Mesh) -> None:
    """Raises PlanError for what an adapter cannot be combined with, and for targets that are no matrix of this model."""
    adapter = recipe.adapter
    if adapter is None:
        return
    if isinstance(architecture, Foreign):
        raise PlanError(
            f"[adapter] is for our own decoders, and {architecture.model_type!r} runs by transformers' code; train it whole, or choose a model of our families"
        )
    refused = _refused(recipe, adapter, mesh)
    if refused is not None:
        raise PlanError(f"[adapter]: {refused[0]}; {refused[1]}")
    known = matrices(architecture)
    for target in adapter.targets if adapter.targets != "all-linear" else ():
        if not any(targeted(name, [target]) for name in known):
            raise PlanError(f"adapter.targets {target!r} is the end of no matrix's name{_nearest(target, known)}")
    if adapter.quantise == "nf4":
        for name, (outputs, inputs, _) in known.items():
            if inputs % BLOCK:
                raise PlanError(
                    f'adapter.quantise "nf4" gives {BLOCK} neighbours of a row one scale, and {name} has rows of {inputs} ({outputs} x {inputs}); '
                    'set adapter.quantise = "none"'
                )


def _nearest(target: str, known: Iterable[str]) -> str:
    names = list(known)
    leaves = {name.rpartition(".")[2]: name for name in names}
    close = difflib.get_close_matches(target.rpartition(".")[2], leaves, 1, 0.5)
    return (f'; did you mean "{close[0]}"?' if close else "") + f" A layer has {', '.join(names)}"


def _refused(recipe: Recipe, adapter: Adapter, mesh: Mesh) -> tuple[str, str] | None:
    """`(why, the way out)`."""
    if mesh.tensor > 1:
        return (
            f"mesh.tensor {mesh.tensor} would cut A and B with their matrix, which is not done",
            "share the weights by mesh.shard instead",
        )
    if mesh.pipeline > 1:
        return (
            f"mesh.pipeline {mesh.pipeline}: torch's schedules ask every stage for gradients that frozen layers do not have",
            "share the weights by mesh.shard instead",
        )
    if mesh.expert > 1:
        return f"mesh.expert {mesh.expert}: experts are frozen and are not moved between ranks", "share them by mesh.shard instead"
    if recipe.train.precision == "fp8":
        return 'train.precision "fp8" lowers the products of trained weights', 'set train.precision = "bf16"'
    if recipe.optim.name == "muon":
        return 'optim.name "muon" is for whole matrices, and A and B are factors of one', 'set optim.name = "adamw"'
    if recipe.train.dropout:
        return (
            f"train.dropout {recipe.train.dropout:g} drops blocks' outputs, of which the base was trained with all",
            "set adapter.dropout instead",
        )
    if recipe.train.release:
        return "train.release frees gradients of weights that have none here", "leave train.release out"
    if recipe.loss.router_bias_rate:
        return f"loss.router_bias_rate {recipe.loss.router_bias_rate:g} would move routers that are frozen", "leave it out"
    if adapter.quantise == "nf4" and recipe.engine.name == "deepspeed":
        return 'adapter.quantise "nf4" keeps integers, which DeepSpeed would partition and cast as weights', 'set engine.name = "native"'
    if adapter.quantise == "nf4" and recipe.train.compile:
        return 'adapter.quantise "nf4" with train.compile has not been judged', "set train.compile = false"
    return None
