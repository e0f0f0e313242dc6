"""What a checkpoint keeps of a run, and where a run goes on from: its own checkpoints, another replica, or another run (`optim.from`)."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gigatrain import run
from gigatrain.checkpoint import PASSING, Checkpoints, Near, fill
from gigatrain.data.loader import Batches
from gigatrain.engines import Engine, ready, source
from gigatrain.errors import CheckpointError, RunError
from gigatrain.observe.display import Display
from gigatrain.parallel import ranks
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import Piece, State
from gigatrain.planning.plan import Plan


def state(engine: Engine, mesh: Mesh) -> State:
    """What a checkpoint keeps of this rank's tensors."""
    random = {name: Piece.whole(tensor, writes=mesh.rank == 0) for name, tensor in ready.random_state(mesh.device).items()}
    return {**engine.state(), "random": random}


def resume(
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
    random = ready.random_state(batches.device)
    state, live = found.state, {**engine.state(), "random": {name: Piece.whole(tensor) for name, tensor in random.items()}}
    batches.load(state["data"])
    near.bring(found, live)
    for line in [*this.changes.said(), *fill(found, live, near.mesh, passing=PASSING if this.changes.all else ())]:
        display.line(f"  resumes  {line}")
    engine.restored()
    ready.set_random_state(random)
    this.load(state["run"])
    display.line(
        f"resumed at step {this.step} from {found.folder}"
        + (f" ({why})" if why else " (an older one: the newer are damaged)" if refused else "")
    )
    return state["metrics"], state.get("power", {})


def taken(found: dict[str, Any], batches: Batches, this: run.Run, display: Display) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `resume`, once the engine has the state of another replica. Returns what metrics and power budget kept there."""
    batches.load(found["data"])
    this.load(found["run"])
    display.line(f"goes on at step {this.step} with the state of another replica")
    return found["metrics"], found.get("power", {})


def check_ahead(plan: Plan, this: run.Run) -> None:
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


def begin_from(plan: Plan, engine: Engine, batches: Batches, mesh: Mesh, base: Mapping[str, str] | None = None) -> list[str]:
    """Fill a fresh engine with weights and optimizer of the checkpoint that `optim.from` names, whatever mesh and engine saved it; lines for a reader.

    Counts of refused steps and the window that spikes are measured by stay this run's own. Where data, their order and the length of samples are the other
    run's, its samples are passed over, so that this run reads on behind them. An adapter must be of the same form, and trained beside `base`. Collective.
    Raises RunError and CheckpointError.
    """
    assert plan.optim.source is not None
    named = Path(plan.optim.source).expanduser()
    step = int(match[1]) if (match := re.fullmatch(r"step-(\d{8,})", named.name)) else None
    folder = named if step is None else named.parent.parent
    record = ranks.first(mesh, lambda: run.identity(folder))
    saves = Checkpoints(folder, run=record["id"], plan_sha256=record["meaning"], keep=1, mesh=mesh)
    said = ranks.first(mesh, lambda: _same_form(plan, folder))
    found = saves.latest()[0] if step is None else saves.at(step)
    if base is not None:
        source.check_base(found.state.get("base", {}), base)
    live = {group: dict(pieces) for group, pieces in engine.state().items() if group in ("weights", "optimizer")}
    for name in ("bad", "steps"):
        del live["optimizer"][name]
    kept = {
        group: {name: stored for name, stored in named.items() if (group, name) not in (("optimizer", "bad"), ("optimizer", "steps"))}
        for group, named in found.table.items()
        if group in live
    }
    said = [*fill(dataclasses.replace(found, table=kept), live, mesh, passing=PASSING), *said]
    engine.restored()
    before, mine = found.state["data"], batches.state()
    alike = [name for name in ("seed", "corpus", "weights", "sequence", "packing") if before.get(name) != mine[name]]
    if alike or before.get("phases"):
        why = f"{', '.join(alike)} of the data differ" if alike else "it went through phases"
        said.append(f"data begin anew: {why}")
    else:
        seen = batches.stream_of(before)
        batches.passed = [(0, seen), *((start, stop) for start, stop in map(tuple, before.get("passed", ())) if start >= seen)]
        said.append(f"data go on behind the {before['position']:,} samples that it read")
    return [f"weights and optimizer of {found.folder}, step {found.step}", *said]


def _same_form(plan: Plan, folder: Path) -> list[str]:
    """Raises CheckpointError where the run in `folder` has another form of adapter than `plan`, or only one of both has one; else lines for a reader."""
    theirs, mine = run.stored_plan(folder).adapter, plan.adapter
    if theirs is None and mine is None:
        return []
    if theirs is None or mine is None:
        has, lacks = ("the recipe", "the run that optim.from names") if theirs is None else ("the run that optim.from names", "the recipe")
        raise CheckpointError(
            f"{has} has an [adapter] and {lacks} has none ({folder}); begin from an export of that run by model.from, without optim.from"
        )
    forms = [{name: getattr(one, name) for name in ("kind", "rank", "alpha", "rslora")} for one in (theirs, mine)]
    if differ := [f"{name} {was!r}, here {forms[1][name]!r}" for name, was in forms[0].items() if was != forms[1][name]]:
        raise CheckpointError(
            f"optim.from {str(folder)!r} trained another adapter than the recipe's: {'; '.join(differ)}; set [adapter] to it"
        )
    return (
        []
        if theirs.quantise == mine.quantise
        else [f"adapter was trained beside weights of quantise {theirs.quantise}, here {mine.quantise}"]
    )
