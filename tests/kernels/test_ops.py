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
from gigatrain.kernels import attention, attention_torch, linear_cross_entropy, ops, rope
from gigatrain.kernels.launch import Sample

DIFFERENTIABLE = {name: operation for name, operation in ops.OPERATIONS.items() if operation.differentiable}


def samples(op: str) -> Iterator[Sample]:
    for case in ops.OPERATIONS[op].cases:
        yield ops.OPERATIONS[op].sample(case, "cpu")


def version(op: str, name: str) -> Callable[..., Any]:
    return ops.OPERATIONS[op].versions[name]


TRITON = ("fused", "glued")  # interpreted here; slow, and without fp64
# torch's own kernels for GPUs: test_attention_torch.py holds what is around them
AWAITING = {("attention", name) for name in attention_torch.LIMITS}
FAST = [
    (op, name)
    for op, operation in DIFFERENTIABLE.items()
    for name in operation.versions
    if name != "reference" and (op, name) not in AWAITING
]


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
    reference, function = version(op, "reference"), version(op, name)
    # Relative squared errors over seeds, of each tensor of each case; tensors of a few numbers, which say more about luck than about the code, are
    # pooled over the cases.
    ours, plain, counted = (defaultdict(float) for _ in range(3))
    for seed in range(12 if name not in TRITON else 3):
        torch.manual_seed(seed)
        for case, (inputs, call) in enumerate(samples(op)):
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
                if not o.is_floating_point():
                    assert torch.equal(o, p), f"{op} {name}: tensor {i} of case {case}"
                    continue
                key = (i, o.dtype, (case, *(tuple(x.shape) for x in inputs)) if o.numel() >= 64 else "small")
                size = e.square().sum().item() or largest or 1.0  # what is exactly 0 is judged by its neighbours
                ours[key] += (o.double() - e).square().sum().item() / size
                plain[key] += (p.double() - e).square().sum().item() / size
                counted[key] += (torch.finfo(o.dtype).eps / 2) ** 2
            assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)), "an input was overwritten"
    for key, error in ours.items():
        assert error <= max(4 * plain[key], counted[key]), f"{op} {name}: (tensor, dtype, case) {key}"


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in FAST if name not in TRITON])
def test_is_exact_in_double_precision(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    monkeypatch.setitem(linear_cross_entropy._ELEMENTS, "cpu", 1)
    monkeypatch.setattr(attention, "_BLOCK", 5)
    reference, function = version(op, "reference"), version(op, name)
    for inputs, call in samples(op):
        if inputs[0].dtype != torch.float32:
            continue
        probe = call(reference, *inputs)
        grads = [torch.randn(o.shape, dtype=torch.float64) for o in (probe if isinstance(probe, tuple) else (probe,))]
        for a, b in zip(*(run(call, f, inputs, grads, torch.float64) for f in (reference, function)), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("op", "name"), FAST)
def test_takes_strided_inputs(op: str, name: str) -> None:
    torch.manual_seed(2)
    reference, function = version(op, "reference"), version(op, name)
    inputs, call = next(samples(op))
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
    for op in DIFFERENTIABLE:
        function = version(op, "reference")
        inputs, call = next(samples(op))
        leaves = [x.detach().flatten()[:12].reshape(-1).double() for x in inputs]
        whole = [x.detach().double() for x in inputs]

        def small(*heads: Tensor, call: Any = call, function: Any = function, whole: list[Tensor] = whole) -> Any:
            full = [torch.cat((head, w.flatten()[12:])).reshape(w.shape) for head, w in zip(heads, whole, strict=True)]
            out = call(function, *full)
            return out[0].sum() if isinstance(out, tuple) else out.square().sum()

        assert torch.autograd.gradcheck(small, [x.requires_grad_() for x in leaves], eps=1e-6, atol=1e-4, rtol=1e-4), op


def test_every_operation_has_cases_of_both_dtypes() -> None:
    assert set(ops.available()) <= set(ops.OPERATIONS)
    for operation in ops.OPERATIONS.values():
        assert next(iter(operation.versions)) == "reference"
        assert {case[-1] for case in operation.cases} >= {torch.float32, torch.bfloat16}


def test_refuses_an_unknown_operation() -> None:
    with pytest.raises(PlanError, match=r"no operation is called layer_norm; there are embedding, rms_norm,"):
        ops.choose({"layer_norm": "reference"})


def test_refuses_an_unknown_implementation() -> None:
    with pytest.raises(PlanError, match=r"attention has no implementation 'flash9'; choose one of reference, sdpa"):
        ops.choose({"attention": "flash9"})


def test_leaves_what_is_not_chosen_at_the_reference() -> None:
    chosen = ops.choose({"attention": "sdpa"})
    assert chosen.attention is attention.sdpa
    assert chosen.rope is rope.reference
    assert ops.REFERENCE.attention is attention.reference
