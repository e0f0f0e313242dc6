"""Whether a run's numbers are those that its starting weights were trained with. Names and shapes do not tell: a rope and an epsilon have none."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gigatrain import architectures, load
from gigatrain.architectures import Architecture
from gigatrain.errors import CheckpointError, RecipeError
from gigatrain.foreign import Foreign
from gigatrain.planning.plan import Plan

_ROPES = ("rope", "rope_local")


def check(plan: Plan) -> list[str]:
    """Compare the plan's numbers with config.json of `model.from`; what there is to say of it, a line each.

    Raises CheckpointError for a number that differs and that no shape would show, with both values; and for new tokens that an adapter would never train.
    A folder without config.json is taken as it is, and said to be.
    """
    if plan.source is None or isinstance(plan.architecture, Foreign):
        return []
    if Path(plan.source).expanduser().is_dir() and not (Path(plan.source).expanduser() / "config.json").is_file():
        return [f"  weights  {plan.source} has no config.json: that its rope and norms are the recipe's cannot be seen"]
    config, unread = load.config_json(plan.source), []
    try:
        theirs = architectures.from_hf_config(architectures.language(config) or config, unread)
    except RecipeError as failure:
        raise CheckpointError(
            f"model.from {plan.source}: its numbers cannot be compared with the recipe's: {failure}; mend its config.json, or take it away where the "
            "recipe's own numbers are known to be right"
        ) from None
    said = [f"  weights  config.json of {plan.source} has {one}, which is not compared" for one in unread]
    ours, wrong = plan.architecture, []
    for key, mine, own in differences(ours, theirs):
        if key == "vocab" or (key == "window" and _wide(ours, plan.sequence) and _wide(theirs, plan.sequence)):
            continue
        if key.split(".")[0] in _ROPES and plan.roped:
            said.append(f"  weights  {key} {mine}, by model.rope; the weights were trained with {own}")
            continue
        wrong.append((key, mine, own))
    if wrong:
        raise CheckpointError(
            f"the weights of {plan.source} were trained with other numbers than the recipe's:\n"
            + "\n".join(f"  {key}: {own} in its config.json, {mine} in the recipe" for key, mine, own in wrong)
            + "\nGive the recipe's [model.architecture] the weights' own, or leave it out: then they are taken from config.json"
            + ("; a rope that is changed on purpose stands in model.rope" if any(key.split(".")[0] in _ROPES for key, *_ in wrong) else "")
        )
    if ours.vocab > theirs.vocab:
        new = ours.vocab - theirs.vocab
        if (adapter := plan.adapter) is not None and not (adapter.train_embeddings and (adapter.train_head or ours.tied)):
            raise CheckpointError(
                f"model.architecture.vocab is {ours.vocab:,}, and {plan.source} has {theirs.vocab:,}: the adapter leaves the {new:,} new rows as they begin, "
                "all equal; set adapter.train_embeddings = true and adapter.train_head = true, or start from weights that know these tokens"
            )
        said.append(
            f"  weights  {new:,} new rows of the embedding{'' if ours.tied else ' and the head'}: each begins as the mean of the {theirs.vocab:,}"
        )
    return said


def other_tokens(weights: str | None, tokenizer: Path) -> list[str]:
    """A line that says how many tokens of the weights' own tokenizer.json (of `model.from`, a folder) another id stands for in the folder of the run's
    `tokenizer`: an embedding is by id, and no shape shows it. [] where all are as they were, or the weights lie beside no tokenizer."""
    if weights is None or not (theirs := Path(weights).expanduser() / "tokenizer.json").is_file():
        return []
    ours = tokenizer / "tokenizer.json"
    if not ours.is_file() or ours.read_bytes() == theirs.read_bytes():
        return []
    import tokenizers

    try:
        own = tokenizers.Tokenizer.from_file(str(theirs)).get_vocab()
    except Exception as failure:  # tokenizers raises nothing more particular
        return [f"  weights  {theirs} cannot be read ({failure}): that its ids are this run's cannot be seen"]
    mine = tokenizers.Tokenizer.from_file(str(ours)).get_vocab()
    moved = sum(mine.get(token) != number for token, number in own.items())
    if not moved:
        return []
    return [
        f"  WEIGHTS  {moved:,} of the {len(own):,} tokens that {weights} was trained with have another id in this run's tokenizer, or none: its embedding is "
        f'of other words; set tokenizer.from = "{weights}", unless that is meant'
    ]


def differences(ours: Architecture, theirs: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, ours, theirs) of every number that differs."""
    first, second = _plain(ours), _plain(theirs)
    for key in first:
        one, other = first[key], second[key]
        if key in _ROPES and isinstance(one, dict) and isinstance(other, dict):
            yield from ((f"{key}.{name}", one[name], other[name]) for name in one if not _same(one[name], other[name]))
        elif not _same(one, other):
            yield key, one, other


def _plain(one: Architecture) -> dict[str, Any]:
    """Its numbers, with what a number means where it is left out: a default that is written and one that is not are equal."""
    found = one.model_dump(mode="json") | {"attention_scale": one.scale, "expert_intermediate": one.expert_width if one.experts else None}
    for key in _ROPES:
        if (rope := found[key]) is not None and rope["kind"] == "yarn":
            plain = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
            if rope["mscale"] is None and rope["mscale_all_dim"] is None:
                plain["attention_factor"] = 0.1 * math.log(rope["factor"]) + 1.0
            found[key] = rope | {name: value for name, value in plain.items() if rope[name] is None}
    if found["rope_local"] == found["rope"]:
        found["rope_local"] = None
    for key in ("window_layers", "rope_layers", "moe_layers"):
        found[key] = None if found[key] is None or all(found[key]) else _shown(found[key])
    return found


def _wide(one: Architecture, sequence: int) -> bool:
    """Whether its window cuts nothing of a sample."""
    return one.window is None or one.window >= sequence


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float | int) and isinstance(other, float | int) and not isinstance(one, bool):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _shown(pattern: list[bool]) -> str:
    return "".join("1" if one else "0" for one in pattern)
