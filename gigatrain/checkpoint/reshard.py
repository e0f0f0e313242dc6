"""From the boxes that a checkpoint was saved in to the boxes that a rank holds now, whatever ranks, mesh and engine those were."""

from typing import Any

import torch

from gigatrain.checkpoint.table import Box, Files, Found, Stored, group_of, slices
from gigatrain.errors import CheckpointError
from gigatrain.parallel.agree import agreed
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.parallel.places import Piece, Place, State


@torch.no_grad()
def fill(found: Found, live: State, mesh: Mesh | None = None) -> None:
    """Copy a checkpoint's tensors into this rank's pieces, in place, from whatever boxes they were saved in. Collective.

    Raises CheckpointError on every rank where names, shapes or dtypes differ on any; then nothing has been copied.
    """
    mesh = mesh or alone()
    # No rank holds every name, but each name must be some rank's.
    stored = [(group, name) for group, named in sorted(found.table.items()) for name in sorted(named)]
    held = torch.tensor([name in live.get(group, ()) for group, name in stored], dtype=torch.int32, device=mesh.device)
    unheld = {at for at, count in zip(stored, mesh.sum(held).tolist(), strict=True) if not count}
    reads: dict[str, list[tuple[Piece, str, Stored, Box, Any]]] = {}
    with agreed(mesh, CheckpointError, str):
        for group, pieces in live.items():
            odd = sorted((pieces.keys() - group_of(found, group).keys()) | {name for other, name in unheld if other == group})
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
