"""Triton's CPU interpreter, corrected where it is silently wrong: import this before the first kernel.

Triton 3.9's interpreter multiplies the bit patterns of bf16 operands in tl.dot, truncates fp32 to bf16 where a GPU rounds to nearest even, and drops the
carry when it rounds to fp8. Here every cast from or to bf16 and fp8 is torch's, and tl.dot widens its operands first.
"""

import inspect
import math
import os
import types
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
_NARROW = {tl.bfloat16, tl.float8e4nv, tl.float8e5, tl.float8e4b8, tl.float8e5b16}  # held by the interpreter as unsigned integers


def _cast(value, to):
    """A handle of another float type, rounded as torch rounds."""
    data = torch.from_numpy(np.ascontiguousarray(value.data))
    data = data.view(_TORCH[value.dtype.scalar]) if value.dtype.scalar in _NARROW else data
    result = data.to(_TORCH[to])
    result = result.view({1: torch.uint8, 2: torch.uint16}[result.element_size()]) if to in _NARROW else result
    return TensorHandle(result.numpy().view(interpreter._get_np_dtype(to)).reshape(value.data.shape), to)


def _both(value, to):
    kinds = {value.dtype.scalar, to.scalar}
    return kinds <= set(_TORCH) and bool(kinds & _NARROW)


_plain_cast, _plain_round, _plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot


def cast_impl(self, value, to):
    return _cast(value, to.scalar) if _both(value, to) else _plain_cast(self, value, to)


def create_fp_to_fp(self, value, to, mode):
    down = mode is not None and "RTZ" in str(mode)
    return _cast(value, to.scalar) if _both(value, to) and not down else _plain_round(self, value, to, mode)


def create_dot(self, a, b, c, *rest):
    a, b = (_cast(x, tl.float32) if x.dtype.scalar in _NARROW else x for x in (a, b))
    return _plain_dot(self, a, b, c, *rest)


for _name, _replacement in (("cast_impl", cast_impl), ("create_fp_to_fp", create_fp_to_fp), ("create_dot", create_dot)):
    assert hasattr(InterpreterBuilder, _name), f"triton's interpreter has no {_name}: is the correction still needed?"
    setattr(InterpreterBuilder, _name, _replacement)


# ---- Faster: what the interpreter does again at every call of a function within a kernel, it does once ----

_plain_patch, _plain_type = interpreter._patch_lang, interpreter._get_np_dtype
_BOTH = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
_builtins: dict[int, list[tuple[str, object]]] = {}
_patched: list[bool] = []  # while a kernel runs
_types: dict[Any, np.dtype] = {}
_POINTER = np.dtype(np.uint64)


class _Scope(interpreter._LangPatchScope):
    def restore(self) -> None:
        super().restore()
        _patched.clear()


def _patch_lang(function):
    """As triton's, but for both modules that kernels and the language's own functions see, and once for a kernel and all that it calls."""
    if _patched:
        return interpreter._LangPatchScope()
    scope = _plain_patch(_BOTH)
    scope.__class__ = _Scope
    _patched.append(True)
    return scope


def _patch_builtin(module, builder, scope):
    found = _builtins.get(id(module))
    if found is None:
        found = _builtins[id(module)] = [(name, one) for name, one in inspect.getmembers(module) if tl.core.is_builtin(one)]
    for name, one in found:
        interpreter._patch_attr(module, name, one, builder, scope)


def _get_np_dtype(type_):
    if isinstance(type_, tl.block_type):
        type_ = type_.element_ty
    if isinstance(type_, tl.pointer_type):
        return _POINTER
    found = _types.get(type_.name)
    if found is None:
        found = _types[type_.name] = _plain_type(type_)
    return found


# Whether a sum of integers leaves its type is computed with a dozen tensors, and looked at only where the interpreter is told to debug, which it is not.
assert hasattr(interpreter.interpreter_semantic, "binary_op_sanitize_overflow_impl")
interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = lambda lhs, rhs, binary_op: None

_plain_block, _plain_cast_to, _plain_broadcast = tl.block_type.__init__, TritonSemantic.cast, TritonSemantic.broadcast_impl_value
_plain_unwrap, _plain_equal = tl.core._unwrap_if_constexpr, tl.core.tuple.__eq__
_blocks: dict[tuple[Any, ...], dict] = {}  # what a type of a block is made of; holds its element's type, so that the key stays its own
_shapes: dict[tuple[int, ...], Any] = {}  # one object for each shape, so that `is` can tell
_SCALAR = (tl.core.tuple([]), tl.constexpr(1))
_AS_THEY_ARE = frozenset({int, float, bool, str, type(None), tl.tensor, tl.dtype, tl.block_type, tl.pointer_type})


def block_type(self, element_ty, shape):
    key = (id(element_ty), id(shape)) if type(shape) is tl.core.tuple else (id(element_ty), tuple(shape))
    found = _blocks.get(key)
    if found is None:
        _plain_block(self, element_ty, shape)  # type: ignore[arg-type]
        sizes = tuple(self.shape)
        self.shape = _shapes.setdefault(sizes, self.shape)
        self.told = tl.core.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))
        _blocks[key] = {**vars(self), "key": (element_ty, shape)}
    else:
        vars(self).update(found)


def tensor(self, handle, type):
    """As triton's, whose shape and count of elements are made once for each shape."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.told if type.is_block() else _SCALAR


def cast(self, input, dst_ty, fp_downcast_rounding=None):
    return (
        input if input.type.scalar is dst_ty and fp_downcast_rounding is None else _plain_cast_to(self, input, dst_ty, fp_downcast_rounding)
    )


def broadcast_impl_value(self, lhs, rhs):
    one, other = lhs.type, rhs.type
    alike = type(one) is type(other) is tl.block_type and one.shape is other.shape
    return (lhs, rhs) if alike else _plain_broadcast(self, lhs, rhs)


def unwrap(value):
    kind = type(value)
    return value if kind in _AS_THEY_ARE else value.value if kind is tl.constexpr else _plain_unwrap(value)


def equal(self, other):
    return tl.constexpr(True) if self is other else _plain_equal(self, other)


TritonSemantic.cast = cast  # type: ignore[method-assign]
TritonSemantic.broadcast_impl_value = broadcast_impl_value  # type: ignore[method-assign]
tl.core._unwrap_if_constexpr = unwrap
tl.core.tuple.__eq__ = equal  # type: ignore[method-assign]
tl.block_type.__init__ = block_type  # type: ignore[method-assign]
tl.tensor.__init__ = tensor  # type: ignore[method-assign]

for _name in ("_patch_lang", "_patch_builtin", "_get_np_dtype"):
    assert hasattr(interpreter, _name), f"triton's interpreter has no {_name}: is it slow still?"
    setattr(interpreter, _name, globals()[_name])
