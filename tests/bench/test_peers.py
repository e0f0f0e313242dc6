"""Peers behind our signatures: those that run without a GPU compute what our references do, the others are called as their own signatures want it.

Liger's kernels without floating-point arguments run in Triton's interpreter; the rest of a peer that needs a GPU is bound to its real signature.
"""

import inspect
from typing import Any

import pytest
import torch

from gigatrain.bench import kernels, measure, peers
from gigatrain.bench.measure import Cpu, Errors
from gigatrain.errors import KernelError
from gigatrain.kernels import adamw, launch, ops


def adapter(peer, op):
    (found,) = [one for one in peers.of(op) if one.peer == peer]
    return found


def errors_of(one, *, dtype=torch.float32, most=12):
    """(errors over the operation's cases, cases that were taken, refusals)."""
    operation, errors, taken, refusals = ops.OPERATIONS[one.op], Errors(), 0, set()
    function = one.make()
    for index, case in enumerate(case for case in operation.cases if case[-1] == dtype):
        if taken == most:
            break
        exact = kernels.Exact(operation, case, Cpu(), seed=index)
        if not all(x.numel() for x in exact.tensors):
            continue
        try:
            result = exact.outcome(function)
        except KernelError as refusal:
            refusals.add(str(refusal))
            continue
        except launch.triton.runtime.errors.InterpreterError:  # it has no methods on a kernel's floating-point arguments; GPUs do
            continue
        errors.add(exact.expected, exact.plain, result, index)
        taken += 1
    return errors, taken, refusals


def test_every_adapter_is_for_an_operation_that_exists_and_a_peer_that_can_be_named():
    assert {one.op for one in peers.ADAPTERS} <= set(ops.OPERATIONS)
    assert {one.peer for one in peers.ADAPTERS} | {"torch", "compile"} == set(peers.PEERS)
    assert len({(one.peer, one.op) for one in peers.ADAPTERS}) == len(peers.ADAPTERS)


@pytest.mark.parametrize("op", ["rms_norm", "cross_entropy", "linear_cross_entropy", "grad_norm"])
def test_torchs_own_functions_compute_what_our_references_do(op):
    errors, taken, refusals = errors_of(adapter("native", op))
    assert taken
    assert errors.ratio() < 10, errors.ours  # in fp32: another function errs ten thousand times as much
    assert all(text.startswith("F.") for text in refusals)


def test_torchs_adamw_moves_the_state_as_our_reference_does():
    one = adapter("native", "adamw")
    rates = adamw.Rates((0.9, 0.95), 1e-8, 0.1)
    lr, scale, skip = torch.tensor(1e-3), torch.tensor(0.5), torch.tensor(0.0)
    for dtype in (torch.float32, torch.bfloat16):
        grad = torch.randn(100).to(dtype)
        states = [adamw.state(100, "fp32", "fp32", copy=True, seed=0, device="cpu") for _ in range(2)]
        for state, update in zip(states, (adamw.reference, one.make()), strict=True):
            state.weight.copy_(torch.linspace(-1, 1, 100))
            for _ in range(3):
                update(state, grad.clone(), lr, scale, skip, rates)
        for name in ("weight", "copy", "exp_avg", "exp_avg_sq", "updates"):
            torch.testing.assert_close(*(getattr(state, name) for state in states), rtol=1e-5, atol=1e-7)
    narrow = adamw.state(100, "bf16+8", "int8", copy=False, seed=0, device="cpu")
    with pytest.raises(KernelError, match="torch's AdamW keeps fp32 weights and moments"):
        one.make()(narrow, torch.randn(100), lr, scale, skip, rates)


def test_a_dropout_with_another_mask_keeps_the_expected_share():
    x, residual = torch.ones(100_000), torch.zeros(100_000)
    one = adapter("native", "dropout_add")
    y = one.make()(x, residual, 0.25, torch.tensor(0), 0)
    assert not one.checked
    assert abs(float((y == 0).float().mean()) - 0.25) < 0.01
    assert float(y.max()) == pytest.approx(1 / 0.75)


def test_the_products_are_those_of_head_and_gradients():
    h, w = (torch.randn(*shape, requires_grad=True) for shape in ((6, 4), (9, 4)))
    logits = adapter("products", "linear_cross_entropy").make()(h, w, torch.zeros(6).long(), softcap=None, scale=1.0)
    assert logits.shape == (6, 9)
    grad = torch.randn(6, 9)
    dh, dw = torch.autograd.grad(logits, (h, w), grad)
    torch.testing.assert_close(dh, grad @ w)
    torch.testing.assert_close(dw, grad.mT @ h)


@pytest.mark.parametrize("op", ["rope", "relu2", "cross_entropy", "linear_cross_entropy"])
def test_liger_computes_what_our_references_do(op):
    pytest.importorskip("liger_kernel")
    one = adapter("liger", op)
    errors, taken, refusals = errors_of(one, most=4)
    assert taken
    assert errors.ratio() < 10, errors.ours  # in fp32: another function errs ten thousand times as much
    assert all(text.startswith("liger ") for text in refusals)


def test_liger_writes_over_what_it_is_said_to_write_over():
    """Its rope turns the projections in place and its loss leaves the gradient in the logits: each needs inputs of its own (Liger-Kernel 272)."""
    pytest.importorskip("liger_kernel")
    for op in ("rope", "cross_entropy"):
        one = adapter("liger", op)
        exact = kernels.Exact(ops.OPERATIONS[op], ops.OPERATIONS[op].cases[0], Cpu())
        inputs = measure.leaves(exact.tensors, True)
        exact.call(one.make(), *inputs)
        assert one.overwrites
        assert not torch.equal(inputs[0], exact.tensors[0])


def test_transformers_experts_compute_what_our_reference_does():
    one = adapter("transformers", "moe")
    for dtype in (torch.float32, torch.bfloat16):
        errors, taken, refusals = errors_of(one, dtype=dtype)
        assert taken == 2
        assert errors.ratio() < 2, errors.ours
        assert refusals == {"transformers has no gate_up_bias_ef", "transformers has no clamped_swiglu"}


class Bound(Exception):
    """Carries how a call was bound."""


@pytest.fixture
def bound(monkeypatch):
    """Makes a peer's autograd function say how its forward would have been called."""

    def catch(module, name):
        function = getattr(pytest.importorskip(module), name)

        def apply(*inputs):
            found = inspect.signature(function.forward).bind(None, *inputs)
            found.apply_defaults()
            raise Bound(found.arguments)

        monkeypatch.setattr(function, "apply", apply)

    return catch


X, W = torch.randn(4, 8), torch.randn(8)


@pytest.mark.parametrize(
    ("op", "module", "name", "inputs", "expected"),
    [
        (
            "rms_norm",
            "rms_norm",
            "LigerRMSNormFunction",
            (X, W, 1e-5, "llama"),
            {"X": X, "W": W, "eps": 1e-5, "offset": 0.0, "casting_mode": "llama"},
        ),
        ("rms_norm", "rms_norm", "LigerRMSNormFunction", (X, W, 1e-5, "gemma"), {"offset": 1.0, "casting_mode": "gemma"}),
        (
            "add_rms_norm",
            "fused_add_rms_norm",
            "LigerFusedAddRMSNormFunction",
            (X, X + 1, W, 1e-5, "gemma", 1.0),
            {"X": X, "R": X + 1, "W": W, "offset": 1.0, "casting_mode": "gemma", "in_place": True},
        ),
        ("swiglu", "swiglu", "LigerSiLUMulFunction", (X, X + 1), {"a": X, "b": X + 1}),
        ("geglu", "geglu", "LigerGELUMulFunction", (X, X + 1), {"a": X, "b": X + 1}),
    ],
)
def test_liger_is_called_as_its_forward_wants_it(bound, op, module, name, inputs, expected):
    bound(f"liger_kernel.ops.{module}", name)
    with pytest.raises(Bound) as caught:
        adapter("liger", op).make()(*inputs)
    found = caught.value.args[0]
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key


def test_ligers_experts_get_their_choice_in_32_bits(bound):
    bound("liger_kernel.ops.fused_moe", "LigerFusedMoEFunction")
    x, weights, gate_up, down = torch.randn(4, 8), torch.rand(4, 2), torch.randn(3, 12, 8), torch.randn(3, 8, 6)
    chosen = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
    with pytest.raises(Bound) as caught:
        adapter("liger", "moe").make()(x, weights, chosen, gate_up, down, activation="swiglu")
    found = caught.value.args[0]
    assert all(found[name] is given for name, given in {"x": x, "gate_up_proj": gate_up, "down_proj": down}.items())
    assert found["top_k_weights"] is weights
    assert found["top_k_index"].dtype == torch.int32
    with pytest.raises(KernelError, match="liger has no clamped_swiglu"):
        adapter("liger", "moe").make()(x, weights, chosen, gate_up, down, activation="clamped_swiglu")


def test_cut_cross_entropy_is_called_as_it_wants_to_be(monkeypatch):
    package = pytest.importorskip("cut_cross_entropy")
    signature = inspect.signature(package.linear_cross_entropy)
    monkeypatch.setattr(
        package, "linear_cross_entropy", lambda *inputs, **options: (_ for _ in ()).throw(Bound(signature.bind(*inputs, **options)))
    )
    labels = torch.zeros(4).long()
    with pytest.raises(Bound) as caught:
        adapter("cut-cross-entropy", "linear_cross_entropy").make()(X, W[None], labels, softcap=3.0, reduction="mean")
    found = caught.value.args[0].arguments
    assert (found["e"] is X, found["targets"] is labels, found["softcap"], found["reduction"], found["ignore_index"]) == (
        True,
        True,
        3.0,
        "mean",
        -100,
    )


def test_flashoptim_gets_the_form_of_the_state(monkeypatch):
    package = pytest.importorskip("flashoptim")
    made = []

    class Optimizer:
        def __init__(self, *inputs, **options):
            made.append(inspect.signature(package.optimizers.FlashAdamW.__init__).bind(self, *inputs, **options).arguments)
            self.steps = 0

        def step(self):
            self.steps += 1

    monkeypatch.setattr(package, "FlashAdamW", Optimizer)
    update, rates = adapter("flashoptim", "adamw").make(), adamw.Rates((0.9, 0.95), 1e-8, 0.1)
    numbers = [torch.tensor(number) for number in (1e-3, 0.5, 0.0)]
    forms: Any = (("bf16+8", "int8", 24, True), ("bf16+16", "bf16", 32, False), ("bf16", "bf16", None, False))
    for master, moments, bits, quantize in forms:
        state = adamw.state(8, master, moments, copy=False, seed=0, device="cpu")
        grad = torch.randn(8).bfloat16()
        for _ in range(2):
            update(state, grad, *numbers, rates)
        (weight,) = made[-1]["params"]
        assert weight.data_ptr() == state.weight.data_ptr()
        assert weight.grad is grad
        assert (made[-1]["master_weight_bits"], made[-1]["quantize"], made[-1]["betas"]) == (bits, quantize, (0.9, 0.95))
    assert len(made) == 3  # one per weight, not per step
    wide = adamw.state(8, "bf16+8", "fp32", copy=False, seed=0, device="cpu")
    with pytest.raises(KernelError, match="flashoptim keeps moments in int8 or in the weight's dtype"):
        update(wide, torch.randn(8).bfloat16(), *numbers, rates)
    with pytest.raises(KernelError, match="flashoptim has no copy in bf16, no gradient in another dtype"):
        update(wide, torch.randn(8), *numbers, rates)


@pytest.mark.parametrize(
    ("peer", "op", "inputs", "options", "message"),
    [
        ("liger", "rms_norm", (X, W, 1e-5, "olmo"), {}, "liger has no norm of style olmo"),
        ("liger", "add_rms_norm", (X, X, W, 1e-5, "llama", 0.22), {}, "liger has no scale"),
        ("liger", "rope", (X, X, W, W, True), {}, "liger turns halves"),
        ("liger", "cross_entropy", (X, W), {"weights_n": W}, "liger has no weights_n"),
        ("native", "cross_entropy", (X, W), {"softcap": 30.0}, "F.cross_entropy has no softcap"),
        ("native", "cross_entropy", (X, W), {"z_loss": 1e-4}, "F.cross_entropy has no z_loss"),
        ("cut-cross-entropy", "linear_cross_entropy", (X, W, W), {"z_loss": 1e-4}, "cut-cross-entropy has no z_loss"),
    ],
)
def test_what_a_peer_cannot_do_is_refused_by_name(peer, op, inputs, options, message):
    if peer in ("liger", "cut-cross-entropy"):
        pytest.importorskip({"liger": "liger_kernel"}.get(peer, "cut_cross_entropy"))
    with pytest.raises(KernelError, match=message):
        adapter(peer, op).make()(*inputs, **options)


def test_a_peer_that_is_not_installed_is_named_with_its_package():
    with pytest.raises(ModuleNotFoundError):
        adapter("quack", "rms_norm").make()
    assert adapter("quack", "rms_norm").package == "quack-kernels"
    assert adapter("native", "rms_norm").package == "torch"
