"""An engine over replicas that may die: a step is made by those who live, and made again when one dies in it.

A replica is a world of its own, with the native engine on a mesh without `replicate`. Before each step the replicas meet at a quorum (parallel/quorum.py).
Whoever is there shares the step's samples: of n replicas the i-th takes slots i*B/n to (i+1)*B/n of the global batch, so that a replica that is lost costs
time and no samples. Gradients are summed over the replicas once each is done within itself, before anything is written. A replica that dies in that breaks
the sum for all; nobody has moved by then, and those who live meet again and make the same step with the same samples. So the weights see every sample once,
and the losses are those of an undisturbed run up to the order of summation.

One whose sum arrived may have gone on while another's broke. Who is further on is right, since his sum had every sample; at the next meeting the other, one
step behind, takes his state instead of making the step. In the same way one that returns takes the state of one that lives.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from gigatrain.data.loader import Batch, Batches
from gigatrain.engines import Engine
from gigatrain.engines.native import Native
from gigatrain.engines.ready import random_state, set_random_state
from gigatrain.errors import RunError
from gigatrain.observe.metrics import Update
from gigatrain.observe.trace import Trace
from gigatrain.parallel import groups, quorum, ranks
from gigatrain.parallel.mesh import DATA, Mesh
from gigatrain.parallel.places import Piece, State
from gigatrain.parallel.replicas import Between, Damaged, Lost, Store
from gigatrain.planning.plan import Plan

Kept = dict[str, Any]  # what a checkpoint has beside tensors: run, data, metrics, power


class Lives(Protocol):
    """What the loop knows of replicas: nothing but its engine, and what one that lives had for this one."""

    engine: Engine
    leads: bool  # of the replicas that live, this one saves
    offer: Callable[[], Kept]  # what this replica gives to one that is behind

    def enter(self, offer: Callable[[], Kept]) -> Kept | None:
        """Meet the others before the first step. Returns the state of one that is further on, which the engine then has too."""
        ...


class Alone:
    """A run without replicas."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.leads = engine, True
        self.offer: Callable[[], Kept] = dict

    def enter(self, offer: Callable[[], Kept]) -> Kept | None:
        """Nobody is further on."""
        return None


@contextmanager
def joined(plan: Plan, mesh: Mesh, engine: Engine, batches: Batches, say: Callable[[str], None]) -> Iterator[Lives]:
    """The run's replicas, if it has any; this one leaves them with the context."""
    here = groups.place()
    if plan.recovery.replicas == "none" or here is None:
        yield Alone(engine)
        return
    assert isinstance(engine, Native), "refused by the plan"
    found = Replicated(plan, mesh, engine, batches, here, say)
    try:
        yield found
    finally:
        found.close()


class Replicated:
    """The native engine of one replica, and its place among the others."""

    def __init__(self, plan: Plan, mesh: Mesh, engine: Native, batches: Batches, here: groups.Place, say: Callable[[str], None]) -> None:
        self.plan, self.mesh, self.within, self.batches, self.say = plan, mesh, engine, batches, say
        self.engine: Any = self
        self.replica, self.count = here.replica, here.replicas
        self.key = quorum.token(here.token)
        self.boot = ranks.first(mesh, lambda: secrets.token_hex(8))
        self.seat: quorum.Seat | None = None
        self.store: Store | None = None
        recovery = plan.recovery

        def seated() -> list[Any]:
            self.seat = _seat(recovery.replicas)(
                here.quorum, self.key, self.replica, self.boot, lease_s=recovery.replicas_lease_s, patience_s=recovery.replicas_patience_s
            )
            host = self.seat.near()
            self.store = Store(host)
            return [host, self.store.address]

        host, self.address = ranks.first(mesh, seated)
        if mesh.rank and mesh.node < mesh.count:  # on another node than the first rank: its own address on the way to the quorum
            host = groups.near(here.quorum)
        self.between = Between(mesh, host, recovery.replicas_timeout_s)
        engine.between = self.between.sum
        self.live: list[list[Any]] = []  # replica and boot of each that lives, as this replica last joined them
        self.name: str | None = None  # of that joining; None: it is broken
        self.past = ""  # hash over every step and the group that made it: who has another at one position trained apart
        self.leads = True
        self.begun, self.whole = False, True
        self._turn = 0
        self._last: Update | None = None
        self._batch: Batch | None = None
        self.offer: Callable[[], Kept] = dict

    def close(self) -> None:
        """Leave the others."""
        if self.seat is not None:
            self.seat.close()
        self.between.leave()

    # ---- What the loop calls ----

    @property
    def trace(self) -> Trace:
        return self.within.trace

    @trace.setter
    def trace(self, trace: Trace) -> None:
        self.within.trace = trace

    @property
    def early(self) -> bool:
        return self.within.early

    @property
    def bad(self) -> Tensor:
        return self.within.bad

    @property
    def judge(self) -> Any:
        return self.within.judge

    def replicas(self) -> Any:
        """Within this replica; replicas themselves hold alike what they take from each other."""
        return self.within.replicas()

    def evaluate(self, microbatches: Iterable[Any]) -> Tensor:
        """Every replica for itself: nobody waits for one that dies in it."""
        return self.within.evaluate(microbatches)

    def state(self) -> State:
        return self.within.state()

    def restored(self) -> None:
        self.within.restored()

    def enter(self, offer: Callable[[], Kept]) -> Kept | None:
        self.offer = offer
        end = time.monotonic() + self.plan.recovery.replicas_patience_s
        while True:
            at = self.batches.position
            members = self._meet(at, 0)
            others = any(member["said"]["begun"] for member in members)
            waits = ranks.first(self.mesh, lambda: time.monotonic() < end) and len(members) < self.count and not others
            if waits:  # a run begins with all its replicas, if they come in time
                time.sleep(0.1)
                continue
            try:
                healed = self._join(members, at)
            except Lost:
                continue
            return None if healed is None else healed["kept"]

    def forward_backward(self, batch: Batch) -> None:
        """A step is made as a whole in `step`, as often as it takes."""
        self._batch = batch

    def step(self, rate: float) -> Update:
        """The step of the batch that `forward_backward` was given, over the replicas that live."""
        batch, self._batch = self._batch, None
        assert batch is not None, "a step follows a forward_backward"
        at = batch.positions[0]
        self.begun = True
        while True:
            members = self._meet(at, self._targets(batch))
            try:
                if not self._unchanged(members):
                    healed = self._join(members, at)
                    if healed is not None and healed["kept"]["data"]["position"] > at:
                        return self._taken(healed)
                    batch = self.batches.again(at)
                    continue
                total = sum(member["said"]["targets"] for member in members)
                self.within.forward_backward(replace(batch, targets=total))
                update = self.within.step(rate)
            except Lost:
                self.name = None
                self.within.drop()
                self.say(f"replica {self.replica}: another went within the step of position {at:,}; it is made again by those who live")
                continue
            self.past = hashlib.sha256(f"{self.past} {at} {self.name}".encode()).hexdigest()
            self._last = Update(*(None if number is None else number.clone() for number in update))  # type: ignore[arg-type]
            return update

    # ---- The living ----

    def _targets(self, batch: Batch) -> int:
        """Of this replica's share of the step."""
        group = self.mesh.group(*DATA)
        if group is None:
            return batch.targets
        total = torch.tensor(batch.targets, device=self.mesh.device)
        distributed.all_reduce(total, group=group)
        return int(total)

    def _meet(self, at: int, targets: int) -> list[dict[str, Any]]:
        self._turn += 1
        said = {
            "at": at,
            "begun": self.begun,
            "whole": self.whole,
            "targets": targets,
            "name": self.name,
            "turn": self._turn,
            "past": self.past,
            "store": self.address,
            "batch": [self.plan.batch, self.plan.identity],
        }

        def meet() -> Any:
            assert self.seat is not None
            return self.seat.meet(said)

        return ranks.first(self.mesh, meet)

    def _unchanged(self, members: list[dict[str, Any]]) -> bool:
        """Whether all are there who joined last, and each has joined those."""
        return self.name is not None and _boots(members) == self.live and all(member["said"]["name"] == self.name for member in members)

    def _join(self, members: list[dict[str, Any]], at: int) -> Kept | None:
        """Make a group of these replicas. Returns the state of one that was further on, if this one was behind; None if it can go on. Raises Lost."""
        self.name = None
        members = self._fitting(members)
        boots = _boots(members)
        index = boots.index([self.replica, self.boot])
        name = hashlib.sha256(
            json.dumps([[*boot, member["said"]["turn"]] for boot, member in zip(boots, members, strict=True)]).encode()
        ).hexdigest()
        newest = max((member["said"]["at"] for member in members if member["said"]["whole"]), default=-1)
        if newest < 0:
            raise RunError(
                "no replica that lives has a whole state: each was ended while it took another's; start the run again, from its checkpoint"
            )
        ahead = [number for number, member in enumerate(members) if member["said"]["whole"] and member["said"]["at"] == newest]
        ahead = [number for number in ahead if members[number]["said"]["past"] == members[ahead[0]]["said"]["past"]]
        behind = [number for number in range(len(members)) if number not in ahead]
        before = time.monotonic()
        self.between.connect(index, len(members), members[ahead[0]]["said"]["store"], name)
        healed = self._heal(index, ahead, behind, newest)
        took_s = time.monotonic() - before
        self.live, self.name, self.leads = boots, name, index == 0
        batch, sources = self.plan.batch, self.mesh.data
        share = range(index * batch // len(members), (index + 1) * batch // len(members))
        self.batches.cut(share, *sources)
        living = ", ".join(str(replica) for replica, _ in boots)
        took = (
            f"; took the state of position {newest:,} from replica {boots[ahead[behind.index(index) % len(ahead)]][0]}"
            if healed is not None
            else ""
        )
        self.say(
            f"replicas {living} of {self.count} live; this is {self.replica}, with {len(share)} of {batch} samples{took} ({took_s:.2f} s)"
        )
        return healed

    def _fitting(self, members: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those who can go on together: with the plan of those who have begun, and no more than a step behind. RunError where this one cannot."""
        first = next((member for member in members if member["said"]["begun"]), members[0])
        fitting = [member for member in members if member["said"]["batch"] == first["said"]["batch"]]
        newest = _newest(fitting)
        kept = [member for member in fitting if not (member["said"]["begun"] and member["said"]["at"] + self.plan.batch < newest)]
        mine = [self.replica, self.boot]
        if mine not in _boots(fitting):
            raise RunError(
                f"replica {self.replica} has another plan than replica {first['replica']}, which lives; start all with one recipe and the same --set"
            )
        if mine not in _boots(kept):
            raise RunError(
                f"replica {self.replica} was left behind: the others are at position {newest:,}; started again, it takes their state"
            )
        return kept

    def _heal(self, index: int, ahead: list[int], behind: list[int], newest: int) -> Kept | None:
        """Those behind take the state of those ahead, each from another as far as there are. Raises Lost."""
        if not behind:
            return None
        healed, went, why = None, True, ""
        live = {**self.within.state(), "random": {name: Piece.whole(tensor) for name, tensor in random_state(self.mesh.device).items()}}
        try:
            if index in behind:
                self.whole = False  # until all of it is here
                healed = self.between.take(ahead[behind.index(index) % len(ahead)], live, self.key)
                self.past = healed["past"]
            else:
                mine = [one for number, one in enumerate(behind) if ahead[number % len(ahead)] == index]
                state = self._given(newest) if mine else {}
                for one in mine:
                    self.between.give(one, live, state, self.key)
        except (RuntimeError, Damaged) as failure:
            went, why = False, str(failure).splitlines()[0]
        if why:
            self.say(f"replica {self.replica}: a state did not arrive: {why[:200]}")
        self.between.settle(went)
        if healed is not None:
            self.within.restored()
            set_random_state({name: piece.tensor for name, piece in live["random"].items()})
            self.whole = True
        return healed

    def _given(self, newest: int) -> Kept:
        kept = self.offer()
        kept["data"] = {**kept["data"], "position": newest}  # the step that is to be made has taken its batch already
        last = None if self._last is None else [None if number is None else float(number) for number in self._last]
        return {"kept": kept, "update": last, "past": self.past}

    def _taken(self, healed: Kept) -> Update:
        """The step that another replica made, as if this one had."""
        last = healed["update"]
        assert last is not None, "one that is a step further on has made one"
        kinds = Update(torch.float64, torch.float64, torch.float32, torch.int64, torch.float64)  # type: ignore[arg-type]
        self._last = Update(
            *(
                None if number is None else torch.tensor(number, dtype=kind, device=self.mesh.device)  # type: ignore[arg-type]
                for number, kind in zip(last, kinds, strict=True)
            )
        )
        return self._last


def _boots(members: list[dict[str, Any]]) -> list[list[Any]]:
    return [[member["replica"], member["boot"]] for member in members]


def _newest(members: list[dict[str, Any]]) -> int:
    """The position of those who are furthest on."""
    whole = [member["said"]["at"] for member in members if member["said"]["whole"]]
    if not whole:
        raise RunError(
            "no replica that lives has a whole state: each was to take another's that is gone; start the run again, from its checkpoint"
        )
    return max(whole)


def _seat(kind: str) -> Callable[..., quorum.Seat]:
    if kind == "torchft":
        from gigatrain.parallel.lighthouse import LighthouseSeat

        return LighthouseSeat
    return quorum.OwnSeat
