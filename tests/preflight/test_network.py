"""Real processes that meet over a real store and gloo: all well, one dead, one hung, one skewed, one of another version, one with another folder."""

import os
import signal
import socket
import threading
import time

import pytest
from distributed import together

from gigatrain.preflight import findings, network

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "kernel": "6.1"}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def node(rank, ranks, port, folder, faults):
    """One node's findings by name; `faults` is rank -> (what, value)."""
    what, value = faults.get(rank, (None, None))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    versions = VERSIONS | (value if what == "versions" else {})
    skew = value if what == "skew" else 0.0
    mine = network.Network(
        rank,
        ranks,
        f"n{rank}",
        versions,
        value if what == "folder" else folder,
        join_s=3.0,
        now=lambda: time.time() + skew,
        fit=what != "unfit",
    )
    if what == "dead":
        return {}
    checks = mine.checks()
    if (
        what == "hung"
    ):  # stopped by a signal once it has met, as a node whose kernel hangs; another process wakes it so that the test can end
        found, _ = findings.run(checks[:value], findings.Clock(60))
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGSTOP)
        return {one.name: one for one in found}
    waker = next((other for other, (fault, _) in faults.items() if fault == "hung"), None)
    begin = time.monotonic()
    found, hung = findings.run(checks, findings.Clock(60))
    took_s = time.monotonic() - begin
    if waker is not None and rank == max(set(range(ranks)) - {waker}):
        os.kill(int((folder / f"pid-{waker}").read_text()), signal.SIGCONT)
    return {one.name: one for one in found} | {"took_s": took_s, "hung": hung}


def met(ranks, folder, faults=None):
    return together(ranks, node, ranks, free_port(), folder, faults or {}, timeout_s=120)


def states(found):
    return {name: one.state for name, one in found.items() if isinstance(one, findings.Finding)}


def test_four_nodes_that_are_well_meet_and_measure_their_links(tmp_path):
    for found in met(4, tmp_path):
        assert set(states(found).values()) == {"ok"}, found
        assert list(states(found)) == ["rendezvous", "clock", "versions equal", "visible", "links", "latency", "all-reduce"]
        assert found["links"].value > 0
        assert found["took_s"] < 20
        assert not found["hung"]
    assert not list(tmp_path.iterdir())


def test_a_peer_that_never_comes_is_named_and_holds_nobody(tmp_path):
    found = met(4, tmp_path, {2: ("dead", None)})
    for rank in (0, 1, 3):
        assert "without rank 2, which never came" in found[rank]["rendezvous"].said
        assert set(states(found[rank]).values()) == {"ok"}, found[rank]
        assert "over 3 nodes" in found[rank]["all-reduce"].said


def test_a_peer_that_hangs_is_named_and_costs_the_others_seconds(tmp_path):
    found = met(4, tmp_path, {2: ("hung", 4)})
    for rank in (0, 1, 3):
        assert not found[rank]["hung"]
        assert found[rank]["links"].state == "ok", found[rank]
        assert "over 3 nodes" in found[rank]["all-reduce"].said, found[rank]
        assert found[rank]["took_s"] < 40
    assert "n2 does not answer" in found[1]["links"].said + found[3]["links"].said + found[0]["links"].said


def test_a_node_that_is_bad_already_stays_away_from_the_links(tmp_path):
    found = met(3, tmp_path, {1: ("unfit", None)})
    assert (found[1]["links"].state, found[1]["all-reduce"].state, found[1]["clock"].state) == ("untested", "untested", "ok")
    for rank in (0, 2):
        assert set(states(found[rank]).values()) == {"ok"}
        assert "over 2 nodes" in found[rank]["all-reduce"].said


def test_a_hung_host_of_the_meeting_leaves_the_others_with_an_end(tmp_path):
    found = met(3, tmp_path, {0: ("hung", 2)})
    for rank in (1, 2):
        assert states(found[rank])["rendezvous"] == "ok"
        assert states(found[rank])["all-reduce"] == "untested", found[rank]


@pytest.mark.parametrize(("skew", "state"), [(0.1, "ok"), (2.0, "warn"), (-30.0, "bad")])
def test_a_clock_that_differs_is_named_by_how_much(tmp_path, skew, state):
    found = together(3, clocks, 3, free_port(), tmp_path, {1: ("skew", skew)})
    assert [one.state for one in found] == ["ok", state, "ok"]
    assert found[1].value == pytest.approx(-skew, abs=0.05)
    assert ("ahead of" if skew > 0 else "behind") in found[1].said


def clocks(rank, ranks, port, folder, faults):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    skew = faults.get(rank, (None, 0.0))[1]
    mine = network.Network(rank, ranks, f"n{rank}", VERSIONS, None, join_s=5.0, now=lambda: time.time() + skew)
    met, clock, *_, leave = mine.checks()
    found, _ = findings.run([met, clock, leave], findings.Clock(60))
    return next(one for one in found if one.name == "clock")


def test_the_odd_version_is_named(tmp_path):
    found = met(3, tmp_path, {1: ("versions", {"torch": "2.12.1", "module nvidia": "550.1", "kernel": "6.2"})})
    assert [one["versions equal"].state for one in found] == ["ok", "bad", "ok"]
    said = found[1]["versions equal"].said
    assert "torch is 2.12.1, on 2 of 3 nodes 2.13.0" in said
    assert "module nvidia is 550.1, on 2 of 3 nodes none" in said
    two = met(2, tmp_path, {1: ("versions", {"torch": "2.12.1"})})
    assert [one["versions equal"].state for one in two] == ["warn", "warn"]  # of two nobody knows which is right


def test_a_node_with_another_folder_is_named(tmp_path):
    ours, other = tmp_path / "ours", tmp_path / "other"
    ours.mkdir()
    other.mkdir()
    found = met(4, ours, {1: ("folder", other)})
    assert [one["visible"].state for one in found] == ["ok", "bad", "ok", "ok"], found
    assert "is the same mounted" in found[1]["visible"].way_out.replace(str(other) + " the", "the")


def test_two_nodes_without_an_address_say_so(tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    found, _ = findings.run(network.Network(1, 2, "n1", VERSIONS, tmp_path).checks(), findings.Clock(10))
    assert {one.state for one in found} == {"untested"}
    assert "MASTER_ADDR=None" in found[0].said


def on_gpus(devices: int = 1, nic_gbit_s: float | None = 200.0):
    """A node that measured over eight GPUs, of which each accelerator has `devices`."""
    mine = network.Network(0, 2, "n0", VERSIONS, None, links=8, nic_gbit_s=nic_gbit_s, devices=devices)
    mine.members = mine.healthy = [0, 1]
    mine.names = {0: "n0", 1: "n1"}
    return mine


def test_what_the_network_should_give_counts_accelerators():
    assert on_gpus().wanted_gbyte_s == 200
    assert on_gpus(devices=2).wanted_gbyte_s == 100  # LUMI: eight devices, four cards
    assert on_gpus(nic_gbit_s=None).wanted_gbyte_s is None


def test_links_below_the_sites_figure_warn_at_most():
    for rate, state in ((190.0, "ok"), (140.0, "warn"), (20.0, "warn")):  # pairs of all nodes cross a tapered network at once
        found, _ = on_gpus()._links({"1": {"gbyte_s": rate, "latency_us": 20.0}}, [])
        assert found.state == state
    assert "the site's network gives 200 GB/s" in found.said


def test_an_all_reduce_is_told_and_never_held_against_a_node(monkeypatch):
    mine = on_gpus()
    monkeypatch.setattr(mine, "_group_measured", lambda *given: given[-1].update(all={"gbyte_s": 9.0}))
    found = mine.all_reduce()
    assert (found.state, found.value, found.limit) == ("ok", 9.0, 200.0)
    assert "the site's network gives 200 GB/s" in found.said


def test_pairs_may_take_as_long_as_gpus_need(monkeypatch):
    mine, limits = on_gpus(), []
    monkeypatch.setattr(mine, "_wait_for", lambda partner, turn: None)
    monkeypatch.setattr(mine, "_tell", lambda what, value: None)
    monkeypatch.setattr(mine, "_heard", lambda what, ranks, limit_s: {})
    monkeypatch.setattr(mine, "_told", lambda what, limit_s: [])
    mine.store = threading.local()
    mine.store.set = lambda name, value: None

    def measured(prefix, members, limit_s, name, results):
        limits.append(limit_s)
        results[name] = {"gbyte_s": 190.0, "latency_us": 20.0}

    monkeypatch.setattr(mine, "_group_measured", measured)
    assert mine.pairs()[0].state == "ok"
    assert limits == [mine.transfer_s]
    assert mine.transfer_s > network.TRANSFER_S


def test_a_part_that_fails_leaves_the_others_to_be_tested():
    mine = on_gpus()
    mine.met = True
    mine.clock = mine.equal = lambda: (_ for _ in ()).throw(ValueError("of no use"))
    found, _ = findings.run(mine.checks()[1:3], findings.Clock(10))
    assert [one.said.partition(" (")[0] for one in found] == ["ValueError: of no use"] * 2


def test_a_clock_that_cannot_be_asked_is_untested(monkeypatch):
    mine = network.Network(1, 2, "n1", VERSIONS, None)
    mine.address = "127.0.0.1"
    monkeypatch.setattr(mine, "_told", lambda what, limit_s: free_port())  # nobody listens there
    found = mine.clock()
    assert (found.state, "was not asked" in found.said) == ("untested", True)


def test_a_taken_port_is_named_by_rank_0(tmp_path, monkeypatch):
    with socket.create_server(("", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        found, _ = findings.run(network.Network(0, 2, "n0", VERSIONS, tmp_path).checks()[:1], findings.Clock(10))
        assert found[0].state == "bad"
        assert "cannot be bound" in found[0].said


@pytest.mark.parametrize("count", [2, 3, 4, 7, 16])
def test_everyone_meets_everyone_once_and_one_at_a_time(count):
    roster = [10 + place for place in range(count)]
    rounds = count - 1 + count % 2
    table = {rank: network.partners(roster, rank, rounds) for rank in roster}
    for turn in range(rounds):
        for rank in roster:
            partner = table[rank][turn]
            assert partner is None or table[partner][turn] == rank
    for rank in roster:
        assert sorted(partner for partner in table[rank] if partner is not None) == [one for one in roster if one != rank]


def test_a_clock_server_ends_with_its_socket():
    server = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=network._tells_time, args=(server, time.time), daemon=True)
    thread.start()
    offset, error = network._offset("127.0.0.1", server.getsockname()[1], time.time)
    assert abs(offset) <= error + 0.01
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)
    assert not thread.is_alive()
