"""The whole decoder on fused kernels, in Triton's interpreter: equal to the references, verified before it starts, and trained."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from gigatrain.architectures import Architecture
from gigatrain.errors import KernelError
from gigatrain.kernels import ops
from gigatrain.kernels.attention import Mask
from gigatrain.models import decoder
from gigatrain.models.decoder import Decoder, verify, verify_attention

CPU = torch.device("cpu")

FUSED = {name: "fused" for name, operation in ops.OPERATIONS.items() if "fused" in operation.versions}
WIDTHS: dict[str, Any] = {"vocab": 131, "hidden": 48, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 12, "intermediate": 72}
FAMILIES = ["llama", "qwen3", "gemma3_text", "olmo2", "helium", "apertus", "arcee", "granite"]


def arch(family: str) -> Architecture:
    return Architecture.model_validate({"family": family} | WIDTHS | ({"residual_scale": 0.5} if family == "granite" else {}))


def run(family: str, kernels: dict[str, str], dtype: torch.dtype, recompute: str = "none", dropout: float = 0.0) -> dict[str, Tensor]:
    model = Decoder(arch(family), ops.choose(kernels), recompute=recompute, dropout=dropout)  # type: ignore[arg-type]
    model.init_weights(0.1, False, 3)
    model.to(dtype)
    tokens = torch.randint(0, 131, (2, 9), generator=torch.Generator().manual_seed(0))
    loss, _ = model.loss(tokens, tokens.roll(-1, 1), z_loss=1e-3, seed=torch.tensor(5))
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_err_at_most_twice_as_much_as_the_references(family: str) -> None:
    exact, plain, fused = (
        run(family, kernels, dtype) for kernels, dtype in (({}, torch.float64), ({}, torch.bfloat16), (FUSED, torch.bfloat16))
    )
    errors = [sum((found[name].double() - exact[name]).square().sum() for name in exact if name != "loss") for found in (plain, fused)]
    assert errors[1] <= 4 * errors[0]
    assert abs(fused["loss"] - exact["loss"]) <= max(2 * abs(plain["loss"] - exact["loss"]), 1e-3 * exact["loss"])


@pytest.mark.parametrize("recompute", ["lean", "selective", "full"])
def test_recomputation_with_fused_kernels_and_dropout_changes_nothing(recompute: str) -> None:
    plain, again = (run("qwen3", FUSED, torch.float32, mode, dropout=0.2) for mode in ("none", recompute))
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "apertus", "smollm3"])
def test_every_kernel_of_a_family_is_verified_before_a_run(family: str) -> None:
    tokens = (33, 128) if family == "llama" else (33,)  # 128: the loss in two chunks
    worst = verify(arch(family), FUSED, torch.device("cpu"), torch.bfloat16, tokens)
    expected = {"embedding", "rms_norm", "add_rms_norm", "dropout_add", "attention", "linear_cross_entropy", arch(family).activation}
    assert set(worst) == expected | {"qk_norm_rope" if arch(family).qk_norm == "head" else "rope"}
    assert all(0 <= multiple <= 1 for multiple in worst.values())


def test_a_kernel_that_is_wrong_here_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.OPERATIONS["swiglu"].versions["fused"]
    monkeypatch.setitem(ops.OPERATIONS["swiglu"].versions, "fused", lambda gate, up: right(gate, up) * 1.02)  # type: ignore[arg-type]
    with pytest.raises(KernelError, match=r'swiglu fused errs .* times as much .* set kernels.swiglu = "reference"'):
        verify(arch("llama"), FUSED, torch.device("cpu"), torch.bfloat16, (33,))


@pytest.mark.parametrize("name", ["sdpa", "blocked", "fused"])
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_any_attention_but_plain_torch_is_verified_on_the_runs_own_shape(family: str, name: str) -> None:
    wide = arch(family).model_copy(update={"window": 20, "window_layers": (True, False)} if family == "gemma2" else {})
    worst = verify_attention(wide, {"attention": name}, CPU, torch.bfloat16, 96, packed=True, scores=4 * 64 * 64)
    assert 0 < worst["attention"] <= 1


def test_an_attention_that_leaks_between_documents_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.OPERATIONS["attention"].versions["blocked"]
    monkeypatch.setitem(ops.OPERATIONS["attention"].versions, "blocked", lambda q, k, v, mask, **options: right(q, k, v, Mask(), **options))  # type: ignore[arg-type]
    assert verify_attention(arch("llama"), {"attention": "blocked"}, CPU, torch.bfloat16, 64, packed=False)["attention"] <= 1
    with pytest.raises(KernelError, match=r'attention blocked errs .* times as much .* set kernels.attention = "reference"'):
        verify(arch("llama"), {"attention": "blocked"}, CPU, torch.bfloat16, (33,), sequence=64, packed=True)


def test_a_wrong_gradient_of_sinks_is_refused() -> None:
    worst: dict[str, float] = {}
    q, k, v = (torch.randn(1, 12, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    sinks = torch.randn(4, requires_grad=True)
    ops.checked({"attention": "blocked"}, worst).attention(q, k, v, Mask(), scale=0.25, sinks_h=sinks)
    assert 0 < worst["attention"] <= 1

    def numb(*given: Any, sinks_h: Tensor, **options: Any) -> Tensor:
        return ops.OPERATIONS["attention"].versions["blocked"](*given, sinks_h=sinks_h.detach() + 0 * sinks_h, **options)

    assert ops._multiple(ops.REFERENCE.attention, numb, (q, k, v, Mask()), {"scale": 0.25, "sinks_h": sinks}) > 10


def test_a_run_halves_its_samples_and_windows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    chosen = ops.REFERENCE

    def mask(documents: Tensor | None, window: int | None, tokens: int, *rest: Any) -> Mask:
        asked.append((tokens, window))
        return chosen.mask(documents, window, tokens, *rest)

    monkeypatch.setattr(decoder, "checked", lambda kernels, worst: dataclasses.replace(chosen, mask=mask))
    wide = arch("gemma2").model_copy(update={"window": 300, "window_layers": (True, True)})
    verify_attention(wide, {"attention": "sdpa"}, CPU, torch.float32, 2048, packed=False, ranks=2, scores=2 * 256 * 256)
    assert asked == [(256, 37)]
