"""Tasks of lm-evaluation-harness (EleutherAI, arXiv:2405.14782) on a model of transformers: its prompts, metrics and standard errors, unchanged."""

import contextlib
import difflib
import functools
import importlib
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from gigatrain.errors import RunError

FLOOR = (0, 4, 10)  # TaskManager.load and its index are of then


def installed() -> None:
    """Raises RunError, with what to install, where lm-eval is not there or too old."""
    from importlib import metadata

    wanted = "pip install 'gigatrain[eval]' (or: pip install 'lm_eval>=0.4.10')"
    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise RunError(f"--tasks needs lm-evaluation-harness, which is not installed: {wanted}; --bits-per-byte does without it") from None
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())
    if numbers < FLOOR:
        raise RunError(f"lm_eval is {version}, and --tasks needs {'.'.join(map(str, FLOOR))}: {wanted}")


def chosen(names: Sequence[str], include: Sequence[Path]) -> Any:
    """lm-eval's tasks of these names, with their documents read. Raises RunError that names the task: unknown, broken, or of data that is not here."""
    for path in include:
        if not path.is_dir():
            raise RunError(f"--include {path} is no folder; name the one that holds the tasks' YAML files")
    with _quiet():
        from lm_eval.tasks import TaskManager

        paths: list[str | Path] = [str(path.absolute()) for path in include]
        try:
            # The index of the harness's own 15,000 files takes seconds; tasks of one's own do not need it.
            manager = TaskManager(include_path=paths, include_defaults=False) if include else TaskManager()
            if include and set(names) - set(manager.all_tasks):
                manager = TaskManager(include_path=paths)
        except Exception as failure:  # a YAML file of a user's may be anything
            raise RunError(f"the tasks in {', '.join(map(str, paths))} cannot be read: {_first(failure)}") from None
        found: dict[str, Any] = {"tasks": {}, "groups": {}}
        for name in names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                raise RunError(
                    f"lm-eval has no task {name!r}"
                    + (f"; did you mean {', '.join(near)}?" if near else "; `lm_eval ls tasks` lists them")
                    + " A task of your own is found by --include FOLDER"
                )
            try:
                loaded = manager.load([name])
            except Exception as failure:  # by the harness, datasets, the hub's client or a task's own code
                raise RunError(_unloaded(name, failure)) from None
            for kind in found:
                found[kind] |= loaded[kind]
    return manager, list(names), found


def run(
    loaded: Any, model: Any, tokenizer: Any, *, limit: int | None, few_shot: int | None, batch: int, chat: bool, seed: int
) -> dict[str, dict[str, Any]]:
    """A row for each task and group, as observe/evals.py keeps them. Raises RunError that names what failed."""
    manager, names, found = loaded
    if chat and not tokenizer.chat_template:
        raise RunError("--chat asks in the model's chat template, and its tokenizer has none; leave --chat out")
    with _quiet():
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        # Its decorator is not typed, and says that the class is a bare `LM`.
        asked = cast(Any, HFLM)(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        if not sys.stderr.isatty():  # bars that it would draw into a log
            for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(asked, kind, functools.partial(getattr(asked, kind), disable_tqdm=True))
        try:
            said: Any = simple_evaluate(
                model=asked,
                tasks=list(names),
                num_fewshot=few_shot,
                limit=limit,
                task_manager=cast(Any, _Loaded(manager, found)),
                apply_chat_template=chat,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                bootstrap_iters=1000,
                log_samples=False,
            )
        except MemoryError:
            raise
        except Exception as failure:  # by the harness, a metric's package, or a task's own code
            if "out of memory" in str(failure).lower():
                raise RunError(f"out of memory while {', '.join(names)} were asked; lower --batch (now {batch})") from None
            raise RunError(f"evaluating {', '.join(names)} failed: {type(failure).__name__}: {_first(failure)}") from None
    return {name: _row(name, said, limit) for name in said["results"]}


def _row(name: str, said: Any, limit: int | None) -> dict[str, Any]:
    row, better = said["results"][name], said.get("higher_is_better", {}).get(name, {})
    metrics = {}
    for key, value in row.items():
        metric, _, chosen_by = key.partition(",")
        if metric.endswith("_stderr") or not chosen_by or isinstance(value, str):
            continue
        metrics[key] = {
            "value": _finite(value),
            "stderr": _finite(row.get(f"{metric}_stderr,{chosen_by}")),
            "higher_is_better": better.get(metric),
        }
    samples = said.get("n-samples", {}).get(name, {})
    shot = said.get("n-shot", {}).get(name)
    return {
        "metrics": metrics,
        "samples": int(samples.get("effective") or row.get("sample_len") or 0),
        "limit": limit if _limited(name, said) else None,
        "few_shot": shot if isinstance(shot, int) else 0,
        "version": str(said.get("versions", {}).get(name, "unknown")),
    }


def _limited(name: str, said: Any) -> bool:
    """Whether a limit left documents of a task out, or of one of a group's."""
    parts = said.get("group_subtasks", {}).get(name)
    if parts:
        return any(_limited(part, said) for part in parts)
    samples = said.get("n-samples", {}).get(name, {})
    return samples.get("original", 0) > samples.get("effective", 0)


class _Loaded:
    """A task manager whose tasks are read already, so that simple_evaluate does not read them a second time."""

    def __init__(self, manager: Any, found: Any) -> None:
        self.manager, self.found = manager, found

    def load(self, names: Any) -> Any:
        return self.found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.manager, name)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _first(failure: BaseException) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:300]


def _unloaded(name: str, failure: BaseException) -> str:
    """Why a task's documents are not here, in one message with the way out."""
    chain: list[BaseException] = [failure]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    words = " ".join(f"{type(one).__name__} {one}" for one in chain).lower()
    signs = ("connect", "offline", "resolve", "max retries", "couldn't reach", "localentrynotfound", "hub", "timed out", "network", "proxy")
    if any(sign in words for sign in signs):
        return (
            f"task {name!r} needs data from the hub, which cannot be had here ({type(failure).__name__}: {_first(failure)}); run it once where there is a "
            "network with the same HF_HOME, or evaluate on local data by a task of your own (--include FOLDER)"
        )
    absent = next((one.name for one in chain if isinstance(one, ModuleNotFoundError) and one.name), None)
    if absent:
        return f"task {name!r} needs the package {absent}, which is not installed here; pip install {absent}, or lm_eval with the extra of that task"
    return f"task {name!r} cannot be loaded: {type(failure).__name__}: {_first(failure)}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness, datasets and tqdm narrate on stderr; what matters of it comes as our own words."""
    names = ("lm_eval", "lm-eval", "datasets", "huggingface_hub", "fsspec", "httpx")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImportError):
            importlib.import_module("huggingface_hub.utils").disable_progress_bars()
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
