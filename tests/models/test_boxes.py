"""Weights read by the box: of every family, whatever a rank's share is, the same numbers as of the whole tensor, and no others."""

import random

import pytest
import torch
from families import VARIANTS, build

from gigatrain.architectures import from_hf_config
from gigatrain.models import hf
from gigatrain.models.decoder import Decoder


def drawn(shape, random_):
    """A box of a shape: often all of a dim, sometimes nothing."""
    start, size = [], []
    for length in shape:
        first = random_.randrange(length + 1) if random_.random() < 0.5 else 0
        start.append(first)
        size.append(random_.randrange(length - first + 1) if random_.random() < 0.7 else length - first)
    return tuple(start), tuple(size)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_box_is_that_of_the_whole(name, tmp_path):
    build(name).save_pretrained(tmp_path)
    arch = from_hf_config(hf.read_config(tmp_path))
    with torch.device("meta"):
        decoder = Decoder(arch)
    shapes = {name: tuple(one.shape) for name, one in (dict(decoder.named_parameters()) | decoder.corrections()).items()}
    whole = {name: tensor.clone() for name, tensor in hf.read_weights(arch, shapes, tmp_path)}
    for seed in range(6):
        random_ = random.Random(seed)
        boxes = {name: drawn(shape, random_) for name, shape in shapes.items()}
        if seed == 5:
            del boxes[next(iter(whole))]  # one that is read whole beside them
        found = dict(hf.read_weights(arch, shapes, tmp_path, boxes=boxes))
        assert found.keys() == {name for name in whole if name not in boxes or 0 not in boxes[name][1]}, seed
        for at, tensor in found.items():
            expected = whole[at][hf.cut_of(*boxes[at])] if at in boxes else whole[at]
            assert torch.equal(tensor, expected), (seed, at)
