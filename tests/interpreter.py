"""Triton's CPU interpreter, corrected where it is silently wrong: import this before the first kernel.

Triton 3.9's interpreter multiplies the bit patterns of bf16 operands in tl.dot, truncates fp32 to bf16 where a GPU rounds to nearest even, and drops the
carry when it rounds to fp8. Here every cast from or to bf16 and fp8 is torch's, and tl.dot widens its operands first.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported

import numpy as np
import torch
import triton.language as tl
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
