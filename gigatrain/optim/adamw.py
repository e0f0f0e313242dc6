"""AdamW over one flat fp32 buffer per weight-decay group: one fused launch each, the clip factor and the skip decided on the device."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class Flat:
    """Named fp32 tensors laid end to end in one buffer, so that a group costs one launch and not one per parameter."""

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        self.buffer = torch.zeros(sum(shape.numel() for shape in shapes.values()), dtype=torch.float32, device=device)
        self.views: dict[str, Tensor] = {}
        start = 0
        for name, shape in shapes.items():
            self.views[name] = self.buffer[start : start + shape.numel()].view(shape)
            start += shape.numel()


class AdamW:
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- w - lr (m' / (sqrt(v') + eps) + decay w)   (arXiv:1711.05101).

    `master` holds the fp32 weights of this group; `grads` is where the caller sums the gradients, same names, fp32.
    """

    def __init__(
        self, name: str, master: Flat, grads: Flat, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.name, self.master, self.grads = name, master, grads
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        shapes = {name: view.shape for name, view in master.views.items()}
        self.exp_avg = Flat(shapes, master.buffer.device)
        self.exp_avg_sq = Flat(shapes, master.buffer.device)
        self.updates = torch.zeros((), dtype=torch.float32, device=master.buffer.device)

    @torch.no_grad()
    def step(self, rate: float, scale: Tensor, skip: Tensor) -> None:
        """One update at `rate` times the peak rate; gradients are multiplied by `scale`, and `skip` = 1 changes nothing at all (0-d, fp32)."""
        if self.master.buffer.numel() == 0:
            return
        adamw(
            [self.master.buffer],
            [self.grads.buffer],
            [self.exp_avg.buffer],
            [self.exp_avg_sq.buffer],
            [],
            [self.updates],
            fused=True,
            grad_scale=scale.reciprocal(),  # torch divides by it
            found_inf=skip,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.lr * rate,
            weight_decay=self.weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the master weights: moments by parameter name, and the count of updates made."""
        state = {f"exp_avg.{name}": view for name, view in self.exp_avg.views.items()}
        state |= {f"exp_avg_sq.{name}": view for name, view in self.exp_avg_sq.views.items()}
        return state | {f"updates.{self.name}": self.updates}
