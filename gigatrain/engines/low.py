"""The low-precision lane of a plan, put into a model: which of its layers' products are computed in which form."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, distributed, nn

from gigatrain.errors import KernelError, PlanError
from gigatrain.kernels import fp8_experts, fp8_linear, linear
from gigatrain.kernels.fp8_fused import Producers
from gigatrain.kernels.fp8_linear import Delayed, Form, Product, Role, Watch
from gigatrain.models.decoder import MLP, Attention, Layer
from gigatrain.parallel.mesh import Mesh
from gigatrain.planning import products
from gigatrain.planning.plan import Plan


def form_of(plan: products.Products, recompute: str, quantise: str) -> Form:
    """As the kernels take it. Where the input is kept or made again anyway (lean), its transposed codes are made in the backward."""
    return Form(
        plan.scaling,
        plan.gradient,
        plan.power,
        "low" if plan.weight_gradient == "low" else "high",
        plan.fast_accumulation,
        plan.stochastic,
        plan.emulate,
        "fused" if quantise == "fused" else "reference",
        "input" if recompute == "lean" else "codes",
    )


def lower(model: nn.Module, plan: products.Products, recompute: str, quantise: str) -> None:
    """Give each of the model's `Linear`s its product, and what makes their inputs its quantiser. Raises PlanError for one that the plan does not name."""
    form = form_of(plan, recompute, quantise)
    product = Product(form)
    high, lowered = tuple(kept.matrix for kept in plan.high), []
    for name, module in model.named_modules():
        if not isinstance(module, linear.Linear):
            continue
        if name.endswith(plan.low):
            module.product = product
            lowered.append(module)
        elif high and name.endswith(high):
            module.product = linear.reference
        else:
            raise PlanError(
                f'planning/products.py does not know the matrix {name} of this model; set train.precision = "bf16", and report it'
            )
    if plan.amax == "delayed":
        model.delayed = Delayed(form, len(lowered), plan.history)  # type: ignore[assignment]
        for layer, module in enumerate(lowered):
            module.product = functools.partial(product, watch=Watch(model.delayed, layer))  # type: ignore[arg-type]
    if plan.producers:
        _fuse(model, plan, Producers(form))


def _fuse(model: nn.Module, plan: products.Products, producers: Producers) -> None:
    """A layer's operations are those of its two norms alone, whose readers are all quantised products: the plan has looked."""
    for layer in model.modules():
        if not isinstance(layer, Layer):
            continue
        if "norms" in plan.producers:
            assert isinstance(layer.self_attn, Attention)
            assert isinstance(layer.mlp, MLP)
            layer.ops = replace(layer.ops, rms_norm=producers.rms_norm, add_rms_norm=producers.add_rms_norm)
        if "swiglu" in plan.producers and isinstance(layer.mlp, MLP):
            layer.mlp.activation = producers.swiglu


def delayed(models: Iterable[nn.Module], device: torch.device) -> list[Delayed]:
    """The delayed scaling of each stage that has one, placed."""
    found = [scales for model in models if isinstance(scales := getattr(model, "delayed", None), Delayed)]
    for scales in found:
        scales.to(device)
    return found


def largest(mesh: Mesh) -> Callable[[Tensor], None] | None:
    """The largest over all ranks, in place; None where there is one."""
    if mesh.count == 1:
        return None
    return lambda tensor: distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)  # type: ignore[return-value]


def refused(plan: products.Products, device: torch.device) -> str | None:
    """Why the device cannot run the lane; None: it can."""
    if plan.emulate and products.EXPERTS not in plan.low:
        return None
    why = fp8_linear.refused(plan.scaling, device)
    if why is None and products.EXPERTS in plan.low and (lack := fp8_experts.lacking(device)):
        why = f'{lack}; set fp8.high = ["{products.EXPERTS}"]'
    return why


def _differ(mine: fp8_linear.Operand, theirs: fp8_linear.Operand) -> str | None:
    """How two operands differ, bit for bit; None: they do not. Reads values on the host."""
    for what, a, b in (
        ("codes", mine.codes.view(torch.uint8), theirs.codes.view(torch.uint8)),
        ("scales", mine.scales.float(), theirs.scales.float()),
    ):
        if a.shape != b.shape:
            return f"{what} {tuple(a.shape)} and {tuple(b.shape)}"
        if not torch.equal(a, b):
            off = (a != b).nonzero()
            first, least, most = tuple(off[0].tolist()), off.amin(0).tolist(), off.amax(0).tolist()
            within = f"from {least} to {most}"
            return f"{len(off):,} of {a.numel():,} {what} {within}, the first at {first}: {a[first].item():g} and {b[first].item():g}"
    return None


def verify(plan: Plan, device: torch.device) -> None:
    """Compute each kind of matrix's three products once, on random numbers, by the run's kernels and by plain torch's quantiser with products in fp32.

    Codes are equal bit for bit, so that results differ by the sums alone: their error against fp32 products, relative to all of a result, is at most two
    roundings of bf16, 2^-7, or, with the fewer bits of fast sums, 2^-6. Raises KernelError. For the start of a run: it reads values on the host.
    """
    assert plan.fp8 is not None
    found = {choice.op: choice.kernel for choice in plan.kernels}
    form = replace(form_of(plan.fp8, plan.recompute, found["quantise"]), stochastic=False)
    plain = replace(form, quantise="reference", emulate=True)
    generator = torch.Generator(device).manual_seed(0)
    allowed = 2.0**-6 if form.fast else 2.0**-7
    for name, (outputs, inputs) in products.matrices(plan.decoder, plan.mesh).items():
        if name not in plan.fp8.low or name == products.EXPERTS:
            continue
        x, weight, dy = (
            torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            for shape in ((272, inputs), (outputs, inputs), (272, outputs))
        )
        roles: tuple[tuple[Tensor, Role], ...] = ((x, "input"), (weight, "weight"), (dy, "gradient"))
        for tensor, role in roles:
            for mine, theirs in zip(*(fp8_linear.operands(tensor, which, role)[:2] for which in (form, plain)), strict=True):
                if off := _differ(mine, theirs):
                    raise KernelError(
                        f"{name}: the fused quantiser's {role} {tuple(tensor.shape)} is not plain torch's on this device: {off}; set "
                        'kernels.quantise = "reference", and report it with the device and the versions of torch and triton'
                    )
        results = []
        for which in (form, plain):
            leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
            y = Product(which)(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
        for what, mine, theirs in zip(("forward", "input gradient", "weight gradient"), *results, strict=True):
            error = ((mine.double() - theirs.double()).norm() / theirs.double().norm()).item()
            if not error <= allowed:
                raise KernelError(
                    f"{name}: {plan.fp8.scaling}'s {what} errs by {error:.2e} of its size on this device, and may by {allowed:.2e}; set fp8.scaling to "
                    "another, or fp8.emulate = true, and report it with the device and the versions of torch and triton"
                )
