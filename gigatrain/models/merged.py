"""An adapter and its base as files: merged into one model, W + s B A (DoRA: each row scaled to its length), or apart as peft has them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gigatrain.errors import RunError
from gigatrain.models import hf, nf4
from gigatrain.models.adapters import CONFIG, WEIGHTS, row_lengths
from gigatrain.models.decoder import Decoder, initial, kind_of
from gigatrain.models.streamed import Held, Written, pieces, write
from gigatrain.planning import adapting
from gigatrain.planning.plan import Plan


def shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Of every tensor of the base."""
    with torch.device("meta"):
        model = Decoder(plan.decoder)
    return {name: tuple(tensor.shape) for name, tensor in (dict(model.named_parameters()) | model.corrections()).items()}


class Merged(Mapping[str, Tensor]):
    """The whole model of a run with an adapter, in `dtype`, one tensor at a time: of `trained`, what its checkpoint has, and of the base's folder.

    What the adapter was trained beside is what it is merged into: the base rounded to the run's precision, or to its 4 bits.
    """

    def __init__(self, plan: Plan, trained: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        assert plan.adapter is not None
        self.plan, self.adapter, self.trained, self.precision = plan, plan.adapter, trained, dtype
        self.shapes = shapes(plan)
        self.compute = torch.bfloat16 if plan.compute == "bf16" else torch.float32
        self._of_folder = None if plan.source is None else hf.reader(plan.decoder, self.shapes, hf.locate(plan.source))
        self._last: tuple[str, Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Merged, (self.plan, self.trained, self.precision)

    def base(self, name: str) -> Tensor:
        """A tensor of the base."""
        if self._of_folder is not None:
            return self._of_folder(name)
        plan = self.plan
        return initial(name, self.shapes[name], plan.decoder, plan.init.std, plan.init.scale_residual, plan.seed, "cpu")

    def dtype(self, name: str) -> torch.dtype:
        """fp32 stays for what is fp32 in every file, since its steps are below bf16's."""
        return torch.float32 if kind_of(name) == "state" else self.precision

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows along dim 0; the tensor that they are of is kept until another is asked for."""
        if self._last is None or self._last[0] != name:
            self._last = name, self[name]
        return self._last[1][start:stop] if self.shapes[name] else self._last[1]

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        if name in self.trained:
            return self.trained[name].to(self.dtype(name))
        weight, owner = self.base(name), name.removesuffix(".weight")
        if kind_of(name) == "state":
            return weight.float()
        weight = (_narrowed(weight) if self.narrow(name) else weight).to(self.compute).float()
        if f"{owner}.lora_A" in self.trained:
            a, b = (self.trained[f"{owner}.lora_{which}"].float() for which in "AB")
            length = torch.linalg.vector_norm(weight, dim=1)
            weight = weight + self.adapter.scale * (b @ a)
            if self.adapter.kind == "dora":
                length = length + self.trained[f"{owner}.lora_growth"].float()
                weight = weight * (length / torch.linalg.vector_norm(weight, dim=1))[:, None]
        return weight.to(self.dtype(name))

    def narrow(self, name: str) -> bool:
        """Whether a weight was kept in 4 bits: the layers' matrices."""
        return self.adapter.quantise == "nf4" and any(name.endswith(f".{end}.weight") for end in adapting.matrices(self.plan.decoder))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _narrowed(weight: Tensor) -> Tensor:
    return nf4.restored(*nf4.quantised(weight), torch.float32)


def write_peft(merged: Merged, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, which peft loads beside the base. Raises RunError for a family whose files hold other matrices."""
    plan, adapter, trained = merged.plan, merged.adapter, merged.trained
    if plan.decoder.family in hf.FUSED:
        raise RunError(
            f"transformers' {plan.decoder.family} keeps queries, keys and values as one matrix, where this adapter has one for each; export without "
            "--adapter, which merges it"
        )
    found: dict[str, Tensor] = {}
    for name in trained:
        owner, _, leaf = name.rpartition(".")
        if leaf == "lora_growth":
            weight = f"{owner}.weight"
            length = row_lengths(merged.base(weight), merged.compute, narrow=merged.narrow(weight))
            found[f"base_model.model.{owner}.lora_magnitude_vector"] = length + trained[name].float()
        elif leaf in ("lora_A", "lora_B"):
            found[f"base_model.model.{name}.weight"] = trained[name].float()
        else:
            found[f"base_model.model.{name}"] = trained[name].float()
    whole = {"model.embed_tokens.weight": "embed_tokens", "lm_head.weight": "lm_head"}
    saved = [module for name, module in whole.items() if name in trained]
    if saved and plan.decoder.tied:  # peft gives each its own copy, which are equal
        found["base_model.model.lm_head.weight"] = found["base_model.model.model.embed_tokens.weight"]
        saved = ["embed_tokens", "lm_head"]
    ends = [name for name in adapting.matrices(plan.decoder) if adapting.targeted(name, adapter.targets)]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # A folder by its whole path: whoever loads the adapter stands elsewhere.
        "base_model_name_or_path": str(place.absolute())
        if plan.source and (place := Path(plan.source).expanduser()).is_dir()
        else plan.source or "",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": ends,
        "modules_to_save": saved or None,
    }
    held = Held(found)
    tensors = [Written(name, held.shape(name), held.dtype(name), lambda name=name: pieces(held, name)) for name in sorted(found)]
    write(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
