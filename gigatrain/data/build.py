"""Documents to token shards, once per corpus: resumable, in parallel, atomic. Free of torch.

A corpus is a folder, `data.folder`/<key>, named by a hash of everything that decides its tokens. Each part of a source is tokenised by one
process into its own shards and a record; `manifest.json` comes last. A build that was killed goes on with the parts that have no record.

    <key>/tokenizer/            tokenizer.json and what an export needs beside it
          shards/0-000000.train.{bin,idx}, 0-000000.validation.{bin,idx}
          parts/0-000000.json   record of one part: its shards' sizes and SHA-256, what was skipped (tokenise.py)
          skipped.jsonl         the first 10,000 skipped documents by name (manifest.py)
          manifest.json
"""

import errno
import fcntl
import hashlib
import heapq
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gigatrain import config
from gigatrain.data import documents, manifest, messages, shards, sources, templates, tokenizer, workers
from gigatrain.data.corpus import FORMAT, Corpus, digest
from gigatrain.data.job import Job, Progress
from gigatrain.data.mixture import slot_counts
from gigatrain.errors import DataError

RECORDS = 2  # FORMAT of records that are no plain text, so that corpora of text keep their names. 2: keys stay in their order; turns may be context


def build(data: config.Data, spec: config.Tokenizer, *, progress: Progress | None = None, check: bool = True) -> Corpus:
    """Tokenise what `data` names and open the result; a corpus that is already there is only opened.

    `progress(stage, done, total)` is called as it goes, in bytes of input; `check` is that of the Corpus. DataError if an input is missing,
    damaged or refused by `data.bad`, if a weight is too small for a slot, if the disk is full, if no training token is left, or if
    `data.validation` asks for held-out documents and there is none.
    """
    parts, existing, identity, key = _named(data, spec)
    weights = tuple(source.weight for source in data.sources)
    slot_counts(weights)  # refuses a weight now, not after hours of tokenising
    folder = Path(data.folder).expanduser().absolute() / key
    if (folder / "manifest.json").is_file():
        return _opened(folder, weights, data, check)
    report = progress or (lambda *_: None)
    try:
        for below in ("shards", "parts"):
            (folder / below).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create {folder}: {error.strerror}; set `data.folder` to a folder that you may write") from error
    try:
        with _locked(folder / "lock", report):
            if (folder / "manifest.json").is_file():  # another process built it while this one waited
                return _opened(folder, weights, data, check)
            # What a killed build left; nobody else writes here under the lock.
            for left in (*folder.glob("*/*.tmp"), *folder.glob("*.json*.tmp")):
                left.unlink(missing_ok=True)
            shards.write_atomically(folder / "spec.json", json.dumps(identity, indent=1).encode())
            job = Job(data, spec, existing, parts, folder, report)
            ready = _tokenizer(job)
            records = workers.tokenise_all(job, ready)
            again = [part for number, source in enumerate(data.sources) for part in sources.parts(number, source, data.shard_bytes)]
            if _identity(data, spec, existing, again) != identity:
                raise DataError("the inputs changed while they were read; build again when nobody writes to them")
            manifest.write(job, ready, records, key)
    except OSError as error:
        raise shards.full_disk(error, folder) from error
    return _opened(folder, weights, data, check)


def missing(data: config.Data, spec: config.Tokenizer) -> str | None:
    """Why a run that begins now would tokenise first, in one line; None where its corpus is there. Builds and downloads nothing."""
    on_hub = spec.source and not spec.source.startswith(("/", ".", "~")) and not Path(spec.source).exists()
    if on_hub or any(source.kind == "hub" for source in data.sources):
        return f"whether it is in {data.folder} is not looked up, since its sources or tokenizer are on the hub"
    try:
        folder = Path(data.folder).expanduser().absolute() / _named(data, spec)[3]
    except DataError as failure:
        return f"cannot be looked for from here: {failure}"
    if (folder / "manifest.json").is_file():
        return None
    return f"no corpus in {folder} yet: the job builds it first, with its nodes waiting; `gigatrain data build` with the same --site does so ahead"


def _named(data: config.Data, spec: config.Tokenizer) -> tuple[list[sources.Part], tokenizer.Tokenizer | None, dict[str, Any], str]:
    """The parts of what `data` names, the tokenizer that exists, what decides the tokens, and the folder's name that follows from it."""
    parts = [part for number, source in enumerate(data.sources) for part in sources.parts(number, source, data.shard_bytes)]
    existing = tokenizer.load(spec.source) if spec.source is not None else None
    identity = _identity(data, spec, existing, parts)
    return parts, existing, identity, digest(identity)[:24]


def _opened(folder: Path, weights: tuple[float, ...], data: config.Data, check: bool) -> Corpus:
    """The corpus of `data`, which is there."""
    corpus = Corpus.open(folder, weights, check=check)
    manifest.refuse_unvalidated(data, corpus.manifest["totals"])
    return corpus


def _identity(data: config.Data, spec: config.Tokenizer, existing: tokenizer.Tokenizer | None, parts: list[sources.Part]) -> dict[str, Any]:
    """Everything that decides the tokens: not the weights, the packing, the workers or the folder."""
    inputs = hashlib.sha256()
    for part in parts:
        for piece in part.pieces:
            place = piece.path if data.sources[part.source].kind == "megatron" else ""  # these stay where they are
            inputs.update(json.dumps([part.source, part.number, piece.name, place, piece.start, piece.stop, piece.stamp]).encode())
    return {
        "format": FORMAT,
        "sources": [_meaning(source, {"format", "too_long", "history"}, {"weight"}) for source in data.sources],
        "tokenizer": [existing.sha256, existing.bos, existing.eos]
        if existing
        else _meaning(spec, {"template", "special", "date", "variables"}) | {"pieces": tokenizer.PIECES},
        **({"template": found} if (found := templates.identity(spec, existing, data.sources)) else {}),
        "bad": _meaning(data.bad, {"unmarkable"}),
        "validation": data.validation,
        "shard_bytes": data.shard_bytes,
        "inputs": inputs.hexdigest(),
        **({"records": RECORDS} if any(source.format != "text" for source in data.sources) else {}),
    }


def _meaning(section: config.Section, later: set[str], never: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    """A section as it decides the tokens; of keys that came `later` only those that are set, so that older corpora keep their names."""
    plain = {name for name in later if getattr(section, name) == type(section).model_fields[name].get_default(call_default_factory=True)}
    return section.model_dump(mode="json", exclude=never | plain)


@contextmanager
def _locked(path: Path, report: Progress) -> Iterator[None]:
    """Hold a file lock: a second build of the same corpus says that it waits, and then finds it done.

    The kernel frees the lock of a killed process. DataError where the file system has no locks.
    """
    with open(path, "w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                    raise
                report("wait for another build of this corpus", 0, 1)
                fcntl.flock(file, fcntl.LOCK_EX)
                report("wait for another build of this corpus", 1, 1)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, str(error.errno))
            raise DataError(
                f"cannot lock {path}: {name}, {error.strerror}; without a lock two builds would write the same files: "
                "mount the file system with locks (Lustre: -o flock), or set `data.folder` to another disk"
            ) from error
        yield


def _tokenizer(job: Job) -> tokenizer.Tokenizer:
    """The tokenizer in the corpus's own folder: copied there, or trained on a sample of the training documents."""
    place, temporary = job.folder / "tokenizer", job.folder / "tokenizer.tmp"
    if place.is_dir():
        return tokenizer.load(str(place), job.spec.date, job.spec.variables)
    shutil.rmtree(temporary, ignore_errors=True)  # of a build that was killed
    try:
        temporary.mkdir()
        if job.existing is not None:
            tokenizer.keep(job.existing, temporary)
        else:
            assert job.spec.train is not None
            texts = _sample(job, job.spec.train.max_bytes)
            if not texts:
                read = (part for part in job.parts if job.data.sources[part.source].kind != "megatron")
                skipped = next(
                    ((part, one.where, one.skipped) for part in read for one in documents.read(job.data, part) if one.skipped), None
                )
                raise DataError(
                    f"no training document to train a tokenizer on, in {len(job.data.sources)} sources{manifest.empty_hint(job, skipped)}"
                )
            job.report("train tokenizer", 0, 1)
            tokenizer.train(texts, job.spec.train.vocab, temporary, templates.asked(job.spec)[1])
            job.report("train tokenizer", 1, 1)
        templates.install(temporary, job.spec)
        templates.fits(tokenizer.load(str(temporary)), job.data.sources)
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.rename(place)
    except OSError as error:
        raise shards.full_disk(error, place) from error
    return tokenizer.load(str(place), job.spec.date, job.spec.variables)


def _sample(job: Job, max_bytes: int) -> list[str]:
    """At most `max_bytes` of training documents: those with the lowest hashes, so an even share of all, whatever their order.

    Of a corpus above four times that, every n-th part is looked at, so that a petabyte is not read for a tokenizer.
    """
    parts = [part for part in job.parts if job.data.sources[part.source].kind != "megatron"]
    total = sum(part.bytes for part in parts)
    parts = parts[:: max(1, total // (4 * max_bytes))]
    total, done, kept = sum(part.bytes for part in parts), 0, 0
    heap: list[tuple[int, int, int, str]] = []  # (minus hash, order, bytes, text): the highest hash is first, and goes first
    for part in parts:
        for document in documents.read(job.data, part):
            if document.skipped or document.validation:
                continue
            source = job.data.sources[part.source]
            text = (document.text if source.format == "text" else messages.words(document.text))[:max_bytes]
            size = len(text.encode())
            digest = hashlib.blake2b(f"{part.source}/{document.where}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
            heapq.heappush(heap, (-int.from_bytes(digest, "big"), len(heap), size, text))
            kept += size
            while kept > max_bytes and len(heap) > 1:
                kept -= heapq.heappop(heap)[2]
        done += part.bytes
        job.report("read", done, total)
    return [text for *_, text in heap]
