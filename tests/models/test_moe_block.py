"""What a router adds to the decoder: losses as transformers computes them, and a correction that is state and no parameter."""

import importlib
from typing import Any

import pytest
import torch
from families import build, wide_norms
from test_decoder import FAST, LATENT, batch, fresh, gradients, ours, tiny
from torch import Tensor
from torch.nn import functional as F

from gigatrain.architectures import from_hf_config
from gigatrain.kernels.ops import REFERENCE
from gigatrain.models import hf
from gigatrain.models.decoder import Decoder, kind_of


def transformers_balance(model: Any, logits: tuple[Tensor, ...]) -> Tensor:
    """transformers' own loss of balance, with its fp32 sums in fp64."""
    module = importlib.import_module(type(model).__module__)
    config, kept = model.config, (torch.float32, Tensor.float)
    try:
        torch.float32, Tensor.float = torch.float64, Tensor.double  # type: ignore[misc,assignment]
        return module.load_balancing_loss_func(logits, config.num_local_experts, config.num_experts_per_tok)
    finally:
        torch.float32, Tensor.float = kept  # type: ignore[misc,assignment]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "qwen3-moe-mixed", "olmoe", "gpt-oss"])
def test_the_loss_of_balance_is_that_of_transformers(name: str, recompute: Any) -> None:
    """Value and every gradient of the mean loss plus 0.1 times that of balance, and the router's z-loss by its formula."""
    model = build(name).double()
    tokens, labels = batch(model.config.vocab_size)
    targets = (labels >= 0).sum()
    seen: list[Tensor] = []
    gates = [module for key, module in model.named_modules() if type(module).__name__.endswith("Router")]
    for gate in gates:
        gate.register_forward_hook(lambda gate, inputs, outputs: seen.append(outputs[0]))
    with wide_norms(model):
        logits = model(tokens, use_cache=False).logits
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        aux = transformers_balance(model, tuple(seen))
        z = torch.stack([layer.logsumexp(-1).square().mean() for layer in seen]).mean()
        (cross_entropy / targets + 0.1 * aux + 0.01 * z).backward()
    arch = from_hf_config(model.config.to_dict())
    expected = hf.from_hf({k: p.grad for k, p in model.named_parameters()}, arch)
    for ops in (REFERENCE, FAST):
        decoder = ours(model, ops, torch.float64, watched=True, recompute=recompute)
        decoder.train()
        loss, plain = decoder.loss(tokens, labels, router_aux=0.1, router_z=0.01)
        (loss / targets).backward()
        torch.testing.assert_close((loss - plain) / targets, 0.1 * aux + 0.01 * z, rtol=1e-10, atol=0)
        for key, parameter in decoder.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-9, atol=1e-11 * expected[key].abs().max().item() + 1e-13)
        assert [int(v.sum()) for v in decoder.visits().values()] == [tokens.numel() * model.config.num_experts_per_tok] * len(gates)


def test_a_router_that_is_watched_changes_nothing() -> None:
    arch = tiny("deepseek_v3", **LATENT)
    tokens, labels = batch(arch.vocab)
    plain, watched = (gradients(fresh(arch, watched=watched), tokens, labels) for watched in (False, True))
    assert torch.equal(plain[0], watched[0])
    assert all(torch.equal(plain[1][key], watched[1][key]) for key in plain[1])


def test_a_correction_is_part_of_the_model_and_of_no_gradient() -> None:
    decoder = fresh(tiny("deepseek_v3", **LATENT))
    (name,) = decoder.corrections()
    assert name == "model.layers.1.mlp.gate.e_score_correction_bias"
    assert name in decoder.state_dict()
    assert name not in dict(decoder.named_parameters())
    assert kind_of(name) == "state"
    tokens, labels = batch(decoder.arch.vocab)
    before, _ = gradients(decoder, tokens, labels)
    decoder.corrections()[name][0] += 10.0  # every token visits the first expert
    after, _ = gradients(decoder, tokens, labels)
    assert before != after
    narrow = decoder.to(torch.bfloat16)
    assert narrow.corrections()[name].dtype == torch.float64


def test_a_correction_keeps_fp32_where_the_weights_do_not() -> None:
    with torch.device("meta"):
        decoder = Decoder(tiny("deepseek_v3", **LATENT)).to(torch.bfloat16)
    decoder.to_empty(device="cpu")
    (correction,) = decoder.corrections().values()
    assert (correction.dtype, correction.device.type) == (torch.float32, "cpu")
    decoder.init_weights(0.02, False, 0)
    assert not correction.any()
    correction[1] = 1e-3 + 2**-20
    (moved,) = decoder.to(torch.bfloat16).corrections().values()
    assert moved[1] == correction[1]
