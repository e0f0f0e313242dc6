"""The model card: README.md of an export, as the hub reads it, made of the run's own records. What a run did not measure is said to be not measured."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gigatrain
from gigatrain import catalog, load
from gigatrain.checkpoint import write_text
from gigatrain.data.corpus import Corpus
from gigatrain.errors import DataError
from gigatrain.foreign import Foreign
from gigatrain.launching import yamltext
from gigatrain.models import hf
from gigatrain.observe import evals
from gigatrain.observe.report import words
from gigatrain.observe.report.collect import collect
from gigatrain.observe.report.figures import finite
from gigatrain.planning.plan import Plan

DATA = "data.json"  # of a run folder: what it read
KEPT = ("documents", "tokens", "trained", "text_bytes")  # trained: only of a source of which not all is
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+\Z")  # an owner and a repository, as the hub calls a model
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*\Z")  # an identifier of the hub's list
IDENTIFIERS = {  # of the hub, of the licences as recipes/*/model.toml call them; all others are "other", with their name
    "Apache 2.0": "apache-2.0",
    "Llama 3.1 Community License": "llama3.1",
    "Gemma Terms of Use": "gemma",
}
POINTS = 12  # of the loss, in the card's table


def keep_data(corpus: Corpus, weights: Sequence[float], folder: Path) -> None:
    """Write down in the run folder what its corpus holds, so that a card needs nothing outside of it."""
    total = sum(weights)
    rows = [
        {
            "name": source["name"],
            "weight": weight / total,
            **{split: {key: of[key] for key in KEPT if key in of} for split, of in source["splits"].items()},
        }
        for source, weight in zip(corpus.manifest["sources"], weights, strict=True)
    ]
    write_text(folder / DATA, json.dumps({"sha256": corpus.sha256, "sources": rows}, indent=1) + "\n")


def card(folder: Path, plan: Plan, *, step: int, chat: bool, adapter: bool = False) -> str:
    """README.md for an export of step `step` of the run in `folder`; `chat`: its tokenizer has a chat template; `adapter`: it holds the adapter alone."""
    value = collect(folder)
    tokens = _tokens_at(folder, step, plan)
    source = _base(plan)
    measured = _measured(folder, step)
    data = _read(folder, plan)
    front = _front(value, plan, source, adapter=adapter)
    body = [
        f"# {_text(plan.name)}",
        *([_text(plan.summary)] if plan.summary else []),
        _what(plan, source, step, tokens, data, adapter=adapter),
        "## How to load it",
        _loading(plan, chat=chat, adapter=adapter),
        "## Training data",
        _data(data, tokens),
        "## Results",
        _results(folder, step, measured, pairs=plan.objective.pairs),
        "## Energy",
        _energy(value),
        "## How it was made",
        _made(value, plan, step),
    ]
    return yamltext.text(front) + "---\n\n" + "\n\n".join(body) + "\n"


def _text(text: Any) -> str:
    """A text of a recipe or file within Markdown: no markup of its own, one line."""
    said = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", said)


def _code(text: Any) -> str:
    return f"`{' '.join(str(text).split()).replace('`', chr(39)).replace('|', '/')}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns are texts, the others numbers."""
    line = "|".join("---" if at < left else "---:" for at in range(len(head)))
    return "\n".join([f"| {' | '.join(head)} |", f"|{line}|", *(f"| {' | '.join(row)} |" for row in rows)])


# Facts.


def _base(plan: Plan) -> dict[str, Any] | None:
    """The model that the run started from: its name, the hub's name of it if it has one, and its licence: as a card beside its weights says, which came with
    them from the hub, else as the shipped recipes of that model do. `basis`: which of the two."""
    if plan.source is None:
        return None
    kept = hf.kept(plan.source)
    folder = Path(plan.source).expanduser()
    front = _front_of(kept / "README.md") if kept is not None else {}
    name = plan.source if HUB_NAME.match(plan.source) and not folder.is_dir() else ""
    if folder.is_dir():  # a folder that was downloaded from the hub may say whose it is, as its config.json does
        said = _object(folder / "config.json").get("_name_or_path")
        name = said if isinstance(said, str) and HUB_NAME.match(said) and not Path(said).exists() else ""
    place = folder.resolve()  # of an export/ the run's name tells more
    called = f"{place.parent.name}/{place.name}" if place.name == "export" else place.name
    found = {"name": name or called, "hub": name, "folder": "" if name == plan.source else str(folder.absolute())}
    if front.get("license"):
        return found | {"licence": front["license"], "licence_name": front.get("license_name", ""), "basis": "the card beside its weights"}
    if known := _shipped(name):
        by = f"gigatrain's recipes of {known.name}; its card on the hub has the last word"
        named = IDENTIFIERS.get(known.licence, "other")
        return found | {"licence": named, "licence_name": known.licence if named == "other" else "", "basis": by}
    return found | {"licence": "", "licence_name": "", "basis": ""}


def _shipped(name: str) -> catalog.Facts | None:
    """What is known of the open model that the hub calls `name`."""
    root = load.shipped("recipes")
    every = (catalog.facts(root, model) for model in catalog.models(root)) if name else ()
    return next((one for one in every if name.lower() in (one.weights.lower(), one.chat.lower())), None)


def _front_of(path: Path) -> dict[str, str]:
    """The plain `key: value` lines of a card's front matter; what is nested in it is not read."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace")[: 1 << 16].splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found = {}
    for line in lines[1:]:
        if line.strip() == "---":
            break
        if match := re.match(r"([A-Za-z_]+):\s*(\S.*?)\s*\Z", line):
            found[match[1]] = match[2].strip("'\"")
    return found


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(folder: Path) -> list[dict[str, Any]]:
    path, found = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and finite(row.get("step")) is not None:
            found.append(row)
    return found


def _tokens_at(folder: Path, step: int, plan: Plan) -> int:
    """Tokens trained up to a step: as the last window at it reported them, else as the plan counts them."""
    said = [row["tokens"] for row in _rows(folder) if row["step"] == step and finite(row.get("tokens")) is not None]
    return int(said[-1]) if said else step * plan.tokens_per_step


def _measured(folder: Path, step: int) -> dict[str, Any]:
    """The last validation at or before a step."""
    found = [row for row in _rows(folder) if "val_loss" in row and row["step"] <= step]
    return found[-1] if found else {}


# The front matter, which the hub checks.


def _front(value: Mapping[str, Any], plan: Plan, source: Mapping[str, Any] | None, *, adapter: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    found["tags"] = ["gigatrain", *([plan.adapter.kind] if plan.adapter is not None else [])]
    if source is not None:
        if source["hub"]:
            found |= {"base_model": [source["hub"]], "base_model_relation": "adapter" if adapter else "finetune"}
        licence = source["licence"]
        if licence and LICENCE.match(licence.lower()):
            found["license"] = licence.lower()
            if licence.lower() == "other" and source["licence_name"]:
                found["license_name"] = source["licence_name"]
    hubs = [one.path for one in plan.data.sources if one.kind == "hub" and one.path and HUB_NAME.match(one.path)]
    if hubs:
        found["datasets"] = list(dict.fromkeys(hubs))
    if (kilograms := value["headline"]["kg_co2e"]["value"]) is not None:
        found["co2_eq_emissions"] = {
            "emissions": round(kilograms * 1000),  # the hub counts grams
            "source": "gigatrain: joules of the run at the facility times the site's carbon intensity",
            "training_type": "fine-tuning" if source is not None else "pre-training",
            "hardware_used": f"{value['run']['ranks'] or 1} x {_hardware(value, plan)}",
        }
    results = _index(value)
    if results:
        found["model-index"] = [{"name": plan.name, "results": results}]
    return found


def _index(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Evaluations in the form of the hub's model-index."""
    found = []
    for task, row in evals.latest(Path(value["run"]["folder"])).items():
        metrics = [
            {"type": name.partition(",")[0], "name": f"{name.partition(',')[0]} ({row['few_shot']}-shot)", "value": one["value"]}
            for name, one in row["metrics"].items()
            if finite(one["value"]) is not None
        ]
        if metrics:
            found.append(
                {
                    "task": {"type": "text-generation", "name": "Text generation"},
                    "dataset": {"type": task, "name": task},
                    "metrics": metrics,
                }
            )
    return found


# The body.


def _hardware(value: Mapping[str, Any], plan: Plan) -> str:
    summary = _object(Path(value["run"]["folder"]) / "summary.json")
    named = summary.get("device")
    return str(named) if named and named != "cpu" else plan.watts.chip or plan.device.upper()


def _learned(plan: Plan, data: Mapping[str, Any]) -> str:
    """What had a loss: of which documents which tokens, or which answers, and by what objective."""
    objective, formats = plan.objective, {one.format for one in plan.data.sources}
    names = {
        "the next token of its documents": {"text"},
        "the assistant's turns of conversations": {"chat", "sharegpt", "alpaca"},
        "the completions of prompts": {"completion"},
    }
    texts = " and ".join(name for name, of in names.items() if of & formats)
    if objective.pairs:
        what = "single answers that are good or not" if objective.kind == "kto" else "pairs of a preferred and a refused answer"
        against = {"start": "the weights it started from", "adapter": "the model without its adapter", None: ""}
        reference = against[objective.reference or "start"] if objective.refers else ""
        how = f"{objective.kind.upper()}, strength {objective.strength:g}" + (f", against {reference}" if reference else "")
        return f"It was trained on {what}, by {how}."
    share = ""
    if formats != {"text"} or any("trained" in one["train"] for one in data.get("sources", ())):
        trained, total = _trained(data)
        share = f" {trained:,} of {total:,} tokens ({100 * trained / total:.3g} %) have a loss; the others are only read." if total else ""
    if objective.kind == "distil":
        teacher = str(objective.teacher)
        named = (
            f"[{teacher}](https://huggingface.co/{teacher})" if HUB_NAME.match(teacher) and not Path(teacher).exists() else _code(teacher)
        )
        how = f"{100 * objective.weight:g} % of the loss, at temperature {objective.temperature:g}"
        rest = f"; the rest is cross entropy, of {texts}" if objective.weight < 1 else f", of {texts}"
        return (
            f"It was trained on the probabilities of a teacher, {named} ({how}{rest}), whose licence may bind what is made with it.{share}"
        )
    return f"It was trained on {texts}.{share}"


def _trained(data: Mapping[str, Any]) -> tuple[int, int]:
    """Training tokens that have a loss, and all, of the corpus; 0 and 0 where nobody kept that."""
    of = [one["train"] for one in data.get("sources", ())]
    return sum(one.get("trained", one["tokens"]) for one in of), sum(one["tokens"] for one in of)


def _what(plan: Plan, source: Mapping[str, Any] | None, step: int, tokens: int, data: Mapping[str, Any], *, adapter: bool) -> str:
    arch = plan.architecture
    kind = arch.class_name if isinstance(arch, Foreign) else arch.family
    what = f"An adapter of a {kind} model" if adapter else f"A {kind} model"
    lines = [
        f"{what} of {plan.parameters:,} parameters, trained by gigatrain {gigatrain.__version__} for {step:,} steps, {tokens:,} tokens."
    ]
    lines.append(_learned(plan, data))
    if source is None:
        lines.append(
            "Its weights were drawn at random before: there is no base model, and no licence follows from one. State yours before you publish."
        )
    else:
        name = f"[{source['hub']}](https://huggingface.co/{source['hub']})" if source["hub"] else _code(source["name"])
        unknown = "unknown: no card beside its weights names one, and no shipped recipe is of it"
        licence = f"{_code(source['licence_name'] or source['licence'])} (by {source['basis']})" if source["licence"] else unknown
        lines.append(f"It started from {name}; the licence of that model: {licence}.")
    if plan.adapter is not None:
        size = f"{plan.adapter.kind}, rank {plan.adapter.rank}, alpha {plan.adapter.alpha:g}"
        narrow = " in 4 bits (nf4)" if plan.adapter.quantise == "nf4" else ""
        lines.append(f"Only an adapter was trained ({size}), beside the base's frozen weights{narrow}.")
        lines.append("This folder holds it alone: the base model is needed too." if adapter else "Here it is merged into them.")
        if adapter and source is not None and source["folder"]:
            lines.append(
                f"`base_model_name_or_path` in adapter_config.json is where that lay, {_code(source['folder'])}: name its place on the hub before you publish."
            )
    return " ".join(lines)


def _loading(plan: Plan, *, chat: bool, adapter: bool) -> str:
    model = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    head = (
        f"from peft import {model}\nfrom transformers import AutoTokenizer\n\n"
        if adapter
        else f"from transformers import {model}, AutoTokenizer\n\n"
    )
    load = 'folder = "."  # this folder, or its name on the hub\ntokenizer = AutoTokenizer.from_pretrained(folder)\n'
    load += f'model = {model}.from_pretrained(folder, dtype="auto")\n'
    if chat:
        asked = 'messages = [{"role": "user", "content": "Who are you?"}]\n'
        asked += 'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)\n'
    else:
        asked = 'inputs = tokenizer("Once", return_tensors="pt")\n'
    said = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))\n"
    text = f"```python\n{head}{load}{asked}{said}```"
    dtype = "float32" if adapter or plan.compute == "fp32" else "bfloat16, the precision that the run computed in"
    return f"{text}\n\nWeights are {dtype}; the context is {plan.positions:,} tokens."


def _read(folder: Path, plan: Plan) -> dict[str, Any]:
    """The record of what the run read; of a run that is older than such records it is its corpus's, and nothing if that is not here."""
    if data := _object(folder / DATA):
        return data
    try:
        corpus = Corpus.open(Path(plan.data.folder).expanduser() / str(_object(folder / "run.json").get("corpus")))
    except DataError:
        return {}
    weights = [one.weight for one in plan.data.sources]
    rows = [
        {"name": one["name"], "weight": weight / sum(weights), **one["splits"]}
        for one, weight in zip(corpus.manifest["sources"], weights, strict=True)
    ]
    return {"sources": rows, "sha256": corpus.sha256}


def _data(data: Mapping[str, Any], tokens: int) -> str:
    if not data:
        return "Unknown: the run is older than the record of its data, and its corpus is not here."
    rows = [
        [
            _code(one["name"]), f"{one['train']['documents']:,}", f"{one['train']['tokens']:,}", f"{_trained({'sources': [one]})[0]:,}",
            f"{one['weight'] * 100:.4g} %", f"{one['weight'] * tokens:,.0f}",
        ]
        for one in data["sources"]
    ]  # fmt: skip
    trained, total = _trained(data)
    held = sum(one["validation"]["documents"] for one in data["sources"])
    text = _table(("source", "documents", "tokens", "that have a loss", "share of the samples", "tokens trained on, about"), rows)
    said = f"{total:,} tokens in all, of which those with a loss were read {tokens / max(1, trained):.2f} times; {held:,} documents were held out."
    return f"{text}\n\n{said} SHA-256 of the corpus: {_code(data['sha256'])}."


def _results(folder: Path, step: int, measured: Mapping[str, Any], *, pairs: bool) -> str:
    rows = [row for row in _rows(folder) if row["step"] <= step]
    windows = [row for row in rows if "tokens" in row and finite(row.get("loss")) is not None]
    parts = []
    if windows:
        at = sorted({round(number * (len(windows) - 1) / (POINTS - 1)) for number in range(POINTS)})
        checked = {row["step"]: row for row in rows if "val_loss" in row}
        table = [
            [
                f"{windows[i]['step']:,}", f"{windows[i]['tokens']:,}", f"{windows[i]['loss']:.4f}",
                *(_number(checked.get(windows[i]["step"], {}).get(key)) for key in ("val_loss", "val_bits_per_byte")),
            ]
            for i in at
        ]  # fmt: skip
        parts.append(_table(("step", "tokens", "loss", "validation loss", "bits per byte"), table, left=0))
    else:
        parts.append("No loss is recorded.")
    if measured:
        sets = {"held-out documents": {key: measured.get(f"val_{key}") for key in ("loss", "perplexity", "bits_per_byte", "targets")}}
        sets |= measured.get("val_sets", {})
        table = [
            [_text(name), *(_number(one.get(key)) for key in ("loss", "perplexity", "bits_per_byte")), f"{one.get('targets') or 0:,}"]
            for name, one in sets.items()
        ]
        parts.append(f"On documents that were not trained on, at step {measured['step']:,}:")
        of = ("loss, nats an answer or pair", "answers or pairs") if pairs else ("loss, nats a token", "tokens")
        parts.append(_table(("set", of[0], "perplexity", "bits per byte", of[1]), table))
    found = evals.latest(folder)
    if not found:
        parts.append("No task was evaluated; `gigatrain eval RUN --tasks …` does so, and an export after it has the results.")
        return "\n\n".join(parts)
    table = [
        [
            _text(task), _text(name.replace(",none", "")), f"{one['value']:.4f}", _number(one.get("stderr")), str(row["few_shot"]),
            f"{row['samples']:,}" + (f" of the first {row['limit']:,}" if row.get("limit") else ""), f"{row['step']:,}",
        ]
        for task, row in found.items() for name, one in row["metrics"].items() if finite(one["value"]) is not None
    ]  # fmt: skip
    parts.append("Tasks of lm-evaluation-harness:")
    parts.append(_table(("task", "metric", "value", "standard error", "few-shot", "samples", "step"), table, left=2))
    return "\n\n".join(parts)


def _number(value: Any) -> str:
    return "" if finite(value) is None else f"{value:.4f}"


def _energy(value: Mapping[str, Any]) -> str:
    """Energy, carbon and money with their boundary and basis, or `not measured` and the reason."""
    said = value["headline"]
    spent = said["mwh"]
    rows = []
    if spent["value"] is None:
        rows.append(["energy", "not measured", _text(spent["unknown"])])
    else:
        basis = f"at the boundary “{spent['boundary']}”; {words.provenance(spent.get('provenance'))}"
        rows.append(["energy", f"{spent['value'] * 1000:.6g} kWh", _text(basis)])
    for key, name, unit in (("kg_co2e", "carbon", "kg CO2e"), ("eur", "cost of energy", "EUR")):
        one = said[key]
        if one["value"] is None:
            rows.append([name, "not measured", _text(one["unknown"])])
        else:
            rows.append([name, f"{one['value']:.6g} {unit}", _text(f"the facility's energy times {_factor(value, key)}")])
    return (
        _table(("what", "amount", "boundary and basis"), rows, left=3)
        + "\n\nOf the run alone: experiments before it, evaluations and use are not in it."
    )


def _factor(value: Mapping[str, Any], key: str) -> str:
    name = {"eur": "price_eur_mwh", "kg_co2e": "carbon_g_kwh"}[key]
    given = value["energy"].get("sources")
    for one in given if isinstance(given, list) else ():
        if isinstance(one, Mapping) and one.get("what") == name:
            return f"{one.get('value')} {'EUR/MWh' if key == 'eur' else 'g CO2e/kWh'} ({one.get('basis')}: {one.get('source')})"
    return "the figures that the run recorded with its schedule"


def _made(value: Mapping[str, Any], plan: Plan, step: int) -> str:
    run, versions = value["run"], value["versions"]
    settings = [(name, said) for name, said in value["settings"].items() if said not in ("none", "")]
    found = [
        ("gigatrain", gigatrain.__version__),
        ("recipe", plan.name),
        ("plan, SHA-256", plan.sha256),
        ("identity of the numbers", plan.identity),
        ("run", run["id"] or "unknown"),
        ("step of this export", f"{step:,} of {plan.steps:,}"),
        ("site", plan.site),
        ("hardware", f"{plan.ranks:,} x {_hardware(value, plan)}"),
        ("wall-clock", "unknown" if (wall := value["headline"]["wall_s"]["value"]) is None else words.span(wall)),
        ("objective", plan.objective.kind),
        *settings,
        *((f"version of {name}", said) for name, said in versions.items() if name not in ("threads", "cores", "gigatrain")),
    ]
    rows = [[_text(name), _code(said)] for name, said in found]
    return _table(("what", "value"), rows, left=2)
