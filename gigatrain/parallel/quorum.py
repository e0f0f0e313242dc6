"""Which replicas live: one small server of a run, and a seat at it for each replica. Free of torch.

A replica is a world of its own that can train alone (engines/replicated.py). Before every step its first rank asks the quorum, with a JSON value of its own;
the answer, once every replica that is alive has asked, is what all of them said. So the answer is at once the list of the living, a barrier, and a gathering.

A replica is gone when its connection ends, which the kernel of a killed process sees to at once, or when it was silent for `lease_s`, which is a lost node;
one that lives and does not ask for `wait_s` is left out too. The server keeps nothing that a restart of it could lose: what a replica needs to be taken
up again it says itself.

Both sides prove that they know the run's token (HMAC-SHA-256 of two nonces), and each line after that carries the HMAC of its number and its text under
the connection's key: who has no token cannot join, steer or read a decision as his own. Nothing is encrypted, and nothing here is secret.
"""

import contextlib
import hashlib
import hmac
import ipaddress
import json
import math
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

from gigatrain.errors import RunError

LONGEST_BYTES = 1 << 16  # of a line
GREETING_S = 5.0  # for a connection to prove itself
UNPROVEN = 64  # connections at a time that have not
SHORTEST_TOKEN = 16


class Refused(Exception):
    """The other side does not know the token, or says that this replica was left behind."""


def token(path: Path) -> bytes:
    """The run's token from its file, which only its owner may read. RunError says what is wrong with it."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(file, "rb") as opened:
            mode, found = os.fstat(opened.fileno()), opened.read(4096).strip()
    except OSError as failure:
        raise RunError(
            f"{path}, the token of the run's replicas, cannot be read: {failure.strerror}; the command that starts them writes it"
        ) from None
    if mode.st_mode & 0o077 or mode.st_uid != os.geteuid():
        raise RunError(
            f"{path} holds a token and may be read by others (mode {mode.st_mode & 0o777:o}); chmod 600 it, and let it be your own"
        )
    if len(found) < SHORTEST_TOKEN:
        raise RunError(
            f"{path} holds {len(found)} bytes, and a token has at least {SHORTEST_TOKEN}; write a new one, for instance of openssl rand -hex 32"
        )
    return found


def write_token(path: Path) -> None:
    """A new token in a file of mode 0600."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def address(text: str) -> tuple[str, int]:
    """HOST:PORT, with brackets round an IPv6 address. RunError if it is none."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise RunError(f"{text!r} is no address of a quorum; write HOST:PORT")
    return host.strip("[]"), int(port)


def check_open(host: str, accepted: bool) -> None:
    """RunError where something would listen on all interfaces and nobody said that it may."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified and not accepted:
            raise RunError(
                f"the quorum of the replicas would listen on {host}, which is every interface of this node; name the job's own, or, where the network is "
                "closed, accept it with the command's last word, open"
            )
    if host == "" and not accepted:
        raise RunError("the quorum of the replicas needs an address to listen on; name the job's interface, not all of them")


def sign(key: bytes, *parts: str | bytes) -> str:
    """HMAC-SHA-256 of parts, each with its length."""
    mark = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        mark.update(len(data).to_bytes(8, "big") + data)
    return mark.hexdigest()


class Seat(Protocol):
    """A replica's place at a quorum: of this file, or of torchft's lighthouse (parallel/lighthouse.py)."""

    def meet(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        """What every living replica said, by its number, this one's among them; waits for all. RunError: no quorum, or this one was left behind."""
        ...

    def near(self) -> str:
        """This node's address on the network that leads to the quorum."""
        ...

    def close(self) -> None:
        """Leave: the others go on without this replica at once."""
        ...


class _Line:
    """Signed JSON lines over a connection."""

    def __init__(self, link: socket.socket) -> None:
        self.link, self.key, self._buffer = link, b"", b""
        self._sent = self._read = 0
        self._turn = threading.Lock()
        self.mine, self.theirs = "", ""

    def keyed(self, key: bytes, mine: str, theirs: str) -> None:
        """From here on lines are signed under `key`, and those of the two sides differ."""
        self.key, self.mine, self.theirs = key, mine, theirs

    def send(self, value: Any) -> None:
        text = json.dumps(value)
        with self._turn:
            mark = sign(self.key, self.mine, str(self._sent), text) if self.key else ""
            self._sent += bool(self.key)
            self.link.sendall(f"{mark} {text}\n".encode())

    def read(self) -> Any:
        """The next value. Refused: a line that is not the other side's. ConnectionError: it ended."""
        while b"\n" not in self._buffer:
            if len(self._buffer) > LONGEST_BYTES:
                raise Refused("a line is too long")
            got = self.link.recv(1 << 16)
            if not got:
                raise ConnectionError("it ended")
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        mark, _, text = line.decode(errors="replace").partition(" ")
        if self.key:
            if not hmac.compare_digest(mark, sign(self.key, self.theirs, str(self._read), text)):
                raise Refused("a line is not signed with the connection's key")
            self._read += 1
        try:
            return json.loads(text)
        except ValueError:
            raise Refused("a line is no JSON") from None


class _Member:
    """A replica's connection at the server."""

    def __init__(self, line: _Line, replica: int, boot: str) -> None:
        self.line, self.replica, self.boot = line, replica, boot
        self.joined = False  # asked at least once: one that is still starting holds nobody up
        self.said: dict[str, Any] | None = None
        self.asked = self.heard = time.monotonic()


class Quorum:
    """The server, in threads of this process; a context, or closed by `close`."""

    def __init__(
        self,
        host: str,
        port: int,
        key: bytes,
        *,
        lease_s: float = 5.0,
        wait_s: float = 600.0,
        accepted: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`accepted`: it may listen on all interfaces. Raises RunError where it may not, and where the address is not to be had."""
        check_open(host, accepted)
        self.key, self.lease_s, self.wait_s, self.say = key, lease_s, wait_s, say
        self._members: list[_Member] = []
        self._unproven: set[socket.socket] = set()
        self._turn = threading.Lock()
        self._closed = threading.Event()
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listens = socket.create_server((host, port), family=family, backlog=128)
        except OSError as failure:
            raise RunError(
                f"the quorum of the replicas cannot listen on {host}:{port}: {failure.strerror}; name a free port of this node"
            ) from None
        self.port = self._listens.getsockname()[1]
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        for act in (self._accept, self._watch):
            threading.Thread(target=act, name="gigatrain quorum", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every connection."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listens.shutdown(socket.SHUT_RDWR)
        self._listens.close()
        with self._turn:
            for link in [*self._unproven, *(member.line.link for member in self._members)]:
                _end(link)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                link, _ = self._listens.accept()
            except OSError:
                return
            with self._turn:
                full = len(self._unproven) >= UNPROVEN
                if not full:
                    self._unproven.add(link)
            if full:
                _end(link)
            else:
                threading.Thread(target=self._serve, args=(link,), name="gigatrain quorum", daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        member = None
        try:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 1, 0)
            )  # one that reads nothing must not hold the others
            link.settimeout(GREETING_S)
            try:
                member = self._greet(_Line(link))
            finally:
                with self._turn:
                    self._unproven.discard(link)
            link.settimeout(None)
            while True:
                value = member.line.read()
                with self._turn:
                    member.heard = time.monotonic()
                    if "said" in value:
                        member.said, member.asked, member.joined = value["said"], member.heard, True
                    self._decide()
        except (OSError, Refused, KeyError, TypeError, ValueError) as failure:
            if member is None and isinstance(failure, Refused):
                self.say(f"quorum: a connection was refused: {failure}")
        finally:
            if member is not None:
                self._drop(member, "its connection ended")
            _end(link)

    def _greet(self, line: _Line) -> _Member:
        ours = secrets.token_hex(16)
        line.send({"nonce": ours})
        said = line.read()
        replica, boot, theirs = int(said["replica"]), str(said["boot"]), str(said["nonce"])
        if not hmac.compare_digest(str(said["sign"]), sign(self.key, "replica", ours, theirs, str(replica), boot)):
            line.send({"refused": "the token is not this run's"})
            raise Refused(f"replica {replica} does not know the run's token")
        line.send({"sign": sign(self.key, "quorum", ours, theirs)})
        line.keyed(bytes.fromhex(sign(self.key, "session", ours, theirs)), "quorum", "replica")
        member = _Member(line, replica, boot)
        with self._turn:
            for before in [one for one in self._members if one.replica == replica]:
                self._out(before, "it was started anew")  # half-open, or hung: the newest is the replica
            self._members.append(member)
        self.say(f"quorum: replica {replica} is here")
        return member

    def _drop(self, member: _Member, why: str) -> None:
        with self._turn:
            if member in self._members:
                self._out(member, why)
                self._decide()

    def _out(self, member: _Member, why: str) -> None:
        self._members.remove(member)
        _end(member.line.link)
        if not self._closed.is_set():
            self.say(f"quorum: replica {member.replica} is out: {why}")

    def _decide(self) -> None:
        """Answer all, if all who are alive have asked."""
        joined = [member for member in self._members if member.joined]
        asking = sorted((member for member in joined if member.said is not None), key=lambda member: member.replica)
        if not asking:
            return
        if len(asking) < len(joined):
            if time.monotonic() - min(member.asked for member in asking) < self.wait_s:
                return
            for member in [one for one in joined if one.said is None]:
                self._out(member, f"it did not ask for {self.wait_s:.0f} s")
        answer = {"members": [{"replica": member.replica, "boot": member.boot, "said": member.said} for member in asking]}
        for member in asking:
            member.said = None
        for member in asking:
            with contextlib.suppress(OSError):  # whose connection has just ended is out at the next round
                member.line.send(answer)

    def _watch(self) -> None:
        """Leases, and a sign of life for those who wait."""
        while not self._closed.wait(self.lease_s / 4):
            with self._turn:
                now = time.monotonic()
                for member in [one for one in self._members if now - one.heard > self.lease_s]:
                    self._out(member, f"it was silent for {now - member.heard:.1f} s")
                for member in self._members:
                    with contextlib.suppress(OSError):
                        member.line.send({})
                self._decide()


class OwnSeat:
    """A seat at a `Quorum`. A quorum that is gone is looked for again for `patience_s`: it may be started anew at its address."""

    def __init__(self, at: str, key: bytes, replica: int, boot: str, *, lease_s: float = 5.0, patience_s: float = 60.0) -> None:
        """Connects; RunError where it cannot, and where the token is another."""
        self.at, self.key, self.replica, self.boot, self.lease_s, self.patience_s = at, key, replica, boot, lease_s, patience_s
        self._line: _Line | None = None
        self._met = False
        self._closed = threading.Event()
        self._connect(time.monotonic() + patience_s)
        threading.Thread(target=self._beat, name="gigatrain quorum", daemon=True).start()

    def near(self) -> str:
        assert self._line is not None
        return self._line.link.getsockname()[0]

    def close(self) -> None:
        self._closed.set()
        if self._line is not None:
            _end(self._line.link)

    def meet(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        end = time.monotonic() + self.patience_s
        while True:
            try:
                assert self._line is not None
                self._line.send({"said": said})
                while "members" not in (value := self._line.read()):
                    end = time.monotonic() + self.patience_s  # it lives, and waits for others
                return value["members"]
            except (OSError, Refused) as failure:
                if time.monotonic() > end:
                    raise self._gone(str(failure)) from None
                self._connect(end)

    def _gone(self, why: str) -> RunError:
        failure = RunError(f"replica {self.replica} has no quorum at {self.at}: {why}; see whether the command that serves it still runs")
        failure.transient = True
        return failure

    def _connect(self, end: float) -> None:
        host, port = address(self.at)
        while True:
            try:
                link = socket.create_connection((host, port), timeout=self.lease_s)
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                line = _Line(link)
                ours, theirs = secrets.token_hex(16), str(line.read()["nonce"])
                mark = sign(self.key, "replica", theirs, ours, str(self.replica), self.boot)
                line.send({"replica": self.replica, "boot": self.boot, "nonce": ours, "sign": mark})
                answer = line.read()
                if "refused" in answer:
                    raise RunError(
                        f"the quorum at {self.at} refuses replica {self.replica}: {str(answer['refused'])[:200]}; give both the same token file"
                    )
                if not hmac.compare_digest(str(answer["sign"]), sign(self.key, "quorum", theirs, ours)):
                    raise RunError(
                        f"what answers at {self.at} does not know the run's token and is not its quorum; give both the same token file"
                    )
                line.keyed(bytes.fromhex(sign(self.key, "session", theirs, ours)), "replica", "quorum")
                self._line = line
                return
            except (OSError, Refused, KeyError, TypeError, ValueError) as failure:
                if time.monotonic() > end or self._closed.is_set():
                    raise self._gone(str(failure)) from None
                time.sleep(0.1)

    def _beat(self) -> None:
        while not self._closed.wait(self.lease_s / 4):
            line = self._line
            with contextlib.suppress(OSError):
                if line is not None:
                    line.send({})


def _end(link: socket.socket) -> None:
    with contextlib.suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)
    link.close()


def seconds(text: str, what: str) -> float:
    """A duration of the command line. RunError if it is none."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < 1e6:
        raise RunError(f"{what} is {text[:40]!r}; write seconds above 0 and below 1,000,000, for instance 5")
    return found


def spelt(arguments: list[str], command: str, least: int) -> list[str]:
    """The arguments of a command without options. RunError for fewer than `least` or more than `command`'s line of words names."""
    most = len(command.split()) - 3  # without `python -m MODULE`
    if not least <= len(arguments) <= most or (len(arguments) == most and arguments[-1] != "open"):
        raise RunError(f"{' '.join(arguments) or 'nothing'!r} is not what this command reads; write {command}")
    return arguments


def main(arguments: list[str]) -> int:
    """`python -m gigatrain.parallel.quorum HOST:PORT TOKEN_FILE [LEASE_S] [open]`: a quorum for replicas on several nodes, until it is ended."""
    spelt(arguments, "python -m gigatrain.parallel.quorum HOST:PORT TOKEN_FILE [LEASE_S] [open]", least=2)
    host, port = address(arguments[0])
    lease_s = seconds(arguments[2], "LEASE_S") if len(arguments) > 2 else 5.0
    quorum = Quorum(
        host, port, token(Path(arguments[1])), lease_s=lease_s, accepted="open" in arguments[3:], say=lambda text: print(text, flush=True)
    )
    print(f"quorum: listens on {quorum.address}", flush=True)
    threading.Event().wait()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RunError as failure:
        print(f"gigatrain: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
