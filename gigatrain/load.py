"""TOML to Recipe and Site: names, dotted overrides, and errors that say which key, which value, which limit."""

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import pynvml
from pydantic import BaseModel, ValidationError

from gigatrain import architectures, catalog, foreign, twin
from gigatrain.architectures import Architecture
from gigatrain.config import Model, Recipe, Section
from gigatrain.errors import GigatrainError, RecipeError, RunError, SiteError
from gigatrain.foreign import Foreign
from gigatrain.site import DRIVER_NAMES, Site

_PACKAGE = Path(__file__).parent


def shipped(kind: str) -> Path:
    """The folder of shipped `recipes` or `launch`: inside the package in a wheel, beside it in a checkout."""
    inside, beside = _PACKAGE / kind, _PACKAGE.parent / kind
    return inside if inside.is_dir() else beside


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe that is one; those of open models are made of what is known of each (catalog.py)."""
    root = shipped("recipes")
    return {
        path.relative_to(root).with_suffix("").as_posix(): path
        for path in sorted(root.rglob("*.toml"))
        if path.stem != "model" and path.parent.name != "tasks"
    }


def known() -> list[str]:
    """Every name that `recipe` takes, but for the `-tiny` twin that each of an open model has."""
    return sorted({*recipes(), *catalog.names(shipped("recipes"))})


def recipe_text(name: str) -> str:
    """The text of a shipped recipe, with its comments. Raises RecipeError for a name that is none."""
    files = recipes()
    found = files[name].read_text(encoding="utf-8") if name in files else catalog.text(shipped("recipes"), name)
    if found is None:
        raise RecipeError(f"no shipped recipe is called {name!r}{nearest(name, known())} `gigatrain recipes` lists them.")
    return found


def sites() -> dict[str, Path]:
    """Name -> file of every shipped site."""
    return {path.stem: path for path in sorted((shipped("launch") / "sites").glob("*.toml"))}


def recipe(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe: a path (TOML, or the JSON that a job keeps of it), or the name of a shipped one; `overrides` are `dotted.key=value` as given to --set.

    A shipped recipe's name with `-tiny` behind it is its twin: the same shape of everything, small (twin.py).

    Raises RecipeError for a missing file, bad TOML, an unknown key, a wrong type, a value out of range or a contradiction.
    """
    tree, path = _recipe(source)
    for override in overrides:
        _override(tree, override)
    _refuse_secrets(tree, path, RecipeError)
    _expand_architecture(tree)
    result = _validate(Recipe, tree, str(path), RecipeError)
    assert isinstance(result, Recipe)
    return result


def site(source: str | Path) -> Site:
    """Read a site: a path (TOML, or the JSON that a job keeps of it), or the name of a shipped one."""
    path = _find(source, sites(), "site", SiteError)
    tree = _toml(path, SiteError)
    _refuse_secrets(tree, path, SiteError)
    result = _validate(Site, tree, str(path), SiteError)
    assert isinstance(result, Site)
    return result


def local_site() -> tuple[Site, str]:
    """The site this process runs on, and why: `one-gpu` where the driver shows one, else `laptop`; with its memory, and without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return _laptop(), f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU"
    try:
        build = metadata.version("torch")
    except metadata.PackageNotFoundError:
        build = "none"
    if build.endswith("+cpu"):
        return _laptop(), f"torch {build} is a build without CUDA"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return _laptop(), f"no NVIDIA driver: {error}"
    try:
        count = pynvml.nvmlDeviceGetCount()
        if count == 0:
            return _laptop(), "the NVIDIA driver shows no GPU"
        first = (visible or "0").split(",")[0].strip()
        device = pynvml.nvmlDeviceGetHandleByIndex(int(first)) if first.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(first)
        name = pynvml.nvmlDeviceGetName(device)
        found, why = site("one-gpu"), f"the driver shows {count} x {name}"
        found = found.model_copy(update={"accelerator": DRIVER_NAMES.get(name)})
        try:
            memory = int(pynvml.nvmlDeviceGetMemoryInfo(device).total)
        except pynvml.NVMLError as error:  # MIG, and modules whose memory is the host's
            return found, f"{why}; its memory is unknown: {error}"
        return found.model_copy(update={"memory_bytes": memory}), why
    except pynvml.NVMLError as error:
        raise SiteError(f"the NVIDIA driver does not answer for CUDA_VISIBLE_DEVICES={visible!r}: {error}; or choose --site") from None
    finally:
        pynvml.nvmlShutdown()


def _laptop() -> Site:
    return site("laptop").model_copy(update={"memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")})


def architecture(model: Model, measure: Callable[[Mapping[str, Any]], Foreign] | None = None) -> Architecture | Foreign:
    """The numbers of the recipe's model: its own, or those in the config.json of the folder or hub name it starts `from`.

    A family that is not ours is measured by `measure` (models/autonumbers.py's `numbers`, which imports torch); without it, it is refused.
    """
    if model.architecture is not None:
        return _stretched(model.architecture, model)
    assert model.source is not None
    config = config_json(model.source)
    if measure is None or foreign.native(config):
        return _stretched(architectures.from_hf_config(config), model)
    foreign.refuse(config)
    return measure(config)


def _stretched(found: Architecture, model: Model) -> Architecture:
    """With the recipe's own position embedding, checked against the other numbers. Raises RecipeError."""
    if model.rope is None:
        return found
    try:
        return Architecture.model_validate_json(found.model_copy(update={"rope": model.rope}).model_dump_json())
    except ValidationError as failure:
        raise RecipeError(
            "model.rope: " + "; ".join(one["msg"].removeprefix("Value error, ") for one in architectures.causes(failure))
        ) from None


def positions(model: Model) -> int:
    """Context length of the weights: the recipe's `model.positions`, else what their config.json declares; 0 for fresh weights."""
    if model.positions is not None:
        return model.positions
    declared = config_json(model.source).get("max_position_embeddings") if model.source else None
    return declared if isinstance(declared, int) else 0


def config_json(source: str) -> dict[str, Any]:
    """config.json of a folder, or of a model on the hub (downloads that one file)."""
    folder = Path(source).expanduser()
    path = folder / "config.json"
    if not folder.exists():
        if source.startswith(("/", ".", "~")):
            raise RecipeError(f"model.from: there is no folder {source!r}")
        import huggingface_hub  # pulls in an HTTP client, 0.3 s

        try:
            path = Path(huggingface_hub.hf_hub_download(source, "config.json"))
        except Exception as failure:
            raise RecipeError(
                f"model.from: {source!r} is no folder here, and as a hub name it cannot be had: {type(failure).__name__}. "
                "Give the path of a folder with config.json and *.safetensors."
            ) from None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} and no object")
        return found
    except OSError as failure:
        raise RecipeError(f"model.from: {path} cannot be read: {failure.strerror}") from None
    except (ValueError, RecursionError) as failure:
        raise RecipeError(f"model.from: {path} is not a JSON object: {failure}") from None


def read_json(model: type[Section], text: str, where: str, error: type[GigatrainError]) -> Any:
    """A frozen record back from its JSON, with the same strictness and messages as a recipe."""
    try:
        return model.model_validate_json(text)
    except ValidationError as failure:
        raise error(_explain(model, failure, where)) from None


def schema(of: str) -> dict[str, Any]:
    """JSON Schema of a `recipe` or `site` file as `recipe` and `site` accept it: names of architectures and `base` included."""
    found = (Site if of == "site" else Recipe).model_json_schema(by_alias=True)
    if of != "site":
        names = {"type": "string", "enum": sorted(architectures.named())}
        shape = found["$defs"]["Architecture"]
        shape["properties"]["base"] = names | {"description": "Start from this architecture's numbers."}
        shape["anyOf"] = [{"required": shape.pop("required")}, {"required": ["base"]}]
        found["$defs"]["Model"]["properties"]["architecture"]["anyOf"].append(names)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | found


def names(text: str) -> list[str]:
    """`a,b` to its names; `@FILE` to those of a file, one a line or by commas: an argument of Linux holds 128 KiB.

    Raises RunError for a file that cannot be read.
    """
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8", errors="replace")
        except OSError as failure:
            raise RunError(f"the list of nodes {text[1:]} cannot be read: {failure.strerror}") from None
    return [name for name in re.split(r"[,\s]+", text) if name]


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?` for the likeliest of `known`, else a full stop."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else "."


def _recipe(source: str | Path) -> tuple[dict[str, Any], Path]:
    """A recipe's tree and where it was read: a file, else a shipped name, else a twin."""
    name = str(source).removesuffix(".toml")
    path = Path(source).expanduser()
    if not path.is_file() and not path.is_dir() and name not in recipes():
        if (made := catalog.text(shipped("recipes"), name)) is not None:
            return tomllib.loads(made), Path(name)
        if name.endswith(catalog.TWIN) and (base := name.removesuffix(catalog.TWIN)) in known():
            tree, _ = _recipe(base)
            _expand_architecture(tree)
            return twin.tree(tree, shipped("recipes") / "tasks"), Path(name)
        raise RecipeError(
            f"no recipe file and no shipped recipe is called {str(source)!r}{nearest(name, known())} `gigatrain recipes` lists the shipped ones."
        )
    path = _find(source, recipes(), "recipe", RecipeError)
    return _toml(path, RecipeError), path


def _find(source: str | Path, known: Mapping[str, Path], what: str, error: type[GigatrainError]) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    name = str(source).removesuffix(".toml")
    if name in known:
        return known[name]
    if path.is_dir():
        raise error(f"{source} is a folder; give the {what} file in it")
    raise error(f"no {what} file and no shipped {what} is called {source!r}{nearest(name, known)} Shipped: {', '.join(known) or 'none'}.")


def _toml(path: Path, error: type[GigatrainError]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except json.JSONDecodeError as failure:
        raise error(f"{path} is not valid JSON: {failure}") from None
    except tomllib.TOMLDecodeError as failure:
        raise error(f"{path} is not valid TOML: {failure}") from None
    except UnicodeDecodeError as failure:
        raise error(f"{path} is not UTF-8 text: byte {failure.start}") from None
    except (ValueError, RecursionError) as failure:  # an integer of thousands of digits, brackets thousands deep
        raise error(f"{path}: {failure}") from None
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror}") from None


def _override(tree: dict[str, Any], text: str) -> None:
    """Apply one `dotted.key=value`; the value is TOML, bare words are strings, and `null`, which TOML lacks, leaves an optional key out."""
    key, equals, raw = text.partition("=")
    keys = [part.strip() for part in key.split(".")]
    if not equals or not all(keys):
        raise RecipeError(f"--set {text!r} is not of the form key=value, for instance --set optim.lr=1e-4")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip() if raw.strip() != "null" else None
    except (ValueError, RecursionError) as failure:  # an integer of thousands of digits, brackets thousands deep
        raise RecipeError(f"--set {text[:60]}…: {failure}") from None
    node: Any = tree
    for depth, part in enumerate(keys[:-1]):
        here = ".".join(keys[: depth + 1])
        if isinstance(node, list):
            node = _element(node, part, here)
            continue
        if here == "model.architecture" and isinstance(node.get(part), str):
            node[part] = {"base": node[part]}
        node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise RecipeError(f"--set {text!r}: {here} is {node!r}, not a table")
    if isinstance(node, list):
        _element(node, keys[-1], ".".join(keys))
        node[int(keys[-1])] = value
    else:
        node[keys[-1]] = value


def _element(items: list[Any], index: str, where: str) -> Any:
    if not index.isdecimal() or int(index) >= len(items):
        raise RecipeError(f"--set {where}: {index!r} is not an index below {len(items)}, the number of entries")
    return items[int(index)]


def _expand_architecture(tree: dict[str, Any]) -> None:
    """`architecture = "name"` and `base = "name"` become numbers, so that the recipe holds nothing to look up."""
    model = tree.get("model")
    if not isinstance(model, dict):
        return
    given = model.get("architecture")
    if isinstance(given, str):
        model["architecture"] = architectures.resolve(given)
    elif isinstance(given, dict) and "base" in given:
        numbers = dict(given)
        model["architecture"] = architectures.resolve(str(numbers.pop("base"))) | numbers
    elif isinstance(given, dict) and "family" not in given:
        whole = (
            f"; without a table they are those of model.from, and `gigatrain recipes from-hub {model['from']}` writes them out"
            if model.get("from")
            else ""
        )
        raise RecipeError(
            f"model.architecture has {', '.join(given) or 'nothing'} and neither `family` nor `base`, which say of what{whole}"
        )


def _validate(model: type[Section], tree: dict[str, Any], where: str, error: type[GigatrainError]) -> Section:
    try:
        text = json.dumps(tree, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as failure:
        key = next(_strange(tree), "") if not isinstance(failure, RecursionError) else ""
        raise error(f"{where}: {key or failure}; dates, inf and nan have no place here") from None
    return read_json(model, text, where, error)


_USERINFO = re.compile(r"\w://[^/@\s]*:[^/@\s]*@")


def _refuse_secrets(value: Any, path: Path, error: type[GigatrainError], key: str = "") -> None:
    """A password within an address would be in plan.json, in logs and in every message that names the address; so its value is not named here."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in inner:
        at = f"{key}.{name}" if key else str(name)
        if isinstance(one, str) and _USERINFO.search(one):
            raise error(
                f"{path}: {at} is an address with a password in it, which would be in the run's folder and logs; take it out, and give it as the "
                "library that opens the address reads it (HF_TOKEN, ~/.netrc, AWS_PROFILE)"
            )
        _refuse_secrets(one, path, error, at)


def _strange(value: Any, key: str = "") -> Iterator[str]:
    """`power.megawatts is nan` for each value that JSON has no word for."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in inner:
        yield from _strange(one, f"{key}.{name}" if key else str(name))
    if not isinstance(value, dict | list | str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
        yield f"{key} is {value}"


def _explain(model: type[BaseModel], failure: ValidationError, where: str) -> str:
    """Every problem on a line: key, what is wrong with which value, and what would be right."""
    lines = []
    for problem in architectures.causes(failure):
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            *parents, last = problem["loc"]
            siblings = _fields(model, parents)
            lines.append(f"{path}: unknown key{nearest(str(last), siblings)} Known here: {', '.join(siblings)}.")
        elif problem["type"] == "missing":
            lines.append(f"{path}: missing{_described(model, problem['loc'])}")
        else:
            shown = "" if isinstance(problem["input"], dict) else f" (it is {json.dumps(problem['input'], default=str)[:80]})"
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "literal_error" and isinstance(problem["input"], str):
                close = nearest(problem["input"], re.findall(r"'([^']*)'", message))
                message += close if close != "." else ""
            lines.append(f"{path or 'top level'}: {message[:1].lower()}{message[1:]}{shown}")
    return f"{where} is refused:\n" + "\n".join(f"  {line}" for line in lines)


def _model_at(model: type[BaseModel], loc: Iterable[Any]) -> type[BaseModel] | None:
    """The section that a path of keys leads to."""
    current: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, int) or current is None:
            continue
        field = next((field for name, field in current.model_fields.items() if (field.alias or name) == part), None)
        current = next(_models(field.annotation), None) if field else None
    return current


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _fields(model: type[BaseModel], loc: Iterable[Any]) -> list[str]:
    section = _model_at(model, loc)
    return [field.alias or name for name, field in section.model_fields.items()] if section else []


def _described(model: type[BaseModel], loc: tuple[Any, ...]) -> str:
    section = _model_at(model, loc[:-1])
    field = next((field for name, field in section.model_fields.items() if (field.alias or name) == loc[-1]), None) if section else None
    return f"; {field.description[:1].lower()}{field.description[1:]}" if field and field.description else ""
