"""SwiGLU, GeGLU, ReLU squared and xIELU: what went wrong in other libraries' fused ones, and layouts that others copy, overflow or misread."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from gigatrain.errors import KernelError
from gigatrain.kernels import elementwise, geglu, launch, relu2, swiglu, xielu
from gigatrain.kernels.linear import beside

MODULES = {"swiglu": swiglu, "geglu": geglu, "relu2": relu2, "xielu": xielu}
GATED = ("swiglu", "geglu")
every = pytest.mark.parametrize("op", MODULES)


def leaves(op: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Inputs of an operation: gate and up, x, or x with its two scalars."""
    generator = torch.Generator().manual_seed(7)
    tensors = [(torch.randn(*shape, generator=generator) * 3).to(dtype) for _ in range(2 if op in GATED else 1)]
    if op == "xielu":
        tensors += [torch.tensor([value], dtype=dtype) for value in (0.3, -0.7)]
    return [x.requires_grad_() for x in tensors]


def slopes(y: Tensor) -> Tensor:
    """A gradient of y that is nowhere one."""
    return torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype)


def judged(op: str, tensors: list[Tensor], grad: Callable[[Tensor], Tensor] = slopes) -> None:
    """Outputs and gradients of the fused version against twice the error of the reference."""
    results = []
    for version, dtype in ((MODULES[op].fused, None), (MODULES[op].reference, None), (MODULES[op].reference, torch.float64)):
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
        y = version(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, grad(y.detach()))])
    for ours, plain, exact in zip(*results, strict=True):
        roundings = 4 if exact.numel() == 1 else 1  # a single number of plain torch may be exact by luck
        bound = max(2 * (plain.double() - exact).norm().item(), roundings * torch.finfo(plain.dtype).eps / 2 * exact.norm().item())
        assert (ours.double() - exact).norm() <= bound


@every
def test_operators_pass_torchs_own_check(op: str) -> None:
    inputs = leaves(op, 5, 33, dtype=torch.float32)
    torch.library.opcheck(getattr(torch.ops.gigatrain, op).default, tuple(inputs))
    frozen = [x.detach() for x in inputs]
    backward = getattr(torch.ops.gigatrain, f"{op}_backward").default
    for flags in ((True,), (False,)) if op == "xielu" else ((),):
        torch.library.opcheck(backward, (torch.randn(5, 33), *frozen, *flags))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 31, 33])
def test_tails(op: str, dtype: torch.dtype, rows: int) -> None:
    """The last tile is not full (Liger PR 1361, PR 1368, COAT 19)."""
    judged(op, leaves(op, rows, 67, dtype=dtype))


KERNELS = {kernel: space for module in MODULES.values() for kernel, space in module.SPACE.items()}


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration_gives_the_right_result(kernel: str) -> None:
    """Triton 6691, fla 595682b8: some configurations only were wrong. Warps mean nothing to the interpreter; a tuner checks them too."""
    op = kernel.split(".", maxsplit=1)[0]
    distinct = {(c["elements"], c.get("programs")): c for c in KERNELS[kernel]}
    for configuration in distinct.values():
        with launch.forced(kernel, configuration):
            judged(op, leaves(op, 7, 9, 35))


def test_shipped_configurations_can_be_tuned_to() -> None:
    for kernel, space in KERNELS.items():
        assert all(shipped in space for shipped in launch.table("default")["configs"][kernel].values())


@every
def test_the_backward_overwrites_nothing_so_that_it_can_run_twice(op: str) -> None:
    """In-place gradients overwrite what is saved or shared, unseen by the version counter (Liger 272, 254, PR 1251)."""
    inputs = leaves(op, 6, 40)
    before = [x.detach().clone() for x in inputs]
    y = MODULES[op].fused(*inputs)
    dy = slopes(y.detach())
    first, second = (torch.autograd.grad(y, inputs, dy, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert torch.equal(dy, slopes(y.detach()))
    assert all(x._version == 0 for x in (*inputs, dy))


@every
def test_recomputed_in_a_checkpoint_it_is_the_same(op: str) -> None:
    """`ctx.saved_tensors` read twice breaks checkpoints (mamba PR 1020)."""
    inputs = leaves(op, 5, 40)
    plain = torch.autograd.grad(MODULES[op].fused(*inputs).sum(), inputs)
    again = torch.autograd.grad(checkpoint(MODULES[op].fused, *inputs, use_reentrant=False).sum(), inputs)  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@every
def test_an_expanded_gradient_and_a_transposed_input_are_read_as_they_are(op: str) -> None:
    """loss.sum().backward() gives strides of 0; only the last stride was looked at (ROCm TE PR 623, TE 2734)."""
    judged(op, leaves(op, 5, 24), lambda y: torch.full((1, 1), 0.7, dtype=y.dtype).expand(y.shape))
    first, *scalars = [x.detach() for x in leaves(op, 24, 5)][: 1 if op in GATED else None]
    inputs = [first.T, *([first.T.contiguous()] if op in GATED else scalars)]
    assert torch.equal(MODULES[op].fused(*inputs), MODULES[op].fused(*(x.contiguous() for x in inputs)))


@every
def test_under_compile_it_is_one_graph(op: str) -> None:
    inputs = leaves(op, 4, 16, dtype=torch.float32)
    compiled = torch.compile(MODULES[op].fused, fullgraph=True, backend="aot_eager")
    y = compiled(*inputs)
    assert torch.equal(y, MODULES[op].fused(*inputs))
    got, expected = (torch.autograd.grad(out, inputs, slopes(y.detach())) for out in (y, MODULES[op].fused(*inputs)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@every
@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, where the interpreter makes the infinities that are expected
def test_large_numbers_make_no_nan(op: str) -> None:
    """Liger's GeGLU overflowed in fp16 (its PR 986), for tanh was made of exp of a large number."""
    for dtype, top in ((torch.float16, 60000.0), (torch.bfloat16, 1e30)):
        x = torch.tensor([-1.0, -1e-3, -30 / top, -8 / top, 0.0, 8 / top, 30 / top, 1e-3, 1.0]).mul(top).to(dtype)
        inputs = [x, torch.ones_like(x)] if op in GATED else [x, *leaves(op, 1, dtype=dtype)[1:]]
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = MODULES[op].fused(*inputs)
        first = torch.autograd.grad(y, inputs[0], torch.ones_like(y))[0]
        exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
        exact = MODULES[op].reference(*exact_inputs)
        expected = torch.autograd.grad(exact.sum(), exact_inputs[0])[0]
        # What fp16 cannot hold is infinite, as in torch.
        torch.testing.assert_close(y, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        torch.testing.assert_close(first, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@every
def test_nan_stays_nan(op: str) -> None:
    """Maxima and clamps of a GPU make a number of it (tl.maximum, tl.clamp), and a broken run goes on."""
    inputs = leaves(op, 1, 8)
    with torch.no_grad():
        inputs[0][0, 3] = float("nan")
    y = MODULES[op].fused(*inputs)
    grad = torch.autograd.grad(y, inputs[0], torch.ones_like(y))[0]
    for result in (y, grad):
        assert result.isnan().nonzero().tolist() == [[0, 3]]


@every
def test_rows_beyond_two_billion_elements(op: str) -> None:
    """A 32-bit row * stride overflows (Liger 803, PR 804, PR 1248). Untouched pages of the 4 GB tensor are never committed."""
    stride = (1 << 30) + 8
    near = leaves(op, 3, 64)
    far = [torch.empty(2 * stride + 64, dtype=torch.bfloat16).as_strided((3, 64), (stride, 1)).copy_(near[0].detach()).requires_grad_()]
    far += near[1:]
    dy = far[0].detach()
    for a, b in zip(*(torch.autograd.grad(MODULES[op].fused(*inputs), inputs, dy) for inputs in (far, near)), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(MODULES[op].fused(*far), MODULES[op].fused(*near))


def test_tiles_beyond_two_billion_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 32-bit program * block overflows as well; only the last program runs here."""
    x = torch.empty((1 << 31) + 100, dtype=torch.bfloat16)
    x[-100:] = torch.linspace(-2, 3, 100)
    plain = launch.launch

    def last_only(kernel: Any, grid: tuple[int], *arguments: Any, **options: Any) -> None:
        index = TensorHandle(np.array([grid[0] - 1], dtype=np.int32), tl.int32)
        with monkeypatch.context() as patch:
            patch.setattr(InterpreterBuilder, "create_get_program_id", lambda *_: index)
            plain(kernel, (1,), *arguments, **options)

    monkeypatch.setattr(launch, "launch", last_only)
    assert torch.equal(relu2.fused(x)[-100:], relu2.reference(x[-100:]))


@pytest.mark.parametrize("op", GATED)
def test_halves_of_one_projection_are_read_where_they_are(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's decorators copy what is not contiguous, unseen."""
    both = torch.randn(2, 5, 2 * 384).bfloat16()
    gate, up = both.chunk(2, -1)
    read: list[int] = []
    plain = launch.launch

    def seen(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        read.extend(a.data_ptr() for a in arguments if isinstance(a, Tensor))
        plain(kernel, grid, *arguments, **options)

    monkeypatch.setattr(launch, "launch", seen)
    y = MODULES[op].fused(gate.requires_grad_(), up.requires_grad_())
    y.backward(slopes(y.detach()))
    assert read.count(gate.data_ptr()) == 2
    assert read.count(up.data_ptr()) == 2
    monkeypatch.undo()
    judged(op, [gate.detach(), up.detach()])


@pytest.mark.parametrize(
    ("shape", "across", "tiles", "height", "width"),
    [
        ((8192, 14336), 7, 7 * 4096, 2, 2048),
        ((8192, 11008), 43, 43 * 512, 16, 256),
        ((100, 768), 3, 3 * 7, 16, 256),
        ((10, 65536), 16, 160, 1, 4096),
        ((3, 100), 1, 1, 32, 128),
    ],
)
def test_tiles_of_rows_have_no_idle_columns(shape: tuple[int, int], across: int, tiles: int, height: int, width: int) -> None:
    sheets, *found = elementwise.tiling(4096, torch.empty(shape[0], 2 * shape[1], device="meta")[:, : shape[1]])
    assert found == [across, tiles, height, width]
    assert sheets[0].shape == shape


def test_contiguous_tensors_are_one_row() -> None:
    sheets, *found = elementwise.tiling(1024, torch.empty(3, 7, 100), torch.empty(3, 7, 100))
    assert [sheet.shape for sheet in sheets] == [(1, 2100)] * 2
    assert found == [3, 3, 1, 1024]


@every
def test_frozen_inputs_and_no_gradient(op: str) -> None:
    """Liger's losses were 0, or failed, where an input needed no gradient (its 507, PR 931)."""
    inputs = leaves(op, 4, 24)
    whole = torch.autograd.grad(MODULES[op].fused(*inputs).sum(), inputs)
    for i, kept in enumerate(inputs):
        part = [x if x is kept else x.detach() for x in inputs]
        assert torch.equal(torch.autograd.grad(MODULES[op].fused(*part).sum(), kept)[0], whole[i])
    with torch.no_grad():
        assert torch.equal(MODULES[op].fused(*inputs), MODULES[op].fused(*(x.detach() for x in inputs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reach", [1.0, 0.0625, 1e-3, 3e-6])
def test_xielu_near_zero(dtype: torch.dtype, reach: float) -> None:
    """exp(x) - 1 loses all digits of a small x; from eps = -1e-6 up to 0 the curve is a line."""
    x = -torch.linspace(0, reach, 500)
    judged("xielu", [x.to(dtype), *leaves("xielu", 1, dtype=dtype)[1:]])
    each = torch.autograd.grad
    ours, exact = x.requires_grad_(), x.detach().double().requires_grad_()
    scalars = [torch.tensor([value]) for value in (0.3, -0.7)]
    got = each(xielu.fused(ours, *scalars).sum(), ours)[0]
    expected = each(xielu.reference(exact, *(s.double() for s in scalars)).sum(), exact)[0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-7)  # it passes through 0 at -0.8


@pytest.mark.parametrize("raw", [-40.0, -15.0, -3.0, 0.0, 3.0, 40.0])
def test_xielu_with_any_scalars(raw: float) -> None:
    x = leaves("xielu", 3, 50, dtype=torch.float32)[0]
    judged("xielu", [x, torch.tensor([raw]), torch.tensor(raw).view(1)])


def test_xielu_sums_its_scalars_gradients_in_the_same_order_every_time() -> None:
    inputs = leaves("xielu", 40, 1000, dtype=torch.float32)
    inputs[2] = inputs[2].detach().reshape(()).requires_grad_()
    first, second = (torch.autograd.grad(xielu.fused(*inputs).sum(), inputs[1:]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [x.shape for x in first] == [(1,), ()]


@every
def test_refusals_say_why(op: str) -> None:
    fused = MODULES[op].fused
    inputs = leaves(op, 4, 24)
    with pytest.raises(KernelError, match=rf'{op}: .* one of bf16, fp16, fp32, not torch.float64.*; set kernels.{op} = "reference"'):
        fused(*(x.detach().double() for x in inputs))
    if op in GATED:
        with pytest.raises(KernelError, match=r"gate and up must share a shape.*\(4, 24\) on cpu and torch.bfloat16 \(3, 24\)"):
            fused(inputs[0], inputs[1][:3])
        with pytest.raises(KernelError, match="torch.bfloat16.* and torch.float32"):
            fused(inputs[0], inputs[1].float())
    if op == "xielu":
        with pytest.raises(KernelError, match=r"p and n must be one number of torch.bfloat16 on cpu, not torch.float32 \(1,\)"):
            fused(inputs[0], inputs[1].float(), inputs[2])
        with pytest.raises(KernelError, match=r"not torch.bfloat16 \(2,\)"):
            fused(inputs[0], inputs[1].expand(2), inputs[2])


@every
def test_on_a_cpu_the_public_function_is_plain_torch(op: str) -> None:
    inputs = leaves(op, 4, 24)
    assert torch.equal(getattr(MODULES[op], op)(*inputs), MODULES[op].reference(*inputs))


@pytest.mark.parametrize("op", GATED)
@pytest.mark.parametrize("shape", [(5, 130), (2, 3, 24), (1, 8), (0, 8)])
def test_gradients_of_the_halves_of_a_product_are_halves_too(op: str, shape: tuple[int, ...]) -> None:
    """So that the product's backward takes them as they lie, and their values are those of separate ones."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
    gate, up = (x.detach().requires_grad_() for x in whole.chunk(2, -1))
    dy = slopes(torch.empty(shape))
    y = MODULES[op].fused(gate, up)
    grads = torch.autograd.grad(y, [gate, up], dy)
    leaves = [x.detach().clone().requires_grad_() for x in (gate, up)]
    expected = torch.autograd.grad(MODULES[op].fused(*leaves), leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    if whole.numel():
        assert beside(grads).data_ptr() == grads[0].data_ptr()
    backward = getattr(torch.ops.gigatrain, f"{op}_backward_halves").default
    torch.library.opcheck(backward, (dy, gate.detach(), up.detach()))
