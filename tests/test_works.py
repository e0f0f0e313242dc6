"""README's table of what works is the one that its evidence makes, and a result that is not there makes it fail."""

import works


def test_the_table_is_made_of_tests_and_rows_that_exist():
    there = works.rows()
    assert [said for row in there for said in row.missing()] == []
    assert works.shown() == works.table(there), "python tests/works.py --write"


def test_what_nobody_tested_or_measured_is_not_yet(tmp_path):
    row = works.Row("flying", "no wings were at hand", (), ())
    assert row.answer() == "not yet: no wings were at hand"
    assert works.Row("flying", "", ("tests/test_wings.py",), ("step.csv", "device", "Zeppelin")).missing() == [
        "tests/test_wings.py",
        "step.csv: no device with 'Zeppelin'",
    ]


def test_a_row_is_kept_only_if_all_its_tests_passed(tmp_path):
    cases = {"passed": "", "skipped": "<skipped/>", "failed": "<failure/>", "left": f'<skipped message="{works.OTHER_DAY}"/>'}
    for ends in (
        ("passed",),
        ("skipped",),
        ("passed", "failed"),
        ("passed", "skipped"),
        ("left",),
        ("left", "failed"),
        ("left", "skipped"),
    ):
        lines = "".join(f'<testcase classname="tests.test_a" name="test_b[{at}]">{cases[end]}</testcase>' for at, end in enumerate(ends))
        (tmp_path / "a.xml").write_text(f"<testsuites><testsuite>{lines}</testsuite></testsuites>")
        seen = works.outcomes(tmp_path)
        kept = "failed" not in ends and ("passed" in ends or set(ends) == {"left"})
        for name in ("tests/test_a.py", "tests/test_a.py::test_b"):
            assert (works.unkept(works.Row("", "", (name,), ()), seen) == []) is kept, (name, ends)
        assert works.unkept(works.Row("", "", ("tests/test_a.py::test_c",), ()), seen) == ["tests/test_a.py::test_c: did not run"]
