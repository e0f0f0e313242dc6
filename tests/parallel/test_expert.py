"""Experts spread over ranks: values and gradients of one process, whatever the form, the routing and the number of tokens of each rank."""

import math
from typing import Any

import pytest
import torch
from distributed import together
from torch import Tensor

from gigatrain import config
from gigatrain.architectures import Architecture
from gigatrain.kernels import moe
from gigatrain.kernels.ops import Ops, choose
from gigatrain.models.decoder import Decoder, Recompute, kind_of
from gigatrain.parallel import expert, shard
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import whole

E, K, D, WIDTH = 8, 3, 16, 24  # experts, visits, hidden channels, channels of an expert
CHOSEN = {"reference": {}, "grouped": {"experts": "grouped"}} | {
    name: {"experts": name, "expert_sort": "fused"} for name in ("glued", "fused")
}
FORMS: list[expert.Form] = ["alltoall", "hierarchical", "gather"]


def drawn(tokens: list[int], kind: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens, weights and choices of each rank's share, and the weights of all experts with the gradient of the output."""
    torch.manual_seed(7)
    n = sum(tokens)
    scores = torch.randn(n, E)
    if kind == "one":
        scores[:, 5] += 50.0
    elif kind == "few":  # those of one rank, mostly
        scores[:, :3] += 50.0
    weights, chosen = scores.softmax(-1).topk(K, -1)
    x, dy = torch.randn(2, n, D)
    gate_up, down = torch.randn(E, 2 * WIDTH, D) * 0.3, torch.randn(E, D, WIDTH) * 0.3
    weights = weights.to(torch.promote_types(dtype, torch.float32))
    return [x.to(dtype), weights, chosen], [gate_up.to(dtype), down.to(dtype), dy.to(dtype)]


def run(call: Any, x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor, dy: Tensor, *biases: Tensor) -> list[Tensor]:
    """Output and gradients; with biases the experts are gpt-oss's."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weights, gate_up, down, *biases)]
    named = dict(zip(("gate_up_bias_ef", "down_bias_ed"), leaves[4:], strict=False))
    y = call(*leaves[:2], chosen, *leaves[2:4], **named, **({"activation": "clamped_swiglu"} if named else {}))
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


def biases_of(biased: bool, dtype: torch.dtype) -> list[Tensor]:
    """Of all experts."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(E, width, generator=generator).to(dtype) for width in (2 * WIDTH, D)] if biased else []


def block(rank: int, form: expert.Form, kind: str, tokens: list[int], dtype: torch.dtype, per_node: int, kernels: str, biased: bool) -> Any:
    """What this rank's share becomes, and the bytes that it sends to other nodes."""
    sent = {"bytes": 0}
    plain = torch.distributed.all_to_all_single

    def counted(out: Tensor, x: Tensor, receive: Any, send: Any, group: Any) -> None:
        ranks = torch.distributed.get_process_group_ranks(group)
        rows = send or [x.shape[0] // len(ranks)] * len(ranks)
        away = sum(count for count, to in zip(rows, ranks, strict=True) if to // per_node != rank // per_node)
        sent["bytes"] += away * x[:1].numel() * x.itemsize if x.is_floating_point() else 0
        plain(out, x, receive, send, group=group)

    expert.distributed.all_to_all_single = counted  # type: ignore[assignment]
    mesh = Mesh(config.Mesh(shard=len(tokens), expert=len(tokens)), rank)
    ops = expert.dispatched(choose(CHOSEN[kernels]), mesh, form, per_node)
    (x, weights, chosen), (gate_up, down, dy) = drawn(tokens, kind, dtype)
    mine, local = slice(sum(tokens[:rank]), sum(tokens[: rank + 1])), E // len(tokens)
    held = slice(rank * local, (rank + 1) * local)
    found = run(
        ops.moe, x[mine], weights[mine], chosen[mine], gate_up[held], down[held], dy[mine], *(b[held] for b in biases_of(biased, dtype))
    )
    return [t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy() for t in found], sent["bytes"]


def compared(
    form: expert.Form, kind: str, tokens: list[int], dtype: torch.dtype, per_node: int, kernels: str = "reference", biased: bool = False
) -> list[int]:
    """Bytes sent between nodes by each rank, after all values and gradients were compared with one process's."""
    (x, weights, chosen), (gate_up, down, dy) = drawn(tokens, kind, dtype)
    given = x, weights, chosen, gate_up, down, dy, *biases_of(biased, dtype)
    expected = run(moe.reference, *given)
    exact = run(moe.reference, *(t.double() if t.is_floating_point() else t for t in given))
    ranks = together(len(tokens), block, form, kind, tokens, dtype, per_node, kernels, biased)
    for at in range(len(exact)):  # each rank's tokens and experts, one after the other
        found = torch.cat([torch.from_numpy(values[at]).double() for values, _ in ranks])
        error, plain = ((t.double() - exact[at]).norm() / (exact[at].norm() + 1e-30) for t in (found, expected[at]))
        if dtype == torch.bfloat16:
            assert error <= 2 * plain + 2**-9, (at, error, plain)
        else:
            assert error <= {torch.float32: 1e-6, torch.float64: 1e-14}[dtype], (at, error)
    return [count for _, count in ranks]


@pytest.mark.parametrize("kind", ["spread", "one", "few"])
@pytest.mark.parametrize("form", FORMS)
def test_on_two_ranks_it_is_one_process(form: expert.Form, kind: str) -> None:
    compared(form, kind, [9, 9] if form == "gather" else [11, 5], torch.float64, 1)


@pytest.mark.parametrize("form", FORMS)
def test_on_two_nodes_of_two_ranks_it_is_one_process(form: expert.Form) -> None:
    compared(form, "spread", [7] * 4 if form == "gather" else [7, 0, 1, 33], torch.float32, 2, "grouped")


@pytest.mark.parametrize("form", FORMS)
def test_errs_in_bf16_at_most_twice_as_much(form: expert.Form) -> None:
    compared(form, "spread", [16] * 4, torch.bfloat16, 2, "grouped")


@pytest.mark.parametrize("kernels", ["grouped", "glued", "fused"])
@pytest.mark.parametrize("form", FORMS)
def test_biases_and_the_clamped_activation(form: expert.Form, kernels: str) -> None:
    """Triton's kernels where their rows come from other ranks, and there are rows behind those that exist."""
    compared(form, "few", [9, 9] if form == "gather" else [11, 5], torch.float32, 1, kernels, True)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_at_all(form: expert.Form) -> None:
    compared(form, "spread", [0, 0], torch.float32, 1)


def test_a_token_goes_to_a_node_once() -> None:
    tokens = [25] * 4
    flat, deep = (sum(compared(form, "spread", tokens, torch.float64, 2)) for form in ("alltoall", "hierarchical"))
    chosen = drawn(tokens, "spread", torch.float64)[0][2]
    home = (torch.arange(100) // 50)[:, None]
    slots = (chosen // 4 != home).sum().item()  # of another node's experts
    rows = (chosen // 4 != home).any(1).sum().item()
    both_ways = 2  # forward and backward
    assert flat == both_ways * slots * 2 * D * 8
    assert deep == both_ways * rows * (2 * D + 2 * K) * 8
    assert deep < flat


# ---- The whole decoder, everything else sharded. ----

SIZES = {"vocab": 61, "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 40, "experts": 8, "experts_per_token": 2}
ARCHITECTURES = {
    "mixtral": Architecture.model_validate({"family": "mixtral", **SIZES}),
    "qwen3_moe": Architecture.model_validate(
        {"family": "qwen3_moe", **SIZES, "expert_intermediate": 24, "moe_layers": (True, False), "tied": True}
    ),
}
ROWS, TOKENS, STEPS, RATE = 4, 13, 3, 0.1


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 61, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))
    labels = tokens.roll(-1, 1)
    labels[0, :4] = -100
    return tokens, labels


def start(family: str, ops: Ops, recompute: Recompute) -> Decoder:
    model = Decoder(ARCHITECTURES[family], ops, recompute=recompute)
    model.init_weights(0.2, False, 0)
    return model


def descend(model: Decoder, rows: slice) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses of this share of each batch, and the gradients of the first step."""
    losses, grads = [], {}
    for step in range(STEPS):
        tokens, labels = batch(step)
        loss = model.loss(tokens[rows], labels[rows])[0] / (labels >= 0).sum()
        loss.backward()
        losses.append(loss.detach())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, name
                grads.setdefault(name, shard.local(parameter.grad).clone())
                shard.local(parameter).sub_(shard.local(parameter.grad), alpha=RATE)
                parameter.grad = None
    return losses, grads


def trained(rank: int, family: str, axes: config.Mesh, form: expert.Form, recompute: Recompute) -> Any:
    mesh = Mesh(axes, rank)
    ops = expert.dispatched(choose({"experts": "grouped"}), mesh, form, 2)
    model = start(family, ops, recompute)
    places = whole(model)
    expert.cut(model, [name for name in places if kind_of(name) == "expert"], mesh, places)
    shard.apply(model, mesh, places, config.Engine(), compute=torch.float32, stored=torch.float32)
    share = ROWS // mesh.data[1]
    losses, grads = descend(model, slice(mesh.data[0] * share, (mesh.data[0] + 1) * share))
    weights = {name: shard.local(parameter.detach()).numpy() for name, parameter in model.named_parameters()}
    return [mesh.sum(loss).item() for loss in losses], {n: g.numpy() for n, g in grads.items()}, weights, places


@pytest.mark.parametrize(
    ("family", "shards", "experts", "form", "recompute"),
    [
        ("mixtral", 2, 2, "alltoall", "none"),
        ("qwen3_moe", 2, 2, "gather", "lean"),
        ("mixtral", 4, 2, "alltoall", "selective"),
        ("qwen3_moe", 4, 4, "alltoall", "full"),
        ("mixtral", 4, 4, "hierarchical", "full"),
        ("qwen3_moe", 4, 4, "hierarchical", "selective"),
        ("mixtral", 4, 2, "gather", "full"),
    ],
)
def test_training_with_sharded_weights_is_one_process(family: str, shards: int, experts: int, form: Any, recompute: Any) -> None:
    model = start(family, choose({}), "none")
    losses, grads = descend(model, slice(None))
    weights = dict(model.named_parameters())
    ranks = together(shards, trained, family, config.Mesh(shard=shards, expert=experts), form, recompute)
    held = dict.fromkeys(weights, 0)
    for found, our_grads, our_weights, places in ranks:
        assert found == pytest.approx([loss.item() for loss in losses], rel=1e-6)
        for name, place in places.items():
            scale = grads[name].norm()
            assert (torch.from_numpy(our_grads[name]) - place.of(grads[name])).norm() <= 1e-6 * scale, name
            assert (torch.from_numpy(our_weights[name]) - place.of(weights[name].detach())).norm() <= 1e-6 * weights[name].norm(), name
            held[name] += math.prod(place.size)
    assert held == {name: parameter.numel() for name, parameter in weights.items()}  # every number is on one rank
