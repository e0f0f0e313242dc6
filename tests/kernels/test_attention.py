"""Masks: who sees whom, what each version reads of it, and what documents and windows may not leak."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from gigatrain.errors import KernelError
from gigatrain.kernels import attention, attention_mask, attention_torch, ops

CPU = torch.device("cpu")
HERE = [name for name in ops.available()["attention"] if name not in attention_torch.LIMITS]  # the rest are torch's, for GPUs
IMPLEMENTATIONS = [getattr(attention, name) for name in HERE]
ROWS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 7]], dtype=torch.int32)


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
    dtype, error = (torch.float32, 1e-5) if function is attention.fused else (torch.float64, 1e-12)  # which has no fp64
    q, k, v = (torch.randn(2, 9, h, 8, dtype=dtype) for h in (6, 2, 2))
    seen = attention.Mask()
    repeated = function(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), seen, scale=0.3)
    torch.testing.assert_close(function(q, k, v, seen, scale=0.3), repeated, rtol=error, atol=error)


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


def seen_by_ids(documents: Tensor | None, window: int | None, tokens: int, rows: int) -> Tensor:
    """The definition, pair by pair."""
    ids = torch.zeros(rows, tokens).int() if documents is None else documents
    at = torch.arange(tokens)
    near = (at[:, None] >= at) & (at[:, None] - at < (window or tokens))
    return near & (ids[:, :, None] == ids[:, None, :])


@pytest.mark.parametrize("window", [None, 1, 3, 10])
@pytest.mark.parametrize("documents", [None, ROWS])
def test_bounds_are_the_first_key_and_the_end_of_the_queries(documents: Tensor | None, window: int | None) -> None:
    if documents is None and window is None:
        return
    seen = attention.mask(documents, window, 11, torch.float32, CPU, parts=("bounds",))
    assert seen.visible_btt is None
    assert seen.bias_btt is None
    assert seen.first_bt is not None
    assert seen.stop_bt is not None
    visible = seen_by_ids(documents, window, 11, len(seen.first_bt))
    assert torch.equal(visible.int().argmax(-1).int(), seen.first_bt)
    assert torch.equal((11 - visible.flip(1).int().argmax(1)).int(), seen.stop_bt)
    assert torch.equal(attention_mask.visible(seen, 11, CPU)[:, 0], visible)  # of a mask that has no square


def test_an_index_that_comes_back_is_another_document() -> None:
    documents = torch.tensor([[1, 1, 2, 2, 1, 1]], dtype=torch.int32)
    assert attention_mask.firsts(documents, None, 6, CPU).tolist() == [[0, 0, 2, 2, 4, 4]]


def test_sequences_have_a_length_of_the_shape_alone() -> None:
    starts, fault = attention_mask.sequences(ROWS)
    assert starts.tolist() == [0, 3, 7, 11, 21] + [22] * 12  # 8 a row, and the end
    assert fault.tolist() == [0.0]
    assert starts.dtype == torch.int32
    long = torch.zeros(2, 1024, dtype=torch.int32)
    assert attention_mask.sequences(long)[0].tolist() == [0, 1024] + [2048] * 31


def test_more_documents_than_there_is_room_for_are_a_nan() -> None:
    crowded = torch.arange(9, dtype=torch.int32)[None]
    starts, fault = attention_mask.sequences(crowded)
    assert len(starts) == 9
    assert fault.isnan().all()
    assert not attention_mask.sequences(torch.arange(8, dtype=torch.int32)[None])[1].isnan().any()


@pytest.mark.parametrize("name", list(attention.MASKS))
def test_each_version_is_given_what_it_reads_and_no_square_that_it_does_not(name: str) -> None:
    assert set(attention.MASKS) == set(attention.VERSIONS)
    seen = ops.choose({"attention": name}).mask(ROWS, 4, 11, torch.bfloat16, CPU)
    squares = [part for part in (seen.visible_btt, seen.bias_btt) if part is not None]
    assert len(squares) == (1 if name in ("reference", "sdpa", "blocked") else 0)
    held = {"fused": seen.first_bt, "varlen": seen.sequences, "fa3": seen.sequences, "fa4": seen.sequences, "flex": seen.tiles}.get(name)
    assert (held is not None) == (name in ("fused", "varlen", "fa3", "fa4", "flex"))
    assert ops.choose({"attention": name}).mask(None, 11, 11, torch.bfloat16, CPU) == attention.Mask()


@pytest.mark.parametrize("name", HERE)
def test_a_mask_without_the_versions_part_gives_the_same(name: str) -> None:
    torch.manual_seed(4)
    q, k, v = (torch.randn(2, 11, h, 8) for h in (4, 2, 2))
    every: tuple[tuple[attention_mask.Part, ...], ...] = ((), ("visible", "bias", "bounds"))
    made = [functools.partial(attention.mask, parts=parts) for parts in every]
    outs = [getattr(attention, name)(q, k, v, one(ROWS, 4, 11, q.dtype, CPU), scale=0.3) for one in made]
    assert torch.equal(*outs)


@pytest.mark.parametrize("name", [name for name in HERE if name != "sdpa"])  # which would be `reference`
def test_sinks_take_weight_and_get_a_gradient(name: str) -> None:
    """Of gpt-oss's formula by hand, values and gradients; in bf16 too a sink is summed over all queries before it is rounded."""
    torch.manual_seed(5)
    function: Any = getattr(attention, name)
    q, k, v, sinks = (
        torch.randn(*shape, dtype=torch.float32, requires_grad=True) for shape in ((2, 11, 4, 8), (2, 11, 2, 8), (2, 11, 2, 6), (4,))
    )
    seen = attention.mask(ROWS, 5, 11, q.dtype, CPU)
    out = function(q, k, v, seen, scale=0.3, softcap=3.0, sinks_h=sinks)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    scores = torch.einsum("bihd,bjhd->bhij", wide[0], wide[1].repeat_interleave(2, 2)) * 0.3
    weights = (3.0 * torch.tanh(scores / 3.0)).exp() * seen_by_ids(ROWS, 5, 11, 2)[:, None]
    weights = weights / (weights.sum(-1, keepdim=True) + wide[3].exp()[:, None, None])
    right = torch.einsum("bhij,bjhe->bihe", weights, wide[2].repeat_interleave(2, 2))
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(right)
    found = torch.autograd.grad(out, (q, k, v, sinks), grad.float())
    for ours, exact in zip(found, torch.autograd.grad(right, wide, grad), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HERE)
def test_what_other_documents_hold_is_never_seen(name: str) -> None:
    """Values and keys of a thousand times the size change no bit elsewhere."""
    torch.manual_seed(6)
    q, k, v = (torch.randn(2, 11, h, 8) for h in (4, 2, 2))
    seen = attention.mask(ROWS, None, 11, q.dtype, CPU)
    before = getattr(attention, name)(q, k, v, seen, scale=0.3)
    k[0, 3:7] *= 1e3
    v[0, 3:7] = 1e20
    after = getattr(attention, name)(q, k, v, seen, scale=0.3)
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[0, :3], after[0, :3])
    torch.testing.assert_close(before[0, 7:], after[0, 7:], rtol=1e-6, atol=1e-6)


def test_the_public_function_is_causal_and_scaled_by_the_root_of_its_channels() -> None:
    torch.manual_seed(7)
    q, k, v = (torch.randn(1, 9, h, 16) for h in (4, 2, 2))
    torch.testing.assert_close(attention.attention(q, k, v), attention.reference(q, k, v, attention.Mask(), scale=0.25))


def test_pairs_are_counted() -> None:
    for tokens, window in ((7, None), (7, 1), (7, 3), (7, 100), (1, 1)):
        assert attention.pairs(tokens, window) == int(seen_by_ids(None, window, tokens, 1).sum())


def test_what_a_version_lacks_is_said() -> None:
    q, k, v = (torch.randn(1, 9, h, 16) for h in (4, 2, 2))
    plain, packed = attention.Mask(), attention.mask(torch.zeros(1, 9, dtype=torch.int32), None, 9, q.dtype, CPU)
    assert attention.supports("fused", q, k, v, packed) is None
    assert attention.supports("blocked", q, k, v, packed, softcap=2.0) is None
    assert "no soft-caps and no sinks" in str(attention.supports("sdpa", q, k, v, plain, softcap=2.0))
    assert attention.supports("cudnn", q, k, v, plain) == "cudnn needs a GPU, not cpu"
    with pytest.raises(KernelError, match=r'attention: flash needs a GPU, not cpu; set kernels.attention = "fused"'):
        attention.flash(q, k, v, plain, scale=0.25)
