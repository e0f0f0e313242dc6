"""The operations a decoder is built on, as one frozen record: chosen in the plan, handed to the model, never looked up again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from gigatrain.errors import PlanError
from gigatrain.kernels import attention, geglu, linear_cross_entropy, qk_norm_rope, rms_norm, rope, swiglu, xielu

_CHOICES: dict[str, dict[str, Callable[..., Any]]] = {
    "rms_norm": {"reference": rms_norm.reference, "lean": rms_norm.lean},
    "add_rms_norm": {"reference": rms_norm.add_reference, "lean": rms_norm.add_lean},
    "rope": {"reference": rope.reference, "lean": rope.lean},
    "qk_norm_rope": {"reference": qk_norm_rope.reference, "lean": qk_norm_rope.lean},
    "swiglu": {"reference": swiglu.reference},
    "geglu": {"reference": geglu.reference},
    "xielu": {"reference": xielu.reference},
    "attention": {"reference": attention.reference, "sdpa": attention.sdpa, "blocked": attention.blocked},
    "linear_cross_entropy": {"reference": linear_cross_entropy.reference, "chunked": linear_cross_entropy.chunked},
}


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
    return {op: tuple(implementations) for op, implementations in _CHOICES.items()}


def choose(kernels: Mapping[str, str]) -> Ops:
    """The record for a plan's choice of implementation per operation; what it leaves out is `reference`.

    Raises `PlanError` for an operation or an implementation that does not exist.
    """
    if unknown := sorted(set(kernels) - set(_CHOICES)):
        raise PlanError(f"no operation is called {', '.join(unknown)}; there are {', '.join(_CHOICES)}")
    chosen = {}
    for op in (f.name for f in fields(Ops)):
        name = kernels.get(op, "reference")
        if name not in _CHOICES[op]:
            raise PlanError(f"{op} has no implementation {name!r}; choose one of {', '.join(_CHOICES[op])}")
        chosen[op] = _CHOICES[op][name]
    return Ops(**chosen)


REFERENCE = choose({})
