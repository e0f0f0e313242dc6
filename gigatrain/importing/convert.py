"""`gigatrain import`: a foreign checkpoint -> a folder for transformers, which `model.from` starts a run from.

The parent knows the architecture, from a recipe or a config.json, and reads nothing of the source; a locked child (sandbox.py) reads it and writes the
safetensors, tensor by tensor; the parent then adds config.json and gives the folder its name.
"""

import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigatrain import architectures, load
from gigatrain.architectures import Architecture
from gigatrain.checkpoint import sync_folder, write_text
from gigatrain.config import Recipe
from gigatrain.errors import CheckpointError, RunError
from gigatrain.foreign import native
from gigatrain.importing import sandbox

MARK = "gigatrain.json"  # of whose making a folder is


@dataclass(frozen=True)
class Imported:
    """What came of it: the source in words, the tensors and bytes written, what of the source was not taken, and which walls stood."""

    kind: str
    tensors: int
    size_bytes: int
    left: str
    walls: Mapping[str, bool]

    def lines(self) -> list[str]:
        """For a reader."""
        stood = [name for name, up in self.walls.items() if up]
        lacked = [name for name, up in self.walls.items() if not up]
        return [
            f"{self.kind}: {self.tensors} tensors, {self.size_bytes / 2**30:.2f} GiB",
            *([f"not taken: {self.left}"] if self.left else []),
            f"it was read without unpickling, in a process with walls around: {', '.join(stood) or 'nothing'}"
            + (f"; this kernel has none for: {', '.join(lacked)}" if lacked else ""),
        ]


def convert(
    source: Path,
    target: Path,
    *,
    recipe: Recipe | None = None,
    config: Path | None = None,
    dtype: str | None = None,
    shard_bytes: float = 5e9,
) -> Imported:
    """Write `source`'s weights to `target`, under the numbers of a recipe's model or of a config.json, in `dtype` (bf16, fp32; None: as they are stored).

    Raises CheckpointError for what is damaged, hostile or of other names and shapes, RunError when `target` holds something of others.
    """
    source, target = source.expanduser().absolute(), target.expanduser().absolute()
    arch, described = _numbers(source, recipe, config)
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or _ours(target))):
        raise RunError(f"{target} holds something that gigatrain did not import, and would be lost; name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        written = Path(temporary) / "import"
        written.mkdir()
        request = {
            "source": str(source),
            "folder": str(written),
            "architecture": arch.model_dump(mode="json"),
            "dtype": dtype,
            "shard": shard_bytes,
        }
        found = sandbox.run(request, source, written)
        described |= {"dtype": found.pop("dtype")}
        write_text(written / "config.json", json.dumps(described, indent=2, sort_keys=True) + "\n")
        write_text(written / MARK, json.dumps({"imported": str(source), "kind": found["kind"]}) + "\n")
        if target.exists():
            target.rename(Path(temporary) / "before")
        written.rename(target)
        sync_folder(target.parent)
    return Imported(**found)


def _ours(target: Path) -> bool:
    try:
        return "imported" in json.loads((target / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _numbers(source: Path, recipe: Recipe | None, config: Path | None) -> tuple[Architecture, dict[str, Any]]:
    """The architecture, and config.json as the folder will have it."""
    if recipe is not None:
        arch = load.architecture(recipe.model)
        assert isinstance(arch, Architecture)  # others need torch to be measured, and are refused without
        return arch, architectures.to_hf_config(
            arch, max_positions=max(recipe.train.sequence, load.positions(recipe.model)), dtype="float32", bos=None, eos=None, pad=None
        )
    path = config or (source if source.is_dir() else source.parent) / "config.json"
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist, and the numbers of the model are not known without it; name a config.json or --recipe"
        )
    described = load.config_json(str(path.parent)) if path.name == "config.json" else json.loads(path.read_text(encoding="utf-8"))
    if not native(described):
        raise CheckpointError(
            f"{path} is of a {described.get('model_type')}, which is none of our families; load it with transformers and save it there"
        )
    return architectures.from_hf_config(described), dict(described)


def inside(request: Mapping[str, Any]) -> dict[str, Any]:
    """Of the locked child: find, name, check and write every tensor."""
    import torch

    from gigatrain.importing import names, sources
    from gigatrain.models import hf
    from gigatrain.models.decoder import Decoder
    from gigatrain.models.streamed import PIECE, Written

    arch = Architecture.model_validate_json(json.dumps(request["architecture"]))
    source = sources.found(Path(request["source"]))
    with torch.device("meta"):
        model = Decoder(arch)
    parameters = dict(model.named_parameters()) | model.corrections()
    shapes = hf.on_disk(arch, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    found = names.for_transformers(source, shapes, arch)
    wide = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}[request["dtype"]]
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"{name} is {list(found[name].shape)} in the {source.kind} checkpoint, but {list(shape)} by the architecture's numbers"
            )
        if not found[name].dtype.is_floating_point:
            raise CheckpointError(f"{name} is {found[name].dtype} in the {source.kind} checkpoint, and weights are floating-point numbers")

    def pieces(name: str, dtype: Any) -> Any:
        shape = shapes[name]
        each = max(1, PIECE // max(1, 4 * torch.Size(shape[1:]).numel())) if shape else 1
        for start in range(0, shape[0] if shape else 1, each):
            yield found[name].rows(start, min(shape[0], start + each) if shape else 1).to(dtype)

    written = [
        Written(name, shape, dtype, functools.partial(pieces, name, dtype))
        for name, shape in shapes.items()
        for dtype in [wide or found[name].dtype]
    ]
    files = hf.cut(written, request["shard"])
    for number in range(len(files)):
        hf.write_shard(files, number, Path(request["folder"]))
    hf.write_index(files, Path(request["folder"]))
    common = max(written, key=lambda one: one.size_bytes).dtype
    size = sum(one.size_bytes for one in written)
    return {
        "kind": source.kind,
        "tensors": len(written),
        "size_bytes": size,
        "left": source.left,
        "dtype": str(common).removeprefix("torch."),
    }
