"""Documents to token shards, once per corpus: resumable, in parallel, atomic; and the Corpus that training reads. Free of torch.

A corpus is a folder, `data.folder`/<key>, named by a hash of everything that decides its tokens. Each part of a source is tokenised by one
process into its own shards and a record; `manifest.json` comes last. A build that was killed goes on with the parts that have no record.

    <key>/tokenizer/            tokenizer.json and what an export needs beside it
          shards/0-000000.train.{bin,idx}, 0-000000.validation.{bin,idx}
          parts/0-000000.json   record of one part: its shards' sizes and SHA-256, what was skipped
          skipped.jsonl         the first 10,000 skipped documents by name
          manifest.json
"""

import errno
import fcntl
import hashlib
import heapq
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

import numpy as np

import gigatrain
from gigatrain import config
from gigatrain.data import messages, preferred, shards, sources, templates, tokenizer
from gigatrain.data.mixture import slot_counts
from gigatrain.errors import DataError

FORMAT = 1  # raise it when the same inputs would give other tokens
RECORDS = 2  # the same of records that are no plain text, so that corpora of text keep their names. 2: keys stay in their order; turns may be context
SPLITS: tuple[Literal["train"], Literal["validation"]] = ("train", "validation")
NAMED = 10_000  # skipped documents that are named; all are counted
PLACED, PLACED_BYTES = 20, 1 << 26  # and so many of them by the number of their line, which is counted in at most so many bytes of a file
XZ_BYTES = 64_000_000  # of held-out text that is compressed for comparison: xz -9 takes about a second a megabyte
BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 20, 512  # encoded together; an encoding costs some 100 bytes a token while it lives
INLINE_BYTES = 4 << 20  # below this, starting processes (0.4 s) costs more than they save

Progress = Callable[[str, int, int], None]


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
        if _digest(manifest) != checksum:
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
            records = _tokenise_all(job, ready)
            again = [part for number, source in enumerate(data.sources) for part in sources.parts(number, source, data.shard_bytes)]
            if _identity(data, spec, existing, again) != identity:
                raise DataError("the inputs changed while they were read; build again when nobody writes to them")
            _finish(job, ready, records, key)
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
    return parts, existing, identity, _digest(identity)[:24]


def _opened(folder: Path, weights: tuple[float, ...], data: config.Data, check: bool) -> Corpus:
    """The corpus of `data`, which is there."""
    corpus = Corpus.open(folder, weights, check=check)
    _refuse_unvalidated(data, corpus.manifest["totals"])
    return corpus


def _digest(value: Any) -> str:
    """SHA-256 of canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()).hexdigest()


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


def documents(data: config.Data, part: sources.Part) -> Iterator[Usable]:
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
            _refuse(bad, reason, raw.where, source)
            yield Usable(raw.where, "", skipped=reason)
        else:
            yield Usable(raw.where, text, held_out(text if raw.key is None else raw.key, data.validation), mended)


def _instead(number: int, source: config.Source, keys: tuple[str, ...]) -> str:
    """What a record that lacks a column has, and which key would have it read."""
    way = messages.way(source, keys)
    has = f"; it has {', '.join(keys[:12])}{', …' if len(keys) > 12 else ''}"
    return f"{has}: --set data.sources.{number}.{way}" if way else f"{has}: set data.sources.{number}.field, or its format"


def _refuse(bad: config.BadDocuments, reason: str, where: str, source: config.Source) -> None:
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


@dataclass(frozen=True)
class Job:
    """One build: what is asked for, what there is to read, and where the corpus goes."""

    data: config.Data
    spec: config.Tokenizer
    existing: tokenizer.Tokenizer | None
    parts: list[sources.Part]
    folder: Path
    report: Progress


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
                skipped = next(((part, one.where, one.skipped) for part in read for one in documents(job.data, part) if one.skipped), None)
                raise DataError(
                    f"no training document to train a tokenizer on, in {len(job.data.sources)} sources{_empty_hint(job, skipped)}"
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
        for document in documents(job.data, part):
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


def _tokenise_all(job: Job, ready: tokenizer.Tokenizer) -> list[dict[str, Any]]:
    """The record of every part, in order; those without one are tokenised first, in parallel."""
    records = {part.name: found for part in job.parts if (found := _record(job.folder, part)) is not None}
    # A part is finished with its held-out text, as long as that is to be compressed; _finish deletes it, so that a build whose manifest was
    # deleted reads those parts again.
    if _compresses([record["splits"]["validation"]["text_bytes"] for record in records.values()]):
        records = {name: record for name, record in records.items() if not _lacks_text(job.folder, name, record)}
    pending = [part for part in job.parts if part.name not in records]
    total = sum(part.bytes for part in job.parts)
    done = total - sum(part.bytes for part in pending)
    # At 3 bytes of text a token (English and code have some 4), and 1 MiB for records and manifest. A disk that fills later is an error too.
    writes = sum(part.bytes for part in pending if job.data.sources[part.source].kind != "megatron")
    need = writes * np.dtype(shards.dtype_for(ready.vocab)).itemsize // 3 + (1 << 20)
    free = shutil.disk_usage(job.folder).free
    if free < need:
        raise DataError(
            f"{job.folder} has {free:,} bytes free, and the shards may need {need:,}; free some, or set `data.folder` to another disk"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(job.data.workers or cores, len(pending))
    if workers > 1 and sum(part.bytes for part in pending) > INLINE_BYTES:
        results = _parallel(job, ready, pending, workers)
    else:
        results = ((part, tokenise(job.data, ready, part, job.folder)) for part in pending)
    job.report("tokenise", done, total)
    with closing(results):  # ends the processes, whatever happens here
        for part, record in results:
            records[part.name] = record
            done += part.bytes
            job.report("tokenise", done, total)
    return [records[part.name] for part in job.parts]


def _record(folder: Path, part: sources.Part) -> dict[str, Any] | None:
    """The record of a part that an earlier build finished, if its shards are there."""
    path = folder / "parts" / f"{part.name}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    for split in record["splits"].values():
        for shard in split["shards"]:
            for suffix in shards.files(shard):
                shards.check_size(folder / f"{shard['prefix']}.{suffix}", shard[suffix]["bytes"])
    return record


def _heldout(folder: Path, name: str) -> Path:
    """Where a part's held-out text waits for `_finish`."""
    return folder / "parts" / f"{name}.heldout"


def _lacks_text(folder: Path, name: str, record: dict[str, Any]) -> bool:
    """Whether a part has held-out text and its file is gone."""
    return bool(record["splits"]["validation"]["text_bytes"]) and not _heldout(folder, name).is_file()


def _compresses(sizes: list[int | None]) -> bool:
    """Whether held-out text of these bytes is compressed for comparison: all of it is known, and little enough."""
    known = [size for size in sizes if size is not None]
    return len(known) == len(sizes) and 0 < sum(known) <= XZ_BYTES


def _parallel(
    job: Job, ready: tokenizer.Tokenizer, pending: list[sources.Part], workers: int
) -> Generator[tuple[sources.Part, dict[str, Any]], None, None]:
    """Tokenise parts in `workers` fresh processes that speak one line of JSON a part.

    Fresh, as a fork of a process with threads can deadlock; and not `multiprocessing`, which pickles and would run the caller's main module
    again.
    """
    queue: SimpleQueue[sources.Part] = SimpleQueue()
    for part in pending:
        queue.put(part)
    environment = dict(os.environ, TOKENIZERS_PARALLELISM="false")  # one core each
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(gigatrain.__path__[0]).parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "gigatrain.data.build"]  # -P: nothing is imported from the current folder
    header = json.dumps(
        {
            "data": job.data.model_dump_json(),
            "tokenizer": str(ready.folder),
            "date": ready.date,
            "variables": ready.variables,
            "folder": str(job.folder),
        }
    )
    processes: list[subprocess.Popen[str]] = []
    stopped = threading.Event()

    def serve(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        # A process that has ended breaks the pipe; what it said before says why.
        with suppress(BrokenPipeError):
            print(header, file=process.stdin, flush=True)
        while not stopped.is_set():
            try:
                part = queue.get_nowait()
            except Empty:
                break
            with suppress(BrokenPipeError):
                print(json.dumps([part.source, part.number]), file=process.stdin, flush=True)
            line = process.stdout.readline()
            if not line:
                raise DataError(
                    f"a tokenising process ended with code {process.wait()} at part {part.name} ({part.pieces[0].name} …), "
                    "perhaps for want of memory; build again (finished parts are kept), with a lower `data.workers` or `data.shard_bytes`"
                )
            answer = json.loads(line)
            if "error" in answer:
                raise DataError(answer["error"])
            if "failure" in answer:
                raise DataError(
                    f"a tokenising process failed at part {part.name} ({part.pieces[0].name} …) with {answer['failure']}; "
                    "mend that, or take the input out of the source, and build again: finished parts are kept"
                )
            finished.put((part, answer))

    finished: SimpleQueue[tuple[sources.Part, dict[str, Any]]] = SimpleQueue()
    pool = ThreadPoolExecutor(workers, "tokenise")
    try:
        # Ctrl-C goes to every process of the terminal, and a scheduler's signals to all of a job, but it is for this one to end the others: they
        # inherit that these are blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
        try:
            for _ in range(workers):
                processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        futures = [pool.submit(serve, process) for process in processes]
        left = len(pending)
        while left:
            try:
                yield finished.get(timeout=0.2)
                left -= 1
            except Empty:
                for future in as_completed(f for f in futures if f.done()):
                    future.result()
    finally:
        stopped.set()
        for process in processes:
            process.kill()  # idle by now, unless something failed; a killed process leaves temporary files only
            process.wait()
        pool.shutdown()


def _worker() -> None:
    """What a tokenising process runs: a header on stdin, then [source, part] lines; one record line each on stdout.

    It ends at its first error, which is its last line: {"error"} of a DataError, {"failure"} of anything else.
    """
    try:
        header = json.loads(sys.stdin.readline())
        data, ready = (
            config.Data.model_validate_json(header["data"]),
            tokenizer.load(header["tokenizer"], header["date"], header["variables"]),
        )
        listed: dict[int, list[sources.Part]] = {}
        for line in sys.stdin:
            source, number = json.loads(line)
            if source not in listed:
                listed[source] = sources.parts(source, data.sources[source], data.shard_bytes)
            print(json.dumps(tokenise(data, ready, listed[source][number], Path(header["folder"]))), flush=True)
    except DataError as error:
        print(json.dumps({"error": str(error)}), flush=True)
    except Exception as error:  # told to the parent, which raises it with the part's name
        place = traceback.extract_tb(error.__traceback__)[-1]
        print(json.dumps({"failure": f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"}), flush=True)


def tokenise(data: config.Data, ready: tokenizer.Tokenizer, part: sources.Part, folder: Path) -> dict[str, Any]:
    """Tokenise one part into its shards and its record, which is written last."""
    source = data.sources[part.source]
    record = _adopt(data, ready, part) if source.kind == "megatron" else _write(data, ready, part, folder)
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


def _write(data: config.Data, ready: tokenizer.Tokenizer, part: sources.Part, folder: Path) -> dict[str, Any]:
    """Tokenise the documents of a part into one shard a split."""
    bad, source = data.bad, data.sources[part.source]
    chats = source.format != "text"
    writers = {split: shards.ShardWriter(folder / "shards" / f"{part.name}.{split}", ready.vocab, marked=chats) for split in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    skipped: Counter[str] = Counter()
    mended: Counter[str] = Counter()
    named: list[dict[str, str]] = []
    heldout: list[bytes] = []
    extra = 1 + (ready.bos is not None)

    def skip(where: str, reason: str) -> None:
        skipped[reason.partition(":")[0]] += 1
        if len(named) < NAMED:
            named.append({"source": source.path or source.kind, "document": where, "reason": reason})

    def converse(document: Usable) -> None:
        """Store the samples of a conversation; how many bytes of its text are trained, nobody counts."""
        paired = source.format == "preference"
        found = (preferred.documents if paired else messages.samples)(source, document.text, ready)
        if isinstance(found, str):
            _refuse(bad, found, document.where, source)
            skip(document.where, found)
            return
        if paired:
            keep_pair(document, found)
            return
        if len(found) > 1:
            mended["split by turn"] += 1
        for ids, trained in found:
            reason = ""
            if len(ids) > bad.max_tokens and bad.long != "keep":
                reason = f"long: {len(ids)} tokens, and the most is {bad.max_tokens}"
            elif len(ids) < bad.min_tokens and bad.short != "keep":
                reason = f"short: {len(ids)} tokens, and the least is {bad.min_tokens}"
            if reason and not (reason.startswith("long") and bad.long == "truncate" and trained[1 : bad.max_tokens].any()):
                _refuse(bad, reason, document.where, source)
                skip(document.where, reason)
                continue
            mended.update(["truncated"] if reason else [document.mended] if document.mended else [])
            writers[SPLITS[document.validation]].add(*((ids[: bad.max_tokens], trained[: bad.max_tokens]) if reason else (ids, trained)))

    def keep_pair(document: Usable, found: list[messages.Tokens]) -> None:
        """Store both documents of a pair, or neither."""
        counts = [len(ids) for ids, _ in found if len(ids)]
        reason = ""
        if max(counts) > bad.max_tokens and bad.long != "keep":
            reason = f"long: {max(counts)} tokens, and the most is {bad.max_tokens}; a pair is never truncated"
        elif min(counts) < bad.min_tokens and bad.short != "keep":
            reason = f"short: {min(counts)} tokens, and the least is {bad.min_tokens}"
        if reason:
            _refuse(bad, reason, document.where, source)
            skip(document.where, reason)
            return
        mended.update([document.mended] if document.mended else [])
        for ids, trained in found:
            writers[SPLITS[document.validation]].add(ids, trained)

    def flush(batch: list[Usable]) -> None:
        if chats:
            for document in batch:
                converse(document)
            return
        for document, ids in zip(batch, ready.documents([document.text for document in batch]), strict=True):
            count, text, stored = len(ids) - extra, document.text.encode(), ids
            split = SPLITS[document.validation]
            if count < bad.min_tokens and bad.short != "keep":
                reason = f"short: {count} tokens, and the least is {bad.min_tokens}"
                _refuse(bad, reason, document.where, source)
                skip(document.where, reason)
                continue
            if count > bad.max_tokens and bad.long != "keep":
                reason = f"long: {count} tokens, and the most is {bad.max_tokens}"
                _refuse(bad, reason, document.where, source)
                if bad.long == "skip":
                    skip(document.where, reason)
                    continue
                stored = np.concatenate([ids[: bad.max_tokens + extra - 1], ids[-1:]])
                text = ready.decode(stored).encode()
                mended["truncated"] += 1
            mended.update([document.mended] if document.mended else [])
            writers[split].add(stored)
            text_bytes[split] += len(text)
            if document.validation and text_bytes[split] <= XZ_BYTES:
                heldout.append(text)

    try:
        batch: list[Usable] = []
        characters = 0
        for document in documents(data, part):
            if document.skipped:
                skip(document.where, document.skipped)
                continue
            batch.append(document)
            characters += len(document.text)
            if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
                flush(batch)
                batch, characters = [], 0
        flush(batch)
        splits: dict[str, Any] = {}
        for split in SPLITS:
            shard = writers[split].finish()
            found = [{"prefix": f"shards/{part.name}.{split}", **shard}] if shard else []
            splits[split] = {"shards": found, "text_bytes": None if chats and found else text_bytes[split]}
        if 0 < text_bytes["validation"] <= XZ_BYTES:
            shards.write_atomically(_heldout(folder, part.name), b"".join(heldout))
    finally:
        for writer in writers.values():
            writer.abort()
    return {
        "splits": splits,
        "starts_with_bos": ready.bos is not None,
        "ends_with_eos": not chats,  # a template ends a conversation as it likes
        "skipped": dict(sorted(skipped.items())),
        "mended": dict(sorted(mended.items())),
        "named": named,
    }


def _finish(job: Job, ready: tokenizer.Tokenizer, records: list[dict[str, Any]], key: str) -> None:
    """Put the parts' records together, write skipped.jsonl and, last, manifest.json."""
    skipped: Counter[str] = Counter()
    mended: Counter[str] = Counter()
    found = []
    for number, source in enumerate(job.data.sources):
        mine = [record for part, record in zip(job.parts, records, strict=True) if part.source == number]
        counts = {kind: sum((Counter(record[kind]) for record in mine), Counter()) for kind in ("skipped", "mended")}
        skipped += counts["skipped"]
        mended += counts["mended"]
        splits = {}
        for split in SPLITS:
            held = [record["splits"][split] for record in mine]
            entries = [shard for record in held for shard in record["shards"]]
            known = all(record["text_bytes"] is not None for record in held)
            splits[split] = {
                "documents": sum(shard["documents"] for shard in entries),
                "tokens": sum(shard["tokens"] for shard in entries),
                "text_bytes": sum(record["text_bytes"] for record in held) if known else None,
                "shards": entries,
            }
            if any("trained" in shard for shard in entries):
                splits[split]["trained"] = sum(shard.get("trained", shard["tokens"]) for shard in entries)
        found.append(
            {
                "too_long": source.too_long,
                "name": f"{number} ({source.kind}{f' {source.path}' if source.path else ''})",
                "starts_with_bos": all(record["starts_with_bos"] for record in mine),
                "ends_with_eos": all(record["ends_with_eos"] for record in mine),
                "splits": splits,
                "skipped": dict(sorted(counts["skipped"].items())),
                "mended": dict(sorted(counts["mended"].items())),
            }
        )
    totals: dict[str, Any] = {}
    for split in SPLITS:
        values = [source["splits"][split] for source in found]
        totals[split] = {name: sum(value[name] for value in values) for name in ("documents", "tokens")}
        totals[split]["text_bytes"] = (
            None if any(value["text_bytes"] is None for value in values) else sum(value["text_bytes"] for value in values)
        )
        totals[split]["xz_bytes"] = None
    for number, source in enumerate(found):
        if not source["splits"]["train"]["tokens"]:
            held, left_out = source["splits"]["validation"]["documents"], sum(source["skipped"].values())
            rows = (
                (part, row) for part, record in zip(job.parts, records, strict=True) if part.source == number for row in record["named"]
            )
            first = next(((part, row["document"], row["reason"]) for part, row in rows), None)
            raise DataError(
                f"source {source['name']} has no training token: {held:,} documents are held out and {left_out:,} were skipped "
                f"{source['skipped'] or ''}{_empty_hint(job, first)}"
            )
    _refuse_unvalidated(job.data, totals)
    if _compresses([totals["validation"]["text_bytes"]]):
        job.report("compress held-out text", 0, 1)
        held = [part.name for part, record in zip(job.parts, records, strict=True) if record["splits"]["validation"]["text_bytes"]]
        text = b"".join(_heldout(job.folder, name).read_bytes() for name in held)
        totals["validation"]["xz_bytes"] = len(lzma.compress(text, preset=9))
        job.report("compress held-out text", 1, 1)
    found_at = [(part, row) for part, record in zip(job.parts, records, strict=True) for row in record["named"]][:NAMED]
    named = [row | (_placed(job, part, row["document"]) if number < PLACED else {}) for number, (part, row) in enumerate(found_at)]
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
        "skipped": dict(sorted(skipped.items())),
        "mended": dict(sorted(mended.items())),
    }
    order = [
        [source["starts_with_bos"], source["ends_with_eos"]]
        + [
            [[*(s[name]["sha256"] for name in shards.files(s)), s.get("first", 0), s["tokens"]] for s in source["splits"][split]["shards"]]
            for split in SPLITS
        ]
        + ([source["too_long"]] if source["too_long"] != "truncate" else [])
        for source in found
    ]
    manifest["sha256"] = _digest([FORMAT, ready.sha256, ready.vocab, ready.eos, order])
    manifest["checksum"] = _digest(manifest)
    shards.write_atomically(job.folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    for path in (job.folder / "parts").glob("*.heldout"):
        path.unlink()


def _placed(job: Job, part: sources.Part, where: str) -> dict[str, str]:
    """{"place": the file and line of a record of JSON lines}, which is otherwise known by the byte at which its line begins; {} far into a file."""
    at = where.rpartition(":")[2]
    source = job.data.sources[part.source]
    near = source.kind == "jsonl" and at.isdecimal() and int(at) < PLACED_BYTES
    return {"place": sources.place(source, part, where)} if near else {}


def _refuse_unvalidated(data: config.Data, totals: dict[str, Any]) -> None:
    """DataError if documents are to be held out and none is; of a Megatron source the last ones are, and they count as well."""
    if data.validation > 0 and not totals["validation"]["tokens"]:
        raise DataError(
            f"none of {totals['train']['documents']:,} documents is held out: `data.validation` is {data.validation}, a share that comes to "
            f"{totals['train']['documents'] * data.validation:.2g} documents; raise data.validation, or set it to 0"
        )


def _empty_hint(job: Job, skipped: tuple[sources.Part, str, str] | None) -> str:
    """The way out where nothing is left to train on: the first document that was skipped, with its reason, or what else takes documents away."""
    hint = f"; add documents, loosen `data.bad`, or lower `data.validation` (now {job.data.validation})"
    if skipped is None:
        return hint
    part, where, reason = skipped
    loose = reason.partition(":")[0] in ("short", "long", "empty", "undecodable")
    return f"; the first, {sources.place(job.data.sources[part.source], part, where)}, is {reason}{hint if loose else ''}"


if __name__ == "__main__":
    _worker()
