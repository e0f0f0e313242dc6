"""What the doctor says of one node, as a file: written whole or not at all, and first before anything that may hang."""

import datetime
import json
import os
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gigatrain.preflight.findings import Finding, Health, health


def node_name() -> str:
    """As the scheduler calls this node, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass
class Verdict:
    """One node's findings. `running` names the check it was in when this was written; None: it came to its end.

    `facts` is what nodes are compared by (hardware, digest of the burn, device), `versions` what must be equal; `rank` of `ranks` where it was a task of a job.
    """

    node: str
    findings: list[Finding] = field(default_factory=list)
    running: str | None = "start"
    began: str = field(default_factory=now)
    took_s: float = 0.0
    rank: int = 0
    ranks: int = 1
    attempt: int = field(default_factory=lambda: int(os.environ.get("GIGATRAIN_ATTEMPT") or 0))
    facts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def health(self) -> Health:
        return health(self.findings)

    @property
    def reasons(self) -> list[str]:
        """Why it is not healthy, the worst first."""
        return [f"{one.name}: {one.said}" for state in ("bad", "warn") for one in self.findings if one.state == state]

    def json(self) -> dict[str, Any]:
        told = {"format": 1, "node": self.node, "health": self.health, "reasons": self.reasons}
        named = ("running", "began", "took_s", "rank", "ranks", "attempt", "facts", "versions")
        return told | {name: getattr(self, name) for name in named} | {"findings": [finding.json() for finding in self.findings]}

    def write(self, folder: Path) -> Path:
        """`folder/NODE.json`, replaced as a whole."""
        path = folder / f"{self.node}.json"
        new = folder / f".{self.node}.{secrets.token_hex(4)}.new"
        try:
            with new.open("w") as file:
                json.dump(self.json(), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        return path


def read(path: Path) -> Verdict:
    """A verdict as it was written; one that cannot be read is a verdict too: bad, with the reason."""
    try:
        found = json.loads(path.read_text())
        named = ("node", "running", "began", "took_s", "rank", "ranks", "attempt", "facts", "versions")
        return Verdict(findings=[Finding(**one) for one in found["findings"]], **{name: found[name] for name in named})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as failure:
        said = f"its verdict cannot be read: {type(failure).__name__}: {failure}"
        return Verdict(path.stem, [Finding("verdict", "bad", said)], None)
