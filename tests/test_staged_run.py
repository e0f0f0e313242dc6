"""A pipeline's run goes on as any other: no rank holds every name of a checkpoint."""

import os
from pathlib import Path

import pytest
from distributed import together
from rich.console import Console

from gigatrain import load, loop, run
from gigatrain.engines.native import Native
from gigatrain.observe.display import Display
from gigatrain.planning.plan import plan

SETS = ("mesh.pipeline=2", "train.microbatch=1", "model.architecture.tied=false", "validation.every=0", "export=false", "train.nproc=2")


def trained(rank, recipe, folder, start, last):
    """One rank's run; None where every rank fails after `last` steps, as a node that is lost."""
    with pytest.MonkeyPatch.context() as patch, Path(os.devnull).open("w") as nowhere:
        if last is not None:
            step, made = Native.step, []

            def stepping(self, rate):
                if len(made) == last:
                    raise KeyboardInterrupt
                made.append(rate)
                return step(self, rate)

            patch.setattr(Native, "step", stepping)
        try:
            return loop.train(
                plan(load.recipe(recipe, list(SETS)), load.site("laptop"), 2), folder, start=start, display=Display(Console(file=nowhere))
            )
        except KeyboardInterrupt:
            return None


@pytest.mark.long
def test_a_pipeline_that_was_cut_short_goes_on_bitwise(tiny, tmp_path):
    whole = together(2, trained, str(tiny), tmp_path / "whole", "new", None)[0]
    assert together(2, trained, str(tiny), tmp_path / "cut", "new", 8) == [None, None]
    assert 3 <= run.checkpoints(tmp_path / "cut").steps()[-1] < 9
    resumed = together(2, trained, str(tiny), tmp_path / "cut", "resume", None)[0]
    assert resumed["weights_sha256"] == whole["weights_sha256"]
