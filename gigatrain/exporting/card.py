"""The model card: README.md of an export, as the hub reads it, made of the run's own records. What a run did not measure is said to be not measured."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gigatrain
from gigatrain.checkpoint import write_text
from gigatrain.data.build import Corpus
from gigatrain.errors import DataError
from gigatrain.foreign import Foreign
from gigatrain.launching import yamltext
from gigatrain.observe import evals
from gigatrain.observe.report import words
from gigatrain.observe.report.collect import collect
from gigatrain.observe.report.figures import finite
from gigatrain.planning.plan import Plan

DATA = "data.json"  # of a run folder: what it read
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+\Z")  # an owner and a repository, as the hub calls a model
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*\Z")  # an identifier of the hub's list
POINTS = 12  # of the loss, in the card's table


def keep_data(corpus: Corpus, weights: Sequence[float], folder: Path) -> None:
    """Write down in the run folder what its corpus holds, so that a card needs nothing outside of it."""
    total = sum(weights)
    rows = [
        {
            "name": source["name"],
            "weight": weight / total,
            **{split: {key: source["splits"][split][key] for key in ("documents", "tokens", "text_bytes")} for split in source["splits"]},
        }
        for source, weight in zip(corpus.manifest["sources"], weights, strict=True)
    ]
    write_text(folder / DATA, json.dumps({"sha256": corpus.sha256, "sources": rows}, indent=1) + "\n")


def card(folder: Path, plan: Plan, *, step: int, chat: bool) -> str:
    """README.md for an export of step `step` of the run in `folder`; `chat`: its tokenizer has a chat template."""
    value = collect(folder)
    tokens = _tokens_at(folder, step, plan)
    source = _base(plan)
    measured = _measured(folder, step)
    front = _front(value, plan, source, measured)
    body = [
        f"# {_text(plan.name)}",
        *([_text(plan.summary)] if plan.summary else []),
        _what(plan, source, step, tokens),
        "## How to load it",
        _loading(plan, chat=chat),
        "## Training data",
        _data(folder, plan, tokens),
        "## Results",
        _results(folder, step, measured),
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
    """The model that the run started from: its name, the hub's name of it if it has one, and its licence if a card beside it says so."""
    if plan.source is None:
        return None
    folder = Path(plan.source).expanduser()
    front = _front_of(folder / "README.md") if folder.is_dir() else {}
    name = plan.source if HUB_NAME.match(plan.source) and not folder.is_dir() else ""
    if folder.is_dir():  # a folder that was downloaded from the hub may say whose it is, as its config.json does
        said = _object(folder / "config.json").get("_name_or_path")
        name = said if isinstance(said, str) and HUB_NAME.match(said) and not Path(said).exists() else ""
    return {"name": name or folder.name, "hub": name, "licence": front.get("license", ""), "licence_name": front.get("license_name", "")}


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


def _front(value: Mapping[str, Any], plan: Plan, source: Mapping[str, Any] | None, measured: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gigatrain"]}
    if _adapter(plan) is not None:
        found["tags"] = ["gigatrain", str(_adapter(plan))]
    if source is not None:
        if source["hub"]:
            found["base_model"] = [source["hub"]]
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
    results = _index(plan, value, measured)
    if results:
        found["model-index"] = [{"name": plan.name, "results": results}]
    return found


def _index(plan: Plan, value: Mapping[str, Any], measured: Mapping[str, Any]) -> list[dict[str, Any]]:
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


def _adapter(plan: Plan) -> str | None:
    """Kind of the adapter that the run trained, if it did."""
    adapter = getattr(plan, "adapter", None)
    return None if adapter is None or getattr(adapter, "kind", "none") in (None, "none") else str(adapter.kind)


def _objective(plan: Plan) -> str:
    kind = getattr(getattr(plan, "objective", None), "kind", "language")
    return str(kind)


def _hardware(value: Mapping[str, Any], plan: Plan) -> str:
    summary = _object(Path(value["run"]["folder"]) / "summary.json")
    named = summary.get("device")
    return str(named) if named and named != "cpu" else plan.watts.chip or plan.device.upper()


def _what(plan: Plan, source: Mapping[str, Any] | None, step: int, tokens: int) -> str:
    arch = plan.architecture
    kind = f"{arch.class_name}" if isinstance(arch, Foreign) else arch.family
    size = f"{plan.parameters:,} parameters"
    lines = [f"A {kind} model of {size}, trained by gigatrain {gigatrain.__version__} for {step:,} steps, {tokens:,} tokens."]
    kinds = {"language": "the next token of its documents", "distil": "a teacher's probabilities"}
    objective = _objective(plan)
    lines.append(f"It was trained on {kinds.get(objective, f'preferences, by {objective.upper()}')}.")
    if source is None:
        lines.append(
            "Its weights were drawn at random before: there is no base model, and no licence follows from one. State yours before you publish."
        )
    else:
        name = f"[{source['hub']}](https://huggingface.co/{source['hub']})" if source["hub"] else _code(source["name"])
        licence = (
            f"{_code(source['licence_name'] or source['licence'])}" if source["licence"] else "unknown: no card lies beside its weights"
        )
        lines.append(f"It started from {name}; the licence of that model: {licence}.")
        if (kind := _adapter(plan)) is not None:
            rank = getattr(plan.adapter, "rank", None)  # type: ignore[attr-defined]
            lines.append(
                f"Only an adapter was trained ({kind}{f', rank {rank}' if rank else ''}); the base model's own weights are as they were."
            )
    return " ".join(lines)


def _loading(plan: Plan, *, chat: bool) -> str:
    head = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    load = 'folder = "."  # this folder, or its name on the hub\ntokenizer = AutoTokenizer.from_pretrained(folder)\n'
    load += 'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")\n'
    if chat:
        asked = 'messages = [{"role": "user", "content": "Who are you?"}]\n'
        asked += 'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)\n'
    else:
        asked = 'inputs = tokenizer("Once", return_tensors="pt")\n'
    said = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))\n"
    text = f"```python\n{head}{load}{asked}{said}```"
    dtype = "bfloat16" if plan.compute == "bf16" else "float32"
    return f"{text}\n\nWeights are {dtype}, the precision that the run computed in; the context is {plan.positions:,} tokens."


def _data(folder: Path, plan: Plan, tokens: int) -> str:
    data = _object(folder / DATA)
    if not data:
        try:
            corpus = Corpus.open(Path(plan.data.folder).expanduser() / str(_object(folder / "run.json").get("corpus")))
            weights = [one.weight for one in plan.data.sources]
            rows = [
                {"name": one["name"], "weight": weight / sum(weights), **one["splits"]}
                for one, weight in zip(corpus.manifest["sources"], weights, strict=True)
            ]
            data = {"sources": rows, "sha256": corpus.sha256}
        except DataError:
            return "Unknown: the run is older than the record of its data, and its corpus is not here."
    rows = [
        [
            _code(one["name"]), f"{one['train']['documents']:,}", f"{one['train']['tokens']:,}", f"{one['weight'] * 100:.4g} %",
            f"{one['weight'] * tokens:,.0f}",
        ]
        for one in data["sources"]
    ]  # fmt: skip
    total = sum(one["train"]["tokens"] for one in data["sources"])
    held = sum(one["validation"]["documents"] for one in data["sources"])
    text = _table(("source", "documents", "tokens", "share of the samples", "tokens trained on, about"), rows)
    said = f"{total:,} tokens in all, read {tokens / total:.2f} times; {held:,} documents were held out."
    return f"{text}\n\n{said} SHA-256 of the corpus: {_code(data['sha256'])}."


def _results(folder: Path, step: int, measured: Mapping[str, Any]) -> str:
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
        parts.append(_table(("set", "loss, nats a token", "perplexity", "bits per byte", "tokens"), table))
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
        *((name, f"{adapter}, rank {getattr(plan.adapter, 'rank', 'unknown')}") for name in ("adapter",) if (adapter := _adapter(plan))),  # type: ignore[attr-defined]
        *((name, kind) for name in ("objective",) if (kind := _objective(plan)) != "language"),
        *settings,
        *((f"version of {name}", said) for name, said in versions.items() if name not in ("threads", "cores", "gigatrain")),
    ]
    rows = [[_text(name), _code(said)] for name, said in found]
    return _table(("what", "value"), rows, left=2)
