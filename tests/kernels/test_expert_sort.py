"""The order of slots by expert: stable in every configuration, whatever the keys are."""

import pytest
import torch

from gigatrain.errors import KernelError
from gigatrain.kernels import expert_sort, launch

KEYS = {
    "spread": [3, 0, 1, 3, 0, 2, 3, 1] * 40,
    "one": [2] * 150,
    "of no expert": [4, 1, 4, 0, 4] * 30,
    "of no expert at all": [4] * 9,
    "descending": [3] * 70 + [2] * 70 + [1] * 70 + [0] * 70,
    "single": [1],
    "none": [],
}


@pytest.mark.parametrize("configuration", expert_sort.SPACE["expert_sort"], ids=str)
def test_every_configuration_gives_the_right_order(configuration: dict[str, int]) -> None:
    with launch.forced("expert_sort", configuration):
        for keys in KEYS.values():
            given = torch.tensor(keys, dtype=torch.int64)
            for found, expected in zip(expert_sort.fused(given, 4), expert_sort.reference(given, 4), strict=True):
                assert torch.equal(found, expected)


@pytest.mark.parametrize("case", [case for case in expert_sort.CASES if case[-1] == torch.float32], ids=str)
def test_order_place_counts_and_ends_belong_together(case: tuple) -> None:
    torch.manual_seed(0)
    (keys,), _ = expert_sort.OPERATIONS["expert_sort"].sample(case, "cpu")
    order, place, counts, ends = expert_sort.run(keys.int(), case[2])
    assert torch.equal(order, expert_sort.reference(keys, case[2])[0])
    assert torch.equal(order[place], torch.arange(keys.numel()))
    assert counts.tolist() == [int((keys == e).sum()) for e in range(case[2])]
    assert ends.tolist() == counts.cumsum(0).tolist()


def test_the_operator_passes_torchs_own_check() -> None:
    torch.library.opcheck(torch.ops.gigatrain.expert_sort.default, (torch.tensor([[3, 0], [1, 3]]), 4))


def test_refuses_more_than_a_program_holds_or_a_place_counts() -> None:
    with pytest.raises(KernelError, match=r'expert_sort: 1 to 1023 experts .* not 1024, .*; set kernels.expert_sort = "reference"'):
        expert_sort.fused(torch.zeros(4, dtype=torch.int64), 1024)
    keys = torch.zeros(1, dtype=torch.int64)
    assert "fewer than 2^28 keys in int64 or int32, not 4, and 268435456 in" in (expert_sort.supports(keys.expand(2**28), 4) or "")
    assert expert_sort.supports(keys.expand(2**28 - 1), 4) is None
    with pytest.raises(KernelError, match="in int64 or int32, not 4, and 4 in torch.float32"):
        expert_sort.fused(torch.zeros(4), 4)


def test_shipped_configurations_are_ones_that_a_tuner_tries() -> None:
    assert all(found in expert_sort.SPACE["expert_sort"] for found in launch.table("default")["configs"]["expert_sort"].values())
