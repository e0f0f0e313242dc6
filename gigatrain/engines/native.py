"""The engine in plain torch: any mesh, from one process to FSDP2, HSDP, tensor, context, expert and pipeline parallelism in one grid.

`build` cuts a model for one rank; the engine gives it storage, sums its gradients and updates it. How each parallelism works is told in its own file of
parallel/, and all of them meet in two facts: a rank holds a box of every parameter it computes with (`Place`), and gradients are summed, never averaged,
so that any cut of a batch adds up to the gradient of its mean loss per target.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from gigatrain.data.loader import Batch, Microbatch
from gigatrain.engines import Update
from gigatrain.kernels import ops
from gigatrain.kernels.adamw import Rates
from gigatrain.kernels.ops import OPERATIONS
from gigatrain.models import hf
from gigatrain.models.decoder import Decoder, decays, initial, kind_of
from gigatrain.optim.adamw import AdamW, Flat
from gigatrain.optim.muon import Muon, Versions
from gigatrain.parallel import shard
from gigatrain.parallel.mesh import DATA, Mesh
from gigatrain.parallel.places import Piece, Place, Places, State, whole
from gigatrain.parallel.replicate import Copies
from gigatrain.planning.plan import Plan


@dataclass(frozen=True)
class Built:
    """A model cut for one rank, on meta, and which box of each whole parameter it holds."""

    model: Decoder
    places: Places


def build(plan: Plan, mesh: Mesh) -> Built:
    """The plan's model for this rank, without storage: cut by every parallelism, innermost first, then compiled, then sharded."""
    chosen = ops.choose({choice.op: choice.kernel for choice in plan.kernels})
    with torch.device("meta"):
        model = Decoder(plan.architecture, chosen, recompute=plan.recompute, dropout=plan.dropout)
    places = whole(model)
    if plan.compile:
        # A layer is called with and without a sum before it, documents and gradients, and with a last microbatch of another size.
        torch._dynamo.config.recompile_limit = 32
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run uncompiled without a word
        for layer in model.layers:
            layer.compile(fullgraph=True)
    if shard.shards(mesh):
        bf16 = plan.precision == "bf16"
        compute = torch.bfloat16 if bf16 else torch.float32
        # Shards are the fp32 master weights themselves, and gathered in bf16; narrow masters keep bf16 weights beside their corrections.
        stored = torch.bfloat16 if bf16 and plan.optim.master != "fp32" else torch.float32
        if stored == torch.bfloat16:
            model.to(torch.bfloat16)
        shard.apply(model, mesh, places, plan.engine, compute=compute, stored=stored)
    return Built(model, places)


class Native:
    """Weights in the plan's precision, gradients summed in fp32, one fused update per group.

    In fp32 weights are their own masters. In bf16 whole weights are rounded from master weights in the form that the recipe says, or, where a kernel writes
    the bf16 weights itself, views of its bucket; sharded weights are fp32 shards, rounded as they are gathered.
    """

    def __init__(self, plan: Plan, mesh: Mesh, device: torch.device, *, fresh: bool = True) -> None:
        self.plan, self.mesh, self.device = plan, mesh, device
        built = build(plan, mesh)
        self.model, self.places = built.model, built.places
        self.home = torch.device("cpu") if plan.engine.offload else device  # of shards, gradients' sums and optimizer
        self.sharded = {unit.name: unit for unit in shard.units(self.model)}
        self.model.to_empty(device=self.home)
        self.parameters = dict(self.model.named_parameters())
        kernels = {choice.op: choice.kernel for choice in plan.kernels}
        self._kernels = {op: OPERATIONS[op].versions[name] for op, name in kernels.items()}
        self._adamw, self._norm = kernels["adamw"], self._kernels["grad_norm"]
        start = self._start(fresh)
        self.groups = [self._group(name, {name: start[name] for name in names}) for name, names in _groups(plan, self.parameters).items() if names]
        del start
        self.grads = {name: self._box(name, view) for group in self.groups for name, view in group.grads.views.items()}
        self._rounded: list[tuple[Tensor, Tensor]] = []  # bf16 weights, and the fp32 ones that they are rounded from after every update
        self._place_weights()
        self._stretches = self._by_weight()
        self._copies = Copies(mesh, [(group.grads.buffer, group.grads.views) for group in self.groups]) if self._sums_copies else None
        self._sends = False
        if self._copies is not None:
            for name, parameter in self.parameters.items():
                parameter.register_post_accumulate_grad_hook(lambda arrived, name=name: self._arrived(name, arrived))
        self.loss = torch.zeros((), device=device)
        self._nats = torch.zeros((), dtype=torch.float64, device=device)
        self._targets = torch.zeros((), dtype=torch.float64, device=device)
        self._bad = torch.tensor([0, 0, 0, -1], dtype=torch.int64, device=self.home)
        self._updates = torch.zeros((), dtype=torch.int64, device=self.home)
        self._masks = int.from_bytes(hashlib.sha256(f"{plan.seed}/dropout".encode()).digest()[:5], "little")
        self._terms = {"z_loss": plan.loss.z_loss, "label_smoothing": plan.loss.label_smoothing}

    @property
    def _sums_copies(self) -> bool:
        return self.mesh.size("replicate") > 1 and not self.sharded

    def _start(self, fresh: bool) -> dict[str, Tensor]:
        """This rank's box of every parameter in fp32, padded as its shard is; zeros where a checkpoint will fill them."""
        found = {}
        for name, parameter in self.parameters.items():
            shape = self.sharded[name].padded if name in self.sharded else parameter.shape
            found[name] = torch.zeros(shape, device=self.home)
        if fresh:
            for name, tensor in self._values():
                self._box(name, found[name]).copy_(self.places[name].of(tensor))
        return found

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's whole first value, one at a time: drawn from the seed, or read from `model.from`."""
        plan = self.plan
        if plan.source is not None:
            yield from hf.read_weights(plan.architecture, {name: self.places[name].shape for name in self.parameters}, hf.locate(plan.source))
            return
        for name in self.parameters:
            shape = self.places[name].shape
            yield name, initial(name, shape, plan.architecture, plan.init.std, plan.init.scale_residual, plan.seed, self.device)

    def _box(self, name: str, padded: Tensor) -> Tensor:
        """What a padded tensor holds of a parameter."""
        return padded[: self.sharded[name].rows] if name in self.sharded else padded

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
            )
        decay, lean = optim.weight_decay if name == "decayed" else 0.0, optim.master != "fp32"
        return AdamW(
            name,
            start,
            Rates(optim.betas, optim.eps, decay, optim.rounding == "stochastic"),
            lr=optim.lr,
            master=optim.master,
            moments=optim.moments,
            copy=plan.precision == "bf16" and not lean and self._adamw != "foreach" and not self.sharded,
            version=self._adamw,
            gradients=torch.bfloat16 if lean and plan.accumulation == 1 else torch.float32,
            seed=plan.seed ^ (name == "decayed") << 62 ^ self.mesh.rank << 20,  # each rank's rounding is its own
        )

    def _place_weights(self) -> None:
        """Let every parameter be the storage that its update writes, or round it from there."""
        for name, weight in ((name, view) for group in self.groups for name, view in _weights(group).items()):
            if name in self.sharded:
                self.sharded[name].keep(weight)
                continue
            parameter = self.parameters[name]
            rounds = self.plan.precision == "bf16" and weight.dtype == torch.float32
            parameter.data = weight.to(torch.bfloat16) if rounds else weight
            if rounds:
                self._rounded.append((parameter, weight))

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
            kind = 1.0 / self.mesh.size(*place.partial, *place.copied), place.partial
            if alike not in (None, kind):
                yield *alike, buffer[began:at]
                began = at
            alike = kind
        if alike is not None:
            yield *alike, buffer[began:]

    # ---- A step ----

    def forward_backward(self, batch: Batch) -> None:
        """Gradients of the mean loss per target over the whole step, however it is cut."""
        self._forget()
        self._nats.zero_()
        self.loss.zero_()
        self._targets.fill_(batch.targets)
        work = None
        if (group := self.mesh.group(*DATA)) is not None:
            work = distributed.all_reduce(self._targets, group=group, async_op=True)  # behind the first forward
        share: Tensor | None = None
        for index, part in enumerate(batch.microbatches):
            loss, cross_entropy = self._loss(part, **self._terms, seed=self._seed(index))
            if share is None:
                if work is not None:
                    work.wait()
                share = (1.0 / self._targets.clamp(min=1.0)).to(loss.dtype)
            loss = loss * share
            if self._copies is not None and index == len(batch.microbatches) - 1:
                self._backward_and_send(loss, first=index == 0)
            else:
                loss.backward()
                self._sum_gradients(first=index == 0)
            self._nats += cross_entropy.detach()
            self.loss += loss.detach()

    def _loss(self, part: Microbatch, **terms: Any) -> tuple[Tensor, Tensor]:
        """Without documents every row counts from 0, and one table of positions serves all rows."""
        positions = None if part.documents is None else part.positions
        return self.model.loss(part.tokens, part.labels, positions, part.documents, **terms)

    def _seed(self, microbatch: int) -> Tensor | None:
        """Of a microbatch's dropout masks: a function of the run's seed, the step, the microbatch and who reads it, counted on the device."""
        rank, ranks = self.mesh.data
        updates = self._updates.to(self.device, non_blocking=True)
        return self._masks + ((updates * self.plan.accumulation + microbatch) * ranks + rank) if self.plan.dropout else None

    def _backward_and_send(self, loss: Tensor, *, first: bool) -> None:
        """The last backward of a step whose sums are added over copies: each gradient joins its sum as it arrives, and full buckets leave at once."""
        assert self._copies is not None
        if first:
            for group in self.groups:
                group.grads.buffer.zero_()
        self._copies.begin()
        self._sends = True
        loss.backward()
        self._sends = False

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
        if first and len(found) < len(self.parameters):
            for group in self.groups:
                group.grads.buffer.zero_()
        sums = [self.grads[name] for name in found]
        if first:
            torch._foreach_copy_(sums, list(found.values()))
        else:
            torch._foreach_add_(sums, list(found.values()))
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> Update:
        """Update every group, or, where loss or gradient is not finite on any rank, nothing: decided on the device."""
        self._forget()
        norm, scale, skip = self._judge()
        for group in self.groups:
            group.step(rate, scale, skip)
        self._round()
        self._count(skip == 0)
        return Update(self._nats, self._targets, norm)

    def _judge(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(norm, scale, skip)` over all ranks; the sum of the cross entropies travels with the squares."""
        clip = self.plan.optim.clip
        if self.mesh.count == 1:
            return self._norm([group.grads.buffer for group in self.groups], clip, self.loss.to(self.home))
        if self._copies is not None:
            self._copies.finish()
        for group in self.groups:
            for _, partial, stretch in self._runs(group):
                if partial:
                    self.mesh.sum(stretch, *partial)
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for weight, stretches in self._stretches.items():
            squares += self._norm(stretches)[0].to(self.device).double().square() * weight
        # Ranks of `replicate` hold equal gradients, those of `tensor` the same loss.
        mine = float(self.mesh.at["tensor"] == 0)
        sums = torch.stack([squares / self.mesh.size("replicate"), self._nats * mine, self.loss.double() * mine])
        squares, self._nats, loss = self.mesh.sum(sums).unbind()
        norm = squares.sqrt().float()
        skip = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        scale = torch.ones_like(norm) if clip is None else clip / torch.clamp(norm, min=clip)
        return norm, scale.to(self.home), skip.to(self.home)

    def _round(self) -> None:
        """Into the bf16 weights that no update wrote itself."""
        if self._rounded:
            torch._foreach_copy_([weight for weight, _ in self._rounded], [master for _, master in self._rounded])

    def _count(self, finite: Tensor) -> None:
        total, row, longest, began = self._bad.unbind()
        row = torch.where(finite, torch.zeros_like(row), row + 1)
        began = torch.where(row > longest, self._updates - row + 1, began)
        self._bad = torch.stack([total + (~finite).long(), row, torch.maximum(longest, row), began])
        self._updates += 1

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Microbatch]) -> Tensor:
        """Cross entropy in nats and targets, summed in fp64 over held-out microbatches of all ranks; the weights' dtype is the run's."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.model.eval()
        for part in microbatches:
            _, cross_entropy = self._loss(part)
            total += torch.stack([cross_entropy.double(), (part.labels >= 0).sum().double()])
        self.model.train()
        return self.mesh.sum(total * float(self.mesh.at["tensor"] == 0))

    # ---- What a checkpoint keeps ----

    def state(self) -> State:
        """fp32 master weights; moments and counts. What is not stored in fp32 is a copy on the host, until the next step."""
        weights: dict[str, Piece] = {}
        optimizer = {name: self._mark(tensor) for name, tensor in (("bad", self._bad), ("steps", self._updates))}
        for group in self.groups:
            found = group.state() if isinstance(group, AdamW) else (group.master.views, group.state())
            for name, tensor in found[0].items():
                weights[name] = self._piece(name, tensor)
            for name, tensor in found[1].items():
                kind, _, parameter = name.partition(".")
                optimizer[name] = self._mark(tensor) if kind == "updates" else self._piece(parameter, tensor)
        return {"weights": weights, "optimizer": optimizer}

    def _piece(self, name: str, padded: Tensor) -> Piece:
        place = self.places[name]
        writes = self.mesh.index("replicate", *place.partial, *place.copied) == 0
        return Piece(self._box(name, padded).view(place.size), place, writes)

    def _mark(self, tensor: Tensor) -> Piece:
        return Piece.whole(tensor, writes=self.mesh.rank == 0)

    @torch.no_grad()
    def restored(self) -> None:
        """Store what was loaded into `state` in its own form, and round it into the weights that compute."""
        for group in self.groups:
            if isinstance(group, AdamW):
                group.restore()
        self._forget()
        self._round()

    def _forget(self) -> None:
        for group in self.groups:
            if isinstance(group, AdamW):
                group.forget()

    @property
    def bad(self) -> Tensor:
        return self._bad.to(self.device)


def _weights(group: AdamW | Muon) -> dict[str, Tensor]:
    return group.weights if isinstance(group, AdamW) else group.master.views


def _groups(plan: Plan, parameters: Iterable[str]) -> dict[str, list[str]]:
    """Parameters by the update they get: Muon for the layers' matrices if the recipe says so, AdamW with or without decay for the rest."""
    groups: dict[str, list[str]] = {"muon": [], "decayed": [], "plain": []}
    for name in parameters:
        if plan.optim.name == "muon" and kind_of(name) == "matrix":
            groups["muon"].append(name)
        else:
            groups["decayed" if decays(name, plan.optim.decay_embeddings) else "plain"].append(name)
    return groups
