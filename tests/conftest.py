"""A tiny recipe over a small corpus, built once a session: real data, real tokenizer, a model of a few thousand parameters."""

import os
import sysconfig
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and pytest -n 2 fills both cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import interpreter  # noqa: F401 (kernels run in Triton's interpreter, corrected; before anything imports triton)
import pytest
from tinyrecipe import TINY
from works import OTHER_DAY

from gigatrain.kernels import widened

if widened.needed():  # from the start, as the first engine of a process would: tests do not depend on what ran before them
    widened.register()


def pytest_addoption(parser):
    parser.addoption("--share", metavar="K/N", help="of the long tests, only the Kth of N shares; each test is in the same one every time")


def pytest_collection_modifyitems(config, items):
    """The long tests outside of the asked share are skipped and say so; the table of what works does not miss them."""
    if (asked := config.getoption("--share")) is None:
        return
    mine, shares = (int(one) for one in asked.split("/"))
    assert 1 <= mine <= shares, f"--share {asked}: K is 1 to N"
    for item in items:
        if item.get_closest_marker("long") and zlib.crc32(item.nodeid.encode()) % shares != mine - 1:
            item.add_marker(pytest.mark.skip(reason=OTHER_DAY))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Forty small files of the standard library, copied: the same bytes for every test of the session."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in library.glob("*.py") if 1_000 < path.stat().st_size < 8_000)[:40]
    assert len(files) == 40
    for path in files:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def tiny(corpus, tmp_path_factory) -> Path:
    """The tiny recipe's file; its corpus is tokenised by the first test that trains."""
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "tiny.toml"
    path.write_text(TINY.format(corpus=corpus, cache=folder / "cache"))
    return path
