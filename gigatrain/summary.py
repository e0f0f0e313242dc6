"""What is left of a run that finished: its summary, a sample of its text, and the last lines on the screen."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from gigatrain import run
from gigatrain.checkpoint import Checkpoints, Saving, weights_sha256, write_text
from gigatrain.data import shown
from gigatrain.data.corpus import Corpus
from gigatrain.errors import RunError
from gigatrain.observe.display import Display
from gigatrain.observe.metrics import Metrics, percentile, versions
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning.plan import Plan


def read(folder: Path) -> dict[str, Any]:
    """summary.json of a run that finished before. Raises RunError where it is not what a run writes."""
    path = folder / "summary.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("wall_s"), (int, float)):
            raise ValueError("it does not say how long the run took")
        return found
    except (OSError, ValueError, RecursionError) as failure:
        raise RunError(f"{path} is not what a run writes ({failure}); remove it, and --resume makes it again") from None


def of(plan: Plan, this: run.Run, saves: Checkpoints, saving: Saving, corpus: Corpus, metrics: Metrics, mesh: Mesh) -> dict[str, Any]:
    """The numbers that a run is judged by; the README says what each is. Of other ranks than 0 it is empty."""
    if mesh.rank:
        return {}
    last, held = metrics.last, corpus.totals("validation")
    return {
        "name": plan.name,
        "run": this.id,
        "plan_sha256": plan.sha256,
        "steps": this.step,
        "tokens": this.tokens,
        "loss": last.get("loss"),
        "val_loss": last.get("val_loss"),
        "bits_per_byte": last.get("val_bits_per_byte"),
        "xz_bits_per_byte": 8 * held["xz_bytes"] / held["text_bytes"] if held["xz_bytes"] and held["text_bytes"] else None,
        "tokens_per_s": metrics.tokens_per_s(),
        "step_s_p50": percentile(metrics.step_s, 0.5),
        "step_s_p99": percentile(metrics.step_s, 0.99),
        "wall_s": None,
        "parameters": plan.parameters,
        "bad_steps": last.get("bad_steps"),
        "spikes": last.get("spikes"),
        "rollbacks": last.get("rollbacks", 0),
        "resumes": this.resumes,
        "checkpoint": saving.totals.json(),
        "weights_sha256": weights_sha256(saves.found(this.step)),
        "peak_bytes": torch.cuda.max_memory_allocated() if plan.device == "cuda" else None,
        "device": torch.cuda.get_device_name() if plan.device == "cuda" else "cpu",
        "versions": versions(),
    }


def sample(plan: Plan, folder: Path, display: Display, corpus: Corpus) -> None:
    """A text that goes on from the recipe's prompt, and answers to held-out conversations, which samples.jsonl keeps for the report."""
    held = shown.asked(corpus, plan.sample.held_out)
    if plan.sample.prompt is None and not held:
        return
    from gigatrain import generate  # transformers, 3 s

    settings = {"tokens": plan.sample.tokens, "temperature": plan.sample.temperature, "top_k": plan.sample.top_k, "seed": plan.seed}
    width = min(100, shutil.get_terminal_size().columns)
    if plan.sample.prompt is not None:
        text = generate.generate(folder, plan.sample.prompt, device=plan.device, **settings)
        display.line(f"{' sample ':-^{width}}\n{text}\n{'-' * width}")
    if not held:
        return
    written = generate.answers(folder, [(one.prompt, one.answer[-1]) for one in held], device=plan.device, **settings)
    backend = corpus.tokenizer().backend
    rows = [
        {
            name: backend.decode(ids, skip_special_tokens=False)
            for name, ids in (("prompt", one.prompt), ("held_out", one.answer), ("written", found))
        }
        for one, found in zip(held, written, strict=True)
    ]
    write_text(folder / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for row in rows:
        display.line(f"{' held-out prompt ':-^{width}}\n{row['prompt']}⟪{row['written']}⟫")
    display.line("-" * width)


def show(summary: dict[str, Any], folder: Path, display: Display) -> None:
    """Speed, what held-out text costs, and where the run lies."""
    speed = f"; steps ran at {summary['tokens_per_s']:,.0f} tokens/s" if summary["tokens_per_s"] else ""
    display.line(f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in {summary['wall_s']:.0f} s{speed}")
    if summary["bits_per_byte"]:
        xz = summary["xz_bits_per_byte"]
        display.line(f"held-out text: {summary['bits_per_byte']:.3f} bits per byte" + (f"; xz -9 on the same text: {xz:.3f}" if xz else ""))
    display.line(f"run folder: {folder}")
