"""`gigatrain bench power`: what a run's record becomes, what is judged and by which yardstick, the best site, what is refused; and the command as users run it.

Record rows are written as power/__init__.py says the loop writes them. Figures of watts are exact: no clock is read.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stubs
from metered import Tree

from gigatrain import cli, load
from gigatrain.bench import chart, fleet, power, report, steady, sweep, trials, verdict
from gigatrain.bench.board import Board
from gigatrain.errors import PowerError, RunError, SiteError
from gigatrain.planning.plan import plan
from gigatrain.planning.watts import Watts
from gigatrain.site import Figure, Site


def known(value):
    return Figure(value=value, basis="declared", source="test")


def record(folder, *, windows=12, each_s=1.0, tokens=1000, device_mj=0, node_mj=400_000, val_loss=2.5, **taken):
    """A run's folder as the loop leaves it: 3 s of start, windows of 400 W, the first two warmer by 100 W, and a last row with validation and save."""
    (folder / "logs").mkdir(parents=True)
    began = 1_790_000_000.0
    rows = [{"time_s": began, "event": "begin", "step": 0, "tokens": 0, "taken": {}, "meters": {"node": "test"}}]
    progress = [{"time_s": began - 1, "event": "start"}, {"time_s": began + 3, "event": "steps", "step": 0}]
    for number in range(1, windows + 1):
        hot = 100_000 if number < 3 else 0
        one = {"nodes": 1, "ms": round(each_s * 1e3), "node_measured_mj": node_mj + hot, "device_measured_mj": device_mj} | taken
        told = {"time_s": began + 3 + number * each_s, "step": number, "tokens": number * tokens}
        rows.append(told | {"event": "window", "taken": one})
        progress.append(told | {"event": "report", "time_s": told["time_s"] - 0.02})
    last = rows[-1] | {"time_s": rows[-1]["time_s"] + 4}
    rows += [last | {"taken": {"nodes": 1, "ms": 4000, "node_measured_mj": 500_000}}, last | {"event": "end", "taken": {}}]
    for name, written in (("energy.jsonl", rows), ("logs/progress.jsonl", progress)):
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in written) + '{"time_s": 1790')  # killed within a line
    (folder / "summary.json").write_text(
        json.dumps({"loss": 2.0, "val_loss": val_loss, "tokens": windows * tokens, "tokens_per_s": tokens / each_s})
    )
    return folder


def told(folder):
    return steady.rows_of(folder / "energy.jsonl"), steady.rows_of(folder / "logs" / "progress.jsonl")


def row(variant: str, speed=1000.0, watts=500.0, *, at="facility", loss=2.0, val_loss: float | None = 2.5, accelerators=1, **more):
    """A measured run's row."""
    found = dict.fromkeys(verdict.COLUMNS) | {"variant": variant, "status": "ok", "round": "1", "rounds": 1, "accelerators": accelerators}
    found |= {
        "commit": "c",
        "date": "d",
        "device": "H",
        "settings": "s",
        "recipe": "tiny",
        "steps": 60,
        "provenance": "node: measured",
        "gaps": 0,
    }
    found |= {"tokens_per_s": speed, "loss": loss, "val_loss": val_loss, "window_s": 12.0, "settle_s": 3.0, "peak_mib": 10.0}
    found |= {f"watts_{at}": watts, f"tokens_per_joule_{at}": speed / watts, f"joules_per_token_{at}": watts / speed}
    return found | more


def test_what_counts_begins_after_settling_and_ends_with_the_last_report(tmp_path):
    rows, progress = told(record(tmp_path / "run"))
    found = steady.stretch(rows, progress, 1.5)  # the second window is the first edge that lies 1.5 s after the steps began
    assert (found.seconds, found.tokens, found.settle_s, found.startup_s) == (10.0, 10_000, 2.0, 3.0)
    assert (found.taken.node_measured_mj, found.taken.nodes, found.taken.ms) == (4_000_000, 1, 10_000)  # without validation and save
    assert steady.stretch(rows, progress, 0.0).tokens == 11_000  # what is before the first edge holds the start
    with pytest.raises(RunError, match=r"windows end 12.0 s after its first step, and what counts begins with the first that ends 12.0 s"):
        steady.stretch(rows, progress, 12.0)
    with pytest.raises(RunError, match="told no window"):
        steady.stretch(rows[:1], progress, 0.0)
    with pytest.raises(RunError, match=r"power.measure must be true"):
        steady.rows_of(tmp_path / "energy.jsonl")


def test_figures_are_tokens_over_joules_of_the_steady_stretch(tiny, tmp_path):
    made = plan(load.recipe(tiny), load.site("laptop"))
    found = steady.figures(record(tmp_path / "run"), made, settle_s=1.5, least_s=10.0)
    assert (found["status"], found["tokens_per_s"], found["watts_node"], found["watts_facility"]) == ("ok", 1000.0, 400.0, 400.0)
    assert math.isclose(found["tokens_per_joule_facility"], 2.5)
    assert math.isclose(found["joules_per_token_node"], 0.4)
    assert "watts_device" not in found
    assert "device" in found["unknown"]
    assert "node: nodes 100 % measured" in found["provenance"]
    assert steady.losses(tmp_path / "run") == {"loss": 2.0, "val_loss": 2.5, "steps_s": 12.0}
    short = steady.figures(record(tmp_path / "short", windows=6), made, settle_s=1.5, least_s=10.0)
    assert "steady window of 4.0 s is below the 10.0 s that its meters need: no figure" in short["status"]
    assert "tokens_per_s" not in short
    gpu = {"devices": 1, "device_ms": 1000, "counter_mj": 300_000, "integral_mj": 306_000, "power_capped_ms": 340}
    found = steady.figures(record(tmp_path / "gpu", device_mj=300_000, **gpu), made, settle_s=1.5, least_s=10.0)
    assert (found["watts_device"], found["capped_share"], round(found["disagreement"], 4)) == (300.0, 0.34, 0.02)
    with pytest.raises(PowerError, match="no meter counted a joule"):
        steady.figures(record(tmp_path / "none", node_mj=0, device_nameplate_mj=700_000), made, settle_s=2.5, least_s=1.0)


def test_losses_are_judged_by_the_baselines_own_spread():
    runs = {
        "baseline": [row("baseline", val_loss=2.500), row("baseline", val_loss=2.502)],
        "control": [row("control", loss=2.01, val_loss=2.505)],
        "near": [row("near", val_loss=2.504)],
        "far": [row("far", val_loss=2.52)],
        "lost": [row("lost", val_loss=None)],
    }
    rows = [verdict.summarised(one) for one in runs.values()]
    verdict.judge(rows, runs)
    by_name = {one["variant"]: one for one in rows}
    assert math.isclose(by_name["near"]["val_loss_tolerance"], 0.005)
    assert math.isclose(by_name["far"]["val_loss_difference"], 0.019)  # from the median of the baseline's rounds
    assert {name: one["loss_neutral"] for name, one in by_name.items()} == {
        "baseline": True, "control": True, "near": True, "far": False, "lost": None,
    }  # fmt: skip
    alone = [row("baseline"), row("near")]
    verdict.judge(alone, {"baseline": alone[:1]})  # one run has no spread
    assert [one["loss_neutral"] for one in alone] == [None, None]
    pair = [row("baseline"), row("control", val_loss=2.6), row("near", val_loss=2.55)]
    verdict.judge(pair, {"baseline": pair[:1], "control": pair[1:2]})  # nor do two say how far a third one lies: --quick
    assert [one["loss_neutral"] for one in pair] == [None, None, None]
    unheld = [row("baseline", val_loss=None), row("near", val_loss=None)]
    verdict.judge(unheld, {"baseline": [row("baseline", val_loss=None)] * 3})  # nothing is held out: judged by the loss alone
    assert [one["loss_neutral"] for one in unheld] == [True, True]


def test_rounds_become_medians_and_a_spread():
    runs = [row("a", 900.0), row("a", 1000.0), row("a", 1100.0), row("a") | {"status": "its window is too short", "tokens_per_s": None}]
    found = verdict.summarised(runs)
    assert (found["round"], found["rounds"], found["tokens_per_s"], found["tokens_per_joule_facility"]) == ("all", 3, 1000.0, 2.0)
    assert verdict.spread([1.8, 2.0, 2.2]) == pytest.approx(20.0)
    assert verdict.spread([2.0]) is None
    assert verdict.summarised(runs[3:])["rounds"] == 0
    assert verdict.boundary([row("a"), row("b", at="node", watts_facility=None)]) is None
    assert verdict.boundary([row("a") | {"watts_node": 1.0}, row("b", at="node")]) == "node"
    assert verdict.boundary([]) is None


def test_nobody_is_better_in_both():
    rows = [row("fast", 1000.0, 700.0), row("slow", 900.0, 500.0), row("worse", 890.0, 600.0), row("twin", 900.0, 500.0)]
    assert verdict.pareto(rows, "facility") == {"fast", "slow", "twin"}


def site(**more):
    return Site(name="s", summary="", device="cuda", **more)


def test_a_megawatt_is_for_more_slower_accelerators_until_there_are_no_more():
    rows = [row("fast", 1000.0, 1000.0), row("slow", 800.0, 600.0)]
    found = fleet.fleet(rows, Watts(), site(), 0.01, "facility")
    assert [(one["variant"], one["accelerators"], one["tokens_per_s"]) for one in found["rows"]] == [
        ("fast", 10, 10_000.0),
        ("slow", 16, 12_800.0),
    ]
    assert found["best"]["variant"] == "slow"
    assert "16 at 600 W beat 10 of fast at 1,000 W, 1.280 times" in found["why"]
    assert "perfect weak scaling" in found["assumes"][0]
    assert any("does not say what a node holds" in text for text in found["assumes"])
    assert (rows[1]["megawatts"], rows[1]["site_accelerators"], rows[1]["site_tokens_per_s"]) == (0.01, 16, 12_800.0)

    nodes = fleet.fleet(rows, Watts(per_node=4), site(accelerators=known(64)), 0.01, "facility")  # whole nodes of 4
    assert [one["accelerators"] for one in nodes["rows"]] == [8, 16]
    few = fleet.fleet(rows, Watts(per_node=4), site(accelerators=known(8)), 0.01, "facility")
    assert (few["best"]["variant"], few["best"]["accelerators"]) == ("fast", 8)
    assert "feed all 8 accelerators of s, so the fastest of those wins" in few["why"]
    device = fleet.fleet([row("a", at="device")], Watts(), site(), 0.01, "device")
    assert any("at the boundary 'device': what lies beyond it" in text for text in device["assumes"])
    pair = fleet.fleet([row("pair", 2000.0, 1000.0, accelerators=2)], Watts(), site(), 0.01, "facility")
    assert (pair["best"]["accelerators"], pair["best"]["watts_each"], pair["best"]["tokens_per_s"]) == (20, 500.0, 20_000.0)
    with pytest.raises(SiteError, match=r"feeds no node: 2.*kW is the least"):
        fleet.fleet([row("a", watts=5000.0)], Watts(per_node=4), site(), 0.002, "facility")


def test_a_sweep_is_of_whole_plans_and_says_what_cannot_be(tiny):
    on = load.site("laptop")
    first = sweep.baseline(str(tiny), ["train.nproc=2"], on)
    assert (first.plan.export, first.plan.power.megawatts, first.plan.validation.max_samples) == (False, None, 32)
    groups = sweep.words("microbatch+precision,kernels,mesh,cap")
    found, refused = sweep.variants(str(tiny), ["train.nproc=2"], on, groups, first, visible=1, no_caps="no right")
    names = [one.name for one in found]
    assert names == [
        "microbatch=1 precision=fp32", "microbatch=1 precision=bf16", "microbatch=2 precision=bf16", "kernels=reference",
        "mesh=replicate2", "mesh=tensor2", "mesh=context2",
    ]  # fmt: skip
    assert found[0].plan.microbatch == 1
    assert found[-2].plan.mesh.tensor == 2
    assert refused["microbatch=2 precision=fp32"] == refused["kernels=auto"] == "the same plan as baseline"
    assert "multiplies on tensor cores" in refused["microbatch=1 precision=fp8"]
    assert "the model has none" in refused["mesh=expert2xshard2"]
    assert refused["cap"] == "no right"
    one = sweep.baseline(str(tiny), [], on)
    caps, _ = sweep.variants(str(tiny), [], on, sweep.words("cap,mesh"), one, visible=1, default_watts=700.0, least_watts=500.0)
    assert [(one.name, one.cap_watts) for one in caps] == [("cap=595W", 595.0), ("cap=500W", 500.0)]  # below 500 W nothing can be set
    assert "one rank has one layout" in sweep.variants(str(tiny), [], on, sweep.words("mesh"), one, visible=1)[1]["mesh"]
    again = load.read_json(type(one.recipe), sweep.text(sweep.sized(one.recipe, 7, 2, seed=9)), "x", RunError)
    assert (again.train.steps, again.report.every, again.train.seed, again.optim) == (7, 2, 9, one.recipe.optim)


def test_what_cannot_be_asked_is_refused(tiny, tmp_path, monkeypatch, capsys):
    def refused(*words):
        with pytest.raises(SystemExit) as ended:
            cli.main(["bench", "power", str(tiny), *words])
        return ended.value.code, capsys.readouterr().err

    assert refused("--sweep", "microbach") == (
        7, 'gigatrain: --sweep \'microbach\'; did you mean "microbatch"? Known: microbatch, precision, kernels, mesh, cap; joined by + they vary together.\n',
    )  # fmt: skip
    assert "has a word twice" in refused("--sweep", "cap+cap")[1]
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    assert "has other columns" in refused("--csv", str(other))[1]
    assert "is no file" in refused("--csv", "/dev/full")[1]
    assert "cannot be written" in refused("--csv", str(other / "power.csv"))[1]
    for words in (("--megawatts", "0"), ("--seconds", "nan"), ("--steps", "0")):
        assert refused(*words)[0] == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it once, without torchrun" in refused()[1]
    with Board() as board:
        assert "no accelerator here has a limit to set" in (trials.no_caps(True, board) or "")


def test_each_goes_first_in_turn():
    assert [trials.rotated("abc", turn) for turn in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_a_run_dies_with_the_bench_and_says_why_it_failed(tmp_path):
    log = tmp_path / "run.log"
    code, peak_bytes = trials.ran([sys.executable, "-c", "print('gigatrain: no room; give it more'); raise SystemExit(7)"], log)
    assert (code, trials.why(log, code)) == (7, "ended with code 7: no room; give it more")
    assert peak_bytes > 1 << 20
    code, _ = trials.ran([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], log)
    assert trials.why(log, code) == "was ended by signal 9: it said nothing"

    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(100)"
    bench = f"import sys; from pathlib import Path; from gigatrain.bench.trials import ran; ran([sys.executable, '-c', {child!r}], Path({str(log)!r}))"
    held = subprocess.Popen([sys.executable, "-c", bench])
    try:
        until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text().endswith(" "))
        pid = int((tmp_path / "pid").read_text())
        assert alive(pid)
    finally:
        held.kill()
        held.wait()
    until(lambda: not alive(pid))


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="session")
def boards(tmp_path_factory):
    """The folder of the stub of NVML, for LD_LIBRARY_PATH."""
    return stubs.nvml(Path(__file__).parent / "fakeboard.c", tmp_path_factory.mktemp("board"))


_BOARD = """
import json, os, signal, sys, time
from gigatrain.bench import board, trials
with board.Board() as on:
    print(json.dumps([on.uuids, on.name, on.limits(), on.state(), on.state(1)]))
    print(json.dumps([trials.no_caps(False, on), trials.no_caps(True, on)]))
    with trials.capped(on, 500.0, print), on.watched() as seen:
        print(json.dumps(on.limits()["limit_watts"]))
        time.sleep(0.7)
        if sys.argv[1] == "die":
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    print(json.dumps([on.limits()["limit_watts"], seen]))
"""


def test_limits_are_found_set_for_a_variant_and_put_back(boards, tmp_path):
    names = [f"GPU-{letter}-bench-{os.getpid()}" for letter in "ab"]
    environment = os.environ | {"LD_LIBRARY_PATH": str(boards), "FAKE_DIR": str(tmp_path), "FAKE_NAME": f"bench-{os.getpid()}"}
    del environment["CUDA_VISIBLE_DEVICES"]

    def asked(word, **more):
        return subprocess.run([sys.executable, "-c", _BOARD, word], env=environment | more, capture_output=True, text=True, check=False)

    ended = asked("live")
    seen, (unasked, may), within, (after, watched) = (json.loads(line) for line in ended.stdout.splitlines())
    limits = {"limit_watts": 650.0, "limit_default_watts": 700.0, "limit_least_watts": 200.0, "limit_most_watts": 700.0}
    state = {"sm_mhz": 1800.0, "mem_mhz": 2600.0, "celsius": 52.0, "used_mib": 2048.0}
    assert seen == [names, "Fake H100", limits, state, state | {"celsius": 51.0, "used_mib": 1024.0}]
    assert "--allow-power-caps lets them be set" in unasked
    assert (may, within, after, watched) == (None, 500.0, 650.0, state)
    ended = asked("die")  # kill -9 within a variant: the guard puts back what it found
    assert (ended.returncode, json.loads(ended.stdout.splitlines()[-1])) == (-9, 500.0)
    until(lambda: [(tmp_path / name).read_text() for name in "01"] == ["650000\n", "650000\n"])
    ended = asked("live", FAKE_FORBIDDEN="1")
    assert "may be set by root only" in json.loads(ended.stdout.splitlines()[1])[1]


def test_rows_are_kept_line_by_line_and_a_torn_one_is_dropped(tmp_path):
    path = tmp_path / "power.csv"
    report.append(path, [row("a")], verdict.COLUMNS)
    with path.open("a") as file:
        file.write("half a row, of a run that was kil")
    report.append(path, [row("b", cap_watts=500.0)], verdict.COLUMNS)
    held = report.load(path, verdict.COLUMNS, verdict.NUMBERS)
    assert [(one["variant"], one["tokens_per_s"], one["cap_watts"]) for one in held] == [("a", 1000.0, None), ("b", 1000.0, 500.0)]
    assert set(verdict.NUMBERS) | set(verdict.MIDDLE) <= set(verdict.COLUMNS)
    assert len(set(verdict.COLUMNS)) == len(verdict.COLUMNS)


def entries(*runs):
    made = sweep.baseline("quickstart", [], load.site("laptop"))
    return [trials.Entry(dataclasses.replace(made, name=one[0]["variant"]), list(one)) for one in runs]


def test_the_table_shows_losers_refusals_and_what_is_assumed(tmp_path):
    from rich.console import Console

    all_of = entries(
        [row("baseline", 1000.0), row("baseline", 1010.0)],
        [row("control", 1002.0, val_loss=2.501), row("control", 1001.0)],
        [row("cap=350W", 900.0, 350.0, cap_watts=350.0, capped_share=0.9), row("cap=350W", 902.0, 350.0)],
        [row("precision=fp8", 1200.0, 520.0, val_loss=2.9), row("precision=fp8", 1201.0, 520.0, val_loss=2.9)],
        [dict.fromkeys(verdict.COLUMNS) | {"variant": "microbatch=8", "status": "ended with code 7: out of memory"}],
    )
    found = power.outcome(all_of, {"precision=fp32": "the plan refuses it"}, Watts(), site(), 1.0)
    assert found["pareto"] == ["baseline", "cap=350W"]
    assert list(found["damaged"]) == ["precision=fp8"]
    assert [one["variant"] for one in found["site"]["rows"]] == ["baseline", "cap=350W"]
    assert found["site"]["best"]["variant"] == "cap=350W"
    made = chart.draw(found, tmp_path / "pictures")
    assert made[0].read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "out.txt").open("w") as file:
        chart.show(found, Console(file=file, width=220))
    shown = (tmp_path / "out.txt").read_text()
    for text in (
        "compared at facility", "NO", "microbatch=8: ended with code 7: out of memory", "precision=fp32: the plan refuses it", "perfect weak scaling",
        "1 MW at facility: cap=350W, 2,857 accelerators of 350 W", "0.001 nats of validation loss", "control",
        "excluded    precision=fp8, 1.332 times the tokens/s and 0.897 times the tokens/J of cap=350W, is not loss-neutral: validation loss +0.4, and 0.001 is",
    ):  # fmt: skip
        assert text in shown, text
    assert len({line.split()[0] for line in shown.splitlines()}) > 5
    one_round = power.outcome([trials.Entry(one.variant, one.runs[:1]) for one in all_of], {}, Watts(), site(), 1.0)
    assert one_round["site"]["best"]["variant"] == "cap=350W"  # by joules; that its loss is the baseline's nobody knows
    assert any("that the loss of cap=350W, precision=fp8 is the baseline's: unknown" in text for text in one_round["site"]["assumes"])
    unlimited = power.outcome(all_of, {}, Watts(), site(), None)
    assert unlimited["no_site"] == "no limit is given: --megawatts M, or the site's power.cap_watts"
    assert "feeds no accelerator" in power.outcome(all_of, {}, Watts(), site(), 1e-5)["no_site"]
    json.dumps(found)


def test_without_a_meter_it_says_what_is_missing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sys").mkdir()
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "power", str(tiny), "--set", f"power.sysfs={tmp_path / 'sys'}", "--csv", "power.csv"])
    said = capsys.readouterr().err
    assert (ended.value.code, len(said.splitlines()) < 24) == (10, True)
    assert "no meter counts here" in said
    assert "read rights on" in said
    assert "`python benchmarks/step.py` tells the speed alone" in said
    for looked_for in ("no meter of processors: ", "no node meter by pm_counters: ", "no node meter by Redfish: "):
        assert any(line.strip().startswith(looked_for) for line in said.splitlines()), said  # a line each, to be read one by one
    assert "looks" not in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_the_whole_command_with_a_tree_of_meters(tiny, tmp_path, monkeypatch, capsys):
    """Real runs of the tiny recipe, 25 s each: the loop's own windows are of 10 s and more."""
    monkeypatch.chdir(tmp_path)
    with Tree(tmp_path / "sys") as tree:
        words = ["--sweep", "kernels", "--quick", "--megawatts", "0.0102", "--csv", "power.csv", "--plots", "pictures", "--json"]
        cli.main(["bench", "power", str(tiny), "--set", f"power.sysfs={tree.root}", *words])
    out, said = capsys.readouterr()
    found = json.loads(out)
    assert [one["variant"] for one in found["rows"]] == ["baseline", "control", "kernels=reference"]
    for one in found["rows"]:
        assert one["status"] == "ok", one
        assert math.isclose(one["watts_device"], 150, rel_tol=0.03)
        assert math.isclose(one["watts_facility"], 400, rel_tol=0.03)
        assert math.isclose(one["tokens_per_joule_node"], one["tokens_per_s"] / one["watts_node"])
        assert one["window_s"] >= 10
        assert one["peak_mib"] > 100
        assert one["loss_neutral"] is None  # one round: two numbers are no spread
    assert found["refused"] == {"kernels=auto": "the same plan as baseline"}
    assert found["boundary"] == "facility"
    assert found["site"]["best"]["accelerators"] == 25  # of 25.5
    assert "round 1 of 1, baseline" in said
    held = report.load(tmp_path / "power.csv", verdict.COLUMNS, verdict.NUMBERS)
    assert [one["round"] for one in held if one["status"] == "ok"] == [
        "1",
        "1",
        "1",
        "all",
        "all",
        "all",
    ]  # a busy machine makes a round again
    assert (tmp_path / "pictures" / "power.png").stat().st_size > 10_000
    runs = sorted(path.name for path in (tmp_path / found["runs"]).iterdir() if path.is_dir())
    assert runs[:4] == ["001-baseline-pilot", "002-baseline-1", "003-control-1", "004-kernels=reference-1"]
    assert not list((tmp_path / found["runs"]).glob("*/checkpoints"))
