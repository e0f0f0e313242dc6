"""No file that we open runs anything, and none brings more than a typed error: planted payloads, and seeded mutations of every kind of file of a run.

`HOSTILE_MUTATIONS=500 pytest tests/test_hostile.py` is the long form.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import training

from gigatrain import config, generate, load, run
from gigatrain.data import sources, tokenizer
from gigatrain.data.corpus import Corpus
from gigatrain.errors import GigatrainError
from gigatrain.launching import hosts, job, pilots, restart
from gigatrain.models import hf
from gigatrain.observe import failed, trace, watch
from gigatrain.observe.report import report
from gigatrain.planning import calibrate
from gigatrain.power import account, restore
from gigatrain.power.schedule import Schedule
from gigatrain.preflight import verdict

MUTATIONS = int(os.environ.get("HOSTILE_MUTATIONS", "6"))


class Planted:
    """Unpickled, it makes the canary's file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def payloads(canary: Path) -> dict[str, bytes]:
    python = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:  # as torch.save writes them; and a bomb
        file.writestr("archive/data.pkl", pickle.dumps(Planted(canary)))
        file.writestr("archive/data/0", b"\0" * 10_000_000)
    return {
        "pickle": pickle.dumps(Planted(canary)),
        "torch": archive.getvalue(),
        "python": python.encode(),
        "yaml": f"!!python/object/apply:os.system ['touch {canary}']\n".encode(),
        "jinja": json.dumps({"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}", "eos_token": python}).encode(),
        "shell": f"$(touch {canary}) `touch {canary}`; touch {canary} #\n".encode(),
        "traversal": json.dumps(
            {"files": {"../../../../etc/passwd": {"bytes": 1, "sha256": "0"}}, "weight_map": {"x": "/etc/passwd"}}
        ).encode(),
        "deep": b"[" * 200_000,
        "deep table": b'{"a":' * 100_000,
        "numbers": b'{"step": NaN, "format": 1e999, "id": ' + b"9" * 5_000 + b"}",
        "terminal": b'{"name": "\\u001b]0;owned\\u0007\\u001b[2J", "id": "\\u001b[31m"}',
        "zeros": b"\0" * 4096,
        "gzip": gzip.compress(b"\0" * 5_000_000),
        "empty": b"",
    }


@pytest.fixture(scope="module")
def specimen(tiny, tmp_path_factory) -> Path:
    """A run's folder with one of each file that a run, a job and their tools leave."""
    folder = tmp_path_factory.mktemp("specimen") / "run"
    command = [one for one in training(tiny, folder, "train.steps=6", "export=true") if one not in ("export=false",)]
    command = [
        one for index, one in enumerate(command) if not (one == "--set" and index + 1 < len(command) and command[index + 1] == "--set")
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    for event in (
        {"event": "submitted"},
        {"event": "started", "attempt": 0, "step": -1},
        {"event": "judged", "attempt": 0, "step": 3, "verdict": "again"},
    ):
        job.record(folder, event.pop("event"), job="1", **event)
    errors = folder / "logs" / "attempt-000" / "errors"
    said = {
        "time_s": 1.0,
        "monotonic_s": 1.0,
        "rank": 0,
        "ranks": 1,
        "node": "n",
        "step": 1,
        "phase": "rest",
        "type": "RunError",
        "message": "m",
    }
    (errors / "rank-00000.json").write_text(json.dumps(said | {"traceback": "t", "ours": False, "secondary": False, "transient": False}))
    (folder / "launch" / "job.json").write_text('{"format": 1, "name": "x"}')
    return folder


def readers(folder: Path) -> dict[str, tuple[Callable[[], object], ...]]:
    """File of a run's folder -> all that reads it, as the commands do."""

    def checkpoints() -> None:
        run.checkpoints(folder).latest()

    def watched() -> None:
        for as_json in (True, False):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                watch.watch(folder, once=not as_json, as_json=as_json)
            assert not re.search("\x1b[^\\[]|\x1b\\[2J|\x07", out.getvalue()), "a control sequence of a file's reaches the terminal"

    def reported() -> None:
        page = folder.parent / "page.html"
        report([folder], str(page), say=lambda _: None)

    def model() -> None:
        load.architecture(config.Model.model_validate({"from": str(folder / "export")}))

    def weights() -> None:
        files = hf._files(folder / "export")
        assert all(path.parent == folder / "export" for path in files.values()), "a file outside of the model's folder"

    step = "checkpoints/step-00000006"
    return {
        "run.json": (
            lambda: run.identity(folder),
            lambda: run.stored_plan(folder),
            lambda: run.newest(folder.parent, "tiny"),
            checkpoints,
            watched,
            reported,
        ),
        "plan.json": (lambda: run.stored_plan(folder), watched, reported),
        "metrics.jsonl": (watched, reported),
        "summary.json": (watched, reported),
        "energy.jsonl": (lambda: account.account(folder), watched, reported),
        "logs/progress.jsonl": (watched, reported),
        "logs/attempt-000/errors/rank-00000.json": (lambda: failed.failures(folder), lambda: restart.failure(folder, 0), watched, reported),
        "trace/rank-00000.jsonl": (lambda: trace.read(folder), reported),
        "launch/history.jsonl": (lambda: job.history(folder), watched, reported),
        "launch/job.json": (lambda: job.load(folder),),
        "export/config.json": (lambda: load.config_json(str(folder / "export")), lambda: hf.read_config(folder / "export"), model),
        "export/model.safetensors": (weights,),
        "export/model.safetensors.index.json": (weights,),
        "tokenizer/tokenizer.json": (lambda: tokenizer.load(str(folder / "tokenizer")),),
        "tokenizer/tokenizer_config.json": (lambda: tokenizer.load(str(folder / "tokenizer")),),
        f"{step}/manifest.json": (checkpoints,),
        f"{step}/COMMITTED": (checkpoints, lambda: restart.committed(folder)),
        f"{step}/state.json": (checkpoints,),
        f"{step}/weights-00000.safetensors": (checkpoints,),
    }


def others(path: Path) -> tuple[Callable[[], object], ...]:
    """What reads a file that a user names."""
    return (
        lambda: load.recipe(path), lambda: load.site(path), lambda: Schedule.read(path), lambda: calibrate.read(path), lambda: hosts.read(path),
        lambda: verdict.read(path), lambda: restart.excluded_nodes(path), lambda: tokenizer.load(str(path)), lambda: pilots.timed(path.parent),
        lambda: Corpus.open(path.parent), lambda: restore_of(path),
    )  # fmt: skip


def restore_of(path: Path) -> object:
    """A power limit's record, which whoever reads it refuses by a ValueError."""
    record = Path(restore.path_of(str(path.parent), "GPU-1"))
    record.write_bytes(path.read_bytes())
    record.chmod(0o600)
    with contextlib.suppress(ValueError):
        return restore.read(str(path.parent), "GPU-1")
    return None


def documents(path: Path, kind: str) -> Iterator[sources.Raw]:
    source = config.Source.model_validate({"kind": kind, "path": str(path)})
    for part in sources.parts(0, source, 1 << 20):
        yield from sources.read(source, part)


def refused(read: Callable[[], object], what: str) -> None:
    """It gives an answer or a typed error of one screen."""
    said = ""
    try:
        read()
    except GigatrainError as failure:
        said = str(failure)
    except Exception as failure:
        raise AssertionError(f"{what}: {type(failure).__name__}: {str(failure)[:300]}") from failure
    if len(said) > 20_000:
        raise AssertionError(f"{what}: a message of {len(said)} characters")


# Every commit sees one payload of each family in every file, `make long` the others.
KINDS = pytest.mark.parametrize(
    "kinds",
    [
        ("pickle", "python", "deep table", "terminal"),
        pytest.param(("torch", "yaml", "jinja", "shell", "traversal", "deep", "numbers", "zeros", "gzip", "empty"), marks=pytest.mark.long),
    ],
    ids=("some", "others"),
)


def some(kinds: tuple[str, ...], canary: Path) -> dict[str, bytes]:
    return {kind: data for kind, data in payloads(canary).items() if kind in kinds}


def test_no_payload_is_forgotten(tmp_path):
    assert sorted(kind for mark in KINDS.args[1] for kind in (mark.values[0] if hasattr(mark, "values") else mark)) == sorted(
        payloads(tmp_path)
    )


@KINDS
def test_a_payload_in_any_file_of_a_run_runs_nothing(specimen, tmp_path, kinds):
    folder, canary = tmp_path / "run", tmp_path / "canary"
    shutil.copytree(specimen, folder)
    for name, reads in readers(folder).items():
        good = (folder / name).read_bytes() if (folder / name).exists() else None
        for kind, data in some(kinds, canary).items():
            (folder / name).write_bytes(data)
            for read in reads:
                refused(read, f"{kind} in {name}")
        (folder / name).unlink() if good is None else (folder / name).write_bytes(good)
    assert not canary.exists()


@KINDS
def test_a_payload_in_a_file_that_a_user_names_runs_nothing(tmp_path, kinds):
    canary = tmp_path / "canary"
    for kind, data in some(kinds, canary).items():
        for name in ("recipe.toml", "recipe.json", "schedule.csv", "pilots.json", "manifest.json", "hosts"):
            folder = tmp_path / f"{kind}-{name}"
            folder.mkdir()
            (folder / name).write_bytes(data)
            for read in others(folder / name):
                refused(read, f"{kind} in {name}")
        for name, source in (
            ("a.txt", "text"),
            ("a.jsonl", "jsonl"),
            ("a.jsonl.gz", "jsonl"),
            ("a.jsonl.zst", "jsonl"),
            ("a.parquet", "parquet"),
        ):
            path = tmp_path / f"{kind}-{name}" / name
            path.parent.mkdir()
            path.write_bytes(data)
            refused(lambda path=path, source=source: [one.bad for one in documents(path, source)], f"{kind} in {name}")
    assert not canary.exists()


def test_code_beside_a_model_never_runs(specimen, tmp_path):
    """auto_map names a class of the folder's own: transformers would import it, if it were allowed to."""
    canary = tmp_path / "canary"
    for broken in ("config.json", "tokenizer_config.json"):
        folder = tmp_path / broken
        shutil.copytree(specimen / "export", folder)
        (folder / "modeling_evil.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass Evil: pass\n")
        said = json.loads((folder / broken).read_text())
        said |= {"model_type": "evil"} if broken == "config.json" else {"tokenizer_class": "Evil"}
        auto = {
            "AutoConfig": "modeling_evil.Evil",
            "AutoModelForCausalLM": "modeling_evil.Evil",
            "AutoTokenizer": ["modeling_evil.Evil", "modeling_evil.Evil"],
        }
        (folder / broken).write_text(json.dumps(said | {"auto_map": auto}))
        with contextlib.suppress(GigatrainError):
            generate.generate(folder, "def", tokens=1, temperature=0.0, top_k=1, seed=1, device="cpu")
        with contextlib.suppress(GigatrainError):
            from gigatrain.models.autonumbers import numbers

            load.architecture(config.Model.model_validate({"from": str(folder)}), numbers)
        with contextlib.suppress(GigatrainError):
            tokenizer.load(str(folder))
    assert not canary.exists()
    with pytest.raises(GigatrainError, match="which gigatrain never runs"):
        load.architecture(config.Model.model_validate({"from": str(tmp_path / "config.json")}), numbers)


def test_a_data_sets_own_script_never_runs(tmp_path):
    canary, folder = tmp_path / "canary", tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n")
    refused(lambda: list(documents(folder, "hub")), "a script")
    assert not canary.exists()


def test_a_megatron_index_that_lies_is_refused(tmp_path):
    chance = random.Random(5)
    (tmp_path / "a.bin").write_bytes(b"\1\0" * 100)
    for _ in range(10 * MUTATIONS):
        (tmp_path / "a.idx").write_bytes(b"MMIDIDX\0\0" + chance.randbytes(chance.randrange(200)))
        refused(lambda: list(documents(tmp_path / "a", "megatron")), "an index")


WILD = (
    None,
    [],
    {},
    -1,
    10**30,
    1.5,
    "x",
    "../../x",
    "/etc/passwd",
    "\x1b[2J",
    True,
    [[]],
    {"a": 1},
    float("nan"),
    float("inf"),
    0,
    "9" * 100,
)
BYTES = (
    b"\x80\x04\x95",
    b"null",
    b"[]",
    b"NaN",
    b"1e999",
    b"[" * 50_000,
    b"\0",
    b"\xff\xfe",
    b"\x1b]0;x\x07",
    b"true",
    b'"x"',
    b"Infinity",
)


def mutated(data: bytes, chance: random.Random) -> bytes:
    kind, at = chance.randrange(6), chance.randrange(len(data) + 1)
    if kind == 0 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + data[at + chance.randrange(1, 200) :]
    if kind == 2:
        return data[:at] + chance.choice(BYTES) + data[at:]
    if kind == 3:
        return data[:at]
    return restructured(data, chance)


def restructured(data: bytes, chance: random.Random) -> bytes:
    """One value of a JSON text, or of a line of one, is another."""
    try:
        lines = [
            json.loads(line) for line in ([data] if data[:1] == b"{" and data.count(b"\n{") == 0 else data.splitlines()) if line.strip()
        ]
    except ValueError:
        return data
    if not lines:
        return data
    number = chance.randrange(len(lines))
    parent, key = lines, number
    for _ in range(chance.randrange(5)):
        node = parent[key]
        if not isinstance(node, dict | list) or not node:
            break
        parent, key = node, chance.choice(list(node)) if isinstance(node, dict) else chance.randrange(len(node))
    parent[key] = chance.choice(WILD)
    return "\n".join(json.dumps(line) for line in lines).encode()


@pytest.mark.long
def test_mutations_bring_typed_errors_only(specimen, tmp_path):
    folder, seed = tmp_path / "run", 7
    chance = random.Random(seed)
    shutil.copytree(specimen, folder)
    for name, reads in readers(folder).items():
        if not (folder / name).exists():
            continue
        good = (folder / name).read_bytes()
        for number in range(MUTATIONS):
            data = mutated(good, chance)
            (folder / name).write_bytes(data)
            for read in reads:
                refused(read, f"seed {seed}, mutation {number} of {name}: {data[:200]!r}")
        (folder / name).write_bytes(good)


SECRET = "CANARY-5ecret-"


@pytest.mark.long
def test_no_secret_of_the_environment_or_the_arguments_is_written_anywhere(tiny, tmp_path):
    """train, a failure with a traceback, report, watch, doctor, launch: every byte that they write or print is searched."""
    names = (
        "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
        "GIGATRAIN_REDFISH_PASSWORD", "SLURM_JWT", "MY_TOKEN",
    )  # fmt: skip
    planted = dict.fromkeys(names, "x") | {"SSH_PRIVATE_KEY": "-----BEGIN OPENSSH PRIVATE KEY-----\n", "DATABASE_URL": "postgres://user:"}
    environment = (
        os.environ | {name: f"{kind}{SECRET}{number}" for number, (name, kind) in enumerate(planted.items())} | {"HOME": str(tmp_path)}
    )
    environment["GIGATRAIN_TOKEN"] = f"{SECRET}and-long-enough-to-be-a-strong-one-0123456789"
    said = []
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tiny.read_text())

    def command(*words: object, code: int) -> None:
        ended = subprocess.run(
            [sys.executable, "-m", "gigatrain", *map(str, words)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        said.append(ended.stdout + ended.stderr)
        assert ended.returncode == code, said[-1]

    steps = ("--set", "train.steps=4", "--set", "export=false")
    command("train", recipe, "--run", "a", *steps, "--set", "report.prometheus=19731", code=0)
    command(
        "train", recipe, "--run", "b", *steps, "--set", "optim.lr=1e30", "--set", "train.max_bad_steps=1", "--set", "train.nproc=2", code=7
    )
    for key in ('data.sources=[{kind="hub",path="URL"}]', 'model.from="URL"'):
        command("train", recipe, "--run", "c", "--set", key.replace("URL", f"https://me:{SECRET}url@example.org/x"), code=2)
    command("report", "a", "b", "--out", "page.html", code=0)
    command("watch", "a", "--json", code=0)
    command("doctor", "--json", code=0)
    (tmp_path / "queue.toml").write_text(
        'name = "queue"\nsummary = "s"\ndevice = "cpu"\n[node]\nranks = 2\n[scheduler]\nkind = "slurm"\npartition = "p"\n'
    )
    command("launch", recipe, "--site", "queue.toml", "--nodes", 1, "--run", "d", "--dry-run", code=0)
    assert not [text for text in said if SECRET in text]
    written = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert written == []
    assert len(list(tmp_path.rglob("*"))) > 30
