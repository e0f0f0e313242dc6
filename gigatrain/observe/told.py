"""What rank 0 told of a run's time, logs/progress.jsonl, as it adds up: read on as it grows, in memory that does not. Free of torch."""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gigatrain.observe.goodput import Event, Sessions, number
from gigatrain.observe.legs import passed
from gigatrain.observe.tail import Tail

REPORTS = 1_000  # the newest by step: of the windows that a reader keeps, and of as many that a rollback takes back
RECENT = 20  # events


class Told:
    """The events of a run's processes, each read once, but where one begins before the end of another: then all once more."""

    def __init__(self, run: Path) -> None:
        self._tail = Tail(run / "logs" / "progress.jsonl")
        self._forget(Sessions())

    def _forget(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.recent: deque[Event] = deque(maxlen=RECENT)
        self.reports: dict[Any, Event] = {}  # by step
        self.saved: Event | None = None
        self.not_saved: str | None = None  # why the newest try was none
        self._stepping: set[Any] = set()  # processes that have begun to train
        self._saves: dict[Any, Event] = {}  # what each process says of how often it saves

    def read(self, record: Mapping[str, Any]) -> None:
        """What is new; `record`: run.json, whose legs ask for tokens."""
        self._take(record)
        while self.sessions.stale:
            self._tail.again()
            self._forget(self.sessions.again())
            self._take(record)

    def _take(self, record: Mapping[str, Any]) -> None:
        for rows, afresh in self._tail.parts():
            if afresh:
                self._forget(Sessions())
            for row in rows:
                if isinstance(row.get("event"), str) and _timed(row):
                    self._add(row)
        for step in passed(record, self.sessions):
            self.sessions.ask(step)

    def _add(self, event: Event) -> None:
        self.sessions.add(event)
        self.recent.append(event)
        what, process = event["event"], event.get("process")
        step = number(event, "step")
        if what == "report" and isinstance(step, int):
            self.reports.pop(step, None)  # the newest word is the last to go
            self.reports[step] = event
            if len(self.reports) > REPORTS:
                del self.reports[next(iter(self.reports))]
        elif what == "steps" and step is not None:
            self._stepping.add(process)
        elif what == "saves":
            self._saves[process] = event
        elif what == "saved":
            self.saved, self.not_saved = event, None
        elif what == "not saved":
            self.not_saved = str(event.get("why"))

    @property
    def last(self) -> Event:
        """The newest event; empty before there is one."""
        return self.recent[-1] if self.recent else {}

    @property
    def stepping(self) -> bool:
        """Whether the newest event's process has begun to train."""
        return self.last.get("process") in self._stepping

    @property
    def saves(self) -> Event | None:
        """What the newest event's process says of how often it saves."""
        return self._saves.get(self.last.get("process"))


def _timed(row: Event) -> bool:
    """Whether an event says when, and of which process."""
    return number(row, "time_s") is not None and isinstance(row.get("process"), (str, int, type(None)))
