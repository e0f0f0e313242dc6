"""The operations a decoder is built on, as one frozen record: chosen in the plan, handed to the model, never looked up again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from gigatrain.errors import KernelError, PlanError
from gigatrain.kernels import (
    adamw,
    attention,
    cross_entropy,
    dropout_add,
    embedding,
    expert_sort,
    fp8,
    fp8_fused,
    geglu,
    grad_norm,
    linear,
    linear_cross_entropy,
    moe,
    newton_schulz,
    qk_norm_rope,
    relu2,
    rms_norm,
    rope,
    router,
    swiglu,
    xielu,
)

MODULES = (
    embedding,
    rms_norm,
    rope,
    qk_norm_rope,
    swiglu,
    geglu,
    relu2,
    xielu,
    dropout_add,
    linear,
    router,
    expert_sort,
    fp8,
    fp8_fused,
    moe,
    attention,
    cross_entropy,
    linear_cross_entropy,
    newton_schulz,
    adamw,
    grad_norm,
)
# Every operation of every kernel file, by name; those that are a field of `Ops` can be chosen for a model.
OPERATIONS = {name: operation for module in MODULES for name, operation in module.OPERATIONS.items()}


_mask = attention.mask


def _alone(sums: Tensor) -> Tensor:
    return sums


@dataclass(frozen=True)
class Ops:
    """One function per operation; the signatures are those of the `reference` in the kernel file of the same name."""

    embedding: Callable[..., Any]
    rms_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    rope: Callable[..., Any]
    qk_norm_rope: Callable[..., Any]
    swiglu: Callable[..., Any]
    geglu: Callable[..., Any]
    relu2: Callable[..., Any]
    xielu: Callable[..., Any]
    dropout_add: Callable[..., Any]
    linear: Callable[..., Any]  # of the layers' matrices; not the head's, the router's or the experts'
    router: Callable[..., Any]
    expert_sort: Callable[..., Any]  # of slots, where experts are on other ranks than their tokens
    moe: Callable[..., Any]  # all of a mixture of experts behind its router
    experts: Callable[..., Any]  # its part that remains where experts are on other ranks than their tokens
    attention: Callable[..., Any]
    linear_cross_entropy: Callable[..., Any]
    mask: Callable[..., Any] = _mask  # who sees whom, with what the chosen `attention` reads of it; replaced together with it
    together: Callable[..., Any] = _alone  # sums over the ranks that share a sample, with gradients; not chosen, but replaced by parallel/


def available() -> dict[str, tuple[str, ...]]:
    """The implementations of each operation, by name; the first is the reference."""
    return {field.name: tuple(OPERATIONS[field.name].versions) for field in fields(Ops) if field.name in OPERATIONS}


def choose(kernels: Mapping[str, str]) -> Ops:
    """The record for a plan's choice of implementation per operation; what it leaves out is `reference`, and what is not the model's is checked only.

    Raises `PlanError` for an operation or an implementation that does not exist.
    """
    known = {name: (*operation.versions, *operation.narrow) for name, operation in OPERATIONS.items()}
    if unknown := sorted(set(kernels) - set(known)):
        raise PlanError(f"no operation is called {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = {}
    for op, names in known.items():
        name = kernels.get(op, "reference")
        if name not in names:
            raise PlanError(f"{op} has no implementation {name!r}; choose one of {', '.join(names)}")
        chosen[op] = OPERATIONS[op].version(name)
    record = {field.name: chosen[field.name] for field in fields(Ops) if field.name in chosen}
    return Ops(**record, mask=attention.MASKS[kernels.get("attention", "reference")])


REFERENCE = choose({})


def checked(kernels: Mapping[str, str], worst: dict[str, float]) -> Ops:
    """As `choose`, with every call of a fused version, and of any attention but plain torch, first judged on its own inputs: outputs and gradients against
    fp64 and plain torch.

    `worst` receives each operation's largest error as a multiple of what is allowed: twice plain torch's in the same dtype and one rounding of the
    result. For a start on a GPU that the kernels have not met, and never within a run: every call costs three evaluations and a synchronisation.
    Raises `KernelError` where the multiple is above 1, or not a number.
    """
    chosen = choose(kernels)

    def judged(op: str, name: str, version: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any, **options: Any) -> Any:
            found = _multiple(OPERATIONS[op].versions["reference"], version, inputs, options)
            worst[op] = max(worst.get(op, 0.0), found)
            if not found <= 1.0:
                raise KernelError(
                    f"{op} {name} errs {found:.3g} times as much as it may on this device, on inputs {_shapes(inputs)}; "
                    f'set kernels.{op} = "reference", and report it with the device and the versions of torch and triton'
                )
            return version(*inputs, **options)

        return call

    foreign = {op: name for op, name in kernels.items() if name in ("fused", "glued") or (op == "attention" and name != "reference")}
    return replace(chosen, **{op: judged(op, name, getattr(chosen, op)) for op, name in foreign.items() if hasattr(chosen, op)})


def _multiple(reference: Callable[..., Any], version: Callable[..., Any], inputs: Sequence[Any], options: Mapping[str, Any]) -> float:
    """The largest error of an output or gradient over what is allowed."""
    results = []
    count, whole = len(inputs), [*inputs, *options.values()]  # options such as sinks too, whose gradients count
    for function, wide in ((version, False), (reference, False), (reference, True)):
        given = [x.detach() if isinstance(x, Tensor) else x for x in whole]
        given = [x.double() if wide and isinstance(x, Tensor) and x.is_floating_point() else x for x in given]
        leaves = [x.requires_grad_() for x, was in zip(given, whole, strict=True) if isinstance(was, Tensor) and was.requires_grad]
        with torch.enable_grad():
            outputs = function(*given[:count], **dict(zip(options, given[count:], strict=True)))
            outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor) and o.requires_grad]
            grads = [torch.linspace(-1.0, 2.0, o.numel(), device=o.device, dtype=torch.float64).view(o.shape).to(o.dtype) for o in outputs]
            found = torch.autograd.grad(outputs, leaves, grads) if outputs else ()
        results.append([*(o.detach() for o in outputs), *found])
    multiples = [0.0]
    for ours, plain, exact in zip(*results, strict=True):
        rounding = torch.finfo(plain.dtype).eps * exact.norm()
        allowed = 2.0 * (plain.double() - exact).norm() + rounding
        error = (ours.double() - exact).norm()
        multiples.append((error / allowed).item() if error else 0.0)
    return max(multiples, key=lambda m: float("inf") if m != m else m)  # noqa: PLR0124 (not a number is the worst)


def _shapes(inputs: Sequence[Any]) -> str:
    return ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in inputs if isinstance(x, Tensor))
