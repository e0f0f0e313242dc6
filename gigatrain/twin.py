"""The `-tiny` twin of a recipe: the same shape of everything, small enough to train in seconds on a processor. By rule, so that no twin can drift.

What is kept: the family, heads per key head, the head's size against the stream's, the feed-forward's against it, the pattern of windows, positions and
experts over the layers, groups of experts, shared experts, tied or not, norms, biases, activation, scaling of rope; optimizer, schedule, loss, objective,
adapter and packing. What is not: sizes, the tokenizer (trained on the data), the data (a package
of Python's library, or a few conversations), the mesh, weights.
"""

import sysconfig
from collections.abc import Mapping
from math import lcm
from pathlib import Path
from typing import Any

VOCAB = 512
_POSITIONS = 32  # what a stretched rope was first trained on: less than a sample, so that the stretch is felt
_LONGEST = 8  # layers after which a pattern must have come round to be taken as one
_PATTERNS = ("window_layers", "rope_layers", "moe_layers")


def tree(recipe: Mapping[str, Any], data: Path) -> dict[str, Any]:
    """The twin of a recipe, as the tree of a TOML file whose architecture is numbers; `data` is the folder of tiny conversations."""
    train, optim = recipe["train"], recipe["optim"]
    sources = [_source(one, data) for one in recipe["data"]["sources"][:1]]
    text = sources[0].get("format", "text") == "text"
    sequence = 64 if text else 128
    kept = {key: value for key, value in train.items() if key in ("seed", "dropout", "recompute")}
    found: dict[str, Any] = {
        **{key: value for key, value in recipe.items() if key in ("adapter", "objective", "loss", "fp8")},
        "name": f"{recipe['name']}-tiny",
        "summary": f"tiny twin of {recipe['name']}",
        "model": {"architecture": architecture(recipe["model"]["architecture"])},
        "tokenizer": {"train": {"vocab": VOCAB, "max_bytes": 1 << 18}} | ({} if text else {"template": "chatml"}),
        "data": {
            **{key: value for key, value in recipe["data"].items() if key in ("packing", "bad")},
            "sources": sources, "validation": 0.2, "workers": 1,
        },
        "train": {**kept, "sequence": sequence, "batch": 4, "steps": 4, "precision": "fp32", "nproc": 1},
        "optim": optim | {"lr": _rounded(min(1e-3, 10 * optim["lr"]))},
        "schedule": recipe.get("schedule", {}) | {"warmup": 1},
        "validation": {"max_samples": 4},
        "checkpoint": {"every": 2, "keep": 2},
        "report": {"every": 2, "trackers": []},
    }  # fmt: skip
    return found


def _source(one: Mapping[str, Any], data: Path) -> dict[str, Any]:
    kind = one.get("format", "text")
    if kind == "text":
        return {
            "kind": "text",
            "path": str(Path(sysconfig.get_paths()["stdlib"]) / "email"),
            "pattern": "*.py",
        }  # some 30 files, tokenised at once
    file = "pairs.jsonl" if kind == "preference" else "chat.jsonl"
    return {"kind": "jsonl", "path": str(data / file), "format": "preference" if kind == "preference" else "chat"}


def architecture(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a model, small: every ratio that its family or its layers depend on is kept, as far as whole numbers have it."""
    given = dict(numbers)
    hidden, heads = given["hidden"], given["heads"]
    kv, head_dim = given.get("kv_heads") or heads, given.get("head_dim") or hidden // heads
    shared = heads // kv
    few = min(kv, 2) * shared if shared > 1 else min(heads, 4)
    size = 16 if few <= 8 else 8
    if given.get("kv_rank"):
        shrink = given["rope_head_dim"] // 8
        size = head_dim // shrink
        given |= {"rope_head_dim": 8, "value_head_dim": given["value_head_dim"] // shrink}
    wide = few * size * hidden / (heads * head_dim) if not given.get("kv_rank") else few * size * 2
    small = _multiple(wide, lcm(few, 8))
    scale = small / hidden
    given |= {"vocab": VOCAB, "hidden": small, "heads": few, "head_dim": size, "intermediate": _multiple(given["intermediate"] * scale, 8)}
    if not given.get("kv_rank"):
        given["kv_heads"] = few // shared
    for name in ("kv_rank", "q_rank", "expert_intermediate"):
        if given.get(name):
            given[name] = _multiple(given[name] * scale, 8)
    if given.get("experts"):
        given["experts"] = max(8, 2 * given.get("groups", 1))
        given["experts_per_token"] = min(given["experts_per_token"], 2)
    if given.get("window"):
        given["window"] = 16
    given |= _layers(given)
    for name in ("rope", "rope_local"):
        if given.get(name):
            given[name] = _rope(given[name], given.get("rope_head_dim") or size)
    return given


def _layers(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fewest layers in which every pattern comes round, at least two; one that does not come round keeps one layer of each of its stretches."""
    periods: dict[str, list[bool]] = {}
    for name in _PATTERNS:
        if pattern := given.get(name):
            period = next((n for n in range(1, _LONGEST + 1) if all(one == pattern[i % n] for i, one in enumerate(pattern))), None)
            stretches = [one for i, one in enumerate(pattern) if i == 0 or one != pattern[i - 1]]
            periods[name] = list(pattern[:period]) if period else stretches
    default = {"gemma2": 2, "gemma3_text": 6, "olmo3": 4, "smollm3": 4, "gpt_oss": 2}.get(
        given["family"], 1
    )  # where a family spreads its own
    count = max(2, lcm(default, *(len(one) for one in periods.values())))
    return {"layers": count} | {name: [one[i % len(one)] for i in range(count)] for name, one in periods.items()}


def _rope(rope: Mapping[str, Any], channels: int) -> dict[str, Any]:
    pairs = int(channels * rope.get("partial", 1.0)) // 2
    short = {"original_positions": _POSITIONS} if rope.get("original_positions") else {}
    return {key: list(value[:pairs]) if key in ("short_factor", "long_factor") else value for key, value in rope.items()} | short


def _rounded(value: float) -> float:
    """To three digits, as a reader would write it: ten times 5e-7 is 4.9999999999999996e-06."""
    return float(f"{value:.3g}")


def _multiple(value: float, of: int) -> int:
    return max(of, round(value / of) * of)
