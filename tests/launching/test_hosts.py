"""Machines without a scheduler: hosts files, quoting through real shells, and runs on this machine and through a real sshd."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gigatrain import load
from gigatrain.errors import SiteError
from gigatrain.launching import agent, hosts, job
from gigatrain.launching.job import Job

ROOT = Path(__file__).parent.parent.parent
HOSTILE = "a $(touch HARM) `touch HARM`\n'\"; touch HARM #${HOME} \\ -oProxyCommand=x"


def test_a_hosts_file():
    text = "# ours\n\nnode1 slots=8\nme@node2 slots=8   # the second\n[fe80::1]:8\n10.0.0.3:8\n"
    assert hosts.parse(text, "h") == [(name, 8) for name in ("node1", "me@node2", "[fe80::1]", "10.0.0.3")]
    assert hosts.parse("a\nb", "h") == [("a", None), ("b", None)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\n-oProxyCommand=touch", "h, line 2: '-oProxyCommand=touch' is no host"),
        ("a b", "line 1"),
        ("a\n\na", "line 3: a stands on line 1 too"),
        ("a slots=0", "line 1"),
        ("a:2 slots=2", "line 1"),
        ("a slots=x", "line 1"),
        ("$(id)", "line 1"),
        ("a@", "line 1"),
        ("a:8\nb:4", "hosts have 4, 8 slots"),
        ("a:8\nb", "hosts have 8, None slots"),
        ("# none\n", "names no host"),
    ],
)
def test_what_is_no_host_is_named_with_its_line(text, said):
    with pytest.raises(SiteError) as failure:
        hosts.parse(text, "h")
    assert said in str(failure.value)


def test_an_unreadable_hosts_file(tmp_path):
    with pytest.raises(SiteError, match="cannot be read: No such file"):
        hosts.read(tmp_path / "none")


def made(run, names=(), options=(), **changes):
    site = load.site("laptop")
    site = site.model_copy(update={"scheduler": site.scheduler.model_copy(update={"kind": "ssh", "options": tuple(options)})})
    given = {"name": "tiny", "run": str(run), "recipe": f"{run}/launch/recipe.json", "workdir": "/", "python": sys.executable, "site": site}
    return Job(**(given | {"nodes": max(1, len(names)), "ranks_per_node": 1, "hosts": tuple(names)} | changes))


def _recorder(folder) -> Path:
    """An `interpreter` with a hostile name, which writes down the words that it was given."""
    path = folder / HOSTILE.replace("\n", " ").replace("/", "")
    path.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >"${0%/*}/seen"\n')
    path.chmod(0o755)
    return path


def _check(folder, target) -> None:
    seen = (folder / "seen").read_text().split("\0")[:-1]
    assert seen[:3] == ["-m", "gigatrain.launching.tether", target.workdir]
    assert seen[seen.index("--") - 2] == f"X={HOSTILE}"
    assert seen[seen.index("--") + 1] == target.python
    assert target.run in seen
    assert not list(folder.rglob("HARM"))


def test_hostile_values_are_words_to_the_shell_that_ssh_starts(tmp_path):
    target = made(f"/runs/{HOSTILE}", ["one"], python=str(_recorder(tmp_path)), workdir=HOSTILE, environment={"X": HOSTILE})
    command = hosts.commands(target, "000", 1234)[0]
    assert command[-2] == "one"
    subprocess.run(["bash", "-c", command[-1]], cwd=tmp_path, check=True)
    _check(tmp_path, target)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    """A real sshd on a port and with keys of its own; what `ssh` needs to reach it."""
    binary = shutil.which("sshd") or "/usr/sbin/sshd"
    if not Path(binary).exists():
        pytest.fail("no sshd: these tests need a real one; apt-get install -y --no-install-recommends openssh-server")
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile {folder}/pid\n"
        "AcceptEnv PYTHONPATH\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nMaxStartups 50\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd shuts its unprivileged part in
    process = subprocess.Popen([binary, "-D", "-e", "-f", str(folder / "config")], stderr=(folder / "log").open("w"))
    options = [
        f"-p{port}",
        f"-i{folder}/user",
        "-Fnone",
        "-oStrictHostKeyChecking=no",
        f"-oUserKnownHostsFile={folder}/known",
        "-oLogLevel=ERROR",
    ]
    options.append(f"-oSetEnv=PYTHONPATH={ROOT}")
    end = time.monotonic() + 20
    while subprocess.run(["ssh", "-oBatchMode=yes", *options, "127.0.0.1", "true"], capture_output=True, check=False).returncode:
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.1)
    yield options
    process.terminate()
    process.wait(10)


@pytest.mark.slurm
@pytest.mark.ssh
def test_hostile_values_are_words_to_a_real_sshd(sshd, tmp_path):
    target = made(
        f"/runs/{HOSTILE}", ["127.0.0.1"], options=sshd, python=str(_recorder(tmp_path)), workdir=HOSTILE, environment={"X": HOSTILE}
    )
    subprocess.run(hosts.commands(target, "000", 1234)[0], stdin=subprocess.DEVNULL, check=True)
    _check(tmp_path, target)


def launch(*arguments, folder):
    command = [sys.executable, "-m", "gigatrain", "launch", *map(str, arguments), "--json"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def launched(*arguments, folder) -> Path:
    ended = launch(*arguments, folder=folder)
    assert ended.returncode == 0, ended.stderr
    return Path(json.loads(ended.stdout)["run"])


def until(true, limit_s=120):
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def over(run, limit_s=120):
    """Until the job is gone; its last verdict."""
    until(lambda: hosts.alive(run) is None, limit_s)
    return job.history(run)[-1]


def weights(run) -> str:
    return json.loads((run / "summary.json").read_text())["weights_sha256"]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory) -> str:
    """The weights that `train.nproc=2` ends with."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, "-m", "gigatrain", "train", str(tiny), "--site", "laptop", "--set", "train.nproc=2", "--run", str(run)]
    subprocess.run(command, check=True, capture_output=True)
    return weights(run)


@pytest.fixture
def farm(sshd, tmp_path):
    """A site whose hosts are this machine twice, by two of its names."""
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items())
    (tmp_path / "farm.toml").write_text(
        f'name = "farm"\nsummary = "s"\ndevice = "cpu"\n[scheduler]\nkind = "ssh"\noptions = {json.dumps(sshd)}\n[environment]\n{lines}\n'
    )
    (tmp_path / "hosts.txt").write_text("127.0.0.1  # the first\nlocalhost\n")
    return tmp_path


def test_this_machine_in_the_background(tiny, tmp_path):
    """As a user types it: it returns at once, the run goes on in a session of its own, and a job that is told to leave saves; --resume goes on."""
    run = launched(tiny, "--site", "laptop", "--run", tmp_path / "run", "--set", "train.steps=4000", folder=tmp_path)
    until((run / "metrics.jsonl").is_file)
    pid = hosts.alive(run)
    assert pid is not None
    assert os.getsid(pid) == pid
    again = launch(tiny, "--site", "laptop", "--run", run, "--resume", "--set", "train.steps=4000", folder=tmp_path)
    assert (again.returncode, f"process {pid}, is alive" in again.stderr) == (7, True)
    assert hosts.tell(run, signal.SIGUSR1)
    last = over(run)
    assert (last["event"], last["signal"], last["code"]) == ("judged", "USR1", 75)
    assert last["step"] > 0
    assert not hosts.tell(run, signal.SIGUSR1)


@pytest.mark.slurm
@pytest.mark.ssh
def test_two_hosts_end_with_the_weights_of_one(farm, tiny, undisturbed):
    run = launched(tiny, "--site", "farm.toml", "--hosts", "hosts.txt", "--run", farm / "run", folder=farm)  # examined first
    assert over(run)["verdict"] == "done"
    assert weights(run) == undisturbed


@pytest.mark.slurm
@pytest.mark.ssh
def test_a_dead_host_is_named_and_the_next_attempt_ends_well(farm, tiny, undisturbed):
    """SIGKILL to everything on the second host once the run has saved."""
    run = launched(
        tiny, "--site", "farm.toml", "--hosts", "hosts.txt", "--run", farm / "run", "--no-preflight", "--set", "train.steps=60", folder=farm
    )
    until(
        lambda: (run / "checkpoints" / "step-00000003" / "COMMITTED").is_file() or any((run / "checkpoints").glob("step-*[1-9]*/COMMITTED"))
    )
    held = next(
        int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal() and {"--node-rank=1", str(run)} <= set(_words(entry))
    )
    for pid in _with_descendants(held):
        os.kill(pid, signal.SIGKILL)
    assert over(run)["verdict"] == "done"
    assert "localhost was the first to fail" in (run / "logs" / "job.out").read_text()
    verdicts = [event["verdict"] for event in job.history(run) if event["event"] == "judged"]
    assert verdicts == ["again", "done"]
    assert not [entry for entry in Path("/proc").iterdir() if entry.name.isdecimal() and str(run) in _words(entry)], "ranks are left behind"


@pytest.mark.slurm
@pytest.mark.ssh
def test_a_host_that_cannot_be_reached_is_named_and_not_tried_for_ever(farm, tiny):
    (farm / "hosts.txt").write_text("127.0.0.1\nno-such-host.invalid\n")
    run = launched(tiny, "--site", "farm.toml", "--hosts", "hosts.txt", "--run", farm / "run", "--no-preflight", folder=farm)
    last = over(run, 200)
    assert (last["verdict"], "3 restarts and no step gained" in last["why"]) == ("stop", True)
    assert "no-such-host.invalid was the first to fail (ssh itself failed" in (run / "logs" / "job.out").read_text()


@pytest.mark.slurm
@pytest.mark.ssh
def test_a_host_that_the_doctor_finds_bad_does_not_train(farm, tiny):
    """The site says that its nodes have GPUs; these have none."""
    site = (farm / "farm.toml").read_text().replace('device = "cpu"', 'device = "cuda"\naccelerator = "h200"')
    (farm / "farm.toml").write_text(site)
    run = launched(tiny, "--site", "farm.toml", "--hosts", "hosts.txt", "--gpus", "2", "--run", farm / "run", folder=farm)
    last = over(run, 200)
    assert (last["verdict"], last["code"]) == ("stop", 9)
    assert not (run / "run.json").exists()


def test_a_signal_is_passed_on_to_ranks_and_to_no_other_child():
    """Such as multiprocessing's resource tracker, which it would kill."""
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    other = subprocess.Popen(["sleep", "60"], env=environment)
    rank = subprocess.Popen(["sleep", "60"], env=environment | {"LOCAL_RANK": "0"})
    try:
        agent._pass_on(signal.SIGUSR1, None)
        assert rank.wait(20) == -signal.SIGUSR1
        assert other.poll() is None
    finally:
        for process in (other, rank):
            process.kill()
            process.wait()


def _with_descendants(pid: int) -> list[int]:
    return [pid, *(inner for child in agent.children(pid) for inner in _with_descendants(child))]


def _words(entry: Path) -> list[str]:
    try:
        return (entry / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []
