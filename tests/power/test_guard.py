"""Power limits are put back as they were found, whatever dies: on a libnvidia-ml.so.1 whose limits lie in files."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import stubs

from gigatrain.power import restore
from gigatrain.power.guard import Caps
from gigatrain.preflight import gpu

# A process that sets limits: a line in is watts or "close", a line out is what came of it.
_HOLDER = """\
import resource, sys
from pathlib import Path
from gigatrain.errors import PowerError
from gigatrain.power.guard import Caps
def full():  # as of a disk without room: a limit still fits, a record does not
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
if sys.argv[3:]:
    full()
caps = Caps(sys.argv[2].split(","), run="runs/mine", folder=Path(sys.argv[1]), say=lambda text: print("said", text, flush=True))
try:
    with caps:
        print("ready", caps.least_watts, caps.most_watts, caps._guard.pid, flush=True)
        for line in sys.stdin:
            word = line.strip()
            if word == "close":
                break
            if word == "fail":
                raise KeyError("a mistake")
            if word == "full":
                full()
                continue
            if word == "race":
                print("races", flush=True)
                while True:
                    for watts in (300, 400, 500):
                        caps.apply(watts)
            caps.apply(None if word == "none" else float(word))
            print("set", caps._guard.pid, flush=True)
    print("closed", flush=True)
except PowerError as failure:
    print("PowerError", failure, flush=True)
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The folder of the stub, for LD_LIBRARY_PATH."""
    return stubs.nvml(Path(__file__).parent / "fakelimits.c", tmp_path_factory.mktemp("limits"))


class Node:
    """A machine with two GPUs."""

    def __init__(self, folder, library):
        self.limits, self.records = folder / "limits", folder / "records"
        self.limits.mkdir()
        self.environment = os.environ | {"LD_LIBRARY_PATH": str(library), "FAKE_DIR": str(self.limits)}
        self.processes, self.guards = [], []

    def hold(self, uuids="GPU-0,GPU-1", session=False, given=(), before=(), **faults):
        process = subprocess.Popen(
            [*before, sys.executable, "-c", _HOLDER, str(self.records), uuids, *given],
            stdin=-1,
            stdout=-1,
            stderr=-1,
            text=True,
            env=self.environment | {f"FAKE_{name}": str(value) for name, value in faults.items()},
            start_new_session=session,
        )
        self.processes.append(process)
        return process

    def tell(self, process, word):
        assert process.stdin
        process.stdin.write(f"{word}\n")
        process.stdin.flush()
        return self.hear(process)

    def hear(self, process):
        assert process.stdout
        words = process.stdout.readline().strip()
        if words.startswith(("ready", "set")):
            self.guards.append(int(words.split()[-1]))
        return words

    def watts(self):
        found = []
        for uuid in ("GPU-0", "GPU-1"):
            path = self.limits / uuid
            found.append(int(path.read_text()) / 1000 if path.exists() else 700.0)
        return found

    def until(self, watts, records=0):
        """Wait for limits and the count of records."""
        end = time.monotonic() + 60
        while (self.watts(), len(list(self.records.glob("*.json")))) != (watts, records):
            assert time.monotonic() < end, (self.watts(), list(self.records.glob("*")))
            time.sleep(0.02)

    def restore(self, *options, folder=None):
        command = [sys.executable, "-m", "gigatrain.power.guard", "--restore", "--folder", str(folder or self.records), *options]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, check=False)


@pytest.fixture
def node(tmp_path, library):
    found = Node(tmp_path, library)
    yield found
    for process in found.processes:
        if process.poll() is None:
            process.kill()
        process.communicate()
    for pid in found.guards:
        end = time.monotonic() + 60
        while _alive(pid) and time.monotonic() < end:
            time.sleep(0.02)
        assert not _alive(pid), "a guard outlives whom it guards"


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_limits_are_set_within_the_drivers_range_and_put_back_as_found(node):
    (node.limits / "GPU-1").write_text("650000")
    one = node.hold()
    assert node.hear(one).startswith("ready 200.0 650.0 ")
    assert node.tell(one, 400).startswith("set")
    assert node.watts() == [400.0, 400.0]
    record = restore.read(str(node.records), "GPU-1")
    assert record is not None
    assert (record["found_mw"], record["default_mw"], record["boot"]) == (650000, 700000, restore.boot())
    node.tell(one, 690)
    assert node.watts() == [690.0, 650.0], "never above what the site has set"
    node.tell(one, "none")
    assert node.watts() == [700.0, 650.0]
    node.tell(one, 300)
    assert node.tell(one, "close") == "closed"
    assert one.wait(60) == 0
    assert node.watts() == [700.0, 650.0]
    assert not list(node.records.glob("*.json"))


@pytest.mark.parametrize("word", ["fail", "150"])
def test_an_exception_and_a_refused_limit_put_them_back(node, word):
    one = node.hold()
    node.hear(one)
    node.tell(one, 400)
    said = node.tell(one, word)
    assert word == "fail" or said.startswith(
        "PowerError GPU-0: 150 W is asked for, and its driver takes 200 to 700 W; set power.caps = false"
    )
    one.wait(60)
    node.until([700.0, 700.0])


def test_a_second_gpu_that_fails_puts_the_first_back(node):
    one = node.hold(FAILS=1)
    node.hear(one)
    assert node.tell(one, 400).startswith("PowerError GPU-1: 400 W cannot be set: Unknown Error")
    one.wait(60)
    node.until([700.0, 700.0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_has_its_limits_put_back(node, number):
    one = node.hold()
    node.hear(one)
    node.tell(one, 400)
    one.send_signal(number)
    node.until([700.0, 700.0])


def test_a_killed_group_and_ctrl_c_leave_the_guard_alive(node):
    one = node.hold(session=True)
    guard = int(node.hear(one).split()[-1])
    node.tell(one, 400)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(guard, number)
    os.killpg(one.pid, signal.SIGKILL)
    node.until([700.0, 700.0])


@pytest.mark.parametrize("moment", [{"HANGS": 3}, {"HANGS": 3, "HANGS_AFTER": 1}, {"HANGS": 4}, {"HANGS": 4, "HANGS_AFTER": 1}])
def test_it_does_not_matter_at_what_moment_it_is_killed(node, moment):
    """Sets 1 and 2 try the right; 3 and 4 are the two GPUs'."""
    one = node.hold(**moment)
    node.hear(one)
    assert one.stdin
    one.stdin.write("400\n")
    one.stdin.flush()
    end = time.monotonic() + 60
    while not (node.limits / "hung").exists() and time.monotonic() < end:
        time.sleep(0.01)
    one.kill()
    node.until([700.0, 700.0])


@pytest.mark.parametrize("after_s", [0.0, 0.003, 0.011])
def test_killed_while_it_sets_one_limit_after_the_other(node, after_s):
    one = node.hold()
    node.hear(one)
    assert node.tell(one, "race") == "races"
    time.sleep(after_s)
    one.kill()
    node.until([700.0, 700.0])


def test_a_killed_guard_is_replaced(node):
    one = node.hold()
    guard = int(node.hear(one).split()[-1])
    node.tell(one, 400)
    os.kill(guard, signal.SIGKILL)
    assert node.hear(one) == "said the process that guards power limits has ended (-9); another is started"
    end = time.monotonic() + 60
    while (other := int(node.tell(one, 500).split()[-1])) == guard:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert _alive(other)
    one.kill()
    node.until([700.0, 700.0])


def _both_killed(node):
    one = node.hold()
    guard = int(node.hear(one).split()[-1])
    node.tell(one, 400)
    os.kill(one.pid, signal.SIGSTOP)  # else it would start another
    os.kill(guard, signal.SIGKILL)
    one.kill()
    one.wait(60)
    while _alive(guard):
        time.sleep(0.01)
    assert node.watts() == [400.0, 400.0]


def test_after_both_are_killed_the_next_run_puts_back_and_keeps_what_the_first_found(node):
    _both_killed(node)
    two = node.hold("GPU-0,GPU-1")
    assert node.hear(two) == "said left by a run that was killed: GPU-0: power limit 700 W, as it was found (400 W before)"
    node.hear(two)
    assert node.hear(two).startswith("ready 200.0 700.0")
    node.tell(two, 300)
    node.tell(two, "close")
    node.until([700.0, 700.0])


def test_after_both_are_killed_a_command_puts_back(node):
    _both_killed(node)
    command = [sys.executable, "-m", "gigatrain.power.guard", "--folder", str(node.records)]
    named = subprocess.run(command, capture_output=True, text=True, env=node.environment, check=True).stdout
    assert "GPU-0: its power limit was left by a run that was killed; put it back with --restore" in named
    doctor = gpu.left_limits(node.records)
    assert (doctor.state, doctor.value, doctor.way_out) == ("warn", 2, "python -m gigatrain.power.guard --restore")
    (node.limits / "GPU-1").write_text("555000")  # by an administrator, since
    found = node.restore()
    assert (found.returncode, node.watts()) == (0, [700.0, 555.0])
    assert "GPU-1: power limit 555 W is neither what was found (700 W) nor what was set" in found.stdout
    assert node.restore().stdout == "no run has left a power limit on this node\n"
    assert gpu.left_limits(node.records).state == "ok"


def test_a_record_of_another_boot_is_void(node):
    _both_killed(node)
    for path in node.records.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"boot": "another"}))
    (node.limits / "GPU-0").write_text("400000")
    found = node.restore()
    assert node.watts() == [400.0, 400.0]
    assert found.stdout.count("of another boot") == 2


def test_one_that_may_not_set_limits_is_told_what_it_lacks(node):
    one = node.hold(FORBIDDEN=1)
    said = node.hear(one)
    assert said.startswith("PowerError GPU-0: its power limit may be set by root only (or with CAP_SYS_ADMIN), and this is uid")
    assert said.endswith("set power.caps = false: then steps are spaced out instead, which needs no right")
    one.wait(60)
    node.until([700.0, 700.0])


def test_two_runs_cannot_set_one_gpu(node):
    one = node.hold("GPU-0")
    node.hear(one)
    node.tell(one, 400)
    two = node.hold("GPU-1,GPU-0")
    said = node.hear(two)
    assert said.startswith(f"PowerError GPU-0: its power limit is runs/mine (process {one.pid})'s, and two runs cannot set it")
    assert node.restore().stdout == "GPU-0: a run that lives holds it; left alone\n"
    assert node.watts() == [400.0, 700.0]
    assert node.tell(one, "close") == "closed"
    node.until([700.0, 700.0])


def test_a_modules_limit_is_set_where_that_is_what_there_is(node):
    one = node.hold("GPU-0", MODULE=1)
    node.hear(one)
    assert node.tell(one, 400).startswith("set")
    record = restore.read(str(node.records), "GPU-0")
    assert record is not None
    assert (record["scope"], node.watts()[0]) == (restore.MODULE, 400.0)
    one.kill()
    node.until([700.0, 700.0])


@pytest.mark.parametrize(
    ("uuids", "said"),
    [
        ("MIG-1", "MIG-1: power limits are set of whole NVIDIA GPUs, and this is a part of a GPU"),
        ("../GPU-0", "no GPU of NVIDIA's"),
        ("GPU-7", "GPU-7: its power limit cannot be read: Not Found"),
    ],
)
def test_what_has_no_limit_is_named(node, uuids, said):
    assert said in node.hear(node.hold(uuids))


def test_a_folder_of_somebody_elses_is_not_trusted(node):
    node.records.mkdir()
    node.records.chmod(0o777)
    assert "no folder of this user's alone" in node.hear(node.hold())
    node.records.rmdir()
    (node.limits.parent / "elsewhere").mkdir()
    node.records.symlink_to(node.limits.parent / "elsewhere")
    assert "no folder of this user's alone" in node.hear(node.hold())


def test_a_node_without_accelerators_has_nothing_to_set(tmp_path):
    with Caps([], folder=tmp_path / "records") as caps:
        caps.apply(300.0)
    assert not (tmp_path / "records").exists()


def test_without_a_driver_that_is_said(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / "records"), "GPU-0"]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, stdin=subprocess.DEVNULL).stdout
    if said.startswith("ready"):
        pytest.skip("this machine has a GPU called GPU-0")
    assert "power limits cannot be set here: there is no libnvidia-ml.so.1" in said or "GPU-0" in said


# -- no room, no record


def test_without_room_for_a_record_no_limit_is_changed_and_those_that_were_are_put_back(node):
    one = node.hold()
    node.hear(one)
    node.tell(one, 400)
    assert one.stdin
    one.stdin.write("full\n")
    said = node.tell(one, 300)
    assert said.startswith("PowerError GPU-0: its power limit is not changed, since what it was cannot be written down in")
    assert "File too large; make room there, or set power.caps = false" in said
    one.wait(60)
    node.until([700.0, 700.0])
    assert sorted(path.name for path in node.records.iterdir()) == ["GPU-0.lock", "GPU-1.lock"]


def test_without_room_from_the_beginning_that_is_said(node):
    said = node.hear(node.hold(given=["full"]))
    assert said.startswith("PowerError GPU-0: its power limit is not changed")
    assert node.watts() == [700.0, 700.0]


def test_who_set_a_limit_puts_it_back_even_if_its_record_was_deleted(node):
    one = node.hold("GPU-0")
    node.hear(one)
    node.tell(one, 400)
    (node.records / "GPU-0.json").unlink()
    assert node.tell(one, "close") == "closed"
    assert node.watts() == [700.0, 700.0]


@pytest.mark.parametrize(
    "text", ['{"uuid":"GPU-0"}', "[" * 60_000, "", '{"uuid":"GPU-0","boot":"x","scope":0,"found_mw":1e99,"set_mw":[]}', "link", "pipe"]
)
def test_what_is_no_record_is_named_and_never_done(node, text, tmp_path):
    node.records.mkdir(mode=0o700)
    path = node.records / "GPU-0.json"
    if text == "link":
        (tmp_path / "elsewhere").write_text(json.dumps(record_of()))
        path.symlink_to(tmp_path / "elsewhere")
    elif text == "pipe":
        os.mkfifo(path, 0o600)
    else:
        path.write_text(text)
    path.parent.joinpath("GPU-x;y.json").write_text("{}")
    (node.limits / "GPU-0").write_text("400000")
    found = node.restore()
    assert (found.returncode, found.stderr) == (10, "")
    assert found.stdout.startswith("GPU-0: not put back by ")
    said = node.hear(node.hold("GPU-0"))
    assert said.startswith("PowerError GPU-0: a run that was killed left its power limit, and it cannot be put back by")
    assert "set it with nvidia-smi -pl and remove that file, or set power.caps = false" in said
    assert node.watts() == [400.0, 700.0]
    assert gpu.left_limits(node.records).state == "warn"


def test_a_lock_that_is_a_link_makes_no_file_elsewhere(node, tmp_path):
    node.records.mkdir(mode=0o700)
    (node.records / "GPU-0.json").write_text(json.dumps(record_of()))
    (node.records / "GPU-0.lock").symlink_to(tmp_path / "victim")
    assert "it is a link" in gpu.left_limits(node.records).said
    assert "it is a link" in node.restore().stdout
    assert "it is a link" in node.hear(node.hold("GPU-0"))
    assert not (tmp_path / "victim").exists()


# -- what others wrote

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="root's")


def record_of(**changed):
    numbers = {"scope": 0, "found_mw": 650_000, "default_mw": 650_000, "range_mw": [200_000, 700_000], "set_mw": [400_000]}
    return {"uuid": "GPU-0", "boot": restore.boot(), "pid": 1, "run": "x"} | numbers | changed


def test_a_folder_that_others_may_write_is_not_looked_into(node):
    node.records.mkdir()
    (node.records / "GPU-0.json").write_text(json.dumps(record_of()))
    node.records.chmod(0o777)
    (node.limits / "GPU-0").write_text("400000")
    found = node.restore()
    assert (found.returncode, node.watts()) == (0, [400.0, 700.0])
    assert "not believed: it is uid" in found.stdout
    assert not (node.records / "GPU-0.lock").exists()
    told = gpu.left_limits(node.records)
    assert (told.state, told.value) == ("warn", 0)


@as_root
def test_a_folder_that_somebody_made_in_roots_place_is_not_looked_into(node, tmp_path):
    place = tmp_path / "gigatrain-power-0"
    place.mkdir(mode=0o700)
    (place / "GPU-0.json").write_text(json.dumps(record_of()))
    (place / "GPU-0.lock").symlink_to(tmp_path / "victim")
    os.chown(place, NOBODY, NOBODY)
    (node.limits / "GPU-0").write_text("400000")
    found = node.restore("--others", folder=place)
    assert (found.returncode, node.watts()) == (0, [400.0, 700.0])
    assert f"gigatrain-power-0: not believed: it is uid {NOBODY}'s" in found.stdout
    assert not (tmp_path / "victim").exists()


def written_by_nobody(tmp_path, text, mode=0o600):
    place = tmp_path / f"gigatrain-power-{NOBODY}"
    place.mkdir(mode=0o700)
    for name, said in (("GPU-0.json", text), ("GPU-0.lock", "")):
        (place / name).write_text(said)
        (place / name).chmod(mode)
        os.chown(place / name, NOBODY, NOBODY)
    os.chown(place, NOBODY, NOBODY)
    return place


@as_root
@pytest.mark.parametrize(
    ("changed", "now", "then", "said"),
    [
        ({}, 400, 700, "GPU-0: power limit 700 W, the driver's default (400 W before, by a run of uid 65534)"),
        ({"found_mw": 300_000, "default_mw": 300_000, "scope": 1}, 400, 700, "the driver's default"),  # no number of it is set
        ({"set_mw": [450_000]}, 400, 400, "is none that uid 65534 has set"),
        ({"set_mw": [700_000]}, 700, 700, "already as it was found"),
        ({"boot": "another"}, 400, 400, "already as it was found"),
        ({"found_mw": 9_000_000}, 400, 400, "numbers that the driver does not take"),
        ({"uuid": "GPU-1"}, 400, 400, "it is no record of this accelerator's limit"),
        ({"set_mw": "400000"}, 400, 400, "it lacks numbers"),
        ({"run": "x" * 70_000}, 400, 400, "it is no record"),
    ],
)
def test_by_what_another_user_wrote_root_sets_a_default_or_nothing(node, tmp_path, changed, now, then, said):
    written_by_nobody(tmp_path, json.dumps(record_of(**changed)))
    (node.limits / "GPU-0").write_text(f"{now}000")
    found = node.restore("--others")
    assert (found.returncode, node.watts()[0]) == (0, then)
    assert said in found.stdout


@as_root
def test_records_that_others_may_write_or_that_a_living_run_holds_are_left_alone(node, tmp_path):
    place = written_by_nobody(tmp_path, json.dumps(record_of()), 0o666)
    (node.limits / "GPU-0").write_text("400000")
    assert "is no file of its folder's owner alone" in node.restore("--others").stdout
    for path in place.iterdir():
        path.chmod(0o600)
    with open(place / "GPU-0.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert node.restore("--others").stdout == "GPU-0: a run that lives holds it; left alone\n"
    (place / "GPU-0.lock").unlink()
    assert "No such file" in node.restore("--others").stdout
    assert not (place / "GPU-0.lock").exists()
    assert node.watts()[0] == 400.0


@as_root
@pytest.mark.skipif((become := shutil.which("setpriv")) is None, reason="no setpriv")
def test_what_a_killed_run_of_another_user_left_is_named_and_put_to_the_default(node, library):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        shutil.copytree(library, Path(folder) / "library")
        node.limits, node.records = Path(folder) / "limits", Path(folder) / f"gigatrain-power-{NOBODY}"
        node.limits.mkdir(mode=0o777)
        node.limits.chmod(0o777)
        node.environment |= {"LD_LIBRARY_PATH": f"{folder}/library", "FAKE_DIR": str(node.limits)}
        rights = "+sys_admin,+dac_override"  # the first is what NVML wants; the second lets it read a checkout and a Python of root's
        one = node.hold("GPU-0", before=[become, f"--reuid={NOBODY}", "--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}"])
        if not node.hear(one):
            pytest.skip("this machine's root cannot become another user with rights")
        node.tell(one, 400)
        os.kill(one.pid, signal.SIGSTOP)
        os.kill(node.guards[-1], signal.SIGKILL)
        one.kill()
        one.wait(60)
        root = Path(folder) / "gigatrain-power-0"
        named = node.restore(folder=root)
        assert (named.returncode, node.watts()[0]) == (0, 400.0)
        assert named.stdout == f"GPU-0: a run of uid {NOBODY} that was killed left its power limit; --others sets the driver's default\n"
        assert gpu.left_limits(root).value == 1
        assert "the driver's default (400 W before" in node.restore("--others", folder=root).stdout
        assert (node.watts()[0], list(node.records.glob("*.json"))) == (700.0, [])
