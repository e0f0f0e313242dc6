"""A run with an adapter is one run on every mesh and engine; frozen weights have no gradient, no state, and stand in no checkpoint."""

import pytest
import torch
from distributed import together
from test_meshes import BASE, MOE, batch, joined, on, trained

from gigatrain import engines, load
from gigatrain.engines.native import Native
from gigatrain.parallel.mesh import Mesh, alone
from gigatrain.planning.plan import plan

LORA = (*BASE, "adapter.rank=4", "adapter.alpha=8.0", "adapter.dropout=0.1")
DORA = (*LORA, "adapter.kind=dora", "adapter.targets=['q_proj','mlp.up_proj','o_proj']", "adapter.train_head=true")
NF4 = (
    *LORA,
    "adapter.quantise=nf4",
    "model.architecture.hidden=64",
    "model.architecture.intermediate=64",
    "model.architecture.head_dim=16",
)
STEPS = 6


@pytest.fixture(scope="module")
def single():
    return {}


ZERO = "engine.name=deepspeed"
CASES = [
    (2, LORA, on(shard=2)),
    (2, NF4, on(shard=2)),
    (2, LORA, (ZERO, "engine.zero=2")),
    (2, LORA, (ZERO, "engine.zero=3")),  # nothing before the first layer has a gradient
    (1, LORA, ("train.recompute=full",)),
    *(
        pytest.param(*case, marks=pytest.mark.long)
        for case in (
            (2, DORA, on(shard=2)),
            (2, LORA, on(replicate=2, shard=1)),
            (2, (*LORA, *MOE), on(shard=2)),
            (2, LORA, on(shard=1, context=2)),
            (2, DORA, (ZERO, "engine.zero=1")),
            (2, DORA, (ZERO, "engine.zero=3")),
            (2, (*LORA, "model.architecture.tied=false"), (ZERO, "engine.zero=3", "train.recompute=full")),
            (1, DORA, ("train.recompute=selective",)),
            (1, LORA, ("train.recompute=lean",)),
        )
    ),
]


@pytest.mark.parametrize(("ranks", "base", "overrides"), CASES)
def test_every_mesh_and_engine_gives_the_run_of_one_process(tiny, single, ranks, base, overrides):
    if ranks > 1:  # dropout's masks are of who reads
        base = (*base, "adapter.dropout=0.0")
    if base not in single:
        (single[base],) = together(1, trained, tiny, base, 1, STEPS)
    numbers, pieces, held = single[base]
    found = together(ranks, trained, tiny, (*base, *overrides), ranks, STEPS)
    torch.testing.assert_close(torch.tensor(found[0][0]), torch.tensor(numbers), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found[0][2]), torch.tensor(held), rtol=2e-5, atol=0)
    whole = joined([one for _, one, _ in found])
    assert whole.keys() == pieces.keys()
    assert all(".lora_" in name or (name.startswith("model.embed") and base[: len(DORA)] == DORA) for name in whole)
    for name, (_, tensor) in pieces.items():
        assert (whole[name] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-6, name


def started(rank, recipe, overrides, ranks):
    made = plan(load.recipe(recipe, overrides), load.site("laptop"), ranks)
    engine = engines.make(made, Mesh(made.mesh, rank) if ranks > 1 else alone(), torch.device("cpu"), fresh=True)
    assert isinstance(engine, Native)
    return engine


@pytest.mark.parametrize("overrides", [(), ("train.precision=bf16",)])
def test_frozen_weights_have_no_gradient_no_master_and_no_moment(tiny, overrides):
    engine = started(0, tiny, (*LORA, *overrides), 1)
    assert engine.frozen.keys() & engine.grads.keys() == set()
    size = 2 if overrides else 4
    assert all(parameter.element_size() == size for parameter in engine.frozen.values())
    held = sum(group.grads.buffer.numel() for group in engine.groups)
    assert held == sum(p.numel() for name, p in engine.model.named_parameters() if ".lora_" in name)
    assert all(".lora_" in name for name in engine.state()["weights"])


def test_frozen_shards_are_as_narrow_as_what_computes(tiny):
    """In bf16 beside fp32 masters of the adapters, which FSDP2 gathers in one transfer; the loss is that of one process within bf16."""
    narrow = (*LORA, "adapter.dropout=0.0", "train.precision=bf16")
    found = together(2, widths, tiny, (*narrow, "mesh.shard=2"))
    assert {dtype for _, kinds in found for dtype in kinds} == {"torch.bfloat16"}
    (whole,) = together(1, widths, tiny, narrow)
    assert found[0][0] == pytest.approx(whole[0], rel=2e-3)


def widths(rank, recipe, overrides):
    ranks = 2 if "mesh.shard=2" in overrides else 1
    engine = started(rank, recipe, overrides, ranks)
    losses = []
    for step in range(3):
        engine.forward_backward(batch(engine.plan, step, *engine.mesh.data))
        update = engine.step(1.0)
        losses.append(float(update.nats / update.targets))
    return losses, [str(parameter.dtype) for parameter in engine.frozen.values()]


@pytest.mark.long
@pytest.mark.parametrize("more", [(), ("adapter.kind=dora", "train.recompute=selective")], ids=["lora", "dora"])
def test_compiled_layers_with_adapters_are_those_of_eager(tiny, monkeypatch, more):
    """One graph a layer, forward and backward, in which the adapter is plain products; the graphs run by eager's operations."""
    compiled, backends = torch.nn.Module.compile, []

    def traced(self, **named):
        backends.append(named)
        return compiled(self, backend="aot_eager", **named)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    base = (*BASE, "adapter.rank=4", "adapter.alpha=8.0", "model.architecture.layers=2", "train.microbatch=8", *more)
    (numbers, pieces, held), (found, same, alike) = (trained(0, tiny, (*base, *also), 1, 3) for also in ((), ("train.compile=true",)))
    assert backends == [{"fullgraph": True}] * 2
    torch.testing.assert_close(torch.tensor(found), torch.tensor(numbers), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(alike), torch.tensor(held), rtol=2e-5, atol=0)
    for name, (_, tensor) in pieces.items():
        assert (same[name][1] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-6, name
