"""Weights in transformers' layout: safetensors files with transformers' names, read and written tensor by tensor.

Names in memory are those of transformers' Llama. `_RENAMED` lists, per trait, what a family calls otherwise on disk; Phi-3 keeps query, key and value,
and gate and up, as one matrix each. Experts are one tensor in memory, [experts, rows, columns] with gate above up. On disk they are three matrices each,
or, for the families without an entry in `_MOE`, tensors too: gpt-oss's with rows and columns exchanged and gate and up in turn. Nothing is ever unpickled.
"""

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gigatrain.architectures import Architecture
from gigatrain.errors import CheckpointError
from gigatrain.kernels import xielu
from gigatrain.models import grown
from gigatrain.models.decoder import Decoder
from gigatrain.models.streamed import Held, Rows, Written, pieces, write

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LAYER_TENSOR = re.compile(r"(model\.layers\.\d+\.)(.+)\.(weight|bias)")
_EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.)experts\.(gate_up_proj|down_proj)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# Names of the layers' norms on disk, where they differ: llama's second norm stands before the feed-forward block, gemma's after attention.
_RENAMED: dict[str, dict[str, str]] = {
    "pre": {},
    "post": {"attention_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"},
    "sandwich": {
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "attention_output_norm": "post_attention_layernorm",
        "mlp_output_norm": "post_feedforward_layernorm",
    },
    "apertus": {"input_layernorm": "attention_layernorm", "post_attention_layernorm": "feedforward_layernorm"},
    "gpt_oss": {"mlp.gate": "mlp.router"},
}
FUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "phi3": {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }
}
# What a family calls the block with experts on disk, and an expert's gate, up and down.
_MOE: dict[str, tuple[str, tuple[str, str, str]]] = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    **dict.fromkeys(("qwen3_moe", "olmoe", "deepseek_v3"), ("mlp", ("gate_proj", "up_proj", "down_proj"))),
}
# How gpt-oss stores a layer's experts: rows for columns, and of gate and up the first of each, the second of each, ...
_FORMS: dict[str, dict[str, tuple[Literal["turned", "paired"], ...]]] = {
    "gpt_oss": {"gate_up_proj": ("paired", "turned"), "gate_up_proj_bias": ("paired",), "down_proj": ("turned",)}
}
_EXPERT_TENSOR = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(\w+)")
_CONSTANTS = {"act_fn.beta": xielu.BETA, "act_fn.eps": xielu.EPS}  # transformers keeps xIELU's two constants with the weights


@dataclass(frozen=True)
class _Source:
    """A tensor in memory, or its expert `expert`, or that one's half `half`; `form`: how what is on disk is made of it, step by step."""

    name: str
    expert: int | None = None
    half: int | None = None
    form: tuple[Literal["turned", "paired"], ...] = ()

    def of(self, whole: Tensor) -> Tensor:
        """What `whole`, the tensor of that name, holds of it, as it is on disk."""
        part = whole if self.expert is None else whole[self.expert]
        for step in self.form:
            part = part.transpose(1, 2) if step == "turned" else part.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return part if self.half is None else part.chunk(2)[self.half]

    def back(self, stored: Tensor) -> Tensor:
        """The tensor in memory of a whole one on disk."""
        for step in reversed(self.form):
            stored = stored.transpose(1, 2) if step == "turned" else stored.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return stored

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of it, where `whole` is the shape of all of the tensor."""
        part = whole if self.expert is None else whole[1:]
        if "turned" in self.form:
            part = (part[0], part[2], part[1])
        return part if self.half is None else (part[0] // 2, *part[1:])


def _sources(arch: Architecture, name: str) -> tuple[_Source, ...]:
    """What in memory the tensor `name` on disk is made of, stacked along dim 0."""
    match = _LAYER_TENSOR.fullmatch(name)
    if not match:
        stacked = _EXPERT_TENSOR.fullmatch(name)
        return (_Source(name, form=_FORMS.get(arch.family, {}).get(stacked[1], ()) if stacked else ()),)
    layer, module, kind = match.groups()
    if module in (fused := FUSED.get(arch.family, {})):
        return tuple(_Source(f"{layer}{part}.{kind}") for part in fused[module])
    if arch.family in _MOE:
        block, names = _MOE[arch.family]
        if module == f"{block}.gate":
            return (_Source(f"{layer}mlp.gate.{kind}"),)
        if (one := re.fullmatch(rf"{block}\.experts\.(\d+)\.(\w+)", module)) and one[2] in names and int(one[1]) < arch.experts:
            half = names.index(one[2])
            if half == 2:
                return (_Source(f"{layer}mlp.experts.down_proj", int(one[1])),)
            return (_Source(f"{layer}mlp.experts.gate_up_proj", int(one[1]), half),)
    back = {disk: memory for memory, disk in _RENAMED.get(arch.family, _RENAMED[arch.placement]).items()}
    return (_Source(f"{layer}{back.get(module, module)}.{kind}"),)


def _names(arch: Architecture, memory: Mapping[str, Any]) -> dict[str, tuple[_Source, ...]]:
    """Every name on disk, and what in memory it is made of."""
    forward = _RENAMED.get(arch.family, _RENAMED[arch.placement])
    fused = {part: whole for whole, parts in FUSED.get(arch.family, {}).items() for part in parts}
    block, parts = _MOE.get(arch.family, ("", ("", "", "")))
    if arch.family in _MOE:
        forward = {**forward, "mlp.gate": f"{block}.gate"}
    disk: dict[str, tuple[_Source, ...]] = {}
    for name in memory:
        if name == _HEAD and arch.tied:
            continue
        written = [name]
        if arch.family in _MOE and (match := _EXPERTS.fullmatch(name)):
            layer = match[1].removesuffix("mlp.")
            mine = parts[:2] if match[2] == "gate_up_proj" else parts[2:]
            written = [f"{layer}{block}.experts.{e}.{part}.weight" for e in range(arch.experts) for part in mine]
        elif match := _LAYER_TENSOR.fullmatch(name):
            layer, module, kind = match.groups()
            written = [f"{layer}{fused.get(module, forward.get(module, module))}.{kind}"]
        disk |= {one: _sources(arch, one) for one in written}
    return disk


Box = tuple[tuple[int, ...], tuple[int, ...]]  # of a parameter: from where on along each dim of the whole, and how many


class _Stacks:
    """The tensors of experts while their matrices come in one by one."""

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        self.begun: dict[str, tuple[Tensor, list[_Source]]] = {}
        self.cut: dict[str, tuple[Tensor, int]] = {}  # boxes of such tensors, and how many elements they lack

    def filled_box(self, source: _Source, stored: Any, box: Box, rows: int) -> dict[str, Tensor]:
        """Takes in what one stored matrix, of a slice, holds of a box of the tensor [experts, `rows`, columns]; the box once it has all, else nothing."""
        assert source.expert is not None
        (e, r, c), (experts, high, wide) = box
        count = rows if source.half is None else rows // 2
        base = count * (source.half or 0)
        first, last = max(r, base), min(r + high, base + count)
        if not (e <= source.expert < e + experts and first < last and wide):
            return {}
        part = stored[first - base : last - base, c : c + wide]
        if source.name not in self.cut:
            self.cut[source.name] = part.new_empty(box[1]), experts * high * wide
        whole, lacks = self.cut[source.name]
        whole[source.expert - e, first - r : last - r].copy_(part)
        self.cut[source.name] = whole, lacks - part.numel()
        return {source.name: self.cut.pop(source.name)[0]} if lacks == part.numel() else {}

    def filled(self, source: _Source, matrix: Tensor) -> dict[str, Tensor]:
        """Takes one matrix in; the whole tensor by its name once it has all, else nothing."""
        if source.name not in self.begun:
            rows = matrix.shape[0] * (1 if source.half is None else 2)
            self.begun[source.name] = matrix.new_empty(self.arch.experts, rows, matrix.shape[1]), []
        whole, seen = self.begun[source.name]
        source.of(whole).copy_(matrix)
        seen.append(source)
        if len(seen) * matrix.shape[0] < whole.shape[0] * whole.shape[1]:
            return {}
        del self.begun[source.name]
        return {source.name: whole}


def to_hf(state: Mapping[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
    """A state dict under transformers' names; fused matrices are copies, those of experts views, the rest the same tensors.

    A tied head is left out, as transformers does.
    """
    return dict(_to_hf(state, arch))


def _to_hf(state: Mapping[str, Tensor], arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    for name, sources in _names(arch, state).items():
        if missing := [s.name for s in sources if s.name not in state]:
            raise CheckpointError(f"the state lacks {', '.join(missing)}, which {name} is made of")
        parts = [s.of(state[s.name]) for s in sources]
        yield name, parts[0] if len(parts) == 1 else torch.cat(parts)
        if name.endswith("act_fn.alpha_n"):
            for constant, value in _CONSTANTS.items():
                yield name.replace("act_fn.alpha_n", constant), torch.tensor(value, dtype=parts[0].dtype)


def from_hf(state: Mapping[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
    """A state dict under the decoder's names; fused matrices become views, an expert's matrices copies. Adds the tied head.

    Experts may also come as transformers 5 holds them in memory, which is as we do.
    """
    sizes, stacks = _fused_sizes(arch), _Stacks(arch)
    memory: dict[str, Tensor] = {}
    for name, tensor in state.items():
        sources = _sources(arch, name)
        if name.endswith(tuple(_CONSTANTS)):
            _check_constant(name, tensor)
        elif sources[0].expert is not None:
            memory |= stacks.filled(sources[0], tensor)
        elif len(sources) == 1:
            memory[sources[0].name] = sources[0].back(tensor)
        else:
            parts = tensor.split([sizes[_module(s.name)] for s in sources])
            memory |= {s.name: part for s, part in zip(sources, parts, strict=True)}
    if stacks.begun:
        raise CheckpointError(f"the state lacks experts of {_some(sorted(stacks.begun))}")
    if arch.tied and _EMBEDDING in memory:
        memory[_HEAD] = memory[_EMBEDDING]
    return memory


def _module(name: str) -> str:
    return name.split(".")[-2]


def _fused_sizes(arch: Architecture) -> dict[str, int]:
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    return {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": arch.intermediate, "up_proj": arch.intermediate}


def _check_constant(name: str, tensor: Tensor) -> None:
    value = next(v for suffix, v in _CONSTANTS.items() if name.endswith(suffix))
    if tensor.numel() != 1 or abs(tensor.item() / value - 1) > 2**-8:  # as far as bf16 can say
        raise CheckpointError(f"{name} is {tensor.flatten().tolist()}, but only {value} is implemented")


_FETCHED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md"]  # the last says the licence


def locate(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder that holds a model: an existing folder, else the hub's snapshot of that name (`revision`: commit or tag), downloaded if need be.

    Raises `CheckpointError` if there is no such folder and the hub cannot give it.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    name = os.fspath(name_or_path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise CheckpointError(f"there is no folder {name}, and it is no hub name (owner/model) either; check the path")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(f"there is no folder {name}; to fetch it from the hub: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FETCHED))
    except Exception as error:  # the hub's own errors, of any transport: all mean that there is no model
        raise CheckpointError(f"there is no folder {name}, and the hub gives no model of that name: {error}") from error


def kept(name_or_path: str | os.PathLike[str]) -> Path | None:
    """The folder that holds a model, if it is here: what `locate` would give, but nothing is fetched."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(os.fspath(name_or_path), allow_patterns=_FETCHED, local_files_only=True))
    except (ImportError, OSError, ValueError):  # the hub's own, of a name that is none or was never fetched, are of these
        return None


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """config.json as a dict. Raises `CheckpointError` if it is missing or not a JSON object."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; a model folder holds config.json and *.safetensors") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds {type(config).__name__} instead of a table")
    return config


def _files(folder: Path) -> dict[str, Path]:
    """Where each tensor is: name -> file."""
    if (index := folder / INDEX).is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / Path(places[stored]).name for name, stored in _language(places).items()}
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{index} is damaged: {type(error).__name__}: {str(error)[:200]}; fetch or write the folder again"
            ) from error
    if (single := folder / SINGLE).is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    if pickles := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} holds weights only as pickle ({pickles[0]}), which can run code when read; convert it to safetensors first"
        )
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}")


_LANGUAGE = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."))


def _language(stored: Iterable[str]) -> dict[str, str]:
    """Name -> name as stored. Of a model that also sees or hears, those of its language model, by the names that it has alone; others are as they are."""
    stored = list(stored)
    if not any(name.startswith(before) for name in stored for before, _ in _LANGUAGE):
        return {name: name for name in stored}
    found = {after + name.removeprefix(before): name for before, after in _LANGUAGE for name in stored if name.startswith(before)}
    return found | {name: name for name in stored if name == _HEAD}


class _Part:
    """A file of such a model, as if it held its language model alone."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> "_Part":
        self._file.__enter__()
        self._stored = _language(self._file.keys())
        return self

    def __exit__(self, *raised: Any) -> None:
        self._file.__exit__(*raised)

    def keys(self) -> list[str]:
        return list(self._stored)

    def get_slice(self, name: str) -> Any:
        return self._file.get_slice(self._stored.get(name, name))

    def get_tensor(self, name: str) -> Tensor:
        return self._file.get_tensor(self._stored.get(name, name))


def _open(path: Path) -> Any:
    try:
        return _Part(safe_open(path, framework="pt", device="cpu"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing, though the index names it; fetch the folder again") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}; fetch the folder again") from error


@torch.no_grad()
def load_weights(model: Decoder, folder: str | os.PathLike[str]) -> None:
    """Fills the model in place from a folder in transformers' layout, one tensor in memory at a time, cast to each parameter's dtype.

    Raises as `read_weights`; nothing is written to the model before names and shapes are known to fit.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters()) | model.corrections()
    for name, tensor in read_weights(model.arch, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, folder):
        parameters[name].copy_(tensor)


def read_weights(
    arch: Architecture,
    shapes: Mapping[str, tuple[int, ...]],
    folder: str | os.PathLike[str],
    *,
    part: bool = False,
    boxes: Mapping[str, Box] | None = None,
    grow: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """`(name in memory, whole tensor)` of every parameter in `shapes`, one in memory at a time; with `part`, the folder may hold others too.

    Of a parameter in `boxes` only its box is read and given; nothing is of one that is empty. With `grow` embedding and head may have fewer rows on disk:
    models/grown.py says what the others are.

    DeepSeek's files have layers behind the last one, of multi-token prediction: they are passed over, as transformers does.

    Raises `CheckpointError` naming the tensors that are missing, unexpected or of another shape, before it gives the first.
    """
    folder = Path(folder)
    files = _files(folder)
    wanted = _names(arch, shapes)
    found = {name for name in files if not name.endswith((*_CONSTANTS, "rotary_emb.inv_freq"))}
    if arch.family == "deepseek_v3":
        found -= {name for name in found if (layer := _LAYER.match(name)) and int(layer[1]) >= arch.layers}
    if arch.tied and _HEAD in found:
        found.remove(_HEAD)  # some files repeat the tied head
    if missing := sorted(set(wanted) - found):
        raise CheckpointError(f"{folder} lacks {_some(missing)}")
    if not part and (unexpected := sorted(found - set(wanted))):
        raise CheckpointError(f"{folder} holds {_some(unexpected)}, for which a {arch.family} of these numbers has no place")
    by_file: dict[Path, list[str]] = {}
    fewer: set[str] = set()
    for name, path in files.items():
        by_file.setdefault(path, []).append(name)
    for path, names in by_file.items():
        with _open(path) as file:
            for name in names:
                try:
                    shape = tuple(file.get_slice(name).get_shape())
                except SafetensorError as error:
                    raise CheckpointError(f"{path} lacks {name}, which the index places there; fetch the folder again") from error
                if name in wanted:
                    parts = [s.shape(shapes[s.name]) for s in wanted[name]]
                    expected = (sum(p[0] for p in parts), *parts[0][1:])
                    if grow and grown.fits(name, shape, expected):
                        fewer.add(name)
                    elif shape != expected:
                        more = name in grown.NAMES and shape[1:] == expected[1:]
                        way = f"; --set model.architecture.vocab={shape[0]}" if more else ""
                        raise CheckpointError(f"{name} is {list(shape)} in {path}, but {list(expected)} by the architecture's numbers{way}")
    stacks, boxes = _Stacks(arch), boxes or {}
    for path, names in by_file.items():
        with _open(path) as file:
            for name in names:
                if name not in wanted:
                    if name.endswith(tuple(_CONSTANTS)):
                        _check_constant(name, file.get_tensor(name))
                    continue
                if name in fewer:
                    if 0 not in (box := boxes.get(name, ((0, 0), shapes[name])))[1]:
                        yield name, grown.rows(file.get_slice(name), shapes[name], box)
                    continue
                if all(s.name in boxes for s in wanted[name]):
                    yield from _boxed(file, name, wanted[name], shapes, boxes, stacks)
                    continue
                sources, tensor = wanted[name], file.get_tensor(name)
                if sources[0].expert is not None:
                    yield from stacks.filled(sources[0], tensor).items()
                elif len(sources) == 1:
                    yield sources[0].name, sources[0].back(tensor)
                else:
                    yield from zip((s.name for s in sources), tensor.split([shapes[s.name][0] for s in sources]), strict=True)


def _boxed(
    file: Any, name: str, sources: Sequence[_Source], shapes: Mapping[str, tuple[int, ...]], boxes: Mapping[str, Box], stacks: _Stacks
) -> Iterator[tuple[str, Tensor]]:
    """The boxes that a stored tensor holds, read alone. One that is stored in another form is cut along its experts, and then within them."""
    stored, at = file.get_slice(name), 0
    for source in sources:
        start, size = boxes[source.name]
        if source.expert is not None:
            yield from stacks.filled_box(source, stored, boxes[source.name], shapes[source.name][1]).items()
        elif 0 in size:
            pass
        elif not size:
            yield source.name, file.get_tensor(name)
        elif source.form:
            found = source.back(stored[start[0] : start[0] + size[0]])
            yield source.name, found[(slice(None), *(slice(a, a + b) for a, b in zip(start[1:], size[1:], strict=True)))]
        else:
            yield source.name, stored[cut_of((at + start[0], *start[1:]), size)]
        at += shapes[source.name][0] if shapes[source.name] else 0


def cut_of(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """A box as slices."""
    return tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))


def reader(arch: Architecture, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> Callable[[str], Tensor]:
    """What gives any one tensor of `shapes` from a folder, by its name in memory. Raises `CheckpointError` for what the folder lacks."""
    files, parts = _files(folder), {}
    for disk, sources in _names(arch, shapes).items():
        for source in sources:
            parts.setdefault(source.name, {})[disk] = None

    def whole(name: str) -> Tensor:
        found = {}
        for disk in parts[name]:
            if disk not in files:
                raise CheckpointError(f"{folder} lacks {disk}")
            with _open(files[disk]) as file:
                found[disk] = file.get_tensor(disk)
        tensor = from_hf(found, arch)[name]
        return grown.rows(tensor, shapes[name]) if grown.fits(name, tuple(tensor.shape), shapes[name]) else tensor

    return whole


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def save_weights(
    model_or_state: Decoder | Mapping[str, Tensor],
    arch: Architecture,
    folder: str | os.PathLike[str],
    *,
    max_shard_bytes: float = 5e9,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes the weights in transformers' layout and returns the files: one, or shards of at most `max_shard_bytes` (or one tensor) and an index.

    Each file is written under a temporary name, synced and renamed; the index last, so that an interrupted write never looks whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = Held(model_or_state.state_dict() if isinstance(model_or_state, Decoder) else model_or_state)
    files = shards(state, arch, max_shard_bytes)
    for number in range(len(files)):
        write_shard(files, number, folder, metadata)
    write_index(files, folder)
    return [folder / name for name in [*(name for name, _ in files), *([INDEX] if len(files) > 1 else [])]]


Shards = list[tuple[str, list[Written]]]  # files by name, and the tensors of each


def shards(state: Rows, arch: Architecture, max_shard_bytes: float = 5e9) -> Shards:
    """Which tensors go into which file: decided by shapes alone, so that whoever writes a file needs nothing of the others."""
    return cut(_written(state, arch), max_shard_bytes)


def on_disk(arch: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes on disk, of those in memory."""
    found = {}
    for name, sources in _names(arch, shapes).items():
        parts = [s.shape(shapes[s.name]) for s in sources]
        found[name] = (sum(one[0] for one in parts), *parts[0][1:]) if parts[0] else ()
    return found


def cut(tensors: Iterable[Written], max_shard_bytes: float) -> Shards:
    """Tensors in their order, as many a file as it holds."""
    found, room = [[]], max_shard_bytes
    for one in tensors:
        if found[-1] and one.size_bytes > room:
            found.append([])
            room = max_shard_bytes
        found[-1].append(one)
        room -= one.size_bytes
    count = len(found)
    return [(SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors", tensors) for i, tensors in enumerate(found)]


def _written(state: Rows, arch: Architecture) -> Iterator[Written]:
    """Every tensor on disk, and the pieces that it is made of."""
    memory = dict.fromkeys(state)
    for name, sources in _names(arch, memory).items():
        if missing := [s.name for s in sources if s.name not in memory]:
            raise CheckpointError(f"the state lacks {', '.join(missing)}, which {name} is made of")
        shapes, dtype = [s.shape(state.shape(s.name)) for s in sources], state.dtype(sources[0].name)
        shape = (sum(one[0] for one in shapes), *shapes[0][1:]) if shapes[0] else ()
        yield Written(name, shape, dtype, functools.partial(_pieces, state, sources))
        if name.endswith("act_fn.alpha_n"):
            for constant, value in _CONSTANTS.items():
                whole = torch.tensor(value, dtype=dtype)
                yield Written(name.replace("act_fn.alpha_n", constant), (), dtype, functools.partial(iter, [whole]))


def _pieces(state: Rows, sources: Sequence[_Source]) -> Iterator[Tensor]:
    for source in sources:
        if source.expert is None:
            for piece in pieces(state, source.name):
                yield source.of(piece)
        else:
            one = state.rows(source.name, source.expert, source.expert + 1)
            yield replace(source, expert=0).of(one)


def write_shard(files: Shards, number: int, folder: Path, metadata: Mapping[str, str] | None = None) -> None:
    """One file of `shards`, under a temporary name until it is whole."""
    name, tensors = files[number]
    temporary = folder / f"{name}.tmp"
    write(temporary, tensors, {**(metadata or {}), "format": "pt"})
    _commit(temporary, folder / name)


def write_index(files: Shards, folder: Path) -> None:
    """What comes last: the index of several files, or its absence."""
    if len(files) == 1:
        (folder / INDEX).unlink(missing_ok=True)  # an older index would be read instead of this file
        return
    placed = {one.name: name for name, tensors in files for one in tensors}
    size = sum(one.size_bytes for _, tensors in files for one in tensors)
    temporary = folder / f"{INDEX}.tmp"
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / SINGLE).unlink(missing_ok=True)  # and an older single file instead of these
    _commit(temporary, folder / INDEX)


def _commit(temporary: Path, path: Path) -> None:
    """Syncs a finished file, gives it its name and syncs the folder."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
