"""What a build writes of a corpus when its parts are done: their records put together, skipped.jsonl and, last, manifest.json. Free of torch."""

import json
import lzma
from collections import Counter
from typing import Any

from gigatrain import config
from gigatrain.data import shards, sources, tokenizer
from gigatrain.data.corpus import FORMAT, SPLITS, digest
from gigatrain.data.job import Job
from gigatrain.data.tokenise import NAMED, compresses, heldout
from gigatrain.errors import DataError

PLACED, PLACED_BYTES = (
    20,
    1 << 26,
)  # so many skipped documents by the number of their line, which is counted in at most so many bytes of a file

_Record = dict[str, Any]  # of a part, as tokenise.py makes it


def write(job: Job, ready: tokenizer.Tokenizer, records: list[_Record], key: str) -> None:
    """Put the parts' records together and write the manifest under the corpus's `key`.

    Raises DataError where a source has no token to train on, or documents were to be held out and none is.
    """
    parts = list(zip(job.parts, records, strict=True))
    found = [
        _source(number, source, [one for part, one in parts if part.source == number]) for number, source in enumerate(job.data.sources)
    ]
    for number, source in enumerate(found):
        _refuse_untrained(job, source, [(part, one) for part, one in parts if part.source == number])
    totals = {split: _total([source["splits"][split] for source in found]) for split in SPLITS}
    refuse_unvalidated(job.data, totals)
    if compresses([totals["validation"]["text_bytes"]]):
        job.report("compress held-out text", 0, 1)
        held = [part.name for part, one in parts if one["splits"]["validation"]["text_bytes"]]
        text = b"".join(heldout(job.folder, name).read_bytes() for name in held)
        totals["validation"]["xz_bytes"] = len(lzma.compress(text, preset=9))
        job.report("compress held-out text", 1, 1)
    first = [(part, row) for part, one in parts for row in one["named"]][:NAMED]
    named = [row | (_placed(job, part, row["document"]) if number < PLACED else {}) for number, (part, row) in enumerate(first)]
    shards.write_atomically(job.folder / "skipped.jsonl", "".join(json.dumps(row) + "\n" for row in named).encode())
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "key": key,
        "vocab": ready.vocab,
        "eos": ready.eos,
        "starts_with_bos": ready.bos is not None,
        "tokenizer": {"sha256": ready.sha256} | {name: told for name in ("date", "variables") if (told := getattr(ready, name))},
        "sources": found,
        "totals": totals,
        **{kind: _counts(found, kind) for kind in ("skipped", "mended")},
    }
    manifest["sha256"] = digest([FORMAT, ready.sha256, ready.vocab, ready.eos, [_order(source) for source in found]])
    manifest["checksum"] = digest(manifest)
    shards.write_atomically(job.folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    for path in (job.folder / "parts").glob("*.heldout"):
        path.unlink()


def _source(number: int, source: config.Source, records: list[_Record]) -> dict[str, Any]:
    """What the manifest says of a source: the records of its parts as one."""
    splits = {}
    for split in SPLITS:
        held = [record["splits"][split] for record in records]
        entries = [shard for record in held for shard in record["shards"]]
        splits[split] = {
            "documents": sum(shard["documents"] for shard in entries),
            "tokens": sum(shard["tokens"] for shard in entries),
            "text_bytes": _known_sum([record["text_bytes"] for record in held]),
            "shards": entries,
        }
        if any("trained" in shard for shard in entries):
            splits[split]["trained"] = sum(shard.get("trained", shard["tokens"]) for shard in entries)
    return {
        "too_long": source.too_long,
        "name": f"{number} ({source.kind}{f' {source.path}' if source.path else ''})",
        "starts_with_bos": all(record["starts_with_bos"] for record in records),
        "ends_with_eos": all(record["ends_with_eos"] for record in records),
        "splits": splits,
        **{kind: _counts(records, kind) for kind in ("skipped", "mended")},
    }


def _counts(records: list[dict[str, Any]], kind: str) -> dict[str, int]:
    """What was skipped or mended, by reason, of all records."""
    return dict(sorted(sum((Counter(record[kind]) for record in records), Counter()).items()))


def _known_sum(sizes: list[int | None]) -> int | None:
    """None where one of them is not known."""
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _total(splits: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one split of all sources; `xz_bytes` is not known yet."""
    sums = {name: sum(split[name] for split in splits) for name in ("documents", "tokens")}
    return {**sums, "text_bytes": _known_sum([split["text_bytes"] for split in splits]), "xz_bytes": None}


def _order(source: dict[str, Any]) -> list[Any]:
    """What of a source decides the tokens that are read and their order."""
    read = [
        [[*(s[name]["sha256"] for name in shards.files(s)), s.get("first", 0), s["tokens"]] for s in source["splits"][split]["shards"]]
        for split in SPLITS
    ]
    too_long = [source["too_long"]] if source["too_long"] != "truncate" else []
    return [source["starts_with_bos"], source["ends_with_eos"], *read, *too_long]


def _refuse_untrained(job: Job, source: dict[str, Any], parts: list[tuple[sources.Part, _Record]]) -> None:
    """DataError for a source of which no token is left to train on."""
    if source["splits"]["train"]["tokens"]:
        return
    held, left_out = source["splits"]["validation"]["documents"], sum(source["skipped"].values())
    first = next(((part, row["document"], row["reason"]) for part, record in parts for row in record["named"]), None)
    raise DataError(
        f"source {source['name']} has no training token: {held:,} documents are held out and {left_out:,} were skipped "
        f"{source['skipped'] or ''}{empty_hint(job, first)}"
    )


def _placed(job: Job, part: sources.Part, where: str) -> dict[str, str]:
    """{"place": the file and line of a record of JSON lines}, which is otherwise known by the byte at which its line begins; {} far into a file."""
    at = where.rpartition(":")[2]
    source = job.data.sources[part.source]
    near = source.kind == "jsonl" and at.isdecimal() and int(at) < PLACED_BYTES
    return {"place": sources.place(source, part, where)} if near else {}


def refuse_unvalidated(data: config.Data, totals: dict[str, Any]) -> None:
    """DataError if documents are to be held out and none is; of a Megatron source the last ones are, and they count as well."""
    if data.validation > 0 and not totals["validation"]["tokens"]:
        raise DataError(
            f"none of {totals['train']['documents']:,} documents is held out: `data.validation` is {data.validation}, a share that comes to "
            f"{totals['train']['documents'] * data.validation:.2g} documents; raise data.validation, or set it to 0"
        )


def empty_hint(job: Job, skipped: tuple[sources.Part, str, str] | None) -> str:
    """The way out where nothing is left to train on: the first document that was skipped, with its reason, or what else takes documents away."""
    hint = f"; add documents, loosen `data.bad`, or lower `data.validation` (now {job.data.validation})"
    if skipped is None:
        return hint
    part, where, reason = skipped
    loose = reason.partition(":")[0] in ("short", "long", "empty", "undecodable")
    return f"; the first, {sources.place(job.data.sources[part.source], part, where)}, is {reason}{hint if loose else ''}"
