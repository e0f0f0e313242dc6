"""A file that grows, is torn, cut or replaced while it is read: each whole line once, and never one of another file."""

import json

from gigatrain.observe import tail as tailing
from gigatrain.observe.tail import Tail, ending


def test_files_that_grow_are_torn_or_are_replaced(tmp_path):
    path = tmp_path / "rows.jsonl"
    tail = Tail(path)
    assert tail.rows() == ([], False)
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert tail.rows()[0] == [{"step": 1}, {"step": 2}]
    assert tail.rows() == ([], False)
    with path.open("ab") as file:
        file.write(b'ep": 3}\nno json\n[1]\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"step": 4}\n')
    assert tail.rows() == ([{"step": 3}, {"step": 4}], False)
    other = tmp_path / "other"
    other.write_bytes(b'{"step": 1}\n')
    other.replace(path)  # as a resume does
    assert tail.rows() == ([{"step": 1}], True)
    path.unlink()
    assert tail.rows() == ([], True)


def test_a_file_that_was_cut_and_has_grown_beyond_the_place_is_read_afresh(tmp_path):
    """A rollback cuts metrics.jsonl, and a scrape may come when other windows are already behind the place of the last."""
    path = tmp_path / "metrics.jsonl"
    windows = [json.dumps({"step": step, "loss": 2.5, "bad_steps": 0}) + "\n" for step in (10, 20, 30)]
    path.write_text("".join(windows))
    tail = Tail(path)
    assert len(tail.rows()[0]) == 3
    with path.open("r+") as file:  # in place: the inode stays
        file.truncate(len(windows[0]))
        file.seek(0, 2)
        file.write("".join(json.dumps({"step": step, "loss": 2.25, "bad_steps": 1}) + "\n" for step in (20, 30, 40, 50)))
    rows, afresh = tail.rows()
    assert afresh
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50]
    assert tail.rows() == ([], False)


def test_a_long_file_comes_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(tailing, "PART_BYTES", 32)
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(f'{{"step": {step}, "why": "{"x" * (step % 60)}"}}\n' for step in range(200)) + "no json, and long\n" * 9 + '{"st'
    )
    tail = Tail(path)
    parts = list(tail.parts())
    assert [row["step"] for rows, _ in parts for row in rows] == [*range(200)]
    assert len(parts) > 100
    assert [afresh for _, afresh in parts] == [True] + [False] * (len(parts) - 1)
    assert list(tail.parts()) == []
    with path.open("a") as file:
        file.write('ep": 200}\n')
    assert list(tail.parts()) == [([{"step": 200}], False)]
    tail.again()
    assert sum(len(rows) for rows, afresh in tail.parts() if not afresh) == 201
    path.unlink()
    assert list(tail.parts()) == [([], True)]


def test_the_last_lines_of_a_long_file_are_its_whole_objects(tmp_path):
    path = tmp_path / "rank-00000.jsonl"
    assert list(ending(path, 100)) == []
    path.write_text('{"step": 1}\n{"step": 2}\n[3]\n{"step": \n{"step": 5}\n' + "[" * 5000 + '\n{"step": 7}')
    assert [row["step"] for row in ending(path, 1 << 20)] == [1, 2, 5, 7]
    assert [row["step"] for row in ending(path, path.stat().st_size)] == [1, 2, 5, 7]
    assert [row["step"] for row in ending(path, path.stat().st_size - 3)] == [2, 5, 7]  # the rest of a line is no line
