"""AdamW in every form of its state: what is stored is exact, what is rounded is unbiased, and what went wrong in other libraries' optimizers."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from gigatrain.errors import KernelError
from gigatrain.kernels import adamw, launch

ONE, ZERO = torch.tensor(1.0), torch.tensor(0.0)
FORMS = list(itertools.product(adamw.MASTERS, adamw.MOMENTS))
RATES = adamw.Rates((0.9, 0.95), 1e-8, 0.1, True)


def made(count: int, master: adamw.Master, moments: adamw.Moments, *, copy: bool = False, std: float = 0.02) -> adamw.State:
    """A state some steps into a run."""
    generator = torch.Generator().manual_seed(count)
    p, m, v = (torch.randn(count, generator=generator) for _ in range(3))
    state = adamw.state(count, master, moments, copy=copy and master == "fp32", seed=11, device="cpu")
    adamw.fill(state, p * std, m * 1e-3, v.square() * 1e-5)
    state.updates.fill_(4)
    return state


def tensors(state: adamw.State) -> dict[str, Tensor]:
    return {field.name: t for field in dataclasses.fields(state) if (t := getattr(state, field.name)) is not None}


def cloned(state: adamw.State) -> adamw.State:
    return dataclasses.replace(state, **{name: tensor.clone() for name, tensor in tensors(state).items()})


def same(a: adamw.State, b: adamw.State) -> bool:
    return all(
        torch.equal(x.reshape(-1).view(torch.uint8), tensors(b)[name].reshape(-1).view(torch.uint8)) for name, x in tensors(a).items()
    )


def gradient(count: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 3e-3).to(dtype)


def step(function: Callable[..., None], state: adamw.State, grad: Tensor, rates: adamw.Rates = RATES, lr: float = 1e-3) -> None:
    function(state, grad, torch.tensor(lr), torch.tensor(0.5), ZERO, rates)


# ---- What is stored ----


def patterns() -> Tensor:
    """fp32 numbers whose bits carry, and a hundred thousand random ones; all finite."""
    edges = [0, 1, 0x7F, 0x80, 0x81, 0x7FFF, 0x8000, 0x8001, 0x7FFFFF, 0x800000, 0x3F7FFF7F, 0x3F7FFF80, 0x3F7FFFFF, 0x3F800000, 0x3F808000]
    edges += [0x3F7F7FFF, 0x3F7F8000, 0x7F7EFFFF, 0x7F7F7F00, 0x7F7F7F80, 0x7F7F7FFF]
    bits = torch.cat((torch.tensor(edges), torch.randint(0x7F7F7FFF, (100_000,), generator=torch.Generator().manual_seed(0)))).to(
        torch.int32
    )
    return torch.cat((bits, bits | torch.iinfo(torch.int32).min)).view(torch.float32)


def test_a_weight_and_sixteen_bits_are_exactly_fp32() -> None:
    p = patterns()
    weight, correction = adamw.split(p, torch.int16)
    assert torch.equal(adamw.merge(weight, correction).view(torch.int32), p.view(torch.int32))
    assert torch.isfinite(weight).all()


def test_a_weight_and_eight_bits_are_the_nearest_of_24() -> None:
    p = patterns()
    weight, correction = adamw.split(p, torch.int8)
    found = adamw.merge(weight, correction)
    assert torch.isfinite(found).all()
    assert torch.isfinite(weight).all()
    # Dropping 8 of 32 bits of a float is what rounding to bf16 would do to a float with 8 fewer bits of mantissa: half a unit in the last place.
    last = torch.exp2(torch.floor(torch.log2(p.double().abs().clamp(min=2.0**-126))) - 15)
    inside = p.abs() < torch.tensor(0x7F7F7F80, dtype=torch.int32).view(torch.float32)
    assert ((found.double() - p.double()).abs() <= last / 2)[inside].all()
    again = adamw.split(found, torch.int8)
    assert torch.equal(again[0].view(torch.int16), weight.view(torch.int16))
    assert torch.equal(again[1], correction)  # type: ignore[arg-type]


@pytest.mark.parametrize("correction", [torch.int8, torch.int16])
def test_the_weight_that_computes_is_the_nearest_bf16_of_the_master(correction: torch.dtype) -> None:
    p = patterns()
    weight, kept = adamw.split(p, correction)
    master = adamw.merge(weight, kept).double()
    nearest = master.float().bfloat16().double()  # ties to even; ours away from zero
    assert ((weight.double() - master).abs() <= (nearest - master).abs()).all()


def test_what_bf16_has_no_number_for_becomes_the_largest_and_a_nan_stays_one() -> None:
    p = torch.tensor([3.4e38, -3.4e38, math.inf, -math.inf, math.nan])
    for correction in (None, torch.int8, torch.int16):
        weight, kept = adamw.split(p, correction)
        found = adamw.merge(weight, kept)
        assert torch.isfinite(weight[:4]).all()
        assert (found[:4].abs() > 3.38e38).all()
        assert weight[4].isnan()
        assert found[4].isnan()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_every_code_of_a_moment_at_every_size_is_stored_again_to_the_same_bits(dtype: torch.dtype) -> None:
    """A resume must not round twice. Blocks of ever smaller numbers, as of an embedding whose token no longer comes."""
    scale = torch.exp2(torch.arange(60.0, -149.0, -0.37))
    codes = torch.arange(adamw.BLOCK).repeat(len(scale))
    codes = codes if dtype == torch.int8 else codes * 2 + 1
    x = adamw.decode(codes.to(dtype), scale)
    stored, scales = adamw.encode(x if dtype == torch.uint8 else x * torch.where(codes % 3 == 0, -1.0, 1.0), dtype)
    found = adamw.decode(stored, scales)
    again, scales_again = adamw.encode(found, dtype)
    assert torch.equal(again, stored)
    assert torch.equal(scales_again, scales)  # type: ignore[arg-type]
    large = x > 1e-20
    assert ((found.abs() - x).abs() <= 1e-6 * x)[large].all()
    if dtype == torch.uint8:
        assert (found[x > 2.0**-118] > 0).all()  # v = 0 beside m > 0 would be an update of m / eps


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16])
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype) -> None:
    """Over random bits and values; a bias of 1e-4 of a moment per step would be one of 10 % at beta2 = 0.999."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(adamw.BLOCK, generator=generator).square().square() + 1e-4
    x = x if dtype == torch.uint8 else x * torch.where(torch.rand(adamw.BLOCK, generator=generator) < 0.5, -1.0, 1.0)
    times = 20_000
    random = torch.randint(1 << 16, (times * adamw.BLOCK,), generator=generator)
    stored, scales = adamw.encode(x.repeat(times), dtype, random)
    found = adamw.decode(stored, scales).view(times, -1).double()
    spread = found.std(0) / times**0.5
    assert ((found.mean(0) - x).abs() <= 4.5 * spread + 1e-6 * x.abs()).all()
    assert (found.std(0) > 0).sum() >= adamw.BLOCK - 2


def test_random_bits_are_those_of_the_paper() -> None:
    """Salmon et al.'s known answers for Philox 4x32-7 (Random123, kat_vectors)."""
    zeros = adamw.random_words(0, 4, ZERO, torch.tensor(0))
    assert zeros.tolist() == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    ones = adamw.random_words((((1 << 61) - 1) * 4), 4, ZERO, torch.tensor(7))
    assert ones.unique().numel() == 4
    far = adamw.random_words(1 << 40, 4096, ZERO, torch.tensor(7))  # 64-bit indices
    assert not torch.equal(far, adamw.random_words(0, 4096, ZERO, torch.tensor(7)))
    assert not torch.equal(far, adamw.random_words(1 << 40, 4096, ONE, torch.tensor(7)))
    share = far.double() / 2**32
    assert abs(share.mean() - 0.5) < 4 * (1 / 12 / 4096) ** 0.5


def test_every_form_goes_to_fp32_and_back_to_the_same_bits() -> None:
    for master, moments in FORMS:
        state = made(1000, master, moments)
        for _ in range(3):
            step(adamw.reference, state, gradient(1000))
        before = cloned(state)
        adamw.fill(state, *(x.clone() for x in adamw.taken(state, "cpu")))
        assert same(before, state), (master, moments)


# ---- One update ----


@pytest.mark.parametrize("case", adamw.CASES)
def test_errs_at_most_twice_as_much_as_plain_torch(case: Any) -> None:
    torch.manual_seed(3)
    given, call = adamw._sample(case, "cpu")
    results = []
    for function, dtype in ((adamw.reference, torch.float64), (adamw.reference, None), (adamw.fused, None)):
        moved = [t.clone().to(dtype if dtype and t.is_floating_point() else t.dtype) for t in given]
        results.append([call(function, *moved), *moved])
    for exact, plain, ours in zip(*results, strict=True):
        assert (ours.dtype, ours.shape) == (plain.dtype, plain.shape)
        if ours.is_floating_point():
            allowed = max(2 * (plain.double() - exact).norm(), torch.finfo(ours.dtype).eps * exact.norm())
            assert (ours.double() - exact).norm() <= allowed
        else:  # codes and corrections: the same random bits, so that only what is nearly a tie may differ
            assert (ours != plain).float().mean() <= (0.3 if ours.dtype == torch.int16 else 0.01)


@pytest.mark.parametrize(("master", "moments"), FORMS)
def test_fused_stores_what_plain_torch_stores(master: adamw.Master, moments: adamw.Moments) -> None:
    """The forms are a file format: codes, scales, corrections and random bits mean the same to both."""
    plain = made(1000, master, moments, copy=True)
    ours = cloned(plain)
    for seed in range(3):
        step(adamw.reference, plain, gradient(1000, seed=seed))
        step(adamw.fused, ours, gradient(1000, seed=seed))
    for a, b in zip(adamw.taken(plain, "cpu"), adamw.taken(ours, "cpu"), strict=True):
        apart = (a - b).abs() > 1e-6 * a.abs() + 1e-9 * a.abs().max()
        assert apart.float().mean() < 0.01
    assert plain.updates == ours.updates == 7
    if plain.copy is not None and ours.copy is not None:
        assert torch.equal(ours.copy, ours.weight.bfloat16())


@pytest.mark.parametrize("count", [1, 31, 33, 127, 129, 0])
def test_tails_of_a_bucket(count: int) -> None:
    """COAT 19, Liger PR 1361: no element beyond the last one is read into a block's scale or written."""
    lean: tuple[adamw.Master, adamw.Moments] = ("bf16+8", "int8")
    for master, moments in (lean, FORMS[0]):
        whole = made(256, master, moments)
        adamw.fill(whole, *(torch.cat((x[:count], torch.full((256 - count,), 7.0))) for x in adamw.taken(whole, "cpu")))
        part = adamw.state(count, master, moments, copy=False, seed=11, device="cpu")
        adamw.fill(part, *(x[:count] for x in adamw.taken(whole, "cpu")))
        part.updates.fill_(4)
        room = {name: torch.cat((t, torch.full_like(whole.weight[:5], 99).to(t.dtype))) for name, t in tensors(part).items() if t.ndim}
        cut = dataclasses.replace(part, **{name: t[: len(tensors(part)[name])] for name, t in room.items()})
        expected = cloned(part)
        step(adamw.reference, expected, gradient(count))
        step(adamw.fused, cut, gradient(count))
        assert all((t[-5:] == torch.tensor(99).to(t.dtype)).all() for t in room.values())
        for a, b in zip(adamw.taken(expected, "cpu"), adamw.taken(cut, "cpu"), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=0)


@pytest.mark.parametrize("beta2", [0.95, 0.999, 0.999999, 0.0])
def test_the_first_update_is_the_rate_times_the_sign(beta2: float) -> None:
    """1 - beta^t in fp32 has lost most digits at t = 1: of 1 - 0.999999 one in sixteen."""
    for function in (adamw.reference, adamw.fused):
        state = adamw.state(300, "fp32", "fp32", copy=False, seed=0, device="cpu")
        grad = gradient(300, torch.float32)
        function(state, grad, torch.tensor(1e-3), ONE, ZERO, adamw.Rates((0.9, beta2), 1e-30, 0.0))
        torch.testing.assert_close(state.weight, -1e-3 * grad.sign(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("master", "moments"), FORMS)
@pytest.mark.parametrize("function", [adamw.reference, adamw.fused])
def test_a_skipped_update_changes_no_bit(function: Callable[..., None], master: adamw.Master, moments: adamw.Moments) -> None:
    """Nor the count of updates, whatever gradient and scale are."""
    state = made(300, master, moments, copy=True)
    before = cloned(state)
    function(state, torch.full((300,), math.nan), torch.tensor(1e-3), torch.tensor(math.nan), ONE, RATES)
    assert same(before, state)
    step(function, state, gradient(300))
    assert not same(before, state)
    assert state.updates == 5


def test_a_rate_that_moves_on_the_device_is_followed() -> None:
    """Under CUDA graphs a schedule's number, a decay and a parameter without gradient were frozen for ever (dion's and torch's graph paths).

    The same tensors are given every time, as a graph would; only what they hold changes.
    """
    state, grad = made(200, "bf16+16", "fp32"), torch.zeros(200)
    rate, scale, skip = torch.tensor(1e-2), torch.tensor(1.0), torch.tensor(0.0)
    before = adamw.taken(state, "cpu")[0].clone()
    rates = adamw.Rates((0.0, 0.0), 1e-8, 0.5)
    for lr, skipped in ((1e-2, 0.0), (2e-2, 1.0), (4e-2, 0.0)):
        rate.fill_(lr)
        skip.fill_(skipped)
        adamw.fused(state, grad, rate, scale, skip, rates)
    torch.testing.assert_close(adamw.taken(state, "cpu")[0], before * (1 - 1e-2 * 0.5) * (1 - 4e-2 * 0.5), rtol=1e-6, atol=0)
    grad.fill_(1.0)  # a gradient that was zero, and comes
    adamw.fused(state, grad, rate, scale, skip, rates)
    assert (adamw.taken(state, "cpu")[0] < before).all()


def test_a_gradient_of_half_precision_or_fp32_is_taken() -> None:
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        plain = made(200, "bf16+16", "fp32")
        ours = cloned(plain)
        step(adamw.reference, plain, gradient(200, dtype))
        step(adamw.fused, ours, gradient(200, dtype))
        torch.testing.assert_close(adamw.taken(ours, "cpu")[0], adamw.taken(plain, "cpu")[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kernel", list(adamw.SPACE))
def test_every_configuration_gives_the_same_bits(kernel: str) -> None:
    """Triton 6691, fla 595682b8: some configurations only were wrong. Warps mean nothing to the interpreter; a tuner checks them too."""
    moments: adamw.Moments = next(m for m in adamw.MOMENTS if kernel == f"adamw.{m}")
    expected = made(1300, "bf16+8", moments)
    step(adamw.fused, expected, gradient(1300))
    for elements in {configuration["elements"] for configuration in adamw.SPACE[kernel]}:
        state = made(1300, "bf16+8", moments)
        with launch.forced(kernel, {"elements": elements, "warps": 4}):
            step(adamw.fused, state, gradient(1300))
        assert same(state, expected)


def test_shipped_configurations_can_be_tuned_to() -> None:
    for kernel, space in adamw.SPACE.items():
        assert all(shipped in space for shipped in launch.table("default")["configs"][kernel].values())


def test_two_runs_are_bitwise_equal_and_another_seed_is_not() -> None:
    first, second, other = (made(700, "bf16+8", "int8") for _ in range(3))
    other.seed.fill_(12)
    for seed in range(3):
        for state in (first, second, other):
            step(adamw.fused, state, gradient(700, seed=seed))
    assert same(first, second)
    assert (first.exp_avg_sq != other.exp_avg_sq).any()


def test_elements_beyond_two_billion(monkeypatch: pytest.MonkeyPatch) -> None:
    """TE 2918, PR 3136: multi-tensor sizes in 32 bits. Untouched pages of 17 GB of tensors are never committed; one program runs, the one at 2^31."""
    size, begin = 2048, 1 << 31
    count = begin + size
    empty = {"bf16": torch.bfloat16, "i8": torch.int8, "u8": torch.uint8}
    flat = {name: torch.empty(count, dtype=dtype) for name, dtype in empty.items()}
    far = adamw.State(
        flat["bf16"], flat["i8"], None, torch.empty(count, dtype=torch.int8), torch.empty(count // 128), flat["u8"], torch.empty(count // 128),
        torch.tensor(4.0), torch.tensor(11),
    )  # fmt: skip
    near, grad = made(size, "bf16+8", "int8"), gradient(size)
    for name, tensor in tensors(near).items():
        if tensor.ndim:
            tensors(far)[name][-len(tensor) :] = tensor
    far_grad = torch.empty(count, dtype=torch.bfloat16)
    far_grad[begin:] = grad
    builder, plain_launch = interpreter.interpreter_builder, launch.launch
    size_of, index_of = builder.set_grid_dim, builder.set_grid_idx

    def launched(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> None:
        first = grid[0] - 1  # the last program of its grid is the only one
        monkeypatch.setattr(builder, "set_grid_dim", lambda x, y, z: size_of(x + first, y, z))
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: index_of(x + first, y, z))
        plain_launch(kernel, (1,), *arguments, **options)

    monkeypatch.setattr(launch, "launch", launched)
    with launch.forced("adamw.int8", {"elements": size, "warps": 4}):
        step(adamw.fused, far, far_grad)
    expected_words = adamw.random_words(begin, size, torch.tensor(5.0), far.seed)
    assert expected_words.unique().numel() > size - 10
    step(adamw.reference, near, grad)
    found = [adamw.merge(far.weight[begin:], far.correction[begin:])]  # type: ignore[index]
    found += [adamw.decode(far.exp_avg[begin:], far.exp_avg_scale[begin // 128 :])]  # type: ignore[index]
    for a, b in zip(found, adamw.taken(near, "cpu"), strict=False):
        assert (a - b).norm() < 0.05 * b.norm()  # other random bits, the same values


# ---- A thousand updates ----

SCENES = ("noise", "smooth", "uneven", "zero")  # gradients of noise, of hardly any, of a size that falls unevenly, and none: decay alone


def gradients(steps: int) -> Iterator[Tensor]:
    """[scenes * 256] per step, of very different sizes within a block."""
    generator = torch.Generator().manual_seed(0)
    size = 1e-3 * torch.exp(torch.randn(4, 256, generator=generator))
    mean, phase = torch.randn(4, 256, generator=generator), 6.28 * torch.rand(4, 256, generator=generator)
    fall = torch.rand(256, generator=generator)
    for t in range(steps):
        z = torch.randn(4, 256, generator=generator)
        wave = mean[1] * (1 + torch.sin(phase[1] + t / 150))
        rows = (0.2 * mean[0] + z[0], 10 * wave + z[1], (mean[2] + z[2]) * 1e-3 ** (fall * t / steps), 0 * z[3])
        yield (size * torch.stack(rows)).flatten().bfloat16()


def beginning() -> Tensor:
    return 0.02 * torch.randn(4 * 256, generator=torch.Generator().manual_seed(1))


def exact(steps: int, lr: float, beta2: float) -> Tensor:
    """AdamW in fp64."""
    w = beginning().double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, grad in enumerate(gradients(steps), 1):
        g = grad.double()
        m, v = 0.9 * m + 0.1 * g, beta2 * v + (1 - beta2) * g * g
        w = w * (1 - lr * 0.1) - lr * (m / (1 - 0.9**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
    return w


def drift(w: Tensor, expected: Tensor) -> dict[str, float]:
    """How far the weights are from fp64's, as a share of the way that those went."""
    way = (expected - beginning().double()).view(4, -1)
    return dict(zip(SCENES, ((w.double() - expected).view(4, -1).norm(dim=1) / way.norm(dim=1)).tolist(), strict=True))


def trained(steps: int, lr: float, beta2: float, form: tuple[Any, Any, bool], function: Callable[..., None] = adamw.reference) -> Tensor:
    state = adamw.state(4 * 256, form[0], form[1], copy=False, seed=5, device="cpu")
    adamw.fill_weights(state, 0, beginning())
    rate, rates = torch.tensor(lr), adamw.Rates((0.9, beta2), 1e-8, 0.1, form[2])
    for grad in gradients(steps):
        function(state, grad, rate, ONE, ZERO, rates)
    return adamw.taken(state, "cpu")[0]


def torchs(steps: int, lr: float, beta2: float, dtype: torch.dtype) -> Tensor:
    weight = torch.nn.Parameter(beginning().to(dtype))
    peer = torch.optim.AdamW([weight], lr=lr, betas=(0.9, beta2), weight_decay=0.1, fused=True)
    for grad in gradients(steps):
        weight.grad = grad.to(dtype)
        peer.step()
    return weight.detach()


def test_a_thousand_updates_below_a_bf16_ulp_reach_the_master_weights() -> None:
    """OneTrainer 994 and 996, bitsandbytes 121: lr * decay is 1e-5, and a bf16 weight alone keeps none of it."""
    expected = exact(1000, 1e-4, 0.95)
    bf16 = torchs(1000, 1e-4, 0.95, torch.bfloat16)
    assert torch.equal(bf16.view(4, -1)[3], beginning().bfloat16().view(4, -1)[3])
    assert min(drift(bf16, expected).values()) > 0.2
    full = drift(trained(1000, 1e-4, 0.95, ("bf16+16", "fp32", False)), expected)
    plain = drift(torchs(1000, 1e-4, 0.95, torch.float32), expected)
    assert all(full[scene] <= 2 * plain[scene] for scene in SCENES)
    lean = drift(trained(1000, 1e-4, 0.95, ("bf16+8", "int8", True)), expected)
    assert max(lean[scene] for scene in SCENES[:3]) < 0.03
    assert lean["zero"] < 0.06


def test_updates_below_24_bits_need_stochastic_rounding_or_32() -> None:
    """lr * decay = 1e-6 is an eighth of half the last place of bf16+8: to nearest, a weight without a gradient stands still for ever."""
    expected, start = exact(300, 1e-5, 0.95), adamw.merge(*adamw.split(beginning(), torch.int8))
    nearest, stochastic, whole = (
        trained(300, 1e-5, 0.95, form) for form in (("bf16+8", "fp32", False), ("bf16+8", "fp32", True), ("bf16+16", "fp32", False))
    )
    assert torch.equal(nearest.view(4, -1)[3], start.view(4, -1)[3])
    assert drift(stochastic, expected)["zero"] < 0.4  # of 300 steps; the noise falls with the root of their number
    way = ((stochastic - start) / start).view(4, -1)[3]
    assert way.mean() == pytest.approx(-300e-6, rel=0.1)
    assert drift(whole, expected)["zero"] < 0.05


def test_beta2_in_narrow_moments_does_not_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """tt-metal 55935: at beta2 = 0.999 a step moves v by less than half a place of bf16, so that v never falls, and updates shrink to nothing."""
    expected = exact(1000, 1e-4, 0.999)
    narrow = {moments: drift(trained(1000, 1e-4, 0.999, ("fp32", moments, False)), expected) for moments in ("bf16", "int8")}
    assert max(narrow["bf16"].values()) < 0.02
    assert max(narrow["int8"].values()) < 0.1
    encode = adamw.encode
    monkeypatch.setattr(adamw, "encode", lambda x, dtype, random=None: encode(x, dtype))  # to nearest
    stalled = drift(trained(1000, 1e-4, 0.999, ("fp32", "int8", False)), expected)
    assert stalled["smooth"] > 0.3


def test_fused_drifts_as_plain_torch_does() -> None:
    expected = exact(150, 1e-4, 0.95)
    for form in (("bf16+8", "int8", True), ("bf16+16", "fp32", False)):
        with launch.forced(f"adamw.{form[1]}", {"elements": 1024, "warps": 4}):
            ours = drift(trained(150, 1e-4, 0.95, form, adamw.fused), expected)
        plain = drift(trained(150, 1e-4, 0.95, form), expected)
        assert all(ours[scene] <= 2 * plain[scene] for scene in SCENES)


# ---- Contracts ----


@pytest.mark.parametrize(("master", "moments"), [("fp32", "fp32"), ("bf16+16", "bf16"), ("bf16+8", "int8")])
def test_the_operator_passes_torchs_own_check(master: adamw.Master, moments: adamw.Moments) -> None:
    state = made(200, master, moments, copy=True)
    given = [getattr(state, field.name) for field in dataclasses.fields(state)]
    arguments = (
        *given[:3],
        gradient(200),
        *given[3:8],
        torch.tensor(1e-3),
        ONE.clone(),
        ZERO.clone(),
        given[8],
        0.9,
        0.95,
        1e-8,
        0.1,
        True,
    )
    torch.library.opcheck(torch.ops.gigatrain.adamw.default, arguments)


def test_refuses_what_it_cannot_do_and_names_the_way_out() -> None:
    state = made(256, "bf16+8", "int8")
    for change, grad, said in (
        ({"weight": state.weight.half()}, gradient(256), "no form of the state is weight float16"),
        ({"exp_avg": state.exp_avg.bool()}, gradient(256), "exp_avg bool"),
        ({"copy": state.weight}, gradient(256), "no form of the state is .*copy bfloat16"),
        ({}, gradient(256).double(), "gradient float64"),
        ({}, gradient(255), r"flat, contiguous and of one length, not \(256,\), \(256,\), \(255,\)"),
        ({}, gradient(512)[::2], "flat, contiguous"),
    ):
        with pytest.raises(KernelError, match=f'adamw: .*{said}.*; set kernels.adamw = "reference"'):
            step(adamw.fused, dataclasses.replace(state, **change), grad)
    with pytest.raises(
        KernelError, match='torch\'s own takes fp32 states and gradients only, not weight bfloat16.*; set kernels.adamw = "reference"'
    ):
        adamw.foreach(state, gradient(256), 1e-3, ONE, ZERO, RATES)


def test_torchs_own_and_ours_agree() -> None:
    ours, theirs = made(500, "fp32", "fp32"), made(500, "fp32", "fp32")
    for seed in range(20):
        step(adamw.reference, ours, gradient(500, torch.float32, seed))
        adamw.foreach(theirs, gradient(500, torch.float32, seed), 1e-3, torch.tensor(0.5), ZERO, RATES)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-8)
    assert ours.updates == theirs.updates


def test_bytes_per_parameter_are_those_of_the_tensors() -> None:
    for master, moments in FORMS:
        state = made(1280, master, moments)
        stored = sum(t.numel() * t.element_size() for t in tensors(state).values() if t.ndim)
        assert adamw.bytes_per_parameter(master, moments, torch.bfloat16, copy=False) * 1280 == 2 * stored + 1280 * 2
    assert adamw.bytes_per_parameter("bf16+8", "int8", torch.bfloat16, copy=False) == 12.125
    assert adamw.bytes_per_parameter("fp32", "fp32", torch.float32, copy=True) == 30
