"""The decoder against transformers, family by family, and against itself: packing, recomputation, meta, initialisation."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import VARIANTS, build, wide_norms
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gigatrain.architectures import Architecture, from_hf_config
from gigatrain.kernels.ops import REFERENCE, Ops, available, choose
from gigatrain.models import hf
from gigatrain.models.decoder import LAYOUT, Decoder, decays, kind_of
from gigatrain.planning.attention import ON_GPU

FAST = choose({op: [name for name in names if name not in ON_GPU][-1] for op, names in available().items()})
FUSED = choose({"attention": "sdpa", "linear_cross_entropy": "chunked"})

MIXTURE: dict[str, Any] = {"family": "qwen3_moe", "experts": 6, "experts_per_token": 2, "expert_intermediate": 16}


def tiny(family: str = "llama", **numbers: Any) -> Architecture:
    sizes = {"vocab": 41, "hidden": 24, "layers": 2, "heads": 3, "intermediate": 40, "head_dim": 8, "kv_heads": 1}
    return Architecture.model_validate({"family": family, **sizes, **numbers})


def ours(model: Any, ops: Ops, dtype: torch.dtype, **kwargs: Any) -> Decoder:
    """A decoder with a transformers model's weights."""
    decoder = Decoder(from_hf_config(model.config.to_dict()), ops, **kwargs).to(dtype)
    decoder.load_state_dict(hf.from_hf(model.state_dict(), decoder.arch))
    return decoder


def fresh(arch: Architecture, ops: Ops = FAST, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Decoder:
    """A decoder with random weights, norms included."""
    decoder = Decoder(arch, ops, **kwargs).to(dtype)
    decoder.init_weights(0.2, False, 0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if kind_of(name) in ("norm", "bias", "scalar"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)), dtype=dtype) * 0.3)
    return decoder


def batch(vocab: int, rows: int = 2, tokens: int = 17) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    sampled, labels = torch.randint(0, vocab, (2, rows, tokens), generator=generator)
    labels[0, :3] = -100
    return sampled, labels


def theirs(model: Any, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """transformers' logits, summed loss and gradients under our names."""
    model.zero_grad()
    logits = model(tokens, use_cache=False).logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = F.cross_entropy(logits.flatten(0, 1).to(wide), labels.flatten(), reduction="sum")
    loss.backward()
    return (
        logits.detach(),
        loss.detach(),
        hf.from_hf({k: p.grad for k, p in model.named_parameters()}, from_hf_config(model.config.to_dict())),
    )


def gradients(decoder: Decoder, tokens: Tensor, labels: Tensor, *rest: Any, **numbers: Any) -> tuple[Tensor, dict[str, Tensor]]:
    decoder.zero_grad()
    loss, _ = decoder.loss(tokens, labels, *rest, **numbers)
    loss.backward()
    assert all(p.grad is not None for p in decoder.parameters())
    return loss.detach(), {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_transformers_in_double_precision(name: str) -> None:
    model = build(name).double()
    tokens, labels = batch(model.config.vocab_size)
    with wide_norms(model):
        logits, loss, grads = theirs(model, tokens, labels)
    for ops in (REFERENCE, FUSED, FAST):
        decoder = ours(model, ops, torch.float64)
        assert decoder.arch.parameters() == sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in decoder.parameters())
        torch.testing.assert_close(decoder.logits(tokens), logits, rtol=1e-10, atol=1e-11)
        our_loss, our_grads = gradients(decoder, tokens, labels)
        torch.testing.assert_close(our_loss, loss, rtol=1e-11, atol=0)
        for key, grad in our_grads.items():
            torch.testing.assert_close(
                grad, grads[key], rtol=1e-9, atol=1e-11 * grads[key].abs().max().item() + 1e-13, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("name", VARIANTS)
def test_errs_in_bf16_at_most_twice_as_much_as_transformers(name: str) -> None:
    """Norm-wise against fp64 with the same (rounded) weights, summed over seeds."""
    errors: dict[tuple[str, str], list[float]] = {}
    for seed in range(3):
        model = build(name, seed).bfloat16()
        tokens, labels = batch(model.config.vocab_size)
        exact_decoder = ours(model, REFERENCE, torch.float64)
        exact = exact_decoder.logits(tokens).detach()
        _, exact_grads = gradients(exact_decoder, tokens, labels)
        logits, _, grads = theirs(model, tokens, labels)
        results = {"transformers": (logits, grads)}
        for label, ops in (("reference", REFERENCE), ("fast", FAST)):
            decoder = ours(model, ops, torch.bfloat16)
            results[label] = (decoder.logits(tokens).detach(), gradients(decoder, tokens, labels)[1])
        for who, (values, gs) in results.items():
            kinds = {"logits": (values.double() - exact).norm().item() / exact.norm().item()}
            for kind in ("matrix", "rest"):
                keys = [k for k in exact_grads if (kind_of(k) == "matrix") == (kind == "matrix")]
                wrong = sum((gs[k].double() - exact_grads[k]).square().sum().item() for k in keys)
                kinds[kind] = math.sqrt(wrong / sum(exact_grads[k].square().sum().item() for k in keys))
            for what, error in kinds.items():
                errors.setdefault((who, what), []).append(error)
    for (who, what), seen in errors.items():
        assert sum(seen) <= 2 * sum(errors["transformers", what]), f"{who} {what}: {seen}, transformers {errors['transformers', what]}"


PACKED = ["llama", "mistral-window", "qwen3", "gemma2", "gemma3", "olmo3", "smollm3", "helium", "ministral3", "phi3-window"]


@pytest.mark.parametrize("ops", [REFERENCE, FUSED, FAST], ids=["reference", "fused", "fast"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_equal_documents_apart(name: str, ops: Ops) -> None:
    decoder = ours(build(name).double(), ops, torch.float64)
    tokens, labels = batch(decoder.arch.vocab, rows=2, tokens=21)
    cuts = [[0, 8, 9, 21], [0, 21]]
    positions, documents = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.int32)
    for row, edges in enumerate(cuts):
        for i, (a, b) in enumerate(pairwise(edges)):
            positions[row, a:b], documents[row, a:b] = torch.arange(b - a), i
    loss, grads = gradients(decoder, tokens, labels, positions, documents, z_loss=1e-2)
    logits = decoder.logits(tokens, positions, documents)
    apart, sums = 0.0, {key: torch.zeros_like(grad) for key, grad in grads.items()}
    for row, edges in enumerate(cuts):
        for a, b in pairwise(edges):
            piece, wanted = tokens[row : row + 1, a:b], labels[row : row + 1, a:b]
            torch.testing.assert_close(logits[row : row + 1, a:b], decoder.logits(piece), rtol=1e-9, atol=1e-10)
            part, gs = gradients(decoder, piece, wanted, z_loss=1e-2)
            apart += part
            for key, grad in gs.items():
                sums[key] += grad
    torch.testing.assert_close(loss, torch.as_tensor(apart), rtol=1e-10, atol=0)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, sums[key], rtol=1e-8, atol=1e-10 * grad.abs().max().item() + 1e-13)


@pytest.mark.parametrize("ops", [REFERENCE, FUSED, FAST], ids=["reference", "fused", "fast"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "granite", "apertus", "qwen3-moe"])
def test_recomputation_changes_nothing(name: str, ops: Ops) -> None:
    model = build(name)
    tokens, labels = batch(model.config.vocab_size)
    plain, selective, full = (
        gradients(ours(model, ops, torch.bfloat16, recompute=r), tokens, labels) for r in ("none", "selective", "full")
    )
    for other in (selective, full):
        assert torch.equal(other[0], plain[0])
    # `full` makes the residual sum outside the layer, so that one tensor is kept: with the fused sum and norm of `lean`, which rounds the gradient of
    # both once, its gradients differ by that rounding (and are exact in fp64, see below).
    for other in (selective,) if ops is FAST else (selective, full):
        assert all(torch.equal(plain[1][key], other[1][key]) for key in plain[1])


def test_full_recomputation_is_exact_in_double_precision() -> None:
    arch = tiny()
    tokens, labels = batch(arch.vocab)
    plain, full = (gradients(fresh(arch, recompute=r), tokens, labels)[1] for r in ("none", "full"))
    for key, grad in full.items():
        torch.testing.assert_close(grad, plain[key], rtol=1e-12, atol=1e-14)


def test_recomputation_keeps_less() -> None:
    arch = tiny(layers=4)
    tokens, labels = batch(arch.vocab, 2, 32)
    kept = {}
    for mode in ("none", "selective", "full"):
        sizes = []
        decoder = fresh(arch, FUSED, recompute=mode)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x):
            decoder.loss(tokens, labels)
        kept[mode] = sum(sizes)
    assert kept["full"] < kept["none"] / 3
    assert kept["selective"] < kept["none"]


def test_is_built_on_meta_and_filled_later() -> None:
    arch = tiny()
    with torch.device("meta"):
        decoder = Decoder(arch, FAST).to(torch.bfloat16)
    assert all(p.is_meta for p in decoder.parameters())
    decoder.to_empty(device="cpu")
    decoder.init_weights(0.02, True, 7)
    here = Decoder(arch, FAST).to(torch.bfloat16)
    here.init_weights(0.02, True, 7)
    tokens, _ = batch(arch.vocab)
    assert torch.equal(decoder.logits(tokens), here.logits(tokens))
    assert not list(decoder.buffers())


@pytest.mark.parametrize("numbers", [{}, MIXTURE], ids=["dense", "experts"])
def test_a_forward_on_meta_gives_shapes(numbers: dict[str, Any]) -> None:
    arch = tiny(**numbers)
    with torch.device("meta"):
        decoder = Decoder(arch, FUSED)
        hidden = decoder(torch.empty(2, 9, dtype=torch.int64))
    assert hidden.shape == (2, 9, arch.hidden)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    small, large = (Decoder(tiny("qwen2", layers=n)) for n in (1, 3))
    for decoder in (small, large):
        decoder.init_weights(0.02, False, 3)
    large_state = large.state_dict()
    assert all(torch.equal(tensor, large_state[name]) for name, tensor in small.state_dict().items())
    first, second = (large_state[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
    other = Decoder(small.arch)
    other.init_weights(0.02, False, 4)
    assert not torch.equal(other.lm_head.weight, small.lm_head.weight)


def test_an_expert_starts_from_its_own_seed_whatever_the_others() -> None:
    few, many = (
        Decoder(tiny(**MIXTURE | {"experts": n}))  # type: ignore[arg-type]
        for n in (4, 6)
    )
    for decoder in (few, many):
        decoder.init_weights(0.02, True, 3)
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.mlp.experts.{name}"
        assert torch.equal(few.state_dict()[key], many.state_dict()[key][:4])
        assert many.state_dict()[key].flatten(1).std(1).sub(0.02 / (2 if name == "down_proj" else 1)).abs().max() < 0.003
        assert not torch.equal(many.state_dict()[key][0], many.state_dict()[key][1])


def test_initial_weights_have_the_spread_asked_for() -> None:
    arch = Architecture(family="apertus", vocab=512, hidden=128, layers=2, heads=4, intermediate=256)
    decoder = Decoder(arch)
    decoder.init_weights(0.05, True, 0)
    for name, parameter in decoder.named_parameters():
        match kind_of(name):
            case "norm":
                assert (parameter == 1).all()
            case "scalar":
                grown = F.softplus(parameter).item() + (0.5 if name.endswith("alpha_n") else 0.0)
                assert grown == pytest.approx(0.8, rel=1e-5)
            case _:
                expected = 0.05 / 2 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.05
                assert parameter.std().item() == pytest.approx(expected, rel=0.03)
    gemma = Decoder(tiny("gemma2"))
    gemma.init_weights(0.02, False, 0)
    assert not gemma.model.norm.weight.any()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_is_of_one_kind_and_cut_one_way(name: str) -> None:
    decoder = Decoder(from_hf_config(build(name).config.to_dict()))
    for key, parameter in decoder.named_parameters():
        kind = kind_of(key)
        assert (kind in ("norm", "bias", "scalar")) == (parameter.dim() == 1), key
        assert (kind == "expert") == (parameter.dim() == 3), key
        assert (kind == "router") == key.endswith("mlp.gate.weight"), key
        assert decays(key) == (kind in ("matrix", "expert", "router"))
        assert decays(key, embeddings=True) == (parameter.dim() >= 2)
        module = key.rpartition(".")[0]
        assert (sum(module.endswith(suffix) for suffix in LAYOUT) == 1) == (kind in ("embed", "head", "matrix", "bias")), key


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("rows", [1, 3])
def test_odd_sizes(rows: int, tokens: int) -> None:
    arch = Architecture(
        family="gemma3_text",
        vocab=31,
        hidden=18,
        layers=3,
        heads=3,
        kv_heads=1,
        head_dim=6,
        intermediate=7,
        window=2,
        window_layers=(True, False),
    )
    sampled, labels = batch(arch.vocab, rows, tokens)
    labels[0, 0] = 1
    a, b = (gradients(fresh(arch, ops), sampled, labels) for ops in (REFERENCE, FAST))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_positions_may_be_shared_by_all_rows() -> None:
    decoder = fresh(tiny())
    tokens, labels = batch(decoder.arch.vocab)
    at = torch.arange(tokens.shape[1])
    expected = decoder.loss(tokens, labels)
    assert all(torch.equal(a, b) for a, b in zip(expected, decoder.loss(tokens, labels, at[None]), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, decoder.loss(tokens, labels, at.expand_as(tokens)), strict=True))


def test_the_loss_is_that_of_the_logits() -> None:
    decoder = fresh(tiny("gemma2", logit_softcap=2.0, attention_softcap=3.0, window=5))
    tokens, labels = batch(decoder.arch.vocab)
    loss, ce = decoder.loss(tokens, labels, z_loss=0.01)
    logits = decoder.logits(tokens).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    lse = logits.logsumexp(-1)[labels.flatten() != -100]
    torch.testing.assert_close(ce, expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss, expected + 0.01 * lse.square().sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("numbers", [{}, {"family": "qwen3"}, {"family": "apertus"}, MIXTURE, MIXTURE | {"moe_layers": (True, False)}])
def test_flops_per_token_are_those_torch_counts(numbers: dict[str, Any]) -> None:
    """With one token a sample, where a causal half and a whole are the same."""
    decoder = fresh(tiny(**numbers), REFERENCE)
    tokens, labels = batch(decoder.arch.vocab, rows=6, tokens=1)
    with FlopCounterMode(display=False) as counter:
        decoder.loss(tokens, labels)[0].backward()
    assert counter.get_total_flops() / tokens.numel() == decoder.arch.flops_per_token(1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_each_layer_compiles_whole(family: str) -> None:
    decoder = fresh(tiny(family, window=None if family == "llama" else 5), FUSED)
    tokens, labels = batch(decoder.arch.vocab)
    loss, grads = gradients(decoder, tokens, labels)
    for layer in decoder.layers:
        layer.compile(backend="eager", fullgraph=True)
    again, compiled = gradients(decoder, tokens, labels)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    for key, grad in grads.items():
        torch.testing.assert_close(compiled[key], grad, rtol=1e-9, atol=1e-12)


def test_frequencies_survive_a_cast_of_the_model() -> None:
    """A buffer of frequencies would be rounded by `.to(bfloat16)`."""
    arch = tiny()
    decoder = Decoder(arch).to(torch.bfloat16)
    table = next(iter(decoder.tables.values()))
    cos, _, _ = table(torch.arange(4096)[None], torch.float32)
    angle = torch.arange(4096)[:, None].double() * 10_000.0 ** -(torch.arange(4) / 4).double()
    torch.testing.assert_close(cos[0], angle.cos().float(), rtol=0, atol=1e-3)
