"""Chat templates that a recipe can name, and what a tokenizer needs to have one."""

import json
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from gigatrain import config
from gigatrain.data import tokenizer
from gigatrain.errors import DataError

# OpenAI's ChatML as Qwen 2.5 writes it, without its default system text; tools as there. The line's end behind a turn is not the assistant's.
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function signatures within " }}
    {{- "<tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\\n' }}
    {{- '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message['content'] or '' }}
        {%- for call in message['tool_calls'] or [] %}
            {%- set function = call['function'] or call %}
            {%- if message['content'] or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<tool_call>\\n{"name": ' + (function['name'] | tojson) + ', "arguments": ' + (function['arguments'] | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message['role'] == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif not (tools and loop.first and message['role'] == 'system') %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
BUILT_IN = {"chatml": (CHATML, ("<|im_start|>", "<|im_end|>"))}


def asked(spec: config.Tokenizer) -> tuple[str | None, tuple[str, ...]]:
    """The template that the recipe names, or None, and the special tokens that must exist; DataError if there is no such file."""
    if spec.template is None:
        return None, spec.special
    if spec.template in BUILT_IN:
        text, names = BUILT_IN[spec.template]
        return text, tuple(dict.fromkeys([*names, *spec.special]))
    path = Path(spec.template).expanduser()
    try:
        return path.read_text(encoding="utf-8"), spec.special
    except (OSError, UnicodeError) as error:
        raise DataError(
            f"tokenizer.template is {spec.template!r}, which is neither built in ({', '.join(BUILT_IN)}) nor a file that can be read: {error}"
        ) from error


def install(folder: Path, spec: config.Tokenizer) -> None:
    """Give the tokenizer in `folder` the template and the special tokens that the recipe asks for; ids that are new follow the highest there is."""
    text, names = asked(spec)
    if text is not None:
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    file = folder / "tokenizer.json"
    backend = Backend.from_str(file.read_text(encoding="utf-8"))
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    if missing := [name for name in names if name not in known]:
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in missing])
        file.write_text(backend.to_str(pretty=True), encoding="utf-8")


def fits(ready: tokenizer.Tokenizer, sources: tuple[config.Source, ...]) -> None:
    """DataError if a source holds conversations and the tokenizer has no template for them."""
    asks = [source for source in sources if source.format not in ("text", "completion")]
    if asks and ready.template_for(False) is None:
        raise DataError(
            f"source {asks[0].path} holds conversations ({asks[0].format}), and the tokenizer in {ready.folder} has no chat template; "
            'name one: tokenizer.template = "chatml", or a jinja file'
        )


def identity(spec: config.Tokenizer, existing: tokenizer.Tokenizer | None, sources: tuple[config.Source, ...]) -> list[object]:
    """What of templates decides the tokens; [] where there is nothing but text, so that a corpus of text keeps its name."""
    text, names = asked(spec)
    if text is None and not names and all(source.format == "text" for source in sources):
        return []
    own = (existing.templates, existing.names) if existing is not None else None
    return [text if text is not None else own and own[0], own and own[1], list(names), spec.date, json.dumps(list(BUILT_IN))]
