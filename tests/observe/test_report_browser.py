"""The report of a real run, and of one with joules, in a real browser: light, dark, on a telephone and on paper."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chromium
import numpy
import pytest
from reported import made

from gigatrain.observe.report import report

pytestmark = pytest.mark.skipif(chromium.PATH is None, reason="needs chromium (Debian: apt-get install chromium)")
HOSTILE = "<script>hacked=1</script>\"'><img src=x onerror=hacked=1>" + "W" * 300

# What lies wider than the page although nothing scrolls it, words that cover each other on a picture, and pictures without a size.
WIDE = """[...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll') && one.getBoundingClientRect().right > innerWidth + 1)
  .map(one => one.tagName + '.' + one.getAttribute('class'))"""
COVERED = """[...document.querySelectorAll('.chart')].flatMap(chart => ['.end', '.ty', '.tx'].flatMap(kind => {
  const boxes = [...chart.querySelectorAll(kind)].map(one => [one.textContent, one.getBoundingClientRect()]);
  return boxes.flatMap(([text, one], at) => boxes.slice(at + 1)
    .filter(([_, two]) => Math.min(one.bottom, two.bottom) - Math.max(one.top, two.top) > 3)
    .filter(([_, two]) => Math.min(one.right, two.right) - Math.max(one.left, two.left) > 1)
    .map(([other]) => text + ' | ' + other)) }))"""
EMPTY = "[...document.querySelectorAll('svg')].filter(one => one.getBoundingClientRect().width < 20 || one.getBoundingClientRect().height < 8).length"
GROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def pages(tiny, tmp_path_factory):
    """Of a real run, of one with every part, and of three side by side, one of them with hostile words."""
    folder = tmp_path_factory.mktemp("reported")
    command = [
        sys.executable,
        "-m",
        "gigatrain",
        "train",
        str(tiny),
        "--run",
        str(folder / "real"),
        "--set",
        "export=false",
        "--set",
        "train.steps=6",
    ]
    subprocess.run(command, capture_output=True, check=True, timeout=200)
    made(folder / "whole")
    made(folder / "hostile", windows=12, killed=6, energy=False, finished=False, name=HOSTILE)
    history = folder / "hostile" / "launch" / "history.jsonl"
    history.write_text(json.dumps({"time": "T", "event": "judged", "attempt": 0, "why": HOSTILE}) + "\n")
    report([folder / "real"], str(folder / "real.html"), say=str)
    report([folder / "whole"], str(folder / "whole.html"), say=str)
    report([folder / "whole", folder / "real", folder / "hostile"], str(folder / "several.html"), say=str)
    small = made(folder / "small", windows=8, killed=None)
    report([small] * 12, str(folder / "many.html"), say=str)
    return folder


@pytest.fixture(scope="module")
def browser():
    with chromium.Chromium() as browser:
        yield browser


def pixels(data):
    """Rows of (red, green, blue), each 0 to 255."""
    image = pytest.importorskip(
        "PIL.Image", reason="needs pillow, which comes with matplotlib (pip install 'gigatrain[bench]'), to look at pictures"
    )
    return numpy.asarray(image.open(io.BytesIO(data)).convert("RGB")).astype(numpy.int16)


@pytest.mark.parametrize("width", [1400, 820, 400])
@pytest.mark.parametrize("name", ["real", "whole", "several", "many"])
def test_nothing_is_wider_than_the_page_or_covers_a_word(pages, browser, name, width):
    assert browser.open(pages / f"{name}.html", width=width) == []  # its own policy refused nothing that it needs
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.value(WIDE) == []
    assert browser.value(COVERED) == []
    assert browser.value(EMPTY) == 0
    assert browser.value("typeof hacked") == "undefined"
    assert browser.value("document.querySelectorAll('script, img, link, iframe, object, form').length") == 0


def test_light_and_dark_and_neither_is_blank(pages, browser):
    for dark in (False, True):
        browser.open(pages / "real.html", width=1400, dark=dark)
        data = browser.picture()
        if keep := os.environ.get("GIGATRAIN_PICTURES"):  # a folder, for who wants to look
            Path(keep, f"report-{'dark' if dark else 'light'}.png").write_bytes(data)
        shown = pixels(data)
        ground = shown[2, 2]
        assert ground.tolist() == [int(one) for one in re.findall(r"\d+", browser.value(GROUND))]
        assert (ground.max() < 40) if dark else (ground.min() > 220)
        assert len(shown) > 2000
        inked = abs(shown - ground).max(axis=2) > 90
        assert inked.mean() < 0.2  # much room
        for third in range(3):  # and every part of it has something to read
            assert inked[third * len(shown) // 3 : (third + 1) * len(shown) // 3].mean() > 0.003


def test_keyboard_reaches_what_scrolls_and_what_opens(pages, browser):
    browser.open(pages / "several.html", width=400)
    reached = browser.value(
        "[...document.querySelectorAll('a[href], summary, [tabindex]')].every(one => { one.focus(); return document.activeElement === one })"
    )
    assert reached
    scrolling = "[...document.querySelectorAll('.scroll')].every(one => one.tabIndex === 0 && one.getAttribute('aria-label'))"
    assert browser.value(scrolling)
    assert browser.value("[...document.querySelectorAll('nav a')].every(one => document.querySelector(one.getAttribute('href')))")


def test_paper(pages, browser):
    browser.open(pages / "whole.html", width=1400, dark=True)
    data = browser.pdf()
    assert data.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page[^s]", data)) <= 10
    browser.open(pages / "whole.html", width=718, dark=True, media="print")  # A4 less its margins
    assert browser.value(GROUND) == "rgb(255, 255, 255)"
    assert browser.value("document.documentElement.scrollWidth") == 718
    assert browser.value(COVERED) == []
