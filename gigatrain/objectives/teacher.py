"""A teacher: a frozen model whose likeliest tokens the run learns from, in every step (`objective.online`) or ahead (`gigatrain data teach`).

It computes by plain torch and torch's attention, in the run's precision, whole on every rank; of its logits one chunk is there at a time.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from gigatrain import foreign
from gigatrain.architectures import from_hf_config
from gigatrain.config import Objective
from gigatrain.data import taught
from gigatrain.data.corpus import Corpus
from gigatrain.data.course import samples_of
from gigatrain.data.loader import Microbatch, moved, stack
from gigatrain.data.shards import file_sha256, write_atomically
from gigatrain.data.tokenizer import Tokenizer, differs
from gigatrain.errors import DataError, RunError
from gigatrain.kernels import ops
from gigatrain.models import hf
from gigatrain.models.decoder import Decoder
from gigatrain.planning.plan import Plan


class Teacher:
    """`objective.teacher`, loaded; called with a microbatch on its device, it gives what objectives.compute is `given`."""

    def __init__(self, objective: Objective, *, vocab: int, tokenizer: Tokenizer, compute: torch.dtype, device: torch.device) -> None:
        """vocab: rows of the student's head; tokenizer: the corpus's. Raises RunError for a model that is not ours or reads by another tokenizer."""
        assert objective.teacher is not None
        self.objective, self.folder, self.device = objective, hf.locate(objective.teacher), device
        config = hf.read_config(self.folder)
        if not foreign.native(config):
            raise RunError(
                f"objective.teacher {objective.teacher}: {config.get('model_type')!r} is none of our families, and only these teach; choose another"
            )
        self.arch = from_hf_config(config)
        if (why := differs(tokenizer, self.folder)) is None and self.arch.vocab < tokenizer.vocab:
            why = f"it has {self.arch.vocab:,} tokens, and the corpus {tokenizer.vocab:,}"
        if why is not None:
            raise RunError(
                f"objective.teacher {objective.teacher}: {why}. A teacher's words are ids, so that both read by one tokenizer: set tokenizer.from to the "
                "teacher's folder, or choose a teacher of the student's family"
            )
        self.vocab = min(vocab, self.arch.vocab)  # rows beyond pad a head, and are no tokens
        if objective.top_k > self.vocab:
            raise RunError(f"objective.top_k {objective.top_k:,} is above the {self.vocab:,} tokens that both models have; lower it")
        plain = self.arch.attention_softcap is None and not self.arch.sinks
        with torch.device("meta"):
            model = Decoder(self.arch, ops.choose({"attention": "sdpa" if plain else "reference"}))
        model.to(compute).to_empty(device=device)
        model.place(device)
        hf.load_weights(model, self.folder)
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def __call__(self, part: Microbatch) -> dict[str, Tensor]:
        positions = None if part.documents is None else part.positions
        how = {"temperature": self.objective.temperature, "vocab": self.vocab}
        ids, logprobs = self.model.top(part.tokens, positions, part.documents, self.objective.top_k, **how)
        return {"teacher_ids_bt": ids, "teacher_logprobs_bt": logprobs}

    def sha256(self) -> str:
        """Of its numbers and weights."""
        files = sorted(path for path in self.folder.iterdir() if path.suffix == ".safetensors" or path.name == "config.json")
        return hashlib.sha256(json.dumps([[path.name, file_sha256(path)] for path in files]).encode()).hexdigest()


def teach(
    plan: Plan, corpus: Corpus, teacher: Teacher, *, progress: Callable[[str, int, int], None] = lambda *_: None
) -> list[tuple[Path, int]]:
    """Keep the teacher's words for every training sample of a plan's phases beside the corpus; returns each folder and its bytes.

    What is there already of the same teacher stays, so that a call that was ended goes on. Raises DataError where the disk refuses.
    """
    digest, found = teacher.sha256(), []
    for sequence in sorted({phase.sequence for phase in plan.stretches}):
        of = taught.made_of(plan.objective, corpus, sequence, plan.data.packing)
        folder = taught.folder_of(corpus, of)
        began: dict[str, Any] = {"of": of, "teacher_sha256": digest}
        try:
            folder.mkdir(exist_ok=True)
            known = folder / "began.json"
            if not known.is_file() or json.loads(known.read_text(encoding="utf-8")) != began:
                for path in folder.iterdir():
                    path.unlink()
                write_atomically(known, json.dumps(began, indent=1).encode())
        except (OSError, ValueError) as failure:
            raise DataError(f"{folder}: {failure}; a teacher's words are kept there, see that it can be written") from None
        sources = samples_of(corpus, "train", sequence, plan.data.packing)
        total, done = sum(map(len, sources)), 0
        names = []
        for source, samples in enumerate(sources):
            for first in range(0, len(samples), taught.PART):
                count = min(taught.PART, len(samples) - first)
                names.append(taught.part_name(source, first // taught.PART))
                if not (folder / names[-1]).is_file():
                    words = _words(teacher, [(samples, first + row) for row in range(count)], sequence, corpus.eos, plan.microbatch)
                    write_atomically(folder / names[-1], save(words))
                done += count
                progress("teach", done, total)
        parts = {name: file_sha256(folder / name) for name in names}
        write_atomically(folder / "index.json", json.dumps({**began, "parts": parts}, indent=1).encode())
        found.append((folder, sum((folder / name).stat().st_size for name in names)))
    return found


def _words(teacher: Teacher, rows: list[Any], sequence: int, eos: int, microbatch: int) -> dict[str, Tensor]:
    said: list[Mapping[str, Tensor]] = []
    for first in range(0, len(rows), microbatch):
        part = stack(rows[first : first + microbatch], sequence, eos, teacher.device)
        said.append({name: one.cpu() for name, one in teacher(moved(replace(part), teacher.device)).items()})
    ids, logprobs = (torch.cat([one[name] for one in said]) for name in ("teacher_ids_bt", "teacher_logprobs_bt"))
    return {"ids": ids.contiguous(), "logprobs": torch.from_numpy(taught.finite(logprobs.float().numpy()))}
