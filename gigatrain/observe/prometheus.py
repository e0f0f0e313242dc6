"""Metrics of a run for Prometheus, from its folder: text exposition format 0.0.4, behind a token. Free of torch.

What is unknown has no sample. One reader serves all: observe/reader.py; scrapes within a second share what it read.
"""

import contextlib
import hmac
import http.server
import os
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gigatrain.errors import RunError
from gigatrain.observe.reader import Reader

CONTENT = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("not begun", "running", "silent", "ended", "finished")
Sample = tuple[Mapping[str, str], float | None]


def _one(key: str) -> Callable[[Mapping[str, Any]], list[Sample]]:
    return lambda seen: [({}, seen[key])]


def _of(key: str, within: str) -> Callable[[Mapping[str, Any]], list[Sample]]:
    return lambda seen: [({}, (seen[key] or {}).get(within))]


def _each(key: str) -> Callable[[Mapping[str, Any]], list[Sample]]:
    """Of each boundary that is known."""
    return lambda seen: [({"boundary": name}, value) for name, value in (seen[key] or {}).items()]


# Name, type, help, and its samples of what was seen. All are gauges: a resume takes steps and tokens back.
METRICS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], list[Sample]]], ...] = (
    ("run_info", "1, with what the run is as labels.", lambda seen: [({key: str(seen[key] or "") for key in ("id", "name", "site")}, 1)]),
    (
        "state",
        "1 for the state the run is in, 0 for the others.",
        lambda seen: [({"state": one}, float(one == seen["state"])) for one in STATES],
    ),
    ("news_age_seconds", "Since the run last wrote anything.", _one("news_s")),
    ("attempt", "Number of the job's start.", _one("attempt")),
    ("ranks", "Processes that train.", _one("ranks")),
    ("step", "Optimizer updates that are done.", _one("step")),
    ("steps", "Optimizer updates of the whole run.", _one("steps")),
    ("tokens", "Target tokens that were read.", _one("tokens")),
    ("loss", "Cross entropy per target token over the last window, in nats.", _one("loss")),
    ("validation_loss", "Cross entropy per target token of held-out documents, in nats.", _one("val_loss")),
    ("gradient_norm", "Mean global norm before clipping over the last window.", _one("grad_norm")),
    ("learning_rate", "Of the last window's end.", _one("lr")),
    ("refused_steps", "Updates refused because they were not finite or spikes.", _one("bad_steps")),
    ("spikes", "Refused updates of a finite loss and norm.", _one("spikes")),
    (
        "numeric_faults",
        "Of this process: steps that were another's when made again (transient), that ranks compute differently (persistent), unequal copies (diverged), "
        "and rollbacks.",
        lambda seen: [
            ({"class": what}, seen[what]) for what in ("transient", "persistent", "diverged", "rollbacks") if seen[what] is not None
        ],
    ),
    (
        "straggler_ratio",
        "Seconds of a slow rank's section over the median of all ranks.",
        lambda seen: [
            ({key: str(one.get(key, "")) for key in ("rank", "host", "section")}, one["times"])
            for one in seen["stragglers"]
            if isinstance(one.get("times"), float | int)
        ],
    ),
    ("step_seconds", "Mean of a step over the last window.", _one("step_s")),
    ("tokens_per_second", "Over the last window, of all ranks.", _one("tokens_per_s")),
    ("tokens_per_second_mean", "Over the run, of all ranks.", _one("tokens_per_s_mean")),
    ("mfu_ratio", "Model FLOP/s over the dense bf16 rate of the accelerators.", _one("mfu")),
    ("eta_seconds", "Until the last step.", _one("eta_s")),
    ("goodput_ratio", "Time of steps that were kept over wall-clock.", _of("goodput", "share")),
    (
        "time_seconds",
        "Wall-clock since the first start, by where it went.",
        lambda seen: [({"class": what}, spent) for what, spent in (seen["goodput"] or {"seconds": {}})["seconds"].items()],
    ),
    ("restarts", "Processes after the first.", lambda seen: [({}, len(seen["restarts"]))]),
    ("checkpoint_step", "Of the newest whole checkpoint.", _of("checkpoint", "step")),
    ("checkpoint_age_seconds", "Of the newest whole checkpoint.", _of("checkpoint", "age_s")),
    (
        "rank_own_seconds",
        "Median of data and forward of a step, of the slowest ranks that record.",
        lambda seen: [({"rank": str(row["rank"])}, row["own_s"]) for row in seen["slowest_ranks"]],
    ),
    ("power_watts", "Drawn now within the boundary (device, node, it, facility); POWER.md defines them.", _each("power_watts")),
    ("tokens_per_second_per_megawatt", "Over the last window, by boundary.", _each("tokens_per_s_mw")),
    ("joules_per_token", "Over the last window, by boundary.", _each("joules_per_token")),
    ("energy_joules_total", "Drawn while processes ran, by boundary; what a restart did again included.", _each("energy_joules")),
    ("power_measured_ratio", "Share of the widest known boundary's watts that meters counted.", _one("power_measured_share")),
    ("power_capped_ratio", "Share of the accelerators' time at their power limit, over the last window.", _one("power_capped_share")),
    ("power_thermal_ratio", "Share of the accelerators' time that heat held them down, over the last window.", _one("power_thermal_share")),
    ("power_ramp_watts", "Largest change within ten seconds in the last hour, at the widest known boundary.", _one("power_ramp_watts")),
    (
        "drift_ratio",
        "Of what lies beyond the interval that the plan expected, over the interval's middle.",
        lambda seen: [({"what": one["what"]}, one["ratio"]) for one in seen["drift"] or ()],
    ),
    ("failed_ranks", "Ranks of the newest attempt that left an error.", _one("failed_ranks")),
    ("hung_ranks", "Ranks of the newest attempt that report no progress.", _one("hung_ranks")),
)


def exposition(seen: Mapping[str, Any]) -> str:
    """All metrics, each with its help and type; every sample carries the run's name."""
    said = []
    for name, text, samples in METRICS:
        said += [f"# HELP gigatrain_{name} {text}", f"# TYPE gigatrain_{name} gauge"]
        for labels, value in samples(seen):
            if value is not None:
                named = ",".join(f'{key}="{_quoted(word)}"' for key, word in {"run": Path(seen["run"]).name, **labels}.items())
                said.append(f"gigatrain_{name}{{{named}}} {float(value)!r}")
    return "\n".join(said) + "\n"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def token(run: Path, given: Path | None = None) -> tuple[str, str]:
    """The token that a scraper must bring, and where it is: a file, GIGATRAIN_TOKEN, or a new one in RUN/logs that only its owner can read."""
    if given is not None:
        try:
            said = given.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as failure:
            raise RunError(f"the token's file {given} cannot be read: {getattr(failure, 'strerror', None) or failure}") from None
        return _strong(said, str(given)), str(given)
    if "GIGATRAIN_TOKEN" in os.environ:
        return _strong(os.environ["GIGATRAIN_TOKEN"].strip(), "GIGATRAIN_TOKEN"), "GIGATRAIN_TOKEN"
    path = run / "logs" / "prometheus.token"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # it appears whole: another server may begin now
            whole = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
            try:
                with os.fdopen(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    file.write(secrets.token_urlsafe(32) + "\n")
                with contextlib.suppress(FileExistsError):
                    os.link(whole, path)
            finally:
                whole.unlink(missing_ok=True)
        os.chmod(path, 0o600)
        return _strong(path.read_text(encoding="utf-8").strip(), str(path)), str(path)
    except OSError as failure:
        raise RunError(f"{path} cannot be written: {failure.strerror}; give a token by --token-file or GIGATRAIN_TOKEN") from None


def _strong(said: str, where: str) -> str:
    if len(said) < 16 or not said.isascii() or not said.isprintable() or " " in said:
        raise RunError(
            f"the token of {where} has {len(said)} characters; it needs at least 16, of ASCII and without blanks: openssl rand -hex 24"
        )
    return said


def address(text: str) -> tuple[str, int]:
    """`[HOST:]PORT`; without a host only this machine can reach it."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise RunError(
            f"--serve {text!r}: {port!r} is no port between 0 and 65535; give PORT, or HOST:PORT for another interface than 127.0.0.1"
        )
    return host.strip("[]") or "127.0.0.1", int(port)


class Server:
    """Serves /metrics of one run, to who brings the token; `with` it, in a thread of its own."""

    def __init__(self, run: Path, place: tuple[str, int], secret: str) -> None:
        """Raises RunError where the address cannot be had."""
        reader, lock = Reader(run), threading.Lock()
        kept: list[Any] = [-10.0, b""]

        def body() -> bytes:
            with lock:
                if time.monotonic() - kept[0] > 1:
                    kept[:] = [time.monotonic(), exposition(reader.seen()).encode()]
                return kept[1]

        class Answer(http.server.BaseHTTPRequestHandler):
            timeout = 10  # of a connection that says nothing
            server_version, sys_version = "gigatrain", ""

            def do_GET(self) -> None:
                said = self.headers.get("Authorization", "")
                if not hmac.compare_digest(said.encode("utf-8", "replace"), f"Bearer {secret}".encode()):
                    self._say(401, b"a bearer token is needed\n", "text/plain", {"WWW-Authenticate": "Bearer"})
                elif self.path.split("?")[0] not in ("/metrics", "/"):
                    self._say(404, b"/metrics is what there is\n", "text/plain", {})
                else:
                    self._say(200, body(), CONTENT, {})

            def _say(self, code: int, data: bytes, content: str, more: Mapping[str, str]) -> None:
                self.send_response(code)
                for name, value in {"Content-Type": content, "Content-Length": str(len(data)), "Cache-Control": "no-store", **more}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *words: Any) -> None:
                """Nothing: requests are no news of a run, and their headers hold the token."""

        class Listener(http.server.ThreadingHTTPServer):
            daemon_threads = True
            address_family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET

            def server_bind(self) -> None:
                """Without HTTPServer's question to the name service, which nobody needs and a run would wait for."""
                socketserver.TCPServer.server_bind(self)
                self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

            def handle_error(self, *_: Any) -> None:
                """Who hangs up in the middle is no news either."""

        try:
            self.listener = Listener(place, Answer)
        except OSError as failure:
            raise RunError(
                f"{place[0]}:{place[1]} cannot be served: {failure.strerror or failure}; choose another address or port"
            ) from None
        self.host, self.port = str(self.listener.server_address[0]), int(self.listener.server_address[1])
        self._thread = threading.Thread(target=self.listener.serve_forever, name="gigatrain-prometheus", daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown()
        self.listener.server_close()


@contextlib.contextmanager
def served(run: Path, host: str, port: int | None, say: Callable[[str], None]) -> Iterator[None]:
    """Metrics while a run lives, if `port` says so; an address that cannot be had is said and stops nothing."""
    with contextlib.ExitStack() as stack:
        if port is not None:
            try:
                secret, where = token(run)
                server = stack.enter_context(Server(run, (host, port), secret))
                say(f"  metrics  http://{server.host}:{server.port}/metrics, bearer token in {where}")
            except RunError as failure:
                say(f"METRICS NOT SERVED: {failure}; training goes on")
        yield


def serve(run: Path, text: str, given: Path | None, say: Callable[[str], None]) -> None:
    """Until Ctrl-C."""
    secret, where = token(run, given)
    with Server(run, address(text), secret) as server:
        say(f"http://{server.host}:{server.port}/metrics, bearer token in {where}")
        threading.Event().wait()
