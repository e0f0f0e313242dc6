"""A tiny recipe over a small corpus, built once a session: real data, real tokenizer, a model of a few thousand parameters."""

import os
import sysconfig
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and pytest -n 2 fills both cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import interpreter  # noqa: F401 (kernels run in Triton's interpreter, corrected; before anything imports triton)
import pytest
from tinyrecipe import TINY


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
