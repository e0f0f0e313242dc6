"""The training loop. Read this first.

`train` is one run from its plan to its summary, and `_steps` is everything that happens within it, in order. They know no backend and no
parallelism: engines and data do, behind their seams.
"""

import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from gigatrain import engines, export, feed, floors, leaving, restore, run, summary, validation
from gigatrain.checkpoint import Checkpoints, Intervals, Near, Saving, Timed, write_text
from gigatrain.data.corpus import Corpus
from gigatrain.engines import ready, replicated, source
from gigatrain.errors import RunError
from gigatrain.exporting.card import keep_data
from gigatrain.models import starting
from gigatrain.objectives import reference
from gigatrain.observe import hang, prometheus, reader, stragglers, trace
from gigatrain.observe.budget import Budget
from gigatrain.observe.display import Display
from gigatrain.observe.energy import Energy
from gigatrain.observe.health import Health
from gigatrain.observe.logs import Log, Progress
from gigatrain.observe.metrics import Metrics
from gigatrain.observe.numerics import Numerics
from gigatrain.optim import schedule
from gigatrain.parallel import ranks
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning.plan import Plan
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
            restore.check_ahead(plan, this)
        if slow := ready.handicap(plan):
            display.line(f"  slow     {slow}; --set train.precision=fp32")
        for line in [] if resumes else ranks.first(mesh, lambda: starting.check(plan)):
            display.line(line)
        log.pulse.mark("corpus")
        corpus = feed.corpus(plan, this, resumes, mesh, display, log)
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
            found = _steps(plan, folder, this, resumes, corpus, mesh, device, display, began, log, progress, energy)
        except (torch.OutOfMemoryError, MemoryError) as failure:
            raise RunError(f"out of memory: {(str(failure) or 'of the host').splitlines()[0]}; {_LESS}") from None
        except RuntimeError as failure:
            if "can't allocate memory" not in str(failure):
                raise
            raise RunError(f"out of memory: {str(failure).splitlines()[0][-200:]}; {_LESS}") from None
        if found is None:
            return None
        asked.leave()  # a signal that came with the last step: a resume does what follows
        if mesh.rank:
            return found
        log.pulse.mark("export")
        finished = found["wall_s"] is not None
        if plan.export and not (finished and (folder / "export").is_dir()):
            with energy.during("export"):
                export.export(folder, folder / "export", display=display)
        if finished:
            display.line(f"{folder} is finished: nothing is left to do")
            return found
        found["wall_s"] = round(this.elapsed_s + time.monotonic() - began, 3)
        energy.close()
        found["energy"] = {key: value for key, value in account.account(folder).items() if key != "windows"}
        drifts = reader.Reader(folder).drift()  # None: the plan expects nothing
        found["drift"] = None if drifts is None else [one["words"] for one in drifts]
        write_text(folder / "summary.json", json.dumps(found, indent=1) + "\n")
        for one in drifts or ():
            display.line(f"DRIFT: {one['words']}")
        summary.sample(plan, folder, display, corpus)
        summary.show(found, folder, display)
        return found


def _steps(
    plan: Plan,
    folder: Path,
    this: run.Run,
    resumes: bool,
    corpus: Corpus,
    mesh: Mesh,
    device: torch.device,
    display: Display,
    began: float,
    log: Log,
    progress: Progress,
    energy: Energy,
) -> dict[str, Any] | None:
    """From the first step, or the newest checkpoint, to the last checkpoint; returns the summary, or None after a signal."""
    # What is trained, on what, and where it is kept.
    log.pulse.mark("build")
    ready.prepare(plan)
    if device.type == "cuda":
        with progress.spent("compile"):
            ready.verify(plan, device, display.line)
    base = None if plan.adapter is None else source.base_of(plan, mesh)  # an adapter's checkpoints name the weights that it stands beside
    engine = engines.make(plan, mesh, device, fresh=not resumes and plan.optim.source is None)
    held = validation.held_out(plan, corpus, mesh, device)
    asked = plan.checkpoint
    saves = Checkpoints(folder, run=this.id, plan_sha256=plan.meaning, keep=asked.keep, keep_every=asked.keep_every, mesh=mesh)
    say = display.line if mesh.rank == 0 else lambda line: None
    with contextlib.ExitStack() as stack:
        near = Near(asked.near, asked.near_copies, saves, say)
        stack.callback(near.close)
        shift = stagger(this.id, asked.every) if plan.power.stagger and asked.every != "auto" else 0
        intervals = Intervals(plan, mesh, say, shift=shift, near=near.off is None)
        batches = feed.batches(plan, corpus, mesh, device)
        stack.callback(batches.close)
        for line in batches.packed():
            say(f"  packed   {line}")
        if plan.objective.kind == "distil":
            feed.teach(plan, batches, corpus, device, mesh, log)

        # Where it begins, or goes on from: another run's weights, its own newest checkpoint, or a replica that lives.
        if plan.optim.source is not None and not resumes:
            with progress.spent("restore"):
                for line in restore.begin_from(plan, engine, batches, mesh, base):
                    display.line(f"  begins   {line}")
        if reference.asked(plan.objective):
            with progress.spent("reference"):
                feed.refer(plan, folder, engine, batches, held, resumes, mesh, display, log)
        with progress.spent("restore"):
            kept, power = restore.resume(near, engine, batches, this, display, base) if resumes else ({}, {})
        lives = stack.enter_context(replicated.joined(plan, mesh, engine, batches, display.line))
        engine = lives.engine
        found = lives.enter(lambda: {"run": this.state(), "data": batches.state(), "metrics": kept, "power": power})
        if found is not None:  # of a replica that is further on
            kept, power = restore.taken(found, batches, this, display)
        restore.check_ahead(plan, this)
        if this.step == plan.steps and (folder / "summary.json").is_file():
            near.finish()  # the process that finished may have been killed before it had cleaned up
            energy.complete = True
            return summary.read(folder)
        if mesh.rank == 0:
            run.claim(plan, folder, this)
            export.keep_tokenizer(corpus.tokenizer(), folder)
            keep_data(corpus, corpus.weights, folder)

        # What watches it, each with a part in the one reduction of a report.
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

        # What happens between two steps.
        before = this.elapsed_s
        waits = progress.spent if device.type == "cpu" else lambda what: contextlib.nullcontext()  # a GPU computes meanwhile

        def again() -> None:
            saving.end()  # what is being written is of steps that are made again
            kept, _ = restore.resume(near, engine, batches, this, display, base)
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
            return {"run": this.state(), "data": batches.state(), "metrics": kept, "power": budget.state()} | (
                {} if base is None else {"base": base}
            )

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
                    near.save(this.step, restore.state(engine, mesh), state)
                else:
                    saving.save(this.step, lambda: restore.state(engine, mesh), state, must=must, hurried=health.wants_out)
            intervals.saved(tier, this.step, timed.seconds, near.beside_s if tier == "near" else saving.totals.beside_s, must=must)

        def validate() -> None:
            if held is not None and validation.due(plan, this.step) and metrics.validated < this.step:
                with times.phase("validation"), progress.spent("validation"), energy.during("validation"):
                    found = validation.figures(plan, engine, held, health, times)
                if found is not None:
                    metrics.validated = this.step
                    metrics.write({"step": this.step} | found)

        # The steps.
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
            if engine.early:
                saving.before_change()
            engine.forward_backward(batch)
            saving.before_change()
            rate = schedule.rate(plan.schedule, this.step, plan.steps)
            update = engine.step(rate)
            this.advance()
            metrics.add(update)  # stays on the device

            ends = this.step == plan.steps
            reports, due = ends or this.step % plan.report.every == 0, intervals.due(this.step)
            if reports:
                meet()  # the one reduction in which ranks learn of each other
            if (reports or due or validation.due(plan, this.step)) and numerics.look(this):
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
            if validation.due(plan, this.step):
                validate()
                metrics.clock.restart()
                budget.stopped()
            for tier in due if not ends and not health.wants_out else ():
                save(tier)
                metrics.clock.restart()
                budget.stopped()

        # The last checkpoint, of the end or of where a signal came.
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
        this.elapsed_s, energy.complete = before, True  # `train` adds what this process took, once the export is there
        return summary.of(plan, this, saves, saving, corpus, metrics, mesh) | {"saving": intervals.summary() | near.summary()}


_LESS = 'lower train.microbatch or train.sequence, or --set train.recompute=full; "gigatrain plan" shows what the run needs'
