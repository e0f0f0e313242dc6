"""A run's weights as a folder that transformers loads: safetensors, config.json and the tokenizer, all under transformers' names."""

import json
import shutil
from pathlib import Path

import torch

from gigatrain import architectures, run
from gigatrain.checkpoint import write_text
from gigatrain.data.tokenizer import Tokenizer
from gigatrain.errors import RunError
from gigatrain.models import hf
from gigatrain.observe.display import Display


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the tokenizer's files into the run folder, so that an export needs nothing outside it."""
    target = folder / "tokenizer"
    target.mkdir(exist_ok=True)
    for name in tokenizer.files:
        shutil.copyfile(tokenizer.folder / name, target / name)


def export(folder: Path, target: Path, *, display: Display | None = None) -> int:
    """Write the newest whole checkpoint of the run in `folder` to `target`, in the precision that the run computed in; returns its step.

    Raises CheckpointError without a whole checkpoint, RunError when `target` holds something that is not an export.
    """
    plan = run.stored_plan(folder)
    found, refused = run.checkpoints(folder).latest()
    if target.exists() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise RunError(f"{target} is not empty and not an export; name another folder")
    if display:
        for reason in refused:
            display.line(f"CHECKPOINT REFUSED: {reason}")
    target.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    weights = {name: tensor.to(dtype) for name, tensor in found.tensors("weights").items()}
    hf.save_weights(weights, plan.architecture, target, metadata={"format": "pt", "gigatrain_plan": plan.sha256, "step": str(found.step)})
    tokens = _special_tokens(folder / "tokenizer")
    config = architectures.to_hf_config(plan.architecture, max_positions=plan.positions, dtype=str(dtype).removeprefix("torch."), **tokens)
    write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    if tokens:
        ids = {f"{key}_token_id": value for key, value in tokens.items() if value is not None}
        write_text(target / "generation_config.json", json.dumps(ids, indent=2) + "\n")
    if (folder / "tokenizer").is_dir():
        for path in (folder / "tokenizer").iterdir():
            shutil.copyfile(path, target / path.name)
    return found.step


def _special_tokens(folder: Path) -> dict[str, int | None]:
    """Ids of the tokens that begin, end and pad a text, from the tokenizer's own files."""
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    config = json.loads((folder / "tokenizer_config.json").read_text()) if (folder / "tokenizer_config.json").is_file() else {}

    def number(key: str) -> int | None:
        token = config.get(f"{key}_token")
        text = token.get("content") if isinstance(token, dict) else token
        return tokenizer.token_to_id(text) if isinstance(text, str) else None

    return {key: number(key) for key in ("bos", "eos", "pad")}
