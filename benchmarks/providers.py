"""Who trains in step.py and power.py: gigatrain and its variants, transformers' Trainer, litgpt, and the matrix product that is the ceiling of all.

Each is a function of a worker's job, the plan and the pipe to the parent, and runs its own loop, in which a `Gate` (rounds.py) begins every step.
"""

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rounds import Gate

from gigatrain.kernels import widened
from gigatrain.planning.plan import Plan

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


def gigatrain(job: dict[str, Any], plan: Plan, pipe: Any) -> None:
    """What loop.train does in a step, with the same parts in the same order."""
    from gigatrain import engines, feed
    from gigatrain.data.corpus import Corpus
    from gigatrain.observe.display import Display
    from gigatrain.observe.metrics import Metrics
    from gigatrain.optim import schedule
    from gigatrain.parallel.mesh import alone

    gate = Gate(pipe, plan.device)
    device = gate.device
    corpus = Corpus(Path(job["corpus"]), job["manifest"], tuple(job["weights"]))
    mesh = alone(device)
    engine = engines.make(plan, mesh, device, fresh=True)
    batches = feed.batches(plan, corpus, mesh, device)
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
    factors = [[torch.randn(size, size, device=plan.device, dtype=dtype) for _ in range(2)] for size, _ in products(plan.device)]
    while True:
        gate.begin()
        for (a, b), (_, repeats) in zip(factors, products(plan.device), strict=True):
            for _ in range(repeats):
                torch.mm(a, b)
            gate.mark()


def products(device: str) -> tuple[tuple[int, int], ...]:
    """(size, products timed together): on a GPU enough for the clocks to settle under load."""
    return ((4096, 100), (8192, 20)) if device == "cuda" else ((512, 8), (1024, 4))


def _imported(name: str) -> Any:
    """A module that may be missing, so that the type checker asks nothing of it."""
    return importlib.import_module(name)


def _rows(job: dict[str, Any]) -> tuple[Any, Any]:
    from safetensors.torch import load_file

    found = load_file(job["rows"])
    return found["tokens"], found["labels"]


PROVIDERS: dict[str, Callable[[dict[str, Any], Plan, Any], None]] = {
    "gigatrain": gigatrain,
    "trainer": trainer,
    "trainer-bf16": trainer,
    "litgpt": litgpt,
    "matmul": matmul,
}


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


def handicap(plan: Plan) -> str | None:
    """What makes peers slow on this processor, and the way out; None: nothing that is known."""
    if plan.device == "cuda" or plan.compute != "bf16" or not widened.needed():
        return None
    return "this processor has no bf16 products (AVX-512, AMX): gigatrain's are widened, and its peers', torch's own, take many times as long; --precision fp32"


def precision(name: str, plan: Plan) -> str:
    """A provider's numbers, in words."""
    if plan.compute == "fp32":
        return "fp32"
    kinds = {
        "gigatrain+leanstate": "bf16 weights, 24-bit master",
        "gigatrain": "bf16 weights, fp32 master",
        "trainer-bf16": "bf16 weights and moments",
    }
    return kinds.get(name) or kinds.get(name.partition("+")[0], "bf16 autocast, fp32 weights")
