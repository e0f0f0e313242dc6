"""The fused Newton-Schulz iteration against fp64 and the bf16 reference, its symmetric products, and Muon's two passes over memory."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gigatrain.errors import KernelError
from gigatrain.kernels import launch, newton_schulz
from gigatrain.kernels.launch import tl, triton

PRODUCT, MOMENTUM, UPDATE = (f"newton_schulz.{name}" for name in ("product", "momentum", "update"))
BAND = 1.21  # the largest value of the quintic on [0, 1.21]


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Tiles for small matrices: the interpreter multiplies whole tiles, in half precision slowly."""
    with launch.forced(PRODUCT, {"rows": 32, "columns": 32, "inner": 32, "group": 8, "warps": 4, "stages": 2}):
        yield


def exact(update: Tensor, steps: int = 5) -> Tensor:
    """The same polynomial in fp64."""
    a, b, c = newton_schulz.COEFFICIENTS
    x = update.double()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-300)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def error(found: Tensor, expected: Tensor) -> Tensor:
    """Relative error of each matrix."""
    return (found.double() - expected).norm(dim=(-2, -1)) / expected.norm(dim=(-2, -1)).clamp_min(1e-300)


def assert_as_good_as_the_reference(update: Tensor, steps: int = 5) -> None:
    """Of each matrix: error at most twice the reference's or one rounding to bf16; singular values off by at most twice the reference's or 1 in 64."""
    expected, plain, found = exact(update, steps), newton_schulz.reference(update, steps), newton_schulz.fused(update, steps)
    assert found.shape == update.shape
    allowed = (2 * error(plain, expected)).clamp_min(2**-8)
    assert (error(found, expected) <= allowed).all(), (error(found, expected), error(plain, expected))
    ours, theirs, right = (torch.linalg.svdvals(o.double()) for o in (found, plain, expected))
    assert (ours.amax(-1) <= BAND * (1 + 2**-7)).all()
    assert ((ours - right).abs().amax(-1) <= (2 * (theirs - right).abs().amax(-1)).clamp_min(2**-6)).all()


# Symmetric products


@triton.jit
def _enumerated(ROW, COLUMN, start, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row, column = newton_schulz._triangle(start + at)
    tl.store(ROW + at, row)
    tl.store(COLUMN + at, column)


def test_tiles_of_the_triangle_are_counted_exactly_far_beyond_any_matrix() -> None:
    """A square root in fp32 is off by one near row ends; 2,048 rows of tiles are 262,144 rows."""
    rows, columns = torch.tril_indices(2048, 2048)
    block = 1 << 16
    for start in (0, rows.numel() - block):
        found = torch.empty(2, block, dtype=torch.int32)
        launch.launch(_enumerated, (1,), found[0], found[1], start, BLOCK=block)
        assert torch.equal(found[0].long(), rows[start : start + block])
        assert torch.equal(found[1].long(), columns[start : start + block])


def products(rows: int, inner: int, dtype: torch.dtype, count: int = 2) -> Iterator[tuple[Tensor, Tensor, float, float, float, float]]:
    """A Gram matrix; with rows of inner, also b R + c R^2 and the product of two matrices that commute."""
    torch.manual_seed(rows)
    x = torch.randn(count, rows, inner, dtype=dtype)
    yield x, x, 0.5, 0.0, 0.0, 0.0
    if rows == inner:
        r = (x @ x.mT / rows).to(dtype)
        r = (r + r.mT) / 2
        z = (0.3 * r.double() - 0.1 * r.double() @ r.double()).to(dtype)
        yield r, r, 2.0315, -4.775, 0.0, 3.4445
        yield r, z, 1.0, 3.4445, 11.9, 0.0


def assert_product(a: Tensor, b: Tensor, alpha: float, beta: float, gamma: float, identity: float) -> None:
    found = newton_schulz.symmetric(a, b, alpha, beta, gamma, identity)
    assert torch.equal(found, found.mT), "not exactly symmetric"
    expected = alpha * a.double() @ b.double().mT
    plain = alpha * (a @ b.mT)
    if beta or gamma:
        expected = expected + beta * a.double() + gamma * b.double()
        plain = plain + beta * a + gamma * b
    if identity:
        expected, plain = (o + identity * torch.eye(o.shape[-1], dtype=o.dtype) for o in (expected, plain))
    assert (error(found, expected) <= (2 * error(plain, expected)).clamp_min(torch.finfo(a.dtype).eps / 2)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner"), [(1, 1), (1, 40), (31, 33), (64, 64), (65, 65), (130, 7)])
def test_symmetric_products_are_exactly_symmetric(rows: int, inner: int, dtype: torch.dtype) -> None:
    for product in products(rows, inner, dtype):
        assert_product(*product)


@pytest.mark.parametrize("chosen", newton_schulz.SPACE[PRODUCT], ids=lambda c: "-".join(str(n) for n in c.values()))
def test_every_product_configuration_is_right(chosen: dict[str, int]) -> None:
    """Triton 6691: more stages gave wrong results; 10821: two tl.dot into one sum. Here one tl.dot is summed, and every configuration is run."""
    with launch.forced(PRODUCT, chosen):
        for product in products(70, 70, torch.float16, count=1):
            assert_product(*product)


@pytest.mark.parametrize("chosen", [(16, 16, 32, 2), (16, 16, 64, 3), (32, 16, 64, 2)])
def test_bands_of_tiles_cover_the_triangle(chosen: tuple[int, ...]) -> None:
    names = ("rows", "columns", "inner", "group")
    with launch.forced(PRODUCT, dict(zip(names, chosen, strict=True)) | {"warps": 4, "stages": 1}):
        for product in products(67, 67, torch.bfloat16, count=1):
            assert_product(*product)


def test_shipped_configurations_are_among_those_a_tuner_tries() -> None:
    for name in ("default", "sm_90", "sm_100"):
        for kernel, sizes in launch.table(name)["configs"].items():
            if kernel.startswith("newton_schulz."):
                assert all(configuration in newton_schulz.SPACE[kernel] for configuration in sizes.values())


def test_symmetric_products_take_any_strides() -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 40, 24, dtype=torch.float16)
    for view in (x.mT, x[:, ::2, 1::3], x[:, :1].expand(3, 5, 24), x[:1].expand(4, 40, 24)):
        assert torch.equal(newton_schulz.symmetric(view, view), newton_schulz.symmetric(view.contiguous(), view.contiguous()))


def test_offsets_beyond_32_bits() -> None:
    """Liger 803, 1248 and 1296: program_id times a stride overflowed. The last column is a second step, 2^32 + 256 elements behind the first."""
    torch.manual_seed(2)
    small = torch.randn(2, 3, 33, dtype=torch.float16)
    for strides in ((33, 2**30 + 8, 1), (2**31 + 8, 33, 1), (1, 2, 2**27 + 8)):
        wide = torch.empty(2**32 + 512, dtype=torch.float16).as_strided((2, 3, 33), strides)  # only touched pages exist
        wide.copy_(small)
        assert torch.equal(newton_schulz.symmetric(wide, wide), newton_schulz.symmetric(small, small))
        del wide


def test_symmetric_products_refuse_what_they_cannot_compute() -> None:
    x = torch.ones(1, 4, 6, dtype=torch.float16)
    with pytest.raises(
        KernelError, match=r"both factors must be bf16 or both fp16, not torch.float32 and torch.float32; torch.bmm takes it"
    ):
        newton_schulz.symmetric(x.float(), x.float())
    with pytest.raises(KernelError, match=r"factors \(1, 4, 6\) and \(1, 4, 6\) do not fit"):
        newton_schulz.symmetric(x, x, beta=1.0)
    with pytest.raises(KernelError, match=r"do not fit"):
        newton_schulz.symmetric(x, x[:, :3])


# The iteration


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 32, 32), (1, 17, 65), (1, 50, 30), (1, 1, 9), (2, 9, 1), (1, 31, 33), (2, 1, 1)])
def test_errs_at_most_twice_as_much_as_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    assert_as_good_as_the_reference(torch.randn(shape).to(dtype))


def test_takes_fp16() -> None:
    torch.manual_seed(17)
    assert_as_good_as_the_reference(torch.randn(1, 20, 33).half())


@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_takes_any_number_of_steps(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz, "GRAM_ROWS", 1)
    torch.manual_seed(4)
    assert_as_good_as_the_reference(torch.randn(1, 24, 70).bfloat16(), steps)


def spectra(rows: int, columns: int) -> Iterator[tuple[str, Tensor]]:
    """Matrices with flat, steep, stepped and deficient spectra."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, v = torch.linalg.qr(randn(rows, rows))[0], torch.linalg.qr(randn(columns, rows))[0]
    spike = torch.full((rows,), 1e-3, dtype=torch.float64)
    spike[0] = 1.0
    yield "flat", randn(rows, columns)
    yield "1e-8", randn(rows, columns) * 1e-8
    yield "steep", (u * torch.logspace(0, -6, rows, dtype=torch.float64)) @ v.mT
    yield "spike", (u * spike) @ v.mT
    yield "power law", (u / torch.arange(1, rows + 1)) @ v.mT
    yield "rank r/4", randn(rows, rows // 4) @ randn(rows // 4, columns)
    yield "rank 1", randn(rows, 1) @ randn(1, columns)
    yield "equal columns", randn(rows, 1).expand(rows, columns)
    yield "repeated rows", randn(rows // 2, columns).repeat(2, 1)
    yield "low rank and noise", randn(rows, 8) @ randn(8, columns) + 0.1 * randn(rows, columns)
    yield "zero rows", randn(rows, columns) * (torch.arange(rows) % 3 > 0)[:, None]


def emulated(a: Tensor, b: Tensor, alpha: float, beta: float = 0.0, gamma: float = 0.0, identity: float = 0.0) -> Tensor:
    """What the kernel computes, fifty times as fast as interpreted: sums in fp32, one rounding, the lower triangle mirrored."""
    total = alpha * (a.float() @ b.float().mT) + identity * torch.eye(a.shape[1])
    if beta or gamma:
        total += beta * a.float() + gamma * b.float()
    found = total.to(a.dtype)
    return found.tril() + found.tril(-1).mT


@pytest.mark.parametrize("shape", [(256, 320), (400, 270), (64, 96), (128, 128)])
def test_never_gives_nan_and_keeps_the_band_for_ill_conditioned_updates(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """dion 76 and 78: NaN from the Gram form. A Gram matrix rounded in 16 bits has negative eigenvalues, which grow fourfold and faster in every step."""
    assert newton_schulz.plan(*shape) == ((3, 2) if min(shape) >= 256 else (1,) * 5)
    monkeypatch.setattr(newton_schulz, "_run_product", emulated)
    matrices = torch.stack([matrix for _, matrix in spectra(min(shape), max(shape))]).bfloat16()
    assert_as_good_as_the_reference(matrices if shape[0] == min(shape) else matrices.mT)


@pytest.mark.parametrize("second", [0.0, 0.1])
def test_errs_no_more_than_the_reference_where_all_roundings_are_alike(second: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of constant matrices (and with a second singular value), which hold one number or two: pooled over sizes, as one says more about luck."""
    monkeypatch.setattr(newton_schulz, "_run_product", emulated)
    torch.manual_seed(16)
    ours, theirs = [], []
    for rows, columns in ((256, 320), (256, 1024), (272, 300), (288, 330), (300, 400), (320, 512), (400, 520)):
        update = (1 + second * torch.randn(1, rows, 1).sign() * torch.randn(1, 1, columns).sign()).bfloat16()
        expected = exact(update)
        ours.append(error(newton_schulz.fused(update), expected))
        theirs.append(error(newton_schulz.reference(update), expected))
    assert torch.cat(ours).norm() <= 2 * torch.cat(theirs).norm()


def test_the_emulation_is_the_kernel() -> None:
    for product in products(65, 65, torch.float16):
        found, expected = newton_schulz.symmetric(*product), emulated(*product)
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("form", ["symmetric", "gram"])
def test_zero_gives_zero(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz, "GRAM_ROWS", 1 if form == "gram" else 1000)
    updates = torch.stack([torch.zeros(16, 40), torch.randn(16, 40)])
    for function in (newton_schulz.fused, newton_schulz.reference):
        found = function(updates)
        assert found[0].eq(0).all()
        assert found[1].isfinite().all()


def test_an_update_of_tiny_norm_is_orthogonalised_too() -> None:
    """Emerging-Optimizers 229: an epsilon of 1e-7 in the norm left matrices below it unorthogonalised, without a word."""
    torch.manual_seed(6)
    update = torch.randn(1, 24, 40) * 2.0**-10
    for function in (newton_schulz.fused, newton_schulz.reference):
        assert torch.equal(function(update * 2.0**-40), function(update))
        assert torch.equal(function(update * 2.0**40), function(update))


@pytest.mark.parametrize(("form", "poison"), [("symmetric", float("nan")), ("gram", float("inf"))])
def test_what_is_not_finite_stays_in_its_matrix(form: str, poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz, "GRAM_ROWS", 1 if form == "gram" else 1000)
    torch.manual_seed(7)
    updates = torch.randn(2, 8, 12).bfloat16()
    clean = newton_schulz.fused(updates)
    updates[0, 3, 5] = poison
    found = newton_schulz.fused(updates)
    assert found[0].isnan().any()
    assert torch.equal(found[1], clean[1])


def test_takes_strided_updates_and_overwrites_none() -> None:
    torch.manual_seed(8)
    x = torch.randn(2, 20, 12)
    for view in (x.mT, x[:, ::2, 1::3], x[:1].expand(2, 20, 12)):
        before = view.clone()
        assert torch.equal(newton_schulz.fused(view), newton_schulz.fused(view.contiguous()))
        assert torch.equal(view, before)


def test_two_runs_are_equal() -> None:
    torch.manual_seed(9)
    update = torch.randn(1, 66, 20).bfloat16()
    assert torch.equal(newton_schulz.fused(update), newton_schulz.fused(update))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    assert newton_schulz.fused(torch.ones(shape)).shape == shape


def test_refuses_what_is_no_batch_of_matrices() -> None:
    with pytest.raises(KernelError, match=r"bf16, fp16 or fp32 is needed, not torch.float64 \(1, 2, 3\); newton_schulz.reference takes it"):
        newton_schulz.fused(torch.ones(1, 2, 3, dtype=torch.float64))
    with pytest.raises(KernelError, match=r"a batch of matrices \[n, r, c\]"):
        newton_schulz.fused(torch.ones(2, 3))
    with pytest.raises(KernelError, match=r"0 steps are none"):
        newton_schulz.fused(torch.ones(1, 2, 3), 0)


def test_takes_the_form_with_the_fewest_flops() -> None:
    """Llama-3-8B: queries and outputs, keys and values, the three matrices of the MLP, of 32 layers."""
    shapes = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    totals: dict[str, float] = {"chosen": 0.0}
    for shape in shapes:
        forms = newton_schulz.forms(*shape)
        for name, (flops, _) in forms.items():
            totals[name] = totals.get(name, 0.0) + 32 * flops
        totals["chosen"] += 32 * newton_schulz.flops(*shape, newton_schulz.plan(*shape))
    assert {name: round(flops / 1e12) for name, flops in totals.items()} == {"plain": 666, "symmetric": 472, "gram": 321, "chosen": 321}
    assert newton_schulz.plan(4096, 4096) == (1,) * 5  # a draw, and the symmetric form is the finer
    assert newton_schulz.plan(4096, 14336) == newton_schulz.plan(14336, 4096) == (3, 2)
    assert newton_schulz.plan(128, 4096) == (1,) * 5
    for steps in range(1, 12):
        assert sum(newton_schulz.plan(512, 2048, steps)) == steps


# The passes around it


def buffers(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Momentum and gradients with three matrices in them, unaligned, and what lies between."""
    torch.manual_seed(seed)
    return torch.randn(500).to(dtype), torch.randn(500), torch.tensor([3, 331, 150]), (9, 15)


def scalars(first: float, skip: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(first), torch.tensor(skip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", newton_schulz.SPACE[MOMENTUM], ids=str)
def test_momentum_in_one_pass(chosen: dict[str, int], dtype: torch.dtype) -> None:
    momentum, grads, starts, shape = buffers(10, dtype)
    other = momentum.clone()
    expected = newton_schulz.momentum_reference(other, grads, starts, shape, *scalars(0.3, 0.0), 0.95)
    with launch.forced(MOMENTUM, chosen):
        found = newton_schulz.momentum_fused(momentum, grads, starts, shape, *scalars(0.3, 0.0), 0.95)
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)
    torch.testing.assert_close(momentum, other, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    touched = torch.zeros(500, dtype=torch.bool)
    for start in starts.tolist():
        touched[start : start + 135] = True
    assert torch.equal(momentum[~touched], buffers(10, dtype)[0][~touched]), "what lies between was written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chosen", newton_schulz.SPACE[UPDATE], ids=str)
def test_weights_move_in_one_pass(chosen: dict[str, int], dtype: torch.dtype) -> None:
    weights, _, starts, shape = buffers(11)
    other, updates = weights.clone(), torch.randn(3, *shape).to(dtype)
    newton_schulz.update_reference(other, starts, updates, *scalars(0.02, 0.0), 0.1, 1.5)
    with launch.forced(UPDATE, chosen):
        newton_schulz.update_fused(weights, starts, updates, *scalars(0.02, 0.0), 0.1, 1.5)
    torch.testing.assert_close(weights, other, rtol=1e-6, atol=1e-7)
    assert (weights != buffers(11)[0]).sum() == 3 * 135


@pytest.mark.parametrize("kind", ["fused", "reference"])
def test_a_skipped_pass_changes_no_bit_though_all_is_nan(kind: str) -> None:
    momentum, grads, starts, shape = buffers(12)
    before = momentum.clone()
    nan, skip = scalars(float("nan"), 1.0)
    moved, updated = getattr(newton_schulz, f"momentum_{kind}"), getattr(newton_schulz, f"update_{kind}")
    updates = moved(momentum, grads.fill_(float("inf")), starts, shape, nan, skip, 0.9)
    assert torch.equal(momentum, before)
    updated(momentum, starts, updates, nan, skip, 0.1, 1.0)
    assert torch.equal(momentum, before)


def test_aligned_matrices_are_moved_alike() -> None:
    torch.manual_seed(13)
    momentum, grads, starts, shape = torch.randn(1024), torch.randn(1024), torch.tensor([512, 0]), (16, 32)
    twin = momentum.clone()
    found = [
        newton_schulz.momentum_fused(m, grads, starts, shape, *scalars(1.0, 0.0), 0.9, aligned)
        for m, aligned in ((momentum, True), (twin, False))
    ]
    assert torch.equal(*found)
    assert torch.equal(momentum, twin)


def test_flat_buffers_beyond_32_bits() -> None:
    """TE 2918: sizes of the multi-tensor kernels were int32."""
    start = 2**31 + 24
    momentum, grads = (torch.empty(2**31 + 256, dtype=torch.bfloat16) for _ in range(2))  # only touched pages exist
    for flat in (momentum, grads):
        flat[start : start + 64].normal_()
    small, gradient = (flat[start : start + 64].clone() for flat in (momentum, grads))
    found = newton_schulz.momentum_fused(momentum, grads, torch.tensor([start]), (8, 8), *scalars(1.0, 0.0), 0.9)
    assert torch.equal(found, newton_schulz.momentum_fused(small, gradient, torch.tensor([0]), (8, 8), *scalars(1.0, 0.0), 0.9))
    assert torch.equal(momentum[start : start + 64], small)
    newton_schulz.update_fused(momentum, torch.tensor([start]), found, *scalars(0.1, 0.0), 0.1, 1.0)
    newton_schulz.update_fused(small, torch.tensor([0]), found, *scalars(0.1, 0.0), 0.1, 1.0)
    assert torch.equal(momentum[start : start + 64], small)


def test_passes_refuse_what_they_cannot_address() -> None:
    momentum, grads, starts, shape = buffers(14)
    with pytest.raises(KernelError, match=r"a contiguous buffer and starts in int64 are needed; momentum_reference and update_reference"):
        newton_schulz.momentum_fused(momentum, grads, starts.int(), shape, *scalars(1.0, 0.0), 0.9)


def operators() -> Iterator[tuple[str, tuple[Any, ...]]]:
    momentum, grads, starts, shape = buffers(15)
    x = torch.randn(2, 9, 9, dtype=torch.float16)
    yield "symmetric_product", (x, x, 0.5, 0.25, 1.0, 2.0)
    yield "newton_schulz", (torch.randn(2, 9, 5).bfloat16(), 2)
    yield "muon_momentum", (momentum, grads, starts, list(shape), *scalars(1.0, 0.0), 0.9, False)
    yield "muon_update", (momentum, starts, torch.randn(3, *shape), *scalars(0.1, 0.0), 0.1, 1.0, False)


@pytest.mark.parametrize(("name", "inputs"), list(operators()), ids=lambda value: value if isinstance(value, str) else "")
def test_operators_are_what_torch_expects(name: str, inputs: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.gigatrain, name).default, inputs)
