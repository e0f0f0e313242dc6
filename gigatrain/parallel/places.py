"""Which box of a whole parameter a rank holds. Every parallelism cuts boxes out of boxes, so that init, loading, checkpoints and Muon need only this."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """A box of a parameter: `size` elements from `start` on, along each dim of the whole `shape`.

    partial: the axes along which every rank holds this same box but computes only its share of the gradient, so that the engine sums it over them.
    copied: the axes along which every rank holds this same box and computes the same whole gradient. Ranks along data axes are in neither: the engine
    sums over them anyway.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    partial: tuple[str, ...] = ()
    copied: tuple[str, ...] = ()

    def cut(self, dim: int, start: int, size: int) -> "Place":
        """The part of this box that begins at `start`, counted within the box, along `dim`."""
        assert 0 <= start <= self.size[dim] - size
        starts, sizes = list(self.start), list(self.size)
        starts[dim] += start
        sizes[dim] = size
        return replace(self, start=tuple(starts), size=tuple(sizes))

    def of(self, whole: Tensor) -> Tensor:
        """The box of a whole tensor, as a view."""
        assert tuple(whole.shape) == self.shape
        return whole[tuple(slice(start, start + size) for start, size in zip(self.start, self.size, strict=True))]


Places = dict[str, Place]


def whole(module: nn.Module) -> Places:
    """Every parameter of an uncut module, whole."""
    return {name: Place(tuple(p.shape), (0,) * p.dim(), tuple(p.shape)) for name, p in module.named_parameters()}


def chunk(size: int, index: int, count: int) -> tuple[int, int]:
    """`(start, size)` of the part that torch.chunk gives rank `index` of `count`: how FSDP2 cuts."""
    each = -(-size // count)
    start = min(size, index * each)
    return start, min(size, start + each) - start


def cut_parameter(module: nn.Module, name: str, dim: int, start: int, size: int) -> None:
    """Replace a parameter of `module` (not of its children) by a box of it, on the same device, meta included; a shared one becomes this module's own."""
    parameter = getattr(module, name)
    with torch.no_grad():
        part = parameter.narrow(dim, start, size).clone() if not parameter.is_meta else parameter.new_empty(_narrowed(parameter, dim, size))
    setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _narrowed(tensor: Tensor, dim: int, size: int) -> list[int]:
    return [size if at == dim else length for at, length in enumerate(tensor.shape)]


def differing(places: Mapping[str, Place]) -> list[str]:
    """Names of parameters that are not whole here."""
    return [name for name, place in places.items() if place.size != place.shape]


@dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint as this rank holds it: live, and filled in place by a load.

    writes: whether this rank saves it; of the ranks that hold the same box exactly one does. A load gives the box to all of them.
    """

    tensor: Tensor
    place: Place
    writes: bool = True

    @staticmethod
    def whole(tensor: Tensor, *, writes: bool = True) -> "Piece":
        """All of a tensor."""
        return Piece(tensor, Place(tuple(tensor.shape), (0,) * tensor.dim(), tuple(tensor.shape)), writes)


@dataclass(frozen=True)
class Replica:
    """A live tensor of which every rank along `axes` holds the same bits."""

    name: str
    tensor: Tensor
    axes: tuple[str, ...]


State = dict[str, dict[str, Piece]]  # group (weights, optimizer, random) -> canonical name -> piece
