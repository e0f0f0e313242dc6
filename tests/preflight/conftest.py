"""A driver for machines without one: our stub of libnvidia-ml, compiled once, that the real nvidia-ml-py loads in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stubs

# One process for all questions: each line is a JSON pair (faults, wanted accelerators); each answer the findings by name.
_ASKED = """
import dataclasses, json, os, sys
from pathlib import Path
from gigatrain.preflight import burn, findings, gpu
for line in sys.stdin:
    faults, accelerators = json.loads(line)
    names = {"FAKE_" + name: value for name, value in faults.items()}
    os.environ.update(names)
    found, _ = findings.run(gpu.checks(True, accelerators, Path("/nonexistent")), findings.Clock(60))
    looks = [burn.under_load(gpu.loaded(count, lambda: True)) for count in (3, 2)]
    found += [looks[0], dataclasses.replace(looks[1], name="two looks")]
    found.append(findings.Finding("peer", "ok", "", burn.to_one_peer(450.0, *gpu.switched())))
    print(json.dumps({one.name: one.json() for one in found}), flush=True)
    for name in names:
        del os.environ[name]
"""


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory) -> Path:
    """The folder of the stub, for LD_LIBRARY_PATH."""
    return stubs.nvml(Path(__file__).parent / "fakenvml.c", tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def ask(nvml_library):
    """`ask(faults, accelerators=8)`: every NVML check's finding by name, on eight GPUs with these faults."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(nvml_library)}
    with subprocess.Popen([sys.executable, "-c", _ASKED], stdin=-1, stdout=-1, text=True, env=environment) as process:
        given, answers = process.stdin, process.stdout
        assert given is not None
        assert answers is not None

        def asked(faults=None, accelerators=8):
            given.write(json.dumps([faults or {}, accelerators]) + "\n")
            given.flush()
            return json.loads(answers.readline())

        yield asked
        given.close()
