"""launch/torchrun.sh as a user starts it: on one machine, and as two machines on loopback; the weights are those of `train.nproc=2`."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "launch" / "torchrun.sh"


def started(*arguments, **variables):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen([SCRIPT, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process, code=0) -> str:
    out, _ = process.communicate(timeout=180)
    assert process.returncode == code, out
    return out


def weights(run) -> str:
    return json.loads((run / "summary.json").read_text())["weights_sha256"]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.mark.long
def test_one_machine_and_two_end_with_the_same_weights(tiny, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "gigatrain", "train", tiny, "--site", "laptop", "--set", "train.nproc=2", "--run", tmp_path / "spawned"],
        check=True,
        capture_output=True,
    )
    common = (tiny, "--site", "laptop")
    ended(started(*common, "--run", tmp_path / "one", NPROC="2", MASTER_PORT=free_port()))
    port = free_port()
    pair = [
        started(*common, "--run", tmp_path / "two", NPROC="1", NNODES="2", NODE_RANK=node, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for node in ("0", "1")
    ]
    assert "train 12/12" in "".join(ended(one) for one in pair)
    assert weights(tmp_path / "one") == weights(tmp_path / "two") == weights(tmp_path / "spawned")


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        ([], {}, "which recipe?"),
        (["quickstart", "--run", "x"], {"NNODES": "2"}, "set MASTER_ADDR"),
        (["quickstart"], {"NNODES": "2", "MASTER_ADDR": "a"}, "name it with --run"),
        (["quickstart"], {"NODE_RANK": "1"}, "the last is 0"),
        (["quickstart"], {"NPROC": "$(touch HARM)"}, "is no count"),
    ],
)
def test_what_is_missing_is_asked_for(tmp_path, monkeypatch, arguments, variables, said):
    monkeypatch.chdir(tmp_path)
    assert said in ended(started(*arguments, **variables), code=7)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed; .ci/run installs it")
def test_shellcheck_has_nothing_to_say():
    subprocess.run(["shellcheck", SCRIPT], check=True)
