"""Random preference pairs as microbatches of ours, and the decoder of a tiny random Llama."""

from typing import Any

import numpy as np
import torch

from gigatrain import objectives
from gigatrain.architectures import from_hf_config
from gigatrain.data.loader import Microbatch
from gigatrain.data.pack import Sample
from gigatrain.data.pairs import lay
from gigatrain.kernels.ops import choose
from gigatrain.models import hf
from gigatrain.models.decoder import Decoder

VOCAB, EOS, T = 61, 2, 48
FAST = choose({"attention": "sdpa", "linear_cross_entropy": "chunked"})


def pairs(count: int, seed: int = 0, *, lengths: tuple[int, int] = (2, 12)) -> list[dict[str, Any]]:
    """Prompts with two answers each, as lists of ids; every third pair's answers are equally long."""
    drawn = np.random.default_rng(seed)

    def ids(n: int) -> list[int]:
        return drawn.integers(3, VOCAB, n).tolist()

    found = []
    for number in range(count):
        chosen = int(drawn.integers(*lengths))
        rejected = chosen if number % 3 == 0 else int(drawn.integers(*lengths))
        found.append(
            {
                "prompt_ids": ids(int(drawn.integers(2, 9))),
                "chosen_ids": ids(chosen),
                "rejected_ids": ids(rejected),
                "label": number % 3 != 1,
            }
        )
    return found


def document(prompt: list[int], answer: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(prompt + answer), np.array([False] * len(prompt) + [True] * len(answer))


def row(documents: list[Any], *, answer: bool = False) -> tuple[Sample, np.ndarray]:
    """A row, and with `answer` which of its tokens are the answer's; else none is marked."""
    sample = Sample(*(np.empty(T, kind) for kind in (np.int64, np.int64, np.int64, np.int32)))
    marks = np.zeros(T, np.bool_)
    lay(documents, sample, EOS, answer=marks if answer else None)
    return sample, marks


def stacked(rows: list[Any]) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.from_numpy(np.stack([getattr(one, name) for one, _ in rows])) for name in ("tokens", "labels", "positions", "documents")
    )


def microbatch(kind: str, examples: list[dict[str, Any]], reference: torch.Tensor | None = None) -> Microbatch:
    """reference_bps [b, 1, 2] or None; of kto, the foreign answer of an example is that of the one before it, as in TRL's collation."""
    given: dict[str, torch.Tensor] = {"there_bp": torch.ones(len(examples), 1)}
    if kind == "kto":
        rows = [row([document(one["prompt_ids"], one["chosen_ids"])]) for one in examples]
        foreign = [
            row([document(one["prompt_ids"], other["chosen_ids"])])
            for one, other in zip(examples, examples[-1:] + examples[:-1], strict=True)
        ]
        given["foreign_tokens_bt"], given["foreign_labels_bt"], *_ = stacked(foreign)
        given["good_bp"] = torch.tensor([[float(one["label"])] for one in examples])
    else:
        rows = [
            row([document(one["prompt_ids"], one[f"{side}_ids"]) for side in ("chosen", "rejected")], answer=kind == "orpo")
            for one in examples
        ]
        if kind == "orpo":
            given["answer_bt"] = torch.from_numpy(np.stack([marks for _, marks in rows]))
    if reference is not None:
        given["reference_bps"] = reference
    tokens, labels, positions, documents = stacked(rows)
    return Microbatch(tokens, labels, positions, documents if kind != "kto" else None, given)


def decoder(model: Any, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder with a transformers model's weights."""
    found = Decoder(from_hf_config(model.config.to_dict()), FAST).to(dtype)
    found.load_state_dict(hf.from_hf(model.state_dict(), found.arch))
    return found


def logprobs(model: Any, part: Microbatch) -> torch.Tensor:
    """Sums [b, 1, 2] over both documents of every row, of kto over the answer and the foreign one: what a reference says."""
    assert part.given is not None
    with torch.no_grad():
        if "good_bp" in part.given:
            whole = model.logprobs(part.tokens, part.labels).sum(1)
            foreign = model.logprobs(part.given["foreign_tokens_bt"], part.given["foreign_labels_bt"]).sum(1)
            return torch.stack([whole, foreign], 1)[:, None]
        found = model.logprobs(part.tokens, part.labels, part.positions, part.documents)
        return objectives.preference.by_document(found, part.documents, 2)[:, None]


def loss(objective: Any, model: Any, part: Microbatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`(mean loss, what is reported, kto's z)` of a step of one microbatch, as an engine makes it."""
    known = None
    if objectives.looks_ahead(objective):
        known = objectives.known(objectives.ahead(objective, model, part))
    terms = {} if known is None else {"known": known}
    found, reported = objectives.compute(objective, model, part, part.positions if part.documents is not None else None, **terms)
    return found / objectives.targets(objective, part), reported, known
