"""The fused loss where others have gone wrong: no labels, frozen inputs, sure predictions, offsets, many chunks, odd gradients, shards of the vocabulary."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from gigatrain.errors import KernelError
from gigatrain.kernels import cross_entropy, launch
from gigatrain.kernels import linear_cross_entropy as lce

# The interpreter computes lanes that nobody looks at, and warns of their overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ALL = [lce.reference, lce.chunked, lce.fused]
FAST = [lce.chunked, lce.fused]
EVERYTHING: dict[str, Any] = {"softcap": 5.0, "scale": 0.5, "z_loss": 1e-2, "label_smoothing": 0.1}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lce._ELEMENTS, "cpu", 1)


def sample(n: int = 150, h: int = 17, v: int = 37, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, v, (n,))
    labels[::7] = lce.IGNORE
    return torch.randn(n, h).to(dtype), (torch.randn(v, h) * 0.5).to(dtype), labels


def weights(n: int = 150) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(1)) + 0.5


def grads(
    function: Any, hidden: Tensor, weight: Tensor, labels: Tensor, factor: float = 1.0, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, ...]:
    h, w = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss, ce = function(h, w, labels, **options)
    loss.backward(torch.full_like(loss, factor) if upstream is None else upstream.to(loss.dtype))
    assert h.grad is not None
    assert w.grad is not None
    return loss.detach(), ce, h.grad, w.grad


def assert_errs_no_more(function: Any, hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> None:
    """At most twice plain torch's error against fp64, or one rounding."""
    exact = grads(lce.reference, hidden.double(), weight.double(), labels, **options)
    plain, ours = (grads(f, hidden, weight, labels, **options) for f in (lce.reference, function))
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert (o.dtype, o.shape) == (p.dtype, p.shape)
        assert (o - e).norm() <= max(2 * (p - e).norm().item(), torch.finfo(o.dtype).eps / 2 * e.norm().item())


def assert_same(ours: Any, expected: Any) -> None:
    for o, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(o, e, rtol=2e-5 if o.dtype == torch.float32 else 1e-10, atol=2e-6 if o.dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("reduction", cross_entropy.REDUCTIONS)
def test_a_batch_without_labels_costs_nothing(function, reduction: str) -> None:
    hidden, weight, labels = sample()
    labels = torch.full_like(labels, lce.IGNORE)
    for result in grads(function, hidden, weight, labels, weights_n=weights(), reduction=reduction, **EVERYTHING):
        assert not result.any()


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("reduction", cross_entropy.REDUCTIONS)
def test_an_empty_batch_costs_nothing(function, reduction: str) -> None:
    hidden, weight, labels = sample()
    loss, _, dh, dw = grads(function, hidden[:0], weight, labels[:0], reduction=reduction)
    assert not loss.any()
    assert dh.shape == (0, 17)
    assert dw.shape == (37, 17)
    assert not dw.any()


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("n", [1, 31, 33, 65])
def test_any_number_of_tokens(function, n: int) -> None:
    """Liger's PR 1361 (a tail of T % 32), PR 1368 (T = 1)."""
    hidden, weight, labels = sample()
    for reduction in cross_entropy.REDUCTIONS:
        options = EVERYTHING | {"reduction": reduction, "weights_n": weights()[:n]}
        assert_same(*(grads(f, hidden[:n], weight, labels[:n], **options) for f in (function, lce.reference)))


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("v", [1, 3, 1003, 32003])
def test_any_vocabulary(function, v: int) -> None:
    hidden, weight, labels = sample(5, 9, v)
    assert_same(*(grads(f, hidden, weight, labels, z_loss=1e-3) for f in (function, lce.reference)))


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("factor", [-2.5, 1e-3])
def test_gradients_scale_with_that_of_the_loss(function, factor: float) -> None:
    hidden, weight, labels = sample()
    assert_same(grads(function, hidden, weight, labels, factor), grads(lce.reference, hidden, weight, labels, factor))


@pytest.mark.parametrize("dtype", launch.FLOATS)
@pytest.mark.parametrize("function", FAST)
def test_each_token_takes_its_own_gradient(function, dtype: torch.dtype) -> None:
    """Liger's issue 968, PR 1298: with reduction "none" the weight's gradient took the first token's for all."""
    hidden, weight, labels = sample(dtype=dtype)
    options = EVERYTHING | {"reduction": "none", "weights_n": weights()}
    assert_errs_no_more(function, hidden, weight, labels, upstream=torch.randn(150), **options)


@pytest.mark.parametrize("function", FAST)
def test_a_gradient_of_stride_0(function) -> None:
    """ROCm TransformerEngine's PR 623: the gradient of a sum was read out of bounds."""
    hidden, weight, labels = sample()
    expected = grads(function, hidden, weight, labels, reduction="none")
    expanded = grads(function, hidden, weight, labels, upstream=torch.ones(()).expand(150), reduction="none")
    for a, b in zip(expected, expanded, strict=True):
        assert torch.equal(a, b)
    assert_same(expected[2:], grads(function, hidden, weight, labels)[2:])


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_all_of_it(function, reduction: str, frozen: str) -> None:
    """Liger's issue 507: the loss was 0 where the input wants no gradient."""
    hidden, weight, labels = sample()
    expected = grads(function, hidden, weight, labels, reduction=reduction)
    h, w = hidden.clone().requires_grad_(frozen != "hidden"), weight.clone().requires_grad_(frozen != "weight")
    loss, _ = function(h, w, labels, reduction=reduction)
    loss.sum().backward()
    trained, frozen_one, want = (w, h, expected[3]) if frozen == "hidden" else (h, w, expected[2])
    assert torch.equal(loss.detach(), expected[0])
    assert frozen_one.grad is None
    torch.testing.assert_close(trained.grad, want, rtol=1e-6, atol=1e-7)


class Recorder(TorchDispatchMode):
    """Every operation's name, and the most bytes of new storages that were alive at once."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = self.peak = 0
        self.known = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def walk(hidden: Tensor, weight: Tensor, labels: Tensor, want: Any) -> tuple[Recorder, Any]:
    with Recorder(hidden, weight, labels) as recorder:
        result = lce._walk(hidden, weight, labels, None, lce.Terms(None, 1.0, 0.0, 0.0, lce.IGNORE), None, None, want, kernels=True)
    return recorder, result


@pytest.fixture
def wide_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The products that CUDA has and a CPU has not: of 16-bit matrices, into an fp32 one."""
    library = torch.library.Library("aten", "IMPL")

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return out.copy_(a.to(out_dtype) @ b.to(out_dtype))

    def addmm(c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor) -> Tensor:
        assert (beta, alpha, c.data_ptr()) == (1, 1, out.data_ptr())
        return out.add_(a.to(out_dtype) @ b.to(out_dtype))

    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    monkeypatch.setattr(lce, "_WIDE_PRODUCTS", ("cpu",))
    yield
    library._destroy()


def test_memory_is_one_chunk_of_logits_and_the_gradients(wide_products, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: of 10 chunks of 64 tokens, beside the inputs, one chunk of logits, dw in fp32, dh, and 24 B a token."""
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    hidden, weight, labels = sample(640, 32, 2000, torch.bfloat16)
    recorder, (*_, dh, dw) = walk(hidden, weight, labels, lce._Gradients(True, True))
    logits = 2 * 64 * 2000
    assert dw.dtype == torch.float32
    # What the products here copy to be widened does not count.
    widened = 4 * 64 * 2000 + 4 * 64 * 32 + 4 * dw.numel()
    gradients = 2 * dh.numel() + 4 * dw.numel()
    assert gradients + logits <= recorder.peak <= gradients + logits + 24 * 640 + widened + 1024
    inference, _ = walk(hidden, weight, labels, lce._Gradients(False, False))
    assert logits <= inference.peak <= logits + 24 * 640 + 1024


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger reads the number of labels on the host (`.item()`), twice a step."""
    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
    hidden, weight, labels = sample(dtype=torch.bfloat16)
    terms = (5.0, 0.5, 1e-2, 0.1, lce.IGNORE)
    with Recorder() as recorder:
        lce._run_reduced(hidden, weight, labels, weights(), *terms, True, True, True)
        states = lce._run_tokens(hidden, weight, labels, weights(), *terms)[2]
        lce._run_tokens_backward(weights(), hidden, weight, labels, weights(), states, *terms, True, True)
        grads(lce.fused, hidden, weight, labels, weights_n=weights(), reduction="mean", **EVERYTHING)
    waiting = {
        "aten._local_scalar_dense.default",
        "aten.nonzero.default",
        "aten.is_nonzero.default",
        "aten.equal.default",
        "aten.item.default",
    }
    assert recorder.names
    assert not waiting & set(recorder.names)


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("reduction", cross_entropy.REDUCTIONS)
def test_without_gradients_the_value_is_the_same(function, reduction: str) -> None:
    """Liger's PR 931: it made gradients under no_grad."""
    hidden, weight, labels = sample()
    expected = grads(function, hidden, weight, labels, z_loss=0.1, reduction=reduction)[:2]
    with torch.no_grad():
        loss, ce = function(hidden.requires_grad_(), weight, labels, z_loss=0.1, reduction=reduction)
    assert not loss.requires_grad
    assert torch.equal(loss, expected[0])
    assert torch.equal(ce, expected[1])


def test_without_gradients_no_gradient_is_made() -> None:
    hidden, weight, labels = sample(dtype=torch.bfloat16)
    recorder, (*_, dh, dw) = walk(hidden, weight, labels, lce._Gradients(False, False))
    assert dh is None
    assert dw is None
    assert recorder.names.count("aten.mm.out") == 3  # logits of three chunks
    recorder, (*_, dh, dw) = walk(hidden, weight, labels, lce._Gradients(True, False))  # a frozen head, as of LoRA
    assert dh is not None
    assert dw is None
    assert recorder.names.count("aten.mm.out") + recorder.names.count("aten.mm.default") == 6


@pytest.mark.parametrize("function", ALL)
def test_the_pure_cross_entropy_carries_no_gradient(function) -> None:
    hidden, weight, labels = sample()
    for reduction in cross_entropy.REDUCTIONS:
        assert not function(hidden.requires_grad_(), weight, labels, z_loss=0.1, reduction=reduction)[1].requires_grad


@pytest.mark.parametrize("function", FAST)
def test_many_small_batches_equal_one_large_one(function) -> None:
    """Liger's issue 802, transformers 34191: micro-batches of unequal numbers of labels, each divided by its own."""
    hidden, weight, labels = sample()
    labels[60:90] = lce.IGNORE
    whole = grads(function, hidden, weight, labels, reduction="mean")
    count = (labels != lce.IGNORE).sum().item()
    cuts = [slice(0, 40), slice(40, 95), slice(95, 150)]
    parts = [grads(function, hidden[c], weight, labels[c], 1.0 / count) for c in cuts]
    assert_same([sum(part[0] for part in parts) / count], whole[:1])
    assert_same([torch.cat([part[2] for part in parts]), sum(part[3] for part in parts)], whole[2:])


@pytest.mark.parametrize("function", ALL)
def test_the_mean_is_over_tokens_with_a_label(function) -> None:
    """ROCm TransformerEngine's PR 336 divided by all."""
    hidden, weight, labels = sample()
    logits = hidden @ weight.t()
    torch.testing.assert_close(function(hidden, weight, labels, reduction="mean")[0], torch.nn.functional.cross_entropy(logits, labels))
    mean, total = (function(hidden, weight, labels, reduction=r, weights_n=weights())[0] for r in ("mean", "sum"))
    torch.testing.assert_close(mean, total / weights()[labels != lce.IGNORE].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("margin", [8.0, 12.0])
def test_a_sure_prediction_keeps_its_gradient(function, margin: float, dtype: torch.dtype) -> None:
    """p - 1 computed in bf16 is 0 at p = 0.999 (Liger's PR 1329)."""
    hidden, weight = torch.ones(1, 1, dtype=dtype), torch.tensor([[margin], [0.0], [0.5]], dtype=dtype)
    labels = torch.tensor([0])
    exact = grads(lce.reference, hidden.double(), weight.double(), labels)
    ours = grads(function, hidden, weight, labels)
    for e, o in zip(exact, ours, strict=True):
        torch.testing.assert_close(o.double(), e, rtol=2 * torch.finfo(dtype).eps, atol=16 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("offset", [1e3, 1e4, -1e4])
def test_a_common_offset_of_the_logits_does_no_harm(function, offset: float) -> None:
    """pytorch 195829. Inputs in few bits, so that every product is exact in whatever order it is summed, and only the loss is judged."""
    torch.manual_seed(1)
    hidden, weight = ((torch.randn(n, 8) * 8).round() / 8 for n in (70, 11))
    hidden, weight = torch.cat((hidden, torch.ones(70, 1)), 1), torch.cat((weight, torch.full((11, 1), offset)), 1)
    assert torch.equal((hidden @ weight.t()).double(), hidden.double() @ weight.double().t())
    labels = torch.randint(0, 11, (70,))
    exact = grads(lce.reference, hidden.double(), weight.double(), labels)
    plain = grads(lce.reference, hidden, weight, labels)
    ours = grads(function, hidden, weight, labels)
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert (o - e).norm() <= max(2 * (p - e).norm().item(), 1e-6 * e.norm().item())


@pytest.mark.parametrize("chunks", [1, 4, 64])
def test_the_weight_gradient_does_not_degrade_with_the_number_of_chunks(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger sums it over chunks in bf16 unless told otherwise (its issues 512 and 827)."""
    hidden, weight, labels = sample(n=64 * 64, h=16, v=16, dtype=torch.bfloat16)
    monkeypatch.setitem(lce._ELEMENTS, "cpu", hidden.shape[0] // chunks * 16)
    exact, plain = (grads(lce.reference, hidden.to(d), weight.to(d), labels)[3].double() for d in (torch.float64, torch.bfloat16))
    ours = grads(lce.chunked, hidden, weight, labels)[3].double()
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()


def test_on_a_gpu_the_weight_gradient_is_summed_by_the_products(wide_products) -> None:
    """As above, over 16 chunks, with the products that sum in fp32."""
    hidden, weight, labels = sample(n=64 * 16, h=16, v=16, dtype=torch.bfloat16)
    exact, plain = (grads(lce.reference, hidden.to(d), weight.to(d), labels)[3].double() for d in (torch.float64, torch.bfloat16))
    ours = grads(lce.fused, hidden, weight, labels)[3].double()
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()


def test_chunks_are_equal_and_as_large_as_they_may_be() -> None:
    """On a GPU about 1.07 GB of logits."""
    sizes = lce.tokens_per_chunk
    assert sizes("cuda", 8192, 128256) == 4096
    assert sizes("cuda", 8193, 128256) == 2816  # three, of a multiple of 128
    assert sizes("cuda", 16384, 128256) == 4096
    assert sizes("cuda", 2048, 262144) == 2048
    assert sizes("cuda", 100, 10**9) == 100
    assert sizes("cpu", 2048, 4096) == 64  # the fixture's
    for n in (0, 1, 127, 5000, 70001):
        chunk = sizes("cuda", n, 128256)
        assert chunk >= 1
        assert -(-n // chunk) == -(-n // 4096)


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("layout", ["transposed", "every second", "expanded"])
def test_takes_inputs_of_any_layout_and_leaves_them_alone(function, layout: str) -> None:
    """TransformerEngine's issue 2734: transposed inputs gave a wrong loss without a word. Liger's 272 and 254: inputs were overwritten."""
    hidden, weight, labels = sample()
    inputs: Any
    match layout:
        case "transposed":
            inputs = (hidden.t().contiguous().t(), weight.t().contiguous().t(), labels)
        case "every second":
            inputs = tuple(x.repeat_interleave(2, -1)[..., ::2] for x in (hidden, weight, labels))
        case _:
            hidden = hidden[:1].expand(150, 17)
            inputs = (hidden, weight, labels)
    kept = [x.clone() for x in inputs]
    options: dict[str, Any]
    for options in ({}, {"reduction": "none"}):
        assert_same(grads(function, *inputs, **options), grads(lce.reference, hidden, weight, labels, **options))
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_two_backwards_give_the_same(function, reduction: str) -> None:
    """What the forward saved is not scaled in place (Liger's issue 272), and the hidden states' own graph is not harmed."""
    hidden, weight, labels = sample(dtype=torch.bfloat16)
    leaf, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    h = torch.tanh(leaf)  # saves its output
    loss = function(h, w, labels, reduction=reduction)[0].sum() * 3.0
    first = torch.autograd.grad(loss, (leaf, w), retain_graph=True)
    second = torch.autograd.grad(loss, (leaf, w))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_within_a_checkpoint_it_is_the_same(function, reduction: str) -> None:
    hidden, weight, labels = sample()
    expected = grads(function, hidden, weight, labels, reduction=reduction)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = checkpoint(lambda h, w: function(h, w, labels, reduction=reduction)[0], h, w, use_reentrant=False)
    loss.sum().backward()  # type: ignore[union-attr]
    assert torch.equal(h.grad, expected[2])  # type: ignore[arg-type]
    assert torch.equal(w.grad, expected[3])  # type: ignore[arg-type]


def test_two_runs_are_equal_to_the_bit() -> None:
    hidden, weight, labels = sample(dtype=torch.bfloat16)
    for a, b in zip(*(grads(lce.fused, hidden, weight, labels, weights_n=weights(), **EVERYTHING) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", ALL)
def test_a_label_out_of_range_makes_the_loss_nan(function) -> None:
    hidden, weight, labels = sample()
    labels[10], labels[80] = 37, -7
    loss = function(hidden, weight, labels, reduction="none")[0]
    assert loss.isnan().nonzero()[:, 0].tolist() == [10, 80]
    assert grads(function, hidden, weight, labels)[0].isnan()


@pytest.mark.parametrize("function", ALL)
def test_log_probabilities(function) -> None:
    """Of the labels, 0 where there is none, with a gradient for each: what preference and policy losses are made of."""
    hidden, weight, labels = sample()
    advantages = torch.randn(150)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    ours = lce.logprobs(leaves[0], leaves[1], labels, softcap=4.0, scale=0.7, version=function)
    (ours * advantages).sum().backward()
    plain = [x.clone().requires_grad_() for x in (hidden, weight)]
    table = torch.log_softmax(4.0 * torch.tanh(plain[0] @ plain[1].t() * 0.7 / 4.0), -1)
    expected = torch.where(labels == lce.IGNORE, 0.0, table.gather(1, labels.clamp(min=0)[:, None])[:, 0])
    (expected * advantages).sum().backward()
    assert ours.dtype == torch.float32
    assert_same([ours.detach(), *(x.grad for x in leaves)], [expected.detach(), *(x.grad for x in plain)])


@pytest.mark.parametrize("configuration", lce.SPACE["linear_cross_entropy.scaled"])
def test_every_configuration_of_the_scaling_gives_the_same(configuration: dict[str, int]) -> None:
    x, factor = torch.randn(33, 1003), torch.tensor(0.3)
    with launch.forced("linear_cross_entropy.scaled", configuration):
        assert torch.equal(lce._scale(x, factor, torch.bfloat16), (x * factor).bfloat16())


@pytest.mark.parametrize("configuration", cross_entropy.SPACE["cross_entropy.fused"])
def test_every_configuration_of_the_fused_kernel_gives_the_same(configuration: dict[str, int]) -> None:
    """Triton 6691, fla 595682b8: some were wrong."""
    hidden, weight, labels = sample(3, 5, 17003 if configuration["block"] > 4096 else 2003, torch.bfloat16)
    expected = grads(lce.chunked, hidden, weight, labels, z_loss=1e-3)
    with launch.forced("cross_entropy.fused", configuration):
        for a, b in zip(expected, grads(lce.fused, hidden, weight, labels, z_loss=1e-3), strict=True):
            torch.testing.assert_close(b, a, rtol=2 * torch.finfo(b.dtype).eps, atol=1e-4)


def test_the_operators_are_well_formed() -> None:
    hidden, weight, labels = sample(70, 5, 19, torch.bfloat16)  # two chunks
    terms = (5.0, 0.5, 1e-2, 0.1, lce.IGNORE)
    ops = torch.ops.gigatrain
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    torch.library.opcheck(ops.linear_cross_entropy.default, (*leaves, labels, weights(70), *terms, True, True, True))
    torch.library.opcheck(ops.linear_cross_entropy_tokens.default, (*leaves, labels, None, *terms))
    states = ops.linear_cross_entropy_tokens(hidden, weight, labels, None, *terms)[2]
    arguments = (weights(70), hidden, weight, labels, None, states, *terms, True, False)
    torch.library.opcheck(ops.linear_cross_entropy_tokens_backward.default, arguments)
    torch.library.opcheck(ops.linear_cross_entropy_scaled.default, (hidden, torch.tensor(0.3), torch.float32))


@pytest.mark.parametrize("reduction", cross_entropy.REDUCTIONS)
def test_it_compiles_as_one_graph(reduction: str) -> None:
    hidden, weight, labels = sample(70, 5, 19, torch.bfloat16)
    options = EVERYTHING | {"reduction": reduction, "weights_n": weights(70)}
    whole = torch.compile(lce.fused, fullgraph=True, backend="aot_eager")
    for a, b in zip(grads(lce.fused, hidden, weight, labels, **options), grads(whole, hidden, weight, labels, **options), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"weight_vh": torch.zeros(37, 17, dtype=torch.bfloat16)},
            "hidden and weight must share one of bf16, fp16, fp32, not torch.float32 and",
        ),
        ({"hidden_nh": torch.zeros(150, 17).double(), "weight_vh": torch.zeros(37, 17).double()}, "not torch.float64 and torch.float64"),
        ({"weight_vh": torch.zeros(37, 16)}, r"hidden \(150, 17\), weight \(37, 16\), labels \(150,\) and weights do not fit; set kernels"),
        ({"labels_n": torch.zeros(150)}, "labels must be integers and weights_n fp32, not torch.float32 and None"),
        ({"weights_n": torch.zeros(150).double()}, "labels must be integers and weights_n fp32, not torch.int64 and torch.float64"),
        ({"weights_n": torch.zeros(150, requires_grad=True)}, "weights_n gets no gradient; detach it"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], why: str) -> None:
    hidden, weight, labels = sample()
    with pytest.raises(KernelError, match=why):
        lce.fused(**{"hidden_nh": hidden, "weight_vh": weight, "labels_n": labels, **change})


def test_the_cpu_version_refuses_mixed_dtypes_too() -> None:
    """Liger's PR 1283: a gradient of the other's dtype."""
    hidden, weight, labels = sample()
    with pytest.raises(KernelError, match="must share a dtype, not torch.float32 and torch.bfloat16; cast one of them"):
        lce.chunked(hidden, weight.bfloat16(), labels)


@pytest.mark.parametrize("function", ALL)
def test_refuses_an_unknown_reduction(function) -> None:
    with pytest.raises(ValueError, match="reduction 'avg' is none of sum, mean, none"):
        function(*sample(), reduction="avg")


def _rank(rank: int, store: str) -> None:
    """One of two processes, each with half of the vocabulary: every version equals itself in one process, whichever shard a label is in."""
    import interpreter  # noqa: F401 (as in conftest.py: a process of its own)

    lce._ELEMENTS["cpu"] = 1
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = distributed.group.WORLD
    options: dict[str, Any]
    weighted = EVERYTHING | {"weights_n": weights(100)}
    for function in ALL:
        for options in ({}, weighted | {"reduction": "mean"}, weighted | {"reduction": "none"}):
            for dtype in (torch.float32, torch.bfloat16)[: 1 if options else 2]:
                hidden, weight, labels = sample(100, 17, 38, dtype)
                upstream = torch.linspace(-1.0, 2.0, 100) if options.get("reduction") == "none" else None
                loss, ce, dh, dw = grads(function, hidden, weight, labels, upstream=upstream, **options)
                ours = grads(function, hidden, weight.chunk(2)[rank], labels, upstream=upstream, group=group, **options)
                for o, e in zip(ours, (loss, ce, dh, dw.chunk(2)[rank]), strict=True):
                    # dh is the sum of two that are rounded
                    limit = (16 if o.dtype == torch.float32 else 2) * torch.finfo(o.dtype).eps
                    assert (o - e).norm() <= limit * e.norm(), (function, options, dtype)
        hidden, weight, labels = sample(9, 5, 12)
        ours = lce.logprobs(hidden, weight.chunk(2)[rank], labels, version=function, group=group)
        torch.testing.assert_close(ours, lce.logprobs(hidden, weight, labels), rtol=1e-5, atol=1e-6)
        labels[4] = 12  # beyond both shards
        loss = function(hidden, weight.chunk(2)[rank], labels, reduction="none", group=group)[0]
        assert loss.isnan().nonzero()[:, 0].tolist() == [4]
        frozen, _ = function(hidden, weight.chunk(2)[rank].clone().requires_grad_(), labels[:0].new_full((9,), 3), group=group)
        frozen.backward()  # of hidden states that want no gradient nothing is summed
    distributed.destroy_process_group()


def test_shards_of_the_vocabulary_equal_the_whole(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"),), nprocs=2)  # type: ignore[attr-defined]
