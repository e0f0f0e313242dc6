"""The operations a decoder is built on, as one frozen record: chosen in the plan, handed to the model, never looked up again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from gigatrain.errors import PlanError
from gigatrain.kernels import attention, geglu, linear_cross_entropy, qk_norm_rope, rms_norm, rope, swiglu, xielu

MODULES = (rms_norm, rope, qk_norm_rope, swiglu, geglu, xielu, attention, linear_cross_entropy)
# Every operation of every kernel file, by name; those that are a field of `Ops` can be chosen for a model.
OPERATIONS = {name: operation for module in MODULES for name, operation in module.OPERATIONS.items()}


@dataclass(frozen=True)
class Ops:
    """One function per operation; the signatures are those of the `reference` in the kernel file of the same name."""

    rms_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    rope: Callable[..., Any]
    qk_norm_rope: Callable[..., Any]
    swiglu: Callable[..., Any]
    geglu: Callable[..., Any]
    xielu: Callable[..., Any]
    attention: Callable[..., Any]
    linear_cross_entropy: Callable[..., Any]


def available() -> dict[str, tuple[str, ...]]:
    """The implementations of each operation, by name; the first is the reference."""
    return {field.name: tuple(OPERATIONS[field.name].versions) for field in fields(Ops)}


def choose(kernels: Mapping[str, str]) -> Ops:
    """The record for a plan's choice of implementation per operation; what it leaves out is `reference`.

    Raises `PlanError` for an operation or an implementation that does not exist.
    """
    known = available()
    if unknown := sorted(set(kernels) - set(known)):
        raise PlanError(f"no operation is called {', '.join(unknown)}; there are {', '.join(known)}")
    chosen = {}
    for op, names in known.items():
        name = kernels.get(op, "reference")
        if name not in names:
            raise PlanError(f"{op} has no implementation {name!r}; choose one of {', '.join(names)}")
        chosen[op] = OPERATIONS[op].versions[name]
    return Ops(**chosen)


REFERENCE = choose({})
