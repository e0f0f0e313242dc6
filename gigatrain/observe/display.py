"""The live display of a run: one line that moves in a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any, Self, get_args

from rich.console import Console
from rich.control import Control
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gigatrain.foreign import Foreign
from gigatrain.launching.size import shown
from gigatrain.observe.logs import Log
from gigatrain.planning import adapting, cost
from gigatrain.planning.plan import Plan, gib


class _Logged(Console):
    """A terminal whose lines, but not its moving bar, are written to the log too."""

    log: Log

    def print(self, *objects: Any, **how: Any) -> None:
        super().print(*objects, **how)
        if objects and not any(isinstance(one, Control) for one in objects):
            self.log.write(" ".join(getattr(one, "plain", None) or str(one) for one in objects) + "\n")


class Display:
    """Shows progress of the corpus build and of the run; lines above the bar stay."""

    def __init__(self, console: Console | None = None, log: Log | None = None) -> None:
        """`log`: of a rank whose standard output passes through its log; a terminal behind it is still shown a bar that moves."""
        if log is not None and log.screen is not None:
            console = _Logged(file=log.screen, highlight=False, soft_wrap=True)
            console.log = log
        self.console = console or Console(stderr=False, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,}/{task.total:,}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self.tasks: dict[str, TaskID] = {}
        self.shown_s = 0.0
        self.began: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def line(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)
        if not self.live:
            sys.stdout.flush()

    def advance(self, what: str, done: int, total: int, numbers: str = "") -> None:
        """Move the bar called `what`; without a terminal, print a line at the first, the last and every fifth second."""
        if self.live:
            if what not in self.tasks:
                self.tasks[what] = self.progress.add_task(what, total=total, completed=done, numbers=numbers)
            self.progress.update(self.tasks[what], completed=done, total=total, numbers=numbers)
            if done >= total:
                self.progress.stop_task(self.tasks[what])
            if not isinstance(self.console, _Logged):
                return
        now = time.monotonic()
        begin, first = self.began.setdefault(what, (now, done))
        if now - self.shown_s >= 5 or done >= total:
            self.shown_s = now
            eta = (now - begin) / (done - first) * (total - done) if done > first else None
            text = f"{what} {done:,}/{total:,}  {numbers}" + (f"  ETA {eta:.0f} s" if eta else "")
            if isinstance(self.console, _Logged):
                self.console.log.write(f"{text}\n")  # the bar is on the screen
            else:
                self.line(text)

    def plan(self, plan: Plan, why: str) -> None:
        """What will happen, on a few lines."""
        shape = plan.architecture
        self.line(f"{plan.name}: {plan.summary}" if plan.summary else plan.name)
        what = f"{shape.class_name} (transformers)" if isinstance(shape, Foreign) else shape.family
        active = ""
        heads = "" if isinstance(shape, Foreign) else f"{shape.heads}/{shape.kv_heads} heads, "
        if not isinstance(shape, Foreign) and shape.experts:
            heads += f"{shape.experts_per_token} of {shape.experts} experts, "
            active = f" ({shape.active_parameters():,} of them for a token)"
        self.line(
            f"  model    {what}, {plan.parameters:,} parameters{active}: {shape.layers} layers, hidden {shape.hidden}, {heads}vocabulary {shape.vocab}"
        )
        self.line(
            f"  step     {plan.batch} samples x {plan.sequence} tokens = {plan.tokens_per_step:,} tokens"
            + (f", in {plan.accumulation} microbatches of {plan.microbatch}" if plan.accumulation > 1 else "")
            + f"; {plan.steps:,} steps = {plan.tokens:,} tokens; {plan.optim.name}, {plan.schedule.kind}, peak lr {plan.optim.lr:g}"
        )
        chosen = ", ".join(f"{choice.op} {choice.kernel}" for choice in plan.kernels if choice.kernel != "reference") or "all reference"
        if plan.ranks > 1:
            axes = plan.mesh.model_dump(include={"replicate", "shard", "expert", "context", "tensor", "pipeline"})
            shown = " x ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1 and axis != "expert")
            inner = f", of which {plan.mesh.expert} share the experts ({plan.mesh.dispatch})" if plan.mesh.expert > 1 else ""
            inner += f"; {plan.mesh.schedule}, {plan.mesh.stages} stages a rank" if plan.mesh.pipeline > 1 else ""
            inner += f"; {plan.mesh.exchange}" if plan.mesh.context > 1 else ""
            zero = f" ZeRO-{plan.engine.zero}" if plan.engine.name == "deepspeed" else ""
            self.line(f"  mesh     {plan.ranks:,} ranks: {shown}{inner}; engine {plan.engine.name}{zero}")
        if plan.adapter is not None:
            self.line(f"  adapter  {adapting.describe(plan.decoder, plan.adapter)}")
        self.line(f"  site     {plan.site} ({why}); {plan.precision} on {plan.device}, about {gib(plan.memory.total)}")
        if plan.draw.text():
            self.line(f"  power    {plan.draw.text()}")
        self.line(f"  kernels  {chosen}")
        if plan.fp8 is not None:
            self.line(f"  fp8      {plan.fp8.describe()}; bf16: head, embedding, norms{', router' if plan.decoder.experts else ''}")

    def plan_details(self, plan: Plan) -> None:
        """Memory by part, and every kernel with the reason for it."""
        memory = plan.memory
        self.line(
            f"  memory   weights {gib(memory.weights)}, gradients {gib(memory.gradients)}, optimizer {gib(memory.optimizer)}, "
            f"activations about {gib(memory.activations)}, workspace about {gib(memory.workspace)} (recompute: {plan.recompute})"
        )
        kernels = {choice.op: choice.kernel for choice in plan.kernels}
        size = 2 if plan.compute == "bf16" else 4
        if not isinstance(plan.architecture, Foreign):
            kept = {mode: cost.saved_bytes(plan.architecture, size, mode, kernels) for mode in get_args(cost.Recompute)}
            shown = ", ".join(f"{mode} {kept[mode] / 1024:,.1f}" for mode in kept)
            self.line(f"  kept     for the backward, KiB per token and layer: {shown}; this plan: {plan.recompute}")
        self.line(
            f"  compute  {plan.flops_per_token / 1e6:,.2f} MFLOP a token, {plan.flops_per_token * plan.tokens / 1e15:,.3f} PFLOP in all"
        )
        for choice in (one for one in plan.kernels if one.op not in _idle(plan)):
            self.line(f"  kernel   {choice.op:22} {choice.kernel:10} {choice.why}")
        for fusion in plan.fusions:
            self.line(f"  step     {'train.' + fusion.name:22} {'on' if fusion.on else 'off':10} {fusion.why}")
        self.line(f"  sha256   {plan.sha256}")

    def window(self, plan: Plan, window: dict[str, Any]) -> None:
        """One window's numbers beside the bar; validations and refused updates as lines that stay."""
        if "val_loss" in window:
            bits = f", {window['val_bits_per_byte']:.3f} bits per byte" if window.get("val_bits_per_byte") else ""
            self.line(f"step {window['step']}: validation loss {window['val_loss']:.4f}{bits}")
            return
        loss = "not finite" if window["loss"] is None else f"{window['loss']:.3f}"
        numbers = f"loss {loss}  {window['tokens_per_s'] or 0:,.0f} tokens/s"
        numbers += drawn(window)
        if window["bad_steps"]:
            numbers += f"  {window['bad_steps']} refused"
        self.advance("train", window["step"], plan.steps, numbers)


def _idle(plan: Plan) -> set[str]:
    """Operations that this plan never calls, of which a reader need not hear."""
    found = set() if plan.optim.name == "muon" else {"newton_schulz", "muon_momentum", "muon_update"}
    found |= set() if plan.dropout else {"dropout_add"}
    found |= set() if plan.fp8 is not None else {"quantise"}
    if isinstance(plan.architecture, Foreign):
        return found
    found |= {"swiglu", "geglu", "relu2", "xielu"} - {plan.architecture.activation}
    found |= set() if plan.architecture.experts else {"router", "expert_sort", "moe", "experts"}
    return found | ({"rope"} if plan.architecture.qk_norm == "head" else {"qk_norm_rope"})


def drawn(window: dict[str, Any]) -> str:
    """`  6.9 kW node  0.81 Mtok/s/MW`: watts at the widest boundary that is known, and what they give; nothing where no meter says anything."""
    name = next((one for one in ("facility", "it", "node", "device") if window.get(f"{one}_watts") is not None), None)
    if name is None:
        return ""
    gives = f"  {window['tokens_per_s_mw'] / 1e6:.3g} Mtok/s/MW" if window.get("tokens_per_s_mw") else ""
    return f"  {shown(window[f'{name}_watts'])} {name}{gives}"
