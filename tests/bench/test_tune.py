"""Tuning: what is asked for, what is refused, what wins and how it is written. Kernels run interpreted; only the GPU's clock is missing, and is made up."""

import json

import pytest
import torch

from gigatrain.bench import kernels, measure, tune
from gigatrain.bench.measure import Cpu
from gigatrain.errors import KernelError
from gigatrain.kernels import launch, ops


def test_a_tuner_hears_what_the_tables_are_asked_for():
    with launch.observed() as outer:
        launch.configuration(torch.ones(1), "rms_norm.forward", 1024)
        with launch.observed() as inner:
            launch.configuration(torch.ones(1), "rms_norm.backward", 99)
        launch.configuration(torch.ones(1), "rms_norm.forward", 1)
    launch.configuration(torch.ones(1), "rms_norm.forward", 2)
    assert inner == [("rms_norm.backward", 99)]
    assert outer == [("rms_norm.forward", 1024), ("rms_norm.forward", 1)]


def test_forward_and_backward_are_heard_apart(monkeypatch):
    operation = ops.OPERATIONS["rms_norm"]
    heard = tune.heard(operation, (4, (64,), "llama", 1.0, torch.float32), "cpu")
    assert heard == {"forward": [("rms_norm.forward", 64)], "backward": [("rms_norm.backward", 64)]}
    sizes = [(4, (channels,), "llama", 1.0, torch.float32) for channels in (64, 64, 128)]
    monkeypatch.setitem(ops.OPERATIONS, "rms_norm", kernels.replace(operation, sizes=sizes))
    found = tune.targets("rms_norm", "cpu")
    assert [(target.kernel, target.size, target.mode) for target in found] == [
        (f"rms_norm.{mode}", size, mode) for size in (64, 128) for mode in ("forward", "backward")
    ]


def test_every_space_is_a_list_of_configurations_for_a_kernel_that_has_a_table():
    spaces = tune.spaces()
    assert {"rms_norm.forward", "rms_norm.backward"} <= set(spaces)
    shipped = launch.table("default")["configs"]
    for kernel, candidates in spaces.items():
        assert candidates
        assert kernel in shipped
        assert all(set(candidate) == set(candidates[0]) for candidate in candidates)


def test_results_are_the_same_within_one_rounding():
    exact = torch.randn(1000)
    assert tune.same([exact], [exact]) is None
    narrow = exact.bfloat16()
    assert tune.same([narrow], [(exact * (1 + 2**-10)).bfloat16()]) is None
    assert "off by" in (tune.same([narrow], [(exact * 1.05).bfloat16()]) or "")
    assert "off by nan" in (tune.same([exact], [exact * float("nan")]) or "")
    assert tune.same([torch.tensor([1])], [torch.tensor([2])]) == "tensor 0 differs"


class Clock:
    """Seconds per configuration, and for how often each was asked."""

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, dict.fromkeys(seconds, 0)

    def timer(self, name):
        def timed():
            self.asked[name] += 1
            return self.seconds[name]

        return timed


def test_the_fastest_of_the_final_wins():
    clock = Clock({f"c{i}": 1.0 + i / 10 for i in range(9)})
    best, seconds = tune.select(clock.seconds, clock.timer, "c8")
    assert best == "c0"
    assert set(seconds) == {"c0", "c1", "c2", "c3", "c4", "c8"}  # the first few, and the shipped one
    assert set(clock.asked.values()) == {0, tune.ROUNDS}


def test_the_shipped_one_stays_unless_another_is_faster_than_luck():
    for other, expected in ((0.99, "shipped"), (0.97, "other"), (1.5, "shipped")):
        clock = Clock({"shipped": 1.0, "other": other})
        assert tune.select(clock.seconds, clock.timer, "shipped")[0] == expected


def test_a_lucky_screening_does_not_decide():
    truth = Clock({"shipped": 1.0, "lucky": 1.2})
    assert tune.select({"shipped": 1.0, "lucky": 0.5}, truth.timer, "shipped")[0] == "shipped"


def test_a_new_kernel_of_a_table_takes_over_the_sizes_that_served_it(tmp_path):
    path = tmp_path / "nvidia-x.json"
    path.write_text(json.dumps({"found": "by hand", "configs": {"other.forward": {"1": {"warps": 2}}}}))
    served = {"128": {"rows": 32, "warps": 4}, "16384": {"rows": 1, "warps": 16}}
    tune.record(path, "rms_norm.forward", 4096, {"rows": 2, "warps": 8}, {"us": 1.5, "before": {"warps": 4}}, served)
    tune.record(path, "rms_norm.forward", 128, {"rows": 16, "warps": 4}, {"us": 2.5}, {"7": {"rows": 7}})
    held = json.loads(path.read_text())
    assert held["configs"] == {
        "other.forward": {"1": {"warps": 2}},
        "rms_norm.forward": {"128": {"rows": 16, "warps": 4}, "4096": {"rows": 2, "warps": 8}, "16384": {"rows": 1, "warps": 16}},
    }
    assert held["measured"]["rms_norm.forward"]["4096"] == {"us": 1.5, "before": {"warps": 4}}
    assert "measured" in held["found"]
    assert served == {"128": {"rows": 32, "warps": 4}, "16384": {"rows": 1, "warps": 16}}  # what it was taken from stays
    assert '      "4096": {"rows": 2, "warps": 8},' in path.read_text().splitlines()
    assert list(tmp_path.iterdir()) == [path]


def test_the_table_is_what_launches_read(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    tune.record(tmp_path / "default.json", "one.forward", 64, {"warps": 2}, {}, {"4096": {"warps": 8}})
    x = torch.ones(1)
    assert launch.configuration(x, "one.forward", 100) == {"warps": 2}
    tune.record(tmp_path / "default.json", "one.forward", 64, {"warps": 1}, {}, {})
    assert launch.configuration(x, "one.forward", 100) == {"warps": 1}
    assert launch.configuration(x, "one.forward", 5000) == {"warps": 8}
    launch.table.cache_clear()
    launch._nearest.cache_clear()


class Fake(Cpu):
    """A GPU whose clock says that two rows per program are best, and that four do not fit."""

    most_calls = 4

    def graph(self, calls, count):
        calls()
        rows = launch.configuration(torch.ones(1), "rms_norm.forward", 64)["rows"]
        return lambda: {1: 3e-6, 2: 1e-6, 8: 2e-6}.get(rows, 5e-6)


@pytest.fixture
def target():
    return tune.Target("rms_norm.forward", 64, "rms_norm", (5, (64,), "llama", 1.0, torch.float32), "forward")


def test_configurations_are_checked_then_timed_and_who_fails_is_said(target, monkeypatch):
    said = []
    wrong = tune.Tuner.result

    def result(self, configuration):
        found = wrong(self, configuration)
        if configuration["rows"] == 16:
            found[0] = found[0] * 1.1
        if configuration["rows"] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(tune.Tuner, "result", result)
    monkeypatch.setattr(measure, "_last_cache_bytes", lambda: 1 << 12)
    tuner = tune.Tuner(Fake(), target)  # type: ignore[arg-type]
    candidates = [{"rows": rows, "warps": 4} for rows in (1, 2, 4, 8, 16)]
    best, evidence = tuner.tune(candidates, said.append)
    assert best == {"rows": 2, "warps": 4}
    assert evidence["us"] == 1
    assert evidence["tried"] == 4  # 1, 2, 8 and the shipped
    assert evidence["refused"] == 2
    assert sum("out of memory" in text for text in said) == 1
    assert sum("off by 0.1" in text for text in said) == 1


def test_a_configuration_that_breaks_the_device_is_named(target, monkeypatch):
    shipped = launch.configuration(torch.ones(1), target.kernel, target.size)
    right = tune.Tuner.result

    def result(self, configuration):
        if configuration != shipped:
            raise RuntimeError("CUDA error: an illegal memory access")
        return right(self, configuration)

    monkeypatch.setattr(tune.Tuner, "result", result)
    on = Fake()
    monkeypatch.setattr(on, "sound", lambda: False)
    monkeypatch.setattr(measure, "_last_cache_bytes", lambda: 1 << 12)
    with pytest.raises(KernelError, match=r"rms_norm.forward at 64 with \{'rows': 77, 'warps': 4\} broke the device; take it out of SPACE"):
        tune.Tuner(on, target).tune([{"rows": 77, "warps": 4}], lambda _: None)  # type: ignore[arg-type]


def test_without_a_gpu_there_is_nothing_to_tune():
    with pytest.raises(
        KernelError, match="tuning measures, and there is no GPU here; without one the configurations of tables/default.json"
    ):
        tune.tune(["rms_norm"], None, lambda _: None)
