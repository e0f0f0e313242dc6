"""A run, or several side by side, as one page, as JSON or as pictures: collect.py reads a folder, page.py and plots.py draw what it found. Free of torch."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def report(
    runs: Sequence[Path],
    out: str | None = None,
    *,
    as_json: bool = False,
    plots: str | None = None,
    say: Callable[[str], Any] = print,
) -> None:
    """Writes the page to `out` (`-`: to standard output; None: report.html, unless JSON or pictures were asked for instead), and says what it wrote.

    Raises RunError where a folder is no run's, and OSError where `out` or `plots` cannot be written.
    """
    from gigatrain.observe.report.collect import collect

    began = time.perf_counter()
    values = [collect(run) for run in runs]
    if as_json:
        json.dump({"runs": values}, sys.stdout, indent=1, allow_nan=False)
        print()
    if plots is not None:
        from gigatrain.observe.report.plots import plots as draw

        for path in draw(values, Path(plots).expanduser()):
            if not as_json:
                say(str(path))
    if out is None and (as_json or plots is not None):
        return
    from gigatrain.observe.report.page import page

    text = page(values)
    if out == "-":
        sys.stdout.write(text)
        return
    path = Path(out or "report.html").expanduser()
    path.write_text(text, encoding="utf-8")
    count = f"{len(values)} run{'s' * (len(values) > 1)}"
    if not as_json:
        say(f"{path}: {count}, {len(text.encode()) / 1e3:,.0f} kB, made in {time.perf_counter() - began:.2f} s")
