"""Recipe x Site -> Plan: every number concrete, and what cannot work refused before anything is allocated."""

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
    axes,
    budget,
    cost,
    fusions,
    hardware,
    kernels,
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
from gigatrain.planning.kernels import Choice
from gigatrain.planning.phases import Stretch
from gigatrain.planning.watts import Watts
from gigatrain.site import Site

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


# What a plan has as the recipe says it: of the recipe itself, and of its table `train`.
_OF_RECIPE = (
    "name", "summary", "engine", "profile", "tokenizer", "data", "adapter", "optim", "schedule", "loss", "objective", "validation", "checkpoint",
    "recovery", "numerics", "report", "power", "sample", "export",
)  # fmt: skip
_OF_TRAIN = (
    "sequence", "batch", "precision", "seed", "recompute", "dropout", "neftune", "compile", "deterministic", "max_bad_steps",
)  # fmt: skip


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
    choices = kernels.choose(recipe, site, architecture, low)
    chosen = {choice.op: choice.kernel for choice in choices}
    fused = fusions.choose(recipe, site, architecture, mesh, microbatch, accumulation, chosen)
    replicas.check(recipe, mesh, fused)
    _check(recipe, architecture)
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
        kernels=chosen,
        documents=recipe.documents,
        fused=frozenset(fusion.name for fusion in fused if fusion.on),
        adapter=recipe.adapter,
    )
    memory = objective.with_teacher(recipe, memory, microbatch * accumulation)
    if fits:
        _check_memory(memory, site)
    found = Plan(
        **{name: getattr(recipe, name) for name in _OF_RECIPE},
        **{name: getattr(train, name) for name in _OF_TRAIN},
        site=site.name,
        device=site.device,
        ranks=ranks,
        mesh=mesh,
        architecture=architecture,
        source=None if recipe.model.fresh or (recipe.optim.source is not None and recipe.adapter is None) else recipe.model.source,
        roped=recipe.model.rope is not None,
        init=recipe.model.init,
        positions=max(train.sequence, load.positions(recipe.model)),
        microbatch=microbatch,
        accumulation=accumulation,
        steps=steps,
        tokens_per_step=tokens_per_step,
        tokens=steps * tokens_per_step,
        fp8=low,
        watts=watts.of(site, ranks),
        draw=budget.draw(recipe.power, site, ranks),
        kernels=choices,
        fusions=fused,
        parameters=architecture.parameters(),
        flops_per_token=_flops_per_token(recipe, architecture),
        memory=memory,
    )
    if (why := objective.unknown(recipe)) is not None:
        return found.model_copy(update={"expected": Expected(unknown={"step_s": why})})
    return found.model_copy(update={"expected": expect(found, site, constants)}) if forecast else found


def _check(recipe: Recipe, architecture: Architecture | Foreign) -> None:
    """Raise PlanError for sections that exclude each other."""
    train, optim = recipe.train, recipe.optim
    if recipe.tokenizer.train and recipe.tokenizer.train.vocab > architecture.vocab:
        raise PlanError(
            f"tokenizer.train.vocab {recipe.tokenizer.train.vocab} is above model.architecture.vocab {architecture.vocab}; "
            "the model has no embedding for the rest: make them equal"
        )
    if optim.master != "fp32" and train.precision == "fp32":
        raise PlanError(
            f'optim.master "{optim.master}" keeps corrections of bf16 weights, and train.precision is fp32, where the weights are their own master; '
            'set optim.master = "fp32" or train.precision = "bf16"'
        )
    if train.recompute == "lean" and train.compile:
        raise PlanError(
            'train.recompute "lean" and train.compile exclude each other: the compiler decides what it keeps; set recompute = "none" or "selective"'
        )


def _check_memory(memory: cost.Memory, site: Site) -> None:
    """Raise PlanError for a need beyond what the site's devices have as they are sold, an upper bound: a forecast's `fits` is by the 0.99 that torch sees."""
    room, why = hardware.memory_bytes(site)
    if room is not None and memory.total > room:
        said = f" ({why})" if site.memory_bytes is None else ""
        raise PlanError(
            f"the run needs {gib(memory.total)} on {site.name}, which has {gib(room)}{said}: weights {gib(memory.weights)}, "
            f"gradients {gib(memory.gradients)}, optimizer {gib(memory.optimizer)}, activations about {gib(memory.activations)}, "
            f"workspace about {gib(memory.workspace)}; "
            'lower train.microbatch or train.sequence, or set train.recompute = "full"'
        )


def _flops_per_token(recipe: Recipe, architecture: Architecture | Foreign) -> float:
    """What a step computes for a token: forward, backward, and what its objective adds."""
    sequence = recipe.train.sequence
    beside = objective.flops_per_token(recipe.objective, architecture, sequence)
    if recipe.adapter is not None and isinstance(architecture, Architecture):
        return beside + adapting.flops_per_token(architecture, recipe.adapter, sequence)
    return beside + architecture.flops_per_token(sequence)


def gib(count: int) -> str:
    """Bytes for a reader: `12.3 GiB`."""
    return f"{count / 2**30:.2f} GiB"


def _sha256(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield path, tree
        return
    for key, value in items:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))
