"""Which of a tokenizer's ids a corpus can hold: known before a document is read. An id that none can hold needs no row of an embedding."""

import re

from gigatrain import config
from gigatrain.data import templates, tokenizer


def outside(spec: config.Tokenizer, sources: tuple[config.Source, ...], embedded: int) -> str | None:
    """What is wrong where an id can occur that is not among the first `embedded`; None where all is well, and for a tokenizer that the run trains.

    Text gives every token but special ones (data/tokenizer.py encodes their names as text); the ends of documents, and for conversations the tokens that the
    template names, are special and occur. Others, as Gemma 3's image token (262,144, of 262,144 rows), do not. A token that a template puts together from
    parts is not seen here: reading refuses it.
    """
    if spec.source is None:
        return None
    ready = tokenizer.load(spec.source)
    ids = {number: token for token, number in ready.backend.get_vocab(with_added_tokens=True).items()}
    text, asked = templates.asked(spec)
    known, behind = set(ready.specials.values()), ready.vocab
    for name in asked:
        if name not in known:
            ids[behind], behind = name, behind + 1
    if behind <= embedded:
        return None
    templated = any(source.format not in ("text", "completion") for source in sources)
    written = "\n".join([text] if text is not None else ready.templates.values()) if templated else ""
    told = {name for key, name in ready.names.items() if re.search(rf"\b{re.escape(key)}\b", written)}
    reached = {
        number: token
        for number, token in ids.items()
        if number >= embedded
        and (number not in ready.specials or number in (ready.bos, ready.eos) or token in told or token in written)
        and (token not in asked or templated)
    }
    if not reached:
        return None
    highest = max(reached)
    return (
        f"the tokenizer has {highest + 1} ids and the model embeds {embedded}; {reached[min(reached)]!r} ({min(reached)}) would occur and have no row. "
        f"--set model.architecture.vocab={highest + 1} gives it one, or use the model's own tokenizer"
    )
