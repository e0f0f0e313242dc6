"""On every mesh and engine all ranks judge by the same global numbers and hold equal copies, and a spike or a flipped bit of one is everybody's."""

import math

import pytest
import torch
from distributed import together
from test_meshes import BASE, DEEPSEEK, MOE, UNTIED, batch, on

from gigatrain import engines, load
from gigatrain.engines.judge import REFUSED
from gigatrain.observe.hashes import Shared, differ
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.planning.plan import plan


def judged(rank, recipe, overrides, ranks):
    """Loss and norm of each step as this rank judged them; whether copies differ before and after a flip on the last rank; a spike's fate."""
    made = plan(load.recipe(recipe, (*BASE, "numerics.window=8", *overrides)), load.site("laptop"), ranks)
    mesh = Mesh(made.mesh, rank) if ranks > 1 else alone()
    engine, shared = engines.make(made, mesh, torch.device("cpu"), fresh=True), Shared(mesh)
    numbers = []
    for step in range(4):
        engine.forward_backward(batch(made, step, *mesh.data))
        update = engine.step(1.0)
        loss, norm, _ = engine.judge.numbers.tolist()
        assert loss == update.nats.item() / update.targets.item()
        assert norm == update.grad_norm.item()
        numbers.append((loss, norm))

    def differs():
        sums = torch.tensor(shared.sums(shared.hashes(engine.replicas())))
        return differ(mesh.sum(sums).tolist())

    equal, covered = not differs(), shared.covered(engine.replicas())
    engine.judge.past.copy_(torch.tensor([[1e-3], [1e-3]], dtype=torch.float64).expand(2, 8))  # after these, any step is a spike
    engine.judge.restored()
    before = {name: piece.tensor.clone() for name, piece in engine.state()["weights"].items()}
    engine.forward_backward(batch(made, 9, *mesh.data))
    engine.step(1.0)
    fate = engine.judge.fate.item()
    same = all(torch.equal(tensor, engine.state()["weights"][name].tensor) for name, tensor in before.items())
    mine = [one for one in engine.replicas() if mesh.size(*one.axes) > 1]
    if not mine:
        return numbers, equal, covered, fate, same, False
    if rank == ranks - 1:
        mine[0].tensor.reshape(-1).view(torch.uint8)[0] ^= 16
    return numbers, equal, covered, fate, same, differs()


CASES = [
    (2, on(shard=1, replicate=2)),
    (4, on(replicate=2)),
    (4, on(pipeline=2, tensor=2)),
    (2, ("engine.name=deepspeed", "engine.zero=2")),
    *(
        pytest.param(*one, marks=pytest.mark.long)
        for one in (
            (4, on(tensor=2)),
            (4, (*on(tensor=2, replicate=2), *UNTIED)),
            (4, on(context=2)),
            (4, on(pipeline=2, replicate=2)),
            (4, (*MOE, *on(expert=2, dispatch="gather", replicate=2))),
            (4, (*MOE, *on(expert=2, tensor=2))),
            (2, (*DEEPSEEK, *on(tensor=2))),
            (2, (*DEEPSEEK, *on(expert=2))),
            (4, ("optim.name=muon", "optim.muon_lr=1e-3", *on(tensor=2, replicate=2))),
            (
                2,
                ("train.precision=bf16", "optim.master=bf16+8", "optim.moments=int8", "kernels.adamw=reference", *on(shard=1, replicate=2)),
            ),
            (2, ("engine.offload=true",)),
            (2, ("engine.name=deepspeed", "engine.zero=1", "train.precision=bf16")),
            (2, ("engine.name=deepspeed", "engine.zero=3")),
        )
    ),
]


@pytest.mark.parametrize(("ranks", "overrides"), CASES, ids=str)
def test_all_ranks_judge_alike(tiny, ranks, overrides):
    found = together(ranks, judged, tiny, overrides, ranks)
    assert len({repr(numbers) for numbers, *_ in found}) == 1  # bit for bit
    kept = tuple(one for one in overrides if one.startswith(("model.", "optim.", "loss.", "train.", "kernels.")))
    for (loss, norm), (other_loss, other_norm) in (
        zip(found[0][0], judged(0, tiny, kept, 1)[0], strict=True) if "muon" not in str(overrides) else ()
    ):
        near = 2e-2 if "bf16" in str(overrides) else 1e-4
        assert math.isclose(loss, other_loss, rel_tol=near)
        assert math.isclose(norm, other_norm, rel_tol=5 * near)
    for _, equal, covered, fate, same, differs in found:
        assert equal
        assert covered > 0
        assert fate == REFUSED
        assert same
        assert differs
