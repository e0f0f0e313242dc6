"""What a run reads: its corpus, its batches, and what comes with them, of a teacher or of the starting weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from gigatrain import objectives
from gigatrain.data import build, reach, taught
from gigatrain.data.corpus import Corpus
from gigatrain.data.course import Phase
from gigatrain.data.held import Held
from gigatrain.data.loader import Batches
from gigatrain.data.pairs import Pairs
from gigatrain.engines import Engine
from gigatrain.errors import DataError, RunError
from gigatrain.objectives import reference, teacher
from gigatrain.observe.display import Display
from gigatrain.observe.logs import Log
from gigatrain.parallel import ranks
from gigatrain.parallel.agree import agreed
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning.plan import Plan
from gigatrain.run import Run


def corpus(plan: Plan, this: Run, resumes: bool, mesh: Mesh, display: Display, log: Log) -> Corpus:
    """The corpus that the run began with, if it is still there; else rank 0 builds it and the others open it. A resume then compares its hash."""

    def built() -> str:
        if (outside := reach.outside(plan.tokenizer, plan.data.sources, plan.architecture.vocab)) is not None:
            raise RunError(outside)
        before = Path(plan.data.folder).expanduser().absolute() / this.corpus if this.corpus else None
        if resumes and before is not None and (before / "manifest.json").is_file():
            found = Corpus.open(before, weights, check=True)
        else:
            if before is not None:
                display.line(f"  corpus   {before} is not there: built again from the recipe's sources, and compared by its hash")
            try:
                found = build.build(plan.data, plan.tokenizer, progress=shown)
            except DataError as failure:
                if before is None:
                    raise
                raise DataError(
                    f"{failure}\nThis run goes on with its corpus {before.name} and no other, and it is not in {before.parent}: copy that folder "
                    "from where the run began (its data.folder), or make the sources reachable here"
                ) from None
        return str(found.folder)

    def shown(*numbers: Any) -> None:
        log.pulse.beats += 1
        display.advance(*numbers)

    weights = tuple(source.weight for source in plan.data.sources)
    folder = Path(ranks.first(mesh, built))
    this.corpus = folder.name
    with agreed(mesh, DataError, str):
        found = Corpus.open(folder, weights)
    return dataclasses.replace(found, embedded=plan.architecture.vocab)


def batches(plan: Plan, corpus: Corpus, mesh: Mesh, device: torch.device) -> Batches:
    """This rank's share of every step, in the plan's order."""
    reader, readers = mesh.data
    return Batches(
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


def teach(plan: Plan, batches: Batches, corpus: Corpus, device: torch.device, mesh: Mesh, log: Log) -> None:
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


def refer(
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
