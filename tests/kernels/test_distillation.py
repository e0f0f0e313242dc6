"""The chunked distillation loss against plain torch in fp64: values, gradients, what it is at the ends, and that no full logits exist."""

import pytest
import torch
from torch.nn import functional as F

from gigatrain.kernels import distillation
from gigatrain.kernels.linear_cross_entropy import chunked_finely

HOW = [(None, 1.0, 1.0, 0.5), (5.0, 0.5, 2.0, 1.0), (None, 1.0, 0.7, 0.3), (None, 1.0, 1.0, 0.0)]


def case(n, h, v, k, dtype, temperature, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ids, logprobs = distillation.top(draw(n, h), draw(v, h), k, temperature=temperature)
    labels = torch.randint(v, (n,), generator=generator)
    labels[::7] = -100
    return draw(n, h).requires_grad_(), draw(v, h).requires_grad_(), labels, ids.long(), logprobs


def graded(act, given, **how):
    loss, ce, kl = act(*given, **how)
    return loss.detach(), ce, kl, *torch.autograd.grad(loss, given[:2])


@pytest.mark.parametrize(("softcap", "scale", "temperature", "weight"), HOW)
@pytest.mark.parametrize(("n", "v", "k"), [(150, 31, 5), (150, 31, 31), (70, 31, 1), (1, 3, 2)])
def test_chunks_give_what_plain_torch_gives(n, v, k, softcap, scale, temperature, weight):
    how = {"weight": weight, "temperature": temperature, "softcap": softcap, "scale": scale}
    given = case(n, 8, v, k, torch.float64, temperature)
    with chunked_finely():
        found = graded(distillation.chunked, given, **how)
    for one, other in zip(found, graded(distillation.reference, given, **how), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_plain_torch_s(dtype):
    how = {"weight": 0.5, "temperature": 2.0}
    given = case(150, 8, 31, 5, dtype, 2.0)
    exact = graded(distillation.reference, [*(one.detach().double().requires_grad_() for one in given[:2]), *given[2:]], **how)
    found, plain = graded(distillation.chunked, given, **how), graded(distillation.reference, given, **how)
    for one, other, true in zip(found, plain, exact, strict=True):
        error, allowed = ((each.double() - true).norm() for each in (one, other))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * true.norm() / 8


@pytest.mark.parametrize(("softcap", "scale", "temperature", "weight"), HOW)
def test_all_of_the_vocabulary_is_the_whole_divergence(softcap, scale, temperature, weight):
    """Against torch's own kl_div and cross entropy of all logits of both, values and gradients."""
    n, v = 90, 31
    generator = torch.Generator().manual_seed(1)
    teacher_h, teacher_w = (torch.randn(*shape, 8, generator=generator, dtype=torch.float64) for shape in ((n,), (v,)))
    ids, logprobs = distillation.top(teacher_h, teacher_w, v, temperature=temperature)
    h, w, labels, *_ = case(n, 8, v, 1, torch.float64, 1.0)
    s = F.linear(h, w) * scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    logp = (F.linear(teacher_h, teacher_w) / temperature).log_softmax(1)
    kl = F.kl_div((s / temperature).log_softmax(1), logp, log_target=True, reduction="none").sum(1)[labels >= 0].sum()
    loss = (1 - weight) * F.cross_entropy(s, labels, reduction="sum") + weight * temperature**2 * kl
    expected = loss.detach(), kl.detach(), *torch.autograd.grad(loss, (h, w))
    how = {"weight": weight, "temperature": temperature, "softcap": softcap, "scale": scale}
    with chunked_finely():
        total, _, found, *grads = graded(distillation.chunked, (h, w, labels, ids.long(), logprobs), **how)
    for one, other in zip((total, found, *grads), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-11)


def test_the_divergence_grows_with_k_and_is_nothing_of_oneself():
    h, w, labels, *_ = case(60, 8, 31, 1, torch.float64, 1.0)
    other = torch.randn(31, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    kls = []
    for k in (1, 4, 16, 31):
        ids, logprobs = distillation.top(h.detach(), other, k)
        kls.append(distillation.chunked(h, w, labels, ids.long(), logprobs, weight=1.0)[2].item())
        ids, logprobs = distillation.top(h.detach(), w.detach(), k)
        own = graded(distillation.chunked, (h, w, labels, ids.long(), logprobs), weight=1.0)
        assert own[2].item() == pytest.approx(0.0, abs=1e-10)
        assert all(grad.abs().max() < 1e-12 for grad in own[3:])
    assert 0 < kls[0] < kls[1] < kls[2] < kls[3]


def test_ids_stay_below_the_vocabulary_that_both_have_and_probabilities_add_up():
    h, w, *_ = case(40, 8, 31, 1, torch.float32, 1.0)
    ids, logprobs = distillation.top(h.detach(), w.detach(), 6, vocab=20)
    assert int(ids.max()) < 20
    assert torch.allclose(logprobs.exp().sum(1), torch.ones(40), atol=1e-6)


def test_no_full_logits_of_either_exist():
    """The largest tensor that is made is a chunk's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            for one in found if isinstance(found, (tuple, list)) else (found,):
                if isinstance(one, torch.Tensor):
                    self.largest = max(self.largest, one.numel())
            return found

    n, v = 4096, 97
    given = case(n, 8, v, 4, torch.float32, 1.0)
    with chunked_finely(), Sizes() as sizes:
        graded(distillation.chunked, given, weight=0.5)
        distillation.top(given[0].detach(), given[1].detach(), 4)
    assert sizes.largest < n * v / 8


@pytest.mark.parametrize(("v", "k"), [(31, 5), (31, 1), (31, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [distillation.chunked, distillation.reference])
def test_a_low_temperature_overflows_nothing(form, dtype, v, k):
    """At T = 0.1 a sure student's rest is e^-400 of the whole, and of some rows, whose logits are even, it is nearly all."""
    how = {"weight": 0.5, "temperature": 0.1}
    hidden, weight, labels, ids, logprobs = case(150, 8, v, k, dtype, 0.1)
    with torch.no_grad():
        hidden.mul_(6)[::3] *= 1e-3
    given = hidden, weight, labels, ids, logprobs
    exact = graded(distillation.reference, [*(one.detach().double().requires_grad_() for one in given[:2]), *given[2:]], **how)
    with chunked_finely():
        found = graded(form, given, **how)
    coarse = 16 * torch.finfo(dtype).eps  # sums of logits of some 60, in fp32 of a bf16 product
    for one, true in zip(found, exact, strict=True):
        assert one.isfinite().all()
        assert (one.double() - true).norm() <= coarse * true.norm()
