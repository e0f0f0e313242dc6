"""The fused norm and rotation of queries and keys: against its two parts, where it rounds, and what went wrong in other libraries' fused ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gigatrain.architectures import Architecture, Rope
from gigatrain.errors import KernelError
from gigatrain.kernels import launch, qk_norm_rope, rms_norm, rope
from gigatrain.models.decoder import Tables

Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(b: int, t: int, h: int, k: int, d: int, r: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """q, k and their weights, which get gradients, and the angles of each row; r 0: none."""
    torch.manual_seed(11)
    shapes = ((b, t, h, d), (b, t, k, d), (d,), (d,))
    q, key, qw, kw = (normal(*shape, dtype=dtype, seed=seed).requires_grad_() for seed, shape in enumerate(shapes))
    cos, sin = rope.angles(b, t, r // 2, dtype, "cpu") if r else (None, None)
    return q, key, qw, kw, cos, sin


def grads(outputs: Any, tensors: Any, **options: bool) -> tuple[Tensor, ...]:
    """Gradients of the first four tensors, from gradients of the outputs that differ everywhere."""
    given = [torch.linspace(-1, 2, o.numel(), dtype=torch.float64).view(o.shape).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, tensors[:4], given, **options)


def judged(tensors: Tensors, style: rms_norm.Style = "llama", interleaved: bool = False) -> None:
    """Outputs and gradients of `fused` against twice the error of `reference`."""
    results = []
    for version, wide in ((qk_norm_rope.fused, False), (qk_norm_rope.reference, False), (qk_norm_rope.reference, True)):
        leaves = [None if x is None else (x.detach().double() if wide else x.detach()) for x in tensors]
        leaves[:4] = [x.requires_grad_() for x in leaves[:4] if x is not None]
        outputs = version(*leaves, 1e-6, style, interleaved)  # type: ignore[arg-type]
        results.append([*outputs, *grads(outputs, leaves)])
    for ours, plain, exact in zip(*results, strict=True):
        assert (ours.dtype, ours.shape) == (plain.dtype, plain.shape)
        bound = max(2 * (plain.double() - exact).norm().item(), torch.finfo(plain.dtype).eps / 2 * exact.norm().item())
        assert (ours.double() - exact).norm() <= bound


def test_operators_pass_torchs_own_check() -> None:
    q, k, qw, kw, cos, sin = inputs(2, 3, 3, 1, 12, 8, torch.float32)
    torch.library.opcheck(torch.ops.gigatrain.qk_norm_rope.default, (q, k, qw, kw, cos, sin, 1e-6, "gemma", True))
    plain = [x.detach() for x in (q, k, q, k, qw, kw)]
    rstds = torch.rand(2, 3, 3), torch.rand(2, 3, 1)
    for tables, weight in (((cos, sin), True), ((None, None), False)):
        backward = torch.ops.gigatrain.qk_norm_rope_backward.default
        checks = ("test_schema", "test_faketensor")  # it has no gradient, and the forward's check has traced it
        torch.library.opcheck(backward, (*plain, *tables, *rstds, "llama", False, weight), test_utils=checks)


@pytest.mark.parametrize("style", rms_norm.STYLES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_is_the_norm_and_then_the_rotation(style: rms_norm.Style, interleaved: bool) -> None:
    """In fp32, where its one rounding fewer is no difference; with the kernels of both parts, and the references."""
    q, k, qw, kw, cos, sin = inputs(2, 5, 3, 2, 20, 12, torch.float32)
    assert cos is not None
    assert sin is not None
    ours = qk_norm_rope.fused(q, k, qw, kw, cos, sin, 1e-5, style, interleaved)
    for norm, turn in ((rms_norm.fused, rope.fused), (rms_norm.reference, rope.reference)):
        parts = turn(norm(q, qw, 1e-5, style), norm(k, kw, 1e-5, style), cos, sin, interleaved)
        for a, b in zip((*ours, *grads(ours, (q, k, qw, kw), retain_graph=True)), (*parts, *grads(parts, (q, k, qw, kw))), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("style", rms_norm.STYLES)
def test_without_angles_it_is_the_norm_bit_for_bit(style: rms_norm.Style) -> None:
    """Up to the order of a sum of squares: llama's rounding before the weight included."""
    tensors = inputs(2, 5, 3, 2, 48, 0)
    for ours, x, w in zip(qk_norm_rope.fused(*tensors, 1e-6, style), tensors[:2], tensors[2:4], strict=True):
        plain = rms_norm.reference(x, w, 1e-6, style)
        assert (ours != plain).sum() <= 0.01 * plain.numel()
        torch.testing.assert_close(ours, plain, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.parametrize("tokens", [0, 1, 31, 33])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tails_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    """Lanes beyond the last token, head or channel are counted in no mean and in no weight's gradient (quack 9310d47, Liger PR 1361)."""
    judged(inputs(1, tokens, 3, 1, 20, 12, dtype))


@pytest.mark.parametrize("d", [2, 80, 256])
def test_heads_of_any_width(d: int) -> None:
    judged(inputs(2, 3, 5, 2, d, d), "gemma")
    judged(inputs(2, 3, 5, 2, d, d), "olmo", True)


def test_each_row_is_turned_by_its_own_angles() -> None:
    """Liger's rotation ignored all but the first of a batch (its PR 477)."""
    q, k, qw, kw, cos, sin = inputs(3, 5, 2, 1, 16, 16)
    assert cos is not None
    assert sin is not None
    together = qk_norm_rope.fused(q, k, qw, kw, cos, sin, 1e-6, "llama")
    for i in range(3):
        row = slice(i, i + 1)
        alone = qk_norm_rope.fused(q[row], k[row], qw, kw, cos[row], sin[row], 1e-6, "llama")
        assert all(torch.equal(a[row], b) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(together[0], qk_norm_rope.fused(q, k, qw, kw, cos[:1], sin[:1], 1e-6, "llama")[0])
    judged((q, k, qw, kw, cos[:1], sin[:1]))


@pytest.mark.parametrize("fp32", [False, True])
def test_scaled_tables_of_long_packed_samples(fp32: bool) -> None:
    """Qwen3's yarn, to position 131,071; positions of packed documents begin again (NeMo-Automodel PR 2377)."""
    scaled = Rope(kind="yarn", theta=1_000_000.0, factor=4.0, original_positions=32768)
    arch = Architecture(family="qwen3", vocab=8, hidden=32, layers=1, heads=2, kv_heads=1, head_dim=128, intermediate=8, rope=scaled)
    tables = Tables(scaled, arch)
    tables.fp32 = fp32
    positions = torch.stack((torch.arange(131_054, 131_072), torch.cat((torch.arange(8_190, 8_200), torch.arange(8)))))
    cos, sin, _ = tables(positions, torch.bfloat16)
    judged((*inputs(2, 18, 4, 1, 128, 0)[:4], cos, sin))


@pytest.mark.parametrize("kernel", list(qk_norm_rope.SPACE))
def test_every_configuration_gives_the_right_result(kernel: str) -> None:
    """Triton 6691, fla 595682b8: some configurations only were wrong. Those that differ in warps and pipeline are one to the interpreter."""
    tensors = inputs(1, 3, 5, 2, 96, 80)
    for configuration in {(c["elements"], c.get("programs")): c for c in qk_norm_rope.SPACE[kernel]}.values():
        with launch.forced(kernel, configuration):
            judged(tensors)


def test_shipped_configurations_can_be_tuned_to() -> None:
    for kernel, space in qk_norm_rope.SPACE.items():
        assert all(shipped in space for shipped in launch.table("default")["configs"][kernel].values())


def test_weight_gradients_do_not_degrade_with_the_number_of_tokens() -> None:
    """Liger's norm summed them in bf16 (its PR 950)."""
    tensors = inputs(1, 1_500, 4, 1, 8, 0)
    exact = [None if x is None else x.detach().double().requires_grad_() for x in tensors]
    plain = grads(qk_norm_rope.reference(*exact, 1e-6, "llama"), exact)  # type: ignore[arg-type]
    for ours, e in zip(grads(qk_norm_rope.fused(*tensors, 1e-6, "llama"), tensors)[2:], plain[2:], strict=True):
        assert (ours.double() - e).norm() <= torch.finfo(torch.bfloat16).eps * e.norm()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_two_billion_elements(axis: int) -> None:
    """32-bit products overflow (Liger 803, PR 804, Unsloth PR 3614). Untouched pages of the 4 GB tensor are never committed."""
    far = (1 << 30) + 1  # odd, so that strides are not handed over in units of 8
    shape, strides = [1, 1, 1, 64], [64, 64, 64, 1]
    shape[axis], strides[axis] = 3, far
    x = torch.empty(2 * far + 64, dtype=torch.bfloat16).as_strided(shape, strides)
    near = normal(*shape)
    x.copy_(near)
    w, tables = normal(64), rope.angles(1, shape[1], 32, torch.bfloat16, "cpu")
    found = []
    for each in (x, near):
        leaf = each.detach().requires_grad_()
        out = qk_norm_rope.fused(leaf, near, w, w, *tables, 1e-6, "llama")[0]
        found.append((out, *torch.autograd.grad(out, leaf, each.detach())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_parts_of_one_projection_are_read_where_they_lie() -> None:
    """Not copied first (Liger's hidden copies), and not taken for contiguous (TE 2734)."""
    qkv = normal(2, 5, 6, 16)
    w, tables = normal(16), rope.angles(2, 5, 8, torch.bfloat16, "cpu")
    parts, turned_heads = qkv.split((3, 2, 1), 2), qkv.transpose(1, 2).contiguous().transpose(1, 2).split((3, 2, 1), 2)
    plain = qk_norm_rope.fused(parts[0].contiguous(), parts[1].contiguous(), w, w, *tables, 1e-6, "llama")
    for q, k, _ in (parts, turned_heads):
        for a, b in zip(qk_norm_rope.fused(q, k, w, w, *tables, 1e-6, "llama"), plain, strict=True):
            assert torch.equal(a, b)
            assert a.is_contiguous()


def test_gradients_of_any_strides() -> None:
    """loss.sum().backward() gives strides of 0 (ROCm TE PR 623), attention transposed ones (TE 2734)."""
    tensors = inputs(2, 3, 4, 2, 16, 16)
    outputs = qk_norm_rope.fused(*tensors, 1e-6, "llama")
    dk = normal(2, 3, 2, 16)
    for dq in (
        torch.ones((), dtype=torch.bfloat16).expand(2, 3, 4, 16),
        normal(16).expand(2, 3, 4, 16),
        normal(2, 4, 3, 16).transpose(1, 2),
        normal(2, 3, 16, 4).transpose(2, 3),
    ):
        found = torch.autograd.grad(outputs, tensors[:4], (dq, dk), retain_graph=True)  # type: ignore[arg-type]
        plain = torch.autograd.grad(outputs, tensors[:4], (dq.contiguous(), dk), retain_graph=True)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_nothing_that_others_hold_is_overwritten() -> None:
    """An in-place backward corrupted the gradient that others share (Liger 370)."""
    q, k, qw, kw, cos, sin = inputs(2, 3, 4, 2, 16, 16)
    dq, dk = torch.randn_like(q), torch.randn_like(k)
    held: list[Any] = [q, k, qw, kw, cos, sin, dq, dk]
    before = [x.detach().clone() for x in held]
    torch.autograd.backward(qk_norm_rope.fused(q, k, qw, kw, cos, sin, 1e-6, "llama"), (dq, dk))
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_keeps_its_inputs_and_one_number_per_head() -> None:
    q, k, qw, kw, cos, sin = inputs(2, 3, 4, 2, 16, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        qk_norm_rope.fused(q, k, qw, kw, cos, sin, 1e-6, "llama")
    given = {x.data_ptr() for x in (q, k, qw, kw, cos, sin) if x is not None}
    assert [(x.shape, x.dtype) for x in kept if x.data_ptr() not in given] == [(x.shape[:-1], torch.float32) for x in (q, k)]


def test_a_frozen_weight_or_input_changes_nothing_else() -> None:
    """Unsloth's norm returns no weight gradient even where one is needed."""
    tensors = inputs(2, 3, 4, 2, 16, 16)
    all_four = grads(qk_norm_rope.fused(*tensors, 1e-6, "llama"), tensors)
    for wanted in ((0, 1), (2, 3), (0,), (3,), (1, 2)):
        leaves = [x if x is None or i in wanted else x.detach() for i, x in enumerate(tensors)]
        outputs = qk_norm_rope.fused(*leaves, 1e-6, "llama")  # type: ignore[arg-type]
        pairs = [(o, g) for o, g in zip(outputs, (torch.linspace(-1, 2, o.numel(), dtype=torch.float64) for o in outputs), strict=True)]
        given = [g.view(o.shape).to(o.dtype) for o, g in pairs]
        found = torch.autograd.grad(outputs, [tensors[i] for i in wanted], given)  # type: ignore[arg-type]
        assert all(torch.equal(a, all_four[i]) for a, i in zip(found, wanted, strict=True))


def test_only_one_of_both_outputs_may_be_used() -> None:
    tensors = inputs(2, 3, 4, 2, 16, 16)
    both = torch.autograd.grad([o.sum() for o in qk_norm_rope.fused(*tensors, 1e-6, "llama")], tensors[:4])  # type: ignore[arg-type]
    for i in (0, 1):
        outputs = qk_norm_rope.fused(*tensors, 1e-6, "llama")
        found = torch.autograd.grad(outputs[i].sum(), tensors[:4], allow_unused=True)  # type: ignore[arg-type]
        assert [g is None for g in found] == [bool(i), not i] * 2
        assert all(g is None or torch.equal(g, b) for g, b in zip(found, both, strict=True))


def test_a_graph_kept_gives_the_same_gradient_twice() -> None:
    """In-place gradients corrupt what a second backward reads (Liger 272); partial sums in a fixed order make runs bitwise equal."""
    tensors = inputs(2, 35, 4, 2, 16, 16)
    outputs = qk_norm_rope.fused(*tensors, 1e-6, "llama")
    first, second = (grads(outputs, tensors, retain_graph=True) for _ in range(2))
    again = grads(qk_norm_rope.fused(*tensors, 1e-6, "llama"), tensors)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, again, strict=True))


def test_recomputation_gives_the_same_gradient() -> None:
    """Saved tensors read twice break non-reentrant checkpointing (mamba PR 1020)."""
    tensors = inputs(2, 3, 4, 2, 16, 16)
    plain = grads(qk_norm_rope.fused(*tensors, 1e-6, "llama"), tensors)
    again: Any = checkpoint(qk_norm_rope.fused, *tensors, 1e-6, "llama", use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, grads(again, tensors), strict=True))


@pytest.mark.parametrize("rotary", [16, 0])
def test_traces_whole_under_the_compiler(rotary: int) -> None:
    tensors = inputs(2, 3, 4, 2, 16, rotary, torch.float32)

    def loss(*tensors: Any) -> Tensor:
        q, k = qk_norm_rope.fused(*tensors, eps=1e-6, style="llama")
        return q.square().sum() * k.sum()

    plain = torch.autograd.grad(loss(*tensors), tensors[:4])  # type: ignore[arg-type]
    traced = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors[:4])  # type: ignore[arg-type]
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, k, u, v, c, s: ((q.double(), k, u, v, None, None), "llama"), "they are torch.float64 on cpu, torch.float32 on cpu"),
        (
            lambda q, k, u, v, c, s: ((q, k, u.half(), v, c, s), "llama"),
            "q, k and their weights must share a device and one of bf16, fp16, fp32",
        ),
        (lambda q, k, u, v, c, s: ((q, k, u, v[:4], c, s), "llama"), r"and weights \(8,\) and \(4,\) do not fit"),
        (lambda q, k, u, v, c, s: ((q, k[:1], u, v, None, None), "llama"), r"q \(2, 3, 2, 8\), k \(1, 3, 1, 8\) and weights"),
        (lambda q, k, u, v, c, s: ((q, k[:1], u, v, c, s), "llama"), r"q \(2, 3, 2, 8\), k \(1, 3, 1, 8\), cos .* do not fit"),
        (
            lambda q, k, u, v, c, s: ((q[..., :1], k[..., :1], u[:1], v[:1], None, None), "llama"),
            "1 channels of a head are not between 2 and 512",
        ),
        (lambda q, k, u, v, c, s: ((q, k, u, v, c, None), "llama"), "one of cos and sin is given without the other"),
        (lambda q, k, u, v, c, s: ((q, k, u, v, c, s), "t5"), "style 't5' is none of llama, olmo, gemma"),
    ],
)
def test_refuses_what_it_cannot_do_and_names_the_way_out(change: Callable[..., Any], said: str) -> None:
    given = [x if x is None else x.detach() for x in inputs(2, 3, 2, 1, 8, 8, torch.float32)]
    tensors, style = change(*given)
    with pytest.raises(KernelError, match=f'qk_norm_rope: .*{said}.*; set kernels.qk_norm_rope = "lean"'):
        qk_norm_rope.fused(*tensors, eps=1e-6, style=style)


def test_the_public_function_runs_on_a_cpu() -> None:
    tensors = inputs(1, 3, 2, 1, 8, 8)
    plain = qk_norm_rope.lean(*tensors, 1e-6, "llama")
    assert all(torch.equal(a, b) for a, b in zip(qk_norm_rope.qk_norm_rope(*tensors), plain, strict=True))
