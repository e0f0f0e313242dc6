"""Every implementation of every operation against its reference: values and gradients, on every one of its cases.

The tolerance is derived: the error against fp64 is at most twice that of the reference in the same dtype, or one rounding of the result.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gigatrain.errors import PlanError
from gigatrain.kernels import attention, geglu, linear_cross_entropy, ops, qk_norm_rope, rms_norm, rope, swiglu, xielu

Call = tuple[list[Tensor], Callable[..., Any]]  # float inputs, and (implementation, *inputs) -> outputs


def angles(b: int, t: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.randn(b, t, r, dtype=torch.float64) * 3
    return angle.cos().to(dtype), angle.sin().to(dtype)


def norm_cases(add: bool) -> Iterator[Call]:
    for shape, channels, dtype in rms_norm.CASES:
        for style in ("llama", "olmo", "gemma"):
            x, w = torch.randn(*shape, channels, dtype=dtype) * 2, torch.randn(channels, dtype=dtype)
            if add:
                for scale in (1.0, 0.22):
                    yield [x, torch.randn_like(x), w], lambda f, x, r, w, style=style, scale=scale: f(x, r, w, 1e-5, style, scale)
            else:
                yield [x, w], lambda f, x, w, style=style: f(x, w, 1e-5, style)


def rope_cases() -> Iterator[Call]:
    for b, t, h, k, d, r, interleaved, dtype in rope.CASES:
        for rows, wide in ((1, False), (b, False), (b, True)):
            cos, sin = angles(rows, t, r // 2, torch.promote_types(dtype, torch.float32) if wide else dtype)

            def call(f: Any, q: Tensor, key: Tensor, cos: Tensor = cos, sin: Tensor = sin, interleaved: bool = interleaved) -> Any:
                exact = q.dtype == torch.float64
                return f(q, key, cos.double() if exact else cos, sin.double() if exact else sin, interleaved)

            yield [torch.randn(b, t, h, d, dtype=dtype), torch.randn(b, t, k, d, dtype=dtype)], call


def qk_norm_rope_cases() -> Iterator[Call]:
    for b, t, h, k, d, dtype in qk_norm_rope.CASES:
        for turned in (True, False):
            cos, sin = angles(b, t, d // 2, dtype) if turned else (None, None)

            def call(f: Any, *xs: Tensor, cos: Tensor | None = cos, sin: Tensor | None = sin) -> Any:
                exact = xs[0].dtype == torch.float64 and cos is not None
                return f(*xs, cos.double() if exact else cos, sin.double() if exact else sin, 1e-6, "llama")  # type: ignore[union-attr]

            tensors = [torch.randn(b, t, n, d, dtype=dtype) for n in (h, k)]
            yield [*tensors, torch.randn(d, dtype=dtype), torch.randn(d, dtype=dtype)], call


def gated_cases(cases: Any) -> Iterator[Call]:
    for shape, dtype in cases:
        yield [torch.randn(shape, dtype=dtype) * 3, torch.randn(shape, dtype=dtype)], lambda f, gate, up: f(gate, up)


def xielu_cases() -> Iterator[Call]:
    for shape, dtype in xielu.CASES:
        tensors = [torch.randn(shape, dtype=dtype) * 3, torch.tensor([0.3], dtype=dtype), torch.tensor([-0.7], dtype=dtype)]
        yield tensors, lambda f, x, p, n: f(x, p, n)


def attention_cases() -> Iterator[Call]:
    for b, t, h, k, d, window, documents, softcap, dtype in attention.CASES:
        rows = torch.randint(0, 3, (b, t)).sort(-1).values.int() if documents else None

        def call(f: Any, *qkv: Tensor, rows: Any = rows, window: Any = window, t: int = t, d: int = d, softcap: Any = softcap) -> Any:
            return f(*qkv, attention.mask(rows, window, t, qkv[0].dtype, qkv[0].device), scale=d**-0.5, softcap=softcap)

        yield [torch.randn(b, t, n, d, dtype=dtype) for n in (h, k, k)], call


def loss_cases() -> Iterator[Call]:
    for n, h, v, softcap, scale, z_loss, dtype in linear_cross_entropy.CASES:
        labels = torch.randint(0, v, (n,))
        if n > 1:
            labels[:: max(1, n // 5)] = linear_cross_entropy.IGNORE

        def call(f: Any, x: Tensor, w: Tensor, labels: Tensor = labels, c: Any = softcap, s: float = scale, z: float = z_loss) -> Any:
            return f(x, w, labels, softcap=c, scale=s, z_loss=z)

        yield [torch.randn(n, h, dtype=dtype), torch.randn(v, h, dtype=dtype) * 0.5], call


CASES: dict[str, Callable[[], Iterator[Call]]] = {
    "rms_norm": lambda: norm_cases(add=False),
    "add_rms_norm": lambda: norm_cases(add=True),
    "rope": rope_cases,
    "qk_norm_rope": qk_norm_rope_cases,
    "swiglu": lambda: gated_cases(swiglu.CASES),
    "geglu": lambda: gated_cases(geglu.CASES),
    "xielu": xielu_cases,
    "attention": attention_cases,
    "linear_cross_entropy": loss_cases,
}
FAST = [(op, name) for op, names in ops.available().items() for name in names if name != "reference"]


def run(
    call: Callable[..., Any], function: Any, inputs: list[Tensor], grads: list[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Outputs and input gradients, the outputs weighted with `grads` (so that no gradient hides behind a factor of one)."""
    leaves = [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = call(function, *leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    total = sum((o.double() * g).sum() for o, g in zip(outputs, grads, strict=False) if o.requires_grad)
    torch.as_tensor(total).backward()
    return [o.detach() for o in outputs] + [x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves]


@pytest.mark.parametrize(("op", "name"), FAST)
def test_errs_at_most_twice_as_much_as_plain_torch(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_cross_entropy._ELEMENTS, "cpu", 1)  # the smallest chunks, so that several are summed
    monkeypatch.setattr(attention, "_BLOCK", 5)
    reference, function = getattr(ops.REFERENCE, op), getattr(ops.choose({op: name}), op)
    # Relative squared errors over seeds, of each tensor of each case; tensors of a few numbers, which say more about luck than about the code, are
    # pooled over the cases.
    ours, plain, counted = (defaultdict(float) for _ in range(3))
    for seed in range(12):
        torch.manual_seed(seed)
        for case, (inputs, call) in enumerate(CASES[op]()):
            probe = call(reference, *inputs)
            grads = [torch.randn(o.shape, dtype=torch.float64) for o in (probe if isinstance(probe, tuple) else (probe,))]
            before = [x.clone() for x in inputs]
            results = [
                run(call, reference, inputs, grads, torch.float64),
                run(call, reference, inputs, grads),
                run(call, function, inputs, grads),
            ]
            largest = max(e.square().sum().item() for e in results[0])
            for i, (e, p, o) in enumerate(zip(*results, strict=True)):
                assert (o.dtype, o.shape) == (p.dtype, p.shape)
                key = (i, o.dtype, (case, *(tuple(x.shape) for x in inputs)) if o.numel() >= 64 else "small")
                size = e.square().sum().item() or largest or 1.0  # what is exactly 0 is judged by its neighbours
                ours[key] += (o.double() - e).square().sum().item() / size
                plain[key] += (p.double() - e).square().sum().item() / size
                counted[key] += (torch.finfo(o.dtype).eps / 2) ** 2
            assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)), "an input was overwritten"
    for key, error in ours.items():
        assert error <= max(4 * plain[key], counted[key]), f"{op} {name}: (tensor, dtype, case) {key}"


@pytest.mark.parametrize(("op", "name"), FAST)
def test_is_exact_in_double_precision(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    monkeypatch.setitem(linear_cross_entropy._ELEMENTS, "cpu", 1)
    monkeypatch.setattr(attention, "_BLOCK", 5)
    reference, function = getattr(ops.REFERENCE, op), getattr(ops.choose({op: name}), op)
    for inputs, call in CASES[op]():
        if inputs[0].dtype != torch.float32:
            continue
        probe = call(reference, *inputs)
        grads = [torch.randn(o.shape, dtype=torch.float64) for o in (probe if isinstance(probe, tuple) else (probe,))]
        for a, b in zip(*(run(call, f, inputs, grads, torch.float64) for f in (reference, function)), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("op", "name"), FAST)
def test_takes_strided_inputs(op: str, name: str) -> None:
    torch.manual_seed(2)
    reference, function = getattr(ops.REFERENCE, op), getattr(ops.choose({op: name}), op)
    inputs, call = next(iter(CASES[op]()))
    grads = [torch.randn((), dtype=torch.float64)] * 4
    spread = [torch.stack((x, torch.full_like(x, 7.0)), -1)[..., 0] for x in inputs]
    assert not spread[0].is_contiguous()
    outputs = []
    for f, xs in ((reference, inputs), (function, spread)):
        leaves = [x.detach().requires_grad_() for x in xs]
        result = call(f, *leaves)
        result = result if isinstance(result, tuple) else (result,)
        sum((o.double().square().sum() * g) for o, g in zip(result, grads, strict=False) if o.requires_grad).backward()  # type: ignore[union-attr]
        outputs.append([*(o.detach() for o in result), *(x.grad for x in leaves)])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_gradients_of_the_references_are_those_of_finite_differences() -> None:
    torch.manual_seed(3)
    for op, cases in CASES.items():
        function = getattr(ops.REFERENCE, op)
        inputs, call = next(iter(cases()))
        leaves = [x.detach().flatten()[:12].reshape(-1).double() for x in inputs]
        whole = [x.detach().double() for x in inputs]

        def small(*heads: Tensor, call: Any = call, function: Any = function, whole: list[Tensor] = whole) -> Any:
            full = [torch.cat((head, w.flatten()[12:])).reshape(w.shape) for head, w in zip(heads, whole, strict=True)]
            out = call(function, *full)
            return out[0].sum() if isinstance(out, tuple) else out.square().sum()

        assert torch.autograd.gradcheck(small, [x.requires_grad_() for x in leaves], eps=1e-6, atol=1e-4, rtol=1e-4), op


def test_every_operation_has_cases_with_odd_sizes() -> None:
    assert set(CASES) == set(ops.available())
    for module in (attention, geglu, linear_cross_entropy, qk_norm_rope, rms_norm, rope, swiglu, xielu):
        assert {case[-1] for case in module.CASES} == {torch.float32, torch.bfloat16}


def test_refuses_an_unknown_operation() -> None:
    with pytest.raises(PlanError, match=r"no operation is called layer_norm; there are rms_norm,"):
        ops.choose({"layer_norm": "reference"})


def test_refuses_an_unknown_implementation() -> None:
    with pytest.raises(PlanError, match=r"attention has no implementation 'flash9'; choose one of reference, sdpa"):
        ops.choose({"attention": "flash9"})


def test_leaves_what_is_not_chosen_at_the_reference() -> None:
    chosen = ops.choose({"attention": "sdpa"})
    assert chosen.attention is attention.sdpa
    assert chosen.rope is rope.reference
    assert ops.REFERENCE.attention is attention.reference
