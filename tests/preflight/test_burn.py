"""Equal work on equal cores: equal to the bit, and one flipped bit is found whatever core and time it comes from."""

import threading
import time

import torch

from gigatrain.preflight import burn, gpu


def flip(place, repetition):
    """A hook of the burn that flips one bit of one result of one core."""

    def touch(core, turn, result):
        if core == place and turn in repetition:
            result.view(torch.int32)[3, 5] ^= 1

    return touch


def test_all_cores_agree_and_say_how_fast():
    facts = {}
    before = torch.get_num_threads()
    found = burn.burn_cpu(0.05, facts, size=64)
    assert found.state == "ok"
    assert isinstance(found.value, float)
    assert len(facts["digest"]) == 16
    again = {}
    burn.burn_cpu(0.05, again, size=64)
    assert again == facts  # what nodes are compared by does not depend on the moment
    assert torch.get_num_threads() == before


def test_a_bit_that_flips_once_is_found():
    found = burn.burn_cpu(0.05, {}, touch=flip(0, (1,)), size=64)
    assert (found.state, found.value, found.limit) == ("bad", 1, 0)
    assert "equal products differ from its first" in found.said
    assert "exclude the node" in found.way_out


def test_a_core_that_is_always_wrong_is_found_by_the_others():
    found = burn.burn_cpu(0.05, {}, touch=flip(0, range(1 << 20)), size=64)
    assert found.state == "bad"
    assert "its product is" in found.said


def test_slow_gpus_are_named_beside_their_neighbours_and_what_is_usual():
    assert burn._rates("device memory", [3000.0] * 7 + [2000.0]).said == "GPU 7: 2,000 GB/s, its neighbours 3,000"
    assert burn._rates("device memory", [2000.0] * 8, 3350).state == "warn"
    assert burn._rates("device memory", [3000.0] * 8, 3350).said == "3,000 to 3,000 GB/s over 8 GPUs; 3,350 are declared"


def test_gpus_far_from_the_buffer_are_said_and_not_judged():
    found = burn.noted("host to device", [55.0] * 4 + [38.0] * 4)
    assert (found.state, found.value, found.way_out) == ("ok", 38.0, "")
    assert "GPU 4: 38 GB/s, its neighbours 55" in found.said


def test_looks_that_were_never_taken_are_untested():
    assert burn.under_load([]).state == "untested"
    assert burn.under_load(gpu.loaded(3, lambda: False)).state == "untested"


def test_gpus_are_looked_at_while_they_work_and_not_before():
    working, found = threading.Event(), []

    def look(samples, wait):
        while len(found) < samples and wait():
            found.append(working.is_set())
        return []

    def work():
        time.sleep(0.2)  # CUDA starts
        assert not found
        working.set()
        time.sleep(1.0)

    burn.watched(0.2, working, work, look)
    assert found == [True] * 3
    found.clear()
    burn.watched(0.2, threading.Event(), lambda: time.sleep(0.1), look)  # it failed before it worked
    assert not found


def test_the_odd_one_is_named_where_most_agree():
    answers = [("aa", 10, 0, 1.0)] * 7 + [("bb", 10, 0, 1.0)]
    [found] = burn._unequal("GPU", range(8), answers)
    assert found.said == "GPU 7: its product is bb, 7 others agree on another"
    assert len(burn._unequal("GPU", range(2), [answers[0], answers[-1]])) == 2  # of two nobody knows which
    assert burn._judge_digest(answers) == "aa"


def test_what_needs_a_gpu_says_so_here():
    assert burn.seen("cpu").state == "untested"
    assert burn.seen("cuda").state == "bad"  # a build without CUDA on a site with GPUs
    without = [burn.burn_cuda(0.1, None, {}), burn.device_memory(), burn.gpu_links(), burn.host_to_device(), burn.kernel()]
    assert [one.state for one in without] == ["untested"] * 5
    assert isinstance(burn.host_memory().value, float)
    names = [check.name for check in burn.checks("cpu", True, burn.Usual(), {})]
    assert names == ["torch gpus", "burn", "kernel", "host memory"]
