"""Versions are read in one place, so that a run, its node and its benchmark rows say the same of one environment."""

import json
from pathlib import Path

import torch

import gigatrain
from gigatrain import cli, installed
from gigatrain.bench import faults, report
from gigatrain.observe import metrics
from gigatrain.preflight import host


def made(folder, name, version):
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_what_is_installed_is_named_and_what_is_not_is_absent(tmp_path, monkeypatch):
    made(tmp_path, "triton", "99.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = installed.versions("triton", "no-such-distribution", "torch")
    assert list(found) == ["python", "triton", "torch"]
    assert (found["triton"], found["torch"]) == ("99.1", torch.__version__)


def test_everybody_who_tells_versions_tells_the_same(monkeypatch, capsys):
    """A run's summary, what must be equal on all nodes, rows of benchmarks and of faults, and the command."""
    monkeypatch.setattr(
        installed, "versions", lambda *names: {"python": "3.99"} | {name: f"{name} 42" for name in names if name != "triton"}
    )
    cli.main(["version", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["gigatrain", "python", "torch", "triton", "transformers", "accelerate", "deepspeed"]
    assert (told["gigatrain"], told["triton"]) == (gigatrain.__version__, None)
    for found in (told, metrics.versions(), host.versions(), report.versions(), json.loads(faults.provenance()["versions"])):
        assert (found["python"], found["torch"]) == ("3.99", "torch 42")
    assert list(metrics.versions())[:4] == ["python", "threads", "cores", "gigatrain"]
    assert list(host.versions())[:4] == ["python", "gigatrain", "kernel", "torch"]
    assert list(json.loads(faults.provenance()["versions"])) == ["gigatrain", "python", "torch", "deepspeed"]


def test_nobody_else_gathers_what_is_installed():
    package = Path(gigatrain.__file__).parent
    asking = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if "PackageNotFoundError" in path.read_text("utf-8")}
    one = {"bench/kernels.py", "evaluate/tasks.py", "floors.py", "load.py"}  # each after one package, for what it does next
    assert asking == {"installed.py", *one}
