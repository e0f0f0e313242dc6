"""The planner's published score: its data have sources, its arithmetic is right, the page shows what is stored, and the model has not got worse than that."""

import csv
import json
from statistics import median

import pytest
from programs import program

from gigatrain.planning import predict


@pytest.fixture(scope="module")
def score():
    return program("benchmarks/plan.py")


def pair(score, measured_s, predicted_s, width=1.1, **row):
    answer = dict.fromkeys(predict.NUMBERS) | {"refused": None, "fits": True}
    answer |= {"step_time_s": predicted_s, "low_s": predicted_s / width, "high_s": predicted_s * width}
    answer |= {key: row.pop(key) for key in ("memory_gib", "fits") if key in row}
    return score.Pair({"set": "a", "step_time_s": measured_s} | row, answer)


def test_every_measurement_has_its_source_and_no_source_is_in_two_sets_of_data(score):
    measured, further, power = score.measured(), score.further(), score.measured_power()
    assert (len(measured), len(further), len(power)) == (1772, 68, 86)
    for row in (*measured, *further, *power):
        assert row["source_repo"]
        assert row["source_path"]
        assert row["source_commit"]
        assert None not in row.values()
    assert len({row["id"] for row in (*measured, *further)}) == 1772 + 68
    assert not {row["set"] for row in measured} & {row["set"] for row in further}
    assert not {row["source_repo"] for row in measured} & {row["source_repo"] for row in further}


def test_seconds_are_read_from_whatever_a_row_tells(score):
    row = {"global_batch": 8, "seq_len": 1000, "n_gpus": 4}
    for told in ({"step_time_s": 2.0}, {"tokens_per_s": 4000}, {"tokens_per_s_per_gpu": 1000}, {"samples_per_s": 4}):
        assert score.seconds_of(row | told) == 2.0
    assert score.seconds_of(row | {"mfu_pct": 50}) is None
    assert score.gibibytes_of({"peak_mem": 2048, "peak_mem_unit": "MiB"}) == 2.0


def test_a_score_is_arithmetic(score):
    found = score.score([pair(score, 10, seconds) for seconds in (9, 10, 11, 10.5, 13, 10, 10, 10, 10, 20)])
    assert (found.rows, found.median, found.p90) == (10, pytest.approx(0.025), pytest.approx(0.3))
    assert (found.mean, found.bias) == (pytest.approx(0.155), pytest.approx(0.135))
    assert found.covered == pytest.approx(0.7)  # 9 x 1.1 is below 10, and 13 and 20 are far
    assert found.width == pytest.approx(1.21)
    assert score.score([]) is None


def test_orders_are_compared_by_kendalls_tau_with_ties(score):
    assert score.tau([(1, 10), (2, 20), (3, 30)]) == 1.0
    assert score.tau([(1, 30), (2, 20), (3, 10)]) == -1.0
    assert score.tau([(1, 10), (1, 20), (2, 30)]) == pytest.approx(2 / 6**0.5)
    assert score.tau([(1, 10), (1, 20)]) == 0.0


def test_regret_is_what_the_choice_costs(score):
    layouts = [(1.0, 12), (2.0, 11), (3.0, 13), (4.0, 14), (5.0, 15), (6.0, 10)]
    found = score.ranking([pair(score, measured, predicted, model="m") for predicted, measured in layouts])
    assert (found.groups, found.layouts) == (1, 6)
    assert found.regret == pytest.approx(0.2)
    assert found.regret_of_five == pytest.approx(0.1)
    assert score.ranking([pair(score, 1, 1)]) is None


def test_memory_counts_what_it_wrongly_says_fits(score):
    found = score.memory(
        [
            pair(score, 1, 1, peak_mem=40, peak_mem_unit="GiB", memory_gib=44.0, status="ok"),
            pair(score, None, 1, status="oom", fits=True),
            pair(score, None, 1, status="oom", fits=False),
            pair(score, 1, 1, status="ok", fits=False),
        ]
    )
    assert (found.rows, found.median) == (1, pytest.approx(0.1))
    assert (found.oom, found.false_fits, found.ran, found.false_full) == (2, 1, 2, 1)


def test_a_file_of_rows_is_scored_with_predictions_or_without(score, tmp_path, capsys):
    rows = score.further()[:9]
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    predict.predict_file(asked, answered)
    assert score.main([str(asked), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert score.main([str(asked), "--predictions", str(answered), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == alone
    assert alone["all rows"]["rows"] == sum(score.seconds_of(row) is not None for row in rows)
    answered.write_text("\n".join(answered.read_text().splitlines()[:3]))
    assert score.main([str(asked), "--predictions", str(answered)]) == 4
    assert "answers 6 of 9 rows not" in capsys.readouterr().err


def test_it_is_asked_for_something(score, capsys):
    with pytest.raises(SystemExit) as ended:
        score.main([])
    assert ended.value.code == 2
    assert "nothing is asked: a file of measurements" in capsys.readouterr().err


def test_every_published_row_is_answered_and_none_by_a_fault(score):
    for row in (*score.few(score.measured()), *score.further()):
        answer = predict.predict(row)
        assert answer["refused"] is None, (row["id"], answer["refused"])
        assert answer["low_s"] < answer["step_time_s"] < answer["high_s"]


def test_the_page_shows_what_is_stored(score):
    page = score.PAGE.read_text(encoding="utf-8")
    loso = [row for row in score.stored("plan_loso.csv") if row["group"] != score.CHECKED]
    assert score.between(page, "left out") == score.as_table(loso)
    assert score.between(page, "further") == score.as_table(score.stored("plan_further.csv"))
    assert {row["group"] for row in loso} >= {"MoE", "dense", "all rows"}


def test_the_planner_is_no_worse_on_what_it_has_not_seen_than_is_published(score):
    (stored,) = [row for row in score.stored("plan_loso.csv") if row["group"] == score.CHECKED]
    by_set, known = score.folds(), score.understood(score.few(score.measured()))
    assert len(known) == int(stored["rows"])
    errors = [abs(1 / score.math.exp(residual.log_ratio) - 1) for residual in score.residuals(known, by_set)]
    assert median(errors) <= float(stored["median"]) + 0.001, "worse: refit (benchmarks/plan.py --leave-one-out --write) or mend the model"


def test_results_say_what_made_them(score):
    for name in ("plan_loso.csv", "plan_further.csv"):
        with (score.RESULTS / name).open() as lines:
            for row in csv.DictReader(lines):
                assert row["commit"]
                assert row["python"]


def test_intervals_of_memory_are_those_of_the_rows_and_hold_nine_of_ten(score):
    rows = [row for row in (*score.measured(), *score.further()) if row.get("peak_mem")]
    peaks = score.plan_memory.peaks(rows)
    assert len(peaks) == len(rows)
    stored = json.loads(score.interval.LEARNT.read_text())["memory"]
    assert score.plan_memory.learnt(peaks) == pytest.approx(stored, rel=0.1), "the model moved: benchmarks/plan.py --write"
    by_set = {}
    for one in peaks:
        by_set.setdefault(one.source, []).append(abs(one.log_ratio) <= score.interval.memory_width(one.stack, stored))
    assert sum(sum(held) / len(held) for held in by_set.values()) / len(by_set) >= 0.9
    assert score.plan_memory.sentence(peaks).startswith("Intervals of memory")
    page = score.PAGE.read_text(encoding="utf-8")
    assert "Intervals of memory" in score.between(page, "memory, in words")
