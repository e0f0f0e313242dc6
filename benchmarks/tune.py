r"""Supervised fine-tuning against TRL: same model, initial weights, conversations, optimizer and rate, packing on both, in alternating rounds.

    python benchmarks/tune.py                                    a small Llama on this machine, on questions about Python's standard library
    python benchmarks/tune.py --quick --providers gigatrain,trl
    python benchmarks/tune.py --model llama-3.2-1b --sequence 2048 --batch 8 --set optim.lr=1e-5 --providers gigatrain,trl,trl+liger,unsloth    on a GPU

Providers are processes of their own, one works at a time, rounds and settling steps are those of benchmarks/step.py, and ratios are taken round by round.

    gigatrain       whole conversations, as many as fit best, each seeing itself alone (data.packing = "packed"), assistant's tokens only
    trl             SFTTrainer(packing=True): its default strategy, bfd, which flattens a batch into one row; the same mask, assistant's tokens only
    trl+wrapped     its other one: rows cut every `--sequence` tokens, and conversations see each other
    trl+liger       trl with Liger's kernels; a GPU's
    unsloth         TRL's trainer on unsloth's model; a GPU's

Each packs by itself, so rows differ, and a step holds other tokens. tokens/s are therefore real tokens, never padding, over seconds. Columns: `loss error` is
what gigatrain's model, at the initial weights, finds on the peer's own first batch, against what the peer found there: the relative difference, 0 for equal
mathematics; `trained` is the share of tokens that have a loss; `x trl` compares with trl's default and `x best trl` with the fastest of TRL's.
"""

import argparse
import contextlib
import datetime
import importlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from providers import handicap, precision
from rounds import Failed, Gate, Peer, append, noted, ratio, revision, start, work

from gigatrain import load
from gigatrain.bench.trials import rotated
from gigatrain.errors import GigatrainError, RunError
from gigatrain.planning.plan import Plan, plan

DEFAULT = ("gigatrain", "trl", "trl+wrapped", "trl+liger", "unsloth")
SHOWN = {
    "provider": ("provider", ""),
    "precision": ("precision", ""),
    "tokens/s": ("tokens_per_s", ",.0f"),
    "p20": ("tokens_per_s_p20", ",.0f"),
    "p80": ("tokens_per_s_p80", ",.0f"),
    "step ms": ("step_ms", ",.1f"),
    "tokens a step": ("tokens_per_step", ",.0f"),
    "trained": ("trained_share", ".2f"),
    "peak MiB": ("peak_mib", ",.0f"),
    "first loss": ("loss_first", ".4f"),
    "last loss": ("loss_last", ".4f"),
    "loss error": ("loss_error", ".1e"),
    "x trl": ("ratio_to_trl", ".2f"),
    "x best trl": ("ratio_to_best_trl", ".2f"),
}
RECIPE = """
name = "tune"
summary = "supervised fine-tuning, measured"
[model]
architecture = {architecture}
[tokenizer]
from = "{tokenizer}"
[data]
sources = [{{ kind = "jsonl", path = "{chats}", format = "chat" }}]
folder = "{folder}"
packing = "packed"
validation = 0.0
[train]
sequence = {sequence}
batch = {batch}
steps = {steps}
precision = "{precision}"
[optim]
name = "adamw"
lr = 1e-4
decay_embeddings = true
[schedule]
kind = "constant"
warmup = 0
[checkpoint]
every = 1000000
[report]
trackers = []
"""
SMALL = """{ family = "llama", vocab = 4096, hidden = 192, layers = 4, heads = 6, kv_heads = 3, head_dim = 32, intermediate = 512, tied = true }"""


class Counted(Gate):
    """A gate that also counts real tokens and targets of each step, and keeps the first batch with its loss."""

    def __init__(self, pipe: Any, device: str, folder: Path) -> None:
        super().__init__(pipe, device)
        self.folder, self.counts = folder, list[tuple[Any, Any]]()

    def saw(self, tokens: Any, targets: Any) -> None:
        """Real tokens and targets of (a part of) the step that has begun; numbers, or tensors that stay where they are."""
        self.counts.append((tokens, targets))

    def keep(self, loss: Any, **tensors: Any) -> None:
        """The first batch, once."""
        path = self.folder / "first.safetensors"
        if not path.exists():
            from safetensors.torch import save_file

            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
            (self.folder / "first.json").write_text(json.dumps(float(loss)))

    def _answer(self) -> None:
        kept, self.counts = self.counts, []
        (self.folder / "counts.json").write_text(json.dumps([[int(a), int(b)] for a, b in kept]))
        super()._answer()

    def begin(self) -> None:
        """As a gate's; tokens of steps that settle are not those that are timed."""
        super().begin()
        if self.begun == self.skip + 1:
            self.counts = []


def gigatrain(job: dict[str, Any], plan: Plan, pipe: Any) -> None:
    """What loop.train does in a step."""
    from gigatrain import engines, feed
    from gigatrain.data.corpus import Corpus
    from gigatrain.observe.display import Display
    from gigatrain.observe.metrics import Metrics
    from gigatrain.optim import schedule
    from gigatrain.parallel.mesh import alone

    gate = Counted(pipe, plan.device, Path(job["folder"]))
    device = gate.device
    corpus = Corpus.open(Path(job["corpus"]))
    mesh = alone(device)
    engine = engines.make(plan, mesh, device, fresh=True)
    batches = feed.batches(plan, corpus, mesh, device)
    with Display() as display, Metrics(plan, Path(job["folder"]), device, step=0, show=lambda w: display.window(plan, w)) as metrics:
        for number in range(plan.steps):
            gate.begin()
            batch = next(batches)
            engine.forward_backward(batch)
            rate = schedule.rate(plan.schedule, number, plan.steps)
            update = engine.step(rate)
            metrics.add(update)
            if gate.last:
                metrics.report(number + 1, rate, engine.bad)
            for part in batch.microbatches:
                gate.saw(_real(part), (part.labels >= 0).sum())
            gate.add(update.nats.clone(), 1 / max(1, batch.targets))
    batches.close()


def _real(part: Any) -> Any:
    """Tokens of a microbatch that are of a conversation: what fills a row up is of no document."""
    return part.tokens.numel() if part.documents is None else (part.documents >= 0).sum()


def trl(job: dict[str, Any], plan: Plan, pipe: Any) -> None:
    """trl.SFTTrainer as its users run it: packing, assistant's tokens only, bf16 autocast over fp32 weights."""
    import datasets
    import torch
    import transformers

    sft = importlib.import_module("trl")
    gate = Counted(pipe, plan.device, Path(job["folder"]))
    model, tokenizer = _peers_model(job, plan)

    class Rounds(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_log = False

    class Bench(sft.SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            given = {name: inputs[name].clone() for name in ("input_ids", "labels", "position_ids") if inputs.get(name) is not None}
            loss = super().training_step(model, inputs, *args, **kwargs)
            labels = given["labels"]
            gate.saw(
                labels.numel() if "position_ids" in given else (given["input_ids"] != tokenizer.pad_token_id).sum(),
                (labels[:, 1:] >= 0).sum(),
            )
            gate.keep(loss * self.args.gradient_accumulation_steps, **given)
            gate.add(loss)
            return loss

        def log(self, *args: Any, **kwargs: Any) -> None:
            """Nothing: what it reads back would hold the device up."""

    settings = sft.SFTConfig(
        output_dir=job["folder"],
        max_steps=plan.steps,
        per_device_train_batch_size=plan.microbatch,
        gradient_accumulation_steps=plan.accumulation,
        gradient_checkpointing=plan.recompute == "full",
        max_length=plan.sequence,
        packing=True,
        packing_strategy="wrapped" if "wrapped" in job["options"] else "bfd",
        assistant_only_loss=True,
        optim="adamw_torch_fused",
        learning_rate=plan.optim.lr,
        lr_scheduler_type="constant",
        weight_decay=plan.optim.weight_decay,
        adam_beta1=plan.optim.betas[0],
        adam_beta2=plan.optim.betas[1],
        adam_epsilon=plan.optim.eps,
        max_grad_norm=plan.optim.clip or 0.0,
        bf16=plan.compute == "bf16",
        use_cpu=plan.device == "cpu",
        dataloader_pin_memory=plan.device == "cuda",
        use_liger_kernel="liger" in job["options"],
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=plan.seed % (1 << 32),
    )
    rows = datasets.Dataset.from_list([json.loads(line) for line in Path(job["chats"]).read_text(encoding="utf-8").splitlines()])
    bench = Bench(model=model, args=settings, train_dataset=rows, processing_class=tokenizer, callbacks=[Rounds()])
    bench.remove_callback(transformers.PrinterCallback)
    bench.train()


def _peers_model(job: dict[str, Any], plan: Plan) -> tuple[Any, Any]:
    import torch
    import transformers

    if job["provider"] == "unsloth":
        fast = importlib.import_module("unsloth").FastLanguageModel
        kept = {"max_seq_length": plan.sequence, "dtype": torch.float32 if plan.compute == "fp32" else None, "load_in_4bit": False}
        return fast.from_pretrained(job["initial"], full_finetuning=True, **kept)
    model = transformers.AutoModelForCausalLM.from_pretrained(job["initial"], dtype=torch.float32)
    model.config.use_cache = False
    return model, transformers.AutoTokenizer.from_pretrained(job["tokenizer"])


PROVIDERS: dict[str, Callable[[dict[str, Any], Plan, Any], None]] = {"gigatrain": gigatrain, "trl": trl, "unsloth": trl}


def provide(job: dict[str, Any], pipe: Any) -> None:
    """In a worker: the provider that the job names."""
    found = load.read_json(Plan, job["plan"], "the job's plan", RunError)
    PROVIDERS[job["provider"]](job, found, pipe)


# ---- In the parent ----


def unavailable(name: str, planned: Plan) -> str | None:
    """Why a provider cannot run here, or None."""
    base, *options = name.split("+")
    if base == "unsloth" or "liger" in options:
        if planned.device == "cpu":
            return "needs a GPU"
        package = "unsloth" if base == "unsloth" else "liger_kernel"
        if not importlib.util.find_spec(package):
            return f"not installed: pip install {package.replace('_', '-')}"
    if base != "gigatrain" and not importlib.util.find_spec("trl"):
        return "not installed: pip install trl"
    return None


def prepare(options: argparse.Namespace, folder: Path, steps: int) -> tuple[Plan, dict[str, Any]]:
    """Conversations, tokenizer, initial weights and the plan; and the job that every worker gets."""
    from gigatrain import architectures
    from gigatrain.config import Data, Source, Tokenizer, TokenizerTraining
    from gigatrain.data import sources, stdlib
    from gigatrain.data.build import build
    from gigatrain.models import hf
    from gigatrain.models.decoder import Decoder

    chats = folder / "chats.jsonl"
    if options.chats:
        chats.write_bytes(Path(options.chats).read_bytes())
    else:
        with chats.open("w", encoding="utf-8") as file:
            for piece in sources.pieces(Source(kind="stdlib"), 1 << 30):
                for _, _, record in stdlib.records(piece.name, Path(piece.path).read_bytes(), "chat"):
                    file.write(json.dumps(record) + "\n")
    small = options.model == "small"
    tokenizer = options.tokenizer
    if tokenizer is None:
        spec = Tokenizer(train=TokenizerTraining(vocab=4096), template="chatml")
        tokenizer = str(build(Data(sources=(Source(kind="stdlib"),), validation=0.03), spec).folder / "tokenizer")
    text = RECIPE.format(
        architecture=SMALL if small else json.dumps(options.model),
        tokenizer=tokenizer,
        chats=chats,
        folder=folder / "corpus",
        sequence=options.sequence,
        batch=options.batch,
        steps=steps + 1,  # a loop begins one step more before it learns that the run is over
        precision=options.precision,
    )
    (folder / "tune.toml").write_text(text)
    window = options.settle + options.steps
    recipe = load.recipe(folder / "tune.toml", [*options.set, f"report.every={window}"])
    planned = plan(recipe, options.site)
    corpus = build(planned.data, planned.tokenizer)
    if planned.batch % planned.microbatch:
        raise RunError(
            f"train.batch {planned.batch} is no multiple of train.microbatch {planned.microbatch}, as the peers need; change one"
        )
    initial = folder / "initial"
    model = Decoder(planned.decoder)
    model.init_weights(planned.init.std, planned.init.scale_residual, planned.seed)
    hf.save_weights(model, planned.decoder, initial)
    eos = corpus.eos
    config = architectures.to_hf_config(planned.decoder, max_positions=planned.positions, dtype="float32", bos=None, eos=eos, pad=eos)
    (initial / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in (corpus.folder / "tokenizer").iterdir():
        (initial / path.name).write_bytes(path.read_bytes())
    planned = planned.model_copy(update={"source": str(initial)})
    return planned, {
        "plan": planned.text(),
        "corpus": str(corpus.folder),
        "initial": str(initial),
        "tokenizer": str(corpus.folder / "tokenizer"),
        "chats": str(chats),
    }


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Run every provider; returns {"rows", "failed": why by name}."""
    names: list[str] = list(dict.fromkeys(options.providers.split(",")))
    for name in names:
        if name not in DEFAULT:
            raise RunError(f"there is no provider {name!r}{load.nearest(name, DEFAULT)} Known: {', '.join(DEFAULT)}.")
    steps = options.warmup + options.rounds * (options.settle + options.steps)
    peers: list[Peer] = []
    counts: dict[str, list[list[list[int]]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="gigatrain-tune-") as temporary:
        folder = Path(temporary)
        planned, job = prepare(options, folder, steps)
        say(f"{planned.decoder.family}, {planned.parameters:,} parameters; {steps} steps of {planned.batch} rows x {planned.sequence}")
        if slow := handicap(planned):
            say(slow)
        failed = {name: reason for name in names if (reason := unavailable(name, planned))}
        try:
            for name in (name for name in names if name not in failed):
                peers.append(start(__file__, name, planned.device, job, folder / name))
            for peer in peers:
                with noted(peer, say):
                    peer.ready = peer.answer(options.timeout)
            for peer in peers:
                if peer.error is None:
                    with noted(peer, say):
                        peer.warmup_s = peer.ask(0, options.warmup, options.timeout)["seconds"]
                        say(f"{peer.name}: warm-up took {peer.warmup_s:.1f} s")
            for turn in range(options.rounds):
                for peer in rotated(peers, turn):
                    if peer.error is None:
                        with noted(peer, say):
                            answer = peer.ask(options.settle, options.steps, options.timeout)
                            peer.answers.append(answer)
                            told = json.loads((folder / peer.name / "counts.json").read_text())
                            counts[peer.name].append(told[-options.steps * planned.accumulation :])
                            peer.seconds.append(
                                answer["seconds"] / _tokens(counts[peer.name][-1])
                            )  # a token, as steps hold other numbers of them
                speeds = (f"{peer.name} {1 / peer.seconds[-1]:,.0f}" for peer in peers if peer.error is None)
                say(f"round {turn + 1} of {options.rounds}, tokens/s: {', '.join(speeds)}")
        finally:
            for peer in peers:
                peer.close()
        failed |= {peer.name: peer.error for peer in peers if peer.error}
        whole = [peer for peer in peers if not peer.error]
        errors = {peer.name: loss_error(planned, folder / peer.name) for peer in whole}
    return {"rows": _table(planned, whole, counts, errors, options), "failed": {name: failed[name] for name in names if name in failed}}


def _tokens(count: list[list[int]]) -> int:
    if not count or not (found := sum(tokens for tokens, _ in count)):
        raise Failed("it told of no tokens")
    return found


def loss_error(planned: Plan, folder: Path) -> float | None:
    """gigatrain's plain model, in fp32 and at the initial weights, on the first batch that a peer saw, against the peer's loss; None: none kept."""
    if not (folder / "first.safetensors").is_file():
        return None
    import torch
    from safetensors.torch import load_file

    from gigatrain.kernels.ops import REFERENCE
    from gigatrain.models import hf
    from gigatrain.models.decoder import Decoder

    given, found = load_file(folder / "first.safetensors"), json.loads((folder / "first.json").read_text())
    model = Decoder(planned.decoder, REFERENCE)
    hf.load_weights(model, planned.source or "")
    tokens, labels = given["input_ids"], torch.nn.functional.pad(given["labels"][:, 1:], (0, 1), value=-100)
    positions = given.get("position_ids")
    documents = None if positions is None else ((positions == 0).cumsum(1) - 1).int()
    with torch.no_grad():
        loss, _ = model.loss(tokens, labels, positions, documents)
    return abs(float(loss) / int((labels >= 0).sum()) / found - 1)


def _table(
    planned: Plan, peers: list[Peer], counts: dict[str, Any], errors: dict[str, float | None], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per provider."""
    by_name = {peer.name: peer for peer in peers}
    best = min((peer for peer in peers if peer.name.startswith("trl")), key=lambda peer: float(np.median(peer.seconds)), default=None)
    arch, commit, now = planned.decoder, revision(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    rows = []
    for peer in peers:
        low, middle, high = np.percentile([1 / seconds for seconds in peer.seconds], [20, 50, 80]).tolist()
        told = [one for round_ in counts[peer.name] for one in round_]
        tokens, targets = sum(one[0] for one in told), sum(one[1] for one in told)
        per_step = tokens / (options.rounds * options.steps)
        rows.append(
            {
                "commit": commit,
                "date": now,
                "device": peer.ready["device"],
                "threads": peer.ready["versions"].pop("threads", None),
                "load": round(os.getloadavg()[0], 2),
                "versions": " ".join(f"{name}={version}" for name, version in (peer.ready["versions"] | _peers_versions()).items()),
                "provider": peer.name,
                "precision": precision("gigatrain" if peer.name == "gigatrain" else "trainer", planned),
                "architecture": f"{arch.family} {arch.layers}x{arch.hidden} vocab {arch.vocab}",
                "parameters": planned.parameters,
                "batch": planned.batch,
                "microbatch": planned.microbatch,
                "sequence": planned.sequence,
                "data": options.chats or "stdlib",
                "lr": planned.optim.lr,
                "steps": len(peer.losses),
                "rounds": f"{options.rounds}x({options.settle}+{options.steps})",
                "tokens_per_s": round(middle, 1),
                "tokens_per_s_p20": round(low, 1),
                "tokens_per_s_p80": round(high, 1),
                "step_ms": round(1e3 * per_step / middle, 3),
                "tokens_per_step": round(per_step, 1),
                "trained_share": round(targets / tokens, 4),
                "peak_mib": round(max(answer["peak_bytes"] for answer in peer.answers) / 2**20, 1),
                "loss_first": peer.losses[0],
                "loss_last": float(np.mean(peer.losses[-10:])),
                "loss_error": errors[peer.name],
                "ratio_to_trl": ratio(by_name.get("trl"), peer),
                "ratio_to_best_trl": ratio(best, peer),
                "warmup_s": round(peer.warmup_s, 2),
            }
        )
    return rows


def _peers_versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for name in ("trl", "unsloth"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def show(found: dict[str, Any]) -> None:
    """The table, and below it who did not run and why."""
    from rich.console import Console
    from rich.table import Table

    console, rows = Console(width=180, highlight=False), found["rows"]
    if rows:
        one = rows[0]
        console.print(
            f"{one['device']}, {one['threads']} threads, load {one['load']}; {one['architecture']}, {one['parameters']:,} parameters; "
            f"batch {one['batch']} x {one['sequence']}, microbatch {one['microbatch']}; rounds {one['rounds']}; lr {one['lr']:g}; data {one['data']}"
        )
    table = Table(box=None)
    for heading, (_, form) in SHOWN.items():
        table.add_column(heading, justify="right" if form else "left", no_wrap=True)
    for row in sorted(rows, key=lambda row: -row["tokens_per_s"]):
        table.add_row(*("-" if row[column] is None else format(row[column], form) for column, form in SHOWN.values()))
    console.print(table)
    for name, reason in found["failed"].items():
        console.print(f"{name}: {reason}", markup=False)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], epilog="Read the head of this file for what is measured."
    )
    parser.add_argument("--model", default="small", help="small, a named architecture or a folder (default: %(default)s)")
    parser.add_argument("--tokenizer", help="a tokenizer with a chat template; default: one of 4,096 ids, with ChatML")
    parser.add_argument("--chats", help="conversations as JSON Lines of messages; default: made from Python's standard library")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the recipe; may be repeated")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--providers", help=f"comma-separated; default: {','.join(DEFAULT)}")
    parser.add_argument("--quick", action="store_true", help="3 rounds of half as many steps")
    parser.add_argument("--rounds", type=int, help="default: 8")
    parser.add_argument("--steps", type=int, help="timed steps of a round; default: 10, on a GPU 50")
    parser.add_argument("--settle", type=int, help="steps before them that are not timed; default: 1, on a GPU 5")
    parser.add_argument("--warmup", type=int, help="steps before the first round; default: 3")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a worker may take for an answer (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "tune.csv", help="rows are appended (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(provide)
        return 0
    options.site, options.why = load.local_site()
    gpu = options.site.device == "cuda"
    sizes = {
        "rounds": 3 if options.quick else 8,
        "steps": (50 if gpu else 10) // (2 if options.quick else 1),
        "settle": 5 if gpu else 1,
        "warmup": 3,
    }
    for name, size in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, size)
    options.providers = options.providers or ",".join(DEFAULT)
    try:
        if min(options.rounds, options.steps, options.warmup, options.settle + 1) < 1:
            raise RunError("--rounds, --steps and --warmup must be at least 1, and --settle at least 0")
        found = measure(options, lambda text: print(text, file=sys.stderr, flush=True))
        if options.json:
            print(json.dumps(found))
        else:
            show(found)
        append(found["rows"], options.out)
    except GigatrainError as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and files go too
    sys.exit(main())
