"""Matrices of costly cases: some in every run, the rest long."""

from collections.abc import Iterable
from typing import Any

import pytest


def long_but(kept: Iterable[int], cases: Iterable[Any]) -> list[Any]:
    """Cases for parametrize; those whose numbers are in `kept` belong to the ordinary run, the others to `make long`."""
    ordinary = set(kept)
    return [
        case if at in ordinary else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
        for at, case in enumerate(cases)
    ]
