"""Which of a model's products run in low precision, and in what form: `[fp8]` made concrete. Free of torch."""

from typing import Literal

from gigatrain.architectures import Architecture
from gigatrain.config import FP8, Mesh, Recipe, Section
from gigatrain.errors import PlanError
from gigatrain.foreign import Foreign
from gigatrain.site import Site

Scaling = Literal["rowwise", "blockwise", "tensorwise", "mxfp8", "nvfp4"]
# kernels/fp8_linear.py's, known here without torch (a test holds them equal): versions by scaling, and what the dims of a matrix are multiples of.
VERSIONS: dict[str, str] = {
    "rowwise": "fp8_rowwise", "blockwise": "fp8_blockwise", "tensorwise": "fp8_tensorwise", "mxfp8": "mxfp8", "nvfp4": "nvfp4",
}  # fmt: skip
MULTIPLES: dict[str, int] = {"rowwise": 16, "tensorwise": 16, "blockwise": 512, "mxfp8": 32, "nvfp4": 32}
EMULATED: dict[str, int] = {**MULTIPLES, "blockwise": 128}
EXPERTS = "mlp.experts"


class Kept(Section):
    """A matrix that stays in bf16."""

    matrix: str
    why: str


class Products(Section):
    """The low-precision lane of a plan. `low` and `high` name every matrix of a layer, by the ends of parameter names."""

    scaling: Scaling
    amax: Literal["current", "delayed"]
    history: int
    gradient: Literal["e4m3", "e5m2"]
    power: bool
    weight_gradient: Literal["low", "bf16"]
    fast_accumulation: bool
    stochastic: bool
    emulate: bool
    producers: tuple[Literal["norms", "swiglu"], ...]
    low: tuple[str, ...]
    high: tuple[Kept, ...]

    def describe(self) -> str:
        """One line for a reader: the form, what is quantised, and what is not and why."""
        number = "e2m1" if self.scaling == "nvfp4" else "e4m3"
        gradient = f"{number}, rounded stochastically" if self.scaling == "nvfp4" and self.stochastic else self.gradient
        gradient = number if self.scaling == "nvfp4" and not self.stochastic else gradient
        scales = "" if self.scaling in ("mxfp8", "nvfp4") else ", scales powers of two" if self.power else ", scales fp32"
        late = f", delayed over {self.history} steps" if self.amax == "delayed" else ""
        wide = ", weight gradients bf16" if self.weight_gradient == "bf16" else ""
        kept = "".join(f"; bf16: {kept.matrix} ({kept.why})" for kept in self.high)
        made = f", by their producers: {' and '.join(self.producers)}" if self.producers else ""
        how = ", EMULATED (slow: numbers of the format, products in fp32)" if self.emulate else ""
        return f"{self.scaling} {number}, gradients {gradient}{scales}{late}{wide}{how}; quantised: {', '.join(self.low)}{made}{kept}"


def matrices(architecture: Architecture, mesh: Mesh) -> dict[str, tuple[int, int]]:
    """`(outputs, inputs)` of each matrix of a layer as one rank multiplies by it, by the end of its parameter's name; all experts' are `mlp.experts`."""
    ranks, hidden = mesh.tensor, architecture.hidden
    q, kv = architecture.heads * architecture.head_dim, architecture.kv_heads * architecture.head_dim
    kv = kv // ranks if architecture.kv_heads % ranks == 0 else architecture.head_dim  # one head that several ranks share
    found = {
        "self_attn.q_proj": (q // ranks, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q // ranks),
    }
    if architecture.kv_rank is not None:  # latent attention: models/latent.py
        assert architecture.rope_head_dim is not None
        heads, values = architecture.heads // ranks, architecture.value_dim
        found = {"self_attn.q_proj": (q // ranks, hidden)}
        if (rank := architecture.q_rank) is not None:
            found = {"self_attn.q_a_proj": (rank, hidden), "self_attn.q_b_proj": (q // ranks, rank)}
        found |= {
            "self_attn.kv_a_proj_with_mqa": (architecture.kv_rank + architecture.rope_head_dim, hidden),
            "self_attn.kv_b_proj": (heads * (architecture.head_dim - architecture.rope_head_dim + values), architecture.kv_rank),
            "self_attn.o_proj": (hidden, heads * values),
        }
    if architecture.sparse_layers < architecture.layers:
        width = architecture.intermediate // ranks
        found |= {"mlp.gate_proj": (width, hidden)} if architecture.gated else {}
        found |= {"mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
    if architecture.shared_experts:  # whole on every rank
        width = architecture.shared_width
        found |= {f"mlp.shared_experts.{name}_proj": (width, hidden) for name in ("gate", "up")}
        found["mlp.shared_experts.down_proj"] = (hidden, width)
    if architecture.sparse_layers:
        found[EXPERTS] = (architecture.expert_width, hidden)
    return found


def resolve(recipe: Recipe, site: Site, architecture: Architecture | Foreign, mesh: Mesh) -> Products | None:
    """The recipe's low-precision lane; None where train.precision is not fp8. Raises PlanError for what cannot be."""
    asked = recipe.fp8
    if recipe.train.precision != "fp8":
        if asked != FP8():
            raise PlanError(
                f'[fp8] is read where train.precision is "fp8", and it is "{recipe.train.precision}"; set it, or remove the table'
            )
        return None
    if isinstance(architecture, Foreign):
        raise PlanError(
            f'train.precision "fp8" is for our own decoders, and {architecture.model_type!r} runs by transformers\' code; set train.precision = "bf16"'
        )
    _check(recipe, site, mesh)
    scaling = asked.scaling
    multiple = (EMULATED if asked.emulate else MULTIPLES)[scaling]
    shapes = matrices(architecture, mesh)
    if unknown := [end for end in asked.high if not any(f".{name}".endswith(f".{end}") for name in shapes)]:
        raise PlanError(f"fp8.high {unknown[0]!r} is the end of no matrix's name; a layer has {', '.join(shapes)}")
    low, high = [], []
    for name, (outputs, inputs) in shapes.items():
        why = None
        if any(f".{name}".endswith(f".{end}") for end in asked.high):
            why = "fp8.high says so"
        elif name == EXPERTS and scaling != "rowwise":
            why = f"torch's grouped products take rowwise scales, not {scaling}"
        elif name == EXPERTS and asked.scales == "fp32":
            why = "experts in FP8 have scales of powers of two, and fp8.scales is fp32"
        elif name == EXPERTS and asked.emulate and site.device != "cpu":
            why = "experts in FP8 are not emulated on a GPU"
        elif name == EXPERTS and (architecture.expert_bias or architecture.activation != "swiglu"):
            why = "experts with biases or another activation than swiglu have no version in FP8"
        elif outputs < asked.least[0] or inputs < asked.least[1]:
            why = f"{outputs} x {inputs} is below fp8.least {asked.least[0]} x {asked.least[1]}"
        elif odd := [n for n in (outputs, inputs) if n % multiple]:
            why = f"{odd[0]} is not a multiple of {multiple}"
        low.extend([name] if why is None else [])
        high.extend([] if why is None else [Kept(matrix=name, why=why)])
    if not low:
        reasons = "; ".join(f"{kept.matrix}: {kept.why}" for kept in high)
        raise PlanError(f'train.precision "fp8" would quantise nothing ({reasons}); lower fp8.least, or set train.precision = "bf16"')
    return Products(
        scaling=scaling,
        amax=asked.amax,
        history=asked.history,
        gradient=asked.gradient or ("e5m2" if scaling == "tensorwise" else "e4m3"),
        power=scaling != "tensorwise" if asked.scales is None else asked.scales == "power_of_two",
        weight_gradient=asked.weight_gradient,
        fast_accumulation=asked.fast_accumulation,
        stochastic=scaling == "nvfp4" and asked.stochastic,
        emulate=asked.emulate,
        producers=_producers(recipe, site, architecture, mesh, low),
        low=tuple(low),
        high=tuple(high),
    )


def _producers(
    recipe: Recipe, site: Site, architecture: Architecture, mesh: Mesh, low: list[str]
) -> tuple[Literal["norms", "swiglu"], ...]:
    """Which operations quantise what they make (kernels/fp8_fused.py): on a GPU, where nothing but quantised products reads it."""
    asked, train = recipe.fp8, recipe.train
    default = recipe.kernels if isinstance(recipe.kernels, str) else recipe.kernels.get("default", "auto")
    chosen = recipe.kernels if isinstance(recipe.kernels, dict) else {}
    if site.device == "cpu" or train.recompute in ("lean", "selective") or asked.weight_gradient != "low":
        return ()
    if (
        asked.scaling in ("mxfp8", "nvfp4")
        or asked.amax == "delayed"
        or chosen.get("quantise", "fused" if default == "auto" else default) != "fused"
    ):
        return ()
    found: list[Literal["norms", "swiglu"]] = []
    reads = [name for name in matrices(architecture, mesh) if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))]
    plain = default == "auto" and not {"rms_norm", "add_rms_norm"} & set(chosen)
    if architecture.placement == "pre" and mesh.tensor == 1 and plain and not architecture.experts and set(reads) <= set(low):
        found.append("norms")
    if architecture.activation == "swiglu" and default == "auto" and "swiglu" not in chosen and "mlp.down_proj" in low:
        found.append("swiglu")
    return tuple(found)


def _check(recipe: Recipe, site: Site, mesh: Mesh) -> None:
    asked, scaling = recipe.fp8, recipe.fp8.scaling
    if site.device == "cpu" and not asked.emulate:
        raise PlanError(
            f'train.precision "fp8" multiplies on tensor cores, and {site.name} has none; set fp8.emulate = true for its numbers (slowly), or '
            'train.precision = "bf16"'
        )
    if recipe.train.compile:
        raise PlanError(
            'train.precision "fp8" is not run with train.compile, whose trace of these products nobody has judged; set train.compile = false, or '
            'train.precision = "bf16"'
        )
    if mesh.pipeline > 1 and mesh.schedule == "zbv":
        raise PlanError(
            'mesh.schedule "zbv" computes weight gradients apart, by a product of its own in bf16, and train.precision is fp8; set mesh.schedule = "1f1b" '
            'or "interleaved"'
        )
    if asked.gradient == "e5m2" and scaling not in ("tensorwise", "mxfp8"):
        raise PlanError(
            f'fp8.gradient "e5m2" goes with tensorwise and mxfp8 scales: torch\'s {scaling} products take e4m3 alone; leave fp8.gradient out'
        )
    if asked.scales is not None and scaling in ("mxfp8", "nvfp4"):
        raise PlanError(f"fp8.scales {asked.scales!r}: {scaling} has the scales of its format; leave fp8.scales out")
    if asked.amax == "delayed":
        if scaling != "tensorwise":
            raise PlanError(
                f'fp8.amax "delayed" is for tensorwise scales, and fp8.scaling is {scaling!r}; set fp8.amax = "current", or tensorwise'
            )
        if recipe.engine.name == "deepspeed" or mesh.pipeline > 1:
            where = 'engine.name "deepspeed"' if recipe.engine.name == "deepspeed" else f"mesh.pipeline {mesh.pipeline}"
            raise PlanError(
                f'fp8.amax "delayed" keeps magnitudes from step to step, which is not done with {where}; set fp8.amax = "current"'
            )
