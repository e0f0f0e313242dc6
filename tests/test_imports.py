"""Who may import whom: only downwards, with absolute names, and heavy packages only where they belong."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gigatrain"
# Lowest first; a module may import its own level and those below, with the exceptions that follow.
LEVELS = [
    ["errors"],
    ["architectures", "foreign"],
    ["config"],
    ["site"],
    ["load", "planning"],
    ["launching"],
    ["power"],
    ["kernels", "data", "parallel"],
    ["models", "optim", "tune"],
    ["engines", "observe", "checkpoint", "bench", "preflight"],
    ["run"],
    ["export", "importing"],
    ["generate"],
    ["loop"],
    ["cli"],
    ["__init__", "__main__"],
]
ONLY = {"kernels": {"errors", "kernels"}, "data": {"errors", "config", "data"}}  # can be lifted out and used alone
NOT = {"models": {"parallel", "data", "engines"}}
TORCH_FREE = {
    "errors",
    "architectures",
    "foreign",
    "config",
    "site",
    "load",
    "planning",
    "launching",
    "power",
    "cli",
    "__init__",
    "__main__",
}
HOMES = {
    "deepspeed": {"engines.deepspeed"},
    "datasets": {"data.sources"},
    "transformers": {"generate", "models.automodel", "models.autonumbers", "models.autoweights", "bench.peers"},
    "accelerate": {"observe.metrics"},
    "matplotlib": {"bench.report", "bench.power", "observe.report.plots"},
    **{peer: {"bench.peers"} for peer in ("liger_kernel", "cut_cross_entropy", "flashoptim", "quack")},
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"), path


def imports(path, *, top=False):
    """(module, inside a function) of every import; with `top` those that run at import time."""
    tree = ast.parse(path.read_text())
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


def test_no_module_unpickles_evaluates_or_builds_shell_strings():
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "marshal", "shelve", "yaml"} & set(names), name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "torch.load", "os.system", "os.popen"}, f"{name}: {called}"
                assert not any(word.arg == "shell" for word in node.keywords), name
                assert not any(word.arg == "trust_remote_code" and ast.unparse(word.value) != "False" for word in node.keywords), name
