"""The kernel benchmark: rows, arithmetic, resuming, and failures that stay visible. Operations are small and really timed; no duration is asserted."""

import functools
import io
import json
import math
import os
import time

import pytest
import torch
from rich.console import Console

from gigatrain import cli
from gigatrain.bench import kernels, measure, peers, report
from gigatrain.bench.kernels import Bench
from gigatrain.bench.measure import Cpu
from gigatrain.bench.report import OK
from gigatrain.errors import KernelError, RunError
from gigatrain.kernels import launch, ops

FAST = kernels.Settings("test", rounds=3, slice_s=1e-4, limit_s=0.02, call_s=10.0, sizes=2, compiled=False, total_s=60.0)


def plain(x, w):
    return (x * w).relu()


def copied(x, w):
    return torch.nn.functional.relu(w * x)


def off(x, w):
    return plain(x, w) * 1.5


def coarse(x, w):
    return plain(x, w) * (1 + 5e-7)


def refuses(x, w):
    raise KernelError("needs a GPU of another make")


def breaks(x, w):
    raise ZeroDivisionError("in somebody's kernel\nmore of it")


def full(x, w):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")


def made(differentiable=True, **versions):
    """An operation of 64 channels; 8 bytes per element forward, 12 backward."""

    def sample(case, device):
        rows, dtype = case
        return [torch.randn(rows, 64, dtype=dtype, device=device), torch.randn(64, dtype=dtype, device=device)], lambda f, *xs: f(*xs)

    def traffic(case):
        return launch.Traffic(8.0 * case[0] * 64, 12.0 * case[0] * 64)

    cases = [(rows, dtype) for dtype in (torch.float32, torch.bfloat16) for rows in (3, 4)]
    return launch.Operation(
        {"reference": plain, **versions}, cases, [(256, torch.float32), (512, torch.float32)], sample, traffic, differentiable
    )


@pytest.fixture
def operations(monkeypatch):
    """Puts operations in place of all others."""

    def put(**found):
        for name in list(ops.OPERATIONS):
            monkeypatch.delitem(ops.OPERATIONS, name)
        for name, operation in found.items():
            monkeypatch.setitem(ops.OPERATIONS, name, operation)
        monkeypatch.setattr(Cpu, "cache_bytes", 1 << 16, raising=False)
        monkeypatch.setattr(measure, "_last_cache_bytes", lambda: 1 << 16)
        monkeypatch.setattr(measure, "ceilings", lambda on: (2e10, 1e11))

    return put


@pytest.fixture
def adapters(monkeypatch):
    def put(*found):
        monkeypatch.setattr(peers, "ADAPTERS", found)

    return put


def rows_of(op, chosen=("torch",), settings=FAST, done=(), budget_s=60.0):
    bench = Bench(Cpu(), settings, lambda *_: None)
    return [row for rows in bench.operation(op, chosen, {}, done, budget_s) for row in rows]


def by_provider(rows, mode):
    return {row["provider"]: row for row in rows if row["mode"] == mode}


def test_everybody_has_rows_of_every_mode_and_nobody_who_fails_is_left_out(operations, adapters):
    operations(relu=made(copied=copied, off=off, refuses=refuses))
    adapters(
        peers.Adapter("liger", "relu", lambda: copied, "a note"),
        peers.Adapter("quack", "relu", lambda: breaks, gpu=False),
        peers.Adapter("native", "relu", lambda: full, gpu=False),
        peers.Adapter("products", "relu", lambda: lambda x, w: x + 1, gpu=False, checked=False),
    )
    settings = kernels.replace(FAST, sizes=1)
    rows = rows_of("relu", peers.PEERS, settings)
    assert all(set(row) <= set(report.COLUMNS) for row in rows)
    for mode in kernels.MODES:
        found = by_provider(rows, mode)
        assert set(found) == {"gigatrain copied", "torch", "products"}
        for row in found.values():
            assert row["status"] == OK
            assert 0 < row["us_p20"] <= row["us"] <= row["us_p80"]
            assert (row["timed_by"], row["rounds"], row["size"], row["cut_from"]) == ("perf_counter", 3, "256 float32", None)
            assert row["first_call_s"] > 0
        assert found["torch"]["ratio_to_torch"] == 1
        assert found["gigatrain copied"]["error_ratio"] <= 1.01
        assert found["products"]["error"] is None
    assert by_provider(rows, "forward")["torch"]["peak_mib"] >= 256 * 64 * 4 / 2**20
    failed = {row["provider"]: row["status"] for row in rows if row["mode"] == ""}
    assert failed.pop("gigatrain off").startswith("wrong result: relative error 0.5, ")
    assert failed == {
        "gigatrain refuses": "refuses: needs a GPU of another make",
        "liger": "awaits a GPU",
        "quack": "ZeroDivisionError: in somebody's kernel",
        "native": "out of memory",
    }
    cases = by_provider(rows, "cases")
    assert cases["gigatrain copied"]["size"] == "4 of 4 cases"
    assert cases["gigatrain off"]["status"].startswith("wrong result")
    assert cases["gigatrain refuses"]["status"] == "refuses: needs a GPU of another make"
    with pytest.raises(KernelError, match=r"^2 of ours failed: relu gigatrain off: wrong result") as caught:
        kernels.verdict(rows)
    assert "refuses" not in str(caught.value)


def test_who_is_coarse_but_right_is_timed_with_its_ratio_and_ours_may_not_be(operations):
    operations(relu=made(coarse=coarse))
    rows = rows_of("relu", settings=kernels.replace(FAST, sizes=1))
    row = by_provider(rows, "full")["gigatrain coarse"]
    assert row["status"] == OK
    assert 2 < row["error_ratio"] < 30
    assert by_provider(rows, "cases")["gigatrain coarse"]["status"].startswith("wrong result")


def test_the_percentage_is_the_floor_over_the_time(operations):
    operations(relu=made())
    for row in rows_of("relu", done=["cases"]):
        count = int(row["size"].split()[0])
        moved = count * 64 * {"forward": 8, "backward": 12, "full": 20}[row["mode"]]
        assert (row["bytes"], row["flops"], row["bound"]) == (moved, 0, "bytes")
        assert row["floor_us"] == pytest.approx(moved / 2e10 * 1e6)
        assert row["pct"] == pytest.approx(100 * row["floor_us"] / row["us"])
        assert row["gb_s"] == pytest.approx(moved / row["us"] / 1e3)
        assert (row["ceiling_gb_s"], row["ceiling_tflop_s"]) == (20, 0.1)


def test_an_operation_of_products_is_judged_by_the_product():
    bench = Bench(Cpu(), FAST, lambda *_: None)
    bench.ceilings = (4e12, 8e14)
    row = bench.figures(launch.Traffic(1e6, 2e6, 4e12, 8e12), "full", 0.03)
    assert (row["bound"], row["floor_us"], row["pct"], row["tflop_s"]) == ("flops", 15000, 50, 400)
    assert set(bench.figures(launch.Traffic(), "full", 0.03)) == {"ceiling_gb_s", "ceiling_tflop_s"}


def test_an_operation_in_place_is_timed_forward_only_and_compared_by_what_it_moved(operations):
    def moved(x, w):
        x.mul_(w).relu_()

    def moved_wrongly(x, w):
        x.mul_(w)

    def moved_alike(x, w):
        x.copy_(plain(x, w))

    operation = made(differentiable=False, same=moved_alike, wrong=moved_wrongly)
    operations(step=kernels.replace(operation, versions={**operation.versions, "reference": moved}))
    rows = [row for row in rows_of("step") if row["mode"] != "cases"]
    assert {row["mode"] for row in rows if row["status"] == OK} == {"forward"}
    assert {row["provider"] for row in rows if row["status"] == OK} == {"torch", "gigatrain same"}
    assert {row["provider"] for row in rows if row["status"] != OK} == {"gigatrain wrong"}


def test_a_wrong_number_is_found_beside_tensors_that_are_right(operations):
    """A norm's one number is too few for a ratio, and the gradients that it leaves alone are right."""

    def summed(x, w):
        return x.square().sum().sqrt()

    def summed_wrongly(x, w):
        return x.square().sum()

    operation = made(differentiable=False, same=lambda x, w: torch.linalg.vector_norm(x), wrong=summed_wrongly)
    operations(norm=kernels.replace(operation, versions={**operation.versions, "reference": summed}))
    rows = rows_of("norm", done=["cases"])
    assert {row["provider"] for row in rows if row["status"] == OK} == {"torch", "gigatrain same"}
    assert {row["status"][:21] for row in rows if row["status"] != OK} == {"wrong result: off by "}


def test_a_peer_that_writes_over_its_inputs_spoils_nobody_elses(operations, adapters):
    seen = {}

    def rude(x, w):
        y = plain(x.clone(), w)
        x.data.zero_()
        return y

    def watched(x, w):
        seen["x"] = float(x.detach().abs().sum())
        return plain(x, w)

    operations(relu=made(watched=watched))
    adapters(peers.Adapter("liger", "relu", lambda: rude, gpu=False, overwrites=True))
    rows = rows_of("relu", ("torch", "liger"), kernels.replace(FAST, sizes=1), ["cases"])
    assert {row["status"] for row in rows} == {OK}
    assert {row["provider"] for row in rows} == {"torch", "liger", "gigatrain watched"}
    assert seen["x"] > 0


def test_its_data_is_random_again_before_every_slice(operations):
    operations(relu=made())

    def rude(x, w):
        y = plain(x, w)
        x.data.zero_()
        return y

    on, operation = Cpu(), ops.OPERATIONS["relu"]
    tensors, call = operation.sample(operation.sizes[0], "cpu")
    provider = kernels.Provider("liger", lambda: rude, overwrites=True, function=rude)
    shared = [measure.leaves(tensors, True)]
    for mode in kernels.MODES:
        runner = kernels.Runner(on, FAST, mode, provider, tensors, call, shared, {})
        runner.timed(False)
        (x, source), *_ = runner.fresh
        assert x.data_ptr() != shared[0][0].data_ptr()
        assert mode == "backward" or not x.any()
        runner.refresh()
        assert torch.equal(x, source)
        assert torch.equal(shared[0][0], tensors[0])


@pytest.mark.long
def test_a_failure_in_the_midst_of_the_rounds_is_a_row(operations):
    calls = []

    def tires(x, w):
        calls.append(1)
        if len(calls) > 60:
            raise RuntimeError("tired")
        return plain(x, w)

    operations(relu=made(tires=tires))
    settings = kernels.replace(FAST, rounds=200, limit_s=10.0)
    rows = [row for row in rows_of("relu", settings=settings, done=["cases"]) if row["provider"] == "gigatrain tires"]
    assert {row["status"] for row in rows} >= {"RuntimeError: tired"}
    assert all(row.get("us") is None for row in rows if row["status"] != OK)


def test_sizes_for_which_there_was_no_time_are_rows_that_say_so(operations):
    operations(relu=made())
    rows = rows_of("relu", budget_s=-1.0)
    assert [(row["size"], row["status"]) for row in rows] == [
        (size, "not measured: the -1 s of relu were over") for size in ("256 float32", "512 float32")
    ]


def test_a_size_is_cut_on_a_cpu_until_plain_torch_is_quick(operations):
    slow = made()
    operations(relu=slow)
    bench = Bench(Cpu(), kernels.replace(FAST, call_s=1e-7), lambda *_: None)
    bench.ceilings = (2e10, 1e11)
    assert bench.fitted(slow, (512, torch.float32)) is None
    rows = bench.size("relu", (512, torch.float32), kernels.providers("relu", ("torch",), False))
    assert [row["status"] for row in rows] == ["not measured: too much for this CPU, however the size is cut"]
    bench.settings = FAST
    assert bench.fitted(slow, (512, torch.float32)) == (512, torch.float32)


def test_the_count_is_cut_first_and_then_the_largest_number():
    case, seen = (256, (4096,), 3000, 8, "llama", True, torch.bfloat16), []
    while case is not None:
        seen.append(case[:4])
        case = kernels.smaller(case)
    assert seen[:4] == [(256, (4096,), 3000, 8), (128, (4096,), 3000, 8), (64, (4096,), 3000, 8), (64, (4096,), 1500, 8)]
    assert seen[-1] == (1, (4096,), 46, 8)
    assert kernels.smaller((1, 64, torch.float32)) is None


def test_a_case_in_words():
    assert kernels.label((8192, (7, 33), "llama", 1.0, None, torch.bfloat16)) == "8192 7x33 llama 1.0 None bfloat16"


def test_every_operation_is_picked_up_with_all_its_versions():
    for op, operation in ops.OPERATIONS.items():
        found = {provider.name for provider in kernels.providers(op, ("torch", "compile"), True)}
        assert found == {"torch", "compile", *(f"gigatrain {name}" for name in operation.versions if name != "reference")}
    assert {provider.name for provider in kernels.providers("rms_norm", ("liger",), True)} >= {"liger", "gigatrain fused"}
    assert "torch" not in {provider.name for provider in kernels.providers("rms_norm", ("liger",), True)}


def test_the_compiled_reference_is_timed_and_its_compilation_is_not(operations, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # inductor takes a quarter of a minute
    operations(relu=made())
    rows = rows_of("relu", ("torch", "compile"), kernels.replace(FAST, sizes=1, compiled=True), ["cases"])
    found = by_provider(rows, "full")["compile"]
    assert found["status"] == OK
    assert found["first_call_s"] * 1e6 > found["us"]
    assert found["error_ratio"] <= 2


# ---- Processes and the file ----


def timed(path, names=("relu",), chosen=("torch",), **options):
    """(rows, what was said)."""
    said = []
    rows = kernels.timings(
        list(names),
        list(chosen),
        path,
        settings=options.pop("settings", kernels.replace(FAST, sizes=1)),
        fresh=options.pop("fresh", False),
        say=said.append,
        show=lambda *_: None,
        start="fork",  # so that the operations of the test are those of the worker
        **options,
    )
    return rows, said


@pytest.mark.long
def test_a_run_goes_on_where_it_was(operations, tmp_path):
    path = tmp_path / "kernels.csv"
    operations(one=made(), two=made())
    first, _ = timed(path, ["one"])
    held = report.load(path)
    assert len(held) == len(first) == 3
    assert {row["commit"] for row in held} == {report.commit()}
    assert held[0]["us"] == pytest.approx(first[0]["us"], rel=1e-4)
    rows, said = timed(path, ["one", "two"])
    assert "one: 3 rows are there already (--fresh measures again)" in said
    assert [row["op"] for row in rows] == ["one"] * 3 + ["two"] * 3
    assert len(report.load(path)) == 6
    timed(path, ["one"], fresh=True)
    assert len(report.load(path)) == 9
    timed(path, ["one"], settings=kernels.replace(FAST, name="longer"))  # another run; and with it a size more
    assert len(report.load(path)) == 9 + 6


@pytest.mark.long
def test_a_size_that_had_no_time_is_measured_by_the_next_run(operations, tmp_path, monkeypatch):
    path = tmp_path / "kernels.csv"
    operations(one=made())
    timed(path, ["one"], settings=FAST)
    lines = path.read_text().splitlines(keepends=True)
    late = {**report.load(path)[3], "status": "not measured: the 3 s of one were over", "us": None, "mode": ""}
    path.write_text("".join(lines[:4]))
    report.append(path, [late])
    before = report.load(path)
    rows, said = timed(path, ["one"], settings=FAST)
    assert [row["size"] for row in report.load(path)[len(before) :]] == ["512 float32"] * 3
    assert {row["status"] for row in rows} == {OK}
    assert not any("there already" in text for text in said)


@pytest.mark.long
def test_a_peer_that_was_not_in_the_rounds_makes_the_operation_new(operations, adapters, tmp_path):
    path = tmp_path / "kernels.csv"
    operations(relu=made())
    adapters(peers.Adapter("liger", "relu", lambda: copied, gpu=False))
    timed(path)
    rows, _ = timed(path, chosen=("torch", "liger"))
    assert len(rows) == 6
    rows, said = timed(path)  # fewer are there already
    assert len(report.load(path)) == 9
    assert any("there already" in text for text in said)
    assert rows


@pytest.mark.long
def test_a_run_that_was_killed_leaves_whole_rows_and_the_next_one_mends_the_file(operations, tmp_path):
    path = tmp_path / "kernels.csv"
    operations(one=made(), two=made())
    timed(path, ["one"])
    whole = path.read_bytes()
    path.write_bytes(whole + b"abc,2026-01-01,half a li")
    assert len(report.load(path)) == 3
    timed(path, ["one", "two"])
    assert path.read_bytes().startswith(whole)
    assert len(report.load(path)) == 6
    assert "half a li" not in path.read_text()


def test_a_file_with_other_columns_is_refused_before_anything_is_measured(operations, tmp_path):
    path = tmp_path / "kernels.csv"
    path.write_text("commit,price\n1,2\n")
    operations(one=made())
    with pytest.raises(RunError, match=r"has other columns \(.*price.*\); move it away, or name another --csv"):
        timed(path, ["one"])


def ends_the_process(x, w):
    os._exit(9)


def hangs(x, w):
    time.sleep(600)


def test_a_peer_that_ends_its_process_costs_its_own_row_only(operations, adapters, tmp_path):
    operations(relu=made())
    adapters(peers.Adapter("liger", "relu", lambda: ends_the_process, gpu=False))
    rows, said = timed(tmp_path / "kernels.csv", chosen=("torch", "liger"))
    assert by_provider(rows, "full").keys() == {"torch"}
    (row,) = [row for row in rows if row["provider"] == "liger"]
    assert row["status"] == "its process ended with code 9 during relu 256 float32"
    assert any("its process ended with code 9" in text for text in said)


@pytest.mark.long
def test_a_peer_that_hangs_is_killed_and_costs_its_own_row_only(operations, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "SILENCE_S", 12.0)  # a busy machine starts a process in 5 s
    operations(relu=made())
    adapters(peers.Adapter("liger", "relu", lambda: hangs, gpu=False))
    rows, _ = timed(tmp_path / "kernels.csv", chosen=("torch", "liger"))
    assert by_provider(rows, "full").keys() == {"torch"}
    (row,) = [row for row in rows if row["provider"] == "liger"]
    assert row["status"] == "it hung and was killed during relu 256 float32"


@pytest.mark.long
def test_a_device_that_breaks_costs_the_peer_that_broke_it(operations, adapters, tmp_path, monkeypatch):
    sound = []
    monkeypatch.setattr(Cpu, "sound", lambda self: not sound)

    def illegal(x, w):
        sound.append(False)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    operations(relu=made())
    adapters(peers.Adapter("liger", "relu", lambda: illegal, gpu=False))
    rows, _ = timed(tmp_path / "kernels.csv", chosen=("torch", "liger"))
    assert by_provider(rows, "full").keys() == {"torch"}
    (row,) = [row for row in rows if row["provider"] == "liger"]
    assert row["status"] == "it broke the device: RuntimeError: CUDA error: an illegal memory access was encountered"


@pytest.mark.long
def test_an_operation_whose_own_sample_fails_is_a_row_and_the_others_go_on(operations, tmp_path):
    def broken(case, device):
        raise ValueError("no such case")

    operations(one=kernels.replace(made(), sample=broken), two=made())
    rows, _ = timed(tmp_path / "kernels.csv", ["one", "two"])
    assert {row["status"] for row in rows if row["op"] == "one"} == {"ValueError: no such case"}
    assert {row["status"] for row in rows if row["op"] == "two"} == {OK}


# ---- Tables and pictures ----


def shown(op, rows):
    console = Console(width=240, record=True, file=io.StringIO())
    report.table(op, [dict.fromkeys(report.COLUMNS) | row for row in rows], console)
    return console.export_text()


@pytest.mark.long
def test_the_table_shows_losers_reasons_and_what_awaits_a_gpu(operations, adapters):
    operations(relu=made(copied=copied, refuses=refuses, fused=copied))
    adapters(peers.Adapter("liger", "relu", lambda: copied), peers.Adapter("quack", "relu", lambda: breaks, gpu=False))
    rows = rows_of("relu", peers.PEERS, kernels.replace(FAST, sizes=1))
    for row in rows:
        row["device"] = "a machine"
    text = shown("relu", rows)
    assert "relu on a machine: copy 20 GB/s, product 0.1 TFLOP/s" in text
    assert text.count("gigatrain copied") == len(kernels.MODES) + 1
    assert "relu gigatrain refuses: refuses: needs a GPU of another make" in text
    assert "relu quack: ZeroDivisionError: in somebody's kernel" in text
    assert "relu gigatrain copied: 4 of 4 cases, at most " in text
    sentence = kernels.awaiting(rows)
    assert sentence
    assert "There is no GPU here, so fused kernels were not measured" in sentence
    assert sentence.endswith("liger (relu)")
    assert kernels.awaiting([row for row in rows if row["status"] == OK]) is None
    kernels.verdict([row for row in rows if row["provider"] != "gigatrain refuses"])


def test_a_fused_kernel_that_refuses_what_is_trained_with_is_an_error(operations):
    with pytest.raises(KernelError, match="1 of ours failed: relu gigatrain fused: refuses: too wide"):
        kernels.verdict([{"op": "relu", "provider": "gigatrain fused", "status": "refuses: too wide"}])


@pytest.mark.long
def test_pictures_come_from_the_file_alone(operations, adapters, tmp_path):
    path = tmp_path / "kernels.csv"
    operations(one=made(copied=copied))
    adapters(peers.Adapter("liger", "one", lambda: copied))
    timed(path, ["one"], ("torch", "liger"), settings=FAST)
    for row in (rows := report.load(path)):
        row["device"], row["timed_by"] = "NVIDIA H200 (fake)", "events"
    report.append(path, rows)
    found = report.plots(path, tmp_path / "pictures")
    assert len(found) == 2
    assert found[1].name == "one-nvidia-h200-fake.png"
    for picture in found:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 10_000


def test_pictures_of_nothing_and_without_matplotlib_are_refused(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="has no timings to draw; make some: gigatrain bench kernels --csv"):
        report.plots(tmp_path / "none.csv", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(RunError, match=r"pictures need matplotlib: pip install 'gigatrain\[bench\]'"):
        report.plots(tmp_path / "none.csv", tmp_path)


def test_a_number_survives_the_file(tmp_path):
    path = tmp_path / "rows.csv"
    row = dict.fromkeys(report.COLUMNS) | {
        "op": "x",
        "us": 1234.56789,
        "sets": 3,
        "bound": "bytes",
        "status": 'a, "quoted" reason',
        "pct": math.nan,
    }
    report.append(path, [row])
    (found,) = report.load(path)
    assert (found["us"], found["sets"], found["bound"], found["status"], found["note"]) == (1234.57, 3.0, "bytes", row["status"], None)
    assert math.isnan(found["pct"])
    report.append(path, [])
    assert len(report.load(path)) == 1


def test_a_commit_that_is_not_as_committed_has_a_hash_of_what_is_measured(tmp_path, monkeypatch):
    package = tmp_path / "gigatrain"
    for name in ("kernels", "bench"):
        (package / name).mkdir(parents=True)
    source = package / "kernels" / "one.py"
    source.write_text("x = 1\n")
    monkeypatch.setattr(report, "PACKAGE", package)
    first = report.commit()
    assert first.startswith("none+")
    source.write_text("x = 2\n")
    assert report.commit() != first
    source.write_text("x = 1\n")
    assert report.commit() == first


# ---- The command ----


def refused(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "kernels", *map(str, words)])
    return ended.value.code, capsys.readouterr().err


@pytest.mark.long
def test_the_command_measures_in_a_process_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "QUICK", kernels.replace(kernels.QUICK, rounds=3, call_s=0.002, limit_s=0.05))
    path = tmp_path / "kernels.csv"
    cli.main(["bench", "kernels", "--quick", "--op", "relu2", "--peers", "torch,liger", "--csv", str(path), "--json"])
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert "rows go to" in err
    assert {row["provider"] for row in rows} == {"torch", "liger", "gigatrain fused"}
    assert {row["status"] for row in rows if row["provider"] == "torch"} == {OK}
    assert {row["mode"] for row in rows if row["us"] is not None} == set(kernels.MODES)
    assert len(report.load(path)) == len(rows)


def test_the_check_covers_fused_kernels_where_they_run(capsys):
    cli.main(["bench", "kernels", "--check", "--op", "relu2", "--json"])  # interpreted
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["provider"], row["mode"], row["status"]) == ("gigatrain fused", "cases", OK)
    assert row["error_ratio"] <= kernels.ALLOWED


def test_what_the_command_cannot_do_is_one_line(capsys, tmp_path):
    code, said = refused(capsys, "--op", "layer_norm")
    assert (code, len(said.splitlines())) == (7, 1)
    assert "no operation is called layer_norm; there are " in said
    assert "no peer is called ligre; there are torch, compile, native, liger," in refused(capsys, "--peers", "ligre")[1]
    code, said = refused(capsys, "--tune")
    assert (code, "there is no GPU here" in said) == (8, True)
    assert "has no timings to draw" in refused(capsys, "--plots", tmp_path, "--csv", tmp_path / "none.csv")[1]


def test_compiled_resources_go_where_the_checkout_keeps_them(monkeypatch, tmp_path):
    from gigatrain.kernels import compiled

    called = []
    monkeypatch.setattr(compiled, "main", called.append)
    cli.main(["bench", "kernels", "--compile"])
    cli.main(["bench", "kernels", "--compile", "--op", "relu2", "--csv", str(tmp_path / "new" / "c.csv")])
    cli.main(["bench", "kernels", "--compile", "--op", "relu2", "--op", "rope"])  # a part does not go over the whole
    assert called[0][:2] == ["--csv", str(report.PACKAGE.parent / "benchmarks" / "results" / "compiled.csv")]
    assert called[0][2::2] == ["--op"] * len(ops.OPERATIONS)
    assert called[1:] == [["--csv", str(tmp_path / "new" / "c.csv"), "--op", "relu2"], ["--op", "relu2", "--op", "rope"]]


@pytest.mark.parametrize("words", [["bench"], ["bench", "kernels"]])
def test_help_teaches(capsys, words):
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out) > 150
