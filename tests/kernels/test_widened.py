"""Widened products against torch's own, which come back when the registration ends."""

import pytest
import torch

from gigatrain.kernels import widened

CALLS = {
    "mm": ((33, 65), (65, 17)),
    "bmm": ((3, 33, 65), (3, 65, 17)),
    "addmm": ((17,), (33, 65), (65, 17)),
    "baddbmm": ((3, 33, 17), (3, 33, 65), (3, 65, 17)),
}


@pytest.fixture
def register():
    """torch's own products until it is called; and afterwards what there was before."""
    before = widened.register.cache_info().currsize

    def end():
        if widened.register.cache_info().currsize:
            widened.register()._destroy()
            widened.register.cache_clear()

    end()
    yield widened.register
    end()
    if before:
        widened.register()


def everything(name, dtype, scales):
    """A product and the gradients of its factors, in one row."""
    torch.manual_seed(0)
    factors = [torch.randn(shape).bfloat16().to(dtype).requires_grad_() for shape in CALLS[name]]
    out = getattr(torch, name)(*factors, **scales)
    out.backward(torch.ones_like(out))
    assert out.dtype == dtype
    return torch.cat([x.detach().flatten() for x in (out, *(factor.grad for factor in factors if factor.grad is not None))])


@pytest.mark.parametrize(
    ("name", "scales"), [(name, {}) for name in CALLS] + [(name, {"beta": 0.5, "alpha": 2.0}) for name in ("addmm", "baddbmm")]
)
def test_widened_products_err_as_torchs_own_and_leave_other_types_alone(register, name, scales):
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    own = {dtype: everything(name, dtype, scales) for dtype in dtypes}
    register()
    wide = {dtype: everything(name, dtype, scales) for dtype in dtypes}
    exact = own[torch.float64]
    assert torch.equal(wide[torch.float64], exact)
    assert torch.equal(wide[torch.float32], own[torch.float32])
    errors = [float((found[torch.bfloat16] - exact).norm()) for found in (own, wide)]
    assert 0 < errors[1] <= 1.05 * errors[0]


def test_what_is_added_zero_times_is_not_read_and_vectors_are_spread(register):
    register()
    nothing = torch.full((4, 4), float("nan"), dtype=torch.bfloat16)
    ones = torch.ones(4, 4, dtype=torch.bfloat16)
    assert (torch.addmm(nothing, ones, ones, beta=0) == 4).all()
    assert (torch.nn.functional.linear(ones, ones, ones[0]) == 5).all()
