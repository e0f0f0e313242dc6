"""AdamW against its formula in float64, and the decisions that the device takes."""

import pytest
import torch

from gigatrain.optim.adamw import AdamW, Flat


def group(weight_decay=0.1, lr=1e-2):
    torch.manual_seed(0)
    shapes = {"a": torch.Size([5, 3]), "b": torch.Size([7])}
    master, grads = Flat(shapes, torch.device("cpu")), Flat(shapes, torch.device("cpu"))
    master.buffer.normal_()
    return AdamW("decayed", master, grads, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)


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
def test_fifty_updates_follow_the_formula(decay):
    adamw = group(decay)
    start = adamw.master.buffer.clone()
    gradients = [torch.randn_like(start) for _ in range(50)]
    rates = [0.02 * (step + 1) for step in range(50)]
    for gradient, rate in zip(gradients, rates, strict=True):
        adamw.grads.buffer.copy_(gradient)
        adamw.step(rate, torch.tensor(0.5), torch.tensor(0.0))
    expected = formula(start, [0.5 * gradient for gradient in gradients], rates, 1e-2, decay)
    torch.testing.assert_close(adamw.master.buffer.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_skipped_update_changes_no_bit_even_when_the_gradient_is_nan():
    adamw = group()
    adamw.grads.buffer.normal_()
    adamw.step(1.0, torch.tensor(1.0), torch.tensor(0.0))
    before = {name: tensor.clone() for name, tensor in (adamw.state() | {"w": adamw.master.buffer}).items()}
    adamw.grads.buffer.fill_(float("nan"))
    adamw.step(1.0, torch.tensor(float("nan")), torch.tensor(1.0))
    after = adamw.state() | {"w": adamw.master.buffer}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_empty_group_is_no_error():
    empty = Flat({}, torch.device("cpu"))
    AdamW("plain", empty, Flat({}, torch.device("cpu")), lr=1.0, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0).step(
        1.0, torch.tensor(1.0), torch.tensor(0.0)
    )


def test_the_state_is_named_by_parameter_and_live():
    adamw = group()
    state = adamw.state()
    assert set(state) == {"exp_avg.a", "exp_avg.b", "exp_avg_sq.a", "exp_avg_sq.b", "updates.decayed"}
    state["exp_avg.b"].fill_(3.0)
    assert adamw.exp_avg.buffer[15:].eq(3.0).all()
