"""Products in low precision: each of the three is the product of what its operands stand for, and what reaches them is shared, delayed or carried rightly."""

import gc
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gigatrain.errors import KernelError
from gigatrain.kernels import fp8_experts, fp8_fused, fp8_linear, moe, ops, rms_norm, swiglu
from gigatrain.kernels.fp8_linear import Delayed, Operand, Product, Watch, form_of, multiplied, operands, widened

SCALINGS = list(fp8_linear.VERSIONS)


def drawn(dtype: torch.dtype = torch.bfloat16, tokens: tuple[int, ...] = (3, 11), bias: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(*tokens, 128), (256, 128), *([(256,)] if bias else [])]
    return [(torch.randn(shape) * (0.1 if i == 1 else 1.0)).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]


def stood(x: Tensor, form: fp8_linear.Form, role: fp8_linear.Role, across: bool) -> Tensor:
    """The fp32 numbers that an operand stands for, transposed if across."""
    along, turned, _ = operands(x, form, role, along=not across, across=across)
    made = turned if across else along
    return widened(made, form, "" if form.scaling in ("mxfp8", "nvfp4") else fp8_linear.kind_of(form.scaling, role))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_three_products_are_those_of_the_quantised_operands(scaling: fp8_linear.Scaling, dtype: torch.dtype) -> None:
    form = form_of(scaling, stochastic=False)
    x, w, b = drawn(dtype, bias=True)
    y = Product(form)(x, w, b)
    dy = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)
    flat, flat_dy = x.detach().flatten(0, 1), dy.flatten(0, 1)
    n = flat.shape[0]
    forward = (stood(flat, form, "input", False) @ stood(w.detach(), form, "weight", False).t())[:n].to(dtype)
    assert torch.equal(y, forward.view_as(y) + b)
    assert torch.equal(dx, (stood(flat_dy, form, "gradient", False) @ stood(w.detach(), form, "weight", True).t())[:n].to(dtype).view_as(x))
    assert torch.equal(dw, (stood(flat_dy, form, "gradient", True) @ stood(flat, form, "input", True).t()).to(dtype))
    torch.testing.assert_close(db, flat_dy.sum(0))


# A rounded operand errs by 2^-4 / sqrt(3) of its size at most, e5m2 by twice that; both operands' errors add in quadrature. NVFP4: a sixth at most.
@pytest.mark.parametrize(("scaling", "bound"), [(s, {"nvfp4": 0.25, "tensorwise": 0.09}.get(s, 0.06)) for s in SCALINGS])
def test_errors_are_those_of_the_format(scaling: fp8_linear.Scaling, bound: float) -> None:
    x, w = drawn(torch.float32)
    y = Product(form_of(scaling))(x, w)
    dy = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, (x, w), dy)]
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    exact = F.linear(*wide)
    for mine, theirs in zip(found, (exact, *torch.autograd.grad(exact, wide, dy.double())), strict=True):
        assert (mine - theirs).norm() < bound * theirs.norm()


def test_a_weight_gradient_may_stay_high() -> None:
    x, w = drawn()
    y = Product(form_of("rowwise", weight_gradient="high"))(x, w)
    dy = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, w, dy)[0], dy.flatten(0, 1).t() @ x.detach().flatten(0, 1))


@pytest.mark.parametrize("scaling", ["rowwise", "blockwise", "tensorwise", "mxfp8"])
def test_keeping_the_input_or_its_codes_gives_the_same_gradients(scaling: fp8_linear.Scaling) -> None:
    found = []
    for keep in ("codes", "input"):
        x, w = drawn()
        y = Product(form_of(scaling, keep=keep))(x, w)
        found.append(torch.autograd.grad(y, (x, w), torch.ones_like(y)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_codes_that_are_kept_are_half_of_bf16() -> None:
    x, w = drawn(tokens=(128,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        Product(form_of("blockwise"))(x, w)
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.numel() and t.data_ptr() != w.data_ptr()}
    assert sum(kept.values()) <= x.numel() * (1 + 4 / 128)


def test_layers_that_read_the_same_tensor_share_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plain = fp8_linear.operands

    def counted(x: Tensor, form: fp8_linear.Form, role: str, **options: object) -> object:
        made.append(role)
        return plain(x, form, role, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(fp8_linear, "operands", counted)
    product, (x, w) = Product(form_of("rowwise")), drawn()
    with torch.no_grad():
        product(x, w)
    product(x, w)  # which needs the transposed codes too
    product(x, w)
    assert made.count("input") == 2
    with torch.no_grad():
        x.mul_(2)
    assert torch.equal(product(x, w), Product(form_of("rowwise"))(x, w))
    del x
    gc.collect()
    assert product._latest is None


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_loss_and_the_gradients(scaling: fp8_linear.Scaling, poison: float) -> None:
    """So that the engine refuses the step."""
    for where in range(3):
        x, w = drawn(torch.float32, (2, 16))
        with torch.no_grad():
            (x, w)[min(where, 1)].view(-1)[5] = poison if where < 2 else 0.0
        y = Product(form_of(scaling))(x, w)
        dy = torch.ones_like(y)
        dy.view(-1)[7] = poison if where == 2 else 1.0
        grads = torch.autograd.grad(y, (x, w), dy)
        assert where == 2 or not torch.isfinite(y).all()
        assert not torch.isfinite(torch.cat([g.flatten() for g in grads])).all()


def test_no_tokens_are_no_work() -> None:
    x, w = drawn(tokens=(0,))
    y = Product(form_of("blockwise"))(x, w)
    y.sum().backward()
    assert y.shape == (0, 256)
    assert not w.grad.any()  # type: ignore[union-attr]


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        KernelError, match=r"fp8_blockwise: a weight of \(192, 128\): 192 is not a multiple of 128; name the matrix in fp8.high"
    ):
        Product(form_of("blockwise"))(torch.ones(4, 128), torch.ones(192, 128))
    with pytest.raises(KernelError, match=r"takes bf16 or fp32, alike, not torch.float32 and torch.bfloat16"):
        Product(form_of("rowwise"))(torch.ones(4, 128), torch.ones(128, 128, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("scaling", "capability", "why"),
    [
        ("rowwise", (8, 0), "FP8 needs compute capability 8.9, a GPU has 8.0"),
        ("blockwise", (10, 0), "on compute capability 9.0 only, a GPU has 10.0"),
        ("mxfp8", (9, 0), r"mxfp8 needs tensor cores with block scales \(compute capability 10.0\), a GPU has 9.0"),
        ("nvfp4", (9, 0), "nvfp4 needs tensor cores with block scales"),
        ("rowwise", (9, 0), None),
        ("tensorwise", (8, 9), None),
        ("blockwise", (9, 0), None),
        ("nvfp4", (10, 0), None),
    ],
)
def test_hardware_is_refused_by_what_it_lacks(scaling: fp8_linear.Scaling, capability, why, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    if scaling == "blockwise":
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        assert "from CUDA 12.9 on" in (fp8_linear.refused(scaling, torch.device("cuda")) or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = fp8_linear.refused(scaling, torch.device("cuda"))
    assert (found is None) == (why is None)
    if why is not None:
        with pytest.raises(ValueError, match=why):
            raise ValueError(found)
    assert fp8_linear.refused(scaling, torch.device("cpu")) is None


# ---- Delayed scaling ----


def test_delayed_scales_are_those_of_past_steps_and_the_first_step_has_its_own() -> None:
    form = form_of("tensorwise", power=True)
    delayed, (x, w) = Delayed(form, 1, 2), drawn()
    product, watch = Product(form), Watch(delayed, 0)
    first = product(x, w, watch=watch)
    assert torch.equal(first, Product(form)(x, w))
    first.sum().backward()
    delayed.advance()
    assert delayed.past[0, 0].tolist() == [x.detach().abs().max().item(), w.detach().abs().max().item(), 1.0]
    with torch.no_grad():
        large = x * 100
        saturated = product(large, w, watch=watch)  # validation: another tensor, and nothing is remembered
    assert saturated.abs().max() < 0.1 * 100 * first.abs().max()
    delayed.advance()
    assert delayed.now.sum() == 0
    assert delayed.past[0].sum() == 0
    assert delayed.scales[0, 0] == 2.0 ** math.ceil(math.log2(x.detach().abs().max().item() / 448))  # still of the step before the last
    delayed.advance()
    assert torch.equal(delayed.scales, torch.ones(1, 3))


def test_a_magnitude_that_is_not_finite_is_not_remembered() -> None:
    form = form_of("tensorwise")
    delayed, (x, w) = Delayed(form, 1, 3), drawn()
    for poison in (None, math.nan, math.inf):
        y = x.detach().clone()
        if poison is not None:
            y[0, 0, 0] = poison
        Product(form)(y, w, watch=Watch(delayed, 0)).sum().backward()
        delayed.advance()
        assert torch.isfinite(delayed.past).all()
        assert torch.isfinite(delayed.scales).all()


def test_a_restored_history_gives_the_same_scales() -> None:
    form = form_of("tensorwise")
    delayed, (x, w) = Delayed(form, 1, 2), drawn()
    Product(form)(x, w, watch=Watch(delayed, 0)).sum().backward()
    delayed.advance()
    other = Delayed(form, 1, 2)
    other.past.copy_(delayed.past)
    other.restored()
    assert not other.fresh
    assert torch.equal(other.scales, delayed.scales)


# ---- Producers ----


@pytest.mark.parametrize("scaling", ["rowwise", "blockwise"])
def test_norms_and_swiglu_that_quantise_train_as_they_do_apart(scaling: fp8_linear.Scaling) -> None:
    form = form_of(scaling, quantise="fused")
    producers, product = fp8_fused.Producers(form), Product(form)
    found = []
    for norm, activation in ((producers.add_rms_norm, producers.swiglu), (rms_norm.add_fused, swiglu.fused)):
        torch.manual_seed(3)
        shapes = ((2, 9, 128), (2, 9, 128), (128,), (128, 128), (128, 128), (128, 128))
        leaves = [(torch.randn(shape) * 0.3).bfloat16().requires_grad_() for shape in shapes]
        x, residual, w, gate, up, down = leaves
        h, y = norm(x, residual, w, 1e-5, "llama", 0.5)
        out = h + product(activation(product(y, gate), product(y, up)), down)
        out.square().sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_one_else_reads_what_was_never_written() -> None:
    y = fp8_fused.Producers(form_of("rowwise")).rms_norm(torch.ones(4, 16), torch.ones(16))
    with pytest.raises(
        KernelError, match=r'aten.add.Tensor would read a tensor that was written as FP8 codes alone; set kernels.quantise = "reference"'
    ):
        torch.add(y, 1)


@pytest.mark.parametrize("scaling", ["rowwise", "blockwise", "tensorwise"])
@pytest.mark.parametrize("tokens", [128, 384])
def test_the_three_products_have_the_scales_that_torch_wants(scaling: fp8_linear.Scaling, tokens: int) -> None:
    """On meta, where torch checks shapes and strides as for a GPU: scales of 1 x 128 are not transposed, of rows and squares they are."""
    form, (outputs, inputs) = form_of(scaling), (1024, 2048)
    shapes = {"input": (tokens, inputs), "weight": (outputs, inputs), "gradient": (tokens, outputs)}

    def both(role: str) -> tuple[Operand, Operand]:
        """As kernels make it, on meta: each tensor with its strides."""
        made = operands(torch.zeros(shapes[role], dtype=torch.bfloat16), form, role)[:2]  # type: ignore[arg-type]
        return tuple(Operand(*(getattr(one, key).to("meta") for key in ("codes", "scales", "all"))) for one in made)  # type: ignore[return-value]

    (x, x_across), (w, w_across), (dy, dy_across) = both("input"), both("weight"), both("gradient")
    for a, b, roles, shape in (
        (x, w, ("input", "weight"), (tokens, outputs)),
        (dy, w_across, ("gradient", "weight"), (tokens, inputs)),
        (dy_across, x_across, ("gradient", "input"), (outputs, inputs)),
    ):
        assert multiplied(a, b, form, roles, torch.bfloat16).shape == shape  # type: ignore[arg-type]


def test_a_product_works_in_inference_mode() -> None:
    x, weight = torch.randn(4, 32), torch.randn(16, 32)
    product = Product(form_of("rowwise"))
    with torch.inference_mode():
        found = product(x.clone(), weight)
    torch.testing.assert_close(found, product(x, weight))


# ---- Experts ----


@pytest.mark.parametrize("counts", [(7, 0, 20, 1), (28, 0, 0, 0), (0, 0, 0, 0)])
def test_experts_are_each_their_own_quantised_product(counts: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    rows = sum(counts)
    x = torch.randn(rows, 32, requires_grad=True)
    gate_up, down = (torch.randn(4, *shape, requires_grad=True) for shape in ((96, 32), (32, 48)))
    y = fp8_experts.experts(x, torch.tensor(counts), gate_up, down)
    one = Product(form_of("rowwise", weight_gradient="high"))
    parts = []
    for e, part in enumerate(x.split(counts)):
        gate, up = one(part, gate_up[e]).chunk(2, -1)
        parts.append(one(F.silu(gate) * up, down[e]))
    expected = torch.cat(parts)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    for mine, theirs in zip(
        torch.autograd.grad(y, (x, gate_up, down), dy),
        torch.autograd.grad(expected, (x, gate_up, down), dy, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=1e-4, atol=1e-4)


def test_low_versions_are_chosen_like_others_and_are_not_among_the_equal_ones() -> None:
    assert tuple(ops.OPERATIONS["linear"].versions) == ("reference",)
    assert ops.choose({"linear": "nvfp4"}).linear is ops.OPERATIONS["linear"].narrow["nvfp4"]
    assert ops.choose({"experts": "fp8_rowwise"}).experts is fp8_experts.experts
    assert moe.NARROW["experts"]["fp8_rowwise"] is fp8_experts.experts
