"""Cross entropy of given logits where others have gone wrong: memory layouts, sure predictions, offsets, labels out of range, gradients that are not 1."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gigatrain.errors import KernelError
from gigatrain.kernels import cross_entropy as ce
from gigatrain.kernels import launch

# The interpreter computes lanes that nobody looks at, and warns of their overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ALL = [ce.reference, ce.lean, ce.fused]
FAST = [ce.lean, ce.fused]
EVERYTHING: dict[str, Any] = {"softcap": 5.0, "scale": 0.5, "z_loss": 1e-2, "label_smoothing": 0.1}


def sample(n: int = 33, v: int = 77, dtype: torch.dtype = torch.float32, std: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, v, (n,))
    labels[3::7] = ce.IGNORE
    return (torch.randn(n, v) * std).to(dtype), labels, torch.rand(n) + 0.5


def run(function: Any, logits: Tensor, labels: Tensor, upstream: Tensor | None = None, **options: Any) -> list[Tensor]:
    leaf = logits.detach().requires_grad_()
    loss, plain = function(leaf, labels, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    assert leaf.grad is not None
    return [loss.detach(), plain, leaf.grad]


def assert_errs_no_more(function: Any, logits: Tensor, labels: Tensor, **options: Any) -> None:
    """At most twice plain torch's error against fp64, or one rounding, of each row's loss and gradient (a single sum says more about luck)."""
    upstream = torch.randn(len(labels))
    exact = run(ce.reference, logits.double(), labels, upstream.double(), reduction="none", **options)
    plain, ours = (run(f, logits, labels, upstream, reduction="none", **options) for f in (ce.reference, function))
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert (o.dtype, o.shape) == (p.dtype, p.shape)
        assert (o - e).norm() <= max(2 * (p - e).norm().item(), torch.finfo(o.dtype).eps / 2 * e.norm().item())
    loss, entropy, grad = run(function, logits, labels, reduction="none", **options)
    weights = options.get("weights_n", torch.ones(len(labels)))[labels != ce.IGNORE]
    for reduction, count in (("sum", 1.0), ("mean", weights.sum() or 1.0)):
        for e, o in zip(
            (loss.sum(), entropy.sum(), grad.float()), run(function, logits, labels, reduction=reduction, **options), strict=True
        ):
            torch.testing.assert_close(o, (e / count).to(o.dtype), rtol=2 * torch.finfo(o.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("n", [0, 1, 31, 33])
def test_any_number_of_rows(function, n: int) -> None:
    """Liger's PR 1361 (a tail of T % 32), PR 1368 (T = 1)."""
    logits, labels, weights = sample(33)
    assert_errs_no_more(function, logits[:n], labels[:n], weights_n=weights[:n], **EVERYTHING)


@pytest.mark.parametrize("v", [1, 2, 3, 129, 32003])
def test_any_vocabulary(v: int) -> None:
    logits, labels, _ = sample(8, v)
    assert_errs_no_more(ce.fused, logits, labels, z_loss=1e-3, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", launch.FLOATS)
@pytest.mark.parametrize("function", FAST)
def test_every_dtype_and_the_loss_in_fp32(function, dtype: torch.dtype) -> None:
    logits, labels, weights = sample(dtype=dtype)
    assert run(function, logits, labels)[0].dtype == torch.float32  # Liger's is rounded to bf16
    assert_errs_no_more(function, logits, labels, weights_n=weights, **EVERYTHING)


@pytest.mark.parametrize("function", FAST)
def test_each_row_takes_its_own_gradient(function) -> None:
    """Liger's issue 968, PR 1298: the first row's gradient was used for all."""
    logits, labels, weights = sample()
    assert_errs_no_more(function, logits, labels, weights_n=weights)


@pytest.mark.parametrize("function", FAST)
def test_a_gradient_of_stride_0(function) -> None:
    """ROCm TransformerEngine's PR 623: an expanded gradient was read out of bounds."""
    logits, labels, _ = sample()
    spread = run(function, logits, labels, torch.tensor(0.7).expand(33), reduction="none")
    plain = run(function, logits, labels, torch.full((33,), 0.7), reduction="none")
    assert torch.equal(spread[2], plain[2])
    leaf = logits.clone().requires_grad_()
    function(leaf, labels, reduction="none")[0].sum().backward()
    assert torch.equal(leaf.grad, run(function, logits, labels)[2])  # type: ignore[arg-type]


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("layout", ["transposed", "every second column", "every second row", "expanded"])
def test_logits_of_any_layout(function, layout: str) -> None:
    """TransformerEngine's issue 2734: transposed logits passed its guard of the last stride."""
    logits, labels, _ = sample(32, 32)
    match layout:
        case "transposed":
            logits = logits.t()
        case "every second column":
            logits = logits.repeat_interleave(2, 1)[:, ::2]
        case "every second row":
            logits = logits.repeat_interleave(2, 0)[::2]
        case "expanded":
            logits = logits[:1].expand(32, 32)
    kept = logits.clone()
    for a, b in zip(run(function, kept, labels), run(function, logits, labels), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("function", FAST)
def test_logits_that_another_operation_saved_are_not_overwritten(function) -> None:
    """Liger's issues 272 and 254: the gradient was written over them, and the version counter did not tell."""
    z, labels, _ = sample()
    leaf = z.clone().requires_grad_()
    logits = torch.tanh(leaf)  # saves its output
    before, version = logits.detach().clone(), logits._version
    loss, _ = function(logits, labels)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()  # type: ignore[union-attr]
    leaf.grad = None
    loss.backward()
    assert torch.equal(logits, before)
    assert logits._version == version
    assert torch.equal(leaf.grad, first)  # type: ignore[arg-type]
    exact = torch.autograd.functional.jacobian(lambda x: ce.reference(torch.tanh(x), labels)[0], z.double())
    torch.testing.assert_close(first.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", ALL)
def test_the_mean_is_over_rows_with_a_label(function) -> None:
    """ROCm TransformerEngine's PR 336 divided by all rows."""
    logits, labels, weights = sample()
    live = labels != ce.IGNORE
    total, mean = (run(function, logits, labels, reduction=r) for r in ("sum", "mean"))
    torch.testing.assert_close(mean[0], total[0] / live.sum())
    torch.testing.assert_close(mean[2], total[2] / live.sum())
    torch.testing.assert_close(mean[0], torch.nn.functional.cross_entropy(logits, labels))
    total, mean = (run(function, logits, labels, reduction=r, weights_n=weights) for r in ("sum", "mean"))
    torch.testing.assert_close(mean[0], total[0] / weights[live].sum())


@pytest.mark.parametrize("function", ALL)
def test_label_smoothing_is_that_of_torch(function) -> None:
    logits, labels, _ = sample()
    ours, plain = run(function, logits, labels, reduction="mean", label_smoothing=0.2)[:2]
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2))
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("reduction", ce.REDUCTIONS)
def test_no_labels_at_all(function, reduction: str) -> None:
    logits, labels, weights = sample()
    loss, plain, grad = run(function, logits, torch.full_like(labels, ce.IGNORE), reduction=reduction, weights_n=weights, **EVERYTHING)
    assert not loss.any()
    assert not plain.any()
    assert not grad.any()


@pytest.mark.parametrize("function", FAST)
def test_rows_without_a_label_are_not_looked_at(function) -> None:
    logits, labels, _ = sample()
    expected = run(function, logits, labels)
    logits[labels == ce.IGNORE] = torch.nan
    for a, b in zip(expected, run(function, logits, labels), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(run(function, logits, torch.where(labels == ce.IGNORE, 5, labels), ignore=5)[2].isnan().any(), torch.tensor(False))


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("label", [77, -1, 1 << 40, -(1 << 40)])
def test_a_label_out_of_range_makes_its_loss_nan(function, label: int) -> None:
    logits, labels, _ = sample()
    labels[3] = 5
    expected = run(function, logits, labels, reduction="none")
    labels[3] = label
    loss, plain, grad = run(function, logits, labels, reduction="none")
    others = torch.arange(33) != 3
    assert loss[3].isnan()
    assert plain[3].isnan()
    assert grad[3].isnan().any()
    for a, b in zip(expected, (loss, plain, grad), strict=True):
        assert torch.equal(a[others], b[others])
    assert function(logits, labels)[0].isnan()


@pytest.mark.parametrize("dtype", launch.FLOATS)
@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("margin", [7.0, 9.0, 12.0])
def test_a_sure_prediction_keeps_its_gradient(function, margin: float, dtype: torch.dtype) -> None:
    """Liger's PR 1329: p - 1, made by reading and writing bf16, was 0 at p = 0.999."""
    logits = torch.zeros(1, 8, dtype=dtype)
    logits[0, 3] = margin
    exact = run(ce.reference, logits.double(), torch.tensor([3]))
    ours = run(function, logits, torch.tensor([3]))
    # Where p - 1 is 4e-5 to 6e-3. On a CPU, torch's softmax errs by some units in the last place.
    for e, o in zip(exact, ours, strict=True):
        torch.testing.assert_close(o.double(), e, rtol=torch.finfo(o.dtype).eps, atol=3e-7 if function is ce.fused else 1e-6)


@pytest.mark.parametrize("offset", [1e3, 1e4, -1e4])
@pytest.mark.parametrize("function", FAST)
def test_a_common_offset_does_no_harm(function, offset: float) -> None:
    """pytorch 195829: a fused loss that lost its digits to it."""
    logits, labels, weights = sample()
    logits = (logits * 8).round() / 8 + offset  # in few bits, so that logit + offset is exact
    assert_errs_no_more(function, logits, labels, weights_n=weights, label_smoothing=0.1)
    shifted, plain = (run(function, x, labels, label_smoothing=0.1) for x in (logits, logits - offset))
    torch.testing.assert_close(shifted[2], plain[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("function", FAST)
def test_a_masked_vocabulary(function) -> None:
    logits, labels, _ = sample()
    logits[:, 70:] = -torch.inf
    labels = torch.where(labels >= 70, 0, labels)
    assert_errs_no_more(function, logits, labels, z_loss=1e-3)
    assert not run(function, logits, labels)[2][:, 70:].any()


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_a_scale_that_is_not_positive(function, scale: float) -> None:
    logits, labels, _ = sample()
    assert_errs_no_more(function, logits, labels, scale=scale, label_smoothing=0.1)


@pytest.mark.parametrize("kernel", ["scan", "grad"])
def test_every_configuration_gives_the_same(kernel: str) -> None:
    """Triton 6691, fla 595682b8: some were wrong."""
    space = ce.SPACE[f"cross_entropy.{kernel}"]
    wide = [configuration for configuration in space if configuration["block"] > 4096]
    for dtype, n, v, configurations in ((torch.bfloat16, 3, 5003, space), (torch.float32, 2, 40009, wide[-2:])):
        logits, labels, _ = sample(n, v, dtype)
        expected = run(ce.lean, logits, labels, z_loss=1e-3)
        for configuration in configurations:
            with launch.forced(f"cross_entropy.{kernel}", configuration):
                for a, b in zip(expected, run(ce.fused, logits, labels, z_loss=1e-3), strict=True):
                    torch.testing.assert_close(b, a, rtol=2 * torch.finfo(b.dtype).eps, atol=1e-6)


def test_shipped_configurations_are_among_those_tried() -> None:
    for kernel, space in ce.SPACE.items():
        for configuration in launch.table("default")["configs"][kernel].values():
            assert configuration in space


def test_rows_beyond_2_to_the_31() -> None:
    """Liger's issue 803: a row times a stride in 32 bits."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((3, 40), (2**30 + 8, 1))
    logits, labels, _ = sample(3, 40, torch.bfloat16)
    far.copy_(logits)
    labels[:] = torch.arange(3)
    expected = run(ce.fused, logits, labels)
    for a, b in zip(expected, run(ce.fused, far, labels), strict=True):
        assert torch.equal(a, b)
    out = torch.empty(3), torch.empty(3), torch.empty(3, 4)
    ce.fused_rows(far, far, labels, None, None, None, ce.Terms(None, 1.0, 0.0, 0.0, ce.IGNORE), ce.Shard(0, 40, None), out)  # in place
    torch.testing.assert_close(far, expected[2], rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def test_two_runs_are_equal_to_the_bit() -> None:
    logits, labels, weights = sample(dtype=torch.bfloat16)
    for a, b in zip(*(run(ce.fused, logits, labels, weights_n=weights, **EVERYTHING) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", FAST)
def test_within_a_checkpoint_it_is_the_same(function) -> None:
    logits, labels, _ = sample()
    expected = run(function, logits, labels)
    leaf = logits.clone().requires_grad_()
    checkpoint(lambda x: function(x, labels)[0], leaf, use_reentrant=False).backward()  # type: ignore[union-attr]
    assert torch.equal(leaf.grad, expected[2])  # type: ignore[arg-type]


@pytest.mark.parametrize("function", ALL)
def test_the_plain_cross_entropy_carries_no_gradient_and_a_loss_used_twice_both(function) -> None:
    logits, labels, _ = sample()
    leaf = logits.clone().requires_grad_()
    loss, plain = function(leaf, labels, z_loss=0.1)
    assert loss.requires_grad
    assert not plain.requires_grad
    (loss * 2 + loss.square() * 0).backward()
    torch.testing.assert_close(leaf.grad, 2 * run(function, logits, labels, z_loss=0.1)[2])
    with torch.no_grad():
        assert not function(leaf, labels)[0].requires_grad


@pytest.mark.parametrize("weighted", [False, True])
def test_the_operators_are_well_formed(weighted: bool) -> None:
    logits, labels, weights = sample(5, 19)
    terms = (5.0, 0.5, 1e-2, 0.1, ce.IGNORE)
    given = weights if weighted else None
    torch.library.opcheck(torch.ops.gigatrain.cross_entropy.default, (logits.requires_grad_(), labels, given, *terms))
    states = torch.ops.gigatrain.cross_entropy(logits.detach(), labels, given, *terms)[2]
    arguments = torch.randn(5), logits.detach(), labels, given, states, *terms
    torch.library.opcheck(torch.ops.gigatrain.cross_entropy_backward.default, arguments)


def test_it_compiles_as_one_graph() -> None:
    logits, labels, weights = sample(5, 19)
    expected = run(ce.fused, logits, labels, weights_n=weights, reduction="mean", **EVERYTHING)
    whole = torch.compile(ce.fused, fullgraph=True, backend="aot_eager")
    for a, b in zip(expected, run(whole, logits, labels, weights_n=weights, reduction="mean", **EVERYTHING), strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"logits_nv": torch.zeros(33, 77, dtype=torch.float64)},
            "logits must be bf16, fp16 or fp32 and labels integers, not torch.float64",
        ),
        ({"labels_n": torch.zeros(33)}, "and labels integers, not torch.float32 and torch.float32"),
        ({"labels_n": torch.zeros(32, dtype=torch.int64)}, r"logits \(33, 77\), labels \(32,\) and weights do not fit"),
        ({"weights_n": torch.ones(33, dtype=torch.float64)}, "weights_n must be fp32, not torch.float64"),
        ({"weights_n": torch.ones(33, requires_grad=True)}, "weights_n gets no gradient; detach it"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], why: str) -> None:
    logits, labels, weights = sample()
    with pytest.raises(KernelError, match=why):
        ce.fused(**{"logits_nv": logits, "labels_n": labels, "weights_n": weights, **change})


@pytest.mark.parametrize("function", ALL)
def test_refuses_an_unknown_reduction(function) -> None:
    logits, labels, _ = sample()
    with pytest.raises(ValueError, match="reduction 'avg' is none of sum, mean, none"):
        function(logits, labels, reduction="avg")


def test_the_tanh_of_the_cap_is_exact_to_its_last_digits() -> None:
    """Over twelve decades, through a cap of 1: l - l[label] of a row is tanh(x) - tanh(0)."""
    x = torch.cat((torch.logspace(-9, 3, 400), -torch.logspace(-9, 3, 400), torch.linspace(0.9, 1.1, 200)))
    logits = torch.stack((x, torch.zeros_like(x)), 1)
    # Of two logits the gradient is p times the derivative of the cap: d loss / d x of the other label's row.
    labels = torch.ones(len(x), dtype=torch.int64)
    exact, plain, ours = (run(f, logits.to(d), labels, reduction="none", softcap=1.0) for f, d in (
        (ce.reference, torch.float64), (ce.reference, torch.float32), (ce.fused, torch.float32),
    ))  # fmt: skip
    assert (ours[0] - exact[0]).abs().max() <= max(2 * (plain[0] - exact[0]).abs().max().item(), 2.4e-7)
    assert (ours[2] - exact[2]).abs().max() <= max(2 * (plain[2] - exact[2]).abs().max().item(), 2.4e-7)
