"""Who may import whom: only downwards, with absolute names, and heavy packages only where they belong."""

import ast
import functools
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gigatrain"
# Lowest first; a module may import its own level and those below, with the exceptions that follow.
LEVELS = [
    ["errors"],
    ["architectures", "catalog", "floors", "foreign", "installed", "leaving", "published", "twin"],
    ["config"],
    ["site"],
    ["load", "planning"],
    ["shelf"],
    ["launching", "recovery"],
    ["power"],
    ["kernels", "data", "parallel"],
    ["models", "optim", "tune"],
    ["objectives"],
    ["engines", "observe", "checkpoint", "bench", "preflight"],
    ["run", "feed", "restore", "validation"],
    ["export", "exporting", "importing", "teaching"],
    ["generate", "evaluate"],
    ["loop", "summary"],
    ["cli"],
    ["__init__", "__main__"],
]
ONLY = {"kernels": {"errors", "kernels"}, "data": {"errors", "config", "data"}}  # can be lifted out and used alone
NOT = {"models": {"parallel", "data", "engines"}}
TORCH_FREE = {
    "errors",
    "architectures",
    "catalog",
    "published",
    "twin",
    "floors",
    "foreign",
    "installed",
    "leaving",
    "config",
    "site",
    "load",
    "shelf",
    "planning",
    "launching",
    "recovery",
    "power",
    "cli",
    "__init__",
    "__main__",
}
HOMES = {
    "deepspeed": {"engines.deepspeed"},
    "datasets": {"data.sources"},
    "transformers": {
        "generate",
        "exporting.generation",
        "exporting.readers",
        "models.automodel",
        "models.autonumbers",
        "models.autoweights",
        "bench.peers",
    },
    "accelerate": {"observe.metrics"},
    "lm_eval": {"evaluate.tasks"},
    "matplotlib": {"bench.report", "bench.chart", "observe.report.plots"},
    **{peer: {"bench.peers"} for peer in ("liger_kernel", "cut_cross_entropy", "flashoptim", "quack")},
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"), path


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


@functools.cache
def imports(path, *, top=False):
    """(module, inside a function) of every import; with `top` those that run at import time."""
    return list(_imports(parsed(path), top))


def _imports(tree, top):
    lazy = {
        id(node)
        for scope in ast.walk(tree)
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(scope, ast.If) and "TYPE_CHECKING" in ast.dump(scope.test))
        for node in ast.walk(scope)
    }
    for node in ast.walk(tree):
        if top and id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield base, node.level
            if base == "gigatrain":
                yield from ((f"gigatrain.{alias.name}", node.level) for alias in node.names)


def level(name):
    head = "run" if name == "planning.dryrun" else name.split(".")[0]  # planning's one module that needs torch builds the real engine
    for index, names in enumerate(LEVELS):
        if head in names:
            return index
    pytest.fail(f"gigatrain/{head} has no place in LEVELS")


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_imports_go_down(name, path):
    head = name.split(".")[0]
    for target, relative in imports(path):
        assert relative == 0, f"{name} imports relatively"
        if not target.startswith("gigatrain.") or target == "gigatrain.__version__":
            continue
        other = target.split(".")[1]
        assert level(other) <= level(name), f"{name} imports {other}, which is above it"
        assert other in ONLY.get(head, {other}), f"{head} may import {ONLY.get(head)} only, not {other}"
        assert other not in NOT.get(head, set()), f"{head} may not import {other}"


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_heavy_packages_stay_in_their_homes(name, path):
    for target, _ in imports(path):
        package = target.split(".")[0]
        assert name in HOMES.get(package, {name}), f"{name} imports {package}, whose home is {HOMES.get(package)}"
    head = name.split(".")[0]
    if head in TORCH_FREE and name != "planning.dryrun":
        heavy = {target.split(".")[0] for target, _ in imports(path, top=True)} & {"torch", "triton", "transformers", "datasets", "numpy"}
        assert not heavy, f"{name} imports {heavy} at import time"


@pytest.mark.parametrize("command", [["-c", "import gigatrain"], ["-m", "gigatrain", "--help"], ["-m", "gigatrain", "recipes"]])
def test_light_commands_load_nothing_heavy(command):
    begin = time.perf_counter()
    ended = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True)
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert not loaded & {"torch", "triton", "transformers", "datasets", "numpy", "deepspeed"}
    assert time.perf_counter() - begin < 10  # the figure itself is in the README; this catches a torch import on any machine


def test_one_process_trains_without_the_compiler_and_sharding(tmp_path):
    command = [
        "-m",
        "gigatrain",
        "train",
        "quickstart-tiny",
        "--set",
        "train.steps=1",
        "--set",
        "validation.every=0",
        "--run",
        f"{tmp_path}/run",
    ]
    ended = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True, cwd=tmp_path)
    loaded = {line.rsplit("|", 1)[-1].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert "torch" in loaded
    assert not loaded & {
        "torch._dynamo",
        "torch._inductor",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "transformers",
        "deepspeed",
    }


FORBIDDEN = {  # modules that unpickle or run what they read
    "pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "dbm", "code", "runpy", "imp",
}  # fmt: skip
CALLED = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.hub.load", "os.system", "os.popen", "pickle.load", "pickle.loads", "tempfile.mktemp",
    "subprocess.getoutput", "subprocess.getstatusoutput", "pandas.read_pickle", "pd.read_pickle", "joblib.load", "yaml.load", "yaml.unsafe_load",
    "np.load", "numpy.load", "distributed.checkpoint.load", "dcp.load", "torch.jit.load", "torch.package.PackageImporter",
}  # fmt: skip
OBJECTS = re.compile(r"\.(all_gather|gather|scatter|broadcast|send|recv)_object(_list)?$")  # torch's collectives of any object pickle it


def unsafe(path):
    """What a file of Python does that runs what it reads, line by line."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names if isinstance(node, ast.Import)} | {
                (getattr(node, "module", "") or "").split(".")[0]
            }
            yield from (f"line {node.lineno}: import {name}" for name in FORBIDDEN & names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLED or OBJECTS.search(called):
                yield f"line {node.lineno}: {called}"
            for word in node.keywords:
                said = ast.unparse(word.value)
                if (
                    word.arg == "shell"
                    or (word.arg in ("trust_remote_code", "allow_pickle") and said != "False")
                    or (word.arg, said) == ("weights_only", "False")
                ):
                    yield f"line {node.lineno}: {word.arg}={said}"
            words = [
                part.value for one in node.args for part in ast.walk(one) if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            if called.startswith("subprocess.") and {"pkill", "killall", "sudo"} & set(words):
                yield f"line {node.lineno}: {called} of {words[0]}"


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_no_module_unpickles_evaluates_or_builds_shell_strings(name, path):
    assert list(unsafe(path)) == []


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_no_benchmark_runs_what_it_reads(path):
    """But for what it measures: another's own way to load, named in the line before."""
    lines = path.read_text().splitlines()
    found = [
        one
        for one in unsafe(path)
        if "runs what it reads" not in " ".join(lines[max(0, int(one.split()[1][:-1]) - 3) : int(one.split()[1][:-1])])
    ]
    assert found == []


@pytest.mark.parametrize(
    "path", sorted(path for path in (PACKAGE.parent / "launch").rglob("*") if path.is_file()), ids=lambda path: path.name
)
def test_nothing_shipped_for_launching_ends_processes_by_name_or_evaluates(path):
    text = path.read_text()
    assert not [word for word in ("pkill", "killall", "sudo ", "eval ", "curl ", "wget ", "mktemp -u") if word in text]


def test_the_gate_sees_each_of_them(tmp_path):
    wrong = tmp_path / "wrong.py"
    for line in (
        "import pickle", "from joblib import load", "import yaml", "torch.load(p)", "np.load(p, allow_pickle=True)", "os.system('x')",
        "subprocess.run('x', shell=True)", "tempfile.mktemp()", "subprocess.run(['pkill', '-f', 'x'])", "f(trust_remote_code=True)",
        "distributed.all_gather_object(a, b)", "eval(x)", "torch.load(p, weights_only=False)", "f(trust_remote_code=flag)",
    ):  # fmt: skip
        wrong.write_text(line)
        parsed.cache_clear()
        assert list(unsafe(wrong)), line
