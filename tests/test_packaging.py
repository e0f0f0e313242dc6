"""Wheel and editable install both carry recipes and sites."""

import subprocess
import sys
import zipfile
from pathlib import Path

from gigatrain import load

ROOT = Path(__file__).parent.parent


def test_the_wheel_carries_recipes_sites_and_code(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    shipped = {path.relative_to(ROOT).as_posix() for folder in ("recipes", "launch/sites") for path in (ROOT / folder).rglob("*.toml")}
    assert shipped
    assert {f"gigatrain/{name}" for name in shipped} <= names
    assert {"gigatrain/recipes/lucie-7b/README.md", "gigatrain/recipes/tasks/chat.jsonl", "gigatrain/recipes/tasks/pairs.jsonl"} <= names
    assert {"gigatrain/loop.py", "gigatrain/kernels/ops.py", "gigatrain/observe/tee.py", "gigatrain/launch/grafana.json"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "runs/"))]
    code = (
        "import gigatrain, sys; from gigatrain import load; assert gigatrain.__file__.startswith(sys.argv[1]); "
        "print(*load.known(), *load.sites(), load.recipe('lucie-7b/sft-tiny').name)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path / "site", capture_output=True, text=True, check=True)
    assert set(ended.stdout.split()) == {*load.known(), *load.sites(), "lucie-7b-sft-tiny"}


def test_torch_is_pinned_first_and_every_dependency_has_a_version():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "torch==2.13.0"
    assert all("==" in line for line in lines)
