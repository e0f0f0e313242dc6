"""The step benchmark: that everybody does the same mathematics, that a failure is a line and not the end, and what it refuses. No timing is asserted."""

import csv
import json

import pytest
import torch
from programs import program

from gigatrain.data.loader import Batches


@pytest.fixture(scope="module")
def step():
    return program("benchmarks/step.py")


def run(step, capsys, *words):
    """(exit status, the JSON it prints or None, what it says)."""
    status = step.main(["--json", *map(str, words)])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else None, err


# Rows of unequal length in two microbatches, so that a mean of means shows; rate, decay and clip so large that another schedule, another order of betas,
# an embedding that does not decay or another clip moves the loss by far more than the tolerance.
HARD = [
    "data.packing=document",
    "train.microbatch=2",
    "optim.lr=1e-2",
    "optim.weight_decay=5.0",
    "optim.clip=0.3",
    "optim.betas=[0.8, 0.95]",
]


@pytest.mark.long
def test_trainer_in_fp32_has_the_losses_of_gigatrain_and_a_failure_is_a_line(step, tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(step.PROVIDERS, "broken", None)  # here, but not in its worker
    sets = [word for key in HARD for word in ("--set", key)]
    sizes = ["--warmup", 2, "--rounds", 2, "--settle", 1, "--steps", 3, "--precision", "fp32"]
    names = ["--providers", "broken,gigatrain,trainer,trainer-bf16,torchtitan"]
    out = tmp_path / "step.csv"
    status, found, said = run(step, capsys, "--recipe", tiny, *sets, *sizes, *names, "--out", out)
    assert status == 0
    assert found
    ours, theirs = found["losses"]["gigatrain"], found["losses"]["trainer"]
    assert len(ours) == len(theirs) == 2 + 2 * (1 + 3)
    assert all(abs(a - b) < 1e-4 * a for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
    assert ours[-1] < ours[0] - 0.1

    rows = {row["provider"]: row for row in found["rows"]}
    assert list(rows) == ["gigatrain", "trainer"]
    row = rows["trainer"]
    assert row["max_loss_difference"] == max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert row["ratio_to_trainer"] == row["ratio_to_best_trainer"] == 1.0
    half = 0.5e-4  # of rounded numbers: on a slow machine a tiny model's rate has one digit
    least, most = ((row["tflops"] + off) / (row["ceiling_tflops"] - off) for off in (-half, half))
    assert 100 * least - 0.01 <= row["mfu_pct"] <= 100 * most + 0.01
    assert row["steps"] == len(ours)
    assert row["peak_mib"] > 0
    with out.open(newline="") as file:
        assert [line["provider"] for line in csv.DictReader(file)] == ["gigatrain", "trainer"]
    with pytest.raises(step.RunError, match=r"other columns \(mfu_pct\)"):
        step.append([{key: value for key, value in row.items() if key != "mfu_pct"}], out)

    assert list(found["failed"]) == ["broken", "trainer-bf16", "torchtitan"]
    assert "broken FAILED: KeyError: 'broken'" in said
    step.show(found)
    shown = capsys.readouterr().out
    assert all(
        name in shown for name in ("gigatrain", "trainer", "broken: KeyError", "trainer-bf16: bf16 weights", "torchtitan: no adapter")
    )


def test_random_rows_are_one_document_of_the_whole_vocabulary(step, tiny, tmp_path):
    planned = step.plan(step.load.recipe(tiny), step.load.site("laptop"))
    corpus = step._random_corpus(tmp_path / "random", planned, 5)
    batches = Batches(corpus, sequence=planned.sequence, packing="stream", batch=planned.batch, seed=0, prefetch=0)
    parts = [batches.make(position).microbatches[0] for position in range(0, 5 * planned.batch, planned.batch)]
    assert all(part.documents is None for part in parts)
    tokens = torch.cat([part.tokens for part in parts])
    assert tokens.min() >= 0
    assert tokens.max() < 320
    assert len(tokens.unique()) > 200


def test_a_processor_without_bf16_products_is_said(step, tiny, monkeypatch):
    def planned(precision):
        return step.plan(step.load.recipe(tiny, [f"train.precision={precision}"]), step.load.site("laptop"))

    monkeypatch.setattr("gigatrain.kernels.widened.needed", lambda: True)
    assert "no bf16 products" in step.handicap(planned("bf16"))
    assert step.handicap(planned("fp32")) is None
    monkeypatch.setattr("gigatrain.kernels.widened.needed", lambda: False)
    assert step.handicap(planned("bf16")) is None


def test_what_the_peers_cannot_share_is_refused(step, tiny, capsys, tmp_path):
    for words, message in (
        (["--providers", "gigatrain,trianer"], "there is no provider 'trianer'; did you mean \"trainer\"?"),
        (["--providers", "matmul"], "there is no provider 'matmul'"),
        (["--set", "loss.z_loss=1e-4"], "loss.z_loss 0.0001 has no counterpart"),
        (["--set", "train.microbatch=3"], "train.batch 4 is no multiple of train.microbatch 3"),
        (["--rounds", "100"], "exceed the recipe's 12"),
        (["--settle", "-1"], "--settle at least 0"),
    ):
        status, found, said = run(step, capsys, "--recipe", tiny, "--out", tmp_path / "none.csv", *words)
        assert (status, found) == (7, None)
        assert message in said
    assert not (tmp_path / "none.csv").exists()
