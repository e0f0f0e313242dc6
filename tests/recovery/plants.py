"""What is the matter with a rank, planted by `sitecustomize` into every interpreter that a test starts: PLANT=KIND RANK STEP, and once, by a file."""

import os
from pathlib import Path

CUSTOMIZE = '''
import os, sys

KIND, RANK, STEP, ONCE = os.environ["PLANT"].split(" ", 3)


def lock():
    import ctypes

    ctypes.PyDLL(None).sleep(3600)


def loop():
    while True:
        pass


def die():
    os.kill(os.getpid(), 9)


class Finder:
    """Of the module whose marks the loop makes: the plant is met at the mark of a step's data."""

    def find_spec(self, name, path=None, target=None):
        if name != "gigatrain.observe.hang":
            return None
        import importlib.util

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            mark = module.Pulse.mark

            def marked(self, phase):
                mark(self, phase)
                here = os.environ.get("GIGATRAIN_PLACE"), self.step, phase
                if here == (RANK, int(STEP), "data") and not (ONCE and os.path.exists(ONCE)):
                    if ONCE:
                        open(ONCE, "w").close()
                    globals()[KIND]()

            module.Pulse.mark = marked

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
'''


def planted(folder: Path, kind: str, rank: int, step: int, *, once: bool = True) -> dict[str, str]:
    """An environment in which `rank`'s place meets `kind` (lock, loop, die) as it takes the data of `step`; once, or always."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(CUSTOMIZE)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "PLANT": f"{kind} {rank} {step} {folder / 'met' if once else ''}"}
