"""generation_config.json: where an answer ends, and how it is drawn when nobody says otherwise."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gigatrain import config

ANSWER = "gigatrain's answer"  # a text that no template holds
TEMPERATURE, TOP_K = 0.8, 50  # of a model that was trained from nothing
_LEFT = ("_token_id", "transformers_version")  # ends of keys that are of the source's own tokenizer or writer
_DRAWN = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)  # which mean nothing where nothing is drawn


def model_class(folder: Path) -> Any:
    """What loads the model in `folder`: transformers' Auto class, or, for a family of ours that it does not know (mistral4), the family's own."""
    import transformers

    from gigatrain.architectures import class_of

    known = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    auto = transformers.AutoModelForCausalLM
    name = None if type(known) in auto._model_mapping else class_of(known.model_type)
    return auto if name is None else getattr(transformers, name)


def has_template(folder: Path) -> bool:
    """Whether a tokenizer's folder has a chat template, in a file of its own or, as older folders have it, in tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("chat_template"))


def ends_of_turn(folder: Path) -> tuple[list[int], str]:
    """`(ids, why there are none)`: the token that the chat template of a tokenizer's folder puts behind an answer, if that is one token of its own."""
    if not has_template(folder):
        return [], ""
    import transformers  # 3 s, and a template is rare in pretraining

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    turns = [{"role": "user", "content": "gigatrain's question"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as failure:  # a template is a program, and may raise anything
        return [], f"the chat template does not take a question and its answer: {str(failure).strip().splitlines()[0][:200]}"
    if ANSWER not in text:
        return [], "the chat template changes what an answer says"
    after = tokenizer(text.rpartition(ANSWER)[2], add_special_tokens=False)["input_ids"]
    if after and after[0] in tokenizer.added_tokens_decoder:
        return [after[0]], ""
    return [], "the chat template puts no token of its own behind an answer"


def generation_config(tokens: Mapping[str, int | None], turns: list[int], sample: config.Sample, source: Path | None) -> dict[str, Any]:
    """generation_config.json. `source`: the folder that the run's weights are from, whose own ends are ends here too, and which draws as it did.

    An answer of a chat ends with its template's token, a text with the tokenizer's eos: both are named, since a generation stops at any of them. What the
    recipe's `sample` sets stands above what the source says; other numbers of tokens are this tokenizer's.
    """
    said = _said(source)
    ends = [number for number in (tokens.get("eos"), *turns, *_ends_of(said or {})) if number is not None]
    ends = list(dict.fromkeys(ends))
    found = {} if said is None else {key: value for key, value in said.items() if not key.startswith("_") and not key.endswith(_LEFT)}
    found |= {f"{name}_token_id": tokens[name] for name in ("bos", "pad") if tokens.get(name) is not None}
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if sample.temperature == 0:
        found = {key: value for key, value in found.items() if key not in _DRAWN} | {"do_sample": False}
    elif said is None or sample.temperature is not None or sample.top_k is not None:
        found |= {
            "do_sample": True,
            "temperature": found.get("temperature", TEMPERATURE) if sample.temperature is None else sample.temperature,
            "top_k": found.get("top_k", TOP_K) if sample.top_k is None else sample.top_k,
        }
    return dict(sorted(found.items()))


def _said(source: Path | None) -> dict[str, Any] | None:
    """The file of the weights' folder, if it has one that is an object."""
    path = source / "generation_config.json" if source is not None else None
    if path is None or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _ends_of(said: Mapping[str, Any]) -> list[int]:
    ends = said.get("eos_token_id")
    return [one for one in (ends if isinstance(ends, list) else [ends]) if type(one) is int]
