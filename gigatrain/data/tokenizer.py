"""Tokenizers: one trained here on the run's own documents, or an existing one in Hugging Face's format. Needs `tokenizers` only.

Ours is a byte-level byte-pair encoding with one special token, `<|endoftext|>`, that is bos, eos and pad: a document is stored as d1 .. dn
eos, and the eos of one document is the bos of the next.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from gigatrain.errors import DataError

END = "<|endoftext|>"
# What byte-pair merges may not cross. A line's end with the punctuation before it and the next line's indentation is one piece, so `):\n
#     ` can be one token. Held-out standard library, bytes per token at vocabulary 2048 / 4096 / 8192: this 3.43 / 3.92 / 4.36, GPT-4's 3.25
# / 3.70 / 4.07, GPT-2's 3.21 / 3.58 / 3.87 (561 files train, 28 held out, tokenizers 0.23.3).
PIECES = r" ?[^\s\p{L}\p{N}]+\n[ \t]*|\s*\n[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model")
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>")  # looked for only where nothing beside tokenizer.json names the eos


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer ready to encode. `bos` is None unless every document starts with a token that is not `eos`."""

    backend: Backend
    file: Path  # its tokenizer.json, whatever its name
    vocab: int  # highest id + 1
    bos: int | None
    eos: int
    sha256: str  # of tokenizer.json
    date: str | None = None  # the day that a chat template is told (ISO 8601); None: it is told none
    variables: dict[str, Any] = field(default_factory=dict)  # what else it is told

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.file.parent

    @property
    def files(self) -> tuple[str, ...]:
        """Names of its files in `folder`, the vocabulary first: what an export copies."""
        return (self.file.name, *(name for name in FILES[1:] if (self.folder / name).is_file()))

    @property
    def start(self) -> int:
        """The token that precedes a document's first: what a prompt starts with."""
        return self.eos if self.bos is None else self.bos

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone, no token around it; `<|endoftext|>` and its kin in the text are text, so no document can forge an end."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def documents(self, texts: list[str]) -> Iterator[np.ndarray]:
        """Ids [n] int64 of each text as a stored document: bos if it is distinct, the text, eos."""
        head = [] if self.bos is None else [self.bos]
        for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array([*head, *encoding.ids, self.eos], np.int64)

    def token_bytes(self) -> np.ndarray | None:
        """Bytes of text that each id stands for [vocab] int64, special tokens none; None for a tokenizer whose tokens are not bytes one for one
        (sentencepiece, or one that normalises)."""
        tree = json.loads(self.backend.to_str())
        if (tree.get("decoder") or {}).get("type") != "ByteLevel" or tree.get("normalizer") is not None:
            return None
        found = np.zeros(self.vocab, np.int64)
        for text, number in self.backend.get_vocab(with_added_tokens=False).items():
            found[number] = len(text)  # each byte is one character of the byte-level alphabet
        for number, added in self.backend.get_added_tokens_decoder().items():
            found[number] = 0 if added.special else len(added.content.encode())
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    @cached_property
    def templates(self) -> dict[str, str]:
        """Its chat templates by name, as transformers reads them; {} without one."""
        if (file := self.folder / "chat_template.jinja").is_file():
            return {"default": file.read_text(encoding="utf-8")}
        found = _settings(self.folder).get("chat_template")
        if isinstance(found, list):
            return {one["name"]: one["template"] for one in found if isinstance(one, dict) and {"name", "template"} <= one.keys()}
        return {"default": found} if isinstance(found, str) else {}

    def template_for(self, tools: bool) -> str | None:
        """The chat template for conversations with or without tools; None if there is none."""
        return self.templates.get("tool_use") if tools and "tool_use" in self.templates else self.templates.get("default")

    @cached_property
    def names(self) -> dict[str, str]:
        """What a chat template is told: `bos_token`, `eos_token` and their kin."""
        settings = _settings(self.folder)
        names = {key: _token(settings, key) for key in settings if key.endswith("_token") and isinstance(settings[key], str | dict)}
        found = {key: name for key, name in names.items() if name is not None}
        eos = self.backend.id_to_token(self.eos)
        assert eos is not None
        return {"eos_token": eos} | found

    @cached_property
    def marked(self) -> Backend:
        """The encoder of what a chat template wrote: special tokens in the text are themselves, and offsets are those of the characters."""
        content = json.loads(self.file.read_text(encoding="utf-8"))
        # Of byte-level tokenizers it cuts blanks off the offsets, and without special tokens it does nothing else.
        found = Backend.from_str(json.dumps(content | {"post_processor": None}))
        found.no_truncation()
        found.no_padding()
        return found

    @cached_property
    def unmarked(self) -> Backend:
        """As `marked`, with special tokens in the text being text."""
        found = Backend.from_str(self.marked.to_str())
        found.encode_special_tokens = True
        return found

    @cached_property
    def specials(self) -> dict[int, str]:
        """Special tokens by id."""
        return {number: token.content for number, token in self.backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Finds a special token in a text, the longest first."""
        names = sorted(self.specials.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def train(texts: Iterable[str], vocab: int, folder: Path, special: tuple[str, ...] = ()) -> Tokenizer:
    """Train a byte-level tokenizer of at most `vocab` ids on `texts` and save it so that transformers' AutoTokenizer loads `folder`.

    special: further special tokens, for a chat template. Deterministic: the same texts in any order give the same file. DataError if `vocab` cannot hold
    the 256 bytes and the special tokens.
    """
    if vocab < 257 + len(special):
        raise DataError(f"tokenizer.train.vocab is {vocab}, and the 256 bytes and {', '.join([END, *special])} need {257 + len(special)}")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END, *special], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, backend.token_to_id(END))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return load(str(folder))


def load(source: str, date: str | None = None, variables: dict[str, Any] | None = None) -> Tokenizer:
    """Load a Hugging Face tokenizer from a folder, a tokenizer.json or a hub name; DataError says what is missing and where."""
    path = Path(source).expanduser()
    if path.is_file():
        file, folder = path, path.parent
    elif path.is_dir():
        file, folder = path / "tokenizer.json", path
    else:
        file = _download(source)
        folder = file.parent
    if not file.is_file():
        raise DataError(
            f"{folder} has no tokenizer.json; save one there with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    content = file.read_bytes()
    try:
        backend = Backend.from_str(content.decode("utf-8"))
    except Exception as error:  # the Rust side raises bare Exception
        raise DataError(f"{file} is not a tokenizer that `tokenizers` can read: {error}") from error
    settings = _settings(folder)
    eos = _eos(backend, settings, file)
    vocab = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    bos = _bos(backend, settings, eos)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return Tokenizer(backend, file, vocab, bos, eos, hashlib.sha256(content).hexdigest(), date, variables or {})


def keep(ready: Tokenizer, folder: Path) -> Tokenizer:
    """Copy a tokenizer's files to `folder`, under the names that transformers looks for, and load it from there."""
    shutil.copyfile(ready.file, folder / "tokenizer.json")
    for name in ready.files[1:]:
        shutil.copyfile(ready.folder / name, folder / name)
    if not (folder / "tokenizer_config.json").is_file():
        names = {"bos_token": ready.bos, "eos_token": ready.eos}
        settings = {key: ready.backend.id_to_token(token) for key, token in names.items() if token is not None}
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | settings, indent=2) + "\n"
        )
    return load(str(folder))


def differs(ready: Tokenizer, folder: Path) -> str | None:
    """Why a model with its tokenizer in `folder` does not mean by every id what this tokenizer means; None where it does, whatever else it knows.

    Sizes that agree prove nothing. Without tokenizer.json, a tokenizer.model of the same bytes does.
    """
    file, models = folder / "tokenizer.json", [place / "tokenizer.model" for place in (ready.folder, folder)]
    if not file.is_file():
        if all(path.is_file() for path in models) and models[0].read_bytes() == models[1].read_bytes():
            return None
        return f"{folder} has no tokenizer.json, so that nothing says whether its ids mean the same tokens; copy the one it was trained with there"
    try:
        there = Backend.from_str(file.read_text(encoding="utf-8")).get_vocab(with_added_tokens=True)
    except Exception as error:  # the Rust side raises bare Exception
        return f"{file} is not a tokenizer that `tokenizers` can read: {error}"
    here = ready.backend.get_vocab(with_added_tokens=True)
    others = sorted((number, text) for text, number in here.items() if there.get(text) != number)
    if not others:
        return None
    number, text = others[0]
    theirs = next((repr(name) for name, one in there.items() if one == number), "no token")
    return f"{len(others):,} of {len(here):,} tokens have other ids in {file}: {number} is {text!r} here, and {theirs} there"


def _download(name: str) -> Path:
    """tokenizer.json of a hub name, with what lies beside it, in the hub's own cache."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"tokenizer.from is {name!r}, and there is no such file or folder")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise DataError(f"{name!r} is no local path, and hub names need: pip install huggingface_hub") from error
    try:
        file = Path(hf_hub_download(name, FILES[0]))
        for beside in FILES[1:]:
            try:
                hf_hub_download(name, beside)
            except EntryNotFoundError:
                continue  # these are optional in every repository
    except Exception as error:  # offline, unknown, gated: the library has a type for each, and its first line says which
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise DataError(
            f"tokenizer.from is {name!r}: no local file or folder, and the hub did not give it ({reason[0]}); "
            "check the name, or download it first"
        ) from error
    return file


def _settings(folder: Path) -> dict[str, Any]:
    """Names of the special tokens: tokenizer_config.json over special_tokens_map.json."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                settings |= {
                    key: value for key, value in json.loads((folder / name).read_text(encoding="utf-8")).items() if value is not None
                }
            except (ValueError, AttributeError, RecursionError) as error:
                raise DataError(f"{folder / name} is not a JSON object: {error}") from error
    return settings


def _token(settings: dict[str, Any], key: str) -> str | None:
    value = settings.get(key)
    name = value.get("content") if isinstance(value, dict) else value
    if not isinstance(name, str | None):
        raise DataError(f"tokenizer_config.json says {key} {str(name)[:80]!r}, which is no token")
    return name


def _eos(backend: Backend, settings: dict[str, Any], file: Path) -> int:
    name = _token(settings, "eos_token")
    if name is None:
        known = [token for token in ENDS if backend.token_to_id(token) is not None]
        if len(known) != 1:
            raise DataError(
                f"nothing beside {file} says which token ends a document (found {known or 'none'} of {list(ENDS)}); "
                'write {"eos_token": "..."} to tokenizer_config.json in the same folder'
            )
        name = known[0]
    found = backend.token_to_id(name)
    if found is None:
        raise DataError(f"tokenizer_config.json beside {file} says eos_token {name!r}, which is not in its vocabulary")
    return found


def _bos(backend: Backend, settings: dict[str, Any], eos: int) -> int | None:
    """The token that the tokenizer itself puts in front of a text, if it does and it is not eos."""
    encoding = backend.encode("a", add_special_tokens=True)
    bos = encoding.ids[0] if encoding.special_tokens_mask[:1] == [1] else None
    name = _token(settings, "bos_token")
    if bos is None and settings.get("add_bos_token") is True and name is not None:
        bos = backend.token_to_id(name)
    return None if bos == eos else bos
