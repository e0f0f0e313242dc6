"""Times, prices and limits: read as written, refused by line, and never believed for longer than they hold."""

import datetime
import os

import pytest

from gigatrain.errors import PowerError
from gigatrain.power.schedule import Now, Schedule


def at(text):
    return datetime.datetime.fromisoformat(text).timestamp()


def wrote(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "prices.csv"
    path.write_bytes(text.encode(encoding))
    return path


DATED = "time,megawatts,price_eur_mwh\n2026-11-26T00:00+01:00,20,41.2\n2026-11-26T17:00+01:00,12,-8\n\n2026-11-26T20:00:00+01:00,20,\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_row_holds_until_the_next(tmp_path, encoding):
    found = Schedule.read(wrote(tmp_path, DATED, encoding))
    five = at("2026-11-26T16:00Z")
    assert found.at(five - 1) == Now(20.0, 41.2, None, five)
    assert found.at(five) == Now(12.0, -8.0, None, at("2026-11-26T19:00Z"))
    assert found.at(at("2026-11-26T19:30Z")) == Now(20.0)
    assert Schedule.of(found.json()) == found


def test_before_its_first_row_nothing_is_known_and_after_its_last_only_the_limit(tmp_path):
    found = Schedule.read(wrote(tmp_path, "time,megawatts,carbon_g_kwh\n2026-11-26T00:00Z,20,300\n"))
    early = found.at(at("2026-11-25T00:00Z"))
    assert (early.megawatts, early.carbon_g_kwh, early.until_s) == (None, None, at("2026-11-26T00:00Z"))
    assert "begins at 2026-11-26 00:00 UTC" in early.note
    assert found.at(at("2026-11-26T23:59Z")) == Now(20.0, None, 300.0, at("2026-11-27T00:00Z"))
    late = found.at(at("2026-11-27T00:00Z"))
    assert (late.megawatts, late.carbon_g_kwh, late.until_s) == (20.0, None, None)
    assert "more than 24 h ago" in late.note


def test_times_of_day_are_utc_and_come_every_day(tmp_path):
    found = Schedule.read(wrote(tmp_path, "time,price_eur_mwh\n06:00,95\n22:00,40\n"))
    assert found.at(at("2026-11-26T05:59Z")) == Now(None, 40.0, None, at("2026-11-26T06:00Z"))
    assert found.at(at("2026-11-26T06:00Z")) == Now(None, 95.0, None, at("2026-11-26T22:00Z"))
    assert found.at(at("2031-01-01T23:00+00:00")) == Now(None, 40.0, None, at("2031-01-02T06:00Z"))
    stretches = list(found.between(at("2026-11-26T21:00Z"), at("2026-11-27T07:00Z")))
    assert [(seconds / 3600, now.price_eur_mwh) for seconds, now in stretches] == [(1.0, 95.0), (8.0, 40.0), (1.0, 95.0)]
    alone = Schedule.read(wrote(tmp_path, "time,megawatts\n12:00,3\n"))
    assert alone.at(at("2026-11-26T01:00Z")) == Now(3.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no header"),
        ("time;megawatts\n", "separated by commas"),
        ("when,megawatts\n", "line 1: 'when,megawatts' is no header; it begins with time"),
        ("time,price\n", "'price' is no column"),
        ("time,megawatts,megawatts\n", "twice"),
        ("time\n00:00\n", "only times"),
        ("time,megawatts\n", "no rows"),
        ("time,megawatts\n2026-11-26T17:00,5\n", "line 2: '2026-11-26T17:00' has no zone"),
        ("time,megawatts\n2026-11-26,5\n", "has no zone"),
        ("time,megawatts\nnoon,5\n", "line 2: 'noon' is no time"),
        ("time,megawatts\n24:00,5\n", "'24:00' is no time"),
        ("time,megawatts\n06:00,5\n\n2026-11-26T17:00Z,5\n", "line 4: .* all times of a schedule have a date, or none"),
        ("time,megawatts\n06:00,5\n06:00,6\n", "line 3: '06:00' is not after"),
        ("time,megawatts\n06:00,nan\n", "line 2: megawatts nan is not between"),
        ("time,megawatts\n06:00,five\n", "megawatts 'five' is no number"),
        ("time,megawatts\n06:00,-1\n", "below 0; only prices may be"),
        ("time,megawatts\n06:00,5,3\n", "3 cells under a header of 2; numbers have a point"),
        ('time,megawatts\n06:00,"5\n', "no CSV"),
    ],
)
def test_what_is_wrong_is_named_by_line(tmp_path, text, said):
    with pytest.raises(PowerError, match=said):
        Schedule.read(wrote(tmp_path, text))


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    with pytest.raises(PowerError, match="gone.csv: the schedule cannot be read: No such file"):
        Schedule.read(tmp_path / "gone.csv")
    (tmp_path / "prices.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PowerError, match="not UTF-8"):
        Schedule.read(tmp_path / "prices.csv")


def test_a_pipe_is_no_schedule_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "prices.csv")
    for path in (tmp_path / "prices.csv", tmp_path):
        with pytest.raises(PowerError, match=r"no regular file; set power\.schedule to a CSV file"):
            Schedule.read(path)
