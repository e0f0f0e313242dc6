"""The parts of a corpus tokenised by several processes of one core each; those that an earlier build finished are not tokenised again. Free of torch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

import gigatrain
from gigatrain import config
from gigatrain.data import shards, sources, tokenizer
from gigatrain.data.job import Job
from gigatrain.data.tokenise import compresses, lacks_text, tokenise
from gigatrain.errors import DataError

INLINE_BYTES = 4 << 20  # below this, starting processes (0.4 s) costs more than they save

_Made = tuple[sources.Part, dict[str, Any]]  # a part and its record


def tokenise_all(job: Job, ready: tokenizer.Tokenizer) -> list[dict[str, Any]]:
    """The record of every part, in order; those without one are tokenised first, in parallel."""
    records = {part.name: found for part in job.parts if (found := _record(job.folder, part)) is not None}
    # A part is finished with its held-out text, as long as that is to be compressed; the manifest's writer deletes it, so that a build whose manifest was
    # deleted reads those parts again.
    if compresses([record["splits"]["validation"]["text_bytes"] for record in records.values()]):
        records = {name: record for name, record in records.items() if not lacks_text(job.folder, name, record)}
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


def _parallel(job: Job, ready: tokenizer.Tokenizer, pending: list[sources.Part], workers: int) -> Generator[_Made, None, None]:
    """Tokenise parts in `workers` fresh processes that speak one line of JSON a part.

    Fresh, as a fork of a process with threads can deadlock; and not `multiprocessing`, which pickles and would run the caller's main module
    again.
    """
    queue: SimpleQueue[sources.Part] = SimpleQueue()
    for part in pending:
        queue.put(part)
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
    finished: SimpleQueue[_Made] = SimpleQueue()

    def serve(process: subprocess.Popen[str]) -> None:
        """Hand parts to a process until there are none."""
        _say(process, header)
        with suppress(Empty):
            while not stopped.is_set():
                part = queue.get_nowait()
                finished.put((part, _asked(process, part)))

    pool = ThreadPoolExecutor(workers, "tokenise")
    try:
        _start(processes, workers)
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


def _start(processes: list[subprocess.Popen[str]], count: int) -> None:
    """Start `count` processes, each put into the list at once, so that whoever holds it can end them.

    Ctrl-C goes to every process of the terminal, and a scheduler's signals to all of a job, but it is for this one to end the others: they inherit that
    these are blocked.
    """
    environment = dict(os.environ, TOKENIZERS_PARALLELISM="false")  # one core each
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(gigatrain.__path__[0]).parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "gigatrain.data.workers"]  # -P: nothing is imported from the current folder
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        for _ in range(count):
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say(process: subprocess.Popen[str], line: str) -> None:
    """One line to a process. One that has ended breaks the pipe; what it said before says why."""
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        print(line, file=process.stdin, flush=True)


def _asked(process: subprocess.Popen[str], part: sources.Part) -> dict[str, Any]:
    """The record of a part that a process tokenises. Raises DataError for what it says, and where it ends without a word."""
    _say(process, json.dumps([part.source, part.number]))
    assert process.stdout is not None
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
    return answer


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


if __name__ == "__main__":
    _worker()
