"""What a step fuses (train.fuse, main_grads, release) gives the run that it gives without, on every mesh that carries it, and the same checkpoints."""

import pytest
import torch
from distributed import together
from test_meshes import BASE, batch, joined, on

from gigatrain import load
from gigatrain.checkpoint import Checkpoints, fill
from gigatrain.engines.native import Native
from gigatrain.errors import PlanError
from gigatrain.kernels.linear import Linear, Sum, beside
from gigatrain.models import hf
from gigatrain.optim.adamw import AdamW
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.planning.plan import plan

FUSE, SUMS = ("train.fuse=true",), ("train.main_grads=true",)
RELEASE = ("train.release=true", "train.microbatch=8", "optim.clip=false")
BF16 = ("train.precision=bf16",)
LEAN = (*BF16, "optim.master=bf16+8", "optim.moments=int8", "kernels.adamw=reference")
MUON = ("optim.name=muon", "optim.muon_lr=1e-3")
QWEN = ("model.architecture.family=qwen2", "model.architecture.qkv_bias=true")


def made(recipe, overrides, ranks=1):
    return plan(load.recipe(recipe, (*BASE, *overrides)), load.site("laptop"), ranks)


def started(recipe, overrides, rank=0, ranks=1):
    chosen = made(recipe, overrides, ranks)
    return Native(chosen, Mesh(chosen.mesh, rank) if ranks > 1 else alone(), torch.device("cpu"))


def stepped(engine, steps, first=0):
    numbers = []
    for step in range(first, first + steps):
        engine.forward_backward(batch(engine.plan, step, *engine.mesh.data))
        update = engine.step(0.5 + 0.1 * step)
        numbers.append((float(update.nats), float(update.targets), float(update.grad_norm)))
    return numbers


def trained(rank, recipe, overrides, ranks, steps):
    """Numbers of each step, and the boxes of weights that this rank writes."""
    engine = started(recipe, overrides, rank, ranks)
    numbers = stepped(engine, steps)
    return numbers, {name: (piece.place, piece.tensor.clone()) for name, piece in engine.state()["weights"].items() if piece.writes}


def same(found, expected, rel, atol):
    torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(expected[0]), rtol=rel, atol=0)
    whole, plain = joined([pieces for _, pieces in found]), {name: tensor for name, (_, tensor) in expected[1].items()}
    assert whole.keys() == plain.keys()
    for name, tensor in plain.items():
        if name.endswith("k_proj.bias"):  # it moves all scores of a query alike: its gradient is nothing but rounding errors, which AdamW makes 1
            continue
        error = (whole[name] - tensor).norm() / tensor.norm()
        assert error < rel * 5 or (whole[name] - tensor).abs().max() < atol, (name, error)


# Muon's iteration rounds to bf16 and blows rounding errors in empty directions up to full size: one step, and a few ulps of an entry of at most 1.2 lr.
@pytest.mark.parametrize(
    ("ranks", "overrides", "options"),
    [
        (1, (), FUSE),
        (1, (), SUMS),
        (1, (), (*FUSE, *SUMS)),
        (1, QWEN, (*FUSE, *SUMS)),
        (1, ("train.recompute=lean", "model.architecture.family=qwen3"), (*FUSE, *SUMS)),
        (1, ("train.recompute=selective",), (*FUSE, *SUMS)),
        (1, ("train.recompute=full",), (*FUSE, *SUMS)),
        (1, MUON, (*FUSE, *SUMS)),
        (2, on(shard=1, replicate=2), (*FUSE, *SUMS)),
        (2, (*on(shard=1, replicate=2), "train.microbatch=4"), (*FUSE, *SUMS)),
        (2, on(tensor=2), (*FUSE, *SUMS)),
        (2, (*on(tensor=2), "model.architecture.kv_heads=1"), (*FUSE, *SUMS)),
        (2, (*on(tensor=2), *MUON), FUSE),
        (2, on(pipeline=2), (*FUSE, *SUMS)),
        (4, (*on(pipeline=2, replicate=2, shard=1), "model.architecture.tied=false"), (*FUSE, *SUMS)),
    ],
    ids=str,
)
def test_a_fused_step_gives_the_run_of_a_plain_one(tiny, ranks, overrides, options):
    steps = 1 if MUON[0] in overrides else 4
    settings = (*overrides, *options)
    shape = tuple(one for one in overrides if not one.startswith(("mesh.", "train.recompute", "train.microbatch")))
    expected = trained(0, tiny, shape, 1, steps)
    found = [trained(0, tiny, settings, 1, steps)] if ranks == 1 else together(ranks, trained, tiny, settings, ranks, steps)
    same(found, expected, 1e-6, 4 * 1.2 * 1e-3 * 2**-8 if MUON[0] in overrides else 0)
