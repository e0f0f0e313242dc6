"""Who can read an exported folder: its files against each other, transformers on a meta device, and what vLLM and llama.cpp's converter look at.

The last two are not here to try, so each rule is one that their code states, and says where (read on 2026-11-27):

    vLLM           vllm/model_executor/models/registry.py at 0002bff (architectures), model_loader/weight_utils.py (files: those of the index alone)
    llama.cpp      conversion/__init__.py at 00bdaa1 (architectures), conversion/base.py at 00bd27a (index against parts, vocabulary against
                   vocab_size, rope, the hash of the pre-tokenizer), conversion/llama.py at 0274f0f (sentencepiece, then byte fallback, then BPE)

A finding is `ok`, `bad` (the folder is wrong), `refuses` (it is right, and this reader does not take it) or `untested`.
"""

import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gigatrain.data.tokenizer import PIECES
from gigatrain.errors import RunError
from gigatrain.exporting.generation import has_template, model_class

ADAPTER = "adapter_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_NAMES = (
    "Llama", "Mistral", "Ministral3", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma2", "Gemma3", "Olmo2", "Olmo3", "Olmoe", "SmolLM3", "Apertus",
    "Granite", "Phi3", "Arcee", "DeepseekV3", "GptOss",
)  # fmt: skip
LLAMACPP = frozenset(f"{name}ForCausalLM" for name in _NAMES)
VLLM = LLAMACPP - {"Ministral3ForCausalLM"}  # SmolLM3 by its backend for transformers' own code, as is what it does not list
ROPES = {"default", "linear", "yarn", "longrope", "llama3", "dynamic"}  # that the converter writes
LLAMA3_POSITIONS = 8192  # what the converter takes for the original context where config.json does not say it at its top


@dataclass(frozen=True)
class Finding:
    """What one reader makes of one thing."""

    reader: str
    health: Literal["ok", "bad", "refuses", "untested"]
    text: str

    def line(self) -> str:
        return f"  {self.reader:12} {self.health:9} {self.text}"


def check(folder: Path) -> list[Finding]:
    """Every finding on an exported folder, in the order in which a reader meets them. Raises RunError where there is no config.json."""
    if (folder / ADAPTER).is_file():
        return _adapter(folder)
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder} is no exported model: it has no config.json; export a run there first")
    config = _json(folder / "config.json")
    found: list[Finding] = []
    tensors = _said(found, "files", lambda: _files(folder))
    _said(found, "config", lambda: _config(folder, config, tensors or {}))
    if (folder / "tokenizer.json").is_file():
        _said(found, "tokenizer", lambda: _tokenizer(folder, config))
    else:
        found.append(Finding("tokenizer", "bad", "there is no tokenizer.json"))
    if not any(one.health == "bad" for one in found):
        found.append(_transformers(folder))
    return [*found, _vllm(config), *_llamacpp(folder, config, tensors or {})]


def _adapter(folder: Path) -> list[Finding]:
    """An adapter alone: its two files against each other."""
    found: list[Finding] = []

    def pairs() -> tuple[str, None]:
        config, header = _json(folder / ADAPTER), _header(folder / "adapter_model.safetensors")
        shapes = {name: one["shape"] for name, one in header.items() if name != "__metadata__"}
        _need(config.get("peft_type") == "LORA", f"peft_type is {config.get('peft_type')}")
        ends = {".lora_A.weight": ".lora_B.weight", ".lora_B.weight": ".lora_A.weight"}
        owners = set()
        for name, shape in shapes.items():
            for end, other in ends.items():
                if name.endswith(end):
                    owner = name.removesuffix(end)
                    owners.add(owner)
                    _need(f"{owner}{other}" in shapes, f"{owner} has no {other}")
                    _need(shape[end == ".lora_B.weight"] == config.get("r"), f"{name} is {shape}, and the rank {config.get('r')}")
                    last = owner.rpartition(".")[2]
                    _need(any(owner.endswith(one) for one in config.get("target_modules", ())), f"{last} is none of the target modules")
        _need(owners, "there is no adapter's matrix in it")
        return f"{len(owners):,} matrices of rank {config['r']}", None

    if not (folder / "adapter_model.safetensors").is_file():
        return [Finding("files", "bad", "there is no adapter_model.safetensors")]
    _said(found, "adapter", pairs)
    base = _json(folder / ADAPTER).get("base_model_name_or_path") or ""
    place = Path(base).expanduser()
    if not base:
        found.append(
            Finding("peft", "untested", "it names no base, whose weights were drawn: load it beside the model that it was trained with")
        )
    else:
        here = (place / "config.json").is_file()
        found.append(Finding("peft", "ok" if here else "untested", f"beside {base}" + ("" if here else ", which is no folder here")))
    return [
        *found,
        Finding("vLLM", "untested", "reads such folders as LoRA modules"),
        Finding("llama.cpp", "untested", "by convert_lora_to_gguf.py"),
    ]


class _Wrong(Exception):
    """A rule that the folder breaks."""


def _said(found: list[Finding], reader: str, act: Callable[[], tuple[str, Any]]) -> Any:
    try:
        text, value = act()
    except _Wrong as failure:
        found.append(Finding(reader, "bad", str(failure)))
        return None
    found.append(Finding(reader, "ok", text))
    return value


def _need(holds: object, text: str) -> None:
    if not holds:
        raise _Wrong(text)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise RunError(f"{path} cannot be read: {failure}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} is no JSON object")
    return value


# Files: headers and index.


def _header(path: Path) -> dict[str, Any]:
    """A safetensors file's header, against the file's own length."""
    with path.open("rb") as file:
        start = file.read(8)
        _need(len(start) == 8, f"{path.name} is cut short: it has no header")
        (length,) = struct.unpack("<Q", start)
        _need(length <= min(100_000_000, path.stat().st_size), f"{path.name} has a header of {length:,} bytes, more than the file")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise _Wrong(f"{path.name} has a header that is not JSON") from None
    end = max((one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"), default=0)
    _need(
        8 + length + end == path.stat().st_size, f"{path.name} is {path.stat().st_size:,} bytes, and its header says {8 + length + end:,}"
    )
    return header


def _files(folder: Path) -> tuple[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """`(words, {tensor: (dtype, shape)})`; raises where parts, index and names do not agree."""
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    _need(parts, "there is no .safetensors file")
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    placed: dict[str, str] = {}
    for part in parts:
        header = _header(folder / part)
        _need(header.pop("__metadata__", {}).get("format") == "pt", f"{part} does not say format=pt, which transformers asks for")
        for name, one in header.items():
            _need(name not in placed, f"{name} is in {placed.get(name)} and in {part}; readers would take either")
            placed[name] = part
            found[name] = (one["dtype"], tuple(one["shape"]))
    if (folder / INDEX).is_file():
        index = _json(folder / INDEX)
        said = index.get("weight_map", {})
        _need(said == placed, f"{INDEX} and the parts differ: {_some(sorted(set(said.items()) ^ set(placed.items())))}")
        size = sum(_bytes(dtype, shape) for dtype, shape in found.values())
        _need(
            index.get("metadata", {}).get("total_size") == size,
            f"{INDEX} says {index.get('metadata', {}).get('total_size')} bytes, and the parts hold {size}",
        )
    else:
        _need(parts == [SINGLE], f"without {INDEX} readers take {SINGLE} alone, and here are {', '.join(parts)}")
    return f"{len(parts)} file{'s' * (len(parts) > 1)}, {len(found):,} tensors" + (", as the index says" if len(parts) > 1 else ""), found


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1}[dtype]
    for size in shape:
        count *= size
    return count


def _some(names: list[Any]) -> str:
    shown = ", ".join(str(name) for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# config.json and the tokenizer.


def _config(folder: Path, config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[str, None]:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise _Wrong(f"`architectures` is {names}: readers want one name")
    _need(config.get("model_type"), "`model_type` is missing")
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            _need("auto_map" not in _json(folder / file), f"{file} has an `auto_map`: it would ask readers to run code")
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        _need(isinstance(config.get(key), int) and config[key] > 0, f"`{key}` is {config.get(key)}")
    if tensors and (embedding := tensors.get("model.embed_tokens.weight")) is not None:
        shape = (config["vocab_size"], config["hidden_size"])
        _need(embedding[1] == shape, f"model.embed_tokens.weight is {list(embedding[1])}, and config.json says {list(shape)}")
        tied = bool(config.get("tie_word_embeddings"))
        _need(
            tied != ("lm_head.weight" in tensors),
            f"tie_word_embeddings is {tied}, and lm_head.weight is {'there' if tied else 'missing'}",
        )
        layers = {int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))}
        _need(
            layers == set(range(config["num_hidden_layers"])),
            f"there are tensors of {len(layers)} layers, and config.json says {config['num_hidden_layers']}",
        )
        said = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}.get(str(config.get("dtype") or config.get("torch_dtype")), "")
        _need(said == embedding[0], f"config.json says dtype {config.get('dtype')}, and the weights are {embedding[0]}")
    generation = _json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    for file, values in (("config.json", config), ("generation_config.json", generation)):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = values.get(key)
            for number in value if isinstance(value, list) else [value]:
                _need(number is None or 0 <= number < config["vocab_size"], f"{file}: {key} {number} is outside of the vocabulary")
    return f"{names[0]}, {config['num_hidden_layers']} layers, no code to run", None


def _tokenizer(folder: Path, config: dict[str, Any]) -> tuple[str, None]:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    most = max(backend.get_vocab(with_added_tokens=True).values())
    _need(most < config["vocab_size"], f"its highest id is {most}, and the model has {config['vocab_size']} rows")
    said = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    for key in ("bos_token", "eos_token", "pad_token"):
        token = said.get(key)
        name = token.get("content") if isinstance(token, dict) else token
        _need(name is None or backend.token_to_id(name) is not None, f"tokenizer_config.json says {key} {name!r}, which is no token")
    return f"{most + 1:,} ids of {config['vocab_size']:,} rows" + (", with a chat template" if has_template(folder) else ""), None


# Readers.


def _transformers(folder: Path) -> Finding:
    """Built by its own class on the meta device, which takes no memory: names and shapes as transformers itself reads them."""
    import torch
    import transformers

    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with torch.device("meta"):
            _, said = model_class(folder).from_pretrained(
                folder,
                dtype="auto",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                device_map="meta",
                output_loading_info=True,
            )
    except Exception as failure:  # of any kind: this is what a user's own load would raise
        return Finding(
            "transformers", "bad", f"does not load it: {(str(failure).strip().splitlines() or [type(failure).__name__])[0][:200]}"
        )
    finally:
        transformers.utils.logging.set_verbosity(before)
    wrong = {key: sorted(map(str, said[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if said.get(key)}
    if wrong:
        return Finding("transformers", "bad", "; ".join(f"{key.replace('_', ' ')}: {_some(names)}" for key, names in wrong.items()))
    return Finding("transformers", "ok", f"loads it ({transformers.__version__}): every tensor has its name and shape")


def _vllm(config: dict[str, Any]) -> Finding:
    name = (config.get("architectures") or [""])[0]
    if name in VLLM:
        return Finding("vLLM", "ok", f"lists {name} in its registry")
    return Finding(
        "vLLM", "untested", f"{name} is not in its registry: it would run by its backend for transformers' own code, if that takes it"
    )


def _llamacpp(folder: Path, config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Iterator[Finding]:
    name = (config.get("architectures") or [""])[0]
    if name not in LLAMACPP:
        yield Finding("llama.cpp", "refuses", f"its converter has no {name}")
        return
    yield Finding("llama.cpp", "ok", f"its converter has {name}")
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", "default")
    if kind not in ROPES:
        yield Finding("llama.cpp", "refuses", f"its converter has no rope of kind {kind}")
    original = config.get("original_max_position_embeddings", LLAMA3_POSITIONS)
    if kind == "llama3" and rope.get("original_max_position_embeddings", original) != original:
        yield Finding(
            "llama.cpp", "refuses",
            f"its converter takes {original:,} for the original context of a llama3 rope, and this one's is {rope['original_max_position_embeddings']:,}: "
            f'add "original_max_position_embeddings" to the top of a copy of config.json before converting',
        )  # fmt: skip
    if name == "MixtralForCausalLM" and not any(".block_sparse_moe.experts." in one for one in tensors):
        yield Finding("llama.cpp", "bad", "experts are not under block_sparse_moe.experts, where its converter looks for them")
    yield _vocabulary(folder, name)


def _vocabulary(folder: Path, name: str) -> Finding:
    """How the converter would take up the tokenizer."""
    if (folder / "tokenizer.model").is_file():
        return Finding("llama.cpp", "ok", "vocabulary from tokenizer.model")
    if not (folder / "tokenizer.json").is_file():
        return Finding("llama.cpp", "bad", "there is neither tokenizer.model nor tokenizer.json")
    tree = _json(folder / "tokenizer.json")
    model = tree.get("model", {})
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        if name in ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"):
            return Finding("llama.cpp", "ok", "vocabulary from tokenizer.json, with byte fallback")
        return Finding("llama.cpp", "untested", f"it may ask for tokenizer.model of a {name}, which is not here")
    if _ours(tree):
        return Finding(
            "llama.cpp", "refuses",
            "the pre-tokenizer is one that gigatrain trained, which its table does not have; a model for llama.cpp needs the tokenizer of a published model",
        )  # fmt: skip
    return Finding("llama.cpp", "untested", "whether its table has this pre-tokenizer's hash: it has those of published models")


def _ours(tree: dict[str, Any]) -> bool:
    """Whether a tokenizer.json cuts texts by gigatrain's own rule."""
    pre = tree.get("pre_tokenizer") or {}
    return any((one.get("pattern") or {}).get("Regex") == PIECES for one in pre.get("pretokenizers", [pre]))
