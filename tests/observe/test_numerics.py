"""Runs whose numbers go wrong: faults that pass leave no trace, bad data is passed over, copies that differ are named. The oracle: an undisturbed run."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import together
from rich.console import Console

from gigatrain import load, loop
from gigatrain.data.loader import Batches
from gigatrain.engines.native import Native
from gigatrain.errors import RunError
from gigatrain.observe import prometheus, reader, watch
from gigatrain.observe.display import Display
from gigatrain.observe.numerics import _blamed
from gigatrain.observe.stragglers import BINS, LEAST_S, Stragglers, _bin, median
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning.plan import plan

SETTINGS = (
    "export=false",
    "train.steps=24",
    "report.every=4",
    "checkpoint.every=8",
    "validation.every=0",
    "numerics.window=8",
    "numerics.sigma=60",
)


def planned(recipe, *overrides, ranks=None):
    return plan(load.recipe(recipe, [*SETTINGS, *overrides]), load.site("laptop"), ranks)


def trained(recipe, folder, *overrides, ranks=None, start: Any = "auto") -> Any:
    with Path(os.devnull).open("w") as nowhere:
        return loop.train(planned(recipe, *overrides, ranks=ranks), folder, start=start, display=Display(Console(file=nowhere)))


def events(folder):
    path = folder / "numerics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {key: row[key] for key in ("step", "loss", "grad_norm", "grad_norm_max", "lr", "tokens", "bad_steps")}
        for row in rows
        if "loss" in row
    ]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return trained(tiny, folder)["weights_sha256"], losses(folder)


def spoil(monkeypatch, spoiled):
    """`spoiled(engine, batch, turn)` after every backward; `turn` counts how often this batch was made."""
    forward, turns = Native.forward_backward, {}

    def spoiling(self, batch):
        forward(self, batch)
        first = batch.positions[0]
        turns[first] = turns.get(first, 0) + 1
        spoiled(self, batch, turns[first])

    monkeypatch.setattr(Native, "forward_backward", spoiling)


@pytest.mark.parametrize("fault", ["nan", "spike", "row"])
def test_a_fault_that_passes_leaves_no_trace(tiny, tmp_path, monkeypatch, undisturbed, fault):
    """A gradient that a machine got wrong once: refused, made again, found right, and trained on, bitwise as if nothing had been."""
    steps = (13, 14, 15) if fault == "row" else (13,)

    def spoiled(engine, batch, turn):
        if batch.positions[0] in [step * 4 for step in steps] and turn == 1:
            engine.grads["model.norm.weight"].mul_(float("nan") if fault == "nan" else 1e12)

    spoil(monkeypatch, spoiled)
    summary = trained(tiny, tmp_path / "run")
    assert summary["weights_sha256"] == undisturbed[0]
    assert losses(tmp_path / "run") == undisturbed[1]
    found = events(tmp_path / "run")
    assert [(one["step"], one["class"]) for one in found] == [(13, "transient")] + [(step, "unknown") for step in steps[1:]]
    assert found[0]["why"] == (["not finite"] if fault == "nan" else ["norm"])
    assert ".train.bin at byte" in found[0]["samples"][0]
    assert summary["bad_steps"] == 0


@pytest.mark.parametrize("every", [1, 4, 7])
def test_what_a_run_computes_does_not_depend_on_when_its_host_looks(tiny, tmp_path, monkeypatch, every):
    """Bad data at three steps: the same refusals and weights with a report after every step as after seven."""

    def spoiled(engine, batch, turn):
        if batch.positions[0] // 4 in (10, 13, 14):
            engine.grads["model.norm.weight"].mul_(1e12)

    spoil(monkeypatch, spoiled)
    summary = trained(tiny, tmp_path / "run", f"report.every={every}")
    found = events(tmp_path / "run")
    assert [one["step"] for one in found] == [10, 13, 14]
    assert [one["class"] for one in found[:2]] == ["data", "data"]  # the third by whether it was seen together with the second
    assert summary["bad_steps"] == 3
    known = Path(tiny).with_name("hash-of-held")
    if known.exists():
        assert known.read_text() == summary["weights_sha256"]
    known.write_text(summary["weights_sha256"])


@pytest.mark.long
def test_no_step_of_a_healthy_run_is_refused_and_ten_times_the_usual_gradient_is(tiny, tmp_path, monkeypatch):
    """800 steps of 128 tokens, whose norms have a heavy tail, and one planted spike among them."""

    def spoiled(engine, batch, turn):
        if batch.positions[0] == 700 * 4:
            for grad in engine.grads.values():
                grad.mul_(10)

    spoil(monkeypatch, spoiled)
    more = ("train.steps=800", "checkpoint.every=1000", "report.every=10", "numerics.window=128", "numerics.sigma=6")
    assert trained(tiny, tmp_path / "run", *more)["bad_steps"] == 1
    assert [(one["step"], one["why"], one["class"]) for one in events(tmp_path / "run")] == [(700, ["norm"], "data")]


def bad_range(monkeypatch, start, stop):
    def spoiled(engine, batch, turn):
        if any(start <= position < stop for position in batch.positions):
            engine.grads["model.norm.weight"].fill_(float("nan"))

    spoil(monkeypatch, spoiled)


ROLLS = ("numerics.action=rollback", "train.max_bad_steps=3", "numerics.pass_over=5")


def test_a_rollback_passes_over_the_samples_and_a_resume_agrees(tiny, tmp_path, monkeypatch):
    """The run that rolled back, and one that was killed after that and resumed, are the run whose stream never had these samples."""
    bad_range(monkeypatch, 13 * 4, 17 * 4)
    rolled = trained(tiny, tmp_path / "rolled", *ROLLS)
    found = [one for one in events(tmp_path / "rolled") if one["event"] == "rollback"]
    assert [(one["to"], one["passed"]) for one in found] == [(8, [13 * 4, 18 * 4])]
    assert rolled["bad_steps"] == 0
    with monkeypatch.context() as patch:
        build = Batches.__init__

        def passing(self, *args, **named):
            build(self, *args, **named)
            self.passed = [(13 * 4, 18 * 4)]

        patch.setattr(Batches, "__init__", passing)
        never = trained(tiny, tmp_path / "never", *ROLLS)
    assert never["weights_sha256"] == rolled["weights_sha256"]
    assert losses(tmp_path / "never") == losses(tmp_path / "rolled")

    for at in (9, 18):  # killed after the rollback, before and after the next save
        with monkeypatch.context() as patch:
            make = Native.step
            seen = []

            def stopping(self, rate, at=at, make=make, seen=seen):
                if int(self.judge.updates) == at and 16 in seen:
                    raise KeyboardInterrupt
                seen.append(int(self.judge.updates) + int(self.judge.waits[0] > 0))
                return make(self, rate)

            patch.setattr(Native, "step", stopping)
            with pytest.raises(KeyboardInterrupt):
                trained(tiny, tmp_path / f"killed-{at}", *ROLLS)
        resumed = trained(tiny, tmp_path / f"killed-{at}", *ROLLS, start="resume")
        assert resumed["weights_sha256"] == rolled["weights_sha256"]


def test_rollbacks_are_bounded(tiny, tmp_path, monkeypatch):
    bad_range(monkeypatch, 13 * 4, 10**9)
    with pytest.raises(
        RunError, match=r"2 rollbacks have passed over samples already \(limit: numerics.rollbacks\)(.|\n)*Data of step 13:"
    ):
        trained(tiny, tmp_path / "run", *ROLLS, "numerics.rollbacks=2")
    passed = [one["passed"] for one in events(tmp_path / "run") if one["event"] == "rollback"]
    assert passed == [[52, 72], [72, 92]]  # the second begins where the first ends


# ---- Several ranks ----


def among(rank, recipe, folder, fault, overrides):
    """One rank's run with a fault of rank 1; its summary, or what it said."""
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            fault(patch, rank)
        try:
            return trained(recipe, folder, *overrides, ranks=int(os.environ["WORLD_SIZE"]))
        except RunError as failure:
            return str(failure)


def wrong_once(patch, rank):
    """Rank 1 computes one loss wrongly, once."""
    compute, count = Native._compute, [0]

    def computing(self, *args):
        loss, nats = compute(self, *args)
        count[0] += 1
        if rank == 1 and count[0] == 14:
            loss, nats = loss * float("inf"), nats * float("inf")
        return loss, nats

    patch.setattr(Native, "_compute", computing)


def wrong_always(patch, rank):
    """Rank 1 computes a loss of some samples too large, whenever it is asked."""
    compute = Native._compute

    def computing(self, module, part, *args):
        loss, nats = compute(self, module, part, *args)
        return (loss * 1e4, nats * 1e4) if rank == 1 and int(self.judge.updates) == 13 else (loss, nats)

    patch.setattr(Native, "_compute", computing)


def flip(patch, rank):
    """A bit of rank 1's weights turns over after step 13, once."""
    make, done = Native.step, []

    def making(self, rate):
        update = make(self, rate)
        if rank == 1 and int(self.judge.updates) == 13 and not done:
            done.append(True)
            self.groups[0].bucket.weight.view(torch.int32)[77] ^= 1 << 3
        return update

    patch.setattr(Native, "step", making)


def slowed(patch, rank):
    """Rank 1 is stopped for 90 ms of every 100, from outside."""
    slow = os.getpid()
    if rank != 1 or os.fork():
        return
    try:
        while os.getppid() == slow:
            for number, pause in ((signal.SIGSTOP, 0.09), (signal.SIGCONT, 0.01)):
                os.kill(slow, number)
                time.sleep(pause)
    finally:
        os._exit(0)


DDP = ("train.nproc=2", "mesh.replicate=2", "mesh.shard=1", "numerics.hash_every=4")


@pytest.fixture(scope="module")
def undisturbed_pair(tiny, tmp_path_factory):
    return together(2, among, tiny, tmp_path_factory.mktemp("pair") / "run", None, DDP)[0]["weights_sha256"]


def test_a_rank_that_was_wrong_once_is_named_and_the_run_goes_on_as_if_it_had_not(tiny, tmp_path, undisturbed_pair):
    found = together(2, among, tiny, tmp_path / "run", wrong_once, DDP)
    assert found[0]["weights_sha256"] == undisturbed_pair
    assert [(one["step"], one["class"], one["ranks"]) for one in events(tmp_path / "run")] == [(13, "transient", [1])]


def test_a_rank_that_is_always_wrong_differs_from_another(tiny, tmp_path):
    together(2, among, tiny, tmp_path / "run", wrong_always, DDP)
    assert [(one["step"], one["class"], one["ranks"]) for one in events(tmp_path / "run")] == [(13, "persistent", [0, 1])]  # of two


def bad_data(patch, rank):
    """Every rank finds step 13 too large, whenever it is asked: in the loss, for gradients are on their way while they are made."""
    compute = Native._compute

    def computing(self, *args):
        loss, nats = compute(self, *args)
        return (loss * 1e4, nats * 1e4) if int(self.judge.updates) == 13 else (loss, nats)

    patch.setattr(Native, "_compute", computing)


@pytest.mark.long
def test_nobody_is_blamed_where_an_adapter_drops_by_who_reads(tiny, tmp_path):
    """Another reader draws other masks, so that what it computes of the same samples says nothing of the machine."""
    more = (*DDP, "adapter.rank=4", "adapter.dropout=0.1", "train.steps=16")
    assert not isinstance(together(2, among, tiny, tmp_path / "run", bad_data, more)[0], str)
    assert [(one["step"], one["class"], one["ranks"]) for one in events(tmp_path / "run")] == [(13, "data", [])]


def test_who_is_contradicted_by_two_is_blamed():
    own = {0: "a", 1: "wrong", 2: "c", 3: "d"}
    other = {0: "b", 1: "wrong too", 2: "d", 3: "a"}  # of the next reader
    records = [{"rank": rank, "host": f"n{rank}", "data": rank, "where": [0], "own": own[rank], "other": other[rank]} for rank in own]
    assert _blamed(records) == [{"rank": 1, "host": "n1"}]
    assert _blamed([one | {"own": own[rank] * 0, "other": ""} for rank, one in enumerate(records)]) == []


def test_a_flipped_bit_is_named_and_stops_the_run_or_takes_it_back(tiny, tmp_path, undisturbed_pair):
    said = together(2, among, tiny, tmp_path / "stops", flip, DDP)
    assert said[0] == said[1]
    assert "at step 16 ranks that should hold the same bits do not" in said[0]
    tensors = events(tmp_path / "stops")[0]["tensors"]
    assert [one["name"].partition(" of ")[0] for one in tensors] == ["weight"]
    assert tensors[0]["ranks"] == [0, 1]
    found = together(2, among, tiny, tmp_path / "back", flip, (*DDP, "numerics.on_divergence=rollback"))
    assert found[0]["weights_sha256"] == undisturbed_pair


@pytest.mark.long
def test_a_rank_that_is_stopped_again_and_again_is_named(tiny, tmp_path):
    more = (
        "train.steps=200",
        "report.every=25",
        "numerics.straggler=2",
        "checkpoint.every=300",
    )  # a window of many stops, whichever section each meets
    together(2, among, tiny, tmp_path / "run", slowed, (*DDP, *more))
    told = json.loads((tmp_path / "run" / "stragglers.json").read_text())
    (one,) = (one for one in told["ranks"] if one["rank"] == 1)
    assert one["times"] > 2
    assert one["section"] in ("data", "forward", "backward", "optimizer")
    assert one["host"] in told["exclude"]


def compared(rank, recipe, folder):
    """Twelve reports of three ranks, of which the last is slow from the third to the eighth; the score and what was said."""
    made = planned(recipe, "mesh.replicate=3", "mesh.shard=1", "train.batch=3", "train.microbatch=1", ranks=3)
    report, said, named = [0], [], []

    def taken():
        slow = 4.0 if rank == 2 and 3 <= report[0] <= 8 else 1.0 + 0.05 * rank
        return 10, {"forward": 0.5 * slow, "backward": 1.0, "data": 1e-5 * slow, "reduce": 3.0}

    mesh = Mesh(made.mesh, rank)
    ours = Stragglers(made, mesh, taken, folder if rank == 0 else None, said.append)
    for report[0] in range(12):
        rest = ours.meet(mesh.sum(torch.tensor([*ours.numbers(), rank])).tolist())
        assert rest == [3]
        ours.name(10 * report[0])
        named.append([(one["rank"], one["section"]) for one in ours.named])
        if report[0] == 7 and rank == 0:
            (folder / "metrics.jsonl").touch()
            seen = reader.Reader(folder).seen()
            shown = [line for line in prometheus.exposition(seen).splitlines() if "straggler_ratio{" in line]
            one = json.loads((folder / "stragglers.json").read_text())["ranks"][0]
            assert one["times"] == pytest.approx(4.0, rel=0.1)
            assert one["score"] == pytest.approx(1 / one["times"], abs=0.01)
            assert any(title == "SLOW" and words.startswith("rank 2 on ") for title, words, _ in watch.lines(seen))
            assert [float(line.split()[-1]) for line in shown] == [one["times"]]
    return named, said


def test_a_slow_rank_is_named_while_it_is_slow(tiny, tmp_path):
    found = together(3, compared, tiny, tmp_path)
    slow = [(2, "forward")]
    assert all(named == [[]] * 6 + [slow] * 3 + [[]] * 3 for named, _ in found)  # seen in the third report in a row, told in the next
    assert ["SLOW rank 2" in line for line in found[0][1]] == [True, False]
    assert found[0][1][1] == "rank 2 is as fast as the others again"
    assert found[1][1] == found[2][1] == []


def test_the_median_is_of_the_rank_in_the_middle_to_the_width_of_a_bin():
    for seconds in ([0.01], [0.01, 0.02], [0.5, 0.01, 0.3], [1e-9], [1e9, 1e9, 1e9], [0.1] * 999 + [10.0] * 1000):
        counts = [0] * BINS
        for one in seconds:
            counts[_bin(one)] += 1
        middle = min(max(sorted(seconds)[(len(seconds) - 1) // 2], LEAST_S), 60.0)
        assert median(counts) == pytest.approx(middle, rel=0.05) or middle in (LEAST_S, 60.0)
    assert median([0] * BINS) is None
