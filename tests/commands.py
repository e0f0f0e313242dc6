"""Commands as a user types them, for tests that start them as processes of their own."""

import sys
from pathlib import Path


def training(recipe: Path, folder: Path, *overrides: str) -> list[str]:
    """`gigatrain train RECIPE --run FOLDER --set …`, of this interpreter, without an export."""
    sets = (part for override in ("export=false", *overrides) for part in ("--set", override))
    return [sys.executable, "-m", "gigatrain", "train", str(recipe), "--run", str(folder), *sets]
