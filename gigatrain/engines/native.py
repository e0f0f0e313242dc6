"""The engine in plain torch: one process, one device."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gigatrain.data.loader import Batch, Microbatch
from gigatrain.models.decoder import Decoder, decays, kind_of
from gigatrain.optim.adamw import AdamW, Flat
from gigatrain.optim.muon import Muon
from gigatrain.planning.plan import Plan


class Native:
    """Weights in the plan's precision, master weights and gradient sums in fp32, one fused update per group.

    Takes a model with fp32 parameters on the device. In bf16 they are rounded in place and the fp32 values become the master weights;
    in fp32 the parameters are the master weights.
    """

    def __init__(self, plan: Plan, model: Decoder) -> None:
        self.model, self.plan = model, plan
        self.parameters = dict(model.named_parameters())
        self.device = next(iter(self.parameters.values())).device
        assert sum(parameter.numel() for parameter in self.parameters.values()) == plan.parameters
        self.groups = [self._group(name, names) for name, names in _groups(plan, model).items() if names]
        self.master = {name: view for group in self.groups for name, view in group.master.views.items()}
        self.grads = {name: view for group in self.groups for name, view in group.grads.views.items()}
        for name, parameter in self.parameters.items():
            parameter.data = self.master[name].to(torch.bfloat16) if plan.precision == "bf16" else self.master[name]
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
        shapes = {name: self.parameters[name].shape for name in names}
        master, grads = Flat(shapes, self.device), Flat(shapes, self.device)
        with torch.no_grad():
            for parameter in names:
                master.views[parameter].copy_(self.parameters[parameter])
        optim = self.plan.optim
        if name == "muon":
            return Muon(master, grads, lr=optim.muon_lr, momentum=optim.muon_momentum, weight_decay=optim.weight_decay)
        decay = optim.weight_decay if name == "decayed" else 0.0
        return AdamW(name, master, grads, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=decay)

    def forward_backward(self, batch: Batch) -> Tensor:
        """Gradients of the mean loss per target over the whole step, however it is cut; returns the sum of cross entropies."""
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
        """Move the microbatch's gradients into the fp32 sums."""
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
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(group.grads.buffer) for group in self.groups]))
        finite = torch.isfinite(norm) & torch.isfinite(self.loss)
        skip = (~finite).float()
        clip = self.plan.optim.clip
        scale = torch.ones_like(norm) if clip is None else clip / torch.clamp(norm, min=clip)
        for group in self.groups:
            group.step(rate, scale, skip)
        if self.plan.precision == "bf16":
            torch._foreach_copy_(list(self.parameters.values()), [self.master[name] for name in self.parameters])
        self._count(finite)
        return norm

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
        """fp32 master weights; moments and counts."""
        optimizer = {key: tensor for group in self.groups for key, tensor in group.state().items()}
        return {"weights": self.master, "optimizer": optimizer | {"bad": self._bad, "steps": self._updates}}

    @torch.no_grad()
    def restored(self) -> None:
        """Round the loaded master weights into the weights that compute."""
        if self.plan.precision == "bf16":
            torch._foreach_copy_(list(self.parameters.values()), [self.master[name] for name in self.parameters])

    @property
    def bad(self) -> Tensor:
        return self._bad


def _groups(plan: Plan, model: Decoder) -> dict[str, list[str]]:
    """Parameters by the update they get: Muon for the layers' matrices if the recipe says so, AdamW with or without decay for the rest."""
    groups: dict[str, list[str]] = {"muon": [], "decayed": [], "plain": []}
    for name, _ in model.named_parameters():
        if plan.optim.name == "muon" and kind_of(name) == "matrix":
            groups["muon"].append(name)
        else:
            groups["decayed" if decays(name, plan.optim.decay_embeddings) else "plain"].append(name)
    return groups
