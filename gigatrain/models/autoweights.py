"""Weights of a transformers model: drawn, read and written under transformers' own names, so that nothing is translated."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gigatrain.errors import CheckpointError, PlanError
from gigatrain.foreign import Foreign
from gigatrain.models import hf
from gigatrain.models.automodel import Auto, build, emptied, initialize, layer_lists, owner_of


def tensors(model: Auto, folder: str | Path, boxes: Mapping[str, hf.Box] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of `model`, whole or its box, on the CPU, in the folder's dtype, by name; its persistent buffers are filled on the way.

    One tensor in memory at a time where the folder's names are the model's, with or without its base model's prefix. Where transformers stores a family
    otherwise (experts one by one), it reads the whole model on every rank. Raises CheckpointError for what is missing or of another shape.
    """
    folder, boxes = Path(folder), boxes or {}
    files = hf._files(folder)
    buffers = model.persistent()
    wanted = model.shapes | {name: tuple(buffer.shape) for name, buffer in buffers.items()}
    prefix = f"{model.model.base_model_prefix}."
    stored = {name: next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in files), None) for name in wanted}
    if any(stored[name] is None for name in model.shapes):
        found: Iterator[tuple[str, Any]] = _loaded(model, folder)
    else:
        _refuse_untied(model, files, prefix)
        found = ((name, _slice(files[at], at)) for name, at in stored.items() if at is not None)
    for name, stored_tensor in found:
        shape = tuple(stored_tensor.shape if isinstance(stored_tensor, Tensor) else stored_tensor.get_shape())
        if shape != wanted[name]:
            raise CheckpointError(f"{name} is {list(shape)} in {folder}, but {list(wanted[name])} by the model's config.json")
        start, size = boxes.get(name, ((0,) * len(shape), shape))
        if 0 in size and 0 not in shape:
            continue
        tensor = stored_tensor[hf.cut_of(start, size)] if shape else _read(files[at], at) if (at := stored[name]) else stored_tensor
        if name in buffers:
            model.keep(name, tensor)
        else:
            yield name, tensor


def _slice(path: Path, name: str) -> Any:
    with hf._open(path) as file:
        return file.get_slice(name)


def _read(path: Path, name: str) -> Tensor:
    with hf._open(path) as file:
        return file.get_tensor(name)


def _refuse_untied(model: Auto, files: Mapping[str, Path], prefix: str) -> None:
    """A folder that holds two different tensors where the config ties them."""
    for name, source in model.model.all_tied_weights_keys.items():
        at, of = (next((n for n in (key, prefix + key, key.removeprefix(prefix)) if n in files), None) for key in (name, source))
        if at is not None and of is not None and at != of and not torch.equal(_read(files[at], at), _read(files[of], of)):
            raise CheckpointError(
                f"{at} and {of} differ, but config.json ties them (tie_word_embeddings); set it to false in the folder's config.json"
            )


def _loaded(model: Auto, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """By transformers, which knows how each family's released names become its modules' names."""
    import transformers

    try:
        whole, report = cast(Any, transformers.AutoModelForCausalLM).from_pretrained(
            folder,
            config=model.config,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as failure:  # of any kind: torn files, other shapes, other families
        raise CheckpointError(f"{folder} cannot be loaded: {str(failure).splitlines()[0][:300]}") from None
    if missing := sorted(set(report["missing_keys"]) & model.shapes.keys()):
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:5])}")
    held = dict(whole.named_parameters()) | dict(whole.named_buffers())
    for name in [*model.shapes, *model.persistent()]:
        yield name, held[name].detach()


def save(
    state: Mapping[str, Tensor], numbers: Foreign, folder: str | Path, *, dtype: torch.dtype, tokens: Mapping[str, Any] | None = None
) -> list[Path]:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads, and returns the weights' files: safetensors, and config.json with `tokens`.

    `state` holds every parameter, tied ones once, and the persistent buffers, in `dtype`, on the CPU, under the names of modules; on disk they have those
    of the family's released files, as transformers writes them. `tokens` are bos_token_id and the like.
    """
    import transformers

    folder = Path(folder)
    model = build(numbers.config, dtype)
    if missing := sorted({name for name, _ in model.named_parameters()} - state.keys()):
        raise CheckpointError(f"the state lacks {', '.join(missing[:5])}")
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, state_dict={name: tensor.detach() for name, tensor in state.items()}, max_shard_size="5GB")
    config = numbers.config | {key: value for key, value in (tokens or {}).items() if value is not None}
    config |= {"architectures": [numbers.class_name], "dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    paths = sorted(path for path in folder.iterdir() if path.name.startswith("model") and ".safetensors" in path.name)
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return paths


def fresh(config: Mapping[str, Any], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's first value, whole, in fp32 on the CPU, as transformers draws it for this family; a layer in memory at a time.

    A layer's numbers depend on `seed`, its name and the config only: not on rank, device or the other layers. The rest is drawn together.
    Raises PlanError for a parameter that transformers' code leaves without a value: such a model starts from a folder.
    """
    model = build(config, torch.float32)
    lists = layer_lists(model)
    names = {id(p): name for name, p in model.named_parameters()}
    with emptied(lists):
        yield from _drawn(model, model, names, f"{seed}/")
    for prefix, held in lists:
        for index, layer in held.named_children():
            name = f"{prefix}.{index}"
            owners = [m for at, m in model.named_modules() if hasattr(m, "_init_weights") and f"{name}.".startswith(f"{at}." if at else "")]
            yield from _drawn(layer, owners[-1], names, f"{seed}/{name}")


@torch.no_grad()
def _drawn(unit: nn.Module, model: Any, names: Mapping[int, str], seed: str) -> Iterator[tuple[str, Tensor]]:
    wanted = {id(p): names[id(p)] for p in unit.parameters() if id(p) in names}
    order = list(unit.named_parameters(remove_duplicate=False))
    meta = dict(order)
    for where, p in order:
        owner, leaf = owner_of(unit, where)
        if p.is_meta:
            owner._parameters[leaf] = nn.Parameter(torch.full(p.shape, torch.nan), requires_grad=False)
    tied = model.all_tied_weights_keys if unit is model else {}  # whose values are those of what they are tied to
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1)
        initialize(unit, model)
    for where, p in order:
        owner, leaf = owner_of(unit, where)
        drawn = cast(Tensor, owner._parameters[leaf]).detach()
        owner._parameters[leaf] = cast(nn.Parameter, meta[where])
        if where in tied or id(p) not in wanted:
            continue
        name = wanted.pop(id(p))
        if drawn.isnan().any():
            raise PlanError(f"model.from: transformers has no first value for {name}; start from a folder with weights")
        yield name, drawn
    assert not wanted
