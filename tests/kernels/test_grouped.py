"""The Triton kernels of a mixture of experts: tiles, every configuration, memory that held something else, and sums in a fixed order."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gigatrain.kernels import expert_sort, grouped, launch, moe

VERSIONS = {"fused": (moe.fused, moe.experts_fused), "glued": (moe.glued, moe.experts_glued)}
# By the tokens' experts: tails of 1 and 31 and 33 rows, no tokens, all on one expert, experts without tokens at either end.
CHOICES = {
    "none": [],
    "one token": [[2, 0]],
    "31": [[n % 5, (n + 2) % 5] for n in range(31)],
    "33": [[n * n % 5, (n * n + 1 + n % 3) % 5] for n in range(33)],
    "one expert": [[3]] * 33,
    "the first and the last": [[0, 4]] * 17,
    "neither the first nor the last": [[1, 3]] * 16,
}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch.empty gives is full of what is not a number, and the largest integers."""
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore


def drawn(
    chosen: list[list[int]], activation: str, dtype: torch.dtype = torch.float32, hidden: int = 24, width: int = 40
) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """x, weights, gate_up, down and biases of 5 experts; the choice; and the keywords."""
    torch.manual_seed(0)
    visits, wide = len(chosen[0]) if chosen else 2, 2 * width
    shapes = (len(chosen), hidden), (len(chosen), visits), (5, wide, hidden), (5, hidden, width), (5, wide), (5, hidden)
    x, weights, *rest = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return [x, weights.float(), *rest], torch.tensor(chosen, dtype=torch.int64).view(-1, visits), {"activation": activation}


def outcome(block: Callable[..., Tensor], tensors: list[Tensor], chosen: Tensor, keywords: dict[str, Any]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    x, weights, gate_up, down, *biases = leaves
    y = block(x, weights, chosen, gate_up, down, gate_up_bias_ef=biases[0], down_bias_ed=biases[1], **keywords)
    grad = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def close(ours: list[Tensor], tensors: list[Tensor], chosen: Tensor, keywords: dict[str, Any]) -> None:
    """The error is at most twice plain torch's, and a rounding."""
    exact = outcome(moe.reference, [t.double() for t in tensors], chosen, keywords)
    plain = outcome(moe.reference, tensors, chosen, keywords)
    for e, p, o in zip(exact, plain, ours, strict=True):
        rounding = torch.finfo(o.dtype).eps * (1 if o.numel() >= 64 else 8)  # the error of a few numbers says more about luck
        assert (o.double() - e).norm() <= 2 * (p.double() - e).norm() + rounding * e.norm()


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("counts", [[0, 0, 0], [16, 0, 17], [1, 64, 65], [0, 200, 0]])
def test_tiles_cover_each_experts_rows_and_no_others(counts: list[int], rows: int) -> None:
    ends = torch.tensor(counts).cumsum(0).int()
    with launch.forced("moe.tiles", {"rows": rows}):
        at = grouped.tiles(ends, 230, 2048)
    assert at.count == -(-230 // rows) + 3
    starts = [0, *ends.tolist()]
    expected = [(e, first) for e in range(3) for first in range(starts[e], starts[e + 1], rows)]
    found = list(zip(at.expert_t.tolist(), at.first_t.tolist(), strict=True))
    assert found[: len(expected)] == expected
    assert all(expert == -1 for expert, _ in found[len(expected) :])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("choice", CHOICES)
def test_memory_that_held_something_else_changes_nothing(choice: str, version: str, poisoned: None) -> None:
    tensors, chosen, keywords = drawn(CHOICES[choice], "swiglu")
    found = outcome(VERSIONS[version][0], tensors, chosen, keywords)
    assert all(t.isfinite().all() for t in found)
    close(found, tensors, chosen, keywords)
    unvisited = [e for e in range(5) if e not in chosen]
    assert all(not gradient[unvisited].any() for gradient in found[3:])


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_behind_the_counts_poison_nothing(version: str, poisoned: None) -> None:
    """pytorch 154557: they are undefined on the way in and on the way back."""
    (x, _, *weights), _, keywords = drawn([[0]] * 40, "clamped_swiglu")
    counts, results = torch.tensor([17, 0, 3, 0, 11]), []
    for rest in (0, 9):
        leaves = [t.clone().requires_grad_() for t in (torch.cat((x[:31], torch.full((rest, 24), torch.nan))), *weights)]
        y = VERSIONS[version][1](leaves[0], counts, *leaves[1:3], gate_up_bias_ef=leaves[3], down_bias_ed=leaves[4], **keywords)
        assert y.shape == (31 + rest, 24)
        dy = torch.full_like(y, torch.nan)
        dy[:31] = torch.linspace(-1, 2, 31 * 24).view(31, 24)
        grads = torch.autograd.grad(y, leaves, dy)
        results.append([y.detach()[:31], grads[0][:31], *grads[1:]])
    for without, given in zip(*results, strict=True):
        assert without.isfinite().all()
        assert torch.equal(without, given)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twice_is_bitwise_the_same_and_a_second_backward_is_too(version: str, dtype: torch.dtype) -> None:
    tensors, chosen, keywords = drawn(CHOICES["33"], "clamped_swiglu", dtype)
    found = [outcome(VERSIONS[version][0], tensors, chosen, keywords) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = VERSIONS[version][0](*leaves[:2], chosen, *leaves[2:4])  # type: ignore
    first, second = (torch.autograd.grad(y.square().sum(), leaves[:4], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_parts_beyond_32_bits() -> None:
    """Of the third block of columns, which begins 2^31 + 32 elements behind the first; 2^32 before it lies memory too, which is not to be read."""
    rows = 2**30 + 16
    parts = torch.empty(2**31 + 3 * rows, dtype=torch.int8)[2**31 :].view(3, rows)  # only touched pages exist
    parts[:, :2] = torch.tensor([[1, 2], [10, 20], [100, 50]])
    out, nothing = torch.empty(2), torch.empty(0)
    sizes = {"BIASED": False, "ROWS": 2, "COLUMNS": 16}
    launch.launch(grouped._visit_gradient, (1,), parts, torch.tensor([1, 0]), nothing, nothing, nothing, out, 1, 3, rows, 16, **sizes)
    assert out.tolist() == [72.0, 111.0]


def _distinct(kernel: str) -> list[dict[str, int]]:
    """Warps and stages mean nothing to the interpreter; a tuner checks them too."""
    return list({tuple(v for k, v in c.items() if k not in ("warps", "stages")): c for c in grouped.SPACE[kernel]}.values())


@pytest.mark.parametrize("kernel", list(grouped.SPACE))
def test_every_configuration_gives_the_right_result(kernel: str) -> None:
    """Triton 6691, fla 595682b8: some configurations only were wrong."""
    # Two turns of the longest steps, over channels and over an expert's rows, and two blocks of the widest columns, all but the last with tails.
    tensors, chosen, keywords = drawn([[1]] * 66 + [[3]] * 2, "swiglu", hidden=72, width=136)
    version = moe.glued if kernel == "moe.glue" else moe.fused
    with contextlib.ExitStack() as others:  # few and large tiles, which are fastest to interpret
        for other in grouped.SPACE:
            others.enter_context(launch.forced(other, launch.table("default")["configs"][other]["2048"]))
        others.enter_context(launch.forced("moe.tokens", {"rows": 4, "columns": 256, "warps": 4}))
        for configuration in _distinct(kernel):
            with launch.forced(kernel, configuration):
                close(outcome(version, tensors, chosen, keywords), tensors, chosen, keywords)
    for table in ("default", "sm_90", "sm_100", "gfx942"):
        assert all(shipped in grouped.SPACE[kernel] for shipped in launch.table(table)["configs"].get(kernel, {}).values())


@pytest.mark.parametrize(("glued", "biased"), [(False, True), (True, False)])
def test_operators_pass_torchs_own_check(glued: bool, biased: bool) -> None:
    (x, weights, gate_up, down, *biases), chosen, _ = drawn([[1, 4], [4, 0], [2, 1]], "swiglu")
    given = biases if biased else [None, None]
    leaves = [None if t is None else t.clone().requires_grad_() for t in (gate_up, down, *given)]
    torch.library.opcheck(torch.ops.gigatrain.moe.default, (x.requires_grad_(), weights.requires_grad_(), chosen, *leaves, False, glued))
    order, _, counts, _ = expert_sort.run(chosen, 5)
    rows = x.detach()[order // 2]
    torch.library.opcheck(torch.ops.gigatrain.experts.default, (rows.clone().requires_grad_(), counts, *leaves, True, glued))
    plain = [x.detach(), weights.detach(), chosen, gate_up, down, *given]
    _, *kept = torch.ops.gigatrain.moe(*plain, False, glued)
    torch.library.opcheck(torch.ops.gigatrain.moe_backward.default, (torch.ones_like(x.detach()), *plain, *kept, False, glued))
    _, *kept = torch.ops.gigatrain.experts(rows, counts, gate_up, down, *given, False, glued)
    torch.library.opcheck(
        torch.ops.gigatrain.experts_backward.default, (torch.ones_like(rows), rows, gate_up, down, *given, *kept, False, glued)
    )


def test_a_gradient_without_strides_and_a_gradient_of_the_weights_alone() -> None:
    tensors, chosen, _ = drawn(CHOICES["31"], "swiglu")
    found = []
    for block in (moe.reference, moe.fused, moe.glued):
        x, weights, gate_up, down = (t.clone() for t in tensors[:4])
        weights.requires_grad_()
        block(x, weights, chosen, gate_up, down).sum().backward()
        found.append(weights.grad)
    for grad in found[1:]:
        torch.testing.assert_close(grad, found[0], rtol=1e-4, atol=1e-4)
