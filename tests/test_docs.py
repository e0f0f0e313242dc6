"""The documentation: what it shows can be typed, its keys exist, its links lead somewhere on both views, its messages are printed, its reference is whole."""

import csv
import datetime
import itertools
import json
import os
import posixpath
import re
import shlex
import subprocess
import sys
import tomllib
import unicodedata
from pathlib import Path

import jsonschema
import pytest
from programs import program

from gigatrain import cli, errors, load, shelf
from gigatrain.cli import parser
from gigatrain.launching import restart
from gigatrain.observe import prometheus
from gigatrain.planning import legs
from gigatrain.planning.plan import plan

ROOT = Path(__file__).parents[1]


HOOKS = program("docs/hooks.py")
MADE = HOOKS.generate()
SOURCES = HOOKS.written()
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in SOURCES}
# The log tells what was typed and measured at its time; all else is of today.
TODAY = [name for name in SOURCES if name != "benchmarks/LOG.md"]
KEYS = {of: MADE.keys(of) for of in ("recipe", "site")}
TABLES = {of: load.schema(of)["$defs"] for of in KEYS}
FREE = ("kernels.", "environment.")  # tables whose keys are the user's
FENCE = re.compile(r"^ {0,3}```(\w*)[^\n]*\n(.*?)^ {0,3}```[ ]*$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|\s|/)gigatrain\s+(?P<rest>.*)$")


# Commands.


def shown():
    """(page, command as it is shown) of every block, of code within a line, and of the examples in the commands' own help."""
    for name in TODAY:
        for language, body in FENCE.findall(TEXT[name]):
            if language in ("", "bash", "console", "sh"):
                yield from ((name, line) for line in _lines(body))
        for code in re.findall(r"(?<!`)`(gigatrain [^`]+)`", HOOKS.prose(TEXT[name], lambda part: part)):
            yield from ((name, one) for one in _variants(code.replace("\\|", "|")))
    for name, command in MADE.parsers().items():
        yield from ((f"{name} --help", line) for line in _lines(command.description or ""))


def _lines(body):
    for line in re.sub(r"\s*\\\n\s*", " ", body).split("\n"):
        told = re.split(r"\s{2,}|\s#", re.sub(r"^\s*(\$ )?", "", line), maxsplit=1)[0]
        for part in re.split(r"\s[;|>](?:\s|$)", told):
            if COMMAND.search(part) and re.match(r"([A-Z_]+=\S+ )*(sudo -E |srun \S+ |\S*torchrun .* -- |\S*/)?gigatrain ", part.strip()):
                yield part.strip()


def _variants(code):
    """`a [--b | --c]`, as it is written in prose, is `a --b` and `a --c`."""
    groups = [group.split(" | ") for group in re.findall(r"\[([^\]]*)\]", code)]
    for index in range(max((len(group) for group in groups), default=1)):
        chosen = iter(groups)

        def take(_, chosen=chosen, index=index):
            group = next(chosen)
            return group[min(index, len(group) - 1)]

        yield re.split(r"\s[;|>](?:\s|$)", re.sub(r"\[([^\]]*)\]", take, code))[0]


def _words(command):
    """What follows `gigatrain`, with placeholders filled in: one capital is a number, … a word, HH:MM:SS a time; longer ones (RECIPE, RUN) stay."""
    match = COMMAND.search(command)
    assert match is not None
    filled = {"HH:MM:SS": "01:00:00", "…": "WORD"}
    return ["1" if re.fullmatch("[A-Z]", word) else filled.get(word, word.rstrip("…")) for word in shlex.split(match["rest"])]


SHOWN = sorted(set(shown()))


def test_there_are_commands_to_check():
    assert len(SHOWN) > 150
    assert {name for name, _ in SHOWN} >= {
        "README.md",
        "docs/howto/slurm.md",
        "docs/howto/fine-tune.md",
        "ENGINES.md",
        "gigatrain plan --help",
    }


@pytest.mark.parametrize("page", sorted({name for name, _ in SHOWN}))
def test_every_command_shown_is_one_that_can_be_typed(page, capsys):
    groups = {" ".join(name.split()[: count + 1]) for name in MADE.parsers() for count in range(1, 3)}
    wrong = []
    for command in (command for name, command in SHOWN if name == page):
        words = _words(command)
        if words[0] == "COMMAND" or " ".join(["gigatrain", *words]) in groups:
            continue  # of any command, or the name of one
        try:
            options = parser.build().parse_args(words)
        except SystemExit as ended:
            said = capsys.readouterr().err.strip().splitlines()
            wrong += [f"{command}\n    {said[-1]}"] if ended.code else []
            continue
        refused = any(command == one for _, one, _ in told())  # and shown to be
        wrong += [] if refused else [f"{command}\n    {problem}" for problem in _meant(options)]
    assert not wrong, "\n".join(wrong)


def read_only():
    """Words of every command shown that needs nothing but what is shipped, and changes nothing but a folder of its own; no refusal that is shown to be one."""
    for command in sorted({command for _, command in SHOWN} - {command for _, command, _ in told()}):
        words = _words(command)
        free = any(word.isupper() or word.endswith((".toml", ".json", ".html")) for word in words[1:] if not word.startswith("-"))
        elsewhere = {"--dry-run", "--top", "--report", "--decide", "--predict", "--calibrate"} & {*words}
        listed = words[0] == "recipes" and words[1:2] != ["from-hub"] and not any(word.isupper() for word in words)
        if listed or (not free and (words[0] in ("sites", "schema") or (words[0] == "plan" and len(words) > 1 and not elsewhere))):
            yield tuple(words)


def test_the_commands_shown_that_only_read_do_what_they_say(tmp_path, monkeypatch, capsys):
    """In this process, from a folder of their own. A model's page has one of each kind; the kinds are run of a third of the models, which differ by day."""
    monkeypatch.chdir(tmp_path)
    wanted, failed = sorted({*read_only()}), []
    pages = sorted(load.shipped("recipes").glob("*/model.toml"))
    day = datetime.datetime.now(datetime.UTC).toordinal()
    left = {path.parent.name for index, path in enumerate(pages) if index % 3 != day % 3}
    print(f"day {day}")
    for words in wanted:
        if len(words) > 2 and words[0] != "recipes" and words[1].partition("/")[0] in left:
            continue
        own = [str(tmp_path / f"{len(list(tmp_path.iterdir()))}.toml")] if words[:2] == ("recipes", "copy") else [*words[3:]]
        try:
            cli.main([*words[:3], *own])
        except SystemExit as ended:
            if ended.code:
                failed.append(f"gigatrain {' '.join(words)}: {ended.code}: {capsys.readouterr().err.strip()[-300:]}")
    assert ("recipes", "search", "french", "sft") in wanted
    assert len(wanted) > 70
    assert not failed, "\n".join(failed)


def _meant(options):
    """What argparse does not see: recipes, sites and keys that are not there, values that a key cannot have."""
    if isinstance(words := getattr(options, "words", None), list):
        try:
            shelf.searched(words)
        except errors.RecipeError as failure:
            yield str(failure)
    recipe = getattr(options, "recipe", None) or "quickstart"
    shipped = recipe.removesuffix("-tiny") in load.known()
    if not (shipped or recipe.isupper() or recipe.endswith((".toml", ".json"))):
        yield f"no shipped recipe is called {recipe}"
    site = getattr(options, "site", None)
    if site and not (site in load.sites() or site.isupper() or site == "1" or site.endswith(".toml")):
        yield f"no shipped site is called {site}"
    sets = [one for one in getattr(options, "set", []) if not one.lower().endswith("key=value")]
    sweep = getattr(options, "sweep", None)
    for one in (*sets, *(sweep if isinstance(sweep, list) else ())):
        if not known(one.split("=")[0], "recipe"):
            yield f"no recipe has the key {one.split('=')[0]}"
    if sets and "key" not in sets[0]:
        try:
            load.recipe(recipe if shipped else "quickstart", sets)
        except errors.GigatrainError as failure:
            yield str(failure)


# Keys.


def known(key, of):
    """Whether a recipe or site has it, list entries with or without their index."""
    plain = re.sub(r"\.\d+(?=\.|$)", "", key)
    return plain in KEYS[of] or plain.startswith(FREE)


def _leaves(tree, path=""):
    for name, value in tree.items():
        at = f"{path}.{name}".lstrip(".")
        inner = value if isinstance(value, list) else [value]
        if isinstance(value, dict | list) and all(isinstance(one, dict) for one in inner):
            yield from itertools.chain(*(_leaves(one, at) for one in inner))
            yield at
        else:
            yield at


@pytest.mark.parametrize("page", [name for name in TODAY if "```toml" in TEXT[name]])
def test_every_table_shown_is_of_a_recipe_or_a_site(page, tmp_path):
    for language, body in FENCE.findall(TEXT[page]):
        if language != "toml":
            continue
        tree = tomllib.loads(body)
        figures = r"\.(value|basis|source)$"
        unknown = {
            "recipe": [key for key in _leaves(tree) if not known(key, "recipe")],
            "site": [key for key in _leaves(tree) if not known(re.sub(figures, "", key), "site")],
        }
        assert not min(unknown.values(), key=len), f"{page}:\n{body}"
        path = tmp_path / "shown.toml"
        path.write_text(body, encoding="utf-8")
        if {"name", "model", "data", "train", "optim"} <= set(tree):
            load.recipe(path)
        elif {"name", "summary", "device"} <= set(tree):
            load.site(path)


def test_every_key_named_within_a_line_exists_and_takes_the_value_that_is_named():
    sections = {key.split(".")[0] for of in KEYS for key in KEYS[of]}
    files = (".toml", ".json", ".jsonl", ".py", ".md", ".html", ".csv", ".sh", ".png", ".sha256", ".txt")
    seen, wrong = 0, []
    for name in (name for name in TODAY if name != "CONTRIBUTING.md"):  # which speaks of the code
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", TEXT[name]):
            match = re.fullmatch(r"(?P<key>[a-z_0-9]+(?:\.[a-z_0-9]+)+)(?: = (?P<value>.+))?", code)
            if not match or match["key"].split(".")[0] not in sections or match["key"].endswith(files):
                continue
            seen += 1
            of = next((of for of in KEYS if known(match["key"], of)), None)
            if of is None:
                wrong.append(f"{name}: {code}")
            elif match["value"] and re.search(r"[\w\]}\"']$", match["value"]) and KEYS[of].get(match["key"]):
                try:
                    value = tomllib.loads(f"value = {'1' if re.fullmatch('[A-Z]', match['value']) else match['value']}")["value"]
                except tomllib.TOMLDecodeError as failure:
                    wrong.append(f"{name}: {code}: {failure}")
                    continue
                schema = KEYS[of][match["key"]] | {"$defs": TABLES[of]}
                problem = next(jsonschema.Draft202012Validator(schema).iter_errors(value), None)
                wrong += [f"{name}: {code}: {problem.message}"] if problem else []
    assert seen > 80
    assert not wrong, "\n".join(wrong)


# Links.


def _headings(text):
    plain = HOOKS._FENCE.sub("", text)
    return [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", match) for match in re.findall(r"^#{1,6} +(.+?) *$", plain, re.MULTILINE)]


def _repository_anchors(text):
    """As GitHub makes them of headings."""
    found = []
    for heading in _headings(text):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return {*found, *re.findall(r'id="([^"]+)"', text)}


def _site_anchors(text):
    """As Python-Markdown makes them, and those that are given."""
    found = set(re.findall(r'id="([^"]+)"', text)) | set(re.findall(r"\{ #(\S+) \}", text))
    for heading in _headings(text):
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def _links(text):
    found = []
    HOOKS.prose(
        text, lambda part: found.extend(match["target"] for match in HOOKS.LINK.finditer(re.sub(r"(?<!\[)`[^`\n]*`", "``", part))) or part
    )
    return [link for link in found if not re.match("[a-z]+:", link)]


@pytest.mark.parametrize("page", SOURCES)
def test_every_link_leads_somewhere_in_the_repository(page):
    for link in _links(TEXT[page]):
        path, anchor = HOOKS.target(page, link)
        assert (ROOT / path).exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in _repository_anchors((ROOT / path).read_text(encoding="utf-8")), f"{page} links to {link}"


def test_every_link_leads_somewhere_on_the_site_and_every_page_is_in_its_menu():
    pages, copied = HOOKS.pages()
    there = set(pages) | {f"files/{name}" for name in copied}
    anchors = {name: _site_anchors(text) for name, text in pages.items()}
    seen = 0
    for page, text in pages.items():
        for link in _links(text):
            path, _, anchor = link.partition("#")
            place = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
            assert place in there, f"{page} links to {link}"
            assert not anchor or anchor in anchors[place], f"{page} links to {link}"
            seen += 1
    assert seen > 120
    assert all((ROOT / name).is_file() for name in copied)
    menu = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(menu) == sorted(name for name in pages if not name.startswith("recipes/"))


def test_links_and_names_are_turned_to_the_places_of_the_site():
    copied: set[str] = set()
    text = "[a](../../POWER.md#definition) [b](../reference/index.md#recipe) [c](../../launch/torchrun.sh) [d](../../tests) [e](https://x.eu) `[f](g.md)`"
    turned = HOOKS.site_links("docs/howto/slurm.md", text, copied)
    assert (
        turned == "[a](../power.md#definition) [b](../reference/recipe.md) [c](../files/launch/torchrun.sh) d [e](https://x.eu) `[f](g.md)`"
    )
    assert copied == {"launch/torchrun.sh"}
    places = {"train.steps": "reference/recipe.md#train.steps"}
    named = HOOKS.named(
        "howto/slurm.md", "# `train.steps`\nPOWER.md: `train.steps = 4`, [`train.steps`](x.md)\n```\n`train.steps`\n```", places
    )
    assert named == (
        "# `train.steps`\n[POWER.md](../power.md): [`train.steps = 4`](../reference/recipe.md#train.steps), [`train.steps`](x.md)\n```\n`train.steps`\n```"
    )
    assert HOOKS.lists("Two:\n- a\n- b\n  c\n") == "Two:\n\n- a\n- b\n  c\n"


# Messages.


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GigatrainError)]
CODES = {0, errors.REQUEUE, restart.NO_PROGRESS, *(kind.exit_code for kind in KINDS)}


def told():
    """(page, command, what it is shown to print) of every command that is shown with a refusal."""
    for name in TODAY:
        for _, body in FENCE.findall(TEXT[name]):
            for command, said in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)+)", body, re.MULTILINE):
                if said.startswith("gigatrain: "):
                    yield name, command, said


@pytest.mark.parametrize(("page", "command", "said"), list(told()))
def test_messages_shown_are_those_that_are_printed(page, command, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(_words(command))
    assert ended.value.code in {kind.exit_code for kind in KINDS}
    before = TEXT[page].partition(f"$ {command}\n")[0].rpartition("```")[0].rstrip().rpartition("\n\n")[2]
    if shown := re.search(r"\((?:code )?(\d+)\):", before):  # the sentence above it
        assert ended.value.code == int(shown[1]), f"{page}: {before}"
    printed = " ".join(capsys.readouterr().err.replace(f"{ROOT}/", "").split())
    pattern = r".*".join(re.escape(part) for part in " ".join(said.split()).split("…"))
    assert re.fullmatch(pattern, printed), f"{page}: {command} printed\n{printed}"


def test_there_are_messages_to_check():
    assert len(list(told())) >= 8


def test_every_exit_code_named_is_one_that_a_process_leaves_with():
    pattern = re.compile(
        r"\b(?:code|codes|left with|leaves with|leave with) \[?(\d+)\b|^\| [^|]*\((\d)\) \||^\| (\d+) (?:\||from)", re.MULTILINE
    )
    found = {(name, int(next(filter(None, match.groups())))) for name in TODAY for match in pattern.finditer(TEXT[name])}
    assert {("docs/howto/failures.md", code) for code in (2, 7, 9, errors.REQUEUE, restart.NO_PROGRESS)} <= found
    assert ("docs/howto/move.md", errors.REQUEUE) in found
    known = {name: code for name, code in found if code not in CODES}
    assert not known


# What may change within a run.

QUICK = ("train.steps=20", "checkpoint.every=10")
CHANGES = {  # row of docs/howto/resume.md's table, by its first words -> what makes such a change
    "ranks, mesh": ("train.nproc=2", "train.microbatch=2", "sample.temperature=0.5", "report.every=7"),
    "site, device": ("kernels=reference", "train.recompute=full", "train.compile=true"),
    "precision, forms": ("train.precision=fp32", "optim.moments=bf16", "optim.master=bf16+8", "numerics.action=rollback"),
    "what lies": ("train.steps=40", "schedule.kind=linear", "schedule.warmup=3"),
    "anything else": ("train.seed=9", "data.validation=0.2", "train.batch=16", "optim.lr=1e-4", "loss.z_loss=1e-4"),
}


def _planned(*overrides):
    return plan(load.recipe("quickstart", [*QUICK, *overrides]), load.site("laptop"))


def test_the_one_table_of_what_may_change_is_the_one_that_resumes_obey():
    page = TEXT["docs/howto/resume.md"]
    rows = re.findall(r"^\| (?!what changes|-)([^|]+) \| ([^|]+) \|$", page, re.MULTILINE)
    assert len(rows) == len(CHANGES)
    before = _planned()
    for (changed, outcome), (first, overrides) in zip(rows, CHANGES.items(), strict=True):
        assert changed.startswith(first)
        for override in overrides:
            found = legs.changes(before, _planned(override))
            assert before.sha256 != _planned(override).sha256, override
            assert bool(found.meaning) == ("is refused" in outcome), override
            assert bool(found.numbers) == ("--other-numbers" in outcome), override
            assert found.numbers or bool(found.arithmetic) == ("the same formulas" in outcome), override
    assert not [name for name in TODAY if name != "docs/howto/resume.md" and "| what changes |" in TEXT[name]], "one table"


def test_the_refusal_shown_of_other_numbers_is_the_one_that_is_printed():
    page = TEXT["docs/howto/resume.md"]
    steps = ("train.steps=40", "schedule.kind=linear")
    with pytest.raises(errors.CheckpointError) as refused:
        legs.agree(Path("runs/longer"), _planned(), _planned(*steps), other_numbers=False)
    shown = " ".join(next(body for _, body in FENCE.findall(page) if body.startswith("gigatrain: ")).split())
    assert shown == " ".join(f"gigatrain: {refused.value}".split())
    assert legs.agree(Path("runs/longer"), _planned(), _planned(*steps), other_numbers=True).numbers


# Figures.


def test_what_was_not_measured_on_a_gpu_is_said_so():
    """The figures themselves are held to their rows by tests/test_benchmarks_figures.py."""
    with (ROOT / "benchmarks" / "results" / "tune.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    measured = any("cuda" in row["device"].lower() or "NVIDIA" in row["device"] for row in rows)
    assert ("Not measured on a GPU" in TEXT["docs/peers.md"]) is not measured


def test_every_benchmark_is_named_by_a_page():
    named = " ".join(text for name, text in TEXT.items() if name != "benchmarks/LOG.md")
    for name in ("tune.py", "answers.py", "step.py", "gpu.py"):
        assert f"benchmarks/{name}" in named


# The reference.


def test_the_reference_has_every_key_command_code_metric_site_model_and_kernel(tmp_path):
    written = {path.name: path.read_text(encoding="utf-8") for path in MADE.write(tmp_path)}
    for of, there in KEYS.items():
        missing = [key for key in there if f'id="{key}"' not in written[f"{of}.md"] and f"{{ #{key} }}" not in written[f"{of}.md"]]
        assert not missing
    assert len(KEYS["recipe"]) > 200
    assert all(f"\n## {name}\n" in written["commands.md"] for name in MADE.parsers())
    assert {"gigatrain train", "gigatrain bench power", "gigatrain data build", "gigatrain job after"} <= set(MADE.parsers())
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GigatrainError)]
    assert all(
        f"\n| {kind.exit_code} | `{kind.__name__}` |" in written["exit-codes.md"] for kind in kinds if kind is not errors.GigatrainError
    )
    assert all(f"\n| {code} |" in written["exit-codes.md"] for code in (0, 75, 93))
    assert all(f"`gigatrain_{name}`" in written["metrics.md"] for name, _, _ in prometheus.METRICS)
    assert all(f"| `{name}` |" in written["sites.md"] for name in load.sites())
    assert all(f"`{name.partition('/')[0]}`" in written["models.md"] for name in load.known())
    assert "| `llama-3.1-8b` | llama | 8,030,261,248 |" in written["models.md"]
    from gigatrain.kernels import ops

    assert all(f"| `{name}`" in written["kernels.md"] for name in ops.OPERATIONS)
    for name, text in written.items():  # every row of a table has its columns: a bar within a cell is escaped
        tables = re.findall(r"(?:^\|.*\n)+", HOOKS._FENCE.sub("", text), re.MULTILINE)
        assert all(len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1 for table in tables), name


def test_every_key_says_what_it_does():
    silent = [f"{of}: {key}" for of, there in KEYS.items() for key, schema in there.items() if schema and not schema.get("description")]
    tables = [f"{of}: {one.path}" for of in KEYS for one in MADE.sections(of) if not one.text]
    assert not [*silent, *tables], "give it a Field(description=...), a class a docstring: the reference is made of them"


def test_a_keys_row_tells_its_type_limits_and_default():
    made = MADE.reference()
    page = made["reference/recipe.md"]
    assert '| <span id="optim.lr">`lr`</span> | number, above 0 | required |' in page
    assert '| <span id="train.precision">`precision`</span> | `"bf16"`, `"fp32"`, `"fp8"` | `"bf16"` |' in page
    assert '| <span id="recovery.restarts">`restarts`</span> | integer, at least 0, at most 1,000 | `3` |' in page
    assert '| <span id="checkpoint.every">`every`</span> | integer, at least 1 or `"auto"` | `500` |' in page
    assert "## `[[data.sources]]` { #data.sources }" in page
    site = made["reference/site.md"]
    assert '| <span id="power.pue">`pue`</span> | figure or `"unknown"` | unknown |' in site


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the site is built by mkdocs and mkdocs-material (pip install 'gigatrain[docs]')")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "WARNING" not in ended.stderr
    assert (tmp_path / "site" / "reference" / "recipe" / "index.html").is_file()
    found = json.loads((tmp_path / "site" / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any(
        "train.microbatch" in doc["text"] or "microbatch" in doc["text"]
        for doc in found["docs"]
        if doc["location"].startswith("reference/recipe")
    )
    assert not any("fonts.googleapis" in path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html"))
