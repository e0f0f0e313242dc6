"""An AdamW group against its formula in float64, the decisions that the device takes, and states that leave and come back."""

import itertools
from typing import Any

import pytest
import torch

from gigatrain.kernels import adamw as kernel
from gigatrain.optim.adamw import AdamW, Flat

SHAPES = {"a": torch.Size([5, 3]), "b": torch.Size([7]), "c": torch.Size([40, 32])}
FORMS = list(itertools.product(("fp32", "bf16+16", "bf16+8"), ("fp32", "bf16", "int8")))


def group(weight_decay: float = 0.1, lr: float = 1e-2, seed: int = 0, **form: Any) -> AdamW:
    generator = torch.Generator().manual_seed(seed)
    start = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return AdamW("decayed", start, kernel.Rates((0.9, 0.95), 1e-8, weight_decay, True), torch.device("cpu"), lr=lr, **form)


def formula(weights, gradients, rates, lr, decay, betas=(0.9, 0.95), eps=1e-8):
    """Loshchilov and Hutter, in float64."""
    w, m, v = weights.double(), torch.zeros_like(weights).double(), torch.zeros_like(weights).double()
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = gradient.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        w = w * (1 - lr * rate * decay)
        w = w - lr * rate * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return w


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("version", ["foreach", "reference", "fused"])
def test_fifty_updates_follow_the_formula(decay: float, version: str) -> None:
    adamw = group(decay, version=version)
    start = adamw.bucket.weight.clone()
    gradients = [torch.randn_like(start) for _ in range(50)]
    rates = [0.02 * (step + 1) for step in range(50)]
    for gradient, rate in zip(gradients, rates, strict=True):
        adamw.grads.buffer.copy_(gradient)
        adamw.step(rate, torch.tensor(0.5), torch.tensor(0.0))
    expected = formula(start, [0.5 * gradient for gradient in gradients], rates, 1e-2, decay)
    torch.testing.assert_close(adamw.bucket.weight.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("version", ["reference", "fused"])
@pytest.mark.parametrize(("master", "moments"), FORMS)
def test_every_form_follows_the_formula_as_far_as_it_can(master: str, moments: str, version: str) -> None:
    adamw = group(master=master, moments=moments, version=version, gradients=torch.bfloat16)
    start = torch.cat([view.reshape(-1) for view in adamw.state()[0].values()])
    adamw.forget()
    gradients = [torch.randn_like(start).bfloat16() for _ in range(20)]
    for gradient in gradients:
        adamw.grads.buffer.copy_(gradient)
        adamw.step(1.0, torch.tensor(0.5), torch.tensor(0.0))
    expected = formula(start, [0.5 * gradient.float() for gradient in gradients], [1.0] * 20, 1e-2, 0.1)
    found = torch.cat([view.reshape(-1) for view in adamw.state()[0].values()])
    off = (found.double() - expected).norm() / (expected - start.double()).norm()
    assert off < max({"fp32": 1e-5, "bf16+16": 1e-5, "bf16+8": 2e-3}[master], {"fp32": 0.0, "bf16": 5e-3, "int8": 0.04}[moments])
    if master != "fp32":
        for name, view in adamw.weights.items():
            assert view.dtype == torch.bfloat16
            torch.testing.assert_close(view.float(), adamw.state()[0][name], rtol=2**-8, atol=0)


@pytest.mark.parametrize("version", ["foreach", "reference", "fused"])
def test_a_skipped_update_changes_no_bit_even_when_the_gradient_is_nan(version: str) -> None:
    adamw = group(version=version)
    adamw.grads.buffer.normal_()
    adamw.step(1.0, torch.tensor(1.0), torch.tensor(0.0))
    before = {name: tensor.clone() for found in adamw.state() for name, tensor in found.items()}
    adamw.grads.buffer.fill_(float("nan"))
    adamw.step(1.0, torch.tensor(float("nan")), torch.tensor(1.0))
    after = adamw.state()[0] | adamw.state()[1]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_empty_group_is_no_error() -> None:
    empty = AdamW("plain", {}, kernel.Rates((0.9, 0.9), 1e-8, 0.0), torch.device("cpu"), lr=1.0)
    empty.step(1.0, torch.tensor(1.0), torch.tensor(0.0))
    assert empty.state()[0] == {}


def test_an_empty_group_lies_where_the_others_do() -> None:
    """Muon leaves no decayed matrix to AdamW; on a GPU its empty gradients lay on the host, where the norm of all would not have them."""
    empty = AdamW("plain", {}, kernel.Rates((0.9, 0.9), 1e-8, 0.0), torch.device("meta"), lr=1.0)
    assert empty.grads.buffer.device == empty.bucket.weight.device == torch.device("meta")


def test_the_state_is_named_by_parameter_and_live_where_it_is_fp32() -> None:
    adamw = group()
    weights, state = adamw.state()
    assert set(weights) == set(SHAPES)
    assert set(state) == {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in SHAPES} | {"updates.decayed"}
    state["exp_avg.b"].fill_(3.0)
    assert adamw.bucket.exp_avg[15:22].eq(3.0).all()


@pytest.mark.parametrize(("master", "moments"), FORMS)
def test_an_interrupted_group_goes_on_to_the_same_bits(master: str, moments: str) -> None:
    """Through fp32 and back; random bits are a function of the seed and the count of updates, so that there is nothing else to keep."""

    def stepped(adamw: AdamW, seeds: range) -> AdamW:
        for seed in seeds:
            adamw.grads.buffer.copy_(torch.randn(adamw.grads.buffer.shape, generator=torch.Generator().manual_seed(seed)))
            adamw.step(0.5, torch.tensor(1.0), torch.tensor(0.0))
            adamw.forget()
        return adamw

    form: dict[str, Any] = {"master": master, "moments": moments, "version": "reference"}
    first, second = stepped(group(**form), range(5)), group(seed=9, **form)
    saved, live = first.state(), second.state()
    for mine, theirs in zip(saved, live, strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert tensor.dtype == torch.float32
            tensor.copy_(mine[name])
    second.restore()
    second.forget()
    for adamw in (first, second):
        stepped(adamw, range(5, 10))
    for mine, theirs in zip(first.state(), second.state(), strict=True):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert torch.equal(first.bucket.exp_avg_sq, second.bucket.exp_avg_sq)


def test_a_state_saved_in_one_form_can_be_taken_up_in_another() -> None:
    wide = group(version="reference")
    for _ in range(3):
        wide.grads.buffer.normal_()
        wide.step(1.0, torch.tensor(1.0), torch.tensor(0.0))
    for master, moments in FORMS:
        other = group(seed=4, master=master, moments=moments, version="reference")
        for mine, theirs in zip(wide.state(), other.state(), strict=True):
            for name, tensor in theirs.items():
                tensor.copy_(mine[name])
        other.restore()
        other.forget()
        for mine, theirs in zip(wide.state(), other.state(), strict=True):
            for name, tensor in theirs.items():
                torch.testing.assert_close(tensor, mine[name], rtol=2**-15 if name in SHAPES else 2**-5, atol=1e-3)


def test_weights_that_compute_are_views_of_the_bucket_and_begin_at_sixteen_bytes() -> None:
    forms: list[dict[str, Any]] = [{"master": "bf16+8"}, {"copy": True}]
    for form in forms:
        adamw = group(version="reference", **form)
        assert list(adamw.weights) == ["c", "a", "b"]  # odd lengths last
        stored = adamw.bucket.weight if adamw.bucket.copy is None else adamw.bucket.copy
        assert all(view.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr() for view in adamw.weights.values())
        assert adamw.weights["c"].data_ptr() % 16 == 0
        before = adamw.weights["a"].clone()
        adamw.grads.buffer.fill_(1.0)
        adamw.step(10.0, torch.tensor(1.0), torch.tensor(0.0))
        assert (adamw.weights["a"] < before).all()


def test_a_rate_on_the_device_is_read_there() -> None:
    one, other = group(version="reference"), group(version="reference")
    for adamw, rate in ((one, 0.25), (other, torch.tensor(0.25))):
        adamw.grads.buffer.fill_(1.0)
        adamw.step(rate, torch.tensor(1.0), torch.tensor(0.0))
    assert torch.equal(one.bucket.weight, other.bucket.weight)


def test_flat_lays_tensors_end_to_end() -> None:
    flat = Flat(SHAPES, torch.device("cpu"), torch.bfloat16)
    flat.views["b"].fill_(2.0)
    assert flat.buffer.dtype == torch.bfloat16
    assert flat.buffer[15:22].eq(2.0).all()
    assert flat.buffer.sum() == 14
