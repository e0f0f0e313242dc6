"""Three scalars are recovered from the folders of runs on machines that differ by them, and nothing is made of what tells nothing."""

import json
from dataclasses import replace

import pytest

from gigatrain import load
from gigatrain.errors import PlanError, RunError
from gigatrain.planning import calibrate, expect
from gigatrain.planning.estimate import estimate, operations, rows
from gigatrain.planning.plan import plan

TRUE = {"compute": 1.12, "communication": 1.5, "launch": 0.7}
MODEL = tuple(
    f"model.architecture.{name}={value}"
    for name, value in {
        "hidden": 4096,
        "layers": 8,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "intermediate": 14336,
        "vocab": 32768,
    }.items()
)
LAYOUTS = {  # ranks and settings of runs that tell the scalars apart
    "alone": (1, ("train.batch=64", "train.microbatch=4", "train.sequence=4096")),
    "small": (
        1,
        ("train.batch=64", "train.microbatch=1", "train.sequence=128", "model.architecture.layers=4", "model.architecture.hidden=512"),
    ),
    "tensor": (8, ("mesh.tensor=8", "train.batch=64", "train.microbatch=4", "train.sequence=2048")),
    "nodes": (64, ("train.batch=64", "train.microbatch=1", "train.sequence=1024")),
}


def folder(path, site, ranks, settings, scalars, windows=8, name="quickstart"):
    """A run folder as a run on machines that differ by `scalars` leaves it."""
    planned = plan(load.recipe(name, (*MODEL, *settings)), load.site(site), ranks)
    path.mkdir()
    (path / "plan.json").write_text(planned.text())
    if scalars is not None:
        workload, cluster = expect.workload_of(planned), expect.cluster_of(load.site(site), ranks)
        seen = calibrate.Observed("", workload, cluster, operations.works(workload), 1.0, 0)
        step_s = seen.estimated_s(calibrate.scaled(scalars))
    else:
        step_s = 1.0
    rows = [
        {"step": 10 * i, "loss": 1.0, "tokens": 10 * i, "step_s": step_s * (3.0 if i < 2 else 1.0 + 0.002 * (i % 3 - 1))}
        for i in range(windows)
    ]
    rows.insert(4, {"step": 40, "val_loss": 1.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    where = tmp_path_factory.mktemp("runs")
    return [folder(where / name, "dgx-h100", ranks, settings, TRUE) for name, (ranks, settings) in LAYOUTS.items()]


def test_the_scalars_of_a_cluster_are_recovered(runs, tmp_path):
    found = calibrate.calibrate(runs)
    for name, value in TRUE.items():
        assert found.scalars[name] == pytest.approx(value, rel=0.06), str(found)
    assert all(abs(told.after_s / told.measured_s - 1) < 0.02 for told in found.runs)
    assert max(abs(told.before_s / told.measured_s - 1) for told in found.runs) > 0.05
    path = tmp_path / "cluster.json"
    calibrate.write(found, path)
    assert calibrate.read(path) == found
    constants = calibrate.constants_of(calibrate.read(path), "h100")
    assert calibrate.applied(path, load.site("dgx-h100")) == constants != calibrate.applied(None, load.site("dgx-h100"))
    assert calibrate.observed(runs[3]).estimated_s(constants) == pytest.approx(found.runs[3].after_s, rel=1e-3)
    assert "communication" in str(found)
    with pytest.raises(PlanError, match="calibrate by runs on h200"):
        calibrate.constants_of(found, "h200")


def test_one_run_moves_only_what_it_can_tell(runs):
    found = calibrate.calibrate(runs[:1])
    assert found.communication == 1.0  # it sent nothing


def test_scaling_moves_rates_down_and_seconds_up():
    moved = calibrate.scaled(TRUE)
    before = calibrate.VALUES
    assert moved["gemm.sm_90.bf16.peak_share"] == pytest.approx(before["gemm.sm_90.bf16.peak_share"] / 1.12)
    assert moved["link.nvlink4.latency_s"] == pytest.approx(before["link.nvlink4.latency_s"] * 1.5)
    assert moved["stack.megatron.launch_s"] == pytest.approx(before["stack.megatron.launch_s"] * 0.7)
    assert moved["slowdown.tensor"] == before["slowdown.tensor"]
    with pytest.raises(PlanError, match="luck"):
        calibrate.scaled({"luck": 2.0})


def test_what_cannot_calibrate_is_refused_by_name(tmp_path, runs):
    with pytest.raises(RunError, match=r"no plan\.json"):
        calibrate.calibrate([tmp_path])
    with pytest.raises(RunError, match="name folders"):
        calibrate.calibrate([])
    with pytest.raises(RunError, match="2 windows behind"):
        calibrate.calibrate([folder(tmp_path / "short", "dgx-h100", 1, (), TRUE, windows=4)])
    with pytest.raises(PlanError, match="laptop"):
        calibrate.calibrate([folder(tmp_path / "cpu", "laptop", 1, (), None)])
    with pytest.raises(PlanError, match="a100 and h100"):
        calibrate.calibrate([runs[0], folder(tmp_path / "other", "jean-zay-a100", 1, (), TRUE)])
    with pytest.raises(PlanError, match="nowhere"):
        calibrate.read(tmp_path / "nowhere.json")
    (tmp_path / "torn.json").write_text('{"format": 1}')
    with pytest.raises(PlanError, match="chip"):
        calibrate.read(tmp_path / "torn.json")
    told = {"run": "a", "windows": 9, "measured_s": 1.0, "before_s": 1.0, "after_s": 1.0}
    good = {"format": 1, "chip": "h100", "compute": 1.1, "communication": 1.0, "launch": 1.0, "runs": [told]}
    for change, named in (
        ({"compute": -5.0}, "compute"),
        ({"launch": 1e308}, "launch"),
        ({"communication": 3.5}, "communication"),
        ({"runs": []}, "runs"),
    ):
        (tmp_path / "odd.json").write_text(json.dumps(good | change))
        with pytest.raises(PlanError, match=named):
            calibrate.read(tmp_path / "odd.json")


def test_every_rate_of_links_networks_and_attention_moves_with_its_scalar():
    slow, before = calibrate.scaled({"compute": 2.0, "communication": 2.0}), calibrate.VALUES
    moved = {name for name in before if slow[name] != before[name]}
    for name, value in before.items():
        if name.startswith(("link.", "net.")) and not name.endswith("half_bytes") and value:
            assert name in moved, name
    assert {"attention.sm_100.flash4", "attention.sm_90.fused", "attention.gfx942.fused"} <= moved
    assert not moved & {"attention.backward_share", "attention.ramp", "grouped.sm_90.of_gemm", "gemm.sm_90.depth", "slowdown.expert"}


@pytest.mark.parametrize(
    "change",
    [
        {"tp": 8, "dp": 8, "micro_batch": 2},  # reduces in NVLink's switches
        {"cp": 8, "dp": 8, "micro_batch": 1},
        {"pp": 4, "dp": 16, "micro_batch": 1},
        {"dp": 64, "zero_stage": 3, "micro_batch": 1},
        {"ep": 64, "dp": 64, "micro_batch": 1, "moe_experts": 64, "moe_topk": 8, "moe_ffn": 1408},
    ],
    ids=str,
)
def test_transfers_that_nothing_hides_take_longer_by_the_scalar(change):
    row = {
        "gpu": "H100-SXM-80GB", "n_gpus": 64, "framework": "Megatron-LM", "precision": "bf16", "layers": 8, "hidden": 4096, "heads": 32, "kv_heads": 32,
        "ffn": 14336, "glu": True, "vocab": 32000, "seq_len": 8192, "global_batch": 64, "seq_parallel": False,
    }  # fmt: skip
    case = rows.parse(row | change)
    open_ = replace(case.workload, overlap=(("all", False),))
    works = operations.works(open_)
    before, slow = (
        estimate.timed(works, open_, case.cluster, constants).phases
        for constants in (calibrate.VALUES, calibrate.scaled({"communication": 2.0}))
    )
    exposed = {name: seconds for name, seconds in before.items() if name.startswith("exposed_") and seconds > 1e-3}
    assert exposed
    for name, seconds in exposed.items():
        assert slow[name] > 1.5 * seconds, name
