"""Signals at any moment: what a process does by itself, where ranks leave together, and whole runs that are told to leave at every phase."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import cast

import preempt
import pytest
from distributed import together

from gigatrain import leaving
from gigatrain.errors import REQUEUE


def ahead(rank, seed, ranks, who, most):
    """Main threads that run up to `most` boundaries ahead of the slowest; rank `who` hears."""
    from torch import distributed

    chance = random.Random(seed * 100 + rank)
    store = distributed.PrefixStore(f"leave-{seed}", distributed.distributed_c10d._get_default_store())
    with leaving.installed() as here, here.among(cast(leaving.Store, store), rank, ranks):
        here.steps()
        distributed.barrier()
        heard_at = chance.randrange(3, 30)
        for boundary in range(1, 10_000):
            if here.due():
                return boundary, here.signal
            store.set(f"at-{rank}", str(boundary))
            while boundary - min(int(store.get(f"at-{other}")) if store.check([f"at-{other}"]) else 0 for other in range(ranks)) >= most:
                time.sleep(0.001)
                if here.at is not None:
                    break
            time.sleep(chance.uniform(0, 0.004))
            if rank == who and boundary == heard_at:
                os.kill(os.getpid(), signal.SIGUSR1)
    raise AssertionError("it never left")


@pytest.mark.parametrize(("seed", "ranks", "who", "most"), [(1, 2, 1, 1), (2, 3, 0, 20), (3, 4, 2, 5)])
def test_ranks_that_run_ahead_of_each_other_leave_at_the_same_boundary(seed, ranks, who, most):
    found = together(ranks, ahead, seed, ranks, who, most)
    assert len(set(found)) == 1, found
    assert found[0][1] == "SIGUSR1"
    assert found[0][0] <= 30 + 2 * most + 200  # within what ranks do while three threads speak to a store


def at_the_start(rank, ranks):
    """Rank 0 has not begun its steps when another hears: all leave at once, from wherever they wait."""
    from torch import distributed

    store = distributed.PrefixStore("leave-start", distributed.distributed_c10d._get_default_store())
    with leaving.installed() as here:
        try:
            with here.among(cast(leaving.Store, store), rank, ranks):
                if rank:
                    here.steps()
                if rank == 1:
                    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                time.sleep(30)
        except leaving.Left as left:
            return left.code
    return "it slept"


def test_all_leave_at_once_if_one_is_still_at_the_start():
    assert together(3, at_the_start, 3) == [REQUEUE] * 3


PROGRAM = """
import signal, sys, threading, time, os
from gigatrain import leaving
with leaving.installed(last=True) as here:
    {body}
"""


def told(body, *numbers, after_s=0.5):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(body=body)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in numbers:
        time.sleep(after_s)
        process.send_signal(number)
    return process.communicate(timeout=30)[0], process.returncode


READY = "print('ready', flush=True); "


def test_at_the_start_it_leaves_at_once():
    assert told(READY + "time.sleep(60)", signal.SIGTERM) == ("", REQUEUE)


def test_a_thread_that_waits_in_c_does_not_keep_the_process(tmp_path):
    """A lock of C's that no signal interrupts: ctypes holds no lock of Python's, and its sleep goes on."""
    wait = "import ctypes; libc = ctypes.CDLL(None); "
    begin = time.monotonic()
    _, code = told(wait + READY + "[libc.usleep(900_000) for _ in range(60) if True]", signal.SIGUSR1)
    assert code == REQUEUE
    assert time.monotonic() - begin < 20
    body = "import ctypes; m = ctypes.create_string_buffer(64); libc = ctypes.CDLL(None); libc.pthread_mutex_lock(m); " + READY
    assert told(body + "libc.pthread_mutex_lock(m)", signal.SIGUSR1) == ("", REQUEUE)  # never comes back


def test_an_import_is_not_broken_off(tmp_path):
    """torch's C++ calls Python while it is imported, and an exception of ours there would abort the process."""
    (tmp_path / "slow.py").write_text(
        "import time\ntry:\n    time.sleep(2)\nexcept BaseException:\n    print('broken', flush=True)\n    raise\n"
    )
    body = f"sys.path.insert(0, {str(tmp_path)!r}); {READY} import slow; time.sleep(60)"
    assert told(body, signal.SIGTERM) == ("", REQUEUE)


def test_within_steps_nothing_ends_it_however_many_come():
    body = (
        "here.steps(); "
        + READY
        + "\n    while not here.due(): time.sleep(0.01)\n    time.sleep(1.5); print('saved', flush=True); here.saved(); here.leave()"
    )
    assert told(body, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, after_s=0.2) == ("saved\n", REQUEUE)


def test_after_the_last_save_it_leaves_at_once():
    assert told("here.steps(); here.saved(); " + READY + "time.sleep(60)", signal.SIGTERM) == ("", REQUEUE)


def test_a_signal_that_was_blocked_until_somebody_hears_is_heard():
    program = PROGRAM.format(body="time.sleep(60)")
    blocked = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.kill(os.getpid(), signal.SIGTERM); "
        f"os.execv(sys.executable, [sys.executable, '-c', {program!r}])"
    )
    assert subprocess.run([sys.executable, "-c", blocked], timeout=30, check=False).returncode == REQUEUE


@pytest.fixture
def recipe(tmp_path, corpus):
    from tinyrecipe import TINY

    path = tmp_path / "tiny.toml"
    path.write_text(TINY.format(corpus=corpus, cache=tmp_path / "runs" / "cache"))
    return path


@pytest.mark.long
@pytest.mark.parametrize(("seed", "ranks"), [(11, 1), (12, 2)])
def test_signals_at_any_moment_end_in_the_weights_of_an_undisturbed_run(recipe, tmp_path, seed, ranks):
    found = preempt.campaign(recipe, tmp_path / "runs", 4, seed, (ranks,))
    assert len(found) == 4


def test_every_phase_that_is_told_of_is_one_that_can_be_seen():
    assert set(preempt.PHASES) >= {"boot", "torch", "corpus", "build", "first save", "step", "validation", "save", "export", "sample"}
    assert Path(preempt.__file__).parent == Path(__file__).parent
