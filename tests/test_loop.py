"""Whole runs on real text: killed, signalled, poisoned, resumed, and in the end bitwise what an undisturbed run is."""

import json
import math
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import distributed

from gigatrain import load, loop, run
from gigatrain.checkpoint import Checkpoints
from gigatrain.data.loader import Batches
from gigatrain.engines.native import Native
from gigatrain.errors import CheckpointError, DataError, RunError
from gigatrain.observe.display import Display
from gigatrain.planning.plan import plan
from gigatrain.recovery import meeting


def planned(tiny, *overrides):
    return plan(load.recipe(tiny, ["export=false", *overrides]), load.site("laptop"))


def trained(tiny, folder, *overrides, start: Any = "auto") -> Any:
    return loop.train(planned(tiny, *overrides), folder, start=start, display=quiet())


def quiet():
    return Display(Console(file=open(os.devnull, "w"), force_terminal=False))


def in_child(function):
    """Run `function` in a forked child; returns its pid. Its exit code: 0, 9 for a CheckpointError, 1 for anything else."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function()
        code = 0
    except CheckpointError:
        code = 9
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def waited(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def windows(folder):
    """metrics.jsonl without its timings and watts."""
    timings = {
        "tokens_per_s",
        "step_s",
        "joules_per_token",
        "tokens_per_s_mw",
        "watts_change_10s",
        "device_watts",
        "node_watts",
        "it_watts",
        "facility_watts",
    }
    return [{k: v for k, v in json.loads(line).items() if k not in timings} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last_files(folder):
    """SHA-256 of every tensor file of the newest checkpoint: weights, moments, counts, generators."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    record = json.loads((newest / "manifest.json").read_text())["files"]
    return newest.name, {name: file["sha256"] for name, file in record.items() if name.endswith(".safetensors") and "metadata" not in name}


def tensors(folder):
    found = run.checkpoints(folder).latest()[0]
    return found.step, {group: found.tensors(group) for group in ("weights", "optimizer", "random")}


def same_state(one, other):
    step_one, groups_one = tensors(one)
    step_other, groups_other = tensors(other)
    assert step_one == step_other
    for group, named in groups_one.items():
        assert named.keys() == groups_other[group].keys()
        for name, tensor in named.items():
            assert torch.equal(tensor, groups_other[group][name]), f"{group} {name}"


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    return folder, trained(tiny, folder)


def test_a_run_learns_and_leaves_a_full_folder(tiny, undisturbed):
    folder, summary = undisturbed
    found = windows(folder)
    assert [window["step"] for window in found if "loss" in window] == [2, 4, 6, 8, 10, 12]
    assert [window["step"] for window in found if "val_loss" in window] == [5, 10, 12]
    losses = [window["loss"] for window in found if "loss" in window]
    assert losses[0] == pytest.approx(math.log(320), abs=0.3)  # an untrained model knows nothing
    assert losses[-1] < losses[0] - 0.3
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["tokens"] == 12 * 4 * 32
    assert summary["loss"] == losses[-1]
    assert summary["val_loss"] == found[-1]["val_loss"]
    assert summary["bits_per_byte"] > summary["xz_bits_per_byte"] > 0
    assert summary["parameters"] == sum(t.numel() for t in tensors(folder)[1]["weights"].values())
    assert summary["wall_s"] > 0
    assert summary["step_s_p99"] >= summary["step_s_p50"] > 0
    assert (folder / "plan.sha256").read_text().strip() == run.stored_plan(folder).sha256 == summary["plan_sha256"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


def test_bits_per_byte_is_the_sum_of_nats_over_the_bytes_of_the_held_out_files(undisturbed, tiny):
    folder, summary = undisturbed
    from gigatrain.data import build

    chosen = run.stored_plan(folder)
    held = build.build(chosen.data, chosen.tokenizer).totals("validation")
    last = windows(folder)[-1]
    assert last["val_targets"] == held["tokens"]
    assert summary["bits_per_byte"] == pytest.approx(last["val_loss"] * held["tokens"] / math.log(2) / held["text_bytes"])


@pytest.mark.parametrize("deterministic", ["true", "false"])
def test_two_runs_are_bitwise_equal(tiny, undisturbed, tmp_path, deterministic):
    again = trained(tiny, tmp_path / "again", f"train.deterministic={deterministic}")
    torch.use_deterministic_algorithms(False)
    assert again["weights_sha256"] == undisturbed[1]["weights_sha256"]
    assert windows(tmp_path / "again") == windows(undisturbed[0])


def test_the_order_of_the_data_is_the_seed(tiny, undisturbed, tmp_path):
    other = trained(tiny, tmp_path / "other", "train.seed=1")
    assert other["weights_sha256"] != undisturbed[1]["weights_sha256"]


def test_an_interrupted_run_goes_on_to_the_same_weights_and_the_same_metrics(tiny, undisturbed, tmp_path):
    """SIGTERM and SIGUSR1 at every kind of moment: before a report, at it, in a validation."""
    folder = tmp_path / "run"
    overrides = ()
    for number, (signal_number, at) in enumerate([(signal.SIGTERM, 1), (signal.SIGUSR1, 5), (signal.SIGINT, 7)]):

        def interrupted(start="resume" if number else "new", signal_number=signal_number, at=at):
            step = Native.step

            def stepping(self, rate):
                if int(self.state()["optimizer"]["steps"].tensor) == at:
                    os.kill(os.getpid(), signal_number)
                return step(self, rate)

            Native.step = stepping  # type: ignore[method-assign]
            assert trained(tiny, folder, *overrides, start=start) is None

        assert waited(in_child(interrupted)) == 0
        assert not (folder / "summary.json").exists()
    summary = trained(tiny, folder, start="resume")
    assert summary["weights_sha256"] == undisturbed[1]["weights_sha256"]
    assert summary["resumes"] == [2, 6, 8]
    assert windows(folder) == windows(undisturbed[0])
    same_state(folder, undisturbed[0])


def test_killed_at_random_moments_the_run_ends_bitwise_equal(tiny, undisturbed, tmp_path):
    """SIGKILL at least ten times, wherever it falls: start, step, validation, save."""
    folder = tmp_path / "run"
    draw = random.Random(20261122)
    began = time.monotonic()
    trained(tiny, tmp_path / "timed")
    whole_s = time.monotonic() - began
    kills = 0
    start = "new"
    for _ in range(60):
        child = in_child(lambda start=start: trained(tiny, folder, start=start))
        ended, began = None, time.monotonic()
        deadline = began + draw.uniform(0.05, 0.9) * whole_s if kills < 12 else math.inf
        while ended is None and time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            ended = os.waitstatus_to_exitcode(status) if pid else None
            time.sleep(0.001)
        if ended is None:
            os.kill(child, signal.SIGKILL)
            ended = waited(child)  # 0: it ended by itself between the last look and the signal
        if ended == -signal.SIGKILL:
            kills += 1
        elif ended == 0 and kills >= 10:
            break
        elif ended == 0:  # finished before enough kills: from the start again, and the next kills come sooner
            whole_s = min(whole_s, time.monotonic() - began)
            shutil.rmtree(folder)
        else:
            assert ended == 9, "only a run without a checkpoint may refuse to resume"
            assert not list(folder.glob("checkpoints/*/COMMITTED"))
            start = "new"
            continue
        start = "resume" if (folder / "run.json").exists() and list(folder.glob("checkpoints/*/COMMITTED")) else "new"
    assert kills >= 10
    assert json.loads((folder / "summary.json").read_text())["weights_sha256"] == undisturbed[1]["weights_sha256"]
    assert windows(folder) == windows(undisturbed[0])
    same_state(folder, undisturbed[0])


@pytest.mark.parametrize("call", range(1, 16, 2))
def test_killed_inside_a_save_the_run_ends_bitwise_equal(tiny, undisturbed, tmp_path, call):
    """SIGKILL at the n-th sync of the run's files: between two tensor files, before the rename, before the marker."""
    folder = tmp_path / "run"

    def dying():
        fsync, calls = os.fsync, 0

        def counted(descriptor):
            nonlocal calls
            calls += "checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}")
            if calls == 10 + call:  # the first save, of step 0, syncs ten times or fewer
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = counted
        trained(tiny, folder, "checkpoint.background=false", start="new")

    assert waited(in_child(dying)) == -signal.SIGKILL
    summary = trained(tiny, folder, start="resume")
    assert summary["weights_sha256"] == undisturbed[1]["weights_sha256"]
    same_state(folder, undisturbed[0])
    assert not list((folder / "checkpoints").glob(".writing-*"))


def test_resume_without_a_checkpoint_is_an_error_never_step_0(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="holds no run, so there is nothing to resume; start with --new"):
        trained(tiny, tmp_path / "none", start="resume")
    trained(tiny, tmp_path / "run", "train.steps=3")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no committed checkpoint"):
        trained(tiny, tmp_path / "run", "train.steps=3", start="resume")


def test_a_damaged_checkpoint_is_refused_loudly_and_the_one_before_used(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    path = folder / "checkpoints" / "step-00000012" / "weights-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    with open(tmp_path / "out", "w") as file:
        summary = loop.train(planned(tiny), folder, start="resume", display=Display(Console(file=file, width=200)))
    said = (tmp_path / "out").read_text()
    assert f"CHECKPOINT REFUSED: {path} is damaged" in said
    assert "resumed at step 9" in said
    assert summary is not None
    assert summary["weights_sha256"] == undisturbed[1]["weights_sha256"]
    same_state(folder, undisturbed[0])


def test_resuming_under_another_plan_is_refused_with_the_values(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    with pytest.raises(CheckpointError, match=r"2 value\(s\) differ:\n *optim.lr: 0.003 -> 0.004\n") as failure:
        trained(tiny, folder, "optim.lr=4e-3", "schedule.warmup=3", start="resume")
    assert "schedule.warmup: 2 -> 3" in str(failure.value)
    (folder / "plan.json").write_text((folder / "plan.json").read_text().replace('"lr":0.003', '"lr":0.004'))
    with pytest.raises(RunError, match=r"plan.json was changed after the run began"):
        trained(tiny, folder, start="resume")


def test_a_resume_takes_the_corpus_it_began_with_and_refuses_another(tiny, undisturbed, tmp_path, corpus):
    folder, cache = tmp_path / "run", tmp_path / "cache"
    overrides = (f"data.folder={cache}",)
    trained(tiny, folder, *overrides)
    (folder / "summary.json").unlink()
    path = corpus / "zz_new.py"
    path.write_text("x = 1\n" * 300)
    try:
        assert trained(tiny, folder, *overrides, start="resume")["weights_sha256"] == undisturbed[1]["weights_sha256"]
        shutil.rmtree(cache)
        with pytest.raises(DataError, match="the saved data position is for corpus"):
            trained(tiny, folder, *overrides, start="resume")
    finally:
        path.unlink()


def test_a_resume_may_change_what_is_only_watched_or_kept(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    summary = trained(tiny, folder, "checkpoint.keep=1", "report.every=1", 'report.trackers=["tensorboard"]', start="resume")
    assert summary["weights_sha256"] == undisturbed[1]["weights_sha256"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000012"]
    assert run.stored_plan(folder).checkpoint.keep == 1
    assert run.identity(folder)["plan_sha256"] == run.stored_plan(folder).sha256


def test_a_recipe_that_fails_before_its_first_step_leaves_the_folder_free(tiny, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(DataError):
        trained(tiny, folder, "data.sources.0.path=/nowhere/at/all")
    with pytest.raises(RunError, match="embeds 300"):
        trained_with_small_vocab(tiny, folder)
    assert trained(tiny, folder, "train.steps=2")["steps"] == 2


def trained_with_small_vocab(tiny, folder):
    """A tokenizer of 320 ids and a model of 300."""
    other = folder.parent / "other"
    trained(tiny, other, "train.steps=1")
    return trained(tiny, folder, f'tokenizer={{from="{other / "tokenizer"}"}}', "model.architecture.vocab=300")


def test_new_moves_runs_only(tiny, tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    (project / "thesis.tex").write_text("years of work")
    trained(tiny, project, "train.steps=1", start="new")
    assert (project / "thesis.tex").read_text() == "years of work"
    assert not (tmp_path / "project.1").exists()
    monkeypatch.chdir(project)
    trained(tiny, Path("."), "train.steps=1", start="new")
    assert (tmp_path / "project.1" / "thesis.tex").exists()


def test_a_save_that_a_signal_asked_for_and_the_disk_refused_is_no_success(tiny, tmp_path, monkeypatch):
    from gigatrain.checkpoint import Checkpoints

    write, step = Checkpoints._write, Native.step

    def full(self, folder, number, tensors, state):
        if number == 2:
            raise OSError(28, "No space left on device")
        return write(self, folder, number, tensors, state)

    def stepping(self, rate):
        if int(self.state()["optimizer"]["steps"].tensor) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, rate)

    monkeypatch.setattr(Checkpoints, "_write", full)
    monkeypatch.setattr(Native, "step", stepping)
    with pytest.raises(CheckpointError, match="step 2 could not be saved"):
        trained(tiny, tmp_path / "run")


@pytest.mark.parametrize("step", [5, 12])
def test_a_signal_within_a_validation_saves_first_and_the_resume_validates(tiny, undisturbed, tmp_path, step):
    """Also within the last one, whose numbers the summary would else take from the one before."""
    folder = tmp_path / "run"

    def interrupted():
        evaluate = Native.evaluate

        def evaluating(self, microbatches):
            if int(self.state()["optimizer"]["steps"].tensor) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(self, microbatches)

        Native.evaluate = evaluating  # type: ignore[method-assign]
        assert trained(tiny, folder, start="new") is None

    assert waited(in_child(interrupted)) == 0
    assert run.checkpoints(folder).latest()[0].step == step
    events = [json.loads(line) for line in (folder / "logs" / "progress.jsonl").read_text().splitlines()]
    reports = [event for event in events if event["event"] == "report"]
    assert (reports[-1]["step"], reports[-1]["seconds"]["training"] > 0) == (step, True)  # also of a window that is not over
    assert not [window for window in windows(folder) if "val_loss" in window and window["step"] == step]
    assert not (folder / "summary.json").exists()
    summary = trained(tiny, folder, start="resume")
    assert windows(folder) == windows(undisturbed[0])
    for key in ("val_loss", "bits_per_byte", "weights_sha256"):
        assert summary[key] == undisturbed[1][key]


@pytest.mark.parametrize("content", ["{", "[]", '{"steps": 12}'])
def test_a_finished_run_whose_summary_is_damaged_is_refused_by_name(tiny, undisturbed, tmp_path, content):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    (folder / "summary.json").write_text(content)
    with pytest.raises(RunError, match="summary.json is not what a run writes .*; remove it, and --resume makes it again"):
        trained(tiny, folder, start="resume")


def test_foreign_folders_among_the_checkpoints_disturb_nothing(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    (folder / "summary.json").unlink()
    newest = folder / "checkpoints" / "step-00000009"
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    shutil.copytree(newest, folder / "checkpoints" / "step-00000009.bak")
    shutil.copytree(newest, folder / "checkpoints" / "step-00000001")
    (folder / "checkpoints" / "step-00000001" / "COMMITTED").unlink()  # as a kill within a pruning leaves it
    (folder / "checkpoints" / "notes.txt").write_text("mine")
    assert trained(tiny, folder, start="resume")["weights_sha256"] == undisturbed[1]["weights_sha256"]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "step-00000009", "step-00000012", "step-00000009.bak", "notes.txt"
    }  # fmt: skip


def test_out_of_memory_is_an_error_with_a_way_out(tiny, tmp_path, monkeypatch):
    def forward(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(Native, "forward_backward", forward)
    with pytest.raises(RunError, match=r"out of memory: CUDA out of memory. Tried to allocate 20.00 GiB.; lower train.microbatch"):
        trained(tiny, tmp_path / "run")


def test_a_folder_that_holds_a_run_is_never_overwritten(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    with pytest.raises(RunError, match="already holds a run; go on with --resume, start over with --new"):
        trained(tiny, folder)
    trained(tiny, folder, "train.steps=3", start="new")
    assert json.loads((tmp_path / "run.1" / "summary.json").read_text())["steps"] == 12
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3


def test_two_processes_cannot_share_a_run_folder(tiny, tmp_path):
    folder = tmp_path / "run"
    with (
        run.opened(planned(tiny), folder, "new"),
        pytest.raises(RunError, match="in use by another process"),
        run.opened(planned(tiny), folder, "auto"),
    ):
        pass


def test_poisoned_steps_stop_the_run_with_step_and_data_named(tiny, tmp_path, monkeypatch):
    forward = Native.forward_backward

    def poisoned(self, batch):
        loss = forward(self, batch)
        if batch.positions.start >= 3 * 4:
            self.grads["model.norm.weight"].fill_(float("nan"))
        return loss

    monkeypatch.setattr(Native, "forward_backward", poisoned)
    with pytest.raises(RunError) as failure:
        trained(tiny, tmp_path / "run", "train.max_bad_steps=4", "checkpoint.every=100")
    said = str(failure.value)
    assert "5 steps in a row, from step 3, had a loss or gradient that is not finite" in said
    assert "limit: train.max_bad_steps = 4" in said
    assert "position 12: source" in said
    assert ".train.bin at byte" in said
    bad = [window["bad_steps"] for window in windows(tmp_path / "run") if "bad_steps" in window]
    assert bad == [0, 1, 3, 5]


def test_a_single_poisoned_step_is_skipped_and_counted(tiny, tmp_path, monkeypatch):
    forward = Native.forward_backward

    def poisoned(self, batch):
        loss = forward(self, batch)
        if batch.positions.start == 5 * 4:
            self.grads["model.norm.weight"][0] = float("inf")
        return loss

    monkeypatch.setattr(Native, "forward_backward", poisoned)
    summary = trained(tiny, tmp_path / "run")
    assert summary["bad_steps"] == 1
    assert all(math.isfinite(window["loss"]) for window in windows(tmp_path / "run") if "loss" in window)


def test_a_save_that_fails_on_the_way_does_not_end_the_run_but_the_last_must_succeed(tiny, tmp_path, monkeypatch, undisturbed):
    from gigatrain.checkpoint import Checkpoints

    write, fails = Checkpoints._write, {3, 6}

    def full(self, folder, step, tensors, state):
        if step in fails:
            raise OSError(28, "No space left on device")
        return write(self, folder, step, tensors, state)

    monkeypatch.setattr(Checkpoints, "_write", full)
    summary = trained(tiny, tmp_path / "run", "checkpoint.background=false")
    assert summary["weights_sha256"] == undisturbed[1]["weights_sha256"]
    fails.add(12)
    with pytest.raises(CheckpointError, match="step 12 could not be saved.*ENOSPC"):
        trained(tiny, tmp_path / "other", "checkpoint.background=false")
    assert run.checkpoints(tmp_path / "other").latest()[0].step == 9


def test_continued_pretraining_starts_from_the_exported_weights(tiny, undisturbed, tmp_path):
    from gigatrain.export import export

    export(undisturbed[0], tmp_path / "model")
    recipe = load.recipe(tiny, ["export=false", f'model={{from="{tmp_path / "model"}"}}', "train.steps=3", "schedule.warmup=0"])
    summary = loop.train(plan(recipe, load.site("laptop")), tmp_path / "run", display=quiet())
    assert summary is not None
    first = windows(tmp_path / "run")[0]["loss"]
    assert first == pytest.approx(undisturbed[1]["loss"], abs=0.2)
    assert first < windows(undisturbed[0])[0]["loss"] - 0.1


def test_the_loop_never_waits_for_the_device_within_a_step(tiny, tmp_path, monkeypatch):
    """From the batch to the metrics nobody may read a tensor's value: what would make a host wait for a GPU is made to fail there."""
    from gigatrain.observe.metrics import Metrics

    inside = False

    def guarded(function):
        def wrapper(self, *arguments):
            nonlocal inside
            inside = True
            try:
                return function(self, *arguments)
            finally:
                inside = False

        return wrapper

    for owner, name in ((Native, "forward_backward"), (Native, "step"), (Metrics, "add")):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    for name in ("item", "tolist", "cpu", "nonzero", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def checked(self, *arguments, original=original, name=name, **named):
            assert not inside or threading.current_thread() is not threading.main_thread(), f"Tensor.{name} within a step"
            return original(self, *arguments, **named)

        monkeypatch.setattr(torch.Tensor, name, checked)
    for optim in ("adamw", "muon"):
        trained(tiny, tmp_path / optim, "train.steps=4", f"optim.name={optim}", "train.precision=bf16", "train.microbatch=3")


def test_prefetching_and_microbatching_change_no_sample(tiny, undisturbed):
    from gigatrain.data import build

    chosen = run.stored_plan(undisturbed[0])
    corpus = build.build(chosen.data, chosen.tokenizer)
    settings = {"sequence": 32, "packing": "stream", "batch": 4, "seed": 0}
    one, other = Batches(corpus, **settings, prefetch=0), Batches(corpus, **settings, prefetch=3, microbatch=3)
    try:
        for _ in range(20):
            a, b = next(one), next(other)
            assert a.targets == b.targets
            assert torch.equal(a.microbatches[0].tokens, torch.cat([part.tokens for part in b.microbatches]))
    finally:
        other.close()


def test_no_secret_of_the_environment_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-token-value")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cr3t-token-value")
    folder = tmp_path / "run"
    trained(tiny, folder, "train.steps=3", 'report.trackers=["tensorboard"]')
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    assert not [path for path in files if b"s3cr3t-token-value" in path.read_bytes()]


def test_every_tracker_is_reached_by_name_or_refused_with_a_way_out(tiny, tmp_path):
    with pytest.raises(RunError, match=r"report.trackers.*trackio.*--set report.trackers=\[\]"):
        trained(tiny, tmp_path / "run", 'report.trackers=["trackio"]')


def test_trackers_of_a_lone_rank_that_has_a_supervisor_meet_nobody(tiny, tmp_path, monkeypatch):
    """Its environment names a port, which its supervisor holds: accelerate would listen there, and the run would not start."""
    from accelerate import PartialState

    with meeting.listening("127.0.0.1") as held:
        names = ("127.0.0.1", held.getsockname()[1], 0, 0, 1)
        for name, value in zip(("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"), names, strict=True):
            monkeypatch.setenv(name, str(value))
        PartialState._reset_state()  # of a test before this one
        assert trained(tiny, tmp_path / "run", "train.steps=2", 'report.trackers=["tensorboard"]')
    assert not distributed.is_initialized()
    assert os.environ["LOCAL_RANK"] == "0"
    assert list((tmp_path / "run").rglob("*tfevents*"))


def test_tensorboard_holds_the_numbers_of_the_metrics(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    trained(tiny, folder, "train.steps=4", 'report.trackers=["tensorboard"]')
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")] == [
        (window["step"], window["loss"]) for window in windows(folder) if "loss" in window
    ]


def test_a_run_folder_that_cannot_be_made_is_an_error(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be the run folder"):
        trained(tiny, tmp_path / "file" / "run")


def test_resuming_a_finished_run_changes_nothing(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert trained(tiny, folder, start="resume") == undisturbed[1]
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before


def test_a_run_that_was_killed_between_its_last_save_and_its_summary_is_finished_by_resume(tiny, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    (folder / "summary.json").unlink()
    summary = trained(tiny, folder, start="resume")
    for key in ("loss", "val_loss", "bits_per_byte", "tokens", "weights_sha256", "tokens_per_s"):
        assert summary[key] == undisturbed[1][key], key


@pytest.mark.parametrize("size", ["400k", "2400k"])
def test_a_disk_that_fills_up_ends_in_one_message_and_whole_checkpoints(tiny, tmp_path, size, capsys):
    import subprocess

    from gigatrain import cli

    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("needs root to mount a small disk")
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", str(tiny), "--run", str(mount / "run"), "--set", "checkpoint.every=1", "--set", "checkpoint.keep=9"])
        said = capsys.readouterr()
        assert ended.value.code in (1, 6)
        assert "MiB free" in said.err or "No space left" in said.err
        if size == "2400k":
            assert run.checkpoints(mount / "run").latest()[1] == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_continue_begins_where_nothing_is_and_goes_on_where_a_checkpoint_is(tiny, undisturbed, tmp_path):
    """What a job says at each of its starts; a folder claimed by a process that died before its first save holds nothing to lose."""
    folder = tmp_path / "run"

    def dying():
        Checkpoints.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        trained(tiny, folder, start="continue")

    assert waited(in_child(dying)) == -signal.SIGKILL
    assert (folder / "run.json").is_file()
    assert not list(folder.glob("checkpoints/*/COMMITTED"))

    def interrupted():
        step = Native.step

        def stepping(self, rate):
            if int(self.state()["optimizer"]["steps"].tensor) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, rate)

        Native.step = stepping  # type: ignore[method-assign]
        assert trained(tiny, folder, start="continue") is None

    assert waited(in_child(interrupted)) == 0
    summary = trained(tiny, folder, start="continue")
    assert summary["resumes"] == [6]
    assert summary["weights_sha256"] == undisturbed[1]["weights_sha256"]
    assert windows(folder) == windows(undisturbed[0])


@pytest.mark.parametrize(
    ("settings", "registers"), [("optim.name=muon", True), ("train.precision=bf16", True), ("train.precision=fp32", False)]
)
def test_a_processor_that_multiplies_no_bf16_gets_widened_products_where_the_run_has_any(tiny, tmp_path, monkeypatch, settings, registers):
    called = []
    monkeypatch.setattr("gigatrain.kernels.widened.needed", lambda: True)
    monkeypatch.setattr("gigatrain.kernels.widened.register", lambda: called.append(1))
    trained(tiny, tmp_path / "run", settings, "train.steps=1", "validation.every=0")
    assert bool(called) == registers


@pytest.mark.parametrize(("precision", "lacks", "said"), [("bf16", True, 1), ("bf16", False, 0), ("fp32", True, 0)])
def test_a_processor_that_multiplies_no_bf16_is_said_at_the_start_with_the_way_out(
    tiny, tmp_path, capsys, monkeypatch, precision, lacks, said
):
    monkeypatch.setattr("gigatrain.kernels.widened.needed", lambda: lacks)
    planned = plan(load.recipe(tiny, [f"train.precision={precision}", "train.steps=1", "validation.every=0"]), load.site("laptop"))
    with Display(Console(width=400)) as display:
        loop.train(planned, tmp_path / "run", display=display)
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if "no bf16 products" in line]
    assert len(found) == said
    assert all(line.endswith("--set train.precision=fp32") and lines.index(line) < 5 for line in found)
