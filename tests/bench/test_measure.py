"""The measuring itself: what a timer times, what rotates, in which order, and how errors are counted. No duration is bounded from above."""

import contextlib
import itertools
import math
import time

import pytest
import torch

from gigatrain.bench import measure
from gigatrain.bench.measure import Calls, Cpu, Errors


def test_a_known_sleep_lasts_as_long_as_it_does():
    on = Cpu()
    assert on.seconds(lambda: time.sleep(0.004), 3) >= 0.004  # of each call, not of all


def test_the_memory_of_a_known_copy_is_counted():
    on, large = Cpu(), torch.randn(1 << 23)
    assert on.peak_bytes(large.clone) == 32 << 20
    assert (64 << 20) <= on.peak_bytes(lambda: torch.exp(large * 2)) < (65 << 20)
    assert on.peak_bytes(lambda: None) == 0


def test_calls_rotate_over_the_sets_and_each_result_lives_until_its_set_comes_round():
    calls = Calls(lambda index: [index], 3)
    seen = []
    for _ in range(7):
        calls()
        seen.append([None if kept is None else kept[0] for kept in calls.kept])
    assert seen[0] == [0, None, None]
    assert seen[3] == [0, 1, 2]
    assert calls.next == 1
    before = calls.kept[0]
    calls.next = 0
    calls()
    assert calls.kept[0] is not before
    calls.forget()
    assert calls.kept == [None] * 3


@pytest.mark.parametrize(
    ("bytes_per_set", "cache", "free", "expected"),
    [
        (10, 100, 1 << 30, 30),
        (301, 100, 1 << 30, 1),  # one set is colder than the cache already
        (7, 100, 1 << 30, 43),
        (10, 100, 16 * 40, 4),  # a sixteenth of the memory
        (10, 100, 0, 1),
        (1, 1 << 30, 1 << 40, measure.MOST_SETS),
    ],
)
def test_so_many_sets_that_the_cache_holds_a_third_of_them(bytes_per_set, cache, free, expected):
    assert measure.sets(bytes_per_set, cache, free) == expected


def test_calls_that_are_timed_together():
    assert measure.repeats(0.001, 0.003, 1, 100) == 3
    assert measure.repeats(0.5, 0.003, 1, 100) == 1
    assert measure.repeats(1e-6, 0.003, 1, 100) == 100
    assert measure.repeats(0.5, 0.003, 7, 100) == 7  # a graph holds every set once
    assert measure.repeats(0.0, 0.003, 1, 100) == 100


def test_providers_take_turns_and_each_goes_first():
    order, ticks = [], itertools.count()

    def timer(name):
        def timed():
            order.append(name)
            return float(next(ticks))

        return timed

    found = measure.interleaved({name: timer(name) for name in "abc"}, 4)
    assert "".join(order) == "abcbcacababc"
    assert found["a"] == [0, 5, 7, 9]
    assert measure.interleaved({}, 4) == {}


def test_the_middle_and_its_neighbours():
    assert measure.spread(list(range(101))) == (50, 20, 80)
    assert measure.spread([3.0]) == (3.0, 3.0, 3.0)
    assert math.isnan(measure.spread([1.0, math.nan])[0])


def test_the_floor_is_the_longer_of_moving_and_computing():
    assert measure.floor_s(8e9, 1e12, 4e12, 8e14) == (0.002, "bytes")
    assert measure.floor_s(4e9, 1.6e12, 4e12, 8e14) == (0.002, "flops")
    seconds, bound = measure.floor_s(0, 0, 4e12, 8e14)
    assert (math.isnan(seconds), bound) == (True, "")


class Small(Cpu):
    def free_bytes(self):
        return 64 << 20


@pytest.mark.long
def test_ceilings_are_rates_of_this_device():
    bytes_per_s, flops_per_s = measure.ceilings(Small())
    assert bytes_per_s > 1e7
    assert flops_per_s > 1e7


def test_a_cpu_has_a_name_a_cache_and_no_graph():
    on = measure.device()
    assert isinstance(on, Cpu)
    assert on.name
    assert on.cache_bytes >= 1 << 20
    assert isinstance(on.graph(lambda: None, 1), str)
    assert on.sound()
    assert on.state() == {}


def test_a_failure_is_one_line():
    assert measure.reason(torch.OutOfMemoryError("CUDA out of memory. Tried\nto")) == "out of memory"
    assert measure.reason(ValueError("a\nb")) == "ValueError: a"
    assert measure.reason(RuntimeError()) == "RuntimeError"


def test_errors_are_relative_to_the_tensor_and_to_plain_torch():
    exact = torch.randn(100, dtype=torch.float64)
    plain, ours = (exact * (1 + error) for error in (1e-3, 3e-3))
    errors = Errors()
    errors.add([exact], [plain.float()], [ours.float()])
    assert errors.largest == pytest.approx(3e-3, rel=1e-3)
    assert errors.ratio() == pytest.approx(3, rel=1e-3)


def test_an_error_below_half_a_rounding_counts_as_that_much():
    exact = torch.ones(100, dtype=torch.float64)
    errors = Errors()
    errors.add([exact], [exact.bfloat16()], [(exact * (1 + 2**-8)).float().bfloat16()])  # plain torch is exact by luck
    assert errors.ratio() <= 2
    errors.add([exact], [exact.bfloat16()], [(exact * (1 + 2**-6)).float().bfloat16()])
    assert errors.ratio() > 2


def test_few_numbers_are_judged_together_and_a_nan_is_never_right():
    exact = torch.ones(3, dtype=torch.float64)
    errors = Errors()
    for case in range(2):
        errors.add([exact], [exact.float()], [exact.float() + case], case)
    assert errors.ratio(pooled=False) == 0
    assert errors.ratio() > 1e5
    errors.add([exact], [exact.float()], [exact.float() * math.nan], 2)
    assert errors.ratio() == math.inf
    assert math.isnan(errors.largest)


def test_what_is_exactly_zero_is_judged_by_its_neighbours():
    exact = [torch.ones(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)]
    errors = Errors()
    errors.add(exact, [e.float() for e in exact], [exact[0].float(), exact[1].float() + 1e-9])
    assert errors.largest == pytest.approx(1e-9)


def test_what_is_rounded_by_contract_has_no_ratio_but_a_difference():
    same = torch.randn(64).bfloat16()
    errors = Errors()
    errors.add([same], [same], [same * 2])
    assert not errors.judged
    assert errors.largest == pytest.approx(1)


def test_another_shape_is_refused():
    errors = Errors()
    with pytest.raises(ValueError, match=r"tensor 0 of the result has shape \(2,\), not \(3,\)"):
        errors.add([torch.ones(3).double()], [torch.ones(3)], [torch.ones(2)])
    with pytest.raises(ValueError, match="longer|shorter"):
        errors.add([torch.ones(3).double()], [torch.ones(3)], [])


def test_the_outcome_is_outputs_and_gradients_and_inputs_stay_as_they_are():
    def scaled(x, w, unused):
        x.data.mul_(1)  # what a rude peer writes to is a copy
        return x * w, (x * w).detach()

    x, w, unused = torch.randn(5), torch.randn(5), torch.randn(5)
    grads = [torch.full((5,), 2.0).double(), torch.ones(5).double()]
    outputs = measure.outcome(lambda f, *tensors: f(*tensors), scaled, [x, w, unused], grads, True)
    y, detached, dx, dw, none = outputs
    torch.testing.assert_close(y, x * w)
    torch.testing.assert_close(detached, x * w)
    torch.testing.assert_close(dx, 2 * w)
    torch.testing.assert_close(dw, 2 * x)
    assert not none.any()
    assert not x.requires_grad
    exact = measure.outcome(lambda f, *tensors: f(*tensors), scaled, [x, w, unused], grads, True, torch.float64)
    assert {e.dtype for e in exact} == {torch.float64}


def test_an_operation_without_gradients_leaves_the_tensors_that_it_moved():
    x, count = torch.ones(4), torch.tensor([3])
    found = measure.outcome(lambda f, *tensors: f(*tensors), lambda x, count: x.add_(count), [x, count], [], False)
    assert [f.tolist() for f in found] == [[4.0] * 4, [4.0] * 4, [3]]
    assert x.tolist() == [1.0] * 4


def test_drawing_moves_nobody_elses_random_numbers():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with measure.seeded(1):
        first = torch.randn(3)
    assert torch.equal(torch.randn(3), expected)
    with measure.seeded(1):
        assert torch.equal(torch.randn(3), first)


# ---- The GPU's side, with a stand-in for what only a GPU has: order of calls, not time ----


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class Properties:
    name, L2_cache_size, uuid, major, minor = "NVIDIA X1", 50 << 20, "0123-45", 9, 0


@pytest.fixture
def gpu(monkeypatch):
    """`measure.Cuda` over a driver that notes what it is asked; `log` is that."""
    log = []

    class Graph:
        def capture_begin(self, pool):
            log.append(("begin", pool))

        def capture_end(self):
            log.append(("end",))

        def replay(self):
            log.append(("replay",))

    stand_ins = {
        "current_device": lambda: 0,
        "get_device_properties": lambda index: Properties,
        "Stream": lambda: "stream",
        "stream": contextlib.nullcontext,
        "graph_pool_handle": lambda: "pool",
        "synchronize": lambda: None,
        "Event": Event,
        "CUDAGraph": Graph,
        "set_sync_debug_mode": lambda mode: log.append(("sync", mode)),
        "mem_get_info": lambda: (1000, 4000),
        "memory_reserved": lambda: 500,
        "memory_allocated": lambda: 200,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 900,
        "empty_cache": lambda: log.append(("empty",)),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    on = measure.Cuda()
    return on, log


def test_a_graph_holds_so_many_calls_after_one_that_may_not_wait(gpu):
    on, log = gpu
    calls = []
    timer = on.graph(lambda: calls.append(len(log)), 3)
    assert log == [("sync", "error"), ("sync", "default"), ("begin", "pool"), ("end",), ("replay",)]
    assert calls == [1, 3, 3, 3]  # one under watch, three within the capture
    assert timer() >= 0
    assert log[-1] == ("replay",)
    assert on.whole
    assert on.sound() is False  # there is no CUDA in this torch


def test_who_waits_for_the_device_has_no_graph_and_breaks_none(gpu):
    on, log = gpu

    def waits():
        raise RuntimeError("called a synchronizing CUDA operation")

    assert on.graph(waits, 3) == "it waits for the device within a call"
    assert log == [("sync", "error"), ("sync", "default")]
    assert on.whole


def test_another_failure_is_not_taken_for_a_wait(gpu):
    on, log = gpu
    with pytest.raises(RuntimeError, match="some other"):
        on.graph(lambda: (_ for _ in ()).throw(RuntimeError("some other")), 3)
    assert log[-1] == ("sync", "default")


def test_a_capture_that_breaks_off_says_so_and_retires_the_process(gpu):
    on, log = gpu
    calls = iter([None])

    def once():
        try:
            next(calls)
        except StopIteration:
            raise RuntimeError("operation not permitted when stream is capturing") from None

    found = on.graph(once, 3)
    assert found == "no capture: RuntimeError: operation not permitted when stream is capturing"
    assert ("end",) in log
    assert not on.whole


def test_memory_of_a_gpu_is_what_the_allocator_has_and_the_driver_left(gpu):
    on, log = gpu
    assert (on.name, on.cache_bytes) == ("NVIDIA X1", 50 << 20)
    assert on.free_bytes() == 1000 + 500 - 200
    assert on.peak_bytes(lambda: None) == 700
    on.forget()
    assert log == [("empty",)]


def test_clocks_and_power_are_read_where_they_can_be(gpu, monkeypatch):
    import pynvml

    on, _ = gpu

    def unsupported(*_):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    stand_ins = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetClockInfo": lambda handle, which: {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 3201}[which],
        "nvmlDeviceGetPowerUsage": lambda handle: 654321,
        "nvmlDeviceGetTemperature": unsupported,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(pynvml, name, stand_in)
    assert on.state() == {"sm_mhz": 1980, "mem_mhz": 3201, "watts": 654.321}
    assert on._handle == "GPU-0123-45"
    monkeypatch.setattr(pynvml, "nvmlInit", unsupported)
    assert measure.Cuda().state() == {}
