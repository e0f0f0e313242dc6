"""Each rank's words in its own file, whatever printed them, and the failure that came first above all others."""

import errno
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import training
from matrix import long_but

from gigatrain.errors import DataError, GigatrainError, RunError
from gigatrain.observe import failed, logs

SPEAK = """
import ctypes, os, sys
from pathlib import Path
from gigatrain.observe.logs import Log
with Log(Path(sys.argv[1])) as log:
    print("before", flush=True)
    if "refused" in sys.argv:
        from gigatrain.errors import RunError
        raise SystemExit(7)
    log.own()
    print("python")
    print("python's errors", file=sys.stderr)
    sys.stdout.flush()
    libc = ctypes.CDLL(None)
    libc.write(1, b"from C\\n", 7)
    os.write(2, b"\\x1b[31mred\\x1b[0m \\xff\\xfe\\x00 half a line")
    if "crash" in sys.argv:
        os.abort()
"""


def spoke(folder, *words, code=0, **environment):
    ended = subprocess.run(
        [sys.executable, "-c", SPEAK, str(folder), *words], capture_output=True, check=False, env=os.environ | environment, timeout=60
    )
    assert ended.returncode == code, ended.stderr
    return ended


def text(folder, rank=0, attempt=0):
    return (folder / "logs" / f"attempt-{attempt:03d}" / f"rank-{rank:05d}.log").read_bytes()


def test_rank_0_is_in_its_file_and_on_the_screen_byte_by_byte(tmp_path):
    ended = spoke(tmp_path)
    assert ended.stdout == b"before\npython\nfrom C\n"
    assert ended.stderr == b"python's errors\n\x1b[31mred\x1b[0m \xff\xfe\x00 half a line"
    kept = text(tmp_path)
    for words in (b"before\n", b"python\n", b"python's errors\n", b"from C\n", b"\x1b[31mred\x1b[0m \xff\xfe\x00 half a line"):
        assert words in kept
    assert not failed.silent(tmp_path)  # it ended, even behind half a line
    assert failed.first_failure(tmp_path) is None


def test_other_ranks_are_in_their_files_only_and_a_new_start_is_appended(tmp_path):
    for _ in range(2):
        ended = spoke(tmp_path, RANK="3", WORLD_SIZE="8")
        assert ended.stdout == b"before\n"  # the folder was nobody's then
        assert ended.stderr == b""
    assert text(tmp_path, 3).count(b"from C\n") == 2
    assert text(tmp_path, 3).count(b"rank 3 of 8") == 4


def test_a_jobs_attempt_has_a_folder_of_its_own_and_logs_from_the_start(tmp_path):
    ended = spoke(tmp_path, RANK="3", WORLD_SIZE="8", GIGATRAIN_ATTEMPT="2")
    assert ended.stdout == b""
    assert b"before\n" in text(tmp_path, 3, 2)
    assert logs.newest(tmp_path) == 2


def test_who_is_refused_the_folder_leaves_nothing_in_it(tmp_path):
    assert spoke(tmp_path, "refused", code=7).stdout == b"before\n"
    assert list(tmp_path.iterdir()) == []


def test_the_last_words_of_a_crash_reach_screen_and_file(tmp_path):
    ended = spoke(tmp_path, "crash", code=-6)
    assert ended.stderr.endswith(b"half a line") or b"half a line" in ended.stderr
    deadline = time.monotonic() + 10
    while b"half a line" not in text(tmp_path):
        assert time.monotonic() < deadline
    assert b"Fatal Python error: Aborted" in text(tmp_path)  # faulthandler's stacks
    assert failed.silent(tmp_path)[0][0] == 0
    assert "rank 0 left no word" in str(failed.first_failure(tmp_path))


def test_a_screen_that_is_full_costs_the_screen_only(tmp_path):
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([sys.executable, "-c", SPEAK, str(tmp_path)], stdout=full, stderr=subprocess.PIPE, check=False, timeout=60)
    assert ended.returncode == 0
    assert ended.stderr.count(b"gigatrain: standard output cannot be written: No space left on device; training goes on") == 1
    assert b"python's errors\n" in ended.stderr
    assert b"python\n" in text(tmp_path)
    assert b"from C\n" in text(tmp_path)


READ = """
import sys
from pathlib import Path
from gigatrain.observe.logs import Log
with Log(Path(sys.argv[1])) as log:
    if sys.argv[2] == "early":
        for number in range(100_000):
            print(number, flush=True)
    log.own()
    for number in range(100_000, 100_100):
        print(number, flush=True)
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_screen_that_nobody_reads_ends_the_rank_only_before_it_has_a_log(tmp_path, when):
    process = subprocess.Popen(
        [sys.executable, "-c", READ, str(tmp_path), when], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    if when == "early":
        process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    _, said = process.communicate(timeout=60)
    assert (process.returncode != 0) == (b"BrokenPipeError" in said) == (when == "early")
    assert when == "early" or b"100099\n" in text(tmp_path)


def test_a_rank_survives_the_process_that_copies_its_words(tmp_path):
    program = """
import os, signal, subprocess, sys
from pathlib import Path
from gigatrain.observe.logs import Log
with Log(Path(sys.argv[1])) as log:
    if sys.argv[2] == "late":
        log.own()
    tee = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "tee.py"], capture_output=True, check=True).stdout
    os.kill(int(tee), signal.SIGKILL)
    for number in range(20_000):
        print("a line", number, flush=True)
    log.own()
    print("the last line", flush=True)
"""
    for when in ("late", "early"):
        ended = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / when), when], capture_output=True, text=True, check=False, timeout=60
        )
        assert ended.returncode == 0, ended.stderr
        assert "copies rank 0's words to the screen has ended (-9); training goes on" in ended.stderr
        kept = text(tmp_path / when).decode()
        assert "a line 19999\n" in (kept if when == "late" else ended.stdout)
        assert "the last line\n" in kept
        assert not failed.silent(tmp_path / when)


def test_nobody_waits_for_children_that_live_on(tmp_path):
    """As torch's compile workers do: the end is told, and answered once all is copied, while the pipe is still open."""
    (out, inside), (errors, also), (control, say), (hear, answer) = (os.pipe() for _ in range(4))
    given = (out, errors, control, answer)
    command = [sys.executable, "-I", "-S", str(Path(logs.__file__).with_name("tee.py")), *map(str, given)]
    with subprocess.Popen(command, pass_fds=given, stdout=subprocess.PIPE) as tee:
        for one in (*given, also):
            os.close(one)
        os.write(inside, b"of the rank\n")
        os.write(say, os.fsencode(tmp_path / "log") + b"\0\0")
        assert select.select([hear], [], [], 30)[0]
        assert os.read(hear, 1) == b"1"
        assert (tmp_path / "log").read_bytes() == b"of the rank\n"
        os.write(inside, b"of its child\n")
        for one in (inside, say, hear):
            os.close(one)
        assert tee.communicate(timeout=30)[0] == b"of the rank\nof its child\n"
    assert (tmp_path / "log").read_bytes() == b"of the rank\nof its child\n"


def test_a_library_that_leaves_is_recorded(tmp_path):
    def leaving(code):
        with logs.Log(tmp_path) as log:
            log.own()
            raise SystemExit(code)

    with pytest.raises(SystemExit):
        leaving(0)
    assert failed.failures(tmp_path) == []
    with pytest.raises(SystemExit):
        leaving(3)
    assert "SystemExit" in str(failed.first_failure(tmp_path))
    assert "in leaving" in str(failed.first_failure(tmp_path))


def test_an_attempt_that_is_no_number_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("GIGATRAIN_ATTEMPT", "../../etc")
    with pytest.raises(RunError, match="GIGATRAIN_ATTEMPT is '../../etc' and no count"):
        logs.Log(tmp_path)


def test_a_file_that_cannot_be_written_is_said_and_stops_nobody(tmp_path):
    (tmp_path / "logs").write_text("in the way")
    ended = spoke(tmp_path)
    assert ended.stdout == b"before\npython\nfrom C\n"
    assert b"LOG NOT WRITTEN" in ended.stderr


def test_the_bar_moves_in_a_terminal_and_the_log_has_lines_only(tmp_path):
    program = """
import sys, time
from pathlib import Path
from gigatrain.observe.display import Display
from gigatrain.observe.logs import Log
with Log(Path(sys.argv[1])) as log:
    display = Display(log=log)
    display.line("before the folder is ours")
    log.own()
    with display:
        display.line("a line that stays")
        for done in range(4):
            display.advance("train", done, 4, "loss 1")
            print("printed beside the bar")
            time.sleep(0.15)
        display.advance("train", 4, 4, "loss 1")
"""
    screen, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=inside, stderr=inside, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    )
    os.close(inside)
    seen = b""
    while True:
        try:
            data = os.read(screen, 4096)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        seen += data
    assert process.wait(30) == 0
    os.close(screen)
    assert b"\x1b[2K" in seen  # it was drawn again in its place
    assert "━".encode() in seen
    kept = text(tmp_path)
    assert kept.count(b"printed beside the bar\n") == 4
    assert b"before the folder is ours\n" in kept
    assert b"a line that stays\n" in kept
    assert b"train 4/4  loss 1\n" in kept
    assert b"\x1b" not in kept
    assert "━".encode() not in kept


def test_a_second_train_into_the_folder_is_refused_and_leaves_it_alone(tiny, tmp_path):
    folder = tmp_path / "run"
    command = training(tiny, folder, "train.steps=2")
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 7
    assert ended.stderr.count("already holds a run") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.long
def test_our_own_starter_shows_the_first_failure_last_and_nothing_else(tiny, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(_PATCH)
    folder = tmp_path / "run"
    command = training(tiny, folder, "train.nproc=2", "recovery.standby=false")  # whose environment says no rank when it begins
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}{os.pathsep}{Path(__file__).parent.parent.parent}"
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path})
    assert ended.returncode == 5, ended.stderr
    lines = ended.stderr.splitlines()
    assert lines[0].startswith("gigatrain: rank 1 of 2 on ")
    assert lines[1:3] == ["a shard is torn; mend it", "rank 0 stopped because of another"]
    assert len(lines) == 4


_PATCH = """
import os, sys
if os.environ.get("RANK") == "1":
    from gigatrain.errors import DataError

    from gigatrain.engines.native import Native

    def failing(self, batch):
        raise DataError("a shard is torn; mend it")

    Native.forward_backward = failing
"""


def test_a_full_disk_is_not_told_as_a_lack_of_memory(tmp_path):
    """The record and the end mark do not fit: the failure is on the screen, although our starter would tell it, and nothing half written stays."""
    program = """
import resource, sys
from pathlib import Path
from gigatrain.errors import DataError
from gigatrain.observe.logs import Log
with Log(Path(sys.argv[1])) as log:
    log.own()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    raise DataError("mend it")
"""
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "GIGATRAIN_SPAWNED": "1"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert "DataError: mend it" in ended.stderr
    assert list((logs.folder_of(tmp_path, 0) / "errors").iterdir()) == []


FAILS = """
import os, sys
from gigatrain.engines.native import Native
steps, forward = [], Native.forward_backward
def failing(self, batch):
    steps.append(batch)
    if len(steps) == 4 and os.environ.get("RANK") == "1":
        KIND
    return forward(self, batch)
Native.forward_backward = failing
from gigatrain.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(("kind", "code"), long_but([0], [("raise AssertionError('our own mistake')", 1), ("os.abort()", None)]))
def test_of_two_real_ranks_the_one_that_fails_is_named(tiny, tmp_path, kind, code):
    """Under torchrun's environment, each rank started by hand; the other loses it and says so in its file, not on the screen."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = tmp_path / "run"
    arguments = ["train", str(tiny), "--run", str(folder), "--set", "export=false", "--set", "train.nproc=2"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", FAILS.replace("KIND", kind), *arguments],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in running]
    assert running[0].returncode == 7, said
    assert code is None or running[1].returncode == code
    found = str(failed.first_failure(folder))
    assert "rank 0 stopped because of another" in found
    if code:
        assert found.startswith("rank 1 of 2 on ")
        assert "at step 3" in found.splitlines()[0]
        assert "our own mistake" in found
        assert "AssertionError: our own mistake" in (folder / "logs" / "attempt-000" / "rank-00001.log").read_text()
    else:
        assert found.startswith("rank 1 left no word")
    assert "lost another rank" in text(folder).decode()
    assert said[1][0] == ""


def test_nothing_of_the_environment_is_in_a_log(tmp_path):
    spoke(tmp_path, WANDB_API_KEY="s3cr3t-token-value")
    assert b"s3cr3t" not in text(tmp_path)


def test_a_failure_that_no_file_could_keep_is_said_on_the_screen(tmp_path, monkeypatch):
    monkeypatch.setenv("GIGATRAIN_SPAWNED", "1")

    def failing(full):
        with logs.Log(tmp_path) as log:
            log.own()
            if full:
                shutil.rmtree(log.error.parent)
            raise DataError("mend it")

    with pytest.raises(SystemExit) as ended:  # our starter says it
        failing(False)
    assert ended.value.code == 5
    with pytest.raises(DataError):
        failing(True)


def test_progress_survives_a_torn_line(tmp_path):
    path = tmp_path / "logs" / "progress.jsonl"
    with logs.Progress(logs.Log(tmp_path), tmp_path) as progress:
        progress.report(2, 64, 0.5)
    with path.open("a") as file:
        file.write('{"time_s": 1, "eve')
    with logs.Progress(logs.Log(tmp_path), tmp_path):
        pass
    from gigatrain.observe.tail import Tail

    rows, _ = Tail(path).rows()
    assert [row["event"] for row in rows] == ["start", "report", "end", "start", "end"]
    assert rows[1]["seconds"] == {"training": 0.5}


def test_an_error_of_the_user_is_in_the_log_without_a_traceback(tmp_path):
    def failing():
        with logs.Log(Path(tmp_path)) as log:
            log.own()
            raise DataError("mend it")

    with pytest.raises(DataError):
        failing()
    assert b"gigatrain: mend it\n" in text(tmp_path)
    assert b"Traceback" not in text(tmp_path)
    assert b"code 5\n" in text(tmp_path)


def refused(number, *, ours: type[GigatrainError] = RunError):
    try:
        try:
            raise OSError(number, "said")
        except OSError:
            raise ours("the checkpoint cannot be read") from None
    except ours as failure:
        return failure


@pytest.mark.parametrize(
    ("failure", "transient"),
    [
        (refused(errno.EIO), True),
        (refused(errno.ESTALE, ours=DataError), True),
        (refused(errno.ENOENT), False),
        (OSError(errno.ETIMEDOUT, "said"), True),
        (RunError("out of memory"), False),
    ],
)
def test_whether_a_cause_may_be_gone_the_next_time_is_recorded(tmp_path, monkeypatch, failure, transient):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    log = logs.Log(tmp_path)
    log.folder.joinpath("errors").mkdir(parents=True)
    log.owned = True
    assert log._failed(failure)["transient"] is transient
    assert json.loads(log.error.read_text())["transient"] is transient
