"""torch's own attention kernels, which need a GPU: their calls by schema and meta kernels, and the arithmetic around them on stand-ins in plain torch."""

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from gigatrain.errors import KernelError
from gigatrain.kernels import attention, attention_torch
from gigatrain.kernels.attention import Mask, mask

CPU = torch.device("cpu")
reference: Any = attention.reference
end_to_end: Any = attention_torch._end_to_end
flex: Any = attention_torch._flex
ROWS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 7]], dtype=torch.int32)


def inputs(h: int = 4, k: int = 2, d: int = 16, dtype: torch.dtype = torch.float64, t: int = 11) -> Any:
    torch.manual_seed(0)
    return [torch.randn(2, t, heads, d, dtype=dtype, requires_grad=True) for heads in (h, k, k)]


def equal(ours: Tensor, right: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(right)
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(right, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["cudnn", "flash"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_calls_have_the_shapes_of_plain_torch_and_a_backward(name: str, kv_heads: int) -> None:
    """torch's meta kernels: shared key heads go in as they are, and their gradients come back so."""
    leaves = [torch.empty(1, 64, heads, 32, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    out = getattr(attention_torch, f"_{name}")(*leaves, 0.3)
    assert (out.shape, out.dtype) == (leaves[0].shape, torch.bfloat16)
    grads = torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert [x.shape for x in grads] == [x.shape for x in leaves]


def by_documents(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, same: Tensor, most: int, most_k: int, *, scale: float, window_size: Any
) -> Tensor:
    """What varlen_attn is documented to compute: each stretch by itself, causal where the window says (-1 or more, 0)."""
    assert same is starts
    assert starts.dtype == torch.int32
    left, right = window_size
    assert right == 0
    outs = []
    for begin, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        assert end - begin <= most == most_k
        if begin == end:
            continue
        seen = mask(None, None if left < 0 else left + 1, end - begin, q.dtype, q.device)
        outs.append(reference(*(x[None, begin:end] for x in (q, k, v)), seen, scale=scale)[0])
    return torch.cat(outs)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("documents", [None, ROWS])
@pytest.mark.parametrize("ready", [False, True])
def test_documents_laid_end_to_end_are_those_of_the_mask(documents: Tensor | None, window: int | None, ready: bool) -> None:
    leaves = inputs()
    seen = mask(documents, window, 11, torch.float64, CPU, parts=("sequences",) if ready else ())
    equal(end_to_end(by_documents, *leaves, seen, 0.3), reference(*leaves, seen, scale=0.3), leaves)


def test_too_many_documents_are_a_nan_and_not_a_result() -> None:
    leaves = [x.detach()[:1].requires_grad_() for x in inputs(t=9)]
    crowded = mask(torch.arange(9, dtype=torch.int32)[None], None, 9, torch.float64, CPU, parts=("sequences",))
    out = end_to_end(by_documents, *leaves, crowded, 0.3)
    assert out.isnan().any()
    assert not torch.isfinite(out.sum())


def test_varlen_of_this_torch_is_found_and_takes_what_is_given() -> None:
    from torch.nn.attention.varlen import varlen_attn

    found: Any = attention_torch._varlen()
    assert found.func is varlen_attn
    assert found.keywords == {"enable_gqa": True}
    leaves = [torch.empty(2, 64, heads, 32, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, 2, 2)]
    for seen in (Mask(window=8), Mask(torch.zeros(2, 64, dtype=torch.int32, device="meta"), None, sequences=None)):
        ready = dataclasses.replace(seen, sequences=(torch.empty(17, dtype=torch.int32, device="meta"), torch.empty(1, device="meta")))
        assert end_to_end(found, *leaves, ready, 0.3).shape == leaves[0].shape


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("documents", [None, ROWS])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (2.0, True)])
def test_flex_is_given_the_mask_the_cap_and_the_sinks(
    documents: Tensor | None, window: int | None, softcap: float | None, sinks: bool
) -> None:
    """FlexAttention uncompiled, which is plain torch, and on a CPU has no backward."""
    leaves = [x.detach() for x in inputs()]
    sink = torch.randn(4, dtype=torch.float64) if sinks else None
    seen = mask(documents, window, 11, torch.float64, CPU, parts=("tiles",))
    ours = flex(flex_attention, *leaves, seen, 0.3, softcap, sink)
    right = reference(*leaves, seen, scale=0.3, softcap=softcap, sinks_h=sink)
    torch.testing.assert_close(ours.to(right.dtype), right, rtol=1e-5, atol=1e-6)  # its softmax is in fp32
    bare = flex(flex_attention, *leaves, dataclasses.replace(seen, tiles=None), 0.3, softcap, sink)
    assert torch.equal(ours, bare)


def test_a_cap_is_one_function_so_that_nothing_is_compiled_again() -> None:
    assert attention_torch._capped(2.0) is attention_torch._capped(2.0)
    assert attention_torch._causal(11, CPU) is attention_torch._causal(11, CPU)


class _OnGpu:
    """A tensor's face, on a GPU that is not here."""

    is_cuda = True

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype, self.device = shape, dtype, SimpleNamespace(type="cuda")

    def get_device(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("name", "capability", "change", "said"),
    [
        ("cudnn", 9, {}, None),
        ("cudnn", 9, {"documents": True}, "cudnn has no documents"),
        ("cudnn", 9, {"d": 256}, "cudnn takes heads of up to 128 channels, a multiple of 8, not 256 and 256"),
        ("cudnn", 9, {"dtype": torch.float32}, "cudnn takes bf16 and fp16, not torch.float32"),
        ("flash", 8, {"window": 4}, "flash has no windows"),
        ("flash", 8, {"d": 12}, "a multiple of 8, not 12 and 12"),
        ("flash", 8, {"e": 8}, "flash takes values as wide as keys, not 8 and 16"),
        ("flash", 8, {"softcap": 2.0}, "flash has no soft-cap"),
        ("varlen", 8, {"documents": True, "window": 4}, None),
        ("varlen", 8, {"sinks": True}, "varlen has no sinks"),
        ("fa3", 10, {}, "fa3 is for compute capability 9, and this device has 10"),
        ("fa4", 12, {}, "fa4 is for compute capability 9 and 10, and this device has 12"),
        ("fa4", 9, {"documents": True}, None),
        ("flex", 8, {"documents": True, "softcap": 2.0, "sinks": True, "e": 24, "dtype": torch.float32}, None),
        ("flex", 8, {"e": 8}, "flex takes heads of at least 16 channels, not 16 and 8"),
    ],
)
def test_what_a_kernel_takes(name: str, capability: int, change: dict[str, Any], said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_torch, "_capability", lambda index: capability)
    d, dtype = change.get("d", 16), change.get("dtype", torch.bfloat16)
    q, k, v = (_OnGpu((1, 11, heads, width), dtype) for heads, width in ((4, d), (2, d), (2, change.get("e", d))))
    seen = mask(ROWS[:1] if change.get("documents") else None, change.get("window"), 11, torch.bfloat16, CPU)
    given: Any = (name, q, k, v, seen)
    found = attention.supports(*given, softcap=change.get("softcap"), sinks_h=torch.zeros(4) if change.get("sinks") else None)
    assert found == said if said is None else said in str(found)


def test_another_flash_attention_is_activated_once_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(attention_torch, "_active", None)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", started.append)
    monkeypatch.setattr(attention_torch, "_capability", lambda index: 9)
    with pytest.raises(
        KernelError, match=r"fa4 needs flash_attn.cute.interface \(No module named 'flash_attn'\): pip install --pre flash-attn-4, or set"
    ):
        attention_torch.activate("fa4")
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    for _ in range(2):
        attention_torch.activate("fa4")
    assert started == ["FA4"]
    with pytest.raises(KernelError, match="fa4 is active in this process, and its backward would meet fa3; start another"):
        attention_torch.activate("fa3")
    q: Any = _OnGpu((1, 11, 4, 16))
    assert attention_torch.supports("flash", q, q, q, Mask()) == "fa4 has taken the place of flash in this process"
    assert attention_torch.supports("fa4", q, q, q, Mask()) is None


@pytest.mark.parametrize("name", list(attention_torch.LIMITS))
def test_all_refuse_a_cpu_and_name_the_way_out(name: str) -> None:
    q, k, v = (x.detach().bfloat16() for x in inputs())
    with pytest.raises(KernelError, match=f'attention: {name} needs a GPU, not cpu; set kernels.attention = "fused"'):
        attention.VERSIONS[name](q, k, v, Mask(), scale=0.3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["cudnn", "flash", "varlen", "flex", "fused"])
@pytest.mark.parametrize("packed", [False, True])
def test_on_a_gpu_they_err_at_most_twice_as_much_as_plain_torch(name: str, packed: bool) -> None:
    from gigatrain.kernels.ops import checked

    q, k, v = (torch.randn(2, 256, heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (16, 8, 8))
    documents = torch.randint(0, 3, (2, 256), device="cuda").sort(-1).values.int() if packed else None
    chosen = checked({"attention": name}, {})
    seen = chosen.mask(documents, None, 256, torch.bfloat16, torch.device("cuda"))
    if why := attention.supports(name, q, k, v, seen):
        pytest.skip(why)
    chosen.attention(q, k, v, seen, scale=0.125)
