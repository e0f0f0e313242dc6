"""Products in bf16 on a processor that has none (AVX2 alone): widened to fp32, multiplied there, and rounded once.

torch has no product of its own for bf16 there, only loops. One EPYC core, torch 2.13: a product of 1,024 runs at 0.9 GFLOP/s, in fp32 at 69. Both sum in
fp32 and round each result once, so that results differ by the order of a sum: 7 of 100,000 elements by their last bit, at the same error (1.66e-3 of the
norm against fp64, [2048, 192] x [192, 512]). Registered for the whole process, products of optimizers, of transformers' models and of DeepSpeed are widened
too. Not yet widened are products into a tensor that is there already (`out=`); nor is what Inductor compiles, nor torch's own attention (`sdpa`, which a plan
takes beyond 2,048 tokens, and transformers): widened from around it, it would keep twice the bytes for its backward.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


@functools.cache
def needed() -> bool:
    """Whether this machine's processor lacks products in bf16, as far as oneDNN knows."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def register() -> torch.library.Library:
    """Put widened products in the place of torch's own for bf16 on CPUs; those of other types run as ever, by one call of Python more."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # it is meant
        for name in PRODUCTS:
            library.impl(name, _widened(getattr(torch.ops.aten, name).out), "CPU")
    return library


def _widened(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def multiply(*factors: Tensor, **scales: Any) -> Tensor:
        first = factors[0]
        if first.dtype != torch.bfloat16:
            return product(*factors, **scales, out=first.new_empty(0))
        return product(*(x.float() for x in factors), **scales, out=first.new_empty(0, dtype=torch.float32)).bfloat16()

    return multiply
