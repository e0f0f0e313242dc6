"""Muon: momentum, orthogonalised by a Newton-Schulz iteration, for the layers' matrices (Jordan et al., 2024, kellerjordan.github.io/posts/muon)."""

import torch
from torch import Tensor

from gigatrain.optim.adamw import Flat

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the post's quintic: singular values from (0, 1] to about [0.7, 1.2] in five steps


def newton_schulz(update_nrc: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, of each of n matrices r x c; computed and returned in bf16.

    X <- a X + (b A + c A^2) X with A = X X^T, on the side with fewer rows, after scaling each matrix to Frobenius norm 1.
    """
    a, b, c = COEFFICIENTS
    x = update_nrc.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """w <- w (1 - lr decay) - lr sqrt(max(1, rows / columns)) orthogonal(g + momentum m),  m <- momentum m + g."""

    def __init__(self, master: Flat, grads: Flat, *, lr: float, momentum: float, weight_decay: float) -> None:
        self.master, self.grads = master, grads
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.momentum_buffer = Flat({name: view.shape for name, view in master.views.items()}, master.buffer.device)
        self.shapes: dict[torch.Size, list[str]] = {}  # equal shapes are iterated as one batch
        for name, view in master.views.items():
            self.shapes.setdefault(view.shape, []).append(name)

    @torch.no_grad()
    def step(self, rate: float, scale: Tensor, skip: Tensor) -> None:
        """One update at `rate` times the peak rate; gradients are multiplied by `scale`, and `skip` = 1 changes nothing at all (0-d, fp32)."""
        if self.master.buffer.numel() == 0:
            return
        keep = skip > 0
        moved = self.momentum_buffer.buffer * self.momentum + self.grads.buffer * scale
        self.momentum_buffer.buffer.copy_(torch.where(keep, self.momentum_buffer.buffer, moved))
        nesterov = Flat({name: view.shape for name, view in self.master.views.items()}, self.master.buffer.device)
        torch.add(self.grads.buffer * scale, moved, alpha=self.momentum, out=nesterov.buffer)
        lr = self.lr * rate
        for (rows, columns), names in self.shapes.items():
            updates = newton_schulz(torch.stack([nesterov.views[name] for name in names]))
            for name, update in zip(names, updates, strict=True):
                nesterov.views[name].copy_(update).mul_(max(1.0, rows / columns) ** 0.5)
        updated = self.master.buffer * (1 - lr * self.weight_decay) - lr * nesterov.buffer
        self.master.buffer.copy_(torch.where(keep, self.master.buffer, updated))

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the master weights."""
        return {f"momentum.{name}": view for name, view in self.momentum_buffer.views.items()}
