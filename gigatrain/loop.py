"""The training loop. Read this first.

`train` is one run from its plan to its summary, and `_steps` is everything that happens within it, in order. They know no backend and no
parallelism: engines and data do, behind their seams.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from gigatrain import engines, export, floors, leaving, objectives, run
from gigatrain.checkpoint import PASSING, Checkpoints, Intervals, Near, Saving, Timed, fill, weights_sha256, write_text
from gigatrain.data import build, reach, shown, taught
from gigatrain.data.course import Phase
from gigatrain.data.held import Held, build_sets
from gigatrain.data.held import figures as held_figures
from gigatrain.data.held import held as held_of
from gigatrain.data.loader import Batches
from gigatrain.data.pairs import Pairs
from gigatrain.engines import Engine, low, replicated, source
from gigatrain.errors import DataError, RunError
from gigatrain.exporting.card import keep_data
from gigatrain.foreign import Foreign
from gigatrain.kernels import launch
from gigatrain.models import starting
from gigatrain.models.decoder import verify
from gigatrain.objectives import figures, reference, teacher
from gigatrain.observe import hang, prometheus, stragglers, trace, watch
from gigatrain.observe.budget import Budget
from gigatrain.observe.display import Display
from gigatrain.observe.energy import Energy
from gigatrain.observe.health import Health
from gigatrain.observe.logs import Log, Progress
from gigatrain.observe.metrics import Metrics, percentile, versions
from gigatrain.observe.numerics import Numerics
from gigatrain.optim import schedule
from gigatrain.parallel import ranks
from gigatrain.parallel.agree import agreed
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import Piece, State
from gigatrain.planning.plan import NARROW, Plan
from gigatrain.power import account
from gigatrain.power.control import stagger


def train(
    plan: Plan, folder: Path, *, start: run.Start = "auto", display: Display | None = None, log: Log | None = None
) -> dict[str, Any] | None:
    """One run, from its plan to its export; returns its summary, or None when a signal ended it early.

    `log`, which the command has opened, begins once the folder is this run's. Raises DataError, CheckpointError and RunError; whatever it raises,
    committed checkpoints are whole.
    """
    floors.versions()
    log = log or Log(folder)
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(leaving.installed())
        mesh, device = stack.enter_context(ranks.joined(plan.mesh, plan.ranks, plan.device, folder))
        display = stack.enter_context((display or Display()) if mesh.rank == 0 else Display(Console(file=io.StringIO())))
        return _train(plan, folder, start, mesh, device, display, log, asked)


def _train(
    plan: Plan, folder: Path, start: run.Start, mesh: Mesh, device: torch.device, display: Display, log: Log, asked: leaving.Leaving
) -> dict[str, Any] | None:
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        this, resumes = stack.enter_context(run.joined(plan, folder, start, mesh))
        log.own()
        stack.enter_context(hang.Watch(log, plan.report.hang_s, folder / "logs" / "progress.jsonl" if mesh.rank == 0 else None))
        progress = stack.enter_context(Progress(log, folder if mesh.rank == 0 else None))
        if mesh.rank == 0:
            stack.enter_context(prometheus.served(folder, plan.report.prometheus_host, plan.report.prometheus, display.line))
        say = display.line if mesh.rank == 0 else print  # into the rank's log
        energy = stack.enter_context(Energy(plan, mesh, folder, this.id, progress=progress, say=say))
        if not resumes and plan.recovery.replicas == "none":  # a replica may be given the steps of another
            _check_ahead(plan, this)
        for line in [] if resumes else ranks.first(mesh, lambda: starting.check(plan)):
            display.line(line)
        log.pulse.mark("corpus")
        corpus = _corpus(plan, this, resumes, mesh, display, log)
        train_on, held = corpus.totals("train"), corpus.totals("validation")
        display.line(
            f"  data     {train_on['documents']:,} documents, {train_on['tokens']:,} tokens, read {plan.tokens / train_on['tokens']:.2f} times; "
            f"{held['documents']:,} documents held out"
        )
        for line in corpus.left_out():
            display.line(f"  data     {line}")
        for line in [] if resumes else ranks.first(mesh, lambda: starting.other_tokens(plan.source, corpus.folder / "tokenizer")):
            display.line(line)
        try:
            summary = _steps(plan, folder, this, resumes, corpus, mesh, device, display, began, log, progress, energy)
        except (torch.OutOfMemoryError, MemoryError) as failure:
            raise RunError(f"out of memory: {(str(failure) or 'of the host').splitlines()[0]}; {_LESS}") from None
        except RuntimeError as failure:
            if "can't allocate memory" not in str(failure):
                raise
            raise RunError(f"out of memory: {str(failure).splitlines()[0][-200:]}; {_LESS}") from None
        if summary is None:
            return None
        asked.leave()  # a signal that came with the last step: a resume does what follows
        if mesh.rank:
            return summary
        log.pulse.mark("export")
        finished = summary["wall_s"] is not None
        if plan.export and not (finished and (folder / "export").is_dir()):
            with energy.during("export"):
                export.export(folder, folder / "export", display=display)
        if finished:
            display.line(f"{folder} is finished: nothing is left to do")
            return summary
        summary["wall_s"] = round(this.elapsed_s + time.monotonic() - began, 3)
        energy.close()
        summary["energy"] = {key: value for key, value in account.account(folder).items() if key != "windows"}
        drifts = watch.Reader(folder).drift()  # None: the plan expects nothing
        summary["drift"] = None if drifts is None else [one["words"] for one in drifts]
        write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        for one in drifts or ():
            display.line(f"DRIFT: {one['words']}")
        _show_sample(plan, folder, display, corpus)
        _show_summary(summary, folder, display)
        return summary


def _steps(
    plan: Plan,
    folder: Path,
    this: run.Run,
    resumes: bool,
    corpus: build.Corpus,
    mesh: Mesh,
    device: torch.device,
    display: Display,
    began: float,
    log: Log,
    progress: Progress,
    energy: Energy,
) -> dict[str, Any] | None:
    """From the first step, or the newest checkpoint, to the last checkpoint; returns the summary, or None after a signal."""
    log.pulse.mark("build")
    _prepare(plan)
    if device.type == "cuda":
        with progress.spent("compile"):
            _verify(plan, device, display)
    # An adapter's checkpoints name the weights that it stands beside.
    base = None if plan.adapter is None else source.base_of(plan, mesh)
    named = {} if base is None else {"base": base}
    engine = engines.make(plan, mesh, device, fresh=not resumes and plan.optim.source is None)
    reader, readers = mesh.data
    held = _held_out(plan, corpus, mesh, device)
    asked = plan.checkpoint
    saves = Checkpoints(folder, run=this.id, plan_sha256=plan.meaning, keep=asked.keep, keep_every=asked.keep_every, mesh=mesh)
    say = display.line if mesh.rank == 0 else lambda line: None
    with contextlib.ExitStack() as stack:
        near = Near(asked.near, asked.near_copies, saves, say)
        stack.callback(near.close)
        shift = stagger(this.id, asked.every) if plan.power.stagger and asked.every != "auto" else 0
        intervals = Intervals(plan, mesh, say, shift=shift, near=near.off is None)
        batches = Batches(
            corpus,
            sequence=plan.sequence,
            packing=plan.data.packing,
            batch=plan.batch,
            microbatch=plan.microbatch,
            seed=plan.seed,
            rank=reader,
            ranks=readers,
            device=device,
            phases=[Phase(one.steps, one.sequence, one.batch, one.microbatch, one.weights) for one in plan.stretches],
            form=objectives.form(plan.objective),
        )
        stack.callback(batches.close)
        for line in batches.packed():
            say(f"  packed   {line}")
        if plan.objective.kind == "distil":
            _teach(plan, batches, corpus, device, mesh, log)
        if plan.optim.source is not None and not resumes:
            with progress.spent("restore"):
                for line in run.begin_from(plan, engine, batches, mesh, base):
                    display.line(f"  begins   {line}")
        if reference.asked(plan.objective):
            with progress.spent("reference"):
                _refer(plan, folder, engine, batches, held, resumes, mesh, display, log)
        with progress.spent("restore"):
            kept, power = _resume(near, engine, batches, this, display, base) if resumes else ({}, {})
        lives = stack.enter_context(replicated.joined(plan, mesh, engine, batches, display.line))
        engine = lives.engine
        found = lives.enter(lambda: {"run": this.state(), "data": batches.state(), "metrics": kept, "power": power})
        if found is not None:  # of a replica that is further on
            kept, power = _taken(found, batches, this, display)
        _check_ahead(plan, this)
        if this.step == plan.steps and (folder / "summary.json").is_file():
            near.finish()  # the process that finished may have been killed before it had cleaned up
            energy.complete = True
            return json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if mesh.rank == 0:
            run.claim(plan, folder, this)
            export.keep_tokenizer(corpus.tokenizer(), folder)
            keep_data(corpus, corpus.weights, folder)
        writes = folder if mesh.rank == 0 else None
        metrics = stack.enter_context(Metrics(plan, writes, device, step=this.step, show=lambda window: display.window(plan, window)))
        metrics.load(kept)
        health = stack.enter_context(Health(plan, mesh))
        where = {"rank": mesh.rank, "ranks": mesh.count, "step": this.step}
        compared = bool(stragglers.sections(plan, mesh))
        times = trace.opened(plan.profile, folder, device, **where, say=display.line, pulse=log.pulse, times=compared)
        engine.trace = stack.enter_context(times)
        budget = Budget(plan, energy, health, times, progress, intervals.left)
        budget.load(power)
        saving = stack.enter_context(Saving(saves, background=asked.background, say=display.line, tell=progress.add, sync=metrics.written))
        early = plan.fp8 is not None or plan.fuses("release") or plan.engine.name != "native"  # may change what is saved within a backward
        before = this.elapsed_s
        waits = progress.spent if device.type == "cpu" else lambda what: contextlib.nullcontext()  # a GPU computes meanwhile

        def again() -> None:
            saving.end()  # what is being written is of steps that are made again
            kept, _ = _resume(near, engine, batches, this, display, base)
            saves.forget(this.step)
            metrics.rewind(this.step, kept)
            near.begin()
            intervals.begin(this.step)
            progress.add("steps", step=this.step)
            begin()

        def begin() -> None:
            energy.begin(this.step, this.tokens)
            budget.begin(this.step, this.tokens)
            metrics.clock.restart()

        numerics = Numerics(plan, engine, batches, mesh, health, writes, times, say=display.line, again=again, looked=metrics.looked)

        def meet() -> bool:
            sums = health.agree([*energy.numbers(), *saving.numbers(), *budget.numbers(), *numerics.numbers(this.step)])
            numerics.meet(budget.meet(saving.meet(energy.meet(sums))))
            return health.wants_out

        def pause() -> bool:
            leaves = meet()
            energy.report(this.step, this.tokens, times)
            return leaves

        def kept_now() -> dict[str, Any]:
            this.elapsed_s = before + time.monotonic() - began
            kept = metrics.state()
            this.tokens = metrics.tokens
            return {"run": this.state(), "data": batches.state(), "metrics": kept, "power": budget.state(), **named}

        lives.offer = kept_now

        def save(tier: Literal["far", "near"] = "far", *, must: bool = False) -> None:
            if not (must or lives.leads):
                return
            numerics.settle(this)  # what is saved may be resumed
            if must or tier == "near" or not saving.background:
                metrics.sync()  # in the background the process that commits does it
            state = kept_now()
            with times.phase("checkpoint"), progress.spent("checkpoint"), energy.during("checkpoint"), Timed() as timed:
                if tier == "near":
                    near.save(this.step, _state(engine, mesh, device), state)
                else:
                    saving.save(this.step, lambda: _state(engine, mesh, device), state, must=must, hurried=health.wants_out)
            intervals.saved(tier, this.step, timed.seconds, near.beside_s if tier == "near" else saving.totals.beside_s, must=must)

        def validate() -> None:
            if held is not None and _validates_at(plan, this.step) and metrics.validated < this.step:
                with times.phase("validation"), progress.spent("validation"), energy.during("validation"):
                    found = _validate(plan, engine, held, health, times)
                if found is not None:
                    metrics.validated = this.step
                    metrics.write({"step": this.step} | found)

        display.advance("train", this.step, plan.steps)
        if resumes or found is not None:
            validate()  # a signal may have come before it
        else:
            save(must=True)  # step 0: from here on, a kill at any moment leaves something to resume
        near.begin()
        intervals.begin(this.step)
        progress.add("steps", step=this.step)
        meet()
        begin()
        numerics.begin(this.step)
        while this.step < plan.steps and not health.leaves():
            budget.wait(pause, times.alive)  # where the run keeps to a power budget
            times.begin(this.step)
            with times.phase("data"), waits("data"):
                batch = next(batches)
            if early:
                saving.before_change()
            engine.forward_backward(batch)
            saving.before_change()
            rate = schedule.rate(plan.schedule, this.step, plan.steps)
            update = engine.step(rate)
            this.advance()
            metrics.add(update)
            ends = this.step == plan.steps
            reports, due = ends or this.step % plan.report.every == 0, intervals.due(this.step)
            if reports:
                meet()
            if (reports or due or _validates_at(plan, this.step)) and numerics.look(this):
                continue  # steps that were refused, or held behind such a one, are made again
            if ends:
                numerics.settle(this)  # as before the last save, but a run that goes back by it has its loop yet
                if this.step < plan.steps:
                    continue
            if reports:
                bad = metrics.report(this.step, rate, engine.bad, lambda tokens: energy.figures(tokens) | numerics.figures())
                this.tokens = metrics.tokens
                numerics.check(this, bad)
                times.window()
                progress.report(this.step, this.tokens, metrics.window_s, metrics.compile_s)
                energy.report(this.step, this.tokens, times)
                budget.decide(this.step, this.tokens)
                if intervals.report(metrics.window_s, metrics.window_steps):
                    progress.add("saves", **intervals.summary())
            if _validates_at(plan, this.step):
                validate()
                metrics.clock.restart()
                budget.stopped()
            for tier in due if not ends and not health.wants_out else ():
                save(tier)
                metrics.clock.restart()
                budget.stopped()
        if device.type == "cuda":
            torch.cuda.synchronize()  # a signal may have come within a window, whose steps are saved too
        if unreported := metrics.clock.take_s():
            progress.report(this.step, this.tokens, sum(unreported))
        save(must=True)
        near.finish()
        meet()
        energy.report(this.step, this.tokens, times, must=True)
        unvalidated = held is not None and metrics.validated < plan.steps  # a signal cut the last validation short
        budget.end()
        if this.step < plan.steps or unvalidated:
            progress.why = health.signal or "signal"
            display.line(f"{health.signal}: saved at step {this.step} of {plan.steps}; go on with --resume --run {folder}")
            return None
        this.elapsed_s, energy.complete = before, True
        return _summary(plan, this, saves, saving, corpus, metrics, mesh) | {"saving": intervals.summary() | near.summary()}


def _teach(plan: Plan, batches: Batches, corpus: build.Corpus, device: torch.device, mesh: Mesh, log: Log) -> None:
    """Let a teacher's words come with every microbatch: its own, or those kept beside the corpus. A resume then compares whose they are."""
    if plan.objective.online:
        compute = torch.bfloat16 if plan.compute == "bf16" else torch.float32
        found = teacher.Teacher(plan.objective, vocab=plan.architecture.vocab, tokenizer=corpus.tokenizer(), compute=compute, device=device)
        batches.teacher, batches.reference = found, ranks.first(mesh, found.sha256)
        return

    def alive() -> None:
        log.pulse.beats += 1

    share: dict[str, Any] = {
        "rank": mesh.rank,
        "ranks": mesh.count,
        "alive": alive,
    }  # of what is hashed: each as much, so that none waits long for another
    with agreed(mesh, DataError, str):
        batches.taught = {
            length: taught.Taught(corpus, plan.objective, length, plan.data.packing, check=True, **share)
            for length in sorted({phase.sequence for phase in plan.stretches})
        }


def _refer(
    plan: Plan,
    folder: Path,
    engine: Engine,
    batches: Batches,
    held: Held | None,
    resumes: bool,
    mesh: Mesh,
    display: Display,
    log: Log,
) -> None:
    """Give every pair what the starting weights say of it: from the folder, or, before the first step, computed and kept there."""
    splits: dict[str, Any] = {"train": batches.samples}
    for number, one in enumerate(held or ()):
        splits.setdefault("validation" if one.held_out else f"set{number}", one.validation.samples)
    whose = f"{plan.meaning}/{batches.corpus.sha256}"
    found = reference.known(folder, whose, splits) if resumes else None
    if found is None:
        if resumes:
            raise RunError(
                f"{folder}/reference is gone, and the weights it was computed with are no more; copy it back, or start over with --new"
            )
        log.pulse.mark("reference")

        def shown(*numbers: Any) -> None:
            log.pulse.beats += 1
            display.advance(*numbers)

        how = json.dumps([plan.precision, [[one.op, one.kernel] for one in plan.kernels]])
        found = reference.compute(
            folder, whose, how, splits, logprobs=engine.logprobs, microbatch=plan.microbatch, mesh=mesh, advance=shown
        )
        display.line(f"  kept     log-probabilities of the starting weights in {folder / 'reference'}")
    batches.reference = found
    for one in held or ():  # the held-out documents of a mixture are read by source, from the same rows
        for mine, same in zip(one.validation.samples, splits["validation"] if one.held_out else (), strict=False):
            assert isinstance(mine, Pairs)
            mine.reference = same.reference


_LESS = 'lower train.microbatch or train.sequence, or --set train.recompute=full; "gigatrain plan" shows what the run needs'


def _corpus(plan: Plan, this: run.Run, resumes: bool, mesh: Mesh, display: Display, log: Log) -> build.Corpus:
    """The corpus that the run began with, if it is still there; else rank 0 builds it and the others open it. A resume then compares its hash."""

    def built() -> str:
        if (outside := reach.outside(plan.tokenizer, plan.data.sources, plan.architecture.vocab)) is not None:
            raise RunError(outside)
        before = Path(plan.data.folder).expanduser().absolute() / this.corpus if this.corpus else None
        if resumes and before is not None and (before / "manifest.json").is_file():
            corpus = build.Corpus.open(before, weights, check=True)
        else:
            if before is not None:
                display.line(f"  corpus   {before} is not there: built again from the recipe's sources, and compared by its hash")
            try:
                corpus = build.build(plan.data, plan.tokenizer, progress=shown)
            except DataError as failure:
                if before is None:
                    raise
                raise DataError(
                    f"{failure}\nThis run goes on with its corpus {before.name} and no other, and it is not in {before.parent}: copy that folder "
                    "from where the run began (its data.folder), or make the sources reachable here"
                ) from None
        return str(corpus.folder)

    def shown(*numbers: Any) -> None:
        log.pulse.beats += 1
        display.advance(*numbers)

    weights = tuple(source.weight for source in plan.data.sources)
    folder = Path(ranks.first(mesh, built))
    this.corpus = folder.name
    with agreed(mesh, DataError, str):
        corpus = build.Corpus.open(folder, weights)
    return dataclasses.replace(corpus, embedded=plan.architecture.vocab)


def _prepare(plan: Plan) -> None:
    """The process-wide switches of the run, and whether torch can do what the plan says."""
    if plan.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.manual_seed(plan.seed)  # nothing of ours draws from it, but a checkpoint keeps it: two runs are equal in all that they keep
    torch.use_deterministic_algorithms(plan.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] (every kernel writes all of its outputs: NaNs first cost a pass)
    if plan.device == "cpu":
        return
    if not torch.cuda.is_available():
        raise RunError(
            f"the plan is for site {plan.site!r} with a CUDA device, but torch {torch.__version__} finds none; "
            "install a CUDA build of torch, or choose --site laptop"
        )
    if plan.compute == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RunError(f"{torch.cuda.get_device_name()} has no bf16 arithmetic; --set train.precision=fp32")
    if plan.fp8 is not None and (why := low.refused(plan.fp8, torch.device("cuda", torch.cuda.current_device()))):
        raise RunError(
            f'train.precision "fp8" with fp8.scaling {plan.fp8.scaling!r}: {why}; choose another, or set fp8.emulate = true for its numbers'
        )


def _verify(plan: Plan, device: torch.device, display: Display) -> None:
    """Compile the run's fused kernels, and judge each on this device against fp64 before the run trusts it."""
    launch.cache_on_this_node()
    if isinstance(plan.architecture, Foreign):
        return  # the engine compares such a model with itself
    kernels = {choice.op: choice.kernel for choice in plan.kernels if choice.kernel not in NARROW.get(choice.op, ())}
    if plan.fp8 is not None:
        low.verify(plan, device)
    shared = plan.mesh.tensor * (plan.mesh.context if plan.mesh.exchange == "ulysses" else 1)
    worst = verify(
        plan.architecture,
        kernels,
        device,
        torch.bfloat16 if plan.compute == "bf16" else torch.float32,
        sequence=plan.sequence,
        packed=plan.documents,
        ranks=shared,
    )
    if worst:
        found = ", ".join(f"{op} {multiple:.2f}" for op, multiple in sorted(worst.items()))
        display.line(f"  verified fused kernels on {torch.cuda.get_device_name(device)}, error over what is allowed: {found}")


def _resume(
    near: Near, engine: Engine, batches: Batches, this: run.Run, display: Display, base: dict[str, str] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fill everything from the newest step that is whole on either tier; says which ones were not whole. Returns what metrics and power budget kept.

    Of an adapter it must have been trained beside `base`.
    """
    found, refused, why = near.latest()
    if base is not None:
        source.check_base(found.state.get("base", {}), base)
    for reason in refused:
        display.line(f"CHECKPOINT REFUSED: {reason}")
    random = _random_state(batches.device)
    state, live = found.state, {**engine.state(), "random": {name: Piece.whole(tensor) for name, tensor in random.items()}}
    batches.load(state["data"])
    near.bring(found, live)
    for line in [*this.changes.said(), *fill(found, live, near.mesh, passing=PASSING if this.changes.all else ())]:
        display.line(f"  resumes  {line}")
    engine.restored()
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])
    this.load(state["run"])
    display.line(
        f"resumed at step {this.step} from {found.folder}"
        + (f" ({why})" if why else " (an older one: the newer are damaged)" if refused else "")
    )
    return state["metrics"], state.get("power", {})


def _check_ahead(plan: Plan, this: run.Run) -> None:
    """Raise RunError where a checkpoint lies behind the plan's end, or before its schedule begins."""
    if this.step > plan.steps:
        raise RunError(
            f"the newest checkpoint is of step {this.step:,}, and train.steps is {plan.steps:,}; raise it to what the run is to reach"
        )
    if this.step < plan.schedule.from_step and this.step == 0:
        raise RunError(
            f"schedule.from_step {plan.schedule.from_step:,} is where another schedule goes on in a run that got there, and this one begins at step 0; leave "
            "schedule.from_step out, or resume the run that is meant: --resume --other-numbers --run DIR"
        )
    if this.step < plan.schedule.from_step:
        raise RunError(
            f"schedule.from_step {plan.schedule.from_step:,} lies ahead of the newest checkpoint, step {this.step:,}; go on under the schedule so far until "
            f"then, or set schedule.from_step = {this.step}"
        )


def _state(engine: Engine, mesh: Mesh, device: torch.device) -> State:
    """What a checkpoint keeps of this rank's tensors."""
    random = {name: Piece.whole(tensor, writes=mesh.rank == 0) for name, tensor in _random_state(device).items()}
    return {**engine.state(), "random": random}


def _taken(found: dict[str, Any], batches: Batches, this: run.Run, display: Display) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `_resume`, once the engine has the state of another replica. Returns what metrics and power budget kept there."""
    batches.load(found["data"])
    this.load(found["run"])
    display.line(f"goes on at step {this.step} with the state of another replica")
    return found["metrics"], found.get("power", {})


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else states


def _held_out(plan: Plan, corpus: build.Corpus, mesh: Mesh, device: torch.device) -> Held | None:
    """What is validated on; rank 0 tokenises the recipe's further sets, and the others open them."""

    def built() -> list[str]:
        return [str(own.folder) for own in build_sets(corpus, plan.data, plan.validation.sets).values()]

    names = [one.name for one in plan.validation.sets]
    folders = ranks.first(mesh, built) if names else []
    with agreed(mesh, DataError, str):
        further = {
            name: dataclasses.replace(build.Corpus.open(Path(folder)), embedded=plan.architecture.vocab)
            for name, folder in zip(names, folders, strict=True)
        }
    reader, readers = mesh.data
    return held_of(
        corpus,
        further,
        held_out=plan.data.validation > 0,
        sequence=plan.sequence,
        packing=plan.data.packing,
        microbatch=plan.microbatch,
        max_samples=plan.validation.max_samples,
        rank=reader,
        ranks=readers,
        device=device,
        form=objectives.form(plan.objective),
    )


def _validates_at(plan: Plan, step: int) -> bool:
    return step == plan.steps or (plan.validation.every > 0 and step > 0 and step % plan.validation.every == 0)


def _validate(plan: Plan, engine: Engine, held: Held, health: Health, times: trace.Trace) -> dict[str, Any] | None:
    """The figures of each set on the weights as they are (data/held.py, objectives/figures.py); None when a signal cut it short."""

    def until_signal(parts: Iterable[Any]) -> Iterator[Any]:
        for part in parts:
            if health.leaves():
                return
            times.alive()
            yield part

    sums, whole, beside = [], [one for one in held if one.held_out] or [*held][:1], [0.0] * (1 + figures.count(plan.objective))
    for one in held:
        nats, *rest = engine.evaluate(until_signal(one.validation)).tolist()
        if health.wants_out:
            return None
        sums.append((one, nats, rest[0]))
        if one in whole:
            beside = [a + b for a, b in zip(beside, rest, strict=True)]
    found = held_figures(sums)
    if plan.objective.pairs:
        del found["val_perplexity"]
    return found | {f"val_{name}": number for name, number in figures.said(plan.objective, beside[1:], beside[0]).items()}


def _summary(
    plan: Plan, this: run.Run, saves: Checkpoints, saving: Saving, corpus: build.Corpus, metrics: Metrics, mesh: Mesh
) -> dict[str, Any]:
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


def _show_sample(plan: Plan, folder: Path, display: Display, corpus: build.Corpus) -> None:
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


def _show_summary(summary: dict[str, Any], folder: Path, display: Display) -> None:
    speed = f"; steps ran at {summary['tokens_per_s']:,.0f} tokens/s" if summary["tokens_per_s"] else ""
    display.line(f"{summary['steps']:,} steps, {summary['tokens']:,} tokens in {summary['wall_s']:.0f} s{speed}")
    if summary["bits_per_byte"]:
        xz = summary["xz_bits_per_byte"]
        display.line(f"held-out text: {summary['bits_per_byte']:.3f} bits per byte" + (f"; xz -9 on the same text: {xz:.3f}" if xz else ""))
    display.line(f"run folder: {folder}")
