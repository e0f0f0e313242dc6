"""One part of a source to its shards and its record, by one process: the record comes last, so that a part without one is tokenised again. Free of torch."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from gigatrain import config
from gigatrain.data import documents, messages, preferred, shards, sources, tokenizer
from gigatrain.data.corpus import SPLITS
from gigatrain.data.documents import Usable

NAMED = 10_000  # skipped documents that are named; all are counted
XZ_BYTES = 64_000_000  # of held-out text that is compressed for comparison: xz -9 takes about a second a megabyte
BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 20, 512  # encoded together; an encoding costs some 100 bytes a token while it lives


def tokenise(data: config.Data, ready: tokenizer.Tokenizer, part: sources.Part, folder: Path) -> dict[str, Any]:
    """Tokenise one part into its shards and its record, which is written last."""
    source = data.sources[part.source]
    record = _adopt(data, ready, part) if source.kind == "megatron" else _written(data, ready, part, folder)
    shards.write_atomically(folder / "parts" / f"{part.name}.json", json.dumps(record).encode())
    return record


def _adopt(data: config.Data, ready: tokenizer.Tokenizer, part: sources.Part) -> dict[str, Any]:
    """The record of a Megatron shard that stays where it is: read once for its ids and its hash; its last documents are held out."""
    prefix = Path(part.pieces[0].path)
    shard = shards.Shard(prefix)
    ends = shard.check(ready.vocab)
    files = {}
    for suffix in ("bin", "idx", *(("mask",) if shard.mask is not None else ())):
        path = prefix.with_name(f"{prefix.name}.{suffix}")
        files[suffix] = {"bytes": path.stat().st_size, "sha256": shards.file_sha256(path)}
    cut = shard.documents - round(shard.documents * data.validation)
    splits = {}
    for split, first, stop in (("train", 0, cut), ("validation", cut, shard.documents)):
        start, end = shard.starts(first, first + 1)[0], shard.starts(stop, stop + 1)[0]
        marks = {} if shard.mask is None else {"trained": int(np.count_nonzero(shard.mask[start:end]))}
        one = {"prefix": str(prefix), "first": first, "documents": stop - first, "tokens": int(end - start), **marks, **files}
        found = [one] if end > start else []
        splits[split] = {"shards": found, "text_bytes": None if found else 0}
    bos = ready.bos is not None and ends["opens"] == ready.bos
    return {
        "splits": splits,
        "starts_with_bos": bos,
        "ends_with_eos": ends["closes"] == ready.eos,
        "skipped": {},
        "mended": {},
        "named": [],
    }


def _written(data: config.Data, ready: tokenizer.Tokenizer, part: sources.Part, folder: Path) -> dict[str, Any]:
    """The record of a part whose documents are tokenised into one shard a split."""
    writing = _Writing(data, ready, part, folder)
    try:
        for document in documents.read(data, part):
            writing.add(document)
        return writing.record()
    finally:
        writing.abort()


class _Writing:
    """A part's shards while they are written, and what its record will say of them."""

    def __init__(self, data: config.Data, ready: tokenizer.Tokenizer, part: sources.Part, folder: Path) -> None:
        self.bad, self.source = data.bad, data.sources[part.source]
        self.ready, self.name, self.folder = ready, part.name, folder
        self.marked = self.source.format != "text"
        self.writers = {
            split: shards.ShardWriter(folder / "shards" / f"{part.name}.{split}", ready.vocab, marked=self.marked) for split in SPLITS
        }
        self.text_bytes = dict.fromkeys(SPLITS, 0)
        self.skipped: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.named: list[dict[str, str]] = []
        self.heldout: list[bytes] = []
        self.batch: list[Usable] = []
        self.characters = 0

    def add(self, document: Usable) -> None:
        """Take one more document; it is encoded with others."""
        if document.skipped:
            self._skip(document.where, document.skipped)
            return
        self.batch.append(document)
        self.characters += len(document.text)
        if self.characters >= BATCH_CHARACTERS or len(self.batch) >= BATCH_DOCUMENTS:
            self._flush()

    def record(self) -> dict[str, Any]:
        """Finish the shards; what the part's record says. Held-out text, as long as it is to be compressed, is kept beside it."""
        self._flush()
        splits: dict[str, Any] = {}
        for split in SPLITS:
            shard = self.writers[split].finish()
            found = [{"prefix": f"shards/{self.name}.{split}", **shard}] if shard else []
            splits[split] = {"shards": found, "text_bytes": None if self.marked and found else self.text_bytes[split]}
        if 0 < self.text_bytes["validation"] <= XZ_BYTES:
            shards.write_atomically(heldout(self.folder, self.name), b"".join(self.heldout))
        return {
            "splits": splits,
            "starts_with_bos": self.ready.bos is not None,
            "ends_with_eos": not self.marked,  # a template ends a conversation as it likes
            "skipped": dict(sorted(self.skipped.items())),
            "mended": dict(sorted(self.mended.items())),
            "named": self.named,
        }

    def abort(self) -> None:
        """Take away what is not finished."""
        for writer in self.writers.values():
            writer.abort()

    def _flush(self) -> None:
        batch, self.batch, self.characters = self.batch, [], 0
        if not self.marked:
            self._texts(batch)
            return
        for document in batch:
            if self.source.format == "preference":
                self._pair(document)
            else:
                self._conversation(document)

    def _texts(self, batch: list[Usable]) -> None:
        extra = 1 + (self.ready.bos is not None)
        for document, encoded in zip(batch, self.ready.documents([document.text for document in batch]), strict=True):
            ids, text, split = encoded, document.text.encode(), SPLITS[document.validation]
            if reason := self._length([len(ids) - extra]):
                if not self._cuts(reason):
                    self._leave_out(document, reason)
                    continue
                ids = np.concatenate([ids[: self.bad.max_tokens + extra - 1], ids[-1:]])
                text = self.ready.decode(ids).encode()
                self.mended["truncated"] += 1
            self.mended.update([document.mended] if document.mended else [])
            self.writers[split].add(ids)
            self.text_bytes[split] += len(text)
            if document.validation and self.text_bytes[split] <= XZ_BYTES:
                self.heldout.append(text)

    def _conversation(self, document: Usable) -> None:
        """Store the samples of a conversation; how many bytes of its text are trained, nobody counts."""
        found = messages.samples(self.source, document.text, self.ready)
        if isinstance(found, str):
            self._leave_out(document, found)
            return
        if len(found) > 1:
            self.mended["split by turn"] += 1
        most = self.bad.max_tokens
        for ids, trained in found:
            reason = self._length([len(ids)])
            if reason and not (self._cuts(reason) and trained[1:most].any()):
                self._leave_out(document, reason)
                continue
            self.mended.update(["truncated"] if reason else [document.mended] if document.mended else [])
            self.writers[SPLITS[document.validation]].add(*((ids[:most], trained[:most]) if reason else (ids, trained)))

    def _pair(self, document: Usable) -> None:
        """Store both documents of a pair, or neither."""
        found = preferred.documents(self.source, document.text, self.ready)
        if isinstance(found, str):
            self._leave_out(document, found)
            return
        if reason := self._length([len(ids) for ids, _ in found if len(ids)]):
            self._leave_out(document, reason + ("; a pair is never truncated" if reason.startswith("long") else ""))
            return
        self.mended.update([document.mended] if document.mended else [])
        for ids, trained in found:
            self.writers[SPLITS[document.validation]].add(ids, trained)

    def _length(self, counts: list[int]) -> str:
        """Why documents of so many tokens are too long or too short; "" where they are not, or that is no matter."""
        if max(counts) > self.bad.max_tokens and self.bad.long != "keep":
            return f"long: {max(counts)} tokens, and the most is {self.bad.max_tokens}"
        if min(counts) < self.bad.min_tokens and self.bad.short != "keep":
            return f"short: {min(counts)} tokens, and the least is {self.bad.min_tokens}"
        return ""

    def _cuts(self, reason: str) -> bool:
        return reason.startswith("long") and self.bad.long == "truncate"

    def _leave_out(self, document: Usable, reason: str) -> None:
        """Skip a document. Raises DataError where such are refused."""
        documents.refuse(self.bad, reason, document.where, self.source)
        self._skip(document.where, reason)

    def _skip(self, where: str, reason: str) -> None:
        self.skipped[reason.partition(":")[0]] += 1
        if len(self.named) < NAMED:
            self.named.append({"source": self.source.path or self.source.kind, "document": where, "reason": reason})


def heldout(folder: Path, name: str) -> Path:
    """Where a part's held-out text waits for the manifest (manifest.py)."""
    return folder / "parts" / f"{name}.heldout"


def lacks_text(folder: Path, name: str, record: dict[str, Any]) -> bool:
    """Whether a part has held-out text and its file is gone."""
    return bool(record["splits"]["validation"]["text_bytes"]) and not heldout(folder, name).is_file()


def compresses(sizes: list[int | None]) -> bool:
    """Whether held-out text of these bytes is compressed for comparison: all of it is known, and little enough."""
    known = [size for size in sizes if size is not None]
    return len(known) == len(sizes) and 0 < sum(known) <= XZ_BYTES
