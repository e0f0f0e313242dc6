"""The commands as a user types them: what they print, what they leave, and errors on one screen without a traceback."""

import json
import os
import subprocess
import sys

import pytest

from gigatrain import cli

COMMANDS = [
    [],
    ["train"],
    ["plan"],
    ["launch"],
    ["job"],
    ["job", "begin"],
    ["job", "after"],
    ["recipes"],
    ["sites"],
    ["data"],
    ["data", "build"],
    ["export"],
    ["generate"],
    ["schema"],
    ["version"],
    ["doctor"],
    ["watch"],
    ["report"],
    ["ps"],
    ["logs"],
    ["cancel"],
    ["requeue"],
    ["bench", "power"],
]


def ran(*arguments, cwd=None, code=0):
    ended = subprocess.run(
        [sys.executable, "-m", "gigatrain", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env=os.environ | {"COLUMNS": "140"},
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout if code == 0 else ended.stderr


def printed(capsys, *arguments):
    cli.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert said.startswith("gigatrain: ")
    assert len(said.splitlines()) <= 24
    return ended.value.code, said


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_that_teaches(capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out) > 150


@pytest.mark.parametrize("arguments", [["begin"], ["after", "--code", "1"]])
def test_a_job_that_was_never_launched_leaves_no_history(tmp_path, capsys, arguments):
    word, *more = arguments
    code, said = refused(capsys, "job", word, tmp_path / "nowhere", *more)
    assert code == 7
    assert "is the run folder of no job" in said
    assert "gigatrain launch" in said
    assert not (tmp_path / "nowhere").exists()


def test_the_whole_way_as_a_user_walks_it(tiny, tmp_path, capsys):
    """train, a look at the folder, export, generate, and transformers loads the result and agrees with our decoder."""
    folder = tmp_path / "run"
    out = ran("train", tiny, "--run", folder, "--set", 'sample.prompt="def f"', "--set", "sample.tokens=8", "--set", "train.steps=6")
    assert "25,760 parameters" in out
    assert "train 6/6" in out
    assert " sample " in out
    assert "bits per byte; xz -9 on the same text" in out
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6
    assert "step 6 of" in printed(capsys, "export", folder, tmp_path / "model")
    asked = ("--prompt", "import os", "--tokens", "5", "--temperature", "0")
    text = json.loads(printed(capsys, "generate", tmp_path / "model", *asked, "--json"))["text"]
    assert text.startswith("import os")
    assert printed(capsys, "generate", folder, *asked) == text + "\n"

    import torch
    import transformers

    from gigatrain import run
    from gigatrain.models import hf
    from gigatrain.models.decoder import Decoder

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ours = Decoder(run.stored_plan(folder).decoder)
    hf.load_weights(ours, tmp_path / "model")
    tokens = torch.arange(2, 40).view(2, 19)
    torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "def main():\n    return 'é'\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text

    assert "steps: 6 -> 9" in refused(capsys, "train", tiny, "--run", folder, "--resume", "--set", "train.steps=9")[1]
    assert "already holds a run" in ran("train", tiny, "--run", folder, code=7)


def test_generate_works_on_a_run_that_was_killed_before_its_export(tiny, tmp_path, capsys):
    printed(capsys, "train", tiny, "--run", tmp_path / "run", "--set", "train.steps=3", "--set", "export=false")
    assert not (tmp_path / "run" / "export").exists()
    assert printed(capsys, "generate", tmp_path / "run", "--prompt", "def", "--tokens", "3").startswith("def")


def test_resume_finds_the_newest_run_of_the_recipe(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ("train", tiny, "--set", "train.steps=3", "--set", "export=false")
    assert "holds no run of tiny" in refused(capsys, *arguments, "--resume")[1]
    printed(capsys, *arguments)
    assert len(list((tmp_path / "runs").glob("tiny-*"))) == 1
    assert "resumed at step 3" in printed(capsys, *arguments, "--resume")


def test_resume_takes_the_run_created_last_and_of_this_recipe_only(tiny, tmp_path, monkeypatch, capsys):
    """`--new` moved an older run to NAME.1, and another recipe's name begins alike: neither is meant."""
    monkeypatch.chdir(tmp_path)
    for folder, name in (("runs/z", "tiny"), ("runs/z", "tiny"), ("runs/tiny-big-x", "tiny-big")):
        printed(capsys, "train", tiny, "--run", folder, "--new", "--set", "train.steps=2", "--set", "export=false", "--set", f"name={name}")
    assert (tmp_path / "runs" / "z.1").is_dir()
    said = printed(capsys, "train", tiny, "--resume", "--set", "train.steps=2", "--set", "export=false")
    assert "runs/z/checkpoints" in said


def test_an_export_replaces_an_export_and_nothing_else(tiny, tmp_path, capsys):
    printed(capsys, "train", tiny, "--run", tmp_path / "run", "--set", "train.steps=2", "--set", "export=false")
    mine = tmp_path / "llama"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    assert "would be lost" in refused(capsys, "export", tmp_path / "run", mine)[1]
    assert [path.name for path in mine.iterdir()] == ["config.json"]
    for _ in range(2):
        printed(capsys, "export", tmp_path / "run", tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "gigatrain.json",
    }
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_generate_refuses_pickles_and_broken_folders(tiny, tmp_path, capsys):
    printed(capsys, "train", tiny, "--run", tmp_path / "run", "--set", "train.steps=2")
    model = tmp_path / "run" / "export" / "model.safetensors"
    data = model.read_bytes()
    for damage in ("truncated", "pickle"):
        model.unlink()
        if damage == "truncated":
            model.write_bytes(data[: len(data) // 2])
        else:
            (model.parent / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
        assert "cannot be loaded" in refused(capsys, "generate", tmp_path / "run", "--prompt", "def")[1]
    for arguments in (["--tokens", "-1"], ["--temperature", "nan"], ["--top-k", "-3"], ["--seed", str(1 << 70)]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["generate", str(tmp_path / "run"), "--prompt", "def", *arguments])
        assert ended.value.code == 2


def test_recipes_and_sites_for_people_and_programs(capsys):
    assert "quickstart" in printed(capsys, "recipes")
    rows = json.loads(printed(capsys, "recipes", "--json"))
    assert {"name", "model", "task", "parameters", "active", "tokens", "licence", "maker", "country", "family", "summary"} == set(rows[0])
    assert "laptop" in printed(capsys, "sites")
    assert {"cpu", "cuda"} == {row["device"] for row in json.loads(printed(capsys, "sites", "--json"))}


def test_one_site_is_shown_whole_and_many_by_a_word(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "100")
    out = printed(capsys, "sites", "jupiter")
    assert max(len(line) for line in out.splitlines()) <= 100
    assert "15.80 MW  measured: HPL of 1.000 EFLOP/s" in out
    assert "power.facility_watts" in out.split("unknown  ")[-1]
    assert "694 W for each H100-equivalent" in printed(capsys, "sites", "aion")
    mine = tmp_path / "mine.toml"
    mine.write_text('name = "mine"\nsummary = ""\ndevice = "cuda"\n[node]\nranks = 2\n')
    assert json.loads(printed(capsys, "sites", mine, "--json"))["derived"]["ranks_per_node"] == 2
    assert [line.split()[0] for line in printed(capsys, "sites", "gh200").splitlines()[1:4]] == ["alps", "arrhenius", "jupiter"]
    assert {row["country"] for row in json.loads(printed(capsys, "sites", "fr", "--json"))} == {"FR"}
    assert 'did you mean "jupiter"' in refused(capsys, "sites", "juptier")[1]


def test_a_plan_on_a_site_says_what_it_takes_and_refuses_what_is_not_there(capsys):
    asked = ("plan", "quickstart", "--set", "train.batch=2048", "--site")
    out = printed(capsys, *asked, "jupiter", "--nodes", "64")
    assert "size     64 nodes x 4 ranks; 189.0 kW of the facility" in out
    assert "room     96.00 GiB a rank: an NVIDIA GH200 96 GB" in out
    assert "assumes  power.pue = 1.1 (no figure found" in out
    found = json.loads(printed(capsys, *asked, "jupiter", "--megawatts", "0.19", "--json"))
    assert (found["ranks"], found["size"]["nodes"]) == (256, 64)
    assert "how many make a node is unknown" in printed(capsys, *asked, "aion", "--gpus", "256")
    assert "64 nodes x 8 ranks" in printed(capsys, *asked, "slurm", "--nodes", "64", "--gpus", "512")
    for arguments, said in (
        (("jupiter", "--nodes", "6000"), "jupiter has 5,884 nodes, and 6,000 are asked for"),
        (("aion", "--nodes", "3"), "give --gpus as well"),
        (("aion", "--megawatts", "200"), "694 W for each of 288,000 H100-equivalents"),
        (("leonardo", "--gpus", "42"), "take 40 or 44"),
    ):
        code, message = refused(capsys, *asked, *arguments)
        assert (code, said in message) == (3, True), message


def test_a_word_where_a_number_belongs_is_refused_with_its_bounds(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "quickstart", "--nodes", "many"])
    assert "--nodes: 'many' is no whole number; give one from 1 to 1048576" in capsys.readouterr().err


def test_the_best_layout_is_told_as_keys_that_plan_it_again(capsys):
    asked = ("plan", "quickstart", "--site", "dgx-h100", "--gpus", "4")
    out = printed(capsys, *asked, "--top", "1")
    (told,) = [line for line in out.splitlines() if line.startswith("the first, planned here, is: ")]
    again = json.loads(printed(capsys, *asked, "--json", *told.partition("is: ")[2].split()))
    assert again["sha256"] in out


def test_a_plan_for_people_and_programs(capsys):
    out = printed(capsys, "plan", "quickstart", "--site", "laptop")
    assert "kernel   attention" in out
    found = json.loads(printed(capsys, "plan", "quickstart", "--site", "laptop", "--json"))
    assert found["sha256"] in out
    assert found["memory"]["weights"] == 2 * found["parameters"]


def test_data_is_built_ahead_and_described(tiny, capsys):
    manifest = json.loads(printed(capsys, "data", "build", tiny, "--json"))
    assert manifest["totals"]["train"]["tokens"] > 10_000
    assert f"{manifest['totals']['train']['tokens']:,}" in printed(capsys, "data", "build", tiny)


def test_schema_and_version(capsys):
    assert json.loads(printed(capsys, "schema"))["title"] == "Recipe"
    assert json.loads(printed(capsys, "schema", "site"))["title"] == "Site"
    assert set(json.loads(printed(capsys, "version", "--json"))) >= {"gigatrain", "torch", "transformers"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "nowhere.toml"], 2, "no recipe file and no shipped recipe is called 'nowhere.toml'"),
        (["train", "quickstart", "--set", "train.stesp=4"], 2, 'did you mean "steps"?'),
        (["plan", "quickstart", "--site", "jupitre"], 3, "no site file"),
        (["plan", "quickstart", "--set", "tokenizer.train.vocab=99999"], 4, "tokenizer.train.vocab 99999"),
        (["plan", "quickstart", "--set", "data.sources.².path=x"], 2, "is not an index"),
        (["plan", "quickstart", "--set", f"train.steps={'9' * 400}"], 2, "train.steps"),
        (["plan", "quickstart", "--set", f"train.steps={'9' * 5000}"], 2, "train.steps"),
        (["plan", "quickstart", "--set", f"x={'[' * 5000}"], 2, "--set"),
        (["plan", "quickstart", "--set", 'model={from="here"}'], 2, "config.json"),
        (["train", "quickstart", "--run", "occupied/run"], 7, "cannot be the run folder"),
        (["export", ".", "x"], 7, "is not a run folder"),
        (["export", "nowhere", "x"], 7, "nowhere is not a run folder"),
        (["generate", "nowhere", "--prompt", "x"], 7, "neither a run"),
        (["train", "quickstart", "--run", "nowhere", "--resume"], 6, "nothing to resume; start with --new"),
    ],
)
def test_errors_have_a_code_and_say_what_to_do(capsys, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "occupied").write_text("a file")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("[1]")
    found = refused(capsys, *arguments)
    assert found[0] == code
    assert said in found[1]


def test_a_missing_corpus_is_a_data_error(tiny, tmp_path, capsys):
    code, said = refused(capsys, "train", tiny, "--run", tmp_path / "run", "--set", "data.sources.0.path=/nowhere/at/all")
    assert code == 5
    assert "/nowhere/at/all" in said


def test_python_m_and_the_script_are_the_same(capsys):
    assert ran("version") == printed(capsys, "version")
