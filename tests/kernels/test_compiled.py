"""Kernels compiled ahead of time for GPUs that are not here, in a process that does not interpret."""

import csv
import os
import subprocess
import sys

import pytest

from gigatrain.errors import KernelError
from gigatrain.kernels import compiled, launch, ops

FUSED = [name for name, operation in ops.OPERATIONS.items() if "fused" in operation.versions]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gigatrain.kernels.compiled", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The norms for a GPU of each maker."""
    path = tmp_path_factory.mktemp("compiled") / "table.csv"
    ended = run("--op", "rms_norm", "--targets", "sm_90,gfx942", "--csv", str(path), "--workers", "1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_launches_of_training_are_compiled(table: list[dict[str, str]]) -> None:
    assert {(row["kernel"], row["target"]) for row in table} == {
        (kernel, target) for kernel in ("_forward", "_backward", "_column_sum") for target in ("sm_90", "gfx942")
    }
    assert {row["size"].split(",")[0] for row in table if row["kernel"] == "_forward"} >= {"(4096", "(8192"}


def test_rows_of_4096_are_moved_by_16_bytes_and_nothing_spills(table: list[dict[str, str]]) -> None:
    for row in table:
        if row["size"].startswith("(4096,") and row["target"] == "sm_90":
            assert int(row["spills"]) == 0
            assert 0 < int(row["registers"]) <= 128
            assert int(row["loads"]) - int(row["wide_loads"]) <= 2  # rstd, of this turn and of the one that is loaded ahead
            assert int(row["stores"]) - int(row["wide_stores"]) <= 1


def test_an_interpreting_process_refuses() -> None:
    with pytest.raises(KernelError, match="a process without TRITON_INTERPRET"):
        next(compiled.survey(["rms_norm"], ["sm_90"]))


def test_an_unknown_target_is_refused_with_those_that_are() -> None:
    ended = run("--targets", "sm_42")
    assert ended.returncode == 2
    assert "no target is called sm_42; there are sm_80, sm_90, sm_100, gfx942" in ended.stderr


@pytest.mark.parametrize("op", FUSED)
def test_every_fused_operation_has_launches_to_compile(op: str) -> None:
    work = list(compiled.recordings(op, "sm_90", ops.OPERATIONS[op].sizes[:1]))
    assert work
    for made in work:
        assert "fp64" not in {made.signature[name] for name in made.signature}, "a scalar in fp64 halves the speed (Liger PR 1350)"


def test_recording_runs_nothing() -> None:
    import torch

    from gigatrain.kernels import rms_norm

    with launch.recorded(("sm_90",), 132) as launches:
        rms_norm.fused(torch.ones(4, 64), torch.ones(64), 1e-6, "llama")
    assert [made.kernel.fn.__name__ for made in launches] == ["_forward"]
    assert launches[0].options == {"num_warps": 4, "num_stages": 1}
