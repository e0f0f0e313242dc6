"""What a step fuses (train.fuse, main_grads, release) gives the run that it gives without, on every mesh that carries it, and the same checkpoints."""

import pytest
import torch
from distributed import together
from test_meshes import BASE, batch, joined, on

from gigatrain import load
from gigatrain.checkpoint import Checkpoints, fill
from gigatrain.engines.native import Native
from gigatrain.kernels.linear import Linear
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
        if name.endswith(
            "k_proj.bias"
        ):  # it moves all scores of a query alike: its gradient is nothing but rounding errors, which AdamW makes 1
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


def products(engine):
    """Which layers are one product, by the last part of their names."""
    return {
        name.rpartition(".")[2]: layer.joined.whole_od.shape
        for name, layer in engine.model.model.layers["0"].named_modules()
        if isinstance(layer, Linear) and layer.joined is not None
    }


@pytest.mark.parametrize("overrides", [(), BF16, LEAN, (*BF16, *MUON), (*BF16, "kernels.adamw=reference")], ids=str)
def test_weights_of_one_product_are_views_of_one_matrix_and_stay_so_through_updates(tiny, overrides):
    engine = started(tiny, (*FUSE, *overrides))
    assert products(engine) == {"q_proj": (32 + 16 + 16, 32), "gate_proj": (96, 32)}
    stepped(engine, 2)
    attention = engine.model.model.layers["1"].self_attn
    whole = attention.q_proj.joined.whole_od
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(whole, torch.cat([part.data for part in parts]))
    assert {part.untyped_storage().data_ptr() for part in parts} == {whole.untyped_storage().data_ptr()}
    masters = engine.state()["weights"]
    for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
        held = masters[f"model.layers.1.self_attn.{name}.weight"].tensor
        assert torch.equal(held.to(part.dtype), part) or overrides == LEAN  # whose rounding is half away from zero
    assert set(dict(engine.model.named_parameters())) == set(dict(started(tiny, ()).model.named_parameters()))


def test_key_heads_that_ranks_share_stay_apart(tiny):
    assert together(2, shared_heads, tiny) == [{"gate_proj": (48, 32)}] * 2


def shared_heads(rank, recipe):
    return products(started(recipe, (*on(tensor=2), "model.architecture.kv_heads=1", *FUSE), rank, 2))


@pytest.mark.parametrize("overrides", [(), LEAN, (*BF16, *MUON)], ids=str)
@pytest.mark.parametrize("options", [FUSE, (*FUSE, *SUMS)], ids=str)
def test_a_run_may_switch_what_it_fuses_at_a_resume(tiny, tmp_path, overrides, options):
    """Written with, resumed without, and the other way round: the same names, boxes and bits in the file, and the same run after it."""
    kinds = {"with": (*overrides, *options), "without": overrides}
    assert len({made(tiny, kind).identity for kind in kinds.values()}) == 1
    for writer, reader in (("with", "without"), ("without", "with")):
        first, second = started(tiny, kinds[writer]), started(tiny, kinds[reader])
        stepped(first, 2)
        saves = Checkpoints(tmp_path / writer, run="r", plan_sha256="p", keep=1)
        saves.save(2, first.state(), {})
        fill(saves.latest()[0], second.state())
        second.restored()
        for group, named in first.state().items():
            assert named.keys() == second.state()[group].keys()
            assert all(torch.equal(piece.tensor, second.state()[group][name].tensor) for name, piece in named.items())
        # bf16 rounds dx of three products three times, and that of one once
        rel = 1e-6 if not overrides else 2e-2
        torch.testing.assert_close(torch.tensor(stepped(first, 1, 2)), torch.tensor(stepped(second, 1, 2)), rtol=rel, atol=0)


def gradients(engine, step=3):
    """Sums of one step's gradients, by name."""
    engine.forward_backward(batch(engine.plan, step, 0, 1))
    return {name: total.clone().double() for name, total in engine.grads.items()}


def test_gradients_summed_in_the_product_err_less_in_bf16(tiny):
    """Against the same bf16 activations, whose products are summed in fp64: today's rounds every microbatch's gradient to bf16 first."""
    settings = (*BF16, "train.microbatch=1", "kernels=reference")
    inputs = []
    engine = started(tiny, settings)
    for name, layer in engine.model.named_modules():
        if isinstance(layer, Linear):
            layer.register_full_backward_hook(lambda _, __, dy, name=name: inputs.append((name, dy[0].double())))
            layer.register_forward_hook(lambda layer, x, _: layer.__dict__.setdefault("seen", []).append(x[0].detach().double()))
    plain, exact = gradients(engine), {}
    for name, dy in inputs:
        x = engine.model.get_submodule(name).seen.pop(0)
        found = dy.flatten(0, -2).t() @ x.flatten(0, -2)
        exact[f"{name}.weight"] = exact.get(f"{name}.weight", 0) + found
    ours = gradients(started(tiny, (*settings, *SUMS)))
    assert len(exact) == 4 * 7
    for name, expected in exact.items():
        errors = [float((found[name] - expected).norm() / expected.norm()) for found in (ours, plain)]
        assert errors[0] < 1e-6 < errors[1] / 100, (name, errors)


def test_no_gradient_of_a_layers_matrix_exists_beside_its_sum(tiny):
    engine = started(tiny, (*SUMS, "train.microbatch=8"))
    engine.forward_backward(batch(engine.plan, 0, 0, 1))
    assert {name for name in engine.parameters if name not in engine._sums} == {
        name for name in engine.parameters if "norm" in name or "embed" in name
    }
    held = []
    engine._sum_gradients = lambda **_: held.extend(name for name, p in engine.parameters.items() if p.grad is not None)
    engine.forward_backward(batch(engine.plan, 0, 0, 1))
    assert not set(held) & set(engine._sums)
    size = sum(engine.parameters[name].numel() for name in engine._sums) * 4
    assert made(tiny, ("train.microbatch=8",)).memory.gradients - engine.plan.memory.gradients == size


def test_buckets_of_copies_leave_behind_the_backward(tiny):
    assert together(2, started_early, tiny) == [True, True]


def started_early(rank, recipe):
    engine = started(recipe, (*on(shard=1, replicate=2), *FUSE, *SUMS), rank, 2)
    engine.forward_backward(batch(engine.plan, 0, rank, 2))
    assert engine._copies is not None
    return all(waiting == {"started"} for waiting in engine._copies._waiting)
