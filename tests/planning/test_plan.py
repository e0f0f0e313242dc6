"""A plan is concrete arithmetic, the same bytes everywhere, and refuses what cannot work."""

import subprocess
import sys

import pytest

from gigatrain import load
from gigatrain.errors import PlanError
from gigatrain.planning.plan import Plan, plan


def made(*overrides, memory=None):
    site = load.site("laptop").model_copy(update={"memory_bytes": memory})
    return plan(load.recipe("quickstart", overrides), site)


def test_accumulation_and_tokens_are_arithmetic():
    found = made("train.batch=10", "train.microbatch=4", "train.sequence=128", "train.steps=30", "schedule.warmup=5")
    assert (found.accumulation, found.tokens_per_step, found.tokens) == (3, 1280, 38400)


def test_tokens_become_steps_rounded_up(tmp_path):
    text = load.recipes()["quickstart"].read_text()
    steps = next(line for line in text.splitlines() if line.startswith("steps = "))
    path = tmp_path / "r.toml"
    path.write_text(text.replace(steps, "tokens = 1_000_001"))
    found = plan(load.recipe(path, ["train.batch=10", "train.sequence=1000", "schedule.warmup=0"]), load.site("laptop"))
    assert found.steps == 101
    assert found.tokens == 1_010_000


def test_identity_is_stable_and_changes_with_any_value():
    first = made()
    assert first.sha256 == made().sha256
    assert first.sha256 == load.read_json(Plan, first.text(), "x", PlanError).sha256
    other = made("optim.lr=1e-9")
    assert other.sha256 != first.sha256
    assert first.differences(other) == [f"optim.lr: {first.optim.lr} -> 1e-09"]


def test_what_is_only_watched_or_kept_is_no_part_of_the_identity():
    first = made()
    for override in ("report.every=7", "report.trackers=[]", "checkpoint.keep=9", "sample.tokens=3", "data.folder=/x", "max_bad_steps"):
        other = made(override if "=" in override else "train.max_bad_steps=3")
        assert (other.identity == first.identity, other.sha256 == first.sha256) == (True, False), override
    for override in (
        "train.seed=1",
        "train.steps=7",
        "optim.lr=1e-3",
        "data.validation=0.1",
        "data.packing=document",
        "train.deterministic=true",
    ):
        assert made(override).identity != first.identity, override


def test_any_run_can_be_shortened():
    assert made("train.steps=1").steps == 1


def test_a_lean_layer_and_the_compiler_exclude_each_other():
    with pytest.raises(PlanError, match='train.recompute "lean" and train.compile exclude each other'):
        made("train.recompute=lean", "train.compile=true")


@pytest.mark.parametrize(
    ("overrides", "memory", "said"),
    [
        (["tokenizer.train.vocab=99999"], None, "tokenizer.train.vocab 99999 is above model.architecture.vocab"),
        (["model.architecture=llama-3.1-8b"], 16 << 30, "the run needs .* which has 16.00 GiB: weights 14.96 GiB"),
    ],
)
def test_what_cannot_work_is_refused_with_its_numbers(overrides, memory, said):
    with pytest.raises(PlanError, match=said):
        made(*overrides, memory=memory)


def test_exact_memory_is_that_of_the_engine():
    import torch

    from gigatrain.engines.native import Native
    from gigatrain.parallel.mesh import alone

    for precision, name in (("bf16", "muon"), ("fp32", "adamw"), ("bf16", "adamw")):
        found = made(f"train.precision={precision}", f"optim.name={name}", "model.architecture.layers=1", "model.architecture.hidden=96")
        engine = Native(found, alone(), torch.device("cpu"))
        model = engine.model
        size = {"weights": 0, "optimizer": 0}
        for parameter in model.parameters():
            size["weights"] += parameter.numel() * parameter.element_size()
        size["optimizer"] = sum(p.tensor.numel() * 4 for p in engine.state()["optimizer"].values() if p.tensor.ndim) - 4 * 4
        if precision == "bf16":
            size["optimizer"] += sum(p.tensor.numel() * 4 for p in engine.state()["weights"].values())
        assert found.memory.weights == size["weights"]
        tolerance = 2 * 4 * 96 * 10 if name == "muon" else 0  # norms have AdamW's moments too, counted as matrices
        assert abs(found.memory.optimizer - size["optimizer"]) <= tolerance
        del engine
        assert torch.isfinite(next(model.parameters())).all()


def test_planning_needs_no_torch():
    code = (
        "import sys; from gigatrain import load; from gigatrain.planning.plan import plan; "
        "plan(load.recipe('quickstart'), load.local_site()[0]); "
        "bad = {'torch', 'triton', 'transformers', 'deepspeed', 'datasets', 'numpy'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
