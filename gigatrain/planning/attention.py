"""Which kernel computes attention, and why: by what the run asks, by what each kernel takes, and by what is known to be wrong.

What a plan cannot see, it does not assume: the packages of the machines that will run it (FlashAttention 3 and 4 are the recipe's to name), and, where the
site names none, the accelerator. Whatever is chosen, a run compares it with plain torch on its own shapes before it starts, and refuses it if it errs
(models/decoder.py's `verify_attention`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

# What each of torch's kernels takes, as kernels/attention_torch.py's `LIMITS` has it (a test holds them equal): widest head, what it is a multiple of, and
# what else it can.
LIMITS: Mapping[str, tuple[int, int, frozenset[str]]] = {
    "cudnn": (128, 8, frozenset()),
    "flash": (256, 8, frozenset()),
    "fa3": (256, 8, frozenset({"documents", "window"})),
    "fa4": (128, 8, frozenset({"documents", "window"})),
    "varlen": (256, 8, frozenset({"documents", "window"})),
    "flex": (256, 1, frozenset({"values", "single", "documents", "window", "softcap", "sinks"})),
}
SAID = {
    "values": "values of another width than keys",
    "single": "fp32",
    "documents": "documents packed into one sample",
    "window": "windows",
    "softcap": "soft-caps",
    "sinks": "sinks",
}
ON_GPU = ("fused", *LIMITS)


@dataclass(frozen=True)
class Call:
    """What a run asks of attention on one rank. `asks` are keys of `SAID`; `architecture` is the accelerator's, None: unknown."""

    heads: int
    kv_heads: int
    channels: int
    values: int
    sequence: int
    asks: frozenset[str]
    deterministic: bool = False
    architecture: str | None = None


@dataclass(frozen=True)
class Guard:
    """A combination that is known to be wrong, and where that is said."""

    versions: tuple[str, ...]
    why: str
    thread: str
    applies: Callable[[Call], bool]
    of_some: bool = False  # accelerators, and so of the unknown


def _blackwell(call: Call) -> bool:
    return call.architecture in (None, "sm_100", "sm_103")


def _hopper(call: Call) -> bool:
    return call.architecture in (None, "sm_90")


# Where the accelerator is unknown, it may be the one that is wrong. `sdpa` may pick cuDNN at any call, so it shares its faults. Not here, since nothing that
# the plan allows meets them: flash-attention 334 and 1052 (NaN in the backward), 1947 (NaN from a row that sees nothing), 2063 and 2229 (races in FA3 and
# FA4), 2402 and 2466 (FA4's soft-cap, wrong and then hanging: no soft-cap goes to it), TransformerEngine 3216 (FA4's backward of 256 channels on sm_100, wrong
# for real activations and right for random ones, so that no start-up check sees it: 128 is its limit here), pytorch 136232 (FlexAttention under a mask of
# another size), 186775 (compiled for sizes that change). FlexAttention's open fault 158212, wrong gradients under some masks, is why no plan chooses it.
GUARDS = (
    Guard(
        ("cudnn", "sdpa"),
        "cuDNN is silently wrong on B200 with fewer than 8 key heads on a rank",
        "pytorch/pytorch#193893",
        lambda call: call.kv_heads < 8 and _blackwell(call) and "single" not in call.asks,
        of_some=True,
    ),
    Guard(
        ("cudnn",),
        "cuDNN's backward gives NaN on Hopper where the number of tokens is no multiple of 128",
        "NVIDIA/cudnn-frontend#1072 and #628",
        lambda call: call.sequence % 128 != 0 and _hopper(call),
        of_some=True,
    ),
    Guard(
        ("sdpa",),
        "cuDNN, which torch chooses for it, gives NaN on Hopper under a mask where the number of tokens is no multiple of 128",
        "pytorch/pytorch#196678",
        lambda call: call.sequence % 128 != 0 and _hopper(call) and bool(call.asks & {"documents", "window"}) and "single" not in call.asks,
        of_some=True,
    ),
    Guard(
        ("cudnn",),
        "cuDNN sums gradients in another order each time, and train.deterministic asks for the same bits",
        "torch's own condition for it",
        lambda call: call.deterministic,
    ),
    Guard(
        ("fa3",),
        "FA3's backward over documents laid end to end may hang",
        "Dao-AILab/flash-attention#1254",
        lambda call: "documents" in call.asks,
    ),
    Guard(
        ("flex",),
        "FlexAttention errs under windows and documents on AMD",
        "pytorch/pytorch#138300",
        lambda call: (call.architecture or "").startswith("gfx") and bool(call.asks & {"window", "documents"}),
    ),
)
_RUNS_ON = {
    "cudnn": ("sm_80", "sm_90", "sm_100", "sm_103"),
    "flash": ("sm_80", "sm_90", "sm_100", "sm_103"),
    "fa3": ("sm_90",),
    "fa4": ("sm_90", "sm_100"),
    "varlen": ("sm_80", "sm_90", "sm_100", "sm_103"),
}


def refusal(version: str, call: Call) -> str | None:
    """Why a version cannot serve a run on a GPU, or must not; None: it can."""
    widest, multiple, can = LIMITS.get(version, (256, 1, frozenset(SAID)))
    if version == "sdpa":
        widest, can = max(call.channels, call.values), can - {"softcap", "sinks"}
    if version in ("reference", "blocked"):
        return None
    if call.architecture is not None and call.architecture not in _RUNS_ON.get(version, (call.architecture,)):
        return f"{version} does not run on {call.architecture}"
    if max(call.channels, call.values) > widest or call.channels % multiple or call.values % multiple:
        of = f", a multiple of {multiple}" if multiple > 1 else ""
        return f"{version} takes heads of up to {widest} channels{of}, not {call.channels} and {call.values}"
    if lacking := call.asks - can:
        return f"{version} has no {' and no '.join(SAID[one] for one in SAID if one in lacking)}"
    for guard in GUARDS:
        if version in guard.versions and guard.applies(call):
            unknown = "; or name the site's accelerator, if it is none of those" if call.architecture is None and guard.of_some else ""
            return f"{guard.why} ({guard.thread}{unknown})"
    return None


def chosen(call: Call) -> tuple[str, str]:
    """`(version, why)` on a GPU, eager: the fastest that serves the run and is not known to be wrong."""
    architecture, asks = call.architecture, call.asks - {"single"}
    if asks or call.deterministic:
        asked = " and ".join(SAID[one] for one in SAID if one in asks) or "the same bits every time"
        order = ("fused",) if asks & {"softcap", "sinks"} else ("fused", "sdpa")
        reasons = {
            "fused": f"our Triton kernel, for {asked}: it visits what is visible only, keeps no square of tokens, and has no atomic sums",
            "sdpa": "torch's fused attention with a square mask",
        }
    else:
        reasons = {
            "cudnn": f"plain causality on {architecture}: 595 to 631 TFLOP/s forward on Hopper, where FlashAttention 2 has 329 to 370",
            "flash": "FlashAttention 2, of plain causality",
            "sdpa": "torch's fused attention, by torch's choice",
            "fused": "our Triton kernel",
        }
        if architecture in ("sm_90", "sm_100", "sm_103"):
            order = ("cudnn", "flash", "sdpa", "fused")
        else:
            order = ("flash", "sdpa", "fused") if architecture == "sm_80" else ("sdpa", "fused")
        if architecture is None:
            reasons["sdpa"] += ": the accelerator or its architecture is unknown, and this runs on all of them"
    refused = []
    for version in order:
        if (why := refusal(version, call)) is None:
            return version, "; ".join((reasons[version], *refused))
        refused.append(f"not {version}: {why}")
    return "reference", "; ".join(("plain torch, every score in memory", *refused))
