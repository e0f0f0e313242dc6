"""Sites: every figure has a basis and a source, an unknown one is named, the shipped ones agree with themselves and with the table of accelerators."""

import json
import subprocess
import sys
import tomllib

import jsonschema
import pytest

from gigatrain import load
from gigatrain.errors import SiteError
from gigatrain.launching.size import size
from gigatrain.planning import hardware
from gigatrain.site import Figure

SHIPPED = load.sites()
REAL = [name for name in SHIPPED if load.site(name).kind not in ("local", "generic")]
FILE = 'name = "mine"\nsummary = ""\ndevice = "cuda"\n'


def tree(name):
    return tomllib.loads(SHIPPED[name].read_text())


def at(found, path):
    for part in path.split("."):
        found = found.get(part, {}) if isinstance(found, dict) else {}
    return found


@pytest.mark.parametrize("name", REAL)
def test_a_real_site_names_what_is_unknown(name):
    """An unknown number is written as the word, so that nobody can take it for forgotten; and the site says where it is described."""
    site, written = load.site(name), tree(name)
    assert not [path for path, _ in site.figures() if at(written, path) in ({}, None)]
    assert site.country
    assert site.source
    assert site.status
    for path, figure in site.figures():
        assert (at(written, path) == "unknown") == (figure.basis == "unknown"), path


@pytest.mark.parametrize("name", SHIPPED)
def test_figures_agree_with_each_other(name):
    site = load.site(name)
    count, nodes, each = site.accelerators.value, site.nodes.value, site.node.accelerators.value
    if count and nodes and each:
        assert nodes * each == count
    chip = hardware.chip(site.accelerator) if site.accelerator else None
    if chip:
        assert site.ranks_per_node == (each and each * chip.devices)
        if count and chip.h100e and site.h100e.value:
            assert site.h100e.value == pytest.approx(count * chip.h100e, rel=0.01)
    assert site.scheduler.kind in ("none", "unknown") or site.scheduler.source or site.kind == "generic"
    if site.scheduler.cpus_per_task:
        assert site.node.cores.value is not None
        assert site.ranks_per_node is not None
        assert site.node.cores.value % site.ranks_per_node == 0


@pytest.mark.parametrize(
    ("name", "path", "value", "basis"),
    [
        ("aion", "h100e", 288_000, "declared"),
        ("aion", "power.facility_watts", 200e6, "assumed"),
        ("aion", "power.cap_watts", 200e6, "assumed"),
        ("jupiter", "power.it_watts", 15.8e6, "measured"),
        ("jupiter", "power.device_watts", 680, "declared"),
        ("leonardo", "power.it_watts", 7_493_740, "measured"),
        ("lumi", "power.it_watts", 7.1e6, "assumed"),
        ("alps", "power.device_watts", 660, "declared"),
        ("marenostrum5", "power.pue", 1.08, "declared"),
        ("scaleway-nabu", "power.it_watts", 1.3e6, "assumed"),
    ],
)
def test_power_is_as_its_source_has_it(name, path, value, basis):
    figure = dict(load.site(name).figures())[path]
    assert (figure.value, figure.basis) == (value, basis)


def test_megawatts_become_nodes_where_the_figures_are_and_are_refused_elsewhere():
    """What a node of the facility takes: JUPITER's is 15.8 MW / 5,884 x 1.1 = 2,954 W."""
    feeds = {"jupiter": 33, "leonardo": 41, "lumi": 40, "marenostrum5": 24, "scaleway-jero": 12, "scaleway-nabu": 8}
    for name in SHIPPED:
        if name in feeds:
            assert size(load.site(name), megawatts=0.1).nodes == feeds[name]
        else:
            with pytest.raises(SiteError, match=r"power\."):
                size(load.site(name), megawatts=0.1)
    aion = load.site("aion")
    assert aion.power.facility_watts.value is not None
    assert aion.h100e.value is not None
    assert aion.power.facility_watts.value / aion.h100e.value == pytest.approx(694.4, abs=0.05)


def test_equivalents_rest_on_what_their_count_and_rate_rest_on():
    """Worked out as count x rate / 989: as sure as the count, and assumed where the rate is another accelerator's."""
    for name in SHIPPED:
        site = load.site(name)
        if "/ 989 TFLOP/s, dense bf16 of" in site.h100e.source:
            assert site.h100e.basis == site.accelerators.basis, name
        elif site.accelerators.known and site.h100e.known:
            assert site.h100e.basis == "assumed", name


def test_every_site_plans_the_quickstart_without_torch():
    code = (
        "import sys; from gigatrain import load; from gigatrain.launching.size import size; from gigatrain.planning.plan import plan\n"
        "recipe = load.recipe('quickstart')\n"
        "for name in load.sites(): print(name, plan(recipe, load.site(name), size(load.site(name), gpus=1).ranks).site)\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [f"{name} {name}" for name in SHIPPED]


def test_the_schema_takes_every_shipped_site_and_no_typo():
    check = jsonschema.Draft202012Validator(load.schema("site"))
    for name in SHIPPED:
        check.validate(tree(name))
    for wrong in ({"accelerator": "h1000"}, {"pue": 1.1}, {"nodes": "unknwon"}, {"nodes": 3}, {"power": {"peu": "unknown"}}):
        assert not check.is_valid(tree("jupiter") | wrong), wrong


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('accelerator = "gh20"', 'did you mean "gh200"?'),
        ('nodes = { value = 3, basis = "declared" }', "nodes: 3 has no source"),
        ('nodes = { basis = "declared", source = "x" }', "unknown exactly if it has no value"),
        ('nodes = { value = -1, basis = "declared", source = "x" }', "-1 is below 0"),
        ('nodes = "unknwon"', "nodes: "),
        ('[power]\npeu = "unknown"', 'power.peu: unknown key; did you mean "pue"?'),
        (
            'accelerators = { value = 8, basis = "declared", source = "x" }\nnodes = { value = 3, basis = "declared", source = "x" }\n'
            '[node]\naccelerators = { value = 4, basis = "declared", source = "x" }',
            "3 nodes of 4 accelerators are 12, and accelerators says 8",
        ),
        ('accelerator = "mi250x"\n[scheduler]\nbind = "closest"', 'which on an MI250X node it does not; set bind = "none"'),
    ],
)  # fmt: skip
def test_a_wrong_site_is_refused_by_key(tmp_path, text, said):
    (tmp_path / "mine.toml").write_text(FILE + text)
    with pytest.raises(SiteError) as refused:
        load.site(tmp_path / "mine.toml")
    assert said in str(refused.value)


def test_a_site_comes_back_from_the_json_that_a_job_keeps(tmp_path):
    for name in SHIPPED:
        site = load.site(name)
        (tmp_path / "site.json").write_text(site.model_dump_json())
        assert load.site(tmp_path / "site.json") == site


def test_figures_are_walked_in_the_order_of_the_file():
    found = dict(load.site("jupiter").figures())
    assert list(found)[:4] == ["accelerators", "h100e", "nodes", "node.accelerators"]
    assert found["scheduler.max_time_s"].value == 12 * 3600
    assert all(isinstance(figure, Figure) for figure in found.values())
    assert len(found) == json.dumps(load.site("jupiter").model_dump(mode="json")).count('"basis"')
