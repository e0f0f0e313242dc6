"""Lines on a disk that is full, that fails, and that is well again."""

import errno
import os

import pytest

from gigatrain.observe.lines import Lines


class Full:
    """A file whose disk has room for so many bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = min(self.room, len(data))
        self.room -= taken
        return self.file.write(data[:taken])

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_lines_wait_for_room_and_none_is_torn_or_lost(tmp_path):
    lines = Lines(tmp_path / "lines")
    lines.add("one")
    lines._file = full = Full(lines._file, 6)  # type: ignore[assignment]
    lines.add("two")
    lines.add("three")
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"
    assert lines.refused
    assert lines.waiting == ["three"]
    full.room = 1000
    lines.add("four")
    assert not lines.waiting
    assert (tmp_path / "lines").read_text() == "one\ntwo\nthree\nfour\n"


def test_what_waited_in_a_checkpoint_is_written_once(tmp_path):
    path = tmp_path / "lines"
    path.write_text("one\ntwo\n")
    lines = Lines(path)
    lines.again(["two", "three"])
    lines.close()
    assert path.read_text() == "one\ntwo\nthree\n"


def test_after_a_failed_sync_the_bytes_are_written_again(tmp_path, monkeypatch):
    lines = Lines(tmp_path / "lines")
    lines.add("one")
    lines.sync()
    lines.add("two")
    sync, wrote = os.fsync, []

    def refuses(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuses)
    lines.sync()
    assert lines.refused == os.strerror(errno.EIO)
    monkeypatch.setattr(os, "fsync", sync)
    file = lines._file

    class Seen:
        def write(self, data):
            wrote.append(bytes(data))
            return file.write(data)

        def __getattr__(self, name):
            return getattr(file, name)

    lines._file = Seen()  # type: ignore[assignment]
    lines.sync()
    assert wrote == [b"two\n"]
    assert lines.refused is None
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"


@pytest.mark.parametrize("before", [None, "old\n"])
def test_it_appends(tmp_path, before):
    path = tmp_path / "lines"
    if before:
        path.write_text(before)
    with open(os.devnull):
        lines = Lines(path)
    lines.add("new")
    lines.close()
    assert path.read_text() == (before or "") + "new\n"
