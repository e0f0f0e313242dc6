"""Signals ask, they do not kill; refused steps stop the run only above the limit."""

import os
import signal

import pytest

from gigatrain import load
from gigatrain.errors import RunError
from gigatrain.observe.health import Health
from gigatrain.planning.plan import plan


@pytest.fixture
def health(tiny):
    return Health(plan(load.recipe(tiny, ["train.max_bad_steps=3"]), load.site("laptop")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_remembered_and_the_old_handler_put_back(health, number):
    before = signal.getsignal(number)
    with health:
        assert not health.wants_out
        os.kill(os.getpid(), number)
        assert health.wants_out
        assert health.signal == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_leaves_at_once(health):
    with health:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_limit_is_a_row_not_a_total(health):
    health.check_bad([50, 0, 2, 7], lambda step: "never asked")
    with pytest.raises(RunError, match=r"3 steps in a row, from step 7(.|\n)*train.max_bad_steps = 3(.|\n)*Data of step 7: some file"):
        health.check_bad([3, 3, 3, 7], lambda step: " some file")
