"""The machine around the GPUs, from made trees of /sys and /proc, and this machine itself."""

import socket

import pytest

from gigatrain.preflight import findings, host


def made_port(root, name="mlx5_0", number=1, state="4: ACTIVE", rate="400 Gb/sec (4X NDR)", **counters):
    folder = root / f"sys/class/infiniband/{name}/ports/{number}"
    (folder / "counters").mkdir(parents=True)
    for file, value in {"state": state, "phys_state": "5: LinkUp", "rate": rate, "link_layer": "InfiniBand"}.items():
        (folder / file).write_text(value + "\n")
    for counter in host.MANY:
        (folder / "counters" / counter).write_text(f"{counters.get(counter, 0)}\n")
    return folder


def test_healthy_ports_say_their_rate(tmp_path):
    for index in range(8):
        made_port(tmp_path, f"mlx5_{index}", link_downed=0)
    found = host.cards(tmp_path, 400)
    assert (found.state, found.said) == ("ok", "8 InfiniBand or RoCE ports active at 400 Gbit/s, no errors")


@pytest.mark.parametrize(
    ("given", "state", "words"),
    [
        ({"state": "1: DOWN"}, "bad", "mlx5_3:1 is 1: DOWN"),
        ({"rate": "200 Gb/sec (4X HDR)"}, "bad", "mlx5_3:1 runs at 200 Gbit/s, 400 are wanted"),
        ({"link_downed": 30}, "warn", "mlx5_3:1 counted 30 link_downed"),
        ({"link_downed": 2}, "ok", "no errors"),  # a switch was restarted
        ({"symbol_error": 900_000}, "warn", "900,000 symbol_error"),
        ({"symbol_error": 10}, "ok", "no errors"),
    ],
)
def test_each_fault_of_a_port_is_named(tmp_path, given, state, words):
    for index in range(3):
        made_port(tmp_path, f"mlx5_{index}")
    made_port(tmp_path, "mlx5_3", **given)
    found = host.cards(tmp_path, 400, 4)
    assert (found.state, words in found.said) == (state, True), found


def test_a_slower_second_card_is_said_and_no_fault(tmp_path):
    for index in range(4):
        made_port(tmp_path, f"mlx5_{index}")
    made_port(tmp_path, "mlx5_storage", rate="100 Gb/sec (4X EDR)")
    found = host.cards(tmp_path, 400, 4)
    assert (found.state, "4 InfiniBand or RoCE ports active at 400" in found.said, "mlx5_storage:1 runs at 100" in found.said) == (
        "ok",
        True,
        True,
    )
    assert host.cards(tmp_path, 400, 5).state == "bad"  # one of the five is slow
    assert host.cards(tmp_path).state == "warn"  # nobody says how many there should be
    assert host.cards(tmp_path, 800, 4).state == "warn"  # the site says what no port has


def test_a_name_on_the_loopback_warns_where_others_must_reach_it(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert host.ports().state == "ok"
    found = host.ports(2)
    assert (found.state, "the loopback" in found.said) == ("warn", True)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert host.ports(2).state == "ok"


def test_ports_slower_than_the_site_says_warn(tmp_path):
    made_port(tmp_path, rate="200 Gb/sec (4X HDR)")
    assert "the site says 400" in host.cards(tmp_path, 400).said
    assert host.cards(tmp_path, 200).state == "ok"
    assert host.cards(tmp_path).state == "ok"


def test_errors_that_grow_while_the_doctor_works_warn(tmp_path):
    folder = made_port(tmp_path, link_downed=2)
    before = host.counters(tmp_path)
    assert before["mlx5_0:1 link_downed"] == 2
    assert host.grown(before, tmp_path).said == f"none of {len(host.MANY)} error counters grew"
    (folder / "counters/link_downed").write_text("3\n")
    (folder / "counters/symbol_error").write_text("40\n")
    found = host.grown(before, tmp_path)
    assert (found.state, found.said) == ("warn", "mlx5_0:1 link_downed +1, mlx5_0:1 symbol_error +40")
    assert host.grown({}, tmp_path).state == "untested"


def test_ethernet_counts_where_there_is_no_infiniband(tmp_path):
    card = tmp_path / "sys/class/net/eth0"
    (card / "device").mkdir(parents=True)
    (card / "statistics").mkdir()
    for file, value in {"operstate": "up", "carrier": "1", "speed": "100000", "statistics/rx_crc_errors": "0"}.items():
        (card / file).write_text(value)
    assert host.cards(tmp_path).said == "no InfiniBand (/sys/class/infiniband); eth0 is up at 100 Gbit/s"
    (card / "statistics/rx_crc_errors").write_text("5000")
    assert host.cards(tmp_path).state == "warn"


def test_memory_errors_and_missing_memory_are_named(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100000000 kB\nMemAvailable: 90000000 kB\n")
    assert host.memory(tmp_path).state == "ok"
    controller = tmp_path / "sys/devices/system/edac/mc/mc1"
    controller.mkdir(parents=True)
    (controller / "ue_count").write_text("2\n")
    assert "mc1: 2 uncorrected memory errors" in host.memory(tmp_path).said
    (controller / "ue_count").write_text("0\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 100000000 kB\nMemAvailable: 9000000 kB\n")
    assert host.memory(tmp_path).state == "warn"


def test_versions_name_the_drivers_modules(tmp_path):
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    (tmp_path / "sys/module/nvidia/version").write_text("580.65.06\n")
    found = host.versions(tmp_path)
    assert found["module nvidia"] == "580.65.06"
    assert {"python", "torch", "gigatrain", "kernel"} <= set(found)
    assert found == host.versions(tmp_path)


def test_this_machine_passes_and_a_taken_port_is_named(tmp_path):
    found, hung = findings.run([*host.checks("cpu"), findings.Check("torch", host.imported, 60)], findings.Clock(60))
    assert not hung
    assert not [one for one in found if one.state == "bad"], found
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        taken = host.bindable(port)
        assert (taken.state, taken.way_out) == ("bad", "another job's? choose another MASTER_PORT")
    assert host.bindable(port).state == "ok"
