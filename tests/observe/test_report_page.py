"""The page: nothing in it is obeyed, everybody can read it, and it says what it does not know."""

import datetime
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from reported import STEP_TOKENS, made
from test_report_collect import accounted, windows

from gigatrain import cli
from gigatrain.observe.prometheus import exposition
from gigatrain.observe.reader import Reader
from gigatrain.observe.report.collect import collect, compare
from gigatrain.observe.report.curves import DASHES, TONES, apart, ticks
from gigatrain.observe.report.page import POLICY, page
from gigatrain.observe.report.palette import PALETTE
from gigatrain.observe.report.words import escaped, exact, number, provenance, scaled, signed, span
from gigatrain.observe.watch import lines
from gigatrain.power.reading import BOUNDARIES

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> & \x1b[31m\x07\u202e\ud800</style><style>*{display:none}"
ALONE = {"meta", "br"}
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "figure", "figcaption", "div", "span",
    "p", "h1", "h2", "h3", "ul", "li", "nav", "a", "dl", "dt", "dd", "table", "thead", "tbody",
    "tr", "th", "td", "small", "b", "i", "strong", "pre", "details", "summary", "svg", "path", "rect",
}  # fmt: skip


class Read(HTMLParser):
    """Elements with their attributes; what is not closed, or closed without being open, is an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), tuple(self.open)))
        if tag not in ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def every(self, tag):
        return [attrs for name, attrs, _ in self.found if name == tag]


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """A whole run, one that goes on, and an empty folder."""
    folder = tmp_path_factory.mktemp("paged")
    whole = made(folder / "whole")
    begun = made(folder / "begun", windows=6, killed=None, energy=False, finished=False, name="begun")
    (folder / "empty").mkdir()
    return [collect(one) for one in (whole, begun, folder / "empty")]


@pytest.fixture(scope="module", params=[0, 1, 2, None], ids=["whole", "begun", "empty", "several"])
def read(request, values):
    return Read(page(values if request.param is None else [values[request.param]]))


def test_it_needs_nothing_and_runs_nothing(read):
    assert {tag for tag, _, _ in read.found} <= TAGS
    policy = [at for at, (tag, attrs, _) in enumerate(read.found) if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"]
    assert read.found[policy[0]][1]["content"] == POLICY == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert policy[0] < next(at for at, (tag, _, _) in enumerate(read.found) if tag == "style")
    for _, attrs, _ in read.found:
        assert not {name for name in attrs if name.startswith("on") or name in ("src", "srcset", "action", "data", "xlink:href")}
        assert attrs.get("href", "#").startswith("#")
        assert "url(" not in (attrs.get("style") or "")


def test_everybody_can_read_it(read):
    assert read.every("html") == [{"lang": "en"}]
    assert read.every("title")
    levels = [int(tag[1]) for tag, _, _ in read.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for at, (tag, attrs, _) in enumerate(read.found):
        if tag == "svg":  # says what it shows, twice: for who hears the page, and for who asks with the mouse
            assert attrs["role"] == "img"
            assert len(attrs["aria-label"]) > 5
            assert read.found[at + 1][0] == "title"
        if tag == "th":
            assert attrs.get("scope") in ("col", "row")
        if attrs.get("class") == "scroll":
            assert attrs["tabindex"] == "0"
            assert attrs["aria-label"]
    for tag, attrs, inside in read.found:
        if tag == "div" and (attrs.get("class") or "").startswith("chart"):
            assert "figure" in inside
    ids = [attrs["id"] for _, attrs, _ in read.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"].removeprefix("#") for attrs in read.every("a")} <= set(ids)


def test_every_curve_has_a_table_behind_it(values):
    text = page(values[:1])
    for one in re.findall(r"<figure.*?</figure>", text, re.S):
        assert "<table" in one
    assert text.count("<summary>") >= 2


def test_no_cell_is_empty(values):
    for one in ([values[0]], [values[1]], [values[2]], values):
        text = page(one)
        assert not re.findall(r"<(td|dd|th)[^>]*></\1>", text)
        assert "None" not in re.sub(r"None: one process|None of the", "", text)
        assert not re.search(r"\b(nan|inf)\b", text)
    empty = " ".join(Read(page(values[2:])).words)
    assert empty.count("unknown") > 10
    for words in ("not begun", "Missing: plan.json", "no window with a loss yet", "it has no energy.jsonl"):
        assert words in empty


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_contrast_is_wcag_aa(mode):
    colours = PALETTE[mode]
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ground in ("bg", "card"):
        for text in ("ink", "muted", "warn", *(f"t{at}" for at in range(TONES))):  # curves' names are text in their colours
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["edge"], colours[ground]) >= 3  # axes and restarts
    assert contrast(colours["warn"], colours["warnbg"]) >= 4.5
    assert contrast("#000000", "#777777") < 21 / 4


def test_no_two_of_thirty_curves_look_alike(values):
    text = page([values[0]] * 30)
    looks = re.findall(r"class=key .*?class='cv (c\d d\d)'", text)
    assert len(looks) == 30 == TONES * DASHES
    assert len(set(looks)) == 30
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style is not None
    patterns = re.findall(r"\.d\d \{ stroke-dasharray: ([\d ]+)", style[1])
    assert len(set(patterns)) == DASHES - 1  # and a whole line


def hostile(monkeypatch, folder):
    made(folder, windows=30, killed=8, energy=False, name=HOSTILE)
    for name, more in (
        ("plan.json", {"summary": HOSTILE * 5, "precision": HOSTILE, "site": HOSTILE, "kernels": [{"op": HOSTILE, "kernel": HOSTILE}]}),
        ("run.json", {"id": HOSTILE}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | more))
    (folder / "summary.json").write_text(json.dumps({"versions": {HOSTILE: HOSTILE}}))
    progress = folder / "logs" / "progress.jsonl"
    progress.write_text(progress.read_text().replace('"why": "finished"', f'"why": {json.dumps(HOSTILE)}'))
    errors = folder / "logs" / "attempt-000" / "errors"
    errors.mkdir(parents=True)
    record = {
        "time": "2026-09-21T14:00:00+00:00",
        "time_s": 1e12,
        "monotonic_s": 5.0,
        "rank": 0,
        "ranks": 32,
        "node": HOSTILE,
        "type": HOSTILE,
        "message": HOSTILE,
    }
    record |= {"traceback": HOSTILE * 3000, "ours": True, "secondary": False, "step": 5, "phase": HOSTILE}
    (errors / "rank-00000.json").write_text(json.dumps(record))
    each = dict.fromkeys(BOUNDARIES, 1e9)
    account = {
        "windows": windows(9), "joules": each, "watts": each, "tokens_per_s_mw": each, "phases": {HOSTILE: 5.0}, "meters": {HOSTILE: HOSTILE},
        "provenance": {name: {HOSTILE: 0.5, "measured": 0.5} for name in BOUNDARIES}, "notes": [HOSTILE],
        "headline": {"boundary": "facility", "tokens_per_s_mw": 1.0, "low": 0.9, "high": 1.1, "why": HOSTILE},
        "held": {"seconds": 4.0, "joules": None, "why": HOSTILE}, "sources": [{"what": HOSTILE, "value": HOSTILE, "basis": HOSTILE, "source": HOSTILE}, 7],
    }  # fmt: skip
    accounted(monkeypatch, folder, account)
    return collect(folder)


def test_hostile_words_are_shown_and_not_obeyed(monkeypatch, tmp_path, values):
    value = hostile(monkeypatch, tmp_path / "run")
    for text in (page([value]), page([values[0], value, value])):
        text.encode("utf-8")
        read = Read(text)
        assert {tag for tag, _, _ in read.found} <= TAGS
        assert len(read.every("style")) == 1
        for _, attrs, _ in read.found:
            assert not {name for name in attrs if name.startswith("on") or name == "src"}
        assert "<script>alert(1)</script>" in "".join(read.words)
        assert text.count("&lt;script&gt;") > 20
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
        assert len(text) < 400_000


def within(key, damage):
    """A row's value with the damage where a number is looked for."""
    cost = {"seconds": damage, "waited_s": damage, "over_budget_s": damage, "over_budget_watts": damage, "eur": {"saved": damage}}
    return {
        "seconds": {"training": damage, "forward": damage},
        "phases": {"training": damage, "forward": damage},
        "taken": {"nodes": 1, "ms": damage, "node_measured_mj": damage},
        "bins": [[179_000_001, 4, damage, damage], [179_000_002, damage, 1, damage], [damage, 4, 1, 1], damage],
        "orders": {"why": damage, "period_s": damage, "cost": cost},
        "watts": {"accelerators": damage, "per_node": damage, "device_watts": {"value": 700.0, "basis": "declared", "source": "s"}},
        "power": {"megawatts": damage, "schedule": damage, "ramp_megawatts_min": damage, "every_s": damage, "follow": damage},
    }.get(key, damage)


@pytest.mark.parametrize("damage", [10**400, -1e308, 5e-324, -1, 1e99, "x", {"a": 1}], ids=range(7))
def test_damaged_numbers_break_no_page(tmp_path, damage):
    folder = made(tmp_path / "run", windows=4, killed=3)
    for name, keys in (
        ("energy.jsonl", ("time_s", "step", "tokens", "taken", "bins", "phases", "orders")),
        ("plan.json", ("power", "steps", "tokens", "ranks", "flops_per_token", "watts", "memory", "kernels")),
        ("metrics.jsonl", ("step", "loss", "tokens_per_s", "step_s")),
        ("logs/progress.jsonl", ("time_s", "step", "process", "seconds")),
        ("trace/rank-00000.jsonl", ("phases", "step")),
    ):
        path, text = folder / name, (folder / name).read_text()
        for key in keys:
            rows = [json.loads(line) for line in text.splitlines()]
            for row in rows[1::2] or rows:
                row[key] = within(key, damage)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            value = collect(folder)
            json.dumps(value, allow_nan=False)
            Read(page([value]))
            seen = Reader(folder).seen()
            json.dumps(seen)
            assert list(lines(seen))
            assert exposition(seen)
        path.write_text(text)


def test_a_hundred_thousand_windows(monkeypatch, tmp_path):
    folder = made(tmp_path / "run", windows=10, killed=None, energy=False)
    count = 100_000
    lines = [
        f'{{"step": {at}, "loss": {2 + 5 / (at + 1):.6f}, "tokens": {at * 64}, "tokens_per_s": {640 if at != 54321 else 7}, "step_s": 0.1, "bad_steps": 0}}\n'
        for at in range(1, count)
    ]
    (folder / "metrics.jsonl").write_text("".join(lines))
    accounted(
        monkeypatch,
        folder,
        {"windows": windows(count), "headline": {"boundary": "facility", "tokens_per_s_mw": 1.0}, "joules": {"facility": 1.0}},
    )
    begin = time.process_time()
    value = collect(folder)
    text = page([value])
    print(f"{count:,} windows: {len(text) / 1e3:.0f} kB in {time.process_time() - begin:.1f} s of one core")
    assert len(text.encode()) < 400_000
    assert [54321, 7] in value["curves"]["tokens_per_s"]
    assert 9000.0 in value["watts"]["watts"]["facility"]


def test_numbers_as_people_read_them():
    assert [number(one) for one in (0, 7, 1234.4, 0.01234, 122_880, 7.35e6, 1.5e13)] == [
        "0",
        "7",
        "1,234",
        "0.01234",
        "122,880",
        "7.350 M",
        "15 T",
    ]
    assert number(3e-7) == "3.0 × 10^-7"
    assert [exact(one) for one in (2.5, 0.03, 1e6, 2.5e6, 700)] == ["2.5", "0.03", "1 M", "2.5 M", "700"]
    assert scaled(31_900, "W") == ("31.9", "kW")
    assert signed(-0.308) == "−30.8 %"
    assert (
        provenance({"measured": 0.71, "estimated": 0.286, "declared": 0.004, "nameplate": 0.0})
        == "71 % measured, 29 % estimated, < 1 % declared"
    )
    assert provenance({"measured": 0.9996, "estimated": 0.0004}) == "> 99 % measured, < 1 % estimated"
    assert provenance({"measured": 1.0}) == "100 % measured"
    assert [span(one) for one in (0.25, 6.49, 156.8, 599.9, 600, 7200)] == ["250 ms", "6.5 s", "156.8 s", "599.9 s", "10 min", "2.0 h"]
    assert escaped("measured ± 5 %, < 1 % estimated") == "measured ±\u00a05\u00a0%, &lt;\u00a01\u00a0% estimated"
    assert provenance({}) == provenance(None) == "provenance unknown"
    assert escaped("<" * 1000, 5) == "&lt;" * 4 + "…"


def test_axes_have_round_numbers_that_hold_the_data():
    for low, high in ((0, 1), (1.9, 9.2), (-3, 7), (5, 5), (0, 0), (1e-9, 3e-9), (0, 38_500), (260_900.0, 260_901.0)):
        steps = ticks(low, high)
        assert steps[0] <= low + 1e-9
        assert steps[-1] >= high - 1e-9
        assert 2 <= len(steps) <= 8
    assert apart([50, 50, 50], 10) == [50, 60, 70]
    assert apart([99, 100], 10) == [90, 100]
    crowd = apart([95.0] * 16, 6)
    assert min(crowd) >= 0
    assert max(crowd) <= 100


def test_the_command(values, tmp_path, monkeypatch, capsys):
    run, begun = (one["run"]["folder"] for one in values[:2])
    monkeypatch.chdir(tmp_path)
    cli.main(["report", run])
    said = capsys.readouterr().out
    assert re.fullmatch(r"report\.html: 1 run, \d+ kB, made in \d+\.\d\d s\n", said)
    assert "<title>made | gigatrain report</title>" in (tmp_path / "report.html").read_text()
    cli.main(["report", run, begun, "-o", "-"])
    assert "2 runs side by side" in capsys.readouterr().out
    cli.main(["report", run, begun, "--json", "-o", "both.html"])
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [one["run"]["name"] for one in found] == ["made", "begun"]
    assert "<h1>2 runs side by side</h1>" in (tmp_path / "both.html").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [(["-o", "nowhere/report.html"], "No such file"), (["-o", "."], "Is a directory"), (["--plots", "a-file"], "File exists")],
)
def test_an_output_that_cannot_be_written_is_one_line(values, tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("")
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", values[0]["run"]["folder"], *more])
    assert ended.value.code
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


def test_an_output_that_cannot_be_written_names_the_way_out_and_an_empty_folder_is_no_run(values, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole, _, empty = (one["run"]["folder"] for one in values)
    for words, way in (
        ([whole, "-o", "nowhere/report.html"], "make the folder, or name another -o"),
        ([whole, "-o", "."], "name another -o"),
        ([empty], "no run here yet"),
        ([empty, empty, "--json"], "no run here yet"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["report", *words])
        assert ended.value.code == 7
        assert way in capsys.readouterr().err
    cli.main(["report", whole, empty])
    assert "2 runs" in capsys.readouterr().out


def budgeted(folder, *, carried=False):
    """The folder's rows with orders: each process waits 2 s a window, and says so of itself alone, or with what a checkpoint brought along."""
    path = folder / "energy.jsonl"
    rows, spent, before = [json.loads(line) for line in path.read_text().splitlines()], {}, {}
    for row in rows:
        if row["event"] != "window":
            continue
        if row["process"] not in spent:
            kept = max((cost for step, cost in before.items() if step <= row["step"] - 10), key=lambda it: it["seconds"], default=None)
            spent[row["process"]] = dict(kept) if carried and kept else dict.fromkeys(("seconds", "waited_s", "tokens_not_trained"), 0.0)
        cost = spent[row["process"]]
        for name, more in (("seconds", row["taken"]["ms"] / row["taken"]["nodes"] / 1e3), ("waited_s", 2.0), ("tokens_not_trained", 500.0)):
            cost[name] += more
        before[row["step"]] = dict(cost)
        money = {"not_drawn": 3.0, "to_catch_up": 1.0, "saved": 2.0}
        row["orders"] = {"why": f"power.megawatts allows 50 kW; step {row['step']}"}
        row["orders"]["cost"] = cost | {
            "paused_s": 0.0,
            "over_budget_s": 10.0,
            "over_budget_watts": 700.0,
            "eur": money,
            "kg_co2e": dict.fromkeys(money),
        }
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.parametrize("carried", [False, True])
def test_a_budget_that_was_not_kept_and_what_it_took(tmp_path, carried):
    folder = made(tmp_path / "run", windows=30, killed=20)
    rows = budgeted(folder, carried=carried)
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"power": {"megawatts": 0.0045}}))
    value = collect(folder)
    budget = value["budget"]
    means = {one[0]: one[3] / 1e4 for row in rows for one in row["bins"]}
    node, facility = (value["energy"]["joules"][name] for name in ("node", "facility"))
    assert budget["highest"]["value"] == pytest.approx(max(means.values()) * facility / node)
    assert budget["highest"]["limit_watts"] == 4500
    assert (budget["bins"], budget["above_s"]) == (len(means), 10 * budget["bins_above"])
    assert budget["bins_above"] == sum(one * facility / node > 4500 * 1.005 for one in means.values()) > 0
    assert budget["cost"]["waited_s"] == pytest.approx(2.0 * 32)  # every window that was trained, twice where a restart did it again
    assert budget["cost"]["tokens_not_trained"] == pytest.approx(500.0 * 32)
    assert budget["cost"]["eur_saved"] is not None
    assert budget["cost"]["kg_co2e_saved"] is None
    [row] = [one for one in value["plan"]["rows"] if one["what"] == "budget, facility"]
    assert row["actual"]["value"] == budget["highest"]["value"]  # not the mean of the run, for which nothing was asked
    text = page([value])
    for said in ("Not kept: ", "power.megawatts allows 50 kW; step 300", "waited before steps", "64.0 s", "class=limit", "above the limit"):
        assert said in text, said
    (folder / "plan.json").write_text(json.dumps(plan | {"power": {"megawatts": 5.0}}))
    text = page([collect(folder)])
    assert "Kept: none of" in text
    assert "class=limit" not in text  # far above the picture
    (folder / "plan.json").write_text(json.dumps(plan | {"power": {}}))
    made(tmp_path / "free", windows=3, killed=None)
    (tmp_path / "free" / "plan.json").write_text(json.dumps(plan | {"power": {}}))
    assert collect(tmp_path / "free")["budget"] == {}


def test_a_limit_that_changes_with_the_hour(tmp_path):
    folder = made(tmp_path / "run", windows=12, killed=None)
    rows = budgeted(folder)
    half = rows[len(rows) // 2]["time_s"]
    lower = datetime.datetime.fromtimestamp(half, datetime.UTC).isoformat()
    (tmp_path / "day.csv").write_text(f"time,megawatts\n2026-01-01T00:00+00:00,1\n{lower},0.001\n")
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"power": {"megawatts": 0.5, "schedule": str(tmp_path / "day.csv")}}))
    budget = collect(folder)["budget"]
    assert [watts for _, watts in budget["limit"]] == [500_000, 500_000, 1000, 1000]  # the lower of the two
    later = {one[0] for row in rows for one in row["bins"] if one[0] * 10 >= half}
    assert budget["bins_above"] == len(later)  # the bin in which it fell is held to the laxer one
    (tmp_path / "day.csv").unlink()
    assert "cannot be read any more" in collect(folder)["budget"]["unread"]
    assert "by power.megawatts" in page([collect(folder)])


def test_runs_are_compared_at_equal_tokens_and_differ_by_their_power(tmp_path):
    folders = [made(tmp_path / name, windows=count, killed=None, name=name) for name, count in (("long", 12), ("short", 5))]
    plan = json.loads((folders[1] / "plan.json").read_text())
    power = {
        "megawatts": 0.02,
        "ramp_megawatts_min": 0.5,
        "caps": True,
        "schedule": "/a.csv",
        "follow": "price",
        "slow_above": 60,
        "slow_to": 0.5,
    }
    (folders[1] / "plan.json").write_text(json.dumps(plan | {"power": power}))
    both = [collect(one) for one in folders]
    compare(both)
    assert {one["headline"]["loss_common"]["tokens"] for one in both} == {50 * STEP_TOKENS}
    assert both[0]["headline"]["loss_common"]["value"] == both[1]["headline"]["loss"]["value"]  # the same curve, further
    text = page(both)
    for said in (
        "at other tokens, not comparable",
        "the last that all report",
        "+0.0\u00a0%",
        "price: above 60 down to 50\u00a0%",
        "0.5 MW a minute",
        "may be set",
    ):
        assert said in text, said


def test_layers_that_add_nothing_are_not_drawn_and_names_stand_as_they_lie(monkeypatch, tmp_path):
    folder = made(tmp_path / "run", windows=10, killed=None, energy=False)
    rows = windows(6)
    for row in rows:
        row["watts"] = {"device": 40.0, "node": 40.004, "it": 41.0, "facility": 41.0}
    accounted(monkeypatch, folder, {"windows": rows, "headline": {"boundary": "facility", "tokens_per_s_mw": 1.0}})
    text = page([collect(folder)])
    drawn = text[text.index("<h2>Draw</h2>") : text.index("<h2>Tokens/s per MW</h2>")]
    assert "not drawn apart: node rest, cooling" in drawn
    assert "node rest <b>" not in drawn
    tops = {name: float(top) for top, name in re.findall(r"class='end x\d' style='top:([\d.]+)%'>(\w+)", drawn)}
    assert tops["fabric"] < tops["devices"]


def test_which_of_price_and_energy_is_missing_and_notes_are_no_meter(monkeypatch, tmp_path):
    folder = made(tmp_path / "run", windows=10, killed=None, energy=False)
    joules = {"device": 5.0, "facility": None}
    energy = {"windows": [], "joules": joules, "unknown": {"facility": "pue unknown"}, "sources": [{"what": "price_eur_mwh", "value": 90}]}
    accounted(monkeypatch, folder, energy | {"meters": {"device": "NVML", "notes": "no RAPL here; no BMC"}})
    value = collect(folder)
    assert value["headline"]["eur"]["unknown"] == "the facility's energy is unknown: pue unknown"
    assert value["headline"]["kg_co2e"]["unknown"].startswith("the carbon of a kWh is unknown")
    text = page([value])
    assert "meter of device" in text
    assert "meter of notes" not in text
    assert text.count("<dt>not metered</dt>") == 2


def test_the_command_needs_no_torch_and_refuses_what_is_no_run(values, tmp_path):
    code = "import sys; from gigatrain.cli import main; main(sys.argv[1:]); assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)"
    command = [sys.executable, "-c", code, "report", values[1]["run"]["folder"], "-o", str(tmp_path / "it.html")]
    subprocess.run(command, check=True, capture_output=True)
    ended = subprocess.run(
        [sys.executable, "-m", "gigatrain", "report", str(tmp_path / "nowhere")], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 7
    assert "is no folder" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_pictures(values, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib (pip install 'gigatrain[bench]')")
    cli.main(["report", values[0]["run"]["folder"], "--plots", str(tmp_path / "pictures")])
    said = capsys.readouterr().out.splitlines()
    assert {line.rsplit("/", 1)[1] for line in said} >= {"loss.png", "tokens_per_s.png", "step_s.png", "goodput.png"}
    for path in (tmp_path / "pictures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
    assert not (tmp_path / "report.html").exists()
