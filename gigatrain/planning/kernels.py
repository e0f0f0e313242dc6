"""Which implementation computes each operation, and why that one: by the recipe, else by rules (benchmarks/LOG.md). Free of torch."""

import difflib
from collections.abc import Mapping

from gigatrain.architectures import Architecture
from gigatrain.config import Recipe, Section
from gigatrain.errors import PlanError
from gigatrain.foreign import Foreign
from gigatrain.planning import attention, hardware, products
from gigatrain.site import Site

# Every operation and its implementations, the reference first: kernels/ops.py's, known here without torch (a test holds them equal).
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "embedding": ("reference", "fused"),
    "rms_norm": ("reference", "lean", "fused"),
    "add_rms_norm": ("reference", "lean", "fused"),
    "rope": ("reference", "lean", "fused"),
    "qk_norm_rope": ("reference", "lean", "fused"),
    "swiglu": ("reference", "fused"),
    "geglu": ("reference", "fused"),
    "relu2": ("reference", "fused"),
    "xielu": ("reference", "fused"),
    "dropout_add": ("reference", "fused"),
    "linear": ("reference",),
    "quantise": ("reference", "fused"),
    "router": ("reference", "fused"),
    "expert_sort": ("reference", "fused"),
    "moe": ("reference", "grouped", "glued", "fused"),
    "experts": ("reference", "grouped", "glued", "fused"),
    "attention": ("reference", "sdpa", "blocked", *attention.ON_GPU),
    "linear_cross_entropy": ("reference", "chunked", "fused"),
    "grad_norm": ("reference", "fused"),
    "adamw": ("reference", "foreach", "fused"),
    "newton_schulz": ("reference", "fused"),
    "muon_momentum": ("reference", "fused"),
    "muon_update": ("reference", "fused"),
}
TRITON = ("fused", "glued")  # names of implementations that need a GPU; glued: torch's products with Triton between them
# Versions that compute other numbers, in low precision: chosen by train.precision = "fp8" and its table, never by kernels.
NARROW: dict[str, tuple[str, ...]] = {"linear": tuple(products.VERSIONS.values()), "moe": ("fp8_rowwise",), "experts": ("fp8_rowwise",)}
_BLOCKS = ("moe", "experts")  # a layer's experts: as one block, and as one rank of several computes them
_ELEMENTWISE = ("rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "swiglu", "geglu", "relu2", "xielu", "dropout_add")
# Those within a model's layers, which a model of transformers' computes by its own code.
_LAYERS = (*_ELEMENTWISE, *_BLOCKS, "embedding", "linear", "router", "expert_sort", "quantise", "attention")

_Reason = tuple[str, str]  # an implementation's name, and why that one


class Choice(Section):
    """Which kernel computes an operation, and why that one."""

    op: str
    kernel: str
    why: str


def choose(recipe: Recipe, site: Site, architecture: Architecture | Foreign, low: products.Products | None) -> tuple[Choice, ...]:
    """The implementation of each operation, with the reason; `low` is the plan's lane of low precision. Raises PlanError for one that cannot be."""
    wanted = recipe.kernels if isinstance(recipe.kernels, dict) else {"default": recipe.kernels}
    default = wanted.get("default", "auto")
    if default not in ("auto", "reference"):
        raise PlanError(f"kernels.default {default!r} is neither auto nor reference")
    named = {op: name for op, name in wanted.items() if op != "default"}
    _check(named, recipe, site, architecture)
    chosen = _rules(recipe, site, architecture) if default == "auto" else {}
    reasons = dict.fromkeys(IMPLEMENTATIONS, ("reference", 'the recipe says kernels = "reference"')) | chosen
    reasons |= {op: (name, "the recipe says so") for op, name in named.items()}
    reasons |= _lowered(named, low)
    return tuple(Choice(op=op, kernel=kernel, why=why) for op, (kernel, why) in reasons.items())


def _check(named: Mapping[str, str], recipe: Recipe, site: Site, architecture: Architecture | Foreign) -> None:
    """Raise PlanError for an operation or implementation that the recipe names and that there is not, or not on this site."""
    on_gpu = {*TRITON, *attention.ON_GPU}
    for op, name in named.items():
        if op not in IMPLEMENTATIONS:
            close = difflib.get_close_matches(op, IMPLEMENTATIONS, 1)
            known = f"did you mean {close[0]}?" if close else f"there are {', '.join(IMPLEMENTATIONS)}"
            raise PlanError(f"kernels.{op}: no operation is called so; {known}")
        if name in NARROW.get(op, ()):
            raise PlanError(
                f'kernels.{op} {name!r} computes other numbers, not the same ones faster; set train.precision = "fp8" and fp8.scaling'
            )
        if name not in IMPLEMENTATIONS[op]:
            raise PlanError(f"kernels.{op} {name!r}: choose one of {', '.join(IMPLEMENTATIONS[op])}")
        if name in on_gpu and site.device == "cpu":
            others = " or ".join(one for one in IMPLEMENTATIONS[op] if one not in on_gpu)
            kernels = "Triton kernels need" if name in TRITON else f"{name} needs"
            raise PlanError(f'kernels.{op} "{name}": {kernels} a GPU, and {site.name} has none; choose {others}')
    if isinstance(architecture, Architecture) and site.device == "cuda" and (name := named.get("attention")):
        call = _attended(recipe, site, architecture)
        if (why := attention.refusal(name, call)) is not None:
            raise PlanError(f'kernels.attention "{name}": {why}; choose "{attention.chosen(call)[0]}", or leave it out')
    optim = recipe.optim
    if named.get("adamw") == "foreach" and not _plain_states(recipe):
        form = f"{optim.master} master weights with {optim.moments} moments"
        raise PlanError(f'kernels.adamw "foreach" is torch\'s own AdamW, which has no {form}; set kernels.adamw = "reference"')


def _plain_states(recipe: Recipe) -> bool:
    """Whether AdamW's states have the form that torch's own AdamW has."""
    return (recipe.optim.master, recipe.optim.moments) == ("fp32", "fp32")


def _lowered(named: Mapping[str, str], low: products.Products | None) -> dict[str, _Reason]:
    """The products of low precision. Raises PlanError where the recipe names another implementation of them."""
    if low is None:
        return {}
    how = "train.precision fp8" + (", emulated" if low.emulate else "")
    found: dict[str, _Reason] = {}
    if any(name != products.EXPERTS for name in low.low):
        found["linear"] = (products.VERSIONS[low.scaling], f"{how}: {low.scaling}")
    if products.EXPERTS in low.low:
        found |= dict.fromkeys(_BLOCKS, ("fp8_rowwise", f"{how}: rowwise, weight gradients bf16"))
    if twice := [op for op in found if op in named]:
        raise PlanError(
            f'kernels.{twice[0]} "{named[twice[0]]}" and train.precision "fp8" both choose these products; leave kernels.{twice[0]} out, and name '
            "what is to stay in bf16 in fp8.high"
        )
    return found


def _rules(recipe: Recipe, site: Site, architecture: Architecture | Foreign) -> dict[str, _Reason]:
    """What is chosen where the recipe names nothing."""
    compiled, gpu = recipe.train.compile, site.device == "cuda"
    chosen: dict[str, _Reason] = dict.fromkeys(IMPLEMENTATIONS, ("reference", "plain torch: nothing else runs on this device"))
    for op in _ELEMENTWISE:
        if compiled:
            chosen[op] = ("reference", "train.compile: the compiler fuses plain torch")
        elif gpu:
            chosen[op] = ("fused", "one Triton launch each way")
        elif "lean" in IMPLEMENTATIONS[op]:
            chosen[op] = ("lean", "one backward in few passes, and less is saved for it")
    chosen["linear"] = ("reference", "torch's product")
    if gpu and not compiled:
        chosen["quantise"] = ("fused", "codes and transposed codes in one pass")
    if gpu:
        chosen["embedding"] = ("fused", "its gradient is sorted, summed in fp32 and deterministic")
        chosen |= dict.fromkeys(("grad_norm", "adamw", "muon_momentum", "muon_update"), ("fused", "one launch a bucket"))
        chosen |= dict.fromkeys(("router", *_BLOCKS), ("fused", "a choice in two launches, products with the activation at their end"))
        chosen["expert_sort"] = ("fused", "counting sort in three launches")
        chosen["newton_schulz"] = ("fused", "symmetric products or the Gram form, whichever has fewer FLOPs")
    elif _plain_states(recipe):
        chosen["adamw"] = ("foreach", "torch's own fused update")
    chosen["linear_cross_entropy"] = ("fused" if gpu else "chunked", "never holds all logits")
    if isinstance(architecture, Foreign):
        return chosen | dict.fromkeys(_LAYERS, ("reference", f"the model's own code: transformers' {architecture.class_name}"))
    if architecture.experts:
        chosen |= dict.fromkeys(_BLOCKS, _experts(recipe, site, architecture))
        if recipe.mesh.expert > 1:
            reads = "no count is read" if recipe.mesh.dispatch == "gather" else "counts are read on the host once per layer and forward"
            why = f"mesh.dispatch {recipe.mesh.dispatch} between ranks, which runs `experts` on each: {reads}"
            chosen["moe"] = (chosen["moe"][0], why)
    chosen["attention"] = _attention(recipe, site, architecture)
    return chosen


def _experts(recipe: Recipe, site: Site, architecture: Architecture) -> _Reason:
    """How the products of experts are computed."""
    size = 2 if recipe.train.compute == "bf16" else 4
    if site.device != "cuda":
        if odd := _odd(architecture, size):
            return "reference", f"plain torch: rows of {odd} elements are not multiples of 16 bytes, as torch's grouped product needs them"
        return "grouped", "torch's grouped product, which reads the counts on the device"
    on_device = _grouped_on_device(site, size) and not _odd(architecture, size)
    if on_device and recipe.adapter is not None:
        return "grouped", "[adapter]: experts are frozen, and of torch's grouped product their gradients are not made"
    if on_device and _architecture(site) == "sm_90":  # where it was measured
        return "glued", (
            "torch's grouped products with one Triton launch between two: on an H200 1.47 times as fast as Triton's own products (Qwen3-30B-A3B, "
            "8,192 tokens, forward and backward)"
        )
    spared = _spared(architecture.hidden, architecture.expert_width)
    slower = "" if spared >= _BEHIND else ': in bf16 "glued" may be faster, measure it'
    frozen = "" if recipe.adapter is None else "; [adapter]: gradients of the frozen experts are made and thrown away"
    return "fused", (
        f"spares passes over memory worth {100 * spared:.0f} % of its products' time on an H200, by bytes and FLOPs; "
        f"Triton's products are taken to be 3 to 15 % slower than torch's{slower}{frozen}"
    )


def _architecture(site: Site) -> str | None:
    return None if site.accelerator is None else hardware.ARCHITECTURES[site.accelerator]


def _grouped_on_device(site: Site, size: int) -> bool:
    """Whether torch's grouped product of elements of `size` bytes is known to leave the counts on the device, without which a run refuses it
    (kernels/moe.py's `supports`): in bf16 on compute capability 9 and 10, and on AMD."""
    architecture = _architecture(site) or ""
    return architecture.startswith("gfx") or (size == 2 and architecture.startswith(("sm_9", "sm_10")))


def _odd(architecture: Architecture, size: int) -> int | None:
    """The first length of the experts' rows that is no multiple of 16 bytes, of `size` an element, as torch's grouped product needs them; None: all are."""
    return next((n for n in (architecture.hidden, architecture.expert_width) if n * size % 16), None)


_BEHIND = 0.15  # of the time of a product, what Triton's dense products are at most behind cuBLAS's on Hopper


def _spared(hidden: int, width: int) -> float:
    """What `fused` spares `glued` in bf16, as a share of the products' time: passes over memory at 4.3 TB/s, products at 790 TFLOP/s (an H200's).

    Per visit: rows gathered and read again in forward (4 h bytes), twice in backward (8 h), gate and up read again, dh written and read (8 i); 18 h i FLOPs.
    """
    return (12 * hidden + 8 * width) / 4.3e12 / (18 * hidden * width / 790e12)


def _attention(recipe: Recipe, site: Site, architecture: Architecture) -> _Reason:
    call = _attended(recipe, site, architecture)
    lacking = " and no ".join(attention.SAID[one] for one in ("softcap", "sinks") if one in call.asks)
    if recipe.mesh.context > 1 and recipe.mesh.exchange == "ring":
        return "sdpa" if not lacking else "reference", "parallel/ring.py's own, block by block of the ranks' keys; this one is not called"
    if recipe.train.compile:
        return ("reference", f"train.compile, which has no {lacking}") if lacking else ("sdpa", "train.compile: torch's fused attention")
    if site.device == "cuda":
        return attention.chosen(call)
    if recipe.train.compute == "bf16" and recipe.train.sequence <= 2048:
        return "blocked", "in bf16 on a CPU twice as fast as torch's, at 256 and 1,024 tokens"
    if lacking:
        return "blocked", f"torch's fused attention has no {lacking}"
    return "sdpa", "torch's fused attention"


def _attended(recipe: Recipe, site: Site, architecture: Architecture) -> attention.Call:
    """What attention is asked for on one rank: tensor parallelism and Ulysses cut its heads."""
    mesh, train = recipe.mesh, recipe.train
    shared = mesh.tensor * (mesh.context if mesh.exchange == "ulysses" else 1)
    asks = {
        "values": architecture.value_dim != architecture.head_dim,
        "single": train.precision == "fp32",
        "documents": recipe.documents,
        "window": any((window := architecture.window_of(i)) and window < train.sequence for i in range(architecture.layers)),
        "softcap": architecture.attention_softcap is not None,
        "sinks": architecture.sinks,
    }
    return attention.Call(
        heads=max(1, architecture.heads // shared),
        kv_heads=max(1, architecture.kv_heads // shared),
        channels=architecture.head_dim,
        values=architecture.value_dim,
        sequence=train.sequence,
        asks=frozenset(name for name, asked in asks.items() if asked),
        deterministic=train.deterministic,
        architecture=_architecture(site),
    )
