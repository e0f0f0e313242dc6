"""The scoring door answers every row with the same keys, by a number or a reason, and never by what was measured."""

import json

import pytest

from gigatrain.errors import PlanError
from gigatrain.planning import predict
from gigatrain.planning.estimate import energy

ROW = {
    "id": "a", "gpu": "H100-SXM-80GB", "gpu_mem_gb": 80, "gpus_per_node": 8, "n_gpus": 16, "framework": "Megatron-LM", "precision": "bf16",
    "model": "Llama-3-8B", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "ffn": 14336, "glu": True, "vocab": 128256,
    "tied_embeddings": False, "pos_emb": "rope", "seq_len": 8192, "tp": 2, "pp": 1, "cp": 1, "sharding": "distributed optimizer", "zero_stage": 1,
    "micro_batch": 1, "global_batch": 128, "act_ckpt": "none",
}  # fmt: skip
KEYS = ["id", *predict.NUMBERS, "refused"]


def test_a_row_is_answered_with_every_key_and_its_interval():
    found = predict.predict(ROW)
    assert list(found) == KEYS
    assert found["refused"] is None
    assert found["low_s"] < found["step_time_s"] < found["high_s"]
    assert found["tokens_per_s_per_gpu"] == pytest.approx(128 * 8192 / found["step_time_s"] / 16, rel=1e-4)
    assert found["memory_gib"] > 0
    assert found["fits"] in (True, False)
    assert 8 * 400 < found["node_power_w"] < 11_000
    air, immersed = (predict.predict(ROW | {"server_note": note})["node_power_w"] for note in ("air cooled", "immersion cooling"))
    assert immersed < found["node_power_w"] < air
    assert found["limits"]


def test_what_was_measured_changes_no_answer():
    told = ROW | dict.fromkeys(predict.MEASURED, 1.0) | {"status": "oom", "peak_mem_unit": "GiB"}
    assert predict.predict(told) == predict.predict(ROW)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpu": "Abacus"}, "Abacus"),
        ({"gpu": None}, "gpu"),
        ({"precision": "int3"}, "int3"),
        ({"layers": "many"}, "layers"),
        ({"layers": None}, "layers"),
        ({"hidden": 0}, "0 channels"),
        ({"tp": 3}, "tp 3"),
        ({"seq_len": -1}, "seq_len"),
        ({"n_gpus": None}, "n_gpus"),
        ({"mla": "yes"}, "mla"),
        ({"layers": 10**30}, "no row has more"),
    ],
)
def test_a_row_that_means_nothing_is_refused_by_name(change, reason):
    found = predict.predict(ROW | change)
    assert list(found) == KEYS
    assert found["id"] == "a"
    assert all(found[name] is None for name in predict.NUMBERS)
    assert reason in found["refused"]
    assert predict.FAULT not in found["refused"]


def test_strange_values_end_in_a_reason_and_never_in_an_exception():
    for key in ROW:
        for value in (None, "", "?", 0, -3, 1e300, True, [], {}, "ünknown", 10**30):
            found = predict.predict(ROW | {key: value})
            assert list(found) == KEYS
            assert (found["step_time_s"] is None) == (found["refused"] is not None), (key, value)
    for row in (None, 3, "x", [ROW], {}):
        assert predict.predict(row)["refused"]


def test_a_file_is_answered_line_by_line_and_the_same_each_time(tmp_path):
    source, first, second = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "again.jsonl"))
    lines = [json.dumps(ROW), "", "{torn", "[1, 2]", '{"id": "n", "layers": NaN}', "[" * 100_000, json.dumps(ROW | {"id": 7, "gpu": "TPU"})]
    source.write_bytes("\n".join(lines).encode() + b'\n{"id": "\xff"}\n')
    summary = predict.predict_file(source, first)
    answers = [json.loads(line) for line in first.read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["a", None, None, None, None, 7, "\ufffd"]
    assert "line 3 is no JSON" in answers[1]["refused"]
    assert "NaN is no number" in answers[3]["refused"]
    assert "nested" in answers[4]["refused"]
    assert (summary.rows, summary.predicted, summary.faults) == (7, 1, 0)
    assert "1 of 7 rows predicted" in str(summary)
    predict.predict_file(source, second)
    assert first.read_bytes() == second.read_bytes()


def test_strict_refuses_what_was_never_measured():
    beyond = ROW | {"gpu": "MI300X", "gpu_mem_gb": 192}
    assert predict.predict(beyond)["refused"] is None
    assert "mi300x" in predict.predict(beyond, strict=True)["refused"]


def test_files_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(PlanError, match=r"nowhere\.jsonl"):
        predict.predict_file(tmp_path / "nowhere.jsonl", tmp_path / "out.jsonl")
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(ROW))
    with pytest.raises(PlanError, match="overwritten"):
        predict.predict_file(source, source)
    with pytest.raises(PlanError, match="none/out"):
        predict.predict_file(source, tmp_path / "none" / "out.jsonl")


@pytest.mark.parametrize(
    ("gpu", "each", "least", "most"), [("GB200", 4, 3_000, 6_500), ("GB300", 4, 3_500, 7_500), ("GH200", 4, 1_600, 4_300)]
)
def test_nodes_of_superchips_have_watts(gpu, each, least, most):
    found = predict.predict(ROW | {"gpu": gpu, "gpu_mem_gb": None, "gpus_per_node": each})["node_power_w"]
    assert least < found < most


def test_a_node_that_is_used_in_part_is_a_node():
    one, two, eight = (
        predict.predict(ROW | {"n_gpus": count, "tp": 1, "global_batch": 8, "act_ckpt": "full"})["node_power_w"] for count in (1, 2, 8)
    )
    server = energy.server()
    most, idle = 700.0, energy.POWER["idle"].value * 700.0
    lowest = (0.6 * most + 7 * idle + 8 * server.rest.value) * (1 + server.fans.value) / server.efficiency.value
    assert lowest < one < two < eight
    assert one < lowest + 0.4 * most * (1 + server.fans.value) / server.efficiency.value
    twelve = predict.predict(ROW | {"n_gpus": 12, "tp": 1, "global_batch": 96, "act_ckpt": "full"})["node_power_w"]
    assert two < twelve < eight  # the mean of two nodes with six each
