"""The attention of a plan: the fastest that serves and is not known to be wrong, with the reason."""

import dataclasses
from typing import get_args

import pytest

from gigatrain import load
from gigatrain.errors import PlanError
from gigatrain.planning import attention, hardware
from gigatrain.planning.attention import Call
from gigatrain.planning.kernels import IMPLEMENTATIONS
from gigatrain.planning.plan import plan
from gigatrain.site import Accelerator

LLAMA = Call(heads=32, kv_heads=8, channels=128, values=128, sequence=8192, asks=frozenset(), architecture="sm_90")


def asked(**changes) -> Call:
    return dataclasses.replace(LLAMA, **{"asks": frozenset(changes.pop("asks", ()))} | changes)


def test_limits_are_those_of_the_kernels():
    from gigatrain.kernels import attention_torch

    shown = {
        name: (limits.widest, limits.multiple, frozenset(key for key, value in dataclasses.asdict(limits).items() if value is True))
        for name, limits in attention_torch.LIMITS.items()
    }
    assert shown == attention.LIMITS
    assert set(attention.ON_GPU) | {"reference", "sdpa", "blocked"} == set(IMPLEMENTATIONS["attention"])


def test_a_site_may_name_the_accelerators_that_are_known():
    known = get_args(Accelerator)
    assert known == tuple(hardware.ARCHITECTURES)


@pytest.mark.parametrize(
    ("changes", "version", "said"),
    [
        ({}, "cudnn", "plain causality on sm_90"),
        ({"architecture": "sm_100"}, "cudnn", "sm_100"),
        ({"architecture": "sm_80"}, "flash", "FlashAttention 2"),
        ({"architecture": "gfx942"}, "sdpa", "by torch's choice"),
        ({"architecture": None}, "sdpa", "the accelerator or its architecture is unknown, and this runs on all of them"),
        ({"architecture": None, "kv_heads": 4}, "fused", "193893"),  # what torch chooses may be cuDNN, and the GPU a B200
        ({"kv_heads": 4}, "cudnn", "plain causality"),
        ({"architecture": "sm_100", "kv_heads": 4}, "flash", "not cudnn: cuDNN is silently wrong on B200"),
        ({"sequence": 8190}, "flash", "cudnn-frontend#1072"),
        ({"channels": 256, "values": 256}, "flash", "not cudnn: cudnn takes heads of up to 128 channels"),
        ({"channels": 12, "values": 12}, "sdpa", "not flash: flash takes heads of up to 256 channels, a multiple of 8"),
        ({"asks": {"single"}}, "sdpa", "not cudnn: cudnn has no fp32"),
        ({"asks": {"documents"}}, "fused", "for documents packed into one sample: it visits what is visible only"),
        ({"asks": {"window", "softcap"}}, "fused", "for windows and soft-caps"),
        ({"asks": {"sinks", "single"}}, "fused", "for sinks"),
        ({"asks": {"values"}, "channels": 192}, "fused", "for values of another width than keys"),
        ({"deterministic": True}, "fused", "for the same bits every time"),
        ({"asks": {"documents"}, "channels": 512}, "sdpa", "not fused: fused takes heads of up to 256 channels"),
        ({"asks": {"softcap"}, "channels": 512}, "reference", "not fused"),
    ],
)
def test_the_choice_and_its_reason(changes, version, said):
    found, why = attention.chosen(asked(**changes))
    assert (found, said in why) == (version, True), why


@pytest.mark.parametrize(
    ("version", "changes", "said"),
    [
        ("sdpa", {"asks": {"softcap"}}, "sdpa has no soft-caps"),
        ("sdpa", {"architecture": "sm_90", "sequence": 8256, "asks": {"documents"}}, "196678"),
        ("cudnn", {"deterministic": True}, "train.deterministic asks for the same bits"),
        ("cudnn", {"architecture": "gfx942"}, "cudnn does not run on gfx942"),
        ("fa3", {"asks": {"documents"}}, "flash-attention#1254"),
        ("fa3", {"architecture": "sm_100"}, "fa3 does not run on sm_100"),
        ("fa4", {"channels": 256, "values": 256}, "up to 128 channels"),
        ("flex", {"architecture": "gfx942", "asks": {"window"}}, "138300"),
        ("varlen", {"asks": {"sinks"}}, "varlen has no sinks"),
        ("varlen", {"asks": {"documents", "window"}}, None),
        ("fa4", {"asks": {"documents"}}, None),
        ("flex", {"asks": {"documents", "window", "softcap", "sinks", "values", "single"}}, None),
        ("blocked", {"asks": {"sinks"}}, None),
    ],
)
def test_what_serves_and_what_is_known_to_be_wrong(version, changes, said):
    found = attention.refusal(version, asked(**changes))
    assert found is None if said is None else said in found


def test_every_guard_names_its_thread_and_meets_a_call():
    for guard in attention.GUARDS:
        assert guard.thread
        assert set(guard.versions) <= set(IMPLEMENTATIONS["attention"])
        calls = [
            asked(architecture=architecture, kv_heads=kv_heads, sequence=sequence, deterministic=exact, asks=asks)
            for architecture in (None, *hardware.ARCHITECTURES.values())
            for kv_heads in (2, 8)
            for sequence in (8192, 8200)
            for exact in (False, True)
            for asks in ((), ("documents",), ("window",))
        ]
        met = [guard.applies(call) for call in calls]
        assert any(met), guard.why
        assert not all(met), guard.why


def made(*overrides, accelerator=None, device="cuda"):
    site = load.site("one-gpu" if device == "cuda" else "laptop").model_copy(update={"accelerator": accelerator, "memory_bytes": 1 << 40})
    chosen = plan(load.recipe("quickstart", overrides), site)
    return next((choice.kernel, choice.why) for choice in chosen.kernels if choice.op == "attention")


def test_the_plan_says_what_and_why():
    assert made()[0] == "fused"  # packed documents
    wide = ("data.packing=document", "model.architecture=llama-3.1-8b", "train.sequence=256")
    assert made(*wide, accelerator="h200") == ("cudnn", attention.chosen(dataclasses.replace(LLAMA, sequence=256))[1])
    assert made(*wide, "mesh.tensor=2", accelerator="b200")[0] == "flash"  # 4 key heads a rank
    assert made(*wide)[0] == "sdpa"
    assert made(*wide, "train.deterministic=true", accelerator="h200")[0] == "fused"
    assert made(*wide, "train.compile=true", accelerator="h200")[0] == "sdpa"
    assert made(*wide, "kernels.attention=fa4", accelerator="h200") == ("fa4", "the recipe says so")
    assert made("mesh.context=2", "train.sequence=256") == ("sdpa", made("mesh.context=2", "train.sequence=256")[1])
    assert "ring.py" in made("mesh.context=2", "train.sequence=256")[1]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("kernels.attention=cudnn",),
            'kernels.attention "cudnn": cudnn has no documents packed into one sample; choose "fused", or leave it out',
        ),
        (
            ("train.precision=bf16", "kernels.attention=sdpa"),
            "pytorch/pytorch#193893; or name the site's accelerator, if it is none of those",
        ),
        (("model.architecture=gemma-2-2b", "kernels.attention=sdpa"), 'kernels.attention "sdpa": sdpa has no soft-caps; choose "fused"'),
    ],
)
def test_what_cannot_serve_is_refused_with_the_way_out(overrides, said):
    with pytest.raises(PlanError, match=said):
        made(*overrides)


def test_a_cpu_is_refused_what_needs_a_gpu():
    said = 'kernels.attention "flex": flex needs a GPU, and laptop has none; choose reference or sdpa or blocked'
    with pytest.raises(PlanError, match=said):
        made("kernels.attention=flex", device="cpu")


def test_masks_take_squares_only_where_they_are_squares():
    site = load.site("one-gpu")
    sizes = {
        name: plan(
            load.recipe("quickstart", ["train.sequence=2048", "train.precision=fp32", f"kernels.attention={name}"]), site
        ).memory.activations
        for name in ("fused", "sdpa", "blocked")
    }
    assert sizes["fused"] < sizes["sdpa"] < sizes["blocked"]
