"""Recipes are strict: each refusal names the key, the value, the limit and the likely meaning."""

import json
import tomllib
from types import SimpleNamespace

import pytest

from gigatrain import load
from gigatrain.errors import RecipeError, RunError, SiteError

TEXT = """
name = "r"
[model.architecture]
family = "llama"
vocab = 512
hidden = 64
layers = 2
heads = 4
kv_heads = 2
head_dim = 16
intermediate = 128
[tokenizer.train]
vocab = 512
[data]
sources = [{ kind = "stdlib" }, { kind = "text", path = "x", weight = 2 }]
[train]
sequence = 32
batch = 4
steps = 10
[optim]
lr = 1e-3
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(TEXT)
    return path


def refused(path, *overrides):
    with pytest.raises(RecipeError) as failure:
        load.recipe(path, overrides)
    return str(failure.value)


def test_a_recipe_is_read_with_its_defaults_and_frozen(path):
    recipe = load.recipe(path)
    assert recipe.train.batch == 4
    assert recipe.optim.betas == (0.9, 0.95)
    assert recipe.data.sources[1].weight == 2.0
    assert recipe.model.architecture is not None
    assert recipe.model.architecture.hidden == 64
    with pytest.raises(Exception, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("optim.lr=3e-4", lambda r: r.optim.lr == 3e-4),
        ("optim.betas=[0.8, 0.9]", lambda r: r.optim.betas == (0.8, 0.9)),
        ("optim.clip=1", lambda r: r.optim.clip == 1.0),
        ("name=word", lambda r: r.name == "word"),
        ('name="quoted"', lambda r: r.name == "quoted"),
        ("train.deterministic=true", lambda r: r.train.deterministic is True),
        ("data.sources.1.weight=3.5", lambda r: r.data.sources[1].weight == 3.5),
        ("schedule.kind=wsd", lambda r: r.schedule.kind == "wsd"),
        ("model.architecture.layers=3", lambda r: r.model.architecture.layers == 3),
        ("report.trackers=[]", lambda r: r.report.trackers == ()),
        ("checkpoint.near=null", lambda r: r.checkpoint.near is None),
        ('checkpoint.near="null"', lambda r: r.checkpoint.near == "null"),
        ("model.architecture=llama-3.1-8b", lambda r: r.model.architecture.hidden == 4096),
    ],
)
def test_dotted_overrides_reach_every_kind_of_value(path, override, found):
    assert found(load.recipe(path, [override]))


def test_a_named_architecture_can_be_changed_in_part(path):
    recipe = load.recipe(path, ["model.architecture=llama-3.1-8b", "model.architecture.layers=2"])
    assert recipe.model.architecture is not None
    assert (recipe.model.architecture.layers, recipe.model.architecture.intermediate) == (2, 14336)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.stesp=4"], 'train.stesp: unknown key; did you mean "steps"?'),
        (["trian.steps=4"], 'trian: unknown key; did you mean "train"?'),
        (["data.sources.0.pth=x"], 'data.sources.0.pth: unknown key; did you mean "path"?'),
        (["optim.lr=fast"], 'optim.lr: input should be a valid number (it is "fast")'),
        (["optim.lr=0"], "optim.lr: input should be greater than 0 (it is 0)"),
        (["optim.lr=inf"], "inf and nan have no place"),
        (["power.megawatts=nan"], "power.megawatts is nan; dates, inf and nan have no place here"),
        (["power.ramp_megawatts_min=1e999"], "power.ramp_megawatts_min is inf"),
        (["optim.betas=[0.9, nan]"], "optim.betas.1 is nan"),
        (["power.measure=false", "power.caps=true"], "a ramp or limits of accelerators (`caps`) need `measure`"),
        (["power.measure=false", "power.ramp_megawatts_min=1"], "a ramp or limits of accelerators (`caps`) need `measure`"),
        (["train.batch=2.5"], "train.batch: input should be a valid integer"),
        (["train.batch=true"], "train.batch: input should be a valid integer (it is true)"),
        (['train.batch="4"'], 'train.batch: input should be a valid integer (it is "4")'),
        (["train.batch=null"], "train.batch: input should be a valid integer (it is null)"),
        (["train.bath=null"], 'train.bath: unknown key; did you mean "batch"?'),
        (["train.batch=0"], "train.batch: input should be greater than or equal to 1 (it is 0)"),
        (["train.microbatch=5"], "`microbatch` 5 is above `batch` 4"),
        (["train.tokens=100"], "train: needs exactly one of `steps` and `tokens`"),
        (["schedule.kind=cosin"], "schedule.kind: input should be 'cosine', 'linear', 'wsd', 'constant' or 'infinite'"),
        (["data.sources=[]"], "data.sources"),
        (['data.sources=[{kind="jsonl"}]'], "`jsonl` needs `path`"),
        (["model.architecture.heads=5"], "model.architecture"),
        (["model.architecture=llama-3.1-8"], "did you mean llama-3.1-8b"),
        (["name=Bad Name"], "name: string should match pattern"),
        (["novalue"], "is not of the form key=value"),
        (["=3"], "is not of the form key=value"),
        (["optim.lr.x=3"], "optim.lr is 0.001, not a table"),
        (["data.sources.7.weight=1"], "'7' is not an index below 2"),
        (['tokenizer.from="x"'], "needs exactly one of `from`"),
    ],
)
def test_what_is_wrong_is_refused_by_key_value_and_limit(path, overrides, said):
    assert said in refused(path, *overrides)


def test_every_problem_is_shown_at_once(path):
    text = refused(path, "train.stesp=1", "optim.lr=0", "report.every=0")
    assert len(text.splitlines()) == 4


def test_a_missing_key_is_explained(tmp_path):
    (tmp_path / "r.toml").write_text(TEXT.replace("lr = 1e-3", ""))
    assert "optim.lr: missing; peak learning rate" in refused(tmp_path / "r.toml")


def test_files_that_are_no_recipes_are_refused(tmp_path):
    assert "no recipe file and no shipped recipe is called" in refused(tmp_path / "absent.toml")
    assert "is a folder" in refused(tmp_path)
    (tmp_path / "bad.toml").write_text("a = [")
    assert "is not valid TOML" in refused(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    assert "is not UTF-8 text: byte 8" in refused(tmp_path / "latin.toml")
    (tmp_path / "date.toml").write_text("name = 2026-01-01")
    assert "dates, inf and nan have no place" in refused(tmp_path / "date.toml")


def test_shipped_recipes_and_sites_load_by_name():
    assert {"quickstart"} <= set(load.recipes())
    for name in load.recipes():
        assert load.recipe(name).model is not None
    for name in load.sites():
        assert load.site(name).name == name
    with pytest.raises(SiteError, match='did you mean "laptop"'):
        load.site("labtop")


def test_a_site_is_always_found_without_torch(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    site, why = load.local_site()
    assert (site.name, site.device) == ("laptop", "cpu")
    assert "hides every GPU" in why
    assert site.memory_bytes is not None
    assert site.memory_bytes > 1 << 28


def test_the_schema_accepts_what_the_loader_accepts_and_nothing_unknown(path):
    schema = load.schema("recipe")
    jsonschema = pytest.importorskip("jsonschema")
    tree = tomllib.loads(TEXT)
    jsonschema.validate(tree, schema)
    jsonschema.validate(tomllib.loads(load.recipes()["quickstart"].read_text()), schema)
    for architecture in ("llama-3.1-8b", {"base": "llama-3.1-8b", "layers": 2}):
        jsonschema.validate(tree | {"model": {"architecture": architecture}}, schema)
        load.architecture(
            load.recipe(path, [f"model.architecture={json.dumps(architecture) if isinstance(architecture, str) else 'llama-3.1-8b'}"]).model
        )
    for wrong in (
        {"modle": {}},
        {"model": {"architecture": "llama-3.1-8"}},
        {"optim": {"lr": 0}},
        {"model": {"form": "x", "architecture": "llama-3.1-8b"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(tree | wrong, schema)


def test_a_torch_without_cuda_means_the_processor_and_says_so(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("gigatrain.load.metadata.version", lambda name: "2.13.0+cpu")
    assert load.local_site()[1] == "torch 2.13.0+cpu is a build without CUDA"


def test_from_a_folder_without_config_is_refused(path, tmp_path):
    recipe = load.recipe(path, [f'model={{from="{tmp_path}"}}'])
    with pytest.raises(RecipeError, match=r"config.json cannot be read"):
        load.architecture(recipe.model)
    with pytest.raises(RecipeError, match="there is no folder"):
        load.config_json("./nowhere")


def test_names_of_nodes_are_a_list_or_a_files(tmp_path):
    (tmp_path / "held").write_text("".join(f"n{number}\n" for number in range(36_000)))
    assert len(load.names(f"@{tmp_path / 'held'}")) == 36_000
    assert load.names("n1,n3") == ["n1", "n3"]
    assert load.names("") == []
    with pytest.raises(RunError, match="the list of nodes .*none cannot be read: No such file"):
        load.names(f"@{tmp_path / 'none'}")


@pytest.mark.parametrize(("named", "accelerator"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA T4", None)])
def test_a_gpu_whose_name_says_what_it_is_gets_its_rates_and_kernels(monkeypatch, named, accelerator):
    """And one that is not known stays unknown: rates are not guessed."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("gigatrain.load.metadata.version", lambda name: "2.13.0+cu130")
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: named,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=141 << 30),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(f"gigatrain.load.pynvml.{name}", answer)
    site, why = load.local_site()
    assert (site.name, site.accelerator, site.memory_bytes) == ("one-gpu", accelerator, 141 << 30)
    assert why == f"the driver shows 1 x {named}"
