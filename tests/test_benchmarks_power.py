"""The energy benchmark beside the peers: one program from check to row, with a tree of meters whose watts are known, and what it refuses."""

import argparse
import csv
import json
import math
import sys
import time
from pathlib import Path

import pytest
from metered import Tree
from programs import program

from gigatrain import load
from gigatrain.planning.plan import plan
from gigatrain.power.reading import Taken

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(FOLDER))  # where it finds what lies beside it, as a script does
    yield program("benchmarks/power.py")
    sys.path.remove(str(FOLDER))


def run(benchmark, capsys, *words):
    """(exit status, the JSON it prints or None, what it says)."""
    status = benchmark.main(["--json", *map(str, words)])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else None, err


@pytest.mark.parametrize("providers", ["gigatrain", pytest.param("gigatrain,trainer", marks=pytest.mark.long)])
@pytest.mark.long
def test_providers_are_measured_by_one_meter_and_checked_first(benchmark, tiny, capsys, tmp_path, monkeypatch, providers):
    monkeypatch.setattr(benchmark.steady, "LEAST_S", 0.5)  # ten seconds are for real meters
    monkeypatch.setattr(benchmark.steady, "LEAST_UPDATES", 2)
    monkeypatch.setattr(benchmark, "SETTLE_S", 1.0)
    monkeypatch.setitem(benchmark.PROVIDERS, "broken", None)  # here, but not in its worker
    out = tmp_path / "power.csv"
    rounds = providers.count(",") + 1
    sizes = ["--precision", "fp32", "--rounds", rounds, "--seconds", 1.5, "--idle", 0.4, "--warmup", 1, "--most-steps", 4000]
    with Tree(tmp_path / "sys") as tree:
        names = ["--providers", f"{providers},broken,trainer-bf16"]
        status, found, said = run(benchmark, capsys, "--recipe", tiny, "--sysfs", tree.root, *sizes, *names, "--out", out)
    assert status == 0, said
    assert found
    rows = {row["provider"]: row for row in found["rows"]}
    assert list(rows) == providers.split(",")
    for row in rows.values():
        assert math.isclose(row["watts_device"], 150, rel_tol=0.25)  # the tree has news every 50 ms, and a window is of a second or two
        assert math.isclose(row["watts_facility"], 400, rel_tol=0.25)
        assert row["window_s"] >= 0.5
        assert row["tokens_per_joule_low"] <= row["tokens_per_joule_device"] <= row["tokens_per_joule_high"]
        assert row["first_loss_difference"] < 1e-3
        assert row["rounds"] == rounds
        assert math.isclose(row["idle_watts_before"], 400, rel_tol=0.25)
    if "trainer" in rows:
        assert rows["trainer"]["ratio_to_trainer"] == rows["trainer"]["ratio_to_best_trainer"] == 1.0
        # Rounds are of equally many steps; the first look at a speed is of as many as a provider makes in a second.
        assert abs(rows["gigatrain"]["steps"] - rows["trainer"]["steps"]) < benchmark.PILOT_STEPS[-1]
        assert said.count(" steps each, tokens/s: gigatrain ") >= rounds
    assert list(found["failed"]) == ["broken", "trainer-bf16"]
    with out.open(newline="") as file:
        kept = list(csv.DictReader(file))
    assert [line["provider"] for line in kept] == [*providers.split(","), "broken", "trainer-bf16"]
    lost = kept[-2]
    assert lost["note"].startswith("no figure: KeyError")
    assert lost["architecture"] == kept[0]["architecture"]
    assert not any(lost[name] for name in lost if name.startswith(("watts_", "tokens_", "ratio_")))
    benchmark.show(found)
    shown = capsys.readouterr().out
    for text in ("tokens/J", "facility", "broken: KeyError", "trainer-bf16: bf16 weights", "idle before and after", "no limit is told"):
        assert text in shown, text


class Peer:
    """Takes orders like a worker, and is as fast as it is told, round by round."""

    def __init__(self, name, loss=7.0, speeds=(3.0,)):
        self.name, self.losses, self.error, self.ready, self.speeds, self.asked = name, [loss], None, {}, list(speeds), []

    def answer(self, _):
        return {}

    def ask(self, _, steps, __):
        self.asked.append(steps)
        return {"seconds": steps * (self.speeds.pop(0) if len(self.speeds) > 1 else self.speeds[0]), "peak_bytes": 1}


class Still:
    """A meter that counts a second and a joule each time it is asked."""

    def take(self):
        return Taken(nodes=1, ms=1000, node_measured_mj=1000)


def test_a_round_that_is_too_short_is_made_again_and_too_many_steps_are_refused(benchmark):
    options = argparse.Namespace(rounds=3, settle=0, timeout=1.0, limit_s=1e9, idle=0.1)
    plan = argparse.Namespace(tokens_per_step=10)
    # A first look at 0.1 s a step; they then take half of that, and 110 steps are no window of 10 s.
    everyone = [benchmark.Turns(Peer(name, speeds=[0.05]), step_s=0.1) for name in ("a", "b")]
    said = []
    with benchmark.Board() as board:
        benchmark.rounds(Still(), board, everyone, 10.0, 1000, plan, options, time.monotonic(), said.append)
        assert [one.peer.asked for one in everyone] == [[20, 110, *[20, 240] * 3]] * 2
        assert all(len(one.rounds) == 3 and one.rounds[0].window_s > 10 for one in everyone)
        assert "once more, with more steps" in said[1]
        options.limit_s = 0.0
        one = [benchmark.Turns(Peer("a", speeds=[0.1]), step_s=0.1)]
        benchmark.rounds(Still(), board, one, 10.0, 1000, plan, options, time.monotonic(), said.append)
        assert (len(one[0].rounds), "1 were made" in said[-1]) == (1, True)
        with pytest.raises(benchmark.RunError, match=r"takes 110 steps, and 50 a round are prepared; fewer --rounds, or more --most-steps"):
            benchmark.rounds(Still(), board, one, 10.0, 50, plan, options, time.monotonic(), said.append)


def test_without_a_meter_it_says_why_and_leaves_with_10(benchmark, tiny, capsys, tmp_path):
    (tmp_path / "sys").mkdir()
    status, found, said = run(benchmark, capsys, "--recipe", tiny, "--sysfs", tmp_path / "sys", "--out", tmp_path / "none.csv")
    assert (status, found) == (10, None)
    assert "PowerError: no meter counts here" in said
    assert not (tmp_path / "none.csv").exists()


def test_a_provider_that_does_other_work_is_told_apart(benchmark):
    everyone = [benchmark.Turns(Peer(*one)) for one in (("gigatrain", 7.0), ("near", 7.05), ("other", 7.3), ("nan", math.nan))]
    benchmark.checked(everyone, argparse.Namespace(timeout=1.0, warmup=1), lambda _: None)
    assert [one.peer.error is None for one in everyone] == [True, True, False, False]
    assert everyone[2].peer.error == "its first loss is 7.30000 and not 7.00000: it does other work"


def test_as_many_layers_as_fit_for_all_at_once(benchmark):
    """And what the default work is on a GPU: a plan, for ours with and without our kernels."""
    assert benchmark.fitting(141 << 30, benchmark.DEFAULT) == 16
    assert 8 <= benchmark.fitting(79 << 30, benchmark.DEFAULT) <= 12
    assert benchmark.fitting(79 << 30, benchmark.DEFAULT[:1]) == 16
    assert benchmark.fitting(1 << 30, benchmark.DEFAULT) == 2
    site = load.site("one-gpu").model_copy(update={"memory_bytes": 79 << 30})
    options = argparse.Namespace(recipe="quickstart", set=["train.batch=4"], providers=None, site=site, sysfs=None)
    options.rounds = options.settle = options.warmup = options.idle = None
    benchmark.defaults(options, gpu=True)
    for variant in ("", "plain"):
        planned = plan(load.recipe("quickstart", [*options.set, "optim.name=adamw", *benchmark.VARIANTS[variant]]), site)
        assert 5e8 < planned.parameters < 1.1e9
        assert (planned.sequence, planned.batch, planned.microbatch, options.rounds, options.settle) == (4096, 4, 2, 3, 5)
        kernels = {one.op: one.kernel for one in planned.kernels}
        assert (kernels["rms_norm"] == "reference") is (variant == "plain")
    site = site.model_copy(update={"memory_bytes": None})
    with pytest.raises(benchmark.RunError, match=r"how many layers fit for all is unknown; --set model.architecture.layers=N"):
        benchmark.defaults(argparse.Namespace(**vars(options) | {"site": site}), gpu=True)


def test_what_is_not_installed_is_named_with_the_way_to_bring_it(benchmark, monkeypatch):
    assert benchmark.lacking() is None
    monkeypatch.setattr(benchmark, "NEEDED", {"pydantic_of_nowhere": "pydantic", "json": "json"})
    said = benchmark.lacking()
    assert "not installed: pydantic, pydantic-core, annotated-types, typing-inspection (and" in said
    assert "carry .whl" in said


def test_what_cannot_be_compared_is_refused(benchmark, tiny, capsys, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a\n1\n")
    for words, message in (
        (["--providers", "gigatrain,trianer"], "there is no provider 'trianer'; did you mean \"trainer\"?"),
        (["--rounds", "0"], "--rounds and --warmup must be at least 1"),
        (["--out", other], "has other columns"),
    ):
        status, found, said = run(benchmark, capsys, "--recipe", tiny, "--out", tmp_path / "none.csv", *words)
        assert (status, found) == (7, None)
        assert message in said
    assert set(benchmark.NUMBERS) < set(benchmark.COLUMNS)


@pytest.fixture(scope="module")
def overhead():
    return program("benchmarks/meter.py")


def test_what_measuring_costs_is_of_a_meter_and_without_its_start(overhead, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(overhead.torch, "set_num_threads", lambda _: None)  # this process has its own
    out = tmp_path / "meter.csv"
    (tmp_path / "none").mkdir()
    assert overhead.main(["--sysfs", str(tmp_path / "none"), "--out", str(out)]) == 10
    assert "PowerError: no meter counts here" in capsys.readouterr().err
    assert not out.exists()
    assert overhead.main(["--rounds", "0", "--out", str(out)]) == 7
    blocks, real = [], overhead.block
    monkeypatch.setattr(overhead, "block", lambda seconds, work: blocks.append(seconds) or real(seconds, work))
    with Tree(tmp_path / "sys") as tree:
        words = ["--seconds", "1.6", "--rounds", "2", "--settle-s", "0.25", "--sysfs", str(tree.root), "--out", str(out)]
        assert overhead.main(words) == 0
    assert blocks == [0.25, 0.4] * 4  # what lies before each is not counted
    with out.open(newline="") as file:
        [line] = csv.DictReader(file)
    assert (line["rounds"], line["block_s"], line["settle_s"]) == ("2", "0.4", "0.25")
    assert 0 <= float(line["thread_pct"]) <= float(line["thread_pct_high"]) < 100
    assert "package" in line["meters"] or "RAPL" in line["meters"]
