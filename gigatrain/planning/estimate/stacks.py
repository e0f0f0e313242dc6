"""What each software stack does by habit, from its constants: overlap by axis, fusion, launches, attention. One record per stack and era."""

import re
from collections.abc import Mapping
from math import exp
from typing import get_args

from gigatrain.errors import PlanError
from gigatrain.planning.estimate.habits import Habits
from gigatrain.planning.estimate.work import Axis
from gigatrain.planning.estimate.workload import Stack

AXES: tuple[str, ...] = get_args(Axis)
MiB = 1024.0**2


def era(stack: str, version: str) -> str:
    """The name under which the constants of this stack and version are; raises PlanError for a stack nobody described.

    Megatron before 2023 (its name in `version`: 2021, 2022, or Megatron-DeepSpeed) has no overlap and apex kernels; Megatron-LM as started by hand lacks the
    overlaps that NeMo and Megatron-Bridge turn on.
    """
    if stack not in get_args(Stack):
        raise PlanError(
            f"no stack is called {stack!r}; known: {', '.join(get_args(Stack))}. An unknown one is best described by 'generic'."
        )
    if stack == "megatron":
        said = version.lower()
        if "deepspeed" in said or re.search(r"\b20(19|20|21|22)\b", said) or "apex" in said or "unfused" in said:
            return "megatron_2021"
        if "overlap off" in said or "plain" in said:
            return "megatron_plain"
    return stack


RELEASED = 2024.6  # NeMo 24.07: the release that constants are of


def released(version: str) -> float:
    """The year of a release that is named by year and month (NeMo's 24.07, 25.11); RELEASED where the version does not say."""
    found = re.search(r"\b(2[2-9])\.(0[1-9]|1[0-2])\b", version)
    return 2000 + int(found[1]) + (int(found[2]) - 0.5) / 12 if found else RELEASED


def habits(stack: str, version: str, constants: Mapping[str, float]) -> Habits:
    """Habits of `stack` at `version`, from `constants` (names `stack.*`, `slowdown.*`); raises PlanError for an unknown stack."""
    name = era(stack, version)
    return Habits(
        stack=name,
        overlaps={axis: constants[f"stack.{name}.overlap.{axis}"] for axis in AXES},
        slowdown={axis: constants[f"slowdown.{axis}"] for axis in AXES},
        launch_s=constants[f"stack.{name}.launch_s"],
        passes_share=constants[f"stack.{name}.passes_share"],
        looped=name in _LOOPED,
        fused=_FUSED.get(name, frozenset()),
        bucket_bytes=_BUCKETS.get(name, 100 * MiB),
        attention=_attention(name, version.lower()),
        pace=exp(-constants["software.gain_year"] * (released(version) - RELEASED)),
        synced_sends=name in _SYNCED,
        checkpoint_s=constants["stack.megatron_2021.checkpoint_s"] if name == "megatron_2021" else 0.0,
        microbatch_s=constants[f"stack.{name}.microbatch_s"],
        step_s=constants[f"stack.{name}.step_s"],
    )


BUCKET_BYTES_A_RANK = 4e6  # Megatron's buckets grow with the ranks that share them, 1 M parameters each, so that a ring's chunks stay large
# Bytes of one reduced bucket of gradients: Megatron's max(40 M, 1 M x dp) parameters in fp32, DeepSpeed's 5e8 elements in bf16, DDP's 25 MiB.
_BUCKETS: dict[str, float] = {
    "megatron": 160e6,
    "megatron_plain": 160e6,
    "megatron_2021": 160e6,
    "deepspeed": 1e9,
    "gigatrain_deepspeed": 1e9,
    "torchtitan": 100 * MiB,
    "nanotron": 100 * MiB,
}

# Megatron's batched sends end with torch.cuda.synchronize() (batch_p2p_sync, on by default; off where sends overlap).
_SYNCED = frozenset({"megatron_2021", "megatron_plain"})

_LOOPED = frozenset({"megatron", "megatron_plain"})  # Transformer Engine's GroupedLinear: cuBLAS once for each expert, on four streams
# What one kernel does: Transformer Engine's and Liger's rotary, gated activation and loss; torch.compile fuses what lies between two products (`compiled`).
COMPILED = frozenset({"norm", "rope", "activation", "residual", "bias", "cross_entropy"})
_FUSED: dict[str, frozenset[str]] = {
    "gigatrain_native": frozenset({"rope", "activation", "residual", "cross_entropy"}),
    "gigatrain_deepspeed": frozenset({"rope", "activation", "residual", "cross_entropy"}),
    "megatron": frozenset({"rope", "activation", "bias"}),
    "megatron_plain": frozenset({"rope", "activation", "bias"}),
    "megatron_2021": frozenset({"activation"}),
    "nanotron": frozenset({"rope"}),
    "deepspeed": frozenset({"rope", "activation", "cross_entropy"}),
    "generic": frozenset({"rope", "activation"}),
}
# Torch's own scaled_dot_product_attention and the flash_attn package are FlashAttention-2, unless the version says that a later one is there; llm-foundry's
# published tables are of the first (its Triton form), where that exists.
_ATTENTION: dict[str, str] = dict.fromkeys(("torchtitan", "nanotron", "deepspeed", "megatron_2021", "generic"), "flash2") | {
    "llm_foundry": "flash1"
}


def _attention(name: str, version: str) -> str:
    if _FLASH4.search(version):
        return "flash4"
    return "fused" if _LATER.search(version) else _ATTENTION.get(name, "fused")


_FLASH4 = re.compile(r"\bfa-?4\b|flash.?attention.?4\b")
_LATER = re.compile(r"\bfa-?[34]\b|flash.?attention.?[34]\b|cudnn|\bte\b")
