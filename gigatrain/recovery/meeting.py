"""What ranks need to find each other, and only each other: an address, an interface, a secret. Free of torch."""

import contextlib
import fcntl
import hmac
import ipaddress
import os
import secrets
import socket
import struct
from collections.abc import MutableMapping
from pathlib import Path

from gigatrain.errors import RunError

COLLECTIVE_S = 600.0  # of a collective: a rank that died must not hold the others for torch's half an hour
TOKEN = "GIGATRAIN_MEETING_TOKEN"  # not GIGATRAIN_TOKEN: who scrapes metrics (observe/prometheus.py) is no rank
LISTEN = "GIGATRAIN_LISTEN"  # the descriptor of a socket that listens already, which rank 0 takes over
ROUND = "GIGATRAIN_ROUND"  # starts of the ranks within one attempt of a job, from 0
_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface


def listening(address: str, port: int = 0) -> socket.socket:
    """A socket that listens at `address` alone, where ranks will meet; OSError where that is no address of this machine, or the port is taken."""
    family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the last attempt's connections linger
        found.bind(where)
        found.listen(4096)
    except OSError:
        found.close()
        raise
    return found


def interface(address: str) -> str | None:
    """The interface of this machine from which `address` is reached; None where that cannot be told."""
    try:
        family, _, _, _, where = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            mine = probe.getsockname()[0]
        if ipaddress.ip_address(mine).is_loopback:
            return "lo"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):
                    said = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                    if socket.inet_ntoa(said[20:24]) == mine:
                        return name
    except (OSError, ValueError):
        pass
    return None


def token(run: Path | None = None) -> str | None:
    """The job's secret: the environment's, else that of the run folder's launch/token, which only its owner can read; None: this job has none.

    Raises RunError for a file that others can read or that is another's: whoever knows it may speak as a rank.
    """
    if TOKEN in os.environ:
        return os.environ[TOKEN]
    if run is None:
        return None
    path = run / "launch" / "token"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor) as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise RunError(f"{path} is the secret of this job, and others can read it or own it; chmod 600 it, or delete it")
        return file.read().strip() or None


def new_token() -> str:
    return secrets.token_hex(16)


def make_token(run: Path) -> None:
    """launch/token of a run that is launched, unless it has one: readable by its owner alone."""
    path = run / "launch" / "token"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(new_token() + "\n")


def proof(secret: str | None, *said: object) -> str:
    """That whoever says this knows the secret."""
    return hmac.new((secret or "").encode(), "\0".join(map(str, said)).encode(), "sha256").hexdigest()


def unset(environment: MutableMapping[str, str]) -> None:
    """Take out what is of one process, before others are started."""
    for name in (LISTEN, ROUND):
        environment.pop(name, None)
