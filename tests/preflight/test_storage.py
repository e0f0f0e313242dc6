"""Real file systems with real faults: a full tmpfs, a read-only one, one without inodes; only a kernel without flock is pretended."""

import contextlib
import errno
import os
import subprocess

import pytest

from gigatrain.preflight import findings, storage


@contextlib.contextmanager
def mounted(folder, options):
    folder.mkdir(exist_ok=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "doctor", str(folder)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting takes root: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def states(checks):
    found, _ = findings.run(checks, findings.Clock(60))
    return {one.name: one for one in found}


def test_a_good_folder_is_written_and_left_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SCRATCH", str(tmp_path))
    found = states(storage.checks(tmp_path, "$MY_SCRATCH/", 0.001, 1 << 20))
    assert {one.state for one in found.values()} == {"ok"}, found
    assert list(found) == ["run space", "run write", "run lock", "scratch space", "scratch write", "scratch lock"]
    assert isinstance(found["run write"].value, float)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path):
    with mounted(tmp_path / "full", "size=64k") as folder:
        (folder / "ballast").write_bytes(bytes(40 << 10))
        found = states(storage.checks(folder, None, None))
        assert found["run space"].state == "bad"
        assert "24 KiB free, 4 GiB are wanted" in found["run space"].said
        assert found["run write"].state == "bad"
        assert "no space left (ENOSPC)" in found["run write"].said
        assert sorted(path.name for path in folder.iterdir()) == ["ballast"]  # what was half written is gone
        assert states(storage.checks(folder, None, 1e-6))["run space"].state == "ok"


def test_a_disk_without_inodes_is_named(tmp_path):
    with mounted(tmp_path / "few", "size=1m,nr_inodes=20") as folder:
        found = storage.space("run space", folder, 0)
        assert (found.state, "inodes free" in found.said) == ("bad", True)


def test_a_read_only_disk_is_named(tmp_path):
    with mounted(tmp_path / "ro", "size=1m,ro") as folder:
        found = states(storage.checks(folder, None, 0))
        assert {found[name].state for name in ("run space", "run write", "run lock")} == {"bad"}
        assert all("read-only (EROFS)" in found[name].said for name in ("run space", "run write", "run lock"))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    found = states(storage.checks(tmp_path / "missing", None, 0))
    assert all("does not exist (ENOENT)" in one.said for name, one in found.items() if name != "scratch")


def test_an_unset_variable_is_bad_by_name(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_SCRATCH", raising=False)
    found = states(storage.checks(tmp_path, "${NO_SUCH_SCRATCH}/x", 0, 1 << 20))["scratch"]
    assert (found.state, found.value) == ("bad", "NO_SUCH_SCRATCH")
    assert "$NO_SUCH_SCRATCH is not set here" in found.said
    assert states(storage.checks(tmp_path, None, 0, 1 << 20))["scratch"].state == "untested"


def test_a_file_system_without_flock_is_bad(tmp_path):
    def refused(file, flags):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    found = storage.lock("run lock", tmp_path, refused)
    assert (found.state, found.value) == ("bad", "ENOSYS")
    assert "-o flock" in found.way_out
    assert storage.lock("run lock", tmp_path, lambda file, flags: None).said.endswith("a second flock was given while the first was held")
    assert not list(tmp_path.iterdir())
