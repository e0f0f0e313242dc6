"""Rotation of queries and keys: what each channel becomes, whose angles turn it, and what went wrong in other libraries' fused ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gigatrain.architectures import Architecture, Rope
from gigatrain.errors import KernelError
from gigatrain.kernels import launch, rope
from gigatrain.kernels.launch import tl, triton
from gigatrain.kernels.rope import places
from gigatrain.models.decoder import Tables

LLAMA = Rope(kind="llama3", theta=500_000.0, factor=8.0, original_positions=8192, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = Rope(kind="yarn", theta=1_000_000.0, factor=4.0, original_positions=32768)


def heads(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def inputs(b: int, t: int, h: int, k: int, d: int, r: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and a row of angles for each of the batch."""
    torch.manual_seed(11)
    return heads(b, t, h, d, dtype=dtype), heads(b, t, k, d, dtype=dtype, seed=8), *rope.angles(b, t, r // 2, dtype, "cpu")


def judged(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> None:
    """Outputs and gradients of `fused`, with gradients that differ everywhere, against twice the error of `reference`."""
    results = []
    for version, wide in ((rope.fused, False), (rope.reference, False), (rope.reference, True)):
        a, b, c, s = (x.detach().double() if wide else x.detach() for x in (q, k, cos, sin))
        leaves = (a.requires_grad_(), b.requires_grad_())
        outputs = version(*leaves, c, s, interleaved)
        grads = [torch.linspace(-1, 2, o.numel(), dtype=torch.float64).view(o.shape).to(o.dtype) for o in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for ours, plain, exact in zip(*results, strict=True):
        assert (ours.dtype, ours.shape) == (plain.dtype, plain.shape)
        bound = max(2 * (plain.double() - exact).norm().item(), torch.finfo(plain.dtype).eps / 2 * exact.norm().item())
        assert (ours.double() - exact).norm() <= bound


def test_operator_passes_torchs_own_check() -> None:
    q, k, cos, sin = inputs(2, 3, 3, 1, 12, 8, torch.float32)
    torch.library.opcheck(torch.ops.gigatrain.rope.default, (q, k, cos, sin, False, 1.0))
    torch.library.opcheck(torch.ops.gigatrain.rope.default, (q.detach(), k, cos[:1], sin[:1], True, -1.0))


@pytest.mark.parametrize("tokens", [1, 31, 33])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tails_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    """Lanes beyond the last token, head or pair are neither read nor written (Liger PR 1361)."""
    judged(*inputs(1, tokens, 3, 1, 20, 12, dtype))


@pytest.mark.parametrize("d", [2, 6, 80, 96, 256])
def test_heads_of_any_width(d: int) -> None:
    for interleaved in (False, True):
        judged(*inputs(2, 3, 5, 2, d, d), interleaved)


def test_each_row_is_turned_by_its_own_angles() -> None:
    """Liger's ignored all but the first of a batch (its PR 477)."""
    q, k, cos, sin = inputs(3, 5, 2, 1, 16, 16)
    together = rope.fused(q, k, cos, sin)
    for i in range(3):
        row = slice(i, i + 1)
        alone = rope.fused(q[row], k[row], cos[row], sin[row])
        assert all(torch.equal(a[row], b) for a, b in zip(together, alone, strict=True))
    assert not torch.equal(together[0], rope.fused(q, k, cos[:1], sin[:1])[0])


def test_one_row_of_angles_serves_the_batch() -> None:
    q, k, cos, sin = inputs(3, 5, 2, 1, 16, 16)
    shared = rope.fused(q, k, cos[:1], sin[:1])
    for expanded in (cos[:1].expand(3, -1, -1), cos[:1].repeat(3, 1, 1)):
        sines = sin[:1].expand(3, -1, -1)
        assert all(torch.equal(a, b) for a, b in zip(shared, rope.fused(q, k, expanded, sines), strict=True))


def test_positions_of_packed_documents_begin_again() -> None:
    """Positions were those of the row, not of the document (NeMo-Automodel PR 2377)."""
    tables = Tables(Rope(), Architecture(family="llama", vocab=8, hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate=8))
    lengths = (4, 1, 7)
    q, k = heads(1, sum(lengths), 2, 16), heads(1, sum(lengths), 1, 16)
    packed = rope.fused(q, k, *tables(torch.cat([torch.arange(n) for n in lengths])[None], torch.bfloat16)[:2])
    start = 0
    for n in lengths:
        alone = rope.fused(q[:, start : start + n], k[:, start : start + n], *tables(torch.arange(n)[None], torch.bfloat16)[:2])
        assert all(torch.equal(a[:, start : start + n], b) for a, b in zip(packed, alone, strict=True))
        start += n


@pytest.mark.parametrize("scaled", [LLAMA, YARN], ids=["llama3", "yarn"])
@pytest.mark.parametrize("fp32", [False, True])
def test_scaled_tables_of_long_packed_samples(scaled: Rope, fp32: bool) -> None:
    """To position 131,071, where an angle rounded to bf16 would be wrong by hundreds of radians."""
    arch = Architecture(family="llama", vocab=8, hidden=32, layers=1, heads=2, kv_heads=1, head_dim=128, intermediate=8, rope=scaled)
    tables = Tables(scaled, arch)
    tables.fp32 = fp32
    positions = torch.stack((torch.arange(131_054, 131_072), torch.cat((torch.arange(8_190, 8_200), torch.arange(8)))))
    cos, sin, _ = tables(positions, torch.bfloat16)
    assert cos.dtype == (torch.float32 if fp32 else torch.bfloat16)
    judged(heads(2, 18, 4, 128), heads(2, 18, 1, 128), cos, sin)


def test_fp32_tables_round_once() -> None:
    q, k, _, _ = inputs(2, 8, 2, 1, 64, 64)
    cos, sin = rope.angles(2, 8, 32, torch.float32, "cpu")
    for ours, wide in zip(rope.fused(q, k, cos, sin), rope.reference(q.float(), k.float(), cos, sin), strict=True):
        assert (ours != wide.bfloat16()).sum() <= 1e-3 * ours.numel()  # a multiply-add rounds its product to more digits


def test_interleaved_is_halves_of_other_channels() -> None:
    q, k, cos, sin = inputs(2, 5, 3, 2, 24, 16)
    order = torch.cat((torch.arange(0, 16, 2), torch.arange(1, 16, 2), torch.arange(16, 24)))
    halves = rope.fused(q[..., order], k[..., order], cos, sin)
    for a, b in zip(rope.fused(q, k, cos, sin, True), halves, strict=True):
        assert torch.equal(a[..., order], b)


@pytest.mark.parametrize("interleaved", [False, True])
def test_channels_beyond_the_rotary_ones_pass_through(interleaved: bool) -> None:
    q, k, cos, sin = inputs(2, 5, 3, 2, 20, 12)
    for x, turned in zip((q, k), rope.fused(q, k, cos, sin, interleaved), strict=True):
        assert torch.equal(turned[..., 12:], x[..., 12:])
        (back,) = torch.autograd.grad(turned, x, x, retain_graph=True)
        assert torch.equal(back[..., 12:], x[..., 12:])


def test_the_backward_turns_back() -> None:
    """A rotation's gradient is its inverse, so that of the output is the input."""
    q, k, cos, sin = inputs(2, 5, 3, 2, 20, 16, torch.float32)
    for interleaved in (False, True):
        turned = rope.fused(q, k, cos, sin, interleaved)
        for x, back in zip((q, k), torch.autograd.grad(turned, (q, k), [o.detach() for o in turned]), strict=True):
            torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", list(rope.SPACE))
def test_every_configuration_gives_the_right_result(kernel: str) -> None:
    """Triton 6691, fla 595682b8: some configurations only were wrong. Those that differ in warps are one to the interpreter."""
    tensors = inputs(2, 2, 5, 2, 96, 80)
    for configuration in {c["elements"]: c for c in rope.SPACE[kernel]}.values():
        with launch.forced(kernel, configuration):
            judged(*tensors)


def test_shipped_configurations_can_be_tuned_to() -> None:
    for kernel, space in rope.SPACE.items():
        assert all(shipped in space for shipped in launch.table("default")["configs"][kernel].values())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_two_billion_elements(axis: int) -> None:
    """32-bit products overflow (Liger 803, PR 804). Untouched pages of the 4 GB tensor are never committed."""
    far = (1 << 30) + 1  # odd, so that strides are not handed over in units of 8
    shape, strides = [1, 1, 1, 64], [64, 64, 64, 1]
    shape[axis], strides[axis] = 3, far
    x = torch.empty(2 * far + 64, dtype=torch.bfloat16).as_strided(shape, strides)
    near = heads(*shape).detach()
    x.copy_(near)
    cos, sin = rope.angles(1, shape[1], 32, torch.bfloat16, "cpu")
    assert torch.equal(rope.fused(x, near, cos, sin)[0], rope.fused(near, near, cos, sin)[0])
    leaves = [near.clone().requires_grad_() for _ in range(2)]
    back = [torch.autograd.grad(rope.fused(q, near, cos, sin)[0], q, g)[0] for q, g in zip(leaves, (x, near), strict=True)]
    assert torch.equal(*back)


@triton.jit
def _start(OUT, first, tokens, OF: tl.constexpr, D: tl.constexpr, ONE: tl.constexpr):
    row, head, _, _, _ = places(first, OF - 1, tokens, tokens, OF, ONE, ONE)
    tl.store(OUT + head * 0, (row * OF + head) * D)


def test_outputs_beyond_two_billion_elements_are_addressed() -> None:
    """The last of 80 million tokens, by its place alone: an operation would write all of them."""
    out = torch.zeros(1, dtype=torch.int64)
    launch.launch(_start, (1,), out, 79_999_999, 80_000_000, OF=32, D=128, ONE=1)
    assert out.item() == 80_000_000 * 32 * 128 - 128


def test_parts_of_one_projection_are_read_where_they_lie() -> None:
    """Not copied first (Liger's hidden copies), and not taken for contiguous (TE 2734)."""
    qkv = heads(2, 5, 6, 16).detach()
    cos, sin = rope.angles(2, 5, 8, torch.bfloat16, "cpu")
    parts, turned_heads = qkv.split((3, 2, 1), 2), qkv.transpose(1, 2).contiguous().transpose(1, 2).split((3, 2, 1), 2)
    plain = rope.fused(parts[0].contiguous(), parts[1].contiguous(), cos, sin)
    for q, k, _ in (parts, turned_heads):
        assert not q.is_contiguous()
        assert rope.unit_stride(q) is q
        for a, b in zip(rope.fused(q, k, cos, sin), plain, strict=True):
            assert torch.equal(a, b)
            assert a.is_contiguous()


def test_gradients_of_any_strides() -> None:
    """loss.sum().backward() gives strides of 0 (ROCm TE PR 623), attention transposed ones (TE 2734)."""
    q, k, cos, sin = inputs(2, 3, 4, 2, 16, 16)
    outputs = rope.fused(q, k, cos, sin)
    dk = heads(2, 3, 2, 16).detach()
    for dq in (
        torch.ones((), dtype=torch.bfloat16).expand(2, 3, 4, 16),
        heads(16).detach().expand(2, 3, 4, 16),
        heads(2, 4, 3, 16).detach().transpose(1, 2),
        heads(2, 3, 16, 4).detach().transpose(2, 3),
    ):
        found = torch.autograd.grad(outputs, (q, k), (dq, dk), retain_graph=True)
        plain = torch.autograd.grad(outputs, (q, k), (dq.contiguous(), dk), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_nothing_that_others_hold_is_overwritten() -> None:
    """Rotating in place corrupts what was saved upstream (Unsloth's in-place rotation, Liger 254)."""
    q, k, cos, sin = inputs(2, 3, 4, 2, 16, 16)
    dq, dk = torch.randn_like(q), torch.randn_like(k)
    held = (q, k, cos, sin, dq, dk)
    before = [x.detach().clone() for x in held]
    torch.autograd.backward(rope.fused(q, k, cos, sin), (dq, dk))
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_only_the_angles_are_kept_for_the_backward() -> None:
    q, k, cos, sin = inputs(2, 3, 4, 2, 16, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rope.fused(q, k, cos, sin)
    assert [x.data_ptr() for x in kept] == [cos.data_ptr(), sin.data_ptr()]


def test_one_of_both_may_be_frozen_or_unused() -> None:
    q, k, cos, sin = inputs(2, 3, 4, 2, 16, 16)
    outputs = rope.fused(q, k, cos, sin)
    both = torch.autograd.grad(outputs, (q, k), [o.detach() * 3 for o in outputs], retain_graph=True)
    for i, x in enumerate((q, k)):
        (alone,) = torch.autograd.grad(outputs[i], x, outputs[i].detach() * 3, retain_graph=True)
        assert torch.equal(alone, both[i])
        frozen = rope.fused(q if x is q else q.detach(), k if x is k else k.detach(), cos, sin)
        assert torch.equal(torch.autograd.grad(frozen[i], x, outputs[i].detach() * 3)[0], both[i])


def test_a_graph_kept_gives_the_same_gradient_twice() -> None:
    """In-place gradients corrupt what a second backward reads (Liger 272)."""
    q, k, cos, sin = inputs(2, 3, 4, 2, 16, 16)
    outputs = rope.fused(q, k, cos, sin)
    loss = (outputs[0].square().sum() + outputs[0].sum()) * outputs[1].square().sum()
    first, second = (torch.autograd.grad(loss, (q, k), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_recomputation_gives_the_same_gradient() -> None:
    """Saved tensors read twice break non-reentrant checkpointing (mamba PR 1020)."""
    q, k, cos, sin = inputs(2, 3, 4, 2, 16, 16)
    plain = rope.fused(q, k, cos, sin)
    again: Any = checkpoint(rope.fused, q, k, cos, sin, use_reentrant=False)
    found = [torch.autograd.grad(outputs[0].square().sum() + outputs[1].sum(), (q, k)) for outputs in (plain, again)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_traces_whole_under_the_compiler() -> None:
    q, k, cos, sin = inputs(2, 3, 4, 2, 16, 16, torch.float32)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        a, b = rope.fused(q, k, cos, sin)
        return a.square().sum() * b.sum()

    plain = torch.autograd.grad(loss(q, k), (q, k))
    traced = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(q, k), (q, k))
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, k, c, s: (q.double(), k.double(), c, s), "they are torch.float64, torch.float64, torch.float32, torch.float32"),
        (lambda q, k, c, s: (q, k.half(), c, s), "q and k, and cos and sin, must share one of bf16, fp16, fp32"),
        (lambda q, k, c, s: (q, k, c, s.half()), "q and k, and cos and sin, must share one of bf16, fp16, fp32"),
        (lambda q, k, c, s: (q, k[:, :2], c, s), r"q \(2, 3, 2, 8\), k \(2, 2, 1, 8\), cos \(2, 3, 4\) and sin \(2, 3, 4\) do not fit"),
        (lambda q, k, c, s: (q[0], k, c, s), "do not fit"),
        (lambda q, k, c, s: (q, k, c[:, :1], s[:, :1]), "do not fit"),
        (lambda q, k, c, s: (torch.cat((q, q)), torch.cat((k, k)), c, s), "do not fit"),
        (lambda q, k, c, s: (q[..., :6], k[..., :6], c, s), "8 rotary channels of 6 are not between 2 and all of at most 512"),
        (lambda q, k, c, s: (q.repeat(1, 1, 1, 65), k.repeat(1, 1, 1, 65), c, s), "8 rotary channels of 520 are not"),
        (lambda q, k, c, s: (q, k, c.to("meta"), s.to("meta")), "the tensors are on "),
    ],
)
def test_refuses_what_it_cannot_do_and_names_the_way_out(change: Callable[..., Any], said: str) -> None:
    with pytest.raises(KernelError, match=f'rope: .*{said}.*; set kernels.rope = "lean"'):
        rope.fused(*change(*(x.detach() for x in inputs(2, 3, 2, 1, 8, 8, torch.float32))))


def test_the_public_function_runs_on_a_cpu() -> None:
    q, k, cos, sin = inputs(1, 3, 2, 1, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(rope.rope(q, k, cos, sin), rope.lean(q, k, cos, sin), strict=True))
