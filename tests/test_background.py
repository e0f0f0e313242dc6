"""Saves in the background: the bytes of the step's end, whatever training does meanwhile; and whatever becomes of the process that writes, training goes on."""

import contextlib
import fcntl
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import together

from gigatrain import config
from gigatrain.checkpoint import Checkpoints, Saving, Writer, fill
from gigatrain.observe import reader, watch
from gigatrain.parallel.mesh import Mesh
from gigatrain.parallel.places import Piece, Place

SIZE = 400_000


def checkpoints(folder, ranks=1, rank=0, keep=2, **more):
    return Checkpoints(
        Path(folder), run="r", plan_sha256="p", keep=keep, mesh=Mesh(config.Mesh(shard=ranks), rank) if ranks > 1 else None, **more
    )


def process(run) -> Any:
    """The process that writes, begun if it was not."""
    run.saving.writer._start()
    return run.saving.writer._process


class Told:
    """A run's side of Saving: a live state that steps change, and what was said."""

    def __init__(self, folder, ranks=1, rank=0, **more):
        self.ranks, self.rank, self.said, self.events = ranks, rank, [], []
        self.tensor = torch.zeros(SIZE)
        self.saves = checkpoints(folder, ranks, rank, **more)
        tell = lambda event, **more: self.events.append((event, more))  # noqa: E731
        self.saving = Saving(self.saves, background=True, say=self.said.append, tell=tell)

    def state(self):
        place = Place((SIZE * self.ranks,), (0,), (SIZE * self.ranks,)).cut(0, SIZE * self.rank, SIZE)
        return {"weights": {"w": Piece(self.tensor, place)}, "random": {"cpu": Piece.whole(torch.tensor([7]), writes=self.rank == 0)}}

    def step(self, number, *, saves=True, must=False, hurried=False):
        """One step, and its save; the state then changes at once, as the next step would."""
        self.saving.before_change()
        self.tensor.fill_(number)
        if saves:
            self.saving.save(number, self.state, {"at": number}, must=must, hurried=hurried)
        self.tensor.fill_(-1)

    def report(self):
        self.saving.meet(self.saves.mesh.sum(torch.tensor(self.saving.numbers())).tolist())

    def settled(self, limit_s=60.0):
        """Report until nothing is in flight. Ranks report as often as each other."""
        end = time.monotonic() + limit_s
        while (self.saving._flight or self.saving._busy) and time.monotonic() < end:
            time.sleep(0.02)
            self.report()
        assert self.saving._flight is None, self.saving.writer.doing


def of(folder, ranks=1):
    """Step and value of what the loader finds; every element is compared."""
    found, refused = checkpoints(folder).latest()
    assert refused == []
    live = torch.zeros(SIZE * ranks)
    fill(found, {"weights": {"w": Piece.whole(live)}, "random": {"cpu": Piece.whole(torch.tensor([0]))}})
    assert live.eq(found.step).all()
    assert found.state == {"at": found.step}
    return found.step


def _changing(rank, folder, ranks):
    run = Told(folder, ranks, rank, keep_every=4)
    with run.saving:
        for number in range(1, 8):
            run.step(number)
            run.report()
        run.settled()
        assert run.said == []
        steps = [more["step"] for event, more in run.events if event == "saved"]
        assert run.saves.steps() == [4, 6, 7]
        row = run.events[-1][1]
        assert row["stall_s"] > 0
        if rank == 0:
            assert row["bytes"] > 4 * SIZE * ranks
            assert row["gbyte_s"] > 0
        run.step(8, must=True)
        return steps


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_saved_bytes_are_those_of_the_step_and_none_is_left_out(tmp_path, ranks):
    """P11, and what stays: the newest two and multiples of four."""
    found = together(ranks, _changing, str(tmp_path), ranks) if ranks > 1 else [_changing(0, tmp_path, 1)]
    assert found == [[1, 2, 3, 4, 5, 6, 7]] * ranks
    assert of(tmp_path, ranks) == 8
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"step-{step:08d}" for step in (4, 7, 8)}


def test_both_forms_write_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    state = {
        "weights": {"a": Piece.whole(torch.randn(7, 3).t()), "b": Piece.whole(torch.zeros(0, 3))},
        "optimizer": {"n": Piece.whole(torch.tensor(3))},
    }
    checkpoints(tmp_path / "one").save(5, state, {"x": 1})
    with Saving(checkpoints(tmp_path / "two"), background=True) as saving:
        saving.save(5, lambda: state, {"x": 1})
        assert saving._settled(30)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "checkpoints/step-00000005").iterdir()} for name in ("one", "two")
    )
    assert one == two


def _unsaved(rank, folder, ranks, what):
    """A save that fails on the last rank, then one that does not."""
    run = Told(folder, ranks, rank)
    run.step(1, must=True)
    with run.saving:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == ranks - 1 and what == "EFBIG":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            run.saving.writer._start()  # with this limit
        if rank == ranks - 1 and what == "SIGKILL":
            process(run).send_signal(signal.SIGSTOP)  # else it may be faster than we are
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        run.step(2)
        if rank == ranks - 1 and what == "SIGKILL":
            process(run).kill()
        run.settled()
        assert len(run.said) == 1, run.said
        if rank == ranks - 1 and what == "EFBIG":
            run.saving.writer.kill()  # the next begins without the limit
        steps = run.saves.steps()
        run.step(3)
        run.settled()
        return run.said, steps, run.saves.steps(), [event for event, _ in run.events]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("what", ["EFBIG", "SIGKILL"])
def test_a_save_that_fails_on_a_rank_is_said_by_all_and_the_next_goes_through(tmp_path, ranks, what):
    found = together(ranks, _unsaved, str(tmp_path), ranks, what) if ranks > 1 else [_unsaved(0, tmp_path, ranks, what)]
    said = found[0][0][0]
    text = "EFBIG, File too large" if what == "EFBIG" else "the process that writes checkpoints"
    assert said.startswith("CHECKPOINT NOT SAVED: ")
    assert text in said
    assert "step 2 could not be saved" in said
    assert "earlier ones are untouched; training goes on" in said
    assert all(one[0] == found[0][0] for one in found)
    assert found[0][1:] == ([1], [1, 3], ["not saved", "saved"])
    assert of(tmp_path, ranks) == 3
    assert not list((tmp_path / "checkpoints").glob(".writing-*"))


def test_a_process_that_stands_still_holds_nothing_up(tmp_path, monkeypatch):
    """As on a disk that does not answer: due saves are left out and said to be; it goes on, and its checkpoint is whole."""
    monkeypatch.setattr("gigatrain.checkpoint.saving.WAIT_S", (0.2, 0.2))
    run = Told(tmp_path)
    with run.saving:
        pid = process(run).pid
        os.kill(pid, signal.SIGSTOP)
        run.step(1)
        began = time.monotonic()
        for number in (2, 3, 4):
            run.step(number)
            run.report()
        assert time.monotonic() - began < 20
        assert [f"step {number}: the save of step 1 has not ended" in line for number, line in zip((2, 3, 4), run.said, strict=True)] == [
            True
        ] * 3
        assert run.saves.steps() == []
        os.kill(pid, signal.SIGCONT)
        run.settled()
        assert of(tmp_path) == 1
        run.step(5)
        run.settled()
        assert of(tmp_path) == 5
        assert run.saving.totals.left_out == 3


def test_a_process_that_is_stuck_for_long_is_ended_and_replaced(tmp_path):
    run = Told(tmp_path)
    with run.saving:
        run.saving.writer.stuck_s = 0.3
        process(run).send_signal(signal.SIGSTOP)
        run.step(1)
        run.settled()
        assert "it did nothing for" in run.said[0]
        run.saving.writer.stuck_s = 60
        run.step(2)
        run.settled()
    assert of(tmp_path) == 2


def test_the_last_save_does_not_wait_for_one_that_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr("gigatrain.checkpoint.saving.LAST_S", 0.2)
    run = Told(tmp_path)
    with run.saving:
        process(run).send_signal(signal.SIGSTOP)
        run.step(1)
        run.step(2, must=True, hurried=True)
        assert "step 1: it had not ended" in run.said[0]
        assert of(tmp_path) == 2
    assert not list((tmp_path / "checkpoints").glob(".writing-*"))


def test_the_last_save_waits_for_one_that_is_slow_where_nobody_hurries(tmp_path, monkeypatch):
    monkeypatch.setattr("gigatrain.checkpoint.saving.LAST_S", 0.1)
    run = Told(tmp_path)
    with run.saving:
        process(run).send_signal(signal.SIGSTOP)
        run.step(1)
        threading.Timer(0.7, process(run).send_signal, (signal.SIGCONT,)).start()
        run.step(2, must=True)
        assert not run.said
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000001", "step-00000002"]


_TRAINER = """
import sys, time, torch
from gigatrain.checkpoint import Checkpoints, Saving
from gigatrain.parallel.places import Piece
from pathlib import Path
saving = Saving(Checkpoints(Path(sys.argv[1]), run="r", plan_sha256="p", keep=2), background=True)
saving.writer._start()
saving.save(1, lambda: {"weights": {"w": Piece.whole(torch.ones(1 << 22))}}, {})
print(saving.writer._process.pid, flush=True)
if sys.argv[2] == "ends":
    sys.exit()
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "ends"])
def test_nothing_is_left_when_the_trainer_ends(tmp_path, how):
    """The process beside it is gone, and with it the memory, which has no name."""
    trainer = subprocess.Popen([sys.executable, "-c", _TRAINER, str(tmp_path), how], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    if how != "ends":
        trainer.send_signal(signal.Signals[how])
    trainer.wait(60)
    end = time.monotonic() + 20
    while time.monotonic() < end and _lives(pid):
        time.sleep(0.02)
    assert not _lives(pid)


def _lives(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_without_memory_it_is_said_and_saves_hold_training_up(tmp_path, monkeypatch):
    monkeypatch.setattr("gigatrain.checkpoint.background._free_bytes", lambda: 1000)
    run = Told(tmp_path)
    with run.saving:
        run.step(1)
        assert "not in the background: staging needs" in run.said[0]
        assert of(tmp_path) == 1
        run.step(2)
        assert len(run.said) == 1
    assert of(tmp_path) == 2


def test_a_writer_alone_writes_a_checkpoint_of_one_rank(tmp_path):
    """What a near tier builds on: any folder, one rank, an outcome with hashes."""
    writer = Writer()
    try:
        tensors = {"w": torch.arange(10.0)}
        staged = writer.stage({"weights-00003.safetensors": (tensors, {"format": "pt"})})
        tensors["w"].zero_()
        writer.write(staged, tmp_path / "near" / "step-00000009", texts={"state.json": "{}"}, manifest={"step": 9})
        with pytest.raises(AssertionError, match="one job at a time"):
            writer.stage({})
        found = writer.outcome(30)
        assert found is not None
        assert found.why is None
        assert set(found.files) == {"weights-00003.safetensors", "state.json"}
        from safetensors.torch import load_file

        assert torch.equal(load_file(tmp_path / "near/step-00000009/weights-00003.safetensors")["w"], torch.arange(10.0))
        assert (tmp_path / "near/step-00000009/COMMITTED").is_file()
    finally:
        writer.close()


# ---- Real disks: full, read-only, broken, frozen ----


@contextlib.contextmanager
def mounted(folder, *arguments):
    folder.mkdir(exist_ok=True)
    if os.geteuid() != 0 or subprocess.run(["mount", *arguments, str(folder)], check=False, capture_output=True).returncode:
        pytest.skip(f"cannot mount here: {' '.join(arguments)}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def block(tmp_path, megabytes, backing=None):
    """An ext2 or ext4 on a loop device; `backing`: where its file lies."""
    image = (backing or tmp_path) / "image"
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    kind = "ext4" if backing is None else "ext2"
    made = subprocess.run([f"mkfs.{kind}", "-q", "-F", str(image)], check=False, capture_output=True)
    if made.returncode:
        pytest.skip(f"mkfs.{kind} does not work here")
    with mounted(tmp_path / "disk", "-o", "loop", str(image)) as disk:
        yield disk


def goes_on(run, disk, text, free):
    """A save fails in words, the one before stays, and once the disk works again (`free`) the next is made."""
    run.step(2)
    run.settled()
    assert text in run.said[0], run.said
    assert run.saves.steps() == [1]
    assert of(disk) == 1
    free()
    run.step(3)
    run.settled()
    assert len(run.said) == 1, run.said
    assert of(disk) == 3


def test_a_full_disk_is_said_and_saved_again_once_there_is_room(tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=5m", "tmpfs") as disk:
        run = Told(disk)
        with run.saving:
            run.step(1, must=True)
            (disk / "ballast").write_bytes(b"x" * 2_000_000)
            goes_on(
                run,
                disk,
                "MiB free; free some, or lower checkpoint.keep; earlier ones are untouched; training goes on",
                (disk / "ballast").unlink,
            )


def test_a_disk_that_fills_up_within_a_save_is_said(tmp_path, monkeypatch):
    """As with a quota: what was free before is not at the write."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=5m", "tmpfs") as disk:
        run = Told(disk)
        with run.saving:
            run.step(1, must=True)
            (disk / "ballast").write_bytes(b"x" * 2_500_000)
            begin: Any = run.saves.begin
            monkeypatch.setattr(run.saves, "begin", lambda *given: begin(*given[:5], 0, given[6]))  # needs nothing, it says
            goes_on(run, disk, "ENOSPC, No space left on device", (disk / "ballast").unlink)


def test_a_disk_that_became_read_only_is_said(tmp_path):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=9m", "tmpfs") as disk:
        run = Told(disk)

        def again(mode):
            subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)

        with run.saving:
            run.step(1, must=True)
            again("ro")
            goes_on(run, disk, "EROFS, Read-only file system", lambda: again("rw"))


def test_a_device_that_is_full_shows_when_files_are_synced(tmp_path):
    """A device whose own disk is full takes bytes into memory and fails at the sync, where many writers never look."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=4m", "tmpfs") as small, block(tmp_path, 40, small) as disk:
        run = Told(disk)
        with run.saving:
            run.step(1, must=True)
            os.sync()
            (small / "ballast").write_bytes(b"x" * (os.statvfs(small).f_bavail * 4096 - 300_000))
            run.step(2)
            run.settled()
            assert "ENOSPC, No space left on device" in run.said[0]
            assert run.saves.steps() == [1]


def test_a_disk_that_breaks_is_said_and_what_was_there_is_there_when_it_is_mended(tmp_path):
    """EIO from every call, as of a lost device: ext4 is told to shut down."""
    with block(tmp_path, 40) as disk:
        run = Told(disk)
        with run.saving:
            run.step(1, must=True)
            folder = os.open(disk, os.O_RDONLY)
            try:
                fcntl.ioctl(folder, 0x8004587D, struct.pack("I", 2))  # EXT4_IOC_SHUTDOWN, without a last flush of its log
            except OSError:
                pytest.skip("this ext4 cannot be shut down")
            finally:
                os.close(folder)
            run.step(2)
            run.settled()
            assert "EIO, Input/output error" in run.said[0]
            subprocess.run(["umount", str(disk)], check=True)
            subprocess.run(["mount", "-o", "loop", str(tmp_path / "image"), str(disk)], check=True)
            assert of(disk) == 1
            run.step(3)
            run.settled()
            assert len(run.said) == 1
            assert of(disk) == 3


def test_a_frozen_disk_holds_no_step_up(tmp_path, monkeypatch):
    """fsfreeze: whoever writes waits, and cannot even be killed. The run goes on, and its saves once the disk does."""
    monkeypatch.setattr("gigatrain.checkpoint.saving.WAIT_S", (0.2, 0.2))
    with block(tmp_path, 40) as disk:
        run = Told(disk)
        with run.saving:
            run.step(1, must=True)
            if subprocess.run(["fsfreeze", "-f", str(disk)], check=False).returncode:
                pytest.skip("no fsfreeze here")
            try:
                began = time.monotonic()
                for number in (2, 3, 4):
                    run.step(number)
                    run.report()
                    time.sleep(0.1)
                assert time.monotonic() - began < 20
                assert len(run.said) == 2
                assert "step 3: the save of step 2 has not ended" in run.said[0]
            finally:
                subprocess.run(["fsfreeze", "-u", str(disk)], check=True)
            run.settled()
            assert of(disk) == 2
            run.step(5)
            run.settled()
            assert of(disk) == 5


def test_a_run_says_what_its_saves_cost_and_ends_with_the_same_weights(tiny, tmp_path):
    """The whole loop, both ways."""
    from test_loop import trained

    found = {}
    for background in ("true", "false"):
        folder = tmp_path / background
        summary = found[background] = trained(
            tiny, folder, f"checkpoint.background={background}", "checkpoint.every=2", "checkpoint.keep=3", "checkpoint.keep_every=4"
        )
        rows = [json.loads(line) for line in (folder / "logs" / "progress.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["event"] == "saved"] == ([2, 4, 6, 8, 10] if background == "true" else [])
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {f"step-{step:08d}" for step in (4, 8, 10, 12)}
        assert summary["checkpoint"]["saves"] == (5 if background == "true" else 0)
    assert found["true"]["weights_sha256"] == found["false"]["weights_sha256"]
    seen = reader.Reader(tmp_path / "true").seen()
    assert seen["checkpoint"]["stall_share"] > 0
    assert any(title == "checkpoint" and "training stood" in text for title, text, _ in watch.lines(seen))
    told = found["true"]["checkpoint"]
    assert told["stall_s"] > 0
    assert told["gbyte_s"] > 0
    assert (told["failed"], told["left_out"]) == (0, 0)
