"""The gradient of the embedding: blocks and runs in every arrangement, exact sums, and what went wrong elsewhere."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gigatrain.errors import KernelError
from gigatrain.kernels import embedding, launch

KERNEL = "embedding.backward"


def backward(dy: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    return torch.ops.gigatrain.embedding_backward(dy, ids, vocabulary)


def exact(dy: Tensor, ids: Tensor, vocabulary: int) -> Tensor:
    return torch.zeros(vocabulary, dy.shape[-1], dtype=torch.float64).index_add_(0, ids.flatten().long(), dy.flatten(0, -2).double())


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(got.dtype).eps / 2, atol=1e-5)


def test_operators_pass_torchs_own_check() -> None:
    ids, weight = torch.tensor([[3, 0, 3], [1, 3, 2]]), torch.randn(5, 9)
    torch.library.opcheck(torch.ops.gigatrain.embedding.default, (ids, weight.requires_grad_()))
    torch.library.opcheck(torch.ops.gigatrain.embedding_backward.default, (torch.randn(2, 3, 9), ids, 5))


def test_the_forward_is_torchs() -> None:
    weight = torch.randn(7, 12).bfloat16()
    for ids in (torch.tensor([[6, 0], [3, 3]]), torch.tensor([5], dtype=torch.int32), torch.empty(0, 4, dtype=torch.int64)):
        assert torch.equal(embedding.fused(ids, weight), embedding.reference(ids, weight))


# Four positions a block, so that a few dozen tokens need up to five levels.
TINY = {"positions": 4, "rows": 2, "columns": 16, "warps": 1}
RUNS = {
    "one run over all blocks": [9] * 45,
    "runs of whole blocks": [1] * 4 + [2] * 8 + [3] * 4,
    "a run over an edge between others": [0, 1, 2, 2, 2, 3, 4, 5],
    "a run from the middle of a block to the middle of another": [0, 1] + [2] * 13 + [3],
    "two runs meet at an edge": [0, 0, 0, 0, 1, 1, 1, 1],
    "a block between two runs that cross its edges": [1, 1, 1, 2, 2, 3, 4, 5, 5, 5, 5],
    "distinct": list(range(21)),
    "a tail of one": [0, 1, 2, 3, 3],
    "one": [2],
    "nothing": [],
}


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_runs_and_the_edges_of_blocks(runs: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    ids = torch.tensor(RUNS[runs], dtype=dtype)
    ids = ids[torch.randperm(len(ids))]
    dy = torch.randn(len(ids), 17)
    with launch.forced(KERNEL, TINY):
        close(backward(dy, ids, 22), exact(dy, ids, 22))


@pytest.mark.parametrize("seed", range(8))
def test_random_runs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = (1, 2, 3, 5, 8, 12, 20, 40)[seed]
    ids = torch.randint(0, vocabulary, (50 + seed,), generator=generator)
    ids = ids.where(torch.rand(ids.shape, generator=generator) > 0.2, vocabulary // 2)  # a fifth is padding
    dy = torch.randn(len(ids), 5, generator=generator)
    with launch.forced(KERNEL, TINY):
        close(backward(dy, ids, vocabulary), exact(dy, ids, vocabulary))


def test_every_configuration_gives_the_right_result() -> None:
    """Triton 6691, fla 595682b8: some configurations only were wrong. Warps mean nothing to the interpreter; a tuner checks them too."""
    ids = torch.tensor([5] * 40 + [1, 2, 3, 4, 4, 4, 7] * 2)
    dy = torch.randn(len(ids), 37).bfloat16()
    distinct = {(c["positions"], c["rows"], c["columns"]): c for c in embedding.SPACE[KERNEL]}
    for configuration in distinct.values():
        with launch.forced(KERNEL, configuration):
            close(backward(dy, ids, 9), exact(dy, ids, 9))


def test_shipped_configurations_can_be_tuned_to() -> None:
    assert all(shipped in embedding.SPACE[KERNEL] for shipped in launch.table("default")["configs"][KERNEL].values())


@pytest.mark.parametrize(("tokens", "launches"), [(32, 1), (33, 2), (512, 2), (513, 3), (8192, 3), (65536, 4), (1 << 20, 5)])
def test_a_frequent_token_makes_no_program_long(tokens: int, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches depend on the number of tokens alone, and every program walks one block: nothing waits for the GPU or for one hot token."""
    blocks: list[int] = []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, *arguments, **options: blocks.append(grid[0]))
    backward(torch.empty(1, 8, dtype=torch.bfloat16).expand(tokens, 8), torch.full((tokens,), 3), 5)
    assert len(blocks) == launches
    assert blocks[0] == -(-tokens // 32)
    assert blocks[-1] == 1
    assert sum(blocks[1:]) <= 2 + blocks[0] / 8


def test_sums_do_not_degrade_with_the_number_of_tokens() -> None:
    """In bf16 a sum of ones stops at 256 (torchtitan's and Liger's atomic adds are in the dtype of the weight)."""
    dy = torch.ones(700, 8, dtype=torch.bfloat16)
    assert backward(dy, torch.zeros(700, dtype=torch.int64), 3).tolist() == [[700.0] * 8, [0.0] * 8, [0.0] * 8]


def test_two_runs_are_bitwise_equal() -> None:
    ids, dy = torch.randint(0, 6, (70,)), torch.randn(70, 24)
    assert torch.equal(backward(dy, ids, 6), backward(dy, ids, 6))


def test_the_order_of_the_sum_is_that_of_the_tokens() -> None:
    """The sort is stable: 2 ** 24 + 1 - 2 ** 24 is 0 in fp32, and 1 in other orders."""
    dy = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])
    for others in (0, 3):
        ids = torch.tensor([4, 4, 4] + [7] * others)
        assert backward(torch.cat((dy, torch.ones(others, 1))), ids, 8)[4].item() == 0.0


def test_nan_stays_with_its_token() -> None:
    """Segments by multiplication with 0 and 1 spread NaN and infinity over their block (0 * NaN, transformers PR 45621)."""
    ids, dy = torch.tensor([2, 0, 1, 2, 1]), torch.ones(5, 4)
    dy[1], dy[3, 2] = float("nan"), float("inf")
    got = backward(dy, ids, 4)
    assert got[0].isnan().all()
    assert got[1].tolist() == [2.0] * 4
    assert got[2].tolist() == [2.0, 2.0, float("inf"), 2.0]
    assert got[3].tolist() == [0.0] * 4


def test_ids_that_are_no_rows_write_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward refuses them; a kernel that wrote for them would write into other tensors."""
    ids = torch.tensor([-7, 3, 9, -1, 2, 5, 3, 5, 1 << 40, 9, 9, 9, 9, 9, -1, -1, -1, -1])
    dy = torch.randn(len(ids), 16)
    guarded = torch.zeros(15, 16)  # 5 rows before and behind
    monkeypatch.setattr(embedding.torch, "zeros", lambda *shape, **options: guarded[5:10])
    with launch.forced(KERNEL, TINY):
        got = backward(dy, ids, 5)
    monkeypatch.undo()
    here = (ids >= 0) & (ids < 5)
    close(got, exact(dy[here], ids[here], 5))
    assert not guarded[:5].any()
    assert not guarded[10:].any()


def test_rows_beyond_two_billion_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """32-bit id * hidden and token * stride overflow (Liger 803, PR 1296, Unsloth PR 3614). Untouched pages are never committed."""
    stride, vocabulary = (1 << 30) + 8, (1 << 25) + 3
    dy = torch.empty(2 * stride + 64, dtype=torch.bfloat16).as_strided((3, 64), (stride, 1))
    dy.copy_(torch.randn(3, 64))
    ids = torch.tensor([vocabulary - 1, 3, vocabulary - 1])
    monkeypatch.setattr(embedding.torch, "zeros", torch.empty)
    got = backward(dy, ids, vocabulary)
    monkeypatch.undo()
    assert torch.equal(got[vocabulary - 1], (dy[0].float() + dy[2].float()).bfloat16())
    assert torch.equal(got[3], dy[1])


def grads(function: Any, ids: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(function(ids, weight, **options).float().square().sum(), weight)[0]


def test_gradients_are_those_of_the_reference() -> None:
    ids, weight = torch.randint(0, 9, (3, 20)), torch.randn(9, 33, requires_grad=True)
    torch.testing.assert_close(grads(embedding.fused, ids, weight), grads(embedding.reference, ids, weight))
    torch.testing.assert_close(grads(embedding.fused, ids.T, weight), grads(embedding.reference, ids.T, weight))


def test_an_expanded_gradient_is_read_as_it_is() -> None:
    """loss.sum().backward() gives strides of 0 (ROCm TE PR 623)."""
    ids, weight = torch.tensor([1, 1, 4]), torch.randn(5, 8, requires_grad=True)
    embedding.fused(ids, weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [0, 2, 0, 0, 1]


def test_the_backward_can_run_twice_and_in_a_checkpoint() -> None:
    ids, weight = torch.randint(0, 9, (40,)), torch.randn(9, 16).bfloat16().requires_grad_()
    y = embedding.fused(ids, weight)
    first, second = (torch.autograd.grad(y, weight, y.detach(), retain_graph=True)[0] for _ in range(2))
    again = checkpoint(embedding.fused, ids, weight, use_reentrant=False)
    assert isinstance(again, Tensor)
    assert torch.equal(first, second)
    assert torch.equal(first, torch.autograd.grad(again, weight, y.detach())[0])


def test_a_frozen_table_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = torch.randn(9, 16), torch.ones(16, requires_grad=True)
    monkeypatch.setattr(launch, "launch", lambda *_, **__: pytest.fail("launched"))
    (embedding.fused(torch.tensor([1, 2]), weight) * scale).sum().backward()
    with torch.no_grad():
        assert not embedding.fused(torch.tensor([1]), weight.requires_grad_()).requires_grad


def test_under_compile_it_is_one_graph() -> None:
    ids, weight = torch.randint(0, 9, (12,)), torch.randn(9, 16, requires_grad=True)
    compiled = torch.compile(embedding.fused, fullgraph=True, backend="aot_eager")
    assert torch.equal(grads(compiled, ids, weight), grads(embedding.fused, ids, weight))


def test_refusals_say_why() -> None:
    ids, weight = torch.tensor([1]), torch.randn(5, 8)
    with pytest.raises(KernelError, match=r'embedding: ids must be int64 or int32 .*float64; set kernels.embedding = "reference"'):
        embedding.fused(ids, weight.double())
    with pytest.raises(KernelError, match="not torch.int16 and torch.float32"):
        embedding.fused(ids.short(), weight)
    with pytest.raises(KernelError, match=r"ids on cpu do not fit a weight \(8,\) on cpu"):
        embedding.fused(ids, weight[0])
    assert torch.equal(embedding.embedding(ids, weight), weight[ids])
