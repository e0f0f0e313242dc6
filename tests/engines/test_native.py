"""The engine against plain torch: gradients, updates, and what never reaches the weights."""

from collections import Counter

import pytest
import torch

from gigatrain import load
from gigatrain.checkpoint import Checkpoints, fill
from gigatrain.data.loader import Batch, Microbatch
from gigatrain.engines.native import Native
from gigatrain.errors import PlanError, RecipeError
from gigatrain.kernels.ops import available
from gigatrain.models.decoder import Decoder, decays
from gigatrain.optim.adamw import AdamW
from gigatrain.parallel.mesh import alone
from gigatrain.planning import cost
from gigatrain.planning.kernels import Choice
from gigatrain.planning.plan import plan

VOCAB, T = 320, 16


def engine(tiny, *overrides):
    wide = ("model.init.std=0.2", "model.init.scale_residual=false", "train.seed=5")
    return started(plan(load.recipe(tiny, (*wide, *overrides)), load.site("laptop")))


def started(chosen):
    """The engine over the references of the model's operations, so that it alone is compared with plain torch."""
    plain = tuple(choice.model_copy(update={"kernel": "reference"}) if choice.op in available() else choice for choice in chosen.kernels)
    return Native(chosen.model_copy(update={"kernels": plain}), alone(), torch.device("cpu"))


def rows(count, seed=0, ignored=0.0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (count, T), generator=generator)
    labels = torch.randint(VOCAB, (count, T), generator=generator)
    labels[torch.rand(count, T, generator=generator) < ignored] = -100
    return Microbatch(tokens, labels, torch.arange(T).expand(count, T), None)


def batch(*parts):
    return Batch(parts, sum(int((part.labels >= 0).sum()) for part in parts), sum(part.tokens.numel() for part in parts), range(4))


def cut(whole, *sizes):
    """The same rows in microbatches of other sizes."""
    parts, start = [], 0
    for size in sizes:
        at = slice(start, start + size)
        parts.append(Microbatch(whole.tokens[at], whole.labels[at], whole.positions[at], None))
        start += size
    return parts


def weights(found):
    return {name: piece.tensor.clone() for name, piece in found.state()["weights"].items()}


def tensors(found, group):
    return {name: piece.tensor for name, piece in found.state()[group].items()}


def stepping(found, parts, rate=1.0):
    """`(sum of cross entropies, norm)` of one step."""
    found.forward_backward(parts)
    update = found.step(rate)
    return update.nats, update.grad_norm


def worst(a, b):
    return max(float((a[name] - b[name]).detach().abs().max()) for name in a)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("sizes", [(3, 5), (1, 2, 5), (1,) * 8, (7, 1)])
def test_microbatches_of_unequal_length_give_the_update_of_one_big_batch(tiny, sizes, optim):
    """Rows have very different counts of targets, so that a mean of means would be wrong."""
    whole = rows(8, ignored=0.5)
    whole.labels[0, 1:] = -100
    whole.labels[5:] = -100
    whole.labels[5, 3] = 7
    one, many = engine(tiny, f"optim.name={optim}"), engine(tiny, f"optim.name={optim}")
    for _ in range(3 if optim == "adamw" else 1):  # Muon's iteration rounds to bf16, so its second step starts from other weights
        (loss_one, norm_one), (loss_many, norm_many) = stepping(one, batch(whole)), stepping(many, batch(*cut(whole, *sizes)))
        torch.testing.assert_close(loss_one, loss_many, rtol=1e-6, atol=0)
        torch.testing.assert_close(norm_one, norm_many, rtol=1e-5, atol=0)
    # An entry of Muon's update is at most 1.2 lr; a rounding that flips in bf16 (2^-8) moves it by a few such ulps.
    assert worst(weights(one), weights(many)) < (2e-6 if optim == "adamw" else 4 * 1.2 * 0.02 * 2**-8)


def test_updates_are_those_of_torch_adamw(tiny):
    """Judged against fp64: AdamW divides a gradient by its size, so that two right fp32 programs differ by some 5e-6 here, more or less by processor."""
    found = engine(tiny, "optim.clip=0.5", "optim.weight_decay=0.3")
    peers = []
    for dtype in (torch.float32, torch.float64):
        model = Decoder(found.model.arch)
        model.load_state_dict({name: tensor.clone() for name, tensor in found.model.state_dict().items()})
        model.to(dtype)
        groups = [
            {"params": [p for n, p in model.named_parameters() if decays(n)], "weight_decay": 0.3},
            {"params": [p for n, p in model.named_parameters() if not decays(n)], "weight_decay": 0.0},
        ]
        peers.append((model, torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)))
    for seed in range(5):
        part = rows(4, seed, ignored=0.2)
        found.forward_backward(batch(part))
        norm = found.step(1.0).grad_norm
        assert norm > 0.5  # so that clipping acts
        for model, peer in peers:
            logits = model.logits(part.tokens)
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), part.labels.flatten()).backward()
            expected = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            torch.testing.assert_close(norm, expected.float(), rtol=1e-5, atol=0)
            peer.step()
            peer.zero_grad()
    plain, exact = (dict(model.named_parameters()) for model, _ in peers)
    ours, theirs = (
        sum(float((held[name] - value).detach().square().sum()) for name, value in exact.items()) ** 0.5 for held in (weights(found), plain)
    )
    assert ours <= 2 * theirs < 1e-3


def test_weight_decay_reaches_matrices_only(tiny):
    found = engine(tiny, "optim.weight_decay=0.5", "optim.lr=0.1")
    before = weights(found)
    part = rows(2)
    part.labels.fill_(-100)  # no target: the gradient is zero, so whatever moves was decayed
    found.forward_backward(batch(part))
    found.step(1.0)
    for name, tensor in weights(found).items():
        expected = before[name] * (1 - 0.1 * 0.5) if decays(name) else before[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=0)
    assert any(decays(name) for name in before)
    assert not all(decays(name) for name in before)


def test_bf16_keeps_what_is_below_an_ulp_in_the_master_weights(tiny):
    found = engine(tiny, "train.precision=bf16", "optim.lr=1e-6", "optim.weight_decay=0.0")
    start, rounded = weights(found), {name: p.detach().clone() for name, p in found.model.named_parameters()}
    assert all(p.dtype == torch.bfloat16 for p in found.model.parameters())
    for seed in range(20):
        found.forward_backward(batch(rows(2, seed)))
        found.step(1.0)
    name = "model.layers.0.self_attn.q_proj.weight"
    moved = (tensors(found, "weights")[name] - start[name]).abs()
    assert moved.median() > 2e-6
    assert (found.parameters[name] == rounded[name]).float().mean() > 0.9  # a bf16 weight alone would have lost those updates
    torch.testing.assert_close(found.parameters[name], tensors(found, "weights")[name].bfloat16(), rtol=0, atol=0)


def test_bf16_sums_gradients_of_microbatches_in_fp32(tiny):
    """1 + 2^-9 is 1 in bf16: eight hundred microbatches would stall."""
    found = engine(tiny, "train.precision=bf16")
    name = "model.norm.weight"
    found.parameters[name].grad = torch.ones_like(found.parameters[name])
    found._sum_gradients(first=True)
    for _ in range(800):
        found.parameters[name].grad = torch.full_like(found.parameters[name], 2**-9)
        found._sum_gradients(first=False)
    assert found.grads[name].eq(1 + 800 / 512).all()
    assert found.grads["model.embed_tokens.weight"].eq(0).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_step_reaches_nothing_and_is_counted(tiny, precision, optim, poison):
    found = engine(tiny, f"train.precision={precision}", f"optim.name={optim}")
    found.forward_backward(batch(rows(2)))
    found.step(1.0)
    before = {group: {n: p.tensor.clone() for n, p in named.items()} for group, named in found.state().items()}
    clean = rows(2, 1)
    name = "model.layers.1.mlp.up_proj.weight"
    kept = found.parameters[name].data.clone()
    found.parameters[name].data[0, 0] = poison  # as a flipped exponent bit would
    found.forward_backward(batch(clean))
    found.parameters[name].data.copy_(kept)
    norm = found.step(1.0).grad_norm
    assert not torch.isfinite(norm)
    after = found.state()
    for tensor_name, tensor in before["weights"].items():
        assert torch.equal(tensor, after["weights"][tensor_name].tensor)
    for tensor_name, tensor in before["optimizer"].items():
        if tensor_name not in ("bad", "steps"):
            assert torch.equal(tensor, after["optimizer"][tensor_name].tensor)
    assert found.bad.tolist() == [1, 1, 1, 1]  # one in all, one in a row, and it was update 1
    found.forward_backward(batch(clean))
    found.step(1.0)
    assert found.bad.tolist() == [1, 0, 1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in tensors(found, "weights").values())
    assert not torch.equal(before["weights"][name], tensors(found, "weights")[name])


def test_the_longest_row_of_refused_steps_names_its_first(tiny):
    found = engine(tiny)
    for finite in (True, False, True, False, False, False, True, False, False):
        found.judge.verdict(torch.tensor(2.0), torch.tensor(1.0), torch.tensor(float(not finite)), torch.tensor(2.0))
        found.judge.count()
    assert found.bad.tolist() == [6, 2, 3, 3]


def test_z_loss_is_in_the_gradient_and_not_in_the_reported_loss(tiny):
    plain, with_z = engine(tiny), engine(tiny, "loss.z_loss=0.1")
    part = rows(2)
    plain.forward_backward(batch(part))
    with_z.forward_backward(batch(part))
    assert torch.equal(plain._nats, with_z._nats)
    model = Decoder(plain.model.arch)
    model.load_state_dict({name: tensor.clone() for name, tensor in plain.model.state_dict().items()})
    logits = model.logits(part.tokens).double()
    lse = torch.logsumexp(logits, -1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part.labels.flatten()) + 0.1 * lse.square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(with_z.grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(tiny, recompute):
    plain, lean = engine(tiny), engine(tiny, f"train.recompute={recompute}")
    for found in (plain, lean):
        found.model.recompute = found.plan.recompute
        found.forward_backward(batch(rows(3)))
    assert all(torch.equal(plain.grads[name], lean.grads[name]) for name in plain.grads)


def test_evaluation_counts_targets_and_leaves_no_gradient(tiny):
    found = engine(tiny)
    parts = [rows(3, 1, ignored=0.3), rows(2, 2)]
    nats, targets = found.evaluate(parts).tolist()
    expected = sum(
        float(torch.nn.functional.cross_entropy(found.model.logits(p.tokens).flatten(0, 1), p.labels.flatten(), reduction="sum"))
        for p in parts
    )
    assert nats == pytest.approx(expected, rel=1e-5)
    assert targets == sum(int((p.labels >= 0).sum()) for p in parts)
    assert all(p.grad is None for p in found.model.parameters())


def test_restored_state_continues_bitwise(tiny):
    for precision, optim in (("bf16", "muon"), ("fp32", "adamw")):
        first = engine(tiny, f"train.precision={precision}", f"optim.name={optim}")
        for seed in range(3):
            first.forward_backward(batch(rows(2, seed)))
            first.step(1.0)
        second = engine(tiny, f"train.precision={precision}", f"optim.name={optim}")
        for group, named in first.state().items():
            for name, piece in second.state()[group].items():
                piece.tensor.copy_(named[name].tensor)
        second.restored()
        for seed in range(3, 6):
            for found in (first, second):
                found.forward_backward(batch(rows(2, seed)))
                found.step(0.5)
        assert all(torch.equal(tensors(first, "weights")[name], tensor) for name, tensor in tensors(second, "weights").items())
        assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_dropout_follows_from_seed_step_and_microbatch_alone(tiny):
    def losses(*overrides, microbatches=2):
        found = engine(tiny, "train.dropout=0.3", *overrides)
        whole = rows(4)
        parts = batch(*cut(whole, *(4 // microbatches,) * microbatches))
        return [float(stepping(found, parts, 0.0)[0]) for _ in range(2)]

    first = losses("train.microbatch=2")
    assert first == losses("train.microbatch=2")
    assert first[0] != first[1]  # another step, other masks: the weights have not moved
    assert first != losses("train.microbatch=2", "train.seed=7")


def test_validation_knows_neither_dropout_nor_smoothing(tiny):
    plain, noisy = (engine(tiny, *more).evaluate([rows(4)]) for more in ((), ("train.dropout=0.5", "loss.label_smoothing=0.2")))
    assert torch.equal(plain, noisy)


def test_label_smoothing_is_that_of_torch(tiny):
    smooth = engine(tiny, "loss.label_smoothing=0.2", "kernels=reference")
    whole = rows(3)
    smooth.forward_backward(batch(whole))
    logits = smooth.model.logits(whole.tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole.labels.flatten(), label_smoothing=0.2)
    torch.testing.assert_close(smooth.loss, expected.detach())


LEAN = ["train.precision=bf16", "optim.master=bf16+8", "optim.moments=int8"]
FORMS = [("fp32", "int8"), ("bf16+16", "fp32"), ("bf16+16", "bf16"), ("bf16+8", "int8")]


def form(master, moments):
    return ["train.precision=bf16", f"optim.master={master}", f"optim.moments={moments}"]


def buckets(found):
    return [group.bucket for group in found.groups if isinstance(group, AdamW)]


def stepped(found, seeds, rate=1.0):
    losses = []
    for seed in seeds:
        part = rows(4, seed % 4)
        losses.append(float(stepping(found, batch(part), rate)[0]))
    return losses


def test_lean_weights_are_the_only_ones_and_the_parameters_are_they(tiny):
    found = engine(tiny, *LEAN)
    for group in found.groups:
        assert isinstance(group, AdamW)
        assert group.bucket.weight.dtype == torch.bfloat16
        assert group.bucket.correction is not None
        assert group.bucket.correction.dtype == torch.int8
        assert group.grads.buffer.dtype == torch.bfloat16  # one microbatch a step: nothing is summed
        for name in group.shapes:
            parameter = found.parameters[name]
            assert parameter.untyped_storage().data_ptr() == group.bucket.weight.untyped_storage().data_ptr()
            assert parameter.numel() % 8 or parameter.data_ptr() % 16 == 0
    assert found._rounded == []
    several = engine(tiny, *LEAN, "train.microbatch=2")
    assert {group.grads.buffer.dtype for group in several.groups} == {torch.float32}


@pytest.mark.parametrize(("master", "moments"), FORMS)
def test_narrow_states_learn_as_fp32_does(tiny, master, moments):
    plain, narrow = engine(tiny, "train.precision=bf16"), engine(tiny, *form(master, moments))
    expected, found = stepped(plain, range(24)), stepped(narrow, range(24))
    assert expected[-1] < expected[0] - 50  # nats of 64 targets
    assert found == pytest.approx(expected, rel=0.02)  # four rows learned by heart, which magnifies every difference
    way = {name: (tensor - weights(engine(tiny))[name]).norm() for name, tensor in weights(plain).items()}
    for name, tensor in weights(narrow).items():
        assert (tensor - weights(plain)[name]).norm() < 0.12 * way[name]


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize(("master", "moments"), FORMS)
def test_a_checkpoint_of_narrow_states_continues_bitwise(tiny, tmp_path, master, moments, optim):
    """In fp32 on disk, so that any form can take it up; in its own form to the same bits."""
    overrides = [*form(master, moments), f"optim.name={optim}"]
    first, second = engine(tiny, *overrides), engine(tiny, *overrides)
    stepped(first, range(3))
    saves = Checkpoints(tmp_path, run="r", plan_sha256="p", keep=1)
    saves.save(3, first.state(), {})
    stepped(second, range(2), 0.5)  # what the load replaces
    live = second.state()
    assert all(piece.tensor.dtype == torch.float32 for piece in live["weights"].values())
    fill(saves.latest()[0], live)
    second.restored()
    for found in (first, second):
        stepped(found, range(3, 6), 0.5)
    for group, named in first.state().items():
        assert all(torch.equal(piece.tensor, second.state()[group][name].tensor) for name, piece in named.items())
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    plain = engine(tiny, "train.precision=bf16", f"optim.name={optim}")
    fill(saves.latest()[0], plain.state())
    plain.restored()
    assert torch.isfinite(torch.tensor(stepped(plain, range(3, 5)))).all()


def test_saving_changes_nothing_and_its_copies_are_gone_with_the_next_step(tiny):
    saving, other = engine(tiny, *LEAN), engine(tiny, *LEAN)
    for seed in range(4):
        stepped(other, [seed])
        state = saving.state()
        name = "model.norm.weight"
        assert state["weights"][name].tensor.data_ptr() == saving.state()["weights"][name].tensor.data_ptr()
        stepped(saving, [seed])
        assert all(isinstance(group, AdamW) and group._taken is None for group in saving.groups)
    assert worst(weights(saving), weights(other)) == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_step_reaches_nothing_in_the_lean_form(tiny, poison):
    found = engine(tiny, *LEAN)
    stepped(found, range(2))
    before = [tensor.clone() for bucket in buckets(found) for tensor in vars(bucket).values() if tensor is not None]
    found.forward_backward(batch(rows(2, 1)))
    found.groups[0].grads.buffer[3] = poison
    assert not torch.isfinite(found.step(1.0).grad_norm)
    after = [tensor for bucket in buckets(found) for tensor in vars(bucket).values() if tensor is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert found.bad.tolist() == [1, 1, 1, 2]


def test_the_fused_kernels_train_as_plain_torch_does(tiny):
    for overrides in (LEAN, ["train.precision=bf16"], ["train.precision=fp32"]):
        losses = {}
        for version in ("reference", "fused"):
            chosen = plan(load.recipe(tiny, ["model.init.std=0.2", *overrides]), load.site("laptop"))
            kept = tuple(choice for choice in chosen.kernels if choice.op not in ("adamw", "grad_norm"))
            ours = tuple(Choice(op=op, kernel=version, why="test") for op in ("adamw", "grad_norm"))
            chosen = chosen.model_copy(update={"kernels": kept + ours})
            found = started(chosen)
            losses[version] = stepped(found, range(4))
            assert {bucket.copy is None for bucket in buckets(found)} == {overrides != ["train.precision=bf16"]}
            assert found._rounded == []
        assert losses["fused"] == pytest.approx(losses["reference"], rel=1e-4)


@pytest.mark.parametrize(("master", "moments"), FORMS)
def test_no_form_reads_a_tensor_within_a_step(tiny, monkeypatch, master, moments):
    """What would make a host wait for a GPU is made to fail."""
    found = engine(tiny, *form(master, moments))
    found.forward_backward(batch(rows(2)))

    def read(*_):
        raise AssertionError("a tensor's value was read")

    for name in ("item", "tolist", "cpu", "nonzero", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    norm = found.step(1.0).grad_norm
    monkeypatch.undo()
    assert torch.isfinite(norm)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("microbatch", [2, 4])
@pytest.mark.parametrize(("master", "moments"), [("fp32", "fp32"), ("fp32", "bf16"), *FORMS])
def test_planned_memory_is_that_of_the_tensors(tiny, master, moments, microbatch, name):
    decayed = ["optim.decay_embeddings=true"] if moments == "int8" else []
    found = engine(tiny, *form(master, moments), f"optim.name={name}", f"train.microbatch={microbatch}", *decayed)

    def size(*tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None and tensor.ndim)

    optimizer = gradients = 0
    for group in found.groups:
        gradients += size(group.grads.buffer)
        if isinstance(group, AdamW):
            bucket = group.bucket
            optimizer += size(bucket.correction, bucket.exp_avg, bucket.exp_avg_scale, bucket.exp_avg_sq, bucket.exp_avg_sq_scale)
            optimizer += size(bucket.weight) if bucket.weight.dtype == torch.float32 else 0
        else:
            optimizer += size(group.master.buffer, *group.state().values())
    planned = found.plan.memory
    assert planned.optimizer == optimizer
    assert planned.gradients == gradients + size(*found.parameters.values())  # and one microbatch's own
    assert planned.weights == size(*found.parameters.values())


def test_forms_that_cannot_be_are_refused(tiny):
    with pytest.raises(
        PlanError, match='optim.master "bf16[+]8" keeps corrections of bf16 weights, and train.precision is fp32.*; set optim.master'
    ):
        engine(tiny, "train.precision=fp32", "optim.master=bf16+8")
    with pytest.raises(RecipeError, match="optim.moments"):
        engine(tiny, "optim.moments=int4")


# ---- Families with experts ----


DEEPSEEK = tuple(
    f"model.architecture.{one}"
    for one in (
        *(
            "family=deepseek_v3",
            "experts=8",
            "experts_per_token=2",
            "kv_heads=4",
            "head_dim=12",
            "q_rank=16",
            "kv_rank=16",
            "rope_head_dim=4",
        ),
        *("value_head_dim=8", "expert_intermediate=16", "groups=4", "groups_per_token=2", "moe_layers=[false,true]", "tied=false"),
    )
)
GPT_OSS = tuple(f"model.architecture.{one}" for one in ("family=gpt_oss", "experts=4", "experts_per_token=2", "window=9"))
CORRECTION = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize(
    "numbers", [DEEPSEEK, tuple(one for one in DEEPSEEK if "q_rank" not in one), GPT_OSS], ids=["deepseek", "wide", "gpt-oss"]
)
def test_muon_has_the_matrices_and_the_plan_knows_them(tiny, numbers):
    """Latents and shared experts are matrices, routers, experts and their biases are not; of equal shapes as many as the plan's workspace says."""
    found = engine(tiny, *numbers, "optim.name=muon", "train.precision=bf16")
    (muon,) = (group for group in found.groups if not isinstance(group, AdamW))
    arch = found.plan.decoder
    assert sum(view.numel() for view in muon.master.views.values()) == arch.matrix_parameters(routed=False)
    counts: Counter[tuple[int, ...]] = Counter(tuple(view.shape) for view in muon.master.views.values())
    largest = max(2 * (3 * r * c + 5 * min(r, c) ** 2) * count for (r, c), count in counts.items())
    assert cost.muon_workspace(arch) == largest
    assert found.plan.memory.weights == sum(2 * parameter.numel() for parameter in found.parameters.values())
    plain = {name for name, parameter in found.parameters.items() if not decays(name)}
    assert {name for name in plain if "experts" in name} == {name for name in found.parameters if name.endswith(("proj_bias",))}
    found.forward_backward(batch(rows(4)))
    assert torch.isfinite(found.step(1.0).grad_norm)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_moves_a_correction_towards_experts_that_are_visited_less(tiny, recompute):
    """Over all microbatches of a step, each token counted once, also where layers are computed twice; a refused step moves nothing."""
    found = engine(tiny, *DEEPSEEK, "loss.router_bias_rate=0.01", "train.batch=4", "train.microbatch=2", f"train.recompute={recompute}")
    assert not found.corrections[CORRECTION].any()
    whole = rows(4)
    found.forward_backward(batch(*cut(whole, 2, 2)))
    visits = found.visits[CORRECTION].clone()
    assert visits.sum() == 4 * T * 2
    found.step(1.0)
    assert not found.visits[CORRECTION].any()
    expected = 0.01 * (visits.double().mean() - visits).sign().float()
    assert torch.equal(found.corrections[CORRECTION], expected)
    assert expected.any()
    assert found.state()["weights"][CORRECTION].tensor.data_ptr() == found.model.corrections()[CORRECTION].data_ptr()
    found.forward_backward(batch(*cut(whole, 2, 2)))
    next(iter(found.grads.values()))[0] = float("nan")
    found.step(1.0)
    assert torch.equal(found.corrections[CORRECTION], expected)
    assert not found.visits[CORRECTION].any()
    found.evaluate([whole])
    assert not found.visits[CORRECTION].any()


def test_a_correction_is_saved_and_loaded(tiny, tmp_path):
    overrides = (*DEEPSEEK, "loss.router_bias_rate=0.01", "train.precision=bf16")
    found = engine(tiny, *overrides)
    for seed in range(3):
        found.forward_backward(batch(rows(4, seed)))
        found.step(1.0)
    moved = found.corrections[CORRECTION].clone()
    assert moved.dtype == torch.float32
    assert moved.abs().max() > 0.005
    other = engine(tiny, *overrides)
    for group, pieces in other.state().items():
        for name, piece in pieces.items():
            piece.tensor.copy_(found.state()[group][name].tensor)
    other.restored()
    assert torch.equal(other.model.corrections()[CORRECTION], moved)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("loss.router_aux=0.1",), r"loss\.router_aux 0\.1 is for routers of our own decoders, and 'llama' has none"),
        (
            (*DEEPSEEK, "loss.router_z=0.1", 'data.packing="document"'),
            r"loss\.router_z 0\.1 balances what routers see, and data\.packing \"document\" shows them padding too",
        ),
        (
            (*DEEPSEEK, "loss.router_z=0.1", "mesh.pipeline=2"),
            r"loss\.router_z 0\.1 is a loss over all layers at once, and mesh\.pipeline 2 parts them",
        ),
        (
            (*DEEPSEEK, "loss.router_bias_rate=0.1", "engine.name=deepspeed"),
            r"loss\.router_bias_rate 0\.1 is an update of the native engine's, and engine\.name is \"deepspeed\"",
        ),
        (
            (
                "model.architecture.family=olmoe",
                "model.architecture.experts=4",
                "model.architecture.experts_per_token=2",
                "loss.router_bias_rate=0.1",
            ),
            r"loss\.router_bias_rate 0\.1 moves the bias that corrects a router's choice, and olmoe has none",
        ),
    ],
)
def test_what_routers_cannot_do_is_refused(tiny, overrides, message):
    with pytest.raises(PlanError, match=message):
        plan(load.recipe(tiny, overrides), load.site("laptop"))
