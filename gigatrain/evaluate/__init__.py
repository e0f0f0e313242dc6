"""`gigatrain eval`: tasks of lm-evaluation-harness (tasks.py) and bits per byte of texts (texts.py), on what a user would load: the export."""

import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gigatrain.errors import RunError
from gigatrain.observe import evals
from gigatrain.observe.display import Display


def evaluate(
    folder: Path,
    *,
    tasks: Sequence[str] = (),
    texts: Sequence[Path] = (),
    limit: int | None = None,
    few_shot: int | None = None,
    batch: int = 1,
    context: int | None = None,
    include: Sequence[Path] = (),
    chat: bool = False,
    seed: int = 0,
    device: str | None = None,
    out: Path | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, or an exported model, and return what was found.

    Of a run, or of the export/ within one, it is kept in RUN/evals/ too, for report and model card; `out` is a file of the caller's own. Raises RunError.
    """
    from gigatrain import floors
    from gigatrain.generate import exported, opened

    if not tasks and not texts:
        raise RunError("nothing to evaluate: name --tasks A,B (lm-evaluation-harness) or --bits-per-byte FILE …, or both")
    if out is not None and not out.absolute().parent.is_dir():
        raise RunError(f"{out} cannot be written: there is no folder {out.absolute().parent}; make it, or name another --out")
    floors.versions()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the harness and of datasets, in a log; read when tqdm is imported
    from gigatrain.evaluate import tasks as harness
    from gigatrain.evaluate import texts as measured

    if tasks:
        harness.installed()  # before a model is exported and read
    documents = [one for path in texts for one in measured.documents(path)]
    say = display.line if display else lambda line: None
    with exported(folder, newest=True) as place:
        loaded = harness.chosen(tasks, include) if tasks else None
        import torch

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer, model = opened(place, device)
        began = time.monotonic()
        found = _of(folder, place) | {"settings": {"chat": chat, "device": device, "seed": seed, "batch": batch}}
        if loaded is not None:
            found["tasks"] = harness.run(loaded, model, tokenizer, limit=limit, few_shot=few_shot, batch=batch, chat=chat, seed=seed)
            found["settings"] |= {"limit": limit, "few_shot": few_shot, "include": [str(path) for path in include]}
        if texts:
            found["texts"] = measured.measure(documents, model, tokenizer, context=context, batch=batch)
        found |= {"wall_s": round(time.monotonic() - began, 3), "versions": _versions(tasks=bool(tasks))}
    run = _run_of(folder)
    if run is not None:
        say(f"kept in {evals.keep(run, found)}")
    if out is not None:
        out.write_text(json.dumps(found, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
        say(f"written to {out}")
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """What was found, for people."""
    told = [f"{found['model']}, step {found['step']:,}" if found["step"] is not None else found["model"]]
    for task, row in found.get("tasks", {}).items():
        part = f" of the first {row['limit']:,}" if row["limit"] else ""
        for name, one in row["metrics"].items():
            error = f" ± {one['stderr']:.4f}" if one["stderr"] is not None else ""
            value = "not finite" if one["value"] is None else f"{one['value']:.{4 if abs(one['value']) < 1e6 else 0}f}{error}"
            told.append(f"  {task:30} {name.removesuffix(',none'):24} {value:20} {row['few_shot']}-shot, {row['samples']:,} samples{part}")
    for row in found.get("texts", ()):
        told.append(
            f"  {row['text']:30} {row['bits_per_byte']:.4f} bits per byte, loss {row['loss']:.4f} a token, {row['bytes']:,} bytes, "
            f"{row['tokens']:,} tokens ({row['bytes'] / row['tokens']:.2f} bytes each), context {row['context']:,}"
        )
    return told


def _run_of(folder: Path) -> Path | None:
    """The run whose folder, or whose export/, this is."""
    if (folder / "run.json").is_file():
        return folder
    above = folder.absolute().parent
    return above if folder.absolute().name == "export" and (above / "run.json").is_file() else None


def _of(folder: Path, place: Path) -> dict[str, Any]:
    """Whose numbers these are: the model, and the run, step and plan that it is of where it is an export of ours."""
    from gigatrain.export import MARK

    path = place / MARK
    mark = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {
        "format": 1,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": str(folder),
        "run": mark.get("run"),
        "step": mark.get("step"),
        "plan_sha256": mark.get("plan_sha256"),
    }


def _versions(*, tasks: bool) -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("gigatrain", "torch", "transformers", "tokenizers", *(["lm_eval"] if tasks else []))}
