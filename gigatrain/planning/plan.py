"""Recipe x Site -> Plan: every number concrete, and what cannot work refused before anything is allocated."""

import difflib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from gigatrain import load
from gigatrain.architectures import Architecture
from gigatrain.config import (
    Adapter,
    Checkpoint,
    Data,
    Engine,
    Init,
    Loss,
    Mesh,
    Numerics,
    Objective,
    Optim,
    Power,
    Profile,
    Recipe,
    Recovery,
    Report,
    Sample,
    Schedule,
    Section,
    Tokenizer,
    Validation,
)
from gigatrain.errors import PlanError
from gigatrain.foreign import Foreign
from gigatrain.planning import (
    adapting,
    attention,
    axes,
    budget,
    cost,
    fusions,
    hardware,
    objective,
    phases,
    products,
    replicas,
    stretched,
    watts,
)
from gigatrain.planning.expect import expect
from gigatrain.planning.expected import Expected
from gigatrain.planning.fusions import Fusion, Name
from gigatrain.planning.phases import Stretch
from gigatrain.planning.watts import Watts
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
# Those within a model's layers, which a model of transformers' computes by its own code.
MODEL = (
    "embedding", "rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "swiglu", "geglu", "relu2", "xielu", "dropout_add", "linear", "router",
    "expert_sort", "quantise", "moe", "experts", "attention",
)  # fmt: skip
# What a resume may change: no tensor of the run depends on it, but for the order in which ranks and microbatches are summed.
OPERATIONAL = (
    "ranks",
    "mesh",
    "engine",
    "microbatch",
    "accumulation",
    "profile",
    "summary",
    "roped",
    "data.folder",
    "data.workers",
    "max_bad_steps",
    "validation",
    "checkpoint",
    "recovery",
    "numerics.replay",
    "numerics.hash_every",
    "numerics.on_divergence",
    "numerics.straggler",
    "report",
    "sample",
    "export",
    "memory",
    "fusions",
    "power",
    "watts",
    "draw",
    "expected",
)
# What a resume may change too, and says: the same formulas in the same precision, summed or rounded elsewhere, as on another mesh.
ARITHMETIC = ("site", "device", "kernels", "compile", "recompute", "deterministic", "adapter.restore")
# What a resume changes only where it is told to (--other-numbers): what numbers are kept or computed in, and what is done about those that cannot be right.
NUMBERS = ("precision", "fp8", "optim.master", "optim.moments", "optim.rounding", "numerics")
# And what lies ahead of its checkpoint: how far the run goes, at which rate, in which phases. Those behind it are the run's past (data/loader.py compares).
AHEAD = ("steps", "tokens", "schedule", "phases", "sequence", "positions", "batch", "tokens_per_step", "flops_per_token")


class Choice(Section):
    """Which kernel computes an operation, and why that one."""

    op: str
    kernel: str
    why: str


class Plan(Section):
    """What will happen. The run folder keeps it as plan.json; `identity` is what a resume must match."""

    format: Literal[1] = 1
    name: str
    summary: str
    site: str
    device: Literal["cpu", "cuda"]
    ranks: int
    mesh: Mesh
    engine: Engine
    profile: Profile
    architecture: Architecture | Foreign
    source: str | None
    roped: bool = False  # model.rope stands for the weights' own
    init: Init
    tokenizer: Tokenizer
    data: Data
    sequence: int
    positions: int
    batch: int
    microbatch: int
    accumulation: int
    steps: int
    tokens_per_step: int
    tokens: int
    phases: tuple[Stretch, ...] = ()
    precision: Literal["bf16", "fp32", "fp8"]
    fp8: products.Products | None = None
    adapter: Adapter | None = None
    seed: int
    recompute: cost.Recompute
    dropout: float
    neftune: float
    compile: bool
    deterministic: bool
    max_bad_steps: int
    optim: Optim
    schedule: Schedule
    loss: Loss
    objective: Objective = Objective()
    validation: Validation
    checkpoint: Checkpoint
    recovery: Recovery = Recovery()
    numerics: Numerics = Numerics()
    report: Report
    power: Power = Power()
    watts: Watts = Watts()
    draw: budget.Draw = budget.Draw()
    expected: Expected = Expected()
    sample: Sample
    export: bool
    kernels: tuple[Choice, ...]
    fusions: tuple[Fusion, ...] = ()
    parameters: int
    flops_per_token: float
    memory: cost.Memory

    @property
    def compute(self) -> Literal["bf16", "fp32"]:
        """What weights and activations are in, outside of products in fp8."""
        return "fp32" if self.precision == "fp32" else "bf16"

    @property
    def turns(self) -> int:
        """Microbatches of a step, of the phase that has the most."""
        return max(phase.accumulation for phase in self.stretches)

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """The phases; of a run without any the run as one."""
        return self.phases or (phases.stretch(self, 0, tuple(source.weight for source in self.data.sources)),)

    @property
    def documents(self) -> bool:
        """Whether rows hold several documents, which attention keeps apart."""
        return self.data.packing != "document" or self.objective.joins

    @property
    def drops(self) -> bool:
        """Whether a step draws masks or noise."""
        return self.dropout > 0 or self.neftune > 0 or (self.adapter is not None and self.adapter.dropout > 0)

    @property
    def decoder(self) -> Architecture:
        """The architecture of a plan for one of our own decoders."""
        assert isinstance(self.architecture, Architecture)
        return self.architecture

    def fuses(self, name: Name) -> bool:
        """Whether an option of a step is on."""
        return any(fusion.on for fusion in self.fusions if fusion.name == name)

    def text(self) -> str:
        """Canonical JSON: sorted keys, no spaces; the same plan is the same bytes on every machine."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))

    @property
    def sha256(self) -> str:
        """Of the whole text."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    @property
    def identity(self) -> str:
        """SHA-256 of what decides the run's numbers: all but what is only watched, kept or written (OPERATIONAL), which a resume may change."""
        tree = self._without(OPERATIONAL)
        tree["phases"] = [phase.identity for phase in self.phases]
        # Reasons are words; which attention a rank calls, and what quantises for whom, follow from the heads and matrices that it has on its mesh.
        tree["kernels"] = [[one["op"], one["kernel"]] for one in tree["kernels"] if one["op"] != "attention"]
        if self.fp8 is not None:
            tree["fp8"]["high"] = [one["matrix"] for one in tree["fp8"]["high"]]
            del tree["fp8"]["producers"]
        if self.loss.router_aux or self.loss.router_z or (self.fp8 is not None and self.fp8.scaling == "tensorwise"):
            tree["microbatch"] = self.microbatch  # balance and such scales are of one microbatch
        return _sha256(tree)

    @property
    def meaning(self) -> str:
        """SHA-256 of what the run is: model, data and their order, first batch, optimizer, loss. No resume changes it, and checkpoints are bound to it."""
        tree = self._without((*OPERATIONAL, *ARITHMETIC, *NUMBERS, *AHEAD))
        tree["first"] = [self.stretches[0].sequence, self.stretches[0].batch]
        if self.loss.router_aux or self.loss.router_z:
            tree["microbatch"] = self.microbatch
        return _sha256(tree)

    def _without(self, paths: tuple[str, ...]) -> dict[str, Any]:
        tree = json.loads(self.text())
        for path in paths:
            *parents, last = path.split(".")
            node = tree
            for part in parents:
                node = node[part] or {}  # a section that may be left out
            node.pop(last, None)
        if self.adapter is None:
            del tree["adapter"]  # as the plans of runs before there were adapters
        else:
            del tree["source"]  # the base may lie elsewhere: checkpoints know it by the hash of its weights
        return tree

    def differences(self, other: "Plan") -> list[str]:
        """`key: mine -> other's` for every value that differs, by dotted key."""
        mine, theirs = (dict(_leaves(plan.model_dump(mode="json", by_alias=True))) for plan in (self, other))
        absent = "nothing"
        return [
            f"{key}: {mine.get(key, absent)} -> {theirs.get(key, absent)}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key, absent) != theirs.get(key, absent)
        ]


def plan(
    recipe: Recipe,
    site: Site,
    ranks: int | None = None,
    *,
    measure: Callable[[Mapping[str, Any]], Foreign] | None = None,
    constants: Mapping[str, float] | None = None,
    fits: bool = True,
    forecast: bool = True,
) -> Plan:
    """Make every number of the run concrete, on `ranks` processes (default: the recipe's `train.nproc`, else what its mesh needs).

    `measure` gives the numbers of a model that is not of our families: models/autonumbers.py's `numbers`, which needs torch. `constants`: of the
    estimate, where runs of one's own have refitted them (calibrate.py). `fits` False: memory is not judged, as where a layout is still to be searched;
    `forecast` False: nothing is expected of it.

    Raises PlanError for what cannot work: a memory need beyond the site's, watts beyond a budget, a tokenizer beyond the model's vocabulary, a mesh that
    divides nothing.
    """
    if recipe.train.phases:
        alone = functools.partial(plan, site=site, ranks=ranks, measure=measure, constants=constants, fits=fits, forecast=forecast)
        return phases.joined(recipe, alone)
    architecture = load.architecture(recipe.model, measure)
    train = recipe.train
    mesh = axes.resolve(recipe, ranks)
    ranks = axes.count(mesh)
    microbatch, accumulation = axes.share(recipe, mesh)
    axes.check(recipe, architecture, mesh, accumulation)
    stretched.check(recipe, architecture)
    objective.check(recipe, mesh, architecture)
    adapting.check(recipe, architecture, mesh)
    tokens_per_step = train.batch * train.sequence
    steps = train.steps if train.steps is not None else math.ceil((train.tokens or 0) / tokens_per_step)
    phases.check(recipe.schedule, steps)
    low = products.resolve(recipe, site, architecture, mesh)
    kernels = _kernels(recipe, site, architecture, low)
    chosen = fusions.choose(recipe, site, architecture, mesh, microbatch, accumulation, {choice.op: choice.kernel for choice in kernels})
    replicas.check(recipe, mesh, chosen)
    memory = cost.memory(
        architecture,
        device=site.device,
        precision=train.compute,
        microbatch=microbatch,
        sequence=train.sequence,
        recompute=train.recompute,
        accumulation=accumulation,
        optim=recipe.optim,
        mesh=mesh,
        engine=recipe.engine,
        kernels={choice.op: choice.kernel for choice in kernels},
        documents=recipe.documents,
        fused=frozenset(fusion.name for fusion in chosen if fusion.on),
        adapter=recipe.adapter,
    )
    memory = objective.with_teacher(recipe, memory, microbatch * accumulation)
    if recipe.tokenizer.train and recipe.tokenizer.train.vocab > architecture.vocab:
        raise PlanError(
            f"tokenizer.train.vocab {recipe.tokenizer.train.vocab} is above model.architecture.vocab {architecture.vocab}; "
            "the model has no embedding for the rest: make them equal"
        )
    if recipe.optim.master != "fp32" and train.precision == "fp32":
        raise PlanError(
            f'optim.master "{recipe.optim.master}" keeps corrections of bf16 weights, and train.precision is fp32, where the weights are their own master; '
            'set optim.master = "fp32" or train.precision = "bf16"'
        )
    form = f"{recipe.optim.master} master weights with {recipe.optim.moments} moments"
    if {choice.op: choice.kernel for choice in kernels}.get("adamw") == "foreach" and form != "fp32 master weights with fp32 moments":
        raise PlanError(f'kernels.adamw "foreach" is torch\'s own AdamW, which has no {form}; set kernels.adamw = "reference"')
    if train.recompute == "lean" and train.compile:
        raise PlanError(
            'train.recompute "lean" and train.compile exclude each other: the compiler decides what it keeps; set recompute = "none" or "selective"'
        )
    room, why = hardware.memory_bytes(site)  # as sold, an upper bound: `fits` of a forecast is by the 0.99 of it that torch sees
    if fits and room is not None and memory.total > room:
        said = f" ({why})" if site.memory_bytes is None else ""
        raise PlanError(
            f"the run needs {gib(memory.total)} on {site.name}, which has {gib(room)}{said}: weights {gib(memory.weights)}, "
            f"gradients {gib(memory.gradients)}, optimizer {gib(memory.optimizer)}, activations about {gib(memory.activations)}, "
            f"workspace about {gib(memory.workspace)}; "
            'lower train.microbatch or train.sequence, or set train.recompute = "full"'
        )
    found = Plan(
        name=recipe.name,
        summary=recipe.summary,
        site=site.name,
        device=site.device,
        ranks=ranks,
        mesh=mesh,
        engine=recipe.engine,
        profile=recipe.profile,
        architecture=architecture,
        source=None if recipe.model.fresh or (recipe.optim.source is not None and recipe.adapter is None) else recipe.model.source,
        roped=recipe.model.rope is not None,
        init=recipe.model.init,
        tokenizer=recipe.tokenizer,
        data=recipe.data,
        sequence=train.sequence,
        positions=max(train.sequence, load.positions(recipe.model)),
        batch=train.batch,
        microbatch=microbatch,
        accumulation=accumulation,
        steps=steps,
        tokens_per_step=tokens_per_step,
        tokens=steps * tokens_per_step,
        precision=train.precision,
        fp8=low,
        adapter=recipe.adapter,
        seed=train.seed,
        recompute=train.recompute,
        dropout=train.dropout,
        neftune=train.neftune,
        compile=train.compile,
        deterministic=train.deterministic,
        max_bad_steps=train.max_bad_steps,
        optim=recipe.optim,
        schedule=recipe.schedule,
        loss=recipe.loss,
        objective=recipe.objective,
        validation=recipe.validation,
        checkpoint=recipe.checkpoint,
        recovery=recipe.recovery,
        numerics=recipe.numerics,
        report=recipe.report,
        power=recipe.power,
        watts=watts.of(site, ranks),
        draw=budget.draw(recipe.power, site, ranks),
        sample=recipe.sample,
        export=recipe.export,
        kernels=kernels,
        fusions=chosen,
        parameters=architecture.parameters(),
        flops_per_token=objective.flops_per_token(recipe.objective, architecture, train.sequence)
        + (
            adapting.flops_per_token(architecture, recipe.adapter, train.sequence)
            if recipe.adapter is not None and isinstance(architecture, Architecture)
            else architecture.flops_per_token(train.sequence)
        ),
        memory=memory,
    )
    if (why := objective.unknown(recipe)) is not None:
        return found.model_copy(update={"expected": Expected(unknown={"step_s": why})})
    return found.model_copy(update={"expected": expect(found, site, constants)}) if forecast else found


def gib(count: int) -> str:
    """Bytes for a reader: `12.3 GiB`."""
    return f"{count / 2**30:.2f} GiB"


def _kernels(recipe: Recipe, site: Site, architecture: Architecture | Foreign, low: products.Products | None) -> tuple[Choice, ...]:
    """The implementation of each operation, with the reason: by the recipe, else by rules (benchmarks/LOG.md; those for CUDA await a GPU)."""
    wanted = recipe.kernels if isinstance(recipe.kernels, dict) else {"default": recipe.kernels}
    default = wanted.get("default", "auto")
    if default not in ("auto", "reference"):
        raise PlanError(f"kernels.default {default!r} is neither auto nor reference")
    for op, name in wanted.items():
        if op != "default" and op not in IMPLEMENTATIONS:
            close = difflib.get_close_matches(op, IMPLEMENTATIONS, 1)
            known = f"did you mean {close[0]}?" if close else f"there are {', '.join(IMPLEMENTATIONS)}"
            raise PlanError(f"kernels.{op}: no operation is called so; {known}")
        if name in NARROW.get(op, ()):
            raise PlanError(
                f'kernels.{op} {name!r} computes other numbers, not the same ones faster; set train.precision = "fp8" and fp8.scaling'
            )
        if op != "default" and name not in IMPLEMENTATIONS[op]:
            raise PlanError(f"kernels.{op} {name!r}: choose one of {', '.join(IMPLEMENTATIONS[op])}")
        on_gpu = {*TRITON, *attention.ON_GPU}
        if name in on_gpu and site.device == "cpu":
            others = " or ".join(one for one in IMPLEMENTATIONS[op] if one not in on_gpu)
            kernels = "Triton kernels need" if name in TRITON else f"{name} needs"
            raise PlanError(f'kernels.{op} "{name}": {kernels} a GPU, and {site.name} has none; choose {others}')
    if isinstance(architecture, Architecture) and site.device == "cuda" and (name := wanted.get("attention")):
        call = _attended(recipe, site, architecture)
        why = attention.refusal(name, call)
        if why is not None:
            raise PlanError(f'kernels.attention "{name}": {why}; choose "{attention.chosen(call)[0]}", or leave it out')
    chosen = _rules(recipe, site, architecture) if default == "auto" else {}
    reasons = dict.fromkeys(IMPLEMENTATIONS, ("reference", 'the recipe says kernels = "reference"')) | chosen
    reasons |= {op: (name, "the recipe says so") for op, name in wanted.items() if op != "default"}
    if low is not None:
        how = "train.precision fp8" + (", emulated" if low.emulate else "")
        lowered: dict[str, tuple[str, str]] = {}
        if any(name != products.EXPERTS for name in low.low):
            lowered["linear"] = (products.VERSIONS[low.scaling], f"{how}: {low.scaling}")
        if products.EXPERTS in low.low:
            lowered |= dict.fromkeys(("moe", "experts"), ("fp8_rowwise", f"{how}: rowwise, weight gradients bf16"))
        if twice := [op for op in lowered if op in wanted]:
            raise PlanError(
                f'kernels.{twice[0]} "{wanted[twice[0]]}" and train.precision "fp8" both choose these products; leave kernels.{twice[0]} out, and name '
                "what is to stay in bf16 in fp8.high"
            )
        reasons |= lowered
    return tuple(Choice(op=op, kernel=kernel, why=why) for op, (kernel, why) in reasons.items())


_BEHIND = 0.15  # of the time of a product, what Triton's dense products are at most behind cuBLAS's on Hopper


def _spared(hidden: int, width: int) -> float:
    """What `fused` spares `glued` in bf16, as a share of the products' time: passes over memory at 4.3 TB/s, products at 790 TFLOP/s (an H200's).

    Per visit: rows gathered and read again in forward (4 h bytes), twice in backward (8 h), gate and up read again, dh written and read (8 i); 18 h i FLOPs.
    """
    return (12 * hidden + 8 * width) / 4.3e12 / (18 * hidden * width / 790e12)


def _glues(recipe: Recipe, site: Site, architecture: Architecture) -> bool:
    """Experts' products are torch's on Hopper in bf16, where it was measured and where torch reads no counts on the host (kernels/moe.py)."""
    hopper = site.accelerator is not None and attention.ACCELERATORS[site.accelerator] == "sm_90"
    return hopper and recipe.train.compute == "bf16" and not any(2 * n % 16 for n in (architecture.hidden, architecture.expert_width))


def _rules(recipe: Recipe, site: Site, architecture: Architecture | Foreign) -> dict[str, tuple[str, str]]:
    compiled, gpu = recipe.train.compile, site.device == "cuda"
    chosen: dict[str, tuple[str, str]] = dict.fromkeys(IMPLEMENTATIONS, ("reference", "plain torch: nothing else runs on this device"))
    fused = ("fused", "one Triton launch each way")
    for op in ("rms_norm", "add_rms_norm", "rope", "qk_norm_rope", "swiglu", "geglu", "relu2", "xielu", "dropout_add"):
        if compiled:
            chosen[op] = ("reference", "train.compile: the compiler fuses plain torch")
        elif gpu:
            chosen[op] = fused
        elif "lean" in IMPLEMENTATIONS[op]:
            chosen[op] = ("lean", "one backward in few passes, and less is saved for it")
    chosen["linear"] = ("reference", "torch's product")
    chosen["quantise"] = ("fused", "codes and transposed codes in one pass") if gpu and not compiled else chosen["quantise"]
    chosen["embedding"] = ("fused", "its gradient is sorted, summed in fp32 and deterministic") if gpu else chosen["embedding"]
    if gpu:
        chosen |= dict.fromkeys(("grad_norm", "adamw", "muon_momentum", "muon_update"), ("fused", "one launch a bucket"))
        chosen |= dict.fromkeys(
            ("router", "moe", "experts"), ("fused", "a choice in two launches, products with the activation at their end")
        )
        chosen["expert_sort"] = ("fused", "counting sort in three launches")
        chosen["newton_schulz"] = ("fused", "symmetric products or the Gram form, whichever has fewer FLOPs")
    elif (recipe.optim.master, recipe.optim.moments) == ("fp32", "fp32"):
        chosen["adamw"] = ("foreach", "torch's own fused update")
    chosen["linear_cross_entropy"] = ("fused" if gpu else "chunked", "never holds all logits")
    if isinstance(architecture, Foreign):
        within = "the model's own code: transformers' " + architecture.class_name
        return chosen | dict.fromkeys(MODEL, ("reference", within))
    odd = [n for n in (architecture.hidden, architecture.expert_width) if n * 2 % 16] if architecture.experts else []
    if architecture.experts and gpu and recipe.adapter is not None and not odd:
        why = "[adapter]: experts are frozen, and of torch's grouped product their gradients are not made"
        chosen |= dict.fromkeys(("moe", "experts"), ("grouped", why))
    elif architecture.experts and gpu and _glues(recipe, site, architecture):
        why = (
            "torch's grouped products with one Triton launch between two: on an H200 1.47 times as fast as Triton's own products (Qwen3-30B-A3B, "
            "8,192 tokens, forward and backward)"
        )
        chosen |= dict.fromkeys(("moe", "experts"), ("glued", why))
    elif architecture.experts and gpu:
        spared = _spared(architecture.hidden, architecture.expert_width)
        why = f"spares passes over memory worth {100 * spared:.0f} % of its products' time on an H200, by bytes and FLOPs; "
        why += "Triton's products are taken to be 3 to 15 % slower than torch's" + (
            "" if spared >= _BEHIND else ': in bf16 "glued" may be faster, measure it'
        )
        chosen |= dict.fromkeys(("moe", "experts"), ("fused", why))
    elif architecture.experts:
        size = 2 if recipe.train.compute == "bf16" else 4
        why = "torch's grouped product, which reads the counts on the device"
        if odd := [n for n in (architecture.hidden, architecture.expert_width) if n * size % 16]:
            why = f"plain torch: rows of {odd[0]} elements are not multiples of 16 bytes, as torch's grouped product needs them"
        chosen |= dict.fromkeys(("moe", "experts"), ("reference" if odd else "grouped", why))
    if architecture.experts and recipe.mesh.expert > 1:
        reads = "no count is read" if recipe.mesh.dispatch == "gather" else "counts are read on the host once per layer and forward"
        chosen["moe"] = (chosen["moe"][0], f"mesh.dispatch {recipe.mesh.dispatch} between ranks, which runs `experts` on each: {reads}")
    chosen["attention"] = _attention(recipe, site, architecture)
    return chosen


def _attention(recipe: Recipe, site: Site, architecture: Architecture) -> tuple[str, str]:
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
    values = getattr(architecture, "value_dim", architecture.head_dim)
    asks = {
        "values": values != architecture.head_dim,
        "single": train.precision == "fp32",
        "documents": recipe.documents,
        "window": any((window := architecture.window_of(i)) and window < train.sequence for i in range(architecture.layers)),
        "softcap": architecture.attention_softcap is not None,
        "sinks": getattr(architecture, "sinks", False),
    }
    return attention.Call(
        heads=max(1, architecture.heads // shared),
        kv_heads=max(1, architecture.kv_heads // shared),
        channels=architecture.head_dim,
        values=values,
        sequence=train.sequence,
        asks=frozenset(name for name, asked in asks.items() if asked),
        deterministic=train.deterministic,
        architecture=None if site.accelerator is None else attention.ACCELERATORS[site.accelerator],
    )


def _sha256(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield path, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))
