"""export, import, generate, eval: a trained model, out of a run, into one, and asked."""

import argparse
import json
import re
import sys
from pathlib import Path

from gigatrain.cli import given
from gigatrain.cli.command import Command
from gigatrain.errors import RunError

_positive_count = given.between(int, "count", 1, (1 << 31) - 1)
_processes = given.between(int, "count", 1, 1024)
_temperature = given.between(float, "temperature", 0, 10**6)


def _bytes(text: str) -> float:
    """`5GB`, `500MB`, `1GiB` or a number of bytes, of 1 MB at least."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", text)
    number = float(match[1]) * ((1024 if "i" in match[2] else 1000) ** (" KMGT".index(match[2][0])) if match[2] else 1) if match else 0
    if not 1e6 <= number <= 1e15:
        raise argparse.ArgumentTypeError(f"{text} is no size between 1MB and 1000TB, such as 5GB")
    return number


def _export_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_folder", metavar="RUN", help="a run folder; with --check alone an exported one")
    made.add_argument("folder", metavar="DIR", nargs="?", help="where the model goes")
    made.add_argument("--check", action="store_true", help="say who can read it: transformers, vLLM, llama.cpp; without DIR: of an export")
    made.add_argument(
        "--max-shard-size", dest="shard_size", metavar="BYTES", type=_bytes, default=5e9, help="of one file, as 5GB or 500MB (default: 5GB)"
    )
    made.add_argument("--processes", metavar="N", type=_processes, default=1, help="that write files side by side (default: 1)")
    whole = made.add_mutually_exclusive_group()
    whole.add_argument("--adapter", action="store_true", help="the run's adapter alone, as peft loads it")
    whole.add_argument("--merge", action="store_true", help="the adapter merged into its base (the default)")


def _export(options: argparse.Namespace) -> None:
    from gigatrain.export import export
    from gigatrain.observe.display import Display

    if options.folder is not None:
        step = export(
            Path(options.run_folder),
            Path(options.folder),
            shard_bytes=options.shard_size,
            processes=options.processes,
            adapter=options.adapter,
            display=Display(),
        )
        print(f"step {step} of {options.run_folder} exported to {options.folder}")
    elif not options.check:
        raise RunError("name the folder that the model goes to; or --check looks at one that is exported already")
    if options.check:
        from gigatrain.exporting import readers

        folder = Path(options.folder or options.run_folder)
        found = readers.check(folder)
        print("\n".join(one.line() for one in found))
        if wrong := sum(one.health == "bad" for one in found):
            raise RunError(f"{folder}: {wrong} of {len(found)} findings are bad; export it again, to another folder")


EXPORT = Command(
    "export",
    "write a run's model for transformers",
    """\
Write the newest checkpoint of a run as a folder for transformers: safetensors, config.json, generation_config.json, tokenizer and chat template, and a
model card (README.md) made of the run's own records.

  gigatrain export runs/mine my-model
  gigatrain export runs/mine my-model --check                 and say who can read it
  gigatrain export my-model --check
  gigatrain export runs/mine my-model --max-shard-size 2GB --processes 8
  gigatrain export runs/mine my-adapter --adapter           a run with [adapter]: as peft has it; else merged
  python -c 'import transformers; transformers.AutoModelForCausalLM.from_pretrained("my-model")'""",
    _export,
    _export_arguments,
)


def _import_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("source", metavar="SOURCE", help="its folder or file")
    made.add_argument("folder", metavar="DIR", help="where the model goes")
    numbers = made.add_mutually_exclusive_group()
    numbers.add_argument("--recipe", metavar="RECIPE", help="whose model's numbers these are")
    numbers.add_argument("--config", metavar="FILE", help="or the model's config.json (default: the one beside SOURCE)")
    made.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the recipe (null leaves it out); may be repeated"
    )
    made.add_argument("--dtype", choices=("bf16", "fp32"), help="round to it (default: as they are stored)")
    made.add_argument(
        "--max-shard-size", dest="shard_size", metavar="BYTES", type=_bytes, default=5e9, help="of one file, as 5GB or 500MB (default: 5GB)"
    )


def _import(options: argparse.Namespace) -> None:
    from gigatrain import load
    from gigatrain.importing.convert import convert

    if options.set and options.recipe is None:
        raise RunError("--set changes a key of a recipe; name one with --recipe")
    recipe = load.recipe(options.recipe, options.set) if options.recipe is not None else None
    made = convert(
        Path(options.source),
        Path(options.folder),
        recipe=recipe,
        config=Path(options.config) if options.config else None,
        dtype=options.dtype,
        shard_bytes=options.shard_size,
    )
    print("\n".join([*made.lines(), f"{options.source} imported to {options.folder}; a recipe starts from it by model.from"]))


IMPORT = Command(
    "import",
    "take up a checkpoint of DeepSpeed, torch DCP or torch.save",
    """\
Write a foreign checkpoint's weights as a folder for transformers, from which a recipe starts by model.from.
SOURCE is a folder of torch DCP (torchtitan's names are known too), of DeepSpeed (universal or plain ZeRO), or a state dict of torch.save.
Its pickles are never run: an interpreter of ours builds tensors, containers, numbers and strings from them, and refuses the rest by name.

  gigatrain import /scratch/ds/global_step100 my-model --recipe my.toml
  gigatrain import outputs/checkpoint/step-1000 my-model --config config.json --dtype bf16
  gigatrain import pytorch_model.bin my-model                 config.json lies beside it""",
    _import,
    _import_arguments,
)


def _generate_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("folder", metavar="RUN|DIR", help="a run folder or an exported model")
    made.add_argument("--prompt", help="the text to continue; with --chat what the user says")
    made.add_argument("--chat", action="store_true", help="answer in the model's chat template")
    made.add_argument(
        "--messages", metavar="FILE", help="or answer a conversation: JSON of roles and contents; - reads it from standard input"
    )
    made.add_argument("--tokens", type=given.count, default=100, help="at most so many new tokens (default: 100)")
    made.add_argument("--temperature", type=_temperature, help="0 takes the likeliest token each time (default: the model's own)")
    made.add_argument("--top-k", type=given.count, help="draw among so many likeliest tokens; 0: all (default: the model's own)")
    made.add_argument("--seed", type=given.count, default=0, help="of the drawing (default: 0)")
    made.add_argument("--json", action="store_true", help="prompt and text as JSON")


def _generate(options: argparse.Namespace) -> None:
    from gigatrain.generate import conversation, generate

    if options.messages and options.prompt is not None:
        raise RunError("--messages is the whole conversation; put the --prompt into it as its last turn")
    if options.messages is None and options.prompt is None:
        raise RunError("nothing to go on from: give a --prompt, or --messages FILE for a conversation")
    messages = [{"role": "user", "content": options.prompt}] if options.chat and not options.messages else None
    if options.messages:
        messages = conversation(sys.stdin.read() if options.messages == "-" else Path(options.messages).read_text(encoding="utf-8"))
    stream = sys.stdout.isatty() and not options.json
    text = generate(
        Path(options.folder),
        options.prompt,
        tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        messages=messages,
        stream=stream,
    )
    asked = {"prompt": options.prompt} if messages is None else {"messages": messages}
    if not stream:
        print(json.dumps(asked | {"text": text}) if options.json else text)


GENERATE = Command(
    "generate",
    "continue a text with a trained model",
    """\
Continue a text with a run's model or an exported one, or answer in its chat template.

  gigatrain generate runs/mine --prompt 'def main('
  gigatrain generate my-model --prompt 'import os' --temperature 0 --tokens 40
  gigatrain generate my-model --chat --prompt 'Who are you?'
  gigatrain generate my-model --messages talk.json            [{"role": "system", "content": "…"}, {"role": "user", "content": "…"}]""",
    _generate,
    _generate_arguments,
)


def _eval_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("folder", metavar="RUN|DIR", help="a run folder (its newest checkpoint) or a model for transformers")
    made.add_argument("--tasks", metavar="A,B", help="tasks and groups of lm-evaluation-harness (pip install 'gigatrain[eval]')")
    made.add_argument("--limit", metavar="N", type=_positive_count, help="only the first N documents of each task")
    made.add_argument("--few-shot", metavar="K", type=given.count, help="examples before each question (default: the task's own)")
    made.add_argument("--batch", metavar="B", type=_positive_count, default=1, help="sequences that are computed together (default: 1)")
    made.add_argument("--include", metavar="DIR", action="append", default=[], help="a folder with tasks of your own; may be repeated")
    made.add_argument("--chat", action="store_true", help="ask in the model's chat template")
    made.add_argument(
        "--bits-per-byte", metavar="FILE", nargs="+", default=[], help="texts (or .jsonl with `text`) to compare models of any tokenizer on"
    )
    made.add_argument("--context", metavar="N", type=_positive_count, help="of --bits-per-byte: tokens of a window (default: the model's)")
    made.add_argument("--seed", type=given.count, default=0, help="of few-shot examples and sampling (default: 0)")
    made.add_argument("-o", "--out", metavar="FILE", help="write the results there too, as JSON")
    made.add_argument("--json", action="store_true", help="the results as JSON")


def _eval(options: argparse.Namespace) -> None:
    from gigatrain import evaluate
    from gigatrain.observe.display import Display

    found = evaluate.evaluate(
        Path(options.folder).expanduser(),
        tasks=[name for name in (options.tasks or "").split(",") if name],
        texts=[Path(path).expanduser() for path in options.bits_per_byte],
        limit=options.limit,
        few_shot=options.few_shot,
        batch=options.batch,
        context=options.context,
        include=[Path(path).expanduser() for path in options.include],
        chat=options.chat,
        seed=options.seed,
        out=Path(options.out).expanduser() if options.out else None,
        display=None if options.json else Display(),
    )
    print(json.dumps(found, indent=2, sort_keys=True) if options.json else "\n".join(evaluate.lines(found)))


EVAL = Command(
    "eval",
    "evaluate a trained model: tasks, and bits per byte of texts",
    """\
Evaluate the newest checkpoint of a run, or any model for transformers, on this machine's device. Results of a run are kept in RUN/evals/, and are in its
report and in the model card of the next export.

  gigatrain eval runs/mine --tasks hellaswag,arc_easy --batch 16
  gigatrain eval runs/mine --tasks hellaswag --limit 200 --few-shot 5
  gigatrain eval my-model --tasks my_task --include my-tasks     a task of your own: a YAML file beside its data
  gigatrain eval my-model --tasks ifeval --chat                  asked in the chat template
  gigatrain eval my-model --bits-per-byte book.txt held-out.jsonl -o found.json

Bits per byte compare models whose tokenizers differ, which losses per token do not. Tasks are lm-evaluation-harness's, and most of them fetch their data
from the hub once.""",
    _eval,
    _eval_arguments,
)
