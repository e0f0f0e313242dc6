"""A driver whose truth is known: our stub of libnvidia-ml, compiled once, that the real nvidia-ml-py loads in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stubs

HERE = Path(__file__).parent

# One process for all questions, a JSON line each; time is the stub's and stands until it is moved.
_ASKED = """
import ctypes, json, os, sys
sys.path.insert(0, sys.argv[1])
from gigatrain.power import nvml
from replay import Clock, metered, pass_by
stub = ctypes.CDLL("libnvidia-ml.so.1")
for name, takes in (("fake_joules", 2), ("fake_watts", 1)):
    getattr(stub, name).restype = ctypes.c_double
    getattr(stub, name).argtypes = [ctypes.c_int] + [ctypes.c_double] * takes
stub.fake_time.argtypes = [ctypes.c_double]

class Stubs(Clock):
    @property
    def now(self):
        return self._now
    @now.setter
    def now(self, seconds):
        self._now = seconds
        stub.fake_time(seconds)

for line in sys.stdin:
    asked = json.loads(line)
    faults = {"FAKE_" + name: str(value) for name, value in asked["faults"].items()}
    os.environ.update(faults)
    clock = Stubs()
    nvml.monotonic = clock
    found, notes = nvml.sources(asked["uuids"])
    said = {"notes": notes, "sources": [[one.place[-1], one.scope, one.name, one.check, list(one.covers)] for one in found]}
    if asked["seconds"]:
        meter = metered(clock, found, every_s=asked["every_s"])
        began = clock.now
        pass_by(meter, clock, asked["seconds"], every_s=asked["every_s"], jitter=asked["jitter"], miss=asked["miss"])
        taken = meter.take()
        said["taken"] = {name: getattr(taken, name) for name in vars(taken)}
        said["truth_j"] = [stub.fake_joules(gpu, began, clock.now) for gpu in range(8)]
        said["meters"] = meter.meters
    else:
        said["looks"] = [[look.counter_mj, look.milliwatts, look.reasons] for look in (one.read() for one in found)]
        said["watts"] = [stub.fake_watts(gpu, clock.now) for gpu in range(8)]
    for one in found:
        one.close()
    print(json.dumps(said), flush=True)
    for name in faults:
        del os.environ[name]
"""


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory) -> Path:
    """The folder of the stub, for LD_LIBRARY_PATH."""
    return stubs.nvml(HERE / "fakenvml.c", tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def stub(nvml_library):
    """`stub(uuids, seconds=0, **faults)`: what the sources of these say; with seconds, what a meter of them saw of a time of the stub's, and what was true."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(nvml_library)}
    with subprocess.Popen([sys.executable, "-c", _ASKED, str(HERE)], stdin=-1, stdout=-1, text=True, env=environment) as process:
        given, answers = process.stdin, process.stdout
        assert given is not None
        assert answers is not None

        def asked(uuids, seconds=0.0, every_s=0.1, jitter=0.0, miss=0.0, **faults):
            question = {"uuids": uuids, "seconds": seconds, "every_s": every_s, "jitter": jitter, "miss": miss, "faults": faults}
            given.write(json.dumps(question) + "\n")
            given.flush()
            return json.loads(answers.readline())

        yield asked
        given.close()
