"""Old versions are refused by name; a run's folder is its owner's alone."""

import os
import stat
import subprocess
import sys

import pytest

from gigatrain import floors, load
from gigatrain.errors import RecipeError, RunError
from gigatrain.planning.plan import plan
from gigatrain.run import opened


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("name", "version", "cve"),
    [
        ("torch", "2.9.1", "CVE-2026-24747"),
        ("torch", "2.9.1+cu130", "CVE-2026-24747"),
        ("transformers", "5.2.9", "CVE-2026-4372"),
        ("transformers", "4.57.0", "CVE-2026-4372"),
    ],
)
def test_a_version_below_the_floor_is_refused_by_name(tmp_path, monkeypatch, name, version, cve):
    made = tmp_path / f"{name}-{version}.dist-info"
    made.mkdir()
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RunError, match=rf"{name} {version.replace('+', '.')} is installed(.|\n)*{cve}(.|\n)*pip install -U '{name}>="):
        floors.versions()


def test_what_is_installed_here_is_above_the_floors():
    floors.versions()


def test_a_run_folder_is_for_its_owner_alone(tiny, tmp_path):
    before = os.umask(0o002)
    try:
        with opened(plan(load.recipe(tiny), load.site("laptop")), tmp_path / "deep" / "run", "auto"):
            assert mode(tmp_path / "deep" / "run") == 0o700
            assert mode(tmp_path / "deep" / "run" / ".lock") == 0o600
    finally:
        os.umask(before)


def test_others_lose_their_leave_to_write_and_no_more(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o777)
    floors.private(folder)
    assert mode(folder) == 0o755


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")
def test_a_folder_of_somebody_else_is_refused(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for above in (tmp_path, *tmp_path.parents[:3]):
        above.chmod(above.stat().st_mode | 0o055)
    program = f"import os; from gigatrain import floors; from pathlib import Path; os.setuid(65534); floors.private(Path({str(folder)!r}))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "belongs to user 0, and you are 65534" in ended.stderr


def test_a_lock_that_is_a_link_is_not_followed(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="cannot be written"), opened(plan(load.recipe(tiny), load.site("laptop")), tmp_path / "run", "auto"):
        pass
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("key", ['data.sources=[{kind="hub",path="URL"}]', 'model.from="URL"', 'tokenizer.from="URL"'])
def test_a_password_in_an_address_is_refused_and_not_repeated(tiny, key):
    with pytest.raises(RecipeError, match="is an address with a password in it") as said:
        load.recipe(tiny, [key.replace("URL", "https://me:hunter2@example.org/x")])
    assert "hunter2" not in str(said.value)
