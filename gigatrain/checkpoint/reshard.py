"""From the boxes that a checkpoint was saved in to the boxes that a rank holds now, whatever ranks, mesh and engine those were."""

from collections.abc import Collection
from typing import Any

import torch

from gigatrain.checkpoint.table import Box, Files, Found, Stored, group_of, slices
from gigatrain.errors import CheckpointError
from gigatrain.parallel.agree import agreed
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.parallel.places import Piece, Place, State

# What one form of a run keeps and another does not, by group and name: where a resume changes the form, it begins anew or is left out.
PASSING = {
    ("optimizer", "amax"): "largest magnitudes of past steps, which scale products in fp8",
    ("random", "cuda"): "torch's generator on the device, which nothing in a step draws from",
}


@torch.no_grad()
def fill(found: Found, live: State, mesh: Mesh | None = None, *, passing: Collection[tuple[str, str]] = ()) -> list[str]:
    """Copy a checkpoint's tensors into this rank's pieces, in place, from whatever boxes they were saved in. Collective.

    A checkpoint holds every run's states in one form, fp32 master weights and fp32 moments, so that no other conversion is here: an engine stores what was
    filled in its own form (`restored`, kernels/adamw.py's `fill`), to the same bits where it was saved in that form, else to nearest. `passing`: what may be
    missing on either side, or have another shape; returns a line for each that does.

    Raises CheckpointError on every rank where names, shapes or dtypes differ on any; then nothing has been copied.
    """
    mesh = mesh or alone()
    # No rank holds every name, but each name must be some rank's.
    stored = [(group, name) for group, named in sorted(found.table.items()) for name in sorted(named)]
    held = torch.tensor([name in live.get(group, ()) for group, name in stored], dtype=torch.int32, device=mesh.device)
    unheld = {at for at, count in zip(stored, mesh.sum(held).tolist(), strict=True) if not count}
    said = [f"{group}.{name} of the checkpoint is left out" for group, name in sorted(unheld) if (group, name) in passing]
    live, anew = _without(found, live, passing)
    reads: dict[str, list[tuple[Piece, str, Stored, Box, Any]]] = {}
    with agreed(mesh, CheckpointError, str):
        for group, pieces in live.items():
            others = (pieces.keys() - group_of(found, group).keys()) | {name for other, name in unheld if other == group}
            odd = sorted(name for name in others if (group, name) not in passing)
            if odd:
                raise CheckpointError(f"{found.folder}: {group} has other tensors than this run: {', '.join(odd[:5])} ({len(odd)} in all)")
            for name, piece in pieces.items():
                _check_fit(found, group, name, piece)
                entry = found.table[group][name]
                for box in entry.boxes:
                    if parts := meets(piece.place, box):
                        reads.setdefault(box.file, []).append((piece, name, entry, box, parts))
    files = Files(found.folder)
    with agreed(mesh, CheckpointError, str):
        for _, wanted in sorted(reads.items()):
            for piece, name, entry, box, (into, within) in wanted:
                piece.tensor[into].copy_(files.read(entry, box, name, None if _is_all(within, box) else within))
    return said + [f"{group}.{name} begins anew: {PASSING[group, name]}" for group, name in anew]


def _without(found: Found, live: State, passing: Collection[tuple[str, str]]) -> tuple[State, list[tuple[str, str]]]:
    """`live` but for what may begin anew, where the checkpoint has none of it or another shape."""
    anew = []
    for group, name in passing:
        piece, stored = live.get(group, {}).get(name), found.table.get(group, {}).get(name)
        if piece is not None and (stored is None or stored.shape != piece.place.shape):
            anew.append((group, name))
    return {group: {name: piece for name, piece in pieces.items() if (group, name) not in anew} for group, pieces in live.items()}, anew


def _check_fit(found: Found, group: str, name: str, piece: Piece) -> None:
    stored, tensor = found.table[group][name], piece.tensor
    assert tuple(tensor.shape) == piece.place.size, f"{group} {name} is {tuple(tensor.shape)} and not its place"
    if stored.shape != piece.place.shape or stored.dtype != tensor.dtype:
        raise CheckpointError(
            f"{found.folder}: {group} {name} is {stored.dtype} {stored.shape}, this run needs {tensor.dtype} {piece.place.shape}"
        )


def meets(place: Place, box: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a live box and a stored one meet, as a part of the live and of the stored one; None: nowhere."""
    low = [max(pair) for pair in zip(place.start, box.start, strict=True)]
    ends = zip(place.start, place.size, box.start, box.size, strict=True)
    size = [min(a + b, c + d) - first for first, (a, b, c, d) in zip(low, ends, strict=True)]
    if any(count <= 0 for count in size):
        return None
    live, stored = ([first - begin for first, begin in zip(low, of.start, strict=True)] for of in (place, box))
    return slices(live, size), slices(stored, size)


def _is_all(within: tuple[slice, ...], box: Box) -> bool:
    return all(part.stop - part.start == size for part, size in zip(within, box.size, strict=True))
