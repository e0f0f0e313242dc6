"""What Redfish is asked for a node's power: its service, which of its chassis is the whole node, and where that one's watts are.

A BMC's account comes from the environment and from nowhere else, and is in no log and in no error:

    GIGATRAIN_REDFISH_URL       https://bmc-name, or http:// to this machine itself; default: the host interface that SMBIOS names (DSP0270; root reads it)
    GIGATRAIN_REDFISH_USER, GIGATRAIN_REDFISH_PASSWORD or GIGATRAIN_REDFISH_PASSWORD_FILE
    GIGATRAIN_REDFISH_CA        file of certificates by which the BMC's is judged; default: the system's
    GIGATRAIN_REDFISH_CHASSIS   Id of the chassis that is the whole node, where the BMC's own links do not say

Formats: DMTF's schemas ServiceRoot, Chassis, EnvironmentMetrics and Power; DSP0270 for the host interface.
"""

import base64
import contextlib
import ipaddress
import json
import time
from collections.abc import Mapping
from decimal import Decimal
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gigatrain.errors import PowerError

ANSWER_S = 5.0  # a BMC that takes longer for one answer does not answer
WALK_S = 45.0  # for all of its chassis: a GB200 tray has some forty
_SERVERS = ("RackMount", "StandAlone", "Blade", "Sled")  # types of a chassis that is one server, if with DPUs, which are computers too
_ANSWER_BYTES = 4 << 20
_MOST = 10**15
_KWH_MJ = 3_600_000_000


def host_interface(sysfs: Path) -> str:
    """The BMC's address on this machine's own network to it, by SMBIOS type 42 with Redfish over IP (DSP0270 8.4.1, as dmidecode prints it); "" without."""
    for file in sorted((sysfs / "firmware" / "dmi" / "entries").glob("42-*/raw")):
        try:
            raw = file.read_bytes()
            at = 7 + raw[5]  # after the description of the network device and the number of records
            for _ in range(raw[at - 1]):
                kind, size = raw[at], raw[at + 1]
                record = raw[at + 2 : at + 2 + size]
                at += 2 + size
                if raw[4] != 0x40 or kind != 4 or record[50] not in (1, 3):  # network; Redfish over IP; its address static, or by itself
                    continue
                address = ipaddress.ip_address(record[52:56] if record[51] == 1 else record[52:68])
                port = int.from_bytes(record[84:86], "little")
                return f"https://{f'[{address}]' if address.version == 6 else address}:{port}"
        except (OSError, IndexError, ValueError):
            continue  # root's alone, or of an older form
    return ""


class _Absent(PowerError):
    """The service answers, and has not this object."""


class Service:
    """A Redfish service, over one connection that stays open: a BMC's processor takes longer for a handshake than for the answer.

    http.client and not urllib's opener, because that goes through proxies, and follows redirects with whatever headers it has: the token is for one host.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        import http.client
        import ssl

        url = environ.get("GIGATRAIN_REDFISH_URL", "")
        if not url:
            raise PowerError(
                "Redfish: GIGATRAIN_REDFISH_URL is not set, and SMBIOS names no address: set the BMC's, with GIGATRAIN_REDFISH_USER and _PASSWORD_FILE"
            )
        try:
            parts = urlsplit(url)
            host, port, secret = parts.hostname, parts.port, "@" in parts.netloc
        except ValueError:
            host, port, secret, parts = None, None, False, urlsplit("")
        if secret:
            raise PowerError(
                "Redfish: GIGATRAIN_REDFISH_URL holds a user or a password; they belong into GIGATRAIN_REDFISH_USER and GIGATRAIN_REDFISH_PASSWORD_FILE"
            )
        if (
            not host
            or parts.scheme not in ("https", "http")
            or parts.path.strip("/") not in ("", "redfish/v1")
            or parts.query
            or parts.fragment
        ):
            raise PowerError("Redfish: GIGATRAIN_REDFISH_URL is not of the form https://host or https://host:port")
        if parts.scheme == "http" and not _loopback(host):
            raise PowerError(
                f"Redfish: GIGATRAIN_REDFISH_URL is http:// to {host}, and a password would go over the network as it is; use https:// "
                "(GIGATRAIN_REDFISH_CA takes a certificate of the BMC's own)"
            )
        self.where = f"{parts.scheme}://{parts.netloc}:"
        self._user = environ.get("GIGATRAIN_REDFISH_USER", "")
        self._password = _password(environ)
        if bool(self._user) != bool(self._password):
            raise PowerError(
                "Redfish: of user and password only one is set; set GIGATRAIN_REDFISH_USER and GIGATRAIN_REDFISH_PASSWORD_FILE, or neither"
            )
        self._headers: dict[str, str] = {"Accept": "application/json", "OData-Version": "4.0", "User-Agent": "gigatrain"}
        self._session: str | None = None  # its address, by which it is ended
        self._sessions: str | None = None  # where one is begun
        self._errors = (http.client.HTTPException,)
        if parts.scheme == "http":
            self._connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
        else:
            ca = environ.get("GIGATRAIN_REDFISH_CA")
            try:
                context = ssl.create_default_context(cafile=ca or None)
            except OSError as error:  # ssl's errors are OSErrors
                raise PowerError(f"Redfish: GIGATRAIN_REDFISH_CA {ca}: {error.strerror or error}") from None
            self._connection = http.client.HTTPSConnection(host, port, timeout=ANSWER_S, context=context)

    def begin(self) -> None:
        """Logs in: a session, or Basic where the service has none to give. The root says where sessions are, and is readable by everybody."""
        if not self._user:
            return
        root = self.get("/redfish/v1/")
        self._sessions = _link(root, "Links", "Sessions") or "/redfish/v1/SessionService/Sessions"
        self._login()

    def _login(self) -> None:
        assert self._sessions is not None
        self._headers.pop("X-Auth-Token", None)
        self._headers.pop("Authorization", None)
        self._session = None
        status, headers, _ = self._ask("POST", self._sessions, {"UserName": self._user, "Password": self._password})
        if status in (401, 403):
            raise PowerError(
                f"refuses this account ({status}); look at GIGATRAIN_REDFISH_USER and GIGATRAIN_REDFISH_PASSWORD, and whether the account is locked"
            )
        token = headers.get("X-Auth-Token", "")
        if status in (200, 201) and token and token.isascii() and token.isprintable():
            self._headers["X-Auth-Token"] = token
            location = urlsplit(headers.get("Location", "")).path
            self._session = location if location.startswith("/redfish/") else None
        else:
            both = base64.b64encode(f"{self._user}:{self._password}".encode()).decode()
            self._headers["Authorization"] = f"Basic {both}"

    def get(self, path: str) -> dict[str, Any]:
        """The object at a path, its fractions as Decimals; a session that has ended is begun again, once. Raises OSError or PowerError."""
        status, _, body = self._ask("GET", path)
        if status == 401 and self._sessions is not None:
            self._login()
            status, _, body = self._ask("GET", path)
        if status in (401, 403):
            raise PowerError(
                f"{path}: {status}, this account may not read it"
                if self._user
                else f"{path}: {status}; set GIGATRAIN_REDFISH_USER and _PASSWORD_FILE"
            )
        if status != 200:
            raise _Absent(f"{path}: HTTP status {status}")
        try:
            answer = json.loads(body, parse_float=Decimal)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise PowerError(f"{path}: its answer is no JSON object")
        return answer

    def _ask(self, method: str, path: str, data: Mapping[str, str] | None = None) -> tuple[int, Message, bytes]:
        import ssl

        headers = dict(self._headers)
        body = None
        if data is not None:
            body = json.dumps(data).encode()
            headers["Content-Type"] = "application/json"
        for attempt in range(2):
            kept = self._connection.sock is not None
            try:
                self._connection.request(method, path, body, headers)
                answer = self._connection.getresponse()
                text = answer.read(_ANSWER_BYTES + 1)
                if len(text) > _ANSWER_BYTES:
                    raise PowerError(f"{path}: more than {_ANSWER_BYTES >> 20} MiB")
                return answer.status, answer.headers, text
            except ssl.SSLCertVerificationError as error:
                self._connection.close()
                raise PowerError(
                    f"its certificate is not trusted ({error.verify_message}); give the one that signed it in GIGATRAIN_REDFISH_CA, and the name that "
                    "is in it in GIGATRAIN_REDFISH_URL (a line of /etc/hosts can give that name an address)"
                ) from None
            except TimeoutError:
                self._connection.close()
                raise PowerError(f"{path}: no answer within {ANSWER_S:g} s") from None
            except (OSError, *self._errors) as error:
                self._connection.close()
                if kept and attempt == 0 and method != "POST":
                    continue  # it closed a connection that had been idle
                raise PowerError(f"{path}: {type(error).__name__} {getattr(error, 'strerror', None) or ''}".rstrip()) from None
            except PowerError:
                self._connection.close()
                raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Ends the session, of which a BMC has few."""
        if self._session is not None:
            with contextlib.suppress(OSError, PowerError):  # else it ends by itself in time
                self._ask("DELETE", self._session)
            self._session = None
        self._headers.clear()
        self._connection.close()


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _password(environ: Mapping[str, str]) -> str:
    path = environ.get("GIGATRAIN_REDFISH_PASSWORD_FILE")
    if path and environ.get("GIGATRAIN_REDFISH_PASSWORD"):
        raise PowerError("Redfish: both GIGATRAIN_REDFISH_PASSWORD and GIGATRAIN_REDFISH_PASSWORD_FILE are set; leave one")
    if not path:
        return environ.get("GIGATRAIN_REDFISH_PASSWORD", "")
    try:
        return Path(path).read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PowerError(f"Redfish: GIGATRAIN_REDFISH_PASSWORD_FILE {path}: {getattr(error, 'strerror', None) or 'is no text'}") from None


def number(answer: Any, path: tuple[str | int, ...]) -> float | None:
    """The number at a path of keys and indices; None where there is none, or one that no meter gives."""
    for key in path:
        try:
            answer = answer[key]
        except (KeyError, IndexError, TypeError):
            return None
    if isinstance(answer, bool) or not isinstance(answer, int | float | Decimal):
        return None
    return float(answer) if -_MOST < answer < _MOST else None


def _link(answer: Any, *path: str) -> str | None:
    """The address that a property links to, if it is one of a Redfish service."""
    for key in (*path, "@odata.id"):
        answer = answer.get(key) if isinstance(answer, dict) else None
    return (
        answer
        if isinstance(answer, str) and answer.startswith("/redfish/") and answer.isascii() and answer.isprintable() and " " not in answer
        else None
    )


def _links(answer: Any, *path: str) -> list[str]:
    for key in path:
        answer = answer.get(key) if isinstance(answer, dict) else None
    return [found for one in answer if (found := _link(one)) is not None] if isinstance(answer, list) else []


def whole(service: Service, wanted: str | None) -> dict[str, Any]:
    """The chassis that is the whole node.

    That is the one that no other contains; or the blade or sled with a computer system in it, whose container has others beside it. NVIDIA's boards of GPUs
    are chassis too, called HGX_..., which on some BMCs nothing contains: they never are the node. Where two are left, the one that a computer system is in;
    where two are still left, or the one left holds several computers, nobody guesses.
    """
    until = time.monotonic() + WALK_S
    address: str | None = _link(service.get("/redfish/v1/"), "Chassis") or "/redfish/v1/Chassis"
    members: list[str] = []
    pages: set[str] = set()
    while address is not None and address not in pages:
        pages.add(address)
        page = service.get(address)
        members += [one for one in _links(page, "Members") if one not in members]
        following = page.get("Members@odata.nextLink")
        address = following if isinstance(following, str) and following.startswith("/redfish/") and len(members) < 1000 else None
    if wanted:
        members = [one for one in members if one.rstrip("/").rpartition("/")[2] == wanted]
        if not members:
            raise PowerError(f"has no chassis {wanted}, which GIGATRAIN_REDFISH_CHASSIS names")
    found: dict[str, dict[str, Any]] = {}
    absent: list[str] = []
    for one in members:
        if time.monotonic() > until:
            raise PowerError(
                f"took {WALK_S:g} s for {len(found)} of its {len(members)} chassis; name the node's in GIGATRAIN_REDFISH_CHASSIS"
            )
        try:
            found[one.rstrip("/")] = {**service.get(one), "@odata.id": one}
        except _Absent as error:  # a board whose own controller is not up yet; if it was the node, another is not taken for it: it has no computer system
            absent.append(str(error))
    if wanted and found:
        return next(iter(found.values()))
    boards = {path for path in found if path.rpartition("/")[2].startswith("HGX_")}
    outer = {path: _outer(path, found) for path in found}
    blades = {path for path in found if found[path].get("ChassisType") in ("Blade", "Sled") and _systems(found[path])} - boards
    racks = {around for path in blades for around in _around(path, outer)}
    tops = [path for path in found if path not in boards | racks and (path in blades or outer[path] is None or outer[path] in racks)]
    # A system first: a power supply that nothing contains may be metered too, and then it is better that the node is said to give no power.
    for better in (_systems, lambda one: _links(one, "Links", "Contains"), _metered):
        tops = [path for path in tops if better(found[path])] or tops
    several = len(tops) == 1 and len(_systems(found[tops[0]])) > 1 and found[tops[0]].get("ChassisType") not in _SERVERS
    if len(tops) != 1 or several or (absent and not _systems(found[tops[0]])):
        which = ", ".join(path.rpartition("/")[2] for path in (found if several else tops or found)) or "none"
        also = f"; not readable: {', '.join(absent)}" if absent else ""
        raise PowerError(f"does not say which chassis is the whole node (there are: {which}{also}); name it in GIGATRAIN_REDFISH_CHASSIS")
    return found[tops[0]]


def _outer(path: str, found: dict[str, dict[str, Any]]) -> str | None:
    """The chassis around another, by either one's links."""
    around = (_link(found[path], "Links", "ContainedBy") or "").rstrip("/")
    if around in found and around != path:
        return around
    return next(
        (one for one in found if one != path and path in (inner.rstrip("/") for inner in _links(found[one], "Links", "Contains"))), None
    )


def _around(path: str, outer: dict[str, str | None]) -> list[str]:
    """All chassis around another."""
    around: list[str] = []
    while (following := outer[path]) is not None and following not in around:
        around.append(following)
        path = following
    return around


def _systems(chassis: dict[str, Any]) -> list[str]:
    """The computers in a chassis; NVIDIA's boards of GPUs, which call themselves systems, are none."""
    return [one for one in _links(chassis, "Links", "ComputerSystems") if not one.rstrip("/").rpartition("/")[2].startswith("HGX_")]


def _metered(chassis: dict[str, Any]) -> bool:
    return _link(chassis, "EnvironmentMetrics") is not None or _link(chassis, "Power") is not None


def metrics(service: Service, chassis: dict[str, Any]) -> tuple[str, tuple[str | int, ...]]:
    """Where its power is: address, and the path of its watts or, where there are none, of its joules.

    Watts first: how often a BMC brings its joules up to date no schema says, and a counter that stands still for a minute looks like a broken one.
    """
    tried = []
    if (address := _link(chassis, "EnvironmentMetrics")) is not None:
        try:
            answer = service.get(address)
        except _Absent as error:
            tried.append(str(error))
        else:
            if number(answer, ("PowerWatts", "Reading")) is not None:
                return address, ("PowerWatts", "Reading")
            for name in ("EnergyJoules", "EnergykWh"):
                if _fine(answer, name):
                    return address, (name, "Reading")
            tried.append(f"{address} has no PowerWatts.Reading")
    if (address := _link(chassis, "Power")) is not None:
        path = ("PowerControl", 0, "PowerConsumedWatts")  # the first is the chassis; what follows are parts of it
        try:
            if number(service.get(address), path) is not None:
                return address, path
            tried.append(f"{address} has no PowerControl[0].PowerConsumedWatts")
        except _Absent as error:
            tried.append(str(error))
    raise PowerError(
        f"{chassis['@odata.id']} is the node, and gives no power ({'; '.join(tried) or 'neither EnvironmentMetrics nor Power'}); "
        "if another chassis is the node, name it in GIGATRAIN_REDFISH_CHASSIS"
    )


def _fine(answer: dict[str, Any], name: str) -> bool:
    """Whether it is a counter to measure a minute by: joules, or kWh to the third place (3.6 kJ, half a second of a node)."""
    if number(answer, (name, "Reading")) is None:
        return False
    reading = answer[name]["Reading"]
    return name == "EnergyJoules" or (isinstance(reading, Decimal) and int(reading.as_tuple().exponent) <= -3)


def millijoules(answer: dict[str, Any], name: str) -> int:
    """By the decimal digits that the answer has: a float of 325,675.123 kWh is no longer exact."""
    return int(Decimal(answer[name]["Reading"]) * (1000 if name == "EnergyJoules" else _KWH_MJ))
