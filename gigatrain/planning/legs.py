"""A run's legs: what a resume changed of the plan, and whether it may.

A run is one meaning (`Plan.meaning`: model, data and their order, batch, optimizer, loss) from its first step to its last. Where and how it is
computed may change on the way, and each stretch under one plan is a leg, which run.json keeps:

    what changes                                        a resume                                    why
    ranks, mesh, engine, what is watched or kept        goes on                                     other order of sums, by rounding errors
    site, device, kernels, compile, recompute           goes on, and says so                        the same formulas, rounded elsewhere
    precision, the states' forms, numerics              only with --other-numbers, and says so      an undisturbed run would have other numbers
    steps, schedule, phases that lie ahead              only with --other-numbers, and says so      the same run so far, and another from here on
    anything else                                       is refused                                  it would be another run
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigatrain import load
from gigatrain.errors import CheckpointError, RunError
from gigatrain.planning.plan import AHEAD, ARITHMETIC, NUMBERS, OPERATIONAL, Plan

WAYS = ("ranks", "mesh", "engine", "microbatch", "accumulation")  # operational, and worth a word in a leg
_SHOWN = 6  # values in one line


@dataclass(frozen=True)
class Changes:
    """What `now` changes of the plan before it, each as `key: before -> now`."""

    meaning: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    arithmetic: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()

    @property
    def all(self) -> list[str]:
        """What a leg records."""
        return [*self.numbers, *self.arithmetic, *self.ways]

    def said(self) -> list[str]:
        """Lines for a reader."""
        found = []
        if self.numbers:
            found.append(f"numbers will differ from an undisturbed run: {_some(self.numbers)}")
        if self.arithmetic:
            found.append(f"the same formulas, with other rounding errors than so far: {_some(self.arithmetic)}")
        return found


def changes(before: Plan, now: Plan) -> Changes:
    """What differs, by what a resume may do about it."""
    found = before.differences(now)
    if before.meaning != now.meaning:
        free = set(OPERATIONAL + ARITHMETIC + NUMBERS) - ({"microbatch"} if _balances(before) or _balances(now) else set())
        return Changes(meaning=tuple(one for one in found if not _under(one, free)))
    kernels = {one.op: one.kernel for one in before.kernels}
    chosen = [f"kernels.{one.op}: {kernels.get(one.op)} -> {one.kernel}" for one in now.kernels if kernels.get(one.op) != one.kernel]
    scaled = [plan.fp8 is not None and plan.fp8.scaling == "tensorwise" for plan in (before, now)]
    numbers = (*NUMBERS, *AHEAD, *(("microbatch",) if all(scaled) else ()))  # such scales are of one microbatch
    return Changes(
        numbers=tuple(one for one in found if _under(one, numbers)),
        arithmetic=(*(one for one in found if _under(one, ARITHMETIC) and not _under(one, ("kernels",))), *chosen),
        ways=tuple(one for one in found if _under(one, WAYS) and not _under(one, numbers)),
    )


def _balances(plan: Plan) -> bool:
    return bool(plan.loss.router_aux or plan.loss.router_z)


def agree(folder: Path, before: Plan, now: Plan, *, other_numbers: bool) -> Changes:
    """The changes of a resume. Raises CheckpointError for those that it may not make, each with its values."""
    found = changes(before, now)
    if found.meaning:
        raise CheckpointError(
            f"{folder} was started under another plan; {len(found.meaning)} value(s) differ:\n"
            + "\n".join(f"  {change}" for change in found.meaning[:12])
            + "\nResume with the recipe and --set it began with, or start with --new."
        )
    if found.numbers and not other_numbers:
        raise CheckpointError(
            f"{folder} was started under other numbers; {len(found.numbers)} value(s) differ:\n"
            + "\n".join(f"  {change}" for change in found.numbers[:12])
            + "\nResume with the recipe and --set it began with; or, to go on from its checkpoint with these, add --other-numbers: "
            "from there on its numbers differ from those of an undisturbed run, and the run's record says so."
        )
    return found


def leg(step: int, plan: Plan, changed: Iterable[str], began: str) -> dict[str, Any]:
    """What run.json keeps of a leg: from which step on the run was under which plan, where, and what that changed."""
    engine = plan.engine.name + (f" zero={plan.engine.zero}" if plan.engine.name == "deepspeed" else "")
    mesh = {axis: size for axis, size in plan.mesh.model_dump().items() if isinstance(size, int) and size > 1}
    return {
        "step": step,
        "began": began,
        "plan_sha256": plan.sha256,
        "identity": plan.identity,
        "site": plan.site,
        "device": plan.device,
        "ranks": plan.ranks,
        "engine": engine,
        "mesh": mesh,
        "precision": plan.precision,
        "states": f"{plan.optim.master} master weights, {plan.optim.moments} moments",
        "changed": list(changed),
    }


def stored(folder: Path, record: dict[str, Any]) -> Plan:
    """The plan that a run folder is under, checked against the identity that its run.json, `record`, holds. Raises RunError.

    A leg's plan is in place, as plan-N.json, before run.json names the leg, and becomes plan.json behind it: a kill between them leaves both readable.
    """
    found = ""
    for path in (folder / "plan.json", kept(folder, len(record.get("legs", ())) - 1)):
        if found and not path.is_file():
            continue
        try:
            plan = load.read_json(Plan, path.read_text(encoding="utf-8"), str(path), RunError)
        except (OSError, UnicodeDecodeError) as failure:
            raise RunError(f"{path} cannot be read: {getattr(failure, 'strerror', None) or 'it is not UTF-8 text'}") from None
        if plan.identity == record["identity"]:
            return plan
        found = found or plan.identity
    raise RunError(f"{folder}/plan.json was changed after the run began: its identity is {found[:12]}, not {record['identity'][:12]}")


def kept(folder: Path, number: int) -> Path:
    """Where the plan of leg `number` is kept, if there is more than one."""
    return folder / f"plan-{number}.json"


def _under(change: str, paths: Iterable[str]) -> bool:
    key = change.split(":", 1)[0]
    return any(key == path or key.startswith(f"{path}.") for path in paths)


def _some(said: tuple[str, ...]) -> str:
    return "; ".join(one.replace(": ", " ", 1) for one in said[:_SHOWN]) + (
        f"; and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    )
