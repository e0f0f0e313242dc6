"""Chat templates of the shapes that models have, each with and without `{% generation %}`, and small tokenizers that have their special tokens."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from gigatrain.data import tokenizer

# «…» stands around what the assistant writes: {% generation %} in one form of each template, nothing in the other.
CHATML = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}\
{{- '# Tools\\n' }}{% for tool in tools %}{{- tool | tojson + '\\n' }}{% endfor %}{{- '<|im_end|>\\n' }}\
{%- elif messages and messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}«{{- message.content }}{% for call in message.tool_calls or [] %}\
{{- ('\\n' if message.content or not loop.first else '') + '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{% endfor %}{{- '<|im_end|>' }}»{{- '\\n' }}
{%- elif message.role == 'tool' %}{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}\
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}\
{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# As Qwen3: thinking stays in turns behind the last question only.
THINKING = """\
{%- set ns = namespace(last=-1) %}{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}«\
{%- if loop.index0 > ns.last %}{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}\
{{- message.content + '<|im_end|>' }}»{{- '\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + (message.role if message.role != 'tool' else 'ipython') + '<|end_header_id|>\\n\\n' }}
{%- if message.role == 'assistant' %}«{% if message.tool_calls %}{{- message.tool_calls[0].function | tojson }}{% else %}{{- message.content | trim }}{% endif %}\
{{- '<|eot_id|>' }}»{% else %}{{- message.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
# As Mistral v3: no generation prompt, and the system's text stands before the last question, wherever that is.
MISTRAL = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}
{{- bos_token }}
{%- for message in loop_messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{% endif %}
{%- if message.role == 'user' %}{% if system is defined and loop.index0 >= loop_messages | length - 2 %}{{- '[INST]' + system + '\\n\\n' + message.content + '[/INST]' }}\
{% else %}{{- '[INST]' + message.content + '[/INST]' }}{% endif %}
{%- else %}«{{- ' ' + message.content | trim + eos_token }}»{% endif %}
{%- endfor %}"""
GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\\n\\n' %}{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}
{%- for message in turns %}
{%- if message.role == 'assistant' %}{{- '<start_of_turn>model\\n' }}«{{- message.content | trim + '<end_of_turn>' }}»{{- '\\n' }}
{%- else %}{{- '<start_of_turn>user\\n' + (first if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""
# As gpt-oss: channels; the last turn ends with another token than those before it, whose analysis is dropped.
HARMONY = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- '<|start|>assistant' }}«\
{%- if message.thinking and loop.last %}{{- '<|channel|>analysis<|message|>' + message.thinking + '<|end|><|start|>assistant' }}{% endif %}\
{{- '<|channel|>final<|message|>' + message.content }}{% if loop.last and not add_generation_prompt %}{{- '<|return|>' }}{% else %}{{- '<|end|>' }}{% endif %}»
{%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
TEMPLATES = {"chatml": CHATML, "thinking": THINKING, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "harmony": HARMONY}
SPECIALS = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "thinking": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["[INST]", "[/INST]"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "harmony": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"],
}
TEXT = ["What is two plus two? It is four.\n\nHello, world! The answer: 42.\n", "def add(a, b):\n    return a + b\n", "für naïve Fälle 日本語 🙂\n\n\n"] * 4


def template(shape: str, *, marks: bool) -> str:
    """One template, with `{% generation %}` or without."""
    open_, close = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
    return TEMPLATES[shape].replace("«", open_).replace("»", close)


def made(folder: Path, shape: str, *, marks: bool, swallows: bool = False) -> tokenizer.Tokenizer:
    """A tokenizer of that shape in `folder`: Gemma's and Mistral's put ▁ for blanks, the others are byte-level, with offsets trimmed as theirs are.

    swallows: special tokens take the blanks behind them, as Phi-3's do.
    """
    metaspace = shape in ("mistral", "gemma")
    if metaspace:
        backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if shape == "gemma":
            backend.normalizer = normalizers.Replace(" ", "▁")
            backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet: list[str] = []
    else:
        backend = Backend(models.BPE())
        pieces = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # Llama 3's, in short
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pieces), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))] if metaspace else ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=len(names) + len(alphabet) + 120, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    backend.add_special_tokens([AddedToken(name, rstrip=swallows, special=True) for name in SPECIALS[shape]])
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["special"] and not token["content"].startswith("<0x")
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template(shape, marks=marks), encoding="utf-8")
    return tokenizer.load(str(folder))
