"""What the starting weights say of every answer, computed once by the run itself before its first step, and kept in its folder.

    reference/SPLIT-SOURCE-PART.safetensors    "logprobs" fp32 [entries, 2]: the sums of both answers of a pair; of kto of an answer and of a foreign one
    reference/index.json                       which run's they are, and the SHA-256 of every part, written last

A run that ends within goes on at the first part that is missing. Ranks share the rows of a part, and each has all of it in the end.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gigatrain.config import Objective
from gigatrain.data.loader import Microbatch, moved, stack
from gigatrain.data.pairs import Pairs
from gigatrain.data.shards import file_sha256, write_atomically
from gigatrain.errors import RunError
from gigatrain.objectives import preference
from gigatrain.parallel import ranks
from gigatrain.parallel.mesh import Mesh

PART = 1 << 14  # rows of a part: of 2,000 tokens some 30 million, which is what an interruption may cost
Splits = Mapping[str, Sequence[Pairs]]  # by split, then source


def asked(objective: Objective) -> bool:
    """Whether a run keeps a reference's log-probabilities."""
    return objective.refers and objective.reference != "adapter"


def known(folder: Path, of: str, splits: Splits) -> str | None:
    """Give every split the numbers that the folder holds, and return the SHA-256 of all of them; None if they are not all there.

    `of` names whose they are: run, corpus and starting weights. RunError if a file is not what its index says.
    """
    index = folder / "reference" / "index.json"
    if not index.is_file():
        return None
    try:
        said = json.loads(index.read_text(encoding="utf-8"))
        if said["of"] != of:
            raise RunError(f"{index} is of another run, corpus or starting weights; start over with --new, which computes it again")
        parts: dict[str, str] = said["parts"]
    except (ValueError, KeyError, TypeError, OSError) as failure:
        raise RunError(f"{index} is not what a run writes: {failure}; start over with --new, which computes it again") from None
    for split, name, rows, pairs in _parts(splits):
        path = folder / "reference" / name
        if not path.is_file() or file_sha256(path) != parts.get(name):
            raise RunError(f"{path} is missing or not what was computed (SHA-256); copy it again, or start over with --new, which computes it again")
        _place(pairs, rows, _read(path))
        del split
    return hashlib.sha256(json.dumps([of, parts], sort_keys=True).encode()).hexdigest()


def compute(
    folder: Path,
    of: str,
    splits: Splits,
    *,
    logprobs: Callable[[Microbatch], Tensor],
    microbatch: int,
    mesh: Mesh,
    say: Callable[[str], None],
    advance: Callable[[str, int, int], None],
    leaves: Callable[[], bool],
) -> str | None:
    """As `known`, with what is missing computed: `logprobs` is the engine's, of the starting weights. None if a signal came first (`leaves`)."""
    place = folder / "reference"
    parts = list(_parts(splits))
    total = sum(len(rows) for *_, rows, _ in parts)
    if mesh.rank == 0:
        place.mkdir(exist_ok=True)
    done = 0
    for _, name, rows, pairs in parts:
        kept = ranks.first(mesh, lambda name=name: _kept(place / name, of))
        if not kept:
            found = _computed(pairs, rows, logprobs=logprobs, microbatch=microbatch, mesh=mesh, leaves=leaves, advance=lambda at: advance("reference", done + at, total))  # noqa: B023
            if found is None:
                return None
            if mesh.rank == 0:
                write_atomically(place / name, save({"logprobs": found}, {"of": of}))
        done += len(rows)
        advance("reference", done, total)

    def written() -> bool:
        hashes = {name: file_sha256(place / name) for _, name, *_ in parts}
        write_atomically(place / "index.json", json.dumps({"format": 1, "of": of, "parts": hashes}, indent=1).encode())
        return True

    ranks.first(mesh, written)
    say(f"  reference {total:,} rows of log-probabilities of the starting weights, kept in {place}")
    return known(folder, of, splits)


def _parts(splits: Splits) -> Iterator[tuple[str, str, range, Pairs]]:
    """`(split, file, rows, source)` of every part."""
    for split, sources in splits.items():
        for number, pairs in enumerate(sources):
            for start in range(0, len(pairs), PART):
                yield split, f"{split}-{number}-{start // PART:05d}.safetensors", range(start, min(start + PART, len(pairs))), pairs


def _entries(pairs: Pairs, rows: range) -> np.ndarray:
    return np.concatenate([pairs.rows[row] for row in rows])


def _place(pairs: Pairs, rows: range, numbers: Tensor) -> None:
    if pairs.reference is None:
        pairs.reference = np.zeros((len(pairs.entries), 2), np.float32)
    entries = _entries(pairs, rows)
    if numbers.shape != (len(entries), 2):
        raise RunError(f"the reference's log-probabilities are {tuple(numbers.shape)} and the rows have {len(entries)} pairs; start over with --new")
    pairs.reference[entries] = numbers.numpy()


def _read(path: Path) -> Tensor:
    try:
        return load(path.read_bytes())["logprobs"]
    except (SafetensorError, KeyError, OSError) as failure:
        raise RunError(f"{path} cannot be read: {failure}; start over with --new, which computes it again") from None


def _kept(path: Path, of: str) -> bool:
    """Whether a part was finished by an attempt before this one; what it holds is hashed with the others in the end."""
    if not path.is_file():
        return False
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("of") == of
    except SafetensorError:
        return False


def _computed(
    pairs: Pairs,
    rows: range,
    *,
    logprobs: Callable[[Microbatch], Tensor],
    microbatch: int,
    mesh: Mesh,
    leaves: Callable[[], bool],
    advance: Callable[[int], None],
) -> Tensor | None:
    """The numbers of a part's entries, in their order; each rank computes every so-many-th microbatch, and all make equally many calls."""
    reader, readers = mesh.data
    device = mesh.device
    entries = _entries(pairs, rows)
    begins = np.cumsum([0, *(len(pairs.rows[row]) for row in rows)])
    found = torch.zeros(len(entries), 2, device=device)
    rounds = math.ceil(len(rows) / (microbatch * readers))
    for turn in range(rounds):
        if leaves():
            return None
        start = (turn * readers + reader) * microbatch
        mine: list[Any] = [(pairs, row) for row in rows[start : start + microbatch]]
        mine += [None] * (microbatch - len(mine))
        part = moved(stack(mine, pairs.sequence, pairs.eos, device, pairs.blank()), device)
        numbers_bps = preference.answers(logprobs, part, pairs.form)
        for place, row in enumerate(rows[start : start + microbatch]):
            first, count = int(begins[start + place]), len(pairs.rows[row])
            found[first : first + count] = numbers_bps[place, :count]
        advance(min(len(rows), (turn + 1) * microbatch * readers))
    from gigatrain.parallel.mesh import DATA

    return mesh.sum(found, *DATA).cpu()
