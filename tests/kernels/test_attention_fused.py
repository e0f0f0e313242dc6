"""Attention in Triton, interpreted: every feature and their combinations against fp64, every tile, no bit left to chance."""

from contextlib import ExitStack
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gigatrain.errors import KernelError
from gigatrain.kernels import attention, launch
from gigatrain.kernels.attention import Mask, mask, reference
from gigatrain.kernels.attention_fused import SPACE

CPU = torch.device("cpu")
fused: Any = attention.fused
SMALL = {"queries": 16, "keys": 16, "warps": 4, "stages": 1}


def inputs(
    b: int, t: int, h: int, k: int, d: int, e: int | None = None, *, dtype: torch.dtype = torch.bfloat16, sinks: bool = False
) -> Any:
    shapes = [(b, t, h, d), (b, t, k, d), (b, t, k, d if e is None else e), *([(h,)] if sinks else [])]
    return [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]


def packed(b: int, t: int, count: int = 4) -> Tensor:
    return torch.randint(0, count, (b, t)).sort(-1).values.int()


def run(function: Any, tensors: list[Tensor], seen: Mask, grad: Tensor, dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    named = {"sinks_h": leaves[3]} if len(leaves) == 4 else {}
    out = function(*leaves[:3], seen, **named, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def judged(tensors: list[Tensor], seen: Mask, function: Any = fused, **options: Any) -> None:
    """At most twice plain torch's error in the same dtype, and one rounding."""
    options = {"scale": tensors[0].shape[-1] ** -0.5} | options
    b, t, h, _ = tensors[0].shape
    grad = torch.randn(b, t, h, tensors[2].shape[-1], dtype=torch.float64)
    found = run(function, tensors, seen, grad, **options)
    plain, exact = (run(reference, tensors, seen, grad, dtype, **options) for dtype in (None, torch.float64))
    for index, (ours, theirs, right) in enumerate(zip(found, plain, exact, strict=True)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        roundings = 1 if right.numel() >= 64 else 4  # of a few numbers plain torch's error is luck
        allowed = 2 * (theirs.double() - right).norm() + roundings * torch.finfo(ours.dtype).eps * right.norm()
        assert (ours.double() - right).norm() <= allowed, index


@pytest.fixture
def small() -> Any:
    """Tiles of 16 by 16, so that a few tokens are several of them."""
    with ExitStack() as stack:
        for kernel in SPACE:
            stack.enter_context(launch.forced(kernel, SMALL))
        yield


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (2.0, False), (None, True), (5.0, True)])
def test_features_combine(packs: bool, window: int | None, softcap: float | None, sinks: bool, small: Any) -> None:
    torch.manual_seed(0)
    tensors = inputs(1, 43, 4, 2, 24, 8, sinks=sinks)
    if window == 1:
        tensors = [x.detach().float().requires_grad_() for x in tensors]  # of one key the gradients of scores are rounding alone
    seen = mask(packed(1, 43) if packs else None, window, 43, torch.float32, CPU, parts=("bounds", "visible"))
    if window == 1 and not sinks:
        out = fused(*tensors[:3], seen, scale=0.2, softcap=softcap)
        assert torch.equal(out, tensors[2].repeat_interleave(2, 2))
        return
    judged(tensors, seen, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("d", "e"), [(6, 6), (24, 24), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (16, 40)])
def test_head_sizes(d: int, e: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    judged(inputs(1, 37, 2, 1, d, e, dtype=dtype), mask(packed(1, 37), 30, 37, dtype, CPU, parts=("bounds", "visible")))


@pytest.mark.parametrize("tokens", [2, 15, 16, 17, 31, 33, 64, 65])
def test_tails_of_tokens(tokens: int, small: Any) -> None:
    torch.manual_seed(2)
    judged(inputs(1, tokens, 3, 3, 16), Mask())
    judged(inputs(2, tokens, 2, 1, 16), mask(packed(2, tokens, 3), None, tokens, torch.bfloat16, CPU, parts=("bounds", "visible")))


def test_no_tokens_and_no_samples() -> None:
    for b, t in ((1, 0), (0, 5)):
        tensors = inputs(b, t, 2, 1, 8)
        out = fused(*tensors, Mask(), scale=1.0)
        assert out.shape == (b, t, 2, 8)
        assert [x.shape for x in torch.autograd.grad(out.sum(), tensors)] == [x.shape for x in tensors]


@pytest.mark.long
@pytest.mark.parametrize("kernel", list(SPACE))
def test_every_configuration_gives_the_right_result(kernel: str) -> None:
    """Triton 6691, fla 595682b8: some configurations only were wrong. Warps and stages mean nothing to the interpreter; a tuner checks them too."""
    torch.manual_seed(3)
    tensors = inputs(1, 150, 2, 1, 16, dtype=torch.float32, sinks=True)
    seen = mask(torch.tensor([[0] * 40 + [1] * 70 + [2] * 40]), 60, 150, torch.float32, CPU, parts=("bounds", "visible"))
    for configuration in {(c["queries"], c["keys"]): c for c in SPACE[kernel]}.values():
        with launch.forced(kernel, configuration):
            judged(tensors, seen)
            judged(tensors, Mask())


def test_shipped_configurations_can_be_tuned_to() -> None:
    for kernel, space in SPACE.items():
        for table in ("default", "sm_90", "sm_80", "sm_100", "gfx942"):
            assert all(shipped in space for shipped in launch.table(table)["configs"].get(kernel, {}).values()), (table, kernel)


def test_blocks_that_are_not_seen_are_not_read(small: Any) -> None:
    """Of a document's neighbours, and of what is behind the window, not even a NaN comes through where whole tiles are hidden."""
    torch.manual_seed(4)
    q, k, v = (x.detach() for x in inputs(1, 96, 2, 1, 16, dtype=torch.float32))
    documents = torch.tensor([[0] * 32 + [1] * 32 + [2] * 32])
    for seen, hidden in ((mask(documents, None, 96, q.dtype, CPU), slice(0, 64)), (mask(None, 16, 96, q.dtype, CPU), slice(0, 32))):
        poisoned = [x.clone().index_fill(1, torch.arange(hidden.start, hidden.stop), float("nan")).requires_grad_() for x in (k, v)]
        out = fused(q, *poisoned, seen, scale=0.25)
        assert torch.equal(out[:, 64:], fused(q, k, v, seen, scale=0.25)[:, 64:])
        dk, dv = torch.autograd.grad(out[:, 64:].sum(), poisoned)
        assert torch.isfinite(dk[:, 64:]).all()
        assert torch.isfinite(dv[:, 64:]).all()


def test_what_other_documents_hold_within_a_tile_changes_no_bit() -> None:
    torch.manual_seed(5)
    q, k, v = (x.detach() for x in inputs(1, 40, 2, 1, 16, dtype=torch.float32))
    seen = mask(torch.tensor([[0] * 13 + [1] * 14 + [2] * 13]), None, 40, q.dtype, CPU)
    loud = [x.clone() for x in (k, v)]
    for x in loud:
        x[:, 13:27] = 3e37
    before, after = (fused(q, *kv, seen, scale=0.25) for kv in ((k, v), loud))
    assert torch.equal(before[:, :13], after[:, :13])
    assert torch.equal(before[:, 27:], after[:, 27:])


@pytest.mark.parametrize("sinks", [False, True])
def test_two_runs_are_bitwise_equal(sinks: bool, small: Any) -> None:
    """FA 414, 988: gradients of queries that are summed atomically are not."""
    torch.manual_seed(6)
    tensors = inputs(1, 45, 4, 2, 16, sinks=sinks)
    seen, grad = mask(packed(1, 45), 30, 45, torch.bfloat16, CPU), torch.randn(1, 45, 4, 16)
    first, second = (run(fused, tensors, seen, grad, scale=0.25) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_views_of_one_product_are_read_where_they_are() -> None:
    """q, k and v of a fused projection, and a gradient of strides 0 (ROCm TE PR 623)."""
    torch.manual_seed(7)
    whole = torch.randn(2, 21, 8, 16)
    views = [x.requires_grad_() for x in whole.split((4, 2, 2), 2)]
    copies = [x.detach().clone().requires_grad_() for x in views]
    outs = [fused(*xs, Mask(), scale=0.25) for xs in (views, copies)]
    assert torch.equal(*outs)
    for ours, theirs in zip(*(torch.autograd.grad(out.sum(), xs) for out, xs in zip(outs, (views, copies), strict=True)), strict=True):
        assert torch.equal(ours, theirs)


def test_heads_and_samples_beyond_two_billion_elements() -> None:
    """A 32-bit head * stride or sample * stride overflows (FA 2260, 2662). Untouched pages of the large tensors are never committed."""
    torch.manual_seed(8)
    near = [x.detach() for x in inputs(3, 5, 3, 3, 16)]
    for strides in (((1 << 30) + 8, 64, 16, 1), (512, 64, (1 << 30) + 8, 1)):
        size = 1 + sum((n - 1) * stride for n, stride in zip((3, 5, 3, 16), strides, strict=True))
        far = [torch.empty(size, dtype=torch.bfloat16).as_strided((3, 5, 3, 16), strides).copy_(x).requires_grad_() for x in near]
        plain = [x.clone().requires_grad_() for x in near]
        outs = [fused(*xs, Mask(), scale=0.25) for xs in (far, plain)]
        assert torch.equal(*outs)
        for a, b in zip(*(torch.autograd.grad(out, xs, out.detach()) for out, xs in zip(outs, (far, plain), strict=True)), strict=True):
            assert torch.equal(a, b)


def test_tokens_beyond_two_billion_elements_are_copied_near(small: Any) -> None:
    near = torch.randn(1, 3, 1, 16)
    far = torch.empty((2 << 30) + 64, dtype=torch.bfloat16).as_strided((1, 3, 1, 16), (0, 1 << 30, 16, 1))
    far.copy_(near)
    x = far.clone()
    assert torch.equal(fused(far, far, far, Mask(), scale=1.0), fused(x, x, x, Mask(), scale=1.0))


def test_scores_of_any_size_are_finite() -> None:
    """Logits of 1e4 and of -1e4: the running maximum takes them out."""
    torch.manual_seed(9)
    for sign in (1.0, -1.0):
        q, k = torch.full((1, 40, 1, 16), 25.0), sign * torch.full((1, 40, 1, 16), 25.0)
        v = torch.randn(1, 40, 1, 16)
        tensors = [(x + 0.01 * torch.randn_like(x)).requires_grad_() for x in (q, k, v)]
        out = fused(*tensors, Mask(), scale=1.0)
        assert all(torch.isfinite(x).all() for x in (out, *torch.autograd.grad(out.square().sum(), tensors)))


def test_operators_pass_torchs_own_check() -> None:
    torch.manual_seed(10)
    q, k, v, sinks = inputs(1, 5, 2, 1, 8, 6, dtype=torch.float32, sinks=True)
    seen = mask(packed(1, 5), 4, 5, q.dtype, CPU, parts=("bounds",))
    forward, backward = torch.ops.gigatrain.attention.default, torch.ops.gigatrain.attention_backward.default
    for sink, first, stop, cap in ((None, None, None, None), (sinks, seen.first_bt, seen.stop_bt, 2.0)):
        torch.library.opcheck(forward, (q, k, v, sink, first, stop, 0.3, cap))
        given = [None if x is None else x.detach() for x in (q, k, v, sink, first, stop)]
        out, lse = forward(*given, 0.3, cap)
        torch.library.opcheck(backward, (torch.randn_like(out), *given, out, lse, 0.3, cap))


def test_traces_whole_under_the_compiler() -> None:
    torch.manual_seed(11)
    tensors = inputs(1, 9, 2, 1, 8, dtype=torch.float32)

    def squares(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused(q, k, v, Mask(), scale=0.3).square().sum()

    plain = torch.autograd.grad(squares(*tensors), tensors)
    traced = torch.autograd.grad(torch.compile(squares, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a, b)


def test_recomputation_and_a_kept_graph_give_the_same_gradients() -> None:
    torch.manual_seed(12)
    tensors = inputs(1, 9, 2, 1, 8)
    out = fused(*tensors, Mask(), scale=0.3)
    grads = [torch.autograd.grad(out.square().sum(), tensors, retain_graph=True) for _ in range(2)]
    again: Any = checkpoint(fused, *tensors, Mask(), scale=0.3, use_reentrant=False)
    grads.append(torch.autograd.grad(again.square().sum(), tensors))
    for a, b, c in zip(*grads, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_ranges_cover_what_is_visible_once() -> None:
    """The pairs that the kernels visit: counted by values of one and scores of zero, with tiles of uneven sides."""
    torch.manual_seed(13)
    seen = mask(packed(3, 70, 5), 25, 70, torch.float32, CPU, parts=("bounds", "visible"))
    assert seen.visible_btt is not None
    q, k = torch.zeros(3, 70, 1, 16), torch.zeros(3, 70, 1, 16)
    v = torch.arange(70.0)[None, :, None, None].expand(3, -1, 1, 16)
    for queries, keys in product((16, 32, 64), (16, 32, 64)):
        with launch.forced("attention.forward", {"queries": queries, "keys": keys, "warps": 4, "stages": 1}):
            out = fused(q, k, v, seen, scale=1.0)
        torch.testing.assert_close(out, reference(q, k, v, seen, scale=1.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": torch.ones(1, 4, 2, 8, dtype=torch.float64)}, "must share one of bf16, fp16, fp32, not torch.float64, torch.float32"),
        ({"k": torch.ones(1, 4, 2, 6)}, r"queries \(1, 4, 2, 8\), keys \(1, 4, 2, 6\) and values \(1, 4, 2, 8\) do not fit"),
        ({"q": torch.ones(1, 4, 3, 8)}, "do not fit"),
        ({"sinks_h": torch.ones(3)}, "do not fit"),
        ({"v": torch.ones(1, 4, 2, 300)}, "300 channels of a head are not between 1 and 256"),
        ({"scale": -1.0}, "a scale of -1.0 turns the order of scores around"),
    ],
)
def test_refuses_what_it_cannot_do_and_names_the_way_out(change: dict[str, Any], said: str) -> None:
    given = {name: torch.ones(1, 4, 2, 8) for name in "qkv"} | {"scale": 1.0, "sinks_h": None} | change
    with pytest.raises(KernelError, match=f'attention: .*{said}.*; set kernels.attention = "sdpa"'):
        fused(given["q"], given["k"], given["v"], Mask(), scale=given["scale"], sinks_h=given["sinks_h"])


def test_a_row_of_its_table_is_filled_up_to_a_power_of_two() -> None:
    sizes: list[tuple[Any, int]] = [
        ({"d": 64, "e": 64}, 128),
        ({"d": 80, "e": 80}, 256),
        ({"d": 192, "e": 128}, 512),
        ({"d": 8, "e": 8}, 32),
    ]
    for widths, size in sizes:
        with launch.observed() as asked:
            fused(*inputs(1, 4, 2, 1, **widths), Mask(), scale=1.0)
        assert asked == [("attention.forward", size)]


def test_sizes_are_those_that_are_trained() -> None:
    assert {case[4] for case in attention.SIZES} == {64, 128, 192, 256}
    traffic = attention._traffic(attention.SIZES[0])
    assert traffic.forward_flops == pytest.approx(0.55e12, rel=0.01)  # Llama-3-8B at 8,192 tokens
    assert traffic.backward_flops == pytest.approx(2.5 * traffic.forward_flops)
