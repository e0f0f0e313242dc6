"""A seat at torchft's lighthouse, and the lighthouse itself: torchft decides who lives, and nothing more of it is used.

torchft's lighthouse knows no token: whoever reaches its port can send heartbeats and join. So what a replica says travels signed with the run's token, and
a participant whose words are not is not counted as one: it can make the others wait, and cannot join them or be read. Its Manager is left out, whose
checkpoint server listens on every interface and whose client unpickles what comes, and its ManagerServer, which ends its process for anyone who asks.
"""

import contextlib
import importlib
import json
import sys
import threading
import time
from datetime import timedelta
from typing import Any

from gigatrain.errors import RunError
from gigatrain.parallel.quorum import address, check_open, seconds, sign, spelt

INSTALL = "pip install torchft"
BEAT_S = 0.1


def _torchft() -> Any:
    """torchft's coordination; the package imports its Manager with torch and opentelemetry."""
    try:
        return importlib.import_module("torchft.coordination")
    except ImportError as failure:
        raise RunError(
            f'recovery.replicas is "torchft", and it cannot be imported: {failure}; {INSTALL}, or set recovery.replicas = "own"'
        ) from None


class LighthouseSeat:
    """`parallel/quorum.py`'s Seat."""

    def __init__(self, at: str, key: bytes, replica: int, boot: str, *, lease_s: float = 5.0, patience_s: float = 60.0) -> None:
        self.at, self.key, self.replica, self.boot, self.patience_s = at, key, replica, boot, patience_s
        self._id, self._turn = f"{replica:06d}:{boot}", 0
        self._coordination = _torchft()
        self._closed = threading.Event()
        self._client = self._connected(time.monotonic() + patience_s)
        threading.Thread(target=self._beat, name="gigatrain lighthouse", daemon=True).start()

    def _connected(self, end: float) -> Any:
        while True:
            try:
                return self._coordination.LighthouseClient(f"http://{self.at}", timedelta(seconds=5))
            except (RuntimeError, TimeoutError) as failure:
                if time.monotonic() > end:
                    raise self._gone(failure) from None

    def _gone(self, why: object) -> RunError:
        failure = RunError(
            f"replica {self.replica} has no lighthouse at {self.at}: {str(why)[:200]}; see whether the command that serves it still runs"
        )
        failure.transient = True
        return failure

    def near(self) -> str:
        import socket

        with socket.create_connection(address(self.at), timeout=5) as link:
            return link.getsockname()[0]

    def meet(self, said: dict[str, Any]) -> list[dict[str, Any]]:
        end = time.monotonic() + self.patience_s
        while True:
            self._turn += 1
            text = json.dumps(said)
            data = {"text": text, "turn": self._turn, "sign": sign(self.key, "member", self._id, str(self._turn), text)}
            try:
                found = self._client.quorum(self._id, timedelta(seconds=self.patience_s), data=data)
            except (RuntimeError, TimeoutError) as failure:
                if time.monotonic() > end:
                    raise self._gone(failure) from None
                time.sleep(0.1)
                with contextlib.suppress(RunError):
                    self._client = self._connected(end)
                continue
            members = [member for one in found.participants if (member := self._read(one)) is not None]
            if any(member["boot"] == self.boot for member in members):
                return members

    def _read(self, one: Any) -> dict[str, Any] | None:
        """A participant's words; None: they are not signed."""
        data = dict(one.data or {})
        text, turn = str(data.get("text", "")), str(data.get("turn", ""))
        if data.get("sign") != sign(self.key, "member", one.replica_id, turn, text):
            return None
        replica, _, boot = one.replica_id.partition(":")
        return {"replica": int(replica), "boot": boot, "said": json.loads(text)}

    def close(self) -> None:
        self._closed.set()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            with contextlib.suppress(RuntimeError, TimeoutError):
                self._client.heartbeat(self._id)


def main(arguments: list[str]) -> int:
    """`python -m gigatrain.parallel.lighthouse HOST:PORT LEASE_S WAIT_S [open]`: torchft's lighthouse, until it is ended."""
    spelt(arguments, "python -m gigatrain.parallel.lighthouse HOST:PORT LEASE_S WAIT_S [open]", least=3)
    host, port = address(arguments[0])
    check_open(host, "open" in arguments[3:])
    lease_ms, wait_ms = (int(seconds(text, what) * 1000) for text, what in zip(arguments[1:3], ("LEASE_S", "WAIT_S"), strict=True))
    served = _torchft().LighthouseServer(
        bind=f"{host}:{port}" if ":" not in host else f"[{host}]:{port}",
        min_replicas=1,
        join_timeout_ms=wait_ms,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=lease_ms,
    )
    print(f"lighthouse: listens on {host}:{served.address().rpartition(':')[2]}", flush=True)
    threading.Event().wait()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RunError as failure:
        print(f"gigatrain: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
