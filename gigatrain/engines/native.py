"""The engine in plain torch: one process, one device."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gigatrain.data.loader import Batch, Microbatch
from gigatrain.kernels.adamw import Rates
from gigatrain.kernels.ops import OPERATIONS
from gigatrain.models.decoder import Decoder, decays, kind_of
from gigatrain.optim.adamw import AdamW, Flat
from gigatrain.optim.muon import Muon, Versions
from gigatrain.planning.plan import Plan


class Native:
    """Weights in the plan's precision, gradients summed in fp32, one fused update per group.

    Takes a model with fp32 parameters on the device. In fp32 they are the master weights. In bf16 they are rounded in place, and the fp32 values become
    master weights in the form that the recipe says; where a kernel writes the bf16 weights itself, the parameters are views of its bucket.
    """

    def __init__(self, plan: Plan, model: Decoder) -> None:
        self.model, self.plan = model, plan
        self.parameters = dict(model.named_parameters())
        self.device = next(iter(self.parameters.values())).device
        assert sum(parameter.numel() for parameter in self.parameters.values()) == plan.parameters
        kernels = {choice.op: choice.kernel for choice in plan.kernels}
        self._kernels = {op: OPERATIONS[op].versions[name] for op, name in kernels.items()}
        self._adamw, self._norm = kernels["adamw"], self._kernels["grad_norm"]
        self.groups = [self._group(name, names) for name, names in _groups(plan, model).items() if names]
        self.grads = {name: view for group in self.groups for name, view in group.grads.views.items()}
        self._rounded: list[tuple[Tensor, Tensor]] = []  # bf16 weights, and the fp32 ones that they are rounded from after every update
        for name, weight in ((name, view) for group in self.groups for name, view in _weights(group).items()):
            parameter = self.parameters[name]
            rounds = plan.precision == "bf16" and weight.dtype == torch.float32
            parameter.data = weight.to(torch.bfloat16) if rounds else weight
            if rounds:
                self._rounded.append((parameter, weight))
        if plan.compile:
            # A layer is called with and without a sum before it, documents and gradients, and with a last microbatch of another size.
            torch._dynamo.config.recompile_limit = 32
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run uncompiled without a word
            for layer in model.layers:
                layer.compile(fullgraph=True)
        self.loss = torch.zeros((), device=self.device)
        self._bad = torch.tensor([0, 0, 0, -1], dtype=torch.int64, device=self.device)
        self._updates = torch.zeros((), dtype=torch.int64, device=self.device)
        self._masks = int.from_bytes(hashlib.sha256(f"{plan.seed}/dropout".encode()).digest()[:5], "little")
        self._terms = {"z_loss": plan.loss.z_loss, "label_smoothing": plan.loss.label_smoothing}

    def _group(self, name: str, names: list[str]) -> AdamW | Muon:
        optim, start = self.plan.optim, {name: self.parameters[name].detach() for name in names}
        if name == "muon":
            shapes = {name: tensor.shape for name, tensor in start.items()}
            master, grads = Flat(shapes, self.device), Flat(shapes, self.device)
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
            copy=self.plan.precision == "bf16" and not lean and self._adamw != "foreach",
            version=self._adamw,
            gradients=torch.bfloat16 if lean and self.plan.accumulation == 1 else torch.float32,
            seed=self.plan.seed ^ (name == "decayed") << 62,
        )

    def forward_backward(self, batch: Batch) -> Tensor:
        """Gradients of the mean loss per target over the whole step, however it is cut; returns the sum of cross entropies."""
        self._forget()
        total = torch.zeros((), device=self.device)
        self.loss.zero_()
        share = 1.0 / max(1, batch.targets)
        for index, part in enumerate(batch.microbatches):
            loss, cross_entropy = self._loss(part, **self._terms, seed=self._seed(index))
            loss = loss * share
            loss.backward()
            self._sum_gradients(first=index == 0)
            total += cross_entropy.detach()
            self.loss += loss.detach()
        return total

    def _loss(self, part: Microbatch, **terms: Any) -> tuple[Tensor, Tensor]:
        """Without documents every row counts from 0, and one table of positions serves all rows."""
        positions = None if part.documents is None else part.positions
        return self.model.loss(part.tokens, part.labels, positions, part.documents, **terms)

    def _seed(self, microbatch: int) -> Tensor | None:
        """Of a microbatch's dropout masks: a function of the run's seed, the step and the microbatch, counted on the device."""
        return self._masks + (self._updates * self.plan.accumulation + microbatch) if self.plan.dropout else None

    @torch.no_grad()
    def _sum_gradients(self, *, first: bool) -> None:
        """Move the microbatch's gradients into the sums: fp32, or bf16 where a step has one microbatch and nothing is summed."""
        found = {name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None}
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
    def step(self, rate: float) -> Tensor:
        """Update every group, or, where loss or gradient is not finite, nothing: decided on the device."""
        self._forget()
        norm, scale, skip = self._norm([group.grads.buffer for group in self.groups], self.plan.optim.clip, self.loss)
        for group in self.groups:
            group.step(rate, scale, skip)
        self._round()
        self._count(skip == 0)
        return norm

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
        """Cross entropy in nats and targets, summed in fp64 over held-out microbatches; the weights' dtype is the run's."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.model.eval()
        for part in microbatches:
            _, cross_entropy = self._loss(part)
            total += torch.stack([cross_entropy.double(), (part.labels >= 0).sum().double()])
        self.model.train()
        return total

    def state(self) -> dict[str, dict[str, Tensor]]:
        """fp32 master weights; moments and counts. What is not stored in fp32 is a copy on the host, until the next step."""
        weights: dict[str, Tensor] = {}
        optimizer = {"bad": self._bad, "steps": self._updates}
        for group in self.groups:
            found = group.state() if isinstance(group, AdamW) else (group.master.views, group.state())
            weights |= found[0]
            optimizer |= found[1]
        return {"weights": weights, "optimizer": optimizer}

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
        return self._bad


def _weights(group: AdamW | Muon) -> dict[str, Tensor]:
    return group.weights if isinstance(group, AdamW) else group.master.views


def _groups(plan: Plan, model: Decoder) -> dict[str, list[str]]:
    """Parameters by the update they get: Muon for the layers' matrices if the recipe says so, AdamW with or without decay for the rest."""
    groups: dict[str, list[str]] = {"muon": [], "decayed": [], "plain": []}
    for name, _ in model.named_parameters():
        if plan.optim.name == "muon" and kind_of(name) == "matrix":
            groups["muon"].append(name)
        else:
            groups["decayed" if decays(name, plan.optim.decay_embeddings) else "plain"].append(name)
    return groups
