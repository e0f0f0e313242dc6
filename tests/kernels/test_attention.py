"""Masks: who sees whom, and what documents and windows may not leak."""

import pytest
import torch

from gigatrain.kernels import attention, ops

IMPLEMENTATIONS = [getattr(attention, name) for name in ops.available()["attention"]]


def test_plain_causality_needs_no_mask() -> None:
    assert attention.mask(None, None, 8, torch.float32, torch.device("cpu")) == attention.Mask()
    assert attention.mask(None, 8, 8, torch.float32, torch.device("cpu")) == attention.Mask()


def test_mask_is_causal_windowed_and_within_documents() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1], [5, 5, 5, 5, 5]], dtype=torch.int32)
    visible = attention.mask(documents, 2, 5, torch.float32, torch.device("cpu")).visible_btt
    assert visible is not None
    expected = [
        [[j <= i and i - j < 2 and documents[b, i] == documents[b, j] for j in range(5)] for i in range(5)] for b in range(2)
    ]  # fmt: skip
    assert visible[:, 0].tolist() == expected


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 3])
def test_no_gradient_crosses_documents_or_windows(function, window) -> None:
    torch.manual_seed(0)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    q, k, v = (torch.randn(1, 8, 2, 4, requires_grad=True) for _ in range(3))
    seen = attention.mask(documents, window, 8, torch.float32, torch.device("cpu"))
    function(q, k, v, seen, scale=0.5)[:, 6].sum().backward()
    assert v.grad is not None
    touched = v.grad.abs().sum((0, 2, 3)) > 0
    assert touched.tolist() == [False] * 4 + [True, True, True, False]


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
def test_shared_heads_equal_repeated_heads(function) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 9, h, 8, dtype=torch.float64) for h in (6, 2, 2))
    seen = attention.Mask()
    repeated = function(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), seen, scale=0.3)
    torch.testing.assert_close(function(q, k, v, seen, scale=0.3), repeated, rtol=1e-12, atol=1e-12)


def test_key_heads_repeated_for_kernels_that_cannot_share_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `sdpa` does on a GPU under a mask: values and gradients are those of shared heads, and the kernel is not asked to share."""
    torch.manual_seed(2)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]], dtype=torch.int32).expand(2, -1)
    bias = attention.mask(documents, 4, 9, torch.float64, torch.device("cpu")).bias_btt
    asked: list[tuple[bool, int]] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watched(*given, **named):
        asked.append((named["enable_gqa"], given[1].shape[1]))
        return fused(*given, **named)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
    found = []
    for repeat in (False, True):
        torch.manual_seed(3)
        q, k, v = (torch.randn(2, 9, h, 8, dtype=torch.float64, requires_grad=True) for h in (6, 2, 2))
        out = attention._fused(q, k, v, bias, 0.3, repeat=repeat)
        out.square().sum().backward()
        found.append((out, q.grad, k.grad, v.grad))
    assert asked == [(True, 2), (False, 6)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_mask_with_shared_heads_has_a_kernel_that_keeps_no_scores() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = torch.device("cuda")
    q, k, v = (torch.randn(1, 64, h, 64, dtype=torch.bfloat16, device=device) for h in (8, 2, 2))
    seen = attention.mask(None, 16, 64, torch.bfloat16, device)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = attention.sdpa(q, k, v, seen, scale=0.125)
    torch.testing.assert_close(out, attention.reference(q, k, v, seen, scale=0.125), rtol=2e-2, atol=2e-2)
