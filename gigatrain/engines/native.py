"""The engine in plain torch: any mesh, from one process to FSDP2, HSDP, tensor, context, expert and pipeline parallelism in one grid.

built.py cuts a model for one rank; the engine gives it storage, sums its gradients and updates it. How each parallelism works is told in its own file of
parallel/, and all of them meet in two facts: a rank holds a box of every parameter it computes with (`Place`), and gradients are summed, never averaged,
so that any cut of a batch adds up to the gradient of its mean loss per target.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from gigatrain import objectives
from gigatrain.data.loader import Batch, Microbatch
from gigatrain.engines import low, source
from gigatrain.engines.built import Built, build
from gigatrain.engines.judge import Judge
from gigatrain.engines.recorded import Recorded
from gigatrain.engines.released import Released, unit_of
from gigatrain.engines.stage import compute
from gigatrain.engines.sums import beforehand, report
from gigatrain.kernels import linear
from gigatrain.kernels.adamw import Rates
from gigatrain.kernels.ops import OPERATIONS
from gigatrain.kernels.router import bias_update
from gigatrain.models import fused
from gigatrain.models.automodel import Auto
from gigatrain.models.decoder import Decoder
from gigatrain.objectives import figures
from gigatrain.observe.metrics import Update
from gigatrain.observe.trace import OFF
from gigatrain.optim.adamw import AdamW, Flat, views
from gigatrain.optim.muon import Muon, Versions
from gigatrain.parallel import context, shard, tensor
from gigatrain.parallel.mesh import AXES, DATA, WEIGHTS, Mesh
from gigatrain.parallel.places import Piece, Replica, State
from gigatrain.parallel.replicate import Copies
from gigatrain.parallel.tied import Tied
from gigatrain.planning.plan import Plan

if TYPE_CHECKING:
    from gigatrain.parallel.pipeline import Pipeline

EMBEDDING, HEAD = Tied.EMBEDDING, Tied.HEAD


class Native:
    """Weights in the plan's precision, gradients summed in fp32, one fused update per group.

    In fp32 weights are their own masters. In bf16 whole weights are rounded from master weights in the form that the recipe says, or, where a kernel writes
    the bf16 weights itself, views of its bucket; sharded weights are fp32 shards, rounded as they are gathered.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        device: torch.device,
        *,
        fresh: bool = True,
        cuts: Sequence[range] | None = None,
        around: contextlib.AbstractContextManager[Any] | None = None,
    ) -> None:
        """`cuts` are `build`'s; `around` is entered for all that allocates: planning/dryrun.py's fake tensors."""
        self.around = around or contextlib.nullcontext()
        self.plan, self.mesh, self.device, self.trace = plan, mesh, device, OFF
        self.early = plan.fp8 is not None or plan.fuses("release")
        built = build(plan, mesh, cuts)
        self.stages, self.places = built.stages, built.places
        with self.around:
            self._allocate(built, fresh)

    def _allocate(self, built: Built, fresh: bool) -> None:
        """Storage of weights, gradients' sums and optimizer."""
        plan, mesh, device = self.plan, self.mesh, self.device
        self.home = torch.device("cpu") if plan.engine.offload else device  # of shards, gradients' sums and optimizer
        self.sharded = {unit.name: unit for model in self.stages.values() for unit in shard.units(model)}
        self.parameters: dict[str, torch.nn.Parameter] = {}
        for model in self.stages.values():
            model.to_empty(device=self.home)
            model.place(device)
            self.parameters |= model.named_parameters()
        self.frozen = {name: parameter for name, parameter in self.parameters.items() if not parameter.requires_grad}
        self.parameters = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        # What is no parameter and yet part of the model, in fp32 and whole on every rank of a stage.
        decoders = [model for model in self.stages.values() if isinstance(model, Decoder)]
        self.corrections = {name: tensor for model in decoders for name, tensor in model.corrections().items()}
        self.visits = {name: tensor for model in decoders for name, tensor in model.visits().items()}
        self._delayed = low.delayed(self.stages.values(), device)
        # A tied head on another stage than its embedding: a copy on another rank, or, where both stages are this rank's, another name for the same.
        self.tied = Tied(mesh, plan.mesh.schedule) if plan.architecture.tied and built.count > 1 else None
        self.alias = self.tied is not None and EMBEDDING in self.parameters and HEAD in self.parameters
        kernels = {choice.op: choice.kernel for choice in plan.kernels}
        self._kernels = {op: OPERATIONS[op].version(name) for op, name in kernels.items()}
        self._adamw, self._norm = kernels["adamw"], self._kernels["grad_norm"]
        start = self._start(fresh)
        self.groups = [self._group(name, {name: start[name] for name in names}) for name, names in self._grouped(start)]
        del start
        self.grads = {name: self._box(name, view) for group in self.groups for name, view in group.grads.views.items()}
        self._rounded: list[tuple[Tensor, Tensor]] = []  # bf16 weights, and the fp32 ones that they are rounded from after every update
        self._place_weights()
        self._release = Released(self.groups, self._rounded, self._norm, self.home) if plan.fuses("release") else None
        if self._release is not None:
            self.grads = {}  # there are none between two steps, and only `_release` knows them within one
        self._sums = self._sum_in_products() if plan.fuses("main_grads") else {}  # by the names of the weights
        if isinstance(only := next(iter(self.stages.values())), Auto) and fresh:
            only.verify(documents=plan.documents, device=device)
        self._stretches = self._by_weight()
        self._copies = Copies(mesh, [(group.grads.buffer, group.grads.views) for group in self.groups]) if self._sums_copies else None
        self._sends = False
        self.pipeline = self._pipeline(built.count) if built.count > 1 else None
        if self._release is not None or (self._copies is not None and self.pipeline is None):
            arrived = self._arrived if self._release is None else self._release.arrived
            for name, parameter in self.parameters.items():
                if name not in self._sums:  # autograd calls it for a weight without a gradient too
                    parameter.register_post_accumulate_grad_hook(functools.partial(arrived, name))
        self.loss = torch.zeros((), device=device)
        self._nats = torch.zeros((), dtype=torch.float64, device=device)
        self._targets = torch.zeros((), dtype=torch.float64, device=device)
        # Sums that an objective reports behind its loss, and what it was told of the whole step.
        self._beside = torch.zeros(figures.count(plan.objective), dtype=torch.float64, device=device)
        self._known: Tensor | None = None
        numerics = plan.numerics
        self.judge = Judge(numerics.window, numerics.sigma, self.home, repeats=not self._delayed)
        self._bad, self._updates = self.judge.bad, self.judge.updates
        self._masks = int.from_bytes(hashlib.sha256(f"{plan.seed}/dropout".encode()).digest()[:5], "little")
        self._terms = source.terms(plan)
        self._recorded = Recorded(self._unmarked, self._targets, device) if plan.fuses("graph") else None
        self._batch: Batch | None = None  # of a step that is made as a whole, once its rate is known
        # Sums over replicas, each a world of its own; a batch's targets are then those of all of them (engines/replicated.py).
        self.between: Callable[[Sequence[Tensor]], None] | None = None

    @property
    def model(self) -> Any:
        """The only stage."""
        (model,) = self.stages.values()
        return model

    def _pipeline(self, count: int) -> "Pipeline":
        from gigatrain.parallel.pipeline import Pipeline  # torch's schedules bring Dynamo: a second of every start that has no use for them

        sums = {name: total for name, total in self.grads.items() if name not in self._sums}
        sums |= {HEAD: self.grads[EMBEDDING]} if self.alias else {}
        return Pipeline(
            self.stages,
            count,
            self.mesh,
            schedule=self.plan.mesh.schedule,
            compute=self._compute,
            hidden=self.plan.architecture.hidden,
            dtype=torch.bfloat16 if self.plan.compute == "bf16" else torch.float32,
            sums=sums,
            cut=self.mesh.size("tensor"),
        )

    @property
    def _sums_copies(self) -> bool:
        return self.mesh.size("replicate") > 1 and not self.sharded

    def _start(self, fresh: bool) -> dict[str, Tensor]:
        """This rank's box of every parameter in fp32, padded as its shard is; zeros where a checkpoint will fill them."""
        found = {}
        for name, parameter in self.parameters.items():
            if not (self.alias and name == HEAD):
                shape = self.sharded[name].padded if name in self.sharded else parameter.shape
                found[name] = torch.zeros(shape, device=self.home)
        frozen = self._frozen_storage()
        # No checkpoint has what is frozen. Of fake tensors (planning/dryrun.py) nobody reads the values.
        if fresh or (frozen and isinstance(self.around, contextlib.nullcontext)):
            for name, tensor in self._values([*found, *self.corrections], trained=fresh):
                if name in self.corrections:
                    self.corrections[name].copy_(tensor)
                elif name in frozen:
                    frozen[name].copy_(tensor)
                elif fresh:
                    self._box(name, found[name]).copy_(tensor)
        return found

    def _frozen_storage(self) -> dict[str, Tensor]:
        """This rank's box of every parameter that is not trained, in the form that computes. It is in no group and in no checkpoint."""
        found = {}
        for name, parameter in self.frozen.items():
            if name in self.sharded:
                unit = self.sharded[name]
                found[name] = unit.keep(torch.zeros(unit.padded, dtype=parameter.dtype, device=self.home))
            else:
                found[name] = parameter.data
        return found

    def _values(self, names: Iterable[str], *, trained: bool) -> Iterator[tuple[str, Tensor]]:
        """This rank's box of every parameter's first value, one at a time: drawn from the seed, or read from `model.from`. Of an adapter's model also what is
        frozen, without `trained` that alone."""
        if self.plan.adapter is not None:
            boxes = {name: (place.start, place.size) for name, place in self.places.items()}
            yield from source.values(self.plan, self.model, {}, self.device, boxes=boxes, trained=trained)
            return
        known = {self._canonical(name): name for name in names}
        shapes = {
            name: self.corrections[mine].shape if mine in self.corrections else self.places[mine].shape for name, mine in known.items()
        }
        boxes = {name: (self.places[mine].start, self.places[mine].size) for name, mine in known.items() if mine not in self.corrections}
        model = next(iter(self.stages.values()))
        for name, value in source.values(self.plan, model, shapes, self.device, boxes=boxes, part=self.pipelined):
            yield known[name], value

    @property
    def pipelined(self) -> bool:
        return self.plan.mesh.pipeline > 1

    def _canonical(self, name: str) -> str:
        """A parameter's name in the whole model."""
        return EMBEDDING if name == HEAD and self.tied is not None else name

    def _box(self, name: str, padded: Tensor) -> Tensor:
        """What a padded tensor holds of a parameter."""
        return padded[: self.sharded[name].rows] if name in self.sharded else padded

    def _grouped(self, names: Iterable[str]) -> list[tuple[str, list[str]]]:
        """Parameters by the update they get; groups of AdamW are there even if they are empty, so that all ranks have the same. With release, those of
        each unit apart."""
        kinds, releases = (["muon"] if self.plan.optim.name == "muon" else []) + ["decayed", "plain"], self.plan.fuses("release")
        groups: dict[tuple[str, str], list[str]] = {} if releases else {(kind, ""): [] for kind in kinds}
        model = next(iter(self.stages.values()))
        for name in names:
            groups.setdefault((source.group_of(self.plan, model, name), unit_of(name) if releases else ""), []).append(name)
        return [(kind, members) for (kind, _), members in groups.items()]

    def _group(self, name: str, start: Mapping[str, Tensor]) -> AdamW | Muon:
        optim, plan = self.plan.optim, self.plan
        if name == "muon":
            shapes = {name: tensor.shape for name, tensor in start.items()}
            master, grads = Flat(shapes, self.home), Flat(shapes, self.home)
            for parameter, tensor in start.items():
                master.views[parameter].copy_(tensor)
            return Muon(
                master,
                grads,
                lr=optim.muon_lr,
                momentum=optim.muon_momentum,
                weight_decay=optim.weight_decay,
                scaling=optim.muon_scaling,
                versions=Versions(*(self._kernels[op] for op in ("muon_momentum", "newton_schulz", "muon_update"))),
                places=self.places,
                mesh=self.mesh,
            )
        decay, lean = optim.weight_decay if name == "decayed" else 0.0, optim.master != "fp32"
        return AdamW(
            name,
            start,
            Rates(optim.betas, optim.eps, decay, optim.rounding == "stochastic"),
            self.home,
            lr=optim.lr,
            master=optim.master,
            moments=optim.moments,
            copy=plan.compute == "bf16" and not lean and self._adamw != "foreach" and not self.sharded,
            version=self._adamw,
            gradients=torch.bfloat16 if lean and plan.turns == 1 else torch.float32,
            # Stochastic rounding is alike where ranks hold the same box, or copies would drift apart.
            seed=plan.seed ^ (name == "decayed") << 62 ^ self.mesh.index("pipeline", *WEIGHTS) << 20 ^ self._number(start) << 40,
        )

    def _number(self, names: Iterable[str]) -> int:
        """Of the unit that parameters are released with: those of several units must not be rounded by the same random numbers."""
        first = next(iter(names), None)
        return list(dict.fromkeys(map(unit_of, self.parameters))).index(unit_of(first)) if first and self.plan.fuses("release") else 0

    def _place_weights(self) -> None:
        """Let every parameter be the storage that its update writes, or round it from there; those of one product end to end, as one matrix."""
        placed = {name: view for group in self.groups for name, view in _weights(group).items()}
        if self.alias:
            placed[HEAD] = placed[EMBEDDING]
        for model, names in self._joined():
            weights = [f"{name}.weight" for name in names]
            whole = self._placed(fused.spanning([placed[name] for name in weights]))
            for name, part in zip(weights, whole.split([placed.pop(name).shape[0] for name in weights]), strict=True):
                self.parameters[name].data = part
            fused.join(model, names, whole)
        for name, weight in placed.items():
            if name in self.sharded:
                self.sharded[name].keep(weight)
            else:
                self.parameters[name].data = self._placed(weight)

    def _placed(self, weight: Tensor) -> Tensor:
        """What computes: the weight that an update writes, or its rounding."""
        if self.plan.compute == "fp32" or weight.dtype != torch.float32:
            return weight
        self._rounded.append((rounded := weight.to(torch.bfloat16), weight))
        return rounded

    def _joined(self) -> Iterator[tuple[Any, tuple[str, ...]]]:
        """Every stage's sets of layers that are one product."""
        for model in self.stages.values() if self.plan.fuses("fuse") else ():
            for names in fused.sets(model):
                yield model, names

    def _sum_in_products(self) -> dict[str, linear.Sum]:
        """Let the product of every layer's matrix add the gradient to its sum; what is not computed by one goes the usual way."""
        found: dict[str, linear.Sum] = {}
        sets = {name: names for _, names in self._joined() for name in names}
        for model in self.stages.values():
            for name, layer in model.named_modules():
                whole = isinstance(layer, torch.nn.Linear) and hasattr(layer, "product") and not isinstance(layer, tensor.Shared)
                if not whole or f"{name}.weight" in found:
                    continue
                names = sets.get(name, (name,))
                weights = tuple(f"{one}.weight" for one in names)
                into = linear.Sum(functools.partial(self._room, weights), done=functools.partial(self._summed, weights))
                product = functools.partial(linear.summed, into=into)
                if isinstance(layer, linear.Linear) and layer.joined is not None:
                    layer.joined = replace(layer.joined, product=product)
                else:
                    layer.product = product  # type: ignore[arg-type]
                found |= dict.fromkeys(weights, into)
        return found

    def _room(self, names: Sequence[str]) -> Tensor:
        """The sum of weights that lie end to end."""
        room = self.grads.__getitem__ if self._release is None else self._release.room
        return fused.spanning([room(name) for name in names])

    def _summed(self, names: Sequence[str]) -> None:
        """A product has added the gradients of these weights to their sums."""
        for name in names:
            if self._release is not None:
                self._release.ready(name)
            elif self._sends:
                assert self._copies is not None
                self._copies.ready(name)

    def _by_weight(self) -> dict[float, list[Tensor]]:
        """Stretches of the gradient sums by what their squares count in the norm: a box that several ranks hold counts once in all."""
        found: dict[float, list[Tensor]] = {}
        for group in self.groups:
            for weight, _, stretch in self._runs(group):
                found.setdefault(weight, []).append(stretch)
        return found

    def _runs(self, group: AdamW | Muon) -> Iterator[tuple[float, tuple[str, ...], Tensor]]:
        """`(weight in the norm, axes of partial sums, stretch)` of a group's gradients: neighbours that are alike together."""
        buffer, began, alike = group.grads.buffer, 0, None
        for name, view in group.grads.views.items():
            place, at = self.places[name], view.storage_offset() - buffer.storage_offset()
            counts = self.tied is None or self.tied.counts(name)
            kind = counts / self.mesh.size(*place.partial, *place.copied), place.partial
            if alike not in (None, kind):
                yield *alike, buffer[began:at]
                began = at
            alike = kind
        if alike is not None:
            yield *alike, buffer[began:]

    # ---- A step ----

    def forward_backward(self, batch: Batch) -> None:
        """Gradients of the mean loss per target over the whole step, however it is cut. A step that is recorded, or releases its gradients, is made as a
        whole in `step`, which knows its rate."""
        self._forget()
        self.trace.mark("forward")
        if self._recorded is not None or self._release is not None:
            self._batch = batch
            return
        self._targets.fill_(batch.targets)
        self._backward(batch.microbatches)

    def _backward(self, microbatches: Sequence[Microbatch], rate: float | Tensor = 0.0) -> None:
        """Gradients of a step whose count of targets is there; with release, which needs the rate, also the updates."""
        self._nats.zero_()
        self._beside.zero_()
        self.loss.zero_()
        for one in self._sums.values():
            one.begun = False
        work = None
        if self.between is None and (group := self.mesh.group(*DATA)) is not None:
            work = distributed.all_reduce(self._targets, group=group, async_op=True)  # behind the first forward
        parts = [context.cut(part, self.mesh, self.plan.mesh.exchange) for part in microbatches]
        if self.pipeline is not None:
            share = self._share(work)
            loss, self._nats = self.pipeline.run(parts, share, [self._seed(index) for index in range(len(parts))])
            self.loss += loss
            self._finish_sums()
            if self._copies is not None:
                self._copies.begin()
            return
        share = None
        self._look_ahead(parts)
        for index, part in enumerate(parts):
            self.trace.mark("forward")
            loss, reported = self._compute(self.model, part, None, self._seed(index))
            reported = reported.detach()
            share = self._share(work) if share is None else share
            loss = loss * share
            self.trace.mark("backward")
            if self._release is not None:
                assert len(parts) == 1, "refused by the plan"
                self._release.begin(rate, loss.detach(), *self._beforehand(reported if reported.ndim == 0 else reported[0]))
                loss.backward()
            elif self._copies is not None and index == len(parts) - 1:
                self._backward_and_send(loss, first=index == 0)
            else:
                loss.backward()
                self._sum_gradients(first=index == 0)
            report(reported, self._nats, self._beside)
            self.loss += loss.detach()

    def _look_ahead(self, parts: Iterable[Microbatch]) -> None:
        """What an objective must know of the whole step before its first loss, over all ranks and on the device."""
        self._known = beforehand(
            self.plan.objective, parts, lambda part: objectives.ahead(self.plan.objective, self.model, part), self.mesh
        )

    def _share(self, work: Any) -> Tensor:
        """What a loss counts in the step's: one over the targets of all ranks (0-d, fp32)."""
        if work is not None:
            work.wait()
        return (1.0 / self._targets.clamp(min=1.0)).float()

    def _compute(self, module: Any, part: Microbatch, carried: Tensor | None, seed: Tensor | None) -> Any:
        """A stage on a microbatch. Whole samples without documents count from 0 in every row, and one table of positions serves all rows."""
        terms = self._terms if module.training else {}
        positions = part.documents is not None or self.mesh.size("context") > 1
        if self._known is not None:
            terms = {**terms, "known": self._known}
        return compute(module, part, carried, seed, objective=self.plan.objective, positions=positions, **terms)

    def _seed(self, microbatch: int) -> Tensor | None:
        """Of a microbatch's dropout masks and noise: a function of the run's seed, the step, the microbatch and who reads it, counted on the device."""
        if not self.plan.drops:
            return None
        rank, ranks = self.mesh.data
        updates = self._updates.to(self.device, non_blocking=True)
        return self._masks + ((updates * self.plan.turns + microbatch) * ranks + rank)

    def _backward_and_send(self, loss: Tensor, *, first: bool) -> None:
        """The last backward of a step whose sums are added over copies: each gradient joins its sum as it arrives, and full buckets leave at once."""
        assert self._copies is not None
        if first:
            torch._foreach_zero_([total for name, total in self.grads.items() if name not in self._sums])
        self._copies.begin()
        self._sends = True
        loss.backward()
        self._sends = False
        self._finish_sums()

    @torch.no_grad()
    def _finish_sums(self) -> None:
        """Sums that no product of this step has written are zero."""
        for name, one in self._sums.items():
            if not one.begun:
                self.grads[name].zero_()

    @torch.no_grad()
    def _arrived(self, name: str, parameter: Tensor) -> None:
        if self._sends:
            assert self._copies is not None
            self.grads[name].add_(parameter.grad)  # type: ignore[arg-type]
            parameter.grad = None
            self._copies.ready(name)

    @torch.no_grad()
    def _sum_gradients(self, *, first: bool) -> None:
        """Move the microbatch's gradients into the sums: fp32, or bf16 where a step has one microbatch and nothing is summed."""
        found = {name: shard.local(parameter.grad) for name, parameter in self.parameters.items() if parameter.grad is not None}
        if first:
            for name, total in self.grads.items():
                if name not in found and not (name in self._sums and self._sums[name].begun):
                    total.zero_()
        sums = [self.grads[name] for name in found]
        if first:
            torch._foreach_copy_(sums, list(found.values()))
        else:
            torch._foreach_add_(sums, list(found.values()))
        for parameter in self.parameters.values():
            parameter.grad = None

    def step(self, rate: float) -> Update:
        """Update every group, or, where loss or gradient is not finite on any rank, nothing: decided on the device. With release see engines/released.py."""
        self._forget()
        if self._recorded is None and self._release is None:
            return self._update(rate)
        batch, self._batch = self._batch, None
        assert batch is not None, "a step follows a forward_backward"
        if self._recorded is not None:
            return self._recorded(batch, rate)
        self._targets.fill_(batch.targets)
        return self._whole(batch.microbatches, rate)

    @property
    def _sums_beside(self) -> Tensor | None:
        return self._beside if len(self._beside) else None

    def _whole(self, microbatches: Sequence[Microbatch], rate: float | Tensor) -> Update:
        """A step from its microbatches to its update: what is recorded."""
        self._backward(microbatches, rate)
        if self._release is None:
            return self._update(rate)
        norm, skip = self._release.finish(lambda norm, skip: self.judge.verdict(self._mean(self._nats), norm, skip, self._nats))
        self._balance(skip)
        self._rescale()
        self.judge.count()
        self.trace.mark("rest")
        return Update(self._nats, self._targets, norm, self.judge.fate, self._sums_beside)

    def _unmarked(self, microbatches: Sequence[Microbatch], rate: float | Tensor) -> Update:
        """As `_whole`, as one phase: a mark within a recording would be one of the graph's events."""
        trace, self.trace = self.trace, OFF
        try:
            return self._whole(microbatches, rate)
        finally:
            self.trace = trace

    @torch.no_grad()
    def _update(self, rate: float | Tensor) -> Update:
        self.trace.mark("reduce")
        norm, scale, skip = self._judge()
        self.trace.mark("optimizer")
        for group in self.groups:
            group.step(rate, scale, skip)
        self._balance(skip)
        self._round()
        self._rescale()
        self.judge.count()
        self.trace.mark("rest")
        return Update(self._nats, self._targets, norm, self.judge.fate, self._sums_beside)

    def _mean(self, nats: Tensor) -> Tensor:
        """Cross entropy per target, of all ranks where `nats` is."""
        return nats / self._targets.clamp(min=1.0)

    def _beforehand(self, nats: Tensor) -> tuple[Tensor, Tensor]:
        """`(closed, limit)` of a step that updates within its backward: whether its loss alone forbids any update, and what its norm may not exceed."""
        loss, norm = self.judge.limits()
        closed = self._mean(nats).to(self.home) > loss
        return (closed | self.judge.closed()) if self.judge.holds else closed, norm

    def _judge(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(norm, scale, skip)` over all ranks; the sum of the cross entropies travels with the squares."""
        clip = self.plan.optim.clip
        if self.mesh.count == 1:
            self._sum_replicas()
            norm, scale, skip = self._norm([group.grads.buffer for group in self.groups], clip, self.loss.to(self.home))
            return norm, scale, self.judge.verdict(self._mean(self._nats), norm, skip, self._nats)
        if self._copies is not None:
            self._copies.finish()
        for group in self.groups:
            for _, partial, stretch in self._runs(group):
                if partial:
                    self.mesh.sum(stretch, *partial)
        if self.tied is not None and (EMBEDDING in self.grads or HEAD in self.grads):
            self.tied.sum(self.grads | ({HEAD: self.grads[EMBEDDING]} if self.alias else {}))
        self._sum_replicas()
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for weight, stretches in self._stretches.items():
            squares += self._norm(stretches)[0].to(self.device).double().square() * weight
        # Ranks of `replicate` hold equal gradients, those of `tensor` the same loss.
        mine = float(self.mesh.at["tensor"] == 0)
        sums = torch.stack([squares / self.mesh.size("replicate"), self._nats * mine, self.loss.double() * mine])
        own = self._nats.clone()
        squares, nats, loss, *beside = self.mesh.sum(torch.cat([sums, self._beside * mine]) if len(self._beside) else sums).unbind()
        self._nats.copy_(nats)  # in place: a recorded step reads and writes one tensor
        if beside:
            self._beside.copy_(torch.stack(beside))
        norm = squares.sqrt().float()
        skip = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        scale = torch.ones_like(norm) if clip is None else clip / torch.clamp(norm, min=clip)
        return norm, scale.to(self.home), self.judge.verdict(self._mean(self._nats), norm, skip, own)

    def _sum_replicas(self) -> None:
        """Gradients and counts of a step over all replicas. What this raises leaves the weights as they were."""
        if self.between is not None:
            self.between(
                [*(group.grads.buffer for group in self.groups if group.grads.buffer.numel()), self._nats, self.loss, *self.visits.values()]
            )

    def drop(self) -> None:
        """Forget a step whose sum over replicas failed; it will be made again."""
        for visits in self.visits.values():
            visits.zero_()
        for parameter in self.parameters.values():
            parameter.grad = None

    def _balance(self, skip: Tensor) -> None:
        """Move the routers' corrections by what all ranks' tokens visited in this step, and begin to count anew."""
        if not self.visits:
            return
        rate, names = self.plan.loss.router_bias_rate, sorted(self.corrections.keys() & self.visits.keys())
        if rate and names:
            counts_le = self.mesh.sum(torch.stack([self.visits[name] for name in names]), *DATA, "context", "tensor")
            kept = 1.0 - skip.to(self.device, non_blocking=True)
            for name, counts_e in zip(names, counts_le, strict=True):
                self.corrections[name].copy_(torch.lerp(self.corrections[name], bias_update(counts_e, self.corrections[name], rate), kept))
        torch._foreach_zero_(list(self.visits.values()))

    def _rescale(self) -> None:
        """Delayed scales of narrow products follow what this step saw."""
        for scales in self._delayed:
            scales.advance(low.largest(self.mesh))

    def _round(self) -> None:
        """Into the bf16 weights that no update wrote itself."""
        if self._rounded:
            torch._foreach_copy_([weight for weight, _ in self._rounded], [master for _, master in self._rounded])

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Microbatch]) -> Tensor:
        """What the objective reports of held-out microbatches of all ranks, the targets behind its first number; the weights' dtype is the run's."""
        objective = self.plan.objective
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._beside.zero_()

        def parts() -> Iterator[Microbatch]:
            for part in microbatches:
                yield context.cut(part, self.mesh, self.plan.mesh.exchange)

        def counted() -> Iterator[Microbatch]:
            for part in parts():
                if self.mesh.at["pipeline"] == 0:
                    total[1] += objectives.targets(objective, part)
                yield part

        for model in self.stages.values():
            model.eval()
        if self.pipeline is not None:
            total[0] += self.pipeline.evaluate(counted())
        else:
            self._look_ahead(parts())
            for part in counted():
                report(self._compute(self.model, part, None, None)[1], total[0], self._beside)
        for model in self.stages.values():
            model.train()
        return self.mesh.sum(torch.cat([total, self._beside]) * float(self.mesh.at["tensor"] == 0))

    @torch.no_grad()
    def logprobs(self, part: Microbatch) -> Tensor:
        """Of a microbatch's labels [b, t], by the weights as they are, fp32."""
        model = self.model.eval()
        found = model.logprobs(part.tokens, part.labels, None if part.documents is None else part.positions, part.documents)
        model.train()
        return found

    # ---- What a checkpoint keeps ----

    def state(self) -> State:
        """fp32 master weights; moments and counts. What is not stored in fp32 is a copy on the host, until the next step."""
        weights: dict[str, Piece] = {}
        optimizer = self.judge.counts(writes=self.mesh.rank == 0)
        for scales in self._delayed:
            optimizer["amax"] = self._mark(scales.past)
        for group in self.groups:
            found = group.state() if isinstance(group, AdamW) else (group.master.views, group.state())
            for name, held in found[0].items():
                weights[self._canonical(name)] = self._piece(name, held)
            for name, held in found[1].items():
                kind, _, parameter = name.partition(".")
                if kind == "updates":
                    optimizer[name] = self._mark(held)
                else:
                    optimizer[f"{kind}.{self._canonical(parameter)}"] = self._piece(parameter, held)
        writes = self.mesh.index(*(axis for axis in AXES if axis != "pipeline")) == 0
        if self.plan.adapter is None:  # else they are the base's
            weights |= {name: Piece.whole(tensor, writes=writes) for name, tensor in self.corrections.items()}
        if self._release is not None:
            optimizer |= {name: self._mark(count) for name, count in self._release.counts.items()}
        return {"weights": weights, "optimizer": optimizer} | self.judge.window(writes=self.mesh.rank == 0)

    def _piece(self, name: str, padded: Tensor) -> Piece:
        place = self.places[name]
        writes = self.mesh.index("replicate", *place.partial, *place.copied) == 0 and (self.tied is None or self.tied.counts(name))
        return Piece(self._box(name, padded).view(place.size), place, writes)

    def _mark(self, tensor: Tensor) -> Piece:
        return Piece.whole(tensor, writes=self.mesh.rank == 0)

    @torch.no_grad()
    def restored(self) -> None:
        """Store what was loaded into `state` in its own form, and round it into the weights that compute."""
        for group in self.groups:
            if isinstance(group, AdamW):
                group.restore()
        for scales in self._delayed:
            scales.restored()
        self.judge.restored()
        self._forget()
        self._round()

    def _forget(self) -> None:
        for group in self.groups:
            if isinstance(group, AdamW):
                group.forget()

    @property
    def bad(self) -> Tensor:
        return self.judge.bad.to(self.device)

    def replicas(self) -> Iterator[Replica]:
        """What several ranks hold: every tensor that an update keeps, in the form in which it is kept, counts, and the routers' corrections."""
        for group in self.groups:
            for kind, buffer in _kept(group).items():
                for name, held in views(buffer, group.grads.shapes).items():
                    place = self.places[name]
                    yield Replica(f"{kind} of {self._canonical(name)}", self._box(name, held), ("replicate", *place.partial, *place.copied))
        for name, parameter in self.frozen.items():
            place = self.places[name]
            yield Replica(f"frozen {name}", shard.local(parameter.detach()), ("replicate", *place.partial, *place.copied))
        for name, correction in self.corrections.items():
            yield Replica(name, correction, tuple(axis for axis in AXES if axis != "pipeline"))
        yield from self.judge.replicas()


def _kept(group: AdamW | Muon) -> dict[str, Tensor]:
    """What a group keeps of each of its elements, by kind; scales of blocks of moments, which span parameters, are left out."""
    if isinstance(group, Muon):
        return {"weight": group.master.buffer, "momentum": group.momentum_buffer.buffer}
    named = {kind: getattr(group.bucket, kind) for kind in ("weight", "correction", "copy", "exp_avg", "exp_avg_sq")}
    return {kind: tensor for kind, tensor in named.items() if tensor is not None}


def _weights(group: AdamW | Muon) -> dict[str, Tensor]:
    return group.weights if isinstance(group, AdamW) else group.master.views
