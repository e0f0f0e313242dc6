"""The passes of a GPU: what is begun where there is none, and stages that are named wrongly. No stage is run."""

import pytest
from programs import program

from gigatrain import load


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    made = program("benchmarks/gpu.py")
    monkeypatch.setattr(made, "run", lambda stage, out: (stage.name, 0, 0.0, ""))
    monkeypatch.chdir(tmp_path)
    return made


@pytest.mark.parametrize(
    ("which", "instead"), [("check", "doctor"), ("kernels", "gigatrain bench kernels"), ("steps", "benchmarks/step.py")]
)
def test_without_a_gpu_nothing_is_begun(gpu, which, instead, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main([which, "--rows", "rows"]) == 7
    said = capsys.readouterr()
    assert f"{which} is for a GPU, and there is none" in said.err
    assert instead in said.err
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_a_stage_that_is_not_there_is_named(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(load, "local_site", lambda: (load.site("one-gpu"), "a test"))
    assert gpu.main(["steps", "--rows", "rows", "--only", "plan and run;powder"]) == 7
    assert "no stage of steps begins with 'powder'; there are step of one billion; plan and run;" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert gpu.main(["steps", "--rows", "rows", "--only", "plan and run;power"]) == 0
    assert [line.split(" s  ")[1].strip() for line in capsys.readouterr().out.splitlines()] == ["plan and run", "power"]
