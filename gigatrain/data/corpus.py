"""A built corpus, opened: what its manifest says, and the streams of tokens that training reads; build.py says how its folder is laid out. Free of torch."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gigatrain.data import shards, tokenizer
from gigatrain.data.job import Progress
from gigatrain.errors import DataError

FORMAT = 1  # of a manifest; raise it when the same inputs would give other tokens
SPLITS: tuple[Literal["train"], Literal["validation"]] = ("train", "validation")


@dataclass(frozen=True)
class Corpus:
    """A built corpus, opened: its manifest, the sources' weights, and the streams of tokens. Nothing is read before it is asked for.

    check: compare each shard's SHA-256 with the manifest when it is first opened, once (some 1 ms a megabyte, where it is read from).
    embedded: rows of the embedding that its tokens are for; one that is read and has none is refused, as one that the tokenizer does not have.
    """

    folder: Path
    manifest: dict[str, Any]
    weights: tuple[float, ...]
    check: bool = True
    embedded: int | None = None
    verified: set[str] = field(default_factory=set, repr=False, compare=False)  # prefixes of the shards that were compared

    @classmethod
    def open(cls, folder: Path, weights: tuple[float, ...] | None = None, *, check: bool = True) -> "Corpus":
        """Open a corpus folder.

        DataError, naming the file, if the manifest is missing or damaged or a shard has another size than it says.
        """
        path = folder / "manifest.json"
        if not path.is_file():
            raise DataError(
                f"{folder} has no manifest.json: it is no corpus, or its build did not finish; run `gigatrain data build` again"
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            checksum = manifest.pop("checksum")
            if manifest["format"] != FORMAT:
                raise DataError(
                    f"{path} has format {manifest['format']}, and this version reads {FORMAT}; delete the folder and build again"
                )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{path} is damaged ({type(error).__name__}: {error}); delete it and run `gigatrain data build` again"
            ) from error
        if digest(manifest) != checksum:
            raise DataError(
                f"{path} was changed after it was written (its checksum differs); delete it and run `gigatrain data build` again"
            )
        corpus = cls(folder, manifest, weights or (1.0,) * len(manifest["sources"]), check)
        if len(corpus.weights) != len(manifest["sources"]):
            raise DataError(f"{len(corpus.weights)} weights for the {len(manifest['sources'])} sources of {folder}")
        for prefix, record in corpus.shards():
            for suffix in shards.files(record):
                shards.check_size(prefix.with_name(f"{prefix.name}.{suffix}"), record[suffix]["bytes"])
        return corpus

    @property
    def vocab(self) -> int:
        """Highest token id that a document can have, + 1."""
        return min(self.manifest["vocab"], self.embedded or self.manifest["vocab"])

    @property
    def eos(self) -> int:
        """The token that ends a document."""
        return self.manifest["eos"]

    @property
    def sha256(self) -> str:
        """What identifies the tokens and their order; independent of where the files lie and when they were written."""
        return self.manifest["sha256"]

    @property
    def sources(self) -> list[str]:
        """A name for each source, for messages."""
        return [source["name"] for source in self.manifest["sources"]]

    def totals(self, split: str) -> dict[str, Any]:
        """{"documents", "tokens", "text_bytes", "xz_bytes"} of a split; the last two are None where nobody knows."""
        return self.manifest["totals"][split]

    def stream(self, source: int, split: str = "train") -> shards.Stream:
        """The documents of one source and split, end to end."""
        records = self.manifest["sources"][source]["splits"][split]["shards"]
        return shards.Stream(self.folder, records, self.vocab, self.verified if self.check else None)

    def tokenizer(self) -> tokenizer.Tokenizer:
        """The tokenizer that made the corpus."""
        return tokenizer.load(str(self.folder / "tokenizer"), *map(self.manifest["tokenizer"].get, ("date", "variables")))

    def describe(self) -> list[str]:
        """The corpus in a few lines, for people."""
        lines = [f"{self.folder}", f"vocabulary {self.vocab:,}, SHA-256 {self.sha256[:16]}…"]
        for source in self.manifest["sources"]:
            for split in SPLITS:
                found = source["splits"][split]
                text = "" if found["text_bytes"] is None else f" of {found['text_bytes']:,} bytes of text"
                if "trained" in found:
                    text += f", {found['trained']:,} of them trained"
                lines.append(f"source {source['name']}, {split}: {found['documents']:,} documents, {found['tokens']:,} tokens{text}")
            lines += [f"source {source['name']}, {kind}: {source[kind]}" for kind in ("skipped", "mended") if source[kind]]
        named = self.folder / "skipped.jsonl"
        return [*lines, *self.left_out()[:1], *([f"skipped documents are named in {named}"] if self.manifest["skipped"] else [])]

    def left_out(self) -> list[str]:
        """How many documents that hold something are in no shard, one of them with its reason, and where all are named; [] where there is none."""
        counts = {name: count for name, count in self.manifest["skipped"].items() if name != "empty"}  # which takes nothing from anybody
        path = self.folder / "skipped.jsonl"
        if not counts:
            return []
        said = f"{sum(counts.values()):,} documents are left out ({', '.join(f'{name} {count:,}' for name, count in counts.items())})"
        if not path.is_file():
            return [said]
        with path.open(encoding="utf-8") as file:
            row = next((row for row in map(json.loads, file) if row["reason"] != "empty"), None)
        such = f", such as {row.get('place', row['document'])}: {row['reason']}" if row else ""
        return [f"{said}{such}", f"skipped documents are named in {path}"]

    def shards(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """(prefix, record) of every shard."""
        for source in self.manifest["sources"]:
            for split in SPLITS:
                for record in source["splits"][split]["shards"]:
                    yield self.folder / record["prefix"], record

    def verify(self, progress: Progress | None = None) -> None:
        """Hash every shard again; DataError names the first whose bytes are not those that were built."""
        found = list(self.shards())
        for done, (prefix, record) in enumerate(found):
            shards.verify(prefix, record)
            if progress:
                progress("verify", done + 1, len(found))


def digest(value: Any) -> str:
    """SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()).hexdigest()
