"""How fast documents become tokens, and tokens batches, on this machine.

    python benchmarks/data.py            a few minutes: prints a table and adds rows to benchmarks/results/data.csv
    python benchmarks/data.py --quick    half a minute, no rows

Tokenising is compared with `datasets.map(batched=True, num_proc=…)` over the same documents, with the same tokenizer and as many
processes, in turns A B A B, as the clock of a shared machine drifts. Both write what they made to disk. Loading is the time of `next(batches)`.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from gigatrain import config
from gigatrain.data import sources, tokenizer
from gigatrain.data.build import build
from gigatrain.data.corpus import Corpus
from gigatrain.data.loader import Batches

RESULTS = Path(__file__).parent / "results" / "data.csv"
COLUMNS = ["commit", "date", "cpu", "cores", "load", "versions", "what", "conditions", "repeats", "median", "least", "most", "unit"]


def machine() -> dict[str, Any]:
    """Commit, processor and versions of a row."""
    folder = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=False
    ).stdout.strip()
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":")[1].strip() for line in names if line.startswith("model name")), platform.processor())
    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("tokenizers", "datasets", "numpy", "torch"))
    return {
        "commit": commit or "none",
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),  # with this benchmark itself, which is 1 to `cores`
        "versions": f"python {platform.python_version()} {versions}",
    }


def row(what: str, conditions: str, unit: str, values: list[float]) -> dict[str, Any]:
    """One line of the table: median, and the spread."""
    middle, least, most = statistics.median(values), min(values), max(values)
    print(f"{what:34} {conditions:44} {middle:14,.0f} {unit:14} ({least:,.0f} .. {most:,.0f}, {len(values)} repeats)", flush=True)
    return {"what": what, "conditions": conditions, "repeats": len(values), "median": middle, "least": least, "most": most, "unit": unit}


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def tokenising(folder: Path, ready: tokenizer.Tokenizer, copies: int, repeats: int) -> list[dict[str, Any]]:
    """Tokens per second and core, from an Arrow file to token files: build against datasets.map, on the standard library `copies` times."""
    import datasets
    import transformers

    source = config.Source(kind="stdlib")
    texts = [
        raw.data.decode() for part in sources.parts(0, source, 1 << 40) for raw in sources.read(source, part) if isinstance(raw.data, bytes)
    ]
    texts = [text for text in texts if text.strip()] * copies
    documents = datasets.Dataset.from_dict({"text": texts})
    documents.save_to_disk(str(folder / "documents"))
    spec = config.Tokenizer.model_validate({"from": str(ready.folder)})
    theirs = transformers.AutoTokenizer.from_pretrained(str(ready.folder), local_files_only=True)
    tokens = 0

    def ours(workers: int, number: int) -> None:
        nonlocal tokens
        size = sum(len(text) for text in texts)
        data = config.Data(
            sources=(config.Source(kind="hub", path=str(folder / "documents")),),
            folder=str(folder / f"ours{number}"),
            validation=0.0,
            workers=workers,
            shard_bytes=size // (2 * workers) + 1,
        )
        tokens = build(data, spec).totals("train")["tokens"]

    def mapped(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": theirs(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]}

    def map_(workers: int, number: int) -> None:
        loaded: Any = datasets.load_from_disk(str(folder / "documents"))
        loaded.map(
            mapped, batched=True, num_proc=workers, remove_columns=["text"], cache_file_name=str(folder / f"map{number}-{workers}.arrow")
        )

    datasets.disable_progress_bars()
    rows, number = [], 0
    for workers in sorted({1, len(os.sched_getaffinity(0))}):
        # One process each also means one thread each: the Rust side would otherwise take every core.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        timed: dict[str, list[float]] = {"gigatrain build": [], "datasets.map": []}
        for _ in range(repeats):
            for name, call in (("gigatrain build", ours), ("datasets.map", map_)):
                number += 1
                timed[name].append(seconds(partial(call, workers, number)))
        for name, values in timed.items():
            conditions = f"{workers} processes, {tokens:,} tokens of vocabulary {ready.vocab}"
            rows.append(row(f"tokenise, {name}", conditions, "tokens/s/core", [tokens / workers / value for value in values]))
    return rows


def loading(corpus: Corpus, repeats: int) -> list[dict[str, Any]]:
    """Time of a batch when nothing else happens, and how long a loop waits for it whose device is busy for three times that."""
    rows = []
    for batch, sequence in ((8, 256), (8, 2048), (64, 4096)):
        count = max(5, 200_000 // (batch * sequence))
        busy = 0.0
        for prefetch in (0, 2):
            batches = Batches(corpus, sequence=sequence, packing="stream", batch=batch, seed=0, prefetch=prefetch)
            next(batches)
            values = []
            for _ in range(repeats):
                spent = 0.0
                for _ in range(count):
                    time.sleep(busy)
                    spent += seconds(batches.__next__)
                values.append(spent / count)
            batches.close()
            conditions = f"batch {batch}, sequence {sequence}, prefetch {prefetch}" + (f", device busy {1e3 * busy:.1f} ms" if busy else "")
            rows.append(row("wait for a batch" if busy else "make a batch", conditions, "us", [1e6 * value for value in values]))
            if not busy:
                rows.append(row("make tokens", conditions, "tokens/s", [batch * sequence / value for value in values]))
                busy = 3 * statistics.median(values)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat of each, and no rows in results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = config.Data(sources=(config.Source(kind="stdlib"),), folder=str(folder / "corpus"))
        corpus = build(data, config.Tokenizer(train=config.TokenizerTraining(vocab=4096)))
        rows = loading(corpus, 3 if options.quick else 15)
        rows += tokenising(folder, corpus.tokenizer(), 1 if options.quick else 2, 1 if options.quick else 3)
    if not options.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        new = not RESULTS.is_file()
        with RESULTS.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            facts = machine()
            writer.writerows(facts | entry for entry in rows)
        print(f"{len(rows)} rows added to {RESULTS}")


if __name__ == "__main__":
    main()
