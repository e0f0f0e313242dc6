"""The node's meter: pm_counters as files, a BMC as a real HTTP(S) server, ipmitool as a program that prints what the real one prints."""

import contextlib
import json
import os
import shutil
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gigatrain.errors import PowerError
from gigatrain.power import node, redfish

PLACE = ("node17",)
USER, PASSWORD = "meter-reader", "s3cret: with, signs"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Seconds become tenths, and no account of the machine's own is used."""
    monkeypatch.setattr(node, "UPDATE_S", 0.2)
    for name in list(os.environ):
        if name.startswith("GIGATRAIN_REDFISH_"):
            monkeypatch.delenv(name)


def until(what, seconds=10.0):
    """The first true answer of `what`; a meter that is silent for now has none."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(PowerError):
            if answer := what():
                return answer
        time.sleep(0.01)
    raise AssertionError("did not come about")


# ---- HPE Cray pm_counters


def counters(sysfs: Path, **numbers: Any) -> Path:
    folder = sysfs / "cray" / "pm_counters"
    folder.mkdir(parents=True, exist_ok=True)
    units = {"energy": " J 1764172831123456 us", "power": " W 1764172831123456 us"}  # "\S+ J \S+ us" in ReFrame's test of ARCHER2
    for name, number in numbers.items():
        (folder / name).write_text(f"{number}{units.get(name, '')}\n")
    return folder


FULL = {"energy": 123_456_789, "power": 2431, "freshness": 900, "startup": 1_700_000_000, "generation": 4, "version": 2, "raw_scan_hz": 10}


def test_pm_counters_give_joules_and_watts_of_the_node(tmp_path):
    counters(tmp_path, **FULL)
    meter, notes = node.source("auto", tmp_path, PLACE)
    assert meter is not None
    assert notes == []
    assert (meter.place, meter.scope, meter.update_s, meter.wrap_mj) == (PLACE, "node", 0.1, None)
    sample = meter.read()
    assert (sample.counter_mj, sample.milliwatts) == (123_456_789_000, 2_431_000)
    meter.close()


def test_what_is_of_two_rounds_is_read_again(tmp_path):
    folder = counters(tmp_path, **FULL)
    meter = node.PmCounters(folder, PLACE)
    plain = meter._files["energy"]

    class Late:
        """The controller comes round between the joules and the watts."""

        path, close, rounds = plain.path, plain.close, 0

        def number(self):
            joules = plain.number()
            if self.rounds < 2:
                self.rounds += 1
                counters(tmp_path, energy=joules + 250, power=2431 + self.rounds, freshness=900 + self.rounds)
            return joules

    meter._files["energy"] = Late()  # type: ignore[assignment]
    sample = meter.read()
    assert (sample.counter_mj, sample.milliwatts) == (123_457_289_000, 2_433_000)


def test_a_controller_that_never_stands_still_or_hangs_is_an_error(tmp_path, monkeypatch):
    folder = counters(tmp_path, **FULL)
    meter = node.PmCounters(folder, PLACE)
    monkeypatch.setattr(node, "STUCK_S", 0.02)
    time.sleep(0.03)
    with pytest.raises(PowerError, match="freshness has stood at 900 .*hangs"):
        meter.read()
    counters(tmp_path, freshness=901)
    meter.read()


def test_a_controller_that_began_anew_begins_at_0(tmp_path):
    folder = counters(tmp_path, **FULL)
    meter = node.PmCounters(folder, PLACE)
    counters(tmp_path, startup=1_700_009_999, energy=999_999_999, freshness=1)  # by chance more than before
    assert meter.read().counter_mj == 0
    counters(tmp_path, energy=1_000_000_100, freshness=2)
    assert meter.read().counter_mj == 101_000


def test_pm_counters_that_are_asked_for_and_not_there_are_an_error(tmp_path):
    with pytest.raises(PowerError, match=r'power.node = "pm_counters": .*cray/pm_counters/energy.*"auto"'):
        node.source("pm_counters", tmp_path, PLACE)
    counters(tmp_path, **(FULL | {"energy": ""}))
    with pytest.raises(PowerError, match="energy holds"):
        node.source("pm_counters", tmp_path, PLACE)


def test_none_is_none_and_auto_says_what_it_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)  # this machine may have an ipmitool
    assert node.source("none", tmp_path, PLACE) == (None, [])
    meter, notes = node.source("auto", tmp_path, PLACE)
    assert meter is None
    assert [any(word in note for note in notes) for word in ("pm_counters", "GIGATRAIN_REDFISH_URL", "ipmitool")] == [True] * 3


# ---- Redfish


class Bmc(ThreadingHTTPServer):
    """A Redfish service with one account."""

    daemon_threads = True

    def __init__(self, objects: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.objects = objects
        self.sessions: set[str] = set()
        self.gives_sessions = True
        self.free = threading.Event()  # while it is not set, nothing is answered
        self.free.set()
        self.asked: list[tuple[str, str]] = []
        self.begun = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    server: Bmc  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer: else the second waits 40 ms for the first to be acknowledged

    def log_message(self, *_: Any) -> None: ...

    def _say(self, status: int, body: Any = None, **headers: str) -> None:
        text = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    def _knows(self) -> bool:
        import base64

        both = f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"
        return self.headers.get("X-Auth-Token") in self.server.sessions or self.headers.get("Authorization") == both

    def do_GET(self) -> None:
        self.server.asked.append(("GET", self.path))
        self.server.free.wait(30)
        if self.path != "/redfish/v1/" and not self._knows():
            return self._say(401)
        found = self.server.objects.get(self.path)
        if isinstance(found, tuple):
            return self._say(found[0], None, **found[1])
        return self._say(404) if found is None else self._say(200, found)

    def do_POST(self) -> None:
        self.server.asked.append(("POST", self.path))
        account = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.server.gives_sessions:
            return self._say(405)
        if account != {"UserName": USER, "Password": PASSWORD}:
            return self._say(401)
        self.server.begun += 1
        token = f"token-{self.server.begun}"
        self.server.sessions.add(token)
        return self._say(201, {}, X_Auth_Token=token, Location=f"{self.path}/{self.server.begun}")

    def do_DELETE(self) -> None:
        self.server.asked.append(("DELETE", self.path))
        if self._knows():
            self.server.sessions.discard(self.headers["X-Auth-Token"])
            return self._say(204)
        return self._say(401)


def at(path: str) -> dict[str, str]:
    return {"@odata.id": f"/redfish/v1/{path}"}


def chassis(
    name: str, *, systems=(), contains=(), within: str | None = None, env: Any = None, power: Any = None, kind="RackMount"
) -> dict[str, Any]:
    """The objects of one chassis, as DMTF's schemas Chassis 1.24, EnvironmentMetrics 1.3 and Power 1.7 have them."""
    path = f"Chassis/{name}"
    links: dict[str, Any] = {
        "ComputerSystems": [at(f"Systems/{one}") for one in systems],
        "Contains": [at(f"Chassis/{one}") for one in contains],
    }
    if within is not None:
        links["ContainedBy"] = at(f"Chassis/{within}")
    one: dict[str, Any] = {**at(path), "@odata.type": "#Chassis.v1_24_0.Chassis", "Id": name, "ChassisType": kind, "Links": links}
    objects = {f"/redfish/v1/{path}": one}
    if env is not None:
        one["EnvironmentMetrics"] = at(f"{path}/EnvironmentMetrics")
        objects[f"/redfish/v1/{path}/EnvironmentMetrics"] = env
    if power is not None:
        one["Power"] = at(f"{path}/Power")
        objects[f"/redfish/v1/{path}/Power"] = power
    return objects


def service(*all_chassis: dict[str, Any]) -> dict[str, Any]:
    objects: dict[str, Any] = {
        "/redfish/v1/": {**at(""), "Chassis": at("Chassis"), "Links": {"Sessions": at("SessionService/Sessions")}},
    }
    for one in all_chassis:
        objects |= one
    names = [next(iter(one)).rpartition("/")[2] for one in all_chassis]
    # in two pages, as some services give them
    first: dict[str, Any] = {"Members": [at(f"Chassis/{name}") for name in names[:1]]}
    objects["/redfish/v1/Chassis"] = first
    if names[1:]:
        first["Members@odata.nextLink"] = "/redfish/v1/Chassis?$skip=1"
        objects["/redfish/v1/Chassis?$skip=1"] = {"Members": [at(f"Chassis/{name}") for name in names[1:]]}
    return objects


def watts(reading: Any) -> dict[str, Any]:
    return {"PowerWatts": {"Reading": reading, "DataSourceUri": "/redfish/v1/Chassis/x/Sensors/TotalPower"}}


def control(*readings: Any) -> dict[str, Any]:
    return {"PowerControl": [{"MemberId": str(number), "PowerConsumedWatts": one} for number, one in enumerate(readings)]}


PLAIN = (chassis("Self", systems=["Self"], env=watts(10234.5)),)


@pytest.fixture
def bmc(monkeypatch):
    """Starts a BMC with these objects, and says in the environment where it is."""
    servers: list[Bmc] = []

    def started(objects: dict[str, Any], *, account=True) -> Bmc:
        server = Bmc(objects)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        monkeypatch.setenv("GIGATRAIN_REDFISH_URL", server.url)
        if account:
            monkeypatch.setenv("GIGATRAIN_REDFISH_USER", USER)
            monkeypatch.setenv("GIGATRAIN_REDFISH_PASSWORD", PASSWORD)
        return server

    yield started
    for server in servers:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def opened(kind: node.Kind = "redfish", sysfs=Path("/nowhere")):
    meter, notes = node.source(kind, sysfs, PLACE)
    assert meter is not None
    assert any("mainboard" in note for note in notes) == (kind == "dcmi")
    try:
        yield meter
    finally:
        meter.close()


def test_the_whole_node_is_read_and_not_the_board_within_it(bmc):
    server = bmc(
        service(
            chassis(
                "HGX_Chassis_0", systems=["HGX_Baseboard_0"], env=watts(5600), kind="Module"
            ),  # nothing says what contains it, as on some BMCs
            chassis("PSU_1", within="Self", env=watts(5200)),
            chassis("Self", systems=["Self", "HGX_Baseboard_0"], env=watts(10234.5)),
        )
    )
    with opened("auto") as meter:
        assert (meter.place, meter.scope, meter.wrap_mj) == (PLACE, "node", None)
        assert meter.name == "Redfish, /redfish/v1/Chassis/Self PowerWatts.Reading"
        first = meter.read()
        assert (first.counter_mj, first.milliwatts) == (None, 10_234_500)
        server.objects |= chassis("Self", env=watts(9000))
        assert until(lambda: meter.read().milliwatts == 9_000_000)
        assert meter.read().time_s > first.time_s
        asked = len(server.asked)
        for _ in range(1000):
            meter.read()  # ten times a second or ten thousand: the BMC is not asked for it
        assert len(server.asked) < asked + 100
        assert server.sessions == {"token-1"}
    assert server.sessions == set()
    assert server.asked[-1] == ("DELETE", "/redfish/v1/SessionService/Sessions/1")
    assert not [thread for thread in threading.enumerate() if "Redfish" in thread.name]


def test_a_board_of_gpus_is_never_the_node_whatever_else_there_is(bmc):
    board = chassis("HGX_Chassis_0", systems=["Self"], contains=["HGX_GPU_SXM_1"], env=watts(5600))
    server = bmc(service(board, chassis("HGX_GPU_SXM_1"), chassis("Plain", power=control(9000))))
    with opened() as meter:
        assert meter.read().milliwatts == 9_000_000
    server.objects = service(board)
    with pytest.raises(PowerError, match="which chassis is the whole node .there are: HGX_Chassis_0"):
        node.source("redfish", Path("/nowhere"), PLACE)


@pytest.mark.parametrize("systems", [["A"], ["A", "B"]])
def test_a_sled_within_an_enclosure_of_several_is_the_node(bmc, systems):
    bmc(
        service(
            chassis("Enclosure", systems=systems, contains=["NodeA", "Fans"], env=watts(40_000), kind="Enclosure"),
            chassis("NodeA", systems=["A"], within="Enclosure", contains=["Board"], power=control(1000, 700, 200), kind="Sled"),
            chassis("Board", within="NodeA", systems=["A"], power=control(700), kind="Module"),
            chassis("Fans", within="Enclosure", kind="Component"),
        )
    )
    with opened() as meter:
        assert meter.read().milliwatts == 1_000_000  # the first; the others are parts of it
        assert meter.name.endswith("Chassis/NodeA PowerControl.0.PowerConsumedWatts")


def test_several_computers_are_one_node_only_where_the_chassis_is_a_server(bmc):
    server = bmc(service(chassis("Chassis_0", systems=["System_0", "HGX_Baseboard_0", "BlueField_0"], env=watts(9000)), chassis("Slot1")))
    with opened() as meter:
        assert meter.read().milliwatts == 9_000_000
    server.objects = service(
        chassis("Frame", systems=["A", "B"], env=watts(9000), kind="Enclosure"), chassis("Slot1", systems=["A"], within="Frame")
    )
    with pytest.raises(PowerError, match="which chassis is the whole node .there are: Frame, Slot1"):
        node.source("redfish", Path("/nowhere"), PLACE)


def test_two_that_may_be_the_node_are_named_and_one_can_be_chosen(bmc, monkeypatch):
    bmc(service(chassis("Left", systems=["A"], env=watts(700)), chassis("Right", systems=["B"], env=watts(800))))
    with pytest.raises(PowerError, match="which chassis is the whole node .*Left, Right.*GIGATRAIN_REDFISH_CHASSIS"):
        node.source("redfish", Path("/nowhere"), PLACE)
    monkeypatch.setenv("GIGATRAIN_REDFISH_CHASSIS", "Right")
    with opened() as meter:
        assert meter.read().milliwatts == 800_000
    monkeypatch.setenv("GIGATRAIN_REDFISH_CHASSIS", "Middle")
    with pytest.raises(PowerError, match="has no chassis Middle"):
        node.source("redfish", Path("/nowhere"), PLACE)


@pytest.mark.parametrize(
    ("env", "power", "why"),
    [
        (None, None, "neither EnvironmentMetrics nor Power"),
        ({}, None, "has no PowerWatts.Reading"),
        (watts(None), control(None), "has no PowerWatts.Reading; .*PowerConsumedWatts"),
        (watts("12"), {"PowerControl": []}, "gives no power"),
        (watts(10**400), None, "has no PowerWatts.Reading"),
        (watts(0), None, "says 0 for PowerWatts.Reading: no running node"),
        ({"EnergykWh": {"Reading": 325675.1}}, None, "has no PowerWatts.Reading"),  # 360 kJ a step: half a minute of a node
    ],
)
def test_a_node_that_gives_no_power_is_not_replaced_by_its_board(bmc, env, power, why):
    server = bmc(
        service(
            chassis("HGX_Chassis_0", env=watts(5600)),
            chassis("PSU_1", power=control(4000)),
            chassis("Self", systems=["Self"], env=env, power=power),
        )
    )
    with pytest.raises(PowerError, match=why):
        node.source("redfish", Path("/nowhere"), PLACE)
    assert server.sessions == set()


@pytest.mark.parametrize(
    ("env", "counter_mj", "milliwatts"),
    [
        ({"EnergyJoules": {"Reading": 123456.789}, "PowerWatts": {"Reading": 500}}, None, 500_000),
        ({"EnergyJoules": {"Reading": 123456.789}, "PowerWatts": {"Reading": None}}, 123_456_789, None),
        ({"EnergykWh": {"Reading": 325675.123}}, 325_675_123 * 3_600_000, None),
    ],
)
def test_energy_is_the_counter_where_there_are_no_watts_and_it_is_fine_enough(bmc, env, counter_mj, milliwatts):
    bmc(service(chassis("1", systems=["1"], env=env)))
    with opened() as meter:
        assert (meter.read().counter_mj, meter.read().milliwatts) == (counter_mj, milliwatts)


def test_an_object_that_is_absent_is_done_without_and_the_node_never_guessed_for_it(bmc):
    objects = service(
        chassis("HGX_GPU_SXM_1", env=watts(700)),
        chassis("Self", systems=["Self"], env=watts(1), power=control(9000)),
        chassis("PSU_1", power=control(4000)),
    )
    del objects["/redfish/v1/Chassis/HGX_GPU_SXM_1"], objects["/redfish/v1/Chassis/Self/EnvironmentMetrics"]
    server = bmc(objects)
    with opened() as meter:
        assert meter.read().milliwatts == 9_000_000
    del objects["/redfish/v1/Chassis/Self"]
    with pytest.raises(PowerError, match="which chassis is the whole node .there are: PSU_1; not readable: .*Self: HTTP status 404"):
        node.source("redfish", Path("/nowhere"), PLACE)
    assert server.sessions == set()


def host_interface(*, kind=4, discovery=3, service=bytes([169, 254, 3, 254]) + bytes(12), form=1) -> bytes:
    """SMBIOS type 42 as dmidecode 3.2 decoded it on a server: 122 bytes with its strings, Redfish at 169.254.3.254:443."""
    address = bytes([169, 254, 3, 1]) + bytes(12)
    mask = bytes([255, 255, 255, 0]) + bytes(12)
    name = b"169.254.3.254"
    record = bytes(16) + bytes([3, 1]) + address + mask + bytes([discovery, form]) + service + mask + (443).to_bytes(2, "little") + bytes(4)
    record += bytes([len(name)]) + name
    device = bytes([2, 0x1F, 0x0B, 0xEE, 0x03, 0])
    body = bytes([0x40, len(device)]) + device + bytes([1, kind, len(record)]) + record
    return bytes([42, 4 + len(body), 0x7D, 0x00]) + body + b"\0\0"


@pytest.mark.parametrize(
    ("raw", "url"),
    [
        (host_interface(), "https://169.254.3.254:443"),
        (host_interface(service=bytes.fromhex("fe80") + bytes(13) + b"\1", form=2), "https://[fe80::1]:443"),
        (host_interface(discovery=2), ""),  # DHCP: the address is not in it
        (host_interface(kind=2), ""),
        (host_interface()[:40], ""),
        (b"", ""),
    ],
)
def test_the_host_interface_is_what_smbios_says(tmp_path, raw, url):
    file = tmp_path / "firmware" / "dmi" / "entries" / "42-0" / "raw"
    file.parent.mkdir(parents=True)
    file.write_bytes(raw)
    assert redfish.host_interface(tmp_path) == url


def test_a_service_without_sessions_gets_basic_and_one_whose_session_ended_is_asked_again(bmc):
    server = bmc(service(*PLAIN))
    with opened() as meter:
        server.sessions.clear()  # it forgot them
        since = time.monotonic()
        assert until(lambda: meter.read().time_s > since + 0.1)
        assert server.begun == 2
    server.gives_sessions = False
    with opened() as meter:
        assert meter.read().milliwatts == 10_234_500
    assert server.sessions == set()


def test_an_account_that_is_refused_is_said_without_it(bmc, monkeypatch, tmp_path):
    bmc(service(*PLAIN))
    file = tmp_path / "password"
    file.write_text("wr0ng\n")
    monkeypatch.delenv("GIGATRAIN_REDFISH_PASSWORD")
    monkeypatch.setenv("GIGATRAIN_REDFISH_PASSWORD_FILE", str(file))
    with pytest.raises(PowerError, match="refuses this account .401.*GIGATRAIN_REDFISH_USER") as refused:
        node.source("redfish", tmp_path, PLACE)
    meter, notes = node.source("auto", tmp_path, PLACE)
    if meter is not None:
        meter.close()  # this machine's own ipmitool
    assert any("refuses this account" in note for note in notes)
    for text in (str(refused.value), repr(refused.value), *notes):
        assert "wr0ng" not in text
        assert USER not in text
    file.write_text(f"{PASSWORD}\n")
    with opened() as meter:
        assert meter.read().milliwatts == 10_234_500


def test_no_account_is_enough_only_where_none_is_asked_for(bmc):
    bmc(service(*PLAIN), account=False)
    with pytest.raises(PowerError, match="401; set GIGATRAIN_REDFISH_USER"):
        node.source("redfish", Path("/nowhere"), PLACE)


def silent(meter):
    """What it says when it has nothing to say."""
    try:
        meter.read()
    except PowerError as error:
        return str(error)
    return ""


def test_a_bmc_that_does_not_answer_never_holds_up_the_reader(bmc):
    server = bmc(service(*PLAIN))
    with opened() as meter:
        server.free.clear()
        asked = len(server.asked)
        until(lambda: len(server.asked) > asked)  # its thread waits for the answer now, for up to 5 s
        assert "last heard" in until(lambda: silent(meter))
        assert not server.free.is_set()
        server.free.set()
        assert until(lambda: meter.read().milliwatts == 10_234_500)


def test_a_bmc_that_takes_too_long_is_given_up_and_asked_again(bmc, monkeypatch):
    monkeypatch.setattr(redfish, "ANSWER_S", 0.7)
    server = bmc(service(*PLAIN))
    with opened() as meter:
        server.free.clear()
        assert until(lambda: "Chassis/Self/EnvironmentMetrics: no answer within 0.7 s" in silent(meter))
        server.free.set()
        assert until(lambda: meter.read().milliwatts == 10_234_500)
    server.free.clear()
    with pytest.raises(PowerError, match="Redfish: http://127.0.0.1:.*no answer within 0.7 s"):
        node.source("redfish", Path("/nowhere"), PLACE)
    server.free.set()


def test_a_redirect_takes_the_token_nowhere(bmc):
    elsewhere = bmc(service(*PLAIN))
    objects = service(*PLAIN)
    objects["/redfish/v1/Chassis/Self"] = (307, {"Location": f"{elsewhere.url}/redfish/v1/Chassis/Self"})
    bmc(objects)
    with pytest.raises(PowerError, match="Chassis/Self: HTTP status 307"):
        node.source("redfish", Path("/nowhere"), PLACE)
    assert elsewhere.asked == []


def test_what_is_no_json_and_who_is_not_there_are_said(bmc, monkeypatch):
    server = bmc({"/redfish/v1/": b"<html>BMC</html>"})
    with pytest.raises(PowerError, match="/redfish/v1/: its answer is no JSON object"):
        node.source("redfish", Path("/nowhere"), PLACE)
    server.shutdown()
    server.server_close()
    with pytest.raises(PowerError, match=r"Redfish: http://127.0.0.1:\d+: /redfish/v1/: ConnectionRefusedError Connection refused"):
        node.source("redfish", Path("/nowhere"), PLACE)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "GIGATRAIN_REDFISH_URL is not set"),
        ("http://bmc-17", "http:// to bmc-17, .*use https"),
        ("https://root:calvin@bmc-17", "holds a user or a password"),
        ("https://root:cal@vin@bmc-17:port", "not of the form|holds a user"),
        ("ftp://bmc-17", "not of the form"),
        ("bmc-17", "not of the form"),
        ("https://bmc-17/elsewhere", "not of the form"),
    ],
)
def test_an_address_that_would_give_the_password_away_is_refused(monkeypatch, url, why):
    monkeypatch.setenv("GIGATRAIN_REDFISH_URL", url)
    with pytest.raises(PowerError, match=why) as refused:
        node.source("redfish", Path("/nowhere"), PLACE)
    assert "cal" not in str(refused.value).replace("called", "")


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ({"USER": "a"}, "only one is set"),
        ({"PASSWORD": "b"}, "only one is set"),
        ({"USER": "a", "PASSWORD": "b", "PASSWORD_FILE": "/c"}, "leave one"),
        ({"USER": "a", "PASSWORD_FILE": "/nowhere/at/all"}, "/nowhere/at/all: No such file"),
        ({"CA": "/nowhere/ca.pem"}, "GIGATRAIN_REDFISH_CA /nowhere/ca.pem: No such file"),
    ],
)
def test_half_an_account_is_refused(monkeypatch, names, why):
    monkeypatch.setenv("GIGATRAIN_REDFISH_URL", "https://bmc-17")
    for name, value in names.items():
        monkeypatch.setenv(f"GIGATRAIN_REDFISH_{name}", value)
    with pytest.raises(PowerError, match=why):
        node.source("redfish", Path("/nowhere"), PLACE)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_a_certificate_is_checked_and_can_be_the_bmcs_own(bmc, monkeypatch, tmp_path):
    server = bmc(service(*PLAIN))
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=bmc", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*request, "-keyout", str(key), "-out", str(certificate), *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http", "https")
    monkeypatch.setenv("GIGATRAIN_REDFISH_URL", url)
    monkeypatch.setattr(server, "handle_error", lambda *_: None)
    with pytest.raises(PowerError, match="certificate is not trusted .*GIGATRAIN_REDFISH_CA"):
        node.source("redfish", tmp_path, PLACE)
    assert server.asked == []
    monkeypatch.setenv("GIGATRAIN_REDFISH_CA", str(certificate))
    with opened() as meter:
        assert meter.read().milliwatts == 10_234_500
    monkeypatch.setenv("GIGATRAIN_REDFISH_URL", url.replace("127.0.0.1", "localhost"))
    with pytest.raises(PowerError, match="certificate is not trusted .*GIGATRAIN_REDFISH_URL"):
        node.source("redfish", tmp_path, PLACE)


# ---- IPMI DCMI

# As lib/ipmi_dcmi.c of ipmitool prints it.
TEXT = """
    Instantaneous power reading:              {watts:8d} Watts
    Minimum during sampling period:                 68 Watts
    Maximum during sampling period:               9504 Watts
    Average power reading over sample period:     6348 Watts
    IPMI timestamp:                           11/26/2026 08:36:01 UTC    Sampling period:                          02685198 Seconds.
    Power reading state is:                   {state}

"""


@pytest.fixture
def ipmitool(monkeypatch, tmp_path):
    """Puts an ipmitool on PATH that prints a file, and fails where it is told to."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "ipmitool"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def says(watts=6852, state="activated", *, end=""):
        (folder / "said").write_text(TEXT.format(watts=watts, state=state))
        script = f'#!/bin/sh\necho "$@" > "{folder}/asked"\nenv > "{folder}/environment"\n{end}\ncat "{folder}/said"\n'
        new = folder / "new"
        new.write_text(script)
        new.chmod(0o755)
        new.rename(program)
        return folder

    return says


def test_dcmi_is_read_by_ipmitool(ipmitool, monkeypatch):
    monkeypatch.setenv("GIGATRAIN_REDFISH_PASSWORD", PASSWORD)
    folder = ipmitool()
    with opened("dcmi") as meter:
        assert (meter.place, meter.scope, meter.name) == (PLACE, "node", "IPMI DCMI power reading")
        sample = meter.read()
        assert (sample.counter_mj, sample.milliwatts) == (None, 6_852_000)
        ipmitool(9000)
        assert until(lambda: meter.read().milliwatts == 9_000_000)
    assert (folder / "asked").read_text() == "dcmi power reading\n"
    assert PASSWORD not in (folder / "environment").read_text()


@pytest.mark.parametrize(
    ("watts", "state", "end", "why"),
    [
        (235, "deactivated", "", "power measurement is deactivated, so its 235 W"),
        (0, "activated", "", "0 W, which no running node draws"),
        (
            1,
            "activated",
            "echo Could not open device at /dev/ipmi0: No such file or directory >&2; exit 1",
            "left with 1 .*Could not open.*ipmi_devintf",
        ),
        (1, "activated", "echo nothing of the kind; exit 0", "said 'nothing of the kind', in which there is no reading"),
        (1, "activated", "exec sleep 20", "did not end within 0.3 s"),
    ],
)
def test_a_reading_that_is_none_is_refused_with_its_reason(ipmitool, monkeypatch, watts, state, end, why):
    monkeypatch.setattr(redfish, "ANSWER_S", 0.3 if "sleep" in end else 5.0)
    ipmitool(watts, state, end=end)
    with pytest.raises(PowerError, match=f'power.node = "dcmi": IPMI DCMI: .*{why}'):
        node.source("dcmi", Path("/nowhere"), PLACE)
    meter, notes = node.source("auto", Path("/nowhere"), PLACE)
    assert meter is None
    assert any("IPMI DCMI" in note for note in notes)


def test_a_bmc_that_is_switched_off_later_is_an_error_that_passes(ipmitool):
    ipmitool()
    with opened("dcmi") as meter:
        ipmitool(state="deactivated")
        assert "deactivated" in until(lambda: silent(meter))
        ipmitool(500)
        assert until(lambda: meter.read().milliwatts == 500_000)
