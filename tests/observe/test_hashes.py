"""Any flipped bit in any copy is found, its tensor and rank named, and equal copies never differ."""

import os
import random

import pytest
import torch
from distributed import together

from gigatrain import config
from gigatrain.observe.hashes import CHUNK, SUMS, Shared, _minorities, differ, factor, hash64
from gigatrain.parallel.mesh import AXES, Mesh
from gigatrain.parallel.places import Replica

TRIALS = int(os.environ.get("GIGATRAIN_FLIPS", "1000"))


def flipped(tensor, bit):
    """Flip one bit of a tensor, in place."""
    data = tensor.view(-1).view(torch.uint8)
    data[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.float64])
@pytest.mark.parametrize("count", [1, 3, 7, 64])
def test_every_bit_counts(dtype, count):
    tensor = torch.arange(1, count + 1).to(dtype)
    whole = hash64(tensor).item()
    found = {whole}
    for bit in range(count * dtype.itemsize * 8):
        flipped(tensor, bit)
        found.add(hash64(tensor).item())
        flipped(tensor, bit)
    assert len(found) == 1 + count * dtype.itemsize * 8  # each flip gives its own hash
    assert hash64(tensor).item() == whole


def test_words_that_change_places_count_and_chunks_do_not():
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert len({hash64(tensor.roll(by)).item() for by in range(100)}) == 100
    large = torch.randn(CHUNK + 17, generator=torch.Generator().manual_seed(2))
    words = large.view(torch.int32).long()
    factors = (
        torch.arange(len(words))
        * (2 * 0x9E3779B97F4A7C15 % 2**64 - 2**64 if 2 * 0x9E3779B97F4A7C15 % 2**64 >> 63 else 2 * 0x9E3779B97F4A7C15 % 2**64)
        + 1
    )
    assert hash64(large).item() == (words * factors).sum().item()
    assert hash64(torch.zeros(0)).item() == 0


@pytest.mark.parametrize("count", [2, 3, 4, 7, 1000])
def test_factors_sum_to_nothing_and_are_odd_but_for_one(count):
    for balance in (0, 1):
        found = [factor(index, count, balance) for index in range(count)]
        assert sum(found) % 2**64 == 0
        assert all(one % 2 for index, one in enumerate(found) if index != balance)


AXES_OF = {"norm": ("replicate", "tensor"), "matrix": ("replicate",), "count": AXES}


def copies(axes):
    """Every rank's tensors of a run on a mesh, equal where they should be."""
    ranks = Mesh(axes).count
    meshes = [Mesh(axes, rank) for rank in range(ranks)]
    held = []
    for mesh in meshes:
        box = torch.Generator().manual_seed(1 + mesh.index("tensor") + 8 * mesh.index("pipeline"))
        stage = torch.Generator().manual_seed(100 + mesh.index("pipeline"))
        held.append(
            {
                "matrix": torch.randn(37, generator=box),
                "norm": torch.randn(11, generator=stage).bfloat16(),
                "count": torch.tensor([3, 0, 1, -1]),
            }
        )
    return meshes, held


@pytest.mark.parametrize(
    "sizes", [{"replicate": 2}, {"replicate": 3}, {"replicate": 2, "tensor": 3}, {"replicate": 4, "pipeline": 2, "tensor": 2}], ids=str
)
def test_a_random_flip_in_one_copy_is_always_found(sizes):
    """`TRIALS` flips, each of a random bit of a random tensor of a random rank; GIGATRAIN_FLIPS=100000 for a longer run."""
    meshes, held = copies(config.Mesh(shard=1, **sizes))
    shared = [Shared(mesh) for mesh in meshes]

    def sums(rank):
        return shared[rank].sums(shared[rank].hashes(Replica(name, tensor, AXES_OF[name]) for name, tensor in held[rank].items()))

    each = [sums(rank) for rank in range(len(meshes))]
    total = [sum(column) for column in zip(*each, strict=True)]
    assert len(total) == SUMS
    assert not differ(total)
    drawn = random.Random(5)
    for trial in range(TRIALS):
        rank, name = drawn.randrange(len(meshes)), drawn.choice(list(AXES_OF))
        bit = drawn.randrange(held[rank][name].numel() * held[rank][name].element_size() * 8)
        flipped(held[rank][name], bit)
        assert differ([now - before + whole for now, before, whole in zip(sums(rank), each[rank], total, strict=True)]), (
            trial,
            rank,
            name,
            bit,
        )
        flipped(held[rank][name], bit)


def named(rank, faults):
    mesh = Mesh(config.Mesh(shard=1, replicate=4), rank)
    held = {f"layer {number}": torch.full((5,), float(number)) for number in range(300)}
    for who, name, bit in faults:
        if rank == who:
            flipped(held[name], bit)
    shared = Shared(mesh)
    return shared.find(shared.hashes(Replica(name, tensor, ("replicate",)) for name, tensor in held.items()))


def test_tensor_and_rank_are_named_by_the_majority():
    found = together(4, named, [(2, "layer 17", 3), (0, "layer 250", 159)])
    assert all(one == found[0] for one in found)
    assert sorted((one["name"], one["ranks"], one["copies"]) for one in found[0]) == [("layer 17", [2], 4), ("layer 250", [0], 4)]
    assert together(4, named, [])[0] == []


def test_of_two_copies_both_are_named():
    records = [{"host": "a", "held": [["w", 0, 1]]}, {"host": "b", "held": [["w", 0, 2]]}]
    assert _minorities(records) == [{"name": "w", "ranks": [0, 1], "hosts": ["a", "b"], "copies": 2}]
