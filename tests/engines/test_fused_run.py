"""200 training steps of the loop on fused kernels, in Triton's interpreter, against the references: real text, real optimizer, the same data order."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from gigatrain import load, loop
from gigatrain.kernels.ops import OPERATIONS
from gigatrain.observe.display import Display
from gigatrain.planning.kernels import Choice
from gigatrain.planning.plan import plan

STEPS = 200


def losses(tiny, folder, fused, *overrides):
    """The loss of every step. A plan for a CPU has no fused kernels, so that those of a GPU are put in, for the interpreter."""
    settings = (
        "export=false",
        f"train.steps={STEPS}",
        "report.every=1",
        f"checkpoint.every={STEPS}",
        "validation.every=0",
        "train.batch=1",
        "model.architecture.layers=1",
        *overrides,
    )
    chosen = plan(load.recipe(tiny, settings), load.site("laptop"))
    if fused:
        better = [c.model_copy(update={"kernel": "fused"}) if "fused" in OPERATIONS[c.op].versions else c for c in chosen.kernels]
        assert all(isinstance(c, Choice) for c in better)
        chosen = chosen.model_copy(update={"kernels": tuple(better)})
    quiet = Display(Console(file=io.StringIO(), force_terminal=False))
    assert loop.train(chosen, folder, display=quiet) is not None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = np.array([line["loss"] for line in lines if "loss" in line])
    assert len(found) == STEPS
    return found


@pytest.mark.long
def test_200_steps_with_every_kernel_fused_stay_as_near_to_fp32_as_the_references(tiny, tmp_path):
    shape = ("model.architecture.family=qwen3", "train.recompute=lean")
    exact = losses(tiny, tmp_path / "exact", False, "kernels=reference", "train.precision=fp32", *shape)
    plain = losses(tiny, tmp_path / "plain", False, "kernels=reference", "train.precision=bf16", *shape)
    fused = losses(tiny, tmp_path / "fused", True, "train.precision=bf16", *shape)
    assert fused[-20:].mean() < fused[:20].mean() - 0.5  # it learns
    spread = [float(np.sqrt(np.mean((found - exact) ** 2))) for found in (plain, fused)]
    print(f"rms distance from fp32 over {STEPS} steps: references {spread[0]:.2e}, fused {spread[1]:.2e}; last loss {fused[-1]:.4f}")
    assert spread[1] <= 2 * spread[0]
