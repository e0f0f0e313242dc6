"""Alternating rounds: a gate that holds a training loop and keeps its losses."""

import io
import json
import sys

import pytest
import torch
from programs import program


@pytest.fixture(scope="module")
def rounds():
    return program("benchmarks/rounds.py")


def test_a_gate_times_rounds_and_keeps_every_loss(rounds, monkeypatch):
    orders = [{"skip": 0, "steps": 2}, {"skip": 1, "steps": 2}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(order) + "\n" for order in orders)))
    pipe = io.StringIO()
    gate = rounds.Gate(pipe, "cpu")
    lasts = []
    for number in range(5):
        gate.begin()
        lasts.append(gate.last)
        gate.mark()
        for half in (0.5, 1.5):  # two microbatches
            gate.add(torch.tensor(number * half), 0.5)
    with pytest.raises(rounds.Over):
        gate.begin()
    assert lasts == [False, True, False, False, True]
    ready, *answers = [json.loads(line) for line in pipe.getvalue().splitlines()]
    assert ready["device"]
    assert "torch" in ready["versions"]
    assert [answer["losses"] for answer in (ready, *answers)] == [[], [0, 1], [2, 3, 4]]
    assert [len(answer["intervals"]) for answer in answers] == [2, 2]  # of timed steps only
