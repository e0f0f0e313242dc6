"""Megawatts, prices and carbon by time of day: a CSV file that a run follows.

    time,megawatts,price_eur_mwh            time,price_eur_mwh
    2026-11-26T00:00+01:00,20,41.2          06:00,95
    2026-11-26T17:00+01:00,12,188.0         22:00,40
    2026-11-26T20:00+01:00,20,63.5

Columns: `time`, and any of `megawatts` (of the facility, what the run may draw; 0 pauses it), `price_eur_mwh` (may be negative) and `carbon_g_kwh`.
Times ascend, and all are dated with their zone (ISO 8601), or all are a time of day in UTC, repeated every day. A row holds until the next; an empty cell
says that nothing is known of its column from there on.

Before the first dated row nothing is known. The last one's price and carbon are believed for 24 h and then unknown; its megawatts go on, since a limit
does not end because nobody has written a newer file.
"""

import csv
import datetime
import math
import re
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigatrain.errors import PowerError

COLUMNS = ("megawatts", "price_eur_mwh", "carbon_g_kwh")
DAY_S = 86_400.0
BELIEVED_S = DAY_S  # for which the last dated row's price and carbon are taken
MOST_BYTES = 64 << 20  # a year of minutes is a fifth of it


@dataclass(frozen=True)
class Now:
    """What a schedule says at some time; None: nothing. `until_s`: when it next says something else, seconds since 1970; None: never again."""

    megawatts: float | None = None
    price_eur_mwh: float | None = None
    carbon_g_kwh: float | None = None
    until_s: float | None = None
    note: str = ""  # that the schedule has not begun, or is over


@dataclass(frozen=True)
class Schedule:
    """Rows of (seconds since 1970, or since midnight UTC, then COLUMNS), ascending."""

    rows: tuple[tuple[float, float | None, float | None, float | None], ...]
    daily: bool
    source: str = ""

    @classmethod
    def read(cls, path: str | Path) -> "Schedule":
        """A schedule from its file; raises PowerError that names file, line and value."""
        path = Path(path).expanduser()
        try:
            about = path.stat()
            if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for, and read once
                raise PowerError(f"{path}: the schedule is no regular file; set power.schedule to a CSV file")
            if about.st_size > MOST_BYTES:
                raise PowerError(f"{path}: {about.st_size:,} bytes are no schedule (at most {MOST_BYTES:,}); a row a change is enough")
            text = path.read_text(encoding="utf-8-sig")
        except OSError as failure:
            raise PowerError(f"{path}: the schedule cannot be read: {failure.strerror}; set power.schedule to a CSV file") from None
        except UnicodeDecodeError as failure:
            raise PowerError(f"{path}: the schedule is not UTF-8 (byte {failure.start}); save it as CSV in UTF-8") from None
        try:
            lines = csv.reader(text.splitlines(), strict=True)
            return cls._parsed(((lines.line_num, row) for row in lines if any(cell.strip() for cell in row)), str(path))
        except csv.Error as failure:
            raise PowerError(f"{path}: no CSV: {failure}") from None

    @classmethod
    def _parsed(cls, lines: Iterator[tuple[int, list[str]]], path: str) -> "Schedule":
        number, header = next(lines, (1, []))
        names = [name.strip() for name in header]
        where = f"{path}, line {number}"
        if not names or names[0] != "time":
            separated = "; columns are separated by commas" if ";" in "".join(names) else ""
            raise PowerError(
                f"{where}: {','.join(names)[:80]!r} is no header; it begins with time, then any of {', '.join(COLUMNS)}{separated}"
            )
        for name in names[1:]:
            if name not in COLUMNS or names.count(name) > 1:
                why = "is there twice" if name in COLUMNS else "is no column of a schedule"
                raise PowerError(f"{where}: {name!r} {why}; after time come any of {', '.join(COLUMNS)}")
        if len(names) == 1:
            raise PowerError(f"{where}: only times; add a column: {', '.join(COLUMNS)}")
        rows: list[tuple[float, float | None, float | None, float | None]] = []
        daily: bool | None = None
        for number, cells in lines:
            where = f"{path}, line {number}"
            if len(cells) != len(names):
                comma = "; numbers have a point, not a comma" if len(cells) > len(names) else ""
                raise PowerError(f"{where}: {len(cells)} cells under a header of {len(names)}{comma}")
            time_s, of_day = _time(cells[0].strip(), where)
            if daily is not None and daily != of_day:
                raise PowerError(f"{where}: {cells[0]!r}: all times of a schedule have a date, or none has")
            daily = of_day
            if rows and time_s <= rows[-1][0]:
                raise PowerError(f"{where}: {cells[0]!r} is not after the row before it; times ascend")
            found = {name: _number(name, cell.strip(), where) for name, cell in zip(names[1:], cells[1:], strict=True)}
            rows.append((time_s, found.get("megawatts"), found.get("price_eur_mwh"), found.get("carbon_g_kwh")))
        if not rows:
            raise PowerError(f"{path}: a header and no rows; give at least one, such as 00:00,...")
        return cls(tuple(rows), bool(daily), path)

    def at(self, time_s: float) -> Now:
        """What it says at a time, seconds since 1970."""
        midnight = math.floor(time_s / DAY_S) * DAY_S if self.daily else 0.0
        index = bisect_right(self.rows, time_s - midnight, key=lambda row: row[0]) - 1
        if self.daily:  # before the day's first row yesterday's last one holds
            after = self.rows[index + 1][0] + midnight if index + 1 < len(self.rows) else self.rows[0][0] + midnight + DAY_S
            return Now(*self.rows[index][1:], until_s=after if len(self.rows) > 1 else None)
        if index < 0:
            return Now(until_s=self.rows[0][0], note=f"{self.source} begins at {shown(self.rows[0][0])}")
        begun, megawatts, price, carbon = self.rows[index]
        if index + 1 < len(self.rows):
            return Now(megawatts, price, carbon, self.rows[index + 1][0])
        if time_s < begun + BELIEVED_S:
            return Now(megawatts, price, carbon, begun + BELIEVED_S if (price, carbon) != (None, None) else None)
        return Now(megawatts, note=f"{self.source} ended at {shown(begun)}, more than 24 h ago: prices and carbon are unknown")

    def between(self, begin_s: float, end_s: float) -> Iterator[tuple[float, Now]]:
        """`(seconds, what it says)` of every stretch from one time to another, in order."""
        while begin_s < end_s:
            now = self.at(begin_s)
            until_s = end_s if now.until_s is None else min(end_s, now.until_s)
            yield until_s - begin_s, now
            begin_s = until_s

    def json(self) -> dict[str, Any]:
        """As JSON values, so that one process reads the file and tells the others; `of` is the opposite."""
        return {"rows": [list(row) for row in self.rows], "daily": self.daily, "source": self.source}

    @classmethod
    def of(cls, value: dict[str, Any]) -> "Schedule":
        rows: Sequence[Sequence[Any]] = value["rows"]
        return cls(tuple((row[0], row[1], row[2], row[3]) for row in rows), bool(value["daily"]), str(value["source"]))


def shown(time_s: float) -> str:
    """A time for a reader, in UTC."""
    return f"{datetime.datetime.fromtimestamp(time_s, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _time(text: str, where: str) -> tuple[float, bool]:
    """Seconds, and whether they are of a day."""
    if of_day := re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)", text):
        return 3600.0 * int(of_day[1]) + 60.0 * int(of_day[2]), True
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise PowerError(f"{where}: {text[:40]!r} is no time; write 2026-11-26T17:00+01:00, or 17:00 (UTC, every day)") from None
    if found.tzinfo is None:
        raise PowerError(f"{where}: {text!r} has no zone, so it is another moment in Helsinki and in Lisbon; add Z for UTC, or +01:00")
    return found.timestamp(), False


def _number(name: str, text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        found = float(text)
    except ValueError:
        raise PowerError(f"{where}: {name} {text[:40]!r} is no number") from None
    if not math.isfinite(found) or abs(found) > 1e6:
        raise PowerError(f"{where}: {name} {text} is not between -1,000,000 and 1,000,000")
    if found < 0 and name != "price_eur_mwh":
        raise PowerError(f"{where}: {name} {text} is below 0; only prices may be")
    return found
