"""What the host does about numbers that cannot be right: it looks at refused steps, at copies that differ, and goes back where it must.

A step that the device refused (engines/judge.py) is looked at by all ranks together at the next report, save or validation. They make it again, on the same
samples and from the same weights:

    transient     another result: a fault that passed. The step is taken back and trained on, so that the run goes on as if there had been none
    persistent    the same result, but of another reader's samples a rank computes another loss than the reader itself: one of the two computes wrongly
    data          the same result everywhere: samples and weights do that. The step stays refused

as Megatron-LM's rerun state machine has it (megatron/core/rerun_state_machine.py); there a second machine is another job, here another rank. A rank is named
where its own loss differs; of a fault in the backward alone, whose gradient is summed over ranks before anyone sees it, no rank is known. Steps that change
nothing cost nothing but their time: at most a window's, and two more.

train.max_bad_steps refused steps in a row stop the run, or with numerics.action = "rollback" the run goes back to its newest checkpoint and passes over the
samples from the first of them on (PaLM, arXiv:2204.02311 section 5.1). Which samples these are depends on the first refused step alone, not on the
report that saw it, so that a resume which lives through it again passes over the same.

RUN/numerics.jsonl, written by rank 0, one object an event:

    {"time_s": ..., "event": "refused", "step": 412, "why": ["norm"], "loss": ..., "norm": ..., "loss_limit": ..., "norm_limit": ..., "class": "data",
     "ranks": [], "hosts": [], "samples": [...]}        class: also "unknown", where no replay was possible or another one of its row was looked at
    {"time_s": ..., "event": "rollback", "step": 420, "to": 400, "passed": [3296, 3808]}        a range of the stream of samples
    {"time_s": ..., "event": "diverged", "step": 500, "tensors": [{"name": ..., "ranks": [3], "hosts": [...], "copies": 4}]}
"""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from gigatrain.data.loader import Batches
from gigatrain.engines import Engine
from gigatrain.engines.judge import LOSS, NORM, NOT_FINITE, Refused
from gigatrain.errors import RunError
from gigatrain.observe.hashes import SUMS, Shared, differ, words
from gigatrain.observe.health import Health
from gigatrain.observe.stragglers import Stragglers
from gigatrain.observe.trace import Trace
from gigatrain.parallel.agree import gathered, told
from gigatrain.parallel.mesh import DATA, Mesh
from gigatrain.planning.plan import Plan

WHY = {NOT_FINITE: "not finite", LOSS: "loss", NORM: "norm"}
RETRIES = 2  # of one step whose numbers are another's each time
NAMED = 8  # samples of a step that are named


class Position(Protocol):
    """How far a run is."""

    step: int


class Numerics:
    """One rank's part in it; all ranks call `look`, `settle`, `numbers` and `meet` together.

    again: brings everything back to the newest whole checkpoint, and `this` to its step. looked: told of each row of refused steps whether it was taken back.
    folder None: a rank that writes nothing.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        batches: Batches,
        mesh: Mesh,
        health: Health,
        folder: Path | None,
        times: Trace,
        *,
        say: Callable[[str], None],
        again: Callable[[], None],
        looked: Callable[[bool], None],
    ) -> None:
        self.plan, self.engine, self.batches, self.mesh, self.health = plan, engine, batches, mesh, health
        self.path, self.say, self.again = None if folder is None else folder / "numerics.jsonl", say, again
        self.looked = looked
        self.counts = {"spikes": 0, "transient": 0, "persistent": 0, "rollbacks": 0, "diverged": 0}
        if plan.numerics.replay:
            engine.judge.hold()
        self.stragglers = Stragglers(plan, mesh, times.spent, folder, say)
        self._met = False  # since the last look
        self._known = 0  # refused steps in all that were looked at, of a judge that does not hold
        self._retried: dict[int, int] = {}
        self.shared = Shared(mesh)
        self._hashes: dict[str, tuple[tuple[str, ...], int]] = {}
        self._hashed = -1  # the step at which copies were compared last
        self._differ = False

    def begin(self, step: int) -> None:
        """The first step of this process is next."""
        self._known = int(self.engine.bad[0])
        if self.mesh.count > 1 and self.plan.numerics.hash_every:
            share = self.shared.covered(self.engine.replicas())
            self._hashed = step
            if self.mesh.rank == 0:
                self.say(
                    f"  copies   {100 * share:.0f} % of rank 0's state has a copy on another rank, compared every {self.plan.numerics.hash_every} steps"
                )

    def figures(self) -> dict[str, int]:
        """For metrics.jsonl: what has happened so far, where anything has."""
        counts = self.counts | {"stragglers": len(self.stragglers.named)}
        return {name: count for name, count in counts.items() if count or name == "spikes"}

    # ---- Copies ----

    def numbers(self, step: int) -> list[int]:
        """What this rank adds to a report's sum over all ranks."""
        return [*self._hash(step), *self.stragglers.numbers()]

    def _hash(self, step: int) -> list[int]:
        every = self.plan.numerics.hash_every
        if not every or self.mesh.count == 1:
            return []
        if step // every == self._hashed // every:
            return [0] * SUMS
        self._hashed, self._hashes = step, self.shared.hashes(self.engine.replicas())
        return self.shared.sums(self._hashes)

    def meet(self, sums: Sequence[int]) -> Sequence[int]:
        """The sums; returns those that are not ours."""
        self._met = True
        if self.plan.numerics.hash_every and self.mesh.count > 1:
            self._differ, sums = self._differ or differ(sums[:SUMS]), sums[SUMS:]
        return self.stragglers.meet(sums)

    def _compare(self, step: int) -> None:
        """Now, if it was not done at this step: what is saved is what all copies say."""
        if self.plan.numerics.hash_every and self.mesh.count > 1 and self._hashed != step:
            self._hashed, self._hashes = step, self.shared.hashes(self.engine.replicas())
            mine = torch.tensor(self.shared.sums(self._hashes), dtype=torch.int64, device=self.mesh.device)
            self._differ = differ(self.mesh.sum(mine).tolist())

    def _diverged(self, this: Position) -> None:
        found = self.shared.find(self._hashes)
        self._differ = False
        self.counts["diverged"] += 1
        self._write("diverged", this.step, tensors=found)
        said = (
            f"at step {this.step} ranks that should hold the same bits do not: a flipped bit, or a computation that differs between ranks{words(found)}\n"
            f"Copies agreed at every checkpoint of this run (numerics.hash_every = {self.plan.numerics.hash_every})"
        )
        if self.plan.numerics.on_divergence == "stop":
            raise _shared(RunError(f"{said}; go on with --resume, without the host that is named first if it comes again (site: exclude)"))
        if self.counts["diverged"] > self.plan.numerics.rollbacks:
            raise _shared(RunError(f"{said}; it came back after {self.plan.numerics.rollbacks} rollbacks (numerics.rollbacks)"))
        self._say(f"COPIES DIFFER: {said}")
        self._back(this)

    # ---- Refused steps ----

    def look(self, this: Position) -> bool:
        """At what the device refused since the last look, and at copies. Whether `this` went back to an earlier step, from which the loop goes on.

        Raises RunError, on all ranks, after train.max_bad_steps refused steps in a row or where copies differ, unless the run goes back.
        """
        if self._met:
            self.stragglers.name(this.step)
            self._met = False
        if self._differ:
            self._diverged(this)
            return True
        judge = self.engine.judge
        total, row, longest, began, spikes, unseen, held = torch.cat([judge.bad, judge.spikes[None], judge.waits]).tolist()
        back = self._seen(this, unseen, held, row) if judge.holds and unseen else 0
        if not judge.holds:
            for one in judge.refused(total - self._known) if total > self._known else ():
                self._told(one, "unknown", [])
        if back:
            self.batches.back(back)
            this.step -= back
            total, row, longest, began = judge.bad.tolist()
            spikes = int(judge.spikes)
        self._known, self.counts["spikes"] = total, spikes
        if longest >= self.plan.max_bad_steps and self.plan.numerics.action == "rollback":
            self._pass_over(this, longest, began)
            return True
        return back > 0

    def settle(self, this: Position) -> None:
        """Before a save: nothing is held, copies agree, and what is saved may be resumed."""
        if not self.look(this):
            self._compare(this.step)
            if self._differ:
                self._diverged(this)
        self.check(this)

    def check(self, this: Position, counts: list[int] | None = None) -> None:
        """Raises RunError where too many steps in a row were refused."""
        self.health.check_bad(counts or self.engine.bad.tolist(), lambda step: samples(self.batches, step))

    def _seen(self, this: Position, unseen: int, held: int, row: int) -> int:
        """A row of `unseen` refused steps, and `held` ones after it: how many steps go back."""
        judge, refused = self.engine.judge, self.engine.judge.refused(unseen)
        first = refused[0]
        kind, ranks = self._replayed(first)
        back = held
        for index, one in enumerate(refused):
            self._told(one, kind if index == 0 else "unknown", ranks if index == 0 else [])
        taken = kind == "transient" and unseen == len(refused) and self._retried.get(first.step, 0) < RETRIES
        self.looked(taken)
        if taken:
            self._retried[first.step] = self._retried.get(first.step, 0) + 1
            judge.take_back(unseen, row, sum(not one.why & NOT_FINITE for one in refused))
            back += unseen
        if kind in self.counts:
            self.counts[kind] += 1
        judge.open()
        return back

    def _replayed(self, one: Refused) -> tuple[str, list[dict[str, Any]]]:
        """What kind of refusal it was, and which ranks it points to. Two steps at most, which change nothing."""
        before = (one.loss, one.norm, one.mine)
        straight = self._make(one.step, 0)
        exact = self.plan.deterministic or self.mesh.device.type == "cpu"
        if (not _alike(before[:2], straight[:2])) if exact else not _suspicious(one, straight):
            mine = None if _alike(before[2:], straight[2:]) or not exact else {"rank": self.mesh.rank, "host": socket.gethostname()}
            return "transient", told(self.mesh, [each for each in gathered(self.mesh, mine) if each])
        if self.mesh.data[1] == 1 or self.plan.drops or self.mesh.size("expert") > 1:
            return "data", []  # nobody else computes the same
        other = self._make(one.step, 1)
        where = [index for axis, index in self.mesh.at.items() if axis not in DATA]
        record = {"rank": self.mesh.rank, "host": socket.gethostname(), "data": self.mesh.data[0], "where": where}
        blamed = (
            told(self.mesh, _blamed(gathered(self.mesh, record | {"own": straight[2].hex(), "other": other[2].hex()}))) if exact else []
        )
        return ("persistent" if blamed or not _suspicious(one, other) else "data"), blamed

    def _make(self, step: int, shift: int) -> tuple[float, float, float]:
        """Loss, norm and this rank's own sum of step `step`, made again; on the samples of the reader `shift` later."""
        random = torch.get_rng_state()
        on_device = torch.cuda.get_rng_state() if self.mesh.device.type == "cuda" else None
        with self.engine.judge.again(step):
            self.engine.forward_backward(self.batches.at(self.batches.begins(step), shift))
            self.engine.step(0.0)
            loss, norm, mine = self.engine.judge.numbers.tolist()
        torch.set_rng_state(random)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device)
        return loss, norm, mine

    def _told(self, one: Refused, kind: str, ranks: list[dict[str, Any]]) -> None:
        """One refused step, in the log and in the file."""
        why = [word for bit, word in WHY.items() if one.why & bit]
        of = self.batches.describe(self.batches.step(one.step)[:NAMED]) if self.mesh.rank == 0 else []
        hosts = sorted({each["host"] for each in ranks})
        row = {
            name: value if math.isfinite(value) else str(value)
            for name, value in one._asdict().items()
            if name not in ("why", "mine", "step")
        }
        self._write("refused", one.step, **row, why=why, **{"class": kind}, ranks=[each["rank"] for each in ranks], hosts=hosts, samples=of)
        limits = f" (limits {one.loss_limit:.4g} and {one.norm_limit:.4g})" if not math.isnan(one.loss_limit) else ""
        pointed = f", of rank {', '.join(str(each['rank']) for each in ranks)} on {', '.join(hosts)}" if ranks else ""
        meant = {
            "transient": f": made again it gave other numbers, a fault that passed{pointed}; it is trained on",
            "persistent": f": ranks compute different numbers of the same samples, a fault that stays{pointed}",
            "data": ": made again it gave the same",
        }.get(kind, "")
        self._say(
            f"REFUSED step {one.step}: {' and '.join(why)}, loss {one.loss:.4g}, norm {one.norm:.4g}{limits}{meant}; {of[0] if of else ''}"
        )

    # ---- Back ----

    def _pass_over(self, this: Position, longest: int, began: int) -> None:
        most = self.plan.numerics.rollbacks
        if _rollbacks(self.batches) >= most:
            raise _shared(
                RunError(
                    f"{longest} steps in a row, from step {began}, were refused, and {most} rollbacks have passed over samples already "
                    "(limit: numerics.rollbacks); lower optim.lr or optim.clip in a new run `from` the last checkpoint. "
                    f"Data of step {began}:{samples(self.batches, began)}"
                )
            )
        step, passed = this.step, list(self.batches.passed)
        first, last = (self.batches.begins(one) for one in (began, began + self.plan.numerics.pass_over))
        found = self.batches.pass_over(first, last - first)
        self._back(this)
        self.batches.close()
        self.batches.passed = [*passed, found]
        self.counts["rollbacks"] += 1
        self._write("rollback", step, to=this.step, passed=list(found))
        self._say(
            f"ROLLED BACK from step {step} to {this.step}: {longest} steps in a row were refused from step {began} on; "
            f"samples {found[0]:,} to {found[1] - 1:,} of the stream are passed over ({_rollbacks(self.batches)} of at most {most} rollbacks)"
        )

    def _back(self, this: Position) -> None:
        self.again()
        self.engine.judge.open()
        self._known, self._hashed, self._differ = int(self.engine.bad[0]), this.step, False

    def _write(self, event: str, step: int, **more: Any) -> None:
        if self.path is None:
            return
        with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:  # a full disk costs the line and not the run
            file.write(json.dumps({"time_s": round(time.time(), 3), "event": event, "step": step} | more) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _say(self, text: str) -> None:
        if self.mesh.rank == 0:
            self.say(text)


def _rollbacks(batches: Batches) -> int:
    """Ranges that rollbacks passed over; one from 0 on is what a run before this one read (`optim.from`)."""
    return sum(start > 0 for start, _ in batches.passed)


def samples(batches: Batches, step: int) -> str:
    """Files and offsets of what step `step` read, a line each."""
    names = batches.describe(batches.step(step))
    return "".join(f"\n    {name}" for name in names[:NAMED]) + (f"\n    and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _alike(some: Sequence[float], others: Sequence[float]) -> bool:
    """Bit for bit; one NaN is as any other."""
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(some, others, strict=True))


def _suspicious(one: Refused, numbers: Sequence[float]) -> bool:
    loss, norm = numbers[:2]
    return not (math.isfinite(loss) and math.isfinite(norm)) or loss > one.loss_limit or norm > one.norm_limit


def _blamed(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ranks that compute another sum of some samples than another rank does, the one that two others contradict alone. Each computed its `own` and those
    of the next reader, `other`."""
    readers = 1 + max((one["data"] for one in records), default=0)
    by_place = {(*one["where"], one["data"]): one for one in records}
    votes: dict[int, int] = {}
    for one in records:
        next_one = by_place[(*one["where"], (one["data"] + 1) % readers)]
        if one["other"] != next_one["own"]:
            for rank in (one["rank"], next_one["rank"]):
                votes[rank] = votes.get(rank, 0) + 1
    most = max(votes.values(), default=0)
    return [{"rank": one["rank"], "host": one["host"]} for one in records if votes.get(one["rank"], 0) == most > 0]


def _shared(failure: RunError) -> RunError:
    """One that all ranks raise."""
    failure.shared = True
    return failure
