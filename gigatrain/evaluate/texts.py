"""Bits per byte of texts, for models of any tokenizer: -log2 P(text) over the bytes of its UTF-8.

A document is tokenised alone, as the model's tokenizer does it, behind the token that begins a text (bos, else eos); the end of the document is not
counted, since some tokenizers have none. Of what is longer than the context, windows overlap by half, and each token is predicted once, from at least
half a context before it (arXiv:2012.15832 measures what shorter pasts cost). The harness's own bits_per_byte (loglikelihood_rolling) has windows without
overlap, and of a tokenizer that puts its bos before a text it counts that bos as a token of the text.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigatrain.errors import DataError, RunError

ROWS = 1 << 25  # logits that are brought to fp32 at a time: 128 MiB


@dataclass(frozen=True)
class Document:
    """A text, and the file that it is counted for."""

    of: str
    text: str


def documents(path: Path) -> list[Document]:
    """Documents of a file: each `text` of .jsonl lines, else the whole file; of a folder, each file below it. Raises DataError."""
    if path.is_dir():
        files = sorted(
            one for one in path.rglob("*") if one.is_file() and not any(part.startswith(".") for part in one.relative_to(path).parts)
        )
        return [Document(str(path), document.text) for file in files for document in documents(file)]
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as failure:
        raise DataError(f"{path} cannot be read: {failure.strerror}") from None
    except UnicodeDecodeError as failure:
        raise DataError(f"{path} is no UTF-8 text (byte {failure.start}); bits per byte are of text") from None
    if path.suffix != ".jsonl":
        return [Document(str(path), text)] if text else []
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            said = None
        if not isinstance(said, str):
            raise DataError(f'{path}, line {number}: no JSON object with a "text"; rename its column, or give plain text files')
        found += [Document(str(path), said)] if said else []
    return found


def measure(found: Sequence[Document], model: Any, tokenizer: Any, *, context: int | None, batch: int) -> list[dict[str, Any]]:
    """A row for each file: bits per byte, perplexity per token, nats, bytes, tokens. Raises RunError where a tokenizer has nothing to begin a text with."""
    positions = getattr(model.config, "max_position_embeddings", None) or 2048
    if not found:
        raise RunError("the files hold no text: there is nothing to count bits of")
    length = min(context or positions, positions)
    if context is not None and context > positions:
        raise RunError(f"--context {context} is more than the model's {positions} positions; lower it")
    if length < 2:
        raise RunError(f"a context of {length} token predicts nothing; give at least --context 2")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise RunError("the tokenizer has neither bos nor eos, so there is no token that a text begins with")
    rows: dict[str, dict[str, Any]] = {}
    for one in found:
        row = rows.setdefault(one.of, {"text": one.of, "documents": 0, "bytes": 0, "tokens": 0, "nats": 0.0})
        ids = tokenizer(one.text, add_special_tokens=False, verbose=False)["input_ids"]
        row["documents"] += 1
        row["bytes"] += len(one.text.encode())
        row["tokens"] += len(ids)
        row["nats"] += _nats(model, [start, *ids], length, batch)
    for row in rows.values():
        loss = row["nats"] / max(1, row["tokens"])
        row |= {
            "context": length,
            "bits_per_byte": row["nats"] / math.log(2) / row["bytes"],
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else None,
        }
        if not math.isfinite(row["nats"]):
            raise RunError(f"the model gives {row['text']} a probability that is not finite: its weights or its precision are broken")
    return list(rows.values())


def windows(tokens: int, length: int) -> Iterator[tuple[int, int, int]]:
    """`(begin, stop, first)`: the ids [begin, stop) are read, and those in [first, stop) are predicted, each of 1 .. tokens - 1 once."""
    first, half = 1, max(1, length // 2)
    stop = min(tokens, length + 1)  # the last id is no input
    begin = 0
    while first < tokens:
        yield begin, stop, first
        first = stop
        stop = min(tokens, stop + half)
        begin = max(0, stop - 1 - length)


def _nats(model: Any, ids: list[int], length: int, batch: int) -> float:
    """-ln P of ids[1:], in fp64 over fp32 log-probabilities."""
    import torch

    total, cut = 0.0, list(windows(len(ids), length))
    with torch.inference_mode():
        for at in range(0, len(cut), batch):
            part = cut[at : at + batch]
            widest = max(stop - 1 - begin for begin, stop, _ in part)
            # Padded at the right: a causal model's earlier positions do not see it.
            rows = [ids[begin : stop - 1] + [ids[0]] * (widest - (stop - 1 - begin)) for begin, stop, _ in part]
            logits = model(torch.tensor(rows, device=model.device), use_cache=False).logits
            for row, (begin, stop, first) in zip(logits, part, strict=True):
                scores = row[first - 1 - begin : stop - 1 - begin]
                labels = torch.tensor(ids[first:stop], device=scores.device)
                each = max(1, ROWS // scores.shape[-1])
                for low in range(0, len(labels), each):
                    high = low + each
                    total += float(torch.nn.functional.cross_entropy(scores[low:high].float(), labels[low:high], reduction="sum").double())
    return total
