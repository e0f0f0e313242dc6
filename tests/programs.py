"""The programs of benchmarks/ and docs/, imported as modules: they are scripts, and in no package."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def program(path: str) -> Any:
    """The module of a script of the repository ("benchmarks/plan.py"), made anew; it finds those beside it, as a script does."""
    file = ROOT / path
    name = f"{file.parent.name}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module
