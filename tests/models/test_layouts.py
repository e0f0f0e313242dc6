"""Every family's export against what its readers look at: no rule broken, and the names that vLLM's registry and llama.cpp's converter have."""

import json
from pathlib import Path

import pytest
import torch
from families import VARIANTS, build
from tokenizers import Tokenizer, models

from gigatrain.architectures import from_hf_config, to_hf_config
from gigatrain.exporting import readers
from gigatrain.models import hf
from gigatrain.models.decoder import Decoder

ONE_EACH = [name for number, name in enumerate(VARIANTS) if VARIANTS[name][0] not in [VARIANTS[other][0] for other in [*VARIANTS][:number]]]
UNLISTED = {"Helium", "Ministral", "Mistral4"}  # of the families, by transformers' name of their class


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>")).save(str(path))
    return path


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in ONE_EACH else pytest.mark.long) for name in VARIANTS])
def test_an_export_breaks_no_readers_rule(name: str, tmp_path: Path, tokenizer: Path) -> None:
    arch = from_hf_config(build(name).config.to_dict())
    with torch.device("meta"):
        decoder = Decoder(arch)
    decoder.to_empty(device="cpu")
    for weight in decoder.state_dict().values():
        weight.zero_()
    hf.save_weights(decoder, arch, tmp_path, max_shard_bytes=2e4)
    config = to_hf_config(arch, bos=1, eos=2, pad=None, max_positions=64, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    found = readers.check(tmp_path)
    assert not [one.line() for one in found if one.health == "bad"]
    assert [one.reader for one in found[:4]] == ["files", "config", "tokenizer", "transformers"]
    said = {one.reader: one.health for one in reversed(found)}  # the first of each
    family = config["architectures"][0].removesuffix("ForCausalLM")
    assert said["llama.cpp"] == ("refuses" if family in UNLISTED else "ok")
    assert said["vLLM"] == ("untested" if family in UNLISTED | {"Ministral3"} else "ok")
