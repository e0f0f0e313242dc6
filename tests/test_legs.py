"""What a resume may change of a run: its meaning never, its numbers where it is told to, and each stretch under one plan is in its record."""

import json
import shutil
from typing import Any

import pytest
from rich.console import Console
from test_loop import planned, same_state, trained

from gigatrain import load, loop, run
from gigatrain.errors import CheckpointError, RunError
from gigatrain.observe.display import Display
from gigatrain.planning import legs

BF16 = ("train.precision=bf16", "kernels=reference")


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    """A whole run in bf16 with fp32 states."""
    folder = tmp_path_factory.mktemp("runs") / "begun"
    trained(tiny, folder, *BF16)
    return folder


@pytest.fixture
def at_nine(begun, tmp_path):
    """It, as it was at its checkpoint of step 9 of 12."""
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    return folder


def resumed(tiny, folder, *overrides, start: Any = "resume") -> Any:
    with open(folder / "said", "w") as file:
        summary = loop.train(planned(tiny, *overrides), folder, start=start, display=Display(Console(file=file, width=400)))
    return summary, (folder / "said").read_text()


def test_other_numbers_are_refused_with_the_way_and_taken_where_told(tiny, at_nine, begun):
    with pytest.raises(CheckpointError, match=r"1 value\(s\) differ:\n *optim.moments: fp32 -> bf16\n.*add --other-numbers"):
        resumed(tiny, at_nine, *BF16, "optim.moments=bf16")
    with pytest.raises(CheckpointError, match="started under another plan"):  # not even so
        resumed(tiny, at_nine, *BF16, "optim.lr=4e-3", start="other-numbers")
    summary, said = resumed(tiny, at_nine, *BF16, "optim.moments=bf16", start="other-numbers")
    assert "numbers will differ from an undisturbed run: optim.moments fp32 -> bf16" in said
    assert summary["steps"] == 12
    record = run.identity(at_nine)
    first, second = record["legs"]
    assert (first["step"], second["step"], second["changed"]) == (0, 9, ["optim.moments: fp32 -> bf16"])
    assert (first["identity"], second["identity"]) == (planned(tiny, *BF16).identity, record["identity"])
    assert run.stored_plan(at_nine).optim.moments == "bf16"
    kept = load.read_json(type(planned(tiny)), legs.kept(at_nine, 0).read_text(), "plan-0.json", RunError)
    assert (kept.sha256, kept.optim.moments) == (first["plan_sha256"], "fp32")
    undisturbed = json.loads((begun / "summary.json").read_text())
    assert summary["weights_sha256"] != undisturbed["weights_sha256"]
    assert summary["loss"] == pytest.approx(undisturbed["loss"], rel=5e-3)
    with pytest.raises(CheckpointError, match="optim.moments: bf16 -> fp32"):  # the leg's own numbers are what is strict now
        resumed(tiny, at_nine, *BF16)
    assert resumed(tiny, at_nine, *BF16, "optim.moments=bf16")[0] == summary


def test_other_kernels_are_said_and_recorded_without_a_flag(tiny, at_nine):
    _, said = resumed(tiny, at_nine, *BF16[:1], "train.recompute=full", "kernels.default=reference", "kernels.rms_norm=lean")
    assert "the same formulas, with other rounding errors than so far: recompute none -> full; kernels.rms_norm reference -> lean" in said
    assert run.identity(at_nine)["legs"][1]["changed"] == ["recompute: none -> full", "kernels.rms_norm: reference -> lean"]


def test_a_resume_under_the_same_plan_is_no_new_leg(tiny, at_nine, begun):
    resumed(tiny, at_nine, *BF16, "report.every=1", start="other-numbers")
    assert [leg["step"] for leg in run.identity(at_nine)["legs"]] == [0]
    same_state(at_nine, begun)
    assert not legs.kept(at_nine, 0).exists()


def test_a_kill_while_a_leg_is_written_leaves_a_plan_that_is_read(tiny, at_nine):
    """At every rename of `claim`: the folder is under the old plan or the new one."""
    before, after = planned(tiny, *BF16), planned(tiny, *BF16, "optim.moments=bf16")
    whole = {path.name: path.read_bytes() for path in at_nine.iterdir() if path.is_file()}
    write, seen = run.write_text, set()
    for fatal in range(1, 9):
        for path in at_nine.glob("plan*"):
            path.unlink()
        for name, data in whole.items():
            (at_nine / name).write_bytes(data)
        count = 0

        def killed(path, text, fatal=fatal):
            nonlocal count
            count += 1
            if count == fatal:
                raise KeyboardInterrupt
            write(path, text)

        run.write_text = killed
        try:
            run.claim(after, at_nine, run.Run("id", step=9, changes=legs.changes(before, after)))
        except KeyboardInterrupt:
            pass
        finally:
            run.write_text = write
        found, record = run.stored_plan(at_nine), run.identity(at_nine)
        assert found.identity == record["identity"]
        assert len(record["legs"]) == (1 if found.identity == before.identity else 2)
        seen.add(found.identity)
    assert count < 8  # every write was the fatal one once
    assert seen == {before.identity, after.identity}


def test_meaning_and_numbers_are_apart(tiny):
    first = planned(tiny)
    for override in (
        "optim.lr=1e-4",
        "train.seed=1",
        "train.batch=8",
        "train.dropout=0.1",
        "loss.z_loss=1e-4",
        "optim.name=muon",
        "data.validation=0.2",
    ):
        assert planned(tiny, override).meaning != first.meaning, override
    for override in ("train.precision=bf16", "optim.moments=int8", "kernels=reference", "train.deterministic=true", "train.recompute=full"):
        other = planned(tiny, override)
        assert (other.meaning == first.meaning, other.identity == first.identity) == (True, False), override
    narrow = (
        "adapter.rank=4",
        "adapter.quantise=nf4",
        "model.architecture.hidden=64",
        "model.architecture.intermediate=64",
        "model.architecture.head_dim=16",
    )
    first_narrow, other = planned(tiny, *narrow), planned(tiny, *narrow, "adapter.restore=bitsandbytes")
    assert (other.meaning == first_narrow.meaning, other.identity == first_narrow.identity) == (True, False)
    assert legs.changes(first_narrow, other).arithmetic == ("adapter.restore: torch -> bitsandbytes",)
    assert planned(tiny, *narrow, "adapter.alpha=3.0").meaning != first_narrow.meaning
    assert legs.changes(first, planned(tiny, "engine.name=deepspeed")).ways == ("engine.name: native -> deepspeed",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"meaning": None}, "whose folder this is, by .*meaning"),
        ({"corpus": 3}, "corpus is no name"),
        ({"legs": 3}, "no list"),
        ({"legs": ["a"]}, "no list of records"),
    ],
)
def test_a_record_that_no_run_writes_is_refused_by_name(begun, tmp_path, change, said):
    """By whoever reads it: what a resume, its checkpoints and another run's `optim.from` look up is there, or is said to be missing."""
    record = run.identity(begun)
    (tmp_path / "run.json").write_text(json.dumps({name: value for name, value in (record | change).items() if value is not None}))
    shutil.copy(begun / "plan.json", tmp_path)
    for read in (run.identity, run.stored_plan, run.checkpoints):
        with pytest.raises(RunError, match=f"run.json is not what a run writes: .*{said}"):
            read(tmp_path)
