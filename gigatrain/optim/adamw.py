"""AdamW over one flat bucket per weight-decay group, in whatever form its state is stored: one fused launch each, all decisions on the device."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gigatrain.kernels import adamw as kernel


def views(buffer: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The named tensors that lie end to end in a flat buffer."""
    found, start = {}, 0
    for name, shape in shapes.items():
        found[name] = buffer[start : start + shape.numel()].view(shape)
        start += shape.numel()
    return found


class Flat:
    """Named tensors laid end to end in one buffer of zeros, so that a group costs one launch and not one per parameter."""

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.shapes = dict(shapes)
        self.buffer = torch.zeros(self.count, dtype=dtype, device=device)
        self.views = views(self.buffer, shapes)

    @property
    def count(self) -> int:
        """Elements, whether there is storage for them or not."""
        return sum(shape.numel() for shape in self.shapes.values())

    def drop(self) -> None:
        """Give the storage back, until `take`."""
        self.buffer, self.views = self.buffer.new_empty(0), {}

    def take(self) -> None:
        """Have storage again, of undefined values."""
        self.buffer = self.buffer.new_empty(self.count)
        self.views = views(self.buffer, self.shapes)


class AdamW:
    """A group of parameters that share a weight decay; the formula and the forms of its state are those of kernels/adamw.py.

    It starts from the fp32 values of `start`. `weights` are the tensors to compute with, views that every update moves: bf16 where the form has bf16
    weights or a bf16 `copy`, else the fp32 master weights. `grads` is where the caller sums the gradients, in `gradients`' dtype.
    """

    def __init__(
        self,
        name: str,
        start: Mapping[str, Tensor],
        rates: kernel.Rates,
        device: torch.device,
        *,
        lr: float,
        master: kernel.Master = "fp32",
        moments: kernel.Moments = "fp32",
        copy: bool = False,
        version: str = "foreach",
        gradients: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.name, self.rates, self.lr = name, rates, lr
        if copy or master != "fp32":  # whatever has an odd length goes last, so that bf16 tensors begin at multiples of 16 bytes
            start = dict(sorted(start.items(), key=lambda named: named[1].numel() % 8 != 0))
        self.shapes = {name: tensor.shape for name, tensor in start.items()}
        self.grads = Flat(self.shapes, device, gradients)
        count = self.grads.buffer.numel()
        self.bucket = kernel.state(count, master, moments, copy=copy, seed=seed, device=device)
        with torch.no_grad():
            position = 0
            for tensor in start.values():
                kernel.fill_weights(self.bucket, position, tensor.detach().reshape(-1))
                position += tensor.numel()
        self.weights = views(self.bucket.weight if self.bucket.copy is None else self.bucket.copy, self.shapes)
        self._rate = torch.zeros((), device=device)
        self._update, self._foreach = kernel.OPERATIONS["adamw"].versions[version], version == "foreach"
        self._taken: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def step(self, rate: float | Tensor, scale: Tensor, skip: Tensor) -> None:
        """One update at `rate` times the peak rate; gradients are multiplied by `scale`, and `skip` = 1 changes nothing at all (0-d, fp32).

        Under a CUDA graph `rate` must be a 0-d tensor on the device: a number would be frozen into the graph.
        """
        if self.grads.buffer.numel() == 0:
            return
        lr = torch.mul(rate, self.lr, out=self._rate) if isinstance(rate, Tensor) else self._rate.fill_(self.lr * rate)
        # torch's own takes a number in fp64, and on a GPU a tensor in fp32
        wide = self._foreach and not (isinstance(rate, Tensor) and rate.is_cuda)
        self._update(self.bucket, self.grads.buffer, self.lr * rate if wide else lr, scale, skip, self.rates)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a checkpoint keeps, in fp32 and by parameter name whatever the form: master weights; moments and the count of updates made.

        What is stored in fp32 is live. The rest are copies on the host, 4 bytes per number, until `forget`; `restore` takes back what a load filled.
        """
        self._taken = self._taken or kernel.taken(self.bucket, "cpu")
        p, m, v = (views(tensor, self.shapes) for tensor in self._taken)
        moments = {f"exp_avg.{name}": view for name, view in m.items()} | {f"exp_avg_sq.{name}": view for name, view in v.items()}
        return p, moments | {f"updates.{self.name}": self.bucket.updates}

    @torch.no_grad()
    def restore(self) -> None:
        """Store what `state` gave, as a load has filled it since: if it was saved in this form, to the same bits."""
        if self._taken is not None:
            kernel.fill(self.bucket, *self._taken)

    def forget(self) -> None:
        """Drop the copies that `state` gave: the update that follows makes them old."""
        self._taken = None
