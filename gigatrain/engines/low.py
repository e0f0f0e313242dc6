"""The low-precision lane of a plan, put into a model: which of its layers' products are computed in which form."""

from torch import nn

from gigatrain.errors import PlanError
from gigatrain.kernels import linear
from gigatrain.kernels.fp8_linear import Form, Product
from gigatrain.planning import products


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


def lower(model: nn.Module, plan: products.Products, recompute: str, kernels: dict[str, str]) -> None:
    """Give each of the model's `Linear`s its product. Raises PlanError for one that the plan does not name."""
    product = Product(form_of(plan, recompute, kernels["quantise"]))
    high = tuple(kept.matrix for kept in plan.high)
    for name, module in model.named_modules():
        if not isinstance(module, linear.Linear):
            continue
        if name.endswith(plan.low):
            module.product = product
        elif name.endswith(high):
            module.product = linear.reference
        else:
            raise PlanError(f'planning/products.py does not know the matrix {name} of this model; set train.precision = "bf16", and report it')
