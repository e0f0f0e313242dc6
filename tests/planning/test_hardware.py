"""The table of accelerators: every id a site may name, sources everywhere, unknown stays unknown, and what others read from it."""

from typing import get_args

import pytest

from gigatrain import load
from gigatrain.errors import PlanError, SiteError
from gigatrain.planning import hardware
from gigatrain.planning.plan import plan
from gigatrain.site import Accelerator, Figure


def test_the_table_has_what_a_site_may_name():
    assert tuple(hardware.CHIPS) == get_args(Accelerator)
    with pytest.raises(SiteError, match='did you mean "mi250x"'):
        hardware.chip("mi250")


@pytest.mark.parametrize("chip", hardware.CHIPS.values(), ids=lambda chip: chip.id)
def test_numbers_are_of_the_units_they_say(chip):
    """Dense rates double or stay the same from one width to the next; what is reached is below what is promised; bytes are of memory and not GB."""
    known = {name: value.value for name, value in chip if isinstance(value, Figure) and value.value is not None}
    assert 40 << 30 <= known["hbm_bytes"] <= 432 << 30
    if {"bf16", "fp8"} <= set(known):
        assert known["bf16"] < known["fp8"]
    for dtype in ("bf16", "fp8"):
        if f"reached_{dtype}" in known:
            assert 0.4 < known[f"reached_{dtype}"] / known[dtype] < 1
    if chip.h100e is not None:
        assert chip.h100e == pytest.approx(known["bf16"] / 989)
    assert known.get("watts", 1000) >= 350


def test_what_nobody_published_is_unknown():
    assert not hardware.chip("mi430x").tflops("bf16").known
    assert not hardware.chip("mi430x").watts.known
    assert not hardware.chip("rubin").watts.known
    assert hardware.chip("rubin").architecture is None
    assert not hardware.chip("a100").tflops("fp8").known


def test_nodes_drew_two_thirds_of_their_nameplate():
    """The share that may be assumed where only a nameplate is known, from the table's own rows."""
    by_name = {machine.name: machine for machine in hardware.MACHINES}
    for made, run in (
        ("DGX H100", "SMC 8 x H100, immersed, GPT-3 175B on 64 nodes"),
        ("DGX B200", "Lenovo SR780a V3 8 x B200, Llama 2 70B LoRA"),
    ):
        most, drew = by_name[made].max_watts.value, by_name[run].training_watts.value
        assert most
        assert drew
        assert drew / most == pytest.approx(hardware.OF_NAMEPLATE.value, abs=0.005)


def test_memory_is_the_site_s_own_else_a_device_s_of_its_accelerator():
    assert hardware.memory_bytes(load.site("jupiter"))[0] == 96 << 30
    lumi, why = hardware.memory_bytes(load.site("lumi"))
    assert lumi == 64 << 30
    assert "one of the 2 devices of a package" in why
    assert hardware.memory_bytes(load.site("jupiter").model_copy(update={"memory_bytes": 1 << 30})) == (1 << 30, "the site says so")
    assert hardware.memory_bytes(load.site("slurm")) == (None, "")
    assert hardware.memory_bytes(load.site("slurm-cpu")) == (None, "")


def test_a_run_that_does_not_fit_the_accelerator_is_refused_with_its_source():
    recipe = load.recipe("quickstart", ["train.microbatch=200000", "train.batch=200000"])
    with pytest.raises(PlanError, match=r"on lumi, which has 64.00 GiB \(an AMD Instinct MI250X, one of the 2 devices .* declared: "):
        plan(recipe, load.site("lumi"), 1)
    assert plan(recipe, load.site("slurm"), 1).memory.total > 64 << 30  # nothing is known of it, and nothing refused
