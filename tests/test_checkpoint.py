"""A checkpoint is loadable or invisible: every byte that is wrong is found, named, and the one before is used."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gigatrain.checkpoint import Checkpoints, fill, write_tensors
from gigatrain.errors import CheckpointError
from gigatrain.parallel.places import Piece


def whole(tensors):
    return {group: {name: Piece.whole(tensor) for name, tensor in named.items()} for group, named in tensors.items()}


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return whole(
        {
            "weights": {"w": torch.randn(17, 5, generator=generator), "empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5)},
            "optimizer": {
                "m": torch.randn(9, generator=generator).bfloat16(),
                "steps": torch.tensor(seed),
                "on": torch.tensor([True, False]),
            },
        }
    )


def empty_like(state):
    return whole({group: {name: torch.zeros_like(piece.tensor) for name, piece in named.items()} for group, named in state.items()})


@pytest.fixture
def saves(tmp_path):
    return Checkpoints(tmp_path, run="r1", plan_sha256="p" * 64, keep=3)


def reopened(saves, **changes):
    settings = {"run": saves.run, "plan_sha256": saves.plan_sha256, "keep": saves.keep} | changes
    return Checkpoints(saves.folder.parent, **settings)


def test_our_writer_and_the_safetensors_library_agree(tmp_path):
    tensors = {name: piece.tensor for named in state().values() for name, piece in named.items()}
    tensors["strided"] = torch.arange(12.0).view(3, 4).t()
    record = write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    data = (tmp_path / "x.safetensors").read_bytes()
    assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_tensor_larger_than_one_piece_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("gigatrain.checkpoint.files._PIECE", 1000)
    tensor = torch.randn(999, 7)
    write_tensors(tmp_path / "x.safetensors", {"t": tensor}, {})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], tensor)


def test_round_trip_is_bitwise_and_in_place(saves):
    saved = state()
    saves.save(3, saved, {"position": 24, "loss": 0.1 + 0.2})
    found, refused = reopened(saves).latest()
    assert (found.step, found.state, refused) == (3, {"position": 24, "loss": 0.1 + 0.2}, [])
    live = empty_like(saved)
    address = live["weights"]["w"].tensor.data_ptr()
    fill(found, live)
    assert all(torch.equal(live[group][name].tensor, piece.tensor) for group, named in saved.items() for name, piece in named.items())
    assert live["weights"]["w"].tensor.data_ptr() == address


def test_only_the_newest_are_kept(saves):
    for step in range(1, 7):
        saves.save(step, state(step), {})
    assert saves.steps() == [4, 5, 6]
    assert {path.name for path in saves.folder.iterdir()} == {f"step-{step:08d}" for step in (4, 5, 6)}


def test_nothing_to_resume_is_an_error_that_says_so(saves):
    with pytest.raises(CheckpointError, match="holds no committed checkpoint.*--new"):
        saves.latest()


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["weights-00000.safetensors", "optimizer-00000.safetensors", "state.json", "manifest.json", "COMMITTED"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "extend"])
def test_any_damage_to_any_file_is_found_and_the_one_before_is_used(saves, name, damage):
    saves.save(1, state(1), {"at": 1})
    path = saves.save(2, state(2), {"at": 2}) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "extend":
        path.write_bytes(data + b"x")
    else:
        path.unlink()
    found, refused = reopened(saves).latest()
    assert found.step == 1
    assert found.state == {"at": 1}
    if (name, damage) != ("COMMITTED", "remove"):  # without its marker it was never there
        assert len(refused) == 1
        assert "step-00000002" in refused[0]


def test_every_single_bit_of_a_tensor_file_counts(saves):
    path = saves.save(1, state(1), {}) / "weights-00000.safetensors"
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for bit in torch.randint(len(whole) * 8, (60,), generator=generator).tolist():
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"no checkpoint is whole:\n.*weights-00000.safetensors is damaged"):
            reopened(saves).latest()
    path.write_bytes(whole)
    assert reopened(saves).latest()[0].step == 1


def test_a_shard_of_another_step_is_refused(saves):
    first, second = saves.save(1, state(1), {}), saves.save(2, state(2), {})
    shutil.copy(first / "weights-00000.safetensors", second / "weights-00000.safetensors")
    found, refused = reopened(saves).latest()
    assert found.step == 1
    assert "weights-00000.safetensors is damaged" in refused[0]


def test_a_checkpoint_of_another_run_or_plan_is_refused_by_name(saves):
    saves.save(1, state(1), {})
    with pytest.raises(CheckpointError, match="belongs to run r1"):
        reopened(saves, run="r2").latest()
    with pytest.raises(CheckpointError, match="made under another plan"):
        reopened(saves, plan_sha256="q" * 64).latest()


def test_other_tensors_shapes_or_types_are_refused_by_name(saves):
    saves.save(1, state(1), {})
    found, _ = saves.latest()
    missing = state()
    del missing["weights"]["w"]
    with pytest.raises(CheckpointError, match="weights has other tensors than this run: w"):
        fill(found, missing)
    wrong = state()
    wrong["weights"]["w"] = Piece.whole(torch.zeros(5, 17))
    with pytest.raises(CheckpointError, match=r"weights w is torch.float32 \(17, 5\), this run needs torch.float32 \(5, 17\)"):
        fill(found, wrong)


def test_a_damaged_newer_checkpoint_is_written_again_not_trusted(saves):
    saves.save(1, state(1), {})
    path = saves.save(2, state(2), {}) / "weights-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    again = reopened(saves)
    assert again.latest()[0].step == 1
    again.save(2, state(2), {})
    assert reopened(saves).latest()[0].step == 2


def test_hostile_manifests_are_refused_and_nothing_runs(saves, tmp_path):
    folder = saves.save(1, state(1), {})
    good = json.loads((folder / "manifest.json").read_text())
    record, entry = good["files"]["state.json"], good["tensors"]["weights"]["w"]
    hostile = [
        good | {"files": files} for files in ({"a": 1}, {}, good["files"] | {"../../secret": record}, good["files"] | {"state.json": {}})
    ]
    for tensor in (
        {},
        entry | {"dtype": "F8"},
        entry | {"shape": [17, 6]},
        entry | {"pieces": []},
        entry | {"pieces": entry["pieces"] * 2},
    ):
        hostile.append(good | {"tensors": {"weights": {"w": tensor}}})
    hostile += [good | {"tensors": ["weights"]}, good | {"format": 1}, {key: good[key] for key in ("run", "step", "plan_sha256", "files")}]
    for text in ("[]", "{", '{"run": "r1"}', "null", *(json.dumps(changed) for changed in hostile)):
        (folder / "manifest.json").write_text(text)
        (folder / "COMMITTED").write_text(hashlib.sha256(text.encode()).hexdigest())
        with pytest.raises(CheckpointError, match="no checkpoint is whole"):
            reopened(saves).latest()


def test_a_full_disk_leaves_the_earlier_ones_untouched(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("needs root to mount a small disk")
    try:
        saves = Checkpoints(mount, run="r", plan_sha256="p", keep=5)
        small = whole({"weights": {"w": torch.randn(200_000)}})
        saves.save(1, small, {})
        with pytest.raises(CheckpointError, match=r"MiB free; free some, or lower checkpoint.keep; earlier ones are untouched"):
            saves.save(2, whole({"weights": {"w": torch.randn(2_000_000)}}), {})
        (mount / "ballast").write_bytes(b"x" * 1_800_000)  # now the check passes and the write itself runs out of space
        saves._check_space = lambda state: None  # type: ignore[method-assign]
        with pytest.raises(CheckpointError, match="step 3 could not be saved.*ENOSPC"):
            saves.save(3, whole({"weights": {"w": torch.randn(600_000)}}), {})
        assert saves.steps() == [1]
        assert {path.name for path in saves.folder.iterdir()} == {"step-00000001"}
        live = empty_like(small)
        fill(Checkpoints(mount, run="r", plan_sha256="p", keep=5).latest()[0], live)
        assert torch.equal(live["weights"]["w"].tensor, small["weights"]["w"].tensor)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def _save_and_die(folder, fatal):
    """Two saves in this (forked) process, killed at the `fatal`-th system call that the second one makes through os."""
    calls = 0

    def counted(function):
        def wrapper(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return wrapper

    saves = Checkpoints(folder, run="r", plan_sha256="p", keep=1)
    for step in (1, 2):
        if step == 2:
            for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "open"):
                setattr(os, name, counted(getattr(os, name)))
        saves.save(step, whole({"weights": {"w": torch.full((1000,), float(step))}}), {"step": step})


def test_a_kill_at_every_system_call_of_a_save_leaves_one_whole_checkpoint(tmp_path):
    """keep = 1, so that the old one goes as the new one comes: at no call may both be gone."""
    seen = set()
    for fatal in range(1, 80):
        folder = tmp_path / str(fatal)
        folder.mkdir()
        child = os.fork()
        if child == 0:
            try:
                _save_and_die(folder, fatal)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found, refused = Checkpoints(folder, run="r", plan_sha256="p", keep=1).latest()
        assert refused == []
        live = torch.zeros(1000)
        fill(found, whole({"weights": {"w": live}}))
        assert live.eq(found.step).all()
        seen.add(found.step)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    else:
        pytest.fail("the save never ended alive")
    assert seen == {1, 2}
    assert fatal > 15


def test_the_module_reads_no_pickle():
    files = list(Path(sys.modules["gigatrain.checkpoint"].__file__ or "").parent.glob("*.py"))
    assert len(files) >= 5
    for path in files:
        text = path.read_text()
        assert "torch.load" not in text
        assert "pickle" not in text
