"""ZeRO as an engine: what it must not leave behind, say, scale or write. That it gives the run of one process: test_meshes.py."""

import logging
import os
import signal
import sys
import warnings

import pytest
import torch
from distributed import together
from matrix import long_but
from test_meshes import BASE, batch

from gigatrain import engines, load
from gigatrain.checkpoint import Checkpoints, fill
from gigatrain.engines.native import Native
from gigatrain.errors import CheckpointError, RunError
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning.plan import plan

SECRET = "hf_doNotShowThisToken"


def started(rank, recipe, *overrides, name="deepspeed"):
    made = plan(load.recipe(recipe, (*BASE, f"engine.name={name}", *overrides)), load.site("laptop"), 2)
    mesh = Mesh(made.mesh, rank)
    return made, mesh, engines.make(made, mesh, torch.device("cpu"), fresh=True)


def world():
    """What a library might change behind our back."""
    return {
        "linear": torch.nn.functional.linear,
        "init": torch.nn.Linear.__init__,
        "tensor": torch.tensor,
        "empty": torch.empty,
        "all_reduce": torch.distributed.all_reduce,
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "root": (logging.root.level, tuple(logging.root.handlers)),
        "environment": dict(os.environ),
        "filters": tuple(map(str, warnings.filters)),
        "signals": [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
        "excepthook": sys.excepthook,
        "arguments": list(sys.argv),
        "threads": torch.get_num_threads(),
    }


def leaving(rank, recipe, zero, folder):
    os.environ["HF_TOKEN"] = SECRET
    os.chdir(folder)
    said = os.path.join(folder, f"said-{rank}")
    kept = os.dup(1), os.dup(2)
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    before = world()
    made, mesh, engine = started(rank, recipe, f"engine.zero={zero}", "train.precision=bf16")
    engine.forward_backward(batch(made, 0, *mesh.data))
    engine.step(1.0)
    after = world()
    sys.stdout.flush()
    os.dup2(kept[0], 1)
    os.dup2(kept[1], 2)
    with open(said) as file:
        text = file.read()
    return [key for key in before if before[key] != after[key]], text


@pytest.mark.parametrize("zero", long_but([1], [1, 3]))
def test_it_changes_nothing_around_it_and_says_nothing(tiny, zero, tmp_path):
    for changed, text in together(2, leaving, tiny, zero, str(tmp_path)):
        assert changed == []
        assert SECRET not in text
        assert text == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said-0", "said-1"]  # none of its files: no `latest`, no checkpoint


def norms(rank, recipe, name, zero):
    made, mesh, engine = started(rank, recipe, f"engine.zero={zero}", "train.precision=bf16", name=name)
    found = []
    for step in range(3):
        engine.forward_backward(batch(made, step, *mesh.data))
        found.append(engine.step(1.0).grad_norm.item())
    return found


@pytest.mark.long
def test_bf16_gradients_have_their_size(tiny):
    """DeepSpeed PR #7839: bf16 gradients were divided by 65,536 where nothing said so, which AdamW hides but clipping does not."""
    expected = together(2, norms, tiny, "native", 3)[0]
    for zero in (1, 2, 3):
        assert together(2, norms, tiny, "deepspeed", zero)[0] == pytest.approx(expected, rel=0.02), zero


def poisoned(rank, recipe, zero):
    made, mesh, engine = started(rank, recipe, f"engine.zero={zero}")
    engine.forward_backward(batch(made, 0, *mesh.data))
    engine.step(1.0)
    before = {(group, name): piece.tensor.clone() for group, named in engine.state().items() for name, piece in named.items()}
    engine.forward_backward(batch(made, 1, *mesh.data))
    if rank == 1:
        engine.loss.fill_(float("nan"))  # type: ignore[attr-defined] (of one rank alone)
    update = engine.step(1.0)
    after = {(group, name): piece.tensor.clone() for group, named in engine.state().items() for name, piece in named.items()}
    moved = [key for key in before if key[1] not in ("bad", "steps") and not torch.equal(before[key], after[key])]
    engine.forward_backward(batch(made, 2, *mesh.data))
    engine.step(1.0)
    return moved, engine.bad.tolist(), torch.isfinite(update.grad_norm).item()


@pytest.mark.parametrize("zero", long_but([2], [1, 2, 3]))
def test_a_loss_that_is_not_finite_on_one_rank_moves_nothing_on_any(tiny, zero):
    for moved, bad, finite in together(2, poisoned, tiny, zero):
        assert moved == []
        assert bad == [1, 0, 1, 1]
        assert finite  # the gradient was


def switching(rank, recipe, zero, folder):
    """Two steps native, saved; two more under ZeRO, beside two more native."""
    from pathlib import Path

    def saves(mesh):
        return Checkpoints(Path(folder), run="r", plan_sha256="p", keep=2, mesh=mesh)

    made, mesh, native = started(rank, recipe, name="native")
    for step in range(2):
        native.forward_backward(batch(made, step, *mesh.data))
        native.step(1.0)
    kept = saves(mesh)
    kept.save(2, native.state(), {})
    _, _, other = started(rank, recipe, f"engine.zero={zero}")
    fill(saves(mesh).latest()[0], other.state())
    other.restored()
    losses = []
    for step in range(2, 4):
        for engine in (native, other):
            engine.forward_backward(batch(made, step, *mesh.data))
            losses.append(engine.step(1.0).nats.item())
    kept.save(4, other.state(), {})
    again = Native(made.model_copy(update={"engine": made.engine.model_copy(update={"name": "native"})}), mesh, torch.device("cpu"))
    fill(saves(mesh).latest()[0], again.state())
    again.restored()
    for engine in (native, again):
        engine.forward_backward(batch(made, 4, *mesh.data))
        losses.append(engine.step(1.0).nats.item())
    return losses


@pytest.mark.parametrize("zero", long_but([1], [1, 3]))
def test_one_run_goes_from_fsdp_to_zero_and_back(tiny, zero, tmp_path):
    for losses in together(2, switching, tiny, zero, str(tmp_path)):
        assert losses[1::2] == pytest.approx(losses[0::2], rel=1e-6)


def missing(rank, recipe, folder):
    from pathlib import Path

    mesh = Mesh(started(rank, recipe, "engine.zero=2")[0].mesh, rank)
    with pytest.raises(CheckpointError, match="holds no committed checkpoint"):
        Checkpoints(Path(folder), run="r", plan_sha256="p", keep=2, mesh=mesh).latest()
    return True


def test_a_missing_checkpoint_is_an_error_and_never_a_fresh_start(tiny, tmp_path):
    assert together(2, missing, tiny, str(tmp_path)) == [True, True]


def without(rank, recipe):
    sys.modules["deepspeed"] = None  # type: ignore[assignment]
    with pytest.raises(RunError, match=r"pip install 'gigatrain\[deepspeed\]'"):
        started(rank, recipe)
    return True


def test_its_absence_names_the_command(tiny):
    assert together(2, without, tiny) == [True, True]
