"""Pilots of a search's candidates: scripts that bash and shellcheck take, one that runs, and how they decide."""

import json
import shutil
import subprocess

import pytest

from gigatrain import load
from gigatrain.errors import RunError, SiteError
from gigatrain.launching import pilots
from gigatrain.launching.submit import Request
from gigatrain.planning import top
from gigatrain.planning.estimate import candidates, search
from gigatrain.planning.estimate.cluster import Cluster, Level

GIVEN = ("model.architecture=llama-3.1-8b", "optim.name=adamw", "train.batch=16", "train.sequence=2048")


@pytest.fixture(scope="module")
def found():
    return top.top(load.recipe("quickstart", GIVEN), load.site("dgx-h100"), 8, count=3)


@pytest.fixture(autouse=True)
def scratch(monkeypatch, tmp_path):
    monkeypatch.setenv("SCRATCH", str(tmp_path))


def test_scripts_of_a_queue(found, tmp_path):
    request = Request(recipe="quickstart", site="jupiter", overrides=GIVEN, account="a b;$(touch HARM)", time_s=1800)
    made = pilots.write(tmp_path / "pilots", found, request)
    names = sorted(path.name for path in made.folder.iterdir())
    assert names == sorted(["README.md", "pilots.json", "pilots.sh", *(f"pilot-{n}.{end}" for n in (1, 2, 3) for end in ("json", "sh"))])
    for path in made.folder.glob("*.sh"):
        subprocess.run(["bash", "-n", path], check=True)
        assert path.stat().st_mode & 0o100
    assert "#SBATCH --nodes=2" in (made.folder / "pilot-1.sh").read_text()
    started = made.start.read_text().splitlines()
    assert sum("gigatrain launch" in line and "--gpus 8" in line and "--time 00:30:00" in line for line in started) == 3
    assert "'a b;$(touch HARM)'" in made.start.read_text()
    first = load.recipe(made.folder / "pilot-1.json")
    assert (first.name, first.train.steps, first.train.tokens, first.export) == ("quickstart-pilot-1", 30, None, False)
    asked = load.recipe("quickstart", [*GIVEN, *candidates.overrides(found.candidates[0])])
    assert (first.mesh, first.train.microbatch, first.model) == (asked.mesh, asked.train.microbatch, asked.model)
    assert "folder" not in first.data.model_fields_set  # so that a job keeps its shards in the site's cache
    with pytest.raises(RunError, match="already holds something; name another folder with --pilots"):
        pilots.write(made.folder, found, request)
    with pytest.raises(RunError, match=r"no pilot of .* has come to its timed steps yet; start them with: bash "):
        pilots.decided(made.folder)


def test_what_cannot_be_launched_leaves_nothing(found, tmp_path, monkeypatch):
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(SiteError, match="the environment has no SCRATCH"):
        pilots.write(tmp_path / "pilots", found, Request(recipe="quickstart", site="jupiter", overrides=GIVEN, account="mine"))
    assert not (tmp_path / "pilots").exists()


def test_shellcheck_takes_them(found, tmp_path):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; CI installs it")
    made = pilots.write(tmp_path / "pilots", found, Request(recipe="quickstart", site="jupiter", overrides=GIVEN, account="mine"))
    subprocess.run(["shellcheck", *made.folder.glob("*.sh")], check=True)


def test_the_clock_decides(found, tmp_path):
    made = pilots.write(tmp_path / "pilots", found, Request(recipe="quickstart", site="jupiter", overrides=GIVEN, account="mine"))
    expected = [candidate.estimate.step_s for candidate in found.candidates]
    for run, step_s in zip(made.runs, (expected[0] * 1.1, expected[1] * 0.9), strict=False):  # the third has not run
        run.mkdir()
        rows = [{"step": 5, "step_s": 99.0}, {"step": 10, "step_s": 98.0}, *({"step": step, "step_s": step_s} for step in (15, 20, 25))]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 30, "st')
    timed = pilots.timed(made.folder)
    assert [one.step_s for one in timed] == [pytest.approx(expected[0] * 1.1), pytest.approx(expected[1] * 0.9), None]
    lines = pilots.decided(made.folder)
    assert lines[0].startswith("pilot 2  ")
    assert lines[1].startswith("pilot 1  ")
    assert lines[2] == "pilot 3  has not been timed"
    assert lines[3].startswith("the fastest: --set mesh.replicate=")
    (made.folder / "pilots.json").write_text("{}")
    with pytest.raises(RunError, match="is not what --pilots writes"):
        pilots.timed(made.folder)
    with pytest.raises(RunError, match=r"pilots\.json cannot be read"):
        pilots.timed(tmp_path / "none")


@pytest.mark.long
def test_a_pilot_runs_on_this_machine(tiny, tmp_path):
    """Where there is no scheduler the script runs them one after another, here one on a CPU."""
    recipe, site = load.recipe(tiny, ["train.microbatch=1"]), load.site("laptop")
    h100 = site.model_copy(update={"device": "cuda", "accelerator": "h100"})
    base = top.workload(recipe, h100, 1)
    found = search.search(base, Cluster("h100", 1, 1, (Level("scale_up", 1, 450.0),)), top=1)
    made = pilots.write(tmp_path / "pilots", found, Request(recipe=str(tiny), site="laptop"))
    ended = subprocess.run(["bash", made.start], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert pilots.timed(made.folder)[0].step_s is not None
    assert pilots.decided(made.folder)[0].startswith("pilot 1  ")
    assert not (made.runs[0] / "export").exists()
