"""The page of a plan: everything that is known is on it, what is not says so, nothing leaves the file, and its sliders agree with the plan."""

import base64
import hashlib
import json
import re

import chromium
import pytest
from pictured import GIB, held, pictured
from test_report_browser import COVERED, EMPTY, WIDE

from gigatrain.errors import RunError
from gigatrain.observe.report.logscale import Dot, Line, Scales, chart, decades
from gigatrain.observe.report.planned import page, write
from gigatrain.observe.report.whatif import given
from gigatrain.planning.expected import Expected
from gigatrain.planning.picture import Candidate, PlanPicture, Role, Scale

HOSTILE = "</script><script>hacked=1</script>\"'><img src=x onerror=hacked=1>" + "W" * 200


def texts(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_what_a_plan_expects_is_on_its_page():
    html = page(pictured())
    said = texts(html)
    for words in (
        "Limited by products of matrices (66 % of the step).",
        "Outside of what was calibrated: accelerators: 16,384",
        "pipeline rank 15",
        "activations 38.00 GiB",
        "replicate 128 x tensor 8 x pipeline 16, interleaved of 4",
        "+2.1 %; 4.39 s to 5.26 s",
        "tensor-parallel transfers",
        "bf16 roof",
        "no multiple of 128",
        "Saving every 310 steps would be best.",
        "unknown: the site&#x27;s carbon of a kWh is unknown",
        "nameplate, nodes",
        "a spine without oversubscription",
        "Interpolated, not planned anew",
    ):
        assert words in said, words
    assert html.count("<tr class=chosen>") == 1


def test_nothing_leaves_the_file_and_only_its_own_script_runs():
    html = page(pictured())
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://", html)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', html)
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 1
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    still = page(pictured(what_if=None))
    assert "<script" not in still
    assert "What if" not in still


def test_every_given_text_is_escaped():
    role = Role(HOSTILE, {"gemm": 1.0}, held(0))
    html = page(
        pictured(
            title=HOSTILE, summary=HOSTILE, facts=((HOSTILE, HOSTILE),), lines=(HOSTILE,), roles=(role,), states={HOSTILE: 1.0},
            candidates=(Candidate(HOSTILE, 1.0, 0.9, 1.1, {HOSTILE: 1.0}, GIB, None, 1.0, HOSTILE, HOSTILE),),
            expected=pictured().expected.model_copy(update={"limits": HOSTILE, "outside": (HOSTILE,), "unknown": {HOSTILE: HOSTILE}}),
        )
    )  # fmt: skip
    assert "<img" not in html
    assert html.count("<script") == 2  # its data and its own


def test_a_plan_that_knows_nothing_says_so_everywhere(tmp_path):
    html = page(PlanPicture("bare", expected=Expected(unknown={"step_s": "cpu is no accelerator of planning/hardware.py"})))
    said = texts(html)
    assert said.count("cpu is no accelerator") >= 2
    for title in ("A step", "Time by role", "Memory by role", "Layouts", "Roofline", "Watts", "Scaling", "Goodput", "Sensitivity"):
        assert re.search(rf"<h2>{title}</h2><p>unknown: \S", html), title
    assert not re.search(r">\s*(nan|None|inf)\b", html)
    write(PlanPicture("bare"), tmp_path / "plan.html")
    assert (tmp_path / "plan.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(RunError, match="name another --report"):
        write(PlanPicture("bare"), tmp_path / "no" / "plan.html")


def test_one_row_of_a_curve_and_scales_of_decades():
    assert decades(128, 288_000) == [100, 1000, 10_000, 100_000, 1_000_000]
    assert decades(300, 2600) == [200, 500, 1000, 2000, 5000]
    assert decades(10, 10) == [10.0]
    html = chart("one", [Line("a", [(8.0, 1.0)])], [Dot("d", 8.0, 1.0)], Scales("x", "y"))
    assert "nan" not in html
    assert page(pictured(scaling=(Scale(8, "one", 8, 1.0, 5000.0),)))
    told = given(pictured())
    assert told is not None
    assert json.dumps(told, allow_nan=False)
    assert given(pictured(scaling=())) is None


@pytest.mark.skipif(chromium.PATH is None, reason="needs chromium (Debian: apt-get install chromium)")
def test_in_a_browser_it_fits_a_telephone_and_its_sliders_move(tmp_path):
    picture = pictured()
    write(picture, tmp_path / "plan.html")
    with chromium.Chromium() as browser:
        assert browser.open(tmp_path / "plan.html", width=400, dark=True) == []  # its own policy refused nothing that it needs
        for width in (400, 1280):
            browser("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            assert browser.value("document.documentElement.scrollWidth") == width
            assert browser.value(WIDE) == []
            assert browser.value(COVERED) == []
            assert browser.value(EMPTY) == 0

        def shown(key):
            return browser.value(
                f"document.getElementById('now-{key}').textContent + '|' + document.getElementById('by-{key}').textContent"
            )

        assert picture.expected.days is not None
        assert shown("days") == f"{picture.expected.days.mid:.2f}|as planned"
        assert shown("tco2") == "unknown|"
        move = "(() => {{ const one = document.getElementById('in-{}'); one.value = {}; one.dispatchEvent(new Event('input', {{bubbles: true}})) }})()"
        browser.value(move.format("pue", 1.08))
        assert shown("megawatts") == "17.28|\u221210.0\u00a0%"
        browser.value(move.format("count", "Math.log(8192)"))
        assert float(shown("days").split("|")[0]) > picture.expected.days.mid
        browser.value(move.format("failures", "Math.log(2.5)"))
        good = float(shown("goodput").split("\u00a0")[0])
        browser.value(move.format("failures", "Math.log(0.1)"))
        assert float(shown("goodput").split("\u00a0")[0]) > good
        browser.value("document.querySelector('#whatif button').click()")
        browser("Runtime.evaluate", expression="new Promise(done => setTimeout(done, 50))", awaitPromise=True)
        assert shown("days") == f"{picture.expected.days.mid:.2f}|as planned"
        assert "undefined" not in browser.value("document.body.textContent")
