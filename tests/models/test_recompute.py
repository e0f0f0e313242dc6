"""The activation-lean layer: equal gradients, and exactly the bytes that the plan says."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gigatrain.architectures import Architecture
from gigatrain.kernels import attention
from gigatrain.kernels.ops import choose
from gigatrain.models.decoder import Decoder
from gigatrain.models.recompute import Remade
from gigatrain.planning import cost

CHOSEN = {
    "rms_norm": "lean",
    "add_rms_norm": "lean",
    "rope": "lean",
    "qk_norm_rope": "lean",
    "attention": "sdpa",
    "moe": "grouped",
    "experts": "grouped",
    "linear_cross_entropy": "chunked",
}
LATENT = {"kv_heads": 4, "head_dim": 20, "kv_rank": 16, "rope_head_dim": 8, "value_head_dim": 20, "expert_intermediate": 24}
FAMILIES = [
    {"family": "llama"},
    {"family": "qwen3"},
    {"family": "gemma2", "attention_softcap": None, "logit_softcap": None, "window": None},
    {"family": "olmo2"},
    {"family": "apertus"},
    {"family": "arcee"},
    {"family": "mixtral", "experts": 8, "experts_per_token": 3},
    {"family": "qwen3_moe", "experts": 4, "experts_per_token": 2, "expert_intermediate": 24},
    {"family": "qwen3_moe", "experts": 5, "experts_per_token": 2, "moe_layers": (True, False)},
    {"family": "olmoe", "experts": 4, "experts_per_token": 2, "head_dim": 12},
    {"family": "deepseek_v3", "experts": 8, "experts_per_token": 3, "q_rank": 24, "groups": 4, "groups_per_token": 2, **LATENT},
    {"family": "deepseek_v3", "experts": 4, "experts_per_token": 2, "shared_experts": 2, **LATENT},
    {"family": "gpt_oss", "experts": 4, "experts_per_token": 2},
]


def sinkless(q: Tensor, k: Tensor, v: Tensor, seen: attention.Mask, *, sinks_h: Tensor, scale: float, softcap: float | None) -> Tensor:
    return attention.sdpa(q, k, v, seen, scale=scale, softcap=softcap)


def made(layers: int, dtype: torch.dtype, recompute: str, **family: object) -> Decoder:
    sizes = {"vocab": 67, "hidden": 48, "layers": layers, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 80}
    arch = Architecture.model_validate(sizes | family)
    ops = choose(CHOSEN)
    if arch.sinks:  # which torch's attention has not: what the layer keeps beside attention is counted here
        ops = replace(ops, attention=sinkless)
    model = Decoder(arch, ops, recompute=recompute)  # type: ignore[arg-type]
    model.init_weights(0.2, False, 1)
    return model.to(dtype)


def grads(model: Decoder, tokens: Tensor, retain: bool = False) -> dict[str, Tensor]:
    loss = model.loss(tokens, tokens.roll(-1, 1))[0]
    loss.backward(retain_graph=retain)
    if retain:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family["family"])
def test_gradients_are_bitwise_those_of_a_layer_that_keeps_all(family: dict[str, object], dtype: torch.dtype) -> None:
    tokens = torch.randint(0, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    plain, lean = (grads(made(2, dtype, recompute, **family), tokens) for recompute in ("none", "lean"))
    assert all(torch.equal(plain[name], lean[name]) for name in plain)


def test_a_second_backward_makes_everything_again() -> None:
    tokens = torch.randint(0, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    plain, lean = (grads(made(2, torch.float32, recompute, family="qwen3"), tokens, retain=True) for recompute in ("none", "lean"))
    assert all(torch.equal(plain[name], lean[name]) for name in plain)


def kept(recompute: str, layers: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, **family: object) -> int:
    """Bytes of distinct storages, weights apart, that the forward of all layers leaves for the backward."""
    model = made(layers, dtype, recompute, **family)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            storages[x.untyped_storage().data_ptr()] = x
        return x

    def pack_lean(self: Remade, saved: Tensor) -> object:
        packed = pack_before(self, saved)
        return pack(saved) if packed is saved else packed

    pack_before = Remade._pack
    with monkeypatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        patch.setattr(Remade, "_pack", pack_lean)
        held = model(torch.zeros(2, 32, dtype=torch.long))
    assert held.requires_grad
    return sum(x.untyped_storage().nbytes() for x in storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "lean", "full"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family["family"])
def test_a_layer_keeps_the_bytes_that_the_plan_says(
    family: dict[str, object], recompute: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, three = (kept(recompute, layers, dtype, monkeypatch, **family) for layers in (2, 4))
    arch = made(2, dtype, recompute, **family).arch
    kernels = CHOSEN | {"swiglu": "reference", "geglu": "reference", "xielu": "reference", "relu2": "reference"}
    wide = (
        arch.scoring == "sigmoid" and dtype == torch.bfloat16 and recompute != "full"
    )  # whose router also keeps a copy of its weights, whatever the tokens
    found = (three - one) / 2 / 64 - (4 * arch.experts * arch.hidden / 64 if wide else 0)  # layers, tokens
    assert found == pytest.approx(cost.saved_bytes(arch, dtype.itemsize, recompute, kernels), rel=0.001)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["fused", "glued"])
@pytest.mark.parametrize("family", [family for family in FAMILIES[6:] if family["experts"] != 5], ids=lambda family: family["family"])  # type: ignore[index]
def test_experts_in_triton_keep_the_bytes_that_the_plan_says(
    family: dict[str, object], version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than half of what torch's products keep: no rows, no activation, no results."""
    plain = cost.saved_bytes(made(2, torch.bfloat16, "none", **family).arch, 2, "none", CHOSEN)
    kernels = CHOSEN | {"swiglu": "reference", "geglu": "reference", "moe": version, "experts": version, "router": "fused"}
    monkeypatch.setitem(CHOSEN, "moe", version)
    monkeypatch.setitem(CHOSEN, "router", "fused")
    one, three = (kept("none", layers, torch.bfloat16, monkeypatch, **family) for layers in (2, 4))
    said = cost.saved_bytes(made(2, torch.bfloat16, "none", **family).arch, 2, "none", kernels)
    assert (three - one) / 2 / 64 == pytest.approx(said, rel=0.005)  # ends of experts, and scalars
    assert said < plain


@pytest.mark.parametrize("recompute", ["lean", "selective"])
def test_experts_in_triton_have_the_same_gradients_whatever_is_made_again(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("moe", "router"):
        monkeypatch.setitem(CHOSEN, op, "fused")
    tokens = torch.randint(0, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    plain, again = (grads(made(2, torch.bfloat16, mode, **FAMILIES[6]), tokens) for mode in ("none", recompute))  # type: ignore[arg-type]
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_the_lean_layer_of_llama_keeps_two_thirds() -> None:
    arch = Architecture(family="llama", vocab=128256, hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336)
    fused = {"rms_norm": "fused", "swiglu": "fused"}
    sizes = {recompute: cost.saved_bytes(arch, 2, recompute, fused) for recompute in ("none", "lean", "full")}  # type: ignore[arg-type]
    assert sizes == {"none": 139_400, "lean": 94_344, "full": 8_192}
