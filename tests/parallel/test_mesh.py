"""Ranks, coordinates and groups."""

import pytest
import torch
from distributed import together
from torch import distributed

from gigatrain import config
from gigatrain.parallel.mesh import AXES, Mesh
from gigatrain.parallel.places import Place, chunk


@pytest.mark.parametrize(
    "sizes", [{"shard": 8}, {"replicate": 2, "shard": 4, "expert": 2, "tensor": 2}, {"pipeline": 2, "shard": 2, "context": 2, "tensor": 2}]
)
def test_every_rank_has_one_place_and_every_group_its_members(sizes):
    axes = config.Mesh(**sizes)
    count = Mesh(axes).count
    meshes = [Mesh(axes, rank) for rank in range(count)]
    assert len({tuple(mesh.at.items()) for mesh in meshes}) == count
    for mesh in meshes:
        assert mesh.ranks(*AXES) == list(range(count))
        for axis in AXES:
            ranks = mesh.ranks(axis)
            assert ranks[mesh.index(axis)] == mesh.rank
            assert all(meshes[rank].ranks(axis) == ranks for rank in ranks)
        together_ = mesh.ranks("shard", "tensor")
        assert together_[mesh.index("shard", "tensor")] == mesh.rank
        assert mesh.data[1] == axes.replicate * (axes.shard or 1)
    assert {mesh.data[0] for mesh in meshes} == set(range(meshes[0].data[1]))


def _groups(rank):
    mesh = Mesh(config.Mesh(replicate=2, shard=2), rank)
    hybrid = mesh.torch(("shard",), ("replicate",))
    assert hybrid.shape == (2, 2)
    assert list(hybrid.get_coordinate() or ()) == [rank // 2, rank % 2]
    sums = [mesh.sum(torch.tensor([float(rank)]), *axes).item() for axes in ((), ("shard",), ("replicate",), ("tensor",))]
    assert mesh.group("tensor") is None
    assert distributed.get_process_group_ranks(mesh.group("replicate")) == [rank % 2, rank % 2 + 2]
    return sums


def test_groups_sum_along_their_axes():
    assert together(4, _groups) == [[6, 1, 2, 0], [6, 1, 4, 1], [6, 5, 2, 2], [6, 5, 4, 3]]


def test_a_box_of_a_box():
    whole = torch.arange(24).view(4, 6)
    place = Place((4, 6), (0, 0), (4, 6)).cut(1, 3, 3).cut(0, 2, 2)
    assert torch.equal(place.of(whole), whole[2:4, 3:6])


@pytest.mark.parametrize(("size", "count"), [(7, 3), (4, 4), (2, 4), (10, 4)])
def test_chunks_are_those_of_torch(size, count):
    parts = [chunk(size, index, count) for index in range(count)]
    pieces = torch.arange(size).chunk(count)
    assert [part.tolist() for part in pieces] == [list(range(start, start + length)) for start, length in parts if length]
