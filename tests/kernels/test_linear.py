"""The product of a layer's matrix, with what it spares: several layers at once, and gradients that it sums itself."""

import pytest
import torch
from torch import nn

from gigatrain.kernels.linear import CASES, Joined, Linear, Sum, _sample, beside, reference, several, summed


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_summed_product_errs_at_most_twice_as_much_as_plain_torch(case):
    """Outputs and gradients, over two microbatches whose gradients are added."""
    bias, dtype = case[3:]
    totals = []
    for wide, ours in ((True, False), (False, False), (False, True)):
        torch.manual_seed(0)
        found, room = [], torch.full(case[2:0:-1], float("nan"))
        into = Sum(lambda room=room: room)
        total: list[torch.Tensor] = [torch.zeros(())]
        for _ in range(2):
            tensors, _ = _sample(case, "cpu")
            dy = torch.randn(case[0], case[2]).to(dtype)
            leaves = [x.to(torch.float64 if wide else dtype).requires_grad_() for x in tensors]
            y = summed(*leaves, into=into) if ours else reference(*leaves)
            y.backward(dy.to(y.dtype))
            found += [y.detach(), leaves[0].grad, *([leaves[2].grad] if bias else [])]
            if ours:
                assert leaves[1].grad is None
            else:
                assert leaves[1].grad is not None
                total[0] = total[0] + leaves[1].grad.to(torch.float64 if wide else torch.float32)
        totals.append([*found, into.room() if ours else total[0]])
    for exact, plain, ours in zip(*totals, strict=True):
        rounding = torch.finfo(plain.dtype).eps * exact.norm()
        assert (ours.double() - exact).norm() <= 2 * (plain.double() - exact).norm() + rounding


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8)])
@pytest.mark.parametrize("apart", [(), (2,)])
def test_layers_of_one_product_give_what_they_give_alone(bias, shape, apart):
    torch.manual_seed(1)
    layers = [Linear(8, width, bias=bias, product=reference) for width in (6, 2, 4)]
    whole = torch.cat([layer.weight.data for layer in layers])
    x = torch.randn(shape, requires_grad=True)
    slopes = [torch.randn(*shape[:-1], width) for width in (6, 2, 4)]

    def results():
        outputs = several(x, *layers)
        grads = torch.autograd.grad(outputs, [x, *(p for layer in layers for p in layer.parameters())], slopes)
        return [*outputs, *grads]

    expected = results()
    for layer, part in zip(layers, whole.split([6, 2, 4]), strict=True):
        layer.weight.data = part
    layers[0].joined = Joined(whole.data, reference, apart)
    found = results()
    assert found[2].untyped_storage().nbytes() == (found[2] if apart else torch.cat(found[:3], -1)).numel() * 4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_layer_of_another_kind_is_asked_by_itself():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    x = torch.randn(3)
    assert torch.equal(several(x, Doubled())[0], 2 * x)


def test_a_sum_replaces_what_was_there_once_a_step_and_then_adds():
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(5, 3, width, generator=generator) for width in (4, 6))
    product, into, told = dy.flatten(0, 1).t() @ x.flatten(0, 1), torch.full((6, 4), float("nan")), []
    found = Sum(lambda: into, done=lambda: told.append(0))
    for expected in (product, 2 * product):
        found.add(dy, x)
        torch.testing.assert_close(into, expected)
    found.begun = False
    found.add(dy, x)
    torch.testing.assert_close(into, product)
    assert len(told) == 3


def test_outputs_beside_each_other_are_taken_as_they_lie():
    whole = torch.randn(2, 3, 10)
    parts = whole.split([4, 2, 4], -1)
    assert beside(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(beside(parts), whole)
    for other in (parts[::-1], (parts[0], parts[1]), [part.contiguous() for part in parts]):
        assert torch.equal(beside(other), torch.cat(list(other), -1))
