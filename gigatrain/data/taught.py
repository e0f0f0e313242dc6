"""What a teacher says of every label of a corpus, beside its shards: its k likeliest tokens, their log-probabilities and that of all others together.

    CORPUS/taught-KEY/train-SOURCE-PART.safetensors    ids int32 [rows, T, k], logprobs fp16 [rows, T, k + 1]: rows are samples of one length and packing
    CORPUS/taught-KEY/index.json                       what they were made of (KEY is its hash) and the SHA-256 of every part, written last

A teacher's words depend on what stands before a token in its sample, so that they are of one packing and length of samples. A row is read from its part alone.
Training adds up probabilities, so what fp16 rounds is divided by their sum again. `gigatrain data teach` writes it, and goes on where it was ended.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gigatrain.config import Objective
from gigatrain.data.corpus import Corpus
from gigatrain.data.shards import file_sha256
from gigatrain.errors import DataError

PART = 1 << 9  # rows of a part: of 4,096 tokens and k = 32 some 0.4 GB
OPEN = 64  # parts that stay open


def made_of(objective: Objective, corpus: Corpus, sequence: int, packing: str) -> dict[str, Any]:
    """What a folder of teachings is known by."""
    return {
        "teacher": objective.teacher,
        "top_k": objective.top_k,
        "temperature": objective.temperature,
        "corpus": corpus.sha256,
        "sequence": sequence,
        "packing": packing,
    }


def folder_of(corpus: Corpus, of: Mapping[str, Any]) -> Path:
    """Where it lies."""
    return corpus.folder / f"taught-{hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:12]}"


def part_name(source: int, part: int) -> str:
    """Rows `part * PART` and on of a source."""
    return f"train-{source}-{part:05d}.safetensors"


class Taught:
    """The teachings of samples of one length, opened: `given` of rows."""

    def __init__(
        self,
        corpus: Corpus,
        objective: Objective,
        sequence: int,
        packing: str,
        *,
        check: bool,
        rank: int = 0,
        ranks: int = 1,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """check: compare the SHA-256 of this rank's share of the parts, every `ranks`-th, as all of them may be terabytes; `alive` is called after each.

        Raises DataError where nothing was taught, or a part is not what it was: then on this rank alone.
        """
        of = made_of(objective, corpus, sequence, packing)
        self.folder, self.sequence, self.k = folder_of(corpus, of), sequence, objective.top_k
        path = self.folder / "index.json"
        if not path.is_file():
            raise DataError(
                f"no teacher's words lie beside {corpus.folder} for {', '.join(f'{name} {value}' for name, value in of.items() if name != 'corpus')}; "
                "run `gigatrain data teach` with this recipe first, or set objective.online = true"
            )
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self.parts: dict[str, str] = index["parts"]
            if index["of"] != of:
                raise ValueError("it is of something else")
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as failure:
            raise DataError(f"{path} is damaged: {failure}; delete {self.folder} and run `gigatrain data teach` again") from None
        self.sha256 = hashlib.sha256(json.dumps([index["teacher_sha256"], self.parts], sort_keys=True).encode()).hexdigest()
        for name in sorted(self.parts)[rank::ranks] if check else ():
            part = self.folder / name
            if not part.is_file() or file_sha256(part) != self.parts[name]:
                raise DataError(f"{part} is missing or not what was taught (SHA-256); delete it and run `gigatrain data teach` again")
            alive()
        self._open: dict[str, Any] = {}

    def row(self, source: int, sample: int, ids: Tensor, logprobs: Tensor) -> None:
        """Write one sample's teachings into ids [T, k] and logprobs [T, k + 1]."""
        name = part_name(source, sample // PART)
        if name not in self._open:
            if len(self._open) >= OPEN:
                self._open.pop(next(iter(self._open)))
            try:
                self._open[name] = safe_open(self.folder / name, framework="pt", device="cpu")
            except (OSError, SafetensorError) as failure:
                raise DataError(f"{self.folder / name} cannot be read: {failure}; run `gigatrain data teach` again") from None
        at = sample % PART
        ids.copy_(self._open[name].get_slice("ids")[at : at + 1][0])
        words = self._open[name].get_slice("logprobs")[at : at + 1][0].float()
        logprobs.copy_(words - words.logsumexp(-1, keepdim=True))

    def given(self, rows: Sequence[tuple[int, int] | None], *, pinned: bool) -> dict[str, Tensor]:
        """Of `(source, sample)` rows: teacher_ids_bt int32 [B, T, k], teacher_logprobs_bt fp32 [B, T, k + 1]; of None anything."""
        ids = torch.zeros(len(rows), self.sequence, self.k, dtype=torch.int32, pin_memory=pinned)
        logprobs = torch.zeros(len(rows), self.sequence, self.k + 1, pin_memory=pinned)
        for number, row in enumerate(rows):
            if row is not None:
                self.row(*row, ids[number], logprobs[number])
        return {"teacher_ids_bt": ids, "teacher_logprobs_bt": logprobs}


def finite(logprobs: np.ndarray) -> np.ndarray:
    """As fp16: -inf, of a rest that is nothing, stays."""
    return np.clip(logprobs, np.float32(-65504.0), 0.0, where=np.isfinite(logprobs), out=logprobs.copy()).astype(np.float16)
