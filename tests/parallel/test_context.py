"""Context parallelism against one process: attention alone, whole decoders, what goes over the wire and who works how much."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from distributed import together
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from gigatrain import config
from gigatrain.architectures import Architecture
from gigatrain.data.loader import Microbatch
from gigatrain.kernels import attention
from gigatrain.kernels.ops import REFERENCE, choose
from gigatrain.models.decoder import Decoder, Recompute, kind_of
from gigatrain.parallel import context, ring
from gigatrain.parallel.mesh import Mesh

TOKENS = 32
EXCHANGES: tuple[context.Exchange, ...] = ("ring", "ulysses")
# Lengths of the documents of each row. With 4 ranks a chunk of the ring has 4 tokens: ends inside chunks, at their edges and across several of them,
# documents of one token, of a whole chunk, and longer than one.
ROWS = ([32], [4, 4, 8, 16], [1, 1, 1, 5, 11, 13], [31, 1], [3, 2, 6, 1, 12, 8], [16, 16])


def documents_of(rows: Any = ROWS) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows]).int()


def mesh_of(rank: int, ranks: int, **axes: int) -> Mesh:
    return Mesh(config.Mesh(**dict[str, Any]({"shard": 1, "context": ranks} | axes)), rank)


def mine(x: Tensor, mesh: Mesh, exchange: context.Exchange) -> Tensor:
    pieces = context.chunks(x.shape[1], mesh.index("context"), mesh.size("context"), exchange)
    return torch.cat([x[:, piece] for piece in pieces], 1)


# Attention alone. (heads, kv_heads, window, documents, softcap)
CASES = [
    *((4, 4, window, packed, softcap) for window, packed, softcap in product((None, 1, 3, 7, 20), (False, True), (None, 2.0))),
    *((heads, keys, window, packed, None) for heads, keys in ((8, 2), (4, 1), (12, 3)) for window, packed in ((None, False), (5, True))),
    (4, 2, 100, False, None),
]


def whole_and_mine(mesh: Mesh, exchange: context.Exchange, case: Any, dtype: torch.dtype) -> list[tuple[float, float, float]]:
    """Of the output and the gradients of q, k and v, this rank's tokens: squared errors, plain torch's, and squares of the exact ones."""
    heads, keys, window, packed, softcap = case
    generator = torch.Generator().manual_seed(heads * 100 + keys)
    sizes, rows = (heads, keys, keys, heads), len(ROWS)
    inputs = [torch.randn(rows, TOKENS, size, 8, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    documents = documents_of() if packed else None

    def run(chosen: Any, given: list[Tensor], tokens: int) -> list[Tensor]:
        *qkv, grad = (x.clone() for x in given)
        for x in qkv:
            x.requires_grad_()
        seen = chosen.mask(documents, window, tokens, grad.dtype, grad.device)
        out = chosen.attention(*qkv, seen, scale=0.4, softcap=softcap)
        return [out.detach(), *torch.autograd.grad(out, qkv, grad)]

    ours = run(context.ops(REFERENCE, mesh, exchange), [mine(x, mesh, exchange) for x in inputs], TOKENS // mesh.size("context"))
    plain, exact = ([mine(x, mesh, exchange) for x in run(REFERENCE, given, TOKENS)] for given in (inputs, [x.double() for x in inputs]))
    assert all(x.dtype == dtype and x.shape == y.shape for x, y in zip(ours, exact, strict=True))
    triples = zip(ours, plain, exact, strict=True)
    return [tuple(x.double().square().sum().item() for x in (o - e, p - e, e)) for o, p, e in triples]  # type: ignore[misc]


def _attention(rank: int, ranks: int, exchange: context.Exchange, dtype: torch.dtype) -> Any:
    mesh = mesh_of(rank, ranks)
    return [whole_and_mine(mesh, exchange, case, dtype) for case in CASES]


def errors(results: list[Any]) -> Tensor:
    """[case, tensor, (ours, plain)]: relative errors over all ranks' tokens."""
    ours, plain, exact = torch.tensor(results, dtype=torch.float64).sum(0).unbind(-1)
    exact = torch.maximum(exact, 0.1 * exact[:, :1])  # where a query sees one key, it and that have gradients of 0
    return torch.stack((ours, plain), -1).sqrt() / exact.sqrt()[..., None]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_equals_that_of_one_process(ranks: int, exchange: context.Exchange) -> None:
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        found = errors(together(ranks, _attention, ranks, exchange, dtype))
        assert found[..., 0].max() <= most, [
            (case, worst) for case, worst in zip(CASES, found[..., 0].tolist(), strict=True) if max(worst) > most
        ]


def _wide_values_and_sinks(rank: int, ranks: int, exchange: context.Exchange) -> Any:
    """Errors of out, of the gradients of q, k, v and, summed over the ranks, of the sinks; values are wider than keys."""
    mesh, found = mesh_of(rank, ranks), []
    generator = torch.Generator().manual_seed(5)
    widths = ((8, 8), (2, 8), (2, 12), (8, 12))
    *inputs, grad = (torch.randn(len(ROWS), TOKENS, *width, generator=generator, dtype=torch.float64) for width in widths)
    sinks = torch.randn(8, generator=generator, dtype=torch.float64)
    for packed, window, softcap in ((False, None, None), (True, 7, 2.0)):
        results = []
        for chosen, cut in ((context.ops(REFERENCE, mesh, exchange), True), (REFERENCE, False)):
            qkv, upstream = ([mine(x, mesh, exchange) for x in inputs], mine(grad, mesh, exchange)) if cut else (inputs, grad)
            leaves = [x.clone().requires_grad_() for x in (*qkv, sinks)]
            seen = chosen.mask(documents_of() if packed else None, window, leaves[0].shape[1], grad.dtype, grad.device)
            out = chosen.attention(*leaves[:3], seen, scale=0.4, softcap=softcap, sinks_h=leaves[3])
            given = torch.autograd.grad(out, leaves, upstream)
            shown = [out.detach(), *given[:3]]
            results.append([*(shown if cut else [mine(x, mesh, exchange) for x in shown]), given[3]])
        distributed.all_reduce(results[0][-1])
        found.append([(ours - right).abs().max().item() for ours, right in zip(*results, strict=True)])
    return found


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_values_of_another_width_and_sinks_are_those_of_one_process(ranks: int, exchange: context.Exchange) -> None:
    assert torch.tensor(together(ranks, _wide_values_and_sinks, ranks, exchange)).max() <= 1e-12


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_attention_in_bf16_errs_at_most_twice_as_much_as_plain_torch(exchange: context.Exchange) -> None:
    found = errors(together(4, _attention, 4, exchange, torch.bfloat16))
    ratio = (found[..., 0] / found[..., 1])[
        [window != 1 for _, _, window, _, _ in CASES]
    ]  # of one key the gradients are 0, and plain torch's too
    assert ratio.median() > 0.05
    assert ratio.max() <= 2.0, [
        (case, row) for case, row in zip([case for case in CASES if case[2] != 1], ratio.tolist(), strict=True) if max(row) > 2.0
    ]


def _heads_cut(rank: int) -> Any:
    """Tensor parallelism has given each rank half of the heads."""
    mesh = mesh_of(rank, 2, tensor=2)
    return [
        [whole_and_mine(mesh, exchange, (4, 2, 9, True, None), torch.float64) for exchange in EXCHANGES],
        distributed.get_process_group_ranks(mesh.group("context")),
    ]


def test_groups_are_those_of_the_context_axis() -> None:
    results = together(4, _heads_cut)
    assert [ranks for _, ranks in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert errors([found for found, _ in results])[..., 0].max() <= 1e-12


# Whole decoders.
PLAIN: dict[str, Any] = {
    "family": "llama",
    "vocab": 61,
    "hidden": 32,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "intermediate": 48,
}
GEMMA = PLAIN | {
    "family": "gemma2",
    "window": 6,
    "kv_heads": 1,
    "attention_softcap": 3.0,
    "logit_softcap": 10.0,
    "window_layers": (True, False),
}
QWEN = PLAIN | {"family": "qwen3", "tied": True}


def microbatch_of(packed: bool, rows: int = 4, seed: int = 3) -> Microbatch:
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(0, 61, (2, rows, TOKENS), generator=generator)
    labels[torch.rand(rows, TOKENS, generator=generator) < 0.2] = -100
    lengths = [ROWS[(seed + row) % len(ROWS)] if packed else [TOKENS] for row in range(rows)]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    return Microbatch(tokens, labels, positions, documents_of(lengths) if packed else None)


def decoder_of(numbers: dict[str, Any], chosen: Any, recompute: Recompute, dtype: torch.dtype, **options: Any) -> Decoder:
    model = Decoder(Architecture.model_validate(numbers), chosen, recompute=recompute, **options).to(dtype)
    model.init_weights(0.1, False, 0)  # with 0.3, one process alone errs by 4e-6 in fp32
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if kind_of(name) == "norm":
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).to(dtype))
    return model


def loss_and_grads(model: Decoder, batches: list[Microbatch]) -> dict[str, Tensor]:
    total = torch.zeros(())
    for part in batches:
        loss, _ = model.loss(part.tokens, part.labels, part.positions, part.documents)
        loss.backward()
        total = total + loss.detach()
    return {"loss": total} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    return {name: ((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs}


def _decoders(rank: int, ranks: int, exchange: context.Exchange, dtype: torch.dtype) -> dict[Any, float]:
    """Errors over what is allowed: of losses 1e-6 of one process's, of gradients twice what one process errs; in fp64 1e-12 of both."""
    mesh, found = mesh_of(rank, ranks), {}
    kernels = {"attention": "sdpa", "linear_cross_entropy": "chunked"}
    # What is made again is told apart exactly in fp64, on two ranks; on four, one that makes some of it again.
    modes: tuple[Recompute, ...] = ("none", "lean", "selective", "full") if ranks == 2 else ("lean",)
    for (name, numbers), packed in product({"plain": PLAIN, "gemma": GEMMA, "qwen": QWEN}.items(), (False, True)):
        # The last microbatch is smaller, as at the end of a batch.
        batches = [microbatch_of(packed, 4, 3), microbatch_of(packed, 1, 5)]
        parts = [context.cut(part, mesh, exchange) for part in batches]
        theirs = loss_and_grads(decoder_of(numbers, choose(kernels), "none", dtype), batches)
        exact = loss_and_grads(decoder_of(numbers, choose(kernels), "none", dtype).double(), batches)
        allowed = 1e-12 if dtype == torch.float64 else 2 * max(differences(theirs, exact).values())
        close = 1e-12 if dtype == torch.float64 else 1e-6
        assert allowed < 2e-6
        for mode in modes:
            model = decoder_of(numbers, context.ops(choose(kernels), mesh, exchange), mode, dtype)
            ours = {key: mesh.sum(value.clone(), "context") for key, value in loss_and_grads(model, parts).items()}
            found[name, packed, mode] = max(differences(ours, exact).values()) / allowed
            found[name, packed, mode, "loss"] = differences(ours, theirs)["loss"] / close
        with torch.no_grad():
            ours = mesh.sum(sum(model.loss(p.tokens, p.labels, p.positions, p.documents)[0] for p in parts))  # type: ignore[arg-type]
        found[name, packed, "evaluation"] = ((ours - theirs["loss"]).abs() / theirs["loss"]).item() / close
    return found


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float64), (4, torch.float32)])
def test_a_decoder_has_the_loss_and_gradients_of_one_process(ranks: int, dtype: torch.dtype, exchange: context.Exchange) -> None:
    for found in together(ranks, _decoders, ranks, exchange, dtype):
        assert len(found) == (54 if ranks == 2 else 18)
        assert max(found.values()) <= 1.0, {key: value for key, value in found.items() if value > 1.0}


def _sharded(rank: int, exchange: context.Exchange) -> float:
    """FSDP2 over shard x context: ranks of `shard` have other samples, those of `context` other tokens."""
    mesh = mesh_of(rank, 2, shard=2)
    batches = [microbatch_of(True, 2, seed) for seed in (1, 2)]
    theirs = loss_and_grads(decoder_of(GEMMA, REFERENCE, "none", torch.float32), batches)
    model = decoder_of(GEMMA, context.ops(REFERENCE, mesh, exchange), "full", torch.float32)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh.torch(("shard", "context")))
        module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    register_fsdp_forward_method(model, "loss")
    ours = loss_and_grads(model, [context.cut(batches[mesh.data[0]], mesh, exchange)])
    ours = {name: value.full_tensor() if hasattr(value, "full_tensor") else mesh.sum(value) for name, value in ours.items()}  # type: ignore[operator]
    return max(differences(ours, theirs).values())


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_with_fsdp_gradients_are_summed_over_shard_and_context(exchange: context.Exchange) -> None:
    assert max(together(4, _sharded, exchange)) <= 1e-6


def _compiled(rank: int) -> list[float]:
    mesh, found = mesh_of(rank, 2), []
    for exchange in EXCHANGES:
        part, results = context.cut(microbatch_of(True, 2), mesh, exchange), []
        for compiled in (False, True):
            model = decoder_of(PLAIN | {"layers": 1}, context.ops(choose({"attention": "sdpa"}), mesh, exchange), "none", torch.float32)
            if compiled:
                for layer in model.layers:
                    layer.compile(backend="aot_eager", fullgraph=True)
            results.append(loss_and_grads(model, [part]))
        found.append(max(differences(*results).values()))
    return found


@pytest.mark.long
def test_a_layer_compiles_as_one_graph() -> None:
    assert max(max(found) for found in together(2, _compiled)) <= 1e-6


def _dropped(rank: int, ranks: int, exchange: context.Exchange) -> Any:
    mesh = mesh_of(rank, ranks)
    ones, seed = torch.ones(1000), torch.tensor(7 << 40)
    drop = context.ops(REFERENCE, mesh, exchange).dropout_add
    return [drop(ones, torch.zeros(1000), 0.5, seed + step) > 0 for step in (0, 0, 1)]


def test_ranks_drop_out_different_elements() -> None:
    results = together(4, _dropped, 4, "ring")
    assert torch.equal(results[0][0], REFERENCE.dropout_add(torch.ones(1000), torch.zeros(1000), 0.5, torch.tensor(7 << 40)) > 0)
    for first, again, _ in results:
        assert torch.equal(first, again)
    masks = [mask for found in results for mask in (found[0], found[2])]
    for i, one in enumerate(masks):
        assert all(400 < (one ^ other).sum() < 600 for other in masks[:i])


# Work, messages and memory.


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 6, 7, 8, 11, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_hold_every_visible_pair_once_and_ranks_work_alike(ranks: int, window: int | None, packed: bool) -> None:
    half = 6
    tokens = 2 * ranks * half
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    visible = (i >= j) & (i - j < (window or tokens))
    counted, seen, computed = torch.zeros(tokens, tokens, dtype=torch.int64), [], []
    for rank, source in product(range(ranks), range(ranks)):
        queries, keys = (torch.cat([torch.arange(tokens)[piece] for piece in ring.zigzag(tokens, at, ranks)]) for at in (rank, source))
        area = 0
        for block in ring.blocks(rank, source, ranks, half, window, packed):
            at = queries[block.queries][:, None], keys[block.keys]
            if block.sight == "mask":
                inside = visible[at]
                assert packed or not inside.all()  # no mask without a reason
            else:
                inside = torch.ones_like(visible[at]).tril() if block.sight == "causal" else torch.ones_like(visible[at])
            counted[at] += inside
            area += inside.numel()
            assert visible[at].any()  # nothing in vain
        computed.append(area)
        seen.append(visible[queries].sum().item())
    assert torch.equal(counted, visible.long())
    if window is None:
        assert set(seen) == {half * half * (2 * ranks - 1) + half * (half + 1)}
        steps = torch.tensor(computed).view(ranks, ranks)
        others = steps[~torch.eye(ranks, dtype=torch.bool)]
        assert (others == 2 * half * half).all()
        assert steps.diagonal().unique().numel() == 1


def _messages(rank: int, ranks: int, dtype: torch.dtype) -> Any:
    """What is sent, and when: the calls of one forward and one backward."""
    mesh, sent, calls = mesh_of(rank, ranks), [], []
    group = mesh.group("context")
    assert group is not None
    originals = {name: getattr(ring, name) for name in ("_attend", "_attend_backward")}
    batch, works = distributed.batch_isend_irecv, []

    def counting(operations: list[Any]) -> Any:
        calls.append("message")
        to = [distributed.get_group_rank(group, op.peer) for op in operations]
        assert to == [(rank + 1) % ranks, (rank - 1) % ranks]
        sent.extend(op.tensor.numel() * op.tensor.element_size() for op in operations if op.op is distributed.isend)
        works.append(batch(operations))
        return works[-1]

    def watching(name: str) -> Any:
        def call(*inputs: Any) -> Any:
            calls.append("attention")
            return originals[name](*inputs)

        return call

    distributed.batch_isend_irecv = counting
    for name in originals:
        setattr(ring, name, watching(name))
    chosen, saved = context.ops(REFERENCE, mesh, "ring"), []
    q, k, v = (torch.randn(3, 8, heads, 6, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel() * x.element_size()) or x, lambda x: x):
        out = chosen.attention(q, k, v, chosen.mask(None, None, 8, dtype, q.device), scale=1.0)
    marks = len(sent), len(calls)
    out.backward(torch.ones_like(out))
    return (sent[: marks[0]], sent[marks[0] :]), (calls[: marks[1]], calls[marks[1] :]), sum(saved), ring.traffic(k, ranks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [2, 4])
def test_messages_and_memory_are_those_of_the_docstring(ranks: int, dtype: torch.dtype) -> None:
    b, t, h, k, d, size = 3, 8, 4, 2, 6, dtype.itemsize
    for sent, (forward, backward), saved, planned in together(ranks, _messages, ranks, dtype):
        keys, sums = 2 * b * t * k * d * size, 2 * b * t * k * d * max(size, 4)
        assert sent[0] == [keys] * (ranks - 1)
        assert sorted(sent[1]) == sorted([keys] * (ranks - 1) + [sums] * (ranks - 1))
        assert planned == (sent[0], [keys] * (ranks - 1) + [sums] * (ranks - 1))
        assert saved == (2 * h + 2 * k) * b * t * d * size + 4 * b * h * t
        # The next keys are on their way before anything is computed; sums follow what they wait for.
        assert forward == ["message", "attention"] * (ranks - 1) + ["attention"]
        assert backward == ["message", "attention"] + ["message", "attention", "message"] * (ranks - 2) + ["attention", "message"]


def _exchanged(rank: int, ranks: int) -> Any:
    """Bytes that leave this rank in Ulysses' forward and backward."""
    mesh, found = mesh_of(rank, ranks), []
    all_to_all = context._all_to_all

    def counting(x: Tensor, group: str) -> Tensor:
        found.append(x.numel() * x.element_size() * (ranks - 1) // ranks)
        return all_to_all(x, group)

    context._all_to_all = counting
    chosen = context.ops(REFERENCE, mesh, "ulysses")
    q, k, v = (torch.randn(3, 8, heads, 6, requires_grad=True) for heads in (8, 2, 2))
    chosen.attention(q, k, v, chosen.mask(None, None, 8, q.dtype, q.device), scale=1.0).sum().backward()
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_ulysses_sends_what_the_docstring_says(ranks: int) -> None:
    b, t, h, k, d = 3, 8, 8, max(2, ranks), 6
    there, back = ((ranks - 1) * b * t * heads * d * 4 // ranks for heads in (h + 2 * k, h))
    assert together(ranks, _exchanged, ranks) == [[there, back, back, there]] * ranks


def test_one_rank_changes_nothing() -> None:
    mesh, part = mesh_of(0, 1), microbatch_of(True)
    assert context.ops(REFERENCE, mesh, "ring") is REFERENCE
    assert context.cut(part, mesh, "ulysses") is part


def test_cut_keeps_positions_within_documents_and_loses_no_token() -> None:
    part = microbatch_of(True)
    for exchange in EXCHANGES:
        cuts = [context.cut(part, mesh_of(rank, 4), exchange) for rank in range(4)]
        order = torch.cat([mine(torch.arange(TOKENS)[None], mesh_of(rank, 4), exchange) for rank in range(4)], 1)[0]
        assert torch.equal(order.sort().values, torch.arange(TOKENS))
        for name in ("tokens", "labels", "positions"):
            assert torch.equal(torch.cat([getattr(one, name) for one in cuts], 1), getattr(part, name)[:, order])
        assert all(one.documents is part.documents for one in cuts)
    bare = replace(microbatch_of(False), documents=None)
    assert context.cut(bare, mesh_of(1, 2), "ring").positions[0].tolist() == [*range(8, 24)]


# One block on torch's fused kernels, which need a GPU: their calls, and the arithmetic around them on the fused kernel that CPUs have.


def block_of(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 64, 4, 8), (2, 32, 2, 8), (2, 32, 2, 8), (2, 64, 4, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize(("name", "masked"), [("flash", False), ("efficient", False), ("efficient", True)])
def test_calls_of_fused_kernels_have_the_shapes_of_plain_torch(name: str, masked: bool) -> None:
    q, k, v, grad = block_of(torch.bfloat16, "meta")
    visible = torch.ones(2, 64, 32, dtype=torch.bool, device="meta") if masked else None
    middle = () if name == "flash" else (visible,)
    out, lse = getattr(ring, f"_{name}")(q, k, v, False, *middle, 0.3)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 4, 64), torch.float32)
    found = getattr(ring, f"_{name}_backward")(grad, q, k, v, out, lse, False, *middle, 0.3)
    assert [x.shape for x in found] == [x.shape for x in (q, k, v)]


def test_a_bias_hides_rows_and_foreign_sums_weigh_gradients_in_a_fused_kernel() -> None:
    """A query that sees nothing of a block adds nothing, and a block's gradients come from the lse and output of all keys."""
    q, k, v, grad = block_of(torch.float64)
    visible = torch.rand(2, 64, 32, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[:, ::3] = False
    q_, k_, v_, bias = ring._biased(q, k, v, visible)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = fused(q_, k_, v_, 0.0, False, attn_mask=bias, scale=0.3)
    plain_out, plain_lse = ring._plain(q, k, v, False, visible, 0.3, None)
    assert (plain_lse[:, :, ::3] == float("-inf")).all()
    assert (lse[:, :, ::3] < -1e29).all()
    results = []
    for part in ((out.transpose(1, 2), lse), (plain_out, plain_lse)):
        whole, total = (x.clone() for x in ring._plain(q, v, k, False, None, 0.3, None))
        ring._merge(whole, total, *part)
        results.append((whole, total))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    whole, total = results[1]
    args = (grad.transpose(1, 2), q_, k_, v_, whole.transpose(1, 2), total, 0.0, False)
    dq, dk, dv = (
        x.transpose(1, 2) for x in torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*args, attn_mask=bias, scale=0.3)
    )
    ours = (dq, *(x.unflatten(2, (2, -1)).sum(3) for x in (dk, dv)))
    for found, expected in zip(ours, ring._plain_backward(grad, q, k, v, whole, total, False, visible, 0.3, None), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_attention_is_the_same_however_its_queries_are_cut(causal: bool, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 200, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4))
    visible = torch.ones(1, 200, 200, dtype=torch.bool).tril() if masked else None
    whole = ring._plain(q, k, v, causal, visible, 0.3, 1.5)
    grads = ring._plain_backward(grad, q, k, v, *whole, causal, visible, 0.3, 1.5)
    monkeypatch.setattr(ring, "_SCORES", 1)
    assert len(ring._pieces(q, k, causal)) == 4
    for ours, theirs in zip(
        (*ring._plain(q, k, v, causal, visible, 0.3, 1.5), *ring._plain_backward(grad, q, k, v, *whole, causal, visible, 0.3, 1.5)),
        (*whole, *grads),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    if causal:
        seen = attention.mask(None, None, 200, q.dtype, q.device)
        torch.testing.assert_close(whole[0], attention.reference(q, k, v, seen, scale=0.3, softcap=1.5), rtol=1e-11, atol=1e-12)
