"""What is reported beside the loss of an objective: names of the sums that `compute` gives behind it, and the numbers they make."""

from collections.abc import Sequence

from gigatrain.config import Objective

_PAIRS = ("tokens", "reward_chosen", "reward_rejected", "logprob_chosen", "logprob_rejected", "right")
SUMS: dict[str, tuple[str, ...]] = {
    "dpo": _PAIRS,
    "ipo": _PAIRS,
    "simpo": _PAIRS,
    "orpo": (*_PAIRS, "nll"),
    "kto": (*_PAIRS, "good", "kl"),
}


def count(objective: Objective) -> int:
    """How many sums stand behind the loss."""
    return len(SUMS.get(objective.kind, ()))


def said(objective: Objective, sums: Sequence[float], targets: float) -> dict[str, float | None]:
    """Means over pairs by name (of kto, of good and of other answers each): rewards, their margin, the share of pairs in the right order, log-probabilities
    of answers (orpo and simpo: of their tokens), orpo's nll of preferred answers and kto's estimate of the divergence from the reference."""
    names = SUMS.get(objective.kind, ())
    if not names:
        return {}
    found = dict(zip(names, sums, strict=True))
    good = found.get("good", targets)
    other = targets - good if "good" in found else targets

    def mean(name: str, of: float) -> float | None:
        return found[name] / of if of else None

    chosen, rejected = mean("reward_chosen", good), mean("reward_rejected", other)
    numbers = {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "margin": None if chosen is None or rejected is None else chosen - rejected,
        "accuracy": mean("right", targets),
        "logprob_chosen": mean("logprob_chosen", good),
        "logprob_rejected": mean("logprob_rejected", other),
    }
    return numbers | {name: mean(name, targets) for name in ("nll", "kl") if name in found}
