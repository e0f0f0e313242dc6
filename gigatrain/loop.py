"""The training loop. Read this first.

Everything a run does, from its plan to its last checkpoint, is in `train`, in order. It knows no backend and no parallelism: engines and
data do, behind their seams.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gigatrain import export, run
from gigatrain.checkpoint import Checkpoints, fill, write_text
from gigatrain.data import build
from gigatrain.data.loader import Batches, Validation
from gigatrain.engines import Engine
from gigatrain.engines.native import Native
from gigatrain.errors import CheckpointError, RunError
from gigatrain.kernels import ops
from gigatrain.models import hf
from gigatrain.models.decoder import Decoder
from gigatrain.observe.display import Display
from gigatrain.observe.health import Health
from gigatrain.observe.metrics import Metrics, percentile, versions
from gigatrain.optim import schedule
from gigatrain.planning.plan import Plan


def train(plan: Plan, folder: Path, *, start: run.Start = "auto", display: Display | None = None) -> dict[str, Any] | None:
    """One run, from its plan to its last checkpoint; returns its summary, or None when a signal ended it early.

    Raises DataError, CheckpointError and RunError; whatever it raises, committed checkpoints are whole.
    """
    display = display or Display()
    began = time.monotonic()
    with display, run.opened(plan, folder, start) as (this, resumes), contextlib.ExitStack() as stack:
        device = _device(plan)
        corpus = build.build(plan.data, plan.tokenizer, progress=display.advance)
        _fits(plan, corpus)
        export.keep_tokenizer(corpus.tokenizer(), folder)
        engine: Engine = Native(plan, _model(plan, device))
        batches = Batches(
            corpus,
            sequence=plan.sequence,
            packing=plan.data.packing,
            batch=plan.batch,
            microbatch=plan.microbatch,
            seed=plan.seed,
            device=device,
        )
        stack.callback(batches.close)
        saves = Checkpoints(folder, run=this.id, plan_sha256=plan.sha256, keep=plan.checkpoint.keep)
        kept: dict[str, Any] = {}
        if resumes:
            kept = _resume(saves, engine, batches, this, display)
        before = this.elapsed_s
        if this.step == plan.steps and (folder / "summary.json").is_file() and (not plan.export or (folder / "export").is_dir()):
            display.line(f"{folder} is finished: nothing is left to do")
            return json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        display.advance("train", this.step, plan.steps)

        with Metrics(plan, folder, device, step=this.step, show=lambda window: display.window(plan, window)) as metrics, Health(plan) as health:
            metrics.load(kept)

            def save(*, final: bool = False) -> None:
                this.elapsed_s = before + time.monotonic() - began
                state = {"run": this.state(), "data": batches.state(), "metrics": metrics.state()}
                _save(saves, this.step, engine, state, display, final=final)

            if not resumes:
                save()  # step 0: from here on, a kill at any moment leaves something to resume
            metrics.clock.restart()
            while this.step < plan.steps:
                batch = next(batches)
                loss = engine.forward_backward(batch)
                rate = schedule.rate(plan.schedule, this.step, plan.steps)
                grad_norm = engine.step(rate)
                this.advance(batch.tokens)
                metrics.add(loss, grad_norm, batch.targets)
                if this.step % plan.report.every == 0 or this.step == plan.steps:
                    bad = metrics.report(this.step, this.tokens, rate, engine.bad)
                    health.check_bad(bad, lambda first: _samples(plan, batches, first))
                if _validates_at(plan, this.step):
                    metrics.write(_validate(plan, engine, corpus, this.step, device))
                    metrics.clock.restart()
                if (this.step % plan.checkpoint.every == 0 and this.step < plan.steps) or health.wants_out:
                    save()
                    metrics.clock.restart()
                if health.wants_out and this.step < plan.steps:
                    display.line(f"{health.signal}: saved at step {this.step} of {plan.steps}; go on with --resume --run {folder}")
                    return None
            save(final=True)
            summary = _summary(plan, this, engine, corpus, metrics)

        if plan.export:
            export.export(folder, folder / "export", display=display)
            _show_sample(plan, folder, display)
        summary["wall_s"] = round(before + time.monotonic() - began, 3)
        write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        _show_summary(summary, folder, display)
        return summary


def _device(plan: Plan) -> torch.device:
    """The plan's device, able to do what the plan says; sets the process-wide switches of the run."""
    if plan.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(plan.deterministic)
    if plan.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RunError(
            f"the plan is for site {plan.site!r} with a CUDA device, but torch {torch.__version__} finds none; "
            "install a CUDA build of torch, or choose --site laptop"
        )
    if plan.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RunError(f"{torch.cuda.get_device_name()} has no bf16 arithmetic; --set train.precision=fp32")
    return torch.device("cuda", 0)


def _model(plan: Plan, device: torch.device) -> Decoder:
    """The decoder with fp32 weights on the device: built on meta, then drawn from the seed or read from `from`."""
    chosen = ops.choose({choice.op: choice.kernel for choice in plan.kernels})
    with torch.device("meta"):
        model = Decoder(plan.architecture, chosen, recompute=plan.recompute)
    model.to_empty(device=device)
    model.init_weights(plan.init.std, plan.init.scale_residual, plan.seed)
    if plan.source is not None:
        hf.load_weights(model, hf.locate(plan.source))
    return model


def _fits(plan: Plan, corpus: build.Corpus) -> None:
    if corpus.vocab > plan.architecture.vocab:
        raise RunError(
            f"the tokenizer has {corpus.vocab} ids and the model embeds {plan.architecture.vocab}; "
            f"--set model.architecture.vocab={corpus.vocab}, or use the model's own tokenizer"
        )


def _resume(saves: Checkpoints, engine: Engine, batches: Batches, this: run.Run, display: Display) -> dict[str, Any]:
    """Fill everything from the newest whole checkpoint; says which ones were not whole."""
    found, refused = saves.latest()
    for reason in refused:
        display.line(f"CHECKPOINT REFUSED: {reason}")
    state = found.state
    live = {**engine.state(), "random": _random_state()}
    fill(found, live)
    engine.restored()
    torch.set_rng_state(live["random"]["cpu"])
    if "cuda" in live["random"]:
        torch.cuda.set_rng_state(live["random"]["cuda"])
    batches.load(state["data"])
    this.load(state["run"])
    display.line(f"resumed at step {this.step} from {found.folder}" + (" (an older one: the newer are damaged)" if refused else ""))
    return state["metrics"]


def _save(saves: Checkpoints, step: int, engine: Engine, state: dict[str, Any], display: Display, *, final: bool) -> None:
    """Save; a disk that refuses does not end the training, but the first and the last save must succeed."""
    try:
        saves.save(step, {**engine.state(), "random": _random_state()}, state)
    except CheckpointError as failure:
        if final or step == 0:
            raise
        display.line(f"CHECKPOINT NOT SAVED: {failure}; training goes on, the next try is at the next interval")


def _random_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _validates_at(plan: Plan, step: int) -> bool:
    if plan.data.validation == 0:
        return False
    return step == plan.steps or (plan.validation.every > 0 and step % plan.validation.every == 0)


def _validate(plan: Plan, engine: Engine, corpus: build.Corpus, step: int, device: torch.device) -> dict[str, Any]:
    """Loss per target on the held-out documents, and bits per byte of their text where the bytes are known."""
    held = Validation(
        corpus,
        sequence=plan.sequence,
        packing=plan.data.packing,
        microbatch=plan.microbatch,
        max_samples=plan.validation.max_samples,
        device=device,
    )
    nats, targets = engine.evaluate(held).tolist()
    bits = nats / (0.6931471805599453 * held.text_bytes) if held.text_bytes else None
    return {"step": step, "val_loss": nats / max(1.0, targets), "val_targets": int(targets), "val_bits_per_byte": bits}


def _samples(plan: Plan, batches: Batches, step: int) -> str:
    """Files and offsets of what step `step` read, a line each."""
    names = batches.describe(range(step * plan.batch, (step + 1) * plan.batch))
    return "".join(f"\n    {name}" for name in names[:8]) + (f"\n    and {len(names) - 8} more" if len(names) > 8 else "")


def _summary(plan: Plan, this: run.Run, engine: Engine, corpus: build.Corpus, metrics: Metrics) -> dict[str, Any]:
    """The numbers that a run is judged by; docs name each."""
    last, held = metrics.last, corpus.totals("validation")
    timed, seconds = metrics.timed
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
        "tokens_per_s": round(timed * plan.tokens_per_step / seconds, 1) if seconds else None,
        "step_s_p50": percentile(metrics.step_s, 0.5),
        "step_s_p99": percentile(metrics.step_s, 0.99),
        "parameters": plan.parameters,
        "bad_steps": last.get("bad_steps"),
        "resumes": this.resumes,
        "weights_sha256": weights_sha256(engine.state()["weights"]),
        "device": torch.cuda.get_device_name() if plan.device == "cuda" else "cpu",
        "versions": versions(),
    }


def weights_sha256(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes of the fp32 master weights, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _show_sample(plan: Plan, folder: Path, display: Display) -> None:
    if plan.sample.prompt is None:
        return
    from gigatrain import generate  # transformers, 3 s

    text = generate.generate(
        folder / "export",
        plan.sample.prompt,
        tokens=plan.sample.tokens,
        temperature=plan.sample.temperature,
        top_k=plan.sample.top_k,
        seed=plan.seed,
        device=plan.device,
    )
    width = min(100, shutil.get_terminal_size().columns)
    display.line(f"{' sample ':-^{width}}\n{text}\n{'-' * width}")


def _show_summary(summary: dict[str, Any], folder: Path, display: Display) -> None:
    line: Callable[[str], None] = display.line
    line(
        f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in {summary['wall_s']:.0f} s; steps ran at {summary['tokens_per_s'] or 0:,.0f} tokens/s"
    )
    if summary["bits_per_byte"]:
        xz = summary["xz_bits_per_byte"]
        line(f"held-out text: {summary['bits_per_byte']:.3f} bits per byte" + (f"; xz -9 on the same text: {xz:.3f}" if xz else ""))
    line(f"run folder: {folder}")
