"""generation_config.json: where an answer ends, and how it is drawn when nobody says otherwise."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gigatrain import config

ANSWER = "gigatrain's answer"  # a text that no template holds


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
    """generation_config.json. `source`: the folder that the run's weights are from, whose own ends are ends here too.

    An answer of a chat ends with its template's token, a text with the tokenizer's eos: both are named, since a generation stops at any of them.
    """
    ends = [number for number in (tokens.get("eos"), *turns, *_ends_of(source)) if number is not None]
    ends = list(dict.fromkeys(ends))
    found: dict[str, Any] = {f"{name}_token_id": tokens[name] for name in ("bos", "pad") if tokens.get(name) is not None}
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if sample.temperature > 0:
        found |= {"do_sample": True, "temperature": sample.temperature}
        found |= {"top_k": sample.top_k} if sample.top_k else {"top_k": 0}  # transformers' own default is 50
    else:
        found["do_sample"] = False
    return dict(sorted(found.items()))


def _ends_of(source: Path | None) -> list[int]:
    path = source / "generation_config.json" if source is not None else None
    if path is None or not path.is_file():
        return []
    said = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return [said] if isinstance(said, int) else [one for one in said or [] if isinstance(one, int)]
