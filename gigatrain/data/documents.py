"""The documents of a source as they are used: decoded, mended, left out or refused by `data.bad`, and held out or not. Free of torch."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from gigatrain import config
from gigatrain.data import messages, sources
from gigatrain.errors import DataError


def held_out(key: str, share: float) -> bool:
    """Whether a document is for validation: a keyed hash of its name, or of its text, is below `share`.

    Copies of a text land on the same side.
    """
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8, key=b"gigatrain held-out documents").digest()
    return int.from_bytes(digest, "big") < share * 2**64


@dataclass(frozen=True)
class Usable:
    """A document after the policies: its text, whether it was mended, or why it is left out."""

    where: str
    text: str
    validation: bool = False
    mended: str = ""
    skipped: str = ""


def read(data: config.Data, part: sources.Part) -> Iterator[Usable]:
    """The documents of a part after the policies that need no tokens; DataError names the one that a policy refuses."""
    bad, source = data.bad, data.sources[part.source]
    for raw in sources.read(source, part):
        reason, text, mended = raw.bad, "", ""
        if not reason:
            assert raw.data is not None
            try:
                text = raw.data.decode("utf-8") if isinstance(raw.data, bytes) else raw.data
                text.encode("utf-8")  # JSON and Python can hold half a surrogate pair
            except UnicodeError as error:
                if bad.undecodable == "replace":
                    content = raw.data if isinstance(raw.data, bytes) else raw.data.encode("utf-8", "surrogatepass")
                    text, mended = content.decode("utf-8", "replace"), "replaced"
                else:
                    reason = (
                        f"undecodable: {error.reason} at {error.start}"
                        if isinstance(error, UnicodeDecodeError | UnicodeEncodeError)
                        else "undecodable"
                    )
            if not reason and not text.strip():
                reason = "empty"
        if reason:
            if raw.keys:
                reason += _instead(part.source, source, raw.keys)
            refuse(bad, reason, raw.where, source)
            yield Usable(raw.where, "", skipped=reason)
        else:
            yield Usable(raw.where, text, held_out(text if raw.key is None else raw.key, data.validation), mended)


def _instead(number: int, source: config.Source, keys: tuple[str, ...]) -> str:
    """What a record that lacks a column has, and which key would have it read."""
    way = messages.way(source, keys)
    has = f"; it has {', '.join(keys[:12])}{', …' if len(keys) > 12 else ''}"
    return f"{has}: --set data.sources.{number}.{way}" if way else f"{has}: set data.sources.{number}.field, or its format"


def refuse(bad: config.BadDocuments, reason: str, where: str, source: config.Source) -> None:
    """DataError if the policy for `reason` is "refuse"."""
    name = reason.partition(":")[0]
    if name == "history":
        if source.history == "refuse":
            raise DataError(
                f'{source.path}: document {where}: {reason.partition(": ")[2]}; set `history` of the source to "split": one sample a turn, or "skip"'
            )
        return
    key = "unparsable" if name == "corrupt" else name
    if getattr(bad, key) == "refuse":
        raise DataError(f"{source.path or source.kind}: document {where} is {reason}; mend it, or set `data.bad.{key}` to 'skip'")
