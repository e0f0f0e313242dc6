"""Replicas that are killed and return: real processes with real SIGKILLs, held against a run in which nothing happened.

The oracle has three parts. Every sample of every step reached the weights once: each rank notes the rows that it computed and under which joining of the
living the step was committed, and of each step the committed rows are those of the undisturbed run. The losses are the undisturbed run's but for the order of
summation. And both replicas end with the same weights, bit by bit.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from commands import training
from distributed import _server

from gigatrain import load, loop, run
from gigatrain.data import build
from gigatrain.data.loader import Batches
from gigatrain.data.pack import IGNORED
from gigatrain.engines.native import Native
from gigatrain.engines.replicated import Replicated
from gigatrain.observe.metrics import Update
from gigatrain.parallel import groups, quorum
from gigatrain.parallel.mesh import alone
from gigatrain.parallel.quorum import Quorum
from gigatrain.parallel.replicas import Between
from gigatrain.planning.plan import plan

STEPS, BATCH, GATE = 24, 12, 10  # from step GATE on the living wait for the one that returns
LEASE_S = 2.0


def _note(folder, **what):
    with (folder / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")


def _rows(batch):
    rows = [
        (tokens, labels)
        for part in batch.microbatches
        for tokens, labels in zip(part.tokens, part.labels, strict=True)
        if (labels != IGNORED).any()
    ]
    return [hashlib.sha256(tokens.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16] for tokens, labels in rows]


def _watched(notes, gate, die, opens):
    """Let this process note what it computes and commits, wait at the gate, open one once it asks to join, and die at `die`: `(where, step)`."""
    now = {"at": -1, "mine": None}
    forward, step, taken, added, give = Native.forward_backward, Replicated.step, Replicated._taken, Between.sum, Between.give

    def begin(self, batch):
        at = now["at"] = batch.positions.start
        mine = now["mine"]
        _note(notes, at=at, name=mine.name if mine else "plain", rows=_rows(batch), first=mine.batches.share.start if mine else 0)
        end = time.monotonic() + 90
        while gate is not None and at == GATE * BATCH and not gate.exists() and time.monotonic() < end:
            time.sleep(0.01)
        forward(self, batch)

    def commit(self, rate):
        now["mine"], at = self, self._batch.positions.start
        now["at"] = at  # also of a step that is taken and not made
        update = step(self, rate)
        _note(notes, at=at, committed=self.name)
        return update

    def took(self, healed):
        _note(notes, at=now["at"], took=True)
        return taken(self, healed)

    def falls(where):
        if die is not None and die[0] == where and now["at"] >= die[1] * BATCH:
            os.kill(os.getpid(), signal.SIGKILL)

    def sums(self, tensors):
        tensors = list(tensors)
        falls("before")
        if die is not None and die[0] == "between" and now["at"] >= die[1] * BATCH:
            self._group.allreduce([tensors[0]]).wait()  # the others' first sum succeeds, their next does not
            falls("between")
        added(self, tensors)
        falls("after")

    def gives(self, *args):
        falls("giving")
        give(self, *args)

    enter = Replicated.enter

    def enters(self, offer):
        if opens is not None:
            threading.Timer(0.3, opens.touch).start()  # by then it has asked
        return enter(self, offer)

    Replicated.enter = enters
    Native.forward_backward, Replicated.step, Replicated._taken = begin, commit, took
    Between.sum, Between.give = sums, gives  # type: ignore[method-assign]


def _train(recipe, folder, notes, environment, gate=None, die=None, opens=None, overrides=()):
    os.environ.update(environment)
    torch.set_num_threads(1)
    _watched(notes, gate, die, opens)
    place = groups.place()
    sets = [
        f"train.steps={STEPS}", f"train.batch={BATCH}", "train.microbatch=2", "export=false", "report.every=1", "checkpoint.every=7",
        "validation.every=0", "numerics.replay=false", *overrides,
    ]  # fmt: skip
    started = int(environment.get("WORLD_SIZE", 1))
    chosen = plan(load.recipe(str(recipe), sets), load.site("laptop"), started * (place.replicas if place else 1))
    chosen, folder = groups.part(chosen, folder)
    (folder.parent if place else folder).mkdir(parents=True, exist_ok=True)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    loop.train(chosen, folder, start="continue")
    os._exit(0)


class World:
    """Processes of two replicas of some ranks each."""

    def __init__(self, recipe, tmp_path, *, ranks=1, kind="own", at=None, overrides=()):
        self.recipe, self.folder, self.notes, self.ranks = recipe, tmp_path / "run", tmp_path / "notes", ranks
        self.notes.mkdir(exist_ok=True)
        self.token = tmp_path / "token"
        quorum.write_token(self.token)
        self.served = Quorum("127.0.0.1", 0, quorum.token(self.token), lease_s=LEASE_S) if at is None else None
        self.at = self.served.address if self.served else at
        self.overrides = (
            "mesh.replicate=2", f"mesh.shard={ranks}", f"recovery.replicas={kind}", f"recovery.replicas_lease_s={LEASE_S}",
            "recovery.replicas_timeout_s=20", "recovery.replicas_patience_s=60", *overrides,
        )  # fmt: skip
        self.processes = []

    def start(self, replica, *, gate=None, die=None, dies=0, opens=None):
        """A replica's processes; the rank `dies` of it dies at `die`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {groups.REPLICA: f"{replica}/2", groups.QUORUM: self.at, groups.TOKEN: str(self.token)}
        found = []
        for rank in range(self.ranks):
            own = {"RANK": str(rank), "WORLD_SIZE": str(self.ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(self.ranks)}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            args = (self.recipe, self.folder, self.notes, shared | own | where, gate, die if rank == dies else None, opens, self.overrides)
            process = _server().Process(target=_train, args=args, daemon=True)
            process.start()
            found.append(process)
        self.processes += found
        return found

    def close(self):
        for process in self.processes:
            process.kill()
            process.join(10)
        if self.served:
            self.served.close()

    def of(self, replica):
        return self.folder if replica == 0 else self.folder / "replicas" / f"{replica:03d}"


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """The folder and the rows by position of a run of one process in which nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "notes").mkdir()
    process = _server().Process(target=_train, args=(tiny, folder / "run", folder / "notes", {}), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return folder / "run", {note["at"]: note["rows"] for note in _notes(folder / "notes")}


@pytest.fixture
def world(tiny, tmp_path):
    made = []

    def make(**how):
        made.append(World(tiny, tmp_path, **how))
        return made[-1]

    yield make
    for one in made:
        one.close()


def _notes(folder):
    return [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


def _losses(folder):
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def _weights(folder):
    found, _ = run.checkpoints(folder).latest()
    return {name: found.tensors("weights")[name] for name in found.tensors("weights")}


def _ended(processes, within_s=120):
    end = time.monotonic() + within_s
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return [process.exitcode for process in processes]


def _hold(world, undisturbed, survivor):
    """The oracle."""
    plain, rows = undisturbed
    notes = _notes(world.notes)
    for at, wanted in rows.items():
        names = {note["committed"] for note in notes if note.get("committed") and note["at"] == at}
        took = {note["at"] for note in notes if note.get("took")}
        assert len(names) == 1 or at in took, f"position {at} was committed under {names}"
        covers = []
        for name in names:
            parts = sorted((note["first"], note["rows"]) for note in notes if "rows" in note and note["at"] == at and note["name"] == name)
            covers.append([row for _, part in parts for row in part])
        assert wanted in covers, f"position {at}: {covers} are not the samples {wanted}"
    before, after = _losses(plain), _losses(world.of(survivor))
    assert list(after) == list(before) == list(range(1, STEPS + 1))
    for step, loss in after.items():
        assert abs(loss - before[step]) <= 1e-5 * before[step], f"step {step}: {loss} for {before[step]}"
    ends = [_weights(world.of(replica)) for replica in (0, 1)]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), f"{name} differs between the replicas"
    for name, value in _weights(plain).items():
        torch.testing.assert_close(ends[0][name], value, rtol=2e-4, atol=2e-5)


FAST = [("between", 0), ("after", 1)]
SLOW = [
    pytest.param(where, victim, marks=pytest.mark.long)
    for where in ("before", "between", "after")
    for victim in (0, 1)
    if (where, victim) not in FAST
]


def _falls_and_returns(here, tmp_path, where, victim, *, dies=0):
    gate = tmp_path / "returned"
    survivors = here.start(1 - victim, gate=gate)
    killed = here.start(victim, die=(where, 4), dies=dies)
    assert _ended([killed[dies]]) == [-signal.SIGKILL]
    assert all(code != 0 for code in _ended(killed))  # ranks of one replica end with it
    again = here.start(victim, opens=gate)
    assert set(_ended(survivors + again)) == {0}


@pytest.mark.parametrize(("where", "victim"), [*FAST, *SLOW])
def test_one_is_killed_within_a_step_and_returns(world, undisturbed, tmp_path, where, victim):
    here = world()
    _falls_and_returns(here, tmp_path, where, victim)
    _hold(here, undisturbed, 1 - victim)


def test_a_step_that_another_made_is_reported_as_it_was_there():
    """What a replica that is a step ahead hands over of its last step, through the JSON that it travels in."""
    made = Update(
        *(torch.tensor(number, dtype=kind) for number, kind in ((12.5, torch.float64), (4.0, torch.float64), (0.75, torch.float32)))
    )
    for last in (made, made._replace(fate=torch.tensor(1))):
        ahead = SimpleNamespace(offer=lambda: {"data": {"position": 24}}, _last=last, past="a")
        behind = SimpleNamespace(mesh=alone())
        healed = json.loads(json.dumps(Replicated._given(ahead, 12)))  # type: ignore[arg-type]
        found = Replicated._taken(behind, healed)  # type: ignore[arg-type]
        for mine, theirs in zip(found, last, strict=True):
            if mine is None or theirs is None:
                assert mine is theirs
            else:
                assert mine.dtype == theirs.dtype
                assert torch.equal(mine, theirs)
        assert healed["kept"]["data"]["position"] == 12


@pytest.mark.long
@pytest.mark.parametrize("where", ["between", "after"])
def test_replicas_of_two_ranks(world, undisturbed, tmp_path, where):
    here = world(ranks=2)
    _falls_and_returns(here, tmp_path, where, 1, dies=1)
    _hold(here, undisturbed, 0)


@pytest.mark.long
def test_nobody_is_killed_and_nothing_differs(world, undisturbed):
    here = world()
    assert _ended([*here.start(0), *here.start(1)]) == [0, 0]
    _hold(here, undisturbed, 0)


@pytest.mark.long
def test_one_that_stood_still_leaves_and_takes_the_others_state(world, undisturbed, tmp_path):
    here = world(overrides=("recovery.replicas_timeout_s=3",))
    gate = tmp_path / "returned"
    (survivor,) = here.start(0, gate=gate)
    (still,) = here.start(1)
    end = time.monotonic() + 90
    while not any(note.get("committed") and note["at"] >= 2 * BATCH for note in _notes(here.notes)):
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(still.pid, signal.SIGSTOP)
    while not any(note["at"] == GATE * BATCH and len(note.get("rows", ())) == BATCH for note in _notes(here.notes)):
        assert time.monotonic() < end  # the survivor made step after step alone
        time.sleep(0.05)
    os.kill(still.pid, signal.SIGCONT)
    (code,) = _ended([still])
    assert code not in (0, None)
    (again,) = here.start(1, opens=gate)
    assert _ended([survivor, again]) == [0, 0]
    _hold(here, undisturbed, 0)


def test_the_quorum_is_lost_and_started_again(world, undisturbed, tmp_path):
    here = world()
    gate = tmp_path / "again"
    processes = [*here.start(0, gate=gate), *here.start(1, gate=gate)]
    end = time.monotonic() + 90
    while sum(note["at"] == GATE * BATCH and "rows" in note for note in _notes(here.notes)) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    port = here.served.port
    here.served.close()
    gate.touch()
    here.served = Quorum("127.0.0.1", port, quorum.token(here.token), lease_s=LEASE_S)
    assert _ended(processes) == [0, 0]
    _hold(here, undisturbed, 0)


@pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft is not installed: pip install torchft")
@pytest.mark.long
def test_torchft_says_who_lives(world, undisturbed, tmp_path):
    with _lighthouse() as at:
        here = world(kind="torchft", at=at)
        _falls_and_returns(here, tmp_path, "between", 1)
        _hold(here, undisturbed, 0)


@pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft is not installed: pip install torchft")
@pytest.mark.long
def test_a_participant_of_a_lighthouse_without_the_token_is_not_counted():
    from gigatrain.parallel.lighthouse import LighthouseSeat

    with _lighthouse() as at:
        mine, foreign = LighthouseSeat(at, b"k" * 32, 0, "aa"), LighthouseSeat(at, b"x" * 32, 1, "bb", patience_s=5)
        heard = []
        asks = threading.Thread(target=lambda: heard.append(foreign.meet({"at": 7})), daemon=True)
        asks.start()
        for _ in range(3):
            assert [member["replica"] for member in mine.meet({"at": 1})] == [0]
        foreign.close()
        mine.close()


@contextlib.contextmanager
def _lighthouse():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "gigatrain.parallel.lighthouse", at, str(LEASE_S), "30"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={"RUST_LOG": "error"} | os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield at
        process.kill()


@pytest.mark.long
def test_the_command_starts_a_killed_replica_again(tiny, tmp_path):
    """All of it as a user has it: one command, a rank of a replica killed, and the run ends well with both copies equal."""
    folder = tmp_path / "run"
    sets = (
        "mesh.replicate=2",
        "train.nproc=2",
        "recovery.replicas=own",
        "numerics.replay=false",
        "train.steps=400",
        "report.every=1",
        "validation.every=0",
        "checkpoint.every=100",
    )
    with subprocess.Popen(training(tiny, folder, *sets), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as command:
        end, other = time.monotonic() + 120, folder / "replicas" / "001" / "metrics.jsonl"
        while not other.is_file() or len(other.read_text().splitlines()) < 5:
            assert time.monotonic() < end
            time.sleep(0.05)
        (victim,) = [pid for pid in _children(command.pid) if b"GIGATRAIN_REPLICA=1/2" in _environment(pid)]
        os.kill(victim, signal.SIGKILL)
        said = command.communicate(timeout=180)[1]
    assert command.returncode == 0, said
    assert "replica 1 ended with 137 and is started again" in said
    first, second = (json.loads((one / "summary.json").read_text()) for one in (folder, folder / "replicas" / "001"))
    # Equal bits are the other tests' matter: on a fast machine the first may be done before the other is back, which then ends alone.
    assert first["steps"] == second["steps"] == 400
    assert abs(first["loss"] - second["loss"]) < 1e-2


def _children(pid):
    return [int(text) for text in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def _environment(pid):
    with open(f"/proc/{pid}/environ", "rb") as file:
        return file.read()


def test_a_share_that_does_not_divide_has_rows_without_labels(tiny, tmp_path):
    recipe = load.recipe(str(tiny), [])
    corpus = build.build(recipe.data, recipe.tokenizer)
    whole = Batches(corpus, sequence=32, packing="stream", batch=6, microbatch=2, seed=1)
    wanted = _rows(whole.make(12))
    for replicas, each in ((1, 4), (2, 2), (3, 2), (4, 1), (4, 3), (6, 2)):
        found, cuts = [], set()
        for replica in range(replicas):
            slots = range(replica * 6 // replicas, (replica + 1) * 6 // replicas)
            for rank in range(each):
                one = Batches(corpus, sequence=32, packing="stream", batch=6, microbatch=2, seed=1)
                one.cut(slots, rank, each)
                batch = one.again(12)
                assert batch.positions == range(12, 18)
                cuts.add((replica, tuple(len(part.tokens) for part in batch.microbatches)))
                found += _rows(batch)
        assert found == wanted
        assert len(cuts) == replicas  # ranks of a replica run the same microbatches
