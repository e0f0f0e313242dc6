"""What a foreign checkpoint is, and its tensors by name, each of which any rows can be had without the rest.

torch DCP              .metadata and __R_N.distcp: a tensor is chunks, each an archive of its own within a file (torchtitan, Megatron's dist-checkpointing)
DeepSpeed universal    zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt
DeepSpeed, plain       *_optim_states.pt: the fp32 master weights of each rank, end to end; shapes in *_model_states.pt
state dicts            .pt, .pth or .bin of torch.save, or a folder of them with an index
"""

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gigatrain.checkpoint import writing
from gigatrain.errors import CheckpointError
from gigatrain.importing import archive
from gigatrain.importing.archive import Stored
from gigatrain.importing.opcodes import Record

_NESTED = ("model", "module", "state_dict", "model_state_dict", "app")  # keys under which systems keep the weights
_DEPTH = 8
_VALUES = 20_000_000


class Whole(Protocol):
    """A tensor of a source."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows along dim 0, all of a scalar."""
        ...


@dataclass(frozen=True)
class Source:
    """What was found: `kind` in words, the weights by the source's own names, and what else it holds that is not taken."""

    kind: str
    weights: dict[str, Whole]
    left: str = ""


def found(path: Path) -> Source:
    """The checkpoint at `path`. Raises CheckpointError where it is none that we know."""
    if path.is_file():
        return _dicts([path])
    if not path.is_dir():
        raise CheckpointError(f"there is no file or folder {path}")
    if (path / "latest").is_file() or (path / "latest_universal").is_file():
        tags = [path / name for name in ("latest_universal", "latest") if (path / name).is_file()]
        name = tags[0].read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"[\w.+=-]+", name) or name.startswith("."):
            raise CheckpointError(f"{tags[0]} names no folder beside it: {name[:80]!r}")
        return found(path / name)
    if (path / ".metadata").is_file():
        return _dcp(path)
    if (path / "zero").is_dir():
        return _universal(path)
    if list(path.glob("*zero_pp_rank_*_optim_states.pt")):
        return _zero(path)
    files = sorted(one for kind in ("*.bin", "*.pt", "*.pth") for one in path.glob(kind))
    if files:
        return _dicts(files)
    raise CheckpointError(
        f"{path} is no checkpoint that can be imported: it has no .metadata (torch DCP), no zero/ (DeepSpeed universal), no *_optim_states.pt (DeepSpeed) and "
        "no *.pt, *.pth or *.bin of torch.save; a folder of safetensors needs no import"
    )


# ---- torch.save's state dicts ----


def _dicts(paths: list[Path]) -> Source:
    weights: dict[str, Whole] = {}
    left: set[str] = set()
    for path in paths:
        tree = archive.opened(path)
        held = _held(tree, path)
        if held is not tree and isinstance(tree, dict):
            left |= {str(key) for key in tree if tree[key] is not held}
        for name, tensor in held.items():
            if isinstance(tensor, Stored):
                if name in weights:
                    raise CheckpointError(f"{path} holds {name}, which another file has too; give one of them alone")
                weights[str(name)] = tensor
    if not weights:
        raise CheckpointError(f"{paths[0]} holds no tensor by a name")
    return Source(f"state dict of torch.save, {len(paths)} file(s)", weights, ", ".join(sorted(left)[:6]))


def _held(tree: Any, path: Path) -> dict[Any, Any]:
    """The dict of weights in a tree: the first one with tensors by their names, looking into the keys that systems keep weights under."""
    for _ in range(_DEPTH):
        if not isinstance(tree, dict):
            break
        if any(isinstance(value, Stored) for value in tree.values()):
            return tree
        inner = next((tree[key] for key in _NESTED if isinstance(tree.get(key), dict)), None)
        if inner is None:
            break
        tree = inner
    raise CheckpointError(f"{path} holds no dict of tensors by name, at its top or under {', '.join(_NESTED)}")


# ---- torch DCP ----


@dataclass(frozen=True)
class _Chunks:
    """A tensor in chunks: where each begins, its size, and the part of a file that is an archive of it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...], Path, int, int], ...]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows along dim 0, of whatever chunks meet them."""
        if not self.shape:
            return self._part(self.chunks[0]).rows(0, 1)
        result = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        for chunk in self.chunks:
            offset, size = chunk[0], chunk[1]
            first, last = max(start, offset[0]), min(stop, offset[0] + size[0])
            if first < last:
                where = (slice(first - start, last - start), *(slice(o, o + n) for o, n in zip(offset[1:], size[1:], strict=True)))
                result[where] = self._part(chunk).rows(first - offset[0], last - offset[0])
        return result

    def _part(self, chunk: Any) -> Stored:
        _, size, path, at, length = chunk
        part = archive.opened(path, at, length)
        if not isinstance(part, Stored) or part.shape != size or part.dtype != self.dtype:
            raise CheckpointError(
                f"{path} holds, at byte {at}, something other than {list(size)} of {self.name}, which .metadata places there"
            )
        return part


def _dcp(folder: Path) -> Source:
    path = folder / ".metadata"
    if path.stat().st_size > 1 << 30:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, 1 GiB are read at most")
    tree = archive.plain(path.read_bytes(), str(path))
    try:
        where = {key: info.state for key, info in tree.state["storage_data"].items()}
        weights: dict[str, Whole] = {}
        others: list[str] = []
        for name, entry in tree.state["state_dict_metadata"].items():
            if not entry.kind.endswith(".TensorStorageMetadata"):
                others.append(str(name))
                continue
            dtype = entry.state["properties"].state[""][0]
            shape, chunks = _sizes(entry.state["size"]), []
            for chunk in entry.state["chunks"]:
                offset, size = _sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])
                info = where[_index(name, offset)]
                if info.get("transform_descriptors"):
                    raise CheckpointError(f"{path}: {name} is stored through {info['transform_descriptors']}; save it again without")
                file = str(info["relative_path"])
                if "/" in file or file.startswith("."):
                    raise CheckpointError(f"{path} places {name} outside of its folder: {file[:80]!r}")
                chunks.append((offset, size, folder / file, int(info["offset"]), int(info["length"])))
            if not writing.tile(shape, [(offset, size) for offset, size, *_ in chunks]) or not isinstance(dtype, torch.dtype):
                raise CheckpointError(f"{path}: the chunks of {name} leave a gap in {list(shape)}, or lie one over another")
            if any(len(c[0]) != len(shape) or any(o + n > s for o, n, s in zip(c[0], c[1], shape, strict=True)) for c in chunks):
                raise CheckpointError(f"{path}: a chunk of {name} lies outside of {list(shape)}")
            weights[str(name)] = _Chunks(str(name), shape, dtype, tuple(chunks))
    except (KeyError, AttributeError, TypeError, ValueError, IndexError) as failure:
        raise CheckpointError(f"{path} is no metadata of torch DCP: {type(failure).__name__}: {str(failure)[:120]}") from None
    kept, left = _model_only(weights)
    return Source("torch DCP", kept, ", ".join([*left, *others][:6]))


def _index(name: str, offset: tuple[int, ...]) -> tuple[Any, ...]:
    """The key that DCP's own index has here: its class, and its attributes in the order of their names (`index`, a hint, is no part of it)."""
    return (f"{archive.METADATA[5]}", name, offset)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or any(type(n) is not int or n < 0 for n in value):
        raise ValueError(f"sizes are {str(value)[:60]}")
    return value


def _model_only(weights: Mapping[str, Whole]) -> tuple[dict[str, Whole], list[str]]:
    """Those of the model: under `model.` where an optimizer is kept beside it."""
    left = [name for name in weights if name.startswith(("optimizer.", "optim.", "optimizers.")) or ".optim." in name]
    return {name: tensor for name, tensor in weights.items() if name not in set(left)}, left


# ---- DeepSpeed ----


def _universal(folder: Path) -> Source:
    weights: dict[str, Whole] = {}
    for part in sorted((folder / "zero").iterdir()):
        if (part / "fp32.pt").is_file():
            tree = archive.opened(part / "fp32.pt")
            tensor = tree.get("param") if isinstance(tree, dict) else tree
            if not isinstance(tensor, Stored):
                raise CheckpointError(f"{part / 'fp32.pt'} holds no parameter")
            weights[part.name] = tensor
    if not weights:
        raise CheckpointError(f"{folder / 'zero'} holds no parameter's fp32.pt")
    return Source("DeepSpeed universal", weights, "moments of the optimizer")


@dataclass(frozen=True)
class _Ranges:
    """A tensor whose elements lie end to end in parts of flat tensors: each of so many elements of `stored`, from `start` on."""

    shape: tuple[int, ...]
    parts: tuple[tuple[Stored, int, int], ...]
    dtype: torch.dtype = torch.float32

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows along dim 0."""
        row = math.prod(self.shape[1:]) if self.shape else 1
        first, last = (start * row, stop * row) if self.shape else (0, 1)
        ends = list(accumulate(count for _, _, count in self.parts))
        pieces, at = [], first
        for index in range(bisect_right(ends, first), len(self.parts)):
            stored, begin, count = self.parts[index]
            skip = at - (ends[index] - count)
            take = min(count - skip, last - at)
            if take <= 0:
                break
            pieces.append(stored.flat(begin + skip, take))
            at += take
        return torch.cat(pieces).view((stop - start, *self.shape[1:]) if self.shape else ())


def _zero(folder: Path) -> Source:
    """Plain ZeRO: in stages 1 and 2 a group's parameters lie end to end over the ranks, in stage 3 every rank has an equal stretch of each parameter."""
    paths = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    ranks = [_mapping(archive.opened(path), path, "optimizer_state_dict") for path in paths]
    if any(re.search(r"mp_rank_0*[1-9]", path.name) for path in paths):
        raise CheckpointError(f"{folder} was saved with model parallelism; convert it with DeepSpeed's ds_to_universal first")
    stage, count = _integer(ranks[0].get("zero_stage")), ranks[0].get("partition_count")
    count = max((_integer(one) for one in count), default=0) if isinstance(count, list | tuple) else _integer(count)
    if count != len(ranks):
        raise CheckpointError(f"{folder} was saved by {count} ranks and holds the files of {len(ranks)}")
    models = sorted(folder.glob("*_model_states.pt"))
    if not models:
        raise CheckpointError(f"{folder} has no *_model_states.pt, which holds the parameters' shapes")
    tree = archive.opened(models[0])
    shapes = tree.get("param_shapes") if isinstance(tree, dict) else None
    if not isinstance(shapes, list | tuple) or not all(isinstance(group, dict) for group in shapes):
        raise CheckpointError(f"{models[0]} holds no shapes of parameters (param_shapes)")
    groups = [{str(name): _sizes(shape) for name, shape in group.items()} for group in shapes]
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    flats = [_flats(rank.get(key), path, key) for rank, path in zip(ranks, paths, strict=True)]
    weights = dict(_of_stage_3(groups, flats, paths[0]) if stage == 3 else _end_to_end(groups, flats, paths[0]))
    return Source(f"DeepSpeed ZeRO-{stage} of {count} ranks", weights, "moments of the optimizer")


def _end_to_end(groups: list[dict[str, tuple[int, ...]]], flats: list[list[Stored]], path: Path) -> Iterator[tuple[str, Whole]]:
    for index, group in enumerate(groups):
        sizes = [math.prod(rank[index].shape) if index < len(rank) else 0 for rank in flats]
        starts, at = [0, *accumulate(sizes)], 0
        for name, shape in group.items():
            low, high = at, at + math.prod(shape)
            if high > starts[-1]:
                raise CheckpointError(f"{path}: the partitions of group {index} end before {name}")
            parts = []
            for rank, (begin, end) in enumerate(pairwise(starts)):
                first, last = max(low, begin), min(high, end)
                if first < last:
                    parts.append((flats[rank][index], first - begin, last - first))
            yield name, _Ranges(shape, tuple(parts))
            at = high


def _of_stage_3(groups: list[dict[str, tuple[int, ...]]], flats: list[list[Stored]], path: Path) -> Iterator[tuple[str, Whole]]:
    """Every rank's flat groups hold its stretch of each parameter, padded to ceil(elements / ranks), in one order over all groups."""
    ends = [list(accumulate(math.prod(one.shape) for one in rank)) for rank in flats]
    at = 0
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        count = math.prod(shape)
        each, parts = -(-count // len(flats)), []
        for rank, stored in enumerate(flats):
            real = max(0, min(each, count - rank * each))
            first = at
            while real:
                group = bisect_right(ends[rank], first)
                if group >= len(stored):
                    raise CheckpointError(f"{path}: the partitions end before {name}")
                begin = first - (ends[rank][group - 1] if group else 0)
                take = min(real, math.prod(stored[group].shape) - begin)
                parts.append((stored[group], begin, take))
                first, real = first + take, real - take
        yield name, _Ranges(shape, tuple(parts))
        at += each


def _flats(value: Any, path: Path, key: str) -> list[Stored]:
    flats = list(value) if isinstance(value, list | tuple) else []
    if not flats or not all(isinstance(one, Stored) and one.dtype == torch.float32 for one in flats):
        raise CheckpointError(f"{path} holds no fp32 master weights ({key})")
    return flats


def _mapping(tree: Any, path: Path, key: str) -> dict[Any, Any]:
    inner = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path} has no {key}")
    return inner


def _integer(value: Any) -> int:
    """Of an int, or of an enumeration's record."""
    if isinstance(value, Record) and value.made_of:
        value = value.made_of[0]
    if type(value) is not int or not 0 <= value <= 1 << 20:
        raise CheckpointError(f"a count is {str(value)[:60]}")
    return value


def names(source: Source) -> Iterable[str]:
    """Of the weights."""
    return source.weights.keys()
