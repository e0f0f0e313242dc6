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

    Raises RunError where a folder is no run's, where there is no run in any yet, and where `out` or `plots` cannot be written.
    """
    from gigatrain.errors import RunError
    from gigatrain.observe.report.collect import collect, compare

    began = time.perf_counter()
    path = Path(out or "report.html").expanduser()
    if out != "-" and not path.parent.is_dir():  # before anything is read
        raise RunError(f"{path} cannot be written: No such file or directory: {path.parent}; make the folder, or name another -o")
    values = [collect(run) for run in runs]
    if all(value["empty"] for value in values):
        raise RunError(
            f"{', '.join(value['run']['folder'] for value in values)}: no run here yet, the folder is empty; `gigatrain train --run` fills one, and "
            "`gigatrain watch` shows it as it begins"
        )
    compare(values)
    if as_json:
        json.dump({"runs": values}, sys.stdout, indent=1, allow_nan=False)
        print()
    if plots is not None:
        from gigatrain.observe.report.plots import plots as draw

        folder = Path(plots).expanduser()
        try:
            drawn = draw(values, folder)
        except OSError as failure:
            raise RunError(f"{folder} cannot be written: {failure.strerror or failure}; name another folder with --plots") from None
        for one in drawn:
            if not as_json:
                say(str(one))
    if out is None and (as_json or plots is not None):
        return
    from gigatrain.observe.report.page import page

    text = page(values)
    if out == "-":
        sys.stdout.write(text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as failure:
        raise RunError(f"{path} cannot be written: {failure.strerror or failure}; name another -o") from None
    count = f"{len(values)} run{'s' * (len(values) > 1)}"
    if not as_json:
        say(f"{path}: {count}, {len(text.encode()) / 1e3:,.0f} kB, made in {time.perf_counter() - began:.2f} s")
