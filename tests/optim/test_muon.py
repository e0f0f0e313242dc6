"""Muon: the iteration orthogonalises, the update has the stated size, a skip changes nothing."""

import pytest
import torch

from gigatrain.optim.adamw import Flat
from gigatrain.optim.muon import Muon, newton_schulz


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 48, 16), (1, 17, 65)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    torch.manual_seed(1)
    values = torch.linalg.svdvals(newton_schulz(torch.randn(shape)).float())
    assert values.min() > 0.3  # square random matrices have singular values near 0, which five steps lift only so far
    assert values.max() < 1.3


def test_newton_schulz_keeps_the_singular_vectors():
    torch.manual_seed(2)
    matrix = torch.randn(24, 40, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = newton_schulz(matrix[None])[0].double()
    overlap = torch.diagonal(u.T @ found @ vh.T)
    assert overlap.min() > 0.5
    assert (u.T @ found @ vh.T - torch.diag(overlap)).abs().max() < 0.05  # bf16


def muon(shapes):
    torch.manual_seed(0)
    master, grads = Flat(shapes, torch.device("cpu")), Flat(shapes, torch.device("cpu"))
    master.buffer.normal_()
    return Muon(master, grads, lr=0.1, momentum=0.9, weight_decay=0.01)


def test_one_update_is_the_formula():
    group = muon({"a": torch.Size([8, 4]), "b": torch.Size([8, 4]), "c": torch.Size([4, 12])})
    before = {name: view.clone() for name, view in group.master.views.items()}
    group.grads.buffer.normal_()
    group.step(0.5, torch.tensor(2.0), torch.tensor(0.0))
    for name, view in group.master.views.items():
        gradient = 2.0 * group.grads.views[name]
        update = newton_schulz((gradient + 0.9 * gradient)[None])[0].float() * max(1.0, view.shape[0] / view.shape[1]) ** 0.5
        torch.testing.assert_close(view, before[name] * (1 - 0.05 * 0.01) - 0.05 * update, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(group.momentum_buffer.views[name], gradient)


def test_a_skipped_update_changes_no_bit():
    group = muon({"a": torch.Size([6, 4])})
    group.grads.buffer.normal_()
    group.step(1.0, torch.tensor(1.0), torch.tensor(0.0))
    before = group.master.buffer.clone(), group.momentum_buffer.buffer.clone()
    group.grads.buffer.fill_(float("inf"))
    group.step(1.0, torch.tensor(float("nan")), torch.tensor(1.0))
    assert torch.equal(before[0], group.master.buffer)
    assert torch.equal(before[1], group.momentum_buffer.buffer)
