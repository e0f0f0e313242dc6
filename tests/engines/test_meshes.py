"""One truth: the same recipe on every mesh gives the run of one process."""

import pytest
import torch
from distributed import together
from torch import Tensor

from gigatrain import load
from gigatrain.data.loader import Batch, Microbatch
from gigatrain.engines.native import Native
from gigatrain.optim.muon import Muon
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.planning.plan import plan

T, VOCAB = 32, 320


def batch(made, step, rank, ranks):
    """This reader's share of a step: rows of unequal counts of targets."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (made.batch, T), generator=generator)
    labels = torch.randint(VOCAB, (made.batch, T), generator=generator)
    labels[torch.rand(made.batch, T, generator=generator) < 0.4] = -100
    each = made.batch // ranks
    mine = slice(rank * each, (rank + 1) * each)
    tokens, labels = tokens[mine], labels[mine]
    parts = tuple(
        Microbatch(tokens[at : at + made.microbatch], labels[at : at + made.microbatch], torch.arange(T).expand(len(tokens[at : at + made.microbatch]), T), None)
        for at in range(0, each, made.microbatch)
    )
    return Batch(parts, int((labels >= 0).sum()), made.batch * T, range(step * made.batch, (step + 1) * made.batch))


def trained(rank, recipe, overrides, ranks, steps=20):
    """Losses, norms and the whole final weights of a run of synthetic steps."""
    made = plan(load.recipe(recipe, overrides), load.site("laptop"), ranks)
    mesh = Mesh(made.mesh, rank) if ranks > 1 else alone()
    engine = Native(made, mesh, torch.device("cpu"))
    numbers = []
    for step in range(steps):
        engine.forward_backward(batch(made, step, *mesh.data))
        update = engine.step(1.0)
        numbers.append((update.nats.item() / update.targets.item(), update.grad_norm.item(), update.targets.item()))
    pieces = {name: (piece.place, piece.tensor.clone()) for name, piece in engine.state()["weights"].items() if piece.writes}
    held = engine.evaluate(batch(made, 99, *mesh.data).microbatches).tolist()
    return numbers, pieces, held


def joined(pieces) -> dict[str, Tensor]:
    """Whole tensors from every rank's boxes, each element exactly once."""
    found: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for rank in pieces:
        for name, (place, tensor) in rank.items():
            place.of(found.setdefault(name, torch.zeros(place.shape))).copy_(tensor)
            place.of(counts.setdefault(name, torch.zeros(place.shape))).add_(1)
    assert all(bool((count == 1).all()) for count in counts.values())
    return found


@pytest.fixture(scope="module")
def alone_runs():
    return {}


BASE = ("train.batch=8", "train.microbatch=1", "optim.clip=0.5", "optim.lr=1e-3")


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ()),
        (2, ("mesh.shard=1", "mesh.replicate=2")),
        (4, ("mesh.replicate=2",)),
        (2, ("engine.reshard=false", "engine.prefetch=2")),
        (2, ("engine.offload=true",)),
        (2, ("train.recompute=full",)),
        (2, ("train.recompute=lean",)),
        (2, ("train.recompute=selective",)),
        (4, ("train.microbatch=2", "model.architecture.tied=false")),
    ],
)
def test_a_mesh_gives_the_run_of_one_process(tiny, alone_runs, ranks, overrides):
    settings = (*BASE, *overrides)
    key = tuple(one for one in settings if one.startswith("model."))
    if key not in alone_runs:
        alone_runs[key] = trained(0, tiny, (*BASE, *key), 1)
    expected = alone_runs[key]
    found = together(ranks, trained, tiny, settings, ranks)
    for numbers, _, held in found:
        torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected[0]), rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.tensor(held), torch.tensor(expected[2]), rtol=1e-6, atol=0)
    whole = joined([pieces for _, pieces, _ in found])
    for name, (_, tensor) in expected[1].items():
        error = (whole[name] - tensor).norm() / tensor.norm()
        assert error < 1e-6, (name, error)
