r"""One training step against its peers: same architecture, initial weights, rows, batch and mathematics, in alternating rounds.

    python benchmarks/step.py                                    quickstart's model on this machine
    python benchmarks/step.py --quick --providers gigatrain,trainer
    python benchmarks/step.py --providers fusions                what a step fuses, on and off, one by one
    python benchmarks/step.py --data random --steps 10 --set model.architecture=llama-3.2-1b --set train.sequence=2048 --set train.batch=2 \
        --set optim.lr=1e-4 --providers gigatrain,trainer,trainer-bf16,trainer+compile

Every provider is a process of its own with torch's default number of threads. One works at a time: a round is `--settle` steps that nobody times
and `--steps` that are timed together, from synchronised device to synchronised device; then the next provider has its round, and the order rotates.
So whatever drifts (clocks, heat, neighbours) hits all alike, and ratios are taken round by round. Before the first round each makes `--warmup` steps,
compilation included, that count for nothing but the loss curves. All stay on the device meanwhile, with weights and moments: what does not fit together
is a line that says so, and --providers chooses fewer.

The recipe's optimizer becomes AdamW with decaying embeddings, which is what the peers can do, with the recipe's schedule and clip, and its rate unless
it is a recipe for Muon: that rate is for embeddings, and for matrices so high that rounding errors grow a hundredfold in ten steps, so it becomes 1e-3
(--set optim.lr= overrides). Rows are those of our loader in its order, but each row is one document for everybody: no mask at documents' borders.
Everybody reports its loss once a round.

Columns: tokens/s is the median of the rounds, with the 20th and 80th percentile; MFU is plan.flops_per_token x tokens/s over the fastest square matrix
product of the same dtype, measured in the same rounds; peak memory is CUDA's max_memory_allocated, or on a CPU the process's largest RSS less its RSS
after imports, set-up and compilation included; `max dloss` is the largest difference from gigatrain's loss at any step; `loop %` is the share of
gigatrain's step outside forward_backward and step: host time on a CPU, the device's timeline (CUDA events) on a GPU.
"""

import argparse
import contextlib
import csv
import datetime
import importlib
import importlib.util
import json
import math
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gigatrain import load
from gigatrain.errors import GigatrainError, RunError
from gigatrain.planning.plan import Plan, plan

DEFAULT = (
    "gigatrain", "gigatrain+compile", "gigatrain+reference", "gigatrain+leanstate", "trainer", "trainer-bf16", "trainer+compile", "trainer-bf16+compile",
    "trainer+liger", "trainer-bf16+liger", "litgpt", "torchtitan",
)  # fmt: skip

# Ours with other keys of the recipe, by the provider's name after `gigatrain`: the compiler, plain torch for every operation, the smallest state, and each
# thing that a step fuses (planning/fusions.py) with none of the others.
_NONE = ["train.fuse=false", "train.main_grads=false"]
VARIANTS = {
    "": [],
    "compile": ["train.compile=true", "train.recompute=none"],
    "reference": ["kernels=reference"],
    "plain": [
        'kernels={ default = "reference", attention = "sdpa" }'
    ],  # as transformers: no scores of sequence x sequence, nothing of ours
    "leanstate": ["optim.master=bf16+8", "optim.moments=int8"],
    "unfused": _NONE,
    "fuse": ["train.fuse=true", "train.main_grads=false"],
    "maingrad": ["train.fuse=false", "train.main_grads=true"],
    "graph": [*_NONE, "train.graph=true"],
    "unclipped": [*_NONE, "optim.clip=false"],
    "release": [*_NONE, "train.release=true", "optim.clip=false"],
}
# Each of them, and the row that it is compared with: release cannot clip.
AGAINST = {"fuse": "unfused", "maingrad": "unfused", "graph": "unfused", "release": "unclipped"}
MUON_LR = 1e-3
# Heading of the printed table: column of the CSV file, and format.
SHOWN = {
    "provider": ("provider", ""),
    "precision": ("precision", ""),
    "tokens/s": ("tokens_per_s", ",.0f"),
    "p20": ("tokens_per_s_p20", ",.0f"),
    "p80": ("tokens_per_s_p80", ",.0f"),
    "step ms": ("step_ms", ",.1f"),
    "TFLOP/s": ("tflops", ".3g"),
    "MFU %": ("mfu_pct", ".1f"),
    "peak MiB": ("peak_mib", ",.0f"),
    "first loss": ("loss_first", ".3f"),
    "last loss": ("loss_last", ".3f"),
    "max dloss": ("max_loss_difference", ".1e"),
    "x trainer": ("ratio_to_trainer", ".2f"),
    "x best trainer": ("ratio_to_best_trainer", ".2f"),
    "loop %": ("loop_pct", ".2f"),
}


# ---- In a worker: where a training loop meets the parent, and one function per provider ----


class Over(Exception):
    """The parent has no further round; it is raised where a step would begin, so that every peer's loop ends there."""


class Gate:
    """Lets a training loop run as many steps as the parent says, and holds it between rounds.

    The loop calls `begin` where a step begins, when all the work of the step before is issued, and `add` with every loss. Make one when all is
    imported: memory is counted from here.
    """

    def __init__(self, pipe: Any, device: str) -> None:
        import torch

        from gigatrain.observe.metrics import Clock

        self.pipe, self.device, self.torch = pipe, torch.device(device), torch
        self.made, self.imported_bytes = time.perf_counter(), _status("VmRSS")
        self.skip = self.steps = self.begun = 0
        self.clock, self.began, self.mhz = Clock(self.device), 0.0, None
        self.losses: list[list[tuple[Any, float]]] = []

    def begin(self) -> None:
        """A step begins: at the end of a round, answer and wait for the next order."""
        if self.begun == self.skip + self.steps:
            self._answer()
            line = sys.stdin.readline()
            if not line:
                raise Over
            order = json.loads(line)
            self.skip, self.steps, self.begun, self.losses = order["skip"], order["steps"], 0, []
        if self.begun == self.skip:
            self.mhz = self._clock_mhz() if self.skip else None  # before waiting: while the device works
            self._synchronise()
            self.clock.take_s()  # of steps that nobody times
            self.began = time.perf_counter()
        self.begun += 1
        self.losses.append([])

    @property
    def last(self) -> bool:
        """The step in progress is the last of its round: the one to report in."""
        return self.begun == self.skip + self.steps

    def add(self, loss: Any, share: float = 1.0) -> None:
        """`share` times a tensor, which stays where it is, is part of this step's mean loss."""
        self.losses[-1].append((loss.detach(), share))

    def mark(self) -> None:
        """A part of the step ends here; the parent gets the seconds between marks."""
        self.clock.mark()

    def _clock_mhz(self) -> int | None:
        import pynvml

        if self.device.type != "cuda":
            return None
        try:
            return self.torch.cuda.clock_rate()
        except pynvml.NVMLError:  # a MIG slice does not tell
            return None

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def _answer(self) -> None:
        self._synchronise()
        now, cuda = time.perf_counter(), self.device.type == "cuda"
        answer: dict[str, Any] = {
            "seconds": now - (self.began or self.made),
            "losses": [sum(float(loss) * share for loss, share in step) for step in self.losses],
            "intervals": self.clock.take_s(),
            "clock_mhz": self.mhz,
            "peak_bytes": self.torch.cuda.max_memory_allocated() if cuda else _status("VmHWM") - self.imported_bytes,
        }
        if not self.began:
            answer |= {"device": self.torch.cuda.get_device_name() if cuda else _processor(), "versions": _versions()}
        if cuda:
            self.torch.cuda.empty_cache()  # all workers share the device; the settling steps take the blocks back
        _say(self.pipe, answer)


def gigatrain(job: dict[str, Any], plan: Plan, pipe: Any) -> None:
    """What loop.train does in a step, with the same parts in the same order."""
    from gigatrain import engines
    from gigatrain.data.build import Corpus
    from gigatrain.data.loader import Batches
    from gigatrain.observe.display import Display
    from gigatrain.observe.metrics import Metrics
    from gigatrain.optim import schedule
    from gigatrain.parallel.mesh import alone

    gate = Gate(pipe, plan.device)
    device = gate.device
    corpus = Corpus(Path(job["corpus"]), job["manifest"], tuple(job["weights"]))
    engine = engines.make(plan, alone(device), device, fresh=True)
    batches = Batches(
        corpus,
        sequence=plan.sequence,
        packing=plan.data.packing,
        batch=plan.batch,
        microbatch=plan.microbatch,
        seed=plan.seed,
        device=device,
    )
    with Display() as display, Metrics(plan, Path(job["folder"]), device, step=0, show=lambda w: display.window(plan, w)) as metrics:
        for step in range(plan.steps):
            gate.begin()
            batch = next(batches)
            batch = replace(batch, microbatches=tuple(replace(part, documents=None) for part in batch.microbatches))
            gate.mark()
            engine.forward_backward(batch)
            rate = schedule.rate(plan.schedule, step, plan.steps)
            update = engine.step(rate)
            gate.mark()
            metrics.add(update)
            if gate.last:
                metrics.report(step + 1, rate, engine.bad)
            gate.mark()
            gate.add(update.nats.clone(), 1 / max(1, batch.targets))


def trainer(job: dict[str, Any], plan: Plan, pipe: Any) -> None:
    """transformers.Trainer as its users run it: bf16 autocast over fp32 weights, or with `bf16` weights and moments in bf16."""
    import torch
    import transformers
    from torch.optim.lr_scheduler import LambdaLR

    from gigatrain.optim import schedule

    gate = Gate(pipe, plan.device)
    pure, tokens, labels = job["provider"] == "trainer-bf16", *_rows(job)
    dtype = torch.bfloat16 if pure else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(job["initial"], dtype=dtype)
    model.config.use_cache = False

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(tokens)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            # The model would shift `labels` itself and lose each row's last; it takes labels that are shifted by this name.
            return {"input_ids": tokens[index], "labels": labels[index], "shift_labels": labels[index]}

    class Bench(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            gate.add(loss)
            return loss

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(optimizer, lambda step: schedule.rate(plan.schedule, step, plan.steps))
            return self.lr_scheduler

    class Rounds(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_log = gate.last

    more: dict[str, Any] = {"gradient_checkpointing": True} if plan.recompute == "full" else {}  # newer versions warn of the name
    settings = transformers.TrainingArguments(
        output_dir=job["folder"],
        max_steps=len(tokens) // plan.batch,
        per_device_train_batch_size=plan.microbatch,
        gradient_accumulation_steps=plan.accumulation,
        **more,
        optim="adamw_torch_fused",
        learning_rate=plan.optim.lr,
        weight_decay=plan.optim.weight_decay,
        adam_beta1=plan.optim.betas[0],
        adam_beta2=plan.optim.betas[1],
        adam_epsilon=plan.optim.eps,
        max_grad_norm=plan.optim.clip or 0.0,
        bf16=plan.compute == "bf16" and not pure,
        use_cpu=plan.device == "cpu",
        dataloader_pin_memory=plan.device == "cuda",
        torch_compile="compile" in job["options"],
        use_liger_kernel="liger" in job["options"],
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=plan.seed % (1 << 32),
    )
    bench = Bench(model=model, args=settings, train_dataset=Rows(), callbacks=[Rounds()])
    bench.remove_callback(transformers.PrinterCallback)
    bench.train()


def litgpt(job: dict[str, Any], plan: Plan, pipe: Any) -> None:
    """litgpt's own pretraining loop, compiled as its `pretrain` does; our weights, rows, rates and decay groups are put in their places."""
    import torch
    from safetensors.torch import load_file

    from gigatrain.optim import schedule

    lit, pretrain, lightning = (_imported(name) for name in ("litgpt", "litgpt.pretrain", "lightning"))
    arguments, convert = (_imported(f"litgpt.{name}") for name in ("args", "scripts.convert_hf_checkpoint"))
    gate = Gate(pipe, plan.device)
    arch, optim, rope = plan.decoder, plan.optim, plan.decoder.rope
    adjusted = {"factor": rope.factor, "low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    config = lit.Config(
        name="gigatrain",
        block_size=plan.positions,
        vocab_size=arch.vocab,
        padded_vocab_size=arch.vocab,
        n_layer=arch.layers,
        n_head=arch.heads,
        head_size=arch.head_dim,
        n_embd=arch.hidden,
        n_query_groups=arch.kv_heads,
        intermediate_size=arch.intermediate,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=arch.norm_eps,
        mlp_class_name="LLaMAMLP",
        rope_base=int(rope.theta),
        rope_adjustments={**adjusted, "original_max_seq_len": rope.original_positions} if rope.kind == "llama3" else None,
    )
    precision = "bf16-mixed" if plan.compute == "bf16" else "32-true"
    fabric = lightning.Fabric(accelerator=plan.device, devices=1, precision=precision)
    fabric.launch()
    disk: dict[str, Any] = {}
    for path in sorted(Path(job["initial"]).glob("*.safetensors")):
        disk |= load_file(path)
    weights: dict[str, Any] = {}
    convert.copy_weights_hf_llama(config, {}, weights, disk)
    model = lit.GPT(config)
    if arch.tied:
        model.transformer.wte.weight = model.lm_head.weight
    model.load_state_dict(weights)
    model.max_seq_length = plan.sequence
    del disk, weights
    model = fabric.setup(torch.compile(model))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": matrices}, {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(
        groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=plan.device == "cuda"
    )
    tokens, labels = _rows(job)
    rows = fabric.setup_dataloaders(
        torch.utils.data.DataLoader(torch.cat([tokens, labels[:, -1:]], 1), batch_size=plan.microbatch)  # pyright: ignore[reportArgumentType]
    )

    class Gated:
        def __iter__(self) -> Iterator[Any]:
            for number, part in enumerate(rows):
                if number % plan.accumulation == 0:
                    gate.begin()
                yield part

    entropy = pretrain.chunked_cross_entropy

    def recorded(logits: Any, targets: Any, **settings: Any) -> Any:
        loss = entropy(logits, targets, **settings)
        if loss.requires_grad and loss.device.type != "meta":
            gate.add(loss, 1 / plan.accumulation)
        return loss

    pretrain.chunked_cross_entropy = recorded
    pretrain.get_lr = lambda peak, iteration, *_: peak * schedule.rate(plan.schedule, iteration // plan.accumulation, plan.steps)
    pretrain.fit(
        fabric=fabric,
        devices=1,
        state={"model": model, "optimizer": fabric.setup_optimizers(adamw), "iter_num": 0, "step_count": 0},
        train_dataloader=Gated(),
        val_dataloader=[next(iter(rows))],
        out_dir=Path(job["folder"]),
        tokenizer_dir=None,
        train=arguments.TrainArgs(
            save_interval=None,
            log_interval=job["window"],
            global_batch_size=plan.batch,
            micro_batch_size=plan.microbatch,
            max_tokens=len(tokens) * plan.sequence,
            max_norm=optim.clip,
        ),
        eval=arguments.EvalArgs(interval=1 << 60, max_iters=1),
    )


def matmul(job: dict[str, Any], plan: Plan, pipe: Any) -> None:
    """The ceiling: square products of random matrices, large enough to keep the device busy."""
    import torch

    gate = Gate(pipe, plan.device)
    dtype = torch.bfloat16 if plan.compute == "bf16" else torch.float32
    factors = [[torch.randn(size, size, device=plan.device, dtype=dtype) for _ in range(2)] for size, _ in _products(plan.device)]
    while True:
        gate.begin()
        for (a, b), (_, repeats) in zip(factors, _products(plan.device), strict=True):
            for _ in range(repeats):
                torch.mm(a, b)
            gate.mark()


def _products(device: str) -> tuple[tuple[int, int], ...]:
    """(size, products timed together): on a GPU enough for the clocks to settle under load."""
    return ((4096, 100), (8192, 20)) if device == "cuda" else ((512, 8), (1024, 4))


def _imported(name: str) -> Any:
    """A module that may be missing, so that the type checker asks nothing of it."""
    return importlib.import_module(name)


def _rows(job: dict[str, Any]) -> tuple[Any, Any]:
    from safetensors.torch import load_file

    found = load_file(job["rows"])
    return found["tokens"], found["labels"]


def _status(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes; ru_maxrss would not do, as a child inherits its parent's."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


def _versions() -> dict[str, str]:
    from gigatrain import installed
    from gigatrain.observe.metrics import versions

    return versions() | installed.versions("liger-kernel", "litgpt", "lightning")


def _say(pipe: Any, answer: dict[str, Any]) -> None:
    pipe.write(json.dumps(answer) + "\n")
    pipe.flush()


PROVIDERS: dict[str, Callable[[dict[str, Any], Plan, Any], None]] = {
    "gigatrain": gigatrain,
    "trainer": trainer,
    "trainer-bf16": trainer,
    "litgpt": litgpt,
    "matmul": matmul,
}


def work() -> None:
    """A worker's life: one JSON line in with the job, then an answer for every order, until the parent closes the pipe."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    job = json.loads(sys.stdin.readline())
    try:
        variant = "+".join(job["options"]) if job["provider"] == "gigatrain" else ""
        found = load.read_json(Plan, job["plans"][variant], "the job's plan", RunError)
        assert isinstance(found, Plan)
        PROVIDERS[job["provider"]](job, found, pipe)
    except Over:
        return
    except BaseException as failure:  # whatever it is, it becomes this provider's line in the table
        traceback.print_exc()
        _say(pipe, {"error": f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"})


# ---- In the parent ----


class Failed(Exception):
    """A provider that failed: the message is its line in the table."""


@dataclass
class Peer:
    """One provider: its worker, and what it answered."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    ready: dict[str, Any] = field(default_factory=dict)
    warmup_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    def ask(self, skip: int, steps: int, timeout_s: float) -> dict[str, Any]:
        """Let it make `skip` steps and `steps` that are timed; raises Failed."""
        with contextlib.suppress(BrokenPipeError):
            self.tell({"skip": skip, "steps": steps})
        answer = self.answer(timeout_s)
        self.losses += answer["losses"]
        return answer

    def tell(self, order: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self, timeout_s: float) -> dict[str, Any]:
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], timeout_s)[0]:
            self.close()
            raise Failed(f"no answer within {timeout_s:.0f} s; give it more with --timeout")
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the worker ended with status {self.process.wait()}: {_last_line(self.log)}"}
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self) -> None:
        """End the worker: it leaves at the closed pipe, or is killed."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


def unavailable(name: str, plan: Plan) -> str | None:
    """Why a provider cannot run here, or None."""
    base, *options = name.split("+")
    arch = plan.decoder
    if base == "torchtitan":
        return "no adapter: torchtitan 0.3.0 trains on accelerators only, so none could be verified on the CPU this was written on"
    if "compile" in options and plan.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "torch.compile needs a C++ compiler, and there is none"
    if "liger" in options and plan.device == "cpu":
        return "Liger's kernels need a GPU"
    if "liger" in options and not importlib.util.find_spec("liger_kernel"):
        return "not installed: pip install --no-deps liger-kernel"
    if base == "trainer-bf16" and plan.compute == "fp32":
        return "bf16 weights have no place in an fp32 run"
    if base == "gigatrain" and "+".join(options) not in VARIANTS:
        return f"there are gigatrain{', gigatrain+'.join(VARIANTS)}"
    if "leanstate" in options and plan.compute == "fp32":
        return "a split master has no place in an fp32 run"
    if "graph" in options and plan.device == "cpu":
        return "a CUDA graph needs a GPU"
    if "release" in options and plan.accumulation > 1:
        return f"a step has {plan.accumulation} microbatches, whose gradients are kept; --set train.microbatch={plan.batch}"
    if base != "gigatrain" and plan.recompute in ("lean", "selective"):
        return f"has no {plan.recompute} recomputation; --set train.recompute=none or full"
    if base == "litgpt":
        if not importlib.util.find_spec("litgpt"):
            return (
                "not installed; it pins huggingface-hub<1.4, which transformers 5 refuses, but works with newer ones: "
                "pip install --no-deps litgpt lightning pytorch-lightning lightning-utilities torchmetrics jsonargparse typeshed-client docstring-parser"
            )
        if arch.family != "llama" or arch.qkv_bias or arch.mlp_bias or arch.rope.kind not in ("default", "llama3"):
            return f"the adapter knows Llama without biases, with default or llama3 positions, not this {arch.family}"
        if plan.recompute != "none" or plan.data.packing != "stream":
            return "the adapter knows neither recomputation nor padded rows"
    return None


def prepare(options: argparse.Namespace, folder: Path, steps: int) -> tuple[Plan, dict[str, Any]]:
    """Plan the run, and write initial weights and rows: the plan, and the job that every worker gets.

    Raises a GigatrainError for a recipe that the peers cannot share.
    """
    forced = ["optim.name=adamw", "optim.decay_embeddings=true", "report.trackers=[]", f"report.every={options.settle + options.steps}"]
    if options.precision:
        forced.append(f"train.precision={options.precision}")
    muon = load.recipe(options.recipe, options.set).optim.name == "muon"
    sets = [*([f"optim.lr={MUON_LR}"] if muon else []), *options.set, *forced]  # the last one counts
    planned = plan(load.recipe(options.recipe, [*sets, "train.compile=false"]), options.site)
    asked = {
        name.partition("+")[2] for name in options.providers.split(",") if name.startswith("gigatrain+") and not unavailable(name, planned)
    }
    plans = {"": planned} | {
        variant: plan(load.recipe(options.recipe, [*sets, "train.compile=false", *VARIANTS[variant]]), options.site) for variant in asked
    }
    if planned.loss.z_loss:
        raise RunError(f"loss.z_loss {planned.loss.z_loss} has no counterpart in the peers; --set loss.z_loss=0.0")
    if planned.batch % planned.microbatch:
        raise RunError(
            f"train.batch {planned.batch} is no multiple of train.microbatch {planned.microbatch}, as the peers need; change one"
        )
    if steps > planned.steps:
        raise RunError(
            f"{steps} steps of measuring exceed the recipe's {planned.steps}; fewer --rounds or --steps, or --set train.steps={steps}"
        )

    import torch
    from safetensors.torch import save_file

    from gigatrain import architectures
    from gigatrain.data.build import Corpus, build
    from gigatrain.data.loader import Batches
    from gigatrain.models import hf
    from gigatrain.models.decoder import Decoder

    count = steps + 1  # a peer's loop asks for one batch more before it learns that the run is over
    if options.data == "random":
        corpus: Corpus = _random_corpus(folder / "random", planned, count)
    else:
        corpus = build(planned.data, planned.tokenizer)
        if corpus.vocab > planned.decoder.vocab:
            raise RunError(
                f"the tokenizer has {corpus.vocab} ids and the model embeds {planned.decoder.vocab}; enlarge it, or use --data random"
            )
    batches = Batches(corpus, sequence=planned.sequence, packing=planned.data.packing, batch=planned.batch, seed=planned.seed, prefetch=0)
    parts = [batches.make(step * planned.batch).microbatches[0] for step in range(count)]
    rows = {"tokens": torch.cat([part.tokens for part in parts]), "labels": torch.cat([part.labels for part in parts])}
    save_file(rows, folder / "rows.safetensors")
    initial = folder / "initial"
    model = Decoder(planned.decoder)
    model.init_weights(planned.init.std, planned.init.scale_residual, planned.seed)
    hf.save_weights(model, planned.decoder, initial)
    config = architectures.to_hf_config(planned.decoder, max_positions=planned.positions, dtype="float32", bos=None, eos=None, pad=None)
    (initial / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plans = {variant: found.model_copy(update={"source": str(initial)}) for variant, found in plans.items()}
    job = {
        "plans": {variant: found.text() for variant, found in plans.items()},
        "corpus": str(corpus.folder),
        "manifest": corpus.manifest,
        "weights": corpus.weights,
        "initial": str(initial),
        "rows": str(folder / "rows.safetensors"),
        "window": options.settle + options.steps,
    }
    return plans[""], job


def _random_corpus(folder: Path, plan: Plan, steps: int) -> Any:
    """One document of uniformly random tokens, as our shards hold it."""
    from gigatrain.data.build import Corpus
    from gigatrain.data.shards import ShardWriter

    folder.mkdir()
    writer = ShardWriter(folder / "random", plan.decoder.vocab)
    writer.add(np.random.default_rng(plan.seed).integers(0, plan.decoder.vocab, steps * plan.tokens_per_step + 1))
    splits = {"train": {"shards": [{**(writer.finish() or {}), "prefix": "random"}]}}
    source = {"name": "random", "ends_with_eos": True, "starts_with_bos": False, "splits": splits}
    return Corpus(folder, {"vocab": plan.decoder.vocab, "eos": 0, "sha256": "random", "sources": [source]}, (1.0,))


def start(name: str, device: str, job: dict[str, Any], folder: Path) -> Peer:
    """Start a provider's worker and hand it its job."""
    base, *options = name.split("+")
    folder.mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cuda":  # Trainer would spread over every GPU that it sees
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=environment,
        )
    peer = Peer(name, process, log)
    with contextlib.suppress(BrokenPipeError):
        peer.tell({**job, "provider": base, "options": options, "folder": str(folder)})
    return peer


def rotated(names: list[Any], turn: int) -> list[Any]:
    """The order of round `turn`: each in turn goes first."""
    turn %= len(names)
    return names[turn:] + names[:turn]


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Run every provider; returns {"rows", "failed": why by name, "losses": those of every step by name}."""
    names: list[str] = list(dict.fromkeys(options.providers.split(",")))
    for name in names:
        base, *extra = name.split("+")
        if base not in {*PROVIDERS, "torchtitan"} - {"matmul"} or not set(extra) <= {"compile", "liger", *VARIANTS}:
            raise RunError(f"there is no provider {name!r}{load.nearest(name, DEFAULT)} Known: {', '.join(DEFAULT)}.")
    steps = options.warmup + options.rounds * (options.settle + options.steps)
    peers: list[Peer] = []
    with tempfile.TemporaryDirectory(prefix="gigatrain-step-") as temporary:
        folder = Path(temporary)
        planned, job = prepare(options, folder, steps)
        shape = f"{planned.decoder.family}, {planned.parameters:,} parameters"
        say(f"{shape}; {options.why}; {steps} steps of {planned.tokens_per_step:,} tokens")
        failed = {name: reason for name in names if (reason := unavailable(name, planned))}
        try:
            for name in ("matmul", *(name for name in names if name not in failed)):
                peers.append(start(name, planned.device, job, folder / name))
            for peer in peers:  # they set themselves up side by side; from here on one works at a time
                with _noted(peer, say):
                    peer.ready = peer.answer(options.timeout)
            for peer in peers:
                if peer.error is None:
                    with _noted(peer, say):
                        peer.warmup_s = peer.ask(0, 1 if peer is peers[0] else options.warmup, options.timeout)["seconds"]
                        say(f"{peer.name}: warm-up took {peer.warmup_s:.1f} s")
            for turn in range(options.rounds):
                for peer in rotated(peers, turn):
                    if peer.error is None:
                        with _noted(peer, say):
                            size = (1, 3) if peer is peers[0] else (options.settle, options.steps)
                            answer = peer.ask(*size, options.timeout)
                            peer.answers.append(answer)
                            peer.seconds.append(answer["seconds"] / options.steps)
                speeds = (f"{peer.name} {planned.tokens_per_step / peer.seconds[-1]:,.0f}" for peer in peers[1:] if peer.error is None)
                say(f"round {turn + 1} of {options.rounds}, tokens/s: {', '.join(speeds)}")
        finally:
            for peer in peers:
                peer.close()
    ceiling, *peers = peers
    if ceiling.error:
        raise RunError(f"the matrix product failed: {ceiling.error}")
    failed |= {peer.name: peer.error for peer in peers if peer.error}
    whole = [peer for peer in peers if not peer.error]
    rows = _table(planned, whole, _ceiling(ceiling, planned.device), options)
    order = [name for name in names if name in failed]
    by_name = {peer.name: peer for peer in whole}
    sizes = {peer.name: [answer["peak_bytes"] / 2**20 for answer in peer.answers] for peer in whole}
    gains = [
        {
            "provider": f"gigatrain+{name}",
            "against": f"gigatrain+{other}",
            "gain": _ratio(by_name[f"gigatrain+{other}"], by_name[f"gigatrain+{name}"]),
            "peak_mib": round(max(sizes[f"gigatrain+{name}"]) - max(sizes[f"gigatrain+{other}"]), 1),
        }
        for name, other in AGAINST.items()
        if {f"gigatrain+{name}", f"gigatrain+{other}"} <= set(by_name)
    ]
    return {
        "gains": gains,
        "rows": rows,
        "failed": {name: failed[name] for name in order},
        "losses": {peer.name: peer.losses for peer in whole},
    }


@contextlib.contextmanager
def _noted(peer: Peer, say: Callable[[str], None]) -> Iterator[None]:
    """A failure in here is kept as the provider's, and said."""
    try:
        yield
    except Failed as failure:
        peer.error = str(failure)
        say(f"{peer.name} FAILED: {failure}")


def _ceiling(peer: Peer, device: str) -> float:
    """FLOP/s of the fastest product: the best size's median over all rounds."""
    sizes = _products(device)
    by_size = [
        np.median([2 * size**3 * repeats / seconds for answer in peer.answers for seconds in answer["intervals"][index :: len(sizes)]])
        for index, (size, repeats) in enumerate(sizes)
    ]
    return float(max(by_size))


def _table(plan: Plan, peers: list[Peer], ceiling: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per provider, as the CSV file and the table show it."""
    by_name = {peer.name: peer for peer in peers}
    trainers = [peer for peer in peers if peer.name.startswith("trainer")]
    best = min(trainers, key=lambda peer: float(np.median(peer.seconds)), default=None)
    ours, plain = by_name.get("gigatrain"), by_name.get("trainer")
    arch, commit, now = plan.decoder, _commit(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    rows = []
    for peer in peers:
        low, middle, high = np.percentile([plan.tokens_per_step / seconds for seconds in peer.seconds], [20, 50, 80]).tolist()
        differences = [abs(a - b) for a, b in zip(peer.losses, ours.losses, strict=True)] if ours else []
        flops = plan.flops_per_token * middle
        clocks = [answer["clock_mhz"] for answer in peer.answers if answer["clock_mhz"]]
        row = {
            "commit": commit,
            "date": now,
            "device": peer.ready["device"],
            "threads": peer.ready["versions"].pop("threads", None),
            "clock_mhz": float(np.median(clocks)) if clocks else None,
            "load": round(os.getloadavg()[0], 2),
            "versions": " ".join(f"{name}={version}" for name, version in peer.ready["versions"].items()),
            "provider": peer.name,
            "precision": _precision(peer.name, plan),
            "architecture": f"{arch.family} {arch.layers}x{arch.hidden} vocab {arch.vocab}",
            "parameters": plan.parameters,
            "batch": plan.batch,
            "microbatch": plan.microbatch,
            "sequence": plan.sequence,
            "data": options.data,
            "lr": plan.optim.lr,
            "steps": len(peer.losses),
            "rounds": f"{options.rounds}x({options.settle}+{options.steps})",
            "tokens_per_s": round(middle, 1),
            "tokens_per_s_p20": round(low, 1),
            "tokens_per_s_p80": round(high, 1),
            "step_ms": round(1e3 * float(np.median(peer.seconds)), 3),
            "tflops": round(flops / 1e12, 4),
            "ceiling_tflops": round(ceiling / 1e12, 4),
            "mfu_pct": round(100 * flops / ceiling, 2),
            "peak_mib": round(max(answer["peak_bytes"] for answer in peer.answers) / 2**20, 1),
            "loss_first": peer.losses[0],
            "loss_last": peer.losses[-1],
            "max_loss_difference": max(differences) if ours and not any(map(math.isnan, differences)) else None,
            "last_loss_difference": differences[-1] if ours else None,
            "ratio_to_trainer": _ratio(plain, peer),
            "ratio_to_best_trainer": _ratio(best, peer),
            "loop_pct": _loop_share(peer) if peer.name.startswith("gigatrain") else None,
            "warmup_s": round(peer.warmup_s, 2),
        }
        rows.append(row)
    return rows


def _ratio(slow: Peer | None, fast: Peer) -> float | None:
    """How many times as fast: the median of the rounds' own ratios."""
    return None if slow is None else round(float(np.median([a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)])), 3)


def _loop_share(peer: Peer) -> float:
    """Percent of the step before and after the engine's two calls, over all rounds; marks: batch, engine, metrics."""
    intervals = [np.array(answer["intervals"]).reshape(-1, 3) for answer in peer.answers]
    batch, engine, metrics = np.concatenate(intervals).sum(0).tolist()
    return round(100 * (batch + metrics) / (batch + engine + metrics), 2)


def _precision(name: str, plan: Plan) -> str:
    if plan.compute == "fp32":
        return "fp32"
    kinds = {
        "gigatrain+leanstate": "bf16 weights, 24-bit master",
        "gigatrain": "bf16 weights, fp32 master",
        "trainer-bf16": "bf16 weights and moments",
    }
    return kinds.get(name) or kinds.get(name.partition("+")[0], "bf16 autocast, fp32 weights")


def _commit() -> str:
    def git(*words: str) -> str:
        ended = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return ended.stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if git("status", "--porcelain") else "")


def append(rows: list[dict[str, Any]], path: Path) -> None:
    """Add rows to a CSV file; RunError if it has other columns."""
    if not rows:
        return
    columns = list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            if (header := next(csv.reader(file))) != columns:
                raise RunError(
                    f"{path} has other columns ({', '.join(sorted(set(header) ^ set(columns))) or 'in another order'}); name another --out"
                )
    with path.open("a", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def show(found: dict[str, Any]) -> None:
    """The table, and below it who did not run and why."""
    from rich.console import Console
    from rich.table import Table

    console, rows = Console(width=180, highlight=False), found["rows"]  # a narrower terminal wraps; figures are never cut
    if rows:
        one = rows[0]
        console.print(
            f"{one['device']}, {one['threads']} threads, load {one['load']}; {one['architecture']}, {one['parameters']:,} parameters; "
            f"batch {one['batch']} x {one['sequence']}, microbatch {one['microbatch']}; rounds {one['rounds']}; lr {one['lr']:g}; data {one['data']}; "
            f"matrix product {one['ceiling_tflops']:.3g} TFLOP/s"
        )
    table = Table(box=None)
    for heading, (_, form) in SHOWN.items():
        table.add_column(heading, justify="right" if form else "left", no_wrap=True)
    for row in sorted(rows, key=lambda row: -row["tokens_per_s"]):
        table.add_row(*("-" if row[column] is None else format(row[column], form) for column, form in SHOWN.values()))
    console.print(table)
    for gain in found["gains"]:
        console.print(f"{gain['provider']} against {gain['against']}: {gain['gain']:.3f} x tokens/s, {gain['peak_mib']:+,.1f} MiB peak")
    for name, reason in found["failed"].items():
        console.print(f"{name}: {reason}", markup=False)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], epilog="Read the head of this file for what is measured."
    )
    parser.add_argument("--recipe", default="quickstart", help="name or file (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the recipe; may be repeated")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: the recipe's")
    parser.add_argument(
        "--data", choices=("corpus", "random"), default="corpus", help="the recipe's corpus, or random tokens (default: %(default)s)"
    )
    parser.add_argument("--providers", help=f"comma-separated, or fusions: what a step fuses; default: {','.join(DEFAULT)}")
    parser.add_argument("--quick", action="store_true", help="3 rounds of half as many steps, and nothing that compiles")
    parser.add_argument("--rounds", type=int, help="default: 8")
    parser.add_argument("--steps", type=int, help="timed steps of a round; default: 10, on a GPU 50")
    parser.add_argument("--settle", type=int, help="steps before them that are not timed; default: 1, on a GPU 5")
    parser.add_argument("--warmup", type=int, help="steps before the first round; default: 5")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a worker may take for an answer (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "step.csv", help="rows are appended (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every step's loss, in place of the table")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work()
        return 0
    options.site, options.why = load.local_site()
    gpu = options.site.device == "cuda"
    sizes = {
        "rounds": 3 if options.quick else 8,
        "steps": (50 if gpu else 10) // (2 if options.quick else 1),
        "settle": 5 if gpu else 1,
        "warmup": 5,
    }
    for name, size in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, size)
    quick = [name for name in DEFAULT if "compile" not in name and name != "litgpt"]  # litgpt compiles always
    if options.providers == "fusions":
        options.providers = ",".join(f"gigatrain+{name}" for name in ("unfused", "fuse", "maingrad", "graph", "unclipped", "release"))
    options.providers = options.providers or ",".join(quick if options.quick else DEFAULT)
    try:
        if min(options.rounds, options.steps, options.warmup, options.settle + 1) < 1:
            raise RunError("--rounds, --steps and --warmup must be at least 1, and --settle at least 0")
        found = measure(options, lambda text: print(text, file=sys.stderr, flush=True))
        if options.json:
            print(json.dumps(found))
        else:
            show(found)
        append(found["rows"], options.out)  # last: what was measured is seen even if the file refuses it
    except GigatrainError as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and files go too
    sys.exit(main())
