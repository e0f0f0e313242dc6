"""A run's weights as a folder that transformers loads: safetensors, config.json and the tokenizer, all under transformers' names."""

import functools
import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gigatrain import architectures, run
from gigatrain.architectures import Architecture
from gigatrain.checkpoint import Found, sync_folder, write_text
from gigatrain.data.tokenizer import Tokenizer
from gigatrain.engines import source
from gigatrain.errors import RunError
from gigatrain.exporting.card import card
from gigatrain.exporting.generation import ends_of_turn, generation_config, has_template
from gigatrain.foreign import Foreign
from gigatrain.models import autoweights, hf
from gigatrain.models.decoder import kind_of
from gigatrain.models.merged import Merged, write_peft
from gigatrain.models.streamed import Rows
from gigatrain.observe.display import Display

MARK = "gigatrain.json"  # which run, step and plan an export is of


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy the tokenizer's files into the run folder, so that an export needs nothing outside it."""
    target = folder / "tokenizer"
    target.mkdir(exist_ok=True)
    for name in tokenizer.files:
        shutil.copyfile(tokenizer.folder / name, target / name)


def export(
    folder: Path,
    target: Path,
    *,
    shard_bytes: float = 5e9,
    processes: int = 1,
    adapter: bool = False,
    display: Display | None = None,
) -> int:
    """Write the newest whole checkpoint of the run in `folder` to `target`, in the precision that the run computed in; returns its step.

    Files of at most `shard_bytes` are written straight from the checkpoint's boxes, each by one of `processes`, which holds some 16 MiB of the model (or one
    expert's matrices) at a time. A run with an adapter is merged into its base, one matrix at a time, or, if `adapter`, written as peft has it, without the
    base. `target` is whole or as it was: all is written beside it and renamed. Raises CheckpointError without a whole checkpoint or beside another base,
    RunError when `target` holds something that we did not export.
    """
    plan = run.stored_plan(folder)
    if adapter and plan.adapter is None:
        raise RunError(f"{folder} has no adapter: its recipe has no [adapter], and trained the weights; export without --adapter")
    found, refused = run.checkpoints(folder).latest()
    if plan.adapter is not None:
        source.check_base(found.state.get("base", {}), source.base_of(plan))
    target = target.absolute()
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / MARK).is_file())):
        raise RunError(f"{target} holds something that gigatrain did not export, and would be lost; name another folder")
    if display:
        for reason in refused:
            display.line(f"CHECKPOINT REFUSED: {reason}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        written = Path(temporary) / "export"
        written.mkdir()
        dtype = torch.bfloat16 if plan.compute == "bf16" else torch.float32
        weights, tokens = _Rounded(found, dtype, foreign=isinstance(plan.architecture, Foreign)), _special_tokens(folder / "tokenizer")
        turns, why = ends_of_turn(folder / "tokenizer")
        if why and display:
            display.line(f"  export   generation_config.json names no end of a turn: {why}")
        generation = generation_config(tokens, turns, plan.sample, hf.kept(plan.source) if plan.source else None)
        if plan.adapter is not None:
            weights = Merged(plan, found.tensors("weights"), dtype)
        if adapter:
            assert isinstance(weights, Merged)
            write_peft(weights, written)
        elif isinstance(plan.architecture, Foreign):
            assert isinstance(weights, _Rounded)
            numbered = {f"{key}_token_id": value for key, value in tokens.items()}
            autoweights.save(weights, plan.architecture, written, dtype=dtype, tokens=numbered)
        else:
            _write(weights, plan.architecture, written, shard_bytes, processes)
            config = architectures.to_hf_config(
                plan.architecture, max_positions=plan.positions, dtype=str(dtype).removeprefix("torch."), **tokens
            )
            write_text(written / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        if not adapter:
            write_text(written / "generation_config.json", json.dumps(generation, indent=2) + "\n")
        for path in (folder / "tokenizer").iterdir():
            shutil.copyfile(path, written / path.name)
        write_text(written / "README.md", card(folder, plan, step=found.step, chat=has_template(folder / "tokenizer"), adapter=adapter))
        write_text(written / MARK, json.dumps({"run": found.manifest["run"], "step": found.step, "plan_sha256": plan.sha256}) + "\n")
        if target.exists():
            target.rename(Path(temporary) / "before")
        written.rename(target)
        sync_folder(target.parent)
    return found.step


def _write(weights: Rows, arch: Architecture, folder: Path, shard_bytes: float, processes: int) -> None:
    """All files, the index last. Which tensors a file holds follows from shapes, so that its writer needs to know of no other's."""
    files = hf.shards(weights, arch, shard_bytes)
    processes = min(processes, len(files))
    if processes > 1:
        ends = [_start(weights, arch, folder, shard_bytes, part, processes) for part in range(processes)]
        for process in ends:
            process.join()
        if failed := [process.exitcode for process in ends if process.exitcode]:
            raise RunError(
                f"a process that wrote files of the export ended with {failed[0]}; what it said is above, and nothing was exported"
            )
    else:
        _write_part(weights, arch, folder, shard_bytes, 0, 1)
    hf.write_index(files, folder)


def _start(*arguments: Any) -> Any:
    """A process that writes its part of the files; it starts from nothing, since a fork of a process with threads may hang."""
    process = multiprocessing.get_context("spawn").Process(target=_write_part, args=arguments, daemon=True)
    process.start()
    return process


def _write_part(weights: Rows, arch: Architecture, folder: Path, shard_bytes: float, part: int, parts: int) -> None:
    files = hf.shards(weights, arch, shard_bytes)
    for number in range(part, len(files), parts):
        hf.write_shard(files, number, folder)


class _Rounded(Mapping[str, torch.Tensor]):
    """A checkpoint's weights in the export's dtype, of which any rows are read when they are asked for: nothing is kept."""

    def __init__(self, found: Found, dtype: torch.dtype, *, foreign: bool) -> None:
        self.found, self.precision, self.foreign = found, dtype, foreign
        self.tensors = found.tensors("weights")

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(_Rounded, foreign=self.foreign), (self.found, self.precision)

    def dtype(self, name: str) -> torch.dtype:
        """fp32 stays for what is fp32 in every file, since its steps are below bf16's."""
        return torch.float32 if not self.foreign and kind_of(name) == "state" else self.precision

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.tensors.stored[name].shape

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows along dim 0, rounded."""
        return self.tensors.rows(name, start, stop).to(self.dtype(name))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name].to(self.dtype(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


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
